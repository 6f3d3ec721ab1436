"""Which pieces of which examples share a row: `sft_data.plan_rows`, and what ranks make of it."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, strategies as st
from torch.utils.data import Dataset

from sft_data import LAYOUTS, _subset_nearest, pack_lengths, plan_rows
from train_gpt2 import RankRows, Run

WHOLE = ("fit", "pad", "bucket")  # the layouts that never cut an example
T = st.sampled_from([1, 2, 3, 7, 8, 13, 64])
SEED = st.none() | st.integers(0, 5)
EPOCH = st.integers(0, 3)


@st.composite
def lengths_that_fit(draw, block_size: int):
    """Up to 40 lengths from 1 to T + 1, the longest that fits a row."""
    return draw(st.lists(st.integers(1, block_size + 1), max_size=40))


def first_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """The textbook's number of bins: the longest first, each into the first bin with room."""
    room = []
    for length in sorted(lengths, reverse=True):
        at = next((i for i, space in enumerate(room) if space >= length), len(room))
        if at == len(room):
            room.append(capacity)
        room[at] -= length
    return len(room)


def pieces_of(rows: list) -> list[tuple[int, int, int]]:
    return [piece for row in rows for piece in row]


# ----- by hand -----------------------------------------------------------------------------------


def test_the_four_layouts_of_three_examples():
    """Examples aaaaa, bbb, cc and T = 5: a row holds six ids, and five are read."""
    lengths = [5, 3, 2]
    plan = {layout: plan_rows(lengths, 5, layout, seed=None, rows_per_step=3) for layout in LAYOUTS}
    # aaaaab | bbbcc: the second row begins with the id the first ended with
    assert plan["stream"] == [[(0, 0, 5), (1, 0, 1)], [(1, 0, 3), (2, 0, 2)]]
    assert plan["fit"] == [[(0, 0, 5)], [(1, 0, 3), (2, 0, 2)]]
    assert plan["pad"] == [[(0, 0, 5)], [(1, 0, 3)], [(2, 0, 2)]]
    assert plan["bucket"] == [[(2, 0, 2)], [(1, 0, 3)], [(0, 0, 5)]]  # short to long


def test_a_long_example_goes_on_in_the_next_row_of_a_stream():
    assert plan_rows([8], 3, "stream") == [[(0, 0, 4)], [(0, 3, 7)], [(0, 6, 8)]]


def test_fit_fills_two_rows_where_first_fit_decreasing_needs_three():
    """First-fit puts 4 and 4 together, which leaves 2 of 10; 4 + 3 + 3 leaves nothing."""
    lengths = [4, 4, 3, 3, 3, 3]
    assert first_fit_decreasing(lengths, 10) == 3  # 4 4 | 3 3 3 | 3
    slots, sizes = pack_lengths(np.array(lengths), 10)
    assert slots.tolist() == [4, 3, 3, 4, 3, 3]
    assert sizes.tolist() == [3, 3]


def test_a_row_is_filled_with_as_many_copies_of_a_length_as_it_takes():
    assert _subset_nearest({1: 50}, 50) == [1] * 50
    assert sorted(_subset_nearest({7: 9, 5: 3, 4: 1}, 24)) == [5, 5, 7, 7]
    assert _subset_nearest({7: 9}, 6) == []


def test_where_first_fit_decreasing_is_better_its_rows_are_taken():
    """Filling each row to the brim can use up the short examples too soon: 8 rows, not 7."""
    lengths = [2, 5, 6, 8, 15, 17, 20, 22, 22, 23, 23, 24, 25, 25, 26, 27, 27, 27, 28, 28]
    assert first_fit_decreasing(lengths, 61) == 7
    assert len(plan_rows(lengths, 60, "fit")) == 7


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_examples_are_no_rows_and_one_token_is_one_row(layout):
    assert plan_rows([], 4, layout) == []
    assert plan_rows([1], 4, layout) == [[(0, 0, 1)]]


# ----- what holds for any lengths ----------------------------------------------------------------


@given(st.data(), T, SEED, EPOCH, st.sampled_from(WHOLE), st.integers(1, 5))
def test_fit_pad_and_bucket_use_every_example_once_and_whole(
    data, block_size, seed, epoch, layout, rows_per_step
):
    lengths = data.draw(lengths_that_fit(block_size))
    rows = plan_rows(lengths, block_size, layout, seed, epoch, rows_per_step)
    assert sorted(pieces_of(rows)) == [(i, 0, length) for i, length in enumerate(lengths)]
    assert all(row for row in rows)  # a row without a piece would be a row of padding


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), T)
@example([4, 4], 4)  # total 8: (8 - 1) / 4 leaves a remainder
@example([5, 4], 4)  # total 9: the last row is full
def test_a_stream_in_order_is_the_tokens_cut_every_T(lengths, block_size):
    """Row i is tokens[iT : iT + T + 1]: pretraining's rule, so the rows overlap by one id."""
    tokens = [(example, at) for example, n in enumerate(lengths) for at in range(n)]
    rows = plan_rows(lengths, block_size, "stream", seed=None)
    spelled = [[(e, at) for e, a, b in row for at in range(a, b)] for row in rows]
    n_rows = max(1, math.ceil((len(tokens) - 1) / block_size))
    expected = [tokens[i * block_size :][: block_size + 1] for i in range(n_rows)]
    assert spelled == expected
    assert all(start < stop for row in rows for _, start, stop in row)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), T, SEED, EPOCH)
def test_a_shuffled_stream_predicts_every_id_but_the_first_exactly_once(
    lengths, block_size, seed, epoch
):
    rows = plan_rows(lengths, block_size, "stream", seed, epoch)
    spelled = [[(e, at) for e, a, b in row for at in range(a, b)] for row in rows]
    targets = [id_ for row in spelled for id_ in row[1:]]
    tokens = {(e, at) for e, n in enumerate(lengths) for at in range(n)}
    assert len(targets) == len(set(targets)) == len(tokens) - 1
    assert tokens - set(targets) == {spelled[0][0]}


@given(st.lists(st.integers(1, 40), max_size=30), T, SEED)
def test_drop_last_gives_the_classic_number_of_rows_and_only_full_ones(lengths, block_size, seed):
    rows = plan_rows(lengths, block_size, "stream", seed, drop_last=True)
    assert len(rows) == max(0, (sum(lengths) - 1) // block_size)
    assert all(sum(b - a for _, a, b in row) == block_size + 1 for row in rows)
    assert rows == plan_rows(lengths, block_size, "stream", seed)[: len(rows)]


@given(st.data(), T, st.sampled_from(LAYOUTS))
def test_the_number_of_rows_depends_on_neither_seed_nor_epoch(data, block_size, layout):
    """So the steps of a run and its learning rates are known before it starts."""
    lengths = data.draw(lengths_that_fit(block_size))
    orders = [(None, 0), (0, 0), (0, 1), (1, 0), (12345, 7)]
    counts = {len(plan_rows(lengths, block_size, layout, seed, epoch)) for seed, epoch in orders}
    assert len(counts) == 1


@given(st.data(), T, SEED, EPOCH, st.sampled_from(LAYOUTS))
def test_a_row_never_holds_more_than_T_plus_one_ids(data, block_size, seed, epoch, layout):
    lengths = data.draw(lengths_that_fit(block_size))
    for row in plan_rows(lengths, block_size, layout, seed, epoch):
        assert 1 <= sum(stop - start for _, start, stop in row) <= block_size + 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_seed_and_epoch_decide_the_order_and_nothing_else_does(layout):
    lengths = [1 + i % 9 for i in range(60)]
    plan = plan_rows(lengths, 8, layout, seed=3, epoch=1)
    torch.manual_seed(1)
    np.random.seed(1)
    assert plan_rows(lengths, 8, layout, seed=3, epoch=1) == plan
    assert plan_rows(lengths, 8, layout, seed=3, epoch=2) != plan
    assert plan_rows(lengths, 8, layout, seed=4, epoch=1) != plan


def test_seed_none_keeps_the_order_of_the_data():
    lengths = [3, 1, 2, 3, 1, 2, 4]
    for layout in ("stream", "pad"):
        assert [e for e, _, _ in pieces_of(plan_rows(lengths, 3, layout, None))][:2] == [0, 1]
    assert plan_rows(lengths, 3, "pad", None) == [[(i, 0, n)] for i, n in enumerate(lengths)]
    fit = plan_rows(lengths, 3, "fit", None)  # as far as whole rows allow it
    assert [row[0][0] for row in fit] == sorted(row[0][0] for row in fit)
    assert all(row == sorted(row) for row in fit)


# ----- bucket ------------------------------------------------------------------------------------


@given(st.data(), T, SEED, st.integers(1, 6))
def test_the_rows_of_a_bucket_step_are_neighbours_in_length(data, block_size, seed, rows_per_step):
    """Sorted by their shortest row, no two steps overlap: each step pads as little as can be."""
    lengths = data.draw(lengths_that_fit(block_size))
    rows = plan_rows(lengths, block_size, "bucket", seed, 0, rows_per_step)
    in_order = [lengths[row[0][0]] for row in rows]
    steps = [in_order[i : i + rows_per_step] for i in range(0, len(in_order), rows_per_step)]
    steps.sort(key=lambda step: (min(step), max(step)))
    for shorter, longer in itertools.pairwise(steps):
        assert max(shorter) <= min(longer)


def test_bucket_steps_come_shuffled_so_training_does_not_go_from_short_to_long():
    lengths = list(range(1, 65))
    rows = plan_rows(lengths, 64, "bucket", seed=0, rows_per_step=4)
    first_of_step = [lengths[row[0][0]] for row in rows[::4]]
    assert sorted(first_of_step) == list(range(1, 65, 4))
    assert first_of_step != sorted(first_of_step)


# ----- fit ---------------------------------------------------------------------------------------


@given(st.data(), T)
def test_fit_never_needs_more_rows_than_first_fit_decreasing(data, block_size):
    lengths = data.draw(lengths_that_fit(block_size))
    rows = plan_rows(lengths, block_size, "fit")
    assert len(rows) <= first_fit_decreasing(lengths, block_size + 1)


def test_on_500_random_data_sets_fit_needs_fewer_rows_than_first_fit_decreasing():
    rng, saved = np.random.default_rng(0), 0
    for _ in range(500):
        block_size = int(rng.integers(2, 60))
        lengths = rng.integers(1, rng.integers(2, block_size + 2), rng.integers(1, 80)).tolist()
        n_rows = len(plan_rows(lengths, block_size, "fit"))
        textbook = first_fit_decreasing(lengths, block_size + 1)
        assert n_rows <= textbook
        saved += textbook - n_rows
    assert saved > 0


def test_fit_is_within_three_in_a_thousand_of_the_fewest_rows_that_could_hold_the_tokens():
    """20,000 lengths as chat data has them: log-normal, median 180 tokens, some at the limit."""
    block_size = 1024
    lengths = np.random.default_rng(0).lognormal(np.log(180), 0.8, 20_000).astype(int)
    lengths = np.clip(lengths, 8, block_size + 1)
    n_rows = len(plan_rows(lengths, block_size, "fit"))
    fewest = math.ceil(lengths.sum() / (block_size + 1))
    assert fewest <= n_rows <= 1.003 * fewest


def test_fit_shuffles_examples_among_rows_from_epoch_to_epoch():
    """Else the same examples would share a step for ever."""
    lengths = [4] * 40
    pairs = [
        {frozenset(e for e, _, _ in row) for row in plan_rows(lengths, 7, "fit", 0, epoch)}
        for epoch in (0, 1)
    ]
    assert len(pairs[0]) == len(pairs[1]) == 20  # two in a row of eight
    assert len(pairs[0] & pairs[1]) < 10


# ----- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", WHOLE)
def test_an_example_longer_than_a_row_is_refused_with_both_numbers(layout):
    assert plan_rows([2, 5], 4, layout)  # T + 1 = 5 fits
    with pytest.raises(ValueError, match=r"6 tokens .* block_size \+ 1 = 5; truncate or drop"):
        plan_rows([2, 6], 4, layout)


def test_what_is_no_plan_is_refused():
    with pytest.raises(ValueError, match=r"unknown layout 'tetris'; choose from \['stream', 'fit'"):
        plan_rows([2], 4, "tetris")
    with pytest.raises(ValueError, match="--block_size 0"):
        plan_rows([2], 0, "fit")
    with pytest.raises(ValueError, match="rows_per_step 0"):
        plan_rows([2], 4, "bucket", rows_per_step=0)
    with pytest.raises(ValueError, match="an example has no tokens"):
        plan_rows([2, 0], 4, "stream")


# ----- ranks -------------------------------------------------------------------------------------


class Numbers(Dataset):
    """Rows that are their own number; -1 is filler."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        return i

    def filler(self) -> int:
        return -1


def global_batches(n_rows, world_size, batch_size, rows_per_step, first_step=0) -> list[list[int]]:
    """The rows of each step, put together from what each rank would load."""
    config = SimpleNamespace(batch_size=batch_size, rows_per_step=rows_per_step)
    runs = [Run(rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    ranks = [list(RankRows(Numbers(n_rows), config, run, first_step)) for run in runs]
    share = rows_per_step // world_size
    assert len({len(rows) for rows in ranks}) == 1  # else a rank would wait for ever
    assert all(len(rows) % share == 0 for rows in ranks)
    return [
        sorted(row for rows in ranks for row in rows[i : i + share] if row >= 0)
        for i in range(0, len(ranks[0]), share)
    ]


@given(st.integers(1, 70), st.sampled_from([8, 16]))
@example(17, 8)
def test_the_batch_of_a_step_is_the_same_on_1_2_and_4_ranks(n_rows, rows_per_step):
    steps = [list(range(n_rows))[i : i + rows_per_step] for i in range(0, n_rows, rows_per_step)]
    for world_size, batch_size in itertools.product((1, 2, 4), (1, 2)):
        assert global_batches(n_rows, world_size, batch_size, rows_per_step) == steps


def test_the_short_last_batch_is_filled_with_padding_not_with_repeats():
    """Ten rows, four a step, two ranks: step 2 has rows 8 and 9, and each rank still loads two."""
    config = SimpleNamespace(batch_size=1, rows_per_step=4)
    ranks = [list(RankRows(Numbers(10), config, Run(r, 2, torch.device("cpu")))) for r in (0, 1)]
    assert ranks == [[0, 2, 4, 6, 8, -1], [1, 3, 5, 7, 9, -1]]


@given(st.integers(1, 40), st.integers(0, 4))
def test_a_resumed_epoch_goes_on_with_the_rows_that_are_left(n_rows, first_step):
    first_step = min(first_step, math.ceil(n_rows / 8))
    for world_size in (1, 2, 4):
        whole = global_batches(n_rows, world_size, 2, 8)
        assert global_batches(n_rows, world_size, 2, 8, first_step) == whole[first_step:]
