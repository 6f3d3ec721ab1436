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
    """The path. UserError if there is no such file, or none of these formats."""
    if not path.is_file():
        hub = "" if format_of(path) else "; a dataset on the hub has an owner, as openai/gsm8k"
        raise UserError(f"{path}: no such file{hub}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    if format_of(path) not in formats:
        *names, last = formats
        raise UserError(f"{path}: expected a file of {', '.join(names)}, or {last} (also "
                        f"{', '.join(COMPRESSIONS)})")
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


def decode_jsonl(path: Path) -> Iterator[tuple[Place, dict | UserError]]:
    with open_bytes(path) as file:
        is_utf8 = json.detect_encoding(file.peek(4)[:4]).startswith("utf-8")
        # json decodes a line of UTF-8 itself, so bad bytes cost one row and not the file
        for number, line in enumerate(file if is_utf8 else open_text(path, newline="\n"), start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    row = UserError(f"not JSON ({error})")
                yield Place(str(path), "line", number), row


def decode_json(path: Path) -> Iterator[tuple[Place, dict | UserError]]:
    """A list of rows; or one object per line, under the wrong name."""
    with open_bytes(path) as file:
        content = file.read()
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data" and error.doc.lstrip().startswith("{"):
            return (yield from decode_jsonl(path))
        raise UserError(f"{path}: not JSON ({error}); name it .jsonl if it holds one object per "
                        "line") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a top-level list of rows, not a {type(rows).__name__}")
    yield from ((Place(str(path), "row", i), row) for i, row in enumerate(rows, start=1))


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


def decode_parquet(path: Path) -> Iterator[tuple[Place, dict | UserError]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        yield from rows_of(path, file.iter_batches(1000))


def decode_arrow(path: Path) -> Iterator[tuple[Place, dict | UserError]]:
    """A stream of batches, as `Dataset.save_to_disk` writes it."""
    import pyarrow

    def valid(batch):
        batch.validate(full=True)  # reading at a damaged offset would end the process
        return batch

    with pyarrow.OSFile(str(path)) as file:
        yield from rows_of(path, map(valid, pyarrow.ipc.open_stream(file)))


def rows_of(path: Path, batches: Iterable) -> Iterator[tuple[Place, dict | UserError]]:
    rows = itertools.chain.from_iterable(map(decode_batch, batches))
    yield from ((Place(str(path), "row", i), row) for i, row in enumerate(rows, start=1))


def decode_batch(batch) -> list[dict | UserError]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date that cannot be
        if len(batch) == 1:
            return [UserError(f"cannot be decoded ({error})")]
        return [row for i in range(len(batch)) for row in decode_batch(batch.slice(i, 1))]


ROW_FORMATS = {".jsonl": decode_jsonl, ".ndjson": decode_jsonl, ".json": decode_json,
               ".csv": decode_csv, ".tsv": decode_csv, ".parquet": decode_parquet,
               ".arrow": decode_arrow}
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
SPLIT_WORDS = {"train": {"train", "training"}, "validation": {"validation", "valid", "dev", "val"},
               "test": {"test", "testing", "eval", "evaluation"}}
# Not data but about it, or what datasets writes beside it
ABOUT = re.compile(r"(readme|licen[cs]e|notice|copying|citation|changelog|requirements)([-_]\w+)?"
                   r"(\.(md|txt))?|(dataset_infos?|dataset_dict|state|config|metadata)\.json|"
                   r"cache-\w+\.arrow", re.IGNORECASE)


def folder_files(folder: Path, split: str, formats: Iterable[str]) -> list[Path]:
    """The files of a split of a folder. UserError if it is not clear which ones those are.

    What is left out, another split or a file that holds no rows, is printed.
    """
    splits, others = splits_by_name(folder, formats)
    if split not in splits:
        raise UserError(f"{folder}: no split {split!r} (there is: "
                        f"{', '.join([*splits, *others]) or 'no file'}); name a split as "
                        f"{folder}::{next(iter(splits), 'SPLIT')}, or pass the files one by one")
    counts = collections.Counter(path.name[path.name.lower().rindex(format_of(path)) :]
                                 for path in splits[split])
    if len(counts) > 1:  # often the same rows twice, or a file without rows
        there = ", ".join(f"{n} {ending}" for ending, n in counts.items())
        pattern = shlex.quote(f"{glob.escape(str(folder))}/**/*{counts.most_common(1)[0][0]}")
        raise UserError(f"{folder}: files of several formats ({there}); pass the files one by one"
                        + (f", or one format as {pattern}" if len(splits) == 1 else ""))
    left_out = [f"{folder}::{name}" for name in splits if name != split] + others
    if left_out and os.environ.get("RANK", "0") == "0":
        print(one_line(f"{folder}: reads {len(splits[split])} file(s) of split {split}; not read: "
                       f"{', '.join(left_out)}"))
    return splits[split]


def declares_files(folder: Path) -> bool:
    """Does its README.md say which files there are, as that of a hub dataset?"""
    readme = folder / "README.md"
    return readme.is_file() and b"\nconfigs:" in readme.read_bytes().partition(b"\n---")[0]


def splits_by_name(folder: Path, formats: Iterable[str]) -> tuple[dict[str, list[Path]], list[str]]:
    """({split: files}, names of files that hold no rows): the words of a path name its split.

    Hidden files, caches, and texts about the data are left out of both.
    """
    splits, others = collections.defaultdict(list), []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() or ABOUT.fullmatch(path.name) or any(
                part.startswith((".", "__")) for part in name.parts):
            continue
        if format_of(path) in formats:
            splits[split_of(name)].append(path)
        else:
            others.append(str(name))
    unnamed = splits.pop(None, [])
    if unnamed and splits:
        raise UserError(f"{folder}: the name of {unnamed[0].relative_to(folder)} has no split, but "
                        f"others have ({', '.join(splits)}); pass the files one by one")
    return {"train": unnamed} if unnamed else dict(splits), others


def split_of(name: Path) -> str | None:
    """The split of a file, from its name in its folder.

    >>> split_of(Path("math/train/0001.jsonl")), split_of(Path("dev_set.csv"))
    ('train', 'validation')
    """
    words = [set(re.split(r"[-._ 0-9]+", part.lower())) for part in name.parts]
    return next((split for found in words for split in SPLIT_WORDS
                 if found & SPLIT_WORDS[split]), None)
