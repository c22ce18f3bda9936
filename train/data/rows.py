"""How many rows a batch's trees are laid into, and which goes where: as little padding as there can
be, and on a CPU no longer rows than they are worth.

A row is as long as the fullest. So trees are dealt evenly, the longest first, each to the row that
has the least (the LPT rule: Graham 1969, "Bounds on Multiprocessing Timing Anomalies"), for one
tree a row, two, three and so on; what a pass would cost decides. Filling rows of a given length
leaves what a last tree does not fit into: at 576 codes a tree has 600 to 670 tokens, three to a row
of 2048, and a tenth of it is padding, where four to a row of 2560 leave a hundredth.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from echogen.engine.flex import BLOCK

ROW_TOKENS = 4096
"""The longest row that is attended to in blocks, unless a tree is longer: the blocks are found from
a dense mask of each row, a few bytes for each pair of its places."""
DENSE = 880
"""The length of a row at which attention over a dense mask, to padding and to other trees too,
takes as long as all the rest of a pass. By arithmetic six times the width (1152 in the recipe
`tiny`); softmax and mask pass memory besides, and steps of `tiny` in rows of two and of three trees
say 880 (fitted once, on one thread of a Zen 4)."""
ALIKE = 1.02
"""Of costs as near as this to the least, the shortest rows are taken: their masks are smaller, and
batches of a kind get one shape more often, each of which is compiled for."""

Rows = list[list[int]]


def dealt(lengths: Sequence[int], count: int) -> tuple[Rows, int]:
    """Trees of these lengths in ``count`` rows: which, by number, and what the fullest holds."""
    rows: Rows = [[] for _ in range(count)]
    loads = [(0, r) for r in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, r = loads[0]
        rows[r].append(i)
        heapq.heapreplace(loads, (load + lengths[i], r))
    return rows, max(loads)[0]


def cheapest(lengths: Sequence[int], blocks: bool) -> tuple[Rows, int]:
    """The rows that a pass over trees of these lengths is cheapest in, and how long they are.

    Args:
        blocks: attention skips the empty blocks of its mask, as on a GPU: all that counts are the
            places, and rows are whole blocks long. Otherwise it runs over all pairs of a row.
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
        if cost <= ALIKE * total:  # none is cheaper than its tokens
            break
    least = min(cost for cost, _, _ in found)
    return next((rows, length) for cost, rows, length in found if cost <= ALIKE * least)
