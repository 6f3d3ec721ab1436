"""One offline page where a base model and its fine-tuned version answer side by side.

    python -m tools.playground --models out/lesson/base out/lesson/sft --out playground.html

The page holds the models themselves, in half precision, and runs them in plain JavaScript: open
playground.html in a browser, or its source in an editor. A slider moves through the
fine-tuning checkpoints. The URL can contain a question: playground.html#q=What%20is%202%2B4%3F

Only for small models with the `bytes` encoding: the page is limited to 16 MB.
"""

import base64
import dataclasses
import itertools
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m tools.playground", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch

from answer import Assistant, load_assistant
from model import GPT
from nanosft.cli import run_cli
from nanosft.errors import UserError
from nanosft.sources import read_rows
from nanosft.viewer import save_page
from nanosft.weights import checkpoints, find_model, read_config
from tokenizer import SPECIALS, render_prompt, stop_ids

PAGE, NETWORK = Path(__file__).with_suffix(".html"), Path(__file__).with_name("gpt.js")
MAX_BYTES = 16_000_000  # per page: it opens at once in a browser and fits in an email
BETWEEN = 6  # checkpoints between the base model and the last one


@dataclasses.dataclass
class Config:
    """Write one offline page where a base model and its fine-tuned version answer side by side."""

    models: tuple[str, str]
    """the base model, and the folder of a train_sft.py run that started from it"""
    out: str = "playground.html"
    """the page; its folder must exist"""
    questions: str | None = None
    """suggested questions: a .jsonl of {"question": ..., "about": ..., "as": "chat" or "text"}"""


# ----- which checkpoints -------------------------------------------------------------------------


def read_accuracies(run: Path) -> dict[int, float]:
    """Step -> share of right answers to validation prompts, where the run measured it."""
    path = run / "metrics.jsonl"
    rows = [row for _, row in read_rows(str(path))] if path.is_file() else []
    return {row["step"]: row["val_answer_accuracy"] for row in rows if "val_answer_accuracy" in row}


def choose_steps(steps: list[int], accuracies: dict[int, float], n: int = BETWEEN) -> list[int]:
    """At most n of the steps before the last one, where the accuracy moves; and the last one.

    The picks split the accumulated change in accuracy evenly, starting from 0 at step 0. Evenly
    spaced steps would miss a rise that takes only a few steps; they are only the tie-breaker.

    >>> choose_steps([10, 20, 30, 40, 50, 60], {10: 0, 20: 0, 30: 0.5, 40: 0.9, 50: 0.9}, n=2)
    [30, 40, 60]
    """
    *between, last = steps
    known = sorted(({0: 0.0} | accuracies).items())
    known_steps, values = zip(*known)
    change = [0, *itertools.accumulate(abs(b - a) for a, b in itertools.pairwise(values))]
    moved = dict(zip(steps, np.interp(steps, known_steps, change)))  # of each step, since step 0
    chosen = []
    for share in [(i + 1) / (n + 1) for i in range(min(n, len(between)))]:
        others = [step for step in between if step not in chosen]
        chosen.append(min(others, key=lambda step: (
            abs(moved[step] - share * moved[last]), abs(step - share * last))))
    return [*sorted(chosen), last]


# ----- what the page holds -----------------------------------------------------------------------


def load_bytes_model(folder: str | Path) -> Assistant:
    """UserError: no model there, or one of another encoding."""
    if not Path(folder).exists():
        raise UserError(f"{folder}: no such folder")
    if (name := read_config(find_model(str(folder))).get("encoding", "gpt2")) != "bytes":
        raise UserError(f"{folder}: the encoding is {name}, but the page reads bytes; prepare the "
                        "data with --encoding bytes")
    return load_assistant(str(folder))


def weights_of(model: GPT, name: str) -> str:
    """Base64 of all weights in half precision, little endian, in the order of model.py.

    Only the ids in use have rows, and the head is tied to the embedding: it is not repeated.
    """
    state = model.state_dict()
    del state["lm_head.weight"]
    state["transformer.wte.weight"] = state["transformer.wte.weight"][: model.config.n_vocab]
    flat = torch.cat([tensor.flatten() for tensor in state.values()]).half()
    if not flat.isfinite().all():
        raise UserError(f"{name}: a weight is too large for half precision, or not a number")
    return base64.b64encode(flat.numpy().astype("<f2").tobytes()).decode()


def read_questions(path: str | None) -> list[dict]:
    """UserError: no such file, or a row that is not a question."""
    questions = []
    for place, row in read_rows(path) if path else []:
        row = {"about": "", "as": "chat"} | row if isinstance(row, dict) else {}
        question, about, mode = (row.get(key) for key in ("question", "about", "as"))
        if not (isinstance(question, str) and question and isinstance(about, str)):
            raise UserError(f"{place}: needs a `question`, a text, and may have `about`, a text")
        if mode not in ("chat", "text"):
            raise UserError(f"{place}: `as` is {mode!r}, but must be 'chat' or 'text'")
        questions.append({"question": question, "about": about, "as": mode})
    return questions


def page_data(config: Config) -> tuple[dict, list[str]]:
    """What the page shows, and the weights of each checkpoint, the base model first."""
    base, run = load_bytes_model(config.models[0]), Path(config.models[1])
    folders = {int(path.name[5:]): path for path in checkpoints(run)}
    if not folders:
        raise UserError(f"{run}: no step_* checkpoints; give the --out folder of a "
                        "train_sft.py run")
    accuracies = read_accuracies(run)
    steps = choose_steps(list(folders), accuracies)
    check_size(base.model, 1 + len(steps), PAGE.stat().st_size, MAX_BYTES)
    tuned = {step: load_bytes_model(folders[step]) for step in steps[-1:] + steps[:-1]}
    sizes, template = dataclasses.asdict(base.model.config), tuned[steps[-1]].template
    for step, assistant in tuned.items():
        check_fit(folders[step], assistant, sizes)
    before, after = template_around(base.encoding, template)
    models = {0: base.model} | {step: tuned[step].model for step in steps}
    data = {
        "config": sizes,
        "specials": SPECIALS,  # the ids from 256 on
        "stops": stop_ids(base.encoding, template),
        "template": {"name": template, "before": before, "after": after},
        "questions": read_questions(config.questions),
        "checkpoints": [{"step": step, "accuracy": accuracies.get(step)} for step in models],
    }
    return data, [weights_of(model, config.models[min(step, 1)]) for step, model in models.items()]


def template_around(encoding, template: str) -> tuple[list[int], list[int]]:
    """The ids that the template puts before and after a question: bytes never merge with it."""
    ids = render_prompt(encoding, [{"role": "user", "content": "\0"}], template)
    return ids[: ids.index(0)], ids[ids.index(0) + 1 :]


def check_fit(folder: Path, assistant: Assistant, sizes: dict) -> None:
    if assistant.template is None:
        raise UserError(f"{folder}: it has no template, so it is not fine-tuned; the base model "
                        "comes first, and the train_sft.py run second")
    for name, size in dataclasses.asdict(assistant.model.config).items():
        if size != sizes[name]:
            raise UserError(f"{folder}: {name} is {size}, but the base model has {sizes[name]}; "
                            "the run must have started from that model")


def bytes_of(model: GPT) -> int:
    """About what a model adds to a page: 2 bytes a weight, and base64 writes 4 for 3."""
    return sum(p.numel() for p in model.parameters()) * 2 * 4 // 3


def check_size(model: GPT, n_models: int, rest: int, limit: int) -> None:
    """UserError before anything is converted. rest: bytes of the page without its models."""
    need, n = rest + n_models * bytes_of(model), sum(p.numel() for p in model.parameters())
    if need > limit:
        raise UserError(f"{n_models} models of {n:,} weights make a page of {need / 1e6:,.1f} MB, "
                        f"more than {limit / 1e6:.0f} MB; train a smaller model")


# ----- the page ----------------------------------------------------------------------------------


def save_models(flag: str, path: str, page: Path, data: dict, weights: list[str]) -> int:
    """Write a page that runs models: its data, the network in JavaScript, and the weights."""
    lines = (f'<script type="text/plain" data-weights="{i}">{text}</script>'
             for i, text in enumerate(weights))
    return save_page(flag, path, page, data, GPT_JS=NETWORK.read_text("utf-8"),
                     WEIGHTS="\n".join(lines))


def main(config: Config) -> None:
    data, weights = page_data(config)
    size = save_models("--out", config.out, PAGE, data, weights)
    steps = ", ".join(str(checkpoint["step"]) for checkpoint in data["checkpoints"][1:])
    print(f"{config.out}: {size / 1e6:.1f} MB, the base model and steps {steps}; open it "
          "in a browser")


if __name__ == "__main__":
    run_cli(main, Config)
