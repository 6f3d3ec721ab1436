"""The shard format that fineweb.py and sft_data.py write and the trainers read.

A data folder holds `<split>_000000.npy`, … of uint16 ids, (N,) for text and (2, N) for chats, and
meta.json, which is written last: a folder without it is unfinished. See data/README.md.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from nanosft.errors import UserError, explain_write_errors, write_json, written_atomically
from nanosft.machine import first_on_machine

VERSIONS = {"text": (1,), "sft": (1, 2)}  # of meta.json that are read; the last one is written
AGAIN = "make the data again"
SUMS = "SHA256SUMS"  # of the files beside it, as `sha256sum -c SHA256SUMS` reads them
MADE_BY = {"text": "fineweb.py", "sft": "sft_data.py"}
NDIM = {"text": 1, "sft": 2}


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_sums(folder: Path, files: Iterable[Path]) -> None:
    lines = [f"{sha256_of(path)}  {path.name}\n" for path in sorted(files)]
    (folder / SUMS).write_text("".join(lines), "utf-8")


def verify(path: Path) -> Path:
    """The path. UserError if SHA256SUMS beside the file has another sum for it, or none."""
    sums = path.with_name(SUMS)  # other programs' folders have no such file
    if sums.is_file():
        lines = sums.read_text("utf-8", errors="replace").splitlines()
        with first_on_machine(f"sha256 of {path}") as is_intact:
            if not is_intact and f"{sha256_of(path)}  {path.name}" not in lines:
                raise UserError(f"{path}: damaged or changed, its sha256 is not in {SUMS}; use "
                                f"another copy or, if you changed it yourself, delete {SUMS}")
    return path


# ----- writing -----------------------------------------------------------------------------------


class ShardWriter:
    """Writes arrays of ids to `<split>_000000.npy`, `<split>_000001.npy`, …

    Pieces are (n,) for text, where a document may continue in the next shard, and (2, n) for chats,
    where an example never does.
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.pieces, self.buffered, self.shards = [], 0, []

    def add(self, piece: np.ndarray) -> None:
        while self.buffered + piece.shape[-1] > self.shard_tokens:
            room = self.shard_tokens - self.buffered if piece.ndim == 1 else 0
            if piece.ndim == 2 and not self.buffered:
                break  # a single example longer than a shard: the shard grows
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
        path = self.folder / shard_name(self.split, len(self.shards))
        ids = np.ascontiguousarray(ids)
        with explain_write_errors(path), path.open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, np.lib.format.header_data_from_array_1_0(ids))
            file.write(ids)  # np.save() misses an out-of-space error on its final flush
        shard = {"file": path.name, "tokens": ids.shape[-1], "sha256": sha256_of(path)}
        self.shards.append(shard)

    def finish(self, **counts: int) -> dict:
        """The split's entry in meta.json."""
        self.flush()
        tokens = sum(shard["tokens"] for shard in self.shards)
        return {**counts, "tokens": tokens, "shards": len(self.shards), "files": self.shards}


def shard_name(split: str, i: int) -> str:
    return f"{split}_{i:06d}.npy"


def write_meta(folder: Path, meta: dict) -> None:
    """Write meta.json, last and atomically: it marks the folder as complete."""
    path, version = folder / "meta.json", VERSIONS[meta["kind"]][-1]
    with explain_write_errors(path), written_atomically(path) as tmp:
        write_json(tmp, {"version": version, **meta})  # with the sums of the shards
        (folder / SUMS).write_text(f"{sha256_of(tmp)}  meta.json\n", "utf-8")


def check_empty(out: str | Path, advice: str = "delete it or choose another folder") -> Path:
    """`out` as a path. UserError if it is not empty: a user's files are never overwritten."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {out} exists and is not empty; {advice}")
    return folder


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """OUT.tmp, which becomes `out` at the end; on any error but a kill nothing is left behind."""
    folder = check_empty(out)
    tmp = folder.with_name(f"{folder.name}.tmp")
    if tmp.exists():
        raise UserError(f"{tmp}: left by a command that was killed or still runs; delete it")
    tmp.mkdir(parents=True)
    try:
        yield tmp
        if folder.exists():
            folder.rmdir()  # it is empty; on Windows a folder replaces no other
        tmp.rename(folder)
    except BaseException:
        shutil.rmtree(tmp)
        raise


# ----- reading -----------------------------------------------------------------------------------


def read_meta(data: str, kind: str) -> dict:
    """meta.json of a data folder. UserError: unfinished, or not of this kind (`text` or `sft`)."""
    path, made_by = Path(data) / "meta.json", MADE_BY[kind]
    if not path.is_file():
        state = "is unfinished (no meta.json)" if Path(data).is_dir() else "does not exist"
        raise UserError(f"--data {data} {state}; make it with {made_by}")
    try:
        meta = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not a JSON object ({error}); {AGAIN}") from error
    found, n_vocab = meta.get("kind"), meta.get("vocab_size")
    if found != kind and found in [*MADE_BY]:
        raise UserError(f"--data {data} was made by {MADE_BY[found]}; this command needs data made "
                        f"by {made_by}")
    if meta.get("version") not in VERSIONS[kind]:
        raise UserError(f"{path}: format version {meta.get('version')}, expected "
                        f"{VERSIONS[kind][-1]}; {AGAIN} with {made_by}")
    holds = {"kind": found == kind, "encoding": isinstance(meta.get("encoding"), str),
             "vocab_size": type(n_vocab) is int and 0 < n_vocab <= 2**16,  # ids are uint16
             "splits": are_splits(meta.get("splits"))}
    for key in (key for key, good in holds.items() if not good):
        raise UserError(f"{path}: damaged ({key} is {str(meta.get(key))[:60]!r}); {AGAIN}")
    verify(path)
    return meta


def are_splits(splits) -> bool:
    """Is it {split: {"tokens": 5, "files": [{"file": …, "tokens": 5, "sha256": …}]}, …}?"""
    try:
        return bool(splits) and all(
            split["tokens"] == sum(shard["tokens"] for shard in split["files"]) > 0
            and all(type(shard["tokens"]) is int and isinstance(shard["sha256"], str)
                    and shard["file"] == shard_name(name, i)
                    for i, shard in enumerate(split["files"]))
            for name, split in splits.items())
    except (AttributeError, KeyError, TypeError):
        return False


class Shards:
    """A split as one array of tokens, (N,) for text or (2, N) for chats; shards[a:b] is a copy.

    The length and dtype of every shard are checked here, its sha256 when it is first read.
    UserError if the split is shorter than a row of block_size + 1 tokens.
    """

    def __init__(self, data: str, split: str, kind: str, block_size: int = 0):
        self.folder, self.meta = Path(data), read_meta(data, kind)
        if split not in self.meta["splits"]:
            raise UserError(f"--data {data} has no {split} split, only {list(self.meta['splits'])}")
        self.files = self.meta["splits"][split]["files"]
        self.arrays = [self._open(shard, NDIM[kind]) for shard in self.files]
        self.ends = np.cumsum([array.shape[-1] for array in self.arrays])  # (number of shards,)
        self.unverified = set(range(len(self.files)))
        if len(self) <= block_size:
            raise UserError(f"--data {data}: the {split} split has {len(self)} tokens, but a row "
                            f"of --block_size {block_size} needs {block_size + 1}; lower it")

    def _open(self, shard: dict, ndim: int) -> np.ndarray:
        """A memory map; nothing is read yet."""
        path, tokens = self.folder / shard["file"], shard["tokens"]
        try:
            ids = np.lib.format.open_memmap(path, mode="r")  # nothing but an .npy file
        except Exception as error:  # a damaged header makes numpy raise many types
            raise UserError(f"{path}: missing, truncated, or not an .npy file ({error}); {AGAIN}"
                            ) from error
        if ids.dtype != np.uint16 or ids.ndim != ndim:
            raise UserError(f"{path}: {ids.dtype} with {ids.ndim} axes, expected uint16 with "
                            f"{ndim}; {AGAIN}")
        if ids.shape[-1] != tokens:
            raise UserError(f"{path}: {ids.shape[-1]} tokens, but meta.json says {tokens}; {AGAIN}")
        return ids

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop = span.start, span.stop
        if not 0 <= start < stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        pieces = []
        while start < stop:
            shard = int(np.searchsorted(self.ends, start, side="right"))
            if shard in self.unverified:
                self._verify(shard)
            first = int(self.ends[shard]) - self.arrays[shard].shape[-1]
            pieces.append(self.arrays[shard][..., start - first : stop - first])
            start += pieces[-1].shape[-1]
        return np.concatenate(pieces, axis=-1)

    def _verify(self, shard: int) -> None:
        path, expected = self.folder / self.files[shard]["file"], self.files[shard]["sha256"]
        with first_on_machine(f"sha256 of {path}") as is_intact:
            if not is_intact and (found := sha256_of(path)) != expected:
                raise UserError(f"{path}: sha256 {found[:12]}…, but meta.json says "
                                f"{expected[:12]}…; {AGAIN}")
        self.unverified.remove(shard)


def find_examples(shards: Shards, eot: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, length in tokens) of each example, (n,) each; every example ends with `eot`."""
    ends, part = [], 1 << 22  # tokens read at a time
    for start in range(0, len(shards), part):
        ids = shards[start : min(start + part, len(shards))][0]
        ends.append(np.flatnonzero(ids == eot) + start + 1)
    ends = np.concatenate(ends)
    starts = np.append(0, ends[:-1])
    return starts, (ends - starts).astype(np.int32)
