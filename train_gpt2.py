"""Pretrain GPT-2 on shards of text, on a CPU, one GPU or many.

    python train_gpt2.py --data data/mine --out out/base --device cpu --n_layer 4 --n_head 4 \\
        --n_embd 256 --block_size 256 --batch_size 8 --rows_per_step 16 --max_steps 300
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --data data/fineweb --out out/base

Expect a loss near ln(vocabulary size) at the start (10.8 for gpt2, 5.8 for bytes). A step adds a
line to OUT/metrics.jsonl; OUT/step_000500 is a Hugging Face GPT-2 folder plus what --resume needs.

Everything above `main` is also the training library that train_sft.py imports: importing this file
does nothing.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset

from fineweb import check_new_folder, open_shards, read_meta, run_cli, verify_shard
from model import GPT, IGNORE_INDEX, GPTConfig, Looped, checkpoints, newest_checkpoint, pad_vocab
from tokenizer import get_encoding

# Source: GPT-3 (Brown et al. 2020), appendix B; the rest of its recipe stands in Config
BETAS, EPS, MIN_LR_RATIO = (0.9, 0.95), 1e-8, 0.1


@dataclasses.dataclass
class Config:
    """Pretrain GPT-2. Defaults: 124M with the recipe of GPT-3 125M (table 2.1, appendix B)."""

    data: str
    """folder that fineweb.py made"""
    out: str
    """folder for the checkpoints and metrics.jsonl; must not hold a run yet, unless --resume"""
    init: str = "scratch"
    """scratch, gpt2 (-medium, -large, -xl), a hub id, a Hugging Face folder, or a run of ours"""
    resume: bool = False
    """go on from the newest checkpoint in --out"""
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    """T, the tokens of a row"""
    batch_size: int = 16
    """rows that a rank puts through the model at once"""
    rows_per_step: int = 512
    """rows of one optimiser step, over all ranks"""
    epochs: int = 1
    max_steps: int | None = None
    """optimiser steps, instead of --epochs"""
    learning_rate: float = 6e-4
    warmup_steps: int = 715
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    seed: int = 0
    eval_every: int = 250
    """steps between evaluations; 0: only at the start and the end"""
    eval_tokens: int = 10_485_760
    """at most so many validation tokens"""
    save_every: int = 1000
    """steps between checkpoints; there is always one at the end"""
    keep: int = 0
    """newest checkpoints to keep; 0: all"""
    log_every: int = 10
    """steps between printed lines (metrics.jsonl gets every step)"""
    device: str = "auto"
    """auto, cuda, mps or cpu"""
    compile: bool = False
    """torch.compile the blocks: slow to start, faster on a GPU"""


# ----- processes ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """Who this process is among the ranks of torchrun, and where it computes."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """In place, over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def print(self, *args) -> None:
        if self.is_main:
            print(*args, flush=True)


def setup_distributed(device: str = "auto") -> Run:
    """Read torchrun's environment; start NCCL on GPUs, Gloo on a CPU. One process needs neither."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        mps = torch.backends.mps.is_available() and world_size == 1
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        place = torch.device(
            device, int(os.environ.get("LOCAL_RANK", 0)) if device == "cuda" else None
        )
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {device}: not to be had here ({str(error).splitlines()[0]})"
        ) from error
    if place.type == "cuda":
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high")
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return Run(rank, world_size, place)


# ----- data: rows, and each rank's share of them -------------------------------------------------


class MicroBatch(NamedTuple):
    """What goes through the model at once."""

    x: Tensor  # (B, T) int64
    y: Tensor  # (B, T) int64, -100 where a target does not count
    weights: Tensor | None = None  # (B, T) float32; None: 1
    segments: Tensor | None = None  # (B, T) int64; None: a row is one text
    n_tokens: int = 0  # places of x that are no padding

    def to(self, device: torch.device) -> "MicroBatch":
        move = [t.to(device, non_blocking=True) if isinstance(t, Tensor) else t for t in self]
        return MicroBatch(*move)

    def weight_percent(self) -> int:
        """The sum of the targets' weights in whole percent: integers add up alike in any order."""
        if self.weights is None:
            return 100 * int((self.y != IGNORE_INDEX).sum())
        percent = (self.weights[self.y != IGNORE_INDEX] * 100).round()
        return int(percent.sum(dtype=torch.float64))


class TokenRows(Dataset):
    """Row i of a split is its tokens [i*T, i*T + T + 1), whatever shard they lie in.

    Row i gives x = tokens[:-1] and y = tokens[1:], so neighbours share one token.
    """

    def __init__(self, data: str, split: str, block_size: int):
        self.data, self.block_size = data, block_size
        self.meta = read_meta(data, "text")
        self.shards = open_shards(data, self.meta, split)
        self.files = self.meta["splits"][split]["files"]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.unverified = set(range(len(self.shards)))
        if not len(self):
            raise ValueError(
                f"--data {data}: the {split} split has {self.ends[-1]} tokens, a row of "
                f"--block_size {block_size} takes {block_size + 1}; lower it"
            )

    def __len__(self) -> int:
        return (int(self.ends[-1]) - 1) // self.block_size

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        start, stop = i * self.block_size, (i + 1) * self.block_size + 1
        pieces = []
        while start < stop:
            shard = int(np.searchsorted(self.ends, start, side="right"))
            offset = int(self.ends[shard]) - len(self.shards[shard])
            piece = self.shards[shard][start - offset : stop - offset]
            pieces.append(piece)
            start += len(piece)
        ids = torch.from_numpy(np.concatenate(pieces).astype(np.int64))  # (T + 1,)
        return {"input_ids": ids[:-1], "labels": ids[1:]}

    def filler(self) -> dict[str, Tensor]:
        x = torch.zeros(self.block_size, dtype=torch.long)
        return {"input_ids": x, "labels": torch.full_like(x, IGNORE_INDEX)}

    def set_epoch(self, epoch: int) -> None:
        """Every epoch reads the text in the same order."""

    def verify(self, first_row: int, last_row: int) -> None:
        """Check the sha256 of the shards of these rows, once, on one rank of each machine."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
        span = np.array([first_row, last_row + 1]) * self.block_size
        first, last = np.searchsorted(self.ends, span, side="right")
        for shard in sorted(self.unverified.intersection(range(first, last + 1))):
            verify_shard(self.data, self.files[shard])
            self.unverified.remove(shard)


class RankRows(Dataset):
    """This rank's rows of an epoch, from step `first_step` of it on, micro-batch by micro-batch.

    Micro-batch m of a step is world_size * batch_size consecutive rows, of which each rank takes
    its batch_size; what is in a step depends neither on the ranks nor on the micro-batch.
    Where an epoch's last step runs out of rows, padding rows keep all ranks in step.
    """

    def __init__(self, rows: Dataset, config: Config, run: Run, first_step: int = 0):
        self.rows, self.run, self.first_step = rows, run, first_step
        self.batch_size, self.rows_per_step = config.batch_size, config.rows_per_step

    def __len__(self) -> int:
        steps = math.ceil(len(self.rows) / self.rows_per_step) - self.first_step
        return steps * self.rows_per_step // self.run.world_size

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if i >= len(self):
            raise IndexError(i)
        step, i = divmod(i, self.rows_per_step // self.run.world_size)
        micro, i = divmod(i, self.batch_size)
        row = (self.first_step + step) * self.rows_per_step
        row += (micro * self.run.world_size + self.run.rank) * self.batch_size + i
        return self.rows[row] if row < len(self.rows) else self.rows.filler()


def text_batches(rows: Dataset, batch_size: int) -> Iterator[MicroBatch]:
    for batch in DataLoader(rows, batch_size, pin_memory=torch.cuda.is_available()):
        x, y = batch["input_ids"], batch["labels"]
        yield MicroBatch(x, y, n_tokens=int((y != IGNORE_INDEX).sum()))


def load_steps(
    rows: Dataset, config: Config, run: Run, first_step: int, batches: Callable
) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each step from `first_step` on, for ever, epoch after epoch."""
    per_epoch = steps_per_epoch(rows, config)
    micro_batches = config.rows_per_step // (config.batch_size * run.world_size)
    for epoch in itertools.count(first_step // per_epoch):
        rows.set_epoch(epoch)
        done = max(0, first_step - epoch * per_epoch)
        loader = batches(RankRows(rows, config, run, done), config.batch_size)
        for step in range(done, per_epoch):
            first_row = step * config.rows_per_step
            rows.verify(first_row, min(first_row + config.rows_per_step, len(rows)) - 1)
            yield list(itertools.islice(loader, micro_batches))


def eval_share(rows: Dataset, config: Config, run: Run) -> Subset:
    """This rank's rows of the first --eval_tokens of a validation split."""
    n = min(len(rows), max(1, config.eval_tokens // config.block_size))
    rows.verify(0, n - 1)
    return Subset(rows, range(run.rank, n, run.world_size))


def steps_per_epoch(rows: Dataset, config: Config) -> int:
    return math.ceil(len(rows) / config.rows_per_step)


# ----- the optimiser step ------------------------------------------------------------------------


def get_lr(step: int, n_steps: int, config: Config) -> float:
    """Learning rate of step 0, 1, …: linear warm-up, then a cosine to MIN_LR_RATIO of the peak.

    The last warm-up step has the peak, the run's last step the minimum. A warm-up longer than the
    run is clipped to it, and then the run ends at the peak.
    """
    warmup = min(config.warmup_steps, n_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step + 1 - warmup) / (n_steps - warmup)  # (0, 1]
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (MIN_LR_RATIO + (1 - MIN_LR_RATIO) * cosine)


def make_optimizer(model: GPT, config: Config) -> torch.optim.AdamW:
    """AdamW that decays matrices only: neither biases nor the scales of the layer norms."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, config.learning_rate, betas=BETAS, eps=EPS, fused=True)


def forward_text(model, x, y, weights=None, segments=None) -> tuple[Tensor, int]:
    """(loss_sum, weight_sum) of a pretraining micro-batch: each token counts once."""
    return model(x, y), (y != IGNORE_INDEX).sum()


def count_step(micro_batches: list[MicroBatch], run: Run) -> Tensor:
    """(3,) int64 over all ranks: the targets' weight in percent, tokens, trained tokens."""
    counts = torch.zeros(3, dtype=torch.int64)
    for batch in micro_batches:
        trained = int((batch.y != IGNORE_INDEX).sum())
        counts += torch.tensor([batch.weight_percent(), batch.n_tokens, trained])
    return run.sum(counts.to(run.device))


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[MicroBatch],
    lr: float,
    grad_clip: float,
    run: Run,
    forward: Callable = forward_text,
) -> dict[str, float]:
    """One optimiser step; its loss and gradient are the mean over the trained tokens of all ranks.

    The mean is over the whole step, so its divisor must be known before the first backward pass:
    dividing each micro-batch by its own count would give a token in a short answer more say.
    """
    counts = count_step(micro_batches, run)
    total_weight = torch.where(counts[0] > 0, counts[0] / 100, 1.0)

    loss = torch.zeros((), device=run.device)
    for i, batch in enumerate(micro_batches):
        x, y, weights, segments, _ = batch.to(run.device)
        last = i == len(micro_batches) - 1
        wait = contextlib.nullcontext() if last or run.world_size == 1 else model.no_sync()
        with wait:
            with run.autocast():
                loss_sum, _ = forward(model, x, y, weights, segments)
            # DDP averages the ranks' gradients; times world_size makes that their sum
            (loss_sum * run.world_size / total_weight).backward()
        loss += loss_sum.detach()
    loss = run.sum(loss) / total_weight

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _, tokens, trained = counts.tolist()
    loss, norm = torch.stack([loss, norm]).tolist()  # the step's one wait for the device
    return {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens, "trained_tokens": trained}


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[MicroBatch], run: Run) -> dict[str, float]:
    """val_loss in nats and val_accuracy per trained token, over the batches of all ranks."""
    dtype = torch.float32 if run.device.type == "mps" else torch.float64  # mps has no float64
    sums = torch.zeros(4, dtype=dtype, device=run.device)  # loss, weight, hits, targets
    for batch in batches:
        x, y, weights, segments, _ = batch.to(run.device)
        counted = y != IGNORE_INDEX
        with run.autocast():
            logits = model(x, segments=segments)  # (B, T, V)
        logits, y = logits[counted].float(), y[counted]  # (N, V), (N,)
        weights = torch.ones(len(y), device=run.device) if weights is None else weights[counted]
        nll = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        hits = (logits.argmax(1) == y).sum()
        sums += torch.stack([(nll * weights).sum(), weights.sum(), hits, counted.sum()])
    loss, weight, hits, targets = run.sum(sums).tolist()
    return {"val_loss": loss / max(weight, 1e-9), "val_accuracy": hits / max(targets, 1)}


# ----- checkpoints -------------------------------------------------------------------------------


def flush(path: Path) -> None:
    """To the disk, so that a rename after it cannot come to stand before it."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_checkpoint(
    out: str, step: int, model: GPT, optimizer, identity: dict, keep: int = 0, **settings
) -> Path:
    """OUT/step_000500: a Hugging Face folder plus training_state.pt, whole or not at all."""
    folder = Path(out) / f"step_{step:06d}"
    tmp = folder.with_name(f"tmp_{folder.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    model.save_pretrained(tmp, **settings)
    state = {"step": step, "optimizer": optimizer.state_dict(), "identity": identity}
    torch.save(state, tmp / "training_state.pt")
    for path in [*tmp.iterdir(), tmp]:
        flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    tmp.rename(folder)
    flush(folder.parent)
    if keep:
        for old in checkpoints(Path(out))[:-keep]:
            shutil.rmtree(old)
    return folder


def load_checkpoint(out: str) -> tuple[GPT, dict]:
    """The model and the training state of the newest complete checkpoint of a run."""
    folder = newest_checkpoint(Path(out))
    if folder is None:
        raise ValueError(f"--resume: {out} has no checkpoint to resume; leave --resume out")
    path = folder / "training_state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: missing or damaged ({reason}); delete {folder}") from error
    return GPT.from_pretrained(str(folder)), state


def identity_of(config: Config, meta: dict, n_steps: int, keys: Iterable[str] = ()) -> dict:
    """What a resumed run must share with the run that it resumes."""
    keys = ("init", "n_layer", "n_head", "n_embd", "block_size", "rows_per_step", "learning_rate",
            "warmup_steps", "weight_decay", "grad_clip", "seed", *keys)  # fmt: skip
    shards = [s["sha256"] for split in meta["splits"].values() for s in split["files"]]
    return {key: getattr(config, key) for key in keys} | {"steps": n_steps, "data sha256": shards}


def check_identity(saved: dict, now: dict) -> None:
    for key, value in now.items():
        if saved.get(key) != value:
            was, new = ("other data",) * 2 if key == "data sha256" else (saved.get(key), value)
            raise ValueError(
                f"--resume: {key} is {new}, the run in --out has {was}; give the run's own flags, "
                "or another --out"
            )


# ----- the run: what main puts together, here and in train_sft.py --------------------------------


def check_config(config: Config, run: Run) -> None:
    """ValueError for flags that do not go together, before anything is loaded or written."""
    at_least = dict.fromkeys(("batch_size", "rows_per_step", "block_size", "epochs", "max_steps",
                              "n_layer", "n_head", "n_embd", "log_every"), 1)  # fmt: skip
    at_least |= dict.fromkeys(("warmup_steps", "eval_every", "save_every", "keep"), 0)
    for name, least in at_least.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: it must be at least {least}")
    at_once = config.batch_size * run.world_size
    if config.rows_per_step % at_once:
        raise ValueError(
            f"--rows_per_step {config.rows_per_step} is no multiple of --batch_size "
            f"{config.batch_size} x {run.world_size} processes = {at_once}; try "
            f"{math.ceil(config.rows_per_step / at_once) * at_once}"
        )
    if not config.resume:
        check_out(config.out)
    if run.world_size > 1:
        dist.barrier()  # nobody writes before all have looked


def check_out(out: str) -> None:
    try:
        check_new_folder(out)
    except ValueError as error:
        raise ValueError(f"--out {out} already holds files; --resume goes on with the run in "
                         "it, or choose another folder") from error  # fmt: skip


def make_model(config: Config, run: Run, meta: dict) -> GPT:
    """A model on the device, from scratch or from weights, that fits the data's vocabulary."""
    need = pad_vocab(meta["vocab_size"])
    if config.init == "scratch":
        torch.manual_seed(config.seed)
        sizes = {key: getattr(config, key) for key in ("block_size", "n_layer", "n_head", "n_embd")}
        model = GPT(GPTConfig(vocab_size=need, **sizes))
    else:
        model = GPT.from_pretrained(config.init)
    return fit_model(model, config, meta).to(run.device)


def fit_model(model: GPT, config: Config, meta: dict) -> GPT:
    """ValueError if the data's ids or rows are too large for the model."""
    need = pad_vocab(meta["vocab_size"])
    if model.config.vocab_size != need:
        raise ValueError(
            f"--data {config.data} needs {need} ids ({meta['encoding']}, padded), the model has "
            f"{model.config.vocab_size}; make the data with the model's encoding"
        )
    T, limit = config.block_size, model.config.block_size
    if T > limit:
        raise ValueError(f"--block_size {T} is above the model's {limit}; lower it")
    model.config.n_vocab = meta["vocab_size"]
    return model


def resume_or_make(config: Config, run: Run, meta: dict, identity: dict) -> tuple:
    """(model, optimizer, steps done)"""
    if not config.resume:
        model = make_model(config, run, meta)
        return model, make_optimizer(model, config), 0
    model, state = load_checkpoint(config.out)
    check_identity(state["identity"], identity)
    model = fit_model(model, config, meta).to(run.device)
    optimizer = make_optimizer(model, config)
    optimizer.load_state_dict(state["optimizer"])
    return model, optimizer, state["step"]


def wrap(model: GPT, config: Config, run: Run) -> torch.nn.Module:
    """DDP where there are several ranks; compiled blocks with --compile."""
    if config.compile:
        # The loop's lengths differ from step to step: in a graph each would be compiled anew.
        Looped.__call__ = torch.compiler.disable(Looped.__call__)
        for block in model.transformer.h:
            block.compile()
    if run.world_size == 1:
        return model
    devices = [run.device] if run.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def open_metrics(out: str, steps_done: int):
    """OUT/metrics.jsonl for appending, cut after the step that a resumed run starts from."""
    path = Path(out) / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [s for s in lines if s.endswith("\n") and json.loads(s)["step"] <= steps_done]
    tmp = path.with_suffix(".tmp")
    tmp.write_text("".join(kept))
    tmp.rename(path)
    return path.open("a", buffering=1)


def progress(steps: Iterable[int], run: Run, total: int) -> Iterable[int]:
    """A bar on a terminal; nothing in a log file."""
    if not (run.is_main and sys.stderr.isatty()):
        return steps
    from tqdm import tqdm

    return tqdm(steps, initial=total - len(steps), total=total, unit="step", leave=False)


def train(
    config: Config,
    run: Run,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterator[list[MicroBatch]],
    span: range,
    forward: Callable,
    assess: Callable[[], dict],
    save: Callable[[int], None],
) -> None:
    """The loop, from step span.start to span.stop: step, log, evaluate, save."""
    log, n_steps, clock = None, span.stop, time.perf_counter()
    for step in progress(span, run, n_steps):
        lr = get_lr(step, n_steps, config)
        row = {"step": step + 1}
        row |= train_step(model, optimizer, next(steps), lr, config.grad_clip, run, forward)
        row["dt"] = time.perf_counter() - clock
        row["tokens_per_s"] = row["tokens"] / row["dt"]
        if not math.isfinite(row["loss"]):
            raise ValueError(f"step {step + 1}: the loss is {row['loss']}; lower --learning_rate")
        final = step + 1 == n_steps
        if final or (config.eval_every and (step + 1) % config.eval_every == 0):
            row |= assess()
        if run.is_main:  # opened only now: a run that cannot start leaves no folder behind
            log = log or open_metrics(config.out, span.start)
            log.write(json.dumps(row) + "\n")
            if (
                final
                or step == span.start
                or (step + 1) % config.log_every == 0
                or "val_loss" in row
            ):
                print_row(row, n_steps)
        if final or (config.save_every and (step + 1) % config.save_every == 0):
            save(step + 1)
        clock = time.perf_counter() if "val_loss" in row or final else clock + row["dt"]


def print_row(row: dict, n_steps: int) -> None:
    line = (
        f"step {row['step']:>6}/{n_steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
        f"norm {row['grad_norm']:.2f}  {row['tokens_per_s']:,.0f} tok/s"
    )
    for key, value in row.items():
        line += f"  {key} {value:.4f}" if key.startswith("val_") else ""
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(line)
    else:
        print(line, flush=True)


def peak_memory_gb(run: Run) -> float:
    """Of this process: on the GPU where there is one, else resident."""
    if run.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    # kilobytes on Linux, bytes on macOS
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


def finish(config: Config, run: Run, *next_commands: str) -> None:
    newest = newest_checkpoint(Path(config.out)) if run.is_main else ""
    run.print(f"done: {newest}  (peak memory of rank 0: {peak_memory_gb(run):.2f} GB)")
    for command in next_commands:
        run.print(f"next: {command}")
    if run.world_size > 1:
        # Gloo's threads may still want the GIL to let go of the last collective's tensor; ended
        # under the GIL they would hang. Waiting for each other gives them the time.
        dist.barrier()
        dist.destroy_process_group()


# ----- pretraining -------------------------------------------------------------------------------


def sample(model: GPT, encoding, max_new_tokens: int = 48) -> str:
    """A short text of the model's own, from <|endoftext|> on."""
    eot = encoding.eot_token
    ids = model.generate([[eot]], max_new_tokens, temperature=0.8, top_k=50, stop_ids=[eot])[0]
    return encoding.decode(ids)


def main(config: Config) -> None:
    # --- 1. processes and device ---
    run = setup_distributed(config.device)
    check_config(config, run)

    # --- 2. data ---
    T = config.block_size
    rows = TokenRows(config.data, "train", T)
    encoding = get_encoding(rows.meta["encoding"])
    n_steps = config.max_steps or config.epochs * steps_per_epoch(rows, config)
    val = TokenRows(config.data, "val", T) if "val" in rows.meta["splits"] else None

    # --- 3. model and optimiser; a resumed run takes both up again ---
    identity = identity_of(config, rows.meta, n_steps)
    raw_model, optimizer, steps_done = resume_or_make(config, run, rows.meta, identity)
    model = wrap(raw_model, config, run)

    # --- 4. say what will happen ---
    n_params = sum(p.numel() for p in raw_model.parameters())
    run.print(f"model  {n_params:,} parameters, {raw_model.config}")
    run.print(
        f"data   {config.data}: {rows.ends[-1]:,} tokens of {encoding.name}, {len(rows):,} rows"
    )
    per_epoch, per_step = steps_per_epoch(rows, config), config.rows_per_step * T
    run.print(
        f"plan   {n_steps} steps of {config.rows_per_step} rows = {per_step:,} tokens; "
        f"{per_epoch} steps an epoch, {run.world_size} process(es) on {run.device}"
    )
    if steps_done >= n_steps:
        run.print(f"{config.out} is finished: step {steps_done} of {n_steps}")
        return finish(config, run)

    # --- 5. train ---
    def assess() -> dict:
        if run.is_main:
            run.print(f"sample {sample(raw_model, encoding)!r}")
        if val is None:
            return {}
        return evaluate(
            raw_model, text_batches(eval_share(val, config, run), config.batch_size), run
        )

    def save(step: int) -> None:
        if run.is_main:
            save_checkpoint(config.out, step, raw_model, optimizer, identity, config.keep,
                            encoding=encoding.name)  # fmt: skip

    run.print("start  " + "  ".join(f"{key} {value:.4f}" for key, value in assess().items()))
    steps = load_steps(rows, config, run, steps_done, text_batches)
    train(
        config, run, model, optimizer, steps, range(steps_done, n_steps), forward_text, assess, save
    )

    # --- 6. what is next ---
    finish(config, run, f"python chat.py --model {config.out}")


if __name__ == "__main__":
    run_cli(main, Config)
