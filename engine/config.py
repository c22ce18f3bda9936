"""The dimensions of the unified transformer, read from a Janus configuration of `transformers`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import JanusConfig


class ConfigError(ValueError):
    """A configuration that this engine cannot run; the message names the field and the value."""


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of the unified transformer (Janus-Pro 1B in brackets).

    Attributes:
        vocab_size: text rows of the embedding and of the text head (102,400).
        codebook_size: image codes V (16,384).
        code_dim: width C of an image-code embedding (8).
        width: residual width D (2048).
        layers: decoder layers (24).
        heads, kv_heads, head_dim: query heads, key-value heads, width of one head (16, 16, 128).
        mlp_width: SwiGLU hidden width (5632).
        head_width: hidden width of the image head (2048).
        aligner_depth: linear layers from code to residual width (2).
        pixel_dim: width of SigLIP features (1024).
        pixel_aligner_depth: linear layers from SigLIP features to residual width (2).
        rope_theta, norm_eps: RoPE base (1e4), RMSNorm epsilon (1e-6).
        image_tokens: codes of one image T (576).
        image_size: pixels along a side (384).
        max_positions: longest sequence that the positions support.
        tied: the text head shares the text embedding's rows (False).
    """

    vocab_size: int
    codebook_size: int
    code_dim: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    head_width: int
    aligner_depth: int
    pixel_dim: int
    pixel_aligner_depth: int
    rope_theta: float
    norm_eps: float
    image_tokens: int
    image_size: int
    max_positions: int
    tied: bool

    @property
    def grid(self) -> int:
        """Image codes along a side."""
        return round(self.image_tokens**0.5)

    @classmethod
    def from_janus(cls, config: JanusConfig) -> ModelConfig:
        """Read the shapes of a `transformers` Janus configuration.

        Raises:
            ConfigError: the checkpoint asks for something the engine does not compute (biased
                attention, another activation, scaled RoPE, a VQ grid that does not match the image
                tokens), or for something impossible (heads that share keys unevenly).
        """
        text: Any = config.text_config
        vision: Any = config.vision_config
        vq: Any = config.vq_config
        rope = dict(getattr(text, "rope_parameters", None) or {})
        wanted = {
            "text_config.model_type": (text.model_type, "llama"),
            "text_config.hidden_act": (text.hidden_act, "silu"),
            "text_config.attention_bias": (bool(text.attention_bias), False),
            "text_config.mlp_bias": (bool(text.mlp_bias), False),
            "text_config.rope_parameters.rope_type": (rope.get("rope_type", "default"), "default"),
            "vision_config.hidden_act": (vision.hidden_act, "gelu"),
            "vq_config.hidden_act": (vq.hidden_act, "gelu"),
            "vq_config.projection_dim": (vq.projection_dim, text.hidden_size),
            "vq_config.image_token_embed_dim": (vq.image_token_embed_dim, text.hidden_size),
            "vision_config.projection_dim": (vision.projection_dim, text.hidden_size),
            "vision_config.num_image_tokens": (vision.num_image_tokens, vq.num_patches**2),
        }
        for field, (value, supported) in wanted.items():
            if value != supported:
                raise ConfigError(
                    f"config.json: {field} is {value!r}; this engine runs {supported!r}"
                )
        heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
        if heads % kv_heads:
            raise ConfigError(
                f"config.json: text_config.num_key_value_heads is {kv_heads}; it must divide the "
                f"{heads} num_attention_heads"
            )
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(
            vocab_size=text.vocab_size,
            codebook_size=vq.num_embeddings,
            code_dim=vq.embed_dim,
            width=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            mlp_width=text.intermediate_size,
            head_width=vq.projection_dim,
            aligner_depth=vq.num_hidden_layers,
            pixel_dim=vision.hidden_size,
            pixel_aligner_depth=vision.depth,
            rope_theta=float(rope.get("rope_theta", 10000.0)),
            norm_eps=text.rms_norm_eps,
            image_tokens=vision.num_image_tokens,
            image_size=vision.image_size,
            max_positions=text.max_position_embeddings,
            tied=bool(config.tie_word_embeddings),
        )
