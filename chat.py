"""Chat with a checkpoint in the terminal; a base model continues your text instead.

    python chat.py --model out/sft
    python chat.py --model out/sft --prompt "What is 2+2?"

In the chat: /reset clears the turns, /system TEXT sets the system message, /quit exits.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le

import generate
from answer import cut_prompt, load_assistant
from nanosft.cli import run_cli
from nanosft.errors import UserError, one_line
from nanosft.ranks import Dtype, setup_distributed
from tokenizer import render_prompt, stop_ids


@dataclasses.dataclass
class Config:
    """Chat with a model."""

    model: str
    """a nanosft checkpoint or run folder, a Hugging Face folder, a GPT-2 name, or a hub id"""
    prompt: str | None = None
    """answer this and exit"""
    system: str | None = None
    """system message; needs a model trained with the chat template"""
    temperature: Annotated[float, Ge(0)] = 0.7
    """of sampling; 0: greedy decoding"""
    top_k: Annotated[int | None, Ge(1)] = 50
    """sample from the k most likely tokens; None: all"""
    top_p: Annotated[float | None, Gt(0), Le(1)] = None
    """sample from the most likely tokens with this total probability; None: all"""
    max_new_tokens: Annotated[int, Ge(1)] = 256
    """the longest answer, in tokens"""
    seed: int = 0
    """of sampling"""
    device: str = "auto"
    """auto, cuda, mps, or cpu"""
    dtype: Dtype = "auto"
    """of the weights; auto: bfloat16 on GPUs that support it, else float32"""


class Chat:
    """The turns so far, and a model that answers the last one."""

    def __init__(self, config: Config):
        self.config = config
        self.ranks = setup_distributed(config.device, dtype=config.dtype)
        self.model, self.encoding, self.template = load_assistant(config.model, self.ranks.device)
        self.model.to(getattr(torch, self.ranks.dtype))
        self.reset(config.system)

    def reset(self, system: str | None = None) -> None:
        if system and self.template != "chat":
            raise UserError(f"a system message needs the chat template, but this model has "
                            f"{self.template}; leave it out")
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns = []

    def prompt_ids(self, text: str) -> list[int]:
        """The prompt's ids; the oldest turns are dropped if they do not fit in the context."""
        if not text.strip():
            raise UserError("the prompt is empty")
        room = min(self.config.max_new_tokens, self.model.config.block_size // 2)
        if self.template is None:
            ids = self.encoding.encode_ordinary(text)
        else:
            if self.template != "chat":
                self.turns = []  # the other templates are single-turn
            question = [{"role": "user", "content": text}]
            ids = render_prompt(self.encoding, self.system + self.turns + question, self.template)
            while self.turns and len(ids) + room > self.model.config.block_size:
                self.turns = self.turns[2:]
                print("(dropped the oldest turn: it no longer fits)")
                messages = self.system + self.turns + question
                ids = render_prompt(self.encoding, messages, self.template)
        return cut_prompt(ids, room, self.model.config.block_size, "chat")

    def answer(self, text: str) -> Iterator[str]:
        """Yield pieces of the answer as they are generated; then keep the finished turn."""
        prompt = self.prompt_ids(text)
        stops = stop_ids(self.encoding, self.template)
        ids, shown = [], ""
        for step in generate.stream(
            self.model, [prompt], self.config.max_new_tokens, self.config.temperature,
            top_k=self.config.top_k, top_p=self.config.top_p, stop_ids=stops,
            seed=self.config.seed + len(self.turns),
        ):
            token = step[0][1]
            if token in stops:
                break
            ids.append(token)
            whole = self.encoding.decode(ids)
            if not whole.endswith("\ufffd"):  # wait for the rest of a multi-byte character
                yield whole[len(shown) :]
                shown = whole
        answer = self.encoding.decode(ids)
        yield answer[len(shown) :]
        if answer:
            self.turns += [{"role": "user", "content": text},
                           {"role": "assistant", "content": answer}]


def say(chat: Chat, text: str) -> None:
    for piece in chat.answer(text):
        print(piece, end="", flush=True)
    print()


def main(config: Config) -> None:
    chat = Chat(config)
    if chat.template is None:
        print("(a base model, not fine-tuned on chats: it continues your text)")
    if config.prompt is not None:
        return say(chat, config.prompt)
    print("/reset clears the turns, /system TEXT sets the system message, /quit exits")
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        try:
            if text == "/quit":
                return
            if text == "/reset":
                chat.turns = []
            elif text.split(maxsplit=1)[:1] == ["/system"]:
                chat.reset(text.removeprefix("/system").strip())
            else:
                say(chat, text)
        except UserError as error:
            print(f"({one_line(str(error))})")
        except KeyboardInterrupt:
            print("\n(stopped)")


if __name__ == "__main__":
    run_cli(main, Config)
