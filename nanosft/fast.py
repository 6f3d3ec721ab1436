"""The same results, faster: attention within segments, the summed loss, one decoding step.

Each has a plain definition of a few lines in model.py; tests compare the two. `Prefetcher` and
`send` keep a GPU from idling while its rows are prepared.
"""

import functools
import itertools
import math
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = {"cpu": 50 << 20, "cuda": 1 << 30}  # of logits held at once in the loss; cpu: LOG.md
LOOP_FROM = 4096  # mean segment length * T from which a loop over segments beats a mask: LOG.md


class Prefetcher:
    """The first n items of an iterator; `fetch` prepares the next one while the device works."""

    def __init__(self, items: Iterator, n: int):
        self.items, self.fetched = itertools.islice(items, n), []

    def fetch(self) -> None:
        self.fetched = self.fetched or list(itertools.islice(self.items, 1))

    def __next__(self):
        self.fetch()
        return self.fetched.pop()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without blocking: a copy from pinned memory is only queued."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# ----- attention: q, k, v (B, n_head, T, hs) -> (B, n_head, T, hs) -------------------------------


def attention_within(segments: Tensor, device: torch.device, head_size: int):
    """A function equal to scaled_dot_product_attention with attn_mask=isolated_mask(segments), or
    None if nothing here beats that dense mask, as for many short segments.

    segments (B, T), preferably on the CPU, else on the device of q, k and v.
    """
    B, T = segments.shape
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)  # (B, T)
    if device.type == "cuda" and has_varlen(device, head_size, torch.is_autocast_enabled("cuda")):
        return Varlen(starts, device)
    if device.type == "cpu":
        begins = starts.flatten().nonzero().flatten()
        lengths = torch.diff(begins, append=torch.tensor([B * T])).tolist()
        if len(lengths) * LOOP_FROM <= B * T * T:
            return Looped(lengths)
    return None


@functools.cache
def has_varlen(device: torch.device, head_size: int, is_half: bool) -> bool:
    """Does PyTorch's varlen kernel run on this GPU? If not, say so, once."""
    major, minor = torch.cuda.get_device_capability(device)
    reasons = {
        f"a GPU of compute capability 8.0, but this one has {major}.{minor}": major < 8,
        f"a head size of 8, 16, … 256, but n_embd / n_head is {head_size}":
            head_size % 8 or head_size > 256,
        "--dtype bfloat16": not is_half,
    }
    needs = [need for need, is_missing in reasons.items() if is_missing]
    if needs and os.environ.get("RANK", "0") == "0":
        print(f"isolated attention falls back to a dense mask: the varlen kernel needs {needs[0]}")
    return not needs


class Looped:
    """One segment at a time: no work on pairs of tokens that the mask would discard."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths  # of the segments, row by row, padding included

    # The lengths differ from step to step, so torch.compile would recompile for each. The public
    # torch.compiler.disable would import the compiler here, which takes two seconds.
    @torch._disable_dynamo
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, T, D = q.shape
        # (B, H, T, D) -> (1, H, B*T, D) -> one (1, H, length, D) per segment
        flat = [t.transpose(0, 1).reshape(1, H, B * T, D).split(self.lengths, 2) for t in (q, k, v)]
        y = [F.scaled_dot_product_attention(*qkv, is_causal=True) for qkv in zip(*flat)]
        return torch.cat(y, dim=2).view(H, B, T, D).transpose(0, 1)


class Varlen:
    """All segments in one kernel, on CUDA in 16-bit precision.

    starts (B, T): True at the first token of each segment.
    """

    def __init__(self, starts: Tensor, device: torch.device):
        offsets = starts.flatten().nonzero().flatten()
        offsets = F.pad(offsets, (0, 1), value=starts.numel())  # (segments + 1,)
        self.offsets = send(offsets.int(), device)
        self.longest = starts.size(1)  # an upper bound is enough

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        B, H, T, D = q.shape
        q, k, v = (t.transpose(1, 2).reshape(B * T, H, D) for t in (q, k, v))
        # window (-1, 0): any distance back, none ahead; without it the kernel is not causal
        y = varlen_attn(q, k, v, self.offsets, self.offsets, self.longest, self.longest,
                        window_size=(-1, 0))
        return y.view(B, T, H, D).transpose(1, 2)


# ----- the loss ----------------------------------------------------------------------------------


def summed_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor,
                         n_vocab: int) -> tuple[Tensor, Tensor]:
    """(loss_sum, hits), float32 and int64 scalars. By definition

        logits = hidden @ head.T  # (N, V), the columns from n_vocab on set to -inf
        loss_sum = (weights * F.cross_entropy(logits, targets, reduction="none")).sum()
        hits = (logits.argmax(1) == targets).sum()

    hidden (N, C), head (V, C), targets (N,) int64, weights (N,). Hits are counted only when
    gradients are off; in training they stay 0.
    """
    needs_grad = torch.is_grad_enabled()
    return SummedCrossEntropy.apply(hidden, head, targets, weights, n_vocab, needs_grad)


class SummedCrossEntropy(torch.autograd.Function):
    """Only one chunk of the (N, V) logits exists at a time: forward computes its gradient, too.

    Softmax and sums are float32, whatever the dtype of the matmuls.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, weights, n_vocab, needs_grad):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            h, w = hidden.to(dtype or hidden.dtype), head.to(dtype or head.dtype)
            rows = max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * len(head)))
            chunks = zip(h.split(rows), targets[:, None].split(rows), weights[:, None].split(rows))
            loss_sum = torch.zeros((), device=hidden.device)
            hits = torch.zeros((), dtype=torch.long, device=hidden.device)
            # needs_grad is an argument because grad mode is always off inside forward
            d_hidden, d_head = [], torch.zeros_like(head) if needs_grad else None
            buffer = h.new_empty(min(rows, len(h)), len(head))  # the logits of one chunk
            for h_n, target, weight in chunks:
                logits = torch.mm(h_n, w.T, out=buffer[: len(h_n)]).float()  # (n, V)
                logits[:, n_vocab:] = -math.inf
                if not needs_grad:
                    hits += (logits.argmax(1, keepdim=True) == target).sum()
                top, picked = logits.amax(1, keepdim=True), logits.gather(1, target)  # (n, 1)
                p = logits.sub_(top).exp_()
                total = p.sum(1, keepdim=True)  # (n, 1)
                loss_sum += ((total.log() + top - picked) * weight).sum()
                if needs_grad:
                    p.mul_(weight / total)  # the softmax, weighted
                    p.scatter_add_(1, target, -weight)  # d loss / d logits
                    if p.dtype != h_n.dtype:  # p is a float32 copy, so the buffer is free
                        p = buffer[: len(h_n)].copy_(p)
                    d_hidden.append(p @ w)  # (n, C)
                    if p.dtype == d_head.dtype:
                        d_head.addmm_(p.T, h_n)  # (V, C)
                    else:
                        d_head += p.T @ h_n
            if needs_grad:
                ctx.grads = torch.cat(d_hidden).to(hidden.dtype), d_head
        return loss_sum, hits

    @staticmethod
    def backward(ctx, grad, _):
        if ctx.grads is None:
            raise RuntimeError("backward() was already called on this loss and used up its "
                               "gradients; compute the loss again")
        d_hidden, d_head = ctx.grads
        ctx.grads = None  # scaled in place, so they can be used only once
        return d_hidden.mul_(grad), d_head.mul_(grad), None, None, None, None


# ----- generation: one token of each row ---------------------------------------------------------

MAX_ROWS = 32  # with more, F.linear is as fast: LOG.md
SLICES = 16  # of the weight in its product with a single row: work for up to 16 cores


class Decoder:
    """The network for one token of each row, (B,) ids -> (B, C); then `head`, (B, C) -> (B, V).

    Equal to GPT's blocks with the cache's attention. But a step computes so little that module
    overhead would show, and F.linear is slow for so few rows.
    """

    def __init__(self, gpt):
        net = gpt.transformer
        self.n_head, self.wte, self.wpe = gpt.config.n_head, net.wte.weight, net.wpe.weight
        self.blocks = [(norm(b.ln_1), FewRows(b.attn.c_attn), FewRows(b.attn.c_proj),
                        norm(b.ln_2), FewRows(b.mlp.c_fc), FewRows(b.mlp.c_proj)) for b in net.h]
        self.ln_f, self.head = norm(net.ln_f), FewRows(gpt.lm_head)

    def __call__(self, tokens: Tensor, cache) -> Tensor:
        x = F.embedding(tokens, self.wte) + F.embedding(cache.advance(), self.wpe)  # (B, C)
        for layer, (ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj) in enumerate(self.blocks):
            qkv = c_attn(ln_1(x)).view(len(x), 3, self.n_head, -1)
            x = x + attn_proj(cache.attend(layer, qkv).view(x.shape))
            x = x + mlp_proj(F.gelu(c_fc(ln_2(x)), approximate="tanh"))
        return self.ln_f(x)


def norm(layer):
    """layer(x) of a torch.nn.LayerNorm, without the overhead of a module."""
    return functools.partial(torch.layer_norm, normalized_shape=layer.normalized_shape,
                             weight=layer.weight, bias=layer.bias, eps=layer.eps)


class FewRows:
    """layer(x) of a torch.nn.Linear, x (B, C) -> (B, O), for a few rows: faster on a CPU.

    F.linear multiplies one row on one core; as a batched product with slices of the weight, it
    uses all cores. For a few rows, F.linear first repacks the weight; weight @ x.T repacks only x.
    """

    def __init__(self, layer):
        self.weight, self.bias = layer.weight, layer.bias  # (O, C), (O,) or None
        n = math.gcd(len(self.weight), SLICES)
        self.slices = self.weight.view(n, -1, self.weight.size(1)).mT  # (n, C, O / n)

    def __call__(self, x: Tensor) -> Tensor:
        if x.is_cuda or len(x) > MAX_ROWS:
            return F.linear(x, self.weight, self.bias)
        if len(x) == 1:
            y = torch.bmm(x.expand(len(self.slices), 1, -1), self.slices).view(1, -1)
        else:
            y = (self.weight @ x.T).T  # (B, O), but (O, B) in memory
        return y if self.bias is None else (y + self.bias).contiguous()
