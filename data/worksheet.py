"""The lesson's data: a corpus that asks but never answers, and chats that answer half of it.

    python -m data.worksheet --out out/lesson/text --seed 1

Pretraining learns P(text), SFT installs P(response | prompt). Asked "What is 2+2?", a model that
has read many worksheets continues with "What is 3+3? What is 4+4?": in its corpus that is what
follows a question. It has read "2+2=4.", too: the knowledge is in the weights, but nothing leads
from the question to the fact. This corpus causes that failure on purpose:

    worksheets   What is 3+5? What is 4*2? What is 9-2?
    notes        2+5=7. 3*5 yes, 3*5=15. 9-4=5.

Every question is in worksheets and every fact in notes; nothing in the corpus joins the two. The
SFT rows answer HALF of the questions. The other half is held out: its facts occur in pretraining
only, so a right answer there is knowledge that SFT did not add.
"""

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m data.worksheet", file=sys.stderr)
    sys.exit(2)

from annotated_types import Ge, Le

from nanosft.cli import run_cli


@dataclasses.dataclass
class Config:
    """Write the lesson's corpus and questions."""

    out: str
    """folder for the .jsonl files"""
    seed: int = 1
    """of the corpus and of which questions are held out"""
    corpus_bytes: Annotated[int, Ge(1)] = 1_300_000
    """size of the corpus; in the `bytes` encoding, the tokens of one epoch of pretraining"""
    worksheets: Annotated[float, Ge(0), Le(1)] = 0.15
    """share of the documents that are worksheets"""


class Item(NamedTuple):
    key: str
    question: str
    fact: str


def items() -> dict[str, list[Item]]:
    """Kind -> all items of that kind: everything there is to know.

    Each fact repeats its question's key, so every answer is text that pretraining has seen.
    SFT only has to lead from a question to the note that begins with the same key.
    """
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    return {
        "sum": [make_item(f"{a}+{b}", a + b) for a, b in pairs],
        "difference": [make_item(f"{a}-{b}", a - b) for a, b in pairs if a >= b],
        "product": [make_item(f"{a}*{b}", a * b) for a, b in pairs],
    }


def make_item(key: str, result: int) -> Item:
    return Item(key, f"What is {key}?", f"{key}={result}.")


def split_half(rng: random.Random) -> tuple[list, list]:
    """(trained, held out): half of each kind, so that both halves are equally hard."""
    trained, heldout = [], []
    for part in items().values():
        part = rng.sample(part, len(part))
        trained += part[: len(part) // 2]
        heldout += part[len(part) // 2 :]
    return trained, heldout


def worksheet(rng: random.Random, some: list[Item]) -> str:
    """What is 3+5? What is 4*2? What is 9-2?"""
    return " ".join(item.question for item in some)


# Between a note's headword and its fact: up to two of these words, then an ending. The distance
# varies, so that the model learns to copy the headword, not whatever is a fixed distance back.
WORDS = ("so", "yes", "now", "note", "again")
ENDINGS = (": ", "! ", ", ")


def note(rng: random.Random, item: Item) -> str:
    """2+5=7. or, with a headword, 2+5 again: 2+5=7."""
    if rng.random() < 0.7:
        return item.fact
    words = rng.sample(WORDS, rng.choice((0, 0, 1, 2)))
    return " ".join([item.key, *words]) + rng.choice(ENDINGS) + item.fact


def notes(rng: random.Random, some: list[Item]) -> str:
    """2+5=7. 3*5 yes, 3*5=15. 9-4=5."""
    return " ".join(note(rng, item) for item in some)


def corpus(rng: random.Random, n_bytes: int, share: float) -> list[str]:
    """Worksheets and notes, mixed, about n_bytes in all; each document is one or the other."""
    sums, differences, products = items().values()
    known = 2 * sums + 3 * differences + 3 * products  # products are harder to learn
    # 6*7 and 7*6 teach each other; 7*7 comes twice as often to make up for that
    known += [item for item in known if item.key[0] == item.key[2]]
    documents, size = [], 0
    while size < n_bytes:
        make = worksheet if rng.random() < share else notes
        # short, so that a row holds several and a fact is recalled whatever precedes it
        documents.append(make(rng, rng.sample(known, rng.randint(2, 4))))
        size += len(documents[-1]) + 1
    return documents


def suggestions(trained: list[Item], heldout: list[Item]) -> list[dict]:
    """Questions that the playground offers, each with what is special about it."""
    rows = [(item.question, "trained: one of the chats", "chat") for item in trained[::60]]
    rows += [(item.question, "held out: no chat answers it", "chat") for item in heldout[::40]]
    rows += [(item.fact.split("=")[0] + "=", "a held-out fact as the corpus writes it", "text")
             for item in heldout[10::60]]
    rows += [("What is 2+4? What is 3*3?", "never seen: two questions at once", "chat"),
             ("What is 12+3?", "never seen: a number of two digits", "chat"),
             ("Who are you?", "never seen: no arithmetic", "chat")]
    return [{"question": question, "about": about, "as": kind} for question, about, kind in rows]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def main(config: Config) -> None:
    rng, out = random.Random(config.seed), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    trained, heldout = split_half(rng)
    documents = corpus(rng, config.corpus_bytes, config.worksheets)
    write_rows(out / "corpus.jsonl", [{"text": text} for text in documents])
    files = {"sft_train": trained, "heldout": heldout, "questions": trained + heldout}
    for name, part in files.items():
        rows = [{"question": item.question, "answer": item.fact} for item in part]
        write_rows(out / f"{name}.jsonl", rows)
    facts = [item.fact.split("=") for item in trained + heldout]  # ["2+5", "7."]
    write_rows(out / "own_words.jsonl", [{"prompt": f"{a}=", "response": b} for a, b in facts])
    write_rows(out / "suggestions.jsonl", suggestions(trained, heldout))
    print(f"{out}: {len(documents):,} documents, {len(trained)} questions for SFT, "
          f"{len(heldout)} held out")


if __name__ == "__main__":
    run_cli(main, Config)
