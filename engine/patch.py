"""Run transformers' Janus on this project's operators, and restore it afterwards.

Only instances are changed: each module of the language model gets its own ``forward``, which
`Patch.undo` removes. Classes, other models and the weights stay as they are, so checkpoints, hooks,
adapters and gradient checkpointing work as before.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, JanusForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    eager_attention_forward,
)

from echogen.kernels.logprob import linear_logprob
from echogen.kernels.rms_norm import rms_norm
from echogen.kernels.rope import rope
from echogen.kernels.swiglu import swiglu_pair


def _norm(self: LlamaRMSNorm, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states.contiguous(), self.weight, self.variance_epsilon)


def _mlp(self: LlamaMLP, x: Tensor) -> Tensor:
    out: Tensor = self.down_proj(swiglu_pair(self.gate_proj(x), self.up_proj(x)))
    return out


def _attention(
    self: LlamaAttention,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
    past_key_values: Cache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """LlamaAttention.forward with the rotation in one launch, before heads and tokens are
    transposed. Mask, cache and the selected attention are used as in the original. The cache is
    called ``cache`` in newer releases of transformers and ``past_key_values`` in older ones."""
    cache = past_key_values if cache is None else cache
    if lost := [name for name, value in kwargs.items() if isinstance(value, Cache)]:
        # It would be lost among the other keywords, and decoding would lose its context.
        raise TypeError(f"this version of transformers hands the cache over as {lost[0]!r}")
    B, L, _ = hidden_states.shape
    query, key, value = (
        project(hidden_states).view(B, L, -1, self.head_dim)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    query, key = rope(query, key, *position_embeddings)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, eager_attention_forward
    )
    attended, weights = attend(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        **kwargs,
    )
    return self.o_proj(attended.reshape(B, L, -1).contiguous()), weights


FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    LlamaRMSNorm: _norm,
    LlamaAttention: _attention,
    LlamaMLP: _mlp,
}
"""The replacement for each class's forward. Subclasses are not patched: theirs may differ."""


class Patch:
    """What `apply_to_janus` did; a context manager that undoes it on exit.

    Attributes:
        modules: the modules that run on the operators, by name; empty once undone.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self._forwards: dict[str, MethodType] = {}
        for name, module in modules.items():
            # A method, not a closure: a deep copy of the model then computes with its own weights.
            self._forwards[name] = MethodType(FORWARDS[type(module)], module)
            module.forward = self._forwards[name]

    def undo(self) -> None:
        """Remove the operators; a second call does nothing.

        Raises:
            RuntimeError: something else replaced a forward since; undo that first.
        """
        for name, module in self.modules.items():
            if vars(module).get("forward") is not self._forwards[name]:
                raise RuntimeError(f"{name}.forward was replaced after the patch; undo that first")
        for module in self.modules.values():
            del module.forward
        self.modules = {}

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def _check(model: Any) -> None:
    if not isinstance(model, JanusForConditionalGeneration):
        raise TypeError(
            f"model is a {type(model).__name__}; it must be a JanusForConditionalGeneration"
        )


def apply_to_janus(model: JanusForConditionalGeneration) -> Patch:
    """Replace RMSNorm, the application of RoPE, and SwiGLU in the language model by the operators.

    Outputs and gradients stay those of the model: in float32 within 1e-5 (of the largest value); in
    bfloat16 within 2e-2, as RoPE and SwiGLU each round once here, but three times and twice in the
    model. Works with every attention implementation, cache, and autocast.

    Returns:
        The patch; ``with apply_to_janus(model): …`` or ``patch.undo()`` restores the model.

    Raises:
        TypeError: the model is not a Janus, or its language model not a Llama.
        ValueError: an activation other than SiLU.
        RuntimeError: a module's forward is replaced already (by this, or by something else).
    """
    _check(model)
    language_model = model.model.language_model
    found = {
        f"model.language_model.{name}": module
        for name, module in language_model.named_modules()
        if type(module) in FORWARDS
    }
    if not found:
        raise TypeError(f"the language model is a {type(language_model).__name__}, not Llama's")
    text: Any = model.config.text_config
    activation = text.hidden_act
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act = {activation!r}; the operator is SwiGLU's, for 'silu'")
    for name, module in found.items():
        if "forward" in vars(module):
            raise RuntimeError(f"{name}.forward is replaced already; undo that patch first")
    return Patch(found)


def image_head_loss(model: JanusForConditionalGeneration, hidden: Tensor, codes: Tensor) -> Tensor:
    """Mean cross entropy of the image head, without ever holding the logits of all tokens at once.

    Equals ``F.cross_entropy(model.model.generation_head(hidden), codes)``; needs no patch.

    Args:
        model: the model whose head is used.
        hidden: float [..., D], the language model's last hidden states at the positions that
            predict ``codes``.
        codes: int64 [...]; negative ones are left out of the mean.

    Returns:
        A scalar, float32 (float64 for a float64 model); 0 if every code is left out.

    Raises:
        TypeError: the model is not a Janus.
        ValueError: codes whose shape does not match hidden.
    """
    _check(model)
    if codes.shape != hidden.shape[:-1]:
        raise ValueError(
            f"codes has shape {tuple(codes.shape)}; it must be {tuple(hidden.shape[:-1])}"
        )
    head = model.model.generation_head
    lifted = head.activation_fn(head.proj_out(hidden)).reshape(codes.numel(), -1)
    # Under autocast the head's input is narrower than its weights.
    weight, bias = (t.to(lifted.dtype) for t in (head.vision_head.weight, head.vision_head.bias))
    logprob, _ = linear_logprob(lifted, weight, codes.reshape(-1), bias)
    count = torch.count_nonzero(codes >= 0).clamp(min=1)
    return -logprob.sum() / count
