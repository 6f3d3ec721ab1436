"""How fast each part of nanosft runs on this machine: needs no data; `prepare` the gpt2 vocabulary.

    python -m tools.bench                             # everything, on a laptop CPU
    python -m tools.bench --only sft,generate --json out/bench.jsonl
    python -m tools.bench --quick                     # does it run? seconds, a tiny model

Random examples with GSM8K's lengths; each line in its own process. `limit` is a share of
- training: the measured rate of a matrix product, in FLOPs that the step needs (workload.flops).
  `MFU` is what others print: 6N + 12*L*C*T FLOPs for each token (PaLM, appendix B), over the data
  sheet's rate if there is one. It counts work that nanosft skips, so SFT can exceed 100%.
- generate: the measured rate of a matrix-vector product, in bytes read for each new token (all
  weights, which a batch shares, and its keys and values). bfloat16: the weights are, too.
- loss: the head and the loss alone, forward and backward, beside full logits; no limit.
- prepare (sft_data.py): the tokens/s of `encode_ordinary_batch`; start-up is included.
- plan (packing.py): all rows, of which ceil(tokens / (T + 1)) is a lower bound for any packing.
"""

import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m tools.bench", file=sys.stderr)
    sys.exit(2)

import torch

import train_gpt2
import train_sft
from model import GPT, GPTConfig
from nanosft import fast
from nanosft.cli import run_cli
from nanosft.errors import UserError, require_choice, to_json
from nanosft.run import peak_memory_gb
from nanosft.weights import pad_vocab
from packing import LAYOUTS, Plan
from tokenizer import get_encoding
from tools import workload
from tools.workload import Size, WorkFlags, warmup

ROWS = 10_000
SETTINGS = {  # path: the settings of its lines in the table
    "machine": [],  # always measured first
    "pretrain": [{}],
    "sft": [{}],
    "layouts": [{"layout": layout, "isolate": i} for layout in LAYOUTS for i in (True, False)],
    "share": [{"share": share} for share in (0.1, 0.25, 0.5, 0.75, 1.0)],
    "length": [{"T": T} for T in (256, 512, 1024, 2048)],  # same number of tokens per step
    "evaluate": [{}],
    "generate": [{"prompts": n, "dtype": dtype} for dtype in ("float32", "bfloat16")
                 for n in (1, 16, 64)],
    "loss": [{"form": form} for form in ("nanosft", "full_logits", "full_logits_compiled")],
    "startup": [{}],
    "prepare": [{"rows": n * ROWS} for n in (1, 10, 100)],
    "plan": [{"layout": layout, "rows": n * ROWS} for layout in LAYOUTS for n in (1, 10, 100)],
}
HEAD = " " * 39 + "tokens/s  trained/s      limit        MFU    seconds    peak GB"
COLUMNS = {"tokens_per_s": ",.0f", "trained_tokens_per_s": ",.0f", "limit": ".1%", "MFU": ".1%",
           "seconds": ".4f", "peak_memory_gb": ".2f"}
NOTES = ("loading", "idle", "torch_seconds", "kept_bytes", "peak_bytes")
QUICK = {"n_layer": 1, "n_head": 1, "n_embd": 16, "vocab_size": 512, "block_size": 256}


@dataclasses.dataclass
class Config(WorkFlags):  # and the model's sizes, --device, --dtype, --json
    """Measure tokens/s, the share of the machine's limit, and peak memory, path by path."""

    only: str = ",".join(SETTINGS)
    """paths, separated by commas"""
    batch_size: Size = 4
    """rows of block_size tokens that go through the model at once"""
    accumulate: Size = 1
    """micro-batches in a step"""
    steps: Size = 5
    """timed repeats after the warm-up; the table has medians"""
    compile: bool = False
    """torch.compile the blocks"""
    profile: bool = False
    """also list where the time of a step goes, and on a GPU when no kernel runs"""
    quick: bool = False
    """a tiny model, all in one process: the numbers mean nothing"""


def measure_training(config: Config, path: str, T: int = 0, share=workload.TRAINED, **flags):
    """The step on random examples; T: as many tokens, in rows of T."""
    T = T or config.block_size
    B = max(1, config.batch_size * config.block_size // T)
    R, kind = B * config.accumulate, "text" if path == "pretrain" else "sft"
    n_examples = 2000 + (3 + config.steps) * R * (1 + T // 100)
    flags |= {"block_size": T, "batch_size": B, "rows_per_step": R}
    with tempfile.TemporaryDirectory() as data:
        workload.random_shards(data, kind, n_examples, share, config.vocab_size)
        c, rows, forward = workload.open_training(config, path, data, **flags)
        return workload.measure_steps(config, path, c, rows, forward, config.profile)


def random_model(config: Config, device: torch.device, **sizes) -> GPT:
    keys = ("n_layer", "n_head", "n_embd", "block_size")
    sizes = {key: getattr(config, key) for key in keys} | sizes
    return GPT(GPTConfig(vocab_size=pad_vocab(config.vocab_size), n_vocab=config.vocab_size,
                         **sizes)).to(device)


def measure_generation(config: Config, path: str, prompts: int, dtype: str) -> dict:
    """Greedy, from prompts of 32 ids; nothing stops early."""
    device, new = train_gpt2.setup_distributed(config.device).device, config.block_size // 2
    model = random_model(config, device).to(getattr(torch, dtype))
    fast.speed_up(model)
    ids = torch.randint(config.vocab_size, (prompts, 32)).tolist()

    def step() -> dict:
        return {"tokens": sum(map(len, model.generate(ids, new, temperature=0)))}

    result = workload.summary(workload.timed(step, 1, config.steps), device)
    weights, width = sum(p.nbytes for p in model.parameters()), model.lm_head.weight.itemsize
    cache = 2 * width * config.n_layer * config.n_embd  # keys and values of a token
    read = weights / prompts + cache * (32 + new / 2)  # per new token, on average
    return result | {"bytes_per_s": result["tokens_per_s"] * read}


def measure_loss(config: Config, path: str, form: str) -> dict:
    """From the hidden states of a micro-batch, all of them with a target, to their gradient."""
    ranks = train_gpt2.setup_distributed(config.device, dtype=config.dtype)
    gpt, B, T = random_model(config, ranks.device, n_layer=1), config.batch_size, config.block_size
    x = torch.randn(B, T, config.n_embd, device=ranks.device, requires_grad=True)
    y = torch.randint(config.vocab_size, (B, T))
    if form == "nanosft":
        loss_of = type(fast.speed_up(gpt, config.compile)).nll_sum
    else:
        y, loss_of = y.to(ranks.device), workload.full_logits_loss
    if form == "full_logits_compiled":
        loss_of = torch.compile(loss_of)

    def step() -> dict:
        with ranks.autocast():
            loss = loss_of(gpt, x, y)
        d_x, _ = torch.autograd.grad(loss, [x, gpt.lm_head.weight])
        d_x[0, 0, 0].item()  # wait for the device
        return {"tokens": B * T}

    return workload.summary(workload.timed(step, warmup(config), config.steps), ranks.device)


def measure_startup(config: Config, path: str) -> dict:
    """Seconds from the command train_sft.py to its first step, torch's own start included."""
    with tempfile.TemporaryDirectory() as data:
        workload.random_shards(data, "sft", ROWS, workload.TRAINED, vocab_size=261)
        flags = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "device")}
        flags |= {"data": data, "out": f"{data}/out", "init": "scratch"}
        words = [sys.executable, train_sft.__file__, *(f"--{k}={v}" for k, v in flags.items())]
        clock = time.perf_counter()
        with subprocess.Popen(words, stdout=subprocess.PIPE, encoding="utf-8") as run:
            started = any(line.startswith("start") for line in run.stdout)
            seconds = time.perf_counter() - clock
            run.kill()
    assert started, "train_sft.py failed"
    clock = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return {"seconds": seconds, "torch_seconds": time.perf_counter() - clock}


def measure_preparation(config: Config, path: str, rows: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        texts = workload.random_jsonl(Path(folder, "rows.jsonl"), ROWS)
        seconds, tokens = workload.prepare(f"{folder}/rows.jsonl*{rows // ROWS}", f"{folder}/out")
    peak = peak_memory_gb(torch.device("cpu"), "RUSAGE_CHILDREN")  # of its largest process
    encode, clock = get_encoding("gpt2").encode_ordinary_batch, time.perf_counter()
    n_ids = sum(map(len, encode(texts, num_threads=os.cpu_count())))
    rate, bare = tokens / seconds, n_ids / (time.perf_counter() - clock)
    return {"tokens_per_s": rate, "limit": rate / bare, "seconds": seconds, "peak_memory_gb": peak}


def measure_planner(config: Config, path: str, layout: str, rows: int) -> dict:
    """The planner, and the bytes per example that it holds on to, and at its peak."""
    T, R = config.block_size, config.batch_size * config.accumulate
    lengths = workload.random_lengths(rows).clip(max=T + 1)
    make = functools.partial(Plan, lengths, T, layout, rows_per_step=R)
    result = workload.summary(workload.timed(lambda: {"rows": len(make())}, 1, config.steps))
    tracemalloc.start()
    plan, bound = make(), -(-int(lengths.sum(dtype=int)) // (T + 1))
    kept, peak = ((lengths.nbytes + n) / rows for n in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    return result | {"limit": bound / len(plan), "kept_bytes": kept, "peak_bytes": peak}


MEASURE = {"machine": workload.measure_machine, "generate": measure_generation,
           "loss": measure_loss, "startup": measure_startup, "prepare": measure_preparation,
           "plan": measure_planner}


def measure(config: Config, job: dict) -> dict:
    """One line of the table, in its own process unless --quick."""
    function = functools.partial(MEASURE.get(job["path"], measure_training), config, **job)
    return function() if config.quick else workload.in_its_own_process(function)


def setting_of(job: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in job.items() if key != "path")


def line_of(job: dict, result: dict) -> str:
    cells = ["-" if result.get(key) is None else format(result[key], form)
             for key, form in COLUMNS.items()]
    notes = [f"  {key} {result[key]:.3g}" for key in NOTES if key in result]
    return f"{job['path']:8} {setting_of(job):27}" + "".join([f"{c:>11}" for c in cells] + notes)


def jobs_of(config: Config, dtype: str) -> list[dict]:
    """The lines of the table; bfloat16 only where it is the dtype of matrix products, because CPUs
    may emulate it, many times slower."""
    return [{"path": path} | setting for path in config.only.split(",")
            for setting in SETTINGS[path]
            if (not config.quick or setting.get("rows", 0) <= ROWS)
            and setting.get("dtype") in (None, "float32", dtype)]


def main(config: Config) -> None:
    for path in config.only.split(","):
        require_choice("only", path, SETTINGS)
    config, failed = dataclasses.replace(config, **QUICK if config.quick else {}), []
    machine = measure(config, {"path": "machine"})
    if "error" in machine:
        raise UserError(machine["error"])
    print(*(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in machine.items()))
    print(HEAD)
    with open(config.json or os.devnull, "a", encoding="utf-8") as log:
        print(to_json({"path": "machine"} | machine), file=log)
        for job in jobs_of(config, machine["dtype"]):
            result = measure(config, job)
            for rate in machine.keys() & result.keys():
                share = "MFU" if rate.startswith("palm") else "limit"
                result[share] = result[rate] / machine[rate]
            line, profile = line_of(job, result), result.pop("profile", "")
            print(line, result.get("error", ""), profile, flush=True)
            print(to_json(job | result), file=log, flush=True)
            failed += [f"{job['path']} {setting_of(job)}".strip()] if "error" in result else []
    if failed:
        raise UserError(f"failed, with the reason in the table: {', '.join(failed)}")


if __name__ == "__main__":
    run_cli(main, Config)
