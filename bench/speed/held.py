"""How much memory a piece of work holds at its worst, on tensors that are there.

`echogen.bench.memory` counts operators on tensors without memory; a drawing decides by values what
comes next, so it is counted while it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from echogen.bench.storages import Ledger


class _Held(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._note((args, kwargs), made=False)
        result = func(*args, **(kwargs or {}))
        self._note(result, made=True)
        return result

    def _note(self, tensors: Any, made: bool) -> None:
        for tensor in tree_leaves(tensors):
            # Packed weights of oneDNN have no storage; they are made before a drawing.
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                self.ledger.note(storage, storage.nbytes() if made else 0)


def cuda_peak(call: Callable[[], object]) -> int:
    """Bytes that ``call`` held on the current GPU at its worst moment beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def held_mib(call: Callable[[], object], device: str = "cpu") -> float:
    """MiB that ``call`` held at its worst moment beyond what was there before: on CUDA what the
    allocator of that GPU says, on a CPU every tensor that an operator made and that was still
    held."""
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            return cuda_peak(call) / 2**20
    with _Held() as held:
        call()
    return held.ledger.peak / 2**20
