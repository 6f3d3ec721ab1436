"""A damaged file is refused in one line before it is used; torture_damage.py runs many more."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from helpers_training import (
    fine_tune,
    flip_a_bit,
    pretrain,
    random_examples,
    save_tiny_model,
    sft_folder,
    text_folder,
    weights_of,
)

from answer import load_assistant
from nanosft.errors import UserError
from nanosft.shards import Shards, read_meta, write_sums
from nanosft.weights import find_model
from tests.torture_damage import torture
from train_gpt2 import load_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint of one step."""
    folder = tmp_path_factory.mktemp("run")
    data = sft_folder(folder / "data", train=random_examples(4))
    fine_tune(data, folder / "out", max_steps=1)
    return folder / "out/step_000001"


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "step_000001")


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("sums", [True, False])
def test_no_damaged_file_is_silently_another_one_or_ends_in_a_traceback(sums):
    counts, bad = torture(50, seed=1, sums=sums)
    assert not bad
    assert sum(n for (_, outcome), n in counts.items() if outcome == "refused") > 25


def test_sums_are_those_of_sha256sum(run):
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=run).returncode == 0
    listed = {line.split("  ")[1] for line in (run / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in run.iterdir()} - {"SHA256SUMS"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_bit_flipped_in_a_file_that_is_read_is_named(name, copy):
    edit(copy / name, template="raw") if name == "config.json" else flip_a_bit(copy / name)
    with pytest.raises(UserError, match=f"{name}: damaged or changed, its sha256 is not in SHA256"):
        load_assistant(str(copy))


def test_bit_flipped_in_the_training_state_stops_only_resume(copy):
    flip_a_bit(copy / "training_state.pt")
    with pytest.raises(UserError, match=r"training_state\.pt: missing or damaged \(damaged or"):
        load_checkpoint(str(copy.parent))
    load_assistant(str(copy))


def test_files_that_a_user_adds_or_edits_do_not_make_a_checkpoint_unloadable(copy, run):
    (copy / "README.md").write_text("mine")
    (copy / "notes.txt").write_text("mine")
    (copy / "adapter.safetensors").write_text("not mine")
    load_checkpoint(str(copy.parent))
    assert all(a.equal(b) for a, b in zip(weights_of(copy), weights_of(run), strict=True))


def test_folder_without_sums_loads_as_before(copy, run):
    (copy / "SHA256SUMS").unlink()
    flip_a_bit(copy / "model.safetensors")  # of a weight: nothing can tell
    assert find_model(str(copy)) == copy
    load_assistant(str(copy))


@pytest.mark.parametrize("changes, message", [
    ({"n_layer": 10**12}, "n_layer is 1000000000000, not a size"),
    ({"n_layer": 10**9}, "a model with --n_layer 1000000000, --n_embd 32, --block_size 32: needs"),
    ({"n_head": 0}, "n_head is 0, not a size"),
    ({"n_embd": "32"}, "n_embd is '32', not a size"),
    ({"n_embd": None}, "n_embd is None, not a size"),
    ({"n_positions": True}, "block_size is True, not a size"),
    ({"vocab_size": 2.5}, "vocab_size is 2.5, not a size"),
    ({"n_vocab": 262}, "n_vocab 262 is above its vocab_size"),
    ({"template": ["chat"]}, "unknown encoding 'bytes' or template"),
])
def test_config_json_that_cannot_be_is_refused_by_key(changes, message, tmp_path):
    folder = save_tiny_model(tmp_path / "model")  # as another program's: no SHA256SUMS
    edit(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_assistant(str(folder))


def shard(**changes) -> dict:
    files = [{"file": "train_000000.npy", "tokens": 9, "sha256": "", **changes}]
    return {"splits": {"train": {"tokens": 9, "files": files}}}


@pytest.mark.parametrize("changes, key", [
    ({"kind": "pictures"}, "kind"),
    ({"kind": ["text"]}, "kind"),
    ({"encoding": ["gpt2"]}, "encoding"),
    ({"vocab_size": "261"}, "vocab_size is '261'"),
    ({"vocab_size": True}, "vocab_size is 'True'"),
    ({"vocab_size": 0}, "vocab_size is '0'"),
    ({"vocab_size": 2**16 + 1}, "vocab_size is '65537'"),
    ({"splits": {}}, "splits"),
    ({"splits": []}, "splits"),
    ({"splits": {"train": None}}, "splits"),
    (shard(tokens=8), "splits"),
    (shard(tokens="9"), "splits"),
    (shard(tokens=True), "splits"),
    (shard(file="../train_000000.npy"), "splits"),
    (shard(file="train_000001.npy"), "splits"),
    (shard(file=7), "splits"),
    (shard(sha256=None), "splits"),
])
def test_meta_json_that_cannot_be_is_refused_by_key(changes, key, tmp_path):
    folder = text_folder(tmp_path / "data", train=range(9))
    read_meta(folder, "text")
    (tmp_path / "data/SHA256SUMS").unlink()
    edit(tmp_path / "data/meta.json", **changes)
    with pytest.raises(UserError, match=rf"meta\.json: damaged \({key}.*make the data again"):
        read_meta(folder, "text")


def test_meta_json_changed_within_its_ranges_is_refused_by_its_sum(tmp_path):
    folder = text_folder(tmp_path / "data", train=range(9))
    edit(tmp_path / "data/meta.json", source=["another corpus"])
    with pytest.raises(UserError, match=r"meta\.json: damaged or changed, its sha256 is not in"):
        read_meta(folder, "text")


@pytest.mark.parametrize("changes, message", [
    ({"vocab_size": 260}, r"damaged \(vocab_size is 260, but bytes has 261 ids\); make the data"),
    ({"vocab_size": 50261}, r"damaged \(vocab_size is 50261, but bytes has 261 ids\)"),
    ({"encoding": "llama"}, "unknown encoding 'llama'"),
])
def test_vocabulary_that_is_not_the_encodings_stops_a_run(changes, message, tmp_path):
    folder = text_folder(tmp_path / "data", train=range(99))
    (tmp_path / "data/SHA256SUMS").unlink()
    edit(tmp_path / "data/meta.json", **changes)
    with pytest.raises(UserError, match=message):
        pretrain(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_listed_shards_swapped_under_matching_sums_are_noticed(tmp_path):
    """In meta.json and in its sum: each file is intact, but the text would change its order."""
    folder = text_folder(tmp_path / "data", shard_tokens=5, train=range(10))
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    meta["splits"]["train"]["files"].reverse()
    edit(tmp_path / "data/meta.json", **meta)
    write_sums(tmp_path / "data", [tmp_path / "data/meta.json"])
    with pytest.raises(UserError, match=r"damaged \(splits"):
        read_meta(folder, "text")


@pytest.mark.parametrize("at", range(0, 128, 2))
def test_every_damaged_shard_header_is_refused(at, tmp_path):
    """One byte of the header replaced by each of four others; the padding is covered by the sum."""
    folder = text_folder(tmp_path / "data", train=range(9))
    path = tmp_path / "data/train_000000.npy"
    whole = path.read_bytes()
    for byte in (0, 0xFF, ord("("), whole[at] ^ 1):
        path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
        if path.read_bytes() != whole:
            with pytest.raises(UserError, match=r"train_000000\.npy: .*make the data again"):
                Shards(folder, "train", "text")[0:9]
    path.write_bytes(whole)
    assert np.array_equal(Shards(folder, "train", "text")[0:9], range(9))
