"""Pretrain GPT-2 on shards of text, on a CPU, one GPU, or many.

    python train_gpt2.py --data data/mine --out out/base --device cpu --n_layer 4 --n_head 4 \\
        --n_embd 256 --block_size 256 --batch_size 8 --rows_per_step 16 --max_steps 300
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --data data/fineweb --out out/base

Expect a loss near ln(vocabulary size) at the start (10.8 for gpt2, 5.6 for bytes). Each step adds a
line to OUT/metrics.jsonl; OUT/step_000500 is a Hugging Face GPT-2 folder plus what --resume needs.

train_sft.py imports the loop, `train`, from here: importing this file has no side effects.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.utils.data import Dataset

from answer import save_model
from model import GPT, IGNORE_INDEX, GPTConfig
from nanosft import checks, fast
from nanosft.cli import run_cli
from nanosft.ranks import CPU, Ranks, setup_distributed
from nanosft.run import Run, RunFlags, new_checkpoint, read_state
from nanosft.shards import Shards
from nanosft.weights import check_model_size, pad_vocab
from tokenizer import get_encoding

# Source: GPT-3 (Brown et al. 2020), appendix B; the rest of its recipe is in Config
BETAS, EPS, MIN_LR_RATIO = (0.9, 0.95), 1e-8, 0.1


@dataclasses.dataclass
class Config(RunFlags):  # and --resume, --device, --compile, …: how it runs
    """Pretrain GPT-2. Defaults: 124M with the recipe of GPT-3 125M (table 2.1, appendix B)."""

    data: str
    """folder made by fineweb.py"""
    out: str
    """folder for checkpoints and metrics; must be new or empty, unless --resume"""
    init: str = "scratch"
    """scratch, gpt2 (-medium, -large, -xl), a hub id, a Hugging Face folder, or a nanosft run"""
    n_layer: Annotated[int | None, Ge(1)] = None
    """number of blocks, only with --init scratch; default: GPT-2 124M's 12"""
    n_head: Annotated[int | None, Ge(1)] = None
    """attention heads per block, only with --init scratch; default: 12"""
    n_embd: Annotated[int | None, Ge(1)] = None
    """C, width of the residual stream, only with --init scratch; default: 768"""
    block_size: Annotated[int, Ge(1)] = 1024
    """T, tokens per row"""
    batch_size: Annotated[int, Ge(1)] = 16
    """micro-batch size: rows per forward pass on each rank"""
    rows_per_step: Annotated[int, Ge(1)] = 512
    """rows per optimizer step, over all ranks"""
    epochs: Annotated[int, Ge(1)] = 1
    """passes over the data"""
    max_steps: Annotated[int | None, Ge(1)] = None
    """optimizer steps; overrides --epochs"""
    learning_rate: Annotated[float, Ge(0), Le(1)] = 6e-4
    """peak, reached at the end of the warm-up"""
    warmup_steps: Annotated[int, Ge(0)] = 715  # GPT-3's 375 M tokens, in steps of 2^19 tokens
    """steps of linear warm-up"""
    weight_decay: Annotated[float, Ge(0), Le(1)] = 0.1
    """AdamW's, on matrices only"""
    grad_clip: Annotated[float, Ge(0)] = 1.0
    """maximum gradient norm; 0: no clipping"""
    seed: Annotated[int, Ge(0)] = 0
    """of the initial weights and the order of the data"""
    eval_every: Annotated[int, Ge(0)] = 250
    """steps between evaluations; 0: only at the start and the end"""
    eval_tokens: Annotated[int, Ge(0)] = 1_048_576
    """evaluate on at most this many positions, in rows spread evenly over the validation split"""
    save_every: Annotated[int, Ge(0)] = 1000
    """steps between checkpoints; 0: only at the end"""


# ----- rows, and each rank's share of them -------------------------------------------------------


class MicroBatch(NamedTuple):
    """The rows of one forward pass on one rank. They stay on the CPU, so counting never forces a
    GPU sync; the model copies what it needs to its device."""

    x: Tensor  # (B, T) int64
    y: Tensor  # (B, T) int64, -100 where ignored
    weights: Tensor | None = None  # (B, T) float32; None: all 1
    segments: Tensor | None = None  # (B, T) int64; None: each row is one text
    n_tokens: int = 0  # non-padding positions of x

    def weight_percent(self) -> int:
        """Sum of the target weights in integer percent: the same in any order of summation."""
        is_trained = self.y != IGNORE_INDEX  # (B, T)
        if self.weights is None:
            return 100 * int(is_trained.sum())
        return int((self.weights[is_trained] * 100).round().sum(dtype=torch.float64))


class TokenRows(Dataset):
    """Row i of a split is its tokens i*T to i*T + T: T inputs and T targets, shifted by one.

    It has everything that `train` needs from a dataset; so does SFTDataset.
    """

    def __init__(self, data: str, split: str, block_size: int):
        self.shards, self.block_size = Shards(data, split, "text", block_size), block_size
        self.meta = self.shards.meta

    def set_epoch(self, epoch: int) -> None:
        """Every epoch reads the text in the same order."""

    def __len__(self) -> int:
        return (len(self.shards) - 1) // self.block_size

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x, y, _ = self.batch([i]).values()
        return {"input_ids": x[0], "labels": y[0]}

    def batch(self, indices: Sequence[int | None], multiple: int = 1) -> dict:
        """The fields of a MicroBatch, whose rows all have T tokens; None: all padding."""
        T = self.block_size
        x = torch.zeros(len(indices), T, dtype=torch.long)
        y = torch.full_like(x, IGNORE_INDEX)
        for b, i in enumerate(indices):
            if i is not None:
                ids = torch.from_numpy(self.shards[i * T : i * T + T + 1].astype(np.int64))
                x[b], y[b] = ids[:-1], ids[1:]
        return {"x": x, "y": y, "n_tokens": int((y != IGNORE_INDEX).sum())}

    def describe(self) -> str:
        """What the trainer prints before it starts."""
        return f"{len(self.shards):,} tokens of {self.meta['encoding']}, {len(self):,} rows"

    def name_of(self, i: int, column: int) -> str:
        """What an error calls the text at this position."""
        return f"row {i}"


def open_rows(config: Config, split: str) -> TokenRows:
    return TokenRows(config.data, split, config.block_size)


def steps_per_epoch(rows: Dataset, config: Config) -> int:
    return math.ceil(len(rows) / config.rows_per_step)


def make_batch(rows: Dataset, indices: Iterable[int], ranks: Ranks) -> MicroBatch:
    """Rows as one micro-batch; all padding for each index past the end."""
    batch = rows.batch([i if i < len(rows) else None for i in indices], ranks.length_multiple)
    return MicroBatch(**ranks.pin(batch))


def load_steps(rows: Dataset, config: Config, ranks: Ranks, done: int,
               ) -> Iterator[list[MicroBatch]]:
    """This rank's micro-batches of each step after `done` steps, indefinitely, epoch after epoch.

    Micro-batch m of a step is world_size * B consecutive rows, of which each rank takes B, so the
    rows of a step depend neither on the number of ranks nor on B. When an epoch's last step runs
    out of rows, filler rows keep all ranks in sync.
    """
    B, R = config.batch_size, config.rows_per_step  # R is a multiple of world_size * B: check_flags
    for global_step in itertools.count(done):
        epoch, step = divmod(global_step, steps_per_epoch(rows, config))  # step of the epoch
        rows.set_epoch(epoch)
        starts = range(step * R + ranks.rank * B, (step + 1) * R, B * ranks.world_size)
        yield [make_batch(rows, range(start, start + B), ranks) for start in starts]


def eval_batches(val: Dataset, config: Config, ranks: Ranks) -> Iterator[MicroBatch]:
    """This rank's share of --eval_tokens of the validation split, in evenly spaced rows: the middle
    row of each of n equal parts: in `bucket` the first rows are the shortest."""
    n = min(len(val), max(1, config.eval_tokens // config.block_size))
    mine = [(2 * i + 1) * len(val) // (2 * n) for i in range(ranks.rank, n, ranks.world_size)]
    mine += [len(val)] * (-len(mine) % config.batch_size)  # padding: the same shape in all batches
    for start in range(0, len(mine), config.batch_size):
        yield make_batch(val, mine[start : start + config.batch_size], ranks)


# ----- the optimizer step ------------------------------------------------------------------------


def get_lr(step: int, n_steps: int, config: Config) -> float:
    """Learning rate of step 0, 1, …: linear warm-up, cosine decay to MIN_LR_RATIO of the peak.

    The last warm-up step uses the peak, the last step of the run the minimum. A warm-up longer than
    the run is clipped to it, and then the run ends at the peak.
    """
    warmup = min(config.warmup_steps, n_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step + 1 - warmup) / (n_steps - warmup)  # (0, 1]
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (MIN_LR_RATIO + (1 - MIN_LR_RATIO) * cosine)


def make_optimizer(model: GPT, config: Config) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, not on biases or LayerNorm weights."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, config.learning_rate, betas=BETAS, eps=EPS, fused=True)


def forward_text(model, x, y, weights=None, segments=None) -> Tensor:
    """The loss sum of a pretraining micro-batch: every target has weight 1."""
    return model(x, y)


def count_step(micro_batches: list[MicroBatch], ranks: Ranks) -> Tensor:
    """(3,) int64 over all ranks: weight in percent, tokens, supervised tokens."""
    counts = torch.zeros(3, dtype=torch.long)
    for batch in micro_batches:
        trained = int((batch.y != IGNORE_INDEX).sum())
        counts += torch.tensor([batch.weight_percent(), batch.n_tokens, trained])
    return ranks.sum(counts.to(ranks.device, non_blocking=True))


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer,
               micro_batches: list[MicroBatch], lr: float, grad_clip: float, ranks: Ranks,
               forward: Callable = forward_text, counts: Tensor | None = None,
               meanwhile: Callable = lambda: None) -> dict[str, float]:
    """One optimizer step; its loss and gradient are means over the supervised tokens of all ranks.

    The mean is over the whole step, so its divisor must be known before the first backward pass:
    dividing each micro-batch by its own count would give tokens of short answers more weight.
    counts: what count_step returned for these micro-batches, if already known. meanwhile() runs
    while the device works: `train` loads and counts the next rows there.
    """
    counts = count_step(micro_batches, ranks) if counts is None else counts
    total_weight = torch.where(counts[0] > 0, counts[0] / 100, 1.0)  # 1 if nothing is supervised

    loss = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(micro_batches):
        is_last = i == len(micro_batches) - 1  # DDP all-reduces gradients only on this one
        with contextlib.nullcontext() if is_last or ranks.world_size == 1 else model.no_sync():
            with ranks.autocast():
                loss_sum = forward(model, batch.x, batch.y, batch.weights, batch.segments)
            # DDP averages gradients over the ranks; world_size turns the mean into a sum
            (loss_sum * ranks.world_size / total_weight).backward()
        loss += loss_sum.detach()
    loss = ranks.sum(loss) / total_weight

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    loss_and_norm = torch.stack([loss, norm])
    # Fused AdamW changes nothing where found_inf is 1 (torch.amp.GradScaler relies on it), so the
    # update need not wait until the host knows the loss; if it is not finite, `train` ends the run
    optimizer.found_inf = 1 - loss_and_norm.isfinite().all().float()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    meanwhile()
    loss, norm = loss_and_norm.tolist()  # the host waits for the device here, and not before
    _, tokens, trained = counts.tolist()
    return {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens, "trained_tokens": trained}


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[MicroBatch], ranks: Ranks,
             forward: Callable = GPT.__call__) -> dict[str, float]:
    """val_loss in nats and val_accuracy per supervised token, over the batches of all ranks.

    model: the GPT itself, because ranks have different numbers of batches, which DDP cannot take.
    forward: as in `train`; by default model(x, y, weights, segments).
    """
    dtype = torch.float32 if ranks.device.type == "mps" else torch.float64  # mps has no float64
    percent, loss = 0, torch.zeros((), dtype=dtype, device=ranks.device)
    model.hits = hits = torch.zeros(2, dtype=torch.long, device=ranks.device)  # right, counted
    try:
        for batch in batches:
            with ranks.autocast():
                loss += forward(model, batch.x, batch.y, batch.weights, batch.segments)
            percent += batch.weight_percent()
    finally:
        model.hits = None
    percent = ranks.sum(torch.tensor(percent, device=ranks.device)).item()
    checks.require_weight(percent)
    loss, (right, counted) = ranks.sum(loss).item(), ranks.sum(hits).tolist()
    # a custom loss may not count hits
    accuracy = {"val_accuracy": right / counted} if counted else {}
    return {"val_loss": loss / (percent / 100), **accuracy}


# ----- a model and its optimizer, new or from a checkpoint ---------------------------------------


def make_model(config: Config, meta: dict) -> GPT:
    """The model that --init names, or a new one with the data's vocabulary."""
    n_vocab = meta["vocab_size"]
    if config.init == "scratch":
        torch.manual_seed(config.seed)
        sizes = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd")}
        sizes = {key: value for key, value in sizes.items() if value is not None}
        sizes = GPTConfig(config.block_size, pad_vocab(n_vocab), n_vocab=n_vocab, **sizes)
        check_model_size(sizes)
        return GPT(sizes)
    gpt = GPT.from_pretrained(config.init, get_encoding(meta["encoding"]))
    # the data may use ids that the model did not: GPT-2's 50257 grow to 50261 with chats
    gpt.config.n_vocab = max(gpt.config.n_vocab, n_vocab)
    return gpt


def save_checkpoint(out: str, step: int, model: GPT, optimizer: torch.optim.Optimizer, run: dict,
                    keep: int = 0, card: str = "", **settings) -> Path:
    """OUT/step_000500: a Hugging Face folder plus training_state.pt; see `new_checkpoint`.

    settings: `encoding` and `template`, if any, and extra keys of config.json.
    """
    with new_checkpoint(out, step, model, optimizer, run, keep, card) as folder:
        save_model(folder, model, **settings)  # weights, config, and tokenizer
    return Path(out) / f"step_{step:06d}"


def load_checkpoint(out: str, device: torch.device = CPU) -> tuple[GPT, dict]:
    """The model, on the CPU, and the training state of a run's latest checkpoint, for `device`."""
    folder, state = read_state(out, device)
    return GPT.from_pretrained(str(folder)), state


# ----- the loop ----------------------------------------------------------------------------------


def train(config: Config, open_rows: Callable, forward: Callable, judge: Callable) -> None:
    """The training loop of pretraining and SFT; the three functions are what differs.

    open_rows(config, split) -> a dataset like TokenRows; for "val" also None: no evaluation
    forward(model, x, y, weights, segments) -> loss_sum of a micro-batch
    judge(model, meta, val, config, ranks) -> metrics to add to an evaluation
    """
    # --- 1. ranks and rows ---
    ranks = setup_distributed(config.device, config.dist_timeout, config.dtype)
    checks.check_flags(config, ranks.world_size)
    rows = open_rows(config, "train")
    val = open_rows(config, "val") if "val" in rows.meta["splits"] else None
    n_steps = config.max_steps or config.epochs * steps_per_epoch(rows, config)
    run = Run(config, rows.meta, n_steps, ranks)  # what identifies it; its logs and its end

    # --- 2. model and optimizer, new or resumed ---
    if config.resume and run.newest:
        gpt, state = load_checkpoint(config.out, ranks.device)
        run.continue_from(state)
    else:
        gpt, state = make_model(config, rows.meta), None
    encoding = get_encoding(rows.meta["encoding"])
    memory = checks.check_start(gpt, config, run, ranks, encoding.n_vocab)
    fast.speed_up(gpt.to(ranks.device), config.is_compiled(ranks.device))
    optimizer = make_optimizer(gpt, config)
    if state:
        optimizer.load_state_dict(state.pop("optimizer"))  # pop: nothing keeps the file mapped
    model = ranks.wrap(gpt)

    # --- 3. the plan, and how the model is judged ---
    run.print_plan(gpt, rows, memory, steps_per_epoch(rows, config))
    if run.done >= n_steps:
        ranks.print(f"{config.out} is finished: step {run.done} of {n_steps}")
        return ranks.finish()

    def assess() -> dict[str, float]:
        metrics = judge(gpt, rows.meta, val, config, ranks)
        if val is not None:
            metrics = evaluate(gpt, eval_batches(val, config, ranks), ranks, forward) | metrics
        return metrics

    # --- 4. train ---
    ranks.print(f"start  {run.format(assess())}")
    ranks.stop.listen(config.max_minutes)
    counted = ((batches, count_step(batches, ranks))
               for batches in load_steps(rows, config, ranks, run.done))
    steps = fast.Prefetcher(counted, n_steps - run.done)
    clock = time.perf_counter()
    for step in run.steps_left():
        (batches, counts), lr = next(steps), get_lr(step - 1, n_steps, config)
        metrics = {"step": step} | train_step(model, optimizer, batches, lr, config.grad_clip,
                                              ranks, forward, counts, meanwhile=steps.fetch)
        stops = ranks.agree_to_stop()  # all at the same step
        metrics["dt"] = time.perf_counter() - clock
        metrics["tokens_per_s"] = metrics["tokens"] / metrics["dt"]
        evaluates = is_due(step, config.eval_every, n_steps)
        saves = stops or is_due(step, config.save_every, n_steps)
        # ends the run at a loss that is not finite, or before unusable weights are saved or judged
        checks.check_step(metrics, batches, rows, config, gpt, forward, ranks, encoding.decode,
                          is_kept=saves or evaluates)
        if evaluates:
            metrics |= assess()
        clock = time.perf_counter()  # dt includes loading, logging, and saving, but not evaluation
        run.write(metrics)
        if saves and ranks.is_main:
            save_checkpoint(config.out, step, gpt, optimizer, run.identity, config.keep,
                            run.card(metrics), **run.rendering)
        if stops:
            break
    run.finish(stopped=step < n_steps)


def is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


# ----- pretraining -------------------------------------------------------------------------------


def print_sample(model: GPT, meta: dict, val: Dataset | None, config: Config, ranks: Ranks) -> dict:
    """Pretraining's judge: print a short sample, generated from <|endoftext|>."""
    if ranks.is_main:
        encoding = get_encoding(meta["encoding"])
        eot = encoding.eot_token
        ids = model.generate([[eot]], 48, temperature=0.8, top_k=50, stop_ids=[eot])[0]
        ranks.print(f"sample {encoding.decode(ids)!r}")
    return {}


def main(config: Config) -> None:
    train(config, open_rows, forward_text, print_sample)


if __name__ == "__main__":
    run_cli(main, Config)
