"""Adds to a plain Janus checkpoint the tokens that layouts need, with useful first embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from echogen.engine.model import UnifiedTransformer
from echogen.engine.prompt import MARKS, location_token


@torch.no_grad()
def add_box_tokens(
    tokenizer: PreTrainedTokenizerBase, model: UnifiedTransformer, bins: int
) -> list[str]:
    """Add the marks (``<ref>`` …) and ``bins`` location tokens where the tokenizer lacks them.

    A new row of the text embedding and of the text head starts at the mean of the rows that have
    spelled the token so far: the digits of a location, the pieces of a mark. Spare rows of the
    checkpoint (ids beyond the tokenizer's) are used first; the weights grow only when they run out.

    Returns:
        The tokens added.
    """
    known = tokenizer.get_vocab()
    spelled = {mark: mark.strip("</>") for mark in MARKS}
    spelled |= {location_token(i): str(i) for i in range(bins)}
    pieces = {
        token: tokenizer.encode(text, add_special_tokens=False)
        for token, text in spelled.items()
        if token not in known
    }
    if not pieces:
        return []
    tokenizer.add_special_tokens({"additional_special_tokens": list(pieces)}, False)
    vocab = tokenizer.get_vocab()
    ids = [vocab[token] for token in pieces]
    grow(model, max(ids) + 1)
    tables = {model.text_embedding.weight, model.text_head.weight}
    for table in tables:
        rows = torch.stack([table[p].float().mean(0) for p in pieces.values()])
        table[torch.tensor(ids, device=table.device)] = rows.to(table.dtype)
    return list(pieces)


def grow(model: UnifiedTransformer, rows: int) -> None:
    """Make room for ``rows`` text ids; existing rows keep their values, new ones are zero."""
    have = model.text_embedding.weight.shape[0]
    if rows <= have:
        return

    def grown(weight: Tensor) -> nn.Parameter:
        extra = weight.new_zeros(rows - have, weight.shape[1])
        return nn.Parameter(torch.cat((weight.detach(), extra)))

    tied = model.text_head.weight is model.text_embedding.weight
    model.text_embedding.weight = grown(model.text_embedding.weight)
    model.text_head.weight = model.text_embedding.weight if tied else grown(model.text_head.weight)
    model.text_embedding.num_embeddings = model.text_head.out_features = rows
    object.__setattr__(model.config, "vocab_size", rows)
