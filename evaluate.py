"""How good are a model's answers? Each row's prompt is answered and compared with its reference.

    python evaluate.py --model out/sft --data val.jsonl
    torchrun --standalone --nproc_per_node=2 evaluate.py --model out/sft --data val.jsonl

Prints a table and, last, one JSON line. Accuracy is exact match after an extraction with a name;
the loss is that of the reference answers, in nats per token of theirs, <|end|> included.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from fineweb import read_rows, run_cli
from model import GPT, IGNORE_INDEX, find_model, pad_vocab, read_config
from sft_data import SFTDataset, messages_of, tokenize_prompt_and_output
from tokenizer import ENCODINGS, TEMPLATES, get_encoding, render, render_prompt, stop_ids
from train_gpt2 import MicroBatch, Run, evaluate as token_loss, setup_distributed


@dataclasses.dataclass
class Config:
    """Answer every row of a file and score the answers."""

    model: str
    """a checkpoint or run folder of ours, a Hugging Face folder, a GPT-2 name or a hub id"""
    data: str
    """.jsonl, .json or .parquet rows with a reference answer (the forms of sft_data.py)"""
    extract: Literal["auto", "whole", "gsm8k", "answer"] = "auto"
    """what of an answer is compared: all of it; N of `#### N`; <answer>N</answer> after </think>"""
    template: Literal["chat", "alpaca", "raw"] | None = None
    """default: the one that the model was trained with, else chat"""
    max_examples: int | None = None
    max_new_tokens: int = 256
    batch_size: int = 32
    temperature: float = 0.0
    seed: int = 0
    save: str | None = None
    """write every prompt with its answer to this .jsonl"""
    device: str = "auto"


class Answer(NamedTuple):
    text: str
    n_tokens: int
    stopped: bool  # ended by the template's end token, not by running out of room


# ----- a model and its tokenizer -----------------------------------------------------------------


def load_assistant(name: str, device="cpu"):
    """(model, encoding, template or None) of a checkpoint; a plain GPT-2 has no template."""
    settings = read_config(find_model(name))
    model = GPT.from_pretrained(name).to(device).eval()
    encoding_name = settings.get("encoding", "gpt2")
    template = settings.get("template")
    if encoding_name not in ENCODINGS or template not in (None, *TEMPLATES):
        raise ValueError(
            f"{name}/config.json: unknown encoding {encoding_name!r} or template {template!r}"
        )
    encoding = get_encoding(encoding_name)
    if pad_vocab(encoding.n_vocab) != model.config.vocab_size:
        raise ValueError(
            f"{name}: the model has {model.config.vocab_size} ids, its encoding {encoding_name} "
            f"{pad_vocab(encoding.n_vocab)} with padding; correct `encoding` in its config.json"
        )
    return model, encoding, template


def cut_prompt(ids: list[int], room: int, block_size: int, where: str) -> list[int]:
    """The end of a prompt that leaves no `room` tokens for the answer, with a warning."""
    keep = max(1, block_size - room)
    if len(ids) > keep:
        message = f"{where}: the prompt has {len(ids)} tokens, the model {block_size} places, the "
        message += f"answer up to {room}; cut {len(ids) - keep} tokens from the prompt's start"
        print(message, file=sys.stderr)
    return ids[-keep:]


# ----- answers -----------------------------------------------------------------------------------


def answer_prompts(
    model: GPT, encoding, template: str, prompts: list[list[int]], max_new_tokens: int,
    batch_size: int = 32, temperature: float = 0.0, seed: int = 0,
) -> list[Answer]:  # fmt: skip
    """The model's answer to each prompt (ids), its end token left out of the text."""
    stops, answers = stop_ids(encoding, template), []
    for at in range(0, len(prompts), batch_size):
        batch = prompts[at : at + batch_size]
        for ids in model.generate(
            batch, max_new_tokens, temperature, stop_ids=stops, seed=seed + at
        ):
            stopped = bool(ids) and ids[-1] in stops
            text = encoding.decode(ids[:-1] if stopped else ids)
            answers.append(Answer(text, len(ids), stopped))
    return answers


# name -> pattern whose first group is the answer
EXTRACTIONS = {
    "whole": re.compile(r"\s*(\S.*?)\s*", re.DOTALL),
    "gsm8k": re.compile(r".*####\s*\$?(-?[\d.,]*\d)\.?\s*", re.DOTALL),
    "answer": re.compile(r".*</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL),
}


def extraction_for(reference: str) -> str:
    """The first of gsm8k and answer that fits a reference answer, else whole."""
    fits = (name for name in ("gsm8k", "answer") if EXTRACTIONS[name].fullmatch(reference))
    return next(fits, "whole")


def extract(text: str, how: str) -> str | None:
    """The part of an answer that is compared, or None where the format is wrong.

    >>> extract("48/2 = 24 clips. #### 1,024", "gsm8k")
    '1024'
    """
    match = EXTRACTIONS[how].fullmatch(text)
    if match is None:
        return None
    found = match[1].strip()
    return found.replace(",", "") if how == "gsm8k" else found


def score(answer: Answer, reference: str, how: str) -> dict[str, bool]:
    """Right, of the right form (an answer that never ends has none), ended by itself."""
    found = extract(answer.text, how) if answer.stopped else None
    right = found is not None and found == extract(reference, how)
    return {"right": right, "formed": found is not None, "stopped": answer.stopped}


def answer_samples(
    model: GPT, encoding, template: str, val: SFTDataset, n: int, run: Run
) -> dict[str, float]:
    """What train_sft.py --eval_every adds: answers to the first n validation prompts, scored."""
    pairs = list(prompts_in(val, encoding, n))
    if not pairs:
        return {}
    sums = torch.zeros(2, device=run.device)
    mine = pairs[run.rank :: run.world_size]
    room = 16 + max(len(encoding.encode_ordinary(reference)) for _, reference in pairs)
    block_size = model.config.block_size
    prompts = [prompt[-max(1, block_size - room) :] for prompt, _ in mine]
    answers = answer_prompts(model, encoding, template, prompts, room)
    for answer, (_, reference) in zip(answers, mine):
        scores = score(answer, reference, extraction_for(reference))
        sums += torch.tensor([scores["right"], scores["stopped"]], device=run.device)
    if run.is_main:
        run.print(
            f"asked  …{encoding.decode(mine[0][0])[-80:]!r}\n"
            f"  gave {answers[0].text[:80]!r}\n  want {mine[0][1][:80]!r}"
        )
    right, stopped = (run.sum(sums) / len(pairs)).tolist()
    return {"val_answer_accuracy": right, "val_stop_rate": stopped}


def prompts_in(dataset: SFTDataset, encoding, n: int) -> Iterator[tuple[list[int], str]]:
    """(prompt ids, reference answer) of the first n examples, told apart by their weights."""
    for example in range(min(n, len(dataset.starts))):
        ids, weights = dataset._tokens(example, 0, int(dataset.all_lengths[example])).tolist()
        begin = next((i for i, weight in enumerate(weights) if weight), 0)
        end = next((i for i in range(begin, len(ids)) if ids[i] >= encoding.eot_token), len(ids))
        if begin and encoding.decode(ids[begin:end]):
            yield ids[:begin], encoding.decode(ids[begin:end])


# ----- the command -------------------------------------------------------------------------------


def read_questions(path: str, encoding, template: str, limit: int | None) -> list[dict]:
    """Rows with a reference answer: the messages, the prompt's ids, the reference and its ids."""
    questions = []
    for place, row in read_rows(path):
        if limit is not None and len(questions) == limit:
            break
        try:
            messages = messages_of(row)
            if isinstance(messages, str):
                raise ValueError("a {text} row has no reference answer")
            ids, _ = render(encoding, messages, template)
            prompt = render_prompt(encoding, messages, template)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if not messages[-2]["content"] and not messages[-2].get("input"):
            raise ValueError(f"{place}: the prompt is empty")
        answer = ids[len(prompt) :]
        if template == "chat":
            answer = answer[:-1]  # <|end|> is the last trained id
        questions.append({"place": place, "prompt": prompt, "answer": answer, "messages": messages,
                          "reference": messages[-1]["content"]})  # fmt: skip
    if not questions:
        raise ValueError(f"{path}: no rows")
    return questions


def reference_batches(questions: list[dict], encoding, batch_size: int, block_size: int):
    """The reference answers after their prompts; a pair that is too long loses its start."""
    for at in range(0, len(questions), batch_size):
        batch = questions[at : at + batch_size]
        answers = [q["answer"][:block_size] for q in batch]
        prompts = [q["prompt"][-(block_size + 1 - len(a)) :] if len(a) <= block_size else []
                   for q, a in zip(batch, answers)]  # fmt: skip
        rows = tokenize_prompt_and_output(encoding, prompts, answers)
        y = rows["labels"].masked_fill(~rows["response_mask"], IGNORE_INDEX)
        yield MicroBatch(rows["input_ids"], y, n_tokens=y.numel())


def summarise(records: list[dict], how: str) -> dict:
    n = len(records)
    return {
        "rows": n,
        "extract": how,
        "answer_acc": sum(r["right"] for r in records) / n,
        "format_acc": sum(r["formed"] for r in records) / n,
        "stop_rate": sum(r["stopped"] for r in records) / n,
        "mean_tokens": sum(r["tokens"] for r in records) / n,
    }


def main(config: Config) -> None:
    # --- 1. model and rows ---
    for name in ("batch_size", "max_new_tokens", "max_examples"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"--{name} {getattr(config, name)}: it must be at least 1")
    run = setup_distributed(config.device)
    model, encoding, template = load_assistant(config.model, run.device)
    template = config.template or template or "chat"
    questions = read_questions(config.data, encoding, template, config.max_examples)
    how = extraction_for(questions[0]["reference"]) if config.extract == "auto" else config.extract
    for question in questions:
        if extract(question["reference"], how) is None:
            raise ValueError(f"{question['place']}: the reference is not of the form {how!r}; "
                             "choose another --extract")  # fmt: skip

    # --- 2. each rank answers its share, each row once ---
    numbers = range(run.rank, len(questions), run.world_size)
    mine = [questions[i] for i in numbers]
    # Half of the context is the prompt's for sure, as in chat.py, or a short context would leave
    # one token of it. The answer may take all that the prompt leaves free.
    room = min(config.max_new_tokens, model.config.block_size // 2)
    prompts = [cut_prompt(q["prompt"], room, model.config.block_size, q["place"]) for q in mine]
    answers = answer_prompts(model, encoding, template, prompts, config.max_new_tokens,
                             config.batch_size, config.temperature, config.seed)  # fmt: skip
    records = [
        {"row": i, "messages": q["messages"][:-1], "reference": q["reference"], "answer": a.text,
         "tokens": a.n_tokens, **score(a, q["reference"], how)}
        for i, q, a in zip(numbers, mine, answers)
    ]  # fmt: skip
    batches = reference_batches(mine, encoding, config.batch_size, model.config.block_size)
    losses = token_loss(model, batches, run)

    # --- 3. together ---
    if run.world_size > 1:
        gathered = [None] * run.world_size
        dist.all_gather_object(gathered, records)
        records = sorted((r for part in gathered for r in part), key=lambda record: record["row"])
        dist.barrier()  # see finish in train_gpt2.py
        dist.destroy_process_group()
    if not run.is_main:
        return
    if config.save:
        Path(config.save).parent.mkdir(parents=True, exist_ok=True)
        Path(config.save).write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        )
    result = {"model": config.model, "data": config.data, **summarise(records, how), **losses}
    for key, value in result.items():
        print(f"{key:14} {value:.4f}" if isinstance(value, float) else f"{key:14} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    run_cli(main, Config)
