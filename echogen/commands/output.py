"""Output of commands: tables for people, one JSON line for programs, progress, files."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class InputError(Exception):
    """Bad input found by a command; the message is one line that names the value and the fix."""


class Failure(Exception):
    """A command did its work and found a failure; the message is one line."""


def fail(message: str) -> None:
    """Print one line on stderr, whatever the message holds."""
    print("echogen: " + " ".join(message.split()), file=sys.stderr)


def warn(message: str) -> None:
    """Print one line on stderr about something that does not stop the command."""
    print("echogen: warning: " + " ".join(message.split()), file=sys.stderr)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table to stdout; cells are plain text, so brackets in expressions stay brackets."""
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    for i, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[i], (int, float)) for row in rows)
        # In a narrow terminal only the first and the last column fold, unless they are numeric.
        widest = max((cell_len(row[i]) for row in cells), default=0)
        whole = numeric or 0 < i < len(columns) - 1
        table.add_column(
            Text(name),
            justify="right" if numeric else "left",
            no_wrap=whole,
            min_width=max(widest, cell_len(name)) if whole else min(20, widest),
        )
    for row in cells:
        table.add_row(*map(Text, row))
    console = Console()
    # If that is not narrow enough, the terminal breaks the lines: rich would leave columns out.
    least = Measurement.get(console, console.options.update(max_width=10**6), table).minimum
    console.width = max(console.width, least)
    console.print(Text(title, "bold"), soft_wrap=True)  # rich would fold a table's title
    console.print(table)


def print_json(data: dict[str, Any]) -> None:
    """Print the one JSON object for programs, as the last line of stdout."""
    print(json.dumps(finite(data), allow_nan=False))


def finite(value: Any) -> Any:
    """Return the value with every number that JSON cannot hold (NaN, infinity) turned into None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr if that is a terminal; yield ``update(done, total)``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# --- files ------------------------------------------------------------------------------------


def check_file(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse, before any work, an output file that could not be written afterwards."""
    if path.suffix.lower() not in suffixes:
        raise InputError(f"--out {path}: ends in {path.suffix!r}; choose {', '.join(suffixes)}")
    if path.is_dir():
        raise InputError(f"--out {path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"--out {path}: the folder {path.parent} cannot be written to")


def make_folder(path: Path) -> None:
    """Make an output folder with its parents."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be made ({error.strerror})") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"--out {path}: cannot be written to")


@contextmanager
def folder_for(path: Path) -> Iterator[None]:
    """Make an output folder and its parents for the block that fills it. If the block ends in an
    error with nothing written, remove those that were made."""
    made = list(takewhile(lambda folder: not os.path.lexists(folder), (path, *path.parents)))
    try:
        make_folder(path)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # it was never made, or is not empty
                folder.rmdir()
        raise


def write(path: Path, data: bytes) -> None:
    """Write a file whole, or not at all."""
    from echogen.engine.checkpoints.shards import replace_file

    try:
        replace_file(path, data)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror})") from None


def write_picture(path: Path, image: Image.Image) -> None:
    """Encode a picture in the format of its file name; the same picture gives the same bytes."""
    from io import BytesIO

    from PIL import Image as Pillow

    Pillow.init()
    buffer = BytesIO()
    image.save(buffer, Pillow.registered_extensions()[path.suffix.lower()])
    write(path, buffer.getvalue())
