"""Memory is planned before anything is drawn, is allocated once, and is enough."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from echogen.engine.config import ModelConfig
from echogen.engine.cpu.native import NativeTransformer
from echogen.engine.decoding.sampler import Sampling
from echogen.engine.engine import Engine
from echogen.engine.gpu.device import DeviceTransformer
from echogen.engine.serving import budget
from echogen.engine.serving.budget import BudgetError
from echogen.engine.serving.scheduler import Scheduler

from .requests import (
    GUIDED,
    ONE,
    PLAIN,
    TOKENS,
    Asked,
    Held,
    crowd,
    finish,
)
from .tape import Tape

SLOTS = 48
"""So many that their cache is larger than what a forward of prompts makes."""


def test_memory_is_planned_and_made_once(either):
    engine = either
    engine.decoder  # noqa: B018  # so that its weights are not counted
    with Held() as held:
        scheduler = Scheduler(engine, slots=SLOTS)
    block = scheduler._slots.cache.block
    assert block.nbytes <= held.live
    place = block.data_ptr()
    with Held() as drawing:
        requests = [a.submit(scheduler) for a in crowd(12, seed=4)]
        finish(scheduler)
        for sampling in (PLAIN, GUIDED):  # alone, in windows
            Asked(ONE, 5, sampling, 1).submit(scheduler)
            finish(scheduler)
        requests[0].images()
    assert scheduler._slots.cache.block.data_ptr() == place
    assert held.live + drawing.peak <= scheduler.plan.bytes
    planned = block.nbytes * scheduler.plan.capacity / block.shape[-2]  # C++: no prompts in it
    assert drawing.largest < planned / 4  # nothing of the cache's size is made while drawing


@pytest.mark.parametrize("fp8_cache", [False, True])
def test_memory_on_a_gpus_operators_is_planned_and_made_once(engine, monkeypatch, fp8_cache):
    """Separate codes and prompts together take what slots that hold both would."""
    with torch.inference_mode():
        made = DeviceTransformer(
            engine.transformer, engine.code_table, fp8_cache=fp8_cache, record=Tape()
        )
    monkeypatch.setattr(Engine, "decoder", property(lambda self: made))
    with Held() as held:
        scheduler = Scheduler(engine, slots=SLOTS)
    slots, plan = scheduler._slots, scheduler.plan
    shared = slots._runner._shared
    blocks = [slots.cache.block, shared._block]
    scales = [each for each in (slots.scales, shared._scales) if each is not None]
    assert len(scales) == 2 * fp8_cache
    c = made.config
    head = c.head_dim + 4 if fp8_cache else 4 * c.head_dim
    cache = 2 * c.layers * plan.slots * c.kv_heads * plan.capacity * head
    assert sum(each.nbytes for each in blocks + scales) == cache
    assert shared._block.shape[-2] >= plan.prompt_tokens
    with Held() as drawing:
        for each in crowd(12, seed=4):
            each.submit(scheduler)
        finish(scheduler)
    assert held.live + drawing.peak <= plan.bytes
    assert drawing.largest < cache / 2


def test_in_cpp_a_slot_and_a_prompt_of_its_own_are_no_more_than_a_planned_slot(engine):
    if not isinstance(engine.decoder, NativeTransformer):
        pytest.skip("drawn by PyTorch's operations")
    for prompt_tokens in (80, 81, 82):
        scheduler = Scheduler(engine, slots=2, prompt_tokens=prompt_tokens)
        own = scheduler._slots.cache.block.shape[-2]
        assert own + prompt_tokens <= scheduler.plan.capacity


def test_slots_follow_the_memory(engine):
    most = Scheduler(engine, memory=1 << 40, prompt_tokens=80).plan
    assert most.slots == budget.MOST["cpu"]
    assert most.bytes == most.shared_bytes + most.slots * most.slot_bytes
    five = Scheduler(engine, slots=5, memory=1 << 40, prompt_tokens=80).plan
    memory = five.bytes + five.slot_bytes // 2
    scheduler = Scheduler(engine, memory=memory, prompt_tokens=80)
    assert scheduler.plan.slots == scheduler.metrics().slots == 5
    with pytest.raises(BudgetError, match=r"in which 5 fit; ask for fewer slots"):
        Scheduler(engine, slots=16, memory=memory, prompt_tokens=80)
    with pytest.raises(BudgetError, match="in which 0 fit"):
        Scheduler(engine, memory=1 << 20, prompt_tokens=80)
    for asked, message in (
        ({"slots": 0}, "slots = 0"), ({"prompt_tokens": 145}, "room for 1 … 144"),
        ({"queue": 0}, "queue = 0"), ({"patience": -1}, "patience = -1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Scheduler(engine, **asked)


@pytest.mark.parametrize("windows", [False, True])
def test_the_number_told_to_fit_does_and_one_more_does_not(engine, windows):
    """A slot costs more when more are asked for: at the cost of 100,000, far fewer would fit."""
    config, memory = engine.transformer.config, 1 << 30

    def planned(slots: int) -> budget.Plan:
        return budget.plan(
            config, torch.float32, torch.device("cpu"), 1 << 20, slots, memory, 80, windows=windows
        )

    with pytest.raises(BudgetError, match="100000 slots of 96 tokens would take") as refused:
        planned(100_000)
    told = re.search(r"in which (\d+) fit", str(refused.value))
    assert told
    fitting = int(told[1])
    assert fitting > 100 and planned(fitting).bytes <= memory
    with pytest.raises(BudgetError, match=f"in which {fitting} fit"):
        planned(fitting + 1)


def test_free_memory_is_the_devices(monkeypatch, tmp_path):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert budget.free_bytes(cuda) == 1200  # of which PyTorch holds 200 without using them
    cpu = torch.device("cpu")
    assert budget.free_bytes(cpu) > 1 << 20
    monkeypatch.setattr(budget, "_available", lambda: 700)
    monkeypatch.setattr(budget, "_container", lambda: 500)
    assert budget.free_bytes(cpu) == 500
    monkeypatch.setattr(budget, "_container", lambda: None)
    assert budget.free_bytes(cpu) == 700
    monkeypatch.setattr(budget, "_available", lambda: None)
    with pytest.raises(BudgetError, match="say how much to plan with"):
        budget.free_bytes(cpu)


@pytest.mark.parametrize("version", [0, 1], ids=["cgroup v2", "cgroup v1"])
def test_a_container_has_its_limit_less_what_is_used(monkeypatch, tmp_path, version):
    _, limit, used, files = budget.CGROUPS[1 - version]
    empty = (tmp_path / "none", *budget.CGROUPS[version][1:])
    there = (tmp_path, limit, used, files)
    monkeypatch.setattr(budget, "CGROUPS", (empty, there))
    assert budget._container() is None
    (tmp_path / limit).write_text("1000\n")
    (tmp_path / used).write_text("700\n")
    assert budget._container() == 300
    (tmp_path / "memory.stat").write_text(f"cache 400\n{files} 250\nshmem 1\n")
    assert budget._container() == 550, "files that were read give way"


def test_slots_of_a_long_model_are_made_for_prompts_of_some_length():
    config = ModelConfig(
        vocab_size=102_400, codebook_size=16_384, code_dim=8, width=2048, layers=24, heads=16,
        kv_heads=16, head_dim=128, mlp_width=5632, head_width=2048, aligner_depth=2,
        pixel_dim=1024, pixel_aligner_depth=2, rope_theta=1e4, norm_eps=1e-6, image_tokens=576,
        image_size=384, max_positions=16_384, tied=False,
    )  # fmt: skip
    card = budget.plan(config, torch.bfloat16, torch.device("cuda"), 1 << 29, memory=60 << 30)
    assert card.prompt_tokens == budget.PROMPT_TOKENS and card.slots > 64
    assert card.prefix_bytes > 2 * (192 << 10) * card.prompt_tokens  # 192 KiB a token
    eight = budget.plan(
        config, torch.bfloat16, torch.device("cuda"), 1 << 29, memory=60 << 30, fp8_cache=True
    )
    assert 0.5 < eight.slot_bytes / card.slot_bytes < 0.6
    host = budget.plan(config, torch.bfloat16, torch.device("cpu"), 1 << 29, memory=60 << 30)
    assert host.slots == budget.MOST["cpu"]


def test_windows_are_planned(engine, monkeypatch):
    """What windows hold and what passes through one takes no more than they add to the plan."""
    monkeypatch.setenv("ECHOGEN_NATIVE", "0")
    engine, plans, held = copy.copy(engine), [], []
    engine.refresh()
    for windows in (False, True):
        with Held() as made:
            scheduler = Scheduler(engine, slots=16, prompt_tokens=80, windows=windows)
        request = scheduler.submit(ONE, 1, Sampling(top_k=5, top_p=0.8), 16)
        scheduler.step()
        with Held() as drawing:
            finish(scheduler)
        assert request.result().shape == (16, TOKENS)
        held.append(made.live + drawing.peak)
        plans.append(scheduler.plan.bytes)
    assert 0 < held[1] - held[0] <= plans[1] - plans[0]
