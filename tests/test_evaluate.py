"""Answers scored (answer.py, evaluate.py) and given (chat.py), with training's own prompts."""

import builtins
import inspect
import json
import shutil

import pytest
import torch
from helpers_training import (
    ALONE,
    chat_example,
    evaluate_both,
    fine_tune,
    metrics,
    quietly,
    save_tiny_model,
    sft_folder,
    tiny_model,
    two_ranks,
)

import chat
import evaluate
import generate
from answer import (
    Answer,
    Assistant,
    answer_samples,
    extract,
    extraction_for,
    load_assistant,
    score,
)
from model import GPT
from nanosft import fast, ranks as ranks_module
from nanosft.errors import UserError
from nanosft.ranks import Ranks
from tokenizer import TEMPLATES, get_encoding, render, render_prompt

BYTES = get_encoding("bytes")

# ----- what counts as the answer -----------------------------------------------------------------


@pytest.mark.parametrize("how, text, found", [
    ("whole", "Paris", "Paris"),
    ("whole", "  two\nlines \n", "two\nlines"),
    ("whole", "", None),
    ("whole", " \n", None),
    ("gsm8k", "48/2 = 24, 48+24 = 72\n#### 72", 72),
    ("gsm8k", "#### 1,024,000 ", 1024000),
    ("gsm8k", "####-7", -7),
    ("gsm8k", "#### 1\nno, wait\n#### 2", 2),
    ("gsm8k", "72", None),
    ("gsm8k", "#### 72 clips", None),
    ("gsm8k", "####", None),
    ("gsm8k", "#### -", None),
    ("gsm8k", "#### 12 13", None),
    ("gsm8k", "#### 3*6", None),
    ("gsm8k", "#### 2**3", None),
    ("gsm8k", "#### 5-10", None),
    ("gsm8k", "#### 1.2.3", None),
    ("gsm8k", "#### 1/2", None),  # GSM8K's own rule reads 1
    ("gsm8k", "#### 10\u00b2", None),
    ("gsm8k", "#### .", None),
    ("answer", "<think>6*7</think> <answer>42</answer>", "42"),
    ("answer", "6*7</think>\n<answer> forty\ntwo </answer>\n", "forty\ntwo"),
    ("answer", "</think><answer></answer>", ""),
    ("answer", "<answer>42</answer>", None),
    ("answer", "</think> so <answer>42</answer>", None),
    ("answer", "</think> <answer>42</answer> I think", None),
    ("answer", "</think> <answer>42", None),
])
def test_extraction_by_hand(how, text, found):
    assert extract(text, how) == found


@pytest.mark.parametrize("number, spellings", [
    ("18", ["18.", "18.0", "$18.00", "$ 18", "\\$18", "$18$", "18$", "+18", "018", "€18", "18 €",
            "18%", "18\\%", "(18)", "18\u200b", "\\text{18}", "18¢", "1.8E1",
            "**18**", "**$18.00**.", "__18__", "`18`", "\\boxed{18}",
            "$\\boxed{18}$", "\\boxed{\\$18}", "\\(18\\)", "\\[\\boxed{18.00}\\].", "1.8e1",
            "\uff11\uff18"]),
    ("-5", ["-$5", "$-5", "- 5", "\u22125", "\u2212$5.00", "**-5**", "\\boxed{-5}", "\uff0d5",
            "\u20145", "\ufe635"]),
    ("0.5", ["0.50", ".5", "$.50", "00.5", "5e-1"]),
    ("1234", ["1,234", "$1,234.00", "1,234.", "1{,}234", "\\boxed{1\\,234}"]),
    ("0", ["-0", "0.0", "$0"]),
])
def test_spellings_of_one_number_are_equal_and_other_numbers_are_not(number, spellings):
    reference = f"so\n#### {number}"
    for spelling in spellings:
        found = score(Answer(f"so\n#### {spelling}", 9, True), reference, "gsm8k")
        assert found["right"], spelling
    for other in ("18.01", "17.99", "-18", "5", "0.05", "1.234", "12.34", "180", "1"):
        assert not score(Answer(f"#### {other}", 9, True), reference, "gsm8k")["right"]


def test_numbers_of_any_length_are_compared_exactly():
    long = "123456789" * 1000
    assert extract(f"#### {long}", "gsm8k") == int(extract(f"#### {long}.00", "gsm8k"))
    assert extract(f"#### {long}1", "gsm8k") != extract(f"#### {long}2", "gsm8k")
    assert extract(f"#### -{long}1", "gsm8k") != extract(f"#### -{long}2", "gsm8k")
    assert extract("####" + " *" * 20_000, "gsm8k") is None  # in linear time


@pytest.mark.parametrize("references, how", [
    (["1+1\n#### 2"], "gsm8k"), (["</think><answer>2</answer>"], "answer"), (["Paris"], "whole"),
    ([" "], "whole"), (["#### 2", "#### 3"], "gsm8k"), (["#### 2", "Paris"], "whole"),
    (["Paris", "#### 2"], "whole"), (["</think><answer>2</answer>", "#### 2"], "whole")])
def test_auto_chooses_the_extraction_that_fits_all_references(references, how):
    assert extraction_for(references) == how


@pytest.mark.parametrize("text, stopped, right, formed", [
    ("so #### 1,000", True, True, True),
    ("#### 999", True, False, True),
    ("1000", True, False, False),
    ("#### 1000", False, False, False),  # ran out of room: it might have gone on to "#### 10005"
])
def test_score_by_hand(text, stopped, right, formed):
    scores = score(Answer(text, 9, stopped), "#### 1000", "gsm8k")
    assert scores == {"right": right, "formed": formed, "stopped": stopped}


# ----- a checkpoint that answers -----------------------------------------------------------------


def test_loaded_model_is_sped_up_once_after_it_is_on_its_device(tmp_path, monkeypatch):
    folder = save_tiny_model(tmp_path / "model", vocab_size=320, n_vocab=320)  # padding in use
    seen = []

    def spy(model):
        seen.append((type(model), model.config.n_vocab, model.training))
        return model

    monkeypatch.setattr(fast, "speed_up", spy)
    assert load_assistant(str(folder)).template == "chat"
    assert seen == [(GPT, 261, False)]  # the encoding can decode no others


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """The arguments of generate.stream at each call, and the dtype of the weights."""
    seen, stream = [], generate.stream

    def spy(*args, **kwargs):
        bound = inspect.signature(stream).bind(*args, **kwargs)
        bound.apply_defaults()
        dtype = bound.arguments["gpt"].lm_head.weight.dtype
        seen.append(bound.arguments | {"dtype": str(dtype).removeprefix("torch.")})
        return stream(*args, **kwargs)

    monkeypatch.setattr(generate, "stream", spy)
    return seen


def test_each_batch_of_prompts_has_its_own_seed_and_the_shortest_come_first(calls):
    model = tiny_model(block_size=16)
    prompts = [[1, 2, 3], [4], [5, 6]]
    answers = Assistant(model, BYTES, "chat").answer(prompts, 4, 2, temperature=0.5, seed=7)
    assert [(call["prompts"], call["seed"]) for call in calls] == [
        ([[4], [5, 6]], 7), ([[1, 2, 3]], 9)]
    for call in calls:
        assert (call["max_new_tokens"], call["temperature"]) == (4, 0.5)
        assert call["stop_ids"] == [260, 256]
    (alone,) = model.generate([[1, 2, 3]], 4, 0.5, stop_ids=[260, 256], seed=9)
    assert answers[0].n_tokens == len(alone)


def test_sample_prompts_leave_room_for_the_longest_reference_and_16_more_tokens(calls):
    model = tiny_model(block_size=32)
    pairs = [(list(range(30)), [65] * 4), ([1, 2], [66])]
    found = answer_samples(Assistant(model, BYTES, "raw"), pairs, ALONE)
    (call,) = calls
    assert call["prompts"] == [[1, 2], [*range(18, 30)]]  # 32 positions less 16 + 4
    assert (call["max_new_tokens"], call["temperature"]) == (20, 0)
    assert [row["reference"] for row in found["val_answers"]] == ["AAAA", "B"]
    assert answer_samples(Assistant(model, BYTES, "raw"), [], ALONE) == {}


# ----- evaluate.py -------------------------------------------------------------------------------

QUESTIONS = {"3+4=": "7!", "hé 🙂": "ça va €"}
ROWS = [{"prompt": question, "response": answer} for question, answer in QUESTIONS.items()]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder with a run, out, that has memorized two chats, and their rows as rows.jsonl."""
    folder = tmp_path_factory.mktemp("learned")
    examples = [chat_example(*pair) for pair in QUESTIONS.items()]
    data = sft_folder(folder / "data", train=examples, val=examples)
    fine_tune(data, folder / "out", block_size=64, n_embd=32, batch_size=1, rows_per_step=1,
              max_steps=100, eval_every=0, save_every=0)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture
def ask(command, learned):
    """ask(module, *flags): its command on the run that has memorized two chats."""

    def call(module, *flags):
        return command(module, "--device", "cpu", "--model", learned / "out", *flags)

    return call


def evaluate_rows(model, rows: str, **flags) -> dict:
    config = evaluate.Config(str(model), str(rows), device="cpu", **flags)
    return json.loads(quietly(evaluate.main, config).splitlines()[-1])


def test_model_that_memorized_two_rows_answers_both(learned, ask, tmp_path):
    assert metrics(learned / "out")[-1]["val_answer_accuracy"] == 1  # what train_sft.py measured
    save = tmp_path / "new" / "answers.jsonl"
    result = ask(evaluate, "--data", learned / "rows.jsonl", "--save", save)
    *table, last = result.out.splitlines()
    found = json.loads(last)
    assert result.code == 0
    assert found["answer_acc"] == found["format_acc"] == found["stop_rate"] == 1.0
    assert (found["rows"], found["extract"]) == (2, "whole")
    n_bytes = len("7!") + len("ça va €".encode())
    assert found["mean_tokens"] == (n_bytes + 2) / 2  # each answer ends with <|end|>
    assert found["val_loss"] < 0.1 and found["val_accuracy"] == 1.0
    assert ["answer_acc", "1.0000"] in [line.split() for line in table]

    saved = [json.loads(line) for line in save.read_text().splitlines()]
    assert [row["answer"] for row in saved] == [row["reference"] for row in saved]
    assert [row["answer"] for row in saved] == list(QUESTIONS.values())
    assert saved[0]["messages"] == [{"role": "user", "content": "3+4="}]
    assert all(row["right"] and row["stopped"] for row in saved)


def test_text_that_utf8_does_not_have_is_saved_as_an_escape(ask, jsonl, tmp_path):
    rows = [{"prompt": "a \ud800", "response": "7!"}]
    assert ask(evaluate, "--data", jsonl("rows.jsonl", rows), "--save", tmp_path / "a").code == 0
    (saved,) = (tmp_path / "a").read_text("utf-8").splitlines()
    assert json.loads(saved)["messages"][0]["content"] == "a \ud800"


def test_loss_is_that_of_the_references_given_their_prompts(learned):
    """For a model with random weights, too; its loss is worked out here row by row."""
    save_tiny_model(learned / "fresh", block_size=64)
    model, nll = GPT.from_pretrained(learned / "fresh"), []
    for question, answer in QUESTIONS.items():
        ids, weights = chat_example(question, answer)
        logp = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        nll += [-logp[i, ids[i + 1]] for i in range(len(ids) - 1) if weights[i + 1]]
    found = evaluate_rows(learned / "fresh", learned / "rows.jsonl", max_new_tokens=2)
    assert found["val_loss"] == pytest.approx(torch.stack(nll).mean().item(), rel=1e-5)
    assert len(nll) == 3 + 11


def test_model_without_chat_tokens_is_judged_with_its_own_end_token(tmp_path, jsonl):
    save_tiny_model(tmp_path / "base", template=None, block_size=64, n_vocab=257)
    model, nll = GPT.from_pretrained(tmp_path / "base"), []
    for question, answer in QUESTIONS.items():
        prompt = render_prompt(BYTES, [{"role": "user", "content": question}])
        ids = [*prompt, *answer.encode(), 256]
        logp = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        nll += [-logp[i, ids[i + 1]] for i in range(len(prompt) - 1, len(ids) - 1)]
    found = evaluate_rows(tmp_path / "base", jsonl("rows.jsonl", ROWS), max_new_tokens=2)
    assert found["val_loss"] == pytest.approx(torch.stack(nll).mean().item(), rel=1e-5)


@pytest.mark.parametrize("template, end", [("chat", 260), ("alpaca", 256), ("raw", 256)])
def test_reference_ends_with_the_token_that_ends_an_answer(template, end, jsonl):
    config = evaluate.Config("", jsonl("rows.jsonl", ROWS))
    questions = evaluate.read_questions(config, Assistant(tiny_model(), BYTES, template))
    assert [question["answer"] for question in questions] == [
        [*text.encode(), end] for text in QUESTIONS.values()]
    assert [question["prompt"] for question in questions] == [
        render_prompt(BYTES, [{"role": "user", "content": text}], template) for text in QUESTIONS]


def test_pair_that_is_too_long_loses_the_start_of_its_prompt_then_the_end_of_its_reference():
    """8 positions hold 9 ids, because the last one is only a target."""
    questions = [{"prompt": [*range(1, 8)], "answer": [11, 12, 13, 14]},  # 7 + 4
                 {"prompt": [1, 2], "answer": [*range(11, 21)]},  # 2 + 10
                 {"prompt": [1, 2], "answer": [11]}]
    assistant = Assistant(tiny_model(block_size=8), BYTES, "chat")
    config = evaluate.Config("", "", batch_size=2)
    batch, last = evaluate.reference_batches(config, assistant, questions, ALONE)
    assert batch.x.tolist() == [[3, 4, 5, 6, 7, 11, 12, 13], [2, *range(11, 18)]]
    assert batch.y.tolist() == [[-100] * 4 + [11, 12, 13, 14], [*range(11, 19)]]
    assert (last.x.tolist(), last.y.tolist()) == ([[1, 2]], [[-100, 11]])


@pytest.mark.parametrize("free, dtype, rows", [
    (10**12, "float32", 256), (10**8, "float32", 64), (10**8, "bfloat16", 128), (0, "float32", 1)])
def test_gpu_answers_as_many_prompts_at_once_as_its_free_memory_takes(
        free, dtype, rows, monkeypatch):
    """2 layers of C = 32, 500 positions: (3 * 2 + 16) * 32 * 500 + 4 * 320 values a row, so 1.4 MB
    in float32, of 90% of 101 MB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 * 10**6)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 8 * 10**6)
    model = tiny_model(block_size=512).to(getattr(torch, dtype))
    assert fast.rows_that_fit(model, 500) == rows


@pytest.mark.parametrize("flags, rows", [({}, 32), ({"batch_size": 7}, 7),
                                         ({"temperature": 1.0}, 32)])
def test_prompts_answered_at_once_elsewhere(flags, rows):
    config = evaluate.Config("", "", **flags)
    assert evaluate.rows_at_once(config, tiny_model(), [[1], [2]]) == rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flags_of_evaluate_reach_the_model(dtype, tmp_path, calls, monkeypatch):
    save_tiny_model(tmp_path / "model", block_size=64)
    rows = [{"prompt": "a", "response": "b"}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    products, hidden = set(), GPT.hidden

    def spy(*args, **kwargs):
        x = hidden(*args, **kwargs)
        products.add(args[0].lm_head(x).dtype)
        return x

    monkeypatch.setattr(GPT, "hidden", spy)
    evaluate_rows(tmp_path / "model", tmp_path / "rows.jsonl", temperature=0.3, seed=5,
                  max_new_tokens=2, batch_size=2, max_examples=3, dtype=dtype)
    assert [len(call["prompts"]) for call in calls] == [2, 1]
    assert [call["seed"] for call in calls] == [5, 7]
    for call in calls:
        assert (call["temperature"], call["max_new_tokens"]) == (0.3, 2)
        assert call["dtype"] == dtype
    assert products == {getattr(torch, dtype)}  # also in the loss of the references


def test_template_of_the_flag_comes_before_the_models_and_chat_is_for_base_models(tmp_path, calls,
                                                                                  jsonl):
    rows = jsonl("rows.jsonl", [{"prompt": "a", "response": "b"}])
    for trained in ("raw", None):
        save_tiny_model(tmp_path / "model", template=trained, block_size=320)
        for template in (None, *TEMPLATES):
            evaluate_rows(tmp_path / "model", rows, template=template, max_new_tokens=1)
            used = template or trained or "chat"
            prompt = render_prompt(BYTES, [{"role": "user", "content": "a"}], used)
            assert calls[-1]["prompts"] == [prompt]
            assert calls[-1]["stop_ids"] == ([260, 256] if used == "chat" else [256])


@pytest.mark.parametrize("mine", ["abc", "ab", ""])
def test_ranks_meet_as_often_after_each_batch_also_those_that_have_none_left(mine, monkeypatch):
    """Else the lag of a slow rank adds up until the others stop waiting for it."""
    done, meetings = [], []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: meetings.append(len(done)))
    monkeypatch.setattr(ranks_module, "gather_objects", lambda n: [3, n, 2])
    for item in Ranks(1, 3, torch.device("cpu")).in_step(mine):
        done.append(item)
    assert "".join(done) == mine
    assert meetings == [min(i, len(mine)) for i in (1, 2, 3)]


def test_both_losses_and_answers_of_an_evaluation_are_made_in_step(monkeypatch):
    seen = []
    monkeypatch.setattr(Ranks, "in_step", lambda ranks, items: seen.append(items) or iter(items))
    evaluate_both(two_ranks(), "answers_3.jsonl")
    assert seen == [range(0, 7, 3)] * 2


def test_two_ranks_score_each_row_once_and_report_what_one_process_reports():
    folder = two_ranks()
    alone = json.loads(evaluate_both(folder, "answers_1.jsonl").splitlines()[-1])
    both = json.loads((folder / "evaluate_0.txt").read_text().splitlines()[-1])
    assert (folder / "evaluate_1.txt").read_text() == ""  # one table, one JSON line
    assert alone["rows"] == both["rows"] == 7
    assert both.keys() == alone.keys()
    for key, value in alone.items():
        assert both[key] == (pytest.approx(value, rel=1e-6) if key == "val_loss" else value)
    answers = (folder / "answers_1.jsonl").read_text()
    assert (folder / "answers_2.jsonl").read_text() == answers
    assert [json.loads(line)["row"] for line in answers.splitlines()] == list(range(7))


def test_data_is_named_and_read_as_in_sft_data(ask, tmp_path, jsonl):
    """A split of a folder, with its columns named; text that would be lost is an error, too."""
    (tmp_path / "set").mkdir()
    jsonl("set/test.jsonl", [{"q": q, "a": a, "cot": "So"} for q, a in QUESTIONS.items()])
    flags = ["--data", f"{tmp_path}/set::test", "--columns", "prompt=q,response=a"]
    result = ask(evaluate, *flags)
    assert result.code == 2 and "set/test.jsonl line 1: `cot` holds text" in result.err
    result = ask(evaluate, *flags, "--ignore", "cot", "--where", "q=3+4=")
    found = json.loads(result.out.splitlines()[-1])
    assert (found["rows"], found["answer_acc"]) == (1, 1.0)


def test_prompt_longer_than_the_context_loses_its_start_with_a_warning(jsonl, ask):
    rows = jsonl("rows.jsonl", [{"prompt": "short", "response": "a"},
                                {"prompt": "x" * 100, "response": "b"}])
    result = ask(evaluate, "--data", rows, "--max_new_tokens", 10)
    assert result.code == 0 and json.loads(result.out.splitlines()[-1])["rows"] == 2
    # <|user|> 100 bytes <|end|> <|assistant|> = 103 tokens; 64 positions - 10 for the answer = 54
    assert "rows.jsonl line 2: the prompt has 103 tokens" in result.err
    assert "cut the first 49 tokens" in result.err
    assert result.err.count("\n") == 1  # nothing about the short one


def test_short_prompt_leaves_the_rest_of_the_context_to_the_answer(jsonl, tmp_path):
    save_tiny_model(tmp_path / "endless", block_size=64)
    rows = jsonl("rows.jsonl", [{"prompt": "hi", "response": "a"}])
    found = evaluate_rows(tmp_path / "endless", rows, max_new_tokens=256)
    assert found["stop_rate"] == 0
    assert found["mean_tokens"] == 64 - 5  # <|user|> h i <|end|> <|assistant|>


GOOD = {"prompt": "a", "response": "b"}


@pytest.mark.parametrize("rows, flags, message", [
    ([{"prompt": "a"}], [], "line 1: unknown form"),
    ([GOOD, {"prompt": "a", "response": ""}], [], "line 2: message 1: the response is empty"),
    ([{"messages": [{"role": "user", "content": "a"}]}], [], "line 1: the last message"),
    ([{"text": "a"}], [], "line 1: a {text} row has no reference answer"),
    ([GOOD, {"prompt": "", "response": "b"}], [], "line 2: the prompt is empty"),
    ([GOOD], ["--extract", "gsm8k"], "line 1: the reference does not have the format 'gsm8k'"),
    ([], [], "the file is empty"),
    ([GOOD], ["--batch_size", 0], "--batch_size 0 must be at least 1"),
    ([GOOD], ["--temperature", -1], "--temperature -1.0 must be at least 0"),
    ([GOOD], ["--model", "./nowhere"], "nowhere: no model found"),
    ([GOOD], ["--model", "./other_vocabulary"], "384 ids, but its encoding bytes has 320"),
    ([GOOD], ["--model", "./other_encoding"], "unknown encoding 'latin1'"),
    ([GOOD], ["--data", "/nowhere/rows.jsonl"], "/nowhere/rows.jsonl: no such file"),
    ([GOOD], ["--data", "./rows.xls"], "rows.xls: expected one of .jsonl"),
])
def test_bad_input_is_one_line_and_exit_code_2(rows, flags, message, ask, jsonl, tmp_path,
                                               monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_model("other_vocabulary", vocab_size=384, n_vocab=384)
    tiny_model().save_pretrained("other_encoding", encoding="latin1")
    (tmp_path / "rows.xls").write_text("a,b\n")
    result = ask(evaluate, "--data", jsonl("rows.jsonl", rows), *flags)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert result.err.startswith("error: ") and message in result.err
    assert "{" not in result.out  # no result


# ----- chat.py -----------------------------------------------------------------------------------


def test_prompt_flag_prints_the_answer_and_exits(ask):
    result = ask(chat, "--prompt", "hé 🙂", "--temperature", 0)
    assert (result.code, result.out) == (0, "ça va €\n")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flags_of_a_chat_reach_the_model_and_each_turn_has_its_own_seed(dtype, ask, calls, typed):
    typed("3+4=", "3+4=")
    result = ask(chat, "--temperature", 0.01, "--top_k", 7, "--top_p", 0.9, "--seed", 3,
                 "--max_new_tokens", 5, "--dtype", dtype)
    assert result.code == 0 and result.out.count("7!") == 2
    assert [call["seed"] for call in calls] == [3, 5]  # a finished turn is two messages
    for call in calls:
        flags = {key: call[key] for key in ("temperature", "top_k", "top_p", "max_new_tokens")}
        assert flags == {"temperature": 0.01, "top_k": 7, "top_p": 0.9, "max_new_tokens": 5}
        assert call["dtype"] == dtype


def open_chat(folder, **flags) -> chat.Chat:
    return chat.Chat(chat.Config(str(folder), device="cpu", temperature=0.0, **flags))


def test_prompt_is_exactly_a_prefix_of_the_training_example(learned):
    talk = open_chat(learned / "out", system="Be kind.")
    talk.turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, _ = render(BYTES, [*talk.system, *talk.turns, {"role": "user", "content": "<|end|>?"},
                            {"role": "assistant", "content": "yes"}])
    talk.model.config.block_size = 100
    prompt = talk.prompt_ids("<|end|>?")
    assert prompt == ids[: -len("yes") - 2]  # without yes <|end|> <|endoftext|>
    assert prompt.count(260) == 4  # system, two turns, question: what a user types stays text


@pytest.fixture
def typed(monkeypatch):
    """typed(*lines): what the user types in a session; returns the prompts that the model reads."""

    def call(*lines) -> list[str]:
        prompts, stream, unread = [], generate.stream, iter(lines)

        def spy(model, ids, *args, **kwargs):
            prompts.append(BYTES.decode(ids[0]))
            return stream(model, ids, *args, **kwargs)

        def type_next(prompt):
            for line in unread:
                return line
            raise EOFError

        monkeypatch.setattr(generate, "stream", spy)
        monkeypatch.setattr(builtins, "input", type_next)
        return prompts

    return call


def test_session_with_system_reset_and_quit(ask, typed):
    prompts = typed("3+4=", "", "3+4=", "/system S", "3+4=", "/reset", "3+4=", "/system", "3+4=",
                    "/quit", "never read")
    result = ask(chat, "--temperature", 0, "--max_new_tokens", 8)
    assert result.code == 0
    assert result.out.splitlines()[1:3] == ["7!", "(the prompt is empty)"]
    turn = "<|user|>3+4=<|end|><|assistant|>"
    assert prompts == [
        turn,
        f"{turn}7!<|end|>{turn}",  # the first answer is context now
        f"<|system|>S<|end|>{turn}",  # a new system message starts a new chat
        f"<|system|>S<|end|>{turn}",  # /reset forgets the turns, not the system message
        turn,  # /system without a text removes it
    ]


def test_session_ends_with_the_end_of_input(ask, typed):
    prompts = typed("3+4=")
    assert ask(chat, "--temperature", 0).code == 0 and len(prompts) == 1


def test_oldest_turns_are_dropped_where_the_context_is_too_short(learned, capsys):
    talk = open_chat(learned / "out", system="Be kind.", max_new_tokens=8)
    talk.turns = [{"role": role, "content": text} for text in ("first", "second", "third")
                  for role in ("user", "assistant")]
    prompt = BYTES.decode(talk.prompt_ids("now"))  # 64 positions, 8 for the answer
    assert len(BYTES.encode(prompt, allowed_special="all")) <= 56
    assert prompt.startswith("<|system|>Be kind.<|end|><|user|>second<|end|>")
    assert prompt.endswith("<|user|>now<|end|><|assistant|>")
    assert capsys.readouterr().out.count("(dropped the oldest turn: it no longer fits)") == 1


@pytest.mark.parametrize("said, pieces", [
    ("aé€🙂b".encode(), ["a", "é", "€", "🙂", "b"]),
    (b"a\xffb", ["a", "\ufffdb"]),  # not UTF-8: shown once the next byte proves it
    ("x€".encode()[:-1], ["x", "\ufffd"]),  # ends in the middle of a character
])
def test_streaming_never_splits_a_character(said, pieces, learned, monkeypatch):
    talk = open_chat(learned / "out")
    steps = [[(0, token)] for token in [*said, 260, 99]]  # nothing after <|end|> is shown
    monkeypatch.setattr(generate, "stream", lambda *args, **kwargs: steps)
    assert [piece for piece in talk.answer("hi") if piece] == pieces
    assert talk.turns[-1]["content"] == "".join(pieces)


def test_base_model_announces_that_it_continues_text_and_reads_the_prompt_as_is(tmp_path, ask):
    base = save_tiny_model(tmp_path / "base", template=None)
    result = ask(chat, "--model", base, "--prompt", "Once", "--temperature", 0,
                 "--max_new_tokens", 3)
    announced, *answer = result.out.splitlines()
    assert result.code == 0 and announced.startswith("(a base model, not fine-tuned on chats")
    (want,) = GPT.from_pretrained(base).generate([list(b"Once")], 3, temperature=0, stop_ids=[256])
    assert answer == BYTES.decode(want).removesuffix("<|endoftext|>").splitlines()
    assert open_chat(base).prompt_ids("Once") == list(b"Once")
    with pytest.raises(UserError, match="a system message needs the chat template"):
        open_chat(base, system="S")


@pytest.mark.parametrize("template", ["alpaca", "raw"])
def test_other_templates_see_only_the_last_question(template, tmp_path):
    talk = open_chat(save_tiny_model(tmp_path / "model", block_size=400, template=template))
    question = [{"role": "user", "content": "hi"}]
    for _ in range(2):
        assert talk.prompt_ids("hi") == render_prompt(BYTES, question, template)
        talk.turns = [*question, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize("flags, message", [
    (["--prompt", " "], "the prompt is empty"),
    (["--model", "./nowhere"], "no model found"),
    (["--prompt", "a", "--top_k", 0], "top_k 0 must be at least 1"),
    (["--prompt", "a", "--top_p", 0], "top_p 0.0 must be more than 0 and at most 1"),
])
def test_bad_flags_of_a_chat_are_one_line_and_exit_code_2(flags, message, ask):
    result = ask(chat, *flags)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert result.err.startswith("error: ") and message in result.err


def test_checkpoint_is_a_folder_that_can_be_moved(learned, ask, tmp_path):
    moved = shutil.copytree(learned / "out" / "step_000100", tmp_path / "mine")
    result = ask(chat, "--model", moved, "--prompt", "3+4=", "--temperature", 0)
    assert (result.code, result.out) == (0, "7!\n")
