"""The original deepseek-ai layout: its keys, its config, and what it computes."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import Tensor
from transformers import JanusForConditionalGeneration

from echogen.engine.checkpoints import weights
from echogen.engine.checkpoints.keymap import original_names, original_parts
from echogen.engine.checkpoints.weights import (
    CheckpointError,
    load_checkpoint,
    to_port,
)
from echogen.engine.config import ModelConfig

from .checkpoints import (
    ORIGINAL_1B_CONFIG,
    Original,
    assert_equal_states,
    hand_filled_port,
    refused,
    save,
    small_original,
    write_original,
)


@pytest.fixture(scope="module")
def port_1b(janus_config) -> dict[str, Tensor]:
    """Keys and shapes of the port's Janus-Pro-1B, on the meta device."""
    config = janus_config(
        vocab_size=102_400, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=16_384,
        vision={"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                "image_size": 384, "patch_size": 16, "num_image_tokens": 576},
        vq={"embed_dim": 8, "num_embeddings": 16_384, "latent_channels": 256, "base_channels": 128,
            "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2},
    )  # fmt: skip
    with torch.device("meta"):
        model = JanusForConditionalGeneration(config)
    return {"config": config} | model.state_dict()


def found_1b() -> dict[str, Tensor]:
    """The original's Janus-Pro-1B under the port's names, on the meta device."""
    found = {}
    for key, shape in Original().shapes.items():
        found |= original_parts(key, torch.empty(shape, device="meta"))
    return found


def test_the_1b_maps_one_to_one(port_1b):
    port = {k: v for k, v in port_1b.items() if k != "config"}
    original, found = Original().shapes, found_1b()
    names = [name for key in original for name in original_names(key)]
    assert len(names) == len(set(names))
    assert found.keys() == port.keys()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in port.items()}

    dropped = [key for key in original if not original_names(key)]
    assert len(dropped) == 14  # 13 of attn_pool, and codebook_used
    assert all("attn_pool" in key or key.endswith("codebook_used") for key in dropped)
    count = sum(t.numel() for t in found.values())
    assert count == 2_076_636_811  # "2.08 B in all"
    body = sum(
        t.numel() for k, t in found.items() if "language_model" in k and "embed_tokens" not in k
    )
    assert body == 1_233_225_728
    assert found["lm_head.weight"].numel() == 209_715_200
    assert found["model.language_model.embed_tokens.weight"].numel() == 209_715_200


@pytest.mark.parametrize("stated", ["as published", "nothing but the heads"])
def test_the_1b_config_is_read(port_1b, stated):
    raw = json.loads(json.dumps(ORIGINAL_1B_CONFIG))
    if stated != "as published":
        raw = {"model_type": "multi_modality", "language_config": {"num_attention_heads": 16}}
    config = weights.original_config(raw, found_1b(), {})
    wanted = port_1b["config"]
    found, asked = ModelConfig.from_janus(config), ModelConfig.from_janus(wanted)
    if stated == "as published":
        assert found == asked
        assert config.vq_config.to_dict() == wanted.vq_config.to_dict()
        assert config.vision_config.to_dict() == wanted.vision_config.to_dict()
    assert (found.width, found.kv_heads, found.head_dim, found.mlp_width, found.tied) == (
        2048, 16, 128, 5632, False,
    )  # fmt: skip
    assert config.image_token_id == 100_581


def test_the_1b_fills_the_unified_transformer(port_1b):
    config = ModelConfig.from_janus(port_1b["config"])
    port = {k: v for k, v in port_1b.items() if k != "config"}
    with torch.device("meta"):
        model = weights.UnifiedTransformer(config)
    state = model.state_dict()
    back = to_port(state, config)
    assert sum(t.numel() for t in back.values()) == sum(t.numel() for t in state.values())
    rest = {k for k in port if k.startswith(("model.vqmodel.", "model.vision_model."))}
    assert back.keys() == port.keys() - rest
    assert all(back[k].shape == port[k].shape for k in back)


@pytest.mark.parametrize(
    "key",
    ["aligner.layers.1.weight", "aligner.layers.weight", "gen_embed.bias", "lm_head.weight",
     "language_model.lm_head.bias", "vision_model.vision_tower.cls_token", "vision_model.norm.bias",
     "vision_model.vision_tower.blocks.0.ls1.gamma", "model.norm.weight", "gen_head.bias"],
)  # fmt: skip
def test_keys_the_original_does_not_have_are_refused(key):
    with pytest.raises(CheckpointError, match=re.escape(key)):
        original_names(key)


@pytest.mark.parametrize("form", ["bin", "legacy bin", "sharded bin", "safetensors"])
def test_original_checkpoint_computes_what_the_port_does(
    tmp_path, janus_config, relative_error, form
):
    state = small_original()
    write_original(tmp_path, state, form)
    ours, port = load_checkpoint(tmp_path), hand_filled_port(state, janus_config)
    model, generator = ours.transformer, torch.Generator().manual_seed(1)
    with torch.inference_mode():
        ids = torch.randint(59, (2, 22), generator=generator)
        ids[:, 2:18] = 59
        pixels = torch.randn(2, 3, 8, 8, generator=generator)
        codes = torch.randint(24, (2, 16), generator=generator)
        embeddings = model.embed_text(ids)
        embeddings[:, 2:18] = model.embed_pixels(ours.siglip(pixels).last_hidden_state)
        embeddings = torch.cat((embeddings, model.embed_codes(codes)), 1)
        mask = torch.full((38, 38), float("-inf")).triu(1)[None, None]
        hidden = model(embeddings, torch.arange(38), mask)

        theirs = port.get_input_embeddings()(ids)
        theirs[:, 2:18] = port.model.get_image_features(pixels).pooler_output
        theirs = torch.cat((theirs, port.prepare_embeddings_for_image_generation(codes)), 1)
        wanted = port.model(inputs_embeds=theirs).last_hidden_state
        assert relative_error(model.text_head(hidden), port.lm_head(wanted)) < 1e-5
        image = port.model.generation_head(wanted)
        assert relative_error(model.image_head(hidden), image) < 1e-5
        assert relative_error(ours.vq.decode(codes), port.model.vqmodel.decode(codes)) < 1e-5
        rebuilt = ours.vq.encoder(pixels)
        assert relative_error(rebuilt, port.model.vqmodel.encoder(pixels)) < 1e-5
    assert not ours.config.tie_word_embeddings


def test_original_converts_to_a_port_checkpoint(tmp_path, janus_config):
    (tmp_path / "original").mkdir()
    write_original(tmp_path / "original", small_original(), "bin")
    first = load_checkpoint(tmp_path / "original")
    save(tmp_path / "port", first)
    port, info = JanusForConditionalGeneration.from_pretrained(
        tmp_path / "port", output_loading_info=True
    )
    assert not any(info.values()), info
    wanted = hand_filled_port(small_original(), janus_config).state_dict()
    assert_equal_states(port.state_dict(), wanted)


def test_special_ids_come_from_the_tokenizer(tmp_path):
    write_original(tmp_path, small_original(), "safetensors")
    (tmp_path / "tokenizer.json").write_text(json.dumps({
        "model": {"vocab": {"<bos>": 7, "a": 1}},
        "added_tokens": [
            {"id": 58, "content": "<image_placeholder>"}, {"id": 9, "content": "<pad>"}
        ],
    }))  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<bos>"}}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    config = load_checkpoint(tmp_path).config
    text = config.text_config
    assert (config.image_token_id, text.bos_token_id, text.eos_token_id, text.pad_token_id) == (
        58, 7, None, 9,
    )  # fmt: skip
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": []}')
    refused(tmp_path, "tokenizer.json")
