"""The trainer's log-probabilities of a rollout's tokens, with gradients.

They are taken under the distribution that the tokens were sampled from, with its guidance,
temperature, truncation and grammar, as recorded by `engine.decoding.rollout`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from echogen.engine.decoding.sampler import Sampling
from echogen.engine.ground import constrained, location_ids, locations
from echogen.engine.model import UnifiedTransformer
from echogen.engine.prompt import Prompts
from echogen.kernels.logprob import guided_linear_logprob, linear_logprob
from echogen.train.data.packing import Batch
from echogen.train.stages.passes import hidden_states, image_features

CHUNK = 1024  # rows whose truncated logits exist at once


def image_logprob(
    model: UnifiedTransformer,
    drawn: Batch,
    unconditional: Batch | None,
    count: int,
    sampling: Sampling,
    kept: Tensor | None = None,
) -> Tensor:
    """Log-probability of every image code, float32 [N, T].

    Args:
        drawn: L2I trees of the drawn codes, in the order of the N = ``count`` images.
        unconditional: the same images with unconditional prompts, if there is guidance.
        sampling: the settings they were drawn with.
        kept: int64 [N, T], how many codes truncation left (see `Drawing`). As many of the trainer's
            most likely codes are kept here: which of two nearly equal codes comes last then makes
            no difference beyond rounding. None: there was no truncation.

    Raises:
        ValueError: the guidance scale varies by position (see `CycleRLConfig`).
    """
    if sampling.scheduled:
        raise ValueError(
            f"cfg_schedule = {sampling.cfg_schedule!r}, cfg_span = {sampling.cfg_span}: image "
            f"tokens are scored at one guidance scale"
        )
    rows, targets = _code_rows(model, drawn)
    features, weight, bias = image_features(model, rows)
    free = features
    if unconditional is not None:
        free = image_features(model, _code_rows(model, unconditional)[0])[0]
    temperature = sampling.temperature
    if kept is not None:
        mixed = free + sampling.cfg * (features - free) if unconditional is not None else features
        logp = _truncated(mixed, weight, bias, targets, kept.flatten(), temperature)
    elif unconditional is not None:
        logp = guided_linear_logprob(
            features, free, weight, targets, sampling.cfg, bias, temperature=temperature
        ).logprob
    else:
        logp = linear_logprob(features, weight, targets, bias, temperature=temperature).logprob
    return logp.view(count, -1)


def _code_rows(model: UnifiedTransformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states [N·T, D] that predict the codes [N·T], in the order of the trees."""
    hidden = hidden_states(model, batch).flatten(0, 1)
    return hidden[batch.code_at], batch.at("codes", batch.code_at)


def _truncated(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    kept: Tensor,
    temperature: float,
) -> Tensor:
    """Log-probability among the ``kept`` [N] largest logits of each row and the target itself."""

    def part(rows: Tensor, target: Tensor, count: Tensor) -> Tensor:
        logits = F.linear(rows, weight, bias)
        scores = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
        ordered = scores.detach().sort(-1, descending=True).values
        inside = scores >= ordered.gather(1, count[:, None] - 1)
        inside = inside.scatter(1, target[:, None], True)
        logp = scores.masked_fill(~inside, float("-inf")).log_softmax(-1)
        return logp.gather(1, target[:, None])[:, 0]

    chunks = zip(features.split(CHUNK), targets.split(CHUNK), kept.split(CHUNK), strict=True)
    return torch.cat([checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks])


def box_logprob(
    model: UnifiedTransformer, prompts: Prompts, asked: Batch, count: int, most: int
) -> Tensor:
    """Log-probability of every location token under the grammar, float32 [N, K, 4]; 0 where an
    image has fewer than K = ``most`` questions.

    Args:
        asked: I2L trees 0 … N−1 = ``count``−1, whose answers are the tokens.
    """
    first, _ = locations(prompts)
    # The </box> after a box is forced, so it is not a decision.
    here = asked.text_at.view(-1, 5)[:, :4].flatten()
    hidden = hidden_states(model, asked).flatten(0, 1)[here]
    logits = F.linear(hidden, model.text_head.weight[location_ids(prompts)])
    tokens = asked.at("texts", here).view(-1, 4)
    scores = torch.stack(
        [constrained(logits[step::4], tokens, step, prompts) for step in range(4)], 1
    )
    logp = scores.log_softmax(-1).gather(2, (tokens - first)[..., None])[..., 0]
    place = asked.at("tree", here[::4]), asked.at("branch", here[::4]) - 1
    return logp.new_zeros(count, most, 4).index_put(place, logp)
