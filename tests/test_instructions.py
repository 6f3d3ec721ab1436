"""What a dataset says about training is honored or refused by name; nothing else vanishes."""

import doctest
import re
import shlex

import numpy as np
import pytest
from helpers_training import save_tiny_model

import evaluate
import sft_data
from nanosft import instructions
from nanosft.errors import UserError
from nanosft.forms import FIRST_ROWS, Reading, examined, messages_of
from tokenizer import render, render_prompt

Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
R, B = {"role": "user", "content": "R"}, {"role": "assistant", "content": "B"}
PAIR = {"prompt": "Q", "response": "A"}
LONG = "one two three four five six seven eight nine"  # words: a label has at most 8
LIKE_A_LABEL = "x" * 64


def chat(**keys) -> dict:
    """A chat of two answers, A and B; the message of A has these keys, too."""
    return {"messages": [Q, A | keys, R, B]}


def weights_of(encoding, row: dict, **flags) -> dict[str, int]:
    """{character: its weight in percent} of a row whose contents have no character twice."""
    ids, weights = render(encoding, messages_of(row, Reading(**flags)))
    return {chr(i): weight for i, weight in zip(ids, weights) if i < 128}


def refusal(row, **flags) -> str:
    with pytest.raises(UserError) as error:
        messages_of(row, Reading(**flags))
    assert len(str(error.value)) <= 300
    return str(error.value)


def flags_in(message: str) -> dict:
    """The flags that an error advises, as those of a Reading."""
    found = {name: shlex.split(words) for name, words in
             re.findall(r"--(where|ignore|columns) ((?:[^-,(;]|(?<=\w)[-,](?=\w))+)", message)}
    return {name: words[0] if name == "columns" else tuple(words) for name, words in found.items()}


def test_docstring_examples_are_right():
    assert doctest.testmod(instructions).failed == 0


# ----- keys that say what is trained -------------------------------------------------------------


@pytest.mark.parametrize("key, value, percent", [
    ("weight", 0, 0), ("weight", 1, 100), ("weight", 0.5, 50), ("weight", None, 100),
    ("weight", False, 0), ("loss_weight", 0.25, 25), ("sample_weight", 0, 0), ("lossWeight", 0, 0),
    ("weight", "0", 0), ("weight", "0.50", 50), ("loss_weight", " 1 ", 100), ("skip", "1", 0),
    ("loss_scale", 0.5, 50), ("train", False, 0), ("train", True, 100), ("train", "no", 0),
    ("train", "", 100), ("Train", "False", 0), ("trainable", 0, 0), ("training", "mask", 0),
    ("train_on_turn", False, 0), ("is_train", False, 0), ("loss", False, 0), ("loss", "True", 100),
    ("compute_loss", False, 0), ("computeLoss", 0, 0), ("output_with_loss", "false", 0),
    ("loss_mask", 0, 0), ("loss_mask", 1, 100), ("learn", False, 0), ("supervise", False, 0),
    ("masked", True, 0), ("masked", False, 100), ("is_masked", 1, 0), ("mask_loss", True, 0),
    ("no_loss", True, 0), ("ignore", True, 0), ("skip", "yes", 0), ("skip", False, 100),
    ("exclude_from_loss", True, 0), ("do_not_train", True, 0), ("untrained", True, 0),
])
def test_key_that_means_a_weight_is_one_in_a_message_a_part_and_a_row(bytes_encoding, key, value,
                                                                     percent):
    assert weights_of(bytes_encoding, chat(**{key: value})) == {
        "Q": 0, "A": percent, "R": 0, "B": 100}
    part = {"type": "text", "text": "C", key: value}
    assert weights_of(bytes_encoding, {"messages": [Q, A | {"content": [part, "D"]}]}) == {
        "Q": 0, "C": percent, "D": 100}
    for row in (chat(), PAIR, {"conversation": [{"input": "Q", "output": "A"}]}):
        found = weights_of(bytes_encoding, row | {key: value})
        assert (found["Q"], found["A"], found.get("B", percent)) == (0, percent, percent)


def test_whole_answer_of_weight_0_is_kept_as_context_with_its_end_token(bytes_encoding):
    """<|user|> Q <|end|> <|assistant|> A <|end|> <|user|> R <|end|> <|assistant|> B <|end|> eot."""
    ids, weights = render(bytes_encoding, messages_of(chat(train=False)))
    assert weights == [0] * 10 + [100, 100, 0] and len(ids) == 13


def test_weights_of_row_message_and_part_are_multiplied(bytes_encoding):
    parts = [{"text": "C", "weight": 0.5}, {"text": "D", "weight": 0}, {"text": "E"}]
    row = {"messages": [Q, A | {"content": parts, "weight": 0.5}, R, B], "weight": 0.8}
    assert weights_of(bytes_encoding, row) == {
        "Q": 0, "C": 20, "D": 0, "E": 40, "R": 0, "B": 80}


@pytest.mark.parametrize("template", ["chat", "raw", "alpaca"])
def test_parts_of_an_answer_keep_weights_of_their_own_and_the_end_token_that_of_the_last(
        bytes_encoding, template):
    parts = [{"type": "text", "text": "C", "train": False}, {"type": "text", "text": "D"}]
    messages = messages_of({"messages": [Q, A | {"content": parts}]})
    ids, weights = render(bytes_encoding, messages, template)
    assert messages[-1]["content"] == "CD"  # the reference of evaluate.py
    prompt = render_prompt(bytes_encoding, messages, template)
    assert ids[: len(prompt)] == prompt and not any(weights[: len(prompt)])
    end = [0] if template == "chat" else []
    assert weights[len(prompt) :] == [0, 100, 100, *end]


def test_earlier_answer_of_parts_is_context_under_last_turn(bytes_encoding):
    parts = [{"text": "C", "weight": 0.5}, {"text": "D"}]
    messages = messages_of({"messages": [Q, A | {"content": parts}, R, B]})
    assert sum(w > 0 for w in render(bytes_encoding, messages)[1]) == 5  # C D end B end
    assert sum(w > 0 for w in render(bytes_encoding, messages, train_on="last_turn")[1]) == 2


@pytest.mark.parametrize("key, value", [
    ("weight", 2), ("weight", -1), ("weight", float("nan")), ("weight", "2"),
    ("weight", "nan"), ("weight", [0, 1]),
    ("loss", 0.3), ("loss", [0, 1]), ("train", "some"), ("train", {"begin": 0}), ("mask", True),
    ("mask", 0), ("mask", "Assistant"), ("loss_mask", [1, 1, 0]), ("completion_mask", [0, 1]),
    ("assistant_masks", [[0, 1]]), ("token_weights", [0.5]), ("spans", [[0, 4]]),
    ("train_detail", [{"begin_offset": 0, "end_offset": 4, "train": False}]),
    ("train_on_inputs", True), ("skip", 7),
])
def test_what_no_weight_can_say_is_refused_by_name_and_the_advice_works(key, value):
    for row in (chat(**{key: value}), PAIR | {key: value}, {"text": "x", key: value},
                {"messages": [Q, A | {"content": [{"text": "A", key: value}]}]}):
        message = refusal(row)
        assert key in message and message.endswith(f"--ignore {key}")
        assert messages_of(row, Reading(**flags_in(message))) in (
            [Q, A], [Q, A, R, B], "x")


@pytest.mark.parametrize("keys", [
    {"train": False, "weight": 1}, {"train": True, "weight": 0}, {"masked": True, "train": True},
    {"weight": 0.5, "loss_weight": 0.25}])
def test_keys_that_contradict_each_other_are_refused(keys):
    for row in (chat(**keys), PAIR | keys):
        message = refusal(row)
        assert all(key in message for key in keys) and "contradict each other" in message
        messages_of(row, Reading(**flags_in(message)))  # one of them is left


def test_keys_that_agree_are_one_weight(bytes_encoding):
    keys = [({"train": False, "weight": 0}, 0), ({"train": True, "weight": 0.5}, 50),
            ({"masked": False, "weight": 0}, 0), ({"weight": 0.5, "loss_weight": 0.5}, 50)]
    for given, percent in keys:
        assert weights_of(bytes_encoding, chat(**given))["A"] == percent


def test_only_answers_can_be_trained_and_leaving_it_out_there_keeps_it_for_the_answers():
    """axolotl can train a user's turn; here it is refused. That it is not trained goes anyway."""
    for key, value in (("train", False), ("weight", 0), ("masked", True), ("masked", False)):
        assert messages_of({"messages": [Q | {key: value}, A]}) == [Q, A]
    for key, value, weight in (("train", True, 0), ("weight", 0.5, 0.5), ("loss_mask", 1, 0)):
        answers = [A | {key: 0.5 if key == "weight" else False}, B]
        for question in (Q | {key: value}, Q | {"content": [{"text": "Q", key: value}]}):
            row = {"messages": [question, answers[0], R, answers[1]]}
            message = refusal(row)
            assert message.startswith(f"message 0: {key} {value} on a user message")
            assert message.endswith(f"--ignore user.{key}")
            assert messages_of(row, Reading(**flags_in(message))) == [
                Q, A | {"weight": weight}, R, B]
    assert messages_of(PAIR | {"mask": "User"}) == [Q, A]  # NeMo's way to say what is usual


def test_text_row_is_trained_whole_or_refused():
    assert messages_of({"text": "x", "train": True, "weight": 1}) == "x"
    for key, value in (("train", False), ("weight", 0.5), ("skip", True)):
        message = refusal({"text": "x", key: value})
        assert f"`{key}` is {value}, which may say what to train, but a {{text}} row is" in message
        assert messages_of({"text": "x", key: value}, Reading(**flags_in(message))) == "x"


def test_instruction_inside_metadata_is_refused():
    for key, value in (("train", False), ("weight", 0.5), ("loss_mask", [0])):
        for row in (PAIR | {"metadata": {key: value}}, chat(extra={key: value})):
            assert f"holds `{key}`, which may say what to train" in refusal(row)
    assert messages_of(PAIR | {"metadata": {"train": True, "weight": 1, "n": 3}}) == [Q, A]


def test_weight_of_a_message_reaches_the_shards(sft_shards):
    """The case of the issue: of two answers only "4" and its <|end|> are trained."""
    folder = sft_shards([{"messages": [Q, A | {"train": False}, R, B | {"train": True}]}])
    ids, weights = np.load(f"{folder}/train_000000.npy")
    assert ids[weights == 100].tolist() == [ord("B"), 260]


# ----- unknown flags of messages -----------------------------------------------------------------


@pytest.mark.parametrize("value", [True, False, 0, 1.5, [True, False], [[1]], [{"a": 1}], "false"])
def test_unknown_flag_of_a_message_is_an_error_until_it_is_ignored(value):
    part = {"text": "A", "keep": value}
    for row in (chat(keep=value), {"messages": [Q, A | {"content": [part]}]}):
        message = refusal(row)
        assert message.startswith("`keep` is ") and message.endswith("--ignore keep")
        assert messages_of(row, Reading(ignore=("keep",)))[:2] == [Q, A]


@pytest.mark.parametrize("key, value", [
    ("id", 7), ("hash", 7), ("turn_index", 0), ("turn", 3), ("timestamp", 1.5), ("num_tokens", 9),
    ("token_count", 9), ("temperature", 0.7), ("top_p", 1), ("score", 0.2), ("helpful_rating", 3),
    ("toxic", False), ("redacted", True), ("logprobs", [0.1]), ("createdAt", 17), ("keep", None),
    ("name", "bob"), ("cache_control", {"type": "ephemeral"}), ("annotations", [])])
def test_metadata_of_a_message_is_not_used(key, value):
    assert messages_of(chat(**{key: value})) == [Q, A, R, B]


@pytest.mark.parametrize("key, value", [
    ("quality", "bad"), ("rating", -1), ("feedback", "👎"), ("status", "rejected"),
    ("vote", "down"), ("score_label", "incorrect"), ("thumbs_down", 1)])
def test_feedback_on_a_message_is_an_error_until_it_is_ignored(key, value):
    message = refusal(chat(**{key: value}))
    assert message.startswith(f"`{key}` is {value!r} in a message")
    assert messages_of(chat(**{key: value}), Reading(**flags_in(message))) == [Q, A, R, B]


# ----- feedback on a row -------------------------------------------------------------------------


@pytest.mark.parametrize("key, bad, good", [
    ("label", False, True), ("label", "bad", "good"), ("label", "False", "True"),
    ("Label", "Rejected", "Chosen"), ("kto_tag", False, True), ("kto_tag", 0, 1),
    ("kto_tag", "false", "true"), ("is_correct", False, True), ("correct", 0.0, 1.0),
    ("accepted", False, True), ("thumbs_up", False, True), ("thumbs_down", True, False),
    ("feedback", "negative", "positive"), ("feedback", "👎", "👍"), ("feedback", -1, 1),
    ("chosen", False, True), ("rejected", True, False), ("is_rejected", "true", "false"),
    ("desirable", "no", "yes"), ("passed", False, True), ("verified", False, True),
    ("isGood", False, True), ("wrong", 1, 0), ("keep", False, True), ("discarded", True, False),
    ("rating", "bad", "good"), ("human_rating", "👎", "👍"), ("human_rating", "👎🏽", 5),
    ("preference", "rejected", "chosen"), ("thumb", "down", "up"), ("thumbs", "Thumbs down", ""),
    ("status", "rejected", "accepted"), ("status", "deleted", "active"), ("vote", -1, 1),
    ("review_status", "Failed", "Passed"), ("outcome", "fail", "pass"), ("upvote", False, True),
    ("quality", "low", "high"), ("answer_quality", "not good", "fine"), ("rating", -1, 5),
    ("final_verdict", "incorrect", "correct"), ("unhelpful", True, False), ("vote", "-1", "1"),
    ("annotator_2", "thumbs_down", None),
    ("feedback", {"by": "me", "rating": "bad"}, {"by": "me", "rating": "good"})])
def test_row_marked_as_bad_is_refused_and_both_ways_out_work(jsonl, command, tmp_path, key, bad,
                                                            good):
    rows = [PAIR | {key: bad}, PAIR | {"prompt": "R", key: good}]
    assert messages_of(rows[1])[0] == R  # the good one trains as it is
    message = refusal(rows[0])
    assert message.startswith(f"`{key}` is {bad!r}, which marks a bad answer")
    where = shlex.split(re.search(r"--where (.*), or train", message)[1])
    ignore = shlex.split(re.search(r"--ignore (.*)$", message)[1])
    source = jsonl("a.jsonl", rows)
    for flags, n_kept in ((["--where", *where], 1), (["--ignore", *ignore], 2),
                          (["--on_bad_row", "skip"], 1)):
        result = command(sft_data, "--source", source, "--encoding", "bytes", "--workers", 1,
                         "--val_fraction", 0, "--out", tmp_path / str(flags), *flags)
        assert result.code == 0 and f"{n_kept} kept" in result.out, (flags, result)


@pytest.mark.parametrize("key, value", [
    ("label", 3), ("label", 0), ("label", "sports"), ("label", "negative"), ("label", [0, 1]),
    ("label", None), ("correctness", 0), ("thumbs_down", False), ("rejected", False),
    ("feedback", "short"), ("score", 0), ("score", -1), ("toxic", True), ("redacted", True),
    ("rating", 1), ("stars", 1), ("star_rating", 0), ("vote", 0), ("quality", "medium"),
    ("label", "spam"), ("label", "low"), ("category", "bad"), ("sentiment", "negative"),
    ("input_quality", "poor"), ("question_status", "rejected by"), ("difficulty", "low"),
    ("status", "done"), ("No", 1), ("index", 0), ("helpfulness", 0), ("uninstall", True),
    ("feedback", "Not bad, but not good"), ("outcome", 0.0), ("is_negative", True)])
def test_class_or_score_of_a_row_says_nothing_about_training(key, value):
    assert messages_of(PAIR | {key: value}) == [Q, A]


def test_labels_0_and_1_may_be_feedback_and_need_a_decision(jsonl, command, tmp_path):
    """Three numbers are classes."""
    def run(labels, *flags):
        source = jsonl("a.jsonl", [PAIR | {"label": label} for label in labels])
        return command(sft_data, "--source", source, "--encoding", "bytes", "--workers", 1,
                       "--val_fraction", 0, "--out", tmp_path / f"{labels}{flags}", *flags)

    assert run([0, 1, 2]).code == run([1, 1]).code == run([True, True]).code == 0
    for labels, good in (([1, 0], 1), ([-1, 1], 1), (["0", "1"], 1), ([0.0, 1.0], "1.0")):
        result = run(labels)
        assert result.code == 2 and "`label` is " in result.err
        assert f"--where label={good}" in result.err and "--ignore label" in result.err
        assert "1 kept" in run(labels, "--where", f"label={good}").out
        assert "2 kept" in run(labels, "--ignore", "label").out


# ----- strings that are not used -----------------------------------------------------------------


@pytest.mark.parametrize("row", [PAIR, chat(), {"text": "x"}], ids=["pair", "chat", "text"])
@pytest.mark.parametrize("value", [
    "x" * 65, LONG, ["short", LONG], [["x" * 65]], {"note": LONG}, [{"by": "me", "note": LONG}],
    {"a": {"b": [LONG]}}], ids=str)
def test_string_longer_than_a_label_is_an_error_until_it_is_mapped_or_ignored(row, value):
    message = refusal(row | {"remarks": value})
    assert message.startswith("`remarks` holds text that would be lost: ")
    assert messages_of(row | {"remarks": value}, Reading(ignore=("remarks",))) == messages_of(row)
    if "--columns" in message:
        messages = messages_of(row | {"remarks": value},
                               Reading(columns=flags_in(message)["columns"]))
        assert value in [messages[0]["content"], messages[0].get("input")]
    else:
        assert row == {"text": "x"} or not isinstance(value, str)


def test_long_string_of_a_message_is_an_error_too():
    assert refusal(chat(remark=LONG)).endswith("leave it out with --ignore remark")
    assert messages_of(chat(remark=LIKE_A_LABEL, url="https://x.org/" + "y" * 99)) == [Q, A, R, B]


@pytest.mark.parametrize("key, value", [
    ("remarks", LIKE_A_LABEL), ("remarks", " ".join("abcdefgh")), ("remarks", None),
    ("remarks", "https://example.org/" + "x" * 99), ("source_url", LONG), ("prompt_id", LONG),
    ("title", LONG), ("seed", LONG), ("model", LONG), ("meta", LONG), ("n", 7), ("flag", False),
    ("meta", {"note": LONG}), ("origin", {"url": LONG, "title": LONG, "n": 3, "by": "me"})])
def test_labels_and_known_metadata_of_a_row_are_not_used(key, value):
    assert messages_of(PAIR | {key: value}) == [Q, A]


@pytest.mark.parametrize("text, is_lost", [
    ("### Instruction:\nName the capital of France.\n\n### Response:\nParis", False),  # Alpaca's
    ("Please answer in a word. Name the capital of France. Thank you very much!", False),
    ("Name the capital of France.", False),
    ("The answer is Paris, as everyone knows who has been there once.", True),
    ("One word, please, but in French, and no punctuation at all, thanks.", True)])
def test_string_that_repeats_the_prompt_or_the_answer_is_not_lost(text, is_lost):
    row = {"prompt": "Name the capital of France.", "response": "Paris", "formatted": text}
    if is_lost:
        assert "`formatted` holds text" in refusal(row)
    else:
        assert messages_of(row)[1]["content"] == "Paris"


@pytest.fixture
def prepare(jsonl, command, tmp_path):
    """prepare(rows, "--flag", …) runs sft_data.py; the result also has `left`, the files."""
    def call(rows, *flags):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        result = command(sft_data, "--source", jsonl("a.jsonl", rows), "--encoding", "bytes",
                         "--workers", 1, "--val_fraction", 0, "--out", out, *flags)
        assert (result.code == 0) == out.exists()  # nothing half-written
        return result

    return call


def test_one_error_names_all_keys_of_the_first_rows_and_its_ignore_is_complete(prepare):
    rows = [PAIR, PAIR | {"alpha": LONG}, {"messages": [Q, A | {"gold": True, "b c": LONG}]},
            PAIR | {"cot": "So", "delta": LONG, "alpha": LONG}]
    result = prepare(rows, "--ignore", "delta")
    assert result.code == 2 and result.err.count("\n") == 1
    assert "a.jsonl line 2: `alpha` and 3 more are not used" in result.err
    assert result.err.endswith("with --ignore delta alpha gold 'b c' cot\n")
    ignore = shlex.split(result.err[result.err.index("--ignore") :])
    assert "4 kept, 0 rejected" in prepare(rows, *ignore).out


def test_more_keys_than_fit_in_a_line_are_named_in_turns(prepare):
    rows, flags = [PAIR | {f"a_column_{i}": LONG for i in range(25)}], []
    for _ in range(3):
        result = prepare(rows, *flags)
        if result.code == 0:
            break
        assert "…" not in result.err  # nothing is cut out of the flag
        flags = shlex.split(result.err[result.err.index("--ignore") :])
    assert result.code == 0 and len(flags) == 26


def test_first_rows_are_examined_before_and_later_ones_are_bad_rows(prepare):
    late = [PAIR] * FIRST_ROWS + [PAIR | {"alpha": LONG}, {"messages": [Q, A | {"gold": True}]}]
    result = prepare(late)
    assert f"a.jsonl line {FIRST_ROWS + 1}: `alpha` holds text" in result.err
    assert f"{FIRST_ROWS} kept, 2 rejected" in prepare(late, "--on_bad_row", "skip").out.replace(
        ",0", "0", 2)
    result = prepare(late[2:], "--on_bad_row", "skip")  # now they are among the first
    assert result.code == 2 and result.err.endswith("leave them out with --ignore alpha gold\n")
    few = [PAIR, PAIR | {"cot": "So"}]  # a name that usually holds text: only this row is bad
    assert "1 kept, 1 rejected" in prepare(few, "--on_bad_row", "skip").out


def test_rows_are_examined_as_a_stream():
    def rows():
        for i in range(3 * FIRST_ROWS):
            read.append(i)
            yield f"row {i}", PAIR

    read, stream = [], examined(rows(), Reading())
    assert next(stream) == ("row 0", PAIR) and len(read) == FIRST_ROWS
    assert len(list(stream)) == 3 * FIRST_ROWS - 1


def test_evaluation_refuses_the_same_rows(jsonl, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_model("model")
    for key, value in (("alpha", LONG), ("label", False), ("loss_mask", [0, 1])):
        flags = ["--model", "model", "--device", "cpu", "--max_new_tokens", 1, "--data",
                 jsonl("a.jsonl", [PAIR, PAIR | {key: value}])]
        result = command(evaluate, *flags)
        assert result.code == 2 and f"a.jsonl line 2: `{key}` " in result.err
        assert command(evaluate, *flags, "--ignore", key).code == 0


# ----- rows of public datasets, which load without flags -----------------------------------------

TEXT = "Write a short story about a robot that learns how to paint the sea in the winter."
ANSWER = "The robot looked at the grey waves for a long time, and then it began to paint."
TURNS = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": ANSWER}]
SHAREGPT = [{"from": "human", "value": TEXT}, {"from": "gpt", "value": ANSWER}]
HEADER = {"accept-language": "en-US,en;q=0.9", "user-agent": "Mozilla/5.0 (X11; Linux) " + "x" * 70}
WILDCHAT = {"country": "United States", "hashed_ip": "f" * 64, "header": HEADER, "toxic": False,
            "redacted": False, "state": "Texas", "timestamp": None, "language": "English",
            "turn_identifier": 100001}
MODERATION = {"categories": {"hate": False}, "category_scores": {"hate": 1e-5}, "flagged": False}
PUBLIC = {
    "tatsu-lab/alpaca": {
        "instruction": TEXT, "input": "", "output": ANSWER,
        "text": f"Below is an instruction.\n\n### Instruction:\n{TEXT}\n\n### Response:\n{ANSWER}"},
    "databricks/databricks-dolly-15k": {
        "instruction": TEXT, "context": "", "response": ANSWER, "category": "creative_writing"},
    "Open-Orca/OpenOrca": {
        "id": "flan.564327", "system_prompt": "", "question": TEXT, "response": ANSWER},
    "Open-Orca/SlimOrca": {"conversations": [
        SHAREGPT[0] | {"weight": 0.0}, SHAREGPT[1] | {"weight": 1.0}]},
    "allenai/tulu-3-sft-mixture": {
        "id": "oasst1_4", "messages": TURNS, "source": "ai2-adapt-dev/oasst1_converted"},
    "allenai/tulu-v2-sft-mixture": {"dataset": "lima", "id": "lima_0", "messages": TURNS},
    "lmsys/lmsys-chat-1m": {
        "conversation_id": "33f7", "model": "vicuna-13b", "conversation": TURNS, "turn": 1,
        "language": "English", "openai_moderation": [MODERATION] * 2, "redacted": False},
    "allenai/WildChat": {
        "conversation_hash": "e" * 32, "model": "gpt-4", "timestamp": None, "turn": 1,
        "conversation": [turn | WILDCHAT for turn in TURNS], "language": "English",
        "openai_moderation": [MODERATION], "detoxify_moderation": [{"toxicity": 0.1}],
        "toxic": True, "redacted": False, "state": "Texas", "country": "United States",
        "hashed_ip": "f" * 64, "header": HEADER},
    "teknium/OpenHermes-2.5": {
        "custom_instruction": None, "topic": None, "model_name": None, "model": None,
        "skip_prompt_formatting": False, "category": "orca", "views": 12, "language": None,
        "conversations": [turn | {"weight": None} for turn in SHAREGPT], "id": None,
        "title": "How a robot learned to paint the sea in a very cold winter", "idx": None,
        "hash": 7, "avatarUrl": "https://example.org/" + "a" * 80, "system_prompt": None,
        "source": "airoboros2.2"},
    "Magpie-Align/Magpie-Pro-300K-Filtered": {
        "conversation_id": "c", "instruction": TEXT, "response": ANSWER, "conversations": SHAREGPT,
        "gen_input_configs": {"temperature": 1.0, "input_generator": "Llama-3-70B", "seed": None},
        "intent": f"The user wants a story: {LONG}", "knowledge": f"To write it, one needs {LONG}",
        "difficulty": "easy", "difficulty_generator": "Llama-3-8B", "input_quality": "poor",
        "quality_explanation": f"The request is vague, as {LONG}", "quality_generator": "Llama",
        "task_category": "Creative writing", "other_task_category": ["Role playing"],
        "task_category_generator": "Llama-3-8B", "llama_guard_2": "safe", "instruct_reward": -7.5,
        "reward_model": "sfairXC/FsfairX-LLaMA3-RM-v0.1", "min_neighbor_distance": 0.1,
        "repeat_count": 0, "min_similar_uuid": "u" * 36, "response_length": 99, "language": "EN"},
    "meta-math/MetaMathQA": {
        "type": "MATH_Rephrased", "query": TEXT, "response": ANSWER,
        "original_question": f"What would a robot paint if {LONG}?"},
    "HuggingFaceH4/ultrachat_200k": {"prompt": TEXT, "prompt_id": "p" * 64, "messages": TURNS},
    "HuggingFaceH4/no_robots": {
        "prompt": TEXT, "prompt_id": "p" * 64, "category": "Generation", "messages": TURNS},
    "ise-uiuc/Magicoder-OSS-Instruct-75K": {
        "lang": "python", "raw_index": 3, "index": 7, "openai_fingerprint": "fp_eeff13170a",
        "seed": f"def paint():\n    return {LONG!r}", "problem": TEXT, "solution": ANSWER},
    "openai/gsm8k": {"question": TEXT, "answer": ANSWER},
    "LDJnr/Capybara": {"source": "Airoboros", "conversation": [{"input": TEXT, "output": ANSWER}]},
    "THUDM/AgentInstruct": {"id": "os_0", "conversations": [
        SHAREGPT[0] | {"loss": None}, SHAREGPT[1] | {"loss": True}]},
}


@pytest.mark.parametrize("name", PUBLIC)
def test_row_of_a_public_dataset_is_read_without_flags(bytes_encoding, name):
    messages = messages_of(PUBLIC[name])
    assert [turn["content"] for turn in messages] == [TEXT, ANSWER]
    assert sum(render(bytes_encoding, messages)[1]) == 100 * (len(ANSWER) + 1)


def test_filter_that_asks_for_a_mark_decides_that_its_answers_are_trained():
    row = {"question": "q", "answer": "a", "rating": "bad"}
    with pytest.raises(UserError, match="rating!=bad"):
        messages_of(row)
    assert messages_of(row, Reading(where=("rating=bad",)))[1]["content"] == "a"
    with pytest.raises(UserError, match="`rating` is 'bad'"):
        messages_of(row, Reading(where=("rating!=good",)))


@pytest.mark.parametrize("system", [2, True, [0, 1], {"weight": 1}])
def test_system_column_that_is_no_text_is_refused(system):
    with pytest.raises(UserError, match=r"`system` is .*, not a string"):
        messages_of({"question": "q", "answer": "a", "system": system})
