"""One network: whatever you change in model.py changes training, evaluation and generation alike,
with and without nanosft/fast.py."""

import copy
import functools
import json

import pytest
import torch
import torch.nn.functional as F
from helpers_training import (
    ALONE,
    fine_tune,
    metrics,
    pretrain,
    quietly,
    random_examples,
    sft_folder,
    text_folder,
    tiny_model,
)

import evaluate as evaluate_file
import model as model_file
from model import GPT, MLP, Attention, Block
from nanosft import fast
from train_gpt2 import MicroBatch, evaluate
from train_sft import forward_sft

PROMPTS = [[72, 105], [1], [3, 1, 4, 1, 5, 9, 2, 6], [258, 104, 105, 260, 259]]
REFUSED = {  # change: the fast forms that do not agree with it
    "a window": ["attention_for", "attend_cached"], "label smoothing": ["nll_sum"],
    "the end token left out": ["nll_sum"],
    "a bias on the logits": ["nll_sum"], "a cap on the logits": ["nll_sum"]}


# ----- the changes: each wraps a function of model.py --------------------------------------------


def changed(monkeypatch, owner, name: str, change) -> None:
    """owner.name becomes change(its old self, *args, **kwargs)."""
    old = getattr(owner, name)
    monkeypatch.setattr(owner, name, functools.wraps(old)(
        lambda *args, **kwargs: change(old, *args, **kwargs)))


def squared_relu(monkeypatch):
    monkeypatch.setattr(MLP, "forward", lambda mlp, x: mlp.c_proj(F.relu(mlp.c_fc(x)).square()))


def attention_scale(monkeypatch):
    changed(monkeypatch, Attention, "forward",
            lambda old, layer, x, attend: old(layer, x, lambda q, k, v: attend(2 * q, k, v)))


def parallel_block(monkeypatch):
    monkeypatch.setattr(Block, "forward", lambda block, x, attend: (
        x + block.attn(block.ln_1(x), attend) + block.mlp(block.ln_2(x))))


def window(monkeypatch):
    """Each token sees only itself and the four before it."""

    def windowed(old, segments, device=None):
        def attend(q, k, v):
            T = q.size(2)
            near = (torch.arange(T)[:, None] - torch.arange(T) < 5).to(q.device)
            mask = near.tril()
            if segments is not None:
                mask = mask & model_file.isolated_mask(segments.to(q.device))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attend

    old = GPT.attention_for
    monkeypatch.setattr(GPT, "attention_for", staticmethod(functools.partial(windowed, old)))


def label_smoothing(monkeypatch):
    def smoothed(old, gpt, x, targets, weights=None):
        kept = targets != -100
        uniform = -gpt.logits(x[kept])[:, : gpt.config.n_vocab].log_softmax(1).mean(1)
        weights_kept = 1.0 if weights is None else weights[kept]
        return 0.9 * old(gpt, x, targets, weights) + 0.1 * (weights_kept * uniform).sum()

    changed(monkeypatch, GPT, "nll_sum", smoothed)


def end_token_left_out(monkeypatch):
    """The loss ignores the end of an example."""
    changed(monkeypatch, GPT, "nll_sum", lambda old, gpt, x, targets, weights=None: (
        old(gpt, x, targets.masked_fill(targets == 256, -100), weights)))


def logit_bias(monkeypatch):
    changed(monkeypatch, GPT, "logits", lambda old, gpt, x: (
        old(gpt, x) + torch.linspace(-3, 3, len(gpt.lm_head.weight))))


def logit_cap(monkeypatch):
    changed(monkeypatch, GPT, "logits", lambda old, gpt, x: 2 * torch.tanh(old(gpt, x) / 2))


def scaled_embeddings(monkeypatch):
    changed(monkeypatch, torch.nn.Embedding, "forward", lambda old, *a, **kw: 3 * old(*a, **kw))


def scaled_hidden(monkeypatch):
    changed(monkeypatch, GPT, "hidden", lambda old, *args, **kwargs: 0.5 * old(*args, **kwargs))


CHANGES = {"nothing": lambda monkeypatch: None, "squared ReLU": squared_relu,
           "a scale in attention": attention_scale, "a parallel block": parallel_block,
           "a window": window, "label smoothing": label_smoothing,
           "the end token left out": end_token_left_out, "a bias on the logits": logit_bias,
           "a cap on the logits": logit_cap,
           "embeddings scaled": scaled_embeddings, "hidden scaled": scaled_hidden}


def a_batch() -> MicroBatch:
    random = torch.Generator().manual_seed(5)
    x, y = torch.randint(0, 261, (2, 4, 32), generator=random)
    y[:, ::3], y[:, 5::9] = -100, 256
    weights = torch.randint(1, 101, (4, 32), generator=random) / 100
    return MicroBatch(x, y, weights, (torch.arange(32) // 12).expand(4, 32))


def definition(model, batch) -> torch.Tensor:
    """The loss by full logits, from model.py's own functions, whatever they are now."""
    return GPT.nll_sum(model, GPT.hidden(model, batch.x, batch.segments), batch.y, batch.weights)


def naive(model, prompt, n) -> list[int]:
    """The most likely next id, n times, everything computed anew for each."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1, :261].argmax()))
    return ids[len(prompt) :]


@pytest.mark.teach
@pytest.mark.parametrize("change", CHANGES)
def test_training_evaluation_and_generation_follow_a_changed_network(
        change, monkeypatch, capsys):
    monkeypatch.setattr(fast, "LOOP_FROM", 0)  # attention by a loop wherever it agrees
    original, batch = tiny_model(spread=0.3), a_batch()
    unchanged = forward_sft(original, *batch[:4])
    CHANGES[change](monkeypatch)
    plain, quick = copy.deepcopy(original), fast.speed_up(copy.deepcopy(original))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == REFUSED.get(change, [])
    want = definition(plain, batch)
    assert (change == "nothing") == torch.allclose(want, unchanged, rtol=1e-5)
    want.backward()
    answers = [naive(plain, prompt, 15) for prompt in PROMPTS]
    for model in (copy.deepcopy(original), quick):
        loss = forward_sft(model, *batch[:4])
        loss.backward()
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-4)
        for p, q in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-3)
        found = evaluate(model, [batch], ALONE, forward_sft)
        n = float(batch.weights[batch.y != -100].sum())  # evaluate divides by all of them
        assert found["val_loss"] == pytest.approx(want.item() / n, rel=1e-5)
        assert model.generate(PROMPTS, 15, temperature=0) == answers


def test_a_new_parameter_of_the_loss_is_trained_although_it_starts_at_zero(monkeypatch):
    """Value and gradients of everything else are the same: only its own gradient tells."""

    def biased(old, gpt, x):
        return old(gpt, x) + gpt.bias

    changed(monkeypatch, GPT, "logits", biased)
    model = tiny_model()
    model.bias = torch.nn.Parameter(torch.zeros(()))
    forward_sft(fast.speed_up(model), *a_batch()[:4]).backward()
    assert model.bias.grad is not None


def test_layer_that_does_not_attend_to_the_cache_is_noticed(monkeypatch):
    def own(layer, x, attend):
        B, T, C = x.shape
        q, k, v = layer.c_attn(x).view(B, T, 3, layer.n_head, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return layer.c_proj(y.transpose(1, 2).reshape(B, T, C))

    monkeypatch.setattr(Attention, "forward", own)
    with pytest.raises(AssertionError, match="did not call attend"):
        tiny_model().generate(PROMPTS, 3)


# ----- nothing depends on speed_up ---------------------------------------------------------------


def test_both_trainers_evaluation_and_generation_give_the_same_without_speed_up(
        tmp_path, monkeypatch):
    sft = sft_folder(tmp_path / "sft", train=random_examples(23), val=random_examples(5, seed=1))
    text = text_folder(tmp_path / "text", train=[*range(250)] * 2, val=[*range(250)])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "response": f"{2 * i}"}) + "\n"
                            for i in range(5)))

    def results(speed_up, out):
        calls = []
        monkeypatch.setattr(fast, "speed_up", lambda gpt, *args: (
            calls.append(gpt) or speed_up(gpt, *args)))
        pretrain(text, out / "text", max_steps=4, eval_every=2)
        fine_tune(sft, out / "sft", init=str(out / "text"), max_steps=4, eval_every=2)
        config = evaluate_file.Config(str(out / "sft"), str(rows), device="cpu", max_new_tokens=6,
                                      save=str(out / "answers.jsonl"))
        scores = json.loads(quietly(evaluate_file.main, config).splitlines()[-1])
        assert len(calls) == 3  # each of the commands, once
        log = metrics(out / "text") + metrics(out / "sft")
        return log, scores, (out / "answers.jsonl").read_text()

    log, scores, answers = results(fast.speed_up, tmp_path / "fast")
    plain_log, plain_scores, plain_answers = results(lambda gpt, *_: gpt, tmp_path / "plain")
    for a, b in zip(log, plain_log, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert scores["val_loss"] == pytest.approx(plain_scores["val_loss"], rel=1e-4)
    assert answers == plain_answers


# ----- what speed_up leaves alone ----------------------------------------------------------------


def test_fast_forms_keep_no_tensor():
    """New weights, dtypes, devices and copies after speed_up are those that compute."""
    quick, batch = fast.speed_up(tiny_model()), a_batch()
    other = tiny_model(seed=3)
    want = other(*batch[:2]), other.generate(PROMPTS, 8, temperature=0)

    def results(model):
        return model(*batch[:2]), model.generate(PROMPTS, 8, temperature=0)

    def assert_same(found):
        torch.testing.assert_close(found[0], want[0], rtol=1e-5, atol=1e-4)
        assert found[1] == want[1]

    twin = copy.deepcopy(quick)
    quick.load_state_dict(other.state_dict(), assign=True)
    quick.lm_head.weight = quick.transformer.wte.weight
    assert_same(results(quick))
    assert not torch.allclose(twin(*batch[:2]), want[0])  # a copy has its own weights
    twin.load_state_dict(other.state_dict())
    assert_same(results(twin))
    assert_same(results(quick.double().float()))
    assert quick.half().logits(torch.zeros(1, 32).half()).dtype == torch.float16
    assert copy.deepcopy(twin).to("meta").hidden(batch.x).is_meta
    assert fast.speed_up(twin) is twin and type(twin).__mro__.count(fast.Fast) == 1


@pytest.mark.parametrize("with_gradients", [True, False])
def test_speed_up_leaves_weights_gradients_and_the_global_random_state_alone(
        with_gradients, capsys):
    model, state = tiny_model(), torch.get_rng_state()
    before, config = [p.clone() for p in model.parameters()], model.config
    with torch.set_grad_enabled(with_gradients):
        fast.speed_up(model)
    assert not capsys.readouterr().out and isinstance(model.lm_head, fast.FewRows)
    assert torch.equal(state, torch.get_rng_state()) and model.config is config
    assert model.lm_head.weight is model.transformer.wte.weight
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q) and p.grad is None
