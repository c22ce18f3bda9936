"""The command that measures speed against a peer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from echogen.commands.options import Json, check_range, check_seed
from echogen.commands.output import InputError, print_json, progress


@dataclass(frozen=True)
class Bench:
    """Measure speed beside the same weights in another library."""

    what: Annotated[Literal["engine"], tyro.conf.Positional]
    """engine: drawing, from the prompt to the last image code."""
    model: str = "tiny"
    """A bundled model, a folder, or a hub id in the Janus format."""
    peer: Literal["transformers", "none"] = "transformers"
    """What to compare with."""
    repeats: int = 5
    """Timed runs of each."""
    batch: int = 1
    """Pictures drawn at once."""
    cfg: float = 5.0
    """Scale of classifier-free guidance; the port draws only with guidance, above 1."""
    seed: int = 0
    """Of the noise."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        check_range("repeats", self.repeats, 1, 10_000)
        check_range("batch", self.batch, 1, 4096)
        check_seed(self.seed)
        if not 0 <= self.cfg < float("inf"):
            raise InputError(f"--cfg {self.cfg}: it must be 0 or more (1 is off)")
        from rich.console import Console

        from echogen.bench.speed import engine as speed

        if self.peer == "transformers" and not self.cfg > 1:
            raise InputError(f"--cfg {self.cfg}: the port draws only with guidance, above 1")
        with progress("timing") as update:
            result = speed.run(
                self.model, self.peer, self.repeats, self.batch, self.cfg, self.seed, update
            )
        Console().print(speed.table(result))
        if self.json:
            print_json(result)
