"""Plain-torch log-probability and entropy of tokens under a linear head, chunk by chunk of rows:
the CPU path, and the oracle of what the kernels do with a chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.kernels.head import HeadGradients, logits_in_chunks
from echogen.kernels.reference.precision import wide_type


def _at(logp: Tensor, targets: Tensor) -> Tensor:
    """Column ``targets`` of each row: 0 where negative, NaN where there is no such column."""
    columns = logp.shape[1]
    found = logp.gather(1, targets.clamp(0, columns - 1)[:, None])[:, 0]
    found = torch.where(targets < columns, found, torch.nan)
    return torch.where(targets < 0, 0.0, found)


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, log-sum-exp), each [N]; see `echogen.kernels.logprob`."""
    logprob = torch.empty(len(hidden), dtype=wide_type(hidden.dtype), device=hidden.device)
    entropy, lse = torch.empty_like(logprob), torch.empty_like(logprob)
    for rows, logits in logits_in_chunks(hidden, weight, bias, chunk):
        scaled = logits.to(lse.dtype) / temperature
        top = scaled.amax(-1, keepdim=True)
        log_total = scaled.sub_(top).logsumexp(-1, keepdim=True)
        lse[rows] = (top + log_total)[:, 0]
        # Not scaled − lse: if logits share a large offset, it rounds the logarithm away.
        logp = scaled.sub_(log_total)
        logprob[rows] = _at(logp, targets[rows])
        entropy[rows] = torch.special.entr(logp.exp()).sum(-1)
    return logprob, entropy, lse


def backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    d_logprob: Tensor,
    d_entropy: Tensor,
    needs: tuple[bool, bool, bool],
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where not needed."""
    grads = HeadGradients(hidden, weight, needs, -(-len(hidden) // chunk))
    for rows, logits in logits_in_chunks(hidden, weight, bias, chunk):
        logp = logits.to(lse.dtype) / temperature - lse[rows, None]
        t, d = targets[rows], d_logprob[rows]
        known = torch.where((t < len(weight)) | (d == 0), d, torch.nan)
        d_target = torch.where(t < 0, 0.0, known)[:, None]
        finite = logp.clamp(min=-1e4)  # 0·log 0 is 0
        grad = logp.exp().mul_(-d_target - d_entropy[rows, None] * (finite + entropy[rows, None]))
        place = targets[rows, None].clamp(0, logits.shape[1] - 1)
        grad.scatter_add_(1, place, d_target)
        grads.add(rows, logits.copy_(grad.div_(temperature)))
    return grads.result()
