"""tools/bench.py: the FLOP formula worked by hand, and each path measured once on a tiny model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import train_sft
from model import GPT, GPTConfig
from nanosft.cli import UserError
from tools import bench

TINY = GPTConfig(vocab_size=320, block_size=16, n_layer=2, n_head=2, n_embd=32)


def test_flops_by_hand():
    # A block has 12 * 32 * 32 = 12,288 weights in matrices; two blocks have 24,576, and each costs
    # 6 FLOPs per token: 147,456. The head, where it runs: 6 * 320 * 32 = 61,440.
    # A pair of tokens: 12 FLOPs in each of 2 layers and 32 channels: 768.
    assert bench.flops(TINY, tokens=1, head_tokens=0, pairs=0) == 147_456
    assert bench.flops(TINY, tokens=0, head_tokens=1, pairs=0) == 61_440
    assert bench.flops(TINY, tokens=0, head_tokens=0, pairs=1) == 768


def test_flops_equal_palms_formula_if_each_token_is_trained_and_sees_the_whole_row():
    T = TINY.block_size
    N = sum(p.numel() for p in GPT(TINY).parameters() if p.dim() == 2)
    N -= T * TINY.n_embd  # the position embedding is looked up, not multiplied
    assert bench.flops(TINY, T, T, T * T) == T * (6 * N + 12 * TINY.n_layer * TINY.n_embd * T)


def test_token_sees_itself_and_the_earlier_tokens_of_its_example():
    # examples of 3 and 2 tokens, then padding: (1 + 2 + 3) + (1 + 2) pairs
    assert bench.seen_pairs(torch.tensor([0, 0, 0, 1, 1, -1, -1])) == 9
    assert bench.seen_pairs(torch.zeros(16, dtype=torch.long)) == 16 * 17 // 2


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_random_shards_open_like_real_ones_and_have_the_requested_share(tmp_path, share):
    bench.random_shards(str(tmp_path), "sft", 300, share, vocab_size=512)
    rows = train_sft.open_rows(train_sft.Config(str(tmp_path), "", layout="stream"), "train")
    assert len(rows.lengths) == 300 and 130 < np.median(rows.lengths) < 160
    split = rows.meta["splits"]["train"]
    assert split["trained_tokens"] / split["tokens"] == pytest.approx(share, abs=0.01)


KEYS = {
    "pretrain": {"tokens_per_s", "trained_tokens_per_s", "flops_per_s", "limit", "palm_mfu"},
    "sft": {"tokens_per_s", "trained_tokens_per_s", "limit", "palm_mfu", "loading"},
    "generate": {"tokens_per_s", "bytes_per_s", "limit", "peak_memory_gb"},
    "pack": {"tokens_per_s", "plan_s", "n_rows", "bound", "bytes_an_example", "limit"},
}


def test_quick_measures_each_path_and_writes_json_lines(tmp_path, capsys):
    log = tmp_path / "bench.jsonl"
    bench.main(bench.Config(",".join(KEYS), quick=True, json=str(log), device="cpu"))
    machine, *rows = map(json.loads, log.read_text().splitlines())
    assert machine["path"] == "machine" and machine["flops_per_s"] > 0
    assert {row["path"] for row in rows} == set(KEYS)
    for row in rows:
        assert KEYS[row["path"]] <= row.keys()
        assert all(row[key] > 0 for key in KEYS[row["path"]]), row
    layouts = {(row["layout"], row["isolate"]) for row in rows if row["path"] == "sft"}
    assert len(layouts) == 8
    assert capsys.readouterr().out.count("\n") == len(rows) + 2  # the machine and the table's head


def test_failure_in_a_child_process_is_the_error_of_that_line(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    config = bench.Config(**bench.QUICK, device="nowhere")
    row = bench.measure(config, {"path": "generate", "prompts": 1})
    assert row["error"].startswith("error: --device nowhere: not available")


def test_unknown_path_is_refused():
    with pytest.raises(UserError, match=r"--only: unknown .*'nothing'.*; choose from"):
        bench.main(bench.Config(only="pack,nothing"))
