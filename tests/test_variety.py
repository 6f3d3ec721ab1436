"""tools/variety.py: what its data says, what it measures, and a tiny run."""

import json
import re

import pytest
import torch
from helpers_training import tiny_model

from tools import variety
from tools.variety import Config, N, corpus, flat, log_probs, make_items, measure, table


def test_every_name_has_four_right_answers_of_its_own():
    items = make_items(1)
    assert len(items) == len({some[0].key for some in items}) == 64
    for some in items:
        assert len({item.fact for item in some}) == N and len({item.question for item in some}) == 1
    assert make_items(1) == items != make_items(2)


def test_corpus_states_each_fact_about_equally_often_and_never_answers_a_question():
    texts = [row["text"] for row in corpus(1, 4000)]
    facts = re.findall(r"\w\w=\w\.", " ".join(texts))
    counts = [facts.count(item.fact) for item in flat(make_items(1))]
    assert sum(counts) == len(facts) and 15 < min(counts) and max(counts) < 75  # 40 on average
    assert not any("?" in text and "=" in text for text in texts)


class Uniform:
    """A model to which all 320 ids are equally likely; its samples are given."""

    def __init__(self, samples: list[list[int]]):
        self.samples = samples

    def __call__(self, idx):
        return torch.zeros(*idx.shape, 320)

    def generate(self, prompts, max_new_tokens, stop_ids):
        assert len(prompts) == len(self.samples)
        return self.samples


def test_measures_of_a_uniform_model_by_hand():
    (a, b, *_), ids = make_items(1)[0], lambda text: [*text.encode(), variety.END]
    wrong = ids(a.fact.replace("=", "?"))
    result = measure(Uniform([ids(a.fact), ids(a.fact), ids(b.fact), wrong]), make_items(1)[:1])
    assert result == pytest.approx({"right": 4 * 320**-6, "bits": 2, "different": 2}, rel=1e-4)


def test_in_its_own_words_the_model_continues_the_fact():
    some = make_items(1)[:1]
    samples = [list(item.fact[3:].encode()) for item in some[0]]  # after `ab=`
    assert measure(Uniform(samples), some, asks=False)["different"] == N


def test_log_probability_of_an_output_is_the_sum_over_its_tokens():
    model = tiny_model()
    logp = model(torch.tensor([[1, 2, 3, 4]])).log_softmax(-1)[0]
    want = logp[1, 3] + logp[2, 4] + logp[3, 5]  # of 3, 4, 5 after 1, 2
    torch.testing.assert_close(log_probs(model, [[1, 2]], [[3, 4, 5]])[0], want)


def test_table_gives_mean_lowest_and_highest_of_the_seeds():
    run = {"shown": 1, "names": "trained", "step": 20}
    results = [run | {"seed": s, "right": s / 4, "bits": s, "different": s} for s in (1, 3)]
    assert table(results, (20,)).splitlines()[2:] == [
        "| 1 | trained | 20 | 50% (25% to 75%) | 2.0 (1.0 to 3.0) | 2.0 (1.0 to 3.0) |"]


def test_a_tiny_run_fits_its_chats_and_measures_each_half(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(variety, "NAMES", 8)
    out = tmp_path / "out"
    variety.main(Config(seeds=(1,), out=str(out), pretraining_steps=10, steps=4))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| shown |") and len(lines) == 2 + 1 + 3 * 2 * 2
    results = json.loads((out / "variety.json").read_text())
    assert {(r["shown"], r["names"], r["step"]) for r in results if r["shown"]} == {
        (n, names, step) for n in variety.SHOWN for names in ("trained", "held out")
        for step in (0, 4)}
    for n in variety.SHOWN:
        rows = (out / f"seed_1/sft_{n}.jsonl").read_text().splitlines()
        assert len(rows) == 4 * n
        losses = [json.loads(line)["loss"] for line in
                  (out / f"seed_1/sft_{n}/metrics.jsonl").read_text().splitlines()]
        assert len(losses) == 4 and losses[-1] < losses[0]
