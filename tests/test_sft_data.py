"""Chats to shards, and shards to the rows that a trainer sees: ids, labels, weights, segments.

Most examples are worked by hand in the bytes encoding: {"prompt": "Q", "response": "A"} becomes
<|user|> Q <|end|> <|assistant|> A <|end|> <|endoftext|>, seven ids of which A and its <|end|> are
trained.
"""

import doctest
import hashlib
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_training import tiny_model
from hypothesis import given, settings, strategies as st

import chat as chat_command
import sft_data
import train_sft
from nanosft.errors import UserError
from nanosft.forms import messages_of
from nanosft.report import fill_of
from packing import LAYOUTS
from sft_data import (
    SFTDataset,
    create_labels,
    iterate_batches,
    plan_rows,
    tokenize_prompt_and_output,
)
from tokenizer import get_encoding, render, render_text

EOT, SYSTEM, USER, ASSISTANT, END = range(256, 261)  # in the bytes encoding
QA = [USER, 81, END, ASSISTANT, 65, END, EOT]  # Q 81, A 65: seven ids


def qa(prompt: str = "Q", response: str = "A") -> dict:
    return {"prompt": prompt, "response": response}


def chat(*turns: tuple) -> dict:
    """chat(("user", "Q"), ("assistant", "A", 0.5)) as a {messages} row."""
    return {"messages": [dict(zip(("role", "content", "weight"), turn)) for turn in turns]}


def examples_in(folder, split: str = "train") -> list[tuple[list[int], list[int]]]:
    """(ids, weights) of each example, read from the files without the code under test."""
    shards = [np.load(path) for path in sorted(Path(folder).glob(f"{split}_*.npy"))]
    ids, weights = np.concatenate(shards, axis=1)
    ends = (np.flatnonzero(ids == EOT) + 1)[:-1]
    parts = zip(np.split(ids, ends), np.split(weights, ends))
    return [(part.tolist(), weight.tolist()) for part, weight in parts]


def texts_in(folder, split: str = "train") -> list[str]:
    return [get_encoding("bytes").decode(ids) for ids, _ in examples_in(folder, split)]


def lists(row: dict[str, torch.Tensor]) -> dict[str, list]:
    return {key: value.tolist() for key, value in row.items()}


def all_rows(dataset: SFTDataset) -> list[dict[str, torch.Tensor]]:
    return [dataset[i] for i in range(len(dataset))]


def test_docstring_examples_are_right():
    assert doctest.testmod(sft_data) == (0, 1)


# ----- shards ------------------------------------------------------------------------------------


def test_shard_is_the_ids_and_below_each_its_weight_in_percent(sft_shards):
    folder = sft_shards([chat(("user", "Q"), ("assistant", "A", 0.25)), {"text": "z"}])
    shard = np.load(f"{folder}/train_000000.npy")
    assert shard.dtype == np.uint16
    assert shard.tolist() == [[*QA, 122, EOT], [0, 0, 0, 0, 25, 25, 0, 100, 100]]


@given(st.lists(st.tuples(st.text(), st.text(min_size=1)), min_size=1, max_size=5))
@settings(max_examples=20)
def test_what_goes_into_shards_comes_out_again(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("round")
    (folder / "a.json").write_text(json.dumps([qa(*pair) for pair in pairs]))
    sft_data.prepare(sft_data.Config(source=(str(folder / "a.json"),), out=str(folder / "sft"),
                                     encoding="bytes", val_fraction=0, workers=1, shard_tokens=20))
    assert texts_in(folder / "sft") == [
        f"<|user|>{prompt}<|end|><|assistant|>{response}<|end|><|endoftext|>"
        for prompt, response in pairs]
    dataset = SFTDataset(str(folder / "sft"), "train", 10_000, "pad", seed=None)
    decode = get_encoding("bytes").decode
    for (prompt, response), row in zip(pairs, all_rows(dataset)):
        trained = row["labels"] >= 0
        first = int(trained.nonzero()[0])
        assert decode(row["labels"][trained].tolist()) == response + "<|end|>"
        assert decode(row["input_ids"][:first].tolist()) == f"<|user|>{prompt}<|end|>"


def test_bytes_of_the_shards_do_not_depend_on_the_number_of_workers(sft_shards, monkeypatch):
    monkeypatch.setattr(sft_data, "ROWS_PER_CHUNK", 3)
    rows = [qa(str(i), "A" * (i % 5 + 1)) for i in range(30)]
    flags = ("--val_fraction", 0.2, "--shard_tokens", 100)
    one = Path(sft_shards(rows, *flags, name="one"))
    two = Path(sft_shards(rows, *flags, "--workers", 2, name="two"))
    names = sorted(path.name for path in one.glob("*.npy"))
    assert len(names) > 3
    assert names == sorted(path.name for path in two.glob("*.npy"))
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_small_shards_read_like_a_large_one(sft_shards, layout):
    rows = [qa("Q" * (i % 7), "A" * (i % 4 + 1)) for i in range(23)]
    whole = sft_shards(rows, name="whole")
    parts = sft_shards(rows, "--shard_tokens", 20, name="parts")
    assert len(list(Path(parts).glob("train_*.npy"))) > 10
    a, b = (all_rows(SFTDataset(data, "train", 16, layout)) for data in (whole, parts))
    assert list(map(lists, a)) == list(map(lists, b))


def test_meta_json_describes_the_folder(sft_shards):
    folder = sft_shards([qa(), qa("", "AB")], "--train_on", "last_turn")
    meta = json.loads(Path(folder, "meta.json").read_text())
    del meta["source"], meta["splits"]["train"]["files"]  # as in test_fineweb.py
    assert meta == {
        "version": 2, "kind": "sft", "encoding": "bytes", "vocab_size": 261, "template": "chat",
        "train_on": "last_turn",
        "splits": {"train": {"examples": 2, "tokens": 14, "trained_tokens": 5, "shards": 1}},
    }


def test_skipped_rows_are_left_out_and_the_others_keep_their_order(sft_shards):
    rows = [qa("a"), {"messages": []}, qa("b", ""), qa("c")]
    folder = sft_shards(rows, "--on_bad_row", "skip")
    assert texts_in(folder) == texts_in(sft_shards([qa("a"), qa("c")], name="good"))


def test_max_examples_takes_the_first_ones_of_each_source_list(sft_shards, jsonl):
    rows = [qa(str(i)) for i in range(9)]
    val = jsonl("val.jsonl", rows[5:])
    folder = sft_shards(rows, "--max_examples", 3, "--val_source", val)
    assert texts_in(folder) == texts_in(sft_shards(rows[:3], name="three"))
    assert texts_in(folder, "val") == texts_in(sft_shards(rows[5:8], name="val"))


# ----- the validation split ----------------------------------------------------------------------


def test_seed_decides_which_rows_are_validation(sft_shards):
    rows = [qa(str(i)) for i in range(40)]
    first, again, other = (
        sft_shards(rows, "--val_fraction", 0.25, "--seed", seed, name=name)
        for seed, name in ((0, "a"), (0, "b"), (1, "c")))
    assert texts_in(first, "val") == texts_in(again, "val") != texts_in(other, "val")
    everything = sorted(texts_in(sft_shards(rows, name="all")))
    for folder in (first, other):
        assert len(texts_in(folder, "val")) == 10
        assert sorted(texts_in(folder) + texts_in(folder, "val")) == everything


@pytest.mark.parametrize("workers", [1, 2])
def test_source_read_several_times_is_split_before_it_is_repeated(sft_shards, jsonl, workers):
    """Whatever names it has: a repeat, the same file twice, a pattern beside the file."""
    a = jsonl("many_a.jsonl", [qa(f"a{i}") for i in range(40)] + [qa("bad", "")])
    b = jsonl("many_b.jsonl", [qa(f"b{i}") for i in range(20)])
    flags = ["--val_fraction", 0.2, "--workers", workers, "--on_bad_row", "skip"]
    once = sft_shards([], *flags, "--source", a, b, name="once")
    for i, sources in enumerate([[f"{a}*3", b], [a, b, a, a], [a.replace("many_a", "many_?"),
                                                               f"{a}*2"]]):
        data = sft_shards([], *flags, "--source", *sources, name=f"repeated{i}")
        assert texts_in(data, "val") == texts_in(once, "val") and len(texts_in(data, "val")) == 12
        want = [text for text in texts_in(once) for _ in range(3 if ">a" in text else 1)]
        assert sorted(texts_in(data)) == sorted(want)
        few = sft_shards([], *flags, "--source", *sources, "--max_examples", 71, name=f"few{i}")
        val = texts_in(few, "val")  # of 23 rows three times, and of one twice
        assert len(val) in (4, 5) and val == texts_in(once, "val")[: len(val)]
        assert texts_in(few) == texts_in(data)[: len(texts_in(few))]
        assert 71 - 3 * len(val) <= len(texts_in(few)) <= 71 - len(val)


def test_val_source_is_the_whole_validation_split(jsonl, sft_shards):
    val = jsonl("val.jsonl", [qa("V")])
    folder = sft_shards([qa(), qa()], "--val_source", val, "--val_fraction", 0.5)
    assert texts_in(folder, "val") == ["<|user|>V<|end|><|assistant|>A<|end|><|endoftext|>"]
    assert len(texts_in(folder)) == 2


@pytest.mark.parametrize("rows", [
    [chat(("user", "Q"), ("assistant", "A", 0))] * 3,
    [chat(("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B", 0))],
])
def test_split_without_a_target_is_refused(rows, jsonl, command, tmp_path):
    """The second row has one, but not under --train_on last_turn."""
    none, some = jsonl("none.jsonl", rows), jsonl("some.jsonl", [qa()])
    for sources, split in ((("--source", none, "--val_fraction", 0), "train"),
                           (("--source", some, "--val_source", none), "val")):
        result = command(sft_data, *sources, "--encoding", "bytes", "--workers", 1, "--train_on",
                         "last_turn", "--out", tmp_path / "sft")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert result.err.startswith(f"error: the {split} split has no token in the loss (every")
        assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize("rows, template", [
    ([{"text": "ab"}, {"text": "c"}], None), ([{"text": "ab"}, qa()], "chat"), ([qa()], "chat")])
def test_data_claims_only_a_template_that_a_row_used(sft_shards, rows, template):
    assert json.loads((Path(sft_shards(rows)) / "meta.json").read_text())["template"] == template


def test_report_says_that_no_template_renders_plain_text(jsonl, command, tmp_path):
    for i, (rows, is_said) in enumerate([([{"text": "ab"}] * 2, True), ([qa()], False)]):
        printed = command(sft_data, "--source", jsonl("a.jsonl", rows), "--encoding", "bytes",
                          "--template", "alpaca", "--val_fraction", 0, "--workers", 1, "--out",
                          tmp_path / str(i)).out
        assert ("all rows are plain text, which no --template renders" in printed) == is_said


def test_checkpoint_of_text_rows_claims_no_chat_template(sft_shards, command, tmp_path):
    """It continues text, as a base model does; validation has no prompts to answer."""
    data = sft_shards([{"text": "abc"}] * 8, "--val_fraction", 0.25)
    for name, rows in (("text", data), ("chats", sft_shards([qa()], name="chats"))):
        result = command(train_sft, "--data", rows, "--out", tmp_path / f"run_{name}", "--init",
                         "scratch", "--n_layer", 1, "--n_head", 1, "--n_embd", 8, *TINY[:-2])
        assert result.code == 0, result.err
        step = tmp_path / f"run_{name}/step_000001"
        has_template = "template" in json.loads((step / "config.json").read_text())
        assert has_template == (name == "chats")
        tokenizer_config = json.loads((step / "tokenizer_config.json").read_text())
        assert ("chat_template" in tokenizer_config) == has_template
    assert "a base model" in command(chat_command, "--model", tmp_path / "run_text", "--prompt",
                                     "a", "--max_new_tokens", 1, "--device", "cpu").out


def test_val_fraction_0_makes_no_validation_split(sft_shards):
    folder = sft_shards([qa()] * 30, "--val_fraction", 0)
    assert list(json.loads(Path(folder, "meta.json").read_text())["splits"]) == ["train"]


# ----- labels ------------------------------------------------------------------------------------


def test_labels_are_the_next_ids_where_those_are_trained():
    assert create_labels([5, 6, 7, 8], [0, 0, 100, 1]).tolist() == [-100, 7, 8]
    batch = create_labels(np.array([[5, 6], [7, 8]], np.uint16), np.array([[9, 0], [0, 9]]))
    assert batch.tolist() == [[-100], [8]]
    assert batch.dtype == torch.int64
    assert create_labels([5], [100]).tolist() == []  # nothing predicts the first id


def test_prompts_and_outputs_are_joined_padded_and_shifted(bytes_encoding):
    """Rows "ab" + "c" and "d" + "ef!": the longest has four ids, so there are three columns."""
    rows = tokenize_prompt_and_output(bytes_encoding, ["ab", "d"], ["c", "ef!"])
    assert lists(rows) == {
        "input_ids": [[97, 98, 99], [100, 101, 102]],
        "labels": [[98, 99, EOT], [101, 102, 33]],
        "response_mask": [[False, True, False], [True, True, True]],
    }


def test_outputs_may_be_ids_with_special_tokens_and_strings_never_hold_any(bytes_encoding):
    rows = tokenize_prompt_and_output(bytes_encoding, [[USER, 81]], [[65, END]])
    assert rows["labels"].tolist() == [[81, 65, END]]
    assert rows["response_mask"].tolist() == [[False, True, True]]
    assert tokenize_prompt_and_output(bytes_encoding, ["<|end|>"], [""])["labels"].max() < EOT


def test_padding_is_not_response_although_answers_end_with_the_same_id(bytes_encoding):
    rows = tokenize_prompt_and_output(bytes_encoding, ["a", "a"], [[98, EOT], [98, 99, 100, EOT]])
    assert rows["labels"][0].tolist() == [98, EOT, EOT, EOT]
    assert rows["response_mask"][0].tolist() == [True, True, False, False]


def test_prompt_and_output_are_encoded_separately(gpt2):
    """ "the" is one token, but the output begins inside it."""
    rows = tokenize_prompt_and_output(gpt2, ["t"], ["he"])
    assert rows["input_ids"][0, 0] == gpt2.encode_ordinary("t")[0]
    assert rows["response_mask"].all()


def test_output_without_a_prompt_has_no_label_for_its_first_token(bytes_encoding):
    rows = tokenize_prompt_and_output(bytes_encoding, ["", "ab"], ["ab", ""])
    assert rows["response_mask"].tolist() == [[True], [False]]
    assert tokenize_prompt_and_output(bytes_encoding, [], [])["input_ids"].shape == (0, 0)
    with pytest.raises(UserError, match="2 prompts and 1 outputs"):
        tokenize_prompt_and_output(bytes_encoding, ["a", "b"], ["c"])


# ----- rows of the dataset, by hand --------------------------------------------------------------


def test_a_padded_row_by_hand(sft_shards):
    row = SFTDataset(sft_shards([qa()]), "train", 8, "pad")[0]
    assert lists(row) == {
        "input_ids": [USER, 81, END, ASSISTANT, 65, END, EOT, EOT],  # row[:-1], then padding
        "labels": [-100, -100, -100, 65, END, -100, -100, -100],
        "weights": [0, 0, 0, 1, 1, 0, 0, 0],
        "segments": [0, 0, 0, 0, 0, 0, -1, -1],  # six ids are read: the seventh is only a target
    }
    types = [value.dtype for value in row.values()]
    assert types == [torch.int64, torch.int64, torch.float32, torch.int64]


@pytest.mark.teach
def test_a_packed_row_by_hand(sft_shards):
    """Two examples of two ids: "a" and "b", each trained with its <|endoftext|>."""
    data = sft_shards([{"text": "a"}, {"text": "b"}])
    assert lists(SFTDataset(data, "train", 5, "fit", seed=None)[0]) == {
        "input_ids": [97, EOT, 98, EOT, EOT],  # 97 EOT 98 EOT are four ids: three are read
        "labels": [EOT, -100, EOT, -100, -100],  # nothing predicts 98, the neighbor's first id
        "weights": [1, 0, 1, 0, 0],
        "segments": [0, 0, 1, -1, -1],
    }


def test_tokens_are_the_row_before_it_is_shifted_and_padded(sft_shards):
    """The same row: the first id of an example has weight 0, the last id is there as a target."""
    data = sft_shards([{"text": "a"}, {"text": "b"}])
    tokens = SFTDataset(data, "train", 5, "fit", seed=None).tokens(0)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [
        [97, EOT, 98, EOT],  # ids
        [0, 100, 0, 100],  # weights in percent
        [0, 0, 1, 1],  # segments
        [0, 0, 1, 1],  # numbers of the examples
    ]


@pytest.mark.parametrize("loss_on", ["response", "all"])
@pytest.mark.parametrize("layout", ["fit", "stream"])
def test_first_id_of_a_neighbor_is_never_a_target(sft_shards, layout, loss_on):
    data = sft_shards([{"text": "ab"}, {"text": "cd"}, {"text": "ef"}])
    dataset = SFTDataset(data, "train", 8, layout, seed=None, loss_on=loss_on)
    assert len(dataset) == 1
    assert dataset[0]["labels"].tolist() == [98, EOT, -100, 100, EOT, -100, 102, EOT]
    assert dataset[0]["segments"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_stream_without_isolation_is_one_text_and_predicts_across_boundaries(sft_shards):
    """The classic GPT-2 stream. `fit` without isolation still never predicts a first id."""
    data = sft_shards([{"text": "ab"}, {"text": "cd"}])
    for layout, after_eot in (("stream", 99), ("fit", -100)):
        row = SFTDataset(data, "train", 5, layout, seed=None, isolate=False)[0]
        assert row["labels"].tolist() == [98, EOT, after_eot, 100, EOT]
        assert row["segments"].tolist() == [0] * 5
    chats = SFTDataset(sft_shards([qa(), qa()], name="c"), "train", 13, "stream", isolate=False)
    assert chats[0]["labels"][6] == -100  # <|user|> itself has weight 0


def test_example_continues_in_the_next_row_of_a_stream(sft_shards):
    """abcde and T = 3: the second row's first id is the first row's last target."""
    first, second = all_rows(SFTDataset(sft_shards([{"text": "abcde"}]), "train", 3, "stream"))
    assert lists(first) == {"input_ids": [97, 98, 99], "labels": [98, 99, 100],
                            "weights": [1, 1, 1], "segments": [0, 0, 0]}
    assert lists(second) == {"input_ids": [100, 101, EOT], "labels": [101, EOT, -100],
                             "weights": [1, 1, 0], "segments": [0, 0, -1]}


def test_block_size_1_trains_each_target_once(sft_shards):
    rows = all_rows(SFTDataset(sft_shards([{"text": "ab"}]), "train", 1, "stream", seed=None))
    assert [(int(row["input_ids"]), int(row["labels"])) for row in rows] == [(97, 98), (98, EOT)]


def test_loss_on_all_trains_prompts_too_but_no_padding(sft_shards):
    row = SFTDataset(sft_shards([qa()]), "train", 8, "pad", loss_on="all")[0]
    assert row["labels"].tolist() == [*QA[1:], -100, -100]
    assert row["weights"].tolist() == [1] * 6 + [0, 0]


@pytest.mark.parametrize("layout", ["pad", "stream"])
def test_loss_on_all_keeps_answers_of_weight_0_as_context(sft_shards, layout):
    """In a stream of T = 3 the second row begins inside the answer that is not trained."""
    turns = ("user", "a"), ("assistant", "bcd", 0), ("user", "e"), ("assistant", "f", 0.5)
    data = sft_shards([chat(*turns), {"text": "z"}])
    T = {"pad": 20, "stream": 3}[layout]
    rows = all_rows(SFTDataset(data, "train", T, layout, seed=None, loss_on="all"))
    labels = [id for row in rows for id in row["labels"].tolist() if id >= 0]
    assert labels == [97, END, ASSISTANT, USER, 101, END, ASSISTANT, 102, END, EOT, EOT]


KEPT = ("user", "a"), ("assistant", "bb", 0), ("user", "c"), ("assistant", "d")


@pytest.mark.parametrize("template, row, response, everything", [
    # d and its <|end|>; of the 13 targets all but bb and its <|end|>
    ("chat", chat(*KEPT), 2, 10),
    ("raw", chat(*KEPT), 2, 3),  # a bb c d <|endoftext|>: all but bb, and nothing predicts a
    ("alpaca", chat(("user", "a"), ("assistant", "bb", 0)), 0, 139),  # 140 bytes before bb
])
def test_tokens_in_the_loss_leave_out_an_answer_of_weight_0(sft_shards, template, row, response,
                                                           everything):
    data = sft_shards([row, {"text": "z"}], "--template", template)
    split = json.loads(Path(data, "meta.json").read_text())["splits"]["train"]
    assert split["trained_tokens"] == response + 2  # z and its <|endoftext|>
    for loss_on, n in (("response", response), ("all", everything)):
        rows = all_rows(SFTDataset(data, "train", 200, "pad", seed=None, loss_on=loss_on))
        assert sum(int((row["labels"] >= 0).sum()) for row in rows) == n + 1  # nothing predicts z


@pytest.mark.parametrize("template", ["chat", "raw"])
def test_last_turn_makes_shards_as_if_the_earlier_answers_had_weight_0(sft_shards, template):
    earlier = chat(("user", "a"), ("assistant", "bb", 1), *KEPT[2:])
    last = sft_shards([earlier], "--template", template, "--train_on", "last_turn", name="last")
    kept = sft_shards([chat(*KEPT)], "--template", template, name="kept")
    assert examples_in(last) == examples_in(kept)


def as_version_1(folder: str) -> str:
    """Change a folder to what the first version wrote: 0 where an answer is context."""
    meta = json.loads(Path(folder, "meta.json").read_text()) | {"version": 1}
    for split in meta["splits"].values():
        for shard in split["files"]:
            path = Path(folder, shard["file"])
            ids, weights = np.load(path)
            np.save(path, np.stack([ids, np.where(weights > 100, 0, weights)]))
            shard["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    Path(folder, "meta.json").write_text(json.dumps(meta))
    Path(folder, "SHA256SUMS").unlink()
    return folder


def test_chats_of_version_1_are_read_but_not_with_loss_on_all(sft_shards):
    new, old = sft_shards([chat(*KEPT)], name="new"), sft_shards([chat(*KEPT)], name="old")
    as_version_1(old)
    assert examples_in(new)[0][1].count(65535) == 3 and examples_in(old)[0][1].count(65535) == 0
    a, b = (SFTDataset(data, "train", 16, "pad") for data in (new, old))
    assert lists(a[0]) == lists(b[0]) and a.prompts(1) == b.prompts(1)
    with pytest.raises(UserError, match=r"--data .*old is of format version 1.*make the data"):
        SFTDataset(old, "train", 16, "pad", loss_on="all")


def test_padding_is_not_trained_although_its_id_is_a_real_endoftext(sft_shards):
    """In `raw` the real <|endoftext|> is a target; the padding after it has the same id."""
    data = sft_shards([qa()], "--template", "raw")
    row = SFTDataset(data, "train", 4, "pad")[0]
    assert row["input_ids"].tolist() == [81, 65, EOT, EOT]
    assert row["labels"].tolist() == [65, EOT, -100, -100]
    assert row["segments"].tolist() == [0, 0, -1, -1]


def test_weights_are_fractions_of_the_labels(sft_shards):
    turns = ("user", "a"), ("assistant", "b", 0.5), ("user", "c"), ("assistant", "d", 0.001)
    row = SFTDataset(sft_shards([chat(*turns)]), "train", 12, "pad")[0]
    expected = [0, 0, 0, 0.5, 0.5, 0, 0, 0, 0, 0.01, 0.01, 0]
    assert row["weights"].tolist() == torch.tensor(expected).tolist()
    assert (row["labels"] >= 0).tolist() == [weight > 0 for weight in expected]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_every_layout_trains_the_same_targets(sft_shards, layout, loss_on):
    """Only a stream cuts examples, and even there each id is predicted once."""
    rows = [qa("Q" * (i % 6), "A" * (i % 3 + 1)) for i in range(17)] + [{"text": "xyz"}]
    dataset = SFTDataset(sft_shards(rows), "train", 16, layout, seed=3, loss_on=loss_on)
    labels = torch.cat([row["labels"] for row in all_rows(dataset)])
    encoding, expected = get_encoding("bytes"), []
    for row in rows:
        ids, weights = (render_text(encoding, "xyz") if "text" in row else
                        render(encoding, messages_of(row)))
        expected += [i for i, weight in zip(ids[1:], weights[1:]) if weight or loss_on == "all"]
    assert sorted(labels[labels >= 0].tolist()) == sorted(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_those_of_plan_rows(sft_shards, layout):
    data = sft_shards([qa("Q" * (i % 9)) for i in range(30)])
    dataset = SFTDataset(data, "train", 16, layout, seed=5, epoch=2, rows_per_step=4)
    plan = plan_rows(dataset.lengths, 16, layout, seed=5, epoch=2, rows_per_step=4)
    assert len(dataset) == len(plan)
    for i, pieces in enumerate(plan):
        assert dataset.tokens(i)[3].tolist() == [number for number, start, stop in pieces
                                                 for _ in range(start, stop)]


def test_drop_last_drops_the_short_last_row_of_a_stream(sft_shards):
    data = sft_shards([{"text": "abcde"}, {"text": "fgh"}])  # ten ids
    assert len(SFTDataset(data, "train", 4, "stream")) == 3
    assert len(SFTDataset(data, "train", 4, "stream", drop_last=True)) == 2  # (10 - 1) // 4
    assert len(SFTDataset(data, "train", 3, "stream", drop_last=True)) == 3  # (10 - 1) // 3


def test_each_epoch_has_its_own_order_and_as_many_rows(sft_shards):
    data = sft_shards([qa(str(i)) for i in range(30)])
    dataset = SFTDataset(data, "train", 16, "fit", seed=0)
    first = list(map(lists, all_rows(dataset)))
    dataset.set_epoch(1)
    second = list(map(lists, all_rows(dataset)))
    assert first != second
    assert len(first) == len(second)
    opened_at_1 = SFTDataset(data, "train", 16, "fit", seed=0, epoch=1)
    assert second == list(map(lists, all_rows(opened_at_1)))


def test_filler_is_all_padding(sft_shards):
    filler = SFTDataset(sft_shards([qa()]), "train", 4).padded([None])
    assert lists(filler) == {"input_ids": [[EOT] * 4], "labels": [[-100] * 4],
                             "weights": [[0] * 4], "segments": [[-1] * 4]}


@pytest.mark.parametrize("layout, fill", [
    ("stream", 7 / 8), ("fit", 6 / 8), ("pad", 6 / 8), ("bucket", 6 / 8)])
def test_fill_counts_the_positions_that_are_read(sft_shards, layout, fill):
    """Examples of 5 and 3 ids: a row of n ids reads n - 1 of its T = 4 positions."""
    dataset = SFTDataset(sft_shards([{"text": "abcd"}, {"text": "ef"}]), "train", 4, layout)
    assert fill_of(dataset) == fill
    segments = torch.stack([row["segments"] for row in all_rows(dataset)])
    assert (segments >= 0).float().mean() == fill


# ----- examples that are too long, and some of the examples --------------------------------------


def test_overlong_example_loses_its_end_and_keeps_its_weights(sft_shards):
    """T = 5 leaves six of QA's seven ids: A and <|end|> are still targets."""
    dataset = SFTDataset(sft_shards([qa(), {"text": "a"}]), "train", 5, "pad", seed=None)
    assert dataset[0]["input_ids"].tolist() == QA[:5]
    assert dataset[0]["labels"].tolist() == [-100, -100, -100, 65, END]
    assert (dataset.n_truncated, dataset.n_dropped, len(dataset)) == (1, 0, 2)


def test_overlong_example_with_no_trained_target_left_is_dropped(sft_shards):
    """T = 3 leaves <|user|> Q <|end|> <|assistant|>, of which nothing is trained."""
    data = sft_shards([qa(), {"text": "a"}, {"text": "abcdef"}])
    dataset = SFTDataset(data, "train", 3, "pad", seed=None)
    assert (dataset.n_truncated, dataset.n_dropped) == (1, 1)
    assert [dataset.tokens(i)[0].tolist() for i in range(len(dataset))] == [
        [97, EOT], [97, 98, 99, 100]]
    everything = SFTDataset(data, "train", 3, "pad", seed=None, loss_on="all")
    assert (everything.n_truncated, everything.n_dropped) == (2, 0)


def test_first_id_of_a_truncated_example_is_not_a_trained_target(sft_shards):
    """A raw answer without a prompt: its first id has a weight, but nothing predicts it."""
    turns = ("user", ""), ("assistant", "A"), ("user", "long question"), ("assistant", "B", 0.5)
    data = sft_shards([chat(*turns), {"text": "a"}], "--template", "raw")
    assert examples_in(data)[0][1][:2] == [100, 0]
    assert SFTDataset(data, "train", 3, "pad").n_dropped == 1


def test_overlong_drop_leaves_examples_out_and_error_refuses(sft_shards):
    data = sft_shards([{"text": "abcdef"}, {"text": "a"}])
    dropped = SFTDataset(data, "train", 3, "fit", overlong="drop")
    assert (dropped.n_truncated, dropped.n_dropped, len(dropped)) == (0, 1, 1)
    for examples in (None, [1, 0]):  # it is named by its number in the data
        with pytest.raises(UserError, match=r"example 0 .* has 7 tokens, but a row takes 4"):
            SFTDataset(data, "train", 3, "fit", overlong="error", examples=examples)
    assert SFTDataset(data, "train", 6, "fit", overlong="error").n_truncated == 0  # 7 = T + 1


def test_stream_cuts_anywhere_and_ignores_overlong(sft_shards):
    data = sft_shards([{"text": "abcdef"}])
    dataset = SFTDataset(data, "train", 2, "stream", overlong="error")
    assert (dataset.n_truncated, dataset.n_dropped, len(dataset)) == (0, 0, 3)


def test_split_whose_examples_are_all_dropped_is_refused(sft_shards):
    with pytest.raises(UserError, match="no example of train fits; raise --block_size"):
        SFTDataset(sft_shards([qa()]), "train", 3, "fit")


@pytest.mark.parametrize("examples, numbers", [
    (None, [0, 2, 3]), (range(3), [0, 2]), (range(99), [0, 2, 3]), ([3, 0, 1], [3, 0])])
def test_examples_keep_their_numbers_in_the_data(sft_shards, examples, numbers):
    """Texts a, bbbbb, c, d: T = 3 drops number 1, and `examples` picks by number, in its order."""
    data = sft_shards([{"text": "a"}, {"text": "b" * 5}, {"text": "c"}, {"text": "d"}])
    dataset = SFTDataset(data, "train", 3, "pad", seed=None, overlong="drop", examples=examples)
    assert dataset.numbers.tolist() == numbers
    assert dataset.n_dropped == 1 and len(dataset) == len(numbers)
    for i, number in enumerate(numbers):
        ids, _, _, of_the_ids = dataset.tokens(i).tolist()
        assert (ids, of_the_ids) == ([ord("abcd"[number]), EOT], [number, number])
        assert dataset.name_of(i, 0) == f"example {number}"


def test_unknown_names_are_refused(sft_shards):
    data = sft_shards([qa()])
    with pytest.raises(UserError, match="unknown loss_on 'prompt'"):
        SFTDataset(data, "train", 8, loss_on="prompt")
    with pytest.raises(UserError, match="unknown overlong 'cut'"):
        SFTDataset(data, "train", 8, overlong="cut")
    with pytest.raises(UserError, match="unknown layout 'tetris'"):
        SFTDataset(data, "train", 8, "tetris")
    with pytest.raises(UserError, match=r"has no test split, only \['train'\]"):
        SFTDataset(data, "test", 8)
    with pytest.raises(IndexError):
        SFTDataset(data, "train", 8)[1]


# ----- prompts with their reference answers ------------------------------------------------------


def prompts_as_text(data: str, n: int = 9) -> list[tuple[str, str]]:
    decode = get_encoding("bytes").decode
    prompts = SFTDataset(data, "train", 16, "stream").prompts(n)
    return [(decode(prompt), decode(reference)) for prompt, reference in prompts]


@pytest.mark.parametrize("template, start, end", [
    ("chat", "<|user|>", "<|end|><|assistant|>"),
    ("raw", "", ""),
    ("alpaca", "Below is an instruction that describes a task. Write a response that "
     "appropriately completes the request.\n\n### Instruction:\n", "\n\n### Response:"),
])
def test_prompt_is_what_precedes_the_first_trained_id_and_reference_the_answer(
        sft_shards, template, start, end):
    """The reference has no end token: <|end|> in a chat, <|endoftext|> elsewhere."""
    data = sft_shards([qa("Q", "A"), qa("two", "words!")], "--template", template)
    pairs = [(f"{start}Q{end}", "A"), (f"{start}two{end}", "words!")]
    assert prompts_as_text(data) == pairs
    assert prompts_as_text(data, n=1) == pairs[:1]


def test_reference_is_the_first_answer_with_a_weight(sft_shards):
    turns = ("user", "a"), ("assistant", "bb", 0), ("user", "c"), ("assistant", "dd", 0.5)
    later = ("user", "e"), ("assistant", "f")
    assert prompts_as_text(sft_shards([chat(*turns, *later)])) == [
        ("<|user|>a<|end|><|assistant|>bb<|end|><|user|>c<|end|><|assistant|>", "dd")]


def test_reference_of_a_raw_chat_ends_where_the_next_question_begins(sft_shards):
    """No token marks the border in `raw`, and an answer kept as context belongs to the prompt."""
    turns = ("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "d")
    data = sft_shards([chat(*turns), chat(*KEPT)], "--template", "raw")
    assert prompts_as_text(data) == [("a", "bb"), ("abbc", "d")]


def test_prompts_of_truncated_examples_are_whole(sft_shards):
    """T = 5 cuts the example after six ids, but the model is asked the whole question."""
    dataset = SFTDataset(sft_shards([qa("Q", "ABCD")]), "train", 5, "fit", loss_on="all")
    assert dataset.n_truncated == 1
    assert dataset.prompts(1) == [([USER, 81, END, ASSISTANT], [65, 66, 67, 68])]


def test_text_rows_have_no_prompt(sft_shards):
    data = sft_shards([{"text": "ab"}, qa()])
    assert prompts_as_text(data, n=1) == []
    assert prompts_as_text(data, n=2) == [("<|user|>Q<|end|><|assistant|>", "A")]


def test_prompts_are_those_of_the_examples_in_use(sft_shards):
    data = sft_shards([qa("too long"), qa()])
    dataset = SFTDataset(data, "train", 6, overlong="drop")
    assert dataset.prompts(1) == [(QA[:4], QA[4:5])]


# ----- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout, T", [("pad", 4), ("bucket", 2)])
def test_batch_stacks_rows_and_bucket_cuts_columns_that_are_all_padding(sft_shards, layout, T):
    """Texts of 2 and 3 ids in rows of 4: one and two positions are read, so bucket needs two."""
    data = sft_shards([{"text": "a"}, {"text": "bc"}])
    dataset = SFTDataset(data, "train", 4, layout, seed=None, rows_per_step=2)
    batch = dataset.batch(range(len(dataset)))
    assert batch["x"].tolist() == [[97, EOT, EOT, EOT][:T], [98, 99, EOT, EOT][:T]]
    assert batch["y"].tolist() == [[EOT, -100, -100, -100][:T], [99, EOT, -100, -100][:T]]
    assert batch["weights"].tolist() == [[1, 0, 0, 0][:T], [1, 1, 0, 0][:T]]
    assert batch["n_tokens"] == 3  # padding does not count


@pytest.mark.parametrize("multiple, T", [(1, 3), (2, 4), (4, 4), (64, 7)])
def test_length_of_a_bucket_is_rounded_up_but_not_beyond_the_block_size(sft_shards, multiple, T):
    """Four ids, so three positions are read. On a GPU each new length costs time."""
    dataset = SFTDataset(sft_shards([{"text": "abc"}]), "train", 7, "bucket")
    batch = dataset.batch([0], multiple)
    assert batch["x"].tolist() == [[97, 98, 99, EOT, EOT, EOT, EOT][:T]]
    assert batch["n_tokens"] == 3


def test_batch_keeps_one_column_of_a_bucket_of_filler(sft_shards):
    """A rank without rows left still runs the model."""
    dataset = SFTDataset(sft_shards([qa()]), "train", 8, "bucket")
    batch = dataset.batch([None, None])
    assert (batch["x"].tolist(), batch["n_tokens"]) == ([[EOT], [EOT]], 0)


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_leaves_segments_out_where_the_causal_mask_suffices(sft_shards, layout, isolate):
    """With one example per row and padding on its right, or without isolation."""
    dataset = SFTDataset(sft_shards([qa(), qa()]), "train", 16, layout, isolate=isolate)
    segments = dataset.batch(range(len(dataset)))["segments"]
    if isolate and layout in ("stream", "fit"):
        assert segments.tolist() == [row["segments"].tolist() for row in all_rows(dataset)]
    else:
        assert segments is None


def test_batches_stack_rows_and_the_last_may_be_smaller(sft_shards):
    dataset = SFTDataset(sft_shards([qa(str(i)) for i in range(5)]), "train", 8, "pad", seed=None)
    batches = list(iterate_batches(dataset, 2, shuffle=False))
    assert [batch["input_ids"].shape for batch in batches] == [(2, 8), (2, 8), (1, 8)]
    assert list(batches[0]) == ["input_ids", "labels", "weights", "segments"]
    for key in batches[0]:
        rows = torch.cat([batch[key] for batch in batches])
        assert torch.equal(rows, torch.stack([row[key] for row in all_rows(dataset)]))


def test_shuffled_batches_have_each_row_once_in_an_order_of_the_seed():
    class Rows(list):
        seed = 0

    def order(seed):
        rows = Rows(range(8))
        rows.seed = seed
        return torch.cat(list(iterate_batches(rows, 3, shuffle=True))).tolist()

    assert sorted(order(0)) == list(range(8))
    assert order(0) == order(0) != list(range(8))
    assert order(0) != order(1)


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_leave_the_global_random_state_alone(sft_shards, shuffle):
    dataset = SFTDataset(sft_shards([qa(str(i)) for i in range(5)]), "train", 8, "pad")
    torch.manual_seed(7)  # a state that no fixed seed of the code would produce
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    dataset.set_epoch(1)
    list(iterate_batches(dataset, 2, shuffle))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


# ----- the report --------------------------------------------------------------------------------


def test_report_counts_rows_and_tokens_and_what_each_layout_makes_of_them(tmp_path, jsonl, command):
    """Four examples of 7 ids and one of 12, of which T = 8 keeps 9; one row is bad."""
    rows = [qa("Q"), qa("R"), {"prompt": "Q"}, qa("S"), qa("T"), qa("Q", "ABCDEF")]
    source = jsonl("a.jsonl", rows)
    result = command(sft_data, "--source", source, "--encoding", "bytes", "--val_fraction", 0,
                     "--workers", 1, "--block_size", 8, "--on_bad_row", "skip",
                     "--out", tmp_path / "sft")
    assert result.err == ""
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert lines[0] == "read 6 rows: 5 kept, 1 rejected"
    assert lines[1].startswith(f"rejected {source} line 3: ")
    # trained: A and its <|end|> four times, ABCDEF and its <|end|> once: 15 of 40
    assert lines[2] == "train 5 examples 40 tokens 37.5% in the loss 1 shard(s)"
    assert lines[3] == "length p0 7 p10 7 p50 7 p90 10 p99 12 p100 12"
    assert lines[4:10] == [
        "rows of --block_size 8:",
        "layout rows fill examples/row truncated dropped",
        "stream 5 97.5% 1.00 0 0",  # 39 of 5 x 8 positions
        "fit 5 80.0% 1.00 1 0",  # no two examples fit in 9 ids: 4 x 6 + 8 of 40 positions
        "pad 5 80.0% 1.00 1 0",
        "bucket 5 80.0% 1.00 1 0",
    ]


def test_report_names_sources_unused_text_duplicates_and_why_rows_were_rejected(tmp_path, jsonl,
                                                                            command):
    """Of a.jsonl one row is left out, three are bad, one is repaired, and two are used twice."""
    bad = [qa("x", ""), {"messages": [{"role": "bob", "content": "b"}]}, qa("y", "")]
    repeated = chat(("user", "q"), ("user", "r"), ("assistant", "s"))
    noted, filtered = qa("1") | {"note": "n", "id": 1}, qa("2") | {"ok": False}
    a = jsonl("a.jsonl", [noted, filtered, *bad, repeated])
    b = jsonl("b.jsonl", [qa("3") | {"note": " "}])
    val = jsonl("val.jsonl", [qa("1", "other"), qa("4")])
    result = command(sft_data, "--source", f"{a}*2", b, "--val_source", val, "--encoding", "bytes",
                     "--workers", 1, "--on_bad_row", "skip", "--where", "ok=null", "--repair",
                     "--where", "language=null", "--out", tmp_path / "sft")
    assert (result.code, result.err) == (0, "")
    lines = [line.strip() for line in result.out.splitlines()]
    assert lines[0] == "read 10 rows: 7 kept, 3 rejected"
    assert lines[1] == f"rejected {a} line 3: message 1: the response is empty, so there is " \
                       "nothing to train on"
    assert lines[4:11] == [
        f"4 kept of {a}", f"2 kept of {val}", f"1 kept of {b}",
        "not used (rows with text there): note 1, id 0",
        "duplicates: 2 examples repeat an earlier one, 1 validation prompts occur in training",
        "left out by --where: 1",
        "turns merged: 1",
    ]


def test_same_text_with_another_weight_is_no_duplicate(tmp_path, jsonl, command):
    rows = [chat(("user", "Q"), ("assistant", "A", weight)) for weight in (0.5, 1, 0.25)]
    printed = command(sft_data, "--source", jsonl("a.jsonl", rows), "--encoding", "bytes",
                      "--val_fraction", 0, "--workers", 1, "--out", tmp_path / "sft").out
    assert "train" in printed and "duplicates" not in printed


def test_max_examples_128_is_a_subset_of_256_with_a_validation_split(sft_shards):
    rows = [qa(str(i)) for i in range(300)]
    few, many = (sft_shards(rows, "--max_examples", n, "--val_fraction", 0.05, name=str(n))
                 for n in (128, 256))
    for split in ("train", "val"):
        assert set(texts_in(few, split)) < set(texts_in(many, split))
    assert len(texts_in(few)) + len(texts_in(few, "val")) == 128


@pytest.mark.parametrize("workers", [1, 2])
def test_flags_of_the_rows_work_on_the_command_line(sft_shards, workers):
    rows = [{"q": "Q", "a": "A", "c": "x", "cot": "So"}]
    folder = sft_shards(rows, "--columns", "prompt=q,response=a,input=c", "--ignore", "cot", "note",
                        "--workers", workers)
    assert texts_in(folder) == ["<|user|>Q\n\nx<|end|><|assistant|>A<|end|><|endoftext|>"]


def test_flags_of_the_rows_that_cannot_be_are_one_line(jsonl, command, tmp_path):
    source = jsonl("a.jsonl", [qa()])
    result = command(sft_data, "--source", source, "--val_source", source, "--encoding", "bytes",
                     "--out", tmp_path / "o")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"--val_source {source} is --source {source}" in result.err
    result = command(sft_data, "--source", "me/mine", "--val_source", "me/mine:de", "--subset",
                     "de", "--encoding", "bytes", "--out", tmp_path / "o")
    assert "--val_source me/mine:de is --source me/mine:" in result.err
    for flags in (["--columns", "x=q"], ["--columns", "q"], ["--where", "q"], ["--where", "q=1"]):
        flags += ["--encoding", "bytes", "--out", tmp_path / "o"]
        result = command(sft_data, "--source", source, *flags)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert result.err.startswith(f"error: {flags[0]} ")  # no row is to blame
    assert not (tmp_path / "o").exists()


def test_shards_are_kept_if_the_report_finds_no_example_that_fits_a_row(sft_shards):
    data = sft_shards([qa()], "--block_size", 2)
    assert len(SFTDataset(data, "train", 8)) == 1


# ----- the next command --------------------------------------------------------------------------

TINY = ["--device", "cpu", "--max_steps", 1, "--block_size", 16, "--batch_size", 2,
        "--rows_per_step", 2, "--eval_prompts", 0]


def next_line(printed: str) -> str:
    return next(line for line in printed.splitlines() if line.startswith("next: ")).removeprefix(
        "next: ")


def test_next_command_for_bytes_runs_as_printed(tmp_path, jsonl, command, monkeypatch):
    """In a shell, with torchrun, in another folder than the code; the data's name needs quotes."""
    monkeypatch.chdir(tmp_path)
    result = command(sft_data, "--source", jsonl("a.jsonl", [qa()] * 9), "--encoding", "bytes",
                     "--val_fraction", 0, "--workers", 1, "--out", "my data; exit 3")
    assert "--init out/base" in result.out.splitlines()[-1]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    sizes = ["--n_layer", 1, "--n_head", 1, "--n_embd", 8]
    line = " ".join([next_line(result.out), *map(str, [*TINY, *sizes])])
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert Path("out/sft/step_000001").is_dir()


def test_next_command_for_gpt2_runs_with_a_model_of_that_name(tmp_path, jsonl, command, gpt2,
                                                             monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(vocab_size=50304, n_vocab=50257, n_embd=8).save_pretrained("gpt2")
    result = command(sft_data, "--source", jsonl("a.jsonl", [qa()] * 9), "--val_fraction", 0,
                     "--workers", 1, "--out", "data/sft")
    words = shlex.split(next_line(result.out))
    flags = words[words.index(str(Path(train_sft.__file__))) + 1 :]
    assert flags[flags.index("--init") + 1] == "gpt2"
    assert command(train_sft, *flags, *TINY).code == 0
    assert Path("out/sft/step_000001").is_dir()
