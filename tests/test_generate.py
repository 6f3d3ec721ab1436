"""Generation: neither the cache nor the batch changes an answer; where an answer ends; sampling."""

import pytest
import torch
from helpers_training import EOT, tiny_model

import generate
from answer import Assistant
from nanosft import fast
from nanosft.errors import UserError
from tokenizer import get_encoding

PROMPTS = [[72, 105], [1], [3, 1, 4, 1, 5, 9, 2, 6], [258, 104, 105, 260, 259]]


@pytest.fixture(autouse=True, params=["plain", "fast", "graphed"])
def form(request, monkeypatch):
    """Everything here holds for generate.py alone and with the forms of nanosft/fast.py, of which a
    GPU runs steps recorded as CUDA graphs; without one, a recording computes the step again."""
    if request.param == "plain":
        monkeypatch.setattr(fast, "speed_up", lambda model: model)
    if request.param == "graphed":
        monkeypatch.setattr(fast, "has_graphs", lambda device: True)
    return request.param


def a_model(seed: int = 0, spread: float = 0.3):
    return fast.speed_up(tiny_model(seed, spread))  # 261 of 320 ids are in use


def naive(model, prompt, n) -> list[int]:
    """The likeliest next id, n times, everything computed anew for each."""
    ids = list(prompt)
    for _ in range(n):
        logits = model(torch.tensor([ids]))[0, -1, : model.config.n_vocab]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


# ----- the cache and the batch -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_prompts_of_any_lengths_in_a_batch_are_answered_as_alone_and_without_a_cache(seed):
    model = a_model(seed)
    want = [naive(model, prompt, 15) for prompt in PROMPTS]
    assert min(len(set(answer)) for answer in want) > 2  # no answer that only repeats itself
    assert model.generate(PROMPTS, 15, temperature=0) == want
    assert [model.generate([prompt], 15, temperature=0)[0] for prompt in PROMPTS] == want


@pytest.mark.parametrize("B", [2, 40])  # more than 32 rows: the head is multiplied another way
def test_prompts_of_the_same_length_are_answered_as_without_a_cache(B):
    """They need no mask, which is a path of its own."""
    model, prompts = a_model(), [[i, i + 1, i + 2] for i in range(B)]
    assert model.generate(prompts, 6, temperature=0) == [naive(model, p, 6) for p in prompts]


def test_cached_logits_equal_those_of_the_whole_row_at_every_step(monkeypatch):
    model, seen, sample = a_model(), [], generate.sample

    def keep_logits(logits, *args):
        seen.append(logits[:, :261])
        return sample(logits, *args)

    monkeypatch.setattr(generate, "sample", keep_logits)
    answers = model.generate(PROMPTS, 15, temperature=0)
    assert len(seen) == 15
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers)):
        whole = model(torch.tensor([prompt + answer[:-1]]))[0, len(prompt) - 1 :, :261]  # (15, V)
        cached = torch.stack([logits[row] for logits in seen])
        torch.testing.assert_close(cached, whole.detach(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("B", [1, 2, 40])
@pytest.mark.parametrize("sizes", [(24, 64), (64, 24), (8, 7)])  # 7 cannot be cut into slices
@pytest.mark.parametrize("bias", [True, False])
def test_products_with_few_rows_equal_those_of_the_layer(B, sizes, bias):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(*sizes, bias=bias), torch.randn(B, sizes[0])
    want = layer(x)
    layer.__class__ = fast.FewRows
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(y, want, atol=1e-6, rtol=1e-5)
        assert torch.equal(layer(x[:, None]), y[:, None])
    assert y.is_contiguous() or not bias
    assert torch.equal(layer(x), want) and layer(x).requires_grad  # training: F.linear


def test_logits_of_bfloat16_weights_and_of_autocast_are_close_to_those_of_float32(monkeypatch):
    """All three are given the same new ids."""
    seen = []

    def keep_logits(logits, *args):
        seen.append(logits)
        return len(seen) % 5 + torch.arange(len(logits))

    monkeypatch.setattr(generate, "sample", keep_logits)
    model = a_model()
    model.generate(PROMPTS, 5)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(PROMPTS, 5)
    model.bfloat16().generate(PROMPTS, 5)
    want, *others = torch.stack(seen).view(3, 5, 4, -1)[..., :261]
    for found in others:  # 8 bits of mantissa
        assert 0 < (found - want).abs().max() < 0.05 * want.abs().max()


def test_assistant_returns_the_answers_in_the_order_of_the_prompts():
    """It answers the shortest prompts first."""
    assistant = Assistant(a_model(), get_encoding("bytes"), None)
    alone = [assistant.answer([prompt], 6)[0] for prompt in PROMPTS]
    assert len(set(alone)) == 4
    assert assistant.answer(PROMPTS, 6, batch_size=2) == alone


# ----- where an answer ends ----------------------------------------------------------------------


def test_row_ends_with_its_stop_id_and_the_others_continue():
    model = a_model(seed=5)
    free = [naive(model, prompt, 15) for prompt in PROMPTS]
    stop_ids = [max(answer, key=answer.index) for answer in free[:3:2]]  # two rows reach them late

    def until_stop(answer):
        at = next((i for i, token in enumerate(answer) if token in stop_ids), len(answer))
        return answer[: at + 1]

    want = [until_stop(answer) for answer in free]
    assert len({len(answer) for answer in want}) == 3 and not set(want[3]) & set(stop_ids)
    assert model.generate(PROMPTS, 15, temperature=0, stop_ids=stop_ids) == want


def test_steps_are_recorded_anew_only_when_half_of_the_rows_are_finished(form, monkeypatch):
    """Prompts of 22 to 31 of 32 tokens, so one row is finished after each step."""
    sizes, record = [], fast.record

    def counted(step, device):
        sizes.append(len(step.__self__.lengths))
        return record(step, device)

    monkeypatch.setattr(fast, "record", counted)
    prompts = [[1 + n] * n for n in range(22, 32)]
    model = a_model()
    assert model.generate(prompts, 20, temperature=0) == [naive(model, p, 32 - len(p))
                                                          for p in prompts]
    assert sizes == ([10, 5, 2] if form == "graphed" else [])  # the last row has no step alone


def test_answer_ends_where_the_row_fills_the_block_size():
    model, prompts = a_model(), [[1] * 30, [2] * 32, [3] * 10]  # of 32 tokens
    answers = model.generate(prompts, 100, temperature=0)
    assert [len(answer) for answer in answers] == [2, 0, 22]
    assert answers == [naive(model, p, 32 - len(p)) for p in prompts]


def test_stream_yields_at_each_step_the_rows_that_are_still_being_answered():
    steps = list(generate.stream(a_model(), [[1] * 30, [3] * 28], 10, temperature=0))
    assert [[row for row, _ in step] for step in steps] == [[0, 1], [0, 1], [1], [1]]


def test_no_new_tokens_are_empty_answers():
    assert a_model().generate(PROMPTS, 0) == [[], [], [], []]
    assert a_model().generate([[1] * 32], 5) == [[]]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_no_id_beyond_n_vocab_is_generated_even_where_its_score_is_the_highest(temperature):
    model = a_model()
    with torch.no_grad():  # the rows that pad 261 to 320
        model.lm_head.weight[261:] *= 30
        scores = model.hidden(torch.tensor([PROMPTS[0]]))[0, -1] @ model.lm_head.weight.T
    assert scores.argmax() >= 261
    answers = model.generate(PROMPTS, 20, temperature=temperature)
    assert all(answers) and max(token for answer in answers for token in answer) < 261


# ----- sampling ----------------------------------------------------------------------------------


def drawn(probs, **sampling) -> list[float]:
    """How often `sample` draws each id of this distribution, in 2000 draws."""
    logits = torch.tensor(probs).log().expand(2000, -1)
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | sampling
    ids = generate.sample(logits, **settings, sampler=torch.Generator().manual_seed(0))
    return (ids.bincount(minlength=len(probs)) / 2000).tolist()


def test_temperature_top_k_and_top_p_by_hand():
    probs = [0.5, 0.3, 0.15, 0.05]
    assert drawn(probs) == pytest.approx(probs, abs=0.04)
    assert drawn(probs, top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert drawn(probs, top_k=500) == drawn(probs)  # more than there are
    # 0.5 alone does not hold 0.6 of the mass, so the second id is in
    assert drawn(probs, top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert drawn(probs, top_p=0.9)[3] == 0 < drawn(probs, top_p=0.9)[2]
    assert drawn(probs, top_p=1.0) == drawn(probs)
    # temperature 1/2 squares the odds: 25 : 9 : 2.25 : 0.25
    squared = [p / 36.5 for p in (25, 9, 2.25, 0.25)]
    assert drawn(probs, temperature=0.5) == pytest.approx(squared, abs=0.04)


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}])
def test_sampling_only_the_likeliest_id_is_greedy(sampling):
    model = a_model()
    assert model.generate(PROMPTS, 12, **sampling) == model.generate(PROMPTS, 12, temperature=0)


@pytest.mark.parametrize("sampling", [{}, {"top_k": 9, "top_p": 0.5}])
def test_seed_decides_the_sample_and_the_global_random_state_is_left_alone(sampling):
    model = a_model(spread=0.05)
    before = torch.get_rng_state()
    first = model.generate(PROMPTS, 12, seed=1, **sampling)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert model.generate(PROMPTS, 12, seed=1, **sampling) == first
    assert model.generate(PROMPTS, 12, seed=2, **sampling) != first


def test_generating_leaves_gradients_and_weights_alone():
    model = a_model()
    model(torch.tensor([[1, 2]]), torch.tensor([[2, EOT]])).backward()
    before = [(p.clone(), p.grad.clone()) for p in model.parameters()]
    model.generate(PROMPTS, 5)
    for p, (value, grad) in zip(model.parameters(), before):
        assert torch.equal(p, value) and torch.equal(p.grad, grad)


# ----- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[1] * 33]])
def test_empty_and_too_long_prompts_are_refused(prompts):
    with pytest.raises(UserError, match="prompts must have 1 to 32 ids"):
        a_model().generate(prompts, 5)


@pytest.mark.parametrize("sampling", [{"max_new_tokens": -1}, {"temperature": -1.0}, {"top_k": 0},
                                      {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_that_makes_no_sense_is_refused(sampling):
    [(name, value)] = sampling.items()
    with pytest.raises(UserError, match=f"{name} {value}"):
        a_model().generate([[1]], **({"max_new_tokens": 5} | sampling))
