"""What all stages of the model share besides the loss: data, trees, evaluation, export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from echogen.engine.cycle import score
from echogen.engine.engine import Engine
from echogen.engine.images.picture import overlay
from echogen.engine.layout import Layout
from echogen.engine.model import UnifiedTransformer
from echogen.train.config import DJOConfig, LoopConfig, PMTPConfig
from echogen.train.data.packing import Batch, Tree, i2l_tree, l2i_group_tree, l2i_tree, pack
from echogen.train.data.pictures import Pictures
from echogen.train.data.samples import Sample
from echogen.train.data.source import ShapesWorld, Source
from echogen.train.eval.tables import quick_scores
from echogen.train.lora import add_adapters, save_adapter
from echogen.train.parallel.distributed import one_goes_first
from echogen.train.parallel.whole import WholeEngine
from echogen.train.stages import keys
from echogen.train.stages.passes import box_loss, hidden_states, image_loss
from echogen.train.start import write_record

Loss = Callable[[UnifiedTransformer, Tensor, Batch, int | None], Tensor]

VAL_SAMPLES = 256
PICTURES = 6
VAL_TREES = 64
"""Trees validated at once."""
BRANCHES = 6
"""Questions per image when losses are validated, the same in every stage."""


def source_of(config: PMTPConfig | DJOConfig) -> Source:
    """The data source that a configuration names."""
    return Pictures(config.data) if config.data else ShapesWorld(config.scenes)


def ask(sample: Sample, branches: int, rng: np.random.Generator) -> list[tuple[str, tuple]]:
    """Questions (expression, box) about a sample: one per object, then more about random objects,
    up to ``branches`` in total, each expression once."""
    objects = list(range(len(sample.boxes)))
    objects += rng.integers(len(objects), size=max(0, branches - len(objects))).tolist()
    asked = {}
    for k in objects:
        forms = sample.expressions[k]
        asked[forms[rng.integers(len(forms))]] = sample.boxes[k]
    return list(asked.items())


class WorldStage(ABC):
    """A stage of the model without its batches and its loss.

    Args:
        engine: the model to train. It draws and grounds with the very weights that are trained (but
            see ``gather``).
        loop: settings of the run's loop: the seed, and whether adapters are trained instead of
            weights.
        source: the data set; its validation samples are used here.
        stages: the stages that the model went through before this one; None: its weights are fresh.
    """

    name = "world"
    selects: str | None = None
    """See `Stage`. Without a judge it is the validation loss, the only measure of drawing that is
    not the model's own opinion."""
    engine_dtype: torch.dtype | None = None
    """Dtype of the engine's weights if it has its own (see ``gather``)."""

    def __init__(
        self,
        engine: Engine,
        loop: LoopConfig,
        source: Source,
        stages: tuple[str, ...] | None = None,
    ) -> None:
        source.check(engine)
        self.engine, self.prompts, self.vq = engine, engine.prompts, engine.vq
        self.module, self._device = engine.transformer, engine.device
        self.module.train().pixel_aligner.requires_grad_(False)  # no stage here reads pixels
        self._settings, self._stages = loop, stages or ()
        self.continues = stages is not None
        if loop.lora:
            add_adapters(self.module, loop)
            self.gather()
        with one_goes_first():
            self._val = source.validation(self.vq, VAL_SAMPLES)
        if self._val.judge is None and self.selects is None:
            self.selects = "-loss"

    # --- trees ----------------------------------------------------------------------------------

    def drawing(self, prompt: list[int], codes: np.ndarray) -> Tree:
        """The L2I tree of a prompt and an image."""
        return l2i_tree(prompt, codes, self.module.config.vocab_size)

    def drawings(self, prompt: list[int], codes: np.ndarray) -> Tree:
        """The L2I tree of a prompt and several images of it, [G, T]."""
        return l2i_group_tree(prompt, codes, self.module.config.vocab_size)

    def grounding(self, codes: np.ndarray, questions: list[tuple[str, tuple]]) -> Tree:
        """The I2L tree of an image and questions."""
        return i2l_tree(self.prompts, codes, questions, self.module.config.vocab_size)

    def answer_tokens(self, questions: list[tuple[str, tuple]]) -> int:
        """Number of target tokens in the answers to (expression, box) questions."""
        return sum(len(self.prompts.answer(box)) for _, box in questions)

    def pack(self, trees: list[Tree]) -> Batch:
        """Pack trees into rows, on the module's device."""
        blocks = self._device.type == "cuda"
        return pack(trees, self.prompts.pad, blocks=blocks).to(self._device)

    def prompt(self, layout: Layout, dropped: bool = False) -> list[int]:
        """The L2I prompt of a layout, or its unconditional form."""
        ids = self.prompts.l2i(layout)
        return self.prompts.unconditional(ids) if dropped else ids

    # --- the rest of a stage --------------------------------------------------------------------

    def begin(self) -> dict[str, float]:
        """Nothing to measure before the first step."""
        return {}

    def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        """See `Stage`."""
        return self.loss_part(step, 0, 1)

    @abstractmethod
    def loss_part(self, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, Any]]:
        """See `Stage`."""

    def after_step(self, step: int) -> None:  # noqa: B027 - most stages need none
        """Nothing follows the optimizer step."""

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Compute validation losses, free-running grounding on true images, and on drawn images the
        judge's scores and the model's own (see `quick_scores`). Without a judge also ``loss``, the
        sum of the two losses, by which weights are then chosen."""
        samples, layouts, judge = self._val
        rng = keys.generator(self._settings.seed, keys.VALIDATION)
        drawn = [self.drawing(self.prompt(s.layout(rng)), s.codes) for s in samples]
        found = [self.grounding(s.codes, ask(s, BRANCHES, rng)) for s in samples]
        self.module.eval()
        self.engine.refresh()
        image, text = self._validation(drawn, image_loss), self._validation(found, box_loss)
        codes = np.stack([s.codes for s in samples]).astype(np.int64)
        model = self.engine.transformer
        scores = quick_scores(model, self.vq, self.prompts, codes, layouts, judge)
        self.module.train()
        values = {"l2i": image, "i2l": text, **scores}
        return values if judge is not None else {"loss": image + text, **values}

    def _validation(self, trees: list[Tree], loss: Loss) -> float:
        """Mean loss over the targets of trees. They go through the model in pieces: for a large
        model, all at once would need more memory than its training."""
        model, mean = self.engine.transformer, 0.0
        batches = [self.pack(trees[i : i + VAL_TREES]) for i in range(0, len(trees), VAL_TREES)]
        total = sum(len(b.code_at) + len(b.text_at) for b in batches)
        for batch in batches:
            mean += float(loss(model, hidden_states(model, batch), batch, total))
        return mean

    def gather(self) -> None:
        """Make the engine run on whole weights of its own from now on (see `WholeEngine`), because
        the trained ones are sharded, have adapters beside them, or have another dtype."""
        self.engine = WholeEngine(self.engine, self.module, self.engine_dtype)

    @torch.no_grad()
    def pictures(self) -> list[tuple[str, Image.Image]]:
        """Draw the first validation layouts as users would, and ground them again, always with the
        same noise, so that one evaluation can be compared with the next."""
        rng = keys.generator(self._settings.seed, keys.VALIDATION)
        layouts = [s.layout(rng) for s in self._val.samples[:PICTURES]]
        self.module.eval()
        self.engine.refresh()
        codes = self.engine.generate_codes(layouts)
        boxes = self.engine.ground_codes(codes, [[o.expr for o in y.objects] for y in layouts])
        self.module.train()
        drawn = []
        for i, image in enumerate(self.engine.decode(codes)):
            objects, iou = layouts[i].objects, score(layouts[i], [boxes[i]])[0][0].tolist()
            names, asked = [o.expr for o in objects], [o.box for o in objects]
            drawn.append((f"validation-{i}", overlay(image, names, asked, boxes[i], iou)))
        return drawn

    def export(self, folder: Path) -> None:
        """Write a Janus checkpoint in bfloat16, which `Engine.from_pretrained` loads, with the
        record of its stages."""
        self.engine.refresh()
        self.engine.save_pretrained(folder, dtype=torch.bfloat16)
        if self._settings.lora and isinstance(self.engine, WholeEngine):
            save_adapter(self.engine.adapter, self._settings, folder / "adapter")
        write_record(folder, (*self._stages, self.name))
