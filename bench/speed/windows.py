"""The cost of a step of several codes beside a step of one, and a projected time per image.

The cost depends only on shapes, so unlike acceptance it can be measured with random weights. How
many codes a step yields depends on training. For an untrained model, an image's time is therefore a
projection, from what `echogen.bench.speed.jacobi` counted with a trained one.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from echogen.bench.harness import environment, quantiles, seconds
from echogen.bench.harness import threads as using
from echogen.bench.report import RESULTS
from echogen.bench.speed.models import Subject, dtype_of, load
from echogen.engine.decoding.decode import Decoder, Windows, decode_image, open_windows
from echogen.engine.decoding.jacobi import decode_windows
from echogen.engine.decoding.sampler import Sampler, Sampling
from echogen.engine.engine import on_operators
from echogen.engine.gpu.device import DeviceTransformer
from echogen.engine.gpu.graphs import StepCache

WINDOWS = (1, 2, 4, 8, 16, 32)
CODES = 17
"""Codes of an image drawn to time one code per step on a CPU: prefill, and sixteen steps."""
STEPS = 4
"""Steps in windows that are timed together."""
TRAINED = RESULTS / "jacobi-tiny-cpu.json"


class WindowError(ValueError):
    """A window does not fit into an image."""


def run(
    model: str = "tiny",
    windows: Sequence[int] = WINDOWS,
    batch: int = 1,
    cfg: float = 5.0,
    dtype: str = "float32",
    device: str = "cpu",
    repeats: int = 5,
    threads: int | None = None,
    seed: int = 0,
    trained: Path = TRAINED,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Time steps in turn, from the middle of an image, including sampling at temperature 1.

    Args:
        model: what ``Engine.from_pretrained`` takes, or a random model (``models.RANDOM``).
        windows: codes W per step.
        batch, cfg: images at once, and the guidance scale.
        dtype, device: of the weights, and where. On a GPU whole images are drawn, with recorded
            steps: a step's time is the image's over their number.
        repeats: how often each is timed.
        threads: on a CPU; None leaves torch's number.
        seed: of random weights, prompts and noise.
        trained: a result of `echogen bench engine --mode jacobi` to project from.
        progress: called with (rounds done, rounds in all).

    Returns:
        JSON-ready: ``ms_sequential``, a step of one code; ``windows``, for each ``ms_per_step``
        with quantiles and ``ratio``, its time over that of a step of one code, median over the
        rounds. ``projection``, where ``trained`` has that window and scale at temperature 1, for
        its test layouts and for the crowded ones: codes per step there and, if this model's drafts
        were as good, an image's milliseconds and the speed-up over one code per step.

    Raises:
        ValueError: the model or dtype is unknown.
        WindowError: a window is more than half an image.
        CheckpointError: there is no such checkpoint.
    """
    kind = dtype_of(dtype)
    single, several = list[float](), {width: list[float]() for width in windows}
    with using(threads), torch.inference_mode():
        used = torch.get_num_threads()
        subject = load(model, batch, seed, False, device).to(device, kind)
        tokens = subject.transformer.config.image_tokens
        for width in windows:
            if not 1 <= width <= tokens // 2:
                raise WindowError(f"window {width}: this model's are 1 to {tokens // 2} codes")
        drawing = _Drawing(subject, batch, cfg, seed, 1 + len(windows))
        for done in range(-1, repeats):  # the first round warms up
            spent = drawing.one_by_one(), [drawing.in_windows(w) for w in windows]
            if done >= 0:
                single.append(spent[0])
                for width, took in zip(windows, spent[1], strict=True):
                    several[width].append(took)
            progress(done + 1, repeats)
    alone = statistics.median(single)
    rows = []
    for width, times in several.items():
        spread = quantiles(times)
        ratio = statistics.median(t / s for t, s in zip(times, single, strict=True))
        row = {"window": width, "ms_per_step": 1e3 * spread["median"], "ratio": ratio}
        row |= {f"ms_per_step_{q}": 1e3 * spread[q] for q in ("q20", "q80")}
        rows.append(row | {"projection": _projected(trained, width, cfg, tokens, alone, ratio)})
    asked = {"mode": "window", "model": model, "dtype": dtype, "batch": batch, "cfg": cfg}
    asked |= {"image_tokens": tokens, "repeats": repeats, "threads": used, "seed": seed}
    return asked | environment(device) | {"ms_sequential": 1e3 * alone, "windows": rows}


class _Drawing:
    """One batch that can be drawn code by code, and run in windows at the middle of its images."""

    def __init__(self, subject: Subject, batch: int, cfg: float, seed: int, steps: int) -> None:
        s, self._subject = subject, subject
        self._rows = s.rows(s.prompts[:batch], cfg)
        self._sampling, self._seed, self._batch = Sampling(cfg=cfg), seed, batch
        self._model: Decoder = on_operators(s.transformer, s.code_table)
        c = s.transformer.config
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(c.codebook_size, (batch, c.image_tokens), generator=generator)
        self._codes, self._made = codes.to(s.code_table.device), self._sampler()
        if isinstance(self._model, DeviceTransformer):
            self._model.steps = StepCache[Any](steps)  # all, or recording would be timed
            return
        self._windows: Windows = open_windows(
            self._model, s.code_table, self._rows, s.pad, self._sampling.guided
        )
        self._windows.prefill()
        half = c.image_tokens // 2
        for first in range(0, half, 16):  # codes before the window
            here = self._codes[:, first : min(first + 16, half)]
            self._windows.window(here, [first] * batch)

    def _sampler(self) -> Sampler:
        c, device = self._subject.transformer.config, self._subject.code_table.device
        draws = torch.arange(self._batch, device=device)
        return Sampler(self._sampling, self._seed, draws, c.codebook_size, c.image_tokens)

    def in_windows(self, width: int) -> float:
        """Return the seconds per step of ``width`` codes, sampling included, in a sequence of
        steps. The first step after other work is not timed, since its weights are no longer in the
        cache."""
        if isinstance(self._model, DeviceTransformer):
            s, steps = self._subject, list[int]()

            def draw() -> None:
                drawn = decode_windows(
                    self._model, s.code_table, self._rows, self._sampler(), s.pad, width
                )
                steps.append(max(drawn.steps))  # which waits for the device

            return seconds(draw) / steps[0]
        self._window(width)
        began = time.perf_counter()
        for _ in range(STEPS):
            self._window(width)
        return (time.perf_counter() - began) / STEPS

    def _window(self, width: int) -> list[list[int]]:
        half = self._codes.shape[1] // 2
        logits = self._windows.window(self._codes[:, half : half + width], [half] * self._batch)
        places = torch.arange(half + 1, half + 1 + width, device=logits.device)
        positions = places.clamp(max=self._codes.shape[1] - 1).expand(self._batch, width)
        found: list[list[int]] = self._made.pick(
            self._made.scores(logits, positions), positions
        ).tolist()
        return found

    def one_by_one(self) -> float:
        """Return the seconds per step of one code, sampling included."""
        s, tokens = self._subject, self._codes.shape[1]
        if isinstance(self._model, DeviceTransformer):  # its steps are only queued

            def draw() -> Tensor:
                codes = decode_image(self._model, s.code_table, self._rows, self._sampler(), s.pad)
                torch.cuda.synchronize()
                return codes

            return seconds(draw) / tokens
        stamps = list[float]()

        def told(done: int, total: int) -> None:
            stamps.append(time.perf_counter())
            if done == CODES:
                raise _Enough

        with suppress(_Enough):
            decode_image(self._model, s.code_table, self._rows, self._sampler(), s.pad, told)
        return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


class _Enough(Exception):
    """Raised when enough of an image is drawn."""


def _projected(
    trained: Path, width: int, cfg: float, tokens: int, single: float, ratio: float
) -> dict[str, Any] | None:
    if not trained.is_file():
        return None
    record = json.loads(trained.read_text())
    for row in record["settings"]:
        if (row["temperature"], row["cfg"], row["window"]) == (1.0, cfg, width):
            break
    else:
        return None
    told: dict[str, Any] = {"from": record["model"], "temperature": 1.0}
    for name, part in (("test", row), ("crowded", row["crowded"])):
        each = part["steps_sequential"] / part["steps_jacobi"]
        told[name] = {
            "codes_a_step": each,
            "ms_per_image": 1e3 * single * ratio * tokens / each,
            "times_as_fast": each / ratio,
        }
    return told


def table(result: dict[str, Any]) -> Table:
    """Format the result of ``run`` for people."""
    shown = Table(
        title=f"Steps of several codes: {result['model']} ({result['dtype']}, batch "
        f"{result['batch']}, cfg {result['cfg']:g}); of one code {result['ms_sequential']:.3f} ms",
        caption="projected: were its drafts as good as those of the trained model named",
    )
    for heading in ("codes a step", "ms a step", "q20 … q80", "times one code's",
                    "projected from", "codes a step there", "ms an image", "times as fast",
                    "crowded: times as fast"):  # fmt: skip
        shown.add_column(heading, justify="right")
    for r in result["windows"]:
        told, cells = r["projection"], [""] * 5
        if told is not None:
            cells = [
                told["from"],
                f"{told['test']['codes_a_step']:.2f}",
                f"{told['test']['ms_per_image']:.0f}",
                f"{told['test']['times_as_fast']:.2f}",
                f"{told['crowded']['times_as_fast']:.2f}",
            ]
        shown.add_row(
            str(r["window"]),
            f"{r['ms_per_step']:.3f}",
            f"{r['ms_per_step_q20']:.3f} … {r['ms_per_step_q80']:.3f}",
            f"{r['ratio']:.2f}",
            *cells,
        )
    return shown
