"""The linear head in chunks of rows, so that logits of all rows never exist.

The library (cuBLAS on CUDA) computes the matrix products, into one reused buffer; each operator
does its own work on a chunk's logits. This is plain torch, which launchers and references share.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from echogen.kernels import checks
from echogen.kernels.reference.precision import wide_type

BUFFER_BYTES = 64 << 20
MOST_ROWS = 4096


def chunk_rows(rows: int, columns: int, width: int, itemsize: int) -> int:
    """How many rows to take at once if the caller does not say.

    Fewer rows take less memory, but each chunk reads and writes the float32 sum of the weight's
    gradient [V, D] once. On an H200 this costs as much as about 184 rows of a chunk's four products
    in bf16 (18% at 1024 rows, 4.5% at 4096). So the buffer may grow to the size of that sum, which
    backward holds anyway (4·D / itemsize rows), or to 64 MiB if the head is small, and to at most
    4096 rows. Janus-Pro's head (V = 16,384, D = 2048) gets 4096 rows in bf16 and 2048 in float32.
    The rows are then divided evenly, in multiples of 128.
    """
    at_once = max(BUFFER_BYTES // (columns * itemsize), 4 * width // itemsize)
    at_once = max(128, min(MOST_ROWS, at_once // 128 * 128))
    even = -(-rows // -(-rows // at_once))
    return min(rows, -(-even // 128) * 128)


def resolve_chunk(chunk: int | None, hidden: Tensor, weight: Tensor) -> int:
    """Return ``chunk``, at most all rows, or for None the choice of `chunk_rows`.

    Raises:
        ValueError: below 1.
    """
    if chunk is None:
        return chunk_rows(len(hidden), len(weight), weight.shape[1], hidden.element_size())
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}; it must be at least 1 row")
    return min(chunk, len(hidden))


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check that hidden [N, D], weight [V, D] and bias [V] fit: one float type, contiguous.

    Raises:
        ValueError, TypeError: as in `echogen.kernels.checks`.
    """
    checks.check_floats(hidden=hidden, weight=weight, bias=bias)
    checks.check_shape("hidden", hidden, (None, None))
    checks.check_shape("weight", weight, (None, hidden.shape[1]))
    checks.check_not_empty(hidden=hidden, weight=weight)
    if bias is not None:
        checks.check_shape("bias", bias, (len(weight),))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and hidden {hidden.dtype}; cast one of them")
    checks.check_contiguous(hidden=hidden, weight=weight, bias=bias)


def rows_of(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """These rows of an argument that may be left out."""
    return None if tensor is None else tensor[rows]


def logits_in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their logits in hidden's type) chunk by chunk. The logits are a view of one
    buffer, which the caller may overwrite until it takes the next chunk."""
    buffer = torch.empty(chunk, len(weight), dtype=hidden.dtype, device=hidden.device)
    for first in range(0, len(hidden), chunk):
        rows = slice(first, min(first + chunk, len(hidden)))
        logits = buffer[: rows.stop - first]
        if bias is None:
            torch.mm(hidden[rows], weight.T, out=logits)
        else:
            torch.addmm(bias, hidden[rows], weight.T, out=logits)
        yield rows, logits


class HeadGradients:
    """Gradients of hidden, weight and bias from gradients of logits, summed chunk by chunk in
    their order, in float32; only those that are needed.

    Args:
        chunks: number of chunks to come. A single one needs no sum, so the library's product is
            written in the weight's own type.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], chunks: int
    ) -> None:
        kept = hidden.dtype if chunks == 1 else wide_type(hidden.dtype)
        self._hidden, self._weight = hidden, weight
        self._needs, self._first = needs, True
        self._d_hidden = torch.empty_like(hidden) if needs[0] else hidden.new_empty(0)
        self._d_weight = torch.empty_like(weight, dtype=kept) if needs[1] else hidden.new_empty(0)
        bias_shape = len(weight) if needs[2] else 0
        self._d_bias = torch.zeros(bias_shape, dtype=wide_type(hidden.dtype), device=hidden.device)

    def add(self, rows: slice, d_logits: Tensor) -> None:
        """Add one chunk's share."""
        if self._needs[0]:
            torch.mm(d_logits, self._weight, out=self._d_hidden[rows])
        if self._needs[1]:
            _add_product(self._d_weight, d_logits.T, self._hidden[rows], not self._first)
        if self._needs[2]:
            self._d_bias += d_logits.sum(0, dtype=self._d_bias.dtype)
        self._first = False

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients in the type of the arguments; empty where not needed."""
        dtype = self._hidden.dtype
        return self._d_hidden, self._d_weight.to(dtype), self._d_bias.to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """total (+)= a @ b, in total's memory, without rounding to a narrower type on the way."""
    if total.dtype != a.dtype and (a.device.type == "cpu" or torch.version.hip):
        # Only CUDA multiplies half-precision matrices into float32.
        a, b = a.to(total.dtype), b.to(total.dtype)
    if accumulate and total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    elif accumulate:
        torch.addmm(total, a, b, total.dtype, out=total)
    elif total.dtype == a.dtype:
        torch.mm(a, b, out=total)
    else:
        torch.mm(a, b, total.dtype, out=total)


def fake_gradients(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of `HeadGradients.result`, for fake rules."""
    return (
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if need_weight else hidden.new_empty(0),
        hidden.new_empty(len(weight) if need_bias else 0),
    )
