"""A checkpoint that answers, and how answers are scored: for evaluate.py, chat.py, and training."""

import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
from torch import Tensor

from model import GPT
from nanosft import fast, hf_tokenizer
from nanosft.errors import UserError, one_line
from nanosft.weights import find_model, pad_vocab, read_config
from tokenizer import ALPACA, ALPACA_WITH_INPUT, ENCODINGS, TEMPLATES, get_encoding, stop_ids


class Answer(NamedTuple):
    text: str
    n_tokens: int
    stopped: bool  # ended by the template's end token, not by running out of room


class Assistant(NamedTuple):
    model: GPT
    encoding: tiktoken.Encoding
    template: str | None  # None: a base model, which has seen no chats

    def answer(self, prompts: list[list[int]], max_new_tokens: int, batch_size: int = 32,
               temperature: float = 0.0, seed: int = 0, in_step: Callable = iter) -> list[Answer]:
        """The answer to each prompt (ids); its text does not include the end token.

        Prompts of similar length are batched together, which saves padding. in_step: Ranks.in_step.
        """
        stops, answers = stop_ids(self.encoding, self.template), {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in in_step(range(0, len(prompts), batch_size)):
            batch = order[start : start + batch_size]
            new = self.model.generate([prompts[i] for i in batch], max_new_tokens, temperature,
                                      stop_ids=stops, seed=seed + start)
            for i, ids in zip(batch, new):
                stopped = bool(ids) and ids[-1] in stops
                text = self.encoding.decode(ids[:-1] if stopped else ids)
                answers[i] = Answer(text, len(ids), stopped)
        return [answers[i] for i in range(len(prompts))]


def load_assistant(name: str, device: str | torch.device = "cpu") -> Assistant:
    """Load what GPT.from_pretrained takes; its config.json names the encoding and template."""
    settings = read_config(find_model(name))
    encoding_name, template = settings.get("encoding", "gpt2"), settings.get("template")
    if encoding_name not in ENCODINGS or template not in (None, *TEMPLATES):
        raise UserError(f"{name}/config.json: unknown encoding {encoding_name!r} or template "
                        f"{template!r}")
    encoding = get_encoding(encoding_name)
    model = GPT.from_pretrained(name, encoding).to(device).eval()
    if pad_vocab(encoding.n_vocab) != model.config.vocab_size:
        raise UserError(f"{name}: the model has {model.config.vocab_size} ids, but its encoding "
                        f"{encoding_name} has {pad_vocab(encoding.n_vocab)} with padding; fix "
                        "`encoding` in its config.json")
    model.config.n_vocab = min(model.config.n_vocab, encoding.n_vocab)  # all that decode() takes
    return Assistant(fast.speed_up(model), encoding, template)


def save_model(folder: str | Path, model: GPT, encoding: str | None = None,
               template: str | None = None, **settings) -> None:
    """Write a model and, if an encoding is given, its tokenizer files (nanosft/hf_tokenizer.py).

    template None: without chat templates. settings: extra keys of config.json.
    """
    if encoding is None:
        return model.save_pretrained(folder, **settings)
    names = {"encoding": encoding} | ({"template": template} if template else {})
    tokens, stops = get_encoding(encoding), stop_ids(get_encoding(encoding), template)
    model.save_pretrained(folder, **names, **hf_tokenizer.special_ids(tokens, stops), **settings)
    hf_tokenizer.write_files(Path(folder), model.config, tokens, stops, template,
                             (ALPACA, ALPACA_WITH_INPUT))


def cut_prompt(ids: list[int], room: int, block_size: int, where: str) -> list[int]:
    """Cut a prompt on the left to leave `room` tokens for the answer; warn if it was cut."""
    keep = block_size - room
    if len(ids) > keep:
        print(one_line(f"{where}: the prompt has {len(ids)} tokens, but the model has {block_size} "
                       f"positions and the answer needs up to {room}; cut the first "
                       f"{len(ids) - keep} tokens of the prompt"), file=sys.stderr)
    return ids[-keep:]


# ----- scores ------------------------------------------------------------------------------------

# What may stand around a number: currency, LaTeX, and Markdown
BEFORE = r"(?:\\(?:boxed|text|mathbf)|\\[(\[]|[\s*_`$£€¥₹₩¢\\{(])*"
AFTER = r"[\s*_`$£€¥₹₩¢%\\})\].\u200b]*"
# name -> pattern whose last group is the answer
EXTRACTIONS = {
    "gsm8k": re.compile(
        rf".*####{BEFORE}(?:([-+\u2010-\u2014\u2212\ufe63\uff0d]){BEFORE})?"
        rf"(\d(?:[\d,]|\{{,\}}|\\,)*(?:\.\d*)?(?:[eE][-+]?\d{{1,3}})?|\.\d+){AFTER}", re.DOTALL),
    "answer": re.compile(r".*</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL),
    "whole": re.compile(r"\s*(\S.*?)\s*", re.DOTALL),
}


def extraction_for(references: Sequence[str]) -> str:
    """The first extraction that fits all reference answers."""
    return next((how for how in EXTRACTIONS
                 if all(extract(reference, how) is not None for reference in references)), "whole")


def extract(text: str, how: str) -> str | Decimal | None:
    """The part of an answer to compare, in `gsm8k` a number; None if its format is wrong.

    >>> extract("48/2 = 24 clips. #### $1,024.00", "gsm8k") == 1024
    True
    """
    match = EXTRACTIONS[how].fullmatch(text)
    if match is None or how != "gsm8k":
        return match and match[1].strip()
    sign, digits = match.groups()
    return Decimal(("" if sign in (None, "+") else "-") + re.sub(r"[,{}\\]", "", digits))


def score(answer: Answer, reference: str, how: str) -> dict[str, bool]:
    """Is it correct, is its format valid (only if it stopped), and did it stop by itself?"""
    part = extract(answer.text, how) if answer.stopped else None
    right = part is not None and part == extract(reference, how)
    return {"right": right, "formed": part is not None, "stopped": answer.stopped}


def answer_samples(assistant: Assistant, pairs: list[tuple[list[int], list[int]]], ranks) -> dict:
    """Answer (prompt, reference) pairs of ids, split over the ranks; score all, print the first.

    Besides the scores, `val_answers` holds the answers, which the trainer saves.
    """
    if not pairs:
        return {}
    model, encoding, _ = assistant
    room, block_size = 16 + max(len(reference) for _, reference in pairs), model.config.block_size
    mine = pairs[ranks.rank :: ranks.world_size]
    answers = assistant.answer([ids[-max(1, block_size - room) :] for ids, _ in mine], room,
                               in_step=ranks.in_step)
    how = extraction_for([encoding.decode(reference) for _, reference in pairs])
    records = []
    for (ids, reference_ids), answer in zip(mine, answers):
        reference = encoding.decode(reference_ids)
        records.append({"prompt": encoding.decode(ids), "reference": reference,
                        "answer": answer.text, **score(answer, reference, how)})
    records = ranks.gather(records)
    first = records[0]
    ranks.print(f"prompt  …{first['prompt'][-80:]!r}\n  answer    {first['answer'][:80]!r}\n"
                f"  reference {first['reference'][:80]!r}")
    keys = {"val_answer_accuracy": "right", "val_format_accuracy": "formed",
            "val_stop_rate": "stopped"}
    means = {name: sum(r[key] for r in records) / len(records) for name, key in keys.items()}
    return means | {"val_answers": records}


# ----- prompts and answers as tensors ------------------------------------------------------------


def tokenize_prompt_and_output(encoding, prompts: Sequence, outputs: Sequence) -> dict[str, Tensor]:
    """input_ids, labels, and response_mask, each (B, longest - 1), of prompts followed by outputs.

    Prompts and outputs are strings, or ids if they contain special tokens. Each is encoded
    separately; the pair is concatenated and right-padded with <|endoftext|>. labels are the inputs
    shifted by one; response_mask is True where the label is an output token.
    """
    if len(prompts) != len(outputs):
        raise UserError(f"{len(prompts)} prompts and {len(outputs)} outputs; pass one output "
                        "per prompt")

    def encode(text):
        return encoding.encode_ordinary(text) if isinstance(text, str) else list(text)

    pairs = [(encode(prompt), encode(output)) for prompt, output in zip(prompts, outputs)]
    longest = max((len(prompt) + len(output) for prompt, output in pairs), default=1)
    ids = torch.full((len(pairs), longest), encoding.eot_token)
    is_output = torch.zeros(len(pairs), longest, dtype=torch.bool)
    for i, (prompt, output) in enumerate(pairs):
        end = len(prompt) + len(output)
        ids[i, :end] = torch.tensor(prompt + output, dtype=torch.long)
        is_output[i, len(prompt) : end] = True
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": is_output[:, 1:]}
