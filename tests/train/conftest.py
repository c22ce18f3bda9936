"""A stage-1 run of the smallest size, for the tests of the stages that follow it, and runs that end
badly."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from echogen.engine.decoding.sampler import Sampling
from echogen.engine.layout import Layout
from echogen.engine.model import additive_mask
from echogen.train.config import CycleRLConfig, LoopConfig, PMTPConfig, VQConfig
from echogen.train.run.loop import run
from echogen.train.stages import cycle_rl, world
from echogen.train.stages.cycle_rl import CycleRLStage
from echogen.train.stages.pmtp import PMTPStage
from echogen.train.stages.vq import build_vq
from echogen.train.start import load_start

LOOP = LoopConfig(
    steps=6, lr=2e-3, muon_lr=4e-3, warmup=2, log_every=1, eval_every=6, save_every=2, threads=1
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The weights of an image tokenizer, which takes them from torch's own generator, are the same
    in every run of a test."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def loop() -> LoopConfig:
    """Six steps, in float32 where a test says so."""
    return LOOP


@pytest.fixture(scope="session")
def pmtp_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of stage 1: 64×64 pictures, two narrow layers, a few steps."""
    folder = tmp_path_factory.mktemp("pmtp")
    torch.manual_seed(0)
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
    monkeypatch.setattr(cycle_rl, "VAL_LAYOUTS", 4)
    yield


@pytest.fixture
def rl_stage(pmtp_run: Path, loop: LoopConfig, small_world: None) -> Callable[..., CycleRLStage]:
    """``rl_stage(wild, accumulate, **settings)``: stage 3 in float32 on two layouts of four images;
    ``wild``: with large random weights, whose distributions have peaks."""

    def build(wild: bool = True, accumulate: int = 1, **settings) -> CycleRLStage:
        chosen = {"scenes": 24, "batch": 2, "group": 4, "gate_scenes": 2, "gate_group": 2}
        chosen["val_drawings"] = 1
        single = dataclasses.replace(loop, bf16=False, muon_lr=None, lr=1e-4)
        config = CycleRLConfig(
            loop=dataclasses.replace(single, accumulate=accumulate), **chosen | settings
        )
        start = load_start(pmtp_run, "djo", any_stage=True)
        if wild:
            start.engine.transformer.initialise(0, std=0.2)
        return CycleRLStage(config, start)

    return build


@pytest.fixture(scope="session")
def plain_hidden() -> Callable[[CycleRLStage, list[int]], Tensor]:
    """Hidden states [L, D] of one sequence of text ids and, above the vocabulary, image codes."""

    def run_alone(stage: CycleRLStage, ids: list[int]) -> Tensor:
        model, n = stage.module, len(ids)
        mask = additive_mask(torch.ones(1, n, n, dtype=torch.bool).tril(), torch.float32)
        return model(model.embed_mixed(torch.tensor([ids])), torch.arange(n), mask)[0]

    return run_alone


@pytest.fixture(scope="session")
def plain_image_logprob(plain_hidden) -> Callable[..., Tensor]:
    """Log-probabilities [T] of an image's codes, written out from the definition of sampling."""

    def score(stage: CycleRLStage, layout: Layout, codes: Tensor, s: Sampling) -> Tensor:
        model, prompts = stage.module, stage.prompts
        image = (codes[:-1] + model.config.vocab_size).tolist()
        prompt = prompts.l2i(layout)
        x = model.image_head(plain_hidden(stage, prompt + image)[len(prompt) - 1 :])
        if s.cfg != 1:
            other = prompts.unconditional(prompt, s.unconditional)
            u = model.image_head(plain_hidden(stage, other + image)[len(other) - 1 :])
            x = u + s.cfg * (x - u)
        rows = []
        for scores, code in zip(x / s.temperature, codes.tolist(), strict=True):
            order = scores.argsort(descending=True)[: s.top_k or None]
            p = scores[order].softmax(-1)
            order = order[: int((p.cumsum(-1) < s.top_p).sum()) + 1]
            assert code in order.tolist()
            rows.append(scores[code] - scores[order].logsumexp(-1))
        return torch.stack(rows)

    return score


@pytest.fixture(scope="module")
def order() -> Iterator[Callable[..., Any]]:
    """``order(folder, **how)`` runs the toy stage of killed.py there; how it ended, one process or
    each."""
    script = Path(__file__).with_name("killed.py")
    env = os.environ | {"PYTHONPATH": str(script.parents[2])}  # the code under test
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(script)], env=env, **pipes) as server:
        assert server.stdin is not None and server.stdout is not None
        assert server.stdout.readline() == "ready\n"

        def give(folder: Path, **how: Any) -> Any:
            assert server.stdin is not None and server.stdout is not None
            print(json.dumps({"folder": str(folder), **how}), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())

        yield give
        server.stdin.close()


@pytest.fixture(scope="module")
def killed() -> Any:
    """The module killed.py."""
    path = Path(__file__).with_name("killed.py")
    spec = importlib.util.spec_from_file_location("killed", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["killed"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
