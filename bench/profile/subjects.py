"""What can be profiled: representative pieces of work, each warmed up before it is returned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import nn

from echogen.engine.config import ModelConfig
from echogen.engine.layout import Layout, LayoutObject
from echogen.train.config import Recipe
from echogen.train.recipes import tiny

if TYPE_CHECKING:
    from transformers import JanusConfig, JanusVQVAE, PreTrainedTokenizerBase

    from echogen.engine.engine import Engine
    from echogen.train.config import CycleRLConfig, DJOConfig, PMTPConfig
    from echogen.train.data.packing import Batch, Tree
    from echogen.train.data.samples import Sample
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
    """A piece of work, the shapes of the model that does it, and how many images it draws, reads or
    trains on."""

    work: Work
    config: ModelConfig
    images: int


@dataclass(frozen=True)
class Asked:
    """Options of a subject.

    Attributes:
        model: as `Engine.from_pretrained` takes it, or FRESH.
        device: "cpu" or "cuda".
        batch: number of pictures drawn at once, of samples of the one layout, of samples in a
            training step, or of layouts in a rollout.
        float32: train in float32 where the recipe says bfloat16.
        recipe: sets the settings that a stage trains with, and the shapes of FRESH.
        dtype: of the weights for drawing and grounding; training uses its recipe's.
    """

    model: str = "tiny"
    device: str = "cpu"
    batch: int = 8
    float32: bool = False
    recipe: Recipe = field(default_factory=tiny)
    dtype: torch.dtype = torch.float32


def _engine(asked: Asked) -> Engine:
    from echogen.engine.engine import Engine

    if asked.model == FRESH:
        vq = fresh_vq(asked)
        return fresh(asked.recipe, vq, few_samples(vq), asked.dtype)
    return Engine.from_pretrained(asked.model, asked.device, asked.dtype)


def generate(asked: Asked) -> Subject:
    """Draw a batch of pictures, up to pixels."""
    engine = _engine(asked)
    work = partial(_draw, engine, asked.batch)
    return Subject(work, engine.transformer.config, asked.batch)


def _draw(engine: Engine, batch: int) -> object:
    return engine.decode(engine.generate_codes([LAYOUT] * batch))


def ground(asked: Asked) -> Subject:
    """Find two objects in each of a batch of pictures."""
    engine = _engine(asked)
    codes = engine.generate_codes([LAYOUT] * asked.batch)
    expressions = [[o.expr for o in LAYOUT.objects]] * asked.batch
    work = partial(engine.ground_codes, codes, expressions)
    return Subject(work, engine.transformer.config, asked.batch)


def cycle(asked: Asked) -> Subject:
    """Draw samples of a layout, then ground and score them."""
    engine = _engine(asked)
    work = partial(engine.cycle, LAYOUT, asked.batch)
    return Subject(work, engine.transformer.config, asked.batch)


class Packed:
    """Counts, on the host, how many positions of a stage's packed rows hold a token.

    Attributes:
        tokens: tokens placed in the rows.
        places: positions in the rows.
    """

    def __init__(self, stage: Any) -> None:
        self.tokens = self.places = 0
        self._pack = stage.pack
        stage.pack = self

    def __call__(self, trees: list[Tree]) -> Batch:
        batch: Batch = self._pack(trees)
        self.tokens += sum(map(len, trees))
        self.places += batch.ids.numel()
        return batch

    @property
    def padding(self) -> float:
        """The share of positions without a token."""
        return 1 - self.tokens / max(1, self.places)

    def clear(self) -> None:
        """Restart the counts."""
        self.tokens = self.places = 0


class Training(NamedTuple):
    """A stage, whose optimizer steps are made one after another, each by a call of ``work``."""

    work: Work
    stage: Any
    packed: Packed


def training(name: str, asked: Asked) -> Training:
    """Build a stage with its recipe's settings on few scenes; its steps are those of
    `train.run.loop`.

    Raises:
        BeginRefused: the batch cannot be divided into the recipe's parts.
    """
    from echogen.train.parallel.processes import Processes
    from echogen.train.run.optim import build_optimizers
    from echogen.train.run.update import check, update

    stage = STAGES[name](asked)
    if asked.device.startswith("cuda"):
        torch.cuda.empty_cache()  # used to encode the scenes; a run finds their codes on disk
    loop = stage.config.loop
    check(stage, loop, Processes())
    optimizers, steps = build_optimizers(stage.module, loop), count()
    parameters = [p for p in stage.module.parameters() if p.requires_grad]

    def step() -> object:
        return update(stage, loop, optimizers, parameters, 1.0, next(steps))

    return Training(step, stage, Packed(stage))


def _pmtp(asked: Asked) -> Any:
    from echogen.train.stages.pmtp import PMTPStage

    vq = fresh_vq(asked) if asked.model == FRESH else _engine(asked).vq
    return PMTPStage(_few(asked.recipe.pmtp, asked), _fresh_start(asked, vq))


def _djo(asked: Asked) -> Any:
    from echogen.train.stages.djo import DJOStage

    return DJOStage(_few(asked.recipe.djo, asked), _start(asked))


def _cycle_rl(asked: Asked) -> Any:
    from echogen.train.stages.cycle_rl import CycleRLStage

    return CycleRLStage(_few(asked.recipe.cycle_rl, asked), _start(asked))


def _few(config: StageConfig, asked: Asked) -> StageConfig:
    """Return a stage's configuration with few scenes and the requested options."""
    loop = replace(config.loop, bf16=config.loop.bf16 and not asked.float32)
    return replace(config, loop=loop, scenes=FEW_SCENES, batch=asked.batch)


def _start(asked: Asked) -> Start:
    from echogen.train.start import load_start

    if asked.model == FRESH:
        return _fresh_start(asked, fresh_vq(asked))
    return load_start(asked.model, "", any_stage=True, device=asked.device)


def _fresh_start(asked: Asked, vq: JanusVQVAE) -> Start:
    from echogen.train.start import Start

    return Start(fresh(asked.recipe, vq, few_samples(vq)), ("pmtp",), FRESH)


def few_samples(vq: JanusVQVAE) -> list[Sample]:
    """Load as many scenes of the training set as subjects train on."""
    from echogen.train.data.samples import load_samples

    return load_samples(vq, "train", FEW_SCENES)


def fresh_vq(asked: Asked) -> JanusVQVAE:
    """Build the recipe's image tokenizer, untrained and the same at every call. The codes it gives
    the few scenes are cached, and mean nothing."""
    from echogen.train.stages.vq import build_vq

    torch.manual_seed(asked.recipe.vq.loop.seed)
    vq = build_vq(asked.recipe.vq, asked.recipe.pmtp.width).eval()
    nn.Module.to(vq, asked.device)
    return vq


def fresh(
    recipe: Recipe, vq: JanusVQVAE, samples: list[Sample], dtype: torch.dtype = torch.float32
) -> Engine:
    """Build a model of the recipe's shapes with random weights, on the device of ``vq``, which
    becomes part of it. It follows stage 1's `new_model`, but draws on that device and uses
    `fresh_config`."""
    from transformers import JanusVisionModel

    from echogen.engine.decoding.sampler import Sampling
    from echogen.engine.engine import Engine
    from echogen.engine.model import UnifiedTransformer
    from echogen.engine.prompt import LocationCodec, Prompts
    from echogen.train.tokenizer import train_tokenizer

    config = recipe.pmtp
    texts = [t for s in samples for t in (s.caption, *sum(s.expressions, ()))]
    tokenizer = train_tokenizer(texts, config.bins)
    janus = fresh_config(recipe, vq, tokenizer)
    vision: Any = janus.vision_config
    with torch.device(vq.quant_conv.weight.device):
        transformer = UnifiedTransformer(ModelConfig.from_janus(janus))
        siglip = JanusVisionModel(vision)
    transformer.initialise(config.loop.seed)
    for module in (transformer, vq, siglip):
        nn.Module.to(module, dtype)
    prompts = Prompts(tokenizer, LocationCodec(tokenizer, config.bins))
    sampling = Sampling(temperature=config.temperature, cfg=config.cfg)
    return Engine(janus, transformer, vq, siglip, prompts, sampling, pixels_trained=False)


def fresh_config(recipe: Recipe, vq: JanusVQVAE, tokenizer: PreTrainedTokenizerBase) -> JanusConfig:
    """Return the recipe's shapes. If the recipe starts from a checkpoint, their text vocabulary is
    as large as that checkpoint's: embedding and head are a quarter of what Janus-Pro 1B trains.
    Texts still go through the world's own tokenizer, so prompts are not quite as long as with
    Janus's."""
    from echogen.train.stages.pmtp import janus_config

    janus = janus_config(recipe.pmtp, vq, tokenizer)
    text: Any = janus.text_config
    text.vocab_size = max(len(tokenizer), VOCABULARY.get(recipe.name, 0))
    return janus


def _step(name: str, asked: Asked) -> Subject:
    """A stage's optimizer steps, one after another: stage 1 starts from random weights, the others
    from the requested model."""
    work, stage, _ = training(name, asked)
    return Subject(work, stage.module.config, stage.images)


FRESH = "random"
"""Replaces a model's name: random weights, of the recipe's shapes."""
VOCABULARY = {"janus_pro_1b": 102_400}
"""Sizes of the text vocabulary in the checkpoints that recipes start from."""
STAGES: dict[str, Callable[[Asked], Any]] = {"pmtp": _pmtp, "djo": _djo, "cycle-rl": _cycle_rl}
SUBJECTS: dict[str, Callable[[Asked], Subject]] = {
    "generate": generate,
    "ground": ground,
    "cycle": cycle,
    **{name: partial(_step, name) for name in STAGES},
}
FEW_SCENES = 64
"""Training scenes. Drawing and encoding more would take longer than the profiled work."""


def warmed(name: str, asked: Asked) -> Subject:
    """Return a subject that has already run, so that compiling, packing and filling caches are not
    profiled."""
    subject = SUBJECTS[name](asked)
    warm_up(subject.work, asked.device, 1 if name not in STAGES else steps_to_warm(asked.device))
    return subject


def steps_to_warm(device: str) -> int:
    """Return how many steps of a stage run before the first that counts. On a GPU, the second
    number of rows makes FlexAttention compile again, this time for any number."""
    return 3 if device.startswith("cuda") else 1


def warm_up(work: Work, device: str, runs: int) -> None:
    """Run a subject ``runs`` times, and wait for the device."""
    for _ in range(runs):
        work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def between_marks(work: Work) -> None:
    """Run a subject between the calls that start and stop an outer profiler."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
