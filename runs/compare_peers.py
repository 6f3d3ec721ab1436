"""nanosft beside what one would use instead: the same rows, model, machine; processes take turns.

    pip install 'trl==1.16.*' 'transformers>=5' && python runs/compare_peers.py --data gsm8k.jsonl
    python runs/compare_peers.py --only sft,share --repeats 5 --json out/peers.jsonl

A developer's tool: it needs the `gpt2` vocabulary, and leaves out the peers that are not installed
(--peers_python names another Python that has them). Each contender measures in its own process,
`repeats` times, in turn; what is printed are medians, their range and ratios. Peers:
- trl: SFTTrainer(packing=True), its default best-fit strategy, fed with our ids and masks. Its
  default gradient checkpointing is off: faster for it, at the price of memory.
- transformers: a plain loop over padded batches, labels -100; as many examples as make our tokens.
- full_logits: nanoGPT's way. Our model, rows, optimiser and step, but the head at all positions,
  F.cross_entropy(ignore_index=-100), and examples kept apart by a dense mask.
- full_logits_causal: the same without isolation, as nanoGPT itself would do it: less work.
tokens/s are tokens that are no padding over the time of an optimiser step, loading included.
"""

import collections
import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fineweb import ShardWriter, open_shards, read_meta, read_rows, run_cli, write_meta
from sft_data import messages_of
from tokenizer import get_encoding

ROOT = Path(__file__).resolve().parent.parent
COMPARISONS = {  # ours first
    "sft": ("nanosft", "trl", "transformers", "full_logits", "full_logits_causal"),
    "share": ("nanosft", "full_logits", "full_logits_causal"),
    "pretrain": ("nanosft", "transformers", "full_logits"),
    "generate": ("nanosft", "transformers"),
    "prepare": ("nanosft", "tiktoken", "trl"),
    "rows": ("nanosft", "trl"),
    "startup": ("nanosft",),
}
PEERS = ("trl", "transformers")


@dataclasses.dataclass
class Config:
    """Compare nanosft with TRL, transformers and a loop with full logits."""

    data: str | None = None
    """chat rows of one turn (.jsonl); default: made up, with GSM8K's lengths"""
    only: str = ",".join(COMPARISONS)
    """what to compare, separated by commas"""
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    block_size: int = 512
    batch_size: int = 4
    """rows of a micro-batch, which here is a step"""
    steps: int = 5
    """timed steps a process"""
    warmup: int = 1
    repeats: int = 3
    trained_share: float = 0.25
    """of each example, in `share`"""
    batches: tuple[int, ...] = (1, 16)
    """prompts at once, in `generate`"""
    new_tokens: int = 256
    prepare_times: int = 10
    """`prepare`: copies of the rows for us and tiktoken; TRL gets one, its rate is the same"""
    peers_python: str = sys.executable
    json: str | None = None
    """append each process's result to this file"""
    job: str | None = None
    """(the parent's) one contender to measure, as JSON"""


@dataclasses.dataclass
class Job:
    what: str
    who: str
    folder: str  # holds rows.jsonl and the shards sft, share, text
    batch: int = 0


# ----- data, made once ---------------------------------------------------------------------------


def make_data(config: Config, job: Job) -> dict:
    """rows.jsonl, and shards of it: sft as sft_data.py makes them, share and text made of those.

    In a process of its own, too: a child's peak memory starts at its parent's.
    """
    folder = Path(job.folder)
    source = folder / "rows.jsonl"
    if config.data:
        shutil.copy(config.data, source)
    else:
        from bench import random_jsonl

        random_jsonl(source, 7_473)
    prepare(source, folder / "sft")
    meta = read_meta(str(folder / "sft"), "sft")
    ids, weights = open_shards(str(folder / "sft"), meta, "train")[0]
    lengths = np.diff(np.flatnonzero(ids == get_encoding("gpt2").eot_token), prepend=-1)
    to_go = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(ids))  # n, …, 2, 1
    trained = to_go <= np.repeat((config.trained_share * lengths).round(), lengths)
    share = np.stack([ids, 100 * trained.astype(np.uint16)])
    for name, kind, pieces in (("share", "sft", share), ("text", "text", np.array(ids))):
        (folder / name).mkdir()
        writer = ShardWriter(folder / name, "train", 1 << 40)
        writer.add(pieces)
        write_meta(folder / name, {**meta, "kind": kind, "splits": {"train": writer.finish()}})
    return {"tokens": len(ids), "examples": len(lengths), "trained_share": (weights > 0).mean()}


def prepare(source: Path, out: Path) -> float:
    """Seconds of the command sft_data.py."""
    clock = time.perf_counter()
    words = ["--source", source, "--out", out, "--encoding", "gpt2", "--val_fraction", "0"]
    subprocess.run([sys.executable, ROOT / "sft_data.py", *words], check=True, capture_output=True)
    return time.perf_counter() - clock


def examples_of(folder: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, weights) of each example in the shards that sft_data.py made."""
    ids, weights = open_shards(folder, read_meta(folder, "sft"), "train")[0]
    cuts = np.flatnonzero(ids == get_encoding("gpt2").eot_token)[:-1] + 1
    return list(zip(np.split(ids.astype(np.int64), cuts), np.split(weights, cuts)))


# ----- training ----------------------------------------------------------------------------------


def train_ours(config: Config, job: Job) -> dict:
    """nanosft's own loop; `full_logits`: with nothing but the forward pass exchanged."""
    import bench
    import model as gpt
    import train_gpt2
    import train_sft

    if job.who == "full_logits":
        isolate = gpt.isolate
        gpt.isolate = lambda segments: (isolate(segments)[0], gpt.Masked(segments))
    sizes = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
    sizes |= {
        "batch_size": config.batch_size,
        "rows_per_step": config.batch_size,
        "init": "scratch",
    }
    data = f"{job.folder}/{'text' if job.what == 'pretrain' else job.what}"
    if job.what == "pretrain":
        c = train_gpt2.Config(data, "", device="cpu", **sizes)
        rows, batches = train_gpt2.TokenRows(data, "train", c.block_size), train_gpt2.text_batches
        forward = train_gpt2.forward_text
    else:
        isolated = job.who != "full_logits_causal"
        c = train_sft.Config(data, "", device="cpu", isolate=isolated, **sizes)
        rows, batches = train_sft.open_rows(c, "train"), train_sft.sft_batches(c)
        forward = train_sft.forward_sft
    if job.who != "nanosft":
        forward = forward_full_logits
    bench_config = bench.Config(device="cpu", steps=config.steps, warmup=config.warmup)
    return bench.measure_steps(bench_config, c, rows, batches, forward)


def forward_full_logits(model, x, y, weights=None, segments=None) -> tuple:
    import torch.nn.functional as F

    logits = model(x, segments=segments)  # (B, T, V)
    loss_sum = F.cross_entropy(
        logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum"
    )
    return loss_sum, None


def result(tokens: list[int], trained: list[int], seconds: list[float]) -> dict:
    """Medians over the steps, and this process's peak memory."""
    return {
        "tokens_per_s": statistics.median(n / dt for n, dt in zip(tokens, seconds)),
        "trained_share": sum(trained) / sum(tokens),
        "step_s": statistics.median(seconds),
        "peak_memory_gb": peak_memory_gb(),
    }


def peak_memory_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def hugging_face_model(config: Config):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    sizes |= {"vocab_size": 50304, "n_positions": config.block_size, "use_cache": False}
    as_ours = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "eos_token_id": 50256}
    return GPT2LMHeadModel(GPT2Config(**sizes, **as_ours))


def padded_batches(config: Config, job: Job) -> Iterator[dict]:
    """Whole examples at random, right-padded to the longest; or rows of text, without padding."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    if job.what == "pretrain":
        ids = open_shards(f"{job.folder}/text", read_meta(f"{job.folder}/text", "text"), "train")[0]
        T, B = config.block_size, config.batch_size
        for start in range(0, len(ids) - B * T, B * T):
            x = torch.from_numpy(ids[start : start + B * T].astype(np.int64)).view(B, T)
            yield {"input_ids": x, "labels": x, "attention_mask": None}
    examples = [(ids[: config.block_size], w[: config.block_size])
                for ids, w in examples_of(f"{job.folder}/sft")]  # fmt: skip
    order = np.random.default_rng(0).permutation(len(examples))
    mean = sum(len(ids) for ids, _ in examples) / len(examples)
    size = round(config.batch_size * config.block_size / mean)
    for start in range(0, len(order) - size, size):
        batch = [examples[i] for i in order[start : start + size]]
        x = [torch.from_numpy(ids) for ids, _ in batch]
        y = [torch.from_numpy(np.where(w > 0, ids, -100)) for ids, w in batch]
        mask = pad_sequence([torch.ones_like(ids) for ids in x], True)
        x, y = pad_sequence(x, True, 50256), pad_sequence(y, True, -100)
        yield {"input_ids": x, "labels": y, "attention_mask": mask}


def train_transformers(config: Config, job: Job) -> dict:
    import torch

    model = hugging_face_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-5, fused=True)
    batches, rows = padded_batches(config, job), []
    for _ in range(config.warmup + config.steps):
        clock = time.perf_counter()
        batch = next(batches)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mask, trained = batch["attention_mask"], int((batch["labels"] != -100).sum())
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        rows.append((tokens, trained, time.perf_counter() - clock))
    return result(*map(list, zip(*rows[config.warmup :])))


def byte_pair_tokenizer():
    """GPT-2's tokenizer with our special tokens, of the files that tiktoken keeps: no hub."""
    import hashlib

    import tokenizers
    from transformers import PreTrainedTokenizerFast

    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # tiktoken's key
    cache = Path(
        os.environ.get("TIKTOKEN_CACHE_DIR", Path(tempfile.gettempdir(), "data-gym-cache"))
    )
    vocab, merges = (str(cache / hashlib.sha1(f"{base}{name}".encode()).hexdigest())
                     for name in ("encoder.json", "vocab.bpe"))  # fmt: skip
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocab, merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


def trl_trainer(config: Config, dataset, model, out: str, callbacks=()):
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        out, packing=True, max_length=config.block_size, completion_only_loss=True, use_cpu=True,
        per_device_train_batch_size=config.batch_size, max_steps=config.warmup + config.steps,
        learning_rate=5e-5, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return SFTTrainer(model, args, train_dataset=dataset, processing_class=byte_pair_tokenizer(),
                      callbacks=list(callbacks))  # fmt: skip


def train_trl(config: Config, job: Job) -> dict:
    from datasets import Dataset
    from transformers import TrainerCallback

    clocks, tokens, trained = [], [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clocks.append(time.perf_counter())

    rows = [{"input_ids": ids.tolist(), "completion_mask": (weights > 0).astype(int).tolist()}
            for ids, weights in examples_of(f"{job.folder}/sft")]  # fmt: skip
    trainer = trl_trainer(
        config, Dataset.from_list(rows), hugging_face_model(config), f"{job.folder}/out", [Clock()]
    )
    collate = trainer.data_collator

    def counting(features):  # the n-th call makes the n-th step's batch
        tokens.append(sum(len(row["input_ids"]) for row in features))
        batch = collate(features)
        trained.append(int((batch["labels"] != -100).sum()))
        return batch

    trainer.data_collator = counting
    trainer.train()
    first, last = config.warmup, config.warmup + config.steps
    seconds = np.diff(clocks).tolist()[first - 1 :]
    return result(tokens[first:last], trained[first:last], seconds)


# ----- the other comparisons ---------------------------------------------------------------------


def generate(config: Config, job: Job) -> dict:
    """Greedy, from the same weights and prompts; nothing stops early."""
    import torch

    from model import GPT, GPTConfig

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

        def step() -> list[list[int]]:
            mask = torch.ones_like(prompts)
            return peer.generate(prompts, attention_mask=mask, max_new_tokens=new, do_sample=False)[
                :, 32:
            ]
    else:

        def step() -> list[list[int]]:
            return model.generate(prompts.tolist(), new, temperature=0)

    rates = []
    for _ in range(1 + config.steps):
        clock = time.perf_counter()
        answers = step()
        rates.append(sum(map(len, answers)) / (time.perf_counter() - clock))
    same = sum(int(i) for i in answers[0])  # a checksum: do both say the same?
    return {"tokens_per_s": statistics.median(rates[1:]), "peak_memory_gb": peak_memory_gb(),
            "answer_sum": same}  # fmt: skip


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
            "tokens_per_s_without_startup": tokens / (seconds - startup)}  # fmt: skip


def prepare_tiktoken(config: Config, job: Job) -> dict:
    """Bare encode_ordinary_batch, a thread a core; reading the rows is not counted."""
    texts = [m["content"] for turns in turns_of(job) for m in turns] * config.prepare_times
    encoding = get_encoding("gpt2")
    clock = time.perf_counter()
    ids = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
    return {"tokens_per_s": sum(map(len, ids)) / (time.perf_counter() - clock)}


def prepare_trl(config: Config, job: Job) -> dict:
    """What SFTTrainer does to rows of text before it trains: tokenise, mask, pack. One process."""
    from datasets import Dataset

    rows = [{"prompt": f"<|user|>{user['content']}<|end|><|assistant|>",
             "completion": f"{assistant['content']}<|end|>"}
            for user, assistant in turns_of(job)]  # fmt: skip
    tiny = dataclasses.replace(config, n_layer=1, n_head=1, n_embd=8)
    dataset, model = Dataset.from_list(rows), hugging_face_model(tiny)
    clock = time.perf_counter()
    trainer = trl_trainer(config, dataset, model, f"{job.folder}/out")
    seconds = time.perf_counter() - clock
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    return {"tokens_per_s": tokens / seconds, "tokens": tokens}


def turns_of(job: Job) -> list[list[dict]]:
    return [messages_of(row)[:2] for _, row in read_rows(f"{job.folder}/rows.jsonl")]


def count_rows(config: Config, job: Job) -> dict:
    """Rows that the packing makes at T and 2T, and its seconds."""
    examples, found = examples_of(f"{job.folder}/sft"), {}
    lengths = np.array([len(ids) for ids, _ in examples])
    for T in (config.block_size, 2 * config.block_size):
        whole = np.minimum(lengths, T + 1)
        if job.who == "trl":
            from datasets import Dataset
            from trl import pack_dataset

            dataset = Dataset.from_dict({"input_ids": [ids[:T] for ids, _ in examples]})
            clock = time.perf_counter()
            rows = len(pack_dataset(dataset, T, "bfd"))
        else:
            from sft_data import Plan

            clock = time.perf_counter()
            rows = len(Plan(whole, T, "fit"))
        bound = -(-int(whole.sum()) // (T + 1))
        found |= {f"rows_{T}": rows, f"above_bound_{T}": rows / bound - 1,
                  f"seconds_{T}": time.perf_counter() - clock}  # fmt: skip
    return found


# `resume_or_make` and what follows are what train_sft.main does before its first step.
START_UP = """
import sys, time, torch, torch._dynamo, torch.nn.parallel, torch.utils.data
clock = time.perf_counter()
import train_sft
imported = time.perf_counter()
c = train_sft.Config(sys.argv[1], "none", "scratch", device="cpu", n_layer={n_layer},
                     n_head={n_head}, n_embd={n_embd}, block_size={block_size})
run = train_sft.setup_distributed(c.device)
rows = train_sft.open_rows(c, "train")
identity = train_sft.identity_of(c, rows.meta, 1)
model, _, _ = train_sft.resume_or_make(c, run, rows.meta, identity)
next(train_sft.load_steps(rows, c, run, 0, train_sft.sft_batches(c)))
print(imported - clock, time.perf_counter() - clock)
"""


def start_up(config: Config, job: Job) -> dict:
    """Seconds from `import train_sft` to the first step; torch is there before the clock starts."""
    words = [sys.executable, "-c", START_UP.format(**vars(config)), f"{job.folder}/sft"]
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
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
}


# ----- taking turns ------------------------------------------------------------------------------


def in_its_own_process(config: Config, job: Job) -> dict:
    python = config.peers_python if job.who in PEERS else sys.executable
    words = json.dumps([dataclasses.asdict(config), dataclasses.asdict(job)])
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": job.folder, "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run([python, __file__, "--job", words], capture_output=True, text=True,
                          env={**os.environ, **offline})  # fmt: skip
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


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
            if log:
                entry = {"what": what, "who": who, "batch": batch, "repeat": repeat, **row}
                print(json.dumps(entry), file=log, flush=True)
    print(f"\n{what}" + (f", {batch} at once" if batch else ""))
    for who, error in left_out.items():
        print(f"  {who:20} left out: {error}")
    if "nanosft" in found:
        print_table({who: found[who] for who in COMPARISONS[what] if who in found})


HIDDEN = ("answer_sum", "flops_per_s", "palm_flops_per_s", "trained_tokens_per_s")  # JSON has them


def print_table(found: dict[str, list[dict]]) -> None:
    """A line a contender: medians; in round brackets the range, in square ones ours over theirs."""

    def median(who: str, key: str) -> float:
        return statistics.median(row[key] for row in found[who])

    for who, rows in found.items():
        line = f"  {who:18}"
        for key in sorted(rows[0].keys() - HIDDEN, key=list(rows[0]).index):
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
        raise ValueError(f"--only: {sorted(unknown)} unknown; choose from {','.join(COMPARISONS)}")
    log = open(config.json, "a") if config.json else None  # noqa: SIM115
    with tempfile.TemporaryDirectory() as folder:
        data = in_its_own_process(config, Job("data", "nanosft", folder))
        print(f"data: {config.data or 'made up'}", data)
        for what in config.only.split(","):
            for batch in config.batches if what == "generate" else (0,):
                compare(config, what, batch, folder, log)


if __name__ == "__main__":
    run_cli(main, Config)
