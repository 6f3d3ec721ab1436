"""`sft_data.py --show`: the text and the page say what the trainer's rows hold."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model import GPT, IGNORE_INDEX, GPTConfig
from sft_data import Config, SFTDataset, prepare
from tokenizer import get_encoding
from viewer import PAGE, quoted, show, token_text

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = "</script><b>\x1b[31m\u202e__DATA__\r\\x"


def make(folder: Path, *rows: dict) -> str:
    """Shards of these rows, one token a byte."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(Config(source=(str(folder / "rows.jsonl"),), out=str(folder / "sft"),
                   encoding="bytes", val_fraction=0, workers=1))  # fmt: skip
    return str(folder / "sft")


@pytest.fixture
def pair(tmp_path, capsys) -> str:
    """Two examples, of 9 and 8 ids, that share a row of 20: 16 columns and 4 of padding."""
    data = make(tmp_path, {"prompt": "hi", "response": "yo"}, {"prompt": "\n", "response": "é"})
    capsys.readouterr()
    return data


@pytest.fixture
def many(tmp_path, capsys) -> str:
    chats = [{"prompt": "x" * (3 * i % 17 + 1), "response": HOSTILE[: i + 2]} for i in range(24)]
    weighted = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no"},
                {"role": "user", "content": "r"},
                {"role": "assistant", "content": "half", "weight": 0.5}]  # fmt: skip
    hostile = {"prompt": "h", "response": HOSTILE}
    data = make(tmp_path, *chats, {"messages": weighted}, hostile)
    capsys.readouterr()
    return data


def config(data: str, **changes) -> Config:
    """seed None keeps the order of the data."""
    return Config(**{"data": data, "show": 1, "block_size": 20, "seed": None, **changes})


def lines_of(capsys, config: Config) -> list[str]:
    show(config)
    return capsys.readouterr().out.splitlines()


def save_model(folder: Path, block_size: int = 64, encoding: str = "bytes") -> str:
    torch.manual_seed(0)
    vocab_size = {"bytes": 320, "gpt2": 50304}[encoding]
    model = GPT(GPTConfig(block_size, vocab_size, n_layer=1, n_head=2, n_embd=16))
    model.save_pretrained(folder / "model", encoding=encoding, template="chat")
    return str(folder / "model")


# ----- text --------------------------------------------------------------------------------------


def test_each_place_of_a_row_is_one_line(pair, capsys):
    """Positions start again with the second example; its first id is nobody's target."""
    lines = lines_of(capsys, config(pair))
    assert lines[2] == "row 1 of 1: 2 examples, 16 tokens of 20, 6 trained targets"
    assert [line.rstrip("-") for line in lines[3:]] == [
        "column position example  input                target               weight  state",
        "--- example 0, 9 tokens ",
        "     0        0       0  <|user|>        258  ignored                  0%  context",
        "     1        1       0  'h'             104  ignored                  0%  context",
        "     2        2       0  'i'             105  ignored                  0%  context",
        "     3        3       0  <|end|>         260  ignored                  0%  context",
        "     4        4       0  <|assistant|>   259  'y'             121    100%  trained",
        "     5        5       0  'y'             121  'o'             111    100%  trained",
        "     6        6       0  'o'             111  <|end|>         260    100%  trained",
        "     7        7       0  <|end|>         260  ignored                  0%  context",
        "     8        8       0  <|endoftext|>   256  ignored                  0%  context",
        "--- example 1, 8 tokens ",
        "     9        0       1  <|user|>        258  ignored                  0%  context",
        r"    10        1       1  '\n'             10  ignored                  0%  context",
        "    11        2       1  <|end|>         260  ignored                  0%  context",
        r"    12        3       1  <|assistant|>   259  '\xc3'          195    100%  trained",
        r"    13        4       1  '\xc3'          195  '\xa9'          169    100%  trained",
        r"    14        5       1  '\xa9'          169  <|end|>         260    100%  trained",
        "    15        6       1  <|end|>         260  ignored                  0%  context",
        "    16          padding  x 4",
    ]


def test_without_isolation_positions_run_through_the_row(pair, capsys):
    lines = lines_of(capsys, config(pair, isolate=False))
    positions = [line.split()[1] for line in lines if line.endswith(("context", "trained"))]
    assert positions == [str(i) for i in range(16)]


def test_loss_on_all_spares_only_the_first_id_of_an_example(pair, capsys):
    lines = lines_of(capsys, config(pair, loss_on="all"))
    ignored = [line.split()[0] for line in lines if "ignored" in line]
    assert ignored == ["8"]  # <|endoftext|> of example 0, followed by example 1


def test_a_cut_example_says_which_part_is_shown(pair, capsys):
    lines = lines_of(capsys, config(pair, layout="stream", block_size=12))
    assert "--- example 1, [0:4] of its 8 tokens -" in "\n".join(lines)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("no_color, colours", [(None, True), ("1", False)])
def test_colour_is_for_terminals_that_want_it(pair, monkeypatch, no_color, colours):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys, "stdout", Terminal())
    show(config(pair))
    assert ("\x1b[32m" in sys.stdout.getvalue()) == colours
    assert ("\x1b" in sys.stdout.getvalue()) == colours


def test_a_file_gets_no_colour(pair, capsys):
    assert "\x1b" not in "\n".join(lines_of(capsys, config(pair)))


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_no_two_tokens_look_the_same_and_none_reaches_the_terminal_raw(name, gpt2):
    encoding = get_encoding(name)
    texts = [token_text(encoding, token) for token in range(encoding.n_vocab)]
    assert len(set(texts)) == encoding.n_vocab
    assert all(text.isprintable() for text in texts)


def test_hostile_text_is_shown_and_not_obeyed(tmp_path, capsys):
    data = make(tmp_path, {"prompt": HOSTILE, "response": "\x07\x9b"})
    capsys.readouterr()
    text = "\n".join(lines_of(capsys, config(data, block_size=64)))
    assert all(character.isprintable() or character == "\n" for character in text)
    assert r"'\x1b'" in text and r"'\x07'" in text


def test_a_stdout_that_knows_only_ascii_gets_escapes(monkeypatch, pair, tmp_path):
    shutil.copytree(pair, tmp_path / "é")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    show(config(str(tmp_path / "é")))
    assert rb"/\xe9, train: " in sys.stdout.buffer.getvalue()


def test_more_rows_than_there_are_is_all_of_them(pair, capsys):
    assert sum(line.startswith("row ") for line in lines_of(capsys, config(pair, show=9))) == 1


# ----- a model -----------------------------------------------------------------------------------


def test_the_model_predicts_each_packed_example_as_if_it_were_alone(pair, tmp_path, capsys):
    folder = save_model(tmp_path)
    lines = lines_of(capsys, config(pair, model=folder))
    shown = [line for line in lines if line[:6].strip().isdigit() and "padding" not in line]
    model = GPT.from_pretrained(folder)
    dataset = SFTDataset(pair, "train", 20, "pad", seed=None)
    alone = []
    for example, n in ((0, 9), (1, 7)):  # the row's last id is only predicted
        ids = torch.from_numpy(dataset._tokens(example, 0, n)[0].astype(np.int64))
        alone += model(ids[None])[0, :, :261].argmax(1).tolist()
    want = [quoted(get_encoding("bytes"), id) for id in alone]
    assert [re.split("context|trained", line)[1].split()[0] for line in shown] == want
    verdicts = [line.split()[-1] for line in shown if "trained" in line]
    assert set(verdicts) <= {"right", "wrong"} and len(verdicts) == 6


def test_a_model_that_does_not_fit_is_an_error(pair, tmp_path, gpt2):
    with pytest.raises(ValueError, match="--block_size 20 is above the 16"):
        show(config(pair, model=save_model(tmp_path, block_size=16)))
    with pytest.raises(ValueError, match="vocabulary gpt2"):
        show(config(pair, model=save_model(tmp_path, encoding="gpt2")))


# ----- the page ----------------------------------------------------------------------------------


def page_data(path: Path) -> dict:
    """The page's JSON, as a browser finds it: up to the first end of a script."""
    found = re.search(r'<script id="data"[^>]*>(.*?)</script', path.read_text("utf-8"), re.DOTALL)
    return json.loads(found[1])


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("layout", ["stream", "fit", "pad", "bucket"])
def test_the_page_holds_the_trainers_rows(many, tmp_path, layout, isolate):
    show(config(many, layout=layout, show=2, block_size=40, isolate=isolate, seed=3,
                html=str(tmp_path / "m.html")))  # fmt: skip
    page = page_data(tmp_path / "m.html")
    dataset = SFTDataset(many, "train", 40, layout, seed=3, isolate=isolate)
    on_all = SFTDataset(many, "train", 40, layout, seed=3, isolate=isolate, loss_on="all")
    rows = page["layouts"][layout]["rows"]
    assert (page["layout"], page["isolate"], page["encoding"]) == (layout, isolate, "bytes")
    assert len(rows) == 2
    for i, row in enumerate(rows):
        want = {name: tensor.tolist() for name, tensor in dataset[i].items()}
        tokens, n = row["tokens"], sum(segment >= 0 for segment in want["segments"])
        assert [token[6] for token in tokens] == want["segments"]
        assert [token[1] for token in tokens[:n]] == want["input_ids"][:n]
        assert [token[4] for token in tokens] == [round(100 * w) for w in want["weights"]]
        assert [token[5] > 0 for token in tokens] == (on_all[i]["labels"] >= 0).tolist()
        assert [token[3] if token[4] else IGNORE_INDEX for token in tokens] == want["labels"]
        examples = np.repeat(*zip(*[(e, stop - start) for e, start, stop in dataset.pieces(i)]))
        assert [token[8] for token in tokens[:n]] == examples[:n].tolist()


def test_the_other_layouts_show_the_same_examples_and_count_the_whole_split(many, tmp_path):
    show(config(many, show=2, block_size=40, html=str(tmp_path / "m.html")))
    layouts = page_data(tmp_path / "m.html")["layouts"]

    def examples(layout):
        return {token[8] for row in layout["rows"] for token in row["tokens"]} - {-1}

    for name, layout in layouts.items():
        dataset = SFTDataset(many, "train", 40, name, seed=None)
        assert examples(layout) == examples(layouts["fit"])
        assert layout["rows_total"] == len(dataset) and layout["fill"] == dataset.fill()
        assert layout["examples_per_row"] == 26 / len(dataset)


def test_markup_in_the_data_stays_text(many, tmp_path):
    show(config(many, show=26, layout="pad", block_size=40, html=str(tmp_path / "m.html")))
    text = (tmp_path / "m.html").read_text("utf-8")
    template = PAGE.read_text("utf-8")
    assert text.count("<") == template.count("<")  # no markup but the page's own
    rows = page_data(tmp_path / "m.html")["layouts"]["pad"]["rows"]
    answers = ["".join(token[2] for token in row["tokens"] if token[4]) for row in rows]
    assert r"</script><b>\x1b[31m\xe2\x80\xae__DATA__" + "\r\\\\x<|end|>" in answers


def test_no_page_is_left_half_written(pair, tmp_path, monkeypatch):
    path = tmp_path / "m.html"
    path.write_text("before")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ValueError, match="cannot be written: disk full"):
        show(config(pair, html=str(path)))
    assert path.read_text() == "before" and not list(tmp_path.glob("*.tmp*"))


@pytest.mark.parametrize("changes, message", [
    ({"html": "nowhere/m.html"}, "the folder .*nowhere does not exist"),
    ({"html": "."}, "is a folder"),
    ({"show": -1}, "--show -1"),
    ({"split": "val"}, "no val split"),
])  # fmt: skip
def test_what_a_user_gets_wrong_is_one_line(pair, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        show(config(pair, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome")
@pytest.mark.parametrize("layout", ["pad", "fit"])
def test_a_browser_counts_what_python_counts(many, tmp_path, layout):
    show(config(many, show=3, block_size=40, html=str(tmp_path / "m.html")))
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        f"--user-data-dir={tmp_path / 'profile'} --virtual-time-budget=3000 --dump-dom"
    )
    url = f"file://{tmp_path / 'm.html'}#layout={layout}&mask=off"
    dom = subprocess.run(
        [CHROMIUM, *flags.split(), url], capture_output=True, timeout=60, text=True
    )
    main = re.search("<main[^>]*>", dom.stdout)[0]
    rows = page_data(tmp_path / "m.html")["layouts"][layout]["rows"]
    tokens = [token for row in rows for token in row["tokens"] if token[6] >= 0]
    assert f'data-layout="{layout}"' in main
    assert f'data-tokens="{len(tokens)}"' in main
    assert f'data-trained="{sum(token[5] > 0 for token in tokens)}"' in main
    assert re.search(r"(\d+) of \1 targets trained \(100.0 %\)", dom.stdout)
    assert "<b>" not in re.search("<main.*</main>", dom.stdout, re.DOTALL)[0]
