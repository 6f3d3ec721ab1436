"""What a user can get wrong ends in one line that says what and where, exit code 2, and no files.

Almost all of these call the real command in this process: the same flags, the same messages.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fineweb
import sft_data
import train_gpt2
import train_sft
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
GOOD = {"prompt": "Q", "response": "A"}
TINY = ["--device", "cpu", "--init", "scratch", "--n_layer", 1, "--n_head", 1, "--n_embd", 8,
        "--block_size", 8, "--batch_size", 1, "--rows_per_step", 2, "--max_steps", 1]  # fmt: skip


def files_under(folder: Path) -> dict[str, bytes | None]:
    """Every path with its bytes; folders have None."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path, command, monkeypatch):
    """refused(module, *flags): the one line of the error. Nothing in the folder has changed."""
    monkeypatch.chdir(tmp_path)

    def call(module, *flags) -> str:
        before = files_under(tmp_path)
        result = command(module, *flags)
        assert result.code == 2, result
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
        assert files_under(tmp_path) == before
        return result.err.removeprefix("error: ").rstrip("\n")

    return call


def prepare_flags(*sources) -> list:
    return ["--source", *sources, "--encoding", "bytes", "--workers", 1, "--out", "out"]


@pytest.fixture
def data(sft_shards) -> Path:
    """A good folder for train_sft.py: 20 examples of 7 ids, one of them validation."""
    return Path(sft_shards([GOOD] * 20, "--val_fraction", 0.05, name="data"))


@pytest.fixture
def text_data(tmp_path, command) -> Path:
    """A good folder for train_gpt2.py: 20 tokens for validation, 201 for training."""
    (tmp_path / "a.txt").write_text("0123456789" * 22)
    out = tmp_path / "text_data"
    flags = [*prepare_flags(tmp_path / "a.txt"), "--val_tokens", 20, "--out", out]
    assert command(fineweb, *flags).code == 0
    return out


# ----- files that cannot be read -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", None, "a.jsonl: no such file"),
        ("a.parquet", None, "a.parquet: no such file"),
        ("./a.csv", None, "a.csv: no such file"),
        ("a.csv", b"Q,A", "a.csv: expected a .jsonl, .json or .parquet file"),
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.jsonl", b"\n \r\n", "the train split is left without rows (no rows)"),
        ("a.json", b"[]", "the train split is left without rows (no rows)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text":\n', "a.jsonl line 3: not JSON"),
        ("a.jsonl", b'{"prompt": "Q"} {"prompt": "Q"}', "a.jsonl line 1: not JSON (Extra data"),
        ("a.jsonl", '{"prompt": "é"}'.encode("latin-1"), "a.jsonl line 1: not JSON ('utf-8' codec"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl line 1: not JSON"),
        ("a.jsonl", b'{"id": ' + b"9" * 5000 + b"}", "a.jsonl line 1: not JSON"),
        ("a.json", b'{"prompt": "Q"}', "a.json: a list of rows belongs at the top, not a dict"),
        ("a.json", b"{}\n{}\n", "one object a line needs .jsonl"),
        ("a.json", b"[" * 100_000, "a.json: not JSON"),
        ("a.parquet", b"PAR0", "a.parquet: not a parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(refused, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in refused(sft_data, *prepare_flags(name), "--val_fraction", 0)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", None, "a.txt: no such file"),
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b"caf\xe9 au lait", "a.txt: not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}', "a.jsonl line 2: no `text` that is a string"),
        ("a.jsonl", b'{"txt": "a"}', "a.jsonl line 1: no `text` that is a string (found: ['txt'])"),
        ("a.jsonl", b'["a"]', "a.jsonl line 1: no `text` that is a string (found: list)"),
        ("a.json", b"[]", "a.json: no text in it"),
        ("a.bin", b"01", "a.bin: expected a .jsonl, .json or .parquet file"),
    ],
)
def test_a_text_that_cannot_be_read_is_named(refused, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in refused(fineweb, *prepare_flags(name))


def test_a_name_that_is_neither_file_nor_dataset_is_one_line(refused, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto the hub\nat all")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for module in (fineweb, sft_data):
        line = refused(module, *prepare_flags("me/typo"))
        assert line == "me/typo: neither a file here nor a dataset of the hub (no route)"


# ----- rows that cannot be trained ---------------------------------------------------------------


def chat(*turns) -> dict:
    """chat(("user", "Q"), ("assistant", "A", 0.5)) as a {messages} row."""
    keys = ("role", "content", "weight")
    return {"messages": [dict(zip(keys, turn)) for turn in turns]}


@pytest.mark.parametrize(
    "row, message",
    [
        ([GOOD], "a row is an object, not a list"),
        ("text", "a row is an object, not a str"),
        (None, "a row is an object, not a NoneType"),
        ({}, "unknown form, keys []"),
        ({"q": 1, "a": 2}, "unknown form, keys ['a', 'q']; known are {prompt, response}; "),
        ({"prompt": "Q"}, "unknown form, keys ['prompt']"),  # no response
        ({"text": 3}, "unknown form, keys ['text']"),
        ({"text": ""}, "`text` is empty"),
        ({"prompt": "Q", "response": ""}, "message 1: the response is empty"),
        ({"prompt": "Q", "response": None}, "`response` is None, not a string"),
        ({"prompt": ["Q"], "response": "A"}, "`prompt` is ['Q'], not a string"),
        ({"question": 7, "answer": "A"}, "`question` is 7, not a string"),
        ({"instruction": "Q", "input": 7, "output": "A"}, "message 0: `input` belongs to a user"),
        ({"messages": None}, "messages is empty or no list"),
        ({"messages": []}, "messages is empty or no list"),
        ({"messages": ["Q", "A"]}, "message 0 has no content that is a string"),
        (chat(("user", None), ("assistant", "A")), "message 0 has no content that is a string"),
        (chat(("user", [{"type": "image"}]), ("assistant", "A")), "message 0 has no content"),
        (chat(("assistant", "A"), ("user", "Q")), "message 0 has role 'assistant' where 'user'"),
        (chat(("user", "Q"), ("user", "Q")), "message 1 has role 'user' where 'assistant' belongs"),
        (chat(("user", "Q"), ("tool", "4")), "message 1 has role 'tool' where 'assistant' belongs"),
        (chat(("user", "Q")), "the last message has role 'user'; it must be 'assistant'"),
        (chat(("user", "Q"), ("assistant", "A", 1.5)), "weight 1.5 is not a number from 0 to 1"),
        (chat(("user", "Q"), ("assistant", "A", float("nan"))), "weight nan is not a number"),
        (chat(("user", "Q"), ("assistant", "A", "1")), "weight '1' is not a number from 0 to 1"),
        (chat(("user", "Q", 0.5), ("assistant", "A")), "message 0: weight 0.5 on a user message"),
        ({"conversations": "Q"}, "`conversations` is no list of {from, value}"),
        ({"conversations": [["human", "Q"]]}, "`conversations` is no list of {from, value}"),
        ({"conversations": [{"from": ["human"], "value": "Q"}]}, "message 0 has role ['human']"),
        ({"conversations": [{"from": "human"}]}, "message 0 has no content that is a string"),
    ],
)
def test_a_row_that_cannot_be_trained_is_named_with_its_line(refused, jsonl, row, message):
    source = jsonl("a.jsonl", [GOOD, row, GOOD])
    line = refused(sft_data, *prepare_flags(source))
    assert line.startswith(f"{source} line 2: ")
    assert message in line
    assert "--on_bad_row skip" in line  # what to do about it


def test_a_bad_row_of_the_validation_file_is_named_with_that_file(refused, jsonl):
    flags = prepare_flags(jsonl("train.jsonl", [GOOD]))
    line = refused(sft_data, *flags, "--val_source", jsonl("val.jsonl", [GOOD, {"no": 1}]))
    assert "val.jsonl line 2: unknown form, keys ['no']" in line


def test_a_conversation_that_the_template_cannot_say_is_refused(refused, jsonl):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    source = jsonl("a.jsonl", [chat(*turns)])
    line = refused(sft_data, *prepare_flags(source), "--template", "alpaca")
    assert "line 1: the alpaca template takes one user message and one answer" in line


def test_rows_that_are_all_bad_leave_a_split_without_rows(refused, jsonl):
    source = jsonl("a.jsonl", [{"a": 1}, {"b": 1}])
    line = refused(sft_data, *prepare_flags(source), "--on_bad_row", "skip")
    assert f"the train split is left without rows (all 2 rows were bad, the first: {source}" in line


def test_too_few_rows_for_a_validation_split_is_no_silent_empty_one(refused, jsonl):
    line = refused(sft_data, *prepare_flags(jsonl("a.jsonl", [GOOD])))
    assert line.startswith("the val split is left without rows (--val_fraction 0.05 of 1 rows)")
    line = refused(sft_data, *prepare_flags(jsonl("a.jsonl", [GOOD])), "--val_fraction", 0.99)
    assert line.startswith("the train split is left without rows")


# ----- flags -------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [fineweb, sft_data])
def test_out_is_never_written_over(refused, tmp_path, jsonl, module):
    source = jsonl("a.jsonl", [GOOD | {"text": "a"}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    assert "--out out exists and is not empty" in refused(module, *prepare_flags(source))
    (tmp_path / "out/notes.txt").rename(tmp_path / "file")
    (tmp_path / "out").rmdir()
    (tmp_path / "file").rename(tmp_path / "out")  # a file of that name
    assert "--out out exists and is not empty" in refused(module, *prepare_flags(source))
    flags = [*prepare_flags(source)[:-1], "out/below_a_file"]
    assert "out" in refused(module, *flags)


@pytest.mark.parametrize(
    "module, flags, message",
    [
        (sft_data, ["--val_fraction", 1], "--val_fraction 1.0: it must be at least 0 and below 1"),
        (sft_data, ["--val_fraction", -0.1], "--val_fraction -0.1"),
        (sft_data, ["--val_fraction", "nan"], "--val_fraction nan"),
        (sft_data, ["--workers", 0], "--max_examples start at 1"),
        (sft_data, ["--shard_tokens", 0], "--max_examples start at 1"),
        (sft_data, ["--block_size", 0], "--max_examples start at 1"),
        (sft_data, ["--max_examples", 0], "--max_examples start at 1"),
        (sft_data, ["--max_examples", -1], "--max_examples start at 1"),
        (fineweb, ["--workers", 0], "--max_tokens start at 1"),
        (fineweb, ["--shard_tokens", -5], "--max_tokens start at 1"),
        (fineweb, ["--max_tokens", 0], "--max_tokens start at 1"),
        (fineweb, ["--max_tokens", -3], "--max_tokens start at 1"),
        (fineweb, ["--val_tokens", -1], "--val_tokens at 0"),
    ],
)
def test_numbers_out_of_range_are_refused(refused, jsonl, module, flags, message):
    source = jsonl("a.jsonl", [GOOD | {"text": "a"}])
    assert message in refused(module, *prepare_flags(source), *flags)


def test_sft_data_says_what_it_can_do(refused):
    assert refused(sft_data).startswith("give --source and --out to make shards, or --show")
    assert refused(sft_data, "--show", 1) == "--show needs --data, a folder that --source made"


@pytest.mark.parametrize(
    "module, flags, message",
    [
        (fineweb, ["--encoding", "llama"], "--encoding"),
        (sft_data, ["--source", "a.jsonl", "--template", "vicuna"], "--template"),
        (sft_data, ["--source", "a.jsonl", "--train_on", "first_turn"], "--train_on"),
        (train_sft, ["--data", "data", "--layout", "tetris"], "--layout"),
        (train_sft, ["--data", "data", "--batch_size", "many"], "--batch_size"),
        (train_gpt2, [], "--data"),
        (train_gpt2, ["--data", "data", "--batchsize", "4"], "--batchsize"),
    ],
)
def test_a_flag_that_is_missing_unknown_or_no_choice_is_named(
    command, tmp_path, monkeypatch, module, flags, message
):
    """Here tyro speaks, in a frame of several lines."""
    monkeypatch.chdir(tmp_path)
    result = command(module, "--out", "out", *flags)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err
    assert not list(tmp_path.iterdir())


# ----- data folders ------------------------------------------------------------------------------


def resave(shard: Path, change) -> None:
    np.save(shard, change(np.load(shard)))


def edit_meta(shard: Path, **changes) -> None:
    meta = shard.with_name("meta.json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | changes))


def flip_a_bit(shard: Path) -> None:
    """Length and type still fit; only the sha256 knows."""
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


UNREADABLE = "train_000000.npy: missing, truncated or no .npy"
DAMAGES = {  # what happens to the first training shard, or to the meta.json beside it
    "truncated": (lambda shard: shard.write_bytes(shard.read_bytes()[:-2]), UNREADABLE),
    "emptied": (lambda shard: shard.write_bytes(b""), UNREADABLE),
    "deleted": (lambda shard: shard.unlink(), UNREADABLE),
    "no array": (lambda shard: shard.write_bytes(b"hello"), UNREADABLE),
    "int32": (lambda shard: resave(shard, np.int32), "train_000000.npy: int32 with"),
    "one axis more": (lambda shard: resave(shard, lambda ids: ids[None]), "axes, expected uint16"),
    "a token less": (lambda shard: resave(shard, lambda ids: ids[..., 1:]), "tokens where meta"),
    "a bit flipped": (flip_a_bit, "train_000000.npy: sha256"),
    "no meta": (lambda shard: shard.with_name("meta.json").unlink(), "is unfinished (no meta.json"),
    "half a meta": (lambda shard: shard.with_name("meta.json").write_text('{"version'),
                    "meta.json: damaged, not JSON"),
    "later version": (lambda shard: edit_meta(shard, version=2), "format version 2, expected 1"),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_fine_tuning_refuses_damaged_data(refused, data, damage, message):
    damage(data / "train_000000.npy")
    assert message in refused(train_sft, "--data", data, "--out", "out", *TINY)


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_pretraining_refuses_damaged_data(refused, text_data, damage, message):
    damage(text_data / "train_000000.npy")
    assert message in refused(train_gpt2, "--data", text_data, "--out", "out", *TINY)


def test_a_damaged_validation_shard_is_refused_too(refused, data, text_data):
    for module, folder in ((train_sft, data), (train_gpt2, text_data)):
        flip_a_bit(folder / "val_000000.npy")
        line = refused(module, "--data", folder, "--out", "out", *TINY)
        assert "val_000000.npy: sha256" in line


def test_each_trainer_wants_its_own_kind_of_data(refused, data, text_data):
    line = refused(train_gpt2, "--data", data, "--out", "out", *TINY)
    assert line == f"--data {data} was made by sft_data.py; fineweb.py's is needed"
    line = refused(train_sft, "--data", text_data, "--out", "out", *TINY)
    assert line == f"--data {text_data} was made by fineweb.py; sft_data.py's is needed"
    line = refused(train_sft, "--data", "nowhere", "--out", "out", *TINY)
    assert line == "--data nowhere does not exist; make it with sft_data.py"


def test_a_text_shorter_than_a_row_is_refused(refused, text_data):
    line = refused(train_gpt2, "--data", text_data, "--out", "out", *TINY, "--block_size", 500)
    assert "the train split has 201 tokens, a row of --block_size 500 takes 501; lower it" in line


def test_examples_longer_than_a_row_are_refused_under_overlong_error(refused, data):
    flags = ["--data", data, "--out", "out", *TINY]
    line = refused(train_sft, *flags, "--block_size", 5, "--overlong", "error")
    assert "has 7 tokens, a row 6; raise --block_size or choose --overlong truncate" in line
    line = refused(train_sft, *flags, "--block_size", 3)  # nothing of an answer is left
    assert "no example of train fits; raise --block_size" in line


# ----- models ------------------------------------------------------------------------------------


def tiny_model(folder: Path, vocab_size: int) -> Path:
    config = GPTConfig(block_size=8, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=2)
    GPT(config).save_pretrained(folder)
    return folder


def test_ids_that_the_model_has_no_rows_for_are_refused(refused, data, tmp_path):
    init = tiny_model(tmp_path / "gpt2_size", 50304)
    line = refused(train_sft, "--data", data, "--out", "out", *TINY, "--init", init)
    assert "needs 320 ids (bytes, padded), the model has 50304" in line


def test_rows_longer_than_the_models_positions_are_refused(refused, data, tmp_path):
    init = tiny_model(tmp_path / "init", 320)
    flags = ["--data", data, "--out", "out", *TINY, "--init", init]
    assert refused(train_sft, *flags, "--block_size", 9) == (
        "--block_size 9 is above the model's 8; lower it"
    )


def test_a_folder_that_holds_no_model_is_named(refused, data, tmp_path):
    flags = ["--data", data, "--out", "out", *TINY, "--init"]
    assert "./nowhere: no model there" in refused(train_sft, *flags, "./nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty: no model there" in refused(train_sft, *flags, tmp_path / "empty")
    init = tiny_model(tmp_path / "init", 320)
    whole = (init / "model.safetensors").read_bytes()
    (init / "model.safetensors").write_bytes(whole[:-1])
    line = refused(train_sft, *flags, init)
    assert "model.safetensors: not a whole safetensors file" in line


# ----- training flags ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch_size", 3, "--rows_per_step", 8],
         "--rows_per_step 8 is no multiple of --batch_size 3 x 1 processes = 3; try 9"),
        (["--batch_size", 0], "--batch_size 0: it must be at least 1"),
        (["--epochs", 0], "--epochs 0: it must be at least 1"),
        (["--max_steps", 0], "--max_steps 0: it must be at least 1"),
        (["--n_embd", 8, "--n_head", 3], "n_embd 8 must be a multiple of n_head 3"),
        (["--device", "abacus"], "--device abacus: not to be had here"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("module", [train_gpt2, train_sft])
def test_training_flags_that_do_not_go_together_are_refused(
    refused, data, text_data, module, flags, message
):
    folder = data if module is train_sft else text_data
    assert message in refused(module, "--data", folder, "--out", "out", *TINY, *flags)


@pytest.mark.parametrize("n", [0, -1])
def test_training_on_no_examples_is_refused(refused, data, n):
    flags = ["--data", data, "--out", "out", *TINY, "--max_examples", n]
    assert f"--max_examples {n}: it must be at least 1" in refused(train_sft, *flags)


def test_a_run_is_never_written_over(refused, data, text_data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    for module, folder in ((train_sft, data), (train_gpt2, text_data)):
        line = refused(module, "--data", folder, "--out", "out", *TINY)
        assert line.startswith("--out out already holds files; --resume goes on with the run in it")


def test_resume_needs_a_run_and_the_runs_own_flags(refused, command, data, sft_shards, tmp_path):
    flags = ["--data", data, "--out", tmp_path / "out", *TINY]
    line = refused(train_sft, *flags, "--resume")
    assert line.endswith("has no checkpoint to resume; leave --resume out")

    assert command(train_sft, *flags).code == 0  # one step
    assert "already holds files" in refused(train_sft, *flags)
    for changed, was in (("--seed", 0), ("--block_size", 8), ("--learning_rate", 5e-05)):
        line = refused(train_sft, *flags, "--resume", changed, 7)
        name = changed.removeprefix("--")
        assert line.startswith(f"--resume: {name} is 7")
        assert f"the run in --out has {was}; give the run's own flags, or another --out" in line
    line = refused(train_sft, *flags, "--resume", "--layout", "pad")
    assert line.startswith("--resume: layout is pad, the run in --out has fit")
    other = sft_shards([GOOD] * 21, name="other")
    line = refused(train_sft, *flags, "--resume", "--data", other)
    assert line.startswith("--resume: data sha256")
    assert command(train_sft, *flags, "--resume").code == 0  # a finished run is no error


# ----- as a user calls it ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("fineweb.py", ["--source", "no.txt", "--encoding", "bytes"],
         "error: no.txt: no such file"),
        ("train_sft.py", ["--data", "no", "--device", "cpu"], "error: --data no does not exist; "
         "make it with sft_data.py"),
    ],
)  # fmt: skip
def test_the_command_line_itself_says_one_line_and_exits_2(tmp_path, script, flags, message):
    call = [sys.executable, str(ROOT / script), *flags, "--out", "out"]
    result = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (2, f"{message}\n")
    assert not list(tmp_path.iterdir())
