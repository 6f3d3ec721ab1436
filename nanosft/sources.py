"""Rows in: files and hub datasets, the validation split, work on rows in parallel."""

import collections
import concurrent.futures
import glob
import itertools
import json
import logging
import multiprocessing
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanosft import files
from nanosft.cli import end_with
from nanosft.errors import UserError
from nanosft.files import ROW_FORMATS, Place
from nanosft.forms import Counts, Reading, examined, require_shallow, show, split_pair

# ----- sources of rows ---------------------------------------------------------------------------


class Source(NamedTuple):
    name: str  # a path or a hub id
    config: str | None
    split: str
    repeats: int
    given: str  # as the user wrote it: a folder or a pattern becomes several sources

    @property
    def identity(self) -> tuple:
        """Equal for two names of the same rows."""
        path = Path(self.name)
        name = path.resolve() if path.exists() else self.name
        return (name,) if path.is_file() else (name, self.config, self.split)


def parse_source(source: str, subset: str | None = None) -> Source:
    """PATH or ID[:CONFIG[:SPLIT]], and *N to read it N times; a path that exists wins.

    >>> parse_source("openai/gsm8k:main:test*2")[:4]
    ('openai/gsm8k', 'main', 'test', 2)
    """
    if not source.strip():  # a path "" would be the current folder
        raise UserError(f"{source!r}: no such file; name what to read")
    whole, star, repeats = source.rpartition("*")
    if not star or not repeats.isdecimal() or Path(source).exists():
        whole, repeats = source, "1"
    if int(repeats) < 1:
        raise UserError(f"{source}: *{repeats} must be *1 or more; leave the source out to read "
                        "none of it")
    if Path(whole).exists() or glob.has_magic(whole):
        return Source(whole, subset, "train", int(repeats), whole)
    drive = re.match(r"[A-Za-z]:(?=[/\\])|", whole)[0]  # of a path on Windows
    name, _, rest = whole.removeprefix(drive).partition(":")
    name = drive + name
    config, _, split = rest.partition(":")
    if ":" in split or (rest and Path(name).is_file()):
        raise UserError(f"{source}: expected ID[:CONFIG[:SPLIT]]; a file has neither")
    return Source(name, config or subset, split or "train", int(repeats), whole)


def find_sources(sources: Iterable[str], subset: str | None = None,
                 formats: Iterable[str] = ROW_FORMATS) -> list[Source]:
    """Files and hub datasets, each once: a folder or a pattern becomes its files, and what is named
    twice is one source that is read twice. UserError if one of them does not exist."""
    found = {}
    for source in sources:
        parsed = parse_source(source, subset)
        for name in names_in(parsed, formats):
            part = parsed._replace(name=name)
            first = found.setdefault(part.identity, part._replace(repeats=0))
            found[part.identity] = first._replace(repeats=first.repeats + part.repeats)
    return [*found.values()]


def names_in(source: Source, formats: Iterable[str]) -> list[str]:
    """The paths of a file, a folder, or a pattern, in order; or the hub id."""
    name, path = source.name, Path(source.name)
    paths = [path]
    if path.is_dir():
        if files.declares_files(path):
            return [name]
        if source.config and source.given.startswith(f"{name}:{source.config}"):
            split = files.SPLITS.get(source.config, source.split)
            raise UserError(f"{source.given}: this folder has no configurations, which its "
                            "README.md would declare; name a split as "
                            f"{shlex.quote(f'{name}::{split}')}")
        paths = files.folder_files(path, source.split, formats)
    elif glob.has_magic(name) and not path.exists():
        paths = [path for path in map(Path, sorted(glob.glob(name, recursive=True)))
                 if path.is_file()]
        if not paths:
            raise UserError(f"{name}: no file matches this pattern; correct it, or write SOURCE*2 "
                            "to read a source twice")
    elif not path.exists() and not path.is_symlink():
        is_id = "/" in name and ":" not in name and name[0] not in "./~"
        if is_id and files.format_of(path) not in formats:
            return [name]
        raise UserError(f"{source.given}: no such file; a dataset on the hub has an owner, as "
                        "openai/gsm8k")
    return [str(files.require_file(path, formats)) for path in paths]


def check_overlap(sources: Iterable[Source], val_sources: Iterable[Source]) -> None:
    """UserError if --val_source reads what --source reads."""
    trained = {source.identity: source for source in sources}
    for source in val_sources:
        if (same := trained.get(source.identity)) is not None:
            raise UserError(f"--val_source {source.given} is --source {same.given}: the model "
                            "would be judged on rows it was trained on; name other rows, or use "
                            "--val_fraction")


# ----- reading rows ------------------------------------------------------------------------------


def read_rows(source: str, subset: str | None = None) -> Iterator[tuple[Place, dict]]:
    """(place, row) of a file, a folder or a pattern of files, or a hub dataset."""
    return read_sources([source], Reading(subset=subset), Counts())


def read_sources(sources: Iterable[str], reading: Reading, counts: Counts,
                 ) -> Iterator[tuple[Place, dict]]:
    """(place, row) of each source in turn, if --where keeps the row; others are counted."""
    found = [source for source in find_sources(sources, reading.subset)
             for _ in range(source.repeats)]
    return files.checked((place, row) for _, place, row in select_rows(found, reading, counts))


def read_source(source: Source) -> Iterator[tuple[Place, dict | UserError]]:
    """(place, row) once; in place of a row that cannot be decoded, its UserError."""
    return (files.decode_file(Path(source.name)) if Path(source.name).is_file()
            else read_hub(source))


def texts_in(source: Source, chunk_chars: int) -> Iterator[tuple[str, bool]]:
    """(text, whether it ends a document); a .txt file is one document, read in pieces."""
    if files.format_of(source.name) == ".txt":
        yield from files.read_txt(Path(source.name), chunk_chars)
        return
    for place, row in files.checked(read_source(source)):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            there = list(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{place}: no `text` string (found: {there})")
        yield row["text"], True


def select_rows(sources: Iterable[Source], reading: Reading, counts: Counts,
                ) -> Iterator[tuple[Source, Place, dict | UserError]]:
    """(source, place, row) of each source in turn, as `read_source` gives it, under --where."""
    wanted, _ = [split_pair("--where", item) for item in reading.where], reading.mapping  # checked
    n_kept, first = 0, None
    for source in sources:
        for place, row in read_source(source):
            try:
                require_shallow("a value", row)
            except UserError as error:
                row = error
            values = [(column, value_text(row, column.removesuffix("!"))) for column, _ in wanted]
            first = first or (place, values, row)
            kept = all((pair == found) != pair[0].endswith("!")  # NAME!=VALUE
                       for pair, found in zip(wanted, values))
            if kept or not isinstance(row, dict):
                n_kept += 1
                yield source, place, row
            else:
                counts["where", "left out by --where"] += 1
    if first and not n_kept:
        place, values, row = first
        raise UserError(f"--where {shlex.join(reading.where)} leaves none of the rows; {place} has "
                        f"{show(', '.join(map('='.join, values)))} and the columns "
                        f"{show(sorted(row))}")


def value_text(row: dict, column: str) -> str:
    """A value as --where writes it: strings as they are, others as JSON (true, 3, null)."""
    value = row.get(column) if isinstance(row, dict) else None
    return value if isinstance(value, str) else json.dumps(value, default=str)


def read_hub(source: Source) -> Iterator[tuple[Place, dict]]:
    """Rows of a hub dataset, or of a copy of one, streamed: nothing is downloaded first."""
    import datasets

    for library in ("huggingface_hub", "datasets"):  # no line for each retry, none for its errors
        logging.getLogger(library).setLevel(logging.CRITICAL)
    name, config, split, _, given = source
    n = 0
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for n, row in enumerate(rows, start=1):
            yield Place(given, "row", n), row
    except Exception as error:  # the hub raises many types; each means that nothing can be read
        reason = " ".join(str(error).split())[:140]
        what, advice = f"cannot be read after row {n}", "check the network and try again"
        if "gated" in reason:
            what, advice = "a gated dataset", "accept its terms on its page, then `hf auth login`"
        elif Path(name).is_dir() or (not n and re.search("split|config", reason, re.IGNORECASE)):
            advice = f"name what exists as {name}:CONFIG:SPLIT, or pass the files one by one"
        elif getattr(error, "filename", None):
            what, advice = "cannot be cached", "set HF_HOME to a folder that can be written"
        elif not n:
            what = "neither a local file nor a dataset on the hub"
            advice = "check the id and the network, or pass the path of a file"
        raise UserError(f"{given}: {what} ({reason}); {advice}") from error


# ----- the validation split ----------------------------------------------------------------------


def mark_val(examples: Iterator, fraction: float, seed: int) -> Iterator[tuple]:
    """(example, is_val): one random example out of every 1/fraction goes to validation.

    With fewer than 1/fraction examples in total, but at least two, one still goes there.
    """
    rng, start = np.random.default_rng(seed), 0.0
    while fraction:
        size = int(start + 1 / fraction) - int(start)
        group, pick = list(itertools.islice(examples, size)), int(rng.integers(size))
        if start == 0 and 1 < len(group) < size:
            pick %= len(group)
        yield from ((example, i == pick) for i, example in enumerate(group))
        if len(group) < size:
            return
        start += 1 / fraction
    yield from ((example, False) for example in examples)


# ----- work in parallel, results in order --------------------------------------------------------


def chunked(items: Iterable, limit: int, size_of: Callable = lambda item: 1) -> Iterator[list]:
    """Lists of consecutive items whose sizes add up to `limit` or a little more."""
    chunk, size = [], 0
    for item in items:
        chunk.append(item)
        size += size_of(item)
        if size >= limit:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def map_splits(work: Callable, config, report, rows_per_chunk: int) -> Iterator[tuple]:
    """(split, source, work(row, config, counts)) of the rows of --source and --val_source.

    The copies of a row that is read N times stand together; one in validation has none.
    """
    train, val = (find_sources(names, config.subset)
                  for names in (config.source, config.val_source))
    check_overlap(train, val)
    fraction = 0 if val else config.val_fraction
    for split, sources in (("train", train), ("val", val)):
        results = map_rows(work, sources, config, report, rows_per_chunk)
        results = first_copies(results, config.max_examples)
        for (source, result, n), is_val in mark_val(results, fraction, config.seed):
            for _ in range(1 if is_val else n):
                yield "val" if is_val else split, source.given, result


def first_copies(results: Iterable[tuple], limit: int | None) -> Iterator[tuple]:
    """(source, result, how often it is used), which adds up to at most `limit`."""
    room = float("inf") if limit is None else limit
    for source, result in results:
        yield source, result, min(source.repeats, room)
        room -= source.repeats
        if room <= 0:
            return


def map_rows(work: Callable, sources: Iterable[Source], config, report, rows_per_chunk: int,
             ) -> Iterator[tuple]:
    """(source, work(row, config, counts)) of each row, in order, on --workers processes.

    A row for which `work` raises UserError is counted in the report, or raises (--on_bad_row).
    """
    rows = select_rows(sources, config, report.counts)
    chunks = chunked(examined(rows, config, config.on_bad_row == "error"), rows_per_chunk)
    for results, errors, counts in ordered_map(map_chunk, chunks, config.workers, work, config):
        report.reject(errors)
        if errors and config.on_bad_row == "error":
            raise UserError(f"{report.bad[0]}  (use --on_bad_row skip to leave out such rows)")
        report.counts.update(counts)
        yield from results


def map_chunk(chunk: list[tuple], work: Callable, config) -> tuple[list, list, Counts]:
    """A chunk of (source, place, row) -> [(source, result)], [(place, error)], and counts."""
    results, errors, counts = [], [], Counts()
    for source, place, row in chunk:
        try:
            if isinstance(row, UserError):  # it could not be decoded
                raise row
            results.append((source, work(row, config, counts)))
        except UserError as error:
            errors.append((place, str(error)))
    return results, errors, counts


def ordered_map(work: Callable, chunks: Iterable, workers: int, *args) -> Iterator:
    """work(chunk, *args) for each chunk, in order, on `workers` processes; few are held at once."""
    workers = min(workers, os.cpu_count() or 1)  # more would only take memory
    if sys.platform == "win32":
        workers = min(workers, 61)  # as many as concurrent.futures takes
    if workers == 1:
        yield from (work(chunk, *args) for chunk in chunks)
        return
    # fork inherits the loaded vocabulary. Windows has none, and macOS's libraries are not made for
    # it (bugs.python.org/issue33725): there, each process loads its own
    forks = hasattr(os, "fork") and sys.platform != "darwin"
    context = multiprocessing.get_context("fork" if forks else "spawn")
    with concurrent.futures.ProcessPoolExecutor(
            workers, context, start_worker, (os.getpid(),)) as pool:
        waiting = collections.deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(work, chunk, *args))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.BrokenExecutor as error:
            raise UserError("a worker process died: it was killed, or memory ran out; try fewer "
                            f"--workers than {workers}") from error


def start_worker(parent: int) -> None:
    """A worker ignores Ctrl-C and exits when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)
