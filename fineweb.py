"""Text corpora to shards of uint16 token ids, the data of train_gpt2.py.

    python fineweb.py --out data/fineweb                                  # FineWeb-Edu from the hub
    python fineweb.py --source a.txt b.jsonl --encoding bytes --out data/mine   # your own files

Writes OUT/train_000000.npy, … and OUT/val_000000.npy, each a flat array of ids in which every
document ends with <|endoftext|>, and finally OUT/meta.json: a folder without it is unfinished.
The bytes of the shards do not depend on the number of workers. Speed and disk space: docs/scale.md.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge
from tqdm import tqdm

from nanosft.cli import run_cli, to_paste
from nanosft.errors import UserError
from nanosft.files import TEXT_FORMATS
from nanosft.shards import ShardWriter, new_folder, write_meta
from nanosft.sources import chunked, find_sources, ordered_map, texts_in
from tokenizer import EncodingName, get_encoding

CHUNK_CHARS = 200_000  # characters that a worker encodes at a time; 0.1 to 1 M are equally fast


@dataclasses.dataclass
class Config:
    """Turn text into uint16 shards for train_gpt2.py."""

    out: str
    """folder for the shards; must be new or empty"""
    source: tuple[str, ...] = ("HuggingFaceFW/fineweb-edu",)
    """.txt files, .jsonl, .parquet, … of rows with a `text`, folders, or hub ID[:CONFIG[:SPLIT]]"""
    subset: str | None = None
    """the hub dataset's configuration (default for FineWeb-Edu: sample-10BT)"""
    encoding: EncodingName = "gpt2"
    """gpt2: GPT-2's BPE; bytes: one token per byte"""
    shard_tokens: Annotated[int, Ge(1)] = 100_000_000
    """tokens per shard, at 2 bytes each"""
    val_tokens: Annotated[int, Ge(0)] = 1_000_000
    """the first N tokens become the validation split, at most a tenth of all; 0: none"""
    max_tokens: Annotated[int | None, Ge(1)] = None
    """stop after this many tokens; default: use all"""
    workers: Annotated[int, Ge(1)] = os.cpu_count() or 1
    """processes that encode text"""


def read_texts(config: Config) -> Iterator[tuple[str, bool]]:
    """(text, whether it ends a document); a .txt file is one document, read in pieces."""
    for source in find_sources(config.source, config.subset, TEXT_FORMATS):
        if source.repeats > 1 and config.val_tokens:
            raise UserError(f"--source {source.given} is read {source.repeats} times, so the text "
                            "of the validation split would be trained on; use --val_tokens 0")
        if source.name.endswith("/fineweb-edu"):
            source = source._replace(config=source.config or "sample-10BT")
        for _ in range(source.repeats):
            yield from texts_in(source, CHUNK_CHARS)


def encode_texts(chunk: list[tuple[str, bool]], encoding_name: str) -> np.ndarray:
    """The ids of a chunk of texts, uint16 (n,), with <|endoftext|> after each document."""
    encoding = get_encoding(encoding_name)
    ids = []
    for text, document_ends in chunk:
        ids += encoding.encode_ordinary(text)
        if document_ends:
            ids.append(encoding.eot_token)
    return np.array(ids, dtype=np.uint16)


def first_tokens(pieces: Iterator[np.ndarray], limit: int) -> Iterator[np.ndarray]:
    """The pieces up to `limit` tokens in total."""
    for piece in pieces:
        yield piece[:limit]
        limit -= len(piece)
        if limit <= 0:
            return


def split_off(pieces: Iterator[np.ndarray], val_tokens: int, eot: int) -> tuple:
    """(validation ids, the other pieces): the first val_tokens, at most a tenth of all."""
    head, size = [np.empty(0, np.uint16)], 0
    for piece in pieces:
        head.append(piece)
        size += len(piece)
        if size >= 10 * val_tokens:
            break
    ids = np.concatenate(head)
    val, rest = np.split(ids, [min(val_tokens, size // 10)])
    if len(val) and val[-1] != eot:
        val = np.append(val, np.uint16(eot))  # the cut also ends a document
    return val, itertools.chain([rest], pieces)


def write_split(config: Config, folder: Path, split: str, pieces: Iterable[np.ndarray]) -> dict:
    """Write the shards of a split; returns its entry in meta.json."""
    writer = ShardWriter(folder, split, config.shard_tokens)
    with tqdm(desc=split, unit="tok", unit_scale=True, disable=None) as bar:  # None: TTY only
        for piece in pieces:
            writer.add(piece)
            bar.update(len(piece))
    return writer.finish()


def main(config: Config) -> None:
    encoding = get_encoding(config.encoding)
    with new_folder(config.out) as folder:
        chunks = chunked(read_texts(config), CHUNK_CHARS, lambda item: len(item[0]))
        pieces = ordered_map(encode_texts, chunks, config.workers, config.encoding)
        if config.max_tokens:
            pieces = first_tokens(pieces, config.max_tokens)
        val, train = split_off(pieces, config.val_tokens, encoding.eot_token)

        splits = {"train": write_split(config, folder, "train", train)}
        if len(val):
            splits["val"] = write_split(config, folder, "val", [val])
        if not splits["train"]["tokens"]:
            raise UserError(f"{' '.join(config.source)}: no text found")
        write_meta(folder, {
            "kind": "text", "encoding": config.encoding, "vocab_size": encoding.n_vocab,
            "source": list(config.source), "splits": splits})
    for split, entry in splits.items():
        print(f"{split:5}  {entry['tokens']:>13,} tokens in {entry['shards']} shard(s)")
    print("next:", to_paste("train_gpt2.py", "--data", config.out, "--out", "out/base"))


if __name__ == "__main__":
    run_cli(main, Config)
