"""Everything that is refused before a run starts or while it trains."""

import hashlib
import importlib.util
import itertools
import math
import os
import shlex
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import torch
import torch.distributed as dist

from nanosft.cli import check_bounds
from nanosft.errors import UserError, free_bytes
from nanosft.fast import CHUNK_BYTES
from nanosft.ranks import gather_objects, require_memory
from nanosft.shards import check_empty
from nanosft.weights import checkpoints, count_parameters, pad_vocab

TOKEN_BYTES = 32  # of a token in a row: its id, label, weight, and segment
ADVICE = "lower --learning_rate, lengthen --warmup_steps, or set --grad_clip 1"


def check_flags(config, world_size: int) -> None:
    """UserError for invalid or conflicting flags, before anything is loaded or written."""
    check_bounds(config)
    for name in ("n_layer", "n_head", "n_embd"):
        if config.init != "scratch" and getattr(config, name) is not None:
            raise UserError(f"--{name} {getattr(config, name)} is only for --init scratch; --init "
                            f"{config.init} has its own size")
    if config.compile and config.no_compile:
        raise UserError("--compile and --no_compile: pass only one of them")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(f"--wandb {config.wandb} needs a package; run `pip install wandb`")
    at_once = config.batch_size * world_size
    if config.rows_per_step % at_once:
        raise UserError(f"--rows_per_step {config.rows_per_step} is not a multiple of --batch_size "
                        f"{config.batch_size} x {world_size} ranks = {at_once}; try "
                        f"{math.ceil(config.rows_per_step / at_once) * at_once}")
    check_out(config)
    if world_size > 1:
        dist.barrier()  # every rank checks before any rank writes


def check_out(config) -> None:
    """UserError if --out is in use, holds a run but --resume is not set, or holds other files."""
    is_run = checkpoints(config.out) or (Path(config.out) / "run.json").exists()
    if (Path(config.out) / "lock").exists():
        lock(config.out).release()
        is_run = True  # if only just begun
    if not (config.resume and is_run):
        check_empty(config.out, "choose another folder or, if it holds a run, use --resume")


def lock(out: str | Path) -> filelock.BaseFileLock:
    """OUT/lock, held until it is released or the process ends. UserError: who holds it."""
    path, me = Path(out) / "lock", f"process {os.getpid()} on {socket.gethostname()}"
    held = filelock.FileLock(path, fallback_to_soft=False)
    try:
        held.acquire(timeout=1)  # a rank that only checks the lock holds it for an instant
        path.write_text(me, "utf-8")
    except filelock.Timeout as error:
        # Windows lets no other process read
        holder = path.read_text("utf-8") if os.name != "nt" else ""
        if holder != me:  # a failed run in this notebook may still hold it
            raise UserError(f"--out {out} is in use by {holder or 'another run'}; stop it or "
                            "choose another folder") from error
    except (OSError, NotImplementedError):  # a file system without locks, or Windows: no writing
        pass
    return held


# ----- the start of a run ------------------------------------------------------------------------

# Flags that do not change what a run computes, so a resumed run may change them; for --epochs and
# --max_steps, only the resulting number of steps matters.
MAY_CHANGE = {"data", "out", "resume", "epochs", "max_steps", "max_minutes", "batch_size",
              "eval_every", "eval_tokens", "eval_prompts", "save_every", "keep", "log_every",
              "wandb", "device", "dtype", "dist_timeout", "compile", "no_compile"}
FOUND = {"dtype_used", "torch", "numpy", "order"}  # no flags; checkpoints of old versions lack them


def check_same_run(saved: dict, now: dict) -> list[str]:
    """What differs from the saved run, as lines to print. UserError if it must not differ."""
    changes = []
    for key, value in now.items():
        was = saved.get(key)
        may_change = key in MAY_CHANGE | FOUND
        if was == value or key == "resume" or (may_change and key not in saved):
            continue
        if key == "order":
            raise UserError(f"--resume: numpy {now['numpy']} would put the rows in another order "
                            f"than {saved['numpy']} in the run in --out; install that version")
        if key == "data_sha256":
            raise UserError("--resume: this is not the data of the run in --out; pass that run's "
                            "--data or choose another --out")
        if key == "steps":
            raise other_length(saved, now)
        if not may_change:
            raise UserError(f"--resume: {key} is {value}, but {was} in the run in --out; use the "
                            "run's own flags or another --out")
        changes.append(f"{key} is {value} (was {was})")
    return changes


def other_length(saved: dict, now: dict) -> UserError:
    """The error for a flag that makes a run longer or shorter: its schedule is fixed."""
    flag = "max_steps" if now["max_steps"] else "epochs"
    sizes = " and no --n_layer, --n_head, --n_embd" if now["init"] == "scratch" else ""
    return UserError(f"--resume: --{flag} {now[flag]} means {now['steps']} steps, but the learning "
                     f"rate of the run in --out is planned for {saved['steps']}; use --max_steps "
                     f"{saved['steps']} or, to train on, start a new run with --init "
                     f"{shlex.quote(now['out'])}, a new --out{sizes}")


def check_start(gpt, config, run, ranks, n_vocab: int) -> str:
    """The memory that a run needs, as text to print. UserError if data, model, machine, and ranks
    do not fit together. n_vocab: of the data's encoding."""
    check_fit(gpt.config, config, run.meta, n_vocab)
    check_ranks(run.identity, run.done)
    check_disk(run, gpt)
    return check_memory(gpt.config, config, ranks)


def check_fit(sizes, config, meta: dict, n_vocab: int) -> None:
    """UserError if the data's vocabulary or row length does not fit the model."""
    if meta["vocab_size"] != n_vocab:
        raise UserError(f"{config.data}/meta.json: damaged (vocab_size is {meta['vocab_size']}, "
                        f"but {meta['encoding']} has {n_vocab} ids); make the data again")
    if sizes.vocab_size != pad_vocab(n_vocab):
        raise UserError(f"--data {config.data} needs {pad_vocab(n_vocab)} ids ({meta['encoding']}, "
                        f"padded), but the model has {sizes.vocab_size}; make the data with the "
                        "model's encoding")
    if config.block_size > sizes.block_size:
        raise UserError(f"--block_size {config.block_size} is above the model's "
                        f"{sizes.block_size}; lower it")


def check_ranks(run: dict, done: int) -> None:
    """UserError if the ranks are about to train different runs; only their paths may differ."""
    data = hashlib.sha256("".join(run["data_sha256"]).encode()).hexdigest()[:12]
    everyone = gather_objects((socket.gethostname(), {"step": done} | run | {"data_sha256": data}))
    host, first = everyone[0]
    for rank, (other_host, theirs) in enumerate(everyone):
        for key, value in first.items():
            if key not in ("data", "out") and theirs.get(key) != value:
                raise UserError(f"rank {rank} on {other_host} has {key} {theirs.get(key)}, but "
                                f"rank 0 on {host} has {value}; use the same flags, data, and "
                                "packages everywhere, and for --resume an --out that all machines "
                                "share")


def checkpoint_bytes(model: torch.nn.Module) -> int:
    """Size of a checkpoint: float32 weights and Adam's two moments."""
    return 12 * sum(p.numel() for p in model.parameters())


def check_disk(run, model: torch.nn.Module) -> None:
    """UserError if rank 0's disk cannot take a checkpoint and the one that replaces it."""
    free = gather_objects(free_bytes(run.out))[0]
    need = checkpoint_bytes(model) * (1 if run.done else 2)
    if free < need:
        raise UserError(f"--out {run.out}: {free / 1e6:,.1f} MB free, but a checkpoint and its "
                        f"temporary copy need {need / 1e6:,.1f} MB; free some space")


def require_row(block_size: int) -> None:
    """UserError if a row of chats does not fit."""
    require_memory(TOKEN_BYTES * block_size, f"--block_size {block_size}")


def require_targets(rows, split: str):
    """The rows of an SFTDataset. UserError if none of their tokens is in the loss: the loss of no
    targets is 0, whatever the model says."""
    has_answers = rows.meta["splits"][split].get("trained_tokens", 1) > 0
    if has_answers and any((rows[i]["labels"] >= 0).any() for i in range(len(rows))):
        return rows
    raise UserError(f"--data {rows.shards.folder}: no token of the {len(rows.numbers)} examples of "
                    f"{split} in use is in the loss, because all their answers have weight 0; use "
                    "other data, or more of it (--max_examples, --block_size)")


def require_weight(percent: int) -> None:
    """UserError for an evaluation of no targets: its loss would be the lowest of all."""
    if percent == 0:
        raise UserError("no token of the validation rows that are evaluated is in the loss; raise "
                        "--eval_tokens to evaluate more of them")


def bytes_needed(sizes, config, ranks) -> float:
    """What a rank needs at its peak.

    Weights, gradients, and AdamW's two moments take 16 bytes a parameter. A layer keeps about
    17 * C values per token for the backward pass (2 bytes each in bfloat16); the loss holds a
    chunk of logits and its softmax, and so does evaluation.
    """
    L, C, at_once = sizes.n_layer, sizes.n_embd, config.batch_size * config.block_size  # tokens
    kept = at_once * L * 17 * C * (2 if ranks.dtype == "bfloat16" else 4)
    chunk = min(CHUNK_BYTES["cpu" if ranks.device.type == "cpu" else "cuda"],
                4 * at_once * sizes.vocab_size)
    rows = TOKEN_BYTES * config.block_size * config.rows_per_step / ranks.world_size
    return 16 * count_parameters(sizes) + kept + 2 * chunk + rows


def check_memory(sizes, config, ranks) -> str:
    """What a rank needs at its peak, as a line to print. UserError if it has less."""
    need = require_memory(
        bytes_needed(sizes, config, ranks),
        f"--batch_size {config.batch_size} and --rows_per_step {config.rows_per_step} of "
        f"--block_size {config.block_size} with n_layer {sizes.n_layer}, n_embd {sizes.n_embd}",
        ranks.device)
    return f"about {need} ({ranks.device.type})"


def check_request(lengths: list[int], block_size: int, max_new_tokens: int, temperature: float,
                  top_k: int | None, top_p: float | None) -> None:
    """UserError for invalid prompts or sampling settings, before they turn into NaNs."""
    if not lengths or min(lengths) == 0 or max(lengths) > block_size:
        raise UserError(f"prompts must have 1 to {block_size} ids, but these have {lengths}")
    if max_new_tokens < 0 or temperature < 0:
        raise UserError(f"max_new_tokens {max_new_tokens} and temperature {temperature} must not "
                        "be negative")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise UserError(f"top_k {top_k} must be at least 1, top_p {top_p} above 0 and at most 1")


# ----- numbers that are not finite ---------------------------------------------------------------


def check_step(metrics: dict, batches: list, rows, config, gpt, forward: Callable, ranks,
               decode: Callable, is_kept: bool) -> None:
    """UserError, the same on all ranks, if the loss or the gradient norm is not finite, or if
    is_kept (the weights will be saved or judged) and the new weights give no finite loss."""
    step, loss, norm = (metrics[key] for key in ("step", "loss", "grad_norm"))
    if not math.isfinite(loss + norm):
        named = bad_examples(step, batches, rows, config, gpt, forward, ranks, decode)
        raise UserError(f"step {step}: the loss is {loss}, the gradient norm {norm}; the weights "
                        f"are unchanged; {ADVICE}; not finite: "
                        f"{', '.join(named) or 'no single example on its own'}")
    if is_kept:
        loss = torch.tensor(loss_of(batches[0], gpt, forward, ranks), device=ranks.device)
        if not ranks.sum(loss).isfinite():
            raise UserError(f"step {step}: its weights are not saved, because they give a loss of "
                            f"{loss.item()}; {ADVICE}")


@torch.no_grad()
def loss_of(batch, gpt, forward: Callable, ranks) -> float:
    """The loss sum of a MicroBatch on this rank."""
    with ranks.autocast():
        return forward(gpt, *batch[:4]).item()


def bad_examples(step: int, batches: list, rows, config, gpt, forward: Callable, ranks,
                 decode: Callable) -> list[str]:
    """Name and beginning of up to three examples (in pretraining: rows) of this step, over all
    ranks, whose loss is not finite even on their own."""
    epoch, step = divmod(step - 1, math.ceil(len(rows) / config.rows_per_step))
    rows.set_epoch(epoch)  # fetching ahead may have moved it on
    found = []
    for m, batch in enumerate(batches):
        if math.isfinite(loss_of(batch, gpt, forward, ranks)):
            continue
        mine = m * ranks.world_size + ranks.rank  # which micro-batch of the step, over all ranks
        first = step * config.rows_per_step + mine * config.batch_size
        for b, column, alone in examples_of(batch):
            if (len(found) < 3 and first + b < len(rows)
                    and not math.isfinite(loss_of(alone, gpt, forward, ranks))):
                found.append(f"{rows.name_of(first + b, column)} "
                             f"{decode(alone.x[0, :24].tolist())[:24]!r}")
    return ranks.gather(found)[:3]


def examples_of(batch) -> Iterator[tuple]:
    """For each example of a MicroBatch: (its row, its first column, a MicroBatch of it alone)."""
    for b, x in enumerate(batch.x):
        segments = torch.zeros_like(x) if batch.segments is None else batch.segments[b]
        for segment in segments[segments >= 0].unique():
            columns = (segments == segment).nonzero()[:, 0]
            x, y, weights = (t if t is None else t[b, columns][None] for t in batch[:3])
            yield b, int(columns[0]), batch._replace(x=x, y=y, weights=weights, segments=None)


def require_finite_state(where: str, model, optimizer: torch.optim.Optimizer) -> None:
    """UserError with the name of a weight or an optimizer state that is infinite or NaN."""
    names = {p: name for name, p in model.named_parameters()}
    state = ((f"{key} of {names[p]}", value) for p, values in optimizer.state.items()
             for key, value in values.items())
    for name, tensor in itertools.chain(model.named_parameters(), state):
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {name} holds a number that is not finite")
