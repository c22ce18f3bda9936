"""The prompts of requests that are admitted in one step are run in one forward, as if alone."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from itertools import chain

import pytest
import torch

from echogen.engine.cache import Prefix
from echogen.engine.engine import Engine
from echogen.engine.ranges import listening
from echogen.engine.serving.prefill import FORWARD, PROMPTS, Prefill, forwards
from echogen.engine.serving.scheduler import Scheduler
from echogen.engine.serving.slots import Slots

from .devices import PLACES, Place
from .requests import GUIDED, LAYOUTS, ONE, PLAIN, THREE, TOKENS, TWO, Asked, Heard, Held, finish

HERE = pytest.mark.parametrize("place", PLACES[:1], indirect=True)
"""A prompt that a GPU refuses would end all that runs on it."""


@pytest.fixture(scope="module", params=["operators", "plain"])
def engine(request, place: Place, random_engine) -> Engine:
    engine = place.engine(random_engine)
    if request.param == "plain":
        engine._decoder = engine.transformer
    return engine


@pytest.fixture
def scheduler(engine) -> Scheduler:
    return Scheduler(engine, slots=8, prompt_tokens=80)


def prompts_of(engine: Engine) -> list[tuple[int, ...]]:
    return [tuple(engine.prompts.l2i(layout)) for layout in LAYOUTS]


# --- one forward ----------------------------------------------------------------------------------


def test_prompts_of_a_step_are_run_in_one_forward(engine, place, scheduler):
    """Whatever their lengths; what they draw is what they draw alone."""
    asked = [Asked(ONE, 1, GUIDED, 1), Asked(TWO, 2, PLAIN, 2), Asked(THREE, 3, PLAIN, 1)]
    ran, entered = Heard("engine/prefill/run"), Heard("engine/serve/admit")
    requests = [each.submit(scheduler) for each in asked]
    with listening(ran):
        scheduler.step()
    lengths = list(map(len, prompts_of(engine)))
    assert len(set(lengths)) == 3
    assert (ran.all("rows"), ran.all("tokens")) == ([4], [4 * max(lengths)])
    with listening(entered):
        finish(scheduler)
        again = [each.submit(scheduler) for each in asked]
        finish(scheduler)
    assert (entered.all("requests"), entered.all("rows")) == ([3], [5])
    assert entered.all("tokens") == [sum(lengths)], "the unconditional prompt is kept"
    for each, first, second in zip(asked, requests, again, strict=True):
        if place.exact:
            assert torch.equal(first.result(0), each.alone(engine))
            assert torch.equal(second.result(0), first.result(0))


def test_more_tokens_than_a_step_runs_wait(engine):
    scheduler = Scheduler(engine, slots=16, prompt_tokens=80)
    ran, length = Heard("engine/prefill/run"), len(engine.prompts.l2i(THREE))
    for seed in range(12):
        request = scheduler.submit(THREE, seed, PLAIN)
        request.prompts[0][1] += seed  # else they would share it
    with listening(ran):
        finish(scheduler)
    most = -(-PROMPTS // length)
    assert most == 5 and ran.all("rows") == [5, 5, 2]


def test_equal_prompts_are_run_once(engine, place, scheduler):
    asked = [Asked(TWO, seed, GUIDED, 2) for seed in (1, 2)]
    requests, ran = [each.submit(scheduler) for each in asked], Heard("engine/prefill/run")
    with listening(ran):
        finish(scheduler)
    assert ran.all("rows") == [2]
    if place.exact:
        for each, request in zip(asked, requests, strict=True):
            assert torch.equal(request.result(0), each.alone(engine))


def test_batch_invariant_prompts_are_run_alone(engine):
    scheduler = Scheduler(engine, slots=8, prompt_tokens=80, invariant=True)
    ran = Heard("engine/prefill/run")
    for layout in LAYOUTS:
        scheduler.submit(layout, 1, PLAIN)
    with listening(ran):
        finish(scheduler)
    assert ran.all("tokens") == list(map(len, prompts_of(engine)))


def test_on_packed_weights_prompts_are_run_alone(random_engine, monkeypatch):
    for native in ("1", "0"):
        monkeypatch.setenv("ECHOGEN_NATIVE", native)
        engine, ran = random_engine(), Heard("engine/prefill/run")
        scheduler = Scheduler(engine, slots=8, prompt_tokens=80)
        for layout in LAYOUTS:
            scheduler.submit(layout, 1, PLAIN)
        with listening(ran):
            finish(scheduler)
        assert ran.all("rows") == [1] * 3


@torch.inference_mode()
def test_a_prompt_leaves_together_what_it_leaves_alone(engine, place, relative_error):
    prefill = Slots(engine.decoder, engine.code_table, 4, 96, together=True).prompts
    prompts = prompts_of(engine)
    together = prefill.run_all(dict.fromkeys(prompts, False))
    for prompt in prompts:
        found, alone = together[prompt], prefill.run(prompt)
        assert relative_error(found.keys_values, alone.keys_values) < place.error
        assert relative_error(found.logits, alone.logits) < place.error
        held = found.keys_values.untyped_storage().nbytes()
        assert held == found.keys_values.nbytes, "nothing of the others and of the pads"


@pytest.mark.parametrize("seed", range(20))
def test_a_forward_has_few_tokens_and_few_pads(seed):
    rng = random.Random(seed)
    prompts = [(0,) * rng.choice((rng.randint(1, 90), rng.randint(1, 1200))) for _ in range(30)]
    parts = list(forwards(prompts, True))
    assert sorted(chain(*parts)) == sorted(prompts)
    for part in parts:
        assert len(part) == 1 or len(part) * max(map(len, part)) <= FORWARD
    tokens = sum(len(part) * max(map(len, part)) for part in parts)
    assert tokens < 1.5 * sum(map(len, prompts))
    assert [len(part) for part in forwards(prompts, False)] == [1] * 30
    assert not list(forwards([], True))


# --- errors ---------------------------------------------------------------------------------------


@HERE
def test_a_prompt_that_cannot_be_run_fails_its_request_only(engine, scheduler, caplog):
    asked = [Asked(ONE, 1, GUIDED, 1), Asked(TWO, 2, PLAIN, 2), Asked(THREE, 3, PLAIN, 1)]
    requests = [each.submit(scheduler) for each in asked]
    requests[1].prompts[0][0] = 1 << 30  # no such token
    finish(scheduler)
    assert "prompts run one by one: index out of range" in caplog.text
    with pytest.raises(IndexError):
        requests[1].result(0)
    for i in (0, 2):
        assert torch.equal(requests[i].result(0), asked[i].alone(engine))
    m = scheduler.metrics()
    assert (m.admitted, m.failed, m.finished, m.live_slots) == (3, 1, 2, 0)


@HERE
def test_prompts_that_do_not_fit_in_memory_together_are_run_alone(
    engine, scheduler, monkeypatch, caplog
):
    runner, sizes, held = scheduler._slots._runner, [], []
    right = runner.run_prompts

    def run_prompts(prompts):
        sizes.append(len(prompts))
        if len(prompts) > 1:
            activations = torch.zeros(1000)
            held.append(weakref.ref(activations))
            raise RuntimeError("out of memory")
        assert held[0]() is None, "their memory is needed"
        return right(prompts)

    monkeypatch.setattr(runner, "run_prompts", run_prompts)
    asked = [Asked(layout, 1, PLAIN, 1) for layout in LAYOUTS]
    requests = [each.submit(scheduler) for each in asked]
    finish(scheduler)
    assert "3 prompts run one by one: out of memory" in caplog.text
    assert sizes == [3, 1, 1, 1]
    for each, request in zip(asked, requests, strict=True):
        assert torch.equal(request.result(0), each.alone(engine))


@HERE
def test_slots_that_cannot_be_filled_fail_one_request_and_keep_nothing(
    engine, scheduler, monkeypatch
):
    """Whoever keeps the error does not keep what the prompts of all left."""
    slots, seen = scheduler._slots, []
    right, run_all = slots.take, slots.prompts.run_all

    def take(prefixes):
        if len(seen) == 3:
            seen.append(None)
            raise RuntimeError("out of memory")
        return right(prefixes)

    def watched(prompts):
        found = run_all(prompts)
        seen.extend(weakref.ref(prefix) for prefix in found.values())
        return found

    monkeypatch.setattr(slots, "take", take)
    monkeypatch.setattr(slots.prompts, "run_all", watched)
    asked = [Asked(layout, 1, PLAIN, 1) for layout in LAYOUTS]
    requests = [each.submit(scheduler) for each in asked]
    gc.disable()
    try:
        scheduler.step()
        assert "out of memory" in str(requests[0].future.exception(0))
        assert [each() for each in seen[:3]] == [None] * 3
    finally:
        gc.enable()
    finish(scheduler)
    for each, request in list(zip(asked, requests, strict=True))[1:]:
        assert torch.equal(request.result(0), each.alone(engine))
    assert scheduler.metrics().live_slots == 0


def test_who_cancels_while_prompts_are_run_frees_slots(engine, scheduler, monkeypatch):
    runner = scheduler._slots._runner
    right = runner.run_prompts

    def run_prompts(prompts):
        gone.cancel()
        return right(prompts)

    monkeypatch.setattr(runner, "run_prompts", run_prompts)
    stays, gone = scheduler.submit(ONE, 1, PLAIN, 4), scheduler.submit(TWO, 2, PLAIN, 4)
    waits = scheduler.submit(THREE, 3, PLAIN, 4)
    scheduler.step()
    assert (stays.drawn, waits.drawn) == (2, 2), "its slots were free for the next at once"
    finish(scheduler)
    assert stays.result(0).shape == waits.result(0).shape == (4, TOKENS)
    assert (scheduler.metrics().cancelled, scheduler.metrics().live_slots) == (1, 0)


# --- memory ---------------------------------------------------------------------------------------


@HERE
@pytest.mark.parametrize("longest", [40, 144])
@torch.inference_mode()
def test_prompts_take_no_more_memory_than_the_warm_up(engine, longest):
    """The largest ones that can be admitted in one step, of any lengths."""
    slots = Slots(engine.decoder, engine.code_table, 4, 192, together=True)
    with Held() as warm:
        slots.prompts.warm_up(longest, 5)
    rng, most = random.Random(longest), 0
    for trial in range(10):
        lengths = list[int]()
        while sum(lengths) < PROMPTS:
            lengths += [longest if trial < 2 else rng.randint(5, longest)]
        # The last request may have two prompts.
        prompts = [(trial, i, *[3] * (n - 2)) for i, n in enumerate([*lengths, longest])]
        with Held() as drawn:
            slots.prompts.run_all(dict.fromkeys(prompts, False))
        most = max(most, drawn.peak)
    assert 0.5 * warm.peak < most <= warm.peak


@HERE
def test_a_prefill_together_is_planned(engine, monkeypatch):
    """What several prompts hold is no more than what they add to the plan."""
    peaks, plans = [], []
    for together in (False, True):
        made = copy.copy(engine)
        with Held() as held, monkeypatch.context() as patched:
            if not together:
                patched.setattr(Prefill, "warm_up", warm_up_alone)
            scheduler = Scheduler(made, slots=8, prompt_tokens=80, invariant=not together)
        peaks.append(held.peak - held.live)
        plans.append(scheduler.plan.shared_bytes)
    assert 0 < peaks[1] - peaks[0] <= plans[1] - plans[0]


def warm_up_alone(self: Prefill, prompt_tokens: int, token: int) -> None:
    found: list[Prefix] = self._runner.run_prompts([[token] * prompt_tokens])
    assert len(found) == 1
