"""nanosft compared with its alternatives, on the same rows, model, and machine.

    pip install 'trl==1.16.*' 'transformers>=5'    # on a GPU also: kernels liger-kernel
    python -m tools.compare_peers --data openai/gsm8k:main
    python -m tools.compare_peers --only sft,generate_16 --repeats 5 --json out/peers.jsonl

For developers: it needs the `gpt2` vocabulary, and leaves out the peers that are not installed.
The contenders take turns, `repeats` times, each time in a process of its own; the table has
medians and ranges. Peers:
- trl: SFTTrainer(packing=True) with its default best-fit strategy, on nanosft's ids and masks, and
  with its own loss, which never materializes all logits. On a GPU it requires FlashAttention and
  enables Liger if installed (which has no GPT-2 kernels). Gradient checkpointing, its default, is
  off: that is faster, but takes more memory.
- transformers: a plain loop over padded batches; about as many tokens per step.
- full_logits: nanoGPT's way. nanosft's model, rows, optimizer, and step, but the head runs at all
  positions and a dense mask keeps examples apart; --compile compiles all of it, loss included.
- full_logits_causal: the same without isolation, as nanoGPT itself would do it: less work.
tokens/s are non-padding tokens over the time of an optimizer step, loading included.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import statistics
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

import train_gpt2
from answer import save_model
from model import GPT, IGNORE_INDEX, GPTConfig, attention_for
from nanosft import fast
from nanosft.cli import run_cli
from nanosft.errors import UserError, require_choice
from nanosft.shards import Shards, ShardWriter, find_examples, write_meta
from tokenizer import get_encoding, weights_in_effect
from tools import workload
from tools.workload import Size, WorkFlags, in_its_own_process, summary, timed, warmup

COMPARISONS = {  # nanosft first
    "sft": ("nanosft", "trl", "transformers", "full_logits", "full_logits_causal"),
    "pretrain": ("nanosft", "transformers", "full_logits"),
    "generate_1": ("nanosft", "transformers"),  # prompts at once
    "generate_16": ("nanosft", "transformers"),
}
HIDDEN = ("loading", "flops_per_s", "palm_flops_per_s")  # only --json has them
QUICK = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 128, "batch_size": 2, "steps": 2,
         "repeats": 1}


@dataclasses.dataclass
class Config(WorkFlags):  # and the model's sizes, --device, --dtype, --json
    """Compare nanosft with TRL, transformers, and a loop with full logits."""

    data: str | None = None
    """chat rows, as sft_data.py --source; default: random words with GSM8K's lengths"""
    only: str = ",".join(COMPARISONS)
    """what to compare, separated by commas"""
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
    if not config.data:
        workload.random_jsonl(folder / "rows.jsonl", 7_473)
    workload.prepare(config.data or f"{folder}/rows.jsonl", f"{folder}/sft")
    shards = Shards(f"{job.folder}/sft", "train", "sft")
    ids, stored = shards[0 : len(shards)]
    (folder / "text").mkdir()
    writer = ShardWriter(folder / "text", "train", 1 << 40)
    writer.add(ids)
    meta = shards.meta | {"kind": "text", "splits": {"train": writer.finish()}}
    write_meta(folder / "text", meta)
    sizes = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
    save_model(folder / "model", GPT(GPTConfig(**sizes)), "gpt2", "chat")
    weights = weights_in_effect(stored, "response")
    return {"tokens": len(ids), "trained_share": float((weights > 0).mean())}


def examples_of(job: Job) -> list[np.ndarray]:
    """(ids, weights), int64 (2, n), of each example."""
    shards = Shards(f"{job.folder}/sft", "train", "sft")
    starts, _ = find_examples(shards, get_encoding("gpt2").eot_token)
    ids, stored = shards[0 : len(shards)].astype(np.int64)
    return np.split(np.stack([ids, weights_in_effect(stored, "response")]), starts[1:], axis=1)


# ----- training ----------------------------------------------------------------------------------


def open_rows(config: Config, job: Job, **flags) -> tuple:
    """(the trainer's config, its rows, its forward); flags: of train_sft.py alone."""
    if job.what == "pretrain":
        return workload.open_training(config, "pretrain", f"{job.folder}/text")
    return workload.open_training(config, "sft", f"{job.folder}/sft", **flags)


def train_ours(config: Config, job: Job) -> dict:
    """nanosft's own step; the full_logits contenders replace nothing but the forward pass."""
    c, rows, forward = open_rows(config, job, isolate=job.who != "full_logits_causal")
    if job.who != "nanosft":
        c.compile = False  # that would be the blocks alone
        forward = torch.compile(full_logits) if config.compile else full_logits
    return workload.measure_steps(config, job.what, c, rows, forward)


def full_logits(model: GPT, x, y, weights=None, segments=None) -> torch.Tensor:
    device = model.lm_head.weight.device  # the batch is on the CPU
    x, y, segments = (t if t is None else t.to(device) for t in (x, y, segments))
    attends = [attention_for(segments)] * model.config.n_layer  # the plain form: a dense mask
    logits = model.lm_head(model.hidden(x, segments, attends=attends))  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE_INDEX,
                           reduction="sum")


def hugging_face_model(job: Job, **settings):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(f"{job.folder}/model", **settings)


def train_transformers(config: Config, job: Job) -> dict:
    """Whole examples in random order, right-padded to the longest; or full rows of text."""
    ranks = train_gpt2.setup_distributed(config.device, dtype=config.dtype)
    c, rows, _ = open_rows(config, job, layout="pad")
    padded, size, numbers = job.what != "pretrain", c.batch_size, itertools.count()
    if padded:
        size = round(c.batch_size * c.block_size / rows.lengths.mean())
    model = hugging_face_model(job, use_cache=False).to(ranks.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-5, fused=True)

    def step() -> dict:
        batch = default_collate([rows[next(numbers) % len(rows)] for _ in range(size)])
        x, y = batch["input_ids"], batch["labels"]  # y is already shifted
        real = batch["segments"] >= 0 if padded else torch.ones_like(x) > 0
        T = int(real.sum(1).max())
        counts = {"tokens": int(real.sum()), "trained_tokens": int((y != IGNORE_INDEX).sum())}
        x, y, real = (t[:, :T].contiguous().to(ranks.device) for t in (x, y, real))
        with ranks.autocast():
            mask = real.long() if padded else None
            loss = model(x, attention_mask=mask, labels=y, shift_labels=y).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # wait for the device
        return counts

    return summary(timed(step, warmup(config), config.steps), ranks.device)


def trl_trainer(config: Config, job: Job, dataset, callbacks=()):
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    ranks = train_gpt2.setup_distributed(config.device, dtype=config.dtype)
    with ranks.autocast():
        bf16 = torch.is_autocast_enabled(ranks.device.type)
    on_gpu, has = ranks.device.type == "cuda", importlib.util.find_spec
    attention = "flash_attention_2" if has("flash_attn") else "kernels-community/flash-attn2"
    if on_gpu and not (has("flash_attn") or has("kernels")):
        raise UserError("on a GPU it needs FlashAttention: pip install kernels (or flash-attn)")
    args = SFTConfig(
        f"{job.folder}/out", packing=True, max_length=config.block_size, completion_only_loss=True,
        use_cpu=not on_gpu, per_device_train_batch_size=config.batch_size, bf16=bf16,
        max_steps=warmup(config) + config.steps, learning_rate=5e-5, gradient_checkpointing=False,
        use_liger_kernel=on_gpu and has("liger_kernel") is not None, report_to="none",
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=on_gpu)
    model = hugging_face_model(job, attn_implementation=attention if on_gpu else "sdpa")
    tokenizer = AutoTokenizer.from_pretrained(f"{job.folder}/model")
    return SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer,
                      callbacks=list(callbacks))


def train_trl(config: Config, job: Job) -> dict:
    from datasets import Dataset
    from transformers import TrainerCallback

    clocks, counts = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            clocks.append(time.perf_counter())

    rows = [{"input_ids": ids.tolist(), "completion_mask": (weights > 0).astype(int).tolist()}
            for ids, weights in examples_of(job)]
    trainer = trl_trainer(config, job, Dataset.from_list(rows), [Clock()])
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


# ----- the other comparisons ---------------------------------------------------------------------


def generate(config: Config, job: Job) -> dict:
    """Greedy, from the same weights and prompts; nothing stops early. The sum of the ids shows
    whether both give the same answer."""
    device = train_gpt2.setup_distributed(config.device).device
    prompts = torch.randint(50257, (int(job.what.removeprefix("generate_")), 32),
                            generator=torch.Generator().manual_seed(0))
    if job.who == "nanosft":
        model = fast.speed_up(GPT.from_pretrained(f"{job.folder}/model").to(device))
    else:
        model = hugging_face_model(job).to(device).eval()
        model.generation_config.eos_token_id = None

    def step() -> dict:
        new = config.block_size // 2
        if job.who == "nanosft":
            answers = model.generate(prompts.tolist(), new, temperature=0)
        else:
            x = prompts.to(device)
            answers = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=new,
                                     do_sample=False)[:, 32:].tolist()
        return {"tokens": sum(map(len, answers)), "answers": answers}

    steps = timed(step, 1, config.steps)
    return summary(steps, device) | {"sum_of_ids": sum(steps[-1]["answers"][0])}


# ----- taking turns ------------------------------------------------------------------------------


def measure(config: Config, job: Job) -> dict:
    """One contender; runs in its own process."""
    peers = {"trl": train_trl, "transformers": train_transformers}
    functions = {"data": make_data, "generate_1": generate, "generate_16": generate}
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        return functions.get(job.what, peers.get(job.who, train_ours))(config, job)


def compare(config: Config, what: str, folder: str, log) -> None:
    """All contenders in turn, `repeats` times; then the table."""
    results = {who: [] for who in COMPARISONS[what]}
    for repeat in range(config.repeats):
        for who, theirs in results.items():
            if theirs and "error" in theirs[-1]:
                continue
            theirs.append(in_its_own_process(measure, config, Job(what, who, folder)))
            entry = {"what": what, "who": who, "repeat": repeat, **theirs[-1]}
            print(json.dumps(entry), file=log, flush=True)
    print(f"\n{what}: medians (lowest to highest); x: nanosft's median divided by it")
    for who, theirs in results.items():
        print(f"  {who:18}" + line_of(theirs, results["nanosft"]), flush=True)


def line_of(theirs: list[dict], ours: list[dict]) -> str:
    if "error" in theirs[-1]:
        return f"  left out: {theirs[-1]['error']}"
    line = ""
    for key in (key for key in theirs[0] if key not in HIDDEN):
        values = [result[key] for result in theirs]
        low, middle, high = (f(values) for f in (min, statistics.median, max))
        line += "  {} {:,.{n}f} ({:,.{n}f} to {:,.{n}f})".format(key, middle, low, high,
                                                                n=0 if middle >= 100 else 3)
        if theirs is not ours and "error" not in ours[-1]:
            line += f" x{statistics.median(result[key] for result in ours) / middle:.2f}"
    return line


def main(config: Config) -> None:
    for what in config.only.split(","):
        require_choice("only", what, COMPARISONS)
    config = dataclasses.replace(config, **QUICK if config.quick else {})
    with tempfile.TemporaryDirectory() as folder, open(config.json or os.devnull, "a") as log:
        data = in_its_own_process(measure, config, Job("data", "nanosft", folder))
        if "error" in data:
            raise UserError(data["error"])
        print(f"data: {config.data or 'random'}", data)
        for what in config.only.split(","):
            compare(config, what, folder, log)


if __name__ == "__main__":
    run_cli(main, Config)
