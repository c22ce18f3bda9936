"""The commands that measure limits and find regressions: ceilings of the machine, memory, compiled
code, two runs side by side."""

from __future__ import annotations

import os
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from echogen.commands.options import Json, check_range, usual_device
from echogen.commands.output import (
    Failure,
    InputError,
    make_folder,
    print_json,
    progress,
    show,
    warn,
    write,
)  # fmt: skip

if TYPE_CHECKING:
    from echogen.bench.compare import Change


@dataclass(frozen=True)
class BenchRoofline:
    """Measure the machine's ceilings, and how close operators and the engine's phases come."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    model: str = "tiny"
    """Model whose phases are timed: a bundled model, a folder, or a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of its weights."""
    batch: int = 1
    """Pictures drawn at once."""
    out: Path | None = None
    """Folder for roofline.json and roofline.png."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        check_range("batch", self.batch, 1, 4096)
        if self.out is not None:
            make_folder(self.out)
        device = usual_device(self.device)
        from echogen.bench.speed import limits

        with progress("timing") as update:
            result = limits.run(device, self.model, self.batch, self.dtype, warn, update)
        for table in limits.tables(result):
            show(*table)
        if self.out is not None:
            write(self.out / "roofline.json", dumps(result, indent=2).encode())
            try:
                limits.plot(result, self.out / "roofline.png")
            except ImportError:
                warn("matplotlib is not installed; no plot was drawn")
        if self.json:
            print_json(result)


@dataclass(frozen=True)
class BenchMemory:
    """Peak memory of every operator that has a backward pass, and of the same in eager torch, at
    training shapes; counted, not measured, so it needs neither a GPU nor that much memory."""

    operator: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Which operator (may be repeated); all of them if none is named."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        from echogen.bench.speed import memory, tables

        try:
            result = memory.run(self.operator)
        except ValueError as error:
            raise InputError(f"--{error}") from None
        tables.console().print(tables.memory(result["memory"]))
        if self.json:
            print_json(result)


def refuse_interpreted() -> None:
    """Refuse to compile kernels where they are interpreted. Raises InputError."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError("TRITON_INTERPRET=1: an interpreted kernel cannot be compiled; unset it")


@dataclass(frozen=True)
class BenchCompile:
    """Compile every operator for named architectures, without a GPU: registers, shared memory,
    spills, wide accesses. Exit code 1 where a kernel spills, takes more shared memory than a block
    may have, or does not compile."""

    arch: str = "sm_80,sm_90,sm_100"
    """Comma-separated architectures: sm_NN (NVIDIA) or gfxNNN (AMD; reported, never a failure)."""
    operator: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Which operator (may be repeated); all of them if none is named."""
    processes: int | None = None
    """Processes that compile in parallel (left out: one per core)."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        check_range("processes", self.processes, 1, 1024)
        refuse_interpreted()
        from echogen.bench.speed import compile as ahead
        from echogen.bench.speed import tables

        arches = [a.strip() for a in self.arch.split(",") if a.strip()]
        if not arches:
            raise InputError(f"--arch {self.arch!r}: name one, such as sm_90")
        with progress("compiling") as update:
            try:
                result = ahead.run(arches, self.operator, self.processes, update, warn)
            except ValueError as error:
                raise InputError(f"--{error}") from None
        tables.console().print(tables.compiled(result["kernels"]))
        if self.json:
            print_json(result)
        failures = ahead.failures(result["kernels"])
        if failures:
            raise Failure(f"{len(failures)} of {len(result['kernels'])}: {'; '.join(failures)}")


@dataclass(frozen=True)
class BenchCompare:
    """Compare two runs of a benchmark, as ratios to a peer in the same run. Exit code 1 if a case
    became slower by more than the threshold and by more than the noise, or has no time any more."""

    before: Annotated[Path, tyro.conf.Positional]
    """The earlier run: a file whose last line is the object that `--json` printed."""
    after: Annotated[Path, tyro.conf.Positional]
    """The later run, likewise."""
    to: str | None = None
    """The peer; none compares times. Left out: eager for operators, transformers for the engine."""
    threshold: float = 1.15
    """Largest factor by which a case may become slower."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        if not 1 <= self.threshold < float("inf"):
            raise InputError(f"--threshold {self.threshold}: it must be 1 or more")
        from echogen.bench import compare

        before, after = compare.load(self.before), compare.load(self.after)
        peer = None if self.to == "none" else self.to or compare.usual_peer(before)
        changes = compare.compare(before, after, peer)
        slower = [c for c in changes if c.slower(self.threshold)]
        show(
            f"{self.after.name} over {self.before.name}, "
            + (f"as ratios to {peer}" if peer else "in ms"),
            ("case", "before", "after", "after/before", ""),
            [
                (c.case, c.before.value, c.after.value, c.ratio, _verdict(c, self.threshold))
                for c in changes
            ],
        )
        gone = compare.missing(before, after, peer)
        if self.json:
            rows = [c.to_dict() for c in changes]
            told = {"peer": peer, "threshold": self.threshold}
            print_json(told | {"changes": rows, "missing": gone})
        if gone:
            raise Failure(f"{len(gone)} cases have no time any more: {', '.join(gone)}")
        if slower:
            worst = slower[0]
            raise Failure(
                f"{len(slower)} of {len(changes)} slower than {self.threshold:g} times before; "
                f"most: {worst.case}, {worst.ratio:.2f} times"
            )


def _verdict(change: Change, threshold: float) -> str:
    if not change.certain:
        return "within the noise"
    return "slower" if change.slower(threshold) else ""


@dataclass(frozen=True)
class BenchReport:
    """Print the tables of bench/README.md, made from the committed results."""

    write: bool = False
    """Write them into bench/README.md instead of printing them."""

    def run(self) -> None:
        from echogen.bench import report

        for needed in (report.RESULTS, report.PAGE):
            if not needed.exists():  # an installed wheel has neither
                raise InputError(f"there is no {needed}; run it in a checkout")
        text = report.section()
        if not self.write:
            print(text)
            return
        write(report.PAGE, report.placed(report.PAGE.read_text(), text).encode())
