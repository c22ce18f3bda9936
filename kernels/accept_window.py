"""The part of a windowed decoding step that follows sampling: it finds how far the draft was right
and what the next step runs (`echogen.engine.decoding.jacobi`). It handles only integers, in one
launch where PyTorch takes some thirty, which at a batch of one would be a good part of the step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from echogen.kernels import checks
from echogen.kernels.dispatch import launch, operator
from echogen.kernels.overlap import wait_for_earlier
from echogen.kernels.reference import accept_window as reference


@triton.jit
def _draft(codes_ptr, at, known, columns, inside):
    """See `reference.accept_window._drafted`."""
    back = tl.maximum((at - known + columns) // columns, 0) * columns
    source = tl.where(at < back, known - 1, at - back)
    return tl.load(codes_ptr + source, mask=inside, other=0)


# Triton would specialise these, which are 1 for one image and not for two.
@triton.jit(do_not_specialize=["tokens", "columns", "rows"])
def _accept_window_kernel(
    sampled_ptr, codes_ptr, drafted_ptr, done_ptr, steps_ptr, fed_ptr, position_ptr, places_ptr,
    origin_ptr, tokens, columns, rows,
    WINDOW: tl.constexpr, LANES: tl.constexpr, BRANCHES: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """One program per image."""
    wait_for_earlier(DEPENDENT)
    image, w = tl.program_id(0), tl.arange(0, LANES)
    inside, first = w < WINDOW, image * WINDOW
    codes_ptr += image * tokens
    done, steps = tl.load(done_ptr + image), tl.load(steps_ptr + image)
    start = tl.minimum(done, tokens - WINDOW)
    at, known = start + w, start + WINDOW
    sample = tl.load(sampled_ptr + first + w, mask=inside, other=0)
    old = tl.load(codes_ptr + at, mask=inside, other=0)
    fresh = inside & (at >= done)
    wrong = tl.min(tl.where(fresh & (sample != old), at, known - 1), 0)
    now = tl.where(done < tokens, wrong + 1, done)
    right = inside & (at >= done) & (at < now - 1)
    tl.store(drafted_ptr + image * tokens + at, tl.full([LANES], 1, tl.int1), mask=right)
    tl.debug_barrier()  # all reads of the codes above are done
    tl.store(codes_ptr + at, sample, mask=fresh)
    tl.debug_barrier()  # and the writes are visible to the reads below
    tl.store(steps_ptr + image, steps + (done < tokens).to(tl.int64))
    tl.store(done_ptr + image, now)
    start = tl.minimum(now, tokens - WINDOW)
    at = start + w
    drafts = _draft(codes_ptr, at, known, columns, inside)
    ran = _draft(codes_ptr, at - 1, known, columns, inside)
    # No draft is read from a place that is written: none of those was known.
    tl.store(codes_ptr + at, drafts, mask=inside & (at >= known))
    tl.store(fed_ptr + first + w, ran, mask=inside)
    tl.store(position_ptr + first + w, at, mask=inside)
    for branch in tl.static_range(BRANCHES):
        sequence = branch * tl.num_programs(0) + image
        origin = tl.load(origin_ptr + sequence)
        # A vector mask: the interpreter takes none that came from a scalar.
        place, moves = places_ptr + sequence * WINDOW + w, inside & (origin + w >= w)
        tl.store(place, at - 1, mask=moves)
        tl.store(place + rows, at, mask=moves)
        tl.store(place + 2 * rows, origin + at - 1, mask=moves)


def _launch(
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
    images, tokens = codes.shape
    window = len(sampled) // images
    launch(
        _accept_window_kernel, (images,), sampled, codes, drafted, done, steps, fed, position,
        places, origin, tokens, columns, places.shape[1], WINDOW=window,
        LANES=triton.next_power_of_2(window), BRANCHES=len(origin) // images, num_warps=1,
    )  # fmt: skip


@operator(
    "accept_window",
    _launch,
    mutates=("codes", "drafted", "done", "steps", "fed", "position", "places"),
)
def _accept_window(
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
    reference.accept_window(
        sampled, codes, drafted, done, steps, fed, position, places, origin, columns
    )


@_accept_window.register_fake
def _fake(sampled: Tensor, *_: Tensor | int) -> None:
    return None


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
    """Accept what each image's window of W codes sampled, and lay out the next window.

    Image n has ``done`` final codes, followed by drafts. The window sampled at positions s … s + W
    − 1, with s = min(done, T − W). A sample is right if all drafts before it are right, so the
    samples are final up to and including the first that differs from its draft (Song et al. 2021;
    Teng et al. 2024). Those after it are the next draft. Where no step has sampled yet, the draft
    is the code ``columns`` before, which is the one above in the image, or if there is none the
    last known code. An image with T final codes is left unchanged.

    All arguments but ``sampled``, ``origin`` and ``columns`` are written; all integers are int64.

    Args:
        sampled: [N·W], W below T, the samples of the last window, grouped by image.
        codes: [N, T], final codes and drafts.
        drafted: bool [N, T], set where a final code came from the draft.
        done: [N], number of final codes, 1 … T.
        steps: [N], incremented for each image that was not done.
        fed: [N·W], the codes that the next step runs, from one before the first position it
            samples.
        position: [N·W], the position that each of them samples.
        places: [3, S·W], for every row of the next step: its slot in its sequence's cache, the
            number of tokens in that cache that it sees, and its RoPE position. S is N, or 2N with
            guidance, the conditional sequences first.
        origin: [S], tokens of each sequence's prompt; below 0, its places are left unchanged.
        columns: codes per row of the image; with 1, a draft is the code to the left.

    Raises:
        ValueError: shapes, devices or strides that do not fit.
        TypeError: types that do not fit.
    """
    integers = {"sampled": sampled, "codes": codes, "done": done, "steps": steps, "fed": fed,
                "position": position, "places": places, "origin": origin}  # fmt: skip
    for name, tensor in integers.items():
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} is {tensor.dtype}; it must be int64")
    if drafted.dtype != torch.bool:
        raise TypeError(f"drafted is {drafted.dtype}; it must be bool")
    checks.check_shape("codes", codes, (None, None))
    checks.check_not_empty(codes=codes, sampled=sampled)
    images, tokens = codes.shape
    window = len(sampled) // images
    if len(sampled) % images or not 1 <= window < tokens:
        raise ValueError(
            f"sampled has {len(sampled)} codes for {images} images of {tokens}; it must have as "
            f"many for each, 1 … {tokens - 1}"
        )
    for name, tensor in {"sampled": sampled, "fed": fed, "position": position}.items():
        checks.check_shape(name, tensor, (images * window,))
    checks.check_shape("drafted", drafted, codes.shape)
    for name, tensor in {"done": done, "steps": steps}.items():
        checks.check_shape(name, tensor, (images,))
    checks.check_shape("origin", origin, (None,))
    if len(origin) not in (images, 2 * images):
        raise ValueError(
            f"origin has {len(origin)} sequences for {images} images; give 1 or 2 each"
        )
    checks.check_shape("places", places, (3, len(origin) * window))
    if columns < 1:
        raise ValueError(f"columns = {columns}; it must be at least 1")
    checks.check_contiguous(**integers, drafted=drafted)
    checks.check_same_device(**integers, drafted=drafted)
    _accept_window(sampled, codes, drafted, done, steps, fed, position, places, origin, columns)
