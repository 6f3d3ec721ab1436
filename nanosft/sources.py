"""Rows in: files and hub datasets, the known forms of a chat row, an ordered worker pool."""

import collections
import concurrent.futures
import itertools
import json
import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from nanosft.cli import UserError

# ----- reading rows ------------------------------------------------------------------------------


def read_rows(source: str, subset: str | None = None) -> Iterator[tuple[str, dict]]:
    """(place, row) of a .jsonl, .json or .parquet file or a hub dataset; errors name the place."""
    path = Path(source)
    readers = {".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet}
    if path.suffix in readers:
        yield from readers[path.suffix](require_file(path))
    elif path.exists() or source.startswith((".", "/", "~")):
        raise UserError(f"{require_file(path)}: expected a .jsonl, .json or .parquet file")
    else:
        yield from read_hub(source, subset)


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


def read_hub(name: str, subset: str | None) -> Iterator[tuple[str, dict]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split="train", streaming=True)
    except Exception as error:  # the hub raises many types; each means that nothing can be read
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name}: neither a local file nor a dataset on the hub ({reason})"
                        ) from error
    yield from ((f"{name} row {i}", row) for i, row in enumerate(rows, start=1))


# ----- a row of a dataset as messages ------------------------------------------------------------

# (prompt key, response key); `messages_of` handles three more forms
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
)
KNOWN_FORMS = "; ".join(f"{{{p}, {r}}}" for p, r in PAIRS) + "; {messages}; {conversations}; {text}"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def messages_of(row: dict) -> list[dict] | str:
    """A row of any known form as messages, or the string of a `{text}` row.

    >>> messages_of({"question": "2+2?", "answer": "4"})
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    if not isinstance(row, dict):
        raise UserError(f"expected an object, not a {type(row).__name__}")
    if "messages" in row:
        return row["messages"]
    if "conversations" in row:
        return sharegpt_messages(row["conversations"])
    for prompt, response in PAIRS:
        if prompt in row and response in row:
            for key in (prompt, response):
                if not isinstance(row[key], str):
                    raise UserError(f"`{key}` is {row[key]!r}, not a string")
            user = {"role": "user", "content": row[prompt]}
            if prompt == "instruction" and row.get("input"):
                user["input"] = row["input"]
            return [user, {"role": "assistant", "content": row[response]}]
    if isinstance(row.get("text"), str):
        if not row["text"]:
            raise UserError("`text` is empty")
        return row["text"]
    raise UserError(f"unknown form with keys {sorted(row)}; the known forms are {KNOWN_FORMS}")


def sharegpt_messages(turns: list[dict]) -> list[dict]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError("`conversations` must be a list of {from, value}")
    return [{"role": SHAREGPT_ROLES.get(str(turn.get("from")), turn.get("from")),
             "content": turn.get("value")} for turn in turns]


def mark_validation(examples: Iterator, fraction: float, seed: int) -> Iterator[tuple]:
    """(example, is_val): one random example of every 1/fraction goes to validation.

    With fewer than 1/fraction examples in total, but at least two, one still does.
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
    """work(chunk, *args) for each chunk, in order, on `workers` processes; few are in memory."""
    if workers == 1:
        yield from (work(chunk, *args) for chunk in chunks)
        return
    # fork inherits the loaded vocabulary; elsewhere each process loads its own
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = collections.deque()
        for chunk in chunks:
            waiting.append(pool.submit(work, chunk, *args))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
