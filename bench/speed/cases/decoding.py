"""Cases of decoding, whose whole cost is reading weights and caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F

from echogen.bench.registry import (
    BOUNDS,
    Case,
    Dims,
    Floor,
    Inputs,
    Make,
    Outputs,
    Pass,
    Peer,
    Run,
)
from echogen.kernels.decode_attention import decode_attention
from echogen.kernels.reference.precision import widen
from echogen.kernels.rope import scaled_heads
from echogen.kernels.skinny_linear import FP8, fp8_weight, skinny_linear
from echogen.kernels.wide_linear import wide_linear

# Janus-Pro: 16 heads of 128 without grouping; prompts of 128 tokens, images of 576. Halfway
# through an image a sequence holds 128 + 288.
_CACHES = {
    "tiny": {"groups": 2, "samples": 2, "heads": 4, "width": 16, "prefix": 0, "capacity": 40,
             "held": 29},
    "decoding": {"groups": 16, "samples": 1, "heads": 16, "width": 128, "prefix": 0,
                 "capacity": 704, "held": 416},
}  # fmt: skip
_SHARED = {
    "tiny": _CACHES["tiny"] | {"prefix": 16, "held": 13},
    "decoding": {"groups": 8, "samples": 8, "heads": 16, "width": 128, "prefix": 128,
                 "capacity": 576, "held": 288},
}  # fmt: skip


def _attention_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    groups, heads, width = dims["groups"], dims["heads"], dims["width"]
    rows, prefix, capacity = groups * dims["samples"], dims["prefix"], dims["capacity"]
    made: Inputs = {"query": make.floats(rows, heads, width, dtype=dtype)}
    for name in ("keys", "values"):
        own = make.floats(rows, heads, capacity, width, dtype=dtype)
        shared = make.floats(groups, heads, prefix, width, dtype=dtype)
        copies = shared.repeat_interleave(dims["samples"], 0)
        # Without the operator, every sequence has its own copy of the prefix.
        made |= {name: own, f"prefix_{name}": shared, f"whole_{name}": torch.cat((copies, own), 2)}
    counted = make.integers(0, 1, rows)
    made["lengths"] = counted + dims["held"]
    made["whole_lengths"] = (made["lengths"] + prefix).int()
    made["held"] = prefix + dims["held"]
    made["groups"] = torch.arange(groups, device=counted.device).repeat_interleave(dims["samples"])
    return made


def _eight_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    made = _attention_inputs(make, dims, dtype)
    for before in ("", "prefix_"):
        (keys, by), (values, and_by) = (scaled_heads(made[before + n]) for n in ("keys", "values"))
        made |= {f"{before}keys": keys, f"{before}values": values}
        made[f"{before}scales"] = torch.stack((by, and_by))
    return made


def _attention(i: Inputs) -> Outputs:
    shared = {}
    if i["prefix_keys"].shape[2]:
        names = ("prefix_keys", "prefix_values", "prefix_scales", "groups")
        shared = {name: i[name] for name in names if name in i}
    if "scales" in i:
        shared["scales"] = i["scales"]
    return (decode_attention(i["query"], i["keys"], i["values"], i["lengths"], **shared),)


def _eager_attention(i: Inputs) -> Outputs:
    # All sequences hold as many tokens, so that no mask keeps torch from its flash attention.
    keys, values = (i[f"whole_{name}"][:, :, : i["held"]] for name in ("keys", "values"))
    found = F.scaled_dot_product_attention(i["query"][:, :, None], keys, values)
    return (found[:, :, 0],)


def _flash() -> Run:
    from flash_attn import flash_attn_with_kvcache

    def run(i: Inputs) -> Outputs:
        # It expects tokens before heads; in memory, a head's tokens stay contiguous.
        keys, values = (i[f"whole_{name}"].transpose(1, 2) for name in ("keys", "values"))
        out = flash_attn_with_kvcache(
            i["query"][:, None], keys, values, cache_seqlens=i["whole_lengths"]
        )
        return (out[:, 0],)

    return run


FLASH = Peer("flash-attn", "flash-attn", _flash)


def _attention_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    rows = dims["groups"] * dims["samples"]
    # Keys and values held, a prefix's once per group; query in, result out.
    tokens = rows * dims["held"] + dims["groups"] * dims["prefix"]
    pairs = rows * (dims["held"] + dims["prefix"]) * dims["heads"]
    token = dims["heads"] * dims["width"] * size
    return Floor(2 * (tokens + rows) * token, 4 * pairs * dims["width"], 4 * pairs, pairs)


def _eight_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    """One byte per stored number, and 4 per scale of each head."""
    plain = _attention_floor(dims, size, mode)
    rows, heads, width = dims["groups"] * dims["samples"], dims["heads"], dims["width"]
    tokens = rows * dims["held"] + dims["groups"] * dims["prefix"]
    moved = 2 * tokens * heads * (width + 4) + 2 * rows * heads * width * size
    return replace(plain, bytes=moved)


# --- linear layers ------------------------------------------------------------------------------

EPS = 1e-6
# Janus-Pro's layers at batch 1 with guidance: the fused projection of queries, keys and values
# after its norm, the fused gate and up after theirs, and the down projection with the residual.
_QKV = {
    "tiny": {"rows": 2, "depth": 64, "channels": 48},
    "decoding": {"rows": 2, "depth": 2048, "channels": 3 * 2048},
}
_GATE_UP = {
    "tiny": {"rows": 2, "depth": 64, "channels": 96},
    "decoding": {"rows": 2, "depth": 2048, "channels": 2 * 5632},
}
_DOWN = {
    "tiny": {"rows": 16, "depth": 96, "channels": 64},
    "decoding": {"rows": 16, "depth": 5632, "channels": 2048},
}


_MANY = {
    "tiny": {"rows": 40, "depth": 64, "channels": 48},
    "decoding": {"rows": 256, "depth": 2048, "channels": 3 * 2048},
}
_MANY_GATE_UP = {
    "tiny": {"rows": 40, "depth": 64, "channels": 96},
    "decoding": {"rows": 256, "depth": 2048, "channels": 2 * 5632},
}
_FEWER_DOWN = {
    "tiny": {"rows": 20, "depth": 96, "channels": 64},
    "decoding": {"rows": 32, "depth": 5632, "channels": 2048},
}
_MANY_DOWN = {
    "tiny": {"rows": 40, "depth": 96, "channels": 64},
    "decoding": {"rows": 256, "depth": 5632, "channels": 2048},
}


def _linear_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    rows, depth, channels = dims["rows"], dims["depth"], dims["channels"]
    return {
        "x": make.floats(rows, depth, dtype=dtype),
        "weight": make.floats(channels, depth, dtype=dtype) * depth**-0.5,
    }


def _normed_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    made = _linear_inputs(make, dims, dtype)
    return made | {"gain": 1 + 0.1 * make.floats(dims["depth"], dtype=dtype)}


def _fp8_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    made = _normed_inputs(make, dims, dtype)
    weight = made["weight"]
    if weight.is_meta:  # no values to compute a scale from
        scale = make.uniform(len(weight))
        return made | {"weight": weight.to(FP8), "scale": scale, "plain": weight}
    eight, scale = fp8_weight(weight)
    plain = (eight.float() * scale[:, None]).to(dtype)  # the same numbers, for the peer
    return made | {"weight": eight, "scale": scale, "plain": plain}


def _residual_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    made = _linear_inputs(make, dims, dtype)
    return made | {"residual": make.floats(dims["rows"], dims["channels"], dtype=dtype)}


def _eager_linear(i: Inputs) -> Outputs:
    x, weight = i["x"], i["weight"].to(i["x"].dtype)
    if "gain" in i:
        above = widen(x)
        x = (above * torch.rsqrt(above.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)
        x = x * i["gain"]
    y = F.linear(x, weight)
    if "scale" in i:
        y = (y * i["scale"]).to(x.dtype)
    return (y + i["residual"] if "residual" in i else y,)


def _plain_linear(i: Inputs) -> Outputs:
    return _eager_linear({"x": i["x"], "weight": i["plain"], "gain": i["gain"]})


PLAIN = Peer("bf16-linear", "torch", lambda: _plain_linear)
"""What one would run without fp8, whereas eager torch widens the weight in every call."""


def _eager_gated(i: Inputs) -> Outputs:
    gate, up = _eager_linear(i)[0].chunk(2, -1)
    return (F.silu(gate) * up,)


def _linear_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    rows, depth, channels = dims["rows"], dims["depth"], dims["channels"]
    # The weight is read once; x in, y out, and a gain or a residual, are negligible.
    moved = channels * depth + rows * (depth + channels)
    return Floor(moved * size, 2 * rows * depth * channels)


def _fp8_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    rows, depth, channels = dims["rows"], dims["depth"], dims["channels"]
    moved = channels * depth + 4 * channels + rows * (depth + channels) * size
    return Floor(moved, 2 * rows * depth * channels)


def _product(
    linear: Callable[..., torch.Tensor],
    variant: str,
    sizes: Mapping[str, Dims],
    inputs: Callable[[Make, Dims, torch.dtype], Inputs],
    floor: Callable[[Dims, int, Pass], Floor] = _linear_floor,
    swiglu: bool = False,
    peers: tuple[Peer, ...] = (),
) -> Case:
    """Return a case of one of the two linear layers, which take the same arguments."""

    def run(i: Inputs) -> Outputs:
        taken = {name: value for name, value in i.items() if name != "plain"}
        return (linear(**taken, eps=EPS, swiglu=swiglu),)

    return Case(
        operator=linear.__name__,
        variant=variant,
        sizes=sizes,
        inputs=inputs,
        run=run,
        eager=_eager_gated if swiglu else _eager_linear,
        outputs=("y",),
        floor=floor,
        only=torch.bfloat16,
        peers=peers,
    )


CASES: tuple[Case, ...] = (
    Case(
        operator="decode_attention",
        sizes=_CACHES,
        inputs=_attention_inputs,
        run=_attention,
        eager=_eager_attention,
        outputs=("out",),
        floor=_attention_floor,
        peers=(FLASH,),
    ),
    Case(
        operator="decode_attention",
        variant="shared prefix",
        sizes=_SHARED,
        inputs=_attention_inputs,
        run=_attention,
        eager=_eager_attention,
        outputs=("out",),
        floor=_attention_floor,
        peers=(FLASH,),
    ),
    Case(
        operator="decode_attention",
        variant="8 bits",
        sizes=_SHARED,
        inputs=_eight_inputs,
        run=_attention,
        eager=_eager_attention,
        outputs=("out",),
        floor=_eight_floor,
        bounds=dict.fromkeys(BOUNDS, 0.08),  # eager reads the values before rounding to 8 bits
    ),
    _product(skinny_linear, "", _QKV, _normed_inputs),
    _product(skinny_linear, "fp8", _QKV, _fp8_inputs, _fp8_floor, peers=(PLAIN,)),
    _product(skinny_linear, "SwiGLU", _GATE_UP, _normed_inputs, swiglu=True),
    _product(skinny_linear, "residual, 16 rows", _DOWN, _residual_inputs),
    _product(wide_linear, "", _MANY, _normed_inputs),
    _product(wide_linear, "fp8", _MANY, _fp8_inputs, _fp8_floor, peers=(PLAIN,)),
    _product(wide_linear, "fp8, 32 rows", _FEWER_DOWN, _fp8_inputs, _fp8_floor, peers=(PLAIN,)),
    _product(wide_linear, "SwiGLU", _MANY_GATE_UP, _normed_inputs, swiglu=True),
    _product(wide_linear, "residual", _MANY_DOWN, _residual_inputs),
)
