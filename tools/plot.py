"""Draw the loss, learning rate, and gradient norm of one or several training runs.

    python -m tools.plot out/base/metrics.jsonl out/sft/metrics.jsonl --out loss.png

The faint line is every step, the strong line their running mean; dots are the validation loss.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m tools.plot", file=sys.stderr)
    sys.exit(2)

import tyro

from nanosft.cli import run_cli
from nanosft.errors import UserError
from nanosft.sources import find_sources, read_rows

PANELS = {"loss": "loss (nats per token)", "lr": "learning rate", "grad_norm": "gradient norm"}
KEYS = ("step", *PANELS)


@dataclasses.dataclass
class Config:
    """Draw the metrics.jsonl of train_gpt2.py and train_sft.py runs into one picture."""

    metrics: Annotated[tuple[str, ...], tyro.conf.Positional]
    """metrics.jsonl files; a run is named after its folder"""
    out: str = "loss.png"
    """the picture; its ending chooses the format"""


def read_run(path: str) -> list[dict]:
    """The rows of a run. UserError: no such file, not JSON, no rows, or not metrics."""
    rows = []
    for place, row in read_rows(path):
        if not isinstance(row, dict) or not all(key in row for key in KEYS):
            raise UserError(f"{place}: not a row of metrics; it needs {', '.join(KEYS)}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def running_mean(values: list[float], rate: float) -> list[float]:
    """Exponential, without a bias toward the first value."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = (1 - rate) * total + rate * value, (1 - rate) * weight + rate
        means.append(total / weight)
    return means


def draw(axes, rows: list[dict], name: str, color: str) -> None:
    steps = [row["step"] for row in rows]
    for ax, (key, label) in zip(axes, PANELS.items()):
        values = [row[key] for row in rows]
        if key != "lr":  # the schedule is smooth as it is
            ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            values = running_mean(values, rate=min(1, 60 / len(rows)))
        ax.plot(steps, values, color=color, label=name)
        ax.set(xlabel="step", title=label)
    checked = [row for row in rows if "val_loss" in row]
    axes[0].plot([row["step"] for row in checked], [row["val_loss"] for row in checked], "o--",
                 color=color, markeredgecolor="black", linewidth=0.8,
                 label=f"{name}, validation" if checked else None)


def main(config: Config) -> None:
    paths = [source.name for source in find_sources(config.metrics)]
    runs = [(Path(path).resolve().parent.name, read_run(path)) for path in paths]
    if not runs:
        raise UserError("give at least one metrics.jsonl")
    import matplotlib

    matplotlib.use("Agg")  # to a file; no window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for i, (name, rows) in enumerate(runs):
        draw(axes, rows, name, f"C{i}")
    for ax in axes:
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(config.out, dpi=150)
    print(config.out)


if __name__ == "__main__":
    run_cli(main, Config)
