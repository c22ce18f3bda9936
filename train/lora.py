"""Low-rank adapters (LoRA, Hu et al. 2021; through `peft`), for training on one small GPU.

The projections of every decoder block are frozen, and a low-rank product B·A beside each is
trained: gradients and optimizer moments then exist for only about a hundredth of the weights, which
is also all that a run's files hold (`run/weights.py`). The projections here are fused, so q, k and
v share a rank, and so do gate and up. The engine draws with the sum of both (`WholeEngine`), which
is also exported, with the adapter beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from echogen.engine.model import UnifiedTransformer
from echogen.train.config import LoopConfig
from echogen.train.run.checkpoint import StateError

PROJECTIONS = r"blocks\.\d+\.(qkv|out|gate_up|down)"
NAME = "default"  # peft's name for a model's only adapter


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise StateError("lora needs peft, which is missing; pip install -e '.[lora]'") from None
    return peft


def _config(loop: LoopConfig) -> Any:
    return _peft().LoraConfig(
        r=loop.lora, lora_alpha=2 * loop.lora, target_modules=PROJECTIONS, bias="none"
    )


def add_adapters(model: UnifiedTransformer, loop: LoopConfig) -> None:
    """Add adapters of rank ``loop.lora`` to every projection, and freeze everything else except the
    parts named in ``loop.lora_also``. B starts at 0, so the model's output does not change.

    Raises:
        StateError: peft is not installed.
    """
    device = model.norm.weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(loop.seed)
        _peft().inject_adapter_in_model(_config(loop), model)
    for name, p in model.named_parameters():
        p.requires_grad_(is_adapter(name))
    for part in loop.lora_also:
        model.get_submodule(part).requires_grad_(True)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' parameters by their names in the model."""
    return {name: p.detach() for name, p in model.named_parameters() if is_adapter(name)}


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Use the model as it was before the adapters were trained."""
    layers = [m for m in model.modules() if isinstance(m, _peft().tuners.lora.LoraLayer)]
    trained = [p for p in model.parameters() if p.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for p in trained:
            p.requires_grad_(True)


def save_adapter(weights: dict[str, Tensor], loop: LoopConfig, folder: Path) -> None:
    """Write adapters in `peft`'s format: ``PeftModel.from_pretrained(transformer, folder)`` adds
    them to the transformer that the run started from."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        "base_model.model." + name.replace(f".{NAME}.", "."): w.contiguous().cpu()
        for name, w in weights.items()
    }
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _config(loop).save_pretrained(folder)
