"""Every stage's step is dumped with what it was computed from, and computed from it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from echogen.train.config import DJOConfig, LoopConfig, PMTPConfig, VQConfig
from echogen.train.run.checkpoint import StateError, load_state
from echogen.train.run.dump import _same, fingerprint, repeat_dump
from echogen.train.run.loop import TrainingError, run
from echogen.train.stages.djo import DJOStage
from echogen.train.stages.pmtp import PMTPStage
from echogen.train.stages.vq import VQStage
from echogen.train.start import load_start


@pytest.fixture(params=["vq", "pmtp", "djo", "djo sampled", "cycle-rl"])
def build(
    request: pytest.FixtureRequest,
    pmtp_run: Path,
    loop: LoopConfig,
    small_world: None,
    rl_stage: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], Any]:
    """Makes the stage, each time with the weights it begins with."""
    monkeypatch.setattr("echogen.train.stages.vq.VAL_SCENES", 2)
    config, few = replace(loop, bf16=False), {"scenes": 24, "batch": 4}

    def made() -> Any:
        if request.param == "vq":
            small: dict[str, Any] = {"codes": 32, "latent": 32, "multipliers": (1, 1, 1, 1)}
            single = replace(config, muon_lr=None)
            return VQStage(VQConfig(loop=single, batch=4, warmup_steps=2, **small), 32)
        if request.param == "pmtp":
            return PMTPStage(PMTPConfig(loop=config, **few), load_start(pmtp_run, "pmtp"))
        if request.param == "cycle-rl":
            return rl_stage(batch=4, force=True)
        prefix: Any = "sampled" if request.param == "djo sampled" else "teacher"
        djo = DJOConfig(loop=config, prefix=prefix, **few)
        return DJOStage(djo, load_start(pmtp_run, "pmtp"))

    return made


def spoiled(stage: Any, at: int) -> Any:
    """The stage, whose loss is NaN at one step; ``stage.sound`` are that step's numbers."""
    loss = stage.loss

    def nan(step: int) -> Any:
        value, numbers = loss(step)
        stage.sound = {k: float(v) for k, v in numbers.items()}
        return (value * float("nan") if step == at else value), numbers

    stage.loss = nan
    return stage


def test_a_dumped_step_is_repeated(build: Callable[[], Any], tmp_path: Path) -> None:
    stage = spoiled(build(), 3)
    config, dump = stage.config.loop, tmp_path / "dump-step3.pt"
    with pytest.raises(TrainingError, match=r"loss nan.* at step 3; .*dump-step3\.pt"):
        run(stage, config, tmp_path)
    assert load_state(tmp_path / "state.pt")["step"] == 2
    inputs = load_state(dump)["inputs"]
    assert inputs and all(isinstance(x, torch.Tensor) for x in leaves(inputs))

    again = repeat_dump(spoiled(build(), 3), config, dump)
    assert again.same_inputs and again.loss != again.loss and again.broken
    mended = repeat_dump(build(), config, dump)
    assert mended.same_inputs and not mended.broken and not mended.weights
    assert mended.numbers == stage.sound and mended.grad_norm > 0


def test_a_dump_that_finds_no_room_does_not_hide_what_happened(
    tmp_path: Path, pmtp_run: Path, loop: LoopConfig, small_world: None
) -> None:
    config = replace(loop, bf16=False)
    stage = PMTPStage(PMTPConfig(loop=config, scenes=24, batch=4), load_start(pmtp_run, "pmtp"))
    (tmp_path / "dump-step1.pt").mkdir()  # so that no file can take its place
    with pytest.raises(TrainingError, match=r"loss nan.* not dumped: .*dump-step1\.pt: cannot"):
        run(spoiled(stage, 1), config, tmp_path)


def test_inputs_that_cannot_be_made_again_do_not_hide_what_happened(
    tmp_path: Path, pmtp_run: Path, loop: LoopConfig, small_world: None
) -> None:
    config = replace(loop, bf16=False)
    stage = PMTPStage(PMTPConfig(loop=config, scenes=24, batch=4), load_start(pmtp_run, "pmtp"))

    def none(step: int) -> Any:
        raise MemoryError("no room for a batch")

    stage.inputs = none
    told = r"loss nan.* at step 1; what process 0 read is not made again \(MemoryError.*dump-step1"
    with pytest.raises(TrainingError, match=told):
        run(spoiled(stage, 1), config, tmp_path)
    assert load_state(tmp_path / "dump-step1.pt")["inputs"] == {}


def test_weights_without_dimensions_have_a_fingerprint() -> None:
    one = {"count": torch.tensor(3), "flag": torch.tensor([True]), "w": torch.zeros(2, 3).T}
    assert fingerprint(one) == fingerprint({k: one[k].clone() for k in reversed(one)})
    assert fingerprint(one) != fingerprint(one | {"count": torch.tensor(4)})


def leaves(x: Any) -> list[Any]:
    if isinstance(x, dict):
        return [leaf for value in x.values() for leaf in leaves(value)]
    return [torch.tensor(x)] if isinstance(x, list) else [x]


def test_a_second_update_on_a_rollout_is_not_repeated(
    rl_stage: Callable[..., Any], tmp_path: Path
) -> None:
    stage = spoiled(rl_stage(batch=4, updates=2, force=True), 3)
    with pytest.raises(TrainingError):
        run(stage, stage.config.loop, tmp_path)
    again = rl_stage(batch=4, updates=2, force=True)
    with pytest.raises(StateError, match=r"step 3 is update 2 of 2 on its rollout"):
        repeat_dump(again, again.config.loop, tmp_path / "dump-step3.pt")


def test_nan_is_the_same_as_nan_only() -> None:
    """In the file of a run that broke there is often one, where the repeat has a number."""
    nan, one = torch.tensor([float("nan"), 1.0]), torch.tensor([3.0, 1.0])
    assert _same({"x": nan}, {"x": nan.clone()}) and _same([one], [one.clone()])
    assert not _same(nan, one) and not _same(one, nan)
