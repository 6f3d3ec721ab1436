"""tests/check_gpu.py, with the CPU in the place of the GPU."""

import pytest
import torch
from check_gpu import Config, compare_model, main, make_data
from helpers_training import tiny_model

import model

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
