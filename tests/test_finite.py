"""A number that is not finite reaches neither the weights nor a checkpoint, and is named."""

import json
import math
import shutil

import pytest
import torch
from helpers_training import (
    ALONE,
    fine_tune,
    metrics,
    pick,
    pretrain,
    random_examples,
    save_tiny_model,
    sft_folder,
    step_cases,
    text_folder,
    tiny_model,
)
from safetensors.torch import load_file, save_file

import train_gpt2
import train_sft
from model import GPT
from nanosft.checks import bad_examples
from nanosft.errors import UserError, to_json
from nanosft.ranks import Ranks
from nanosft.run import best_checkpoint
from nanosft.weights import newest_checkpoint
from train_gpt2 import make_optimizer, save_checkpoint, train_step
from train_sft import forward_sft

POISON = 200  # a row or example with this id gives a loss of nan
FLAGS = {"max_steps": 4, "save_every": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Only row 3 of the text and example 5 of the chats hold POISON."""
    folder = tmp_path_factory.mktemp("data")
    text = [7] * 200
    text[3 * 16 + 4] = POISON
    examples = [([65 + n, 66, 67, 256], [0, 0, 100, 100]) for n in range(12)]
    examples[5] = ([65, POISON, 67, 256], [0, 0, 100, 100])
    return {"text": text_folder(folder / "text", train=text, val=text),
            "sft": sft_folder(folder / "sft", train=examples, val=examples)}


@pytest.fixture
def poisoned(monkeypatch):
    for module, name in ((train_gpt2, "forward_text"), (train_sft, "forward_sft")):
        monkeypatch.setattr(module, name, poison(getattr(module, name)))


def poison(forward):
    def poisoned(model, x, *rest):
        loss = forward(model, x, *rest)
        return loss * math.nan if (x == POISON).any() else loss

    return poisoned


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.inf)])
def test_step_with_a_bad_number_changes_no_weight_and_no_optimizer_state(loss, norm):
    model = tiny_model()
    optimizer = make_optimizer(model, train_gpt2.Config("", ""))
    batch = step_cases()["a short last batch"]
    train_step(model, optimizer, [batch], 1e-3, 1.0, ALONE, forward_sft)
    before = [t.clone() for t in every_tensor(model, optimizer)]

    def forward(model, *args):
        return forward_sft(model, *args) * loss * (1e38 * 1e38 if norm == math.inf else 1.0)

    row = train_step(model, optimizer, [batch, batch], 1e-3, 1.0, ALONE, forward)
    assert not math.isfinite(row["loss"] + row["grad_norm"])
    assert all(map(torch.equal, before, every_tensor(model, optimizer)))


def every_tensor(model, optimizer) -> list:
    return [*model.parameters(), *(value for state in optimizer.state.values()
                                   for value in state.values())]


@pytest.mark.parametrize("kind, run, named", [
    ("text", pretrain, r"row 3 '\x07\x07\x07\x07�\x07\x07"),
    ("sft", fine_tune, "example 5 'A�C"),
])
def test_bad_step_names_the_step_and_the_example_and_the_run_can_go_on(
        kind, run, named, data, tmp_path, monkeypatch, request):
    run(data[kind], tmp_path / "whole", **FLAGS)
    with monkeypatch.context():
        request.getfixturevalue("poisoned")
        with pytest.raises(UserError) as error:
            run(data[kind], tmp_path / "out", **FLAGS)
    line = str(error.value)
    assert line.startswith("step ") and ": the loss is nan, the gradient norm nan; " in line
    assert "; lower --learning_rate, " in line and f"; not finite: {named}" in line
    assert len(line) <= 300
    monkeypatch.undo()
    run(data[kind], tmp_path / "out", resume=True, **FLAGS)
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("seed", range(3))
def test_bad_example_is_named_in_the_last_step_of_an_epoch_too(seed, data, tmp_path, poisoned):
    """When the rows of the next epoch, in another order, are already loaded."""
    with pytest.raises(UserError, match="not finite: example 5 "):
        fine_tune(data["sft"], tmp_path, epochs=2, seed=seed, rows_per_step=12, layout="pad")


class Rows:
    """23 rows; an example is called by its epoch, row and first column."""

    def __len__(self) -> int:
        return 23

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def name_of(self, i: int, column: int) -> str:
        return f"epoch {self.epoch} row {i} column {column}"


@pytest.mark.parametrize("rank, step, bad, named", [
    # steps of 8 rows, 3 an epoch; of each 4 rows, rank 0 has the first two and rank 1 the others
    (0, 1, [(0, 0, 0)], ["epoch 0 row 0 column 0"]),
    (1, 5, [(1, 1, 3)], ["epoch 1 row 15 column 3"]),  # step 1 of epoch 1: row 8 + 2 * 3 + 1
    (0, 6, [(1, 1, 0)], ["epoch 1 row 21 column 0"]),  # step 2: row 16 + 2 * 2 + 1
    (1, 6, [(1, 0, 0), (1, 1, 0)], ["epoch 1 row 22 column 0"]),  # row 23 is a filler
])
def test_each_of_two_ranks_names_its_own_examples(rank, step, bad, named):
    """bad: (micro-batch, its row, first column) of the examples that give nan."""
    x = torch.full((2, 2, 6), 65)  # (micro-batches, B, T), two examples of 3 tokens in each row
    for m, b, column in bad:
        x[m, b, column + 1] = POISON
    segments = torch.tensor([0, 0, 0, 1, 1, 1]).expand(2, 6)
    batches = [train_gpt2.MicroBatch(part, part, segments=segments) for part in x]
    config = train_gpt2.Config("", "", batch_size=2, rows_per_step=8)
    found = bad_examples(step, batches, Rows(), config, None, poison(lambda *_: torch.tensor(1.0)),
                         Ranks(rank, 2, torch.device("cpu")), decode=lambda ids: "AB")
    assert found == [f"{name} 'AB'" for name in named]


@pytest.mark.parametrize("bad_step, last", [(3, "step_000002"), (4, "step_000003"), (1, None)])
def test_weights_that_give_no_finite_loss_never_become_a_checkpoint(
        bad_step, last, data, tmp_path, monkeypatch):
    """As after a far too large learning rate; step 4 is the last one of the run."""
    get_lr = train_gpt2.get_lr

    def absurd(step, *args):
        return 1e30 if step == bad_step - 1 else get_lr(step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "get_lr", absurd)
        with pytest.raises(UserError, match=f"^step {bad_step}: its weights are not saved, because "
                                            "they give a loss of (nan|inf); lower --learning_rate"):
            pretrain(data["text"], tmp_path / "out", **FLAGS)
    found = newest_checkpoint(tmp_path / "out")
    assert (found and found.name) == last
    pretrain(data["text"], tmp_path / "out", resume=True, **FLAGS)
    assert newest_checkpoint(tmp_path / "out").name == "step_000004"


@pytest.mark.parametrize("what, named", [("weight", "transformer.h.0.ln_1.weight holds"),
                                         ("state", "exp_avg_sq of transformer.wpe.weight holds")])
def test_checkpoint_with_a_number_that_is_not_finite_is_not_written(what, named, tmp_path):
    model = tiny_model()
    optimizer = make_optimizer(model, train_gpt2.Config("", ""))
    batch = pick(step_cases()["a short last batch"], 0)
    train_step(model, optimizer, [batch], 1e-3, 1.0, ALONE, forward_sft)
    save_checkpoint(str(tmp_path), 1, model, optimizer, {}, keep=1)
    if what == "weight":
        model.transformer.h[0].ln_1.weight.data[3] = math.inf
    else:
        optimizer.state[model.transformer.wpe.weight]["exp_avg_sq"][0, 0] = math.nan
    with pytest.raises(UserError, match=f"^step 2 is not saved: {named} a number that is not fin"):
        save_checkpoint(str(tmp_path), 2, model, optimizer, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_when_loaded(number, tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["h.1.mlp.c_fc.bias"][5] = number
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc\.bias holds a number that is not finite"):
        GPT.from_pretrained(str(folder))


@pytest.mark.parametrize("flag, value", [
    ("grad_clip", math.nan), ("grad_clip", math.inf), ("learning_rate", 1e6), ("keep", -1),
    ("max_steps", 0), ("n_embd", 0), ("dist_timeout", math.nan), ("max_minutes", 0)])
def test_trainer_that_is_not_called_from_the_command_line_refuses_them_too(
        flag, value, data, tmp_path):
    """test_flags.py tries every flag of every command."""
    with pytest.raises(UserError, match=f"^--{flag} {value}.* must be (at least|more than) [01]"):
        pretrain(data["text"], tmp_path / "out", **{flag: value})
    assert not (tmp_path / "out").exists()


# ----- the best checkpoint -----------------------------------------------------------------------


def test_keep_never_deletes_the_lowest_val_loss_and_the_last_line_names_it(tmp_path, monkeypatch):
    losses = iter([9.0, 3.0, 1.25, 2.0, 4.0])  # at the start and after each step

    def evaluate(*args):
        return {"val_loss": next(losses)}

    monkeypatch.setattr(train_gpt2, "evaluate", evaluate)
    data = sft_folder(tmp_path / "data", train=random_examples(8), val=random_examples(2))
    printed = fine_tune(data, tmp_path / "out", keep=1, eval_every=1, **FLAGS)
    best = tmp_path / "out/step_000002"
    assert sorted(p.name for p in (tmp_path / "out").glob("step_*")) == [best.name, "step_000004"]
    last = printed.splitlines()[-1]
    assert last == f"next: python chat.py --model {best}  # the lowest val_loss, 1.2500"


def test_json_has_null_where_a_number_is_not_finite():
    row = {"a": math.inf, "b": [-math.inf, {"c": math.nan}], "d": 1.5, "e": "Infinity", "f": 2**70}
    assert json.loads(to_json(row), parse_constant=pytest.fail) == {
        "a": None, "b": [None, {"c": None}], "d": 1.5, "e": "Infinity", "f": 2**70}


def test_metrics_of_an_evaluation_that_is_not_finite_are_json(tmp_path, monkeypatch):
    """Training goes on: only the validation split has such an example."""
    data = sft_folder(tmp_path / "data", train=random_examples(4), val=random_examples(2))
    monkeypatch.setattr(train_gpt2, "evaluate", lambda *args: {"val_loss": math.inf})
    fine_tune(data, tmp_path / "out", max_steps=2)
    lines = (tmp_path / "out/metrics.jsonl").read_text("utf-8").splitlines()
    last = json.loads(lines[-1], parse_constant=pytest.fail)
    assert last["val_loss"] is None and last["loss"] > 0
    assert best_checkpoint(tmp_path / "out") == (math.inf, None)


def test_best_checkpoint_knows_nan_half_a_line_and_deleted_checkpoints(tmp_path):
    assert best_checkpoint(tmp_path) == (math.inf, None)
    for step in (2, 4, 6, 8):
        (tmp_path / f"step_{step:06d}").mkdir()
    rows = [{"step": 2, "val_loss": 2.0}, {"step": 3, "val_loss": 0.1}, {"step": 4, "loss": 0.2},
            {"step": 6, "val_loss": 1.5}, {"step": 8, "val_loss": math.nan}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 8, "val_loss": 0.1'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert best_checkpoint(tmp_path) == (1.5, tmp_path / "step_000006")
    shutil.rmtree(tmp_path / "step_000006")
    assert best_checkpoint(tmp_path) == (2.0, tmp_path / "step_000002")
