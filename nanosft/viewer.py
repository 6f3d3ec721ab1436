"""The rows of an SFT split as the trainer sees them, token by token: what counts in the loss?

    python sft_data.py --show 2 --data data/sft --layout fit --block_size 256
    python sft_data.py --show 2 --data data/sft --model out/sft     # and what the model predicts
    python sft_data.py --show 2 --data data/sft --html mask.html    # an interactive page

One line is one position (column) of a row: the model reads the input and has to predict the target.
The functions here take the trainer's own datasets (sft_data.SFTDataset), or `open_rows(layout)`,
which opens one, so what they show is exactly what is trained on. The page is mask.html with one
JSON object inserted; it loads nothing else.
"""

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model import isolated_positions
from nanosft.assistant import Assistant, load_assistant
from nanosft.cli import UserError, one_line
from nanosft.sources import Report
from packing import LAYOUTS
from tokenizer import get_encoding

PAGE = Path(__file__).parent / "mask.html"
WIDEST = 20  # terminal columns of one token; a longer one shifts the rest of its line
STYLES = {"row": "1", "border": "36", "trained": "32", "padding": "2"}  # ANSI: bold, cyan, …


class Column(NamedTuple):
    """One non-padding position of a row; ids, and weights in percent."""

    input: int
    target: int  # the next id, even where it is not trained
    weight: int
    weight_all: int  # under --loss_on all: 0 only where the target is another example's first id
    segment: int
    position: int
    example: int  # its number in the data
    guess: int | None = None  # the model's most likely next id


# ----- a token as text ---------------------------------------------------------------------------


def token_text(encoding, token: int, keep: str = "") -> str:
    r"""A token as one line that a terminal can show; characters in `keep` stay as they are.

    Incomplete UTF-8 is shown as escaped bytes and a backslash is doubled, so no two tokens look
    the same.

    >>> [token_text(get_encoding("bytes"), byte) for byte in (65, 10, 27, 92, 0xC3)]
    ['A', '\\n', '\\x1b', '\\\\', '\\xc3']
    """

    def escaped(c: str) -> str:  # \x is for ASCII and for bytes: U+0085 is not the byte 85
        return repr(c)[1:-1] if c.isascii() else f"\\u{ord(c):04x}"

    raw = encoding.decode_single_token_bytes(token)
    text = raw.replace(b"\\", rb"\\").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or c in keep else escaped(c) for c in text)


def quoted(encoding, token: int) -> str:
    """In quotes, so that spaces are visible; special tokens without quotes."""
    text = token_text(encoding, token)
    return text if token >= encoding.eot_token else f"'{text}'"


# ----- a row as columns --------------------------------------------------------------------------


def load_assistant_for(name: str, dataset) -> Assistant:
    """The model of --model. UserError if it cannot read the rows."""
    assistant, encoding = load_assistant(name), dataset.meta["encoding"]
    limit = assistant.model.config.block_size
    if assistant.encoding.name != encoding:
        raise UserError(f"--model has the encoding {assistant.encoding.name}, but --data "
                        f"{dataset.data} has {encoding}; choose a model trained on this encoding")
    if dataset.block_size > limit:
        raise UserError(f"--block_size {dataset.block_size} is above the {limit} of --model; lower "
                        "--block_size")
    return assistant


@torch.no_grad()
def columns_of(dataset, i: int, assistant: Assistant | None) -> list[Column]:
    """Row i without its padding.

    Ids (258, 104, 259, 121, 260) of one example become four columns, the first 258 -> 104.
    """
    loss_on_all = copy.copy(dataset)  # with the same plan
    loss_on_all.loss_on = "all"
    ids, weights, segments, examples = dataset.tokens(i)  # (n + 1,) each
    weights_all = loss_on_all.tokens(i)[1]
    positions = isolated_positions(torch.from_numpy(segments)[None])  # (1, n + 1)
    fields = [ids[:-1], ids[1:], weights[1:], weights_all[1:], segments[:-1],
              positions[0, :-1].numpy(), examples[:-1]]
    if assistant:
        row = dataset[i]
        logits = assistant.model(row["input_ids"][None], segments=row["segments"][None])
        fields.append(logits[0, : len(ids) - 1].argmax(-1).numpy())  # of (1, T, V)
    return [Column(*values) for values in np.stack(fields, axis=1).tolist()]


# ----- rows as text ------------------------------------------------------------------------------


def settings(dataset) -> str:
    return (f"{dataset.data}, {dataset.split}: encoding {dataset.meta['encoding']}, template "
            f"{dataset.meta['template']}, layout {dataset.layout}, block_size "
            f"{dataset.block_size}, {'' if dataset.isolate else 'not '}isolated, loss on "
            f"{dataset.loss_on}")


def summary(dataset, i: int, columns: list[Column]) -> str:
    """A row's header: how much of it is read, trained and, with a model, predicted."""
    n_examples = len({column.example for column in columns})
    trained = [column for column in columns if column.weight]
    text = (f"row {i + 1} of {len(dataset):,}: {n_examples} example{'s' * (n_examples != 1)}, "
            f"{len(columns)} tokens of {dataset.block_size}, {len(trained)} trained targets")
    if columns and columns[0].guess is not None:
        right = sum(column.guess == column.target for column in trained)
        text += f", {right} of them predicted correctly"
    return text


def border(dataset, i: int, example: int, width: int) -> str:
    """The line above an example, with its length and, if it is cut, the part in this row."""
    start, stop = next(p[1:] for p in dataset.plan[i] if dataset.indices[p[0]] == example)
    length = dataset.full_lengths[example]
    part = f"{length}" if stop - start == length else f"[{start}:{stop}] of its {length}"
    return f"--- example {example}, {part} tokens ".ljust(width, "-")


def row_lines(dataset, i: int, columns: list[Column], encoding) -> Iterator[tuple[str, str]]:
    """(style, line) of row i: the header, one line per column, and one for all padding."""
    tokens = [quoted(encoding, id) for c in columns for id in (c.input, c.target, c.guess or 0)]
    width = min(WIDEST, max(map(len, tokens), default=0))

    def cell(token: int) -> str:
        return f"{quoted(encoding, token):{width}} {token:>5}"

    head = (f"{'column':>6} {'position':>8} {'example':>7}  {'input':{width + 6}}"
            f"  {'target':{width + 6}}  weight  state  ")
    guessed = columns and columns[0].guess is not None
    yield "row", summary(dataset, i, columns)
    yield "row", head + "  the model's guess" if guessed else head.rstrip()
    for at, column in enumerate(columns):
        if at == 0 or column.example != columns[at - 1].example:
            yield "border", border(dataset, i, column.example, len(head))
        target = cell(column.target) if column.weight else f"{'ignored':{width + 6}}"
        state = "trained" if column.weight else "context"
        line = (f"{at:>6} {column.position:>8} {column.example:>7}  {cell(column.input)}  {target}"
                f"  {column.weight:>5}%  {state}")
        if guessed:
            right = "right" if column.guess == column.target else "wrong"
            line += f"  {cell(column.guess)}  {right if column.weight else ''}"
        yield state, line.rstrip()
    if left := dataset.block_size - len(columns):
        yield "padding", f"{len(columns):>6} {'padding':>16}  x {left}"


def print_rows(n: int, dataset, assistant: Assistant | None) -> None:
    """The first n rows to standard output, in color on a terminal unless NO_COLOR is set."""
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")  # https://no-color.org
    codec = sys.stdout.encoding or "utf-8"  # may not cover all of Unicode
    encoding = get_encoding(dataset.meta["encoding"])

    def put(style: str, line: str) -> None:
        line = line.encode(codec, "backslashreplace").decode(codec)
        print(f"\033[{STYLES[style]}m{line}\033[0m" if color and style in STYLES else line)

    put("settings", settings(dataset))
    for i in range(min(n, len(dataset))):
        put("settings", "")
        for style, line in row_lines(dataset, i, columns_of(dataset, i, assistant), encoding):
            put(style, line)


# ----- rows as a page ----------------------------------------------------------------------------


def page_tokens(columns: list[Column], block_size: int, encoding) -> list[list]:
    """Columns as the lists of mask.html, with the padding up to block_size."""

    def text(token: int) -> str:
        return token_text(encoding, token, keep="\n\r\t")  # the page has its own symbols for these

    tokens = []
    for c in columns:
        tokens.append([text(c.input), c.input, text(c.target), c.target, *c[2:7]])
        if c.guess is not None:
            tokens[-1].append(text(c.guess))
    return tokens + [["", 0, "", 0, 0, 0, -1, 0, -1]] * (block_size - len(columns))


def page_layouts(n: int, dataset, open_rows: Callable, assistant: Assistant | None) -> dict:
    """The first n rows of `dataset`, and only the examples of those rows in the other layouts.

    The counts beside each layout are those of the whole split.
    """
    encoding, layouts = get_encoding(dataset.meta["encoding"]), {}
    chosen = [columns_of(dataset, i, assistant) for i in range(min(n, len(dataset)))]
    examples = sorted({column.example for columns in chosen for column in columns})
    for name in LAYOUTS:
        rows = chosen
        try:
            whole = open_rows(name)
            if name != dataset.layout:
                alone = open_rows(name, examples=examples)
                rows = [columns_of(alone, i, assistant) for i in range(len(alone))]
        except UserError:  # no example has a trained token in a row of this layout
            continue
        layouts[name] = {
            "rows_total": len(whole),
            "fill": whole.fill(),
            "examples_per_row": len(whole.lengths) / len(whole),
            "rows": [{"tokens": page_tokens(row, whole.block_size, encoding)} for row in rows],
        }
    return layouts


def write_page(path: str, n: int, dataset, open_rows: Callable,
               assistant: Assistant | None) -> None:
    """mask.html with the first n rows of `dataset`."""
    save_page("--html", path, PAGE, {
        "title": f"{dataset.data}, {dataset.split}",
        "encoding": dataset.meta["encoding"],
        "template": dataset.meta["template"],
        "block_size": dataset.block_size,
        "isolate": dataset.isolate,
        "loss_on": dataset.loss_on,
        "layouts": page_layouts(n, dataset, open_rows, assistant),
        "layout": dataset.layout,
    })
    print(f"{path}: {min(n, len(dataset))} of {len(dataset):,} rows; open it in a browser")


def save_page(flag: str, path: str, template: Path, data: dict, weights: str = "") -> int:
    """Fill in a template, write it atomically, return its size. `<` is escaped: text stays text."""
    path, page = Path(path), template.read_text("utf-8").replace("__WEIGHTS__", weights)
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: the folder {path.parent} does not exist; create it first")
    tmp = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        tmp.write_text(page.replace("__DATA__", json.dumps(data).replace("<", "\\u003c")), "utf-8")
        tmp.replace(path)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise UserError(f"{flag} {path}: {error.strerror}") from error
    return path.stat().st_size


# ----- what sft_data.py prints after writing a folder --------------------------------------------


def print_report(splits: dict[str, dict], report: Report, open_rows: Callable) -> None:
    """How many rows were read, how long they are, and how each layout packs them."""
    print_counts(sum(split["examples"] for split in splits.values()), report)
    for name, split in splits.items():
        share = split["trained_tokens"] / split["tokens"]
        print(f"{name:5}  {split['examples']:>9,} examples  {split['tokens']:>12,} tokens  "
              f"{share:6.1%} trained  {split['shards']} shard(s)")
    stream = open_rows("stream")
    levels = (0, 10, 50, 90, 99, 100)
    marks = np.percentile(stream.lengths, levels)
    print("length  " + "  ".join(f"p{p} {mark:.0f}" for p, mark in zip(levels, marks)))
    print(f"rows of --block_size {stream.block_size}:")
    print("  layout       rows    fill  examples/row  truncated  dropped")
    for layout in LAYOUTS:
        try:
            rows = open_rows(layout)
        except UserError:  # the shards are fine: another block size may work
            print(f"  {layout:7} no example has a trained token within --block_size")
            continue
        print(f"  {layout:7} {len(rows):>9,}  {rows.fill():6.1%}  "
              f"{len(rows.lengths) / len(rows):12.2f}  {rows.n_truncated:>9,}  "
              f"{rows.n_dropped:>7,}")


def print_counts(kept: int, report: Report) -> None:
    """What became of the rows: rejected and why, from which source, which text was not used."""
    reasons, sources, unused = map(report.of, ("rejected", "source", "unused"))
    n_bad = sum(reasons.values())
    print(f"read {kept + n_bad:,} rows: {kept:,} kept, {n_bad:,} rejected")
    for line in report.bad:
        print(one_line(f"  rejected {line}"))
    for reason, n in list(reasons.items())[:10] if n_bad > len(report.bad) else []:
        print(one_line(f"  rejected {n:,} x {reason}"))
    for source, n in sources.items() if len(sources) > 1 else []:
        print(f"  {n:,} kept of {source}")
    if unused:
        names = ", ".join(one_line(f"{name} {n:,}") for name, n in unused.items())
        print(f"not used (rows with text there): {names}")
    repeated, seen = report.copies()
    if repeated or seen:
        print(f"copies: {repeated:,} examples repeat an earlier one, {seen:,} validation prompts "
              "occur in training")
    for name, n in (report.of("where") | report.of("repaired")).items():
        print(f"{name}: {n:,}")
