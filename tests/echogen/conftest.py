"""A random model of the smallest size, on disk as users load it, for tests of the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import JanusVisionModel

from echogen.cli import main
from echogen.engine.config import ModelConfig
from echogen.engine.decoding.sampler import Sampling
from echogen.engine.engine import Engine
from echogen.engine.model import UnifiedTransformer
from echogen.engine.prompt import LocationCodec, Prompts
from echogen.train.config import LoopConfig, PMTPConfig, VQConfig
from echogen.train.stages.pmtp import janus_config
from echogen.train.stages.vq import build_vq
from echogen.train.tokenizer import train_tokenizer

BINS = 33
LAYOUT = {
    "caption": "a red circle in front of a blue square",
    "objects": [
        {"expr": "a blue square", "box": [0.3, 0.35, 0.8, 0.9]},
        {"expr": "a red circle", "box": [0.1, 0.15, 0.5, 0.55]},
    ],
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random checkpoint: 64×64 pictures, 64 codes each, one narrow layer."""
    torch.manual_seed(0)
    loop = LoopConfig(steps=1, lr=1e-3)
    config = PMTPConfig(loop=loop, width=32, layers=1, heads=2, mlp_width=48, bins=BINS)
    tokenizer = train_tokenizer([LAYOUT["caption"], "a green star, a yellow triangle"], BINS)
    vq = build_vq(VQConfig(loop=loop, channels=32, codes=32), config.width)
    janus = janus_config(config, vq, tokenizer)
    transformer = UnifiedTransformer(ModelConfig.from_janus(janus))
    transformer.initialise(0)
    prompts = Prompts(tokenizer, LocationCodec(tokenizer, BINS))
    siglip = JanusVisionModel(janus.vision_config)
    sampling = Sampling(temperature=0.8, cfg=1.5)
    folder = tmp_path_factory.mktemp("model")
    Engine(janus, transformer, vq, siglip, prompts, sampling, False).save_pretrained(folder)
    return folder


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A layout file of two objects."""
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(LAYOUT))
    return path


@dataclass
class Outcome:
    """What one run of the command line left."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> dict:
        """The last line of stdout, parsed."""
        return json.loads(self.out.splitlines()[-1])

    def refused(self, *words: str) -> bool:
        """Exit code 2, one line on stderr that holds the words, nothing on stdout."""
        lines = self.err.splitlines()
        return (
            self.code == 2
            and not self.out
            and len(lines) == 1
            and lines[0].startswith("echogen: ")
            and all(word in lines[0] for word in words)
        )


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``run("cycle", "--layout", path, ...)``: the command line in this process."""

    def call(*argv: object) -> Outcome:
        capfd.readouterr()
        code = main([str(a) for a in argv])
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture(autouse=True)
def bf16_slowdown(monkeypatch):
    """``bf16_slowdown(times)``: what this CPU takes in bfloat16; as long as in float32."""

    def takes(times):
        monkeypatch.setattr("echogen.train.run.precision.bf16_slowdown", lambda: times)

    takes(1.0)
    return takes
