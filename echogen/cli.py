"""The command line: parse arguments, run one command, and turn errors into exit codes."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from echogen import __version__
from echogen.commands.bench import Bench
from echogen.commands.evaluate import Eval
from echogen.commands.helptext import readable
from echogen.commands.layouts import Layouts
from echogen.commands.output import Failure, InputError, fail
from echogen.commands.pictures import Cycle, Generate, Ground
from echogen.commands.profile import Profile
from echogen.commands.serve import Serve
from echogen.commands.training import Train
from echogen.commands.usage import told_in_one_line
from echogen.doctor import Doctor

subcommand = tyro.conf.subcommand
Command = (
    Annotated[Doctor, subcommand("doctor")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[Ground, subcommand("ground")]
    | Annotated[Cycle, subcommand("cycle")]
    | Annotated[Serve, subcommand("serve")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Layouts, subcommand("layouts")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Profile, subcommand("profile")]
)
DESCRIPTION = "One transformer that draws an image from a layout and finds the layout in an image."

# Errors that refuse input, by module. Only a loaded module can have raised one, so nothing heavy
# is imported to find out.
_REFUSALS = {
    "echogen.engine.layout": "LayoutError",
    "echogen.engine.cache_folder": "CacheError",
    "echogen.engine.images.vision": "ImageError",
    "echogen.engine.checkpoints.keymap": "CheckpointError",
    "echogen.engine.prompt": "PromptError",
    "echogen.engine.config": "ConfigError",
    "echogen.engine.cpu.loader": "SwitchError",
    "echogen.engine.serving.budget": "BudgetError",
    "echogen.train.stages.stage": "BeginRefused",
    "echogen.train.run.checkpoint": "StateError",
    "echogen.train.data.endpoint": "LLMError",
    "echogen.bench.compare": "CompareError",
    "echogen.bench.quality.records": "QualityError",
    "echogen.bench.report": "ReportError",
}
# Errors that report, also in one line, that a command failed.
_FAILURES = {
    "echogen.train.stages.stage": "TrainingError",
    "echogen.bench.harness": "WrongResult",
    "echogen.bench.profile.nsight": "NsightError",
}


def refusals() -> tuple[type[Exception], ...]:
    """The errors that mean bad input: exit code 2 and one line instead of a traceback."""
    return (InputError, *_loaded(_REFUSALS))


def failures() -> tuple[type[Exception], ...]:
    """The errors that mean a failure: exit code 1 and one line."""
    return (Failure, *_loaded(_FAILURES))


def _flush() -> None:
    print(end="", flush=True)  # has no effect if stdout is closed (`>&-`) and so None


def _loaded(errors: dict[str, str]) -> list[type[Exception]]:
    return [getattr(sys.modules[m], name) for m, name in errors.items() if m in sys.modules]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code (0 done, 2 bad usage or input, 130 Ctrl-C, 1 other).

    Args:
        argv: the arguments after the program's name; None: those of this process.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without × or – still gets its table
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        _flush()
    except BrokenPipeError:  # the reader of our output left; the interpreter's own flush would fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _run(argv: list[str]) -> int:
    if argv == ["--version"]:
        print(f"echogen {__version__}")
        return 0
    try:
        with told_in_one_line(), readable():
            command = tyro.cli(
                Command,
                prog="echogen",
                description=DESCRIPTION,
                args=argv,
                config=(
                    tyro.conf.OmitArgPrefixes,
                    tyro.conf.OmitSubcommandPrefixes,
                    tyro.conf.FlagCreatePairsOff,
                ),
            )
    except SystemExit as leaving:  # --help, or a usage error already explained
        return leaving.code if isinstance(leaving.code, int) else 1
    try:
        command.run()
        _flush()
    except KeyboardInterrupt:
        fail("interrupted")
        return 130
    except refusals() as error:
        fail(str(error))
        return 2
    except failures() as error:  # after the refusals: some are a kind of failure
        _flush()
        fail(str(error))
        return 1
    return 0
