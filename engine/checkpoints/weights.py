"""Reads and writes Janus checkpoints, so that the engine runs what the rest of the world trained.

A folder holds config.json and weights, in the layout of transformers' port or in the original one
(deepseek-ai/Janus). Every tensor is accounted for: a key that is missing, unknown, of another shape
or kind ends in a CheckpointError before anything is computed with it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import JanusConfig, JanusVisionModel, JanusVQVAE

from echogen.engine.checkpoints.keymap import (
    VISION_PREFIX,
    VQ_PREFIX,
    CheckpointError,
    ignored,
    original_config,
    original_parts,
    to_port,
)
from echogen.engine.checkpoints.shards import (
    Shard,
    finish_commit,
    one_line,
    open_weights,
    read_json,
    replacing,
    write_json,
    write_weights,
)
from echogen.engine.config import ConfigError, ModelConfig
from echogen.engine.model import UnifiedTransformer

_EMBEDDING, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Checkpoint:
    """A model in memory: its configuration and its three networks, in evaluation mode.

    Attributes:
        config: the port's configuration; ``tie_word_embeddings`` agrees with the weights.
        transformer: text and image codes in, logits out.
        vq: image ↔ codes; its codebook rows are exactly the stored ones (not normalised).
        siglip: pixels → features for ``transformer.embed_pixels``.
    """

    config: JanusConfig
    transformer: UnifiedTransformer
    vq: JanusVQVAE
    siglip: JanusVisionModel


@dataclass(frozen=True)
class _Source:
    """Where a tensor named as in the port comes from."""

    shard: Shard
    stored_as: str
    original: bool

    def read(self, key: str) -> Tensor:
        tensor = self.shard.get(self.stored_as)
        return original_parts(self.stored_as, tensor)[key] if self.original else tensor


def load_checkpoint(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Checkpoint:
    """Load a Janus checkpoint, tensor by tensor into the memory it will run from.

    Args:
        folder: holds config.json and one of model.safetensors, model.safetensors.index.json,
            pytorch_model.bin, pytorch_model.bin.index.json (looked for in this order). Pickled
            files are read as tensors only; one that holds anything else is refused unexecuted.
        dtype: floating type of all weights in memory, whatever the file holds.
        device: where they live.

    Raises:
        CheckpointError: a file is missing, damaged or of another model; a key is missing, unknown,
            or of a shape or kind that config.json does not ask for; a weight is NaN or infinite, as
            it is stored or in ``dtype``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; name the one that holds config.json")
    finish_commit(folder)
    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    if kind not in ("janus", "multi_modality"):
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {kind!r}; "
            "this engine runs 'janus' (transformers) and 'multi_modality' (deepseek-ai/Janus)"
        )
    sources, shapes = _sources(open_weights(folder), original=kind == "multi_modality")
    config = _read_config(folder, raw, shapes)
    _set_tied(config, _tied(config, sources, folder))
    try:
        shape = ModelConfig.from_janus(config)
        with torch.device("meta"):
            transformer = UnifiedTransformer(shape)
            vq = JanusVQVAE(config.vq_config)  # type: ignore[arg-type]
            siglip = JanusVisionModel(config.vision_config)  # type: ignore[arg-type]
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except Exception as error:  # as in _read_config
        raise CheckpointError(f"{folder / 'config.json'}: {one_line(error)}") from error
    modules: tuple[nn.Module, ...] = (transformer, vq, siglip)
    for module in modules:
        module.to(dtype).eval()
    if shape.tied and _HEAD in sources:
        del sources[_HEAD]  # equal to the embedding, see _tied
    _check(sources, shapes, _port_state(transformer, vq, siglip), folder)
    _materialise(transformer, vq, siglip, device)
    with torch.no_grad():
        for key, target in _port_state(transformer, vq, siglip).items():
            target.copy_(sources[key].read(key))
            _check_finite(target, sources[key], dtype)
    return Checkpoint(config, transformer, vq, siglip)


def save_checkpoint(
    folder: str | Path,
    config: JanusConfig,
    transformer: UnifiedTransformer,
    vq: JanusVQVAE,
    siglip: JanusVisionModel,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    generation: Mapping[str, Any] | None = None,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint that this module and transformers' ``from_pretrained`` load.

    Everything is first written and synced beside the present checkpoint, then renamed over it; an
    interrupted save leaves either the previous checkpoint or the new one, never a mixture. Other
    files in the folder stay.

    Args:
        folder: made if absent.
        config: describes the modules, except for the tie flag, which the transformer decides.
        transformer, vq, siglip: the weights.
        dtype: type of the written weights; None: as they are in memory.
        max_shard_bytes: a larger checkpoint is split into shards with an index.
        generation: entries of generation_config.json, which override the bos, eos and pad ids of
            the text config; image generation in transformers needs
            ``{"generation_kwargs": {"boi_token_id": ...}}``.
        beside: writes what else belongs to the checkpoint (a tokenizer) into the folder that it is
            given; it is moved into place together with the weights.

    Raises:
        CheckpointError: the config does not describe the transformer; a type that checkpoints are
            not loaded from.
        ConfigError: the config asks for what the engine does not compute.
    """
    folder = Path(folder)
    if dtype is not None and dtype not in _FLOATS:  # before anything is replaced
        raise CheckpointError(
            f"{folder}: dtype = {dtype!r}; choose one of {', '.join(map(str, _FLOATS))}"
        )
    config = copy.deepcopy(config)
    _set_tied(config, transformer.config.tied)
    shape = ModelConfig.from_janus(config)
    for field in fields(shape):
        asked, built = getattr(shape, field.name), getattr(transformer.config, field.name)
        if asked != built:
            raise CheckpointError(
                f"{folder}: the config gives {field.name} {asked}, the transformer was built with "
                f"{built}; save it with its own config"
            )
    config.architectures = ["JanusForConditionalGeneration"]
    config.dtype = dtype or transformer.norm.weight.dtype
    ids = {
        k: getattr(config.text_config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    with replacing(folder) as staging:
        write_weights(staging, _port_state(transformer, vq, siglip), dtype, max_shard_bytes)
        write_json(staging / "config.json", json.loads(config.to_json_string()))
        write_json(staging / "generation_config.json", ids | dict(generation or {}))
        if beside is not None:
            beside(staging)


def _sources(shards: list[Shard], original: bool) -> tuple[dict[str, _Source], dict[str, Tensor]]:
    """Sources and shapes of every tensor that matters, under the port's names."""
    sources: dict[str, _Source] = {}
    shapes: dict[str, Tensor] = {}
    for shard in shards:
        for stored_as, meta in shard.shapes.items():
            if ignored(stored_as):
                continue
            try:
                parts = original_parts(stored_as, meta) if original else {stored_as: meta}
            except CheckpointError as error:
                raise CheckpointError(f"{shard.path}: {error}") from None
            for key in parts:
                if key in sources:
                    raise CheckpointError(f"{shard.path}: {stored_as} appears twice; keep one")
                sources[key] = _Source(shard, stored_as, original)
            shapes |= parts
    return sources, shapes


def _read_config(folder: Path, raw: dict[str, Any], shapes: Mapping[str, Tensor]) -> JanusConfig:
    original = raw["model_type"] == "multi_modality"
    tokens = _tokenizer_ids(folder) if original else {}
    try:
        if original:
            return original_config(raw, shapes, tokens)
        config = JanusConfig.from_dict(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except Exception as error:  # nonsense sizes fail inside transformers with any kind of error
        raise CheckpointError(f"{folder / 'config.json'}: {one_line(error)}") from error
    if config.text_config.model_type != "llama":  # type: ignore[union-attr]
        raise CheckpointError(
            f"{folder / 'config.json'}: text_config.model_type is "
            f"{config.text_config.model_type!r}; this engine runs 'llama'"  # type: ignore[union-attr]
        )
    return config


def _tokenizer_ids(folder: Path) -> dict[str, int]:
    """Special ids that an original folder leaves to its tokenizer; empty where it has none."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return {}
    tokenizer = read_json(path)
    names: dict[str, Any] = {"image_token": "<image_placeholder>"}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        stated = read_json(folder / file) if (folder / file).exists() else {}
        for role in ("bos_token", "eos_token", "pad_token"):
            if token := stated.get(role):
                names[role] = token["content"] if isinstance(token, dict) else token
    try:
        vocabulary = tokenizer["model"]["vocab"]
        ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
        ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a tokenizer ({one_line(error)})") from None
    return {f"{role}_id": ids[name] for role, name in names.items() if name in ids}


def _tied(config: JanusConfig, sources: Mapping[str, _Source], folder: Path) -> bool:
    """Whether the text head and the text embedding are the same weight.

    JanusConfig's tie flag defaults to True and port checkpoints in the wild leave it out, so a
    stored head that differs from the embedding counts for more than the flag.
    """
    if _HEAD not in sources:
        if config.tie_word_embeddings:
            return True
        raise CheckpointError(
            f"{folder}: {_HEAD} is missing although config.json unties it; "
            "add it or set tie_word_embeddings to true"
        )
    if not config.tie_word_embeddings or _EMBEDDING not in sources:
        return False
    return torch.equal(sources[_HEAD].read(_HEAD), sources[_EMBEDDING].read(_EMBEDDING))


def _set_tied(config: JanusConfig, tied: bool) -> None:
    # Both flags: earlier versions of transformers read the text config's.
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied  # type: ignore


def _port_state(
    transformer: UnifiedTransformer, vq: JanusVQVAE, siglip: JanusVisionModel
) -> dict[str, Tensor]:
    """Every stored tensor under the port's name, as views on the modules' memory."""
    state = to_port(transformer.state_dict(), transformer.config)
    state |= {VQ_PREFIX + name: tensor for name, tensor in vq.state_dict().items()}
    return state | {VISION_PREFIX + name: tensor for name, tensor in siglip.state_dict().items()}


def _check(
    sources: Mapping[str, _Source],
    shapes: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    folder: Path,
) -> None:
    for key, source in sources.items():
        path, name = source.shard.path, source.stored_as
        if key not in targets:
            raise CheckpointError(
                f"{path}: {name} belongs to no part of the model that config.json describes"
            )
        if shapes[key].dtype not in _FLOATS:
            raise CheckpointError(f"{path}: {name} does not hold floating-point weights")
        if shapes[key].shape != targets[key].shape:
            stored, asked = tuple(shapes[key].shape), tuple(targets[key].shape)
            raise CheckpointError(
                f"{path}: {name} has shape {stored}, config.json asks for {asked}"
                + ("" if name == key else f" as {key}")
            )
    for key in sorted(targets.keys() - sources.keys()):
        raise CheckpointError(f"{folder}: {key} is missing from the weights; complete them")


def _check_finite(weight: Tensor, source: _Source, dtype: torch.dtype) -> None:
    """Refuse weights that are NaN or infinite: logits of NaN would silently draw code 0 everywhere.
    `aminmax` propagates NaN and takes less time than the copy before it (5 ms for 90 MB in
    bfloat16, against 7 ms for the copy; `isfinite` takes 217 ms)."""
    low, high = weight.aminmax()
    if not (low.isfinite() and high.isfinite()):
        found = "NaN" if low.isnan() else "an infinite number"
        raise CheckpointError(
            f"{source.shard.path}: {source.stored_as} holds {found} in {dtype}; take a checkpoint "
            f"from before its training failed, or a type of more range"
        )


def _materialise(
    transformer: UnifiedTransformer,
    vq: JanusVQVAE,
    siglip: JanusVisionModel,
    device: torch.device | str,
) -> None:
    """Allocate the memory of modules built on the meta device, and fill in the buffers that no
    checkpoint holds."""
    for module in (transformer, vq, siglip):
        module.to_empty(device=device)
    if transformer.config.tied:  # to_empty allocates the shared weight twice
        transformer.text_head.weight = transformer.text_embedding.weight
    transformer.rotary.build(transformer.config.max_positions)
    ids = siglip.embeddings.position_ids
    ids.copy_(torch.arange(ids.shape[-1], device=device).unsqueeze(0))
    rebuilt = {transformer: {"rotary.cos", "rotary.sin"}, siglip: {"embeddings.position_ids"}}
    for module in (transformer, vq, siglip):
        assert _unsaved_buffers(module) == rebuilt.get(module, set()), _unsaved_buffers(module)


def _unsaved_buffers(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_buffers()} - module.state_dict().keys()
