"""Checks before anything is allocated: the memory that the sizes need against what there is."""

import os
from pathlib import Path

import torch

from nanosft.cli import UserError
from nanosft.fast import CHUNK_BYTES

CPU = torch.device("cpu")
# a container's limit under cgroup v2 and v1; v2 writes `max` if there is none
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def total_memory(device: torch.device) -> float:
    """Bytes of the GPU, or this rank's share of the machine's or container's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [Path(path).read_text().strip() for path in LIMITS if Path(path).is_file()]
    total = min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                 *(int(limit) for limit in limits if limit.isdecimal())])
    return total / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def require_memory(need: float, what: str, device: torch.device = CPU) -> str:
    """`3.1 of 24 GB`. UserError if `what` needs more bytes than there are."""
    total = total_memory(device)
    if need > total:
        raise UserError(f"{what}: needs about {need / 1e9:.3g} GB, but a rank has "
                        f"{total / 1e9:.3g} GB ({device.type}) here; lower it")
    return f"{need / 1e9:.3g} of {total / 1e9:.3g} GB"


def require_row(block_size: int) -> None:
    """UserError if a row of chats, four int64 a token, does not fit."""
    require_memory(32 * block_size, f"--block_size {block_size}")


def require_weights(sizes) -> float:
    """The number of parameters of a GPTConfig. UserError if they do not fit in float32."""
    V, T, L, C = sizes.vocab_size, sizes.block_size, sizes.n_layer, sizes.n_embd
    n_params = (V + T) * C + L * (12 * C + 13) * C + 2 * C
    require_memory(4 * n_params, f"a model with --n_layer {L}, --n_embd {C}, --block_size {T}")
    return n_params


def require_training(sizes, config, ranks) -> str:
    """What a rank needs at its peak, as a line to print. UserError if it has less.

    Weights, gradients and AdamW's two moments take 16 bytes a parameter. A layer keeps about 17 * C
    values per token for the backward pass (2 bytes each in bfloat16); the loss holds a chunk of
    logits and its softmax, and so does evaluation.
    """
    V, L, C = sizes.vocab_size, sizes.n_layer, sizes.n_embd
    at_once = config.batch_size * config.block_size
    size = 2 if ranks.dtype == "bfloat16" else 4
    what = (f"--batch_size {config.batch_size} of --block_size {config.block_size} with n_layer "
            f"{L}, n_embd {C}")
    chunk = CHUNK_BYTES.get(ranks.device.type, CHUNK_BYTES["cuda"])
    activations = at_once * L * 17 * C * size + 2 * min(chunk, 4 * at_once * V)
    need = 16 * require_weights(sizes) + activations
    rows = 32 * config.block_size * config.rows_per_step / ranks.world_size
    require_memory(rows, f"--rows_per_step {config.rows_per_step}")
    return f"about {require_memory(need, what, ranks.device)} ({ranks.device.type})"
