"""Which pieces of which examples share a row: the four layouts of packing.py."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given, strategies as st

from nanosft.errors import UserError
from packing import LAYOUTS, Plan, nearest_subset, pack_lengths, plan_rows

WHOLE = ("fit", "pad", "bucket")  # the layouts that never cut an example
T = st.sampled_from([1, 2, 3, 7, 8, 13, 64])
SEED = st.none() | st.integers(0, 5)
EPOCH = st.integers(0, 3)


@st.composite
def lengths_that_fit(draw, block_size: int):
    """Up to 40 lengths from 1 to T + 1, the longest that fits in a row."""
    return draw(st.lists(st.integers(1, block_size + 1), max_size=40))


def first_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """The textbook's number of rows: the longest first, each into the first row with room."""
    room = []
    for length in sorted(lengths, reverse=True):
        row = next((i for i, space in enumerate(room) if space >= length), len(room))
        if row == len(room):
            room.append(capacity)
        room[row] -= length
    return len(room)


def tokens_of(rows: list) -> list[list[tuple[int, int]]]:
    """Each row as its tokens, (example, position in it)."""
    return [[(e, at) for e, start, stop in row for at in range(start, stop)] for row in rows]


# ----- by hand -----------------------------------------------------------------------------------


@pytest.mark.teach
def test_four_layouts_of_three_examples():
    """Examples aaaaa, bbb, cc and T = 5: a row holds six ids, of which the model reads five."""
    lengths = [5, 3, 2]
    plan = {layout: plan_rows(lengths, 5, layout, seed=None, rows_per_step=3) for layout in LAYOUTS}
    # aaaaab | bbbcc: the second row begins with the id that the first one ends with
    assert plan["stream"] == [[(0, 0, 5), (1, 0, 1)], [(1, 0, 3), (2, 0, 2)]]
    assert plan["fit"] == [[(0, 0, 5)], [(1, 0, 3), (2, 0, 2)]]
    assert plan["pad"] == [[(0, 0, 5)], [(1, 0, 3)], [(2, 0, 2)]]
    assert plan["bucket"] == [[(2, 0, 2)], [(1, 0, 3)], [(0, 0, 5)]]  # short to long


def test_long_example_continues_in_the_next_rows_of_a_stream():
    assert plan_rows([8], 3, "stream") == [[(0, 0, 4)], [(0, 3, 7)], [(0, 6, 8)]]


def test_fit_fills_two_rows_where_first_fit_decreasing_needs_three():
    """First-fit puts 4 and 4 together, which leaves 2 of 10 free; 4 + 3 + 3 leaves nothing."""
    lengths = [4, 4, 3, 3, 3, 3]
    assert first_fit_decreasing(lengths, 10) == 3  # 4 4 | 3 3 3 | 3
    slots, sizes = pack_lengths(np.array(lengths), 10)
    assert slots.tolist() == [4, 3, 3, 4, 3, 3]
    assert sizes.tolist() == [3, 3]


def test_nearest_subset_takes_as_many_copies_of_a_length_as_fit():
    assert nearest_subset({1: 50}, 50) == [1] * 50
    assert sorted(nearest_subset({7: 9, 5: 3, 4: 1}, 24)) == [5, 5, 7, 7]
    assert nearest_subset({7: 9}, 6) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_examples_are_no_rows_and_one_token_is_one_row(layout):
    assert plan_rows([], 4, layout) == []
    assert plan_rows([1], 4, layout) == [[(0, 0, 1)]]


# ----- what holds for any lengths ----------------------------------------------------------------


@given(st.data(), T, SEED, EPOCH, st.sampled_from(WHOLE), st.integers(1, 5))
def test_fit_pad_and_bucket_use_every_example_once_and_whole(data, block_size, seed, epoch, layout,
                                                             rows_per_step):
    lengths = data.draw(lengths_that_fit(block_size))
    rows = plan_rows(lengths, block_size, layout, seed, epoch, rows_per_step)
    pieces = sorted(piece for row in rows for piece in row)
    assert pieces == [(i, 0, length) for i, length in enumerate(lengths)]
    assert all(rows)  # a row without a piece would be a row of padding


@given(st.data(), T, SEED, EPOCH, st.sampled_from(LAYOUTS))
def test_row_never_holds_more_than_T_plus_one_ids(data, block_size, seed, epoch, layout):
    lengths = data.draw(lengths_that_fit(block_size))
    rows = plan_rows(lengths, block_size, layout, seed, epoch)
    assert all(1 <= len(row) <= block_size + 1 for row in tokens_of(rows))


@given(st.data(), T, st.sampled_from(LAYOUTS))
def test_number_of_rows_depends_on_neither_seed_nor_epoch(data, block_size, layout):
    """So the steps of a run and their learning rates are known before it starts."""
    lengths = data.draw(lengths_that_fit(block_size))
    orders = [(None, 0), (0, 0), (0, 1), (1, 0), (12345, 7)]
    counts = {len(plan_rows(lengths, block_size, layout, seed, epoch)) for seed, epoch in orders}
    assert len(counts) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_seed_and_epoch_decide_the_order(layout):
    lengths = [1 + i % 9 for i in range(60)]
    plan = plan_rows(lengths, 8, layout, seed=3, epoch=1)
    torch.manual_seed(1)
    np.random.seed(1)
    assert plan_rows(lengths, 8, layout, seed=3, epoch=1) == plan
    assert plan_rows(lengths, 8, layout, seed=3, epoch=2) != plan
    assert plan_rows(lengths, 8, layout, seed=4, epoch=1) != plan


def test_seed_none_keeps_the_order_of_the_data():
    lengths = [3, 1, 2, 3, 1, 2, 4]
    assert plan_rows(lengths, 3, "pad", None) == [[(i, 0, n)] for i, n in enumerate(lengths)]
    fit = plan_rows(lengths, 3, "fit", None)  # as far as whole rows allow it
    assert [row[0][0] for row in fit] == sorted(row[0][0] for row in fit)
    assert all(row == sorted(row) for row in fit)


# ----- stream ------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), T)
@example([4, 4], 4)  # 8 tokens: the last row is short
@example([5, 4], 4)  # 9 tokens: the last row is full
def test_stream_in_order_is_the_tokens_cut_every_T(lengths, block_size):
    """Row i is tokens[iT : iT + T + 1], as in pretraining, so neighboring rows share one id."""
    tokens = [(example, at) for example, n in enumerate(lengths) for at in range(n)]
    n_rows = max(1, math.ceil((len(tokens) - 1) / block_size))
    rows = plan_rows(lengths, block_size, "stream", seed=None)
    assert tokens_of(rows) == [tokens[i * block_size :][: block_size + 1] for i in range(n_rows)]
    assert all(start < stop for row in rows for _, start, stop in row)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), T, SEED, EPOCH)
def test_shuffled_stream_predicts_every_id_but_the_first_exactly_once(lengths, block_size, seed,
                                                                      epoch):
    rows = tokens_of(plan_rows(lengths, block_size, "stream", seed, epoch))
    targets = [token for row in rows for token in row[1:]]
    tokens = {(example, at) for example, n in enumerate(lengths) for at in range(n)}
    assert len(targets) == len(set(targets)) == len(tokens) - 1
    assert tokens - set(targets) == {rows[0][0]}


@given(st.lists(st.integers(1, 40), max_size=30), T, SEED)
def test_drop_last_keeps_the_full_rows_of_a_stream(lengths, block_size, seed):
    rows = plan_rows(lengths, block_size, "stream", seed, drop_last=True)
    assert len(rows) == max(0, (sum(lengths) - 1) // block_size)
    assert all(len(row) == block_size + 1 for row in tokens_of(rows))
    assert rows == plan_rows(lengths, block_size, "stream", seed)[: len(rows)]


# ----- bucket ------------------------------------------------------------------------------------


@given(st.data(), T, SEED, st.integers(1, 6))
def test_rows_of_a_bucket_step_are_neighbors_in_length(data, block_size, seed, rows_per_step):
    """In the order of their shortest rows no two steps overlap: each pads as little as it can."""
    lengths = data.draw(lengths_that_fit(block_size))
    rows = plan_rows(lengths, block_size, "bucket", seed, 0, rows_per_step)
    in_order = [lengths[row[0][0]] for row in rows]
    steps = [in_order[i : i + rows_per_step] for i in range(0, len(in_order), rows_per_step)]
    steps.sort(key=lambda step: (min(step), max(step)))
    assert all(max(shorter) <= min(longer) for shorter, longer in itertools.pairwise(steps))


def test_bucket_steps_are_shuffled_so_training_does_not_go_from_short_to_long():
    lengths = list(range(1, 65))
    rows = plan_rows(lengths, 64, "bucket", seed=0, rows_per_step=4)
    first_of_step = [lengths[row[0][0]] for row in rows[::4]]
    assert sorted(first_of_step) == list(range(1, 65, 4))
    assert first_of_step != sorted(first_of_step)


# ----- fit ---------------------------------------------------------------------------------------


def test_fit_needs_at_most_one_row_more_than_first_fit_decreasing_and_fewer_in_total():
    """On 500 tiny random data sets. Filling rows to the brim can use up short examples early."""
    random, differences = np.random.default_rng(0), []
    for _ in range(500):
        block_size = int(random.integers(2, 60))
        longest = random.integers(2, block_size + 2)
        lengths = random.integers(1, longest, random.integers(1, 80)).tolist()
        n_rows = len(plan_rows(lengths, block_size, "fit"))
        differences.append(n_rows - first_fit_decreasing(lengths, block_size + 1))
    assert max(differences) <= 1
    assert sum(differences) < 0


def test_fit_is_within_three_in_a_thousand_of_the_fewest_rows_that_could_hold_the_tokens():
    """20,000 lengths as chat data has them: log-normal, median 180 tokens, some at the limit."""
    block_size = 1024
    lengths = np.random.default_rng(0).lognormal(np.log(180), 0.8, 20_000).astype(int)
    lengths = np.clip(lengths, 8, block_size + 1)
    fewest = math.ceil(lengths.sum() / (block_size + 1))
    assert fewest <= len(plan_rows(lengths, block_size, "fit")) <= 1.003 * fewest


def test_fit_shuffles_examples_among_rows_and_rows_among_steps():
    """Otherwise examples would share a row in every epoch, and the longest would come first."""
    lengths = [8] * 20 + [4] * 40
    rows = [plan_rows(lengths, 7, "fit", 0, epoch) for epoch in (0, 1)]
    pairs = [{frozenset(row) for row in epoch if len(row) == 2} for epoch in rows]
    assert len(pairs[0]) == len(pairs[1]) == 20  # two examples of 4 ids in a row of 8
    assert len(pairs[0] & pairs[1]) < 10
    n_long = sum(len(row) == 1 for row in rows[0][:20])  # in the first half of the epoch
    assert 5 < n_long < 15


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planning_takes_at_most_40_bytes_an_example(layout):
    """Each rank plans for itself: 8 of them, for 100 million examples, 32 GB."""
    lengths = np.random.default_rng(0).integers(5, 500, 200_000, dtype=np.int32)
    tracemalloc.start()
    Plan(lengths, 1024, layout, 0, 0, 32)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * len(lengths) + 10_000  # what does not grow with them


# ----- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", WHOLE)
def test_example_longer_than_a_row_is_refused_with_both_numbers(layout):
    assert plan_rows([2, 5], 4, layout)  # T + 1 = 5 fits
    with pytest.raises(UserError, match=r"6 tokens .* block_size \+ 1 = 5; truncate or drop"):
        plan_rows([2, 6], 4, layout)


@pytest.mark.parametrize("arguments, message", [
    (([2], 4, "tetris"), r"unknown layout 'tetris'; choose from \['stream', 'fit'"),
    (([2], 0, "fit"), "--block_size 0 .* must be at least 1"),
    (([2], 4, "bucket", 0, 0, 0), "--rows_per_step 0 must be at least 1"),
    (([2, 0], 4, "stream"), "example 1 has no tokens"),
])
def test_impossible_plan_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        plan_rows(*arguments)
