"""Every setting by its name: found, read as its field's type, checked, and told."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from echogen.engine.decoding.sampler import Sampling
from echogen.train.config import LoopConfig, to_json
from echogen.train.recipes import RECIPES, tiny
from echogen.train.settings import FOUND_OUT, format_value, read, settings_of, with_values

STAGES = ("vq", "pmtp", "pmtp_on", "djo", "cycle_rl")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_is_read_as_it_is_written(recipe, stage):
    config = getattr(RECIPES[recipe](), stage)
    found = settings_of(config)
    again = {name: read(s.kind, format_value(s.value)) for name, s in found.items()}
    assert again == {name: s.value for name, s in found.items()}
    assert with_values(config, again) == config
    assert "loop.seed" in found and not found.keys() & set(FOUND_OUT)


@pytest.fixture
def asked(run, model, tmp_path, monkeypatch):
    """``asked(stage, *options)``: the outcome of a train command; its ``configs`` are those that
    came to a stage."""
    configs = []

    def stage(config, *_):
        configs.append(config)
        return SimpleNamespace(name="stage", config=config)

    def loop(stage, config, folder, resume):
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')

    monkeypatch.setattr("echogen.train.stages.vq.VQStage", stage)
    monkeypatch.setattr("echogen.train.stages.djo.DJOStage", stage)
    monkeypatch.setattr("echogen.train.stages.cycle_rl.CycleRLStage", stage)
    monkeypatch.setattr("echogen.train.run.loop.run", loop)

    def call(name, *options):
        begin = () if name == "vq" else ("--from", model, "--any-stage", "--any-shape")
        return run("train", name, *begin, "--out", tmp_path / f"run{len(configs)}", *options)

    call.configs = configs
    return call


def setting(*assignments):
    return [part for text in assignments for part in ("--set", text)]


def test_what_is_set_reaches_the_stage(asked):
    loop = tiny().cycle_rl.loop
    every = setting(
        "loop.seed=3", "muon_lr=none", "betas=0.9, 0.95", "bf16=false", "loop.threads=1",
        "sampling.cfg=2", "top_k=5", "policy=image", "w_iou=1e-1", "credit=image",
    )  # fmt: skip
    done = asked("cycle-rl", *every, "--steps", "5", "--float32", "--force")
    assert done.code == 0, done.err
    assert asked.configs == [
        replace(
            tiny().cycle_rl,
            loop=replace(
                loop, seed=3, muon_lr=None, betas=(0.9, 0.95), bf16=False, threads=1, steps=5
            ),
            sampling=Sampling(cfg=2, top_k=5),
            w_iou=0.1,
            credit="image",
            force=True,
        )
    ]
    assert asked("djo", *setting("tau_end=0.5", "prefix=sampled", "loop.lora=4", "muon_lr=None",
                                 "lora_also=text_head,image_head")).code == 0  # fmt: skip
    told = asked.configs[-1]
    assert (told.tau_end, told.prefix, told.loop.muon_lr) == (0.5, "sampled", None)
    assert told.loop.lora_also == ("text_head", "image_head")
    # A name of the stage's own goes before one that is the last part of another.
    assert asked("vq", *setting("ema=0.9", "multipliers=1,2,4")).code == 0
    assert (asked.configs[-1].ema, asked.configs[-1].loop.ema) == (0.9, None)
    assert asked.configs[-1].multipliers == (1, 2, 4)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("loop.sed=1", ("--set loop.sed:", "nearest: loop.seed")),
        ("gate_gruop=4", ("--set gate_gruop:", "no setting", "nearest: gate_group")),
        ("xyzzy=1", ("--set xyzzy:", "known: loop.steps, loop.lr", "sampling.cfg")),
        ("start=abc", ("--set start:", "no setting of this stage")),
        ("group", ("--set group:", "NAME=VALUE")),
        ("group=four", ("--set group=four", "a whole number")),
        ("group=", ("--set group=", "a whole number")),
        ("loop.lr=nan", ("--set loop.lr=nan", "a number")),
        ("bf16=1", ("--set loop.bf16=1", "true or false")),
        ("betas=0.9", ("--set loop.betas=0.9", "a number,a number")),
        ("policy=images", ("--set policy=images", "image or boxes or both")),
        ("group=1", ("--set group = 1", "at least 2")),
        ("loop.seed=-1", ("--set seed = -1", "0 … 2^32 - 1")),
        ("loop.betas=0.9,1", ("--set betas = (0.9, 1.0)", "[0, 1)")),
        ("cfg=-1", ("--set cfg = -1.0", "0 or more")),
        ("layouts=nowhere.jsonl", ("--layouts nowhere.jsonl", "no such file")),
    ],
)
def test_what_cannot_be_set_is_refused_in_one_line(asked, assignment, words):
    assert asked("cycle-rl", "--set", assignment).refused(*words)
    assert not asked.configs


def test_settings_are_checked_together(asked):
    """Either alone would be refused."""
    assert asked("cycle-rl", *setting("beta=0.1", "top_k=5")).refused("set beta to 0")
    assert asked("cycle-rl", *setting("updates=4", "save_every=50")).refused("multiple")
    assert asked("cycle-rl", *setting("updates=4", "save_every=40")).code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", "5", "--set", "loop.steps=6"), ("--steps makes loop.steps 5",)),
        (("--batch", "4", "--set", "batch=2"), ("--batch makes batch 4",)),
        (("--float32", "--set", "bf16=true"), ("--float32 makes loop.bf16 false",)),
        (("--lora", "4", "--set", "muon_lr=0.1"), ("--lora makes loop.muon_lr none",)),
        (("--parallel", "ddp", "--set", "parallel=fsdp"), ("--parallel makes",)),
        (("--set", "seed=1", "--set", "loop.seed=2"), ("another --set makes loop.seed 1",)),
    ],
)
def test_a_setting_given_twice_is_given_alike(asked, options, words):
    assert asked("djo", *options).refused("--set ", "leave one of them out", *words)
    assert not asked.configs


def test_a_setting_given_twice_alike_is_taken(asked):
    assert asked("djo", "--steps", "5", *setting("steps=5", "loop.steps=5")).code == 0
    assert asked.configs[0].loop.steps == 5


def test_a_run_goes_on_with_what_was_set_for_it(asked, tmp_path):
    config, out = replace(tiny().djo, loop=replace(tiny().djo.loop, seed=1)), tmp_path / "run0"
    out.mkdir()
    (out / "state.pt").touch()
    (out / "config.json").write_text(json.dumps(to_json(config)))
    assert asked("djo", "--resume").refused("other settings (loop.seed 1 → 0)")
    other = asked("djo", "--resume", *setting("seed=1", "loop_weight=2"))
    assert other.refused("other settings (loop_weight 0.2 → 2.0)")
    assert asked("djo", "--resume", *setting("loop.seed=1", "loop.accumulate=2")).code == 0


def test_settings_are_listed(run):
    done = run("train", "settings", "cycle-rl", *setting("loop.seed=7"), "--json")
    assert done.code == 0, done.err
    rows = {line.split()[0]: line.split()[1:] for line in done.out.splitlines() if line.split()}
    assert rows["loop.seed"] == ["7", "a", "whole", "number"]
    assert rows["policy"] == ["image", "image", "or", "boxes", "or", "both"]
    assert rows.keys() >= settings_of(tiny().cycle_rl).keys()
    assert done.data["loop"]["seed"] == 7
    on = run("train", "settings", "pmtp-on", "--json")
    assert on.data["scenes"] == tiny().pmtp_on.scenes
    assert run("train", "settings", "djo", "--set", "x=1").refused("--set x: no setting")


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.0}, {"muon_lr": -1.0}, {"warmup": -1}, {"threads": 0}, {"clip": float("nan")},
     {"weight_decay": -0.1}, {"decay": 1.5}],
)  # fmt: skip
def test_a_loop_that_cannot_be_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} = "):
        LoopConfig(**{"steps": 1, "lr": 1e-3} | wrong)


@pytest.mark.parametrize(
    ("stage", "wrong"),
    [("vq", {"batch": 0}), ("vq", {"ema": 1.0}), ("vq", {"channels": 33}),
     ("vq", {"image_size": 65}), ("vq", {"multipliers": ()}), ("vq", {"multipliers": (1, 0)}),
     ("vq", {"multipliers": (1,) * 8}), ("pmtp", {"heads": 5}), ("pmtp", {"bins": 1}),
     ("pmtp", {"branches": 0}), ("pmtp", {"cfg": -1.0}), ("djo", {"batch": 0}),
     ("cycle_rl", {"scenes": 0})],
)  # fmt: skip
def test_a_stage_that_cannot_be_is_refused(stage, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} = "):
        replace(getattr(tiny(), stage), **wrong)
