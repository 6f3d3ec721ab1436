"""GPT-2 in one file: forward, loss, generation, and Hugging Face's weights in and out.

It knows nothing of chats or of fine-tuning: pretraining and SFT call the same `GPT` with the same
(B, T) ids. Two things in it make SFT exact and fast, and neither is special to it:
- `segments` numbers the examples that share a row. They do not see each other, and each one's
  positions start at 0, so a packed example gets the logits that it would get alone.
- The vocabulary projection runs only where a target counts, in chunks, so the (B, T, V) logits,
  GPT-2's largest tensor by far, never exist in training.

Shapes: B rows, T tokens, C = n_embd, V = vocab_size, N = targets that count.

>>> model = GPT(GPTConfig(vocab_size=320, n_layer=2, n_head=2, n_embd=32))
>>> logits = model(torch.tensor([[72, 105]]))                       # (1, 2, 320)
>>> loss_sum = model(torch.tensor([[72, 105]]), torch.tensor([[105, -100]]))   # about ln 320
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

IGNORE_INDEX = -100  # a target that does not count; PyTorch's and Hugging Face's number for it
PAD_VOCAB_TO = 64  # rows of the embedding come in multiples of this: faster matrix products
# Ids in use of the padded vocabularies of tokenizer.py; the rows above are never generated.
IDS_IN_USE = {50304: 50261, 320: 261}
# Source: table 2 of the GPT-2 paper (Radford et al. 2019), heads from openai/gpt-2's hparams.json
SIZES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M parameters
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 355M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1558M
}
CHUNK_BYTES = {"cpu": 50 << 20, "cuda": 1 << 30}  # logits of one chunk in the loss; see LOG.md
LOOP_FROM = 4096  # mean segment length * T from which a loop over segments beats a mask; LOG.md


def pad_vocab(n: int) -> int:
    """50257 -> 50304: the next multiple of 64."""
    return math.ceil(n / PAD_VOCAB_TO) * PAD_VOCAB_TO


@dataclasses.dataclass
class GPTConfig:
    """The defaults are GPT-2 124M with its vocabulary padded from 50257 to 50304."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_vocab: int = 0  # ids in use, which `generate` keeps to; 0: from vocab_size

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}; change one"
            )
        self.n_vocab = self.n_vocab or IDS_IN_USE.get(self.vocab_size, self.vocab_size)


# ----- attention: q, k, v (B, n_head, T, hs) -> (B, n_head, T, hs), four ways --------------------


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each token sees itself and the tokens before it in its row."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Masked:
    """Causal, and within the example: by a dense mask. Best for many short examples."""

    def __init__(self, segments: Tensor):
        T = segments.size(1)
        same = segments[:, None, :, None] == segments[:, None, None, :]
        self.mask = same & torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


class Looped:
    """The same, one example after the other: no work on pairs that the mask would throw away."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths  # of the segments, row after row, padding included

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, T, D = q.shape
        # (B, H, T, D) -> (1, H, B*T, D) -> one (1, H, length, D) per example
        flat = [t.transpose(0, 1).reshape(1, H, B * T, D).split(self.lengths, 2) for t in (q, k, v)]
        y = torch.cat([causal(*example) for example in zip(*flat)], dim=2)  # (1, H, B*T, D)
        return y.view(H, B, T, D).transpose(0, 1)


class Varlen:
    """The same in one kernel, on CUDA in half precision."""

    def __init__(self, starts: Tensor):
        total = starts.numel()
        ends = torch.tensor([total], device=starts.device)
        self.offsets = torch.cat([starts.flatten().nonzero().flatten(), ends]).int()
        self.longest = starts.size(1)  # an upper bound does

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        B, H, T, D = q.shape
        q, k, v = (t.transpose(1, 2).reshape(B * T, H, D) for t in (q, k, v))
        # window (-1, 0): any distance back, none ahead. The default would not be causal.
        y = varlen_attn(q, k, v, self.offsets, self.offsets, self.longest, self.longest,
                        window_size=(-1, 0))  # fmt: skip
        return y.view(B, T, H, D).transpose(1, 2)


def isolate(segments: Tensor):
    """segments (B, T) -> (positions (B, T), the attention that keeps examples apart)."""
    B, T = segments.shape
    column = torch.arange(T, device=segments.device)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    positions = column - torch.where(starts, column, 0).cummax(dim=1).values
    if segments.is_cuda and torch.is_autocast_enabled("cuda"):
        return positions, Varlen(starts)
    if segments.device.type == "cpu":
        begin = starts.flatten().nonzero().flatten()
        lengths = torch.diff(begin, append=torch.tensor([B * T])).tolist()
        if len(lengths) * LOOP_FROM <= B * T * T:
            return positions, Looped(lengths)
    return positions, Masked(segments)


class Cached:
    """One layer's keys and values while generating; row i is filled up to `lengths[i]`."""

    def __init__(self, B: int, length: int, config: GPTConfig, like: Tensor):
        shape = (B, config.n_head, length, config.n_embd // config.n_head)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = self.mask = None
        self.longest = 0

    def advance(self, lengths: Tensor, longest: int, mask: Tensor | None) -> None:
        """Before a step: where each row writes, and what it may see (None: all up to longest)."""
        self.lengths, self.longest, self.mask = lengths, longest, mask

    def keep(self, rows: Tensor) -> None:
        self.k, self.v = self.k[rows], self.v[rows]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.size(2)
        if self.lengths is None:  # prefill: whole prompts, right-padded, so causal is enough
            self.k[:, :, :T], self.v[:, :, :T] = k, v
            return causal(q, k, v)
        if self.mask is None:  # all rows are of one length
            self.k[:, :, self.longest - 1], self.v[:, :, self.longest - 1] = k[:, :, 0], v[:, :, 0]
        else:
            rows = torch.arange(len(self.lengths), device=q.device)
            self.k[rows, :, self.lengths], self.v[rows, :, self.lengths] = k[:, :, 0], v[:, :, 0]
        k, v = self.k[:, :, : self.longest], self.v[:, :, : self.longest]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


# ----- the network -------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, attend) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, C // n_head)
        y = attend(q, k, v)
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

    def forward(self, x: Tensor, attend) -> Tensor:
        x = x + self.attn(self.ln_1(x), attend)
        return x + self.mlp(self.ln_2(x))


class SummedCrossEntropy(torch.autograd.Function):
    """Sum over n of weights[n] * nll(hidden[n] @ head.T, targets[n]), a chunk of n at a time.

    hidden (N, C), head (V, C), targets (N,), weights (N,) -> float32 scalar. A chunk's gradient is
    taken while its logits are at hand, so memory is one chunk of logits instead of N rows of them.
    Softmax and sums are float32 whatever the matrix products are.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, weights, needs_grad):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            h, w = hidden.to(dtype or hidden.dtype), head.to(dtype or head.dtype)
            rows = max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * len(head)))
            chunks = zip(h.split(rows), targets[:, None].split(rows), weights[:, None].split(rows))
            loss_sum = torch.zeros((), device=hidden.device)
            # An argument says so, because inside this forward gradient mode always reads as off.
            d_hidden, d_head = [], torch.zeros_like(head) if needs_grad else None
            space = h.new_empty(min(rows, len(h)), len(head))  # the one buffer of all chunks
            for h_n, target, weight in chunks:
                logits = torch.mm(h_n, w.T, out=space[: len(h_n)]).float()  # (n, V)
                top, picked = logits.amax(1, keepdim=True), logits.gather(1, target)  # (n, 1)
                p = logits.sub_(top).exp_()
                total = p.sum(1, keepdim=True)  # (n, 1)
                loss_sum += ((total.log() + top - picked) * weight).sum()
                if needs_grad:
                    p.mul_(weight / total)  # the softmax, weighted
                    p.scatter_add_(1, target, -weight)  # d loss / d logits
                    p = p.to(h_n.dtype)
                    d_hidden.append(p @ w)  # (n, C)
                    if p.dtype == d_head.dtype:
                        d_head.addmm_(p.T, h_n)  # (V, C)
                    else:
                        d_head += p.T @ h_n
            if needs_grad:
                d_hidden = torch.cat(d_hidden) if d_hidden else torch.zeros_like(h)
                ctx.grads = d_hidden.to(hidden.dtype), d_head
        return loss_sum

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_head = ctx.grads
        ctx.grads = None  # scaled in place, so they serve once
        return d_hidden.mul_(grad), d_head.mul_(grad), None, None, None


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = (
            self.transformer.wte.weight
        )  # tied: one matrix reads and writes tokens
        self._init_weights()

    def _init_weights(self) -> None:
        """Source: openai/gpt-2, src/model.py (0.02; positions 0.01; biases 0), and the paper's
        section 2.3: projections into the residual stream scaled by 1/sqrt(number of them)."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif name.endswith("wpe.weight"):
                nn.init.normal_(p, std=0.01)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """idx (B, T) int64 -> logits (B, T, V); with targets -> the sum of weight * nll, a float32.

        targets (B, T): the next ids, -100 where they do not count. weights (B, T) float32; None: 1.
        segments (B, T): the number of the example at each place of the row, padding -1; None: one.
        """
        x = self.hidden(idx, segments)  # (B, T, C)
        if targets is None:
            return self.lm_head(x)
        at = (targets.flatten() != IGNORE_INDEX).nonzero()[:, 0]  # (N,)
        x, targets = x.flatten(0, 1).index_select(0, at), targets.flatten()[at]  # (N, C), (N,)
        weights = torch.ones(len(at), device=x.device) if weights is None else weights.flatten()[at]
        return SummedCrossEntropy.apply(
            x, self.lm_head.weight, targets, weights, torch.is_grad_enabled()
        )

    def hidden(self, idx: Tensor, segments: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, C): everything but the head."""
        T, limit = idx.size(1), self.config.block_size
        if T > limit:
            raise ValueError(f"a row of {T} tokens is longer than the model's block size {limit}")
        if segments is None:
            positions, attend = torch.arange(T, device=idx.device), causal
        else:
            positions, attend = isolate(segments)
        return self._blocks(idx, positions, [attend] * self.config.n_layer)

    def _blocks(self, idx: Tensor, positions: Tensor, attends: list) -> Tensor:
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        for block, attend in zip(self.transformer.h, attends):
            x = block(x, attend)
        return self.transformer.ln_f(x)

    # ----- generation ----------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        **kwargs,
    ) -> list[list[int]]:
        """The new ids of each prompt; the keywords are `stream`'s."""
        answers = [[] for _ in prompts]
        for step in self.stream(prompts, max_new_tokens, temperature, **kwargs):
            for row, token in step:
                answers[row].append(token)
        return answers

    @torch.no_grad()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_ids: Sequence[int] = (),
        seed: int = 0,
    ) -> Iterator[list[tuple[int, int]]]:
        """Yields, a step, (row, new id) of each prompt that is still being answered.

        Prompts may differ in length. A row ends with a stop id, or when it fills the block size.
        temperature 0 takes the likeliest token; then a batch answers as each prompt would alone.
        """
        lengths = [len(prompt) for prompt in prompts]
        check_request(lengths, self.config.block_size, max_new_tokens, temperature, top_k, top_p)
        sampler = torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        end = min(max(lengths) + max_new_tokens, self.config.block_size)
        x, caches = self._prefill(prompts, end)  # (B, C)
        rows, budgets = list(range(len(prompts))), [max_new_tokens] * len(prompts)
        while True:
            alive = [i for i, (n, left) in enumerate(zip(lengths, budgets))
                     if left > 0 and n < self.config.block_size]  # fmt: skip
            if not alive:
                return
            if len(alive) < len(rows):  # go on with the unfinished rows only
                keep = torch.tensor(alive, device=x.device)
                x = x[keep]
                for cache in caches:
                    cache.keep(keep)
                rows, lengths, budgets = ([a[i] for i in alive] for a in (rows, lengths, budgets))
            # Few rows times a large matrix: twice as fast the other way round on a CPU (LOG.md)
            logits = (self.lm_head.weight @ x.T).T if len(x) <= 32 else self.lm_head(x)  # (B, V)
            tokens = self._sample(logits, temperature, top_k, top_p, sampler)  # (B,)
            new = tokens.tolist()
            yield list(zip(rows, new))
            budgets = [0 if token in stop_ids else left - 1 for token, left in zip(new, budgets)]
            if any(budgets):
                x = self._decode(tokens, lengths, caches)
            lengths = [n + 1 for n in lengths]

    def _prefill(self, prompts: Sequence[Sequence[int]], end: int) -> tuple[Tensor, list[Cached]]:
        """(B, C) at the last token of each prompt, and the caches with room for `end` tokens.

        Prompts are padded on the right: under a causal mask none sees its padding, and each new
        token overwrites one padding key before any later token could look at it.
        """
        device, lengths = self.lm_head.weight.device, [len(prompt) for prompt in prompts]
        caches = [
            Cached(len(prompts), end, self.config, self.lm_head.weight)
            for _ in range(self.config.n_layer)
        ]
        idx = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            idx[row, : len(prompt)] = torch.as_tensor(prompt)
        x = self._blocks(idx.to(device), torch.arange(max(lengths), device=device), caches)
        return x[torch.arange(len(prompts)), torch.tensor(lengths) - 1], caches

    def _decode(self, tokens: Tensor, lengths: list[int], caches: list[Cached]) -> Tensor:
        """One more token a row, (B,), at position lengths[row] -> (B, C)."""
        at, longest, mask = torch.tensor(lengths, device=tokens.device), max(lengths) + 1, None
        if min(lengths) + 1 < longest:
            mask = (torch.arange(longest, device=tokens.device) <= at[:, None])[:, None, None]
        for cache in caches:
            cache.advance(at, longest, mask)
        return self._blocks(tokens[:, None], at[:, None], caches)[:, 0]

    def _sample(self, logits: Tensor, temperature: float, top_k, top_p, sampler) -> Tensor:
        """logits (B, V) -> ids (B,)"""
        logits = logits[:, : self.config.n_vocab].float()
        if temperature == 0:
            return logits.argmax(1)
        logits = logits / temperature
        if top_k is not None:
            floor = logits.topk(min(top_k, logits.size(1))).values[:, -1:]
            logits = logits.masked_fill(logits < floor, -math.inf)
        probs = logits.softmax(1)
        if top_p is not None:  # the smallest set of likeliest tokens that holds top_p of the mass
            ordered, order = probs.sort(1, descending=True)
            outside = ordered.cumsum(1) - ordered >= top_p
            probs = probs.masked_fill(outside.scatter(1, order, outside), 0)
        return torch.multinomial(probs, 1, generator=sampler)[:, 0]

    # ----- weights in and out, in Hugging Face's GPT-2 format ------------------------------------

    @classmethod
    def from_pretrained(cls, name: str) -> "GPT":
        """A GPT-2 name, a hub id, a Hugging Face folder, or a checkpoint or run folder of ours.

        The vocabulary is padded to a multiple of 64; new rows start at the mean embedding.
        """
        folder = find_model(name)
        config = _config_of(read_config(folder), folder)
        tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                tensors |= load_file(path)
            except Exception as error:
                raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
        if not tensors:
            raise ValueError(f"{folder}: no *.safetensors file; save the model as safetensors")
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(_from_hugging_face(tensors, model.state_dict(), folder), assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model.requires_grad_(True)

    def save_pretrained(self, folder: str | Path, **settings) -> None:
        """Write model.safetensors and config.json, with `settings` as extra keys of the latter."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.state_dict()
        del tensors["lm_head.weight"]  # tied
        for name in tensors:
            if _is_transposed(name):
                tensors[name] = tensors[name].T
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = self.config
        settings = {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "vocab_size": config.vocab_size,
            "n_positions": config.block_size,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "n_vocab": config.n_vocab,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
            **settings,
        }
        (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")


def check_request(lengths, block_size, max_new_tokens, temperature, top_k, top_p) -> None:
    """ValueError for prompts and sampling that make no sense, before they become NaNs."""
    if not lengths or min(lengths) == 0 or max(lengths) > block_size:
        raise ValueError(f"prompts need 1 to {block_size} ids, these have {lengths}")
    if max_new_tokens < 0 or temperature < 0:
        raise ValueError(
            f"max_new_tokens {max_new_tokens}, temperature {temperature}: they start at 0"
        )
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"top_k {top_k} must be at least 1, top_p {top_p} above 0 and at most 1")


def find_model(name: str) -> Path:
    """The folder with config.json that a name, hub id, checkpoint or run folder stands for."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if checkpoint := newest_checkpoint(folder):
        return checkpoint
    if folder.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise ValueError(f"{name}: no model there (neither config.json nor step_* checkpoints)")
    from huggingface_hub import snapshot_download

    hub_id = f"openai-community/{name}" if name in SIZES else name
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["config.json", "model*.safetensors"]))
    except Exception as error:  # the hub's errors are many; each means that there is no such model
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name}: neither a folder here nor a model of the hub ({reason})"
        ) from error


def checkpoints(run: Path) -> list[Path]:
    """RUN/step_000500, … by step; a folder gets such a name only when it is complete."""
    steps = [path for path in Path(run).glob("step_*") if path.name[5:].isdigit()]
    return sorted(steps, key=lambda path: int(path.name[5:]))


def newest_checkpoint(run: Path) -> Path | None:
    return next(reversed(checkpoints(run)), None)


def read_config(folder: Path) -> dict:
    """config.json of a model's folder."""
    try:
        return dict(json.loads((folder / "config.json").read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}/config.json: no JSON object ({error})") from error


def _config_of(settings: dict, folder: Path) -> GPTConfig:
    for key, allowed in {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "n_inner": (None, 4 * settings.get("n_embd", 0)),
        "tie_word_embeddings": (True,),
    }.items():
        if key in settings and settings[key] not in allowed:
            raise ValueError(
                f"{folder}/config.json: {key} is {settings[key]!r}, GPT-2 has {allowed[0]!r}"
            )
    try:
        sizes = {key: settings[key] for key in ("n_layer", "n_head", "n_embd")}
        vocab, block_size = settings["vocab_size"], settings["n_positions"]
    except KeyError as error:
        raise ValueError(f"{folder}/config.json: no {error}; is this a GPT-2?") from error
    n_vocab = settings.get("n_vocab", vocab)
    return GPTConfig(block_size=block_size, vocab_size=pad_vocab(vocab), n_vocab=n_vocab, **sizes)


def _is_transposed(name: str) -> bool:
    """Hugging Face keeps GPT-2's linear weights as (in, out), PyTorch's Linear as (out, in)."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _from_hugging_face(tensors: dict, ours: dict, folder: Path) -> dict:
    """Their state dict in our names and shapes. The hub's first GPT-2s lack the prefix."""
    tensors = {
        name.removeprefix("transformer."): tensor.float() for name, tensor in tensors.items()
    }
    state = {}
    for name, want in ours.items():
        key = name.removeprefix("transformer.").replace("lm_head", "wte")
        if key not in tensors:
            raise ValueError(f"{folder}: the weights lack {key}; is this a GPT-2?")
        tensor = tensors[key].T.contiguous() if _is_transposed(name) else tensors[key]
        if key == "wte.weight" and len(tensor) < len(want):
            mean = tensor.mean(0, keepdim=True)
            tensor = torch.cat([tensor, mean.expand(len(want) - len(tensor), -1)])
        if tensor.shape != want.shape:
            raise ValueError(
                f"{folder}: {key} is {tuple(tensor.shape)}, config.json says {tuple(want.shape)}"
            )
        state[name] = tensor
    return state
