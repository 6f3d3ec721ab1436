"""Score a model: answer the prompt of each row and compare the answer with the reference.

    python evaluate.py --model out/sft --data val.jsonl
    torchrun --standalone --nproc_per_node=2 evaluate.py --model out/sft --data val.jsonl

Prints a table, then one JSON line. Accuracy is exact match after an extraction (--extract); the
loss is that of the reference answers, in nats per token, end token included.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge

from answer import (
    EXTRACTIONS,
    Assistant,
    cut_prompt,
    extract,
    extraction_for,
    load_assistant,
    score,
    tokenize_prompt_and_output,
)
from model import GPT, IGNORE_INDEX
from nanosft import fast
from nanosft.cli import run_cli
from nanosft.errors import UserError, to_json
from nanosft.forms import Counts, Reading, examined, messages_of
from nanosft.ranks import Dtype, Ranks, setup_distributed
from nanosft.sources import read_sources
from tokenizer import Template, render, render_prompt
from train_gpt2 import MicroBatch, evaluate as token_loss


@dataclasses.dataclass
class Config(Reading):
    """Answer every row of a file and score the answers."""

    model: str
    """a nanosft checkpoint or run folder, a Hugging Face folder, a GPT-2 name, or a hub id"""
    data: str
    """rows with a reference answer: a file or a hub dataset, as --source of sft_data.py"""
    extract: Literal[("auto", *EXTRACTIONS)] = "auto"
    """gsm8k: the number of `#### N`; answer: <answer>N</answer>; auto: what fits all references"""
    template: Template | None = None
    """of the prompts; None: the one the model was trained with, or chat for a base model"""
    max_examples: Annotated[int | None, Ge(1)] = None
    """answer only the first N rows; None: all"""
    max_new_tokens: Annotated[int, Ge(1)] = 256
    """the longest answer, in tokens"""
    batch_size: Annotated[int | None, Ge(1)] = None
    """prompts answered at once on each rank; default: 32, on a GPU without sampling up to 256"""
    temperature: Annotated[float, Ge(0)] = 0.0
    """of sampling; 0: greedy decoding"""
    seed: int = 0
    """of sampling"""
    save: str | None = None
    """write each prompt with its answer to this .jsonl file"""
    device: str = "auto"
    """auto, cuda, mps, or cpu"""
    dtype: Dtype = "auto"
    """of the weights; auto: bfloat16 on GPUs that support it, else float32"""


def read_questions(config: Config, assistant: Assistant) -> list[dict]:
    """Rows with a reference: the messages, the prompt's ids, the reference, and its ids."""
    questions, encoding, template = [], assistant.encoding, assistant.template
    for place, row in examined(read_sources([config.data], config, Counts()), config):
        if len(questions) == config.max_examples:
            break
        try:
            messages = messages_of(row, config)
            if isinstance(messages, str):
                raise UserError("a {text} row has no reference answer")
            ids, _ = render(encoding, messages, template)
            prompt = render_prompt(encoding, messages, template)
            if not messages[-2]["content"] and not messages[-2].get("input"):
                raise UserError("the prompt is empty")
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        answer = ids[len(prompt) :]
        if template == "chat":  # <|end|> ends an answer, or <|endoftext|> if the model has no other
            answer.pop(-1 if answer[-2] < assistant.model.config.n_vocab else -2)
        questions.append({"place": place, "prompt": prompt, "answer": answer, "messages": messages,
                          "reference": messages[-1]["content"]})
    if not questions:
        raise UserError(f"{config.data}: no rows")
    return questions


def choose_extraction(config: Config, questions: list[dict]) -> str:
    """--extract, or what fits all references; UserError if a reference lacks that format."""
    references = [question["reference"] for question in questions]
    how = extraction_for(references) if config.extract == "auto" else config.extract
    for question in questions:
        if extract(question["reference"], how) is None:
            raise UserError(f"{question['place']}: the reference does not have the format {how!r}; "
                            "choose another --extract")
    return how


def answer_questions(config: Config, assistant: Assistant, questions: list[dict], how: str,
                     ranks: Ranks) -> list[dict]:
    """One record per question of this rank: the answer and its scores."""
    block_size, mine = assistant.model.config.block_size, questions[ranks.rank :: ranks.world_size]
    # As in chat.py, the prompt may use at least half of the context; otherwise a large
    # --max_new_tokens would leave one token of it. The answer may use all that the prompt leaves.
    room = min(config.max_new_tokens, block_size // 2)
    prompts = [cut_prompt(q["prompt"], room, block_size, q["place"]) for q in mine]
    answers = assistant.answer(prompts, config.max_new_tokens,
                               rows_at_once(config, assistant.model, prompts),
                               config.temperature, config.seed, ranks.in_step)
    return [{"row": ranks.rank + i * ranks.world_size, "messages": q["messages"][:-1],
             "reference": q["reference"], "answer": a.text, "tokens": a.n_tokens,
             **score(a, q["reference"], how)} for i, (q, a) in enumerate(zip(mine, answers))]


def rows_at_once(config: Config, model: GPT, prompts: list[list[int]]) -> int:
    """--batch_size, or as many rows as the free memory of the GPU takes."""
    if config.batch_size or config.temperature or not model.lm_head.weight.is_cuda:
        return config.batch_size or 32  # sampled answers depend on the batch
    longest = max(map(len, prompts), default=0) + config.max_new_tokens
    return fast.rows_that_fit(model, min(longest, model.config.block_size))


def reference_batches(config: Config, assistant: Assistant, questions: list[dict], ranks: Ranks,
                      ) -> Iterator[MicroBatch]:
    """This rank's prompts with their references; a pair that is too long is cut on the left."""
    block_size, mine = assistant.model.config.block_size, questions[ranks.rank :: ranks.world_size]
    B = config.batch_size or 32
    for start in ranks.in_step(range(0, len(mine), B)):
        batch = mine[start : start + B]
        answers = [q["answer"][:block_size] for q in batch]
        prompts = [q["prompt"][-(block_size + 1 - len(a)) :] for q, a in zip(batch, answers)]
        pairs = tokenize_prompt_and_output(assistant.encoding, prompts, answers)
        y = pairs["labels"].masked_fill(~pairs["response_mask"], IGNORE_INDEX)
        yield MicroBatch(pairs["input_ids"], y)


def main(config: Config) -> None:
    # --- 1. model and rows ---
    ranks = setup_distributed(config.device, dtype=config.dtype)
    assistant = load_assistant(config.model, ranks.device)
    assistant = assistant._replace(template=config.template or assistant.template or "chat")
    questions = read_questions(config, assistant)
    how = choose_extraction(config, questions)

    # --- 2. each rank judges its share of the references and answers its share of the prompts ---
    batches = reference_batches(config, assistant, questions, ranks)
    losses = token_loss(assistant.model, batches, ranks)
    assistant.model.to(getattr(torch, ranks.dtype))
    records = answer_questions(config, assistant, questions, how, ranks)

    # --- 3. gather and report ---
    records = ranks.gather(records)
    ranks.finish()
    if not ranks.is_main:
        return
    if config.save:
        lines = [to_json(record, ensure_ascii=False) + "\n" for record in records]
        Path(config.save).parent.mkdir(parents=True, exist_ok=True)
        Path(config.save).write_text("".join(lines), "utf-8", "backslashreplace")  # lone surrogates
    keys = {"answer_acc": "right", "format_acc": "formed", "stop_rate": "stopped",
            "mean_tokens": "tokens"}
    means = {name: sum(r[key] for r in records) / len(records) for name, key in keys.items()}
    result = {"model": config.model, "data": config.data, "rows": len(records), "extract": how,
              **means, **losses}
    for key, value in result.items():
        print(f"{key:14} {value:.4f}" if isinstance(value, float) else f"{key:14} {value}")
    print(to_json(result))


if __name__ == "__main__":
    run_cli(main, Config)
