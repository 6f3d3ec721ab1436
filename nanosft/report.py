"""What sft_data.py found in its rows, and the report that it prints."""

import re
from array import array
from collections.abc import Callable, Iterator

import numpy as np

from nanosft.errors import UserError, one_line
from nanosft.forms import Counts


class Report:
    """Counts, the first bad rows, and duplicates: of each example two hashes, 16 bytes."""

    def __init__(self):
        self.counts, self.bad = Counts(), []  # {(kind, name): rows}
        self.totals = {split: Counts(examples=0, trained_tokens=0) for split in ("train", "val")}
        self.hashes = {split: (array("q"), array("q")) for split in ("train", "val")}
        self.has_chats = False  # or only {text} rows, which no template renders

    def reject(self, errors: list[tuple]) -> None:
        """errors: (place, message)."""
        self.bad += [f"{place}: {error}" for place, error in errors[: 3 - len(self.bad)]]
        self.counts.update(("rejected", reason_of(error)) for _, error in errors)

    def keep(self, split: str, source: str, ids: np.ndarray, weights: np.ndarray) -> None:
        """An example, (n,) each. Its prompt is what comes before the first id in the loss."""
        self.counts["source", source] += 1
        self.totals[split].update(examples=1, trained_tokens=int(np.count_nonzero(weights)))
        n_prompt = int(np.argmax(weights > 0)) or len(ids)  # a {text} row: all of it
        self.has_chats |= not weights[0]
        examples, prompts = self.hashes[split]
        examples.append(hash(ids.tobytes() + weights.tobytes()))
        prompts.append(hash(ids[:n_prompt].tobytes()))

    def of(self, kind: str) -> dict[str, int]:
        """{name: rows} of one kind, most first."""
        return {name: n for (of, name), n in self.counts.most_common() if of == kind}

    def check_splits(self, splits: dict[str, dict], config) -> None:
        """UserError if a split is empty or has no target, with the reason. config: of sft_data.py.
        """
        n_bad = sum(self.of("rejected").values())
        for name, split in splits.items():
            if split["trained_tokens"]:
                continue
            sources = config.val_source if name == "val" else config.source
            what, why = "is empty", f"no rows in {', '.join(sources)}"
            if split["tokens"]:
                what, why = "has no token in the loss", "every answer in it has weight 0"
            elif name == "val" and not config.val_source:
                why = f"--val_fraction {config.val_fraction} of {splits['train']['examples']} rows"
            elif n_bad:
                why = f"all {n_bad} rows were rejected; first: {self.bad[0]}"
            raise UserError(f"the {name} split {what} ({why}); change --source, --val_source, "
                            "or --val_fraction")

    def duplicates(self) -> tuple[int, int]:
        """(examples that repeat an earlier one; validation prompts that occur in training)."""
        (train, prompts), (val, val_prompts) = self.hashes["train"], self.hashes["val"]
        n_distinct = len(np.unique(np.concatenate([train, val])))
        return len(train) + len(val) - n_distinct, int(np.isin(val_prompts, prompts).sum())

    def print(self, splits: dict[str, dict], openers: dict[str, Callable]) -> None:
        """How many rows were read, how long they are, and how each layout packs them.

        openers[layout]() opens the rows of the training split as the trainer does.
        """
        self.print_counts()
        for name, split in splits.items():
            share = split["trained_tokens"] / split["tokens"]
            print(f"{name:5}  {split['examples']:>9,} examples  {split['tokens']:>12,} tokens  "
                  f"{share:6.1%} in the loss  {split['shards']} shard(s)")
        for layout, rows in in_each_layout(openers):
            if layout == "stream":  # the first one, and whole examples
                levels = (0, 10, 50, 90, 99, 100)
                marks = np.percentile(rows.lengths, levels)
                print("length  " + "  ".join(f"p{p} {mark:.0f}" for p, mark in zip(levels, marks)))
                print(f"rows of --block_size {rows.block_size}:")
                print("  layout       rows    fill  examples/row  truncated  dropped")
            if rows:
                print(f"  {layout:7} {len(rows):>9,}  {fill_of(rows):6.1%}  "
                      f"{len(rows.lengths) / len(rows):12.2f}  {rows.n_truncated:>9,}  "
                      f"{rows.n_dropped:>7,}")
            else:  # the shards are fine: another block size may work
                print(f"  {layout:7} no example has a token in the loss within --block_size")

    def print_counts(self) -> None:
        """What became of the rows: rejected and why, from which source, which text was not used."""
        reasons, sources, unused = map(self.of, ("rejected", "source", "unused"))
        n_bad, n_kept = sum(reasons.values()), sum(sources.values())
        print(f"read {n_kept + n_bad:,} rows: {n_kept:,} kept, {n_bad:,} rejected")
        if not self.has_chats:
            print("all rows are plain text, which no --template renders: all of it is in the loss")
        for line in self.bad:
            print(one_line(f"  rejected {line}"))
        for reason, n in list(reasons.items())[:10] if n_bad > len(self.bad) else []:
            print(one_line(f"  rejected {n:,} x {reason}"))
        for source, n in sources.items() if len(sources) > 1 else []:
            print(f"  {n:,} kept of {source}")
        if unused:
            names = ", ".join(one_line(f"{name} {n:,}") for name, n in unused.items())
            print(f"not used (rows with text there): {names}")
        n_repeated, n_seen = self.duplicates()
        if n_repeated or n_seen:
            print(f"duplicates: {n_repeated:,} examples repeat an earlier one, {n_seen:,} "
                  "validation prompts occur in training")
        for name, n in (self.of("where") | self.of("repaired")).items():
            print(f"{name}: {n:,}")


def reason_of(error: str) -> str:
    """An error without its numbers, values, and advice, to count rows by it.

    >>> reason_of("message 3 has role 'bob'; the known roles are user")
    'message N has role …'
    """
    what = re.sub(r"(['\"]).*?\1", "…", error).partition(";")[0]
    return re.sub(r"\d+", "N", re.sub(r"[\[{'\"].*", "…", what))[:100]  # `show` may cut a value


def in_each_layout(openers: dict[str, Callable], **flags) -> Iterator[tuple]:
    """(layout, its rows); None where no example has a token in the loss in a row."""
    for layout, open_rows in openers.items():
        try:
            yield layout, open_rows(**flags)
        except UserError:
            yield layout, None


def fill_of(rows) -> float:
    """The fraction of non-padding positions of an SFTDataset: a row of n ids fills n - 1 of its T.
    """
    filled = int((rows.plan.stops - rows.plan.begins - 1).sum())
    return filled / (len(rows) * rows.block_size)


def describe_rows(rows) -> str:
    """The sentence about an SFTDataset that the trainer prints before it starts."""
    return (f"{len(rows.lengths):,} examples ({rows.n_truncated} truncated, {rows.n_dropped} "
            f"dropped), {rows.lengths.sum():,} tokens of {rows.meta['encoding']}; "
            f"{len(rows):,} rows, layout {rows.layout}, {fill_of(rows):.1%} full, "
            f"{'' if rows.isolate else 'not '}isolated")
