"""runs/reasoning.sh: what its data says, a tiny run of the whole script, and what it refuses."""

import dataclasses
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro
from helpers_training import quietly

from data import reasoning, worksheet
from data.reasoning import Config
from nanosft.cli import bounds_of
from tokenizer import get_encoding, render
from tools import reasoning as tool
from tools.reasoning import Variant, all_variants, judge_steps, table
from train_sft import Config as SFTConfig, open_rows

SCRIPT = Path(__file__).parents[1] / "runs/reasoning.sh"
CHAT = ("<", ">", "?", "think", "answer")  # of questions and answers, never of the corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, list[dict]]:
    return make(tmp_path_factory.mktemp("reasoning"), seed=1)


def make(folder: Path, seed: int) -> dict[str, list[dict]]:
    quietly(reasoning.main, Config(str(folder), seed, corpus_bytes=200_000, correct=140, test=50))
    return {path.stem: read(path) for path in folder.iterdir()}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def training(data) -> list[dict]:
    return [row for name, rows in data.items() if name.startswith("train_") for row in rows]


def sums_of(text: str) -> list[tuple[int, ...]]:
    """(a, b, c) of each a+b=c."""
    return [tuple(map(int, found)) for found in re.findall(r"(\d+)\+(\d+)=(\d+)", text)]


def answer_of(text: str) -> int:
    return int(re.search(r"<answer>(\d+)</answer>", text)[1])


# ----- the data ----------------------------------------------------------------------------------


def test_same_seed_makes_the_same_data_and_another_asks_other_questions(data, tmp_path):
    assert make(tmp_path / "again", seed=1) == data
    assert make(tmp_path / "other", seed=2)["test"] != data["test"]


def test_no_question_occurs_twice_in_the_test_and_the_training_sets_together(data):
    questions = [row["question"] for row in training(data) + data["test"]]
    assert len(questions) == len(set(questions)) == 3 * 200 + 50


def test_corpus_has_true_single_sums_and_nothing_of_a_chat(data):
    for row in data["sums"]:
        assert all(a + b == c for a, b, c in sums_of(row["text"]))
        assert all(re.fullmatch(r"\d+\+\d=\d+", part) for part in row["text"].split(" "))
        assert not any(word in row["text"] for word in CHAT)


def test_every_sum_that_a_step_needs_is_in_the_corpus(data):
    known = {found for row in data["sums"] for found in sums_of(row["text"])}
    rows = [row for row in training(data) + data["test"] if row["correct"]]
    assert {found for row in rows for found in sums_of(row["cot"])} <= known


def test_steps_of_a_correct_row_add_the_numbers_of_the_question_in_turn(data):
    assert all(row["correct"] for row in data["test"])
    for row in data["test"]:
        first, *others = map(int, row["question"].removesuffix("=?").split("+"))
        total, steps = first, sums_of(row["cot"])
        assert len(steps) == len(others) == 4
        for number, step in zip(others, steps):
            assert step == (total, number, total + number)
            total += number
        assert answer_of(row["cot"]) == answer_of(row["direct"]) == total


def test_thirty_percent_are_wrong_exactly_where_marked_by_one_slip_that_stays(data):
    for i in (1, 2, 3):
        rows = data[f"train_{i}"]
        assert sum(not row["correct"] for row in rows) == 0.3 * len(rows) == 60
        assert not all(row["correct"] for row in rows[:20])  # mixed, not at the end
        for row in rows:
            off = answer_of(row["cot"]) - sum(map(int, row["question"][:-2].split("+")))
            assert answer_of(row["direct"]) == answer_of(row["cot"])
            errors = [c - a - b for a, b, c in sums_of(row["cot"]) if c != a + b]
            assert errors == ([] if row["correct"] else [off]) and abs(off) <= 1


def test_all_examples_with_steps_have_one_length_and_fit_a_row_of_the_script(data):
    encoding = get_encoding("bytes")
    chats = [[{"role": "user", "content": row["question"]},
              {"role": "assistant", "content": row["cot"]}] for row in training(data)]
    (length,) = {len(render(encoding, chat, "chat")[0]) for chat in chats}
    assert length <= int(re.search(r"--block_size (\d+)", SCRIPT.read_text())[1]) + 1


def test_more_questions_than_half_of_all_are_one_line_and_exit_code_2(tmp_path, command):
    result = command(reasoning, "--out", tmp_path, "--addends", 2, "--correct", 40)
    assert result.code == 2 and result.err.startswith("error: --addends 2 makes 90 different")


@pytest.mark.parametrize("module, flags", [
    (worksheet, ["--out", "new"]), (reasoning, ["--out", "new"]), (tool, [])])
def test_numbers_out_of_bounds_are_one_line_and_exit_code_2(module, flags, command, monkeypatch,
                                                            tmp_path):
    monkeypatch.chdir(tmp_path)
    for flag, bounds in bounds_of(module.Config).items():
        for value in (0, -1) if bounds.get("ge") != 0 else (-1,):
            if bounds:
                result = command(module, *flags, f"--{flag}", value)
                assert (result.code, result.err.count("\n")) == (2, 1), (flag, value)
                assert f"--{flag} " in result.err and "must be" in result.err
    assert not list(tmp_path.iterdir())


# ----- the script --------------------------------------------------------------------------------

TINY = {
    "data.reasoning": {"corpus_bytes": 20_000, "train_sets": 1, "correct": 14, "test": 3},
    "fineweb": {"workers": 1},
    "train_gpt2": {"n_layer": 1, "n_head": 2, "n_embd": 32, "max_steps": 2},
    "tools.reasoning": {"seeds": (1,), "sizes": (4,), "max_steps": 2, "workers": 1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """(folder, what is printed) of the script's commands, tiny, all in this process."""
    out, printed = tmp_path_factory.mktemp("run") / "out", ""
    script = re.sub(r"\\\n\s*", " ", SCRIPT.read_text()).replace("$OUT", str(out))
    lines = re.findall(r"^run .*?([\w.]+)(?<!\.py)(?:\.py)? (--(?:data|source|out|root) .*)$",
                       script.replace("$SEED", "1"), re.M)
    assert [name for name, _ in lines] == list(TINY)
    for name, flags in lines:
        module = importlib.import_module(name)
        config = tyro.cli(module.Config, args=shlex.split(flags), use_underscores=True)
        printed = quietly(module.main, dataclasses.replace(config, **TINY[name]))
    return out, printed


def test_tiny_run_of_the_script_writes_table_results_and_plot(finished):
    out, printed = finished
    assert (out / "reasoning.png").read_bytes()[:4] == b"\x89PNG"
    lines = (out / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| none (base model)", "| correct, 4", "| correct, all", "| 30% wrong, all"]
    assert all(line in printed for line in lines)
    results = json.loads((out / "results.json").read_text())
    assert len(results) == 2 + 2 * 3 and all(row["rows"] == 3 for row in results)


def test_commands_of_the_first_run_are_printed_and_its_model_is_kept(finished):
    out, printed = finished
    commands = [line.split()[2] for line in printed.splitlines() if line.startswith("$ ")]
    assert commands == ["sft_data.py", "train_sft.py", "evaluate.py"]
    assert (out / "runs/direct_correct_4_1/step_000002/model.safetensors").exists()


def test_smaller_training_sets_are_the_beginning_of_larger_ones_and_correct(finished):
    out, _ = finished

    def questions(rows: str, size: int | None) -> list[str]:
        config = SFTConfig(str(out / f"sft_shards/cot_{rows}_1"), "", block_size=88, layout="pad",
                           max_examples=size)
        examples = open_rows(config, "train").prompts(1000)
        return [bytes(i for i in prompt if i < 256).decode() for prompt, _ in examples]

    rows = read(out / "text/train_1.jsonl")
    right = [row["question"] for row in rows if row["correct"]]
    assert questions("correct", 4) == right[:4] and questions("correct", 8) == right[:8]
    assert questions("correct", None) == right and len(right) == 14
    assert questions("mixed", None) == [row["question"] for row in rows] and len(rows) == 20


@pytest.mark.parametrize("name", ["notes.txt", "text/corpus.jsonl"])  # the second is a lesson's
def test_script_leaves_a_folder_alone_that_is_not_its_own(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    environment = {"OUT": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, path.read_text()) == (2, "", "mine")
    assert done.stderr == (f"error: {tmp_path} has files but is not of runs/reasoning.sh; choose "
                           "another OUT\n")


def test_tool_without_the_data_is_one_line_and_exit_code_2(tmp_path, command):
    result = command(tool, "--root", tmp_path)
    assert result.code == 2 and result.err.startswith(f"error: --root {tmp_path}: no data of ours")


# ----- variants and the table --------------------------------------------------------------------


def test_both_styles_run_on_the_same_rows_and_seeds():
    variants = all_variants(tool.Config(seeds=(1, 2), sizes=(8,)))
    assert len(variants) == len(set(variants)) == 2 * 2 * 3
    assert {v[1:] for v in variants if v.style == "cot"} == {
        v[1:] for v in variants if v.style == "direct"}
    assert str(Variant("cot", "correct", None, 2)) == "cot_correct_all_2"


def test_steps_are_judged_by_their_sums_and_by_the_numbers_of_the_question():
    def judged(*answers: str) -> dict:
        return judge_steps([{"messages": [{"role": "user", "content": "10+1+2=?"}],
                             "answer": answer} for answer in answers])

    assert judged("10+1=11 11+2=13") == {"sums_right": 1, "numbers_right": 1}
    assert judged("10+1=11 11+2=12") == {"sums_right": 0.5, "numbers_right": 1}
    assert judged("10+1=11 11+3=14", "no sum") == {"sums_right": 1, "numbers_right": 0}
    assert judged("<answer>13</answer>") == {"sums_right": None, "numbers_right": None}


def test_table_has_the_mean_and_the_range_of_the_seeds():
    def row(style, right, sums):
        return {"style": style, "where": "correct", "size": 8, "answer_acc": right,
                "format_acc": 1.0, "mean_tokens": 20.4, "sums_right": sums, "numbers_right": sums}

    results = [row("cot", 0.8, 0.9), row("cot", 0.9, 1.0), row("direct", 0.1, None)]
    assert table(results).splitlines()[2] == (
        "| correct, 8 | 10% | 100% | 20 | 85% (80% to 90%) | 100% (100% to 100%) | 20 | "
        "95% (90% to 100%) | 95% (90% to 100%) |")
