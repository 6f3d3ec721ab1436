"""Each mistake of tools/ablations.py does what it claims: a test fails if it does nothing."""

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from helpers_training import (
    ALONE,
    chat_example,
    save_tiny_model,
    sft_folder,
    step_gradients,
    tiny_model,
    weights_of,
)

import sft_data
import train_sft
from data.worksheet import write_rows
from sft_data import SFTDataset
from tools import ablations
from tools.ablations import Variant, bug_variants, lesson_config, open_rows, run_variant
from tools.lesson import read_all
from train_gpt2 import MicroBatch, load_steps

EOT, ASSISTANT, END = 256, 259, 260  # of the `bytes` encoding
# 13 examples with answers of very different lengths; packed they need 8 rows of 64 tokens
PAIRS = [(f"What is {i}+{i}?", f"{i}+{i}={2 * i}." + " Yes." * (i % 5)) for i in range(13)]


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """A finished lesson as runs/lesson.sh leaves it, but tiny: base, shards, and questions."""
    folder = tmp_path_factory.mktemp("root") / "lesson_1"
    save_tiny_model(folder / "base", template=None, block_size=64)
    sft_folder(folder / "sft_shards", train=[chat_example(*pair) for pair in PAIRS])
    (folder / "text").mkdir()
    rows = [{"question": question, "answer": answer} for question, answer in PAIRS[:4]]
    write_rows(folder / "text/questions.jsonl", rows)
    write_rows(folder / "text/sft_train.jsonl", rows[:2])
    write_rows(folder / "text/heldout.jsonl", rows[2:])
    return folder


def rows_of(lesson, rows: type[SFTDataset], **flags) -> SFTDataset:
    """The training rows of the lesson, one example each if no layout is given."""
    config = dataclasses.replace(lesson_config(lesson, 1), **({"layout": "pad"} | flags))
    return open_rows(rows, config, "train")


def pairs_of_rows(lesson, rows: type[SFTDataset], **flags) -> list[tuple[dict, dict]]:
    """(correct row, broken row), which have the same inputs."""
    right, wrong = rows_of(lesson, SFTDataset, **flags), rows_of(lesson, rows, **flags)
    pairs = [(right[i], wrong[i]) for i in range(len(right))]
    assert len(pairs) == len(wrong) > 7
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in pairs)
    for row in itertools.chain(*pairs):
        assert torch.equal(row["labels"] >= 0, row["weights"] > 0)
    return pairs


def changes(lesson, rows: type[SFTDataset]) -> list[tuple[list, list]]:
    """The labels of each example, correct and broken, where they differ."""
    found = []
    for right, wrong in pairs_of_rows(lesson, rows):
        at = right["labels"] != wrong["labels"]
        found.append((right["labels"][at].tolist(), wrong["labels"][at].tolist()))
    return found


def answers_of(lesson) -> list[list[int]]:
    """The supervised ids of each example."""
    return [row["labels"][row["labels"] >= 0].tolist() for row in rows_of(lesson, SFTDataset)]


# ----- what each changes in the labels -----------------------------------------------------------


def test_late_mask_ignores_the_first_token_of_each_answer_and_no_other(lesson):
    expected = [([answer[0]], [-100]) for answer in answers_of(lesson)]
    assert changes(lesson, ablations.MaskTooShort) == expected


def test_early_mask_supervises_the_last_token_of_each_prompt_as_well(lesson):
    assert changes(lesson, ablations.MaskTooLong) == [([-100], [ASSISTANT])] * len(PAIRS)


@pytest.mark.parametrize("rows, more", [(ablations.MaskTooShort, -1), (ablations.MaskTooLong, 1)])
def test_masks_move_in_each_example_of_a_packed_row(lesson, rows, more):
    for right, wrong in pairs_of_rows(lesson, rows, layout="fit"):
        n_examples = int(right["segments"].max()) + 1
        trained = [int((row["labels"] >= 0).sum()) for row in (right, wrong)]
        assert trained[1] - trained[0] == more * n_examples


def test_end_token_masked_as_padding_is_ignored_and_nothing_else_is(lesson):
    assert changes(lesson, ablations.EndIsPadding) == [([END], [-100])] * len(PAIRS)


def test_labels_shifted_twice_are_those_of_the_next_position(lesson):
    for right, wrong in pairs_of_rows(lesson, ablations.ShiftedTwice):
        assert wrong["labels"].tolist() == [*right["labels"].tolist()[1:], -100]
        assert wrong["weights"].tolist() == [*right["weights"].tolist()[1:], 0]


def test_marker_encoded_by_itself_is_found_nowhere_and_as_its_one_id_everywhere(lesson):
    answers = answers_of(lesson)
    assert changes(lesson, ablations.SearchedMarker) == [
        (answer, [-100] * len(answer)) for answer in answers]

    class Found(ablations.SearchedMarker):
        def marker(self):
            return [ASSISTANT]

    for layout in ("pad", "fit"):
        pairs = pairs_of_rows(lesson, Found, layout=layout)
        assert all(torch.equal(right["labels"], wrong["labels"]) for right, wrong in pairs)


def test_example_cut_at_its_end_loses_its_end_token(lesson):
    variants = bug_variants(lesson_config(lesson, 1))
    cut = next(i for i, variant in enumerate(variants) if "cut at" in variant.name)
    whole, cut = variants[cut - 1 : cut + 1]
    for variant, ends in ((whole, len(PAIRS)), (cut, 0)):
        labels = [row["labels"] for row in rows_of(lesson, variant.rows, **variant.flags)]
        assert len(labels) == len(PAIRS) and all((row >= 0).any() for row in labels)
        assert sum(int((row == END).sum()) for row in labels) == ends


def test_padding_in_the_loss_trains_what_was_padding_and_nothing_else(lesson):
    for layout in ("pad", "fit"):
        for right, wrong in pairs_of_rows(lesson, ablations.PaddingInLoss, layout=layout):
            padding = right["segments"] < 0
            for name, value in (("labels", EOT), ("weights", 1)):
                assert torch.equal(right[name][~padding], wrong[name][~padding])
                assert (wrong[name][padding] == value).all()
    assert not rows_of(lesson, ablations.PaddingInLoss).batch([None])["weights"].any()


def test_row_padded_on_the_left_is_the_same_row_after_its_padding(lesson):
    right, wrong = rows_of(lesson, SFTDataset), rows_of(lesson, ablations.PaddedLeft)
    shifts = set()
    for i in range(len(right)):
        a, b = right[i], wrong[i]
        shift = int((a["segments"] < 0).sum())
        shifts.add(shift)
        assert all(torch.equal(b[name], a[name].roll(shift)) for name in a)
        assert (b["input_ids"][:shift] == EOT).all() and (b["labels"][:shift] < 0).all()
    assert len(shifts) > 3 and 0 not in shifts
    assert wrong.batch([0])["segments"] is None  # so positions count the padding, and it is seen


def test_ignored_mark_trains_the_answers_that_it_was_on_and_nothing_else(lesson, tmp_path):
    """As if the data had no marks."""
    flags = {"data": ablations.chats_with_mistakes(lesson, tmp_path / "marked")}
    right, wrong = (rows_of(lesson, rows, **flags) for rows in (
        SFTDataset, ablations.InstructionIgnored))
    chats = read_all(tmp_path / "marked/chats.jsonl")
    assert [chat["messages"][1]["content"] for chat in chats] == ["0+0=1.", "1+1=2. Yes."]
    write_rows(tmp_path / "unmarked.jsonl", [
        {"messages": [{k: m[k] for k in ("role", "content")} for m in chat["messages"]]}
        for chat in chats])
    sft_data.main(sft_data.Config(source=(str(tmp_path / "unmarked.jsonl"),), val_fraction=0,
                                  out=str(tmp_path / "unmarked"), encoding="bytes", workers=1))
    unmarked = rows_of(lesson, SFTDataset, data=str(tmp_path / "unmarked"))
    assert len(right) == len(wrong) == len(unmarked) == 2
    more = []
    for i in range(2):
        a, b, c = right[i], wrong[i], unmarked[i]
        assert all(torch.equal(b[name], c[name]) for name in c)
        changed = a["labels"] != b["labels"]
        assert torch.equal(a["input_ids"], b["input_ids"]) and (a["labels"][changed] < 0).all()
        more.append(b["labels"][changed].tolist())
    assert sorted(more) == [[], [*b"0+0=1.", END]]


def test_prompts_padded_on_the_left_are_asked_with_the_padding_as_text():
    model, prompts = tiny_model(block_size=64), [[1, 2], [3], list(range(9))]
    padded = [[EOT, EOT, 1, 2], [EOT, EOT, EOT, 3], prompts[2]]
    with ablations.padded_left(4):
        answers = model.generate(prompts, 5, temperature=0)
    assert answers == model.generate(padded, 5, temperature=0)
    assert answers[:2] != model.generate(prompts[:2], 5, temperature=0)


# ----- what each changes in a step ---------------------------------------------------------------


def test_mean_of_means_gives_each_micro_batch_the_same_weight(lesson):
    model, answers = tiny_model(block_size=64), answers_of(lesson)
    short, long = (min(range(len(PAIRS)), key=lambda i: sign * len(answers[i])) for sign in (1, -1))
    counts = [len(answers[short]), len(answers[long])]
    assert counts[1] > 3 * counts[0]
    for rows, votes in ((SFTDataset, counts), (ablations.MeanOfMeans, [1, 1])):
        data = rows_of(lesson, rows)
        parts = [MicroBatch(**data.batch([i])) for i in (short, long)]
        with torch.no_grad():
            means = [float(model(part.x, part.y)) / n for part, n in zip(parts, counts)]
        step, _ = step_gradients(model, parts)
        assert step["loss"] == pytest.approx(np.average(means, weights=votes), rel=1e-3)
        assert abs(means[1] - means[0]) > 0.01


def test_filler_has_no_weight_in_a_mean_of_means(lesson):
    data = rows_of(lesson, ablations.MeanOfMeans)
    assert data.batch([None])["weights"].tolist() == [[0.0] * data.block_size]


def test_running_positions_change_the_second_example_of_a_row_but_not_what_it_attends_to():
    model = tiny_model(block_size=16)
    ids = torch.arange(100, 113)[None]
    x, y = ids[:, :-1], ids[:, 1:].clone()
    y[:, :6] = -100  # only the second example is in the loss
    weights, segments = (y >= 0).float(), (torch.arange(12) >= 6).long()[None]
    right = train_sft.forward_sft(model, x, y, weights, segments)
    wrong = ablations.forward_running_positions(model, x, y, weights, segments)
    assert abs(right - wrong) > 0.1
    other = x.clone()
    other[:, :6] += 50  # another first example
    assert ablations.forward_running_positions(model, other, y, weights, segments) == wrong
    one, nothing = torch.zeros_like(segments), torch.ones_like(weights)
    assert torch.equal(ablations.forward_running_positions(model, x, x, nothing, one),
                       train_sft.forward_sft(model, x, x, nothing, one))


def test_ranks_that_shuffle_differently_repeat_and_miss_examples(lesson):
    config = lesson_config(lesson, 1)

    def how_often(rows: type[SFTDataset]) -> list[int]:
        """How often one epoch reads each example."""
        data, read = rows_of(lesson, rows), []
        for step in itertools.islice(load_steps(data, config, ALONE, 0), 2):
            read += [bytes(i for i in ids if i < 256) for ids in step[0].x.tolist()]
        return sorted(read.count(b"".join(part.encode() for part in pair)) for pair in PAIRS)

    assert config.rows_per_step == 8  # so an epoch of 13 rows has 2 steps
    assert how_often(SFTDataset) == [1] * 13
    apart = how_often(ablations.RanksApart)
    assert sum(apart) == 13 and (apart[0], apart[-1]) == (0, 2)


# ----- the runs ----------------------------------------------------------------------------------


def test_every_mistake_changes_what_two_steps_train(lesson, tmp_path):
    """Against the same flags with the correct code; a mistake that does nothing would be equal."""
    correct, *mistakes = bug_variants(lesson_config(lesson, 1))

    def train(name: str, variant: Variant) -> tuple[list[torch.Tensor], str]:
        variant = variant._replace(flags=variant.flags | {"max_steps": 2})
        results = run_variant(lesson, 1, variant, tmp_path / name)
        assert {*ablations.COLUMNS, "answer"} <= results.keys()
        return weights_of(tmp_path / name / "run"), (tmp_path / name / "answers.jsonl").read_text()

    def same(a, b) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    right, right_answers = train("correct", correct)
    assert same(right, train("again", correct)[0])
    for variant in mistakes:
        control = right
        if variant.rows is not SFTDataset and (variant.flags or variant.data):
            control, _ = train(f"{variant.name}, control", variant._replace(rows=SFTDataset))
        wrong, answers = train(variant.name, variant)
        if variant.template or variant.asked is not contextlib.nullcontext:
            # trained as it should be, but asked in another way
            assert same(wrong, control) and answers != right_answers
        else:
            assert not same(wrong, control), variant.name
        assert same(wrong, weights_of(lesson / "base")) == (
            variant.rows is ablations.SearchedMarker)


def test_flags_are_those_of_the_lesson_script(lesson):
    config = lesson_config(lesson, 5)
    assert config.data == str(lesson / "sft_shards") and config.init == str(lesson / "base")
    assert config.seed == 5 and config.device == "cpu"
    assert config.batch_size == config.rows_per_step


def test_table_has_a_line_for_each_variant_and_is_saved(lesson, monkeypatch, command):
    variants = [Variant("<|a|>", {"max_steps": 1}),
                Variant("once", {"max_steps": 1}, every_seed=False)]
    monkeypatch.setitem(ablations.EXPERIMENTS, "bugs", lambda config: variants)
    result = command(ablations, "--experiment", "bugs", "--root", lesson.parent, "--seeds", 1)
    head, _, *lines = result.out.splitlines()
    assert head == ("| variant | seeds | heldout_acc | trained_acc | stop_rate | "
                    f"{PAIRS[2][0]} |")
    assert [line.split(" | ")[0] for line in lines] == ["| <\\|a\\|>", "| once"]
    assert (lesson.parent / "bugs.md").read_text() == result.out
