"""The commands that time the engine and the operators."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from echogen.commands.limits import BenchCompare, BenchCompile, BenchMemory, BenchRoofline
from echogen.commands.options import Json, check_range, check_seed
from echogen.commands.output import (
    Failure,
    InputError,
    make_folder,
    print_json,
    progress,
    warn,
)  # fmt: skip


@dataclass(frozen=True)
class BenchEngine:
    """Drawing, from the prompt to the last image code, beside the same weights in a peer."""

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


@dataclass(frozen=True)
class BenchKernels:
    """Every operator beside eager torch, torch.compile and its peers; times of a GPU where there is
    one, else of the plain-torch references."""

    operator: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Which operator (may be repeated); all of them if none is named."""
    size: str | None = None
    """tiny (the CPU's default), training or decoding (both of a GPU)."""
    provider: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Whom to compare with (may be repeated): eager, compile, liger, trl, torchvision, torch; all
    if left out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    repeats: int = 20
    """Timed runs of each on a CPU."""
    out: Path | None = None
    """Folder for kernels.csv and a plot an operator."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        check_range("repeats", self.repeats, 1, 10_000)
        if self.out is not None:
            make_folder(self.out)
        import torch

        from echogen.bench.speed import kernels, tables

        there = torch.cuda.is_available()
        if self.device == "cuda" and not there:
            raise InputError("--device cuda: PyTorch sees no CUDA device; use cpu")
        device = "cuda" if self.device != "cpu" and there else "cpu"
        try:
            kernels.choose(self.operator, self.size, device)
            kernels.check_providers(self.provider)
        except ValueError as error:
            raise InputError(f"--{error}") from None
        with progress("timing") as update:
            result = kernels.run(
                self.operator, self.size, device, self.provider, self.repeats, warn, update
            )
        tables.console().print(tables.kernels(result))
        if self.out is not None:
            self._write(result["kernels"])
        if self.json:
            print_json(result)
        wrong = [r for r in result["kernels"] if r["error"] and r["provider"] == "echogen"]
        if wrong:
            raise Failure(wrong[0]["error"])

    def _write(self, rows: list[dict[str, object]]) -> None:
        from echogen.bench.speed import tables

        assert self.out is not None
        tables.write_csv(rows, self.out / "kernels.csv")
        try:
            tables.plot(rows, self.out)
        except ImportError:
            warn("matplotlib is not installed; no plots were drawn")


@dataclass(frozen=True)
class Bench:
    """Measure speed."""

    what: (
        Annotated[BenchEngine, tyro.conf.subcommand("engine")]
        | Annotated[BenchKernels, tyro.conf.subcommand("kernels")]
        | Annotated[BenchMemory, tyro.conf.subcommand("memory")]
        | Annotated[BenchRoofline, tyro.conf.subcommand("roofline")]
        | Annotated[BenchCompare, tyro.conf.subcommand("compare")]
        | Annotated[BenchCompile, tyro.conf.subcommand("compile")]
    )

    def run(self) -> None:
        self.what.run()
