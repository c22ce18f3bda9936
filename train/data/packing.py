"""The packed training sequence of stage 1: trees of segments laid into rows, with their targets.

A tree is a trunk and branches. L2I is a trunk alone (prompt and image codes); I2L is a trunk
(image prefix) with one branch for each expression. `engine.model.tree_visibility` turns the tree
and branch numbers of a row into its mask: nothing passes from one tree to another, which is the
`isolated` mask of METHOD.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from echogen.engine.layout import Box, Layout
from echogen.engine.prompt import Prompts

NO_TARGET = -100


@dataclass(frozen=True)
class Tree:
    """Segments of one task of one sample, flat.

    Attributes (lists of equal length):
        ids: text ids, or ``vocab_size + code`` for image codes.
        positions: RoPE positions.
        branch: 0 on the trunk, k on branch k.
        codes: the image code to predict here, or NO_TARGET.
        texts: the text id to predict here, or NO_TARGET.
    """

    ids: list[int]
    positions: list[int]
    branch: list[int]
    codes: list[int]
    texts: list[int]

    def __len__(self) -> int:
        return len(self.ids)


def l2i_tree(prompt: list[int], codes: np.ndarray, vocab_size: int) -> Tree:
    """Prompt and image codes; the loss is on image codes only."""
    n, t = len(prompt), len(codes)
    ids = prompt + (codes[:-1] + vocab_size).tolist()
    targets = [NO_TARGET] * (n - 1) + codes.tolist()
    length = n + t - 1
    return Tree(ids, list(range(length)), [0] * length, targets, [NO_TARGET] * length)


def i2l_tree(
    prompts: Prompts, codes: np.ndarray, questions: list[tuple[str, Box]], vocab_size: int
) -> Tree:
    """Image prefix and a branch for each (expression, box); the loss is on coordinates and
    ``</box>`` only."""
    before, after = prompts.i2l()
    ids = before + (codes + vocab_size).tolist() + after
    trunk = len(ids)
    positions, branch, texts = list(range(trunk)), [0] * trunk, [NO_TARGET] * trunk
    for k, (expr, box) in enumerate(questions, 1):
        question, answer = prompts.branch(expr), prompts.answer(box)
        ids += question + answer[:-1]
        length = len(question) + len(answer) - 1
        positions += range(trunk, trunk + length)
        branch += [k] * length
        texts += [NO_TARGET] * (len(question) - 1) + answer
    return Tree(ids, positions, branch, [NO_TARGET] * len(ids), texts)


@dataclass(frozen=True)
class Batch:
    """Packed rows, int64 [R, L] each; ``tree`` is -1 at padding."""

    ids: Tensor
    positions: Tensor
    tree: Tensor
    branch: Tensor
    codes: Tensor
    texts: Tensor


def pack(trees: list[Tree], row_tokens: int, pad: int) -> Batch:
    """Lay trees into as few rows of ``row_tokens`` as first-fit by falling length finds.

    ``row_tokens`` grows to the longest tree. On a CPU, attention over a dense mask makes long rows
    dear, so callers pass 0: rows as long as the longest tree.
    """
    row_tokens = max(row_tokens, max(map(len, trees)))
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(trees)), key=lambda i: -len(trees[i])):
        fitting = [r for r, free in enumerate(room) if free >= len(trees[i])]
        if not fitting:
            fitting = [len(rows)]
            rows.append([])
            room.append(row_tokens)
        rows[fitting[0]].append(i)
        room[fitting[0]] -= len(trees[i])
    fills = {"ids": pad, "positions": 0, "branch": 0, "codes": NO_TARGET, "texts": NO_TARGET}
    fields = {
        name: torch.tensor(
            [
                [v for i in row for v in getattr(trees[i], name)] + [fill] * free
                for row, free in zip(rows, room, strict=True)
            ]
        )
        for name, fill in fills.items()
    }
    tree = torch.tensor(
        [
            [i for i in row for _ in range(len(trees[i]))] + [-1] * n
            for row, n in zip(rows, room, strict=True)
        ]
    )
    return Batch(tree=tree, **fields)


def l2i_prompt(
    prompts: Prompts, layout: Layout, dropout: float, rng: np.random.Generator
) -> list[int]:
    """The L2I prompt, or with probability ``dropout`` its unconditional form."""
    ids = prompts.l2i(layout)
    return prompts.unconditional(ids) if rng.random() < dropout else ids
