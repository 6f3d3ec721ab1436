"""Text to token ids, and chats to token ids with a loss weight per token.

Two encodings: `gpt2` (GPT-2's BPE, downloaded once by tiktoken) and `bytes` (no file, no network).
Both have the same five special tokens, which only the renderer below ever emits: a user who types
`<|end|>` gets those seven characters.

>>> ids, weights = render(get_encoding("bytes"), [{"role": "user", "content": "hi"},
...                                               {"role": "assistant", "content": "yo"}])
>>> ids      # <|user|>  h    i  <|end|> <|assistant|> y    o  <|end|> <|endoftext|>
[258, 104, 105, 260, 259, 121, 111, 260, 256]
>>> weights  # percent: the loss covers the answer and its end token, not the question
[0, 0, 0, 0, 0, 100, 100, 100, 0]
"""

import functools
from typing import Literal, NamedTuple, get_args

import numpy as np
import tiktoken

from nanosft.errors import UserError, require_choice
from nanosft.forms import check_messages
from nanosft.long_text import LongTextEncoding

END_OF_TEXT = "<|endoftext|>"
# In id order. GPT-2's vocabulary ends with <|endoftext|> (50256); the other four take the next ids,
# which are free because the vocabulary is padded to a multiple of 64, so the model needs no change.
SPECIALS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
KEPT_ANSWER = 65535  # stored instead of 0 for an answer that is context under any --loss_on

EncodingName = Literal["gpt2", "bytes"]
Template = Literal["chat", "alpaca", "raw"]
TrainOn = Literal["all_turns", "last_turn"]
LossOn = Literal["response", "all"]
ENCODINGS, TEMPLATES = get_args(EncodingName), get_args(Template)

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


def render(encoding: tiktoken.Encoding, messages: list[dict], template: str = "chat",
           train_on: str = "all_turns") -> tuple[list[int], list[int]]:
    """One training example, <|endoftext|> included: (ids, loss weight of each id in percent).

    train_on: `all_turns`, or `last_turn`, which keeps the earlier answers as context.
    UserError: wrong template for these messages, roles out of order, empty answer, bad weight.
    """
    ids, stored = render_example(encoding, messages, template, train_on)
    return ids, weights_in_effect(np.array(stored), "response").tolist()


def render_example(encoding: tiktoken.Encoding, messages: list[dict], template: str,
                   train_on: str) -> tuple[list[int], list[int]]:
    """`render`'s ids with the weights that shards store: KEPT_ANSWER where an answer is context."""
    require_choice("train_on", train_on, get_args(TrainOn))
    check_messages(messages)
    *context, answer = messages
    if answer["role"] != "assistant":
        raise UserError(f"the last message has role {answer['role']!r}, expected 'assistant'")
    if train_on == "last_turn":
        context = [message | {"weight": 0, "parts": None} for message in context]
    return encode(encoding, prompt_parts(context, template) + answer_parts(answer, template))


def render_text(encoding: tiktoken.Encoding, text: str) -> tuple[list[int], list[int]]:
    """A row of plain text, `{"text": …}`: all of it is in the loss, as in pretraining."""
    return encode(encoding, [Part(text, 100), Part(END_OF_TEXT, 100, is_special=True)])


def render_prompt(encoding: tiktoken.Encoding, messages: list[dict],
                  template: str = "chat") -> list[int]:
    """What the model sees before it answers: exactly a prefix of `render`'s ids.

    A final assistant message is left out, so a training example can be passed unchanged.
    """
    check_messages(messages)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if messages[-1]["role"] != "user":
        raise UserError("there is no user message to answer")
    return encode(encoding, prompt_parts(messages, template))[0]


def weights_in_effect(stored: np.ndarray, loss_on: str) -> np.ndarray:
    """Stored weights -> those of the loss in percent; loss_on: `response` or `all`.

    >>> weights_in_effect(np.array([0, 50, KEPT_ANSWER]), "all")
    array([100, 100,   0])
    """
    return np.where(stored == KEPT_ANSWER, 0, stored if loss_on == "response" else 100)


# ----- templates ---------------------------------------------------------------------------------


class Part(NamedTuple):
    text: str
    weight: int = 0  # as stored
    is_special: bool = False  # a special token, not text


def prompt_parts(messages: list[dict], template: str) -> list[Part]:
    """The prompt: everything up to where the answer to the last user message begins."""
    require_choice("template", template, TEMPLATES)
    if template == "alpaca":
        return [Part(alpaca_prompt(messages))]
    if template == "raw":
        return [part for message in messages for part in text_parts(message)]
    parts = []
    for message in messages:
        text = text_parts(message)
        parts += [Part(f"<|{message['role']}|>", is_special=True), *text,
                  Part("<|end|>", text[-1].weight, is_special=True)]
    return [*parts, Part("<|assistant|>", is_special=True)]


def answer_parts(message: dict, template: str) -> list[Part]:
    """The last answer and its end token, of the same weight: the model must learn to stop."""
    text = text_parts(message)
    end = Part("<|end|>", text[-1].weight, is_special=True)
    if template == "chat":
        return [*text, end, Part(END_OF_TEXT, is_special=True)]
    return [*text, end._replace(text=END_OF_TEXT)]


def text_parts(message: dict) -> list[Part]:
    """The content and an `input`, if any; in pieces if parts of it have weights of their own."""
    return [Part("\n\n".join(filter(None, (part["content"], part.get("input")))), weight_of(part))
            for part in message.get("parts") or [message]]


def alpaca_prompt(messages: list[dict]) -> str:
    if len(messages) != 1:
        raise UserError("the alpaca template takes one user message and one answer, and no system "
                        f"message, but got {len(messages) + 1} messages; use --template chat")
    content, extra = messages[0]["content"], messages[0].get("input")
    return (ALPACA_WITH_INPUT if extra else ALPACA).format(content=content, input=extra)


def weight_of(message: dict) -> int:
    """As stored: 1 to 100 percent (default 100), KEPT_ANSWER if 0; 0 if it is no answer."""
    if message["role"] != "assistant":
        return 0
    weight = 1 if message.get("weight") is None else message["weight"]
    return max(1, round(100 * weight)) if weight > 0 else KEPT_ANSWER


def encode(encoding: tiktoken.Encoding, parts: list[Part]) -> tuple[list[int], list[int]]:
    """Encode each part separately, so no BPE merge crosses from prompt to answer."""
    ids, weights = [], []
    for text, weight, is_special in parts:
        new = [encoding.encode_single_token(text)] if is_special else encoding.encode_ordinary(text)
        ids += new
        weights += [weight] * len(new)
    return ids, weights


# ----- encodings ---------------------------------------------------------------------------------


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
    return LongTextEncoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


def stop_ids(encoding: tiktoken.Encoding, template: str | None) -> list[int]:
    """The ids that end an answer: <|endoftext|>, and in the chat template also <|end|>."""
    end = [encoding.encode_single_token("<|end|>")] if template == "chat" else []
    return [*end, encoding.eot_token]
