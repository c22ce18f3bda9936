"""Every experiment in one place: the training runs, and the tables that read them.

A cell is one training run (one arm of a table at one seed) with its evaluation. There are five
tables: ablation, plateau, mask, synergy, RL data. A cell may serve several of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from echogen.train.config import CycleRLConfig, DJOConfig, PMTPConfig, Recipe

START = "(start)"
"""The start of a cell that follows no other cell: the given model of stage 1."""
FRESH = "(fresh weights)"
"""Fresh weights, with the image tokenizer of the given model."""
LLM_LAYOUTS = "(file of LLM-written layouts)"
THREADS = 1  # so two cells run side by side on two cores, and CPU seconds measure compute

DRAWINGS = 8
"""Drawings of each test layout. With 400 layouts drawn once at T = 1, noise alone varies AP by
0.006 to 0.010 (standard deviation of the eight in the records of `plateau-stage1`), which is as
much as the arms of a seed differ by. The mean of eight drawings varies by a third of that."""
EARLIER = {"tiny": ("ablation", "mask", "synergy", "rl-data")}
"""The tables of a recipe that were run before this was known, with one drawing of each layout."""
THEN: dict[str, Any] = {"importance_cap": None, "val_drawings": 1, "advantage": "grpo"}
"""Settings of Cycle RL in these tables that differ from today's recipe; in float32 the importance
weights are 1."""

Stage = Literal["none", "pmtp", "djo", "cycle-rl"]
Task = Literal["both", "l2i", "i2l"]
Config = PMTPConfig | DJOConfig | CycleRLConfig

STARTS = {"tiny": "tiny-stage1"}
"""The bundled stage 1 model of each recipe that has one."""

# A step of the recipe `tiny` takes 0.85 s in pmtp, 1.17 s in djo and about 2.2 s in cycle-rl
# (OMP_NUM_THREADS=1 echogen bench train --stage S --batch 32 (cycle-rl: 8), two cores, the other
# one busy), so 31, 10 and 26 minutes of training were expected. The records show 27 to 86, 9 to 75
# and 82 to 131 minutes: the cores also did other work, and some runs multiplied in float32.
STEPS: dict[str, dict[str, int]] = {"tiny": {"pmtp": 2200, "djo": 500, "cycle-rl": 700}}
"""Steps per stage that replace a recipe's own, which are meant for models to keep."""


@dataclass(frozen=True)
class Cell:
    """One training run with its evaluation.

    Attributes:
        stem: table and arm in one word; the cell's name is the stem and the seed.
        arm: the arm in words.
        seed: of batches, noise and evaluation.
        stage: the stage to train; "none": the start itself is evaluated.
        start: name of another cell, START or FRESH.
        changes: settings that differ from the recipe's, by name: fields of the stage's
            configuration, and its loop's steps, lr and muon_lr.
        task: what is learnt; "l2i" or "i2l" alone only in the stage `pmtp`.
        budget: cells whose total training seconds this one spends (``changes`` then sets no number
            of steps).
        pace: the cell whose seconds per step convert the budget into steps (see `records.pace`).
        chosen_as_rl: whether its checkpoint is chosen as Cycle RL's is, by the same number of
            drawings at T = 1; otherwise as its stage chooses.
    """

    stem: str
    arm: str
    seed: int
    stage: Stage
    start: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    task: Task = "both"
    budget: tuple[str, ...] = ()
    pace: str = ""
    chosen_as_rl: bool = False

    @property
    def name(self) -> str:
        """The base name of its files."""
        return f"{self.stem}-seed{self.seed}"

    @property
    def table(self) -> str:
        """The table that it was made for."""
        return next(t for t, stems in ROWS.items() if self.stem in stems)

    @property
    def parent(self) -> str | None:
        """The cell whose model it starts from."""
        return None if self.start in (START, FRESH) else self.start

    @property
    def needs(self) -> tuple[str, ...]:
        """Every cell that must be finished first."""
        named = (self.parent, *self.budget, self.pace)
        return tuple(dict.fromkeys(name for name in named if name))


# The rows of each table, in order; the same cell may be in two tables.
ROWS: dict[str, tuple[str, ...]] = {
    "ablation": (
        "ablation-stage1",
        "ablation-stage2",
        "ablation-stage3",
        "ablation-samples",
        "ablation-seconds2",
        "ablation-seconds3",
    ),
    "plateau": (
        "plateau-stage1",
        "plateau-stage2",
        "plateau-stage3",
        "plateau-slow",
        "plateau-samples",
        "plateau-seconds3",
    ),
    "mask": ("mask-isolated", "mask-shared"),
    "synergy": ("synergy-l2i", "synergy-i2l", "mask-isolated"),
    "rl-data": ("ablation-stage2", "ablation-stage3", "rl-data-random", "rl-data-llm"),
}
RENAMED = {
    ("synergy", "mask-isolated"): "both",
    ("rl-data", "ablation-stage2"): "the start (+ stage 2)",
    ("rl-data", "ablation-stage3"): "real layouts",
}
"""The name of a shared cell in a table that it was not made for."""

# The comparisons of each table: the first arm minus the second, seed by seed.
COMPARED: dict[str, tuple[tuple[str, str], ...]] = {
    "ablation": (
        ("ablation-stage2", "ablation-stage1"),
        ("ablation-stage2", "ablation-samples"),
        ("ablation-stage2", "ablation-seconds2"),
        ("ablation-stage3", "ablation-stage2"),
        ("ablation-stage3", "ablation-samples"),
        ("ablation-stage3", "ablation-seconds3"),
    ),
    "plateau": (
        ("plateau-stage2", "plateau-stage1"),
        ("plateau-stage2", "plateau-samples"),
        ("plateau-stage3", "plateau-stage2"),
        ("plateau-stage3", "plateau-stage1"),
        ("plateau-stage3", "plateau-samples"),
        ("plateau-stage3", "plateau-seconds3"),
        ("plateau-slow", "plateau-stage3"),
        ("plateau-slow", "plateau-stage2"),
        ("plateau-slow", "plateau-stage1"),
        ("plateau-slow", "plateau-samples"),
    ),
    "mask": (("mask-shared", "mask-isolated"),),
    "synergy": (("mask-isolated", "synergy-l2i"), ("mask-isolated", "synergy-i2l")),
    "rl-data": (
        ("ablation-stage3", "ablation-stage2"),
        ("rl-data-random", "ablation-stage2"),
        ("rl-data-random", "ablation-stage3"),
        ("rl-data-llm", "ablation-stage3"),
    ),
}


def cells(seeds: Iterable[int]) -> dict[str, Cell]:
    """Return all cells by name, in running order: table by table and, within a table, seed by seed,
    so that an early stop leaves whole tables with fewer seeds."""
    seeds = tuple(seeds)
    parts = (_ablation, _plateau, _mask, _synergy, _rl_data)
    return {cell.name: cell for part in parts for seed in seeds for cell in part(seed)}


# Stage 2 without its loop has stage 1's loss, so this continues stage 1 on the same batches as the
# arm with the loop, with the same schedule and optimizer.
CONTINUED = {"loop_weight": 0.0}


def _ablation(seed: int) -> list[Cell]:
    stem = "ablation-{}".format
    two, three, samples = (f"{stem(arm)}-seed{seed}" for arm in ("stage2", "stage3", "samples"))
    return [
        Cell(stem("stage1"), "stage 1", seed, "none", START),
        Cell(stem("stage2"), "+ stage 2", seed, "djo", START),
        Cell(stem("stage3"), "+ stage 3", seed, "cycle-rl", two),
        Cell(stem("samples"), "stage 1, samples of + stage 2", seed, "djo", START, CONTINUED),
        Cell(stem("seconds2"), "stage 1, seconds of + stage 2", seed, "djo", START, CONTINUED,
             budget=(two,), pace=samples),
        Cell(stem("seconds3"), "stage 1, seconds of + stages 2 and 3", seed, "djo", START,
             CONTINUED, budget=(two, three), pace=samples),
    ]  # fmt: skip


# In `tiny`, stage 3's weights are chosen by eight drawings of each validation layout at T = 1;
# those of stages 1 and 2 by one drawing of a quarter of the layouts at T = 0.7, which is mostly
# noise. The arm that stage 3 must beat for equal seconds gets the better choice too.
#
# In `plateau-stage3` the validation loss of true images rises from 0.50 to 0.54 or more by the
# first evaluation: most of each step is noise. `plateau-slow` has a quarter of its rates and 500
# steps.
def _plateau(seed: int) -> list[Cell]:
    stem, begun = "plateau-{}".format, f"ablation-seconds3-seed{seed}"
    two, three, samples = (f"{stem(arm)}-seed{seed}" for arm in ("stage2", "stage3", "samples"))
    return [
        Cell(stem("stage1"), "stage 1 at its plateau", seed, "none", begun),
        Cell(stem("stage2"), "+ stage 2", seed, "djo", begun),
        Cell(stem("stage3"), "+ stage 3, by ranks", seed, "cycle-rl", two, {"advantage": "rank"}),
        Cell(stem("slow"), "+ stage 3, a quarter of the rates, 500 steps", seed, "cycle-rl", two,
             {"advantage": "rank", "lr": 5e-6, "muon_lr": 2.5e-5, "steps": 500}),
        Cell(stem("samples"), "stage 1, samples of + stage 2", seed, "djo", begun, CONTINUED),
        Cell(stem("seconds3"), "stage 1, seconds of + stages 2 and 3", seed, "djo", begun,
             CONTINUED, budget=(two, three), pace=samples, chosen_as_rl=True),
    ]  # fmt: skip


def _mask(seed: int) -> list[Cell]:
    return [
        Cell("mask-isolated", "isolated", seed, "pmtp", FRESH),
        Cell("mask-shared", "shared", seed, "pmtp", FRESH, {"mask": "shared"}),
    ]


def _synergy(seed: int) -> list[Cell]:
    return [
        Cell("synergy-l2i", "L2I alone", seed, "pmtp", FRESH, task="l2i"),
        Cell("synergy-i2l", "I2L alone", seed, "pmtp", FRESH, task="i2l"),
    ]


def _rl_data(seed: int) -> list[Cell]:
    two = f"ablation-stage2-seed{seed}"
    return [
        Cell("rl-data-random", "random layouts", seed, "cycle-rl", two, {"layouts": "random"}),
        Cell("rl-data-llm", "LLM-written layouts", seed, "cycle-rl", two,
             {"layouts": LLM_LAYOUTS}),
    ]  # fmt: skip


def settings(cell: Cell, recipe: Recipe, scale: float = 1.0, steps: int | None = None) -> Config:
    """Return the full configuration of a cell's stage.

    Args:
        scale: scales steps and scenes, for trials. Below 1, Cycle RL also starts however little its
            reward agrees with the judge, since a few groups cannot measure that.
        steps: replaces the steps of ``STEPS`` or the recipe, unscaled (for a cell with a budget).
    """
    base: Config = getattr(recipe, cell.stage.replace("-", "_"))
    changed = dict(cell.changes)
    usual = STEPS.get(recipe.name, {}).get(cell.stage, base.loop.steps)
    planned = changed.pop("steps", usual)
    wanted = steps or max(2, round(planned * scale))
    quarter = max(1, wanted // 4)
    loop = replace(
        base.loop,
        steps=wanted,
        warmup=min(base.loop.warmup, max(1, wanted // 10)),
        log_every=min(base.loop.log_every, quarter),
        eval_every=quarter,
        save_every=min(base.loop.save_every, quarter),
        threads=THREADS,
        seed=cell.seed,
        **{name: changed.pop(name) for name in ("lr", "muon_lr") if name in changed},
    )
    changes = {"loop": loop, "scenes": scaled(base.scenes, scale, 24), **changed}
    if isinstance(base, CycleRLConfig) and cell.table in EARLIER.get(recipe.name, ()):
        changes = THEN | changes
    if scale < 1 and isinstance(base, CycleRLConfig):
        changes |= {"gate_scenes": scaled(base.gate_scenes, scale, 2), "force": True}
    return replace(base, **changes)


def scaled(count: int, scale: float, least: int) -> int:
    """Scale a number of scenes or layouts, but keep the ``least`` that an evaluation needs."""
    return count if scale == 1 else max(least, round(count * scale))


def samples(config: Config) -> tuple[int, int]:
    """Return (real images trained on, images drawn and reinforced) for a whole run."""
    if isinstance(config, CycleRLConfig):
        return 0, config.loop.steps // config.updates * config.batch * config.group
    return config.loop.steps * config.batch, 0
