"""tests/check_gpu.py and check_nccl.py, with the CPU in the place of the GPU."""

import dataclasses
import functools

import check_nccl
import pytest
import torch
from check_gpu import Config, compare_model, main, make_data
from helpers_training import tiny_model
from torch.nn.parallel import DistributedDataParallel

import model
import train_gpt2
from nanosft.errors import UserError
from nanosft.ranks import Ranks

TINY = Config("cpu", steps=4, n_layer=1, n_head=2, n_embd=32, block_size=128, compile=False)


def test_cpu_computes_what_a_cpu_computes(capsys):
    main(TINY)
    lines = capsys.readouterr().out.split("largest relative difference\n")[1].splitlines()
    assert len(lines) == 2 * 3 + 2 and all(line.endswith("ok") for line in lines)
    assert sum(" 0.0e+00, " in line for line in lines) >= 5  # float32, resumed, answers


@pytest.mark.parametrize("is_broken", [False, True])
def test_positions_that_do_not_restart_are_found(is_broken, monkeypatch, tmp_path):
    def one_text(segments):
        return torch.arange(segments.size(1)).expand_as(segments)

    if is_broken:
        monkeypatch.setattr(model, "isolated_positions", one_text)
    data = make_data(tmp_path)["SFT"]
    packed, answers = compare_model(tiny_model(block_size=256), data, torch.device("cpu"))
    what, found, allowed = packed
    assert int(what.split()[0]) > 1 and (found > allowed) == is_broken
    assert answers[1:] == (0, 0)


@pytest.fixture
def nccl_steps(monkeypatch):
    """check_nccl on a tiny model, compiled without a compiler; the models that took a step."""
    torch._dynamo.reset()
    sizes = dataclasses.replace(check_nccl.SIZES, block_size=16, n_embd=32)
    monkeypatch.setattr(check_nccl, "SIZES", sizes)
    by_backend = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(model.Block, "compile", by_backend)
    trained, train_step = [], train_gpt2.train_step

    def counted(model, *args):
        trained.append(type(model))
        return train_step(model, *args)

    monkeypatch.setattr(train_gpt2, "train_step", counted)
    yield trained
    torch._dynamo.reset()


def test_one_process_trains_under_ddp_as_it_does_alone(nccl_steps, capsys):
    check_nccl.main(check_nccl.Config("cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("  gloo, ") for line in lines)
    assert all(line.endswith(" ok") for line in lines)
    assert nccl_steps[:3] == [DistributedDataParallel] * 3
    assert DistributedDataParallel not in nccl_steps[3:] and len(nccl_steps) == 6
    assert not torch.distributed.is_initialized()


def test_gradients_that_ddp_gets_wrong_fail(nccl_steps, monkeypatch, capsys):
    """AdamW would hide a factor, so the norms of the gradients are compared, too."""
    def wrap(ranks, gpt):
        if ranks.world_size > 1:
            gpt.lm_head.weight.register_hook(lambda grad: 1.1 * grad)
        return gpt

    monkeypatch.setattr(Ranks, "wrap", wrap)
    with pytest.raises(UserError, match="--device cpu: gloo does not work as it should; see FAIL"):
        check_nccl.main(check_nccl.Config("cpu", compile=False))
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [
        "ok", "ok", "ok", "FAIL"]


def test_collective_that_raises_fails_in_its_own_line(nccl_steps, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("NCCL error: unhandled system error\nmore")

    monkeypatch.setattr(torch.distributed, "all_reduce", broken)
    with pytest.raises(UserError):
        check_nccl.main(check_nccl.Config("cpu", compile=False))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("FAIL: NCCL error: unhandled system error")
    assert lines[3].endswith("ok")
