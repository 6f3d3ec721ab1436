"""What each choice of fine-tuning is worth on the lesson: one flag changed at a time.

    bash runs/ablations.sh                # makes the lessons that this file reads, then runs it

Each run starts from the base model of its seed's lesson, with the lesson's data and number of
steps, in this process, which imports torch only once. Prints a markdown table: the mean over the
seeds and, where there are several, the lowest and the highest.
"""

import contextlib
import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np
import torch

import evaluate
import train_sft
from data.worksheet import read_answers, results_of
from nanosft.cli import run_cli
from nanosft.shards import read_meta, sha256_of, write_meta
from packing import LAYOUTS
from sft_data import SFTDataset

COLUMNS = ("heldout_acc", "trained_acc", "stop_rate")


@dataclasses.dataclass
class Config:
    """Run the ablations on finished lessons of several seeds and print a table."""

    seeds: tuple[int, ...] = (1, 2, 3)
    root: str = "out/ablations"
    """holds the lessons, lesson_SEED each; gets runs/ (replaced) and table.md"""


# ----- variants: name -> (flags that differ from the lesson's, how the mask is broken) ------------


def lesson_flags(lesson: Path, seed: int) -> dict:
    """The fine-tuning flags of runs/lesson.sh, read from it so that they cannot differ."""
    script = (Path(__file__).parents[1] / "runs/lesson.sh").read_text()
    command = script.split("both train_sft.py", 1)[1].split("\n\n", 1)[0]
    words = command.replace("\\\n", " ").split()
    flags = {word[2:]: words[i + 1] for i, word in enumerate(words) if word.startswith("--")}
    return {
        "rows_per_step": int(flags["rows_per_step"]),
        "max_steps": int(flags["max_steps"]),
        "warmup_steps": int(flags["warmup_steps"]),
        "learning_rate": float(flags["learning_rate"]),
        "layout": flags["layout"],
        "block_size": 64,
        "batch_size": int(flags["rows_per_step"]),
        "data": str(lesson / "sft_shards"),
        "init": str(lesson / "base"),
        "device": "cpu",
        "seed": seed,
        "eval_every": 0,
        "eval_prompts": 0,
        "log_every": 1000,
    }


def trained_a_row(flags: dict, layout: str) -> float:
    """Trained tokens of an average row, for `as many trained tokens`."""
    rows = SFTDataset(flags["data"], "train", flags["block_size"], layout)
    trained = sum(int((rows[i]["labels"] >= 0).sum()) for i in range(len(rows)))
    return trained / len(rows)


def variants(flags: dict) -> tuple[dict, dict]:
    """The first group runs on every seed, the rest on the first."""
    n = len(SFTDataset(flags["data"], "train", flags["block_size"], "pad"))
    steps, lr = flags["max_steps"], flags["learning_rate"]
    every = {
        "lesson (fit, isolated, response)": ({}, ""),
        "loss on all tokens": ({"loss_on": "all"}, ""),
        "mask one too long (trains <|assistant|>)": ({}, "long"),
        "mask one too short (first answer token untrained)": ({}, "short"),
        "fit, not isolated": ({"isolate": False}, ""),
        "stream, not isolated": ({"layout": "stream", "isolate": False}, ""),
    }
    for layout in LAYOUTS:
        if layout != flags["layout"]:
            ratio = trained_a_row(flags, flags["layout"]) / trained_a_row(flags, layout)
            n_steps = round(steps * ratio)
            every[f"{layout}, as many steps"] = ({"layout": layout}, "")
            every[f"{layout}, as many trained tokens ({n_steps} steps)"] = (
                {"layout": layout, "max_steps": n_steps}, "")
    once = {
        "learning rate x10": ({"learning_rate": lr * 10}, ""),
        "learning rate /10": ({"learning_rate": lr / 10}, ""),
        "1 % of the examples": ({"max_examples": max(1, round(n / 100))}, ""),
        "10 % of the examples": ({"max_examples": round(n / 10)}, ""),
        "no pretraining": ({"init": "scratch", "n_layer": 3, "n_head": 4, "n_embd": 128}, ""),
    }
    return every, once


def break_mask(data: str, how: str, to: Path) -> str:
    """The shards, but each trained span begins one token early (long) or late (short)."""
    shutil.copytree(data, to)
    meta = read_meta(str(to), "sft")
    for shard in meta["splits"]["train"]["files"]:
        ids = np.load(to / shard["file"])
        trained = ids[1] > 0
        if how == "long":
            ids[1, :-1][trained[1:]] = 100
        else:
            ids[1, 1:][~trained[:-1]] = 0
        np.save(to / shard["file"], ids)
        shard["sha256"] = sha256_of(to / shard["file"])
    write_meta(to, meta)
    return str(to)


# ----- runs and the table ------------------------------------------------------------------------


def run_variant(root: Path, seed: int, name: str, change: dict, mask: str) -> dict[str, float]:
    lesson, out = root / f"lesson_{seed}", root / "runs" / f"{name}_{seed}"
    flags = lesson_flags(lesson, seed) | change | {"out": str(out / "run")}
    if mask:
        flags["data"] = break_mask(flags["data"], mask, out / "shards")
    questions = str(lesson / "text/questions.jsonl")
    with contextlib.redirect_stdout(io.StringIO()):
        train_sft.main(train_sft.Config(**flags))
        evaluate.main(evaluate.Config(flags["out"], questions, device="cpu", batch_size=128,
                                      max_new_tokens=32, save=str(out / "answers.jsonl")))
    n_trained = len(read_answers(lesson / "text/trained.jsonl"))
    return results_of(read_answers(out / "answers.jsonl"), n_trained)


def cell(values: list[float]) -> str:
    """0.9, 1.0 -> '95 % (90 to 100)'."""
    mean, low, high = np.mean(values), min(values), max(values)
    return f"{mean:.0%}" + (f" ({low:.0%} to {high:.0%})" if len(values) > 1 else "")


def main(config: Config) -> None:
    torch.set_num_threads(1)
    root = Path(config.root)
    shutil.rmtree(root / "runs", ignore_errors=True)
    first = config.seeds[0]
    every, once = variants(lesson_flags(root / f"lesson_{first}", first))
    lines = [f"| variant | seeds | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    print(*lines, sep="\n", flush=True)
    for number, (name, (change, mask)) in enumerate((every | once).items()):
        seeds = config.seeds if name in every else config.seeds[:1]
        results = [run_variant(root, seed, str(number), change, mask) for seed in seeds]
        cells = [cell([result[column] for result in results]) for column in COLUMNS]
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    (root / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run_cli(main, Config)
