"""Sums of several numbers: a corpus of single sums, and chats that answer with steps or without.

    python -m data.reasoning --out out/reasoning/text --seed 1

Pretraining reads single sums only, no sum of more than two numbers and no chat. Each row of SFT has
both answers to one question, so the two styles are trained on the same questions:

    corpus    37+5=42 8+9=17 21+4=25
    question  14+5+8=?
    cot       <think>14+5=19 19+8=27</think> <answer>27</answer>
    direct    <think></think> <answer>27</answer>

With steps, each number that the model writes is one sum that it knows. Without them, it has to add
up all numbers before it writes the first digit. The first number of a question has two digits and
the others one, so that step i stands at the same position in every answer.

Some rows of SFT are wrong, as in data that a person or a model wrote: one step is off by one, and
all later ones build on it. `correct` says which, for --where correct=true.
"""

import dataclasses
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m data.reasoning", file=sys.stderr)
    sys.exit(2)

from annotated_types import Ge, Lt

from data.worksheet import write_rows
from nanosft.cli import run_cli
from nanosft.errors import UserError


@dataclasses.dataclass
class Config:
    """Write sums.jsonl (the corpus), train_1.jsonl, train_2.jsonl, ... and test.jsonl."""

    out: str
    """folder for the files"""
    seed: int = 1
    """of all files"""
    addends: Annotated[int, Ge(2)] = 5
    """numbers in a question: one of two digits, then digits"""
    corpus_bytes: Annotated[int, Ge(1)] = 2_000_000
    """size of the corpus; in the `bytes` encoding, the tokens of one epoch of pretraining"""
    train_sets: Annotated[int, Ge(1)] = 3
    """files of training rows, with different questions in each"""
    correct: Annotated[int, Ge(1)] = 2048
    """rows of each training set that are correct"""
    wrong: Annotated[float, Ge(0), Lt(1)] = 0.3
    """share of the rows of each training set that are wrong"""
    test: Annotated[int, Ge(1)] = 200
    """rows of test.jsonl, with questions that are in no training set; all are correct"""


def random_question(rng: random.Random, addends: int) -> tuple[int, ...]:
    """(14, 5, 8): one number from 10 to 19, then digits from 1 to 9."""
    return (rng.randint(10, 19), *(rng.randint(1, 9) for _ in range(addends - 1)))


def corpus(rng: random.Random, n_bytes: int, addends: int) -> Iterator[str]:
    """Documents of single sums, about n_bytes in all: every sum that a step can need.

    Sums of one-digit numbers are shorter. Without them, each sum would have eight characters, and
    the model would learn the position in the row instead of what a sum is.
    """
    size, largest = 0, 19 + 9 * (addends - 2)  # the largest total before the last step
    while size < n_bytes:
        pairs = [(rng.randint(1, largest), rng.randint(1, 9)) for _ in range(rng.randint(8, 16))]
        text = " ".join(f"{a}+{b}={a + b}" for a, b in pairs)
        size += len(text) + 1
        yield text


def steps(addends: tuple[int, ...], slip: int | None = None, by: int = 0) -> list[str]:
    """The running sums; step number `slip`, if any, is off by `by`, and later ones build on it.

    >>> steps((14, 5, 8))
    ['14+5=19', '19+8=27']
    >>> steps((14, 5, 8), slip=0, by=1)
    ['14+5=20', '20+8=28']
    """
    total, sums = addends[0], []
    for i, addend in enumerate(addends[1:]):
        result = total + addend + (by if i == slip else 0)
        sums.append(f"{total}+{addend}={result}")
        total = result
    return sums


def make_row(addends: tuple[int, ...], slip: int | None = None, by: int = 0) -> dict:
    """A row with both answers to one question."""
    sums = steps(addends, slip, by)
    answer = f"<answer>{sums[-1].split('=')[1]}</answer>"
    return {"question": "+".join(map(str, addends)) + "=?",
            "cot": f"<think>{' '.join(sums)}</think> {answer}",
            "direct": f"<think></think> {answer}",
            "correct": slip is None}


def distinct_questions(rng: random.Random, addends: int, n: int) -> list[tuple[int, ...]]:
    possible = 10 * 9 ** (addends - 1)
    if n > possible // 2:
        raise UserError(f"--addends {addends} makes {possible} different questions, and at most "
                        f"half of them can be used, but {n} are wanted; ask for fewer rows")
    drawn = {}  # a dict keeps the order in which they were drawn
    while len(drawn) < n:
        drawn[random_question(rng, addends)] = None
    return list(drawn)


def training_set(rng: random.Random, questions: list[tuple[int, ...]], correct: int) -> list[dict]:
    """Rows in random order, `correct` of them correct; each other one slips by 1 in one step."""
    is_correct = [i < correct for i in range(len(questions))]
    rng.shuffle(is_correct)
    return [make_row(addends) if right else
            make_row(addends, rng.randrange(len(addends) - 1), rng.choice((-1, 1)))
            for addends, right in zip(questions, is_correct)]


def main(config: Config) -> None:
    rng, out = random.Random(config.seed), Path(config.out)
    n_train = round(config.correct / (1 - config.wrong))
    n_all = config.test + config.train_sets * n_train
    questions = distinct_questions(rng, config.addends, n_all)
    documents = [{"text": text} for text in corpus(rng, config.corpus_bytes, config.addends)]
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "sums.jsonl", documents)
    write_rows(out / "test.jsonl", [make_row(addends) for addends in questions[: config.test]])
    for i in range(config.train_sets):
        part = questions[config.test + i * n_train :][:n_train]
        write_rows(out / f"train_{i + 1}.jsonl", training_set(rng, part, config.correct))
    print(f"{out}: {len(documents):,} documents of sums; {config.train_sets} training sets of "
          f"{n_train} questions, {config.correct} correct; {config.test} questions for the test")


if __name__ == "__main__":
    run_cli(main, Config)
