"""How far a run is and how fast it goes, for those who watch it."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PASS = "train/pass"


class Meter:
    """Counts the tokens that pass through the model; a `Listener` of `engine.ranges`."""

    def __init__(self) -> None:
        self.tokens = 0

    def begin(self, category: str, payload: dict[str, int]) -> None:
        """See `Listener`."""
        if category == PASS:
            self.tokens += payload.get("tokens", 0)

    def end(self) -> None:
        """See `Listener`."""


class Pace:
    """Rates since the start, training steps alone: evaluations and checkpoints are left out.

    Args:
        images: images a step, over all processes; None where that is not known.
        processes: how many; tokens are counted in this one, and the others take as many.
    """

    def __init__(self, images: int | None, processes: int = 1) -> None:
        self._images, self._processes, self._meter = images, processes, Meter()
        self._steps, self._seconds, self._tokens = 0, 0.0, 0
        self._began = 0.0

    @property
    def meter(self) -> Meter:
        """To listen with while steps run."""
        return self._meter

    def start(self) -> None:
        """A step begins."""
        self._began, self._meter.tokens = time.perf_counter(), 0

    def stop(self, wait: bool = False) -> None:
        """And ends. A step that is logged waits for the device, or the work still queued there
        would pass for none; the others need not, since the next one waits for them."""
        if wait and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._seconds += time.perf_counter() - self._began
        self._steps += 1
        self._tokens += self._meter.tokens

    @property
    def step(self) -> float:
        """Seconds a step."""
        return self._seconds / max(1, self._steps)

    def rates(self) -> dict[str, float]:
        """Per second: steps' images and, padding and frozen passes included, tokens; and the memory
        of this process at its highest."""
        each = max(self.step, 1e-9)
        tokens = self._tokens * self._processes / max(1, self._steps)
        found = {"tokens_per_s": tokens / each}
        if self._images is not None:
            found["images_per_s"] = self._images / each
        found["memory_mib"] = peak_memory() / 2**20
        return {name: value for name, value in found.items() if value}


def peak_memory() -> int:
    """Bytes at the highest: of the device where there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def progress_bar(console: Console, name: str, steps: int, start: int) -> Progress:
    """A bar with the steps, the time left and a note, while the console is a terminal."""
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(
        *columns,
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )
    bar.add_task(name, total=steps, completed=start, note="")
    return bar


def note(numbers: dict[str, Any], rates: dict[str, float]) -> str:
    """Loss, reward where there is one, and the rates, in one line."""
    parts = [f"{k} {float(numbers[k]):.4f}" for k in ("loss", "reward") if k in numbers]
    forms = {"tokens_per_s": "{:,.0f} tokens/s", "images_per_s": "{:,.1f} images/s"}
    parts += [form.format(rates[name]) for name, form in forms.items() if name in rates]
    return "  ".join([*parts, f"{rates['memory_mib']:,.0f} MiB"])
