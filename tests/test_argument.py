"""The facts that docs/sft.md argues with and that no other test shows."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers_training import chat_example, gradients, text_folder, tiny_model

from answer import tokenize_prompt_and_output
from model import causal
from packing import plan_rows
from sft_data import create_labels
from tokenizer import get_encoding, render_prompt
from train_gpt2 import TokenRows
from train_sft import forward_sft


def question_and_answer() -> tuple[torch.Tensor, torch.Tensor, int]:
    """x (1, T), y (1, T) of a chat, and its first column in the loss."""
    ids, weights = chat_example("2+2?", "4")
    labels = create_labels(ids, weights)[None]  # (1, T)
    return torch.tensor([ids[:-1]]), labels, int((labels[0] != -100).nonzero()[0])


def input_gradients(model, attends=None) -> list[torch.Tensor]:
    """(T, C) each: d loss / d the input of every block, and of ln_f: the last block's output."""
    x, y, _ = question_and_answer()
    kept = []

    def keep(module, inputs):
        inputs[0].retain_grad()
        kept.append(inputs[0])

    hooks = [m.register_forward_pre_hook(keep) for m in (*model.transformer.h,
                                                         model.transformer.ln_f)]
    model.nll_sum(model.hidden(x, attends=attends), y).backward()
    for hook in hooks:
        hook.remove()
    return [tensor.grad[0] for tensor in kept]


# ----- the prompt: forward, and where gradient flows ---------------------------------------------


def test_gradient_of_the_logits_is_zero_at_the_prompt_and_only_there():
    x, y, first = question_and_answer()
    assert first == 6  # <|user|> 2 + 2 ? <|end|> | <|assistant|> predicts the 4
    logits = tiny_model(n_vocab=320)(x).detach().requires_grad_()
    F.cross_entropy(logits[0], y[0], ignore_index=-100, reduction="sum").backward()
    counts = (logits.grad[0] != 0).any(1)
    assert counts.tolist() == [False] * 6 + [True, True] + [False]  # … | 4 <|end|> | <|endoftext|>


def test_gradient_at_the_prompt_is_zero_after_the_last_block_and_not_before_it():
    *block_inputs, output = input_gradients(tiny_model(n_layer=3))
    assert output[:6].abs().max() == 0 and (output[6:8].abs().amax(1) > 0).all()
    for grad in block_inputs:  # of the last block, too
        assert (grad[:6].abs().amax(1) > 0).all()


def test_gradient_reaches_the_prompt_through_its_keys_and_values_only():
    def attend(q, k, v):
        k, v = (torch.cat([t[:, :, :6].detach(), t[:, :, 6:]], 2) for t in (k, v))
        return causal(q, k, v)

    *block_inputs, _ = input_gradients(tiny_model(n_layer=3), [attend] * 3)
    for grad in block_inputs:
        assert grad[:6].abs().max() == 0 and (grad[6:8].abs().amax(1) > 0).all()


def test_another_prompt_changes_the_loss_of_the_same_answer():
    model, (x, y, first) = tiny_model(), question_and_answer()
    other = x.clone()
    other[0, 1] += 1  # 3+2?
    assert first > 1 and abs(model(x, y) - model(other, y)) > 0.01


# ----- Bayes -------------------------------------------------------------------------------------


def log_prob(model, prompt: list[int], output: list[int]) -> torch.Tensor:
    """log P(output | prompt) in nats."""
    batch = tokenize_prompt_and_output(get_encoding("bytes"), [prompt], [output])
    return -model(batch["input_ids"], batch["labels"].masked_fill(~batch["response_mask"], -100))


def test_log_p_of_the_answer_is_log_p_of_both_minus_log_p_of_the_prompt():
    model, ids = tiny_model(), chat_example("2+2?", "4")[0]
    first, prompt, answer = ids[:1], ids[1:7], ids[7:]  # nothing predicts the first id
    both = log_prob(model, first, prompt + answer)
    alone = log_prob(model, first, prompt)  # a pass that does not see the answer
    torch.testing.assert_close(log_prob(model, first + prompt, answer), both - alone)
    assert alone < -1 and both < alone


# ----- cutting ten tokens into rows of four ------------------------------------------------------


def test_ten_tokens_make_two_rows_of_four_and_leave_one_target_over(tmp_path):
    tokens, T = list(range(10)), 4
    rows = TokenRows(text_folder(tmp_path / "text", train=tokens), "train", T)
    assert len(rows) == (10 - 1) // T == 2
    assert [rows[i]["input_ids"].tolist() for i in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [rows[i]["labels"].tolist() for i in range(2)] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert plan_rows([10], T, "stream", None, drop_last=True) == [[(0, 0, 5)], [(0, 4, 9)]]
    assert plan_rows([10], T, "stream", None)[2:] == [[(0, 8, 10)]]  # padded: 8 predicts 9


# ----- padding -----------------------------------------------------------------------------------


def test_padding_on_the_right_moves_no_logits_and_on_the_left_all_of_them():
    model, n, eot = tiny_model(n_vocab=320), 3, get_encoding("bytes").eot_token
    prompt = torch.tensor([render_prompt(get_encoding("bytes"),
                                         [{"role": "user", "content": "2+2?"}])])
    padding, alone = torch.full((1, n), eot), model(prompt)
    right, left = (model(torch.cat(pair, 1)) for pair in ((prompt, padding), (padding, prompt)))
    torch.testing.assert_close(right[:, :-n], alone, atol=1e-5, rtol=0)
    assert ((left[:, n:] - alone).abs().amax(2) > 0.1).all()


def test_padding_on_the_left_needs_both_a_mask_and_positions_from_0():
    model, n, prompt = tiny_model(n_vocab=320), 3, torch.randint(0, 256, (1, 7))
    x, alone = F.pad(prompt, (n, 0), value=256), model(prompt)
    segments = (torch.arange(7 + n) >= n).long()[None] - 1  # -1 -1 -1 0 0 …: both
    restarted = (torch.arange(7 + n)[None] - n).clamp(min=0)
    masked = [model.attention_for(segments)] * 2
    cases = {"both": model(x, segments=segments),
             "positions only": model.logits(model.hidden(x, positions=restarted)),
             "mask only": model.logits(model.hidden(x, positions=torch.arange(7 + n)[None],
                                                    attends=masked))}
    is_same = {name: torch.allclose(logits[:, n:], alone, atol=1e-5)
               for name, logits in cases.items()}
    assert is_same == {"both": True, "positions only": False, "mask only": False}


# ----- one change each to the loss: preferences, and rewards -------------------------------------


def two_answers(model) -> torch.Tensor:
    """(2,) log-probabilities of `4` and of `5, I think` after the same prompt, in one batch."""
    encoding = get_encoding("bytes")
    prompt = render_prompt(encoding, [{"role": "user", "content": "2+2?"}])
    batch = tokenize_prompt_and_output(encoding, [prompt] * 2, ["4", "5, I think"])
    logp = model(batch["input_ids"]).log_softmax(-1)  # (2, T, V)
    logp = logp.gather(2, batch["labels"][..., None])[..., 0]  # (2, T)
    return torch.where(batch["response_mask"], logp, 0).sum(1)


def test_log_probabilities_of_two_answers_in_a_batch_are_those_of_each_alone():
    model, prompt = tiny_model(), chat_example("2+2?", "4")[0][:7]
    alone = [log_prob(model, prompt, list(text)) for text in (b"4", b"5, I think")]
    torch.testing.assert_close(two_answers(model), torch.stack(alone))


def test_dpo_begins_at_ln_2_and_its_step_widens_the_gap():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    reference = two_answers(model).detach()
    chosen, rejected = two_answers(model) - reference  # 0: the policy still is the reference
    loss = -F.logsigmoid(0.1 * (chosen - rejected))
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    optimizer.step()
    chosen, rejected = two_answers(model) - reference
    assert chosen > 0 > rejected


def test_policy_gradient_is_sft_on_samples_weighted_by_their_advantage():
    encoding, model = get_encoding("bytes"), tiny_model()
    batch = tokenize_prompt_and_output(encoding, ["2+2="] * 2, ["4", "5"])
    advantages = torch.tensor([1.0, -1.0])  # of a right and of a wrong sample
    weights = advantages[:, None] * batch["response_mask"]  # (2, T)
    forward_sft(model, batch["input_ids"], batch["labels"], weights).backward()
    found = gradients(model)
    model.zero_grad()
    logp = [log_prob(model, list(b"2+2="), list(text)) for text in (b"4", b"5")]
    (-(advantages * torch.stack(logp)).sum()).backward()
    for one, other in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


# ----- our rows elsewhere ------------------------------------------------------------------------


def test_transformers_takes_our_rows_as_shift_labels():
    import transformers

    sizes = {"vocab_size": 320, "n_positions": 32, "n_layer": 1, "n_head": 2, "n_embd": 32}
    special = {"bos_token_id": 256, "eos_token_id": 256}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **special)).eval()
    ids, weights = chat_example("2+2?", "4")
    x, y = torch.tensor([ids[:-1]]), create_labels(ids, weights)[None]
    unshifted = torch.tensor([ids]).masked_fill(torch.tensor([weights]) == 0, -100)
    want = model(torch.tensor([ids]), labels=unshifted).loss
    torch.testing.assert_close(model(x, labels=y, shift_labels=y).loss, want)
    assert abs(model(x, labels=y).loss - want) > 1e-3  # shifted twice
