"""What a choice or a mistake in fine-tuning costs: the lesson with one thing changed at a time.

    bash runs/ablations.sh                      # makes the lessons that this file reads: the flags
    bash runs/ablations.sh --experiment bugs    # mistakes that real projects shipped

Each run starts from the base model of its seed's lesson, with the lesson's data and flags, in this
process, which imports torch only once. Prints a markdown table: the mean over the seeds, the range
where there are several, and one answer of the first seed. docs/bugs_that_shipped.md says who made
each mistake. The mistakes exist only here, in what this file passes to `train`.
"""

import contextlib
import dataclasses
import functools
import io
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from unittest import mock

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m tools.ablations", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import evaluate
import sft_data
import train_sft
from data.worksheet import write_rows
from model import GPT, IGNORE_INDEX
from nanosft.cli import run_cli
from packing import LAYOUTS
from sft_data import SFTDataset
from tokenizer import KEPT_ANSWER, get_encoding
from tools.lesson import read_all, scores
from train_gpt2 import train

COLUMNS = ("heldout_acc", "trained_acc", "stop_rate")


@dataclasses.dataclass
class Config:
    """Run an experiment on finished lessons of several seeds and print its table."""

    experiment: Literal["lesson", "bugs"] = "lesson"
    """lesson: the flags of the lesson; bugs: mistakes that real projects shipped"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """of the finished lessons to use"""
    root: str = "out/ablations"
    """holds the lessons, lesson_SEED each; gets EXPERIMENT/ (replaced) and EXPERIMENT.md"""


class Variant(NamedTuple):
    """One row of a table: what differs from the lesson."""

    name: str
    flags: dict = {}  # over those of the lesson
    rows: type[SFTDataset] = SFTDataset
    forward: Callable = train_sft.forward_sft
    data: Callable[[Path, Path], str] | None = None  # makes other chats; None: the lesson's
    template: str | None = None  # for the evaluation questions; None: the one used in training
    asked: Callable = contextlib.nullcontext  # the context of the evaluation
    every_seed: bool = True  # False: run on the first seed only


# ----- experiment `lesson`: what each choice is worth --------------------------------------------


def lesson_config(lesson: Path, seed: int) -> train_sft.Config:
    """The fine-tuning flags of runs/lesson.sh, read from it so that they cannot differ."""
    script = (Path(__file__).parents[1] / "runs/lesson.sh").read_text("utf-8").replace("\\\n", " ")
    arrays = dict(re.findall(r"^(\w+)=\((.*)\)$", script, re.M))  # common and tuning
    flags = re.search(r"train_sft\.py (--.*)$", script, re.M)[1]
    flags = re.sub(r'"\$\{(\w+)\[@\]\}"', lambda match: arrays[match[1]], flags)
    flags = shlex.split(flags.replace("$SEED", str(seed)).replace("$OUT", str(lesson)))
    config = tyro.cli(train_sft.Config, args=flags, use_underscores=True)
    # one process instead of two, and no logging or checkpoints: only the result matters
    return dataclasses.replace(config, batch_size=config.rows_per_step, eval_every=0,
                               eval_prompts=0, save_every=0, log_every=1000)


def lesson_variants(lesson: train_sft.Config) -> list[Variant]:
    n = len(SFTDataset(lesson.data, "train", lesson.block_size, "pad"))
    lr = lesson.learning_rate
    variants = [
        Variant("lesson (fit, isolated, response)"),
        Variant("loss on all tokens", {"loss_on": "all"}),
        Variant("mask one too long (<|assistant|> is in the loss)", rows=MaskTooLong),
        Variant("mask one too short (first answer token is not)", rows=MaskTooShort),
        Variant("fit, not isolated", {"isolate": False}),
        Variant("stream, not isolated", {"layout": "stream", "isolate": False}),
    ]
    variants += [Variant(layout, {"layout": layout}) for layout in LAYOUTS
                 if layout != lesson.layout]
    once = {
        "learning rate x10": {"learning_rate": lr * 10},
        "learning rate /10": {"learning_rate": lr / 10},
        "1% of the examples": {"max_examples": max(1, round(n / 100))},
        "10% of the examples": {"max_examples": round(n / 10)},
        "no pretraining": {"init": "scratch", "n_layer": 3, "n_head": 4, "n_embd": 128},
    }
    return variants + [Variant(name, change, every_seed=False) for name, change in once.items()]


# ----- experiment `bugs`: mistakes that real projects shipped ------------------------------------


class MaskTooLong(SFTDataset):
    """Each supervised span begins one token early."""

    def tokens(self, i: int) -> np.ndarray:
        columns = super().tokens(i)
        weights = columns[1]  # a view
        weights[:-1][(weights[1:] > 0) & (weights[:-1] == 0)] = 100
        return columns


class MaskTooShort(SFTDataset):
    """Each supervised span begins one token late."""

    def tokens(self, i: int) -> np.ndarray:
        columns = super().tokens(i)
        weights = columns[1]  # a view
        weights[1:][(weights[1:] > 0) & (weights[:-1] == 0)] = 0
        return columns


class ShiftedTwice(SFTDataset):
    """The rows shift the labels, and the loss does too: each token predicts the one after next."""

    def padded(self, indices: Sequence[int | None]) -> dict[str, Tensor]:
        rows = super().padded(indices)
        return rows | {"labels": F.pad(rows["labels"][:, 1:], (0, 1), value=IGNORE_INDEX),
                       "weights": F.pad(rows["weights"][:, 1:], (0, 1))}


def end_of(rows: SFTDataset) -> int:
    return get_encoding(rows.meta["encoding"]).encode_single_token("<|end|>")


class EndIsPadding(SFTDataset):
    """Padding has the id of the end token and is masked by its id, not by its position."""

    def tokens(self, i: int) -> np.ndarray:
        columns = super().tokens(i)
        columns[1][columns[0] == end_of(self)] = 0
        return columns


class SearchedMarker(SFTDataset):
    """Supervises what follows the marker, encoded by itself; if it is not found, nothing."""

    def marker(self) -> list[int]:
        return get_encoding(self.meta["encoding"]).encode_ordinary("<|assistant|>")

    def tokens(self, i: int) -> np.ndarray:
        columns, marker = super().tokens(i), self.marker()
        ids, columns[1] = columns[0].tolist(), 0
        for start in range(len(marker), len(ids)):
            if ids[start - len(marker) : start] == marker:
                columns[1, start : ids.index(end_of(self), start) + 1] = 100
        return columns


class MeanOfMeans(SFTDataset):
    """Each micro-batch counts the same, however many of its tokens are in the loss: the mean of
    their means."""

    def batch(self, indices: Sequence[int | None], multiple: int = 1) -> dict:
        batch = super().batch(indices, multiple)
        # any constant will do; a large one, because the trainer adds up weights in whole percent
        batch["weights"] *= 1000 / batch["weights"].sum().clamp(min=1)
        return batch


class RanksApart(SFTDataset):
    """Two ranks, half of each step's rows each, shuffle with their own seeds: they read some
    examples of an epoch twice, and some not at all."""

    def __init__(self, *args, seed: int, **kwargs):
        self.second = SFTDataset(*args, seed=seed + 1, **kwargs)
        super().__init__(*args, seed=seed, **kwargs)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.second.set_epoch(epoch)

    def tokens(self, i: int) -> np.ndarray:
        is_second = i % self.rows_per_step >= self.rows_per_step // 2
        return self.second.tokens(i) if is_second else super().tokens(i)


def forward_running_positions(model, x: Tensor, y: Tensor, weights: Tensor,
                              segments: Tensor) -> Tensor:
    """forward_sft, but positions run on through the row; only attention is isolated."""
    hidden = model.hidden(x, segments, positions=torch.arange(x.size(1)))  # (B, T, C)
    return model.nll_sum(hidden, y, weights)


class PaddedLeft(SFTDataset):
    """Padding precedes the example, which attends to it and counts it in its positions."""

    def padded(self, indices: Sequence[int | None]) -> dict[str, Tensor]:
        rows = super().padded(indices)
        n_padding = (rows["segments"] < 0).sum(1, keepdim=True)  # (B, 1)
        source = (torch.arange(self.block_size) - n_padding) % self.block_size  # (B, T)
        return {name: values.gather(1, source) for name, values in rows.items()}


def padded_left(width: int) -> contextlib.AbstractContextManager:
    """In this context prompts are padded on the left to `width` ids, and nothing masks that."""
    generate, padding = GPT.generate, [get_encoding("bytes").eot_token] * width

    def generate_padded(gpt: GPT, prompts: Sequence[Sequence[int]], *args, **sampling) -> list:
        padded = [[*padding, *ids][-max(width, len(ids)) :] for ids in prompts]
        return generate(gpt, padded, *args, **sampling)

    return mock.patch.object(GPT, "generate", generate_padded)


class PaddingInLoss(SFTDataset):
    """The padding of a row is in the loss: <|endoftext|> after <|endoftext|>."""

    def padded(self, indices: Sequence[int | None]) -> dict[str, Tensor]:
        rows = super().padded(indices)
        is_padding = rows["segments"] < 0  # (B, T)
        is_padding &= ~is_padding.all(1, keepdim=True)  # filler is no row
        rows["labels"][is_padding], rows["weights"][is_padding] = self.eot, 1.0
        return rows


def chats_with_mistakes(lesson: Path, out: Path) -> str:
    """The lesson's chats as shards, but in every second one a wrong answer, marked as not to be
    trained, comes first; then the question is asked again."""
    chats = []
    for i, row in enumerate(read_all(lesson / "text/sft_train.jsonl")):
        wrong = re.sub(r"(?<==)\d+", lambda result: str(int(result[0]) + 1), row["answer"])
        question = {"role": "user", "content": row["question"]}
        mistake = [question, {"role": "assistant", "content": wrong, "train": False}]
        answer = [question, {"role": "assistant", "content": row["answer"]}]
        chats.append({"messages": answer if i % 2 else mistake + answer})
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "chats.jsonl", chats)
    sft_data.main(sft_data.Config(source=(str(out / "chats.jsonl"),), out=str(out / "shards"),
                                  val_fraction=0, encoding="bytes", workers=1))
    return str(out / "shards")


class InstructionIgnored(SFTDataset):
    """Answers that the data says not to train are trained."""

    def piece(self, number: int, start: int, stop: int) -> np.ndarray:
        ids, stored = super().piece(number, start, stop)
        return np.stack([ids, np.where(stored == KEPT_ANSWER, 100, stored)])


def bug_variants(lesson: train_sft.Config) -> list[Variant]:
    """The correct code first, and again where a mistake shows only with other flags."""
    half = lesson.rows_per_step // 2  # the two ranks of runs/lesson.sh
    twice = lesson.rows_per_step * 2  # a row of one example, but as many examples as packed rows
    padded = {"layout": "pad", "rows_per_step": twice, "batch_size": twice}
    shortest = int(SFTDataset(lesson.data, "train", lesson.block_size, "pad").lengths.min())
    cut = shortest - 4  # T + 1 ids are three less: without <|endoftext|>, <|end|>, and the period
    return [
        Variant("correct code"),
        Variant("the mask is lost", {"loss_on": "all"}),
        Variant("the mask begins one token late", rows=MaskTooShort),
        Variant("labels are shifted twice", rows=ShiftedTwice),
        Variant("the end token is masked as padding", rows=EndIsPadding),
        Variant("the answer is searched and not found", rows=SearchedMarker),
        Variant(f"mean of means, {half} rows each", {"batch_size": half}, MeanOfMeans),
        Variant("mean of means, 1 row each", {"batch_size": 1}, MeanOfMeans),
        Variant("neighbors in the row are seen", {"isolate": False}),
        Variant("neighbors are seen, examples cut", {"isolate": False, "layout": "stream"}),
        Variant("positions do not start again", forward=forward_running_positions),
        Variant("two ranks shuffle differently", rows=RanksApart),
        Variant("asked without the chat template", template="raw"),
        Variant("correct code, one example a row", {"layout": "pad"}),
        Variant(f"the same, cut at {cut + 1} ids", {"layout": "pad", "block_size": cut}),
        Variant("the mask begins one token early", rows=MaskTooLong),
        Variant(f"correct code, {twice} examples a step", padded),
        Variant("padding is in the loss", padded, PaddingInLoss),
        Variant("padding comes first, in training", padded, PaddedLeft),
        *(Variant(f"padding comes first, in prompts of {width} ids",
                  asked=functools.partial(padded_left, width)) for width in (16, 24)),
        Variant("correct code, chats with mistakes", data=chats_with_mistakes),
        Variant("the marks of the mistakes are ignored", {}, InstructionIgnored,
                data=chats_with_mistakes),
    ]


# ----- runs and the table ------------------------------------------------------------------------

EXPERIMENTS = {"lesson": lesson_variants, "bugs": bug_variants}


def open_rows(rows: type[SFTDataset], config: train_sft.Config, split: str) -> SFTDataset | None:
    """train_sft.open_rows, or for other rows than SFTDataset the training split only."""
    if rows is SFTDataset:
        return train_sft.open_rows(config, split)
    if split == "val":
        return None
    return rows(config.data, split, config.block_size, config.layout, seed=config.seed,
                isolate=config.isolate, rows_per_step=config.rows_per_step)


def run_variant(lesson: Path, seed: int, variant: Variant, out: Path) -> dict:
    """Fine-tune and ask all questions -> the columns, and the answer to the first held-out one."""
    flags = {"out": str(out / "run"), **variant.flags}
    questions = evaluate.Config(flags["out"], str(lesson / "text/questions.jsonl"), device="cpu",
                                template=variant.template, batch_size=128, max_new_tokens=32,
                                save=str(out / "answers.jsonl"))
    with contextlib.redirect_stdout(io.StringIO()):
        if variant.data:
            flags["data"] = variant.data(lesson, out)
        config = dataclasses.replace(lesson_config(lesson, seed), **flags)
        train(config, functools.partial(open_rows, variant.rows), variant.forward, train_sft.judge)
        with variant.asked():
            evaluate.main(questions)
    n_trained = len(read_all(lesson / "text/sft_train.jsonl"))  # the others are held out
    answers = read_all(out / "answers.jsonl")
    return scores(answers, n_trained) | {"answer": answers[n_trained]["answer"]}


def cell(values: list[float]) -> str:
    """0.9, 1.0 -> '95% (90% to 100%)'."""
    mean, low, high = np.mean(values), min(values), max(values)
    return f"{mean:.0%}" + (f" ({low:.0%} to {high:.0%})" if len(values) > 1 else "")


def table_line(*cells: str) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"


def main(config: Config) -> None:
    torch.set_num_threads(1)
    root, runs = Path(config.root), Path(config.root) / config.experiment
    shutil.rmtree(runs, ignore_errors=True)
    lessons = {seed: root / f"lesson_{seed}" for seed in config.seeds}
    first = config.seeds[0]
    asked = read_all(lessons[first] / "text/heldout.jsonl")[0]["question"]
    lines = [table_line("variant", "seeds", *COLUMNS, asked), "|---" * (len(COLUMNS) + 3) + "|"]
    print(*lines, sep="\n", flush=True)
    variants = EXPERIMENTS[config.experiment](lesson_config(lessons[first], first))
    for number, variant in enumerate(variants):
        seeds = config.seeds if variant.every_seed else config.seeds[:1]
        results = [run_variant(lessons[seed], seed, variant, runs / f"{number}_{seed}")
                   for seed in seeds]
        cells = [cell([result[column] for result in results]) for column in COLUMNS]
        answer = results[0]["answer"][:24]
        lines.append(table_line(variant.name, str(len(seeds)), *cells, f"`{answer!r}`"))
        print(lines[-1], flush=True)
    (root / f"{config.experiment}.md").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    run_cli(main, Config)
