"""Adapters: only they are trained, rollouts see them, and what is exported is the sum."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from echogen.engine.engine import Engine
from echogen.train.config import LoopConfig, PMTPConfig, VQConfig
from echogen.train.data.samples import module_hash
from echogen.train.lora import is_adapter, without_adapters
from echogen.train.run.checkpoint import StateError, load_state, save_state
from echogen.train.run.dump import repeat_dump
from echogen.train.run.loop import TrainingError, run
from echogen.train.stages.cycle_rl import CycleRLStage
from echogen.train.stages.passes import hidden_states
from echogen.train.stages.pmtp import PMTPStage
from echogen.train.stages.vq import build_vq
from echogen.train.start import load_start, model_folder

RANK = 4


@pytest.fixture
def lora_loop(loop: LoopConfig) -> LoopConfig:
    return dataclasses.replace(
        loop, steps=12, eval_every=12, save_every=6, muon_lr=None, lr=1e-2, bf16=False, lora=RANK
    )


def pmtp(loop: LoopConfig, pmtp_run: Path) -> PMTPStage:
    """Stage 1 gone on with, on adapters."""
    return PMTPStage(PMTPConfig(loop=loop, scenes=24, batch=4), load_start(pmtp_run, "pmtp"))


def stir(module: torch.nn.Module) -> None:
    """Adapters as far from nothing as training would take them."""
    torch.manual_seed(1)
    for name, p in module.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(p, std=0.3)


@pytest.mark.parametrize("also", [(), ("text_head", "code_embedding")])
def test_only_adapters_and_chosen_parts_are_trained(
    lora_loop, pmtp_run, small_world, tmp_path, also
) -> None:
    loop = dataclasses.replace(lora_loop, lora_also=also)
    stage = pmtp(loop, pmtp_run)
    before = {n: p.detach().clone() for n, p in stage.module.named_parameters()}
    with torch.no_grad():
        first = float(stage.loss(0)[0])
    run(stage, loop, tmp_path / "run")
    with torch.no_grad():
        assert float(stage.loss(0)[0]) < first - 0.05  # frozen heads leave little to gain
    for name, p in stage.module.named_parameters():
        trained = is_adapter(name) or name.startswith(also or "no part")
        assert torch.equal(p, before[name]) != trained, name
    count = sum(is_adapter(name) for name in before)
    assert count == 2 * 4 * 2  # A and B, four projections, two layers


def test_the_export_is_the_sum_and_the_adapter_beside_it(
    lora_loop, pmtp_run, small_world, tmp_path
) -> None:
    from peft import PeftModel

    stage = pmtp(lora_loop, pmtp_run)
    stir(stage.module)
    stage.export(tmp_path / "model")
    batch = stage.batch(0)
    with torch.no_grad():
        adapted = hidden_states(stage.module, batch)
        summed = hidden_states(stage.engine.transformer, batch)
        with without_adapters(stage.module):
            bare = hidden_states(stage.module, batch)
    base = load_start(pmtp_run, "pmtp").engine.transformer
    with torch.no_grad():
        torch.testing.assert_close(bare, hidden_states(base, batch))
        # W·x + B·A·x against (W + B·A)·x, float32.
        assert float((summed - adapted).norm() / adapted.norm()) < 1e-5
        assert float((bare - adapted).abs().max()) > 0.1
        exported = Engine.from_pretrained(tmp_path / "model").transformer.state_dict()
        for name, weight in stage.engine.transformer.state_dict().items():
            assert torch.equal(exported[name], weight.bfloat16().float()), name
        loaded = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")
        torch.testing.assert_close(hidden_states(loaded.base_model.model, batch), adapted)
    assert model_folder(tmp_path / "model") == tmp_path / "model"


def test_rollouts_draw_with_the_adapters(rl_stage, pmtp_run) -> None:
    plain = rl_stage(policy="both", beta=0.01)
    loop = dataclasses.replace(plain.config.loop, lora=RANK)
    begun = load_start(pmtp_run, "djo", any_stage=True)
    begun.engine.transformer.initialise(0, std=0.2)  # as `rl_stage` does
    stage = CycleRLStage(dataclasses.replace(plain.config, loop=loop), begun)
    assert stage._reference is None  # adapters left out are the reference, and cost no memory
    loss, numbers = stage.loss(0)
    assert numbers["kl"] < 1e-9
    assert torch.equal(
        stage._held[0, 1].rollout.drawing.codes, plain._hold(0).rollout.drawing.codes
    )
    stir(stage.module)
    loss, numbers = stage.loss(1)
    assert numbers["sampler_gap"] < 5e-6  # as without adapters, see test_scoring
    drawn = stage._held[0, 1].rollout.drawing.codes
    assert not torch.equal(drawn, plain._hold(1).rollout.drawing.codes)
    assert numbers["kl"] > 0.01
    held = stage._held[0, 1]
    with torch.no_grad():
        torch.testing.assert_close(held.reference, plain.logprob(plain.module, held))
    loss.backward()
    trained = {n for n, p in stage.module.named_parameters() if p.grad is not None}
    assert trained and all(map(is_adapter, trained))


@pytest.mark.parametrize("also, ema", [((), None), (("text_head",), 0.9)])
def test_a_run_on_adapters_resumes(
    lora_loop, pmtp_run, small_world, tmp_path, also: tuple[str, ...], ema: float | None
) -> None:
    """From a state that holds what is trained; or everything, as in older versions."""
    loop = dataclasses.replace(
        lora_loop, steps=4, eval_every=4, save_every=2, lora_also=also, ema=ema
    )

    class Stopping(PMTPStage):
        def loss(self, step: int):
            if step == self.stop_at:
                raise KeyboardInterrupt
            return super().loss(step)

    def build(stop_at: int) -> PMTPStage:
        stage = pmtp(loop, pmtp_run)
        stage.__class__, stage.stop_at = Stopping, stop_at
        return stage

    run(build(-1), loop, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(build(3), loop, tmp_path / "broken")
    shutil.copytree(tmp_path / "broken", tmp_path / "old")
    state = load_state(tmp_path / "old" / "state.pt")
    state["module"] = build(-1).module.state_dict() | state["module"]
    save_state(tmp_path / "old" / "state.pt", state)
    whole = load_state(tmp_path / "whole" / "state.pt")["module"]
    assert {n for n in whole if not is_adapter(n)} == {f"{part}.weight" for part in also}
    model = Engine.from_pretrained(tmp_path / "whole" / "model").transformer.state_dict()
    for name in ("broken", "old"):
        run(build(-1), loop, tmp_path / name, resume=True)
        found = load_state(tmp_path / name / "state.pt")["module"]
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[n], w) for n, w in whole.items())
        exported = Engine.from_pretrained(tmp_path / name / "model").transformer.state_dict()
        assert all(torch.equal(exported[n], w) for n, w in model.items())


def test_files_hold_the_adapters_alone(tmp_path, rl_stage, pmtp_run) -> None:
    """As do the best weights, which are put beside the base to be exported, and a dump."""
    plain = rl_stage(wild=False, force=True)
    loop = dataclasses.replace(plain.config.loop, lora=1, steps=3, eval_every=1, save_every=3)
    config = dataclasses.replace(plain.config, loop=loop, beta=0.0, export="best")

    def build() -> CycleRLStage:
        stage = CycleRLStage(config, load_start(pmtp_run, "djo", any_stage=True))
        validated = iter((1.5, 2.0, 1.0, 0.0))
        stage.evaluate = lambda: {"cycle_iou": next(validated)}
        return stage

    stage = build()
    run(stage, loop, tmp_path / "run")
    names = ("state.pt", "best.pt")
    files = {name: load_state(tmp_path / "run" / name)["module"] for name in names}
    base = sum(p.numel() for n, p in stage.module.named_parameters() if not is_adapter(n))
    for held in files.values():
        assert held and all(map(is_adapter, held))
        assert sum(w.numel() for w in held.values()) < 0.05 * base
    a = next(iter(files["best.pt"]))
    assert not torch.equal(files["best.pt"][a], files["state.pt"][a])
    assert torch.equal(stage.module.state_dict()[a], files["best.pt"][a])

    broken = build()
    loss = broken.loss
    broken.loss = lambda step: (loss(step)[0] * float("nan"), {"loss": float("nan")})
    with pytest.raises(TrainingError, match="dump-step0"):
        run(broken, loop, tmp_path / "broken")
    dump = tmp_path / "broken" / "dump-step0.pt"
    assert all(map(is_adapter, load_state(dump)["module"]))
    again = repeat_dump(build(), loop, dump)
    assert again.same_inputs and not again.broken and not again.weights


def test_adapters_are_not_put_beside_another_base(
    lora_loop, pmtp_run, small_world, tmp_path
) -> None:
    loop = dataclasses.replace(lora_loop, steps=2, eval_every=2, save_every=1)
    run(pmtp(loop, pmtp_run), loop, tmp_path)
    with pytest.raises(StateError, match=r"written by another run \(start \w+ → \w+\)"):
        run(pmtp(loop, tmp_path), loop, tmp_path, resume=True)


def test_the_fingerprint_of_a_start_is_of_all_its_weights(pmtp_run) -> None:
    """Since the weights that are not trained come from it and from nowhere else."""
    start = load_start(pmtp_run, "pmtp")
    model, seen = start.engine.transformer, {start.fingerprint}
    weights = model.state_dict()
    assert weights.keys() >= {n for n, _ in model.named_parameters()}
    for weight in weights.values():
        weight.flatten()[-1] += 1
        seen.add(module_hash(model))
    assert len(seen) == 1 + len(weights)


def test_nonsense_is_refused(loop, pmtp_run, small_world) -> None:
    with pytest.raises(ValueError, match=r"lora = 4 with muon_lr = 0\.004: .* set muon_lr to None"):
        dataclasses.replace(loop, lora=4)
    plain = dataclasses.replace(loop, muon_lr=None)
    with pytest.raises(ValueError, match="lora = -1; it is a rank"):
        dataclasses.replace(plain, lora=-1)
    with pytest.raises(ValueError, match="without lora"):
        dataclasses.replace(plain, lora_also=("text_head",))
    with pytest.raises(ValueError, match="lora_also = 'head'; choose 'text_embedding'"):
        dataclasses.replace(plain, lora=4, lora_also=("head",))
    vq = build_vq(VQConfig(loop=plain, codes=32, latent=32, multipliers=(1, 1, 1, 1)), 32)
    shape = {"width": 32, "heads": 2, "bins": 17}
    fresh = PMTPConfig(loop=dataclasses.replace(plain, lora=4), scenes=24, **shape)
    with pytest.raises(StateError, match="lora = 4 adapts a model that has been trained"):
        PMTPStage(fresh, vq)
