"""Text corpora to shards of uint16 token ids, the data of train_gpt2.py.

    python fineweb.py --out data/fineweb                                  # FineWeb-Edu from the hub
    python fineweb.py --source a.txt b.jsonl --encoding bytes --out data/mine   # your own files

Writes OUT/train_000000.npy, … and OUT/val_000000.npy, each a flat array of ids in which every
document ends with <|endoftext|>, and finally OUT/meta.json: a folder without it is unfinished.
The bytes of the shards do not depend on the number of workers. Speed and disk space: docs/scale.md.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from nanosft.cli import UserError, require_at_least, run_cli
from nanosft.shards import ShardWriter, new_folder, write_meta
from nanosft.sources import chunked, ordered_map, read_rows, read_txt, require_file
from tokenizer import get_encoding

CHUNK_CHARS = 200_000  # characters that a worker encodes at a time; 0.1 to 1 M are equally fast


@dataclasses.dataclass
class Config:
    """Turn text into uint16 shards for train_gpt2.py."""

    out: str
    """folder for the shards; must be new or empty"""
    source: tuple[str, ...] = ("HuggingFaceFW/fineweb-edu",)
    """.txt, .jsonl, .json or .parquet files (rows need a `text`), or hub ID[:CONFIG[:SPLIT]]"""
    subset: str | None = None
    """the hub dataset's configuration (default for FineWeb-Edu: sample-10BT)"""
    encoding: Literal["gpt2", "bytes"] = "gpt2"
    shard_tokens: int = 100_000_000
    """tokens per shard, at 2 bytes each"""
    val_tokens: int = 1_000_000
    """the first N tokens become the validation split, at most a tenth of all; 0: none"""
    max_tokens: int | None = None
    """stop after this many tokens; default: use all"""
    workers: int = os.cpu_count() or 1


def read_texts(config: Config) -> Iterator[tuple[str, bool]]:
    """(text, whether it ends a document); a .txt file is one document, read in pieces."""
    for source in config.source:
        if source.endswith(".txt"):
            yield from read_txt(require_file(Path(source)), CHUNK_CHARS)
            continue
        subset = config.subset
        if subset is None and source.endswith("/fineweb-edu"):
            subset = "sample-10BT"
        for place, row in read_rows(source, subset):
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                found = list(row) if isinstance(row, dict) else type(row).__name__
                raise UserError(f"{place}: no `text` string (found: {found})")
            yield row["text"], True


def encode_texts(chunk: list[tuple[str, bool]], encoding_name: str) -> np.ndarray:
    """The ids of a chunk of texts, uint16 (n,), with <|endoftext|> after each document."""
    encoding = get_encoding(encoding_name)
    ids = []
    for text, document_ends in chunk:
        ids += encoding.encode_ordinary(text)
        if document_ends:
            ids.append(encoding.eot_token)
    return np.array(ids, dtype=np.uint16)


def first_tokens(pieces: Iterator[np.ndarray], limit: int | None) -> Iterator[np.ndarray]:
    """The pieces up to `limit` tokens in total; None: all of them."""
    for piece in pieces:
        yield piece[:limit]
        if limit is not None:
            limit -= len(piece)
            if limit <= 0:
                return


def split_off(pieces: Iterator[np.ndarray], val_tokens: int, eot: int) -> tuple:
    """(validation ids, an iterator over the rest): the first val_tokens, at most a tenth of all."""
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

    def remaining():
        yield rest
        yield from pieces

    return val, remaining()


def main(config: Config) -> None:
    require_at_least(config, 1, "shard_tokens", "workers", "max_tokens")
    require_at_least(config, 0, "val_tokens")
    encoding = get_encoding(config.encoding)
    with new_folder(config.out) as folder:
        chunks = chunked(read_texts(config), lambda item: len(item[0]), CHUNK_CHARS)
        pieces = ordered_map(encode_texts, chunks, config.workers, config.encoding)
        pieces = first_tokens(pieces, config.max_tokens)
        val, train = split_off(pieces, config.val_tokens, encoding.eot_token)

        splits = {}
        for split, part in (("train", train), ("val", [val])):
            writer = ShardWriter(folder, split, config.shard_tokens)
            bar = tqdm(desc=split, unit="tok", unit_scale=True, disable=None)  # None: TTY only
            for piece in part:
                writer.add(piece)
                bar.update(len(piece))
            bar.close()
            entry = writer.finish()
            if entry["tokens"]:
                splits[split] = entry
        if "train" not in splits:
            raise UserError(f"{' '.join(config.source)}: no text found")
        write_meta(folder, {
            "kind": "text",
            "encoding": config.encoding,
            "vocab_size": encoding.n_vocab,
            "source": list(config.source),
            "splits": splits,
        })
    for split, entry in splits.items():
        print(f"{split:5}  {entry['tokens']:>13,} tokens in {entry['shards']} shard(s)")
    print(f"next: torchrun --standalone --nproc_per_node=1 train_gpt2.py --data {config.out} "
          "--out out/base")


if __name__ == "__main__":
    run_cli(main, Config)
