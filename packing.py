"""Which pieces of which examples share a row of T = block_size tokens: the four layouts.

    stream  |aaaaabbb|bbccc...|            concatenated, cut where a row ends, as in pretraining
    fit     |aaaaa...|bbbbbccc|            whole examples, rows as full as possible
    pad     |aaaaa...|bbbbb...|ccc.....|   one example per row
    bucket  |aaaaa|bbbbb|  |ccc|           one example per row, similar lengths in the same step

Pure functions of the example lengths, which include the <|endoftext|>. A row takes up to T + 1 ids,
which become T inputs and, shifted by one, T targets.
"""

import collections
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from nanosft.errors import UserError, require_choice

Layout = Literal["stream", "fit", "pad", "bucket"]
LAYOUTS = get_args(Layout)


def plan_rows(lengths: Sequence[int], block_size: int, layout: str, seed: int | None = 0,
              epoch: int = 0, rows_per_step: int = 1, drop_last: bool = False,
              ) -> list[list[tuple[int, int, int]]]:
    """All rows of an epoch: lists of pieces (example, start, stop) of at most T + 1 ids in total.

    seed None keeps the order of the data. drop_last drops a short last row of `stream`.
    UserError: an example is too long for a layout that never cuts.

    >>> plan_rows([5, 4], block_size=4, layout="stream", seed=None)
    [[(0, 0, 5)], [(0, 4, 5), (1, 0, 4)]]
    """
    return list(Plan(lengths, block_size, layout, seed, epoch, rows_per_step, drop_last))


class Plan:
    """The rows of `plan_rows`, stored as a few integers per example; plan[i] is row i.

    Concatenate the examples in `order`: row i is tokens begins[i] to stops[i] of the result.
    """

    def __init__(self, lengths: Sequence[int], block_size: int, layout: str, seed: int | None = 0,
                 epoch: int = 0, rows_per_step: int = 1, drop_last: bool = False):
        self.lengths = np.asarray(lengths, dtype=np.int32)
        check_plan(self.lengths, block_size, layout, rows_per_step)
        n = len(self.lengths)
        rng = None if seed is None else np.random.default_rng([seed, epoch])
        order = (np.arange(n) if rng is None else rng.permutation(n)).astype(np.int32)
        sizes = np.ones(n, np.int8)  # the number of examples in each row
        if layout == "fit":
            order, sizes = fit(self.lengths, order, block_size + 1, rng)
        elif layout == "bucket":
            order = bucket(self.lengths, order, rows_per_step, rng)
        self.order, self.ends = order, np.cumsum(self.lengths[order], dtype=np.int64)  # (n,) each
        if layout == "stream":
            self.begins, self.stops = stream(int(self.lengths.sum(dtype=np.int64)),
                                             block_size, drop_last)
        else:
            cuts = np.append(0, self.ends[np.cumsum(sizes) - 1])  # (rows + 1,)
            self.begins, self.stops = cuts[:-1], cuts[1:]

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, i: int) -> list[tuple[int, int, int]]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        begin, stop = int(self.begins[i]), int(self.stops[i])
        pieces, k = [], int(np.searchsorted(self.ends, begin, side="right"))
        while begin < stop:
            example, end = int(self.order[k]), int(self.ends[k])
            offset = end - int(self.lengths[example])  # where the example begins
            pieces.append((example, begin - offset, min(end, stop) - offset))
            begin, k = end, k + 1
        return pieces


def check_plan(lengths: np.ndarray, block_size: int, layout: str, rows_per_step: int) -> None:
    require_choice("layout", layout, LAYOUTS)
    if block_size < 1 or rows_per_step < 1:
        raise UserError(f"--block_size {block_size} and --rows_per_step {rows_per_step} must be "
                        "at least 1")
    if lengths.min(initial=1) < 1:
        raise UserError(f"example {lengths.argmin()} has no tokens")
    longest = int(lengths.max(initial=0))
    if layout != "stream" and longest > block_size + 1:
        raise UserError(f"an example of {longest} tokens is longer than a row of block_size + 1 = "
                        f"{block_size + 1}; truncate or drop it first (--overlong)")


def stream(total: int, block_size: int, drop_last: bool) -> tuple[np.ndarray, np.ndarray]:
    """Where rows begin and stop in `total` tokens, (rows,) each: neighboring rows share an id.

    Nothing predicts a row's first token, so a row has at least two, unless there is only one token
    in total.
    """
    last = total - block_size if drop_last else min(total, max(total - 1, 1))
    begins = np.arange(0, last, block_size)
    return begins, np.minimum(begins + block_size + 1, total)


def bucket(lengths: np.ndarray, order: np.ndarray, rows_per_step: int, rng) -> np.ndarray:
    """Sort by length, cut into steps, shuffle the steps; a short step comes last."""
    order = order[np.argsort(lengths[order], kind="stable")]
    full = len(order) // rows_per_step * rows_per_step
    steps = order[:full].reshape(-1, rows_per_step)
    if rng is not None:
        steps = rng.permutation(steps)
    return np.concatenate([steps.reshape(-1), order[full:]])


def fit(lengths: np.ndarray, order: np.ndarray, capacity: int, rng) -> tuple:
    """Pack by length alone, assign examples to the packed lengths, shuffle rows and examples.

    Returns (the examples row by row, the number of examples in each row). Without rng, rows and
    examples keep the order of the data as far as packing allows.
    """
    slots, sizes = pack_lengths(lengths, capacity)
    packed = np.empty(len(slots), np.int32)  # (n,) examples, row by row
    # the k-th shortest slot takes the k-th shortest example
    packed[np.argsort(slots, kind="stable")] = order[np.argsort(lengths[order], kind="stable")]
    if rng is None:
        first = np.minimum.reduceat(packed, np.cumsum(sizes) - sizes)  # (rows,) first example
        place = np.empty(len(sizes), np.int32)  # (rows,) where each row goes
        place[np.argsort(first)] = np.arange(len(sizes))
        key = packed  # (n,) sorts the examples of a row
    else:
        place, key = rng.permutation(len(sizes)), rng.random(len(packed))
    row = np.repeat(place.astype(np.int32), sizes)  # (n,) the row of each example
    sizes[place] = sizes.copy()  # in the order of the rows
    return packed[np.lexsort((key, row))], sizes


def pack_lengths(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack lengths into bins of `capacity` -> (the lengths bin by bin, the number in each bin).

    Each bin takes the longest remaining length, then the remaining lengths whose sum is closest to
    the space left: a subset sum over the histogram of lengths.

    >>> pack_lengths(np.array([5, 4, 3, 3]), 8)
    (array([5, 3, 4, 3], dtype=int32), array([2, 2], dtype=int32))
    """
    values, counts = np.unique(lengths, return_counts=True)
    unpacked = dict(zip(values.tolist()[::-1], counts.tolist()[::-1]))  # longest first
    slots, sizes = [], []
    while unpacked:
        longest = next(iter(unpacked))
        unpacked[longest] -= 1
        filling = [longest, *nearest_subset(unpacked, capacity - longest)]
        unpacked[longest] += 1
        used = collections.Counter(filling)
        times = min(unpacked[length] // n for length, n in used.items())  # while they last
        for length, n in used.items():
            unpacked[length] -= n * times
            if not unpacked[length]:
                del unpacked[length]
        slots += filling * times
        sizes += [len(filling)] * times
    return np.array(slots, np.int32), np.array(sizes, np.int32)


def nearest_subset(counts: dict[int, int], space: int) -> list[int]:
    """The lengths from `counts` (length: count) with the largest sum that is at most `space`.

    Bit s of the integer `sums` says whether the lengths so far can add up to s.

    >>> nearest_subset({7: 9, 5: 3, 4: 1}, 24)
    [5, 5, 7, 7]
    """
    sums, mask, trail = 1, (1 << (space + 1)) - 1, []
    for length, n in counts.items():
        for _ in range(min(n, space // length)):
            trail.append((length, sums))  # one more of this length, and the sums without it
            sums |= (sums << length) & mask
        if sums >> space:
            break  # exactly full
    total, chosen = sums.bit_length() - 1, []
    for length, before in reversed(trail):
        if not (before >> total) & 1:  # the total needs this one
            chosen.append(length)
            total -= length
    return chosen
