"""Every kernel test runs on memory full of NaN: an output element that a kernel forgets shows."""

from __future__ import annotations

import os
import zlib

import pytest
import torch

from echogen.kernels import dispatch

INTERPRETED = dispatch.INTERPRETED
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# Of kernels in CUDA C++ alone: an interpreted run would be the plain one over again.
collect_ignore = (
    ["test_cuda.py", "test_parse_boxes.py", "test_skinny_linear.py"] if INTERPRETED else []
)


@pytest.fixture
def device() -> str:
    """Where operators are tested: CUDA where there is one, else the CPU, on which Triton's
    interpreter runs the kernels when TRITON_INTERPRET=1 is set."""
    return DEVICE


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random inputs: each test's own, the same in every run, so that a build does not depend on
    luck. ``ECHOGEN_TEST_SEED`` set to "fresh" draws new ones, to a number repeats them."""
    chosen = os.environ.get("ECHOGEN_TEST_SEED")
    if chosen == "fresh":
        seed = torch.Generator().seed() % 2**31
    else:
        seed = int(chosen) if chosen else zlib.crc32(request.node.nodeid.encode())
    print(f"inputs drawn with seed {seed}: ECHOGEN_TEST_SEED={seed} draws them again")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """New memory holds NaN (or the most negative integer, or a byte that is no bool) until
    something writes it."""

    def poison(make):
        def run(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(torch.iinfo(tensor.dtype).min)
            elif tensor.dtype == torch.bool and not tensor.is_meta:
                tensor.view(torch.uint8).fill_(0xAA)
            return tensor

        return run

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(new_empty))


@pytest.fixture
def launched(monkeypatch):
    """How often each Triton kernel was launched within this test."""
    dispatch.LAUNCHED.clear()
    return dispatch.LAUNCHED


@pytest.fixture
def relative_error():
    """‖found − wanted‖ / ‖wanted‖ in float64 (‖found‖ where wanted is zero)."""

    def measure(found: torch.Tensor, wanted: torch.Tensor) -> float:
        found, wanted = found.detach().double(), wanted.detach().double()
        size = float(wanted.norm())
        return float((found - wanted).norm()) / (size if size > 0 else 1.0)

    return measure
