"""A file of layouts that a language model fills, request by request, and a file of rejected ones.

Answers cost time or money: an interrupted run loses at most those under way, and can continue.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

from echogen.engine.layout import Layout, LayoutError, read_text
from echogen.train.data.endpoint import Answer, LLMError
from echogen.train.data.llm import Message, Rejected, Rules, key_of, pieces, write_request
from echogen.train.stages import keys

IN_VAIN = 5  # consecutive answers without a single acceptable layout before giving up


@dataclass
class Tally:
    """The counts: layouts in the file and, in this run, requests, layouts accepted, and pieces
    rejected, by kind."""

    held: int = 0
    requests: int = 0
    taken: int = 0
    rejected: Counter[str] = field(default_factory=Counter)


class Harvest:
    """A growing file of layouts, and beside it a file of what was rejected.

    Every answer's lines are written and synced before the next request, so that an interruption
    loses at most what is under way. A line torn by an interruption is cut off when the file is
    opened again.

    Raises:
        LayoutError: the file holds anything but layouts that follow the rules.
    """

    def __init__(self, path: Path, rules: Rules) -> None:
        self.path, self.rules = path, rules
        self.rejects = path.with_suffix(".rejects.jsonl")
        self.tally, self._known = Tally(), set[str]()
        self._turned = len(_whole_lines(self.rejects))
        for number, line in enumerate(_whole_lines(path), 1):
            if not line.strip():
                continue
            try:
                _once(rules.examine(line), self._known)
            except Rejected as error:
                raise LayoutError(
                    f"{path}: line {number}: {error}; mend it, or name another file"
                ) from None
            self.tally.held += 1

    @property
    def place(self) -> int:
        """Number of lines in both files, from which a resumed run's randomness continues."""
        return self.tally.held + self._turned

    def add(self, answer: Answer, shown: Sequence[Layout], count: int) -> int:
        """Accept the good layouts of an answer, up to ``count`` in total; return how many were
        accepted."""
        taken: list[Layout] = []
        turned, examples = [], {key_of(example) for example in shown}
        for piece in pieces(answer):
            try:
                if piece.problem is not None:
                    raise Rejected("json", piece.problem)
                if self.tally.held + len(taken) >= count:
                    raise Rejected("surplus", "more than were asked for")
                layout = self.rules.examine(piece.text)
                if key_of(layout) in examples:
                    raise Rejected("duplicate", "it repeats an example of the request")
                _once(layout, self._known)
            except Rejected as error:
                self.tally.rejected[error.kind] += 1
                turned.append({"kind": error.kind, "reason": str(error), "text": piece.text})
            else:
                taken.append(layout)
        # Layouts first: if only the other file were written, the request would have to be repeated.
        _append(self.path, [layout.dumps() for layout in taken])
        _append(self.rejects, [json.dumps(line) for line in turned])
        self.tally.requests += 1
        self.tally.taken += len(taken)
        self.tally.held += len(taken)
        self._turned += len(turned)
        return len(taken)


def collect(
    ask: Callable[[list[Message], int], Answer],
    harvest: Harvest,
    count: int,
    batch: int,
    seed: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
    at_once: int = 1,
) -> Tally:
    """Ask for ``batch`` layouts at a time until the file holds ``count``.

    Args:
        ask: messages and a seed → an answer (`Endpoint.ask`).
        seed: of the requests; each has randomness of its own, also after an interruption.
        tell: called with (layouts held, layouts wanted).
        at_once: number of concurrent requests, each in its own thread. Their answers are processed
            in the order of the requests, and the next requests are made when all of them have
            arrived.

    Raises:
        LLMError: the endpoint's error, after the other answers have been processed, or `IN_VAIN`
            answers in a row without an acceptable layout.
    """
    vain, tally = 0, harvest.tally
    while (left := count - tally.held) > 0:
        # Every answer leaves at least one line, so no later request has the number of one of these.
        numbers = range(harvest.place, harvest.place + min(at_once, -(-left // batch)))
        asked = [
            write_request(
                keys.generator(seed, keys.LLM_REQUESTS, number),
                min(batch, left - batch * i),
                harvest.rules.free,
            )
            for i, number in enumerate(numbers)
        ]
        answers = [
            _under_way(ask, messages, (seed + number) % (1 << 31))
            for number, (messages, _) in zip(numbers, asked, strict=True)
        ]
        failed: LLMError | None = None
        for answer, (_, shown) in zip(answers, asked, strict=True):
            try:
                taken = harvest.add(answer.result(), shown, count)
            except LLMError as error:
                failed = failed or error
                continue
            vain = 0 if taken else vain + 1
            tell(tally.held, count)
        if failed is not None:
            raise failed
        if vain >= IN_VAIN:
            often = ", ".join(f"{kind}: {n}" for kind, n in tally.rejected.most_common())
            raise LLMError(
                f"the last {vain} answers held no layout to take ({often}); {harvest.rejects} "
                f"says why, and {tally.held} of {count} are kept. Try another model, or --open"
            )
    return tally


def _under_way(
    ask: Callable[[list[Message], int], Answer], messages: list[Message], seed: int
) -> Future[Answer]:
    """The future of an answer. Not from an executor: Ctrl-C would wait minutes for its threads."""
    answer = Future[Answer]()

    def wait() -> None:
        try:
            answer.set_result(ask(messages, seed))
        except BaseException as error:  # passed on
            answer.set_exception(error)

    Thread(target=wait, daemon=True).start()
    return answer


def examine_file(path: Path, rules: Rules) -> tuple[int, list[tuple[int, Rejected]]]:
    """How many lines of a file are acceptable layouts, and the other lines with their numbers. A
    file that is one JSON object is one layout, on however many lines.

    Raises:
        LayoutError: a file that cannot be read.
    """
    text = read_text(path)
    good, bad, known = 0, [], set[str]()
    for number, line in enumerate([text] if _is_object(text) else text.split("\n"), 1):
        if line.strip():
            try:
                _once(rules.examine(line), known)
                good += 1
            except Rejected as error:
                bad.append((number, error))
    return good, bad


def _is_object(text: str | bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _once(layout: Layout, known: set[str]) -> None:
    """Record a layout's key; raise Rejected if it was there before."""
    if (key := key_of(layout)) in known:
        raise Rejected("duplicate", "its objects and boxes were there before")
    known.add(key)


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file after cutting off a torn last one; [] if there is no file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    begin = data.rfind(b"\n") + 1
    last = data[begin:]
    if last.startswith(b"{") and not _is_object(last):
        os.truncate(path, begin)
        data = data[:begin]
    elif last:  # only the newline is missing, as an editor may leave it
        _append(path, [""])
        data += b"\n"
    try:
        return data.decode("utf-8-sig").split("\n")[:-1]
    except UnicodeDecodeError:
        raise LayoutError(f"{path}: not UTF-8 text; name another file") from None


def _append(path: Path, lines: Sequence[str]) -> None:
    if lines:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
