"""nanosft/fast.py equals its plain definitions: attention within segments, the loss, few rows."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from helpers_training import (
    ALONE,
    each_precision,
    gradients,
    plain_loss_sum,
    tiny_model as plain_model,
)
from torch.utils._python_dispatch import TorchDispatchMode

from model import isolated_mask
from nanosft import fast
from train_gpt2 import MicroBatch, evaluate, forward_text
from train_sft import forward_sft

CPU = torch.device("cpu")


def tiny_model(**settings):
    return fast.speed_up(plain_model(**settings))



# ----- attention within segments -----------------------------------------------------------------

SEGMENTS = {
    "several examples a row": [[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, -1, -1, -1]],
    "one example a row": [[0] * 8, [0] * 8],
    "examples of one token": [[*range(8)], [0, 0, 1, 2, 3, 4, 4, 4]],
    "a row of padding": [[0, 0, 1, 1, 1, 1, 1, 1], [-1] * 8],
}


def output_and_gradients(attend, dtype):
    """y and the gradients of q, k and v, each (2, n_head, 8, hs), for random inputs."""
    random = torch.Generator().manual_seed(0)
    q, k, v, upstream = torch.randn(4, 2, 3, 8, 8, generator=random).to(dtype)
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    y = attend(*inputs)
    return [y, *torch.autograd.grad((y * upstream).sum(), inputs)]


def assert_equals_dense_mask(attend, segments, precision):
    plain = functools.partial(F.scaled_dot_product_attention, attn_mask=isolated_mask(segments))
    found, want = (output_and_gradients(each, getattr(torch, precision.dtype))
                   for each in (attend, plain))
    for a, b in zip(found, want):
        precision.assert_close(a, b, atol=1e-6, rtol=1e-5)


@each_precision
@pytest.mark.parametrize("name", SEGMENTS)
def test_loop_over_segments_equals_the_dense_mask(name, precision, monkeypatch):
    monkeypatch.setattr(fast, "LOOP_FROM", 0)
    segments = torch.tensor(SEGMENTS[name])
    attend = fast.isolated(segments, CPU, 16, False)
    assert isinstance(attend, fast.Looped)
    assert_equals_dense_mask(attend, segments, precision)


@each_precision
@pytest.mark.parametrize("compiled", [False, True])
def test_varlen_kernel_equals_the_dense_mask(compiled, precision, varlen_on_cpu, monkeypatch):
    segments = torch.tensor(SEGMENTS["several examples a row"])
    attend = varlen_of(segments, monkeypatch)
    assert attend.offsets.tolist() == [0, 3, 7, 8, 13, 16]  # row 1 begins at token 8 of 16
    if compiled:
        attend = torch.compile(attend.__call__, backend="aot_eager", fullgraph=True)
    assert_equals_dense_mask(attend, segments, precision)


def varlen_of(segments, monkeypatch):
    """What a GPU with the kernel gets, made on the CPU."""
    monkeypatch.setattr(fast, "has_varlen", lambda *args: True)
    monkeypatch.setattr(fast, "send", lambda tensor, device: tensor)
    return fast.isolated(segments, CUDA, 16, True)


CUDA = torch.device("cuda")


@pytest.mark.parametrize("capability, head_size, is_half, need", [
    ((8, 0), 256, True, None),
    ((9, 0), 8, True, None),
    ((7, 5), 64, True, "a GPU of compute capability 8.0, but this one has 7.5"),  # a T4
    ((8, 0), 20, True, "a head size of 8, 16, … 256, but n_embd / n_head is 20"),
    ((8, 0), 320, True, "a head size of 8, 16, … 256, but n_embd / n_head is 320"),
    ((7, 5), 64, False, "a GPU of compute capability 8.0, but this one has 7.5"),
    ((8, 0), 64, False, "--dtype bfloat16"),
])
def test_dense_mask_takes_over_where_the_varlen_kernel_does_not_run_and_says_so_once(
        capability, head_size, is_half, need, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fast, "Varlen", lambda offsets, longest: "varlen")
    monkeypatch.setattr(fast, "send", lambda tensor, device: tensor)
    fast.has_varlen.cache_clear()
    found = [fast.isolated(torch.tensor([[0, 0, 1, 1]]), CUDA, head_size, is_half) for _ in "ab"]
    fast.has_varlen.cache_clear()
    assert found == ([None] * 2 if need else ["varlen"] * 2)
    line = f"isolated attention falls back to a dense mask: the varlen kernel needs {need}\n"
    assert capsys.readouterr().out == (line if need else "")
    monkeypatch.setenv("RANK", "1")
    assert fast.has_varlen(CUDA, head_size, is_half) == (need is None)
    fast.has_varlen.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not fast.has_varlen(CUDA, 64, True)
    fast.has_varlen.cache_clear()
    assert not capsys.readouterr().out  # rank 0 says so for all


def test_forward_and_backward_never_wait_for_the_device(monkeypatch):
    """On the meta device tensors have no values, so whatever asks for one, or for the number of
    targets or segments, raises."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    model, (x, y, weights, segments) = tiny_model().to("meta"), a_batch("some targets")
    with pytest.raises(NotImplementedError, match="nonzero"):
        model(x, y.to("meta"))
    for forward, batch in ((forward_text, (x, y)), (forward_sft, (x, y, weights, segments))):
        loss = forward(model, *batch)
        loss.backward()
        assert loss.is_meta
    assert all(p.grad.is_meta for p in model.parameters())


def test_attention_for_shapes_that_change_leaves_cudnn_out():
    def attend(q, k, v):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
        return q + k + v

    was = torch.backends.cuda.cudnn_sdp_enabled()
    assert fast.without_cudnn(attend, *torch.ones(3, 2)).tolist() == [3, 3]
    assert torch.backends.cuda.cudnn_sdp_enabled() == was


def test_loop_is_for_long_segments_and_the_dense_mask_for_short_ones(monkeypatch):
    """LOOP_FROM is compared with the mean segment length times T, here 8."""
    monkeypatch.setattr(fast, "LOOP_FROM", 32)
    long, short = [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 2, 2]
    assert fast.isolated(torch.tensor([long]), CPU, 16, False).lengths == [4, 4]  # 4 * 8 = 32
    assert fast.isolated(torch.tensor([short]), CPU, 16, False) is None  # 8/3 * 8 = 21
    both = torch.tensor([[0] * 8, short])
    assert fast.isolated(both, CPU, 16, False).lengths == [8, 3, 3, 2]  # 4 * 8 = 32


# ----- the loss, in chunks -----------------------------------------------------------------------


def a_batch(counting: str):
    """(x, y, weights, segments): 4 rows of 16 tokens, as the trainers may make them."""
    random = torch.Generator().manual_seed(5)
    x, y = torch.randint(0, 261, (2, 4, 16), generator=random)
    weights = torch.randint(1, 101, (4, 16), generator=random) / 100
    segments = (torch.arange(16) // 6).expand(4, 16).clone()
    if counting == "every target, as in pretraining":
        return x, y, None, None
    if counting == "one target":
        y[torch.arange(64).view(4, 16) != 37] = -100
    if counting == "some targets":
        y[:, ::3], y[2] = -100, -100
    if counting == "some targets, and padding":
        y[:, 11:], segments[:, 11:], y[:, 0] = -100, -1, -100
    if counting == "none":
        y[:] = -100
    return x, y, weights, segments


COUNTING = ("every target, as in pretraining", "some targets", "some targets, and padding",
            "one target", "none")
ROW = 4 * 320  # bytes of a row of logits


def set_chunk_rows(monkeypatch, rows: int) -> None:
    monkeypatch.setitem(fast.CHUNK_BYTES, "cpu", rows * ROW)


each_loss = pytest.mark.parametrize("loss_of", [fast.loss_in_place, fast.loss_fused])


@each_precision
@each_loss
@pytest.mark.parametrize("rows", [1, 7, 1000])  # 64 chunks of one row, 10 chunks, one chunk
@pytest.mark.parametrize("counting", COUNTING)
def test_chunked_loss_and_gradients_equal_those_of_full_logits(
        monkeypatch, counting, rows, loss_of, precision):
    set_chunk_rows(monkeypatch, rows)
    monkeypatch.setattr(fast, "loss_in_place", loss_of)  # loss_fused is the one for a compiler
    model, batch = tiny_model(), a_batch(counting)
    with precision.autocast():
        want_loss = plain_loss_sum(model, *batch)
    (want_loss / 10).backward()
    want = gradients(model)
    model.zero_grad()
    with precision.autocast():
        loss = model(*batch)
    (loss / 10).backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, want_loss, atol=1e-5, rtol=1e-6)  # of the same logits
    for found, expected in zip(gradients(model), want):
        assert found.dtype == torch.float32
        precision.assert_close(found, expected, atol=2e-6, rtol=1e-5)
        assert counting != "none" or not found.any()  # zero, but never missing


@each_loss
def test_large_logits_do_not_overflow(loss_of):
    hidden = torch.tensor([[100.0]], requires_grad=True)
    head = torch.tensor([[3.0], [1.0]], requires_grad=True)
    loss, _ = fast.SummedCrossEntropy.apply(hidden, head, torch.tensor([1]), torch.ones(1), 2,
                                            True, False, loss_of)
    loss.backward()
    assert loss.item() == pytest.approx(200)  # the target's logit 100 trails the other one's 300
    assert head.grad.flatten().tolist() == pytest.approx([100, -100])


@pytest.mark.parametrize("n, chunks", [
    (0, []), (1, [1]), (256, [256]), (257, [257]), (5_000, [5_000]), (5_121, [2_816, 2_305]),
    (32_768, [4_864] * 6 + [3_584]), (15_360, [5_120] * 3)])
def test_chunks_have_nearly_equal_sizes_that_suit_a_gpu(n, chunks):
    """GPT-2's vocabulary and 1 GiB of float32 logits: at most 5,336 rows, rounded down to 5,120."""
    rows = fast.chunk_rows(n, 50304, "cuda")
    assert [len(chunk) for chunk in torch.empty(n).split(rows)] == (chunks or [0])


class Watch(TorchDispatchMode):
    """Records each operation's name and the size of its result, if that looks like logits."""

    def __init__(self):
        super().__init__()
        self.names, self.logits = [], [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        if isinstance(out, torch.Tensor) and out.shape[-1:] == (320,):
            self.logits.append(out.numel())
        return out


def test_loss_never_holds_the_logits_of_all_tokens(monkeypatch):
    set_chunk_rows(monkeypatch, 4)
    model = tiny_model(n_embd=2, n_head=1)  # the head itself is only (320, 2)
    batch = a_batch("every target, as in pretraining")
    with Watch() as chunked:
        model(*batch).backward()
    with Watch() as plain:
        plain_loss_sum(model, *batch)
    assert max(chunked.logits) == 4 * 320
    assert max(plain.logits) == 64 * 320  # so the watch does see full logits


def test_evaluation_holds_no_more_logits_than_training_and_finds_the_same_in_chunks(monkeypatch):
    model, batch = tiny_model(n_embd=2, n_head=1), MicroBatch(*a_batch("some targets"))
    with Watch() as whole:
        want = evaluate(model, [batch], ALONE)
    set_chunk_rows(monkeypatch, 4)
    with Watch() as chunked:
        found = evaluate(model, [batch], ALONE)
    n_targets = int((batch.y != -100).sum())
    assert (max(whole.logits), max(chunked.logits)) == (n_targets * 320, 4 * 320)
    assert found["val_loss"] == pytest.approx(want["val_loss"], rel=1e-6)
    assert found["val_accuracy"] == want["val_accuracy"] > 0


def test_without_gradients_the_loss_is_the_same_for_a_third_of_the_matrix_products():
    model, (_, y, weights, _) = tiny_model(), a_batch("some targets")
    hidden = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))

    def products(watch):
        return sum(name.startswith(("aten.mm", "aten.addmm")) for name in watch.names)

    with Watch() as training:
        loss = model.nll_sum(hidden, y, weights)
    with Watch() as evaluating, torch.no_grad():
        assert torch.equal(model.nll_sum(hidden, y, weights), loss)
    assert (products(training), products(evaluating)) == (3, 1)


def test_second_backward_raises_instead_of_scaling_twice():
    loss = tiny_model()(*a_batch("one target"))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already called on this loss"):
        loss.backward()


def test_chunked_loss_in_bfloat16_is_close_to_full_logits_in_float32(monkeypatch):
    set_chunk_rows(monkeypatch, 7)
    model, batch = tiny_model(spread=0.05), a_batch("some targets")
    want_loss = plain_loss_sum(model, *batch)
    want_loss.backward()
    want = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(*batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-2)
    for found, expected in zip(gradients(model), want):
        assert found.dtype == torch.float32
        assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99
