"""A device that is not there: tensors of the CPU that say they are on a GPU.

Without a GPU, code that makes a tensor in the wrong place is never found out. Here a call that
mixes both places fails as it would there, with the exceptions that CUDA makes itself: numbers (of
no dimension) and indices may come from the CPU. Gradients are those of the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

AWAY = torch.device("cuda:0")
_INDEXED = (Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put, Tensor.index_put_)
_ANSWERS = {  # what only looks at a tensor's place
    Tensor.device.__get__: AWAY,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: False,  # type: ignore[attr-defined]
}

WAITING = (
    Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.nonzero, Tensor.masked_select, Tensor.__bool__,
    Tensor.__int__, Tensor.__float__, Tensor.__index__, torch.nonzero, torch.masked_select,
    torch.where, torch.unique,
)  # fmt: skip
"""What ends only when the device has come so far; ``where`` with a condition alone. So does what is
indexed with a tensor that lies on the CPU, or with a mask."""
waited: list[str] = []
"""The calls that would have waited."""


class Misplaced(AssertionError):
    """A call with tensors of two devices."""


class Away(Tensor):
    """A tensor that gives another device as its own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone()
        return (
            nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


def is_away(device: Any) -> bool:
    """Is the device asked for the one that is not there?"""
    return device is not None and torch.device(device).type == AWAY.type


def call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A call on tensors of one place, made on the CPU."""
    flat = tree_flatten((args, kwargs))[0]
    there = [x for x in flat if isinstance(x, Away)]
    here = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, Away) and x.dim() > 0]
    if there and func in _ANSWERS:
        return _ANSWERS[func]
    if func is Tensor.pin_memory:
        return args[0]
    if func is Tensor.numpy and there:
        raise Misplaced("numpy() of a tensor that is away; bring it to the CPU first")
    masks = func in (Tensor.__getitem__, Tensor.__setitem__) and tree_flatten(args[1])[0]
    if (
        any(isinstance(x, Away) and x.dtype == torch.bool for x in masks or ())
        or (there and here and func in _INDEXED)
        or (there and func in WAITING and (func is not torch.where or len(args) == 1))
    ):
        waited.append(getattr(func, "__name__", str(func)))
    asked = [
        x for x in flat if isinstance(x, (torch.device, str)) and str(x)[:4] in ("cuda", "cpu")
    ]
    target = kwargs.get("device", asked[0] if asked and func is Tensor.to else None)
    moved = func in (Tensor.to, Tensor.cpu, Tensor.copy_)
    if there and here and func not in _INDEXED and not moved:
        name = getattr(func, "__name__", str(func))
        raise Misplaced(f"{name} of {[tuple(x.shape) for x in here]} on the CPU with others away")
    away = is_away(target) if target is not None else bool(there)
    if func in (Tensor.cpu, Tensor.copy_):
        away = func is Tensor.copy_ and isinstance(args[0], Away)
    args, kwargs = tree_map_only(torch.device, lambda x: torch.device("cpu"), (args, kwargs))
    if is_away(kwargs.get("device")):
        kwargs["device"] = "cpu"
    if func is Tensor.to and asked and isinstance(asked[0], str):
        args = tuple("cpu" if x == asked[0] else x for x in args)
    with torch._C.DisableTorchFunctionSubclass():
        found = func(*args, **kwargs)
        # The same tensor stays the same: an alias of a parameter would not be one.
        return tree_map_only(Tensor, lambda x: _as(x, Away if away else Tensor), found)


def _as(tensor: Tensor, kind: type[Tensor]) -> Tensor:
    return tensor if isinstance(tensor, Away) == (kind is Away) else tensor.as_subclass(kind)


class Machine(TorchFunctionMode):
    """While it is on, tensors can be made there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


def send(module: nn.Module) -> None:
    """Move a module there."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(p.detach().as_subclass(Away), p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = b.as_subclass(Away)
