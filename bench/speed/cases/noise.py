"""Cases of sampling: keyed noise, the straight-through sample, guided sampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from echogen.bench.registry import Case, Dims, Floor, Inputs, Make, Outputs, Pass
from echogen.kernels.gumbel import gumbel_st_embed
from echogen.kernels.philox import gumbel_noise
from echogen.kernels.reference import philox
from echogen.kernels.reference.precision import widen
from echogen.kernels.sampling import cfg_sample

TAU, GUIDANCE = 0.7, 5.0

# Instructions and special functions per element, with none wasted. Philox: ten rounds of two wide
# products (at half rate: four) and two three-way xors give four columns, so 60 / 4; shift,
# conversion and one fused multiply-add make the uniform; two logarithms.
NOISE_ISSUES, NOISE_SPECIALS = 15 + 3 + 2, 2
# Softmax, online: add the noise, compare, select the index, scale and shift, exp, sum.
SOFTMAX_ISSUES, SOFTMAX_SPECIALS = 6, 1


def keyed_noise(key: Inputs, columns: int) -> Tensor | None:
    """The noise that makes eager results comparable: the plain reference's, not the kernel's."""
    if key["draw"].is_meta:
        return None
    return philox.gumbel(key["seed"], key["draw"], key["position"], columns)


def key(make: Make, rows: int) -> Inputs:
    """Return the arguments that key the noise of each row."""
    return {
        "seed": make.integers(0, 2**31, 1),
        "draw": make.integers(0, 2**32, rows),
        "position": make.integers(0, 576, rows),
    }


def gumbel_like(x: Tensor, noise: Tensor | None) -> Tensor:
    """Return the given noise, or fresh noise as `torch.nn.functional.gumbel_softmax` draws it."""
    if noise is not None:
        return noise
    return -torch.empty_like(x, memory_format=torch.contiguous_format).exponential_().log()


def straight_through(logits: Tensor, i: Inputs) -> Outputs:
    """Embedding, index and cross entropy as autograd users write them; a given index is kept."""
    logits = widen(logits)
    noisy = logits + gumbel_like(logits, i["noise"])
    soft = (noisy / TAU).softmax(-1)
    index = noisy.argmax(-1) if i.get("index") is None else i["index"]
    hard = torch.zeros_like(soft).scatter_(-1, index[:, None], 1.0)
    embed = (hard - soft.detach() + soft).to(i["codebook"].dtype) @ i["codebook"]
    return embed, index, F.cross_entropy(logits, i["targets"], reduction="none")


def _noise_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    made = key(make, dims["rows"])
    return made | {"columns": dims["codes"], "noise": keyed_noise(made, dims["codes"])}


def _eager_noise(i: Inputs) -> Outputs:
    rows = i["draw"].new_empty(len(i["draw"]), i["columns"], dtype=torch.float32)
    return (gumbel_like(rows, i["noise"]),)


def _noise_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    n = dims["rows"] * dims["codes"]
    # Writes every number; reads a key per row.
    return Floor(4 * n + 16 * dims["rows"], 0, n * NOISE_ISSUES, n * NOISE_SPECIALS)


def _gumbel_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    rows, codes = dims["rows"], dims["codes"]
    made = key(make, rows)
    return made | {
        "logits": 3 * make.floats(rows, codes, dtype=dtype),
        "codebook": make.floats(codes, dims["width"], dtype=dtype) / dims["width"] ** 0.5,
        "targets": make.integers(0, codes, rows),
        "noise": keyed_noise(made, codes),
    }


def _gumbel(i: Inputs) -> Outputs:
    return gumbel_st_embed(
        i["logits"], i["codebook"], TAU, i["seed"], i["draw"], i["position"], None, i["targets"]
    )


def _eager_gumbel(i: Inputs) -> Outputs:
    return straight_through(i["logits"], i)


def gumbel_floor(dims: Dims, size: int, logits_passes: int) -> Floor:
    """Floor of the sampler after logits that cross memory ``logits_passes`` times.

    Forward keeps p·E and two sums per row (4·C + 8) beside embed, index and cross entropy, and
    needs 2·N·V·C for p·E. Backward reads them again, needs 2·N·V·C for dO·Eᵀ, and sums dE.
    """
    n, v, c = dims["rows"], dims["codes"], dims["width"]
    rows = n * (size * c + 4 * c + 40)
    issues, specials = NOISE_ISSUES + SOFTMAX_ISSUES, NOISE_SPECIALS + SOFTMAX_SPECIALS
    # The cross entropy adds one exponential and its sum to either pass.
    issues, specials = issues + 3, specials + 1
    return Floor(
        logits_passes * n * v * size + v * c * size + rows,
        2 * n * v * c,
        n * v * issues,
        n * v * specials,
    )


def _gumbel_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    # Forward reads the logits; backward reads them and writes their gradient, and dE.
    found = gumbel_floor(dims, size, 1 if mode == "forward" else 2)
    return found if mode == "forward" else found + Floor(dims["codes"] * dims["width"] * size)


def _sample_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    rows, codes = dims["rows"], dims["codes"]
    made = key(make, rows)
    return made | {
        "logits": make.floats(2 * rows, codes, dtype=dtype),
        "table": make.floats(codes, dims["width"], dtype=dtype),
        "top_k": dims["top_k"],
        "noise": keyed_noise(made, codes),
    }


def _sample(i: Inputs) -> Outputs:
    key = (i["seed"], i["draw"], i["position"])
    return cfg_sample(
        i["logits"], *key, cfg=GUIDANCE, top_k=i["top_k"], guided="blocked", table=i["table"]
    )


def _eager_sample(i: Inputs) -> Outputs:
    conditional, plain = widen(i["logits"]).chunk(2)
    x = plain + GUIDANCE * (conditional - plain)
    if i["top_k"]:
        x = x.masked_fill(x < x.topk(i["top_k"], -1).values[:, -1:], float("-inf"))
    logp = x.log_softmax(-1)
    if i["noise"] is not None:
        token = (x + i["noise"]).argmax(-1)
    else:  # as gpt-fast does, since torch.multinomial waits for the device
        token = (logp.exp() / torch.empty_like(logp).exponential_()).argmax(-1)
    return token, logp.gather(1, token[:, None])[:, 0], i["table"][token]


def _sample_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    n, v = dims["rows"], dims["codes"]
    # Reads both branches once, a row of the table, and writes that row, token and probability.
    moved = 2 * n * v * size + n * (2 * dims["width"] * size + 28)
    return Floor(moved, 0, n * v * (NOISE_ISSUES + SOFTMAX_ISSUES + 2), n * v * 3)


_TINY = {"rows": 24, "codes": 256, "width": 8}
_SAMPLES = {
    "tiny": {"rows": 4, "codes": 256, "width": 16, "top_k": 0},
    "decoding": {"rows": 16, "codes": 16384, "width": 2048, "top_k": 0},
}

CASES = (
    Case(
        operator="gumbel_noise",
        sizes={"tiny": _TINY, "training": {"rows": 4608, "codes": 16384}},
        inputs=_noise_inputs,
        run=lambda i: (gumbel_noise(i["seed"], i["draw"], i["position"], i["columns"]),),
        eager=_eager_noise,
        outputs=("noise",),
        floor=_noise_floor,
        dtypes=(torch.float32,),
        forgotten=("noise",),
    ),
    Case(
        operator="gumbel_st_embed",
        sizes={"tiny": _TINY, "training": {"rows": 4608, "codes": 16384, "width": 8}},
        inputs=_gumbel_inputs,
        run=_gumbel,
        eager=_eager_gumbel,
        outputs=("embed", "index", "ce"),
        trains=("logits", "codebook"),
        graded=("embed", "ce"),
        floor=_gumbel_floor,
        dtypes=(torch.bfloat16, torch.float32),
        forgotten=("noise",),
    ),
    Case(
        operator="cfg_sample",
        sizes=_SAMPLES,
        inputs=_sample_inputs,
        run=_sample,
        eager=_eager_sample,
        outputs=("token", "logprob", "embed"),
        floor=_sample_floor,
        forgotten=("noise",),
    ),
    Case(
        operator="cfg_sample",
        variant="top-k",
        sizes={name: dims | {"top_k": dims["codes"] // 16} for name, dims in _SAMPLES.items()},
        inputs=_sample_inputs,
        run=_sample,
        eager=_eager_sample,
        outputs=("token", "logprob", "embed"),
        floor=_sample_floor,
        forgotten=("noise",),
    ),
)
