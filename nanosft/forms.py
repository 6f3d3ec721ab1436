"""The known forms of a chat row, as messages: no text in a row is dropped silently."""

import collections
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from typing import Annotated, NamedTuple

import tyro

from nanosft.errors import UserError

Counts = collections.Counter  # of what a report names: ("unused", "id"): 7


@dataclasses.dataclass(kw_only=True)
class Reading:
    """Which rows and columns are used: flags of each command that reads chat rows."""

    subset: str | None = None
    """the hub dataset's configuration; ID:CONFIG:SPLIT names it for each source"""
    columns: str = ""
    """which column is what, as prompt=q,response=a,system=s,input=c; default: by their names"""
    ignore: tuple[str, ...] = ()
    """columns, and keys of messages, whose text is left out"""
    where: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """keep only the rows with this value, as correct=true; may be repeated"""
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


def split_pair(flag: str, item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not (name and equals):
        raise UserError(f"{flag} {show(item)}: expected NAME=VALUE")
    return name.strip(), value


def show(value) -> str:
    """A value of a row for an error: at most 80 characters, control characters escaped."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


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


def read_chat(names: list[str], values: list, unused: dict) -> list[dict]:
    return read_turns(names[0], values[0], unused)


def read_pair(names: list[str], values: list, unused: dict) -> list[dict]:
    """A prompt, a response, and perhaps an input; or two lists of messages (TRL's form)."""
    if isinstance(values[0], list) and isinstance(values[1], list) and not any(values[2:]):
        prompt, response = (read_turns(*pair, unused) for pair in zip(names[:2], values))
        kept = [{"weight": 0} | turn if turn["role"] == "assistant" else turn for turn in prompt]
        return kept + response  # an answer in the prompt is context
    for name, value in zip(names, values):
        if not isinstance(value, str):
            raise UserError(f"`{name}` is {show(value)}, not a string")
    extra = {"input": values[2]} if values[2:] and values[2] else {}
    return [{"role": "user", "content": values[0]} | extra,
            {"role": "assistant", "content": values[1]}]


def read_text(names: list[str], values: list, unused: dict) -> str:
    if not isinstance(values[0], str) or not values[0]:
        raise UserError(f"`text` is {show(values[0]) if values[0] else 'empty'}, not a string")
    return values[0]


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
SYSTEM_NAMES = ("system", "system_prompt")  # beside any form but {text}
COLUMN_NAMES = {name for form in FORMS for slot in form.columns for name in slot.split("|")}
COLUMN_NAMES |= set(SYSTEM_NAMES)
ROLES = {"developer": "system", "human": "user", "prompter": "user", "input": "user"}
ROLES |= dict.fromkeys(("gpt", "model", "bot", "output", "chatgpt"), "assistant")
ROLES |= {role: role for role in ("system", "user", "assistant")}
TOOL_ROLES = {"tool", "tools", "function", "function_call", "function_response", "tool_call",
              "tool_response", "observation", "ipython"}
# Text here usually belongs to the prompt or the answer, so a row that would lose it is refused.
# `text` is not among them: Alpaca's is a rendering of the same row.
TEXT_NAMES = COLUMN_NAMES - {"text"} | {
    "content", "value", "history", "documents", "tools", "tool_calls", "function_call", "cot",
    "rationale", "reasoning", "reasoning_content", "thinking", "chain_of_thought", "complex_cot",
    "explanation", "passage", "choices", "options"}
MEDIA = ("image", "images", "audio", "video", "videos")
TREE_NAMES = {"role", "parent_id", "message_id", "message_tree_id"}


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
    refuse_by_name(columns, form)
    if form is None:
        raise UserError(f"unknown form with keys {show(sorted(row))}, not null: "
                        f"{show(sorted(columns))}; see the forms in data/README.md, or say which "
                        "is which: --columns prompt=…,response=…")
    messages = form.read(names, [columns.pop(name) for name in names], unused)
    if isinstance(messages, list):
        messages = with_system(messages, columns)
    check_unused(unused | columns, messages, reading, counts)
    return repaired(messages, counts) if reading.repair and form.read != read_text else messages


def map_columns(row: dict, reading: Reading) -> tuple[dict, dict]:
    """(columns under their names in a form, columns not to be used), both without nulls."""
    for name, column in reading.mapping.items():
        if column not in row:
            raise UserError(f"--columns {name}={column}: no such column; there are "
                            f"{show(sorted(row))}")
    given = {name: value for name, value in row.items() if value is not None}
    mapped = {name: given[column] for name, column in reading.mapping.items() if column in given}
    columns = {name: given[name] for name in given if name not in reading.mapping.values()}
    names = {*reading.mapping, *reading.ignore}
    unused = {name: columns.pop(name) for name in [*columns] if name in names}
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


def refuse_by_name(columns: dict, form: Form | None) -> None:
    """UserError for rows that are not chats, saying what to do instead."""
    if "chosen" in columns and "rejected" in columns:
        raise UserError("a preference row (`chosen`, `rejected`); to train on the better answer, "
                        "pass --columns response=chosen, or messages=chosen for whole chats, and "
                        "--ignore rejected")
    for name in MEDIA:
        if name in columns and columns[name] not in ("", []):
            raise UserError(f"`{name}` is not text, and the model reads only text; leave out such "
                            f"rows, or only the column: --ignore {name}")
    tree = sorted(columns.keys() & TREE_NAMES)
    if tree and (form is None or form.read is read_text):
        raise UserError(f"one message of a tree (OASST: {', '.join(tree)}), not a chat; make each "
                        "path of a tree one {messages} row, or --ignore these columns")


def read_turns(column: str, turns, unused: dict) -> list[dict]:
    """A list of messages, of strings (user and assistant in turn), or either as a JSON string.

    Keys that are not used go to `unused`, with the values of all turns.
    """
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise UserError(f"`{column}` is a string, but not JSON: {show(turns)}") from error
        require_shallow(f"`{column}`", turns)
    kinds = {type(turn) for turn in turns} if isinstance(turns, list) else {None}
    if len(kinds) > 1 or not kinds <= {dict, str}:
        raise UserError(f"`{column}` must be a list of {{role, content}}, of {{from, value}}, or "
                        f"of strings, not {show(turns)}")
    if kinds == {str}:
        return [{"role": ("user", "assistant")[i % 2], "content": turn}
                for i, turn in enumerate(turns)]
    return [read_turn(i, turn, unused) for i, turn in enumerate(turns)]


def read_turn(i: int, turn: dict, unused: dict) -> dict:
    turn = {key: value for key, value in turn.items() if value is not None}
    role = turn.pop("role" if "role" in turn else "from", None)
    if not isinstance(role, str) or role not in ROLES:
        if isinstance(role, str) and role in TOOL_ROLES:
            raise UserError(f"message {i} has role {role!r}: tool and function turns are not "
                            "supported; leave out such rows")
        raise UserError(f"message {i} has role {show(role)}; the known roles are system, user, "
                        "assistant, and their aliases in data/README.md; leave out such rows")
    content = turn.pop("content" if "content" in turn else "value", None)
    if isinstance(content, list):
        content = "".join(read_part(i, part) for part in content)
    message = {"role": ROLES[role], "content": content}
    message |= {key: turn.pop(key) for key in ("input", "weight") if key in turn}
    if not isinstance(message.get("weight", 1), int | float):
        raise UserError(f"weight {show(message['weight'])} is not a number from 0 to 1")
    for key, value in turn.items():
        unused.setdefault(f"message key {key}", []).append(value)
    return message


def read_part(i: int, part) -> str:
    """The text of {"type": "text", "text": …}."""
    given = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
    if given.keys() - {"type", "text"} or not isinstance(given.get("text"), str):
        kind = given.get("type", part)
        raise UserError(f"message {i} has a part of type {show(kind)}; the model reads only text "
                        '({"type": "text", "text": …}); leave out such rows')
    return given["text"]


def with_system(messages: list[dict], columns: dict) -> list[dict]:
    """The messages after the text of a `system` column, which is taken from `columns`."""
    name = next((name for name in SYSTEM_NAMES if columns.get(name)), None)
    if name is None:
        return messages
    if not isinstance(columns[name], str):
        raise UserError(f"`{name}` is {show(columns[name])}, not a string")
    own = [turn["content"] for turn in messages[:1] if turn["role"] == "system"]
    if own and own != [columns[name]]:
        return messages  # two different ones: `check_unused` names the column
    return [{"role": "system", "content": columns.pop(name)}, *messages[len(own) :]]


def check_unused(unused: dict, messages: list[dict] | str, reading: Reading,
                 counts: Counts) -> None:
    """Count what is not used, and refuse a row whose prompt or answer would lose text."""
    for name, value in unused.items():
        counts["unused", name] += holds_text(value)
        key = name.removeprefix("message key ")
        is_text = key.lower() in TEXT_NAMES or (key != name and key.lower() in MEDIA)
        if not is_text or key in reading.ignore or not holds_text(value):
            continue
        if isinstance(messages, list) and value in [turn["content"] for turn in messages]:
            continue  # UltraChat's `prompt` repeats the first message
        use = "" if key != name else f"say what it is, as --columns input={key} (or prompt, " \
                                     "response, system), or "
        raise UserError(f"`{key}` holds text that would be lost: {show(value)}; {use}leave it out "
                        f"with --ignore {key}")


def holds_text(value) -> bool:
    if isinstance(value, dict | list | tuple):
        return any(map(holds_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and value.strip() not in ("", "[]", "{}", "null")


def repaired(messages: list[dict], counts: Counts) -> list[dict]:
    """--repair: [user a, user b, assistant c, user d] becomes [user "a\\n\\nb", assistant c]."""
    merged = []
    for turn in messages:
        last = merged[-1] if merged else {}
        parts = [last.get("content"), last.get("input") or "", turn["content"]]
        if (last.get("role") == turn["role"] and last.get("weight") == turn.get("weight")
                and all(isinstance(part, str) for part in parts)):
            merged[-1] = turn | {"content": "\n\n".join(part for part in parts if part)}
            counts["repaired", "turns merged"] += 1
        else:
            merged.append(turn)
    start = int(bool(merged) and merged[0]["role"] == "system")
    if merged[start:] and merged[start]["role"] == "assistant":
        del merged[start]
        counts["repaired", "leading answers dropped"] += 1
    if merged[start:] and merged[-1]["role"] == "user":
        merged.pop()
        counts["repaired", "trailing questions dropped"] += 1
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
        weight = 0 if message.get("weight") is None else message["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
            raise UserError(f"weight {weight!r} is not a number from 0 to 1")
        if weight and role != "assistant":
            raise UserError(f"message {i}: weight {weight} on a {role} message; only assistant "
                            "messages can have one")
    if has_system and len(messages) == 1:
        raise UserError("there is only a system message; add a user message")
