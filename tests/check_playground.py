"""Does the JavaScript of a playground compute what PyTorch computes? Ask both all questions.

    python -m tests.check_playground out/lesson/playground.html --lesson out/lesson

A headless browser asks the page each question, at the base model, a checkpoint in the middle, and
the last one. Its greedy answers must be those of GPT.generate on the page's own half-precision
weights in float32, and its logits within 2e-3. The weights must be the checkpoints', rounded; where
that changes an answer is counted apart. One line of results; exit code 1 if the page disagrees.
"""

import base64
import dataclasses
import html
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m tests.check_playground", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
import tyro

from model import GPT, GPTConfig
from nanosft.cli import run_cli
from nanosft.errors import UserError
from nanosft.sources import read_rows
from tests.helpers_browser import CHROMIUM, dump_dom
from tokenizer import get_encoding, render_prompt

TOLERANCE = 2e-3  # of logits
# Added to a copy of the page: uses it as a visitor does, by the address and the slider, and leaves
# the answers in an element. CASES is a list of [question, "chat" or "text"], STOPS of slider stops.
DRIVER = """
<script>
const changed = () => new Promise((done) => addEventListener("hashchange", done, { once: true }));
const base64 = (floats) => btoa(String.fromCharCode(...new Uint8Array(floats.buffer)));

async function answerOf(name, column) {
  const output = document.querySelector(`[data-answer-of=${name}]`);
  while (output.dataset.complete !== "true") await new Promise((done) => setTimeout(done, 20));
  const { tokens } = column;
  return { text: output.textContent, ids: tokens.map((token) => token.id),
    logits: [tokens[0], tokens.at(-1)].map((token) => base64(token.logits)) };
}

addEventListener("load", async () => {
  const found = [], slider = document.querySelector("#step");
  for (const [question, as] of CASES) {
    location.hash = `#q=${encodeURIComponent(question)}&as=${as}`;
    await changed();
    found.push([await answerOf("base", BASE)]);
    for (const stop of STOPS) {
      slider.value = stop;
      slider.dispatchEvent(new Event("input"));
      found.at(-1).push(await answerOf("sft", SFT));
    }
  }
  document.body.replaceChildren(); // leaves the weights out of the dump
  document.body.dataset.found = JSON.stringify(found);
});
</script>
"""


@dataclasses.dataclass
class Config:
    """Compare the answers of a playground in a headless browser with PyTorch's."""

    page: Annotated[str, tyro.conf.Positional]
    lesson: str
    """the lesson that the page was made from: base/, sft/, and text/questions.jsonl"""


class Case(NamedTuple):
    question: str
    mode: str  # chat or text


class Answer(NamedTuple):
    text: str
    ids: list[int]
    logits: np.ndarray  # (2, n_vocab): those that the first and the last id were chosen from


class Result(NamedTuple):
    answers: int
    different: int  # from PyTorch's with the same weights
    largest: float  # difference of logits
    flipped: int  # answers that the full-precision checkpoint does not give

    def __str__(self) -> str:
        return (f"playground: {self.answers - self.different} of {self.answers} answers are "
                f"PyTorch's, logits within {self.largest:.1e}; rounding to half precision changes "
                f"{self.flipped} answers")

    def agrees(self) -> bool:
        return self.different == 0 and self.largest <= TOLERANCE


# ----- the page's side ---------------------------------------------------------------------------


def data_in(page: Path) -> dict:
    """The page's JSON, as a browser finds it, up to the first end of a script; and the weights."""
    text = page.read_text("utf-8")
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script', text, re.DOTALL)[1])
    return data | {"weights": re.findall(r'data-weights="\d+">([^<]*)<', text)}


def ask_page(page: Path, cases: list[Case], stops: list[int]) -> list[list[Answer]]:
    """For each case the base model's answer, then the right column's at each stop of the slider."""
    cases_json = json.dumps(cases).replace("<", "\\u003c")
    constants = f"<script>const CASES = {cases_json}, STOPS = {stops};</script>"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(page.read_text("utf-8") + constants + DRIVER, "utf-8")
        dom = dump_dom(copy)
    found = re.search(r'data-found="([^"]*)"', dom)
    if not found:
        raise UserError(f"{page}: the browser did not answer all questions")
    return [[read_answer(answer) for answer in answers]
            for answers in json.loads(html.unescape(found[1]))]


def read_answer(answer: dict) -> Answer:
    logits = [np.frombuffer(base64.b64decode(row), "<f4") for row in answer["logits"]]
    return Answer(answer["text"], answer["ids"], np.stack(logits))


# ----- PyTorch's side ----------------------------------------------------------------------------


def model_in(data: dict, stop: int) -> GPT:
    """A model of the page: its half-precision weights, in float32."""
    model, at = GPT(GPTConfig(**data["config"])), 0
    weights = base64.b64decode(data["weights"][stop])
    flat = torch.from_numpy(np.frombuffer(weights, "<f2").astype(np.float32))
    with torch.no_grad():
        for p in model.parameters():  # in model.py's order, the tied head left out
            rows = p[: data["config"]["n_vocab"]] if at == 0 else p
            rows.copy_(flat[at : at + rows.numel()].view_as(rows))
            at += rows.numel()
    assert at == len(flat)
    return model


def require_weights_of(model: GPT, folder: str) -> GPT:
    """The checkpoint in full precision. UserError: a model of the page is not that, rounded."""
    full, n_vocab = GPT.from_pretrained(folder), model.config.n_vocab
    for rounded, p in zip(model.parameters(), full.parameters()):
        if not torch.equal(rounded[:n_vocab], p[:n_vocab].half().float()):
            raise UserError(f"{folder}: its weights are not those of the page; make the page again")
    return full


def prompt_of(data: dict, case: Case) -> list[int]:
    encoding = get_encoding("bytes")
    if case.mode == "text":
        return encoding.encode_ordinary(case.question)
    message = {"role": "user", "content": case.question}
    return render_prompt(encoding, [message], data["template"]["name"])


def answers_of(model: GPT, prompts: list[list[int]], stops: list[int]) -> list[list[int]]:
    """The ids of greedy answers up to a stop id, or to a full context."""
    return model.generate(prompts, model.config.block_size, temperature=0, stop_ids=stops)


@torch.no_grad()
def logits_of(model: GPT, prompt: list[int], ids: list[int]) -> np.ndarray:
    """(2, n_vocab): what the first and the last id of an answer are chosen from."""
    n, last = len(prompt), len(prompt) + len(ids) - 1
    logits = model(torch.tensor([(prompt + ids)[:last]]))[0, [n - 1, last - 1]]
    return logits[:, : model.config.n_vocab].numpy()


# ----- both --------------------------------------------------------------------------------------


def compare(data: dict, stop: int, folder: str, prompts: list, answers: list[Answer]) -> Result:
    """The page's answers of one model; folder: its checkpoint, in full precision."""
    model = model_in(data, stop)
    full = require_weights_of(model, folder)
    encoding, end = get_encoding("bytes"), set(data["stops"])
    right = answers_of(model, prompts, data["stops"])
    texts = [encoding.decode(ids[:-1] if ids[-1] in end else ids) for ids in right]
    return Result(
        len(answers),
        sum((a.ids, a.text) != pair for a, pair in zip(answers, zip(right, texts))),
        max(float(abs(logits_of(model, prompt, a.ids) - a.logits).max())
            for prompt, a in zip(prompts, answers)),
        sum(a != b for a, b in zip(right, answers_of(full, prompts, data["stops"]))))


def check(page: Path, base: str, run: str, questions: list[str]) -> Result:
    """All questions as chats, and the page's own suggestions; those that fit in the context."""
    data = data_in(page)
    suggested = [Case(row["question"], row["as"]) for row in data["questions"]]
    cases = list(dict.fromkeys([*(Case(question, "chat") for question in questions), *suggested]))
    cases = [case for case in cases if len(prompt_of(data, case)) < data["config"]["block_size"]]
    prompts, last = [prompt_of(data, case) for case in cases], len(data["checkpoints"]) - 1
    stops = [0, *sorted({(last + 1) // 2, last})]  # the base model, one in the middle, the last one
    columns = zip(*ask_page(page, cases, stops[1:]))
    folders = [base, *(f"{run}/step_{data['checkpoints'][stop]['step']:06d}" for stop in stops[1:])]
    parts = [compare(data, stop, folder, prompts, list(column))
             for stop, folder, column in zip(stops, folders, columns)]
    answers, different, largest, flipped = zip(*parts)
    return Result(sum(answers), sum(different), max(largest), sum(flipped))


def main(config: Config) -> None:
    if CHROMIUM is None:
        print("playground: not checked, because there is no chromium or google-chrome")
        return
    lesson = Path(config.lesson)
    rows = read_rows(f"{lesson}/text/questions.jsonl")
    result = check(Path(config.page), f"{lesson}/base", f"{lesson}/sft",
                   [row["question"] for _, row in rows])
    print(result)
    if not result.agrees():
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main, Config)
