"""Plain-torch guided sampling: the oracle of every test and the CPU path. Rows are taken in chunks,
so that memory is bounded as it is in the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.kernels.reference import philox

CHUNK = 256
COLDEST, SMALLEST = 1e-6, 1e-10
"""Lower bounds of a temperature and a top_p in a tensor: 0 would make 0/0, or keep nothing."""


def branches(logits: Tensor, guided: str) -> tuple[Tensor, Tensor]:
    """Conditional and unconditional rows of the logits, as views; the same rows where there is no
    guidance."""
    if guided == "interleaved":
        return logits[0::2], logits[1::2]
    if guided == "blocked":
        return logits[: len(logits) // 2], logits[len(logits) // 2 :]
    return logits, logits


def mixed(cond: Tensor, uncond: Tensor, cfg: Tensor | None) -> Tensor:
    """u + s·(c − u) in at least float32, and c itself where s is 1; −inf where either branch is. s
    is [1] or [N]; if it is None, c alone."""
    cond = cond if cond.dtype == torch.float64 else cond.float()
    if cfg is None:
        return cond
    uncond = uncond.to(cond.dtype)
    dead = (cond == float("-inf")) | (uncond == float("-inf"))
    cfg = cfg.view(-1, 1)
    # u + 1·(c − u) equals c only up to rounding.
    moved = torch.where(cfg == 1, cond, uncond + cfg * (cond - uncond))
    return moved.masked_fill(dead, float("-inf"))


def truncated(scores: Tensor, top_k: int, top_p: Tensor | None) -> Tensor:
    """Scores [N, V] with everything outside top-k, then top-p ([1] or [N]), at −inf. Codes that tie
    with the last one kept are kept."""
    if 0 < top_k < scores.shape[-1]:
        floor = scores.topk(top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < floor, float("-inf"))
    if top_p is not None:
        ordered = scores.sort(-1, descending=True).values
        mass = (ordered - ordered[:, :1]).exp().cumsum(-1, dtype=torch.float64)
        short = mass < top_p.clamp(min=SMALLEST).view(-1, 1) * mass[:, -1:]
        last = short.sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        floor = ordered.gather(1, last)
        scores = scores.masked_fill(scores < floor, float("-inf"))
    return scores


def _taken(numbers: Tensor, rows: slice) -> Tensor:
    """Select the given rows of numbers [N]; [1] holds for all rows."""
    return numbers if len(numbers) == 1 else numbers[rows]


def cfg_sample(
    logits: Tensor,
    seed: Tensor,
    draw: Tensor,
    position: Tensor,
    table: Tensor | None,
    cfg: Tensor | None,
    temperature: Tensor | None,
    top_k: int,
    top_p: Tensor | None,
    guided: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token, logprob, embed); see `echogen.kernels.sampling`. Greedy without temperature."""
    cond, uncond = branches(logits, guided)
    token = torch.empty(len(draw), dtype=torch.int64, device=logits.device)
    logprob = torch.zeros(len(draw), dtype=torch.float32, device=logits.device)
    for i in range(0, len(draw), CHUNK):
        rows = slice(i, i + CHUNK)
        x = mixed(cond[rows], uncond[rows], None if cfg is None else _taken(cfg, rows))
        if temperature is None:
            token[rows] = x.argmax(-1)
            none = x.isnan().any(-1) | (x == float("-inf")).all(-1)
            logprob[rows] = torch.where(none, torch.nan, 0.0)
            continue
        scale = 1 / _taken(temperature, rows).clamp(min=COLDEST)
        scores = truncated(
            x * scale.view(-1, 1), top_k, None if top_p is None else _taken(top_p, rows)
        )
        key = _taken(seed, rows).view(-1, 1)
        noise = philox.gumbel(key, draw[rows], position[rows], logits.shape[1])
        token[rows] = (scores + noise).argmax(-1)
        logprob[rows] = scores.log_softmax(-1).gather(1, token[rows, None])[:, 0].float()
    return token, logprob, logits.new_empty(len(draw), 0) if table is None else table[token]
