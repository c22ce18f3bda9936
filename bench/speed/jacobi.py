"""Several codes per step against one code per step: equal codes, number of steps, and time.

Acceptance depends on the weights, so random ones are refused. Plain background is easy to predict
and would flatter the result. Object codes are therefore counted separately, and so are layouts that
leave little ground free, of which ShapesWorld itself has none.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from echogen.bench.harness import environment, seconds, threads
from echogen.bench.speed.models import dtype_of
from echogen.engine.decoding.decode import Progress, decode_image
from echogen.engine.decoding.jacobi import Draft, WindowDrawing, decode_windows, default_window
from echogen.engine.decoding.sampler import Sampler, Sampling
from echogen.engine.engine import Engine
from echogen.engine.gpu.device import DeviceTransformer
from echogen.engine.gpu.graphs import StepCache
from echogen.engine.layout import Layout
from echogen.train.data.scenes import load_scenes
from echogen.train.data.shapes import COLORS, GROUND, IMAGE_SIZE, SHAPES, TEXTURES, Object, Scene
from echogen.train.eval.tables import layouts_of

TEMPERATURES, SCALES = (0.3, 0.7, 1.0), (1.0, 5.0)
CROWDED_COVER = 0.6
"""Least share of the canvas that the boxes of a crowded layout cover."""
FAR = 40
"""Difference from the ground's colour, in levels of 255, that no tokenizer's blur explains."""


def run(
    model: str = "tiny",
    *,
    layouts: int = 200,
    windows: Sequence[int] = (),
    drafts: Sequence[Draft] = ("above",),
    temperatures: Sequence[float] = TEMPERATURES,
    scales: Sequence[float] = SCALES,
    batch: int = 1,
    dtype: str = "float32",
    seed: int = 0,
    progress: Progress | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Draw layouts of ShapesWorld's test split, and a quarter as many crowded ones, in every way.

    Args:
        model: what ``Engine.from_pretrained`` takes.
        layouts: number from the test split.
        windows, drafts: as in `decode_windows`; no windows: its default.
        temperatures, scales: every combination is a setting.
        batch: layouts drawn at once.
        dtype: of the weights, float32 or bfloat16.
        seed: of the noise.
        progress: called with (groups of layouts drawn, groups in all).
        device: of the weights; on a CPU one thread draws.

    Returns:
        JSON-ready; ``settings`` holds one object for each temperature, scale, window and draft (see
        ``_Tally.report``), and ``identical`` is true if all of them drew the sequential codes.

    Raises:
        ValueError: random weights, an unknown dtype or draft, or a count or window below 1.
        CheckpointError: there is no such checkpoint.
    """
    if model.startswith("random:"):
        raise ValueError(f"model = {model!r}; acceptance on random weights means nothing")
    kind = dtype_of(dtype)
    for name, value in [("layouts", layouts), ("batch", batch), *(("window", w) for w in windows)]:
        if value < 1:
            raise ValueError(f"{name} = {value}; it must be at least 1")
    for draft in drafts:
        if draft not in get_args(Draft):
            raise ValueError(f"draft = {draft!r}; choose one of {get_args(Draft)}")
    engine = Engine.from_pretrained(model, device=device, dtype=kind)
    sets = [
        _Pictures.of(load_scenes("test", layouts), engine),
        _Pictures.of(crowded_scenes(max(1, layouts // 4)), engine),
    ]
    grid = list(itertools.product(temperatures, scales))
    total = len(grid) * sum(-(-len(s.layouts) // batch) for s in sets)
    done = itertools.count(1)
    found = []
    with threads(1):
        for temperature, cfg in grid:
            sampling = Sampling(temperature=temperature, cfg=cfg)
            usual = default_window(batch * (1 + sampling.guided))
            ways = list(itertools.product(windows or (usual,), drafts))
            if isinstance(engine.decoder, DeviceTransformer):
                # Keep the steps of all ways, of code by code, and of windows of one code. If one
                # were dropped, recording it again would be timed.
                engine.decoder.steps = StepCache[Any](2 + len(ways))
            tallies = [_Tally(sampling, *way) for way in ways]
            for pictures in sets:
                for group in pictures.groups(batch):
                    _draw(engine, pictures, group, sampling, seed, tallies)
                    if progress is not None:
                        progress(next(done), total)
            found += [tally.report(sets) for tally in tallies]
    asked = {"mode": "jacobi", "model": model, "dtype": dtype, "batch": batch, "threads": 1}
    asked |= {"layouts": layouts, "crowded_layouts": len(sets[1].layouts), "seed": seed}
    return (
        asked
        | environment(device)
        | {"identical": all(row["identical"] for row in found), "settings": found}
    )


def crowded_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Return scenes of the test split that are nearly full: one object in each quarter of the
    canvas.
    """
    half = IMAGE_SIZE // 2
    least = int(np.ceil((CROWDED_COVER / 4) ** 0.5 * IMAGE_SIZE))
    scenes, rng = list[Scene](), np.random.default_rng(seed)
    while len(scenes) < count:
        kinds = rng.permutation(len(SHAPES) * len(COLORS))[:4].tolist()
        objects = []
        for kind, (left, top) in zip(kinds, itertools.product((0, half), repeat=2), strict=True):
            w, h = rng.integers(least, half - 1, 2).tolist()
            x, y = left + int(rng.integers(half - w + 1)), top + int(rng.integers(half - h + 1))
            texture = TEXTURES[int(rng.integers(len(TEXTURES)))]
            shape, color = SHAPES[kind % len(SHAPES)], COLORS[kind // len(SHAPES)]
            objects.append(Object(shape, color, texture, (x, y, x + w, y + h)))
        scene = Scene(tuple(objects[i] for i in rng.permutation(4)))
        if scene.split() == "test":
            scenes.append(scene)
    return scenes


@dataclass(frozen=True)
class _Pictures:
    """Layouts, the codes that an object's box touches bool [N, T], and the share of the canvas that
    boxes cover [N]."""

    layouts: list[Layout]
    on_object: Tensor
    cover: np.ndarray
    codes: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, scenes: list[Scene], engine: Engine) -> _Pictures:
        side = engine.transformer.config.grid
        pixels = np.zeros((len(scenes), IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        cells = np.zeros((len(scenes), side, side), dtype=bool)
        for canvas, grid, scene in zip(pixels, cells, scenes, strict=True):
            for x1, y1, x2, y2 in (o.box for o in scene.objects):
                canvas[y1:y2, x1:x2] = True
                left, top = x1 * side // IMAGE_SIZE, y1 * side // IMAGE_SIZE
                right, bottom = -(-x2 * side // IMAGE_SIZE), -(-y2 * side // IMAGE_SIZE)
                grid[top:bottom, left:right] = True
        on_object = torch.from_numpy(cells.reshape(len(scenes), -1))
        return cls(layouts_of(scenes, 0), on_object, pixels.mean((1, 2)))

    def groups(self, batch: int) -> Iterator[range]:
        """Yield the indices of layouts that are drawn together."""
        for first in range(0, len(self.layouts), batch):
            yield range(first, min(first + batch, len(self.layouts)))


@dataclass(frozen=True)
class _Reference:
    """One group of layouts drawn code by code: by `decode_image`, in ``seconds``, and in the
    arithmetic of windows. ``covers`` is the share of each picture that is not ground."""

    codes: Tensor
    same_arithmetic: Tensor
    seconds: float
    covers: list[float]


@dataclass
class _Seen:
    """Counts of one way of drawing on one set of layouts."""

    drafted: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    covers: list[float] = field(default_factory=list)
    times: list[tuple[float, float]] = field(default_factory=list)


class _Tally:
    """One setting, drawn with one window and draft."""

    def __init__(self, sampling: Sampling, window: int, draft: Draft) -> None:
        self.sampling, self.window, self.draft = sampling, window, draft
        self.different, self.different_bits, self.images = 0, 0, 0
        self.seen = dict[int, _Seen]()

    def add(
        self, pictures: _Pictures, reference: _Reference, drawing: WindowDrawing, spent: float
    ) -> None:
        """Count one group, drawn in ``spent`` seconds."""
        self.different += int((drawing.codes != reference.codes).any(1).sum())
        self.different_bits += int((drawing.codes != reference.same_arithmetic).any(1).sum())
        self.images += len(drawing.codes)
        seen = self.seen.setdefault(id(pictures), _Seen())
        seen.drafted.append(drawing.drafted.cpu())
        seen.steps += drawing.steps
        seen.forwards.append(max(drawing.steps))
        seen.covers += reference.covers
        seen.times.append((reference.seconds, spent))

    def report(self, sets: list[_Pictures]) -> dict[str, Any]:
        """Return the figures of this setting.

        Per image they have ``steps_sequential`` and ``steps_jacobi`` (forwards of the transformer,
        including the prompt's) and the median milliseconds. ``identical`` says whether all codes
        equal those of `decode_image`. ``different`` counts the images that differ, and
        ``different_in_same_arithmetic`` those that differ from one code per step in the same
        arithmetic. ``acceptance`` is the share of codes taken from a draft. ``ratio`` is the median
        over drawings of the ratio of times. ``crowded`` has the same for crowded layouts.
        ``forwards`` are those of a batch, which is done when its last image is.
        """
        tests, crowded = (self._of(self.seen[id(s)], s) for s in sets)
        return {
            "temperature": self.sampling.temperature,
            "cfg": self.sampling.cfg,
            "window": self.window,
            "draft": self.draft,
            "images": self.images,
            "identical": self.different == 0,
            "different": self.different,
            "different_in_same_arithmetic": self.different_bits,
            **tests,
            "crowded": crowded,
        }

    @staticmethod
    def _of(seen: _Seen, pictures: _Pictures) -> dict[str, Any]:
        drafted, on_object = torch.cat(seen.drafted), pictures.on_object
        steps = torch.tensor(seen.steps, dtype=torch.float64)
        each = 1e3 * len(seen.times) / len(seen.steps)
        return {
            "steps_sequential": drafted.shape[1],
            "steps_jacobi": float(steps.mean()),
            "steps_jacobi_max": int(steps.max()),
            "forwards": statistics.mean(seen.forwards),
            "acceptance": {
                "all": float(drafted.double().mean()),
                "object": float(drafted[on_object].double().mean()),
                "background": _mean(drafted[~on_object]),
            },
            "box_cover": float(pictures.cover.mean()),
            "drawn_cover": statistics.mean(seen.covers),
            "ms_sequential": statistics.median(one for one, _ in seen.times) * each,
            "ms_jacobi": statistics.median(several for _, several in seen.times) * each,
            "ratio": statistics.median(one / several for one, several in seen.times),
        }


def _mean(flags: Tensor) -> float | None:
    return float(flags.double().mean()) if len(flags) else None


def _draw(
    engine: Engine,
    pictures: _Pictures,
    group: range,
    sampling: Sampling,
    seed: int,
    tallies: list[_Tally],
) -> None:
    """Draw one group of layouts code by code, and then in every tallied way."""
    c, embeddings, pad = engine.transformer.config, engine.code_table, engine.prompts.pad
    prompts = engine.prompt_rows([pictures.layouts[i] for i in group], sampling)
    draws = torch.tensor(group, device=embeddings.device)
    drawn: list[Any] = [None]

    def sampler() -> Sampler:
        return Sampler(sampling, seed, draws, c.codebook_size, c.image_tokens)

    def one_by_one() -> None:
        drawn[0] = decode_image(engine.decoder, embeddings, prompts, sampler(), pad)
        if embeddings.is_cuda:  # its steps are only queued
            torch.cuda.synchronize()

    def several(window: int, draft: Draft) -> None:
        made = sampler()
        drawn[0] = decode_windows(engine.decoder, embeddings, prompts, made, pad, window, draft)

    if embeddings.is_cuda:  # steps of this shape are recorded at the first drawing
        one_by_one()
        for tally in tallies:
            several(tally.window, tally.draft)
    spent = seconds(one_by_one)
    codes: Tensor = drawn[0]
    several(1, "above")
    reference = _Reference(codes, drawn[0].codes, spent, _covers(engine, codes))
    for tally in tallies:
        spent = seconds(partial(several, tally.window, tally.draft))
        tally.add(pictures, reference, drawn[0], spent)


def _covers(engine: Engine, codes: Tensor) -> list[float]:
    """Return the share of each picture's pixels that are far from the ground's colour."""
    pixels = np.stack([np.asarray(image, dtype=np.int16) for image in engine.decode(codes)])
    far = np.abs(pixels - np.array(GROUND, dtype=np.int16)).max(-1) > FAR
    return [float(share) for share in far.mean((1, 2))]


def table(result: dict[str, Any]) -> Table:
    """Format the result of ``run`` for people."""
    same = "identical codes" if result["identical"] else "DIFFERENT codes"
    shown = Table(
        title=f"{result['model']} ({result['dtype']}, batch {result['batch']}, "
        f"{result['layouts']} layouts, {result['crowded_layouts']} crowded): {same}"
    )
    for heading in ("temp.", "cfg", "window", "draft", "different", "steps", "accepted", "object"):
        shown.add_column(heading, justify="right")
    for heading in ("ms/image", "one by one", "ratio", "crowded: steps", "accepted", "ratio"):
        shown.add_column(heading, justify="right")
    for r in result["settings"]:
        shown.add_row(
            f"{r['temperature']:g}",
            f"{r['cfg']:g}",
            str(r["window"]),
            r["draft"],
            f"{r['different']} of {r['images']}",
            f"{r['steps_jacobi']:.1f} of {r['steps_sequential']}",
            f"{r['acceptance']['all']:.2f}",
            f"{r['acceptance']['object']:.2f}",
            f"{r['ms_jacobi']:.1f}",
            f"{r['ms_sequential']:.1f}",
            f"{r['ratio']:.2f}",
            f"{r['crowded']['steps_jacobi']:.1f}",
            f"{r['crowded']['acceptance']['all']:.2f}",
            f"{r['crowded']['ratio']:.2f}",
        )
    return shown
