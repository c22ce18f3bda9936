"""Pictures of images that are not drawn to their end."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from echogen.engine.engine import Engine
from echogen.engine.vision import encode_image


class Pictures:
    """Codes to pictures, whole or not, one at a time: that is what memory is planned for.

    Codes not drawn yet are filled with a neutral one: the code that is most frequent where the
    image tokenizer encodes an even mid-grey picture.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._turn = engine, threading.Lock()
        self._neutral: int | None = None

    @property
    def neutral(self) -> int:
        """The code that stands for what is not drawn yet."""
        if self._neutral is None:
            size = self._engine.image_size
            grey = torch.zeros(1, 3, size, size)
            self._neutral = int(encode_image(self._engine.vq, grey).mode().values)
        return self._neutral

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Codes [N, t], t of an image's T, → N pictures."""
        with self._turn:
            tokens = self._engine.transformer.config.image_tokens
            filled = codes.new_full((len(codes), tokens), self.neutral)
            filled[:, : codes.shape[1]] = codes
            return [self._engine.decode(row[None])[0] for row in filled]


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
        """The pictures so far, what is missing in a neutral code (`Pictures`)."""
        return self._pictures.decode(self.codes)
