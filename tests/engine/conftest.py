"""Small Janus models of transformers, whose weights make every term show, for parity tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from echogen.engine.checkpoints.weights import load_checkpoint
from echogen.engine.engine import Engine
from echogen.engine.prompt import LocationCodec, Prompts
from echogen.train.tokenizer import train_tokenizer

from .devices import PLACES, Place


def _janus_config(
    tied: bool = False,
    vision: dict[str, Any] | None = None,
    vq: dict[str, Any] | None = None,
    **text: Any,
) -> JanusConfig:
    llama = {
        "vocab_size": 60,
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | text
    width = llama["hidden_size"]
    return JanusConfig(
        text_config=LlamaConfig(**llama),
        vision_config=JanusVisionConfig(
            **{
                "hidden_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 2,
                "num_image_tokens": 16,
                "projection_dim": width,
            }
            | (vision or {})
        ),
        vq_config=JanusVQVAEConfig(
            **{
                "embed_dim": 4,
                "num_embeddings": 24,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 2],
                "num_res_blocks": 1,
                "projection_dim": width,
                "image_token_embed_dim": width,
            }
            | (vq or {})
        ),
        image_token_id=59,
        tie_word_embeddings=tied,
    )


def _redraw(model: nn.Module, seed: int) -> None:
    """Give every parameter, gains and biases included, a value that shows a forgotten term."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1 and "embed" not in name:
                p.copy_(noise * p[0].numel() ** -0.5)
            elif p.dim() > 1:
                p.copy_(noise)
            else:  # gains near 1, biases near 0
                p.copy_(0.3 * noise + float("norm" in name and name.endswith("weight")))


@pytest.fixture(scope="session")
def janus_config() -> Callable[..., JanusConfig]:
    """``janus_config(tied, vision={...}, vq={...}, **text)``: a tiny configuration."""
    return _janus_config


@pytest.fixture(scope="session")
def random_janus() -> Callable[..., JanusForConditionalGeneration]:
    """``random_janus(config, seed)``: the port's model with every parameter drawn anew."""

    def build(config: JanusConfig, seed: int = 0) -> JanusForConditionalGeneration:
        model = JanusForConditionalGeneration(config).eval()
        _redraw(model, seed)
        return model

    return build


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """Largest difference over largest magnitude."""

    def measure(found: Tensor, wanted: Tensor) -> float:
        assert found.shape == wanted.shape
        return ((found - wanted).abs().max() / wanted.abs().max()).item()

    return measure


@pytest.fixture(scope="session")
def small_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny models' tokenizer, trained on a few texts, with 33 location tokens."""
    texts = [
        "a red circle in front of a blue square",
        "the left of the two green stars",
        "[10, 25]",
    ]
    return train_tokenizer(texts * 3, bins=33, merges=60)


@pytest.fixture(scope="session")
def random_engine(
    tmp_path_factory, janus_config, random_janus, small_tokenizer
) -> Callable[..., Engine]:
    """``random_engine(device, dtype, fp8_cache, vision={...}, vq={...}, **text)``: a small engine
    with random weights and 33 bins, for schedulers."""

    def build(
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        fp8_cache: bool = False,
        **shape: Any,
    ) -> Engine:
        text = {"max_position_embeddings": 160, "num_key_value_heads": 1} | shape
        config = janus_config(vocab_size=len(small_tokenizer), **text)
        folder = tmp_path_factory.mktemp("checkpoint")
        random_janus(config, seed=30).save_pretrained(folder)
        made = load_checkpoint(folder, dtype, device)
        prompts = Prompts(small_tokenizer, LocationCodec(small_tokenizer, 33))
        modules = made.transformer.eval(), made.vq, made.siglip
        return Engine(made.config, *modules, prompts, fp8_cache=fp8_cache)

    return build


@pytest.fixture(scope="module")
def engine(random_engine) -> Engine:
    """A small engine on the CPU."""
    return random_engine()


@pytest.fixture(params=["native", "packed", "plain"])
def either(request, engine, monkeypatch) -> Engine:
    """The engine in C++, by PyTorch's operations (both on packed weights, which are a copy), and on
    the plain transformer."""
    made = copy.copy(engine)
    if request.param == "plain":
        monkeypatch.setattr("echogen.engine.engine.packed", lambda model: model)
    if request.param == "packed":
        monkeypatch.setenv("ECHOGEN_NATIVE", "0")
    made.refresh()
    return made


@pytest.fixture
def folder(tmp_path, janus_config, random_janus) -> Path:
    """A valid port checkpoint in one safetensors file, untied."""
    random_janus(janus_config(), seed=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    """Where a test runs the GPU operators."""
    found: Place = request.param
    return found
