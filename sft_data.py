"""Chats to shards of token ids and loss weights, and shards to rows for the trainer.

    python sft_data.py --source gsm8k.jsonl --encoding gpt2 --template chat --out data/sft
    python sft_data.py --show 2 --data data/sft --layout fit --block_size 256 [--html mask.html]

SFT shards are pretraining shards with one more row: uint16 (2, N), the ids and, below each, its
loss weight in percent (65535: tokenizer.KEPT_ANSWER). Each example ends with <|endoftext|>, which
occurs nowhere else, so the examples need no index. The shards do not depend on the layout: how
examples share rows of T tokens (`--layout`, see packing.py) is decided when training starts.
"""

import dataclasses
import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Literal, get_args

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import tokenizer
from answer import load_assistant, tokenize_prompt_and_output as tokenize_prompt_and_output
from model import IGNORE_INDEX, isolated_positions
from nanosft.checks import require_row
from nanosft.cli import run_cli, to_paste
from nanosft.errors import UserError, require_choice
from nanosft.forms import Reading, messages_of
from nanosft.report import Report, describe_rows
from nanosft.shards import Shards, ShardWriter, find_examples, new_folder, write_meta
from nanosft.sources import map_splits
from nanosft.viewer import Showing, View
from packing import LAYOUTS, Layout, Plan, plan_rows as plan_rows  # `as`: for other programs
from tokenizer import get_encoding, weights_in_effect

ROWS_PER_CHUNK = 256  # rows that a worker renders at a time; 64 to 1024 are equally fast
Overlong = Literal["drop", "truncate", "error"]


@dataclasses.dataclass
class Config(Showing, Reading):  # and --show and its flags; --subset, --columns, --ignore, …
    """Turn chat rows into shards for train_sft.py (--source), or look at them (--show)."""

    # the rows
    source: tuple[str, ...] = ()
    """.jsonl, .json, .csv, .parquet, … files, folders, patterns, or hub datasets as
    ID[:CONFIG[:SPLIT]]; SOURCE*N: N times"""
    val_source: tuple[str, ...] = ()
    """rows of the validation split; default: --val_fraction of --source"""
    val_fraction: Annotated[float, Ge(0), Lt(1)] = 0.05
    """fraction of the rows that becomes the validation split, picked by --seed; 0: none"""
    max_examples: Annotated[int | None, Ge(1)] = None
    """use at most this many examples of --source, and of --val_source; default: all"""
    on_bad_row: Literal["error", "skip"] = "error"
    """stop at a row that cannot be used, or leave it out and count it"""
    # the shards
    out: str | None = None
    """folder for the shards; must be new or empty"""
    encoding: tokenizer.EncodingName = "gpt2"
    """gpt2: GPT-2's BPE; bytes: one token per byte"""
    template: tokenizer.Template = "chat"
    """what stands around the messages; see tokenizer.py"""
    train_on: tokenizer.TrainOn = "all_turns"
    """which answers of a chat are in the loss"""
    shard_tokens: Annotated[int, Ge(1)] = 100_000_000
    """tokens per shard, at 4 bytes each"""
    workers: Annotated[int, Ge(1)] = os.cpu_count() or 1
    """processes that render rows"""
    # the packed rows of the report and of --show, as in train_sft.py
    layout: Layout = "fit"
    """how examples share rows, with --show; see packing.py"""
    block_size: Annotated[int, Ge(1)] = 1024
    """T, tokens per row"""
    isolate: bool = True
    """examples in one row do not attend to each other"""
    loss_on: tokenizer.LossOn = "response"
    """which targets are in the loss; all: prompts as well"""
    seed: Annotated[int, Ge(0)] = 0
    """of the validation split and of the order of the rows"""


# ----- shards to rows ----------------------------------------------------------------------------


def create_labels(ids: Sequence[int], weights: Sequence[int]) -> Tensor:
    """Next-token labels (..., n - 1) of ids (..., n): -100 wherever the target's weight is 0.

    With a prompt of P tokens the first label in the loss is labels[P - 1]: the last prompt token
    predicts it.

    >>> create_labels([258, 104, 259, 121, 260], [0, 0, 0, 100, 100])
    tensor([-100, -100,  121,  260])
    """
    ids, weights = torch.as_tensor(ids), torch.as_tensor(weights)
    return ids[..., 1:].long().masked_fill(weights[..., 1:] == 0, IGNORE_INDEX)


class SFTDataset(Dataset):
    """The rows of one epoch of a split: {"input_ids", "labels", "weights", "segments"}, each (T,).

    labels are already shifted, -100 where ignored; weights are float32 fractions of the labels;
    segments number the examples of the row from 0, padding is -1. With isolate=False a row is one
    text, segment 0. overlong: what to do with an example longer than a row (unused in `stream`,
    which cuts anywhere). examples: the numbers in the data of those to use; None: all.
    """

    def __init__(self, data: str, split: str, block_size: int, layout: str = "fit",
                 seed: int | None = 0, epoch: int = 0, loss_on: str = "response",
                 isolate: bool = True, drop_last: bool = False, *, rows_per_step: int = 1,
                 overlong: str = "truncate", examples: Iterable[int] | None = None):
        require_choice("loss_on", loss_on, get_args(tokenizer.LossOn))
        require_choice("overlong", overlong, get_args(Overlong))
        require_row(block_size)
        self.block_size, self.layout, self.seed = block_size, layout, seed
        self.loss_on, self.isolate, self.rows_per_step = loss_on, isolate, rows_per_step
        self.shards = Shards(data, split, "sft")
        self.meta = self.shards.meta
        if loss_on == "all" and self.meta["version"] == 1:
            raise UserError(f"--data {data} is of format version 1, which cannot tell what "
                            "--loss_on all covers; make the data again with sft_data.py")
        self.eot = get_encoding(self.meta["encoding"]).eot_token
        # by the number of an example in the data: where it begins, and its length
        self.starts, self.full_lengths = find_examples(self.shards, self.eot)
        n = len(self.starts)
        examples = range(n) if examples is None else itertools.islice(examples, n)
        # of the examples in use: their numbers, and their lengths in a row
        self.numbers = np.fromiter(examples, np.int64)
        self.lengths = self.full_lengths[self.numbers]
        self.n_truncated = self.n_dropped = 0
        if layout != "stream":
            self.drop_overlong(overlong)
        if not len(self.lengths):
            raise UserError(f"--data {data}: no example of {split} fits; raise --block_size")
        self.plan_of = functools.partial(Plan, self.lengths, block_size, layout, seed,
                                         rows_per_step=rows_per_step, drop_last=drop_last)
        self.epoch, self.plan = epoch, self.plan_of(epoch=epoch)

    def drop_overlong(self, overlong: str) -> None:
        """Apply --overlong; truncating also drops what would have no target left in the loss."""
        limit = self.block_size + 1
        long = self.numbers[self.lengths > limit]
        if len(long) and overlong == "error":
            raise UserError(f"example {long[0]} of {self.shards.folder} has "
                            f"{self.full_lengths[long[0]]} tokens, but a row takes {limit}; raise "
                            "--block_size or choose --overlong truncate")
        # from 1: the first id of an example is never a target
        dropped = [number for number in long if overlong == "drop" or not weights_in_effect(
            self.piece(number, 1, limit)[1], self.loss_on).any()]
        self.n_dropped, self.n_truncated = len(dropped), len(long) - len(dropped)
        self.numbers = self.numbers[~np.isin(self.numbers, dropped)]
        self.lengths = self.full_lengths[self.numbers].clip(max=limit)

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has its own order, and as many rows."""
        if epoch != self.epoch:
            self.plan = None  # freed before the next one is made
            self.epoch, self.plan = epoch, self.plan_of(epoch=epoch)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: rows[0] for name, rows in self.padded([i]).items()}

    def padded(self, indices: Sequence[int | None]) -> dict[str, Tensor]:
        """These rows, each tensor (B, T); None: a row that is all padding."""
        shape = len(indices), self.block_size
        rows = {"input_ids": torch.full(shape, self.eot),
                "labels": torch.full(shape, IGNORE_INDEX),
                "weights": torch.zeros(shape), "segments": torch.full(shape, -1)}
        for b, i in enumerate(indices):
            if i is not None:
                ids, weights, segments, _ = torch.from_numpy(self.tokens(i))  # (n + 1,) each
                n = len(ids) - 1
                rows["input_ids"][b, :n] = ids[:-1]
                rows["labels"][b, :n] = create_labels(ids, weights)
                rows["weights"][b, :n] = weights[1:] / 100
                rows["segments"][b, :n] = segments[:-1]
        return rows

    def piece(self, number: int, start: int, stop: int) -> np.ndarray:
        """Ids and weights as stored, uint16 (2, n), of an example's ids start to stop."""
        begin = int(self.starts[number])
        return self.shards[begin + start : begin + stop]

    def tokens(self, i: int) -> np.ndarray:
        """Row i before shifting and padding, int64 (4, n), n at most T + 1.

        In order: ids, loss weights in percent, segments, numbers of the examples in the data.
        """
        pieces = self.plan[i]  # of the k-th example in use, its ids start to stop
        numbers = [int(self.numbers[k]) for k, _, _ in pieces]
        ids, weights = np.concatenate(
            [self.piece(number, start, stop) for number, (_, start, stop) in zip(numbers, pieces)],
            axis=1, dtype=np.int64)  # (n,) each
        weights = weights_in_effect(weights, self.loss_on)
        lengths = np.array([stop - start for _, start, stop in pieces])
        if self.isolate or self.layout != "stream":
            weights[np.cumsum(lengths) - lengths] = 0  # never train across an example boundary
        segments = np.arange(len(pieces)) if self.isolate else np.zeros(len(pieces), np.int64)
        return np.stack([ids, weights, segments.repeat(lengths), np.repeat(numbers, lengths)])

    def name_of(self, i: int, column: int) -> str:
        """What an error calls the text at this position."""
        return f"example {self.tokens(i)[3][column]}"

    def batch(self, indices: Sequence[int | None], multiple: int = 1) -> dict:
        """The fields of a MicroBatch: x, y, weights, segments (B, T), and n_tokens.

        multiple: in `bucket`, T is a multiple of it, or block_size.
        """
        x, y, weights, segments = self.padded(indices).values()
        real = segments >= 0  # (B, T), False for padding
        if self.layout == "bucket":  # cut off the columns that are padding in every row
            T = max(1, int(real.any(0).sum()))
            T += -T % multiple  # slicing caps it at block_size
            x, y, weights, segments = (t[:, :T] for t in (x, y, weights, segments))
        if self.layout in ("pad", "bucket") or not self.isolate:
            segments = None  # each row is one right-padded text: the causal mask suffices
        return {"x": x, "y": y, "weights": weights, "segments": segments,
                "n_tokens": int(real.sum())}

    def prompts(self, n: int) -> list[tuple[list[int], list[int]]]:
        """(prompt, reference answer) of the first n examples, as ids, without the end token."""
        pairs = []
        for number in self.numbers[:n]:
            ids, stored = self.piece(number, 0, int(self.full_lengths[number]))
            is_answer = (weights_in_effect(stored, "response") > 0) & (ids < self.eot)  # (n,)
            first = int(is_answer.argmax())
            if first:  # a `{text}` row has no prompt
                stop = first + int(is_answer[first:].argmin())  # <|endoftext|> at the latest
                pairs.append((ids[:first].tolist(), ids[first:stop].tolist()))
        return pairs

    def describe(self) -> str:
        """What the trainer prints before it starts."""
        return describe_rows(self)


def iterate_batches(dataset: Dataset, batch_size: int, shuffle: bool) -> DataLoader:
    """For other programs: batches of rows. The global random state is left alone."""
    generator = torch.Generator().manual_seed(getattr(dataset, "seed", None) or 0)
    return DataLoader(dataset, batch_size, shuffle, generator=generator)


# ----- chats to shards ---------------------------------------------------------------------------


def example_of(row: dict, config: Config, counts: Counter) -> np.ndarray:
    """A row as an example, uint16 (2, n), as it is stored. UserError: it cannot be trained on."""
    encoding, messages = get_encoding(config.encoding), messages_of(row, config, counts)
    if isinstance(messages, str):
        example = tokenizer.render_text(encoding, messages)
    else:
        example = tokenizer.render_example(encoding, messages, config.template, config.train_on)
    return np.array(example, np.uint16)


def prepare(config: Config) -> None:
    """Turn --source into shards and meta.json, and print a report."""
    require_row(config.block_size)
    encoding, report = get_encoding(config.encoding), Report()
    names = ["train", "val"] if config.val_source or config.val_fraction else ["train"]
    with new_folder(config.out) as folder:
        writers = {name: ShardWriter(folder, name, config.shard_tokens) for name in names}
        # also rejects bad rows, picks the validation rows, and runs --workers processes
        examples = map_splits(example_of, config, report, ROWS_PER_CHUNK)
        bar = tqdm(examples, unit="ex", unit_scale=True, disable=None)  # None: TTY only
        for split, source, example in bar:
            writers[split].add(example)
            report.keep(split, source, example[0], weights_in_effect(example[1], "response"))
        splits = {name: writers[name].finish(**report.totals[name]) for name in names}
        report.check_splits(splits, config)
        write_meta(folder, {
            "kind": "sft", "encoding": config.encoding, "vocab_size": encoding.n_vocab,
            "template": config.template if report.has_chats else None, "train_on": config.train_on,
            "source": [*config.source, *config.val_source], "splits": splits})
    report.print(splits, row_openers(config, config.out, "train"))
    init = "gpt2" if config.encoding == "gpt2" else "scratch"
    print("next:", to_paste("train_sft.py", "--data", config.out, "--init", init,
                            "--out", "out/sft"))
    if init == "scratch":
        print("      (to start from a model pretrained by train_gpt2.py: --init out/base)")


def row_openers(config: Config, data: str, split: str) -> dict[str, Callable[..., SFTDataset]]:
    """{layout: a function that opens the rows of a split as the trainer does}."""
    seed = config.seed if split == "train" else None  # validation keeps the data's order
    return {layout: functools.partial(SFTDataset, data, split, config.block_size, layout, seed,
                                      loss_on=config.loss_on, isolate=config.isolate)
            for layout in LAYOUTS}


def show(config: Config) -> None:
    """--show N: the first N rows of --data as text or, with --html, as a page."""
    if not config.data:
        raise UserError("--show needs --data, a folder made with --source and --out")
    openers = row_openers(config, config.data, config.split)
    rows = openers[config.layout]()
    assistant = load_assistant(config.model) if config.model else None
    encoding = get_encoding(rows.meta["encoding"])
    config.display(View(rows, encoding, isolated_positions, assistant), openers)


def main(config: Config) -> None:
    if config.show:
        show(config)
    elif config.source and config.out:
        prepare(config)
    else:
        raise UserError("pass --source and --out to make shards, or --show and --data to view them")


if __name__ == "__main__":
    run_cli(main, Config)
