"""What a stage learns from: samples to train on, others to validate on, and a judge of drawings.

A stage needs nothing else from its data. ShapesWorld is one `Source`, a folder of pictures another
(`pictures`). For a third, implement its methods and pass it to the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import JanusVQVAE

from echogen.engine.checkpoints.keymap import CheckpointError
from echogen.engine.engine import Engine
from echogen.engine.layout import Layout
from echogen.train.data.samples import Sample, load_samples
from echogen.train.data.scenes import load_scenes
from echogen.train.data.shapes import IMAGE_SIZE
from echogen.train.eval.tables import judge_boxes, layouts_of

Judge = Callable[[Tensor], dict[str, float]]
"""Pictures [N, 3, H, W], drawn from the first N layouts of a `Validation` → how well their objects
are found, as "judge_iou" and any other numbers."""


class Validation(NamedTuple):
    """Samples that are not trained on.

    Attributes:
        samples: at least one.
        layouts: one per sample, which is grounded and drawn, the same in every evaluation.
        judge: reads the drawings; None: only the model itself does.
    """

    samples: Sequence[Sample]
    layouts: list[Layout]
    judge: Judge | None


class Source(Protocol):
    """A data set, as a stage sees it.

    Every process of a run makes its own instance; what they find in a cache was made by one process
    of each machine (`one_goes_first`).
    """

    @property
    def fingerprint(self) -> str:
        """Identifies the data; a run resumes only with the same data. "": the stage's configuration
        is enough."""
        ...

    def check(self, engine: Engine) -> None:
        """Refuse a model that cannot learn from these data, with an error that says why."""
        ...

    def training(self, vq: JanusVQVAE) -> Sequence[Sample]:
        """The samples to train on, with their image codes by ``vq``. A step takes some of them by
        their index, so they need not all be in memory."""
        ...

    def validation(self, vq: JanusVQVAE, count: int) -> Validation:
        """At most ``count`` samples to validate on, the same every time."""
        ...


@dataclass(frozen=True)
class ShapesWorld:
    """The built-in world and its judge.

    Attributes:
        scenes: the number of training scenes.
    """

    scenes: int

    @property
    def fingerprint(self) -> str:
        """See `Source`: the world is part of the program."""
        return ""

    def check(self, engine: Engine) -> None:
        """Refuse a model with an image size that the world cannot be drawn at. Raises
        CheckpointError."""
        if engine.image_size % IMAGE_SIZE:
            raise CheckpointError(
                f"the model's images have {engine.image_size} pixels a side, those of "
                f"ShapesWorld {IMAGE_SIZE} or a multiple of it; begin with a model trained on them"
            )

    def training(self, vq: JanusVQVAE) -> list[Sample]:
        """See `Source`."""
        return load_samples(vq, "train", self.scenes)

    def validation(self, vq: JanusVQVAE, count: int) -> Validation:
        """See `Source`."""
        scenes = load_scenes("val", count)

        def judge(pixels: Tensor) -> dict[str, float]:
            return judge_boxes(pixels, scenes[: len(pixels)])

        return Validation(load_samples(vq, "val", count), layouts_of(scenes, 0), judge)
