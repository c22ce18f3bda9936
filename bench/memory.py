"""How much memory a computation holds at its worst, counted without making it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from echogen.bench.storages import Ledger
from echogen.kernels import dispatch
from echogen.kernels.aot import OnAnyDevice


class _Storages(OnAnyDevice):
    """Bytes of the storages that operators made and that are still held, within launchers too."""

    def __init__(self, launches: list[dispatch.Launch]) -> None:
        super().__init__()
        self._launches, self.ledger = launches, Ledger()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._launches.clear()  # they hold their arguments
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
    """The most bytes that tensors made by ``call`` held at any one time.

    Args:
        call: takes and makes tensors on the meta device, where neither memory nor time is spent;
            arguments that exist before are not counted. Triton launches are left out.
    """
    with dispatch.recorded() as launches, _Storages(launches) as storages:
        call()
    return storages.ledger.peak
