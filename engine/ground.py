"""Finding: all expressions of an image in parallel, each on a branch of its own.

The image is a trunk that every branch sees; branches never see each other, so the answer depends
neither on their order nor on their number. With the location codec a box costs four steps of the
model, the first of which is the prefill; `</box>` is forced and never decoded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from echogen.engine.cache import KVCache
from echogen.engine.layout import Box
from echogen.engine.model import UnifiedTransformer, additive_mask, tree_visibility
from echogen.engine.prompt import Prompts
from echogen.engine.ranges import span


@torch.inference_mode()
def ground_images(
    model: UnifiedTransformer,
    prompts: Prompts,
    image: Tensor,
    expressions: list[list[str]],
) -> list[list[Box]]:
    """Find the box of every expression by grammar-constrained greedy decoding.

    Args:
        model: the transformer.
        prompts: builds the trunk and the branches.
        image: embedded images [B, T, D] (``embed_codes`` or ``embed_pixels``).
        expressions: for each of the B images, its K_b ≥ 1 expressions.

    Returns:
        For each image one normalised box an expression; a constrained decode always parses.
    """
    with span("engine/ground", batch=len(expressions), branches=sum(map(len, expressions))):
        return _ground(model, prompts, image, expressions)


def _ground(
    model: UnifiedTransformer, prompts: Prompts, image: Tensor, expressions: list[list[str]]
) -> list[list[Box]]:
    branches = [[prompts.branch(e) for e in row] for row in expressions]
    state = Branches(model, prompts, image, branches)
    answers: list[list[list[int]]] = [[[] for _ in row] for row in branches]
    logits = state.prefill()
    for step in range(prompts.codec.steps):
        tokens = _choose(logits, prompts, answers)
        if tokens is None:
            break
        if any(prompts.codec.allowed(tuple(a)) for row in answers for a in row):
            logits = state.step(tokens, step)
    boxes = [[prompts.codec.parse(a) for a in row] for row in answers]
    assert all(box is not None for row in boxes for box in row), "the grammar let a non-box through"
    return [[box for box in row if box is not None] for row in boxes]


def _choose(logits: Tensor, prompts: Prompts, answers: list[list[list[int]]]) -> Tensor | None:
    """Extend every unfinished answer by its most likely allowed token; None when all are done."""
    b, k, _ = logits.shape
    tokens = torch.full((b, k), prompts.pad, dtype=torch.int64)
    scores, moved = logits.float().cpu(), False
    for i, row in enumerate(answers):
        for j, answer in enumerate(row):
            allowed = prompts.codec.allowed(tuple(answer))
            if not allowed:
                continue
            choice = allowed[int(scores[i, j, allowed].argmax())]
            answer.append(choice)
            tokens[i, j] = choice
            moved = True
    return tokens.to(logits.device) if moved else None


class Branches:
    """The cache of B trunks with K branches each, and what every cached token belongs to.

    Args:
        model, prompts: the transformer, and what builds the trunk.
        image: embedded images [B, T, D].
        branches: for each image, the ids of its K_b questions; K is the most of them.
    """

    def __init__(
        self,
        model: UnifiedTransformer,
        prompts: Prompts,
        image: Tensor,
        branches: list[list[list[int]]],
    ) -> None:
        self._model, self._image = model, image
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
        capacity = trunk + longest + self._width * prompts.codec.steps
        self._cache = KVCache(model.config, self._rows, capacity, image.dtype, device)

    def prefill(self) -> Tensor:
        """Run trunk and questions; text logits at the end of every branch [B, K, vocab]."""
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
        return self._model.text_head(hidden[rows, last])

    def step(self, tokens: Tensor, step: int) -> Tensor:
        """Feed one token [B, K] to every branch; text logits [B, K, vocab]."""
        fed, held = tokens.numel(), self._branch.numel() + tokens.numel()
        with span("engine/ground/step", rows=fed, tokens=fed, held=held, step=step):
            return self._step(tokens, step)

    def _step(self, tokens: Tensor, step: int) -> Tensor:
        branch = torch.arange(1, self._width + 1, device=tokens.device).expand(self._rows, -1)
        self._branch = torch.cat((self._branch, branch), 1)
        cached = self._branch.shape[1] - self._width
        new = torch.eye(self._width, dtype=torch.bool, device=tokens.device)
        old = torch.ones(self._width, cached, dtype=torch.bool, device=tokens.device)
        embedded = self._model.embed_text(tokens)
        hidden = self._run(embedded, self._next + step, branch, torch.cat((old, new), 1))
        return self._model.text_head(hidden)

    def _run(self, embedded: Tensor, position: Tensor, branch: Tensor, causal: Tensor) -> Tensor:
        one_tree = torch.zeros((), dtype=torch.int64, device=embedded.device)
        seen = tree_visibility(
            one_tree.expand(branch.shape), branch, one_tree.expand(self._branch.shape),
            self._branch, causal,
        )  # fmt: skip
        mask = additive_mask(seen, embedded.dtype)
        return self._model(embedded, position, mask, self._cache)
