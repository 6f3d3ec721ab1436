"""tools/lesson_page.py: every number on the page is PyTorch's; mistakes are one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from check_lesson_page import FIGURES, check, differences
from check_playground import data_in
from helpers_browser import CHROMIUM, visit
from helpers_training import chat_example, save_tiny_model, sft_folder, tiny_model

from data.worksheet import write_rows
from tokenizer import get_encoding, render
from tools import lesson_page
from tools.lesson_page import FAMILIES, NEEDED, PAGE, gradient_norms

ROOT = Path(__file__).parents[1]
HOSTILE = "</script><img src=x onerror=alert(1)>|<|end|><|im_end|>"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome")
# answers of unequal lengths; the first three are trained, the others held out
FACTS = [("1+1", "2"), ("9+9", "18"), ("8*8", "64"), ("2+2", "4"), ("5*5", "25"), ("9-1", "8"),
         ("9*9", "81"), ("7+7", "14")]
QUESTIONS = [{"question": f"What is {key}?", "answer": f"{key}={result}."}
             for key, result in FACTS]


def memorize(model, texts: list[list[int]], steps: int = 120) -> None:
    """Train until it writes most of these texts: then some of its answers are right."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        ids = torch.tensor([texts[step % len(texts)]])
        F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def save_models(folder: Path) -> None:
    """A base that knows some facts in its own words, and two fine-tunings that answer some."""
    base, sft, sft_all = (tiny_model(seed, block_size=64) for seed in range(3))
    memorize(base, [list(f"{key}={result}.".encode()) for key, result in FACTS[3:]])
    for model in (sft, sft_all):
        memorize(model, [chat_example(*row.values())[0] for row in QUESTIONS[3:]])
    base.save_pretrained(folder / "base", encoding="bytes")
    for name, model in (("sft", sft), ("sft_all", sft_all)):
        model.save_pretrained(folder / name / "step_000030", encoding="bytes", template="chat")
    for step in (10, 20):
        save_tiny_model(folder / f"sft/step_0000{step}", step, block_size=64)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """What runs/lesson.sh leaves, as far as the page reads it, but tiny."""
    folder = tmp_path_factory.mktemp("lesson")
    save_models(folder)
    sft_folder(folder / "sft_shards", train=[chat_example(*row.values()) for row in QUESTIONS])
    write = {
        "text/sft_train": QUESTIONS[:3], "text/heldout": QUESTIONS[3:],
        "text/own_words": [{"prompt": f"{key}=", "response": f"{result}."}
                           for key, result in FACTS],
        "base/metrics": [{"step": i, "tokens": 6400, "trained_tokens": 6400} for i in (1, 2, 3)],
        "sft/metrics": [{"step": i, "tokens": 60 + i, "trained_tokens": i}
                        | ({"val_loss": 3 / i, "val_answer_accuracy": i / 30} if i > 28 else {})
                        for i in range(1, 31)],
        **{f"answers/{name}": [
            {"messages": [{"role": "user", "content": row["question"]}], "right": i % n == 0,
             "answer": "1+1=2.", "stopped": True} for i, row in enumerate(QUESTIONS)]
           for n, name in enumerate(("base", "sft", "sft_all"), 2)},
    }
    for name, rows in write.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def page(finished, command, tmp_path) -> Path:
    result = command(lesson_page, finished, "--out", tmp_path / "p.html")
    assert result.code == 0, result.err
    return tmp_path / "p.html"


# ----- what the page holds -----------------------------------------------------------------------


def test_gradient_is_0_on_the_prompt_only_where_no_column_reads():
    ids, weights = chat_example("What is 2+2?", "2+2=4.")
    model, P = tiny_model(block_size=64, n_layer=3), weights.index(100)
    *inputs, output, logits = gradient_norms(model, {"ids": ids, "weights": weights})
    assert len(inputs) == 3
    for norms in (output, logits):
        assert not any(norms[: P - 1]) and all(norms[P - 1 : -1]) and norms[-1] == 0
    for norms in inputs:
        assert all(norms[:-1]) and norms[-1] == 0  # nothing in the loss comes after the last


def test_pieces_of_alpaca_are_what_the_renderer_writes():
    encoding, alpaca = get_encoding("bytes"), FAMILIES[-1]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = encoding.decode(render(encoding, messages, "alpaca")[0])
    assert text == f"{alpaca['before']}Hi{alpaca['between']}Ho{alpaca['after']}"


def test_marks_of_a_family_are_all_of_its_single_tokens():
    for family in FAMILIES:
        text = family["before"] + family["between"] + family["after"]
        assert set(re.findall(r"<\|\w+\|>", text)) == set(family["specials"])


def test_sections_name_code_and_tests_that_exist():
    named = re.findall(r'data-(code|test)="([^:"]+): (\w+)"', PAGE.read_text("utf-8"))
    assert len(named) == 2 * 10
    for kind, path, name in named:
        assert f"def {name}(" in (ROOT / ("tests" if kind == "test" else ".") / path).read_text()


def test_page_has_as_many_checkpoints_as_fit(finished, command, tmp_path, monkeypatch):
    """Three models always; room for one or two more."""
    one = lesson_page.bytes_of(tiny_model(block_size=64))
    for n, steps in ((4, [0, 20, 30, 30]), (5, [0, 10, 20, 30, 30])):
        monkeypatch.setattr(lesson_page, "MAX_BYTES", lesson_page.REST + n * one + 1)
        assert command(lesson_page, finished, "--out", tmp_path / "p.html").code == 0
        kinds = data_in(tmp_path / "p.html")["checkpoints"]
        assert [kind["step"] for kind in kinds] == steps


def test_page_loads_nothing():
    text = PAGE.read_text("utf-8")
    assert not re.search(r"https?:|//\w+\.|\bsrc=|\bhref=|url\(|@import|fetch\(|import\(", text)
    assert "default-src 'none'" in text


# ----- mistakes ----------------------------------------------------------------------------------


@pytest.fixture
def refused(finished, tmp_path, command):
    """refused(damage) gives the one line about a copy of the lesson after damage(copy)."""

    def call(damage) -> str:
        copy = tmp_path / "lesson"
        shutil.copytree(finished, copy)
        damage(copy)
        result = command(lesson_page, copy, "--out", tmp_path / "p.html")
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert not list(tmp_path.glob("p.html*"))
        return result.err

    return call


@pytest.mark.parametrize("name", [*NEEDED, "base", "sft/step_*", "sft_all"])
def test_incomplete_lesson_is_one_line_that_names_what_is_missing(refused, name):
    def remove(folder):
        for path in folder.glob(name):
            path.unlink() if path.is_file() else shutil.rmtree(path)

    message = refused(remove)
    assert "not a finished lesson; make one with runs/lesson.sh" in message
    assert name.split("_*")[0] in message


def test_lesson_of_another_encoding_template_or_size_is_refused(refused, tmp_path):
    def other(**settings):
        def change(folder):
            path = folder / "sft_all/step_000030/config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return change

    assert "the encoding is gpt2, but the page reads bytes" in refused(other(encoding="gpt2"))
    shutil.rmtree(tmp_path / "lesson")
    assert "its template is alpaca, but the page explains chat" in refused(other(template="alpaca"))
    shutil.rmtree(tmp_path / "lesson")
    assert "n_head is 4, but the base model has 2" in refused(other(n_head=4))


def test_models_too_large_for_the_page_are_refused_with_both_sizes(refused):
    def enlarge(folder):
        save_tiny_model(folder / "base", template=None, block_size=64, n_layer=4, n_embd=384)

    assert re.search(r"3 models of 7,\d+,\d+ weights make a page of \d+\.\d MB, more than 20 MB",
                     refused(enlarge))


def test_missing_row_of_the_measured_costs_is_one_line(refused, tmp_path, monkeypatch):
    rows = lesson_page.BUGS.read_text().replace("| the mask begins one token late |", "| gone |")
    monkeypatch.setattr(lesson_page, "BUGS", tmp_path / "bugs.md")
    (tmp_path / "bugs.md").write_text(rows)
    message = refused(lambda folder: None)
    assert "bugs.md: its table has no row 'the mask begins one token late'" in message


# ----- in a browser ------------------------------------------------------------------------------


@needs_browser
def test_every_number_is_pytorchs(page, finished):
    result = check(page, finished)
    assert result.wrong == [] and result.numbers > 5000 and result.largest < 1e-4


@needs_browser
def test_checker_notices_a_wrong_forward_pass(page, finished):
    text = page.read_text("utf-8")
    assert text.count("variance + 1e-5") == 1
    page.write_text(text.replace("variance + 1e-5", "variance + 1e-3"), "utf-8")
    assert len(check(page, finished).wrong) > 100


def test_checker_notices_what_is_missing_and_what_differs():
    found = {"a": [1, 0.5, None], "b": {"c": 2}}
    same = dict(differences(found, found))
    assert same == {".a[0]": 0, ".a[1]": 0, ".a[2]": 0, ".b.c": 0}
    for other in ({"a": [1, 0.5, None]}, {"a": [1, 0.5], "b": {"c": 2}},
                  {"a": [1, 0.5, None], "b": {"c": 3}}, {"a": [1, 0.5, 0], "b": {"c": 2}}):
        assert max(dict(differences(found, other)).values()) > 1
    assert dict(differences({"a": 0.5}, {"a": 0.6})) == {".a": pytest.approx(0.1)}
    assert dict(differences({"a": 500.0}, {"a": 501.0})) == {".a": pytest.approx(1 / 501)}


LOOK = """{
  width: frame.contentDocument.documentElement.scrollWidth, images: all("img").length,
  numbers: textOf("[data-n]"), status: textOf("#status")[0], off: textOf("#off")[0],
  families: all("#families .tokens").map((node) => node.textContent),
  forged: textOf(".forged"), ours: textOf("#families .card:first-child .token"),
  label: textOf("#shift tr:last-child td"), answers: textOf("#answers td"),
  written: textOf("#gap .written"), names: Object.keys(JSON.parse(textOf("#figures")[0])),
}"""


@needs_browser
def test_page_in_a_window_of_a_phone(page):
    """Nothing to scroll sideways; every control changes what it stands for; text stays text."""
    def change(selector, value):
        return f"""all("{selector}")[0].value = {json.dumps(value)};
            send("{selector}", new Event("input", {{ bubbles: true }}))"""

    computed = "(async () => { while (!textOf('#figures')[0]) await wait(); })()"
    first, other, typed, late, early, start = visit(
        page, LOOK, computed, change("#chat", 1), change("#typed", HOSTILE),
        change("#boundary", 16), change("#boundary", 14), change("#stop", 0))
    for shown in (first, other, typed, late, early, start):
        assert shown["width"] <= 360 and shown["images"] == 0
        assert shown["names"] == [*FIGURES] and "" not in shown["numbers"]
        assert shown["status"] == ""
    assert first["written"] != other["written"]
    assert "".join(typed["ours"]).count("<|end|>") == 3 and HOSTILE in typed["families"][2]
    assert typed["forged"] == ["<|im_end|>"]
    begins = [next(i for i, label in enumerate(shown["label"]) if label != "-100")
              for shown in (early, first, late)]
    assert begins == [13, 14, 15]
    assert "Too late by 1" in late["off"] and "Too early by 1" in early["off"]
    assert "of the held-out questions right" in late["off"]
    assert start["answers"] != early["answers"]
