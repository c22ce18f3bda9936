"""The command that times many requests at once."""

from __future__ import annotations

from dataclasses import dataclass

from echogen.commands.options import Json, check_range, check_seed
from echogen.commands.output import InputError, print_json, progress


@dataclass(frozen=True)
class BenchServing:
    """Mixed requests through the scheduler, beside one after another and in fixed batches, and what
    batch-invariant mode costs; on one thread of a CPU."""

    model: str = "tiny"
    """A bundled model, a folder, or a hub id in the Janus format."""
    requests: int = 24
    """Layouts of the test split, each with settings and a number of images of its own."""
    slots: int = 16
    """Rows of a step; an image with guidance takes two."""
    repeats: int = 5
    """Timed runs of each."""
    seed: int = 0
    """Of the settings and of the noise."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        check_range("requests", self.requests, 1, 100_000)
        check_range("slots", self.slots, 6, 4096)
        check_range("repeats", self.repeats, 1, 10_000)
        check_seed(self.seed)
        if self.model.startswith("random:"):
            raise InputError(f"--model {self.model}: it reads no layouts; name a checkpoint")
        from echogen.bench.speed import serving, tables

        with progress("timing") as update:
            result = serving.measure(
                self.model, self.requests, self.slots, self.repeats, self.seed, update
            )
        tables.console().print(serving.table(result))
        if self.json:
            print_json(result)
