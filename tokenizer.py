"""Text to token ids, and conversations to token ids with a loss weight for each.

Two encodings: `gpt2` (GPT-2's byte pairs, downloaded once by tiktoken) and `bytes` (no file, no
network). Both carry the same five special tokens, which only the renderer below ever writes: a user
who types `<|end|>` gets those seven characters.

>>> ids, weights = render(get_encoding("bytes"), [{"role": "user", "content": "hi"},
...                                               {"role": "assistant", "content": "yo"}])
>>> ids      # <|user|>  h    i  <|end|> <|assistant|> y    o  <|end|> <|endoftext|>
[258, 104, 105, 260, 259, 121, 111, 260, 256]
>>> weights  # percent: the answer and the token that ends it are trained, the question is not
[0, 0, 0, 0, 0, 100, 100, 100, 0]
"""

import functools

import tiktoken

END_OF_TEXT = "<|endoftext|>"
# In the order of their ids. GPT-2's vocabulary ends with <|endoftext|> (50256); the other four take
# the next ids, which padding 50257 to a multiple of 64 leaves free, so the model needs no change.
SPECIALS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
ENCODINGS = ("gpt2", "bytes")
TEMPLATES = ("chat", "alpaca", "raw")

# Source: the two prompts of github.com/tatsu-lab/stanford_alpaca, README.md, "Data Release"
ALPACA = {
    True: "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{content}\n\n### Input:\n{input}\n\n### Response:",
    False: "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{content}\n\n### Response:",
}


@functools.cache
def get_encoding(name: str) -> tiktoken.Encoding:
    """`gpt2` (50261 ids) or `bytes` (261). ValueError: unknown, or no vocabulary file."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        specials = {token: 256 + i for i, token in enumerate(SPECIALS)}
        # No two bytes merge, so where the pattern cuts is only a matter of speed.
        return tiktoken.Encoding(
            "bytes", pat_str=r"[\s\S]{1,64}", mergeable_ranks=ranks, special_tokens=specials
        )
    if name != "gpt2":
        raise ValueError(f"--encoding: unknown encoding {name!r}; choose from {list(ENCODINGS)}")
    try:
        base = tiktoken.get_encoding("gpt2")
    except (
        Exception
    ) as error:  # requests' many network errors, or a file that is not the expected one
        raise ValueError(
            f"the gpt2 vocabulary is not to be had ({type(error).__name__}): connect once so that "
            "tiktoken downloads it, or set TIKTOKEN_CACHE_DIR to a folder that holds its files, or "
            "use --encoding bytes"
        ) from error
    specials = {token: base.eot_token + i for i, token in enumerate(SPECIALS)}
    return tiktoken.Encoding(
        "gpt2",
        pat_str=base._pat_str,
        mergeable_ranks=base._mergeable_ranks,
        special_tokens=specials,
    )


def stop_ids(encoding: tiktoken.Encoding, template: str) -> list[int]:
    """The ids that end an answer: <|end|> in a chat; <|endoftext|> everywhere."""
    end = [encoding.encode_single_token("<|end|>")] if template == "chat" else []
    return [*end, encoding.eot_token]


# ----- messages ----------------------------------------------------------------------------------


def check_messages(messages: list[dict]) -> None:
    """ValueError unless: [system], then user and assistant in turn, each with a string content."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is empty or no list; give at least a user message")
    turns = messages
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {i} has no content that is a string")
        role, extra = message.get("role"), message.get("input")
        if i == 0 and role == "system":
            turns = messages[1:]
        if extra is not None and (role != "user" or not isinstance(extra, str)):
            raise ValueError(f"message {i}: `input` belongs to a user message and is a string")
        if percent_of(message) and message.get("weight") is not None and role != "assistant":
            raise ValueError(f"message {i}: weight {message['weight']} on a {role} message; only "
                             "assistant messages are trained")  # fmt: skip
    for i, message in enumerate(turns, start=len(messages) - len(turns)):
        want = ("user", "assistant")[(i - len(messages) + len(turns)) % 2]
        if message.get("role") != want:
            raise ValueError(
                f"message {i} has role {message.get('role')!r} where {want!r} belongs; "
                "the order is: system (optional), then user and assistant in turn"
            )
        if want == "assistant" and not message["content"]:
            raise ValueError(f"message {i}: the response is empty, there is nothing to train")
    if not turns:
        raise ValueError("there is only a system message; add a user message")


def percent_of(message: dict) -> int:
    """The message's loss weight in whole percent; a positive one is at least 1. Default: 100."""
    weight = message.get("weight", 1)
    weight = 1 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
        raise ValueError(f"weight {weight!r} is not a number from 0 to 1")
    return max(1, round(100 * weight)) if weight > 0 else 0


# ----- templates: lists of (text, is it a special token?, loss weight in percent) ----------------


def _joined(message: dict) -> str:
    """A user message with its Alpaca `input`, if any, after a blank line."""
    return "\n\n".join(part for part in (message["content"], message.get("input")) if part)


def _before_answer(messages: list[dict], template: str) -> list[tuple[str, bool, int]]:
    """Everything up to where the assistant begins to answer the last user message."""
    if template == "alpaca":
        if len(messages) != 1:
            raise ValueError(
                "the alpaca template takes one user message and one answer, no system message, "
                f"not {len(messages) + 1} messages; use --template chat"
            )
        text = ALPACA[bool(messages[0].get("input"))]
        content, extra = messages[0]["content"], messages[0].get("input") or ""
        # partition, not format: braces in the data are data
        head, _, tail = text.partition("{content}")
        middle, _, tail = tail.partition("{input}") if extra else (tail, "", "")
        return [(head + content + middle + extra + tail, False, 0)]
    segments = []
    for message in messages:
        percent = percent_of(message) if message["role"] == "assistant" else 0
        if template == "raw":
            segments.append((_joined(message), False, percent))
        else:
            segments.append((f"<|{message['role']}|>", True, 0))
            segments.append((_joined(message), False, percent))
            segments.append(("<|end|>", True, percent))
    return segments + ([("<|assistant|>", True, 0)] if template == "chat" else [])


def _answer(message: dict, template: str) -> list[tuple[str, bool, int]]:
    """The last assistant message and what ends it: the model must learn to stop, too."""
    percent = percent_of(message)
    if template == "chat":
        ends = [("<|end|>", True, percent), (END_OF_TEXT, True, 0)]
    else:
        ends = [(END_OF_TEXT, True, percent)]
    return [(message["content"], False, percent), *ends]


def _encode(encoding, segments) -> tuple[list[int], list[int]]:
    """Each segment on its own: no byte pair crosses the border between prompt and answer."""
    ids, weights = [], []
    for text, special, percent in segments:
        new = [encoding.encode_single_token(text)] if special else encoding.encode_ordinary(text)
        ids += new
        weights += [percent] * len(new)
    return ids, weights


def _check_template(template: str) -> None:
    if template not in TEMPLATES:
        raise ValueError(
            f"--template: unknown template {template!r}; choose from {list(TEMPLATES)}"
        )


def render(
    encoding: tiktoken.Encoding,
    messages: list[dict],
    template: str = "chat",
    train_on: str = "all_turns",
) -> tuple[list[int], list[int]]:
    """One training example: (ids, the loss weight of each id in percent), <|endoftext|> last.

    train_on: `all_turns`, or `last_turn`, which keeps the earlier answers as context.
    ValueError: a template that does not fit, roles out of order, an empty answer, a bad weight.
    """
    _check_template(template)
    if train_on not in ("all_turns", "last_turn"):
        raise ValueError(f"--train_on: {train_on!r} is neither 'all_turns' nor 'last_turn'")
    check_messages(messages)
    *context, answer = messages
    if answer["role"] != "assistant":
        raise ValueError(f"the last message has role {answer['role']!r}; it must be 'assistant'")
    if train_on == "last_turn":
        context = [m | {"weight": 0} for m in context]
    return _encode(encoding, _before_answer(context, template) + _answer(answer, template))


def render_text(encoding: tiktoken.Encoding, text: str) -> tuple[list[int], list[int]]:
    """A `{text}` row: plain text, trained whole, as in pretraining."""
    return _encode(encoding, [(text, False, 100), (END_OF_TEXT, True, 100)])


def render_prompt(
    encoding: tiktoken.Encoding, messages: list[dict], template: str = "chat"
) -> list[int]:
    """What the model sees before it answers: the start of `render`'s ids, to the letter.

    A last assistant message is left out, so that a training example may be given as it is.
    """
    _check_template(template)
    check_messages(messages)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if messages[-1]["role"] != "user":
        raise ValueError("there is no user message to answer")
    return _encode(encoding, _before_answer(messages, template))[0]
