"""plot.py: one picture of several runs; one clear line for what is no run."""

import json

import pytest

from plot import Config, main, running_mean


def write_run(folder, n_steps: int) -> str:
    folder.mkdir()
    rows = [
        {"step": i + 1, "loss": 5 / (i + 1), "lr": 1e-3, "grad_norm": 1.0} for i in range(n_steps)
    ]
    rows[-1]["val_loss"] = 0.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "metrics.jsonl")


def test_two_runs_make_one_png(tmp_path):
    paths = (write_run(tmp_path / "a", 3), write_run(tmp_path / "b", 1))
    out = tmp_path / "loss.png"
    main(Config(metrics=paths, out=str(out)))
    assert out.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "no such file"), ("", "empty"), ("\n", "no rows"), ("loss: 3\n", "not JSON"),
     ('{"step": 1}\n', "no metrics"), ("[1]\n", "no metrics")],
)  # fmt: skip
def test_what_is_no_run_is_one_clear_line(tmp_path, text, says):
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        main(Config(metrics=(str(path),), out=str(tmp_path / "loss.png")))
    assert "\n" not in str(error.value)


def test_the_running_mean_starts_at_the_first_value():
    assert running_mean([4.0, 4.0, 1.0], rate=0.5) == [4.0, 4.0, pytest.approx(16 / 7)]
