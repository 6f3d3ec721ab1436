"""tools/bench.py and compare_peers.py: FLOPs worked by hand, each path measured once, tiny; and
runs/gpu_bench.sh, with stand-ins for its commands."""

import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from torch.autograd import DeviceType

import train_gpt2
import train_sft
from model import GPT, GPTConfig
from nanosft.errors import UserError
from nanosft.ranks import Ranks
from tools import bench, compare_peers, workload

TINY = GPTConfig(vocab_size=320, block_size=16, n_layer=2, n_head=2, n_embd=32)


def test_flops_by_hand():
    # A block has 12 * 32 * 32 = 12,288 weights in matrices; two blocks have 24,576, and each costs
    # 6 FLOPs per token: 147,456. The head, where it runs: 6 * 320 * 32 = 61,440.
    # A pair of tokens: 12 FLOPs in each of 2 layers and 32 channels: 768.
    assert workload.flops(TINY, tokens=1, head_tokens=0, pairs=0) == 147_456
    assert workload.flops(TINY, tokens=0, head_tokens=1, pairs=0) == 61_440
    assert workload.flops(TINY, tokens=0, head_tokens=0, pairs=1) == 768


def test_flops_equal_palms_formula_if_each_token_is_trained_and_sees_the_whole_row():
    T = TINY.block_size
    N = sum(p.numel() for p in GPT(TINY).parameters() if p.dim() == 2)
    N -= T * TINY.n_embd  # the position embedding is looked up, not multiplied
    assert workload.flops(TINY, T, T, T * T) == T * (6 * N + 12 * TINY.n_layer * TINY.n_embd * T)


def test_token_sees_itself_and_the_earlier_tokens_of_its_example():
    # examples of 3 and 2 tokens, then padding: (1 + 2 + 3) + (1 + 2) pairs
    assert workload.seen_pairs(torch.tensor([0, 0, 0, 1, 1, -1, -1])) == 9
    assert workload.seen_pairs(torch.zeros(16, dtype=torch.long)) == 16 * 17 // 2


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_random_shards_open_like_real_ones_and_have_the_requested_share(tmp_path, share):
    workload.random_shards(str(tmp_path), "sft", 300, share, vocab_size=512)
    rows = train_sft.open_rows(train_sft.Config(str(tmp_path), "", layout="stream"), "train")
    assert len(rows.lengths) == 300 and 130 < np.median(rows.lengths) < 160
    split = rows.meta["splits"]["train"]
    assert split["trained_tokens"] / split["tokens"] == pytest.approx(share, abs=0.01)


KEYS = {
    "pretrain": {"tokens_per_s", "trained_tokens_per_s", "limit", "MFU", "loading"},
    "layouts": {"tokens_per_s", "trained_tokens_per_s", "limit", "MFU", "loading"},
    "evaluate": {"tokens_per_s", "trained_tokens_per_s", "limit", "MFU"},
    "generate": {"tokens_per_s", "limit", "peak_memory_gb"},
    "loss": {"tokens_per_s", "seconds", "peak_memory_gb"},
    "plan": {"seconds", "limit", "kept_bytes", "peak_bytes"},
}


def test_quick_measures_each_path_and_writes_json_lines(tmp_path, capsys):
    log = tmp_path / "bench.jsonl"
    bench.main(bench.Config(",".join(KEYS), quick=True, batch_size=1, steps=1, json=str(log),
                            device="cpu"))
    machine, *rows = map(json.loads, log.read_text().splitlines())
    assert machine["path"] == "machine" and machine["flops_per_s"] > 0
    assert machine["torch"] == torch.__version__
    assert {row["path"] for row in rows} == set(KEYS)
    for row in rows:
        assert all(row[key] > 0 for key in KEYS[row["path"]]), row
    layouts = {(row["layout"], row["isolate"]) for row in rows if row["path"] == "layouts"}
    assert len(layouts) == 8
    assert [row["prompts"] for row in rows if row["path"] == "generate"] == [1, 16, 64]
    assert [row["form"] for row in rows if row["path"] == "loss"] == [
        "nanosft", "full_logits", "full_logits_compiled"]
    assert all(row["limit"] <= 1 for row in rows if row["path"] == "plan")  # it is a bound
    assert capsys.readouterr().out.count("\n") == len(rows) + 2  # the machine and the table's head


def test_bfloat16_is_generated_only_where_it_is_the_dtype_of_matrix_products():
    for dtype, expected in ("float32", {"float32"}), ("bfloat16", {"float32", "bfloat16"}):
        jobs = bench.jobs_of(bench.Config("generate,plan", quick=True), dtype)
        assert {job["dtype"] for job in jobs if job["path"] == "generate"} == expected
        assert sum(job["path"] == "plan" for job in jobs) == 4


def test_line_that_fails_is_named_at_the_end_and_does_not_stop_the_others(monkeypatch, capsys):
    def measure(config, job):
        failed = {"error": "OutOfMemoryError: 80 GB"}
        if job["path"] == "machine":
            return {"dtype": "float32"}
        return failed if job.get("prompts") == 16 else {"seconds": 1.0}

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(UserError, match=r"table: generate prompts=16 dtype=float32$"):
        bench.main(bench.Config("generate,sft"))
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["generate"] * 3 + ["sft"]
    assert lines[1].endswith("OutOfMemoryError: 80 GB ")


def test_length_changes_T_and_keeps_the_tokens_of_a_step(monkeypatch):
    seen = []
    monkeypatch.setattr(workload, "measure_steps", lambda config, path, c, *rest: seen.append(c))
    config = bench.Config(**bench.QUICK, batch_size=4, accumulate=2)
    for setting in bench.SETTINGS["length"]:
        bench.measure_training(config, "length", **setting)
    assert [c.block_size for c in seen] == [256, 512, 1024, 2048]
    assert [c.batch_size for c in seen] == [4, 2, 1, 1]  # rows of at least one
    assert all(c.rows_per_step == 2 * c.batch_size for c in seen)


def test_failure_in_a_child_process_is_the_error_of_that_line():
    assert workload.in_its_own_process(math.sqrt, 9) == 3
    assert workload.in_its_own_process(math.sqrt, -1) == {"error": "ValueError: math domain error"}
    killed = workload.in_its_own_process(os._exit, 9)  # as when memory runs out
    assert killed["error"].startswith("BrokenProcessPool: ")


@pytest.mark.parametrize("module", [bench, compare_peers])
def test_unknown_path_is_refused(module):
    with pytest.raises(UserError, match=r"--only: unknown only 'nothing'; choose from"):
        module.main(module.Config(only="pretrain,nothing"))


@pytest.mark.parametrize("isolate", [True, False])
def test_loop_with_full_logits_computes_our_loss(tmp_path, isolate):
    """So the comparison is about speed alone."""
    workload.random_shards(str(tmp_path), "sft", 20, 0.5, vocab_size=261)
    config = compare_peers.Config(block_size=256)
    c, rows, _ = workload.open_training(config, "sft", str(tmp_path), isolate=isolate)
    assert c.rows_per_step == c.batch_size == 4  # a peer's step has as many
    model = GPT(GPTConfig(vocab_size=320, block_size=256, n_layer=2, n_head=2, n_embd=32))
    [batch, *_] = next(train_gpt2.load_steps(rows, c, Ranks(0, 1, torch.device("cpu")), 0))
    torch.testing.assert_close(
        compare_peers.full_logits(model, batch.x, batch.y, batch.segments),
        train_sft.forward_sft(model, batch.x, batch.y, batch.weights, batch.segments))


QUICK = compare_peers.Config(**compare_peers.QUICK, device="cpu", only="generate_1,generate_16")


@pytest.fixture(scope="module")
def peers_folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("peers"))
    data = compare_peers.measure(QUICK, compare_peers.Job("data", "nanosft", folder))
    assert data["tokens"] > 10**6 and data["trained_share"] == pytest.approx(0.62, abs=0.01)
    return folder


@pytest.mark.parametrize("what, who", [
    (what, who) for what, peers in compare_peers.COMPARISONS.items() for who in ("nanosft", *peers)
    if who != "trl"])  # which is not a dependency of the tests
def test_each_contender_runs(what, who, peers_folder):
    row = compare_peers.measure(QUICK, compare_peers.Job(what, who, peers_folder))
    assert row["peak_memory_gb"] > 0
    if what == "generate":
        ours = compare_peers.measure(QUICK, compare_peers.Job(what, "nanosft", peers_folder))
        assert row["sum_of_ids"] == ours["sum_of_ids"] > 0  # the same answers
        assert row["tokens_per_s_1"] > 0 and row["tokens_per_s_16"] > 0
        assert "tokens_per_s_64" not in row
    else:
        assert 0 < row["trained_tokens_per_s"] <= row["tokens_per_s"] and row["seconds"] > 0


def test_peer_with_full_logits_trains_the_plain_model_on_our_rows(peers_folder, monkeypatch):
    seen = []

    def full_logits(model, x, y, segments):
        seen.append((type(model), x))
        return full(model, x, y, segments)

    full = compare_peers.full_logits
    monkeypatch.setattr(compare_peers, "full_logits", full_logits)
    job = compare_peers.Job("pretrain", "full_logits", peers_folder)
    compare_peers.measure(QUICK, job)
    _, rows, _ = compare_peers.open_rows(QUICK, job)
    assert [model for model, _ in seen] == [GPT] * 3  # a warm-up and two steps; not sped up
    assert torch.equal(seen[1][1], torch.stack([rows[i]["input_ids"] for i in (2, 3)]))


def test_peer_out_of_memory_tries_half_as_many_rows():
    def run(rows: int) -> dict:
        if rows > limit:
            raise torch.OutOfMemoryError
        return {"tokens_per_s": 1.0}

    limit = 30
    assert compare_peers.largest_that_fits(run, 226) == {"tokens_per_s": 1.0, "rows": 28}
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        compare_peers.largest_that_fits(run, 226)


@pytest.mark.parametrize("installed, name", [
    (["flash_attn"], "flash_attention_2"), (["kernels"], None), ([], None)])
def test_flash_attention_that_is_missing_is_one_line_at_once(installed, name, monkeypatch):
    def offline(self, repository, timeout):
        assert timeout <= 3
        raise ConnectionError

    monkeypatch.setattr(importlib.util, "find_spec", installed.__contains__)
    monkeypatch.setattr(compare_peers.HfApi, "model_info", offline)
    if name:
        assert compare_peers.flash_attention() == name
    else:
        with pytest.raises(UserError, match="pip install flash-attn, or kernels"):
            compare_peers.flash_attention()
    monkeypatch.setattr(compare_peers.HfApi, "model_info", lambda *args, **kwargs: "there")
    if "kernels" in installed:
        assert compare_peers.flash_attention() == "kernels-community/flash-attn2"


def test_each_line_appears_as_soon_as_it_is_complete(monkeypatch, capsys):
    """So a comparison that runs out of time has shown what it measured."""
    def measure(function, config, job):
        shown.append(capsys.readouterr().out)
        return {"tokens_per_s": 100.0}

    shown = []
    monkeypatch.setattr(compare_peers, "in_its_own_process", measure)
    config = compare_peers.Config(only="sft", peers="full_logits,trl", repeats=1)
    with open(os.devnull, "w") as log:
        compare_peers.compare(config, "sft", "", log)
    assert shown[0].startswith("\nsft: medians")
    assert [text.split()[0] for text in shown[1:]] == ["nanosft", "full_logits"]
    assert capsys.readouterr().out.split()[0] == "trl"


def test_table_has_medians_ranges_and_ratios():
    ours = [{"tokens_per_s": x} for x in (300.0, 500.0, 400.0)]
    theirs = [{"tokens_per_s": x} for x in (100.0, 210.0, 200.0)]
    assert compare_peers.line_of(ours, ours) == "  tokens_per_s 400 (300 to 500)"
    assert compare_peers.line_of(theirs, ours) == "  tokens_per_s 200 (100 to 210) x2.00"
    assert compare_peers.line_of(theirs[:1], ours) == "  tokens_per_s 100 x4.00"
    fewer = [{"tokens_per_s": 100.0, "rows": 28}]  # a batch that fits; we have no such column
    assert compare_peers.line_of(fewer, ours) == "  tokens_per_s 100 x4.00  rows 28"
    left_out = [{"error": "ModuleNotFoundError: No module named 'trl'"}]
    assert compare_peers.line_of(left_out, ours).endswith("left out: " + left_out[0]["error"])


# ----- when no kernel runs -----------------------------------------------------------------------


def test_gaps_between_kernels_of_two_streams():
    # stream 1: a 10-20, c 40-50; stream 2: b 15-30, which overlaps a; the step: 5 to 100
    kernels = [(10, 20, "a"), (40, 50, "c"), (15, 30, "b")]
    assert workload.gaps_between(kernels, 5, 100) == [
        (50, "c", "the end"), (10, "b", "c"), (5, "the start", "a")]


def test_kernel_inside_another_and_one_across_the_borders_leave_no_gap():
    assert workload.gaps_between([(0, 50, "a"), (10, 20, "b"), (50, 200, "c")], 5, 100) == []
    assert workload.gaps_between([(0, 4, "early"), (200, 210, "late")], 5, 100) == [
        (95, "the start", "the end")]


def test_share_without_a_kernel_and_the_five_longest_gaps_of_a_profile(monkeypatch):
    """Events as torch.profiler gives them on a GPU: a step of 100 us with ten kernels of 4 us, a
    copy, and a range over all of it that is no kernel."""
    def event(name, start, end, kind=DeviceType.CUDA, is_range=False):
        time = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(name=name, time_range=time, device_type=kind,
                               is_user_annotation=is_range)

    kernels = [event(f"kernel_{i}", 10 * i, 10 * i + 4) for i in range(10)]
    others = [event("ProfilerStep*", 0, 100, is_range=True),
              event("ProfilerStep*", 0, 100, DeviceType.CPU, is_range=True),
              event("Memcpy HtoD", 4, 10), event("aten::mm", 0, 100, DeviceType.CPU)]

    class Profile:
        def __init__(self, schedule):
            self.steps = 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            assert self.steps == 2

        def step(self):
            self.steps += 1

        def events(self):
            return others + kernels

        def key_averages(self):
            return SimpleNamespace(table=lambda row_limit, **rest: f"table of {row_limit} rows")

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    found = workload.profile_of(lambda: None, torch.device("cuda"))
    assert found["idle"] == pytest.approx(0.6)  # 10 gaps of 6 us
    assert len(found["gaps"]) == 5 and found["gaps"][0] == (6, "kernel_9", "the end")
    first, gap, *_, table = found["profile"].strip().splitlines()
    assert first == "no kernel for 60.0% of 0.1 ms; longest gaps:"
    assert gap == "  0.01 ms after kernel_9, before the end"
    assert table == "table of 20 rows"


def test_profile_on_a_cpu_has_the_table_and_no_gaps():
    found = workload.profile_of(lambda: torch.ones(9, 9) @ torch.ones(9, 9), torch.device("cpu"))
    assert found.keys() == {"profile"} and "aten::mm" in found["profile"]


# ----- runs/gpu_bench.sh -------------------------------------------------------------------------

GPU_BENCH = Path(__file__).parents[1] / "runs/gpu_bench.sh"


def run_gpu_bench(folder: Path, timeout: str) -> tuple[int, str, list[str]]:
    """(exit code, output, [limit and command of each step]); timeout: a script in its place."""
    (folder / "timeout").write_text(f"#!/bin/sh\nshift 2; echo \"$@\" >> {folder}/log\n{timeout}")
    (folder / "timeout").chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "JSON": f"{folder}/json/bench"}
    done = subprocess.run(["bash", GPU_BENCH], env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, (folder / "log").read_text().splitlines()


def test_all_steps_of_the_gpu_bench_end_within_six_minutes(tmp_path):
    code, output, steps = run_gpu_bench(tmp_path, "exit 0")
    assert (code, output.splitlines()[-1]) == (0, "not complete: nothing")
    # no step takes any time here, so each has the limits of all steps before it, too
    limits = [int(step.split()[0]) for step in steps]
    assert limits == sorted(limits) and 300 < limits[-1] <= 360
    modules = [re.search(r"python -m (\S+)", step)[1] for step in steps]
    assert modules == ["tools.bench", "tests.check_gpu", *["tools.bench"] * 2,
                       *["tools.compare_peers"] * 2, "tests.check_nccl", "tools.compare_peers"]


def test_step_of_the_gpu_bench_that_fails_or_hangs_is_named_and_stops_no_other(tmp_path):
    case = 'case "$*" in *check_nccl*) exit 124;; *float32*) exit 2;; esac'
    code, output, steps = run_gpu_bench(tmp_path, case)
    assert code == 1 and len(steps) == 8
    assert output.splitlines()[-2:] == ["not complete: generation in float32: exit code 2",
                                        "not complete: NCCL: out of time"]


@pytest.mark.parametrize("module", [bench, compare_peers])
def test_gpu_bench_passes_flags_that_exist(module, tmp_path):
    name = module.__name__
    _, _, steps = run_gpu_bench(tmp_path, "exit 0")
    commands = [shlex.split(step.partition(name)[2]) for step in steps if f" {name} " in step]
    assert commands
    for flags in commands:
        config = tyro.cli(module.Config, args=flags, use_underscores=True)
        for path in config.only.split(","):
            assert path in (bench.SETTINGS if module is bench else compare_peers.ONLY)
