"""Errors while many requests are served reach those they concern, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from echogen.engine.cache import Prefix
from echogen.engine.decoding.decode import Packed
from echogen.engine.decoding.sampler import Sampler, Sampling
from echogen.engine.layout import Layout, LayoutObject
from echogen.engine.serving.crowd import Pace
from echogen.engine.serving.scheduler import Scheduler
from echogen.engine.serving.worker import SchedulerClosed

TOKENS = 16
PLAIN, GUIDED = Sampling(), Sampling(cfg=5.0, temperature=0.5)
LAYOUT = Layout("a red circle", (LayoutObject("a red circle", (0.1, 0.2, 0.5, 0.6)),))


@pytest.fixture(params=[False, True], ids=["codes", "windows"])
def scheduler(engine, request) -> Scheduler:
    return Scheduler(engine, slots=4, prompt_tokens=80, windows=request.param)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Objects are freed only with their last reference, not by the garbage collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def finish(scheduler: Scheduler) -> int:
    """Step by hand to the end; return the number of steps."""
    return sum(1 for _ in iter(scheduler.step, False))


def stepping(scheduler: Scheduler) -> str:
    """The method of its slots that a step calls."""
    return "window" if scheduler._slots.width else "step"


def once(monkeypatch, owner, name, error) -> None:
    """Let a method raise when it is first called."""
    right, left = getattr(owner, name), [error]

    def broken(*arguments, **more):
        if left:
            raise left.pop()
        return right(*arguments, **more)

    monkeypatch.setattr(owner, name, broken)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["take", "feed"])
def test_slots_that_cannot_be_filled_fail_one_request(scheduler, monkeypatch, name):
    """An allocation may also fail after the prompt."""
    once(monkeypatch, scheduler._slots, name, RuntimeError("out of memory"))
    bad, good = (scheduler.submit(LAYOUT, seed, PLAIN) for seed in (1, 2))
    finish(scheduler)
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(0)
    assert good.result(0).shape == (1, TOKENS)
    m = scheduler.metrics()
    assert (m.admitted, m.failed, m.finished, m.live, m.live_slots) == (2, 1, 1, 0, 0)
    assert scheduler.submit(LAYOUT, 3, PLAIN, samples=4) and finish(scheduler)  # no slot is lost


def test_slots_half_filled_are_free_again(scheduler):
    slots = scheduler._slots
    with torch.inference_mode():
        right = slots.prompts.run([1, 2, 3])
        wrong = Prefix(right.keys_values[:, :, :, :, 1:], right.logits)
        with pytest.raises((RuntimeError, ValueError)):
            slots.take([right, wrong])
        assert (slots.free, slots.tokens) == (4, 0)
        assert slots.take([right] * 4).numbers == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_device_that_is_gone_leaves_nobody_waiting(scheduler, monkeypatch):
    """Everything on the device fails from then on, even giving back slots."""

    def sick(*_):
        raise RuntimeError("the device is gone")

    drawn = [scheduler.submit(LAYOUT, seed, PLAIN, 2) for seed in (1, 2)]
    waits = scheduler.submit(LAYOUT, 3, PLAIN)
    scheduler.step()
    broken = RuntimeError("illegal memory access")
    once(monkeypatch, scheduler._slots, stepping(scheduler), broken)
    monkeypatch.setattr(scheduler._slots, "release", sick)
    scheduler.start()
    for request in drawn:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            request.result(30)
    with pytest.raises(RuntimeError, match="the device is gone"):
        waits.result(30)
    scheduler.shutdown()
    with pytest.raises(SchedulerClosed, match="died of RuntimeError: the device is gone"):
        scheduler.submit(LAYOUT)
    m = scheduler.metrics()
    assert (m.failed, m.waiting, m.live, m.live_slots) == (3, 0, 0, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", ["release", "step"])
def test_who_ends_as_the_device_goes_is_told(scheduler, monkeypatch, name):
    request = scheduler.submit(LAYOUT, 1, PLAIN)
    name = stepping(scheduler) if name == "step" else name
    once(monkeypatch, scheduler._slots, name, RuntimeError("gone"))
    scheduler.start()
    with pytest.raises(RuntimeError, match="gone"):
        request.result(30)
    scheduler.shutdown()


def test_codes_that_cannot_be_handed_over_fail_one_request(scheduler, monkeypatch):
    bad, good = (scheduler.submit(LAYOUT, seed, PLAIN) for seed in (1, 2))
    once(monkeypatch, bad, "_kept", RuntimeError("out of memory"))
    finish(scheduler)
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(0)
    assert good.result(0).shape == (1, TOKENS) and scheduler.metrics().live_slots == 0


def test_no_image_is_drawn_with_two_models(either):
    """A scheduler with a copy of the weights continues; one that reads the engine's own ends."""
    engine, copied = either, isinstance(either.decoder, Packed)
    scheduler = Scheduler(engine, slots=2, prompt_tokens=80)
    wanted = engine.generate_codes([LAYOUT], 1, sampling=PLAIN, decoding="sequential")
    live, waits = (scheduler.submit(LAYOUT, 1, PLAIN, n) for n in (1, 2))
    for _ in range(3):
        scheduler.step()
    engine.refresh()
    finish(scheduler)
    if copied:
        assert torch.equal(live.result(0), wanted) and len(waits.result(0)) == 2
        return
    for request in (live, waits):
        with pytest.raises(SchedulerClosed, match="weights were refreshed; make a new scheduler"):
            request.result(0)
    assert scheduler.metrics().failed == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_change_in_place_change_nothing_in_a_copy(either, dtype):
    """Neither for what is being drawn nor for what waits, whose prompt has yet to run."""
    engine = copy.copy(either)
    engine.transformer = copy.deepcopy(engine.transformer).to(dtype)
    engine.refresh()
    if not isinstance(engine.decoder, Packed):
        pytest.skip("this CPU has no copies in this type")
    greedy = Sampling(temperature=0.0)
    scheduler = Scheduler(engine, slots=1, prompt_tokens=80)
    before, live, waits = (scheduler.submit(LAYOUT, 1, greedy) for _ in range(3))
    while not live.drawn:
        scheduler.step()
    with torch.no_grad():
        for p in engine.transformer.parameters():
            p.mul_(torch.linspace(-1, 3, p.numel()).view_as(p).to(dtype))
    engine.refresh()
    finish(scheduler)
    wanted = before.result(0)
    assert torch.equal(live.result(0), wanted) and torch.equal(waits.result(0), wanted)
    assert not torch.equal(engine.generate_codes([LAYOUT], 1, sampling=greedy), wanted)


@pytest.mark.parametrize("name", ["run_prompts", "step"])
def test_an_interrupt_by_hand_ends_it_for_all(scheduler, monkeypatch, name):
    """Nobody knows how far the step got; going on could silently draw another image."""
    requests = [scheduler.submit(LAYOUT, seed, PLAIN, 3) for seed in (1, 2)]
    owner = scheduler._slots._runner if name == "run_prompts" else scheduler._slots
    name = stepping(scheduler) if name == "step" else name
    once(monkeypatch, owner, name, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        scheduler.step()
    for request in requests:
        error = request.future.exception(0)  # this thread's Ctrl-C must not end another thread
        assert isinstance(error, SchedulerClosed)
        assert isinstance(error.__cause__, KeyboardInterrupt)
    with pytest.raises(SchedulerClosed, match="died of KeyboardInterrupt"):
        scheduler.submit(LAYOUT)
    scheduler.shutdown()


def test_an_error_does_not_hold_what_was_being_computed(scheduler, monkeypatch, uncollected):
    """After running out of memory, that memory is needed for the others."""
    held = []

    def broken(*_):
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        raise RuntimeError("out of memory")

    request = scheduler.submit(LAYOUT, 1, PLAIN)
    monkeypatch.setattr(scheduler._slots, stepping(scheduler), broken)
    scheduler.step()
    assert "out of memory" in str(request.future.exception(0)) and held[0]() is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"priority": "high"}, "priority = 'high'; it must be a whole number"),
        ({"seed": 1.5}, "seed = 1.5; it"),
        ({"samples": 1.0}, "samples = 1.0; it"),
        ({"draws": [0.5]}, "draw = 0.5; it"),
    ],
)
def test_what_would_break_the_queue_is_refused(scheduler, asked, message):
    good = scheduler.submit(LAYOUT, 1, PLAIN)
    with pytest.raises(ValueError, match=message):
        scheduler.submit(LAYOUT, **asked)
    finish(scheduler)
    assert good.result(0).shape == (1, TOKENS)


# --- called back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cancel", [True, False])
def test_a_callback_may_shut_down_who_steps_by_hand(scheduler, cancel):
    def stop(_):
        scheduler.shutdown(cancel)

    first = scheduler.submit(LAYOUT, 1, PLAIN, 4, every=3, on_partial=stop)
    second = scheduler.submit(LAYOUT, 2, PLAIN)
    by_hand = threading.Thread(target=finish, args=(scheduler,), daemon=True)
    by_hand.start()
    by_hand.join(30)
    assert not by_hand.is_alive()
    assert first.future.cancelled() == second.future.cancelled() == cancel
    assert first.future.done() and second.future.done()


def test_shutting_down_waits_no_longer_than_it_is_told_to(scheduler, monkeypatch):
    right, going = getattr(scheduler._slots, stepping(scheduler)), threading.Event()

    def held(*asked):
        going.wait(30)
        return right(*asked)

    monkeypatch.setattr(scheduler._slots, stepping(scheduler), held)
    request = scheduler.submit(LAYOUT, 1, PLAIN)
    scheduler.start()
    assert not scheduler.shutdown(timeout=0.05) and not request.future.done()
    going.set()
    assert scheduler.shutdown(timeout=30) and request.result(0).shape == (1, TOKENS)


def test_what_cannot_be_awaited_is_told_all_the_same(scheduler):
    """An iterator may run out in a callback, and asyncio drops a StopIteration silently."""
    parts = iter(())

    async def wait() -> torch.Tensor:
        request = scheduler.submit(LAYOUT, 1, PLAIN, every=4, on_partial=lambda _: next(parts))
        return await asyncio.wait_for(request, 30)

    with scheduler, pytest.raises(RuntimeError, match="ended with StopIteration"):
        asyncio.run(wait())


def test_a_callback_cannot_step(scheduler):
    request = scheduler.submit(LAYOUT, 1, PLAIN, every=3, on_partial=lambda _: scheduler.step())
    by_hand = threading.Thread(target=finish, args=(scheduler,), daemon=True)
    by_hand.start()
    by_hand.join(30)
    assert not by_hand.is_alive()
    with pytest.raises(RuntimeError, match="within a step"):
        request.result(0)


def test_who_cancelled_is_told_no_more(scheduler):
    """Not even in the step that was under way."""
    heard, before = [], []

    def leave(_):
        if not second.future.cancelled():
            second.cancel()
            before.append(len(heard))  # the second may have been ahead

    first = scheduler.submit(LAYOUT, 1, PLAIN, every=4, on_partial=leave)
    second = scheduler.submit(LAYOUT, 2, PLAIN, every=4, on_partial=heard.append)
    finish(scheduler)
    assert first.future.done() and second.future.cancelled() and [len(heard)] == before
    assert not first.cancel() and second.cancel()


@pytest.mark.parametrize("leaves", ["cancelled", "expired"])
def test_who_leaves_while_another_prompt_is_run_needs_none(engine, monkeypatch, leaves):
    now, run = [0.0], []
    scheduler = Scheduler(engine, slots=4, prompt_tokens=80, clock=lambda: now[0])
    runner = scheduler._slots._runner
    right = runner.run_prompts

    def run_prompts(prompts):
        run.extend(prompts)
        now[0] = 5.0
        if leaves == "cancelled":
            second.cancel()
        return right(prompts)

    monkeypatch.setattr(runner, "run_prompts", run_prompts)
    first = scheduler.submit(LAYOUT, 1, PLAIN)
    second = scheduler.submit(LAYOUT, 2, PLAIN, timeout=5 if leaves == "expired" else None)
    finish(scheduler)
    assert first.result(0).shape == (1, TOKENS) and len(run) == 1 and second.drawn == 0
    m = scheduler.metrics()
    assert (m.admitted, getattr(m, leaves)) == (1, 1)


def test_cancelling_at_the_last_code(scheduler):
    def last(partial):
        if partial.codes.shape[1] == TOKENS:
            assert request.cancel()

    request = scheduler.submit(LAYOUT, 1, PLAIN, every=4, on_partial=last)
    finish(scheduler)
    assert request.future.cancelled()
    m = scheduler.metrics()
    assert (m.finished, m.cancelled, m.live_slots) == (0, 1, 0)


# --- what is held and counted ---------------------------------------------------------------------


@pytest.mark.parametrize("end", ["finish", "cancel", "fail"])
def test_a_request_that_ended_holds_no_noise(scheduler, monkeypatch, uncollected, end):
    """For a large codebook, noise takes 8 MB per request, and a service may keep many requests for
    their codes."""
    made, right = [], Sampler._block

    def block(self, index):
        noise = right(self, index)
        made.append(weakref.ref(noise))
        return noise

    monkeypatch.setattr(Sampler, "_block", block)

    def heard(_):
        if end == "fail":
            raise RuntimeError("the listener broke")
        if end == "cancel":
            request.cancel()

    request = scheduler.submit(LAYOUT, 1, GUIDED, every=4, on_partial=heard)
    finish(scheduler)
    assert request.future.done() and made and not any(ref() is not None for ref in made)
    assert request.partial().codes.shape[1] == (TOKENS if end == "finish" else 4)


def test_a_request_goes_with_its_last_reference(scheduler, uncollected):
    request = scheduler.submit(LAYOUT, 1, PLAIN)
    finish(scheduler)
    gone = weakref.ref(request)
    del request
    assert gone() is None


def test_a_request_whose_prompt_is_run_is_counted(scheduler, monkeypatch):
    runner = scheduler._slots._runner
    seen, right = [], runner.run_prompts

    def run_prompts(prompts):
        seen.append(scheduler.metrics())
        return right(prompts)

    monkeypatch.setattr(runner, "run_prompts", run_prompts)
    scheduler.submit(LAYOUT, 1, PLAIN, 2)
    finish(scheduler)
    (m,) = seen
    assert (m.submitted, m.waiting, m.live, m.live_slots) == (1, 0, 1, 2)
    steps = scheduler.metrics().steps
    assert steps < TOKENS - 1 if scheduler._slots.width else steps == TOKENS - 1


def test_the_host_is_at_most_two_steps_ahead_of_a_gpu(monkeypatch):
    """A new request then waits for two steps, and not for all that a launch queue holds."""
    called = []

    class Event:
        def record(self):
            called.append(("launched", self))

        def synchronize(self):
            called.append(("waited", self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    pace = Pace(torch.device("cuda", 1))
    for _ in range(5):
        pace()
    steps = [event for what, event in called if what == "launched"]
    assert [what for what, _ in called] == ["launched"] * 2 + ["launched", "waited"] * 3
    assert [event for what, event in called if what == "waited"] == steps[:3]
    Pace(torch.device("cpu"))()
    assert len(called) == 8


def test_who_has_nothing_to_do_does_not_step(scheduler, monkeypatch):
    steps, right = [], scheduler._work

    def work():
        steps.append(None)
        return right()

    monkeypatch.setattr(scheduler, "_work", work)
    with scheduler:
        scheduler.submit(LAYOUT, 1, PLAIN).result(30)
        threading.Event().wait(0.05)
        assert len(steps) == scheduler.metrics().steps > 0
