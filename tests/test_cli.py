"""The command line: a user's mistake is one line and exit code 2, a bug of ours has a traceback.

Several ranks report a mistake once where all of them meet it, and from the rank that alone does.
"""

import dataclasses
import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import torch.distributed as dist
from annotated_types import Ge, Gt, Le, Lt
from helpers_training import TINY, flip_a_bit, text_folder

from nanosft.cli import check_bounds, exit_with, expand_home, run_cli
from nanosft.errors import UserError, one_line, require_choice

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass
class Config:
    rows: int
    batch_size: int = 4
    isolate: bool = True


def run(monkeypatch, main, *flags) -> None:
    monkeypatch.setattr("sys.argv", ["command.py", *flags])
    run_cli(main, Config)


def raising(error):
    def main(config):
        raise error
    return main


def test_tilde_is_the_home_folder_in_every_path_and_only_a_tilde_in_text(monkeypatch, tmp_path):
    @dataclasses.dataclass
    class Paths:
        out: str
        source: tuple[str, ...]
        prompt: str
        steps: int = 3

    monkeypatch.setenv("HOME", str(tmp_path))
    found = expand_home(Paths("~/out", ("~/a.jsonl*2", "b"), "~/what is that?"))
    assert found == Paths(f"{tmp_path}/out", (f"{tmp_path}/a.jsonl*2", "b"), "~/what is that?")


# ----- one process -------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--batch_size", "8", "--no_isolate"],
                                   ["--batch-size", "8", "--no-isolate"]])
def test_flags_may_be_spelled_with_underscores_or_dashes(flags, monkeypatch):
    found = []
    run(monkeypatch, found.append, "--rows", "3", *flags)
    assert found == [Config(rows=3, batch_size=8, isolate=False)]


@pytest.mark.parametrize("error, line", [
    (UserError("a.jsonl line 3: no `prompt`"), "a.jsonl line 3: no `prompt`"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), "a.txt: No such file"),
    (PermissionError(errno.EACCES, "Permission denied", "out"), "out: Permission denied"),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    (dist.DistBackendError("NCCL: remote process exited"), "lost the connection to another rank"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5"),
     "lost the connection to another rank"),
])
def test_users_mistake_is_one_line_and_exit_code_2(error, line, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, raising(error), "--rows", "3")
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    assert printed.err.startswith(f"error: {line}")
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n")


@pytest.mark.parametrize("bug", [ValueError("a bug"), KeyError("a bug"), OSError("a bug"),
                                 RuntimeError("a bug"), ConnectionError("a bug"),
                                 AssertionError("a bug")])
def test_bug_of_ours_keeps_its_traceback(bug, monkeypatch, capsys):
    with pytest.raises(type(bug), match="a bug"):
        run(monkeypatch, raising(bug), "--rows", "3")
    assert capsys.readouterr().err == ""


def test_reader_that_closes_the_pipe_is_no_error():
    """As in `command | head -1`."""
    code = ("import dataclasses; from nanosft.cli import run_cli\n"
            "config_class = dataclasses.make_dataclass('Config', [])\n"
            "run_cli(lambda config: print('line\\n' * 100_000), config_class)")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_message_is_short_and_holds_no_control_character(monkeypatch, capsys):
    r"""Escape sequences, a newline, right-to-left marks and lone surrogates are escaped."""
    path = "/data/" + "long/" * 100 + "a.jsonl"
    monkeypatch.setattr("sys.argv", ["command.py", "--source", path])
    value = "\x1b[2J\nerror: \u202eabc\udc80é" * 100_000
    with pytest.raises(SystemExit):
        exit_with(f"{path} line 3: `{value}` is not a role; use --on_bad_row skip")
    line = capsys.readouterr().err
    assert line.startswith(f"error: {path} line 3: `\\x1b[2J\\nerror: \\u202eabc\\udc80é")
    assert line.endswith("is not a role; use --on_bad_row skip\n")
    assert len(line) <= 300 + len(path) + len("error: --source\n") and line[:-1].isprintable()
    assert one_line("x" * 300) == "x" * 300 and len(one_line("x" * 301)) == 300


@dataclasses.dataclass
class Bounded:
    rows: Annotated[int, Ge(1)] = 1
    max_steps: Annotated[int | None, Ge(1)] = None
    seeds: Annotated[tuple[int, ...], Ge(0), Le(2)] = (1, 2)
    grad_clip: Annotated[float, Ge(0)] = 0.5
    minutes: Annotated[float, Gt(0), Lt(5_000_000)] = 1
    free: int = -1


@dataclasses.dataclass
class Overridden(Bounded):
    rows: int = 4  # another default; the bound stays


@pytest.mark.parametrize("changes, line", [
    ({"rows": 0}, "--rows 0 must be at least 1"),
    ({"max_steps": -1}, "--max_steps -1 must be at least 1"),
    ({"seeds": (1, 3)}, "--seeds 3 must be at least 0 and at most 2"),
    *(({"grad_clip": float(value)},
       f"--grad_clip {value} must be at least 0 and at most 4,611,686,018,427,387,904")
      for value in ("nan", "inf", "1e+30")),
    ({"minutes": 0}, "--minutes 0 must be more than 0 and less than 5,000,000"),
    ({"minutes": 5_000_000}, "--minutes 5000000 must be more than 0 and less than 5,000,000"),
    ({"free": 2**62 + 1}, f"--free {2**62 + 1} must be at most 4,611,686,018,427,387,904"),
])
def test_number_out_of_its_bounds_is_named_with_them(changes, line):
    for config_class in (Bounded, Overridden):
        check_bounds(config_class())
        with pytest.raises(UserError) as error:
            check_bounds(config_class(**changes))
        assert str(error.value) == line


def test_unknown_choice_is_refused_with_the_choices():
    require_choice("layout", "fit", ("fit", "pad"))
    with pytest.raises(UserError, match=r"^--layout: unknown layout 'fat'; choose from \['fit'"):
        require_choice("layout", "fat", ("fit", "pad"))


def test_command_line_module_loads_no_torch():
    """So fineweb.py starts at once, and so do `import tokenizer` and `import packing`."""
    code = "import sys, nanosft.cli, nanosft.shards; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_comment_behind_a_flag_is_not_in_its_help(command):
    """`# SFT: …` in train_sft.py tells readers of the code what differs."""
    import train_sft

    result = command(train_sft, "--help")
    assert result.code == 0 and "SFT:" not in result.out
    assert "peak, reached at the end of the warm-up" in result.out.replace("│", "")


# ----- several ranks -----------------------------------------------------------------------------


@pytest.fixture
def report(monkeypatch, capsys):
    """report(rank, message): what exit_with prints on that rank of two, which share a store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    settings = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}

    def call(rank: int, message: str, **more) -> str:
        for name, value in {**settings, "RANK": rank, **more}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit, match="2"):
            exit_with(message)
        return capsys.readouterr().err

    yield call
    del store


def test_ranks_that_meet_the_same_mistake_report_it_once(report):
    assert report(0, "no data") == f"error: no data (rank 0 on {socket.gethostname()})\n"
    assert report(1, "no data") == ""
    assert report(1, "bad shard") == f"error: bad shard (rank 1 on {socket.gethostname()})\n"
    assert report(0, "bad shard") == ""
    # torchrun --max_restarts starts the ranks again, with the same store
    assert report(0, "no data", TORCHELASTIC_RESTART_COUNT=1).startswith("error: no data (rank 0")


def test_rank_that_cannot_reach_the_store_reports(report, monkeypatch):
    def no_store(*args, **kwargs):
        raise dist.DistNetworkError("the client socket has timed out")

    monkeypatch.setattr(dist, "TCPStore", no_store)
    assert report(0, "no data").startswith("error: no data (rank 0 on ")
    assert report(1, "no data").startswith("error: no data (rank 1 on ")


# In one torchrun, because starting one takes seconds: three commands, of which the last one ends it
SCRIPT = """
import sys
import traceback

import train_gpt2
from nanosft.cli import run_cli


def command(*more):
    sys.argv[1:] = [*flags, *more]
    run_cli(train_gpt2.main, train_gpt2.Config)


def broken(*args):
    raise ValueError("a bug")


flags, make_model = sys.argv[1:], train_gpt2.make_model
try:
    command("--rows_per_step", "3")
except SystemExit as stop:
    print("exit code", stop.code, file=sys.stderr, flush=True)
train_gpt2.make_model = broken
try:
    command()
except Exception:
    traceback.print_exc()
train_gpt2.make_model = make_model
command()
"""


def test_errors_under_torchrun(tmp_path):
    """All ranks meet a bad --rows_per_step and a bug of ours; only rank 1 reads a damaged shard."""
    # rows of 16 tokens, 2 a rank; in the first step rank 0 reads tokens 0 to 32, rank 1 32 to 64
    data = text_folder(tmp_path / "data", train=range(65), shard_tokens=40)
    flip_a_bit(tmp_path / "data" / "train_000001.npy")
    (tmp_path / "script.py").write_text(SCRIPT)
    flags = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "--redirects=3", f"--log-dir={tmp_path / 'logs'}", "script.py", "--data", data, "--out",
         "out", *flags], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True)
    err = [next((tmp_path / "logs").rglob(f"{rank}/stderr.log")).read_text() for rank in (0, 1)]
    both = "".join(err)

    line = r"error: --rows_per_step 3 is not a multiple of --batch_size 2 x 2 ranks = 4; try 4"
    assert both.count(line) == 1
    assert all("exit code 2\n" in text for text in err)

    for text in err:
        assert "Traceback (most recent call last):" in text
        assert re.search(r'File ".*train_gpt2\.py", line \d+, in train\n', text)
        assert "\nValueError: a bug\n" in text
    assert "error: a bug" not in both

    where = re.escape(f"(rank 1 on {socket.gethostname()})")
    assert re.search(rf"^error: .*train_000001\.npy: sha256 .* {where}$", err[1], re.MULTILINE)
    assert "sha256" not in err[0]
    assert found.returncode != 0 and re.search(r"rank +: 1 .*\n *exitcode +: 2 ", found.stderr)
