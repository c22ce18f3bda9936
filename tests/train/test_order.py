"""The order of the training samples: epochs miss and repeat none, and follow from seed and step."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echogen.train.config import CycleRLConfig, DJOConfig, LoopConfig, PMTPConfig
from echogen.train.stages import keys, order
from echogen.train.stages.cycle_rl import CycleRLStage
from echogen.train.stages.djo import DJOStage
from echogen.train.stages.order import picked
from echogen.train.stages.pmtp import PMTPStage
from echogen.train.stages.world import ask
from echogen.train.start import load_start

LOOP = LoopConfig(steps=100, lr=1e-3, seed=3)


def batches(
    count: int, size: int, steps: range, seed: int = 3, use: int = keys.DJO_ORDER
) -> list[list[int]]:
    """Places of the samples in a run's batches."""
    config = DJOConfig(loop=dataclasses.replace(LOOP, seed=seed))
    rng = np.random.default_rng(0)
    return [picked(range(count), size, step, config, use, rng) for step in steps]


def flat(found: list[list[int]]) -> list[int]:
    return [place for batch in found for place in batch]


# The last two: an epoch ends within a batch, and a batch is larger than the set.
@pytest.mark.parametrize(("count", "size"), [(12, 4), (5, 1), (10, 4), (3, 8)])
def test_each_epoch_has_each_sample_once(count: int, size: int) -> None:
    found = batches(count, size, range(2 * count))
    assert all(len(batch) == size for batch in found)
    every = flat(found)
    epochs = [every[i : i + count] for i in range(0, len(every), count)]
    assert len(epochs) == 2 * size
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count >= 10:
        assert len(set(map(tuple, epochs))) == len(epochs), "each in an order of its own"


def test_a_batch_follows_from_its_step_alone() -> None:
    every = batches(10, 4, range(25))
    order._shuffled.cache_clear()  # as in a process that resumes the run
    assert batches(10, 4, range(17, 18)) == [every[17]]
    assert batches(10, 4, range(24, -1, -1)) == every[::-1]


def test_seeds_and_stages_have_orders_of_their_own() -> None:
    uses = (keys.PMTP_ORDER, keys.DJO_ORDER, keys.RL_ORDER)
    found = [tuple(flat(batches(50, 50, range(2), s, u))) for s in (0, 1) for u in uses]
    assert len(set(found)) == len(found)


def test_a_large_set_is_not_put_in_order_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    generator = keys.generator

    def counted(seed: int, use: int, epoch: int) -> np.random.Generator:
        made.append(epoch)
        return generator(seed, use, epoch)

    order._shuffled.cache_clear()
    monkeypatch.setattr(keys, "generator", counted)
    for _ in range(2):  # a batch is made once for its part, and once for the whole batch's counts
        batches(103, 10, range(10, 11))
    batches(103, 10, range(11, 20))
    assert made == [0, 1]


def test_epochs_leave_the_randomness_of_the_batch_alone() -> None:
    rng = np.random.default_rng(0)
    picked(range(10), 4, 2, DJOConfig(loop=LOOP), keys.DJO_ORDER, rng)
    assert rng.integers(1 << 40) == np.random.default_rng(0).integers(1 << 40)


@pytest.mark.parametrize("kind", [PMTPConfig, DJOConfig, CycleRLConfig])
def test_another_order_is_refused(kind: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="order = 'shuffled'; choose 'epochs' or 'independent'"):
        kind(loop=LOOP, order="shuffled")


# --- the stages -----------------------------------------------------------------------------------


@pytest.fixture
def stage(pmtp_run: Path, small_world: None, rl_stage, tmp_path: Path) -> Callable[..., Any]:
    """``stage(name, order)``: one that learns from 24 samples, or from 5 layouts of a file."""

    def build(name: str, order: str) -> PMTPStage | DJOStage | CycleRLStage:
        if name == "pmtp":
            config = PMTPConfig(loop=LOOP, scenes=24, batch=6, extra_grounding=2, order=order)
            return PMTPStage(config, load_start(pmtp_run, "pmtp"))
        if name == "djo":
            config = DJOConfig(loop=LOOP, scenes=24, batch=8, order=order)
            return DJOStage(config, load_start(pmtp_run, "pmtp"))
        if name == "real":
            return rl_stage(batch=8, order=order)
        lines = [
            {"caption": f"{i}", "objects": [{"expr": "it", "box": [0, 0, 1, 1]}]} for i in range(5)
        ]
        (tmp_path / "layouts.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return rl_stage(batch=2, order=order, layouts=str(tmp_path / "layouts.jsonl"))

    return build


def seen(stage: Any, step: int) -> list[str]:
    """The samples of a step, each by something of its own."""
    if isinstance(stage, PMTPStage):
        return [repr((t.sample.caption, t.sample.boxes)) for t in stage.tasks(step)]
    if isinstance(stage, DJOStage):
        return [repr((e.sample.caption, e.sample.boxes)) for e in stage.examples(step)]
    if stage.config.layouts == "real":
        return [repr(scene) for scene in stage.scenes(step)]
    return [y.caption for y in stage.layouts(step)]


@pytest.mark.parametrize("name", ["pmtp", "djo", "real", "file"])
def test_a_stage_sees_each_of_its_samples_once_an_epoch(stage, name: str) -> None:
    built = stage(name, "epochs")
    steps = 5 if name == "file" else 3
    first, second = (Counter(flat([seen(built, k + i * steps) for k in range(steps)]))
                     for i in range(2))  # fmt: skip
    assert first == second
    assert sorted(first.values()) == ([2] * 5 if name == "file" else [1] * 24)
    assert seen(built, 0) != seen(built, steps)
    assert seen(stage(name, "epochs"), 4) == seen(built, 4)


def test_independent_choices_are_those_of_recorded_runs(stage) -> None:
    """Bit by bit: the numbers of a batch's generator are its samples first, then all the rest."""
    pmtp, djo, real, file = (stage(n, "independent") for n in ("pmtp", "djo", "real", "file"))
    for step in (0, 5):
        rng = np.random.default_rng((LOOP.seed, 3, step))
        samples = [pmtp._train[i] for i in rng.integers(24, size=8)]
        draws = [(s.layout(rng), rng.random() < 0.1) for s in samples[:6]]
        tasks = pmtp.tasks(step)
        assert [t.draw and tuple(t.draw) for t in tasks] == [*draws, None, None]
        assert [t.questions for t in tasks] == [ask(s, 6, rng) for s in samples]

        rng = np.random.default_rng((LOOP.seed, 5, step))
        samples = [djo._train[i] for i in rng.integers(24, size=8)]
        layouts = [s.layout(rng) for s in samples]
        kept = (rng.random(8) >= 0.1).tolist()
        examples = djo.examples(step)
        assert [(e.layout, e.kept) for e in examples] == list(zip(layouts, kept, strict=True))
        assert [e.questions for e in examples] == [ask(s, 6, rng) for s in samples]

        rng = np.random.default_rng((real.config.loop.seed, 7, step))
        scenes = [real._scenes[i] for i in rng.integers(24, size=8)]
        assert real.scenes(step) == scenes
        assert real.layouts(step) == [scene.layout(rng) for scene in scenes]

        rng = np.random.default_rng((file.config.loop.seed, 7, step))
        assert file.layouts(step) == [file._read[i] for i in rng.integers(5, size=2)]
