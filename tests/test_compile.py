"""--compile: one graph of a block, made in the first steps, and every later step runs it."""

import copy
import functools

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import tyro
from helpers_training import (
    fine_tune,
    pretrain,
    random_examples,
    sft_folder,
    text_folder,
    tiny_model,
)
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import train_gpt2
from model import Block
from nanosft import fast
from nanosft.ranks import Ranks


@pytest.fixture
def compiled_steps(monkeypatch):
    """For each training step: (graphs made so far, how often one was run since the step before,
    and how often in this step). Needs no compiler."""
    torch._dynamo.reset()
    counters.clear()
    runs, steps, train_step = [], [], train_gpt2.train_step

    def backend(graph, inputs):
        compiled = lookup_backend("aot_eager")(graph, inputs)
        return lambda *args: runs.append(1) or compiled(*args)

    def counted(*args, **kwargs):
        before = len(runs)
        runs.clear()
        row = train_step(*args, **kwargs)
        steps.append((counters["stats"]["unique_graphs"], before, len(runs)))
        runs.clear()
        return row

    by_backend = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(Block, "compile", by_backend)
    monkeypatch.setattr(train_gpt2, "train_step", counted)
    yield steps
    torch._dynamo.reset()


FLAGS = {"compile": True, "max_steps": 5, "eval_every": 1, "block_size": 32, "n_layer": 2}
# rows of one length; then of any length; each for training and for evaluation
GRAPHS = {"fit": 2, "bucket": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text_folder(folder / "text", train=[*range(250)] * 4, val=[*range(250)])
    sft_folder(folder / "sft", train=random_examples(39, longest=30), val=random_examples(9))
    return folder


@pytest.mark.parametrize("layout", GRAPHS)
def test_training_and_evaluation_are_compiled_whatever_is_answered_in_between(
        layout, data, tmp_path, compiled_steps):
    """Answers are not: each of their steps has a shape of its own."""
    fine_tune(data / "sft", tmp_path / "out", layout=layout, eval_prompts=4, **FLAGS)
    # 2 blocks in each of the 2 micro-batches of a step; before it, in the one whose loss decides
    # whether weights may be kept, and in all of the evaluation
    n_batches = 5 if layout == "bucket" else 2
    assert compiled_steps[1:] == [(GRAPHS[layout], 2 + 2 * n_batches, 4)] * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twelve_blocks_share_one_graph(dtype, data, tmp_path, compiled_steps):
    """More than dynamo's limit of 8 graphs for one function, after which it would run eagerly."""
    fine_tune(data / "sft", tmp_path / "out", dtype=dtype, **(FLAGS | {"n_layer": 12}))
    assert [(graphs, n) for graphs, _, n in compiled_steps[1:]] == [(2, 24)] * 4


@pytest.mark.parametrize("compile", [True, False])
def test_residual_stream_of_compiled_blocks_is_bfloat16_under_autocast(compile, compiled_steps):
    """And differs from the float32 one by bfloat16's rounding, in 4 blocks, of which each adds."""
    want, x = tiny_model(n_layer=4), torch.arange(24).view(2, 12)
    model = fast.speed_up(copy.deepcopy(want), compile)
    model.transformer.ln_f.register_forward_pre_hook(lambda _, inputs: seen.append(*inputs))
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        model.hidden(x)
    assert seen[0].dtype == (torch.bfloat16 if compile else torch.float32)
    torch.testing.assert_close(model.hidden(x), want.hidden(x), atol=1e-5, rtol=1e-5)
    assert seen[1].dtype == torch.float32  # without autocast
    assert (seen[0] - seen[1]).norm() < 0.01 * seen[1].norm()


def test_varlen_kernel_is_compiled_for_any_number_of_examples_in_a_row(
        data, tmp_path, compiled_steps, varlen_on_cpu, monkeypatch):
    """As on a GPU: in bfloat16, with the kernel inside the graph."""

    isolated = fast.isolated

    def varlen(segments, device, head_size, is_half, is_compiled):
        if not is_half:  # the trial of speed_up
            return None
        assert head_size == 8 and is_compiled
        return isolated(segments, torch.device("cuda"), head_size, is_half)

    monkeypatch.setattr(fast, "has_varlen", lambda *args: True)
    monkeypatch.setattr(fast, "send", lambda tensor, device: tensor.to("cpu"))
    monkeypatch.setattr(fast, "isolated", varlen)
    fine_tune(data / "sft", tmp_path / "out", dtype="bfloat16", **FLAGS)
    graphs, _, _ = compiled_steps[-1]
    assert [(made, n) for made, _, n in compiled_steps[2:]] == [(graphs, 4)] * 3


def test_ddp_around_compiled_blocks_makes_no_more_graphs(data, tmp_path, compiled_steps,
                                                         monkeypatch):
    """Pretraining as each of several ranks runs it, here the only one of its group."""
    monkeypatch.setattr(Ranks, "wrap", lambda ranks, gpt: DistributedDataParallel(gpt))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        pretrain(data / "text", tmp_path / "out", **FLAGS)
    finally:
        dist.destroy_process_group()
    assert [(graphs, n) for graphs, _, n in compiled_steps[1:]] == [(2, 4)] * 4


@pytest.mark.parametrize("C", [768, 1600])
def test_block_of_gpt2s_own_size_is_one_graph_under_ddp(C, compiled_steps, monkeypatch):
    """Its gradients fill more than one of DDP's buckets, where dynamo by default cuts the graph in
    order to overlap all-reduce and backward pass. Whole blocks overlap, too: DDP's hooks run after
    each. The other tests' blocks fit in one bucket."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph

    by_backend = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(Block, "compile", by_backend)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch._dynamo.config.patch(optimize_ddp=True):  # as in a new process
            gpt = fast.speed_up(tiny_model(spread=0, n_layer=2, n_embd=C), compile=True)
            x = torch.arange(24).view(2, 12)
            DistributedDataParallel(gpt, gradient_as_bucket_view=True)(x, x).backward()
    finally:
        dist.destroy_process_group()
    assert len(made) == 1


def test_loss_of_chunks_of_any_size_is_one_graph_and_equals_the_one_without_a_compiler(
        compiled_steps, monkeypatch):
    """On a GPU, where each graph costs seconds. aot_eager compiles all but the kernels."""
    monkeypatch.setattr(fast, "compiled", lambda f: torch.compile(f, backend="aot_eager"))
    random = torch.Generator().manual_seed(0)
    for n in (256, 200, 77):
        logits = 3 * torch.randn(n, 320, generator=random)
        target = torch.randint(261, (n, 1), generator=random)
        weight = torch.rand(n, 1, generator=random)
        for needs_grad in (True, False):  # training; evaluation, which counts hits
            rest = (target, weight, 261, needs_grad, not needs_grad)
            found = fast.loss_compiled(logits.clone(), *rest)
            loss, hits, d_logits = fast.loss_in_place(logits.clone(), *rest)
            torch.testing.assert_close(found[0], loss, atol=0, rtol=1e-6)
            assert found[1] == hits
            if needs_grad:
                torch.testing.assert_close(found[2], d_logits, atol=1e-7, rtol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("words, on_cuda, on_cpu", [
    ([], True, False), (["--compile"], True, True), (["--no_compile"], False, False)])
def test_compiled_by_default_on_cuda_only(words, on_cuda, on_cpu, monkeypatch):
    monkeypatch.setattr(fast, "can_compile", lambda device: True)
    flags = tyro.cli(train_gpt2.Config, args=["--data", "d", "--out", "o", *words],
                     use_underscores=True)
    assert flags.is_compiled(torch.device("cuda")) == on_cuda
    assert flags.is_compiled(torch.device("cpu")) == on_cpu


def test_where_the_compiler_does_not_run_a_gpu_trains_without_it_and_a_line_says_so(
        monkeypatch, capsys):
    def broken(function):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(fast, "compiled", broken)
    assert not train_gpt2.Config("", "").is_compiled(torch.device("cuda"))
    assert capsys.readouterr().out == ("not compiled: torch.compile does not run here (Failed to "
                                       "find C compiler.)\n")
