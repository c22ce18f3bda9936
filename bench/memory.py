"""How much memory a computation holds at its worst, counted without making it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from echogen.kernels import dispatch
from echogen.kernels.aot import OnAnyDevice


class _Storages(OnAnyDevice):
    """Bytes of the storages that operators made and that are still held, within launchers too."""

    def __init__(self, launches: list[dispatch.Launch]) -> None:
        super().__init__()
        self._launches = launches
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._launches.clear()  # they hold their arguments
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, 0)
        if func.namespace == "echogen":
            return super().__torch_dispatch__(func, types, args, kwargs)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, tensor.untyped_storage().nbytes())
        return made

    def _note(self, tensor: torch.Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that tensors made by ``call`` held at any one time.

    Args:
        call: takes and makes tensors on the meta device, where neither memory nor time is spent;
            arguments that exist before are not counted. Triton launches are left out.
    """
    with dispatch.recorded() as launches, _Storages(launches) as storages:
        call()
    return storages.peak
