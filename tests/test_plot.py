"""tools/plot.py: one picture of several runs; one line for a file that is not a run."""

import json

import pytest

from tools import plot


def write_run(folder, n_steps: int) -> str:
    folder.mkdir()
    rows = [{"step": i + 1, "loss": 5 / (i + 1), "lr": 1e-3, "grad_norm": 1.0}
            for i in range(n_steps)]
    rows[-1]["val_loss"] = 0.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "metrics.jsonl")


def test_pattern_that_no_shell_expanded_is_several_runs(tmp_path, command, monkeypatch):
    for name in "ab":
        write_run(tmp_path / name, 3)
    drawn, draw = [], plot.draw
    monkeypatch.setattr(plot, "draw", lambda *args: drawn.append(args[1:3]) or draw(*args))
    command(plot, tmp_path / "*/metrics.jsonl", "--out", tmp_path / "loss.png")
    assert [(len(rows), name) for rows, name in drawn] == [(3, "a"), (3, "b")]


def test_two_runs_make_one_png(tmp_path, command):
    out = tmp_path / "loss.png"
    runs = write_run(tmp_path / "a", 3), write_run(tmp_path / "b", 1)
    assert command(plot, *runs, "--out", out).out == f"{out}\n"
    assert out.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("text, message", [
    (None, "no such file"),
    ("", "the file is empty"),
    ("\n", "no rows"),
    ("loss: 3\n", "line 1: not JSON"),
    ('{"step": 1}\n', "line 1: not a row of metrics; it needs step, loss, lr, grad_norm"),
    ("[1]\n", "row 1: not a row of metrics"),
])
def test_file_that_is_not_a_run_is_one_line_and_exit_code_2(tmp_path, command, text, message):
    path, out = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    if text is not None:
        path.write_text(text)
    result = command(plot, path, "--out", out)
    assert (result.code, result.err.count("\n"), out.exists()) == (2, 1, False)
    assert result.err.startswith(f"error: {path}") and message in result.err


def test_running_mean_starts_at_the_first_value():
    assert plot.running_mean([4.0, 4.0, 1.0], rate=0.5) == [4.0, 4.0, pytest.approx(16 / 7)]
