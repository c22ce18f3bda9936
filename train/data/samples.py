"""What stage 1 reads: samples of (image codes, caption, objects with their expressions).

Codes of a data set are computed once and kept on disk under the hash of the VQ that made them.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import numpy as np
from rich.progress import track
from torch import nn
from transformers import JanusVQVAE

from echogen.engine.layout import Box, Layout, LayoutObject
from echogen.engine.vision import encode_image, to_pixels
from echogen.kernels.cache import cache_folder
from echogen.train.data.canvas import canvas_version
from echogen.train.data.scenes import load_scenes, render, world_version
from echogen.train.data.shapes import IMAGE_SIZE, Scene


@dataclass(frozen=True)
class Sample:
    """One image with everything known of its layout.

    Attributes:
        codes: image codes int64 [T].
        caption: of the whole image.
        boxes: one normalised box an object.
        expressions: for each object, the expressions that single it out, shortest first.
    """

    codes: np.ndarray
    caption: str
    boxes: tuple[Box, ...]
    expressions: tuple[tuple[str, ...], ...]

    def layout(self, rng: np.random.Generator) -> Layout:
        """A layout of this sample, each object under one of its expressions."""
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
    """Image codes uint16 [N, T] of the scenes, from the cache or encoded now and cached."""
    side = image_side(vq)
    drawn = "" if side == IMAGE_SIZE else f"-{side}-{canvas_version()}"
    name = f"codes-{module_hash(vq)}-{world_version()}{drawn}-{split}-{len(scenes)}.npy"
    path = cache_folder() / name
    if not path.exists():
        starts = range(0, len(scenes), batch)
        parts = [
            encode_image(vq, to_pixels(render(scenes[i : i + batch], side))).cpu().numpy()
            for i in track(starts, description=f"encoding {split} images", transient=True)
        ]
        beside = path.with_name(f"{path.stem}.{os.getpid()}.part.npy")
        np.save(beside, np.concatenate(parts).astype(np.uint16))
        os.replace(beside, path)
    codes: np.ndarray = np.load(path)
    return codes


def load_samples(vq: JanusVQVAE, split: str, count: int) -> list[Sample]:
    """The first ``count`` samples of a split of ShapesWorld."""
    scenes = load_scenes(split, count)
    codes = load_codes(vq, split, scenes).astype(np.int64)
    return [
        Sample(
            row,
            scene.caption(),
            tuple(tuple(b) for b in scene.boxes().astype(float).tolist()),
            tuple(tuple(scene.expressions(k)) for k in range(len(scene.objects))),
        )
        for row, scene in zip(codes, scenes, strict=True)
    ]
