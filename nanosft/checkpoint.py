"""The files of a run: checkpoints (written, found, loaded, checked), metrics.jsonl and run.json."""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import resource
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from nanosft.cli import UserError, explain_write_errors, free_bytes, minutes, require_at_least
from nanosft.process import gather
from nanosft.shards import check_empty, verify, write_sums
from nanosft.weights import checkpoints, newest_checkpoint, pad_vocab

VERSION = 2  # of training_state.pt
CARD = Path(__file__).with_name("model_card.md")


# ----- checkpoints -------------------------------------------------------------------------------


@contextlib.contextmanager
def new_checkpoint(out: str, step: int, keep: int = 0, size: int = 0) -> Iterator[Path]:
    """A temporary folder that becomes OUT/step_000500, complete or not at all.

    keep: how many of the latest checkpoints to leave in OUT, besides the best one; 0: all. size:
    in bytes, for the message.
    """
    folder = Path(out) / f"step_{step:06d}"
    for left_behind in Path(out).glob("tmp_step_*"):  # by a run that was killed while saving
        shutil.rmtree(left_behind)
    tmp = folder.with_name(f"tmp_{folder.name}")
    advice = (f"a checkpoint needs {size / 1e6:,.1f} MB, the last one is {newest_checkpoint(out)}; "
              "free some space and continue with --resume")
    with explain_write_errors(folder, advice):
        try:
            tmp.mkdir(parents=True)
            yield tmp
            write_sums(tmp, tmp.iterdir())
            for path in [*Path(out).glob("*.jsonl"), *tmp.iterdir(), tmp]:
                flush(path)
        except Exception:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        tmp.rename(folder)
        flush(folder.parent)
    if keep:
        _, best = best_checkpoint(out)
        for old in {*checkpoints(out)[:-keep]} - {best}:
            shutil.rmtree(old)


def best_checkpoint(out: str) -> tuple[float, Path | None]:
    """The lowest val_loss at the step of a checkpoint, and that checkpoint; None: no evaluation."""
    folders = {int(folder.name[5:]): folder for folder in checkpoints(out)}
    found = [(row["val_loss"], folders[row["step"]])
             for _, row in read_log(Path(out) / "metrics.jsonl")
             if row["step"] in folders and row.get("val_loss", math.inf) < math.inf]
    return min(found, default=(math.inf, None))


def bytes_of(model: torch.nn.Module) -> int:
    """Size of a checkpoint: float32 weights and Adam's two moments."""
    return 12 * sum(p.numel() for p in model.parameters())


def flush(path: Path) -> None:
    """fsync a file or folder: its contents must reach the disk before the rename does."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read_state(folder: Path) -> dict:
    """training_state.pt of a checkpoint: version, step, optimizer, run."""
    path = folder / "training_state.pt"
    try:
        state = torch.load(verify(path), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].removeprefix(f"{path}: ")
        raise UserError(f"{path}: missing or damaged ({reason}); delete {folder}") from error
    if (version := state.get("version", 1) if isinstance(state, dict) else None) != VERSION:
        raise UserError(f"--resume: {path} has format version {version}, expected {VERSION}; "
                        f"start a new run with --init {folder}")
    return state


def model_card(run: dict, meta: dict, row: dict) -> str:
    """README.md of a checkpoint. meta: of the data; row: the metrics of the checkpoint's step."""
    data = [f"From {json.dumps(meta['source'])}, encoding {meta['encoding']}, template "
            f"{meta.get('template')}."]
    for split, entry in meta["splits"].items():
        counts = [f"{value:,} {key.replace('_', ' ')}" for key, value in entry.items()
                  if key != "shards" and isinstance(value, int)]
        shards = [f"    {shard['sha256']}  {shard['file']}" for shard in entry["files"]]
        data.append(f"{split}: {', '.join(counts)}; sha256:\n\n" + "\n".join(shards))
    flags = [f"    {key}: {value}" for key, value in run.items() if key != "data_sha256"]
    return CARD.read_text("utf-8").format(
        name=Path(run["out"]).name, step=row["step"], steps=run["steps"], data="\n\n".join(data),
        results=f"loss {row['loss']:.4f}  {format_metrics(row)}".rstrip(),
        command=shlex.join(sys.argv), flags="\n".join(flags), block_size=run["block_size"])


# ----- what a run is, and what it must satisfy ---------------------------------------------------

# Flags that do not change what a run computes, so a resumed run may change them; for --epochs and
# --max_steps, only the resulting number of steps matters.
MAY_CHANGE = {"data", "out", "resume", "epochs", "max_steps", "max_minutes", "batch_size",
              "eval_every", "eval_tokens", "eval_prompts", "save_every", "keep", "log_every",
              "wandb", "device", "dtype", "dist_timeout", "compile"}


def describe_run(config, meta: dict, n_steps: int) -> dict:
    """What identifies a run: every flag, the number of steps and the sha256 of the data."""
    shards = [shard["sha256"] for split in meta["splits"].values() for shard in split["files"]]
    return dataclasses.asdict(config) | {"steps": n_steps, "data_sha256": shards}


def check_same_run(saved: dict, now: dict) -> list[str]:
    """What differs from the saved run, as lines to print. UserError if it must not differ."""
    changes = []
    for key, value in now.items():
        was = saved.get(key)
        if was == value or key == "resume":
            continue
        if key == "data_sha256":
            raise UserError("--resume: the data is not what the run in --out was trained on; use "
                            "its --data or another --out")
        if key not in MAY_CHANGE:
            raise UserError(f"--resume: {key} is {value}, but {was} in the run in --out; use the "
                            "run's own flags or another --out")
        changes.append(f"{key} is {value} (was {was})")
    return changes


def check_flags(config, world_size: int) -> None:
    """UserError for invalid or conflicting flags, before anything is loaded or written."""
    require_at_least(config, 1, "batch_size", "rows_per_step", "block_size", "epochs", "max_steps",
                     "n_layer", "n_head", "n_embd", "log_every")
    require_at_least(config, 0, "warmup_steps", "eval_every", "eval_tokens", "save_every", "keep",
                     "seed", "grad_clip")
    # an update of AdamW moves a weight by about the learning rate, and GPT-2's weights are near 0.1
    require_at_least(config, 0, "learning_rate", "weight_decay", most=1)
    if config.max_minutes is not None:
        minutes("max_minutes", config.max_minutes)
    for name in ("n_layer", "n_head", "n_embd"):
        if config.init != "scratch" and getattr(config, name) is not None:
            raise UserError(f"--{name} {getattr(config, name)} is only for --init scratch; --init "
                            f"{config.init} has its own size")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(f"--wandb {config.wandb} needs a package; run `pip install wandb`")
    at_once = config.batch_size * world_size
    if config.rows_per_step % at_once:
        raise UserError(f"--rows_per_step {config.rows_per_step} is not a multiple of --batch_size "
                        f"{config.batch_size} x {world_size} ranks = {at_once}; try "
                        f"{math.ceil(config.rows_per_step / at_once) * at_once}")
    if (Path(config.out) / "lock").exists():
        lock(config.out, fcntl.LOCK_SH).close()  # who trains there holds it exclusively
    if not config.resume:
        check_empty(config.out, "continue the run with --resume or choose another folder")
    elif not checkpoints(config.out):  # killed before its first checkpoint, or no run at all
        ours = ("metrics.*", "answers.*", "run.*", "lock", "tmp_step_*", "wandb")
        for path in Path(config.out).glob("*"):
            if not any(path.match(pattern) for pattern in ours):
                raise UserError(f"--resume: {config.out} holds {path.name} and no checkpoint; "
                                "choose another --out")
    if world_size > 1:
        torch.distributed.barrier()  # every rank checks before any rank writes


def check_fit(model_config, config, meta: dict) -> None:
    """UserError if the data's vocabulary or row length does not fit the model."""
    need = pad_vocab(meta["vocab_size"])
    if model_config.vocab_size != need:
        raise UserError(f"--data {config.data} needs {need} ids ({meta['encoding']}, padded), but "
                        f"the model has {model_config.vocab_size}; make the data with the model's "
                        "encoding")
    if config.block_size > model_config.block_size:
        raise UserError(f"--block_size {config.block_size} is above the model's "
                        f"{model_config.block_size}; lower it")


def check_ranks(run: dict, done: int) -> None:
    """UserError if the ranks are about to train different runs; only their paths may differ."""
    data = hashlib.sha256("".join(run.get("data_sha256", [])).encode()).hexdigest()[:12]
    everyone = gather((socket.gethostname(), {"step": done} | run | {"data_sha256": data}))
    host, first = everyone[0]
    for rank, (other_host, theirs) in enumerate(everyone):
        for key, value in first.items():
            if key not in ("data", "out") and theirs.get(key) != value:
                raise UserError(f"rank {rank} on {other_host} has {key} {theirs.get(key)}, but "
                                f"rank 0 on {host} has {value}; use the same flags and data "
                                "everywhere, and for --resume an --out that all machines share")


def check_disk(config, run: dict, done: int, model: torch.nn.Module) -> list[str]:
    """Return warnings. UserError if rank 0's disk, which holds --out, cannot take a checkpoint."""
    free, size = gather(free_bytes(Path(config.out)))[0], bytes_of(model)
    steps = run.get("steps", done) - done  # tools.bench is no run
    saves = math.ceil(steps / (config.save_every or steps or 1))
    copies = min(saves, config.keep + 1) if config.keep else saves
    least = size * min(copies, 1 if done else 2)  # a checkpoint and its temporary copy
    if free < least:
        raise UserError(f"--out {config.out}: {free / 1e6:,.1f} MB free, but a checkpoint and its "
                        f"temporary copy need {least / 1e6:,.1f} MB; free some space")
    full = free < size * copies
    return [f"--out {config.out}: {free / 1e6:,.1f} MB free, but {copies} checkpoints need "
            f"{size * copies / 1e6:,.1f} MB; free some space or use --keep"] if full else []


# ----- metrics.jsonl and run.json ----------------------------------------------------------------


class Metrics:
    """OUT/metrics.jsonl, one JSON object per step, some of them also printed; and
    OUT/answers.jsonl, the answers of each evaluation if there are any."""

    def __init__(self, config, run: dict, steps_done: int, n_steps: int):
        self.config, self.run, self.steps_done, self.n_steps = config, run, steps_done, n_steps
        self.out, self.opened = Path(config.out), contextlib.ExitStack()
        self.file = self.answers = self.wandb = None

    def open(self) -> None:
        """Lock the folder, write run.json and open metrics.jsonl.

        The first row does this: a run that fails before it leaves no folder behind.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self.opened.enter_context(lock(self.config.out, fcntl.LOCK_EX))
        write_run_json(self.out, self.run)
        self.file = self.open_log("metrics.jsonl")
        if self.config.wandb:
            import wandb

            self.wandb = wandb.init(project=self.config.wandb, name=self.out.resolve().name,
                                    dir=self.config.out, config=self.run)
            self.opened.callback(self.wandb.finish)

    def open_log(self, name: str):
        """Open to append, cut before the first row after the step that the run resumes from."""
        path = self.out / name
        rows = itertools.takewhile(lambda found: found[1]["step"] <= self.steps_done,
                                   read_log(path))
        kept = sum(len(line) for line, _ in rows)
        file = path.open("a", buffering=1, encoding="utf-8")  # line-buffered: written at once
        file.truncate(kept)
        return self.opened.enter_context(file)

    def write(self, row: dict) -> None:
        row = dict(row)
        with explain_write_errors(self.out, "free some space and use --resume"):
            if self.file is None:
                self.open()
            for answer in row.pop("val_answers", []):
                self.answers = self.answers or self.open_log("answers.jsonl")
                answer = {"step": row["step"], **answer}
                self.answers.write(json.dumps(answer, ensure_ascii=False) + "\n")
            self.file.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        step, ends = row["step"], (self.steps_done + 1, self.n_steps)
        if step in ends or step % self.config.log_every == 0 or "val_loss" in row:
            line = (f"step {step:>6}/{self.n_steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
                    f"norm {row['grad_norm']:.2f}  {row['tokens_per_s']:,.0f} tok/s  ")
            tqdm.write((line + format_metrics(row)).rstrip())
            sys.stdout.flush()

    def close(self) -> None:
        self.opened.close()


def lock(out: str, kind: int):
    """OUT/lock, flocked until the file is closed or the process ends. UserError: who holds it.

    kind: fcntl.LOCK_EX for the rank that writes, LOCK_SH to see whether there is one.
    """
    file, me = (Path(out) / "lock").open("a+"), f"process {os.getpid()} on {socket.gethostname()}"
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        if (holder := file.read()) != me:  # a failed run in this notebook may still hold it
            raise UserError(f"--out {out} is in use by {holder or 'another run'}; stop it or "
                            "choose another folder") from error
    except OSError:  # this file system has no locks
        pass
    if kind == fcntl.LOCK_EX:
        file.truncate(0)
        file.write(me)
        file.flush()
    return file


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


def format_metrics(row: dict) -> str:
    """`name value` of each number of an evaluation."""
    return "  ".join(f"{key} {value:.4f}" for key, value in row.items()
                     if key.startswith("val_") and isinstance(value, float))


def write_run_json(out: Path, run: dict) -> None:
    """OUT/run.json: `run` (every flag and the data's sha256), and for each start of the run, the
    first one and every --resume, its command and versions."""
    path = out / "run.json"
    try:
        starts = json.loads(path.read_text())["starts"]
    except (OSError, ValueError, KeyError):  # the first start, or a file damaged by a power loss
        starts = []
    packages = ("numpy", "tiktoken", "safetensors")
    starts.append({
        "command": shlex.join(sys.argv),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,  # names the CUDA version, too
        **{name: importlib.metadata.version(name) for name in packages},
    })
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(run | {"starts": starts}, indent=1) + "\n")
    flush(tmp)
    tmp.rename(path)


def git_commit() -> str | None:
    """The commit of this code, plus `-dirty` if files differ; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process: allocated on the GPU if there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def finish(out: str, ranks, stopped: bool) -> None:
    """Print how to go on, and leave the other ranks; stopped: by a signal or by --max_minutes."""
    newest, peak = newest_checkpoint(out), peak_memory_gb(ranks.device)
    if stopped:
        ranks.print(f"stopped: {newest}; the same command with --resume continues the run")
    else:
        ranks.print(f"done: {newest} (peak memory of rank 0: {peak:.2f} GB)")
        loss, best = best_checkpoint(out)
        why = f"  # the lowest val_loss, {loss:.4f}" if best else ""
        ranks.print(f"next: python chat.py --model {best or out}{why}")
    ranks.finish()
    if stopped:
        sys.exit(ranks.stop.exit_code())
