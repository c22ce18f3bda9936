"""Process settings that a run needs: keeping freed memory, determinism."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def keep_pages() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel.

    A training step allocates and frees the same large tensors again and again; with the default
    thresholds each one is mapped afresh and its pages are faulted in and zeroed. Measured on one
    core, SiLU over 8.4 M floats: 16.6 ms before, 2.1 ms after.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc; musl has none and does not need it
        m_trim_threshold, m_mmap_threshold = -1, -3
        # Some versions refuse more than 32 MiB (half of HEAP_MAX_SIZE). If neither is accepted, the
        # other call would do harm: it ends the adjustment that is on by default.
        if libc.mallopt(m_mmap_threshold, 1 << 30) or libc.mallopt(m_mmap_threshold, 1 << 25):
            libc.mallopt(m_trim_threshold, (1 << 31) - 1)


@contextmanager
def only_deterministic(wanted: bool) -> Iterator[None]:
    """Make torch refuse nondeterministic operations within the block, if ``wanted``."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        # cuBLAS is deterministic only with its own workspace, and reads this when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
