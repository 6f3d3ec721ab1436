"""The training step: an exact mean over the trained tokens, whoever computes which part of it."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_training import (
    ALONE,
    assert_weights_close,
    fine_tune,
    gradients,
    metrics,
    pick,
    plain_loss_sum,
    pretrain,
    random_examples,
    sft_folder,
    step_cases,
    step_gradients,
    text_folder,
    tiny_model,
    two_ranks,
)
from torch.utils.data import DataLoader

import train_gpt2
import train_sft
from model import GPT, GPTConfig
from sft_data import SFTDataset
from train_gpt2 import (
    MicroBatch,
    RankRows,
    Run,
    TokenRows,
    evaluate,
    forward_text,
    get_lr,
    load_steps,
    make_optimizer,
    text_batches,
    train_step,
)
from train_sft import forward_sft, sft_batches

CASES = step_cases()


def assert_same(found, want, tolerance=1e-6):
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-5)


# ----- one place normalises ----------------------------------------------------------------------


def textbook_step(batch):
    """(loss, gradients): weighted sum over weighted count, from full logits."""
    model = tiny_model()
    total = batch.weights[batch.y != -100].sum().item() or 1
    loss = plain_loss_sum(model, *batch[:4]) / total
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("case", CASES)
def test_one_micro_batch_of_4_rows_is_4_of_1_is_2_ranks_of_2(case):
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
        assert max(grad.abs().max() for grad in want) > 0.01  # 1e-6 of it says something


def test_going_round_ddps_wrapper_would_leave_each_rank_its_own_gradients():
    """Why forward_sft calls the model it is given: no error would tell."""
    a, b = (torch.load(two_ranks() / f"rank_{rank}.pt")["round the wrapper"][1] for rank in (0, 1))
    assert max((x - y).abs().max() for x, y in zip(a, b)) > 1e-3


@pytest.mark.parametrize("name, run", [("sft", fine_tune), ("text", pretrain)])
def test_a_whole_run_on_two_ranks_is_the_run_on_one(name, run, tmp_path):
    folder = two_ranks()
    assert run(folder / name, tmp_path / "out", epochs=2).count("step") > 2
    alone, both = metrics(tmp_path / "out"), metrics(folder / f"out_{name}")
    assert len(alone) > 4 and [row.keys() for row in alone] == [row.keys() for row in both]
    assert "val_loss" in alone[-1]
    for a, b in zip(alone, both):
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
    assert_weights_close(tmp_path / "out", folder / f"out_{name}")


def fixed_nll_model(nll: list[float]):
    """Stands in for a GPT: target t costs nll[t]. Its one parameter only serves backward()."""

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, y, weights=None, segments=None):
            counts = y != -100
            return self.scale * (torch.tensor(nll)[y[counts]] * weights[counts]).sum()

    return Fixed()


def test_the_loss_is_the_mean_over_tokens_and_no_mean_of_means():
    # A short answer of 1 token that costs 4.0, a long one of 3 tokens that cost 1.0 each:
    y = torch.tensor([[0, -100, -100], [1, 1, 1]])
    rows = [MicroBatch(y[i : i + 1], y[i : i + 1], torch.ones(1, 3)) for i in (0, 1)]
    row, (grad,) = step_gradients(fixed_nll_model([4.0, 1.0]), rows)
    assert row["loss"] == pytest.approx((4.0 + 1.0 + 1.0 + 1.0) / 4)  # 1.75: each token counts once
    assert row["loss"] != pytest.approx((4.0 / 1 + 3.0 / 3) / 2)  # 2.5: the mean of means
    assert grad.item() == pytest.approx(1.75)


def test_a_weight_of_a_half_counts_half_in_the_sum_and_in_the_divisor():
    y, weights = torch.tensor([[0, 1, 1]]), torch.tensor([[0.5, 1.0, 0.0]])
    row, _ = step_gradients(fixed_nll_model([4.0, 1.0]), [MicroBatch(y, y, weights)])
    assert row["loss"] == pytest.approx((0.5 * 4.0 + 1.0 * 1.0) / 1.5)


def test_a_weight_at_an_ignored_target_is_no_part_of_the_divisor():
    y = torch.tensor([[0, -100, 1]])
    row, _ = step_gradients(fixed_nll_model([4.0, 1.0]), [MicroBatch(y, y, torch.ones(1, 3))])
    assert row["loss"] == pytest.approx((4.0 + 1.0) / 2)


def test_a_step_without_a_trained_token_divides_by_1_and_changes_nothing():
    model, config = tiny_model(), train_gpt2.Config("", "", weight_decay=0.0)
    before = [p.clone() for p in model.parameters()]
    batch = CASES["no trained token at all"]
    row = train_step(model, make_optimizer(model, config), [batch], 1.0, 1.0, ALONE, forward_sft)
    assert (row["loss"], row["grad_norm"], row["trained_tokens"]) == (0, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))


def test_the_gradient_is_clipped_after_all_micro_batches_and_its_norm_logged_before():
    class Clipped(torch.optim.SGD):
        def step(self):
            grads = (p.grad for group in self.param_groups for p in group["params"])
            self.norm = math.sqrt(sum(grad.square().sum().item() for grad in grads))

    batch = CASES["weights of 7, 50 and 100 %"]
    _, want = textbook_step(batch)
    want_norm = math.sqrt(sum(grad.square().sum().item() for grad in want))
    assert want_norm > 0.5
    model = tiny_model()
    optimizer = Clipped(model.parameters(), lr=0.0)
    parts = [pick(batch, 0, 1), pick(batch, 2, 3)]
    row = train_step(model, optimizer, parts, 0.1, 0.25, ALONE, forward_sft)
    assert row["grad_norm"] == pytest.approx(want_norm, rel=1e-5)
    assert optimizer.norm == pytest.approx(0.25, rel=1e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]


# ----- SFT is pretraining with one more row of data ----------------------------------------------


def test_with_every_weight_100_the_sft_step_is_the_pretraining_step(tmp_path):
    ids = np.random.default_rng(0).integers(0, 256, 16 * 8 + 1)
    ids[[9, 40, 41, 100, -1]] = 256  # <|endoftext|>: examples of 10, 31, 1, 59 and 28 ids
    examples = [(e.tolist(), [100] * len(e)) for e in np.split(ids, [10, 41, 42, 101])]
    text = TokenRows(text_folder(tmp_path / "text", train=ids, shard_tokens=50), "train", 16)
    sft = SFTDataset(
        sft_folder(tmp_path / "sft", train=examples, shard_tokens=60), "train", 16, "stream",
        seed=None, loss_on="all", isolate=False, drop_last=True,
    )  # fmt: skip
    assert len(text) == len(sft) == 8
    for a, b in zip((text[i] for i in range(8)), sft):
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["labels"], b["labels"])
        assert torch.equal(b["weights"], torch.ones(16)) and not b["segments"].any()

    ends = []
    for rows, kind, batches, forward in (
        (text, train_gpt2.Config, text_batches, forward_text),
        (sft, train_sft.Config, None, forward_sft),
    ):
        config = kind("", "", batch_size=2, rows_per_step=4, weight_decay=0.1)
        if kind is train_sft.Config:
            batches = sft_batches(dataclasses.replace(config, layout="stream", isolate=False))
        model = tiny_model()
        optimizer = make_optimizer(model, config)
        steps = load_steps(rows, config, ALONE, 0, batches)
        logged = [train_step(model, optimizer, next(steps), 1e-2, 1.0, ALONE, forward)
                  for _ in range(4)]  # fmt: skip
        ends.append((logged, list(model.parameters())))
    assert ends[0][0] == ends[1][0]  # loss, gradient norm and counts of 4 steps, bit for bit
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1]))


def test_the_mask_decides_what_is_trained():
    """A prompt of 3 ids and a response of 2, worked out by hand; fails if the mask is ignored."""
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


def test_forward_sft_returns_the_weighted_sum_and_the_weight():
    batch = CASES["weights of 7, 50 and 100 %"]
    loss_sum, weight_sum = forward_sft(tiny_model(), *batch[:4])
    want = plain_loss_sum(tiny_model(), *batch[:4])
    torch.testing.assert_close(loss_sum, want, atol=1e-4, rtol=1e-6)
    assert weight_sum.item() == pytest.approx(batch.weights.sum().item())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_trainers_step_is_the_same_in_every_layout_that_cuts_no_example(tmp_path, batch_size):
    # in `stream` rows of 20 these begin at 0, 8, 20, 27 and 40, so that no row cuts one
    lengths, random = (8, 12, 7, 13, 20), np.random.default_rng(0)
    examples = [([*random.integers(0, 256, n - 1).tolist(), 256], ([0, 0] + [7, 50, 100] * n)[:n])
                for n in lengths]  # fmt: skip
    data = sft_folder(tmp_path / "data", train=examples, val=examples)

    def step(layout, isolate=True):
        flags = {"rows_per_step": 8, "batch_size": batch_size, "layout": layout, "isolate": isolate}
        config = train_sft.Config(data, "", block_size=20, **flags)
        rows = train_sft.open_rows(config, "val")  # in the data's order
        micro_batches = next(load_steps(rows, config, ALONE, 0, sft_batches(config)))
        assert len(micro_batches) == 8 // batch_size  # an epoch, and filler up to 8 rows
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
    examples = [([*range(n - 1), 256], [100] * n) for n in (4, 5, 9, 7)]
    data = sft_folder(tmp_path / "data", train=examples)
    rows = SFTDataset(data, "train", 16, "bucket", seed=None, rows_per_step=2)
    config = train_sft.Config("", "", layout="bucket", batch_size=2, rows_per_step=2)
    batches = list(sft_batches(config)(rows, 2))
    assert [tuple(batch.x.shape) for batch in batches] == [(2, 4), (2, 8)]  # n ids read n - 1
    assert [batch.n_tokens for batch in batches] == [3 + 4, 6 + 8]
    assert all(batch.segments is None for batch in batches)


# ----- the order of the rows ---------------------------------------------------------------------


class Numbers(torch.utils.data.Dataset):
    """Row i is the number i; filler is -1."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        assert 0 <= i < self.n
        return i

    def filler(self):
        return -1

    def set_epoch(self, epoch):
        pass

    def verify(self, first_row, last_row):
        assert 0 <= first_row <= last_row < self.n


def rows_of_steps(world_size, batch_size, first_step, n_steps=7):
    """[the rows of each step, all ranks together]; each rank has equally many micro-batches."""
    config = train_gpt2.Config("", "", batch_size=batch_size, rows_per_step=8)
    steps = [[] for _ in range(n_steps)]
    for rank in range(world_size):
        run = Run(rank, world_size, torch.device("cpu"))
        stream = load_steps(Numbers(21), config, run, first_step, number_batches)
        for step, micro_batches in zip(steps, stream):
            sizes = {len(batch) for batch in micro_batches}
            assert sizes == {batch_size}
            assert len(micro_batches) == 8 // (batch_size * world_size)
            step += torch.cat(micro_batches).tolist()
    return [sorted(step) for step in steps]


def number_batches(rows, batch_size):
    yield from DataLoader(rows, batch_size)


@pytest.mark.parametrize("first_step", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("world_size, batch_size", [(1, 8), (1, 1), (2, 2), (4, 1), (8, 1), (2, 4)])
def test_a_steps_rows_depend_on_neither_ranks_nor_micro_batch_nor_resume(
    world_size, batch_size, first_step
):
    # 21 rows, 8 a step: an epoch ends with a short step of 5 rows and 3 of filler
    epoch = [list(range(8)), list(range(8, 16)), [-1, -1, -1, *range(16, 21)]]
    want = (epoch * 4)[first_step : first_step + 7]
    assert rows_of_steps(world_size, batch_size, first_step) == want


def test_a_rank_without_a_row_left_gets_filler_of_the_same_shape(tmp_path):
    data = sft_folder(tmp_path / "data", train=random_examples(3))
    rows = SFTDataset(data, "train", 20, "pad")
    config = train_sft.Config("", "", batch_size=2, rows_per_step=8)
    part = RankRows(rows, config, Run(1, 4, torch.device("cpu")))  # rows 2 and 3 of 3
    assert [bool((row["labels"] != -100).any()) for row in part] == [True, False]
    part = RankRows(rows, config, Run(3, 4, torch.device("cpu")))  # rows 6 and 7 of 3
    for row in part:
        assert (row["labels"] == -100).all() and (row["segments"] == -1).all()
        assert row["input_ids"].shape == (20,) and not row["weights"].any()


def test_each_example_is_trained_once_an_epoch_and_in_another_order_in_the_next(tmp_path):
    examples = [([i, i, 256], [0, 100, 100]) for i in range(11)]
    data = sft_folder(tmp_path / "data", train=examples)
    config = train_sft.Config("", "", batch_size=2, rows_per_step=4)
    steps = load_steps(SFTDataset(data, "train", 2, "pad"), config, ALONE, 0, sft_batches(config))
    epochs = []
    for _ in range(2):
        batches = [batch for _ in range(3) for batch in next(steps)]
        x = torch.cat([batch.x for batch in batches])
        epochs.append(x[:, 0].tolist())
    assert sorted(epochs[0]) == sorted(epochs[1]) == [*range(11), 256]  # 256: the filler
    assert epochs[0] != epochs[1]


# ----- schedule and optimiser --------------------------------------------------------------------


def lrs(n_steps, warmup_steps):
    config = train_gpt2.Config("", "", learning_rate=1.0, warmup_steps=warmup_steps)
    return [get_lr(step, n_steps, config) for step in range(n_steps)]


def test_the_learning_rate_at_its_corners():
    found = lrs(10, warmup_steps=4)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]  # step 0 is not wasted; the last warm-up is the peak
    assert found[6] == pytest.approx(0.55)  # half-way down: the mean of 1 and 0.1
    assert found[9] == pytest.approx(0.1)  # the last step has a tenth of the peak
    assert found[3:] == sorted(found[3:], reverse=True)
    assert lrs(4, warmup_steps=1000) == [0.25, 0.5, 0.75, 1.0]  # clipped to the run
    assert lrs(2, warmup_steps=0) == pytest.approx([0.55, 0.1])
    assert lrs(1, warmup_steps=0) == pytest.approx([0.1])
    assert lrs(1, warmup_steps=1) == [1.0]


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


def test_one_batch_is_learned_by_heart():
    model = tiny_model(spread=0.0)
    config = train_gpt2.Config("", "", weight_decay=0.0)
    optimizer = make_optimizer(model, config)
    batch = CASES["weights of 7, 50 and 100 %"]
    losses = [train_step(model, optimizer, [batch], 1e-2, 1.0, ALONE, forward_sft)["loss"]
              for _ in range(60)]  # fmt: skip
    assert abs(losses[0] - math.log(320)) < 0.1  # nothing is known yet
    assert losses[-1] < 0.05


# ----- evaluation --------------------------------------------------------------------------------


def test_evaluate_is_the_mean_over_all_trained_tokens_of_unequal_batches():
    model = tiny_model()
    batch = CASES["weights of 7, 50 and 100 %"]
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


def test_evaluate_counts_right_predictions_by_hand():
    x = torch.tensor([[1, 2, 3, 4]])
    model = tiny_model()
    y = model(x).argmax(-1)  # what it predicts
    y[0, 0], y[0, 1] = (y[0, 0] + 1) % 320, -100
    found = evaluate(model, [MicroBatch(x, y)], ALONE)
    assert found["val_accuracy"] == pytest.approx(2 / 3)


# ----- importing does nothing --------------------------------------------------------------------

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
heavy = {"datasets", "matplotlib", "tyro", "pyarrow", "transformers", "pandas", "wandb"}
print(sorted(heavy & set(sys.modules)), os.listdir("."))
"""


def test_importing_the_trainers_does_nothing(tmp_path):
    """No process group, seed, file, CUDA or command line, and no library that a run can do without.

    RANK and WORLD_SIZE are set, as under torchrun: an import must not act on them.
    """
    import os

    here = str(Path(train_gpt2.__file__).parent)
    found = subprocess.run(
        [sys.executable, "-c", WATCHED, "--no_such_flag", here],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"RANK": "0", "WORLD_SIZE": "2", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert found.stdout == "[] []\n", found.stderr
    assert not found.stderr


@pytest.mark.parametrize("layout", ["fit", "stream", "pad"])
def test_compiled_blocks_are_not_compiled_again_after_the_first_steps(layout, sft_shards):
    """What differs from step to step (segments, the number of targets) stays outside the graphs."""
    torch._dynamo.reset()
    data = sft_shards([{"prompt": "x" * n, "response": "y" * (1 + n % 5)} for n in range(1, 40)])
    config = train_sft.Config(data=data, out="", layout=layout, block_size=64, batch_size=2,
                              rows_per_step=2, n_layer=2, n_head=2, n_embd=16)  # fmt: skip
    model = GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=16))
    for block in model.transformer.h:
        block.compile(backend="aot_eager")
    run, rows = train_gpt2.Run(0, 1, torch.device("cpu")), train_sft.open_rows(config, "train")
    optimizer = train_gpt2.make_optimizer(model, config)
    steps = train_gpt2.load_steps(rows, config, run, 0, train_sft.sft_batches(config))
    compiled = []
    for _ in range(8):
        train_gpt2.train_step(model, optimizer, next(steps), 1e-3, 1.0, run, forward_sft)
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[0] > 0
    assert compiled[-1] == compiled[2]
    torch._dynamo.reset()
