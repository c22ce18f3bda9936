"""Checkpoints that the tests write: the original layout, spelt out, and a small one in it; helpers
that damage a checkpoint, and that check what its refusal says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import JanusForConditionalGeneration

from echogen.engine.checkpoints.weights import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)


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
