"""Cases of the transformer's small operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from echogen.bench.registry import Case, Dims, Floor, Inputs, Make, Outputs, Pass, Peer, Run
from echogen.kernels.checks import FP8
from echogen.kernels.reference.precision import widen
from echogen.kernels.rms_norm import add_rms_norm, rms_norm
from echogen.kernels.rope import rope, rope_cache
from echogen.kernels.swiglu import swiglu

EPS = 1e-6
# Janus-Pro's language model: width 2048, 16 heads of 128, SwiGLU 5632; a sample of stage 1 has
# about 704 tokens (a prompt of 128, 576 of the image).
_ROWS = {
    "tiny": {"rows": 40, "width": 64},
    "training": {"rows": 8 * 704, "width": 2048},
    "decoding": {"rows": 16, "width": 2048},
}
_MLP = {
    "tiny": {"rows": 40, "width": 96},
    "training": {"rows": 8 * 704, "width": 5632},
    "decoding": {"rows": 16, "width": 5632},
}
_HEADS = {
    "tiny": {"rows": 2, "length": 12, "heads": 4, "width": 16},
    "training": {"rows": 8, "length": 704, "heads": 16, "width": 128},
}
_CACHES = {
    "tiny": {"rows": 3, "capacity": 20, "heads": 4, "width": 16},
    "decoding": {"rows": 16, "capacity": 704, "heads": 16, "width": 128},
}


# --- norms --------------------------------------------------------------------------------------


def _norm_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    return {
        "x": make.floats(dims["rows"], dims["width"], dtype=dtype),
        "residual": make.floats(dims["rows"], dims["width"], dtype=dtype),
        "weight": 1 + 0.1 * make.floats(dims["width"], dtype=dtype),
    }


def eager_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm as transformers' Llama writes it."""
    above = widen(x)
    scaled = above * torch.rsqrt(above.square().mean(-1, keepdim=True) + EPS)
    return weight * scaled.to(x.dtype)


def _added(i: Inputs) -> Outputs:
    return add_rms_norm(i["x"], i["residual"], i["weight"], EPS)


def _eager_added(i: Inputs) -> Outputs:
    summed = i["x"] + i["residual"]
    return eager_norm(summed, i["weight"]), summed


def _torch_norm() -> Run:
    return lambda i: (F.rms_norm(i["x"], i["weight"].shape, i["weight"], EPS),)


def _liger_norm() -> Run:
    from liger_kernel.transformers.functional import liger_rms_norm

    return lambda i: (liger_rms_norm(i["x"], i["weight"], EPS),)


def _norm_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    n, d = dims["rows"] * dims["width"], dims["width"]
    # x in, out out; backward: x and d_out in, dx and the weight's gradient out.
    moved = (2 * n + d if mode == "forward" else 3 * n + 2 * d) * size + 4 * dims["rows"]
    return Floor(moved, 0, 6 * n, dims["rows"])


def _added_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    n = dims["rows"] * dims["width"]
    # Two in, two out; backward: the sum and two gradients in, one out (for both addends).
    more = 2 * n if mode == "forward" else n
    return _norm_floor(dims, size, mode) + Floor(more * size)


# --- rotary embedding ---------------------------------------------------------------------------


def _tables(make: Make, length: int, width: int, dtype: torch.dtype) -> Inputs:
    angle = 6.28 * make.uniform(1, length, width // 2)
    angle = torch.cat((angle, angle), -1)
    return {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}


def _rope_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    shape = (dims["rows"], dims["length"], dims["heads"], dims["width"])
    made = {name: make.floats(*shape, dtype=dtype) for name in ("q", "k")}
    return made | _tables(make, dims["length"], dims["width"], dtype)


def _rotated(x: Tensor, i: Inputs) -> Tensor:
    first, second = x.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return x * i["cos"][:, :, None] + turned * i["sin"][:, :, None]


def _liger_rope() -> Run:
    from liger_kernel.transformers.functional import liger_rope

    def run(i: Inputs) -> Outputs:
        q, k = i["q"].transpose(1, 2), i["k"].transpose(1, 2)
        q, k = liger_rope(q, k, i["cos"], i["sin"])[:2]
        return q.transpose(1, 2), k.transpose(1, 2)

    return run


def _rope_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    tokens = dims["rows"] * dims["length"]
    n = 2 * tokens * dims["heads"] * dims["width"]  # queries and keys: in and out, either way
    return Floor((2 * n + 2 * dims["length"] * dims["width"]) * size, 0, 3 * n)


def _cache_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    rows, heads, width = dims["rows"], dims["heads"], dims["width"]
    made = {n: make.floats(rows, 1, heads, width, dtype=dtype) for n in ("q", "k", "v")}
    caches = (rows, heads, dims["capacity"], width)
    made |= {name: make.floats(*caches, dtype=dtype) for name in ("keys", "values")}
    made["slots"] = make.integers(0, dims["capacity"], rows, 1)
    return made | _tables(make, 1, width, dtype)


def _cache(i: Inputs) -> Outputs:
    tables = (i["cos"], i["sin"])
    q = rope_cache(i["q"], i["k"], i["v"], *tables, i["keys"], i["values"], i["slots"])
    return q, i["keys"], i["values"]


def _eager_cache(i: Inputs) -> Outputs:
    row = torch.arange(len(i["q"]), device=i["q"].device)[:, None]
    i["keys"][row, :, i["slots"]] = _rotated(i["k"], i)
    i["values"][row, :, i["slots"]] = i["v"]
    return _rotated(i["q"], i), i["keys"], i["values"]


def _eight_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    made = _cache_inputs(make, dims, dtype)
    made |= {name: made[name].to(FP8) for name in ("keys", "values")}
    shape = 2, dims["rows"], dims["heads"], dims["capacity"]
    return made | {"scales": make.floats(*shape, dtype=torch.float32)}


def _eight(i: Inputs) -> Outputs:
    """Return queries alone: the operator's tests check the caches, and eager rounds differently."""
    written = (i["keys"], i["values"], i["slots"], i["scales"])
    return (rope_cache(i["q"], i["k"], i["v"], i["cos"], i["sin"], *written),)


def _eager_eight(i: Inputs) -> Outputs:
    row = torch.arange(len(i["q"]), device=i["q"].device)[:, None]
    for n, (cache, new) in enumerate((("keys", _rotated(i["k"], i)), ("values", i["v"]))):
        scale = new.abs().amax(-1).to(i["scales"].dtype) / 448
        i["scales"][n, row, :, i["slots"]] = scale
        i[cache][row, :, i["slots"]] = (new / scale[..., None]).to(i[cache].dtype)
    return (_rotated(i["q"], i),)


def _eight_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    n = dims["rows"] * dims["heads"]
    # Four are read or written in full, and two written in 8 bits with a scale per head.
    moved = n * dims["width"] * (4 * size + 2) + 8 * n
    return Floor(moved + 2 * dims["width"] * size + 8 * dims["rows"], 0, 8 * n * dims["width"])


def _cache_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    n = dims["rows"] * dims["heads"] * dims["width"]
    return Floor((6 * n + 2 * dims["width"]) * size + 8 * dims["rows"], 0, 6 * n)


# --- SwiGLU -------------------------------------------------------------------------------------


def _swiglu_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    return {"gate_up": make.floats(dims["rows"], 2 * dims["width"], dtype=dtype)}


def _eager_swiglu(i: Inputs) -> Outputs:
    gate, up = i["gate_up"].chunk(2, -1)
    return (F.silu(gate) * up,)


def _liger_swiglu() -> Run:
    from liger_kernel.transformers.functional import liger_swiglu

    def run(i: Inputs) -> Outputs:
        # Its two inputs must be contiguous; a model that fuses the projections pays for this copy.
        gate, up = (half.contiguous() for half in i["gate_up"].chunk(2, -1))
        return (liger_swiglu(gate, up),)

    return run


def _swiglu_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    n = dims["rows"] * dims["width"]
    # Two in, one out; backward: three in, two out. One exponential and one reciprocal.
    return Floor((3 if mode == "forward" else 5) * n * size, 0, 6 * n, 2 * n)


CASES = (
    Case(
        operator="rms_norm",
        sizes=_ROWS,
        inputs=_norm_inputs,
        run=lambda i: (rms_norm(i["x"], i["weight"], EPS),),
        eager=lambda i: (eager_norm(i["x"], i["weight"]),),
        outputs=("out",),
        trains=("x", "weight"),
        graded=("out",),
        floor=_norm_floor,
        peers=(
            Peer("liger", "liger-kernel", _liger_norm),
            Peer("torch", "torch", _torch_norm, on_cpu=True),
        ),
    ),
    Case(
        operator="add_rms_norm",
        sizes=_ROWS,
        inputs=_norm_inputs,
        run=_added,
        eager=_eager_added,
        outputs=("out", "summed"),
        trains=("x", "residual", "weight"),
        graded=("out", "summed"),
        floor=_added_floor,
    ),
    Case(
        operator="rope",
        sizes=_HEADS,
        inputs=_rope_inputs,
        run=lambda i: rope(i["q"], i["k"], i["cos"], i["sin"]),
        eager=lambda i: (_rotated(i["q"], i), _rotated(i["k"], i)),
        outputs=("q", "k"),
        trains=("q", "k"),
        graded=("q", "k"),
        floor=_rope_floor,
        peers=(Peer("liger", "liger-kernel", _liger_rope),),
    ),
    Case(
        operator="rope_cache",
        sizes=_CACHES,
        inputs=_cache_inputs,
        run=_cache,
        eager=_eager_cache,
        outputs=("q", "keys", "values"),
        floor=_cache_floor,
    ),
    Case(
        operator="rope_cache",
        variant="8 bits",
        sizes=_CACHES,
        inputs=_eight_inputs,
        run=_eight,
        eager=_eager_eight,
        outputs=("q",),
        floor=_eight_floor,
    ),
    Case(
        operator="swiglu",
        sizes=_MLP,
        inputs=_swiglu_inputs,
        run=lambda i: (swiglu(i["gate_up"]),),
        eager=_eager_swiglu,
        outputs=("out",),
        trains=("gate_up",),
        graded=("out",),
        floor=_swiglu_floor,
        peers=(Peer("liger", "liger-kernel", _liger_swiglu),),
    ),
)
