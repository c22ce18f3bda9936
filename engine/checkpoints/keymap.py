"""Maps the names of our weights to those of the transformers port of Janus and of the original.

Three layouts meet here. Ours fuses q, k, v and gate, up into one matrix each; the port keeps them
apart; the original (deepseek-ai/Janus) fuses only SigLIP's qkv and names nearly everything else
differently. Everything in this file is about names, rows and sizes; files are read in `weights.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from echogen.engine.config import ModelConfig


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; one line with the file, the key and the fix."""


VQ_PREFIX = "model.vqmodel."
VISION_PREFIX = "model.vision_model."

# Tensors that hold no knowledge: tables that are recomputed, a usage counter of VQ training, and
# the pooling head of SigLIP, which Janus never runs.
IGNORED = tuple(
    re.compile(pattern)
    for pattern in (
        r"(model\.language_model|language_model\.model)\.(layers\.\d+\.self_attn\.)?"
        r"rotary_emb\.(original_)?inv_freq",
        r"model\.vision_model\.embeddings\.position_ids",
        r"(model\.vqmodel|gen_vision_model)\.quantize\.codebook_used",
        r"vision_model\.vision_tower\.attn_pool\..+",
    )
)


def ignored(key: str) -> bool:
    """Whether a checkpoint may hold ``key`` although no module wants it."""
    return any(pattern.fullmatch(key) for pattern in IGNORED)


def places(config: ModelConfig) -> dict[str, tuple[str, slice]]:
    """Where each tensor of the port lives in the unified transformer.

    Returns:
        port key → (name in ``UnifiedTransformer.state_dict()``, its rows there). A tied model has
        no ``lm_head.weight``.
    """
    c, whole = config, slice(None)
    found = {
        "model.language_model.embed_tokens.weight": ("text_embedding.weight", whole),
        "model.language_model.norm.weight": ("norm.weight", whole),
        "model.generation_embeddings.weight": ("code_embedding.weight", whole),
    }
    query, key = c.heads * c.head_dim, c.kv_heads * c.head_dim
    fused = {
        "self_attn.q_proj": ("qkv", slice(0, query)),
        "self_attn.k_proj": ("qkv", slice(query, query + key)),
        "self_attn.v_proj": ("qkv", slice(query + key, query + 2 * key)),
        "self_attn.o_proj": ("out", whole),
        "mlp.gate_proj": ("gate_up", slice(0, c.mlp_width)),
        "mlp.up_proj": ("gate_up", slice(c.mlp_width, 2 * c.mlp_width)),
        "mlp.down_proj": ("down", whole),
        "input_layernorm": ("attn_norm", whole),
        "post_attention_layernorm": ("mlp_norm", whole),
    }
    for i in range(c.layers):
        for port, (ours, rows) in fused.items():
            found[f"model.language_model.layers.{i}.{port}.weight"] = (
                f"blocks.{i}.{ours}.weight",
                rows,
            )
    linears = {
        "model.generation_head.proj_out": "image_head.0",
        "model.generation_head.vision_head": "image_head.2",
    }
    for port, ours, depth in (
        ("model.generation_aligner", "code_aligner", c.aligner_depth),
        ("model.aligner", "pixel_aligner", c.pixel_aligner_depth),
    ):
        for i in range(depth):
            linears[f"{port}.{_projector_layer(i)}"] = f"{ours}.layers.{i}"
    for port, ours in linears.items():
        for part in ("weight", "bias"):
            found[f"{port}.{part}"] = (f"{ours}.{part}", whole)
    if not c.tied:
        found["lm_head.weight"] = ("text_head.weight", whole)
    return found


def to_port(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Name the transformer's tensors as the port does.

    The results are views on ``state``'s tensors, so that writing into them fills the fused weights.

    Args:
        state: ``UnifiedTransformer.state_dict()``, any dtype and device.
        config: its shapes.

    Raises:
        KeyError: ``state`` lacks one of the transformer's tensors.
    """
    return {key: state[name][rows] for key, (name, rows) in places(config).items()}


def _projector_layer(i: int) -> str:
    return "fc1" if i == 0 else f"hidden_layers.{i - 1}"


# Original → port: owner's prefix there and here, then the renaming of what follows; first match
# wins. Projectors and qkv need more than a renaming and are handled in `original_names`.
_RENAMES: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("language_model.model.", "model.language_model.", ((r"(.+)", r"\1"),)),
    ("language_model.", "", ((r"(lm_head\.weight)", r"\1"),)),
    ("gen_embed.", "model.generation_embeddings.", ((r"(weight)", r"\1"),)),
    (
        "gen_head.",
        "model.generation_head.",
        ((r"output_mlp_projector\.(.+)", r"proj_out.\1"), (r"(vision_head\..+)", r"\1")),
    ),
    (
        "gen_vision_model.",
        VQ_PREFIX,
        (
            (r"encoder\.conv_blocks\.(\d+)\.res\.(.+)", r"encoder.down.\1.block.\2"),
            (r"decoder\.conv_blocks\.(\d+)\.res\.(.+)", r"decoder.up.\1.block.\2"),
            (r"encoder\.conv_blocks\.(.+)", r"encoder.down.\1"),
            (r"decoder\.conv_blocks\.(.+)", r"decoder.up.\1"),
            (r"(encoder|decoder)\.mid\.0\.(.+)", r"\1.mid.block_1.\2"),
            (r"(encoder|decoder)\.mid\.1\.(.+)", r"\1.mid.attn_1.\2"),
            (r"(encoder|decoder)\.mid\.2\.(.+)", r"\1.mid.block_2.\2"),
            (r"(.+)", r"\1"),
        ),
    ),
    (
        "vision_model.vision_tower.",
        VISION_PREFIX,
        (
            (r"pos_embed", "embeddings.position_embedding.weight"),
            (r"patch_embed\.proj\.(.+)", r"embeddings.patch_embedding.\1"),
            (r"norm\.(.+)", r"post_layernorm.\1"),
            (r"blocks\.(\d+)\.norm([12])\.(.+)", r"encoder.layers.\1.layer_norm\2.\3"),
            (
                r"blocks\.(\d+)\.attn\.proj\.(.+)",
                r"encoder.layers.\1.self_attn.projection_layer.\2",
            ),
            (r"blocks\.(\d+)\.(mlp\.fc[12]\..+)", r"encoder.layers.\1.\2"),
        ),
    ),
)
_QKV = re.compile(r"vision_model\.vision_tower\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)")
_PROJECTOR = re.compile(r"(gen_)?aligner\.layers\.(\d+)\.(weight|bias)")


def original_names(key: str) -> list[str]:
    """The port's names for one key of the original layout.

    Returns:
        One name; three for a fused qkv of SigLIP (thirds of its rows, in this order); none for a
        tensor that is dropped.

    Raises:
        CheckpointError: the original layout has no such key.
    """
    if ignored(key):
        return []
    if match := _QKV.fullmatch(key):
        layer, part = match.groups()
        attention = f"{VISION_PREFIX}encoder.layers.{layer}.self_attn"
        return [f"{attention}.{name}_proj.{part}" for name in "qkv"]
    if match := _PROJECTOR.fullmatch(key):
        generation, index, part = match.groups()
        if int(index) % 2 == 0:  # the odd ones are the activations of nn.Sequential
            owner = "model.generation_aligner" if generation else "model.aligner"
            return [f"{owner}.{_projector_layer(int(index) // 2)}.{part}"]
    for theirs, port, renames in _RENAMES:
        rest = key.removeprefix(theirs)
        for pattern, replacement in renames if rest != key else ():
            if match := re.fullmatch(pattern, rest):
                return [port + match.expand(replacement)]
    raise CheckpointError(f"{key} is not a key of the original Janus layout; remove it")


def original_parts(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of the original layout under the port's names (views; no copy).

    Raises:
        CheckpointError: an unknown key, or a fused qkv that does not split in three.
    """
    names = original_names(key)
    if len(names) == 3:
        if tensor.dim() == 0 or tensor.shape[0] % 3:
            raise CheckpointError(f"{key} has shape {tuple(tensor.shape)}; q, k and v need thirds")
        return dict(zip(names, tensor.chunk(3), strict=True))
    if key.endswith(".pos_embed") and tensor.dim() == 3 and tensor.shape[0] == 1:
        tensor = tensor[0]
    return dict.fromkeys(names, tensor)


# Fields of the original's language_config that mean the same in a LlamaConfig.
_LANGUAGE_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "rope_scaling", "attention_bias", "mlp_bias",
)  # fmt: skip
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def original_config(
    raw: Mapping[str, Any], state: Mapping[str, Tensor], tokens: Mapping[str, int]
) -> JanusConfig:
    """Describe an original checkpoint as a JanusConfig.

    The original states some sizes, leaves others to LlamaConfig's defaults of the day, and builds
    SigLIP and the VQ from names. So a stated size is taken, to be checked against the weights
    afterwards, and an unstated one is read off the weights.

    Args:
        raw: config.json of the original ("multi_modality").
        state: the checkpoint under the port's names; only shapes are read (meta tensors will do).
        tokens: ids known from the tokenizer: bos_token_id, eos_token_id, pad_token_id and
            image_token_id, each optional.

    Raises:
        CheckpointError: a tensor needed for a size is missing, or a part is of another kind.
    """
    language = dict(raw.get("language_config") or {})
    for part in ("aligner_config", "gen_aligner_config"):
        kind = _params(raw, part).get("projector_type", "mlp_gelu")
        if kind != "mlp_gelu":
            raise CheckpointError(f"{part}.params.projector_type is {kind!r}; only 'mlp_gelu' runs")

    def size(key: str, dim: int = 0) -> int:
        if key not in state or state[key].dim() <= dim:
            raise CheckpointError(f"{key} is missing and gives a size; complete the checkpoint")
        return state[key].shape[dim]

    def count(pattern: str) -> int:
        return len({m[1] for key in state if (m := re.match(pattern, key))})

    layer = "model.language_model.layers.0."
    text: dict[str, Any] = {
        "vocab_size": size("model.language_model.embed_tokens.weight"),
        "hidden_size": size("model.language_model.embed_tokens.weight", 1),
        "intermediate_size": size(layer + "mlp.gate_proj.weight"),
        "num_hidden_layers": count(r"model\.language_model\.layers\.(\d+)\."),
        # The number of heads leaves no trace in the shapes; unstated, the original runs Llama's 32.
        "num_attention_heads": 32,
    }
    text |= {k: language[k] for k in _LANGUAGE_FIELDS if language.get(k) is not None}
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    text.setdefault("num_key_value_heads", size(layer + "self_attn.k_proj.weight") // head_dim)
    text |= {name: tokens.get(name, language.get(name)) for name in _TOKENS}

    patch = VISION_PREFIX + "embeddings.patch_embedding.weight"
    positions = size(VISION_PREFIX + "embeddings.position_embedding.weight")
    width, hidden = size(patch), size(VISION_PREFIX + "encoder.layers.0.mlp.fc1.weight")
    vision = JanusVisionConfig(
        hidden_size=width,
        num_hidden_layers=count(re.escape(VISION_PREFIX) + r"encoder\.layers\.(\d+)\."),
        num_attention_heads=16,  # in every SigLIP the original can name
        num_channels=size(patch, 1),
        patch_size=size(patch, 3),
        image_size=_params(raw, "vision_config").get(
            "image_size", math.isqrt(positions) * size(patch, 3)
        ),
        # The port computes int(width * ratio): half a unit more keeps rounding from losing one.
        mlp_ratio=hidden / width if hidden % width == 0 else (hidden + 0.5) / width,
        projection_dim=size("model.aligner.fc1.weight"),
        depth=1 + count(r"model\.aligner\.hidden_layers\.(\d+)\."),
        num_image_tokens=positions,
    )
    first, levels = (
        VQ_PREFIX + "encoder.conv_in.weight",
        count(r"model\.vqmodel\.encoder\.down\.(\d+)\."),
    )
    channels = [size(f"{VQ_PREFIX}encoder.down.{i}.block.0.conv1.weight") for i in range(levels)]
    vq = JanusVQVAEConfig(
        embed_dim=size(VQ_PREFIX + "quantize.embedding.weight", 1),
        num_embeddings=size(VQ_PREFIX + "quantize.embedding.weight"),
        latent_channels=size(VQ_PREFIX + "quant_conv.weight", 1),
        in_channels=size(first, 1),
        base_channels=size(first),
        channel_multiplier=[c // size(first) for c in channels],
        num_res_blocks=count(r"model\.vqmodel\.encoder\.down\.0\.block\.(\d+)\."),
        out_channels=size(VQ_PREFIX + "decoder.conv_out.weight"),
        projection_dim=size("model.generation_aligner.fc1.weight"),
        num_hidden_layers=1 + count(r"model\.generation_aligner\.hidden_layers\.(\d+)\."),
        image_token_embed_dim=size("model.generation_head.proj_out.weight", 1),
    )
    image_token: dict[str, Any] = {k: tokens[k] for k in ("image_token_id",) if k in tokens}
    return JanusConfig(
        text_config=LlamaConfig(**text),
        vision_config=vision,
        vq_config=vq,
        tie_word_embeddings=False,  # the original never ties
        **image_token,
    )


def _params(raw: Mapping[str, Any], part: str) -> dict[str, Any]:
    return dict((raw.get(part) or {}).get("params") or {})
