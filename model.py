"""GPT-2 in one file: the network, its loss, and generation with a KV cache.

It knows nothing about chats or fine-tuning: pretraining and SFT call the same `GPT` with the same
(B, T) ids. Two things in it make SFT exact and fast, and neither is specific to SFT:
- `segments` numbers the examples that share a row. They do not attend to each other, and positions
  start at 0 in each, so a packed example gets the same logits as it would alone.
- The vocabulary projection runs only where a target is not ignored, in chunks, so the (B, T, V)
  logits, GPT-2's largest tensor by far, are never materialized in training.

Shapes: B rows, T tokens, C = n_embd, hs = C / n_head, V = vocab_size, N = non-ignored targets.

>>> model = GPT(GPTConfig(vocab_size=320, n_layer=2, n_head=2, n_embd=32))
>>> logits = model(torch.tensor([[72, 105]]))                       # (1, 2, 320)
>>> loss_sum = model(torch.tensor([[72, 105]]), torch.tensor([[105, -100]]))   # about ln 320
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanosft import fast, memory, weights as weight_files
from nanosft.cli import UserError

IGNORE_INDEX = -100  # marks targets left out of the loss, as in PyTorch and Hugging Face


# ----- the network -------------------------------------------------------------------------------


@dataclasses.dataclass
class GPTConfig:
    """The defaults are GPT-2 124M (table 2 of Radford et al. 2019).

    vocab_size is the number of embedding rows: GPT-2's 50257 ids, padded to a multiple of 64 for
    faster matmuls. The first n_vocab of them are ids in use (0: all); the others have probability
    zero everywhere.
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


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, n_head, T, hs) each: a token attends to itself and to the tokens before it in its row."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, attend: Callable = causal) -> Tensor:
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

    def forward(self, x: Tensor, attend: Callable = causal) -> Tensor:
        x = x + self.attn(self.ln_1(x), attend)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        memory.require_weights(config)  # UserError before allocating what cannot fit
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # weight tying, as in GPT-2
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
        counted from 0, -1 for padding; None: each row is one text. All may be on the CPU; then
        counting targets and segments never has to wait for a GPU.
        """
        x = self.hidden(idx, segments)  # (B, T, C)
        return self.logits(x) if targets is None else self.loss_sum(x, targets, weights)

    def hidden(self, idx: Tensor, segments: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, C): everything but the head."""
        T, limit = idx.size(1), self.config.block_size
        if T > limit:
            raise UserError(f"a row of {T} tokens is longer than the model's block_size {limit}; "
                            "shorten it")
        device = self.lm_head.weight.device
        if segments is None:
            positions, attend = torch.arange(T, device=device), causal
        else:
            positions = fast.send(isolated_positions(segments), device)
            # a faster function with the same result where there is one, else the dense mask
            head_size = self.config.n_embd // self.config.n_head
            attend = fast.attention_within(segments, device, head_size) or functools.partial(
                F.scaled_dot_product_attention,
                attn_mask=isolated_mask(fast.send(segments, device)))
        return self._blocks(fast.send(idx, device), positions, [attend] * self.config.n_layer)

    def _blocks(self, idx: Tensor, positions: Tensor, attends: list[Callable]) -> Tensor:
        """attends: one per layer, because in generation each layer has its own keys and values."""
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        for block, attend in zip(self.transformer.h, attends):
            # if compiled, block() is for training only: evaluation and generation have so many
            # shapes that they would hit dynamo's recompile limit
            x = (block if torch.is_grad_enabled() else block.forward)(x, attend)
        return self.transformer.ln_f(x)

    def logits(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., V); the unused ids, from n_vocab on, get probability zero.

        It multiplies by all V rows of the head: a slice would be misaligned, so slow, on a GPU.
        """
        logits = self.lm_head(x)
        logits[..., self.config.n_vocab :] = -math.inf
        return logits

    # ----- the loss ------------------------------------------------------------------------------

    def loss_and_hits(self, x: Tensor, targets: Tensor, weights: Tensor | None = None,
                      ) -> tuple[Tensor, Tensor]:
        """x (B, T, C), targets and weights (B, T) -> the sum of weight * nll, a float32 scalar, and
        the hits: how many targets are the most likely id (not counted, 0, while training).

        By definition this is

            kept = targets != IGNORE_INDEX  # (B, T), N of them True
            logits, targets = self.logits(x[kept]), targets[kept]  # (N, V), (N,)
            nll = F.cross_entropy(logits, targets, reduction="none")
            return (weights[kept] * nll).sum(), (logits.argmax(1) == targets).sum()

        but nanosft/fast.py computes it in chunks and never materializes the (N, V) logits.
        """
        at = (targets.flatten() != IGNORE_INDEX).nonzero()[:, 0]  # (N,) indices
        targets = targets.flatten()[at]
        weights = torch.ones(len(at)) if weights is None else weights.flatten()[at]
        at, targets, weights = (fast.send(t, x.device) for t in (at, targets, weights))
        x = x.flatten(0, 1).index_select(0, at)  # (N, C)
        return fast.summed_cross_entropy(x, self.lm_head.weight, targets, weights,
                                         self.config.n_vocab)

    def loss_sum(self, x: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.loss_and_hits(x, targets, weights)[0]

    # ----- weights in and out, in Hugging Face's format ------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str) -> "GPT":
        """name: a GPT-2 name, hub id, Hugging Face folder, or nanosft checkpoint or run folder.

        The vocabulary is padded to a multiple of 64; new rows start at the mean embedding.
        """
        folder = weight_files.find_model(name)
        config = GPTConfig(**weight_files.read_sizes(folder))
        with torch.device("meta"):  # shapes only; the weights come from the file
            model = cls(config)
        state = weight_files.read_tensors(folder, model.state_dict())
        model.load_state_dict(state, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model

    def save_pretrained(self, folder: str | Path, **settings) -> None:
        """Write model.safetensors and config.json, with `settings` as extra keys of the latter."""
        sizes = dataclasses.asdict(self.config)
        weight_files.write_model(folder, self.state_dict(), sizes, **settings)

    # ----- generation ----------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int,
                 temperature: float = 1.0, **sampling) -> list[list[int]]:
        """The new ids for each prompt (a non-empty list of ids); keywords as in `stream`."""
        answers = [[] for _ in prompts]
        for step in self.stream(prompts, max_new_tokens, temperature, **sampling):
            for row, token in step:
                answers[row].append(token)
        return answers

    @torch.no_grad()
    def stream(self, prompts: Sequence[Sequence[int]], max_new_tokens: int,
               temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
               stop_ids: Sequence[int] = (), seed: int = 0) -> Iterator[list[tuple[int, int]]]:
        """Yield a list of (row, new id) at each step, one for every row that is not finished.

        A row is finished after a stop id, or when it reaches block_size. temperature 0 is greedy:
        then each prompt gets the same answer in a batch as alone.
        """
        lengths = [len(prompt) for prompt in prompts]
        check_request(lengths, self.config.block_size, max_new_tokens, temperature, top_k, top_p)
        sampler = torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        end = min(max(lengths) + max_new_tokens, self.config.block_size)
        cache = Cache(lengths, end, self.config, self.lm_head.weight)
        x = self._prefill(prompts, cache)  # (B, C), at the last token of each prompt
        decoder = fast.Decoder(self)  # the same network, for one token per row
        rows = list(range(len(prompts)))  # the prompt index of each unfinished row
        budgets = [min(max_new_tokens, self.config.block_size - n) for n in lengths]  # tokens left
        while any(budgets):
            alive = [i for i, left in enumerate(budgets) if left]
            if len(alive) < len(rows):  # continue with the unfinished rows only
                rows, budgets = [rows[i] for i in alive], [budgets[i] for i in alive]
                x = x[alive]
                cache.keep(alive)
            logits = decoder.head(x)[:, : self.config.n_vocab].float()  # (B, n_vocab)
            tokens = sample(logits, temperature, top_k, top_p, sampler)  # (B,)
            new = tokens.tolist()
            yield list(zip(rows, new))
            budgets = [0 if token in stop_ids else left - 1 for token, left in zip(new, budgets)]
            if any(budgets):
                x = decoder(tokens, cache)

    def _prefill(self, prompts: Sequence[Sequence[int]], cache: "Cache") -> Tensor:
        """Fill the cache; return (B, C), at the last token of each prompt.

        Prompts are padded on the right, where causal attention never looks; each new token replaces
        a padding key before any token could attend to it.
        """
        ids = [torch.as_tensor(prompt, dtype=torch.long) for prompt in prompts]
        idx = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(cache.lengths.device)  # (B, T)
        attends = [functools.partial(cache.prefill, layer) for layer in range(self.config.n_layer)]
        x = self._blocks(idx, torch.arange(idx.size(1), device=idx.device), attends)  # (B, T, C)
        return x[cache.rows, cache.lengths - 1]


def isolated_positions(segments: Tensor) -> Tensor:
    """segments (B, T) -> (B, T): the positions of each example start at 0.

    >>> isolated_positions(torch.tensor([[0, 0, 0, 1, 1, -1]]))
    tensor([[0, 1, 2, 0, 1, 0]])
    """
    column = torch.arange(segments.size(1), device=segments.device)
    is_first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)  # (B, T)
    return column - torch.where(is_first, column, 0).cummax(1).values


def isolated_mask(segments: Tensor) -> Tensor:
    """segments (B, T) -> (B, 1, T, T): a token attends to its own example, up to itself."""
    same_example = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
    return same_example.tril()[:, None]


class Cache:
    """The keys and values of all layers during generation; row i is filled up to lengths[i].

    kv[layer] (B, 2, n_head, end, hs) is zero where unwritten: a masked NaN would still spread.
    """

    def __init__(self, lengths: list[int], end: int, config: GPTConfig, like: Tensor):
        shape = (len(lengths), 2, config.n_head, end, config.n_embd // config.n_head)
        self.kv = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.lengths = torch.tensor(lengths, device=like.device)
        self.keep(slice(None))  # all rows; sets rows, longest and mask

    def keep(self, rows: slice | list[int]) -> None:
        """Keep only these rows."""
        self.kv, self.lengths = [kv[rows] for kv in self.kv], self.lengths[rows]
        self.rows = torch.arange(len(self.lengths), device=self.lengths.device)
        shortest, self.longest = self.lengths.min().item(), self.lengths.max().item()
        self.mask = None  # all rows have the same length
        if shortest < self.longest:  # (B, 1, 1, end), 0 where a row may attend, else -inf
            column = torch.arange(self.kv[0].size(3), device=self.lengths.device)
            unseen = (column >= self.lengths[:, None])[:, None, None]
            self.mask = self.kv[0].new_zeros(unseen.shape).masked_fill(unseen, -math.inf)

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of whole prompts, (B, n_head, T, hs); right-padded, so causal is enough."""
        self.kv[layer][:, :, :, : q.size(2)] = torch.stack([k, v], dim=1)
        return causal(q, k, v)

    def advance(self) -> Tensor:
        """Make room for one more token per row; returns their positions (B,)."""
        positions, self.lengths, self.longest = self.lengths, self.lengths + 1, self.longest + 1
        self.new = (..., self.longest - 1, slice(None))  # where the new keys and values go
        if self.mask is not None:
            self.new = (self.rows, slice(None), slice(None), positions)
            self.mask[self.new] = 0
        return positions

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv (B, 3, n_head, hs) of one token per row -> (B, n_head, 1, hs)"""
        self.kv[layer][self.new] = qkv[:, 1:]
        k, v = self.kv[layer][:, :, :, : self.longest].unbind(1)
        mask = None if self.mask is None else self.mask[..., : self.longest]
        return F.scaled_dot_product_attention(qkv[:, 0, :, None], k, v, attn_mask=mask)


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
           sampler: torch.Generator) -> Tensor:
    """logits (B, n_vocab) -> ids (B,)"""
    if temperature == 0:
        return logits.argmax(1)
    logits = logits / temperature
    if top_k is not None:
        floor = logits.topk(min(top_k, logits.size(1))).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -math.inf)
    probs = logits.softmax(1)
    if top_p is not None:  # the smallest set of top ids that covers top_p of the mass
        ordered, order = probs.sort(1, descending=True)
        outside = ordered.cumsum(1) - ordered >= top_p
        probs = probs.masked_fill(outside.scatter(1, order, outside), 0)
    return torch.multinomial(probs, 1, generator=sampler)[:, 0]


def check_request(lengths: list[int], block_size: int, max_new_tokens: int, temperature: float,
                  top_k: int | None, top_p: float | None) -> None:
    """UserError for invalid prompts or sampling settings, before they turn into NaNs."""
    if not lengths or min(lengths) == 0 or max(lengths) > block_size:
        raise UserError(f"prompts must have 1 to {block_size} ids, but these have {lengths}")
    if max_new_tokens < 0 or temperature < 0:
        raise UserError(f"max_new_tokens {max_new_tokens} and temperature {temperature} must not "
                        "be negative")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise UserError(f"top_k {top_k} must be at least 1, top_p {top_p} above 0 and at most 1")
