"""tools/export.py: a model without its training state, in the dtype that was asked for."""

import json

import pytest
import torch
from helpers_training import (
    fine_tune,
    pretrain,
    random_examples,
    sft_folder,
    text_folder,
    weights_of,
)
from safetensors.torch import load_file

from nanosft.weights import newest_checkpoint
from tools import export

WITHOUT_TEMPLATE = {"README.md", "config.json", "generation_config.json", "model.safetensors",
                    "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{kind: the folder of a run of one step}."""
    folder = tmp_path_factory.mktemp("runs")
    fine_tune(sft_folder(folder / "sft", train=random_examples(4)), folder / "out_sft", max_steps=1)
    pretrain(text_folder(folder / "text", train=[1, 2, 3] * 30), folder / "out_text", max_steps=1)
    return {"sft": folder / "out_sft", "pretraining": folder / "out_text"}


@pytest.mark.parametrize("kind, more", [("sft", {"chat_template_generation.jinja"}),
                                        ("pretraining", set())])
def test_export_is_the_checkpoint_without_its_training_state(kind, more, runs, command, tmp_path):
    result = command(export, "--model", runs[kind], "--out", tmp_path / "model")
    assert result.code == 0, result.err
    found = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert found.keys() == WITHOUT_TEMPLATE | more
    step = newest_checkpoint(runs[kind])
    saved = {path.name: path.read_bytes() for path in step.iterdir()}
    assert saved.keys() - found.keys() == {"training_state.pt", "SHA256SUMS"}
    assert all(saved[name] == found[name] for name in found)
    for a, b in zip(weights_of(tmp_path / "model"), weights_of(step), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_export_rounds_the_weights_to_the_dtype(dtype, runs, command, tmp_path):
    import transformers

    command(export, "--model", runs["sft"], "--out", tmp_path / "model", "--dtype", dtype)
    exact = load_file(newest_checkpoint(runs["sft"]) / "model.safetensors")
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert found.keys() == exact.keys()
    assert all(torch.equal(t, exact[name].to(getattr(torch, dtype))) for name, t in found.items())
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == dtype
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert theirs.dtype == getattr(torch, dtype)


def test_export_never_overwrites_and_leaves_nothing_behind_on_an_error(runs, command, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("mine")
    result = command(export, "--model", runs["sft"], "--out", tmp_path / "model")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "is not empty; delete it or choose another folder" in result.err
    result = command(export, "--model", tmp_path / "nowhere", "--out", tmp_path / "new")
    assert result.code == 2 and "nowhere: no model found" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
