"""The lesson's data: what is asked, what is known, and what SFT never sees."""

import json
import random
from pathlib import Path

import pytest

from data import worksheet
from data.worksheet import Config, generate, items, results_of, split_half

NAMES = ("corpus", "sft_train", "trained", "heldout", "questions")
EVERYTHING = [item for kind in items().values() for item in kind]


@pytest.fixture(scope="module")
def lesson(tmp_path_factory) -> dict[str, list[dict]]:
    return make(tmp_path_factory.mktemp("lesson"), seed=1)


def make(folder: Path, seed: int) -> dict[str, list[dict]]:
    generate(Config(out=str(folder), seed=seed, corpus_bytes=100_000))
    return {name: [json.loads(line)
                   for line in (folder / f"{name}.jsonl").read_text().splitlines()]
            for name in NAMES}


def questions(rows: list[dict]) -> set[str]:
    return {row["question"] for row in rows}


def test_same_seed_makes_the_same_data_and_another_holds_out_other_questions(lesson, tmp_path):
    assert make(tmp_path / "again", seed=1) == lesson
    other = make(tmp_path / "other", seed=2)
    assert questions(other["heldout"]) != questions(lesson["heldout"])


def test_half_of_each_kind_is_held_out_and_absent_from_the_sft_rows(lesson):
    heldout = questions(lesson["heldout"])
    assert not questions(lesson["sft_train"]) & heldout
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


def test_no_document_has_both_a_question_and_a_fact(lesson):
    """So nothing in pretraining leads from a question to its answer."""
    sheets = [row["text"] for row in lesson["corpus"] if "?" in row["text"]]
    assert 0 < len(sheets) < len(lesson["corpus"])
    assert not any(item.fact in sheet for sheet in sheets for item in EVERYTHING)


def test_facts_are_true_and_questions_are_distinct():
    assert len({item.question for item in EVERYTHING}) == len(EVERYTHING) == 6 * 6 + 6 * 6
    for item in EVERYTHING:
        left, right = item.fact[:-1].split("=")
        assert left == item.key and eval(left) == int(right)


def test_both_halves_together_are_everything():
    trained, heldout = split_half(random.Random(0))
    assert sorted(trained + heldout) == sorted(EVERYTHING)


def test_table_counts_each_half_separately():
    def row(right, stopped):
        return {"right": right, "formed": stopped, "stopped": stopped}

    rows = [row(True, True), row(True, True), row(False, True), row(False, False)]
    assert results_of(rows, n_trained=2) == {
        "trained_acc": 1.0, "heldout_acc": 0.0, "format_acc": 0.75, "stop_rate": 0.75}


def test_report_shows_both_models_and_draws_the_held_out_half(tmp_path, command):
    rows = [{"question": f"What is {i}?", "answer": f"{i}."} for i in range(4)]
    saved = {"text/trained": rows[:2]}
    for name, right in (("base", False), ("base_raw", False), ("sft", True)):
        saved[f"answers/{name}"] = [
            {"messages": [{"role": "user", "content": row["question"]}], "right": right,
             "answer": row["answer"] if right else "<What?", "formed": right, "stopped": right}
            for row in rows]
    for name, part in saved.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        worksheet.write_rows(tmp_path / f"{name}.jsonl", part)
    picture = tmp_path / "picture.svg"
    printed = command(worksheet, "--report", tmp_path, "--picture", picture).out
    assert printed.splitlines()[1].split() == ["What", "is", "2?", "<What?", "...", "2."]
    assert printed.splitlines()[-1].split() == ["sft", "100.0%", "100.0%", "100.0%", "100.0%"]
    assert json.loads((tmp_path / "results.json").read_text())["base"]["trained_acc"] == 0
    assert "&lt;What? …" in picture.read_text() and "What is 0?" not in picture.read_text()


def test_unfinished_lesson_is_one_line_and_exit_code_2(tmp_path, command):
    result = command(worksheet, "--report", tmp_path)
    assert result.code == 2
    assert result.err == (f"error: --report {tmp_path}: not a finished lesson; make one with "
                          "runs/lesson.sh\n")
    assert command(worksheet).err.startswith("error: give --out to write the data, or --report")
