"""ShapesWorld's scenes on canvases of more than its own 64 pixels a side.

A scene is defined on the world's grid of 64; a larger canvas shows the same scene with finer edges.
The judge reads it at 64 pixels a side, after a nearest-neighbour resize.
"""

from __future__ import annotations

import hashlib
import inspect
from functools import cache

import numpy as np

from echogen.train.data.shapes import (
    GROUND,
    IMAGE_SIZE,
    PALETTE,
    Scene,
    dark,
    shape_mask,
    texture_mask,
)


def draw(scene: Scene, size: int = IMAGE_SIZE) -> np.ndarray:
    """The picture of a scene, uint8 RGB [size, size, 3].

    Raises:
        ValueError: a size that is no multiple of the world's.
    """
    if size == IMAGE_SIZE:
        return scene.image()
    if size < 1 or size % IMAGE_SIZE:
        raise ValueError(
            f"image_size = {size}; ShapesWorld is drawn on multiples of {IMAGE_SIZE} pixels"
        )
    scale = size // IMAGE_SIZE
    image = np.empty((size, size, 3), dtype=np.uint8)
    image[:] = GROUND
    for obj in scene.objects:
        x1, y1, x2, y2 = (scale * v for v in obj.box)
        mask = shape_mask(obj.shape, y2 - y1, x2 - x1)
        tile = _tile(obj.color, obj.texture, scale)[y1:y2, x1:x2]
        np.copyto(image[y1:y2, x1:x2], tile, where=mask[..., None])
    return image


@cache
def _tile(color: str, texture: str, scale: int) -> np.ndarray:
    """A canvas full of a texture, its pattern as many times as wide as the canvas."""
    pattern = texture_mask(texture).repeat(scale, 0).repeat(scale, 1)
    return np.where(pattern[..., None], dark(color), PALETTE[color]).astype(np.uint8)


def canvas_version() -> str:
    """Hash of the code above, for caches of what is drawn on larger canvases than the world's."""
    code = inspect.getsource(draw) + inspect.getsource(_tile.__wrapped__)
    return hashlib.blake2b(code.encode(), digest_size=6).hexdigest()
