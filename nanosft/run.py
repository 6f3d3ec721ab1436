"""The folder of a run, --out: checkpoints, metrics.jsonl, answers.jsonl, run.json, and the lock."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from annotated_types import Ge, Gt, Lt
from tqdm import tqdm

from nanosft import checks, fast
from nanosft.cli import to_paste
from nanosft.errors import (
    UserError,
    explain_write_errors,
    flush,
    to_json,
    write_json,
    written_atomically,
)
from nanosft.ranks import Dtype, flops, peak_flops
from nanosft.shards import new_folder, verify, write_sums
from nanosft.weights import checkpoints, newest_checkpoint

VERSION = 2  # of training_state.pt
PACKAGES = ("numpy", "tiktoken", "safetensors")  # whose versions run.json names
CARD = Path(__file__).with_name("model_card.md")


@dataclasses.dataclass(kw_only=True)
class RunFlags:
    """Flags of a training command that say how it runs, not what is learned."""

    resume: bool = False
    """continue from the latest checkpoint in --out, or start at step 0 if there is none"""
    max_minutes: Annotated[float | None, Gt(0), Lt(5_000_000)] = None
    """save a checkpoint and stop after this many minutes; continue with --resume"""
    keep: Annotated[int, Ge(0)] = 0
    """checkpoints to keep: the latest, plus the one with the lowest val_loss; 0: all"""
    log_every: Annotated[int, Ge(1)] = 10
    """steps between printed lines (metrics.jsonl has every step)"""
    wandb: str | None = None
    """also log to this Weights & Biases project (pip install wandb)"""
    device: str = "auto"
    """auto, cuda, mps, or cpu"""
    dtype: Dtype = "auto"
    """of matrix products; weights stay float32. auto: bfloat16 on GPUs that support it;
    CPUs without bfloat16 instructions emulate it, many times slower"""
    dist_timeout: Annotated[float, Gt(0), Lt(5_000_000)] = 10
    """minutes that a rank waits for the others; must exceed the time to save a checkpoint"""
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """torch.compile the blocks and, on a GPU, the loss; default: on CUDA, if the compiler runs"""
    no_compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """do not compile: slower steps on a GPU, but a faster start"""

    def is_compiled(self, device: torch.device) -> bool:
        """What --compile and --no_compile, or neither, mean on this device."""
        by_default = device.type == "cuda" and not self.no_compile
        return self.compile or (by_default and fast.can_compile(device))


class Run:
    """What identifies a run, its logs, and how it ends. Only rank 0 writes."""

    def __init__(self, config, meta: dict, n_steps: int, ranks):
        self.config, self.meta, self.n_steps, self.ranks = config, meta, n_steps, ranks
        shards = [shard["sha256"] for split in meta["splits"].values() for shard in split["files"]]
        self.identity = dataclasses.asdict(config) | {
            "data_sha256": shards, "steps": n_steps, "order": order_of(config.seed),
            "dtype_used": ranks.dtype, "torch": str(torch.__version__), "numpy": np.__version__}
        self.out, self.done = Path(config.out), 0  # done: steps before this start
        self.opened, self.log, self.answers, self.wandb = contextlib.ExitStack(), None, None, None

    @property
    def newest(self) -> Path | None:
        return newest_checkpoint(self.out)

    def continue_from(self, state: dict) -> None:
        """Start after the step of a training state. UserError if it is of another run."""
        for change in checks.check_same_run(state["run"], self.identity):
            self.ranks.print(f"resume: {change}")
        self.done = state["step"]

    @property
    def rendering(self) -> dict[str, str]:
        """What selects the tokenizer files to save; chat.py reads it back from config.json."""
        return {key: self.meta[key] for key in ("encoding", "template") if key in self.meta}

    def print_plan(self, gpt, rows, memory: str, steps_per_epoch: int) -> None:
        config, ranks, self.sizes = self.config, self.ranks, gpt.config
        n_params = sum(p.numel() for p in gpt.parameters())
        ranks.print(f"model  {n_params:,} parameters from {config.init}, {gpt.config}\n"
                    f"memory {memory}\n"
                    f"data   {config.data}: {rows.describe()}\n"
                    f"plan   {self.n_steps} steps of {config.rows_per_step} rows of "
                    f"{config.block_size} tokens; {steps_per_epoch} steps per epoch; "
                    f"{ranks.world_size} rank(s) on {ranks.device.type} in {ranks.dtype}")

    def steps_left(self) -> tqdm:
        """The remaining step numbers, with a progress bar on rank 0's terminal."""
        return tqdm(range(self.done + 1, self.n_steps + 1), initial=self.done, total=self.n_steps,
                    unit="step", leave=False, disable=None if self.ranks.is_main else True)

    def mfu(self, tokens_per_s: float) -> dict[str, float]:
        """Model FLOPs utilization, as PaLM counts it, in bfloat16 on a known card: also for the
        work that SFT skips."""
        peak = peak_flops(self.ranks.device)
        if peak is None or self.ranks.dtype != "bfloat16":
            return {}
        needed = flops(self.sizes, 1, 1, self.config.block_size) * tokens_per_s
        return {"mfu": needed / (peak * self.ranks.world_size)}

    def open(self) -> None:
        """Lock the folder, write run.json, and open metrics.jsonl.

        The first row does this: a run that fails before it leaves no folder behind.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self.opened.callback(checks.lock(self.out).release)
        write_run_json(self.out, self.identity)
        self.log = self.open_log("metrics.jsonl")
        if self.config.wandb:
            import wandb

            self.wandb = wandb.init(project=self.config.wandb, name=self.out.resolve().name,
                                    dir=self.config.out, config=self.identity)
            self.opened.callback(self.wandb.finish)

    def open_log(self, name: str):
        """Open to append, cut before the first row after the step that the run resumes from."""
        path = self.out / name
        rows = itertools.takewhile(lambda found: found[1]["step"] <= self.done, read_log(path))
        kept = sum(len(line) for line, _ in rows)
        # line-buffered: written at once; a lone surrogate as JSON's escape
        file = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
        file.truncate(kept)
        return self.opened.enter_context(file)

    def write(self, metrics: dict) -> None:
        """Add a step to metrics.jsonl, its answers, if any, to answers.jsonl; print some steps."""
        if not self.ranks.is_main:
            return
        row, step = metrics | self.mfu(metrics["tokens_per_s"]), metrics["step"]
        with explain_write_errors(self.out, "free some space and use --resume"):
            if self.log is None:
                self.open()
            for answer in row.pop("val_answers", []):
                self.answers = self.answers or self.open_log("answers.jsonl")
                line = json.dumps({"step": step, **answer}, ensure_ascii=False)
                self.answers.write(line + "\n")
            self.log.write(to_json(row) + "\n")
        if self.wandb:
            self.wandb.log(row, step=step)
        is_shown = step in (self.done + 1, self.n_steps) or step % self.config.log_every == 0
        if is_shown or "val_loss" in row:
            line = (f"step {step:>6}/{self.n_steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
                    f"norm {row['grad_norm']:.2f}  {row['tokens_per_s']:,.0f} tok/s  ")
            line += f"mfu {row['mfu']:.1%}  " if "mfu" in row else ""
            tqdm.write((line + self.format(row)).rstrip())
            sys.stdout.flush()

    @staticmethod
    def format(metrics: dict) -> str:
        """`name value` of each number of an evaluation."""
        return "  ".join(f"{key} {value:.4f}" for key, value in metrics.items()
                         if key.startswith("val_") and isinstance(value, float))

    def card(self, metrics: dict) -> str:
        """README.md of a checkpoint. metrics: of its step."""
        flags = [f"{key}: {value}" for key, value in self.identity.items() if key != "data_sha256"]
        return CARD.read_text("utf-8").format(
            name=self.out.name, step=metrics["step"], steps=self.n_steps,
            data=textwrap.indent(json.dumps(self.meta, indent=1), " " * 4),
            results=f"loss {metrics['loss']:.4f}  {self.format(metrics)}".rstrip(),
            command=shlex.join(sys.argv), flags=textwrap.indent("\n".join(flags), " " * 4),
            block_size=self.config.block_size)

    def finish(self, stopped: bool) -> None:
        """Close the log, print what to do next, then leave the process group.

        stopped: by a signal or by --max_minutes; the exit code says which.
        """
        self.opened.close()
        if stopped:
            self.ranks.print(f"stopped: {self.newest}; the same command with --resume continues "
                             "the run")
        else:
            peak = peak_memory_gb(self.ranks.device)
            memory = f" (peak memory of rank 0: {peak:.2f} GB)" if peak else ""
            self.ranks.print(f"done: {self.newest}{memory}")
            loss, best = best_checkpoint(self.out)
            why = f"  # the lowest val_loss, {loss:.4f}" if best else ""
            chat = to_paste("chat.py", "--model", str(best or self.out))
            self.ranks.print(f"next: {chat}{why}")
        self.ranks.finish()
        if stopped:
            sys.exit(self.ranks.stop.exit_code())


def order_of(seed: int) -> str:
    """A fingerprint of the order of rows that this seed gives: NumPy may change it in any version.

    Source: https://numpy.org/neps/nep-0019-rng-policy.html
    """
    random = np.random.default_rng([seed, 0])  # as in packing.py
    numbers = [*random.permutation(100).tolist(), random.random()]
    return hashlib.sha256(str(numbers).encode()).hexdigest()[:12]


# ----- checkpoints -------------------------------------------------------------------------------


@contextlib.contextmanager
def new_checkpoint(out: str, step: int, model, optimizer: torch.optim.Optimizer, run: dict,
                   keep: int = 0, card: str = "") -> Iterator[Path]:
    """A temporary folder for the model's files that becomes OUT/step_000500 atomically, with
    training_state.pt and README.md. UserError if a number in the state is not finite.

    run: the dict that identifies the run. keep: how many of the latest checkpoints to leave in OUT,
    besides the best one; 0: all. card: the text of README.md.
    """
    checks.require_finite_state(f"step {step} is not saved", model, optimizer)
    state = {"version": VERSION, "step": step, "optimizer": optimizer.state_dict(), "run": run}
    folder = Path(out) / f"step_{step:06d}"
    for left_behind in Path(out).glob("step_*.tmp"):  # by a run that was killed while saving
        shutil.rmtree(left_behind)
    advice = (f"a checkpoint needs {checks.checkpoint_bytes(model) / 1e6:,.1f} MB, the last one is "
              f"{newest_checkpoint(out)}; free some space and continue with --resume")
    with explain_write_errors(folder, advice), new_folder(folder) as tmp:
        yield tmp
        if card:
            (tmp / "README.md").write_text(card, encoding="utf-8")
        torch.save(state, tmp / "training_state.pt")
        write_sums(tmp, tmp.iterdir())
        for path in [*Path(out).glob("*.jsonl"), *tmp.iterdir(), tmp]:
            flush(path)
    flush(folder.parent)
    if keep:
        _, best = best_checkpoint(out)
        for old in {*checkpoints(out)[:-keep]} - {best}:
            shutil.rmtree(old)


def read_state(out: str, device: torch.device) -> tuple[Path, dict]:
    """The newest checkpoint of a run, and its training_state.pt: version, step, optimizer, run.

    For a GPU, its tensors are mapped, not read: all ranks of a machine share the system's pages.
    """
    folder = newest_checkpoint(out)
    if folder is None:
        raise UserError(f"--resume: {out} has no checkpoint")
    path = folder / "training_state.pt"
    try:
        state = torch.load(verify(path), map_location="cpu", weights_only=True,
                           mmap=device.type != "cpu")
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].removeprefix(f"{path}: ")
        raise UserError(f"{path}: missing or damaged ({reason}); delete {folder}") from error
    version = state.get("version", 1) if isinstance(state, dict) else None
    if version != VERSION:
        raise UserError(f"--resume: {path} has format version {version}, expected {VERSION}; "
                        f"start a new run with --init {shlex.quote(str(folder))}")
    return folder, state


def best_checkpoint(out: str | Path) -> tuple[float, Path | None]:
    """(lowest val_loss of any checkpoint's step, that checkpoint); (inf, None) without an
    evaluation."""
    folders = {int(folder.name[5:]): folder for folder in checkpoints(out)}
    found = [(row["val_loss"], folders[row["step"]])
             for _, row in read_log(Path(out) / "metrics.jsonl")
             if row["step"] in folders and row.get("val_loss") is not None
             and row["val_loss"] < math.inf]
    return min(found, default=(math.inf, None))


def read_log(path: Path) -> Iterator[tuple[bytes, dict]]:
    """(line, row) of a .jsonl file, without the half line at its end that a kill may leave."""
    for number, line in enumerate(path.open("rb") if path.exists() else [], start=1):
        if line.endswith(b"\n"):
            try:
                row = json.loads(line)
                row["step"] = int(row["step"])
            except (ValueError, OverflowError, TypeError, KeyError, RecursionError) as error:
                raise UserError(f"{path} line {number}: damaged ({error}); delete the line or the "
                                "file") from error
            yield line, row


def write_run_json(out: Path, run: dict) -> None:
    """OUT/run.json: `run` (every flag and the data's sha256), and for each start of the run, the
    first one and every --resume, its command and versions."""
    path = out / "run.json"
    try:
        starts = json.loads(path.read_bytes())["starts"]
    except (OSError, ValueError, KeyError):  # the first start, or a file damaged by a power loss
        starts = []
    starts.append({
        "command": shlex.join(sys.argv),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,  # names the CUDA version, too
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    })
    with written_atomically(path) as tmp:
        write_json(tmp, run | {"starts": starts})


def git_commit() -> str | None:
    """The commit of this code, plus `-dirty` if files differ; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True,
                               encoding="utf-8", errors="replace")
    except OSError:
        return None
    return found.stdout.strip() or None


def peak_memory_gb(device: torch.device, of: str = "RUSAGE_SELF") -> float | None:
    """Peak memory of this process: allocated on the GPU if there is one, else resident.

    of: RUSAGE_CHILDREN for the largest process that it started. None: not known on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(getattr(resource, of)).ru_maxrss * unit / 1e9
