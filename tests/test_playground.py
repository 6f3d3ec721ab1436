"""tools/playground.py: the page holds real models; in a browser it answers as PyTorch does."""

import json
import re
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from check_playground import (
    Case,
    answers_of,
    check,
    data_in,
    model_in,
    prompt_of,
)
from helpers_browser import CHROMIUM, visit
from helpers_training import save_tiny_model, tiny_model

from model import GPT
from tokenizer import ALPACA, get_encoding, render_prompt
from tools import playground
from tools.playground import NETWORK, PAGE, choose_steps, template_around

HOSTILE = "</script><img src=x onerror=alert(1)><|end|>&amp;__DATA__"
END = 260  # <|end|> of the `bytes` encoding
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome")


def save_random_model(folder: Path, seed: int, template: str | None, **sizes) -> None:
    """Its <|end|> is long, and so likely: some of its answers end."""
    model = tiny_model(seed, **sizes)
    model.transformer.wte.weight.data[END] *= 3
    model.save_pretrained(folder, encoding="bytes", **({"template": template} if template else {}))


@pytest.fixture
def models(tmp_path):
    """models(template, steps, size=…) saves a base and a run and returns both folders."""

    def save(template: str = "chat", steps=(10, 20, 30), **sizes) -> tuple[str, str]:
        save_random_model(tmp_path / "base", 0, None, **sizes)
        for step in steps:
            save_random_model(tmp_path / f"sft/step_{step:06d}", step, template, **sizes)
        rows = [{"step": step, "loss": 1, "val_answer_accuracy": step / 100} for step in steps[::2]]
        (tmp_path / "sft/metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / "base"), str(tmp_path / "sft")

    return save


@pytest.fixture
def page(tmp_path, jsonl, command):
    """page(models, questions) writes p.html and returns its path."""

    def write(folders: tuple[str, str], *questions: dict) -> Path:
        rows = ["--questions", jsonl("q.jsonl", list(questions))] if questions else []
        result = command(playground, "--models", *folders, "--out", tmp_path / "p.html", *rows)
        assert result.code == 0, result.err
        return tmp_path / "p.html"

    return write


# ----- which checkpoints -------------------------------------------------------------------------


def test_checkpoints_are_chosen_where_the_accuracy_moves():
    """It rises evenly from step 30 to 100; of evenly spaced steps, none would show the rise."""
    steps = [*range(10, 1001, 10)]
    accuracies = {step: min(1, max(0, (step - 30) / 70)) for step in steps}
    assert choose_steps(steps, accuracies) == [40, 50, 60, 70, 80, 90, 1000]


def test_without_accuracies_checkpoints_are_evenly_spaced():
    assert choose_steps([*range(10, 71, 10)], {}) == [10, 20, 30, 40, 50, 60, 70]
    assert choose_steps([*range(100, 1401, 100)], {}) == [200, 400, 600, 800, 1000, 1200, 1400]


def test_few_checkpoints_are_all_taken():
    assert choose_steps([5, 7], {5: 0.3, 7: 0.3}) == [5, 7]
    assert choose_steps([9], {}) == [9]


def test_accuracies_between_evaluations_are_interpolated():
    """Measured every 50 steps only: the rise from 50 to 100 is shown by the steps between."""
    chosen = choose_steps([*range(10, 201, 10)], {50: 0.0, 100: 0.8, 150: 0.8, 200: 0.8}, n=3)
    assert chosen == [60, 80, 90, 200]


# ----- what the page holds -----------------------------------------------------------------------


def test_page_holds_the_checkpoints_in_half_precision(models, page):
    base, run = models()
    data = data_in(page((base, run)))
    assert [checkpoint["step"] for checkpoint in data["checkpoints"]] == [0, 10, 20, 30]
    assert [checkpoint["accuracy"] for checkpoint in data["checkpoints"]] == [None, 0.1, None, 0.3]
    for stop, folder in enumerate([base, *(f"{run}/step_0000{n}" for n in (10, 20, 30))]):
        state, n_vocab = GPT.from_pretrained(folder).half().float().state_dict(), 261
        for name, tensor in model_in(data, stop).state_dict().items():
            assert torch.equal(tensor[:n_vocab], state[name][:n_vocab])


@pytest.mark.parametrize("template, before", [
    ("chat", "<|user|>"), ("alpaca", ALPACA.partition("{content}")[0]), ("raw", "")])
def test_template_surrounds_the_question_as_render_prompt_does(template, before):
    encoding = get_encoding("bytes")
    first, last = template_around(encoding, template)
    ids = render_prompt(encoding, [{"role": "user", "content": HOSTILE}], template)
    assert first + list(HOSTILE.encode()) + last == ids
    assert encoding.decode(first) == before


def test_text_of_the_questions_stays_text(models, page):
    path = page(models(), {"question": HOSTILE, "about": "<b>", "as": "text", "answer": "unused"})
    own = PAGE.read_text("utf-8") + NETWORK.read_text("utf-8")
    n_tags = own.count("<") + 2 * 4  # 4 models, a tag before and after each
    assert path.read_text("utf-8").count("<") == n_tags
    assert data_in(path)["questions"] == [{"question": HOSTILE, "about": "<b>", "as": "text"}]


def test_page_loads_nothing():
    """No address in it; and its policy forbids the browser to load any."""
    text = PAGE.read_text("utf-8") + NETWORK.read_text("utf-8")
    assert not re.search(r"https?:|//\w+\.|\bsrc=|\bhref=|url\(|@import|fetch\(|import\(", text)
    assert "default-src 'none'" in text


def test_no_page_is_left_half_written(models, page, command, tmp_path, monkeypatch):
    def disk_is_full(*_):
        raise OSError(28, "No space left on device")

    folders = models()
    before = page(folders).read_bytes()
    monkeypatch.setattr(Path, "replace", disk_is_full)
    result = command(playground, "--models", *folders, "--out", tmp_path / "p.html")
    assert (result.code, result.err) == (2, f"error: --out {tmp_path}/p.html: "
                                            "No space left on device\n")
    assert (tmp_path / "p.html").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp*"))


# ----- mistakes ----------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path, command, monkeypatch):
    """refused(*flags) gives the one line that the command prints when it writes no page."""
    monkeypatch.chdir(tmp_path)

    def call(*flags) -> str:
        result = command(playground, *flags)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert not list(tmp_path.glob("*.html*"))
        return result.err

    return call


@pytest.mark.parametrize("flags, message", [
    (["--models", "nowhere", "sft"], "nowhere: no such folder"),
    (["--models", "base", "nowhere"], "nowhere: no step_* checkpoints"),
    (["--models", "base", "base"], "base: no step_* checkpoints"),
    (["--models", "empty", "sft"], "empty: no model found"),
    (["--out", "nowhere/p.html"], "--out nowhere/p.html: the folder nowhere does not exist"),
    (["--out", "sft"], "--out sft is a folder"),
    (["--questions", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
])
def test_missing_files_and_folders(models, refused, tmp_path, flags, message):
    models()
    (tmp_path / "empty").mkdir()
    defaults = {"--models": ["base", "sft"], "--out": ["p.html"]} | {flags[0]: flags[1:]}
    assert message in refused(*(word for name in defaults for word in (name, *defaults[name])))


@pytest.mark.parametrize("row, message", [
    ({"about": "x"}, "line 2: needs a `question`"),
    ({"question": 3}, "line 2: needs a `question`"),
    ({"question": ""}, "line 2: needs a `question`"),
    ({"question": "x", "about": 3}, "line 2: needs a `question`"),
    (["x"], "line 2: needs a `question`"),
    ({"question": "x", "as": "poem"}, "line 2: `as` is 'poem', but must be 'chat' or 'text'"),
])
def test_bad_rows_of_questions(models, refused, jsonl, row, message):
    path = jsonl("q.jsonl", [{"question": "fine"}, row])
    assert message in refused("--models", *models(), "--questions", path)


def test_models_that_do_not_belong_together(models, refused, tmp_path):
    base, run = models()
    save_tiny_model(tmp_path / "long", block_size=64)
    save_tiny_model(tmp_path / "pretrained/step_000010", template=None)
    tiny_model().save_pretrained(tmp_path / "gpt2", encoding="gpt2")
    assert "block_size is 32, but the base model has 64" in refused("--models", "long", run)
    assert "has no template, so it is not fine-tuned" in refused("--models", base, "pretrained")
    assert "the encoding is gpt2, but the page reads bytes" in refused("--models", "gpt2", run)


def test_models_too_large_for_a_page_are_refused_with_both_sizes(models, refused):
    """4 models of 12 · 384² · 3 weights in layers, and a little more: 5.5 million each."""
    message = refused("--models", *models(n_layer=3, n_embd=384))
    assert re.search(r"4 models of 5,\d+,\d+ weights make a page of 5\d\.\d MB, more than 16 MB",
                     message)


def test_weights_beyond_half_precision_are_refused(models, refused, tmp_path):
    base, run = models()
    model = tiny_model()
    model.transformer.wpe.weight.data[0, 0] = 1e6
    model.save_pretrained(base, encoding="bytes")
    assert "a weight is too large for half precision" in refused("--models", base, run)


# ----- in a browser ------------------------------------------------------------------------------

LOOK = """{
  status: textOf("#status")[0], answers: textOf("output"),
  complete: all("output").map((node) => node.dataset.complete),
  read: textOf("#sft .prompt .token"), special: textOf("#sft .prompt .special"),
  written: textOf("#sft .written .token"), choices: textOf("#sft .choices p"),
  bars: textOf("#sft .choice.chosen span:first-child"), progress: textOf("#progress")[0],
  hash: frame.contentWindow.location.hash, images: all("img").length,
  width: frame.contentDocument.documentElement.scrollWidth,
}"""


@needs_browser
def test_browser_answers_as_pytorch_does(models, page):
    """Also text that is not ASCII, and text that looks like markup or like special tokens."""
    base, run = models(steps=(10, 20), block_size=64)
    own = [{"question": text, "as": "text"} for text in ("7+5=", "é\n漢🙂")]
    path, chats = page((base, run), *own), ["What is 2+4?", " ", "<|user|>é</b>", "+%&=#"]
    result = check(path, base, run, chats)
    assert (result.answers, result.different, result.agrees()) == (3 * (2 + 4), 0, True)
    data = data_in(path)
    prompts = [prompt_of(data, Case(text, "chat")) for text in chats]
    lengths = [len(ids) for stop in (0, 1, 2)
               for ids in answers_of(model_in(data, stop), prompts, data["stops"])]
    assert min(lengths) < 20 and max(lengths) > 40  # some end, and some fill the context


@needs_browser
def test_browser_reads_the_alpaca_template_as_pytorch_does(models, page):
    base, run = models("alpaca", steps=[10], block_size=192)
    result = check(page((base, run)), base, run, ["What is 2+4?", "<|end|>"])
    assert (result.answers, result.agrees()) == (2 * 2, True)


@needs_browser
def test_checker_notices_a_wrong_forward_pass(models, page):
    base, run = models(block_size=64)
    path = page((base, run))
    text = path.read_text("utf-8")
    assert text.count("variance + 1e-5") == 1
    path.write_text(text.replace("variance + 1e-5", "variance + 1e-1"), "utf-8")
    assert not check(path, base, run, ["What is 2+4?"]).agrees()


@needs_browser
def test_page_in_a_window_of_a_phone(models, page):
    """The address, hostile text, questions without an answer, the slider, and the keyboard."""
    path = page(models(block_size=64))
    focus = "frame.contentWindow.focus(); all('#sft .written .token')[1].focus()"
    right = "press('#sft .written .token:focus', 'ArrowRight')"
    slide = """all("#step")[0].value = 1;
        for (const name of ["input", "change"]) send("#step", new Event(name))"""
    enter = "all('#question')[0].value = 'a+b &c'; press('#question', 'Enter')"
    nothing, hostile, long, text, focused, moved, slid, typed = visit(
        path, LOOK, "1", f"#q={quote(HOSTILE)}", f"#q={'x' * 61}", "#q=7+5=&as=text&step=20",
        focus, right, slide, enter)
    shown = (nothing, hostile, long, text, focused, moved, slid, typed)
    assert max(found["width"] for found in shown) <= 360  # nothing to scroll sideways
    for found, message in ((nothing, "Type a question."), (long, "This is too long: with the")):
        assert found["status"].startswith(message)
        assert (found["complete"], found["answers"]) == (["false"] * 2, [""] * 2)
    assert hostile["special"] == ["<|user|>", "<|end|>", "<|assistant|>"]
    assert "".join(hostile["read"][1:-2]) == HOSTILE.replace(" ", "·") and hostile["images"] == 0
    assert hostile["complete"] == ["true", "true"] and hostile["progress"].startswith("Step 30 of")
    assert "".join(text["read"]) == "7+5=" and text["progress"].startswith("Step 20 of 30")
    assert focused["choices"] == ["Token 2 of the answer was chosen from:"]
    assert focused["bars"] == [focused["written"][1]]
    assert moved["choices"] == slid["choices"] == ["Token 3 of the answer was chosen from:"]
    assert slid["answers"][0] == text["answers"][0] and slid["answers"][1] != text["answers"][1]
    assert slid["hash"] == "#q=7%2B5%3D&as=text&step=10"
    assert typed["hash"] == "#q=a%2Bb%20%26c&as=text&step=10" and typed["read"][-1] == "c"
