"""The command that asks how much of a policy gradient is signal."""

from __future__ import annotations

from dataclasses import dataclass

from echogen.commands.options import Json, check_range, check_seed
from echogen.commands.output import InputError, print_json, progress, show


@dataclass(frozen=True)
class BenchCredit:
    """Cycle RL's gradient from two halves of some rollouts, and whether they agree: an image's
    reward credited to all of its tokens, or an object's to those in its box."""

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

        with progress("rollouts") as update:
            result = credit.run(self.model, self.rollouts, self.batch, self.seed, update)
        rows = []
        for row in result["results"]:
            least = row["rollouts_for_half"]
            rows.append((row["credit"], f"{row['cosine']:.3f}", f"{least:.0f}" if least else ""))
        show(
            f"Gradients of {self.rollouts // 2} rollouts and of as many others",
            ("reward of an", "cosine", "rollouts for as much signal as noise"),
            rows,
        )
        if self.json:
            print_json(result)
