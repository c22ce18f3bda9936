"""Pixels ↔ image codes and pixel features, on the VQ and SigLIP modules of `transformers`.

The nearest-code search is done here with l2-normalised vectors, as Janus's own release does; the
port's `encode` leaves the normalisation out (both agree when codebook rows have unit norm).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers import JanusVisionModel, JanusVQVAE

from echogen.engine.ranges import span


class ImageError(ValueError):
    """A picture that cannot be used; the message names the value and the fix."""


def load_image(source: str | Path | Image.Image, size: int) -> Image.Image:
    """Open a picture as RGB, ``size`` × ``size`` pixels (resized bicubically if it has another
    size), rotated as its EXIF data say, on white where it is transparent. 16-bit greys keep their
    upper 8 bits.

    Raises:
        ImageError: the picture is unreadable, has no pixels, has a mode that does not define black
            and white, or is not square (a crop would move the boxes: crop it yourself).
    """
    named = "the picture" if isinstance(source, Image.Image) else source
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image.load()
    except UnidentifiedImageError:
        raise ImageError(f"{named}: cannot be opened (no picture that Pillow reads)") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "no whole picture"
        raise ImageError(f"{named}: cannot be opened ({reason})") from None
    if not image.width or not image.height:
        raise ImageError(
            f"{named} is {image.width}x{image.height}, without pixels; see how it was cropped"
        )
    try:
        image = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        raise ImageError(
            f"{named}: its EXIF data, which say how it is turned, cannot be read ({error}); save "
            f"it without them"
        ) from None
    if image.mode in ("I", "F"):
        raise ImageError(
            f"{named} has pixels of mode {image.mode}, which does not define black and white; "
            f"scale them to 0 … 255 and convert it to mode L or RGB"
        )
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.width != image.height:
        raise ImageError(
            f"{named} is {image.width}x{image.height}; boxes refer to the whole picture, "
            "so make it square first (crop or pad)"
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        # The colour under transparent pixels is arbitrary: black, or whatever was erased.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if image.width == size else image.resize((size, size), Image.Resampling.BICUBIC)


def to_pixels(images: list[Image.Image] | np.ndarray) -> Tensor:
    """RGB pictures, or uint8 [B, H, W, 3] → float32 [B, 3, H, W] in [-1, 1]."""
    array = images if isinstance(images, np.ndarray) else np.stack([np.asarray(i) for i in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def to_images(pixels: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [-1, 1] → RGB pictures. Values saturate, as decoders overshoot a little."""
    levels = pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(a) for a in levels.permute(0, 2, 3, 1).cpu().numpy()]


def nearest_codes(vq: JanusVQVAE, features: Tensor) -> Tensor:
    """Encoder features [B, C, h, w] → codes int64 [B, h·w], by cosine (l2-normalised) distance."""
    flat = F.normalize(features.flatten(2).transpose(1, 2), dim=-1)
    return (flat @ F.normalize(vq.quantize.embedding.weight, dim=-1).T).argmax(-1)


@torch.no_grad()
def encode_image(vq: JanusVQVAE, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] → image codes int64 [B, T], raster order."""
    weight = vq.quant_conv.weight
    with span("engine/vq/encode", batch=len(pixels)):
        return nearest_codes(vq, vq.quant_conv(vq.encoder(pixels.to(weight.device, weight.dtype))))


def decoding_bytes(vq: JanusVQVAE, image_size: int) -> int:
    """Approximate bytes of temporary tensors while one picture is decoded: those of a residual
    block at full size, with some to spare."""
    vision: Any = vq.config
    return int(6 * image_size**2 * vision.base_channels * 4)


@torch.no_grad()
def decode_codes(vq: JanusVQVAE, codes: Tensor) -> Tensor:
    """Image codes int64 [B, T] → pixels [B, 3, H, W], about [-1, 1]."""
    with span("engine/vq/decode", batch=len(codes)):
        pixels: Tensor = vq.decode(codes.long())  # type: ignore[arg-type]  # its hint names the alias
    return pixels


@torch.no_grad()
def pixel_features(siglip: JanusVisionModel, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] → SigLIP features [B, T, pixel_dim]."""
    weight = siglip.embeddings.patch_embedding.weight
    with span("engine/siglip", batch=len(pixels)):
        return siglip(pixels.to(weight.device, weight.dtype)).last_hidden_state
