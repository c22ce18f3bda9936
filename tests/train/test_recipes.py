"""Recipes: each is a whole configuration, and describes the model that it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from echogen.engine.config import ModelConfig
from echogen.engine.model import UnifiedTransformer
from echogen.train.config import Recipe, to_json
from echogen.train.data.canvas import draw
from echogen.train.data.layouts import MOST_OBJECTS
from echogen.train.data.samples import image_side
from echogen.train.data.shapes import read_correctly, sample_scene
from echogen.train.eval.judge import detect
from echogen.train.recipes import RECIPES, janus_pro_1b, small, tiny
from echogen.train.stages.pmtp import janus_config
from echogen.train.stages.vq import build_vq
from echogen.train.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red circle"] * 3, bins=0, merges=10)


def model_config(recipe: Recipe, tokenizer) -> ModelConfig:
    """Shapes of a recipe's model, behind its own image tokenizer."""
    with torch.device("meta"):
        vq = build_vq(recipe.vq, recipe.pmtp.width)
    assert image_side(vq) == recipe.vq.image_size
    return ModelConfig.from_janus(janus_config(recipe.pmtp, vq, tokenizer))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_describes_a_model_of_the_world(name, tokenizer):
    recipe = RECIPES[name]()
    assert recipe.name == name and to_json(recipe)["pmtp"]["width"] == recipe.pmtp.width
    config = model_config(recipe, tokenizer)
    assert config.image_size == recipe.vq.image_size and config.image_size % 64 == 0
    assert config.codebook_size == recipe.vq.codes
    # Room for a crowded layout beside its image: about a dozen tokens an object.
    assert config.max_positions >= config.image_tokens + 20 * MOST_OBJECTS
    for stage in (recipe.pmtp, recipe.pmtp_on, recipe.djo, recipe.cycle_rl):
        assert stage.loop.steps > stage.loop.warmup


def test_a_larger_image_leaves_room_for_its_prompt(tokenizer):
    recipe = small()
    config = model_config(replace(recipe, vq=replace(recipe.vq, image_size=256)), tokenizer)
    assert config.image_tokens == 1024
    assert config.max_positions >= config.image_tokens + 20 * MOST_OBJECTS


def test_the_small_recipe_stands_between(tokenizer):
    config = model_config(small(), tokenizer)
    assert (config.image_size, config.image_tokens) == (128, 256)
    with torch.device("meta"):
        count = {
            r.name: sum(p.numel() for p in UnifiedTransformer(c).parameters())
            for r, c in ((r, model_config(r, tokenizer)) for r in (tiny(), small()))
        }
    assert 10 < count["small"] / count["tiny"] < 20


def test_janus_pro_has_the_shapes_of_its_checkpoint(tokenizer):
    recipe = janus_pro_1b()
    config = replace(  # what the checkpoint has and a model begun from nothing would not
        model_config(recipe, tokenizer), vocab_size=102_400, pixel_dim=1024, pixel_aligner_depth=2
    )
    wanted = {
        "layers": 24, "width": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128,
        "mlp_width": 5632, "codebook_size": 16_384, "code_dim": 8, "image_tokens": 576,
        "image_size": 384, "rope_theta": 1e4, "norm_eps": 1e-6, "head_width": 2048, "tied": False,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in wanted} == wanted
    with torch.device("meta"):
        model = UnifiedTransformer(config)
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    assert count["blocks"] + count["norm"] == 1_233_225_728
    assert count["text_embedding"] == count["text_head"] == 209_715_200
    assert 1.5e9 < sum(count.values()) < 2.1e9
    assert recipe.pmtp.bins == 1000
    rates = [s.loop.lr for s in (recipe.pmtp, recipe.djo, recipe.cycle_rl)]
    steps = [s.loop.steps for s in (recipe.pmtp, recipe.djo, recipe.cycle_rl)]
    assert rates == [5e-5] * 3 and steps == [125_000, 60_000, 50_000]
    assert recipe.pmtp.loop.muon_lr is None and recipe.cycle_rl.group == 8


# --- the world on a larger canvas -----------------------------------------------------------------


@pytest.mark.parametrize("size", [128, 192, 384])
def test_the_judge_reads_the_world_on_larger_canvases(size):
    for index in range(12):
        scene = sample_scene("val", index)
        picture = draw(scene, size)
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
        assert read_correctly(scene, detect(picture))


def test_a_larger_canvas_has_finer_edges_and_the_worlds_own_is_as_it_was():
    scene = sample_scene("val", 3)
    own = draw(scene)
    assert np.array_equal(own, scene.image())
    doubled = own.repeat(2, 0).repeat(2, 1)
    differ = (draw(scene, 128) != doubled).any(-1).mean()
    assert 0 < differ < 0.05  # edges only
    for size in (0, 96, -64):
        with pytest.raises(ValueError, match=f"image_size = {size}"):
            draw(scene, size)


def test_tiny_takes_its_samples_as_when_it_was_recorded_and_the_others_in_epochs():
    """Its recorded configurations do not name the order."""
    for recipe, kind in ((tiny(), "independent"), (small(), "epochs"), (janus_pro_1b(), "epochs")):
        for stage in (recipe.pmtp, recipe.pmtp_on, recipe.djo, recipe.cycle_rl):
            assert stage.order == kind
            assert to_json(stage).get("order", "independent") == kind
            assert ("order" in to_json(stage)) == (kind == "epochs")
