"""Words reversed with the loss mask and without it: the rows, the mask, and a tiny experiment."""

import json

import numpy as np
import pytest
import torch

from model import IGNORE_INDEX
from sft_data import create_labels
from tools import reversal
from tools.reversal import (
    ANSWER,
    CAUSES,
    END,
    SETTINGS,
    SYMBOLS,
    Config,
    Run,
    forward_expected,
    forward_half,
    likeness,
    make_batch,
    make_model,
    make_rows,
    prompt_bits,
    share_right,
    split_words,
    steps_cell,
    train_run,
)
from train_sft import forward_sft

TINY = Run("tiny", length=2, n_layer=1, n_embd=16, n_words=300, steps=20)


def row_of(word: str, **changes) -> np.ndarray:
    run = Run("row", length=len(word), **changes)
    return make_rows(np.array([[SYMBOLS.index(c) for c in word]]), run, np.random.default_rng(0))


def text(ids) -> str:
    return "".join(SYMBOLS[i] for i in ids)


def test_the_row_of_hello_and_its_mask_from_the_last_prompt_token_on():
    row = row_of("hello")
    assert text(row[0]) == "<hello>olleh#"
    P = Run("row", length=5).prompt_length
    assert P == 7 and text(row[0, :P]) == "<hello>"
    x, y, weights, *_ = make_batch(row, P, prompt=0.0)
    assert (text(x[0]), text(y[0])) == ("<hello>olleh", "hello>olleh#")
    assert weights.tolist() == [[0.0] * (P - 1) + [1.0] * 6]
    labels = torch.where(weights > 0, y, IGNORE_INDEX)[0]
    assert torch.equal(labels, create_labels(row[0].tolist(), [0] * P + [100] * 6))


def test_mask_on_and_off_differ_only_in_the_weights():
    row = row_of("hello")
    on, off = (make_batch(row, 7, prompt) for prompt in (0.0, 1.0))
    assert torch.equal(on.x, off.x) and torch.equal(on.y, off.y)
    assert off.weights.tolist() == [[1.0] * 12]
    assert (on.weight_percent(), off.weight_percent()) == (600, 1200)


def test_a_weight_of_zero_is_an_ignored_label():
    batch, model = make_batch(row_of("to"), 4, 0.0), make_model(TINY, 1)
    ignored = torch.where(batch.weights > 0, batch.y, IGNORE_INDEX)
    assert torch.allclose(model(batch.x, batch.y, batch.weights), model(batch.x, ignored))


def test_filler_stands_before_the_word_and_not_in_the_answer():
    row = row_of("cat", filler=3, filler_letters=1)
    assert text(row[0]) == "<aaacat>tac#"
    assert Run("row", length=3, filler=3).prompt_length == len("<aaacat>")


@pytest.mark.parametrize("run", SETTINGS + CAUSES, ids=lambda run: run.name)
def test_held_out_words_are_not_trained(run):
    train, test = split_words(run, np.random.default_rng(1))
    train, test = set(map(tuple, train.tolist())), set(map(tuple, test.tolist()))
    assert 0 < len(train) <= run.n_words and len(test) >= 20
    assert not train & test


def test_prompt_bits_by_hand():
    assert prompt_bits(Run("", letters=(1,) * 4 + (0,) * 22)) == pytest.approx(8)  # 4 x 2 bits
    assert prompt_bits(Run("", n_words=64)) == pytest.approx(6)
    assert prompt_bits(Run("", filler=9, filler_letters=1)) == pytest.approx(4 * np.log2(26))


def test_likeness_is_1_for_equal_embeddings_and_about_0_for_random_ones():
    model = make_model(TINY._replace(n_embd=64), 1)
    assert abs(likeness(model, TINY)) < 0.05
    model.transformer.wte.weight.data[:] = torch.arange(1.0, 65)
    assert likeness(model, TINY) == pytest.approx(1)


def test_the_forwards_of_the_causes():
    model, batch = make_model(TINY, 1), make_batch(row_of("to"), 4, 1.0)
    plain, half, expected = (forward(model, batch.x, batch.y, batch.weights)
                             for forward in (forward_sft, forward_half, forward_expected))
    assert torch.allclose(half * 2, plain)
    # over all words of two letters the mean of the drawn letters' losses is the expected loss
    nll = -model(batch.x).log_softmax(-1)[0]
    by_hand = nll[0, :26].mean() + nll[1, :26].mean()
    by_hand += sum(nll[t, batch.y[0, t]] for t in range(2, 6))
    assert torch.allclose(expected, by_hand)
    masked = make_batch(row_of("to"), 4, 0.0)
    same = [forward(model, *masked[:3]) for forward in (forward_sft, forward_expected)]
    assert torch.allclose(*same)  # nothing of the answer is changed


def test_share_right_counts_exact_answers_only():
    class Fixed:
        def generate(self, prompts, max_new_tokens, temperature, stop_ids):
            assert text(prompts[0]) == "<to>" and max_new_tokens == 3 and stop_ids == [END]
            return [[SYMBOLS.index(c) for c in answer] for answer in ("ot#", "ot", "xt#", "ot#")]

    rows = np.repeat(row_of("to"), 4, axis=0)
    assert rows[0, 3] == ANSWER and share_right(Fixed(), rows, 4) == 0.5


def test_untied_head_is_trained_apart():
    model = make_model(TINY._replace(tied=False), 1)
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)


def test_steps_cell_says_when_a_run_never_got_there():
    early, late, never = ({"right": right} for right in ([0.9, 1.0], [0.0, 1.0], [0.0, 0.0]))
    assert steps_cell([early, late]) == "15 (10 to 20)"
    assert steps_cell([early, never]) == "> 15 (10 to > 20)"
    assert steps_cell([never, never]) == "> 20"


def test_a_tiny_experiment_learns_and_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reversal, "SETTINGS", [TINY])
    monkeypatch.setattr(reversal, "CAUSES", [TINY._replace(name="why", prompt_steps=5)])
    reversal.main(Config(seeds=(1,), out=str(tmp_path)))
    lines = (tmp_path / "reversal.md").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    assert len(lines) == 5 and {line.count("|") for line in lines} == {7}
    rows = json.loads((tmp_path / "reversal.json").read_text())
    assert [row["trained"] for row in rows] == ["mask on", "mask off", "why"]
    assert all(row["loss"][1] < row["loss"][0] and len(row["right"]) == 2 for row in rows[:2])
    assert (tmp_path / "reversal.png").stat().st_size > 5000


def test_equal_seeds_give_equal_runs():
    assert train_run(TINY, 3) == train_run(TINY, 3) != train_run(TINY, 4)
