"""Rows in: files and hub datasets, the validation split, work on rows in parallel."""

import collections
import concurrent.futures
import itertools
import json
import logging
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanosft.cli import end_with
from nanosft.errors import UserError
from nanosft.forms import Counts, Reading, require_shallow, show, split_pair

# ----- reading rows ------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a row stands; as text for example `a.jsonl line 7`."""

    source: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.source} {self.unit} {self.number}"


class Source(NamedTuple):
    name: str  # a path or a hub id
    config: str | None
    split: str
    repeats: int


def parse_source(source: str, subset: str | None = None) -> Source:
    """PATH or ID[:CONFIG[:SPLIT]], and *N to read it N times; a path that exists wins.

    >>> parse_source("openai/gsm8k:main:test*2")
    Source(name='openai/gsm8k', config='main', split='test', repeats=2)
    """
    whole, repeats = source, "1"
    if "*" in source and not Path(source).exists():
        whole, _, repeats = source.rpartition("*")
    if not repeats.isdecimal() or int(repeats) < 1:
        raise UserError(f"{source}: *{repeats} must be *1 or more; leave the source out to read "
                        "none of it")
    if Path(whole).exists():
        return Source(whole, subset, "train", int(repeats))
    name, _, rest = whole.partition(":")
    config, _, split = rest.partition(":")
    if ":" in split or (rest and Path(name).is_file()):
        raise UserError(f"{source}: expected ID[:CONFIG[:SPLIT]]; a file has neither")
    return Source(name, config or subset, split or "train", int(repeats))


def check_overlap(sources: Iterable[str], val_sources: Iterable[str], subset: str | None) -> None:
    """UserError if --val_source reads what --source reads."""

    def identity(source: str) -> tuple:
        name, *rest, _ = parse_source(source, subset)
        return (str(Path(name).resolve()) if Path(name).exists() else name, *rest)

    trained = {identity(source): source for source in sources}
    for source in val_sources:
        if (same := trained.get(identity(source))) is not None:
            raise UserError(f"--val_source {source} is --source {same}: the model would be judged "
                            "on rows it was trained on; name other rows, or use --val_fraction")


def read_sources(sources: Iterable[str], reading: Reading, counts: Counts,
                 ) -> Iterator[tuple[Place, dict]]:
    """(place, row) of each source in turn, if --where keeps the row; others are counted."""
    wanted, _ = [split_pair("--where", item) for item in reading.where], reading.mapping  # checked
    n_kept, first = 0, None
    for source in sources:
        for place, row in read_rows(source, reading.subset):
            require_shallow(str(place), row)
            values = [(column, value_text(row, column)) for column, _ in wanted]
            first = first or (place, values, row)
            if values == wanted or not isinstance(row, dict):
                n_kept += 1
                yield place, row
            else:
                counts["where", "left out by --where"] += 1
    if first and not n_kept:
        place, values, row = first
        raise UserError(f"--where {' '.join(reading.where)} leaves none of the rows; {place} has "
                        f"{show(', '.join(map('='.join, values)))} and the columns "
                        f"{show(sorted(row))}")


def value_text(row: dict, column: str) -> str:
    """A value as --where writes it: strings as they are, others as JSON (true, 3, null)."""
    value = row.get(column) if isinstance(row, dict) else None
    return value if isinstance(value, str) else json.dumps(value, default=str)


def read_rows(source: str, subset: str | None = None) -> Iterator[tuple[Place, dict]]:
    """(place, row) of a .jsonl, .json, or .parquet file, a folder of them, or a hub dataset."""
    readers = {".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet}
    parsed = parse_source(source, subset)
    path = Path(parsed.name)
    for _ in range(parsed.repeats):
        if path.is_dir():
            yield from read_hub(source, parsed)
        elif path.suffix in readers:
            yield from readers[path.suffix](require_file(path))
        elif path.exists() or source.startswith((".", "/", "~")):
            raise UserError(f"{require_file(path)}: expected a .jsonl, .json, or .parquet file")
        elif "/" not in parsed.name:  # load_dataset("json") would read the current folder
            raise UserError(f"{parsed.name}: no such file; a dataset on the hub has an owner, as "
                            "openai/gsm8k")
        else:
            yield from read_hub(source, parsed)


def require_file(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    return path


def read_jsonl(path: Path) -> Iterator[tuple[Place, dict]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = Place(str(path), "line", number)
                try:
                    yield place, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{place}: not JSON ({error})") from error


def read_json(path: Path) -> Iterator[tuple[Place, dict]]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); name it .jsonl if it holds one object per "
                        "line") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a top-level list of rows, not a {type(rows).__name__}")
    yield from ((Place(str(path), "row", i), row) for i, row in enumerate(rows, start=1))


def read_parquet(path: Path) -> Iterator[tuple[Place, dict]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a parquet file ({error})") from error
    rows = (row for batch in file.iter_batches(1000) for row in batch.to_pylist())
    yield from ((Place(str(path), "row", i), row) for i, row in enumerate(rows, start=1))


# A newline between two visible characters: GPT-2's pattern always splits on both sides of it, so
# the pieces have the same tokens as the whole text. A text without one is not cut.
SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")


def read_txt(path: Path, chunk_chars: int) -> Iterator[tuple[str, bool]]:
    """(piece of the text, whether it is the last); pieces have about `chunk_chars` characters."""
    text = ""
    try:
        with path.open(encoding="utf-8") as file:
            while block := file.read(chunk_chars):
                new = max(0, len(text) - 1)  # no cut is possible before it
                text += block
                cut = max((match.end() for match in SAFE_CUT.finditer(text, new)), default=0)
                if cut:
                    yield text[:cut], False
                    text = text[cut:]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from error
    yield text, True


def read_hub(source: str, parsed: Source) -> Iterator[tuple[Place, dict]]:
    """Rows of a hub dataset, or of a local folder, streamed: nothing is downloaded first."""
    import datasets

    for library in ("huggingface_hub", "datasets"):  # no line for each retry, none for its errors
        logging.getLogger(library).setLevel(logging.CRITICAL)
    place = source.partition("*")[0]
    try:
        rows = datasets.load_dataset(parsed.name, parsed.config, split=parsed.split, streaming=True)
        yield from ((Place(place, "row", i), row) for i, row in enumerate(rows, start=1))
    except Exception as error:  # the hub raises many types; each means that nothing can be read
        reason = " ".join(str(error).split())[:140]
        what = "neither a local file nor a dataset on the hub"
        advice = "check the id and the network, or pass the path of a .jsonl, .json, or .parquet"
        if "gated" in reason:
            what, advice = "a gated dataset", "accept its terms on its page, then `hf auth login`"
        elif "split" in reason.lower() or "config" in reason.lower() or Path(parsed.name).is_dir():
            what, advice = "cannot be read", f"name one that exists: {parsed.name}:CONFIG:SPLIT"
        raise UserError(f"{place}: {what} ({reason}); {advice}") from error


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
    """(split, source, work(row, config, counts)) of the rows of --source and --val_source."""
    check_overlap(config.source, config.val_source, config.subset)
    fraction = 0 if config.val_source else config.val_fraction
    for part, sources in (("train", config.source), ("val", config.val_source)):
        results = map_rows(work, sources, config, report, rows_per_chunk)
        results = itertools.islice(results, config.max_examples)
        for (source, result), is_val in mark_val(results, fraction, config.seed):
            yield "val" if is_val else part, source, result


def map_rows(work: Callable, sources: Iterable[str], config, report, rows_per_chunk: int,
             ) -> Iterator[tuple]:
    """(source, work(row, config, counts)) of each row, in order, on --workers processes.

    A row for which `work` raises UserError is counted in the report, or raises (--on_bad_row).
    """
    chunks = chunked(read_sources(sources, config, report.counts), rows_per_chunk)
    for results, errors, counts in ordered_map(map_chunk, chunks, config.workers, work, config):
        report.reject(errors)
        if errors and config.on_bad_row == "error":
            raise UserError(f"{report.bad[0]}  (use --on_bad_row skip to leave out such rows)")
        report.counts.update(counts)
        yield from results


def map_chunk(chunk: list[tuple], work: Callable, config) -> tuple[list, list, Counts]:
    """A chunk of (place, row) -> [(source, result)], [(place, error)], and counts."""
    results, errors, counts = [], [], Counts()
    for place, row in chunk:
        try:
            results.append((place.source, work(row, config, counts)))
        except UserError as error:
            errors.append((place, str(error)))
    return results, errors, counts


def ordered_map(work: Callable, chunks: Iterable, workers: int, *args) -> Iterator:
    """work(chunk, *args) for each chunk, in order, on `workers` processes; few are held at once."""
    workers = min(workers, os.cpu_count() or 1)  # more would only take memory
    if workers == 1:
        yield from (work(chunk, *args) for chunk in chunks)
        return
    # fork inherits the loaded vocabulary; elsewhere each process loads its own
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
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
