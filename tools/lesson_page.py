"""The lesson on one offline page, in the order of its argument, every number computed.

    python -m tools.lesson_page out/lesson --out out/lesson/lesson.html

The page holds the lesson's models, in half precision, and its rows, and computes everything forward
itself, in plain JavaScript. Only gradients and the figures of the runs are added here. When it is
done, its element "figures" has every number as JSON; tests/check_lesson_page.py compares them with
PyTorch's.
"""

import copy
import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Annotated

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m tools.lesson_page", file=sys.stderr)
    sys.exit(2)

import torch
import torch.nn.functional as F
import tyro

from model import GPT
from nanosft.cli import run_cli
from nanosft.errors import UserError
from nanosft.weights import checkpoints
from packing import LAYOUTS
from sft_data import SFTDataset, create_labels
from tokenizer import ALPACA, END_OF_TEXT, SPECIALS, render, stop_ids
from tools.lesson import read_all, scores
from tools.playground import (
    bytes_of,
    check_fit,
    check_size,
    choose_steps,
    load_bytes_model,
    read_accuracies,
    save_models,
    template_around,
    weights_of,
)

PAGE, ROOT = Path(__file__).with_suffix(".html"), Path(__file__).parents[1]
BUGS = ROOT / "docs/bugs_that_shipped.md"
MAX_BYTES, REST = 20_000_000, 500_000  # of the page, and of what is not weights
CHATS = 6  # held-out questions to choose from
NEEDED = ("text/sft_train.jsonl", "text/heldout.jsonl", "text/own_words.jsonl",
          "base/metrics.jsonl", "sft/metrics.jsonl", "sft_shards/meta.json",
          "answers/base.jsonl", "answers/sft.jsonl", "answers/sft_all.jsonl")

# Other families' templates, and which of their pieces are single tokens. `typed`: what such a piece
# becomes in a user's text by default. Sources: the links, which the page shows, too.
FAMILIES = [
    {"name": "ChatML", "specials": ["<|im_start|>", "<|im_end|>"], "typed": "token",
     "before": "<|im_start|>user\n", "between": "<|im_end|>\n<|im_start|>assistant\n",
     "after": "<|im_end|>\n",
     "note": "A mark that a user types becomes the single token by default, in transformers as in "
             "Qwen's own code: the caller has to prevent it.",
     "sources": ["https://github.com/QwenLM/Qwen/blob/main/tokenization_note.md",
                 "https://docs.pytorch.org/torchtune/stable/generated/"
                 "torchtune.data.ChatMLTemplate.html",
                 "https://huggingface.co/docs/transformers/internal/tokenization_utils"]},
    {"name": "Llama 3", "typed": "text",
     "specials": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
     "before": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
     "between": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
     "after": "<|eot_id|>",
     "note": "Meta's own encoder keeps typed marks as text unless the caller allows them.",
     "sources": ["https://github.com/meta-llama/llama3/blob/main/llama/tokenizer.py"]},
    {"name": "Alpaca", "specials": [END_OF_TEXT], "typed": "text",
     "before": ALPACA.partition("{content}")[0], "between": ALPACA.partition("{content}")[2],
     "after": END_OF_TEXT,
     "note": "Only the end is a token: a user can write the rest of a turn, letter for letter.",
     "sources": ["https://github.com/tatsu-lab/stanford_alpaca/blob/main/train.py"]},
]


@dataclasses.dataclass
class Config:
    """Write one offline page that explains fine-tuning with a finished lesson."""

    lesson: Annotated[str, tyro.conf.Positional]
    """the folder that runs/lesson.sh made"""
    out: str = "lesson.html"
    """the page; its folder must exist"""


# ----- the models --------------------------------------------------------------------------------


def load_models(lesson: Path) -> tuple[list[dict], list[GPT]]:
    """What each is, and the models: base, steps of sft, its last one, sft_all."""
    accuracies, base = read_accuracies(lesson / "sft"), load_bytes_model(lesson / "base").model
    folders = {int(path.name[5:]): path for path in checkpoints(lesson / "sft")}
    if not folders or not checkpoints(lesson / "sft_all"):
        raise unfinished(lesson, "sft/step_* or sft_all/step_*")
    check_size(base, 3, REST, MAX_BYTES)
    between = (MAX_BYTES - REST) // bytes_of(base) - 3
    steps = choose_steps(list(folders), accuracies, between)
    paths = [*(folders[step] for step in steps), checkpoints(lesson / "sft_all")[-1]]
    tuned = [load_bytes_model(path) for path in paths]
    for path, assistant in zip(paths, tuned):
        check_fit(path, assistant, dataclasses.asdict(base.config))
    if tuned[-1].template != "chat":
        raise UserError(f"{lesson}: its template is {tuned[-1].template}, but the page explains "
                        "chat; make a lesson with runs/lesson.sh")
    kinds = [{"name": "base", "step": 0, "accuracy": accuracy(lesson, "base")},
             *({"name": "sft", "step": step, "accuracy": accuracies.get(step)} for step in steps),
             {"name": "sft_all", "step": int(paths[-1].name[5:])}]
    return kinds, [base, *(assistant.model for assistant in tuned)]


def accuracy(lesson: Path, name: str) -> float:
    """Share of right answers to the held-out questions, as evaluate.py found it."""
    n_trained = len(read_all(lesson / "text/sft_train.jsonl"))
    return scores(read_all(lesson / f"answers/{name}.jsonl"), n_trained)["heldout_acc"]


# ----- the rows ----------------------------------------------------------------------------------


def heldout_facts(lesson: Path) -> list[dict]:
    """Each held-out question with its answer and with the same fact in the base model's words."""
    heldout = read_all(lesson / "text/heldout.jsonl")
    own_words = read_all(lesson / "text/own_words.jsonl")[-len(heldout):]
    return [{"question": row["question"], "answer": row["answer"], "own": own["prompt"],
             "result": own["response"]} for row, own in zip(heldout, own_words)]


def choose_chats(facts: list[dict], encoding) -> list[dict]:
    """Some facts, evenly spread, as training examples: what the page shows token by token."""
    n = min(CHATS, len(facts))
    chosen = [facts[(2 * i + 1) * len(facts) // (2 * n)] for i in range(n)]
    chats = []
    for fact in chosen:
        ids, weights = render(encoding, [{"role": "user", "content": fact["question"]},
                                         {"role": "assistant", "content": fact["answer"]}])
        chats.append(fact | {"ids": ids, "weights": weights})
    return chats


def training_rows(lesson: Path, block_size: int) -> dict:
    """The training examples, and the rows that each layout makes of them, in the data's order."""
    rows = {layout: SFTDataset(str(lesson / "sft_shards"), "train", block_size, layout, seed=None)
            for layout in LAYOUTS}
    examples = [rows["stream"].piece(i, 0, int(length)).tolist()
                for i, length in enumerate(rows["stream"].full_lengths)]
    return {"examples": examples, "layouts": {layout: list(rows[layout].plan) for layout in rows}}


def token_counts(run: Path) -> dict[str, int]:
    """What a run read, by its own log: steps, tokens, and targets in the loss."""
    log = read_all(run / "metrics.jsonl")
    return {"steps": len(log), "tokens": sum(row["tokens"] for row in log),
            "trained": sum(row["trained_tokens"] for row in log)}


def losses(run: Path) -> list[list[float]]:
    """[step, loss on the held-out questions] of each evaluation."""
    return [[row["step"], row["val_loss"]] for row in read_all(run / "metrics.jsonl")
            if "val_loss" in row]


# ----- what the page cannot compute --------------------------------------------------------------


def gradient_norms(model: GPT, chat: dict) -> list[list[float]]:
    """Norms of d loss / d x at each column: x the input of each block, of ln_f, and the logits.

    The loss is the mean over the chat's answer. The last two act on their own column only, so they
    are exactly 0 where the target is not in the loss.
    """
    model, kept = copy.deepcopy(model).half().float(), []  # the weights that the page has

    def keep(module, inputs):
        inputs[0].retain_grad()
        kept.append(inputs[0])

    for module in (*model.transformer.h, model.transformer.ln_f):
        module.register_forward_pre_hook(keep)
    labels = create_labels(chat["ids"], chat["weights"])
    logits = model(torch.tensor([chat["ids"][:-1]]))[0]  # (T, V)
    logits.retain_grad()
    F.cross_entropy(logits, labels).backward()
    return [tensor.grad.view(len(labels), -1).norm(dim=1).tolist() for tensor in (*kept, logits)]


def read_costs() -> dict[str, list[str]]:
    """What a mask that is off by one costs: right answers without and with that mistake in the same
    run, and the number of lessons, as in docs/bugs_that_shipped.md."""
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| ([^|]+) \|", BUGS.read_text("utf-8"), re.M)
    table = {name: (seeds, accuracy) for name, seeds, accuracy in rows}
    pairs = {"late": ("correct code", "the mask begins one token late"),
             "early": ("correct code, second run", "the mask begins one token early")}
    for name in (name for pair in pairs.values() for name in pair):
        if name not in table:
            raise UserError(f"{BUGS}: its table has no row {name!r}; bring it back, or change "
                            "read_costs in tools/lesson_page.py")
    return {key: [table[right][1], *table[wrong][::-1]] for key, (right, wrong) in pairs.items()}


# ----- the page ----------------------------------------------------------------------------------


def unfinished(lesson: Path, name: str) -> UserError:
    return UserError(f"{lesson} has no {name}: not a finished lesson; make one with runs/lesson.sh")


def page_data(lesson: Path, out: Path) -> tuple[dict, list[GPT]]:
    for name in NEEDED:
        if not (lesson / name).is_file():
            raise unfinished(lesson, name)
    kinds, models = load_models(lesson)
    encoding = load_bytes_model(lesson / "base").encoding
    facts, config = heldout_facts(lesson), models[0].config
    chats, (before, after) = choose_chats(facts, encoding), template_around(encoding, "chat")
    return {
        "config": dataclasses.asdict(config), "specials": SPECIALS,
        "stops": stop_ids(encoding, "chat"),
        "template": {"name": "chat", "before": before, "after": after},
        "checkpoints": kinds, "chats": chats, "facts": facts, "families": FAMILIES,
        **training_rows(lesson, config.block_size),
        "runs": {name: token_counts(lesson / name) for name in ("base", "sft")},
        "val_loss": losses(lesson / "sft"),
        "accuracies": sorted(({0: kinds[0]["accuracy"]} | read_accuracies(lesson / "sft")).items()),
        "evaluated": {name: accuracy(lesson, name) for name in ("base", "sft", "sft_all")},
        "gradients": [gradient_norms(models[0], chat) for chat in chats],
        "costs": read_costs(), "root": path_to_root(out),
    }, models


def path_to_root(out: Path) -> str | None:
    """From the page to the code, for its links; None on another drive."""
    folder = out.absolute().parent
    return Path(os.path.relpath(ROOT, folder)).as_posix() if folder.anchor == ROOT.anchor else None


def main(config: Config) -> None:
    data, models = page_data(Path(config.lesson), Path(config.out))
    weights = [weights_of(model, config.lesson) for model in models]
    size = save_models("--out", config.out, PAGE, data, weights)
    print(f"{config.out}: {size / 1e6:.1f} MB, the lesson on one page, with {len(models)} models; "
          "open it in a browser")


if __name__ == "__main__":
    run_cli(main, Config)
