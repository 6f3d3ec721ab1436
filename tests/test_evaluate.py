"""Answers scored (evaluate.py) and talked with (chat.py), in the words that training used."""

import builtins
import json
import shutil
import sys

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
from evaluate import Answer, extract, extraction_for, score
from fineweb import run_cli
from model import GPT
from tokenizer import get_encoding, render, render_prompt

BYTES = get_encoding("bytes")

# ----- what counts as the answer -----------------------------------------------------------------


@pytest.mark.parametrize(
    "how, text, found",
    [
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
    ],
)
def test_extraction_by_hand(how, text, found):
    assert extract(text, how) == found


@pytest.mark.parametrize(
    "reference, how",
    [("1+1\n#### 2", "gsm8k"), ("</think><answer>2</answer>", "answer"), ("Paris", "whole")],
)
def test_auto_takes_the_extraction_that_fits_the_reference(reference, how):
    assert extraction_for(reference) == how


def test_an_answer_that_never_ends_has_no_form_and_is_not_right():
    flags = {"right", "formed", "stopped"}
    right = score(Answer("so #### 1,000", 9, stopped=True), "#### 1000", "gsm8k")
    assert right == dict.fromkeys(flags, True)
    wrong = score(Answer("#### 999", 9, stopped=True), "#### 1000", "gsm8k")
    assert wrong == {"right": False, "formed": True, "stopped": True}
    endless = score(Answer("#### 1000", 9, stopped=False), "#### 1000", "gsm8k")
    assert endless == dict.fromkeys(flags, False)


# ----- evaluate.py -------------------------------------------------------------------------------

QUESTIONS = {"3+4=": "7!", "hé 🙂": "ça va €"}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run that has learned two chats by heart, and their rows as a file."""
    folder = tmp_path_factory.mktemp("learned")
    examples = [chat_example(*pair) for pair in QUESTIONS.items()]
    data = sft_folder(folder / "data", train=examples, val=examples)
    fine_tune(data, folder / "out", block_size=64, n_embd=32, batch_size=1, rows_per_step=1,
              max_steps=100, eval_every=0, save_every=0)  # fmt: skip
    rows = [{"prompt": q, "response": a} for q, a in QUESTIONS.items()]
    write_rows(folder / "rows.jsonl", *rows)
    return folder


def write_rows(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def command(module, *argv, monkeypatch):
    """Run a script's command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv), "--device", "cpu"])
    try:
        run_cli(module.main, module.Config)
    except SystemExit as end:
        return end.code
    return 0


def test_a_model_that_learned_two_rows_answers_both(learned, tmp_path, monkeypatch, capsys):
    assert metrics(learned / "out")[-1]["val_answer_accuracy"] == 1  # what train_sft.py saw
    save = tmp_path / "new" / "answers.jsonl"
    code = command(evaluate, "--model", learned / "out", "--data", learned / "rows.jsonl",
                   "--save", save, monkeypatch=monkeypatch)  # fmt: skip
    assert code == 0
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert result["answer_acc"] == result["format_acc"] == result["stop_rate"] == 1.0
    assert (result["rows"], result["extract"]) == (2, "whole")
    assert result["mean_tokens"] == (len("7!") + 1 + len("ça va €".encode()) + 1) / 2  # <|end|> too
    assert result["val_loss"] < 0.1 and result["val_accuracy"] == 1.0
    assert any(line.split() == ["answer_acc", "1.0000"] for line in printed[:-1])

    saved = [json.loads(line) for line in save.read_text().splitlines()]
    assert [row["answer"] for row in saved] == [row["reference"] for row in saved]
    assert [row["answer"] for row in saved] == list(QUESTIONS.values())
    assert saved[0]["messages"] == [{"role": "user", "content": "3+4="}]
    assert all(row["right"] and row["stopped"] for row in saved)


def test_the_loss_is_that_of_the_references_given_their_prompts(learned):
    """Also of a model that knows nothing, whose loss is worked out here from single rows."""
    save_tiny_model(learned / "fresh", block_size=64)
    model, nll = GPT.from_pretrained(learned / "fresh"), []
    for question, answer in QUESTIONS.items():
        ids, weights = chat_example(question, answer)
        logp = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        nll += [-logp[i, ids[i + 1]] for i in range(len(ids) - 1) if weights[i + 1]]
    config = evaluate.Config(str(learned / "fresh"), str(learned / "rows.jsonl"), device="cpu",
                             max_new_tokens=2)  # fmt: skip
    result = json.loads(quietly(evaluate.main, config).splitlines()[-1])
    assert result["val_loss"] == pytest.approx(torch.stack(nll).mean().item(), rel=1e-5)
    assert len(nll) == 3 + 11


def test_two_ranks_score_each_row_once_and_find_what_one_process_finds():
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


def test_a_prompt_longer_than_the_context_says_what_it_cut_and_from_where(
    learned, tmp_path, monkeypatch, capsys
):
    rows = write_rows(tmp_path / "rows.jsonl", {"prompt": "short", "response": "a"},
                      {"prompt": "x" * 100, "response": "b"})  # fmt: skip
    code = command(evaluate, "--model", learned / "out", "--data", rows, "--max_new_tokens", 10,
                   monkeypatch=monkeypatch)  # fmt: skip
    said = capsys.readouterr()
    assert code == 0 and json.loads(said.out.splitlines()[-1])["rows"] == 2
    # <|user|> 100 bytes <|end|> <|assistant|> = 103 tokens; 64 places - 10 for the answer = 54
    assert "rows.jsonl line 2: the prompt has 103 tokens" in said.err
    assert "cut 49 tokens from the prompt's start" in said.err
    assert said.err.count("\n") == 1  # nothing about the short one


def test_a_short_prompt_leaves_the_rest_of_the_context_to_the_answer(learned, tmp_path):
    save_tiny_model(tmp_path / "endless", block_size=64)
    rows = write_rows(tmp_path / "rows.jsonl", {"prompt": "hi", "response": "a"})
    config = evaluate.Config(str(tmp_path / "endless"), rows, device="cpu")  # 256 new tokens
    result = json.loads(quietly(evaluate.main, config).splitlines()[-1])
    assert result["stop_rate"] == 0
    assert result["mean_tokens"] == 64 - 5  # <|user|> h i <|end|> <|assistant|>


GOOD = {"prompt": "a", "response": "b"}


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        ([{"prompt": "a"}], [], "line 1: unknown form"),
        ([GOOD, {"prompt": "a", "response": ""}], [], "line 2: message 1: the response is empty"),
        ([{"messages": [{"role": "user", "content": "a"}]}], [], "line 1: the last message"),
        ([{"text": "a"}], [], r"line 1: a {text} row has no reference answer"),
        ([GOOD, {"prompt": "", "response": "b"}], [], "line 2: the prompt is empty"),
        ([GOOD], ["--extract", "gsm8k"], "line 1: the reference is not of the form 'gsm8k'"),
        ([], [], "the file is empty"),
        ([GOOD], ["--batch_size", "0"], "--batch_size 0"),
        ([GOOD], ["--batch_size", "-1"], "--batch_size -1"),
        ([GOOD], ["--max_new_tokens", "0"], "--max_new_tokens 0"),
        ([GOOD], ["--max_examples", "0"], "--max_examples 0"),
        ([GOOD], ["--temperature", "-1"], "temperature -1.0"),
        ([GOOD], ["--model", "MODEL/nowhere"], "nowhere: no model there"),
        (
            [GOOD],
            ["--model", "MODEL/other_vocabulary"],
            "the model has 384 ids, its encoding bytes",
        ),
        ([GOOD], ["--model", "MODEL/other_encoding"], "unknown encoding 'latin1'"),
        ([GOOD], ["--data", "/nowhere/rows.jsonl"], "/nowhere/rows.jsonl: no such file"),
        ([GOOD], ["--data", "MODEL/rows.csv"], "rows.csv: expected a .jsonl, .json or .parquet"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    rows, flags, message, learned, tmp_path, monkeypatch, capsys
):
    save_tiny_model(tmp_path / "other_vocabulary", vocab_size=384)
    tiny_model().save_pretrained(tmp_path / "other_encoding", encoding="latin1")
    (tmp_path / "rows.csv").write_text("a,b\n")
    flags = [flag.replace("MODEL", str(tmp_path)) for flag in flags]
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    argv = ["--model", learned / "out", "--data", data, *flags]
    assert command(evaluate, *argv, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert message in said.err
    assert "{" not in said.out  # no result


# ----- chat.py -----------------------------------------------------------------------------------


def test_prompt_prints_the_answer_and_ends(learned, monkeypatch, capsys):
    code = command(chat, "--model", learned / "out", "--prompt", "hé 🙂", "--temperature", "0",
                   monkeypatch=monkeypatch)  # fmt: skip
    assert code == 0 and capsys.readouterr().out == "ça va €\n"


def open_chat(folder, **flags) -> chat.Chat:
    return chat.Chat(chat.Config(str(folder), device="cpu", temperature=0.0, **flags))


def test_the_prompt_is_the_start_of_the_training_example_to_the_letter(learned):
    talk = open_chat(learned / "out", system="Be kind.")
    talk.turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, _ = render(BYTES, [*talk.system, *talk.turns, {"role": "user", "content": "<|end|>?"},
                            {"role": "assistant", "content": "yes"}])  # fmt: skip
    talk.model.config.block_size = 100
    prompt = talk.prompt_ids("<|end|>?")
    assert prompt == ids[: -len("yes") - 2]  # <|end|> <|endoftext|>
    assert prompt.count(260) == 4  # system, two turns and the question: what a user types is text


def test_a_session_with_system_reset_and_quit(learned, monkeypatch, capsys):
    asked = []
    stream = GPT.stream

    def note(model, prompts, *args, **kwargs):
        asked.append(BYTES.decode(prompts[0]))
        return stream(model, prompts, *args, **kwargs)

    monkeypatch.setattr(GPT, "stream", note)
    lines = iter(["3+4=", "", "3+4=", "/system S", "3+4=", "/reset", "3+4=", "/system", "3+4=",
                  "/quit", "never"])  # fmt: skip
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    model = learned / "out"
    code = command(chat, "--model", model, "--temperature", 0, "--max_new_tokens", 8,
                   monkeypatch=monkeypatch)  # fmt: skip
    assert code == 0 and next(lines) == "never"
    turn = "<|user|>3+4=<|end|><|assistant|>"
    answers = capsys.readouterr().out.splitlines()
    assert answers[1] == "7!" and answers[2] == "(the prompt is empty)"
    assert asked == [
        turn,
        f"{turn}7!<|end|>{turn}",  # the first answer is context now
        f"<|system|>S<|end|>{turn}",  # a new system message begins anew
        f"<|system|>S<|end|>{turn}",  # /reset forgets the turns, not the system message
        turn,  # /system alone takes it away
    ]


def test_a_session_ends_with_the_end_of_input(learned, monkeypatch):
    def end(prompt):
        raise EOFError

    monkeypatch.setattr(builtins, "input", end)
    assert command(chat, "--model", learned / "out", monkeypatch=monkeypatch) == 0


def test_the_oldest_turns_go_where_the_context_is_too_short(learned, capsys):
    talk = open_chat(learned / "out", system="Be kind.", max_new_tokens=8)
    talk.turns = [{"role": role, "content": text} for text in ("first", "second", "third")
                  for role in ("user", "assistant")]  # fmt: skip
    prompt = BYTES.decode(talk.prompt_ids("now"))  # 64 places, 8 for the answer
    assert len(BYTES.encode(prompt, allowed_special="all")) <= 56
    assert prompt.startswith("<|system|>Be kind.<|end|><|user|>second<|end|>")
    assert prompt.endswith("<|user|>now<|end|><|assistant|>")
    assert capsys.readouterr().out.count("is forgotten") == 1


class Scripted:
    """Stands in for a model: says these ids."""

    def __init__(self, ids, config):
        self.ids, self.config = ids, config

    def stream(self, prompts, max_new_tokens, temperature, **kwargs):
        for token in self.ids:
            yield [(0, token)]


@pytest.mark.parametrize(
    "said, pieces",
    [
        ("aé€🙂b".encode(), ["a", "é", "€", "🙂", "b"]),
        (b"a\xffb", ["a", "\ufffdb"]),  # no UTF-8 at all: shown as such, when it is sure
        ("x€".encode()[:-1], ["x", "\ufffd"]),  # ends in half a character
    ],
)
def test_streaming_never_splits_a_character(said, pieces, learned):
    talk = open_chat(learned / "out")
    talk.model = Scripted([*said, 260, 99], talk.model.config)  # nothing after <|end|>
    assert [piece for piece in talk.answer("hi") if piece] == pieces
    assert talk.turns[-1]["content"] == "".join(pieces)


def test_a_base_model_says_that_it_continues_text_and_reads_it_as_it_is(
    tmp_path, monkeypatch, capsys
):
    base = save_tiny_model(tmp_path / "base", template=None)
    code = command(chat, "--model", base, "--prompt", "Once", "--temperature", "0",
                   "--max_new_tokens", 3, monkeypatch=monkeypatch)  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0 and said.startswith("(this model was not fine-tuned on chats: it continues")
    (want,) = GPT.from_pretrained(base).generate([list(b"Once")], 3, temperature=0, stop_ids=[256])
    assert said.splitlines()[1:] == BYTES.decode(want).removesuffix("<|endoftext|>").splitlines()
    assert open_chat(base).prompt_ids("Once") == list(b"Once")
    with pytest.raises(ValueError, match="a system message needs the chat template"):
        open_chat(base, system="S")


@pytest.mark.parametrize("template", ["alpaca", "raw"])
def test_the_other_templates_know_one_turn_only(template, tmp_path):
    talk = open_chat(save_tiny_model(tmp_path / "model", block_size=400, template=template))
    question = [{"role": "user", "content": "hi"}]
    for _ in range(2):
        assert talk.prompt_ids("hi") == render_prompt(BYTES, question, template)
        talk.turns = [*question, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    "flags, message",
    [(["--prompt", " "], "the prompt is empty"), (["--model", "./nowhere"], "no model there"),
     (["--prompt", "a", "--top_k", "0"], "top_k 0"),
     (["--prompt", "a", "--max_new_tokens", "-1"], "max_new_tokens -1")],
)  # fmt: skip
def test_a_chat_that_cannot_be_is_one_line_and_exit_code_2(
    flags, message, learned, monkeypatch, capsys
):
    assert command(chat, "--model", learned / "out", *flags, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_a_checkpoint_is_a_folder_that_can_be_moved(learned, tmp_path, monkeypatch, capsys):
    moved = shutil.copytree(learned / "out" / "step_000100", tmp_path / "mine")
    code = command(chat, "--model", moved, "--prompt", "3+4=", "--temperature", "0",
                   monkeypatch=monkeypatch)  # fmt: skip
    assert code == 0 and capsys.readouterr().out == "7!\n"
