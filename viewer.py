"""The rows of an SFT split as the trainer sees them, token by token: what counts in the loss?

    python sft_data.py --show 2 --data data/sft --layout fit --block_size 256
    python sft_data.py --show 2 --data data/sft --model out/sft     # beside each target: the model
    python sft_data.py --show 2 --data data/sft --html mask.html    # a page to click through

One line is one place (column) of a row: the model reads the input and has to predict the target.
The rows come from SFTDataset, the class that train_sft.py trains on, so nothing shown here is
worked out a second time. The page is data/mask.html with one JSON put into it; it loads nothing.
"""

import copy
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model import isolate
from sft_data import LAYOUTS, Config, SFTDataset
from tokenizer import get_encoding

PAGE = Path(__file__).parent / "data" / "mask.html"
WIDEST = 20  # columns of a terminal for one token; a longer one shifts the rest of its line
STYLES = {"row": "1", "border": "36", "trained": "32", "padding": "2"}  # ANSI: bold, cyan, …


class Column(NamedTuple):
    """One place of a row that is no padding; ids, and weights in percent."""

    input: int
    target: int  # the next id, also where it is not trained
    weight: int
    weight_all: int  # under --loss_on all: 0 only where the target is another example's first id
    segment: int
    position: int
    example: int
    says: int | None = None  # the model's likeliest next id


# ----- a token as text ---------------------------------------------------------------------------


def token_text(encoding, token: int, keep: str = "") -> str:
    r"""A token as one line that a terminal can show; characters in `keep` stay as they are.

    What is no whole character shows its bytes, and a backslash is doubled, so no two tokens look
    the same.

    >>> [token_text(get_encoding("bytes"), byte) for byte in (65, 10, 27, 92, 0xC3)]
    ['A', '\\n', '\\x1b', '\\\\', '\\xc3']
    """
    raw = encoding.decode_single_token_bytes(token)
    text = raw.replace(b"\\", rb"\\").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    """\\x is left to ASCII and to bytes: U+0085 is not the byte 85."""
    code = ord(character)
    return character.encode("unicode_escape").decode() if code < 128 else f"\\u{code:04x}"


def quoted(encoding, token: int) -> str:
    """In quotes, so that spaces are seen; a special token without."""
    text = token_text(encoding, token)
    return text if token >= encoding.eot_token else f"'{text}'"


def padded(text: str, width: int) -> str:
    """Filled up with spaces by what a terminal shows: wide characters count twice, accents not."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    accents = sum(unicodedata.category(c) in ("Mn", "Me") for c in text)
    return text + " " * (width - len(text) - wide + accents)


# ----- a row as columns --------------------------------------------------------------------------


def open_rows(config: Config, layout: str, examples: Sequence[int] | None = None) -> SFTDataset:
    """The trainer's rows; examples: only those, laid out without the others."""
    seed = config.seed if config.split == "train" else None  # validation keeps the data's order
    return SFTDataset(
        config.data, config.split, config.block_size, layout, seed=seed,
        loss_on=config.loss_on, isolate=config.isolate, examples=examples,
    )  # fmt: skip


def columns_of(
    dataset: SFTDataset,
    i: int,
    guess: Callable | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Column]:
    """Row i up to its padding. numbers: those of the dataset's examples in the data; None: 0, 1, …

    Ids (258, 104, 259, 121, 260) of one example become four columns, from 258 -> 104 on.
    """
    trained_on_all = copy.copy(dataset)  # the same plan
    trained_on_all.loss_on = "all"
    row, pieces = dataset[i], dataset.pieces(i)
    ids = np.concatenate([dataset._tokens(*piece)[0] for piece in pieces])  # (n + 1,)
    examples = [
        int(e if numbers is None else numbers[e])
        for e, start, stop in pieces
        for _ in range(start, stop)
    ]
    positions, _ = isolate(row["segments"][None])  # (1, T), the model's own
    fields = [
        row["input_ids"].tolist(),
        ids[1:].tolist(),  # the shortest of the lists: zip leaves the padding out
        _percent(row["weights"]),
        _percent(trained_on_all[i]["weights"]),
        row["segments"].tolist(),
        positions[0].tolist(),
        examples,
    ]
    if guess:
        fields.append(guess(row))
    return [Column(*values) for values in zip(*fields)]


def _percent(weights: torch.Tensor) -> list[int]:
    return (100 * weights).round().int().tolist()


def load_guess(config: Config, encoding) -> Callable:
    """A function from a row to the id that --model finds likeliest after each of its T places."""
    from evaluate import load_assistant

    model, its_encoding, _ = load_assistant(config.model)
    if its_encoding.name != encoding.name:
        raise ValueError(
            f"--model {config.model} has the vocabulary {its_encoding.name}, --data {config.data} "
            f"{encoding.name}; choose a model that was trained on this encoding"
        )
    if config.block_size > model.config.block_size:
        raise ValueError(
            f"--block_size {config.block_size} is above the {model.config.block_size} of --model "
            f"{config.model}; lower it"
        )
    n_vocab = min(model.config.n_vocab, encoding.n_vocab)

    @torch.no_grad()
    def guess(row: dict) -> list[int]:
        logits = model(row["input_ids"][None], segments=row["segments"][None])  # (1, T, V)
        return logits[0, :, :n_vocab].argmax(-1).tolist()  # (T,)

    return guess


# ----- rows as text ------------------------------------------------------------------------------


def settings(config: Config, dataset: SFTDataset) -> str:
    apart = "isolated" if config.isolate else "not isolated"
    return (
        f"{config.data}, {config.split}: encoding {dataset.meta['encoding']}, template "
        f"{dataset.meta['template']}, layout {config.layout}, block_size {config.block_size}, "
        f"{apart}, loss on {config.loss_on}"
    )


def summary(dataset: SFTDataset, i: int, columns: list[Column]) -> str:
    """A row's header: how much of it is read, trained and, with a model, predicted."""
    n_examples = len({column.example for column in columns})
    trained = [column for column in columns if column.weight]
    text = (
        f"row {i + 1} of {len(dataset):,}: {n_examples} example{'s' * (n_examples != 1)}, "
        f"{len(columns)} tokens of {dataset.block_size}, {len(trained)} trained targets"
    )
    if columns and columns[0].says is not None:
        right = sum(column.says == column.target for column in trained)
        text += f", {right} of them predicted right"
    return text


def border(dataset: SFTDataset, i: int, example: int, width: int) -> str:
    """The line above an example; it says so if only a part of the example is in this row."""
    start, stop = next((a, b) for e, a, b in dataset.pieces(i) if e == example)
    length = dataset.all_lengths[example]
    part = f"{length}" if stop - start == length else f"[{start}:{stop}] of its {length}"
    return f"--- example {example}, {part} tokens ".ljust(width, "-")


def row_lines(
    dataset: SFTDataset, i: int, columns: list[Column], encoding
) -> Iterator[tuple[str, str]]:
    """(style, line) of row i: the header, a line a column, and one for all of its padding."""
    tokens = [quoted(encoding, id) for c in columns for id in (c.input, c.target, c.says or 0)]
    width = min(WIDEST, max(map(len, tokens), default=0))
    says = columns and columns[0].says is not None

    def cell(token: int) -> str:
        return f"{padded(quoted(encoding, token), width)} {token:>5}"

    head = f"{'column':>6} {'position':>8} {'example':>7}  {'input':{width + 6}}"
    head += f"  {'target':{width + 6}}  weight  state  "
    yield "row", summary(dataset, i, columns)
    yield "row", head + "  the model says" if says else head.rstrip()
    for at, column in enumerate(columns):
        if at == 0 or column.example != columns[at - 1].example:
            yield "border", border(dataset, i, column.example, len(head))
        target = cell(column.target) if column.weight else padded("ignored", width + 6)
        state = "trained" if column.weight else "context"
        line = f"{at:>6} {column.position:>8} {column.example:>7}  {cell(column.input)}  {target}"
        line += f"  {column.weight:>5}%  {state}"
        if says:
            right = "right" if column.says == column.target else "wrong"
            line += f"  {cell(column.says)}  {right if column.weight else ''}"
        yield state, line.rstrip()
    if left := dataset.block_size - len(columns):
        yield "padding", f"{len(columns):>6} {'padding':>16}  x {left}"


def print_rows(config: Config, dataset: SFTDataset, encoding, guess: Callable | None) -> None:
    """To standard output, coloured if it is a terminal; https://no-color.org turns that off."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    codec = getattr(sys.stdout, "encoding", None) or "utf-8"  # may know fewer characters than UTF-8

    def put(style: str, line: str) -> None:
        line = line.encode(codec, "backslashreplace").decode(codec)
        print(f"\033[{STYLES[style]}m{line}\033[0m" if colour and style in STYLES else line)

    put("settings", settings(config, dataset))
    for i in range(min(config.show, len(dataset))):
        put("settings", "")
        for style, line in row_lines(dataset, i, columns_of(dataset, i, guess), encoding):
            put(style, line)


# ----- rows as a page ----------------------------------------------------------------------------


def page_tokens(columns: list[Column], block_size: int, encoding) -> list[list]:
    """Columns as data/mask.html's lists, the padding up to block_size included."""

    def text(token: int) -> str:
        return token_text(encoding, token, keep="\n\r\t")  # the page has signs of its own for these

    tokens = []
    for c in columns:
        tokens.append([text(c.input), c.input, text(c.target), c.target, *c[2:7]])
        if c.says is not None:
            tokens[-1].append(text(c.says))
    return tokens + [["", 0, "", 0, 0, 0, -1, 0, -1]] * (block_size - len(columns))


def page_layouts(config: Config, dataset: SFTDataset, encoding, guess: Callable | None) -> dict:
    """The chosen layout's first rows, and the examples in them laid out alone in the other ways.

    The counts beside each layout are those of the whole split.
    """
    chosen = [columns_of(dataset, i, guess) for i in range(min(config.show, len(dataset)))]
    numbers = sorted({column.example for columns in chosen for column in columns})
    alone = open_rows(config, "stream", examples=numbers)
    layouts = {}
    for name in LAYOUTS:
        rows = chosen
        try:
            whole = dataset.with_layout(name)
            if name != config.layout:
                laid = alone.with_layout(name)
                rows = [columns_of(laid, i, guess, numbers) for i in range(len(laid))]
        except ValueError:  # stream cuts examples that are too long for a whole-example layout
            continue
        layouts[name] = {
            "rows_total": len(whole),
            "fill": whole.fill(),
            "examples_per_row": len(whole.lengths) / len(whole),
            "rows": [{"tokens": page_tokens(row, config.block_size, encoding)} for row in rows],
        }
    return layouts


def page(config: Config, dataset: SFTDataset, encoding, guess: Callable | None) -> str:
    """data/mask.html with its data: text stays text, for no `<` is left in the JSON."""
    data = {
        "title": f"{config.data}, {config.split}",
        "encoding": dataset.meta["encoding"],
        "template": dataset.meta["template"],
        "block_size": config.block_size,
        "isolate": config.isolate,
        "loss_on": config.loss_on,
        "layouts": page_layouts(config, dataset, encoding, guess),
        "layout": config.layout,
    }
    template = PAGE.read_text(encoding="utf-8")
    assert template.count("__DATA__") == 1
    as_json = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return template.replace("__DATA__", as_json)


def page_path(html: str) -> Path:
    """ValueError if no file can be written there; before any work is done."""
    path = Path(html)
    if path.is_dir():
        raise ValueError(f"--html {html} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"--html {html}: the folder {path.parent} does not exist; make it first")
    return path


def write_page(path: Path, text: str) -> None:
    """Atomically: a page is there whole or not at all."""
    tmp = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        tmp.write_text(text, encoding="utf-8")
        tmp.replace(path)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise ValueError(f"--html {path} cannot be written: {error}") from error


# ----- the command -------------------------------------------------------------------------------


def show(config: Config) -> None:
    """`sft_data.py --show N`: the first N rows as text or, with --html, as a page."""
    if config.show < 1:
        raise ValueError(f"--show {config.show}: at least 1 row")
    path = page_path(config.html) if config.html else None
    dataset = open_rows(config, config.layout)
    encoding = get_encoding(dataset.meta["encoding"])
    guess = load_guess(config, encoding) if config.model else None
    if path:
        write_page(path, page(config, dataset, encoding, guess))
        print(f"{path}: {min(config.show, len(dataset))} of {len(dataset):,} rows; open it in a "
              "browser")  # fmt: skip
        return
    try:
        print_rows(config, dataset, encoding, guess)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        # the interpreter flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
