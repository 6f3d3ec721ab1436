"""Non-finite numbers: reported before they reach the weights, a checkpoint or a model."""

import itertools
import math
from collections.abc import Callable, Iterator

import torch

from nanosft.cli import UserError
from nanosft.weights import is_finite
from tokenizer import get_encoding

ADVICE = "lower --learning_rate, lengthen --warmup_steps or set --grad_clip 1"


def require_finite_state(where: str, model, optimizer: torch.optim.Optimizer) -> None:
    """UserError with the name of a weight or an optimizer state that is infinite or NaN."""
    names = {p: name for name, p in model.named_parameters()}
    state = ((f"{key} of {names[p]}", value) for p, values in optimizer.state.items()
             for key, value in values.items())
    for name, tensor in itertools.chain(model.named_parameters(), state):
        if not is_finite(tensor):
            raise UserError(f"{where}: {name} holds a number that is not finite")


@torch.no_grad()
def loss_of(batch, model, forward: Callable, ranks) -> float:
    """The loss sum of a MicroBatch on this rank."""
    with ranks.autocast():
        return forward(model, *batch[:4])[0].item()


def require_usable(step: int, batch, model, forward: Callable, ranks) -> None:
    """UserError on all ranks if the new weights give no finite loss on some rank's micro-batch."""
    loss = torch.tensor(loss_of(batch, model, forward, ranks), device=ranks.device)
    if not ranks.sum(loss).isfinite():
        raise UserError(f"step {step}: its weights are not saved, because they give a loss of "
                        f"{loss.item()}; {ADVICE}")


def bad_step(metrics: dict, batches: list, rows, config, model, forward: Callable, ranks,
             ) -> UserError:
    """For a step whose loss or gradient norm is not finite: the same error on all ranks.

    It names up to three examples (in pretraining: rows) whose loss is not finite even on their own.
    """
    per_epoch = math.ceil(len(rows) / config.rows_per_step)
    rows.epoch, step = divmod(metrics["step"] - 1, per_epoch)  # fetching ahead may have moved it on
    first = step * config.rows_per_step  # row of the epoch
    decode, found = get_encoding(rows.meta["encoding"]).decode, []
    for m, batch in enumerate(batches):
        if math.isfinite(loss_of(batch, model, forward, ranks)):
            continue
        for b, start, alone in examples_of(batch):
            at = first + (m * ranks.world_size + ranks.rank) * config.batch_size + b
            if (len(found) < 3 and at < len(rows)
                    and not math.isfinite(loss_of(alone, model, forward, ranks))):
                is_sft = hasattr(rows, "tokens")  # whose fourth line numbers the examples
                name = f"example {rows.tokens(at)[3][start]}" if is_sft else f"row {at}"
                found.append(f"{name} {decode(alone.x[0, :24].tolist())[:24]!r}")
    named = ", ".join(ranks.gather(found)[:3]) or "no example alone"
    return UserError(f"step {metrics['step']}: the loss is {metrics['loss']}, the gradient norm "
                     f"{metrics['grad_norm']}; the weights were left as they were; {ADVICE}; "
                     f"not finite: {named}")


def examples_of(batch) -> Iterator[tuple]:
    """For each example of a MicroBatch: (its row, its first column, a MicroBatch of it alone)."""
    for b, x in enumerate(batch.x):
        segments = torch.zeros_like(x) if batch.segments is None else batch.segments[b]
        for segment in segments[segments >= 0].unique():
            at = (segments == segment).nonzero()[:, 0]  # its columns
            x, y, weights = (t if t is None else t[b, at][None] for t in batch[:3])
            yield b, int(at[0]), batch._replace(x=x, y=y, weights=weights, segments=None)
