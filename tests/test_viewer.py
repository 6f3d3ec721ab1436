"""`sft_data.py --show`: the text and the page show exactly what the trainer's rows hold."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import GPT, IGNORE_INDEX, GPTConfig
from nanosft.errors import UserError
from nanosft.report import fill_of
from nanosft.viewer import PAGE, quoted, token_text
from packing import LAYOUTS
from sft_data import Config, SFTDataset, show
from tokenizer import get_encoding

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = "</script><b>\x1b[31m\u202e__DATA__\r\\x"


@pytest.fixture
def pair(sft_shards) -> str:
    """Two examples, of 9 and 8 ids, that share a row of 20: 16 columns and 4 of padding."""
    return sft_shards([{"prompt": "hi", "response": "yo"}, {"prompt": "\n", "response": "é"}])


@pytest.fixture
def many(sft_shards) -> str:
    """26 examples: 24 of many lengths, one with weights of 1 and 0.5, one that is hostile."""
    rows = [{"prompt": "x" * (3 * i % 17 + 1), "response": HOSTILE[: i + 2]} for i in range(24)]
    weighted = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no"},
                {"role": "user", "content": "r"},
                {"role": "assistant", "content": "half", "weight": 0.5}]
    return sft_shards([*rows, {"messages": weighted}, {"prompt": "h", "response": HOSTILE}])


def config(data: str | None, **changes) -> Config:
    """seed None keeps the order of the data."""
    return Config(**{"data": data, "show": 1, "block_size": 20, "seed": None, **changes})


def save_model(folder: Path, block_size: int = 64, encoding: str = "bytes") -> str:
    torch.manual_seed(0)
    vocab_size = {"bytes": 320, "gpt2": 50304}[encoding]
    model = GPT(GPTConfig(block_size, vocab_size, n_layer=1, n_head=2, n_embd=16))
    model.save_pretrained(folder / "model", encoding=encoding, template="chat")
    return str(folder / "model")


@pytest.fixture
def shown(capsys):
    """shown(data, flag=…) gives the lines that --show prints."""

    def lines(data: str, **changes) -> list[str]:
        show(config(data, **changes))
        return capsys.readouterr().out.splitlines()

    return lines


# ----- text --------------------------------------------------------------------------------------


def test_each_position_of_a_row_is_one_line(pair, shown):
    """Positions restart at 0 with the second example; its first id is never a target."""
    lines = shown(pair)
    assert lines[2] == "row 1 of 1: 2 examples, 16 tokens of 20, 6 targets in the loss"
    assert [line.rstrip("-") for line in lines[3:]] == [
        "column position example  input                target               weight  state",
        "--- example 0, 9 tokens ",
        "     0        0       0  <|user|>        258  ignored                  0%  context",
        "     1        1       0  'h'             104  ignored                  0%  context",
        "     2        2       0  'i'             105  ignored                  0%  context",
        "     3        3       0  <|end|>         260  ignored                  0%  context",
        "     4        4       0  <|assistant|>   259  'y'             121    100%  in loss",
        "     5        5       0  'y'             121  'o'             111    100%  in loss",
        "     6        6       0  'o'             111  <|end|>         260    100%  in loss",
        "     7        7       0  <|end|>         260  ignored                  0%  context",
        "     8        8       0  <|endoftext|>   256  ignored                  0%  context",
        "--- example 1, 8 tokens ",
        "     9        0       1  <|user|>        258  ignored                  0%  context",
        r"    10        1       1  '\n'             10  ignored                  0%  context",
        "    11        2       1  <|end|>         260  ignored                  0%  context",
        r"    12        3       1  <|assistant|>   259  '\xc3'          195    100%  in loss",
        r"    13        4       1  '\xc3'          195  '\xa9'          169    100%  in loss",
        r"    14        5       1  '\xa9'          169  <|end|>         260    100%  in loss",
        "    15        6       1  <|end|>         260  ignored                  0%  context",
        "    16          padding  x 4",
    ]


def test_without_isolation_positions_run_through_the_row(pair, shown):
    lines = shown(pair, isolate=False)
    positions = [line.split()[1] for line in lines if line.endswith(("context", "in loss"))]
    assert positions == [str(i) for i in range(16)]


def test_loss_on_all_ignores_only_the_first_id_of_an_example(pair, shown):
    ignored = [line.split()[0] for line in shown(pair, loss_on="all") if "ignored" in line]
    assert ignored == ["8"]  # <|endoftext|> of example 0, followed by example 1


def test_cut_example_says_which_part_is_shown(pair, shown):
    lines = shown(pair, layout="stream", block_size=12)
    assert "--- example 1, [0:4] of its 8 tokens -" in "\n".join(lines)


def test_example_after_a_dropped_one_keeps_its_number(sft_shards, shown):
    data = sft_shards([{"prompt": "x" * 20, "response": "y"}, {"prompt": "hi", "response": "yo"}])
    assert shown(data)[4].startswith("--- example 1, 9 tokens -")


def test_validation_keeps_the_order_of_the_data_whatever_the_seed(sft_shards, shown, jsonl):
    val = jsonl("val.jsonl", [{"prompt": "Q", "response": str(i)} for i in range(9)])
    data = sft_shards([{"prompt": "Q", "response": "A"}], "--val_source", val)
    lines = shown(data, split="val", layout="pad", show=9, seed=3)
    numbers = [line.split()[2] for line in lines if line.startswith("--- example")]
    assert numbers == [f"{i}," for i in range(9)]


def test_show_more_rows_than_there_are_shows_all(pair, shown):
    assert sum(line.startswith("row ") for line in shown(pair, show=9)) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stdout, no_color, colored", [
    (Terminal, "", True), (Terminal, "1", False), (io.StringIO, "", False)])
def test_color_is_only_for_terminals_without_no_color(pair, monkeypatch, stdout, no_color, colored):
    monkeypatch.setenv("NO_COLOR", no_color)  # empty counts as not set: no-color.org
    monkeypatch.setattr(sys, "stdout", stdout())
    show(config(pair))
    assert ("\x1b[32m" in sys.stdout.getvalue()) == colored
    assert ("\x1b" in sys.stdout.getvalue()) == colored


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_no_two_tokens_look_the_same_and_none_reaches_the_terminal_raw(name, gpt2):
    encoding = get_encoding(name)
    texts = [token_text(encoding, token) for token in range(encoding.n_vocab)]
    assert len(set(texts)) == encoding.n_vocab
    assert all(text.isprintable() for text in texts)


def test_hostile_text_is_shown_and_not_obeyed(sft_shards, shown):
    data = sft_shards([{"prompt": HOSTILE, "response": "\x07\x9b"}])
    text = "\n".join(shown(data, block_size=64))
    assert all(character.isprintable() or character == "\n" for character in text)
    assert r"'\x1b'" in text and r"'\x07'" in text


def test_ascii_only_stdout_gets_escapes(pair, monkeypatch, tmp_path):
    shutil.copytree(pair, tmp_path / "é")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    show(config(str(tmp_path / "é")))
    sys.stdout.flush()
    assert rb"/\xe9, train: " in sys.stdout.buffer.getvalue()


# ----- a model -----------------------------------------------------------------------------------


def test_model_predicts_each_packed_example_as_if_it_were_alone(pair, tmp_path, shown):
    folder = save_model(tmp_path, block_size=20)  # just enough
    lines = [line for line in shown(pair, model=folder) if re.match(r" *\d+ +\d", line)]
    model, alone = GPT.from_pretrained(folder), []
    dataset = SFTDataset(pair, "train", 20, "pad", seed=None)
    for example, n in ((0, 9), (1, 7)):  # the row's last id is only predicted
        ids = torch.from_numpy(dataset.tokens(example)[0][:n])
        alone += model(ids[None])[0, :, :261].argmax(1).tolist()
    expected = [quoted(get_encoding("bytes"), id) for id in alone]
    assert [re.split("context|in loss", line)[1].split()[0] for line in lines] == expected
    verdicts = [line.split()[-1] for line in lines if "in loss" in line]
    assert set(verdicts) <= {"right", "wrong"} and len(verdicts) == 6


def test_model_that_does_not_fit_is_refused(pair, tmp_path, gpt2):
    with pytest.raises(UserError, match="--block_size 20 is above the 16 of --model"):
        show(config(pair, model=save_model(tmp_path, block_size=16)))
    with pytest.raises(UserError, match=r"--model has the encoding gpt2, but --data .* has bytes"):
        show(config(pair, model=save_model(tmp_path, encoding="gpt2")))


# ----- the page ----------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path):
    """page(data, flag=…) writes m.html and returns its path."""

    def write(data: str, **changes) -> Path:
        show(config(data, block_size=40, html=str(tmp_path / "m.html"), **changes))
        return tmp_path / "m.html"

    return write


def data_in(path: Path) -> dict:
    """The page's JSON, as a browser finds it: up to the first end of a script."""
    found = re.search(r'<script id="data"[^>]*>(.*?)</script', path.read_text("utf-8"), re.DOTALL)
    return json.loads(found[1])


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_page_holds_the_trainers_rows(many, page, layout, isolate):
    data = data_in(page(many, layout=layout, show=2, isolate=isolate, seed=3))
    dataset = SFTDataset(many, "train", 40, layout, seed=3, isolate=isolate)
    on_all = SFTDataset(many, "train", 40, layout, seed=3, isolate=isolate, loss_on="all")
    rows = data["layouts"][layout]["rows"]
    assert (data["layout"], data["isolate"], data["encoding"]) == (layout, isolate, "bytes")
    assert len(rows) == 2
    for i, row in enumerate(rows):
        expected = {name: tensor.tolist() for name, tensor in dataset[i].items()}
        tokens, n = row["tokens"], sum(segment >= 0 for segment in expected["segments"])
        assert [token[6] for token in tokens] == expected["segments"]
        assert [token[1] for token in tokens[:n]] == expected["input_ids"][:n]
        assert [token[4] for token in tokens] == [round(100 * w) for w in expected["weights"]]
        assert [token[5] > 0 for token in tokens] == (on_all[i]["labels"] >= 0).tolist()
        assert [token[3] if token[4] else IGNORE_INDEX for token in tokens] == expected["labels"]
        examples = [example for example, start, stop in dataset.plan[i] for _ in range(start, stop)]
        assert [token[8] for token in tokens[:n]] == examples[:n]


def test_other_layouts_show_the_same_examples_and_count_the_whole_split(many, page):
    layouts = data_in(page(many, show=2))["layouts"]

    def examples(layout):
        return {token[8] for row in layout["rows"] for token in row["tokens"]} - {-1}

    assert list(layouts) == list(LAYOUTS)
    for name, layout in layouts.items():
        dataset = SFTDataset(many, "train", 40, name, seed=None)
        assert examples(layout) == examples(layouts["fit"])
        assert layout["rows_total"] == len(dataset) and layout["fill"] == fill_of(dataset)
        assert layout["examples_per_row"] == 26 / len(dataset)


def test_markup_in_the_data_stays_text(many, page):
    path = page(many, show=26, layout="pad")
    assert path.read_text("utf-8").count("<") == PAGE.read_text("utf-8").count("<")
    rows = data_in(path)["layouts"]["pad"]["rows"]
    answers = ["".join(token[2] for token in row["tokens"] if token[4]) for row in rows]
    assert r"</script><b>\x1b[31m\xe2\x80\xae__DATA__" + "\r\\\\x<|end|>" in answers


def test_no_page_is_left_half_written(pair, page, tmp_path, monkeypatch):
    def disk_is_full(*_):
        raise OSError(28, "No space left on device")

    before = page(pair).read_bytes()
    monkeypatch.setattr(Path, "replace", disk_is_full)
    with pytest.raises(UserError, match=r"--html .*m\.html: No space left on device"):
        page(pair, layout="pad")
    assert (tmp_path / "m.html").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp*"))


@pytest.mark.parametrize("changes, message", [
    ({"html": "nowhere/m.html"}, "the folder .*nowhere does not exist"),
    ({"html": "."}, "is a folder"),
    ({"data": None}, "--show needs --data"),
    ({"split": "val"}, "no val split"),
])
def test_mistakes_of_a_user_are_one_line(pair, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        show(config(**{"data": pair} | changes))
    assert "\n" not in str(error.value)


def test_page_of_version_1_data_does_not_offer_loss_on_all(pair, page):
    """It cannot tell an answer kept as context from a prompt; what else it shows is right."""
    new, meta = data_in(page(pair)), Path(pair, "meta.json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"version": 1}))
    Path(pair, "SHA256SUMS").unlink()
    old = data_in(page(pair))
    assert (new.pop("has_all"), old.pop("has_all")) == (True, False)
    assert new == old
    with pytest.raises(UserError, match="format version 1"):
        page(pair, loss_on="all")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome")
@pytest.mark.parametrize("layout", ["pad", "fit"])
def test_browser_counts_what_python_counts(many, page, tmp_path, layout):
    """With the mask off every target that can be trained is trained."""
    path = page(many, show=3)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000",
               "--dump-dom", f"file://{path}#layout={layout}&mask=off"]
    dom = subprocess.run(command, capture_output=True, timeout=60, text=True).stdout
    main = re.search("<main[^>]*>", dom)[0]
    rows = data_in(path)["layouts"][layout]["rows"]
    tokens = [token for row in rows for token in row["tokens"] if token[6] >= 0]
    assert f'data-layout="{layout}"' in main
    assert f'data-tokens="{len(tokens)}"' in main
    assert f'data-trained="{sum(token[5] > 0 for token in tokens)}"' in main
    assert re.search(r"(\d+) of \1 targets in the loss \(100.0%\)", dom)
    assert "<b>" not in re.search("<main.*</main>", dom, re.DOTALL)[0]
