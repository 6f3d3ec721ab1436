"""The README is tested like code: its examples run, and its commands have the flags they name."""

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
SCRIPTS = ("fineweb", "train_gpt2", "sft_data", "train_sft", "evaluate", "chat", "bench", "plot")


def commands() -> list[tuple[str, list[str]]]:
    """(script, its arguments) of every command in the README, the docstrings and runs/*.sh."""
    sources = [ROOT / "README.md", *ROOT.glob("*.py"), *ROOT.glob("runs/*.sh")]
    found = []
    for path in sources:
        text = path.read_text().replace("\\\\\n", " ").replace("\\\n", " ")
        pattern = rf"^[ `]*(?:python|torchrun)\b[^\n`]*?\b({'|'.join(SCRIPTS)})\.py([^\n`|;&>)]*)"
        for script, rest in re.findall(pattern, text, re.MULTILINE):
            if "$" in rest or "[" in rest or "..." in rest:
                rest = re.sub(r"\[[^]]*\]|\.\.\.", "", rest)
            found.append((script, shlex.split(rest.split("  #")[0])))
    return found


def test_the_examples_in_the_readme_give_what_they_say():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted >= 5
    assert result.failed == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_in_the_readme_and_the_run_scripts_exists(script):
    """tyro parses each command as the script itself would; an unknown flag ends in SystemExit."""
    config = importlib.import_module(script).Config
    mine = [args for name, args in commands() if name == script]
    assert mine, f"no command anywhere shows how to use {script}.py"
    for args in mine:
        flags = {arg.split("=")[0] for arg in args if arg.startswith("--")}
        known = {f"--{name}" for name in config.__dataclass_fields__}
        known |= {f"--no-{name}" for name in config.__dataclass_fields__}
        assert flags <= known, f"{script}.py {' '.join(args)}"
        if not any("$" in arg for arg in args):
            tyro.cli(config, args=args, use_underscores=True)


def test_every_file_that_the_readme_links_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
