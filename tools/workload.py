"""What bench.py and compare_peers.py share: random data of GSM8K's size, clocks, and FLOPs."""

import dataclasses
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.utils.benchmark import Timer

import train_gpt2
import train_sft
from model import GPTConfig
from nanosft import fast
from nanosft.ranks import Dtype, flops, peak_flops
from nanosft.run import peak_memory_gb
from nanosft.shards import ShardWriter, read_meta, write_meta

Size = Annotated[int, Ge(1), Le(10**8)]

# ln(ids per example) of GSM8K's training split, gpt2 and the chat template; the share in the loss
MEAN_LENGTH, STD_LENGTH, TRAINED = math.log(145), 0.36, 0.62
ROOT, CPU = Path(__file__).parents[1], torch.device("cpu")
EOT = 256  # of the `bytes` encoding, whose name random shards carry: it needs no vocabulary file
WORDS = "the a of and to in is she has how many each 3 12 week sold apples dollars gives twice + ="


@dataclasses.dataclass(kw_only=True)
class WorkFlags:
    """What tools.bench and tools.compare_peers measure, and where."""

    n_layer: Size = 6
    """blocks"""
    n_head: Size = 6
    """attention heads per block"""
    n_embd: Size = 384
    """C, width of the residual stream"""
    block_size: Size = 512
    """T, tokens per row"""
    device: str = "auto"
    """auto, cuda, mps, or cpu"""
    dtype: Dtype = "auto"
    """of matrix products; auto: bfloat16 on GPUs that support it, else float32"""
    json: str | None = None
    """append each result to this file, one JSON object per line"""


# ----- data --------------------------------------------------------------------------------------


def random_lengths(n: int) -> np.ndarray:
    return np.random.default_rng(0).lognormal(MEAN_LENGTH, STD_LENGTH, n).astype(np.int32).clip(8)


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

    The last `share` of each example is in the loss.
    """
    lengths = random_lengths(n_examples)
    ends = np.cumsum(lengths)
    ids = np.random.default_rng(1).integers(EOT + 1, vocab_size, ends[-1])
    ids[ends - 1] = EOT
    trained = last_part(lengths, share)
    writer = ShardWriter(Path(folder), "train", 1 << 40)
    writer.add((ids if kind == "text" else np.stack([ids, 100 * trained])).astype(np.uint16))
    split = writer.finish(examples=n_examples, trained_tokens=int(trained.sum()))
    meta = {"kind": kind, "encoding": "bytes", "vocab_size": 261, "template": "chat"}
    write_meta(Path(folder), meta | {"source": ["tools/workload.py"], "splits": {"train": split}})


def random_jsonl(path: Path, n_rows: int) -> list[str]:
    """Write rows {question, answer} of GSM8K's size; returns their texts."""
    rng, sizes = np.random.default_rng(1), np.outer(random_lengths(n_rows), [1 - TRAINED, TRAINED])
    texts = [" ".join(rng.choice(WORDS.split(), int(n) + 1)) for n in sizes.flat]
    rows = zip(texts[::2], texts[1::2])
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    return texts


# ----- a training step ---------------------------------------------------------------------------


def seen_pairs(segments: Tensor) -> int:
    """(T,) numbers of the examples in a row, padding -1 -> n * (n + 1) / 2 for each of n tokens.

    >>> seen_pairs(torch.tensor([0, 0, 0, 1, 1, -1]))
    9
    """
    _, n = segments[segments >= 0].unique_consecutive(return_counts=True)
    return int((n * (n + 1) // 2).sum())


def open_training(config, path: str, data: str, **flags) -> tuple:
    """(config, rows, forward) of train_gpt2.py (path "pretrain") or train_sft.py (all others)."""
    script, forward = train_sft, train_sft.forward_sft
    if path == "pretrain":
        script, forward = train_gpt2, train_gpt2.forward_text
    same = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "device", "dtype",
            "compile")
    flags = {k: getattr(config, k) for k in same} | {"rows_per_step": config.batch_size} | flags
    c = script.Config(data, "", init="scratch", **flags)
    return c, script.open_rows(c, "train"), forward


def warmup(config) -> int:
    """Untimed steps."""
    return 3 if config.compile else 1


def measure_steps(config, path: str, c, rows, forward: Callable, profile: bool = False) -> dict:
    """Optimizer steps as `train_gpt2.train` runs them, or evaluations of as many rows.

    c, rows, forward: what `open_training` returns.
    """
    ranks = train_gpt2.setup_distributed(c.device, dtype=c.dtype)
    gpt = fast.speed_up(train_gpt2.make_model(c, rows.meta).to(ranks.device), c.compile)
    optimizer, model = train_gpt2.make_optimizer(gpt, c), train_gpt2.wrap(gpt, ranks)
    n = warmup(config) + config.steps + profile
    ahead, spent = fast.Prefetcher(train_gpt2.load_steps(rows, c, ranks, 0), n), []

    def fetch() -> None:
        clock = time.perf_counter()
        ahead.fetch()
        spent.append(time.perf_counter() - clock)

    def step() -> dict:
        spent.clear()
        fetch()  # nothing to do where the step before did it
        batches = next(ahead)
        if path == "evaluate":
            _, tokens, trained = train_gpt2.count_step(batches, ranks).tolist()
            result = train_gpt2.evaluate(gpt, batches, ranks, forward)
            result |= {"tokens": tokens, "trained_tokens": trained}
        else:
            result = train_gpt2.train_step(model, optimizer, batches, 1e-4, 1.0, ranks, forward,
                                           meanwhile=fetch)
        return result | {"loading": sum(spent)}

    done, R = timed(step, warmup(config), config.steps), c.rows_per_step
    used = range(len(rows))[warmup(config) * R :][: config.steps * R]
    part = 1 / 3 if path == "evaluate" else 1  # the forward pass
    result = summary(done, ranks.device) | rates(done, gpt.config, rows, used, part)
    if profile:
        result["profile"] = profile_of(step, ranks.device)
    return result


def rates(done: list[dict], model: GPTConfig, rows, used: range, part: float) -> dict:
    """Of all steps together: loading's share of the time, and FLOP/s.

    used: the indices of the rows that they saw. part: of a forward and backward pass.
    """
    tokens, trained, loading, seconds = (sum(step[key] for step in done) for key in (
        "tokens", "trained_tokens", "loading", "seconds"))
    one_text = torch.zeros(model.block_size, dtype=torch.long)
    pairs = sum(seen_pairs(rows[i].get("segments", one_text)) for i in used)
    needed = part * flops(model, tokens, trained, pairs)
    by_palm = part * flops(model, tokens, tokens, tokens * model.block_size)
    return {"loading": loading / seconds, "flops_per_s": needed / seconds,
            "palm_flops_per_s": by_palm / seconds}


def profile_of(step: Callable, device: torch.device) -> str:
    """The operations that take the most time on the device."""
    with torch.profiler.profile() as profiled:
        step()
    key = f"self_{device.type}_time_total"
    table = profiled.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60)
    return f"\n{table}"


def prepare(source: str, out: str) -> tuple[float, int]:
    """The command sft_data.py: its seconds, and the tokens it made."""
    words = ["--source", source, "--out", out, "--encoding", "gpt2", "--val_fraction", "0"]
    clock = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "sft_data.py", *words], check=True, capture_output=True)
    return time.perf_counter() - clock, read_meta(out, "sft")["splits"]["train"]["tokens"]


def measure_machine(config, path: str) -> dict:
    """The rates of large products: matrix by matrix (FLOP/s), matrix by vector (bytes/s)."""
    ranks = train_gpt2.setup_distributed(config.device, dtype=config.dtype)
    cuda = ranks.device.type == "cuda"
    n = 256 if config.quick else 8192 if cuda else 2048
    a = torch.randn(n, n, device=ranks.device)
    with ranks.autocast():
        a = a @ a / n  # in the dtype of training
    m, v = torch.randn(4 * n, n, device=ranks.device), torch.randn(n, device=ranks.device)

    def seconds(**factors) -> float:
        timer = Timer("x @ y", globals=factors, num_threads=torch.get_num_threads())
        return min(timer.blocked_autorange(min_run_time=0.1 if config.quick else 2).times)

    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    rate = 2 * n**3 / seconds(x=a, y=a)
    sheet = peak_flops(ranks.device) or rate
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "dtype": str(a.dtype), "flops_per_s": rate, "palm_flops_per_s": sheet,
            "bytes_per_s": m.nbytes / seconds(x=m, y=v)}


# ----- clocks and processes ----------------------------------------------------------------------


def timed(step: Callable[[], dict], warmup: int, steps: int) -> list[dict]:
    """What `step` returns, each with its `seconds`; without the warm-up."""
    results = []
    for _ in range(warmup + steps):
        clock = time.perf_counter()
        result = step()
        results.append(result | {"seconds": time.perf_counter() - clock})
    return results[warmup:]


def summary(steps: list[dict], device: torch.device = CPU) -> dict:
    """Medians of the steps' tokens/s and seconds; this process's peak memory."""
    rates = {f"{key}_per_s": statistics.median(step[key] / step["seconds"] for step in steps)
             for key in ("tokens", "trained_tokens") if key in steps[0]}
    seconds = statistics.median(step["seconds"] for step in steps)
    return rates | {"seconds": seconds, "peak_memory_gb": peak_memory_gb(device)}


def in_its_own_process(function: Callable, *args) -> dict:
    """function(*args) in a new process, so that peaks of memory do not mix; {"error": …} if it
    fails there."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    except Exception as error:  # also out of memory, or killed
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
