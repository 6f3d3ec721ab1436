"""nanosft compared with its alternatives, on the same rows, model and machine.

    pip install 'trl==1.16.*' 'transformers>=5'
    python -m tools.compare_peers --data gsm8k.jsonl
    python -m tools.compare_peers --only sft,share --repeats 5 --json out/peers.jsonl

For developers: it needs the `gpt2` vocabulary, and leaves out the peers that are not installed
(--peers_python names another Python that has them). The contenders take turns, `repeats` times,
each in its own process; the table has medians, their range and ratios. Peers:
- trl: SFTTrainer(packing=True) with its default best-fit strategy, on nanosft's ids and masks. Its
  default gradient checkpointing is off: that is faster, but takes more memory.
- transformers: a plain loop over padded batches, labels -100; about as many tokens per step.
- full_logits: nanoGPT's way. nanosft's model, rows, optimizer and step, but the head runs at all
  positions, F.cross_entropy(ignore_index=-100), and a dense mask keeps examples apart.
- full_logits_causal: the same without isolation, as nanoGPT itself would do it: less work.
tokens/s are non-padding tokens over the time of an optimizer step, loading included.
"""

import collections
import dataclasses
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import sft_data
from model import GPT, GPTConfig
from nanosft import fast
from nanosft.checkpoint import peak_memory_gb
from nanosft.cli import UserError, require_at_least, run_cli
from nanosft.forms import messages_of
from nanosft.shards import Shards, ShardWriter, find_examples, read_meta, write_meta
from nanosft.sources import read_rows
from packing import Plan
from tokenizer import END_OF_TEXT, SPECIALS, get_encoding
from tools import bench

COMPARISONS = {  # nanosft first
    "sft": ("nanosft", "trl", "transformers", "full_logits", "full_logits_causal"),
    "share": ("nanosft", "full_logits", "full_logits_causal"),
    "pretrain": ("nanosft", "transformers", "full_logits"),
    "generate": ("nanosft", "transformers"),
    "prepare": ("nanosft", "tiktoken", "trl"),
    "rows": ("nanosft", "trl"),
    "startup": ("nanosft",),
}
PEERS = ("trl", "transformers")
CPU = torch.device("cpu")


@dataclasses.dataclass
class Config:
    """Compare nanosft with TRL, transformers and a loop with full logits."""

    data: str | None = None
    """chat rows of one turn (.jsonl); default: random words with GSM8K's lengths"""
    only: str = ",".join(COMPARISONS)
    """what to compare, separated by commas"""
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    block_size: int = 512
    batch_size: int = 4
    """rows of a micro-batch, which here is a step"""
    steps: int = 5
    """timed steps per process"""
    warmup: int = 1
    repeats: int = 3
    trained_share: float = 0.25
    """of each example, in `share`"""
    batches: tuple[int, ...] = (1, 16)
    """prompts at once, in `generate`"""
    new_tokens: int = 256
    prepare_times: int = 10
    """`prepare`: copies of the rows for nanosft and tiktoken; TRL gets one, its rate is the same"""
    peers_python: str = sys.executable
    json: str | None = None
    """append each process's result to this file"""
    job: str | None = None
    """(from the parent process) one contender to measure, as JSON"""


@dataclasses.dataclass
class Job:
    what: str
    who: str
    folder: str  # holds rows.jsonl and the shards sft, share, text
    batch: int = 0


# ----- data, made once ---------------------------------------------------------------------------


def make_data(config: Config, job: Job) -> dict:
    """rows.jsonl and its shards: sft as sft_data.py makes them; share and text made from those.

    Also in its own process: a child's peak memory starts at its parent's.
    """
    folder = Path(job.folder)
    source = folder / "rows.jsonl"
    if config.data:
        rows = (json.dumps(row) + "\n" for _, row in read_rows(config.data))
        source.write_text("".join(rows))
    else:
        bench.random_jsonl(source, 7_473)
    prepare(source, folder / "sft")
    shards, lengths = open_sft(job)
    ids, weights = shards[0 : len(shards)]
    trained = 100 * bench.last_part(lengths, config.trained_share).astype(np.uint16)
    for name, kind, piece in (("share", "sft", np.stack([ids, trained])), ("text", "text", ids)):
        (folder / name).mkdir()
        writer = ShardWriter(folder / name, "train", 1 << 40)
        writer.add(piece)
        meta = {**shards.meta, "kind": kind, "splits": {"train": writer.finish()}}
        write_meta(folder / name, meta)
    return {"tokens": len(ids), "examples": len(lengths), "trained_share": (weights > 0).mean()}


def prepare(source: Path, out: Path) -> float:
    """Seconds of the command sft_data.py."""
    clock = time.perf_counter()
    words = ["--source", source, "--out", out, "--encoding", "gpt2", "--val_fraction", "0"]
    subprocess.run([sys.executable, sft_data.__file__, *words], check=True, capture_output=True)
    return time.perf_counter() - clock


def open_sft(job: Job) -> tuple[Shards, np.ndarray]:
    """The shards that sft_data.py made, and the length of each example."""
    shards = Shards(f"{job.folder}/sft", "train", "sft")
    return shards, find_examples(shards, get_encoding("gpt2").eot_token)[1]


def examples_of(job: Job) -> list[np.ndarray]:
    """(ids, weights), int64 (2, n), of each example."""
    shards, lengths = open_sft(job)
    return np.split(shards[0 : len(shards)].astype(np.int64), np.cumsum(lengths)[:-1], axis=1)


# ----- training ----------------------------------------------------------------------------------


def train_ours(config: Config, job: Job) -> dict:
    """nanosft's own step; the full_logits contenders replace nothing but the forward pass."""
    flags = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
    flags |= {"batch_size": config.batch_size, "rows_per_step": config.batch_size, "device": "cpu"}
    if job.what != "pretrain":
        flags["isolate"] = job.who != "full_logits_causal"
    data = f"{job.folder}/{'text' if job.what == 'pretrain' else job.what}"
    c, rows, forward = bench.open_training(job.what, data, **flags)
    if job.who != "nanosft":
        forward = forward_full_logits
        fast.attention_within = lambda *args: None  # so the model takes the dense mask
    bench_config = bench.Config(device="cpu", steps=config.steps, warmup=config.warmup)
    return bench.measure_steps(bench_config, c, rows, forward)


def forward_full_logits(model, x, y, weights=None, segments=None) -> tuple:
    logits = model(x, segments=segments).flatten(0, 1)  # (B * T, V)
    return F.cross_entropy(logits, y.flatten(), ignore_index=-100, reduction="sum"), None


def result(steps: list[dict]) -> dict:
    """Of steps {tokens, trained, dt}: medians, and this process's peak memory."""
    trained, tokens = (sum(step[key] for step in steps) for key in ("trained", "tokens"))
    return {**bench.median_rates(steps, "tokens"), "trained_share": trained / tokens,
            "step_s": statistics.median(step["dt"] for step in steps),
            "peak_memory_gb": peak_memory_gb(CPU)}


def hugging_face_model(config: Config):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    sizes |= {"vocab_size": 50304, "n_positions": config.block_size, "use_cache": False}
    as_ours = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "eos_token_id": 50256}
    return GPT2LMHeadModel(GPT2Config(**sizes, **as_ours))


def padded_batches(config: Config, job: Job) -> Iterator[dict]:
    """Whole examples at random, right-padded to the longest; or rows of text, without padding."""
    T, B = config.block_size, config.batch_size
    if job.what == "pretrain":
        shards = Shards(f"{job.folder}/text", "train", "text")
        for start in range(0, len(shards) - B * T, B * T):
            x = torch.from_numpy(shards[start : start + B * T].astype(np.int64)).view(B, T)
            yield {"input_ids": x, "labels": x, "attention_mask": None}
        return
    examples = [torch.from_numpy(example[:, :T]) for example in examples_of(job)]  # (2, n) each
    order = np.random.default_rng(0).permutation(len(examples))
    size = round(B * T * len(examples) / sum(example.size(1) for example in examples))
    for start in range(0, len(order) - size, size):
        batch = [examples[i] for i in order[start : start + size]]
        x = [ids for ids, _ in batch]
        y = [ids.where(weights > 0, -100) for ids, weights in batch]
        mask = [torch.ones_like(ids) for ids in x]
        yield {"input_ids": pad_sequence(x, True, 50256), "labels": pad_sequence(y, True, -100),
               "attention_mask": pad_sequence(mask, True)}


def train_transformers(config: Config, job: Job) -> dict:
    model = hugging_face_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-5, fused=True)
    batches = padded_batches(config, job)

    def step() -> dict:
        batch = next(batches)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mask, trained = batch["attention_mask"], int((batch["labels"] != -100).sum())
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        return {"tokens": tokens, "trained": trained}

    return result(bench.timed(step, config.warmup, config.steps))


def byte_pair_tokenizer():
    """GPT-2's tokenizer with our special tokens, from tiktoken's cached files: no hub."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # tiktoken's key
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", Path(tempfile.gettempdir(), "data-gym-cache"))
    vocab, merges = (str(Path(cache, hashlib.sha1(f"{base}{name}".encode()).hexdigest()))
                     for name in ("encoder.json", "vocab.bpe"))
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocab, merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT)


def trl_trainer(config: Config, dataset, model, job: Job, callbacks=()):
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        f"{job.folder}/out", packing=True, max_length=config.block_size, completion_only_loss=True,
        use_cpu=True, per_device_train_batch_size=config.batch_size,
        max_steps=config.warmup + config.steps, learning_rate=5e-5, bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False)
    return SFTTrainer(model, args, train_dataset=dataset, processing_class=byte_pair_tokenizer(),
                      callbacks=list(callbacks))


def train_trl(config: Config, job: Job) -> dict:
    from datasets import Dataset
    from transformers import TrainerCallback

    clocks, counts = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clocks.append(time.perf_counter())

    rows = [{"input_ids": ids.tolist(), "completion_mask": (weights > 0).astype(int).tolist()}
            for ids, weights in examples_of(job)]
    trainer = trl_trainer(config, Dataset.from_list(rows), hugging_face_model(config), job,
                          [Clock()])
    collate = trainer.data_collator

    def counting(features):  # the n-th call makes the n-th step's batch
        batch = collate(features)
        counts.append({"tokens": sum(len(row["input_ids"]) for row in features),
                       "trained": int((batch["labels"] != -100).sum())})
        return batch

    trainer.data_collator = counting
    trainer.train()
    steps = [count | {"dt": dt} for count, dt in zip(counts[1:], np.diff(clocks).tolist())]
    return result(steps[config.warmup - 1 :])


# ----- the other comparisons ---------------------------------------------------------------------


def generate(config: Config, job: Job) -> dict:
    """Greedy, from the same weights and prompts; nothing stops early."""
    sizes = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_vocab=50304, **sizes))
    prompts = torch.randint(50257, (job.batch, 32))
    new = min(config.new_tokens, config.block_size - 32)
    if job.who == "transformers":
        from transformers import GPT2LMHeadModel

        folder = f"{job.folder}/weights"
        model.save_pretrained(folder)
        peer = GPT2LMHeadModel.from_pretrained(folder).eval()
        peer.generation_config.eos_token_id = None
        peer.generation_config.pad_token_id = 0

    def step() -> dict:
        if job.who == "nanosft":
            answers = model.generate(prompts.tolist(), new, temperature=0)
        else:
            mask = torch.ones_like(prompts)
            answers = peer.generate(prompts, attention_mask=mask, max_new_tokens=new,
                                    do_sample=False)[:, 32:].tolist()
        return {"tokens": sum(map(len, answers)), "answers": answers}

    steps = bench.timed(step, 1, config.steps)
    same = sum(steps[-1]["answers"][0])  # a checksum: do both say the same?
    return {**bench.median_rates(steps, "tokens"), "peak_memory_gb": peak_memory_gb(CPU),
            "answer_sum": same}


def prepare_ours(config: Config, job: Job) -> dict:
    """The command, start-up included; `startup_s`: the same command for one row."""
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        text = Path(job.folder, "rows.jsonl").read_text()
        one, many = Path(folder, "one.jsonl"), Path(folder, "many.jsonl")
        one.write_text(text.splitlines()[0] + "\n")
        many.write_text((text.rstrip("\n") + "\n") * config.prepare_times)
        startup, seconds = prepare(one, Path(folder, "one")), prepare(many, Path(folder, "many"))
        tokens = read_meta(f"{folder}/many", "sft")["splits"]["train"]["tokens"]
    return {"tokens_per_s": tokens / seconds, "startup_s": startup,
            "tokens_per_s_without_startup": tokens / (seconds - startup)}


def prepare_tiktoken(config: Config, job: Job) -> dict:
    """Bare encode_ordinary_batch, one thread per core; reading the rows does not count."""
    texts = [message["content"] for turns in turns_of(job) for message in turns]
    return {"tokens_per_s": bench.bare_rate(get_encoding("gpt2"), texts * config.prepare_times)}


def prepare_trl(config: Config, job: Job) -> dict:
    """What SFTTrainer does to rows of text before it trains: tokenize, mask, pack. One process."""
    from datasets import Dataset

    rows = [{"prompt": f"<|user|>{user['content']}<|end|><|assistant|>",
             "completion": f"{assistant['content']}<|end|>"}
            for user, assistant in turns_of(job)]
    tiny = dataclasses.replace(config, n_layer=1, n_head=1, n_embd=8)
    dataset, model = Dataset.from_list(rows), hugging_face_model(tiny)
    clock = time.perf_counter()
    trainer = trl_trainer(config, dataset, model, job)
    seconds = time.perf_counter() - clock
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    return {"tokens_per_s": tokens / seconds, "tokens": tokens}


def turns_of(job: Job) -> list[list[dict]]:
    return [messages_of(row)[:2] for _, row in read_rows(f"{job.folder}/rows.jsonl")]


def count_rows(config: Config, job: Job) -> dict:
    """Rows that the packing makes at T and 2T, and its seconds."""
    examples, found = [ids for ids, _ in examples_of(job)], {}
    lengths = np.array([len(ids) for ids in examples])
    for T in (config.block_size, 2 * config.block_size):
        whole = np.minimum(lengths, T + 1)
        if job.who == "trl":
            from datasets import Dataset
            from trl import pack_dataset

            dataset = Dataset.from_dict({"input_ids": [ids[:T] for ids in examples]})
            clock = time.perf_counter()
            rows = len(pack_dataset(dataset, T, "bfd"))
        else:
            clock = time.perf_counter()
            rows = len(Plan(whole, T, "fit"))
        bound = -(-int(whole.sum()) // (T + 1))
        found |= {f"rows_{T}": rows, f"above_bound_{T}": rows / bound - 1,
                  f"seconds_{T}": time.perf_counter() - clock}
    return found


# what train_gpt2.train does before its first step
START_UP = """
import json, sys, time, torch, torch._dynamo, torch.nn.parallel, torch.utils.data
clock = time.perf_counter()
import train_gpt2, train_sft
from nanosft.checkpoint import describe_run
imported = time.perf_counter()
c = train_sft.Config(**json.loads(sys.argv[1]))
ranks = train_gpt2.setup_distributed(c.device)
rows = train_sft.open_rows(c, "train")
train_gpt2.new_or_resumed(c, ranks, rows.meta, describe_run(c, rows.meta, 1))
next(train_gpt2.load_steps(rows, c, ranks, 0))
print(imported - clock, time.perf_counter() - clock)
"""


def start_up(config: Config, job: Job) -> dict:
    """Seconds from `import train_sft` to the first step; torch is there before the clock starts."""
    flags = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
    flags |= {"data": f"{job.folder}/sft", "out": "none", "init": "scratch", "device": "cpu"}
    done = subprocess.run([sys.executable, "-c", START_UP, json.dumps(flags)], check=True,
                          capture_output=True, text=True)
    imported, started = map(float, done.stdout.split())
    return {"startup_s": started, "import_s": imported}


MEASURE = {
    ("data", "nanosft"): make_data,
    ("sft", "trl"): train_trl,
    ("prepare", "nanosft"): prepare_ours,
    ("prepare", "tiktoken"): prepare_tiktoken,
    ("prepare", "trl"): prepare_trl,
    **{(what, "transformers"): train_transformers for what in ("sft", "pretrain")},
    **{("generate", who): generate for who in COMPARISONS["generate"]},
    **{("rows", who): count_rows for who in COMPARISONS["rows"]},
    ("startup", "nanosft"): start_up,
}  # all others: train_ours


# ----- taking turns ------------------------------------------------------------------------------


def in_its_own_process(config: Config, job: Job) -> dict:
    python = config.peers_python if job.who in PEERS else sys.executable
    return bench.run_child("tools.compare_peers", [vars(config), vars(job)], python,
                           HF_HUB_OFFLINE="1", HF_HOME=job.folder, TOKENIZERS_PARALLELISM="true")


def compare(config: Config, what: str, batch: int, folder: str, log) -> None:
    """All contenders in turn, `repeats` times; then the table."""
    found, left_out = collections.defaultdict(list), {}
    for repeat in range(config.repeats):
        for who in COMPARISONS[what]:
            if who in left_out:
                continue
            row = in_its_own_process(config, Job(what, who, folder, batch))
            if "error" in row:
                left_out[who] = row["error"]
                continue
            found[who].append(row)
            entry = {"what": what, "who": who, "batch": batch, "repeat": repeat, **row}
            print(json.dumps(entry), file=log, flush=True)
    print(f"\n{what}" + (f", {batch} at once" if batch else ""))
    for who, error in left_out.items():
        print(f"  {who:20} left out: {error}")
    if "nanosft" in found:
        print_table({who: found[who] for who in COMPARISONS[what] if who in found})


HIDDEN = ("answer_sum", "flops_per_s", "palm_flops_per_s", "trained_tokens_per_s")  # JSON has them


def print_table(found: dict[str, list[dict]]) -> None:
    """One line per contender: medians, (their range) and [nanosft's over its own]."""

    def median(who: str, key: str) -> float:
        return statistics.median(row[key] for row in found[who])

    for who, rows in found.items():
        line = f"  {who:18}"
        for key in (key for key in rows[0] if key not in HIDDEN):
            value, values = median(who, key), [row[key] for row in rows]
            line += f"  {key} {value:,.{0 if value >= 100 else 3}f}"
            if key == "tokens_per_s":
                line += f" ({min(values):,.0f} to {max(values):,.0f})"
            if who != "nanosft" and key in ("tokens_per_s", "peak_memory_gb"):
                line += f" [x{median('nanosft', key) / value:.2f}]"
        print(line, flush=True)


def main(config: Config) -> None:
    if config.job:  # a child of the process below
        settings, job = json.loads(config.job)
        job = Job(**job)
        measure = MEASURE.get((job.what, job.who), train_ours)
        return print("\n" + json.dumps(measure(Config(**settings), job)))
    if unknown := set(config.only.split(",")) - set(COMPARISONS):
        raise UserError(f"--only: unknown {sorted(unknown)}; choose from {','.join(COMPARISONS)}")
    require_at_least(config, 1, "n_layer", "n_head", "n_embd", "block_size", "batch_size", "steps",
                     "repeats", "batches", "new_tokens", "prepare_times", most=10**8)
    require_at_least(config, 0, "warmup", most=10**8)
    require_at_least(config, 0, "trained_share", most=1)
    with tempfile.TemporaryDirectory() as folder, open(config.json or os.devnull, "a") as log:
        data = in_its_own_process(config, Job("data", "nanosft", folder))
        print(f"data: {config.data or 'random'}", data)
        for what in config.only.split(","):
            for batch in config.batches if what == "generate" else (0,):
                compare(config, what, batch, folder, log)


if __name__ == "__main__":
    run_cli(main, Config)
