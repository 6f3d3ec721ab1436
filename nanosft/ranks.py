"""The processes that torchrun started (ranks): their devices, sums and exchanges."""

import contextlib
import dataclasses
import itertools
import os

import torch
import torch.distributed as dist
from torch import Tensor

from nanosft import process
from nanosft.cli import UserError, minutes, require_choice


@dataclasses.dataclass
class Ranks:
    """This process's rank and device, and what it needs to work with the other ranks."""

    rank: int
    world_size: int
    device: torch.device
    dtype: str = "float32"  # of matrix products
    stop: process.Stop = dataclasses.field(default_factory=process.Stop)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, mine: list) -> list:
        """Reassemble a list, on every rank, from each rank's items [rank::world_size]."""
        turns = itertools.zip_longest(*process.gather(mine))
        return [item for turn in turns for item in turn if item is not None]

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
    """Read torchrun's environment; start NCCL on GPUs, Gloo on a CPU. One process needs neither."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        mps = torch.backends.mps.is_available() and world_size == 1
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        local_rank = int(os.environ.get("LOCAL_RANK", 0)) if device == "cuda" else None
        torch_device = torch.device(device, local_rank)
        torch.empty(1, device=torch_device)  # fails here if there is no such device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device}: not available here ({reason}); use another device or "
                        "fewer processes on this machine") from error
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
        torch.set_float32_matmul_precision("high")
    if world_size > 1 and not dist.is_initialized():
        is_cuda = torch_device.type == "cuda"
        dist.init_process_group("nccl" if is_cuda else "gloo",
                                timeout=minutes("dist_timeout", dist_timeout),
                                device_id=torch_device if is_cuda else None)
    return Ranks(rank, world_size, torch_device, choose_dtype(dtype, torch_device))


def choose_dtype(name: str, device: torch.device) -> str:
    """--dtype auto is bfloat16 on a GPU that supports it, and float32 elsewhere."""
    require_choice("dtype", name, ("auto", "float32", "bfloat16"))
    if name != "auto":
        return name
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bfloat16 else "float32"
