"""A module's weights as the engine reads them, whatever form they are trained in.

In a sharded run each process holds a slice of every weight. With adapters (LoRA) a weight is a
frozen one and a product beside it. And an optimizer needs float32, twice the bytes that drawing
should read. The engine draws and grounds with whole, plain weights of its own dtype, so in these
cases it runs on a copy in a fixed buffer, refilled when the weights have changed. Weights that are
already trained in that form share their memory with the copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from echogen.engine.engine import Engine
from echogen.engine.model import UnifiedTransformer
from echogen.train.lora import adapter_weights, is_adapter


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; if it is, every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(every: Tensor, template: Tensor | None) -> Tensor:
    """Put a whole tensor on the device and into the shards of a template of its shape."""
    if template is None or template.shape != every.shape:
        return every
    if not isinstance(template, DTensor):
        return every.to(template.device)
    mesh, placements = template.device_mesh, template.placements
    # Every process has the whole tensor: nothing is sent.
    return distribute_tensor(every.to(template.device), mesh, placements, src_data_rank=None)


def plain_weights(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield (name in a plain module, whole weight, whether it is the trained tensor itself) for
    each parameter; adapters are added to their weights."""
    for prefix, part in module.named_modules():
        start = f"{prefix}." if prefix else ""
        if ".base_layer" in start or is_adapter(start):
            continue
        base = getattr(part, "base_layer", None)
        if base is not None:
            yield f"{start}weight", _merged(part), False
            continue
        for name, p in part.named_parameters(recurse=False):
            yield start + name, whole(p.detach()), not isinstance(p, DTensor)


def _merged(layer: Any) -> Tensor:
    """W + scale·B·A of a peft layer."""
    weight = whole(layer.base_layer.weight.detach())
    for name, scale in layer.scaling.items():
        a, b = (whole(x[name].weight.detach()) for x in (layer.lora_A, layer.lora_B))
        weight = weight + scale * (b @ a)
    return weight


class WholeEngine(Engine):
    """An engine on whole weights of a module that is trained in another form.

    Args:
        engine: provides the tokenizer, the configuration and the image tokenizer.
        module: the transformer that is trained.
        dtype: of the engine's weights; None: as they are trained.

    Attributes:
        adapter: the adapters' weights, whole, as of the last ``refresh``.
    """

    def __init__(
        self, engine: Engine, module: UnifiedTransformer, dtype: torch.dtype | None = None
    ) -> None:
        self._module, self._seen = module, list[int]()
        self.adapter: dict[str, Tensor] = {}
        self._sharded = any(isinstance(p, DTensor) for p in module.parameters())
        with torch.device("meta"):
            copy = UnifiedTransformer(module.config)
        self._allocate(copy, module, dtype)
        super().__init__(
            engine.config,
            copy.eval().requires_grad_(False),
            engine.vq,
            engine.siglip,
            engine.prompts,
            engine.sampling,
            engine.pixels_trained,
        )

    def outdate(self) -> None:
        """Mark the buffer as outdated: an optimizer step follows."""
        self._seen = []

    def refresh(self) -> None:
        """Refill the buffer. See `Engine`.

        In a sharded run this needs every process, so it is done only if the weights have changed
        since the last time: otherwise one process can draw and ground alone. Fused optimizer steps
        do not change the version of a sharded tensor, so ``outdate`` reports them. Versions are
        compared one by one, not by their sum: within a sharded pass some belong to gathered
        tensors, which have their own count, and two sums may be equal although an average has come
        and gone between them.
        """
        now = [p._version for p in self._module.parameters()]
        if not self._sharded or now != self._seen:
            self._fill()
            self._seen = now
        super().refresh()

    @torch.no_grad()
    def _fill(self) -> None:
        into = dict(self.transformer.named_parameters())
        for name, weight, _ in plain_weights(self._module):
            # As decided in `_allocate`: within a sharded pass some weights are gathered now.
            if name not in self._shared:
                into[name].copy_(weight)
        self.adapter = {name: whole(w).clone() for name, w in adapter_weights(self._module).items()}

    def _allocate(
        self, copy: UnifiedTransformer, module: UnifiedTransformer, dtype: torch.dtype | None
    ) -> None:
        self._shared: set[str] = set()
        for name, weight, itself in plain_weights(module):
            shared = itself and dtype in (None, weight.dtype)
            if shared:
                self._shared.add(name)
            held = nn.Parameter(weight if shared else torch.empty_like(weight, dtype=dtype))
            path, _, last = name.rpartition(".")
            setattr(copy.get_submodule(path), last, held)
        if copy.config.tied:
            copy.text_head.weight = copy.text_embedding.weight
        copy.rotary.cos, copy.rotary.sin = module.rotary.cos, module.rotary.sin
