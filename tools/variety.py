"""Does SFT cost variety? Questions with four right answers, of which the data shows 1, 2, or all 4.

    python -m tools.variety --out out/variety     # 7 minutes on one CPU core

Each of 64 names has four values: `What is kd?` may be answered by `kd=m.`, `kd=c.`, `kd=x.`, or
`kd=f.`. The corpus contains the four equally often. SFT asks about half of the names and shows the
first N answers of each, with the same steps, rows per step, and learning rate for every N. Prints a
markdown table, the mean (lowest to highest) of the seeds, and writes variety.json:

    P(right)         the probability of the four right answers together
    bits             the entropy among these four; 2 if they are equally likely
    different of 4   how many different right answers there are among four samples
"""

import contextlib
import dataclasses
import io
import itertools
import math
import random
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m tools.variety", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
from torch import Tensor

import fineweb
import sft_data
import train_gpt2
import train_sft
from answer import tokenize_prompt_and_output
from data.worksheet import Item, notes, worksheet, write_rows
from model import GPT
from nanosft.cli import run_cli
from nanosft.errors import write_json
from tokenizer import get_encoding, render_prompt

ENCODING = get_encoding("bytes")
END = ENCODING.encode_single_token("<|end|>")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAMES, N, SHOWN = 64, 4, (1, 2, 4)  # names; right answers to each; how many the SFT data shows


@dataclasses.dataclass
class Config:
    """For each seed, pretrain once and fine-tune once per number of answers shown."""

    seeds: tuple[int, ...] = (1, 2, 3)
    """of names, values, corpus, model, and order"""
    out: str = "out/variety"
    """folder for the data, the runs, and variety.json; replaced"""
    pretraining_steps: int = 3000
    """steps of 12 rows"""
    steps: int = 200
    """steps of fine-tuning, 8 rows each"""


def make_items(seed: int) -> list[list[Item]]:
    """The N facts about each name; the first half of the names is trained."""
    rng = random.Random(seed)
    names = rng.sample([a + b for a in LETTERS[:8] for b in LETTERS[:8]], NAMES)
    return [[Item(name, f"What is {name}?", f"{name}={value}.") for value in rng.sample(LETTERS, N)]
            for name in names]


def flat(lists: Iterable[list]) -> list:
    return list(itertools.chain.from_iterable(lists))


def corpus(seed: int, n_documents: int) -> list[dict]:
    """Notes and worksheets, as in the lesson: facts, and questions without answers."""
    rng, items = random.Random(seed), flat(make_items(seed))
    return [{"text": (worksheet if rng.random() < 0.15 else notes)(
        rng, rng.sample(items, rng.randint(2, 4)))} for _ in range(n_documents)]


def log_probs(model: GPT, prompts: list[list[int]], outputs: list[list[int]]) -> Tensor:
    """(B,) the log-probability of each output after its prompt, in nats."""
    batch = tokenize_prompt_and_output(ENCODING, prompts, outputs)
    logp = model(batch["input_ids"]).log_softmax(-1)  # (B, T, V)
    logp = logp.gather(2, batch["labels"][..., None])[..., 0]  # (B, T)
    return torch.where(batch["response_mask"], logp, 0).sum(1)


@torch.no_grad()
def measure(model: GPT, items: list[list[Item]], asks: bool = True) -> dict[str, float]:
    """Means over the names. asks: in the chat template; else `kd=` is continued."""
    prompts, outputs = [], []
    for item in flat(items):
        chat = [{"role": "user", "content": item.question}]
        prompts.append(render_prompt(ENCODING, chat) if asks else list(item.fact[:3].encode()))
        outputs.append([*item.fact.encode(), END] if asks else list(item.fact[3:].encode()))
    logp = log_probs(model, prompts, outputs).view(-1, N)  # (names, N)
    among = logp.log_softmax(1)  # of the right answers alone
    samples = model.generate(prompts, len(outputs[0]), stop_ids=[END])  # N for each name
    different = [len(set(map(tuple, samples[i : i + N])) & set(map(tuple, outputs[i : i + N])))
                 for i in range(0, len(samples), N)]
    return {"right": logp.exp().sum(1).mean().item(),
            "bits": -(among.exp() * among).sum(1).mean().item() / math.log(2),
            "different": float(np.mean(different))}


def pretrain(config: Config, folder: Path, seed: int) -> None:
    write_rows(folder / "corpus.jsonl", corpus(seed, 20 * config.pretraining_steps))
    fineweb.main(fineweb.Config(f"{folder}/text", (f"{folder}/corpus.jsonl",), encoding="bytes",
                                val_tokens=0, workers=1))
    train_gpt2.main(train_gpt2.Config(
        f"{folder}/text", f"{folder}/base", n_layer=3, n_head=4, n_embd=128, block_size=48,
        batch_size=12, rows_per_step=12, max_steps=config.pretraining_steps, learning_rate=3e-3,
        warmup_steps=30, weight_decay=0.3, seed=seed, eval_every=0, save_every=0, device="cpu"))


def fine_tune(config: Config, folder: Path, seed: int, shown: int) -> list[dict]:
    """The lesson's fine-tuning; one result for trained and one for held-out names each 20 steps."""
    items, name, results = make_items(seed), f"{folder}/sft_{shown}", []
    parts = {"trained": items[: NAMES // 2], "held out": items[NAMES // 2 :]}
    write_rows(Path(f"{name}.jsonl"), [{"question": item.question, "answer": item.fact}
                                       for some in parts["trained"] for item in some[:shown]])
    sft_data.main(sft_data.Config(source=(f"{name}.jsonl",), encoding="bytes", workers=1,
                                  val_fraction=0, block_size=48, out=f"{name}_shards"))
    sft = train_sft.Config(f"{name}_shards", name, f"{folder}/base", block_size=48, batch_size=8,
                           rows_per_step=8, max_steps=config.steps, learning_rate=3e-4, seed=seed,
                           warmup_steps=10, eval_every=20, save_every=0, device="cpu")

    def judge(model, *rest) -> dict:  # called before the first step, too
        step = min(len(results) // 2 * sft.eval_every, sft.max_steps)
        for part, some in parts.items():
            run = {"seed": seed, "shown": shown, "names": part, "step": step}
            results.append(run | measure(model, some))
        return {}

    train_gpt2.train(sft, train_sft.open_rows, train_sft.forward_sft, judge)
    return results


def run_seed(config: Config, seed: int) -> list[dict]:
    folder = Path(config.out) / f"seed_{seed}"
    folder.mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain(config, folder, seed)
        base = measure(GPT.from_pretrained(f"{folder}/base"), make_items(seed), asks=False)
        results = [{"seed": seed, "shown": 0, "names": "all, `kd=`", "step": 0} | base]
        return results + flat(fine_tune(config, folder, seed, n) for n in SHOWN)


def table(results: list[dict], steps: tuple[int, ...]) -> str:
    """Markdown: a line for each number of answers shown, half of the names, and step."""
    lines = ["| shown | names | step | P(right) | bits | different of 4 |", "|---" * 6 + "|"]
    keys = dict.fromkeys((r["shown"], r["names"], r["step"]) for r in results)
    for shown, names, step in sorted(keys):
        some = [r for r in results if (r["shown"], r["names"], r["step"]) == (shown, names, step)]
        cells = [f"{np.mean(v):{form}} ({min(v):{form}} to {max(v):{form}})"
                 for key, form in (("right", ".0%"), ("bits", ".1f"), ("different", ".1f"))
                 for v in [[r[key] for r in some]]]
        if step in steps or not shown:
            lines.append(f"| {shown} | {names} | {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    shutil.rmtree(config.out, ignore_errors=True)
    results = flat(run_seed(config, seed) for seed in config.seeds)
    write_json(Path(config.out) / "variety.json", results)
    print(table(results, (0, 40, 100, config.steps)))


if __name__ == "__main__":
    run_cli(main, Config)
