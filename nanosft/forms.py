"""The known forms of a chat row, as messages: no text in a row is dropped silently."""

import collections
import dataclasses
import functools
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, NamedTuple

import tyro

from nanosft.errors import UserError
from nanosft.instructions import check_feedback, may_instruct, says_nothing, show, take_weight

Counts = collections.Counter  # of what a report names: ("unused", "id"): 7


@dataclasses.dataclass(kw_only=True)
class Reading:
    """Which rows and columns are used: flags of each command that reads chat rows."""

    subset: str | None = None
    """the hub dataset's configuration; ID:CONFIG:SPLIT names it for each source"""
    columns: str = ""
    """which column is what, as prompt=q,response=a,system=s,input=c; default: by their names"""
    ignore: tuple[str, ...] = ()
    """columns, and keys of messages, to leave out, whatever they hold or say; user.KEY: in user
    messages only"""
    where: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """keep only the rows with this value, as correct=true, or without it, as label!=bad; may be
    repeated"""
    repair: bool = False
    """merge neighboring turns of one role; drop a leading answer and a trailing question"""

    @functools.cached_property
    def mapping(self) -> dict[str, str]:
        """{name in a form: the user's column} of --columns."""
        pairs = dict(split_pair("--columns", item) for item in self.columns.split(",") if item)
        for name in pairs.keys() - COLUMN_NAMES:
            raise UserError(f"--columns {show(name)}=…: no form has this column; choose from "
                            f"{', '.join(sorted(COLUMN_NAMES))}")
        return pairs

    @functools.cached_property
    def decided(self) -> set[str]:
        """The columns of --where NAME=VALUE: the user has decided which answers are good."""
        names = [split_pair("--where", item)[0] for item in self.where]
        return {name for name in names if not name.endswith("!")}

    def ignoring(self, *keys: str) -> str:
        """The flag that leaves out these keys, and those that it leaves out already."""
        return shlex.join(["--ignore", *dict.fromkeys([*self.ignore, *keys])])

    def mapping_to(self, *pairs: str) -> str:
        """The flag that says which column is what in these NAME=COLUMN, besides what it says."""
        return shlex.join(["--columns", ",".join(filter(None, [self.columns, *pairs]))])


def split_pair(flag: str, item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not (name and equals):
        raise UserError(f"{flag} {show(item)}: expected NAME=VALUE")
    return name.strip(), value


def require_shallow(name: str, value, limit: int = 100) -> None:
    """UserError for lists and objects nested so deep that they would exhaust Python's stack."""
    values = [value]
    for _ in range(limit):
        values = [inner for outer in values if isinstance(outer, (dict, list, tuple))
                  for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not values:
            return
    raise UserError(f"{name}: lists and objects are nested more than {limit} levels deep")


# ----- a row of a dataset as messages ------------------------------------------------------------


def read_chat(used: dict, unused: dict, reading: Reading) -> list[dict]:
    (column, turns), = used.items()
    return read_turns(column, turns, unused, reading)


def read_pair(used: dict, unused: dict, reading: Reading) -> list[dict]:
    """A prompt, a response, and perhaps an input; or messages in place of strings (TRL's form)."""
    prompt, response, *extra = used.values()
    if not any(extra) and (holds_messages(prompt) or holds_messages(response)):
        turns = {name: [{"role": role, "content": value}] if isinstance(value, str) else value
                 for (name, value), role in zip(used.items(), ("user", "assistant"))}
        prompt, response = (read_turns(*item, unused, reading) for item in turns.items())
        kept = [{"weight": 0} | turn if turn["role"] == "assistant" else turn for turn in prompt]
        return kept + response  # an answer in the prompt is context
    for name, value in used.items():
        if not isinstance(value, str):
            raise UserError(f"`{name}` is {show(value)}, not a string")
    extra = {"input": extra[0]} if any(extra) else {}
    return [{"role": "user", "content": prompt} | extra, {"role": "assistant", "content": response}]


def holds_messages(value) -> bool:
    """A list of messages, one message, or OpenAI's {"messages": …}."""
    return isinstance(value[0] if isinstance(value, list) and value else value, dict)


def read_text(used: dict, unused: dict, reading: Reading) -> str:
    text = used["text"]
    if not isinstance(text, str) or not text:
        raise UserError(f"`text` is {show(text) if text else 'empty'}, not a string")
    chat = None if "text" in reading.mapping else RENDERED.match(text)
    if chat and ANSWERS.search(text, chat.end()):
        raise UserError(f"`text` is a chat in another template, with {show(chat[1])}; make it "
                        "{messages} rows, or train it as plain text, marks and questions included: "
                        "--columns text=text")
    return text


class Form(NamedTuple):
    """`a|b`: either name. The third column of a form is optional. Earlier forms win."""

    columns: tuple[str, ...]
    read: Callable


FORMS = (
    Form(("messages",), read_chat),
    Form(("conversations|conversation",), read_chat),
    Form(("prompt", "response|completion"), read_pair),
    Form(("question|query|problem", "answer|response|solution"), read_pair),
    Form(("instruction", "output|response", "input|context"), read_pair),
    Form(("text",), read_text),
)
CHATS = ("messages", "conversations", "conversation")
SYSTEM_NAMES = ("system", "system_prompt")  # beside any form but {text}
COLUMN_NAMES = {name for form in FORMS for slot in form.columns for name in slot.split("|")}
COLUMN_NAMES |= set(SYSTEM_NAMES)
ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
CONTENT_KEYS = ("content", "value", "text", "parts")
EXCHANGE = {  # the keys of a turn without a role, as Capybara's {input, output}
    "system": ("system",),
    "user": ("instruction", "human", "user", "question", "prompt", "input"),
    "assistant": ("output", "assistant", "gpt", "answer", "response")}
ROLES = {"developer": "system", "human": "user", "prompter": "user", "input": "user"}
ROLES |= dict.fromkeys(("gpt", "model", "bot", "output", "chatgpt", "ai", "chatbot", "bard",
                        "bing", "claude", "llm"), "assistant")
ROLES |= {role: role for role in EXCHANGE}
# Text here usually belongs to the prompt or the answer, so a row that would lose it is refused.
# `text` is not among them: Alpaca's is a rendering of the same row.
TEXT_NAMES = COLUMN_NAMES - {"text"} | {
    "content", "value", "history", "documents", "tools", "tool_calls", "function_call", "cot",
    "rationale", "reasoning", "reasoning_content", "thinking", "chain_of_thought", "complex_cot",
    "explanation", "passage", "choices", "options", "chosen", "rejected"}
MESSAGE_KEY = "message key "  # before the name of a message's key among the columns
MEDIA = ("image", "images", "audio", "video", "videos")
MAGPIE = {"intent", "knowledge", "difficulty"}  # its `knowledge` names what a prompt asks for
TREE_NAMES = {"role", "parent_id", "message_id", "message_tree_id"}
WORSE = ("rejected", "rejected_response", "rejected_messages", "rejected_output",
         "non_preferred_output")  # the last one is OpenAI's
REFUSED = frozenset({*MEDIA, *TREE_NAMES, *WORSE})

BAR = r"[|\uff5c]"  # the second one is DeepSeek's


def turn_marks(plain: str, others: str) -> str:
    """How a turn of these roles begins in other templates: <|user|>, ### Human:, USER:, …"""
    role = f"(?:{plain}|{others})"
    name = r"\w{1,20}"  # all repeats are bounded, so a search takes linear time
    return (rf"(?:<{BAR}(?:{name}_)?{role}(?:_{name})?{BAR}>|"
            rf"<(?:{BAR}{name}{BAR}|{name}_{name})>{role}\b|"
            rf"\[\|{role}\|\]|#{{2,6}} ?{role}:|<?\b(?:{plain})>?:)")


RENDERED = re.compile(  # how a chat begins, perhaps after a system text or a short preamble
    rf"(?:\s{{1,9}}|</?s>|<bos>|<sop>|\[gMASK\]|"
    rf"<{BAR}[^<>]{{,9}}(?:begin|start)[^<>]{{,20}}>){{,5}}"
    r"(?:(?:\W{,5}(?:\w{1,20}\W{,5}>\s?)?system\w{,9}(?:[^\w\s]|\n)|"
    r"(?:a (?:chat|conversation|dialogue)|the following|below is|you are|this is)\b)"
    rf"[\s\S]{{1,2000}}?(?:(?<=[\n.!?:>])\s{{,9}}|(?=<{BAR})))?"
    rf"({turn_marks('user|human', 'prompter|instruction|question')}|\[INST\])", re.IGNORECASE)
ANSWERS = re.compile(turn_marks("assistant|ai|bot|gpt|chatgpt", "model|response|answer")
                     + r"|\[/INST\]", re.IGNORECASE)


def messages_of(row: dict, reading: Reading | None = None, counts: Counts | None = None,
                ) -> list[dict] | str:
    """A row of any known form as messages, or the string of a `{text}` row. None means absent.

    >>> messages_of({"question": "2+2?", "answer": "4"})
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    if not isinstance(row, dict):
        raise UserError(f"expected an object, not a {type(row).__name__}")
    reading, counts = reading or Reading(), Counts() if counts is None else counts
    columns, unused = map_columns(row, reading)
    form, names = find_form(frozenset(columns), frozenset(reading.mapping))
    if not REFUSED.isdisjoint(columns):
        refuse_by_name(columns, form, reading)
    if form is None:
        raise UserError(f"unknown form with keys {show(sorted(row))}, not empty: "
                        f"{show(sorted(columns))}; see the forms in data/README.md, or say which "
                        "is which: --columns prompt=…,response=…")
    used, is_text = {name: columns.pop(name) for name in names}, form.read is read_text
    check_feedback(columns, reading)
    role = "text" if is_text else "assistant"
    weight = take_weight(columns, role, reading) if columns else None
    messages, free = form.read(used, unused, reading), None  # free: what --columns may add
    if not is_text:
        messages = [scaled(turn, weight) for turn in with_system(messages, columns)]
        free = "system" if messages and messages[0]["role"] != "system" else None
        free = "input" if len(used) == 2 and isinstance(used[names[0]], str) else free
    unused |= {name: [value] for name, value in columns.items()}
    if unused:
        check_unused(unused, messages, free, reading, counts)
    return repaired(messages, counts) if reading.repair and not is_text else messages


def scaled(turn: dict, weight: float | None) -> dict:
    """The message with its weight, and those of its parts, multiplied by `weight`; None: 1.

    >>> scaled({"role": "assistant", "content": "A", "weight": 0.5}, 0.5)
    {'role': 'assistant', 'content': 'A', 'weight': 0.25}
    """
    if weight is None or turn["role"] != "assistant":
        return turn
    if turn.get("parts"):
        return turn | {"parts": [scaled(part, weight) for part in turn["parts"]]}
    return turn | {"weight": weight * turn.get("weight", 1)}


def map_columns(row: dict, reading: Reading) -> tuple[dict, dict]:
    """(columns under their names in a form, columns not to be used: [value]), both without nulls
    and what is as good as null: empty lists, and empty chats as strings.
    """
    columns = {name: value for name, value in row.items() if value not in (None, [], {})
               and not (name in CHATS and value in ("", "[]"))}
    for name, column in reading.mapping.items():
        if column not in row:
            raise UserError(f"--columns {name}={column}: no such column; there are "
                            f"{show(sorted(row))}")
    mapped = {name: columns[column] for name, column in reading.mapping.items()
              if column in columns}
    for column in reading.mapping.values():
        columns.pop(column, None)
    unused = {name: [columns.pop(name)] for name in (*reading.mapping, *reading.ignore)
              if name in columns}
    return columns | mapped, unused


@functools.lru_cache(maxsize=1024)
def find_form(columns: frozenset, mapped: frozenset) -> tuple[Form | None, list[str]]:
    """The first form that has its columns and uses all names of --columns; and its columns."""
    for form in FORMS:
        slots = [slot.split("|") for slot in form.columns]
        if form.read is read_pair and len(slots) == 2 and "input" in mapped:
            slots.append(["input"])
        # of two names for one slot, that of --columns wins
        names = [next((name for name in sorted(slot, key=lambda name: name not in mapped)
                       if name in columns), None) for slot in slots]
        named = {*names, *(() if form.read is read_text else SYSTEM_NAMES)}
        if None not in names[:2] and not (mapped & columns) - named:
            return form, [name for name in names if name]
    return None, []


def refuse_by_name(columns: dict, form: Form | None, reading: Reading) -> None:
    """UserError for rows that are not chats, saying what to do instead."""
    if worse := next((name for name in WORSE if holds_text(columns.get(name))), None):
        raise UserError(f"a preference row (`{worse}` beside a better answer); to train on the "
                        f"better one, pass {better_answer(columns, worse, reading)}")
    if medium := next(filter(columns.get, MEDIA), None):
        raise UserError(f"`{medium}` is not text, and the model reads only text; leave out such "
                        f"rows, or only the column: {reading.ignoring(medium)}")
    tree = sorted(columns.keys() & TREE_NAMES)
    if tree and (form is None or form.read is read_text):
        raise UserError(f"one message of a tree (OASST: {', '.join(tree)}), not a chat; make each "
                        "path of a tree one {messages} row, or --ignore these columns")


def better_answer(columns: dict, worse: str, reading: Reading) -> str:
    """The flags that train the better answer of a preference row."""
    better = worse.replace("rejected", "chosen").removeprefix("non_")
    answer = columns.get(better)
    chats = [name for name in (*CHATS, "input") if holds_messages(columns.get(name))]
    if not answer:
        return reading.ignoring(worse)
    if isinstance(answer, list) and len(answer) > 1:  # the whole chat
        return f"{reading.mapping_to(f'messages={better}')} {reading.ignoring(worse, *chats)}"
    pairs = [*(f"prompt={name}" for name in chats), f"response={better}"]
    if columns.keys() == {better, worse}:
        pairs = [f"text={better}"]  # as plain text
    return f"{reading.mapping_to(*pairs)} {reading.ignoring(worse)}"


def read_turns(column: str, turns, unused: dict, reading: Reading) -> list[dict]:
    """A list of messages, of strings (user and assistant in turn), or either as a JSON string.

    Keys that are not used go to `unused`, with the values of all turns.
    """
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise UserError(f"`{column}` is a string, but not JSON: {show(turns)}") from error
        require_shallow(f"`{column}`", turns)
    if isinstance(turns, dict):  # one message, or OpenAI's {"messages": …, "tools": …}
        turn, turns = turns, turns.get("messages", [turns])
        unused |= {key: [turn[key]] for key in turn if "messages" in turn and key != "messages"}
    kinds = {*map(type, turns)} if isinstance(turns, list) else {None}
    if kinds == {str}:
        turns = [{"role": ("user", "assistant")[i % 2], "content": turn}
                 for i, turn in enumerate(turns)]
    elif kinds - {dict}:
        raise UserError(f"`{column}` must be a list of {{role, content}}, of {{from, value}}, or "
                        f"of strings, not {show(turns)}")
    messages = []
    for i, turn in enumerate(turns):
        try:
            messages += read_turn(turn, unused, reading)
        except UserError as error:
            raise UserError(f"message {i}: {error}") from error
    return messages


def read_turn(turn: dict, unused: dict, reading: Reading) -> list[dict]:
    """A message; or a question and its answer in one turn, such as Capybara's."""
    turn = {key: value for key, value in turn.items() if value is not None}
    role_key, contents, others = shape_of(tuple(turn))
    if not contents:
        raise UserError(f"no text among the keys {show(sorted(turn))}; expected {{role, "
                        "content}, {from, value}, or {input, output}")
    messages = [read_content(role or role_named(turn[role_key]), turn[key], unused, reading)
                for role, key in contents.items() if role != "system" or turn[key]]
    if others:
        others = {key: turn[key] for key in others}
        if "input" in others and "input" not in reading.ignore:
            messages[max(0, len(messages) - 2)]["input"] = others.pop("input")
        messages[-1] = instructed(messages[-1], others, unused, reading)
    return messages


@functools.lru_cache(maxsize=1024)
def shape_of(keys: tuple[str, ...]) -> tuple[str | None, dict[str, str], list[str]]:
    """(key of the role, {role: key of a text}, other keys) of a turn; a role that it names is "".

    >>> shape_of(("from", "value", "id")), shape_of(("input", "output"))
    (('from', {'': 'value'}, ['id']), (None, {'user': 'input', 'assistant': 'output'}, []))
    """
    role_key = next((key for key in ROLE_KEYS if key in keys), None)
    slots = {"": CONTENT_KEYS} if role_key else EXCHANGE
    contents = {role: key for role, slot in slots.items() for key in reversed(slot) if key in keys}
    return role_key, contents, [key for key in keys if key not in (role_key, *contents.values())]


def role_named(role) -> str:
    """system, user, or assistant. Case and the marks of a template do not count."""
    name = role if isinstance(role, str) else ""
    if name not in ROLES:
        name = re.sub(r"^\W+|\W+$", "", name).lower()
    if name not in ROLES:
        raise UserError(f"role {show(role)} is not read, only system, user, assistant, and their "
                        "aliases in data/README.md (no tool or function turns); leave out such "
                        "rows")
    return ROLES[name]


def read_content(role: str, content, unused: dict, reading: Reading) -> dict:
    """A message of a string or of parts, which are joined.

    If parts of an answer have weights, it also has the parts, each a message, under "parts".
    """
    if isinstance(content, dict) and content.keys() & {"type", "text"}:
        content = [content]
    if not isinstance(content, list):
        return {"role": role, "content": content}
    parts = [read_part(role, part, unused, reading) for part in content]
    message = {"role": role, "content": "".join(part["content"] for part in parts)}
    parts = [part for part in parts if part["content"]]
    is_weighted = any(part.get("weight", 1) != 1 for part in parts)
    return message | {"parts": parts} if is_weighted else message


def read_part(role: str, part, unused: dict, reading: Reading) -> dict:
    """A string, {"type": "text", "text": …}, or OpenAI's {…, "text": {"value": …}}, as a message.
    """
    if isinstance(part, str):
        return {"role": role, "content": part}
    given = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
    kind = given.pop("type", "text" if given else part)
    text = given.pop(next((key for key in ("text", "content", "value") if key in given), ""), None)
    if isinstance(text, dict):
        given |= text
        text = given.pop("value", None)
    if str(kind).lower() not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise UserError(f"a part of type {show(kind)}; the model reads only text "
                        '({"type": "text", "text": …}); leave out such rows')
    return instructed({"role": role, "content": text}, given, unused, reading)


def instructed(message: dict, keys: dict, unused: dict, reading: Reading) -> dict:
    """The message with the weight that other keys of it, or of its part, say; the rest is unused.

    `user.train` in --ignore is the key `train` of user messages.
    """
    role = message["role"]
    if reading.ignore:
        keys = {f"{role}.{key}" if f"{role}.{key}" in reading.ignore else key: value
                for key, value in keys.items()}
    weight = take_weight(keys, role, reading)
    for key, value in keys.items():
        unused.setdefault(f"{MESSAGE_KEY}{key}", []).append(value)
    return scaled(message, weight)


def with_system(messages: list[dict], columns: dict) -> list[dict]:
    """The messages after the text of a `system` column, which is taken from `columns`."""
    own = [turn["content"] for turn in messages[:1] if turn["role"] == "system"]
    for name in SYSTEM_NAMES:
        text = columns.get(name)
        if text and not isinstance(text, str) and not holds_text(text):
            raise UserError(f"`{name}` is {show(text)}, not a string")
        if text and isinstance(text, str) and own in ([], [text]):  # else it is not used
            return [{"role": "system", "content": columns.pop(name)}, *messages[len(own) :]]
    return messages


# ----- what is not used --------------------------------------------------------------------------


class UnusedError(UserError):
    """lost: {key that is not used: what it holds that may matter to training, and what to do}."""

    def __init__(self, lost: dict[str, str], reading: Reading):
        self.lost = lost
        first, *others = keys = [*lost]
        ends = itertools.accumulate(len(key) + 1 for key in keys)
        fitting = [key for key, end in zip(keys, ends) if end <= 150] or [first]
        what = f"`{first}` {lost[first]}"
        if others:
            what = (f"`{first}` and {len(others)} more are not used, but hold text or flags; map "
                    "them with --columns, or leave them out")
        super().__init__(f"{what} with {reading.ignoring(*fitting)}")


def check_unused(unused: dict[str, list], messages: list[dict] | str, free: str | None,
                 reading: Reading, counts: Counts) -> None:
    """Count what is not used, and refuse a row that would lose text or an instruction.

    unused: {column or key of messages: its values}. free: the name under which --columns can still
    add a column's text to the prompt.
    """
    texts = [messages] if isinstance(messages, str) else [turn["content"] for turn in messages]
    lost = {}
    for name, values in unused.items():
        counts["unused", name] += holds_text(values)
        key = name.removeprefix(MESSAGE_KEY)
        for value, _ in itertools.groupby(values) if key not in reading.ignore else ():
            if what := what_is_lost(name, value, unused, texts):
                can_map = free and isinstance(value, str) and name == key
                use = f"say what it is, as {reading.mapping_to(f'{free}={key}')}, or "
                lost.setdefault(key, f"{what}; {use if can_map else ''}leave it out")
    if lost:
        raise UnusedError(lost, reading)


def what_is_lost(name: str, value, unused: dict, texts: list) -> str | None:
    """What an unused value holds that may matter to training, if anything. texts: those in use."""
    key, in_message = name.removeprefix(MESSAGE_KEY), name.startswith(MESSAGE_KEY)
    if what := may_instruct(key, value, in_message):
        return what
    is_text = key.lower() in TEXT_NAMES or (in_message and key.lower() in MEDIA)
    if not is_text and (says_nothing(key) or (key in MAGPIE and MAGPIE <= unused.keys())):
        return None
    for inner, text in strings_in(value, key):
        if value not in texts and (is_text or not (  # UltraChat's `prompt` is the first message
                is_label(text) or says_nothing(inner) or repeats(text, texts))):
            return f"holds text that would be lost: {show(value)}"
    return None


def strings_in(value, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, string) of each string in a value that is not blank."""
    if isinstance(value, str):
        if value.strip() not in ("", "[]", "{}", "null"):
            yield key, value
    elif isinstance(value, dict | list | tuple):
        for inner, item in value.items() if isinstance(value, dict) else ((key, v) for v in value):
            yield from strings_in(item, inner)


def holds_text(value) -> bool:
    return any(True for _ in strings_in(value))


def is_label(text: str) -> bool:
    """At most 64 characters and 8 words; or a URL."""
    return (len(text) <= 64 and len(text.split()) <= 8) or bool(re.fullmatch(r"\w+://\S+", text))


def repeats(text: str, texts: list) -> bool:
    """Whether a string lies in a text that is used, or renders one, as Alpaca's `text` does."""
    return any(text in used or (len(used) >= 10 and used in text)
               for used in texts if isinstance(used, str))


FIRST_ROWS = 1000


def examined(rows: Iterable[tuple], reading: Reading, is_strict: bool = True) -> Iterator[tuple]:
    """The (…, place, row) as they come; but first one UserError for all keys of the first 1,000
    rows that are neither used nor ignored. is_strict: also for names that usually hold text; else
    only their rows are bad.
    """
    rows, lost, where = iter(rows), {}, ""
    first = list(itertools.islice(rows, FIRST_ROWS))
    for *_, place, row in first:
        try:
            messages_of(row, reading)
        except UnusedError as error:
            if is_strict or any(name.lower() not in TEXT_NAMES for name in error.lost):
                lost |= {name: what for name, what in error.lost.items() if name not in lost}
                where = where or place
        except UserError:
            pass  # a bad row, which is refused when its turn comes
    if lost:
        raise UserError(f"{where}: {UnusedError(lost, reading)}")
    refuse_binary_labels(first, reading)
    yield from itertools.chain(first, rows)


def refuse_binary_labels(rows: Iterable[tuple], reading: Reading) -> None:
    """UserError if `label` is 0 and 1, which may be feedback; more numbers are classes."""
    places = {str(row["label"]): place for *_, place, row in rows
              if isinstance(row, dict) and row.get("label") is not None}
    is_decided = "label" in (*reading.ignore, *reading.mapping.values())
    if not is_decided and places.keys() in ({"0", "1"}, {"-1", "1"}, {"0.0", "1.0"}):
        bad, good = sorted(places)
        raise UserError(f"{places[bad]}: `label` is {bad} here and {good} elsewhere; if that marks "
                        f"bad answers, pass --where label={good}, if it says nothing about "
                        f"training, {reading.ignoring('label')}")


def repaired(messages: list[dict], counts: Counts) -> list[dict]:
    """--repair: [user a, user b, assistant c, user d] becomes [user "a\\n\\nb", assistant c]."""
    merged = []
    for turn in messages:
        last = merged[-1] if merged else {}
        texts = [last.get("content"), last.get("input") or "", turn["content"]]
        if (last.get("role") == turn["role"] and last.get("weight") == turn.get("weight")
                and "parts" not in last | turn and all(isinstance(text, str) for text in texts)):
            merged[-1] = turn | {"content": "\n\n".join(filter(None, texts))}
            counts["repaired", "turns merged"] += 1
        else:
            merged.append(turn)
    start = sum(turn["role"] == "system" for turn in merged[:1])
    for end, role, what in ((start, "assistant", "leading answers dropped"),
                            (-1, "user", "trailing questions dropped")):
        if merged[start:] and merged[end]["role"] == role:
            del merged[end]
            counts["repaired", what] += 1
    if messages and not any(turn["role"] == "assistant" for turn in merged):
        raise UserError("--repair leaves no question with an answer (roles: "
                        f"{show([turn['role'] for turn in messages])}); leave out such rows")
    return merged


# ----- what is refused in messages ----------------------------------------------------------------


def check_messages(messages: list[dict]) -> None:
    """UserError unless: [system], then user and assistant alternating, with string contents."""
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a non-empty list")
    has_system = isinstance(messages[0], dict) and messages[0].get("role") == "system"
    roles = itertools.chain(["system"] * has_system, itertools.cycle(["user", "assistant"]))
    for i, (message, role) in enumerate(zip(messages, roles)):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"message {i} has no `content` string")
        if message.get("role") != role:
            raise UserError(f"message {i} has role {message.get('role')!r}, expected {role!r}; the "
                            "order is: system (optional), then user and assistant alternating")
        if role == "assistant" and not message["content"]:
            raise UserError(f"message {i}: the response is empty, so there is nothing to train on")
        extra = message.get("input")
        if extra is not None and (role != "user" or not isinstance(extra, str)):
            raise UserError(f"message {i}: `input` must be a string in a user message")
        for part in message.get("parts") or [message]:
            weight = 0 if part.get("weight") is None else part["weight"]
            is_share = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not is_share or not 0 <= weight <= (role == "assistant"):
                raise UserError(f"message {i}: weight {weight!r} in role {role!r}; only answers "
                                "have a weight, a number from 0 to 1")
    if has_system and len(messages) == 1:
        raise UserError("there is only a system message; add a user message")
