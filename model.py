"""GPT-2 in one file: the network, attention within examples, the loss.

It knows nothing about chats or fine-tuning: pretraining and SFT call the same `GPT` with the same
(B, T) ids. `segments` numbers the examples that share a row: they do not attend to each other, and
positions start at 0 in each, so a packed example gets the same logits as it would alone.

What you read here is what runs. nanosft/fast.py can replace some of GPT's functions, and layers,
with faster ones that gave the same result when compared; generate.py calls the same
`hidden` and `logits`. So what you change here changes training, evaluation, and generation.

Shapes: B rows, T tokens, C = n_embd, hs = C / n_head, V = vocab_size, N = non-ignored targets.

>>> model = GPT(GPTConfig(vocab_size=320, n_layer=2, n_head=2, n_embd=32))
>>> logits = model(torch.tensor([[72, 105]]))                       # (1, 2, 320)
>>> loss_sum = model(torch.tensor([[72, 105]]), torch.tensor([[105, -100]]))   # about ln 320
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import generate
from nanosft import weights as weight_files
from nanosft.errors import UserError

IGNORE_INDEX = -100  # marks targets left out of the loss, as in PyTorch and Hugging Face


# ----- the network -------------------------------------------------------------------------------


@dataclasses.dataclass
class GPTConfig:
    """The defaults are GPT-2 124M (table 2 of Radford et al. 2019).

    vocab_size counts the rows of the embedding: GPT-2's 50257 ids, padded to a multiple of 64 for
    faster matmuls. n_vocab counts the ids in use, which come first (0: all); the others have
    probability zero everywhere. (config.json and meta.json say vocab_size for the ids in use.)
    """

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_vocab: int = 0

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; "
                            "change one")
        self.n_vocab = self.n_vocab or self.vocab_size


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, attend: Callable) -> Tensor:
        """attend(q, k, v): which tokens see which; see `attention_for`."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, hs)
        y = attend(q, k, v)  # (B, n_head, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attend: Callable) -> Tensor:
        x = x + self.attn(self.ln_1(x), attend)
        return x + self.mlp(self.ln_2(x))


# ----- attention: q, k, v (B, n_head, T, hs) -> (B, n_head, T, hs) -------------------------------


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A token attends to itself and to the tokens before it in its row."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_for(segments: Tensor | None, device: torch.device | None = None) -> Callable:
    """The attention of these rows: causal, and within each example. segments (B, T) or None."""
    if segments is None:
        return causal
    mask = isolated_mask(segments.to(device))  # (B, 1, T, T)
    return functools.partial(F.scaled_dot_product_attention, attn_mask=mask)


def isolated_mask(segments: Tensor) -> Tensor:
    """segments (B, T) -> (B, 1, T, T): a token attends to its own example, up to itself."""
    same_example = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
    return same_example.tril()[:, None]


def isolated_positions(segments: Tensor) -> Tensor:
    """segments (B, T) -> (B, T): the positions of each example start at 0.

    >>> isolated_positions(torch.tensor([[0, 0, 0, 1, 1, -1]]))
    tensor([[0, 1, 2, 0, 1, 0]])
    """
    column = torch.arange(segments.size(1), device=segments.device)
    is_first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)  # (B, T)
    return column - torch.where(is_first, column, 0).cummax(1).values


# ----- the model ---------------------------------------------------------------------------------


class GPT(nn.Module):
    # nanosft/fast.py may replace these three, and nll_sum below, by faster equivalents
    attention_for = staticmethod(attention_for)
    attend_cached = staticmethod(generate.attend_cached)
    new_cache = functools.partialmethod(generate.Cache)

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # weight tying, as in GPT-2
        self.hits = None  # in evaluation (2,) int64: right targets and all; nll_sum adds to them
        self._init_weights()

    def _init_weights(self) -> None:
        """Source: openai/gpt-2, src/model.py (0.02; positions 0.01; biases 0), and the paper's
        section 2.3: projections into the residual stream scaled by 1/sqrt(their number)."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif name.endswith("wpe.weight"):
                nn.init.normal_(p, std=0.01)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None, weights: Tensor | None = None,
                segments: Tensor | None = None) -> Tensor:
        """idx (B, T) int64 -> logits (B, T, V); with targets -> the float32 sum of weight * nll.

        targets (B, T) int64: the next ids, -100 where ignored. weights (B, T) float32: one per
        target; None: all 1. segments (B, T) int64: which example of its row each token belongs to,
        counted from 0, -1 for padding; None: each row is one text. These may stay on the CPU, so
        counting never forces a GPU sync.
        """
        x = self.hidden(idx, segments)  # (B, T, C)
        return self.logits(x) if targets is None else self.nll_sum(x, targets, weights)

    def hidden(self, idx: Tensor, segments: Tensor | None = None, positions: Tensor | None = None,
               attends: Sequence[Callable] | None = None) -> Tensor:
        """(B, T) -> (B, T, C): everything but the head.

        generate.py passes the positions of new tokens, and one attention function per layer: each
        layer has its own cached keys and values.
        """
        T, device = idx.size(1), self.lm_head.weight.device
        if T > self.config.block_size:
            raise UserError(f"a row of {T} tokens is longer than the model's block_size "
                            f"{self.config.block_size}; shorten it")
        if positions is None and segments is None:
            positions = torch.arange(T, device=device)
        elif positions is None:
            positions = isolated_positions(segments.to(device, non_blocking=True))  # (B, T)
        if attends is None:
            attends = [self.attention_for(segments, device)] * self.config.n_layer
        idx = idx.to(device, non_blocking=True)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        for block, attend in zip(self.transformer.h, attends):
            x = block(x, attend)
        return self.transformer.ln_f(x)

    def logits(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., V); the unused ids, from n_vocab on, get probability zero.

        It multiplies by all V rows of the head: a slice would be misaligned and therefore slow on
        a GPU.
        """
        logits = self.lm_head(x)
        logits[..., self.config.n_vocab :] = -math.inf
        return logits

    def nll_sum(self, x: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss: x (B, T, C), targets and weights (B, T) -> sum of weight * nll, in nats.

        The head runs only at targets in the loss. These N rows of logits are still GPT-2's largest
        tensor by far; the fast form computes the same in chunks of them.
        """
        kept = (targets != IGNORE_INDEX).to(x.device)  # (B, T), N of them True
        targets = targets.to(x.device)[kept]  # (N,)
        logits = self.logits(x[kept]).float()  # (N, V)
        nll = F.cross_entropy(logits, targets, reduction="none")  # (N,)
        if self.hits is not None:
            self.hits += torch.stack([(logits.argmax(1) == targets).sum(), kept.sum()])
        return nll.sum() if weights is None else (weights.to(x.device)[kept] * nll).sum()

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int,
                 temperature: float = 1.0, **sampling) -> list[list[int]]:
        """The new ids for each prompt (a non-empty list of ids); keywords as in generate.stream."""
        answers = [[] for _ in prompts]
        for step in generate.stream(self, prompts, max_new_tokens, temperature, **sampling):
            for row, token in step:
                answers[row].append(token)
        return answers

    # ----- weights in and out, in Hugging Face's format ------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str, encoding=None) -> "GPT":
        """name: a GPT-2 name, hub id, Hugging Face folder, or nanosft checkpoint or run folder.

        The vocabulary is padded to a multiple of 64; new rows start at the mean embedding.
        UserError: not a GPT-2, or one with another tokenizer than the tiktoken encoding, if given.
        """
        folder, sizes = weight_files.open_model(name, encoding)
        with torch.device("meta"):  # shapes only; the weights come from the file
            model = cls(GPTConfig(**sizes))
        state = weight_files.read_tensors(folder, model.state_dict(), sizes["n_vocab"])
        model.load_state_dict(state, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model

    def save_pretrained(self, folder: str | Path, **settings) -> None:
        """Write model.safetensors and config.json, with `settings` as extra keys of the latter."""
        sizes = dataclasses.asdict(self.config)
        weight_files.write_model(folder, self.state_dict(), sizes, **settings)
