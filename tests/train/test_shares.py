"""Parts of a step's batch add up to the whole: losses, numbers, gradients, samples drawn."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from echogen.engine.decoding.sampler import Sampling
from echogen.engine.ranges import listening
from echogen.train.config import DJOConfig, LoopConfig, PMTPConfig, VQConfig
from echogen.train.run.checkpoint import StateError
from echogen.train.run.dump import repeat_dump, write_dump
from echogen.train.run.loop import run
from echogen.train.stages.djo import DJOStage
from echogen.train.stages.pmtp import PMTPStage
from echogen.train.stages.shares import part_of_mean, places, turns
from echogen.train.stages.vq import build_vq
from echogen.train.start import load_start

from .runs import rows, run_in_parts

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


class Drawings:
    """How many images were drawn at once, for `listening`."""

    def __init__(self) -> None:
        self.sizes = list[int]()

    def begin(self, category: str, payload: dict[str, int]) -> None:
        if category == "engine/prefill":
            self.sizes.append(payload["rows"])

    def end(self) -> None:
        pass


@pytest.mark.parametrize(("accumulate", "parts"), [(4, 4), (2, 4), (2, 2), (1, 4)])
def test_a_process_draws_its_parts_together(rl_stage, accumulate, parts) -> None:
    """With noise of their own; in whatever order they come, and with one padded to more objects."""
    rl, whole, drawings = rl_stage(accumulate=accumulate, batch=4), rl_stage(batch=4), Drawings()
    processes = parts // accumulate
    for step in range(2):
        drawn, drawings.sizes = whole._hold(step).rollout.drawing.codes.view(4, 4, -1), []
        with listening(drawings):
            for part in range(parts):
                rollout = rl._hold(step, part, parts).rollout
                assert rollout.layouts == whole.layouts(step)[part::parts]
                found = rollout.drawing.codes.view(len(rollout.layouts), 4, -1)
                assert torch.equal(found, drawn[part::parts])
                most = max(len(y.objects) for y in rollout.layouts)
                assert rollout.mask.shape[1] == rollout.score.iou.shape[2] == most
        assert drawings.sizes == [16 // processes] * processes


@pytest.mark.parametrize("most", [5, 12, 99])
def test_no_more_images_are_drawn_at_once_than_allowed(rl_stage, most) -> None:
    whole, drawings = rl_stage(batch=4, val_drawings=2), Drawings()
    bound = rl_stage(batch=4, val_drawings=2, gate_scenes=5, force=True, draw_at_once=most)
    held = whole._hold(0)
    with listening(drawings):
        found = bound._hold(0)
        wanted = {5: [4] * 4, 12: [8] * 2, 99: [16]}
        assert drawings.sizes == wanted[most]
        bound.begin()
        bound.engine.refresh()
        evaluated = bound.evaluate()
    assert max(drawings.sizes) <= most and drawings.sizes.count(4) >= 2
    assert torch.equal(found.rollout.drawing.codes, held.rollout.drawing.codes)
    torch.testing.assert_close(found.sampled, held.sampled)
    assert torch.equal(found.credit.advantage, held.credit.advantage)
    assert evaluated == pytest.approx(whole.evaluate(), rel=1e-4)


def test_memory_that_drawing_lacks_names_the_setting(rl_stage, monkeypatch) -> None:
    def draw(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("echogen.train.stages.rollouts.draw", draw)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        rl_stage(batch=4).loss(0)
    assert "images were drawn at once; set draw_at_once" in raised.value.__notes__[0]


def test_a_truncated_drawing_in_turns_keeps_its_cuts(rl_stage) -> None:
    sampling = Sampling(cfg=3.0, top_k=9, top_p=0.8)
    drawn = [
        rl_stage(batch=3, beta=0.0, sampling=sampling, draw_at_once=most)._hold(0).rollout.drawing
        for most in (4, None)
    ]
    for some, at_once in zip(*drawn, strict=True):
        torch.testing.assert_close(some, at_once)


RUNS = {
    "image": {},
    "both by object": {"credit": "object", "policy": "both", "normalise": "token"},
    "two updates": {"updates": 2, "policy": "both"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_in_parts_is_the_run_of_whole_batches(tmp_path, rl_stage, name) -> None:
    """And so is one that goes on in other parts, drawn in other turns."""

    def made(accumulate: int, most: int | None = None, **more):
        usual = {"batch": 4, "force": True, "draw_at_once": most}
        return rl_stage(accumulate=accumulate, **usual | RUNS[name] | more)

    whole = made(1)
    run(whole, whole.config.loop, tmp_path / "whole")
    parts, drawings = made(4), Drawings()
    with listening(drawings):
        run(parts, parts.config.loop, tmp_path / "parts")
    assert drawings.sizes.count(16) == 6 // parts.config.updates
    settings = iter([(1, None), (2, 8)])
    run_in_parts(lambda: made(*next(settings)), whole.config.loop, tmp_path / "resumed", 3)
    for folder in ("parts", "resumed"):
        for found, wanted in zip(rows(tmp_path / folder), rows(tmp_path / "whole"), strict=True):
            assert found == pytest.approx(wanted, rel=BOUND, abs=2e-6), folder
    with pytest.raises(StateError, match=r"another run \(batch 4 → 8\)"):
        run(made(1, batch=8), whole.config.loop, tmp_path / "whole", resume=True)


def test_a_step_of_several_processes_is_repeated_as_they_drew_it(rl_stage, tmp_path) -> None:
    """Which part breaks is no matter: the file describes all of them."""
    rl, drawings = rl_stage(accumulate=2, batch=4, force=True), Drawings()
    whole = rl_stage(batch=4)._hold(0).rollout
    numbers, _ = gradients(rl, 0, 4)  # two processes, one after the other
    told = rl.inputs(0)
    assert list(told) == [f"part {part} of 4" for part in range(4)]
    for part, inputs in enumerate(told.values()):
        images = whole.drawing.codes.view(4, 4, -1)[part]
        assert torch.equal(inputs["codes"], images)
        torch.testing.assert_close(inputs["reward"][0], whole.score.reward[part])
    write_dump(tmp_path, rl, 0, "broken", rl.module.state_dict(), told, 4)
    again, config = rl_stage(batch=4, force=True), rl.config.loop  # the file says how it was drawn
    with listening(drawings):
        found = repeat_dump(again, config, tmp_path / "dump-step0.pt")
    assert found.same_inputs and found.numbers == pytest.approx(numbers)
    assert drawings.sizes == [8, 8]
    drawings.sizes.clear()  # with less memory than the run had
    with listening(drawings):
        repeat_dump(
            rl_stage(batch=4, force=True, draw_at_once=4), config, tmp_path / "dump-step0.pt"
        )
    assert drawings.sizes == [4] * 4


def test_what_cannot_be_shared_out_evenly_is_refused(loop, small_world) -> None:
    with pytest.raises(ValueError, match=r"batch = 4 .* 3 parts .* multiple of 3"):
        pmtp(loop).loss_part(0, 0, 3)
    with pytest.raises(ValueError, match=r"extra_grounding = 1 .* multiple of 2"):
        pmtp(loop, extra_grounding=1).loss_part(0, 0, 2)


def test_places_are_every_nth_one_and_each_in_one_part() -> None:
    shared = [list(places("batch", 6, part, 3)) for part in range(3)]
    assert shared == [[0, 3], [1, 4], [2, 5]]
    assert [list(turns(part, 6, 3)) for part in (0, 3)] == [[0, 2, 4], [1, 3, 5]]
    assert list(turns(2, 3, 2)) == [2]  # of a run with another setting
    assert part_of_mean(torch.tensor(2.0), 3, 6) == 1
    assert part_of_mean(torch.tensor(2.0), 3, None) == 2
