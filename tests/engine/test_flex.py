"""FlexAttention's compiled form."""

from __future__ import annotations

import threading

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import create_block_mask

from echogen.engine import flex


def test_it_never_runs_unfused_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails after its last variant, and the limit is this project's, not torch's."""
    compile_ = torch.compile
    monkeypatch.setattr(flex.torch, "compile", lambda f: compile_(f, backend="eager"))
    monkeypatch.setattr(flex, "VARIANTS", 2)
    flex._compiled.cache_clear()
    torch._dynamo.reset()
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, None, 128, 128, "cpu")
    try:
        with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=False):
            run = flex._fused()
            for dtype in (torch.float32, torch.float64):
                x = torch.randn(1, 1, 128, 16, dtype=dtype)
                run(x, x, x, block_mask=mask)
            x = x.bfloat16()
            with pytest.raises(FailOnRecompileLimitHit):
                run(x, x, x, block_mask=mask)
    finally:
        flex._compiled.cache_clear()
        torch._dynamo.reset()


def test_the_limit_is_that_of_every_thread() -> None:
    """The backward pass of checkpointed activations runs a forward in one of autograd's threads."""
    found = []

    def work() -> None:
        flex._fused()
        config = torch._dynamo.config
        found.append((config.recompile_limit, config.fail_on_recompile_limit_hit))

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [(flex.VARIANTS, True)] * 2
