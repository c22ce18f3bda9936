"""How far a run is and how fast it goes, for those who watch it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PASS = "train/pass"
"""The range of a packed batch's way through the model; its ``tokens`` have padding among them."""
EVERY = 30.0
"""Seconds between the lines about data that is made, where no terminal shows a bar."""


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
        self._first: float | None = None
        self._began = self._ended = 0.0

    @property
    def meter(self) -> Meter:
        """To listen with while steps run."""
        return self._meter

    def start(self) -> None:
        """A step begins."""
        self._began, self._meter.tokens = time.perf_counter(), 0
        if self._first is None:
            self._first = self._began

    def stop(self, wait: bool = False) -> None:
        """And ends. A step that is logged waits for the device, or the work still queued there
        would pass for none; the others need not, since the next one waits for them."""
        if wait and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._ended = time.perf_counter()
        self._seconds += self._ended - self._began
        self._steps += 1
        self._tokens += self._meter.tokens

    @property
    def step(self) -> float:
        """Seconds a step."""
        return self._seconds / max(1, self._steps)

    def left(self, steps: int) -> float:
        """Seconds that so many more steps take, with evaluations and checkpoints between them as
        there have been."""
        return (self._ended - (self._first or 0.0)) / max(1, self._steps) * steps

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
    """Bytes at the highest: of the device where any was taken there, else of this process."""
    # torch.compile begins with CUDA where there is a GPU, also for what runs on the CPU.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        taken = torch.cuda.max_memory_allocated()
        if taken:
            return taken
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


@contextmanager
def telling(
    doing: str, what: str, total: int, done: int, kept: Path, large: bool
) -> Iterator[Callable[[int], None]]:
    """Tell those who wait what is made: a line if it is ``large``, then on a terminal a bar, and
    elsewhere a line every half minute.

    Args:
        doing, what: "encoding", "train pictures".
        total: how many of them.
        done: how many were there already.
        kept: the file that spares the next run the work.
        large: whether it is worth a line before it has taken half a minute.

    Yields:
        To be called with how many were made since the last call.
    """
    console = Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    if large:
        there = f" ({done:,} of them are there already)" if done else ""
        say(f"{doing} {total:,} {what}{there}, once: kept in {kept}")
    began = said = time.monotonic()
    columns = (TextColumn(f"{doing} {what}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task, made = bar.add_task(doing, total=total, completed=done), 0

        def tell(more: int) -> None:
            nonlocal made, said
            made += more
            bar.update(task, completed=done + made)
            now = time.monotonic()
            if not console.is_terminal and now - said >= EVERY and done + made < total:
                said = now
                left = (now - began) * (total - done - made) / made
                say(f"{doing} {what}: {done + made:,} of {total:,}, {duration(left)} left")

        yield tell


def duration(seconds: float) -> str:
    """About how long that is, for people."""
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.0f} {name}"
    return f"about {seconds:.0f} s"
