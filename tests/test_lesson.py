"""The lesson's data: what is asked, what is known, and what SFT never sees."""

import json
import random
from pathlib import Path

import pytest

from data import worksheet
from data.worksheet import Config, items, split_half
from tools import lesson as lesson_report
from tools.lesson import by_step, curves, is_formed, scores

NAMES = ("corpus", "sft_train", "heldout", "questions", "own_words", "suggestions")
EVERYTHING = [item for kind in items().values() for item in kind]


@pytest.fixture(scope="module")
def lesson(tmp_path_factory) -> dict[str, list[dict]]:
    return make(tmp_path_factory.mktemp("lesson"), seed=1)


def make(folder: Path, seed: int) -> dict[str, list[dict]]:
    worksheet.main(Config(out=str(folder), seed=seed, corpus_bytes=300_000))
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
        assert len(heldout & {item.question for item in kind}) == (len(kind) + 1) // 2
    sft_text = json.dumps(lesson["sft_train"])
    assert not any(row["answer"] in sft_text for row in lesson["heldout"])
    assert lesson["questions"] == lesson["sft_train"] + lesson["heldout"]
    assert len(heldout) >= 100


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
    assert len({item.question for item in EVERYTHING}) == len(EVERYTHING) == 81 + 45 + 81
    for item in EVERYTHING:
        left, right = item.fact[:-1].split("=")
        assert left == item.key and eval(left) == int(right)


def test_both_halves_together_are_everything():
    trained, heldout = split_half(random.Random(0))
    assert sorted(trained + heldout) == sorted(EVERYTHING)


def test_doubles_are_as_frequent_as_a_pair_of_mirrored_facts(lesson):
    """7*7 is seen about as often as 6*7 and 7*6 together."""
    corpus = " ".join(row["text"] for row in lesson["corpus"])
    counts = [corpus.count(f" {a}*{b}=") for a in range(1, 10) for b in range(1, 10)
              if a != b]
    doubles = [corpus.count(f" {a}*{a}=") for a in range(1, 10)]
    ratio = (sum(doubles) / len(doubles)) / (sum(counts) / len(counts))
    assert 1.6 < ratio < 2.4


def test_own_words_ask_for_the_result_of_each_fact_in_the_order_of_the_questions(lesson):
    asked = [row["prompt"] + row["response"] for row in lesson["own_words"]]
    assert asked == [row["answer"] for row in lesson["questions"]]


def test_suggestions_are_what_their_line_says(lesson):
    trained, heldout = questions(lesson["sft_train"]), questions(lesson["heldout"])
    facts = " ".join(row["answer"] for row in lesson["heldout"])
    for row in lesson["suggestions"]:
        question, kind = row["question"], row["about"].split(":")[0]
        assert (question in trained) == (kind == "trained")
        assert (question in heldout) == (kind == "held out")
        assert (row["as"] == "text") == kind.startswith("a held-out fact") == (question in facts)


# ----- the report --------------------------------------------------------------------------------


def answer(i: int, right: bool, step: int | None = None) -> dict:
    """An answer to question i, as evaluate.py saves it, or with a step as the trainer does."""
    row = {"reference": f"{i}+0={i}.", "answer": f"{i}+0={i}." if right else "<What is",
           "right": right, "formed": right, "stopped": right}
    question = f"What is {i}+0?"
    if step is not None:
        return {"step": step, "prompt": f"<|user|>{question}", **row}
    return {"messages": [{"role": "user", "content": question}], **row}


@pytest.fixture
def finished(tmp_path) -> Path:
    """A lesson of four questions, two of them held out, which SFT learned at step 20."""
    rows = [{"question": f"What is {i}+0?", "answer": f"{i}+0={i}."} for i in range(4)]
    files = {"text/sft_train": rows[:2], "text/heldout": rows[2:]}
    for name, right in (("base", False), ("base_text", False), ("sft", True)):
        files[f"answers/{name}"] = [answer(i, right) for i in range(4)]
    for name, text in (("base", "3. 4+0=4."), ("sft", "?")):
        files[f"answers/{name}_own_words"] = [{"answer": text, "reference": "3."}]
    files["sft/answers"] = [answer(i, step == 20, step) for step in (10, 20) for i in (2, 3)]
    files["sft/metrics"] = [{"step": step, "loss": 1 / step, "val_loss": 2 / step}
                            for step in (10, 20)]
    for name, part in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        worksheet.write_rows(tmp_path / f"{name}.jsonl", part)
    return tmp_path


def test_scores_count_each_half_separately():
    rows = [answer(0, True), answer(1, True), answer(2, True), answer(3, False)]
    assert scores(rows, n_trained=2) == {
        "trained_acc": 1.0, "heldout_acc": 0.5, "format_acc": 0.75, "stop_rate": 0.75}


def test_format_is_one_fact_and_its_end():
    """An answer to another question has it; a fact that goes on, or another question, has not."""
    texts = {"2+4=6.": True, "2*4=6.": True, "9-4=5.": True, "2+4=6. ": False,
             "2+4=6. 1+1=2.": False, "What is 2+4?": False, "2+4=": False, "": False}
    for text, formed in texts.items():
        assert is_formed({"answer": text, "stopped": True}) == formed
        assert not is_formed({"answer": text, "stopped": False})


def test_report_prints_samples_and_a_table_and_draws_two_pictures(finished, command):
    printed = command(lesson_report, finished).out.splitlines()
    assert printed[1].split() == ["What", "is", "2+0?", "<What", "is", "…", "2+0=2."]
    assert printed[-2].split() == ["base", "100.0%", "0.0%", "0.0%", "0.0%", "0.0%"]
    assert printed[-1].split() == ["sft", "0.0%", "100.0%", "100.0%", "100.0%", "100.0%"]
    saved = json.loads((finished / "results.json").read_text())
    assert saved["base"]["own_words_acc"] == 1 and saved["sft"]["heldout_acc"] == 1
    picture = (finished / "before_after.svg").read_text()
    assert "&lt;What is …" in picture and "What is 0+0?" not in picture
    assert (finished / "moment.png").read_bytes().startswith(b"\x89PNG")


def test_moment_starts_with_the_base_and_shows_held_out_questions_only(finished):
    steps = by_step(finished)
    assert {step: len(rows) for step, rows in steps.items()} == {0: 2, 10: 2, 20: 2}
    assert curves(steps) == {"stops": [0, 0, 1], "has the form a+b=c.": [0, 0, 1],
                             "is about the question": [0, 0, 1], "is right": [0, 0, 1]}


def test_unfinished_lesson_is_one_line_and_exit_code_2(tmp_path, command):
    result = command(lesson_report, tmp_path)
    assert result.code == 2
    assert result.err == (f"error: {tmp_path}: not a finished lesson; make one with "
                          "runs/lesson.sh\n")
