"""tiny.py in one file is what the system is in many: the same ids, weights, rows, and loss."""

import ast
import json
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest
import torch
from helpers_training import ALONE, text_folder

import tiny
from model import GPT, GPTConfig
from packing import plan_rows
from sft_data import SFTDataset
from tokenizer import SPECIALS, get_encoding, render, render_prompt
from train_gpt2 import MicroBatch, TokenRows, forward_text, train_step
from train_sft import forward_sft

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "tiny.py").read_text(encoding="utf-8")
MAKE_NOTEBOOK = ("jupytext --to ipynb --set-kernel python3 tiny.py && "
                 "jupyter execute --inplace tiny.ipynb")
KEYS = ["9+8", "2+4", "1+1", "7+5", "3+9"]


def messages(key: str) -> list[dict]:
    return [{"role": "user", "content": tiny.question(key)},
            {"role": "assistant", "content": tiny.FACTS[key]}]


def packed(keys: list[str]) -> torch.Tensor:
    return tiny.pack([tiny.render(tiny.question(key), tiny.FACTS[key]) for key in keys])


@pytest.fixture
def models() -> tuple[tiny.GPT, GPT]:
    """Networks of tiny.py and of model.py with the same random weights."""
    torch.manual_seed(0)
    small = tiny.GPT()
    for p in small.parameters():
        p.data += 0.1 * torch.randn_like(p)
    large = GPT(GPTConfig(tiny.T, 320, tiny.N_LAYER, tiny.N_HEAD, tiny.C, n_vocab=tiny.N_VOCAB))
    for name, p in small.named_parameters():
        large.get_parameter(long_name(name)).data[: len(p)] = p.data  # 320 rows for 261 ids
    return small, large


def long_name(name: str) -> str:
    """h.0.attn_proj.weight -> transformer.h.0.attn.c_proj.weight"""
    name = re.sub(r"(c_fc|mlp_proj)", r"mlp.\1", re.sub(r"(c_attn|attn_proj)", r"attn.\1", name))
    return "transformer." + re.sub(r"(attn|mlp)_proj", "c_proj", name)


# ----- the same as the system --------------------------------------------------------------------


def test_ids_and_weights_of_a_chat_are_those_of_tokenizer_py():
    encoding = get_encoding("bytes")
    assert (tiny.SPECIALS, tiny.N_VOCAB) == (list(SPECIALS), encoding.n_vocab)
    for key in tiny.FACTS:
        ids, weights = zip(*tiny.render(*(message["content"] for message in messages(key))))
        assert (list(ids), [100 * weight for weight in weights]) == render(encoding, messages(key))
        assert tiny.render_prompt(tiny.question(key)) == render_prompt(encoding, messages(key))
        assert tiny.decode(ids) == encoding.decode(list(ids))


def test_packed_rows_are_those_of_sft_data_py(sft_shards):
    """Each of tiny.py's rows, written by sft_data.py and read by SFTDataset."""
    rows, at = packed(KEYS), 0
    for i, row in enumerate(rows):
        n = int((row[0] == tiny.USER).sum())
        chats = [{"messages": messages(key)} for key in KEYS[at : at + n]]
        data = SFTDataset(sft_shards(chats, name=f"row{i}"), "train", tiny.T, "fit", seed=None)
        assert len(data) == 1
        want, (x, y, weights, segments) = data[0], (t[0] for t in tiny.batch_of(row[None]))
        real = want["segments"] >= 0
        assert torch.equal(x, want["input_ids"]) and torch.equal(weights, want["weights"].long())
        assert torch.equal(torch.where(weights > 0, y, -100), want["labels"])
        assert torch.equal(segments[real], want["segments"][real])
        at += n
    assert (at, len(rows)) == (5, 3)


def test_first_fit_needs_no_more_rows_than_the_layout_fit():
    lengths = [len(tiny.render(tiny.question(key), fact)) for key, fact in tiny.FACTS.items()]
    assert len(packed(list(tiny.FACTS))) == len(plan_rows(lengths, tiny.T, "fit")) == 81


def test_rows_of_the_corpus_are_those_of_pretraining(tmp_path):
    rows = tiny.corpus_rows(random.Random(0), 5)
    ids = [*rows[:, 0, :-1].flatten().tolist(), int(rows[-1, 0, -1])]
    data = TokenRows(text_folder(tmp_path / "text", train=ids), "train", tiny.T)
    x, y, weights, segments = tiny.batch_of(rows)
    assert len(data) == 5 and weights.all() and not segments.any()
    assert torch.equal(x, torch.stack([row["input_ids"] for row in data]))
    assert torch.equal(y, torch.stack([row["labels"] for row in data]))


@pytest.mark.parametrize("stage", ["pretraining", "sft"])
def test_same_weights_give_the_same_logits_loss_and_gradient(models, stage):
    """train_step on one micro-batch of all rows, tiny.py on two."""
    small, large = models
    rows = tiny.corpus_rows(random.Random(0), 8) if stage == "pretraining" else packed(
        list(tiny.FACTS)[:15])
    x, y, weights, segments = tiny.batch_of(rows)
    logits = large(x, segments=segments)[..., : tiny.N_VOCAB]
    torch.testing.assert_close(small(x, segments), logits, rtol=1e-5, atol=1e-5)

    batch, forward = MicroBatch(x, y, n_tokens=1), forward_text
    if stage == "sft":
        labels = torch.where(weights > 0, y, -100)
        batch = MicroBatch(x, labels, weights.float(), segments, n_tokens=1)
        forward = forward_sft
    gradients = {}
    optimizer = torch.optim.AdamW(large.parameters(), fused=True)
    optimizer.register_step_pre_hook(lambda *_: gradients.update(
        {name: p.grad.clone() for name, p in large.named_parameters()}))
    metrics = train_step(large, optimizer, [batch], 0, 0.0, ALONE, forward)
    assert tiny.backward(small, rows) == pytest.approx(metrics["loss"], rel=1e-6)
    for name, p in small.named_parameters():
        torch.testing.assert_close(p.grad, gradients[long_name(name)][: len(p)],
                                   rtol=1e-4, atol=1e-6)


# ----- what tiny.py claims -----------------------------------------------------------------------


def test_each_fact_is_only_stated_and_no_document_both_asks_and_states():
    rng = random.Random(0)
    documents = [tiny.document(rng) for _ in range(5000)]
    assert len(tiny.FACTS) == 162 and all(eval(f[:-1].replace("=", "==")) for f in
                                         tiny.FACTS.values())
    assert not [text for text in documents if "?" in text and "=" in text]
    text = " ".join(documents)
    for key, fact in tiny.FACTS.items():
        assert fact in text and tiny.question(key) in text


def test_micro_batches_of_a_step_have_unequal_numbers_of_targets():
    rows = packed(list(tiny.FACTS)[:16])
    first, second = (int(tiny.batch_of(part)[2].sum()) for part in rows.tensor_split([5]))
    assert len(rows) == 8 and first > second > 0
    torch.manual_seed(0)
    model = tiny.GPT()
    means = []
    for part in rows.tensor_split([5]):
        means.append(tiny.backward(model, part))
    exact = tiny.backward(model, rows)
    assert exact == pytest.approx((means[0] * first + means[1] * second) / (first + second))
    assert exact != pytest.approx(sum(means) / 2, rel=1e-5)


def test_it_needs_nothing_but_pytorch_and_the_standard_library():
    imports = [node for node in ast.walk(ast.parse(SOURCE))
               if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name if isinstance(node, ast.Import) else node.module
             for node in imports for alias in node.names}
    assert {name.split(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}
    assert not re.search(r"\bopen\(|Path\(", SOURCE)


# ----- the file and the notebook, with a few steps -----------------------------------------------


def shortened(source: str) -> str:
    short, n = re.subn(r"^PRETRAINING_STEPS, SFT_STEPS = .*", "PRETRAINING_STEPS, SFT_STEPS = 3, 2",
                       source, flags=re.M)
    assert n == 1
    return short


def test_it_runs_alone_and_its_last_line_is_json(tmp_path):
    (tmp_path / "tiny.py").write_text(shortened(SOURCE), encoding="utf-8")
    done = subprocess.run([sys.executable, "tiny.py", "7"], cwd=tmp_path, capture_output=True,
                          text=True, env={"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    scores = json.loads(done.stdout.splitlines()[-1])
    assert {name: set(part) for name, part in scores.items()} == {
        "base": {"heldout_acc", "own_words_acc"}, "sft": {"heldout_acc"},
        "scratch": {"heldout_acc"}}
    assert all(0 <= value <= 1 for part in scores.values() for value in part.values())


@pytest.mark.parametrize("arguments", [["x"], ["1.5"], ["-1"], ["1", "2"], ["--help"], [""],
                                       ["9" * 400]])
def test_anything_but_one_number_is_one_line_and_exit_code_2(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tiny.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tiny.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and "python tiny.py 2" in err


def test_notebook_is_the_same_file_and_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the tests beside it use the other core
    notebook = nbformat.read(ROOT / "tiny.ipynb", as_version=4)
    made = jupytext.reads(SOURCE, fmt="py:percent")
    assert ([(cell.cell_type, cell.source) for cell in notebook.cells]
            == [(cell.cell_type, cell.source) for cell in made.cells]), (
        f"make it again: {MAKE_NOTEBOOK}")
    printed = "".join(output.text for cell in notebook.cells if cell.cell_type == "code"
                      for output in cell.outputs)
    assert json.loads(printed.splitlines()[-1])["sft"]["heldout_acc"] >= 0.9

    for cell in notebook.cells:
        if "PRETRAINING_STEPS, SFT_STEPS =" in cell.source:
            cell.source = shortened(cell.source)
    done = nbclient.execute(notebook, cwd=tmp_path)
    assert set(json.loads(done.cells[-1].outputs[-1].text.splitlines()[-1])) == {
        "base", "sft", "scratch"}
