"""A run that was killed and resumed equals one that was not, bit for bit; and a run's files."""

import copy
import dataclasses
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_training import (
    ALONE,
    assert_weights_close,
    fine_tune,
    metrics,
    pretrain,
    random_examples,
    save_tiny_model,
    sft_folder,
    text_folder,
    tiny_flags,
    tiny_model,
    weights_of,
)

import train_gpt2
import train_sft
from model import GPTConfig
from nanosft import checks, run as run_module
from nanosft.errors import UserError
from nanosft.run import Run, git_commit, read_log
from train_gpt2 import load_checkpoint, make_model, make_optimizer, save_checkpoint

RUNS = {"pretraining": pretrain, "sft": fine_tune}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards of each kind with 11 rows: 3 steps an epoch, the last one short."""
    folder = tmp_path_factory.mktemp("data")
    ids = np.random.default_rng(0).integers(0, 257, 16 * 11 + 3).tolist()
    examples = random_examples(11, longest=17)
    return {
        "pretraining": text_folder(folder / "text", train=ids, val=ids[:50]),
        "sft": sft_folder(folder / "sft", train=examples, val=examples[:3]),
        "other": sft_folder(folder / "other", train=examples[::-1], val=examples[:3]),
    }


NUMPY = np.__version__
FLAGS = {"pretraining": {"epochs": 3}, "sft": {"epochs": 3, "layout": "pad"}}  # 9 steps each


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run of 9 steps of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    for kind, run in RUNS.items():
        run(data[kind], folder / kind, **FLAGS[kind])
        assert [row["step"] for row in metrics(folder / kind)] == list(range(1, 10))
    return {kind: folder / kind for kind in RUNS}


def kill_before(step, run, *args, monkeypatch, **flags):
    """Start a run that is killed after `step` steps."""
    get_lr = train_gpt2.get_lr

    def get_lr_or_die(now, *args):
        if now == step:
            raise KeyboardInterrupt
        return get_lr(now, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "get_lr", get_lr_or_die)
        with pytest.raises(KeyboardInterrupt):
            run(*args, **flags)


def checkpoints_in(out) -> list[str]:
    """What is in OUT beside the logs and run.json."""
    logs = {"metrics.jsonl", "answers.jsonl", "run.json", "lock"}
    return sorted({path.name for path in Path(out).iterdir()} - logs)


def assert_bitwise_equal(a, b):
    assert metrics(a) == metrics(b)
    assert all(torch.equal(x, y) for x, y in zip(weights_of(a), weights_of(b), strict=True))


# killed after 5 steps, a run resumes from step 4 within an epoch, or from step 3, where one ends;
# killed after 1 it has no checkpoint and starts again
@pytest.mark.teach
@pytest.mark.parametrize("save_every, killed, newest",
                         [(2, 5, ["step_000004"]), (3, 5, ["step_000003"]), (2, 1, [])])
@pytest.mark.parametrize("kind", RUNS)
def test_resumed_run_equals_uninterrupted_run_bitwise(
        kind, save_every, killed, newest, data, whole, tmp_path, monkeypatch):
    run, out = RUNS[kind], tmp_path / "out"
    flags = FLAGS[kind] | {"save_every": save_every}
    kill_before(killed, run, data[kind], out, monkeypatch=monkeypatch, **flags)
    assert len(metrics(out)) == killed
    assert checkpoints_in(out)[-1:] == newest
    run(data[kind], out, resume=True, **flags)
    assert_bitwise_equal(out, whole[kind])


def test_run_may_be_killed_twice(data, whole, tmp_path, monkeypatch):
    out, flags = tmp_path / "out", FLAGS["sft"]
    kill_before(3, fine_tune, data["sft"], out, monkeypatch=monkeypatch, **flags)
    kill_before(7, fine_tune, data["sft"], out, monkeypatch=monkeypatch, resume=True, **flags)
    fine_tune(data["sft"], out, resume=True, **flags)
    assert_bitwise_equal(out, whole["sft"])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_training_state_for_a_gpu_is_mapped_until_the_optimizer_has_it_and_resumes_bitwise(
        data, whole, tmp_path, monkeypatch):
    """Eight ranks that read it would need eight times the memory. On a CPU it is read."""
    out, load, seen = tmp_path / "out", train_gpt2.load_checkpoint, []

    def is_mapped() -> bool:
        return f"{out}/step_000004/training_state.pt" in Path("/proc/self/maps").read_text()

    def load_as_for_a_gpu(out, device):
        load(out, device)
        seen.append(is_mapped())
        model, state = load(out, torch.device("meta"))
        seen.append(is_mapped())
        # as a GPU's memory would: hold copies
        monkeypatch.setattr(torch.optim.AdamW, "load_state_dict",
                            lambda optimizer, mapped: load_state(optimizer, copy.deepcopy(mapped)))
        return model, state

    def print_plan(*args):
        seen.append(is_mapped())

    load_state = torch.optim.AdamW.load_state_dict
    kill_before(5, fine_tune, data["sft"], out, monkeypatch=monkeypatch, **FLAGS["sft"])
    monkeypatch.setattr(train_gpt2, "load_checkpoint", load_as_for_a_gpu)
    monkeypatch.setattr(run_module.Run, "print_plan", print_plan)
    fine_tune(data["sft"], out, resume=True, **FLAGS["sft"])
    assert seen == [False, True, False]
    assert_bitwise_equal(out, whole["sft"])


@pytest.mark.parametrize("exists", [True, False], ids=["empty folder", "no folder"])
def test_resume_starts_at_step_0_where_there_is_nothing_to_resume(exists, data, whole, tmp_path):
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    fine_tune(data["sft"], out, resume=True, **FLAGS["sft"])
    assert_bitwise_equal(out, whole["sft"])


@pytest.mark.parametrize("kind", RUNS)
def test_resuming_a_finished_run_reports_it_and_changes_no_file(kind, data, whole):
    before = {path: path.read_bytes() for path in whole[kind].rglob("*") if path.is_file()}
    printed = RUNS[kind](data[kind], whole[kind], resume=True, **FLAGS[kind])
    assert "is finished: step 9 of 9" in printed
    assert before == {path: path.read_bytes() for path in whole[kind].rglob("*") if path.is_file()}


MUST_NOT_CHANGE = {"init": "elsewhere", "n_layer": 2, "n_head": 1, "n_embd": 32, "block_size": 8,
                   "rows_per_step": 2, "learning_rate": 1e-3, "warmup_steps": 3,
                   "weight_decay": 0.5, "grad_clip": 0.5, "seed": 1, "epochs": 2, "max_steps": 8}
SFT_MUST_NOT_CHANGE = {"layout": "fit", "isolate": False, "loss_on": "all", "overlong": "drop",
                       "max_examples": 10}


@pytest.mark.parametrize("kind, key, value",
                         [(kind, *item) for kind in RUNS for item in MUST_NOT_CHANGE.items()]
                         + [("sft", *item) for item in SFT_MUST_NOT_CHANGE.items()])
def test_resume_refuses_flags_of_another_run(kind, key, value, data, whole):
    line = f"--resume: {key} is .*, but .*; use the run's own"
    if key in ("epochs", "max_steps"):
        line = f"--resume: --{key} {value} means . steps, but .* planned for 9; "
    with pytest.raises(UserError, match=line):
        RUNS[kind](data[kind], whole[kind], resume=True, **(FLAGS[kind] | {key: value}))


@pytest.mark.parametrize("flag", ["epochs", "max_steps"])
def test_longer_run_is_another_one_that_starts_from_the_weights_of_the_first(
        flag, data, whole, tmp_path, command):
    """The advice names the flag that was passed; both of its ways work."""
    first, new = shutil.copytree(whole["sft"], tmp_path / "the run"), tmp_path / "new"
    flags = tiny_flags(FLAGS["sft"])
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    run = [train_sft, "--data", data["sft"], "--out", first, "--resume"]
    error = command(*run, *words, f"--{flag}", 12).err
    assert f" --{flag} 12 means " in error and "; use --max_steps 9 or, " in error
    assert f"--init '{first}', a new --out and no --n_layer, --n_head, --n_embd\n" in error
    finished = command(*run, *words, f"--{flag}", 12, "--max_steps", 9)
    assert "is finished: step 9 of 9" in finished.out
    words = [word for name, value in flags.items() if name[:2] != "n_" and name != "init"
             for word in (f"--{name}", value)]
    done = command(train_sft, "--data", data["sft"], "--init", first, "--out", new, *words,
                   f"--{flag}", 12)
    assert done.code == 0 and checkpoints_in(new)


def test_each_flag_either_may_change_or_is_tested_to_be_refused():
    flags = {field.name for field in dataclasses.fields(train_sft.Config)}
    refused = {*MUST_NOT_CHANGE, *SFT_MUST_NOT_CHANGE} - {"epochs", "max_steps"}
    assert flags == checks.MAY_CHANGE | refused
    assert not checks.MAY_CHANGE & refused


def test_resume_refuses_other_data_of_the_same_size(data, whole):
    with pytest.raises(UserError, match="--resume: this is not the data of the run in --out; pass"):
        fine_tune(data["other"], whole["sft"], resume=True, **FLAGS["sft"])


def test_other_flags_may_change_and_the_changes_are_printed(data, whole, tmp_path, monkeypatch):
    out, moved = tmp_path / "out", tmp_path / "moved"
    kill_before(5, fine_tune, data["sft"], out, monkeypatch=monkeypatch, **FLAGS["sft"])
    shutil.copytree(data["sft"], moved)
    free = {"epochs": 1, "max_steps": 9, "batch_size": 4, "eval_every": 0, "log_every": 1}
    printed = fine_tune(moved, out, resume=True, **(FLAGS["sft"] | free))
    assert sorted(line for line in printed.splitlines() if line.startswith("resume")) == sorted([
        f"resume: data is {moved} (was {data['sft']})",
        "resume: batch_size is 4 (was 2)",
        "resume: epochs is 1 (was 3)",
        "resume: max_steps is 9 (was None)",
        "resume: eval_every is 0 (was 3)",
        "resume: log_every is 1 (was 10)",
    ])
    for a, b in zip(metrics(out), metrics(whole["sft"]), strict=True):
        for key in ("step", "loss", "lr", "grad_norm", "tokens", "trained_tokens"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6)
    assert_weights_close(out, whole["sft"])


def test_other_versions_are_printed_and_refused_if_numpy_orders_rows_differently(
        data, whole, tmp_path, monkeypatch):
    out = shutil.copytree(whole["sft"], tmp_path / "out")
    monkeypatch.setattr(np, "__version__", "9.9")
    printed = fine_tune(data["sft"], out, resume=True, **FLAGS["sft"])
    assert f"resume: numpy is 9.9 (was {NUMPY})" in printed
    monkeypatch.setattr(run_module, "order_of", lambda seed: "another")
    with pytest.raises(UserError, match=f"^--resume: numpy 9.9 would put the rows in another order "
                                        f"than {NUMPY} in the run in --out; install that version"):
        fine_tune(data["sft"], out, resume=True, **FLAGS["sft"])


def test_checkpoint_without_versions_is_resumed():
    """Of a nanosft before they were saved."""
    now = {"torch": "2.13", "numpy": "2.3", "order": "a", "dtype_used": "float32", "keep": 2}
    assert checks.check_same_run({"keep": 0}, now) == ["keep is 2 (was 0)"]


def test_without_resume_a_folder_that_holds_a_run_is_left_alone(data, whole):
    with pytest.raises(UserError, match=r"is not empty; .*if it holds a run, use --resume"):
        fine_tune(data["sft"], whole["sft"], **FLAGS["sft"])


@pytest.mark.parametrize("version", [None, 1, 3])
def test_checkpoint_of_another_version_is_refused_by_resume_and_loads_with_init(
        version, data, whole, tmp_path):
    out = shutil.copytree(whole["sft"], tmp_path / "out")
    path = out / "step_000009" / "training_state.pt"
    (path.parent / "SHA256SUMS").unlink()  # earlier versions have none
    state = torch.load(path) | {"version": version}
    if version is None:  # the first format had no version
        del state["version"]
    torch.save(state, path)
    with pytest.raises(UserError, match=f"has format version {version or 1}, expected 2; start a "
                                        f"new run with --init {path.parent}"):
        fine_tune(data["sft"], out, resume=True, **FLAGS["sft"])
    fine_tune(data["sft"], tmp_path / "new", init=str(path.parent), max_steps=1)
    assert checkpoints_in(tmp_path / "new") == ["step_000001"]


# ----- metrics.jsonl and run.json ----------------------------------------------------------------


def test_metrics_are_cut_after_the_step_that_the_run_resumes_from(
        data, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    kill_before(5, fine_tune, data["sft"], out, monkeypatch=monkeypatch, **FLAGS["sft"])
    with (out / "metrics.jsonl").open("a") as log:  # it holds steps 1 to 5; step 4 was saved
        log.write('{"step": 6, "loss": 1e9}\n{"step": 7, "lo')
    fine_tune(data["sft"], out, resume=True, **FLAGS["sft"])
    assert metrics(out) == metrics(whole["sft"])


def test_answers_of_each_evaluation_are_saved_and_cut_like_the_metrics(
        data, tmp_path, monkeypatch):
    flags = FLAGS["sft"] | {"eval_every": 2, "save_every": 2, "eval_prompts": 2}
    fine_tune(data["sft"], tmp_path / "whole", **flags)
    rows = answers(tmp_path / "whole")
    assert [row["step"] for row in rows] == [2, 2, 4, 4, 6, 6, 8, 8, 9, 9]
    assert rows[0].keys() == {"step", "prompt", "reference", "answer", "right", "formed", "stopped"}
    assert "val_answers" not in (tmp_path / "whole/metrics.jsonl").read_text()
    out = tmp_path / "out"
    kill_before(5, fine_tune, data["sft"], out, monkeypatch=monkeypatch, **flags)
    with (out / "answers.jsonl").open("a") as log:
        log.write('{"step": 5, "answer": "\u2028"}\n{"step": 6, "ans')
    fine_tune(data["sft"], out, resume=True, **flags)
    assert answers(out) == rows


def answers(out) -> list[dict]:
    return [json.loads(line) for line in (out / "answers.jsonl").open(encoding="utf-8")]


def empty_run(out) -> Run:
    return Run(train_gpt2.Config("", str(out)), {"splits": {}}, 9, ALONE)


@pytest.mark.parametrize("rest", [
    b'{"step": 3',  # half a line, even where its step would be kept
    b'{"step": 4}\n{"step": 3}\n'])  # of two runs at once, where the file system has no locks
def test_log_is_cut_before_the_first_row_that_is_not_kept(rest, tmp_path):
    path, kept = tmp_path / "metrics.jsonl", b'{"step": 1}\r\n{"step": 2}\n'
    path.write_bytes(kept + rest)
    run = empty_run(tmp_path)
    run.done = 3
    run.open()
    assert path.read_bytes() == kept


@pytest.mark.parametrize("line", ["", "[]", '{"loss": 1}', '{"step": "a"}', '{"step": 1e999}'])
def test_damaged_line_of_a_log_is_named(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2: damaged"):
        list(read_log(tmp_path / "metrics.jsonl"))


def test_printed_line_of_a_step_by_hand(tmp_path, capsys):
    row = {"step": 1, "loss": 2.0, "lr": 1e-3, "grad_norm": 0.5, "tokens": 9, "dt": 0.5,
           "tokens_per_s": 1234.5, "val_loss": 1.5, "val_answers": [{"answer": "A"}]}
    empty_run(tmp_path).write(row)
    assert capsys.readouterr().out == (
        "step      1/9  loss 2.0000  lr 1.00e-03  norm 0.50  1,234 tok/s  val_loss 1.5000\n")


def test_metrics_hold_the_promised_keys(whole):
    rows = [json.loads(line) for line in (whole["sft"] / "metrics.jsonl").open()]
    promised = {"step", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "dt", "tokens_per_s"}
    assert all(promised <= row.keys() for row in rows)
    assert ["val_loss" in row for row in rows] == [False, False, True] * 3  # --eval_every 3
    # each epoch trains the same 11 examples, in steps of 4, 4 and 3
    trained = [row["trained_tokens"] for row in rows]
    assert sum(trained[:3]) == sum(trained[3:6]) == sum(trained[6:])


def test_run_json_holds_flags_data_command_and_versions(data, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_sft.py", "--data", "my data"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    flags = FLAGS["sft"] | {"max_steps": 1}
    fine_tune(data["sft"], tmp_path / "out", **flags)
    found = json.loads((tmp_path / "out" / "run.json").read_text())
    config = train_sft.Config(data["sft"], str(tmp_path / "out"), **tiny_flags(flags))
    assert dataclasses.asdict(config).items() <= found.items()
    assert found["steps"] == 1
    (start,) = found["starts"]
    assert (start["command"], start["world_size"]) == ("train_sft.py --data 'my data'", 1)
    versions = [start[name] for name in ("python", "torch", "numpy")]
    assert versions == [platform.python_version(), torch.__version__, np.__version__]
    assert {"tiktoken", "safetensors"} <= start.keys()
    assert start["git_commit"] == git_commit()
    meta = json.loads(Path(data["sft"], "meta.json").read_text())
    assert found["data_sha256"] == [meta["splits"][split]["files"][0]["sha256"]
                                    for split in ("train", "val")]


def test_run_json_keeps_the_command_of_every_start(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    kill_before(3, fine_tune, data["sft"], out, monkeypatch=monkeypatch, **FLAGS["sft"])
    monkeypatch.setattr("sys.argv", ["train_sft.py", "--resume"])
    fine_tune(data["sft"], out, resume=True, **FLAGS["sft"])
    starts = json.loads((out / "run.json").read_text())["starts"]
    assert len(starts) == 2 and starts[1]["command"] == "train_sft.py --resume"


def test_resume_leaves_a_folder_alone_that_holds_no_run(data, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty; choose another folder or"):
        fine_tune(data["sft"], tmp_path, resume=True, **FLAGS["sft"])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_run_json_that_a_power_loss_emptied_does_not_stop_a_resumed_run(data, whole, tmp_path):
    out = shutil.copytree(whole["sft"], tmp_path / "out")
    shutil.rmtree(out / "step_000009")
    (out / "run.json").write_text("")
    fine_tune(data["sft"], out, resume=True, **FLAGS["sft"])
    assert len(json.loads((out / "run.json").read_text())["starts"]) == 1
    assert_bitwise_equal(out, whole["sft"])


def test_git_commit_is_marked_dirty_where_files_differ_and_none_without_git(tmp_path, monkeypatch):
    def git(*words) -> str:
        return subprocess.check_output(["git", "-c", "user.name=a", "-c", "user.email=a", *words],
                                       cwd=tmp_path, text=True).strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setattr(run_module, "__file__", str(tmp_path / "run.py"))
    assert git_commit() is None  # no repository
    (tmp_path / "file").write_text("a")
    git("init")
    git("add", "file")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag must not replace the commit")
    head = git("rev-parse", "HEAD")
    assert len(head) == 40 and git_commit() == head
    (tmp_path / "file").write_text("b")
    assert git_commit() == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None  # no git


# ----- checkpoints -------------------------------------------------------------------------------


def test_crash_while_saving_leaves_the_previous_checkpoint_and_no_half_one(
        data, whole, tmp_path, monkeypatch):
    out, save = tmp_path / "out", torch.save
    calls = []

    def save_or_die(state, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half a fi")
            raise KeyboardInterrupt
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_or_die)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(data["sft"], out, **FLAGS["sft"])
    assert checkpoints_in(out) == ["step_000002"]
    assert load_checkpoint(str(out))[1]["step"] == 2
    fine_tune(data["sft"], out, resume=True, **FLAGS["sft"])
    assert_bitwise_equal(out, whole["sft"])
    assert checkpoints_in(out) == [f"step_{step:06d}" for step in (2, 4, 6, 8, 9)]


def test_checkpoint_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    flushed, sync = [], os.fsync

    def note(descriptor):
        flushed.append(os.fstat(descriptor).st_ino)
        is_renamed = (tmp_path / "step_000001").exists()
        assert is_renamed == (flushed[-1] == tmp_path.stat().st_ino)  # the run's folder comes last
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    model = tiny_model(n_layer=1)
    optimizer = make_optimizer(model, train_gpt2.Config("", ""))
    saved = save_checkpoint(str(tmp_path), 1, model, optimizer, {}, card="# a card",
                            encoding="bytes", template="chat")
    assert saved == tmp_path / "step_000001"
    files = ["README.md", "SHA256SUMS", "chat_template_generation.jinja", "config.json",
             "generation_config.json", "model.safetensors", "tokenizer.json",
             "tokenizer_config.json", "training_state.pt"]
    assert sorted(path.name for path in (tmp_path / "step_000001").iterdir()) == files
    assert all((tmp_path / "step_000001" / name).stat().st_ino in flushed for name in files)
    assert flushed[-1] == tmp_path.stat().st_ino


@pytest.mark.parametrize("keep, left", [(0, [2, 4, 6, 8, 9]), (1, [9]), (3, [6, 8, 9])])
def test_keep_leaves_the_latest_checkpoints(keep, left, data, tmp_path):
    fine_tune(data["sft"], tmp_path / "out", keep=keep, **FLAGS["sft"])
    assert checkpoints_in(tmp_path / "out") == [f"step_{step:06d}" for step in left]


def test_keep_deletes_only_checkpoints_and_knows_that_step_1000000_is_later(tmp_path):
    model = tiny_model(n_layer=1)
    optimizer = make_optimizer(model, train_gpt2.Config("", ""))
    (tmp_path / "step_000003_the_best").mkdir()
    for step in (999_999, 1_000_000):
        save_checkpoint(str(tmp_path), step, model, optimizer, {}, keep=1)
    assert checkpoints_in(tmp_path) == ["step_000003_the_best", "step_1000000"]


def test_damaged_training_state_is_named_with_the_folder_to_delete(data, whole, tmp_path):
    out = shutil.copytree(whole["sft"], tmp_path / "out")
    (out / "step_000009" / "training_state.pt").write_bytes(b"half a fi")
    with pytest.raises(UserError, match=r"missing or damaged .*; delete .*step_000009") as error:
        fine_tune(data["sft"], out, resume=True, **FLAGS["sft"])
    assert "\n" not in str(error.value)


# ----- --init and other flags --------------------------------------------------------------------


def test_init_starts_from_the_latest_checkpoint_of_a_run_folder(data, whole, tmp_path):
    fine_tune(data["sft"], tmp_path / "out", init=str(whole["pretraining"]), max_steps=1,
              learning_rate=0.0)
    for a, b in zip(weights_of(tmp_path / "out"), weights_of(whole["pretraining"])):
        assert torch.equal(a, b)
    settings = json.loads((tmp_path / "out" / "step_000001" / "config.json").read_text())
    assert (settings["encoding"], settings["template"]) == ("bytes", "chat")


def test_init_continues_from_what_transformers_made_of_a_checkpoint(data, whole, tmp_path):
    """In bfloat16, in several files, and with 258 ids, which the data's 261 fill up again."""
    import transformers

    step_9 = whole["sft"] / "step_000009"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(step_9)
    theirs.resize_token_embeddings(258, mean_resizing=False)
    theirs.bfloat16().save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    fine_tune(data["sft"], tmp_path / "out", init=str(tmp_path / "theirs"), max_steps=1,
              learning_rate=0.0)
    found = weights_of(tmp_path / "out")
    for a, b in zip(found, weights_of(whole["sft"]), strict=True):
        assert torch.equal(a[:258], b.bfloat16().float()[:258])  # no other matrix has 258 rows
    torch.testing.assert_close(found[0][258:261], found[0][:258].mean(0).expand(3, -1))


@pytest.mark.parametrize("sizes, message", [
    ({"vocab_size": 384}, "the model has 384; make the data with the model's encoding"),
    ({"block_size": 8}, "--block_size 16 is above the model's 8; lower it"),
])
def test_model_that_does_not_fit_the_data_is_refused(sizes, message, data, tmp_path):
    folder = save_tiny_model(tmp_path / "model", **sizes)
    with pytest.raises(UserError, match=message):
        fine_tune(data["sft"], tmp_path / "out", init=str(folder))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["n_layer", "n_head", "n_embd"])
def test_sizes_are_only_for_a_model_from_scratch(flag, data, whole, tmp_path):
    init = str(whole["pretraining"])
    with pytest.raises(UserError, match=f"--{flag} 2 is only for --init scratch; --init {init} "):
        pretrain(data["pretraining"], tmp_path / "out", init=init, **{flag: 2})
    assert not (tmp_path / "out").exists()


def test_sizes_that_are_not_given_are_those_of_gpt2():
    config = train_gpt2.Config("", "", block_size=16, n_embd=24)
    assert make_model(config, {"vocab_size": 261}).config == GPTConfig(
        block_size=16, vocab_size=320, n_vocab=261, n_layer=12, n_head=12, n_embd=24)


@pytest.mark.parametrize("flags, message", [
    ({"rows_per_step": 5},
     "--rows_per_step 5 is not a multiple of --batch_size 2 x 1 ranks = 2; try 6"),
    ({"n_embd": 15}, "n_embd 15 is not a multiple of n_head 2"),
    ({"device": "cuda:99"}, "--device cuda:99: not available here"),
])
def test_users_mistake_is_a_user_error_of_one_line(flags, message, data, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        pretrain(data["pretraining"], tmp_path / "out", **flags)
    assert "\n" not in str(error.value)
