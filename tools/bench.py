"""How fast each part of nanosft runs on this machine: needs no data and no download.

    python -m tools.bench                               # a laptop CPU: about 8 minutes
    python -m tools.bench --quick --only sft            # does it run at all? seconds, a tiny model
    python -m tools.bench --only sft,generate --json out/bench.jsonl
    python -m tools.bench --n_layer 12 --n_head 12 --n_embd 768 --block_size 1024 \\
        --batch_size 32 --rows_per_step 32 --compile    # GPT-2 on a GPU, in bfloat16

The examples are random ids with GSM8K's distribution of lengths. What is measured are the functions
that the commands call, each setting in its own process, so that peaks of memory do not mix.

How close is that to what the machine could do? The column `limit` says so for each path:
- training: MFU, the FLOPs that the step needs / its seconds / the measured rate of a large matrix
  product. Needed are 6 per matrix weight and token, 6*V*C per *trained* token, and 12*L*C per pair
  of tokens of which one sees the other (causal, in its own example): skipped work does not count.
- `PaLM` is the number that others print: 6N + 12*L*C*T for each token (Chowdhery et al. 2022,
  appendix B). It counts the head at prompt tokens and attention to the whole row, which nanosft
  does not compute, so in SFT it can exceed 100 %: compare it with other trainers only.
- generation: the bytes that must be read for each new token (all weights, which a batch shares, and
  its keys and values) / seconds / the measured rate of a matrix-vector product.
- preparation: tokens/s without start-up over those of bare `encode_ordinary_batch` on all cores.
- packing: ceil(tokens / (T + 1)), a lower bound for any packing, over the rows made.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import sft_data
import train_gpt2
import train_sft
from model import GPT, GPTConfig
from nanosft.checkpoint import peak_memory_gb
from nanosft.cli import UserError, require_at_least, run_cli
from nanosft.shards import ShardWriter, read_meta, write_meta
from packing import LAYOUTS
from tokenizer import get_encoding

# ln(ids per example) of GSM8K's training split, gpt2 and the chat template; the share trained
MEAN_LENGTH, STD_LENGTH, TRAINED = np.log(145), 0.36, 0.62
EOT = 256  # of the `bytes` encoding, whose name random shards carry: it needs no vocabulary file
# Dense bf16 FLOP/s from NVIDIA's data sheets; the first name contained in the card's name counts
DATASHEET = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
             "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12}
WORDS = "the a of and to in is she has how many each 3 12 week sold apples dollars gives twice + ="
TRAINING = ("pretrain", "sft", "share", "length")
PATHS = (*TRAINING, "generate", "prepare", "pack")
QUICK = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 512, "block_size": 256,
         "lengths": (128, 256), "steps": 2, "new_tokens": 8, "prepare_rows": (200,),
         "pack_examples": 1000}


@dataclasses.dataclass
class Config:
    """Measure tokens/s, peak memory and the share of the machine's limit on each path."""

    only: str = ",".join(PATHS)
    """paths to measure, separated by commas"""
    quick: bool = False
    """a tiny model, all in one process: to see that it runs, not for the numbers"""
    json: str | None = None
    """append each result to this file, one JSON object per line"""
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    vocab_size: int = 50304
    block_size: int = 512
    """T of `sft`, `share` and `generate`"""
    lengths: tuple[int, ...] = (256, 512, 1024)
    """T of `pretrain`, `length` and `pack`"""
    layouts: tuple[str, ...] = LAYOUTS
    batch_size: int = 4
    """rows of a micro-batch at --block_size; fewer of longer rows, for as many tokens"""
    rows_per_step: int = 4
    steps: int = 5
    """timed repeats; the median counts"""
    warmup: int = 1
    """untimed optimizer steps before them; --compile takes 3"""
    new_tokens: int = 256
    prepare_rows: tuple[int, ...] = (7_500, 75_000)
    pack_examples: int = 100_000
    device: str = "auto"
    compile: bool = False
    profile: bool = False
    """for each training path, also list where the time of one more step went"""
    job: str | None = None
    """(from the parent process) one setting to measure, as JSON"""


def all_jobs(config: Config) -> Iterator[dict]:
    """The lines of the table: {"path": …} and the settings that `MEASURE[path]` takes."""
    T = config.block_size
    yield from ({"path": "pretrain", "T": t} for t in config.lengths)
    for layout, isolate in itertools.product(config.layouts, (True, False)):
        yield {"path": "sft", "T": T, "layout": layout, "isolate": isolate}
    yield from ({"path": "share", "T": T, "share": share} for share in (0.1, 0.25, 0.6, 1.0))
    yield from ({"path": "length", "T": t, "share": TRAINED} for t in config.lengths)
    yield from ({"path": "generate", "prompts": n} for n in (1, 16))
    yield from ({"path": "prepare", "rows": n} for n in config.prepare_rows)
    yield from ({"path": "pack", "T": t, "examples": config.pack_examples} for t in config.lengths)


# ----- random data -------------------------------------------------------------------------------


def last_part(lengths: np.ndarray, share: float) -> np.ndarray:
    """Of examples laid end to end, (their tokens,) bool: is it in the last `share` of its example?

    >>> last_part(np.array([4, 2]), 0.5).astype(int)
    array([0, 0, 1, 1, 0, 1])
    """
    ends = np.cumsum(lengths)
    to_go = np.repeat(ends, lengths) - np.arange(ends[-1])  # n, …, 2, 1 in an example of n ids
    return to_go <= np.repeat((share * lengths).round(), lengths)


def random_shards(folder: str, kind: str, n_examples: int, share: float, vocab_size: int) -> None:
    """A folder as fineweb.py (kind "text") or sft_data.py ("sft") would make it, of random ids.

    The last `share` of each example is trained.
    """
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(MEAN_LENGTH, STD_LENGTH, n_examples).astype(np.int64).clip(8)
    ends = np.cumsum(lengths)
    ids = rng.integers(EOT + 1, vocab_size, ends[-1])
    ids[ends - 1] = EOT
    trained = last_part(lengths, share)
    writer = ShardWriter(Path(folder), "train", 1 << 40)
    writer.add((ids if kind == "text" else np.stack([ids, 100 * trained])).astype(np.uint16))
    split = writer.finish(examples=n_examples, trained_tokens=int(trained.sum()))
    meta = {"kind": kind, "encoding": "bytes", "vocab_size": 261, "template": "chat"}
    write_meta(Path(folder), meta | {"source": ["tools/bench.py"], "splits": {"train": split}})


def random_jsonl(path: Path, n_rows: int) -> list[str]:
    """Write rows {question, answer} of GSM8K's size; returns their texts."""
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(MEAN_LENGTH, STD_LENGTH, n_rows)[:, None] * [1 - TRAINED, TRAINED]
    texts = [" ".join(rng.choice(WORDS.split(), int(n) + 1)) for n in sizes.flat]
    rows = zip(texts[::2], texts[1::2])
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    return texts


# ----- training ----------------------------------------------------------------------------------


def flops(model: GPTConfig, tokens: int, head_tokens: int, pairs: int) -> int:
    """FLOPs of a training step, forward and backward: 6 per weight and token, 12 per pair and C.

    head_tokens use the vocabulary's matrix; of each of the pairs of tokens one sees the other.
    Source: PaLM, appendix B, where head_tokens = tokens and pairs = tokens * T. A block has
    (3 + 1 + 4 + 4) * C * C weights; biases, norms, softmax and optimizer are left out there, too.
    """
    L, C, V = model.n_layer, model.n_embd, model.vocab_size
    return 6 * 12 * L * C * C * tokens + 6 * V * C * head_tokens + 12 * L * C * pairs


def seen_pairs(segments: Tensor) -> int:
    """(T,) numbers of the examples in a row, padding -1 -> n * (n + 1) / 2 for each of n tokens.

    >>> seen_pairs(torch.tensor([0, 0, 0, 1, 1, -1]))
    9
    """
    _, n = segments[segments >= 0].unique_consecutive(return_counts=True)
    return int((n * (n + 1) // 2).sum())


def timed(step: Callable[[], dict | None], warmup: int, steps: int) -> list[dict]:
    """What `step` returns, each with the seconds `dt` that it took; without the warm-up."""
    rows = []
    for _ in range(warmup + steps):
        clock = time.perf_counter()
        row = step() or {}
        rows.append(row | {"dt": time.perf_counter() - clock})
    return rows[warmup:]


def median_rates(steps: list[dict], *names: str) -> dict[str, float]:
    """{"tokens_per_s": …} for the name "tokens": the median over the steps."""
    return {f"{name}_per_s": statistics.median(step[name] / step["dt"] for step in steps)
            for name in names}


def open_training(path: str, data: str, **flags) -> tuple:
    """(config, rows, forward) of train_gpt2.py (path "pretrain") or train_sft.py (all others)."""
    script, forward = train_sft, train_sft.forward_sft
    if path == "pretrain":
        script, forward = train_gpt2, train_gpt2.forward_text
    c = script.Config(data, "", init="scratch", **flags)
    return c, script.open_rows(c, "train"), forward


def measure_training(config: Config, path: str, T: int, share: float = TRAINED, **flags) -> dict:
    """Optimizer steps as train_gpt2.py (path "pretrain") or train_sft.py runs them."""
    batch_size = max(1, config.batch_size * config.block_size // T)
    rows_per_step = batch_size * (config.rows_per_step // config.batch_size)
    flags |= {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "compile")}
    flags |= {"batch_size": batch_size, "rows_per_step": rows_per_step, "block_size": T}
    n_examples = 2000 + (config.warmup + config.steps) * rows_per_step * (1 + T // 100)
    with tempfile.TemporaryDirectory() as folder:
        kind = "text" if path == "pretrain" else "sft"
        random_shards(folder, kind, n_examples, share, config.vocab_size)
        c, rows, forward = open_training(path, folder, **flags)
        rows.meta["vocab_size"] = config.vocab_size  # of the model: the ids are random anyway
        return measure_steps(config, c, rows, forward)


def measure_steps(config: Config, c, rows, forward: Callable) -> dict:
    """c, rows, forward: what `open_training` returns."""
    ranks = train_gpt2.setup_distributed(config.device)
    gpt, optimizer, _ = train_gpt2.new_or_resumed(c, ranks, rows.meta, {})
    model = train_gpt2.wrap(gpt, c, ranks)
    loader = train_gpt2.load_steps(rows, c, ranks, 0)

    def step() -> dict:
        clock = time.perf_counter()
        micro_batches = next(loader)
        loading = {"loading": time.perf_counter() - clock}
        step = train_gpt2.train_step(model, optimizer, micro_batches, 1e-4, 1.0, ranks, forward)
        return loading | step

    steps = timed(step, config.warmup, config.steps)
    total = {k: sum(s[k] for s in steps) for k in ("tokens", "trained_tokens", "dt", "loading")}
    one_text = torch.zeros(c.block_size, dtype=torch.long)
    numbers = range(config.warmup * c.rows_per_step, len(rows))[: config.steps * c.rows_per_step]
    pairs = sum(seen_pairs(rows[i].get("segments", one_text)) for i in numbers)
    needed = flops(gpt.config, total["tokens"], total["trained_tokens"], pairs)
    by_palm = flops(gpt.config, total["tokens"], total["tokens"], total["tokens"] * c.block_size)
    return {
        **median_rates(steps, "tokens", "trained_tokens"),
        **profile(config, step),
        "step_s": statistics.median(s["dt"] for s in steps),
        "loading": total["loading"] / total["dt"],
        "trained_share": total["trained_tokens"] / total["tokens"],
        "flops_per_s": needed / total["dt"],
        "palm_flops_per_s": by_palm / total["dt"],
        "peak_memory_gb": peak_memory_gb(ranks.device),
    }


def profile(config: Config, step: Callable) -> dict:
    if not config.profile:
        return {}
    with torch.profiler.profile() as found:
        step()
    key = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
    table = found.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60)
    return {"profile": table}


# ----- the other paths ---------------------------------------------------------------------------


def measure_generation(config: Config, path: str, prompts: int) -> dict:
    """Greedy, from prompts of 32 ids; nothing stops early."""
    device = train_gpt2.setup_distributed(config.device).device
    keys = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
    model = GPT(GPTConfig(**{key: getattr(config, key) for key in keys})).to(device)
    ids = torch.randint(config.vocab_size, (prompts, 32)).tolist()
    new = min(config.new_tokens, config.block_size - 32)

    def step() -> dict:
        return {"tokens": sum(map(len, model.generate(ids, new, temperature=0)))}

    rate = median_rates(timed(step, 1, config.steps), "tokens")
    weights = sum(p.nbytes for p in model.parameters())
    cached = 2 * config.n_layer * config.n_embd * 4 * (32 + new / 2)  # per prompt, on average
    return {**rate, "bytes_per_s": rate["tokens_per_s"] * (weights / prompts + cached),
            "peak_memory_gb": peak_memory_gb(device)}


def measure_preparation(config: Config, path: str, rows: int) -> dict:
    """What sft_data.py does after its start-up, which `--help` pays in full."""
    try:
        encoding = get_encoding("gpt2")
    except UserError:
        encoding = get_encoding("bytes")
    command = [sys.executable, sft_data.__file__, "--help"]
    startup = timed(lambda: {"_": subprocess.run(command, capture_output=True)}, 0, 1)[0]["dt"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        source, out = Path(folder, "rows.jsonl"), f"{folder}/out"
        texts = random_jsonl(source, rows)
        c = sft_data.Config((str(source),), out=out, encoding=encoding.name)
        seconds = timed(lambda: sft_data.prepare(c), 0, 1)[0]["dt"]
        tokens = sum(split["tokens"] for split in read_meta(out, "sft")["splits"].values())
    bare = bare_rate(encoding, texts)
    return {"tokens_per_s": tokens / seconds, "with_startup": tokens / (seconds + startup),
            "startup_s": startup, "tiktoken": bare, "limit": tokens / seconds / bare,
            "encoding": encoding.name}


def bare_rate(encoding, texts: list[str]) -> float:
    """Tokens/s of tiktoken alone, one thread per core."""
    clock = time.perf_counter()
    ids = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
    return sum(map(len, ids)) / (time.perf_counter() - clock)


def measure_packing(config: Config, path: str, T: int, examples: int) -> dict:
    """The planner of `fit`, and what the open dataset keeps in memory for it."""
    with tempfile.TemporaryDirectory() as folder:
        random_shards(folder, "sft", examples, TRAINED, config.vocab_size)
        data = sft_data.SFTDataset(folder, "train", T)

        def step() -> None:
            data.epoch += 1
            len(data)  # plans the epoch

        seconds = statistics.median(s["dt"] for s in timed(step, 0, config.steps))
    fields = [*vars(data).values(), *vars(data.plan).values()]
    arrays = {id(a): a.nbytes for a in fields if isinstance(a, np.ndarray)}  # each once
    tokens = int(data.lengths.sum())
    bound = -(-tokens // (T + 1))
    return {"tokens_per_s": tokens / seconds, "plan_s": seconds, "n_rows": len(data),
            "bound": bound, "limit": bound / len(data),
            "bytes_an_example": sum(arrays.values()) / examples}


def measure_machine(config: Config, path: str) -> dict:
    """The rates of large products: matrix by matrix (FLOP/s), matrix by vector (bytes/s)."""
    device = train_gpt2.setup_distributed(config.device).device
    cuda = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    n, k = (256, 256) if config.quick else (n, 4096)
    a = torch.randn(n, n, device=device, dtype=dtype)
    m, v = torch.randn(4 * k, k, device=device), torch.randn(k, device=device)

    def seconds(product: Callable) -> float:
        def step() -> None:
            product()
            if cuda:
                torch.cuda.synchronize()

        return min(s["dt"] for s in timed(step, 3, 10))

    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    sheet = next((rate for card, rate in DATASHEET.items() if cuda and card in name), None)
    rates = {"flops_per_s": 2 * n**3 / seconds(lambda: a @ a), "datasheet_flops_per_s": sheet,
             "bytes_per_s": m.nbytes / seconds(lambda: m @ v), "dtype": str(dtype)}
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__} | rates


# ----- the table ---------------------------------------------------------------------------------

MEASURE = dict.fromkeys(TRAINING, measure_training) | {
    "generate": measure_generation, "prepare": measure_preparation, "pack": measure_packing,
    "machine": measure_machine}
COLUMNS = {"tokens_per_s": ",.0f", "trained_tokens_per_s": ",.0f", "limit": ".1%",
           "palm_mfu": ".1%", "peak_memory_gb": ".2f"}
NOTES = {"sheet": ".1%", "palm_sheet": ".1%", "loading": ".1%", "startup_s": ".1f", "plan_s": ".2f",
         "n_rows": ",", "bytes_an_example": ".0f", "encoding": ""}


def measure(config: Config, job: dict) -> dict:
    """One setting, in its own process unless --quick."""
    if config.quick or config.job:
        return MEASURE[job["path"]](config, **job)
    return run_child("tools.bench", [dataclasses.asdict(config), job])


def run_child(module: str, job: list, python: str = sys.executable, **env: str) -> dict:
    """The JSON that `python -m MODULE --job JOB` prints last; where it fails, {"error": …}."""
    done = subprocess.run([python, "-m", module, "--job", json.dumps(job)], capture_output=True,
                          text=True, env={**os.environ, **env})
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def shares(row: dict, machine: dict) -> dict:
    """The row's rates over the machine's: MFU and the like."""
    if "palm_flops_per_s" in row:
        found = {"limit": row["flops_per_s"] / machine["flops_per_s"],
                 "palm_mfu": row["palm_flops_per_s"] / machine["flops_per_s"]}
        if sheet := machine["datasheet_flops_per_s"]:
            found |= {"sheet": row["flops_per_s"] / sheet,
                      "palm_sheet": row["palm_flops_per_s"] / sheet}
        return found
    return {"limit": row["bytes_per_s"] / machine["bytes_per_s"]} if "bytes_per_s" in row else {}


def line_of(job: dict, row: dict) -> str:
    setting = " ".join(f"{key}={value}" for key, value in job.items() if key != "path")
    line = f"{job['path']:9} {setting:34}"
    if "error" in row:
        return f"{line} {row['error']}"
    for key, form in COLUMNS.items():
        line += f"{format(row[key], form) if key in row else '-':>11}"
    notes = [f"{key} {format(row[key], form)}" for key, form in NOTES.items() if key in row]
    return line + "  " + ", ".join(notes)


def main(config: Config) -> None:
    if config.job:  # a child of `measure`
        settings, job = json.loads(config.job)
        return print(json.dumps(measure(Config(**settings | {"job": config.job}), job)))
    if unknown := set(config.only.split(",")) - set(PATHS):
        raise UserError(f"--only: unknown {sorted(unknown)}; choose from {','.join(PATHS)}")
    require_at_least(config, 1, "n_layer", "n_head", "n_embd", "vocab_size", "block_size",
                     "lengths", "batch_size", "rows_per_step", "steps", "new_tokens",
                     "prepare_rows", "pack_examples", most=10**8)
    require_at_least(config, 0, "warmup", most=10**8)
    if config.rows_per_step % config.batch_size:
        raise UserError(f"--rows_per_step {config.rows_per_step} is not a multiple of --batch_size "
                        f"{config.batch_size}; change one")
    if config.compile:
        config.warmup = max(config.warmup, 3)
    if config.quick:
        config = dataclasses.replace(config, **QUICK)

    machine = measure(config, {"path": "machine"})
    if "error" in machine:
        raise UserError(machine["error"].removeprefix("error: "))
    print(", ".join(f"{key} {value:,.0f}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in machine.items()))
    heads = ("tokens/s", "trained/s", "limit", "PaLM", "peak GB")
    print(f"{'path':9} {'setting':34}" + "".join(f"{head:>11}" for head in heads))
    with open(config.json or os.devnull, "a") as log:
        print(json.dumps({"path": "machine"} | machine), file=log)
        for job in (job for job in all_jobs(config) if job["path"] in config.only.split(",")):
            row = measure(config, job)
            row |= shares(row, machine)
            print(line_of(job, row) + "\n" + row.get("profile", ""), end="", flush=True)
            print(json.dumps(job | row), file=log, flush=True)


if __name__ == "__main__":
    run_cli(main, Config)
