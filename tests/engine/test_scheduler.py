"""The scheduler draws what each request draws alone, and no request affects another."""

from __future__ import annotations

import asyncio
import copy
import random
import threading
import weakref
from concurrent.futures import CancelledError
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

from echogen.engine.decoding.sampler import Sampling
from echogen.engine.engine import Engine
from echogen.engine.gpu.device import DeviceTransformer
from echogen.engine.layout import LayoutError
from echogen.engine.ranges import listening
from echogen.engine.serving import crowd as serving_crowd
from echogen.engine.serving.crowd import Alone
from echogen.engine.serving.request import Request
from echogen.engine.serving.rows import PackedRows
from echogen.engine.serving.scheduler import PROMPTS, Scheduler
from echogen.engine.serving.slots import row_counts
from echogen.engine.serving.waiting import QueueFull, Waiting
from echogen.engine.serving.worker import SchedulerClosed

from .requests import (
    GUIDED,
    KINDS,
    LAYOUTS,
    ONE,
    PLAIN,
    THREE,
    TOKENS,
    TWO,
    Asked,
    Heard,
    crowd,
    finish,
    staggered,
)
from .tape import Tape

# --- what is drawn --------------------------------------------------------------------------------


def test_a_crowd_draws_what_each_request_draws_alone(engine):
    """Six kinds of sampling, three lengths, and all sorts of seeds and numbers of samples, in
    float32. With another number of rows sums are rounded differently, but no two codes here were so
    nearly equally likely."""
    asked = crowd(24, seed=1)
    assert len({a.layout for a in asked}) == 3 and len({a.sampling for a in asked}) == len(KINDS)
    scheduler = Scheduler(engine, slots=8, prompt_tokens=80)
    requests = staggered(scheduler, asked, random.Random(1))
    for each, request in zip(asked, requests, strict=True):
        assert torch.equal(request.result(), each.alone(engine))
    assert len(torch.cat([r.result() for r in requests]).unique()) > 12


@pytest.mark.parametrize("fp8_cache", [False, True])
def test_a_crowd_on_a_gpu_s_operators(engine, monkeypatch, fp8_cache):
    """With steps recorded beforehand and all requests of one kind drawn at once, each request draws
    what it draws in a drawing of its own, also where both keep keys and values in 8 bits."""
    tape, engine, launches = Tape(), copy.copy(engine), []
    with torch.inference_mode():
        made = DeviceTransformer(
            engine.transformer, engine.code_table, fp8_cache=fp8_cache, record=tape
        )
    asked = crowd(24, seed=1)
    exact = [each.alone(engine) for each in asked]
    monkeypatch.setattr(Engine, "decoder", property(lambda self: made))
    wanted = [each.alone(engine) for each in asked]
    assert all(map(torch.equal, wanted, exact)) != fp8_cache
    alone = tape.replayed, tape.recorded
    right = serving_crowd.cfg_sample

    def draw(logits, seed, *others):
        launches.append(len(seed))
        return right(logits, seed, *others)

    monkeypatch.setattr(serving_crowd, "cfg_sample", draw)
    monkeypatch.setattr(Alone, "draw", lambda *_: pytest.fail("they are drawn together"))
    scheduler = Scheduler(engine, slots=12, prompt_tokens=80)
    assert launches == [1] * 10, "compiled beforehand, with guidance and without"
    launches.clear()
    requests = staggered(scheduler, asked, random.Random(1))
    assert tape.recorded - alone[1] == len(row_counts(12, False, recorded=True))
    assert tape.replayed - alone[0] == scheduler.metrics().steps + 1  # one to warm up
    for request, codes in zip(requests, wanted, strict=True):
        assert torch.equal(request.result(), codes)
    images = sum(each.samples for each in asked)
    assert sum(launches) == images * TOKENS
    launches.clear()
    for seed in range(4):  # all of one kind, whatever their numbers are
        scheduler.submit(ONE, seed, Sampling(temperature=1 + seed / 4))
    finish(scheduler)
    assert launches == [4] * TOKENS


def test_given_draws_and_negative_layouts(engine):
    scheduler = Scheduler(engine, slots=8, prompt_tokens=80)
    request = scheduler.submit(TWO, 5, GUIDED, 2, draws=[9, 4], negative=ONE)
    finish(scheduler)
    wanted = engine.generate_codes(
        [TWO] * 2, 5, [9, 4], sampling=GUIDED, decoding="sequential", negative=ONE
    )
    assert torch.equal(request.result(), wanted)
    assert not request.result().is_inference()  # else it could not be kept for a backward pass


@pytest.fixture
def logits_of(monkeypatch):
    """Logits of every step of every request, as its sampler saw them."""
    seen, right = weakref.WeakKeyDictionary(), Alone.draw

    def draw(self, logits):
        seen.setdefault(self.lives[0].request, []).append(logits.clone())
        return right(self, logits)

    monkeypatch.setattr(Alone, "draw", draw)
    return seen


@pytest.mark.parametrize("slots", [4, 9])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("native", torch.float32),
        ("packed", torch.float32),
        ("packed", torch.bfloat16),
        ("plain", torch.float32),
    ],
)
def test_batch_invariant_logits_are_bit_equal_in_every_crowd(
    engine, logits_of, monkeypatch, slots, kind, dtype
):
    """Not only the codes are equal but every logit of every step, alone and in five random crowds,
    in whatever slots each request gets."""
    engine = copy.copy(engine)
    engine.transformer = copy.deepcopy(engine.transformer).to(dtype)
    if kind == "plain":
        monkeypatch.setattr("echogen.engine.engine.packed", lambda model: model)
    if kind == "packed":
        monkeypatch.setenv("ECHOGEN_NATIVE", "0")
    engine.refresh()
    scheduler = Scheduler(engine, slots=slots, prompt_tokens=80, invariant=True, windows=False)
    asked = crowd(6, seed=2, slots=slots)

    def bits(request: Request) -> torch.Tensor:
        return torch.stack(logits_of[request]).view(torch.uint8)

    alone = []
    for each in asked:
        request = each.submit(scheduler)
        finish(scheduler)
        alone.append((bits(request), request.result()))
    for round_ in range(5):
        rng = random.Random(round_)
        order = rng.sample(range(len(asked)), len(asked))
        others = crowd(3, seed=100 + round_, slots=slots)
        mixed = [asked[i] for i in order] + others
        places = rng.sample(range(len(mixed)), len(mixed))
        requests = staggered(scheduler, [mixed[p] for p in places], rng)
        for place, request in zip(places, requests, strict=True):
            if place < len(order):
                logits, codes = alone[order[place]]
                assert torch.equal(bits(request), logits)
                assert torch.equal(request.result(), codes)


def test_batch_invariance_is_not_claimed_where_it_does_not_hold(engine, monkeypatch):
    """One sequence has the same logits in all slots, or the mode is refused. Here a product that
    adds a bit to the last row makes rounding depend on a row's place."""
    monkeypatch.setenv("ECHOGEN_NATIVE", "0")
    engine = copy.copy(engine)
    engine.refresh()
    Scheduler(engine, slots=5, prompt_tokens=80, invariant=True)
    right = PackedRows.step

    def wrong(self, codes, at, read):
        logits = right(self, codes, at, read)
        logits[-1, 3] = torch.nextafter(logits[-1, 3], torch.tensor(torch.inf))
        return logits

    monkeypatch.setattr(PackedRows, "step", wrong)
    Scheduler(engine, slots=5, prompt_tokens=80)
    with pytest.raises(ValueError, match=r"slots = 5: .* take another number"):
        Scheduler(engine, slots=5, prompt_tokens=80, invariant=True)


def test_batch_invariance_of_the_bundled_model():
    engine = Engine.from_pretrained("tiny")
    scheduler = Scheduler(engine, slots=6, prompt_tokens=64, invariant=True)
    asked = [
        Asked(ONE, 3, Sampling(temperature=0.7), 1),
        Asked(ONE, 4, Sampling(cfg=5.0), 1),
        Asked(ONE, 5, Sampling(top_k=40), 2),
    ]
    alone = []
    for each in asked:
        alone.append(each.submit(scheduler))
        finish(scheduler)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        again = {i: asked[i].submit(scheduler) for i in order}
        finish(scheduler)
        for i, request in again.items():
            assert torch.equal(request.result(), alone[i].result())


# --- slots ----------------------------------------------------------------------------------------


def test_slots_of_an_ended_image_are_filled_at_the_next_step(engine):
    scheduler = Scheduler(engine, slots=3, prompt_tokens=80, windows=False)
    first = scheduler.submit(ONE, 1, PLAIN, 2)
    for _ in range(5):
        scheduler.step()
    second, third = scheduler.submit(TWO, 2, PLAIN), scheduler.submit(THREE, 3, PLAIN, 2)
    scheduler.step()
    assert (first.drawn, second.drawn, third.drawn) == (
        7,
        2,
        0,
    )  # a prompt gives a code, a step one
    while not first.future.done():
        scheduler.step()
    assert third.drawn == 0
    scheduler.step()
    assert third.drawn == 2 and second.drawn < TOKENS
    finish(scheduler)
    assert scheduler.metrics().live_slots == 0


def slow_prompts(scheduler: Scheduler, monkeypatch, now: list[float]) -> None:
    """Let each token of a prompt take one second of the clock."""
    runner = scheduler._slots._runner
    right = runner.run_prompts

    def run_prompts(prompts):
        now[0] += sum(map(len, prompts))
        return right(prompts)

    monkeypatch.setattr(runner, "run_prompts", run_prompts)


def test_who_is_drawn_waits_for_few_prompts_between_two_codes(engine, monkeypatch):
    now, heard = [0.0], []
    scheduler = Scheduler(engine, slots=16, prompt_tokens=80, windows=False, clock=lambda: now[0])
    slow_prompts(scheduler, monkeypatch, now)
    scheduler.submit(ONE, 1, PLAIN, every=1, on_partial=lambda _: heard.append(now[0]))
    scheduler.step()
    others = [scheduler.submit(THREE, i, PLAIN) for i in range(15)]
    finish(scheduler)
    length = len(engine.prompts.l2i(THREE))
    assert 15 * length > 3 * PROMPTS, "more than one step runs"
    assert max(b - a for a, b in pairwise(heard)) < PROMPTS + length
    assert all(other.result().shape == (1, TOKENS) for other in others)


def test_time_runs_out_for_who_is_drawn_while_prompts_are_run(engine, monkeypatch):
    now, late = [0.0], []
    scheduler = Scheduler(engine, slots=2, prompt_tokens=80, windows=False, clock=lambda: now[0])
    slow_prompts(scheduler, monkeypatch, now)
    length = len(engine.prompts.l2i(ONE))
    drawn = scheduler.submit(ONE, 1, PLAIN, timeout=1.5 * length)
    drawn.future.add_done_callback(lambda _: late.append(now[0] - 1.5 * length))
    others = [scheduler.submit(ONE, i, PLAIN) for i in (2, 3)]
    scheduler.step()
    with pytest.raises(TimeoutError, match="1 of 16 codes"):
        drawn.result(0)
    assert late == [0.5 * length], "behind the prompt that was being run"
    assert [other.drawn for other in others] == [2, 2], "its slot was free for the next at once"


def test_a_prompt_shared_by_samples_is_run_once(engine):
    scheduler, heard = Scheduler(engine, slots=8, prompt_tokens=80), Heard("engine/prefill/run")
    prompt = engine.prompts.l2i(TWO)
    with listening(heard):
        scheduler.submit(TWO, 1, GUIDED, 4)
        scheduler.submit(TWO, 2, GUIDED, 4)
        finish(scheduler)
    # The unconditional prompt is kept for the second request.
    assert heard.all("tokens") == [len(prompt)] * 3


def test_a_step_runs_few_rows_more_than_it_needs():
    assert row_counts(7, invariant=True) == [7]
    for rows in range(1, 40):
        counts = row_counts(rows, invariant=False)
        assert counts[-1] == rows and counts == sorted(set(counts))
        for needed in range(1, rows + 1):
            assert 0 <= min(n for n in counts if n >= needed) - needed <= 3


def test_a_slot_begins_clean(engine, monkeypatch):
    """NaN that was left in a slot does not affect its next holder."""
    scheduler = Scheduler(engine, slots=2, prompt_tokens=80)
    wanted = scheduler.submit(ONE, 1, PLAIN, 2)
    finish(scheduler)
    scheduler._slots.cache.block.fill_(float("nan"))
    again = scheduler.submit(ONE, 1, PLAIN, 2)
    finish(scheduler)
    assert torch.equal(again.result(), wanted.result())


# --- partial pictures -----------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [2, 3, 32])
def test_partial_results_come_every_so_many_codes(engine, pieces, monkeypatch):
    monkeypatch.setattr("echogen.engine.serving.request.PIECES", pieces)
    scheduler, called = Scheduler(engine, slots=4, prompt_tokens=80), []
    request = scheduler.submit(ONE, 1, PLAIN, 2, every=6, on_partial=called.append)
    finish(scheduler)
    codes = request.result()
    assert [p.codes.shape for p in called] == [(2, 6), (2, 12), (2, TOKENS)]
    assert all(torch.equal(p.codes, codes[:, : p.codes.shape[1]]) for p in called)
    (last,) = request.partials()  # a late listener gets what there is
    assert torch.equal(last.codes, codes)

    whole = scheduler.submit(ONE, 1, PLAIN)
    scheduler.step()
    assert whole.partial().codes.shape == (1, 2)
    finish(scheduler)
    assert len(list(whole.partials())) == 1


def test_partial_pictures_are_grey_where_nothing_is_drawn():
    engine = Engine.from_pretrained("tiny")
    scheduler, parts = Scheduler(engine, slots=2, prompt_tokens=64), []
    request = scheduler.submit(ONE, 1, Sampling(temperature=0), every=20, on_partial=parts.append)
    assert request.partial().images()[0].getcolors() == [(64 * 64, (128, 128, 128))]
    finish(scheduler)
    early, *_, whole = (p.images()[0] for p in parts)
    assert whole.tobytes() == request.images()[0].tobytes()
    # 20 codes in raster order: two rows of 8 squares of 8 pixels, and half a row.
    grey = [(64 * 40, (128, 128, 128))]
    assert early.crop((0, 24, 64, 64)).getcolors() == grey
    assert early.crop((32, 16, 64, 24)).getcolors() == [(32 * 8, (128, 128, 128))]
    assert early.crop((0, 16, 32, 24)).getcolors() != [(32 * 8, (128, 128, 128))]
    # What is drawn already looks as it will, though the decoder also sees the missing squares.
    top = (np.asarray(p.crop((0, 0, 64, 16)), dtype=float) for p in (early, whole))
    assert np.abs(next(top) - next(top)).mean() < 10


def test_partials_stream_while_a_thread_draws(engine):
    with Scheduler(engine, slots=4, prompt_tokens=80) as scheduler:
        request = scheduler.submit(TWO, 1, GUIDED, every=4)
        seen = [p.codes.shape[1] for p in request.partials()]
    assert seen == sorted(seen) and seen[-1] == TOKENS and not any(n % 4 for n in seen)


# --- ends -----------------------------------------------------------------------------------------


def test_cancelling_frees_slots_for_the_next_step(engine):
    scheduler = Scheduler(engine, slots=2, prompt_tokens=80)
    drawn, waits = scheduler.submit(ONE, 1, PLAIN, 2), scheduler.submit(TWO, 2, PLAIN, 2)
    gone = scheduler.submit(THREE, 3, PLAIN)
    scheduler.step()
    assert drawn.cancel() and gone.cancel()
    scheduler.step()
    assert waits.drawn == 2 and drawn.drawn == 2
    finish(scheduler)
    assert torch.equal(waits.result(), Asked(TWO, 2, PLAIN, 2).alone(engine))
    with pytest.raises(CancelledError):
        drawn.result()
    with pytest.raises(CancelledError):
        list(gone.partials())
    assert not waits.cancel()
    m = scheduler.metrics()
    assert (m.submitted, m.finished, m.cancelled, m.live_slots) == (3, 1, 2, 0)


def test_time_runs_out_for_who_waits_and_who_is_drawn(engine):
    now = [0.0]
    scheduler = Scheduler(engine, slots=1, prompt_tokens=80, clock=lambda: now[0])
    drawn = scheduler.submit(ONE, 1, PLAIN, timeout=10)
    waits = scheduler.submit(ONE, 2, PLAIN, timeout=5)
    patient = scheduler.submit(ONE, 3, PLAIN)
    scheduler.step()
    now[0] = 5.0
    scheduler.step()
    with pytest.raises(TimeoutError, match="0 of 16 codes"):
        waits.result()
    now[0] = 10.0
    scheduler.step()
    with pytest.raises(TimeoutError, match="3 of 16 codes"):
        drawn.result()
    assert patient.drawn == 2
    finish(scheduler)
    assert patient.result().shape == (1, TOKENS) and scheduler.metrics().expired == 2


def test_a_long_queue_is_walked_only_when_somebody_may_have_left_it(engine, monkeypatch):
    """With all slots taken and nobody gone, a step neither asks every waiting request whether it is
    gone nor looks for the next one."""
    now, walked = [0.0], []
    scheduler = Scheduler(engine, slots=1, prompt_tokens=80, windows=False, clock=lambda: now[0])
    drawn = scheduler.submit(ONE, 0, PLAIN)
    scheduler.step()
    waits = [scheduler.submit(ONE, i, PLAIN, timeout=10 * i) for i in range(1, 6)]
    right = scheduler._gone

    def gone(request: Request) -> bool:
        if request is not drawn:
            walked.append(request)
        return right(request)

    with monkeypatch.context() as patched:
        patched.setattr(scheduler, "_gone", gone)
        patched.setattr(scheduler._waiting, "take", lambda _: pytest.fail("no slot is free"))
        for _ in range(4):
            scheduler.step()
        assert not walked
        assert waits[4].cancel()
        scheduler.step()
        assert walked == waits and scheduler._waiting == waits[:4]
        now[0] = 10.0
        scheduler.step()
        assert isinstance(waits[0].future.exception(0), TimeoutError)
        scheduler.step()
        assert walked == waits + waits[:4]
        now[0] = 20.0
        scheduler.step()
        assert isinstance(waits[1].future.exception(0), TimeoutError)
        m = scheduler.metrics()
        assert (m.live, m.waiting, m.cancelled, m.expired) == (1, 2, 1, 2)
    finish(scheduler)
    assert all(request.result(0).shape == (1, TOKENS) for request in (drawn, *waits[2:4]))


def test_an_error_of_one_request_is_its_own(engine):
    def broken(partial):
        raise RuntimeError("the listener broke")

    scheduler = Scheduler(engine, slots=4, prompt_tokens=80)
    bad = scheduler.submit(ONE, 1, PLAIN, every=3, on_partial=broken)
    good = scheduler.submit(TWO, 2, PLAIN)
    worse = scheduler.submit(ONE, 3, PLAIN)
    worse.prompts[0][0] = 1 << 30  # no such token
    finish(scheduler)
    with pytest.raises(RuntimeError, match="listener broke"):
        bad.result()
    with pytest.raises((IndexError, RuntimeError)):
        worse.result()
    assert bad.drawn == 3
    assert torch.equal(good.result(), Asked(TWO, 2, PLAIN, 1).alone(engine))
    m = scheduler.metrics()
    assert (m.failed, m.finished, m.live_slots) == (2, 1, 0)


def test_a_step_that_fails_fails_who_was_in_it_and_no_one_else(engine, monkeypatch):
    scheduler = Scheduler(engine, slots=2, prompt_tokens=80, windows=False)
    inside, behind = scheduler.submit(ONE, 1, PLAIN, 2), scheduler.submit(TWO, 2, PLAIN, 2)
    with monkeypatch.context() as patched:

        def broken():
            raise RuntimeError("out of memory")

        patched.setattr(scheduler._slots, "step", broken)
        scheduler.step()
    finish(scheduler)
    with pytest.raises(RuntimeError, match="out of memory"):
        inside.result()
    assert torch.equal(behind.result(), Asked(TWO, 2, PLAIN, 2).alone(engine))


# --- refusals -------------------------------------------------------------------------------------


def test_a_full_queue_refuses(engine):
    scheduler = Scheduler(engine, slots=1, queue=2, prompt_tokens=80)
    first, _ = (scheduler.submit(ONE, i, PLAIN) for i in range(2))
    with pytest.raises(QueueFull, match=r"holds 2; submit again"):
        scheduler.submit(ONE, 2, PLAIN)
    first.cancel()
    scheduler.submit(ONE, 3, PLAIN)  # its place is free at once
    scheduler.step()
    scheduler.submit(ONE, 4, PLAIN)
    finish(scheduler)
    m = scheduler.metrics()
    assert (m.refused, m.finished, m.waiting) == (1, 3, 0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"samples": 5}, "samples = 5 take 5 slots, and there are 4; ask for 4"),
        ({"samples": 3, "sampling": GUIDED}, "take 6 slots, two each .* ask for 2"),
        ({"samples": 0}, "samples = 0"),
        ({"samples": 2, "draws": [1]}, "1 draws for 2 images"),
        ({"draws": [-1]}, "draw -1"),
        ({"seed": -1}, "seed = -1"),
        ({"timeout": 0}, "timeout = 0"),
        ({"every": -1}, "every = -1"),
        ({"sampling": Sampling(cfg=2.0, cfg_span=(0, 17))}, r"cfg_span = \(0, 17\)"),
        ({"negative": TWO}, "cfg = 1.0 is off"),
    ],
)
def test_what_can_never_be_drawn_is_refused_at_once(engine, asked, message):
    scheduler = Scheduler(engine, slots=4, prompt_tokens=80)
    with pytest.raises(ValueError, match=message):
        scheduler.submit(ONE, **asked)
    assert scheduler.metrics().refused == 1 and not scheduler.step()


def test_a_prompt_that_never_fits_is_refused(engine):
    longest = len(engine.prompts.l2i(TWO))
    scheduler = Scheduler(engine, slots=2, prompt_tokens=longest)
    request = scheduler.submit(TWO, 0, PLAIN)  # to the last slot
    with pytest.raises(LayoutError, match=f"slots are made for prompts of {longest}"):
        scheduler.submit(THREE, 0, PLAIN)
    finish(scheduler)
    assert torch.equal(request.result(), Asked(TWO, 0, PLAIN, 1).alone(engine))


def test_refreshed_weights_need_a_new_scheduler(engine):
    engine = copy.copy(engine)
    scheduler = Scheduler(engine, slots=2, prompt_tokens=80)
    engine.refresh()
    with pytest.raises(SchedulerClosed, match="make a new scheduler"):
        scheduler.submit(ONE)
    assert "make a new scheduler" in scheduler.closed and scheduler.metrics().refused == 1


# --- which request is next ------------------------------------------------------------------------


@dataclass(eq=False)
class Ticket:
    rows: int
    priority: int = 0
    overtaken: int = 0


def test_first_come_first_served(engine):
    scheduler, ended = Scheduler(engine, slots=2, prompt_tokens=80, windows=False), []
    for i in range(6):
        request = scheduler.submit(LAYOUTS[i % 3], i, PLAIN)
        request.future.add_done_callback(lambda _, i=i: ended.append(i))
    finish(scheduler)
    assert ended == list(range(6))


def test_a_smaller_one_may_go_first_but_not_for_ever():
    waiting = Waiting[Ticket](100, patience=2)
    large, small = Ticket(4), [Ticket(1) for _ in range(5)]
    waiting.put(Ticket(2))
    assert waiting.take(4) is not None
    waiting.put(large)
    for each in small:
        waiting.put(each)
    assert waiting.take(2) is small[0] and waiting.take(1) is small[1]
    assert waiting.take(1) is None  # now all wait for the large one
    assert waiting.take(3) is None
    assert waiting.take(4) is large
    assert waiting.take(1) is small[2]


def test_higher_priorities_first():
    waiting = Waiting[Ticket](100, patience=2)
    usual, urgent = [Ticket(1) for _ in range(3)], [Ticket(1, priority=1) for _ in range(3)]
    for each in (*usual, *urgent):
        waiting.put(each)
    order = [waiting.take(1) for _ in range(6)]
    assert order == [urgent[0], urgent[1], usual[0], usual[1], usual[2], urgent[2]]
    strict = Waiting[Ticket](100, patience=0)
    for each in (*usual, *urgent):
        strict.put(each)
    assert [strict.take(1) for _ in range(6)] == usual + urgent


@pytest.mark.parametrize("seed", range(5))
def test_nobody_starves(seed):
    """For a long time, more requests come than can be drawn: all but ``patience`` of those drawn
    came before the first that still waits. When no more come, all are drawn."""
    rng, patience, slots = random.Random(seed), 4, 8
    waiting, live, drawn = Waiting[Ticket](10_000, patience), list[tuple[int, Ticket]](), set()
    came = list[Ticket]()
    for now in range(2000):
        live = [(end, t) for end, t in live if end > now]
        if now < 600:
            for _ in range(2):
                ticket = Ticket(rng.choice((1, 1, 1, 2, 8)), rng.choice((0, 0, 5)))
                came.append(ticket)
                waiting.put(ticket)
        while (t := waiting.take(slots - sum(t.rows for _, t in live))) is not None:
            live.append((now + 3, t))
            drawn.add(id(t))
        if now == 599:
            assert len(waiting) > 200
            done = [id(t) in drawn for t in came]
            assert sum(done[done.index(False) :]) <= patience  # the queue has only grown so far
    assert not waiting and len(drawn) == len(came)
    assert 0 < max(t.overtaken for t in came) <= patience


# --- threads --------------------------------------------------------------------------------------


def test_many_threads_submit(engine):
    found: dict[int, torch.Tensor] = {}
    asked = crowd(12, seed=7)
    with Scheduler(engine, slots=8, prompt_tokens=80) as scheduler:

        def work(i: int) -> None:
            found[i] = asked[i].submit(scheduler).result(60)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, each in enumerate(asked):
        assert torch.equal(found[i], each.alone(engine))
    m = scheduler.metrics()
    assert m.submitted == m.admitted == m.finished == 12
    assert m.codes == sum(a.samples for a in asked) * TOKENS
    assert m.live == m.waiting == m.live_slots == 0
    assert m.tokens_per_s == pytest.approx(m.codes / m.busy_s) and m.steps >= TOKENS - 1


def test_awaiting_and_cancelling_in_an_event_loop(engine):
    async def ask(scheduler: Scheduler) -> tuple[torch.Tensor, Request]:
        kept = scheduler.submit(ONE, 1, PLAIN)
        dropped = scheduler.submit(TWO, 2, PLAIN, 4)

        async def wait(request: Request) -> torch.Tensor:
            return await request

        task = asyncio.ensure_future(wait(dropped))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await kept, dropped

    scheduler = Scheduler(engine, slots=1 + 3, prompt_tokens=80)
    # The second cannot begin before the first ends, so it is cancelled in the queue.
    with scheduler:
        codes, dropped = asyncio.run(ask(scheduler))
    assert torch.equal(codes, Asked(ONE, 1, PLAIN, 1).alone(engine))
    assert dropped.future.cancelled() and scheduler.metrics().cancelled == 1


@pytest.mark.parametrize("thread", [True, False])
@pytest.mark.parametrize("cancel", [True, False])
def test_shutting_down(engine, thread, cancel):
    scheduler = Scheduler(engine, slots=2, prompt_tokens=80)
    requests = [scheduler.submit(ONE, i, PLAIN, 2) for i in range(3)]
    if not thread:
        scheduler.step()
    elif not cancel:
        scheduler.start()
    scheduler.shutdown(cancel)
    assert all(r.future.done() for r in requests)
    assert all(r.future.cancelled() == cancel for r in requests)
    with pytest.raises(SchedulerClosed, match="was shut down"):
        scheduler.submit(ONE)
    scheduler.shutdown()
    m = scheduler.metrics()
    assert (m.cancelled, m.finished) == ((3, 0) if cancel else (0, 3)) and m.live_slots == 0


def test_an_error_in_the_block_cancels_what_is_left(engine):
    with pytest.raises(KeyError), Scheduler(engine, slots=1, prompt_tokens=80) as scheduler:
        requests = [scheduler.submit(THREE, i, PLAIN) for i in range(8)]
        raise KeyError("the caller's")
    assert all(r.future.done() for r in requests) and requests[-1].future.cancelled()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_waits_for_a_dead_thread_is_told(engine, monkeypatch):
    scheduler = Scheduler(engine, slots=1, prompt_tokens=80)
    requests = [scheduler.submit(ONE, i, PLAIN) for i in range(2)]
    scheduler.step()
    monkeypatch.setattr(scheduler, "_admit", lambda: 1 / 0)
    scheduler.start()
    for request in requests:
        with pytest.raises(ZeroDivisionError):
            request.result(60)
    with pytest.raises(SchedulerClosed, match="died of ZeroDivisionError"):
        scheduler.submit(ONE)
    scheduler.shutdown()
    assert scheduler.metrics().failed == 2
