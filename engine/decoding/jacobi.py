"""Drawing several codes per step, and drawing exactly what one code per step draws.

The noise of a code is keyed by (seed, draw, position), so a drawing is a function of its prompt:
``z_t = argmax(ℓ_t(z_<t)/temperature + g_t)``. One forward over a draft of the next W codes gives
every ``ℓ_t`` at once, and each that has only correct codes before it gives the correct next code.
So a step accepts the draft as far as it agrees with what the step itself samples, and one code
more; the samples after that are the next draft. This is Jacobi iteration of the equations above
(Song et al., "Accelerating feedforward computation via parallel nonlinear equation solving", ICML
2021; with sampling: Teng et al., "Accelerating auto-regressive text-to-image generation with
training-free speculative Jacobi decoding", 2024). Because the noise does not change between steps,
it needs neither an acceptance rule nor a correction: the fixed point is the sequential drawing.

Every step yields a code, even from a draft that is entirely wrong; there is no fallback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from echogen.engine.cpu.packed import PackedTransformer
from echogen.engine.decoding.decode import Decoder, Progress, check_drawing, open_windows
from echogen.engine.decoding.sampler import Sampler
from echogen.engine.gpu.device import DeviceTransformer
from echogen.engine.gpu.windows import DeviceWindows
from echogen.engine.layout import Layout
from echogen.engine.ranges import span

Method = Literal["auto", "sequential", "jacobi"]
"""How a drawing runs: one code per step, several, or whichever is faster (see ``wins``)."""

Draft = Literal["above", "left"]
"""The draft for a position that no step has sampled yet: the code above it or left of it."""


MOST_ROWS = 8
"""Most rows (two per image with guidance) for which windows are faster (see ``default_window``).
More rows fill the matrix products by themselves, and a drawing takes as many steps as its slowest
image."""


def default_window(rows: int) -> int:
    """Codes W of a window for this many rows (two per image with guidance).

    The table gives the speed-up over code by code, the choice in bold: the bundled model, 24 test
    layouts, temperature 1, one thread of a busy AMD EPYC (Zen 3), without guidance and with CFG 5.

    | images | W = 8          | 16             | 32         |
    |--------|----------------|----------------|------------|
    | 1      | 1.35, 1.35     | **1.68, 1.76** | 1.47, 1.52 |
    | 2      | 1.60, **1.63** | **1.51**, 1.57 | 1.48, 1.30 |
    | 4      | **1.64, 1.59** | 1.82, 1.33     | 1.37, 0.89 |
    | 8      | **1.34**, 1.25 | 1.27, 1.03     | 1.06, 0.82 |

    A faster EPYC (Zen 5) gains less: for one image 1.22 to 1.26 times with W = 16, and with CFG 5
    1.14 to 1.21 times, where W = 8 gave 1.18 to 1.27. The draft "left" takes up to 0.8 steps more
    than "above".
    (`ECHOGEN_NATIVE=0 echogen bench engine --mode jacobi --layouts 24 --temperature 1 --batch 4
    --window 8 --window 16 --window 32`, also with ``--draft left``.)
    """
    return 16 if rows <= 2 else 8


MOST_COVER = 0.45
"""Largest share of the canvas in boxes at which drafts are good enough in float32; ShapesWorld's
test layouts stay below. Crowded layouts, 0.6 and more, take 20 to 23 steps instead of 64, each as
long as two or three of those: they are drawn 1.13 to 1.28 times as fast as code by code on Zen 3,
and 0.79 to 0.86 times on Zen 5 (`bench/results/jacobi-tiny-cpu.json` at 38d6be274 and bc84d3fb9, by
PyTorch's operations)."""


def foreseeable(layout: Layout, dtype: torch.dtype) -> bool:
    """Whether enough of a picture is drafted correctly for windows to be faster. In float32,
    measurements say so where the layout leaves some ground free. In bfloat16, where even one row
    goes through blocked products (`PackedLinear`), an image of a test layout is drawn 2.4 to 3.0
    times faster, and a crowded one 1.3 to 2.0 times (``--dtype bfloat16 --layouts 40``; with CFG at
    W = 8)."""
    return dtype == torch.bfloat16 or covered(layout) <= MOST_COVER


def wins(model: Decoder, dtype: torch.dtype, layouts: Sequence[Layout], guided: bool) -> bool:
    """Whether windows draw ``layouts``, one image each, faster than single codes: they do on
    weights packed for PyTorch's operations, up to ``MOST_ROWS`` rows, if all are ``foreseeable``.

    In C++, a step of one row draws fewer codes than one of sixteen, but is faster in proportion:
    windows draw an image of the bundled model 1.01 times as fast, and 0.72 times with CFG 5
    (`bench/results/jacobi-tiny-cpu.json`). With a model of 110 M parameters, whose weights fit no
    cache, it would be 2.2 times if the drafts were as good (`bench/results/window-100m-cpu.json`);
    no such model has been trained, so this is untested. On a GPU, where one picture at a time
    should gain most, nothing has been timed, so windows run there only on request
    (``decoding="jacobi"``)."""
    if len(layouts) * (1 + guided) > MOST_ROWS or not isinstance(model, PackedTransformer):
        return False
    return all(foreseeable(layout, dtype) for layout in layouts)


def columns_of(tokens: int) -> int:
    """Codes in a row of a square image of ``tokens`` codes."""
    return round(tokens**0.5)


def covered(layout: Layout) -> float:
    """Share of the canvas inside boxes, by the centres of 64 × 64 cells."""
    centres = (torch.arange(64) + 0.5) / 64
    inside = torch.zeros(64, 64, dtype=torch.bool)
    for x1, y1, x2, y2 in (o.box for o in layout.objects):
        across, down = ((a <= centres) & (centres < b) for a, b in ((x1, x2), (y1, y2)))
        inside |= down[:, None] & across
    return float(inside.double().mean())


@dataclass(frozen=True)
class WindowDrawing:
    """What `decode_windows` drew, and how.

    Attributes:
        codes: int64 [N, T].
        drafted: bool [N, T]; the codes accepted from a draft. Each of the others cost a step.
        steps: forwards each image needed, including the prompt's: T − its drafted codes.
    """

    codes: Tensor
    drafted: Tensor
    steps: list[int]


class Drafted:
    """One image in progress: its final codes, and a draft after them.

    Args:
        drawn: the codes drawn so far, at least one.
        tokens: codes T of the image.
        columns: how far back the draft looks where no step has sampled yet: a row of the image for
            the code above, 1 for the code left of it.

    Attributes:
        codes: ``drawn``, the codes accepted since, and the draft.
        done: how many of ``codes`` are final.
        drafted: whether each position's code was accepted from a draft.
        steps: forwards it has needed, including the prompt's.
    """

    def __init__(self, drawn: list[int], tokens: int, columns: int) -> None:
        self.codes, self.done, self.steps = list(drawn), len(drawn), 1
        self.drafted = [False] * tokens
        self._columns = columns

    def ahead(self, width: int) -> tuple[int, list[int]]:
        """Return the next window: the position of the first code it samples, and the ``width``
        codes to run for it, which begin one position earlier. If fewer than ``width`` codes are
        left, it begins earlier and runs final codes again."""
        start, codes = min(self.done, len(self.drafted) - width), self.codes
        while len(codes) < start + width:
            codes.append(codes[-self._columns if len(codes) >= self._columns else -1])
        return start, codes[start - 1 : start - 1 + width]

    def take(self, start: int, samples: list[int]) -> None:
        """Take what a step sampled from position ``start`` on, given the codes before each."""
        if self.done == len(self.drafted):
            return
        self.steps += 1
        codes, begin = self.codes, self.done
        right = True
        for position in range(begin, start + len(samples)):
            sample = samples[position - start]
            if right:
                self.done = position + 1
                right = codes[position] == sample
            codes[position] = sample
        for position in range(begin, self.done - 1):
            self.drafted[position] = True


@torch.inference_mode()
def decode_windows(
    model: Decoder,
    code_table: Tensor,
    prompts: list[list[int]],
    sampler: Sampler,
    pad: int,
    window: int | None = None,
    draft: Draft = "above",
    progress: Progress | None = None,
) -> WindowDrawing:
    """Draw one image for each prompt, several codes per step.

    The codes are those of `decode_image` unless two are within rounding of each other: products
    with a different number of rows round differently (as between two batch sizes). None of 1,500
    drawings of 64 codes in float32, and none of 300 in bfloat16, differed (``identical`` of
    `echogen bench engine --mode jacobi`). On packed weights the codes are those of ``window=1``
    whatever the window, to the last bit (`PackedWindows`), and in C++ those of `decode_image`.

    Each image advances by its own accepted codes: waiting for the image that accepts the fewest, a
    different one each time, would cost all of them its steps. An image that is done, or has fewer
    codes left than a window, runs codes again that it already has; they do not change.

    Args:
        model, code_table, prompts, sampler, pad: as for `decode_image`.
        window: codes W run per step; None: ``default_window``.
        draft: the draft for positions that no step has sampled yet.
        progress: called after every step with the number of codes of the image with the fewest.

    Raises:
        LayoutError: a prompt that leaves no room for the image.
        ValueError: a window below 1, an unknown draft, or a number of prompts that does not match
            the images that the sampler draws.
    """
    check_drawing(model, prompts, sampler)
    guided, tokens = sampler.sampling.guided, model.config.image_tokens
    window = default_window(len(prompts)) if window is None else window
    if window < 1:
        raise ValueError(f"window = {window}; it must be at least 1")
    if draft not in ("above", "left"):
        raise ValueError(f"draft = {draft!r}; choose 'above' or 'left'")
    columns = columns_of(tokens) if draft == "above" else 1
    if isinstance(model, DeviceTransformer) and sampler.on_device and tokens > 1:
        # In the weights' own type, without autocast: a step recorded under it would keep its types.
        with model.lock, torch.autocast(code_table.device.type, enabled=False):
            width = min(window, tokens - 1)
            on_device = DeviceWindows(model, prompts, guided, sampler, width, columns)
            return WindowDrawing(*on_device.draw(progress))
    decoding = open_windows(model, code_table, prompts, pad, guided)
    asked = sum(map(len, prompts))
    with span("engine/prefill", rows=len(prompts)):
        logits = decoding.prefill()
    device, places = logits.device, torch.arange(tokens, device=logits.device)
    origin = places[:1].expand(len(prompts) // (2 if guided else 1), 1)
    with span("engine/sample", rows=len(origin), step=0):
        first = sampler.pick(sampler.scores(logits.unsqueeze(1), origin), origin)
    images = [Drafted(code, tokens, columns) for code in first.tolist()]
    while (fewest := min(image.done for image in images)) < tokens:
        if progress is not None:
            progress(fewest, tokens)
        width = min(window, tokens - fewest)
        starts, ran = map(list, zip(*(image.ahead(width) for image in images), strict=True))
        fed = len(prompts) * width
        held = asked + len(prompts) * fewest  # at least so many in the cache, over all rows
        with span("engine/decode/window", rows=fed, tokens=fed, held=held, step=fewest):
            logits = decoding.window(torch.tensor(ran, device=device), [s - 1 for s in starts])
        positions = torch.tensor(starts, device=device)[:, None] + places[:width]
        with span("engine/sample", rows=positions.numel(), step=fewest):
            samples = sampler.pick(sampler.scores(logits, positions), positions).tolist()
        for image, start, row in zip(images, starts, samples, strict=True):
            image.take(start, row)
    if progress is not None:
        progress(tokens, tokens)
    return WindowDrawing(
        torch.tensor([image.codes for image in images], device=device),
        torch.tensor([image.drafted for image in images], device=device),
        [image.steps for image in images],
    )
