"""Plain-torch step of windowed decoding: the oracle of every test and the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor


def accept_window(
    sampled: Tensor,
    codes: Tensor,
    drafted: Tensor,
    done: Tensor,
    steps: Tensor,
    fed: Tensor,
    position: Tensor,
    places: Tensor,
    origin: Tensor,
    columns: int,
) -> None:
    """See `echogen.kernels.accept_window`."""
    images, tokens = codes.shape
    w = torch.arange(len(sampled) // images, device=codes.device)
    width, last = len(w), tokens - len(w)
    before, new = done[:, None], sampled.view(images, width)
    start = before.clamp(max=last)
    at, known = start + w, start + width
    fresh, old = at >= before, codes.gather(1, at)
    # The place of the first sample that differs from its draft, or else of the window's last.
    wrong = torch.where(fresh & (new != old), at, known - 1).amin(1, keepdim=True)
    now = torch.where(before < tokens, wrong + 1, before)
    everywhere = torch.arange(tokens, device=codes.device)
    drafted |= (everywhere >= before) & (everywhere < now - 1)
    codes.scatter_(1, at, torch.where(fresh, new, old))
    steps += (before < tokens)[:, 0]
    done.copy_(now[:, 0])
    start = now.clamp(max=last)
    at = start + w
    drafts = _drafted(codes, at, known, columns)
    ran = _drafted(codes, at - 1, known, columns)
    codes.scatter_(1, at, drafts)
    fed.copy_(ran.flatten())
    position.copy_(at.flatten())
    slots = (at - 1).repeat(len(origin) // images, 1)
    moved = torch.stack((slots, slots + 1, slots + origin[:, None]))
    kept = places.view(3, len(origin), width)
    kept.copy_(torch.where(origin[:, None] >= 0, moved, kept))


def _drafted(codes: Tensor, at: Tensor, known: Tensor, columns: int) -> Tensor:
    """The codes at places [N, W]. Where a code is not known yet, the one ``columns`` before, or as
    many times ``columns`` as reach a known one, or else the last one known."""
    back = torch.div(at - known + columns, columns, rounding_mode="floor").clamp(min=0) * columns
    source = torch.where(at < back, known - 1, at - back)
    return codes.gather(1, source)
