"""Causal attention: what it computes, and that flash-attn is used where it is installed."""

from __future__ import annotations

import sys

import pytest
import torch

from echogen.engine import attention

# It has the package's own order of axes, [B, L, heads, K], and allows grouped heads.
STAND_IN = """
import torch

def flash_attn_func(q, k, v, causal=False):
    assert causal and q.shape[1] == k.shape[1] == v.shape[1] == LENGTH
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("blhk,bshk->bhls", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhls,bshk->blhk", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)
"""
LENGTH = 7


@pytest.fixture
def package(tmp_path, monkeypatch):
    """``package(source)`` installs a flash-attn with that source."""

    def install(source):
        (tmp_path / "flash_attn").mkdir()
        (tmp_path / "flash_attn" / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        attention.flash_attention.cache_clear()
        # On a CPU flash-attn has no kernel; that `flash_can` says so is tested below.
        monkeypatch.setattr(attention, "flash_can", lambda query: True)

    yield install
    attention.flash_attention.cache_clear()
    sys.modules.pop("flash_attn", None)


def inputs(kv_heads):
    torch.manual_seed(kv_heads)
    return [torch.randn(2, heads, LENGTH, 8) for heads in (4, kv_heads, kv_heads)]


def wanted(query, key, value):
    """Causal attention written out in float64."""
    query, key, value = (t.double() for t in (query, key, value))
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal(kv_heads, grad):
    given = inputs(kv_heads)
    with torch.set_grad_enabled(grad):
        out = attention.attention(*given, "causal")
    torch.testing.assert_close(out.double(), wanted(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_flash_attn_is_used_where_it_is_installed(package, kv_heads):
    package(STAND_IN.replace("LENGTH", str(LENGTH)))
    given = inputs(kv_heads)
    assert attention.flash_attention() is not None
    out = attention.attention(*given, "causal")
    torch.testing.assert_close(out.double(), wanted(*given), rtol=1e-5, atol=1e-6)


def test_one_that_does_not_load_says_what_to_do(package):
    package("raise ImportError('undefined symbol: _ZN3c10')")
    with pytest.raises(ImportError, match=r"undefined symbol.*reinstall it for PyTorch .*uninstal"):
        attention.attention(*inputs(4), "causal")


def test_it_is_not_asked_on_a_cpu():
    assert not attention.flash_can(torch.zeros(1, 8, dtype=torch.bfloat16))
