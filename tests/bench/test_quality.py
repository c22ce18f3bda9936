"""The quality experiments: cells run once, after what they need; tables say what they found."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from echogen.bench.quality import cells as declared
from echogen.bench.quality import fresh, pictures, report, run, score, stages
from echogen.bench.quality import lab as lab_module
from echogen.bench.quality.cells import COMPARED, FRESH, ROWS, START, cells
from echogen.bench.quality.lab import Lab
from echogen.bench.quality.records import QualityError, device, read_record, write_record
from echogen.bench.quality.run import held, run_all, run_cell
from echogen.bench.quality.stages import OneTaskStage, Timed, build, checkpoint
from echogen.bench.quality.start import look_at, unlike
from echogen.cli import main
from echogen.engine.decoding.sampler import Sampling
from echogen.engine.engine import Engine
from echogen.engine.images.vision import decode_codes
from echogen.engine.model import additive_mask
from echogen.train.config import CycleRLConfig, DJOConfig, LoopConfig, PMTPConfig, Recipe, VQConfig
from echogen.train.data import samples as data
from echogen.train.data import scenes
from echogen.train.data.packing import visibility
from echogen.train.eval.tables import judge_boxes, layouts_of
from echogen.train.parallel import processes
from echogen.train.recipes import RECIPES
from echogen.train.run import loop
from echogen.train.run.loop import TrainingError
from echogen.train.stages import cycle_rl, passes, world
from echogen.train.stages.pmtp import PMTPStage
from echogen.train.stages.vq import build_vq

from ..train.away import AWAY, Away, Machine, is_away, send
from .hand_made import hand_made

LOOP = LoopConfig(
    steps=4, lr=2e-3, warmup=2, log_every=1, eval_every=4, save_every=2, threads=1, bf16=False
)
PMTP = PMTPConfig(loop=LOOP, width=32, layers=2, heads=2, mlp_width=64, bins=17, scenes=24, batch=3)
RECIPE = Recipe(
    name="small",
    vq=VQConfig(loop=LOOP, codes=32, latent=32, multipliers=(1, 1, 1, 1)),
    pmtp=PMTP,
    pmtp_on=PMTP,
    djo=DJOConfig(loop=LOOP, scenes=24, batch=3),
    cycle_rl=CycleRLConfig(
        loop=replace(LOOP, lr=1e-4),
        scenes=24,
        batch=2,
        group=2,
        gate_scenes=2,
        gate_group=2,
        val_drawings=2,
    ),
)
TWO, THREE = "ablation-stage2-seed0", "ablation-stage3-seed0"
SCALE = 0.005


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a stage-1 run of the smallest size, its cache, and few scenes and settings."""
    folder = tmp_path_factory.mktemp("quality")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECHOGEN_CACHE", str(folder / "cache"))
        version = scenes.world_version()  # hashes three modules, 20 ms at every load
        for module in (scenes, data):
            patch.setattr(module, "world_version", lambda: version)
        patch.setattr(world, "VAL_SAMPLES", 4)
        patch.setattr(cycle_rl, "VAL_LAYOUTS", 4)
        steps = {"pmtp": 2200, "djo": 900, "cycle-rl": 240}  # of which SCALE is taken
        patch.setattr(declared, "STEPS", {"small": steps})
        patch.setattr(score, "GRID", (Sampling(0.5, 1.0), Sampling(1.0, 2.0)))
        torch.manual_seed(0)  # of the image tokenizer
        loop.run(PMTPStage(PMTP, build_vq(RECIPE.vq, PMTP.width)), LOOP, folder / "start")
        yield folder


@pytest.fixture(scope="module")
def finished(small: Path) -> tuple[Lab, list[str]]:
    """Stages 1, 2 and 3 of one seed, finished, and what was told on the way."""
    told: list[str] = []
    lab = make_lab(small, small / "finished", told)
    assert run_all(lab, [lab.find(THREE)]) == {}
    assert run_all(lab, [lab.find("ablation-stage1-seed0")]) == {}
    return lab, told


def make_lab(small: Path, folder: Path, told: list[str] | None = None) -> Lab:
    told = [] if told is None else told
    return Lab(RECIPE, folder / "results", folder / "models", (0,), str(small / "start"),
               scale=SCALE, tell=told.append)  # fmt: skip


@pytest.fixture
def copied(small: Path, finished: tuple[Lab, list[str]], tmp_path: Path) -> Lab:
    """The finished cells, to be spoilt."""
    shutil.copytree(small / "finished", tmp_path / "copy")
    return make_lab(small, tmp_path / "copy")


# --- what there is --------------------------------------------------------------------------------


def test_cells_come_in_the_order_of_the_tables_and_after_what_they_begin_with():
    known = cells(range(3))
    order = list(known)
    tables = list(dict.fromkeys(c.table for c in known.values()))
    assert tables == list(ROWS) == ["ablation", "plateau", "mask", "synergy", "rl-data"]
    for cell in known.values():
        assert cell.start in (START, FRESH, *known)
        assert all(order.index(need) < order.index(cell.name) for need in cell.needs)
        assert not (cell.budget and "loop" in cell.changes)
    stems = {c.stem for c in known.values()}
    assert stems == {stem for row in ROWS.values() for stem in row}
    assert all(set(pair) <= set(ROWS[t]) for t, pairs in COMPARED.items() for pair in pairs)


def test_the_arms_of_one_seed_differ_in_what_they_are_named_for_only():
    known, recipe = cells([2]), replace(RECIPE, name="tiny")
    two, control = (
        declared.settings(known[f"ablation-{arm}-seed2"], recipe) for arm in ("stage2", "samples")
    )
    assert replace(two, loop_weight=0.0) == control and two.loop.seed == 2
    isolated = declared.settings(known["mask-isolated-seed2"], recipe)
    assert replace(isolated, mask="shared") == declared.settings(known["mask-shared-seed2"], recipe)
    assert isolated == declared.settings(known["synergy-i2l-seed2"], recipe)
    steps = declared.STEPS["tiny"]
    assert declared.samples(two) == (steps["djo"] * 3, 0)
    rl = declared.settings(known["ablation-stage3-seed2"], recipe)
    assert declared.samples(rl) == (0, steps["cycle-rl"] * 2 * 2) and not rl.force
    fast, slow = (
        declared.settings(known[f"plateau-{arm}-seed2"], recipe) for arm in ("stage3", "slow")
    )
    rates = {"lr": 5e-6, "muon_lr": 2.5e-5, "steps": 500, "eval_every": 125}
    assert replace(fast, loop=replace(fast.loop, **rates)) == slow
    another = replace(RECIPE, name="another")  # has no steps but its own
    assert declared.settings(known["ablation-stage2-seed2"], another).loop.steps == LOOP.steps


def test_one_task_alone_learns_from_what_it_has_in_company(small):
    vq = Engine.from_pretrained(small / "start" / "model").vq
    both = PMTPStage(PMTP, vq).loss(3)[1]
    drawing = OneTaskStage(PMTP, vq, "l2i").loss(3)[1]
    grounding = OneTaskStage(PMTP, vq, "i2l").loss(3)[1]
    assert drawing == pytest.approx({"loss": both["l2i"], "l2i": both["l2i"], "i2l": 0}, abs=1e-5)
    assert grounding == pytest.approx({"loss": both["i2l"], "l2i": 0, "i2l": both["i2l"]}, abs=1e-5)
    with pytest.raises(ValueError, match="isolated"):
        OneTaskStage(replace(PMTP, mask="shared"), vq, "l2i")


def test_stage_1_continued_has_the_batches_of_stage_2_and_no_loop(small):
    known, numbers = cells([0]), {}
    for arm in ("stage2", "samples"):
        cell = known[f"ablation-{arm}-seed0"]
        config = declared.settings(cell, RECIPE, SCALE)
        numbers[arm] = build(cell, config, small / "start")[0].loss(1)[1]
    assert "loop" not in numbers["samples"] and numbers["stage2"]["loop"] > 0
    assert numbers["samples"]["l2i"] == pytest.approx(numbers["stage2"]["l2i"], rel=1e-5)
    parts = numbers["samples"]["l2i"] + numbers["samples"]["i2l"]
    assert numbers["samples"]["loss"] == pytest.approx(parts, rel=1e-6)


class Clock:
    """Stands in for `time`. Half of what passes is the processor's."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now / 2


class Scripted:
    """A stage of one weight whose validation scores are given."""

    name = "scripted"

    def __init__(self, steps: int) -> None:
        self.config = replace(RECIPE.djo, loop=replace(LOOP, steps=steps, eval_every=1))
        self.module, self.clock = torch.nn.Linear(1, 1), Clock()

    def begin(self) -> dict[str, float]:
        return {}

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        self.clock.now += 0.01
        loss = self.module.weight.square().sum()
        return loss, {"loss": float(loss.detach())}

    def after_step(self, step: int) -> None:
        self.done = step + 1

    def evaluate(self) -> dict[str, float]:
        self.clock.now += 0.1
        return {"judge_iou": [0.2, 0.5, 0.3, 0.5][self.done - 1], "ground_iou": -self.done}

    def export(self, folder: Path) -> None:
        folder.mkdir()


@pytest.mark.parametrize(
    ("task", "by", "best"), [("both", "judge_iou", 2), ("i2l", "ground_iou", 1)]
)
def test_steps_are_timed_and_the_best_checkpoint_is_named(tmp_path, task, by, best, monkeypatch):
    stage = Scripted(4)
    monkeypatch.setattr(stages, "time", stage.clock)
    timed = Timed(stage, tmp_path, task)
    loop.run(timed, timed.config.loop, tmp_path)
    found = checkpoint(tmp_path / "metrics.jsonl", timed.selects)
    assert found["step"] == best and found["by"] == by
    assert [c["step"] for c in found["of"]] == [1, 2, 3, 4]
    again = Timed(Scripted(4), tmp_path, task)  # as a resumed run finds the clock
    assert again.seconds(4) == timed.seconds(4)
    # Of the steps alone: evaluations take 0.4 s.
    assert timed.seconds(4) == {"seconds": pytest.approx(0.04), "cpu_seconds": pytest.approx(0.02)}
    assert timed.seconds(8)["seconds"] == pytest.approx(0.08)


def test_a_timed_stage_goes_through_a_step_in_parts_if_its_own_does(small, tmp_path):
    stage = PMTPStage(PMTP, Engine.from_pretrained(small / "start" / "model").vq)
    timed, config = Timed(stage, tmp_path / "a", "both"), replace(LOOP, steps=2, accumulate=3)
    loop.run(timed, config, tmp_path / "a")
    assert timed.seconds(2)["seconds"] > 0 and timed.ahead == stage.ahead
    with pytest.raises(TrainingError, match="not made of parts"):
        loop.run(Timed(Scripted(2), tmp_path / "b", "both"), config, tmp_path / "b")


def test_a_cell_may_choose_its_weights_by_many_drawings(small, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "VAL_LAYOUTS", 3)
    stage = PMTPStage(PMTP, Engine.from_pretrained(small / "start" / "model").vq)
    timed = Timed(stage, tmp_path, "both", choosing=2)
    found = score.load_scenes("val", 3)
    asked = [y for y in layouts_of(found, 0) for _ in range(2)]
    samples = [i + 3 * drawing for i in range(3) for drawing in range(2)]
    codes = stage.engine.generate_codes(asked, 0, samples, sampling=score.PLAIN)
    drawn = decode_codes(stage.vq, codes)
    wanted = judge_boxes(drawn, [scene for scene in found for _ in range(2)])
    assert timed.evaluate()["drawn_iou"] == pytest.approx(wanted["judge_iou"])
    loop.run(timed, replace(LOOP, steps=2, eval_every=1), tmp_path / "run")
    assert checkpoint(tmp_path / "run" / "metrics.jsonl", timed.selects)["by"] == "drawn_iou"


# --- running --------------------------------------------------------------------------------------


def test_a_cell_runs_after_its_parent_and_says_everything(finished):
    lab, told = finished
    two, three = (read_record(lab.results, name) for name in (TWO, THREE))
    assert two is not None and three is not None
    assert [line.split(":")[0] for line in told if "steps of" in line] == [TWO, THREE]
    assert three["start"] == {"cell": TWO, "fingerprint": two["model"], "stages": ["pmtp", "djo"]}
    assert two["steps"] == 4 and two["samples"] == 12 and three["drawn"] == 2 * 2 * 2
    assert two["cpu_seconds"] > 0 and two["seconds"] > 0 and two["environment"]["cpus"]
    assert [c["step"] for c in two["checkpoint"]["of"]] == [1, 2, 3, 4]
    top = max(c["score"] for c in two["checkpoint"]["of"])
    chosen = next(c for c in two["checkpoint"]["of"] if c["step"] == two["checkpoint"]["step"])
    assert chosen["score"] == top and two["checkpoint"]["by"] == "judge_iou"
    assert three["checkpoint"]["by"] == "cycle_iou"  # the stage's own choice
    assert two["trained_in"] == [lab.environment] == [two["environment"]]
    found = two["evaluation"]
    assert found["plain"]["sampling"] == {"temperature": 1.0, "cfg": 1.0}
    best = max(found["validation"], key=lambda row: row["judge_iou"])
    assert found["best"]["sampling"] == {k: best[k] for k in ("temperature", "cfg")}
    assert found["plain"]["count"] == found["sizes"]["test"] == 4
    assert 1 <= found["plain"]["diversity"]["distinct_codes"] <= 4
    log = (lab.results / f"{TWO}.metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in log if "loss" in json.loads(x)] == [1, 2, 3, 4]
    left = {p.name for p in (lab.models / TWO / "run").iterdir()}
    assert "metrics.jsonl" in left and not left & {"state.pt", "state.prev.pt", "model", "best.pt"}
    assert Engine.from_pretrained(lab.models / TWO / "model").image_size == 64
    one = read_record(lab.results, "ablation-stage1-seed0")
    assert one is not None and one["model"] == two["start"]["fingerprint"] and one["steps"] == 0


def test_what_is_done_is_not_done_again(finished, monkeypatch):
    lab, told = finished
    monkeypatch.setattr(run, "train", None)
    before = {p: p.stat().st_mtime_ns for p in lab.results.iterdir()}
    assert run_all(lab, [lab.find(TWO), lab.find(THREE)]) == {}
    assert told[-2:] == [f"{TWO}: done already", f"{THREE}: done already"]
    assert {p: p.stat().st_mtime_ns for p in lab.results.iterdir()} == before


def test_a_stop_between_and_within_cells_costs_nothing(small, finished, tmp_path, monkeypatch):
    lab = make_lab(small, tmp_path)

    class Stop(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Stop

    inner = processes.save_state

    def save_twice(path, state, keep_previous):
        inner(path, state, keep_previous)
        if state["step"] == 2:
            raise Stop

    monkeypatch.setattr(processes, "save_state", save_twice)
    with pytest.raises(Stop):
        run_cell(lab, lab.find(THREE))
    assert not list(lab.results.glob("*"))
    monkeypatch.setattr(processes, "save_state", inner)
    monkeypatch.setattr(run.score, "measure", stop)
    with pytest.raises(Stop):
        run_cell(lab, lab.find(THREE))  # trained, not evaluated
    assert not list(lab.results.glob("*"))
    monkeypatch.undo()
    steps = []

    def train(stage, config, folder, resume):
        steps.append(stage.name)
        loop.run(stage, config, folder, resume)

    monkeypatch.setattr(run, "train", train)
    run_cell(lab, lab.find(THREE))
    assert steps == ["cycle-rl"]
    whole = finished[0]
    for name in (TWO, THREE):
        a, b = read_record(lab.results, name), read_record(whole.results, name)
        assert a is not None and b is not None and a["model"] == b["model"]
        for part in ("evaluation", "checkpoint", "before", "steps"):
            assert a[part] == b[part], part


def test_a_lost_model_is_trained_again_and_must_be_the_same(copied):
    shutil.rmtree(copied.models / TWO)
    (copied.results / f"{THREE}.json").unlink()
    told: list[str] = []
    copied.tell = told.append
    run_cell(copied, copied.find(THREE), again=True)
    assert any("its model is not in" in line for line in told)
    assert read_record(copied.results, THREE)
    record = read_record(copied.results, TWO)
    assert record is not None
    write_record(copied.results, record | {"model": "0123"}, None)
    assert copied.state(copied.find(THREE))[1].endswith("→ 0123")
    with pytest.raises(QualityError, match=r"is not that of its record \(0123\)"):
        run_cell(copied, copied.find(THREE), again=True)


def test_other_settings_are_refused_until_said_again(copied):
    wider = replace(RECIPE, djo=replace(RECIPE.djo, loop_weight=0.5))
    copied.recipe = wider
    failed = run_all(copied, [copied.find(TWO), copied.find(THREE)])
    assert "settings.config.loop_weight 1.0 → 0.5" in failed[TWO] and "--again" in failed[TWO]
    assert failed[THREE] == f"{THREE}: needs {TWO}"
    run_cell(copied, copied.find(TWO), again=True)
    assert copied.state(copied.find(TWO)) == ("done", "")
    assert copied.state(copied.find(THREE))[0] == "changed"  # it began with what is gone
    (copied.results / f"{THREE}.json").unlink()
    with pytest.raises(QualityError, match=r"its run in .* has other settings \(start \w+ → \w+\)"):
        run_cell(copied, copied.find(THREE))


def test_a_cell_that_cannot_be_run_keeps_none_of_the_others_from_it(copied, tmp_path):
    (copied.results / f"{THREE}.json").unlink()
    (copied.models / THREE / "model" / "config.json").unlink()
    llm, one = "rl-data-llm-seed0", "ablation-stage1-seed0"
    copied.llm_layouts = tmp_path / "llm.jsonl"
    copied.llm_layouts.write_text("{\n")
    told: list[str] = []
    copied.tell = told.append
    failed = run_all(copied, [copied.find(name) for name in (llm, THREE, one)])
    assert failed.keys() == {llm, THREE} and told[-1] == f"{one}: done already"
    assert "llm.jsonl" in failed[llm] and "config.json is missing" in failed[THREE]


def test_seconds_become_steps(copied):
    cell = copied.find("ablation-seconds3-seed0")
    assert copied.steps(cell) is None and copied.state(cell) == ("missing", "")
    for name, spent in (("samples", 2.0), ("stage2", 5.0), ("stage3", 3.5)):
        made = hand_made(f"ablation-{name}-seed0", 0.5) | {"cpu_seconds": spent, "steps": 4}
        write_record(copied.results, made, None)
    assert copied.steps(cell) == 17  # 8.5 s at half a second a step
    assert copied.config(cell).loop.steps == 17
    assert copied.steps(copied.find("ablation-seconds2-seed0")) == 10


def test_seconds_are_paced_by_steps_of_the_same_type(small, tmp_path):
    """What bfloat16 takes on the machine of one seed says nothing of another's in float32."""
    lab = make_lab(small, tmp_path)
    lab.seeds, lab.cells = (0, 1), cells((0, 1))
    cell = lab.find("ablation-seconds2-seed0")

    def keep(stem: str, seed: int, bf16: bool, spent: float) -> None:
        made = hand_made(f"ablation-{stem}-seed{seed}", 0.5) | {"cpu_seconds": spent, "steps": 4}
        made["settings"]["config"] = {"loop": {"bf16": bf16}}
        write_record(lab.results, made, None)

    keep("stage2", 0, False, 12.0)
    keep("samples", 0, True, 2.0)
    with pytest.raises(QualityError, match="ablation-samples-seed0 in bfloat16, ablation-stage2"):
        lab.check_pace(cell)
    keep("samples", 1, False, 8.0)
    lab.check_pace(cell)
    assert lab.steps(cell) == 6  # 12 s at two seconds a step
    write_record(lab.results, hand_made(cell.name, 0.5), None)
    (note,) = (x for x in report.make(lab.results, (0, 1))["ablation"]["notes"] if "pace" in x)
    assert f"{cell.name} had to spend" in note and "of ablation-samples-seed1," in note
    keep("samples", 0, False, 16.0)
    assert lab.steps(cell) == 3  # its own seed's first


def test_layouts_of_a_language_model_have_to_be_given(copied, tmp_path):
    cell = copied.find("rl-data-llm-seed0")
    assert copied.state(cell) == ("blocked", "needs --llm-layouts FILE")
    assert run_all(copied, [cell]) == {}
    copied.llm_layouts = tmp_path / "llm.jsonl"
    copied.llm_layouts.write_text('{"caption": "a", "objects": []}\n')
    assert copied.state(cell)[0] == "missing" and copied.config(cell).layouts.endswith("llm.jsonl")
    public = copied.settings(cell)["config"]["layouts"]
    assert public.startswith("file ") and str(tmp_path) not in public


def test_the_ablation_begins_with_stage_1(copied):
    copied.start = str(copied.models / TWO / "model")
    cell = copied.find("ablation-samples-seed0")
    with pytest.raises(QualityError, match=r"comes from stage djo; .* name one with --start"):
        run_cell(copied, cell)
    state, why = copied.state(copied.find(TWO))
    assert state == "changed" and "--start" in why and "--start" not in copied.state(cell)[1]


@pytest.mark.parametrize(
    ("name", "codes", "odd"),
    [(TWO, 32, "width 32, not 64; layers 2, not 3"),
     ("mask-isolated-seed0", 64, "codebook size 32, not 64")],
)  # fmt: skip
def test_a_start_of_other_shapes_is_refused(small, tmp_path, name, codes, odd):
    """Fresh weights take its image tokenizer alone."""
    wider, vq = replace(PMTP, width=64, layers=3), replace(RECIPE.vq, codes=codes)
    lab = replace(make_lab(small, tmp_path), recipe=replace(RECIPE, pmtp=wider, vq=vq))
    with pytest.raises(QualityError, match=rf"has other shapes than the recipe small \({odd}\)"):
        run_cell(lab, lab.find(name))


def test_the_bundled_start_is_of_its_recipe():
    given = look_at(declared.STARTS["tiny"])
    assert not unlike(given, RECIPES["tiny"](), fresh=False)
    odd = unlike(given, RECIPES["small"](), fresh=True)
    assert odd[:2] == ["image size 64, not 128", "image tokens 64, not 256"]


def test_one_process_at_a_time(copied):
    cell = copied.find(TWO)
    with held(copied, cell), pytest.raises(QualityError, match=f"process {os.getpid()} on "):
        run_cell(copied, cell, again=True)


def test_several_drawings_of_a_layout_are_averaged(small):
    engine = Engine.from_pretrained(small / "start" / "model")
    once, thrice = (score.Sizes(test=6, varied=2, drawings=n) for n in (1, 3))
    first = score.tables(engine, once, 0, score.PLAIN)
    found = score.tables(engine, thrice, 0, score.PLAIN)
    l2i = found.pop("l2i")
    assert {k: v for k, v in first.items() if k != "l2i"} == found
    assert len(l2i["each"]["ap"]) == 3 and l2i["each"]["ap"][0] == first["l2i"]["ap"]
    assert l2i["ap"] == pytest.approx(sum(l2i["each"]["ap"]) / 3)
    assert l2i["fd_vq"] == first["l2i"]["fd_vq"] and "interval95" not in l2i
    tables = [{"ap": x, "acc50": 0.5, "interval95": {}} for x in (0.2, 0.4, 0.9)]
    assert score.over_drawings(tables)["ap"] == pytest.approx(0.5)


def test_the_plateau_begins_where_stage_1_was_continued_longest():
    known = cells([1])
    begun = "ablation-seconds3-seed1"
    arms = ("stage1", "stage2", "samples", "seconds3")
    assert {known[f"plateau-{arm}-seed1"].parent for arm in arms} == {begun}
    assert known["plateau-stage3-seed1"].parent == "plateau-stage2-seed1"
    spends = known["plateau-seconds3-seed1"]
    assert spends.budget == ("plateau-stage2-seed1", "plateau-stage3-seed1")
    assert spends.pace == "plateau-samples-seed1"


def test_the_plateau_is_run_and_evaluated(copied):
    """From a model that says it is of stage 2, since stage 1 was continued as stage 2 without its
    loop."""
    wanted = [copied.find(f"plateau-{arm}-seed0") for arm in ("stage1", "samples")]
    assert run_all(copied, wanted) == {}
    begun = read_record(copied.results, "ablation-seconds3-seed0")
    assert begun is not None
    for cell in wanted:
        record = read_record(copied.results, cell.name)
        assert record is not None and copied.state(cell) == ("done", "")
        assert record["start"]["cell"] == begun["cell"]
        assert record["start"]["fingerprint"] == begun["model"]
        assert record["start"]["stages"] == ["pmtp", "djo"]
        assert len(record["evaluation"]["plain"]["l2i"]["each"]["ap"]) == 2
    table = report.make(copied.results, [0])["plateau"]
    assert table["drawings"] == [2] and table["differences"][0]["seeds"] == []


def test_layouts_are_drawn_several_times_but_where_cells_were_recorded_before(tmp_path):
    for recipe, others in ((RECIPE, 8), (replace(RECIPE, name="tiny"), 1)):
        lab = Lab(recipe, tmp_path, tmp_path, (0,), "tiny-stage1")
        draw = [cell for cell in lab.cells.values() if cell.task != "i2l"]
        drawn = {cell.table: lab.sizes(cell).drawings for cell in draw}
        assert drawn.pop("plateau") == 8 and set(drawn.values()) == {others}


def test_the_arm_of_stage_3s_seconds_has_its_weights_chosen_as_stage_3_has(tmp_path):
    lab = Lab(RECIPES["tiny"](), tmp_path, tmp_path, (0,), "tiny-stage1")
    chosen = {cell.stem: lab.sizes(cell).choosing for cell in lab.cells.values()}
    assert chosen.pop("plateau-seconds3") == lab.recipe.cycle_rl.val_drawings == 8
    assert set(chosen.values()) == {0}


def test_finished_cells_draw_layouts_behind_those_of_the_tables(small, copied):
    one = "ablation-stage1-seed0"
    shutil.rmtree(copied.models / TWO / "model")
    told = {name: fresh.measure(copied, copied.find(name), 3) for name in (one, TWO, THREE)}
    assert told[one] is None and told[THREE] is None
    assert told[TWO] == f"{TWO}: left out, its model, as recorded, is not in {copied.models}"
    assert fresh.measure(copied, copied.find("synergy-i2l-seed0"), 3).endswith("does not draw")
    assert fresh.measure(copied, copied.find("mask-shared-seed0"), 3).endswith("not finished")
    assert fresh.differences(copied.results, [0]) == {}  # no pair of a table is there
    shutil.copytree(small / "start" / "model", copied.models / TWO / "model")
    assert fresh.measure(copied, copied.find(TWO), 3) is not None  # another model
    found = json.loads((copied.results / "fresh" / f"{THREE}.json").read_text())
    scenes, first = score.load_scenes("test", 7), copied.sizes(copied.find(THREE)).test
    assert first == 4 and found["count"] == 3
    engine = Engine.from_pretrained(copied.models / THREE / "model")
    wanted = [
        score.drawing(engine, scenes[4:], layouts_of(scenes[4:], 0), 0, score.PLAIN, i)
        for i in range(fresh.DRAWINGS)
    ]
    assert found["l2i"] == score.over_drawings(wanted)


def test_differences_on_further_layouts(copied):
    for name in ("ablation-stage1-seed0", TWO):
        assert fresh.measure(copied, copied.find(name), 3) is None
    (row,) = fresh.differences(copied.results, [0])["ablation"]
    two, one = (
        json.loads((copied.results / "fresh" / f"{name}.json").read_text())["l2i"]
        for name in (TWO, "ablation-stage1-seed0")
    )
    assert row["what"] == "stage 2 − stage 1" and row["layouts"] == [(4, 6)]
    assert row["measures"]["judge IoU"]["values"] == [two["judge_iou"] - one["judge_iou"]]
    text = fresh.section(fresh.differences(copied.results, [0]))
    assert "(test layouts 4 … 6)" in text and "| stage 2 − stage 1 | 1 |" in text
    assert fresh.section({}) == ""
    path = copied.results / "fresh" / f"{TWO}.json"
    whole = json.loads(path.read_text())
    path.write_text("{}")
    with pytest.raises(QualityError, match="not as it was written"):
        fresh.differences(copied.results, [0])
    path.write_text(json.dumps(whole | {"model": "old"}))
    assert fresh.differences(copied.results, [0]) == {}  # of a model before --again
    path.write_text(json.dumps(whole | {"first": 7}))
    assert fresh.differences(copied.results, [0]) == {}  # of other layouts
    assert fresh.measure(copied, copied.find(TWO), 3) is None  # again, then
    assert json.loads(path.read_text()) == whole
    assert fresh.measure(copied, copied.find(TWO), 3) == f"{TWO}: drawn already"


def test_diversity(small):
    engine = Engine.from_pretrained(small / "start" / "model")
    layouts = layouts_of(score.load_scenes("test", 4), 0)
    same = score.diversity(engine, layouts, 3, 0, Sampling(temperature=0.0))
    assert same["distinct_codes"] == 1 and same["pixel_distance"] == pytest.approx(0, abs=1e-6)
    varied = score.diversity(engine, layouts, 3, 0, score.PLAIN)
    assert 1 < varied["distinct_codes"] <= 3 and 0 < varied["pixel_distance"] < 1


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A GPU that is not there (see `away`), with the models that were loaded for it; its steps are
    waited for by `torch.cuda.synchronize`, which is noted among them."""
    usual, to, noted = Engine.from_pretrained, nn.Module.to, []

    def load(model: str | Path, device: str | torch.device = "cpu") -> Engine:
        engine = usual(model)
        if is_away(device):
            for module in (engine.transformer, engine.vq, engine.siglip):
                send(module)
            engine.refresh()
            noted.append(engine)
        return engine

    def move(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if not (args and args[0] == AWAY):
            return to(module, *args, **kwargs)
        send(module)
        return module

    dense = lambda batch, x: additive_mask(visibility(batch), x.dtype)  # noqa: E731
    here = lab_module.environment
    named = lambda device: here() | {"device": "a GPU" if is_away(device) else device}  # noqa: E731
    monkeypatch.setattr(passes, "attention_mask", dense)  # without FlexAttention
    monkeypatch.setattr(Engine, "from_pretrained", load)
    monkeypatch.setattr(nn.Module, "to", move)
    monkeypatch.setattr(lab_module, "environment", named)
    monkeypatch.setattr(torch.cuda, "synchronize", noted.append)
    with Machine(), torch.serialization.safe_globals([Away]):  # of states
        yield noted


@pytest.mark.parametrize("name", ["mask-isolated-seed0", TWO])
def test_a_cell_is_trained_and_evaluated_on_a_gpu(small, tmp_path, gpu, name, monkeypatch):
    monkeypatch.setattr(declared, "STEPS", {"small": {"pmtp": 400, "djo": 400}})  # two
    monkeypatch.setattr(score, "GRID", ())
    lab = replace(make_lab(small, tmp_path), device="cuda")
    run_cell(lab, lab.find(name))
    record = read_record(lab.results, name)
    assert record is not None and record["environment"]["device"] == "a GPU"
    assert record["clock"] == "seconds" and device(record) == "a GPU"
    trained, evaluated = (x for x in gpu if isinstance(x, Engine))
    assert trained.device == evaluated.device == AWAY
    assert [x for x in gpu if not isinstance(x, Engine)] == [AWAY] * record["steps"]


def test_a_run_that_began_on_another_device_is_not_gone_on_with(small, tmp_path, monkeypatch):
    lab, cell = make_lab(small, tmp_path), cells([0])[TWO]
    monkeypatch.setattr(processes, "save_state", lives(processes.save_state, 1))
    with pytest.raises(KeyboardInterrupt):
        run_cell(lab, cell)
    lab.environment = lab.environment | {"device": "a GPU"}
    with pytest.raises(QualityError, match=r"began on cpu, and this is a GPU; .* --again"):
        run_cell(lab, cell)


def lives(work: Callable[..., Any], times: int) -> Callable[..., Any]:
    """The work, until it has been done so often; then Ctrl-C."""
    left = iter(range(times))

    def once(*arguments: Any, **named: Any) -> Any:
        work(*arguments, **named)
        if next(left, None) is None:
            raise KeyboardInterrupt
        return None

    return once


def test_seconds_on_a_gpu_are_those_of_the_clock(small, tmp_path):
    lab = make_lab(small, tmp_path)
    cell = lab.find("ablation-seconds2-seed0")

    def keep(stem: str, **told: Any) -> None:
        made = hand_made(f"ablation-{stem}-seed0", 0.5) | {"cpu_seconds": 1.0, "steps": 4} | told
        made["settings"]["config"] = {"loop": {"bf16": False}}
        write_record(lab.results, made, None)

    there = {"clock": "seconds", "trained_in": [{"commit": "1", "device": "a GPU"}]}
    keep("stage2", seconds=12.0, **there)
    keep("samples", seconds=8.0, **there)
    assert lab.steps(cell) == 6
    with pytest.raises(QualityError, match=r"in float32, and .*stage2-seed0 in float32 on a GPU"):
        lab.check_pace(cell)  # which would be run on a CPU
    lab.environment = lab.environment | {"device": "a GPU"}
    lab.check_pace(cell)
    keep("samples", seconds=8.0)
    with pytest.raises(QualityError, match="ablation-samples-seed0 in float32, "):
        lab.check_pace(cell)
    table = report.make(lab.results, (0,))["ablation"]
    rows = {row["stem"]: row["spent"]["cpu_seconds"]["mean"] for row in table["rows"]}
    assert rows["ablation-stage2"] is None and rows["ablation-samples"] == 1
    (note,) = (x for x in table["notes"] if "a GPU" in x)
    assert "seconds of steps (wall)" in note and note.endswith(": ablation-stage2-seed0")
    assert "| 4 | 28800 | 0 | 12 | – |" in report.markdown({"ablation": table})


# --- the report -----------------------------------------------------------------------------------


def test_plots_and_contact_sheet(finished, tmp_path):
    pytest.importorskip("matplotlib")
    lab = finished[0]
    tables = report.make(lab.results, [0])
    assert pictures.plot("mask", tables["mask"], tmp_path) is None
    drawn = pictures.plot("ablation", tables["ablation"], tmp_path)
    assert drawn is not None and Image.open(drawn).size[0] > 400
    assert pictures.contact_sheet(lab, tmp_path / "sheet.png") is None
    sheet = torch.tensor(list(Image.open(tmp_path / "sheet.png").convert("L").tobytes()))
    assert sheet.float().std() > 10
    lab = replace(lab, models=tmp_path)
    why = pictures.contact_sheet(lab, tmp_path / "none.png")
    assert why is not None and "ablation-stage2" in why


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def command(
    small: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """``command("--list", …)``: exit code, stdout, stderr of the command on the small recipe."""
    monkeypatch.setattr("echogen.train.recipes.RECIPES", {"small": lambda: RECIPE})

    def call(*argv: object) -> tuple[int, str, str]:
        capfd.readouterr()
        words = ["bench", "quality", "--recipe", "small", "--seeds", 1, "--start", small / "start"]
        code = main([str(a) for a in [*words, *argv]])
        return code, *capfd.readouterr()

    return call


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--cell", "ablation-stage9-seed0"), "--cell ablation-stage9-seed0: unknown; --list"),
        (("--cell", "ablation-stage2-seed1"), "--cell ablation-stage2-seed1: unknown"),
        (
            ("--table", "depth"),
            "--table depth: unknown; choose ablation, plateau, mask, synergy, rl-data",
        ),
        (("--scale", "0.01"), "--scale 0.01: name another --out"),
        (("--scale", "2", "--out", "x"), "--scale 2.0: it must be above 0 and at most 1"),
        (("--seeds", "0"), "--seeds 0"),
        (("--recipe", "huge"), "--recipe huge: unknown; choose small"),
        (("--again",), "--again: name what to run again"),
        (("--list", "--report"), "choose one"),
        (("--fresh", "9", "--report"), "choose one"),
        (("--fresh", "1"), "--fresh 1: it must be in 2"),
        (("--fresh", "9", "--cell", TWO, "--again"), "--again: name what to run again"),
        (("--llm-layouts", "no.jsonl"), "--llm-layouts no.jsonl: no such file"),
        (("--device", "cuda:7"), "--device cuda:7: PyTorch sees 0 CUDA devices; use cpu"),
    ],
)
def test_bad_names_and_numbers_are_refused(command, argv, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, out, err = command(*argv)
    assert code == 2 and not out and words in err and len(err.splitlines()) == 1


def test_cuda_is_the_current_gpu(command, tmp_path, monkeypatch):
    """Which `torch.cuda.set_device` does not take, without its number."""
    here = lab_module.environment
    monkeypatch.setattr(lab_module, "environment", lambda device: here() | {"device": device})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    where = ("--out", tmp_path / "out", "--models", tmp_path / "models")
    code, out, err = command("--device", "cuda", "--list", *where)
    assert code == 0 and TWO in out, err


def test_a_recipe_without_a_start_says_how_to_make_one(capfd, tmp_path):
    where = ["--recipe", "small", "--out", str(tmp_path / "out"), "--models", str(tmp_path)]
    assert main(["bench", "quality", *where]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "`echogen train vq --recipe small --out VQ`" in line and "--start RUN" in line
    assert main(["bench", "quality", *where, "--list"]) == 0


def test_list_report_and_run(command, finished, tmp_path):
    shutil.copytree(finished[0].results, tmp_path / "results")
    shutil.copytree(finished[0].models, tmp_path / "models")
    where = ("--out", tmp_path / "results", "--models", tmp_path / "models", "--scale", SCALE)
    code, out, err = command("--list", "--json", *where)
    states = {name: s["state"] for name, s in json.loads(out.splitlines()[-1])["cells"].items()}
    assert code == 0, err
    assert states[TWO] == states[THREE] == "done" and states["mask-shared-seed0"] == "missing"
    assert states["rl-data-llm-seed0"] == "blocked"
    code, out, err = command("--cell", TWO, "--json", *where)
    assert code == 0 and json.loads(out.splitlines()[-1])["cells"] == {TWO: "done"}
    assert json.loads((tmp_path / "results" / "tables.json").read_text())["ablation"]["rows"]
    code, out, err = command("--report", *where)
    assert code == 0 and "# Quality experiments" in out and "(n = 1)" in out
    written = {p.name for p in (tmp_path / "results").iterdir()}
    assert written >= {"README.md", "tables.json", "contact_sheet.png"}
    assert json.loads((tmp_path / "results" / "tables.json").read_text())["ablation"]["missing"]
    named = ("--cell", TWO, "--cell", "ablation-stage1-seed0")
    code, out, err = command("--fresh", "3", *named, "--json", *where)
    assert code == 0, err
    (row,) = json.loads(out.splitlines()[-1])["ablation"]
    assert row["seeds"] == 1 and "## Differences on further test layouts" in out
    assert "| stage 2 − stage 1 | 1 |" in (tmp_path / "results" / "README.md").read_text()
    (tmp_path / "results" / f"{TWO}.json").write_text("{")
    code, out, err = command("--report", *where)
    assert code == 2 and "not valid JSON" in err


def test_a_run_ends_with_the_tables_of_all_seeds_that_are_there(command, finished, tmp_path):
    shutil.copytree(finished[0].results, tmp_path / "results")
    write_record(tmp_path / "results", hand_made("ablation-stage1-seed2", 0.5), None)
    where = ("--out", tmp_path / "results", "--models", tmp_path / "models", "--scale", SCALE)
    code, out, err = command("--cell", "ablation-stage1-seed0", *where)
    page = tmp_path / "results" / "README.md"
    assert code == 0 and out.splitlines()[-1] == f"tables of the finished cells written to {page}"
    assert "| stage 1 | 0, 2 |" in page.read_text() and "no contact sheet was made" in err
    page.unlink()
    llm = tmp_path / "llm.jsonl"
    llm.write_text("{\n")
    code, out, err = command("--cell", "rl-data-llm-seed0", "--llm-layouts", llm, *where)
    assert code == 2 and "llm.jsonl" in err and page.is_file()  # whatever failed
