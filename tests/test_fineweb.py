"""Text to shards: which tokens, in which order, in which files."""

import hashlib
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, strategies as st

import fineweb
import train_gpt2
from fineweb import first_tokens, split_off
from tokenizer import get_encoding

EOT = 256  # in the bytes encoding


def tokens_of(folder, split: str = "train") -> list[int]:
    shards = [np.load(path) for path in sorted(Path(folder).glob(f"{split}_*.npy"))]
    return np.concatenate(shards).tolist()


@pytest.fixture
def text_shards(tmp_path, command):
    """text_shards([source, …], "--flag", …) runs fineweb.py on bytes and returns the folder."""

    def prepare(sources: list, *flags, name: str = "text") -> Path:
        result = command(fineweb, "--source", *sources, "--encoding", "bytes", "--val_tokens", 0,
                         "--workers", 1, "--out", tmp_path / name, *flags)
        assert result.code == 0, result.err
        return tmp_path / name

    return prepare


# ----- sources -----------------------------------------------------------------------------------


def test_each_document_of_every_kind_of_file_ends_with_endoftext(tmp_path, jsonl, text_shards):
    (tmp_path / "a.txt").write_text("a\nb")  # one document, however many lines it has
    (tmp_path / "c.json").write_text('[{"text": "c"}, {"text": ""}]')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["d"], "id": [7]}), tmp_path / "d.parquet")
    sources = [tmp_path / "a.txt", jsonl("b.jsonl", [{"text": "é", "id": 1}, {"text": "bb"}])]
    folder = text_shards([*sources, tmp_path / "c.json", tmp_path / "d.parquet"])
    documents = ["a\nb", "é", "bb", "c", "", "d"]
    assert tokens_of(folder) == [i for text in documents for i in [*text.encode(), EOT]]


def test_folder_of_texts_is_a_document_for_each_file(tmp_path, text_shards):
    for name, text in (("b.txt", "b\nb"), ("a.txt", "a"), ("LICENSE.txt", "MIT"),
                       ("README.md", "about"), (".cache/c.txt", "c")):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(text)
    documents = [i for text in ("a", "b\nb") for i in [*text.encode(), EOT]]
    assert tokens_of(text_shards([tmp_path / "d"])) == documents
    assert tokens_of(text_shards([tmp_path / "d/[ab].*"], name="pattern")) == documents


def test_text_read_twice_has_no_validation_split_that_is_trained_on(tmp_path, command):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    flags = ["--encoding", "bytes", "--workers", 1, "--out", tmp_path / "text"]
    for sources in ([f"{tmp_path}/a.txt*2"], [tmp_path / "a.txt"] * 2):
        result = command(fineweb, "--source", *sources, *flags)
        assert result.code == 2 and "is read 2 times" in result.err
        assert "use --val_tokens 0" in result.err
    assert command(fineweb, "--source", *sources, *flags, "--val_tokens", 0).code == 0
    assert len(tokens_of(tmp_path / "text")) == 202


def test_fineweb_edu_is_its_10_billion_token_sample_unless_a_subset_is_named(monkeypatch):
    def load_dataset(name, subset, **options):
        return [{"text": f"{name} {subset}"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    name = "HuggingFaceFW/fineweb-edu"
    for flags, expected in [({}, f"{name} sample-10BT"),
                            ({"subset": "CC-MAIN-2024-10"}, f"{name} CC-MAIN-2024-10"),
                            ({"source": ("me/mine",)}, "me/mine None")]:
        texts = fineweb.read_texts(fineweb.Config(out="out", **flags))
        assert list(texts) == [(expected, True)]


@pytest.mark.parametrize("encoding", ["gpt2", "bytes"])
def test_decoding_the_shards_restores_the_documents(jsonl, text_shards, encoding, gpt2):
    documents = ["The cat in the hat\n\n", "naïve 😀 <|endoftext|> typed", "a the b"]
    source = jsonl("a.jsonl", [{"text": text} for text in documents])
    folder = text_shards([source], "--encoding", encoding, "--shard_tokens", 7)
    ids, encoding = np.array(tokens_of(folder)), get_encoding(encoding)
    ends = np.flatnonzero(ids == encoding.eot_token)
    assert len(ends) == 3 and ends[-1] == len(ids) - 1
    found = [encoding.decode(part.tolist()) for part in np.split(ids, ends + 1)[:-1]]
    assert found == [text + "<|endoftext|>" for text in documents]


# ----- shards and meta.json ----------------------------------------------------------------------


def test_bytes_of_the_shards_do_not_depend_on_the_number_of_workers(jsonl, text_shards,
                                                                    monkeypatch):
    monkeypatch.setattr(fineweb, "CHUNK_CHARS", 10)  # many chunks in flight
    source = jsonl("a.jsonl", [{"text": f"document {i}" * (i % 3)} for i in range(40)])
    flags = ("--shard_tokens", 50, "--val_tokens", 20)
    one = text_shards([source], *flags, "--workers", 1, name="one")
    two = text_shards([source], *flags, "--workers", 2, name="two")
    files = sorted(path.name for path in one.iterdir())
    assert len(files) > 5
    assert files == sorted(path.name for path in two.iterdir())
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


def test_meta_json_describes_the_folder(jsonl, text_shards):
    source = jsonl("a.jsonl", [{"text": "a" * 19}, {"text": "b" * 19}])
    folder = text_shards([source], "--shard_tokens", 30, "--val_tokens", 3)

    def shard(name, tokens):
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        return {"file": name, "tokens": tokens, "sha256": digest}

    assert json.loads((folder / "meta.json").read_text()) == {
        "version": 1, "kind": "text", "encoding": "bytes", "vocab_size": 261, "source": [source],
        "splits": {
            "train": {"tokens": 37, "shards": 2,
                      "files": [shard("train_000000.npy", 30), shard("train_000001.npy", 7)]},
            "val": {"tokens": 4, "shards": 1, "files": [shard("val_000000.npy", 4)]},
        },
    }
    names = ["SHA256SUMS", "meta.json", "train_000000.npy", "train_000001.npy", "val_000000.npy"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_failure_halfway_leaves_nothing_behind(jsonl, tmp_path, command, monkeypatch):
    """Shards of one token are on disk already when the third row turns out to be bad."""
    monkeypatch.setattr(fineweb, "CHUNK_CHARS", 1)
    source = jsonl("a.jsonl", [{"text": "a"}, {"text": "b"}, {"texte": "c"}])
    for workers in (1, 2):
        result = command(fineweb, "--source", source, "--encoding", "bytes", "--shard_tokens", 1,
                         "--val_tokens", 0, "--workers", workers, "--out", tmp_path / "out")
        assert result.code == 2
        assert result.err == f"error: {source} line 3: no `text` string (found: ['texte'])\n"
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# ----- the validation split and --max_tokens -----------------------------------------------------


def test_validation_is_the_first_tokens_and_ends_like_a_document(jsonl, text_shards):
    source = jsonl("a.jsonl", [{"text": "0123456789" * 5}])  # 51 tokens with <|endoftext|>
    folder = text_shards([source], "--val_tokens", 4)
    assert tokens_of(folder, "val") == [*b"0123", EOT]
    assert tokens_of(folder) == [*b"456789", *b"0123456789" * 4, EOT]


def test_validation_is_at_most_a_tenth(jsonl, text_shards):
    folder = text_shards([jsonl("a.jsonl", [{"text": "a" * 49}])], "--val_tokens", 1000)
    assert tokens_of(folder, "val") == [97] * 5 + [EOT]  # a tenth of 50, and the end
    assert len(tokens_of(folder)) == 45


def test_document_that_ends_with_the_validation_split_gets_no_second_end():
    pieces = iter([np.array([1, EOT], np.uint16), np.full(38, 2, np.uint16)])
    val, rest = split_off(pieces, 2, EOT)
    assert val.tolist() == [1, EOT]
    assert np.concatenate(list(rest)).tolist() == [2] * 38


def test_val_tokens_0_makes_no_validation_split(jsonl, text_shards):
    folder = text_shards([jsonl("a.jsonl", [{"text": "a" * 99}])])
    assert list(json.loads((folder / "meta.json").read_text())["splits"]) == ["train"]
    assert not list(folder.glob("val_*"))


def test_max_tokens_limits_both_splits_together(jsonl, text_shards):
    """Otherwise validation, a tenth of all that was read, could exceed the training data."""
    source = jsonl("a.jsonl", [{"text": "0123456789" * 10}])
    folder = text_shards([source], "--max_tokens", 20, "--val_tokens", 1000)
    assert tokens_of(folder, "val") == [*b"01", EOT]
    assert tokens_of(folder) == [*b"23456789", *b"0123456789"]


@given(st.lists(st.integers(0, 4), max_size=6), st.integers(1, 12))
def test_first_tokens_stops_at_the_limit(sizes, limit):
    ids = np.arange(sum(sizes), dtype=np.uint16)
    pieces = iter(np.split(ids, np.cumsum(sizes)))
    assert [i for piece in first_tokens(pieces, limit) for i in piece] == list(ids[:limit])


# ----- the next command --------------------------------------------------------------------------


def test_next_command_trains_on_the_folder_although_its_name_has_a_space(jsonl, command, tmp_path,
                                                                        monkeypatch):
    """As printed, but on the CPU and small."""
    monkeypatch.chdir(tmp_path)
    source = jsonl("a.jsonl", [{"text": "0123456789" * 10}])
    printed = command(fineweb, "--source", source, "--encoding", "bytes", "--val_tokens", 0,
                      "--workers", 1, "--out", "my text").out
    _, _, *words = shlex.split(printed.splitlines()[-1])
    assert words[:3] == ["--standalone", "--nproc_per_node=1", train_gpt2.__file__]
    tiny = ["--n_layer", 1, "--n_head", 1, "--n_embd", 8, "--block_size", 8, "--batch_size", 2,
            "--rows_per_step", 2, "--max_steps", 1, "--device", "cpu"]
    assert command(train_gpt2, *words[3:], *tiny).code == 0
    assert (tmp_path / "out/base/step_000001").is_dir()
