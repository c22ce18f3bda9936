"""What the stages' losses are made of: the pass of a packed batch through the transformer, the
cross entropies, and the numbers to log."""

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
    """Final hidden states [R, L, D] of a packed batch; ``embedded`` [R, L, D] replaces the
    embeddings of its ids."""
    x = model.embed_mixed(batch.ids) if embedded is None else embedded
    with span(PASS, rows=len(batch.ids), tokens=batch.ids.numel()):  # padding included
        return model(x, batch.positions, attention_mask(batch, x))


def attention_mask(batch: Batch, x: Tensor) -> Tensor | BlockMask:
    """The attention mask of a batch for embeddings ``x``: in blocks on a GPU, dense elsewhere,
    since FlexAttention has no backward on a CPU."""
    if x.is_cuda:
        return block_mask(batch)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return additive_mask(visibility(batch), dtype)


def image_loss(
    model: UnifiedTransformer, hidden: Tensor, batch: Batch, total: int | None = None
) -> Tensor:
    """Mean cross entropy of a batch's image codes; 0 where it has none. ``total``: the number of
    codes in all parts of the batch; the result is then this part's contribution to their mean."""
    targets = batch.at("codes", batch.code_at)
    return _cross_entropy(model.image_head, hidden, batch.code_at, targets, total)


def box_loss(
    model: UnifiedTransformer, hidden: Tensor, batch: Batch, total: int | None = None
) -> Tensor:
    """Mean cross entropy of a batch's box tokens; 0 where it has none. ``total``: as in
    `image_loss`."""
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
    """Inputs of the fused operators for the image head: (features [N, H], weight [V, H], bias [V])
    of one dtype, whose product is the logits of ``hidden`` [N, D]."""
    into, activation, out = model.image_head
    assert isinstance(out, nn.Linear)
    features = activation(into(hidden))
    return features, out.weight.to(features.dtype), out.bias.to(features.dtype)


def worth_logging(numbers: dict[str, Tensor]) -> dict[str, Any]:
    """Numbers of a step as `Stage.loss` returns them. Reading one on a device would wait for it
    before backward is queued, so there they stay tensors, detached."""
    return {
        k: float(v) if v.is_cpu else v for k, v in ((k, v.detach()) for k, v in numbers.items())
    }
