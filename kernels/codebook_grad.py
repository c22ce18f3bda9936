"""The gradient of a codebook: the gradients of the rows chosen from it, summed by code.

Rows are first sorted by their code, so that one program computes a code's sum, always in the same
order; atomic additions would give another sum in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels.dispatch import launch, operator
from echogen.kernels.reference import codebook_grad as reference
from echogen.kernels.reference.precision import wide_type

SEGMENT = 256  # rows of one code to sum at a time: most tokens may have one code, background


@triton.jit
def _codebook_grad_kernel(
    d_embed_ptr, order_ptr, starts_ptr, out_ptr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """One code: the sum over its rows, always in the same order, so that a rerun is identical."""
    code, c = tl.program_id(0), tl.arange(0, PADDED)
    start, end = tl.load(starts_ptr + code), tl.load(starts_ptr + code + 1)
    total = tl.zeros([PADDED], tl.float32)
    for first in range(start, end, SEGMENT):
        i = first + tl.arange(0, SEGMENT)
        row = tl.load(order_ptr + i, mask=i < end, other=0)
        keep = (i < end)[:, None] & (c < WIDTH)[None, :]
        place = row[:, None] * WIDTH + c[None, :]
        total += tl.sum(tl.load(d_embed_ptr + place, mask=keep, other=0.0).to(tl.float32), 0)
    tl.store(out_ptr + code * WIDTH + c, total, mask=c < WIDTH)


def _launch(d_embed: Tensor, index: Tensor, codes: int) -> Tensor:
    if d_embed.dtype == torch.float64:  # not a type to train in: kernels calculate in float32
        return reference.codebook_grad(d_embed, index, codes)
    width = d_embed.shape[1]
    padded = max(8, triton.next_power_of_2(width))
    ordered, order = index.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(codes + 1, device=index.device))
    out = torch.empty(codes, width, dtype=torch.float32, device=d_embed.device)
    launch(
        _codebook_grad_kernel, (codes,), d_embed, order, starts, out,
        WIDTH=width, PADDED=padded, SEGMENT=min(SEGMENT, 4096 // padded), num_warps=4,
    )  # fmt: skip
    return out


@operator("codebook_grad", _launch)
def codebook_grad(d_embed: Tensor, index: Tensor, codes: int) -> Tensor:
    """Compute the gradient of a codebook from those of the rows chosen from it. `gumbel_st_embed`
    and its head form call this in backward, with arguments that they have checked.

    Args:
        d_embed: float [N, C], contiguous, the gradient of the rows.
        index: int64 [N], the code of each row; rows without a valid code are ignored.
        codes: number of codes in the codebook.

    Returns:
        float32 [codes, C] (float64 for float64): for each code, the sum over its rows, in order.
    """
    return reference.codebook_grad(d_embed, index, codes)


@codebook_grad.register_fake
def _fake(d_embed: Tensor, index: Tensor, codes: int) -> Tensor:
    return d_embed.new_empty(codes, d_embed.shape[1], dtype=wide_type(d_embed.dtype))
