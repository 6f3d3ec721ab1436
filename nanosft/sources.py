"""Rows in: files and hub datasets, what was found in them, an ordered worker pool."""

import collections
import concurrent.futures
import itertools
import json
import logging
import multiprocessing
import os
import re
import signal
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanosft.cli import UserError
from nanosft.forms import Counts, Reading, require_shallow, show, split_pair
from nanosft.process import end_with

# ----- reading rows ------------------------------------------------------------------------------


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
                 ) -> Iterator[tuple[str, dict]]:
    """(place, row) of each source in turn, if --where keeps the row; others are counted."""
    wanted, _ = [split_pair("--where", item) for item in reading.where], reading.mapping  # checked
    n_kept, first = 0, None
    for source in sources:
        for place, row in read_rows(source, reading.subset):
            require_shallow(place, row)
            found = [(column, value_text(row, column)) for column, _ in wanted]
            first = first or (place, found, row)
            if found == wanted or not isinstance(row, dict):
                n_kept += 1
                yield place, row
            else:
                counts["where", "left out by --where"] += 1
    if first and not n_kept:
        place, found, row = first
        values = ", ".join(map("=".join, found))
        raise UserError(f"--where {' '.join(reading.where)} leaves none of the rows; {place} has "
                        f"{show(values)} and the columns {show(sorted(row))}")


def value_text(row: dict, column: str) -> str:
    """A value as --where writes it: strings as they are, others as JSON (true, 3, null)."""
    value = row.get(column) if isinstance(row, dict) else None
    return value if isinstance(value, str) else json.dumps(value, default=str)


def read_rows(source: str, subset: str | None = None) -> Iterator[tuple[str, dict]]:
    """(place, row) of a .jsonl, .json or .parquet file, a folder of them, or a hub dataset."""
    readers = {".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet}
    parsed = parse_source(source, subset)
    path = Path(parsed.name)
    for _ in range(parsed.repeats):
        if path.is_dir():
            yield from read_hub(source, parsed)
        elif path.suffix in readers:
            yield from readers[path.suffix](require_file(path))
        elif path.exists() or source.startswith((".", "/", "~")):
            raise UserError(f"{require_file(path)}: expected a .jsonl, .json or .parquet file")
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


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield f"{path} line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path} line {number}: not JSON ({error})") from error


def read_json(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); name it .jsonl if it holds one object per "
                        "line") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a top-level list of rows, not a {type(rows).__name__}")
    yield from ((f"{path} row {i}", row) for i, row in enumerate(rows, start=1))


def read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a parquet file ({error})") from error
    rows = (row for batch in file.iter_batches(1000) for row in batch.to_pylist())
    yield from ((f"{path} row {i}", row) for i, row in enumerate(rows, start=1))


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


def read_hub(source: str, parsed: Source) -> Iterator[tuple[str, dict]]:
    """Rows of a hub dataset, or of a local folder, streamed: nothing is downloaded first."""
    import datasets

    for library in ("huggingface_hub", "datasets"):  # no line for each retry, none for its errors
        logging.getLogger(library).setLevel(logging.CRITICAL)
    place = source.partition("*")[0]
    try:
        rows = datasets.load_dataset(parsed.name, parsed.config, split=parsed.split, streaming=True)
        yield from ((f"{place} row {i}", row) for i, row in enumerate(rows, start=1))
    except Exception as error:  # the hub raises many types; each means that nothing can be read
        reason = " ".join(str(error).split())[:140]
        what = "neither a local file nor a dataset on the hub"
        advice = "check the id and the network, or pass the path of a .jsonl, .json or .parquet"
        if "gated" in reason:
            what, advice = "a gated dataset", "accept its terms on its page, then `hf auth login`"
        elif "split" in reason.lower() or "config" in reason.lower() or Path(parsed.name).is_dir():
            what, advice = "cannot be read", f"name one that exists: {parsed.name}:CONFIG:SPLIT"
        raise UserError(f"{place}: {what} ({reason}); {advice}") from error


# ----- what was found ----------------------------------------------------------------------------


def reason_of(error: str) -> str:
    """An error without its numbers, values and advice, to count rows by it.

    >>> reason_of("message 3 has role 'bob'; the known roles are user")
    'message N has role …'
    """
    what = re.sub(r"(['\"]).*?\1", "…", error).partition(";")[0]
    return re.sub(r"\d+", "N", re.sub(r"[\[{'\"].*", "…", what))[:100]  # `show` may cut a value


class Report:
    """What sft_data.py found in its rows: counts, the first bad rows, and copies.

    counts is {(kind, name): rows}; of each example it keeps two hashes, 16 bytes.
    """

    def __init__(self):
        self.counts, self.bad = Counts(), []
        self.hashes = {split: (array("q"), array("q")) for split in ("train", "val")}

    def reject(self, errors: list[tuple[str, str]]) -> None:
        """errors: (place, message)."""
        self.bad += [f"{place}: {error}" for place, error in errors[: 3 - len(self.bad)]]
        self.counts.update(("rejected", reason_of(error)) for _, error in errors)

    def keep(self, split: str, source: str, example: np.ndarray) -> None:
        """example: (2, n). Its prompt is what comes before the first trained token."""
        self.counts["source", source] += 1
        n_prompt = int(np.argmax(example[1] > 0)) or example.shape[1]  # a {text} row: all of it
        for hashes, part in zip(self.hashes[split], (example, example[0, :n_prompt])):
            hashes.append(hash(part.tobytes()))

    def of(self, kind: str) -> dict[str, int]:
        """{name: rows} of one kind, most first."""
        return {name: n for (of, name), n in self.counts.most_common() if of == kind}

    def check_splits(self, splits: dict[str, dict], config) -> None:
        """UserError if a split is empty, with the reason. config: that of sft_data.py."""
        n_bad = sum(self.of("rejected").values())
        for name, split in splits.items():
            if split["tokens"]:
                continue
            why = f"all {n_bad} rows were rejected; first: {self.bad[0]}" if n_bad else "no rows"
            if name == "val" and not config.val_source:
                why = f"--val_fraction {config.val_fraction} of {splits['train']['examples']} rows"
            raise UserError(f"the {name} split is empty ({why}); change --source, --val_source or "
                            "--val_fraction")

    def copies(self) -> tuple[int, int]:
        """(examples that repeat an earlier one; validation prompts that occur in training)."""
        (train, prompts), (val, val_prompts) = self.hashes["train"], self.hashes["val"]
        n_distinct = len(np.unique(np.concatenate([train, val])))
        return len(train) + len(val) - n_distinct, int(np.isin(val_prompts, prompts).sum())


def mark_val(examples: Iterator, fraction: float, seed: int) -> Iterator[tuple]:
    """(example, is_val): one random example of every 1/fraction goes to validation.

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


def chunked(items: Iterable, size_of: Callable, limit: int) -> Iterator[list]:
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
    """A worker leaves Ctrl-C to its parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)
