"""Rollouts: drawing and grounding that keep the log-probability of each token.

Reinforcement learning is correct only if the distribution that is scored is the one that sampled.
So the log-probability is taken from the sampler itself, after guidance, temperature, truncation and
grammar, and a trainer's own can be checked against it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from echogen.engine.decoding.decode import decode_image
from echogen.engine.decoding.sampler import Drawn, Sampler, Sampling, truncated
from echogen.engine.engine import Engine
from echogen.engine.ground import Answers, ground_tokens
from echogen.engine.layout import Layout
from echogen.kernels.sampling import cfg_sample


class Drawing(NamedTuple):
    """Images drawn, and the distribution that drew them.

    Attributes:
        codes: int64 [N, T].
        logprob: float32 [N, T], of each code under the guided, tempered, truncated distribution.
        kept: int64 [N, T], how many codes the truncation left to choose from; None if there is no
            truncation.
    """

    codes: Tensor
    logprob: Tensor
    kept: Tensor | None


def kept_codes(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Count the codes that top-k, then top-p leave of scores [N, V]; int64 [N]."""
    return (truncated(scores, top_k, top_p) > float("-inf")).sum(-1)


class RecordingSampler(Sampler):
    """A sampler that keeps the log-probability of what it draws.

    The arguments and the codes drawn are those of `Sampler`. ``logprob`` and ``kept`` are filled
    step by step, see `Drawing`.
    """

    def __init__(
        self, sampling: Sampling, seed: int, draws: Tensor, codebook: int, steps: int
    ) -> None:
        super().__init__(sampling, seed, draws, codebook, steps)
        self.logprob = torch.zeros(len(draws), steps, device=draws.device)
        cut = 0 < sampling.top_k < codebook or sampling.top_p < 1
        self.kept = torch.zeros_like(self.logprob, dtype=torch.int64) if cut else None
        self.counts = cut

    @property
    def on_device(self) -> bool:
        """See `Sampler`."""
        return type(self).__call__ is RecordingSampler.__call__

    def take(self, drawn: Drawn) -> None:
        """See `Sampler`."""
        self.logprob.copy_(drawn.logprob)
        if self.kept is not None and drawn.kept is not None:
            self.kept.copy_(drawn.kept)

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        """See `Sampler`."""
        s, scale = self.sampling, self.scale(step)
        drawn = cfg_sample(
            logits,
            self.seed,
            self.draws,
            torch.full_like(self.draws, step),
            scale,
            s.temperature,
            s.top_k,
            s.top_p,
            guided="blocked" if s.guided else "none",
        )
        self.logprob[:, step] = drawn.logprob
        if self.kept is not None:
            self.kept[:, step] = kept_codes(self.tempered(logits, step), s.top_k, s.top_p)
        return drawn.token


def draw(
    engine: Engine, layouts: list[Layout], sampling: Sampling, seed: int, draws: Tensor
) -> Drawing:
    """Draw one image per layout on the engine's weights, as `Engine.generate_codes` does.

    Args:
        layouts: N layouts; equal prompts are run once.
        sampling, seed: as for `Engine.generate_codes`.
        draws: int64 [N], the noise's draw ids.
    """
    prompts = engine.prompt_rows(layouts, sampling)
    c = engine.transformer.config
    sampler = RecordingSampler(
        sampling, seed, draws.to(engine.device), c.codebook_size, c.image_tokens
    )
    pad = engine.prompts.pad
    codes = decode_image(engine.decoder, engine.code_table, prompts, sampler, pad)
    # Copies, because a tensor of inference mode cannot be kept for a backward pass.
    return Drawing(codes.clone(), sampler.logprob, sampler.kept)


def ground(
    engine: Engine,
    codes: Tensor,
    expressions: list[list[str]],
    noise: tuple[int, Tensor] | None = None,
) -> Answers:
    """Find the box of every expression, in tokens, by grammar-constrained decoding.

    Args:
        codes: int64 [N, T], image codes.
        expressions: for each image, its K_n ≥ 1 expressions.
        noise: (seed, draw ids int64 [N]) to sample at temperature 1; None takes the most likely.

    Raises:
        PromptError: the model's boxes are not location tokens (see `locations`).
        LayoutError: an expression that cannot be used, or for which the model has no room.
    """
    image = engine.code_table[codes.to(engine.device)]
    found = ground_tokens(engine.transformer, engine.prompts, image, expressions, noise)
    # Copies, because a tensor of inference mode cannot be kept for a backward pass.
    return Answers(found.tokens.clone(), found.logprob.clone())
