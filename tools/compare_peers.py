"""nanosft compared with its alternatives, on the same rows, model, and machine.

    pip install 'trl==1.16.*' 'transformers>=5'    # on a GPU also: flash-attn liger-kernel
    python -m tools.compare_peers --data openai/gsm8k:main
    python -m tools.compare_peers --only sft,generate_64 --repeats 5 --json out/peers.jsonl

For developers: --data needs the `gpt2` vocabulary. Peers that are not installed are left out.
The contenders take turns, `repeats` times, each time in a process of its own; the table has
medians and ranges. Peers:
- full_logits: nanoGPT's way. The plain GPT of model.py, with nanosft's rows and optimizer, but the
  head runs at all positions and a dense mask keeps examples apart; --compile compiles all of it,
  loss included. Its loop waits for the device only at the end of a step.
- full_logits_causal: the same without isolation, as nanoGPT itself would do it: less work.
- trl: SFTTrainer(packing=True) with its default best-fit strategy, on nanosft's ids and masks, and
  with its own loss, which never materializes all logits. On a GPU it requires FlashAttention and
  enables Liger if installed (which has no GPT-2 kernels). Gradient checkpointing, its default, is
  off: that is faster, but takes more memory.
- transformers: the same loop over padded batches of about as many tokens. Where these do not fit in
  a GPU's memory, half as many rows, and so on: `rows` says how many. It generates with sdpa
  attention and its default, dynamic cache, in the same dtype.
tokens/s are non-padding tokens over the time of an optimizer step, loading included.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m tools.compare_peers", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
from huggingface_hub import HfApi
from torch import Tensor
from torch.utils.data import default_collate

import train_gpt2
from answer import save_model
from model import GPT, IGNORE_INDEX, GPTConfig, attention_for
from nanosft import fast
from nanosft.cli import run_cli
from nanosft.errors import UserError, require_choice, to_json
from nanosft.ranks import Ranks
from nanosft.run import peak_memory_gb
from nanosft.shards import Shards, ShardWriter, find_examples, write_meta
from nanosft.weights import pad_vocab
from tokenizer import get_encoding, weights_in_effect
from tools import workload
from tools.workload import Size, WorkFlags, in_its_own_process, summary, timed, warmup
from train_gpt2 import MicroBatch

PEERS = ("full_logits", "trl", "transformers", "full_logits_causal")
COMPARISONS = {"sft": PEERS, "pretrain": ("full_logits", "transformers"),
               "generate": ("transformers",)}
ONLY = ("sft", "pretrain", "generate_1", "generate_16", "generate_64")  # prompts at once
HIDDEN = ("loading", "flops_per_s", "palm_flops_per_s")  # only --json has them
QUICK = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 128, "batch_size": 2, "steps": 2,
         "repeats": 1}


@dataclasses.dataclass
class Config(WorkFlags):  # and the model's sizes, --device, --dtype, --json
    """Compare nanosft with TRL, transformers, and a loop with full logits."""

    data: str | None = None
    """chat rows, as sft_data.py --source; default: random ids with GSM8K's lengths"""
    only: str = ",".join(ONLY[:-1])
    """what to compare, separated by commas; generate_64: 64 prompts at once"""
    peers: str = ",".join(PEERS)
    """with whom, separated by commas"""
    batch_size: Size = 4
    """rows of a micro-batch, which here is a step"""
    steps: Size = 5
    """timed steps per process, after the warm-up"""
    repeats: Size = 3
    """processes of each contender"""
    compile: bool = False
    """torch.compile nanosft and the loop with full logits"""
    quick: bool = False
    """a tiny model and one repeat: does it run?"""


class Job(NamedTuple):
    what: str
    who: str
    folder: str  # holds what make_data makes


# ----- data, made once ---------------------------------------------------------------------------


def make_data(config: Config, job: Job) -> dict:
    """sft: shards of the rows; text: those as a text; model: random weights for the peers."""
    folder = Path(job.folder)
    (folder / "text").mkdir()
    if config.data:
        workload.prepare(config.data, f"{folder}/sft")
    else:
        (folder / "sft").mkdir()
        workload.random_shards(f"{folder}/sft", "sft", 7_473, workload.TRAINED, config.vocab_size)
    shards = Shards(f"{folder}/sft", "train", "sft")
    ids, stored = shards[0 : len(shards)]
    writer = ShardWriter(folder / "text", "train", 1 << 40)
    writer.add(ids)
    meta = {key: shards.meta[key] for key in ("encoding", "vocab_size", "source")}
    write_meta(folder / "text", meta | {"kind": "text", "splits": {"train": writer.finish()}})
    sizes = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
    n_vocab = pad_vocab(max(meta["vocab_size"], config.vocab_size))
    model = GPT(GPTConfig(vocab_size=n_vocab, **sizes))
    save_model(folder / "model", model, meta["encoding"], "chat")
    weights = weights_in_effect(stored, "response")
    return {"tokens": len(ids), "trained_share": float((weights > 0).mean())}


def examples_of(job: Job) -> list[np.ndarray]:
    """(ids, weights), int64 (2, n), of each example."""
    shards = Shards(f"{job.folder}/sft", "train", "sft")
    starts, _ = find_examples(shards, get_encoding(shards.meta["encoding"]).eot_token)
    ids, stored = shards[0 : len(shards)].astype(np.int64)
    return np.split(np.stack([ids, weights_in_effect(stored, "response")]), starts[1:], axis=1)


# ----- training ----------------------------------------------------------------------------------


def open_rows(config: Config, job: Job, **flags) -> tuple:
    """(the trainer's config, its rows, its forward); flags: of train_sft.py alone."""
    if job.what == "pretrain":
        return workload.open_training(config, "pretrain", f"{job.folder}/text")
    return workload.open_training(config, "sft", f"{job.folder}/sft", **flags)


def train_ours(config: Config, job: Job) -> dict:
    return workload.measure_steps(config, job.what, *open_rows(config, job))


def train_full_logits(config: Config, job: Job) -> dict:
    ranks = train_gpt2.setup_distributed(config.device, dtype=config.dtype)
    c, rows, _ = open_rows(config, job, isolate=job.who != "full_logits_causal")
    model = train_gpt2.make_model(c, rows.meta).to(ranks.device)
    loss_of = torch.compile(full_logits) if config.compile else full_logits
    batches = (batches[0] for batches in train_gpt2.load_steps(rows, c, ranks, 0))
    return peer_steps(config, ranks, model, batches,
                      lambda x, y, segments: loss_of(model, x, y, segments) / y.numel())


def full_logits(model: GPT, x: Tensor, y: Tensor, segments: Tensor | None = None) -> Tensor:
    attends = [attention_for(segments)] * model.config.n_layer  # the plain form: a dense mask
    return workload.full_logits_loss(model, model.hidden(x, segments, attends=attends), y)


def peer_steps(config: Config, ranks: Ranks, model: torch.nn.Module,
               batches: Iterator[MicroBatch], loss_of: Callable) -> dict:
    """An optimizer step for each batch, as nanoGPT's; the next batch is made and sent while the
    device works. loss_of(x, y, segments): the loss to minimize."""
    optimizer, ahead = train_gpt2.make_optimizer(model, train_gpt2.Config("", "")), []

    def fetch() -> None:
        batch = next(batches)
        counts = dict(zip(("tokens", "trained_tokens"), workload.token_counts([batch])))
        sent = [t if t is None else fast.send(t, ranks.device)
                for t in (batch.x, batch.y, batch.segments)]
        ahead.append((counts, sent))

    def step() -> dict:
        counts, sent = ahead.pop()
        with ranks.autocast():
            loss = loss_of(*sent)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        fetch()
        loss.item()  # the step's only wait for the device
        return counts

    fetch()
    return summary(timed(step, warmup(config), config.steps), ranks.device)


def hugging_face_model(job: Job, **settings):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(f"{job.folder}/model", **settings)


def train_transformers(config: Config, job: Job) -> dict:
    """Whole examples in random order, right-padded to the longest; or full rows of text."""
    ranks = train_gpt2.setup_distributed(config.device, dtype=config.dtype)
    c, rows, _ = open_rows(config, job, layout="pad")
    padded, size = job.what != "pretrain", c.batch_size
    if padded:
        size = round(c.batch_size * c.block_size / rows.lengths.mean())

    def run(size: int) -> dict:
        model = hugging_face_model(job, use_cache=False).to(ranks.device).train()

        def loss_of(x: Tensor, y: Tensor, segments: Tensor | None) -> Tensor:
            mask = (segments >= 0).long() if padded else None
            return model(x, attention_mask=mask, labels=y, shift_labels=y).loss

        return peer_steps(config, ranks, model, padded_batches(rows, size), loss_of)

    return largest_that_fits(run, size)


def padded_batches(rows, size: int) -> Iterator[MicroBatch]:
    """`size` rows at a time, cut to the longest."""
    for start in itertools.count(0, size):
        batch = default_collate([rows[i % len(rows)] for i in range(start, start + size)])
        segments = batch.get("segments", torch.zeros_like(batch["input_ids"]))
        lengths = (segments >= 0).sum(1)  # (size,)
        x, y, segments = (t[:, : int(lengths.max())].contiguous()
                          for t in (batch["input_ids"], batch["labels"], segments))
        yield MicroBatch(x, y, None, segments, int(lengths.sum()))


def largest_that_fits(run: Callable[[int], dict], rows: int) -> dict:
    """run(rows); if the GPU's memory is too small, with half as many, and so on."""
    try:
        return run(rows) | {"rows": rows}
    except torch.OutOfMemoryError:
        if rows == 1:
            raise
    if torch.cuda.is_available():  # forget the failed try
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return largest_that_fits(run, rows // 2)


def flash_attention() -> str:
    """Its name in transformers. UserError, at once, if it is not available here."""
    has, name = importlib.util.find_spec, "kernels-community/flash-attn2"
    if has("flash_attn"):
        return "flash_attention_2"
    with contextlib.suppress(Exception):  # offline, `kernels` itself would try for minutes
        if has("kernels") and HfApi().model_info(name, timeout=3):
            return name
    raise UserError("on a GPU it needs FlashAttention: pip install flash-attn, or kernels, which "
                    "downloads it from the hub")


def trl_trainer(config: Config, job: Job, callbacks=()):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    ranks = train_gpt2.setup_distributed(config.device, dtype=config.dtype)
    on_gpu, has_liger = ranks.device.type == "cuda", importlib.util.find_spec("liger_kernel")
    args = SFTConfig(
        f"{job.folder}/out", packing=True, max_length=config.block_size, completion_only_loss=True,
        use_cpu=not on_gpu, per_device_train_batch_size=config.batch_size,
        bf16=ranks.dtype == "bfloat16", max_steps=warmup(config) + config.steps,
        learning_rate=5e-5, gradient_checkpointing=False, report_to="none", save_strategy="no",
        use_liger_kernel=on_gpu and has_liger is not None, disable_tqdm=True,
        dataloader_pin_memory=on_gpu)
    model = hugging_face_model(job, attn_implementation=flash_attention() if on_gpu else "sdpa")
    rows = [{"input_ids": ids.tolist(), "completion_mask": (weights > 0).astype(int).tolist()}
            for ids, weights in examples_of(job)]
    tokenizer = AutoTokenizer.from_pretrained(f"{job.folder}/model")
    return SFTTrainer(model, args, train_dataset=Dataset.from_list(rows),
                      processing_class=tokenizer, callbacks=list(callbacks))


def train_trl(config: Config, job: Job) -> dict:
    from transformers import TrainerCallback

    clocks, counts = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            clocks.append(time.perf_counter())

    trainer = trl_trainer(config, job, [Clock()])
    collate = trainer.data_collator

    def counting(features):  # the n-th call makes the n-th step's batch
        batch = collate(features)
        counts.append({"tokens": sum(len(row["input_ids"]) for row in features),
                       "trained_tokens": int((batch["labels"] != IGNORE_INDEX).sum())})
        return batch

    trainer.data_collator = counting
    trainer.train()
    steps = [row | {"seconds": dt} for row, dt in zip(counts[1:], np.diff(clocks).tolist())]
    return summary(steps[warmup(config) - 1 :], trainer.args.device)


# ----- generation --------------------------------------------------------------------------------


def generate(config: Config, job: Job) -> dict:
    """Greedy, from the same weights and prompts of 32 ids; nothing stops early. The sum of the ids
    shows whether both give the same answers. All of --only in one process, few prompts first."""
    ranks, asked = train_gpt2.setup_distributed(config.device, dtype=config.dtype), config.only
    make = generate_ours if job.who == "nanosft" else generate_transformers
    answer, result, ids = make(job, ranks.device, getattr(torch, ranks.dtype)), {}, 0
    for name in (name for name in ONLY[2:] if name in asked.split(",")):
        shape = int(name.removeprefix("generate_")), 32
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(config.vocab_size, shape, generator=generator).tolist()
        answer(prompts, 8)  # the warm-up

        def step(prompts=prompts) -> dict:
            answers = answer(prompts, config.block_size // 2)
            return {"tokens": sum(map(len, answers)), "first": answers[0]}

        steps = timed(step, 0, config.steps)
        rate, ids = summary(steps, ranks.device)["tokens_per_s"], ids + sum(steps[-1]["first"])
        result[name.replace("generate", "tokens_per_s")] = rate
    return result | {"peak_memory_gb": peak_memory_gb(ranks.device), "sum_of_ids": ids}


def generate_ours(job: Job, device: torch.device, dtype: torch.dtype) -> Callable:
    model = fast.speed_up(GPT.from_pretrained(f"{job.folder}/model").to(device, dtype))
    return functools.partial(model.generate, temperature=0)


def generate_transformers(job: Job, device: torch.device, dtype: torch.dtype) -> Callable:
    model = hugging_face_model(job, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    model.generation_config.eos_token_id = None

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        x = torch.tensor(prompts, device=device)
        return model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=new,
                              do_sample=False)[:, 32:].tolist()

    return answer


# ----- taking turns ------------------------------------------------------------------------------


def measure(config: Config, job: Job) -> dict:
    """One contender; runs in its own process."""
    contenders = {"nanosft": train_ours, "trl": train_trl, "transformers": train_transformers}
    functions = {"data": make_data, "generate": generate}
    function = functions.get(job.what, contenders.get(job.who, train_full_logits))
    quiet, silent = contextlib.redirect_stdout, contextlib.redirect_stderr
    with open(os.devnull, "w", encoding="utf-8") as null, quiet(null), silent(null):
        return function(config, job)


def compare(config: Config, what: str, folder: str, log) -> None:
    """nanosft and its peers in turn, `repeats` times; each line as soon as it is complete."""
    peers = [who for who in COMPARISONS[what] if who in config.peers.split(",")]
    results = {who: [] for who in ("nanosft", *peers)}
    print(f"\n{what}: medians (lowest to highest); x: nanosft's median divided by it")
    for repeat in range(config.repeats):
        for who, theirs in results.items():
            if not theirs or "error" not in theirs[-1]:
                theirs.append(in_its_own_process(measure, config, Job(what, who, folder)))
                entry = {"what": what, "who": who, "repeat": repeat, **theirs[-1]}
                print(to_json(entry), file=log, flush=True)
            if repeat == config.repeats - 1:
                print(f"  {who:18}" + line_of(theirs, results["nanosft"]), flush=True)


def line_of(theirs: list[dict], ours: list[dict]) -> str:
    if "error" in theirs[-1]:
        return f"  left out: {theirs[-1]['error']}"
    line = ""
    for key in (key for key, value in theirs[0].items() if value is not None and key not in HIDDEN):
        values = [result[key] for result in theirs]
        low, middle, high = (f(values) for f in (min, statistics.median, max))
        n = 0 if middle >= 100 or isinstance(middle, int) else 3
        line += f"  {key} {middle:,.{n}f}"
        line += f" ({low:,.{n}f} to {high:,.{n}f})" if len(values) > 1 else ""
        if theirs is not ours and key in ours[-1]:
            line += f" x{statistics.median(result[key] for result in ours) / middle:.2f}"
    return line


def main(config: Config) -> None:
    for flag, choices in {"only": ONLY, "peers": PEERS}.items():
        for name in getattr(config, flag).split(","):
            require_choice(flag, name, choices)
    config = dataclasses.replace(config, **QUICK if config.quick else {})
    with (tempfile.TemporaryDirectory() as folder,
          open(config.json or os.devnull, "a", encoding="utf-8") as log):
        data = in_its_own_process(measure, config, Job("data", "nanosft", folder))
        if "error" in data:
            raise UserError(data["error"])
        print(f"data: {config.data or 'random'}", data)
        for what in dict.fromkeys(name.split("_")[0] for name in config.only.split(",")):
            compare(config, what, folder, log)


if __name__ == "__main__":
    run_cli(main, Config)
