"""The command that measures a model: drawing, finding and the cycle, with 95% intervals."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from echogen.commands.options import (
    Json,
    ModelOptions,
    SamplingOptions,
    check_evaluates,
    check_range,
    check_seed,
)
from echogen.commands.output import (
    InputError,
    check_file,
    finite,
    print_json,
    progress,
    show,
    write,
)

TITLES = {
    "l2i": "Layout to image, read by the judge",
    "i2l": "Image to layout, on true pictures",
    "cycle": "Cycle: layout to image to layout",
}
# A Fréchet distance and a covariance need a few pictures; more than the maximum takes hours.
COUNT_MIN, COUNT_MAX = 2, 100_000


@dataclass(frozen=True)
class Eval:
    """Measure a model on ShapesWorld: drawing, finding and the cycle, with 95% intervals."""

    split: str = "test"
    """Which scenes: train, val or test."""
    count: int = 200
    """Number of scenes."""
    seed: int = 0
    """Seed of the drawing and of the expressions."""
    out: Path | None = None
    """JSON file to write."""
    json: Json = False
    """End with one JSON object on stdout."""
    engine: ModelOptions = field(default_factory=ModelOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def run(self) -> None:
        from echogen.train.data.shapes import SPLITS

        if self.split not in SPLITS:
            raise InputError(f"--split {self.split}: choose {', '.join(SPLITS)}")
        check_range("count", self.count, COUNT_MIN, COUNT_MAX)
        check_seed(self.seed)
        self.sampling.check()
        if self.out is not None:
            check_file(self.out, (".json",))
        check_evaluates()
        engine = self.engine.load()
        engine.sampling = self.sampling.over(engine)
        from echogen.train.eval.tables import evaluate

        began = time.perf_counter()
        with progress(f"{self.split} images") as update:
            tables = evaluate(engine, self.split, self.count, self.seed, update)
        data = finite(
            {
                **tables,
                "model": self.engine.model,
                "split": self.split,
                "seed": self.seed,
                "sampling": asdict(engine.sampling),
                "seconds": round(time.perf_counter() - began, 3),
            }
        )
        if self.out is not None:
            write(self.out, (json.dumps(data, indent=2) + "\n").encode())
        self._show(data)
        if self.json:
            print_json(data)

    def _show(self, data: dict[str, Any]) -> None:
        s = data["sampling"]
        print(
            f"{self.engine.model}, {self.count} scenes of {self.split}, temperature "
            f"{s['temperature']:g}, cfg {s['cfg']:g}, {data['seconds']:.0f} s"
        )
        ceiling = data.get("vq_ceiling") or {}
        for name, title in TITLES.items():
            table = data[name]
            intervals = table.get("interval95", {})
            names = [k for k, v in table.items() if k != "interval95" and not isinstance(v, dict)]
            rows = []
            for key in names:
                low_high = intervals.get(key)
                row = [key, _number(table[key]), _interval(low_high)]
                rows.append([*row, _number(ceiling.get(key))] if name == "l2i" else row)
            columns = ["measure", "value", "95% interval"]
            show(title, [*columns, "VQ ceiling"] if name == "l2i" else columns, rows)
        judge = data.get("judge_ceiling")
        if isinstance(judge, float):
            print(f"judge ceiling: accuracy at IoU 0.5 on the true pictures {judge:.3f}")
        misread = data.get("misread")
        if isinstance(misread, float):
            print(f"scenes that the judge misread when they were made, drawn again: {misread:.1%}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(value: list[float | None] | None) -> str:
    return "" if not value or None in value else f"{value[0]:.3f} – {value[1]:.3f}"
