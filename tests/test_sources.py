"""Rows in: every kind of file, every form of a row, and the validation split."""

import doctest
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, strategies as st

from nanosft import files, forms, report, sources
from nanosft.errors import UserError
from nanosft.files import Place, read_txt
from nanosft.forms import FORMS, Counts, Reading, messages_of
from nanosft.report import reason_of
from nanosft.sources import (
    check_overlap,
    chunked,
    find_sources,
    mark_val,
    ordered_map,
    parse_source,
    read_rows,
    read_sources,
)
from tokenizer import render

ROOT = Path(__file__).parents[1]
QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def test_docstring_examples_are_right():
    for module in (files, sources, forms, report):
        assert doctest.testmod(module).failed == 0


# ----- reading rows ------------------------------------------------------------------------------


def test_jsonl_json_and_parquet_give_the_same_rows(tmp_path):
    """U+2028 ends a line for str.splitlines, but not in JSON Lines."""
    rows = [{"prompt": "Q", "response": "A"}, {"prompt": "é 你", "response": "😀 \u2028"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=2))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name, unit in (("a.jsonl", "line"), ("a.json", "row"), ("a.parquet", "row")):
        path = tmp_path / name
        places = [Place(str(path), unit, 1), Place(str(path), unit, 2)]
        assert list(read_rows(str(path))) == list(zip(places, rows))
        assert str(places[1]) == f"{path} {unit} 2"


def test_jsonl_may_have_a_byte_order_mark_windows_newlines_and_blank_lines(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')  # no newline at the end
    assert list(read_rows(str(path))) == [
        (Place(str(path), "line", 1), {"text": "a"}), (Place(str(path), "line", 4), {"text": "b"})]


def test_any_other_name_is_streamed_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return [{"text": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(read_rows("me/mine", "de")) == [(Place("me/mine", "row", 1), {"text": "a"})]
    assert asked == [(("me/mine", "de"), {"split": "train", "streaming": True})]


# ----- a long .txt is read in pieces -------------------------------------------------------------

# What could go wrong where a piece ends: blank lines, spaces around them, contractions, other
# alphabets, and characters that only some programs call white space.
TRICKY = [*"ab1'.! \n\t", "the", "in", " a", "'s", "é", "你", "\x1c", "\u2028"]


@given(st.lists(st.sampled_from(TRICKY)).map("".join), st.integers(1, 5))
@example("one\ntwo\n\n three\n", 4)
@example("no line break at all", 3)
def test_pieces_of_a_txt_have_the_tokens_of_the_whole(gpt2, tmp_path_factory, text, chunk_chars):
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    path.write_text(text)
    pieces = list(read_txt(path, chunk_chars))
    assert "".join(piece for piece, _ in pieces) == text
    assert [is_last for _, is_last in pieces] == [False] * (len(pieces) - 1) + [True]
    in_pieces = [id_ for piece, _ in pieces for id_ in gpt2.encode_ordinary(piece)]
    assert in_pieces == gpt2.encode_ordinary(text)


def test_txt_is_cut_at_a_newline_between_visible_characters(tmp_path):
    """GPT-2 reads "\\n\\n" as one token, so there is no cut at a blank line."""
    (tmp_path / "a.txt").write_text("ab\ncd\n\nef\ngh")
    pieces = [piece for piece, _ in read_txt(tmp_path / "a.txt", chunk_chars=3)]
    assert pieces == ["ab\n", "cd\n\nef\n", "gh"]


# ----- a row as messages -------------------------------------------------------------------------


FORM_EXAMPLES = {  # columns of a form: rows of that form, all the same conversation
    ("messages",): [
        {"messages": [QUESTION, ANSWER]},
        {"messages": '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]'},
        {"messages": [{"role": "human", "content": [{"type": "text", "text": "Q"}]}, ANSWER]}],
    ("conversations|conversation",): [
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversation": [QUESTION, ANSWER | {"weight": 1}]},
        {"conversations": ["Q", "A"]}],
    ("prompt", "response|completion"): [
        {"prompt": "Q", "response": "A"},
        {"prompt": [QUESTION], "completion": [ANSWER]}],
    ("question|query|problem", "answer|response|solution"): [
        {"question": "Q", "answer": "A"},
        {"problem": "Q", "solution": "A"}],
    ("instruction", "output|response", "input|context"): [
        {"instruction": "Q", "input": "", "output": "A", "text": "Alpaca's own rendering"},
        {"instruction": "Q", "context": None, "response": "A"}],
}
EXAMPLES = [row for rows in FORM_EXAMPLES.values() for row in rows]


@pytest.mark.parametrize("row", [
    *EXAMPLES,
    {"prompt": "Q", "completion": "A"},
    {"query": "Q", "response": "A"},
    {"problem": "Q", "answer": "A"},
    {"instruction": "Q", "output": "A"},
    {"messages": None, "question": "Q", "answer": "A"},  # parquet fills what a row lacks with None
    {"conversations": [{"from": "prompter", "value": "Q"}, {"from": "bot", "value": "A"}]},
    {"conversation": '["Q", "A"]'},
    {"prompt": "Q", "response": "A", "id": 7, "source": "web", "extra": None},
    {"prompt": "Q", "messages": [QUESTION, ANSWER]},  # UltraChat's `prompt` says nothing new
    {"messages": [], "prompt": "Q", "response": "A", "system": []},
    {"conversations": "[]", "instruction": "Q", "input": [], "output": "A"},
    {"conversation": "", "messages": {}, "question": "Q", "answer": "A"},
    {"messages": [QUESTION | {"role": "User"}, ANSWER | {"role": "ASSISTANT"}]},
    {"messages": [QUESTION | {"role": "Human:"}, ANSWER | {"role": "<|assistant|>"}]},
    {"messages": [QUESTION | {"role": "\tuser "}, ANSWER | {"role": "assistant\n"}]},
    {"conversation": [{"user": "Q"}, {"assistant": "A"}]},
    {"conversations": [{"from": "Human", "value": "Q"}, {"from": "GPT", "value": "A"}]},
    {"conversation": [{"speaker": "user", "text": "Q"}, {"speaker": "AI", "text": "A"}]},
    {"conversation": [{"input": "Q", "output": "A"}]},  # Capybara
    {"conversation": [{"system": "", "input": "Q", "output": "A"}]},  # XTuner
    {"conversation": [{"human": "Q", "assistant": "A"}]},  # ms-swift
    {"messages": [{"role": "user", "parts": [{"text": "Q"}]},  # Gemini
                  {"role": "model", "parts": [{"text": "A"}]}]},
    {"prompt": [QUESTION], "completion": "A"},
    {"prompt": "Q", "completion": [ANSWER]},
    {"prompt": [QUESTION], "completion": ANSWER},
], ids=str)
def test_every_known_form_is_the_same_conversation(row, bytes_encoding):
    """<|user|> Q <|end|> <|assistant|> A <|end|> <|endoftext|>, of which A <|end|> is trained."""
    assert render(bytes_encoding, messages_of(row)) == (
        [258, 81, 260, 259, 65, 260, 256], [0, 0, 0, 0, 100, 100, 0])


def test_readme_of_the_data_lists_each_form():
    assert {form.columns for form in FORMS} == {*FORM_EXAMPLES, ("text",)}
    readme = (ROOT / "data/README.md").read_text()
    for form in FORMS:
        assert "`{" + ", ".join(form.columns) + "}`" in readme.replace(r"\|", "|")


@pytest.mark.parametrize("row", [
    {"instruction": "Q", "input": "x", "output": "A"},
    {"instruction": "Q", "context": "x", "response": "A", "category": "closed_qa"},  # Dolly
])
def test_input_and_context_of_an_instruction_belong_to_the_user_message(row):
    assert messages_of(row) == [QUESTION | {"input": "x"}, ANSWER]


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize("row", EXAMPLES, ids=str)
def test_system_column_beside_any_form_is_the_first_message(row, name):
    system, counts = {"role": "system", "content": "S"}, Counts()
    assert messages_of(row | {name: "S"}, counts=counts)[0] == system
    assert counts["unused", name] == 0
    assert messages_of(row | {name: "S"})[1:] == messages_of(row | {name: ""}) == messages_of(row)
    twice = {"messages": [system, QUESTION, ANSWER], name: "S"}
    assert messages_of(twice) == [system, QUESTION, ANSWER]
    assert messages_of({"messages": [QUESTION | {"role": "developer"}]})[0]["role"] == "system"


def test_turns_of_question_and_answer_may_have_a_system_text_and_an_input():
    turns = [{"system": "S", "input": "Q", "output": "A"},
             {"instruction": "Q", "input": "x", "output": "A", "output_with_loss": False}]
    assert messages_of({"conversation": turns}) == [
        {"role": "system", "content": "S"}, QUESTION, ANSWER,
        QUESTION | {"input": "x"}, ANSWER | {"weight": 0}]


@pytest.mark.parametrize("content", [
    ["A"], {"type": "text", "text": "A"}, [{"text": "A"}], [{"type": "Text", "text": "A"}],
    [{"type": "output_text", "text": "A", "annotations": []}], [{"type": "text", "content": "A"}],
    [{"type": "text", "text": "A", "cache_control": {"type": "ephemeral"}, "index": None}],
    [{"type": "text", "text": {"value": "A", "annotations": []}}],  # OpenAI's Assistants
    ["", {"type": "input_text", "text": "A"}]], ids=str)
def test_part_that_is_text_is_read_in_any_form(content):
    assert messages_of({"messages": [QUESTION, ANSWER | {"content": content}]}) == [
        QUESTION, ANSWER]


@pytest.mark.parametrize("part", [
    {"type": kind, "text": "secret"} for kind in ("reasoning", "thinking", "refusal", "tool_use")
] + [{"type": "thinking", "thinking": "secret"}, {"type": ["text"], "text": "x"}, {"type": "text"},
     {"type": "text", "text": ["x"]}, {"type": "text", "text": {"x": "y"}}, 7, None], ids=str)
def test_part_of_another_type_is_refused_although_it_has_a_text(part):
    kind = part["type"] if isinstance(part, dict) else part
    with pytest.raises(UserError, match=re.escape(f"message 1: a part of type {kind!r}; the")):
        messages_of({"messages": [QUESTION, ANSWER | {"content": [part, "A"]}]})


def test_text_beside_that_of_a_part_is_not_lost():
    part = {"type": "text", "text": "A", "thinking": "So"}
    with pytest.raises(UserError, match="`thinking` holds text that would be lost"):
        messages_of({"messages": [QUESTION, ANSWER | {"content": [part]}]})


@pytest.mark.parametrize("start, end", [
    ("### Human:", "### Assistant:"), ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    ("<s>[INST]", "[/INST]"), ("\n\nHuman:", "\n\nAssistant:"), ("USER:", "ASSISTANT:"),
    ("Below is an instruction that…\n\n### Instruction:", "### Response:"),
    ("<|user|>", "<|assistant|>"), ("<|User|>", "<|Assistant|>"), ("user:", "\nassistant:"),
    ("<|begin_of_text|><|start_header_id|>user", "<|start_header_id|>assistant"),
    ("<\uff5cbegin of sentence\uff5c>You are kind<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
    ("A chat between a user and an artificial intelligence assistant. USER:", "ASSISTANT:"),
    ("System: Be brief.\nUser:", "\nAssistant:"), ("### Question:", "\n### Answer:"),
    ("<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>", "<|start|>assistant"),
    ("<extra_id_0>System\n\n<extra_id_1>User\n", "<extra_id_1>Assistant\n"),
    ("[|Human|]", "[|AI|]"), ("<human>:", "<bot>:"),
    ("<start_of_turn>user\n", "<start_of_turn>model\n"),
    ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user", "<|im_start|>assistant"),
    ("The following is a talk with an AI.\n\nHuman:", "\nAI:")])
def test_chat_in_another_template_is_text_only_if_the_user_says_so(start, end):
    """With one of the two marks, or later in the text, it is text like any other."""
    text = f"{start} Q {end} A"
    with pytest.raises(UserError, match="a chat in another template") as error:
        messages_of({"text": text})
    columns = str(error.value).rpartition("--columns ")[2]
    assert messages_of({"text": text}, Reading(columns=columns)) == text
    for text in (f"{start} Q", f"A {end}", f"See {start} and {end}"):
        assert messages_of({"text": text}) == text


@pytest.mark.parametrize("text", [
    "HAMLET: To be, or not to be?\nOPHELIA: Good my lord.", "MODEL: X200\nUSER MANUAL: none",
    "Question: What is it?\nAnswer: A robot.", "Users: 7\nAssistants: 3", "user_id: 1\nAI: no",
    "# How to prompt\n\nWrite `User:` first.\n\nUser: hi\nAssistant: hello",
    "def prompt(q):\n    return f'User: {q}\\nAssistant:'", "<p>User</p>\n<p>Assistant</p>",
    "The user asked: why? The assistant: because.", "You are here. The users: 3. An assistant: 1.",
    "The system was slow. Its user: a nurse. Her assistant: a robot.", "# User: a\n# Assistant: b"])
def test_prose_plays_code_and_markdown_are_text(text):
    assert messages_of({"text": text}) == text


@pytest.mark.parametrize("unit", [" ", "\n", "#", "</s>", "<|a", "a_b", "User: ", "<a_", "system "])
@pytest.mark.parametrize("start", ["", "You are ", "User: "])
def test_marks_are_looked_for_in_linear_time(start, unit):
    """In quadratic time, each of these would take minutes."""
    text = start + unit * 100_000 + "."
    assert messages_of({"text": text}) == text


def test_answers_in_the_prompt_of_a_prompt_completion_row_are_context():
    row = {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]}
    assert messages_of(row) == [QUESTION, ANSWER | {"weight": 0}, QUESTION, ANSWER]


def test_sharegpt_turn_keeps_its_weight(bytes_encoding):
    row = {"conversations": [{"from": "human", "value": "Q", "weight": None},
                             {"from": "gpt", "value": "A", "weight": 0.5}]}
    assert messages_of(row) == [QUESTION, ANSWER | {"weight": 0.5}]
    assert render(bytes_encoding, messages_of(row))[1] == [0, 0, 0, 0, 50, 50, 0]


def test_text_row_is_its_text():
    assert messages_of({"text": "ab", "id": 7}) == "ab"


def test_keys_that_parquet_fills_with_none_mean_the_default(tmp_path, bytes_encoding):
    """If one message of a column has a weight, every message of the column has that key."""
    rows = [{"messages": [QUESTION, ANSWER | {"weight": 0.5}]}, {"messages": [QUESTION, ANSWER]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [messages_of(row) for _, row in read_rows(str(tmp_path / "a.parquet"))]
    assert found[1] == [QUESTION, ANSWER]
    assert [render(bytes_encoding, messages)[1][4] for messages in found] == [50, 100]


# ----- rows that are refused by name, with what to do --------------------------------------------

QA = {"question": "Q", "answer": "A"}


@pytest.mark.parametrize("row, what, advice", [
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "a preference row", "response=chosen"),
    ({"messages": [{"foo": "Q", "bar": 1}]}, "message 0: no text among the keys ['bar', 'foo']",
     "{role, "),
    ({"text": "Q", "role": "prompter", "lang": "en"}, "OASST: role", "make each path of a tree"),
    ({"text": "Q", "message_id": "1", "parent_id": None}, "OASST: message_id", "--ignore"),
    ({"message_tree_id": "1", "prompt": {"text": "Q"}}, "OASST: message_tree_id", "make each path"),
    (QA | {"image": {"bytes": b"png"}}, "`image` is not text", "--ignore image"),
    ({"messages": [QUESTION | {"content": [{"type": "text", "text": "a"},
                                           {"type": "image_url", "image_url": "b"}]}, ANSWER]},
     "message 0: a part of type 'image_url'", "leave out such rows"),
    ({"messages": [QUESTION, ANSWER, {"role": "tool", "content": "4"}]},
     "message 2: role 'tool' is not read", "leave out such rows"),
    ({"conversations": [{"from": "function_call", "value": "f()"}]},
     "message 0: role 'function_call'", "leave out such rows"),
    ({"messages": [QUESTION | {"role": "bob" * 99}, ANSWER]}, "message 0: role 'bobbob", "aliases"),
    ({"messages": [QUESTION, ANSWER | {"tool_calls": [{"name": "f"}]}]}, "`tool_calls` holds text",
     "--ignore tool_calls"),
    ({"messages": [QUESTION, ANSWER | {"reasoning_content": "So"}]}, "`reasoning_content` holds",
     "--ignore reasoning_content"),
    ({"messages": [QUESTION, ANSWER | {"thinking": "So"}]}, "`thinking` holds", "--ignore"),
    *((QA | {name: "x\x07" * 99}, f"`{name}` holds text that would be lost: 'x\\x07",
       f"--columns input={name}") for name in ("context", "input", "cot", "rationale", "documents",
                                              "reasoning", "thinking", "tools", "solution")),
    (QA | {"history": [["a", "b"]]}, "`history` holds text", "--ignore history"),
    ({"text": "x", "system": "S"}, "`system` holds text", "--ignore system"),
    ({"text": "x", "prompt": "Q"}, "`prompt` holds text", "--ignore prompt"),
    ({"messages": [{"role": "system", "content": "S"}, QUESTION, ANSWER], "system": "other"},
     "`system` holds text that would be lost: 'other'", "--ignore system"),
    (QA | {"system": "S", "system_prompt": "T"}, "`system_prompt` holds text", "--ignore"),
    (QA | {"Complex_CoT": "hm"}, "`Complex_CoT` holds text", "--ignore Complex_CoT"),
    (QA | {"choices": ["x", "y"]}, "`choices` holds text", "--ignore choices"),
    ({"messages": [QUESTION | {"images": ["cat.png"]}, ANSWER]}, "`images` holds", "--ignore"),
])
def test_row_that_is_not_a_chat_or_would_lose_text_is_refused_by_name(row, what, advice):
    with pytest.raises(UserError) as error:
        messages_of(row)
    message = str(error.value)
    assert what in message and advice in message
    assert len(message) <= 300 and message.isprintable()


def test_ignore_accepts_the_loss_of_a_column_or_of_a_key_and_the_report_lists_it():
    counts = Counts()
    reading = Reading(ignore=("cot", "thinking", "rejected"))
    row = QA | {"cot": "So", "note": "n", "id": 7}
    assert messages_of(row, reading, counts) == [QUESTION, ANSWER]
    row = {"messages": [QUESTION, ANSWER | {"thinking": "So"}], "cot": ""}
    assert messages_of(row, reading, counts) == [QUESTION, ANSWER]
    assert counts == {("unused", "cot"): 1, ("unused", "note"): 1, ("unused", "id"): 0,
                      ("unused", "message key thinking"): 1}
    for name, value in (("image", {"bytes": b"png"}), ("messages", [ANSWER])):  # not used, either
        assert messages_of(QA | {name: value}, Reading(ignore=(name,))) == [QUESTION, ANSWER]


@pytest.mark.parametrize("columns, row, expected", [
    ("prompt=q,response=a", {"q": "Q", "a": "A"}, [QUESTION, ANSWER]),
    ("prompt=q,response=a,system=s,input=c", {"q": "Q", "a": "A", "s": "S", "c": "x"},
     [{"role": "system", "content": "S"}, QUESTION | {"input": "x"}, ANSWER]),
    ("input=context", QA | {"context": "x"}, [QUESTION | {"input": "x"}, ANSWER]),
    ("input=input", QA | {"input": "x"}, [QUESTION | {"input": "x"}, ANSWER]),
    ("input=c", QA | {"c": None}, [QUESTION, ANSWER]),
    ("response=solution", {"problem": "Q", "solution": "A"}, [QUESTION, ANSWER]),
    ("messages=chat", {"chat": [QUESTION, ANSWER], "question": None}, [QUESTION, ANSWER]),
    ("text=body", {"body": "x"}, "x"),
    ("prompt=q,response=a", {"q": "Q", "a": "A", "prompt": "Q"}, [QUESTION, ANSWER]),
])
def test_columns_says_which_column_is_what(columns, row, expected):
    assert messages_of(row, Reading(columns=columns)) == expected


@pytest.mark.parametrize("columns, row, message", [
    ("prompt=b", {"q": "Q", "a": "A"}, "--columns prompt=b: no such column; there are ['a', 'q']"),
    ("answr=a", QA, "--columns 'answr'=…: no form has this column"),
    ("answer", QA, "--columns 'answer': expected NAME=VALUE"),
    ("prompt=q,response=a", {"q": "Q", "a": "A", "prompt": "own"}, "`prompt` holds text"),
    ("input=context", {"messages": [QUESTION, ANSWER], "context": "x"}, "unknown form with keys"),
    ("input=c", {"prompt": [QUESTION], "completion": [ANSWER], "c": "x"}, "`prompt` is [{'role"),
    ("response=answer", {"problem": "Q", "solution": "long", "answer": "A"}, "`solution` holds"),
])
def test_columns_that_cannot_be_used_are_named(columns, row, message):
    with pytest.raises(UserError) as error:
        messages_of(row, Reading(columns=columns))
    assert message in str(error.value)


WORSE = {"role": "assistant", "content": "B"}
HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}


@pytest.mark.parametrize("row", [
    {"prompt": "Q", "chosen": "A", "rejected": "B"},
    {"question": "Q", "chosen": "A", "rejected": "B"},
    {"instruction": "Q", "input": "", "chosen": "A", "rejected": "B"},  # LLaMA-Factory, Alpaca
    {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [WORSE]},  # TRL
    {"prompt": "Q", "chosen": [ANSWER], "rejected": [WORSE]},
    {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, WORSE]},  # TRL, implicit prompt
    {"prompt": "Q", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, WORSE]},
    {"prompt": "Q", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, WORSE],
     "messages": [QUESTION, ANSWER], "score_chosen": 8.0},  # UltraFeedback
    {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "B"}},
    {"conversations": [HUMAN], "chosen": "A", "rejected": "B"},
    {"messages": [QUESTION, ANSWER], "rejected_response": "B"},  # ms-swift
    {"query": "Q", "response": "A", "rejected_response": "B"},
    {"input": {"messages": [QUESTION], "tools": [], "parallel_tool_calls": True},  # OpenAI
     "preferred_output": [ANSWER], "non_preferred_output": [WORSE]},
], ids=str)
def test_advice_for_a_preference_row_trains_its_better_answer(row):
    with pytest.raises(UserError, match="a preference row") as error:
        messages_of(row)
    assert len(str(error.value)) <= 300
    columns = re.search(r"--columns (\S+)", str(error.value))
    ignore = re.search(r"--ignore ([^,]+)", str(error.value))[1].split()
    reading = Reading(columns=columns[1] if columns else "", ignore=tuple(ignore))
    assert messages_of(row, reading) == [QUESTION, ANSWER]


def test_preference_row_without_a_prompt_can_be_trained_as_text():
    row = {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}
    with pytest.raises(UserError, match=r"pass --columns text=chosen --ignore rejected$"):
        messages_of(row)
    reading = Reading(columns="text=chosen", ignore=("rejected",))
    assert messages_of(row, reading) == row["chosen"]


def test_tools_beside_openai_messages_are_not_lost():
    prompt = {"messages": [QUESTION], "tools": [{"name": "f"}]}
    row = {"input": prompt, "preferred_output": [ANSWER]}
    with pytest.raises(UserError, match="`tools` holds text that would be lost"):
        messages_of(row, Reading(columns="prompt=input,response=preferred_output"))


def test_advice_repeats_the_flags_that_were_given():
    row = {"q": "Q", "a": "A", "cot": "So", "tip": "no"}
    with pytest.raises(UserError) as error:
        messages_of(row, Reading(columns="prompt=q,response=a", ignore=("tip",)))
    assert "--columns prompt=q,response=a,input=cot, or" in str(error.value)
    assert str(error.value).endswith("--ignore tip cot")


def test_repair_merges_neighbors_of_one_role_and_drops_unanswered_ends():
    def turns(*pairs):
        return [{"role": role, "content": content} for role, content in pairs]

    row = turns(("system", "s"), ("assistant", "hi"), ("user", "a"), ("user", "b"),
                ("assistant", "c"), ("user", "d"))
    counts = Counts()
    assert messages_of({"messages": row}, Reading(repair=True), counts) == turns(
        ("system", "s"), ("user", "a\n\nb"), ("assistant", "c"))
    assert counts == {("repaired", "turns merged"): 1, ("repaired", "leading answers dropped"): 1,
                      ("repaired", "trailing questions dropped"): 1}
    assert messages_of({"messages": row}) == row  # without --repair nothing is touched
    inputs = [QUESTION | {"input": "x"}, QUESTION | {"input": "y"}, ANSWER]
    assert messages_of({"messages": inputs}, Reading(repair=True)) == [
        {"role": "user", "content": "Q\n\nx\n\nQ", "input": "y"}, ANSWER]
    for untouched in ([QUESTION, ANSWER | {"weight": 0}, ANSWER],  # not one answer of one weight
                      [{"role": "user", "content": {"a": 1}}, QUESTION, ANSWER]):  # not text
        assert messages_of({"messages": untouched}, Reading(repair=True)) == untouched


def test_repair_that_leaves_no_answer_says_so():
    for row in ([ANSWER, QUESTION], [QUESTION, QUESTION], [ANSWER]):
        with pytest.raises(UserError, match="--repair leaves no question with an answer"):
            messages_of({"messages": row}, Reading(repair=True))


def test_rows_are_rejected_for_few_reasons_however_their_values_differ():
    """Else a report of a large data set would hold one reason a row."""
    reasons = set()
    for value in ("x" * 200, "it's", 'a "b"', "['", "7", "\n; "):
        with pytest.raises(UserError) as error:
            messages_of(QA | {"context": value})
        reasons.add(reason_of(str(error.value)))
    assert reasons == {"`context` holds text that would be lost: …"}


# ----- sources -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source, parts", [
    ("openai/gsm8k", ("openai/gsm8k", None, "train", 1)),
    ("openai/gsm8k:main", ("openai/gsm8k", "main", "train", 1)),
    ("openai/gsm8k:main:test", ("openai/gsm8k", "main", "test", 1)),
    ("HuggingFaceH4/ultrachat_200k::train_sft*2",
     ("HuggingFaceH4/ultrachat_200k", None, "train_sft", 2)),
    ("a.jsonl*4", ("a.jsonl", None, "train", 4)),
    ("D:/data/a.jsonl*4", ("D:/data/a.jsonl", None, "train", 4)),
    ("d:\\data::val", ("d:\\data", None, "val", 1)),
    ("D:/data:main:test", ("D:/data", "main", "test", 1)),
])
def test_source_has_a_name_a_configuration_a_split_and_repeats(source, parts):
    assert parse_source(source)[:4] == parts
    assert parse_source(source, "de").config == parts[1] or "de"


def test_path_that_exists_wins_over_the_grammar(jsonl, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.jsonl", "a.jsonl*2", "a.jsonl"):
        jsonl(name, [{"text": name}])
    assert [row["text"] for _, row in read_rows("a:b.jsonl")] == ["a:b.jsonl"]
    assert [row["text"] for _, row in read_rows("a.jsonl*3")] == ["a.jsonl"] * 3
    assert parse_source("a.jsonl*2").name == "a.jsonl*2"
    assert parse_source("a.jsonl*2*3")[:4] == ("a.jsonl*2", None, "train", 3)


def test_pattern_becomes_its_files_in_order_and_a_repeat_is_no_pattern(jsonl, monkeypatch,
                                                                       tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "part-2", "sub/c.jsonl", "sub/[1].jsonl"):
        jsonl(name, [{"text": name}])

    def texts(source: str) -> list[str]:
        return [row["text"] for _, row in read_rows(source)]

    assert texts("*.jsonl") == texts("[ab].jsonl") == texts("?.jsonl") == ["a.jsonl", "b.jsonl"]
    assert texts("*.jsonl*2") == ["a.jsonl", "a.jsonl", "b.jsonl", "b.jsonl"]
    assert texts("**/*.jsonl") == ["a.jsonl", "b.jsonl", "sub/[1].jsonl", "sub/c.jsonl"]
    assert texts("sub/[1].jsonl") == ["sub/[1].jsonl"]  # a path that exists
    jsonl("a.jsonl.2", [])
    assert texts("a.jsonl*2") == ["a.jsonl"] * 2
    for source, message in (("*.json", r"\*.json: no file matches this pattern"),
                            ("no/*", r"no/\*: no file matches"), ("x[1].jsonl", "no file matches"),
                            ("sub*", "no file matches"), ("part*2", "part: no such file"),
                            ("*.jsonl*0", r"\*0 must be \*1 or more"),
                            ("c.jsonl*2", "c.jsonl: no such file"),
                            ("me*2", "me: no such file; a dataset on the hub has an owner"),
                            ("me:a:b", "me:a:b: no such file"), ("", "'': no such file; name"),
                            (" ", "' ': no such file; name"), ("part-2", "part-2: expected one of"),
                            ("hf://datasets/me/mine", "hf://datasets/me/mine: no such file")):
        with pytest.raises(UserError, match=message):
            texts(source)


def test_source_named_twice_is_one_source_that_is_read_twice(jsonl, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for name in ("d/a.jsonl", "d/b.jsonl"):
        jsonl(name, [{"text": name}])
    (tmp_path / "link.jsonl").symlink_to("d/b.jsonl")
    found = find_sources(["d/a.jsonl*2", "d", "./d/*.jsonl", "link.jsonl", "me/mine", "me/mine*2",
                          "me/mine::test"])
    assert [(source.name, source.split, source.repeats) for source in found] == [
        ("d/a.jsonl", "train", 4), ("d/b.jsonl", "train", 3), ("me/mine", "train", 3),
        ("me/mine", "test", 1)]


def test_error_of_the_hub_says_what_helps(monkeypatch):
    def broken(rows):
        yield from rows
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    for answer, message in (
            (lambda: broken([{}, {}]), r"me/mine: cannot be read after row 2 \('utf-8' codec"),
            (Path("/dev/null/cache/x").read_bytes, r"me/mine: cannot be cached .* set HF_HOME to")):
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(
            load_dataset=lambda *args, answer=answer, **options: answer()))
        with pytest.raises(UserError, match=message):
            list(read_rows("me/mine"))


@pytest.fixture
def folder(tmp_path) -> str:
    """A data set as the hub stores it, in a local folder: two splits."""
    (tmp_path / "set").mkdir()
    for split, n in (("train", 3), ("test", 2)):
        rows = [QA | {"question": f"{split} {i}", "ok": i != 1} for i in range(n)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows),
                                    tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    return str(tmp_path / "set")


def test_folder_has_the_splits_that_the_names_of_its_files_say(folder, capsys):
    found = list(read_rows(f"{folder}::test*2"))
    assert [row["question"] for _, row in found] == ["test 0", "test 1"] * 2
    assert str(found[0][0]) == f"{folder}/test-00000-of-00001.parquet row 1"
    capsys.readouterr()
    assert len(list(read_rows(folder))) == 3  # train unless another split is named
    assert capsys.readouterr().out == (
        f"{folder}: reads 1 file(s) of split train; not read: test-00000-of-00001.parquet\n")


@pytest.mark.parametrize("suffix, message", [
    ("::dev", "no split 'dev' (there is: test, train)"),
    ("*0", "*0 must be *1 or more"),
    ("::test*x", "::test*x: no file matches this pattern"),
    (":a:b:c", "expected ID[:CONFIG[:SPLIT]]"),
])
def test_source_that_cannot_be_read_says_what_there_is(folder, suffix, message):
    with pytest.raises(UserError) as error:
        list(read_rows(folder + suffix))
    assert message in str(error.value)


@pytest.mark.parametrize("suffix, split", [(":test", "test"), (":de:test", "test"),
                                           (":de", "train")])
def test_configuration_of_a_plain_folder_is_refused_and_its_advice_works(folder, suffix, split):
    with pytest.raises(UserError, match="this folder has no configurations") as error:
        list(read_rows(folder + suffix))
    advice = str(error.value).rpartition("name a split as ")[2]
    assert advice == f"{folder}::{split}" and list(read_rows(advice))


def test_gated_dataset_says_how_to_get_access(monkeypatch):
    def load_dataset(*args, **options):
        raise ValueError("Dataset 'me/mine' is a gated dataset on the Hub. Ask for access.")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r"me/mine: a gated dataset .* then `hf auth login`"):
        list(read_rows("me/mine"))


def test_file_has_no_split(jsonl):
    with pytest.raises(UserError, match="a file has neither"):
        list(read_rows(jsonl("a.jsonl", [QA]) + "::test"))


def test_where_keeps_the_rows_with_a_value_and_counts_the_others(folder, jsonl):
    counts = Counts()
    reading = Reading(where=("ok=true",))
    rows = list(read_sources([f"{folder}*2", f"{folder}::test"], reading, counts))
    assert [row["question"][-1] for _, row in rows] == ["0", "2", "0", "2", "0"]
    assert counts["where", "left out by --where"] == 3
    source = jsonl("a.jsonl", [{"a": "x=y", "n": 1}, {"a": "x=y", "n": 1.5}, {"a": "z", "n": None}])
    for where, n in ((("a=x=y",), 2), (("a=x=y", "n=1"), 1), (("n=1.5",), 1), (("n=null",), 1)):
        assert len(list(read_sources([source], Reading(where=where), Counts()))) == n
    with pytest.raises(UserError, match=r"--where b=1 leaves none .* has 'b=null' .*\['a', 'n'"):
        list(read_sources([source], Reading(where=("b=1",)), Counts()))
    source = jsonl("b.jsonl", [{"n": 2}, "n=1"])  # no object: to be rejected, not left out
    assert [row for _, row in read_sources([source], Reading(where=("n=1",)), counts)] == ["n=1"]


def test_same_rows_for_training_and_validation_are_refused(jsonl, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    jsonl("a.jsonl", [QA])
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    for train, val in (("a.jsonl", "./a.jsonl"), ("a.jsonl*2", "link.jsonl"), (folder, "set*3"),
                       ("*.jsonl", "a.jsonl"), (f"{folder}::test", "set/test*"),
                       ("me/mine:de", "me/mine:de:train")):
        with pytest.raises(UserError, match=r"--val_source .* is --source .*: the model would be"):
            check_overlap(find_sources([train]), find_sources([val]))
    jsonl("b.jsonl", [QA])
    check_overlap(find_sources([folder, "me/mine"]),
                  find_sources([f"{folder}::test", "me/mine:de", "b.jsonl"]))


# ----- the validation split ----------------------------------------------------------------------


def picks(n: int, fraction: float, seed: int = 0) -> list[bool]:
    """Of n examples: does each go to validation?"""
    marked = list(mark_val(iter(range(n)), fraction, seed))
    assert [example for example, _ in marked] == list(range(n))  # none lost, order kept
    return [is_val for _, is_val in marked]


def test_one_example_in_every_1_over_fraction_goes_to_validation():
    """A fraction of 0.25 picks one of examples 0 to 3, one of 4 to 7, …: no part is left out."""
    groups = [picks(40, 0.25)[i : i + 4] for i in range(0, 40, 4)]
    assert [sum(group) for group in groups] == [1] * 10
    assert len({group.index(True) for group in groups}) > 1  # at random within each four


@pytest.mark.parametrize("fraction", [0, 0.03, 0.05, 1 / 3, 0.5, 0.7, 0.99])
def test_validation_has_its_share(fraction):
    assert abs(sum(picks(1000, fraction, seed=1)) - 1000 * fraction) <= 1


@pytest.mark.parametrize("n", [2, 3, 19])
def test_of_fewer_than_1_over_fraction_examples_one_goes_to_validation(n):
    assert [sum(picks(n, 0.05, seed)) for seed in range(20)] == [1] * 20


# ----- work in parallel --------------------------------------------------------------------------


def test_results_come_in_order_from_any_number_of_workers():
    for workers in (1, 2):
        chunks = chunked([3, 1, 1, 1, 4, 2], 3, lambda size: size)  # [3] [1, 1, 1] [4] [2]
        assert list(ordered_map(sum, chunks, workers, 10)) == [13, 13, 14, 12]  # sum(chunk, 10)


def test_only_a_few_chunks_are_in_memory_at_a_time():
    """A corpus may be larger than memory: after the first result most chunks are still unread."""
    chunks = iter([[i] for i in range(100)])
    results = ordered_map(sum, chunks, 2)
    assert next(results) == 0
    assert len(list(chunks)) > 90
    results.close()
