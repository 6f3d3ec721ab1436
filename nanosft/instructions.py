"""What a dataset says about training a row, a turn, or a part of one: a weight, or refused by name.

data/README.md says which trainer uses which key. Keys are compared in snake case: lossWeight is
loss_weight.
"""

import functools
import json
import re
import shlex
from collections.abc import Iterable

from nanosft.errors import UserError


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# ----- keys that say what is trained -------------------------------------------------------------

TRAINED = names(  # true: in the loss; false: context only
    "train trainable is_trainable training train_on train_on_turn do_train should_train loss "
    "compute_loss calculate_loss use_loss with_loss has_loss output_with_loss in_loss "
    "include_in_loss loss_mask learn supervised supervise")
UNTRAINED = names(  # true: context only; false says nothing
    "masked is_masked loss_masked mask_loss no_loss ignore_loss skip_loss ignore ignored skip "
    "skipped skip_training skip_train no_train no_training not_train dont_train do_not_train "
    "untrained exclude excluded exclude_from_loss exclude_from_training context_only frozen")
WEIGHTS = names(  # from 0 to 1
    "weight loss_weight loss_scale sample_weight example_weight row_weight train_weight "
    "training_weight turn_weight message_weight")
KNOWN = TRAINED | UNTRAINED | WEIGHTS | {"mask"}  # `mask` may mean either, so it is refused
OTHERS = re.compile(  # token masks, character spans, and names that nobody has told us of
    "(?:^|_)(?:train|trained|trainable|training|loss|masks?|masked|weights?|spans?|supervised)"
    "(?:_(?!(?:ids?|idx|index|hash|url|date|time|timestamp)$)|$)")
NOT_ANSWERS = names("system user human prompter prompt input instruction")  # NeMo: "mask": "User"

BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, 1: True,
            "false": False, "no": False, "off": False, "0": False, 0: False}
WORDS = BOOLEANS | dict.fromkeys(("mask", "masked", "ignore", "skip", "context", "never"), False)


@functools.lru_cache(maxsize=4096)
def plain(key: str) -> str:
    """A key in snake case.

    >>> plain("lossWeight"), plain("Loss-Mask")
    ('loss_weight', 'loss_mask')
    """
    return re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)).strip("_").lower()


def word(value):
    """A value as a key of the tables above; lists and objects are none."""
    if isinstance(value, str):
        return value.strip().lower()
    return value if isinstance(value, int | float) else None


def is_instruction(key: str, value) -> bool:
    """Whether this may say what is trained; an empty value says nothing."""
    name = plain(key)
    if name in KNOWN:
        return value not in ("", [], {}) and not (name == "mask" and word(value) in NOT_ANSWERS)
    return OTHERS.search(name) is not None and (is_number(value) or word(value) in WORDS)


def is_number(value) -> bool:
    """A boolean, a number, or a list that holds one, however deep."""
    if isinstance(value, list | tuple):
        return any(is_number(v) for item in value
                   for v in (item.values() if isinstance(item, dict) else [item]))
    return isinstance(value, int | float)


def weight_of(key: str, value) -> float | None:
    """The weight that a key gives; None: it says nothing. UserError if no weight can say it."""
    name, given = plain(key), word(value)
    if name in WEIGHTS:
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(f"{key} {show(value)} is not a number from 0 to 1")
        return float(value)
    flag = (WORDS if name in TRAINED else BOOLEANS).get(given)
    if name in TRAINED and flag is not None:
        return float(flag)
    if name in UNTRAINED and flag is not None:
        return 0.0 if flag else None
    raise UserError(f"`{key}` is {show(value)}, which may say what to train but cannot be read as "
                    "the weight of an answer (`weight`, 0 to 1, can)")


def take_weight(keys: dict, where: str, role: str, reading, used: Iterable = ()) -> float | None:
    """What the keys of a row, message, or part say about training it, as one weight, if anything.

    They are taken from `keys`, but for `used` ones. reading: the flags, a forms.Reading.
    """
    found = {key: keys[key] for key in keys if key not in used and is_instruction(key, keys[key])}
    weights = {}
    for key in found:
        try:
            weights[key] = weight_of(key, keys.pop(key))
        except UserError as error:
            raise UserError(f"{where}{error}; leave it out: {reading.ignoring(key)}") from error
    weights = {key: weight for key, weight in weights.items() if weight is not None}
    numbers = {weight for key, weight in weights.items() if plain(key) in WEIGHTS}
    if len(numbers) > 1 or (0 in weights.values() and any(weights.values())):
        both = " and ".join(f"`{key}` {show(found[key])}" for key in weights)
        raise UserError(f"{where}{both} contradict each other; leave out all but one, as with "
                        f"{reading.ignoring(*[*weights][1:])}")
    for key, weight in weights.items():
        if weight and role != "assistant":
            raise UserError(f"{where}{key} {show(found[key])} on a {role} message; only assistant "
                            "messages are trained; leave the key out there, or everywhere: "
                            f"{reading.ignoring(key)}")
    return min(weights.values(), default=None)


def hidden_instruction(value) -> str | None:
    """The key of an object, such as `metadata`, that says not to train, or not fully."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if plain(key) in KNOWN and is_instruction(key, inner):
            try:
                said = weight_of(key, inner)
            except UserError:
                return key
            if said not in (None, 1):
                return key
    return None


def show(value, limit: int = 80) -> str:
    """A value of a row for an error: at most `limit` characters, control characters escaped."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ----- feedback on a row -------------------------------------------------------------------------

GOOD = names(  # columns in which true is good
    "label kto_tag kto_label is_correct correct correctness accepted is_accepted acceptable thumbs "
    "thumbs_up thumb_up feedback human_feedback user_feedback human_label desirable is_desirable "
    "chosen is_chosen preferred is_preferred good is_good good_answer passed is_passed pass "
    "verified is_verified valid is_valid approved is_approved success is_success successful "
    "helpful is_helpful liked like upvoted ok is_ok resolved verdict judgment judgement")
BAD = names(  # columns in which true is bad
    "bad is_bad rejected is_rejected thumbs_down thumb_down disliked dislike downvoted undesirable "
    "is_undesirable incorrect is_incorrect wrong is_wrong failed is_failed unhelpful invalid "
    "is_invalid hallucination hallucinated is_hallucination deleted is_deleted")
SCORES = names("label correctness helpful")  # in which a number is a class or a score
OPPOSITES = {  # of what says bad
    "false": "true", "no": "yes", "bad": "good", "rejected": "chosen", "reject": "accept",
    "undesirable": "desirable", "incorrect": "correct", "wrong": "right", "failed": "passed",
    "fail": "pass", "thumbs_down": "thumbs_up", "thumbs down": "thumbs up", "down": "up",
    "👎": "👍", "dislike": "like", "disliked": "liked", "invalid": "valid", "poor": "good",
    "unhelpful": "helpful", "unacceptable": "acceptable", "negative": "positive", "0": "1",
    "-1": "1"}


def check_feedback(columns: dict, used: Iterable, reading) -> None:
    """UserError for a row that a column marks as a bad answer, with the flags that decide."""
    for key in columns.keys() - set(used):
        good = opposite_of_bad(plain(key), columns[key])
        if good is not None:
            raise UserError(f"`{key}` is {show(columns[key])}, which marks a bad answer; keep only "
                            f"the good ones: --where {shlex.quote(f'{key}={good}')}, or train on "
                            f"all of them: {reading.ignoring(key)}")


def opposite_of_bad(name: str, value) -> str | None:
    """What --where takes for the good rows if this value of a column says bad.

    >>> opposite_of_bad("label", False), opposite_of_bad("label", 3)
    ('true', None)
    """
    if isinstance(value, bool):
        return json.dumps(not value) if name in (BAD if value else GOOD) else None
    if name in BAD:
        return {"true": "false", "yes": "no", "1": "0"}.get(str(value).lower())
    if name not in GOOD or (name in SCORES and str(value).lower() in ("0", "-1", "negative")):
        return None
    if isinstance(value, int | float) and value in (0, -1):
        return json.dumps(type(value)(1))
    good = OPPOSITES.get(word(value)) if isinstance(value, str) else None
    return good.title() if good and value.istitle() else good


# ----- what says nothing about training, and is no text for the model ----------------------------

FACTS = names(  # keys of messages with these last words may hold booleans and numbers
    "id ids uid uuid guid identifier hash md5 sha sha1 sha256 digest fingerprint url urls uri link "
    "index idx indices position number num turn turns round step depth level line page offset "
    "timestamp time date datetime year created updated modified at ms seconds "
    "duration latency count counts counter length len size tokens chars words temperature top_p "
    "top_k seed score scores rating ratings rank votes upvotes downvotes likes views stars reward "
    "rewards logprob logprobs prob probability confidence perplexity ppl similarity distance cost "
    "price lang language languages country state city ip toxic toxicity redacted moderation "
    "flagged nsfw pii model usage version")
TITLES = names(  # columns with these last words may hold long strings
    "id ids uid uuid hash md5 sha256 digest fingerprint url urls uri link links model models "
    "generator engine seed title path file filename filepath license citation author authors date "
    "timestamp ip header headers user_agent avatar meta metadata config configs tags keywords "
    "original_question quality_explanation intent")  # the last three: MetaMathQA, Magpie
MAGPIE = names("intent knowledge difficulty")  # its `knowledge` names what a prompt asks for


def says_nothing(key: str, known: frozenset[str]) -> bool:
    """Whether a key, its last word, or its first one (`num_turns`) is known metadata.

    >>> says_nothing("conversation_hash", FACTS), says_nothing("keep", FACTS)
    (True, False)
    """
    name = plain(key)
    return name in known or name.rpartition("_")[2] in known or name.startswith("num_")
