"""Stage 2, dual joint optimisation: the model has to ground the image that it draws.

`J = L_L2I + μ·L_I2L + λ·L_loop` (EchoGen, stage 2). One parallel pass predicts every code of the
image; a straight-through Gumbel-Softmax sample of each is embedded; a second pass reads these
embeddings as the image of the grounding task and predicts the layout's boxes. The gradient of
their cross entropy reaches the generator through the soft samples, and the grounder directly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from echogen.engine.decoding.sampler import Sampling
from echogen.engine.layout import Layout
from echogen.engine.model import UnifiedTransformer
from echogen.engine.ranges import span
from echogen.kernels.head_gumbel import head_gumbel_st_embed
from echogen.train.config import DJOConfig
from echogen.train.data.packing import Batch
from echogen.train.data.samples import Sample
from echogen.train.data.source import Source
from echogen.train.parallel.distributed import one_goes_first
from echogen.train.stages import keys
from echogen.train.stages.ahead import Ahead
from echogen.train.stages.order import picked
from echogen.train.stages.passes import (
    box_loss,
    hidden_states,
    image_features,
    image_loss,
    worth_logging,
)
from echogen.train.stages.shares import part_of_mean, places
from echogen.train.stages.world import WorldStage, ask, source_of
from echogen.train.start import Start


class Noise(NamedTuple):
    """The keyed noise of a step: seed of `philox`, and a draw id for each image, int64 [N]."""

    key: int
    draws: Tensor


class Example(NamedTuple):
    """One sample of a step.

    Attributes:
        sample: the image and what is known about it.
        layout: the sample's layout.
        kept: whether it is drawn from the layout; otherwise from the unconditional prompt.
        questions: (expression, box), asked about the real image.
        draw: draw id of its noise.
    """

    sample: Sample
    layout: Layout
    kept: bool
    questions: list[tuple[str, tuple]]
    draw: int


class Laid(NamedTuple):
    """A part of a step, packed.

    Attributes:
        every, here: all samples of the step, and those of the part.
        real: stage 1's batch of the part's samples.
        looped: int64 [n], which of them go through the loop.
        questions: asked about their drawn images; None if there are none.
        total, counts: see `DJOStage._looped`.
    """

    every: list[Example]
    here: list[Example]
    real: Batch
    looped: np.ndarray
    questions: Batch | None
    total: int
    counts: bool


class SoftCodes(NamedTuple):
    """Straight-through samples of N images, in the order of their trees.

    Attributes:
        embed: [N, T, C], rows of the code embedding.
        codes: int64 [N, T].
        ce: [N, T], cross entropy of the batch's codes.
    """

    embed: Tensor
    codes: Tensor
    ce: Tensor


def draw_codes(
    model: UnifiedTransformer,
    hidden: Tensor,
    batch: Batch,
    tau: float,
    noise: Noise,
    given: bool = False,
    freeze_codes: bool = False,
) -> SoftCodes:
    """Draw a straight-through sample at every position of a batch that predicts an image code.

    Args:
        hidden: final hidden states [R, L, D] of the batch, whose drawing trees are 0 … N−1.
        tau: temperature of the soft sample.
        noise: of the N images.
        given: take the batch's codes as the samples (they were drawn with the same noise).
        freeze_codes: no gradient for the code embedding's rows.
    """
    count, tokens = len(noise.draws), model.config.image_tokens
    targets = batch.at("codes", batch.code_at)
    position = torch.arange(tokens, device=hidden.device).repeat(count)
    features, weight, bias = image_features(model, hidden.flatten(0, 1)[batch.code_at])
    codebook = model.code_embedding.weight
    sample = head_gumbel_st_embed(
        features,
        weight,
        codebook.detach() if freeze_codes else codebook,
        tau,
        noise.key,
        noise.draws.to(hidden.device, non_blocking=True).repeat_interleave(tokens),
        position,
        bias,
        index=targets if given else None,
        targets=targets,
    )
    return SoftCodes(*(x.unflatten(0, (count, tokens)) for x in sample))


class LoopPass(nn.Module):
    """The second pass: drawn embeddings in place of the image, cross entropy of the boxes."""

    def __init__(self, model: UnifiedTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, images: Tensor, total: int | None = None) -> Tensor:
        """Args: batch of I2L trees 0 … N−1, images [N, T, C], ``total`` as in `box_loss`. Returns
        the mean over box tokens."""
        model, here = self.model, batch.image_at
        lifted = model.code_aligner(images.flatten(0, 1))
        ids = batch.ids.flatten().index_fill(0, here, 0)  # image codes have no text embedding
        text = model.embed_text(ids)
        embedded = text.index_put((here,), lifted.to(text.dtype)).view(*batch.ids.shape, -1)
        return box_loss(model, hidden_states(model, batch, embedded), batch, total)


def loop_loss(
    model: UnifiedTransformer,
    batch: Batch,
    images: Tensor,
    frozen: bool = False,
    total: int | None = None,
) -> Tensor:
    """Cross entropy of the boxes of I2L trees 0 … N−1 whose images are the drawn ones [N, T, C];
    ``total`` as in `box_loss`.

    ``frozen``: use the same weights, detached: gradients pass through them to the images but do not
    update them. A frozen grounder thus needs no second model, and always has the current weights.
    """
    grounder = LoopPass(model)
    if not frozen:
        return grounder(batch, images, total)
    fixed = {name: p.detach() for name, p in grounder.named_parameters()}
    loss: Tensor = functional_call(grounder, fixed, (batch, images, total))
    return loss


def temperature(step: int, config: DJOConfig) -> float:
    """τ of a step: from ``tau_start`` at the first to ``tau_end`` at the last, exponentially."""
    done = step / max(1, config.loop.steps - 1)
    return config.tau_start * (config.tau_end / config.tau_start) ** done


class DJOStage(WorldStage):
    """Stage 2: its batches and its loss."""

    name = "djo"

    def __init__(self, config: DJOConfig, start: Start, source: Source | None = None) -> None:
        """Args: ``source``: the data set; None: the one that the configuration names."""
        source = source_of(config) if source is None else source
        super().__init__(start.engine, config.loop, source, start.stages)
        self.config = replace(config, start=start.fingerprint, data_hash=source.fingerprint)
        with one_goes_first():
            self._train = source.training(self.vq)
        self._key = keys.noise_key(config.loop.seed, keys.DJO_NOISE)
        self._laid = Ahead(self._lay)

    def examples(self, step: int) -> list[Example]:
        """The samples of a step, a pure function of (seed, step)."""
        c = self.config
        rng = keys.generator(c.loop.seed, keys.DJO_BATCH, step)
        samples = picked(self._train, c.batch, step, c, keys.DJO_ORDER, rng)
        layouts = [s.layout(rng) for s in samples]
        kept = (rng.random(c.batch) >= c.prompt_dropout).tolist()
        asked = [ask(s, c.branches, rng) if c.grounding_weight else [] for s in samples]
        draws = keys.draw_ids(step, c.batch).tolist()
        return [Example(*x) for x in zip(samples, layouts, kept, asked, draws, strict=True)]

    @property
    def images(self) -> int:
        """See `Stage`."""
        return self.config.batch

    def inputs(self, step: int) -> dict[str, Any]:
        """See `Stage`. Everything else that the loop reads is drawn from this."""
        every = self.examples(step)
        kept = torch.tensor([x.kept for x in every])
        return {**vars(self._real(every)), "kept": kept, "draws": [x.draw for x in every]}

    def ahead(self, step: int, part: int, parts: int) -> None:
        """See `Stage`."""
        self._laid.prepare(step, part, parts)

    def _lay(self, step: int, part: int, parts: int) -> Laid:
        with span("train/djo/data", step=step):
            every = self.examples(step)
            here = [every[i] for i in places("batch", self.config.batch, part, parts)]
            looped, total, counts = self._looped(here, every)
            layouts = [here[i].layout for i in looped]
            questions = self._questions(layouts) if layouts else None
            return Laid(every, here, self._real(here), looped, questions, total, counts)

    def loss_part(self, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, Any]]:
        """See `Stage`."""
        c, model = self.config, self.module
        every, here, batch, looped, questions, total, counts = self._laid.take(step, part, parts)
        hidden = hidden_states(model, batch)
        tau, draws = temperature(step, c), torch.tensor([x.draw for x in here])
        numbers = {"tau": torch.tensor(tau / parts)}
        image, images = None, None
        if len(looped) and c.prefix == "teacher":
            drawn = draw_codes(
                model, hidden, batch, tau, Noise(self._key, draws), freeze_codes=c.freeze_grounder
            )
            image = part_of_mean(drawn.ce.mean(), len(here), c.batch)
            # An index on the host would force a synchronisation.
            at = torch.from_numpy(looped).to(drawn.embed.device, non_blocking=True)
            images = drawn.embed[at]
        elif len(looped):
            noise = Noise(self._key, draws[torch.from_numpy(looped)])
            images, flips = self._sampled([here[i].layout for i in looped], tau, noise, step)
            share = len(looped) / sum(x.kept for x in every)
            numbers |= {k: v * share * counts for k, v in flips.items()}
        if image is None:
            image = image_loss(model, hidden, batch, len(every) * model.config.image_tokens)
        loss = numbers["l2i"] = image
        if c.grounding_weight:
            asked = sum(self.answer_tokens(x.questions) for x in every)
            numbers["i2l"] = box_loss(model, hidden, batch, asked)
            loss = loss + c.grounding_weight * numbers["i2l"]
        if images is not None and questions is not None:
            found = self._loop(questions, images, total)
            numbers["loop"] = found if counts else found * 0
            loss = loss + c.loop_weight * numbers["loop"]
        numbers = {"loss": loss, **numbers}
        return loss, worth_logging(numbers)

    def _looped(self, here: list[Example], every: list[Example]) -> tuple[np.ndarray, int, bool]:
        """Which examples of a part go through the loop, how many box tokens the loop predicts in
        all parts, and whether the part's own loop loss counts.

        An image drawn without its layout cannot be asked for the layout's boxes, so it skips the
        loop. A part in which no layout is kept still sends one image through, which does not count:
        in a sharded run all processes must pass through the same weights.
        """
        if not self.config.loop_weight:
            return np.empty(0, dtype=int), 0, False
        total = sum(self.answer_tokens(_boxes(x.layout)) for x in every if x.kept)
        looped = np.flatnonzero([x.kept for x in here])
        if len(looped) or not total:
            return looped, total, True
        return np.zeros(1, dtype=int), total, False

    def _real(self, examples: list[Example]) -> Batch:
        """Stage 1's batch: the real images drawn (trees 0 … N−1) and, with μ, grounded."""
        trees = [
            self.drawing(self.prompt(x.layout, dropped=not x.kept), x.sample.codes)
            for x in examples
        ]
        if self.config.grounding_weight:
            trees += [self.grounding(x.sample.codes, x.questions) for x in examples]
        return self.pack(trees)

    def _sampled(
        self, layouts: list[Layout], tau: float, noise: Noise, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [N, T, C] that the engine draws first and, if the step is logged, the share of
        their codes that the parallel pass would have drawn differently."""
        c, model = self.config, self.module
        with torch.autocast(self.engine.device.type, enabled=False):
            self.engine.refresh()
            codes = self.engine.generate_codes(
                layouts, noise.key, noise.draws.tolist(), sampling=Sampling(temperature=1.0)
            ).clone()  # a tensor of inference mode cannot be kept for backward
        trees = [
            self.drawing(self.prompt(layout), row.numpy())
            for layout, row in zip(layouts, codes.cpu(), strict=True)
        ]
        batch = self.pack(trees)
        hidden = hidden_states(model, batch)
        drawn = draw_codes(model, hidden, batch, tau, noise, True, c.freeze_grounder)
        flips = {}
        if (step + 1) % c.loop.log_every == 0 or step + 1 == c.loop.steps:
            with torch.no_grad():
                again = draw_codes(model, hidden, batch, tau, noise)
            flips["flips"] = (again.codes != drawn.codes).float().mean()
        return drawn.embed, flips

    def _questions(self, layouts: list[Layout]) -> Batch:
        """Questions with the layouts' own expressions, about images that are yet to be drawn."""
        # The drawn images replace these codes.
        unseen = np.zeros(self.module.config.image_tokens, dtype=np.int64)
        return self.pack([self.grounding(unseen, _boxes(y)) for y in layouts])

    def _loop(self, questions: Batch, images: Tensor, total: int) -> Tensor:
        """`L_loop`: questions about the drawn images; ``total`` as in `box_loss`."""
        return loop_loss(self.module, questions, images, self.config.freeze_grounder, total)


def _boxes(layout: Layout) -> list[tuple[str, tuple]]:
    return [(o.expr, o.box) for o in layout.objects]
