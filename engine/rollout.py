"""Rollouts: drawing and grounding that keep, beside each token, how probable it was.

Reinforcement learning is right only where the distribution that sampled is the one that is scored.
So the log-probability is taken from the sampler itself, after guidance, temperature, truncation and
grammar, and a trainer's own can be held against it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from echogen.engine.decode import decode_image
from echogen.engine.engine import Engine
from echogen.engine.ground import Branches
from echogen.engine.layout import Layout
from echogen.engine.model import UnifiedTransformer
from echogen.engine.prompt import LocationCodec, PromptError, Prompts
from echogen.engine.ranges import span
from echogen.engine.sampler import Drawn, Sampler, Sampling, truncated
from echogen.kernels.parse_boxes import allowed_location_mask
from echogen.kernels.philox import gumbel_noise
from echogen.kernels.sampling import cfg_sample

BOX_STREAM = 1
"""Word of the noise that tells a sample's boxes from its image codes, whose stream is 0."""


class Drawing(NamedTuple):
    """Images drawn, and the distribution that drew them.

    Attributes:
        codes: int64 [N, T].
        logprob: float32 [N, T], of each code under the guided, tempered, truncated distribution.
        kept: int64 [N, T], how many codes the truncation left to choose from; None without one.
    """

    codes: Tensor
    logprob: Tensor
    kept: Tensor | None


class Answers(NamedTuple):
    """Boxes found, in location tokens.

    Attributes:
        tokens: int64 [N, K, 4]; what stands at padding (k ≥ K_n) means nothing.
        logprob: float32 [N, K, 4], of each token under the grammar-constrained distribution.
    """

    tokens: Tensor
    logprob: Tensor


def kept_codes(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """How many codes top-k, then top-p leave of scores [N, V], int64 [N]."""
    return (truncated(scores, top_k, top_p) > float("-inf")).sum(-1)


class RecordingSampler(Sampler):
    """A sampler that keeps the log-probability of what it draws.

    The arguments are those of `Sampler`, and so are the codes drawn. ``logprob`` and ``kept`` are
    filled step by step, see `Drawing`.
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
            scores = logits.float()
            if s.guided:
                cond, uncond = scores.chunk(2)
                scores = cond if scale == 1 else uncond + scale * (cond - uncond)
            scores = scores * (1 / max(s.temperature, 1e-6))
            self.kept[:, step] = kept_codes(scores, s.top_k, s.top_p)
        return drawn.token


def draw(
    engine: Engine, layouts: list[Layout], sampling: Sampling, seed: int, draws: Tensor
) -> Drawing:
    """One image a layout on the engine's weights, as `Engine.generate_codes` draws it.

    Args:
        layouts: N layouts; equal prompts are run once.
        sampling, seed: as there.
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


def locations(prompts: Prompts) -> tuple[int, int]:
    """(id of ``<loc_0>``, number of location tokens).

    Raises:
        PromptError: another codec, or location tokens that do not follow each other.
    """
    codec = prompts.codec
    if not isinstance(codec, LocationCodec):
        raise PromptError(
            f"boxes are written with the {codec.name} codec; rollouts need the location codec"
        )
    first, bins = codec.ids[0], len(codec.ids)
    if codec.ids != list(range(first, first + bins)):
        raise PromptError(
            f"<loc_0> is token {first}, but the ids of its {bins} location tokens have gaps; "
            "add them to the tokenizer in one piece"
        )
    return first, bins


def constrained(logits: Tensor, tokens: Tensor, step: int, prompts: Prompts) -> Tensor:
    """Scores [N, bins] of coordinate ``step`` over the location tokens, from text logits [N, vocab]
    and the box so far, tokens [N, 4]: −inf where no box could follow."""
    first, bins = locations(prompts)
    lengths = torch.full((len(tokens),), step, device=tokens.device)
    allowed = allowed_location_mask(tokens, lengths, first, bins, prompts.box_end, logits.shape[-1])
    here = slice(first, first + bins)
    scores = logits[:, here]
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores.masked_fill(~allowed[:, here], float("-inf"))


@torch.inference_mode()
def _ground(
    model: UnifiedTransformer,
    prompts: Prompts,
    image: Tensor,
    expressions: list[list[str]],
    noise: tuple[int, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    branches = [[prompts.branch(e) for e in row] for row in expressions]
    state = Branches(model, prompts, image, branches)
    (first, bins), rows, width = locations(prompts), len(branches), max(map(len, branches))
    tokens = torch.full((rows * width, 4), first, device=image.device)
    logprob = torch.zeros(rows * width, 4, device=image.device)
    logits = state.prefill()
    for step in range(4):
        scores = constrained(logits.flatten(0, 1), tokens, step, prompts)
        noisy = scores
        if noise is not None:
            seed, draws = noise
            draw_id = draws.to(image.device).repeat_interleave(width)
            place = 4 * torch.arange(width, device=image.device).repeat(rows) + step
            noisy = scores + gumbel_noise(seed, draw_id, place, bins, BOX_STREAM)
        chosen = noisy.argmax(-1)
        logprob[:, step] = scores.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        tokens[:, step] = first + chosen
        if step < 3:
            logits = state.step(tokens[:, step].view(rows, width), step)
    return tokens.view(rows, width, 4), logprob.view(rows, width, 4)


def ground(
    engine: Engine,
    codes: Tensor,
    expressions: list[list[str]],
    noise: tuple[int, Tensor] | None = None,
) -> Answers:
    """Find the box of every expression, by grammar-constrained decoding, in tokens.

    Args:
        codes: int64 [N, T], image codes.
        expressions: for each image its K_n ≥ 1 expressions.
        noise: (seed, draw ids int64 [N]) to sample at temperature 1; None takes the most likely.

    Raises:
        PromptError: the model's boxes are not location tokens (see `locations`).
    """
    image = engine.code_table[codes.to(engine.device)]
    with span("engine/ground", batch=len(codes), branches=sum(map(len, expressions))):
        tokens, logprob = _ground(engine.transformer, engine.prompts, image, expressions, noise)
    return Answers(tokens.clone(), logprob.clone())
