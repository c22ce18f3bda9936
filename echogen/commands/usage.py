"""Usage errors in one line, as bad input has: tyro explains them in a box of a dozen.

Only what it prints is read, so a box of another form than is known here becomes a longer line.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator

from echogen.commands.output import fail

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = ("╭", "╰")
_RULE = {"─", "-", "+"}
_MISSING = re.compile(r"Missing from (.*):")
_PLAINER = (
    (r"invalid literal for int\(\) with base 10: ('.*')", r"\1 is no whole number"),
    (r"could not convert string to float: ('.*')", r"\1 is no number"),
    (
        r"no type matching \{None\}\|\{(.* .*)\} could be instantiated from \[(.*)\]",
        r"\2 is not \1",
    ),
    (r"no type matching \{None\}\|(\S+) could be instantiated from \[('.*')\]", r"\2 is no \1"),
    (r" is no INT$", " is no whole number"),
    (r" is no FLOAT$", " is no number"),
    (r"For full helptext, (?:run:?|see) ", "see "),
)
"""Python's and tyro's wording, and what the command line says."""


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """What is refused within, with exit code 2 and a box on stderr, is told in one line there."""
    told, refused = io.StringIO(), False
    try:
        with contextlib.redirect_stderr(told):
            yield
    except SystemExit as leaving:
        refused = leaving.code == 2
        raise
    finally:
        if refused:
            fail(one_line(told.getvalue()))
        else:
            sys.stderr.write(told.getvalue())


def one_line(box: str) -> str:
    """What a box says, without its frame, its title and the help of options."""
    sections: list[list[str]] = [[]]
    for line in _ANSI.sub("", box).splitlines():
        text = line.strip("│| ")
        if text and set(text) <= _RULE:
            sections.append([])
        elif not text.startswith(_FRAME):
            sections[-1].append(text)
    return "; ".join(filter(None, map(_sentence, sections)))


def _sentence(lines: list[str]) -> str:
    """A section's first paragraph; nothing of an option's help."""
    if lines[:1] == ["Argument helptext:"]:
        return ""
    if lines[:1] == ["Perhaps you meant:"]:
        names = [line.split()[0] for line in lines if line.startswith("--")]
        return f"perhaps you meant {', '.join(dict.fromkeys(names))}"
    if lines and (missing := _MISSING.fullmatch(lines[0])):
        return f"{missing[1]} needs {', '.join(line for line in lines if line.startswith('--'))}"
    text = " ".join(lines[: lines.index("")] if "" in lines else lines).rstrip(".")
    for theirs, ours in _PLAINER:
        text = re.sub(theirs, ours, text)
    return text
