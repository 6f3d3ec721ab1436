"""The shard format that fineweb.py and sft_data.py write and the trainers read.

A data folder holds `<split>_000000.npy`, … of uint16 ids, (N,) for text and (2, N) for chats, and
meta.json, which is written last: a folder without it is unfinished. See data/README.md.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from nanosft.cli import UserError, explain_write_errors

FORMAT_VERSION = 1
SUMS = "SHA256SUMS"  # of the files beside it, as `sha256sum -c SHA256SUMS` reads them
N_VOCAB = {"gpt2": 50261, "bytes": 261}  # of tokenizer.py's encodings; a test compares them
META = {  # key of meta.json: what it may be; None where it is absent
    "kind": ("text", "sft"), "encoding": (None, *N_VOCAB),
    "template": (None, "chat", "alpaca", "raw"), "train_on": (None, "all_turns", "last_turn"),
}
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
    (folder / SUMS).write_text("".join(lines))


def verify(path: Path) -> Path:
    """The path. UserError if SHA256SUMS beside the file has another sum for it, or none."""
    sums = path.with_name(SUMS)  # other programs' folders have no such file
    if sums.is_file():
        lines = sums.read_text(errors="replace").splitlines()
        if f"{sha256_of(path)}  {path.name}" not in lines:
            raise UserError(f"{path}: damaged or changed, its sha256 is not in {SUMS}; use another "
                            f"copy or, if you changed it yourself, delete {SUMS}")
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
        path = self.folder / f"{self.split}_{len(self.shards):06d}.npy"
        ids = np.ascontiguousarray(ids)
        with explain_write_errors(path), path.open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, np.lib.format.header_data_from_array_1_0(ids))
            file.write(ids)  # np.save() does not notice when its last bytes find the disk full
        shard = {"file": path.name, "tokens": ids.shape[-1], "sha256": sha256_of(path)}
        self.shards.append(shard)

    def finish(self, **counts: int) -> dict:
        """The split's entry in meta.json."""
        self.flush()
        tokens = sum(shard["tokens"] for shard in self.shards)
        return {**counts, "tokens": tokens, "shards": len(self.shards), "files": self.shards}


def write_meta(folder: Path, meta: dict) -> None:
    """Write meta.json, last and atomically: it marks the folder as complete."""
    tmp = folder / "meta.json.tmp"
    with explain_write_errors(folder / "meta.json"):
        tmp.write_text(json.dumps({"version": FORMAT_VERSION, **meta}, indent=1) + "\n")
        # meta.json has the sums of the shards
        (folder / SUMS).write_text(f"{sha256_of(tmp)}  meta.json\n")
        tmp.rename(folder / "meta.json")


def check_empty(out: str, advice: str = "delete it or choose another folder") -> Path:
    """`out` as a path. UserError if it is not empty: a user's files are never overwritten."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {out} exists and is not empty; {advice}")
    return folder


@contextlib.contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """A temporary folder that becomes `out` at the end; on any error nothing is left behind.

    A kill leaves OUT.tmpPID behind, which the next run removes.
    """
    folder = check_empty(out)
    for left_behind in folder.parent.glob(f"{glob.escape(folder.name)}.tmp*"):
        pid = left_behind.name.removeprefix(f"{folder.name}.tmp")
        if pid.isdecimal() and not is_running(int(pid)):
            shutil.rmtree(left_behind)
    tmp = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    tmp.mkdir(parents=True)
    try:
        yield tmp
        tmp.rename(folder)  # which may exist, but is empty
    except BaseException:
        shutil.rmtree(tmp)
        raise


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only checks that it exists
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


# ----- reading -----------------------------------------------------------------------------------


def read_meta(data: str, kind: str) -> dict:
    """meta.json of a data folder. UserError: unfinished, or not of this kind (`text` or `sft`)."""
    path = Path(data) / "meta.json"
    if not path.is_file():
        state = "is unfinished (no meta.json)" if Path(data).is_dir() else "does not exist"
        raise UserError(f"--data {data} {state}; make it with {MADE_BY[kind]}")
    try:
        meta = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); make the data again") from error
    if (version := meta.get("version") if isinstance(meta, dict) else None) != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, expected {FORMAT_VERSION}; "
                        f"make the data again with {MADE_BY[kind]}")
    choices = META | {"vocab_size": (N_VOCAB.get(str(meta.get("encoding"))),)}
    wrong = [key for key in choices if meta.get(key) not in choices[key]]
    wrong += [] if are_splits(meta.get("splits")) else ["splits"]
    if wrong:
        raise UserError(f"{path}: damaged ({wrong[0]} is {str(meta.get(wrong[0]))[:60]!r}); make "
                        "the data again")
    if meta["kind"] != kind:
        raise UserError(f"--data {data} was made by {MADE_BY[meta['kind']]}; this command needs "
                        f"data made by {MADE_BY[kind]}")
    verify(path)
    return meta


def are_splits(splits) -> bool:
    """Is it {split: {"tokens": 5, "files": [{"file": …, "tokens": 5, "sha256": …}]}, …}?"""
    try:
        return bool(splits) and all(
            split["tokens"] == sum(shard["tokens"] for shard in split["files"]) > 0
            and all(type(shard["tokens"]) is int and isinstance(shard["sha256"], str)
                    and Path(shard["file"]).name == shard["file"] for shard in split["files"])
            for split in splits.values())
    except (AttributeError, KeyError, TypeError):
        return False


class Shards:
    """A split as one array of tokens, (N,) for text or (2, N) for chats; shards[a:b] is a copy.

    The length and dtype of every shard are checked here, its sha256 when it is first read.
    """

    def __init__(self, data: str, split: str, kind: str):
        self.folder, self.meta = Path(data), read_meta(data, kind)
        if split not in self.meta["splits"]:
            raise UserError(f"--data {data} has no {split} split, only {list(self.meta['splits'])}")
        self.files = self.meta["splits"][split]["files"]
        self.arrays = [self._open(shard, NDIM[kind]) for shard in self.files]
        self.ends = np.cumsum([array.shape[-1] for array in self.arrays])  # (number of shards,)
        self.unverified = set(range(len(self.files)))

    def _open(self, shard: dict, ndim: int) -> np.ndarray:
        """A memory map; nothing is read yet."""
        path, tokens = self.folder / shard["file"], shard["tokens"]
        try:
            ids = np.lib.format.open_memmap(path, mode="r")  # nothing but an .npy file
        except Exception as error:  # a damaged header makes numpy raise many types
            raise UserError(f"{path}: missing, truncated or not an .npy file ({error}); make the "
                            "data again") from error
        if ids.dtype != np.uint16 or ids.ndim != ndim:
            raise UserError(f"{path}: {ids.dtype} with {ids.ndim} axes, expected uint16 with "
                            f"{ndim}; make the data again")
        if ids.shape[-1] != tokens:
            raise UserError(f"{path}: {ids.shape[-1]} tokens, but meta.json says {tokens}; make "
                            "the data again")
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
        if (found := sha256_of(path)) != expected:
            raise UserError(f"{path}: sha256 {found[:12]}…, but meta.json says {expected[:12]}…; "
                            "make the data again")
        self.unverified.remove(shard)


def find_examples(shards: Shards, eot: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, length in tokens) of each example, (n,) each; every example ends with `eot`."""
    ends, part = [], 1 << 22  # tokens read at a time
    for at in range(0, len(shards), part):
        ids = shards[at : min(at + part, len(shards))][0]
        ends.append(np.flatnonzero(ids == eot) + at + 1)
    ends = np.concatenate(ends)
    starts = np.append(0, ends[:-1])
    return starts, (ends - starts).astype(np.int32)


def loss_on_all(ids: np.ndarray, weights: np.ndarray, eot: int) -> np.ndarray:
    """--loss_on all: the weights of an example, (n,) each, with 100 everywhere but in the answers
    that a chat keeps as context (weight 0).

    Only the chat template marks where an answer begins; elsewhere every id is trained.
    """
    system, user, assistant, _ = range(eot + 1, eot + 5)  # in the order of tokenizer.SPECIALS
    is_role = np.isin(ids, (system, user, assistant))
    turn = np.maximum.accumulate(np.where(is_role, np.arange(len(ids)), 0))  # where it began
    is_answer = (ids[turn] == assistant) & ~is_role & (ids != eot)
    return np.where(is_answer & (weights == 0), 0, 100)
