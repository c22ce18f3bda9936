"""The parts of a page of results: questions, each answered by a table, and an index of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One question and its table.

    Attributes:
        question: the heading, unique on the page; it ends in "?".
        about: what was measured, where and by which command, in two or three sentences.
        table: Markdown; empty where there is none yet.
        columns: the meaning of a column, where its heading does not give it.
        notes: what else the reader needs to know about the table.
        left_out: what was not measured, and why.
    """

    question: str
    about: str
    table: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    left_out: Sequence[str] = ()

    def on(self, machine: str) -> Part:
        """Return the same question for another machine, such as "a GPU"."""
        question = self.question[0].lower() + self.question[1:]
        return replace(self, question=f"On {machine}: {question}")

    def markdown(self) -> str:
        """Heading, text, table, and the lists below it."""
        columns = [f"**{name}**: {meaning}" for name, meaning in self.columns.items()]
        left_out = f"Left out:\n\n{bullets(self.left_out)}" if self.left_out else ""
        blocks = (
            f"### {self.question}",
            self.about,
            self.table,
            bullets([*columns, *self.notes]),
            left_out,
        )
        return "\n\n".join(block for block in blocks if block)

    def link(self) -> str:
        """A link to the heading, by the name that GitHub gives it."""
        anchor = re.sub(r"[^\w\- ]", "", self.question.lower()).replace(" ", "-")
        return f"[{self.question}](#{anchor})"


def indexed(parts: Sequence[Part]) -> str:
    """An index of the questions, then the parts."""
    index = bullets([part.link() for part in parts])
    return "\n\n".join([index, *(part.markdown() for part in parts)])


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def short_commit(place: Result) -> str:
    """Return an environment's commit, shortened, with a + where the checkout had changes."""
    return (place["commit"] or "no commit")[:9] + ("+" if place.get("dirty") else "")


def measured(command: str, results: Sequence[Result]) -> str:
    """Say by which command, on which machine, with which versions and at which commit."""

    def all_of(read: Callable[[Result], object]) -> str:
        return ", ".join(dict.fromkeys(str(read(r)) for r in results))

    where = all_of(
        lambda r: r["device"] if r["device"] != "cpu" else f"{r['cpus']} cores of {r['cpu']}"
    )
    torch = all_of(lambda r: r["versions"]["torch"])
    commits = all_of(short_commit)
    commits = f"commit{'s' if ',' in commits else ''} {commits}"
    return f"Measured by {command} ({where}; PyTorch {torch}; {commits})."
