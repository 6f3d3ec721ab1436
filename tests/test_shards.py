"""The shard format: how tokens are divided into files, read back as one array, and verified."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from nanosft import shards as shards_module
from nanosft.errors import UserError
from nanosft.shards import (
    Shards,
    ShardWriter,
    find_examples,
    new_folder,
    read_meta,
    sha256_of,
    write_meta,
    write_sums,
)

EOT = 256


def write_shards(folder: Path, kind: str, shard_tokens: int, pieces: list[np.ndarray]) -> str:
    """A data folder whose training split is these pieces: (n,) for text, (2, n) for sft."""
    writer = ShardWriter(folder, "train", shard_tokens)
    for piece in pieces:
        writer.add(piece.astype(np.uint16))
    write_meta(folder, {"kind": kind, "encoding": "bytes", "vocab_size": 261,
                        "splits": {"train": writer.finish()}})
    return str(folder)


def arrays_in(folder: Path) -> list[np.ndarray]:
    return [np.load(path) for path in sorted(folder.glob("train_*.npy"))]


@pytest.fixture
def digits(tmp_path) -> str:
    """The text 0 1 2 | 3 4 5 | 6 7 in shards of three tokens."""
    return write_shards(tmp_path, "text", 3, [np.arange(8)])


# ----- writing -----------------------------------------------------------------------------------


def test_text_shards_are_full_and_a_document_may_continue_in_the_next(tmp_path):
    documents = [np.array([1, 2]), np.array([3, 4, 5, 6, 7, 8]), np.array([0])]
    write_shards(tmp_path, "text", 3, documents)
    shards = arrays_in(tmp_path)
    assert [shard.tolist() for shard in shards] == [[1, 2, 3], [4, 5, 6], [7, 8, 0]]
    assert {shard.dtype for shard in shards} == {np.dtype("uint16")}


def test_sft_shards_never_cut_an_example_and_grow_for_a_giant(tmp_path):
    write_shards(tmp_path, "sft", 5, [np.full((2, n), n) for n in (3, 2, 3, 9, 1)])
    shards = arrays_in(tmp_path)
    assert [shard[0].tolist() for shard in shards] == [[3, 3, 3, 2, 2], [3, 3, 3], [9] * 9, [1]]


# ----- the folder --------------------------------------------------------------------------------


def test_new_folder_appears_only_when_it_is_complete(tmp_path):
    (tmp_path / "out").mkdir()  # it may exist, but be empty
    with new_folder(str(tmp_path / "out")) as folder:
        (folder / "train_000000.npy").write_bytes(b"whole")
        assert not list((tmp_path / "out").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train_000000.npy"]


def test_interrupt_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(str(tmp_path / "out")) as folder:
        (folder / "train_000000.npy").write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


# ----- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, version, reads", [
    ("text", 1, True), ("text", 2, False), ("text", None, False),
    ("sft", 1, True), ("sft", 2, True), ("sft", 3, False), ("sft", [2], False)])
def test_versions_that_are_read(kind, version, reads, tmp_path):
    """Chat folders have version 2; those of version 1 know no weight of 65535."""
    folder = write_shards(tmp_path, kind, 9, [np.ones((2, 3) if kind == "sft" else 3)])
    assert read_meta(folder, kind)["version"] == (2 if kind == "sft" else 1)
    meta = json.loads((tmp_path / "meta.json").read_text()) | {"version": version}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    write_sums(tmp_path, [tmp_path / "meta.json"])
    if reads:
        assert read_meta(folder, kind)["version"] == version
    else:
        with pytest.raises(UserError, match=r"meta\.json: format version .*, expected [12]; make"):
            read_meta(folder, kind)


@pytest.mark.parametrize("kind, shape", [("text", (8,)), ("sft", (2, 8))])
def test_shards_read_as_one_array_across_their_borders(tmp_path, kind, shape):
    whole = np.arange(np.prod(shape)).reshape(shape)
    pieces = np.split(whole, [2, 4, 5], axis=-1)
    shards = Shards(write_shards(tmp_path, kind, 3, pieces), "train", kind)
    assert (len(shards.files), len(shards)) == (3, 8)
    for start, stop in itertools.combinations(range(9), 2):
        assert shards[start:stop].tolist() == whole[..., start:stop].tolist()
        assert shards[start:stop].dtype == np.uint16


@pytest.mark.parametrize("start, stop", [(0, 9), (8, 9), (9, 9), (-1, 3), (5, 4)])
def test_span_outside_the_split_is_an_index_error(digits, start, stop):
    with pytest.raises(IndexError, match=f"tokens {start} to {stop} of 8"):
        Shards(digits, "train", "text")[start:stop]


def test_what_is_read_is_a_copy(digits):
    shards, path = Shards(digits, "train", "text"), Path(digits, "train_000000.npy")
    before = path.read_bytes()
    for start, stop in ((0, 2), (1, 5)):  # within a shard, and across a border
        shards[start:stop][:] = 99
    assert not any(array.flags.writeable for array in shards.arrays)
    assert shards[0:8].tolist() == list(range(8))
    assert path.read_bytes() == before


def test_sha256_of_a_shard_is_verified_once_when_it_is_first_read(digits, monkeypatch):
    verified = []
    monkeypatch.setattr(shards_module, "sha256_of",
                        lambda path: verified.append(path.name) or sha256_of(path))
    monkeypatch.setattr(shards_module, "verify", lambda path: path)  # of meta.json
    shards = Shards(digits, "train", "text")
    assert verified == []  # opening reads no tokens
    assert shards[4:6].tolist() == [4, 5]
    assert verified == ["train_000001.npy"]
    assert shards[2:8].tolist() == [2, 3, 4, 5, 6, 7]
    assert verified == ["train_000001.npy", "train_000000.npy", "train_000002.npy"]
    assert shards[0:8].tolist() == list(range(8))
    assert len(verified) == 3


def test_damaged_shard_is_refused_every_time_and_the_others_can_be_read(digits):
    path = Path(digits, "train_000001.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # length and dtype still fit: only the sha256 can tell
    path.write_bytes(content)
    shards = Shards(digits, "train", "text")
    assert (shards[0:3].tolist(), shards[6:8].tolist()) == ([0, 1, 2], [6, 7])
    for _ in range(2):
        with pytest.raises(UserError, match=r"train_000001\.npy: sha256 .* meta\.json says"):
            shards[2:4]


def test_examples_end_at_endoftext(tmp_path):
    """Examples of 3, 1 and 2 ids; the weights row may hold any number, 256 too."""
    ids, weights = [7, 8, EOT, EOT, 9, EOT], [EOT] * 6
    shards = Shards(write_shards(tmp_path, "sft", 100, [np.array([ids, weights])]), "train", "sft")
    starts, lengths = find_examples(shards, EOT)
    assert (starts.tolist(), lengths.tolist()) == ([0, 3, 4], [3, 1, 2])


def test_examples_are_found_where_the_search_moves_to_its_next_part(tmp_path):
    """The search reads 2**22 tokens at a time: here one example ends there and one crosses it."""
    for name, ends in (("ends", [5, 2**22 - 1, 2**22 + 3]), ("crosses", [5, 2**22 + 3])):
        tokens = np.zeros((2, ends[-1] + 1), np.uint16)
        tokens[0, ends] = EOT
        (tmp_path / name).mkdir()
        folder = write_shards(tmp_path / name, "sft", tokens.size, [tokens])
        starts, lengths = find_examples(Shards(folder, "train", "sft"), EOT)
        assert starts.tolist() == [0] + [end + 1 for end in ends[:-1]]
        assert (starts + lengths - 1).tolist() == ends
