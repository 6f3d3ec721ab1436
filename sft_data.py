"""Chats to shards of token ids with a loss weight each, and the rows that are made of them.

    python sft_data.py --source gsm8k.jsonl --encoding gpt2 --template chat --out data/sft
    python sft_data.py --show 2 --data data/sft --layout fit --block_size 256 [--html mask.html]

SFT's shards are pretraining's with one more row: uint16 (2, N), the ids and below each its loss
weight in percent. Each example ends with <|endoftext|>, which occurs nowhere else. How examples are
laid out in rows of T tokens (`--layout`) is decided when training starts, from the same shards:

    stream  |aaaaabbb|bbcccccc|   concatenated, cut where a row ends, as in pretraining
    fit     |aaaaa...|bbbbbccc|   whole examples, rows as full as they can be
    pad     |aaaaa...|bbbbb...|   one example a row
    bucket  |aaaaa|bbbbb| |cc|    one example a row, rows of like length in the same step
"""

import collections
import copy
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fineweb import (
    NewFolder,
    ShardWriter,
    chunked,
    open_shards,
    ordered_map,
    read_meta,
    read_rows,
    run_cli,
    verify_shard,
    write_meta,
)
from model import IGNORE_INDEX
from tokenizer import get_encoding, render, render_text

LAYOUTS = ("stream", "fit", "pad", "bucket")
ROWS_A_CHUNK = 256  # that a worker renders at a time; 64 to 1024 measure the same


@dataclasses.dataclass
class Config:
    """Turn chat rows into shards for train_sft.py (--source), or look at them (--show)."""

    source: tuple[str, ...] = ()
    """.jsonl, .json or .parquet files, or one hub dataset id"""
    val_source: tuple[str, ...] = ()
    """rows of the validation split; without it --val_fraction of --source"""
    subset: str | None = None
    """the hub dataset's configuration"""
    out: str | None = None
    """folder for the shards; must not exist yet, or be empty"""
    encoding: Literal["gpt2", "bytes"] = "gpt2"
    template: Literal["chat", "alpaca", "raw"] = "chat"
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    val_fraction: float = 0.05
    """share of the rows that becomes the validation split, picked by --seed; 0: none"""
    max_examples: int | None = None
    """stop after this many examples"""
    on_bad_row: Literal["error", "skip"] = "error"
    shard_tokens: int = 100_000_000
    workers: int = os.cpu_count() or 1
    seed: int = 0
    block_size: int = 1024
    """T of the report's and the viewer's rows"""
    show: int = 0
    """show this many rows of --data, as the trainer sees them"""
    data: str | None = None
    split: str = "train"
    layout: Literal["stream", "fit", "pad", "bucket"] = "fit"
    isolate: bool = True
    loss_on: Literal["response", "all"] = "response"
    model: str | None = None
    """with --show: add what this model predicts at each place"""
    html: str | None = None
    """with --show: write a page instead of printing"""


# ----- rows in: what a row of a dataset says, as messages ----------------------------------------

# prompt key, response key; more forms (messages, conversations, text) in messages_of
FORMS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
)
KNOWN_FORMS = "; ".join(f"{{{p}, {r}}}" for p, r in FORMS) + "; {messages}; {conversations}; {text}"
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
                  "system": "system"}  # fmt: skip


def messages_of(row: dict) -> list[dict] | str:
    """A row of any known form as messages, or the string of a `{text}` row.

    >>> messages_of({"question": "2+2?", "answer": "4"})
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object, not a {type(row).__name__}")
    if "messages" in row:
        return row["messages"]
    if "conversations" in row:
        turns = row["conversations"]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError("`conversations` is no list of {from, value}")
        return [
            {
                "role": SHAREGPT_ROLES.get(str(turn.get("from")), turn.get("from")),
                "content": turn.get("value"),
            }
            for turn in turns
        ]
    for prompt, response in FORMS:
        if prompt in row and response in row:
            for key in (prompt, response):
                if not isinstance(row[key], str):
                    raise ValueError(f"`{key}` is {row[key]!r}, not a string")
            user = {"role": "user", "content": row[prompt]}
            if prompt == "instruction" and row.get("input"):
                user["input"] = row["input"]
            return [user, {"role": "assistant", "content": row[response]}]
    if isinstance(row.get("text"), str):
        if not row["text"]:
            raise ValueError("`text` is empty")
        return row["text"]
    raise ValueError(f"unknown form, keys {sorted(row)}; known are {KNOWN_FORMS}")


def render_rows(
    chunk: list[tuple[str, dict]], encoding_name: str, template: str, train_on: str
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """A worker's share: (2, n) uint16 of all examples, each one's length (0: bad), what was bad."""
    encoding = get_encoding(encoding_name)
    all_ids, all_weights, lengths, bad = [], [], [], []
    for place, row in chunk:
        try:
            messages = messages_of(row)
            if isinstance(messages, str):
                ids, weights = render_text(encoding, messages)
            else:
                ids, weights = render(encoding, messages, template, train_on)
        except ValueError as error:
            bad.append(f"{place}: {error}")
            lengths.append(0)
            continue
        all_ids += ids
        all_weights += weights
        lengths.append(len(ids))
    return np.array([all_ids, all_weights], dtype=np.uint16), np.array(lengths), bad


def read_examples(config: Config, sources: Iterable[str], bad: list[str]) -> Iterator[np.ndarray]:
    """(2, n) of each good example, in order; bad rows go to `bad`, or raise (--on_bad_row)."""
    rows = (row for source in sources for row in read_rows(source, config.subset))
    chunks = chunked(rows, lambda row: 1, ROWS_A_CHUNK)
    work = (config.encoding, config.template, config.train_on)
    for tokens, lengths, new_bad in ordered_map(render_rows, chunks, config.workers, *work):
        bad += new_bad
        if bad and config.on_bad_row == "error":
            raise ValueError(f"{bad[0]}  (--on_bad_row skip leaves such rows out)")
        end = 0
        for length in lengths[lengths > 0]:
            yield tokens[:, end : end + length]
            end += length


def mark_validation(examples: Iterator, fraction: float, seed: int) -> Iterator[tuple]:
    """(example, does it go to validation?): one, at random, of every 1/fraction.

    Of fewer than 1/fraction examples, but at least two, it is one as well.
    """
    rng, start = np.random.default_rng(seed), 0.0
    while fraction:
        size = int(start + 1 / fraction) - int(start)
        group, pick = list(itertools.islice(examples, size)), int(rng.integers(size))
        if start == 0 and 1 < len(group) < size:
            pick %= len(group)
        yield from ((example, i == pick) for i, example in enumerate(group))
        if len(group) < size:
            return
        start += 1 / fraction
    yield from ((example, False) for example in examples)


# ----- the planner: which pieces of which examples share a row -----------------------------------


class Plan:
    """Rows as a few numbers an example; plan[i] is a list of pieces (example, start, stop)."""

    def __init__(
        self, lengths, block_size, layout, seed=0, epoch=0, rows_per_step=1, drop_last=False
    ):
        if layout not in LAYOUTS:
            raise ValueError(f"--layout: unknown layout {layout!r}; choose from {list(LAYOUTS)}")
        if block_size < 1 or rows_per_step < 1:
            raise ValueError(
                f"--block_size {block_size} and rows_per_step {rows_per_step} start at 1"
            )
        self.lengths = np.asarray(lengths, dtype=np.int32)
        self.block_size, self.layout = block_size, layout
        if len(self.lengths) and self.lengths.min() < 1:
            raise ValueError("an example has no tokens")
        rng = None if seed is None else np.random.default_rng([seed, epoch])
        n = len(self.lengths)
        shuffled = np.arange(n) if rng is None else rng.permutation(n)
        if layout == "stream":
            self.order = shuffled.astype(np.int32)
            self.ends = np.cumsum(self.lengths[self.order], dtype=np.int64)
            total = int(self.ends[-1]) if n else 0
            rows = (total - 1) // block_size if drop_last else -(-(total - 1) // block_size)
            self.rows = max(rows, int(n > 0 and not drop_last))
            return
        longest = int(self.lengths.max(initial=0))
        if longest > block_size + 1:
            raise ValueError(
                f"an example of {longest} tokens is longer than a row of block_size + 1 = "
                f"{block_size + 1}; truncate or drop it first (--overlong)"
            )
        plan = {"fit": self._fit, "pad": self._pad, "bucket": self._bucket}[layout]
        order, sizes = plan(shuffled, rng, rows_per_step)
        self.order = order.astype(np.int32)
        self.ends = np.cumsum(sizes, dtype=np.int64)  # row r holds order[ends[r - 1] : ends[r]]
        self.rows = len(sizes)

    def _pad(self, shuffled, rng, rows_per_step):
        return shuffled, np.ones(len(shuffled), np.int64)

    def _bucket(self, shuffled, rng, rows_per_step):
        """Sorted by length, cut into steps, the steps shuffled; a short step comes last."""
        order = shuffled[np.argsort(self.lengths[shuffled], kind="stable")]
        full = len(order) // rows_per_step * rows_per_step
        steps = order[:full].reshape(-1, rows_per_step)
        if rng is not None:
            steps = rng.permutation(steps)
        order = np.concatenate([steps.reshape(-1), order[full:]])
        return order, np.ones(len(order), np.int64)

    def _fit(self, shuffled, rng, rows_per_step):
        """Fill rows by length alone, deal the examples out to those lengths, shuffle the rows."""
        slots, sizes = pack_lengths(self.lengths, self.block_size + 1)
        order = np.empty(len(slots), np.int64)
        order[np.argsort(slots, kind="stable")] = shuffled[
            np.argsort(self.lengths[shuffled], kind="stable")
        ]
        row = np.repeat(np.arange(len(sizes)), sizes)
        if rng is None:  # the data's order, as far as whole rows allow: by each row's first example
            first = np.full(len(sizes), len(order))
            np.minimum.at(first, row, order)
            rank, within = np.argsort(np.argsort(first)), order
        else:
            rank, within = rng.permutation(len(sizes)), rng.random(len(order))
        new_sizes = np.empty_like(sizes)
        new_sizes[rank] = sizes
        return order[np.lexsort((within, rank[row]))], new_sizes

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> list[tuple[int, int, int]]:
        if not 0 <= i < self.rows:
            raise IndexError(i)
        if self.layout != "stream":
            examples = self.order[self.ends[i - 1] if i else 0 : self.ends[i]]
            return [(int(e), 0, int(self.lengths[e])) for e in examples]
        begin = i * self.block_size
        stop = min(begin + self.block_size + 1, int(self.ends[-1]))
        pieces, at = [], int(np.searchsorted(self.ends, begin, side="right"))
        while begin < stop:
            example, end = int(self.order[at]), int(self.ends[at])
            offset = end - int(self.lengths[example])
            pieces.append((example, begin - offset, min(end, stop) - offset))
            begin, at = end, at + 1
        return pieces


def pack_lengths(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Bins of `capacity` for items of these lengths -> (lengths, bin after bin; items in each bin).

    A new bin takes the longest length left, then the lengths left that together come nearest to
    the space left: a subset sum over the histogram, as bits of one Python integer.
    Where first-fit-decreasing happens to need fewer bins (some tiny data sets), its bins are taken.

    >>> pack_lengths(np.array([5, 4, 3, 3]), 8)
    (array([5, 3, 4, 3]), array([2, 2]))
    """
    values, counts = np.unique(lengths, return_counts=True)
    left = dict(zip(values.tolist()[::-1], counts.tolist()[::-1]))  # longest first
    slots, sizes = [], []
    while left:
        longest = next(iter(left))
        left[longest] -= 1
        filling = [longest, *_subset_nearest(left, capacity - longest)]
        left[longest] += 1
        used = collections.Counter(filling)
        # The same filling again while it lasts, but not to the end: variety packs better.
        times = max(1, min(left[length] // n for length, n in used.items()) // 2)
        for length, n in used.items():
            left[length] -= n * times
            if not left[length]:
                del left[length]
        slots += filling * times
        sizes += [len(filling)] * times
    could_save = len(sizes) * capacity - lengths.sum(dtype=np.int64) >= capacity
    fewer = could_save and _first_fit_decreasing(values, counts, capacity, len(sizes) - 1)
    return fewer or (np.array(slots, dtype=np.int64), np.array(sizes, dtype=np.int64))


def _first_fit_decreasing(values, counts, capacity: int, n_bins: int) -> tuple | None:
    """The longest first, each into the first bin with room; None if `n_bins` do not suffice."""
    space, lengths, bins = np.full(n_bins, capacity), [], []
    for length, n in zip(values[::-1], counts[::-1]):
        takes = space // length  # bin after bin takes what it can, until n are placed
        takes = np.clip(n - (np.cumsum(takes) - takes), 0, takes)
        if takes.sum() < n:
            return None
        space -= takes * length
        lengths.append(np.full(n, length))
        bins.append(np.repeat(np.arange(n_bins), takes))
    bins = np.concatenate(bins)
    return np.concatenate(lengths)[np.argsort(bins, kind="stable")], np.bincount(bins)


def _subset_nearest(left: dict[int, int], space: int) -> list[int]:
    """Of `left` (length: how many), the lengths whose sum comes nearest to `space` from below."""
    sums, below, history = 1, (1 << (space + 1)) - 1, []  # bit s of sums: s can be reached
    for length, n in left.items():
        n = min(n, space // length)
        if n <= 0:
            continue
        history.append((length, n, sums))
        step = 1
        while n:  # n copies as 1 + 2 + 4 + … + rest: each sum of them is a choice of these parts
            step = min(step, n)
            sums |= sums << length * step & below
            n, step = n - step, step * 2
        if sums >> space:
            break  # filled to the brim
    total, chosen = sums.bit_length() - 1, []
    for length, n, before in reversed(history):
        copies = next(
            c for c in range(n + 1) if total >= c * length and before >> total - c * length & 1
        )
        total -= copies * length
        chosen += [length] * copies
    return chosen


def plan_rows(
    lengths: Sequence[int],
    block_size: int,
    layout: str,
    seed: int | None = 0,
    epoch: int = 0,
    rows_per_step: int = 1,
    drop_last: bool = False,
) -> list[list[tuple[int, int, int]]]:
    """All rows of an epoch: lists of pieces (example, start, stop), at most block_size + 1 ids.

    lengths count each example's <|endoftext|>. seed None keeps the order of the data. drop_last
    drops a short last row of `stream`. ValueError: an example too long for a whole-example layout.

    >>> plan_rows([5, 4], block_size=4, layout="stream", seed=None)
    [[(0, 0, 5)], [(0, 4, 5), (1, 0, 4)]]
    """
    plan = Plan(lengths, block_size, layout, seed, epoch, rows_per_step, drop_last)
    return [plan[i] for i in range(len(plan))]


# ----- rows for the trainer ----------------------------------------------------------------------


def create_labels(ids, weights) -> Tensor:
    """Next-token labels (..., n - 1) of ids (..., n): -100 wherever the target's weight is 0.

    >>> create_labels([258, 104, 259, 121, 260], [0, 0, 0, 100, 100])
    tensor([-100, -100,  121,  260])
    """
    ids, weights = torch.as_tensor(ids), torch.as_tensor(weights)
    return ids[..., 1:].long().masked_fill(weights[..., 1:] == 0, IGNORE_INDEX)


def tokenize_prompt_and_output(encoding, prompts: Sequence, outputs: Sequence) -> dict[str, Tensor]:
    """input_ids, labels and response_mask, each (B, longest - 1), of prompts followed by outputs.

    Prompts and outputs are strings, or ids where they hold special tokens. Each is encoded on its
    own, concatenated, right-padded with <|endoftext|>; labels are the ids one further on, and
    response_mask is True where a label is a token of the output.
    """
    if len(prompts) != len(outputs):
        raise ValueError(f"{len(prompts)} prompts and {len(outputs)} outputs; give one for each")

    def encode(text):
        return encoding.encode_ordinary(text) if isinstance(text, str) else list(text)

    pairs = [(encode(prompt), encode(output)) for prompt, output in zip(prompts, outputs)]
    longest = max((len(prompt) + len(output) for prompt, output in pairs), default=1)
    ids = torch.full((len(pairs), longest), encoding.eot_token)
    is_output = torch.zeros(len(pairs), longest, dtype=torch.bool)
    for row, (prompt, output) in enumerate(pairs):
        ids[row, : len(prompt) + len(output)] = torch.tensor(prompt + output, dtype=torch.long)
        is_output[row, len(prompt) : len(prompt) + len(output)] = True
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": is_output[:, 1:]}


class SFTDataset(Dataset):
    """The rows of one epoch of a split: {"input_ids", "labels", "weights", "segments"}, each (T,).

    labels are shifted already and -100 where ignored; weights are float32 fractions of the labels;
    segments number the examples of the row from 0, padding is -1. With isolate=False a row counts
    as one text, segment 0. overlong says what happens to an example longer than a row (`stream`
    cuts anywhere and needs none of it). examples: the numbers of those to use; None: all.
    """

    def __init__(
        self,
        data: str,
        split: str,
        block_size: int,
        layout: str = "fit",
        seed: int | None = 0,
        epoch: int = 0,
        loss_on: str = "response",
        isolate: bool = True,
        drop_last: bool = False,
        *,
        rows_per_step: int = 1,
        overlong: str = "truncate",
        examples: Iterable[int] | None = None,
    ):
        if loss_on not in ("response", "all"):
            raise ValueError(f"--loss_on: {loss_on!r} is neither 'response' nor 'all'")
        if overlong not in ("drop", "truncate", "error"):
            raise ValueError(f"--overlong: {overlong!r} is none of drop, truncate, error")
        self.data, self.split, self.block_size = data, split, block_size
        self.seed, self.epoch, self.loss_on, self.isolate = seed, epoch, loss_on, isolate
        self.drop_last, self.rows_per_step, self.overlong = drop_last, rows_per_step, overlong
        self.meta = read_meta(data, "sft")
        self.shards = open_shards(data, self.meta, split)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one rank a machine
            for shard in self.meta["splits"][split]["files"]:
                verify_shard(data, shard)
        self.eot = get_encoding(self.meta["encoding"]).eot_token
        self.shard_ends = np.cumsum([shard.shape[1] for shard in self.shards])
        self.starts, self.all_lengths = (
            self._boundaries()
        )  # of each example in the shards, in order
        if examples is not None:
            numbers = itertools.islice(examples, len(self.starts))
            numbers = np.array([e for e in numbers if e < len(self.starts)], dtype=np.int64)
            self.starts, self.all_lengths = self.starts[numbers], self.all_lengths[numbers]
        self._lay_out(layout)

    def _boundaries(self) -> tuple[np.ndarray, np.ndarray]:
        """An example begins where the one before ended: with <|endoftext|>."""
        ends, offset = [], 0
        for shard in self.shards:
            for at in range(0, shard.shape[1], 1 << 22):  # in parts, so that little is in memory
                ends.append(
                    np.flatnonzero(shard[0, at : at + (1 << 22)] == self.eot) + offset + at + 1
                )
            offset += shard.shape[1]
        ends = np.concatenate(ends)
        starts = np.concatenate([[0], ends[:-1]])
        return starts, (ends - starts).astype(np.int32)

    def _lay_out(self, layout: str) -> None:
        self.layout, self.lengths, self.n_truncated, self.n_dropped = layout, self.all_lengths, 0, 0
        self.kept = None  # numbers of the examples that are planned; None: all
        limit = self.block_size + 1
        long = np.flatnonzero(self.all_lengths > limit) if layout != "stream" else []
        if len(long):
            if self.overlong == "error":
                raise ValueError(
                    f"example {long[0]} of {self.data} has {self.all_lengths[long[0]]} tokens, a "
                    f"row {limit}; raise --block_size or choose --overlong truncate"
                )
            dropped = [e for e in long if self.overlong == "drop" or not self._trained(e, limit)]
            self.n_dropped, self.n_truncated = len(dropped), len(long) - len(dropped)
            self.kept = np.delete(np.arange(len(self.starts)), dropped)
            self.lengths = np.minimum(self.all_lengths[self.kept], limit)
        if not len(self.lengths):
            raise ValueError(
                f"--data {self.data}: no example of {self.split} fits; raise --block_size"
            )
        self.set_epoch(self.epoch)

    def _trained(self, example: int, limit: int) -> bool:
        """Is a target left within the first `limit` ids? The first id is never one."""
        return self.loss_on == "all" or bool(self._tokens(example, 1, limit)[1].any())

    def _tokens(self, example: int, start: int, stop: int) -> np.ndarray:
        """(2, stop - start) of an example's ids and weights, mapped."""
        begin = int(self.starts[example])
        shard = int(np.searchsorted(self.shard_ends, begin, side="right"))
        begin -= int(self.shard_ends[shard]) - self.shards[shard].shape[1]
        return self.shards[shard][:, begin + start : begin + stop]

    def with_layout(self, layout: str) -> "SFTDataset":
        """The same examples, laid out anew."""
        other = copy.copy(self)
        other._lay_out(layout)
        return other

    def set_epoch(self, epoch: int) -> None:
        """Plan the rows of this epoch; their number is the same in each."""
        self.epoch = epoch
        self.plan = Plan(self.lengths, self.block_size, self.layout, self.seed, epoch,
                         self.rows_per_step, self.drop_last)  # fmt: skip

    def verify(self, first_row: int, last_row: int) -> None:
        """The trainer asks before it reads; here all shards were verified when they were opened."""

    def __len__(self) -> int:
        return len(self.plan)

    def pieces(self, i: int) -> list[tuple[int, int, int]]:
        """Row i as (example's number among all, start, stop)."""
        pieces = self.plan[i]
        return pieces if self.kept is None else [(int(self.kept[e]), a, b) for e, a, b in pieces]

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        pieces = self.pieces(i)
        ids, weights = np.concatenate(
            [self._tokens(*piece) for piece in pieces], axis=1
        )  # (n,) each
        lengths = [stop - start for _, start, stop in pieces]
        segments = np.repeat(np.arange(len(pieces)), lengths)
        if self.loss_on == "all":
            weights = np.full_like(weights, 100)
        if self.isolate or self.layout != "stream":
            # nobody learns to predict the next example from the last
            begins = np.cumsum([0, *lengths[:-1]])[[start == 0 for _, start, _ in pieces]]
            weights[begins] = 0  # np.concatenate made a copy: the shard is not written
        if not self.isolate:
            segments[:] = 0
        n = len(ids) - 1  # row[:-1] is read, row[1:] predicted
        row = self.filler()
        row["input_ids"][:n] = torch.from_numpy(ids[:-1].astype(np.int64))
        row["labels"][:n] = create_labels(ids.astype(np.int64), weights.astype(np.int64))
        row["weights"][:n] = torch.from_numpy(weights[1:] / np.float32(100))
        row["segments"][:n] = torch.from_numpy(segments[:-1])
        return row

    def filler(self) -> dict[str, Tensor]:
        """A row that is all padding."""
        T = self.block_size
        return {
            "input_ids": torch.full((T,), self.eot),
            "labels": torch.full((T,), IGNORE_INDEX),
            "weights": torch.zeros(T),
            "segments": torch.full((T,), -1),
        }

    def fill(self) -> float:
        """The share of all places that is no padding: a row of n ids fills n - 1 of its T."""
        n_ids = int(self.lengths.sum(dtype=np.int64))
        if self.layout == "stream":
            n_ids = min(n_ids - 1, len(self) * self.block_size) + len(self)
        return (n_ids - len(self)) / (len(self) * self.block_size)


def iterate_batches(dataset: Dataset, batch_size: int, shuffle: bool) -> DataLoader:
    """Batches of rows, the last one maybe smaller. Its generator is its own: the order depends on
    nothing else, and the global random state is left alone."""
    generator = torch.Generator().manual_seed(getattr(dataset, "seed", None) or 0)
    return DataLoader(
        dataset, batch_size, shuffle, generator=generator, pin_memory=torch.cuda.is_available()
    )


# ----- the command: prepare ----------------------------------------------------------------------


def prepare(config: Config) -> None:
    """--source to shards, meta.json and a report."""
    if not 0 <= config.val_fraction < 1:
        raise ValueError(f"--val_fraction {config.val_fraction}: it must be at least 0 and below 1")
    limit = sys.maxsize if config.max_examples is None else config.max_examples
    if min(config.workers, config.shard_tokens, config.block_size, limit) < 1:
        raise ValueError("--workers, --shard_tokens, --block_size and --max_examples start at 1")
    encoding = get_encoding(config.encoding)
    bad, val_bad = [], []
    with NewFolder(config.out) as folder:
        fraction = 0 if config.val_source else config.val_fraction
        train = read_examples(config, config.source, bad)
        parts = [("train", train, fraction)]
        if config.val_source:
            val = read_examples(config, config.val_source, val_bad)
            parts.append(("val", val, 0))
        names = ["train", "val"] if config.val_source or fraction else ["train"]
        writers = {name: ShardWriter(folder, name, config.shard_tokens) for name in names}
        counts = {name: collections.Counter() for name in names}
        for name, examples, share in parts:
            marked = mark_validation(itertools.islice(examples, limit), share, config.seed)
            write_examples(marked, name, writers, counts)
        splits = {name: writers[name].finish(**counts[name]) for name in names}
        check_splits(config, splits, bad + val_bad)
        write_meta(
            folder,
            {
                "kind": "sft",
                "encoding": config.encoding,
                "vocab_size": encoding.n_vocab,
                "template": config.template,
                "train_on": config.train_on,
                "source": [*config.source, *config.val_source],
                "splits": splits,
            },
        )
    report(config, splits, bad + val_bad)


def write_examples(marked: Iterator[tuple], name: str, writers: dict, counts: dict) -> None:
    """Each example to its split."""
    from tqdm import tqdm

    bar = tqdm(desc=name, unit="ex", unit_scale=True, disable=None)  # None: only on a terminal
    for example, picked in marked:
        split = "val" if picked else name
        writers[split].add(example)
        counts[split].update(examples=1, trained_tokens=int(np.count_nonzero(example[1])))
        bar.update()
    bar.close()


def check_splits(config: Config, splits: dict, bad: list[str]) -> None:
    for name, split in splits.items():
        if not split["tokens"]:
            why = f"all {len(bad)} rows were bad, the first: {bad[0]}" if bad else "no rows"
            if name == "val" and not config.val_source:
                n = splits["train"].get("examples", 0)
                why = f"--val_fraction {config.val_fraction} of {n} rows"
            raise ValueError(f"the {name} split is left without rows ({why}); change --source, "
                             "--val_source or --val_fraction")  # fmt: skip


def report(config: Config, splits: dict, bad: list[str]) -> None:
    """What was read, how long it is, and what each layout makes of it."""
    kept = sum(split["examples"] for split in splits.values())
    print(f"read {kept + len(bad):,} rows: {kept:,} kept, {len(bad):,} rejected")
    for line in bad[:3]:
        print(f"  rejected {line}")
    for name, split in splits.items():
        share = split["trained_tokens"] / split["tokens"]
        print(f"{name:5}  {split['examples']:>9,} examples  {split['tokens']:>12,} tokens  "
              f"{share:6.1%} trained  {split['shards']} shard(s)")  # fmt: skip
    dataset = SFTDataset(config.out, "train", config.block_size, "stream", config.seed)
    levels = (0, 10, 50, 90, 99, 100)
    marks = np.percentile(dataset.all_lengths, levels)
    print("length  " + "  ".join(f"p{p} {mark:.0f}" for p, mark in zip(levels, marks)))
    print(f"rows of --block_size {config.block_size}:")
    print("  layout       rows    fill  examples/row  truncated  dropped")
    for layout in LAYOUTS:
        try:
            laid = dataset.with_layout(layout)
        except ValueError:  # the shards are good: another block size may fit
            print(f"  {layout:7} no example has a trained token within --block_size")
            continue
        per_row = len(laid.lengths) / len(laid)
        print(f"  {layout:7} {len(laid):>9,}  {laid.fill():6.1%}  {per_row:12.2f}"
              f"  {laid.n_truncated:>9,}  {laid.n_dropped:>7,}")  # fmt: skip
    print(f"next: torchrun --standalone --nproc_per_node=1 train_sft.py --data {config.out} "
          "--init gpt2 --out out/sft")  # fmt: skip


# ----- the command: look -------------------------------------------------------------------------


def main(config: Config) -> None:
    if config.show:
        if not config.data:
            raise ValueError("--show needs --data, a folder that --source made")
        from viewer import show

        show(config)
    elif config.source and config.out:
        prepare(config)
    else:
        raise ValueError("give --source and --out to make shards, or --show and --data to see them")


if __name__ == "__main__":
    run_cli(main, Config)
