"""The documents: their links lead somewhere, their commands are there, their Python runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = re.findall(r'subcommand\("(\w+)"\)', (ROOT / "echogen" / "cli.py").read_text())
PAGES = sorted(
    page
    for folder in (".", "engine", "train", "kernels", "bench")
    for page in (ROOT / folder).glob("*.md")
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TRAINS = "RECIPES"
"""In a block that begins a run of minutes: it is read, and its imports are tried."""


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(.*?)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [block for named, block in found if named == language]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {target}"


def test_blocks_are_found():
    readme = ROOT / "README.md"
    assert "echogen doctor" in "".join(blocks(readme, "")) and len(blocks(readme, "python")) == 1


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_nothing_is_left_to_fill_in(page):
    """A word in capitals that stands for what is to come."""
    left = re.findall(r"^([A-Z]{4,})$| (?:TODO|TBD|MISSING)\b", page.read_text(), re.M)
    assert not left


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands(page):
    for line in "\n".join(blocks(page, "")).splitlines():
        if found := re.match(r"(?:\S+=\S+ )*echogen +([a-z]+)", line):
            assert found[1] in COMMANDS, f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    known: dict[str, object] = {}
    for block in blocks(page, "python"):
        if TRAINS in block:
            tree = ast.parse(block)
            tree.body = [
                node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))
            ]
            exec(compile(tree, page.name, "exec"), {})
        else:
            exec(compile(block, page.name, "exec"), known)
