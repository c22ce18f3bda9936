"""Parts of a step's batch add up to the whole: losses, numbers, gradients, samples drawn."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from echogen.train.config import DJOConfig, LoopConfig, PMTPConfig, VQConfig
from echogen.train.stages.djo import DJOStage
from echogen.train.stages.pmtp import PMTPStage
from echogen.train.stages.shares import part_of_mean, places
from echogen.train.stages.vq import build_vq
from echogen.train.start import load_start

BOUND = 2e-5
"""Of gradients and losses, relative, float32: parts are packed and summed in another order. Seen:
5e-7."""
PMTP = {
    "isolated": {"extra_grounding": 4},
    "shared": {"mask": "shared", "extra_grounding": 4, "prompt_dropout": 0.4},
}
DJO = {
    "teacher": {},
    "sampled": {"prefix": "sampled"},
    "paper": {"grounding_weight": 0.0, "freeze_grounder": True},
    "no loop": {"loop_weight": 0.0},
}
RL = {
    "image": {},
    "both by token": {"policy": "both", "normalise": "token"},
    "by object": {"credit": "object"},
    "both by object": {"credit": "object", "policy": "both", "normalise": "token"},
    "boxes": {"policy": "boxes", "updates": 2},
    "constant by object": {"credit": "object", "normalise": "constant"},
    "constant": {"normalise": "constant", "beta": 0.0, "advantage": "rloo"},
}


def pmtp(loop: LoopConfig, **settings) -> PMTPStage:
    torch.manual_seed(0)
    vq = build_vq(VQConfig(loop=loop, codes=32, latent=32, multipliers=(1, 1, 1, 1)), 32)
    shape = {"width": 32, "layers": 2, "heads": 2, "mlp_width": 64, "bins": 17, "scenes": 24}
    stage = PMTPStage(PMTPConfig(loop=loop, batch=4, **shape, **settings), vq)
    stage.module.initialise(1, std=0.2)
    return stage


@pytest.fixture(params=[*PMTP, *DJO, *RL])
def stage(request, pmtp_run, loop, small_world, rl_stage):
    """Every stage, with the settings that change what its loss is a mean over."""
    name, single = request.param, dataclasses.replace(loop, bf16=False)
    if name in PMTP:
        return pmtp(single, **PMTP[name])
    if name in DJO:
        settings = {"scenes": 24, "batch": 4, "prompt_dropout": 0.5, **DJO[name]}
        found = DJOStage(DJOConfig(loop=single, **settings), load_start(pmtp_run, "pmtp"))
        found.module.initialise(1, std=0.2)
        return found
    return rl_stage(batch=4, group=3, **RL[name])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("stage", [*PMTP, *DJO], indirect=True)
def test_what_was_made_ahead_is_what_is_trained_on(stage, parts, monkeypatch):
    wanted = gradients(stage, 1, parts)[0]
    stage.ahead(1, 0, parts)
    assert gradients(stage, 1, parts)[0] == wanted
    stage.ahead(2, 0, parts)  # and another step is not
    assert gradients(stage, 1, parts)[0] == wanted
    stage.ahead(1, 0, parts)
    monkeypatch.setattr(stage, "tasks" if stage.name == "pmtp" else "examples", lambda step: 1 / 0)
    stage.loss(1) if parts == 1 else stage.loss_part(1, 0, parts)


def gradients(stage, step: int, parts: int):
    """(numbers, gradients) of a step in so many parts."""
    stage.module.zero_grad()
    total: dict[str, float] = {}
    for part in range(parts):
        loss, numbers = stage.loss(step) if parts == 1 else stage.loss_part(step, part, parts)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(numbers["loss"], abs=1e-7)
        for name, value in numbers.items():
            total[name] = total.get(name, 0.0) + float(value)
    return total, {
        n: p.grad.clone() for n, p in stage.module.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_add_up(stage, parts) -> None:
    for step in (0, 2):
        numbers, grads = gradients(stage, step, 1)
        added, summed = gradients(stage, step, parts)
        assert added.keys() == numbers.keys()
        for name, value in numbers.items():
            assert added[name] == pytest.approx(value, rel=BOUND, abs=2e-6), name
        assert summed.keys() == grads.keys()
        for name, grad in grads.items():
            size = max(float(grad.norm()), 1e-3 * max(float(g.norm()) for g in grads.values()))
            assert float((summed[name] - grad).norm()) <= BOUND * size, name


def test_an_image_is_drawn_with_the_same_noise_in_whatever_part(rl_stage) -> None:
    whole, parts = rl_stage(batch=4), rl_stage(batch=4)
    drawn = whole._hold(1).rollout.drawing.codes.view(4, 4, -1)
    for part in range(2):
        rollout = parts._hold(1, part, 2).rollout
        assert rollout.layouts == whole.layouts(1)[part::2]
        assert torch.equal(rollout.drawing.codes.view(2, 4, -1), drawn[part::2])


def test_what_cannot_be_shared_out_evenly_is_refused(loop, small_world) -> None:
    with pytest.raises(ValueError, match=r"batch = 4 .* 3 parts .* multiple of 3"):
        pmtp(loop).loss_part(0, 0, 3)
    with pytest.raises(ValueError, match=r"extra_grounding = 1 .* multiple of 2"):
        pmtp(loop, extra_grounding=1).loss_part(0, 0, 2)


def test_places_are_every_nth_one_and_each_in_one_part() -> None:
    shared = [list(places("batch", 6, part, 3)) for part in range(3)]
    assert shared == [[0, 3], [1, 4], [2, 5]]
    assert part_of_mean(torch.tensor(2.0), 3, 6) == 1
    assert part_of_mean(torch.tensor(2.0), 3, None) == 2
