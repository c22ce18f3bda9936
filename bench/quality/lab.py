"""What decides a cell's outcome, and each cell's state: done, missing, blocked or changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from echogen.bench.harness import environment
from echogen.bench.quality import score
from echogen.bench.quality.cells import (
    DRAWINGS,
    EARLIER,
    FRESH,
    LLM_LAYOUTS,
    STARTS,
    Cell,
    Config,
    cells,
    scaled,
    settings,
)
from echogen.bench.quality.records import (
    QualityError,
    Record,
    clock,
    kind,
    kind_of,
    pace,
    precision_of,
    read_record,
)
from echogen.bench.quality.start import Given, look_at, unlike
from echogen.train.config import CycleRLConfig, Recipe, differences, to_json
from echogen.train.start import model_folder
from echogen.train.start import read_record as read_stages


@dataclass
class Lab:
    """Where cells run, and what they are made from.

    Attributes:
        recipe: the configuration that cells change.
        results: folder of the finished cells.
        models: folder of the runs and of their models.
        seeds: of the cells.
        start: the stage 1 model that the ablation starts from, and whose image tokenizer the cells
            with fresh weights use; ``{seed}`` in it stands for the cell's seed. None: the recipe's
            bundled model, if it has one.
        llm_layouts: file with one LLM-written layout per line, for the arm that needs it.
        scale: of steps and scenes.
        force: start Cycle RL however little its reward agrees with the judge.
        float32: multiply in float32 where the recipe says bfloat16. This belongs to a cell's
            machine rather than to its experiment: a finished cell counts whichever type it was
            trained in, and the tables name the cells that differ in it.
        device: where cells are trained and evaluated; part of the machine, like ``float32``.
        tell: called with a line about the current work.
    """

    recipe: Recipe
    results: Path
    models: Path
    seeds: tuple[int, ...]
    start: str | None = None
    llm_layouts: Path | None = None
    scale: float = 1.0
    force: bool = False
    float32: bool = False
    device: str = "cpu"
    tell: Callable[[str], None] = print
    cells: dict[str, Cell] = field(init=False)
    environment: dict[str, Any] = field(init=False)
    """This process's environment, taken when it began, with the commit whose code it runs."""
    _looked_at: dict[str, Given] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.cells = cells(self.seeds)
        self.environment = environment(self.device)
        self.start = self.start or STARTS.get(self.recipe.name)

    def find(self, name: str) -> Cell:
        """Return the cell of that name. Raises QualityError."""
        if name not in self.cells:
            raise QualityError(f"cell {name}: unknown; --list names them all")
        return self.cells[name]

    # --- what a cell is -------------------------------------------------------------------------

    def given(self, cell: Cell) -> str:
        """Return the stage 1 model that a cell of this seed starts from.

        Raises:
            QualityError: none is named, and the recipe has none.
        """
        if self.start is None:
            name = self.recipe.name
            raise QualityError(
                f"the recipe {name} has no bundled model of stage 1: make one (`echogen train vq "
                f"--recipe {name} --out VQ`, then `echogen train pmtp --recipe {name} --vq "
                f"VQ/model --out RUN`, on a GPU with --device cuda) and name it with --start RUN"
            )
        return self.start.replace("{seed}", str(cell.seed))

    def sizes(self, cell: Cell) -> score.Sizes:
        """Return how much is drawn to evaluate a cell."""
        full, s = score.Sizes(), self.scale
        once = cell.table in EARLIER.get(self.recipe.name, ()) or cell.task == "i2l"
        return score.Sizes(
            scaled(full.validation, s, 4), scaled(full.test, s, 4), scaled(full.varied, s, 2),
            full.draws, 1 if once else scaled(DRAWINGS, s, 2),
            self.recipe.cycle_rl.val_drawings if cell.chosen_as_rl else 0,
        )  # fmt: skip

    def steps(self, cell: Cell) -> int | None:
        """Return the steps of a cell that spends the measured seconds of others (see `clock`):
        their seconds over its pace's seconds per step. None for every other cell, and while those
        are unfinished."""
        if not cell.budget:
            return None
        pace = self._pace(cell)
        spent = [read_record(self.results, name) for name in cell.budget]
        if pace is None or None in spent:
            return None
        each = pace[clock(pace)] / pace["steps"]
        return max(1, round(sum(r[clock(r)] for r in spent if r is not None) / each))

    def _pace(self, cell: Cell) -> Record | None:
        return pace(cell, self.cells, lambda name: read_record(self.results, name))

    def config(self, cell: Cell) -> Config:
        """The configuration of a cell's stage."""
        config = settings(cell, self.recipe, self.scale, self.steps(cell))
        if self.float32:
            config = replace(config, loop=replace(config.loop, bf16=False))
        if isinstance(config, CycleRLConfig):
            there = config.layouts == LLM_LAYOUTS and self.llm_layouts is not None
            layouts = str(self.llm_layouts) if there else config.layouts
            config = replace(config, layouts=layouts, force=config.force or self.force)
        return config

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Return everything that decides a cell's result, JSON-ready. Its start is recorded
        separately, and ``force`` decides nothing once the cell has started."""
        found: dict[str, Any] = {"recipe": self.recipe.name, "task": cell.task}
        found["evaluation"] = to_json(self.sizes(cell))
        if cell.stage == "none":
            return found
        config = to_json(self.config(cell))
        config = {k: v for k, v in config.items() if k not in ("start", "force")}
        if cell.changes.get("layouts") == LLM_LAYOUTS and self.llm_layouts is not None:
            digest = hashlib.blake2b(self.llm_layouts.read_bytes(), digest_size=6)
            config["layouts"] = f"file {digest.hexdigest()}"
        return found | {"config": config}

    def fingerprint(self, cell: Cell) -> str | None:
        """Return a hash of what a cell starts from: a transformer's weights or, for fresh weights,
        those of the image tokenizer. None while its parent is unfinished."""
        if cell.parent is not None:
            record = read_record(self.results, cell.parent)
            return None if record is None else str(record["model"])
        given = self._look_at(self.given(cell))
        return given.tokenizer if cell.start == FRESH else given.weights

    def _look_at(self, name: str) -> Given:
        if name not in self._looked_at:
            self._looked_at[name] = look_at(name)
        return self._looked_at[name]

    def check_start(self, cell: Cell) -> None:
        """Refuse to continue stage 1 from a model of another stage. Also refuse a model, or for
        fresh weights an image tokenizer, whose shapes are not the recipe's. Raises QualityError."""
        if cell.parent is not None:
            return
        name, fresh = self.given(cell), cell.start == FRESH
        if odd := unlike(self._look_at(name), self.recipe, fresh):
            raise QualityError(
                f"{cell.name}: the model {name} has other shapes than the recipe "
                f"{self.recipe.name} ({'; '.join(odd)}); name one with --start that `echogen train "
                f"pmtp --recipe {self.recipe.name}` made"
            )
        stages = read_stages(model_folder(name))
        if not fresh and stages[-1:] != ("pmtp",):
            found = f"comes from stage {stages[-1]}" if stages else "names no stage"
            raise QualityError(
                f"{cell.name}: the model {name} {found}; the ablation begins with one "
                f"of stage 1, so name one with --start (`echogen train pmtp` makes it)"
            )

    def check_pace(self, cell: Cell) -> None:
        """Refuse to spend seconds if they, or the pace, were measured in another type or on another
        device than this cell's. Raises QualityError."""
        if not cell.budget:
            return
        found = [self._pace(cell), *(read_record(self.results, name) for name in cell.budget)]
        kinds = {record["cell"]: kind(record) for record in found if record is not None}
        own = kind_of(precision_of(self.config(cell).loop.bf16), self.environment["device"])
        if set(kinds.values()) - {own}:
            told = ", ".join(f"{name} in {each}" for name, each in kinds.items())
            raise QualityError(
                f"{cell.name}: it spends the seconds of others in {own}, and they were trained "
                f"otherwise ({told}); give or leave out --float32 and --device as they did, or run "
                f"them again with --cell NAME --again"
            )

    # --- its state ------------------------------------------------------------------------------

    def state(self, cell: Cell) -> tuple[str, str]:
        """("done" | "missing" | "blocked" | "changed", why)."""
        record = read_record(self.results, cell.name)
        if cell.changes.get("layouts") == LLM_LAYOUTS and self.llm_layouts is None:
            return ("done", "") if record else ("blocked", "needs --llm-layouts FILE")
        if record is None:
            return "missing", ""
        new: dict[str, Any] = {"scale": self.scale, "settings": self.settings(cell)}
        old = {key: record[key] for key in new}
        if cell.budget and self.steps(cell) is None:
            # The cells of its budget are not here; its record has the settings that resulted.
            new["settings"]["config"] = old["settings"]["config"]
        elif cell.stage != "none":
            new["settings"]["config"]["loop"]["bf16"] = old["settings"]["config"]["loop"]["bf16"]
        changed = differences(old, new)
        begun = self.fingerprint(cell)
        if begun is not None and begun != record["start"]["fingerprint"]:
            fix = (
                ""
                if cell.parent
                else ", the model of stage 1: name the one it began with (--start)"
            )
            changed.append(f"start {record['start']['fingerprint']} → {begun}{fix}")
        return ("changed", "; ".join(changed)) if changed else ("done", "")
