"""Shared fixtures: tiny data, the commands run in this process, a vocabulary without a download."""

import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import tiktoken
import torch

import sft_data
import tokenizer
from nanosft.cli import run_cli

# derandomize: every run draws the same cases, so a failure can be reproduced by anyone
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, database=None, max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
hypothesis.settings.load_profile("tests")

# Source: tiktoken_ext/openai_public.py, r50k_pat_str
GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)


def small_gpt2() -> tiktoken.Encoding:
    """GPT-2's pattern and number of ids, but only six merges in use: no file, no network.

    The merges before <|endoftext|> make byte strings that no text contains.
    """
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the", b"in", b" a", b"\n\n"]
    more = [bytes(pair) for n in (1, 2) for pair in itertools.product(range(256), repeat=n)]
    tokens += [b"\xff" + end for end in more[: 50256 - len(tokens)]]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 50256})


@pytest.fixture
def gpt2(monkeypatch) -> tiktoken.Encoding:
    """The real vocabulary if TIKTOKEN_CACHE_DIR holds it, else the small one under its name."""
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or "/nowhere")
    if cache.is_dir() and len(list(cache.iterdir())) >= 2:
        yield tokenizer.get_encoding("gpt2")
        return
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small_gpt2())
    tokenizer.get_encoding.cache_clear()
    yield tokenizer.get_encoding("gpt2")
    tokenizer.get_encoding.cache_clear()


@pytest.fixture
def bytes_encoding() -> tiktoken.Encoding:
    """One id per byte, so expected ids can be worked out by hand: "h" is 104."""
    return tokenizer.get_encoding("bytes")


@pytest.fixture
def jsonl(tmp_path):
    """jsonl("a.jsonl", rows) writes one JSON object per line and returns the path."""

    def write(name: str, rows: list) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def command(monkeypatch, capsys):
    """command(module, *flags) runs `python module.py flags` in this process.

    Returns code (0 if nothing was raised), out and err.
    """

    def call(module, *flags) -> SimpleNamespace:
        monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, flags)])
        capsys.readouterr()
        code = 0
        try:
            run_cli(module.main, module.Config)
        except SystemExit as stop:
            code = stop.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return call


@pytest.fixture
def sft_shards(tmp_path, jsonl, command):
    """sft_shards(rows, "--flag", …) runs sft_data.py on bytes and returns the folder."""

    def prepare(rows: list, *flags, name: str = "sft") -> str:
        out = str(tmp_path / name)
        result = command(sft_data, "--source", jsonl(f"{name}.jsonl", rows), "--encoding", "bytes",
                         "--val_fraction", 0, "--workers", 1, "--out", out, *flags)
        assert result.code == 0, result.err
        return out

    return prepare


@pytest.fixture(scope="session")
def varlen_on_cpu():
    """Gives torch.nn.attention.varlen's operation, which runs on CUDA only, a CPU kernel.

    As documented: q, k, v (N, n_head, hs), 16-bit; text i is their rows cu_seq[i] to cu_seq[i + 1];
    a window of (-1, 0) is causal, (-1, -1) is not. Its fake kernels, which torch.compile uses, and
    its autograd formula are PyTorch's own.
    """
    from torch.nn.attention import varlen

    def softmax(q, k, cu_q, cu_k, max_q, max_k, window):  # (n_head, N, N)
        assert cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k)
        assert (cu_q[0], cu_q[-1]) == (0, len(q)) and max_q == max_k == cu_q.diff().max()
        assert q.size(2) % 8 == 0
        text = torch.bucketize(torch.arange(len(q)), cu_q[1:], right=True)
        seen = text[:, None] == text
        seen = seen.tril() if list(window) == [-1, 0] else seen
        scores = torch.einsum("ihd,jhd->hij", q, k) / q.size(2) ** 0.5
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window, *rest):
        dtype, (q, k, v) = q.dtype, (t.float() for t in (q, k, v))
        p = softmax(q, k, cu_q, cu_k, max_q, max_k, window)
        y = torch.einsum("hij,jhd->ihd", p, v).to(dtype).contiguous()
        return y, torch.zeros(q.size(1), len(q)), torch.zeros(2, dtype=torch.uint64)

    def backward(dy, q, k, v, y, lse, cu_q, cu_k, max_q, max_k, is_causal, rng, scale, window):
        dtype, (dy, q, k, v) = q.dtype, (t.float() for t in (dy, q, k, v))
        p = softmax(q, k, cu_q, cu_k, max_q, max_k, window)
        dp = torch.einsum("ihd,jhd->hij", dy, v)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / q.size(2) ** 0.5
        grads = (torch.einsum("hij,jhd->ihd", ds, k), torch.einsum("hij,ihd->jhd", ds, q),
                 torch.einsum("hij,ihd->jhd", p, dy))
        return tuple(grad.to(dtype).contiguous() for grad in grads)

    varlen._varlen_attn.register_kernel("cpu", forward)
    varlen._varlen_attn_backward.register_kernel("cpu", backward)
