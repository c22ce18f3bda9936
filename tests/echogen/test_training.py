"""The train commands: what they hand to the step loop, and which tokenizers they accept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import echogen
from echogen.commands import run_folder as run_folder_module
from echogen.commands.output import InputError
from echogen.commands.run_folder import run_folder
from echogen.commands.training import load_vq
from echogen.engine.decoding.sampler import Sampling
from echogen.engine.engine import Engine
from echogen.engine.layout import Layout
from echogen.train.config import to_json
from echogen.train.data.samples import Sample
from echogen.train.recipes import janus_pro_1b, tiny
from echogen.train.run.checkpoint import StateError
from echogen.train.run.loop import BeginRefused
from echogen.train.stages.pmtp import new_model
from echogen.train.start import RECORD, check_shape, write_record


@pytest.fixture
def vq(model, tmp_path):
    """Folder of a random image tokenizer for a transformer of width 32."""
    Engine.from_pretrained(model).vq.save_pretrained(tmp_path / "vq")
    return tmp_path / "vq"


def test_train_vq_runs_the_recipe(run, tmp_path, monkeypatch):
    calls = []

    class Stage:
        name = "vq"

        def __init__(self, config, width):
            self.config = config
            calls.append((config.loop.steps, config.codes, width, config.batch))

    def loop(stage, config, folder, resume):
        calls.append((config.steps, folder, resume))
        (folder / "state.pt").write_text("")
        (folder / "metrics.jsonl").write_text('{"step": 7, "loss": 0.5}\n{"step": 7, "val": 1}\n')

    monkeypatch.setattr("echogen.train.stages.vq.VQStage", Stage)
    monkeypatch.setattr("echogen.train.run.loop.run", loop)
    out = tmp_path / "runs" / "vq"
    done = run("train", "vq", "--out", out, "--steps", "7", "--json")
    assert done.code == 0, done.err
    assert calls == [(7, 1024, tiny().pmtp.width, tiny().vq.batch), (7, out, False)]
    assert done.data["step"] == 7 and done.data["loss"] == 0.5 and done.data["val"] == 1
    assert run("train", "vq", "--out", out, "--steps", "7").refused("--resume")
    assert run("train", "vq", "--out", out, "--steps", "7", "--resume").code == 0
    assert calls[-1] == (7, out, True)
    assert run("train", "vq", "--out", tmp_path / "more", "--batch", "3").code == 0
    assert calls[-2][3] == 3
    assert run("train", "vq", "--out", tmp_path / "none", "--batch", "0").refused("--batch 0")
    assert run("train", "vq", "--out", out / "state.pt").refused("is a file")


@pytest.fixture
def handed_on(monkeypatch):
    """The stages and the loop replaced by what records their arguments."""
    calls = {}

    def stage(name):
        def made(config, start):
            calls.update(config=config, stages=start.stages)
            return type("Stage", (), {"name": name, "config": config})()

        return made

    def loop(stage, config, folder, resume):
        calls.update(name=stage.name, steps=config.steps, resume=resume)
        if "refuse" in calls:
            raise BeginRefused("it would do harm; or --force")
        (folder / "state.pt").write_text("")
        (folder / "metrics.jsonl").write_text('{"step": 3, "loss": 0.5}\n')

    monkeypatch.setattr("echogen.train.stages.pmtp.PMTPStage", stage("pmtp"))
    monkeypatch.setattr("echogen.train.stages.djo.DJOStage", stage("djo"))
    monkeypatch.setattr("echogen.train.stages.cycle_rl.CycleRLStage", stage("cycle-rl"))
    monkeypatch.setattr("echogen.train.run.loop.run", loop)
    return calls


def test_train_pmtp_goes_on_from_its_own_model(run, model, tmp_path, handed_on):
    begin = ("train", "pmtp", "--out", tmp_path / "on")
    assert run(*begin).refused("--vq", "--from")
    assert run(*begin, "--vq", model, "--from", model).refused("name one of --vq")
    assert run(*begin, "--pretrained", model, "--from", model).refused("--pretrained")
    write_record(model, ("pmtp",))
    try:
        done = run(*begin, "--from", model, "--any-shape", "--steps", "3")
        assert done.code == 0, done.err
        assert handed_on["stages"] == ("pmtp",) and handed_on["steps"] == 3
        assert handed_on["config"].scenes == tiny().pmtp_on.scenes
    finally:
        (model / RECORD).unlink()


def test_train_pmtp_begins_with_a_checkpoint_of_no_stage(run, model, tmp_path, handed_on):
    begin = ("train", "pmtp", "--any-shape", "--out", tmp_path / "new")
    done = run(*begin, "--pretrained", model, "--steps", "3")
    assert done.code == 0, done.err
    assert handed_on["stages"] == () and handed_on["config"].scenes == tiny().pmtp.scenes
    away = run("train", "pmtp", "--out", tmp_path / "no", "--pretrained", tmp_path / "nowhere")
    assert away.refused("no such folder")
    write_record(model, ("pmtp",))
    try:
        again = run("train", "pmtp", "--out", tmp_path / "no", "--pretrained", model)
        assert again.refused("comes from stage pmtp", "--from")
    finally:
        (model / RECORD).unlink()


def begun(out, config):
    """A folder as a run leaves it that was killed behind its first state."""
    out.mkdir()
    (out / "state.pt").write_text("")
    (out / "config.json").write_text(json.dumps(to_json(config)))
    return out


def test_other_settings_are_refused_before_anything_is_loaded(run, tmp_path, monkeypatch):
    recipe, loaded = tiny(), []
    monkeypatch.setattr("echogen.commands.training.load_vq", lambda *a: loaded.append(a))
    pmtp = replace(recipe.pmtp, loop=replace(recipe.pmtp.loop, steps=2), batch=8)
    out = begun(tmp_path / "run", pmtp)
    (tmp_path / "config.json").write_text("{}")
    again = ("--out", out, "--resume", "--vq", tmp_path, "--batch", "8")
    asked = run("train", "pmtp", *again, "--steps", "5", "--float32")
    assert asked.refused(
        f"--out {out}", "loop.steps 2 → 5", "loop.bf16 True → False", "same recipe"
    )
    assert run("train", "pmtp", *again, "--steps", "2", "--ema", "0.5").refused(
        "loop.ema None → 0.5"
    )
    other = run("train", "pmtp", *again, "--recipe", "small")
    assert other.refused("loop.lr 0.002 → 0.001", " more)")
    stage = run("train", "vq", "--out", out, "--resume")
    assert stage.refused(f"--out {out}", "is no setting of this stage")
    assert not loaded


def test_what_says_how_a_step_is_computed_may_differ_on_resume(run, model, tmp_path, handed_on):
    write_record(model, ("pmtp",))
    djo = tiny().djo
    out = begun(tmp_path / "run", replace(djo, loop=replace(djo.loop, accumulate=2), start="abc"))
    again = ("train", "djo", "--from", model, "--any-shape", "--out", out, "--resume")
    try:
        assert run(*again, "--accumulate", "4", "--checkpoint-activations").code == 0
        (out / "config.json").write_text("torn")  # nothing reads it but people and this check
        assert run(*again, "--steps", "3").code == 0
        (out / "config.json").write_text(json.dumps(to_json(djo)))
        (out / "state.pt").unlink()  # killed before its first state: it begins anew
        assert run(*again, "--steps", "3").code == 0
    finally:
        (model / RECORD).unlink()


def test_two_runs_do_not_write_one_folder(run, tmp_path, monkeypatch):
    out, probe = tmp_path / "run", "import time, sys; from pathlib import Path\n"
    probe += "from echogen.commands.run_folder import run_folder\n"
    probe += "with run_folder(Path(sys.argv[1])):\n print(flush=True); time.sleep(600)"
    begin, loaded = ("train", "vq", "--out", out), []
    monkeypatch.setattr("echogen.train.stages.vq.VQStage", lambda *a: loaded.append(a))
    env = os.environ | {"PYTHONPATH": str(Path(echogen.__file__).parents[1])}
    command = [sys.executable, "-c", probe, str(out)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"\n"
            for asked in (begin, (*begin, "--resume")):
                assert run(*asked).refused(f"--out {out}", f"process {other.pid} on ", "another")
            monkeypatch.setenv("RANK", "1")  # whose run's first process holds the folder
            assert run(*begin, "--resume").refused("holds no run to resume")
            monkeypatch.setenv("RANK", "0")
        finally:
            other.kill()
    assert (out / "lock").exists() and not loaded
    assert run(*begin, "--resume").refused("holds no run to resume")  # the dead hold nothing
    with run_folder(out):
        assert (out / "lock").read_text().startswith(f"{os.getpid()} on ")
    assert not (out / "lock").exists()


def test_a_lock_that_was_removed_while_it_was_waited_for_is_not_taken(tmp_path, monkeypatch):
    path, flock, seen = tmp_path / "lock", run_folder_module.fcntl.flock, []

    def late(file, how):
        if not seen:
            path.unlink()  # by its holder, who ends between our opening it and our locking it
        seen.append(flock(file, how))

    monkeypatch.setattr(run_folder_module.fcntl, "flock", late)
    with run_folder_module.held(tmp_path, "--out"):
        assert path.exists() and len(seen) == 2


def test_a_refused_run_leaves_no_folder(run, model, tmp_path, handed_on):
    out = tmp_path / "runs" / "rl"
    handed_on["refuse"] = True
    begin = ("train", "cycle-rl", "--from", model, "--any-stage", "--any-shape", "--out")
    assert run(*begin, out).refused("it would do harm")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()
    assert run(*begin, tmp_path / "mine").refused("it would do harm")
    assert list((tmp_path / "mine").iterdir()) == []  # it was there before


def test_sigterm_before_the_first_step_is_answered(tmp_path):
    """While data is made, by workers that the signal may reach too."""
    out, script = tmp_path / "runs" / "vq", tmp_path / "train.py"
    script.write_text(
        "import os, sys, time\n"
        "from echogen.cli import main\n"
        "from echogen.train.data import scenes\n"
        "def slow(split, indices):\n"
        "    os.write(1, b'drawing\\n')\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    scenes._CHUNK, scenes._draw, os.cpu_count = 8, slow, lambda: 2\n"
        "    sys.exit(main(['train', 'vq', '--float32', '--out', sys.argv[1]]))\n"
    )
    root = str(Path(echogen.__file__).parents[1])
    env = os.environ | {"PYTHONPATH": root, "ECHOGEN_CACHE": str(tmp_path / "cache")}
    for whom in (os.kill, os.killpg):
        with subprocess.Popen(
            [sys.executable, str(script), str(out)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as asked:
            try:
                assert asked.stdout.readline() == "drawing\n"
                whom(asked.pid, signal.SIGTERM)
                _, told = asked.communicate(timeout=30)
            finally:
                asked.kill()
        *_, last = told.splitlines()
        assert last.startswith("echogen: train: stopped by SIGTERM while starting up")
        assert "Traceback" not in told and asked.returncode == 143
        assert not out.parent.exists()  # nothing was written there


def test_train_djo_begins_with_stage_one(run, model, tmp_path, handed_on):
    out = tmp_path / "djo"
    begin = ("train", "djo", "--from", model, "--any-shape", "--out", out)
    assert run(*begin).refused("names no stage", "pmtp")
    assert not out.exists()
    write_record(model, ("pmtp",))
    try:
        done = run(*begin, "--steps", "3", "--json")
        assert done.code == 0, done.err
        assert done.data["stage"] == "djo" and done.data["loss"] == 0.5
        assert handed_on["stages"] == ("pmtp",) and handed_on["steps"] == 3
        assert handed_on["config"].tau_end == tiny().djo.tau_end
        assert run(*begin).refused("--resume")
        assert run(*begin, "--resume").code == 0
        assert handed_on["resume"]
        away = run("train", "cycle-rl", "--from", model, "--out", tmp_path / "rl")
        assert away.refused("comes from stage pmtp", "one from djo", "--any-stage")
    finally:
        (model / RECORD).unlink()


def test_stages_one_and_two_take_a_folder_of_pictures(run, model, tmp_path, handed_on):
    mine, layout = tmp_path / "mine", ("--any-shape", "--out", tmp_path / "run")
    write_record(model, ("pmtp",))
    try:
        for stage in ("pmtp", "djo"):
            begin = ("train", stage, "--from", model, *layout)
            mine.mkdir()
            assert run(*begin, "--data", mine).refused(f"--data {mine}", "no layouts.jsonl there")
            (mine / "layouts.jsonl").write_text("")
            done = run(*begin, "--data", mine)
            assert done.code == 0, done.err
            assert handed_on["config"].data == str(mine)
            twice = run(*begin, "--resume", "--data", mine, "--set", "data=else")
            assert twice.refused("--data makes data ")
            assert run(*begin, "--resume", "--data", "").refused("--data is empty; name a folder")
            scenes = run(*begin, "--resume", "--data", mine, "--set", "scenes=7")
            assert scenes.refused("--set scenes=7: these are ShapesWorld's")
            config = replace(handed_on["config"], data_hash="abc")
            (tmp_path / "run" / "config.json").write_text(json.dumps(to_json(config)))
            assert run(*begin, "--data", f"{mine}/", "--resume").code == 0
            assert run(*begin, "--resume").refused(f"data {mine} → None")
            shutil.rmtree(tmp_path / "run")
            shutil.rmtree(mine)
    finally:
        (model / RECORD).unlink()


def test_a_recipe_is_for_models_of_its_shape(run, model, tmp_path, handed_on):
    out = ("--out", tmp_path / "run")
    away = run("train", "djo", "--recipe", "janus_pro_1b", "--from", "tiny-stage1", *out)
    assert away.refused(
        "tiny-stage1: this model has width 192, layers 6, heads 3, mlp_width 512, codes 1024, "
        "image_size 64, and recipe janus_pro_1b is for width 2048, layers 24, heads 16",
        "image_size 384; take --recipe tiny (--any-shape",
    )
    small = ("train", "cycle-rl", "--recipe", "small", "--from", "tiny", "--any-stage", *out)
    assert run(*small).refused("recipe small is for width 512", "take --recipe tiny")
    on = ("train", "pmtp", "--from", "tiny-stage1", *out)
    assert run(*on, "--recipe", "small").refused("recipe small is for width 512", "--recipe tiny")
    wider = run(*on, "--set", "width=384")
    assert wider.refused(
        "this model has width 192, and recipe tiny is for width 384; leave width as the recipe has "
        "it (--any-shape"
    )
    for asked, its in (("bins=33", 65), ("rope_theta=500", 1000.0)):
        name = asked.partition("=")[0]
        other = run(*on, "--set", asked)
        assert other.refused(f"--set {name}=", f"tiny-stage1 has {its}, and only fresh weights")
    own = run("train", "pmtp", "--pretrained", model, *out)
    assert own.refused("has width 32, layers 1,", "codes 32, and", "no recipe has its shape")
    assert "image_size" not in own.err and not handed_on  # which is tiny's
    shape = ("--set", "width=32", "--set", "layers=1", "--set", "heads=2", "--set", "mlp_width=48")
    assert run("train", "pmtp", "--pretrained", model, *shape, *out).refused("has codes 32, and")
    assert not (tmp_path / "run").exists()
    for stage, start in (("djo", "tiny-stage1"), ("pmtp", "tiny-stage1"), ("cycle-rl", "tiny")):
        done = run("train", stage, "--from", start, "--out", tmp_path / stage)
        assert done.code == 0, done.err
        assert handed_on["name"] == stage


def test_a_pretrained_janus_has_the_shape_of_its_recipe():
    """Of the checkpoint's own config.json."""
    c = SimpleNamespace(
        width=2048, layers=24, heads=16, mlp_width=5632, codebook_size=16_384, image_size=384
    )
    start = SimpleNamespace(engine=SimpleNamespace(transformer=SimpleNamespace(config=c)))
    check_shape(start, "deepseek-community/Janus-Pro-1B", janus_pro_1b())
    with pytest.raises(StateError, match="take --recipe janus_pro_1b"):
        check_shape(start, "runs/pmtp", tiny())


def test_train_cycle_rl_takes_layouts_and_says_why_it_will_not_begin(
    run, model, layout, tmp_path, handed_on
):
    begin = ("train", "cycle-rl", "--from", model, "--any-stage", "--any-shape", "--out")
    file = tmp_path / "layouts.jsonl"
    file.write_text(Layout.load(layout).dumps() + "\n")
    for i, source in enumerate(("real", "random", file)):
        done = run(*begin, tmp_path / str(i), "--layouts", source)
        assert done.code == 0, done.err
        assert handed_on["config"].layouts == str(source) and not handed_on["config"].force
    assert run(*begin, tmp_path / "3", "--layouts", "nowhere.jsonl").refused("no such file")
    others = run(*begin, tmp_path / "3", "--layouts", "random", "--set", "scenes=7")
    assert others.refused("--set scenes=7: these are ShapesWorld's", "--layouts random")
    assert run(*begin, tmp_path / "3", "--force").code == 0 and handed_on["config"].force
    handed_on["refuse"] = True
    assert run(*begin, tmp_path / "4").refused("it would do harm", "--force")


def test_an_image_tokenizer_goes_with_any_width(vq):
    loaded, config = load_vq(vq), replace(tiny().pmtp, width=96, layers=1, heads=4, mlp_width=32)
    assert loaded.config.num_embeddings == 32
    seen = Sample(np.zeros(16), "a red circle", [(0, 0, 1, 1)], [("a red circle",)])
    made = new_model(config, loaded, [seen])
    assert made.transformer.config.width == 96 and made.config.vq_config.projection_dim == 96


def test_load_vq_refuses_what_is_damaged(vq):
    weights = vq / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="does not load"):
        load_vq(vq)


def test_load_vq_refuses_another_model(model):
    with pytest.raises(InputError, match="no whole image tokenizer"):
        load_vq(model)


def test_refresh_forgets_the_old_weights(model, layout):
    engine, sampling = Engine.from_pretrained(model), Sampling(temperature=0, cfg=3.0)
    asked = [Layout.load(layout)]
    before = engine.generate_codes(asked, sampling=sampling)
    with torch.no_grad():
        for parameter in engine.transformer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    engine.refresh()
    parts = (engine.config, engine.transformer, engine.vq, engine.siglip, engine.prompts)
    fresh = Engine(*parts).generate_codes(asked, sampling=sampling)
    assert torch.equal(engine.generate_codes(asked, sampling=sampling), fresh)
    assert not torch.equal(before, fresh)


def test_engine_survives_saving(model, layout, tmp_path):
    first = Engine.from_pretrained(model)
    first.save_pretrained(tmp_path / "again")
    again = Engine.from_pretrained(tmp_path / "again")
    assert again.sampling == first.sampling
    assert again.prompts.codec.name == "location"
    assert not again.pixels_trained
    asked = Layout.load(layout)
    codes = [e.generate_codes([asked] * 2, seed=5) for e in (first, again)]
    assert torch.equal(*codes)
    assert first.ground_codes(codes[0], [["a star"]] * 2) == again.ground_codes(
        codes[0], [["a star"]] * 2
    )
    meta = json.loads(Path(tmp_path, "again", "echogen.json").read_text())
    assert meta["codec"] == {"name": "location", "bins": 33}


def test_a_run_is_placed_on_the_device_asked_for(run, model, vq, tmp_path, handed_on, monkeypatch):
    begin = ("train", "djo", "--from", model, "--any-stage", "--any-shape")
    begin += ("--out", tmp_path / "djo")
    assert run(*begin, "--device", "gpu").refused("--device gpu", "cuda:N")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert run(*begin, "--device", "cuda").refused("PyTorch sees 0 CUDA devices")
    assert not (tmp_path / "djo").exists()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    placed: list[str] = []
    monkeypatch.setattr("torch.cuda.set_device", placed.append)
    asked = []
    monkeypatch.setattr("echogen.train.start.load_start", lambda *a, **k: asked.append((a, k)))

    def stage(config, start):
        return SimpleNamespace(name="djo", config=config)

    monkeypatch.setattr("echogen.train.stages.djo.DJOStage", stage)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert run(*begin, "--device", "cuda").code == 0
    assert asked[-1][0][-1] == "cuda:3" == placed[-1]
    assert run(*begin, "--device", "cuda:1", "--resume").code == 0
    assert asked[-1][0][-1] == "cuda:1"
    meta = load_vq(vq, "meta")
    assert all(p.is_meta for p in meta.parameters())


def test_what_evaluations_need_is_missed_before_the_first_step(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "echogen.train.stages.vq.VQStage",
        lambda config, *_: SimpleNamespace(config=config, name="vq"),
    )
    monkeypatch.setattr("echogen.commands.options.find_spec", lambda name: None)
    asked = run("train", "vq", "--recipe", "tiny", "--out", tmp_path / "vq", "--float32")
    assert asked.refused("pycocotools is not installed", "pip install pycocotools")
    for command in (["eval", "--model", tmp_path], ["bench", "quality", "--out", tmp_path]):
        assert run(*command).refused("pip install pycocotools")
