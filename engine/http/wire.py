"""What goes over HTTP: bodies, answers, refusals, and pictures as bytes."""

from __future__ import annotations

import base64
import binascii
import io
import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeVar

from fastapi import Request as Http
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from echogen.engine.decoding.sampler import Sampling, Schedule
from echogen.engine.images.vision import ImageError, load_image
from echogen.engine.layout import Layout, LayoutError, read_json

Format = Literal["png", "jpeg", "webp"]
JSON, EVENTS = "application/json", "text/event-stream"
MEDIA: dict[str, Format] = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}
GONE = 499
"""Status, as nginx writes it, of an answer that the client did not wait for."""
MOST_PIXELS = 4096**2
"""Most pixels of a picture to find objects in. A file of a megabyte can hold 13,000 × 13,000 of
them, half a gigabyte in each of the copies that are made of it."""
MOST_EXPRESSIONS = 64
"""Most expressions in one turn of a search. A turn cannot be stopped once it has begun, and others
wait for it."""
LONGEST_EXPRESSION = 256
"""Most tokens of an expression to find: the time and memory of a turn grow with the square of its
tokens."""

MOST_PARTS = 1 << 17
"""Most commas and opening brackets in a body, those in texts included: as many as a drawing's body
has room for, while a picture in base64 has none. Parsing millions would hold up every client."""


class Refused(Exception):
    """A request that is answered with an error: its status, one line that says what to fix, and
    whether the same request may be sent again in a moment."""

    def __init__(self, status: int, message: str, again: bool = False) -> None:
        super().__init__(" ".join(message.split()))
        self.status, self.again = status, again


class Refusal(BaseModel):
    """What is wrong."""

    error: str


# --- bodies -----------------------------------------------------------------------------------


class Body(BaseModel):
    """Fields have JSON's own types. Lists fail fast: otherwise pydantic would list a hundred
    thousand faults, in the event loop."""

    model_config = ConfigDict(strict=True)


LAYOUT = {
    "caption": "a red circle in front of a blue square",
    "objects": [
        {"expr": "a blue square", "box": [0.3, 0.35, 0.8, 0.9]},
        {"expr": "a red circle", "box": [0.1, 0.2, 0.45, 0.6]},
    ],
}


WHITE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"
)
"""A white pixel, as a PNG in base64."""


class Drawing(Body):
    """Pictures to draw. Sampling fields that are left out take the model's own defaults, which
    /v1/model lists."""

    layout: dict[str, Any] = Field(
        description="what to draw, as in a layout file: caption, objects, and size where boxes are "
        "in pixels",
        examples=[LAYOUT],
    )
    negative: dict[str, Any] | None = Field(
        None, description="a layout of what the picture should not show; needs cfg above 1"
    )
    seed: int = Field(0, description="0 … 2^63 − 1; the same seed draws the same picture")
    samples: int = Field(1, description="number of pictures; each takes a slot, two with guidance")
    draws: list[int] | None = Field(
        None, fail_fast=True, description="number of each picture's noise; left out: 0, 1, …"
    )
    temperature: float | None = Field(
        None, description="divides the logits; 0 takes the most likely code"
    )
    cfg: float | None = Field(
        None,
        description="scale of classifier-free guidance; 1 is off, and half the work, unless a "
        "schedule, its start or a span is given too",
    )
    top_k: int | None = Field(None, description="keep the k most likely codes; 0 keeps all")
    top_p: float | None = Field(
        None, description="keep the smallest set of codes with this probability; 1 keeps all"
    )
    unconditional: Literal["pad", "empty"] | None = Field(
        None, description="what guidance leads away from: Janus's padding or PlanGen's empty layout"
    )
    cfg_schedule: Schedule | None = Field(
        None, description="how the scale moves over the image, from cfg_start to cfg"
    )
    cfg_start: float | None = Field(None, description="where a schedule begins")
    cfg_span: list[int] | None = Field(
        None,
        fail_fast=True,
        description="two positions: guide only from the first up to, not including, the second",
    )
    priority: int = Field(0, description="higher ones are drawn first")
    timeout: float | None = Field(
        None, description="seconds that the answer may take; at most the server's own limit"
    )
    check: bool = Field(
        False,
        description="find the layout in every picture: boxes, IoU, L1 and reward. Each object's "
        f"expression then has at most {LONGEST_EXPRESSION} tokens",
    )
    every: int = Field(
        0,
        description="send a partial result whenever this many more codes are drawn; 0: only the "
        "finished pictures",
    )
    format: Format = Field("png", description="of the pictures in JSON and in events")

    def layouts(self) -> tuple[Layout, Layout | None]:
        """What to draw, and what to steer away from. Raises LayoutError."""
        if self.negative is None:
            return Layout.from_dict(self.layout), None
        try:
            away = Layout.from_dict(self.negative)
        except LayoutError as error:
            raise LayoutError(f"negative: {error}") from None
        return Layout.from_dict(self.layout), away

    def sampling(self, usual: Sampling) -> Sampling:
        """How to draw. Raises ValueError for values out of range."""
        given = {name: getattr(self, name) for name in asdict(usual)}
        return usual.over({k: v for k, v in given.items() if v is not None})


class Search(Body):
    """Objects to find in a picture."""

    image: str = Field(
        description="a square PNG, JPEG or WebP, read on white where it is transparent: the "
        "file's bytes in base64"
    )
    expressions: list[str] = Field(
        fail_fast=True,
        min_length=1,
        max_length=MOST_EXPRESSIONS,
        description="what to find; one box for each, whether it is there or not. At most "
        f"{LONGEST_EXPRESSION} tokens each",
        examples=[["a red circle"]],
    )
    features: Literal["tokens", "pixels"] = Field(
        "tokens", description="read the picture as image tokens, or as pixels through SigLIP"
    )

    def picture(self, size: int) -> Image.Image:
        """The picture, ``size`` × ``size``; its dimensions are checked before its pixels are read.
        Raises ImageError."""
        try:
            data = base64.b64decode(self.image, validate=True)
        except (binascii.Error, ValueError):
            raise ImageError(
                f"image = {short(self.image)}: not base64; send the file's bytes so encoded"
            ) from None
        try:
            opened = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
            if opened.width * opened.height > MOST_PIXELS:
                raise ImageError(
                    f"image: it is {opened.width}x{opened.height}; send at most "
                    f"{MOST_PIXELS} pixels"
                )
            opened.load()
        except ImageError:
            raise
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
            raise ImageError(
                f"image: its {len(data)} bytes are no whole picture; send a PNG, JPEG or WebP"
            ) from None
        return load_image(opened, size)


EXAMPLES: dict[type[BaseModel], dict[str, Any]] = {
    Drawing: {"layout": LAYOUT, "seed": 0},
    Search: {"image": WHITE, "expressions": ["a red circle"]},
}
"""Whole bodies for /docs, which would otherwise make up one with a value for every field."""
B = TypeVar("B", bound=Body)


async def read(http: Http, kind: type[B]) -> B:
    """Read and check the body of a request. Raises Refused."""
    content = http.headers.get("content-type", "")
    if content.partition(";")[0].strip().lower() != JSON:
        raise Refused(415, f"Content-Type: {short(content)}; send JSON, as {JSON}")
    if (coding := http.headers.get("content-encoding", "identity").lower()) != "identity":
        raise Refused(415, f"Content-Encoding: {short(coding)}; send the JSON uncompressed")
    try:
        data = await http.body()
    except ClientDisconnect:
        raise Refused(GONE, "the client hung up before the body's end") from None
    if (parts := sum(map(data.count, (b",", b"[", b"{")))) > MOST_PARTS:
        raise Refused(400, f"the body has {parts} commas and brackets; send {MOST_PARTS} at most")
    try:
        found = read_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Refused(400, f"not UTF-8 at byte {error.start}; send JSON in UTF-8") from None
    except LayoutError as error:
        raise Refused(400, str(error)) from None
    if not isinstance(found, dict):
        raise Refused(400, f"the body is {short(found)}; send an object")
    for name in found:  # here, and not in pydantic, which would list them all
        if name not in kind.model_fields:
            raise Refused(
                400, f"{short(name)} is no field; there are {', '.join(kind.model_fields)}"
            )
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise Refused(400, what_is_wrong(error.errors(include_url=False))) from None


def what_is_wrong(errors: Sequence[Mapping[str, Any]]) -> str:
    """One line of pydantic's errors: the first, and how many more."""
    first = errors[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        message = f"{name} is missing; add it"
    else:
        told = first["msg"].lower().replace("a valid dictionary", "an object")  # JSON's word
        message = f"{name} = {short(first.get('input'))}: {told}"
    return message + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")


def short(value: object) -> str:
    """A value in at most 60 characters of one line."""
    text = repr(value[:60]) if isinstance(value, str) else reprlib.repr(value)
    if value is None or isinstance(value, bool):
        text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- answers ----------------------------------------------------------------------------------


class Found(BaseModel):
    """An object of a layout and where it was found again."""

    expr: str
    box: list[float]
    recovered: list[float]
    iou: float
    l1: float


class Picture(BaseModel):
    """A picture; reward and objects come with `check`."""

    draw: int
    image: str = Field(description="base64")
    reward: float | None = None
    objects: list[Found] | None = None


class Pictures(BaseModel):
    """What was drawn."""

    images: list[Picture]
    best: int | None = Field(None, description="index of the highest reward, with `check`")
    format: Format
    seed: int
    sampling: dict[str, Any]
    seconds: float


class Boxed(BaseModel):
    """An expression and its box."""

    expr: str
    box: list[float]


class Boxes(BaseModel):
    """What was found."""

    objects: list[Boxed]
    seconds: float


def encoded(image: Image.Image, kind: str) -> bytes:
    """A picture as the bytes of a file; the same picture gives the same bytes."""
    buffer = io.BytesIO()
    # For PNG zlib's quickest level: much sooner done, and the file is little larger.
    options = {"compress_level": 1} if kind == "png" else {"quality": 95}
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def in_base64(image: Image.Image, kind: str) -> str:
    """The bytes of a picture's file, in base64."""
    return base64.b64encode(encoded(image, kind)).decode()


def preferred(accept: str, offers: Sequence[str]) -> str:
    """Return the media type of ``offers`` that an Accept header (RFC 9110, 12.5.1) prefers. Each
    has the weight of the most specific range that it fits; of equal weights, the range named first
    wins.

    Raises:
        Refused: the header allows none of them (406).
    """
    refused, ranges = (0.0, 0), dict[str, tuple[float, int]]()
    for place, part in enumerate(accept.split(",") if accept.strip() else ["*/*"]):
        kind, _, rest = part.partition(";")
        name = kind.strip().lower()
        ranges[name] = max(ranges.get(name, refused), (_weight(rest), -place))

    def rank(offer: str) -> tuple[float, int]:
        fits = (offer, f"{offer.partition('/')[0]}/*", "*/*")
        return next((ranges[name] for name in fits if name in ranges), refused)

    best = max(offers, key=rank)
    if not rank(best)[0]:
        raise Refused(406, f"Accept: {short(accept)}; there is {', '.join(offers)}")
    return best


def _weight(parameters: str) -> float:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
