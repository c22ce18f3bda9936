"""Programmatic dependent launch (CUDA, compute capability 9.0): a launch may begin while the one
before it on the stream still runs, and waits for its results where it first needs them.

A step of decoding is some two hundred launches of a few microseconds each. In a graph, too, every
one of them waits until the last block of the one before is gone and its writes are visible, and
only then begins to set up. Kernels that take part wait by themselves, so that the setup, and in
``skinny_linear`` the first weights on their way to shared memory, fall into the time of the launch
before. A kernel that takes part

- reads nothing that an earlier launch wrote, and writes nothing, before it waits: once the wait is
  over, every launch before it has ended, as each of them waited in its turn;
- waits in every block, or launches further back might still run when it ends;
- says at its wait that the next one may begin, so that no more than two run side by side.

Off unless ``ECHOGEN_PDL=1`` is set: no GPU has run or timed it yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from echogen.kernels.cuda import loader

_overlapping = ContextVar("overlapping", default=False)
LEAST_CAPABILITY = (9, 0)


@triton.jit
def wait_for_earlier(DEPENDENT: tl.constexpr):
    """First in a Triton kernel that takes part; ``DEPENDENT`` is its last parameter, False by
    default, and set by the launch."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


def available(device: torch.device) -> bool:
    """Whether launches on this device are to overlap.

    Raises:
        RuntimeError: they are, and what launches those in CUDA C++ so is not installed.
    """
    if os.environ.get("ECHOGEN_PDL") != "1" or device.type != "cuda":
        return False
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return False
    there = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
    if not loader.unloadable() and not there:
        raise RuntimeError(
            "ECHOGEN_PDL=1 needs cuda-bindings (pip install cuda-bindings); install it or unset it"
        )
    return True


@contextmanager
def overlapping(device: torch.device) -> Iterator[None]:
    """Launches within, of kernels that take part, overlap with those before them, where that is
    `available`. Weights must not be written by the launch right before the first one within."""
    token = _overlapping.set(available(device))
    try:
        yield
    finally:
        _overlapping.reset(token)


def active() -> bool:
    """Whether launches overlap here."""
    return _overlapping.get()
