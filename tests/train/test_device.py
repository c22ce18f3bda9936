"""Stages on a device: every tensor of a step and of an evaluation is where the module is.

The device is the one of `away`, which no machine lacks; losses and gradients must be the CPU's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from echogen.engine.decoding.sampler import Sampling
from echogen.engine.flex import BLOCK
from echogen.engine.model import additive_mask
from echogen.train.config import CycleRLConfig, DJOConfig, PMTPConfig, VQConfig
from echogen.train.data import packing
from echogen.train.data.packing import visibility
from echogen.train.data.rows import cheapest
from echogen.train.parallel.processes import Processes
from echogen.train.run.update import gradients
from echogen.train.stages import passes
from echogen.train.stages import vq as vq_module
from echogen.train.stages.cycle_rl import CycleRLStage
from echogen.train.stages.djo import DJOStage
from echogen.train.stages.pmtp import PMTPStage
from echogen.train.stages.vq import VQStage
from echogen.train.start import Start, load_start

from .away import AWAY, Away, Machine, Misplaced, send, waited


@pytest.fixture(autouse=True)
def there(monkeypatch: pytest.MonkeyPatch, small_world: None) -> None:
    """What only a true GPU can do is left out: FlexAttention (tested against the dense mask)."""
    dense = lambda batch, x: additive_mask(visibility(batch), x.dtype)  # noqa: E731
    monkeypatch.setattr(passes, "attention_mask", dense)
    monkeypatch.setattr(vq_module, "VAL_SCENES", 4)


def begin(run: Path, away: bool) -> Start:
    """The model of a run, on the device as `load_start` would have it there."""
    start = load_start(run, "pmtp")
    if away:
        for module in (start.engine.transformer, start.engine.vq, start.engine.siglip):
            send(module)
        with Machine():
            start.engine.refresh()
    return start


def pmtp(start: Start, loop) -> PMTPStage:
    return PMTPStage(PMTPConfig(loop=loop, scenes=24, batch=3), start)


def djo(prefix: str):
    def build(start: Start, loop) -> DJOStage:
        return DJOStage(DJOConfig(loop=loop, scenes=24, batch=3, branches=2, prefix=prefix), start)

    return build


def rl(policy: str, **sampling):
    def build(start: Start, loop) -> CycleRLStage:
        config = CycleRLConfig(
            loop=replace(loop, muon_lr=None), scenes=24, batch=2, group=3, policy=policy,
            force=True, gate_scenes=2, gate_group=2, sampling=Sampling(**sampling), beta=1.0,
        )  # fmt: skip
        stage = CycleRLStage(config, start)
        # Away from the reference: a model of six steps may draw groups of equal reward, and then
        # the KL term is all the gradient there is.
        with torch.no_grad():
            for p in stage.module.parameters():
                p.mul_(1.05)
        return stage

    return build


STAGES = {
    "pmtp": pmtp, "djo teacher": djo("teacher"), "djo sampled": djo("sampled"),
    "rl image": rl("image", cfg=2.0), "rl both": rl("both"),
}  # fmt: skip


def step(stage) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step."""
    loss, _ = stage.loss(0)
    loss.backward()
    named = stage.module.named_parameters()
    return float(loss.detach()), {n: p.grad for n, p in named if p.grad is not None}


@pytest.mark.parametrize("name", STAGES)
def test_a_step_is_the_same_on_a_device(pmtp_run, loop, name, monkeypatch) -> None:
    loop = replace(loop, bf16=False)
    wanted, gradients = step(STAGES[name](begin(pmtp_run, False), loop))
    # The CPU's rows, for its sums.
    monkeypatch.setattr(packing, "cheapest", lambda lengths, blocks: cheapest(lengths, False))
    with Machine():
        stage = STAGES[name](begin(pmtp_run, True), loop)
        found, moved = step(stage)
    # Attention takes another way there, whose sums round otherwise.
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert moved.keys() == gradients.keys() and gradients
    largest = max(float(grad.abs().max()) for grad in gradients.values())
    assert largest > 1e-4
    for key, grad in gradients.items():
        assert isinstance(moved[key], Away)
        assert (moved[key].as_subclass(Tensor) - grad).abs().max() < 1e-4 * largest


@pytest.mark.parametrize("name", STAGES)
def test_backward_is_queued_before_the_device_is_waited_for(
    pmtp_run, loop, name, monkeypatch
) -> None:
    """Else it would run out of work in every step. Only what was drawn is brought back, to be
    packed."""
    dense = passes.attention_mask

    def unseen(batch, x):
        before, mask = [*waited], dense(batch, x)
        waited[:] = before  # a GPU's mask is made otherwise
        return mask

    monkeypatch.setattr(passes, "attention_mask", unseen)
    with Machine():
        stage = STAGES[name](begin(pmtp_run, True), replace(loop, bf16=False))
        if name.startswith("rl"):
            stage._hold(0)
        waited.clear()
        loss, _ = stage.loss(0)
    assert loss.requires_grad
    # The engine draws on plain torch here, which is another matter.
    assert waited[-1:] == (["cpu"] if name == "djo sampled" else [])


@pytest.mark.parametrize("policy", ["image", "both"])
@pytest.mark.parametrize("credit", ["image", "object"])
def test_a_part_is_packed_without_waiting_for_the_part_before_it(
    pmtp_run, loop, policy, credit
) -> None:
    """What was drawn for all parts is brought back once."""
    single = replace(loop, bf16=False, muon_lr=None, accumulate=2)
    config = CycleRLConfig(
        loop=single, scenes=24, batch=2, group=3, policy=policy, credit=credit, beta=0.0
    )
    with Machine():
        stage = CycleRLStage(config, begin(pmtp_run, True))
        stage._hold(0, 0, 2)
        waited.clear()
        stage._hold(0, 1, 2)
        assert not waited


@pytest.mark.parametrize("name", ["pmtp", "djo teacher"])
def test_the_next_batch_is_made_before_the_device_is_waited_for(
    pmtp_run, loop, name, monkeypatch
) -> None:
    """Else it would stand still meanwhile, between two steps."""
    config, seen = replace(loop, bf16=False, muon_lr=None, steps=3), []
    with Machine():
        stage = STAGES[name](begin(pmtp_run, True), config)
        ahead = stage.ahead

        def noted(step: int, part: int, parts: int) -> None:
            seen.append((step, [*waited]))
            ahead(step, part, parts)

        monkeypatch.setattr(stage, "ahead", noted)
        for i in range(config.steps):
            waited.clear()
            gradients(stage, config, list(stage.module.parameters()), i, Processes())
    assert seen == [(1, []), (2, [])]  # nothing comes after the last


def test_rows_are_made_for_blocks_there(pmtp_run, loop) -> None:
    with Machine():
        batch = pmtp(begin(pmtp_run, True), loop).batch(0)
    assert all(isinstance(part, Away) for part in vars(batch).values())
    assert batch.ids.shape[1] % BLOCK == 0


def test_an_evaluation_runs_on_a_device(pmtp_run, loop) -> None:
    with Machine():
        stage = rl("image")(begin(pmtp_run, True), replace(loop, bf16=False))
        assert set(stage.begin()) >= {"groups"}
        values = stage.evaluate()
        assert len(stage.pictures()) == 4
    assert {"l2i", "i2l", "judge_iou", "reward", "self_iou", "gap", "cycle_iou"} <= set(values)


def test_what_stage_1_watches_is_found_on_a_device(pmtp_run, loop) -> None:
    with Machine():
        values = pmtp(begin(pmtp_run, True), replace(loop, bf16=False)).evaluate()
    assert values["gap"] == values["self_iou"] - values["judge_iou"]


def test_the_image_tokenizer_trains_on_a_device(loop) -> None:
    config = VQConfig(
        loop=replace(loop, bf16=False, muon_lr=None), codes=32, latent=32, batch=2, warmup_steps=0,
        multipliers=(1, 1, 1, 1),
    )  # fmt: skip
    wanted, _ = step(VQStage(config, 32))
    stage = VQStage(config, 32)
    send(stage.module)
    with Machine():
        found, gradients = step(stage)
        stage.after_step(0)
        assert stage.evaluate()["l1"] > 0
    assert found == wanted and gradients


def test_a_tensor_in_the_wrong_place_is_found_out() -> None:
    layer = nn.Linear(4, 3)
    send(layer)
    x = torch.randn(5, 4)
    with Machine():
        with pytest.raises(Misplaced, match=r"\(5, 4\)"):
            layer(x)
        y = layer(x.to(AWAY))
        assert y.device == AWAY and y[torch.tensor([0, 2])].shape == (2, 3)
        with pytest.raises(Misplaced):
            y + torch.ones(3)
        with pytest.raises(Misplaced):
            y.detach().numpy()
        assert torch.arange(3, device=AWAY).is_cuda and not y.cpu().is_cuda


def test_a_fresh_model_is_made_where_its_image_tokenizer_is(pmtp_run, loop, monkeypatch) -> None:
    usual = nn.Module.to

    def to(module: nn.Module, *args, **kwargs) -> nn.Module:
        if not (args and args[0] == AWAY):
            return usual(module, *args, **kwargs)
        send(module)
        return module

    monkeypatch.setattr(nn.Module, "to", to)
    vq = begin(pmtp_run, True).engine.vq
    config = PMTPConfig(
        loop=loop, width=32, layers=1, heads=2, mlp_width=48, bins=17, scenes=24, batch=2
    )
    with Machine():
        stage = PMTPStage(config, vq)
        assert stage.engine.device == AWAY
        assert all(p.is_cuda for p in stage.module.parameters())
        assert stage.batch(0).ids.is_cuda
