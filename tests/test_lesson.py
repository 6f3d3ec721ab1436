"""The lesson's data: what is asked, what is known, and what SFT never sees."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data.worksheet import Config, generate, items, results_of, split_half

ROOT = Path(__file__).parents[1]
NAMES = ("corpus", "sft_train", "trained", "heldout", "questions")


@pytest.fixture(scope="module")
def lesson(tmp_path_factory) -> dict[str, list[dict]]:
    return make(tmp_path_factory.mktemp("lesson"), seed=1)


def make(folder: Path, seed: int) -> dict[str, list[dict]]:
    generate(Config(out=str(folder), seed=seed, corpus_bytes=100_000))
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in NAMES
    }


def test_the_seed_decides_the_data_and_another_seed_holds_out_other_questions(lesson, tmp_path):
    assert make(tmp_path / "again", seed=1) == lesson
    other = make(tmp_path / "other", seed=2)
    assert {row["question"] for row in other["heldout"]} != {
        row["question"] for row in lesson["heldout"]
    }


def test_half_of_each_kind_is_held_out_and_never_in_the_sft_rows(lesson):
    trained, heldout = ({r["question"] for r in lesson[name]} for name in ("sft_train", "heldout"))
    assert not trained & heldout
    for kind in items().values():
        assert len(heldout & {item.question for item in kind}) == len(kind) // 2
    sft_text = json.dumps(lesson["sft_train"])
    assert not any(row["answer"] in sft_text for row in lesson["heldout"])
    assert lesson["questions"] == lesson["trained"] + lesson["heldout"]


def test_every_question_and_every_fact_is_in_the_corpus(lesson):
    corpus = "\n".join(row["text"] for row in lesson["corpus"])
    for row in lesson["questions"]:
        assert row["question"] in corpus
        assert row["answer"] in corpus


def test_no_document_both_asks_and_states(lesson):
    """So nothing in pretraining leads from a question to its answer."""
    facts = [item.fact for kind in items().values() for item in kind]
    sheets = [row["text"] for row in lesson["corpus"] if "?" in row["text"]]
    assert 0 < len(sheets) < len(lesson["corpus"])
    assert not any(fact in sheet for sheet in sheets for fact in facts)


def test_the_facts_are_true_and_no_two_questions_are_alike():
    everything = [item for kind in items().values() for item in kind]
    assert len({item.question for item in everything}) == len(everything) == 6 * 6 + 6 * 6
    for item in everything:
        left, right = item.fact[:-1].split("=")
        assert left == item.key and eval(left) == int(right)


def test_both_halves_together_are_everything():
    trained, heldout = split_half(random.Random(0))
    assert sorted(trained + heldout) == sorted(item for kind in items().values() for item in kind)


def test_the_table_counts_each_half_by_itself():
    def row(right, stopped):
        return {"right": right, "formed": stopped, "stopped": stopped}

    rows = [row(True, True), row(True, True), row(False, True), row(False, False)]
    assert results_of(rows, n_trained=2) == {
        "trained_acc": 1.0, "heldout_acc": 0.0, "format_acc": 0.75, "stop_rate": 0.75,
    }  # fmt: skip


def test_an_unfinished_lesson_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "data/worksheet.py", "--report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no such file" in done.stderr
