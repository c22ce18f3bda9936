"""The command that measures how much of a gradient is signal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from echogen.commands.options import Json, check_range, check_seed
from echogen.commands.output import InputError, print_json, progress, show


@dataclass(frozen=True)
class BenchCredit:
    """How much of a batch's gradient is signal, and does it point where the judge's does? For Cycle
    RL, with an image's reward credited to all its tokens or an object's to those in its box, from
    one decoded box or several sampled ones, or by ranks; for stage 2's loop; and for each part of
    the network."""

    model: str = "tiny"
    """Model to measure: a bundled model, a run, a folder, or a hub id."""
    rollouts: int = 64
    """Rollouts per gradient."""
    batch: int = 8
    """Layouts per rollout, each drawn eight times."""
    gradient: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Measure only this gradient, by its name in the table; repeatable."""
    float32: bool = False
    """Multiply in float32, for CPUs without bfloat16 instructions."""
    seed: int = 0
    """Seed of layouts and noise."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        check_range("rollouts", self.rollouts, 3, 100_000)
        check_range("batch", self.batch, 1, 4096)
        check_seed(self.seed)
        from echogen.bench.quality import credit

        asked = self.gradient or credit.GRADIENTS
        if unknown := [name for name in asked if name not in credit.GRADIENTS]:
            names = "; ".join(credit.GRADIENTS)
            raise InputError(f"--gradient {unknown[0]!r}: unknown; there are {names}")
        with progress("batches") as update:
            result = credit.run(
                self.model, self.rollouts, self.batch, self.seed, asked, self.float32, update
            )

        def pair(row: dict[str, Any], name: str) -> str:
            value, error = row[name], row[f"{name}_stderr"]
            return "" if value is None else f"{value:.3f} ± {error:.3f}"

        rows = []
        for row in result["results"]:
            for name, told in {row["gradient"]: row, **row["parts"]}.items():
                least = told["batches_for_half"]
                needed = f"{least:.0f}" if least else ""
                shown = name if told is row else f"  {name}"
                rows.append((shown, pair(told, "signal"), needed, pair(told, "judge_cosine")))
        show(
            f"Gradients of {self.rollouts} batches each ({result['precision']})",
            ("gradient, and its parts", "signal's share of a batch's",
             "batches for as much signal as noise", "cosine with the judge's"),
            rows,
        )  # fmt: skip
        if self.json:
            print_json(result)
