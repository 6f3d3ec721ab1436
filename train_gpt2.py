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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm import tqdm

from model import GPT, IGNORE_INDEX, GPTConfig
from nanosft import checkpoint, fast, finite, memory
from nanosft.cli import UserError, run_cli
from nanosft.hf_tokenizer import save_model
from nanosft.ranks import Ranks, setup_distributed
from nanosft.shards import Shards, read_meta
from nanosft.weights import newest_checkpoint, pad_vocab
from tokenizer import get_encoding

# Source: GPT-3 (Brown et al. 2020), appendix B; the rest of its recipe is in Config
BETAS, EPS, MIN_LR_RATIO = (0.9, 0.95), 1e-8, 0.1


@dataclasses.dataclass
class Config:
    """Pretrain GPT-2. Defaults: 124M with the recipe of GPT-3 125M (table 2.1, appendix B)."""

    data: str
    """folder made by fineweb.py"""
    out: str
    """folder for checkpoints and metrics; must be new or empty, unless --resume"""
    init: str = "scratch"
    """scratch, gpt2 (-medium, -large, -xl), a hub id, a Hugging Face folder, or a nanosft run"""
    resume: bool = False
    """continue from the latest checkpoint in --out, or start at step 0 if there is none"""
    n_layer: int | None = None
    """only with --init scratch, like --n_head and --n_embd; default: GPT-2 124M's 12, 12, 768"""
    n_head: int | None = None
    n_embd: int | None = None
    block_size: int = 1024
    """T, tokens per row"""
    batch_size: int = 16
    """micro-batch size: rows per forward pass on each rank"""
    rows_per_step: int = 512
    """rows per optimizer step, over all ranks"""
    epochs: int = 1
    max_steps: int | None = None
    """optimizer steps; overrides --epochs"""
    max_minutes: float | None = None
    """stop after this time with a checkpoint, from which --resume continues"""
    learning_rate: float = 6e-4
    """peak, reached at the end of the warm-up"""
    warmup_steps: int = 715
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    """maximum gradient norm; 0: no clipping"""
    seed: int = 0
    eval_every: int = 250
    """steps between evaluations; 0: only at the start and the end"""
    eval_tokens: int = 1_048_576
    """evaluate on at most this many positions, in rows spread evenly over the validation split"""
    save_every: int = 1000
    """steps between checkpoints; 0: only at the end"""
    keep: int = 0
    """keep only this many of the latest checkpoints, plus that with the lowest val_loss; 0: all"""
    log_every: int = 10
    """steps between printed lines (metrics.jsonl has every step)"""
    wandb: str | None = None
    """also log to this Weights & Biases project (pip install wandb)"""
    device: str = "auto"
    """auto, cuda, mps or cpu"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of matrix products; weights stay float32. auto: bfloat16 on GPUs that support it;
    CPUs without bfloat16 instructions emulate it, many times slower"""
    dist_timeout: float = 10
    """minutes that a rank waits for the others; must exceed the time to save a checkpoint"""
    compile: bool = False
    """torch.compile the blocks: slower to start, faster steps on a GPU"""


# ----- rows, and each rank's share of them -------------------------------------------------------


class MicroBatch(NamedTuple):
    """The rows of one forward pass on one rank. They stay on the CPU, where counting does not wait
    for a GPU; the model copies what it needs to its device."""

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
    """Row i of a split is its tokens i*T to i*T + T: T inputs and T targets, shifted by one."""

    epoch = 0  # set by the trainer but unused: every epoch reads the text in the same order

    def __init__(self, data: str, split: str, block_size: int):
        self.shards, self.block_size = Shards(data, split, "text"), block_size
        self.meta = self.shards.meta
        if not len(self):
            raise UserError(f"--data {data}: the {split} split has {len(self.shards)} tokens, but "
                            f"a row of --block_size {block_size} needs {block_size + 1}; lower it")

    def __len__(self) -> int:
        return (len(self.shards) - 1) // self.block_size

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        T = self.block_size
        ids = torch.from_numpy(self.shards[i * T : i * T + T + 1].astype(np.int64))  # (T + 1,)
        return {"input_ids": ids[:-1], "labels": ids[1:]}

    def filler(self) -> dict[str, Tensor]:
        """A row that is all padding."""
        x = torch.zeros(self.block_size, dtype=torch.long)
        return {"input_ids": x, "labels": torch.full_like(x, IGNORE_INDEX)}

    def collate(self, rows: list[dict[str, Tensor]]) -> dict:
        """Stack rows into the fields of a MicroBatch."""
        x, y = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
        return {"x": x, "y": y, "n_tokens": int((y != IGNORE_INDEX).sum())}

    def describe(self) -> str:
        """What the trainer prints before it starts."""
        return f"{len(self.shards):,} tokens of {self.meta['encoding']}, {len(self):,} rows"


def open_rows(config: Config, split: str) -> TokenRows | None:
    """The rows of a split, or None if the data has no such split."""
    if split not in read_meta(config.data, "text")["splits"]:
        return None
    return TokenRows(config.data, split, config.block_size)


def steps_per_epoch(rows: Dataset, config: Config) -> int:
    return math.ceil(len(rows) / config.rows_per_step)


def load_steps(rows: Dataset, config: Config, ranks: Ranks, done: int,
               ) -> Iterator[list[MicroBatch]]:
    """This rank's micro-batches of each step after `done` steps, indefinitely, epoch after epoch.

    Micro-batch m of a step is world_size * B consecutive rows, of which each rank takes B, so the
    rows of a step depend neither on the number of ranks nor on B. When an epoch's last step runs
    out of rows, filler rows keep all ranks in sync.
    """
    B, R = config.batch_size, config.rows_per_step  # R is a multiple of world_size * B: check_flags
    for global_step in itertools.count(done):
        rows.epoch, step = divmod(global_step, steps_per_epoch(rows, config))  # step of the epoch
        starts = range(step * R + ranks.rank * B, (step + 1) * R, B * ranks.world_size)
        micro_batches = []
        for start in starts:
            batch = [rows[i] if i < len(rows) else rows.filler() for i in range(start, start + B)]
            micro_batches.append(MicroBatch(**rows.collate(batch)))
        yield micro_batches


def eval_batches(val: Dataset, config: Config, ranks: Ranks) -> Iterator[MicroBatch]:
    """This rank's share of --eval_tokens of the validation split, in evenly spaced rows, because
    the first ones would be the shortest in `bucket`."""
    n = min(len(val), max(1, config.eval_tokens // config.block_size))
    mine = [(2 * i + 1) * len(val) // (2 * n) for i in range(ranks.rank, n, ranks.world_size)]
    for at in range(0, len(mine), config.batch_size):
        yield MicroBatch(**val.collate([val[i] for i in mine[at : at + config.batch_size]]))


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


def forward_text(model, x, y, weights=None, segments=None) -> tuple[Tensor, Tensor]:
    """(loss_sum, weight_sum) of a pretraining micro-batch: every target has weight 1."""
    return model(x, y), (y != IGNORE_INDEX).sum()


def count_step(micro_batches: list[MicroBatch], ranks: Ranks) -> Tensor:
    """(4,) int64 over all ranks: weight in percent, tokens, trained tokens, requests to stop."""
    counts = torch.tensor([0, 0, 0, ranks.stop.asked()])
    for batch in micro_batches:
        trained = int((batch.y != IGNORE_INDEX).sum())
        counts += torch.tensor([batch.weight_percent(), batch.n_tokens, trained, 0])
    return ranks.sum(fast.send(counts, ranks.device))


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer,
               micro_batches: list[MicroBatch], lr: float, grad_clip: float, ranks: Ranks,
               forward: Callable = forward_text,
               meanwhile: Callable = lambda: None) -> dict[str, float]:
    """One optimizer step; its loss and gradient are means over the trained tokens of all ranks.

    The mean is over the whole step, so its divisor must be known before the first backward pass:
    dividing each micro-batch by its own count would give tokens of short answers more weight.
    meanwhile() runs while the device works: `train` prepares the next rows there.
    """
    counts = count_step(micro_batches, ranks)
    total_weight = torch.where(counts[0] > 0, counts[0] / 100, 1.0)  # 1: nothing is trained

    loss = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(micro_batches):
        is_last = i == len(micro_batches) - 1  # DDP all-reduces gradients only on this one
        with contextlib.nullcontext() if is_last or ranks.world_size == 1 else model.no_sync():
            with ranks.autocast():
                loss_sum, _ = forward(model, batch.x, batch.y, batch.weights, batch.segments)
            # DDP averages gradients over the ranks; world_size turns the mean into a sum
            (loss_sum * ranks.world_size / total_weight).backward()
        loss += loss_sum.detach()
    loss = ranks.sum(loss) / total_weight

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    meanwhile()
    _, tokens, trained, ranks.stop.agreed = counts.tolist()  # the step's only wait for the device
    loss, norm = torch.stack([loss, norm]).tolist()
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(loss + norm):  # otherwise the weights stay and `train` stops the run
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens, "trained_tokens": trained}


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[MicroBatch], ranks: Ranks) -> dict[str, float]:
    """val_loss in nats and val_accuracy per trained token, over the batches of all ranks."""
    dtype = torch.float32 if ranks.device.type == "mps" else torch.float64  # mps has no float64
    sums = torch.zeros(4, dtype=dtype, device=ranks.device)  # loss, hits, weight, targets
    for x, y, weights, segments, _ in batches:
        is_trained = y != IGNORE_INDEX  # (B, T)
        weight = is_trained.sum() if weights is None else weights[is_trained].sum()
        with ranks.autocast():
            loss_and_hits = model.loss_and_hits(model.hidden(x, segments), y, weights)
        counts = fast.send(torch.stack([weight, is_trained.sum()]), ranks.device)
        sums += torch.cat([torch.stack(loss_and_hits), counts])
    loss, hits, weight, targets = ranks.sum(sums).tolist()
    return {"val_loss": loss / max(weight, 1e-9), "val_accuracy": hits / max(targets, 1)}


# ----- a model and its optimizer, new or from a checkpoint ---------------------------------------


def make_model(config: Config, meta: dict) -> GPT:
    """The model that --init names, or a new one with the data's vocabulary."""
    if config.init != "scratch":
        return GPT.from_pretrained(config.init)
    torch.manual_seed(config.seed)
    sizes = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd")}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    n_vocab = meta["vocab_size"]
    return GPT(GPTConfig(config.block_size, pad_vocab(n_vocab), n_vocab=n_vocab, **sizes))


def new_or_resumed(config: Config, ranks: Ranks, meta: dict, run: dict) -> tuple:
    """(model on its device, optimizer, steps done)"""
    resumed = config.resume and newest_checkpoint(config.out)
    if resumed:
        model, state = load_checkpoint(config.out)
        for change in checkpoint.check_same_run(state["run"], run):
            ranks.print(f"resume: {change}")
    else:
        model = make_model(config, meta)
    checkpoint.check_fit(model.config, config, meta)
    # the data may use ids that the loaded model did not: GPT-2's 50257 grow to 50261 with chats
    model.config.n_vocab = max(model.config.n_vocab, meta["vocab_size"])
    model.to(ranks.device)
    optimizer = make_optimizer(model, config)
    done = state["step"] if resumed else 0
    if resumed:
        optimizer.load_state_dict(state["optimizer"])
    checkpoint.check_ranks(run, done)
    for warning in checkpoint.check_disk(config, run, done, model):
        ranks.print(f"warning: {warning}")
    return model, optimizer, done


def save_checkpoint(out: str, step: int, model: GPT, optimizer: torch.optim.Optimizer, run: dict,
                    keep: int = 0, card: str = "", **settings) -> Path:
    """OUT/step_000500: a Hugging Face folder plus training_state.pt; complete or not at all.

    keep: how many checkpoints to leave in OUT besides the best; 0: all. card: the text of
    README.md. settings: `encoding` and `template`, if any, and extra keys of config.json.
    """
    state = {"version": checkpoint.VERSION, "step": step, "optimizer": optimizer.state_dict(),
             "run": run}
    finite.require_finite_state(f"step {step} is not saved", model, optimizer)
    with checkpoint.new_checkpoint(out, step, keep, checkpoint.bytes_of(model)) as folder:
        save_model(folder, model, **settings)  # weights, config and tokenizer
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
        torch.save(state, folder / "training_state.pt")
    return newest_checkpoint(out)


def load_checkpoint(out: str) -> tuple[GPT, dict]:
    """The model and the training state of the latest checkpoint of a run."""
    folder = newest_checkpoint(out)
    if folder is None:
        raise UserError(f"--resume: {out} has no checkpoint")
    return GPT.from_pretrained(str(folder)), checkpoint.read_state(folder)


def wrap(model: GPT, config: Config, ranks: Ranks) -> torch.nn.Module:
    """Compile the blocks if --compile; wrap the model in DDP if there are several ranks."""
    if config.compile:
        for block in model.transformer.h:
            block.compile()
    if ranks.world_size == 1:
        return model
    # without device_ids, DDP leaves the micro-batch on the CPU
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


# ----- the loop ----------------------------------------------------------------------------------


def train(config: Config, open_rows: Callable, forward: Callable, judge: Callable) -> None:
    """The training loop of pretraining and SFT; the three functions are what differs.

    open_rows(config, split) -> Dataset, or None if the data has no such split
    forward(model, x, y, weights, segments) -> (loss_sum, weight_sum) of a micro-batch
    judge(model, meta, val, config, ranks) -> metrics to add to an evaluation
    """
    # --- 1. ranks and rows ---
    ranks = setup_distributed(config.device, config.dist_timeout, config.dtype)
    checkpoint.check_flags(config, ranks.world_size)
    rows, val = open_rows(config, "train"), open_rows(config, "val")
    n_steps = config.max_steps or config.epochs * steps_per_epoch(rows, config)

    # --- 2. model and optimizer, new or resumed ---
    run = checkpoint.describe_run(config, rows.meta, n_steps)
    gpt, optimizer, done = new_or_resumed(config, ranks, rows.meta, run)
    model = wrap(gpt, config, ranks)  # what trains: gpt itself, or DDP around it

    # --- 3. print the plan ---
    n_params = sum(p.numel() for p in gpt.parameters())
    ranks.print(f"model  {n_params:,} parameters from {config.init}, {gpt.config}")
    ranks.print(f"memory {memory.require_training(gpt.config, config, ranks)}")
    ranks.print(f"data   {config.data}: {rows.describe()}")
    ranks.print(f"plan   {n_steps} steps of {config.rows_per_step} rows of {config.block_size} "
                f"tokens; {steps_per_epoch(rows, config)} steps per epoch; {ranks.world_size} "
                f"rank(s) on {ranks.device.type} in {ranks.dtype}")
    if done >= n_steps:
        ranks.print(f"{config.out} is finished: step {done} of {n_steps}")
        return ranks.finish()

    def assess() -> dict[str, float]:
        loss = {} if val is None else evaluate(gpt, eval_batches(val, config, ranks), ranks)
        return loss | judge(gpt, rows.meta, val, config, ranks)

    # --- 4. train ---
    ranks.print(f"start  {checkpoint.format_metrics(assess())}")
    ranks.stop.listen(config.max_minutes)
    log = checkpoint.Metrics(config, run, done, n_steps) if ranks.is_main else None
    # they select the checkpoint's tokenizer files; chat.py finds them in its config.json
    rendering = {key: rows.meta[key] for key in ("encoding", "template") if key in rows.meta}
    steps = fast.Prefetcher(load_steps(rows, config, ranks, done), n_steps - done)
    clock = time.perf_counter()
    for step in tqdm(range(done + 1, n_steps + 1), initial=done, total=n_steps, unit="step",
                     leave=False, disable=None if ranks.is_main else True):  # None: TTY only
        batches, lr = next(steps), get_lr(step - 1, n_steps, config)
        metrics = {"step": step} | train_step(model, optimizer, batches, lr, config.grad_clip,
                                              ranks, forward, meanwhile=steps.fetch)
        metrics["dt"] = time.perf_counter() - clock
        metrics["tokens_per_s"] = metrics["tokens"] / metrics["dt"]
        if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            raise finite.bad_step(metrics, batches, rows, config, gpt, forward, ranks)
        last = step if ranks.stop.agreed else n_steps
        saves = is_due(step, config.save_every, last)
        if saves or is_due(step, config.eval_every, n_steps):
            finite.require_usable(step, batches[0], gpt, forward, ranks)
        if is_due(step, config.eval_every, n_steps):
            metrics |= assess()
        clock = time.perf_counter()  # dt includes loading, logging and saving, but not evaluation
        if log:
            log.write(metrics)
        if log and saves:
            card = checkpoint.model_card(run, rows.meta, metrics)
            save_checkpoint(config.out, step, gpt, optimizer, run, config.keep, card, **rendering)
        if ranks.stop.agreed:
            break

    if log:
        log.close()
    checkpoint.finish(config.out, ranks, step < n_steps)


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
