"""The commands that train: the image tokenizer, then stage after stage of the model."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from echogen.commands.options import (
    Json,
    ModelOptions,
    check_evaluates,
    check_range,
    flagged,
)
from echogen.commands.output import InputError, fail, print_json, show, warn
from echogen.commands.run_folder import run_folder

if TYPE_CHECKING:
    from transformers import JanusVQVAE

    from echogen.train.config import (
        CycleRLConfig,
        DJOConfig,
        LoopConfig,
        PMTPConfig,
        Recipe,
        VQConfig,
    )
    from echogen.train.run.loop import Stage
    from echogen.train.start import Start

    StageConfig = TypeVar("StageConfig", VQConfig, PMTPConfig, DJOConfig, CycleRLConfig)

MOST_SAMPLES = 1_000_000
RUN_FILES = ("state.pt", "state.prev.pt", "best.pt", "config.json", "metrics.jsonl", "model")
OWN_OPTIONS = {"bf16": "float32", "muon_lr": "lora"}
"""Settings of the loop that are set by an option of another name."""


Set = Annotated[
    tuple[str, ...], tyro.conf.arg(name="set", metavar="NAME=VALUE"), tyro.conf.UseAppendAction
]
AnyShape = Annotated[bool, tyro.conf.arg(help="Accept a model of another shape than the recipe's.")]
Begin = Annotated[str, tyro.conf.arg(name="from", metavar="MODEL-OR-RUN")]
BeginOrNot = Annotated[str | None, tyro.conf.arg(name="from", metavar="MODEL-OR-RUN")]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run is stored and how its steps are made, for every stage."""

    out: Path
    """Folder of the run; the trained model goes to its subfolder model/."""
    recipe: str = "tiny"
    """Which configuration: tiny, small or janus_pro_1b."""
    steps: int | None = None
    """Optimizer steps, instead of the recipe's."""
    batch: int | None = None
    """Samples per step over all processes (cycle-rl: layouts), instead of the recipe's."""
    accumulate: int | None = None
    """Parts to split each step's batch into: less memory, the same step. (In cycle-rl they share
    one drawing, whose memory --set draw_at_once=N bounds.)"""
    checkpoint_activations: bool = False
    """Recompute each decoder block in the backward pass, to save memory (not for vq)."""
    ema: float | None = None
    """Decay (such as 0.999) of a moving average of the weights, which is evaluated and exported."""
    float32: bool = False
    """Use float32 where the recipe says bfloat16: for CPUs without bfloat16 instructions."""
    deterministic: bool = False
    """Refuse operations whose result may differ from run to run, as some do on a GPU."""
    device: str = "cpu"
    """cpu, cuda or cuda:N; cuda under torchrun is each process's own GPU."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How torchrun's processes hold the weights: all in each (ddp, auto) or a shard (fsdp)."""
    lora: int = 0
    """Rank of LoRA adapters to train instead of the weights; 0: none. Needs peft (not for vq)."""
    assign: Set = ()
    """Any other setting, such as loop.seed=1 (`train settings STAGE` lists them); repeatable."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, with the settings it began with (but for
    those that only change how a step is computed)."""
    repeat: Annotated[Path | None, tyro.conf.arg(metavar="DUMP")] = None
    """Recompute the step in a dump-stepN.pt of a run with these settings; write nothing."""
    json: Json = False
    """End with one JSON object on stdout."""

    def check(self) -> None:
        """Refuse a folder or a file that is not what it must be. Raises InputError."""
        if self.repeat is None:
            check_run_folder(self.out, self.resume)
        elif not self.repeat.is_file():
            raise InputError(f"--repeat {self.repeat}: no such file; name a dump-stepN.pt of a run")
        self.place()

    def place(self) -> str:
        """Return the device of the run's module. Raises InputError if it does not exist."""
        own = os.environ.get("LOCAL_RANK", "0")
        device = f"cuda:{own}" if self.device == "cuda" else self.device
        ModelOptions(device=device).check()
        if device != "cpu":
            import torch

            torch.cuda.set_device(device)
        return device

    def folder(self) -> AbstractContextManager[None]:
        """Make and lock the run's folder within a block, if something will be written. Of
        torchrun's processes, the first does this for all."""
        own = self.repeat is None and os.environ.get("RANK", "0") == "0"
        return run_folder(self.out) if own else nullcontext()

    def asked(self) -> dict[str, Any]:
        """Return the settings given by their own options, by name."""
        names = ("steps", "accumulate", "checkpoint_activations", "ema", "deterministic")
        asked: dict[str, Any] = {f"loop.{name}": getattr(self, name) for name in names}
        asked["batch"] = self.batch
        asked = {k: v for k, v in asked.items() if v is not None and v is not False}
        if self.parallel != "auto":
            asked["loop.parallel"] = self.parallel
        if self.float32:
            asked["loop.bf16"] = False
        if self.lora:  # Muon is for whole matrices
            asked |= {"loop.lora": self.lora, "loop.muon_lr": None}
        return asked

    def sized(self, config: StageConfig) -> StageConfig:
        """Return a stage's configuration with the requested settings. Raises InputError."""
        if self.steps is not None and self.steps < 1:
            raise InputError(f"--steps {self.steps}: it must be at least 1")
        check_range("batch", self.batch, 1, MOST_SAMPLES)
        sized = with_settings(config, self.assign, self.asked())
        if sized.loop.deterministic:  # read by cuBLAS, which building a stage may start
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if self.resume and self.repeat is None:
            check_same_run(self.out, sized)
        return sized

    def train(self, stage: Stage) -> None:
        """Run the stage, or repeat a step of it."""
        loop = stage.config.loop
        if self.repeat is not None:
            repeat(stage, loop, self.repeat, self.json)
        else:
            if loop.bf16 and self.device == "cpu":
                from echogen.train.run.precision import advice, bf16_slowdown

                if told := advice(bf16_slowdown()):
                    warn(told)
            train(stage, loop, self.out, self.resume, self.json)


@dataclass(frozen=True, kw_only=True)
class TrainVQ(RunOptions):
    """Train the image tokenizer from scratch."""

    def run(self) -> None:
        self.check()
        recipe = find_recipe(self.recipe)
        config = self.sized(recipe.vq)
        from echogen.train.stages.vq import VQStage

        stage = VQStage(config, recipe.pmtp.width)
        if self.device != "cpu":
            stage.module.to(self.place())
        self.train(stage)


@dataclass(frozen=True, kw_only=True)
class DataOptions(RunOptions):
    """A run that learns from pictures."""

    data: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Learn from pictures of your own: a folder with a layouts.jsonl, instead of ShapesWorld."""

    def asked(self) -> dict[str, Any]:
        asked = super().asked()
        if self.data is not None:  # a trailing slash does not make another run
            asked["data"] = str(Path(self.data))
        return asked

    def sized(self, config: StageConfig) -> StageConfig:
        if self.data == "":  # from an unset variable: the setting would mean ShapesWorld
            raise InputError("--data is empty; name a folder, or leave it out for ShapesWorld")
        sized = super().sized(config)
        folder = getattr(sized, "data", "")
        if folder and not (Path(folder) / "layouts.jsonl").is_file():
            raise InputError(
                f"--data {folder}: no layouts.jsonl there; write one layout a line, each with the "
                f'path of its picture as "image"'
            )
        scenes = getattr(sized, "scenes", None)
        if folder and scenes != getattr(config, "scenes", None):
            raise InputError(
                f"--set scenes={scenes}: these are ShapesWorld's, and --data learns from the "
                f"pictures of its folder instead; leave it out"
            )
        return sized


@dataclass(frozen=True, kw_only=True)
class TrainPMTP(DataOptions):
    """Train stage 1: draw layouts and ground expressions in parallel."""

    vq: Path | None = None
    """Folder of the trained image tokenizer (the model/ of `train vq`), for fresh weights."""
    begin: BeginOrNot = None
    """Instead of --vq, continue stage 1: a run of this command, its model, or a bundled name."""
    pretrained: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Instead of --vq, start from a plain Janus checkpoint (folder or hub id); adds location
    tokens."""
    any_shape: AnyShape = False

    def run(self) -> None:
        self.check()
        if sum(given is not None for given in (self.vq, self.begin, self.pretrained)) != 1:
            raise InputError(
                "name one of --vq (an image tokenizer, for fresh weights), --from (a model of this "
                "stage, to continue) and --pretrained (a plain Janus checkpoint)"
            )
        recipe = find_recipe(self.recipe)
        config = self.sized(recipe.pmtp if self.begin is None else recipe.pmtp_on)
        from echogen.train.stages.pmtp import PMTPStage

        if self.vq is None:
            stage = PMTPStage(config, self._start(replace(recipe, pmtp=config)))
        else:
            if not (self.vq / "config.json").is_file():
                raise InputError(
                    f"--vq {self.vq}: no config.json there; name the model/ of `train vq`"
                )
            vq = load_vq(self.vq, self.place())
            stage = PMTPStage(config, vq)
        self.train(stage)

    def _start(self, recipe: Recipe) -> Start:
        """Load what --from or --pretrained names."""
        from echogen.train.start import check_shape, load_start
        from echogen.train.vocabulary import pretrained_start

        path = self.begin or self.pretrained
        assert path is not None
        if self.begin is not None:
            start = load_start(path, "pmtp", device=self.place())
        else:
            start = pretrained_start(path, recipe.pmtp.bins, self.place())
        if not self.any_shape:
            check_shape(start, path, recipe)
        engine, given = start.engine, {text.partition("=")[0].strip() for text in self.assign}
        has = {"rope_theta": engine.transformer.config.rope_theta}
        has["bins"] = engine.prompts.codec.scale + 1
        for name, value in has.items():
            asked = getattr(recipe.pmtp, name)
            if name in given and asked != value:
                raise InputError(
                    f"--set {name}={asked}: {path} has {value}, and only fresh weights (--vq) take "
                    f"another; leave it out"
                )
        return start


@dataclass(frozen=True, kw_only=True)
class TrainDJO(DataOptions):
    """Train stage 2: ground expressions in the model's own drawing and let the gradient through."""

    begin: Begin
    """Where to start: a run of `train pmtp`, a model that came from one, or a bundled name."""
    any_stage: bool = False
    """Accept a model of any stage."""
    any_shape: AnyShape = False

    def run(self) -> None:
        self.check()
        recipe = find_recipe(self.recipe)
        config = self.sized(recipe.djo)
        from echogen.train.stages.djo import DJOStage
        from echogen.train.start import check_shape, load_start

        start = load_start(self.begin, "pmtp", self.any_stage, self.place())
        if not self.any_shape:
            check_shape(start, self.begin, recipe)
        stage = DJOStage(config, start)
        self.train(stage)


@dataclass(frozen=True, kw_only=True)
class TrainCycleRL(RunOptions):
    """Train stage 3: reinforce the drawings in which the layout is found again."""

    begin: Begin
    """Where to start: a run of `train djo`, a model that came from one, or a bundled name."""
    layouts: str = "real"
    """What to draw: real (ShapesWorld), random, or a file with one JSON layout per line."""
    any_stage: bool = False
    """Accept a model of any stage."""
    any_shape: AnyShape = False
    force: bool = False
    """Start even if the self-reward hardly agrees with the judge."""

    def asked(self) -> dict[str, Any]:
        asked = super().asked()
        if self.layouts != "real":
            asked["layouts"] = self.layouts
        return asked | ({"force": True} if self.force else {})

    def run(self) -> None:
        self.check()
        recipe = find_recipe(self.recipe)
        config = self.sized(recipe.cycle_rl)
        if config.layouts not in ("real", "random") and not Path(config.layouts).is_file():
            raise InputError(f"--layouts {config.layouts}: no such file; name one, real or random")
        if config.layouts != "real" and config.scenes != recipe.cycle_rl.scenes:
            raise InputError(
                f"--set scenes={config.scenes}: these are ShapesWorld's, and --layouts "
                f"{config.layouts} takes others instead; leave it out"
            )
        from echogen.train.stages.cycle_rl import CycleRLStage
        from echogen.train.start import check_shape, load_start

        start = load_start(self.begin, "djo", self.any_stage, self.place())
        if not self.any_shape:
            check_shape(start, self.begin, recipe)
        stage = CycleRLStage(config, start)
        self.train(stage)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Every setting of a stage: its value, and what `--set NAME=VALUE` takes for it."""

    stage: Annotated[Literal["vq", "pmtp", "pmtp-on", "djo", "cycle-rl"], tyro.conf.Positional]
    """Which stage; pmtp-on is stage 1 continued (`train pmtp --from`)."""
    recipe: str = "tiny"
    """Which configuration: tiny, small or janus_pro_1b."""
    assign: Set = ()
    """Settings to try, such as loop.seed=1; repeatable."""
    json: Json = False
    """End with one JSON object on stdout."""

    def folder(self) -> AbstractContextManager[None]:
        """Return an empty context, as nothing is written."""
        return nullcontext()

    def run(self) -> None:
        from echogen.train.config import to_json
        from echogen.train.settings import describe_type, format_value, settings_of

        config = getattr(find_recipe(self.recipe), self.stage.replace("-", "_"))
        config = with_settings(config, self.assign, {})
        rows = [
            (name, format_value(setting.value), describe_type(setting.kind))
            for name, setting in settings_of(config).items()
        ]
        show(f"{self.stage} by {self.recipe}", ("setting", "value", "takes"), rows)
        if self.json:
            print_json(to_json(config))


@dataclass(frozen=True)
class Train:
    """Train a model, stage by stage."""

    stage: (
        Annotated[TrainVQ, tyro.conf.subcommand("vq")]
        | Annotated[TrainPMTP, tyro.conf.subcommand("pmtp")]
        | Annotated[TrainDJO, tyro.conf.subcommand("djo")]
        | Annotated[TrainCycleRL, tyro.conf.subcommand("cycle-rl")]
        | Annotated[TrainSettings, tyro.conf.subcommand("settings")]
    )

    def run(self) -> None:
        with start_up(), self.stage.folder():
            self.stage.run()


class _Asked(BaseException):
    """SIGTERM arrived before the loop listened for it."""


@contextmanager
def start_up() -> Iterator[None]:
    """Handle SIGTERM before the first step, for example while data is made for minutes: print a
    line and exit with the same code as in the loop, which listens for itself (see `Stop`).

    Of torchrun's processes, the first reports. The others may be waiting for it inside a library,
    where no Python code is called, so the signal ends them as usual.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or os.environ.get("RANK", "0") != "0":
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise _Asked

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except _Asked:
        fail("train: stopped by SIGTERM while starting up; the parts of data made so far are kept")
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def check_run_folder(out: Path, resume: bool) -> None:
    """Refuse to overwrite a run, or to resume where there is none."""
    present = [name for name in RUN_FILES if (out / name).exists()]
    if present and not resume:
        raise InputError(
            f"--out {out}: holds a run already ({', '.join(present)}); "
            "add --resume to continue it, or name another folder"
        )
    if resume and not present:
        raise InputError(f"--out {out}: holds no run to resume; leave --resume out")


def check_same_run(out: Path, config: Any) -> None:
    """Refuse to resume a run that has other settings, before a model and data are loaded for it.
    Without a state the run starts over, and the loop decides (`other_run`)."""
    from echogen.train.config import differences, to_json
    from echogen.train.settings import FOUND_OUT
    from echogen.train.stages.stage import settings, summarised

    if not any((out / name).exists() for name in ("state.pt", "state.prev.pt")):
        return
    try:
        begun = settings(json.loads((out / "config.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    foreign = sorted(set(begun) - {part.name for part in fields(config)})
    changed = [
        line
        for line in differences(begun, settings(to_json(config)))
        if line.split()[0] not in FOUND_OUT
    ]
    if foreign or changed:
        why = f"{foreign[0]} is no setting of this stage" if foreign else summarised(changed)
        raise InputError(
            f"--out {out}: its run has other settings ({why}); give the same recipe and options, "
            f"or another --out"
        )


def find_recipe(name: str) -> Recipe:
    """Return the recipe of that name. Raises InputError with the known names."""
    from echogen.train.recipes import RECIPES

    if name not in RECIPES:
        raise InputError(f"--recipe {name}: unknown; choose {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()


def with_settings(config: StageConfig, assign: Sequence[str], asked: dict[str, Any]) -> StageConfig:
    """Return a stage's configuration with the values from ``--set`` and from settings' own options,
    by the settings' names. Raises InputError, also if a setting is given two different values."""
    from echogen.train.settings import SettingError, assigned, format_value, with_values

    values = dict(asked)
    for text in assign:
        try:
            name, value = assigned(config, text)
        except SettingError as error:
            raise InputError(f"--set {error}") from None
        if values.setdefault(name, value) != value:
            last = name.rpartition(".")[2]
            by = OWN_OPTIONS.get(last, last).replace("_", "-")
            by = f"--{by}" if name in asked else "another --set"
            raise InputError(
                f"--set {text}: {by} makes {name} {format_value(values[name])}; "
                f"leave one of them out"
            )
    try:
        return with_values(config, values)
    except ValueError as error:
        own = {name.rpartition(".")[2] for name in asked}
        told = flagged(error) if str(error).partition(" ")[0] in own else f"--set {error}"
        raise InputError(told) from None


def load_vq(folder: Path, device: str = "cpu") -> JanusVQVAE:
    """Load an image tokenizer. Raises InputError if it is damaged or not complete."""
    from safetensors import SafetensorError
    from torch import nn
    from transformers import JanusVQVAE
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it would warn of is checked below
    try:
        loaded: Any = JanusVQVAE.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "damaged"
        raise InputError(f"--vq {folder}: does not load ({reason})") from None
    vq: JanusVQVAE
    vq, info = loaded
    odd = sorted([*info["missing_keys"], *info["unexpected_keys"]])
    if odd:
        raise InputError(
            f"--vq {folder}: no whole image tokenizer ({len(odd)} keys missing or unknown, such as "
            f"{odd[0]})"
        )
    nn.Module.to(vq, device)
    return vq


def train(stage: Stage, loop: LoopConfig, out: Path, resume: bool, as_json: bool) -> None:
    """Run a stage to its end and report its last numbers.

    Raises:
        BeginRefused: the stage refuses to start.
        TrainingError: training failed.
        SystemExit: a signal stopped the run, and its state is saved (see `Stopped`): 143 for
            SIGTERM, 130 for SIGINT.
    """
    from transformers.utils import logging

    from echogen.train.run.loop import run

    check_evaluates()
    logging.disable_progress_bar()  # of writing shards; the loop has its own
    run(stage, loop, out, resume)
    last: dict[str, float] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        last |= json.loads(line)
    show(f"{stage.name}: {out / 'model'}", ("measure", "last value"), list(last.items()))
    if as_json:
        print_json({"stage": stage.name, "out": str(out), "model": str(out / "model"), **last})


def repeat(stage: Stage, loop: LoopConfig, dump: Path, as_json: bool) -> None:
    """Compute a dumped step again and show the result."""
    from echogen.train.run.dump import repeat_dump

    found = repeat_dump(stage, loop, dump)
    rows: list[tuple[str, object]] = [*found.numbers.items(), ("gradient norm", found.grad_norm)]
    for what, names in (("gradients", found.broken), ("weights", found.weights)):
        rows.append((f"{what} that are not finite", f"{len(names)} ({', '.join(names[:3])})"))
    rows.append(("the batch of the dump", "made again" if found.same_inputs else "NOT made again"))
    show(f"{stage.name}: step {found.step} of {dump}", ("measure", "value"), rows)
    if as_json:
        print_json({"stage": stage.name, "dump": str(dump), **asdict(found)})
