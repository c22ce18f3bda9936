"""Peak memory of a piece of work that runs on real tensors.

`echogen.bench.memory` counts operators on tensors without memory. A drawing's next step depends on
values, so its memory is counted while it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from echogen.bench.storages import Ledger


class _Held(TorchDispatchMode):
    """Counts the bytes of storages that operators allocate, until they are freed."""

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
    """Return the most bytes that ``call`` held on the current GPU, beyond those held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def held_mib(call: Callable[[], object], device: str = "cpu") -> float:
    """Return the most MiB that ``call`` held, beyond those held before. On CUDA this is what that
    GPU's allocator reports; on a CPU it counts every tensor that an operator made and that was
    still alive."""
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            return cuda_peak(call) / 2**20
    with _Held() as held:
        call()
    return held.ledger.peak / 2**20
