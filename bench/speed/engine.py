"""Tokens per second of this engine and the transformers port: same weights, machine and sampling.

Each side runs at its own best thread count (and the port with its better cache). Greedy codes are
compared before anything is timed; then the two draw in turn. Between drawings, this engine keeps
the prefixes of unconditional prompts and its packed weights, and it runs equal prompts of a batch
once; the port does none of this.
"""

from __future__ import annotations

import os
import statistics
from functools import partial
from typing import Any, Literal, get_args

import torch
from rich.table import Table
from torch import Tensor

from echogen.bench.harness import WrongResult, alternate, environment, quantiles, seconds, threads
from echogen.bench.peers.janus_port import CacheKind
from echogen.bench.registry import OURS
from echogen.bench.speed.contestants import PORT, Draw, waited
from echogen.bench.speed.models import Subject, load
from echogen.engine.decoding.decode import Packed, Progress, decode_image
from echogen.engine.decoding.sampler import Sampler, Sampling
from echogen.engine.engine import on_operators


def run(
    model: str = "tiny",
    peer: Literal["transformers", "none"] = "transformers",
    repeats: int = 5,
    batch: int = 1,
    cfg: float = 5.0,
    seed: int = 0,
    progress: Progress | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Time greedy drawing with guidance in float32; JSON-ready.

    Args:
        model: what ``Engine.from_pretrained`` takes, or a random model (``models.RANDOM``).
        peer: "none" times this engine alone.
        repeats: timed images per side.
        batch: images drawn at once.
        cfg: guidance scale; the port's loop only runs above 1.
        seed: of a random model's weights and prompts.
        progress: called with (repeats done, repeats in all).
        device: "cpu" or "cuda".

    Returns:
        ``results``, one object per provider (times of one batch of images, medians and quantiles
        0.2 and 0.8), ``ratio`` (this engine's speed over the port's, median over the pairs; None
        without a peer), and the settings and the environment. ``pack_ms`` is spent once per set of
        weights, not once per image.

    Raises:
        WrongResult: the port draws other codes; nothing was timed.
        ValueError: repeats or batch below 1, an unknown model or peer, guidance the port lacks.
        CheckpointError: there is no such checkpoint.
    """
    if repeats < 1 or batch < 1:
        raise ValueError(f"repeats = {repeats}, batch = {batch}; both must be at least 1")
    if peer not in (PORT, "none"):
        raise ValueError(f"peer = {peer!r}; choose 'transformers' or 'none'")
    if peer == PORT and not cfg > 1:
        raise ValueError(f"cfg = {cfg}; the port draws only with guidance, above 1")
    subject = load(model, batch, seed, with_port=peer == PORT).to(device)
    with threads(None):
        found = _compare(subject, cfg, repeats, progress)
    parameters = sum(p.numel() for p in subject.transformer.parameters())
    asked = {"model": model, "parameters": parameters, "dtype": "float32"}
    asked |= {"batch": batch, "cfg": cfg, "repeats": repeats, "seed": seed}
    return asked | environment(device) | found


def _compare(
    subject: Subject, cfg: float, repeats: int, progress: Progress | None
) -> dict[str, Any]:
    draws, pack = _contestants(subject, cfg)
    wanted = draws[OURS][0]()
    for name, variants in draws.items():
        for draw in variants:
            _check(name, draw(), wanted)
    cores = 1 if subject.prompts.is_cuda else os.cpu_count() or 1
    best = {name: _best(variants, cores) for name, variants in draws.items()}

    def at_best(name: str) -> None:
        draw, threads = best[name]
        torch.set_num_threads(threads)
        draw()

    total = repeats * len(best)
    done = iter(range(1, total + 1))
    times = alternate(
        {name: partial(at_best, name) for name in best},
        repeats,
        lambda: progress(next(done), total) if progress else None,
    )
    images, steps = wanted.shape
    results = [_row(name, times[name], best[name][1], images, steps) for name in times]
    pairs = [theirs / ours for ours, theirs in zip(times[OURS], times.get(PORT, []), strict=False)]
    return {
        "results": results,
        "ratio": statistics.median(pairs) if pairs else None,
        "image_tokens": steps,
        "prompt_tokens": subject.prompts.shape[1],
        "pack_ms": pack * 1e3,
    }


def _contestants(subject: Subject, cfg: float) -> tuple[dict[str, list[Draw]], float]:
    """Return each provider's ways of drawing, and the seconds spent on packing this engine's
    weights.
    """
    s, c = subject, subject.transformer.config
    prompts, images = s.rows(s.prompts, cfg), len(s.prompts)
    holder: list[Any] = [s.transformer]

    def pack() -> None:
        with torch.inference_mode():
            holder[0] = on_operators(s.transformer, s.code_table)

    taken = seconds(pack)
    spent = taken if isinstance(holder[0], Packed) else 0.0

    def ours() -> Tensor:
        sampling = Sampling(temperature=0, cfg=cfg)
        draws = torch.arange(images, device=s.prompts.device)
        sampler = Sampler(sampling, 0, draws, c.codebook_size, c.image_tokens)
        return decode_image(holder[0], s.code_table, prompts, sampler, s.pad)

    draws: dict[str, list[Draw]] = {OURS: [ours]}
    if s.port is not None:
        kinds = get_args(CacheKind)
        draws[PORT] = [partial(s.port.generate, s.prompts, cfg, kind) for kind in kinds]
    return {n: [partial(waited, draw) for draw in each] for n, each in draws.items()}, spent


def _check(name: str, codes: Tensor, wanted: Tensor) -> None:
    if codes.shape != wanted.shape:
        shapes = f"{tuple(codes.shape)}, not {tuple(wanted.shape)}"
        raise WrongResult(f"{name} drew codes of shape {shapes}; nothing was timed")
    if not torch.equal(codes, wanted):
        image, position = (codes != wanted).nonzero()[0].tolist()
        raise WrongResult(
            f"{name} drew another picture: code {int(codes[image, position])} at position "
            f"{position} of image {image}, this engine {int(wanted[image, position])}; "
            "nothing was timed"
        )


def _best(variants: list[Draw], cores: int) -> tuple[Draw, int]:
    """Return the fastest variant and thread count: each is scored by the better of two probes,
    after one to warm up."""
    scores: dict[tuple[int, int], float] = {}
    for count in range(1, cores + 1):
        torch.set_num_threads(count)
        for i, draw in enumerate(variants):
            draw()
            scores[i, count] = min(seconds(draw) for _ in range(2))
    variant, count = min(scores, key=scores.__getitem__)
    return variants[variant], count


def _row(name: str, times: list[float], threads: int, images: int, steps: int) -> dict[str, Any]:
    spread = quantiles(times)
    return {
        "provider": name,
        "threads": threads,
        "tokens_per_s": images * steps / spread["median"],
        # A slow run has few tokens per second: the time's upper quantile is the rate's lower one.
        "tokens_per_s_q20": images * steps / spread["q80"],
        "tokens_per_s_q80": images * steps / spread["q20"],
        "ms_per_step": spread["median"] / steps * 1e3,
        "ms_per_step_q20": spread["q20"] / steps * 1e3,
        "ms_per_step_q80": spread["q80"] / steps * 1e3,
        "images_per_s": images / spread["median"],
    }


def table(result: dict[str, Any]) -> Table:
    """Format the result of ``run`` for people."""
    ratio = "" if result["ratio"] is None else f", {result['ratio']:.2f}x the port"
    shown = Table(
        title=f"{result['model']} ({result['parameters'] / 1e6:.1f}M, {result['dtype']}, "
        f"batch {result['batch']}, cfg {result['cfg']:g}){ratio}"
    )
    shown.add_column("provider")
    for heading in ("threads", "tokens/s", "q20 … q80", "ms/step", "images/s"):
        shown.add_column(heading, justify="right")
    for r in result["results"]:
        shown.add_row(
            r["provider"],
            str(r["threads"]),
            f"{r['tokens_per_s']:.1f}",
            f"{r['tokens_per_s_q20']:.1f} … {r['tokens_per_s_q80']:.1f}",
            f"{r['ms_per_step']:.2f}",
            f"{r['images_per_s']:.3f}",
        )
    return shown
