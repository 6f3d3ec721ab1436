"""Chats to shards, and shards to the rows that a trainer sees: ids, labels, weights, segments.

Most examples are worked by hand in the bytes encoding: {"prompt": "Q", "response": "A"} becomes
<|user|> Q <|end|> <|assistant|> A <|end|> <|endoftext|>, seven ids of which A and its <|end|> are
trained.
"""

import doctest
import json
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings, strategies as st

import sft_data
from sft_data import (
    LAYOUTS,
    SFTDataset,
    create_labels,
    iterate_batches,
    mark_validation,
    messages_of,
    tokenize_prompt_and_output,
)
from tokenizer import get_encoding, render, render_text

EOT, SYSTEM, USER, ASSISTANT, END = range(256, 261)  # in the bytes encoding
QA = [USER, 81, END, ASSISTANT, 65, END, EOT]  # Q 81, A 65: seven ids


def qa(prompt: str = "Q", response: str = "A") -> dict:
    return {"prompt": prompt, "response": response}


def rows_of(folder, split: str = "train") -> list[tuple[list[int], list[int]]]:
    """(ids, weights) of each example, read from the files without the code under test."""
    shards = [np.load(path) for path in sorted(Path(folder).glob(f"{split}_*.npy"))]
    ids, weights = np.concatenate(shards, axis=1)
    ends = (np.flatnonzero(ids == EOT) + 1)[:-1]
    parts = zip(np.split(ids, ends), np.split(weights, ends))
    return [(part.tolist(), weight.tolist()) for part, weight in parts]


def texts_of(folder, split: str = "train") -> list[str]:
    return [get_encoding("bytes").decode(ids) for ids, _ in rows_of(folder, split)]


def lists(row: dict[str, torch.Tensor]) -> dict[str, list]:
    return {key: value.tolist() for key, value in row.items()}


def rows_equal(a: SFTDataset, b: SFTDataset) -> bool:
    return [lists(a[i]) for i in range(len(a))] == [lists(b[i]) for i in range(len(b))]


# ----- rows in -----------------------------------------------------------------------------------


def test_the_examples_in_the_docstrings_are_right():
    failed, tried = doctest.testmod(sft_data)
    assert failed == 0
    assert tried >= 4


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "response": "A"},
        {"prompt": "Q", "completion": "A"},
        {"question": "Q", "answer": "A"},
        {"instruction": "Q", "output": "A"},
        {"instruction": "Q", "response": "A"},
        {"instruction": "Q", "input": "", "output": "A", "text": "Alpaca's own rendering"},
        {"instruction": "Q", "input": None, "output": "A"},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]},
        {"prompt": "Q", "response": "A", "id": 7, "extra": None},
    ],
)
def test_every_known_form_of_a_row_is_the_same_conversation(bytes_encoding, row):
    ids, weights = render(bytes_encoding, messages_of(row))
    assert ids == QA
    assert weights == [0, 0, 0, 0, 100, 100, 0]


def test_the_alpaca_input_belongs_to_the_user_message(bytes_encoding):
    row = {"instruction": "Q", "input": "x", "output": "A"}
    assert messages_of(row) == [
        {"role": "user", "content": "Q", "input": "x"},
        {"role": "assistant", "content": "A"},
    ]


def test_sharegpt_roles_are_translated_and_others_left_to_be_refused():
    turns = [{"from": who, "value": "v"} for who in ("system", "human", "gpt", "tool", ["x"], None)]
    roles = [message["role"] for message in messages_of({"conversations": turns})]
    assert roles == ["system", "user", "assistant", "tool", ["x"], None]


def test_a_text_row_is_trained_whole(sft_shards):
    assert rows_of(sft_shards([{"text": "ab"}])) == [([97, 98, EOT], [100, 100, 100])]


def test_jsonl_json_and_parquet_give_the_same_shards(tmp_path, sft_shards, command):
    rows = [qa("Q", "A"), qa("é 你", "😀 \u2028")]
    expected = rows_of(sft_shards(rows))
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=2))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for file in ("a.json", "a.parquet"):
        flags = ("--encoding", "bytes", "--val_fraction", 0, "--workers", 1)
        out = tmp_path / file.replace(".", "_")
        assert command(sft_data, "--source", tmp_path / file, "--out", out, *flags).code == 0
        assert rows_of(out) == expected


def test_parquet_fills_the_gaps_of_nested_rows_with_none(tmp_path, command):
    """Where one message has a weight, every message of the column has that key."""
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    weighted = [messages[0], messages[1] | {"weight": 0.5}]
    table = pyarrow.Table.from_pylist([{"messages": weighted}, {"messages": messages}])
    assert table.to_pylist()[1]["messages"][0] == messages[0] | {"weight": None}
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    flags = ("--encoding", "bytes", "--val_fraction", 0, "--workers", 1, "--out", tmp_path / "out")
    assert command(sft_data, "--source", tmp_path / "a.parquet", *flags).code == 0
    assert [weights[4] for _, weights in rows_of(tmp_path / "out")] == [50, 100]


# ----- shards ------------------------------------------------------------------------------------


def test_a_shard_is_the_ids_and_below_each_its_weight_in_percent(sft_shards):
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A", "weight": 0.25},
    ]
    folder = sft_shards([{"messages": messages}, {"text": "z"}])
    shard = np.load(f"{folder}/train_000000.npy")
    assert shard.dtype == np.uint16
    assert shard.tolist() == [[*QA, 122, EOT], [0, 0, 0, 0, 25, 25, 0, 100, 100]]


@given(st.lists(st.tuples(st.text(), st.text(min_size=1)), min_size=1, max_size=5))
@settings(max_examples=20)
def test_what_goes_into_shards_comes_out_again(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("round")
    (folder / "a.json").write_text(json.dumps([qa(*pair) for pair in pairs]))
    config = sft_data.Config(
        source=(str(folder / "a.json"),), out=str(folder / "sft"), encoding="bytes",
        val_fraction=0, workers=1, shard_tokens=20,
    )  # fmt: skip
    sft_data.prepare(config)
    assert texts_of(folder / "sft") == [
        f"<|user|>{prompt}<|end|><|assistant|>{response}<|end|><|endoftext|>"
        for prompt, response in pairs
    ]
    dataset = SFTDataset(str(folder / "sft"), "train", 10_000, "pad", seed=None)
    encoding = get_encoding("bytes")
    for i, (prompt, response) in enumerate(pairs):
        row = dataset[i]
        trained = row["labels"][row["labels"] >= 0].tolist()
        assert encoding.decode(trained) == response + "<|end|>"
        before = row["input_ids"][: int(row["labels"].ge(0).nonzero()[0])].tolist()
        assert encoding.decode(before) == f"<|user|>{prompt}<|end|>"


def test_the_shards_do_not_depend_on_the_number_of_workers(tmp_path, sft_shards, monkeypatch):
    monkeypatch.setattr(sft_data, "ROWS_A_CHUNK", 3)
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
    a, b = (SFTDataset(data, "train", 16, layout) for data in (whole, parts))
    assert rows_equal(a, b)


def test_meta_says_what_is_in_the_folder(sft_shards):
    folder = sft_shards([qa(), qa("", "AB")], "--train_on", "last_turn")
    meta = json.loads(Path(folder, "meta.json").read_text())
    split = meta["splits"]["train"]
    keys = ("version", "kind", "encoding", "vocab_size", "template")
    assert {key: meta[key] for key in keys} == {
        "version": 1, "kind": "sft", "encoding": "bytes", "vocab_size": 261, "template": "chat",
    }  # fmt: skip
    assert {key: split[key] for key in ("examples", "tokens", "trained_tokens", "shards")} == {
        "examples": 2, "tokens": 14, "trained_tokens": 5, "shards": 1,
    }  # fmt: skip
    assert meta["train_on"] == "last_turn"


# ----- the validation split ----------------------------------------------------------------------


def test_one_row_of_every_1_over_fraction_goes_to_validation():
    """A fraction of 0.25 picks one of the rows 0 to 3, one of 4 to 7, … so no part is left out."""
    picks = [picked for _, picked in mark_validation(iter(range(40)), 0.25, 0)]
    assert [sum(picks[i : i + 4]) for i in range(0, 40, 4)] == [1] * 10


@pytest.mark.parametrize("fraction", [0.03, 0.05, 1 / 3, 0.5, 0.7, 0.99])
def test_validation_has_its_share(fraction):
    picks = [picked for _, picked in mark_validation(iter(range(1000)), fraction, 1)]
    assert abs(sum(picks) - 1000 * fraction) <= 1


@pytest.mark.parametrize("n", [2, 3, 19])
def test_of_few_rows_one_goes_to_validation(n):
    picks = [picked for _, picked in mark_validation(iter(range(n)), 0.05, 0)]
    assert len(picks) == n and sum(picks) == 1


def test_the_seed_decides_which_rows_are_validation(sft_shards):
    rows = [qa(str(i)) for i in range(40)]
    first, again, other = (
        sft_shards(rows, "--val_fraction", 0.25, "--seed", seed, name=name)
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert texts_of(first, "val") == texts_of(again, "val") != texts_of(other, "val")
    for folder in (first, other):
        assert len(texts_of(folder, "val")) == 10
        everything = sorted(texts_of(folder) + texts_of(folder, "val"))
        assert everything == sorted(texts_of(sft_shards(rows, name=f"{folder}_all")))


def test_val_source_is_the_whole_validation_split(jsonl, sft_shards):
    val = jsonl("val.jsonl", [qa("V")])
    folder = sft_shards([qa(), qa()], "--val_source", val, "--val_fraction", 0.5)
    assert texts_of(folder, "val") == ["<|user|>V<|end|><|assistant|>A<|end|><|endoftext|>"]
    assert len(texts_of(folder)) == 2


def test_a_fraction_of_0_makes_no_validation_split(sft_shards):
    folder = sft_shards([qa()] * 30, "--val_fraction", 0)
    assert list(json.loads(Path(folder, "meta.json").read_text())["splits"]) == ["train"]


def test_max_examples_takes_the_first_ones(sft_shards):
    rows = [qa(str(i)) for i in range(9)]
    folder = sft_shards(rows, "--max_examples", 3)
    assert texts_of(folder) == texts_of(sft_shards(rows[:3], name="three"))


# ----- labels ------------------------------------------------------------------------------------


def test_labels_are_the_ids_one_further_on_where_those_are_trained():
    assert create_labels([5, 6, 7, 8], [0, 0, 100, 1]).tolist() == [-100, 7, 8]
    batch = create_labels(np.array([[5, 6], [7, 8]], np.uint16), np.array([[9, 0], [0, 9]]))
    assert batch.tolist() == [[-100], [8]]
    assert batch.dtype == torch.int64
    assert create_labels([5], [100]).tolist() == []  # nothing predicts the first id


def test_prompts_and_outputs_are_joined_padded_and_shifted(bytes_encoding):
    """Rows "ab" + "c" and "d" + "ef!": four ids the longest, so three columns."""
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


def test_padding_is_no_response_although_its_id_ends_answers_too(bytes_encoding):
    rows = tokenize_prompt_and_output(bytes_encoding, ["a", "a"], [[98, EOT], [98, 99, 100, EOT]])
    assert rows["labels"][0].tolist() == [98, EOT, EOT, EOT]
    assert rows["response_mask"][0].tolist() == [True, True, False, False]


def test_prompt_and_output_are_encoded_apart(gpt2):
    """ "the" is one token, but the output begins inside of it."""
    rows = tokenize_prompt_and_output(gpt2, ["t"], ["he"])
    assert rows["input_ids"][0, 0] == gpt2.encode_ordinary("t")[0]
    assert rows["response_mask"].all()


def test_an_answer_without_a_prompt_has_no_label_for_its_first_token(bytes_encoding):
    rows = tokenize_prompt_and_output(bytes_encoding, ["", "ab"], ["ab", ""])
    assert rows["response_mask"].tolist() == [[True], [False]]
    assert tokenize_prompt_and_output(bytes_encoding, [], [])["input_ids"].shape == (0, 0)
    with pytest.raises(ValueError, match="2 prompts and 1 outputs"):
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
    assert {key: value.dtype for key, value in row.items()} == {
        "input_ids": torch.int64, "labels": torch.int64,
        "weights": torch.float32, "segments": torch.int64,
    }  # fmt: skip


def test_a_packed_row_by_hand(sft_shards):
    """Two examples of three ids: "a" and "b", trained whole with their <|endoftext|>."""
    data = sft_shards([{"text": "a"}, {"text": "b"}])
    assert lists(SFTDataset(data, "train", 5, "fit", seed=None)[0]) == {
        "input_ids": [97, EOT, 98, EOT, EOT],  # 97 EOT 98 EOT has four ids: three are read
        "labels": [EOT, -100, EOT, -100, -100],  # nobody predicts 98, the neighbour's first id
        "weights": [1, 0, 1, 0, 0],
        "segments": [0, 0, 1, -1, -1],
    }


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_the_first_id_of_a_neighbour_is_never_a_target(sft_shards, loss_on):
    data = sft_shards([{"text": "ab"}, {"text": "cd"}, {"text": "ef"}])
    for layout in ("fit", "stream"):
        dataset = SFTDataset(data, "train", 8, layout, seed=None, loss_on=loss_on)
        assert len(dataset) == 1
        assert dataset[0]["labels"].tolist() == [98, EOT, -100, 100, EOT, -100, 102, EOT]
        assert dataset[0]["segments"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_except_in_a_stream_that_is_not_isolated(sft_shards):
    """The classic GPT-2 stream is one text: what follows <|endoftext|> is predicted, too."""
    data = sft_shards([{"text": "ab"}, {"text": "cd"}])
    stream = SFTDataset(data, "train", 5, "stream", seed=None, isolate=False)
    assert stream[0]["labels"].tolist() == [98, EOT, 99, 100, EOT]
    assert stream[0]["segments"].tolist() == [0] * 5
    fit = SFTDataset(data, "train", 5, "fit", seed=None, isolate=False)
    assert fit[0]["labels"].tolist() == [98, EOT, -100, 100, EOT]
    assert fit[0]["segments"].tolist() == [0] * 5
    chats = SFTDataset(sft_shards([qa(), qa()], name="c"), "train", 13, "stream", isolate=False)
    assert chats[0]["labels"][6] == -100  # <|user|> has weight 0 itself


def test_an_example_goes_on_in_the_next_row_of_a_stream(sft_shards):
    """abcde and T = 3: the second row's first id is the first row's last target."""
    dataset = SFTDataset(sft_shards([{"text": "abcde"}]), "train", 3, "stream")
    assert [lists(dataset[i]) for i in range(len(dataset))] == [
        {"input_ids": [97, 98, 99], "labels": [98, 99, 100],
         "weights": [1, 1, 1], "segments": [0, 0, 0]},
        {"input_ids": [100, 101, EOT], "labels": [101, EOT, -100],
         "weights": [1, 1, 0], "segments": [0, 0, -1]},
    ]  # fmt: skip


def test_loss_on_all_trains_prompts_too_but_no_padding(sft_shards):
    row = SFTDataset(sft_shards([qa()]), "train", 8, "pad", loss_on="all")[0]
    assert row["labels"].tolist() == [*QA[1:], -100, -100]
    assert row["weights"].tolist() == [1] * 6 + [0, 0]


def test_padding_is_not_trained_though_its_id_is_a_real_endoftext(sft_shards):
    """In `raw` the real <|endoftext|> is a target; the padding after it has the same id."""
    data = sft_shards([qa()], "--template", "raw")
    row = SFTDataset(data, "train", 4, "pad")[0]
    assert row["input_ids"].tolist() == [81, 65, EOT, EOT]
    assert row["labels"].tolist() == [65, EOT, -100, -100]
    assert row["segments"].tolist() == [0, 0, -1, -1]


def test_weights_are_fractions_of_the_labels(sft_shards):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[1]["weight"], messages[3]["weight"] = 0.5, 0.001
    row = SFTDataset(sft_shards([{"messages": messages}]), "train", 12, "pad")[0]
    expected = [0, 0, 0, 0.5, 0.5, 0, 0, 0, 0, 0.01, 0.01, 0]
    assert row["weights"].tolist() == torch.tensor(expected).tolist()
    assert (row["labels"] >= 0).tolist() == [weight > 0 for weight in expected]


def test_block_size_1_still_trains_the_one_target_of_each_pair(sft_shards):
    dataset = SFTDataset(sft_shards([{"text": "ab"}]), "train", 1, "stream", seed=None)
    assert [(int(row["input_ids"]), int(row["labels"])) for row in dataset_rows(dataset)] == [
        (97, 98), (98, EOT)
    ]  # fmt: skip


def dataset_rows(dataset: SFTDataset) -> list[dict]:
    return [dataset[i] for i in range(len(dataset))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_every_layout_trains_the_same_targets(sft_shards, layout, loss_on):
    """Only a stream cuts examples, and even there each id is predicted once."""
    rows = [qa("Q" * (i % 6), "A" * (i % 3 + 1)) for i in range(17)] + [{"text": "xyz"}]
    data = sft_shards(rows)
    dataset = SFTDataset(data, "train", 16, layout, seed=3, loss_on=loss_on)
    labels = torch.cat([row["labels"] for row in dataset_rows(dataset)])
    expected = []
    for row in rows:
        messages = messages_of(row)
        encoding = get_encoding("bytes")
        pair = render_text(encoding, "xyz") if "text" in row else render(encoding, messages)
        expected += [i for i, weight in list(zip(*pair))[1:] if weight or loss_on == "all"]
    assert sorted(labels[labels >= 0].tolist()) == sorted(expected)


def test_drop_last_drops_the_short_last_row_of_a_stream(sft_shards):
    data = sft_shards([{"text": "abcde"}, {"text": "fgh"}])  # ten ids
    assert len(SFTDataset(data, "train", 4, "stream")) == 3
    assert len(SFTDataset(data, "train", 4, "stream", drop_last=True)) == 2  # (10 - 1) // 4
    assert len(SFTDataset(data, "train", 3, "stream", drop_last=True)) == 3  # (10 - 1) // 3


def test_an_epoch_has_an_order_of_its_own_and_as_many_rows(sft_shards):
    data = sft_shards([qa(str(i)) for i in range(30)])
    dataset = SFTDataset(data, "train", 16, "fit", seed=0)
    first, n = lists(dataset[0]), len(dataset)
    dataset.set_epoch(1)
    assert lists(dataset[0]) != first
    assert len(dataset) == n
    assert rows_equal(dataset, SFTDataset(data, "train", 16, "fit", seed=0, epoch=1))


def test_filler_is_all_padding(sft_shards):
    filler = SFTDataset(sft_shards([qa()]), "train", 4).filler()
    assert lists(filler) == {
        "input_ids": [EOT] * 4, "labels": [-100] * 4, "weights": [0] * 4, "segments": [-1] * 4,
    }  # fmt: skip


def test_fill_counts_the_places_that_are_read(sft_shards):
    """Examples of 5 and 3 ids: a row of n ids reads n - 1 of its T = 4 places."""
    data = sft_shards([{"text": "abcd"}, {"text": "ef"}])
    fills = {layout: SFTDataset(data, "train", 4, layout).fill() for layout in LAYOUTS}
    assert fills == {"stream": 7 / 8, "fit": 6 / 8, "pad": 6 / 8, "bucket": 6 / 8}
    for layout, fill in fills.items():
        rows = dataset_rows(SFTDataset(data, "train", 4, layout))
        assert fill == sum(int((row["segments"] >= 0).sum()) for row in rows) / (4 * len(rows))


def test_reading_rows_leaves_the_shards_as_they_are(sft_shards):
    data = sft_shards([{"text": "a"}, {"text": "b"}])
    before = Path(data, "train_000000.npy").read_bytes()
    for loss_on in ("response", "all"):
        dataset_rows(SFTDataset(data, "train", 5, "fit", loss_on=loss_on))
    assert Path(data, "train_000000.npy").read_bytes() == before


# ----- examples that are too long ----------------------------------------------------------------


def test_overlong_examples_lose_their_end_and_keep_their_weights(sft_shards):
    """T = 5 leaves six of QA's seven ids: A and <|end|> are still targets."""
    dataset = SFTDataset(sft_shards([qa(), {"text": "a"}]), "train", 5, "pad", seed=None)
    assert dataset[0]["input_ids"].tolist() == QA[:5]
    assert dataset[0]["labels"].tolist() == [-100, -100, -100, 65, END]
    assert (dataset.n_truncated, dataset.n_dropped, len(dataset)) == (1, 0, 2)


def test_an_overlong_example_with_no_trained_target_left_is_dropped(sft_shards):
    """T = 3 leaves <|user|> Q <|end|> <|assistant|>, of which nothing is trained."""
    data = sft_shards([qa(), {"text": "a"}, {"text": "abcdef"}])
    dataset = SFTDataset(data, "train", 3, "pad", seed=None)
    assert (dataset.n_truncated, dataset.n_dropped, len(dataset)) == (1, 1, 2)
    assert [dataset.pieces(i) for i in range(2)] == [[(1, 0, 2)], [(2, 0, 4)]]
    assert dataset[1]["input_ids"].tolist() == [97, 98, 99]
    everything = SFTDataset(data, "train", 3, "pad", seed=None, loss_on="all")
    assert (everything.n_truncated, everything.n_dropped) == (2, 0)


def test_the_first_id_of_a_cut_example_does_not_count_as_a_target(sft_shards):
    """A raw answer without a prompt: its first id has a weight, but nothing predicts it."""
    messages = [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "long question"},
        {"role": "assistant", "content": "B", "weight": 0.5},
    ]
    data = sft_shards([{"messages": messages}, {"text": "a"}], "--template", "raw")
    assert rows_of(data)[0][1][:2] == [100, 0]
    assert SFTDataset(data, "train", 3, "pad").n_dropped == 1


def test_overlong_drop_leaves_them_out_and_error_refuses(sft_shards):
    data = sft_shards([{"text": "abcdef"}, {"text": "a"}])
    dropped = SFTDataset(data, "train", 3, "fit", overlong="drop")
    assert (dropped.n_truncated, dropped.n_dropped, len(dropped)) == (0, 1, 1)
    with pytest.raises(ValueError, match=r"example 0 .* has 7 tokens, a row 4"):
        SFTDataset(data, "train", 3, "fit", overlong="error")
    assert SFTDataset(data, "train", 6, "fit", overlong="error").n_truncated == 0  # 7 = T + 1


def test_a_stream_cuts_anywhere_and_needs_no_overlong(sft_shards):
    data = sft_shards([{"text": "abcdef"}])
    dataset = SFTDataset(data, "train", 2, "stream", overlong="error")
    assert (dataset.n_truncated, dataset.n_dropped, len(dataset)) == (0, 0, 3)


def test_where_every_example_is_dropped_there_is_nothing_to_train(sft_shards):
    with pytest.raises(ValueError, match="no example of train fits; raise --block_size"):
        SFTDataset(sft_shards([qa()]), "train", 3, "fit")


def test_examples_picks_some_by_number_before_anything_is_planned(sft_shards):
    data = sft_shards([{"text": letter} for letter in "abcd"])
    dataset = SFTDataset(data, "train", 3, "pad", seed=None, examples=range(2))
    assert [int(row["input_ids"][0]) for row in dataset_rows(dataset)] == [97, 98]
    assert len(SFTDataset(data, "train", 3, "pad", examples=range(99))) == 4
    picked = SFTDataset(data, "train", 3, "pad", seed=None, examples=[3, 1])
    assert [int(row["input_ids"][0]) for row in dataset_rows(picked)] == [100, 98]


def test_the_dataset_refuses_names_that_it_does_not_know(sft_shards):
    data = sft_shards([qa()])
    with pytest.raises(ValueError, match="'prompt' is neither 'response' nor 'all'"):
        SFTDataset(data, "train", 8, loss_on="prompt")
    with pytest.raises(ValueError, match="'cut' is none of drop, truncate, error"):
        SFTDataset(data, "train", 8, overlong="cut")
    with pytest.raises(ValueError, match="unknown layout 'tetris'"):
        SFTDataset(data, "train", 8, "tetris")
    with pytest.raises(ValueError, match=r"has no test split, only \['train'\]"):
        SFTDataset(data, "test", 8)
    with pytest.raises(IndexError):
        SFTDataset(data, "train", 8)[1]


# ----- batches -----------------------------------------------------------------------------------


def test_batches_stack_rows_and_the_last_may_be_smaller(sft_shards):
    dataset = SFTDataset(sft_shards([qa(str(i)) for i in range(5)]), "train", 8, "pad", seed=None)
    batches = list(iterate_batches(dataset, 2, shuffle=False))
    assert [batch["input_ids"].shape for batch in batches] == [(2, 8), (2, 8), (1, 8)]
    assert list(batches[0]) == ["input_ids", "labels", "weights", "segments"]
    for key in batches[0]:
        stacked = torch.cat([batch[key] for batch in batches])
        assert torch.equal(stacked, torch.stack([row[key] for row in dataset_rows(dataset)]))


def test_shuffled_batches_have_each_row_once_in_an_order_of_the_seed(sft_shards):
    data = sft_shards([qa(str(i)) for i in range(8)])

    def order(seed):
        dataset = SFTDataset(data, "train", 8, "pad", seed=seed)
        dataset.plan = SFTDataset(data, "train", 8, "pad", seed=None).plan
        batches = iterate_batches(dataset, 3, shuffle=True)
        return torch.cat([batch["input_ids"][:, 1] for batch in batches]).tolist()

    assert sorted(order(0)) == sorted(b"01234567")
    assert order(0) == order(0) != list(b"01234567")
    assert order(0) != order(1)


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_leave_the_global_random_state_alone(sft_shards, shuffle):
    dataset = SFTDataset(sft_shards([qa(str(i)) for i in range(5)]), "train", 8, "pad")
    torch.manual_seed(7)  # a state that no fixed seed of the code would give
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(iterate_batches(dataset, 2, shuffle))
    dataset.set_epoch(1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


# ----- the report --------------------------------------------------------------------------------


def test_the_report_counts_rows_tokens_and_what_each_layout_makes_of_them(tmp_path, jsonl, command):
    """Four examples of 7 ids and one of 12, of which T = 8 keeps 9; one row is bad."""
    rows = [qa(), qa(), {"prompt": "Q"}, qa(), qa(), qa("Q", "ABCDEF")]
    source = jsonl("a.jsonl", rows)
    flags = ["--encoding", "bytes", "--val_fraction", 0, "--workers", 1, "--block_size", 8]
    flags += ["--on_bad_row", "skip", "--out", tmp_path / "sft"]
    result = command(sft_data, "--source", source, *flags)
    assert result.err == ""
    said = [" ".join(line.split()) for line in result.out.splitlines()]
    assert said[0] == "read 6 rows: 5 kept, 1 rejected"
    assert said[1].startswith(f"rejected {source} line 3: ")
    # trained: A and its <|end|> four times, ABCDEF and its <|end|> once: 15 of 40
    assert said[2] == "train 5 examples 40 tokens 37.5% trained 1 shard(s)"
    assert said[3] == "length p0 7 p10 7 p50 7 p90 10 p99 12 p100 12"
    assert said[4:10] == [
        "rows of --block_size 8:",
        "layout rows fill examples/row truncated dropped",
        "stream 5 97.5% 1.00 0 0",  # 39 of 5 x 8 places
        "fit 5 80.0% 1.00 1 0",  # no two examples fit in 9 ids: 4 x 6 + 8 of 40 places
        "pad 5 80.0% 1.00 1 0",
        "bucket 5 80.0% 1.00 1 0",
    ]


def test_a_report_whose_rows_are_too_short_still_leaves_good_shards(sft_shards):
    data = sft_shards([qa()], "--block_size", 2)
    assert len(SFTDataset(data, "train", 8)) == 1


def test_skipped_rows_are_left_out_and_the_rest_keeps_its_order(sft_shards):
    rows = [qa("a"), {"messages": []}, qa("b", ""), qa("c")]
    folder = sft_shards(rows, "--on_bad_row", "skip")
    assert texts_of(folder) == texts_of(sft_shards([qa("a"), qa("c")], name="good"))
