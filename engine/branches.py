"""The sequences that grounding runs on: each image is a trunk that its branches share, and one
cache holds all of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from echogen.engine.cache import KVCache
from echogen.engine.model import UnifiedTransformer, additive_mask, tree_visibility
from echogen.engine.prompt import Prompts
from echogen.engine.ranges import span


class Branches:
    """The cache of B trunks with K branches each, and the branch that every cached token is on.

    Args:
        model, prompts: the transformer, and the builder of the trunk.
        image: embedded images [B, T, D].
        branches: for each image, the ids of its K_b questions; K is the largest K_b.
        answers: the V ids that logits are wanted of; by default the whole vocabulary.
    """

    def __init__(
        self,
        model: UnifiedTransformer,
        prompts: Prompts,
        image: Tensor,
        branches: list[list[list[int]]],
        answers: slice | list[int] = slice(None),
    ) -> None:
        self._model, self._image = model, image
        self._head = model.text_head.weight[answers]
        self._before, self._after = prompts.i2l()
        self._rows, self._width = len(branches), max(map(len, branches))
        trunk = len(self._before) + image.shape[1] + len(self._after)
        longest = max(sum(map(len, row)) for row in branches)
        ids, branch, position, self._last = [], [], [], []
        for row in branches:
            pads = longest - sum(map(len, row))
            ids.append([t for q in row for t in q] + [prompts.pad] * pads)
            branch.append([0] * trunk + [k for k, q in enumerate(row, 1) for _ in q] + [-1] * pads)
            where = [trunk + i for q in row for i in range(len(q))]
            position.append(list(range(trunk)) + where + [0] * pads)
            ends = torch.tensor([len(q) for q in row]).cumsum(0) + trunk - 1
            self._last.append(ends.tolist() + [0] * (self._width - len(row)))
        device = image.device
        self._ids = torch.tensor(ids, device=device)
        self._branch = torch.tensor(branch, device=device)
        self._position = torch.tensor(position, device=device)
        lengths = [
            [trunk + len(q) for q in row] + [0] * (self._width - len(row)) for row in branches
        ]
        self._next = torch.tensor(lengths, device=device)
        self._pad, self._fed = prompts.pad, torch.zeros_like(self._next)
        capacity = trunk + longest + self._width * prompts.codec.steps
        self._cache = KVCache(model.config, self._rows, capacity, image.dtype, device)

    def prefill(self) -> Tensor:
        """Run trunk and questions; return text logits at the end of every branch [B, K, V]."""
        count, tokens = self._rows * self._width, self._position.numel()
        with span("engine/ground/prefill", rows=count, tokens=tokens):
            return self._prefill()

    def _prefill(self) -> Tensor:
        before, after = (
            self._model.embed_text(torch.tensor(ids, device=self._image.device)).expand(
                self._rows, -1, -1
            )
            for ids in (self._before, self._after)
        )
        questions = self._model.embed_text(self._ids)
        embedded = torch.cat((before, self._image, after, questions), 1)
        length = embedded.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=embedded.device).tril()
        hidden = self._run(embedded, self._position, self._branch, causal)
        last = torch.tensor(self._last, device=hidden.device)
        rows = torch.arange(self._rows, device=hidden.device)[:, None]
        return self._logits(hidden[rows, last])

    def step(self, tokens: Tensor, step: int) -> Tensor:
        """Feed one token [B, K] to every branch; return text logits [B, K, V]."""
        fed, held = tokens.numel(), self._branch.numel() + tokens.numel()
        with span("engine/ground/step", rows=fed, tokens=fed, held=held, step=step):
            return self._step(tokens.unsqueeze(-1), torch.ones_like(tokens))

    def feed(self, new: list[list[list[int]]]) -> Tensor:
        """Feed each branch its own tokens, however many; return text logits [B, K, V] after the
        last token of each (meaningless for a branch without new tokens)."""
        most = max(len(tokens) for row in new for tokens in row)
        device = self._ids.device
        tokens = torch.full((self._rows, self._width, most), self._pad)
        counts = torch.zeros(self._rows, self._width, dtype=torch.int64)
        for i, row in enumerate(new):
            for j, mine in enumerate(row):
                tokens[i, j, : len(mine)] = torch.tensor(mine, dtype=torch.int64)
                counts[i, j] = len(mine)
        fed, held = tokens.numel(), self._branch.numel() + tokens.numel()
        rows = self._rows * self._width
        with span("engine/ground/step", rows=rows, tokens=fed, held=held):
            return self._step(tokens.to(device), counts.to(device))

    def _step(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Feed the first ``counts`` [B, K] of each branch's tokens [B, K, n] → logits [B, K, V]."""
        _, width, most = tokens.shape
        place = torch.arange(most, device=tokens.device)
        number = torch.arange(1, width + 1, device=tokens.device)[:, None]
        branch = torch.where(place < counts[..., None], number, -1).flatten(1)
        position = ((self._next + self._fed)[..., None] + place).flatten(1)
        # A pad is never read, but it still needs a valid position.
        position = position.clamp(max=self._model.config.max_positions - 1)
        cached, new = self._branch.shape[1], width * most
        self._branch = torch.cat((self._branch, branch), 1)
        self._fed = self._fed + counts
        self._make_room(new)
        here = torch.ones(new, new, dtype=torch.bool, device=tokens.device).tril()
        old = torch.ones(new, cached, dtype=torch.bool, device=tokens.device)
        embedded = self._model.embed_text(tokens.flatten(1))
        hidden = self._run(embedded, position, branch, torch.cat((old, here), 1))
        last = (counts - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, hidden.shape[-1])
        return self._logits(hidden.unflatten(1, (width, most)).gather(2, last).squeeze(2))

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self._head)

    def _make_room(self, tokens: int) -> None:
        """Move to a larger cache if these tokens do not fit: branches fed unequal numbers of tokens
        are padded to the largest number."""
        old = self._cache
        if old.length + tokens <= old.capacity:
            return
        dtype, device = old.keys[0].dtype, old.keys[0].device
        capacity = 2 * (old.length + tokens)
        self._cache = KVCache(self._model.config, self._rows, capacity, dtype, device)
        for held, new in ((old.keys, self._cache.keys), (old.values, self._cache.values)):
            for one, other in zip(held, new, strict=True):
                other[:, :, : old.length] = one[:, :, : old.length]
        self._cache.advance(old.length)

    def _run(self, embedded: Tensor, position: Tensor, branch: Tensor, causal: Tensor) -> Tensor:
        one_tree = torch.zeros((), dtype=torch.int64, device=embedded.device)
        seen = tree_visibility(
            one_tree.expand(branch.shape), branch, one_tree.expand(self._branch.shape),
            self._branch, causal,
        )  # fmt: skip
        mask = additive_mask(seen, embedded.dtype)
        return self._model(embedded, position, mask, self._cache)
