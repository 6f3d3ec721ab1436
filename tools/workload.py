"""What bench.py and compare_peers.py share: random data of GSM8K's size, clocks, and FLOPs."""

import dataclasses
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    print("error: no command; in the project's folder, run python -m tools.bench", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils.benchmark import Timer

import train_gpt2
import train_sft
from model import GPT, IGNORE_INDEX, GPTConfig
from nanosft import fast
from nanosft.ranks import Dtype, flops, peak_flops
from nanosft.run import git_commit, peak_memory_gb
from nanosft.shards import ShardWriter, read_meta, write_meta

Size = Annotated[int, Ge(1), Le(10**8)]

# ln(ids per example) of GSM8K's training split, gpt2 and the chat template; the share in the loss
MEAN_LENGTH, STD_LENGTH, TRAINED = math.log(145), 0.36, 0.62
ROOT, CPU = Path(__file__).parents[1], torch.device("cpu")
EOT = 256  # of the `bytes` encoding, whose name random shards carry: it needs no vocabulary file
PROFILED = 2  # steps when profiling: one that is not recorded, and one that is
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
    vocab_size: Size = 50257
    """ids that the model knows; padding to a multiple of 64 makes V of them"""
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
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows),
                    "utf-8")
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
    rows = script.open_rows(c, "train")
    # random ids go beyond their encoding's
    rows.meta["vocab_size"] = max(rows.meta["vocab_size"], config.vocab_size)
    return c, rows, forward


def warmup(config) -> int:
    """Untimed steps."""
    return 3 if config.compile else 1


def measure_steps(config, path: str, c, rows, forward: Callable, profile: bool = False) -> dict:
    """Optimizer steps, or evaluations of as many rows, as `train_gpt2.train` runs them.

    c, rows, forward: what `open_training` returns.
    """
    ranks = train_gpt2.setup_distributed(c.device, dtype=c.dtype)
    gpt = fast.speed_up(train_gpt2.make_model(c, rows.meta).to(ranks.device), c.compile)
    make = evaluation_of if path == "evaluate" else training_of
    step, batches = make(gpt, config, c, rows, ranks, forward)
    done = timed(step, warmup(config), config.steps)
    part = 1 / 3 if path == "evaluate" else 1  # the forward pass
    result = summary(done, ranks.device) | rates(done, gpt.config, batches, part)
    return result | (profile_of(step, ranks.device) if profile else {})


def training_of(gpt: GPT, config, c, rows, ranks, forward: Callable) -> tuple:
    """(an optimizer step to call, the micro-batches of those that are timed)."""
    optimizer, model, spent = train_gpt2.make_optimizer(gpt, c), ranks.wrap(gpt), []
    counted = ((batches, train_gpt2.count_step(batches, ranks))
               for batches in train_gpt2.load_steps(rows, c, ranks, 0))
    steps = clocked(counted, spent)
    ahead = fast.Prefetcher(steps, warmup(config) + config.steps + PROFILED)

    def step() -> dict:
        spent.clear()
        batches, counts = next(ahead)
        return train_gpt2.train_step(model, optimizer, batches, 1e-4, 1.0, ranks, forward, counts,
                                     meanwhile=ahead.fetch) | {"loading": sum(spent)}

    used = itertools.islice(train_gpt2.load_steps(rows, c, ranks, warmup(config)), config.steps)
    return step, itertools.chain.from_iterable(used)


def evaluation_of(gpt: GPT, config, c, rows, ranks, forward: Callable) -> tuple:
    """(an evaluation of a step's rows to call, the micro-batches of those that are timed)."""
    c = dataclasses.replace(c, eval_tokens=c.rows_per_step * c.block_size)
    batches, spent = list(train_gpt2.eval_batches(rows, c, ranks)), []
    counts = dict(zip(("tokens", "trained_tokens"), token_counts(batches)))

    def step() -> dict:
        spent.clear()
        made = clocked(train_gpt2.eval_batches(rows, c, ranks), spent)
        train_gpt2.evaluate(gpt, made, ranks, forward)
        return counts | {"loading": sum(spent)}

    return step, batches * config.steps


def token_counts(batches: Iterable[train_gpt2.MicroBatch]) -> tuple[int, int]:
    """Tokens without padding, and those in the loss."""
    counts = [(batch.n_tokens, int((batch.y != IGNORE_INDEX).sum())) for batch in batches]
    return sum(n for n, _ in counts), sum(n for _, n in counts)


def clocked(items: Iterator, spent: list[float]) -> Iterator:
    """The items; `spent` gets the seconds that each took."""
    while True:
        clock = time.perf_counter()
        item = next(items, None)
        spent.append(time.perf_counter() - clock)
        if item is None:
            return
        yield item


def rates(done: list[dict], model: GPTConfig, batches: Iterable, part: float) -> dict:
    """Of all timed steps together: loading's share of the time, and FLOP/s.

    batches: the micro-batches that they saw. part: of a forward and backward pass.
    """
    batches = list(batches)
    tokens, trained = token_counts(batches)
    pairs = sum(seen_pairs(row) for batch in batches for row in (
        torch.zeros_like(batch.x) if batch.segments is None else batch.segments))
    needed = part * flops(model, tokens, trained, pairs)
    by_palm = part * flops(model, tokens, tokens, tokens * model.block_size)
    loading, seconds = (sum(step[key] for step in done) for key in ("loading", "seconds"))
    return {"loading": loading / seconds, "flops_per_s": needed / seconds,
            "palm_flops_per_s": by_palm / seconds}


def full_logits_loss(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """The loss sum without chunks: x (B, T, C) and y (B, T) -> all logits (B * T, V) at once."""
    logits = model.lm_head(x).flatten(0, 1)  # (B * T, V)
    return F.cross_entropy(logits, y.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


# ----- a profile ---------------------------------------------------------------------------------


def profile_of(step: Callable, device: torch.device) -> dict:
    """One step, after one that is not recorded: a table of the operations that take the most time
    on the device; on a GPU also `idle`, the share of the step without a kernel, and the gaps."""
    when = torch.profiler.schedule(wait=0, warmup=PROFILED - 1, active=1, repeat=1)
    with torch.profiler.profile(schedule=when) as profiled:
        for _ in range(PROFILED):
            step()
            profiled.step()
    key = f"self_{device.type}_time_total"
    table = profiled.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60)
    if device.type != "cuda":
        return {"profile": f"\n{table}"}
    events = profiled.events()
    whole = next(e.time_range for e in events
                 if e.name.startswith("ProfilerStep") and e.device_type == DeviceType.CPU)
    gaps = gaps_between(kernels_of(events), whole.start, whole.end)
    idle = sum(length for length, *_ in gaps) / whole.elapsed_us()
    lines = [f"\nno kernel for {idle:.1%} of {whole.elapsed_us() / 1000:.1f} ms; longest gaps:"]
    lines += [f"  {length / 1000:.2f} ms after {last[:50]}, before {then[:50]}"
              for length, last, then in gaps[:5]]
    return {"idle": idle, "gaps": gaps[:5], "profile": "\n".join([*lines, table])}


def kernels_of(events: Iterable) -> list[tuple[float, float, str]]:
    """(start, end, name) of a profile's kernels on all streams, in microseconds; copies and ranges
    that only have a name (record_function) do not count."""
    return [(e.time_range.start, e.time_range.end, e.name) for e in events
            if e.device_type == DeviceType.CUDA and not e.is_user_annotation
            and not e.name.startswith(("Memcpy", "Memset"))]


def gaps_between(kernels: list[tuple[float, float, str]], start: float, end: float) -> list[tuple]:
    """(length, the kernel before, the kernel after) of each time without a kernel, longest first.

    >>> gaps_between([(1, 4, "a"), (2, 3, "b"), (9, 10, "c")], 0, 12)
    [(5, 'a', 'c'), (2, 'c', 'the end'), (1, 'the start', 'a')]
    """
    gaps, busy_until, last = [], start, "the start"
    inside = sorted(kernel for kernel in kernels if kernel[1] > start and kernel[0] < end)
    for begin, stop, name in [*inside, (end, end, "the end")]:
        if begin > busy_until:
            gaps.append((begin - busy_until, last, name))
        if stop >= busy_until:
            busy_until, last = stop, name
    return sorted(gaps, reverse=True)


# ----- other measurements ------------------------------------------------------------------------


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
        return min(timer.blocked_autorange(min_run_time=0.1 if config.quick or cuda else 2).times)

    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    rate = 2 * n**3 / seconds(x=a, y=a)
    sheet = peak_flops(ranks.device) or rate
    return {"device": name, "threads": torch.get_num_threads(), "dtype": ranks.dtype,
            "flops_per_s": rate, "palm_flops_per_s": sheet,
            "bytes_per_s": m.nbytes / seconds(x=m, y=v), **versions(cuda)}


def versions(cuda: bool) -> dict:
    """Of this code, of PyTorch, and with a GPU of what is below it."""
    found = {"commit": git_commit(), "torch": torch.__version__}
    if cuda:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, encoding="utf-8").stdout.split()
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                  "driver": driver[0] if driver else None}
    return found


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
    fails there. Where possible, a fork of a process that has imported this file and done no more:
    each one would spend seconds on the imports."""
    context = get_context("spawn")
    if "forkserver" in get_all_start_methods():  # not on Windows
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
    try:
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(function, *args).result()
    except Exception as error:  # also out of memory, or killed
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
