"""Shared by the tests of models and trainers: tiny models, handmade shards, runs on 1 or 2 ranks.

The models have random weights about ten times as large as GPT-2's, in biases and layer norms too:
a freshly initialized GPT-2 has logits near 0, where a tolerance of 1e-4 would hide most mistakes.
"""

import atexit
import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor

import evaluate
import train_gpt2
import train_sft
from model import GPT, GPTConfig
from nanosft.shards import ShardWriter, write_meta
from tokenizer import get_encoding, render
from train_gpt2 import MicroBatch, Ranks

torch.set_num_threads(1)  # sharing tensors this small among threads only costs time
EOT = 256  # <|endoftext|> of the `bytes` encoding
ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


@dataclasses.dataclass
class Precision:
    """A --dtype, and how closely two ways to compute the same tensor agree in it."""

    dtype: str

    def autocast(self):
        return dataclasses.replace(ALONE, dtype=self.dtype).autocast()

    def assert_close(self, found: Tensor, want: Tensor, **tolerance_in_float32) -> None:
        """In bfloat16: |found - want| <= 2^-6 |want|.

        It has 8 bits, so each result is rounded by up to 2^-9 of itself. Two ways round at
        different places, a few times in a row: measured is up to 1 %. An example that sees its
        neighbor in the row is off by 75 %.
        """
        if self.dtype == "float32":
            torch.testing.assert_close(found, want, **tolerance_in_float32)
        else:
            assert (found.float() - want).norm() <= 2**-6 * want.float().norm()


each_precision = pytest.mark.parametrize(
    "precision", [Precision("float32"), Precision("bfloat16")], ids=lambda p: p.dtype)


def tiny_model(seed: int = 0, spread: float = 0.15, **sizes) -> GPT:
    """A GPT with random weights and the ids of the `bytes` encoding, if no vocab_size is given."""
    ids = {} if "vocab_size" in sizes else {"vocab_size": 320, "n_vocab": 261}
    defaults = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32} | ids
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**(defaults | sizes)))
    with torch.no_grad():
        for p in model.parameters():
            p += spread * torch.randn_like(p)
    return model


def save_tiny_model(folder, seed: int = 0, template: str | None = "chat", **sizes) -> Path:
    settings = {"encoding": "bytes"} | ({"template": template} if template else {})
    tiny_model(seed, **sizes).save_pretrained(folder, **settings)
    return Path(folder)


def gradients(model: GPT) -> list[Tensor]:
    """A copy of each parameter's gradient; a missing one fails here."""
    return [p.grad.clone() for p in model.parameters()]


def plain_loss_sum(model: GPT, x, y, weights=None, segments=None) -> Tensor:
    """Sum of weight * nll, the textbook way: PyTorch's cross-entropy on the full logits."""
    logits = model(x, segments=segments)  # (B, T, V)
    nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none", ignore_index=-100)
    return nll.sum() if weights is None else (nll * weights.flatten()).sum()


# ----- handmade shards ---------------------------------------------------------------------------


def random_examples(n: int, seed: int = 0, longest: int = 20) -> list[tuple[list, list]]:
    """(ids, percent) of n examples of 3 to `longest` ids; the second half of each is trained."""
    rng = np.random.default_rng(seed)
    examples = []
    for length in rng.integers(3, longest + 1, n):
        ids = [*rng.integers(0, 256, length - 1).tolist(), EOT]
        percent = np.where(np.arange(length) < length // 2, 0, rng.choice([7, 50, 100], length))
        examples.append((ids, percent.tolist()))
    return examples


def sft_folder(folder, shard_tokens: int = 10**6, **splits) -> str:
    """sft_folder(path, train=[(ids, percent), …], val=[…]) writes what sft_data.py would."""
    Path(folder).mkdir(parents=True)
    entries = {}
    for split, examples in splits.items():
        writer = ShardWriter(Path(folder), split, shard_tokens)
        for example in examples:
            writer.add(np.array(example, dtype=np.uint16))
        trained = sum(int(np.count_nonzero(percent)) for _, percent in examples)
        entries[split] = writer.finish(examples=len(examples), trained_tokens=trained)
    _write_meta(folder, "sft", entries, template="chat", train_on="all_turns")
    return str(folder)


def text_folder(folder, shard_tokens: int = 10**6, **splits) -> str:
    """text_folder(path, train=[id, …], val=[…]) writes what fineweb.py would."""
    Path(folder).mkdir(parents=True)
    entries = {}
    for split, ids in splits.items():
        writer = ShardWriter(Path(folder), split, shard_tokens)
        writer.add(np.array(ids, dtype=np.uint16))
        entries[split] = writer.finish()
    _write_meta(folder, "text", entries)
    return str(folder)


def _write_meta(folder, kind: str, splits: dict, **more) -> None:
    meta = {"kind": kind, "encoding": "bytes", "vocab_size": 261, "source": [], **more}
    write_meta(Path(folder), meta | {"splits": splits})


def flip_a_bit(shard: Path) -> None:
    """Damage a shard so that length and dtype still fit, and only its sha256 can tell."""
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def chat_example(question: str, answer: str) -> tuple[list[int], list[int]]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return render(get_encoding("bytes"), messages)


# ----- whole training runs, and what they leave --------------------------------------------------

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16}  # only for --init scratch
TINY = {"device": "cpu", "init": "scratch", **SIZES, "block_size": 16, "batch_size": 2,
        "rows_per_step": 4, "warmup_steps": 2, "learning_rate": 1e-2, "eval_every": 3,
        "save_every": 2}


def tiny_flags(flags: dict) -> dict:
    """TINY with these flags over it, and without sizes where --init brings its own."""
    own_sizes = flags.get("init", "scratch") != "scratch"
    defaults = {key: value for key, value in TINY.items() if not (own_sizes and key in SIZES)}
    return defaults | flags


def quietly(main, config) -> str:
    """Run main(config) and return what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(config)
    return out.getvalue()


def pretrain(data, out, **flags) -> str:
    return quietly(train_gpt2.main, train_gpt2.Config(str(data), str(out), **tiny_flags(flags)))


def fine_tune(data, out, **flags) -> str:
    return quietly(train_sft.main, train_sft.Config(str(data), str(out), **tiny_flags(flags)))


def metrics(out) -> list[dict]:
    """metrics.jsonl without the two keys that depend on the clock."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("dt", "tokens_per_s")} for row in rows]


def weights_of(out) -> list[Tensor]:
    return list(GPT.from_pretrained(str(out)).parameters())


def assert_weights_close(a, b) -> None:
    """Equal up to rounding, 1e-6, except for the biases of the keys.

    Adding the same vector to all keys does not change the softmax, so the gradient of that bias is
    nothing but rounding errors, which Adam scales up to steps of full size.
    """
    C = TINY["n_embd"]
    for x, y in zip(weights_of(a), weights_of(b), strict=True):
        if x.shape == (3 * C,):  # c_attn.bias: queries, keys, values
            x, y = (torch.cat([bias[:C], bias[2 * C :]]) for bias in (x, y))
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


# ----- one optimizer step and its gradients ------------------------------------------------------


class KeepGradients(torch.optim.SGD):
    """An optimizer whose step only keeps the gradients."""

    def step(self):
        self.kept = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def step_gradients(model, micro_batches, ranks=ALONE, forward=train_sft.forward_sft):
    """(metrics, gradients) of train_gpt2.train_step."""
    optimizer = KeepGradients(model.parameters(), lr=0.0)
    row = train_gpt2.train_step(model, optimizer, micro_batches, 0.0, 0.0, ranks, forward)
    return row, optimizer.kept


def pick(batch: MicroBatch, *rows: int) -> MicroBatch:
    """Some rows of a micro-batch as a micro-batch."""
    fields = (t if t is None else t[list(rows)] for t in batch[:4])
    part = MicroBatch(*fields)
    return part._replace(n_tokens=int((part.segments >= 0).sum()))


def step_cases() -> dict[str, MicroBatch]:
    """Micro-batches of four rows of unequal lengths, two examples in each, weights in percent."""
    T, random = 12, torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (4, T + 1), generator=random)
    percent = torch.tensor([0, 7, 50, 100])[torch.randint(0, 4, (4, T), generator=random)]
    segments = (torch.arange(T) >= 5).long().expand(4, T).clone()
    for row, n in enumerate((12, 11, 8, 3)):  # non-padding positions
        percent[row, n:], segments[row, n:] = 0, -1
    untrained = {  # case -> rows without a trained token
        "weights of 7, 50 and 100 %": [],
        "a row without a trained token": [1],
        "a rank without a trained token": [2, 3],
        "a short last batch": [3],
        "no trained token at all": [0, 1, 2, 3],
    }
    cases = {}
    for name, rows in untrained.items():
        case, seen = percent.clone(), segments.clone()
        case[rows] = 0
        if name == "a short last batch":
            seen[rows] = -1
        y = ids[:, 1:].masked_fill(case == 0, -100)
        cases[name] = pick(MicroBatch(ids[:, :-1], y, case / 100, seen), 0, 1, 2, 3)
    return cases


# ----- two ranks over Gloo, started once for all tests -------------------------------------------


@functools.cache
def two_ranks() -> Path:
    """A folder with what two ranks made of `step_cases`, two training runs and evaluate.py."""
    folder = Path(tempfile.mkdtemp(prefix="nanosft_two_ranks_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sft_folder(folder / "sft", train=random_examples(23), val=random_examples(5, seed=1))
    ids = np.random.default_rng(2).integers(0, 257, 16 * 11 + 5).tolist()
    text_folder(folder / "text", train=ids, val=ids[:70])
    save_tiny_model(folder / "model", block_size=64)
    rows = [{"prompt": f"{i}+{i}=", "response": f"{2 * i}"} for i in range(7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.multiprocessing.spawn(_run_rank, args=(free_port(), folder), nprocs=2)
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def resume_on(world_size: int, data: Path, out: Path) -> None:
    """Continue the run `out_sft` of two_ranks() on this many ranks."""
    torch.multiprocessing.spawn(_resume_rank, (world_size, free_port(), data, out), world_size)


def _resume_rank(rank: int, world_size: int, port: int, data: Path, out: Path) -> None:
    _set_rank(rank, world_size, port)
    fine_tune(data, out, epochs=2, batch_size=1, resume=True)


def _set_rank(rank: int, world_size: int, port: int) -> None:
    """What torchrun does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


def evaluate_both(folder: Path, save: str) -> str:
    """What evaluate.py prints for 7 rows, of which two ranks have unequal shares."""
    config = evaluate.Config(str(folder / "model"), str(folder / "rows.jsonl"), device="cpu",
                             max_new_tokens=8, batch_size=3, save=str(folder / save))
    return quietly(evaluate.main, config)


def _run_rank(rank: int, port: int, folder: Path) -> None:
    _set_rank(rank, 2, port)
    ranks = train_gpt2.setup_distributed("cpu")
    end_group = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda: None  # the runs below share one group
    model = torch.nn.parallel.DistributedDataParallel(tiny_model())
    found = {}
    for name, batch in step_cases().items():
        mine = pick(batch, 2 * rank, 2 * rank + 1)
        found[name] = step_gradients(model, [mine], ranks)
        one_by_one = [pick(batch, rank), pick(batch, 2 + rank)]
        found[name, "one by one"] = step_gradients(model, one_by_one, ranks)

    def forward_past_ddp(model, *batch):
        return train_sft.forward_sft(model.module, *batch)

    batch = pick(step_cases()["weights of 7, 50 and 100 %"], 2 * rank, 2 * rank + 1)
    found["past DDP"] = step_gradients(model, [batch], ranks, forward_past_ddp)
    torch.save(found, folder / f"rank_{rank}.pt")

    fine_tune(folder / "sft", folder / "out_sft", epochs=2, batch_size=1)
    pretrain(folder / "text", folder / "out_text", epochs=2)
    (folder / f"evaluate_{rank}.txt").write_text(evaluate_both(folder, "answers_2.jsonl"))
    torch.distributed.barrier()
    end_group()
