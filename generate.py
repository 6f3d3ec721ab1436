"""New tokens from a GPT: prompts of any lengths in one batch, a KV cache, sampling.

The network is model.py's own: `GPT.hidden` walks the blocks for the prompts and then for one new
token per row. The cache only supplies the keys and values of the tokens before it. So a change to a
layer, to the attention, or to the logits changes generation, too.

Shapes: B rows, C = n_embd, hs = C / n_head, n keys so far.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from nanosft.checks import check_request


@torch.no_grad()
def stream(gpt, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 1.0,
           top_k: int | None = None, top_p: float | None = None, stop_ids: Sequence[int] = (),
           seed: int = 0) -> Iterator[list[tuple[int, int]]]:
    """Yield a list of (row, new id) at each step, one for every row that is not finished.

    A row is finished after a stop id, after max_new_tokens, or when it fills block_size.
    temperature 0 is greedy: then each prompt gets the same answer in a batch as alone.
    """
    lengths, block_size = [len(prompt) for prompt in prompts], gpt.config.block_size
    check_request(lengths, block_size, max_new_tokens, temperature, top_k, top_p)
    sampler = torch.Generator(gpt.lm_head.weight.device).manual_seed(seed)
    cache = gpt.new_cache(lengths, min(max(lengths) + max_new_tokens, block_size))
    x = cache.read(prompts)  # (B, C)
    rows = list(range(len(prompts)))  # the prompt index of each unfinished row
    budgets = [min(max_new_tokens, block_size - n) for n in lengths]  # new tokens left
    while any(budgets):
        alive = [i for i, budget in enumerate(budgets) if budget]
        if len(alive) < len(rows):  # continue with the unfinished rows only
            rows, budgets = [rows[i] for i in alive], [budgets[i] for i in alive]
            x = x[alive]
            cache.keep(alive)
        logits = gpt.logits(x)[:, : gpt.config.n_vocab].float()  # (B, n_vocab)
        tokens = sample(logits, temperature, top_k, top_p, sampler)  # (B,)
        new = tokens.tolist()
        yield list(zip(rows, new))
        budgets = [0 if token in stop_ids else n - 1 for token, n in zip(new, budgets)]
        if any(budgets):
            x = cache.append(tokens)


class Cache:
    """The keys and values of all layers; row i is filled up to lengths[i].

    Prompts are padded on the right, where causal attention never looks; each new token replaces a
    padding key before any token could attend to it.
    """

    def __init__(self, gpt, lengths: list[int], end: int):
        self.gpt, self.end, self.longest = gpt, end, max(lengths)
        device = gpt.lm_head.weight.device
        self.lengths = torch.tensor(lengths, device=device)
        self.attention = gpt.attention_for(None, device)  # the model's own: causal
        self.layers = {}  # layer: (keys, values), each (B, n_head, end, hs)

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Run the prompts through the network; (B, C) at the last token of each."""
        ids = [torch.as_tensor(prompt, dtype=torch.long) for prompt in prompts]
        x = self.run(nn.utils.rnn.pad_sequence(ids, batch_first=True), None, self.attend_prompts)
        assert len(self.layers) == self.gpt.config.n_layer, "a layer did not call attend(q, k, v)"
        return x[torch.arange(len(x), device=x.device), self.lengths - 1]

    def append(self, tokens: Tensor) -> Tensor:
        """Run one new token of each row, (B,) ids, through the network -> (B, C)."""
        self.new_at = self.lengths  # (B,), the positions of the new tokens
        self.lengths, self.longest = self.lengths + 1, self.longest + 1
        return self.run(tokens[:, None], self.new_at[:, None], self.attend_new)[:, 0]

    def run(self, idx: Tensor, positions: Tensor | None, attend: Callable) -> Tensor:
        attends = [functools.partial(attend, i) for i in range(self.gpt.config.n_layer)]
        return self.gpt.hidden(idx, positions=positions, attends=attends)  # (B, T, C)

    def attend_prompts(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k and v, with zeros up to (B, n_head, end, hs): a NaN would propagate even where
        masked."""
        B, n_head, T, hs = k.shape
        keys, values = k.new_zeros(2, B, n_head, self.end, hs)
        keys[:, :, :T], values[:, :, :T] = k, v
        self.layers[layer] = keys, values
        return self.attention(q, k, v)

    def attend_new(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, n_head, 1, hs) of the new tokens -> (B, n_head, 1, hs)"""
        (keys, values), at = self.layers[layer], self.new_at[:, None, None, None].expand_as(k)
        keys, values = keys[:, :, : self.longest], values[:, :, : self.longest]
        keys.scatter_(2, at, k)  # row i takes its new key at position new_at[i]
        values.scatter_(2, at, v)
        return self.gpt.attend_cached(self.attention, q, keys, values, self.new_at)

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self.layers = {layer: [t[rows] for t in kv] for layer, kv in self.layers.items()}
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max())


def attend_cached(attend: Callable, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """One query per row, at positions (B,): q (B, n_head, 1, hs), k and v (B, n_head, n, hs).

    `attend`, the model's attention function, needs as many queries as keys: repeat each row's query
    n times and keep the output at its own position, which sees exactly the keys up to itself. The
    fast form computes only that output.
    """
    y = attend(q.expand_as(k), k, v)  # (B, n_head, n, hs)
    return y[torch.arange(len(y), device=y.device), :, positions][:, :, None]


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
