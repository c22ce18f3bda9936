"""The scheduler on the GPU operators: one thread runs steps that were recorded beforehand, while
others submit requests, draw, record, cancel and look at pictures.

Most tests check that in batch-invariant mode a request's codes are, bit for bit, those that it had
alone, whatever the others do.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from echogen.engine.engine import Engine
from echogen.engine.gpu.device import DeviceTransformer
from echogen.engine.ranges import listening
from echogen.engine.serving.crowd import Pace
from echogen.engine.serving.partial import GREY
from echogen.engine.serving.scheduler import Scheduler
from echogen.engine.serving.slots import Slots
from echogen.engine.serving.worker import SchedulerClosed
from echogen.kernels.reference import decode_attention as reference

from .devices import GPU, PLACES
from .requests import (
    GUIDED,
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

WAIT = 120  # seconds; other drawings compile and record between the steps
LARGE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "vision": {"image_size": 16, "num_image_tokens": 64}, "vq": {"num_embeddings": 1024},
}  # fmt: skip
EXACT = pytest.mark.parametrize("place", PLACES[:2], indirect=True)


@pytest.fixture(scope="module", autouse=True)
def row_by_row() -> Iterator[None]:
    """Make the reference take rows one by one. A row's sums in the kernel do not depend on the rows
    that share its prompt. The reference multiplies these together, and MKL's rounding depends on
    their number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK", 1)
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["cache", "fp8 cache"])
def engine(request, place, random_engine) -> Engine:
    return place.engine(random_engine, request.param)


@pytest.fixture(scope="module")
def large(place, random_engine) -> Engine:
    """An engine with shapes that a GPU's libraries multiply in more than one way."""
    return place.engine(random_engine, **LARGE)


def invariant(engine: Engine, slots: int) -> Scheduler:
    return Scheduler(engine, slots=slots, prompt_tokens=80, invariant=True)


def each_alone(scheduler: Scheduler, asked: list[Asked]) -> dict[Asked, Tensor]:
    """What the scheduler draws for each request while there is no other."""
    found = {}
    for each in asked:
        request = each.submit(scheduler)
        finish(scheduler)
        found[each] = request.result(0)
    return found


@contextmanager
def asking(scheduler: Scheduler, asked: list[Asked]) -> Iterator[list[tuple[Asked, Tensor]]]:
    """Run threads that submit all requests over and over until the block ends; yield what they
    got."""
    # No thread without requests: it would never wait, and would keep the others from running.
    threads, found = min(4, len(asked)), list[tuple[Asked, Tensor]]()
    ended = threading.Event()

    def work(mine: list[Asked]) -> None:
        while True:
            requests = [(each, each.submit(scheduler)) for each in mine]
            found.extend((each, request.result(WAIT)) for each, request in requests)
            if ended.is_set():
                return

    with scheduler, ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(work, asked[i::threads]) for i in range(threads)]
        try:
            yield found
        finally:
            ended.set()
        for job in jobs:
            job.result()


def check_drawings_between_steps(
    engine: Engine, scheduler: Scheduler, asked: list[Asked], between: list[Asked], exact: bool
) -> None:
    """Draw at all sizes in this thread, with steps recorded anew, while the scheduler's thread
    draws for others: neither changes what the other draws."""
    wanted = [each.alone(engine) for each in between]
    alone = each_alone(scheduler, asked)
    if exact:
        assert all(torch.equal(codes, each.alone(engine)) for each, codes in alone.items())
    before = scheduler.metrics()
    with asking(scheduler, asked) as found:
        engine.decoder.release()
        assert all(map(torch.equal, (each.alone(engine) for each in between), wanted))
    assert {each for each, _ in found} == set(asked)
    assert all(torch.equal(codes, alone[each]) for each, codes in found)
    after = scheduler.metrics()
    assert after.finished == after.submitted and after.live_slots == 0
    steps, apart = after.steps - before.steps, before.steps / len(asked) * len(found)
    assert steps < apart, "they share steps"


def test_a_crowd_of_threads_with_drawings_between_its_steps(engine, place):
    asked, between = crowd(8, seed=3), crowd(4, seed=4)
    check_drawings_between_steps(engine, invariant(engine, 12), asked, between, place.exact)


def test_a_crowd_of_more_realistic_sizes(large, place):
    """The steps have more rows than `skinny_linear` takes."""
    asked, between = crowd(3, seed=5), crowd(1, seed=6)
    check_drawings_between_steps(large, invariant(large, 20), asked, between, place.exact)


def test_a_scheduler_is_made_while_another_draws(engine):
    """The new scheduler is then stepped in another thread."""
    asked, first = crowd(4, seed=7), invariant(engine, 8)
    alone = each_alone(first, asked)
    with asking(first, asked) as found:
        second = invariant(engine, 8)
        requests = staggered(second, asked, random.Random(7))
    found += [(each, r.result(0)) for each, r in zip(asked, requests, strict=True)]
    assert all(torch.equal(codes, alone[each]) for each, codes in found)


@pytest.mark.parametrize("slots", [4, 8, 12, 20, 32])
@torch.inference_mode()
def test_rows_agree_in_usual_numbers_of_slots(large, slots):
    """Batch-invariant mode rests on this."""
    made = Slots(large.decoder, large.code_table, slots, 96, invariant=True)
    assert made.rows_agree([large.prompts.bos, *range(16)])


def test_who_cancels_in_mid_flight_makes_room_and_harms_nobody(engine):
    scheduler, others = invariant(engine, 4), [Asked(TWO, 2, GUIDED, 1), Asked(THREE, 3, PLAIN, 2)]
    alone, before = each_alone(scheduler, others), scheduler.metrics()
    gone = Asked(ONE, 1, GUIDED, 1).submit(scheduler, every=5, on_partial=lambda _: gone.cancel())
    requests = [each.submit(scheduler) for each in others]
    with scheduler:
        for each, request in zip(others, requests, strict=True):
            assert torch.equal(request.result(WAIT), alone[each])
    after = scheduler.metrics()
    assert gone.future.cancelled() and gone.drawn == 5
    assert (after.cancelled, after.live_slots) == (1, 0)
    # The cancelled request's prompt gave the first of its five codes. The last request to start
    # went on from there.
    assert after.steps - before.steps == 4 + TOKENS - 1


@torch.inference_mode()
def test_rows_have_the_plain_transformers_logits(engine, place, relative_error):
    """In the slots they begin in and in those they move to, with drawings between the steps."""
    bound = place.error + 0.1 * engine.decoder.fp8_cache
    prompts = [engine.prompts.l2i(layout) for layout in LAYOUTS]
    both, held = [], []
    for model in (engine.transformer, engine.decoder):
        both.append(slots := Slots(model, engine.code_table, 8, 96))
        prefixes = [slots.prompts.run(prompt) for prompt in prompts]
        held.append([slots.take(prefixes), slots.take(prefixes[::-1])])
    for code in (3, 21, 9, 14):
        for slots, rows in zip(both, held, strict=True):
            if code == 9:
                slots.release(rows.pop(0))
                rows[:] = slots.gather(rows)
                assert rows[0].numbers == [0, 1, 2]
            for each in rows:
                slots.feed(each, torch.tensor([[code], [2], [5]], device=place.device))
        Asked(TWO, 1, GUIDED, 2).alone(engine)
        count = 3 * len(held[0])
        wanted, found = (slots.step()[:count] for slots in both)
        assert relative_error(found, wanted) < bound


@EXACT
def test_who_stands_behind_free_slots_moves_up(engine):
    """The steps then have fewer rows, whose sums may be rounded differently."""
    scheduler, stays = Scheduler(engine, slots=8, prompt_tokens=80), Asked(TWO, 2, GUIDED, 2)
    alone, heard = each_alone(scheduler, [stays]), Heard("engine/serve/gather")
    gone, request = Asked(ONE, 1, PLAIN, 4).submit(scheduler), stays.submit(scheduler)
    for _ in range(5):
        scheduler.step()
    gone.cancel()
    with listening(heard):
        finish(scheduler)
    assert heard.all("rows") == [4] and torch.equal(request.result(0), alone[stays])


def test_partial_pictures_stream_while_a_thread_draws(engine):
    scheduler, asked = invariant(engine, 8), Asked(TWO, 1, GUIDED, 2)
    alone = each_alone(scheduler, [asked])
    with scheduler:
        others = [each.submit(scheduler) for each in crowd(4, seed=8)]
        request = asked.submit(scheduler, every=5)
        parts = [(part.codes, part.images()) for part in request.partials()]
        assert all(len(other.result(WAIT)) for other in others)
    assert torch.equal(request.result(0), alone[asked])
    for codes, images in parts:
        drawn = codes.shape[1]
        assert torch.equal(codes, alone[asked][:, :drawn]) and len(images) == 2
        corners = [image.crop((6, 6, 8, 8)).getcolors() for image in images]
        assert all((corner == [(4, GREY)]) == (drawn < TOKENS) for corner in corners)
    assert parts[-1][0].shape[1] == TOKENS


def test_refreshed_weights_end_a_scheduler_and_the_next_draws_by_them(place, random_engine):
    engine, asked = place.engine(random_engine), Asked(TWO, 2, GUIDED, 2)
    decoder, scheduler = engine.decoder, invariant(engine, 8)
    before, request = each_alone(scheduler, [asked]), asked.submit(scheduler)
    for _ in range(5):
        scheduler.step()
    with torch.no_grad():
        for p in engine.transformer.parameters():
            p.copy_(p.roll(1, 0))
    engine.refresh()
    assert not scheduler.step() and scheduler.metrics().live_slots == 0
    with pytest.raises(SchedulerClosed, match="make a new scheduler"):
        request.result(0)
    fresh = copy.copy(engine)
    with torch.inference_mode():
        table = fresh.code_table
        fresh._decoder = DeviceTransformer(fresh.transformer, table, record=place.record())
    assert engine.decoder is decoder
    after, wanted = (each_alone(invariant(made, 8), [asked])[asked] for made in (engine, fresh))
    assert torch.equal(after, wanted) and not torch.equal(after, before[asked])


def test_pictures_over_http(engine):
    pytest.importorskip("prometheus_client")
    pytest.importorskip("uvicorn")
    from .served import Client, opened, serving

    def pictures(client: Client, seed: int) -> list[np.ndarray]:
        answer = client.draw(seed=seed, samples=2, cfg=3.0)
        return [opened(image["image"]).astype(int) for image in answer.json["images"]]

    with serving(engine, invariant=True) as client:
        alone = [pictures(client, seed) for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda seed: pictures(client, seed), range(4)))
    # The codes are equal, but libraries decode them, so pixels may differ by one.
    np.testing.assert_allclose(found, alone, atol=1)
    assert not np.allclose(alone[0], alone[1], atol=1)


@GPU
def test_the_host_is_few_steps_ahead_of_the_device():
    pace, steps = Pace(torch.device("cuda", 0)), list[torch.cuda.Event]()
    for _ in range(6):
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
        steps.append(torch.cuda.Event())
        steps[-1].record()
        pace()
        assert all(step.query() for step in steps[: -Pace.AHEAD])
    assert not steps[-1].query()
