"""95% intervals for means over objects that cluster in images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval (percentile bootstrap over images, fixed seed)."""

    mean: float
    low: float
    high: float

    def to_list(self) -> list[float]:
        """[low, high], rounded."""
        return [round(self.low, 4), round(self.high, 4)]


def mean(per_image: list[np.ndarray]) -> float:
    """Mean over all objects of all images; ``per_image`` holds one float array [K_i] per image."""
    sums, counts = _sums(per_image)
    return float(sums.sum() / max(counts.sum(), 1))


def estimate(per_image: list[np.ndarray]) -> Estimate:
    """`mean`, resampled by image, since objects of one image err together; a resample without any
    object says nothing and is left out."""
    sums, counts = _sums(per_image)
    picks = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    total, drawn = sums[picks].sum(1), counts[picks].sum(1)
    low, high = np.percentile(total[drawn > 0] / drawn[drawn > 0], [2.5, 97.5])
    return Estimate(mean(per_image), float(low), float(high))


def _sums(per_image: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The sum and the number of every image's objects."""
    sums = np.array([v.sum() for v in per_image], dtype=float)
    return sums, np.array([len(v) for v in per_image], dtype=float)
