"""The two trainable stages end to end at toy size: they learn, resume, and export what loads."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from echogen.engine.checkpoints.pretrained import resolve
from echogen.engine.engine import Engine
from echogen.engine.layout import Layout, LayoutObject
from echogen.train.config import LoopConfig, PMTPConfig, VQConfig
from echogen.train.data import samples, scenes
from echogen.train.data.scenes import load_scenes, world_version
from echogen.train.data.shapes import sample_scene
from echogen.train.run.checkpoint import StateError
from echogen.train.run.loop import run
from echogen.train.stages import vq as vq_module
from echogen.train.stages import world
from echogen.train.stages.passes import worth_logging
from echogen.train.stages.pmtp import PMTPStage
from echogen.train.stages.vq import (
    VQStage,
    background_nats,
    build_vq,
    disagreement,
    group_means,
    patch_groups,
)
from echogen.train.start import load_start, model_folder

from .runs import rows, run_in_parts

LOOP = LoopConfig(
    steps=6, lr=2e-3, muon_lr=4e-3, warmup=2, log_every=1, eval_every=6, save_every=2, threads=1
)
VQ_LOOP = dataclasses.replace(LOOP, muon_lr=None)
VQ = VQConfig(loop=VQ_LOOP, codes=32, latent=32, multipliers=(1, 1, 1, 1), batch=4, warmup_steps=3)
PMTP = PMTPConfig(
    loop=LOOP, width=32, layers=2, heads=2, mlp_width=64, scenes=24, batch=3, extra_grounding=2
)


@pytest.fixture(autouse=True)
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this test's own, and few validation scenes."""
    monkeypatch.setenv("ECHOGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(world, "VAL_SAMPLES", 4)
    monkeypatch.setattr(vq_module, "VAL_SCENES", 4)


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_the_tokenizer_trains_and_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    run(VQStage(VQ, 32), VQ_LOOP, tmp_path / "whole")
    run_in_parts(lambda: VQStage(VQ, 32), VQ_LOOP, tmp_path / "parts", 4)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    rows = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)["module"]
    norms = rows["vq.quantize.embedding.weight"].norm(dim=-1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)


def test_an_exported_model_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    loop = dataclasses.replace(VQ_LOOP, steps=1)
    for mask, mode in ((0o022, 0o644), (0o007, 0o660)):
        folder, before = tmp_path / f"{mask:o}", os.umask(mask)
        try:
            run(VQStage(dataclasses.replace(VQ, loop=loop), 32), loop, folder)
        finally:
            os.umask(before)
        modes = {p.name: p.stat().st_mode & 0o777 for p in (folder / "model").iterdir()}
        assert modes == dict.fromkeys(modes, mode) and "model.safetensors" in modes


def test_stage_one_trains_resumes_and_exports_a_model_that_loads(tmp_path: Path) -> None:
    vq = build_vq(VQ, 32)
    run(PMTPStage(PMTP, vq), LOOP, tmp_path / "whole")
    run_in_parts(lambda: PMTPStage(PMTP, vq), LOOP, tmp_path / "parts", 4)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")

    engine = Engine.from_pretrained(tmp_path / "whole" / "model")
    layout = Layout("a red circle", (LayoutObject("a red circle", (0.1, 0.2, 0.5, 0.6)),))
    result = engine.cycle(layout, samples=2)
    assert result.images[0].size == (64, 64) and len(result.boxes) == 2
    with pytest.raises(ValueError, match="SigLIP path was not trained"):
        engine.ground(result.images[0], ["a red circle"], features="pixels")


def test_stage_one_goes_on_from_its_own_model(tmp_path: Path) -> None:
    run(PMTPStage(PMTP, build_vq(VQ, 32)), LOOP, tmp_path / "first")
    more = dataclasses.replace(PMTP, scenes=30, temperature=0.3)
    start = load_start(tmp_path / "first", "pmtp")
    assert start.fingerprint == PMTPStage(more, start).config.start
    began = [p.clone() for p in start.engine.transformer.parameters()]
    stage = PMTPStage(more, start)
    assert all(map(torch.equal, began, stage.module.parameters()))
    found = stage.evaluate()
    run(stage, LOOP, tmp_path / "on")
    seen = {name: [r for r in rows(tmp_path / name) if "val_l2i" in r] for name in ("first", "on")}
    assert [r["step"] for r in seen["first"]] == [6]  # fresh weights are nothing to compare with
    assert [r["step"] for r in seen["on"]] == [0, 6]
    assert seen["on"][0] == {"step": 0} | {f"val_{k}": float(f"{v:.6g}") for k, v in found.items()}
    on = load_start(tmp_path / "on", "pmtp")
    assert on.stages == ("pmtp",) and on.engine.sampling.temperature == 0.3
    assert on.fingerprint != start.fingerprint


def test_numbers_on_a_device_are_not_read_by_the_loss() -> None:
    """What holds no values cannot be read; on a CPU reading costs nothing."""
    far, near = torch.ones((), device="meta", requires_grad=True), torch.tensor(0.5)
    found = worth_logging({"far": far, "near": near.requires_grad_()})
    assert found["near"] == 0.5 and isinstance(found["near"], float)
    assert found["far"].is_meta and not found["far"].requires_grad


@pytest.mark.parametrize("mask", ["isolated", "shared"])
def test_stage_one_learns_its_targets(tmp_path: Path, mask) -> None:
    loop = dataclasses.replace(LOOP, lr=5e-3)
    config = dataclasses.replace(PMTP, scenes=4, loop=loop, mask=mask)
    stage = PMTPStage(config, build_vq(VQ, 32))
    optimizer = torch.optim.AdamW(stage.module.parameters(), lr=5e-3)
    values = []
    for step in range(120):
        loss, numbers = stage.loss(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append((numbers["l2i"], numbers["i2l"]))
    first, last = np.mean(values[:3], 0), np.mean(values[-3:], 0)
    assert (last < 0.7 * first).all(), (first, last)


def test_a_shared_batch_reads_one_image_for_both_tasks(tmp_path: Path) -> None:
    config = dataclasses.replace(PMTP, batch=40, extra_grounding=0, mask="shared")
    stage = PMTPStage(config, build_vq(VQ, 32))
    batch, images = stage.batch(0), stage.module.config.image_tokens
    assert (batch.ids >= stage.module.config.vocab_size).sum() == 40 * images
    drawn = (batch.codes >= 0).sum() // images
    assert 28 <= drawn < 40  # the others as inference grounds them, behind no layout
    assert (batch.tree[batch.texts >= 0].unique()).numel() == 40
    pairs = PMTPStage(dataclasses.replace(config, mask="isolated"), build_vq(VQ, 32)).batch(0)
    assert (pairs.ids >= stage.module.config.vocab_size).sum() > 78 * images
    with pytest.raises(ValueError, match="mask = 'both'; choose 'isolated' or 'shared'"):
        dataclasses.replace(config, mask="both")


def test_codes_are_cached_under_the_hash_of_their_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vq = build_vq(VQ, 32)
    drawn = load_scenes("train", 3)
    first = samples.load_codes(vq, "train", drawn)

    def fail(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(samples, "encode_image", fail)
    assert (samples.load_codes(vq, "train", drawn) == first).all()
    with torch.no_grad():
        vq.quant_conv.bias.add_(1)
    with pytest.raises(AssertionError, match="encoded again"):
        samples.load_codes(vq, "train", drawn)


def test_cached_scenes_are_the_drawn_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = load_scenes("val", 5)
    assert drawn == [sample_scene("val", i) for i in range(5)]
    monkeypatch.setattr(scenes, "sample_scene", None)
    assert load_scenes("val", 5) == drawn
    assert len(world_version()) == 12


def test_background_nats_counts_plain_patches_only() -> None:
    pixels = samples.to_pixels(samples.render([sample_scene("val", 0)]))
    plain = samples.to_pixels(np.full((1, 64, 64, 3), scenes.shapes.GROUND, dtype=np.uint8))
    codes = torch.arange(64).view(1, 64)
    assert background_nats(plain, codes) == pytest.approx(np.log(64))
    assert background_nats(plain, torch.zeros_like(codes)) == 0
    assert 0 < background_nats(pixels, codes) < np.log(64)


def test_patches_are_grouped_by_their_pixels() -> None:
    pixels = samples.to_pixels(samples.render([sample_scene("val", i) for i in range(3)]))
    first, group = patch_groups(pixels, 8)
    patches = [p[:, y : y + 8, x : x + 8] for p in pixels for y in range(0, 64, 8)
               for x in range(0, 64, 8)]  # fmt: skip
    assert len(first) < len(patches)
    for i, patch in enumerate(patches):
        same = [j for j, other in enumerate(patches) if torch.equal(patch, other)]
        assert same == (group == group[i]).nonzero().flatten().tolist()
        assert first[group[i]] == same[0]


def test_disagreement_is_the_share_of_variance_within_groups() -> None:
    group = torch.tensor([0, 1, 0, 2, 1, 0])
    own = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    agreeing = own[group]
    noisy = agreeing + torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    shares = [float(disagreement(x, group_means(x, group)[group])) for x in (agreeing, noisy)]
    assert shares[0] == pytest.approx(0, abs=1e-12)
    within = sum((noisy[group == g].var(0, correction=0) * (group == g).sum()) for g in range(3))
    assert shares[1] == pytest.approx(float(within.sum() / (noisy.var(0, correction=0).sum() * 6)))
    scaled = 1e-3 * noisy
    assert float(disagreement(scaled, group_means(scaled, group)[group])) == pytest.approx(
        shares[1]
    )


def test_a_model_of_a_larger_canvas_goes_through_its_stages(tmp_path: Path) -> None:
    config = dataclasses.replace(VQ, image_size=128, multipliers=(1, 1, 1, 1, 1), batch=1)
    tokenizer = VQStage(config, 32)
    assert tokenizer.inputs(0)["pixels"].shape == (1, 3, 128, 128)
    assert torch.isfinite(tokenizer.loss(0)[0]) and tokenizer.evaluate()["l1"] > 0
    small = dataclasses.replace(PMTP, scenes=4, batch=2, extra_grounding=0)
    stage = PMTPStage(small, tokenizer.module.vq)
    assert torch.isfinite(stage.loss(0)[0])
    stage.export(tmp_path / "model")
    engine = Engine.from_pretrained(tmp_path / "model")
    assert engine.image_size == 128 and engine.transformer.config.image_tokens == 64
    layout = Layout("a star", (LayoutObject("a star", (0.1, 0.1, 0.5, 0.5)),))
    assert engine.generate(layout).size == (128, 128)
    cached = [p.name for p in (tmp_path / "cache").glob("codes-*")]
    assert cached and all("-128-" in name for name in cached)


@pytest.mark.parametrize(
    ("name", "stages"), [("tiny-stage1", ("pmtp",)), ("tiny", ("pmtp", "djo"))]
)
def test_every_stage_can_begin_with_a_bundled_model(tmp_path, monkeypatch, name, stages):
    """Also where a run or a folder has its name."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "metrics.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert load_start(name, stages[-1]).stages == stages
    with pytest.raises(StateError, match="no model yet"):
        load_start(f"./{name}", stages[-1])
    (tmp_path / name / "metrics.jsonl").unlink()  # then it is no run, but a model's folder
    for folder in (f"./{name}", Path(name)):
        assert resolve(folder).resolve() == model_folder(folder).resolve() == tmp_path / name
