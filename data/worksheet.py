"""The lesson's data: a corpus that asks but never answers, and chats that answer half of it.

    python -m data.worksheet --out out/lesson/text --seed 1
    python -m data.worksheet --report out/lesson          # the last step of runs/lesson.sh

Pretraining learns P(text), SFT installs P(response | prompt). Asked "What is 2+2?", a model that
has read many worksheets continues with "What is 3+3? What is 4+4?": in its corpus that is what
follows a question. It has read "2+2=4.", too: the knowledge is in the weights, but nothing leads
from the question to the fact. This corpus causes that failure on purpose:

    worksheets   What is 3+5? What is 4*2? What is 6+2?
    notes        2+5=7. 3*5, yes, 3*5=15. 6+4=10. 1+3 again: 1+3=4.

Every question is in worksheets and every fact in notes; nothing in the corpus joins the two. The
SFT rows answer HALF of the questions. The other half is held out: its facts occur in pretraining
only, so a right answer there is knowledge that SFT did not add.
"""

import dataclasses
import html
import json
import random
from pathlib import Path
from typing import NamedTuple

from nanosft.cli import UserError, run_cli
from nanosft.sources import read_rows


@dataclasses.dataclass
class Config:
    """Write the lesson's corpus and rows (--out), or its report (--report)."""

    out: str | None = None
    """folder for corpus.jsonl, sft_train.jsonl, trained.jsonl, heldout.jsonl and questions.jsonl"""
    seed: int = 1
    corpus_bytes: int = 1_000_000
    """size of the corpus; in the `bytes` encoding, the tokens of one epoch of pretraining"""
    worksheets: float = 0.2
    """share of the documents that are worksheets"""
    report: str | None = None
    """folder of a finished lesson: print samples and the table, write results.json"""
    picture: str | None = None
    """with --report: also draw the samples as this .svg file"""


class Item(NamedTuple):
    key: str
    question: str
    fact: str


def items() -> dict[str, list[Item]]:
    """Kind -> all items of that kind: everything there is to know.

    The fact restates the question. So an answer is a text that pretraining has read, and SFT only
    has to lead from a question to the note that begins like it.
    """
    dice = [(a, b) for a in range(1, 7) for b in range(1, 7)]
    return {
        "sum": [make_item(f"{a}+{b}", a + b) for a, b in dice],
        "product": [make_item(f"{a}*{b}", a * b) for a, b in dice],
    }


def make_item(key: str, result: int) -> Item:
    return Item(key, f"What is {key}?", f"{key}={result}.")


def split_half(rng: random.Random) -> tuple[list, list]:
    """(trained, held out): half of each kind, so that both halves are equally hard."""
    trained, heldout = [], []
    for pairs in items().values():
        pairs = rng.sample(pairs, len(pairs))
        trained += pairs[: len(pairs) // 2]
        heldout += pairs[len(pairs) // 2 :]
    return trained, heldout


def worksheet(rng: random.Random, some: list[Item]) -> str:
    """What is 3+5? What is 4*2? What is 6+2?"""
    return " ".join(item.question for item in some)


# What stands between a note's headword and the fact. Lengths differ, so that the model learns to
# copy the headword, not whatever is a fixed number of positions back.
LEADS = (": ", "! ", ", yes, ", " now. ", " again: ", ". Note: ", " is easy: ", ". Remember, ")


def note(rng: random.Random, item: Item) -> str:
    """2+5=7. or, with a headword, 2+5 again: 2+5=7."""
    return item.key + rng.choice(LEADS) + item.fact if rng.random() < 0.6 else item.fact


def notes(rng: random.Random, some: list[Item]) -> str:
    """2+5=7. 3*5, yes, 3*5=15. 6+4=10."""
    return " ".join(note(rng, item) for item in some)


def corpus(rng: random.Random, n_bytes: int, share: float) -> list[str]:
    """Worksheets and notes, mixed, about n_bytes in all; each document is one or the other."""
    known = [item for kind in items().values() for item in kind]
    documents, size = [], 0
    while size < n_bytes:
        make = worksheet if rng.random() < share else notes
        documents.append(make(rng, rng.sample(known, rng.randint(2, 8))))
        size += len(documents[-1]) + 1
    return documents


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def generate(config: Config) -> None:
    rng, out = random.Random(config.seed), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    trained, heldout = split_half(rng)
    documents = corpus(rng, config.corpus_bytes, config.worksheets)
    write_rows(out / "corpus.jsonl", [{"text": text} for text in documents])
    files = {"sft_train": trained, "trained": trained, "heldout": heldout,
             "questions": trained + heldout}
    for name, part in files.items():
        rows = [{"question": item.question, "answer": item.fact} for item in part]
        write_rows(out / f"{name}.jsonl", rows)
    print(f"{out}: {len(documents):,} documents, {len(trained)} questions for SFT, "
          f"{len(heldout)} held out")


# ----- the report: the saved answers side by side -------------------------------------------------


def read_answers(path: Path) -> list[dict]:
    """What evaluate.py saved, or a file of questions."""
    return [row for _, row in read_rows(str(path))]


def results_of(rows: list[dict], n_trained: int) -> dict[str, float]:
    """The share of right answers in each half, and of formed and stopped ones in both."""

    def share(key: str, part: list[dict]) -> float:
        return sum(row[key] for row in part) / len(part)

    return {
        "trained_acc": share("right", rows[:n_trained]),
        "heldout_acc": share("right", rows[n_trained:]),
        "format_acc": share("formed", rows),
        "stop_rate": share("stopped", rows),
    }


def sides(folder: Path) -> list[tuple[str, str, str]]:
    """(question, how the base continues, what SFT answers) of held-out questions of both kinds."""
    n_trained = len(read_answers(folder / "text/trained.jsonl"))
    base, sft = (read_answers(folder / f"answers/{name}.jsonl")[n_trained:]
                 for name in ("base_raw", "sft"))
    every = max(1, len(sft) // 6)
    rows = list(zip(base, sft))[every // 2 :: every]
    return [(b["messages"][0]["content"], b["answer"].strip(), s["answer"]) for b, s in rows]


def report(config: Config) -> None:
    folder = Path(config.report)
    if not (folder / "answers/sft.jsonl").is_file():
        raise UserError(f"--report {folder}: not a finished lesson; make one with runs/lesson.sh")
    n_trained = len(read_answers(folder / "text/trained.jsonl"))
    results = {name: results_of(read_answers(folder / f"answers/{name}.jsonl"), n_trained)
               for name in ("base", "sft")}
    print(f"{'held-out question':20} {'base continues':36} fine-tuned")
    for question, before, after in sides(folder):
        print(f"{question:20} {before + ' ...':36} {after}")
    print(f"\n{'':6}" + "".join(f"{key:>13}" for key in results["base"]))
    for name, row in results.items():
        print(f"{name:6}" + "".join(f"{value:>13.1%}" for value in row.values()))
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if config.picture:
        Path(config.picture).write_text(picture(sides(folder)))


TEXT = '<text x="{x}" y="{y}" fill="{fill}" font-weight="{weight}">{text}</text>'


def picture(rows: list[tuple[str, str, str]]) -> str:
    """An SVG table: question, before, after. SVG is text, so a change shows in a diff."""
    columns = ((20, "question"), (200, "base: continues the worksheet"),
               (560, "fine-tuned: answers"))
    colors = ("#57606a", "#cf222e", "#1a7f37")
    lines = [TEXT.format(x=x, y=32, fill="#1f2328", weight="bold", text=t) for x, t in columns]
    for i, (question, before, after) in enumerate(rows):
        for (x, _), fill, text in zip(columns, colors, (question, f"{before} …", after)):
            cell = {"x": x, "y": 64 + 26 * i, "fill": fill, "weight": "normal"}
            lines.append(TEXT.format(text=html.escape(text), **cell))
    height = 64 + 26 * len(rows)
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 {height}" '
            'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14">')
    background = '<rect width="100%" height="100%" rx="8" fill="#f6f8fa"/>'
    return "\n".join([head, background, *lines, "</svg>\n"])


def main(config: Config) -> None:
    if bool(config.out) == bool(config.report):
        raise UserError("give --out to write the data, or --report to see the results")
    generate(config) if config.out else report(config)


if __name__ == "__main__":
    run_cli(main, Config)
