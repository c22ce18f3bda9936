"""Memory planned before anything is drawn: how many slots the free memory holds.

What a scheduler will ever hold is counted by arithmetic from the model's shapes: a cache made once,
and at their worst the passing tensors of a step, of a prompt and of a picture. A test holds the sum
against tensors counted while drawing (`tests/engine/test_scheduler.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from echogen.engine.config import ModelConfig
from echogen.engine.sampler import Sampler
from echogen.engine.slots import up_to_edge

SHARE = 0.8
"""Of the free memory that is planned with; the rest is for what else happens on the machine."""
MOST = {"cpu": 16, "cuda": 256}
"""Slots where memory has room for more and nobody asked for a number: more rows give a step little
speed and every image a longer wait."""
FLOAT, WORD = 4, 8  # bytes of a float32, and of an int64 or a float64


class BudgetError(ValueError):
    """What is asked for does not fit the memory; the message names both and the mend."""


@dataclass(frozen=True)
class Plan:
    """What a scheduler may use.

    Attributes:
        slots: rows of the cache.
        capacity: tokens a slot holds.
        prompt_tokens: the longest prompt, ``capacity`` less the image.
        slot_bytes: of a slot's cache and of its share in a step.
        shared_bytes: of what there is once: a prompt being run, prefixes kept, a picture decoded.
        memory: bytes planned with.
    """

    slots: int
    capacity: int
    prompt_tokens: int
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
    picture_channels: int,
    slots: int | None = None,
    memory: int | None = None,
    prompt_tokens: int | None = None,
    prefix_bytes: int = 1 << 26,
) -> Plan:
    """Slots and bytes for a model.

    Args:
        config, dtype, device: of the weights.
        picture_channels: of the image tokenizer's decoder where its pictures are full size.
        slots: None: as many as fit, ``MOST`` at most.
        memory: bytes to plan with; None: ``SHARE`` of what is free now.
        prompt_tokens: the longest prompt; None: what the model has room for.
        prefix_bytes: for the prefixes of prompts that come again.

    Raises:
        BudgetError: fewer slots fit than asked for, or none; a prompt the model has no room for.
    """
    c, room = config, config.max_positions - config.image_tokens
    longest = room if prompt_tokens is None else prompt_tokens
    if not 1 <= longest <= room:
        raise BudgetError(f"prompt_tokens = {longest}; this model has room for 1 … {room}")
    if slots is not None and slots < 1:
        raise BudgetError(f"slots = {slots}; it must be at least 1")
    # The image's last code is drawn and not appended.
    capacity = up_to_edge(longest + c.image_tokens - 1)
    each = _slot(c, dtype.itemsize, capacity)
    shared = _prompt(c, dtype.itemsize, longest) + prefix_bytes
    shared += 6 * c.image_size**2 * picture_channels * FLOAT  # a residual block, and to spare
    budget = int(SHARE * free_bytes(device)) if memory is None else memory
    fitting = max(0, (budget - shared) // each)
    if fitting < (slots or 1):
        raise BudgetError(
            f"{slots or 1} slots of {capacity} tokens take {_mib(shared + (slots or 1) * each)}, "
            f"and {_mib(budget)} are to be used, in which {fitting} fit; ask for fewer slots, "
            f"shorter prompts (prompt_tokens, now {longest}) or more memory"
        )
    count = min(fitting, MOST[device.type]) if slots is None else slots
    return Plan(count, capacity, longest, each, shared, budget)


def _slot(c: ModelConfig, size: int, capacity: int) -> int:
    """Bytes of a slot: cache, a row's part of a step, of its sampling and of its noise."""
    cache = 2 * c.layers * c.kv_heads * capacity * c.head_dim * size
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim
    # A row goes through one layer at a time; buffers are made for several numbers of rows, which
    # add up to a row's own times (rows/8 + 2), 4 for the 16 slots of a CPU.
    step = 4 * (8 * c.width + 3 * heads + 4 * c.mlp_width + 4 * c.head_width) * FLOAT
    attention = 3 * (c.heads + c.kv_heads) * capacity * FLOAT
    sampling = c.codebook_size * (6 * FLOAT + 3 * WORD)  # guided, sorted with places, added up
    noise = min(Sampler.BLOCK, c.codebook_size * c.image_tokens)
    return cache + step + attention + sampling + noise * FLOAT


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
        raise BudgetError("this system does not say how much memory is free; name memory in bytes")
    return free


def _available() -> int | None:
    """The kernel's estimate of what can be taken without swapping; None where it gives none."""
    source = Path("/proc/meminfo")
    lines = source.read_text().splitlines() if source.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _container() -> int | None:
    """What is left below the limit of a container; None where there is none."""
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if not limit.exists() or not used.exists() or (most := limit.read_text().strip()) == "max":
        return None
    return max(1, int(most) - int(used.read_text()))


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
