"""Plans memory before anything is drawn: how many slots fit in what is free.

All that a scheduler will ever hold is computed from the model's shapes: a cache allocated once, and
the temporary tensors of a step, of a prompt and of a picture at their worst. A test compares the
sum with tensors counted while drawing (`tests/engine/test_budget.py`).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import torch

from echogen.engine.cache import PREFIX_BYTES
from echogen.engine.config import ModelConfig
from echogen.engine.decoding.sampler import Sampler
from echogen.engine.serving.prefill import FORWARD, PROMPTS
from echogen.engine.serving.slots import WINDOW_ROWS, row_counts, up_to_edge, widths

SHARE = 0.8
"""Share of the free memory to plan with; the rest is for whatever else runs on the machine."""
MOST = {"cpu": 16, "cuda": 256}
"""Most slots unless a number is given, even where memory has room for more: more rows make a step
little more efficient and every image slower."""
PROMPT_TOKENS = 1024
"""Most tokens of a prompt unless a number is given, even where the model has room for more: with
Janus-Pro's 15,808 a slot would take 3 GiB."""
FLOAT, WORD = 4, 8  # bytes of a float32, and of an int64 or a float64

CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)  # fmt: skip
"""For both versions of Linux's control groups: their folder, the files with a container's limit and
with what it uses, and the entry of memory.stat that says how much of that is cached files."""


class BudgetError(ValueError):
    """What is asked for does not fit in memory; the message names both and the fix."""


class NoRoom(BudgetError):
    """The slots do not fit in memory.

    Attributes:
        what: what does not fit, and in how much memory. The fix is not part of it, as it reads
            differently in Python and in a shell.
        prompt_tokens: the longest prompt that the slots would have room for.
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
        prefix_bytes: for the prefixes of prompts that recur.
        slot_bytes: for a slot's cache and its share of a step.
        shared_bytes: for what exists once: prompts being run, the prefixes kept, a picture being
            decoded.
        memory: bytes that were planned with.
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
        """Bytes of everything."""
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
    together: bool = False,
) -> Plan:
    """Plan slots and bytes for a model.

    Args:
        config, dtype, device: of the weights.
        picture_bytes: memory that decoding one picture takes, `vision.decoding_bytes`.
        slots: None: as many as fit, ``MOST`` at most.
        memory: bytes to plan with; None: ``SHARE`` of what is free now.
        prompt_tokens: the longest prompt; None: what the model has room for, at most
            ``PROMPT_TOKENS``.
        fp8_cache: slots hold 8 bits per number, and a scale for each head of a token.
        windows: while there are few images, they are drawn several codes a step
            (`serving.windows`).
        together: several prompts are run in one forward (`serving.prefill`).

    Raises:
        NoRoom: fewer slots fit than asked for, or none.
        BudgetError: fewer than one slot is asked for, the model has no room for the prompt, or the
            free memory is not known.
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
    # Room for the prefixes of prompts that recur: at least two of the longest.
    one = 2 * c.layers * c.kv_heads * longest * c.head_dim * dtype.itemsize
    prefix_bytes = max(PREFIX_BYTES, 2 * (one + c.codebook_size * dtype.itemsize))
    once = _prompts(c, dtype.itemsize, longest, together) + prefix_bytes + picture_bytes

    def planned(count: int) -> Plan:  # a slot costs more when there are more of them
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
    """Bytes of a row's temporary tensors in a step: those of a layer and the image head, and those
    made from the keys of ``capacity`` tokens and from its logits."""
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim
    layer = (8 * c.width + 3 * heads + 4 * c.mlp_width + 4 * c.head_width) * FLOAT
    attention = 3 * (c.heads + c.kv_heads) * capacity * FLOAT
    sampling = c.codebook_size * (6 * FLOAT + 3 * WORD)  # guidance, sorting with indices, cumsum
    return layer, attention + sampling


def _slot(c: ModelConfig, head: int, capacity: int, rows: int, blocks: int) -> int:
    """Bytes of one of ``rows`` slots: its cache, with ``head`` bytes per head of a token, and a
    row's share of a step, of sampling and of noise, of which it needs ``blocks`` blocks at a
    time."""
    cache = 2 * c.layers * c.kv_heads * capacity * head
    # A row goes through one layer at a time. On a CPU, buffers are made for several numbers of
    # rows; together they take (rows/8 + 2) times a row's own, which is 4 times for 16 slots.
    layer, passing = _row(c, capacity)
    noise = min(Sampler.BLOCK, c.codebook_size * c.image_tokens)
    return cache + int(max(4, rows / 8 + 2) * layer) + passing + blocks * noise * FLOAT


def _windows(c: ModelConfig, capacity: int, slots: int) -> int:
    """Bytes of steps of several codes: the buffers of all of them, and one step while it runs."""
    layer, passing = _row(c, capacity)
    shapes = widths(row_counts(min(slots, WINDOW_ROWS), False), c.image_tokens)
    counts = [rows * codes for rows, codes in shapes.items()]
    return sum(counts) * layer + max(counts, default=0) * (layer + passing)


def _prompts(c: ModelConfig, size: int, longest: int, together: bool) -> int:
    """Bytes of prompts while they run, and of the noise while a block of it is made."""
    # Alone, a prompt runs beside the other one of its request. Those that are together are copied
    # from a padded forward: the last of them may be two of the longest.
    forward = max(longest, FORWARD) if together else longest
    held = PROMPTS + 2 * longest + forward if together else 2 * longest
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim
    row = (8 * c.width + 3 * heads + 4 * c.mlp_width) * FLOAT
    scores = 3 * (c.heads + c.kv_heads) * longest * FLOAT
    noise = 8 * Sampler.BLOCK * FLOAT
    return 2 * c.layers * c.kv_heads * held * c.head_dim * size + forward * (row + scores) + noise


def free_bytes(device: torch.device) -> int:
    """Bytes of a device's memory that this process could still take."""
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
    """What is left below a container's limit; None where there is no limit. Cached files, whose
    memory would be given back (a checkpoint just loaded), do not count as used."""
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
