"""The documentation is tested: examples run, commands have the flags they name, links work."""

import doctest
import importlib
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import sft_data

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = ("fineweb", "train_gpt2", "sft_data", "train_sft", "evaluate", "chat", "data.worksheet",
            "tools.bench", "tools.plot", "tools.compare_peers", "tools.ablations", "tools.lesson",
            "tools.playground", "tools.lesson_page", "tools.reversal", "data.reasoning",
            "tools.reasoning", "tools.variety")
WITH_EXAMPLES = ("README.md", "docs/scale.md", "docs/sft.md")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # (language, code)


def lines_of(path: Path) -> list[str]:
    """The lines of a file with continued ones joined; of Markdown only the code, also inline."""
    text = path.read_text()
    if path.suffix == ".md":
        inline = re.findall(r"`([^`]+)`", FENCE.sub("", text))  # it may wrap
        text = "".join(code for _, code in FENCE.findall(text))
        text += "".join(" ".join(span.split()) + "\n" for span in inline)
    return re.sub(r"\\+\n\s*", " ", text).splitlines()


def commands_in(line: str) -> list[tuple[str, str]]:
    """(module, its arguments) of each command; `both` is the torchrun of runs/lesson.sh.

    >>> commands_in("A=1 torchrun --standalone train_sft.py --data d | tee log")
    [('train_sft', '--data d')]
    >>> commands_in("run python -m tools.plot a.jsonl  # two panels")
    [('tools.plot', 'a.jsonl')]
    """
    names = "|".join(map(re.escape, COMMANDS))
    pattern = rf"\b(?:python|torchrun|both) [^|;&>]*?(?:-m )?\b({names})\b(\.py)?([^|;&>]*)"
    return [(name, arguments.split("  #")[0].strip())
            for name, suffix, arguments in re.findall(pattern, line)
            if suffix or "." in name]


def all_commands() -> list[tuple[str, str]]:
    """Of the documentation, the docstrings and the run scripts."""
    patterns = ("*.md", "docs/*.md", "data/*.md", "*.py", "nanosft/*.py", "tools/*.py",
                "data/*.py", "runs/*.sh")
    paths = [path for pattern in patterns for path in ROOT.glob(pattern) if path.name != "LOG.md"]
    return [found for path in paths for line in lines_of(path) for found in commands_in(line)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_documented_command_has_the_flags_it_names(name):
    """tyro parses each complete command as it would on the command line."""
    config = importlib.import_module(name).Config
    known = {name for field in config.__dataclass_fields__ for name in (field, f"no_{field}")}
    documented = [arguments for found, arguments in all_commands() if found == name and arguments]
    assert documented, f"no example anywhere shows how to use {name}"
    for arguments in documented:
        flags = {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([\w-]+)", arguments)}
        assert flags <= known, f"{name} {arguments}"
        is_open = arguments.count('"') % 2  # continues on the next line of a .py file
        if not is_open and not re.search(r"[${[…]|\.\.\.", arguments):  # no variables or options
            tyro.cli(config, args=shlex.split(arguments), use_underscores=True)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_the_documentation_print_what_they_say(name):
    result = doctest.testfile(str(ROOT / name), module_relative=False, encoding="utf-8")
    assert (result.attempted > 0, result.failed) == (True, 0)


def test_sft_data_commands_in_the_readme_print_what_it_shows(tmp_path, monkeypatch, command):
    """Each bash block of `echo` and `sft_data.py`, compared with the block of output after it."""
    monkeypatch.chdir(tmp_path)
    blocks, n_compared = FENCE.findall(README), 0
    for (language, code), (_, shown) in itertools.pairwise(blocks):
        if language != "bash" or not re.fullmatch(r"((echo|python sft_data\.py) .*\n)+", code):
            continue
        for line in code.splitlines():
            if line.startswith("echo"):
                subprocess.run(line, shell=True, check=True)
            else:
                result = command(sft_data, *shlex.split(line)[2:])
                assert result.code == 0, result.err
        assert shown in result.out
        n_compared += 1
    assert n_compared > 0


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_every_linked_file_and_heading_exists(name):
    page = ROOT / name
    links = re.findall(r"\]\(([^):#]*)(?:#([^)]+))?\)", page.read_text())
    assert links
    for file, heading in links:
        target = page.parent / file if file else page
        assert target.exists(), file
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            assert heading in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


def test_every_test_that_the_argument_names_exists():
    """docs/sft.md names tests, at times only their beginning: `test_gradient_of_the_logits_…`."""
    tests = {name for path in (ROOT / "tests").glob("test_*.py")
             for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.M)}
    named = re.findall(r"`(test_\w+)(…?)`", (ROOT / "docs/sft.md").read_text())
    assert len(named) > 10
    assert [name for name, is_start in named if not (
        any(test.startswith(name) for test in tests) if is_start else name in tests)] == []


def test_every_docstring_example_runs(pytestconfig):
    """`pytest` collects each file with an example: --doctest-modules looks in `testpaths` only."""
    assert pytestconfig.getoption("doctestmodules")
    collected = {file for pattern in pytestconfig.getini("testpaths")
                 for path in ROOT.glob(pattern) for file in (path, *path.rglob("*.py"))}
    patterns = ("*.py", "nanosft/*.py", "tools/*.py", "data/*.py", "tests/*.py")
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    with_examples = {path for path in files if re.search(r"^ +>>> ", path.read_text(), re.M)}
    assert ROOT / "nanosft/sources.py" in with_examples
    assert with_examples <= collected


@pytest.mark.parametrize("name", ["data.worksheet", "tools.plot"])
def test_package_of_the_same_name_elsewhere_does_not_shadow_ours(name, tmp_path, monkeypatch):
    """An installed `data` or `tools` comes first if ours has no __init__.py."""
    package = name.split(".")[0]
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise ImportError('not ours')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run([sys.executable, "-m", name, "--help"], cwd=ROOT, capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr) == (0, "") and f"usage: python -m {name}" in done.stdout
