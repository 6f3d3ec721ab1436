"""Text to shards: which tokens, in which order, in which files."""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, strategies as st

import fineweb
from fineweb import ShardWriter, chunked, first_tokens, ordered_map, read_rows, split_off

EOT = 256  # in the bytes encoding


def shards_of(folder, split: str) -> list[np.ndarray]:
    return [np.load(path) for path in sorted(Path(folder).glob(f"{split}_*.npy"))]


def tokens_of(folder, split: str = "train") -> list[int]:
    return np.concatenate(shards_of(folder, split)).tolist()


@pytest.fixture
def text_shards(tmp_path, command):
    """text_shards(sources, "--flag", …) runs fineweb.py on bytes and gives the folder."""

    def prepare(sources: list, *flags, name: str = "text") -> Path:
        result = command(
            fineweb, "--source", *sources, "--encoding", "bytes", "--val_tokens", 0,
            "--workers", 1, "--out", tmp_path / name, *flags,
        )  # fmt: skip
        assert result.code == 0, result.err
        return tmp_path / name

    return prepare


# ----- sources -----------------------------------------------------------------------------------


def test_each_document_of_every_kind_of_file_ends_with_endoftext(tmp_path, jsonl, text_shards):
    (tmp_path / "a.txt").write_text("a\nb")  # one document, whatever lines it has
    (tmp_path / "c.json").write_text('[{"text": "c"}, {"text": ""}]')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["d"], "id": [7]}), tmp_path / "d.parquet")
    sources = [tmp_path / "a.txt", jsonl("b.jsonl", [{"text": "é", "id": 1}, {"text": "bb"}])]
    folder = text_shards([*sources, tmp_path / "c.json", tmp_path / "d.parquet"])
    documents = ["a\nb", "é", "bb", "c", "", "d"]
    expected = [id_ for text in documents for id_ in [*text.encode(), EOT]]
    assert tokens_of(folder) == expected


def test_jsonl_may_have_a_byte_order_mark_windows_lines_and_blank_lines(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')  # no newline at the end
    assert list(read_rows(str(path))) == [
        (f"{path} line 1", {"text": "a"}),
        (f"{path} line 4", {"text": "b"}),
    ]


def test_a_name_that_is_no_file_is_a_dataset_of_the_hub(monkeypatch):
    """FineWeb-Edu comes as its 10-billion-token sample unless --subset names another."""
    asked = []

    def load_dataset(name, subset, **options):
        asked.append((name, subset, options))
        return [{"text": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    name = "HuggingFaceFW/fineweb-edu"
    assert list(read_rows(name)) == [(f"{name} row 1", {"text": "a"})]
    list(read_rows(name, "CC-MAIN-2024-10"))
    list(read_rows("me/mine"))
    options = {"split": "train", "streaming": True}
    assert asked == [
        (name, "sample-10BT", options),
        (name, "CC-MAIN-2024-10", options),
        ("me/mine", None, options),
    ]


# ----- a long .txt is read in pieces -------------------------------------------------------------

# What could go wrong where a piece ends: blank lines, spaces around them, contractions, other
# alphabets, and characters that only some programs call white space.
TRICKY = [*"ab1'.! \n\t", "the", "in", " a", "'s", "é", "你", "\x1c", "\u2028"]
PIECES = st.lists(st.sampled_from(TRICKY))


@given(PIECES.map("".join), st.integers(1, 5))
@example("one\ntwo\n\n three\n", 4)
@example("no line break at all", 3)
def test_the_pieces_of_a_txt_have_the_tokens_of_the_whole(
    gpt2, tmp_path_factory, text, chunk_chars
):
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fineweb, "CHUNK_CHARS", chunk_chars)
        pieces = list(fineweb._read_txt(path))
    assert "".join(piece for piece, _ in pieces) == text
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    in_pieces = [id_ for piece, _ in pieces for id_ in gpt2.encode_ordinary(piece)]
    assert in_pieces == gpt2.encode_ordinary(text)


def test_a_txt_is_cut_after_line_breaks_between_visible_characters(tmp_path, monkeypatch):
    """GPT-2 reads "\\n\\n" as one token, so a blank line is no place to cut."""
    monkeypatch.setattr(fineweb, "CHUNK_CHARS", 3)
    (tmp_path / "a.txt").write_text("ab\ncd\n\nef\ngh")
    pieces = [piece for piece, _ in fineweb._read_txt(tmp_path / "a.txt")]
    assert pieces == ["ab\n", "cd\n\nef\n", "gh"]


# ----- shards ------------------------------------------------------------------------------------


def test_text_shards_are_full_to_the_token_and_a_document_goes_on_in_the_next(jsonl, text_shards):
    folder = text_shards(
        [jsonl("a.jsonl", [{"text": "abcde"}, {"text": "f"}])], "--shard_tokens", 3
    )
    shards = shards_of(folder, "train")
    assert [shard.tolist() for shard in shards] == [[97, 98, 99], [100, 101, EOT], [102, EOT]]
    assert {shard.dtype for shard in shards} == {np.dtype("uint16")}


def test_sft_shards_never_cut_an_example_and_grow_for_a_giant(tmp_path):
    def example_of(n):
        return np.full((2, n), n, dtype=np.uint16)

    writer = ShardWriter(tmp_path, "train", shard_tokens=5)
    for n in (3, 2, 3, 9, 1):
        writer.add(example_of(n))
    entry = writer.finish(examples=5)
    assert [shard[0].tolist() for shard in shards_of(tmp_path, "train")] == [
        [3, 3, 3, 2, 2], [3, 3, 3], [9] * 9, [1]
    ]  # fmt: skip
    assert (entry["examples"], entry["tokens"], entry["shards"]) == (5, 18, 4)


def test_the_shards_do_not_depend_on_the_number_of_workers(jsonl, text_shards, monkeypatch):
    monkeypatch.setattr(fineweb, "CHUNK_CHARS", 10)  # many chunks in flight
    source = jsonl("a.jsonl", [{"text": f"document {i}" * (i % 3)} for i in range(40)])
    flags = ("--shard_tokens", 50, "--val_tokens", 20)
    one = text_shards([source], *flags, "--workers", 1, name="one")
    two = text_shards([source], *flags, "--workers", 2, name="two")
    files = sorted(path.name for path in one.iterdir())
    assert len(files) > 5
    assert files == sorted(path.name for path in two.iterdir())
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


def test_results_come_in_order_from_any_number_of_workers():
    chunks = chunked([3, 1, 1, 1, 4, 2], lambda size: size, 3)
    assert list(ordered_map(sum, chunks, 2)) == [3, 3, 4, 2]  # [3] [1, 1, 1] [4] [2]


def test_meta_says_what_is_in_the_folder(jsonl, text_shards):
    source = jsonl("a.jsonl", [{"text": "a" * 19}, {"text": "b" * 19}])
    folder = text_shards([source], "--shard_tokens", 30, "--val_tokens", 3)
    meta = json.loads((folder / "meta.json").read_text())

    def shard(name, tokens):
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        return {"file": name, "tokens": tokens, "sha256": digest}

    assert meta == {
        "version": 1, "kind": "text", "encoding": "bytes", "vocab_size": 261, "source": [source],
        "splits": {
            "train": {"tokens": 37, "shards": 2,
                      "files": [shard("train_000000.npy", 30), shard("train_000001.npy", 7)]},
            "val": {"tokens": 4, "shards": 1, "files": [shard("val_000000.npy", 4)]},
        },
    }  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == [
        "meta.json", "train_000000.npy", "train_000001.npy", "val_000000.npy"
    ]  # fmt: skip


# ----- the validation split ----------------------------------------------------------------------


def test_validation_is_the_first_tokens_and_ends_like_a_document(jsonl, text_shards):
    source = jsonl("a.jsonl", [{"text": "0123456789" * 5}])  # 51 tokens with <|endoftext|>
    folder = text_shards([source], "--val_tokens", 4)
    assert tokens_of(folder, "val") == [*b"0123", EOT]
    assert tokens_of(folder) == [*b"456789", *b"0123456789" * 4, EOT]


def test_validation_is_at_most_a_tenth(jsonl, text_shards):
    folder = text_shards([jsonl("a.jsonl", [{"text": "a" * 49}])], "--val_tokens", 1000)
    assert tokens_of(folder, "val") == [97] * 5 + [EOT]  # a tenth of 50, and the end
    assert len(tokens_of(folder)) == 45


def test_a_document_that_ends_with_the_validation_split_gets_no_second_end():
    pieces = iter([np.array([1, EOT], np.uint16), np.full(38, 2, np.uint16)])
    val, rest = split_off(pieces, 2, EOT)
    assert val.tolist() == [1, EOT]
    assert np.concatenate(list(rest)).tolist() == [2] * 38


def test_without_validation_tokens_there_is_no_such_split(jsonl, text_shards):
    folder = text_shards([jsonl("a.jsonl", [{"text": "a" * 99}])])
    assert list(json.loads((folder / "meta.json").read_text())["splits"]) == ["train"]
    assert not list(folder.glob("val_*"))


def test_max_tokens_bounds_both_splits_together(jsonl, text_shards):
    """Else validation, a tenth of what was read, could be as large as the training data."""
    source = jsonl("a.jsonl", [{"text": "0123456789" * 10}])
    folder = text_shards([source], "--max_tokens", 20, "--val_tokens", 1000)
    assert tokens_of(folder, "val") == [*b"01", EOT]
    assert tokens_of(folder) == [*b"23456789", *b"0123456789"]


@given(st.lists(st.integers(0, 4), max_size=6), st.integers(1, 12))
def test_first_tokens_are_as_many_as_asked_for(sizes, limit):
    ids = np.arange(sum(sizes), dtype=np.uint16)
    pieces = iter(np.split(ids, np.cumsum(sizes)))
    assert [i for piece in first_tokens(pieces, limit) for i in piece] == list(ids[:limit])


# ----- round trip --------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["gpt2", "bytes"])
def test_decoding_the_shards_gives_back_the_documents(jsonl, text_shards, encoding, gpt2):
    documents = ["The cat in the hat\n\n", "naïve 😀 <|endoftext|> typed", "a the b"]
    folder = text_shards(
        [jsonl("a.jsonl", [{"text": text} for text in documents])],
        "--encoding", encoding, "--shard_tokens", 7,
    )  # fmt: skip
    enc = fineweb.get_encoding(encoding)
    ids, found = tokens_of(folder), []
    while ids:
        end = ids.index(enc.eot_token)
        found.append(enc.decode(ids[:end]))
        ids = ids[end + 1 :]
    assert found == documents


# ----- failures ----------------------------------------------------------------------------------


def test_a_failure_halfway_leaves_nothing_behind(jsonl, tmp_path, command):
    """Shards of one token were on the disk already when the third row turned out to be bad."""
    source = jsonl("a.jsonl", [{"text": "a"}, {"text": "b"}, {"texte": "c"}])
    for workers in (1, 2):
        flags = ["--encoding", "bytes", "--shard_tokens", 1, "--val_tokens", 0]
        flags += ["--workers", workers, "--out", tmp_path / "out"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fineweb, "CHUNK_CHARS", 1)
            result = command(fineweb, "--source", source, *flags)
        assert result.code == 2
        reason = "no `text` that is a string (found: ['texte'])"
        assert result.err == f"error: {source} line 3: {reason}\n"
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_interrupt_leaves_nothing_behind_either(tmp_path):
    with pytest.raises(KeyboardInterrupt), fineweb.NewFolder(str(tmp_path / "out")) as folder:
        (folder / "train_000000.npy").write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_the_folder_appears_at_the_end_and_only_then(tmp_path):
    (tmp_path / "out").mkdir()  # an empty one may be there
    with fineweb.NewFolder(str(tmp_path / "out")) as folder:
        (folder / "train_000000.npy").write_bytes(b"whole")
        assert not list((tmp_path / "out").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train_000000.npy"]
