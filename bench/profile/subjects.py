"""What can be profiled: one representative piece of work each, warmed up when it is handed over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from echogen.engine.config import ModelConfig
from echogen.engine.layout import Layout, LayoutObject

if TYPE_CHECKING:
    from echogen.engine.engine import Engine
    from echogen.train.config import CycleRLConfig, DJOConfig, PMTPConfig
    from echogen.train.loop import Stage
    from echogen.train.start import Start

    StageConfig = TypeVar("StageConfig", PMTPConfig, DJOConfig, CycleRLConfig)

Work = Callable[[], object]

LAYOUT = Layout(
    "a red circle in front of a blue square",
    (
        LayoutObject("a blue square", (0.30, 0.35, 0.80, 0.90)),
        LayoutObject("a red circle", (0.10, 0.20, 0.45, 0.60)),
    ),
)


class Subject(NamedTuple):
    """A piece of work, the shapes of the model that does it, and the images that it draws, reads or
    trains on."""

    work: Work
    config: ModelConfig
    images: int


@dataclass(frozen=True)
class Asked:
    """What is asked of a subject.

    Attributes:
        model: as `Engine.from_pretrained` takes it.
        device: "cpu" or "cuda".
        batch: pictures at once, or samples of the one layout.
        float32: train in float32 where the recipe says bfloat16.
    """

    model: str = "tiny"
    device: str = "cpu"
    batch: int = 8
    float32: bool = False


def _engine(asked: Asked) -> Engine:
    from echogen.engine.engine import Engine

    return Engine.from_pretrained(asked.model, asked.device)


def generate(asked: Asked) -> Subject:
    """Drawing a batch of pictures, to pixels."""
    engine = _engine(asked)
    work = partial(_draw, engine, asked.batch)
    return Subject(work, engine.transformer.config, asked.batch)


def _draw(engine: Engine, batch: int) -> object:
    return engine.decode(engine.generate_codes([LAYOUT] * batch))


def ground(asked: Asked) -> Subject:
    """Finding two objects in each of a batch of pictures."""
    engine = _engine(asked)
    codes = engine.generate_codes([LAYOUT] * asked.batch)
    expressions = [[o.expr for o in LAYOUT.objects]] * asked.batch
    work = partial(engine.ground_codes, codes, expressions)
    return Subject(work, engine.transformer.config, asked.batch)


def cycle(asked: Asked) -> Subject:
    """Drawing samples of a layout, grounding and scoring them."""
    engine = _engine(asked)
    work = partial(engine.cycle, LAYOUT, asked.batch)
    return Subject(work, engine.transformer.config, asked.batch)


def _training(stage: Stage, config: ModelConfig, images: int) -> Subject:
    """One optimizer step of a stage after another."""
    from echogen.train.loop import update
    from echogen.train.optim import build_optimizers

    optimizers = build_optimizers(stage.module, stage.config.loop)
    parameters, steps = list(stage.module.parameters()), count()

    def step() -> object:
        return update(stage, stage.config.loop, optimizers, parameters, 1.0, next(steps))

    return Subject(step, config, images)


def pmtp(asked: Asked) -> Subject:
    """A training step of stage 1, from weights drawn at random."""
    from echogen.train.pmtp import PMTPStage
    from echogen.train.recipes import tiny

    config = _few(tiny().pmtp, asked)
    stage = PMTPStage(config, _engine(asked).vq)
    return _training(stage, stage.module.config, asked.batch)


def djo(asked: Asked) -> Subject:
    """A training step of stage 2, from the model asked for."""
    from echogen.train.djo import DJOStage
    from echogen.train.recipes import tiny

    config = _few(tiny().djo, asked)
    stage = DJOStage(config, _start(asked))
    return _training(stage, stage.module.config, asked.batch)


def cycle_rl(asked: Asked) -> Subject:
    """A training step of stage 3: ``batch`` layouts rolled out in groups of eight, an update."""
    from echogen.train.cycle_rl import CycleRLStage
    from echogen.train.recipes import tiny

    config = _few(tiny().cycle_rl, asked)
    stage = CycleRLStage(config, _start(asked))
    return _training(stage, stage.module.config, asked.batch * config.group)


def _few(config: StageConfig, asked: Asked) -> StageConfig:
    """A stage's configuration on few scenes, and as asked for."""
    loop = replace(config.loop, bf16=config.loop.bf16 and not asked.float32)
    return replace(config, loop=loop, scenes=FEW_SCENES, batch=asked.batch)


def _start(asked: Asked) -> Start:
    from echogen.train.start import load_start

    return load_start(asked.model, "", any_stage=True, device=asked.device)


SUBJECTS: dict[str, Callable[[Asked], Subject]] = {
    "generate": generate,
    "ground": ground,
    "cycle": cycle,
    "pmtp": pmtp,
    "djo": djo,
    "cycle-rl": cycle_rl,
}
FEW_SCENES = 64
"""Of the training set: drawing and encoding more would take longer than what is profiled."""


def warmed(name: str, asked: Asked) -> Subject:
    """A subject that has run once, so that compiling, packing and caches are not profiled."""
    subject = SUBJECTS[name](asked)
    subject.work()
    if asked.device.startswith("cuda"):
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
