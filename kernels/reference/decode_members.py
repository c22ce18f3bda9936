"""Plain-torch order of sequences by prefix: the oracle of every test and the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_members(groups: Tensor, prefixes: int, members: int) -> Tensor:
    """int32 [B + 3·(B // members + P)]; see `echogen.kernels.decode_members`. Entries that belong
    to no prefix are 0."""
    sequences = len(groups)
    slots = sequences // members + prefixes
    order, tiles = torch.zeros(sequences, dtype=torch.int32), torch.zeros(slots, 3).int()
    start, slot = 0, 0
    for prefix in range(prefixes):
        mine = (groups.cpu() == prefix).nonzero()[:, 0]
        end = start + len(mine)
        order[start:end] = mine
        stop = slots if prefix == prefixes - 1 else end // members + prefix + 1
        first = start + members * torch.arange(stop - slot)
        bounds = (torch.full_like(first, prefix), first, first + members)
        tiles[slot:stop] = torch.stack([bounds[0], *(b.clamp(max=end) for b in bounds[1:])], 1)
        start, slot = end, stop
    return torch.cat((order, tiles.flatten())).to(groups.device)
