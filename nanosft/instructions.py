"""What a dataset says about training a row, a turn, or a part of one: a weight, or refused by name.

data/README.md says which trainer uses which key. Keys are read word by word: `lossWeight` is the
words loss and weight.
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

TRAIN = names("train trained trainable training loss learn supervised supervise")
ALONE = names("ignore ignored skip skipped exclude excluded masked frozen untrained")
NOT = names("no not dont never without") | ALONE  # with a word of TRAIN: no_loss
FILLERS = names("is do does should use used has with in on from for to this the turn message "
                "compute calculate include included output")
SPECIAL = {"loss_mask": "trained",  # verl: 1 is trained
           "mask_loss": "untrained", "context_only": "untrained", "loss_scale": "weight"}
OTHERS = TRAIN | names(  # token masks, character spans, …
    "mask masks weights weighting weighted span spans unlearn supervision grad gradient")
LABELS = names("id ids idx index hash url date time timestamp attention")  # train_id is an id
NOT_ANSWERS = names("system user human prompter prompt input instruction")  # NeMo: "mask": "User"

BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, 1: True,
            "false": False, "no": False, "off": False, "0": False, 0: False}
SKIPS = BOOLEANS | dict.fromkeys(("mask", "masked", "ignore", "skip", "context", "never"), False)


@functools.lru_cache(maxsize=4096)
def plain(key: str) -> str:
    """A key in snake case.

    >>> plain("lossWeight"), plain("Loss-Mask")
    ('loss_weight', 'loss_mask')
    """
    return re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)).strip("_").lower()


@functools.lru_cache(maxsize=4096)
def kind_of(key: str) -> str | None:
    """How a key speaks of training: true is `trained` or `untrained`; `weight`; `other`.

    >>> [kind_of(key) for key in ("train_on_turn", "no_loss", "loss_weight", "token_mask", "id")]
    ['trained', 'untrained', 'weight', 'other', None]
    """
    name = plain(key)
    words = set(name.split("_")) - FILLERS
    if name in SPECIAL or name.split("_")[-1] == "weight":
        return SPECIAL.get(name, "weight")
    if len(words & NOT) == 1 and words - NOT <= TRAIN and (words & TRAIN or words <= ALONE):
        return "untrained"
    if words and words <= TRAIN:
        return "trained"
    return "other" if words & OTHERS and not words & LABELS else None


def word(value):
    """A value as a key of the tables above; lists and objects are none."""
    if isinstance(value, str):
        return value.strip().lower()
    return value if isinstance(value, int | float) else None


def is_number(value) -> bool:
    """A boolean, a number, or a list that holds one."""
    if isinstance(value, list | tuple):
        return any(is_number(v) for item in value
                   for v in (item.values() if isinstance(item, dict) else [item]))
    return isinstance(value, int | float)


def says_what_to_train(key: str, value) -> bool:
    kind = kind_of(key)
    if kind is None or value in ("", [], {}):
        return False
    if plain(key) == "mask":
        return word(value) not in NOT_ANSWERS
    return kind != "other" or is_number(value) or word(value) in SKIPS


def weight_of(key: str, value) -> float | None:
    """The weight that a key gives; None: it says nothing. UserError if no weight can say it."""
    kind = kind_of(key)
    if kind == "weight":
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(f"{key} {show(value)} is not a number from 0 to 1")
        return float(value)
    flag = (SKIPS if kind == "trained" else BOOLEANS).get(word(value))
    if kind == "other" or flag is None:
        raise UserError(f"`{key}` is {show(value)}, which may say what to train but cannot be read "
                        "as the weight of an answer (`weight`, 0 to 1, can)")
    return float(flag) if kind == "trained" else 0.0 if flag else None


def take_weight(keys: dict, where: str, role: str, reading, used: Iterable = ()) -> float | None:
    """What the keys of a row, message, or part say about training it, as one weight, if anything.

    They are taken from `keys`, but for `used` ones. reading: the flags, a forms.Reading.
    """
    weights, shown = {}, {}
    for key in [key for key in keys if key not in used and says_what_to_train(key, keys[key])]:
        shown[key] = f"{key} {show(keys[key])}"
        try:
            weights[key] = weight_of(key, keys.pop(key))
        except UserError as error:
            raise UserError(f"{where}{error}; leave it out: {reading.ignoring(key)}") from error
    weights = {key: weight for key, weight in weights.items() if weight is not None}
    numbers = {weight for key, weight in weights.items() if kind_of(key) == "weight"}
    if len(numbers) > 1 or (0 in weights.values() and any(weights.values())):
        raise UserError(f"{where}{' and '.join(map(shown.get, weights))} contradict each other; "
                        f"leave out all but one, as with {reading.ignoring(*[*weights][1:])}")
    for key, weight in weights.items():
        if weight and role != "assistant":
            raise UserError(f"{where}{shown[key]} on a {role} message; only assistant messages are "
                            "trained; leave the key out there, or everywhere: "
                            f"{reading.ignoring(key)}")
    return min(weights.values(), default=None)


def hidden_instruction(value) -> str | None:
    """The key of an object, such as `metadata`, that says not to train, or not fully."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        fully = word(inner) in ((False, 0) if kind_of(key) == "untrained" else (True, 1))
        if kind_of(key) != "other" and says_what_to_train(key, inner) and not fully:
            return key
    return None


def show(value, limit: int = 80) -> str:
    """A value of a row for an error: at most `limit` characters, control characters escaped."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ----- feedback on a row -------------------------------------------------------------------------

GOOD = names(  # columns in which true is good, also with is_ before the name
    "label kto_tag correct correctness accepted acceptable thumbs thumbs_up thumb_up feedback "
    "human_feedback user_feedback human_label desirable chosen preferred good good_answer passed "
    "pass verified valid approved success successful helpful liked like upvoted ok resolved "
    "verdict judgment judgement keep kept use usable include included selected enabled active")
BAD = names(  # columns in which true is bad
    "bad rejected thumbs_down thumb_down disliked dislike downvoted undesirable incorrect wrong "
    "failed unhelpful invalid hallucination hallucinated deleted discard discarded drop dropped "
    "removed filtered spam")
SCORES = names("label correctness helpful")  # in which a number is a class or a score
OPPOSITES = dict(pair.split("/") for pair in names(  # what says bad / good
    "false/true no/yes bad/good rejected/chosen reject/accept undesirable/desirable poor/good "
    "incorrect/correct wrong/right failed/passed fail/pass thumbs_down/thumbs_up down/up 👎/👍 "
    "dislike/like disliked/liked invalid/valid unhelpful/helpful negative/positive 0/1 -1/1"))


def check_feedback(columns: dict, used: Iterable, reading) -> None:
    """UserError for a row that a column marks as a bad answer, with the flags that decide."""
    for key in columns.keys() - set(used):
        good = opposite_of_bad(plain(key).removeprefix("is_"), columns[key])
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
    if isinstance(value, int | float):
        return json.dumps(type(value)(1)) if value in (0, -1) and name not in SCORES else None
    good = OPPOSITES.get(word(value))
    return good.title() if good and value.istitle() else good


# ----- what says nothing about training, and is no text for the model ----------------------------

TITLES = names(  # keys with these last words may hold long strings
    "id ids uid uuid hash md5 sha256 digest fingerprint url urls uri link links model models "
    "generator engine seed title path file filename license citation author authors date "
    "timestamp ip header headers user_agent avatar meta metadata config configs tags keywords "
    "original_question quality_explanation intent")  # the last three: MetaMathQA, Magpie
FACTS = TITLES | names(  # keys of messages with these last words may hold booleans and numbers
    "identifier index idx indices position number turn turns round step depth level line page "
    "offset time datetime year created updated modified at ms seconds duration latency count "
    "counts counter length len size tokens chars words temperature top_p top_k score scores rating "
    "ratings rank votes upvotes downvotes likes views stars reward rewards logprob logprobs prob "
    "probability confidence perplexity ppl similarity distance cost price lang language languages "
    "country state city toxic toxicity redacted moderation flagged nsfw pii usage version")
MAGPIE = names("intent knowledge difficulty")  # its `knowledge` names what a prompt asks for


def says_nothing(key: str, known: frozenset[str]) -> bool:
    """Whether a key, its last word, or its first one (`num_turns`) is known metadata.

    >>> says_nothing("conversation_hash", FACTS), says_nothing("keep", FACTS)
    (True, False)
    """
    name = plain(key)
    return name in known or name.rpartition("_")[2] in known or name.startswith("num_")
