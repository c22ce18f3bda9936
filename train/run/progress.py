"""Display how far a run is and how fast it goes."""

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
"""The range of a packed batch's pass through the model; its ``tokens`` include padding."""
EVERY = 30.0
"""Seconds between the lines about data being made, if no terminal shows a bar."""


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
    """Rates since the start, of training steps only: evaluations and checkpoints are left out.

    Args:
        images: images per step, over all processes; None if unknown.
        processes: their number; tokens are counted in this one, and the others process as many.
    """

    def __init__(self, images: int | None, processes: int = 1) -> None:
        self._images, self._processes, self._meter = images, processes, Meter()
        self._steps, self._seconds, self._tokens = 0, 0.0, 0
        self._first: float | None = None
        self._began = self._ended = 0.0

    @property
    def meter(self) -> Meter:
        """The listener to use while steps run."""
        return self._meter

    def start(self) -> None:
        """Mark the beginning of a step."""
        self._began, self._meter.tokens = time.perf_counter(), 0
        if self._first is None:
            self._first = self._began

    def stop(self, wait: bool = False) -> None:
        """Mark the end of a step. A step that is logged waits for the device, or the work still
        queued there would not be counted; the others need not, since the next one waits for
        them."""
        if wait and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._ended = time.perf_counter()
        self._seconds += self._ended - self._began
        self._steps += 1
        self._tokens += self._meter.tokens

    @property
    def step(self) -> float:
        """Seconds per step."""
        return self._seconds / max(1, self._steps)

    def left(self, steps: int) -> float:
        """Estimated seconds for ``steps`` more steps, with evaluations and checkpoints between them
        as before."""
        return (self._ended - (self._first or 0.0)) / max(1, self._steps) * steps

    def rates(self) -> dict[str, float]:
        """Images and tokens per second of the steps (tokens include padding and frozen passes), and
        the peak memory of this process."""
        each = max(self.step, 1e-9)
        tokens = self._tokens * self._processes / max(1, self._steps)
        found = {"tokens_per_s": tokens / each}
        if self._images is not None:
            found["images_per_s"] = self._images / each
        found["memory_mib"] = peak_memory() / 2**20
        return {name: value for name, value in found.items() if value}


def peak_memory() -> int:
    """Peak memory in bytes: of the device if any was allocated there, else of this process."""
    # torch.compile initialises CUDA if there is a GPU, even for what runs on the CPU.
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
    """Loss, reward if there is one, and the rates, in one line."""
    parts = [f"{k} {float(numbers[k]):.4f}" for k in ("loss", "reward") if k in numbers]
    forms = {"tokens_per_s": "{:,.0f} tokens/s", "images_per_s": "{:,.1f} images/s"}
    parts += [form.format(rates[name]) for name, form in forms.items() if name in rates]
    return "  ".join([*parts, f"{rates['memory_mib']:,.0f} MiB"])


@contextmanager
def telling(
    doing: str, what: str, total: int, done: int, kept: Path, large: bool
) -> Iterator[Callable[[int], None]]:
    """Show the progress of data being made: a line if it is ``large``, then a bar on a terminal,
    and a line every half minute elsewhere.

    Args:
        doing, what: for example "encoding", "train pictures".
        total: number of items.
        done: number of items that exist already.
        kept: the file that saves the next run the work.
        large: whether to print a line at once, and not only after half a minute.

    Yields:
        A function to call with the number of items made since the last call.
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
    """A duration in readable form, rounded."""
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.0f} {name}"
    return f"about {seconds:.0f} s"
