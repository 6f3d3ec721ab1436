"""The processes that torchrun started (ranks): devices, sums, exchanges, requests to stop."""

import contextlib
import dataclasses
import datetime
import itertools
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from nanosft.errors import UserError, require_choice

Dtype = Literal["auto", "float32", "bfloat16"]  # of --dtype
STARTED = time.monotonic()
SIGNALED = 1 << 20  # more than there are ranks: their sum shows whether any rank got a signal
CPU = torch.device("cpu")

# Dense bfloat16 FLOP/s from NVIDIA's data sheets; the first name found in the card's name counts
DATASHEET = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
             "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12}


class Stop:
    """A request to stop after the current step: SIGTERM, Ctrl-C, or the end of --max_minutes."""

    def __init__(self):
        self.signal, self.since, self.deadline = 0, 0.0, math.inf
        self.agreed = 0  # the sum of asked() over all ranks at the last step

    def listen(self, max_minutes: float | None) -> None:
        """From now on, a signal is a request, and a second one ends the process at once."""
        self.deadline = STARTED + 60 * (max_minutes or math.inf)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame) -> None:
        if self.signal and time.monotonic() - self.since > 1:  # schedulers may send one twice
            os._exit(128 + number)
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":  # print() must not be used in a handler
                os.write(2, b"\nstopping after this step or the next; a second signal stops at "
                            b"once\n")

    def asked(self) -> int:
        return SIGNALED if self.signal else int(time.monotonic() > self.deadline)

    def exit_code(self) -> int:
        """128 + signal, also on a rank that did not get the signal itself; 0 for --max_minutes."""
        return 128 + (self.signal or signal.SIGTERM) if self.agreed >= SIGNALED else 0


def gather_objects(mine) -> list:
    """One object from each rank, in rank order."""
    everyone = [mine] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(everyone) > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


@dataclasses.dataclass
class Ranks:
    """This process's rank and device, and what it needs to work with the other ranks."""

    rank: int
    world_size: int
    device: torch.device
    dtype: str = "float32"  # of matrix products
    stop: Stop = dataclasses.field(default_factory=Stop)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def length_multiple(self) -> int:
        """Of rows of any length. On a GPU 64: compilers and cuDNN plan anew for each length."""
        return 64 if self.device.type == "cuda" else 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree_to_stop(self) -> bool:
        """Whether all ranks should stop: the same answer on each."""
        self.stop.agreed = self.stop.asked()
        if self.world_size > 1:
            asked = torch.tensor(self.stop.agreed, device=self.device)
            self.stop.agreed = self.sum(asked).item()
        return self.stop.agreed > 0

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """What trains: the model itself, or DDP around it if there are several ranks."""
        # without device_ids, DDP leaves the micro-batch on the CPU
        return model if self.world_size == 1 else DDP(model, gradient_as_bucket_view=True)

    def gather(self, mine: list) -> list:
        """Reassemble a list, on every rank, from each rank's items [rank::world_size]."""
        turns = itertools.zip_longest(*gather_objects(mine))
        return [item for turn in turns for item in turn if item is not None]

    def in_step(self, items: Sequence) -> Iterator:
        """This rank's items, with a barrier after each; ranks that have run out of items join in.
        So a slow rank delays the others by one item at a time, not by all of them at the end."""
        for i in range(max(gather_objects(len(items)))):
            yield from items[i : i + 1]
            if self.world_size > 1:
                dist.barrier()

    def pin(self, fields: dict) -> dict:
        """Tensors in pinned memory, if the device is a GPU: a copy from there is only queued."""
        if self.device.type != "cuda":
            return fields
        return {name: value.pin_memory() if isinstance(value, Tensor) else value
                for name, value in fields.items()}

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products in bfloat16, if that is the dtype; weights and sums stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, self.dtype == "bfloat16")

    def print(self, *args) -> None:
        if self.is_main:
            print(*args, flush=True)

    def finish(self) -> None:
        if self.world_size > 1:
            # Gloo's threads may still need the GIL to free the last collective's tensor, and would
            # hang if the process group were destroyed first; the barrier gives them time
            dist.barrier()
            dist.destroy_process_group()


def setup_distributed(device: str = "auto", dist_timeout: float = 10, dtype: str = "auto",
                      ) -> Ranks:
    """Read torchrun's environment; start NCCL on GPUs, Gloo on a CPU. dist_timeout: in minutes."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        mps = torch.backends.mps.is_available() and world_size == 1
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device.startswith("cuda:") and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise UserError(f"--device {device} is one GPU, but each process on this machine needs its "
                        "own; use --device cuda and, to choose them, CUDA_VISIBLE_DEVICES")
    try:
        torch_device = torch.device(device, local_rank if device == "cuda" else None)
        torch.empty(1, device=torch_device)  # fails here if there is no such device
    except (RuntimeError, AssertionError) as error:
        reason, n_seen = str(error).splitlines()[0], torch.cuda.device_count()
        advice = "use another device or fewer processes on this machine"
        if 0 < n_seen <= local_rank:
            advice += (f"; local rank {local_rank} sees only {n_seen} GPU(s): if there are more, "
                       "show all to each process (Slurm: --gpus-per-node, not --gpus-per-task)")
        raise UserError(f"--device {device}: not available here ({reason}); {advice}") from error
    is_cuda = torch_device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(torch_device)
        torch.set_float32_matmul_precision("high")
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if is_cuda else "gloo",
                                timeout=datetime.timedelta(minutes=dist_timeout),
                                device_id=torch_device if is_cuda else None)
    return Ranks(rank, world_size, torch_device, choose_dtype(dtype, torch_device))


def choose_dtype(name: str, device: torch.device) -> str:
    """--dtype auto is bfloat16 on a GPU that supports it, and float32 elsewhere."""
    require_choice("dtype", name, get_args(Dtype))
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return name if name != "auto" else "bfloat16" if has_bfloat16 else "float32"


def peak_flops(device: torch.device) -> float | None:
    """The data sheet's rate of this card, if it is known and this is not just a MIG part of it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    is_part = " MIG " in name  # such as "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    return next((rate for card, rate in DATASHEET.items() if card in name and not is_part), None)


def flops(sizes, tokens: int, head_tokens: int, pairs: int) -> int:
    """FLOPs of a training step, forward and backward: 6 per weight and token, 12 per pair and C.

    sizes: a GPTConfig. head_tokens go through the vocabulary projection; pairs counts the attended
    (query, key) pairs. Source: PaLM, appendix B, where head_tokens = tokens and pairs = tokens * T.
    A block has (3 + 1 + 4 + 4) * C * C weights; biases, norms, softmax, and optimizer are left out
    there, too.
    """
    L, C, V = sizes.n_layer, sizes.n_embd, sizes.vocab_size
    return 6 * 12 * L * C * C * tokens + 6 * V * C * head_tokens + 12 * L * C * pairs


def total_memory(device: torch.device) -> float:
    """Bytes of the GPU, or this rank's share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # Windows, and systems without these names
        return math.inf
    return total / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def require_memory(need: float, what: str, device: torch.device = CPU) -> str:
    """`3.1 of 24 GB`. UserError if `what` needs more bytes than there are."""
    total = total_memory(device)
    if need > total:
        raise UserError(f"{what}: needs about {need / 1e9:.3g} GB, but a rank has "
                        f"{total / 1e9:.3g} GB ({device.type}) here; lower it")
    return f"{need / 1e9:.3g}" + (f" of {total / 1e9:.3g} GB" if total < math.inf else " GB")
