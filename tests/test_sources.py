"""Rows in: every kind of file, every form of a row, and the validation split."""

import doctest
import json
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, strategies as st

from nanosft import sources
from nanosft.sources import chunked, mark_validation, messages_of, ordered_map, read_rows, read_txt
from tokenizer import render

QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def test_docstring_examples_are_right():
    assert doctest.testmod(sources) == (0, 1)


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
        places = [f"{path} {unit} 1", f"{path} {unit} 2"]
        assert list(read_rows(str(path))) == list(zip(places, rows))


def test_jsonl_may_have_a_byte_order_mark_windows_newlines_and_blank_lines(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')  # no newline at the end
    assert list(read_rows(str(path))) == [
        (f"{path} line 1", {"text": "a"}), (f"{path} line 4", {"text": "b"})]


def test_any_other_name_is_streamed_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return [{"text": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(read_rows("me/mine", "de")) == [("me/mine row 1", {"text": "a"})]
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


@pytest.mark.parametrize("row", [
    {"prompt": "Q", "response": "A"},
    {"prompt": "Q", "completion": "A"},
    {"question": "Q", "answer": "A"},
    {"instruction": "Q", "output": "A"},
    {"instruction": "Q", "response": "A"},
    {"instruction": "Q", "input": "", "output": "A", "text": "Alpaca's own rendering"},
    {"instruction": "Q", "input": None, "output": "A"},
    {"messages": [QUESTION, ANSWER]},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    {"conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]},
    {"prompt": "Q", "response": "A", "id": 7, "extra": None},
])
def test_every_known_form_of_a_row_is_the_same_conversation(row):
    assert messages_of(row) == [QUESTION, ANSWER]


def test_alpaca_input_belongs_to_the_user_message():
    row = {"instruction": "Q", "input": "x", "output": "A"}
    assert messages_of(row) == [QUESTION | {"input": "x"}, ANSWER]


def test_text_row_is_its_text():
    assert messages_of({"text": "ab", "id": 7}) == "ab"


def test_sharegpt_roles_are_translated_and_unknown_ones_kept_for_the_error_message():
    turns = [{"from": who, "value": "v"} for who in ("system", "human", "gpt", "tool", ["x"], None)]
    roles = [message["role"] for message in messages_of({"conversations": turns})]
    assert roles == ["system", "user", "assistant", "tool", ["x"], None]


def test_keys_that_parquet_fills_with_none_mean_the_default(tmp_path, bytes_encoding):
    """If one message of a column has a weight, every message of the column has that key."""
    rows = [{"messages": [QUESTION, ANSWER | {"weight": 0.5}]}, {"messages": [QUESTION, ANSWER]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [messages_of(row) for _, row in read_rows(str(tmp_path / "a.parquet"))]
    assert found[1][0] == QUESTION | {"weight": None}
    assert [render(bytes_encoding, messages)[1][4] for messages in found] == [50, 100]


# ----- the validation split ----------------------------------------------------------------------


def picks(n: int, fraction: float, seed: int = 0) -> list[bool]:
    """Of n examples: does each go to validation?"""
    marked = list(mark_validation(iter(range(n)), fraction, seed))
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
        chunks = chunked([3, 1, 1, 1, 4, 2], lambda size: size, 3)  # [3] [1, 1, 1] [4] [2]
        assert list(ordered_map(sum, chunks, workers, 10)) == [13, 13, 14, 12]  # sum(chunk, 10)


def test_only_a_few_chunks_are_in_memory_at_a_time():
    """A corpus may be larger than memory: after the first result most chunks are still unread."""
    chunks = iter([[i] for i in range(100)])
    results = ordered_map(sum, chunks, 2)
    assert next(results) == 0
    assert len(list(chunks)) > 90
    results.close()
