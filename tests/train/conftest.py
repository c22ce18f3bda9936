"""A stage-1 run of the smallest size, for the tests of the stages that follow it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from echogen.train import world
from echogen.train.config import LoopConfig, PMTPConfig, VQConfig
from echogen.train.loop import run
from echogen.train.pmtp import PMTPStage
from echogen.train.vq import build_vq

LOOP = LoopConfig(
    steps=6, lr=2e-3, muon_lr=4e-3, warmup=2, log_every=1, eval_every=6, save_every=2, threads=1
)


@pytest.fixture(scope="session")
def loop() -> LoopConfig:
    """Six steps, in float32 where a test says so."""
    return LOOP


@pytest.fixture(scope="session")
def pmtp_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of stage 1: 64×64 pictures, two narrow layers, a few steps."""
    folder = tmp_path_factory.mktemp("pmtp")
    vq = VQConfig(loop=LOOP, codes=32, latent=32, multipliers=(1, 1, 1, 1))
    config = PMTPConfig(
        loop=LOOP, width=32, layers=2, heads=2, mlp_width=64, bins=17, scenes=24, batch=3
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECHOGEN_CACHE", str(folder / "cache"))
        patch.setattr(world, "VAL_SAMPLES", 4)
        run(PMTPStage(config, build_vq(vq, 32)), LOOP, folder / "run")
    return folder / "run"


@pytest.fixture
def small_world(pmtp_run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cache of `pmtp_run`, and few validation scenes."""
    monkeypatch.setenv("ECHOGEN_CACHE", str(pmtp_run.parent / "cache"))
    monkeypatch.setattr(world, "VAL_SAMPLES", 4)
    yield
