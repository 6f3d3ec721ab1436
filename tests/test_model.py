"""The network: GPT-2's initialization, examples that do not see each other, and the loss."""

import math

import pytest
import torch
from helpers_training import each_precision, gradients, tiny_model

from model import GPT, GPTConfig, isolated_mask, isolated_positions
from nanosft import fast
from nanosft.errors import UserError

# Three rows of 10 tokens. A number repeated is one example; -1 is padding.
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2],
                         [0, 0, 0, 0, 0, 0, 1, -1, -1, -1],
                         [0, 1, 1, 1, 1, 1, 1, 1, -1, -1]])
REAL = SEGMENTS >= 0
ROWS = torch.randint(0, 261, (3, 10), generator=torch.Generator().manual_seed(3))


def examples():
    """The places of each example, as an index into ROWS: (row, a mask of its tokens)."""
    for row, segments in enumerate(SEGMENTS):
        for number in segments[segments >= 0].unique():
            yield row, segments == number


# ----- a new model -------------------------------------------------------------------------------


def test_new_weights_have_the_standard_deviations_of_gpt2():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=8, n_head=2, n_embd=64))
    for name, p in model.named_parameters():
        if p.dim() == 2:  # 8 layers have 16 projections into the residual stream
            std = 0.02 / math.sqrt(16) if "c_proj" in name else 0.01 if "wpe" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.1), name
        else:
            assert torch.all(p == (0 if name.endswith("bias") else 1)), name


def test_head_is_the_embedding_matrix():
    model = tiny_model()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_new_model_guesses_about_equally_among_all_ids():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=32))
    x, y = torch.randint(0, 256, (2, 4, 32))
    assert model(x, y).item() / y.numel() == pytest.approx(math.log(256), abs=0.05)


def test_row_longer_than_the_block_size_is_refused():
    with pytest.raises(UserError, match="33 tokens is longer than the model's block_size 32"):
        tiny_model()(torch.zeros(1, 33, dtype=torch.long))


# ----- causality ---------------------------------------------------------------------------------

# tiny_model(n_vocab=320): all 320 rows of the embedding are ids in use, so all logits are numbers.


@pytest.fixture(params=["plain", "fast"])
def form(request, monkeypatch):
    """What runs: model.py alone, with its dense mask, or nanosft/fast.py's forms, with its loop."""
    monkeypatch.setattr(fast, "LOOP_FROM", 0)
    return fast.speed_up if request.param == "fast" else lambda model: model


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_later_token_changes_no_earlier_logits(segments, form):
    model = form(tiny_model(n_vocab=320))
    before = model(ROWS, segments=segments)
    for t in range(10):
        changed = ROWS.clone()
        changed[:, t] = (changed[:, t] + 1) % 261
        after = model(changed, segments=segments)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-5, rtol=0)
        assert ((after[:, t] - before[:, t]).abs().amax(1) > 0.1).all()


# ----- isolation: examples that share a row do not see each other --------------------------------


def test_positions_and_mask_of_two_examples_and_padding_by_hand():
    segments = torch.tensor([[0, 0, 0, 1, 1, -1]])
    positions, mask = isolated_positions(segments), isolated_mask(segments)
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert mask.int().tolist() == [[[[1, 0, 0, 0, 0, 0],
                                     [1, 1, 0, 0, 0, 0],
                                     [1, 1, 1, 0, 0, 0],
                                     [0, 0, 0, 1, 0, 0],
                                     [0, 0, 0, 1, 1, 0],
                                     [0, 0, 0, 0, 0, 1]]]]  # padding sees itself: no empty softmax


@pytest.mark.teach
@each_precision
def test_packed_example_has_the_logits_that_it_has_alone(precision, form):
    model = form(tiny_model(n_vocab=320))
    with precision.autocast():
        packed = model(ROWS, segments=SEGMENTS)
        for row, at in examples():
            alone = model(ROWS[row, at][None])[0]
            precision.assert_close(packed[row, at], alone, atol=1e-5, rtol=0)


@each_precision
def test_packed_examples_have_the_summed_loss_and_gradients_of_each_alone(
        precision, form):
    model, random = form(tiny_model()), torch.Generator().manual_seed(1)
    targets = torch.randint(0, 261, (3, 10), generator=random).masked_fill(~REAL, -100)
    weights = torch.rand(3, 10, generator=random)
    want_loss = 0.0
    for row, at in examples():
        with precision.autocast():
            loss = model(ROWS[row, at][None], targets[row, at][None], weights[row, at][None])
        loss.backward()  # gradients add up
        want_loss += loss.item()
    want = gradients(model)

    model.zero_grad()
    with precision.autocast():
        loss = model(ROWS, targets, weights, SEGMENTS)
    loss.backward()
    precision.assert_close(loss, torch.tensor(want_loss), atol=0, rtol=1e-6)
    for found, expected in zip(gradients(model), want):
        precision.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_without_segments_the_examples_of_a_row_see_each_other():
    model = tiny_model(n_vocab=320)
    isolated, joined = model(ROWS, segments=SEGMENTS), model(ROWS)
    assert (isolated[0, 3:] - joined[0, 3:]).abs().max() > 0.1
    torch.testing.assert_close(isolated[0, :3], joined[0, :3], atol=1e-5, rtol=0)


def test_ids_in_the_padding_change_no_logits_outside_it(form):
    model = form(tiny_model(n_vocab=320))
    other = ROWS.masked_fill(~REAL, 7)
    assert not torch.equal(other, ROWS)
    a, b = model(ROWS, segments=SEGMENTS), model(other, segments=SEGMENTS)
    assert torch.equal(a[REAL], b[REAL])
    assert torch.isfinite(a).all()


# ----- the loss ----------------------------------------------------------------------------------


def test_loss_of_two_ids_by_hand(form):
    """With two ids, nll = ln(1 + e^-lead), the lead of the target's logit over the other one's."""
    model = form(GPT(GPTConfig(block_size=4, vocab_size=2, n_layer=1, n_head=1, n_embd=1)))
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.tensor([[3.0], [1.0]]))
    x = torch.tensor([[[1.0], [2.0], [5.0]]])  # logits (3, 1), (6, 2), (15, 5)
    targets, weights = torch.tensor([[0, 1, -100]]), torch.tensor([[1.0, 0.5, 9.0]])
    # the first target leads by 2, the second one trails by 4, the third one does not count
    want = 1.0 * math.log(1 + math.exp(-2)) + 0.5 * math.log(1 + math.exp(4))
    assert model.nll_sum(x, targets, weights).item() == pytest.approx(want, rel=1e-6)
    want = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(4))
    assert model.nll_sum(x, targets).item() == pytest.approx(want, rel=1e-6)


def test_weight_of_an_ignored_target_changes_nothing():
    model, targets = tiny_model(), ROWS.roll(-1, 1).masked_fill(~REAL, -100)
    weights = torch.ones(3, 10)
    loud = weights.masked_fill(~REAL, 1e6)
    assert torch.equal(model(ROWS, targets, loud), model(ROWS, targets, weights))
