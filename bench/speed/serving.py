"""Many requests at once: through the scheduler, one after another, and in fixed batches.

All requests are present from the beginning, and all images of a model take as many steps. So fixed
batches are at their best here: their rows are all at one position, and a step reads and writes
views of the cache where the scheduler's gathers. A scheduler's purpose is that later requests need
not wait for a batch to end; `echogen.bench.speed.arrivals` measures that. Codes are compared before
anything is timed. Usual steps may differ from drawing one by one where codes are within rounding;
batch-invariant steps draw every request, to the last bit, as if it were alone.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from echogen.bench.harness import WrongResult, alternate, environment, quantiles, threads
from echogen.engine.cpu.native import NativeTransformer
from echogen.engine.decoding.decode import Progress, decode_image
from echogen.engine.decoding.jacobi import Method
from echogen.engine.decoding.sampler import Sampler, Sampling
from echogen.engine.engine import Engine
from echogen.engine.layout import Layout
from echogen.engine.serving.scheduler import Scheduler
from echogen.train.data.scenes import load_scenes

KINDS = (
    Sampling(temperature=0.3),
    Sampling(temperature=1.0, cfg=5.0),
    Sampling(temperature=0.7, top_k=100, top_p=0.95),
    Sampling(temperature=0.7, cfg=3.0),
)
SAMPLES = 3
"""A request is for 1 to this many images."""
SCHEDULER = "scheduler"
CODES, INVARIANT = "scheduler, code by code", "scheduler, batch-invariant"
ALONE, DEFAULT, STATIC = "one by one", "one by one, several codes a step", "fixed batches"
FOR_ONE = (SCHEDULER, CODES, INVARIANT, ALONE, DEFAULT)
"""Providers that are also timed with a single image. Batch-invariant steps cost most there, because
empty slots run too."""
MOST_DIFFERENT = 0.05
"""Share of the images that may differ by rounding before a result counts as wrong."""


@dataclass(frozen=True)
class Asked:
    """A request."""

    layout: Layout
    seed: int
    sampling: Sampling
    samples: int

    @property
    def rows(self) -> int:
        """Slots that it takes."""
        return self.samples * (1 + self.sampling.guided)


Draw = Callable[[list[Asked]], list[Tensor]]
"""Draws requests and returns the codes [samples, T] of each."""


def measure(
    model: str = "tiny",
    requests: int = 24,
    slots: int = 16,
    repeats: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time the same requests each way, in turn, on one CPU thread in float32; JSON-ready.

    Args:
        model: what ``Engine.from_pretrained`` takes.
        requests: layouts of ShapesWorld's test split, with settings of ``KINDS`` and 1 to
            ``SAMPLES`` images each.
        slots: most rows in a step, of the scheduler and of the fixed batches.
        repeats: timed runs of each.
        seed: of the settings and of the noise.
        progress: called with (runs done, runs in all).

    Returns:
        ``results``, one object per provider: seconds for all requests (median, quantiles 0.2 and
        0.8), images and codes per second, and ``different``, the number of images unlike those
        drawn one by one; ``ratio``, each other provider's time over the scheduler's (medians over
        the pairs); and ``ratio_alone``, the same for one image without guidance that has the slots
        to itself.

    Raises:
        WrongResult: pictures differ from those drawn one by one or, in batch-invariant mode, bits
            depend on the other requests; nothing was timed.
        ValueError: requests, repeats or slots are out of range.
        CheckpointError: there is no such checkpoint.
    """
    if requests < 1 or repeats < 1:
        raise ValueError(f"requests = {requests}, repeats = {repeats}; both must be at least 1")
    if slots < 2 * SAMPLES:
        raise ValueError(f"slots = {slots}; {SAMPLES} guided images take {2 * SAMPLES}")
    engine = Engine.from_pretrained(model)
    asked = mixed(requests, seed)
    with threads(1):
        providers = contestants(engine, asked, slots)
        different = check({name: partial(draw, asked) for name, draw in providers.items()})
        single = [replace(asked[0], sampling=KINDS[0], samples=1)]
        draws = {name: partial(draw, asked) for name, draw in providers.items()}
        for_one = [name for name in FOR_ONE if name in providers]
        draws |= {f"{name}, one image": partial(providers[name], single) for name in for_one}
        for name in for_one:
            draws[f"{name}, one image"]()  # the others were warmed up by the check
        total, done = repeats * len(draws), itertools.count(1)
        times = alternate(draws, repeats, lambda: progress(next(done), total) if progress else None)
    images, tokens = sum(a.samples for a in asked), engine.transformer.config.image_tokens
    prompts = [len(engine.prompts.l2i(a.layout)) for a in asked]
    said = {"model": model, "dtype": "float32", "threads": 1, "requests": requests}
    said |= {"images": images, "image_tokens": tokens, "slots": slots, "repeats": repeats}
    said |= {"seed": seed, "prompt_tokens": [min(prompts), max(prompts)]}
    results = [
        {"provider": name, "different": different[name], **_rates(times[name], images, tokens)}
        for name in different
    ]
    ours, our_one = times[SCHEDULER], times[f"{SCHEDULER}, one image"]
    ratios = {
        "ratio": {n: _ratio(times[n], ours) for n in different if n != SCHEDULER},
        "ratio_alone": {n: _ratio(times[f"{n}, one image"], our_one) for n in for_one[1:]},
    }
    return said | environment() | {"results": results} | ratios


def mixed(count: int, seed: int) -> list[Asked]:
    """Return requests of all kinds, in random order."""
    rng = random.Random(seed)
    return [
        Asked(scene.layout(), rng.randrange(1 << 32), rng.choice(KINDS), rng.randint(1, SAMPLES))
        for scene in load_scenes("test", count)
    ]


def contestants(engine: Engine, asked: list[Asked], slots: int) -> dict[str, Draw]:
    """Return each way to draw such requests. Schedulers are made here, and used for every run.
    Raises WrongResult (`check_invariance`)."""
    longest = max(len(engine.prompts.l2i(a.layout)) for a in asked)

    def alone(decoding: Method, asked: list[Asked]) -> list[Tensor]:
        return [
            engine.generate_codes(
                [a.layout] * a.samples, a.seed, sampling=a.sampling, decoding=decoding
            )
            for a in asked
        ]

    made = partial(Scheduler, engine, slots, len(asked), prompt_tokens=longest)
    usual, codes, invariant = made(), made(windows=False), made(invariant=True)
    check_invariance(invariant, asked)
    found: dict[str, Draw] = {
        SCHEDULER: lambda asked: scheduled(usual, asked),
        CODES: lambda asked: scheduled(codes, asked),
        INVARIANT: lambda asked: scheduled(invariant, asked),
        ALONE: partial(alone, "sequential"),
        DEFAULT: partial(alone, "auto"),
        STATIC: lambda asked: in_batches(engine, asked, slots),
    }
    if isinstance(engine.decoder, NativeTransformer):  # it draws one code per step by default
        del found[CODES], found[DEFAULT]
    return found


def scheduled(scheduler: Scheduler, asked: list[Asked]) -> list[Tensor]:
    """Draw all requests at once through a scheduler."""
    made = [scheduler.submit(a.layout, a.seed, a.sampling, a.samples) for a in asked]
    while scheduler.step():
        pass
    return [request.result() for request in made]


class Together(Sampler):
    """The samplers of several requests as one, each on its rows of a batch."""

    def __init__(self, samplers: list[Sampler], counts: list[int]) -> None:
        self.sampling, self._samplers, self._counts = samplers[0].sampling, samplers, counts
        self.draws = torch.cat([sampler.draws for sampler in samplers])

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        """See `Sampler`."""
        halves = [
            half.split(self._counts) for half in logits.chunk(2 if self.sampling.guided else 1)
        ]
        rows = [torch.cat(parts) for parts in zip(*halves, strict=True)]
        drawn = zip(self._samplers, rows, strict=True)
        return torch.cat([sampler(part, step) for sampler, part in drawn])


def in_batches(engine: Engine, asked: list[Asked], slots: int) -> list[Tensor]:
    """Draw requests in order, in batches of up to ``slots`` rows. Those with and those without
    guidance are separate: `decode_image` takes rows of one kind."""
    found: dict[int, Tensor] = {}
    for guided in (False, True):
        mine = [i for i, a in enumerate(asked) if a.sampling.guided == guided]
        while mine:
            count = fitting([asked[i] for i in mine], slots)
            batch, mine = mine[:count], mine[count:]
            codes = one_batch(engine, [asked[i] for i in batch])
            found |= zip(batch, codes, strict=True)
    return [found[i] for i in range(len(asked))]


def fitting(asked: list[Asked], slots: int) -> int:
    """Return how many of the first requests fit into a batch of at most ``slots`` rows."""
    rows = itertools.accumulate(a.rows for a in asked)
    return sum(1 for _ in itertools.takewhile(lambda total: total <= slots, rows))


def one_batch(engine: Engine, asked: list[Asked], progress: Progress | None = None) -> list[Tensor]:
    """Draw requests of one kind, with guidance or without, together; return the codes of each.
    ``progress`` is as for `decode_image`."""
    c = engine.transformer.config
    pairs = [engine.prompt_rows([a.layout], a.sampling) for a in asked]
    counts = [a.samples for a in asked]
    prompts = [
        prompt
        for half in zip(*pairs, strict=True)
        for prompt, count in zip(half, counts, strict=True)
        for _ in range(count)
    ]
    samplers = [
        Sampler(a.sampling, a.seed, torch.arange(a.samples), c.codebook_size, c.image_tokens)
        for a in asked
    ]
    sampler, pad = Together(samplers, counts), engine.prompts.pad
    codes = decode_image(engine.decoder, engine.code_table, prompts, sampler, pad, progress)
    return list(codes.split(counts))


def check_invariance(scheduler: Scheduler, asked: list[Asked]) -> None:
    """Check that a request draws the same codes alone as among all of them. Raises WrongResult."""
    together = scheduled(scheduler, asked)
    for each, codes in zip(asked, together, strict=True):
        if not torch.equal(scheduled(scheduler, [each])[0], codes):
            raise WrongResult(
                f"seed {each.seed} draws other codes alone than in the crowd, in batch-invariant "
                f"mode; nothing was timed"
            )


def check(draws: dict[str, Callable[[], list[Tensor]]]) -> dict[str, int]:
    """Count the images of each provider that differ from those drawn one by one. Raises
    WrongResult.
    """
    wanted = draws[ALONE]()
    different = {}
    for name, draw in draws.items():
        pairs = list(zip(draw(), wanted, strict=True))
        different[name] = sum(int((a != b).any(-1).sum()) for a, b in pairs)
        images = sum(map(len, wanted))
        if different[name] > MOST_DIFFERENT * images:
            raise WrongResult(
                f"{name} drew {different[name]} of {images} pictures otherwise; nothing was timed"
            )
    return different


def _rates(times: list[float], images: int, tokens: int) -> dict[str, float]:
    spread = quantiles(times)
    return {f"seconds_{name}": value for name, value in spread.items()} | {
        "images_per_s": images / spread["median"],
        "tokens_per_s": images * tokens / spread["median"],
    }


def _ratio(times: list[float], to: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, to, strict=True))


def table(result: dict[str, Any]) -> Table:
    """Format the result of ``measure`` for people."""
    shown = Table(
        title=f"{result['requests']} requests, {result['images']} images, {result['slots']} slots "
        f"({result['model']}, {result['dtype']})"
    )
    shown.add_column("provider")
    headings = ("images/s", "tokens/s", "seconds", "q20 … q80", "its time / ours", "of one image")
    for heading in headings:
        shown.add_column(heading, justify="right")
    ratios, single = ({SCHEDULER: 1.0} | result[name] for name in ("ratio", "ratio_alone"))
    for r in result["results"]:
        shown.add_row(
            r["provider"],
            f"{r['images_per_s']:.2f}",
            f"{r['tokens_per_s']:.0f}",
            f"{r['seconds_median']:.2f}",
            f"{r['seconds_q20']:.2f} … {r['seconds_q80']:.2f}",
            f"{ratios[r['provider']]:.2f}",
            f"{single[r['provider']]:.2f}" if r["provider"] in single else "",
        )
    return shown
