"""One optimizer step: in parts, with blocks run again in backward, averaged, deterministic."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from echogen.engine import model as engine_model
from echogen.engine.config import ModelConfig
from echogen.engine.model import UnifiedTransformer, additive_mask
from echogen.train.config import DJOConfig, LoopConfig, PMTPConfig, VQConfig, to_json
from echogen.train.run.average import Average
from echogen.train.run.checkpoint import load_state
from echogen.train.run.loop import BeginRefused, TrainingError, run
from echogen.train.run.metrics import TIMED
from echogen.train.run.optim import build_optimizers, schedule
from echogen.train.run.update import torch_seed, update
from echogen.train.stages.djo import DJOStage
from echogen.train.stages.pmtp import PMTPStage
from echogen.train.stages.vq import VQStage
from echogen.train.start import load_start

CONFIG = LoopConfig(
    steps=8, lr=1e-2, warmup=2, log_every=1, eval_every=4, save_every=4, threads=1, bf16=False
)


@dataclass(frozen=True)
class ToyConfig:
    loop: LoopConfig
    batch: int = 12


class Toy:
    """A mean over targets, of which the samples have different numbers."""

    name = "toy"

    def __init__(self, config: LoopConfig) -> None:
        torch.manual_seed(0)
        self.config, self.module = ToyConfig(config), nn.Linear(4, 1).double()
        self.drawn: list[float] = []

    def begin(self) -> dict[str, float]:
        return {}

    def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        return self.loss_part(step, 0, 1)

    def loss_part(self, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, Any]]:
        self.drawn.append(float(torch.rand(())))
        g = torch.Generator().manual_seed(step)
        x = torch.randn(12, 4, generator=g, dtype=torch.float64)
        count = torch.randint(0, 9, (12, 1), generator=g)
        here = slice(part, None, parts)
        errors = (self.module(x[here]) - x[here].sum(1, keepdim=True)).square()
        loss = (errors * count[here]).sum() / count.sum()
        return loss, {"loss": float(loss.detach()), "targets": int(count[here].sum())}

    def after_step(self, step: int) -> None:
        pass

    def evaluate(self) -> dict[str, float]:
        return {"weight": float(self.module.weight.detach().sum())}

    def export(self, folder: Path) -> None:
        folder.mkdir()
        torch.save(self.module.state_dict(), folder / "weights.pt")


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [2, 3, 12])
def test_an_accumulated_run_is_the_run_of_whole_batches(tmp_path: Path, accumulate: int) -> None:
    run(Toy(CONFIG), CONFIG, tmp_path / "whole")
    config = replace(CONFIG, accumulate=accumulate)
    run(Toy(config), config, tmp_path / "parts")
    for whole, parts in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert whole.keys() == parts.keys()
        for name in whole.keys() - set(TIMED):
            assert parts[name] == pytest.approx(whole[name], rel=1e-5), name


def test_a_stage_accumulates_to_the_gradients_of_its_batch(
    pmtp_run: Path, loop: LoopConfig, small_world: None
) -> None:
    """Through the loop's own step; what every stage's parts add up to is test_shares.py's."""
    config = replace(loop, bf16=False)
    stage = DJOStage(DJOConfig(loop=config, scenes=24, batch=4), load_start(pmtp_run, "pmtp"))
    wanted = step_of(stage, config)
    found = step_of(stage, replace(config, accumulate=4))
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    for name, grad in wanted[1].items():
        assert float((found[1][name] - grad).norm()) <= 2e-5 * max(1e-3, float(grad.norm())), name


def step_of(stage: Any, config: LoopConfig) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Numbers and gradients of step 1; the rate is 0, so that weights stay."""
    parameters = list(stage.module.parameters())
    optimizers = build_optimizers(stage.module, replace(config, weight_decay=0.0))
    told, _ = update(stage, config, optimizers, parameters, 0.0, 1)
    grads = {n: p.grad.clone() for n, p in stage.module.named_parameters() if p.grad is not None}
    return {k: float(v) for k, v in told.items()}, grads


def test_a_run_may_go_on_in_more_parts(tmp_path: Path) -> None:
    run(Toy(CONFIG), CONFIG, tmp_path / "whole")
    stopped = Toy(CONFIG)
    stopped.after_step = lambda step: interrupt() if step == 5 else None  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(stopped, CONFIG, tmp_path / "parts")
    config = replace(CONFIG, accumulate=3, deterministic=True)
    run(Toy(config), config, tmp_path / "parts", resume=True)
    for whole, parts in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert whole.keys() == parts.keys()
        for name in whole.keys() - set(TIMED):
            assert parts[name] == pytest.approx(whole[name], rel=1e-5), name


def interrupt() -> None:
    raise KeyboardInterrupt


def test_what_cannot_be_split_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = replace(CONFIG, accumulate=5)
    with pytest.raises(BeginRefused, match=r"batch = 12 .* 5 parts"):
        run(Toy(config), config, tmp_path)

    class Whole(Toy):
        loss_part = None  # type: ignore[assignment]

    config = replace(CONFIG, accumulate=2)
    with pytest.raises(BeginRefused, match=r"toy: .* not made of parts; set accumulate to 1"):
        run(Whole(config), config, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="accumulate = 0; it must be at least 1"):
        replace(CONFIG, accumulate=0)


def test_torch_draws_by_step_and_part_whatever_was_drawn_before(tmp_path: Path) -> None:
    config = replace(CONFIG, accumulate=2)
    first, second = Toy(config), Toy(config)
    run(first, config, tmp_path / "a")
    torch.rand(7)
    run(second, config, tmp_path / "b")
    assert first.drawn == second.drawn and len(set(first.drawn)) == 16
    assert torch_seed(0, 1) != torch_seed(1, 0) and torch_seed(0, 1, 0, 2) != torch_seed(0, 1)


# --- activation checkpointing ---------------------------------------------------------------------


@pytest.fixture
def model() -> UnifiedTransformer:
    config = ModelConfig(
        vocab_size=40, codebook_size=30, code_dim=4, width=48, layers=5, heads=3, kv_heads=1,
        head_dim=16, mlp_width=80, head_width=16, aligner_depth=2, pixel_dim=8,
        pixel_aligner_depth=1, rope_theta=1e4, norm_eps=1e-6, image_tokens=9, image_size=24,
        max_positions=64, tied=False,
    )  # fmt: skip
    model = UnifiedTransformer(config)
    model.initialise(0, std=0.2)
    return model


def test_blocks_run_again_give_the_same_gradients_and_keep_less(model: UnifiedTransformer) -> None:
    ids = torch.randint(0, 70, (3, 29), generator=torch.Generator().manual_seed(1))
    mask = additive_mask(torch.ones(1, 29, 29, dtype=torch.bool).tril(), torch.float32)

    def once() -> tuple[Tensor, dict[str, Tensor], int]:
        kept = 0

        def keep(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.numel()
            return x

        model.zero_grad()
        with saved_tensors_hooks(keep, lambda x: x):
            hidden = model(model.embed_mixed(ids), torch.arange(29), mask)
        loss = model.image_head(hidden).square().mean()
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), grads, kept

    plain = once()
    model.checkpointing = True
    again = once()
    assert torch.equal(plain[0], again[0])
    assert plain[1].keys() == again[1].keys()
    assert all(torch.equal(plain[1][n], again[1][n]) for n in plain[1])
    assert again[2] < plain[2] / 4


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_blocks_train_the_same_on_the_operators(
    model: UnifiedTransformer, monkeypatch: pytest.MonkeyPatch, again: bool, bf16: bool
) -> None:
    """As they do on a GPU: in bfloat16 they are no further from float32 than plain torch is."""
    ids = torch.randint(0, 70, (3, 29), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(29).expand(3, 29)
    mask = additive_mask(torch.ones(1, 29, 29, dtype=torch.bool).tril(), torch.float32)
    model.checkpointing, right, called = again, engine_model.swiglu, []

    def gradients(bf16: bool) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = model(model.embed_mixed(ids), positions, mask)
            loss = model.image_head(hidden).float().square().mean()
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def swiglu(gate_up: Tensor) -> Tensor:
        called.append(gate_up.dtype)
        return right(gate_up)

    exact, plain = gradients(False), gradients(bf16)
    monkeypatch.setattr(engine_model, "swiglu", swiglu)
    monkeypatch.setattr(engine_model, "trains_fused", lambda x: torch.is_grad_enabled())
    found = gradients(bf16)
    assert called == [torch.bfloat16 if bf16 else torch.float32] * len(called)
    assert len(called) == len(model.blocks) * (2 if again else 1)
    assert found.keys() == exact.keys()
    for name, true in exact.items():
        off, plainly = ((g[name] - true).norm() / true.norm() for g in (found, plain))
        assert off <= max(1e-5, 1.3 * plainly), name


@pytest.mark.parametrize("stage", ["pmtp", "djo", "djo frozen", "djo sampled", "cycle-rl"])
def test_every_stage_trains_the_same_with_blocks_run_again(
    stage: str, pmtp_run: Path, loop: LoopConfig, small_world: None, rl_stage: Callable[..., Any]
) -> None:
    config = replace(loop, bf16=False)

    def built() -> Any:
        if stage == "pmtp":
            shape = {"scenes": 24, "batch": 3}
            return PMTPStage(PMTPConfig(loop=config, **shape), load_start(pmtp_run, "pmtp"))
        if stage == "cycle-rl":
            return rl_stage()
        settings: dict[str, Any] = {"freeze_grounder": stage == "djo frozen"}
        settings["prefix"] = "sampled" if stage == "djo sampled" else "teacher"
        djo = DJOConfig(loop=config, scenes=24, batch=3, prompt_dropout=0.0, **settings)
        return DJOStage(djo, load_start(pmtp_run, "pmtp"))

    plain, again = built(), built()
    again.module.checkpointing = True
    wanted, found = step_of(plain, config), step_of(again, config)
    assert wanted[0] == found[0]
    assert wanted[1].keys() == found[1].keys()
    assert all(torch.equal(wanted[1][n], found[1][n]) for n in wanted[1])


def test_checkpointing_is_refused_where_there_are_no_blocks(
    tmp_path: Path, loop: LoopConfig, small_world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echogen.train.stages.vq.VAL_SCENES", 2)
    config = replace(loop, checkpoint_activations=True, muon_lr=None)
    vq = VQConfig(loop=config, codes=32, latent=32, multipliers=(1, 1, 1, 1), batch=2)
    with pytest.raises(BeginRefused, match="vq: checkpoint_activations, but its module has no dec"):
        run(VQStage(vq, 32), config, tmp_path)


# --- the average of the weights -------------------------------------------------------------------


def test_the_average_is_what_is_validated_and_exported(tmp_path: Path) -> None:
    config = replace(CONFIG, ema=0.5, eval_every=1)
    stage = Toy(config)
    weights: list[Tensor] = []
    stage.after_step = lambda step: weights.append(  # type: ignore[method-assign]
        stage.module.weight.detach().clone()
    )
    begun = stage.module.weight.detach().clone()
    run(stage, config, tmp_path)
    mean, means = begun, []
    for n, weight in enumerate(weights, 1):
        decay = min(0.5, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * weight
        means.append(float(mean.sum()))
    seen = [row["val_weight"] for row in rows(tmp_path) if "val_weight" in row]
    assert seen == pytest.approx(means, rel=1e-5)
    exported = torch.load(tmp_path / "model" / "weights.pt")["weight"]
    assert torch.allclose(exported, mean) and not torch.allclose(exported, weights[-1])
    state = load_state(tmp_path / "state.pt")
    assert torch.equal(state["module"]["weight"], weights[-1])  # training goes on from these
    assert torch.allclose(state["average"]["weight"], mean)


def test_weights_come_back_from_behind_their_average_bit_by_bit() -> None:
    module = nn.Linear(3, 3)
    average = Average(module, 0.9)
    with torch.no_grad():
        module.weight.add_(1)
    before = module.weight.detach().clone()
    average.update(1)
    with pytest.raises(KeyError), average.in_place():
        assert not torch.equal(module.weight, before)
        raise KeyError
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("ema", [0.0, 1.0, -1.0, float("nan")])
def test_an_average_of_nothing_is_refused(ema: float) -> None:
    with pytest.raises(ValueError, match="it must lie between 0 and 1"):
        replace(CONFIG, ema=ema)


# --- determinism, schedules, settings -------------------------------------------------------------


def test_deterministic_is_asked_of_torch_and_a_refusal_names_the_setting(tmp_path: Path) -> None:
    class Undetermined(Toy):
        def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
            if step == 1:
                raise RuntimeError(
                    "cumsum_cuda does not have a deterministic implementation, but you set "
                    "'torch.use_deterministic_algorithms(True)'. You can turn off …"
                )
            asked.append(torch.are_deterministic_algorithms_enabled())
            return super().loss(step)

    asked: list[bool] = []
    config = replace(CONFIG, deterministic=True)
    message = r"step 1 .* \(cumsum_cuda does not have a deterministic implementation\); leave"
    with pytest.raises(TrainingError, match=message):
        run(Undetermined(config), config, tmp_path)
    assert asked == [True] and not torch.are_deterministic_algorithms_enabled()


def test_a_rate_falls_along_a_cosine() -> None:
    config = LoopConfig(steps=100, lr=1.0, warmup=10, decay=0.5, decay_shape="cosine")
    values = [schedule(step, config) for step in range(100)]
    assert values[9:51] == [1.0] * 42
    assert values[75] == pytest.approx(0.5)
    assert values[99] == pytest.approx(0.0009866, rel=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(values[50:]))
    with pytest.raises(ValueError, match="decay_shape = 'steps'; choose 'linear' or 'cosine'"):
        replace(config, decay_shape="steps")


def test_settings_that_came_later_do_not_make_a_recorded_run_another_one() -> None:
    old = to_json(ToyConfig(CONFIG))["loop"]
    assert "ema" not in old and old["clip"] == 1.0
    assert old.keys() < dataclasses.asdict(CONFIG).keys()
    new = to_json(ToyConfig(replace(CONFIG, ema=0.9, accumulate=2)))["loop"]
    assert new == old | {"ema": 0.9, "accumulate": 2}
