"""Pictures of images that are not drawn to their end."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from echogen.engine.engine import Engine

GREY = (128, 128, 128)
"""Of the squares of a picture whose codes are not drawn yet."""


class Pictures:
    """Codes to pictures, whole or not, one at a time: that is what memory is planned for.

    What is not drawn yet is even grey. The image tokenizer sees beyond a code's square, so for the
    sake of what is drawn the missing codes are taken to be the image's most frequent one so far,
    mostly ground; with the codes of a grey picture the rest would come out in other colours.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._turn = engine, threading.Lock()

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Codes [N, t], t of an image's T, → N pictures."""
        pictures = []
        for row in codes:
            with self._turn:  # of each anew, so that who wants one need not wait for others' many
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
    """What is drawn of a request.

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
