"""What training reads: samples of (image codes, caption, objects with their expressions).

Codes of a data set are computed once and kept on disk under the hash of the VQ that made them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from torch import nn
from transformers import JanusVQVAE

from echogen.engine.cache_folder import cache_path
from echogen.engine.checkpoints.shards import replace_file
from echogen.engine.images.vision import encode_image, to_pixels
from echogen.engine.layout import Box, Layout, LayoutObject
from echogen.train.data import parts
from echogen.train.data.canvas import canvas_version
from echogen.train.data.scenes import load_scenes, render, world_version
from echogen.train.data.shapes import IMAGE_SIZE, Scene

_PART = 8
"""Batches in a saved part of the codes: 512 pictures, a few seconds on two cores."""


@dataclass(frozen=True)
class Sample:
    """One image with everything known about its layout.

    Attributes:
        codes: image codes [T], integers of any dtype.
        caption: of the whole image.
        boxes: one normalised box per object.
        expressions: for each object, the expressions that single it out, shortest first.
    """

    codes: np.ndarray
    caption: str
    boxes: tuple[Box, ...]
    expressions: tuple[tuple[str, ...], ...]

    def layout(self, rng: np.random.Generator) -> Layout:
        """A layout of this sample, each object with one of its expressions, chosen at random."""
        chosen = (forms[rng.integers(len(forms))] for forms in self.expressions)
        objects = (LayoutObject(e, b) for e, b in zip(chosen, self.boxes, strict=True))
        return Layout(self.caption, tuple(objects))


def module_hash(module: nn.Module) -> str:
    """Hash of a module's weights."""
    digest = hashlib.blake2b(digest_size=6)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def image_side(vq: JanusVQVAE) -> int:
    """Pixels along a side of the images that an image tokenizer was made for."""
    halvings = len(vq.config.channel_multiplier) - 1
    side: int = vq.config.num_patches << halvings
    return side


def load_codes(vq: JanusVQVAE, split: str, scenes: list[Scene], batch: int = 64) -> np.ndarray:
    """Image codes uint16 [N, T] of the scenes, from the cache or encoded now and cached, part by
    part, so that a killed run's work is not repeated."""
    side = image_side(vq)
    drawn = "" if side == IMAGE_SIZE else f"-{side}-{canvas_version()}"
    name = f"{module_hash(vq)}-{world_version()}{drawn}-{split}-{len(scenes)}"

    def pictures(some: range) -> np.ndarray:
        return render(scenes[some.start : some.stop], side)

    return cached_codes(vq, name, f"{split} pictures", len(scenes), pictures, batch)


def cached_codes(
    vq: JanusVQVAE,
    name: str,
    what: str,
    count: int,
    pictures: Callable[[range], np.ndarray],
    batch: int = 64,
) -> np.ndarray:
    """Image codes uint16 [count, T] of any pictures, from the cache or encoded now; see
    `load_codes`. They are memory-mapped from the file, which the processes of a machine share.

    Args:
        name: of their cache; it must identify everything that the codes depend on.
        what: what is encoded, for the progress display.
        pictures: returns those of a range of places, uint8 [n, side, side, 3].
    """
    path = cache_path(f"codes-{name}.npy")
    if not path.exists():
        size = _PART * batch
        cuts = [range(i, min(i + size, count)) for i in range(0, count, size)]

        def encoded(missing: list[range], tell: Callable[[int], None]) -> Iterator[np.ndarray]:
            for part in missing:
                rows = []
                for i in part[::batch]:
                    pixels = to_pixels(pictures(range(i, min(i + batch, part.stop))))
                    rows.append(encode_image(vq, pixels).cpu().numpy().astype(np.uint16))
                    tell(len(rows[-1]))
                yield np.concatenate(rows)

        codes = parts.gathered(path, ("encoding", what), cuts, encoded, _as_bytes, _as_codes)
        replace_file(path, _as_bytes(np.concatenate(codes)))
        parts.drop(path, cuts)
    whole: np.memmap = np.load(path, mmap_mode="r")
    return whole.view(np.ndarray)


def _as_bytes(codes: np.ndarray) -> bytes:
    file = BytesIO()
    np.save(file, codes)
    return file.getvalue()


def _as_codes(data: bytes, part: range) -> np.ndarray | None:
    try:
        codes: np.ndarray = np.load(BytesIO(data))
    except (ValueError, EOFError):  # torn by a power cut
        return None
    return codes if len(codes) == len(part) else None


def load_samples(vq: JanusVQVAE, split: str, count: int) -> list[Sample]:
    """The first ``count`` samples of a split of ShapesWorld."""
    scenes = load_scenes(split, count)
    codes = load_codes(vq, split, scenes)
    return [
        Sample(
            row,
            scene.caption(),
            tuple(tuple(b) for b in scene.boxes().astype(float).tolist()),
            tuple(tuple(scene.expressions(k)) for k in range(len(scene.objects))),
        )
        for row, scene in zip(codes, scenes, strict=True)
    ]
