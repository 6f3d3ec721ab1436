"""Text corpora to shards of uint16 token ids: the data that GPT-2 is pretrained on.

    python fineweb.py --out data/fineweb                                  # FineWeb-Edu from the hub
    python fineweb.py --source a.txt b.jsonl --encoding bytes --out data/mine   # files of your own

Writes OUT/train_000000.npy, … and OUT/val_000000.npy, each a flat array of ids in which every
document ends with <|endoftext|>, and OUT/meta.json, last: a folder without it is unfinished.
The bytes of the shards do not depend on the number of workers. About 1 M gpt2 tokens/s on 2 cores.

The middle of this file is the shard format itself, which sft_data.py (one more row) shares.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from tokenizer import get_encoding

FORMAT_VERSION = 1
CHUNK_CHARS = 200_000  # of text a worker takes at a time; 0.1 to 1 M characters measure the same


@dataclasses.dataclass
class Config:
    """Turn text into uint16 shards for train_gpt2.py."""

    out: str
    """folder for the shards; must not exist yet, or be empty"""
    source: tuple[str, ...] = ("HuggingFaceFW/fineweb-edu",)
    """.txt, .jsonl, .json or .parquet files (rows need a `text`), or one hub dataset id"""
    subset: str | None = None
    """the hub dataset's configuration (default for FineWeb-Edu: sample-10BT)"""
    encoding: Literal["gpt2", "bytes"] = "gpt2"
    shard_tokens: int = 100_000_000
    """tokens in a shard (200 MB)"""
    val_tokens: int = 1_000_000
    """the first tokens become the validation split, at most a tenth of all; 0: none"""
    max_tokens: int | None = None
    """stop after this many tokens"""
    workers: int = os.cpu_count() or 1


# ----- reading rows ------------------------------------------------------------------------------


def read_rows(source: str, subset: str | None = None) -> Iterator[tuple[str, dict]]:
    """(place, row) of a .jsonl, .json or .parquet file or a hub dataset; place is for messages."""
    path = Path(source)
    if path.suffix == ".jsonl":
        yield from _read_jsonl(_existing(path))
    elif path.suffix == ".json":
        yield from _read_json(_existing(path))
    elif path.suffix == ".parquet":
        yield from _read_parquet(_existing(path))
    elif path.exists() or source.startswith((".", "/", "~")):
        raise ValueError(f"{_existing(path)}: expected a .jsonl, .json or .parquet file")
    else:
        yield from _read_hub(source, subset)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    return path


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield f"{path} line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path} line {number}: not JSON ({error})") from error


def _read_json(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); one object a line needs .jsonl") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a list of rows belongs at the top, not a {type(rows).__name__}")
    yield from ((f"{path} row {i}", row) for i, row in enumerate(rows, start=1))


def _read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from error
    rows = (row for batch in file.iter_batches(1000) for row in batch.to_pylist())
    yield from ((f"{path} row {i}", row) for i, row in enumerate(rows, start=1))


def _read_hub(name: str, subset: str | None) -> Iterator[tuple[str, dict]]:
    import datasets

    if name.endswith("/fineweb-edu") and subset is None:
        subset = "sample-10BT"
    try:
        rows = datasets.load_dataset(name, subset, split="train", streaming=True)
    except Exception as error:  # the hub's errors are many; each means that there is no such source
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name}: neither a file here nor a dataset of the hub ({reason})"
        ) from error
    yield from ((f"{name} row {i}", row) for i, row in enumerate(rows, start=1))


def read_texts(sources: Iterable[str], subset: str | None = None) -> Iterator[tuple[str, bool]]:
    """(text, does a document end here?); a .txt file is one document, read in pieces."""
    for source in sources:
        if source.endswith(".txt"):
            yield from _read_txt(_existing(Path(source)))
            continue
        for place, row in read_rows(source, subset):
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                keys = list(row) if isinstance(row, dict) else type(row).__name__
                raise ValueError(f"{place}: no `text` that is a string (found: {keys})")
            yield row["text"], True


# A newline between two visible characters: GPT-2's pattern always cuts there, on both sides of the
# newline, so the pieces' tokens are those of the whole text. Without one the text is not cut.
SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")


def _read_txt(path: Path) -> Iterator[tuple[str, bool]]:
    text = ""
    try:
        with path.open(encoding="utf-8") as file:
            while block := file.read(CHUNK_CHARS):
                new = max(0, len(text) - 1)  # no cut lies before it
                text += block
                cut = max((match.end() for match in SAFE_CUT.finditer(text, new)), default=0)
                if cut:
                    yield text[:cut], False
                    text = text[cut:]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from error
    yield text, True


# ----- shards: the format that pretraining and SFT share -----------------------------------------


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class ShardWriter:
    """Appends arrays of ids to `<split>_000000.npy`, `<split>_000001.npy`, …

    Pieces are (n,) in pretraining, where a document may go on in the next shard, and (2, n) in SFT,
    where an example never does.
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.pieces, self.buffered, self.shards = [], 0, []

    def add(self, piece: np.ndarray) -> None:
        while self.buffered + piece.shape[-1] > self.shard_tokens:
            room = self.shard_tokens - self.buffered if piece.ndim == 1 else 0
            if piece.ndim == 2 and not self.buffered:
                break  # one example longer than a shard: the shard grows
            self.pieces.append(piece[..., :room])
            self.flush()
            piece = piece[..., room:]
        self.pieces.append(piece)
        self.buffered += piece.shape[-1]

    def flush(self) -> None:
        ids = np.concatenate(self.pieces, axis=-1) if self.pieces else np.empty(0, np.uint16)
        self.pieces, self.buffered = [], 0
        if not ids.size:
            return
        path = self.folder / f"{self.split}_{len(self.shards):06d}.npy"
        np.save(path, ids)
        shard = {"file": path.name, "tokens": ids.shape[-1], "sha256": sha256_of(path)}
        self.shards.append(shard)

    def finish(self, **counts: int) -> dict:
        """The split's entry in meta.json."""
        self.flush()
        tokens = sum(shard["tokens"] for shard in self.shards)
        return {**counts, "tokens": tokens, "shards": len(self.shards), "files": self.shards}


def check_new_folder(out: str, what: str = "shards") -> Path:
    """ValueError if `out` holds anything: nothing of a user's is ever overwritten."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {out} exists and is not empty; delete it or choose another folder")
    return folder


class NewFolder:
    """`with NewFolder(out) as tmp:` tmp becomes `out` at the end, or leaves nothing behind."""

    def __init__(self, out: str):
        self.out = check_new_folder(out)
        self.tmp = self.out.with_name(f"{self.out.name}.tmp{os.getpid()}")

    def __enter__(self) -> Path:
        self.tmp.mkdir(parents=True)
        return self.tmp

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            if self.out.exists():
                self.out.rmdir()  # it was empty
            self.tmp.rename(self.out)
        else:
            shutil.rmtree(self.tmp)


def write_meta(folder: Path, meta: dict) -> None:
    """meta.json, last and atomically: it says that the folder is complete."""
    tmp = folder / "meta.json.tmp"
    tmp.write_text(json.dumps({"version": FORMAT_VERSION, **meta}, indent=1) + "\n")
    tmp.rename(folder / "meta.json")


def read_meta(data: str, kind: str) -> dict:
    """The folder's meta.json. ValueError: unfinished, or not of this kind (`text` or `sft`)."""
    path = Path(data) / "meta.json"
    made_by = {"text": "fineweb.py", "sft": "sft_data.py"}
    if not path.is_file():
        state = "is unfinished (no meta.json)" if Path(data).is_dir() else "does not exist"
        raise ValueError(f"--data {data} {state}; make it with {made_by[kind]}")
    try:
        meta = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not JSON ({error}); remake the data") from error
    if (version := meta.get("version")) != FORMAT_VERSION:
        raise ValueError(f"{path}: format version {version}, expected {FORMAT_VERSION}")
    if meta["kind"] != kind:
        raise ValueError(
            f"--data {data} was made by {made_by.get(meta['kind'])}; {made_by[kind]}'s is needed"
        )
    return meta


def open_shards(data: str, meta: dict, split: str) -> list[np.ndarray]:
    """Memory maps of a split's shards, length and dtype checked. Nothing is read yet."""
    if split not in meta["splits"]:
        raise ValueError(f"--data {data} has no {split} split, only {list(meta['splits'])}")
    shards = []
    for shard in meta["splits"][split]["files"]:
        path = Path(data) / shard["file"]
        try:
            ids = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"{path}: missing, truncated or no .npy ({error}); remake it"
            ) from error
        if ids.dtype != np.uint16 or ids.ndim != {"text": 1, "sft": 2}[meta["kind"]]:
            raise ValueError(
                f"{path}: {ids.dtype} with {ids.ndim} axes, expected uint16; remake it"
            )
        if ids.shape[-1] != shard["tokens"]:
            raise ValueError(
                f"{path}: {ids.shape[-1]} tokens where meta.json says {shard['tokens']}; remake it"
            )
        shards.append(ids)
    return shards


def verify_shard(data: str, shard: dict) -> None:
    """ValueError if the shard's bytes are not those that meta.json names."""
    path = Path(data) / shard["file"]
    if (found := sha256_of(path)) != shard["sha256"]:
        raise ValueError(
            f"{path}: sha256 {found[:12]}… where meta.json says {shard['sha256'][:12]}…; remake it"
        )


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
    """`work(chunk, *args)` of every chunk, in order, on `workers` processes; few wait in memory."""
    if workers <= 1:
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


# ----- the command -------------------------------------------------------------------------------


def encode_texts(chunk: list[tuple[str, bool]], encoding_name: str) -> np.ndarray:
    """The ids of the chunk's texts, uint16 (n,), <|endoftext|> after each document."""
    encoding = get_encoding(encoding_name)
    ids = []
    for text, document_ends in chunk:
        ids += encoding.encode_ordinary(text)
        if document_ends:
            ids.append(encoding.eot_token)
    return np.array(ids, dtype=np.uint16)


def first_tokens(pieces: Iterator[np.ndarray], limit: int) -> Iterator[np.ndarray]:
    for piece in pieces:
        yield piece[:limit]
        limit -= len(piece)
        if limit <= 0:
            return


def split_off(pieces: Iterator[np.ndarray], val_tokens: int, eot: int) -> tuple:
    """(validation ids, an iterator over the rest): the first val_tokens, at most a tenth of all."""
    head, size = [], 0
    for piece in pieces:
        head.append(piece)
        size += len(piece)
        if size >= 10 * val_tokens:
            break
    ids = np.concatenate(head or [np.empty(0, np.uint16)])
    val = ids[: min(val_tokens, size // 10)]
    rest = ids[len(val) :]
    if len(val) and val[-1] != eot:
        val = np.append(val, np.uint16(eot))  # the cut ends a document, too

    def remaining():
        yield rest
        yield from pieces

    return val, remaining()


def run_cli(main: Callable, config_class: type) -> None:
    """Parse the flags, run main; what a user can cause ends in one line and exit code 2."""
    import tyro

    try:
        main(tyro.cli(config_class, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
    except (ValueError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once, not once a rank
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main(config: Config) -> None:
    from tqdm import tqdm

    limit = sys.maxsize if config.max_tokens is None else config.max_tokens
    if min(config.shard_tokens, config.workers, limit) < 1 or config.val_tokens < 0:
        raise ValueError("--shard_tokens, --workers and --max_tokens start at 1, --val_tokens at 0")
    encoding = get_encoding(config.encoding)
    with NewFolder(config.out) as folder:
        texts = read_texts(config.source, config.subset)
        chunks = chunked(texts, lambda item: len(item[0]), CHUNK_CHARS)
        pieces = ordered_map(encode_texts, chunks, config.workers, config.encoding)
        pieces = first_tokens(pieces, limit)
        val, train = split_off(pieces, config.val_tokens, encoding.eot_token)

        splits = {}
        for split, part in (("val", iter([val])), ("train", train)):
            writer = ShardWriter(folder, split, config.shard_tokens)
            bar = tqdm(desc=split, unit="tok", unit_scale=True, disable=None)  # None: no terminal
            for piece in part:
                writer.add(piece)
                bar.update(len(piece))
            bar.close()
            entry = writer.finish()
            if entry["tokens"]:
                splits[split] = entry
        if "train" not in splits:
            raise ValueError(f"{' '.join(config.source)}: no text in it")
        write_meta(
            folder,
            {
                "kind": "text",
                "encoding": config.encoding,
                "vocab_size": encoding.n_vocab,
                "source": list(config.source),
                "splits": dict(reversed(splits.items())),
            },
        )
    for split, entry in splits.items():
        print(f"{split:5}  {entry['tokens']:>13,} tokens in {entry['shards']} shard(s)")
    print(f"next: torchrun --standalone --nproc_per_node=1 train_gpt2.py --data {config.out} "
          "--out out/base")  # fmt: skip


if __name__ == "__main__":
    run_cli(main, Config)
