"""What is spoken over HTTP: bodies, refusals and pictures as bytes."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from echogen.engine.layout import Layout, LayoutError
from echogen.engine.sampler import Sampling, Schedule
from echogen.engine.vision import ImageError, load_image

Format = Literal["png", "jpeg", "webp"]
MEDIA = {f"image/{name}": name for name in ("png", "jpeg", "webp")}


class Refused(Exception):
    """A request that is answered with an error: its status, and one line that says what to mend."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Body(BaseModel):
    """Fields of JSON's own types, and no others than are named."""

    model_config = ConfigDict(extra="forbid", strict=True)


LAYOUT = {
    "caption": "a red circle in front of a blue square",
    "objects": [
        {"expr": "a blue square", "box": [0.3, 0.35, 0.8, 0.9]},
        {"expr": "a red circle", "box": [0.1, 0.2, 0.45, 0.6]},
    ],
}


class Drawing(Body):
    """Pictures to draw; what is left out is the model's own default."""

    layout: dict[str, Any] = Field(description="a layout, as in a layout file", examples=[LAYOUT])
    negative: dict[str, Any] | None = Field(
        None, description="a layout that guidance leads away from; needs cfg above 1"
    )
    seed: int = Field(0, description="the same seed draws the same picture")
    samples: int = Field(1, description="pictures")
    draws: list[int] | None = Field(
        None, description="number of the noise of each picture; 0, 1, … where left out"
    )
    temperature: float | None = None
    cfg: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    unconditional: Literal["pad", "empty"] | None = None
    cfg_schedule: Schedule | None = None
    cfg_start: float | None = None
    cfg_span: list[int] | None = None
    priority: int = Field(0, description="the higher are drawn first")
    timeout: float | None = Field(None, description="seconds; at most the server's own limit")
    check: bool = Field(
        False, description="find the layout in every picture: boxes, IoU, L1 and reward"
    )
    every: int = Field(
        0, description="codes between two partial results, sent as they come; 0: only the whole"
    )
    format: Format = Field("png", description="of the pictures in an answer of JSON")

    def layouts(self) -> tuple[Layout, Layout | None]:
        """What to draw, and what to lead away from. Raises LayoutError."""
        if self.negative is None:
            return Layout.from_dict(self.layout), None
        try:
            away = Layout.from_dict(self.negative)
        except LayoutError as error:
            raise LayoutError(f"negative: {error}") from None
        return Layout.from_dict(self.layout), away

    def sampling(self, usual: Sampling) -> Sampling:
        """How to draw. Raises ValueError for values out of range."""
        names = asdict(usual)
        given = {name: getattr(self, name) for name in names}
        if given["cfg_span"] is not None:
            given["cfg_span"] = tuple(given["cfg_span"])
        return Sampling(**names | {k: v for k, v in given.items() if v is not None})


class Search(Body):
    """Objects to find in a picture."""

    image: str = Field(description="a square picture: the file's bytes in base64")
    expressions: list[str] = Field(
        min_length=1, description="what to find; one box each", examples=[["a red circle"]]
    )
    features: Literal["tokens", "pixels"] = Field(
        "tokens", description="read the picture as image tokens, or as pixels through SigLIP"
    )

    def picture(self, size: int) -> Image.Image:
        """The picture, ``size`` × ``size``. Raises ImageError."""
        try:
            data = base64.b64decode(self.image, validate=True)
        except (binascii.Error, ValueError):
            raise ImageError(
                f"image = {_short(self.image)}: not base64; send the file's bytes so encoded"
            ) from None
        try:
            opened = Image.open(io.BytesIO(data))
            opened.load()
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
            raise ImageError(
                f"image: its {len(data)} bytes are no picture that Pillow reads; send a PNG, JPEG "
                f"or WebP"
            ) from None
        return load_image(opened, size)


def encoded(image: Image.Image, kind: str) -> bytes:
    """A picture as the bytes of a file; the same picture gives the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} if kind != "png" else {}))
    return buffer.getvalue()


def texts(images: Sequence[Image.Image], kind: str) -> list[str]:
    """Pictures as base64."""
    return [base64.b64encode(encoded(image, kind)).decode() for image in images]


def wanted(accept: str) -> str | None:
    """The format of a picture that an Accept header asks for; None: JSON. Of kinds named with the
    same weight the first.

    Raises:
        Refused: it allows nothing that there is (406).
    """
    best, found, weight = False, None, 0.0
    for part in accept.split(",") if accept.strip() else ["*/*"]:
        kind, _, rest = part.strip().partition(";")
        kind, q = kind.strip().lower(), _weight(rest)
        json = kind in ("*/*", "application/*", "application/json", "text/event-stream")
        if q > weight and (json or kind in MEDIA or kind == "image/*"):
            best, weight = True, q
            found = None if json else MEDIA.get(kind, "png")
    if not best:
        raise Refused(406, f"Accept: {accept}; there is application/json, {', '.join(MEDIA)}")
    return found


def _weight(parameters: str) -> float:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def what_is_wrong(errors: Sequence[Mapping[str, Any]], content_type: str) -> str:
    """One line of pydantic's errors: the first, and how many more."""
    first = errors[0]
    kind, where = first["type"], [str(part) for part in first["loc"][1:]]
    if not where and "json" not in content_type.lower():
        return f"Content-Type: {content_type or '(none)'}; send JSON, as application/json"
    if kind == "json_invalid":
        return f"not valid JSON at byte {first['loc'][-1]}: {first['ctx']['error']}"
    name = ".".join(where) or "the body"
    if kind == "missing":
        message = f"{name} is missing; add it"
    elif kind == "extra_forbidden":
        message = f"{name} is no field; see /docs for those there are"
    else:
        message = f"{name} = {_short(first.get('input'))}: {first['msg'].lower()}"
    return message + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
