"""Pictures of unfinished images."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from echogen.engine.engine import Engine
from echogen.engine.serving.turns import Turns

GREY = (128, 128, 128)
"""Colour of the squares whose codes are not drawn yet."""


class Pictures:
    """Decodes codes to pictures, finished or not, one at a time, as memory is planned for one.

    What is not drawn yet is plain grey. The image tokenizer sees beyond a code's square, so the
    missing codes are filled with the image's most frequent code so far, usually background. Filled
    with the codes of a grey picture, they would change the colours of the part that is drawn.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._turns = engine, Turns()

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Codes [N, t], t of an image's T, → N pictures."""
        pictures = []
        for row in codes:
            with self._turns:  # per picture, so that nobody who wants one waits for another's many
                pictures.append(self._picture(row))
        return pictures

    def _picture(self, codes: Tensor) -> Image.Image:
        c, drawn = self._engine.transformer.config, len(codes)
        if not drawn:
            return Image.new("RGB", (c.image_size, c.image_size), GREY)
        filled = codes.mode().values.repeat(c.image_tokens)
        filled[:drawn] = codes
        picture = self._engine.decode(filled[None])[0]
        side = c.image_size // c.grid
        for place in range(drawn, c.image_tokens):  # in raster order
            top, left = (side * n for n in divmod(place, c.grid))
            picture.paste(GREY, (left, top, left + side, top + side))
        return picture


@dataclass(frozen=True)
class Partial:
    """What is drawn of a request so far.

    Attributes:
        codes: int64 [N, t], the first t codes of each of its images.
        tokens: T, the codes of a whole image.
    """

    codes: Tensor
    tokens: int
    _pictures: Pictures

    def images(self) -> list[Image.Image]:
        """The pictures so far, grey where nothing is drawn."""
        return self._pictures.decode(self.codes)
