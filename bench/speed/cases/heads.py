"""Cases of the linear head: the straight-through sample and log-probabilities after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from echogen.bench.registry import Case, Dims, Floor, Inputs, Make, Outputs, Pass, Peer, Run
from echogen.bench.speed.cases.noise import TAU, gumbel_floor, key, keyed_noise, straight_through
from echogen.kernels.grpo import grpo_loss
from echogen.kernels.head_gumbel import head_gumbel_st_embed
from echogen.kernels.logprob import guided_linear_logprob, linear_logprob
from echogen.kernels.reference.precision import widen

GUIDANCE, BETA = 5.0, 0.01
_TINY = {"images": 2, "tokens": 12, "codes": 192, "width": 32}
_TRAINING = {"images": 8, "tokens": 576, "codes": 16384, "width": 2048}
SIZES = {"tiny": _TINY, "training": _TRAINING}
# Here, unlike in the yardstick, logits are rounded to the type of hidden states, which changes a
# probability by the logits' last place.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def _head_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    rows, codes, width = dims["images"] * dims["tokens"], dims["codes"], dims["width"]
    return {
        "hidden": make.floats(rows, width, dtype=dtype),
        "weight": make.floats(codes, width, dtype=dtype) * (2 / width**0.5),
        "targets": make.integers(0, codes, rows),
        "images": dims["images"],
    }


def products(dims: Dims, size: int, mode: Pass) -> Floor:
    """Cost of hidden states through the head, without logits in memory.

    Forward needs 2·N·V·D operations. Backward needs as many for each of three: the logits again,
    the gradient of the hidden states and that of the weight. Both read hidden and weight; backward
    writes both gradients.
    """
    n, v, d = dims["images"] * dims["tokens"], dims["codes"], dims["width"]
    arguments = (n * d + v * d) * size
    if mode == "forward":
        return Floor(arguments, 2 * n * v * d)
    return Floor(2 * arguments, 6 * n * v * d)


def _softmax_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    n = dims["images"] * dims["tokens"]
    elements = n * dims["codes"]
    # Per element: scale, compare, exp and two sums forward; exp and the gradient's terms backward.
    return products(dims, size, mode) + Floor(20 * n, 0, 5 * elements, elements)


# --- the straight-through sample ----------------------------------------------------------------


def _gumbel_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    rows, codes = dims["images"] * dims["tokens"], dims["codes"]
    made = _head_inputs(make, dims, dtype) | key(make, rows)
    return made | {
        "codebook": make.floats(codes, 8, dtype=dtype) / 8**0.5,
        # Given, since rounding of the logits would make a few rows choose another code.
        "index": make.integers(0, codes, rows),
        "noise": keyed_noise(made, codes),
    }


def _gumbel(i: Inputs) -> Outputs:
    named = {"index": i["index"], "targets": i["targets"]}
    noise = (i["seed"], i["draw"], i["position"])
    found = head_gumbel_st_embed(i["hidden"], i["weight"], i["codebook"], TAU, *noise, **named)
    return found.embed, found.ce


def _eager_gumbel(i: Inputs) -> Outputs:
    embed, _, ce = straight_through(i["hidden"] @ i["weight"].T, i)
    return embed, ce


def _gumbel_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    sampler = {"rows": dims["images"] * dims["tokens"], "codes": dims["codes"], "width": 8}
    return products(dims, size, mode) + gumbel_floor(sampler, size, 0)


# --- log-probabilities --------------------------------------------------------------------------


def _logprob(i: Inputs) -> Outputs:
    return linear_logprob(i["hidden"], i["weight"], i["targets"])


def _of_logits(logits: Tensor, targets: Tensor) -> Outputs:
    logp = widen(logits).log_softmax(-1)
    entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


def _eager_logprob(i: Inputs) -> Outputs:
    return _of_logits(i["hidden"] @ i["weight"].T, i["targets"])


def _trl() -> Run:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def run(i: Inputs) -> Outputs:
        # For 16-bit types it loops over the first axis: here images, in its trainer sequences.
        logits = (i["hidden"] @ i["weight"].T).unflatten(0, (i["images"], -1))
        logprob = selective_log_softmax(logits, i["targets"].view(i["images"], -1))
        with torch.no_grad():
            entropy = entropy_from_logits(logits)
        return logprob.flatten(), entropy.flatten()

    return run


def _guided_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    made = _head_inputs(make, dims, dtype)
    # Both branches are similar, as after training; guidance makes their difference large.
    return made | {"plain": made["hidden"] + 0.1 * torch.ones_like(made["hidden"])}


def _guided(i: Inputs) -> Outputs:
    return guided_linear_logprob(i["hidden"], i["plain"], i["weight"], i["targets"], GUIDANCE)


def _eager_guided(i: Inputs) -> Outputs:
    conditional, plain = (i[name] @ i["weight"].T for name in ("hidden", "plain"))
    return _of_logits(widen(plain) + GUIDANCE * (widen(conditional) - widen(plain)), i["targets"])


def _guided_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    n, d = dims["images"] * dims["tokens"], dims["width"]
    # The head is linear, so one product of mixed hidden states is enough. The other branch is
    # read, and backward writes its gradient.
    other = n * d * size * (1 if mode == "forward" else 2)
    return _softmax_floor(dims, size, mode) + Floor(other)


# --- losses on top ------------------------------------------------------------------------------


def _entropy(i: Inputs) -> Outputs:
    return (-linear_logprob(i["hidden"], i["weight"], i["targets"]).logprob.mean(),)


def _eager_entropy(i: Inputs) -> Outputs:
    return (F.cross_entropy(widen(i["hidden"] @ i["weight"].T), i["targets"]),)


def _liger_entropy() -> Run:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def run(i: Inputs) -> Outputs:
        return (liger_fused_linear_cross_entropy(i["hidden"], i["weight"], i["targets"]),)

    return run


def older(logp: Tensor, make: Make) -> Tensor:
    """Return log-probabilities of an older policy: most ratios are well within the clip, one in
    twenty is well outside, and none is so near that rounding decides."""
    near = 0.15 * (2 * make.uniform(*logp.shape) - 1)
    return logp - torch.where(make.uniform(*logp.shape) < 0.05, near.sign() * 0.5, near)


def _policy_inputs(make: Make, dims: Dims, dtype: torch.dtype) -> Inputs:
    made = _head_inputs(make, dims, dtype)
    logp = _eager_logprob(made)[0].view(dims["images"], dims["tokens"])
    return made | {
        "old": older(logp, make),
        "reference": older(logp, make),
        "advantage": make.floats(dims["images"]),
        "mask": make.uniform(*logp.shape) < 0.9,
    }


def _policy(i: Inputs) -> Outputs:
    logp = linear_logprob(i["hidden"], i["weight"], i["targets"]).logprob.view(i["mask"].shape)
    found = grpo_loss(logp, i["old"], i["advantage"], i["mask"], i["reference"], beta=BETA)
    return (found.loss,)


def token_losses(logp: Tensor, i: Inputs) -> Outputs:
    """GRPO's loss as trainers write it: mean over a sequence's tokens, then over sequences."""
    ratio, gain = (logp - i["old"]).exp(), i["advantage"][:, None]
    loss = -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
    if "sampled" in i:
        loss = loss * (i["old"] - i["sampled"]).exp().clamp(max=2.0)
    behind = i["reference"] - logp
    loss = loss + BETA * (behind.exp() - behind - 1)
    keep = i["mask"].to(loss.dtype)
    return (((loss * keep).sum(-1) / keep.sum(-1).clamp(min=1)).mean(),)


def _eager_policy(i: Inputs) -> Outputs:
    logp = _eager_logprob(i)[0].view(i["mask"].shape)
    return token_losses(logp, i)


def _liger_policy() -> Run:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=BETA, loss_type="grpo")

    def run(i: Inputs) -> Outputs:
        shape = i["mask"].shape
        found = loss(
            i["hidden"].view(*shape, -1),
            i["weight"],
            i["targets"].view(shape),
            i["mask"].to(torch.float32),
            i["advantage"],
            ref_per_token_logps=i["reference"],
            old_per_token_logps=i["old"],
        )
        return (found[0],)

    return run


def _policy_floor(dims: Dims, size: int, mode: Pass) -> Floor:
    n = dims["images"] * dims["tokens"]
    # Besides the head: two older log-probabilities and a mask per token, in either pass.
    return _softmax_floor(dims, size, mode) + Floor(9 * n, 0, 20 * n, 2 * n)


CASES = (
    Case(
        operator="head_gumbel_st_embed",
        sizes=SIZES,
        inputs=_gumbel_inputs,
        run=_gumbel,
        eager=_eager_gumbel,
        outputs=("embed", "ce"),
        trains=("hidden", "weight", "codebook"),
        graded=("embed", "ce"),
        floor=_gumbel_floor,
        bounds=BOUNDS,
        forgotten=("noise",),
    ),
    Case(
        operator="linear_logprob",
        sizes=SIZES,
        inputs=_head_inputs,
        run=_logprob,
        eager=_eager_logprob,
        outputs=("logprob", "entropy"),
        trains=("hidden", "weight"),
        graded=("logprob",),
        floor=_softmax_floor,
        bounds=BOUNDS,
        peers=(Peer("trl", "trl", _trl, on_cpu=True),),
    ),
    Case(
        operator="linear_logprob",
        variant="guided",
        sizes=SIZES,
        inputs=_guided_inputs,
        run=_guided,
        eager=_eager_guided,
        outputs=("logprob", "entropy"),
        trains=("hidden", "plain", "weight"),
        graded=("logprob",),
        floor=_guided_floor,
        bounds={torch.float32: 1e-4, torch.bfloat16: 6e-2},
    ),
    Case(
        operator="linear_logprob",
        variant="cross entropy",
        sizes=SIZES,
        inputs=_head_inputs,
        run=_entropy,
        eager=_eager_entropy,
        outputs=("loss",),
        trains=("hidden", "weight"),
        graded=("loss",),
        floor=_softmax_floor,
        bounds=BOUNDS,
        peers=(Peer("liger", "liger-kernel", _liger_entropy),),
    ),
    Case(
        operator="grpo_loss",
        variant="with its head",
        sizes=SIZES,
        inputs=_policy_inputs,
        run=_policy,
        eager=_eager_policy,
        outputs=("loss",),
        trains=("hidden", "weight"),
        graded=("loss",),
        floor=_policy_floor,
        bounds=BOUNDS,
        peers=(Peer("liger", "liger-kernel", _liger_policy),),
    ),
)
