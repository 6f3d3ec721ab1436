"""What other systems and terminals lack is taken away (tests/other_system.py); all still runs."""

import ast
import dataclasses
import io
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sft_data
from nanosft import sources
from nanosft.cli import run_cli, to_paste
from nanosft.errors import flush

ROOT = Path(__file__).parents[1]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # of files, and terminals
FOLDERS = (".", "nanosft", "tools", "data")


def test_all_commands_run_without_what_windows_lacks_and_in_a_locale_of_ascii(tmp_path, command):
    """Spawned workers, no fork, fcntl, resource, sysconf, or fsync of folders; files are UTF-8."""
    (tmp_path / "text.txt").write_text("To be or not — 東京.\n" * 400, "utf-8")
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "hi 東京", "response": "é €"}\n' * 2, "utf-8")
    found = subprocess.run([sys.executable, "-m", "tests.other_system", tmp_path], cwd=ROOT,
                           env=os.environ | ASCII, capture_output=True, encoding="ascii")
    assert found.returncode == 0, found.stderr
    assert found.stdout.endswith("\nall commands: \\u6771\\u4eac\n")
    assert "stopped: " in found.stdout and "resume: max_minutes is 100" in found.stdout
    assert "nan" not in found.stdout and "inf " not in found.stdout
    assert [path.name for path in (tmp_path / "run").glob("step_*")] == ["step_000003"]
    (first, _) = (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()
    assert json.loads(first)["messages"][0]["content"] == "hi 東京"

    command(sft_data, "--source", f"{chats}*150", "--encoding", "bytes", "--workers", 1,
            "--out", tmp_path / "alone")
    name = "train_000000.npy"
    assert (tmp_path / "sft" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("platform, method", [("linux", "fork"), ("darwin", "spawn")])
def test_workers_are_forked_only_where_that_is_safe(platform, method, monkeypatch):
    seen, get_context = [], multiprocessing.get_context
    monkeypatch.setattr(multiprocessing, "get_context", lambda m: seen.append(m) or get_context(m))
    monkeypatch.setattr(sources.sys, "platform", platform)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert list(sources.ordered_map(len, [], 2)) == []  # no work, so no process
    assert seen == [method]


def calls_of(path: Path):
    return (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call))


def lacks_encoding(call: ast.Call) -> bool:
    """Does it open a text file, or read a process's text, in the encoding of the locale?"""
    given = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
    words = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
    of, _, name = ast.unparse(call.func).rpartition(".")
    if given.get("text") is True:
        return True
    if name not in ("open", "read_text", "write_text", "TextIOWrapper") or of in ("os", "self"):
        return False
    is_binary = name == "open" and any("b" in str(word) for word in words[-1:])
    return not (is_binary or "utf-8" in words or "encoding" in given or (name == "TextIOWrapper"
                and len(call.args) > 1))


@pytest.mark.parametrize("folder", FOLDERS)
def test_text_files_and_pipes_have_an_encoding_of_their_own(folder):
    found = [f"{path.name}:{call.lineno}" for path in (ROOT / folder).glob("*.py")
             for call in calls_of(path) if lacks_encoding(call)]
    assert found == []


@pytest.mark.parametrize("call, lacks", [
    ("open(path)", True), ("open(path, 'w')", True), ("path.open('rb')", False),
    ("path.open('a', encoding='utf-8')", False), ("path.read_text()", True),
    ("path.read_text('utf-8')", False), ("path.write_text(text)", True), ("path.open()", True),
    ("io.TextIOWrapper(file)", True), ("io.TextIOWrapper(file, 'utf-8')", False),
    ("path.write_text(text, 'utf-8')", False), ("subprocess.run(words, text=True)", True)])
def test_calls_without_an_encoding_are_found(call, lacks):
    (node,) = (n for n in ast.walk(ast.parse(call)) if isinstance(n, ast.Call))
    assert lacks_encoding(node) == lacks


@pytest.mark.parametrize("encoding, shown", [
    ("cp1252", b"caf\xe9 \\u6771\\U0001f642 \\ud800\n"),
    ("ascii", b"caf\\xe9 \\u6771\\U0001f642 \\ud800\n"),
    ("utf-8", "café 東🙂 \\ud800\n".encode())])
def test_what_a_terminal_cannot_show_is_escaped(encoding, shown, monkeypatch):
    @dataclasses.dataclass
    class Config:
        text: str = "café 東🙂 \ud800"

    terminals = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, terminal in terminals.items():
        monkeypatch.setattr(sys, name, terminal)

    def main(config):
        print(config.text)
        print(config.text, file=sys.stderr, flush=True)

    monkeypatch.setattr(sys, "argv", ["command.py"])
    run_cli(main, Config)
    for terminal in terminals.values():
        assert terminal.buffer.getvalue() == shown


def test_folders_that_cannot_be_flushed_are_left_and_files_are_not(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(22, "Invalid argument")

    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(os, "fsync", fail)
    flush(tmp_path)
    with pytest.raises(OSError):
        flush(tmp_path / "file")


# ----- how and from where commands are called ----------------------------------------------------

SCRIPTS = [path for folder in ("tools", "data", "tests") for path in (ROOT / folder).glob("*.py")
           if path.read_text("utf-8").endswith("\n    run_cli(main, Config)\n")]


def call(path: Path, *flags, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, path, *flags], cwd=cwd, capture_output=True,
                          encoding="utf-8")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_script_that_is_run_by_its_path_says_how_to_run_it(path, tmp_path):
    for cwd in (ROOT, tmp_path):
        found = call(path, "--help", cwd=cwd)
        module = f"{path.parent.name}.{path.stem}"
        assert found.stderr == f"error: in the project's folder, run python -m {module}\n"
        assert (found.returncode, found.stdout) == (2, "")


def test_script_without_a_command_names_the_one_that_uses_it():
    found = call(ROOT / "tools/workload.py", cwd=ROOT)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert found.stderr.endswith("run python -m tools.bench\n")


def test_help_names_the_command_that_was_called():
    for command in (["-m", "tools.export"], ["evaluate.py"]):
        shown = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, encoding="utf-8",
                               capture_output=True).stdout
        assert shown.startswith(f"usage: python {' '.join(command)} ")


def test_printed_command_is_this_projects_own_where_the_folder_has_a_script_of_that_name(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.py").touch()
    assert to_paste("chat.py", "--model", "a b") == f"python {ROOT / 'chat.py'} --model 'a b'"
    monkeypatch.chdir(ROOT)
    assert to_paste("chat.py", "--model", "a b") == "python chat.py --model 'a b'"


def test_root_command_runs_by_its_path_from_any_folder(tmp_path):
    (tmp_path / "a b.txt").write_text("To be or not.\n" * 40, "utf-8")
    found = call(ROOT / "fineweb.py", "--source", "a b.txt", "--encoding", "bytes", "--out", "o t",
                 cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "--data 'o t' " in found.stdout
    assert (tmp_path / "o t/meta.json").is_file()
