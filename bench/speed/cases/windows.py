"""Cases of drawing in windows: a picture with guidance, eight codes per step."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from echogen.bench.registry import Case, Dims, Floor, Inputs, Make, Outputs, Pass
from echogen.kernels.accept_window import accept_window
from echogen.kernels.decode_attention import decode_attention
from echogen.kernels.reference import accept_window as reference

# Janus-Pro, halfway through an image: 16 heads of 128, prompts of 128 tokens, 576 codes.
_WINDOWS = {
    "tiny": {"sequences": 2, "window": 4, "heads": 4, "width": 16, "prefix": 16, "capacity": 24,
             "held": 13},
    "decoding": {"sequences": 2, "window": 8, "heads": 16, "width": 128, "prefix": 128,
                 "capacity": 575, "held": 288},
}  # fmt: skip


def _attention_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    sequences, window, prefix = dims["sequences"], dims["window"], dims["prefix"]
    heads, width, held = dims["heads"], dims["width"], dims["held"]
    made: Inputs = {"query": make.floats(sequences * window, heads, width, dtype=dtype)}
    for name in ("keys", "values"):
        own = make.floats(sequences, heads, dims["capacity"], width, dtype=dtype)
        before = make.floats(sequences, heads, prefix, width, dtype=dtype)
        made |= {name: own, f"prefix_{name}": before, f"whole_{name}": torch.cat((before, own), 2)}
    counted = make.integers(0, 1, sequences, 1)
    w = torch.arange(window, device=counted.device)
    made["lengths"] = (counted + held - window + 1 + w).flatten()
    made["groups"] = torch.arange(sequences, device=w.device).repeat_interleave(window)
    place = torch.arange(prefix + held, device=w.device)
    made["seen"] = place < (prefix + held - window + 1 + w)[:, None]
    return made


def _attention(i: Inputs) -> Outputs:
    names = ("prefix_keys", "prefix_values", "groups")
    before = {name: i[name] for name in names}
    return (decode_attention(i["query"], i["keys"], i["values"], i["lengths"], **before),)


def _eager_attention(i: Inputs) -> Outputs:
    query = i["query"].unflatten(0, (len(i["keys"]), -1)).transpose(1, 2)
    keys, values = (i[f"whole_{name}"][:, :, : i["seen"].shape[1]] for name in ("keys", "values"))
    found = F.scaled_dot_product_attention(query, keys, values, attn_mask=i["seen"])
    return (found.transpose(1, 2).flatten(0, 1),)


def _attention_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    sequences, tokens = dims["sequences"], dims["held"] + dims["prefix"]
    rows = sequences * dims["window"]
    pairs = rows * tokens * dims["heads"]
    moved = 2 * (sequences * tokens + rows) * dims["heads"] * dims["width"] * size
    return Floor(moved, 4 * pairs * dims["width"], 4 * pairs, pairs)


_IMAGES = {
    "tiny": {"images": 3, "tokens": 64, "window": 16, "columns": 8},
    "decoding": {"images": 1, "tokens": 576, "window": 8, "columns": 24},
}
_WRITTEN = ("codes", "drafted", "done", "steps", "fed", "position", "places")


def _images(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    """Return images that are done and so do not change: every run gets the same inputs."""
    images, tokens, window = dims["images"], dims["tokens"], dims["window"]
    codes, rows = make.integers(0, 2, images, tokens), images * window
    none = make.integers(0, 1, images)
    return {
        "sampled": make.integers(0, 2, rows),
        "codes": codes,
        "drafted": torch.zeros_like(codes, dtype=torch.bool),
        "done": none + tokens,
        "steps": none,
        "fed": make.integers(0, 2, rows),
        "position": make.integers(0, 2, rows),
        "places": make.integers(0, 2, 3, 2 * rows),
        "origin": make.integers(1, 128, 2 * images),
        "columns": dims["columns"],
    }


def _accept(i: Inputs) -> Outputs:
    accept_window(**i)
    return tuple(i[name] for name in _WRITTEN)


def _eager_accept(i: Inputs) -> Outputs:
    reference.accept_window(**i)
    return tuple(i[name] for name in _WRITTEN)


def _accept_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    # In: a window's samples and codes. Out: codes, what is fed and where, two sequences' places.
    return Floor(dims["images"] * dims["window"] * 8 * (2 + 3 + 6))


CASES = (
    Case(
        operator="decode_attention",
        variant="window",
        sizes=_WINDOWS,
        inputs=_attention_inputs,
        run=_attention,
        eager=_eager_attention,
        outputs=("out",),
        floor=_attention_floor,
    ),
    Case(
        operator="accept_window",
        sizes=_IMAGES,
        inputs=_images,
        run=_accept,
        eager=_eager_accept,
        outputs=_WRITTEN,
        floor=_accept_floor,
        only=torch.float32,
    ),
)
