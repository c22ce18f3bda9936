"""The stages' benchmark: complete, its shares sum to one, its passes are counted."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from echogen.bench.profile import subjects
from echogen.bench.speed import train
from echogen.engine.config import ModelConfig
from echogen.engine.model import UnifiedTransformer
from echogen.engine.ranges import span
from echogen.train.config import CycleRLConfig, DJOConfig, LoopConfig, PMTPConfig, Recipe, VQConfig
from echogen.train.recipes import RECIPES, janus_pro_1b, small
from echogen.train.run.stop import Stop
from echogen.train.stages.vq import build_vq
from echogen.train.tokenizer import train_tokenizer

LOOP = LoopConfig(steps=9, lr=1e-3, bf16=False, accumulate=2, checkpoint_activations=True)
MICRO = Recipe(
    name="micro",
    vq=VQConfig(loop=LOOP, codes=32, latent=32, multipliers=(1, 1, 1, 1)),
    pmtp=PMTPConfig(loop=LOOP, width=32, layers=2, heads=2, mlp_width=64, bins=17, batch=4),
    pmtp_on=PMTPConfig(loop=LOOP),
    djo=DJOConfig(loop=LOOP, batch=6),
    cycle_rl=CycleRLConfig(loop=LOOP, batch=2, group=2),
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Scenes and codes of these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECHOGEN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(
    ("stage", "float32"), [*((name, False) for name in train.STAGES), ("pmtp", True)]
)
def test_run(stage, float32):
    seen = []
    result = train.run(
        stage, batch=2, repeats=1, float32=float32, progress=lambda *done: seen.append(done)
    )
    assert result["dtype"] == ("float32" if float32 else "bfloat16")
    assert json.loads(json.dumps(result)) == result and seen == [(1, 1)]
    assert result["images"] == (16 if stage == "cycle-rl" else 2)
    assert result["images_per_s"] == pytest.approx(result["images"] / result["ms_per_step"] * 1e3)
    assert result["tokens_per_s"] > 0 and 0 < result["utilisation"] < 1
    assert result["peak_mib"] > 100
    assert sum(result["shares"].values()) == pytest.approx(1)
    wanted = {"data", "forward", "backward", "optimizer"}
    wanted |= {"rollout", "reward"} if stage == "cycle-rl" else set()
    assert {f"train/{stage}/{part}" for part in wanted} | {train.PASS} <= result["shares"].keys()
    phases = result["phases"]
    assert sum(phases.values()) == pytest.approx(1)
    parts = {"rollout", "grounding", "reward", "update"} if stage == "cycle-rl" else wanted
    assert phases.keys() == parts | {"rest"} and min(phases.values()) >= 0
    if stage == "cycle-rl":  # what runs in the engine has its share here
        inside = sum(v for k, v in result["shares"].items() if k.startswith("engine/ground"))
        assert phases["grounding"] == pytest.approx(inside, rel=0.01)
        assert phases["rollout"] > 5 * result["shares"]["train/cycle-rl/rollout"]


def test_a_moment_counts_for_the_phase_it_lies_in():
    now = iter(range(100))
    watch = train.Phases(train.PHASES["cycle-rl"], lambda: float(next(now)))
    watch.start()
    with train.listening(watch):
        with span("train/cycle-rl/forward"):  # from 1 to 14
            with span("train/cycle-rl/rollout"):  # from 2 to 11
                with span("engine/decode/step"):
                    pass
                with span("engine/ground"), span("engine/ground/step"):  # from 5 to 8
                    pass
                with span("train/cycle-rl/reward"):  # from 9 to 10
                    pass
            with span("train/pass"):
                pass
        assert watch.stop() == 15
    found = {row.category: row.seconds for row in watch.ranked}
    assert found.pop("rollout") == 9 - 3 - 1
    assert (found.pop("grounding"), found.pop("reward"), found.pop("update")) == (3, 1, 4)
    assert list(found.values()) == [2]


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="stage vq: unknown; choose pmtp, djo, cycle-rl"):
        train.run("vq")


def micro(stage: str, **how):
    """A stage of MICRO, timed."""
    return train.run(stage, repeats=2, recipe=MICRO, **how)


@pytest.fixture
def macos(monkeypatch):
    """A system that tells memory in bytes: 300 MiB."""
    monkeypatch.setattr("echogen.train.run.progress.sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=300 << 20))


@pytest.mark.parametrize(("stage", "images"), [("pmtp", 4), ("djo", 6), ("cycle-rl", 4)])
def test_any_recipe_from_fresh_weights(macos, stage, images):
    result = micro(stage)
    assert (result["recipe"], result["model"], result["images"]) == ("micro", "random", images)
    assert result["batch"] == getattr(MICRO, stage.replace("-", "_")).batch
    assert result["peak_mib"] == 300
    assert 0 <= result["padding"] < 1 and 0 < result["utilisation"] < 1
    assert sum(result["shares"].values()) == pytest.approx(1)


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_step_is_the_recipes(stage):
    """Shapes, parts and checkpointing are those of the recipe, and the weights move."""
    asked = subjects.Asked(subjects.FRESH, batch=2, recipe=MICRO)
    work, subject, _ = subjects.training(stage, asked)
    c = subject.module.config
    assert (c.width, c.layers, c.heads, c.mlp_width) == (32, 2, 2, 64)
    assert (c.image_tokens, c.codebook_size) == (64, 32) and subject.module.checkpointing
    seen = train.Passes()
    before = {name: p.detach().clone() for name, p in subject.module.named_parameters()}
    with train.listening(seen):
        work()
    assert any(not torch.equal(p, before[n]) for n, p in subject.module.named_parameters())
    assert seen.trained > 0 and (seen.read > 0) == (stage == "cycle-rl")  # beta > 0: a reference


def test_tokens_are_counted_without_padding():
    asked = subjects.Asked(subjects.FRESH, batch=4, recipe=MICRO)
    _, subject, packed = subjects.training("pmtp", asked)
    batches = [subject.batch(step) for step in range(3)]
    assert packed.tokens == sum(int((b.tree >= 0).sum()) for b in batches)
    assert packed.places == sum(b.tree.numel() for b in batches)
    assert packed.padding == pytest.approx(1 - packed.tokens / packed.places)
    packed.clear()
    assert packed.tokens == packed.places == 0


def test_operations_count_a_backward_where_there_is_one():
    passes = train.Passes()
    passes.begin("train/pmtp/data", {"step": 1})
    passes.begin(train.PASS, {"rows": 1, "tokens": 10})
    with torch.no_grad():
        passes.begin(train.PASS, {"rows": 1, "tokens": 100})
    assert (passes.trained, passes.read, passes.tokens) == (10, 100, 110)
    config = shapes(small()).config
    body = 12 * (4 * 512 * 512 + 3 * 512 * 1408)
    assert train.needed(config, passes) == body * (6 * 10 + 2 * 100)


def shapes(recipe: Recipe):
    """A transformer of a recipe on the meta device, which holds shapes and no numbers."""
    tokenizer = train_tokenizer(["a red circle"], recipe.pmtp.bins)
    with torch.device("meta"):
        vq = build_vq(recipe.vq, recipe.pmtp.width)
        janus = subjects.fresh_config(recipe, vq, tokenizer)
        return UnifiedTransformer(ModelConfig.from_janus(janus))


def test_janus_has_the_checkpoints_shapes():
    model = shapes(janus_pro_1b())
    c = model.config
    assert (c.vocab_size, c.codebook_size, c.image_tokens) == (102_400, 16_384, 576)
    assert (c.width, c.layers, c.heads, c.mlp_width) == (2048, 24, 16, 5632)
    assert 1.68e9 < sum(p.numel() for p in model.parameters()) < 1.75e9


@pytest.mark.parametrize(
    ("name", "stage"), [("small", "pmtp"), *(("janus_pro_1b", stage) for stage in train.STAGES)]
)
def test_large_recipes_shrunk(name, stage):
    """Everything of a recipe but its sizes."""
    recipe = RECIPES[name]()
    pmtp = replace(recipe.pmtp, width=32, layers=1, heads=2, mlp_width=48)
    recipe = replace(recipe, vq=MICRO.vq, pmtp=pmtp)
    parts = getattr(recipe, stage.replace("-", "_")).loop.accumulate
    result = train.run(stage, batch=parts, repeats=1, float32=True, recipe=recipe)
    assert result["model"] == "random" and result["recipe"] == name
    assert result["images"] == parts * (8 if stage == "cycle-rl" else 1)


def test_an_interrupt_keeps_what_was_measured():
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        os.kill(os.getpid(), signal.SIGINT)

    result = train.run("pmtp", repeats=9, recipe=MICRO, progress=progress)
    assert seen == [1] and result["interrupted"] and result["shares"] == result["phases"] == {}
    assert result["ms_per_step"] == result["ms_per_step_q80"] > 0
    assert result["tokens_per_s"] > 0 and 0 < result["utilisation"] < 1


def test_a_batch_comes_in_the_recipes_parts():
    with pytest.raises(train.BatchError, match="batch 3: recipe micro takes a step in 2 parts"):
        micro("djo", batch=3)


def test_a_gpu_is_waited_for_at_both_ends_only(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(log)
            log.append("mark")

        def elapsed_time(self, other):
            assert log[-1] == "wait"  # they have passed
            return 1000.0 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    times, whole = train.timed(lambda: log.append("step"), 2, "cuda", lambda *done: None, Stop())
    assert log == ["wait", "mark", "step", "mark", "step", "mark", "wait"]
    assert times == [2.0, 2.0] and whole > 0


@pytest.mark.parametrize(("device", "steps"), [("cpu", 1), ("cuda", 3)])
def test_steps_to_warm(device, steps):
    assert subjects.steps_to_warm(device) == steps
