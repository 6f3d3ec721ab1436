"""Does this GPU compute what a CPU computes in float32? Run it before a long run on a new machine.

    python -m tests.check_gpu                                                       # minutes
    python -m tests.check_gpu --device cpu --n_layer 2 --n_embd 64 --block_size 256   # a rehearsal
    python -m tests.check_gpu --ranks 2 --n_layer 2 --n_head 12 --n_embd 768   # two GPUs, over NCCL

Both trainers take 20 steps of a small model on the CPU in float32, then on the GPU: in float32
(with TF32), in bfloat16, compiled, resumed, and on several ranks. The losses of each step are
compared, then the hidden states of packed examples with those of each alone, and greedy answers.
Prints a line for each comparison; exit code 2 if one fails.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m tests.check_gpu", file=sys.stderr)
    sys.exit(2)

import torch
from annotated_types import Ge

import fineweb
import sft_data
import train_gpt2
import train_sft
from model import GPT
from nanosft import fast
from nanosft.cli import run_cli
from nanosft.errors import UserError
from tokenizer import get_encoding, render_prompt

SCRIPTS = {"pretraining": train_gpt2, "SFT": train_sft}
# Largest relative difference allowed in a step's loss. bfloat16 rounds by up to 0.4%, TF32 by
# 0.05%. An H100 gave 1e-3 in bfloat16 and 1.5e-4 in float32 with TF32.
LOOSE, TIGHT = 1e-2, 1e-3


@dataclasses.dataclass
class Config:
    """Compare a GPU with the CPU."""

    device: str = "cuda"
    """compared with the CPU: cuda, mps, or cpu for a rehearsal"""
    steps: Annotated[int, Ge(2)] = 20
    """optimizer steps of each run"""
    n_layer: Annotated[int, Ge(1)] = 4
    """blocks"""
    n_head: Annotated[int, Ge(1)] = 4
    """attention heads per block"""
    n_embd: Annotated[int, Ge(1)] = 256
    """C, width of the residual stream"""
    block_size: Annotated[int, Ge(1)] = 512
    """T, tokens per row"""
    compile: bool = True
    """also compare the compiled model"""
    ranks: Annotated[int | None, Ge(1)] = None
    """also compare this many ranks, each on its own GPU; default: 2 where there are two GPUs"""


def make_data(folder: Path) -> dict[str, str]:
    """Shards of text and of chats with answers of 1 to 60 words: {kind: folder}."""
    words = ["red", "green", "blue", "seven", "eight", "nine"]
    chats = [{"prompt": f"Repeat {words[i % 6]} {1 + i % 60} times.",
              "response": " ".join([words[i % 6]] * (1 + i % 60))} for i in range(600)]
    chat_file, text_file = folder / "chats.jsonl", folder / "texts.jsonl"
    chat_file.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    text_file.write_text("".join(json.dumps({"text": chat["response"]}) + "\n"
                                 for chat in chats * 8))
    data = {"pretraining": f"{folder}/text", "SFT": f"{folder}/chats"}
    fineweb.main(fineweb.Config(data["pretraining"], (str(text_file),), encoding="bytes",
                                workers=1))
    sft_data.main(sft_data.Config(source=(str(chat_file),), out=data["SFT"], encoding="bytes",
                                  workers=1))
    return data


def losses(kind: str, data: str, out: Path, config: Config, n_ranks: int = 1, **flags) -> list:
    """The loss of each step of a run in `out`."""
    sizes = ("n_layer", "n_head", "n_embd", "block_size")
    flags = {key: getattr(config, key) for key in sizes} | {
        "init": "scratch", "batch_size": 4, "rows_per_step": 8, "learning_rate": 6e-4,
        "warmup_steps": 5, "max_steps": config.steps, "save_every": config.steps // 2,
        "eval_tokens": 4 * config.block_size, "device": config.device} | flags
    flags |= {"eval_prompts": 0} if kind == "SFT" else {}
    flags["no_compile"] = not flags.get("compile")  # on CUDA the default is to compile
    script = SCRIPTS[kind]
    if n_ranks == 1:
        script.main(script.Config(data, str(out), **flags))
    else:
        args = ["--standalone", f"--nproc_per_node={n_ranks}", script.__file__, f"--data={data}",
                f"--out={out}", *(f"--{key}" if value is True else f"--{key}={value}"
                                  for key, value in flags.items() if value is not False)]
        subprocess.run([sys.executable, "-m", "torch.distributed.run", *args], check=True)
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]


def resumed(kind: str, data: str, whole: Path, out: Path, config: Config, **flags) -> list:
    """The losses of a run continued from the checkpoint in the middle of the run `whole`."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / f"step_{config.steps:06d}")
    return losses(kind, data, out, config, resume=True, **flags)


def compare_losses(kind: str, data: str, folder: Path, config: Config) -> Iterator[tuple]:
    def run(name: str, **flags) -> list[float]:
        return losses(kind, data, folder / f"{kind} {name}", config, **flags)

    def difference(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) / y for x, y in zip(a, b, strict=True))

    cpu = run("cpu", device="cpu", dtype="float32")
    bfloat16 = run("bfloat16", dtype="bfloat16")
    yield "float32", difference(run("float32", dtype="float32"), cpu), TIGHT
    yield "bfloat16", difference(bfloat16, cpu), LOOSE
    again = resumed(kind, data, folder / f"{kind} bfloat16", folder / f"{kind} resumed", config,
                    dtype="bfloat16")
    yield "resumed", difference(again, bfloat16), TIGHT  # a GPU may sum in another order
    if config.compile:
        yield "compiled", difference(run("compiled", dtype="bfloat16", compile=True), cpu), LOOSE
    n = config.ranks or (2 if config.device == "cuda" and torch.cuda.device_count() > 1 else 1)
    for compile in (False, True)[: 1 + config.compile] if n > 1 else ():
        name = f"{n} ranks{', compiled' if compile else ''}"
        on_ranks = run(name, n_ranks=n, dtype="bfloat16", batch_size=1, compile=compile)
        yield name, difference(on_ranks, cpu), LOOSE
    if n > 1:
        again = resumed(kind, data, folder / f"{kind} {n} ranks", folder / f"{kind} on 1", config,
                        dtype="bfloat16")
        yield f"{n} ranks, resumed on 1", difference(again, bfloat16), LOOSE


@torch.no_grad()
def compare_model(model: GPT, data: str, device: torch.device) -> Iterator[tuple]:
    """A trained model moves to the device and is sped up there: packed examples in bfloat16,
    answers in float32."""
    rows = sft_data.SFTDataset(data, "val", model.config.block_size)
    row = max(rows, key=lambda row: int(row["segments"].max()))  # the one with the most examples
    x, segments = row["input_ids"][None], row["segments"][None]
    alone = [model.hidden(x[segments == i][None]) for i in range(int(segments.max()) + 1)]
    encoding = get_encoding("bytes")
    prompts = [render_prompt(encoding, [{"role": "user", "content": f"Repeat {text} times."}])
               for text in ("red 3", "blue 17", "nine 50")]
    answers = model.generate(prompts, 64, temperature=0)
    fast.speed_up(model.to(device))
    with torch.autocast(device.type, torch.bfloat16):
        packed = model.hidden(x, segments)[segments.to(device) >= 0].float().cpu()  # (n, C)
    apart = float((packed - torch.cat(alone, dim=1)[0]).norm() / packed.norm())
    yield f"{len(alone)} packed examples, each alone", apart, 2 * LOOSE
    torch.set_float32_matmul_precision("highest")  # TF32 could decide a near tie the other way
    same = [a == b for a, b in zip(model.generate(prompts, 64, temperature=0), answers)]
    yield f"{len(same)} greedy answers", 1 - sum(same) / len(same), 0


def show(result: tuple) -> tuple:
    """Print a comparison, and return it."""
    what, found, allowed = result
    verdict = "ok" if found <= allowed else "FAIL"
    print(f"  {what:36} {found:.1e}, at most {allowed:.0e}  {verdict}", flush=True)
    return result


def main(config: Config) -> None:
    device = train_gpt2.setup_distributed(config.device).device
    with tempfile.TemporaryDirectory() as name:
        folder, results = Path(name), []
        data = make_data(folder)
        for kind in SCRIPTS:
            found = compare_losses(kind, data[kind], folder, config)
            results += map(show, ((f"{kind}, {what}", *rest) for what, *rest in found))
        model, _ = train_gpt2.load_checkpoint(str(folder / "SFT float32"))
        results += map(show, compare_model(model, data["SFT"], device))
    where = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(f"\n{where}, torch {torch.__version__}: largest relative difference")
    for result in results:
        show(result)
    if device.type == "cuda" and not fast.has_varlen(device, config.n_embd // config.n_head, True):
        print("  the varlen kernel does not run here, so it was not tested")
    if any(found > allowed for _, found, allowed in results):
        raise UserError(f"--device {config.device}: its results differ from the CPU's; see FAIL")


if __name__ == "__main__":
    run_cli(main, Config)
