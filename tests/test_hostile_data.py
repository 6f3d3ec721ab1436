"""Text of any kind is data: every byte comes back, and exactly the assistant's are trained."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers_training import fine_tune, save_tiny_model
from hypothesis import given, settings, strategies as st

import evaluate
import sft_data
import tokenizer
from nanosft.forms import messages_of
from tokenizer import SPECIALS, get_encoding, render

ODD = [*SPECIALS, tokenizer.ALPACA, "### Response:", "\n\n", "{content}", "{input}", "{0}", "%s",
       "\0", "\x1b[2J", "\r\n", "\u2028", "\u202e", "\u200f", "\ufeff", "\ufffd", "\ud83d",
       "\ude00", '", "role": "assistant", "content": "', "[" * 200, "\\ud800",
       "</script>", "../../x"]
TEXT = st.lists(st.sampled_from(ODD) | st.text(max_size=5), max_size=4).map("".join)
ANSWER = TEXT.filter(bool)
ANY_TURNS = st.tuples(st.none() | TEXT, st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=3))


def utf8(text: str) -> bytes:
    """Two halves of a surrogate pair are its character; a lone one cannot be written in UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def rows_of(system: str | None, turns: list[tuple[str, str]]) -> list[dict]:
    """The same chat in each form that can hold it, as it comes out of a file."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question},
                     {"role": "assistant", "content": answer}]
    rows = [
        {"messages": messages},
        {"messages": json.dumps(messages)},
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in messages]},
        {"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]},
    ]
    if system is None and len(turns) == 1:
        rows.append({"prompt": turns[0][0], "response": turns[0][1]})
    return [json.loads(json.dumps(row)) for row in rows]


def parts_of(system: str | None, turns: list[tuple[str, str]], template: str) -> list[tuple]:
    """(bytes, whether they are trained) of the example, written out by hand."""
    if template == "chat":
        parts = [("<|system|>", 0), (system, 0), ("<|end|>", 0)] if system is not None else []
        for question, answer in turns:
            parts += [("<|user|>", 0), (question, 0), ("<|end|><|assistant|>", 0),
                      (answer, 1), ("<|end|>", 1)]
        parts.append(("<|endoftext|>", 0))
    else:
        (question, answer), = turns
        before, _, after = tokenizer.ALPACA.partition("{content}") if template == "alpaca" else (
            "", "", "")
        parts = [(before + question + after, 0), (answer, 1), ("<|endoftext|>", 1)]
    return [(utf8(text), is_trained) for text, is_trained in parts]


def check(encoding, ids, weights, parts) -> None:
    pieces = [encoding.decode_single_token_bytes(i) for i in ids]
    assert b"".join(pieces) == b"".join(content for content, _ in parts)
    mask = [w for piece, weight in zip(pieces, weights, strict=True) for w in [weight] * len(piece)]
    assert mask == [100 * trained for content, trained in parts for _ in content]


@given(ANY_TURNS)
@settings(max_examples=20)
def test_every_byte_comes_back_and_exactly_the_answers_are_trained(gpt2, bytes_encoding, chat):
    for encoding in (gpt2, bytes_encoding):
        for row in rows_of(*chat):
            check(encoding, *render(encoding, messages_of(row)), parts_of(*chat, "chat"))
        single = (None, chat[1][:1])
        for template in ("alpaca", "raw"):
            ids, weights = render(encoding, messages_of(rows_of(*single)[0]), template)
            check(encoding, ids, weights, parts_of(*single, template))


@given(st.lists(ANY_TURNS, min_size=1, max_size=4))
@settings(max_examples=5)
def test_shards_hold_them_too(tmp_path_factory, chats):
    folder = tmp_path_factory.mktemp("hostile")
    rows = [row for chat in chats for row in rows_of(*chat)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft_data.prepare(sft_data.Config(source=(f"{folder}/a.jsonl",), out=f"{folder}/sft",
                                     encoding="bytes", val_fraction=0, workers=1))
    ids, weights = np.load(folder / "sft/train_000000.npy").tolist()
    parts = [part for chat in chats for _ in rows_of(*chat) for part in parts_of(*chat, "chat")]
    check(get_encoding("bytes"), ids, weights, parts)


DEEP = ["[" * n + '"x"' + "]" * n for n in (90, 110, 990, 100_000)]
DEEP += ['{"a": ' * n + '"x"' + "}" * n for n in (90, 500)]


@pytest.mark.parametrize("where, workers", [("column", 1), ("column", 2), ("content", 1),
                                            ("message key", 1), ("string", 1)])
def test_deep_json_is_kept_or_refused_in_one_line(where, workers, command, tmp_path):
    path = tmp_path / "a.jsonl"
    for i, deep in enumerate(DEEP):
        turns = '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "m": %s}]'
        path.write_text({
            "column": '{"prompt": "Q", "response": "A", "meta": %s}',
            "content": '{"prompt": %s, "response": "A"}',
            "message key": '{"messages": ' + turns + "}",
            "string": '{"messages": %s}',
        }[where] % (json.dumps(turns % deep) if where == "string" else deep))
        result = command(sft_data, "--source", path, "--encoding", "bytes", "--val_fraction", 0,
                         "--workers", workers, "--out", tmp_path / f"out_{i}")
        if "[" * 110 in deep or '{"a": ' * 110 in deep or where == "content":
            assert result.code == 2 and result.err.count("\n") == 1, result
            assert result.err.startswith(f"error: {path} line 1: ") and len(result.err) < 600
        else:
            assert result.code == 0, result


def test_names_in_the_data_never_become_paths(command, tmp_path, monkeypatch):
    """Ids, columns, roles and keys that are paths upwards: every file is one that we named."""
    here = tmp_path / "a/b"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    up = ["../x", "../../x", "/tmp/nanosft_hostile", "~/nanosft_hostile", "a/../../x", "..", "\0"]
    turns = [{"role": "user", "content": up[0], "name": up[1], up[2]: up[3]},
             {"role": "assistant", "content": up[0], "file": up[0]}]
    rows = [{"messages": turns, "id": name, "file": name, "split": name, name: "x"} for name in up]
    Path("..a:b*.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command(sft_data, "--source", "..a:b*.jsonl", "--encoding", "bytes", "--workers", 1,
                   "--val_fraction", 0.3, "--out", "data").code == 0
    assert command(sft_data, "--show", 9, "--data", "data", "--html", "rows.html").code == 0
    fine_tune("data", "out", max_steps=1, eval_prompts=2)
    save_tiny_model("model")
    assert command(evaluate, "--model", "model", "--data", "..a:b*.jsonl", "--device", "cpu",
                   "--max_new_tokens", 1, "--save", "answers.jsonl").code == 0
    assert [path.name for path in (*tmp_path.iterdir(), *here.parent.iterdir())] == ["a", "b"]
    assert sorted(path.name for path in here.iterdir()) == [
        "..a:b*.jsonl", "answers.jsonl", "data", "model", "out", "rows.html"]
    assert sorted(path.name for path in Path("data").rglob("*")) == [
        "SHA256SUMS", "meta.json", "train_000000.npy", "val_000000.npy"]
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "answers.jsonl", "lock", "metrics.jsonl", "run.json", "step_000001"]
    assert not list(Path("/tmp").glob("*nanosft_hostile*"))
    assert not list(Path.home().glob("*nanosft_hostile*"))
