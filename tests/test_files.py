"""Rows out of files and folders: formats, compression, encodings, damage, and what is not data."""

import bz2
import functools
import glob
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import fineweb
import sft_data
from nanosft.errors import UserError
from nanosft.files import decode_file, read_txt
from nanosft.sources import read_rows

zipped = functools.partial(gzip.compress, mtime=0)  # the same in every process: ids of tests
ROWS = [{"prompt": "Q", "response": "A"}, {"prompt": "é 你", "response": "b\nc"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def write(path: Path, content: str | bytes = LINES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_table(path: Path, rows: list[dict] = ROWS) -> Path:
    """.parquet, or .arrow as `Dataset.save_to_disk` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(
                file, table.schema) as stream:
            stream.write_table(table)
    return path


def prompts(source) -> list[str]:
    return [row["prompt"] for _, row in read_rows(str(source))]


def refusal(source) -> str:
    with pytest.raises(UserError) as error:
        list(read_rows(str(source)))
    assert len(str(error.value)) <= 300 + 3 * len(str(source))  # and names of a long folder
    return str(error.value)


@pytest.fixture
def prepare(command, tmp_path):
    """prepare(source, "--flag", …) runs sft_data.py on bytes; the folder is tmp_path / "out"."""

    def call(source, *flags):
        return command(sft_data, "--source", source, "--encoding", "bytes", "--val_fraction", 0,
                       "--workers", 1, "--out", tmp_path / "out", *flags)

    return call


# ----- formats, compression, encodings -----------------------------------------------------------


@pytest.mark.parametrize("name, content", [
    ("a.jsonl.gz", zipped(LINES.encode())),
    ("a.JSONL.GZ", zipped(LINES[:20].encode()) + zipped(LINES[20:].encode())),
    ("a.jsonl.zst", pyarrow.compress(LINES.encode(), codec="zstd", asbytes=True)),
    ("a.jsonl.bz2", bz2.compress(LINES.encode())),
    ("a.json.gz", zipped(json.dumps(ROWS).encode())),
    ("a.json", LINES),  # each under the other's name
    ("a.jsonl", json.dumps(ROWS)),
    ("a.jsonl.gz", zipped(f"\n {json.dumps(ROWS, indent=1)}".encode("utf-16"))),
    ("a.ndjson", LINES),
    ("a.jsonl", LINES.encode("utf-8-sig")),
    ("a.jsonl", LINES.encode("utf-16")),
    ("a.jsonl", LINES.encode("utf-16-be")),  # without a byte order mark
    ("a.json", json.dumps(ROWS, ensure_ascii=False).encode("utf-16")),
    ("a.csv", 'prompt,response\nQ,A\né 你,"b\nc"\n'),
    ("a.csv", 'prompt,response\r\nQ,A\r\n\r\né 你,"b\nc"\r\n'.encode("utf-8-sig")),
    ("a.csv.gz", zipped('prompt,response\nQ,A\né 你,"b\nc"'.encode())),
    ("a.tsv", 'prompt\tresponse\nQ\tA\né 你\t"b\nc"\n'.encode("utf-16")),  # of a spreadsheet
])
def test_same_rows_in_every_format(tmp_path, name, content):
    assert [row for _, row in read_rows(str(write(tmp_path / name, content)))] == ROWS


def test_arrow_and_parquet_are_read(tmp_path):
    for name in ("a.arrow", "a.parquet"):
        assert [row for _, row in read_rows(str(write_table(tmp_path / name)))] == ROWS


def test_missing_value_of_a_csv_is_none_and_words_like_none_are_text(tmp_path):
    path = write(tmp_path / "a.csv", ',prompt,response\n1,,A\n2,None,NA\n3,null,"NaN"\n')
    assert [row for _, row in read_rows(str(path))] == [
        {"": "1", "prompt": None, "response": "A"}, {"": "2", "prompt": "None", "response": "NA"},
        {"": "3", "prompt": "null", "response": "NaN"}]


def test_text_of_a_csv_may_be_longer_than_pythons_limit(tmp_path):
    path = write(tmp_path / "a.csv", "prompt\n" + "x" * 200_000)
    assert prompts(path) == ["x" * 200_000]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_byte_order_mark_is_no_part_of_a_text(tmp_path, encoding):
    path = write(tmp_path / "a.txt", "é\nb".encode(encoding))
    assert "".join(piece for piece, _ in read_txt(path, 100)) == "é\nb"


# ----- one bad row -------------------------------------------------------------------------------


def bad_string_table(path: Path, nested: bool = False) -> Path:
    """Three rows; the response of the second is not UTF-8."""
    answers = pyarrow.array([b"A", b"\xff\xfe", b"C"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": ["a", "b", "c"], "response": answers})
    if nested:
        roles, ends = ["user", "assistant"] * 3, [0, 2, 4, 6]
        texts = pyarrow.array([b"a", b"A", b"b", b"\xff", b"c", b"C"]).view(pyarrow.string())
        turns = pyarrow.StructArray.from_arrays([roles, texts], ["role", "content"])
        table = pyarrow.table({"messages": pyarrow.ListArray.from_arrays(ends, turns)})
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name, content, place", [
    ("a.parquet", False, "row 2: cannot be decoded ('utf-8' codec can't decode byte 0xff"),
    ("a.parquet", True, "row 2: cannot be decoded ('utf-8' codec can't decode byte 0xff"),
    ("a.jsonl", LINES + "{\n" + LINES, "line 3: not JSON"),
    ("a.jsonl", LINES.encode() + b'{"prompt": "\xff"}\n' + LINES.encode(), "line 3: not JSON"),
    ("a.jsonl", LINES + "[" * 500 + "]" * 500 + "\n" + LINES, "line 3: a value: lists and objects"),
    ("a.csv", "prompt,response\nQ,A\nQ,1,000\nQ,A\n", "line 3: more or fewer values"),
    ("a.csv", "prompt,response\nQ,A\nbroken\nline,A\n", "line 3: more or fewer values"),
    ("a.csv", b"prompt,response\nQ,A\nQ,caf\xe9\nQ,A\n", "line 3: not UTF-8 text"),
])
def test_row_that_cannot_be_decoded_is_named_or_left_out_and_counted(
        prepare, tmp_path, name, content, place, workers):
    path = tmp_path / name
    bad_string_table(path, content) if isinstance(content, bool) else write(path, content)
    result = prepare(path, "--workers", workers)
    assert result.code == 2 and result.err.startswith(f"error: {path} {place}"), result.err
    assert result.err.count("\n") == 1 and "--on_bad_row skip" in result.err
    result = prepare(path, "--workers", workers, "--on_bad_row", "skip")
    n_kept = 4 if name == "a.jsonl" else 2  # the good rows before and after it
    assert result.code == 0 and f": {n_kept} kept, 1 rejected" in result.out, result


def test_fineweb_names_the_row_that_cannot_be_decoded(command, tmp_path):
    path = bad_string_table(tmp_path / "a.parquet")
    result = command(fineweb, "--source", path, "--encoding", "bytes", "--out", tmp_path / "out")
    assert result.err.startswith(f"error: {path} row 1: no `text` string")
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n')
    result = command(fineweb, "--source", path, "--encoding", "bytes", "--out", tmp_path / "out")
    assert result.err.startswith(f"error: {path} line 2: not JSON")
    assert (result.code, (tmp_path / "out").exists()) == (2, False)


# ----- damage ------------------------------------------------------------------------------------

MANY = "".join(json.dumps({"prompt": f"Q {i * i}", "response": "A"}) + "\n" for i in range(9999))


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl.gz", zipped(MANY.encode())[:-9], "(Truncated compressed stream)"),
    ("a.jsonl.zst", pyarrow.compress(MANY.encode(), codec="zstd", asbytes=True)[:-1],
     "(Truncated compressed stream)"),
    ("a.jsonl.gz", MANY, "(zlib inflate failed"),
    ("a.json.gz", zipped(b"[]")[:-4], "(Truncated compressed stream)"),
    ("a.csv.gz", zipped(b"prompt,response\nQ,A\n")[:-4], "(Truncated compressed stream)"),
    ("a.csv", 'prompt,response\nQ,A\nQ,"A\nQ,A\n', "after line 2, or not a .csv file (unexpected"),
    ("a.csv", 'prompt,response\nQ,A\nQ,"A" b\n', "after line 2, or not a .csv file (',' expected"),
    ("a.csv", "prompt,prompt\nQ,A\n", "two columns have the same name"),
    ("a.jsonl", LINES.encode("utf-16")[:-1], "not UTF-8 text"),
    ("a.parquet", LINES, "damaged, or not a .parquet file (Parquet magic bytes not found"),
    ("a.arrow", LINES, "damaged, or not a .arrow file ("),
    ("a.parquet", POINTER, "run `git lfs pull`"),
    ("a.jsonl", POINTER, "run `git lfs pull`"),
])
def test_damaged_file_is_named_and_how_far_it_could_be_read(prepare, tmp_path, name, content,
                                                            message):
    path = write(tmp_path / name, content)
    for flags in ([], ["--on_bad_row", "skip"]):  # what follows in the file is lost, too
        result = prepare(path, *flags)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert result.err.startswith(f"error: {path}: ") and message in result.err
        assert not (tmp_path / "out").exists()


def test_damaged_page_of_a_parquet_file_is_named_after_the_rows_before_it(tmp_path):
    rows = [{"prompt": f"{i * i:x}" * 3, "response": "A"} for i in range(6000)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2000)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = column.dictionary_page_offset + column.total_compressed_size // 2
    content[middle : middle + 99] = b"\xff" * 99
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}: damaged after row 2000, or not a .parquet file (")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.csv"])
def test_no_flipped_or_missing_byte_ends_in_a_traceback(tmp_path, name):
    path = tmp_path / name
    if name.endswith((".parquet", ".arrow")):
        write_table(path)
    else:
        write(path, {"a.jsonl.gz": zipped(LINES.encode()),
                     "a.csv": 'a,b\n1,"x\ny"\n2,z\n'}[name])
    whole = path.read_bytes()
    step = max(1, len(whole) // 150)
    for at in range(0, len(whole), step):
        for content in (whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :], whole[:at]):
            path.write_bytes(content)
            try:
                list(decode_file(path))
            except UserError as error:
                assert str(error).startswith(str(path))


# ----- folders -----------------------------------------------------------------------------------


def test_folder_is_read_file_by_file_beside_what_is_no_data(tmp_path, capsys):
    """A later file may have other columns: no schema is shared."""
    write(tmp_path / "d/b.jsonl", '{"prompt": "b", "more": {"x": 1}}\n')
    write(tmp_path / "d/a.jsonl", '{"prompt": "a"}\n')
    write(tmp_path / "elsewhere/c.jsonl", '{"prompt": "c"}\n')
    (tmp_path / "d/more").symlink_to("../elsewhere")
    for name in ("README.md", "LICENSE", "LICENSE.txt", "dataset_infos.json", ".gitattributes",
                 ".cache/x.jsonl", ".git/y.jsonl", "__pycache__/z.jsonl", "requirements.txt"):
        write(tmp_path / "d" / name, '{"prompt": "no"}\n')
    capsys.readouterr()
    assert prompts(tmp_path / "d") == ["a", "b", "c"]
    assert capsys.readouterr().out == ""
    write(tmp_path / "d/notes.txt")
    write(tmp_path / "d/train.py")
    assert prompts(tmp_path / "d") == ["a", "b", "c"]
    assert capsys.readouterr().out == (f"{tmp_path}/d: reads 3 file(s) of split train; not read: "
                                       "notes.txt, train.py\n")


@pytest.mark.parametrize("names, formats", [
    (["a.jsonl", "b.parquet"], ".jsonl, .parquet"),
    (["a.jsonl", "more/b.csv", "c.csv"], ".csv, .jsonl"),
    (["a.jsonl", "a.jsonl.gz"], ".jsonl, .jsonl.gz"),  # most likely the same rows twice
    (["a.json", "a.JSONL"], ".JSONL, .json"),
])
def test_folder_of_several_formats_is_refused_and_its_advice_works(tmp_path, names, formats):
    folder = tmp_path / "my [set]"
    for name in names:
        path = folder / name
        write_table(path) if path.suffix == ".parquet" else write(path, {
            ".csv": "prompt\nQ\n", ".gz": zipped(LINES.encode())}.get(path.suffix, LINES))
    message = refusal(folder)
    assert message.startswith(f"{folder}: files of several formats ({formats})")
    assert all(prompts(folder / name)[0] == "Q" for name in names)  # "one by one"
    for ending in formats.split(", "):
        assert prompts(glob.escape(str(folder)) + f"/**/*{ending}")[0] == "Q"  # "or as a pattern"


@pytest.mark.parametrize("name, split", [
    ("train.jsonl", "train"), ("data/train-00000-of-00002.jsonl", "train"),
    ("val.jsonl", "validation"),
    ("dev/0001.jsonl", "validation"), ("math_test.jsonl", "test"), ("eval.v2.jsonl", "test"),
    ("valid/train-notes.jsonl", "validation"), ("contest.jsonl", "train"), ("a.jsonl", "train"),
    ("dev/0001.jsonl", "dev"), ("validation.jsonl", "val"), ("eval.jsonl", "evaluation"),
])
def test_words_of_a_path_name_its_split_as_in_datasets(tmp_path, name, split):
    write(tmp_path / "d" / name)
    assert prompts(f"{tmp_path}/d::{split}") == ["Q", "é 你"]
    if split not in ("train", "dev", "val", "evaluation"):  # the last are other names of theirs
        message = refusal(tmp_path / "d")
        assert f"no split 'train' (there is: {split})" in message
        assert prompts(message.partition("name a split as ")[2].partition(",")[0])


def test_file_without_a_split_in_its_name_is_training_data(tmp_path):
    for name in ("train.jsonl", "chats.jsonl", "test.jsonl"):
        write(tmp_path / "d" / name, json.dumps({"prompt": name}))
    assert prompts(tmp_path / "d") == ["chats.jsonl", "train.jsonl"]
    assert prompts(f"{tmp_path}/d::test") == ["test.jsonl"]


def test_broken_link_in_a_folder_is_named(tmp_path):
    write(tmp_path / "d/a.jsonl")
    (tmp_path / "d/b.jsonl").symlink_to("gone.jsonl")
    assert refusal(tmp_path / "d").startswith(f"{tmp_path}/d/b.jsonl: a broken link, or not a")


def test_folder_without_rows_says_what_there_is(tmp_path):
    """And which formats are read; no split could help."""
    write(tmp_path / "d/a.txt")
    write(tmp_path / "d/val.xlsx")
    (tmp_path / "empty").mkdir()
    for name, there in (("d", "(there is: a.txt, val.xlsx)"), ("empty", "(there is: no data)")):
        for split in ("", "::val"):
            message = refusal(f"{tmp_path}/{name}{split}")
            assert message.startswith(f"{tmp_path}/{name}: no files of .jsonl, .ndjson, .json, ")
            assert there in message and "::" not in message


def test_saved_dataset_is_read(tmp_path):
    """The real save_to_disk, also of a dict of splits."""
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    write_table(tmp_path / "one/cache-0123.arrow", [{"prompt": "of map()"}])
    assert prompts(tmp_path / "one") == ["Q", "é 你"]
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "splits")
    assert prompts(tmp_path / "splits") == ["Q", "é 你"]
    assert prompts(f"{tmp_path}/splits::test") == ["é 你"]
    assert "no split 'dev' (there is: test, train)" in refusal(f"{tmp_path}/splits::dev")
    datasets.DatasetDict(train_sft=rows, train_gen=rows.select([0])).save_to_disk(tmp_path / "two")
    assert "(there is: train_gen, train_sft)" in refusal(tmp_path / "two")
    assert prompts(f"{tmp_path}/two::train_sft") == ["Q", "é 你"]


CONFIGS = """---
license: mit
configs:
- config_name: main
  data_files: [{split: train, path: main/*}, {split: test, path: other/t.jsonl}]
- config_name: de
  data_files: de.jsonl
---
# A data set
"""


def test_configurations_that_a_readme_declares_are_read(tmp_path):
    """By the datasets library, as those of a copy of a hub dataset."""
    write(tmp_path / "d/README.md", CONFIGS)
    for name, prompt in (("main/a.jsonl", "a"), ("other/t.jsonl", "t"), ("de.jsonl", "d")):
        write(tmp_path / "d" / name, json.dumps({"prompt": prompt}))
    assert prompts(f"{tmp_path}/d:main") == ["a"]
    assert prompts(f"{tmp_path}/d:main:test") == ["t"]
    assert prompts(f"{tmp_path}/d:de") == ["d"]
    for source in (f"{tmp_path}/d", f"{tmp_path}/d:fr"):
        message = refusal(source)
        assert "['main', 'de']" in message and "d:CONFIG:SPLIT" in message
    write(tmp_path / "d/de.jsonl", "{")
    assert "or pass the files one by one" in refusal(f"{tmp_path}/d:de")
    assert f"{tmp_path}/d/de.jsonl line 1: not JSON" in refusal(tmp_path / "d/de.jsonl")
