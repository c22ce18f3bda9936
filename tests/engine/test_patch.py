"""A patched Janus computes what the port's own does, and the patch can be undone completely."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, JanusForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from echogen.engine.patch import apply_to_janus, image_head_loss

SHAPES = {
    "untied": {},
    "grouped heads": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "one kv head, wide heads": {"head_dim": 32, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "biases": {"attention_bias": True, "mlp_bias": True, "tied": True},
}


@pytest.fixture(params=list(SHAPES))
def model(request, janus_config, random_janus) -> JanusForConditionalGeneration:
    return random_janus(janus_config(**SHAPES[request.param]), seed=3)


@pytest.fixture
def plain(janus_config, random_janus) -> JanusForConditionalGeneration:
    return random_janus(janus_config(), seed=4)


def batch(model, rows=2, length=7):
    """Token ids and a mask with padding on the left."""
    generator = torch.Generator().manual_seed(5)
    words = model.config.text_config.vocab_size - 1
    ids = torch.randint(words, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs_and_gradients(model):
    """Text logits, image logits, and every gradient of a loss on both."""
    model.zero_grad()
    hidden = model.model(**batch(model)).last_hidden_state
    text, image = model.lm_head(hidden), model.model.generation_head(hidden)
    (text.float().logsumexp(-1).sum() + image.float().sin().sum()).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return text, image, grads


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_float32_outputs_and_gradients(model, attention, relative_error):
    model.set_attn_implementation(attention)
    text, image, grads = outputs_and_gradients(model)
    with apply_to_janus(model):
        our_text, our_image, our_grads = outputs_and_gradients(model)
    assert relative_error(our_text, text) < 1e-5
    assert relative_error(our_image, image) < 1e-5
    assert our_grads.keys() == grads.keys() and any("layernorm" in name for name in grads)
    for name, grad in grads.items():
        assert relative_error(our_grads[name], grad) < 1e-5, name


def test_bfloat16_outputs_and_gradients(model, relative_error):
    """Outputs are within 2e-2 of the port's, and at most 1.3 times as far from float32."""
    _, truth, _ = outputs_and_gradients(model)
    model.to(torch.bfloat16)
    text, image, grads = outputs_and_gradients(model)
    with apply_to_janus(model):
        our_text, our_image, our_grads = outputs_and_gradients(model)
    assert our_image.dtype == torch.bfloat16
    assert relative_error(our_text, text) < 2e-2
    assert relative_error(our_image, image) < 2e-2
    assert relative_error(our_image.float(), truth) < 1.3 * relative_error(image.float(), truth)
    for name, grad in grads.items():
        difference = (our_grads[name].double() - grad.double()).norm() / grad.double().norm()
        assert difference < 3e-2, name


def test_autocast(plain, relative_error):
    with torch.autocast("cpu", torch.bfloat16):
        text, image, _ = outputs_and_gradients(plain)
        with apply_to_janus(plain):
            our_text, our_image, _ = outputs_and_gradients(plain)
    assert our_text.dtype == text.dtype
    assert relative_error(our_text, text) < 2e-2
    assert relative_error(our_image, image) < 2e-2


def test_cached_decoding_and_generation(model):
    inputs = batch(model)
    options = {"do_sample": False, "max_new_tokens": 6, "generation_mode": "text"}
    wanted = model.generate(**inputs, **options)
    with apply_to_janus(model):
        assert torch.equal(model.generate(**inputs, **options), wanted)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_taken_under_the_name_of_either_release(plain, name):
    """A cache under a third name is refused: the step would forget what it had read."""
    attention = plain.model.language_model.layers[0].self_attn
    hidden = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(0))
    turns = torch.ones(1, 3, 16), torch.zeros(1, 3, 16)
    with apply_to_janus(plain), torch.no_grad():
        held = DynamicCache()
        attention(hidden, position_embeddings=turns, **{name: held})
        assert held.get_seq_length() == 3
        with pytest.raises(TypeError, match="hands the cache over as 'store'"):
            attention(hidden, position_embeddings=turns, store=held)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing(plain, relative_error):
    plain.train()
    _, _, grads = outputs_and_gradients(plain)
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    with apply_to_janus(plain):
        _, _, ours = outputs_and_gradients(plain)
    for name, grad in grads.items():
        assert relative_error(ours[name], grad) < 1e-5, name


def test_outputs_that_transformers_captures(plain, relative_error):
    plain.set_attn_implementation("eager")
    wanted = plain(**batch(plain), output_attentions=True, output_hidden_states=True)
    with apply_to_janus(plain):
        found = plain(**batch(plain), output_attentions=True, output_hidden_states=True)
    for name in ("attentions", "hidden_states"):
        assert len(found[name]) == len(wanted[name]) > 0
        for a, b in zip(found[name], wanted[name], strict=True):
            assert relative_error(a, b) < 1e-5


def test_every_kind_of_module_is_replaced_and_given_back(plain):
    classes = {c: c.forward for c in (LlamaRMSNorm, LlamaAttention, LlamaMLP)}
    before = {n: dict(vars(m)) for n, m in plain.named_modules()}
    text, *_ = outputs_and_gradients(plain)
    plain.zero_grad()
    patch = apply_to_janus(plain)
    layers = plain.config.text_config.num_hidden_layers
    kinds = [type(m) for m in patch.modules.values()]
    assert kinds.count(LlamaRMSNorm) == 2 * layers + 1
    assert kinds.count(LlamaAttention) == kinds.count(LlamaMLP) == layers
    assert all(plain.get_submodule(n) is m for n, m in patch.modules.items())
    patch.undo()
    assert not patch.modules
    patch.undo()
    assert {n: dict(vars(m)) for n, m in plain.named_modules()} == before
    assert all(c.forward is forward for c, forward in classes.items())
    assert torch.equal(outputs_and_gradients(plain)[0], text)


def test_other_models_are_not_touched(janus_config, random_janus):
    one, other = (random_janus(janus_config(), seed=1) for _ in range(2))
    with apply_to_janus(one):
        assert not any("forward" in vars(m) for m in other.modules())
        apply_to_janus(other).undo()


def test_an_error_inside_undoes_it_too(plain):
    with pytest.raises(KeyError), apply_to_janus(plain):
        raise KeyError
    assert not any("forward" in vars(m) for m in plain.modules())


def test_a_copy_computes_with_its_own_weights(plain):
    with apply_to_janus(plain), torch.no_grad():
        twin = copy.deepcopy(plain)
        wanted = twin(**batch(twin)).logits
        for p in plain.parameters():
            p.zero_()
        assert torch.equal(twin(**batch(twin)).logits, wanted)


def test_twice_is_refused(plain):
    refused = pytest.raises(RuntimeError, match=r"model\.language_model\.\S+ is replaced already")
    with apply_to_janus(plain), refused:
        apply_to_janus(plain)
    apply_to_janus(plain).undo()


def test_undo_refuses_to_bury_a_later_patch(plain):
    patch = apply_to_janus(plain)
    mlp = plain.model.language_model.layers[0].mlp
    ours, mlp.forward = mlp.forward, lambda x: x
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.forward was replaced after"):
        patch.undo()
    assert len(patch.modules) == 9
    mlp.forward = ours
    patch.undo()


def test_other_models_are_refused(plain, janus_config, random_janus):
    for bad, name in [(nn.Linear(1, 1), "Linear"), (plain.model, "JanusModel"), (None, "NoneType")]:
        with pytest.raises(TypeError, match=f"is a {name};"):
            apply_to_janus(bad)
        with pytest.raises(TypeError, match=f"is a {name};"):
            image_head_loss(bad, torch.zeros(1, 48), torch.zeros(1, dtype=torch.long))
    gelu = random_janus(janus_config(hidden_act="gelu"))
    with pytest.raises(ValueError, match="hidden_act = 'gelu'"):
        apply_to_janus(gelu)
    plain.model.language_model = nn.Identity()
    with pytest.raises(TypeError, match="is a Identity"):
        apply_to_janus(plain)


def loss_and_gradients(model, hidden, loss):
    hidden = hidden.clone().requires_grad_()
    model.zero_grad()
    value = loss(hidden)
    value.backward()
    head = model.model.generation_head
    return [value, hidden.grad, *(p.grad.clone() for p in head.parameters())]


def test_image_head_loss(plain, relative_error):
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(3, 5, 48, generator=generator)
    codes = torch.randint(-3, 24, (3, 5), generator=generator)
    assert (codes < 0).any()
    head, targets = plain.model.generation_head, codes.clamp(min=-1).flatten()

    def eager(x):
        return F.cross_entropy(head(x).flatten(0, 1), targets, ignore_index=-1)

    found = loss_and_gradients(plain, hidden, lambda x: image_head_loss(plain, x, codes))
    for a, b in zip(found, loss_and_gradients(plain, hidden, eager), strict=True):
        assert relative_error(a, b) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(image_head_loss(plain, hidden, codes) / found[0] - 1) < 1e-2
    assert image_head_loss(plain, hidden, codes.clamp(max=-1)) == 0
    with pytest.raises(ValueError, match="codes has shape"):
        image_head_loss(plain, hidden, codes[:2])
