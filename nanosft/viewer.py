"""The rows of an SFT split as the trainer sees them, token by token: what is in the loss?

This is `sft_data.py --show`. One line is one position (column) of a row: the model reads the input
and has to predict the target. What is shown are the trainer's own datasets (sft_data.SFTDataset),
so it is exactly what a model is trained on. The page is mask.html with one JSON object inserted; it
loads nothing else.
"""

import copy
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from annotated_types import Ge

from nanosft.errors import UserError, written_atomically
from nanosft.report import fill_of, in_each_layout

PAGE = Path(__file__).parent / "mask.html"
WIDEST = 20  # terminal columns of one token; a longer one shifts the rest of its line
STYLES = {"row": "1", "border": "36", "in loss": "32", "padding": "2"}  # ANSI: bold, cyan, …


@dataclasses.dataclass(kw_only=True)
class Showing:
    """What to show: flags of sft_data.py."""

    show: Annotated[int, Ge(0)] = 0
    """show this many rows of --data, as the trainer sees them"""
    data: str | None = None
    """with --show: a folder made with --source and --out"""
    split: str = "train"
    """with --show: train or val"""
    model: str | None = None
    """with --show: a checkpoint whose predictions to show at each position"""
    html: str | None = None
    """with --show: write an HTML page to this file instead of printing"""

    def display(self, view: "View", openers: dict[str, Callable]) -> None:
        """Print the first rows of the view, or write the page with all layouts.

        openers[layout](examples=None) opens the same split in that layout.
        """
        if view.assistant:
            self.require_readable(view.rows, view.assistant)
        if self.html:
            self.write_page(view, openers)
        else:
            self.print_rows(view)

    def require_readable(self, rows, assistant) -> None:
        """UserError if the model cannot read the rows."""
        name, limit = assistant.encoding.name, assistant.model.config.block_size
        if name != rows.meta["encoding"]:
            raise UserError(f"--model has the encoding {name}, but --data {self.data} has "
                            f"{rows.meta['encoding']}; choose a model trained on this encoding")
        if rows.block_size > limit:
            raise UserError(f"--block_size {rows.block_size} is above the {limit} of --model; "
                            "lower --block_size")

    def print_rows(self, view: "View") -> None:
        """To standard output, in color on a terminal unless NO_COLOR is set."""
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")  # https://no-color.org
        codec, rows = sys.stdout.encoding or "utf-8", view.rows  # may not cover all of Unicode
        lines = [("", f"{self.data}, {self.split}: encoding {rows.meta['encoding']}, template "
                      f"{rows.meta['template']}, layout {rows.layout}, block_size "
                      f"{rows.block_size}, {'' if rows.isolate else 'not '}isolated, loss on "
                      f"{rows.loss_on}")]
        for i in range(min(self.show, len(rows))):
            lines += [("", ""), *row_lines(view, i)]
        for style, line in lines:
            line = line.encode(codec, "backslashreplace").decode(codec)
            print(f"\033[{STYLES[style]}m{line}\033[0m" if color and style in STYLES else line)

    def write_page(self, view: "View", openers: dict[str, Callable]) -> None:
        """mask.html with the first rows."""
        rows = view.rows
        save_page("--html", self.html, PAGE, {
            "title": f"{self.data}, {self.split}", "encoding": rows.meta["encoding"],
            "template": rows.meta["template"], "block_size": rows.block_size,
            "isolate": rows.isolate, "loss_on": rows.loss_on,
            "has_all": rows.meta["version"] > 1,  # old data cannot say what --loss_on all covers
            "layouts": page_layouts(view, self.show, openers), "layout": rows.layout})
        print(f"{self.html}: {min(self.show, len(rows))} of {len(rows):,} rows; open it in a "
              "browser")


class Column(NamedTuple):
    """One non-padding position of a row; ids, and weights in percent."""

    input: int
    target: int  # the next id, even where it is not in the loss
    weight: int
    weight_all: int  # under --loss_on all
    segment: int
    position: int
    example: int  # its number in the data
    guess: int | None = None  # the model's most likely next id


# ----- a token as text ---------------------------------------------------------------------------


def token_text(encoding, token: int, keep: str = "") -> str:
    r"""A token as one line that a terminal can show; characters in `keep` stay as they are.

    Incomplete UTF-8 is shown as escaped bytes and a backslash is doubled, so no two tokens look
    the same: the bytes 65, 10, 27, 92, and 195 are A, \n, \x1b, \\, and \xc3.
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


# ----- rows to show ------------------------------------------------------------------------------


class View(NamedTuple):
    """Rows to show, and what it takes; an Assistant for its guesses."""

    rows: object  # an SFTDataset
    encoding: object
    positions_of: Callable  # of segments, (1, T) each
    assistant: object | None

    @torch.no_grad()
    def columns(self, i: int) -> list[Column]:
        """Row i without its padding.

        Ids (258, 104, 259, 121, 260) of one example become four columns, the first 258 -> 104.
        """
        on_all = copy.copy(self.rows)  # with the same plan
        on_all.loss_on = "all"
        ids, weights, segments, examples = self.rows.tokens(i)  # (n + 1,) each
        positions = self.positions_of(torch.from_numpy(segments)[None])[0].numpy()  # (n + 1,)
        fields = [ids[:-1], ids[1:], weights[1:], on_all.tokens(i)[1][1:], segments[:-1],
                  positions[:-1], examples[:-1]]
        if self.assistant:
            row = self.rows[i]
            logits = self.assistant.model(row["input_ids"][None], segments=row["segments"][None])
            fields.append(logits[0, : len(ids) - 1].argmax(-1).numpy())  # of (1, T, V)
        return [Column(*values) for values in np.stack(fields, axis=1).tolist()]


# ----- rows as text ------------------------------------------------------------------------------


def summary(rows, i: int, columns: list[Column]) -> str:
    """A row's header: how much of it is read, in the loss, and, with a model, predicted."""
    n_examples = len({column.example for column in columns})
    in_loss = [column for column in columns if column.weight]
    text = (f"row {i + 1} of {len(rows):,}: {n_examples} example{'s' * (n_examples != 1)}, "
            f"{len(columns)} tokens of {rows.block_size}, {len(in_loss)} targets in the loss")
    if columns and columns[0].guess is not None:
        right = sum(column.guess == column.target for column in in_loss)
        text += f", {right} of them predicted correctly"
    return text


def border(rows, i: int, example: int, width: int) -> str:
    """The line above an example, with its length and, if it is cut, the part in this row."""
    start, stop = next(p[1:] for p in rows.plan[i] if rows.numbers[p[0]] == example)
    length = rows.full_lengths[example]
    part = f"{length}" if stop - start == length else f"[{start}:{stop}] of its {length}"
    return f"--- example {example}, {part} tokens ".ljust(width, "-")


def row_lines(view: View, i: int) -> Iterator[tuple[str, str]]:
    """(style, line) of row i: the header, one line per column, and one for all padding."""
    rows, encoding, columns = view.rows, view.encoding, view.columns(i)
    tokens = [quoted(encoding, id) for c in columns for id in (c.input, c.target, c.guess or 0)]
    width = min(WIDEST, max(map(len, tokens), default=0))

    def cell(token: int) -> str:
        return f"{quoted(encoding, token):{width}} {token:>5}"

    head = (f"{'column':>6} {'position':>8} {'example':>7}  {'input':{width + 6}}"
            f"  {'target':{width + 6}}  weight  state  ")
    yield "row", summary(rows, i, columns)
    yield "row", head + "  the model's guess" if view.assistant else head.rstrip()
    for k, column in enumerate(columns):
        if k == 0 or column.example != columns[k - 1].example:
            yield "border", border(rows, i, column.example, len(head))
        target = cell(column.target) if column.weight else f"{'ignored':{width + 6}}"
        state = "in loss" if column.weight else "context"
        line = (f"{k:>6} {column.position:>8} {column.example:>7}  {cell(column.input)}  {target}"
                f"  {column.weight:>5}%  {state}")
        if view.assistant:
            right = "right" if column.guess == column.target else "wrong"
            line += f"  {cell(column.guess)}  {right if column.weight else ''}"
        yield state, line.rstrip()
    if n_padding := rows.block_size - len(columns):
        yield "padding", f"{len(columns):>6} {'padding':>16}  x {n_padding}"


# ----- rows as a page ----------------------------------------------------------------------------


def page_tokens(view: View, columns: list[Column]) -> list[list]:
    """Columns as the lists of mask.html, with the padding up to block_size."""

    def text(token: int) -> str:
        return token_text(view.encoding, token, keep="\n\r\t")  # the page has symbols for these

    tokens = []
    for c in columns:
        tokens.append([text(c.input), c.input, text(c.target), c.target, *c[2:7]])
        if c.guess is not None:
            tokens[-1].append(text(c.guess))
    padding = ["", 0, "", 0, 0, 0, -1, 0, -1]
    return tokens + [padding] * (view.rows.block_size - len(columns))


def page_layouts(view: View, n: int, openers: dict[str, Callable]) -> dict:
    """The first n rows of the view, and only the examples of those rows in the other layouts.

    The counts beside each layout are those of the whole split.
    """
    chosen = [view.columns(i) for i in range(min(n, len(view.rows)))]
    examples = sorted({column.example for columns in chosen for column in columns})
    shown, parts = {}, in_each_layout(openers, examples=examples)
    for (layout, whole), (_, part) in zip(in_each_layout(openers), parts):
        if not (whole and part):
            continue
        alone = view._replace(rows=part)
        rows = chosen if layout == view.rows.layout else map(alone.columns, range(len(part)))
        shown[layout] = {
            "rows_total": len(whole), "fill": fill_of(whole),
            "examples_per_row": len(whole.lengths) / len(whole),
            "rows": [{"tokens": page_tokens(view, columns)} for columns in rows]}
    return shown


def save_page(flag: str, path: str, template: Path, data: dict, **parts: str) -> int:
    """Fill in a template, write it atomically, return its size. `<` is escaped: text stays text.

    parts: NAME=text that replaces __NAME__, as it is.
    """
    path, page = Path(path), template.read_text("utf-8")
    for name, text in parts.items():
        page = page.replace(f"__{name}__", text)
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: the folder {path.parent} does not exist; create it first")
    page = page.replace("__DATA__", json.dumps(data).replace("<", "\\u003c"))
    try:
        with written_atomically(path) as tmp:
            tmp.write_text(page, "utf-8")
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from error
    return path.stat().st_size
