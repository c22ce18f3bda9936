"""The command that runs the quality experiments, cell by cell, and writes their tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from echogen.commands.options import (
    Json,
    ModelOptions,
    check_evaluates,
    check_range,
    make_current,
)
from echogen.commands.output import (
    Failure,
    InputError,
    finite,
    make_folder,
    print_json,
    show,
    warn,
    write,
)
from echogen.commands.training import find_recipe

if TYPE_CHECKING:
    from echogen.bench.quality.cells import Cell
    from echogen.bench.quality.lab import Lab
    from echogen.bench.quality.report import Table

MOST_SEEDS = 100


@dataclass(frozen=True)
class BenchQuality:
    """Does each stage help? Train and evaluate the missing cells of the tables ablation, plateau,
    mask, synergy and rl-data, one by one, and then write the tables, plots and a contact sheet. A
    cell is one run, of minutes to two hours on a CPU."""

    recipe: str = "tiny"
    """Which configuration: tiny, small or janus_pro_1b."""
    seeds: int = 3
    """Seeds 0 … n − 1 of every arm."""
    table: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """ablation, plateau, mask, synergy or rl-data; repeatable (left out: all)."""
    cell: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Run only this cell, by name, after those it needs; repeatable."""
    listing: Annotated[bool, tyro.conf.arg(name="list")] = False
    """List the cells and their state; run none."""
    report: bool = False
    """Write and print the tables of the finished cells, with plots and pictures; run none."""
    fresh: int | None = None
    """Draw this many test layouts beyond those of the tables, at T = 1, with the models of the
    finished cells (of --table or --cell) that are present, and add a table of them; run none."""
    again: bool = False
    """Discard the results of the cells named by --cell and run them again."""
    out: Path | None = None
    """Folder of the finished cells (left out: bench/results/quality of the checkout, or next to it
    quality-RECIPE for other recipes than tiny)."""
    models: Path | None = None
    """Folder of the runs and models, outside the repository (left out: in the cache)."""
    start: str | None = None
    """Stage 1 model of the recipe's shapes: the ablation starts from it, fresh weights take its
    tokenizer. {seed} in it stands for the seed (left out: tiny-stage1, for tiny only)."""
    llm_layouts: Path | None = None
    """File with one LLM-written JSON layout per line, for the arm of rl-data that needs one."""
    scale: float = 1.0
    """Factor on steps and scenes, for trial runs (needs --out)."""
    force: bool = False
    """Start Cycle RL even if the self-reward hardly agrees with the judge."""
    float32: bool = False
    """Use float32 where the recipe says bfloat16: for CPUs without bfloat16 instructions."""
    device: str = "cpu"
    """Where cells are trained and evaluated: cpu, cuda or cuda:N."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        self._check()
        lab = self._lab()
        if self.listing:
            self._list(lab)
        elif self.report:
            self._report(lab)
        elif self.fresh is not None:
            self._fresh(lab, self.fresh)
        else:
            self._run(lab)

    def _check(self) -> None:
        check_range("seeds", self.seeds, 1, MOST_SEEDS)
        if not 0 < self.scale <= 1:
            raise InputError(f"--scale {self.scale}: it must be above 0 and at most 1")
        if self.scale != 1 and self.out is None:
            raise InputError(f"--scale {self.scale}: name another --out, so that it is not mixed "
                             f"with real results")  # fmt: skip
        if self.listing + self.report + (self.fresh is not None) > 1:
            raise InputError("--list, --report and --fresh: choose one")
        if self.fresh is not None:
            check_range("fresh", self.fresh, 2, 100_000)
        if self.again and (not self.cell or self.listing or self.report or self.fresh is not None):
            raise InputError("--again: name what to run again with --cell")
        if self.llm_layouts is not None and not self.llm_layouts.is_file():
            raise InputError(f"--llm-layouts {self.llm_layouts}: no such file")
        ModelOptions(device=self.device).check()

    def _lab(self) -> Lab:
        recipe = find_recipe(self.recipe)
        from echogen.bench import quality
        from echogen.bench.quality.lab import Lab
        from echogen.engine.cache_folder import cache_path

        make_current(self.device)
        results = "quality" if recipe.name == "tiny" else f"quality-{recipe.name}"
        usual = Path(quality.__file__).parents[1] / "results"
        if self.out is None and not usual.is_dir():
            raise InputError("--out is missing: name a folder, as this is no checkout")
        models = self.models or cache_path("quality") / f"{recipe.name}-{self.scale:g}"
        return Lab(
            recipe, self.out or usual / results, models, tuple(range(self.seeds)), self.start,
            self.llm_layouts, self.scale, self.force, self.float32, self.device,
            lambda line: print(line, flush=True),
        )  # fmt: skip

    def _chosen(self, lab: Lab) -> list[Cell]:
        """Return the cells that the options name, in running order."""
        from echogen.bench.quality.cells import ROWS
        from echogen.bench.quality.records import QualityError

        for table in self.table:
            if table not in ROWS:
                raise InputError(f"--table {table}: unknown; choose {', '.join(ROWS)}")
        try:
            named = {lab.find(name).name for name in self.cell}
        except QualityError as error:
            raise InputError(f"--{error}") from None
        stems = {stem for table in self.table for stem in ROWS[table]}
        every = not self.table and not self.cell
        return [c for c in lab.cells.values() if every or c.name in named or c.stem in stems]

    def _run(self, lab: Lab) -> None:
        chosen = self._chosen(lab)
        check_evaluates()
        from echogen.bench.quality.records import recorded_seeds
        from echogen.bench.quality.run import run_all

        lab.given(chosen[0])  # without it, every cell would be refused
        make_folder(lab.results)
        failed = run_all(lab, chosen, self.again)
        states = {cell.name: lab.state(cell)[0] for cell in chosen}
        # With all recorded seeds: a run of fewer must not remove the others from the tables.
        self._write_report(lab, sorted({*lab.seeds, *recorded_seeds(lab.results)}))
        print(f"tables of the finished cells written to {lab.results / 'README.md'}")
        if self.json:
            print_json({"cells": states, "failed": failed, "results": str(lab.results)})
        if failed and len(chosen) == 1:
            raise InputError(next(iter(failed.values())))
        if failed:
            raise Failure(f"{len(failed)} of {len(chosen)} cells did not run: {', '.join(failed)}")

    def _list(self, lab: Lab) -> None:
        rows, states = [], {}
        for c in self._chosen(lab):
            state, why = lab.state(c)
            if c.budget and lab.steps(c) is None:
                steps = "timed"
            else:
                steps = "none" if c.stage == "none" else str(lab.config(c).loop.steps)
            rows.append((c.name, state, steps, c.stage, c.start))
            states[c.name] = {"state": state, "why": why}
        columns = ("cell", "state", "steps", "stage", "begins with")
        show(f"{len(rows)} cells", columns, rows)
        for name, found in states.items():
            if found["why"]:
                print(f"{name}: {found['why']}")
        print(f"results in {lab.results}, models in {lab.models}")
        if self.json:
            print_json({"cells": states, "results": str(lab.results)})

    def _fresh(self, lab: Lab, count: int) -> None:
        chosen = self._chosen(lab)
        check_evaluates()
        from echogen.bench.quality import fresh
        from echogen.bench.quality.records import recorded_seeds

        make_folder(lab.results)
        for cell in chosen:
            why = fresh.measure(lab, cell, count)
            lab.tell(why or f"{cell.name}: drawn, written to {lab.results / 'fresh'}")
        seeds = sorted({*lab.seeds, *recorded_seeds(lab.results)})
        self._write_report(lab, seeds)
        tables = fresh.differences(lab.results, seeds)
        print(fresh.section(tables))
        if self.json:
            print_json(tables)

    def _report(self, lab: Lab) -> None:
        from echogen.bench.quality import report

        make_folder(lab.results)
        tables = self._write_report(lab, lab.seeds)
        print(report.markdown(tables))
        if self.json:
            print_json(tables)

    def _write_report(self, lab: Lab, seeds: Iterable[int]) -> dict[str, Table]:
        """Write tables and pictures of the finished cells of these seeds, and return the tables.
        Raises QualityError for a record that cannot be read."""
        from echogen.bench.quality import fresh, pictures, report

        seeds = tuple(seeds)
        tables = report.make(lab.results, seeds)
        page = report.markdown(tables)
        if further := fresh.section(fresh.differences(lab.results, seeds)):
            page += f"\n{further}\n"
        write(lab.results / "README.md", page.encode())
        data = json.dumps(finite(tables), indent=1, allow_nan=False)
        write(lab.results / "tables.json", (data + "\n").encode())
        for name, table in tables.items():
            try:
                pictures.plot(name, table, lab.results)
            except ImportError:
                warn("matplotlib is not installed; no plots were drawn")
                break
        sheet = lab.results / "contact_sheet.png"
        why = pictures.contact_sheet(lab, sheet)
        if why is not None:
            warn(f"no contact sheet was made: {why}")
        return tables
