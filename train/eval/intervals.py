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


def estimate(per_image: list[np.ndarray]) -> Estimate:
    """Mean over all objects of all images; resampled by image, since objects of one image err
    together. ``per_image`` holds one float array [K_i] per image; a resample without any object
    says nothing and is left out."""
    sums = np.array([v.sum() for v in per_image], dtype=float)
    counts = np.array([len(v) for v in per_image], dtype=float)
    picks = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    total, drawn = sums[picks].sum(1), counts[picks].sum(1)
    low, high = np.percentile(total[drawn > 0] / drawn[drawn > 0], [2.5, 97.5])
    return Estimate(float(sums.sum() / max(counts.sum(), 1)), float(low), float(high))
