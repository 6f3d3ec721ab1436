"""Nothing is lost: two runs in one folder, a stop, a full disk, ranks that differ, dead workers.

runs/torture.sh does the same to whole runs from outside; docs/faults.md says what a user sees.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
from helpers_processes import children_of, is_alive
from helpers_training import (
    ALONE,
    assert_weights_close,
    fine_tune,
    metrics,
    random_examples,
    resume_on,
    sft_folder,
    two_ranks,
    weights_of,
)

import fineweb
import sft_data
import train_gpt2
from nanosft import checks, run as run_module, sources
from nanosft.errors import UserError
from nanosft.ranks import SIGNALED, Stop
from nanosft.run import Run
from nanosft.weights import checkpoints, newest_checkpoint
from train_gpt2 import Ranks

ROOT = Path(__file__).parents[1]
HERE = socket.gethostname()
TORTURE = pytest.mark.skipif("TORTURE" not in os.environ, reason="long; see runs/torture.sh")
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture(autouse=True)
def own_signals():
    """Put the test runner's signal handlers back."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """11 examples: 3 steps an epoch, the last one short."""
    examples = random_examples(11, longest=17)
    return sft_folder(tmp_path_factory.mktemp("data") / "sft", train=examples, val=examples[:3])


FLAGS = {"epochs": 3, "layout": "pad"}  # 9 steps


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    fine_tune(data, out, **FLAGS)
    return out


def assert_bitwise_equal(a, b):
    assert metrics(a) == metrics(b)
    assert all(torch.equal(x, y) for x, y in zip(weights_of(a), weights_of(b), strict=True))


def before_step(step, action, monkeypatch) -> None:
    """Call action() in the training loop, after `step` steps."""
    get_lr = train_gpt2.get_lr

    def get_lr_after(now, *args):
        if now == step:
            action()
        return get_lr(now, *args)

    monkeypatch.setattr(train_gpt2, "get_lr", get_lr_after)


# ----- two runs in one folder --------------------------------------------------------------------


def test_second_run_in_a_folder_is_told_who_trains_there_until_that_one_is_killed(
        data, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    code = (f"import time; from nanosft.checks import lock; held = lock({str(out)!r})\n"
            "print('held', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                          text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        for resume in (True, False):
            with pytest.raises(UserError, match=f"in use by process {holder.pid} on {HERE}; stop"):
                fine_tune(data, out, resume=resume, **FLAGS)
        holder.kill()
    assert "is finished" in fine_tune(data, out, resume=True, **FLAGS)


def test_run_holds_the_lock_from_its_first_row_to_its_end(data, tmp_path, monkeypatch):
    """wandb's end included: it writes into the run's folder, too."""
    def is_free() -> bool:
        assert (tmp_path / "out/lock").read_text() == f"process {os.getpid()} on {HERE}"
        try:
            filelock.FileLock(tmp_path / "out/lock").acquire(timeout=0).lock.release()
        except filelock.Timeout:
            return False
        return True

    seen = []
    before_step(1, lambda: seen.append(is_free()), monkeypatch)
    run = SimpleNamespace(log=lambda *args, **_: None, finish=lambda: seen.append(is_free()))
    wandb = SimpleNamespace(init=lambda **_: run, __spec__=True)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    fine_tune(data, tmp_path / "out", wandb="project", **FLAGS)
    assert [*seen, is_free()] == [False, False, True]


def test_resume_starts_again_where_a_run_was_killed_before_its_first_checkpoint(
        data, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    for folder in out.glob("step_*"):
        shutil.rmtree(folder)
    (out / "step_000002.tmp").mkdir()
    for name in ("answers.jsonl", "run.json.tmp7", "lock"):
        (out / name).touch()
    (out / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    fine_tune(data, out, resume=True, **FLAGS)
    assert_bitwise_equal(out, whole)


@needs_proc
def test_process_ends_with_its_parent():
    """As a rank whose torchrun was killed. The parent here prints the child's id and is killed."""
    code = ("import os, subprocess, sys, time\n"
            "child = 'import os, sys, time; from nanosft.cli import end_with\\n'\n"
            "child += 'end_with(os.getppid()); print(os.getpid(), flush=True); time.sleep(60)'\n"
            "subprocess.Popen([sys.executable, '-c', child]); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                          text=True) as parent:
        child = int(parent.stdout.readline())
        assert is_alive(child)
        parent.kill()
        wait_until(lambda: not is_alive(child))


@needs_proc
def test_rank_that_does_not_stop_has_torchruns_own_grace_time():
    """Here 0 s; for a large checkpoint, minutes."""
    code = ("import os, signal, time; from nanosft.cli import end_with\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN); end_with(0)  # no such parent\n"
            "time.sleep(20)")
    env = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, timeout=15)
    assert done.returncode == 128 + signal.SIGTERM


def test_slurm_script_passes_its_cores_on_and_leaves_time_to_save(tmp_path):
    """srun of Slurm 22.05 and 23.02 does not read the job's --cpus-per-task."""
    script = (ROOT / "runs/slurm.sh").read_text()
    asked = dict(line[len("#SBATCH --") :].split("=") for line in script.splitlines()
                 if line.startswith("#SBATCH") and "=" in line)
    for name, body in {"scontrol": "echo host0", "srun": 'echo "$@"; env'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT),
           "SLURM_JOB_NODELIST": "host[0-1]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7",
           "SLURM_CPUS_PER_TASK": asked["cpus-per-task"]}
    done = subprocess.run(["bash", "runs/slurm.sh", "--data", "d"], cwd=ROOT, env=env, text=True,
                          capture_output=True, check=True)
    call, *env = done.stdout.splitlines()
    assert call.startswith(f"--cpus-per-task={asked['cpus-per-task']} torchrun --nnodes=2 ")
    assert call.endswith(" train_sft.py --resume --data d")
    grace = int(dict(line.split("=", 1) for line in env if "=" in line)
                ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    name, _, seconds = asked["signal"].partition("@")  # before the end of the job
    assert name == "TERM" and grace < int(seconds)


def wait_until(found, seconds: int = 20) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


# ----- stopped politely --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_run_saves_and_resumes_bitwise(number, data, whole, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        before_step(4, lambda: os.kill(os.getpid(), number), patch)
        with pytest.raises(SystemExit) as stop:
            fine_tune(data, out, save_every=0, **FLAGS)
    assert stop.value.code == 128 + number
    printed = capfd.readouterr().err
    assert "stopping after this step or the next; a second signal stops at once" in printed
    assert [folder.name for folder in checkpoints(out)] == ["step_000005"]
    assert len(metrics(out)) == 5
    fine_tune(data, out, resume=True, save_every=0, **FLAGS)
    assert_bitwise_equal(out, whole)


def test_max_minutes_stops_each_start_after_a_step_with_exit_code_0(data, whole, tmp_path):
    out, flags = tmp_path / "out", FLAGS | {"save_every": 0, "resume": True}
    for step in range(1, 9):
        with pytest.raises(SystemExit) as stop:
            fine_tune(data, out, max_minutes=1e-6, **flags)
        assert stop.value.code == 0
        assert newest_checkpoint(out).name == f"step_{step:06d}"
    printed = fine_tune(data, out, max_minutes=1e-6, **flags)
    assert "done: " in printed  # the time was up again, but so was the run
    assert_bitwise_equal(out, whole)


def test_all_ranks_stop_when_one_of_them_has_a_signal():
    class SomeRanks(Ranks):
        others = 0

        def sum(self, tensor):
            return tensor + self.others

    ranks = SomeRanks(0, 3, torch.device("cpu"))
    assert not ranks.agree_to_stop() and ranks.stop.exit_code() == 0
    ranks.others = SIGNALED + 1  # one of them has a SIGTERM, and the time of the other is up
    assert ranks.stop.asked() == 0 and ranks.agree_to_stop()
    assert ranks.stop.exit_code() == 143
    ranks.others = 2
    assert ranks.agree_to_stop() and ranks.stop.exit_code() == 0


def test_second_signal_ends_the_process_at_once_unless_it_is_a_repeated_first(monkeypatch, capfd):
    codes, stop = [], Stop()
    monkeypatch.setattr(os, "_exit", codes.append)
    stop.listen(None)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # a scheduler's, to the launcher and to its ranks
    assert codes == [] and stop.asked()
    stop.since -= 2
    os.kill(os.getpid(), signal.SIGINT)
    assert codes == [130]


def test_interrupt_of_other_commands_is_one_line(command, monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(fineweb, "main", interrupted)
    result = command(fineweb, "--out", "out")
    assert (result.code, result.err) == (130, "error: interrupted\n")


# ----- a full disk -------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size: int):
    """Writes beyond `size` bytes of a file fail, as on a full disk, but with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# a tokenizer of 10 KB, weights of 32 KB, and Adam's moments of 70 KB
@pytest.mark.parametrize("size", [6_000, 20_000, 50_000])
def test_full_disk_while_saving_is_one_line_and_loses_nothing(
        size, data, whole, tmp_path, monkeypatch):
    out, full = tmp_path / "out", contextlib.ExitStack()
    with full, monkeypatch.context() as patch:
        before_step(3, lambda: full.enter_context(largest_file(size)), patch)
        with pytest.raises(UserError) as error:
            fine_tune(data, out, **FLAGS)
    assert str(error.value).startswith(f"{out}/step_000004: ")
    assert f"a checkpoint needs 0.1 MB, the last one is {out}/step_000002" in str(error.value)
    assert [path.name for path in out.glob("*step*")] == ["step_000002"]
    fine_tune(data, out, resume=True, **FLAGS)
    assert_bitwise_equal(out, whole)


def test_full_disk_while_logging_names_the_folder(data, tmp_path):
    with largest_file(100), pytest.raises(UserError, match=r"out: File too large \(.* MB free\); "):
        fine_tune(data, tmp_path / "out", **FLAGS)
    fine_tune(data, tmp_path / "out", resume=True, **FLAGS)


@pytest.mark.parametrize("module, size, name", [
    (fineweb, 1000, "train_000000.npy"), (sft_data, 1000, "train_000000.npy"),
    (fineweb, 350, "meta.json"), (sft_data, 350, "meta.json")])
def test_full_disk_while_preparing_data_names_the_file_and_leaves_nothing(
        module, size, name, command, jsonl, tmp_path):
    n = 40 if size == 1000 else 1
    source = jsonl("a.jsonl", [{"text": "some text of a document"}] * n)
    more = ["--val_fraction", 0] if module is sft_data else []
    with largest_file(size):
        result = command(module, "--source", source, "--encoding", "bytes", "--workers", 1,
                         "--out", tmp_path / "out", *more)
    assert (result.code, result.err.count("\n")) == (2, 1), result
    assert f"/{name}: " in result.err and "free some space" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("done, least", [(0, 24_000), (2, 12_000)])  # one is there already
def test_start_is_refused_where_a_checkpoint_and_its_copy_do_not_fit(done, least, monkeypatch):
    """A model of 1,000 parameters: 12 kB a checkpoint."""
    model, run = torch.nn.Linear(999, 1), SimpleNamespace(out=Path("out"), done=done)
    monkeypatch.setattr(checks, "free_bytes", lambda path: least)
    checks.check_disk(run, model)
    monkeypatch.setattr(checks, "free_bytes", lambda path: least - 1)
    with pytest.raises(UserError, match=r"^--out out: 0\.0 MB free, but a checkpoint and its "
                                        r"temporary copy need 0\.0 MB; free some space"):
        checks.check_disk(run, model)


def test_metrics_are_on_disk_before_the_checkpoint_that_follows_them(data, tmp_path, monkeypatch):
    flushed, flush = [], run_module.flush
    monkeypatch.setattr(run_module, "flush",
                        lambda path: (flushed.append(path.name), flush(path))[1])
    fine_tune(data, tmp_path / "out", **FLAGS | {"max_steps": 1})
    saved = flushed.index("metrics.jsonl")
    assert saved < flushed.index("training_state.pt") < flushed.index("step_000001.tmp")


# ----- several ranks -----------------------------------------------------------------------------


@pytest.mark.parametrize("key, mine, other", [
    ("step", 10, 5), ("seed", 0, 1), ("data_sha256", ["a"], ["b"]),
    ("dtype_used", "float32", "bfloat16"), ("torch", torch.__version__, "2.11.0"),
    ("numpy", np.__version__, "1.26.4")])
def test_rank_that_differs_is_named_with_its_host_and_both_values(key, mine, other, monkeypatch):
    meta = {"splits": {"train": {"files": [{"sha256": "a"}]}}}
    run = Run(train_gpt2.Config("data", "out"), meta, 20, ALONE).identity
    assert key == "step" or run[key] == mine  # what `auto` means here, too

    def two_hosts(report):
        changed = run | ({} if key == "step" else {key: other})
        monkeypatch.setattr(checks, "gather_objects",
                            lambda theirs: [report, ("b", *theirs[1:])])
        done = other if key == "step" else 10
        return checks.check_ranks(changed | {"data": "/mnt/data"}, done)

    def first_host(report):
        return two_hosts(("a", *report[1:]))

    monkeypatch.setattr(checks, "gather_objects", first_host)
    with pytest.raises(UserError, match=f"^rank 1 on b has {key} .*, but rank 0 on a has .*; use"):
        checks.check_ranks(run, 10)


@pytest.mark.parametrize("world_size", [1, pytest.param(4, marks=TORTURE)])
def test_run_of_two_ranks_continues_on_one_or_four(world_size, tmp_path):
    """Same rows and same losses, up to rounding."""
    whole = two_ranks() / "out_sft"
    out = shutil.copytree(whole, tmp_path / "out")
    for folder in checkpoints(out)[2:]:  # keep steps 2 and 4
        shutil.rmtree(folder)
    resume_on(world_size, two_ranks() / "sft", out)
    starts = json.loads((out / "run.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [2, world_size]
    for ours, theirs in zip(metrics(out), metrics(whole), strict=True):
        for key in ("step", "tokens", "trained_tokens", "lr"):
            assert ours[key] == theirs[key]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert_weights_close(out, whole)


# ----- data preparation --------------------------------------------------------------------------


def die(chunk):
    os.kill(os.getpid(), signal.SIGKILL)


def test_dead_worker_is_one_line():
    with pytest.raises(UserError, match="a worker process died: it was killed, or memory ran out"):
        list(sources.ordered_map(die, [[1], [2]], 2))


def process_of(chunk) -> int:
    return os.getpid()


def test_workers_are_capped_at_the_cores(monkeypatch):
    for cores in (1, 2):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)  # noqa: B023
        found = set(sources.ordered_map(process_of, range(50), 100_000))
        assert len(found) <= cores and (os.getpid() in found) == (cores == 1)


@needs_proc
def test_workers_end_with_their_parent_and_the_next_run_names_what_it_left(tmp_path, command):
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("Some lines\nof text\n" * 2_000_000)
    flags = ["--source", source, "--encoding", "bytes", "--workers", 2, "--out", out,
             "--shard_tokens", 100_000, "--val_tokens", 0]
    with subprocess.Popen([sys.executable, ROOT / "fineweb.py", *map(str, flags)], cwd=ROOT,
                          stderr=subprocess.DEVNULL) as parent:
        wait_until((tmp_path / "out.tmp/train_000001.npy").exists)
        workers = children_of(parent.pid)
        assert len(workers) == 2
        parent.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in workers))
    source.write_text("short")
    result = command(fineweb, *flags)
    assert result.code == 2 and "out.tmp: left by a command that was killed or still" in result.err
    shutil.rmtree(tmp_path / "out.tmp")
    assert command(fineweb, *flags).code == 0
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
