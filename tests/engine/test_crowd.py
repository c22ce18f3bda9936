"""What draws codes is compiled before the first request, whatever requests ask for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from echogen.engine import engine as engines
from echogen.engine.cpu import loader
from echogen.engine.decoding.sampler import Sampling
from echogen.engine.engine import Engine
from echogen.engine.serving import crowd
from echogen.engine.serving.scheduler import Scheduler
from echogen.kernels.aot import Source
from echogen.kernels.dispatch import recorded
from echogen.kernels.sampling import LONGEST, cfg_sample

from .devices import PLACES, Place
from .requests import ONE, TOKENS, finish

HERE = pytest.mark.parametrize("place", PLACES[:1], indirect=True)
ASKED = (
    {"temperature": 0.0}, {"temperature": 0.0, "top_k": 3, "top_p": 0.5}, {}, {"temperature": 0.7},
    {"top_k": 1}, {"top_k": 5}, {"top_k": 16}, {"top_k": 24}, {"top_p": 0.9},
    {"top_k": 2, "top_p": 0.3}, {"top_k": 16, "top_p": 0.8},
)  # fmt: skip


@pytest.fixture
def engine(place: Place, random_engine) -> Engine:
    return place.engine(random_engine)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[Any, ...]]:
    """The arguments of every call that draws a crowd's codes."""
    found, right = list[tuple[Any, ...]](), crowd.cfg_sample

    def draw(*arguments):
        found.append(arguments)
        return right(*arguments)

    monkeypatch.setattr(crowd, "cfg_sample", draw)
    return found


def compiled(calls: list[tuple[Any, ...]]) -> list[Source]:
    """What Triton compiles for these calls."""
    with recorded() as launches:
        for arguments in calls:
            cfg_sample(*arguments)
    found = list[Source]()
    for source in map(Source.of, launches):
        if source not in found:
            found.append(source)
    return found


@HERE
def test_no_request_compiles_anything(engine, calls):
    """Not for its settings, nor for the number of requests or images; and nothing is compiled
    beforehand that none needs."""
    scheduler = Scheduler(engine, slots=16, prompt_tokens=80)
    before = compiled(calls)
    assert len(before) == len(calls) == 10
    calls.clear()
    for scale in (1.0, 4.0):
        for i, asked in enumerate(ASKED):
            requests = [scheduler.submit(ONE, i, Sampling(cfg=scale, **asked), n) for n in (1, 3)]
            finish(scheduler)
            assert all(len(request.result(0)) for request in requests)
    after = compiled(calls)
    assert all(source in before for source in after) and len(after) == len(before)


@HERE
def test_a_single_slot_has_no_guidance(engine, calls):
    Scheduler(engine, slots=1, prompt_tokens=80)
    assert len(compiled(calls)) == len(calls) == 5


def test_what_no_request_can_have_is_not_compiled(calls):
    crowd.warm_up(torch.zeros(2, LONGEST + 1), on_operators=True)
    assert len(calls) == 4


@HERE
def test_greedy_requests_are_one_crowd(engine, calls):
    scheduler = Scheduler(engine, slots=16, prompt_tokens=80)
    calls.clear()
    for more in ({}, {"top_k": 3}, {"top_p": 0.5}):
        scheduler.submit(ONE, 1, Sampling(temperature=0, **more))
    finish(scheduler)
    assert len(calls) == TOKENS


@HERE
def test_a_picture_is_decoded_beforehand(engine, monkeypatch):
    shapes, right = [], engines.decode_codes

    def decode(vq, codes):
        shapes.append(tuple(codes.shape))
        return right(vq, codes)

    monkeypatch.setattr(engines, "decode_codes", decode)
    Scheduler(engine, slots=2, prompt_tokens=80)
    assert shapes == [(1, TOKENS)]


def test_the_noise_of_a_cpu_is_compiled_beforehand(random_engine, monkeypatch):
    """Also where a model is not drawn in C++, as in bfloat16."""
    monkeypatch.setenv("ECHOGEN_NATIVE", "1")
    engine = copy.copy(random_engine())
    engine.transformer = engine.transformer.to(torch.bfloat16)
    engine.refresh()
    loader._library.cache_clear()
    scheduler = Scheduler(engine, slots=2, prompt_tokens=80)
    assert loader._library.cache_info().misses == 1
    request = scheduler.submit(ONE, 1, Sampling())
    finish(scheduler)
    assert len(request.result(0)) == loader._library.cache_info().misses == 1
