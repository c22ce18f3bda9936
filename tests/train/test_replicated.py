"""What travels together when gradients are added up, and when it is sent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from echogen.train.parallel import replicated
from echogen.train.parallel.replicated import GradientSum, sent_together

KIB, MIB = 1 << 10, 1 << 20


def of_bytes(*sizes: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [
        nn.Parameter(torch.empty(size // dtype.itemsize, dtype=dtype, device="meta"))
        for size in sizes
    ]


def sizes(buckets: list[list[nn.Parameter]]) -> list[list[int]]:
    return [[p.numel() * p.element_size() for p in bucket] for bucket in buckets]


def test_what_is_small_goes_along_with_what_is_large() -> None:
    """A bias before a head, and norms among weights that each fill a bucket and more."""
    found = sent_together(
        of_bytes(64 * KIB, 134 * MIB, 8 * KIB, 92 * MIB, 8 * KIB, 16 * MIB, 8 * MIB)
    )
    assert sizes(found) == [
        [64 * KIB, 134 * MIB, 8 * KIB],
        [92 * MIB, 8 * KIB],
        [16 * MIB, 8 * MIB],
    ]


def test_small_parameters_alone_fill_buckets_too() -> None:
    """Or a small model's gradients would all be sent behind its backward."""
    assert sizes(sent_together(of_bytes(*[512 * KIB] * 100))) == [
        [512 * KIB] * 64,
        [512 * KIB] * 36,
    ]


def test_a_bucket_is_of_one_type() -> None:
    parameters = of_bytes(KIB, KIB) + of_bytes(KIB, dtype=torch.bfloat16)
    assert [len(b) for b in sent_together(parameters)] == [2, 1]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of what was sent, to a second process that has the same gradients."""
    lengths: list[int] = []

    def all_reduce(row: Tensor, async_op: bool) -> Any:
        assert async_op
        lengths.append(len(row))
        row *= 2
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(replicated, "SMALL_BYTES", 0)
    return lengths


@pytest.mark.parametrize("told", [False, True])
def test_a_head_that_has_no_gradient_holds_nothing_up(monkeypatch, sent: list[int], told) -> None:
    monkeypatch.setattr(replicated, "BUCKET_BYTES", 1)
    first, second, head = (nn.Parameter(torch.full((n,), 2.0)) for n in (3, 4, 5))
    parts = ([first, second], [head]) if told else ([first, second, head],)
    adding = GradientSum(*parts)
    adding.expect(1)
    (first.square().sum() + second.sum()).backward()
    # Of each parameter its numbers and a flag; while backward runs all that has come, or nothing,
    # as the head is looked for first.
    assert sent == ([5, 4] if told else [])
    adding.finish()
    assert sent == ([5, 4, 6] if told else [6, 5, 4])
    assert first.grad is not None and first.grad.tolist() == [8.0] * 3
    assert second.grad is not None and second.grad.tolist() == [2.0] * 4
    assert head.grad is None


def test_a_gradient_that_only_others_have_is_taken(monkeypatch, sent: list[int]) -> None:
    def all_reduce(row: Tensor, async_op: bool) -> Any:
        row += 1  # the other process: ones, and its flag
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    here, there = (nn.Parameter(torch.ones(2)) for _ in range(2))
    adding = GradientSum([here, there])
    here.sum().backward()
    adding.finish()
    assert here.grad is not None and here.grad.tolist() == [2.0, 2.0]
    assert there.grad is not None and there.grad.tolist() == [1.0, 1.0]
