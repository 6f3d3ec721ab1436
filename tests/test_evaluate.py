"""Answers scored (evaluate.py) and given (chat.py), with the prompts that training used."""

import builtins
import json
import shutil

import pytest
import torch
from helpers_training import (
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
from model import GPT
from nanosft.assistant import Answer, extract, extraction_for, score
from nanosft.cli import UserError
from tokenizer import get_encoding, render, render_prompt

BYTES = get_encoding("bytes")

# ----- what counts as the answer -----------------------------------------------------------------


@pytest.mark.parametrize("how, text, found", [
    ("whole", "Paris", "Paris"),
    ("whole", "  two\nlines \n", "two\nlines"),
    ("whole", "", None),
    ("whole", " \n", None),
    ("gsm8k", "48/2 = 24, 48+24 = 72\n#### 72", "72"),
    ("gsm8k", "#### 1,024,000 ", "1024000"),
    ("gsm8k", "####-7", "-7"),
    ("gsm8k", "#### 2.50", "2.50"),
    ("gsm8k", "#### 1\nno, wait\n#### 2", "2"),
    ("gsm8k", "72", None),
    ("gsm8k", "#### 72 clips", None),
    ("gsm8k", "####", None),
    ("gsm8k", "#### -", None),
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


@pytest.mark.parametrize("reference, how", [
    ("1+1\n#### 2", "gsm8k"), ("</think><answer>2</answer>", "answer"), ("Paris", "whole"),
    (" ", "whole")])
def test_auto_chooses_the_extraction_that_fits_the_reference(reference, how):
    assert extraction_for(reference) == how


@pytest.mark.parametrize("text, stopped, right, formed", [
    ("so #### 1,000", True, True, True),
    ("#### 999", True, False, True),
    ("1000", True, False, False),
    ("#### 1000", False, False, False),  # ran out of room: it might have gone on to "#### 10005"
])
def test_score_by_hand(text, stopped, right, formed):
    scores = score(Answer(text, 9, stopped), "#### 1000", "gsm8k")
    assert scores == {"right": right, "formed": formed, "stopped": stopped}


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
    assert result.code == 2 and "test row 1: `cot` holds text that would be lost" in result.err
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
    ([GOOD], ["--batch_size", -1], "--batch_size -1 must be at least 1"),
    ([GOOD], ["--max_new_tokens", 0], "--max_new_tokens 0 must be at least 1"),
    ([GOOD], ["--max_examples", 0], "--max_examples 0 must be at least 1"),
    ([GOOD], ["--temperature", -1], "--temperature -1.0 must be at least 0"),
    ([GOOD], ["--model", "./nowhere"], "nowhere: no model found"),
    ([GOOD], ["--model", "./other_vocabulary"], "384 ids, but its encoding bytes has 320"),
    ([GOOD], ["--model", "./other_encoding"], "unknown encoding 'latin1'"),
    ([GOOD], ["--data", "/nowhere/rows.jsonl"], "/nowhere/rows.jsonl: no such file"),
    ([GOOD], ["--data", "./rows.csv"], "rows.csv: expected a .jsonl, .json or .parquet"),
])
def test_bad_input_is_one_line_and_exit_code_2(rows, flags, message, ask, jsonl, tmp_path,
                                               monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_model("other_vocabulary", vocab_size=384, n_vocab=384)
    tiny_model().save_pretrained("other_encoding", encoding="latin1")
    (tmp_path / "rows.csv").write_text("a,b\n")
    result = ask(evaluate, "--data", jsonl("rows.jsonl", rows), *flags)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert result.err.startswith("error: ") and message in result.err
    assert "{" not in result.out  # no result


# ----- chat.py -----------------------------------------------------------------------------------


def test_prompt_flag_prints_the_answer_and_exits(ask):
    result = ask(chat, "--prompt", "hé 🙂", "--temperature", 0)
    assert (result.code, result.out) == (0, "ça va €\n")


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
        prompts, stream, left = [], GPT.stream, iter(lines)

        def spy(model, ids, *args, **kwargs):
            prompts.append(BYTES.decode(ids[0]))
            return stream(model, ids, *args, **kwargs)

        def type_next(prompt):
            for line in left:
                return line
            raise EOFError

        monkeypatch.setattr(GPT, "stream", spy)
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


def test_oldest_turns_are_forgotten_where_the_context_is_too_short(learned, capsys):
    talk = open_chat(learned / "out", system="Be kind.", max_new_tokens=8)
    talk.turns = [{"role": role, "content": text} for text in ("first", "second", "third")
                  for role in ("user", "assistant")]
    prompt = BYTES.decode(talk.prompt_ids("now"))  # 64 positions, 8 for the answer
    assert len(BYTES.encode(prompt, allowed_special="all")) <= 56
    assert prompt.startswith("<|system|>Be kind.<|end|><|user|>second<|end|>")
    assert prompt.endswith("<|user|>now<|end|><|assistant|>")
    assert capsys.readouterr().out.count("is forgotten") == 1


class Scripted:
    """Stands in for a model and answers with these ids."""

    def __init__(self, ids, config):
        self.ids, self.config = ids, config

    def stream(self, prompts, max_new_tokens, temperature, **kwargs):
        for token in self.ids:
            yield [(0, token)]


@pytest.mark.parametrize("said, pieces", [
    ("aé€🙂b".encode(), ["a", "é", "€", "🙂", "b"]),
    (b"a\xffb", ["a", "\ufffdb"]),  # not UTF-8: shown once the next byte proves it
    ("x€".encode()[:-1], ["x", "\ufffd"]),  # ends in the middle of a character
])
def test_streaming_never_splits_a_character(said, pieces, learned):
    talk = open_chat(learned / "out")
    talk.model = Scripted([*said, 260, 99], talk.model.config)  # nothing after <|end|>
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
    (["--prompt", "a", "--max_new_tokens", -1], "max_new_tokens -1"),
])
def test_bad_flags_of_a_chat_are_one_line_and_exit_code_2(flags, message, ask):
    result = ask(chat, *flags)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert result.err.startswith("error: ") and message in result.err


def test_checkpoint_is_a_folder_that_can_be_moved(learned, ask, tmp_path):
    moved = shutil.copytree(learned / "out" / "step_000100", tmp_path / "mine")
    result = ask(chat, "--model", moved, "--prompt", "3+4=", "--temperature", 0)
    assert (result.code, result.out) == (0, "7!\n")
