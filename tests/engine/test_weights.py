"""Checkpoints: the original layout, round trips, refusals and interrupted saves."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import JanusForConditionalGeneration

from echogen.engine import shards, weights
from echogen.engine.config import ModelConfig
from echogen.engine.keymap import IGNORED, original_names
from echogen.engine.weights import (
    Checkpoint,
    CheckpointError,
    from_port,
    load_checkpoint,
    original_to_port,
    save_checkpoint,
    to_port,
)

# ---------------------------------------------------------------- the original layout, written out


class Original:
    """Keys and shapes of the original model, module by module as its source builds them.

    Defaults are Janus-Pro-1B's. Nothing here knows the key map under test.
    """

    def __init__(self, **sizes) -> None:
        self.size = {
            "vocab": 102_400, "width": 2048, "mlp": 5632, "layers": 24, "kv": 2048,
            "vit": 1024, "vit_mlp": 4096, "vit_layers": 24, "patch": 16, "patches": 576,
            "channels": 128, "mult": (1, 1, 2, 2, 4), "res": 2, "z": 256,
            "codes": 16_384, "code": 8,
        } | sizes  # fmt: skip
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.language()
        self.vision_tower()
        self.vq()
        s = self.size
        self.projector("aligner", s["vit"])
        self.projector("gen_aligner", s["code"])
        self.weight("gen_embed", (s["codes"], s["code"]), bias=False)
        self.weight("gen_head.output_mlp_projector", (s["width"], s["width"]))
        self.weight("gen_head.vision_head", (s["codes"], s["width"]))

    def weight(self, name: str, shape: tuple[int, ...], bias: bool = True) -> None:
        self.shapes[f"{name}.weight"] = shape
        if bias:
            self.shapes[f"{name}.bias"] = shape[:1]

    def language(self) -> None:
        s = self.size
        self.weight("language_model.model.embed_tokens", (s["vocab"], s["width"]), bias=False)
        for i in range(s["layers"]):
            layer = f"language_model.model.layers.{i}"
            for name, shape in {
                "self_attn.q_proj": (s["width"], s["width"]),
                "self_attn.k_proj": (s["kv"], s["width"]),
                "self_attn.v_proj": (s["kv"], s["width"]),
                "self_attn.o_proj": (s["width"], s["width"]),
                "mlp.gate_proj": (s["mlp"], s["width"]),
                "mlp.up_proj": (s["mlp"], s["width"]),
                "mlp.down_proj": (s["width"], s["mlp"]),
                "input_layernorm": (s["width"],),
                "post_attention_layernorm": (s["width"],),
            }.items():
                self.weight(f"{layer}.{name}", shape, bias=False)
        self.weight("language_model.model.norm", (s["width"],), bias=False)
        self.weight("language_model.lm_head", (s["vocab"], s["width"]), bias=False)

    def vision_tower(self) -> None:
        s, tower = self.size, "vision_model.vision_tower"
        d = s["vit"]
        self.shapes[f"{tower}.pos_embed"] = (1, s["patches"], d)  # no class token
        self.weight(f"{tower}.patch_embed.proj", (d, 3, s["patch"], s["patch"]))
        for i in range(s["vit_layers"]):
            block = f"{tower}.blocks.{i}"
            self.weight(f"{block}.norm1", (d,))
            self.weight(f"{block}.attn.qkv", (3 * d, d))
            self.weight(f"{block}.attn.proj", (d, d))
            self.weight(f"{block}.norm2", (d,))
            self.weight(f"{block}.mlp.fc1", (s["vit_mlp"], d))
            self.weight(f"{block}.mlp.fc2", (d, s["vit_mlp"]))
        self.weight(f"{tower}.norm", (d,))
        # timm's attention pooling head, stored though Janus reads the patches
        self.shapes[f"{tower}.attn_pool.latent"] = (1, 1, d)
        self.weight(f"{tower}.attn_pool.q", (d, d))
        self.weight(f"{tower}.attn_pool.kv", (2 * d, d))
        self.weight(f"{tower}.attn_pool.proj", (d, d))
        self.weight(f"{tower}.attn_pool.norm", (d,))
        self.weight(f"{tower}.attn_pool.mlp.fc1", (s["vit_mlp"], d))
        self.weight(f"{tower}.attn_pool.mlp.fc2", (d, s["vit_mlp"]))

    def vq(self) -> None:
        s, vq = self.size, "gen_vision_model"
        channels = [s["channels"] * m for m in s["mult"]]
        last = len(channels) - 1

        self.weight(f"{vq}.encoder.conv_in", (s["channels"], 3, 3, 3))
        now = s["channels"]
        for level, out in enumerate(channels):
            block = f"{vq}.encoder.conv_blocks.{level}"
            for i in range(s["res"]):
                self.resnet(f"{block}.res.{i}", now, out)
                now = out
                if level == last:
                    self.attention(f"{block}.attn.{i}", now)
            if level != last:
                self.weight(f"{block}.downsample.conv", (now, now, 3, 3))
        self.middle(f"{vq}.encoder", now)
        self.weight(f"{vq}.encoder.norm_out", (now,))
        self.weight(f"{vq}.encoder.conv_out", (s["z"], now, 3, 3))

        self.weight(f"{vq}.decoder.conv_in", (now, s["z"], 3, 3))
        self.middle(f"{vq}.decoder", now)
        for place, level in enumerate(reversed(range(len(channels)))):  # counted from the code up
            block = f"{vq}.decoder.conv_blocks.{place}"
            for i in range(s["res"] + 1):
                self.resnet(f"{block}.res.{i}", now, channels[level])
                now = channels[level]
                if level == last:
                    self.attention(f"{block}.attn.{i}", now)
            if level != 0:
                self.weight(f"{block}.upsample.conv", (now, now, 3, 3))
        self.weight(f"{vq}.decoder.norm_out", (now,))
        self.weight(f"{vq}.decoder.conv_out", (3, now, 3, 3))

        self.weight(f"{vq}.quantize.embedding", (s["codes"], s["code"]), bias=False)
        self.shapes[f"{vq}.quantize.codebook_used"] = (65_536,)
        self.weight(f"{vq}.quant_conv", (s["code"], s["z"], 1, 1))
        self.weight(f"{vq}.post_quant_conv", (s["z"], s["code"], 1, 1))

    def resnet(self, name: str, inputs: int, outputs: int) -> None:
        self.weight(f"{name}.norm1", (inputs,))
        self.weight(f"{name}.conv1", (outputs, inputs, 3, 3))
        self.weight(f"{name}.norm2", (outputs,))
        self.weight(f"{name}.conv2", (outputs, outputs, 3, 3))
        if inputs != outputs:
            self.weight(f"{name}.nin_shortcut", (outputs, inputs, 1, 1))

    def attention(self, name: str, width: int) -> None:
        self.weight(f"{name}.norm", (width,))
        for part in ("q", "k", "v", "proj_out"):
            self.weight(f"{name}.{part}", (width, width, 1, 1))

    def middle(self, name: str, width: int) -> None:
        self.resnet(f"{name}.mid.0", width, width)
        self.attention(f"{name}.mid.1", width)
        self.resnet(f"{name}.mid.2", width, width)

    def projector(self, name: str, inputs: int) -> None:
        self.weight(f"{name}.layers.0", (self.size["width"], inputs))
        self.weight(f"{name}.layers.2", (self.size["width"], self.size["width"]))


ORIGINAL_1B_CONFIG = {
    "model_type": "multi_modality",
    "architectures": ["MultiModalityCausalLM"],
    "torch_dtype": "bfloat16",
    "language_config": {
        "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 16384,
        "model_type": "llama", "num_attention_heads": 16, "num_hidden_layers": 24,
        "num_key_value_heads": 16, "torch_dtype": "bfloat16", "vocab_size": 102400,
    },
    "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": {
        "image_size": 384, "model_name": "siglip_large_patch16_384", "select_feature": "same",
        "select_layer": -1}},
    "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": {
        "depth": 2, "input_dim": 1024, "n_embed": 2048, "projector_type": "mlp_gelu"}},
    "gen_vision_config": {"cls": "VQ-16", "model_type": "gen_vision", "params": {
        "image_token_size": 16384, "n_embed": 8}},
    "gen_aligner_config": {"cls": "MlpProjector", "model_type": "gen_aligner", "params": {
        "depth": 2, "input_dim": 8, "n_embed": 2048, "projector_type": "mlp_gelu"}},
    "gen_head_config": {"cls": "vision_head", "model_type": "gen_head", "params": {
        "image_token_embed": 2048, "image_token_size": 16384, "n_embed": 2048}},
}  # fmt: skip


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


def test_the_1b_maps_one_to_one(port_1b):
    port = {k: v for k, v in port_1b.items() if k != "config"}
    original = {k: torch.empty(shape, device="meta") for k, shape in Original().shapes.items()}
    found = original_to_port(original)
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
    meta = {k: torch.empty(shape, device="meta") for k, shape in Original().shapes.items()}
    config = weights.original_config(raw, original_to_port(meta), {})
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
    model.load_state_dict(from_port(port, config), strict=True, assign=True)
    back = to_port(model.state_dict(), config)
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


SMALL = {
    "vocab": 60, "width": 64, "mlp": 88, "layers": 2, "kv": 32, "vit": 32, "vit_mlp": 80,
    "vit_layers": 2, "patch": 2, "patches": 16, "channels": 32, "mult": (1, 2), "res": 1, "z": 8,
    "codes": 24, "code": 4,
}  # fmt: skip


def small_original(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in Original(**SMALL).shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            state[key] = noise * (noise[0].numel() ** -0.5 if "embed" not in key else 1.0)
        else:
            state[key] = 0.3 * noise + float("norm" in key and key.endswith("weight"))
    return state


def small_original_config() -> dict:
    raw = json.loads(json.dumps(ORIGINAL_1B_CONFIG))
    raw["language_config"] = {
        "num_attention_heads": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 500.0, "model_type": "llama", "torch_dtype": "bfloat16",
    }  # fmt: skip
    raw["vision_config"]["params"]["image_size"] = 8
    return raw


def hand_filled_port(state: dict[str, Tensor], janus_config) -> JanusForConditionalGeneration:
    """The port's model holding an original state, filled by walking both models side by side."""
    port = JanusForConditionalGeneration(
        janus_config(
            vocab_size=60, hidden_size=64, intermediate_size=88, num_attention_heads=8,
            num_key_value_heads=4, rms_norm_eps=1e-5, rope_theta=500.0,
            vision={"hidden_size": 32, "num_attention_heads": 16, "mlp_ratio": 2.5},
        )
    ).eval()  # fmt: skip
    model, llama = port.model, port.model.language_model

    def fill(module, name: str) -> None:
        for part, parameter in module.named_parameters(recurse=False):
            parameter.data.copy_(state[f"{name}.{part}"])

    def fill_resnet(block, name: str) -> None:
        for part, module in block.named_children():
            fill(module, f"{name}.{part}")

    fill(llama.embed_tokens, "language_model.model.embed_tokens")
    fill(llama.norm, "language_model.model.norm")
    fill(port.lm_head, "language_model.lm_head")
    for i, layer in enumerate(llama.layers):
        for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                     "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm",
                     "post_attention_layernorm"):  # fmt: skip
            fill(layer.get_submodule(path), f"language_model.model.layers.{i}.{path}")

    tower, vit = "vision_model.vision_tower", model.vision_model
    fill(vit.embeddings.patch_embedding, f"{tower}.patch_embed.proj")
    vit.embeddings.position_embedding.weight.data.copy_(state[f"{tower}.pos_embed"][0])
    fill(vit.post_layernorm, f"{tower}.norm")
    for i, layer in enumerate(vit.encoder.layers):
        block, width = f"{tower}.blocks.{i}", 32
        fill(layer.layer_norm1, f"{block}.norm1")
        fill(layer.layer_norm2, f"{block}.norm2")
        fill(layer.mlp.fc1, f"{block}.mlp.fc1")
        fill(layer.mlp.fc2, f"{block}.mlp.fc2")
        fill(layer.self_attn.projection_layer, f"{block}.attn.proj")
        for j, name in enumerate(("q_proj", "k_proj", "v_proj")):
            for part in ("weight", "bias"):
                rows = state[f"{block}.attn.qkv.{part}"][j * width : (j + 1) * width]
                getattr(getattr(layer.self_attn, name), part).data.copy_(rows)

    vq, name = model.vqmodel, "gen_vision_model"
    for half, levels in ((vq.encoder, vq.encoder.down), (vq.decoder, vq.decoder.up)):
        side = f"{name}.encoder" if half is vq.encoder else f"{name}.decoder"
        for part in ("conv_in", "norm_out", "conv_out"):
            fill(getattr(half, part), f"{side}.{part}")
        for i, block in enumerate((half.mid.block_1, half.mid.attn_1, half.mid.block_2)):
            fill_resnet(block, f"{side}.mid.{i}")
        for i, level in enumerate(levels):
            for j, block in enumerate(level.block):
                fill_resnet(block, f"{side}.conv_blocks.{i}.res.{j}")
            for j, block in enumerate(level.attn):
                fill_resnet(block, f"{side}.conv_blocks.{i}.attn.{j}")
            for resample in ("downsample", "upsample"):
                if hasattr(level, resample):
                    fill(getattr(level, resample).conv, f"{side}.conv_blocks.{i}.{resample}.conv")
    fill(vq.quantize.embedding, f"{name}.quantize.embedding")
    fill(vq.quant_conv, f"{name}.quant_conv")
    fill(vq.post_quant_conv, f"{name}.post_quant_conv")

    for module, name in ((model.aligner, "aligner"), (model.generation_aligner, "gen_aligner")):
        fill(module.fc1, f"{name}.layers.0")
        fill(module.hidden_layers[0], f"{name}.layers.2")
    fill(model.generation_embeddings, "gen_embed")
    fill(model.generation_head.proj_out, "gen_head.output_mlp_projector")
    fill(model.generation_head.vision_head, "gen_head.vision_head")
    return port


def write_original(folder: Path, state: dict[str, Tensor], form: str) -> None:
    (folder / "config.json").write_text(json.dumps(small_original_config()))
    halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    if form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif form == "legacy bin":
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif form == "safetensors":
        save_file(state, folder / "model.safetensors")
    elif form == "sharded bin":
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        for name, half in zip(names, halves, strict=True):
            torch.save(half, folder / name)
        index = {key: name for name, half in zip(names, halves, strict=True) for key in half}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


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


# ---------------------------------------------------------------- tying, round trips


def save(folder: Path, loaded: Checkpoint, **options) -> None:
    save_checkpoint(folder, loaded.config, loaded.transformer, loaded.vq, loaded.siglip, **options)


def assert_equal_states(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key in found:
        assert found[key].dtype == wanted[key].dtype, key
        assert torch.equal(found[key], wanted[key]), key


def states(loaded: Checkpoint) -> dict[str, Tensor]:
    modules = {"t": loaded.transformer, "vq": loaded.vq, "siglip": loaded.siglip}
    return {f"{m}.{k}": v for m, module in modules.items() for k, v in module.state_dict().items()}


@pytest.fixture
def folder(tmp_path, janus_config, random_janus) -> Path:
    """A valid port checkpoint in one safetensors file, untied."""
    random_janus(janus_config(), seed=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 60_000])
def test_saved_checkpoint_loads_in_the_port_and_back(
    tmp_path, janus_config, random_janus, tied, shard_bytes
):
    port = random_janus(janus_config(tied=tied, num_key_value_heads=1), seed=4)
    port.save_pretrained(tmp_path / "theirs")
    first = load_checkpoint(tmp_path / "theirs")
    generation = {"generation_kwargs": {"boi_token_id": 17}, "eos_token_id": 5}
    save(tmp_path / "ours", first, max_shard_bytes=shard_bytes, generation=generation)
    files = {p.name for p in (tmp_path / "ours").iterdir()}
    assert ("model.safetensors" in files) == (shard_bytes > 1e9)
    assert ("model.safetensors.index.json" in files) == (shard_bytes < 1e9)
    assert not files & {".saving", ".saved"}

    again, info = JanusForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    assert_equal_states(again.state_dict(), port.state_dict())
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert again.config.image_token_id == 59 and again.config.tie_word_embeddings == tied
    g = again.generation_config
    assert (g.bos_token_id, g.eos_token_id, g.pad_token_id) == (1, 5, 0)
    assert g.generation_kwargs == {"boi_token_id": 17}

    second = load_checkpoint(tmp_path / "ours")
    assert_equal_states(states(second), states(first))
    head, embedding = second.transformer.text_head, second.transformer.text_embedding
    assert (head.weight is embedding.weight) == tied == second.config.tie_word_embeddings
    save(tmp_path / "third", second, max_shard_bytes=shard_bytes)
    for path in (tmp_path / "ours").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "third" / path.name).read_bytes()


def test_saving_in_bfloat16(tmp_path, folder):
    loaded = load_checkpoint(folder)
    save(tmp_path / "half", loaded, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "half/model.safetensors").values()} == {
        torch.bfloat16
    }
    port = JanusForConditionalGeneration.from_pretrained(tmp_path / "half")
    assert port.dtype == torch.bfloat16
    found = states(load_checkpoint(tmp_path / "half"))
    assert_equal_states(found, {k: v.bfloat16().float() for k, v in states(loaded).items()})


@pytest.mark.parametrize("flag", [True, None])
@pytest.mark.parametrize("differs", [True, False])
def test_a_stored_head_counts_for_more_than_the_flag(folder, flag, differs):
    edit_config(folder, tie_word_embeddings=flag)
    state = load_file(folder / "model.safetensors")
    if not differs:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"].clone()
        save_file(state, folder / "model.safetensors")
    loaded = load_checkpoint(folder)
    model = loaded.transformer
    assert loaded.config.tie_word_embeddings == model.config.tied == (not differs)
    assert torch.equal(model.text_head.weight, state["lm_head.weight"])
    assert torch.equal(
        model.text_embedding.weight, state["model.language_model.embed_tokens.weight"]
    )


def test_to_port_is_inverted_by_from_port(folder):
    model = load_checkpoint(folder).transformer
    state = model.state_dict()
    port = to_port(state, model.config)
    assert_equal_states(from_port(port, model.config), state)
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, stored[key]) for key, tensor in port.items())


def test_loaded_modules_are_ready(folder):
    loaded = load_checkpoint(folder)
    for module in (loaded.transformer, loaded.vq, loaded.siglip):
        assert not any(m.training for m in module.modules())
        assert all(p.requires_grad and not p.is_meta for p in module.parameters())
        assert not any(b.is_meta for b in module.buffers())
    assert loaded.siglip.embeddings.position_ids.tolist() == [list(range(16))]
    rotary = loaded.transformer.rotary
    assert rotary.cos.shape == (64, 16) and rotary.cos[0].eq(1).all()
    # Nothing stays mapped: the file may be overwritten in place while the model runs.
    before = {k: v.clone() for k, v in states(loaded).items()}
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(b"\xff" * os.path.getsize(folder / "model.safetensors"))
    assert_equal_states(states(loaded), before)


def test_ignored_keys_are_ignored(folder):
    extra = {
        "model.language_model.rotary_emb.inv_freq": torch.ones(8),
        "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.vision_model.embeddings.position_ids": torch.arange(16),
        "model.vqmodel.quantize.codebook_used": torch.zeros(9),
    }
    before = states(load_checkpoint(folder))
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors")
    assert_equal_states(states(load_checkpoint(folder)), before)
    assert len(IGNORED) == 4  # a new entry wants a new line above


# ---------------------------------------------------------------- refusals


def edit_config(folder: Path, **changes) -> None:
    """Set fields of config.json by dotted path with __ for dots; None removes them."""
    raw = json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        *owners, name = path.split("__")
        part = raw
        for owner in owners:
            part = part[owner]
        part.pop(name, None)
        if value is not None:
            part[name] = value
    (folder / "config.json").write_text(json.dumps(raw))


def edit_weights(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def refused(folder: Path, *mentions: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    for mention in (str(folder), *mentions):
        assert mention in message, message


NORM = "model.language_model.layers.1.input_layernorm.weight"
CODEBOOK = "model.vqmodel.quantize.embedding.weight"
QKV = "model.vision_model.encoder.layers.0.self_attn.k_proj.bias"


@pytest.mark.parametrize("key", [NORM, CODEBOOK, QKV, "lm_head.weight"])
def test_missing_key(folder, key):
    edit_weights(folder, lambda state: state.pop(key))
    refused(folder, key, "missing")


@pytest.mark.parametrize("key", ["model.language_model.layers.2.mlp.up_proj.weight", "x"])
def test_unexpected_key(folder, key):
    edit_weights(folder, lambda state: state.update({key: torch.zeros(3)}))
    refused(folder, "model.safetensors", key)


@pytest.mark.parametrize("key", [NORM, CODEBOOK, QKV])
def test_wrong_shape(folder, key):
    edit_weights(folder, lambda state: state.update({key: torch.zeros(5, 2)}))
    refused(folder, "model.safetensors", key, "(5, 2)")


def test_config_of_another_size(folder):
    edit_config(folder, text_config__intermediate_size=96)
    refused(folder, "model.safetensors", "down_proj", "(48, 88)", "(48, 96)")


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_not_floats(folder, kind):
    edit_weights(folder, lambda state: state.update({NORM: torch.zeros(48).to(kind)}))
    refused(folder, "model.safetensors", NORM, "floating")


@pytest.mark.parametrize("keep", [0, 4, 500, -1])
def test_truncated_safetensors(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    refused(folder, "model.safetensors", "damaged")


@pytest.mark.parametrize("keep", [0, 4, 500, -1])
@pytest.mark.parametrize("form", ["bin", "legacy bin"])
def test_truncated_bin(tmp_path, keep, form):
    write_original(tmp_path, small_original(), form)
    path = tmp_path / "pytorch_model.bin"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    refused(tmp_path, "pytorch_model.bin", "damaged")


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["torch", "legacy torch", "pickle"])
def test_malicious_pickle_is_not_executed(tmp_path, form):
    proof, path = tmp_path / "executed", tmp_path / "pytorch_model.bin"
    write_original(tmp_path, {}, "none")
    payload = {"a": torch.zeros(2), "b": Payload(proof)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(payload, protocol=2))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "torch")
    refused(tmp_path, "pytorch_model.bin", "not executed")
    assert not proof.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert proof.exists()  # it would have run


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"a": 1}, {3: torch.zeros(2)}])
def test_bin_that_is_no_state(tmp_path, content):
    write_original(tmp_path, {}, "none")
    torch.save(content, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin")


def test_original_with_a_stranger_or_a_bad_qkv_or_a_gap(tmp_path):
    state = small_original()
    write_original(tmp_path, state | {"vision_model.extra": torch.zeros(2)}, "bin")
    refused(tmp_path, "pytorch_model.bin", "vision_model.extra")
    key = "vision_model.vision_tower.blocks.1.attn.qkv.bias"
    write_original(tmp_path, state | {key: torch.zeros(95)}, "bin")
    refused(tmp_path, "pytorch_model.bin", key, "(95,)")
    write_original(tmp_path, state | {key: torch.zeros(99)}, "bin")
    refused(tmp_path, "pytorch_model.bin", key, "(33,)", "q_proj.bias")
    for key in (
        "gen_embed.weight",
        "gen_vision_model.quant_conv.weight",
        "aligner.layers.0.bias",
        "language_model.lm_head.weight",
        "vision_model.vision_tower.pos_embed",
    ):
        write_original(tmp_path, {k: v for k, v in state.items() if k != key}, "bin")
        (name,) = original_names(key)
        refused(tmp_path, name, "missing")


def test_original_config_at_odds_with_its_weights(tmp_path):
    write_original(tmp_path, small_original(), "safetensors")
    edit_config(tmp_path, language_config__intermediate_size=96)
    refused(tmp_path, "language_model.model.layers.0.mlp.down_proj.weight", "(64, 96)")
    edit_config(tmp_path, language_config__intermediate_size=None)
    load_checkpoint(tmp_path)
    edit_config(tmp_path, aligner_config__params__projector_type="low_high_hybrid_split_mlp_gelu")
    refused(tmp_path, "aligner_config", "low_high_hybrid")


def shard(folder: Path, janus_config, random_janus) -> Path:
    port = random_janus(janus_config(), seed=6)
    shutil.rmtree(folder)
    port.save_pretrained(folder, max_shard_size="60KB")
    return folder / "model.safetensors.index.json"


def test_broken_indexes(folder, janus_config, random_janus):
    index = shard(folder, janus_config, random_janus)
    load_checkpoint(folder)
    good = index.read_text()
    data = json.loads(good)
    where = data["weight_map"]
    other = next(name for name in sorted(set(where.values())) if name != where[NORM])

    def with_map(changes: dict, drop: tuple[str, ...] = ()) -> None:
        kept = {k: v for k, v in where.items() if k not in drop}
        index.write_text(json.dumps(data | {"weight_map": kept | changes}))

    with_map({NORM: other})  # mapped to a shard that lacks it
    refused(folder, NORM)
    with_map({"stranger": other})
    refused(folder, other, "stranger")
    with_map({}, drop=(NORM,))  # present, yet not in the index
    refused(folder, where[NORM], NORM)
    with_map({NORM: "model-00009-of-00009.safetensors"})
    refused(folder, "model-00009-of-00009.safetensors", "missing")
    for outside in ("../model.safetensors", "/etc/passwd", "", "..", ".", 3):
        with_map({NORM: outside})
        refused(folder, index.name, NORM)
    for text in ("{", "[]", "{}", '{"weight_map": []}', "\xff", "[" * 100_000):
        index.write_bytes(text.encode("latin-1"))
        refused(folder, index.name)
    index.write_text(good)
    (folder / where[NORM]).unlink()
    refused(folder, where[NORM], "missing")


def test_a_key_in_two_shards(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "a.safetensors")
    save_file({NORM: state[NORM]}, folder / "b.safetensors")
    index = {"weight_map": dict.fromkeys(state, "a.safetensors") | {NORM: "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "a.safetensors", NORM)


def test_no_folder_no_config_no_weights(tmp_path, folder):
    refused(tmp_path / "absent", "not a folder")
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights")
    (folder / "config.json").unlink()
    refused(folder, "config.json", "missing")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", "\xff\xfe", '{"model_type": "janus"', "3"]
)
def test_unreadable_config(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, "config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"},
        {"model_type": None},
        {"model_type": ["janus"]},
        {"text_config": 5},
        {"text_config": None},
        {"vision_config": "x"},
        {"vq_config__channel_multiplier": []},
        {"vq_config__channel_multiplier": "12"},
        {"text_config__num_attention_heads": 0},
        {"text_config__num_attention_heads": "three"},
        {"text_config__hidden_act": "gelu"},
        {"text_config__hidden_size": -48},
        {"text_config__model_type": "gpt2"},
        {"vision_config__patch_size": 0},
        {"vision_config__num_attention_heads": 5},
        {"vision_config__image_size": [8, 8]},
        {"vision_config__use_qk_norm": True},
        {"tie_word_embeddings": "yes"},
    ],
)
def test_config_of_another_model(folder, change):
    edit_config(folder, **change)
    refused(folder)


# ---------------------------------------------------------------- interrupted saves


class Killed(BaseException):
    """Stands for the process ending: nothing after it runs, as far as a test can arrange."""


def two_checkpoints(tmp_path: Path, janus_config, random_janus) -> list[Checkpoint]:
    loaded = []
    for i, text in enumerate(({}, {"num_hidden_layers": 3, "tied": True})):
        random_janus(janus_config(**text), seed=i).save_pretrained(tmp_path / f"source{i}")
        loaded.append(load_checkpoint(tmp_path / f"source{i}"))
    return loaded


@pytest.mark.parametrize("sizes", [(5e9, 600_000), (600_000, 5e9), (600_000, 900_000)])
def test_killed_at_any_step_of_a_save(tmp_path, janus_config, random_janus, monkeypatch, sizes):
    old, new = two_checkpoints(tmp_path, janus_config, random_janus)
    old_states, new_states = states(old), states(new)
    seen = set()
    for step in range(100):
        target = tmp_path / f"target{step}"
        save(target, old, max_shard_bytes=int(sizes[0]))
        (target / "tokenizer.json").write_text("{}")
        calls = 0

        def counted(real, step=step):
            def call(*args, **kwargs):
                nonlocal calls
                if calls == step:
                    raise Killed
                calls += 1
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            # A killed process cleans nothing up, so clearing away counts as a step too.
            patch.setattr(shards, "save_file", counted(save_file))
            patch.setattr(shards.os, "replace", counted(os.replace))
            patch.setattr(shards, "sync", counted(shards.sync))
            patch.setattr(shards.shutil, "rmtree", counted(shutil.rmtree))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            try:
                save(target, new, max_shard_bytes=int(sizes[1]))
                finished = True
            except Killed:
                finished = False
        found = states(load_checkpoint(target))
        assert (target / "tokenizer.json").exists()
        if found.keys() == old_states.keys():
            assert not finished
            assert "new" not in seen  # the change happens once
            assert_equal_states(found, old_states)
            seen.add("old")
        else:
            assert_equal_states(found, new_states)
            seen.add("new")
        save(target, new, max_shard_bytes=int(sizes[1]))  # and the folder is usable again
        assert_equal_states(states(load_checkpoint(target)), new_states)
        names = {p.name for p in target.iterdir()}
        assert not {n for n in names if n.startswith(".")}
        assert {n for n in names if n.endswith("safetensors")} == weights_named(target)
        shutil.rmtree(target)
        if finished:
            assert seen == {"old", "new"}
            return
    raise AssertionError("the save never finished")


def weights_named(folder: Path) -> set[str]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return {"model.safetensors"}
    return set(json.loads(index.read_text())["weight_map"].values())


def test_a_failed_save_cleans_up(folder, monkeypatch):
    loaded = load_checkpoint(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(folder, loaded)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_saving_with_another_models_config(folder, janus_config):
    loaded = load_checkpoint(folder)
    with pytest.raises(CheckpointError, match="mlp_width 96"):
        save_checkpoint(
            folder, janus_config(intermediate_size=96), loaded.transformer, loaded.vq, loaded.siglip
        )
