"""Overlays: solid and dashed boxes where they belong, a legend below, nothing over the picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from echogen.engine.images.picture import (
    COLOURS,
    MARGIN,
    SIDE,
    box_pixels,
    contact_sheet,
    overlay,
    with_boxes,
)

GROUND = (240, 238, 230)
ASKED, FOUND = (0.1, 0.2, 0.5, 0.6), (0.6, 0.4, 0.9, 0.95)


def share_of_edge(image: Image.Image, box: tuple[int, int, int, int], colour) -> float:
    """Share of the pixels on a box's lower and right edges that have the colour."""
    pixels = np.asarray(image)
    x1, y1, x2, y2 = box
    edge = np.concatenate([pixels[y2, x1 : x2 + 1], pixels[y1 : y2 + 1, x2]])
    return float((edge == colour).all(-1).mean())


@pytest.mark.parametrize("side", [64, 384, 1000])
def test_solid_and_dashed(side):
    page = overlay(Image.new("RGB", (side, side), GROUND), ["a star"], [ASKED], [FOUND], [0.25])
    scale = max(1, -(-SIDE // side))
    picture = page.crop((MARGIN, MARGIN, MARGIN + side * scale, MARGIN + side * scale))
    assert picture.width >= SIDE
    assert page.height > picture.height + 2 * MARGIN  # the legend
    assert share_of_edge(picture, box_pixels(ASKED, picture.size), COLOURS[0]) == 1
    assert 0.4 < share_of_edge(picture, box_pixels(FOUND, picture.size), COLOURS[0]) < 0.75


def test_nearest_pixels_survive():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    page = np.asarray(overlay(Image.fromarray(small), ["a star"]))
    inside = page[MARGIN : MARGIN + SIDE, MARGIN : MARGIN + SIDE]
    assert (inside[4::8, 4::8] == small).all()


def test_the_image_given_is_left_alone():
    image = Image.new("RGB", (64, 64), GROUND)
    with_boxes(image, [ASKED], [FOUND])
    assert image.getcolors() == [(64 * 64, GROUND)]


def test_boxes_at_the_border_and_of_one_pixel():
    boxes = [(0.0, 0.0, 1.0, 1.0), (0.5, 0.5, 0.501, 0.501), (0.99, 0.0, 1.0, 1.0)]
    page = overlay(Image.new("RGB", (64, 64)), ["a", "b", "c"], boxes, boxes, [1, 1, 1])
    assert page.width == SIDE + 2 * MARGIN


def test_long_expressions_and_many_objects_fit():
    expressions = ["a very long expression " * 20] * 12
    page = overlay(Image.new("RGB", (64, 64)), expressions, [ASKED] * 12, [FOUND] * 12, [0.5] * 12)
    margin = np.asarray(page)[:, -MARGIN:]
    assert (margin == 255).all()


@pytest.mark.parametrize("count", [2, 3, 7])
def test_contact_sheet_holds_every_sample(count):
    shades = [Image.new("RGB", (64, 64), (10 * i + 5, 0, 0)) for i in range(count)]
    sheet = contact_sheet(
        shades, ["a star"], [ASKED], [[FOUND]] * count, [0.5] * count, best=count - 1
    )
    reds = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert {(10 * i + 5, 0, 0) for i in range(count)} <= reds
