"""Generation: a cache and a batch that change nothing, and when an answer ends."""

import pytest
import torch
from helpers_training import EOT, tiny_model

PROMPTS = [[72, 105], [1], [3, 1, 4, 1, 5, 9, 2, 6], [258, 104, 105, 260, 259]]


def naive(model, prompt, n) -> list[int]:
    """The likeliest next id, n times, everything computed anew for each."""
    ids = list(prompt)
    for _ in range(n):
        logits = model(torch.tensor([ids]))[0, -1, : model.config.n_vocab]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_of_unequal_prompts_is_each_alone_is_the_naive_way_token_by_token(seed):
    model = tiny_model(seed, spread=0.3)
    want = [naive(model, prompt, 15) for prompt in PROMPTS]
    assert min(len(set(answer)) for answer in want) > 2  # no row that only repeats itself
    assert model.generate(PROMPTS, 15, temperature=0) == want
    assert [model.generate([prompt], 15, temperature=0)[0] for prompt in PROMPTS] == want


def test_the_cached_logits_are_those_of_the_whole_row_at_every_step(monkeypatch):
    model, seen = tiny_model(spread=0.3), []
    sample = model._sample
    monkeypatch.setattr(
        model, "_sample", lambda logits, *a: seen.append(logits) or sample(logits, *a)
    )
    answers = model.generate(PROMPTS, 15, temperature=0)
    assert len(seen) == 15
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers)):
        whole = model(torch.tensor([prompt + answer[:-1]]))[0, len(prompt) - 1 :]  # (15, V)
        cached = torch.stack([logits[row] for logits in seen])
        torch.testing.assert_close(cached, whole.detach(), atol=1e-4, rtol=1e-5)


def test_prompts_of_one_length_need_no_mask_and_answer_the_same():
    model, prompts = tiny_model(), [[5, 6, 7], [8, 9, 10]]
    assert model.generate(prompts, 12, temperature=0) == [naive(model, p, 12) for p in prompts]


def test_a_row_stops_at_its_stop_id_which_is_its_last_and_the_others_go_on():
    model = tiny_model(seed=5, spread=0.3)
    free = [naive(model, prompt, 15) for prompt in PROMPTS]
    stops = [max(answer, key=answer.index) for answer in free[:3:2]]  # that two rows reach late

    def until_stop(answer):
        at = next((i for i, token in enumerate(answer) if token in stops), len(answer))
        return answer[: at + 1]

    want = [until_stop(answer) for answer in free]
    assert len({len(answer) for answer in want}) == 3 and not set(want[3]) & set(stops)
    assert model.generate(PROMPTS, 15, temperature=0, stop_ids=stops) == want


def test_an_answer_ends_where_the_row_fills_the_block_size():
    model = tiny_model()
    prompts = [[1] * 30, [2] * 32, [3] * 10]  # of 32 places
    answers = model.generate(prompts, 100, temperature=0)
    assert [len(answer) for answer in answers] == [2, 0, 22]
    assert answers == [naive(model, p, 32 - len(p)) for p in prompts]


def test_stream_yields_a_step_at_a_time_only_of_the_rows_that_still_run():
    model = tiny_model()
    steps = list(model.stream([[1] * 30, [3] * 28], 10, temperature=0))
    assert [[row for row, _ in step] for step in steps] == [[0, 1], [0, 1], [1], [1]]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_no_id_beyond_the_vocabulary_is_ever_generated_even_where_it_is_the_likeliest(temperature):
    model = tiny_model()
    with torch.no_grad():  # the rows that pad 261 to 320: one of them has the largest logit
        model.lm_head.weight[261:] *= 30
    logits = model(torch.tensor([PROMPTS[0]]))[0, -1]
    assert logits.argmax() >= 261
    answers = model.generate(PROMPTS, 20, temperature=temperature)
    assert all(token < 261 for answer in answers for token in answer)
    assert all(answers)


@pytest.mark.parametrize(
    "sampling", [{}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.5}]
)
def test_a_seed_gives_the_same_sample_again_and_leaves_the_global_random_state_alone(sampling):
    model = tiny_model(spread=0.05)
    before = torch.get_rng_state()
    first = model.generate(PROMPTS, 12, seed=1, **sampling)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert model.generate(PROMPTS, 12, seed=1, **sampling) == first
    assert model.generate(PROMPTS, 12, seed=2, **sampling) != first


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}])
def test_sampling_from_the_likeliest_alone_is_greedy(sampling):
    model = tiny_model()
    assert model.generate(PROMPTS, 12, **sampling) == model.generate(PROMPTS, 12, temperature=0)


def sampled(probs, **sampling):
    """Which ids _sample draws of this distribution, and how often, in 2000 draws."""
    model = tiny_model()
    logits = torch.full((2000, 320), -torch.inf)
    logits[:, : len(probs)] = torch.tensor(probs).log()
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | sampling
    ids = model._sample(logits, **settings, sampler=torch.Generator().manual_seed(0))
    return (ids.bincount(minlength=len(probs)) / 2000).tolist()


def test_temperature_top_k_and_top_p_by_hand():
    probs = [0.5, 0.3, 0.15, 0.05]
    assert sampled(probs) == pytest.approx(probs, abs=0.04)
    assert sampled(probs, top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert sampled(probs, top_k=500) == sampled(probs)  # more than there are
    # 0.5 alone does not hold 0.6 of the mass, so the second is in
    assert sampled(probs, top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert sampled(probs, top_p=0.9)[3] == 0 < sampled(probs, top_p=0.9)[2]
    assert sampled(probs, top_p=1.0) == sampled(probs)
    # temperature 1/2 squares the odds: 25 : 9 : 2.25 : 0.25
    squared = [p / 36.5 for p in (25, 9, 2.25, 0.25)]
    assert sampled(probs, temperature=0.5) == pytest.approx(squared, abs=0.04)


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[1] * 33]])
def test_an_empty_and_a_too_long_prompt_are_refused(prompts):
    with pytest.raises(ValueError, match="prompts need 1 to 32 ids"):
        tiny_model().generate(prompts, 5)


@pytest.mark.parametrize(
    "sampling",
    [{"max_new_tokens": -1}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}],
)
def test_sampling_that_makes_no_sense_is_refused(sampling):
    with pytest.raises(ValueError, match=next(iter(sampling))):
        tiny_model().generate([[1]], **({"max_new_tokens": 5} | sampling))


def test_no_new_tokens_are_no_new_tokens():
    assert tiny_model().generate(PROMPTS, 0) == [[], [], [], []]
    assert tiny_model().generate([[1] * 32], 5) == [[]]


def test_generating_leaves_gradients_and_weights_alone():
    model = tiny_model()
    model(torch.tensor([[1, 2]]), torch.tensor([[2, EOT]])).backward()
    before = [(p.clone(), p.grad.clone()) for p in model.parameters()]
    model.generate(PROMPTS, 5)
    for p, (value, grad) in zip(model.parameters(), before):
        assert torch.equal(p, value) and torch.equal(p.grad, grad)
