"""What a finished lesson shows: samples, a table, results.json and two pictures.

    python -m tools.lesson out/lesson         # the end of runs/lesson.sh

Reads the answers that evaluate.py and train_sft.py saved; runs no model.
"""

import dataclasses
import html
import re
import sys
from pathlib import Path
from typing import Annotated

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m tools.lesson", file=sys.stderr)
    sys.exit(2)

import tyro

from nanosft.cli import run_cli
from nanosft.errors import UserError, write_json
from nanosft.sources import read_rows

FORMAT = re.compile(r"\d+[-+*]\d+=\d+\.")  # 2+4=6.


@dataclasses.dataclass
class Config:
    """Report on a finished lesson."""

    lesson: Annotated[str, tyro.conf.Positional]
    """its folder; gets results.json, before_after.svg and moment.png"""


def read_all(path: Path) -> list[dict]:
    """What evaluate.py saved, or a file of questions."""
    return [row for _, row in read_rows(str(path))]


def share(values) -> float:
    values = list(values)
    return sum(values) / len(values)


# ----- the table ---------------------------------------------------------------------------------


def is_formed(row: dict) -> bool:
    """Is the answer a fact, and nothing else?"""
    return row["stopped"] and FORMAT.fullmatch(row["answer"]) is not None


def scores(rows: list[dict], n_trained: int) -> dict[str, float]:
    """Of the answers to all questions, the trained half first."""
    return {
        "trained_acc": share(row["right"] for row in rows[:n_trained]),
        "heldout_acc": share(row["right"] for row in rows[n_trained:]),
        "format_acc": share(map(is_formed, rows)),
        "stop_rate": share(row["stopped"] for row in rows),
    }


def own_words_acc(rows: list[dict]) -> float:
    """Share of the continuations of `2+4=` that begin with the result and its period."""
    return share(row["answer"].startswith(row["reference"]) for row in rows)


def results(folder: Path) -> dict[str, dict[str, float]]:
    n_trained = len(read_all(folder / "text/sft_train.jsonl"))
    own_words, chat = ({name: read_all(folder / f"answers/{name}{ending}.jsonl")
                        for name in ("base", "sft")} for ending in ("_own_words", ""))
    return {name: {"own_words_acc": own_words_acc(own_words[name]),
                   **scores(chat[name], n_trained)} for name in chat}


# ----- the same questions before and after -------------------------------------------------------


def sides(folder: Path, n: int = 6) -> list[tuple[str, str, str]]:
    """(question, how the base model continues, what SFT answers) of n held-out questions.

    The base model's text ends with the end of a document, or with an ellipsis where it was cut.
    """
    n_trained = len(read_all(folder / "text/sft_train.jsonl"))
    base, sft = (read_all(folder / f"answers/{name}.jsonl")[n_trained:]
                 for name in ("base_text", "sft"))
    rows = list(zip(base, sft))
    rows = [rows[(2 * i + 1) * len(rows) // (2 * n)] for i in range(n)]
    return [(b["messages"][0]["content"],
             f"{b['answer'].strip()} {'<|endoftext|>' if b['stopped'] else '…'}".strip(),
             s["answer"]) for b, s in rows]


TEXT = '<text x="{x}" y="{y}" fill="{fill}" font-weight="{weight}">{text}</text>'


def picture(rows: list[tuple[str, str, str]]) -> str:
    """An SVG table: question, before, after. SVG is text, so a change shows in a diff."""
    columns = ((20, "question"), (200, "base: continues the worksheet"),
               (560, "fine-tuned: answers"))
    colors = ("#57606a", "#cf222e", "#1a7f37")
    lines = [TEXT.format(x=x, y=32, fill="#1f2328", weight="bold", text=t) for x, t in columns]
    for i, (question, before, after) in enumerate(rows):
        for (x, _), fill, text in zip(columns, colors, (question, before, after)):
            cell = {"x": x, "y": 64 + 26 * i, "fill": fill, "weight": "normal"}
            lines.append(TEXT.format(text=html.escape(text), **cell))
    height = 64 + 26 * len(rows)
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 {height}" '
            'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14">')
    background = '<rect width="100%" height="100%" rx="8" fill="#f6f8fa"/>'
    return "\n".join([head, background, *lines, "</svg>\n"])


# ----- the moment: when does it start to answer? -------------------------------------------------


def by_step(folder: Path) -> dict[int, list[dict]]:
    """Step -> the answers to the held-out questions; step 0 is the base model."""
    heldout = {row["question"] for row in read_all(folder / "text/heldout.jsonl")}
    base = read_all(folder / "answers/base.jsonl")
    steps = {0: [row for row in base if row["messages"][0]["content"] in heldout]}
    for row in read_all(folder / "sft/answers.jsonl"):
        steps.setdefault(row["step"], []).append(row)
    return steps


def curves(steps: dict[int, list[dict]]) -> dict[str, list[float]]:
    """Label -> its share of the answers at each step."""
    return {
        "stops": [share(row["stopped"] for row in rows) for rows in steps.values()],
        "has the form a+b=c.": [share(map(is_formed, rows)) for rows in steps.values()],
        "is about the question": [
            share(row["answer"].split("=")[0] == row["reference"].split("=")[0] for row in rows)
            for rows in steps.values()],
        "is right": [share(row["right"] for row in rows) for rows in steps.values()],
    }


def draw_moment(folder: Path) -> None:
    """moment.png: how the answers to the held-out questions change, above the loss."""
    import matplotlib

    matplotlib.use("Agg")  # to a file; no window
    import matplotlib.pyplot as plt

    steps, metrics = by_step(folder), read_all(folder / "sft/metrics.jsonl")
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for width, (label, values) in zip((5, 2, 2, 1.5), curves(steps).items()):
        top.plot(list(steps), values, "o-", markersize=3, linewidth=width, label=label)
    top.set(title="Answers to the held-out questions", ylabel="share of answers")
    bottom.plot([row["step"] for row in metrics], [row["loss"] for row in metrics],
                label="trained questions, each step")
    checked = [row for row in metrics if "val_loss" in row]
    bottom.plot([row["step"] for row in checked], [row["val_loss"] for row in checked], "o-",
                markersize=3, label="held-out questions")
    bottom.set(xlabel="step of fine-tuning", ylabel="loss (nats per token)", yscale="log")
    for ax in (top, bottom):
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(folder / "moment.png", dpi=150)


def main(config: Config) -> None:
    folder = Path(config.lesson)
    if not (folder / "answers/sft_own_words.jsonl").is_file():
        raise UserError(f"{folder}: not a finished lesson; make one with runs/lesson.sh")
    table, rows = results(folder), sides(folder)
    write_json(folder / "results.json", table)
    (folder / "before_after.svg").write_text(picture(rows), "utf-8")
    draw_moment(folder)
    print(f"{'held-out question':19} {'base continues':40} fine-tuned")
    for question, before, after in rows:
        print(f"{question:19} {before:40} {after}")
    print(f"\n{'':6}" + "".join(f"{key:>15}" for key in table["base"]))
    for name, row in table.items():
        print(f"{name:6}" + "".join(f"{value:>15.1%}" for value in row.values()))


if __name__ == "__main__":
    run_cli(main, Config)
