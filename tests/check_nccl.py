"""Does NCCL work on this GPU? What one process on one GPU can show of training on several.

    python -m tests.check_nccl
    python -m tests.check_nccl --device cpu    # a rehearsal, over Gloo

A process group of one: a barrier, a sum, and an exchange of objects; then three optimizer steps
under DistributedDataParallel, compiled, with the losses and gradient norms of the same steps
without it. Prints a line for each; exit code 2 if one fails.
"""

import dataclasses
import datetime
import sys
from collections.abc import Callable

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m tests.check_nccl", file=sys.stderr)
    sys.exit(2)

import torch
import torch.distributed as dist

import train_gpt2
import train_sft
from model import GPT, IGNORE_INDEX, GPTConfig
from nanosft import fast
from nanosft.cli import run_cli
from nanosft.errors import UserError
from nanosft.ranks import Ranks

SIZES = GPTConfig(block_size=256, vocab_size=512, n_layer=2, n_head=4, n_embd=256)
STEPS, MICRO_BATCHES, B = 3, 2, 4
TOLERANCE = 1e-3  # relative: a GPU may sum in another order, in bfloat16


@dataclasses.dataclass
class Config:
    """Try NCCL with a single GPU."""

    device: str = "cuda"
    """cuda, or cpu for a rehearsal"""
    compile: bool = True
    """torch.compile the blocks"""


def random_batch(generator: torch.Generator) -> train_gpt2.MicroBatch:
    """Rows of two examples, with the second half of each in the loss."""
    T = SIZES.block_size
    ids = torch.randint(SIZES.vocab_size, (B, T + 1), generator=generator)
    half = torch.arange(T) % (T // 2) < T // 4  # (T,)
    y = ids[:, 1:].masked_fill(half, IGNORE_INDEX)
    segments = (torch.arange(T) * 2 // T).expand(B, T)
    return train_gpt2.MicroBatch(ids[:, :-1], y, torch.ones(B, T), segments, B * T)


def train(config: Config, ranks: Ranks, is_distributed: bool) -> list[float]:
    """The losses and gradient norms of a few steps from the same weights on the same rows."""
    torch.manual_seed(0)
    gpt = fast.speed_up(GPT(SIZES).to(ranks.device), config.compile)
    optimizer = train_gpt2.make_optimizer(gpt, train_gpt2.Config("", ""))
    # what several ranks would train
    model = dataclasses.replace(ranks, world_size=1 + is_distributed).wrap(gpt)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        batches = [random_batch(generator) for _ in range(MICRO_BATCHES)]
        step = train_gpt2.train_step(model, optimizer, batches, 1e-3, 1.0, ranks,
                                     train_sft.forward_sft)
        found += [step["loss"], step["grad_norm"]]
    return found


def has_barrier(config: Config, ranks: Ranks) -> bool:
    dist.barrier()
    return True


def has_sums(config: Config, ranks: Ranks) -> bool:
    numbers = torch.arange(3, device=ranks.device)
    dist.all_reduce(numbers)
    return numbers.tolist() == [0, 1, 2]


def has_exchanges(config: Config, ranks: Ranks) -> bool:
    objects = [None]
    dist.all_gather_object(objects, {"rank": 0})
    return objects == [{"rank": 0}]


def has_steps(config: Config, ranks: Ranks) -> bool:
    found, expected = (train(config, ranks, is_distributed) for is_distributed in (True, False))
    return all(abs(a - b) <= TOLERANCE * abs(b) for a, b in zip(found, expected, strict=True))


CHECKS = {"a barrier": has_barrier, "a sum": has_sums, "an exchange of objects": has_exchanges,
          f"{STEPS} steps under DDP, as without it": has_steps}


def verdict(check: Callable, config: Config, ranks: Ranks) -> str:
    try:
        return "ok" if check(config, ranks) else "FAIL"
    except RuntimeError as error:  # such as NCCL's
        return f"FAIL: {str(error).splitlines()[0]}"


def main(config: Config) -> None:
    ranks = train_gpt2.setup_distributed(config.device)
    is_cuda = ranks.device.type == "cuda"
    backend, device_id = ("nccl", ranks.device) if is_cuda else ("gloo", None)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1,
                            timeout=datetime.timedelta(minutes=1), device_id=device_id)
    verdicts = []
    for what, check in CHECKS.items():
        verdicts.append(verdict(check, config, ranks))
        print(f"  {backend}, {what:36} {verdicts[-1]}", flush=True)
    dist.destroy_process_group()
    if verdicts != ["ok"] * len(CHECKS):
        raise UserError(f"--device {config.device}: {backend} does not work as it should; see FAIL")


if __name__ == "__main__":
    run_cli(main, Config)
