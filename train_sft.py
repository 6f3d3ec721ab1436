"""Fine-tune a GPT-2 on chats: pretraining with one more row of data.

    python train_sft.py --data data/sft --init out/base --out out/sft --device cpu
    torchrun --standalone --nproc_per_node=8 train_sft.py --data data/sft --init gpt2 --out out/sft

Read train_gpt2.py first. What differs here is marked `# SFT:`. The rows come from sft_data.py; each
target has a loss weight, 0 in the prompt and 1 in the response; examples that share a row do not
attend to each other; and the model is judged by its answers. Everything else is `train`.
"""

import dataclasses
from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from answer import Assistant, answer_samples
from model import GPT
from nanosft.checks import require_targets
from nanosft.cli import run_cli
from nanosft.ranks import Ranks
from packing import Layout
from sft_data import Overlong, SFTDataset
from tokenizer import LossOn, get_encoding
from train_gpt2 import Config as PretrainingConfig, train  # the loop stays the same


@dataclasses.dataclass
class Config(PretrainingConfig):
    """Fine-tune a GPT-2 on the chats that sft_data.py made into shards."""

    data: str
    """folder made by sft_data.py"""
    init: str = "gpt2"  # SFT: start from a pretrained model
    """gpt2 (-medium, -large, -xl), a hub id, a Hugging Face folder, a nanosft run, or scratch"""
    batch_size: int = 4  # SFT: thousands of examples instead of billions of tokens
    rows_per_step: int = 32  # SFT: likewise
    epochs: int = 3  # SFT: few examples, so each is read more than once
    learning_rate: float = 5e-5  # SFT: 1/12 of pretraining's: do not overwrite what the model knows
    warmup_steps: int = 20  # SFT: a run has only hundreds of steps
    weight_decay: float = 0.0  # SFT: nothing pulls pretrained weights toward zero
    save_every: int = 500  # SFT: a shorter run
    layout: Layout = "fit"
    """how examples share rows; see packing.py"""
    isolate: bool = True
    """examples in one row do not attend to each other"""
    loss_on: LossOn = "response"
    """which targets are in the loss; all: prompts as well"""
    overlong: Overlong = "truncate"
    """what to do with an example longer than a row (T + 1 ids)"""
    max_examples: Annotated[int | None, Ge(1)] = None
    """train on only the first N examples; default: all"""
    eval_prompts: Annotated[int, Ge(0)] = 4
    """validation prompts answered at each evaluation; 0: none"""


def open_rows(config: Config, split: str) -> SFTDataset:
    """SFT: rows of chats add weights and segments; validation keeps the data's order."""
    n, is_train = config.max_examples, split == "train"
    rows = SFTDataset(config.data, split, config.block_size, config.layout,
                      seed=config.seed if is_train else None, loss_on=config.loss_on,
                      isolate=config.isolate, rows_per_step=config.rows_per_step,
                      overlong=config.overlong, examples=range(n) if n and is_train else None)
    return require_targets(rows, split)


def forward_sft(model, x: Tensor, y: Tensor, weights: Tensor,
                segments: Tensor | None = None) -> Tensor:
    """The loss sum of a micro-batch; all arguments (B, T), weights as fractions (1.0: in full).

    `model` may be a DDP wrapper and must be called as such: calling the GPT inside it would
    silently leave the ranks' gradients unsynchronized.
    """
    return model(x, y, weights, segments)  # SFT: weights and segments


def judge(model: GPT, meta: dict, val: SFTDataset | None, config: Config, ranks: Ranks) -> dict:
    """SFT: the model is also judged by its answers."""
    if val is None:
        return {}
    assistant = Assistant(model, get_encoding(meta["encoding"]), meta["template"])
    return answer_samples(assistant, val.prompts(config.eval_prompts), ranks)


def main(config: Config) -> None:
    train(config, open_rows, forward_sft, judge)


if __name__ == "__main__":
    run_cli(main, Config)
