"""Chats to shards of token ids and loss weights, and shards to rows for the trainer.

    python sft_data.py --source gsm8k.jsonl --encoding gpt2 --template chat --out data/sft
    python sft_data.py --show 2 --data data/sft --layout fit --block_size 256 [--html mask.html]

SFT shards are pretraining shards with one more row: uint16 (2, N), the ids and, below each, its
loss weight in percent. Each example ends with <|endoftext|>, which occurs nowhere else, so the
examples need no index. The shards do not depend on the layout: how examples share rows of T tokens
(`--layout`, see packing.py) is decided when training starts.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model import IGNORE_INDEX
from nanosft import viewer
from nanosft.assistant import tokenize_prompt_and_output as tokenize_prompt_and_output  # exported
from nanosft.cli import UserError, require_at_least, require_choice, run_cli
from nanosft.forms import Counts, Reading, messages_of
from nanosft.memory import require_row
from nanosft.shards import Shards, ShardWriter, find_examples, loss_on_all, new_folder, write_meta
from nanosft.sources import Report, check_overlap, chunked, mark_val, ordered_map, read_sources
from packing import LAYOUTS, Plan, plan_rows as plan_rows  # exported
from tokenizer import get_encoding, render, render_text

ROWS_PER_CHUNK = 256  # rows that a worker renders at a time; 64 to 1024 are equally fast


@dataclasses.dataclass
class Config(Reading):  # and --subset, --columns, --ignore, --where, --repair
    """Turn chat rows into shards for train_sft.py (--source), or look at them (--show)."""

    source: tuple[str, ...] = ()
    """.jsonl, .json or .parquet files, or hub datasets as ID[:CONFIG[:SPLIT]]; SOURCE*N: N times"""
    val_source: tuple[str, ...] = ()
    """rows of the validation split; default: --val_fraction of --source"""
    out: str | None = None
    """folder for the shards; must be new or empty"""
    encoding: Literal["gpt2", "bytes"] = "gpt2"
    template: Literal["chat", "alpaca", "raw"] = "chat"
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    """which answers of a chat are trained"""
    val_fraction: float = 0.05
    """fraction of the rows that becomes the validation split, picked by --seed; 0: none"""
    max_examples: int | None = None
    """use at most this many examples of --source, and of --val_source; default: all"""
    on_bad_row: Literal["error", "skip"] = "error"
    shard_tokens: int = 100_000_000
    """tokens per shard, at 4 bytes each"""
    workers: int = os.cpu_count() or 1
    seed: int = 0
    block_size: int = 1024
    """T, tokens per row in the report and the viewer"""
    show: int = 0
    """show this many rows of --data, as the trainer sees them"""
    data: str | None = None
    """with --show: a folder made with --source and --out"""
    split: str = "train"
    """with --show, like the flags below: train or val"""
    layout: Literal["stream", "fit", "pad", "bucket"] = "fit"
    isolate: bool = True
    """examples in one row do not attend to each other"""
    loss_on: Literal["response", "all"] = "response"
    model: str | None = None
    """a checkpoint whose predictions to show at each position"""
    html: str | None = None
    """write an HTML page to this file instead of printing"""


# ----- shards to rows ----------------------------------------------------------------------------


def create_labels(ids: Sequence[int], weights: Sequence[int]) -> Tensor:
    """Next-token labels (..., n - 1) of ids (..., n): -100 wherever the target's weight is 0.

    With a prompt of P tokens the first trained label is labels[P - 1]: the last prompt token
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
    which cuts anywhere). examples: the indices of those to use; None: all.
    """

    def __init__(self, data: str, split: str, block_size: int, layout: str = "fit",
                 seed: int | None = 0, epoch: int = 0, loss_on: str = "response",
                 isolate: bool = True, drop_last: bool = False, *, rows_per_step: int = 1,
                 overlong: str = "truncate", examples: Iterable[int] | None = None):
        require_choice("layout", layout, LAYOUTS)
        require_choice("loss_on", loss_on, ("response", "all"))
        require_choice("overlong", overlong, ("drop", "truncate", "error"))
        self.data, self.split, self.block_size, self.layout = data, split, block_size, layout
        self.seed, self.epoch, self.loss_on, self.isolate = seed, epoch, loss_on, isolate
        self.drop_last, self.rows_per_step = drop_last, rows_per_step
        require_row(block_size)
        self.shards = Shards(data, split, "sft")
        self.meta = self.shards.meta
        self.eot = get_encoding(self.meta["encoding"]).eot_token
        # where each example of the data begins, and its length
        self.starts, self.full_lengths = find_examples(self.shards, self.eot)
        n = len(self.starts)
        self.indices = np.arange(n)  # of the examples in use
        if examples is not None:
            self.indices = np.fromiter(itertools.islice(examples, n), np.int64)
        self.n_truncated = self.n_dropped = 0
        if layout != "stream":
            self._drop_overlong(overlong)
        self.lengths = self.full_lengths[self.indices]
        if self.n_truncated:
            self.lengths = self.lengths.clip(max=block_size + 1)
        if not len(self.lengths):
            raise UserError(f"--data {data}: no example of {split} fits; raise --block_size")
        self._plan, self._planned_epoch = None, None

    def _drop_overlong(self, overlong: str) -> None:
        """Apply --overlong; truncating also drops what would be left without a trained target."""
        limit = self.block_size + 1
        long = self.indices[self.full_lengths[self.indices] > limit]
        if len(long) and overlong == "error":
            raise UserError(f"example {long[0]} of {self.data} has {self.full_lengths[long[0]]} "
                            f"tokens, but a row takes {limit}; raise --block_size or choose "
                            "--overlong truncate")
        dropped = [e for e in long if overlong == "drop" or not self._is_trained(e, limit)]
        self.n_dropped, self.n_truncated = len(dropped), len(long) - len(dropped)
        self.indices = self.indices[~np.isin(self.indices, dropped)]

    def _is_trained(self, example: int, limit: int) -> bool:
        """Is there a trained target among the first `limit` ids? The first id is never one."""
        begin = int(self.starts[example])
        return self.loss_on == "all" or bool(self.shards[begin + 1 : begin + limit][1].any())

    @property
    def plan(self) -> Plan:
        """The rows of `self.epoch`, planned on first use."""
        if self._planned_epoch != self.epoch:
            self._plan = Plan(self.lengths, self.block_size, self.layout, self.seed, self.epoch,
                              self.rows_per_step, self.drop_last)
            self._planned_epoch = self.epoch
        return self._plan

    def __len__(self) -> int:
        return len(self.plan)  # the same in every epoch

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids, weights, segments, _ = self.tokens(i)
        n, row = len(ids) - 1, self.filler()
        row["input_ids"][:n] = torch.from_numpy(ids[:-1])
        row["labels"][:n] = create_labels(ids, weights)
        row["weights"][:n] = torch.from_numpy(weights[1:].astype(np.float32) / np.float32(100))
        row["segments"][:n] = torch.from_numpy(segments[:-1])
        return row

    def tokens(self, i: int) -> np.ndarray:
        """Row i before shifting and padding, int64 (4, n), n at most T + 1.

        In order: ids, loss weights in percent, segments, indices of the examples in the data.
        """
        pieces = []
        for segment, (example, start, stop) in enumerate(self.plan[i]):
            index = self.indices[example]
            begin = int(self.starts[index])
            ids, weights = self.shards[begin + start : begin + stop].astype(np.int64)  # (n,) each
            if self.loss_on == "all":
                weights = loss_on_all(*self.shards[begin : begin + stop], self.eot)[start:]
            if self.isolate or self.layout != "stream":
                weights[0] = 0  # never train across an example boundary
            segment = segment if self.isolate else 0
            pieces.append([ids, weights, np.full_like(ids, segment), np.full_like(ids, index)])
        return np.concatenate(pieces, axis=1)

    def filler(self) -> dict[str, Tensor]:
        """A row that is all padding."""
        T = self.block_size
        return {
            "input_ids": torch.full((T,), self.eot),
            "labels": torch.full((T,), IGNORE_INDEX),
            "weights": torch.zeros(T),
            "segments": torch.full((T,), -1),
        }

    def collate(self, rows: list[dict[str, Tensor]]) -> dict:
        """Stack rows into the fields of a MicroBatch: x, y, weights, segments (B, T); n_tokens."""
        x, y, weights, segments = (torch.stack([row[key] for row in rows]) for key in rows[0])
        real = segments >= 0  # (B, T), False for padding
        if self.layout == "bucket":  # cut off the columns that are padding in every row
            T = max(1, int(real.any(0).sum()))
            x, y, weights, segments = (t[:, :T] for t in (x, y, weights, segments))
        if self.layout in ("pad", "bucket") or not self.isolate:
            segments = None  # each row is one right-padded text: the causal mask suffices
        return {"x": x, "y": y, "weights": weights, "segments": segments,
                "n_tokens": int(real.sum())}

    def prompts(self, n: int) -> list[tuple[list[int], list[int]]]:
        """(prompt, reference answer) of the first n examples, as ids, without the end token."""
        found = []
        for index in self.indices[:n]:
            begin = int(self.starts[index])
            ids, weights = self.shards[begin : begin + int(self.full_lengths[index])]
            is_trained = np.append(weights > 0, False)  # False ends the last span
            first = is_trained.argmax()
            if first:  # a `{text}` row has no prompt
                # the first unbroken span of trained ids
                answer = ids[first : first + is_trained[first:].argmin()].tolist()
                answer = answer[:-1] if answer[-1] >= self.eot else answer
                found.append((ids[:first].tolist(), answer))
        return found

    def fill(self) -> float:
        """The fraction of non-padding positions: a row of n ids fills n - 1 of its T."""
        n_ids = int(self.lengths.sum(dtype=np.int64))
        if self.layout == "stream":  # neighboring rows share an id
            n_ids = min(n_ids - 1, len(self) * self.block_size) + len(self)
        return (n_ids - len(self)) / (len(self) * self.block_size)

    def describe(self) -> str:
        """What the trainer prints before it starts."""
        return (f"{len(self.lengths):,} examples ({self.n_truncated} truncated, {self.n_dropped} "
                f"dropped), {self.lengths.sum():,} tokens of {self.meta['encoding']}; "
                f"{len(self):,} rows, layout {self.layout}, {self.fill():.1%} full, "
                f"{'' if self.isolate else 'not '}isolated")


def iterate_batches(dataset: Dataset, batch_size: int, shuffle: bool) -> DataLoader:
    """Batches of rows; the last one may be smaller. The global random state is left alone."""
    generator = torch.Generator().manual_seed(getattr(dataset, "seed", None) or 0)
    return DataLoader(dataset, batch_size, shuffle, generator=generator)


# ----- chats to shards ---------------------------------------------------------------------------


def render_rows(chunk: list[tuple[str, dict]], config: Config) -> tuple[list, list, Counts]:
    """A chunk of (place, row) -> [(example, source)] of the good rows, [(place, error)] of the bad
    ones, and the counts of `messages_of`. An example is uint16 (2, n)."""
    encoding, counts = get_encoding(config.encoding), Counts()
    examples, errors = [], []
    for place, row in chunk:
        try:
            messages = messages_of(row, config, counts)
            if isinstance(messages, str):
                ids_and_weights = render_text(encoding, messages)
            else:
                ids_and_weights = render(encoding, messages, config.template, config.train_on)
        except UserError as error:
            errors.append((place, str(error)))
        else:
            source = place.rsplit(" ", 2)[0]  # without "line 7"
            examples.append((np.array(ids_and_weights, np.uint16), source))
    return examples, errors, counts


def read_examples(config: Config, sources: Iterable[str], report: Report) -> Iterator[tuple]:
    """(example, source) of each row, in order; bad rows are counted, or raise (--on_bad_row)."""
    rows = read_sources(sources, config, report.counts)
    chunks = chunked(rows, lambda row: 1, ROWS_PER_CHUNK)
    for examples, errors, counts in ordered_map(render_rows, chunks, config.workers, config):
        report.reject(errors)
        if errors and config.on_bad_row == "error":
            raise UserError(f"{report.bad[0]}  (use --on_bad_row skip to leave out such rows)")
        report.counts.update(counts)
        yield from examples


def write_splits(config: Config, folder: Path, report: Report) -> dict[str, dict]:
    """Write the shards of --source and --val_source; returns {split: its entry in meta.json}."""
    fraction = 0 if config.val_source else config.val_fraction
    names = ["train", "val"] if config.val_source or fraction else ["train"]
    writers = {name: ShardWriter(folder, name, config.shard_tokens) for name in names}
    counts = {name: Counts() for name in names}
    for part, sources in (("train", config.source), ("val", config.val_source)):
        examples = itertools.islice(read_examples(config, sources, report), config.max_examples)
        marked = mark_val(examples, fraction if part == "train" else 0, config.seed)
        bar = tqdm(marked, part, unit="ex", unit_scale=True, disable=None)  # None: TTY only
        for (example, source), is_val in bar:
            split = "val" if is_val else part
            writers[split].add(example)
            trained = int(np.count_nonzero(example[1]))
            counts[split].update(examples=1, trained_tokens=trained)
            report.keep(split, source, example)
    return {name: writers[name].finish(**counts[name]) for name in names}


def prepare(config: Config) -> None:
    """Turn --source into shards and meta.json, and print a report."""
    if not 0 <= config.val_fraction < 1:
        raise UserError(f"--val_fraction {config.val_fraction} must be at least 0 and less than 1")
    require_row(config.block_size)
    check_overlap(config.source, config.val_source, config.subset)
    encoding = get_encoding(config.encoding)
    report = Report()
    with new_folder(config.out) as folder:
        splits = write_splits(config, folder, report)
        report.check_splits(splits, config)
        write_meta(folder, {
            "kind": "sft",
            "encoding": config.encoding,
            "vocab_size": encoding.n_vocab,
            "template": config.template,
            "train_on": config.train_on,
            "source": [*config.source, *config.val_source],
            "splits": splits,
        })
    viewer.print_report(splits, report, row_opener(config, config.out, "train"))
    print(f"next: torchrun --standalone --nproc_per_node=1 train_sft.py --data {config.out} "
          "--init gpt2 --out out/sft")


def row_opener(config: Config, data: str, split: str) -> Callable[..., SFTDataset]:
    """Returns open_rows(layout), which opens the rows of a split as the trainer does."""
    seed = config.seed if split == "train" else None  # validation keeps the data's order
    return functools.partial(SFTDataset, data, split, config.block_size, seed=seed,
                             loss_on=config.loss_on, isolate=config.isolate)


def show(config: Config) -> None:
    """--show N: the first N rows of --data as text or, with --html, as a page."""
    if config.show < 1 or not config.data:
        raise UserError(f"--show {config.show} must be at least 1, and needs --data, a folder made "
                        "with --source and --out")
    open_rows = row_opener(config, config.data, config.split)
    rows = open_rows(config.layout)
    assistant = viewer.load_assistant_for(config.model, rows) if config.model else None
    if config.html:
        viewer.write_page(config.html, config.show, rows, open_rows, assistant)
    else:
        viewer.print_rows(config.show, rows, assistant)


def main(config: Config) -> None:
    require_at_least(config, 1, "workers", "shard_tokens", "block_size", "max_examples")
    require_at_least(config, 0, "seed")
    if config.show:
        show(config)
    elif config.source and config.out:
        prepare(config)
    else:
        raise UserError("pass --source and --out to make shards, or --show and --data to view them")


if __name__ == "__main__":
    run_cli(main, Config)
