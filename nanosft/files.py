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
import tempfile
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


def require_file(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com/spec/"):
            raise UserError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    return path


def read_file(path: str | Path) -> Iterator[tuple[Place, dict]]:
    """(place, row) of a file of rows. UserError at the first row that cannot be decoded."""
    return checked(decode_file(Path(path)))


def checked(rows: Iterable[tuple]) -> Iterator[tuple]:
    """The same rows. UserError at the first one that could not be decoded."""
    for place, row in rows:
        if isinstance(row, UserError):
            raise UserError(f"{place}: {row}") from row
        yield place, row


def decode_file(path: Path) -> Iterator[tuple[Place, dict | UserError]]:
    """(place, row) of a file of rows; in place of a row that cannot be decoded, its UserError."""
    if format_of(path) not in ROW_FORMATS:
        raise UserError(f"{require_file(path)}: expected a file of {names_of(ROW_FORMATS)}")
    place = None
    try:
        for place, row in ROW_FORMATS[format_of(path)](require_file(path)):
            yield place, row
    except UserError:
        raise
    except Exception as error:  # the libraries raise many types; each means that it is damaged
        raise damaged(path, error, place and f" after {place.unit} {place.number}") from error


def names_of(formats: Iterable[str]) -> str:
    """`.json, .csv, or .txt (also .gz, .zst, .bz2)`"""
    *names, last = formats
    return f"{', '.join(names)}, or {last} (also {', '.join(COMPRESSIONS)})"


def damaged(path: Path, error: Exception, where: str | None = None) -> UserError:
    if isinstance(error, UnicodeError):
        return UserError(f"{path}: not UTF-8 text{where or ''} ({error.reason}); convert it")
    reason = " ".join(f"{error or type(error).__name__}".split())[:120]
    return UserError(f"{path}: damaged{where or ''}, or not a {path.suffix} file ({reason}); "
                     "get or make it again")


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
    delimiter = "\t" if format_of(path) == ".tsv" else ","
    with open_text(path, errors="surrogateescape", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        header = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(next(lines, []))]
        for name, n in collections.Counter(header).items():
            if n > 1:
                raise UserError(f"{path}: {n} columns have the name {name!r}; rename one")
        number = lines.line_num + 1
        for cells in lines:
            if cells:
                yield Place(str(path), "line", number), csv_row(header, cells)
            number = lines.line_num + 1


def csv_row(header: list[str], cells: list[str]) -> dict | UserError:
    if len(cells) != len(header):
        return UserError(f"{len(cells)} values, but the header has {len(header)}; put a text that "
                         "holds a separator or a line break in double quotes")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:  # open_text has kept what it could not decode
        return UserError("not UTF-8 text")
    return {name: cell or None for name, cell in zip(header, cells)}


def decode_parquet(path: Path) -> Iterator[tuple[Place, dict | UserError]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        yield from rows_of(path, file.iter_batches(1000))


def decode_arrow(path: Path) -> Iterator[tuple[Place, dict | UserError]]:
    """A stream of batches, as `Dataset.save_to_disk` writes it, or Arrow's format for files."""
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        if path.open("rb").read(6) == b"ARROW1":
            table = pyarrow.ipc.open_file(file)
            batches = map(table.get_batch, range(table.num_record_batches))
        else:
            batches = pyarrow.ipc.open_stream(file)
        yield from rows_of(path, batches)


def rows_of(path: Path, batches: Iterable) -> Iterator[tuple[Place, dict | UserError]]:
    rows = itertools.chain.from_iterable(map(decode_batch, batches))
    yield from ((Place(str(path), "row", i), row) for i, row in enumerate(rows, start=1))


def decode_batch(batch) -> list[dict | UserError]:
    try:
        batch.validate(full=True)  # reading a damaged offset would end the process
        return batch.to_pylist()
    except (ValueError, OverflowError):  # a string that is not UTF-8, a date that cannot be
        return [decode_row(batch, i) for i in range(len(batch))]


def decode_row(batch, i: int) -> dict | UserError:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            cell = column.slice(i, 1)
            cell.validate(full=True)
            row[name], = cell.to_pylist()
        except (ValueError, OverflowError) as error:
            return UserError(f"`{name}` cannot be decoded ({error})")
    return row


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
SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\b.*")  # of push_to_hub
# Not data: texts about it, and what datasets and huggingface_hub write beside it
ABOUT = {"readme", "license", "licence", "notice", "copying", "citation", "changelog", "authors",
         "contributing", "requirements"}
ABOUT_JSON = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
              "config.json", "metadata.json", "croissant.json"}


def folder_files(folder: Path, config: str | None, split: str, formats: Iterable[str],
                 ) -> list[Path]:
    """The files of a split of a folder. UserError if it is not clear which ones those are.

    What is left out, another split or a file that holds no rows, is printed.
    """
    splits, others = saved_splits(folder), []
    if splits is None:
        splits = declared_splits(folder, config)
    if splits is None:
        splits, others = splits_by_name(folder, formats)
        if config not in (None, "default"):
            raise UserError(f"{folder}: no configuration {config!r}, because its README.md "
                            f"declares none; leave it out: {folder}::{split}")
    if split not in splits:
        there = ", ".join([*splits, *others]) or "no file"
        raise UserError(f"{folder}: no split {split!r} (there is: {there}); name a split as "
                        f"{folder}::{next(iter(splits), 'SPLIT')}, or pass the files one by one")
    require_one_format(folder, splits, split)
    left_out = [f"{folder}::{name}" for name in splits if name != split] + others
    if left_out and os.environ.get("RANK", "0") == "0":
        more = f", and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        print(one_line(f"{folder}: reads {len(splits[split])} file(s) of split {split}; not read: "
                       f"{', '.join(left_out[:5])}{more}"))
    return splits[split]


def require_one_format(folder: Path, splits: dict[str, list[Path]], split: str) -> None:
    """UserError for files of several formats: often the same rows twice, or no rows at all."""
    counts = collections.Counter(path.name[path.name.lower().rindex(format_of(path)) :]
                                 for path in splits[split])
    if len(counts) > 1:
        there = ", ".join(f"{n} {ending}" for ending, n in counts.items())
        pattern = shlex.quote(f"{glob.escape(str(folder))}/**/*{counts.most_common(1)[0][0]}")
        raise UserError(f"{folder}: files of several formats ({there}); pass the files one by one"
                        + (f", or one format as {pattern}" if len(splits) == 1 else ""))


def saved_splits(folder: Path) -> dict[str, list[Path]] | None:
    """{split: files} of a folder that `save_to_disk` of datasets wrote; None for any other."""
    try:
        if (folder / "dataset_dict.json").is_file():
            names = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
            return {name: saved_splits(folder / name)["train"] for name in names}
        state = json.loads((folder / "state.json").read_bytes())
        return {"train": [folder / file["filename"] for file in state["_data_files"]]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def declared_splits(folder: Path, config: str | None) -> dict[str, list[Path]] | None:
    """{split: files} of a configuration that README.md declares; None if it declares none."""
    readme = folder / "README.md"
    if not readme.is_file() or not readme.read_bytes().startswith(b"---"):
        return None
    import datasets
    import huggingface_hub

    try:
        if "configs" not in (huggingface_hub.metadata_load(readme) or {}):
            return None
        with tempfile.TemporaryDirectory() as cache:  # the usual one may be read-only
            files = datasets.load_dataset_builder(str(folder), config, cache_dir=cache).config
        return {str(split): [*map(Path, paths)] for split, paths in files.data_files.items()}
    except Exception as error:  # datasets raises many types; each means that it cannot be resolved
        reason = " ".join(str(error).split())[:140]
        raise UserError(f"{readme}: its configurations cannot be used ({reason}); name one as "
                        f"{folder}:CONFIG:SPLIT, or pass the files one by one") from error


def splits_by_name(folder: Path, formats: Iterable[str]) -> tuple[dict[str, list[Path]], list[str]]:
    """({split: files}, names of files that hold no rows): the words of a path name its split.

    Hidden files, caches, and texts about the data are left out of both.
    """
    splits, others = collections.defaultdict(list), []
    for path in sorted(folder.rglob("*")):
        name, parts = path.relative_to(folder), path.relative_to(folder).parts
        is_about = name.name in ABOUT_JSON or (
            name.stem.lower() in ABOUT and format_of(path) not in (".jsonl", ".parquet"))
        if not path.is_file() or is_about or any(part.startswith((".", "__")) for part in parts):
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
    if shard := SHARD.fullmatch(name.as_posix()):
        return shard[1]
    words = [set(re.split(r"[-._ 0-9]+", part.lower())) for part in name.parts]
    return next((split for found in words for split in SPLIT_WORDS
                 if found & SPLIT_WORDS[split]), None)
