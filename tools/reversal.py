"""Does the loss mask matter? Words reversed from scratch, with the mask and without it.

    python -m tools.reversal --seeds 1 2 3 --out out/reversal     # 7 minutes on one CPU core

A row is `<hello>olleh#`. With the mask on, only `olleh#` is in the loss; with the mask off, so are
the prompt's letters, which nothing can predict. Model, words, order, and steps are the same: only
the loss weights differ. Unless its name says otherwise, a setting has 2 layers, is 64 wide, and
uses words of 4 letters drawn from 26 equally likely ones. Prints a markdown table of where there is
a gap and why, and writes reversal.md, .json, and .png: the share of held-out words that greedy
decoding reverses exactly, over the steps.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m tools.reversal", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, GPTConfig
from nanosft import fast
from nanosft.cli import run_cli
from nanosft.errors import to_json
from nanosft.weights import pad_vocab
from train_gpt2 import MicroBatch, Ranks, get_lr, make_optimizer, train_step
from train_sft import Config as SFTConfig, forward_sft

SYMBOLS = "abcdefghijklmnopqrstuvwxyz<>#"
BEGIN, ANSWER, END = 26, 27, 28  # < > #
B, EVERY, SOLVED, N_TEST = 32, 10, 0.9, 100  # rows a step; steps between tests
# Letters of English text per thousand (Lewand, Cryptological Mathematics, 2000)
ENGLISH = (82, 15, 28, 43, 127, 22, 20, 61, 70, 2, 8, 40, 24, 67, 75, 19, 1, 60, 63, 91, 28, 10, 24,
           2, 20, 1)


@dataclasses.dataclass
class Config:
    """Train every setting of this file with each seed and print a table."""

    seeds: tuple[int, ...] = (1, 2, 3)
    """of the words, the model, and the order of the rows"""
    out: str = "out/reversal"
    """folder for the table, the numbers, and the plot"""


class Run(NamedTuple):
    """The data, the model, and which part of a row is in the loss. Learning rate: AdamW's peak."""

    name: str
    letters: tuple[int, ...] = (1,) * 26  # how often each occurs
    length: int = 4  # of a word
    n_words: int = 10_000  # at most, to train on: a run of 300 steps reads as many
    filler: int = 0  # letters of the prompt before the word that the answer leaves out
    filler_letters: int = 26  # 1: the filler is always `aaa…`
    n_layer: int = 2
    n_embd: int = 64
    learning_rate: float = 2e-3
    steps: int = 300
    prompt_weight: float = 0.0  # 0: mask on; 1: mask off
    prompt_steps: int = 0  # first, this many steps on the prompt alone
    tied: bool = True  # the head is the token embedding
    embedding_scale: float = 1.0  # over GPT-2's initial embedding
    forward: Callable = forward_sft

    @property
    def prompt_length(self) -> int:
        return 2 + self.filler + self.length


# ----- words and rows ----------------------------------------------------------------------------


def split_words(run: Run, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(n, length) ids of distinct words for training, and of others that are held out."""
    p = np.array(run.letters) / sum(run.letters)
    words = rng.choice(len(p), (2 * run.n_words + 2000, run.length), p=p)
    words = rng.permutation(np.unique(words, axis=0))
    n_test = min(N_TEST, len(words) // 5)
    return words[n_test:][: run.n_words], words[:n_test]


def make_rows(words: np.ndarray, run: Run, rng: np.random.Generator) -> np.ndarray:
    """(n, length) -> (n, T + 1): `hello` -> `<hello>olleh#`."""
    n = len(words)
    filler = rng.integers(run.filler_letters, size=(n, run.filler))
    begin, answer, end = (np.full((n, 1), symbol) for symbol in (BEGIN, ANSWER, END))
    return np.hstack([begin, filler, words, answer, words[:, ::-1], end])


def make_batch(rows: np.ndarray, P: int, prompt: float, answer: float = 1.0) -> MicroBatch:
    """(B, T + 1) -> a micro-batch; `prompt` and `answer` are the weights of their targets."""
    ids = torch.from_numpy(rows)
    weights = torch.full((len(rows), ids.size(1) - 1), answer)  # (B, T)
    weights[:, : P - 1] = prompt
    return MicroBatch(ids[:, :-1], ids[:, 1:], weights)


def prompt_bits(run: Run) -> float:
    """Entropy of a prompt: what no model can predict."""
    p = np.array([count for count in run.letters if count]) / sum(run.letters)
    word = -run.length * (p * np.log2(p)).sum()
    if run.n_words < 1000:  # a short list, read again and again; others are hardly read twice
        word = min(word, np.log2(run.n_words))
    return float(word + run.filler * np.log2(run.filler_letters))


# ----- one run -----------------------------------------------------------------------------------


def forward_half(*batch) -> Tensor:
    """Half the gradient: what the answer gets when the mean includes the prompt's targets, too."""
    return forward_sft(*batch) / 2


def forward_expected(model, x, y, weights, segments=None) -> Tensor:
    """A prompt letter's loss is the mean over all letters: the same gradient on average, but
    without the noise of the sampled letter."""
    nll = -model(x).log_softmax(-1)[..., : len(SYMBOLS)]  # (B, T, 29)
    drawn = ((x == ANSWER).cumsum(1) == 0) & (y < BEGIN)  # (B, T)
    nll = torch.where(drawn, nll[..., :BEGIN].mean(-1), nll.gather(2, y[..., None])[..., 0])
    return (weights * nll).sum()


def make_model(run: Run, seed: int) -> GPT:
    torch.manual_seed(seed)
    T, V = run.prompt_length + run.length + 1, len(SYMBOLS)
    model = GPT(GPTConfig(T, pad_vocab(V), run.n_layer, 4, run.n_embd, n_vocab=V))
    model.transformer.wte.weight.data *= run.embedding_scale
    if not run.tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return fast.speed_up(model)


def share_right(model: GPT, rows: np.ndarray, P: int) -> float:
    """Share of the rows whose greedy answer is right to the last symbol."""
    answers = model.generate(rows[:, :P].tolist(), rows.shape[1] - P, 0.0, stop_ids=[END])
    return float(np.mean([a == b for a, b in zip(answers, rows[:, P:].tolist())]))


def likeness(model: GPT, run: Run) -> float:
    """Mean cosine between the embeddings of two different letters: 1 if all are the same."""
    used = F.normalize(model.transformer.wte.weight.detach()[np.flatnonzero(run.letters)])
    return float(((used @ used.T).sum() - len(used)) / (len(used) * (len(used) - 1)))


def train_run(run: Run, seed: int) -> dict:
    """Train and test -> {"right": one share per EVERY steps, "likeness": likewise, "loss": …}"""
    rng, P = np.random.default_rng(seed), run.prompt_length
    rows, test = (make_rows(words, run, rng) for words in split_words(run, rng))
    config = SFTConfig(data="", out="", learning_rate=run.learning_rate, warmup_steps=50)
    model, ranks = make_model(run, seed), Ranks(0, 1, torch.device("cpu"))
    optimizer = make_optimizer(model, config)
    result = {"right": [], "likeness": [], "loss": []}
    for step in range(1, run.steps + 1):
        weights = (1.0, 0.0) if step <= run.prompt_steps else (run.prompt_weight, 1.0)
        batch = make_batch(rows[rng.integers(len(rows), size=B)], P, *weights)
        metrics = train_step(model, optimizer, [batch], get_lr(step - 1, run.steps, config),
                             config.grad_clip, ranks, run.forward)
        if step % EVERY == 0:
            result["right"].append(share_right(model, test, P))
            result["likeness"].append(likeness(model, run))
            result["loss"].append(metrics["loss"])
    return result


# ----- the runs ----------------------------------------------------------------------------------

SETTINGS = [
    Run("26 letters"),
    Run("English letters", ENGLISH),
    Run("4 letters", (1,) * 4 + (0,) * 22),
    Run("100 words", n_words=100),
    Run("8-letter words", length=8),
    Run("12 random letters first", filler=12),
    Run("12 times `a` first", filler=12, filler_letters=1),
    Run("learning rate / 4", learning_rate=5e-4),
    Run("128 wide", n_embd=128),
    Run("1 layer, 16 wide", n_layer=1, n_embd=16),
    Run("1 layer, 32 wide, 600 steps", n_layer=1, n_embd=32, steps=600),
    Run("1 layer, 32 wide", n_layer=1, n_embd=32),
]
SMALL = SETTINGS[-1]
OFF = SMALL._replace(prompt_weight=1.0)
CAUSES = [
    SMALL._replace(name="on, half the gradient", forward=forward_half),
    OFF._replace(name="off, without the noise", forward=forward_expected),
    SMALL._replace(name="prompt weighs 0.1", prompt_weight=0.1),
    SMALL._replace(name="on, after 40 steps of prompt", prompt_steps=40),
    OFF._replace(name="off, head not tied", tied=False),
    SMALL._replace(name="on, head not tied", tied=False),
    OFF._replace(name="off, embedding x5 at first", embedding_scale=5.0),
    SMALL._replace(name="on, embedding x5 at first", embedding_scale=5.0),
]


# ----- the table and the plot --------------------------------------------------------------------


def all_runs() -> list[tuple[str, str, Run]]:
    """(setting, what is in the loss, run) of each line of the table."""
    pairs = [(run.name, f"mask {label}", run._replace(prompt_weight=weight))
             for run in SETTINGS for label, weight in (("on", 0.0), ("off", 1.0))]
    return pairs + [(f"{SMALL.name}: why", run.name, run) for run in CAUSES]


def steps_to_solve(result: dict) -> int | None:
    """The first evaluated step with 90% right; None: never."""
    solved = np.flatnonzero(np.array(result["right"]) >= SOLVED)
    return EVERY * (int(solved[0]) + 1) if len(solved) else None


def steps_cell(results: list[dict]) -> str:
    """'70 (60 to 80)': mean, lowest, and highest; '> 300' where a run never got there."""
    steps = [steps_to_solve(result) for result in results]
    last = EVERY * len(results[0]["right"])
    if not any(steps):
        return f"> {last}"
    mean, low = np.mean([step or last for step in steps]), min(filter(None, steps))
    high = f"{max(steps)}" if all(steps) else f"> {last}"
    return f"{'' if all(steps) else '> '}{mean:.0f} ({low} to {high})"


def range_cell(values: list[float], form: str) -> str:
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def cells(results: list[dict]) -> str:
    last = min(100 // EVERY, len(results[0]["likeness"])) - 1
    return " | ".join([steps_cell(results),
                       range_cell([result["right"][-1] for result in results], ".0%"),
                       range_cell([result["likeness"][last] for result in results], ".2f")])


def draw(curves: list[tuple[str, str, list[dict]]], path: Path) -> None:
    """One panel per setting: the mean over the seeds, and a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")  # to a file; no window
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(panel for panel, *_ in curves))
    n = -(-len(panels) // 4)
    figure, axes = plt.subplots(n, 4, figsize=(14, 3 * n), squeeze=False, layout="constrained")
    for panel, label, results in curves:
        ax = axes.flat[panels.index(panel)]
        right = 100 * np.array([result["right"] for result in results])  # (seeds, evaluations)
        steps = EVERY * np.arange(1, right.shape[1] + 1)
        ax.plot(steps, right.mean(0), label=label)
        ax.fill_between(steps, right.min(0), right.max(0), alpha=0.2)
        ax.set(title=panel, xlabel="step", ylabel="% right", ylim=(-3, 103))
        ax.legend(fontsize=7)
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    lines = ["| setting | bits of a prompt | in the loss | steps to 90% | right at the end | "
             "cosine at step 100 |", "|---" * 6 + "|"]
    print(*lines, sep="\n", flush=True)
    curves, records = [], []
    for setting, label, run in all_runs():
        results = [train_run(run, seed) for seed in config.seeds]
        curves.append((setting, label, results))
        records += [{"setting": setting, "trained": label, "seed": seed, "every": EVERY} | result
                    for seed, result in zip(config.seeds, results)]
        lines.append(f"| {setting} | {prompt_bits(run):.1f} | {label} | {cells(results)} |")
        print(lines[-1], flush=True)
    (out / "reversal.md").write_text("\n".join(lines) + "\n", "utf-8")
    (out / "reversal.json").write_text(to_json(records), "utf-8")
    draw([curve for curve in curves if curve[1].startswith("mask")], out / "reversal.png")


if __name__ == "__main__":
    run_cli(main, Config)
