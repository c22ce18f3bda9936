"""y = x·Wᵀ for the 1 to 16 rows of decoding, at the speed at which memory delivers W.

A decoding step multiplies every weight of the model by a handful of rows. It costs as much as
reading the weights once, and should cost little more. The norm before the product, and the residual
addition or SwiGLU after it, are done on the way; with fp8 weights there is half as much to read.
One further cost is that every block loads the rows before its first product, which for 16 rows of
5632 numbers is as much from the L2 cache as W is from memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from echogen.kernels import checks
from echogen.kernels.cuda.loader import CudaKernel, Gpu, gpu
from echogen.kernels.dispatch import launch, operator
from echogen.kernels.reference import skinny_linear as reference

FP8 = checks.FP8
MAX_ROWS, TEMPLATES = 16, (16, 8, 4, 2, 1)
WARPS, CHUNK, STAGE_BYTES = 8, 64, 8192  # as in skinny_linear.cu
STAGES = (8, 4)  # 56 KB in flight per SM, or what large rows leave room for

_KERNELS = {
    (fp8, rows): CudaKernel("skinny_linear", f"skinny_linear_{kind}_{rows}", overlaps=True)
    for fp8, kind in ((False, "bf16"), (True, "fp8"))
    for rows in TEMPLATES
}


@dataclass(frozen=True)
class Plan:
    """How a product is launched.

    Attributes:
        rows: rows of x per launch, and the template that takes them; a launch reads W once.
        stages: stages of copies in shared memory.
        shared_bytes: shared memory of a block.
    """

    rows: int
    stages: int
    shared_bytes: int


def plan(rows: int, depth: int, fp8: bool, device: Gpu) -> Plan:
    """Plan all rows in one launch if shared memory holds them, with as many stages as fit.

    Raises:
        ValueError: not even one row fits.
    """
    stride = 2 * CHUNK * triton.cdiv(depth, CHUNK) + 64
    for template in TEMPLATES:
        if template > 1 and rows <= template // 2:
            continue
        parts = 2 * 4 * WARPS * template * (16 if fp8 else 8)
        for stages in STAGES:
            shared = stages * STAGE_BYTES + template * stride + parts
            if shared <= device.shared_bytes:
                return Plan(template, stages, shared)
    raise ValueError(
        f"x is {depth} wide: one row takes {shared} bytes of shared memory, the device has "
        f"{device.shared_bytes}; use torch.nn.functional.linear"
    )


def _launch(
    x: Tensor, weight: Tensor, scale: Tensor | None, gain: Tensor | None, eps: float,
    residual: Tensor | None, swiglu: bool,
) -> Tensor:  # fmt: skip
    (rows, depth), channels, fp8 = x.shape, len(weight), weight.dtype == FP8
    if x.dtype != torch.bfloat16 or weight.dtype not in (torch.bfloat16, FP8):
        raise TypeError(
            f"x is {x.dtype} and weight {weight.dtype}; the kernel multiplies bfloat16 by "
            f"bfloat16 or float8_e4m3fn"
        )
    _check_aligned(x=x, weight=weight, gain=gain)
    device = gpu(x.device)
    chosen = plan(rows, depth, fp8, device)
    outputs = channels // 2 if swiglu else channels
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    a_tile = (16 if fp8 else 8) // (2 if swiglu else 1)
    grid = (min(device.sms, triton.cdiv(outputs, a_tile)),)
    for i in range(0, rows, chosen.rows):
        part = slice(i, i + chosen.rows)
        launch(
            _KERNELS[fp8, chosen.rows], grid, x[part], weight, scale, gain,
            None if residual is None else residual[part], out[part], len(x[part]), depth,
            channels, eps, swiglu, chosen.stages, block=32 * WARPS, shared=chosen.shared_bytes,
        )  # fmt: skip
    return out


def _check_aligned(**tensors: Tensor | None) -> None:
    """Check that tensors are 16-byte aligned; at launch only, as traced tensors have no address."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() % 16:
            raise ValueError(
                f"{name} begins {tensor.data_ptr() % 16} bytes behind a multiple of 16, at offset "
                f"{tensor.storage_offset()} of its storage; pass {name}.clone()"
            )


@operator("skinny_linear", _launch, "CUDA C++")
def _skinny_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, gain: Tensor | None, eps: float,
    residual: Tensor | None, swiglu: bool,
) -> Tensor:  # fmt: skip
    return reference.linear(x, weight, scale, gain, eps, residual, swiglu)


@_skinny_linear.register_fake
def fake_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, gain: Tensor | None, eps: float,
    residual: Tensor | None, swiglu: bool,
) -> Tensor:  # fmt: skip
    """What `skinny_linear` and `wide_linear` return, without values."""
    return x.new_empty(len(x), len(weight) // 2 if swiglu else len(weight))


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """``x·Wᵀ`` for few rows, without a gradient; sums in float32, rounded once at the end.

    ``y = s ⊙ (n(x)·Wᵀ)`` with, if there is a gain, ``n(x) = round(x/rms(x))·gain`` (Zhang &
    Sennrich 2019, rounded as Llama does), then ``y + residual``, or ``silu(y₁)·y₂`` of the gate
    rows and the up rows (Shazeer 2020). On CUDA a row's result depends neither on the other rows
    nor on their number, and is the same every time.

    Args:
        x: [R, K], contiguous, R in 1 … 16; bfloat16 on CUDA, any float type on the CPU.
        weight: [N, K], contiguous, of x's type, or float8_e4m3fn (see `fp8_weight`), without NaN. K
            is a multiple of 8, or of 16 with fp8. On CUDA x, weight and gain begin at a multiple of
            16 bytes, as whole tensors do.
        scale: float32 [N], the factors of an fp8 weight's rows.
        gain: [K] of x's type, the RMS norm's gain; None for no norm.
        eps: of the norm, added to the mean square, above 0.
        residual: [R, N] of x's type; not together with ``swiglu``.
        swiglu: W is a fused [2·M, K], the gate's rows first.

    Returns:
        [R, N], or [R, N/2] with ``swiglu``, of x's type.

    Raises:
        ValueError: shapes, devices, strides or numbers that do not fit.
        TypeError: types that do not fit.
    """
    check_linear(x, weight, scale, gain, eps, residual, swiglu)
    if len(x) > MAX_ROWS:
        raise ValueError(f"x has {len(x)} rows; the kernel takes up to {MAX_ROWS}")
    made: Tensor = _skinny_linear(x, weight, scale, gain, eps, residual, swiglu)
    return made


def fp8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Convert a weight [N, K] to float8_e4m3fn and float32 [N], the factors of its rows. Each row's
    largest magnitude becomes 448, the type's largest number.

    Raises:
        ValueError: not two axes, no elements, or infinities or NaN among them.
        TypeError: not a float tensor.
    """
    checks.check_shape("weight", weight, (None, None))
    checks.check_floats(weight=weight)
    checks.check_not_empty(weight=weight)
    largest = weight.abs().amax(1).float()
    bad = (~largest.isfinite()).nonzero().flatten()
    if len(bad):
        raise ValueError(f"weight holds {largest[bad[0]]} in row {int(bad[0])}; it must be finite")
    # Rows of the smallest numbers would have a scale of 0.
    scale = (largest / torch.finfo(FP8).max).clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(largest > 0, scale, 1.0)
    return (weight.float() / scale[:, None]).to(FP8), scale


def check_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, gain: Tensor | None, eps: float,
    residual: Tensor | None, swiglu: bool,
) -> None:  # fmt: skip
    """Check the arguments of `skinny_linear` and `wide_linear`. Raises as they do."""
    checks.check_shape("x", x, (None, None))
    checks.check_floats(x=x)
    rows, depth = x.shape
    checks.check_shape("weight", weight, (None, depth))
    channels = len(weight)
    checks.check_not_empty(x=x, weight=weight)
    if weight.dtype not in (x.dtype, FP8):
        raise TypeError(f"weight is {weight.dtype}; it must be {x.dtype} or {FP8}")
    multiple = 16 if weight.dtype == FP8 else 8
    if depth % multiple:
        raise ValueError(f"x is {depth} wide; with {weight.dtype} it must be {multiple}·n")
    given = {"gain": (gain, (depth,)), "residual": (residual, (rows, channels))}
    for name, (tensor, shape) in given.items():
        if tensor is None:
            continue
        checks.check_shape(name, tensor, shape)
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} is {tensor.dtype}; it must be {x.dtype}")
    if (scale is None) == (weight.dtype == FP8):
        raise ValueError("scale is for a float8 weight, and a float8 weight needs one")
    if scale is not None:
        checks.check_shape("scale", scale, (channels,))
        if scale.dtype != torch.float32:
            raise TypeError(f"scale is {scale.dtype}; it must be float32")
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps = {eps}; it must be finite and above 0")
    if swiglu and (residual is not None or channels % 2):
        raise ValueError(
            f"swiglu wants an even number of weight rows and no residual; there are {channels} rows"
            + (" and a residual" if residual is not None else "")
        )
    tensors = {"x": x, "weight": weight, "scale": scale, "gain": gain, "residual": residual}
    checks.check_contiguous(**tensors)
    checks.check_same_device(**tensors)
