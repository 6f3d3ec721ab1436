"""Rows and text out of files and folders: formats, compression, encodings, and damage."""

import collections
import csv
import glob
import io
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nanosft.errors import UserError, one_line

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}


class Place(NamedTuple):
    """Where a row stands; as text for example `a.jsonl line 7`."""

    source: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.source} {self.unit} {self.number}"


# ----- one file ----------------------------------------------------------------------------------


def format_of(path: str | Path) -> str:
    """The ending that says what a file holds: `.jsonl` of `a.jsonl` and of `A.JSONL.gz`."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSIONS), "")


def require_file(path: Path, formats: Iterable[str]) -> Path:
    """The path. UserError if it is not a file of one of these formats."""
    if not path.is_file():
        raise UserError(f"{path}: a broken link, or not a regular file; pass the file itself")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    if format_of(path) not in formats:
        raise UserError(f"{path}: expected one of {', '.join(formats)} (or of these in "
                        f"{', '.join(COMPRESSIONS)}); convert it")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com/spec/"):
            raise UserError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    return path


def checked(rows: Iterable[tuple]) -> Iterator[tuple]:
    """The same rows. UserError at the first one that could not be decoded."""
    for place, row in rows:
        if isinstance(row, UserError):
            raise UserError(f"{place}: {row}") from row
        yield place, row


def decode_file(path: Path) -> Iterator[tuple[Place, dict | UserError]]:
    """(place, row) of a file of rows; in place of a row that cannot be decoded, its UserError."""
    place = None
    try:
        for place, row in ROW_FORMATS[format_of(path)](path):
            yield place, row
    except UserError:
        raise
    except Exception as error:  # the libraries raise many types; each means that it is damaged
        after = f" after {place.unit} {place.number}" if place else ""
        raise damaged(path, error, after) from error


def damaged(path: Path, error: Exception, where: str = "") -> UserError:
    if isinstance(error, UnicodeError):
        return UserError(f"{path}: not UTF-8 text{where} ({error.reason}); convert it")
    return UserError(f"{path}: damaged{where}, or not a {path.suffix} file "
                     f"({' '.join(str(error).split())[:120]}); get or make it again")


def open_bytes(path: Path) -> io.BufferedReader:
    """The bytes of a file, decompressed."""
    codec = COMPRESSIONS.get(path.suffix.lower())
    if codec is None:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=codec))


def open_text(path: Path, **options) -> io.TextIOWrapper:
    """The text of a file in UTF-8, -16, or -32, with a byte order mark or without."""
    file = open_bytes(path)
    return io.TextIOWrapper(file, json.detect_encoding(file.peek(4)[:4]), **options)


def decode_json(path: Path) -> Iterator[tuple[Place, dict | UserError]]:
    """One object per line, or one list of objects, whatever the name says."""
    with open_bytes(path) as file:
        start = file.peek(64)[:64]
        encoding = json.detect_encoding(start)
        if start.decode(encoding, "ignore").lstrip().startswith("["):
            rows = json.loads(file.read())
            yield from ((Place(str(path), "row", i), row) for i, row in enumerate(rows, start=1))
            return
        # json decodes a line of UTF-8 itself, so bad bytes cost one row and not the file
        lines = file if encoding.startswith("utf-8") else open_text(
            path, newline="\n", errors="surrogatepass")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    row = UserError(f"not JSON ({error}); expected an object per line, or one "
                                    "list of objects")
                yield Place(str(path), "line", number), row


def decode_csv(path: Path) -> Iterator[tuple[Place, dict | UserError]]:
    """An empty cell is a missing value, None; `None` and `NA` are text like any other."""
    csv.field_size_limit(2**31 - 1)  # by default a text has at most 131,072 characters
    with open_text(path, errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if format_of(path) == ".tsv" else ",",
                              strict=True)
        header = rows.fieldnames or []
        if len(set(header)) < len(header):
            raise UserError(f"{path}: two columns have the same name; rename one of {header}")
        for row in rows:
            if None in row or None in row.values():
                row = UserError(f"more or fewer values than the {len(header)} names of the header; "
                                "put a text with a separator or a line break in double quotes")
            elif re.search("[\udc80-\udcff]", "".join(row.values())):  # of "surrogateescape"
                row = UserError("not UTF-8 text")
            else:
                row = {name: value or None for name, value in row.items()}
            yield Place(str(path), "line", rows.line_num), row


def decode_table(path: Path) -> Iterator[tuple[Place, dict | UserError]]:
    """A parquet file; or a stream of batches, as `Dataset.save_to_disk` writes it."""
    import pyarrow.parquet

    numbers = itertools.count(1)
    with pyarrow.OSFile(str(path)) as file:
        if format_of(path) == ".parquet":
            batches = pyarrow.parquet.ParquetFile(
                file, page_checksum_verification=True).iter_batches(1000)
        else:
            batches = pyarrow.ipc.open_stream(file)
        for batch in batches:
            if format_of(path) == ".arrow":
                batch.validate(full=True)  # reading at a damaged offset would end the process
            for row in decode_batch(batch):
                yield Place(str(path), "row", next(numbers)), row


def decode_batch(batch) -> list[dict | UserError]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date that cannot be
        if len(batch) == 1:
            return [UserError(f"cannot be decoded ({error})")]
        return [row for i in range(len(batch)) for row in decode_batch(batch.slice(i, 1))]


ROW_FORMATS = dict.fromkeys((".jsonl", ".ndjson", ".json"), decode_json)
ROW_FORMATS |= dict.fromkeys((".csv", ".tsv"), decode_csv)
ROW_FORMATS |= dict.fromkeys((".parquet", ".arrow"), decode_table)
TEXT_FORMATS = (".txt", *ROW_FORMATS)  # of a corpus


# A newline between two visible characters: GPT-2's pattern always splits on both sides of it, so
# the pieces have the same tokens as the whole text. A text without one is not cut.
SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")


def read_txt(path: Path, chunk_chars: int) -> Iterator[tuple[str, bool]]:
    """(piece of the text, whether it is the last); pieces have about `chunk_chars` characters."""
    text = ""
    try:
        with open_text(path) as file:
            while block := file.read(chunk_chars):
                new = max(0, len(text) - 1)  # no cut is possible before it
                text += block
                cut = max((match.end() for match in SAFE_CUT.finditer(text, new)), default=0)
                if cut:
                    yield text[:cut], False
                    text = text[cut:]
    except Exception as error:  # as in decode_file
        raise damaged(path, error) from error
    yield text, True


# ----- a folder of files -------------------------------------------------------------------------

# Words in the name of a file or folder that say of which split it is.
# Source: huggingface/datasets, src/datasets/data_files.py, SPLIT_KEYWORDS
SPLITS = dict.fromkeys(("train", "training"), "train")
SPLITS |= dict.fromkeys(("validation", "valid", "dev", "val"), "validation")
SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
# Texts about the data, caches, and what datasets writes beside its files
NO_DATA = re.compile(
    r"(.*/)?(__.*|(readme|licen[cs]e|notice|copying|citation|changelog|requirements)([-_]\w+)?"
    r"([.](md|txt))?|(dataset_infos?|dataset_dict|state|config|metadata)[.]json|cache-\w+[.]arrow)",
    re.IGNORECASE)


def declares_files(folder: Path) -> bool:
    """Does its README.md say which files there are, as that of a hub dataset?"""
    readme = folder / "README.md"
    return readme.is_file() and b"\nconfigs:" in readme.read_bytes().partition(b"\n---")[0]


def folder_files(folder: Path, split: str, formats: Iterable[str]) -> list[Path]:
    """The files of a split of a folder: `train` if their names have none. What is left out is
    printed. UserError if there are none, or of several formats."""
    names = [Path(name) for name in sorted(glob.glob("**/*", root_dir=folder, recursive=True))]
    names = [name for name in names  # hidden ones are not among them
             if not (folder / name).is_dir() and not NO_DATA.fullmatch(name.as_posix())]
    splits = collections.defaultdict(list)
    for name in names:
        if format_of(name) in formats:
            splits[split_of(name)].append(name)
    if not splits:
        raise UserError(f"{folder}: no files of {', '.join(formats)} in this folder (there is: "
                        f"{', '.join(map(str, names)) or 'no data'}); pass another folder, or "
                        "convert its files")
    chosen = splits.get(SPLITS.get(split, split))
    if chosen is None:
        raise UserError(f"{folder}: no split {split!r} (there is: {', '.join(splits)}); name a "
                        f"split as {shlex.quote(f'{folder}::{next(iter(splits))}')}, or pass the "
                        "files one by one")
    endings = {name.name[name.name.lower().rindex(format_of(name)) :] for name in chosen}
    if len(endings) > 1:  # often the same rows twice, or a file without rows
        raise UserError(f"{folder}: files of several formats ({', '.join(sorted(endings))}); pass "
                        "those of one format, one by one or as a pattern")
    others = map(str, sorted({*names} - {*chosen}))
    if len(names) > len(chosen) and os.environ.get("RANK", "0") == "0":
        print(one_line(f"{folder}: reads {len(chosen)} file(s) of split {split}; not read: "
                       f"{', '.join(others)}"))
    return [folder / name for name in chosen]


def split_of(name: Path) -> str:
    """The split of a file, from its name in its folder.

    >>> [split_of(Path(name)) for name in ("math/test/1.jsonl", "dev_set.csv", "a.csv")]
    ['test', 'validation', 'train']
    """
    if name.suffix == ".arrow" and name.parent.name:  # save_to_disk names a folder by its split
        return SPLITS.get(name.parent.name, name.parent.name)
    words = re.split(r"[-._ 0-9/]+", name.as_posix().lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "train")
