"""The commands that time the engine and the operators."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from echogen.commands.credit import BenchCredit
from echogen.commands.limits import (
    BenchCompare,
    BenchCompile,
    BenchMemory,
    BenchReport,
    BenchRoofline,
    refuse_interpreted,
)
from echogen.commands.options import Json, ModelOptions, check_range, check_seed, usual_device
from echogen.commands.output import (
    Failure,
    InputError,
    make_folder,
    print_json,
    progress,
    show,
    warn,
)  # fmt: skip
from echogen.commands.quality import BenchQuality
from echogen.commands.serving import BenchHttp, BenchServing
from echogen.commands.training import find_recipe


@dataclass(frozen=True)
class BenchEngine:
    """Time drawing, from the prompt to the last image code. --mode peer: against the same weights
    in one peer. latency, rollout: one picture, or groups of eight, against every peer and the
    machine's limits. jacobi: several codes per step against one, with steps, acceptance, identity.
    window: what a step of several codes costs, with any weights."""

    model: str | None = None
    """A bundled model, a folder, a hub id, or random weights: random:tiny, random:100m,
    janus_pro_1b (GPU). Left out: tiny; in modes latency and rollout also the last two."""
    mode: Literal["peer", "jacobi", "window", "latency", "rollout"] = "peer"
    """What to time, see above."""
    peer: Literal["transformers", "none"] = "transformers"
    """The peer in mode peer; "none" also leaves out all peers in modes latency and rollout."""
    repeats: int = 5
    """Timed runs of each; mode jacobi draws once."""
    batch: int | None = None
    """Pictures drawn at once (left out: 1, in mode rollout 8, 16 … 512)."""
    threads: int | None = None
    """CPU threads in modes latency, rollout and window (left out: in the first two each's best)."""
    cfg: float | None = None
    """Scale of classifier-free guidance (left out: 5; in modes jacobi and rollout 1 and 5). The
    transformers port needs it above 1."""
    temperature: float | None = None
    """Temperature in mode jacobi (left out: 0.3, 0.7 and 1); mode peer is greedy."""
    layouts: int = 200
    """Test layouts to draw in mode jacobi, plus a quarter as many crowded ones."""
    window: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """Codes per step; repeatable (left out: the engine's choice; in mode window 1 to 32)."""
    draft: Annotated[tuple[Literal["above", "left"], ...], tyro.conf.UseAppendAction] = ()
    """Neighbour from which mode jacobi guesses a code first; repeatable (left out: above)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights (mode peer: always float32)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    seed: int = 0
    """Seed of the noise."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        check_range("repeats", self.repeats, 1, 10_000)
        check_range("batch", self.batch, 1, 4096)
        check_range("threads", self.threads, 1, 1024)
        check_range("layouts", self.layouts, 1, 100_000)
        for window in self.window:
            check_range("window", window, 1, 4096)
        check_seed(self.seed)
        if self.cfg is not None:
            from echogen.engine.decoding.sampler import CFG_MAX

            if not 0 <= self.cfg <= CFG_MAX:
                raise InputError(
                    f"--cfg {self.cfg}: it must be 0 or more (1 is off), at most {CFG_MAX:g}"
                )
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature {self.temperature}: it must be 0 or more")
        modes = {"jacobi": self._jacobi, "window": self._window, "peer": self._peer}
        modes.get(self.mode, self._drawing)()

    def _refuse_jacobis(self, **others: bool) -> None:
        given = {
            "--window": bool(self.window) and self.mode != "window",
            "--draft": bool(self.draft),
            "--temperature": self.temperature is not None,
        } | {f"--{name}": there for name, there in others.items()}
        for name, there in given.items():
            if there:
                raise InputError(f"{name}: not used by --mode {self.mode}; leave it out")

    def _drawing(self) -> None:
        self._refuse_jacobis()
        from echogen.bench.speed import contestants, drawing, tables

        device = usual_device(self.device)
        mode: drawing.Mode = "rollout" if self.mode == "rollout" else "latency"
        batches = drawing.BATCHES[mode] if self.batch is None else (self.batch,)
        scales = drawing.SCALES[mode] if self.cfg is None else (self.cfg,)
        peers = () if self.peer == "none" else contestants.PEERS
        plan = drawing.Plan(mode, batches, scales, peers, self.repeats, self.threads)
        models = drawing.MODELS if self.model is None else (self.model,)
        try:
            drawing.check(plan, self.dtype)
        except ValueError as error:
            raise InputError(f"--{error}") from None
        with progress("timing") as update:
            result = drawing.run(plan, models, device, self.dtype, self.seed, warn, update)
        tables.console().print(tables.drawing(result))
        if self.json:
            print_json(result)
        if result["interrupted"]:
            raise KeyboardInterrupt
        if result["refused"] or result["failed"]:
            raise Failure("; ".join(result["refused"] + result["failed"]))

    def _window(self) -> None:
        self._refuse_jacobis()
        from echogen.bench.speed import tables, windows

        device, cfg = usual_device(self.device), 5.0 if self.cfg is None else self.cfg
        try:
            with progress("timing") as update:
                result = windows.run(
                    self.model or "tiny", self.window or windows.WINDOWS, self.batch or 1, cfg,
                    self.dtype, device, self.repeats, self.threads, self.seed, progress=update,
                )  # fmt: skip
        except windows.WindowError as error:
            raise InputError(f"--{error}") from None
        tables.console().print(windows.table(result))
        if self.json:
            print_json(result)

    def _peer(self) -> None:
        self._refuse_jacobis(dtype=self.dtype != "float32", threads=self.threads is not None)
        from rich.console import Console

        from echogen.bench.speed import engine as speed

        device = usual_device(self.device)
        cfg = 5.0 if self.cfg is None else self.cfg
        if self.peer == "transformers" and not cfg > 1:
            raise InputError(f"--cfg {cfg}: the port draws only with guidance, above 1")
        with progress("timing") as update:
            result = speed.run(
                self.model or "tiny", self.peer, self.repeats, self.batch or 1, cfg, self.seed,
                update, device,
            )  # fmt: skip
        Console().print(speed.table(result))
        if self.json:
            print_json(result)

    def _jacobi(self) -> None:
        model, device = self.model or "tiny", usual_device(self.device)
        if model.startswith("random:"):
            raise InputError(
                f"--model {model}: acceptance on random weights means nothing; name a trained model"
            )
        from echogen.bench.speed import jacobi, tables

        temperatures = jacobi.TEMPERATURES if self.temperature is None else (self.temperature,)
        scales = jacobi.SCALES if self.cfg is None else (self.cfg,)
        with progress("drawing") as update:
            result = jacobi.run(
                model,
                layouts=self.layouts,
                windows=self.window,
                drafts=self.draft or ("above",),
                temperatures=temperatures,
                scales=scales,
                batch=self.batch or 1,
                dtype=self.dtype,
                seed=self.seed,
                progress=update,
                device=device,
            )
        tables.console().print(jacobi.table(result))
        if self.json:
            print_json(result)


@dataclass(frozen=True)
class BenchTrain:
    """Time optimizer steps of a stage: images and tokens per second, and where the time goes."""

    stage: Literal["pmtp", "djo", "cycle-rl"]
    """Which stage."""
    recipe: str = "tiny"
    """Recipe of sizes, batch, accumulation, type, checkpointing: tiny, small or janus_pro_1b."""
    model: str | None = None
    """Model to start from (stage 1: only for its image tokenizer): a bundled one, a folder, a hub
    id, or random, for the recipe's sizes. Left out: the bundled model of the recipe's name, else
    random."""
    batch: int | None = None
    """Samples per step, in Cycle RL layouts per rollout (left out: the recipe's)."""
    repeats: int = 5
    """Timed steps."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train."""
    float32: bool = False
    """Use float32 where the recipe says bfloat16: for CPUs without bfloat16 instructions."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        check_range("batch", self.batch, 1, 4096)
        check_range("repeats", self.repeats, 1, 10_000)
        ModelOptions(device=self.device).check()
        recipe = find_recipe(self.recipe)
        from echogen.bench.speed import train

        try:
            with progress("timing") as update:
                r = train.run(
                    self.stage, self.model, self.batch, self.repeats, self.device, self.float32,
                    update, recipe,
                )  # fmt: skip
        except train.BatchError as error:
            raise InputError(f"--{error}") from None
        show(
            f"{self.stage} by {r['recipe']}: {r['images']} images a step",
            ("ms a step", "images/s", "tokens/s", "padding", "utilisation", "peak MiB"),
            [
                (
                    r["ms_per_step"],
                    r["images_per_s"],
                    r["tokens_per_s"],
                    f"{r['padding']:.1%}",
                    f"{r['utilisation']:.0%}",
                    r["peak_mib"],
                )
            ],
        )
        for what, by in (("phase", "phases"), ("innermost range", "shares")):
            shares = [(name, f"{share:.1%}") for name, share in r[by].items()]
            if shares:
                show(f"Time by {what}", (what, "share"), shares)
        if self.json:
            print_json(r)
        if r["interrupted"]:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class BenchKernels:
    """Time every operator against eager torch, torch.compile and other libraries: on a GPU if there
    is one, else the plain-torch references."""

    operator: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Which operator; repeatable (left out: all)."""
    size: str | None = None
    """tiny (default on a CPU), training or decoding (default on a GPU: both)."""
    provider: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What to compare with; repeatable: eager, compile, liger, trl, torchvision, torch, flash-attn
    (left out: all)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    repeats: int = 20
    """Timed runs of each on a CPU."""
    tune: bool = False
    """Instead: try every candidate for the operators' launch constants. Changes nothing. Without a
    GPU they are compiled only: registers, shared memory, spills, warps at once, instructions."""
    arch: str | None = None
    """Architecture that --tune compiles for without a GPU: sm_NN (NVIDIA) or gfxNNN (AMD); left
    out: sm_90."""
    out: Path | None = None
    """Folder for kernels.csv and one plot per operator."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        check_range("repeats", self.repeats, 1, 10_000)
        if self.out is not None:
            make_folder(self.out)
        device = usual_device(self.device)
        if self.tune:
            self._tune(device)
            return
        if self.arch is not None:
            raise InputError(
                f"--arch {self.arch}: only --tune takes it; `echogen bench compile --arch "
                f"{self.arch}` compiles the kernels as they are"
            )
        from echogen.bench.speed import kernels, tables

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
        try:
            if self.out is not None and result["kernels"]:
                self._write(result["kernels"])
        finally:  # even if the files fail, or Ctrl-C interrupts their drawing
            if self.json:
                print_json(result)
        if result["interrupted"]:
            raise KeyboardInterrupt
        if result["ended"]:
            raise Failure(result["ended"])
        wrong = [r for r in result["kernels"] if r["error"] and r["provider"] == "echogen"]
        if wrong:
            raise Failure(wrong[0]["error"])

    def _tune(self, device: str) -> None:
        if self.provider or self.out is not None:
            name = "provider" if self.provider else "out"
            raise InputError(f"--{name}: not used by --tune; leave it out")
        if self.arch is not None and device == "cuda":
            raise InputError(
                f"--arch {self.arch}: on a GPU --tune compiles for that GPU; leave it out"
            )
        refuse_interpreted()
        from echogen.bench.speed import tables, tune

        with progress("compiling" if device == "cpu" else "timing") as update:
            try:
                result = tune.run(
                    self.operator,
                    self.size,
                    device,
                    self.arch or "sm_90",
                    note=warn,
                    progress=update,
                )
            except ValueError as error:
                raise InputError(f"--{error}") from None
        tables.console().print(tables.tuned(result))
        if self.json:
            print_json(result)
        if result["ended"] == "interrupted":
            raise KeyboardInterrupt
        if result["ended"]:
            raise Failure(result["ended"])
        faults = [r["error"] for r in result["tuned"] if r["now"] and r["error"]]
        if faults:
            raise Failure(faults[0])

    def _write(self, rows: list[dict[str, object]]) -> None:
        from echogen.bench.speed import tables

        assert self.out is not None
        try:
            tables.write_csv(rows, self.out / "kernels.csv")
        except OSError as error:
            warn(f"{self.out / 'kernels.csv'}: not written ({error.strerror})")
        try:
            tables.plot(rows, self.out)
        except ImportError:
            warn("matplotlib is not installed; no plots were drawn")
        except Exception as error:  # the figures exist, and are printed after this
            warn(f"no plots were drawn ({type(error).__name__}: {error})")


@dataclass(frozen=True)
class Bench:
    """Measure speed, memory, gradients and quality; compare two runs; report what is recorded."""

    what: (
        Annotated[BenchEngine, tyro.conf.subcommand("engine")]
        | Annotated[BenchKernels, tyro.conf.subcommand("kernels")]
        | Annotated[BenchTrain, tyro.conf.subcommand("train")]
        | Annotated[BenchServing, tyro.conf.subcommand("serving")]
        | Annotated[BenchHttp, tyro.conf.subcommand("http")]
        | Annotated[BenchCredit, tyro.conf.subcommand("credit")]
        | Annotated[BenchQuality, tyro.conf.subcommand("quality")]
        | Annotated[BenchMemory, tyro.conf.subcommand("memory")]
        | Annotated[BenchRoofline, tyro.conf.subcommand("roofline")]
        | Annotated[BenchCompare, tyro.conf.subcommand("compare")]
        | Annotated[BenchReport, tyro.conf.subcommand("report")]
        | Annotated[BenchCompile, tyro.conf.subcommand("compile")]
    )

    def run(self) -> None:
        self.what.run()
