"""Is every number on the lesson's page PyTorch's? A headless browser opens it, to compare them all.

    python -m tests.check_lesson_page out/lesson/lesson.html --lesson out/lesson

The page leaves what it computed in its element "figures". Here the same is computed from the
page's own half-precision weights, in float32, and from the lesson's rows and logs: probabilities
must agree within 1e-4, numbers above 1 within 1e-4 of their size, counts and ids exactly. One line
of results; exit code 1 if the page disagrees.
"""

import dataclasses
import html
import json
import math
import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m tests.check_lesson_page", file=sys.stderr)
    sys.exit(2)

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from model import GPT, attention_for, isolated_mask
from nanosft.cli import run_cli
from nanosft.errors import UserError
from nanosft.report import fill_of
from packing import LAYOUTS
from sft_data import SFTDataset, create_labels
from tests.check_playground import data_in, model_in, require_weights_of
from tests.helpers_browser import CHROMIUM, dump_dom
from tokenizer import get_encoding, render
from tools.lesson import read_all
from tools.lesson_page import FAMILIES

TOLERANCE = 1e-4
FIGURES = ("runs", "curves", "evaluated", "template", "flow", "targets", "shift", "layouts", "gap",
           "predictions", "split", "padding", "attention", "mean", "moment", "right")
# Added to a copy of the page: keeps only its figures, which leaves the weights out of the dump.
DRIVER = """
<script>
addEventListener("load", async () => {
  const figures = document.querySelector("#figures");
  while (figures.textContent === "") await new Promise((done) => setTimeout(done, 20));
  document.body.replaceChildren();
  document.body.dataset.found = figures.textContent;
});
</script>
"""


@dataclasses.dataclass
class Config:
    """Compare all numbers of a lesson's page in a headless browser with PyTorch's."""

    page: Annotated[str, tyro.conf.Positional]
    lesson: str
    """the lesson that the page was made from"""


class Result(NamedTuple):
    numbers: int
    largest: float  # difference, of numbers above 1 relative to their size
    wrong: list[str]  # where the page differs by more

    def __str__(self) -> str:
        differing = f"; WRONG: {', '.join(self.wrong[:5])}" if self.wrong else ""
        return (f"lesson page: {self.numbers - len(self.wrong):,} of {self.numbers:,} numbers are "
                f"PyTorch's, the largest difference is {self.largest:.1e}{differing}")


# ----- the page's side ---------------------------------------------------------------------------


def figures_in(page: Path) -> dict:
    """What the page computed, in a browser."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(page.read_text("utf-8") + DRIVER, "utf-8")
        found = re.search(r'data-found="([^"]*)"', dump_dom(copy))
    if not found:
        raise UserError(f"{page}: the browser did not compute all figures")
    return json.loads(html.unescape(found[1]))


# ----- PyTorch's side: models --------------------------------------------------------------------


def logits_of(model: GPT, ids: list[int], segments: list[int] | None = None) -> Tensor:
    """(T, n_vocab)"""
    segments = None if segments is None else torch.tensor([segments])
    return model(torch.tensor([ids]), segments=segments)[0, :, : model.config.n_vocab]


def written(model: GPT, prompt: list[int], stops: list[int], limit: int = 1000) -> dict:
    """Greedy ids, and the probability of each."""
    ids = model.generate([prompt], limit, temperature=0, stop_ids=stops)[0]
    rows = logits_of(model, (prompt + ids)[:-1])[len(prompt) - 1 :].softmax(1)
    return {"ids": ids, "p": rows[range(len(ids)), ids].tolist()}


def predicted(model: GPT, ids: list[int]) -> dict:
    logits = logits_of(model, ids[:-1])
    top = logits.softmax(1).topk(3)
    nll = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    return {"top": top.indices.tolist(), "p": top.values.tolist(), "nll": nll.tolist()}


def share_right(model: GPT, prompts: list[list[int]], answers: list[list[int]], stops) -> int:
    """How many prompts are answered with exactly these ids."""
    found = model.generate(prompts, max(map(len, answers)), temperature=0, stop_ids=stops)
    return sum(ids[: len(answer)] == answer for ids, answer in zip(found, answers))


def padded(model: GPT, prompt: list[int], first: int, k: int, eot: int) -> list[dict]:
    """Padding on the right, on the left without a mask, and on the left with one."""
    pads, alone = [eot] * k, logits_of(model, prompt)[-1]
    rows = (logits_of(model, prompt + pads)[len(prompt) - 1], logits_of(model, pads + prompt)[-1],
            logits_of(model, pads + prompt, [-1] * k + [0] * len(prompt))[-1])
    return [{"moved": float((row - alone).abs().max()), "p": float(row.softmax(0)[first])}
            for row in rows]


def attention_shares(model: GPT, ids: list[int], segments: list[int]) -> tuple[Tensor, Tensor]:
    """((T, T) the share of its attention that a row's token gives each, (T, n_vocab) logits)."""
    seen, kept = isolated_mask(torch.tensor([segments])), []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3))
        kept.append(scores.masked_fill(~seen, -torch.inf).softmax(3))  # (1, n_head, T, T)
        return kept[-1] @ v

    model.attention_for = lambda segments, device: attend
    logits = logits_of(model, ids, segments)
    model.attention_for = attention_for
    return torch.cat(kept).mean((0, 1)), logits


def gradient_norms(model: GPT, ids: list[int], weights: list[int]) -> list[list[float]]:
    """At each column: d loss / d the input of each block, the last block's output, the logits."""
    inputs = [model.transformer.wte(torch.tensor([ids[:-1]]))
              + model.transformer.wpe(torch.arange(len(ids) - 1))]
    for block in model.transformer.h:
        inputs.append(block(inputs[-1], attention_for(None)))
    logits = model.lm_head(model.transformer.ln_f(inputs[-1]))[..., : model.config.n_vocab]
    loss = F.cross_entropy(logits[0], create_labels(ids, weights))
    return [grad[0].norm(dim=1).tolist() for grad in torch.autograd.grad(loss, [*inputs, logits])]


# ----- PyTorch's side: the figures ---------------------------------------------------------------


class Lesson:
    """A lesson, and the models of its page; each method is one entry of the figures."""

    def __init__(self, folder: Path, data: dict):
        self.folder, self.data, self.encoding = folder, data, get_encoding("bytes")
        self.kinds = data["checkpoints"]
        self.models = [model_in(data, i) for i in range(len(self.kinds))]
        for model, kind in zip(self.models, self.kinds):
            where = folder / kind["name"]
            where = where if kind["name"] == "base" else where / f"step_{kind['step']:06d}"
            require_weights_of(model, str(where))
        self.base, self.sft, self.sft_all = self.models[0], self.models[-2], self.models[-1]
        self.facts = read_all(folder / "text/heldout.jsonl")
        own_words = read_all(folder / "text/own_words.jsonl")[-len(self.facts):]
        self.own = {fact["question"]: own for fact, own in zip(self.facts, own_words)}
        answers = {fact["question"]: fact["answer"] for fact in self.facts}
        self.chats = [self.render(chat["question"], answers[chat["question"]])
                      for chat in data["chats"]]
        self.T = self.base.config.block_size

    def render(self, question: str, answer: str) -> dict:
        ids, weights = render(self.encoding, [{"role": "user", "content": question},
                                              {"role": "assistant", "content": answer}])
        P = weights.index(100)
        return {"question": question, "ids": ids, "weights": weights, "P": P, "prompt": ids[:P],
                "answer": ids[P:-1]}

    def rows(self, layout: str, isolate: bool = True, loss_on: str = "response") -> SFTDataset:
        return SFTDataset(str(self.folder / "sft_shards"), "train", self.T, layout, seed=None,
                          isolate=isolate, loss_on=loss_on)

    def write(self, model: GPT, prompt: list[int] | str, **limit) -> dict:
        prompt = list(prompt.encode()) if isinstance(prompt, str) else prompt
        return written(model, prompt, self.data["stops"], **limit)

    def runs(self) -> dict:
        logs = {name: read_all(self.folder / name / "metrics.jsonl") for name in ("base", "sft")}
        return {name: {"steps": log[-1]["step"], "tokens": sum(row["tokens"] for row in log),
                       "trained": sum(row["trained_tokens"] for row in log)}
                for name, log in logs.items()}

    def heldout(self, name: str) -> float:
        """The accuracy that evaluate.py found."""
        questions = {fact["question"] for fact in self.facts}
        rows = [row["right"] for row in read_all(self.folder / f"answers/{name}.jsonl")
                if row["messages"][0]["content"] in questions]
        return sum(rows) / len(rows)

    def evaluated(self) -> dict:
        return {name: self.heldout(name) for name in self.named()}

    def curves(self) -> dict:
        log = [row for row in read_all(self.folder / "sft/metrics.jsonl") if "val_loss" in row]
        accuracies = [[row["step"], row["val_answer_accuracy"]] for row in log]
        return {"accuracies": [[0, self.heldout("base")], *accuracies],
                "val_loss": [[row["step"], row["val_loss"]] for row in log]}

    def template(self) -> list:
        def family(parts: dict) -> dict:
            text = parts["before"] + parts["between"] + parts["after"]
            counts = {mark: text.count(mark) for mark in parts["specials"]}
            return {"marks": sum(counts.values()),
                    "text": len(text) - sum(n * len(mark) for mark, n in counts.items())}

        return [{"ours": {"tokens": len(chat["ids"]), "marks": sum(id > 255 for id in chat["ids"])},
                 "families": list(map(family, FAMILIES))} for chat in self.chats]

    def flow(self) -> list:
        with torch.enable_grad():
            return [gradient_norms(self.base, chat["ids"], chat["weights"]) for chat in self.chats]

    def targets(self) -> dict:
        pad = {name: self.rows("pad", loss_on=name) for name in ("response", "all")}
        n = {name: sum(int((row["labels"] >= 0).sum()) for row in rows)
             for name, rows in pad.items()}
        return {"supervised": n["response"], "all": n["all"], "ignored": n["all"] - n["response"]}

    def shift(self) -> list:
        def labels(ids, P, end):
            weights = [100 * (P <= i < end) for i in range(len(ids))]
            return [None if label < 0 else label for label in create_labels(ids, weights).tolist()]

        return [[labels(chat["ids"], chat["P"] + by, len(chat["ids"]) - 1) for by in (-1, 0, 1)]
                for chat in self.chats]

    def layouts(self) -> dict:
        found = {}
        for name in LAYOUTS:
            rows = self.rows(name)
            cut = sum(stop - start < rows.full_lengths[i] for row in rows.plan
                      for i, start, stop in row)
            found[name] = {"rows": len(rows), "fill": fill_of(rows), "pieces_cut": int(cut)}
        return found

    def gap(self) -> list:
        return [{"asked": self.write(self.base, chat["question"]),
                 "own": self.write(self.base, own["prompt"], limit=len(own["response"])),
                 "tuned": self.write(self.sft, chat["prompt"])}
                for chat in self.chats for own in [self.own[chat["question"]]]]

    def named(self) -> dict[str, GPT]:
        return {"base": self.base, "sft": self.sft, "sft_all": self.sft_all}

    def predictions(self) -> dict:
        return {name: [predicted(model, chat["ids"]) for chat in self.chats]
                for name, model in self.named().items()}

    def split(self) -> dict:
        def nats(model, chat):
            logs = logits_of(model, chat["ids"][:-1]).log_softmax(1)
            costs = -logs[range(len(logs)), chat["ids"][1:]]
            prompt, response = costs[: chat["P"] - 1], costs[chat["P"] - 1 : -1]
            return {"prompt": float(prompt.sum()), "response": float(response.sum())}

        return {name: [nats(model, chat) for chat in self.chats]
                for name, model in self.named().items()}

    def padding(self) -> list:
        chat, most = self.chats[0], self.T - max(chat["P"] for chat in self.chats)
        return [padded(self.sft, chat["prompt"], chat["answer"][0], k, self.encoding.eot_token)
                for k in range(min(16, most) + 1)]

    def attention(self) -> dict:
        rows = self.rows("fit")
        number = next((i for i, row in enumerate(rows.plan) if len(row) > 1), 0)
        ids, weights, segments, _ = rows.tokens(number).tolist()
        first = segments.index(max(segments))

        def answer(logits: Tensor) -> float:  # from the columns of the last example
            labels = create_labels(ids[first:], weights[first:])
            return math.exp(-F.cross_entropy(logits, labels, reduction="sum"))

        def look(segments: list[int]) -> dict:
            shares, logits = attention_shares(self.sft, ids[:-1], segments)
            outside = shares[first:, :first].sum(1).mean()
            return {"shares": [row[: t + 1].tolist() for t, row in enumerate(shares)],
                    "outside": float(outside), "p": answer(logits[first:])}

        return {"p_alone": answer(logits_of(self.sft, ids[first:-1])),
                "isolated": look(segments[:-1]), "open": look([0] * (len(ids) - 1))}

    def mean(self) -> list:
        pad, nll = self.rows("pad"), []
        for row in (pad[i] for i in range(min(9, len(pad)))):
            costs = F.cross_entropy(logits_of(self.base, row["input_ids"].tolist()), row["labels"],
                                    reduction="none")
            nll.append(costs[row["labels"] >= 0])
        two = max(nll, key=lambda costs: float(costs.mean()))
        ones = [costs for costs in nll if costs is not two]
        return [self.means(torch.cat(ones[: i + 1]), two) for i in range(len(ones))]

    def means(self, one: Tensor, two: Tensor) -> dict:
        losses = [float(one.mean()), float(two.mean())]
        return {"tokens": [len(one), len(two)], "losses": losses, "means": sum(losses) / 2,
                "step": float(torch.cat([one, two]).mean()), "votes": len(one) / len(two)}

    def moment(self) -> list:
        return [[self.write(model, chat["prompt"]) for chat in self.chats]
                for model in self.models[:-1]]

    def right(self) -> dict:
        stops, own = self.data["stops"], [self.own[fact["question"]] for fact in self.facts]
        chats = [self.render(fact["question"], fact["answer"]) for fact in self.facts]
        prompts, answers = ([chat[key] for chat in chats] for key in ("prompt", "answer"))
        words = ([list(row[key].encode()) for row in own] for key in ("prompt", "response"))
        return {"of": len(chats), "own": share_right(self.base, *words, stops),
                **{name: share_right(model, prompts, answers, stops)
                   for name, model in self.named().items()}}

    @torch.no_grad()
    def figures(self) -> dict:
        return {name: getattr(self, name)() for name in FIGURES}


# ----- both --------------------------------------------------------------------------------------


def differences(found, want, place: str = ""):
    """(place, difference) of every number; infinite where the two are not alike."""
    if isinstance(found, dict) and isinstance(want, dict) and found.keys() == want.keys():
        for key in want:
            yield from differences(found[key], want[key], f"{place}.{key}")
    elif isinstance(found, list) and isinstance(want, list) and len(found) == len(want):
        for i, pair in enumerate(zip(found, want)):
            yield from differences(*pair, f"{place}[{i}]")
    elif isinstance(want, float) and isinstance(found, int | float):
        yield place, abs(found - want) / max(1, abs(want))
    else:
        yield place, 0.0 if found == want else math.inf


def check(page: Path, lesson: Path) -> Result:
    found = figures_in(page)
    want = Lesson(lesson, data_in(page)).figures()
    pairs = list(differences(found, want))
    wrong = [place for place, difference in pairs if not difference <= TOLERANCE]
    return Result(len(pairs), max(difference for _, difference in pairs), wrong)


def main(config: Config) -> None:
    if CHROMIUM is None:
        print("lesson page: not checked, because there is no chromium or google-chrome")
        return
    result = check(Path(config.page), Path(config.lesson))
    print(result)
    if result.wrong:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main, Config)
