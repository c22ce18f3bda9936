"""Stage 1 from a pretrained Janus checkpoint: its vocabulary grows, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import JanusVisionModel

from echogen.engine.checkpoints.weights import load_checkpoint, save_checkpoint
from echogen.engine.config import ModelConfig
from echogen.engine.engine import Engine
from echogen.engine.layout import Layout, LayoutObject
from echogen.engine.model import UnifiedTransformer
from echogen.engine.prompt import MARKS, location_token
from echogen.train import tokenizer as tokenizer_module
from echogen.train.config import LoopConfig, PMTPConfig, VQConfig
from echogen.train.run.checkpoint import StateError
from echogen.train.stages.pmtp import PMTPStage, janus_config
from echogen.train.stages.vq import build_vq
from echogen.train.start import RECORD, write_record
from echogen.train.tokenizer import train_tokenizer
from echogen.train.vocabulary import pretrained_start

BINS = 30
LOOP = LoopConfig(steps=2, lr=1e-3, bf16=False)
PMTP = PMTPConfig(
    loop=LOOP, width=32, layers=1, heads=2, mlp_width=48, bins=BINS, scenes=24, batch=2
)
LAYOUT = Layout("a red circle", (LayoutObject("a red circle", (0.1, 0.2, 0.5, 0.9)),))


@pytest.fixture(params=[2, 100], ids=["grown", "spare rows"])
def janus(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random Janus checkpoint whose tokenizer knows neither marks nor locations; its tables have
    a few rows to spare, too few or enough."""
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_module, "MARKS", ())
        tokenizer = train_tokenizer(["a red circle, 0 1 2 3 4 5 6 7 8 9"] * 3, bins=0, merges=10)
    vq = build_vq(VQConfig(loop=LOOP, codes=32, latent=32, multipliers=(1, 1, 1, 1)), 32)
    config = janus_config(PMTP, vq, tokenizer)
    config.text_config.vocab_size += request.param
    transformer = UnifiedTransformer(ModelConfig.from_janus(config))
    transformer.initialise(0)
    folder = tmp_path / "janus"
    save_checkpoint(folder, config, transformer, vq, JanusVisionModel(config.vision_config))
    tokenizer.save_pretrained(folder)
    return folder


def test_new_rows_are_the_digits_mean_and_old_ones_stay(janus) -> None:
    before = load_checkpoint(janus).transformer
    start = pretrained_start(janus, BINS)
    model, prompts = start.engine.transformer, start.engine.prompts
    assert start.stages == ()
    vocab = prompts.tokenizer.get_vocab()
    old = min(vocab[token] for token in MARKS)
    assert model.config.vocab_size == max(before.config.vocab_size, old + len(MARKS) + BINS)
    for name in ("text_embedding", "text_head"):
        rows, was = getattr(model, name).weight, getattr(before, name).weight
        assert torch.equal(rows[:old], was[:old])
        for i in range(BINS):
            digits = prompts.tokenizer.encode(str(i), add_special_tokens=False)
            assert len(digits) >= 1 and max(digits) < old
            assert torch.allclose(rows[vocab[location_token(i)]], was[digits].mean(0), atol=1e-7)
    for (name, p), (_, q) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert name.startswith("text_") or torch.equal(p, q), name


def test_prompts_say_boxes_in_locations_and_survive_saving(janus, tmp_path) -> None:
    first = pretrained_start(janus, BINS).engine
    first.save_pretrained(tmp_path / "again")
    again = Engine.from_pretrained(tmp_path / "again")
    for engine in (first, again):
        ids = engine.prompts.l2i(LAYOUT)
        vocab = engine.prompts.tokenizer.get_vocab()
        assert [vocab[location_token(i)] for i in (3, 6, 14, 26)] == ids[-8:-4]
        assert engine.prompts.layout(ids).objects[0].expr == "a red circle"
        assert engine.prompts.branch("a red circle")[0] == vocab["<ref>"]
    assert first.prompts.l2i(LAYOUT) == again.prompts.l2i(LAYOUT)
    codes = [e.generate_codes([LAYOUT] * 2, seed=3) for e in (first, again)]
    assert torch.equal(*codes)


def test_stage_one_trains_it(janus, tmp_path, small_world) -> None:
    stage = PMTPStage(PMTP, pretrained_start(janus, BINS))
    loss, numbers = stage.loss(0)
    loss.backward()
    assert torch.isfinite(loss) and set(numbers) == {"loss", "l2i", "i2l"}
    first = stage.prompts.codec.ids[0]
    grad = stage.module.text_head.weight.grad
    assert grad is not None and grad[first : first + BINS].abs().sum() > 0
    stage.export(tmp_path / "model")
    assert json.loads((tmp_path / "model" / RECORD).read_text())["stages"] == ["pmtp"]


def test_a_model_of_a_stage_is_gone_on_with_instead(janus) -> None:
    write_record(janus, ("pmtp",))
    with pytest.raises(StateError, match=r"comes from stage pmtp .*--from"):
        pretrained_start(janus, BINS)
