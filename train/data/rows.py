"""Assign a batch's trees to rows: with as little padding as possible, and on a CPU without rows
longer than they are worth.

All rows are as long as the fullest. So trees are dealt evenly, the longest first, each to the row
with the fewest tokens (the LPT rule: Graham 1969, "Bounds on Multiprocessing Timing Anomalies"),
with one tree per row, two, three and so on; the estimated cost of a pass decides between these.
Filling rows of a given length would waste the end that the last tree does not fit into: at 576
codes a tree has 600 to 670 tokens, so three fit into a row of 2048, of which a tenth is padding,
while four in a row of 2560 leave a hundredth.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from echogen.engine.flex import BLOCK

ROW_TOKENS = 4096
"""The longest row with attention in blocks, unless a tree is longer: the blocks are computed from a
dense mask of each row, a few bytes for each pair of positions."""
DENSE = 880
"""The length of a row at which attention with a dense mask, which includes padding and other trees,
takes as long as the rest of a pass. By arithmetic it is six times the width (1152 in the recipe
`tiny`), but softmax and mask also move memory, and steps of `tiny` in rows of two and of three
trees give 880 (fitted once, on one thread of a Zen 4)."""
ALIKE = 1.02
"""Among costs within this factor of the least, the shortest rows are taken: their masks are
smaller, and similar batches get the same shape more often, each of which is compiled for."""

Rows = list[list[int]]


def dealt(lengths: Sequence[int], count: int) -> tuple[Rows, int]:
    """Deal trees of these lengths into ``count`` rows: each row's trees by number, and the length
    of the fullest row."""
    rows: Rows = [[] for _ in range(count)]
    loads = [(0, r) for r in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, r = loads[0]
        rows[r].append(i)
        heapq.heapreplace(loads, (load + lengths[i], r))
    return rows, max(loads)[0]


def cheapest(lengths: Sequence[int], blocks: bool) -> tuple[Rows, int]:
    """The rows in which a pass over trees of these lengths is cheapest, and their length.

    Args:
        blocks: attention skips the empty blocks of its mask, as on a GPU: only the number of
            positions counts, and rows are a whole number of blocks long. Otherwise it runs over all
            pairs in a row.
    """
    step = BLOCK if blocks else 1
    most = max(ROW_TOKENS if blocks else DENSE, -(-max(lengths) // step) * step)
    total, found = sum(lengths), list[tuple[float, Rows, int]]()
    for count in dict.fromkeys(-(-len(lengths) // each) for each in range(1, len(lengths) + 1)):
        rows, fullest = dealt(lengths, count)
        length = -(-fullest // step) * step
        if length > most:
            break
        cost = count * length * (1.0 if blocks else 1 + length / DENSE)
        found.append((cost, rows, length))
        if cost <= ALIKE * total:  # no cost is below the number of tokens
            break
    least = min(cost for cost, _, _ in found)
    return next((rows, length) for cost, rows, length in found if cost <= ALIKE * least)
