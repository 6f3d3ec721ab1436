"""Ids in use: padding ids, which make the vocabulary a multiple of 64, have probability zero."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers_training import fine_tune, random_examples, sft_folder, tiny_model
from safetensors.torch import load_file

from model import GPT
from nanosft.weights import read_config


@pytest.fixture
def their_gpt2(tmp_path):
    """(folder, model): a randomly initialized GPT-2 of Hugging Face with GPT-2's 50257 ids."""
    import transformers

    torch.manual_seed(0)
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(vocab_size=50257, **sizes)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", model


def test_loss_of_loaded_gpt2_is_hugging_faces(their_gpt2):
    """With 47 more rows in the softmax the loss would be off by about 47/50304, a relative 1e-4."""
    folder, theirs = their_gpt2
    ours, ids = GPT.from_pretrained(str(folder)), torch.randint(0, 50257, (4, 33))
    assert (ours.config.vocab_size, ours.config.n_vocab) == (50304, 50257)
    want = F.cross_entropy(theirs(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    loss_sum = ours(ids[:, :-1], ids[:, 1:])
    assert loss_sum.item() / (4 * 32) == pytest.approx(want.item(), rel=1e-6)


def test_padding_ids_have_probability_zero_and_no_gradient():
    """320 rows of which 261 are ids in use."""
    model = tiny_model(n_vocab=261)
    x, y = torch.randint(0, 261, (2, 8)), torch.randint(0, 261, (2, 8))
    probabilities = model(x).softmax(-1)  # (2, 8, 320)
    assert not probabilities[..., 261:].any()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 8))

    loss_sum = model(x, y)
    loss_sum.backward()
    want = -probabilities.gather(2, y[..., None]).log().sum()
    torch.testing.assert_close(loss_sum, want)
    assert not model.transformer.wte.weight.grad[261:].any()


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_padding_ids_are_never_generated(temperature):
    model = tiny_model(n_vocab=261)
    with torch.no_grad():  # make the padding ids by far the likeliest
        model.lm_head.weight[261:] = 100 * model.lm_head.weight[:59]
    answers = model.generate([[1, 2, 3], [4]], 20, temperature)
    assert max(map(max, answers)) < 261


def test_padding_rows_never_influence_a_run(tmp_path, monkeypatch):
    """Two runs that differ in the padding rows of their initial weights only."""
    data = sft_folder(tmp_path / "data", train=random_examples(11), val=random_examples(3))
    fine_tune(data, tmp_path / "a", max_steps=4)
    init = GPT._init_weights

    def init_and_change_padding(model):
        init(model)
        with torch.no_grad():
            model.transformer.wte.weight[261:] = 7.0

    monkeypatch.setattr(GPT, "_init_weights", init_and_change_padding)
    fine_tune(data, tmp_path / "b", max_steps=4)
    losses = [[json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").open()]
              for run in "ab"]
    assert losses[0] == losses[1]
    a, b = (load_file(tmp_path / run / "step_000004/model.safetensors") for run in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_files_hold_the_ids_in_use_and_nothing_else(tmp_path):
    model = tiny_model(n_vocab=261)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["wte.weight"].shape == (261, 32)
    assert read_config(tmp_path)["vocab_size"] == 261

    loaded = GPT.from_pretrained(str(tmp_path))
    x = torch.randint(0, 261, (2, 8))
    assert torch.equal(loaded(x), model(x))
    rows = loaded.transformer.wte.weight  # new rows start at the mean embedding
    torch.testing.assert_close(rows[261:], rows[:261].mean(0).expand(59, -1))


def test_data_widens_the_ids_in_use_but_never_narrows_them(tmp_path):
    """A model of 257 ids meets data of 261; a model of 270 ids keeps them."""
    data = sft_folder(tmp_path / "data", train=random_examples(5))
    for n_vocab, widened in ((257, 261), (270, 270)):
        folder = tmp_path / f"model_{n_vocab}"
        tiny_model(n_vocab=n_vocab).save_pretrained(folder)
        assert GPT.from_pretrained(str(folder)).config.n_vocab == n_vocab
        sizes = {"n_layer": None, "n_head": None, "n_embd": None}
        fine_tune(data, tmp_path / f"out_{n_vocab}", init=str(folder), max_steps=1, **sizes)
        assert GPT.from_pretrained(str(tmp_path / f"out_{n_vocab}")).config.n_vocab == widened


def test_uniform_model_starts_at_the_log_of_the_ids_in_use():
    model = tiny_model(spread=0.0, n_vocab=261)
    torch.nn.init.zeros_(model.lm_head.weight)
    x = torch.tensor([[1, 2]])
    assert model(x, x).item() / 2 == pytest.approx(math.log(261))
