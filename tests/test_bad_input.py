"""What a user can get wrong is one line that says what and where, exit code 2, and leaves no files.

Almost all of these run the real command in this process: the same flags, the same messages.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers_training import flip_a_bit, sft_folder, text_folder

import fineweb
import sft_data
import train_gpt2
import train_sft
from model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
GOOD = {"prompt": "Q", "response": "A"}
ONE_STEP = ["--out", "out", "--device", "cpu", "--block_size", 8, "--batch_size", 1,
            "--rows_per_step", 2, "--max_steps", 1]
SCRATCH = [*ONE_STEP, "--init", "scratch", "--n_layer", 1, "--n_head", 1, "--n_embd", 8]


def files_under(folder: Path) -> dict[str, bytes | None]:
    """Every path with its bytes; folders have None."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path, command, monkeypatch):
    """refused(module, *flags): the one line of the error. No file has changed."""
    monkeypatch.chdir(tmp_path)

    def call(module, *flags) -> str:
        before = files_under(tmp_path)
        result = command(module, *flags)
        assert (result.code, result.err.count("\n")) == (2, 1), result
        assert result.err.startswith("error: ")
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


@pytest.fixture(params=[train_gpt2, train_sft], ids=["train_gpt2", "train_sft"])
def trainer(request, data, text_data) -> SimpleNamespace:
    """Each of the two trainers in turn, with a good folder for it."""
    return SimpleNamespace(module=request.param,
                           data=data if request.param is train_sft else text_data)


# ----- files that cannot be read -----------------------------------------------------------------


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", None, "a.jsonl: no such file"),
    ("a.parquet", None, "a.parquet: no such file"),
    ("./a.csv", None, "a.csv: no such file"),
    ("a.xls", b"Q,A", "a.xls: expected one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
    ("a.csv", b"Q,A", "the train split is empty (no rows in a.csv)"),
    ("a.jsonl", b"", "a.jsonl: the file is empty"),
    ("a.jsonl", b"\n \r\n", "the train split is empty (no rows in a.jsonl)"),
    ("a.json", b"[]", "the train split is empty (no rows in a.json)"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text":\n', "a.jsonl line 3: not JSON"),
    ("a.jsonl", b'{"prompt": "Q"} {"prompt": "Q"}', "a.jsonl line 1: not JSON (Extra data"),
    ("a.jsonl", '{"prompt": "é"}'.encode("latin-1"), "a.jsonl line 1: not JSON ('utf-8' codec"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl: damaged, or not a .jsonl file (maximum recursion"),
    ("a.jsonl", b'{"a": ' * 100_000, "a.jsonl line 1: not JSON (maximum recursion"),
    ("a.jsonl", b'{"id": ' + b"9" * 5000 + b"}", "a.jsonl line 1: not JSON"),
    ("a.json", b'{\n"prompt": "Q"}', "; expected an object per line, or one list of objects"),
    ("a.json", b"[]]", "a.json: damaged, or not a .json file (Extra data"),
    ("a.json", b"{}\n{}\n", "a.json line 1: unknown form"),  # one object per line
    ("a.parquet", b"PAR0", "a.parquet: damaged, or not a .parquet file"),
])
def test_unreadable_file_of_rows_is_named(refused, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in refused(sft_data, *prepare_flags(name), "--val_fraction", 0)


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", None, "a.txt: no such file"),
    ("a.txt", b"", "a.txt: the file is empty"),
    ("a.txt", b"caf\xe9 au lait", "a.txt: not UTF-8 text"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 3}', "a.jsonl line 2: no `text` string"),
    ("a.jsonl", b'{"txt": "a"}', "a.jsonl line 1: no `text` string (found: ['txt'])"),
    ("a.jsonl", b'3\n["a"]', "a.jsonl line 1: no `text` string (found: int)"),
    ("a.jsonl", b'["a"]', "a.jsonl row 1: no `text` string (found: str)"),
    ("a.json", b"[]", "a.json: no text found"),
    ("a.bin", b"01", "a.bin: expected one of .txt, .jsonl"),
])
def test_unreadable_text_is_named(refused, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in refused(fineweb, *prepare_flags(name))


def test_name_that_is_neither_a_file_nor_a_dataset_is_one_line(refused, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for module in (fineweb, sft_data):
        line = refused(module, *prepare_flags("me/typo"))
        assert line == ("me/typo: neither a local file nor a dataset on the hub (no route to the "
                        "hub); check the id and the network, or pass the path of a file")


# ----- rows that cannot be trained ---------------------------------------------------------------


def chat(*turns) -> dict:
    """chat(("user", "Q"), ("assistant", "A", 0.5)) as a {messages} row."""
    keys = ("role", "content", "weight")
    return {"messages": [dict(zip(keys, turn)) for turn in turns]}


NO_TEXT = "message 0: no text among the keys "
NOT_TURNS = "`conversations` must be a list of {role, content}, of {from, value}, or of strings"


@pytest.mark.parametrize("row, message", [
    ([GOOD], "expected an object, not a list"),
    ("text", "expected an object, not a str"),
    (None, "expected an object, not a NoneType"),
    ({}, "unknown form with keys []"),
    ({"q": 1, "a": 2}, "unknown form with keys ['a', 'q']"),
    ({"prompt": "Q"}, "unknown form with keys ['prompt']"),  # no response
    ({"text": 3}, "`text` is 3, not a string"),
    ({"text": ""}, "`text` is empty"),
    ({"prompt": "Q", "response": ""}, "message 1: the response is empty"),
    ({"prompt": "Q", "response": None}, "keys ['prompt', 'response'], not empty: ['prompt']; see"),
    ({"prompt": ["Q"], "response": "A"}, "`prompt` is ['Q'], not a string"),
    ({"question": 7, "answer": "A"}, "`question` is 7, not a string"),
    ({"instruction": "Q", "input": 7, "output": "A"}, "`input` is 7, not a string"),
    ({"messages": None}, "unknown form with keys ['messages'], not empty: []"),
    ({"messages": []}, "unknown form with keys ['messages'], not empty: []"),
    ({"messages": ["Q"]}, "the last message has role 'user', expected 'assistant'"),
    ({"messages": "Q"}, "`messages` is a string, but not JSON: 'Q'"),
    ({"messages": [{"role": "user", "content": "Q"}, "A"]}, "`messages` must be a list of"),
    (chat(("user", None), ("assistant", "A")), NO_TEXT + "['role']"),
    (chat(("user", [{"type": "image"}]), ("assistant", "A")), "part of type 'image'"),
    (chat(("assistant", "A"), ("user", "Q")), "message 0 has role 'assistant', expected 'user'"),
    (chat(("user", "Q"), ("user", "Q")), "message 1 has role 'user', expected 'assistant'"),
    (chat(("user", "Q"), ("tool", "4")), "message 1: role 'tool' is not read"),
    (chat(("user", "Q"), ("bob", "4")), "message 1: role 'bob' is not read, only system, "),
    (chat(("user", "Q")), "the last message has role 'user', expected 'assistant'"),
    (chat(("user", "Q"), ("assistant", "A", 1.5)), "`weight` is 1.5, which may say what to train"),
    (chat(("user", "Q"), ("assistant", "A", float("nan"))), "`weight` is nan, which may say"),
    (chat(("user", "Q"), ("assistant", "A", "x")), "`weight` is 'x', which may say what to train"),
    (chat(("user", "Q", 0.5), ("assistant", "A")), "message 0: weight 0.5 on a user message"),
    ({"conversations": 7}, NOT_TURNS),
    ({"conversations": [["human", "Q"]]}, NOT_TURNS),
    ({"conversations": [{"from": ["human"], "value": "Q"}]}, "message 0: role ['human'] is not"),
    ({"conversations": [{"from": "human"}]}, NO_TEXT + "['from']"),
])
def test_row_that_cannot_be_trained_is_named_with_its_line(refused, jsonl, row, message):
    source = jsonl("a.jsonl", [GOOD, row, GOOD])
    line = refused(sft_data, *prepare_flags(source))
    assert line.startswith(f"{source} line 2: ")
    assert message in line
    assert "--on_bad_row skip" in line  # what to do about it


def test_bad_row_of_the_validation_file_is_named_with_that_file(refused, jsonl):
    flags = prepare_flags(jsonl("train.jsonl", [GOOD]))
    line = refused(sft_data, *flags, "--val_source", jsonl("val.jsonl", [GOOD, {"no": 1}]))
    assert "val.jsonl line 2: unknown form with keys ['no']" in line


def test_chat_that_the_template_cannot_express_is_refused(refused, jsonl):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    source = jsonl("a.jsonl", [chat(*turns)])
    line = refused(sft_data, *prepare_flags(source), "--template", "alpaca")
    assert "line 1: the alpaca template takes one user message and one answer" in line


def test_empty_split_says_why(refused, jsonl):
    bad = jsonl("bad.jsonl", [{"a": 1}, {"b": 1}])
    line = refused(sft_data, *prepare_flags(bad), "--on_bad_row", "skip")
    assert line.startswith("the train split is empty (all 2 rows were rejected")
    assert f"{bad} line 1: unknown form" in line
    one = jsonl("one.jsonl", [GOOD])  # too few rows for a validation split
    line = refused(sft_data, *prepare_flags(one))
    assert line.startswith("the val split is empty (--val_fraction 0.05 of 1 rows)")
    line = refused(sft_data, *prepare_flags(one), "--val_fraction", 0.99)
    assert line.startswith("the train split is empty")


# ----- flags -------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [fineweb, sft_data])
def test_existing_files_are_never_overwritten(refused, tmp_path, jsonl, module):
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


def test_sft_data_without_a_task_says_what_it_can_do(refused):
    assert "--source and --out to make shards, or --show and --data" in refused(sft_data)
    assert "--data, a folder" in refused(sft_data, "--show", 1)


@pytest.mark.parametrize("module, flags, message", [
    (fineweb, ["--encoding", "llama"], "--encoding"),
    (sft_data, ["--source", "a.jsonl", "--template", "vicuna"], "--template"),
    (sft_data, ["--source", "a.jsonl", "--train_on", "first_turn"], "--train_on"),
    (train_sft, ["--data", "data", "--layout", "tetris"], "--layout"),
    (train_sft, ["--data", "data", "--batch_size", "many"], "--batch_size"),
    (train_gpt2, [], "--data"),
    (train_gpt2, ["--data", "data", "--batchsize", "4"], "--batchsize"),
])
def test_missing_unknown_or_malformed_flag_is_named(command, tmp_path, monkeypatch, module, flags,
                                                    message):
    """This error is tyro's: several lines in a frame."""
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


UNREADABLE = "train_000000.npy: missing, truncated, or not an .npy file"
DAMAGES = {  # what happens to the first training shard, or to the meta.json beside it
    "truncated": (lambda shard: shard.write_bytes(shard.read_bytes()[:-2]), UNREADABLE),
    "emptied": (lambda shard: shard.write_bytes(b""), UNREADABLE),
    "deleted": (lambda shard: shard.unlink(), UNREADABLE),
    "not an array": (lambda shard: shard.write_bytes(b"hello"), UNREADABLE),
    "int32": (lambda shard: resave(shard, np.int32), "train_000000.npy: int32 with"),
    "one more axis": (lambda shard: resave(shard, lambda ids: ids[None]), "axes, expected uint16"),
    "one token less": (lambda shard: resave(shard, lambda ids: ids[..., 1:]), "but meta.json says"),
    "a bit flipped": (flip_a_bit, "train_000000.npy: sha256"),
    "no meta": (lambda shard: shard.with_name("meta.json").unlink(), "is unfinished (no meta.json"),
    "half a meta": (lambda shard: shard.with_name("meta.json").write_text('{"version'),
                    "meta.json: damaged, not a JSON object"),
    "later version": (lambda shard: edit_meta(shard, version=3), "format version 3, expected"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_damaged_data_is_refused(refused, trainer, damage, message):
    damage(trainer.data / "train_000000.npy")
    assert message in refused(trainer.module, "--data", trainer.data, *SCRATCH)


def test_chats_of_version_1_are_refused_with_loss_on_all(refused, data):
    edit_meta(data / "train_000000.npy", version=1)
    (data / "SHA256SUMS").unlink()
    for module, flags in ((train_sft, SCRATCH), (sft_data, ["--show", 1])):
        line = refused(module, "--data", data, *flags, "--loss_on", "all")
        assert line == (f"--data {data} is of format version 1, which cannot tell what --loss_on "
                        "all covers; make the data again with sft_data.py")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("version, stored", [(1, 0), (2, 0), (2, 65535)])
@pytest.mark.parametrize("layout", ["fit", "stream"])
def test_shards_without_a_target_are_refused(refused, tmp_path, version, stored, split, layout):
    """Also those of an earlier version, and under --loss_on all where that one can be used."""
    good, without = ([81, 65, 256], [0, 100, 100]), ([81, 65, 256], [0, stored, stored])
    splits = {"train": [good] * 3, "val": [good] * 3} | {split: [without] * 3}
    folder = Path(sft_folder(tmp_path / "d", **splits))
    edit_meta(folder / "train_000000.npy", version=version)
    (folder / "SHA256SUMS").unlink()
    for loss_on in ("response", "all")[:version]:
        line = refused(train_sft, "--data", folder, *SCRATCH, "--layout", layout,
                       "--loss_on", loss_on)
        assert line.startswith(f"--data {folder}: no token of the 3 examples of {split} in use is")


def test_evaluated_rows_without_a_target_are_refused_and_more_of_them_train(refused, command,
                                                                            tmp_path):
    """--eval_tokens 8 takes the middle row of T = 8 only; its val_loss of 0 would be the best."""
    good, without = ([81, 65, 256], [0, 100, 100]), ([81, 65, 256], [0, 0, 0])
    data = sft_folder(tmp_path / "d", train=[good] * 3, val=[good, without, good])
    flags = ["--data", data, *SCRATCH, "--layout", "pad", "--eval_prompts", 0]
    line = refused(train_sft, *flags, "--eval_tokens", 8)
    assert "no token of the validation rows that are evaluated is in the loss" in line
    assert "raise --eval_tokens" in line
    assert command(train_sft, *flags, "--eval_tokens", 24).code == 0


def test_first_examples_without_a_target_are_refused_and_more_of_them_train(
        refused, command, sft_shards):
    kept = {"messages": [{"role": "user", "content": "Q"},
                         {"role": "assistant", "content": "A", "weight": 0}]}
    data = sft_shards([kept, kept, GOOD], name="data")
    line = refused(train_sft, "--data", data, *SCRATCH, "--max_examples", 2)
    assert "no token of the 2 examples of train in use is in the loss" in line
    assert command(train_sft, "--data", data, *SCRATCH, "--max_examples", 3,
                   "--eval_prompts", 0).code == 0


def test_damaged_validation_shard_is_refused(refused, trainer):
    flip_a_bit(trainer.data / "val_000000.npy")
    line = refused(trainer.module, "--data", trainer.data, *SCRATCH)
    assert "val_000000.npy: sha256" in line


def test_each_trainer_needs_its_own_kind_of_data(refused, data, text_data):
    line = refused(train_gpt2, "--data", data, *SCRATCH)
    assert line == (f"--data {data} was made by sft_data.py; this command needs data made by "
                    "fineweb.py")
    line = refused(train_sft, "--data", text_data, *SCRATCH)
    assert line == (f"--data {text_data} was made by fineweb.py; this command needs data made by "
                    "sft_data.py")
    line = refused(train_sft, "--data", "nowhere", *SCRATCH)
    assert line == "--data nowhere does not exist; make it with sft_data.py"


def test_data_without_a_training_split_is_refused(refused, tmp_path):
    data = text_folder(tmp_path / "only_val", val=range(65))
    line = refused(train_gpt2, "--data", data, *SCRATCH)
    assert line == f"--data {data} has no train split, only ['val']"


def test_text_shorter_than_a_row_is_refused(refused, text_data):
    line = refused(train_gpt2, "--data", text_data, *SCRATCH, "--block_size", 500)
    assert line.startswith(f"--data {text_data}: the train split has 201 tokens, but a row of "
                           "--block_size 500 ")


def test_examples_longer_than_a_row_are_refused_under_overlong_error(refused, data):
    flags = ["--data", data, *SCRATCH]
    line = refused(train_sft, *flags, "--block_size", 5, "--overlong", "error")
    assert "has 7 tokens, but a row takes 6; raise --block_size or choose --overlong" in line
    line = refused(train_sft, *flags, "--block_size", 3)  # nothing of an answer is left
    assert "no example of train fits; raise --block_size" in line


# ----- models ------------------------------------------------------------------------------------


def tiny_model(folder: Path, vocab_size: int) -> Path:
    config = GPTConfig(block_size=8, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=2)
    GPT(config).save_pretrained(folder)
    return folder


def test_model_whose_vocabulary_does_not_fit_the_data_is_refused(refused, data, tmp_path):
    init = tiny_model(tmp_path / "init", 50304)
    line = refused(train_sft, "--data", data, *ONE_STEP, "--init", init)
    assert "needs 320 ids (bytes, padded), but the model has 50304" in line


def test_rows_longer_than_the_models_block_size_are_refused(refused, data, tmp_path):
    init = tiny_model(tmp_path / "init", 320)
    line = refused(train_sft, "--data", data, *ONE_STEP, "--init", init, "--block_size", 9)
    assert line == "--block_size 9 is above the model's 8; lower it"


def test_folder_without_a_model_is_named(refused, data, tmp_path):
    flags = ["--data", data, *ONE_STEP, "--init"]
    assert "./nowhere: no model found" in refused(train_sft, *flags, "./nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty: no model found" in refused(train_sft, *flags, tmp_path / "empty")
    init = tiny_model(tmp_path / "init", 320)
    whole = (init / "model.safetensors").read_bytes()
    (init / "model.safetensors").write_bytes(whole[:-1])
    line = refused(train_sft, *flags, init)
    assert "model.safetensors: not a complete safetensors file" in line


# ----- training flags ----------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    (["--batch_size", 3, "--rows_per_step", 8],
     "--rows_per_step 8 is not a multiple of --batch_size 3 x 1 ranks = 3; try 9"),
    (["--n_embd", 8, "--n_head", 3], "n_embd 8 is not a multiple of n_head 3"),
    (["--init", "gpt2"], "--n_layer 1 is only for --init scratch; --init gpt2 has its own size"),
    (["--device", "abacus"], "--device abacus: not available"),
])
def test_training_flags_that_do_not_go_together_are_refused(refused, trainer, flags, message):
    assert message in refused(trainer.module, "--data", trainer.data, *SCRATCH, *flags)


def test_folder_of_a_run_is_never_overwritten(refused, trainer, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    line = refused(trainer.module, "--data", trainer.data, *SCRATCH)
    assert line.startswith("--out out exists and is not empty; ") and "--resume" in line


def test_resume_refuses_other_flags_and_other_data(refused, command, data, sft_shards):
    flags = ["--data", data, *SCRATCH]
    assert command(train_sft, *flags).code == 0  # one step
    assert "exists and is not empty" in refused(train_sft, *flags)
    for name, value, was in (("seed", 7, 0), ("block_size", 7, 8), ("learning_rate", 0.7, 5e-05)):
        line = refused(train_sft, *flags, "--resume", f"--{name}", value)
        assert line.startswith(f"--resume: {name} is {value}")
        assert f", but {was} in the run in --out; " in line
    line = refused(train_sft, *flags, "--resume", "--layout", "pad")
    assert line.startswith("--resume: layout is pad, but fit in the run in --out")
    other = sft_shards([GOOD] * 21, name="other")
    line = refused(train_sft, *flags, "--resume", "--data", other)
    assert line.startswith("--resume: this is not the data of the run in --out; pass that run's")
    assert command(train_sft, *flags, "--resume").code == 0  # a finished run is not an error


# ----- as a user runs it -------------------------------------------------------------------------


def test_script_itself_prints_one_line_and_exits_with_2(tmp_path):
    call = [sys.executable, str(ROOT / "train_sft.py"), "--data", "no", "--out", "out"]
    result = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    line = "error: --data no does not exist; make it with sft_data.py\n"
    assert (result.returncode, result.stderr) == (2, line)
    assert not list(tmp_path.iterdir())


def test_output_piped_into_head_ends_without_a_traceback(sft_shards):
    """130 KB, more than the 64 KB that a pipe holds: head is gone before all is written."""
    data = sft_shards([GOOD] * 200)
    call = (f"{sys.executable} {ROOT / 'sft_data.py'} --show 200 --data {data} --layout pad "
            "--block_size 8 | head -1; exit ${PIPESTATUS[0]}")
    result = subprocess.run(["bash", "-c", call], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{data}, train: ") and result.stdout.count("\n") == 1
