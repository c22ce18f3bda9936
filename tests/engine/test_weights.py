"""Checkpoints: tying, round trips and interrupted saves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JanusForConditionalGeneration

from echogen.engine.checkpoints import shards
from echogen.engine.checkpoints.keymap import IGNORED
from echogen.engine.checkpoints.weights import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    to_port,
)

from .checkpoints import (
    assert_equal_states,
    edit_config,
    save,
    states,
)


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


def test_writing_into_the_ports_tensors_fills_the_model(folder):
    model = load_checkpoint(folder).transformer
    state = model.state_dict()
    filled = {name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()}
    stored = load_file(folder / "model.safetensors")
    for key, tensor in to_port(filled, model.config).items():
        tensor.copy_(stored[key])
    assert_equal_states(filled, state)


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
    assert len(IGNORED) == 4  # a new entry needs a new line above


class Killed(BaseException):
    """Simulates the end of the process: nothing after it runs, as far as a test can arrange."""


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


def test_a_type_that_cannot_be_loaded_replaces_nothing(folder):
    loaded = load_checkpoint(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for dtype in (torch.int8, torch.float8_e4m3fn, "float16"):
        with pytest.raises(CheckpointError, match=r"dtype = .*; choose one of torch\.float64"):
            save(folder, loaded, dtype=dtype)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_saving_with_another_models_config(folder, janus_config):
    loaded = load_checkpoint(folder)
    with pytest.raises(CheckpointError, match="mlp_width 96"):
        save_checkpoint(
            folder, janus_config(intermediate_size=96), loaded.transformer, loaded.vq, loaded.siglip
        )
