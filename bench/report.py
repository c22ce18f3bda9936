"""The tables of bench/README.md, written from the committed results and from nothing else.

Each part answers a question and names the machine, the commit and the command of its figures.
`echogen bench report --write` puts the parts between their marks, and a test fails if the page
differs.
"""

from __future__ import annotations

import json
from pathlib import Path

from echogen.bench.answers.drawing import drawing, engine
from echogen.bench.answers.operators import kernels, memory
from echogen.bench.answers.part import Part, Result, indexed
from echogen.bench.answers.training import training
from echogen.bench.answers.windows import jacobi, windows

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- bench report -->", "<!-- end of bench report -->"
NO_GPU = Part(
    "And on a GPU?",
    "No figure of a GPU is recorded yet: `make gpu` takes them on a machine that has one and "
    "leaves them under `bench/results/gpu/`, where this page reads them.",
)


class ReportError(ValueError):
    """A page without the marks, or a result that cannot be read; the message names the file."""


def section(results: Path = RESULTS) -> str:
    """Return the tables as Markdown, without their marks."""
    gpu, xeon = results / "gpu", results / "xeon"
    port = [engine(_read(folder, "engine-*.json")) for folder in (results, xeon)]
    operators = kernels(_read(gpu, "kernels.json") + _read(gpu, "kernels-*.json"))
    drawn, *others = _speeds(results)
    several, saved = jacobi(_read(results, "jacobi-*.json")), memory(_read(results, "memory.json"))
    parts = [part for part in (port[0], drawn, several, *others, saved) if part]
    parts += [part.on("an Intel Xeon") for part in (port[1], *_speeds(xeon)) if part]
    parts += [part.on("a GPU") for part in (*_speeds(gpu), operators) if part] or [NO_GPU]
    return indexed(parts)


def _speeds(folder: Path) -> list[Part | None]:
    """What one machine's results say of drawing and of training."""
    return [
        drawing(_read(folder, "latency-*.json") + _read(folder, "rollout-*.json")),
        windows(_read(folder, "window-*.json")),
        training(_read(folder, "train-*.json")),
    ]


def placed(page: str, text: str) -> str:
    """Return the page with the tables between its marks.

    Raises:
        ReportError: the marks are missing or out of order.
    """
    head, found, rest = page.partition(BEGIN)
    _, ended, tail = rest.partition(END)
    if not found or not ended:
        raise ReportError(f"bench/README.md: lacks the marks {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"


def _read(folder: Path, pattern: str) -> list[Result]:
    found = []
    for path in sorted(folder.glob(pattern)):
        try:
            found.append(json.loads(path.read_text()))
        except ValueError as error:
            raise ReportError(f"{path}: not valid JSON ({error})") from None
    return found
