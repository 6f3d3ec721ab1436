"""Text to token ids, and chats to token ids with a loss weight per token.

Two encodings: `gpt2` (GPT-2's BPE, downloaded once by tiktoken) and `bytes` (no file, no network).
Both have the same five special tokens, which only the renderer below ever emits: a user who types
`<|end|>` gets those seven characters.

>>> ids, weights = render(get_encoding("bytes"), [{"role": "user", "content": "hi"},
...                                               {"role": "assistant", "content": "yo"}])
>>> ids      # <|user|>  h    i  <|end|> <|assistant|> y    o  <|end|> <|endoftext|>
[258, 104, 105, 260, 259, 121, 111, 260, 256]
>>> weights  # percent: the answer and the token that ends it are trained, the question is not
[0, 0, 0, 0, 0, 100, 100, 100, 0]
"""

import functools
import itertools

import tiktoken

from nanosft.cli import UserError, require_choice

END_OF_TEXT = "<|endoftext|>"
# In id order. GPT-2's vocabulary ends with <|endoftext|> (50256); the other four take the next ids,
# which are free because the vocabulary is padded to a multiple of 64, so the model needs no change.
SPECIALS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
ENCODINGS = ("gpt2", "bytes")
TEMPLATES = ("chat", "alpaca", "raw")

# Source: the two prompts of github.com/tatsu-lab/stanford_alpaca, README.md, "Data Release"
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{content}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{content}\n\n### Response:"
)


@functools.cache
def get_encoding(name: str) -> tiktoken.Encoding:
    """`gpt2` (50261 ids) or `bytes` (261). UserError: unknown name, or no vocabulary file."""
    require_choice("encoding", name, ENCODINGS)
    if name == "bytes":
        # bytes never merge, so where the pattern splits affects only speed
        pattern, ranks = r"[\s\S]{1,64}", {bytes([i]): i for i in range(256)}
    else:
        try:
            base = tiktoken.get_encoding("gpt2")
        except Exception as error:  # one of many network errors, or a damaged file
            raise UserError(
                f"could not load the gpt2 vocabulary ({type(error).__name__}): go online once so "
                "that tiktoken can download it, set TIKTOKEN_CACHE_DIR to a folder that holds its "
                "files, or use --encoding bytes") from error
        pattern, ranks = base._pat_str, base._mergeable_ranks
    specials = {token: len(ranks) + i for i, token in enumerate(SPECIALS)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


def stop_ids(encoding: tiktoken.Encoding, template: str | None) -> list[int]:
    """The ids that end an answer: <|endoftext|>, and in the chat template also <|end|>."""
    end = [encoding.encode_single_token("<|end|>")] if template == "chat" else []
    return [*end, encoding.eot_token]


# ----- messages ----------------------------------------------------------------------------------


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
        if percent_of(message) and message.get("weight") is not None and role != "assistant":
            raise UserError(f"message {i}: weight {message['weight']} on a {role} message; only "
                            "assistant messages are trained")
    if has_system and len(messages) == 1:
        raise UserError("there is only a system message; add a user message")


def percent_of(message: dict) -> int:
    """The message's loss weight as an integer percent, at least 1 if positive; default: 100."""
    weight = message.get("weight")
    weight = 1 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
        raise UserError(f"weight {weight!r} is not a number from 0 to 1")
    return max(1, round(100 * weight)) if weight > 0 else 0


# ----- templates: a rendered part is (text, is_special, loss weight in percent) ------------------


def content_of(message: dict) -> str:
    """The content and, after a blank line, a user message's Alpaca `input`, if any."""
    return "\n\n".join(part for part in (message["content"], message.get("input")) if part)


def prompt_parts(messages: list[dict], template: str) -> list[tuple[str, bool, int]]:
    """The prompt: everything up to where the answer to the last user message begins."""
    if template == "alpaca":
        if len(messages) != 1:
            raise UserError("the alpaca template takes one user message and one answer, and no "
                            f"system message, but got {len(messages) + 1} messages; use "
                            "--template chat")
        text = ALPACA_WITH_INPUT if messages[0].get("input") else ALPACA
        fields = {"content": messages[0]["content"], "input": messages[0].get("input")}
        return [(text.format(**fields), False, 0)]
    parts = []
    for message in messages:
        percent = percent_of(message) if message["role"] == "assistant" else 0
        if template == "raw":
            parts.append((content_of(message), False, percent))
        else:
            parts.append((f"<|{message['role']}|>", True, 0))
            parts.append((content_of(message), False, percent))
            parts.append(("<|end|>", True, percent))
    return parts + ([("<|assistant|>", True, 0)] if template == "chat" else [])


def answer_parts(message: dict, template: str) -> list[tuple[str, bool, int]]:
    """The last answer and its end token, trained as well: the model must learn to stop."""
    percent = percent_of(message)
    if template == "chat":
        ends = [("<|end|>", True, percent), (END_OF_TEXT, True, 0)]
    else:
        ends = [(END_OF_TEXT, True, percent)]
    return [(message["content"], False, percent), *ends]


def encode(encoding: tiktoken.Encoding, parts: list) -> tuple[list[int], list[int]]:
    """Encode each part separately, so no BPE merge crosses from prompt to answer."""
    ids, weights = [], []
    for text, is_special, percent in parts:
        new = [encoding.encode_single_token(text)] if is_special else encoding.encode_ordinary(text)
        ids += new
        weights += [percent] * len(new)
    return ids, weights


def render(encoding: tiktoken.Encoding, messages: list[dict], template: str = "chat",
           train_on: str = "all_turns") -> tuple[list[int], list[int]]:
    """One training example, <|endoftext|> included: (ids, loss weight of each id in percent).

    train_on: `all_turns`, or `last_turn`, which keeps the earlier answers as context.
    UserError: wrong template for these messages, roles out of order, empty answer, bad weight.
    """
    require_choice("template", template, TEMPLATES)
    require_choice("train_on", train_on, ("all_turns", "last_turn"))
    check_messages(messages)
    *context, answer = messages
    if answer["role"] != "assistant":
        raise UserError(f"the last message has role {answer['role']!r}, expected 'assistant'")
    if train_on == "last_turn":
        context = [message | {"weight": 0} for message in context]
    prompt = prompt_parts(context, template)
    return encode(encoding, prompt + answer_parts(answer, template))


def render_text(encoding: tiktoken.Encoding, text: str) -> tuple[list[int], list[int]]:
    """A row of plain text, `{"text": …}`: all of it is trained, as in pretraining."""
    return encode(encoding, [(text, False, 100), (END_OF_TEXT, True, 100)])


def render_prompt(encoding: tiktoken.Encoding, messages: list[dict],
                  template: str = "chat") -> list[int]:
    """What the model sees before it answers: exactly a prefix of `render`'s ids.

    A final assistant message is left out, so a training example can be passed unchanged.
    """
    require_choice("template", template, TEMPLATES)
    check_messages(messages)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if messages[-1]["role"] != "user":
        raise UserError("there is no user message to answer")
    return encode(encoding, prompt_parts(messages, template))[0]
