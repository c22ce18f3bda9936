"""Packed training sequences: trees of segments in rows, with their targets.

A tree is a trunk and branches. L2I is a trunk alone (prompt and image codes), or, where one prompt
was drawn several times, a trunk (prompt) with one branch for each image; I2L is a trunk (image
prefix) with one branch for each expression. `visibility` turns the tree and branch numbers
of a row into its mask: nothing passes from one tree to another, which is the `isolated`
mask. The `shared` mask uses a third kind of tree, in which both tasks read one image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from echogen.engine.flex import BLOCK, BlockMask
from echogen.engine.layout import Box
from echogen.engine.model import tree_visibility
from echogen.engine.prompt import Prompts
from echogen.train.data.rows import cheapest

NO_TARGET = -100
FIELDS = ("ids", "positions", "branch", "codes", "texts")
BRANCH, CODES = FIELDS.index("branch"), FIELDS.index("codes")
SHARED_PROMPT, SHARED_IMAGE = -1, -2
"""Branch numbers of a `shared_tree`'s prompt and image, see `visibility`."""


@dataclass(frozen=True)
class Tree:
    """Segments of one task of one sample, flat.

    Attributes:
        table: int64 [5, n], a row for each of FIELDS: ``ids``, text ids, or ``vocab_size + code``
            for image codes; ``positions`` of RoPE; ``branch``, 0 on the trunk, k on branch k, in a
            `shared_tree` also SHARED_PROMPT and SHARED_IMAGE; ``codes`` and ``texts``, the image
            code or the text id to predict here, or NO_TARGET.
        image: the positions whose ids are image codes, from left to right.
    """

    table: np.ndarray
    image: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        return self.table.shape[1]

    def field(self, name: str) -> list[int]:
        """One of FIELDS."""
        found: list[int] = self.table[FIELDS.index(name)].tolist()
        return found


def segment(
    ids: Sequence[int] | np.ndarray,
    first: int,
    branch: int = 0,
    codes: int | np.ndarray = NO_TARGET,
) -> np.ndarray:
    """A segment's table: ids at the positions from ``first`` on."""
    table = np.empty((len(FIELDS), len(ids)), np.int64)
    table[0], table[1], table[2] = ids, np.arange(first, first + len(ids)), branch
    table[CODES], table[-1] = codes, NO_TARGET
    return table


def image_ids(codes: np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids int64 of image codes of any dtype (data sets store them in a narrow one)."""
    return codes.astype(np.int64) + vocab_size


def l2i_tree(prompt: list[int], codes: np.ndarray, vocab_size: int) -> Tree:
    """Prompt and image codes; the loss is on image codes only."""
    n = len(prompt)
    table = segment(np.concatenate((prompt, image_ids(codes[:-1], vocab_size))), 0)
    table[CODES, n - 1 :] = codes
    return Tree(table, range(n, table.shape[1]))


def l2i_group_tree(prompt: list[int], codes: np.ndarray, vocab_size: int) -> Tree:
    """A prompt and several images of it, codes [G, T]: the sequences of G `l2i_tree` that share one
    copy of the prompt.

    The prompt's last token predicts each image's first code, so it begins every branch.
    """
    (group, t), trunk = codes.shape, len(prompt) - 1
    ids = np.concatenate((np.full((group, 1), prompt[-1]), image_ids(codes[:, :-1], vocab_size)), 1)
    images = [segment(ids[g], trunk, g + 1, codes[g]) for g in range(group)]
    held = trunk + np.arange(group * t).reshape(group, t)[:, 1:]
    return Tree(np.concatenate([segment(prompt[:-1], 0), *images], 1), held.ravel())


def i2l_tree(
    prompts: Prompts, codes: np.ndarray, questions: list[tuple[str, Box]], vocab_size: int
) -> Tree:
    """Image prefix and a branch for each (expression, box); the loss is on coordinates and
    ``</box>`` only."""
    before, after = prompts.i2l()
    trunk = segment(np.concatenate((before, image_ids(codes, vocab_size), after)), 0)
    image = range(len(before), len(before) + len(codes))
    return Tree(_with_branches(trunk, prompts, questions), image)


def shared_tree(
    prompts: Prompts,
    prompt: list[int],
    codes: np.ndarray,
    questions: list[tuple[str, Box]],
    vocab_size: int,
) -> Tree:
    """Both tasks over one image (mask `shared`): prompt, image codes, the rest of the I2L
    trunk, branches. The questions do not see the prompt, but the image they see has seen it."""
    n, t, after = len(prompt), len(codes), prompts.i2l()[1]
    trunk = segment(np.concatenate((prompt, image_ids(codes, vocab_size), after)), 0)
    trunk[BRANCH, :n], trunk[BRANCH, n : n + t] = SHARED_PROMPT, SHARED_IMAGE
    trunk[CODES, n - 1 : n + t - 1] = codes
    return Tree(_with_branches(trunk, prompts, questions), range(n, n + t))


def _with_branches(
    trunk: np.ndarray, prompts: Prompts, questions: list[tuple[str, Box]]
) -> np.ndarray:
    if not questions:
        return trunk
    first = trunk.shape[1]
    ids, positions, branch, texts = list[int](), list[int](), list[int](), list[int]()
    for k, (expr, box) in enumerate(questions, 1):
        question, answer = prompts.branch(expr), prompts.answer(box)
        ids += question + answer[:-1]
        length = len(question) + len(answer) - 1
        positions += range(first, first + length)
        branch += [k] * length
        texts += [NO_TARGET] * (len(question) - 1) + answer
    codes = [NO_TARGET] * len(ids)
    return np.concatenate((trunk, np.array([ids, positions, branch, codes, texts], np.int64)), 1)


@dataclass(frozen=True)
class Batch:
    """Packed rows, int64 [R, L] each; ``tree`` is -1 at padding.

    The attributes below are places in the flattened rows, int64 [n] each, in the order of the trees
    and from left to right in each. Finding them with a mask on a GPU would force a synchronisation.

    Attributes:
        code_at, text_at: places that predict an image code, or a text id.
        image_at: places that hold an image code.
    """

    ids: Tensor
    positions: Tensor
    tree: Tensor
    branch: Tensor
    codes: Tensor
    texts: Tensor
    code_at: Tensor
    text_at: Tensor
    image_at: Tensor

    def at(self, name: str, places: Tensor) -> Tensor:
        """The values of the field ``name`` at flattened ``places``."""
        rows: Tensor = getattr(self, name)
        return rows.flatten()[places]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device. It is copied to a GPU from pinned memory, without
        synchronisation."""
        if device == self.ids.device:
            return self
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        if device.type == "cuda":
            parts = {name: part.pin_memory() for name, part in parts.items()}
        return Batch(**{n: part.to(device, non_blocking=True) for n, part in parts.items()})


def pack(trees: list[Tree], pad: int, *, blocks: bool = False) -> Batch:
    """Pack trees into rows, each tree whole within one row; ``blocks``: see `cheapest`."""
    return lay(trees, *cheapest(list(map(len, trees)), blocks), pad)


def lay(trees: list[Tree], rows: list[list[int]], row_tokens: int, pad: int) -> Batch:
    """Make rows of ``row_tokens`` from the trees that each holds, given by their numbers."""
    shape = len(rows), row_tokens
    table = np.empty((len(FIELDS), *shape), np.int64)
    table[:] = np.array([pad, 0, 0, NO_TARGET, NO_TARGET])[:, None, None]
    numbers = np.full(shape, -1, np.int64)
    begins = [0] * len(trees)
    for r, row in enumerate(rows):
        first = 0
        for i in row:
            here = slice(first, first + len(trees[i]))
            table[:, r, here], numbers[r, here] = trees[i].table, i
            begins[i] = r * row_tokens + first
            first = here.stop
    place = np.concatenate(
        [np.arange(b, b + len(tree)) for b, tree in zip(begins, trees, strict=True)]
    )
    image = [np.array(tree.image, np.int64) + b for b, tree in zip(begins, trees, strict=True)]
    fields = dict(zip(FIELDS, table, strict=True))
    codes, texts = (fields[name].ravel()[place] != NO_TARGET for name in ("codes", "texts"))
    fields |= {"tree": numbers, "code_at": place[codes], "text_at": place[texts]}
    fields["image_at"] = np.concatenate(image)
    return Batch(**{name: torch.from_numpy(field) for name, field in fields.items()})


def visibility(batch: Batch) -> Tensor:
    """Which keys each query sees, bool [R, L, L].

    That is `tree_visibility`; and in a `shared_tree` everything sees the image before it, while
    only the prompt itself and the image see the prompt.
    """
    length = batch.ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=batch.ids.device).tril()
    seen = tree_visibility(batch.tree, batch.branch, batch.tree, batch.branch, causal)
    query, key = batch.branch.unsqueeze(-1), batch.branch.unsqueeze(-2)
    image = key == SHARED_IMAGE
    if not image.is_cuda and not image.any():  # on a GPU this would wait
        return seen
    same = batch.tree.unsqueeze(-1) == batch.tree.unsqueeze(-2)
    shared = image | ((key == SHARED_PROMPT) & (query == SHARED_IMAGE))
    return seen | (causal & same & shared)


def visible(batch: Batch) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`visibility` in FlexAttention's form, for one pair of positions: (row, head, query, key) →
    bool."""
    tree, branch = batch.tree, batch.branch

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own, other = branch[row, query], branch[row, key]
        image = other == SHARED_IMAGE
        image_reads = (own == SHARED_IMAGE) & (other == SHARED_PROMPT)
        branches = (other == 0) | (other == own) | image | image_reads
        return (query >= key) & (tree[row, query] == tree[row, key]) & branches

    return sees


def block_mask(batch: Batch) -> BlockMask:
    """`visibility` on the batch's device, in blocks; FlexAttention skips the empty ones.

    Making it needs a few bytes for each pair of positions in a row, once per batch and not once per
    layer. It is made from counts over the dense mask, as torch's `create_block_mask` takes the host
    six times as long (a row of 384), and a GPU waits for it before the first layer.
    """
    rows, length = batch.ids.shape
    blocks = length // BLOCK
    seen = visibility(batch).view(rows, blocks, BLOCK, blocks, BLOCK).sum((2, 4)).unsqueeze(1)
    whole = seen == BLOCK * BLOCK
    some = (seen > 0) & ~whole
    return BlockMask.from_kv_blocks(
        *_listed(some), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=visible(batch),
        seq_lengths=(length, length),
    )  # fmt: skip


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of blocks, how many are marked, and the numbers of all, the marked ones first,
    in order."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()
