"""On the GPU operators, a scheduler's rows that continue one prompt share it: it is written once,
read once a step, and kept for as long as one of them is there."""

from __future__ import annotations

import random
from dataclasses import replace
from weakref import ref

import pytest
import torch
from torch import Tensor

from echogen.engine.cache import Prefix
from echogen.engine.engine import Engine
from echogen.engine.gpu import device
from echogen.engine.serving import prefixes as serving_prefixes
from echogen.engine.serving.prefixes import SharedPrefixes
from echogen.engine.serving.scheduler import Scheduler
from echogen.engine.serving.slots import Rows, Slots, row_counts
from echogen.kernels.decode_members import decode_members

from .requests import GUIDED, LAYOUTS, ONE, PLAIN, THREE, TOKENS, TWO, Asked, finish

ROWS = 8
NAN = float("nan")


@pytest.fixture(scope="module", params=[False, True], ids=["cache", "fp8 cache"])
def engine(request, place, random_engine) -> Engine:
    return place.engine(random_engine, request.param)


@pytest.fixture
def written(monkeypatch) -> list[int]:
    """Tokens of every prefix, recorded as it is written."""
    found, right = list[int](), serving_prefixes.put_prefix

    def put(block, scales, places, keys_values):
        found.extend(keys_values.shape[-2] for _ in places)
        right(block, scales, places, keys_values)

    monkeypatch.setattr(serving_prefixes, "put_prefix", put)
    return found


@pytest.fixture
def slots(engine) -> Slots:
    """Slots filled with NaN, so that anything read before it is written shows."""
    made = Slots(engine.decoder, engine.code_table, ROWS, 96)
    shared = shared_of(made)
    for held in (made.cache.block, made.scales, shared._block, shared._scales):
        if held is not None:
            held.fill_(NAN)
    return made


def shared_of(slots: Slots) -> SharedPrefixes:
    return slots._runner._shared


def places_of(slots: Slots, rows: Rows) -> set[int]:
    return {shared_of(slots)._place[row] for row in rows.numbers}


def check_order(slots: Slots, rows: int) -> None:
    """Check that the order is that of the groups: the kernel relies on it, and the reference does
    not read it."""
    prefixes, query = shared_of(slots).of(rows), shared_of(slots)._query[:rows]
    wanted = decode_members(prefixes.groups, query, prefixes.keys[0])
    members = int((prefixes.groups >= 0).sum())  # idle rows are in no order
    for part in (slice(members), slice(rows, None)):
        assert torch.equal(prefixes.order[part], wanted[part])


def prefixes_of(engine: Engine, slots: Slots) -> list[Prefix]:
    return [slots.prompts.run(engine.prompts.l2i(layout)) for layout in LAYOUTS]


def stepped(slots: Slots, rows: Rows, code: int = 3) -> Tensor:
    slots.feed(rows, torch.tensor([[code]], device=rows.index.device))
    return slots.step()[rows.index].clone()


# --- what is written ------------------------------------------------------------------------------


def test_samples_write_their_prompt_once(engine, place, written):
    scheduler, asked = Scheduler(engine, slots=ROWS, prompt_tokens=80), Asked(TWO, 1, PLAIN, 8)
    request = asked.submit(scheduler)
    finish(scheduler)
    assert written == [len(engine.prompts.l2i(TWO))]
    if place.exact:
        assert torch.equal(request.result(0), asked.alone(engine))


def test_requests_share_their_prompts(engine, written):
    """Admitted in one step both of them; one after the other, the unconditional one while it is
    still there."""
    scheduler = Scheduler(engine, slots=ROWS, prompt_tokens=80)
    length = len(engine.prompts.l2i(TWO))
    for seed in (1, 2):
        Asked(TWO, seed, GUIDED, 2).submit(scheduler)
    scheduler.step()
    held = scheduler._slots
    assert written == [length] * 2 and len(set(shared_of(held)._place)) == 2
    finish(scheduler)
    Asked(TWO, 3, GUIDED, 4).submit(scheduler)
    finish(scheduler)
    assert written == [length] * 3


@torch.inference_mode()
def test_a_prefix_is_not_kept_twice(engine, slots):
    """The memory plan counts the copy that rows read; the prompt's own cache may be freed."""
    prefix = slots.prompts.run(engine.prompts.l2i(ONE))
    first = slots.take([prefix])
    gone = ref(prefix)
    del prefix
    assert gone() is None
    again = slots.take([slots.prompts.run(engine.prompts.l2i(ONE))])
    assert not places_of(slots, first) & places_of(slots, again)


@torch.inference_mode()
def test_what_was_written_in_part_is_not_shared(engine, slots, monkeypatch):
    prefixes, shared = prefixes_of(engine, slots), shared_of(slots)
    wanted = stepped(slots, rows := slots.take(prefixes))
    slots.release(rows)
    other, right = replace(prefixes[1]), serving_prefixes.put_prefix

    def broken(block, scales, places, keys_values):
        right(block, scales, places, keys_values)
        block[:, :, places[0]] = NAN
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(serving_prefixes, "put_prefix", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            slots.take([other, prefixes[2]])
    assert slots.free == ROWS and set(shared._place) == {-1}
    found = stepped(slots, slots.take([prefixes[0], other, prefixes[2]]))
    assert torch.equal(found, wanted)


# --- rows come and go -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@torch.inference_mode()
def test_rows_that_come_go_and_move_have_the_plain_logits(
    engine, place, slots, relative_error, seed
):
    """Rows that wrote a prefix leave before those that share it, and rows move. Some rows in
    between are idle, and so are prefixes."""
    rng, bound = random.Random(seed), place.error + 0.1 * engine.decoder.fp8_cache
    both = Slots(engine.transformer, engine.code_table, ROWS, 96), slots
    prefixes = [prefixes_of(engine, each) for each in both]
    held, ran, idle, moved = [list[Rows](), list[Rows]()], list[int](), 0, 0
    for _ in range(60):
        free = both[0].free
        if free and rng.random() < 0.4:
            which = [rng.randrange(3)] * rng.randint(1, 3) + [rng.randrange(3)]
            for mine, rows, known in zip(both, held, prefixes, strict=True):
                rows.append(mine.take([known[i] for i in which[:free]]))
            ran.append(0)
        ended = [i for i, n in enumerate(ran) if n == TOKENS - 1 or rng.random() < 0.1]
        for i in reversed(ended):
            ran.pop(i)
            for mine, rows in zip(both, held, strict=True):
                mine.release(rows.pop(i))
        if not ran:
            continue
        if rng.random() < 0.5:
            before = [rows.numbers for rows in held[1]]
            held = [mine.gather(rows) for mine, rows in zip(both, held, strict=True)]
            moved += before != [rows.numbers for rows in held[1]]
        code, logits = rng.randrange(16), []
        for mine, rows in zip(both, held, strict=True):
            for each in rows:
                mine.feed(each, torch.tensor([[code]], device=place.device))
            found = mine.step()
            logits.append(torch.cat([found[each.index] for each in rows]))
        idle += len(found) > len(logits[1])
        ran = [n + 1 for n in ran]
        assert relative_error(*reversed(logits)) < bound
        check_order(slots, len(found))
        of_rows = set().union(*(places_of(slots, rows) for rows in held[1]))
        assert of_rows <= set(range(len(found))) and len(of_rows) <= 3
    assert idle and moved


@torch.inference_mode()
def test_a_prefix_moves_down_where_fewer_rows_run(engine, slots, written):
    prefixes = prefixes_of(engine, slots)
    first, last = slots.take(prefixes[:2]), slots.take([prefixes[2]] * 2)
    wanted = stepped(slots, last)
    slots.release(first)
    assert len(stepped(slots, last, 5)) == 2 and places_of(slots, last) == {2}, "four rows run"
    slots.release(last)

    first, last = slots.take(prefixes[:2]), slots.take([prefixes[2]] * 2)
    slots.release(first)
    last = slots.gather([last])[0]
    found = stepped(slots, last)
    assert last.numbers == [0, 1] and places_of(slots, last) < {0, 1}
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert len(written) == 3, "it is moved on the device"


def test_a_step_is_given_as_many_prefixes_as_rows(engine, monkeypatch):
    """What `decode_attention` launches depends on their number."""
    given, right = set[tuple[int, int]](), device.decode_attention

    def attention(query, *others, **more):
        given.add((len(query), len(others[4])))
        return right(query, *others, **more)

    monkeypatch.setattr(device, "decode_attention", attention)
    Slots(engine.decoder, engine.code_table, 12, 96)
    assert given == {(count, count) for count in row_counts(12, False, recorded=True)}


def test_who_cancels_leaves_the_prompt_to_the_others(engine, place):
    """Even where it was the first holder of the unconditional prompt."""
    scheduler, stays = Scheduler(engine, slots=ROWS, prompt_tokens=80), Asked(TWO, 2, GUIDED, 2)
    gone = Asked(TWO, 1, GUIDED, 1).submit(scheduler)
    request = stays.submit(scheduler)
    for _ in range(4):
        scheduler.step()
    gone.cancel()
    later = Asked(THREE, 3, PLAIN, 2)
    other = later.submit(scheduler)
    finish(scheduler)
    if place.exact:
        assert torch.equal(request.result(0), stays.alone(engine))
        assert torch.equal(other.result(0), later.alone(engine))
    assert set(shared_of(scheduler._slots)._place) == {-1}


@torch.inference_mode()
def test_rows_that_regard_who_shares_their_prompt_do_not_agree(engine, monkeypatch):
    """Here rounding depends on the place of their prompt."""
    right = device.decode_attention

    def attention(query, keys, values, lengths, scale, *before, **more):
        found, groups = right(query, keys, values, lengths, scale, *before, **more), before[3]
        return found * (1 + 0.01 * (groups == 1)).to(found.dtype)[:, None, None]

    monkeypatch.setattr(device, "decode_attention", attention)
    made = Slots(engine.decoder, engine.code_table, 4, 96, invariant=True)
    assert not made.rows_agree([engine.prompts.bos, *range(16)]) and made.free == 4
