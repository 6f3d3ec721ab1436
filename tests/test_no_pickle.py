"""No pickle is ever loaded: a file that would run code when unpickled, everywhere we read files.

Where a folder has checksums, they are made to match, so they are not what refuses the file.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers_training import (
    fine_tune,
    random_examples,
    save_tiny_model,
    sft_folder,
    text_folder,
)

import chat
import evaluate
import fineweb
import sft_data
import tokenizer
import train_gpt2
import train_sft
from nanosft.shards import write_sums

GOOD = {"prompt": "Q", "response": "A"}
STEPS = ["--device", "cpu", "--init", "scratch", "--n_layer", 1, "--n_head", 2, "--n_embd", 16,
         "--block_size", 16, "--batch_size", 2, "--rows_per_step", 4]


class Bomb:
    """Unpickling one makes the folder `exploded` in the current directory."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def saved(write, *args, **flags) -> bytes:
    file = io.BytesIO()
    write(file, *args, **flags)
    return file.getvalue()


OBJECTS = np.array([Bomb()], dtype=object)
STATE = {"version": 2, "step": 1, "optimizer": Bomb(), "run": {}}
BOMBS = {
    "pickle": pickle.dumps(STATE, protocol=2),
    "torch": saved(lambda file: torch.save(STATE, file)),
    "old torch": saved(lambda file: torch.save(STATE, file, _use_new_zipfile_serialization=False)),
    "npy": saved(np.save, OBJECTS, allow_pickle=True),
    "npz": saved(np.savez, allow_pickle=True, ids=OBJECTS),
}
LOADERS = {
    "pickle": pickle.load, "npy": lambda file: np.load(file, allow_pickle=True),
    "npz": lambda file: np.load(file, allow_pickle=True)["ids"],
    "torch": lambda file: torch.load(file, weights_only=False),
    "old torch": lambda file: torch.load(file, weights_only=False),
}
each_bomb = pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)


@pytest.fixture(autouse=True)
def exploded(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "exploded"


@pytest.fixture
def safe(command, exploded):
    """safe(2, module, *flags): the one line of the error. safe(0, …): the command succeeds."""

    def call(code: int, module, *flags) -> str:
        result = command(module, *flags)
        assert not exploded.exists()
        assert result.code == code, result
        if code:
            assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
        return result.err

    return call


@pytest.mark.parametrize("name", BOMBS)
def test_every_bomb_explodes_where_pickles_are_loaded(name, exploded):
    LOADERS[name](io.BytesIO(BOMBS[name]))
    assert exploded.is_dir()


# ----- what we write ourselves -------------------------------------------------------------------


@each_bomb
@pytest.mark.parametrize("kind", ["text", "sft"])
def test_shard(kind, bomb, safe):
    if kind == "text":
        data = text_folder("data", train=range(99))
    else:
        data = sft_folder("data", train=random_examples(9))
    path, meta = Path(data, "train_000000.npy"), Path(data, "meta.json")
    was = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(bomb)
    meta.write_text(meta.read_text().replace(was, hashlib.sha256(bomb).hexdigest()))
    write_sums(Path(data), [meta])
    module = train_gpt2 if kind == "text" else train_sft
    line = safe(2, module, "--data", data, "--out", "out", *STEPS)
    assert line.startswith(f"error: {path}: missing, truncated, or not an .npy file")
    if kind == "sft":
        assert f"{path}: " in safe(2, sft_data, "--show", 1, "--data", data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two steps that was killed after the first one, and its data."""
    folder = tmp_path_factory.mktemp("trained")
    sft_folder(folder / "data", train=random_examples(9))
    fine_tune(folder / "data", folder / "out", max_steps=2, save_every=1)
    shutil.rmtree(folder / "out/step_000002")
    return folder


@pytest.fixture
def resume(trained, tmp_path) -> list:
    """The command that continues a copy of the run."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return [train_sft, "--data", "data", "--out", "out", "--resume", "--max_steps", 2, *STEPS,
            "--warmup_steps", 2, "--learning_rate", 1e-2]


@each_bomb
def test_file_of_a_checkpoint(bomb, resume, safe):
    folder = Path("out/step_000001")
    for name in ("training_state.pt", "model.safetensors", "config.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(bomb)
        write_sums(folder, [path for path in folder.iterdir() if path.name != "SHA256SUMS"])
        assert safe(2, *resume).startswith(f"error: {folder}/{name}: ")
        if name == "training_state.pt":  # only --resume reads it
            safe(0, chat, "--model", folder, "--prompt", "Q", "--max_new_tokens", 1)
        (folder / name).write_bytes(whole)


def test_logs_of_a_run(resume, safe):
    for name in ("metrics.jsonl", "answers.jsonl", "run.json", "lock", "wandb.pkl"):
        Path("out", name).write_bytes(BOMBS["pickle"] + b"\n")
    assert safe(2, *resume).startswith("error: out/metrics.jsonl line 1: ")
    Path("out/metrics.jsonl").unlink()
    safe(0, *resume)  # the others are written anew, or not read


# ----- models of others --------------------------------------------------------------------------


@each_bomb
def test_weights_in_a_foreign_folder(bomb, safe):
    folder = save_tiny_model("model")
    ask = [chat, "--model", folder, "--prompt", "Q", "--max_new_tokens", 1]
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt",
                 "rng_state.pth", "tokenizer.pkl", "generation_config.json"):
        (folder / name).write_bytes(bomb)
    safe(0, *ask)  # nothing of this is read
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                 "added_tokens.json", "special_tokens_map.json"):
        (folder / name).write_bytes(bomb)  # read as JSON or as text
        assert safe(2, *ask).startswith(f"error: {folder}/{name}: not the tokenizer of ")
        (folder / name).unlink()
    (folder / "more.safetensors").write_bytes(bomb)
    assert f"{folder}/more.safetensors: not a complete safetensors file" in safe(2, *ask)
    (folder / "more.safetensors").unlink()
    (folder / "model.safetensors").unlink()
    assert f"{folder}: no *.safetensors file; save the model as safetensors" in safe(2, *ask)


def test_code_in_a_foreign_folder(safe):
    folder = save_tiny_model("model")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"auto_map": {"AutoModelForCausalLM": "modeling.GPT"}, "trust_remote_code": True}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "modeling.py").write_text("import os; os.mkdir('exploded')")
    safe(0, chat, "--model", folder, "--prompt", "Q", "--max_new_tokens", 1)


def test_vocabulary(safe, tmp_path, monkeypatch):
    """tiktoken's files have known sums: it downloads them again, here without a network."""
    def no_network(url):
        raise ConnectionError

    for url in ("vocab.bpe", "encoder.json"):
        key = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{url}"
        (tmp_path / hashlib.sha1(key.encode()).hexdigest()).write_bytes(BOMBS["pickle"])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", no_network)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    tokenizer.get_encoding.cache_clear()
    line = safe(2, fineweb, "--source", "a.txt", "--encoding", "gpt2", "--out", "out")
    assert line.startswith("error: could not load the gpt2 vocabulary (ConnectionError)")


# ----- rows of others ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.txt", "a.pkl"])
def test_file_of_rows(name, safe):
    Path(name).write_bytes(BOMBS["pickle"])
    source = ["--source", name, "--encoding", "bytes", "--workers", 1, "--out", "out"]
    for module in (fineweb, sft_data):
        assert safe(2, module, *source).startswith(f"error: {name}")
    model = save_tiny_model("model")
    line = safe(2, evaluate, "--model", model, "--data", name, "--device", "cpu")
    assert line.startswith(f"error: {name}")


def tar_file(**files: bytes) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for extension, data in files.items():
            info = tarfile.TarInfo(f"0.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


TORCH = BOMBS["torch"]
FOLDERS = {  # what a folder, or a data set of the hub, may hold
    "script": {"set.py": b"import os; os.mkdir('exploded')"},
    "pickle": {"train.pkl": BOMBS["pickle"]},
    "tar of torch": {"train.tar": tar_file(pth=TORCH)},
    "tar of npy": {"train.tar": tar_file(npy=BOMBS["npy"])},
    "tar of npz": {"train.tar": tar_file(npz=BOMBS["npz"])},
    "tar of pickle": {"train.tar": tar_file(pyd=BOMBS["pickle"], pickle=BOMBS["pickle"])},
    "arrow": {"train.arrow": BOMBS["pickle"]},
}


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_folder_of_rows(files, safe):
    Path("set").mkdir()
    for name, content in files.items():
        Path("set", name).write_bytes(content)
    flags = ["--encoding", "bytes", "--workers", 1, "--val_fraction", 0, "--out", "out"]
    assert safe(2, sft_data, "--source", "set", *flags).startswith("error: set")


@pytest.mark.parametrize("source", ["a.parquet", "set"])
def test_pickled_type_of_a_parquet_column(source, safe):
    """Arrow once unpickled the types of Python extensions from the schema of a file."""
    pickled = {b"ARROW:extension:name": b"arrow.py_extension_type",
               b"ARROW:extension:metadata": BOMBS["pickle"]}
    fields = [pyarrow.field(name, pyarrow.string(), metadata=pickled) for name in GOOD]
    table = pyarrow.Table.from_pylist([GOOD], pyarrow.schema(fields))
    path = Path("set/train.parquet" if source == "set" else source)
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(table, path)
    safe(0, sft_data, "--source", source, "--encoding", "bytes", "--workers", 1, "--val_fraction",
         0, "--out", "out")


@pytest.mark.parametrize("name", ["pandas", "json"])
def test_reader_of_the_datasets_library_is_no_source(name, safe):
    """load_dataset("pandas") would read the current folder; older versions unpickle it."""
    Path("train.pkl").write_bytes(BOMBS["pickle"])
    Path("train.json").write_text(json.dumps([GOOD]))
    line = safe(2, sft_data, "--source", name, "--encoding", "bytes", "--workers", 1, "--out", "o")
    assert line.startswith(f"error: {name}: no such file; a dataset on the hub has an owner")
