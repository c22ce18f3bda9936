"""Keyed noise: every sampler's randomness as a pure function of (seed, draw, position, column).

Noise is therefore never stored, and is the same in forward and backward, in any batch order or
batch size, and whether positions are evaluated one by one or in parallel.
"""

from __future__ import annotations

from torch import Tensor

from echogen.kernels.reference import philox as reference


def gumbel_noise(
    seed: int, draw: Tensor, position: Tensor, columns: int, stream: int = 0
) -> Tensor:
    """Standard Gumbel noise, one row for each (draw, position).

    Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the
    seed as key and the words (column // 4, position, draw, stream) as counter. A word x becomes
    ``u = ((x >> 9) + 1/2)·2⁻²³``, strictly inside (0, 1), and ``g = −log(−log u)``.

    Args:
        seed: 64-bit key.
        draw: int64 [...], in [0, 2³²): unique to a sample over the whole run; not its place in
            the batch, and not the data set's index (noise would repeat every epoch).
        position: int64, broadcastable to draw's shape, in [0, 2³²): which token of the sample.
        columns: width of a row (the codebook).
        stream: separates uses that share the other words.

    Returns:
        float32 [..., columns].

    Raises:
        ValueError: ``columns`` below 1.
    """
    if columns < 1:
        raise ValueError(f"columns = {columns}; it must be at least 1")
    return reference.gumbel(seed, draw, position, columns, stream)
