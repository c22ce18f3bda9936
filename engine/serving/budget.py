"""Memory planned before anything is drawn: how many slots the free memory holds.

What a scheduler will ever hold is counted by arithmetic from the model's shapes: a cache made once,
and at their worst the passing tensors of a step, of a prompt and of a picture. A test holds the sum
against tensors counted while drawing (`tests/engine/test_scheduler.py`).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import torch

from echogen.engine.cache import PREFIX_BYTES
from echogen.engine.config import ModelConfig
from echogen.engine.decoding.sampler import Sampler
from echogen.engine.serving.slots import WINDOW_ROWS, row_counts, up_to_edge, widths

SHARE = 0.8
"""Of the free memory that is planned with; the rest is for what else happens on the machine."""
MOST = {"cpu": 16, "cuda": 256}
"""Slots where memory has room for more and nobody asked for a number: more rows give a step little
speed and every image a longer wait."""
PROMPT_TOKENS = 1024
"""Of the longest prompt where nobody asked for a number and the model has room for more:
Janus-Pro's 15,808 would make a slot of 3 GiB."""
FLOAT, WORD = 4, 8  # bytes of a float32, and of an int64 or a float64

CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)  # fmt: skip
"""Folder and files of a container's limit, what it uses, and what of that are files; of both
versions of Linux's control groups."""


class BudgetError(ValueError):
    """What is asked for does not fit the memory; the message names both and the mend."""


class NoRoom(BudgetError):
    """The memory does not hold the slots.

    Attributes:
        what: does not fit into what. The mend is named otherwise in Python than in a shell.
        prompt_tokens: the longest prompt they would be made for.
    """

    def __init__(self, what: str, prompt_tokens: int, windows: bool) -> None:
        super().__init__(
            f"{what}; ask for fewer slots, shorter prompts (prompt_tokens, now {prompt_tokens})"
            f"{', windows=False' * windows} or more memory"
        )
        self.what, self.prompt_tokens = what, prompt_tokens


@dataclass(frozen=True)
class Plan:
    """What a scheduler may use.

    Attributes:
        slots: rows of the cache.
        capacity: tokens a slot holds.
        prompt_tokens: the longest prompt, ``capacity`` less the image.
        prefix_bytes: for the prefixes of prompts that come again.
        slot_bytes: of a slot's cache and of its share in a step.
        shared_bytes: of what there is once: a prompt being run, prefixes kept, a picture decoded.
        memory: bytes planned with.
    """

    slots: int
    capacity: int
    prompt_tokens: int
    prefix_bytes: int
    slot_bytes: int
    shared_bytes: int
    memory: int

    @property
    def bytes(self) -> int:
        """Of everything."""
        return self.shared_bytes + self.slots * self.slot_bytes


def plan(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    picture_bytes: int,
    slots: int | None = None,
    memory: int | None = None,
    prompt_tokens: int | None = None,
    fp8_cache: bool = False,
    windows: bool = False,
) -> Plan:
    """Slots and bytes for a model.

    Args:
        config, dtype, device: of the weights.
        picture_bytes: while one is decoded, `vision.decoding_bytes`.
        slots: None: as many as fit, ``MOST`` at most.
        memory: bytes to plan with; None: ``SHARE`` of what is free now.
        prompt_tokens: the longest prompt; None: what the model has room for, at most
            ``PROMPT_TOKENS``.
        fp8_cache: slots hold 8 bits a number, and a scale for each head of a token.
        windows: few images are drawn several codes a step (`serving.windows`).

    Raises:
        NoRoom: fewer slots fit than asked for, or none.
        BudgetError: no slots, a prompt the model has no room for, or memory that is not known.
    """
    c, room = config, config.max_positions - config.image_tokens
    longest = min(room, PROMPT_TOKENS) if prompt_tokens is None else prompt_tokens
    if not 1 <= longest <= room:
        raise BudgetError(f"prompt_tokens = {longest}; this model has room for 1 … {room}")
    if slots is not None and slots < 1:
        raise BudgetError(f"slots = {slots}; it must be at least 1")
    # The image's last code is drawn and not appended.
    capacity = up_to_edge(longest + c.image_tokens - 1)
    most = MOST.get(device.type, 16)
    head = c.head_dim + FLOAT if fp8_cache else c.head_dim * dtype.itemsize
    # For the prefixes of prompts that come again: two of the longest at least.
    one = 2 * c.layers * c.kv_heads * longest * c.head_dim * dtype.itemsize
    prefix_bytes = max(PREFIX_BYTES, 2 * (one + c.codebook_size * dtype.itemsize))
    once = _prompt(c, dtype.itemsize, longest) + prefix_bytes + picture_bytes

    def planned(count: int) -> Plan:  # a slot costs the more, the more there are
        rows = count if device.type == "cpu" else 1
        each = _slot(c, head, capacity, rows, 1 + windows)
        shared = once + (_windows(c, capacity, count) if windows else 0)
        return Plan(count, capacity, longest, prefix_bytes, each, shared, budget)

    budget = int(SHARE * free_bytes(device)) if memory is None else memory
    counts = range(1, (slots or most) + 1)
    fitting = bisect_right(counts, budget, key=lambda count: planned(count).bytes)
    needed = planned(slots or 1)
    if fitting < needed.slots:
        many = f"{needed.slots} slots" if needed.slots > 1 else "1 slot"
        raise NoRoom(
            f"{many} of {capacity} tokens would take {_mib(needed.bytes)}, but only {_mib(budget)} "
            f"may be used, in which {fitting} fit",
            longest, windows,
        )  # fmt: skip
    return planned(slots or fitting)


def _row(c: ModelConfig, capacity: int) -> tuple[int, int]:
    """Bytes of what a row of a step passes through: a layer and the image head, and what is made
    of the keys of ``capacity`` tokens and of its logits."""
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim
    layer = (8 * c.width + 3 * heads + 4 * c.mlp_width + 4 * c.head_width) * FLOAT
    attention = 3 * (c.heads + c.kv_heads) * capacity * FLOAT
    sampling = c.codebook_size * (6 * FLOAT + 3 * WORD)  # guided, sorted with places, added up
    return layer, attention + sampling


def _slot(c: ModelConfig, head: int, capacity: int, rows: int, blocks: int) -> int:
    """Bytes of one of ``rows`` slots: cache, with ``head`` bytes a head of a token, a row's part of
    a step, of its sampling and of its noise, of which it needs so many ``blocks`` at a time."""
    cache = 2 * c.layers * c.kv_heads * capacity * head
    # A row goes through one layer at a time; on a CPU buffers are made for several numbers of rows,
    # which add up to a row's own times (rows/8 + 2), 4 for 16 slots.
    layer, passing = _row(c, capacity)
    noise = min(Sampler.BLOCK, c.codebook_size * c.image_tokens)
    return cache + int(max(4, rows / 8 + 2) * layer) + passing + blocks * noise * FLOAT


def _windows(c: ModelConfig, capacity: int, slots: int) -> int:
    """Bytes of steps of several codes: buffers of all, and one on its way."""
    layer, passing = _row(c, capacity)
    shapes = widths(row_counts(min(slots, WINDOW_ROWS), False), c.image_tokens)
    counts = [rows * codes for rows, codes in shapes.items()]
    return sum(counts) * layer + max(counts, default=0) * (layer + passing)


def _prompt(c: ModelConfig, size: int, length: int) -> int:
    """Bytes of the longest prompt while it runs, or of the noise while a block of it is made."""
    cache = 2 * c.layers * c.kv_heads * length * c.head_dim * size
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim
    row = (8 * c.width + 3 * heads + 4 * c.mlp_width) * FLOAT
    scores = 3 * (c.heads + c.kv_heads) * length * FLOAT
    noise = 8 * Sampler.BLOCK * FLOAT
    return 2 * cache + length * (row + scores) + noise


def free_bytes(device: torch.device) -> int:
    """Memory of a device that this process could still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    free = min(filter(None, (_available(), _container())), default=0)
    if not free:
        raise BudgetError(
            "memory = None; this system does not say how much is free, so say how much to plan with"
        )
    return free


def _available() -> int | None:
    """The kernel's estimate of what can be taken without swapping; None where it gives none."""
    source = Path("/proc/meminfo")
    lines = source.read_text().splitlines() if source.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _container() -> int | None:
    """What is left below the limit of a container; None where there is none. Files that were read
    and would be given back (a checkpoint, just loaded) are not counted as used."""
    for folder, limit, used, files in CGROUPS:
        if not (folder / limit).exists() or not (folder / used).exists():
            continue
        if (most := (folder / limit).read_text().strip()) == "max":
            return None
        stat = folder / "memory.stat"
        lines = [line.split() for line in stat.read_text().splitlines()] if stat.exists() else []
        cached = sum(int(value) for name, value in lines if name == files)
        return max(1, int(most) - int((folder / used).read_text()) + cached)
    return None


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
