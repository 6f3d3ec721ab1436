"""The training step: an exact mean over the trained tokens, however the work is divided."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_training import (
    ALONE,
    EOT,
    TINY,
    KeepGradients,
    assert_weights_close,
    fine_tune,
    flip_a_bit,
    gradients,
    metrics,
    pick,
    plain_loss_sum,
    pretrain,
    quietly,
    random_examples,
    sft_folder,
    step_cases,
    step_gradients,
    text_folder,
    tiny_model,
    two_ranks,
    weights_of,
)

import train_gpt2
import train_sft
from model import GPTConfig
from nanosft import fast
from nanosft.errors import UserError
from nanosft.ranks import choose_dtype
from nanosft.run import Run
from sft_data import SFTDataset
from train_gpt2 import (
    MicroBatch,
    Ranks,
    TokenRows,
    eval_batches,
    evaluate,
    forward_text,
    get_lr,
    load_steps,
    make_optimizer,
    train_step,
)
from train_sft import forward_sft

CPU = torch.device("cpu")
CASES = step_cases()


def assert_same(found, want, tolerance=1e-6):
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-5)


# ----- one place normalizes ----------------------------------------------------------------------


def textbook_step(batch):
    """(loss, gradients) from full logits: the weighted sum divided by the sum of the weights."""
    model = tiny_model()
    total = batch.weights[batch.y != -100].sum().item() or 1
    loss = plain_loss_sum(model, *batch[:4]) / total
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.teach
@pytest.mark.parametrize("case", CASES)
def test_step_is_the_same_for_any_micro_batch_size_and_number_of_ranks(case):
    batch = CASES[case]
    want_loss, want = textbook_step(batch)
    ranks = [torch.load(two_ranks() / f"rank_{rank}.pt") for rank in range(2)]
    steps = {
        "4 rows at once": step_gradients(tiny_model(), [batch]),
        "4 times 1": step_gradients(tiny_model(), [pick(batch, row) for row in range(4)]),
        "3 and 1": step_gradients(tiny_model(), [pick(batch, 0, 1, 2), pick(batch, 3)]),
        "rank 0 of 2": ranks[0][case],
        "rank 1 of 2": ranks[1][case],
        "rank 0 of 2, 2 times 1": ranks[0][case, "one by one"],
        "rank 1 of 2, 2 times 1": ranks[1][case, "one by one"],
    }
    for row, grads in steps.values():
        assert row["loss"] == pytest.approx(want_loss, abs=1e-6, rel=1e-6)
        assert row["tokens"] == (batch.segments >= 0).sum()
        assert row["trained_tokens"] == (batch.y != -100).sum()
        assert_same(grads, want)
    if case == "no trained token at all":
        assert want_loss == 0 and not any(grad.any() for grad in want)
    else:
        assert max(grad.abs().max() for grad in want) > 0.01  # so a tolerance of 1e-6 is strict


@pytest.mark.parametrize("case", CASES)
def test_step_in_bfloat16_is_near_that_in_float32_for_any_micro_batch_size(case):
    """The gradients of each micro-batch are rounded to 8 bits on their way, and added in float32:
    measured are 1 % for all of them together."""
    batch, ranks = CASES[case], Ranks(0, 1, CPU, "bfloat16")
    want_loss, want = textbook_step(batch)
    steps = [step_gradients(tiny_model(), parts, ranks) for parts in (
        [batch], [pick(batch, row) for row in range(4)], [pick(batch, 0, 1, 2), pick(batch, 3)])]
    want = torch.cat([grad.flatten() for grad in want])
    for row, grads in steps:
        assert row["loss"] == pytest.approx(want_loss, rel=2**-7)
        found = torch.cat([grad.flatten() for grad in grads])
        assert found.dtype == torch.float32 and (found - want).norm() <= 2**-6 * want.norm()
        assert not torch.equal(found, want) or not want.any()  # it is bfloat16


def test_bypassing_ddp_leaves_each_rank_its_own_gradients():
    """Why forward_sft calls the model that it is given: the mistake would raise no error."""
    a, b = (torch.load(two_ranks() / f"rank_{rank}.pt")["past DDP"][1] for rank in (0, 1))
    assert max((x - y).abs().max() for x, y in zip(a, b)) > 1e-3


@pytest.mark.parametrize("name, run", [("sft", fine_tune), ("text", pretrain)])
def test_whole_run_on_two_ranks_equals_the_run_on_one(name, run, tmp_path):
    folder = two_ranks()
    run(folder / name, tmp_path / "out", epochs=2)
    alone, both = metrics(tmp_path / "out"), metrics(folder / f"out_{name}")
    assert len(alone) > 4 and [row.keys() for row in alone] == [row.keys() for row in both]
    assert "val_loss" in alone[-1]
    for a, b in zip(alone, both):
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
    assert_weights_close(tmp_path / "out", folder / f"out_{name}")
    if name == "sft":  # the prompts are split over the ranks, the answers in order again
        alone, both = ([json.loads(line)["prompt"] for line in (out / "answers.jsonl").open()]
                       for out in (tmp_path / "out", folder / "out_sft"))
        assert alone == both and len(alone) > 4


def fixed_nll_model(nll: list[float]):
    """In place of a GPT: the nll of target t is nll[t]; one parameter, so that backward() works."""

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, y, weights=None, segments=None):
            counts = y != -100
            return self.scale * (torch.tensor(nll)[y[counts]] * weights[counts]).sum()

    return Fixed()


@pytest.mark.teach
def test_loss_is_the_mean_over_tokens_not_a_mean_of_means():
    # an answer of 1 token with an nll of 4, and one of 3 tokens with an nll of 1 each
    y = torch.tensor([[0, -100, -100], [1, 1, 1]])
    rows = [MicroBatch(y[i : i + 1], y[i : i + 1], torch.ones(1, 3)) for i in (0, 1)]
    row, (grad,) = step_gradients(fixed_nll_model([4.0, 1.0]), rows)
    assert row["loss"] == pytest.approx((4.0 + 1.0 + 1.0 + 1.0) / 4)  # 1.75
    assert row["loss"] != pytest.approx((4.0 / 1 + 3.0 / 3) / 2)  # 2.5
    assert grad.item() == pytest.approx(1.75)


def test_weight_of_one_half_counts_half_in_the_sum_and_in_the_divisor():
    y, weights = torch.tensor([[0, 1, 1]]), torch.tensor([[0.5, 1.0, 0.0]])
    row, _ = step_gradients(fixed_nll_model([4.0, 1.0]), [MicroBatch(y, y, weights)])
    assert row["loss"] == pytest.approx((0.5 * 4.0 + 1.0 * 1.0) / 1.5)


def test_weight_of_an_ignored_target_is_not_in_the_divisor():
    y = torch.tensor([[0, -100, 1]])
    row, _ = step_gradients(fixed_nll_model([4.0, 1.0]), [MicroBatch(y, y, torch.ones(1, 3))])
    assert row["loss"] == pytest.approx((4.0 + 1.0) / 2)


def test_step_without_trained_tokens_divides_by_1_and_changes_nothing():
    model, config = tiny_model(), train_gpt2.Config("", "", weight_decay=0.0)
    before = [p.clone() for p in model.parameters()]
    batch = CASES["no trained token at all"]
    row = train_step(model, make_optimizer(model, config), [batch], 1.0, 1.0, ALONE, forward_sft)
    assert (row["loss"], row["grad_norm"], row["trained_tokens"]) == (0, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))


def test_gradient_is_clipped_after_all_micro_batches_and_its_norm_is_logged_before():
    batch = CASES["weights of 7, 50 and 100 %"]
    _, want = textbook_step(batch)
    want_norm = torch.cat([grad.flatten() for grad in want]).norm().item()
    assert want_norm > 0.5
    model, parts = tiny_model(), [pick(batch, 0, 1), pick(batch, 2, 3)]
    optimizer = KeepGradients(model.parameters(), lr=0.0)
    row = train_step(model, optimizer, parts, 0.1, 0.25, ALONE, forward_sft)
    assert row["grad_norm"] == pytest.approx(want_norm, rel=1e-5)
    clipped = torch.cat([grad.flatten() for grad in optimizer.kept])
    assert clipped.norm().item() == pytest.approx(0.25, rel=1e-4)


# ----- SFT is pretraining with one more row of data ----------------------------------------------


@pytest.mark.teach
def test_sft_with_all_weights_100_equals_pretraining_bitwise(tmp_path):
    ids = np.random.default_rng(0).integers(0, 256, 16 * 8 + 1)
    ids[[9, 40, 41, 100, -1]] = EOT  # ends of examples of 10, 31, 1, 59 and 28 ids
    examples = [(part.tolist(), [100] * len(part)) for part in np.split(ids, [10, 41, 42, 101])]
    text = TokenRows(text_folder(tmp_path / "text", train=ids, shard_tokens=50), "train", 16)
    sft = SFTDataset(sft_folder(tmp_path / "sft", train=examples, shard_tokens=60), "train", 16,
                     "stream", seed=None, loss_on="all", isolate=False, drop_last=True)
    assert len(text) == len(sft) == 8
    for a, b in zip((text[i] for i in range(8)), sft):
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["labels"], b["labels"])
        assert torch.equal(b["weights"], torch.ones(16)) and not b["segments"].any()

    def four_steps(rows, config, forward):
        model = tiny_model()
        optimizer, steps = make_optimizer(model, config), load_steps(rows, config, ALONE, 0)
        log = [train_step(model, optimizer, next(steps), 1e-2, 1.0, ALONE, forward)
               for _ in range(4)]
        return log, list(model.parameters())

    flags = {"batch_size": 2, "rows_per_step": 4, "weight_decay": 0.1}
    log, weights = four_steps(text, train_gpt2.Config("", "", **flags), forward_text)
    sft_log, sft_weights = four_steps(sft, train_sft.Config("", "", **flags), forward_sft)
    assert log == sft_log  # loss, gradient norm and counts
    assert all(torch.equal(a, b) for a, b in zip(weights, sft_weights))


def test_mask_decides_what_is_trained():
    """A prompt of 3 ids and a response of 2: the loss is that of the response alone."""
    x, y = torch.tensor([[10, 11, 12, 20]]), torch.tensor([[-100, -100, 20, 256]])
    weights = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    model = tiny_model()
    nll = -F.log_softmax(model(x), -1)[0]
    response = (nll[2, 20] + nll[3, 256]).item() / 2
    everything = (nll[0, 11] + nll[1, 12] + nll[2, 20] + nll[3, 256]).item() / 4
    row, grads = step_gradients(model, [MicroBatch(x, y, weights)])
    assert row["loss"] == pytest.approx(response, rel=1e-5)
    assert row["loss"] != pytest.approx(everything, rel=1e-2)
    assert row["trained_tokens"] == 2

    y_all = torch.tensor([[11, 12, 20, 256]])
    row, other = step_gradients(tiny_model(), [MicroBatch(x, y_all, torch.ones(1, 4))])
    assert row["loss"] == pytest.approx(everything, rel=1e-5)
    assert (grads[0] - other[0]).abs().max() > 1e-3


def test_forward_sft_returns_the_weighted_sum():
    batch = CASES["weights of 7, 50 and 100 %"]
    want = plain_loss_sum(tiny_model(), *batch[:4])
    torch.testing.assert_close(forward_sft(tiny_model(), *batch[:4]), want, atol=1e-4, rtol=1e-6)


def test_rows_of_sft_follow_every_flag_and_validation_keeps_its_order_and_all_its_examples(
        tmp_path):
    examples = random_examples(60, longest=40)
    data = sft_folder(tmp_path / "data", train=examples, val=examples)
    flags = {"block_size": 16, "layout": "bucket", "seed": 3, "loss_on": "all", "isolate": False,
             "rows_per_step": 4, "overlong": "drop"}
    config = train_sft.Config(data, "", max_examples=50, **flags)
    opened = train, val = [train_sft.open_rows(config, split) for split in ("train", "val")]
    assert not train.isolate and not val.isolate  # in `bucket` no row shows it
    train, val = map(list, opened)
    want = {"examples": range(50), "seed": 3}, {"examples": None, "seed": None}
    for rows, differs, split in zip((train, val), want, ("train", "val")):
        same = list(SFTDataset(data, split, **(flags | differs)))
        assert len(rows) == len(same) > 4
        for a, b in zip(rows, same):
            assert all(torch.equal(a[key], b[key]) for key in a)

    def differ(name, value) -> bool:
        other = list(SFTDataset(data, "train", examples=range(50), **(flags | {name: value})))
        return len(other) != len(train) or any(
            not torch.equal(a[key], b[key]) for a, b in zip(train, other) for key in a)

    others = {"layout": "pad", "seed": 4, "loss_on": "response", "rows_per_step": 1,
              "overlong": "truncate"}
    assert [n for n, value in others.items() if not differ(n, value)] == []  # so each is seen
    assert len(val) > len(train)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_step_is_the_same_in_every_layout_that_cuts_no_example(tmp_path, batch_size):
    # in `stream` with rows of 20, these begin at 0, 8, 20, 27 and 40: no row cuts one
    lengths, random = (8, 12, 7, 13, 20), np.random.default_rng(0)
    examples = [([*random.integers(0, 256, n - 1).tolist(), EOT], ([0, 0] + [7, 50, 100] * n)[:n])
                for n in lengths]
    data = sft_folder(tmp_path / "data", train=examples, val=examples)

    def step(layout, isolate=True):
        config = train_sft.Config(data, "", block_size=20, rows_per_step=8, batch_size=batch_size,
                                  layout=layout, isolate=isolate)
        rows = train_sft.open_rows(config, "val")  # in the data's order
        micro_batches = next(load_steps(rows, config, ALONE, 0))
        assert len(micro_batches) == 8 // batch_size  # the whole epoch, and filler up to 8 rows
        return step_gradients(tiny_model(), micro_batches)

    want, want_grads = step("pad")
    assert want["trained_tokens"] == sum(n - 2 for n in lengths)
    for layout in ("fit", "bucket", "stream"):
        row, grads = step(layout)
        assert row["trained_tokens"] == want["trained_tokens"]
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-6)
        assert_same(grads, want_grads, 2e-6)
    assert abs(step("fit", isolate=False)[0]["loss"] - want["loss"]) > 1e-3


def test_bucket_cuts_off_columns_that_are_padding_in_the_whole_micro_batch(tmp_path):
    examples = [([*range(n - 1), EOT], [100] * n) for n in (4, 5, 9, 7)]
    data = sft_folder(tmp_path / "data", train=examples)
    rows = SFTDataset(data, "train", 16, "bucket", seed=None, rows_per_step=2)
    steps = load_steps(rows, train_sft.Config("", "", batch_size=2, rows_per_step=2), ALONE, 0)
    batches = [*next(steps), *next(steps)]
    assert [tuple(batch.x.shape) for batch in batches] == [(2, 4), (2, 8)]  # n ids: n - 1 inputs
    assert [batch.n_tokens for batch in batches] == [3 + 4, 6 + 8]
    assert all(batch.segments is None for batch in batches)


# ----- the order of the rows ---------------------------------------------------------------------


class Numbers:
    """Row i is the number i; filler is -1."""

    def __init__(self, n):
        self.n = n

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.n

    def batch(self, indices, multiple):
        assert all(i is None or 0 <= i < self.n for i in indices)
        return {"x": torch.tensor([-1 if i is None else i for i in indices]), "y": None}


def rows_of_steps(world_size, batch_size, done, n_steps=7):
    """The sorted rows of each step, of all ranks; each rank has equally many micro-batches."""
    config = train_gpt2.Config("", "", batch_size=batch_size, rows_per_step=8)
    found = [[] for _ in range(n_steps)]
    for rank in range(world_size):
        rows = Numbers(21)
        steps = load_steps(rows, config, Ranks(rank, world_size, CPU), done)
        for number, step in enumerate(found, done):
            micro_batches = next(steps)
            assert rows.epoch == number // 3
            assert [len(batch.x) for batch in micro_batches] == (
                [batch_size] * (8 // (batch_size * world_size)))
            step += [row for batch in micro_batches for row in batch.x.tolist()]
    return [sorted(step) for step in found]


@pytest.mark.parametrize("done", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("world_size, batch_size", [(1, 8), (1, 1), (2, 2), (4, 1), (8, 1), (2, 4)])
def test_rows_of_a_step_depend_on_neither_ranks_nor_micro_batches_nor_resuming(
        world_size, batch_size, done):
    # 21 rows, 8 a step: an epoch ends with a short step of 5 rows and 3 of filler
    epoch = [list(range(8)), list(range(8, 16)), [-1, -1, -1, *range(16, 21)]]
    assert rows_of_steps(world_size, batch_size, done) == (epoch * 4)[done : done + 7]


def test_rank_without_rows_left_gets_filler_of_the_same_shape(tmp_path):
    data = sft_folder(tmp_path / "data", train=[([7, 8, EOT], [0, 100, 100])] * 3)
    config = train_sft.Config("", "", batch_size=2, rows_per_step=8)

    def micro_batch(rank):
        """Its rows 2 * rank and 2 * rank + 1, of three."""
        rows = SFTDataset(data, "train", 2, "fit")
        (batch,) = next(load_steps(rows, config, Ranks(rank, 4, CPU), 0))
        return batch

    assert micro_batch(1).y.tolist() == [[8, EOT], [-100, -100]]
    assert micro_batch(1).segments.tolist() == [[0, 0], [-1, -1]]
    filler = micro_batch(3)
    assert filler.x.shape == (2, 2) and filler.n_tokens == 0 and not filler.weights.any()
    assert (filler.y == -100).all() and (filler.segments == -1).all()


def test_rows_of_the_next_step_are_loaded_while_the_device_works(tmp_path, monkeypatch):
    """After the step's work was launched and before its results are waited for."""
    events = []

    def noted(name, function):
        return lambda *args, **kwargs: events.append(name) or function(*args, **kwargs)

    monkeypatch.setattr(TokenRows, "batch", noted("load", TokenRows.batch))
    monkeypatch.setattr(train_gpt2, "count_step", noted("count", train_gpt2.count_step))
    monkeypatch.setattr(torch.Tensor, "backward", noted("backward", torch.Tensor.backward))
    monkeypatch.setattr(torch.Tensor, "tolist", noted("wait", torch.Tensor.tolist))
    monkeypatch.setattr(torch.optim.AdamW, "step", noted("update", torch.optim.AdamW.step))
    data = text_folder(tmp_path / "data", train=range(100))
    flags = TINY | {"rows_per_step": 2, "max_steps": 3, "save_every": 0}
    config = train_gpt2.Config(data, str(tmp_path / "out"), **flags)
    quietly(lambda config: train_gpt2.train(
        config, train_gpt2.open_rows, forward_text, lambda *args: {}), config)
    step = ["backward", "update", "load", "count", "wait", "wait"]
    assert events == ["load", "count", *step, *step, "backward", "update", "wait", "wait"]


def test_each_example_is_trained_once_an_epoch_in_an_order_of_the_epochs_own(tmp_path):
    data = sft_folder(tmp_path / "data", train=[([i, i, EOT], [0, 100, 100]) for i in range(11)])
    config = train_sft.Config("", "", batch_size=2, rows_per_step=4)
    steps = load_steps(SFTDataset(data, "train", 2, "pad"), config, ALONE, 0)
    epochs = [[first for _ in range(3) for batch in next(steps) for first in batch.x[:, 0].tolist()]
              for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [*range(11), EOT]  # EOT: the filler
    assert epochs[0] != epochs[1]


def test_each_rank_verifies_a_shard_when_it_first_reads_it(tmp_path):
    """Rows of 16 tokens, shards of 32: in the first step rank 0 reads tokens 0 to 16, of shard 0,
    rank 1 tokens 16 to 32, the last one of shard 1, which is damaged."""
    data = text_folder(tmp_path / "data", train=range(65), shard_tokens=32)
    flip_a_bit(tmp_path / "data" / "train_000001.npy")
    config = train_gpt2.Config(data, "", batch_size=1, rows_per_step=2)
    rank_0, rank_1 = (load_steps(TokenRows(data, "train", 16), config, Ranks(rank, 2, CPU), 0)
                      for rank in (0, 1))
    assert next(rank_0)[0].x.tolist() == [list(range(16))]
    for steps in (rank_0, rank_1):
        with pytest.raises(UserError, match=r"train_000001\.npy: sha256 .* make the data again"):
            next(steps)


# ----- schedule and optimizer --------------------------------------------------------------------


def lrs(n_steps, warmup_steps):
    config = train_gpt2.Config("", "", learning_rate=1.0, warmup_steps=warmup_steps)
    return [get_lr(step, n_steps, config) for step in range(n_steps)]


def test_learning_rate_at_its_corners():
    found = lrs(10, warmup_steps=4)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]  # step 0 is not wasted; the last warm-up is the peak
    assert found[6] == pytest.approx(0.55)  # halfway down: the mean of 1 and 0.1
    assert found[9] == pytest.approx(0.1)  # the last step: a tenth of the peak
    assert found[3:] == sorted(found[3:], reverse=True)
    assert lrs(4, warmup_steps=1000) == [0.25, 0.5, 0.75, 1.0]  # clipped to the run
    assert lrs(2, warmup_steps=0) == pytest.approx([0.55, 0.1])
    assert lrs(1, warmup_steps=0) == pytest.approx([0.1])
    assert lrs(1, warmup_steps=1) == [1.0]


def test_run_follows_the_schedule_from_its_first_step_to_its_last():
    found = [row["lr"] for row in metrics(two_ranks() / "out_sft")]  # 10 steps, 2 of warm-up
    assert found == pytest.approx([0.01 * lr for lr in lrs(10, warmup_steps=2)])
    assert found[:2] == pytest.approx([0.005, 0.01]) and found[-1] == pytest.approx(0.001)


def test_weight_decay_shrinks_matrices_only():
    model, config = tiny_model(), train_gpt2.Config("", "", weight_decay=0.5)
    optimizer = make_optimizer(model, config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    batch = CASES["no trained token at all"]  # zero gradients, so only the decay acts
    train_step(model, optimizer, [batch], 0.1, 1.0, ALONE, forward_sft)
    for name, p in model.named_parameters():
        shrinks = not (name.endswith("bias") or "ln_" in name)
        want = before[name] * (1 - 0.1 * 0.5) if shrinks else before[name]
        torch.testing.assert_close(p.detach(), want, atol=1e-7, rtol=1e-6)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


def test_one_batch_is_memorized():
    model, config = tiny_model(spread=0.0), train_gpt2.Config("", "", weight_decay=0.0)
    optimizer, batch = make_optimizer(model, config), CASES["weights of 7, 50 and 100 %"]
    losses = [train_step(model, optimizer, [batch], 1e-2, 1.0, ALONE, forward_sft)["loss"]
              for _ in range(60)]
    assert abs(losses[0] - math.log(261)) < 0.1  # all ids are about equally likely
    assert losses[-1] < 0.05


# ----- evaluation --------------------------------------------------------------------------------


def test_weights_are_tried_before_each_save_and_before_each_evaluation(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(train_gpt2.checks, "check_step",
                        lambda metrics, *args, is_kept: tried.append(is_kept))
    data = text_folder(tmp_path / "data", train=range(200), val=range(100))
    pretrain(data, tmp_path / "out", max_steps=7, eval_every=2, save_every=3)
    assert tried == [False, True, True, True, False, True, True]  # steps 2, 4, 6; 3, 6; the last


def test_evaluation_of_a_run_goes_through_its_own_forward(tmp_path):
    data = text_folder(tmp_path / "data", train=range(100), val=range(100))

    def first_val_loss(name, forward) -> float:
        config = train_gpt2.Config(data, str(tmp_path / name), **(TINY | {"max_steps": 1}))
        printed = quietly(lambda config: train_gpt2.train(
            config, train_gpt2.open_rows, forward, lambda *args: {}), config)
        start = next(line for line in printed.splitlines() if line.startswith("start"))
        return float(start.split()[2])

    doubled = first_val_loss("doubled", lambda *batch: 2 * forward_text(*batch))
    assert doubled == pytest.approx(2 * first_val_loss("plain", forward_text), abs=2e-4)



def test_val_loss_is_the_mean_over_all_trained_tokens_of_unequal_batches():
    model, batch = tiny_model(), CASES["weights of 7, 50 and 100 %"]
    parts = [pick(batch, 0), pick(batch, 1, 2, 3)]
    logits, counted = model(batch.x, segments=batch.segments), batch.y != -100
    nll = F.cross_entropy(logits[counted], batch.y[counted], reduction="none")
    weights = batch.weights[counted]
    found = evaluate(model, parts, ALONE)
    assert found["val_loss"] == pytest.approx(((nll * weights).sum() / weights.sum()).item())
    hits = (logits[counted].argmax(1) == batch.y[counted]).sum()
    assert found["val_accuracy"] == pytest.approx(hits.item() / counted.sum().item())
    means = [evaluate(model, [part], ALONE)["val_loss"] for part in parts]
    assert found["val_loss"] != pytest.approx(sum(means) / 2, rel=1e-3)


def test_accuracy_counts_trained_targets_only():
    model, x = tiny_model(), torch.tensor([[1, 2, 3, 4]])
    y = model(x).argmax(-1)  # four correct predictions; now one wrong and one ignored
    y[0, 0], y[0, 1] = (y[0, 0] + 1) % 261, -100
    assert evaluate(model, [MicroBatch(x, y)], ALONE)["val_accuracy"] == pytest.approx(2 / 3)


def test_ranks_share_the_rows_that_eval_tokens_selects():
    config = train_gpt2.Config("", "", batch_size=2, block_size=16, eval_tokens=7 * 16 + 15)
    shares = [[batch.x.tolist() for batch in eval_batches(Numbers(10), config, Ranks(rank, 2, CPU))]
              for rank in (0, 1)]
    # 7 rows of 16 tokens, from the whole split; -1 is padding: every batch has the same shape
    assert shares == [[[0, 3], [6, 9]], [[2, 5], [7, -1]]]


@pytest.mark.parametrize("layout", ["stream", "fit", "pad", "bucket"])
def test_part_of_the_validation_split_is_of_average_length(layout, tmp_path):
    """`bucket` sorts by length: its first rows would be the shortest examples."""
    examples = [([*range(n - 1), EOT], [0] + [100] * (n - 1)) for n in range(3, 63)]
    config = train_sft.Config(sft_folder(tmp_path / "data", val=examples), "", layout=layout,
                              block_size=64, eval_tokens=10 * 64)
    val = train_sft.open_rows(config, "val")
    part, whole = (list(eval_batches(val, c, ALONE))
                   for c in (config, dataclasses.replace(config, eval_tokens=10**6)))
    mean, want = (sum(b.n_tokens for b in batches)
                  / sum(int((b.y >= 0).any(1).sum()) for b in batches)  # rows that are no padding
                  for batches in (part, whole))
    assert mean == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize("splits", [["train"], ["train", "val"]])
def test_dt_holds_loading_training_and_saving_but_no_evaluation(splits, tmp_path, monkeypatch):
    """On a fake clock, loading a step takes 1 s, training 2 s, saving 10 s, evaluating 1,000 s."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(train_gpt2, "time", clock)

    def takes(seconds, function):
        def timed(*args, **kwargs):
            clock.now += seconds
            return function(*args, **kwargs)
        return timed

    for name, seconds in (("train_step", 2), ("save_checkpoint", 10), ("evaluate", 1000)):
        monkeypatch.setattr(train_gpt2, name, takes(seconds, getattr(train_gpt2, name)))
    monkeypatch.setattr(TokenRows, "batch", takes(1, TokenRows.batch))
    judge = takes(1000, lambda *_: {})
    data = text_folder(tmp_path / "data", **dict.fromkeys(splits, range(100)))
    flags = TINY | {"rows_per_step": 2, "eval_every": 2, "save_every": 3}  # one load a step
    config = train_gpt2.Config(data, str(tmp_path / "out"), max_steps=5, **flags)
    quietly(lambda config: train_gpt2.train(config, train_gpt2.open_rows, forward_text, judge),
            config)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    # step 1 loads two steps, the last one none; step 4 waits for the save after 3
    assert [row["dt"] for row in rows] == [4, 3, 3, 13, 2]
    assert [row["tokens_per_s"] for row in rows] == [32 / row["dt"] for row in rows]


# ----- devices and dtypes ------------------------------------------------------------------------


def test_run_in_bfloat16_follows_float32_and_keeps_weights_in_float32(tmp_path):
    data = sft_folder(tmp_path / "data", train=random_examples(30), val=random_examples(5, seed=1))
    printed = {dtype: fine_tune(data, tmp_path / dtype, dtype=dtype, max_steps=12)
               for dtype in ("auto", "float32", "bfloat16")}
    assert " on cpu in float32\n" in printed["auto"] and " in bfloat16\n" in printed["bfloat16"]
    auto, full, half = (metrics(tmp_path / dtype) for dtype in printed)
    assert auto == full
    assert [row["loss"] for row in half] == pytest.approx([row["loss"] for row in full], rel=0.01)
    assert half != full and {p.dtype for p in weights_of(tmp_path / "bfloat16")} == {torch.float32}


@pytest.mark.parametrize("name, device, has_it, want", [
    ("auto", "cuda", True, "bfloat16"), ("auto", "cuda", False, "float32"),
    ("auto", "cpu", True, "float32"), ("auto", "mps", True, "float32"),
    ("float32", "cuda", True, "float32"), ("bfloat16", "cpu", False, "bfloat16")])
def test_auto_is_bfloat16_on_gpus_that_have_it(name, device, has_it, want, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    assert choose_dtype(name, torch.device(device)) == want


def test_unknown_dtype_is_refused():
    with pytest.raises(UserError, match="--dtype: unknown dtype 'float16'"):
        train_gpt2.setup_distributed("cpu", dtype="float16")


def test_nccl_is_told_its_device_and_gloo_is_not(monkeypatch):
    """Without it, NCCL guesses the device from the rank, which is wrong on a second machine."""
    groups = []
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda backend, **flags: groups.append((backend, flags["device_id"])))
    for name in ("set_device", "set_float32_matmul_precision"):
        monkeypatch.setattr(torch.cuda if name == "set_device" else torch, name, lambda _: None)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    for name, value in (("RANK", "9"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "16")):
        monkeypatch.setenv(name, value)
    for device in ("cuda", "cpu"):
        assert train_gpt2.setup_distributed(device).rank == 9
    assert groups == [("nccl", torch.device("cuda", 1)), ("gloo", None)]


@pytest.mark.parametrize("device, settings, message", [
    ("cuda:1", {"LOCAL_WORLD_SIZE": "2"}, "^--device cuda:1 is one GPU, but each process on this "
     "machine needs its own; use --device cuda and"),
    ("cuda", {"LOCAL_RANK": "1"}, r"^--device cuda: not available here \(invalid device ordinal\); "
     r"use .*; local rank 1 sees only 1 GPU\(s\): if there are more, show all to each process"),
    ("cuda", {"LOCAL_RANK": "0"}, r"ordinal\); use another device or fewer processes on this "
     "machine$")])
def test_gpu_that_a_process_cannot_have_is_a_line_that_helps(device, settings, message,
                                                             monkeypatch):
    def no_such_device(*size, device):
        raise RuntimeError("invalid device ordinal\nCUDA kernel errors might be …")

    monkeypatch.setattr(torch, "empty", no_such_device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as error:
        train_gpt2.setup_distributed(device)
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize("card, dtype, share", [
    ("NVIDIA H100 80GB HBM3", "bfloat16", 855 / 989),
    ("NVIDIA H100 PCIe", "bfloat16", 855 / 756),
    ("NVIDIA H100 80GB HBM3", "float32", None),
    ("NVIDIA T4", "bfloat16", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
])
def test_mfu_is_shown_for_a_known_card(card, dtype, share, tmp_path, monkeypatch):
    """GPT-2 124M at T = 1024 needs 855 MFLOP a token: 6 * (85 M + 39 M) and 113 M for attention."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    run = SimpleNamespace(ranks=Ranks(0, 2, torch.device("cuda"), dtype), sizes=GPTConfig(),
                          config=SimpleNamespace(block_size=1024))
    found = Run.mfu(run, 2e6)
    assert found == ({} if share is None else {"mfu": pytest.approx(share, rel=1e-3)})
    monkeypatch.setattr(Run, "mfu", lambda *args: found)
    data = text_folder(tmp_path / "data", train=range(100))
    printed = pretrain(data, tmp_path / "out", max_steps=1)
    assert ("  mfu " in printed) == (share is not None)
    assert metrics(tmp_path / "out")[0].get("mfu") == found.get("mfu")


def test_memory_is_pinned_for_a_gpu_only(monkeypatch):
    """Pinning would start CUDA, on a machine that has it, under --device cpu too."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t)
    batch = CASES["weights of 7, 50 and 100 %"]
    step_gradients(tiny_model(), [batch])
    evaluate(tiny_model(), [batch], ALONE)
    assert not pinned
    with pytest.raises((RuntimeError, AssertionError)):  # there is no GPU to take it
        fast.send(batch.x, torch.device("cuda", 99))
    assert len(pinned) == 1


# ----- importing has no effect -------------------------------------------------------------------

WATCHED = """
import os, random, sys
sys.path.insert(0, sys.argv.pop())
import numpy, torch
states = torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())
environment = dict(os.environ)
import train_gpt2, train_sft
assert states == (torch.get_rng_state().tolist(), random.getstate(),
                  str(numpy.random.get_state()))
assert not torch.distributed.is_initialized()
assert not torch.cuda.is_initialized()
assert environment == dict(os.environ)
heavy = {"datasets", "matplotlib", "pyarrow", "transformers", "pandas", "wandb"}
print(sorted(heavy & set(sys.modules)), os.listdir("."))
"""


def test_importing_the_trainers_has_no_effect(tmp_path):
    """No process group, seed, file or CUDA, no look at the command line or torchrun's variables,
    and no library that a run can do without."""
    found = subprocess.run(
        [sys.executable, "-c", WATCHED, "--no_such_flag", str(Path(train_gpt2.__file__).parent)],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"RANK": "0", "WORLD_SIZE": "2", "PYTHONDONTWRITEBYTECODE": "1"})
    assert (found.stdout, found.stderr) == ("[] []\n", "")
