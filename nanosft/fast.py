"""The same results, faster. `speed_up(gpt)` is the one entry point for the network.

Plain forms stand in model.py and generate.py and run without this file. A fast form takes the place
of a plain one only after both gave the same values and gradients on a small random batch, so a
changed attention, logits, or loss stays in place and a line says so. The batch is small: a change
that shows only beyond 2,048 tokens, or only for a target that is not among its 16, goes unnoticed.
No form keeps a tensor: `.to`, `deepcopy`, and `load_state_dict(assign=True)` stay right.
"""

import contextlib
import functools
import inspect
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanosft.errors import one_line

CHUNK_BYTES = {"cpu": 50 << 20, "cuda": 1 << 30}  # of logits held at once in the loss; cpu: LOG.md
LOOP_FROM = 4096  # mean segment length * T from which a loop over segments beats a mask: LOG.md
MAX_ROWS = 32  # with more, F.linear is as fast: LOG.md
SLICES = 16  # of the weight for a single row: enough to keep 16 cores busy
IGNORE_INDEX = -100  # PyTorch's, as in model.py


# ----- which forms run ---------------------------------------------------------------------------


def speed_up(gpt, compile: bool = False):
    """Give a model.GPT the fast forms that agree with its own functions; returns it.

    Its class becomes a subclass, so the plain forms stay reachable through `super()`; so do its
    nn.Linear layers. compile: also torch.compile the blocks, in one graph.
    """
    plain, gpt.is_compiled = type(gpt), compile
    if not issubclass(plain, Fast):
        gpt.__class__ = fast = type(plain.__name__, (Fast, plain), {})
        for name, trial in TRIALS.items():
            if not agree(gpt, plain, trial):
                setattr(fast, name, inspect.getattr_static(plain, name))
                say(f"{name}: keeping the model's own version, the fast one gives another result")
        linears = [layer for layer in gpt.modules() if type(layer) is nn.Linear]
        if linears and agree(linears[0], FewRows, try_linear):
            for layer in linears:
                layer.__class__ = FewRows
    if compile:  # dynamo's default cuts blocks where DDP's buckets end: at C = 1600 into 4 graphs
        torch._dynamo.config.optimize_ddp = False
    for block in gpt.transformer.h if compile else ():
        block.compile()
    for layer in gpt.modules() if compile else ():
        if type(layer) is nn.Embedding:
            layer.__class__ = HalfEmbedding
    return gpt


def can_compile(device: torch.device) -> bool:
    """Does torch.compile run here? On a GPU it needs Triton and a C compiler. If not, say so."""
    try:
        compiled(torch.square)(torch.ones(1, device=device))
        return True
    except Exception as error:  # of many types
        reason = str(error).partition("\n")[0]
        say(one_line(f"not compiled: torch.compile does not run here ({reason})"))
        return False


def say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line)


say_once = functools.cache(say)


@torch.enable_grad()
def agree(module: nn.Module, other: type, trial) -> bool:
    """Does trial(module), a list of tensors or None, give the same if its class is `other`?"""
    results, own, precision = [], type(module), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32 here
    for kind in (own, other):
        module.__class__ = kind
        try:
            results.append(trial(module))
        except Exception:  # of a changed function that cannot run on the trial's sizes
            results.append(None)
    module.__class__ = own
    torch.set_float32_matmul_precision(precision)
    found, want = results
    return None not in results and all(
        a is b is None or (None not in (a, b) and a.shape == b.shape and is_near(a, b))
        for a, b in zip(found, want))


def is_near(a: Tensor, b: Tensor) -> bool:
    """Up to rounding, relative to the largest value."""
    tolerance = 2e-2 if a.dtype == torch.bfloat16 else 1e-4
    a, b = a.float(), b.float()
    return bool(((a - b).abs().max() <= tolerance * b.abs().max()).item()) if b.numel() else True


def random(shape: tuple, like: Tensor, seed: int, dtype=torch.float32) -> Tensor:
    """The same numbers at every call; the global random state is left alone."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(like.device, dtype)


def try_attention(gpt) -> list:
    """y and its gradients for one head and two rows, of one and of four examples."""
    weight, T = gpt.lm_head.weight, min(gpt.config.block_size, 2048)
    segments = torch.stack([torch.zeros(T), torch.arange(T) * 4 // T]).long()
    segments[1, -(T // 8) :] = -1
    shape = (2, 1, T, gpt.config.n_embd // gpt.config.n_head)
    is_half = weight.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if is_half else torch.float32
    q, k, v, dy = (random(shape, weight, seed, dtype) for seed in range(4))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    with torch.autocast(weight.device.type, torch.bfloat16, is_half):
        y = gpt.attention_for(segments, weight.device)(*inputs)
    parameters = [*inputs, *gpt.parameters()]  # a changed function may have its own
    return [y.detach(), *torch.autograd.grad(y, parameters, dy, allow_unused=True)]


@torch.no_grad()
def try_cached(gpt) -> list:
    """y for new tokens at different positions and at the same one."""
    weight, n = gpt.lm_head.weight, min(gpt.config.block_size, 2048)
    shape = (3, 1, n, gpt.config.n_embd // gpt.config.n_head)
    q, k, v = (random(shape, weight, seed) for seed in range(3))
    attend, last = gpt.attention_for(None, weight.device), n - 1
    return [gpt.attend_cached(attend, q[:, :, :1], k, v, torch.tensor(at, device=weight.device))
            for at in ([last, n // 2, 0], [last, last, last])]


def try_nll_sum(gpt) -> list:
    """The loss, its gradients and what evaluation counts, of 16 targets: the last eight ids in use,
    where the special tokens are, and eight others. The head is cut to 8 columns to stay small."""
    weight, n_vocab = gpt.lm_head.weight, gpt.config.n_vocab
    gpt.lm_head.weight = nn.Parameter(weight[:, :8].detach().float())
    try:
        ids = torch.arange(8)
        targets = torch.stack([n_vocab - 1 - ids, ids * n_vocab // 8]).clamp(min=0)
        if gpt.is_compiled and weight.is_cuda:  # for so few, a compiler would make other code
            targets = targets.repeat(1, 32)
        targets = F.pad(targets, (0, 1), value=IGNORE_INDEX)  # (2, 9)
        weights = torch.linspace(0.1, 1, targets.numel()).view_as(targets)
        x = 5 * random((*targets.shape, gpt.lm_head.weight.size(1)), weight, 0)
        loss = gpt.nll_sum(x.requires_grad_(), targets, weights)
        grads = torch.autograd.grad(loss, [x, *gpt.parameters()], allow_unused=True)
        gpt.hits = torch.zeros(2, dtype=torch.long, device=weight.device)
        with torch.no_grad():
            return [loss.detach(), gpt.nll_sum(x, targets), gpt.hits, *grads]
    finally:
        gpt.lm_head.weight, gpt.hits = weight, None


TRIALS = {"attention_for": try_attention, "attend_cached": try_cached, "nll_sum": try_nll_sum}


@torch.no_grad()
def try_linear(layer: nn.Linear) -> list:
    return [layer(random((rows, layer.in_features), layer.weight, rows, layer.weight.dtype))
            for rows in (1, 3)]


class Fast:
    """The fast forms of a GPT's functions, put before its own class by `speed_up`."""

    is_compiled = False

    def hidden(self, idx: Tensor, segments: Tensor | None = None, positions: Tensor | None = None,
               attends: Sequence[Callable] | None = None) -> Tensor:
        """Not compiled where generation calls it, with `attends`: it has too many shapes."""
        with contextlib.ExitStack() as stack:
            if self.is_compiled and attends is not None:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            return super().hidden(idx, segments, positions, attends)

    def attention_for(self, segments: Tensor | None, device: torch.device | None = None):
        """Preferably with segments on the CPU: then counting them never waits for a GPU."""
        form, weight = None, self.lm_head.weight
        if segments is not None:
            head_size = self.config.n_embd // self.config.n_head
            is_half = torch.is_autocast_enabled(weight.device.type) or weight.itemsize == 2
            form = isolated(segments, weight.device, head_size, is_half, self.is_compiled)
        attend = form or super().attention_for(segments, device)
        if weight.is_cuda and not (torch.is_grad_enabled() or self.is_compiled):
            return functools.partial(without_cudnn, attend)
        return attend

    def new_cache(self, lengths: list[int], end: int):
        device = self.lm_head.weight.device
        if not has_graphs(device):
            return super().new_cache(lengths, end)
        cache = super().new_cache(lengths, end + -end % 8)  # 8: for the attention kernel
        cache.__class__ = type("Cache", (Graphed, type(cache)), {})
        return cache

    def attend_cached(self, attend, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        mask, last = None, k.size(2) - 1
        # in eager mode the longest row, so also a single one, sees all keys
        if has_graphs(q.device) or (len(positions) > 1 and positions.min() < last):
            seen = torch.arange(last + 1, device=q.device) <= positions[:, None]  # (B, n)
            mask = seen[:, None, None]  # (B, 1, 1, n)
        attend = functools.partial(F.scaled_dot_product_attention, attn_mask=mask)
        return without_cudnn(attend, q, k, v) if q.is_cuda else attend(q, k, v)

    def nll_sum(self, x: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The targets may be on the CPU: then finding those that count never waits for a GPU."""
        kept = (targets.flatten() != IGNORE_INDEX).nonzero()[:, 0]  # (N,)
        targets = targets.flatten()[kept]
        weights = torch.ones(len(kept)) if weights is None else weights.flatten()[kept]
        kept, targets, weights = (send(t, x.device) for t in (kept, targets, weights))
        x = x.flatten(0, 1).index_select(0, kept)  # (N, C)
        loss_of = loss_compiled if self.is_compiled and x.is_cuda else loss_in_place
        loss, hits = SummedCrossEntropy.apply(x, self.lm_head.weight, targets, weights,
                                              self.config.n_vocab, torch.is_grad_enabled(),
                                              self.hits is not None, loss_of)
        if self.hits is not None:
            self.hits += torch.stack([hits, torch.full_like(hits, len(kept))])
        return loss


# ----- generation on a GPU -----------------------------------------------------------------------


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


class Graphed:
    """A generate.Cache whose step for new tokens is one CUDA graph: launching its kernels one by
    one takes several times as long as they run.

    A graph has fixed shapes and addresses. So new tokens attend to all of the cache, masked, and a
    finished row keeps its slot, doing nothing of use, until half of the rows are finished.
    """

    def read(self, prompts) -> Tensor:
        x = super().read(prompts)
        self.start()
        return x

    def start(self) -> None:
        self.tokens = torch.zeros_like(self.lengths)
        self.slots = torch.arange(len(self.tokens), device=self.tokens.device)
        self.longest, self.replay = self.end, None

    def append(self, tokens: Tensor) -> Tensor:
        self.tokens[self.slots] = tokens
        if self.replay is None:
            self.x, self.replay = record(self.step, tokens.device)
        self.replay()
        self.lengths[self.slots] += 1
        return self.x[self.slots]

    def step(self) -> Tensor:
        last = min(self.end, self.gpt.config.block_size) - 1
        self.new_at = self.lengths.clamp(max=last)  # a finished row may be full
        return self.run(self.tokens[:, None], self.new_at[:, None], self.attend_new)[:, 0]

    def keep(self, rows: list[int]) -> None:
        self.slots = self.slots[rows]
        if 2 * len(self.slots) <= len(self.lengths):
            super().keep(self.slots.tolist())
            self.start()


def rows_that_fit(gpt, positions: int, most: int = 256) -> int:
    """How many prompts, answers included, the free memory of the GPU takes at once.

    Keys and values of all layers, 1.5 times while finished rows are removed; to read a prompt,
    about 16 * C values a token; for a new token, two copies of its logits in float32.
    """
    C, weight = gpt.config.n_embd, gpt.lm_head.weight
    values = (3 * gpt.config.n_layer + 16) * C * positions + 4 * gpt.config.vocab_size
    free, _ = torch.cuda.mem_get_info(weight.device)
    free += torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
    return int(min(most, max(1, 0.9 * free // (values * weight.itemsize))))


def record(step: Callable, device: torch.device) -> tuple[Tensor, Callable]:
    """(the result of step(), a function that computes it again, in place)."""
    try:
        return capture(step, device)
    except (RuntimeError, ValueError) as error:  # a changed network may wait for the device, say
        say_once(one_line(f"generation: its steps run without a CUDA graph ({error})"))
    x = step().clone()
    return x, lambda: x.copy_(step())


def capture(step: Callable, device: torch.device) -> tuple[Tensor, Callable]:
    """`record`, as a CUDA graph. step() depends only on tensors that stay where they are."""
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        # cache_enabled: weights that autocast has cached may be freed before the graph
        with torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
            with torch.cuda.stream(side):
                step()  # loads kernels, which cannot be recorded
            current.wait_stream(side)
            try:  # thread_local: other threads, such as NCCL's, may go on calling CUDA
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    x = step()
            finally:
                torch.cuda.set_stream(current)  # which PyTorch leaves out if recording fails
    return x, graph.replay


# ----- rows on their way to a GPU ----------------------------------------------------------------


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
    """Copy to the device without waiting: a copy from pinned memory is only queued."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ----- attention within segments: q, k, v (B, n_head, T, hs) -> (B, n_head, T, hs) ---------------


def isolated(segments: Tensor, device: torch.device, head_size: int, is_half: bool,
             is_compiled: bool = False):
    """A function equal to scaled_dot_product_attention with attn_mask=isolated_mask(segments), or
    None if nothing here beats that dense mask, as for many short segments.

    segments (B, T), preferably on the CPU, where counting them never waits for a GPU.
    """
    B, T = segments.shape
    changes = segments[:, 1:] != segments[:, :-1]
    starts = F.pad(changes, (1, 0), value=True).flatten().nonzero().flatten()
    offsets = F.pad(starts, (0, 1), value=B * T)
    if device.type == "cuda" and has_varlen(device, head_size, is_half):
        return Varlen(send(offsets.int(), device), int(offsets.diff().max()))
    if device.type == "cpu" and not is_compiled and len(starts) * LOOP_FROM <= B * T * T:
        return Looped(offsets.diff().tolist())
    return None


@functools.cache
def has_varlen(device: torch.device, head_size: int, is_half: bool) -> bool:
    """Does PyTorch's varlen kernel run on this GPU? If not, say so, once."""
    major, minor = torch.cuda.get_device_capability(device)
    reasons = {
        "CUDA: nobody has tried it on ROCm": torch.version.hip is not None,
        f"a GPU of compute capability 8.0, but this one has {major}.{minor}": major < 8,
        f"a head size of 8, 16, … 256, but n_embd / n_head is {head_size}":
            head_size % 8 or head_size > 256,
        "--dtype bfloat16": not is_half,
    }
    needs = [need for need, is_missing in reasons.items() if is_missing]
    if needs:
        say(f"isolated attention falls back to a dense mask: the varlen kernel needs {needs[0]}")
    return not needs


def without_cudnn(attend: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """For shapes that differ from call to call: cuDNN, which PyTorch prefers on an H100, plans each
    anew, and a step of generation took 44 to 61 ms."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return attend(q, k, v)


class Looped:
    """One segment at a time: no work on pairs of tokens that the mask would discard.

    Not for compiled blocks: the lengths differ from step to step, so each would be a new graph.
    """

    def __init__(self, lengths: list[int]):
        self.lengths = lengths  # of the segments, row by row, padding included

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, T, D = q.shape
        # (B, H, T, D) -> (1, H, B*T, D) -> one (1, H, length, D) per segment
        flat = [t.transpose(0, 1).reshape(1, H, B * T, D).split(self.lengths, 2) for t in (q, k, v)]
        y = [F.scaled_dot_product_attention(*qkv, is_causal=True) for qkv in zip(*flat)]
        return torch.cat(y, dim=2).view(H, B, T, D).transpose(0, 1)


class Varlen:
    """All segments in one kernel, on CUDA in 16-bit precision.

    offsets (segments + 1,) int32: where each begins in the B * T tokens, and their end. longest:
    the length of the longest, for which the kernel reserves blocks in every segment.
    """

    def __init__(self, offsets: Tensor, longest: int):
        self.offsets, self.longest = offsets, longest

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        B, H, T, D = q.shape
        q, k, v = (t.transpose(1, 2).reshape(B * T, H, D) for t in (q, k, v))
        # window (-1, 0): any distance back, none ahead; without it the kernel is not causal
        y = varlen_attn(q, k, v, self.offsets, self.offsets, self.longest, self.longest,
                        window_size=(-1, 0))
        return y.view(B, T, H, D).transpose(1, 2)


# ----- the loss ----------------------------------------------------------------------------------


class SummedCrossEntropy(torch.autograd.Function):
    """(loss_sum, hits) of x (N, C), head (V, C), targets (N,) and weights (N,). By definition

        logits = x @ head.T  # (N, V), the columns from n_vocab on set to -inf
        loss_sum = (weights * F.cross_entropy(logits, targets, reduction="none")).sum()
        hits = (logits.argmax(1) == targets).sum()  # only if counts_hits, else 0

    Only one chunk of the logits exists at a time: forward computes its gradient, too. Softmax and
    sums are float32, whatever the dtype of the matmuls. loss_of: loss_in_place or loss_fused.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, weights, n_vocab, needs_grad, counts_hits, loss_of):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            h, w = hidden.to(dtype or hidden.dtype), head.to(dtype or head.dtype)
            rows = chunk_rows(len(h), len(head), device)
            chunks = zip(h.split(rows), targets[:, None].split(rows), weights[:, None].split(rows))
            loss_sum = torch.zeros((), device=hidden.device)
            hits = torch.zeros((), dtype=torch.long, device=hidden.device)
            # needs_grad is an argument because grad mode is always off inside forward
            d_hidden, d_head = [], torch.zeros_like(head) if needs_grad else None
            buffer = h.new_empty(min(rows, len(h)), len(head))  # the logits of one chunk
            for h_n, target, weight in chunks:
                logits = torch.mm(h_n, w.T, out=buffer[: len(h_n)])  # (n, V)
                loss, right, d_logits = loss_of(logits, target, weight, n_vocab, needs_grad,
                                                counts_hits)
                loss_sum += loss
                hits += right
                if needs_grad:
                    d_hidden.append(d_logits @ w)  # (n, C)
                    add_product(d_head, d_logits.T, h_n)  # (V, C)
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
        return d_hidden.mul_(grad), d_head.mul_(grad), *[None] * 6


def chunk_rows(N: int, V: int, device: str) -> int:
    """Rows of a chunk of N x V logits: chunks of nearly equal size, if possible multiples of 256,
    within CHUNK_BYTES."""
    most = max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * V))
    most -= most % 256 if most > 256 else 0
    rows = math.ceil(N / math.ceil(N / most)) if N else 1
    return rows if most <= 256 else -(-rows // 256) * 256


def loss_in_place(logits, target, weight, n_vocab: int, needs_grad: bool, counts_hits: bool):
    """(loss_sum, hits, d loss_sum / d logits) of logits (n, V), target and weight (n, 1).

    Without a compiler: at most one float32 copy of the logits, and all else in place.
    """
    p = logits.float()  # (n, V), a copy if the logits are bfloat16
    p[:, n_vocab:] = -math.inf
    hits = (p.argmax(1, keepdim=True) == target).sum() if counts_hits else 0
    top, picked = p.amax(1, keepdim=True), p.gather(1, target)  # (n, 1)
    p.sub_(top).exp_()
    total = p.sum(1, keepdim=True)  # (n, 1)
    loss_sum = ((total.log() + top - picked) * weight).sum()
    if not needs_grad:
        return loss_sum, hits, None
    p.mul_(weight / total)  # the softmax, weighted
    p.scatter_add_(1, target, -weight)
    return loss_sum, hits, p if p.dtype == logits.dtype else logits.copy_(p)


def loss_fused(logits, target, weight, n_vocab: int, needs_grad: bool, counts_hits: bool):
    """The same for a compiler, which makes two passes over the logits of it. A comparison with the
    target instead of gather and scatter, for which it would write (n, V) float32 temporaries."""
    column = torch.arange(logits.size(1), device=logits.device)
    is_target, dtype = column == target, logits.dtype  # (n, V)
    logits = logits.float().masked_fill(column >= n_vocab, -math.inf)
    hits = (logits.argmax(1, keepdim=True) == target).sum() if counts_hits else 0
    top = logits.amax(1, keepdim=True)  # (n, 1)
    p = (logits - top).exp()
    total, picked = (t.sum(1, keepdim=True) for t in (p, logits.masked_fill(~is_target, 0)))
    loss_sum = ((total.log() + top - picked) * weight).sum()
    if not needs_grad:
        return loss_sum, hits, None
    return loss_sum, hits, ((p / total - is_target.float()) * weight).to(dtype)


@functools.cache
def compiled(function):
    return torch.compile(function)


def loss_compiled(logits, *args):
    if len(logits) < 2:  # sizes 0 and 1 would be graphs of their own
        return loss_in_place(logits, *args)
    for tensor in (logits, *args[:2]):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)  # n differs from chunk to chunk
    return compiled(loss_fused)(logits, *args)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; total is float32, a and b may be bfloat16."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and torch.version.cuda:  # not on ROCm, not on a CPU
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


# ----- the residual stream on a GPU --------------------------------------------------------------


class HalfEmbedding(nn.Embedding):
    """Under autocast in its dtype, and with it the residual stream, which compiled blocks mostly
    wait for: bfloat16 halves its bytes, as in llm.c and nanochat. LOG.md has what it changes."""

    def forward(self, idx: Tensor) -> Tensor:
        x, device = super().forward(idx), self.weight.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


# ----- a linear layer on a CPU -------------------------------------------------------------------


class FewRows(nn.Linear):
    """A torch.nn.Linear that is faster on a CPU without gradients for up to MAX_ROWS rows.

    F.linear multiplies one row on one core; as a batched product with slices of the weight, it
    uses all cores. For a few rows, F.linear first repacks the weight; weight @ x.T repacks only x.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., n_out)"""
        n_out, C, weight, bias = self.out_features, self.in_features, self.weight, self.bias
        rows = x.numel() // C
        if torch.is_grad_enabled() or x.is_cuda or not 0 < rows <= MAX_ROWS:
            return super().forward(x)
        if rows == 1:
            n = math.gcd(n_out, SLICES)
            slices = weight.view(n, -1, C).mT  # (n, C, n_out / n)
            y = torch.bmm(x.expand(n, 1, C), slices)  # (n, 1, n_out / n)
        else:
            y = (weight @ x.reshape(rows, C).T).T  # (rows, n_out), in memory (n_out, rows)
        y = y.view(*x.shape[:-1], n_out)
        return y if bias is None else (y + bias).contiguous()
