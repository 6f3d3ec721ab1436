"""What a dataset says about training a row, a turn, or a part of one: a weight, or refused by name.

data/README.md says which trainer uses which key. Keys are read word by word: `lossWeight` is the
words loss and weight.
"""

import functools
import json
import re
import shlex

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


def word(value) -> str | float | None:
    """A value as a key of the tables below; None: it is no boolean, number, or short string.

    >>> word(False), word(" -0.5 "), word("Thumbs-down!"), word([])
    ('false', -0.5, 'thumbs_down', None)
    """
    if isinstance(value, bool):
        value = str(value)
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
           "mask_loss": "untrained", "context_only": "untrained", "loss_scale": "weight",
           "mask": "role"}  # NeMo: "mask": "User"
OTHERS = TRAIN | names(  # token masks, character spans, …
    "mask masks weights weighting weighted span spans unlearn supervision grad gradient")
LABELS = names("id ids idx index hash url date time timestamp attention")  # train_id is an id

TRUE, FALSE = names("true yes on") | {1}, names("false no off") | {0}
SKIP = names("mask masked ignore skip context never")
WEIGHTS = {  # what a key says: {its value: the weight of an answer; None: nothing is said}
    "weight": dict.fromkeys(TRUE, 1.0) | dict.fromkeys(FALSE, 0.0),  # and all numbers in between
    "trained": dict.fromkeys(TRUE, 1.0) | dict.fromkeys(FALSE | SKIP, 0.0),
    "untrained": dict.fromkeys(TRUE, 0.0) | dict.fromkeys(FALSE, None),
    "role": dict.fromkeys(names("system user human prompter prompt input instruction")),
    "other": {}}


@functools.lru_cache(maxsize=4096)
def kind_of(key: str) -> str | None:
    """How a key speaks of training: its values in WEIGHTS, if it does.

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
    return kind != "other" or is_number(value) or word(value) in WEIGHTS["trained"]


def weight_of(key: str, value) -> float | None:
    """The weight that a key gives, -1 if no weight can say it; None: it says nothing."""
    said = word(value)
    if kind_of(key) == "weight" and isinstance(said, int | float):
        return float(said) if 0 <= said <= 1 else -1
    return WEIGHTS[kind_of(key)].get(said, -1)


def take_weight(keys: dict, role: str, reading) -> float | None:
    """What the keys of a row, message, or part say about training it, as one weight, if anything.

    They are taken from `keys`. reading: the flags, a forms.Reading.
    """
    said = {key: keys.pop(key) for key in [*keys]
            if key not in reading.ignore and says_what_to_train(key, keys[key])}
    weights = {}
    for key, value in said.items():
        weight = weight_of(key, value)
        if weight == -1 or (role == "text" and weight not in (None, 1)):
            what = "the weight of an answer is a number from 0 to 1"
            if role == "text":
                what = "a {text} row is trained whole or not at all"
            raise UserError(f"`{key}` is {show(value)}, which may say what to train, but {what}; "
                            f"leave it out: {reading.ignoring(key)}")
        if weight and role not in ("assistant", "text"):
            raise UserError(f"{key} {show(value)} on a {role} message; only answers are trained; "
                            f"leave it out there: {reading.ignoring(f'{role}.{key}')}")
        if weight is not None:
            weights[key] = weight
    lowest, *others = sorted({*weights.values()}) or [None]
    if others and (lowest == 0 or others != [1]):
        shown = " and ".join(f"{key} {show(said[key], 20)}" for key in weights)
        raise UserError(f"{shown} contradict each other; leave out all but one, as with "
                        f"{reading.ignoring(*[*weights][1:])}")
    return lowest


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
BAD |= {no + word for no in ("not_", "no_", "non_", "un", "in", "dis") for word in GOOD}
UNHAPPY = names("down false low negative no poor")  # bad as well
CLASSES = names("down low negative spam")  # no feedback as the value of a `label`
# Of columns of a verdict, a number but -1 says nothing: it counts, or is a score or a class.
MARKS = names(
    "label feedback rating vote thumb thumbs preference status outcome result quality verdict "
    "judge judgment judgement grade evaluation assessment decision reaction annotation correctness "
    "helpful helpfulness like upvote useful tag")
ABOUT_PROMPT = names("input prompt question query instruction problem sentiment")
SAYS_BAD = {  # what a column says of an answer: its values that say bad
    "bad": TRUE, "good": BAD | UNHAPPY | {0, -1}, "mark": BAD | UNHAPPY | {-1},
    "label": (BAD | UNHAPPY) - CLASSES,
    None: names("rejected downvoted disliked undesirable thumbs_down thumb_down 👎")}


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
    if ends & BAD:
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
    if isinstance(value, dict):  # {"rating": "bad"}
        return verdict is not None and any(marks_bad_answer(*item) for item in value.items())
    return word(value) in SAYS_BAD[verdict]


def check_feedback(columns: dict, reading) -> None:
    """UserError for a row that a column marks as a bad answer, with the flags that decide."""
    for key, value in columns.items():
        if key not in reading.decided and marks_bad_answer(key, value):
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


@functools.lru_cache(maxsize=4096)
def says_nothing(key: str, known: frozenset[str] = TITLES) -> bool:
    """Whether a key, its last word, or its first one (`num_turns`) is known metadata.

    >>> says_nothing("conversation_hash", FACTS), says_nothing("keep", FACTS)
    (True, False)
    """
    name = plain(key)
    return name in known or name.rpartition("_")[2] in known or name.startswith("num_")


def may_instruct(key: str, value, in_message: bool) -> str | None:
    """What an unused value may say about training, if anything: in a message, any flag or number
    that is no metadata; elsewhere, an instruction inside an object.
    """
    if in_message and (marks_bad_answer(key, value) or (not says_nothing(key, FACTS) and (
            is_number(value) or word(value) in ("true", "false")))):
        return f"is {show(value, 40)} in a message, which may say what to train"
    for inner, said in value.items() if isinstance(value, dict) else ():
        is_clear = says_what_to_train(inner, said) and kind_of(inner) not in ("role", "other")
        if is_clear and weight_of(inner, said) not in (1, None):
            return f"holds `{inner}`, which may say what to train"
    return None
