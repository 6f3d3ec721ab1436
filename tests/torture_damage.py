"""Damage files of data folders and checkpoints at random, load each, and count what happens.

    python -m tests.torture_damage --n 2000

Prints one line of a table. A damaged file is `refused` with one line, gives the `same` as before
(the damage is in a file that is not read), gives something `other`, or ends in a `traceback`; the
last two must not happen. --no_sums deletes SHA256SUMS first, as in folders of other programs: then
a changed weight cannot be told from a good one, but there is still no traceback.
"""

import collections
import dataclasses
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m tests.torture_damage", file=sys.stderr)
    sys.exit(2)

import torch

from answer import load_assistant
from nanosft.cli import run_cli
from nanosft.errors import UserError, one_line
from nanosft.shards import Shards
from tests.helpers_training import fine_tune, pretrain, random_examples, sft_folder, text_folder
from train_gpt2 import TokenRows, load_checkpoint


@dataclasses.dataclass
class Config:
    """Damage files, load them and count the outcomes."""

    n: int = 2000
    """damaged files"""
    seed: int = 0
    sums: bool = True
    """keep SHA256SUMS"""


def make_folders(root: Path, sums: bool) -> list[Path]:
    """A data folder and a run of each kind; each split has several shards."""
    examples = random_examples(60)
    text = text_folder(root / "text", 200, train=[*range(256)] * 3, val=[*range(99)])
    sft = sft_folder(root / "sft", 200, train=examples, val=examples[:9])
    pretrain(text, root / "base", max_steps=2)
    fine_tune(sft, root / "out", max_steps=2)
    folders = [root / "text", root / "sft", root / "base/step_000002", root / "out/step_000002"]
    for folder in folders if not sums else ():
        (folder / "SHA256SUMS").unlink()
    return folders


def load(folder: Path) -> list:
    """All that the commands read of a folder, to be compared."""
    if not folder.name.startswith("step_"):
        rows = [Shards(str(folder), split, folder.name) for split in ("train", "val")]
        if folder.name == "text":
            TokenRows(str(folder), "train", 16)
        return [rows[0].meta, *(shards[0 : len(shards)].tolist() for shards in rows)]
    model, state = load_checkpoint(str(folder.parent))
    _, encoding, template = load_assistant(str(folder))
    tensors = [*model.state_dict().values(), *flat(state)]
    return [model.config, encoding.name, template,
            [t.numpy().tobytes() if isinstance(t, torch.Tensor) else repr(t) for t in tensors]]


def flat(value) -> Iterator:
    """The leaves of nested dicts and lists, with the keys."""
    if isinstance(value, dict | list | tuple):
        for item in value.items() if isinstance(value, dict) else value:
            yield from flat(item)
    else:
        yield value


# ----- damages: bytes -> other bytes -------------------------------------------------------------


def flip_a_bit(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(min(len(content), rng.choice([160, len(content)])))  # often in the header
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice([0, rng.randrange(len(content)), len(content) - 1])]


def zero_a_block(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    block = content[at : at + rng.choice([8, 64, 512])]
    return content[:at] + bytes(len(block)) + content[at + len(block) :]


def swap_values(content: bytes, rng: random.Random) -> bytes:
    """Exchange two values of a JSON object, or put an odd one in the place of one."""
    found = json.loads(content)
    holder = found
    while rng.random() < 0.6:  # go deeper
        inner = [value for value in holder.values() if isinstance(value, dict) and value]
        holder = rng.choice(inner or [holder])
    a, b = rng.choice(list(holder)), rng.choice(list(holder))
    odd = [None, -1, 0, 10**12, 1e400, True, "", "../x", [], {}, [[]], "raw", "gpt2", 1.5]
    holder[a], holder[b] = (holder[b], holder[a]) if rng.random() < .5 else (rng.choice(odd),) * 2
    return json.dumps(found).encode()


READ = ("meta.json", "config.json", "model.safetensors", "training_state.pt", "SHA256SUMS",
        "tokenizer.json", "tokenizer_config.json")


def one_round(folders: list[Path], before: dict, rng: random.Random) -> tuple[str, str, str]:
    """(kind of file, outcome, what was done) of one damaged file, which is restored."""
    folder = rng.choice(folders)
    path = rng.choice([path for path in sorted(folder.iterdir())
                       if path.name in READ or path.suffix == ".npy"])
    damages = [flip_a_bit, truncate, zero_a_block] + [swap_values] * 3 * (path.suffix == ".json")
    damage, content = rng.choice(damages), path.read_bytes()
    while (damaged := damage(content, rng)) == content:
        pass
    path.write_bytes(damaged)
    try:
        outcome, why = ("same" if load(folder) == before[folder] else "other"), ""
    except (UserError, OSError) as error:
        line = one_line(str(error))
        outcome, why = "refused" if len(line) <= 300 + len(str(path)) else "traceback", line
    except Exception as error:
        outcome, why = "traceback", repr(error)
    path.write_bytes(content)
    kind = path.suffix if path.suffix == ".npy" else path.name
    return kind, outcome, f"{damage.__name__} {folder.name}/{path.name}: {why}"


def torture(n: int, seed: int = 0, sums: bool = True) -> tuple[collections.Counter, list[str]]:
    """({(kind of file, outcome): how many}, what ended badly)."""
    rng, counts, bad = random.Random(seed), collections.Counter(), []
    with tempfile.TemporaryDirectory() as root:
        folders = make_folders(Path(root), sums)
        before = {folder: load(folder) for folder in folders}
        for _ in range(n):
            kind, outcome, what = one_round(folders, before, rng)
            counts[kind, outcome] += 1
            if outcome == "traceback" or (outcome == "other" and sums):
                bad.append(f"{outcome}: {what}")
    return counts, bad


def main(config: Config) -> None:
    counts, bad = torture(config.n, config.seed, config.sums)
    outcomes = collections.Counter()
    for (_, outcome), n in counts.items():
        outcomes[outcome] += n
    kinds = sorted({kind for kind, _ in counts})
    by_kind = ", ".join(f"{sum(n for (k, _), n in counts.items() if k == kind)} {kind}"
                        for kind in kinds)
    cells = [f"{outcomes[name]} {name}" for name in ("refused", "same", "other", "traceback")]
    print(f"| damaged files{'' if config.sums else ', no SHA256SUMS'} | {config.n}: {by_kind} | "
          f"{', '.join(cells)} |")
    if bad:
        print(*bad[:20], sep="\n", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main, Config)
