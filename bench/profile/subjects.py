"""What can be profiled: one representative piece of work each, warmed up when it is handed over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from echogen.engine.config import ModelConfig
from echogen.engine.layout import Box, Layout, LayoutObject

if TYPE_CHECKING:
    from echogen.engine.engine import Engine

Work = Callable[[], object]

LAYOUT = Layout(
    "a red circle in front of a blue square",
    (
        LayoutObject("a blue square", Box((0.30, 0.35, 0.80, 0.90))),
        LayoutObject("a red circle", Box((0.10, 0.20, 0.45, 0.60))),
    ),
)


class Subject(NamedTuple):
    """A piece of work, and the shapes of the model that does it."""

    work: Work
    config: ModelConfig


@dataclass(frozen=True)
class Asked:
    """What is asked of a subject.

    Attributes:
        model: as `Engine.from_pretrained` takes it.
        device: "cpu" or "cuda".
        batch: pictures at once, or samples of the one layout.
    """

    model: str = "tiny"
    device: str = "cpu"
    batch: int = 8


def _engine(asked: Asked) -> Engine:
    from echogen.engine.engine import Engine

    return Engine.from_pretrained(asked.model, asked.device)


def generate(asked: Asked) -> Subject:
    """Drawing a batch of pictures, to pixels."""
    engine = _engine(asked)
    work = partial(_draw, engine, asked.batch)
    return Subject(work, engine.transformer.config)


def _draw(engine: Engine, batch: int) -> object:
    return engine.decode(engine.generate_codes([LAYOUT] * batch))


def ground(asked: Asked) -> Subject:
    """Finding two objects in each of a batch of pictures."""
    engine = _engine(asked)
    codes = engine.generate_codes([LAYOUT] * asked.batch)
    expressions = [[o.expr for o in LAYOUT.objects]] * asked.batch
    return Subject(partial(engine.ground_codes, codes, expressions), engine.transformer.config)


def cycle(asked: Asked) -> Subject:
    """Drawing samples of a layout, grounding and scoring them."""
    engine = _engine(asked)
    return Subject(partial(engine.cycle, LAYOUT, asked.batch), engine.transformer.config)


SUBJECTS: dict[str, Callable[[Asked], Subject]] = {
    "generate": generate,
    "ground": ground,
    "cycle": cycle,
}


def warmed(name: str, asked: Asked) -> Subject:
    """A subject that has run once, so that compiling, packing and caches are not profiled."""
    subject = SUBJECTS[name](asked)
    subject.work()
    if asked.device == "cuda":
        torch.cuda.synchronize()
    return subject


def between_marks(work: Work) -> None:
    """Run a subject between the calls that start and stop an outer profiler."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
