"""Drawing several codes a step and drawing exactly what one code a step draws.

The noise of a code is keyed by (seed, draw, position), so a drawing is a function of its prompt:
``z_t = argmax(ℓ_t(z_<t)/temperature + g_t)``. One forward over a draft of the next W codes gives
every ``ℓ_t`` at once, and each that has only right codes before it gives the right next code. So a
step takes over the draft as far as it agrees with what the step itself samples, and one code more;
the samples after it are the next draft. This is Jacobi iteration of the equations above (Song et
al., "Accelerating feedforward computation via parallel nonlinear equation solving", ICML 2021; with
sampling: Teng et al., "Accelerating auto-regressive text-to-image generation with training-free
speculative Jacobi decoding", 2024), and because the noise does not change between steps it needs
neither a rule of acceptance nor a correction: the fixed point is the sequential drawing.

Every step yields a code, even from a draft that is all wrong; nothing falls back on anything.
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
"""How a drawing runs: one code a step, several, or whichever is the faster one (see ``wins``)."""

Draft = Literal["above", "left"]
"""What stands in for a position no step has sampled yet: the code above it or left of it."""


MOST_ROWS = 8
"""Rows, two an image with guidance, up to which windows win (see ``default_window``). More fill the
products by themselves, and a drawing takes as many steps as its slowest image."""


def default_window(rows: int) -> int:
    """Codes W of a window of so many rows, two an image with guidance.

    Times as fast as code by code: the bundled model, 24 test layouts, temperature 1, one thread of
    a busy AMD EPYC (Zen 3), without guidance and with CFG 5; in bold what is chosen.

    | images | W = 8          | 16             | 32         |
    |--------|----------------|----------------|------------|
    | 1      | 1.35, 1.35     | **1.68, 1.76** | 1.47, 1.52 |
    | 2      | 1.60, **1.63** | **1.51**, 1.57 | 1.48, 1.30 |
    | 4      | **1.64, 1.59** | 1.82, 1.33     | 1.37, 0.89 |
    | 8      | **1.34**, 1.25 | 1.27, 1.03     | 1.06, 0.82 |

    A quicker EPYC (Zen 5) gains less, of one image 1.22 to 1.26 times with W = 16, and 1.14 to 1.21
    with CFG 5, where 8 gave 1.18 to 1.27. The draft "left" takes up to 0.8 steps more than "above".
    (`ECHOGEN_NATIVE=0 echogen bench engine --mode jacobi --layouts 24 --temperature 1 --batch 4
    --window 8 --window 16 --window 32`, also with ``--draft left``.)
    """
    return 16 if rows <= 2 else 8


MOST_COVER = 0.45
"""Share of the canvas in boxes up to which drafts are good enough in float32; ShapesWorld's test
layouts stay below. Crowded ones, 0.6 and more, take 20 to 23 of 64 steps, each as long as two or
three: drawn 1.13 to 1.28 times as fast as code by code on Zen 3, and 0.79 to 0.86 times on Zen 5
(`bench/results/jacobi-tiny-cpu.json` at 38d6be274 and bc84d3fb9, by PyTorch's operations)."""


def foreseeable(layout: Layout, dtype: torch.dtype) -> bool:
    """Whether enough of a picture is drafted rightly for windows to win: as measured, where the
    layout leaves some ground free. In bfloat16, where even one row goes through blocked products
    (`PackedLinear`), an image of a test layout is drawn 2.4 to 3.0 times faster, and a crowded one
    1.3 to 2.0 (``--dtype bfloat16 --layouts 40``; with CFG at W = 8)."""
    return dtype == torch.bfloat16 or covered(layout) <= MOST_COVER


def wins(model: Decoder, dtype: torch.dtype, layouts: Sequence[Layout], guided: bool) -> bool:
    """Whether windows draw ``layouts``, an image each, faster than single codes: on weights packed
    for PyTorch's operations, up to ``MOST_ROWS``, those that are ``foreseeable``. In C++ a step of
    one row is as much faster than one of sixteen as it draws fewer codes: windows draw an image of
    the bundled model 1.01 times as fast, and 0.72 times with CFG 5 (`bench/results/jacobi-tiny-cpu
    .json`). One of 110 M parameters, whose weights fit no cache, would be drawn 2.2 times as fast
    if its drafts were as good (`bench/results/window-100m-cpu.json`); none is trained, to tell. On
    a GPU, where one picture at a time should gain most, nothing has been timed: windows run there
    on request alone (``decoding="jacobi"``)."""
    if len(layouts) * (1 + guided) > MOST_ROWS or not isinstance(model, PackedTransformer):
        return False
    return all(foreseeable(layout, dtype) for layout in layouts)


def columns_of(tokens: int) -> int:
    """Codes in a row of a square image of so many."""
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
        drafted: bool [N, T]; the codes taken over from a draft. Each of the others cost a step.
        steps: forwards each image needed, the prompt's among them: T − its drafted codes.
    """

    codes: Tensor
    drafted: Tensor
    steps: list[int]


class Drafted:
    """One image on its way: the codes that are final, and a draft after them.

    Args:
        drawn: the codes drawn so far, one at least.
        tokens: codes T of the image.
        columns: how far back the draft looks where no step has sampled yet: a row of the image for
            the code above, 1 for the code left of it.

    Attributes:
        codes: those of ``drawn`` and what was taken since, and the draft.
        done: how many of ``codes`` are final.
        drafted: whether each position's code was taken over from a draft.
        steps: forwards it has needed, the prompt's among them.
    """

    def __init__(self, drawn: list[int], tokens: int, columns: int) -> None:
        self.codes, self.done, self.steps = list(drawn), len(drawn), 1
        self.drafted = [False] * tokens
        self._columns = columns

    def ahead(self, width: int) -> tuple[int, list[int]]:
        """The next window: the position of the first code it samples, and the ``width`` codes to
        run for it, which begin one before that. Nearer to the end than a window it goes back, and
        runs codes again."""
        start, codes = min(self.done, len(self.drafted) - width), self.codes
        while len(codes) < start + width:
            codes.append(codes[-self._columns if len(codes) >= self._columns else -1])
        return start, codes[start - 1 : start - 1 + width]

    def take(self, start: int, samples: list[int]) -> None:
        """What a step sampled at positions ``start`` and on, from the codes before each."""
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
    """Draw one image for each prompt, several codes a step.

    The codes are those of `decode_image` unless two are within rounding of each other: products
    of another number of rows round differently (as between two sizes of a batch). None of 1,500
    drawings of 64 codes in float32, and none of 300 in bfloat16, came out otherwise (``identical``
    of `echogen bench engine --mode jacobi`). On packed weights they are those of ``window=1``
    whatever the window, to the last bit (`PackedWindows`), and in C++ those of `decode_image`.

    Images advance by their own accepted codes: waiting for the one that accepts the fewest would
    cost all of them its steps, every time another one. An image that is done, or nearer to its end
    than a window, runs codes again that it has; they stay as they are.

    Args:
        model, code_table, prompts, sampler, pad: as for `decode_image`.
        window: codes W run a step; None: ``default_window``.
        draft: of positions no step has sampled yet.
        progress: called after every step with the codes of the image that has the fewest.

    Raises:
        LayoutError: a prompt that leaves no room for the image.
        ValueError: a window below 1, an unknown draft, or another number of prompts than the
            sampler draws images of.
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
        # In the weights' own type, as a step recorded under autocast would stay under it.
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
        held = asked + len(prompts) * fewest  # in the cache at least, over all rows
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
