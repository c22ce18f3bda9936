"""A file of layouts that a language model fills, request after request, and what was turned away.

Answers cost time or money: a run that is interrupted loses those under way at most, and goes on.
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

IN_VAIN = 5  # answers without a single layout to take, one after another, before giving up


@dataclass
class Tally:
    """What came of it: layouts in the file, and of this run requests, layouts taken, and pieces
    turned away by kind."""

    held: int = 0
    requests: int = 0
    taken: int = 0
    rejected: Counter[str] = field(default_factory=Counter)


class Harvest:
    """A file of layouts that grows, and beside it one of what was turned away.

    Every answer's lines are written and synced before more is asked for, so that an interruption
    loses what is under way at most; a line torn by one is cut off when the file is opened again.

    Raises:
        LayoutError: a file that holds anything but layouts that keep to the rules.
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
        """Lines in both files: what a resumed run's randomness goes on from."""
        return self.tally.held + self._turned

    def add(self, answer: Answer, shown: Sequence[Layout], count: int) -> int:
        """Take what an answer is good for, up to ``count`` layouts in all; how many were taken."""
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
        # Layouts first: were only the other file written, a request would be made again.
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
        at_once: requests under way together, each in a thread of its own. Their answers are taken
            in the order of the requests, and the next are made when all of them are there.

    Raises:
        LLMError: the endpoint's, once the answers beside it are taken, or `IN_VAIN` answers with
            nothing to take.
    """
    vain, tally = 0, harvest.tally
    while (left := count - tally.held) > 0:
        # Every answer leaves a line at least, so no later request has the number of one of these.
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
    """An answer to come. Not of an executor: Ctrl-C would wait for its threads, for minutes."""
    answer = Future[Answer]()

    def wait() -> None:
        try:
            answer.set_result(ask(messages, seed))
        except BaseException as error:  # handed on
            answer.set_exception(error)

    Thread(target=wait, daemon=True).start()
    return answer


def examine_file(path: Path, rules: Rules) -> tuple[int, list[tuple[int, Rejected]]]:
    """How many lines of a file are layouts to take, and the others, by their numbers. A file that
    is one JSON object is one layout, on however many lines.

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
    """Note a layout's key; one that was there is rejected."""
    if (key := key_of(layout)) in known:
        raise Rejected("duplicate", "its objects and boxes were there before")
    known.add(key)


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file, once a torn last one is cut off; [] where there is no file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    begin = data.rfind(b"\n") + 1
    last = data[begin:]
    if last.startswith(b"{") and not _is_object(last):
        os.truncate(path, begin)
        data = data[:begin]
    elif last:  # whole but for its end, as an editor may leave it
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
