"""Programmatic dependent launch (CUDA, compute capability 9.0): a launch may begin while the
previous one on the stream still runs, and waits for that one's results where it first needs them.

A decoding step is some two hundred launches of a few microseconds each. Even in a graph, each of
them waits until the last block of the previous launch has ended and its writes are visible, and
only then begins to set up. Kernels that take part wait by themselves, so that the setup, and in
``skinny_linear`` the first copies of weights to shared memory, overlap with the previous launch. A
kernel that takes part

- before it waits, reads nothing that an earlier launch wrote and writes nothing: once the wait is
  over, every earlier launch has ended, because each of them waited in its turn;
- waits in every block, or launches further back might still run when it ends;
- signals at its wait that the next one may begin, so that no more than two run side by side.

It is off unless ``ECHOGEN_PDL=1`` is set, because no GPU has run or timed it yet.
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
    """Comes first in a Triton kernel that takes part. ``DEPENDENT`` is that kernel's last
    parameter, False by default; the launch sets it."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


def available(device: torch.device) -> bool:
    """Whether launches on this device should overlap.

    Raises:
        RuntimeError: they should, but cuda-bindings, which launches the CUDA C++ kernels this way,
            is not installed.
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
    """Let launches within, of kernels that take part, overlap with those before them, if that is
    `available`. The launch right before the first one within must not write weights."""
    token = _overlapping.set(available(device))
    try:
        yield
    finally:
        _overlapping.reset(token)


def active() -> bool:
    """Whether launches overlap here."""
    return _overlapping.get()
