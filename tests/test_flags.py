"""Every numeric flag of every command with 0, -1, 10**12, nan: it works, or one line names it.

Where the bounds of the flag exclude the number, it must be refused.
"""

import dataclasses
import json
import math
import operator
import types
import typing

import pytest
from helpers_training import random_examples, save_tiny_model, sft_folder, text_folder

import chat
import evaluate
import fineweb
import sft_data
import train_gpt2
import train_sft
from nanosft import ranks
from nanosft.checks import check_memory, require_row
from nanosft.cli import bounds_of
from nanosft.errors import UserError
from nanosft.weights import check_model_size, count_parameters
from tools import ablations, bench, compare_peers, export, playground, plot

TRAIN = ["--device", "cpu", "--block_size", 16, "--batch_size", 1, "--rows_per_step", 2, "--epochs",
         1, "--save_every", 0, "--init", "scratch", "--n_layer", 1, "--n_head", 1, "--n_embd", 8]
PREPARE = ["--source", "rows.jsonl", "--encoding", "bytes", "--workers", 1]
COMMANDS = {  # name: (module, good flags)
    "train_gpt2": (train_gpt2, ["--data", "text", "--out", "out", *TRAIN]),
    "train_sft": (train_sft, ["--data", "sft", "--out", "out", *TRAIN]),
    "fineweb": (fineweb, [*PREPARE, "--out", "out"]),
    "sft_data": (sft_data, [*PREPARE, "--out", "out"]),
    "sft_data --show": (sft_data, ["--show", 1, "--data", "sft"]),
    "evaluate": (evaluate, ["--model", "model", "--data", "rows.jsonl", "--device", "cpu"]),
    "chat": (chat, ["--model", "model", "--prompt", "Q", "--device", "cpu"]),
    "tools.bench": (bench, []),
    "tools.compare_peers": (compare_peers, []),
    "tools.ablations": (ablations, ["--root", "out"]),
    "tools.export": (export, []),
    "tools.playground": (playground, []),
    "tools.plot": (plot, []),
}


def numeric_flags(config_class) -> list[str]:
    """The fields with an int or a float in their type: int | None and tuple[int, ...] too."""

    def is_number(kind) -> bool:
        return kind in (int, float) or any(map(is_number, typing.get_args(kind)))

    return [f.name for f in dataclasses.fields(config_class) if is_number(f.type)]


def is_excluded(config_class, flag: str, value) -> bool:
    """By the bounds of the flag."""
    return not all(getattr(operator, key)(float(value), limit)
                   for key, limit in bounds_of(config_class).get(flag, {}).items())


CASES = [(name, flag, value) for name, (module, _) in COMMANDS.items()
         for flag in numeric_flags(module.Config) for value in (0, -1, 10**12, "nan")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flags")
    text_folder(folder / "text", train=[*range(99)], val=[*range(40)])
    sft_folder(folder / "sft", train=random_examples(6), val=random_examples(2))
    save_tiny_model(folder / "model")
    rows = [{"prompt": f"Q{i}", "response": "A", "text": "some text"} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Runs(BaseException):
    """The flags were accepted."""


def stop(*args):
    raise Runs


@pytest.mark.parametrize("name, flag, value", CASES, ids=lambda part: str(part))
def test_number_works_or_is_refused_by_name(name, flag, value, folder, command, tmp_path,
                                            monkeypatch):
    monkeypatch.chdir(folder)
    get_lr = train_gpt2.get_lr  # a run of 10**12 steps is accepted: it is stopped after three
    monkeypatch.setattr(train_gpt2, "get_lr", lambda n, *a: stop() if n > 2 else get_lr(n, *a))
    monkeypatch.setattr(bench, "measure", stop)
    monkeypatch.setattr(compare_peers, "in_its_own_process", stop)
    module, flags = COMMANDS[name]
    flags = [tmp_path / "out" if word == "out" else word for word in flags]
    try:
        result = command(module, *flags, f"--{flag}", value)
    except Runs:
        assert not is_excluded(module.Config, flag, value)
        return
    assert result.code == 2 or not is_excluded(module.Config, flag, value)
    if result.code:
        named = flag in result.err or "lesson_" in result.err  # no lesson with that seed
        assert (result.code, named) == (2, True), result.err
        assert "Traceback" not in result.err
        is_from_tyro = "Value error" in result.err  # not an int: a frame of several lines
        assert is_from_tyro or result.err.count("\n") == 1


SIZES = types.SimpleNamespace(vocab_size=320, block_size=16, n_layer=1, n_embd=8)


@pytest.mark.parametrize("size", ["n_layer", "n_embd", "block_size"])
def test_absurd_model_is_refused_before_anything_is_allocated(size):
    sizes = types.SimpleNamespace(**vars(SIZES) | {size: 10**12})
    with pytest.raises(UserError, match=rf"--{size} 1000000000000.*GB \(cpu\) here; lower it"):
        check_model_size(sizes)
    require_row(10**6)
    with pytest.raises(UserError, match=r"--block_size 1000000000000: needs about 3\.2e"):
        require_row(10**12)


def test_parameters_are_counted_exactly():
    from model import GPT, GPTConfig

    config = GPTConfig(block_size=24, vocab_size=128, n_layer=3, n_head=2, n_embd=16)
    assert count_parameters(config) == sum(p.numel() for p in GPT(config).parameters())


def test_memory_is_printed_at_the_start_of_a_run(folder, command, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    flags = ["--data", "text", "--out", tmp_path / "out", *TRAIN]
    line = next(line for line in command(train_gpt2, *flags).out.splitlines() if "memory" in line)
    need, total = map(float, line.removeprefix("memory about ").removesuffix(" GB (cpu)").split(
        " of "))
    assert 0 < need < 0.01 < total and math.isfinite(total)


def test_ranks_of_a_machine_share_its_memory(monkeypatch):
    machine = ranks.total_memory(ranks.CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ranks.total_memory(ranks.CPU) == machine / 2


def test_memory_of_a_rank_by_hand(monkeypatch):
    """1,528 parameters at 16 bytes; 4 rows of 16 tokens: 17 * 8 values and logits at 4 bytes each.

    The 8 rows of a step are shared by the ranks, at 32 bytes a token.
    """
    sizes = types.SimpleNamespace(**vars(SIZES) | {"vocab_size": 64})
    n_params = (64 + 16) * 8 + (12 * 8 + 13) * 8 + 2 * 8
    need = 16 * n_params + 64 * 17 * 8 * 4 + 2 * 64 * 64 * 4 + 32 * 16 * 8

    def require(total: float, world_size: int = 1, rows_per_step: int = 8, dtype="float32") -> str:
        monkeypatch.setattr(ranks, "total_memory", lambda device: total)
        config = train_gpt2.Config("", "", batch_size=4, block_size=16, rows_per_step=rows_per_step)
        return check_memory(sizes, config, ranks.Ranks(0, world_size, ranks.CPU, dtype))

    assert require(need) == f"about {need / 1e9:.3g} of {need / 1e9:.3g} GB (cpu)"
    require(need - 64 * 17 * 8 * 2, dtype="bfloat16")
    require(need, world_size=2, rows_per_step=16)
    for more in ({}, {"world_size": 2, "rows_per_step": 16}):
        with pytest.raises(UserError, match=r"^--batch_size 4 and --rows_per_step .* of --block"):
            require(need - 1, **more)
