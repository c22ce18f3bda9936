"""Argument checks shared by the operators: one error that names the argument and its value."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FP8 = torch.float8_e4m3fn


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Check a tensor's shape; None in ``shape`` stands for any size.

    Raises:
        ValueError: another shape.
    """
    fits = tensor.dim() == len(shape) and all(
        wanted is None or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("·" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be [{wanted}]")


def check_floats(**tensors: Tensor | None) -> None:
    """Raises TypeError for a tensor that is not of a float type."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(f"{name} is {tensor.dtype}; it must be a float type")


def check_integers(**tensors: Tensor | None) -> None:
    """Raises TypeError for a tensor that is not int64 or int32."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} is {tensor.dtype}; it must be int64 or int32")


def check_scales(name: str, scales: Tensor | None, **caches: Tensor | None) -> None:
    """Check caches [B, H, S, K]: a float type, or float8_e4m3fn with scales float32 [2, B, H, S].

    Raises:
        ValueError: scales of another shape.
        TypeError: other types, an 8-bit cache without scales, or scales without one.
    """
    if scales is None:
        for one, cache in caches.items():
            if cache is not None and cache.dtype == FP8:
                raise TypeError(f"{one} is {FP8}, which needs {name}")
        check_floats(**caches)
        return
    if scales.dtype != torch.float32:
        raise TypeError(f"{name} is {scales.dtype}; it must be torch.float32")
    for one, cache in caches.items():
        if cache is None or cache.dtype != FP8:
            kind = "missing" if cache is None else cache.dtype
            raise TypeError(f"{one} is {kind}; with {name} it must be {FP8}")
        if cache.dim() == 4:
            check_shape(name, scales, (2, *cache.shape[:3]))


def halves(name: str, scales: Tensor | None) -> dict[str, Tensor]:
    """The scales of keys and of values by name, each of which must be contiguous: those of a
    cache's leading rows are not contiguous together."""
    return {} if scales is None else {f"{name}[{i}]": scales[i] for i in range(2)}


def check_bools(**tensors: Tensor | None) -> None:
    """Raises TypeError for a tensor that is not bool."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.bool:
            raise TypeError(f"{name} is {tensor.dtype}; it must be bool")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raises ValueError where the tensors live on several devices."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"tensors on several devices: {where}; move them to one")


def check_not_empty(**tensors: Tensor) -> None:
    """Raises ValueError for a tensor without elements."""
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must not be empty")


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raises ValueError for a tensor that is not contiguous: kernels rely on it, and a copy made
    here would hide its cost."""
    for name, tensor in tensors.items():
        if tensor is None or tensor.numel() == 0:
            continue
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}; "
                f"pass {name}.contiguous()"
            )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError for a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name} = {value!r}; choose {', '.join(map(repr, choices))}")


def device_scalar(
    name: str, value: float | Tensor, device: torch.device, low: float, rows: int = 1
) -> Tensor:
    """Return a number as float32 [1] on ``device``, where a CUDA graph reads it anew at every
    replay. A tensor may also hold one number for each of ``rows``, and then gives [rows].

    A Python number is checked against ``low`` (exclusive), as the float32 that it becomes; where
    ``low`` is 0, 1/value is finite too. A tensor's value is not checked, as reading it would make
    the host wait for the device.

    Raises:
        ValueError: not finite, not above ``low``, or a tensor of another shape or on another device
            (copying it would also make the host wait, and a graph would not read it anew), or one
            that requires a gradient, as it would get none.
    """
    if isinstance(value, Tensor):
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, which is not calculated; detach it")
        if value.numel() != 1 and value.shape != (rows,):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it must hold one number"
                f"{f', or one for each of {rows} rows' if rows > 1 else ''}"
            )
        _check_on(name, value, device)
        return value.reshape(-1).to(torch.float32).contiguous()
    least = max(low, float(np.finfo(np.float32).tiny)) if low == 0 else low
    if not low < value <= float(np.finfo(np.float32).max) or value < least:
        raise ValueError(f"{name} = {value}; it must be finite and above {low:g} in float32")
    return torch.full((1,), value, dtype=torch.float32, device=device)


def _check_on(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {device}, as the rest")


def device_seed(seed: int | Tensor, device: torch.device, rows: int = 1) -> Tensor:
    """Return a 64-bit key as int64 [1] on ``device``. A tensor may also hold one for each of
    ``rows``, and then gives [rows].

    Raises:
        ValueError: outside 0 … 2⁶³ − 1, or a tensor of another type or shape or on another device.
    """
    if isinstance(seed, Tensor):
        if (seed.numel() != 1 and seed.shape != (rows,)) or seed.dtype != torch.int64:
            raise ValueError(
                f"seed is {seed.dtype} {tuple(seed.shape)}; it must be one int64"
                f"{f', or one for each of {rows} rows' if rows > 1 else ''}"
            )
        _check_on("seed", seed, device)
        return seed.reshape(-1).contiguous()
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed = {seed}; it must be in 0 … 2^63 - 1")
    return torch.full((1,), seed, dtype=torch.int64, device=device)
