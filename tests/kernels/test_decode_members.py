"""The order of sequences by prefix, against sorting. Attention in that order:
test_decode_attention."""

from __future__ import annotations

import pytest
import torch

from echogen.kernels import decode_members as module
from echogen.kernels.decode_members import decode_members


def shapes(sequences, heads, prefixes, device):
    """A query and prefix keys of one head, of which only shapes count."""
    query = torch.zeros(sequences, heads, 16, device=device)
    return query, torch.zeros(prefixes, 1, 4, 16, device=device)


@pytest.mark.parametrize("scanned", [4, 1024])
@pytest.mark.parametrize("heads", [1, 5])
def test_every_member_is_in_one_tile_of_its_prefix(heads, scanned, monkeypatch, generator, device):
    monkeypatch.setattr(module, "SCANNED", scanned)
    groups = torch.randint(-1, 4, (75,), generator=generator)
    order = decode_members(groups.to(device), *shapes(75, heads, 3, device))
    by_prefix = sorted((g, b) for b, g in enumerate(groups.tolist()) if 0 <= g < 3)
    assert order[: len(by_prefix)].tolist() == [b for _, b in by_prefix]
    tiles = [t for t in order[75:].view(-1, 3).tolist() if t[1] < t[2]]
    covered = [(prefix, place) for prefix, begin, end in tiles for place in range(begin, end)]
    assert covered == [(g, place) for place, (g, _) in enumerate(by_prefix)]
    assert max(end - begin for _, begin, end in tiles) <= 16 // heads


def test_opcheck(device):
    # Entries that nothing continues are not written; those of one full tile all are.
    full = torch.zeros(16, dtype=torch.int64, device=device)
    torch.library.opcheck(torch.ops.echogen.decode_members.default, (full, 1, 15))


def test_bad_arguments(device):
    rows = torch.ones(2, dtype=torch.int64, device=device)
    query, keys = shapes(2, 4, 3, device)
    for groups, match in [
        (rows[:1], "groups has shape"),
        (rows.float(), r"groups is torch\.float32"),
        (rows.repeat_interleave(2)[::2], "groups has strides"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            decode_members(groups, query, keys)
    with pytest.raises(ValueError, match="34 heads and keys 1"):
        decode_members(rows, torch.zeros(2, 34, 16, device=device), keys)
