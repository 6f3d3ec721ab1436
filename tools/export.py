"""Write a model as a folder that other programs can open: transformers, TRL, vLLM, llama.cpp, MLX.

    python -m tools.export --model out/sft --out my-assistant --dtype bfloat16

A checkpoint is such a folder already. This command leaves out the training state, which is two
thirds of its size, and can halve the rest. nanosft/hf_tokenizer.py says what the other files are.
"""

import dataclasses
import shutil
import sys
from typing import Literal

if __name__ == "__main__" and not __package__:  # run by its path: nothing below is found
    print("error: in the project's folder, run python -m tools.export", file=sys.stderr)
    sys.exit(2)

import torch

from answer import load_assistant, save_model
from nanosft.cli import run_cli
from nanosft.shards import new_folder
from nanosft.weights import find_model


@dataclasses.dataclass
class Config:
    """Write a model without its training state."""

    model: str
    """a nanosft checkpoint or run folder, a Hugging Face folder, a GPT-2 name, or a hub id"""
    out: str
    """folder for the model; must be new or empty"""
    dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """of the weights; a checkpoint has float32, the others round them"""


def main(config: Config) -> None:
    with new_folder(config.out) as folder:
        model, encoding, template = load_assistant(config.model)
        model.to(getattr(torch, config.dtype))
        save_model(folder, model, encoding.name, template)
        if (card := find_model(config.model) / "README.md").is_file():
            shutil.copy(card, folder)
        size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{config.out}: {size / 1e6:,.1f} MB, {config.dtype}, encoding {encoding.name}, "
          f"template {template}")


if __name__ == "__main__":
    run_cli(main, Config)
