"""A run that was killed and resumed is the run that was not, bit for bit."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_training import (
    TINY,
    assert_weights_close,
    fine_tune,
    metrics,
    pretrain,
    random_examples,
    save_tiny_model,
    sft_folder,
    text_folder,
    tiny_model,
    weights_of,
)

import train_gpt2
from train_gpt2 import load_checkpoint, make_optimizer, open_metrics, save_checkpoint

RUNS = {"pretraining": pretrain, "sft": fine_tune}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """{kind: shards}: 11 rows of text, 11 examples, so 3 steps an epoch, the last one short."""
    folder = tmp_path_factory.mktemp("data")
    ids = np.random.default_rng(0).integers(0, 257, 16 * 11 + 3).tolist()
    examples = random_examples(11, longest=17)
    return {
        "pretraining": text_folder(folder / "text", train=ids, val=ids[:50]),
        "sft": sft_folder(folder / "sft", train=examples, val=examples[:3]),
        "other": sft_folder(folder / "other", train=examples[::-1], val=examples[:3]),
    }


FLAGS = {"pretraining": {"epochs": 3}, "sft": {"epochs": 3, "layout": "pad"}}  # 9 steps each


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """{kind: folder of a run of 9 steps that nobody killed}."""
    folder = tmp_path_factory.mktemp("whole")
    for kind, run in RUNS.items():
        run(data[kind], folder / kind, **FLAGS[kind])
        assert [row["step"] for row in metrics(folder / kind)] == list(range(1, 10))
    return {kind: folder / kind for kind in RUNS}


def kill_before(step, run, *args, monkeypatch, **flags):
    """A run that dies after `step` steps, as by a signal."""
    get_lr = train_gpt2.get_lr

    def get_lr_or_die(now, *args):
        if now == step:
            raise KeyboardInterrupt
        return get_lr(now, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "get_lr", get_lr_or_die)
        with pytest.raises(KeyboardInterrupt):
            run(*args, **flags)


def steps_in(out) -> list[str]:
    return sorted(path.name for path in Path(out).iterdir() if path.name != "metrics.jsonl")


def assert_bitwise_equal(a, b):
    assert metrics(a) == metrics(b)
    assert all(torch.equal(x, y) for x, y in zip(weights_of(a), weights_of(b), strict=True))


# save_every 2: killed before step 5 it resumes from 4, in the second epoch, which ends with 6;
# save_every 3: from 3, exactly the edge between the first two epochs
@pytest.mark.parametrize("save_every, killed, newest", [(2, 5, 4), (3, 5, 3), (2, 8, 8)])
@pytest.mark.parametrize("kind", RUNS)
def test_resumed_equals_uninterrupted_bit_for_bit(
    kind, save_every, killed, newest, data, whole, tmp_path, monkeypatch
):
    run, out = RUNS[kind], tmp_path / "out"
    flags = FLAGS[kind] | {"save_every": save_every}
    kill_before(killed, run, data[kind], out, monkeypatch=monkeypatch, **flags)
    assert len(metrics(out)) == killed
    assert steps_in(out)[-1] == f"step_{newest:06d}"
    run(data[kind], out, resume=True, **flags)
    assert_bitwise_equal(out, whole[kind])


def test_a_run_survives_being_killed_twice(data, whole, tmp_path, monkeypatch):
    out, flags = tmp_path / "out", FLAGS["sft"]
    kill_before(3, fine_tune, data["sft"], out, monkeypatch=monkeypatch, **flags)
    kill_before(7, fine_tune, data["sft"], out, monkeypatch=monkeypatch, resume=True, **flags)
    fine_tune(data["sft"], out, resume=True, **flags)
    assert_bitwise_equal(out, whole["sft"])


@pytest.mark.parametrize("kind", RUNS)
def test_resuming_a_finished_run_says_so_and_changes_nothing(kind, data, whole):
    before = {path: path.read_bytes() for path in whole[kind].rglob("*") if path.is_file()}
    said = RUNS[kind](data[kind], whole[kind], resume=True, **FLAGS[kind])
    assert "is finished: step 9 of 9" in said
    assert before == {path: path.read_bytes() for path in whole[kind].rglob("*") if path.is_file()}


IDENTITY = {
    "init": "elsewhere", "n_layer": 2, "n_head": 1, "n_embd": 32, "block_size": 8,
    "rows_per_step": 2, "learning_rate": 1e-3, "warmup_steps": 3, "weight_decay": 0.5,
    "grad_clip": 0.5, "seed": 1, "epochs": 2, "max_steps": 8,
}  # fmt: skip
SFT_IDENTITY = {"layout": "fit", "isolate": False, "loss_on": "all", "overlong": "drop",
                "max_examples": 10}  # fmt: skip


@pytest.mark.parametrize(
    "kind, key, value",
    [(kind, *item) for kind in RUNS for item in IDENTITY.items()]
    + [("sft", *item) for item in SFT_IDENTITY.items()],
)
def test_resume_refuses_flags_that_would_make_another_run(kind, key, value, data, whole):
    assert (TINY | FLAGS[kind]).get(key, "its default") != value
    with pytest.raises(ValueError, match=r"--resume: .* give the run's own flags") as error:
        RUNS[kind](data[kind], whole[kind], resume=True, **(FLAGS[kind] | {key: value}))
    assert "\n" not in str(error.value)
    assert {"epochs": "steps", "max_steps": "steps"}.get(key, key) in str(error.value)


def test_resume_refuses_other_data_of_the_same_size(data, whole):
    with pytest.raises(ValueError, match="--resume: data sha256 is other data"):
        fine_tune(data["other"], whole["sft"], resume=True, **FLAGS["sft"])


def test_what_does_not_change_the_run_may_change_when_it_is_resumed(
    data, whole, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    kill_before(5, fine_tune, data["sft"], out, monkeypatch=monkeypatch, **FLAGS["sft"])
    moved = shutil.copytree(data["sft"], tmp_path / "moved")
    free = {"batch_size": 4, "eval_every": 0, "save_every": 0, "log_every": 1, "eval_prompts": 0}
    fine_tune(moved, out, resume=True, **(FLAGS["sft"] | free))
    for a, b in zip(metrics(out), metrics(whole["sft"]), strict=True):
        for key in ("step", "loss", "lr", "grad_norm", "tokens", "trained_tokens"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6)
    assert_weights_close(out, whole["sft"])


def test_without_resume_a_folder_that_holds_a_run_is_left_alone(data, whole):
    with pytest.raises(ValueError, match="already holds files; --resume goes on with the run"):
        fine_tune(data["sft"], whole["sft"], **FLAGS["sft"])


def test_resume_without_a_checkpoint_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint to resume; leave --resume out"):
        fine_tune(data["sft"], tmp_path / "out", resume=True)


# ----- metrics.jsonl -----------------------------------------------------------------------------


def test_metrics_are_cut_after_the_step_that_the_run_resumes_from(
    data, whole, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    kill_before(5, fine_tune, data["sft"], out, monkeypatch=monkeypatch, **FLAGS["sft"])
    with (out / "metrics.jsonl").open("a") as log:  # step 5 is there; 4 has the checkpoint
        log.write('{"step": 6, "loss": 1e9}\n{"step": 7, "lo')
    fine_tune(data["sft"], out, resume=True, **FLAGS["sft"])
    assert metrics(out) == metrics(whole["sft"])


def test_a_half_line_is_dropped_even_where_its_step_would_count(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3')
    with open_metrics(str(tmp_path), 3) as log:
        log.write('{"step": 4}\n')
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 4}\n'


def test_metrics_hold_the_promised_keys(whole):
    rows = [json.loads(line) for line in (whole["sft"] / "metrics.jsonl").open()]
    promised = {"step", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "dt", "tokens_per_s"}
    assert all(promised <= row.keys() for row in rows)
    assert ["val_loss" in row for row in rows] == [False, False, True] * 3  # --eval_every 3
    # an epoch's 11 rows: 4 + 4 + 3 examples, each trained once
    assert sum(row["trained_tokens"] for row in rows[:3]) == sum(
        row["trained_tokens"] for row in rows[3:6]
    )


# ----- checkpoints -------------------------------------------------------------------------------


def test_a_crash_while_saving_leaves_the_previous_checkpoint_and_no_half_one(
    data, whole, tmp_path, monkeypatch
):
    out, save = tmp_path / "out", torch.save
    calls = []

    def save_or_die(state, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half a fi")
            raise OSError("No space left on device")
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_or_die)
        with pytest.raises(OSError, match="No space left"):
            fine_tune(data["sft"], out, **FLAGS["sft"])
    assert [name for name in steps_in(out) if name.startswith("step_")] == ["step_000002"]
    assert load_checkpoint(str(out))[1]["step"] == 2
    fine_tune(data["sft"], out, resume=True, **FLAGS["sft"])
    assert_bitwise_equal(out, whole["sft"])
    assert steps_in(out) == [f"step_{step:06d}" for step in (2, 4, 6, 8, 9)]


def test_a_checkpoint_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    flushed, sync = [], os.fsync

    def note(descriptor):
        flushed.append(os.fstat(descriptor).st_ino)
        renamed = (tmp_path / "step_000001").exists()
        assert renamed == (flushed[-1] == tmp_path.stat().st_ino)  # the run's folder comes last
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    model = tiny_model(n_layer=1)
    config = train_gpt2.Config("", "")
    save_checkpoint(str(tmp_path), 1, model, make_optimizer(model, config), {})
    files = ["config.json", "model.safetensors", "training_state.pt"]
    assert sorted(path.name for path in (tmp_path / "step_000001").iterdir()) == files
    assert all((tmp_path / "step_000001" / name).stat().st_ino in flushed for name in files)
    assert flushed[-1] == tmp_path.stat().st_ino


@pytest.mark.parametrize("keep, left", [(0, [2, 4, 6, 8, 9]), (1, [9]), (3, [6, 8, 9])])
def test_keep_leaves_the_newest_checkpoints(keep, left, data, tmp_path):
    fine_tune(data["sft"], tmp_path / "out", keep=keep, **FLAGS["sft"])
    assert steps_in(tmp_path / "out") == [f"step_{step:06d}" for step in left]


def test_keep_touches_only_checkpoints_and_counts_a_millionth_step_as_newer(tmp_path):
    model = tiny_model(n_layer=1)
    optimizer = make_optimizer(model, train_gpt2.Config("", ""))
    (tmp_path / "step_000003_is_the_good_one").mkdir()
    for step in (999_999, 1_000_000):
        save_checkpoint(str(tmp_path), step, model, optimizer, {}, keep=1)
    assert steps_in(tmp_path) == ["step_000003_is_the_good_one", "step_1000000"]


def test_a_damaged_training_state_names_the_folder_to_delete(data, whole, tmp_path):
    out = shutil.copytree(whole["sft"], tmp_path / "out")
    (out / "step_000009" / "training_state.pt").write_bytes(b"half a fi")
    with pytest.raises(ValueError, match=r"missing or damaged .*; delete .*step_000009") as error:
        fine_tune(data["sft"], out, resume=True, **FLAGS["sft"])
    assert "\n" not in str(error.value)


# ----- --init ------------------------------------------------------------------------------------


def test_init_takes_a_run_folder_and_starts_from_its_newest_checkpoint(data, whole, tmp_path):
    fine_tune(data["sft"], tmp_path / "out", init=str(whole["pretraining"]), max_steps=1,
              learning_rate=0.0)  # fmt: skip
    for a, b in zip(weights_of(tmp_path / "out"), weights_of(whole["pretraining"])):
        assert torch.equal(a, b)
    settings = json.loads((tmp_path / "out" / "step_000001" / "config.json").read_text())
    assert (settings["encoding"], settings["template"]) == ("bytes", "chat")


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"vocab_size": 384}, "the model has 384; make the data with the model's encoding"),
        ({"block_size": 8}, "--block_size 16 is above the model's 8; lower it"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(sizes, message, data, tmp_path):
    folder = save_tiny_model(tmp_path / "model", **sizes)
    with pytest.raises(ValueError, match=message):
        fine_tune(data["sft"], tmp_path / "out", init=str(folder))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"rows_per_step": 5}, r"--rows_per_step 5 is no multiple of --batch_size 2 x 1 .*; try 6"),
        ({"max_steps": 0}, "--max_steps 0: it must be at least 1"),
        ({"n_embd": 15}, "n_embd 15 must be a multiple of n_head 2"),
        ({"n_embd": 0}, "--n_embd 0: it must be at least 1"),
        ({"keep": -1}, "--keep -1: it must be at least 0"),
        ({"log_every": 0}, "--log_every 0: it must be at least 1"),
        ({"device": "cuda:99"}, "--device cuda:99: not to be had here"),
        ({"learning_rate": 1e30}, "step .: the loss is .*; lower --learning_rate"),
    ],
)
def test_a_users_mistake_is_a_value_error_in_one_line(flags, message, data, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        pretrain(data["pretraining"], tmp_path / "out", **({"grad_clip": 0.0} | flags))
    assert "\n" not in str(error.value)
