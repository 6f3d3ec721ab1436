"""tools/bench.py and compare_peers.py: FLOPs worked by hand, each path measured once, tiny."""

import json
import math
import os

import numpy as np
import pytest
import torch

import train_gpt2
import train_sft
from answer import save_model
from model import GPT, GPTConfig
from nanosft.errors import UserError
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
    "plan": {"seconds", "limit", "kept_bytes", "peak_bytes"},
}


def test_quick_measures_each_path_and_writes_json_lines(tmp_path, capsys):
    log = tmp_path / "bench.jsonl"
    bench.main(bench.Config(",".join(KEYS), quick=True, batch_size=1, steps=1, json=str(log),
                            device="cpu"))
    machine, *rows = map(json.loads, log.read_text().splitlines())
    assert machine["path"] == "machine" and machine["flops_per_s"] > 0
    assert {row["path"] for row in rows} == set(KEYS)
    for row in rows:
        assert all(row[key] > 0 for key in KEYS[row["path"]]), row
    layouts = {(row["layout"], row["isolate"]) for row in rows if row["path"] == "layouts"}
    assert len(layouts) == 8
    assert all(row["limit"] <= 1 for row in rows if row["path"] == "plan")  # it is a bound
    assert capsys.readouterr().out.count("\n") == len(rows) + 2  # the machine and the table's head


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
    batch = train_gpt2.MicroBatch(**rows.batch([0, 1]))
    arguments = (model, batch.x, batch.y, batch.weights, batch.segments)
    torch.testing.assert_close(compare_peers.full_logits(*arguments),
                               train_sft.forward_sft(*arguments))


@pytest.fixture(scope="module")
def peers_folder(tmp_path_factory):
    """What compare_peers.make_data makes, without the gpt2 vocabulary."""
    folder = tmp_path_factory.mktemp("peers")
    for kind in ("sft", "text", "model"):
        (folder / kind).mkdir()
    for kind in ("sft", "text"):
        workload.random_shards(str(folder / kind), kind, 200, 0.5, vocab_size=261)
    save_model(folder / "model", GPT(GPTConfig(128, 50304, 1, 1, 16)), "bytes", "chat")
    return str(folder)


@pytest.mark.parametrize("what, who", [
    (what, who) for what in compare_peers.COMPARISONS for who in compare_peers.COMPARISONS[what]
    if who != "trl" and (what, who) not in (("generate_1", "nanosft"), ("generate_16", "nanosft"))])
def test_each_contender_runs_and_gives_the_same_answer(what, who, peers_folder):
    """All but TRL, which is not a dependency of the tests."""
    config = compare_peers.Config(**compare_peers.QUICK, device="cpu")
    row = compare_peers.measure(config, compare_peers.Job(what, who, peers_folder))
    assert row["tokens_per_s"] > 0 and row["seconds"] > 0 and row["peak_memory_gb"] > 0
    if "generate" in what:
        ours = compare_peers.measure(config, compare_peers.Job(what, "nanosft", peers_folder))
        assert row["sum_of_ids"] == ours["sum_of_ids"] > 0
    else:
        assert 0 < row["trained_tokens_per_s"] <= row["tokens_per_s"]


def test_table_has_medians_ranges_and_ratios():
    ours = [{"tokens_per_s": x} for x in (300.0, 500.0, 400.0)]
    theirs = [{"tokens_per_s": x} for x in (100.0, 210.0, 200.0)]
    assert compare_peers.line_of(ours, ours) == "  tokens_per_s 400 (300 to 500)"
    assert compare_peers.line_of(theirs, ours) == "  tokens_per_s 200 (100 to 210) x2.00"
    left_out = [{"error": "ModuleNotFoundError: No module named 'trl'"}]
    assert compare_peers.line_of(left_out, ours).endswith("left out: " + left_out[0]["error"])
