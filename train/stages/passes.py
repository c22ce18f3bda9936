"""Packed batches through the transformer, what every stage's loss begins with, and the numbers that
it ends with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echogen.engine.flex import BlockMask
from echogen.engine.model import UnifiedTransformer, additive_mask
from echogen.engine.ranges import span
from echogen.train.data.packing import Batch, block_mask, visibility
from echogen.train.run.progress import PASS
from echogen.train.stages.shares import part_of_mean


def hidden_states(
    model: UnifiedTransformer, batch: Batch, embedded: Tensor | None = None
) -> Tensor:
    """Final hidden states [R, L, D] of a packed batch; ``embedded`` [R, L, D] stands in for the
    embeddings of its ids."""
    x = model.embed_mixed(batch.ids) if embedded is None else embedded
    with span(PASS, rows=len(batch.ids), tokens=batch.ids.numel()):  # padding included
        return model(x, batch.positions, attention_mask(batch, x))


def attention_mask(batch: Batch, x: Tensor) -> Tensor | BlockMask:
    """Who sees whom in a batch, for embeddings ``x``: in blocks on a GPU, dense elsewhere, since
    FlexAttention has no backward on a CPU."""
    if x.is_cuda:
        return block_mask(batch)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return additive_mask(visibility(batch), dtype)


def image_loss(
    model: UnifiedTransformer, hidden: Tensor, batch: Batch, total: int | None = None
) -> Tensor:
    """Mean cross entropy of a batch's image codes; 0 where it has none. ``total``: how many there
    are in all shares of the batch, of whose mean this is then the share's part."""
    targets = batch.at("codes", batch.code_at)
    return _cross_entropy(model.image_head, hidden, batch.code_at, targets, total)


def box_loss(
    model: UnifiedTransformer, hidden: Tensor, batch: Batch, total: int | None = None
) -> Tensor:
    """Mean cross entropy of a batch's box tokens; 0 where it has none. ``total``: see above."""
    targets = batch.at("texts", batch.text_at)
    return _cross_entropy(model.text_head, hidden, batch.text_at, targets, total)


def _cross_entropy(
    head: nn.Module, hidden: Tensor, places: Tensor, targets: Tensor, total: int | None
) -> Tensor:
    if not len(places):
        if not total:
            return hidden.new_zeros((), dtype=torch.float32)
        # Other parts have some. A sharded run needs all processes to pass through the same weights.
        return head(hidden[:1, 0]).float().sum() * 0
    logits = head(hidden.flatten(0, 1)[places])
    mean = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets)
    return part_of_mean(mean, len(targets), total)


def image_features(model: UnifiedTransformer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the fused operators take for the image head: (features [N, H], weight [V, H], bias [V])
    of one type, whose product is the logits of ``hidden`` [N, D]."""
    into, activation, out = model.image_head
    assert isinstance(out, nn.Linear)
    features = activation(into(hidden))
    return features, out.weight.to(features.dtype), out.bias.to(features.dtype)


def worth_logging(numbers: dict[str, Tensor]) -> dict[str, Any]:
    """Numbers of a step as `Stage.loss` returns them. To read one on a device is to wait for it,
    and backward is not queued yet: there they stay tensors, without their gradient."""
    return {
        k: float(v) if v.is_cpu else v for k, v in ((k, v.detach()) for k, v in numbers.items())
    }
