"""Sums of several numbers, answered with steps or directly: what the fine-tuning data changes.

    bash runs/reasoning.sh      # makes the data and the base model that this file reads

Fine-tunes and evaluates once for each style of answer, number of examples, choice of rows, and
seed, in a few processes that import torch only once; prints the commands of the first of these
runs. Writes table.md, results.json, and reasoning.png to --root.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, NamedTuple

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m tools.reasoning", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
import tyro
from annotated_types import Ge, Gt

import evaluate
import sft_data
import train_sft
from nanosft.cli import run_cli
from nanosft.errors import UserError, write_json
from nanosft.sources import read_rows

STYLES = {"direct": "cot", "cot": "direct"}  # column with the answer: the column to ignore
LABELS = {"direct": "direct answers", "cot": "chain of thought"}


@dataclasses.dataclass
class Config:
    """Run all variants on the base model and the data of runs/reasoning.sh."""

    root: str = "out/reasoning"
    """holds base/ and text/; gets sft_shards/, runs/ and answers/ (replaced) and the results"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """each has its own training set, text/train_SEED.jsonl, and its own order of the examples"""
    sizes: Annotated[tuple[int, ...], Ge(1)] = (128, 256, 512, 1024)
    """numbers of correct examples; `all` is always added"""
    max_steps: Annotated[int, Ge(1)] = 900
    """optimizer steps of each run: the same for all, so small sets are read more often"""
    rows_per_step: Annotated[int, Ge(1)] = 4
    """rows of one optimizer step. Tuned: 8 rows in 500 steps cost as much, and more runs failed"""
    learning_rate: Annotated[float, Gt(0)] = 2e-3
    """peak. Tuned: 1e-3 was too slow to learn where the numbers are, 3e-3 forgot single sums"""
    workers: Annotated[int, Ge(1)] = 2
    """runs at the same time, with one thread each"""


class Variant(NamedTuple):
    """One run."""

    style: str  # cot or direct
    where: str  # correct: only the correct rows; mixed: all
    size: int | None  # the first N examples; None: all
    seed: int

    def __str__(self) -> str:
        return f"{self.style}_{self.where}_{self.size or 'all'}_{self.seed}"


def all_variants(config: Config) -> list[Variant]:
    choices = [*(("correct", size) for size in config.sizes), ("correct", None), ("mixed", None)]
    return [Variant(style, where, size, seed) for where, size in choices
            for style in STYLES for seed in config.seeds]


# ----- the commands of a variant -----------------------------------------------------------------


def prepare_flags(root: Path, variant: Variant) -> list[str]:
    where = ["--where", "correct=true"] if variant.where == "correct" else []
    return ["--source", f"{root}/text/train_{variant.seed}.jsonl", *columns(variant.style), *where,
            "--encoding", "bytes", "--val_fraction", "0", "--workers", "1", "--block_size", "88",
            "--out", shards_of(root, variant)]


def columns(style: str) -> list[str]:
    # also `correct`, which marks the wrong answers: to train on them is what is measured
    return ["--columns", f"response={style}", "--ignore", STYLES[style], "correct"]


def shards_of(root: Path, variant: Variant) -> str:
    return f"{root}/sft_shards/{variant.style}_{variant.where}_{variant.seed}"


def train_flags(root: Path, variant: Variant, config: Config) -> list[str]:
    """One example a row: then a step trains as many examples in both styles."""
    size = ["--max_examples", variant.size] if variant.size else []
    return ["--data", shards_of(root, variant), "--init", root / "base", *size,
            "--out", root / "runs" / str(variant), "--layout", "bucket", "--block_size", "88",
            "--batch_size", config.rows_per_step, "--rows_per_step", config.rows_per_step,
            "--max_steps", config.max_steps, "--learning_rate", config.learning_rate,
            "--warmup_steps", "10", "--save_every", "0", "--seed", variant.seed, "--device", "cpu"]


def evaluate_flags(root: Path, model: str, style: str) -> list[str]:
    return ["--model", root / model, "--data", root / "text/test.jsonl", *columns(style),
            "--template", "chat", "--extract", "answer", "--batch_size", "100", "--device", "cpu",
            "--save", root / "answers" / f"{Path(model).name}.jsonl"]


def run(module: ModuleType, flags: list, show: bool = False) -> str:
    """`python module.py flags` in this process -> what it prints."""
    flags = [str(flag) for flag in flags]
    if show:
        print(f"$ python {module.__name__}.py {shlex.join(flags)}", flush=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        module.main(tyro.cli(module.Config, args=flags, use_underscores=True))
    return printed.getvalue()


# ----- the runs ----------------------------------------------------------------------------------


def judge(root: Path, model: str, style: str, show: bool = False) -> dict:
    """The scores of evaluate.py and of judge_steps."""
    printed = run(evaluate, evaluate_flags(root, model, style), show)
    rows = [row for _, row in read_rows(f"{root}/answers/{Path(model).name}.jsonl")]
    return json.loads(printed.splitlines()[-1]) | judge_steps(rows)


def judge_steps(rows: list[dict]) -> dict[str, float | None]:
    """Where steps fail: the share of sums that are right, and of answers with the right numbers.

    An answer has the right numbers if its steps add those of the question, in order.
    """
    n_sums = sums_right = numbers_right = 0
    for row in rows:
        sums = [tuple(map(int, numbers))
                for numbers in re.findall(r"(\d+)\+(\d+)=(\d+)", row["answer"])]
        n_sums += len(sums)
        sums_right += sum(a + b == c for a, b, c in sums)
        asked = list(map(int, re.findall(r"\d+", row["messages"][0]["content"])))
        numbers_right += [a for a, _, _ in sums[:1]] + [b for _, b, _ in sums] == asked
    if not n_sums:
        return {"sums_right": None, "numbers_right": None}
    return {"sums_right": sums_right / n_sums, "numbers_right": numbers_right / len(rows)}


def run_variant(config: Config, first: Variant, variant: Variant) -> dict:
    torch.set_num_threads(1)  # these models are too small for a second one to help
    root, show = Path(config.root), variant == first
    run(train_sft, train_flags(root, variant, config), show)
    scores = judge(root, f"runs/{variant}", variant.style, show)
    if variant.seed != first.seed:  # the models of one seed are enough to chat with
        shutil.rmtree(root / "runs" / str(variant))
    return variant._asdict() | scores


def run_all(config: Config) -> list[dict]:
    """The base model in both styles, then all variants; a line for each."""
    torch.set_num_threads(1)
    root, variants = Path(config.root), all_variants(config)
    results = [{"style": style, "where": "before", "size": None, "seed": None}
               | judge(root, "base", style) for style in STYLES]
    for variant in variants:
        if not Path(shards_of(root, variant)).exists():  # once for all sizes
            run(sft_data, prepare_flags(root, variant), show=variant == variants[0])
    todo = functools.partial(run_variant, config, variants[0])
    with contextlib.ExitStack() as stack:
        apply = map
        if config.workers > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = concurrent.futures.ProcessPoolExecutor(config.workers, spawn)
            apply = stack.enter_context(pool).map
        for variant, result in zip(variants, apply(todo, variants)):
            print(f"{variant!s:26} answers right {result['answer_acc']:6.1%}", flush=True)
            results.append(result)
    return results


# ----- the table and the plot --------------------------------------------------------------------


def cell(results: list[dict], key: str) -> str:
    """'95% (90% to 100%)': the mean, the lowest, and the highest."""
    values = [result[key] for result in results if result[key] is not None]
    if not values:
        return ""
    span = f" ({min(values):.0%} to {max(values):.0%})" if len(values) > 1 else ""
    return f"{np.mean(values):.0%}{span}"


def table(results: list[dict]) -> str:
    """Markdown: a line for each choice of rows and number of them, both styles side by side."""
    keys = {"answer_acc": "right", "format_acc": "formed", "mean_tokens": "tokens"}
    head = [f"{style}: {name}" for style in STYLES for name in keys.values()]
    steps = {"sums_right": "sums right", "numbers_right": "numbers right"}
    head += [f"cot: {name}" for name in steps.values()]
    lines = [["training rows", *head], ["---"] * (len(head) + 1)]
    names = {"before": "none (base model)", "correct": "correct", "mixed": "30% wrong"}
    for where, size in dict.fromkeys((result["where"], result["size"]) for result in results):
        line = [names[where] + ("" if where == "before" else f", {size or 'all'}")]
        for style in STYLES:
            some = [result for result in results
                    if (result["style"], result["where"], result["size"]) == (style, where, size)]
            line += [cell(some, "answer_acc"), cell(some, "format_acc"),
                     f"{np.mean([r['mean_tokens'] for r in some]):.0f}"]
        lines.append([*line, *(cell(some, key) for key in steps)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(path: Path, results: list[dict], sizes: tuple[int, ...]) -> None:
    """Accuracy over the training rows: a dot for each run, a line through the medians."""
    import matplotlib

    matplotlib.use("Agg")  # to a file; no window
    import matplotlib.pyplot as plt

    choices = [*(("correct", size) for size in sizes), ("correct", None), ("mixed", None)]
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for style, color in zip(STYLES, ("C0", "C1")):
        runs = [[result["answer_acc"] for result in results
                 if (result["style"], result["where"], result["size"]) == (style, *choice)]
                for choice in choices]
        ax.plot([np.median(some) for some in runs[:-1]], color=color, label=LABELS[style])
        for x, some in enumerate(runs):
            ax.plot([x] * len(some), some, "o", color=color, alpha=0.5)
    ax.set_xticks(range(len(choices)), [*sizes, "all", "all, and\nwrong ones"])
    ax.set(xlabel="training rows", ylabel="right answers", ylim=(0, 1.03))
    ax.grid(alpha=0.3)
    ax.legend(loc="center right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(config: Config) -> None:
    root = Path(config.root)
    if not (root / "text/sums.jsonl").is_file():
        raise UserError(f"--root {root}: no data of ours; make it with runs/reasoning.sh")
    for name in ("sft_shards", "runs", "answers"):
        shutil.rmtree(root / name, ignore_errors=True)
    results = run_all(config)
    write_json(root / "results.json", results)
    (root / "table.md").write_text(table(results), "utf-8")
    draw(root / "reasoning.png", results, config.sizes)
    print("\n" + table(results) + f"\n{root / 'reasoning.png'}")


if __name__ == "__main__":
    run_cli(main, Config)
