"""The engine's forward on a loaded checkpoint is the forward of transformers' Janus."""

from __future__ import annotations

import pytest
import torch

from echogen.engine.checkpoints.weights import load_checkpoint
from echogen.engine.model import additive_mask

TOLERANCE = 1e-5

SHAPES = {
    "untied": {},
    "tied": {"tied": True},
    "grouped heads": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48},
    "one kv head, wide heads": {"head_dim": 32, "num_key_value_heads": 1, "hidden_size": 40,
                                "num_attention_heads": 5, "intermediate_size": 52},
    "rope, eps, mlp": {"rope_theta": 300.0, "rms_norm_eps": 1e-3, "intermediate_size": 130},
    "three-layer aligners": {"vision": {"depth": 3}, "vq": {"num_hidden_layers": 3}},
    "one-layer aligners": {"vision": {"depth": 1}, "vq": {"num_hidden_layers": 1}},
    "one layer, deeper vq": {"num_hidden_layers": 1, "vision": {"image_size": 12, "patch_size": 4,
                             "num_image_tokens": 9, "mlp_ratio": 2.5},
                             "vq": {"channel_multiplier": [1, 1, 2], "num_res_blocks": 2}},
}  # fmt: skip


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request, tmp_path_factory, janus_config, random_janus):
    """A port model, and what the engine loads from its folder (in shards for every other shape)."""
    number = list(SHAPES).index(request.param)
    port = random_janus(janus_config(**SHAPES[request.param]), seed=number)
    folder = tmp_path_factory.mktemp("checkpoint")
    port.save_pretrained(folder, max_shard_size="50KB" if number % 2 else "5GB")
    sharded = len(list(folder.glob("*.safetensors"))) > 1
    assert sharded == bool(number % 2)
    return port, load_checkpoint(folder)


def causal(tokens: int) -> torch.Tensor:
    return additive_mask(torch.ones(1, tokens, tokens, dtype=torch.bool).tril(), torch.float32)


@pytest.mark.parametrize("training", [False, True])
def test_text_and_image_logits_on_a_mixed_sequence(pair, relative_error, training):
    """With gradients too, since the engine then computes attention differently."""
    with torch.set_grad_enabled(training):
        check_mixed_sequence(*pair, relative_error)


def check_mixed_sequence(port, ours, relative_error) -> None:
    vocabulary, codebook = ours.transformer.config.vocab_size, ours.transformer.config.codebook_size
    generator = torch.Generator().manual_seed(1)
    before = torch.randint(vocabulary, (2, 5), generator=generator)
    codes = torch.randint(codebook, (2, 7), generator=generator)
    after = torch.randint(vocabulary, (2, 4), generator=generator)

    embed = port.get_input_embeddings()
    theirs = torch.cat(
        (embed(before), port.prepare_embeddings_for_image_generation(codes), embed(after)), 1
    )
    model = ours.transformer
    mine = torch.cat(
        (model.embed_text(before), model.embed_codes(codes), model.embed_text(after)), 1
    )
    assert relative_error(mine, theirs) < TOLERANCE
    assert relative_error(model.code_table()[codes], mine[:, 5:12]) < TOLERANCE

    hidden = model(mine, torch.arange(16), causal(16))
    wanted = port.model(inputs_embeds=theirs).last_hidden_state
    assert relative_error(hidden, wanted) < TOLERANCE
    text = port(inputs_embeds=theirs).logits
    assert relative_error(model.text_head(hidden), text) < TOLERANCE
    image = port.model.generation_head(wanted)
    assert relative_error(model.image_head(hidden), image) < TOLERANCE


@torch.inference_mode()
def test_pixels_through_siglip_into_placeholders(pair, relative_error):
    port, ours = pair
    config, generator = ours.transformer.config, torch.Generator().manual_seed(2)
    pixels = torch.randn(2, 3, config.image_size, config.image_size, generator=generator)
    ids = torch.randint(config.vocab_size - 1, (2, 6 + config.image_tokens), generator=generator)
    ids[:, 3 : 3 + config.image_tokens] = ours.config.image_token_id
    assert (ids == ours.config.image_token_id).sum() == 2 * config.image_tokens

    model = ours.transformer
    features = ours.siglip(pixels).last_hidden_state
    assert relative_error(features, port.model.vision_model(pixels).last_hidden_state) < TOLERANCE
    embeddings = model.embed_text(ids)
    embeddings[:, 3 : 3 + config.image_tokens] = model.embed_pixels(features)
    hidden = model(embeddings, torch.arange(ids.shape[1]), causal(ids.shape[1]))
    wanted = port(input_ids=ids, pixel_values=pixels).logits
    assert relative_error(model.text_head(hidden), wanted) < TOLERANCE


@torch.inference_mode()
def test_vq_decodes_and_encodes_alike(pair, relative_error):
    port, ours = pair
    config, generator = ours.transformer.config, torch.Generator().manual_seed(3)
    codes = torch.randint(config.codebook_size, (2, config.image_tokens), generator=generator)
    wanted = port.model.vqmodel.decode(codes)
    assert relative_error(ours.vq.decode(codes), wanted) < TOLERANCE
    latent = ours.vq.quant_conv(ours.vq.encoder(wanted))
    theirs = port.model.vqmodel
    assert relative_error(latent, theirs.quant_conv(theirs.encoder(wanted))) < TOLERANCE
    assert torch.equal(ours.vq.quantize.embedding.weight, theirs.quantize.embedding.weight)


def test_every_weight_matters(pair):
    """No weight has a value (0, or 1 for a gain) that would hide a forgotten term."""
    port, _ = pair
    for name, parameter in port.named_parameters():
        assert parameter.std(correction=0) > 0.01, name


def test_bfloat16_agrees_roughly(tmp_path, janus_config, random_janus, relative_error):
    port = random_janus(janus_config(), seed=5)
    port.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for m in (ours.transformer, ours.vq, ours.siglip) for p in m.parameters()} == {
        torch.bfloat16
    }
    model, ids = ours.transformer, torch.arange(20).unsqueeze(0)
    with torch.inference_mode():
        mask = causal(20).bfloat16()
        logits = model.text_head(model(model.embed_text(ids), torch.arange(20), mask))
        error = relative_error(logits.float(), port(input_ids=ids).logits)
    # 8 bits of mantissa through two layers; measured 0.008. RoPE tables in bfloat16 would add more.
    assert error < 0.03
    assert model.rotary.cos.dtype == torch.float32
