"""Read and write Hugging Face's GPT-2 format: config.json and model.safetensors.

model.py calls this. Parameter names are those of its state dict.
"""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanosft.errors import UserError, one_line, write_json
from nanosft.fast import say
from nanosft.hf_tokenizer import TOKENIZER_FILES, check_tokenizer
from nanosft.machine import first_on_machine
from nanosft.ranks import require_memory
from nanosft.shards import SUMS, verify

HUB_GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # hub ids without an owner
HUB_FILES = ["model*.safetensors", *TOKENIZER_FILES]  # config.json is among the latter
PREFIX = "transformer."
# Hugging Face stores GPT-2's linear weights as (in, out), PyTorch's Linear as (out, in)
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# of GPTConfig: their names in config.json
SIZES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "n_positions",
         "vocab_size": "vocab_size"}
# Settings that model.py supports: the allowed values, GPT-2's own first
REQUIRED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def pad_vocab(n: int) -> int:
    """50257 -> 50304: the next multiple of 64, for faster matmuls."""
    return math.ceil(n / 64) * 64


# ----- in ----------------------------------------------------------------------------------------


def find_model(name: str | Path) -> Path:
    """The folder with config.json, from a model folder, run folder, GPT-2 name, or hub id."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if checkpoint := newest_checkpoint(folder):
        return checkpoint
    if folder.exists() or re.search(r"^[./~]|[:\\]|/.*/", str(name)):  # in no hub id
        raise UserError(f"{name}: no model found (neither config.json nor step_* checkpoints)")
    from huggingface_hub import snapshot_download

    hub_id = f"openai-community/{name}" if name in HUB_GPT2 else name
    try:
        with first_on_machine(f"download of {hub_id}") as is_there:
            return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES,
                                          local_files_only=is_there))
    except Exception as error:  # the hub raises many types; each means that there is no model
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name}: neither a local folder nor a model on the hub ({reason})"
                        ) from error


def checkpoints(run: str | Path) -> list[Path]:
    """RUN/step_000500, … in order; a folder gets such a name only once it is complete."""
    steps = [path for path in Path(run).glob("step_*") if path.name[5:].isdecimal()]
    return sorted(steps, key=lambda path: int(path.name[5:]))


def newest_checkpoint(run: str | Path) -> Path | None:
    return next(reversed(checkpoints(run)), None)


def read_config(folder: Path) -> dict:
    """config.json of a model folder."""
    path = verify(folder / "config.json")
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON object ({error})") from error


def open_model(name: str | Path, encoding=None) -> tuple[Path, dict[str, int]]:
    """(folder, keyword arguments of model.GPTConfig). UserError: a model that GPT does not support,
    that has another tokenizer than the encoding, or that does not fit in memory."""
    folder = find_model(name)
    settings, path = read_config(folder), folder / "config.json"
    sizes = {ours: settings.get(theirs) for ours, theirs in SIZES.items()}
    sizes["n_vocab"] = settings.get("n_vocab", sizes["vocab_size"])  # if the file has padding rows
    C = sizes["n_embd"]
    n_inner = (None, 4 * C if type(C) is int else None)
    for key, allowed in [*REQUIRED.items(), ("n_inner", n_inner)]:
        if settings.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key} is {settings[key]!r}, but nanosft only supports "
                            f"GPT-2's {allowed[0]!r}")
    for key, value in sizes.items():
        if type(value) is not int or not 1 <= value <= 2**31:
            raise UserError(f"{path}: {key} is {value!r}, not a size; is this a GPT-2?")
    if sizes["n_vocab"] > sizes["vocab_size"]:
        raise UserError(f"{path}: n_vocab {sizes['n_vocab']} is above its vocab_size")
    if encoding is not None:
        free = check_tokenizer(folder, settings, encoding, sizes["n_vocab"])
        if free:
            sizes["n_vocab"] = min(free.values())
            say(one_line(f"{folder}: no text contains {', '.join(free)}; embeddings from id "
                         f"{sizes['n_vocab']} on start at the mean"))
    sizes["vocab_size"] = pad_vocab(sizes["vocab_size"])
    check_model_size(SimpleNamespace(**sizes))
    return folder, sizes


def count_parameters(sizes) -> int:
    """Of a GPTConfig, padding ids included."""
    V, T, L, C = sizes.vocab_size, sizes.block_size, sizes.n_layer, sizes.n_embd
    return (V + T) * C + L * (12 * C + 13) * C + 2 * C


def check_model_size(sizes) -> None:
    """UserError if the parameters of a GPTConfig do not fit in float32."""
    require_memory(4 * count_parameters(sizes), f"a model with --n_layer {sizes.n_layer}, --n_embd "
                   f"{sizes.n_embd}, --block_size {sizes.block_size}")


def read_tensors(folder: Path, like: dict[str, Tensor], n_vocab: int) -> dict[str, Tensor]:
    """The weights with the names and shapes of `like`, in float32.

    Embedding rows from n_vocab on start at the mean of those before.
    """
    found = {}
    # a checkpoint of ours has one such file; others that a user puts beside it are not listed
    for path in sorted(folder.glob("model.safetensors" if (folder / SUMS).is_file()
                                   else "*.safetensors")):
        verify(path)
        try:
            found |= load_file(path)
        except Exception as error:
            raise UserError(f"{path}: not a complete safetensors file ({error})") from error
    if not found:
        raise UserError(f"{folder}: no *.safetensors file; save the model as safetensors")
    # transformers writes the prefix; GPT-2 itself on the hub and nanosft do not
    found = {name.removeprefix(PREFIX): tensor.float() for name, tensor in found.items()}
    state = {}
    for name, want in like.items():
        key = name.removeprefix(PREFIX).replace("lm_head", "wte")
        if key not in found:
            raise UserError(f"{folder}: the weights have no {key}; is this a GPT-2?")
        tensor = found[key].T.contiguous() if name.endswith(TRANSPOSED) else found[key]
        if not tensor.isfinite().all():
            raise UserError(f"{folder}: {key} holds a number that is not finite")
        if key == "wte.weight" and tensor.shape[1:] == want.shape[1:] and len(tensor) <= len(want):
            tensor = tensor[:n_vocab]
            mean = tensor.mean(0, keepdim=True)
            tensor = torch.cat([tensor, mean.expand(len(want) - len(tensor), -1)])
        if tensor.shape != want.shape:
            raise UserError(f"{folder}: {key} has shape {tuple(tensor.shape)}, but config.json "
                            f"says {tuple(want.shape)}")
        state[name] = tensor.clone()  # of a mapped file, which Windows then could not delete
    return state


# ----- out ---------------------------------------------------------------------------------------


def write_model(folder: str | Path, state: dict[str, Tensor], sizes: dict, **settings) -> None:
    """Write model.safetensors and config.json.

    sizes: a GPTConfig as a dict; settings: extra keys of config.json.
    """
    folder, n_vocab = Path(folder), sizes["n_vocab"]  # the files have no rows for padding ids
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name.removeprefix(PREFIX): tensor.T if name.endswith(TRANSPOSED) else tensor
               for name, tensor in state.items()}
    del tensors["lm_head.weight"]  # tied to wte
    tensors["wte.weight"] = tensors["wte.weight"][:n_vocab]
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "vocab_size": n_vocab,
        "n_positions": sizes["block_size"],
        "n_ctx": sizes["block_size"],  # the name that llama.cpp and MLX read
        "torch_dtype": str(tensors["wte.weight"].dtype).removeprefix("torch."),
        **{key: sizes[key] for key in ("n_layer", "n_head", "n_embd")},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id")),
        **settings,
    })
