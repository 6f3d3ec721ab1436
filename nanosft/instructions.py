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


@functools.lru_cache(maxsize=4096)
def plain(key: str) -> str:
    """A key in snake case.

    >>> plain("lossWeight"), plain("Loss-Mask")
    ('loss_weight', 'loss_mask')
    """
    return re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)).strip("_").lower()


def word(value):
    """A value as a key of the tables below; None: it is no boolean, number, or short string.

    >>> word(False), word(" -0.5 "), word("Thumbs-down!"), word([])
    (False, -0.5, 'thumbs_down', None)
    """
    if not isinstance(value, str) or len(value) > 24:
        return value if isinstance(value, int | float) else None
    text = value.strip(" \t\r\n.!\ufe0f🏻🏼🏽🏾🏿").lower()  # without the shade of an emoji
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", text):
        return float(text)
    return text.replace(" ", "_").replace("-", "_")


def show(value, limit: int = 80) -> str:
    """A value of a row for an error: at most `limit` characters, control characters escaped."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


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

BOOLEANS = dict.fromkeys(("true", "yes", "on", 1), True)
BOOLEANS |= dict.fromkeys(("false", "no", "off", 0), False)
SKIPS = BOOLEANS | dict.fromkeys(("mask", "masked", "ignore", "skip", "context", "never"), False)


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
    kind, said = kind_of(key), word(value)
    if kind == "weight":
        said = BOOLEANS.get(said, said)
        if not isinstance(said, int | float) or not 0 <= said <= 1:
            raise UserError(f"{key} {show(value)} is not a number from 0 to 1")
        return float(said)
    flag = (SKIPS if kind == "trained" else BOOLEANS).get(said)
    if kind == "other" or flag is None:
        raise UserError(f"`{key}` is {show(value)}, which may say what to train but cannot be read "
                        "as the weight of an answer (`weight`, 0 to 1, can)")
    return float(flag) if kind == "trained" else 0.0 if flag else None


def take_weight(keys: dict, where: str, role: str, reading, used: Iterable = ()) -> float | None:
    """What the keys of a row, message, or part say about training it, as one weight, if anything.

    They are taken from `keys`, but for `used` ones. reading: the flags, a forms.Reading.
    """
    said = {key: keys.pop(key) for key in [*keys]
            if key not in used and says_what_to_train(key, keys[key])}
    weights = {}
    for key, value in said.items():
        try:
            weight = weight_of(key, value)
        except UserError as error:
            raise UserError(f"{where}{error}; leave it out: {reading.ignoring(key)}") from error
        if weight and role != "assistant":
            raise UserError(f"{where}{key} {show(value)} on a {role} message; only answers are "
                            f"trained; leave it out there: {reading.ignoring(f'{role}.{key}')}")
        if weight is not None:
            weights[key] = weight
    numbers = {weight for key, weight in weights.items() if kind_of(key) == "weight"}
    if len(numbers) > 1 or (0 in weights.values() and any(weights.values())):
        shown = " and ".join(f"{key} {show(said[key], 20)}" for key in weights)
        raise UserError(f"{where}{shown} contradict each other; leave out all but one, as with "
                        f"{reading.ignoring(*[*weights][1:])}")
    return min(weights.values(), default=None)


def hidden_instruction(value) -> str | None:
    """The key of an object, such as `metadata`, that says not to train, or not fully."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        fully = word(inner) in ((False, 0) if kind_of(key) == "untrained" else (True, 1))
        if kind_of(key) != "other" and says_what_to_train(key, inner) and not fully:
            return key
    return None


# ----- feedback on an answer ---------------------------------------------------------------------

# Words of a verdict: as a value, or as a column of true and false.
GOOD = names(
    "accept accepted acceptable accurate approve approved chosen correct desirable desired enabled "
    "good good_answer great helpful include included keep kept kto_label kto_tag like liked ok "
    "pass passed preferred right selected success successful thumbs_up thumb_up upvote upvoted "
    "usable use useful valid verified active resolved")
BAD = names(
    "bad bad_answer deleted discard discarded downvote downvoted drop dropped fail failed failure "
    "filtered hallucinated hallucination reject rejected removed spam thumbs_down thumb_down wrong "
    "👎 ❌")
NEGATIONS = ("not_", "no_", "non_", "un", "in", "dis")  # before a word of GOOD: incorrect
BAD_VALUES = names("down false low negative no poor")  # in MARKS and columns of GOOD
EVERYWHERE = names("rejected downvoted disliked undesirable thumbs_down thumb_down 👎")
# Columns of a verdict. Of these, a number but -1 says nothing: it counts, or is a score or a class.
MARKS = names(
    "label feedback rating vote thumb thumbs preference status outcome result quality verdict "
    "judge judgment judgement grade evaluation assessment decision reaction annotation correctness "
    "helpful helpfulness like upvote useful tag")
CLASSES = names("down low negative spam")  # no feedback as the value of a `label`
ABOUT_PROMPT = names("input prompt question query instruction problem sentiment")


def is_bad(text: str) -> bool:
    return text in BAD or any(text.removeprefix(no) in GOOD for no in NEGATIONS if
                              text.startswith(no))


@functools.lru_cache(maxsize=4096)
def verdict_in(key: str) -> str | None:
    """What a column says of an answer: true is `good` or `bad`; `mark`; `label`, perhaps a class.

    >>> [verdict_in(key) for key in ("is_correct", "unhelpful", "human_rating", "input_quality")]
    ['good', 'bad', 'mark', None]
    """
    words = plain(key).split("_")
    ends = {"_".join(words[i:]) for i in range(len(words))}
    if ABOUT_PROMPT & {*words}:
        return None
    if any(map(is_bad, ends)):
        return "bad"
    if ends & GOOD - MARKS:
        return "good"
    return "label" if "label" in ends else "mark" if ends & MARKS else None


def marks_bad_answer(key: str, value) -> bool:
    """
    >>> marks_bad_answer("is_correct", 0), marks_bad_answer("label", 0)
    (True, False)
    """
    verdict = verdict_in(key)
    if verdict is None:
        return isinstance(value, str) and value.lower() in EVERYWHERE
    if isinstance(value, dict):  # {"rating": "bad"}
        return any(marks_bad_answer(inner, said) for inner, said in value.items())
    said = word(value)
    if verdict == "bad":
        return BOOLEANS.get(said) is True
    if isinstance(said, str):
        return (is_bad(said) or said in BAD_VALUES) and (verdict != "label" or said not in CLASSES)
    return said is False or (said == -1 and verdict != "label") or (said == 0 and verdict == "good")


def check_feedback(columns: dict, decided: set[str], reading) -> None:
    """UserError for a row that a column marks as a bad answer, with the flags that decide."""
    for key, value in columns.items():
        if key not in decided and marks_bad_answer(key, value):
            bad = value if isinstance(value, str) else json.dumps(value)
            raise UserError(f"`{key}` is {show(value)}, which marks a bad answer; leave out such "
                            f"rows: --where {shlex.quote(f'{key}!={bad}')}, or train on them: "
                            f"{reading.ignoring(key)}")


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


@functools.lru_cache(maxsize=4096)
def says_nothing(key: str, known: frozenset[str]) -> bool:
    """Whether a key, its last word, or its first one (`num_turns`) is known metadata.

    >>> says_nothing("conversation_hash", FACTS), says_nothing("keep", FACTS)
    (True, False)
    """
    name = plain(key)
    return name in known or name.rpartition("_")[2] in known or name.startswith("num_")
