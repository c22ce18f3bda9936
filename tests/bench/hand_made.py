"""Records of cells of the quality experiments that nobody ran."""

from __future__ import annotations

from echogen.bench.quality import report
from echogen.bench.quality.cells import cells


def hand_made(name: str, ap: float, task: str = "both", start: str = "s") -> dict:
    """A record whose every measure is ``ap``, and at the best setting a tenth more."""

    def tables(value: float) -> dict:
        parts: dict[str, dict] = {"l2i": {}, "i2l": {}, "cycle": {}, "diversity": {}}
        for (part, key), _ in report.MEASURES.values():
            parts[part][key] = value
        ceiling = dict.fromkeys(parts["l2i"], 0.9)
        return parts | {"judge_ceiling": 0.99, "vq_ceiling": ceiling,
                        "sampling": {"temperature": 0.5, "cfg": 1.5}}  # fmt: skip

    cell = cells(range(3))[name]
    return {
        "cell": name, "arm": cell.arm, "seed": cell.seed, "stage": cell.stage, "scale": 1.0,
        "settings": {"recipe": "tiny", "task": task, "evaluation": {"test": 400}},
        "start": {"cell": cell.parent, "fingerprint": start, "stages": []}, "model": "m" + name,
        "steps": 900, "samples": 28800, "drawn": 0, "seconds": 1000.0, "cpu_seconds": 900.0,
        "checkpoint": {"step": 900}, "before": {"rank_correlation": 0.25},
        "evaluation": {"plain": tables(ap), "best": tables(ap + 0.1)},
        "environment": {"commit": "0123456789abcdef", "dirty": True, "device": "cpu"},
    }  # fmt: skip
