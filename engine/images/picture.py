"""Pictures for people: boxes drawn over an image, a legend under it, and sheets of many samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from echogen.engine.layout import Box

COLOURS = (
    (232, 89, 12), (25, 113, 194), (47, 158, 68), (194, 37, 92),
    (103, 65, 217), (12, 133, 153), (133, 77, 14), (73, 80, 87),
)  # fmt: skip
"""One per object, in turn; readable on white, and distinct in lightness as well as in hue."""

PAPER, INK, QUIET, RULE = (255, 255, 255), (33, 37, 41), (110, 118, 125), (222, 226, 230)
SIDE = 512  # a smaller picture is enlarged to at least this
TILE = 256  # and to at least this on a contact sheet
MARGIN, GAP, ROW = 16, 12, 26
LINE, CASING, DASH = 3, 1, (9, 7)  # line width, the white rim that sets it off, dash and gap


def overlay(
    image: Image.Image,
    expressions: Sequence[str],
    asked: Sequence[Box] | None = None,
    recovered: Sequence[Box] | None = None,
    iou: Sequence[float] | None = None,
) -> Image.Image:
    """An image with the boxes asked for (solid) and recovered (dashed), and a legend below it.

    Args:
        image: the picture; enlarged by a whole factor, pixel by pixel, where it is small.
        expressions: one per object, in the order of the boxes.
        asked, recovered: normalised boxes; None leaves that kind out.
        iou: of each object, for the legend.
    """
    picture = with_boxes(_enlarged(image, SIDE), asked, recovered)
    legend = _legend(picture.width, expressions, asked is not None, recovered is not None, iou)
    page = Image.new(
        "RGB",
        (picture.width + 2 * MARGIN, MARGIN + picture.height + GAP + legend.height + MARGIN),
        PAPER,
    )
    page.paste(picture, (MARGIN, MARGIN))
    page.paste(legend, (MARGIN, MARGIN + picture.height + GAP))
    return page


def contact_sheet(
    images: Sequence[Image.Image],
    expressions: Sequence[str],
    asked: Sequence[Box],
    recovered: Sequence[Sequence[Box]],
    rewards: Sequence[float],
    best: int,
) -> Image.Image:
    """All samples of a layout side by side, each with its boxes and its reward.

    Args:
        images: the samples.
        expressions, asked: the layout's objects.
        recovered: for each sample, the boxes found in it.
        rewards: of each sample.
        best: index of the sample to mark.
    """
    columns = max(2, math.ceil(len(images) ** 0.5))
    rows = math.ceil(len(images) / columns)
    tiles = [
        with_boxes(_enlarged(im, TILE), asked, found)
        for im, found in zip(images, recovered, strict=True)
    ]
    side = tiles[0].width
    width = columns * side + (columns - 1) * GAP
    legend = _legend(width, expressions, True, True, None)
    step = side + ROW + GAP
    page = Image.new(
        "RGB", (width + 2 * MARGIN, MARGIN + rows * step + legend.height + MARGIN), PAPER
    )
    draw = ImageDraw.Draw(page)
    for i, tile in enumerate(tiles):
        x, y = MARGIN + i % columns * (side + GAP), MARGIN + i // columns * step
        page.paste(tile, (x, y))
        colour = INK if i == best else QUIET
        if i == best:
            draw.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), outline=INK, width=2)
        text = f"sample {i}" + (" · best" if i == best else "")
        middle = y + side + ROW // 2 + 2
        draw.text((x, middle), text, colour, _font(15), "lm")
        draw.text((x + side, middle), f"reward {rewards[i]:.3f}", colour, _font(15), "rm")
    page.paste(legend, (MARGIN, MARGIN + rows * step))
    return page


def with_boxes(
    image: Image.Image, asked: Sequence[Box] | None, recovered: Sequence[Box] | None
) -> Image.Image:
    """A copy of the image with solid boxes, dashed boxes, and a number at each object."""
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    for i, box in enumerate(asked or ()):
        _box(draw, box_pixels(box, image.size), COLOURS[i % len(COLOURS)], dashed=False)
    for i, box in enumerate(recovered or ()):
        _box(draw, box_pixels(box, image.size), COLOURS[i % len(COLOURS)], dashed=True)
    for i, box in enumerate(asked or recovered or ()):
        x, y, _, _ = box_pixels(box, image.size)
        _badge(draw, x, y, i)
    return image


def box_pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A normalised box as the first and last pixel it covers, ``(x1, y1, x2, y2)``."""
    limits = (size[0] - 1, size[1] - 1) * 2
    x1, y1, x2, y2 = (round(v * limit) for v, limit in zip(box, limits, strict=True))
    return x1, y1, x2, y2


def _enlarged(image: Image.Image, side: int) -> Image.Image:
    # Nearest, so that one sees the pixels that were drawn, not a filter's version of them.
    factor = max(1, math.ceil(side / image.width))
    size = (image.width * factor, image.height * factor)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def _box(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    colour: tuple[int, int, int],
    dashed: bool,
) -> None:
    x1, y1, x2, y2 = box
    across = _dashes(x1, x2) if dashed else [(x1, x2)]
    down = _dashes(y1, y2) if dashed else [(y1, y2)]
    inward = LINE - 1
    bars = [(a, y, b, y + inward) for y in (y1, y2 - inward) for a, b in across]
    bars += [(x, a, x + inward, b) for x in (x1, x2 - inward) for a, b in down]
    for x, y, right, bottom in bars:
        bar = (x - CASING, y - CASING, max(x, right) + CASING, max(y, bottom) + CASING)
        draw.rectangle(bar, fill=PAPER)
    for x, y, right, bottom in bars:
        draw.rectangle((x, y, max(x, right), max(y, bottom)), fill=colour)


def _dashes(start: int, end: int) -> list[tuple[int, int]]:
    """Dashes from one corner to the other: a whole number of them, one at each corner."""
    dash, gap = DASH
    count = max(1, round((end - start + gap) / (dash + gap)))
    if count == 1:
        return [(start, end)]
    step = (end - start + 1 - dash) / (count - 1)
    starts = [round(start + i * step) for i in range(count)]
    return [(a, a + dash - 1) for a in starts]


def _badge(draw: ImageDraw.ImageDraw, x: int, y: int, index: int) -> None:
    """The object's number in a filled square whose corner is (x, y)."""
    text, font = str(index + 1), _font(13)
    width = max(18, round(draw.textlength(text, font)) + 8)
    colour = COLOURS[index % len(COLOURS)]
    draw.rectangle((x - CASING, y - CASING, x + width, y + 18), fill=PAPER)
    draw.rectangle((x, y, x + width - 1, y + 17), fill=colour)
    draw.text((x + width / 2, y + 9), text, PAPER, font, "mm")


def _legend(
    width: int,
    expressions: Sequence[str],
    asked: bool,
    recovered: bool,
    iou: Sequence[float] | None,
) -> Image.Image:
    """One row per object (number, expression, IoU) under a key to the two kinds of line."""
    image = Image.new("RGB", (width, ROW * (len(expressions) + 1) + 6), PAPER)
    draw = ImageDraw.Draw(image)
    x, middle = 0, ROW // 2
    for shown, name, dashed in ((asked, "asked for", False), (recovered, "found again", True)):
        if shown:
            for a, b in _dashes(x, x + 40) if dashed else [(x, x + 40)]:
                draw.rectangle((a, middle - 1, b, middle + 1), fill=QUIET)
            draw.text((x + 50, middle), name, QUIET, _font(14), "lm")
            x += 50 + round(draw.textlength(name, _font(14))) + 24
    if iou is not None:
        draw.text((width, middle), "IoU", QUIET, _font(14), "rm")
    draw.line((0, ROW, width, ROW), fill=RULE)
    for i, expr in enumerate(expressions):
        middle = ROW * (i + 1) + 4 + ROW // 2
        _badge(draw, 0, middle - 9, i)
        value = "" if iou is None else f"{iou[i]:.2f}"
        room = width - 34 - (round(draw.textlength(value, _font(15))) + 12 if value else 0)
        draw.text((34, middle), _fitted(draw, expr, room), INK, _font(15), "lm")
        draw.text((width, middle), value, INK, _font(15), "rm")
    return image


def _fitted(draw: ImageDraw.ImageDraw, text: str, room: int) -> str:
    """The text, or as much of it as there is room for, followed by dots."""
    if draw.textlength(text, _font(15)) <= room:
        return text
    while text and draw.textlength(text + "...", _font(15)) > room:
        text = text[:-1]
    return text.rstrip() + "..."


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)
