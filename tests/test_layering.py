"""Imports point one way: kernels ← engine ← train; nothing imports bench or tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "train": {"train", "engine", "kernels"},
    "bench": {"bench", "train", "engine", "kernels", "echogen"},
    "tests": {"tests", "bench", "train", "engine", "kernels", "echogen"},
    "echogen": {"echogen", "bench", "train", "engine", "kernels"},
}
FOLDERS = tuple(MAY_IMPORT)
LAZY = {"kernels", "engine", "train", "bench"}
"""What echogen/ imports inside functions only, so that ``echogen --help`` does not wait for it."""
PUBLIC = {"Engine": "engine", "Layout": "engine", "LayoutObject": "engine", "LayoutError": "engine",
          "Box": "engine", "Sampling": "engine", "Scheduler": "engine"}  # fmt: skip


def imports(tree: ast.AST, eager: bool = True) -> Iterator[tuple[int, int, str, bool]]:
    """Every import below ``tree`` as (line, relative level, dotted name, runs at import)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, 0, alias.name, eager
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = ".".join(filter(None, (node.module, alias.name)))
                yield node.lineno, node.level, name, eager
        elif isinstance(node, ast.Call) and node.args and _imports_by_name(node.func):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, 0, name.value, eager
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from imports(ast.Module([child], []), False)
            for child in node.orelse:
                yield from imports(ast.Module([child], []), eager)
        else:
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports(node, eager and not function)


def _imports_by_name(function: ast.expr) -> bool:
    return ast.unparse(function) in ("importlib.import_module", "import_module", "__import__")


def target(name: str) -> str | None:
    """The folder that ``echogen.…`` lies in; None for foreign packages."""
    top, *rest = name.split(".")
    if top != "echogen":
        return None
    if rest and rest[0] in FOLDERS:
        return rest[0]
    return PUBLIC.get(rest[0], "echogen") if rest else "echogen"


def violations(path: Path, source: str) -> list[str]:
    """What is wrong with the imports of the file at ``path`` (relative to the root)."""
    folder = path.parts[0] if len(path.parts) > 1 else ""
    found = []

    def report(line: int, what: str) -> None:
        found.append(f"{path}:{line}: {what}")

    for line, level, name, eager in imports(ast.parse(source)):
        if level:
            if level >= len(path.parts):
                report(line, f"relative import of {name} leaves {folder}/")
            continue
        if name.split(".")[0] in FOLDERS and name.split(".")[0] != "echogen":
            report(line, f"{name} is imported by its bare name; write echogen.{name}")
            continue
        to = target(name)
        if to is None or not folder:
            continue
        if to not in MAY_IMPORT[folder]:
            report(line, f"{folder}/ imports {name}")
        elif folder == "echogen" and to in LAZY and eager:
            report(line, f"{name} is imported when echogen is; move it into the function")
    return found


FILES = sorted(
    p.relative_to(ROOT)
    for p in [*ROOT.glob("*.py"), *(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py"))]
)


def test_files_were_found():
    assert {p.parts[0] for p in FILES} >= set(FOLDERS)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("folder", ["kernels", "tests"])
def test_folders_that_are_no_regular_packages(folder):
    """kernels/: transformers probes for a package of this name; tests/: imported by file."""
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_every_public_name_is_there_and_known_here():
    import echogen

    assert set(echogen.__all__) - {"__version__"} == set(PUBLIC)
    for name in echogen.__all__:
        assert getattr(echogen, name) is not None


PLANTED = [
    ("kernels/a.py", "from echogen.engine import layout"),
    ("kernels/a.py", "import echogen.engine.layout as l"),
    ("kernels/a.py", "from echogen import engine"),
    ("kernels/a.py", "from echogen import Layout"),
    ("kernels/reference/a.py", "def f():\n    from echogen.train.run.loop import run"),
    ("kernels/reference/a.py", "from ...engine import layout"),
    ("kernels/a.py", "from ..engine.layout import Layout"),
    ("engine/a.py", "from echogen.train.config import LoopConfig"),
    ("engine/a.py", "if TYPE_CHECKING:\n    from echogen.train.config import LoopConfig"),
    ("engine/a.py", "import importlib\nimportlib.import_module('echogen.bench.harness')"),
    ("engine/a.py", "from echogen.cli import main"),
    ("engine/a.py", "from .. import train"),
    ("train/data/a.py", "try:\n    import echogen.bench\nexcept ImportError:\n    pass"),
    ("train/a.py", "from echogen.tests.conftest import model"),
    ("bench/a.py", "from echogen.tests import conftest"),
    ("bench/a.py", "from tests.conftest import model"),
    ("engine/a.py", "from kernels.boxes import box_iou"),
    ("tests/engine/a.py", "import train.loop"),
    ("echogen/a.py", "from echogen.engine.layout import Layout"),
    ("echogen/a.py", "from echogen import Engine"),
    ("echogen/commands/a.py", "class A:\n    from echogen.train import loop"),
    ("echogen/commands/a.py", "if x:\n    import echogen.kernels.boxes"),
    (
        "echogen/commands/a.py",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import echogen.kernels.boxes",
    ),
    ("echogen/a.py", "def f():\n    import echogen.tests.conftest"),
    ("echogen/a.py", "from ..engine import layout"),
]


@pytest.mark.parametrize("path, source", PLANTED)
def test_a_planted_violation_is_caught(path, source):
    assert len(violations(Path(path), source)) == 1


ALLOWED = [
    ("kernels/a.py", "import torch\nfrom echogen.kernels.reference import boxes"),
    ("engine/a.py", "from echogen.kernels.boxes import box_iou\nfrom echogen import engine"),
    ("train/data/a.py", "from echogen.engine.layout import Layout\nfrom . import shapes"),
    ("train/data/a.py", "from ..config import LoopConfig"),
    ("bench/a.py", "from echogen import Engine\nfrom echogen.train import loop"),
    ("tests/a.py", "from echogen.bench import harness\nfrom echogen.cli import main"),
    ("echogen/a.py", "def f():\n    from echogen.engine.layout import Layout"),
    ("echogen/a.py", "if TYPE_CHECKING:\n    from echogen.engine.layout import Layout"),
    ("echogen/a.py", "from echogen.commands.output import fail\nfrom echogen import __version__"),
]


@pytest.mark.parametrize("path, source", ALLOWED)
def test_what_the_house_allows_is_let_through(path, source):
    assert violations(Path(path), source) == []
