"""Broken and foreign checkpoints are refused in one line that names the file and the key."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from echogen.engine.checkpoints.keymap import original_names
from echogen.engine.checkpoints.weights import CheckpointError, load_checkpoint

from .checkpoints import (
    edit_config,
    edit_weights,
    refused,
    small_original,
    write_original,
)

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


@pytest.mark.parametrize("shared", [2, 6])
def test_heads_that_share_keys_unevenly(folder, shared):
    edit_config(folder, text_config__num_key_value_heads=shared)
    refused(folder, "num_key_value_heads", str(shared), "3 num_attention_heads")


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_not_floats(folder, kind):
    edit_weights(folder, lambda state: state.update({NORM: torch.zeros(48).to(kind)}))
    refused(folder, "model.safetensors", NORM, "floating")


@pytest.mark.parametrize("key", [NORM, CODEBOOK, QKV, "lm_head.weight"])
@pytest.mark.parametrize(
    ("value", "told"), [(torch.nan, "NaN"), (torch.inf, "infinite"), (-torch.inf, "infinite")]
)
def test_weights_that_no_logits_come_from(folder, key, value, told):
    edit_weights(folder, lambda state: state[key].view(-1)[-1:].fill_(value))
    refused(folder, "model.safetensors", key, told)


def test_a_weight_beyond_the_type_that_is_asked_for(folder):
    edit_weights(folder, lambda state: state[NORM][3:4].fill_(-1e5))
    assert load_checkpoint(folder).transformer.blocks[1].attn_norm.weight[3] == -1e5
    with pytest.raises(CheckpointError, match=f"{NORM} holds an infinite number in torch.float16"):
        load_checkpoint(folder, torch.float16)


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
    assert proof.exists()  # loaded without that check, it runs


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
