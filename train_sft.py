"""Fine-tune a GPT-2 on chats: pretraining with one more row of data.

    python train_sft.py --data data/sft --init out/base --out out/sft --device cpu
    torchrun --standalone --nproc_per_node=8 train_sft.py --data data/sft --init gpt2 --out out/sft

Read train_gpt2.py first. What differs here is marked `# SFT:`: the rows come from sft_data.py, each
target has a loss weight (0 in the prompt, 1 in the response), and the examples that share a row do
not see each other. Model, optimiser, step, schedule, evaluation, checkpoints and loop are imported.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from torch import Tensor
from torch.utils.data import Dataset

from evaluate import answer_samples
from fineweb import run_cli
from model import IGNORE_INDEX
from sft_data import SFTDataset, iterate_batches
from tokenizer import get_encoding
from train_gpt2 import (  # this stays the same
    Config as PretrainingConfig,
    MicroBatch,
    check_config,
    eval_share,
    evaluate,
    finish,
    identity_of,
    load_steps,
    resume_or_make,
    save_checkpoint,
    setup_distributed,
    steps_per_epoch,
    train,
    wrap,
)


@dataclasses.dataclass
class Config(PretrainingConfig):
    """Fine-tune a GPT-2 on the chats that sft_data.py packed."""

    init: str = "gpt2"  # SFT: starts from a model that has read a lot
    batch_size: int = 4
    rows_per_step: int = 32
    epochs: int = 3
    learning_rate: float = 5e-5  # SFT: a tenth of pretraining's: install a behaviour, keep the rest
    warmup_steps: int = 20
    weight_decay: float = 0.0
    save_every: int = 500
    layout: Literal["stream", "fit", "pad", "bucket"] = "fit"
    """how examples share rows, see sft_data.py"""
    isolate: bool = True
    """examples in one row do not see each other"""
    loss_on: Literal["response", "all"] = "response"
    """all: prompts are trained, too"""
    overlong: Literal["drop", "truncate", "error"] = "truncate"
    """what to do with an example that is longer than a row"""
    max_examples: int | None = None
    """use only the first so many examples"""
    eval_prompts: int = 4
    """validation prompts that each evaluation answers; 0: none"""


def forward_sft(model, x, y, weights, segments=None) -> tuple[Tensor, Tensor]:
    """(loss_sum, weight_sum) of a micro-batch; all arguments (B, T), weights as fractions.

    Through the call of the model itself: going round DDP's wrapper would leave the ranks'
    gradients unsynchronised without any error.
    """
    weight_sum = weights[y != IGNORE_INDEX].sum()
    return model(x, y, weights, segments), weight_sum  # SFT: weights and segments


def sft_batches(config: Config):
    """What load_steps turns rows into micro-batches with."""
    # SFT: padding is on the right, so under a causal mask a lone example needs no other one
    separate = config.isolate and config.layout in ("stream", "fit")

    def batches(rows: Dataset, batch_size: int) -> Iterator[MicroBatch]:
        for batch in iterate_batches(rows, batch_size, shuffle=False):
            x, y, weights, segments = batch.values()
            real = segments >= 0  # (B, T)
            if config.layout == "bucket":  # columns that are padding in the whole micro-batch go
                T = max(1, int(real.any(0).sum()))
                x, y, weights, segments = (t[:, :T] for t in (x, y, weights, segments))
            yield MicroBatch(x, y, weights, segments if separate else None, int(real.sum()))

    return batches


def open_rows(config: Config, split: str) -> SFTDataset:
    n = config.max_examples
    if n is not None and n < 1:
        raise ValueError(f"--max_examples {n}: it must be at least 1")
    limit = range(n) if n and split == "train" else None
    return SFTDataset(
        config.data, split, config.block_size, config.layout,
        seed=config.seed if split == "train" else None, loss_on=config.loss_on,
        isolate=config.isolate, rows_per_step=config.rows_per_step, overlong=config.overlong,
        examples=limit,
    )  # fmt: skip


def main(config: Config) -> None:
    # --- 1. processes and device ---
    run = setup_distributed(config.device)
    check_config(config, run)

    # --- 2. data ---
    rows = open_rows(config, "train")  # SFT: weights and segments beside the ids
    encoding, template = get_encoding(rows.meta["encoding"]), rows.meta["template"]
    n_steps = config.max_steps or config.epochs * steps_per_epoch(rows, config)
    val = open_rows(config, "val") if "val" in rows.meta["splits"] else None
    batches = sft_batches(config)

    # --- 3. model and optimiser; a resumed run takes both up again ---
    keys = ("layout", "isolate", "loss_on", "overlong", "max_examples")  # SFT: decide the rows
    identity = identity_of(config, rows.meta, n_steps, keys)
    raw_model, optimizer, steps_done = resume_or_make(config, run, rows.meta, identity)
    model = wrap(raw_model, config, run)

    # --- 4. say what will happen ---
    split, per_epoch = rows.meta["splits"]["train"], steps_per_epoch(rows, config)
    examples = len(rows.lengths)
    share = split["trained_tokens"] / split["tokens"] if config.loss_on == "response" else 1
    n_params = sum(p.numel() for p in raw_model.parameters())
    run.print(f"model  {n_params:,} parameters from {config.init}, {raw_model.config}")
    run.print(f"data   {config.data}: {examples:,} examples, {rows.lengths.sum():,} tokens of "
              f"{encoding.name}, {share:.1%} trained ({rows.n_truncated} examples truncated, "
              f"{rows.n_dropped} dropped)")  # fmt: skip
    isolated = "isolated" if config.isolate else "not isolated"
    run.print(f"rows   {len(rows):,} of {config.block_size} tokens, layout {config.layout}, "
              f"{rows.fill():.1%} full, {isolated}")  # fmt: skip
    per_step = rows.lengths.sum() // per_epoch
    run.print(f"plan   {n_steps} steps of {config.rows_per_step} rows = about {per_step:,} tokens, "
              f"{examples / per_epoch:.0f} examples; {per_epoch} steps an epoch, "
              f"{run.world_size} process(es) on {run.device.type}")  # fmt: skip
    if steps_done >= n_steps:
        run.print(f"{config.out} is finished: step {steps_done} of {n_steps}")
        return finish(config, run)

    # --- 5. train ---
    def assess() -> dict:
        if val is None:
            return {}
        share = eval_share(val, config, run)
        result = evaluate(raw_model, batches(share, config.batch_size), run)
        # SFT: an assistant is judged by its answers, too
        return result | answer_samples(raw_model, encoding, template, val, config.eval_prompts, run)

    def save(step: int) -> None:
        if run.is_main:
            save_checkpoint(config.out, step, raw_model, optimizer, identity, config.keep,
                            encoding=encoding.name, template=template)  # fmt: skip

    run.print("start  " + "  ".join(f"{key} {value:.4f}" for key, value in assess().items()))
    steps = load_steps(rows, config, run, steps_done, batches)
    train(
        config, run, model, optimizer, steps, range(steps_done, n_steps), forward_sft, assess, save
    )

    # --- 6. what is next ---
    finish(config, run, f"python chat.py --model {config.out}",
           f"python evaluate.py --model {config.out} --data ROWS.jsonl")  # fmt: skip


if __name__ == "__main__":
    run_cli(main, Config)
