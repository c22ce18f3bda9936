"""The command that shows where time goes, with PyTorch's profiler or Nsight."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from echogen.commands.options import Json, ModelOptions, check_range, make_current
from echogen.commands.output import InputError, make_folder, print_json, show, warn, write
from echogen.commands.training import find_recipe

if TYPE_CHECKING:
    from echogen.bench.profile.subjects import Asked


@dataclass(frozen=True)
class Profile:
    """Show where the time of a piece of work goes: a trace, kernels by time, time by range."""

    what: Annotated[
        Literal["generate", "ground", "cycle", "pmtp", "djo", "cycle-rl"], tyro.conf.Positional
    ]
    """The work: drawing, grounding, the cycle, or a training step of a stage."""
    tool: Literal["torch", "nsys", "ncu", "none"] = "torch"
    """torch: PyTorch's profiler (anywhere). nsys: Nsight Systems (a timeline). ncu: Nsight Compute
    (counters of single kernels). none: only run the work, between marks for another profiler."""
    out: Path | None = None
    """Folder of the trace and summary; not needed with --tool none."""
    model: str = "tiny"
    """A bundled model, a folder, or a hub id in the Janus format; or random, for weights of the
    recipe's sizes."""
    recipe: str = "tiny"
    """Recipe of a training step, and of the sizes of --model random: tiny, small or
    janus_pro_1b."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights to draw and find with (left out: float32); stages take the recipe's."""
    batch: int = 8
    """Pictures per batch."""
    within: str | None = None
    """Nsight Compute: the innermost range whose kernels are read, such as step."""
    dry_run: bool = False
    """Nsight: print the command line and run nothing."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        ModelOptions(self.model, self.device).check()
        check_range("batch", self.batch, 1, 4096)
        if self.within is not None and self.tool != "ncu":
            raise InputError(f"--within {self.within}: is for --tool ncu")
        from echogen.engine.ranges import nvtx_missing

        if self.within is not None and (why := nvtx_missing()):
            raise InputError(
                f"--within {self.within}: needs NVTX ranges, and {why}: pip install -U nvtx"
            )
        if self.tool == "ncu" and self.device == "cpu":
            raise InputError("--tool ncu: reads a GPU's kernels; add --device cuda")
        if self.dry_run and self.tool not in ("nsys", "ncu"):
            raise InputError(f"--dry-run: --tool {self.tool} has no command line; choose nsys, ncu")
        if self.out is None and self.tool != "none":
            raise InputError("--out is missing; name a folder for the trace")
        if self._trains and self.dtype is not None:
            raise InputError(
                f"--dtype {self.dtype}: a training step takes its recipe's; leave it out"
            )
        if not self._trains and self.recipe != "tiny" and self.model != "random":
            raise InputError(
                f"--recipe {self.recipe}: {self.model} has sizes of its own; add --model random"
            )
        recipe = find_recipe(self.recipe)
        if self.tool in ("nsys", "ncu"):
            self._nsight()
            return
        import torch

        from echogen.bench.profile import subjects

        make_current(self.device)
        dtype = getattr(torch, self.dtype or "float32")
        asked = subjects.Asked(self.model, self.device, self.batch, recipe=recipe, dtype=dtype)
        if self.tool == "none":
            subjects.between_marks(subjects.warmed(self.what, asked).work)
            return
        self._torch(asked)

    @property
    def _trains(self) -> bool:
        return self.what in ("pmtp", "djo", "cycle-rl")

    def _torch(self, asked: Asked) -> None:
        assert self.out is not None
        make_folder(self.out)
        from json import dumps

        from echogen.bench.profile import subjects, trace

        work = subjects.warmed(self.what, asked).work
        result = trace.run(work, self.out, self.what, self.device)
        result |= {"model": self.model, "recipe": self.recipe, "batch": self.batch}
        result["dtype"] = None if self._trains else self.dtype or "float32"  # else the recipe's
        write(self.out / f"{self.what}.json", dumps(result, indent=2).encode())
        show(
            f"{self.what}: {result['wall_ms']:.2f} ms on {result['device']}",
            ("range", "entered", "ms", "share"),
            [(r["category"], r["count"], r["ms"], f"{r['share']:.1%}") for r in result["ranges"]],
        )
        kind = "kernels" if result["device"] != "cpu" else "operators"
        show(
            f"The longest {kind}, under the profiler",
            ("name", "count", "ms", "share"),
            [
                (r["name"][:60], r["count"], r["ms"], f"{r['share']:.1%}")
                for r in result["kernels"][:12]
            ],
        )
        print(f"trace: {result['trace']} (open it in chrome://tracing or ui.perfetto.dev)")
        if self.json:
            print_json(result)

    def _nsight(self) -> None:
        from echogen.bench.profile import nsight
        from echogen.engine.ranges import nvtx_missing

        assert self.out is not None and self.tool in ("nsys", "ncu")
        work = [sys.executable, "-m", "echogen", "profile", self.what, "--tool", "none"]
        work += ["--model", self.model, "--recipe", self.recipe, "--device", self.device]
        work += ["--batch", str(self.batch), *(["--dtype", self.dtype] if self.dtype else [])]
        out = self.out / self.what
        line = nsight.command(self.tool, work, out, self.within)
        if why := nvtx_missing():
            warn(f"{why}; the report will hold no ranges")
        print(f"ECHOGEN_NVTX=1 {shlex.join(line)}", flush=True)
        if self.dry_run:
            return
        make_folder(self.out)
        report = nsight.run(self.tool, line, out)
        print(f"report: {report}")
        if self.json:
            print_json({"what": self.what, "tool": self.tool, "report": str(report)})
