"""While there are few images, each step draws several codes, and the result is the same."""

from __future__ import annotations

import random
from concurrent.futures import CancelledError

import pytest
import torch

from echogen.engine.decoding.jacobi import MOST_COVER, covered
from echogen.engine.decoding.sampler import Sampler, Sampling
from echogen.engine.engine import Engine
from echogen.engine.layout import Layout, LayoutObject
from echogen.engine.ranges import listening
from echogen.engine.serving.scheduler import Scheduler
from echogen.engine.serving.slots import EDGE, WINDOW_ROWS, Ahead, Slots
from echogen.train.data.scenes import load_scenes

from .requests import KINDS, ONE, TOKENS, TWO, Asked, Heard, finish

PLAIN, GUIDED = KINDS[0], KINDS[4]  # the prompts of GUIDED's two rows differ in length
LONG = Layout(
    "the left of the two green stars",
    (
        LayoutObject("the left of the two green stars", (0.0, 0.25, 0.3, 0.75)),
        LayoutObject("a blue square", (0.5, 0.0, 1.0, 0.5)),
    ),
)
CROWDED = TWO


def windows() -> Heard:
    """A listener for every step that is a window."""
    return Heard("engine/decode/window")


@pytest.fixture(autouse=True)
def by_pytorch(monkeypatch):
    """Draw by PyTorch's operations, the only ones that run several codes a step."""
    monkeypatch.setenv("ECHOGEN_NATIVE", "0")


@pytest.mark.parametrize("sampling", KINDS)
def test_alone_it_draws_the_same_in_fewer_steps(engine, sampling):
    scheduler, steps = Scheduler(engine, slots=4, prompt_tokens=80), []
    for seed, layout in enumerate((ONE, LONG)):
        asked = Asked(layout, seed, sampling, 1)
        request = asked.submit(scheduler)
        steps.append(finish(scheduler))
        assert torch.equal(request.result(), asked.alone(engine))
    assert scheduler.metrics().steps == sum(steps) < 2 * (TOKENS - 1)
    assert scheduler.metrics().codes == 2 * TOKENS


def test_the_bundled_model_takes_a_third_of_the_steps():
    engine = Engine.from_pretrained("tiny")
    scheduler = Scheduler(engine, slots=2)
    layouts = [scene.layout() for scene in load_scenes("test", 6)]
    assert all(covered(layout) <= MOST_COVER for layout in layouts)
    for seed, layout in enumerate(layouts):
        sampling = (Sampling(), Sampling(cfg=5.0))[seed % 2]
        request = scheduler.submit(layout, seed, sampling)
        finish(scheduler)
        wanted = engine.generate_codes([layout], seed, sampling=sampling, decoding="sequential")
        assert torch.equal(request.result(), wanted)
    assert scheduler.metrics().steps <= 6 * 64 / 3


@pytest.mark.parametrize("seed", range(4))
def test_who_comes_and_goes_changes_nothing(engine, seed):
    """Images change from windows to single codes and back at any code, in any slots, and share
    windows with others that are at other positions."""
    rng, made = random.Random(seed), []
    scheduler, heard = Scheduler(engine, slots=24, prompt_tokens=80), windows()
    with listening(heard):
        for _ in range(32):
            kind, samples = rng.choice(KINDS), rng.randint(1, 8)
            layout = CROWDED if rng.random() < 0.1 else rng.choice((ONE, LONG))
            asked = Asked(layout, rng.randrange(1 << 40), kind, samples)
            made.append((asked, asked.submit(scheduler)))
            for _ in range(rng.randrange(14)):
                scheduler.step()
        finish(scheduler)
    singles = scheduler.metrics().steps - len(heard.payloads)
    assert len(set(heard.all("rows"))) > 1 and len(heard.payloads) > 16 and singles > 16
    for asked, request in made:
        assert torch.equal(request.result(), asked.alone(engine))


@pytest.mark.parametrize("others", [(ONE, 15), (CROWDED, 3)], ids=["many rows", "crowded"])
def test_who_is_left_goes_on_in_windows_where_it_stands(engine, others):
    layout, samples = others
    scheduler, heard = Scheduler(engine, slots=20, prompt_tokens=80), windows()
    asked = Asked(LONG, 2, GUIDED, 1)
    stays, left = asked.submit(scheduler), Asked(layout, 1, PLAIN, samples).submit(scheduler)
    with listening(heard):
        for _ in range(3):
            scheduler.step()
        assert not heard.payloads and stays.drawn == 4
        left.cancel()
        finish(scheduler)
    assert heard.payloads and torch.equal(stays.result(), asked.alone(engine))


def test_images_of_one_request_get_on_by_themselves(engine):
    """The codes that all of them have count as drawn, and no image waits for the slowest."""
    scheduler, seen = Scheduler(engine, slots=8, prompt_tokens=80), []
    asked = Asked(LONG, 3, Sampling(temperature=0.5), 4)
    request = asked.submit(scheduler)
    while scheduler.step():
        if scheduler._live:
            done = [image.done for image in scheduler._live[0].drafts]
            seen.append(max(done) - min(done))
            assert request.drawn == min(done)
    assert max(seen) > 1 and torch.equal(request.result(), asked.alone(engine))


def test_drafts_outlast_others_that_come_and_go(engine):
    scheduler = Scheduler(engine, slots=8, prompt_tokens=80)
    first, second = (Asked(LONG, seed, PLAIN, 1).submit(scheduler) for seed in (3, 4))
    scheduler.step()
    drafts = scheduler._live[0].drafts
    second.cancel()
    scheduler.step()
    assert scheduler._live[0].drafts is drafts and first.drawn == drafts[0].done


def test_slots_that_lie_apart(engine):
    """Slots stay apart as long as moving them would not give a step fewer rows."""
    scheduler, heard = Scheduler(engine, slots=8, prompt_tokens=80), windows()
    before = [Asked(ONE, seed, PLAIN, 1).submit(scheduler) for seed in range(8)]
    scheduler.step()
    before[0].cancel()
    before[7].cancel()
    asked = Asked(LONG, 4, GUIDED, 1)
    request = asked.submit(scheduler)
    scheduler.step()
    before[1].cancel()
    with listening(heard):
        scheduler.step()
    assert heard.all("rows") == [8 * 8] and scheduler._live[-1].held.numbers == [0, 7]
    finish(scheduler)
    assert torch.equal(request.result(), asked.alone(engine))


@pytest.mark.parametrize("others", [30, 3], ids=["code by code", "in windows"])
def test_who_stands_behind_free_slots_moves_up(engine, others):
    """It moves with what windows ran ahead, whatever its new slots hold, and as often as needed;
    its steps then run few rows."""
    scheduler, heard = Scheduler(engine, slots=40, prompt_tokens=80), windows()
    before, asked = Asked(ONE, 1, PLAIN, others).submit(scheduler), Asked(LONG, 5, GUIDED, 2)
    request = asked.submit(scheduler)
    scheduler.step()
    scheduler.step()
    assert scheduler._live[-1].held.numbers == list(range(others, others + 4))
    before.cancel()
    with listening(heard):
        scheduler.step()
    assert heard.all("rows") == [4 * 8] and {*scheduler._live[0].held.numbers} == {0, 1, 2, 3}
    assert scheduler.metrics().live_slots == 4 and scheduler._slots.free == 36
    finish(scheduler)
    assert torch.equal(request.result(), asked.alone(engine))


def test_partial_results_come_at_their_codes(engine):
    """This holds however many codes a step draws."""
    scheduler, called = Scheduler(engine, slots=2, prompt_tokens=80), []
    request = scheduler.submit(ONE, 1, PLAIN, every=3, on_partial=called.append)
    steps = finish(scheduler)
    codes = request.result()
    assert [p.codes.shape[1] for p in called] == [3, 6, 9, 12, 15, 16] and steps < TOKENS - 1
    assert all(torch.equal(p.codes, codes[:, : p.codes.shape[1]]) for p in called)


def test_who_cancels_at_a_partial_result_is_told_no_more(engine):
    scheduler, called = Scheduler(engine, slots=2, prompt_tokens=80), []

    def leave(partial):
        called.append(partial)
        request.cancel()

    request = scheduler.submit(ONE, 1, Sampling(temperature=0), every=1, on_partial=leave)
    finish(scheduler)
    assert len(called) == 1 and scheduler.metrics().cancelled == 1
    told = []
    with pytest.raises(CancelledError):
        told.extend(p.codes.shape[1] for p in request.partials())
    assert not told or told[-1] < TOKENS


@pytest.mark.parametrize("how", [{"windows": False}, {"invariant": True}])
def test_code_by_code_where_it_is_asked_for(engine, how):
    scheduler = Scheduler(engine, slots=4, prompt_tokens=80, **how)
    Asked(ONE, 1, PLAIN, 1).submit(scheduler)
    assert finish(scheduler) == TOKENS - 1


def test_crowded_layouts_are_drawn_code_by_code(engine):
    assert covered(CROWDED) > MOST_COVER
    scheduler = Scheduler(engine, slots=4, prompt_tokens=80)
    scheduler.submit(CROWDED, 1, PLAIN)
    assert finish(scheduler) == TOKENS - 1


def test_many_rows_are_drawn_code_by_code(engine):
    scheduler = Scheduler(engine, slots=20, prompt_tokens=80)
    scheduler.submit(ONE, 1, PLAIN, WINDOW_ROWS + 1)
    assert finish(scheduler) == TOKENS - 1


def test_a_window_ends_where_the_cache_does(engine):
    """After the longest prompt, the last code that is run takes the last place of its slot."""
    length = 2 * EDGE - (TOKENS - 1)
    slots = Slots(engine.decoder, engine.code_table, 1, 2 * EDGE, windows=True)
    assert slots.width == TOKENS - 1
    codes, wanted = [code % 7 for code in range(TOKENS)], []
    with torch.inference_mode():
        prefix = slots.prompts.run([3] * length)
        rows = slots.take([prefix])
        for code in codes[:-1]:
            slots.feed(rows, torch.tensor([[code]]))
            wanted.append(slots.step()[0].clone())
        slots.release(rows)
        rows = slots.take([prefix])
        wrong = codes[:3] + [9] * (TOKENS - 4)
        found = slots.window([Ahead([0], [wrong], [0])])[0].clone()
        slots.feed(rows, torch.tensor([codes[1:4]]))  # one appended, two kept, one to come
        assert slots.tokens == length + 3
        again = slots.window([Ahead([0], [codes[:-1]], [-3])])[0]
        assert slots.tokens == length + 4
    assert (found[:3] - torch.stack(wanted[:3])).abs().max() < 1e-4
    assert (found[3:] - torch.stack(wanted[3:])).abs().max() > 1e-2
    assert (again - torch.stack(wanted)).abs().max() < 1e-4


@pytest.mark.parametrize("block", [1 << 30, 24 * 4 * 2, 1])
def test_images_far_apart_hold_the_noise_they_need(monkeypatch, block):
    """This holds whatever the blocks that noise is made in, and in any order of positions."""
    draws, sampling = torch.tensor([3, 1, 7, 2]), Sampling(temperature=0.7)
    whole = Sampler(sampling, 5, draws, 24, 16)
    scores = torch.randn(4, 3, 24, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2], [13, 14, 15], [1, 2, 3], [7, 8, 9]])
    wanted = whole.pick(scores, positions)
    monkeypatch.setattr(Sampler, "BLOCK", block)
    parted = Sampler(sampling, 5, draws, 24, 16)
    assert torch.equal(parted.pick(scores, positions), wanted)
    held = sum(noise.shape[0] for noise in parted._blocks.values())
    assert held <= (16 if block > 1000 else 12)
    for step in (15, 0):
        assert torch.equal(parted(scores[:, 0], step), whole(scores[:, 0], step))
