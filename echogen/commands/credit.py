"""The command that asks how much of a gradient is signal."""

from __future__ import annotations

from dataclasses import dataclass

from echogen.commands.options import Json, check_range, check_seed
from echogen.commands.output import InputError, print_json, progress, show


@dataclass(frozen=True)
class BenchCredit:
    """Whether the gradients of two halves of some batches agree, and with the judge's: Cycle RL's,
    an image's reward credited to all of its tokens or an object's to those in its box, and that of
    stage 2's loop."""

    model: str = "tiny"
    """Whose gradients: a bundled model, a run, a folder, or a hub id."""
    rollouts: int = 64
    """In all; half of them in each half."""
    batch: int = 8
    """Layouts a rollout, each drawn eight times."""
    seed: int = 0
    """Of layouts and noise."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        check_range("rollouts", self.rollouts, 2, 100_000)
        check_range("batch", self.batch, 1, 4096)
        check_seed(self.seed)
        if self.rollouts % 2:
            raise InputError(f"--rollouts {self.rollouts}: name an even number")
        from echogen.bench.quality import credit

        with progress("batches") as update:
            result = credit.run(self.model, self.rollouts, self.batch, self.seed, update)
        rows = []
        for row in result["results"]:
            least = row["rollouts_for_half"]
            needed = f"{least:.0f}" if least else ""
            rows.append((row["gradient"], f"{row['cosine']:.3f}", needed,
                         f"{row['judge_cosine']:.3f}"))  # fmt: skip
        show(
            f"Gradients of {self.rollouts // 2} batches and of as many others",
            ("gradient", "cosine", "batches for as much signal as noise", "with the judge's"),
            rows,
        )
        if self.json:
            print_json(result)
