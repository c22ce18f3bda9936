"""Threads that decode pictures get their turns in the order in which they asked."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from echogen.engine.serving.partial import Pictures
from echogen.engine.serving.turns import Turns


def asking(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """A semaphore that is released whenever a thread has come into line."""
    asked, wait_for = threading.Semaphore(0), turns._changed.wait_for

    def waiting(true: Callable[[], bool]) -> bool:
        asked.release()  # the condition is held until the thread waits
        return wait_for(true)

    monkeypatch.setattr(turns._changed, "wait_for", waiting)
    return asked


def test_who_wants_one_picture_does_not_wait_for_the_many_of_another(engine, monkeypatch):
    pictures, drawn, begun, going = Pictures(engine), [], threading.Event(), threading.Event()
    asked = asking(pictures._turns, monkeypatch)

    def picture(codes: torch.Tensor) -> None:
        drawn.append(codes.item())
        begun.set()
        assert going.wait(30)

    monkeypatch.setattr(pictures, "_picture", picture)
    many, one = torch.tensor([[1], [2], [3]]), torch.tensor([[9]])
    threads = [threading.Thread(target=pictures.decode, args=(codes,)) for codes in (many, one)]
    threads[0].start()
    assert begun.wait(30) and asked.acquire(timeout=30)
    threads[1].start()
    assert asked.acquire(timeout=30)
    going.set()
    for thread in threads:
        thread.join(30)
    assert drawn == [1, 9, 2, 3]


def test_who_leaves_the_line_does_not_hold_it(monkeypatch):
    turns, passed = Turns(), threading.Event()
    asked = asking(turns, monkeypatch)
    wait_for = turns._changed.wait_for

    def interrupted(true: Callable[[], bool]) -> bool:
        raise KeyboardInterrupt

    def last() -> None:
        with turns:
            passed.set()

    thread = threading.Thread(target=last)
    with turns:
        monkeypatch.setattr(turns._changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            turns.__enter__()
        monkeypatch.setattr(turns._changed, "wait_for", wait_for)
        assert asked.acquire(timeout=30)
        thread.start()
        assert asked.acquire(timeout=30) and not passed.is_set()
    thread.join(30)
    assert passed.is_set()
