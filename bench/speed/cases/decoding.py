"""Cases of decoding, where reading weights and caches is the whole cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from echogen.bench.registry import Case, Dims, Floor, Inputs, Make, Outputs, Pass
from echogen.kernels.decode_attention import decode_attention

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
        # Without the operator every sequence holds its own copy of the prefix.
        made |= {name: own, f"prefix_{name}": shared, f"whole_{name}": torch.cat((copies, own), 2)}
    counted = make.integers(0, 1, rows)
    made["lengths"] = counted + dims["held"]
    place = torch.arange(prefix + capacity, device=counted.device)
    made["held"] = (place < prefix + dims["held"])[None, None, None]
    made["groups"] = torch.arange(groups, device=counted.device).repeat_interleave(dims["samples"])
    return made


def _attention(i: Inputs) -> Outputs:
    shared = {}
    if i["prefix_keys"].shape[2]:
        shared = {name: i[name] for name in ("prefix_keys", "prefix_values", "groups")}
    return (decode_attention(i["query"], i["keys"], i["values"], i["lengths"], **shared),)


def _eager_attention(i: Inputs) -> Outputs:
    found = F.scaled_dot_product_attention(
        i["query"][:, :, None], i["whole_keys"], i["whole_values"], attn_mask=i["held"]
    )
    return (found[:, :, 0],)


def _attention_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    rows = dims["groups"] * dims["samples"]
    # Keys and values that are held, those of a prefix once for its group; query in, result out.
    tokens = rows * dims["held"] + dims["groups"] * dims["prefix"]
    pairs = rows * (dims["held"] + dims["prefix"]) * dims["heads"]
    token = dims["heads"] * dims["width"] * size
    return Floor(2 * (tokens + rows) * token, 4 * pairs * dims["width"], 4 * pairs, pairs)


CASES: tuple[Case, ...] = (
    Case(
        operator="decode_attention",
        sizes=_CACHES,
        inputs=_attention_inputs,
        run=_attention,
        eager=_eager_attention,
        outputs=("out",),
        floor=_attention_floor,
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
    ),
)
