"""Talk to a checkpoint in the terminal; a model that never saw a chat continues your text instead.

    python chat.py --model out/sft
    python chat.py --model out/sft --prompt "What is 2+2?"

In the chat: /reset forgets the turns, /system TEXT sets the system message, /quit ends.
"""

import dataclasses
from collections.abc import Iterator

from evaluate import cut_prompt, load_assistant
from fineweb import run_cli
from tokenizer import render_prompt, stop_ids
from train_gpt2 import setup_distributed


@dataclasses.dataclass
class Config:
    """Chat with a model."""

    model: str
    """a checkpoint or run folder of ours, a Hugging Face folder, a GPT-2 name or a hub id"""
    prompt: str | None = None
    """answer this and end"""
    system: str | None = None
    temperature: float = 0.7
    """0: always the likeliest token"""
    top_k: int | None = 50
    top_p: float | None = None
    max_new_tokens: int = 256
    seed: int = 0
    device: str = "auto"


class Chat:
    """The turns so far, and a model that answers the last one."""

    def __init__(self, config: Config):
        self.config = config
        self.model, self.encoding, self.template = load_assistant(
            config.model, setup_distributed(config.device).device
        )
        self.reset(config.system)

    def reset(self, system: str | None = None) -> None:
        if system and self.template != "chat":
            raise ValueError(
                f"a system message needs the chat template, this model has {self.template}"
            )
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns = []

    def prompt_ids(self, text: str) -> list[int]:
        """The ids that the model reads; the oldest turns go where the context is too short."""
        if not text.strip():
            raise ValueError("the prompt is empty")
        room = min(self.config.max_new_tokens, self.model.config.block_size // 2)
        if self.template is None:
            ids = self.encoding.encode_ordinary(text)
        else:
            if self.template != "chat":
                self.turns = []  # one turn is all that the other templates know
            question = [{"role": "user", "content": text}]
            ids = render_prompt(self.encoding, self.system + self.turns + question, self.template)
            while self.turns and len(ids) + room > self.model.config.block_size:
                self.turns = self.turns[2:]
                print("(the oldest turn no longer fits and is forgotten)")
                ids = render_prompt(
                    self.encoding, self.system + self.turns + question, self.template
                )
        return cut_prompt(ids, room, self.model.config.block_size, "chat")

    def answer(self, text: str) -> Iterator[str]:
        """Pieces of the answer as they come; the finished turn is kept."""
        prompt = self.prompt_ids(text)
        stops = stop_ids(self.encoding, self.template or "raw")
        ids, shown = [], ""
        for step in self.model.stream(
            [prompt], self.config.max_new_tokens, self.config.temperature, top_k=self.config.top_k,
            top_p=self.config.top_p, stop_ids=stops, seed=self.config.seed + len(self.turns),
        ):  # fmt: skip
            token = step[0][1]
            if token in stops:
                break
            ids.append(token)
            whole = self.encoding.decode(ids)
            if not whole.endswith("\ufffd"):  # half a character waits for its other half
                yield whole[len(shown) :]
                shown = whole
        answer = self.encoding.decode(ids)
        yield answer[len(shown) :]
        if answer:
            self.turns += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": answer},
            ]


def say(chat: Chat, text: str) -> None:
    for piece in chat.answer(text):
        print(piece, end="", flush=True)
    print()


def main(config: Config) -> None:
    chat = Chat(config)
    if chat.template is None:
        print("(this model was not fine-tuned on chats: it continues your text)")
    if config.prompt is not None:
        return say(chat, config.prompt)
    print("/reset forgets the turns, /system TEXT sets the system message, /quit ends")
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
        except ValueError as error:
            print(f"({error})")
        except KeyboardInterrupt:
            print("\n(stopped)")


if __name__ == "__main__":
    run_cli(main, Config)
