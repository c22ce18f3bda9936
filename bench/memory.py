"""Peak memory of a computation, counted without allocating it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from echogen.bench.storages import Ledger
from echogen.kernels import dispatch
from echogen.kernels.aot import OnAnyDevice


class _Storages(OnAnyDevice):
    """Tracks the bytes of storages that operators allocate, also within launchers, until freed."""

    def __init__(self, launches: list[dispatch.Launch]) -> None:
        super().__init__()
        self._launches, self.ledger = launches, Ledger()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._launches.clear()  # launches keep their arguments alive
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.ledger.note(tensor.untyped_storage(), 0)
        if func.namespace == "echogen":
            return super().__torch_dispatch__(func, types, args, kwargs)
        made = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.ledger.note(storage, storage.nbytes())
        return made


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the most bytes that tensors made by ``call`` occupied at any one time.

    Args:
        call: takes and makes tensors on the meta device, which costs neither memory nor time.
            Arguments that existed before are not counted. Triton launches are skipped.
    """
    with dispatch.recorded() as launches, _Storages(launches) as storages:
        call()
    return storages.ledger.peak
