"""Read and write Hugging Face's GPT-2 format: config.json and model.safetensors.

This file works on folders, dicts and tensors; `GPT.from_pretrained` and `GPT.save_pretrained` in
model.py call it. Parameter names are those of model.py's state dict.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanosft.cli import UserError
from nanosft.shards import SUMS, verify

PAD_VOCAB_TO = 64  # the number of embedding rows is a multiple of this, for faster matmuls
HUB_GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # hub ids without an owner
SIZES = ("n_layer", "n_head", "n_embd")
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
    """50257 -> 50304: the next multiple of 64."""
    return math.ceil(n / PAD_VOCAB_TO) * PAD_VOCAB_TO


def is_finite(tensor: Tensor) -> bool:
    """Are all numbers finite? Their sum tells it several times faster, unless it overflows."""
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def is_transposed(name: str) -> bool:
    """Hugging Face stores GPT-2's linear weights as (in, out), PyTorch's Linear as (out, in)."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


# ----- in ----------------------------------------------------------------------------------------


def find_model(name: str) -> Path:
    """The folder with config.json, from a model folder, run folder, GPT-2 name or hub id."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if checkpoint := newest_checkpoint(folder):
        return checkpoint
    if folder.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise UserError(f"{name}: no model found (neither config.json nor step_* checkpoints)")
    from huggingface_hub import snapshot_download

    hub_id = f"openai-community/{name}" if name in HUB_GPT2 else name
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["config.json", "model*.safetensors"]))
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
    try:
        settings = dict(json.loads((folder / "config.json").read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}/config.json: not a JSON object ({error})") from error
    verify(folder / "config.json")
    return settings


def read_sizes(folder: Path) -> dict[str, int]:
    """The keyword arguments of model.GPTConfig. UserError: a model that GPT does not support."""
    settings = read_config(folder)
    C = settings.get("n_embd")
    required = REQUIRED | {"n_inner": (None, 4 * C if type(C) is int else None)}
    for key, allowed in required.items():
        if key in settings and settings[key] not in allowed:
            raise UserError(f"{folder}/config.json: {key} is {settings[key]!r}, but nanosft only "
                            f"supports GPT-2's {allowed[0]!r}")
    try:
        sizes = {key: settings[key] for key in SIZES}
        n_vocab, block_size = settings["vocab_size"], settings["n_positions"]
    except KeyError as error:
        raise UserError(f"{folder}/config.json: no {error}; is this a GPT-2?") from error
    sizes |= {"block_size": block_size, "vocab_size": n_vocab,
              "n_vocab": settings.get("n_vocab", n_vocab)}  # of checkpoints that held padding rows
    for key, value in sizes.items():
        if type(value) is not int or not 1 <= value <= 2**31:
            raise UserError(f"{folder}/config.json: {key} is {value!r}, not a size")
    if sizes["n_vocab"] > n_vocab:
        raise UserError(f"{folder}/config.json: n_vocab {sizes['n_vocab']} is above its vocab_size")
    return sizes | {"vocab_size": pad_vocab(n_vocab)}


def read_tensors(folder: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the names and shapes of `like`, in float32.

    Embedding rows missing from the file start at the mean of the rows it has.
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
    found = {name.removeprefix("transformer."): tensor.float() for name, tensor in found.items()}
    state = {}
    for name, want in like.items():
        key = name.removeprefix("transformer.").replace("lm_head", "wte")
        if key not in found:
            raise UserError(f"{folder}: the weights have no {key}; is this a GPT-2?")
        tensor = found[key].T.contiguous() if is_transposed(name) else found[key]
        if not is_finite(tensor):
            raise UserError(f"{folder}: {key} holds a number that is not finite")
        if key == "wte.weight" and tensor.shape[1:] == want.shape[1:] and len(tensor) < len(want):
            mean = tensor.mean(0, keepdim=True)
            tensor = torch.cat([tensor, mean.expand(len(want) - len(tensor), -1)])
        if tensor.shape != want.shape:
            raise UserError(f"{folder}: {key} has shape {tuple(tensor.shape)}, but config.json "
                            f"says {tuple(want.shape)}")
        state[name] = tensor
    return state


# ----- out ---------------------------------------------------------------------------------------


def write_model(folder: str | Path, state: dict[str, Tensor], sizes: dict, **settings) -> None:
    """Write model.safetensors and config.json.

    state: model.py's state dict; sizes: its GPTConfig as a dict; settings: extra keys of
    config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name.removeprefix("transformer."): tensor.T if is_transposed(name) else tensor
               for name, tensor in state.items()}
    del tensors["lm_head.weight"]  # tied to wte
    tensors["wte.weight"] = tensors["wte.weight"][: sizes["n_vocab"]]
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "vocab_size": sizes["n_vocab"],  # the file has no rows for padding ids
        "n_positions": sizes["block_size"],
        "n_ctx": sizes["block_size"],  # the name that llama.cpp and MLX read
        "torch_dtype": str(tensors["wte.weight"].dtype).removeprefix("torch."),
        **{key: sizes[key] for key in SIZES},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id")),
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
