"""Sharded data parallelism: every process holds a slice of each weight, of its gradient and of its
optimizer state (FSDP2, `torch.distributed.fsdp.fully_shard`; ZeRO-3, Rajbhandari 2020).

A decoder block is gathered just before it runs and freed afterwards, and again in backward.
Everything that is not a block (embeddings, heads) is one group, gathered for the whole forward and
backward pass of a part. The slices are float32, the optimizer's master weights; under ``bf16``
products cast the gathered weights, as in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from echogen.train.config import LoopConfig
from echogen.train.parallel.distributed import Several
from echogen.train.parallel.whole import whole
from echogen.train.stages.stage import BeginRefused, Stage

T = TypeVar("T")


class Root(nn.Module):
    """Calls the function it is given, with everything that is not a block gathered.

    A loss calls a model's pieces as it needs them, the embeddings before its forward and the heads
    after it, so FSDP wraps the call of the loss.
    """

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, work: Callable[[], Any]) -> Any:
        """The result of ``work``."""
        return work()


class Sharded(Several):
    """A slice of every weight in each process (``parallel = "fsdp"``)."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__(config)
        self._root: Any = None
        self._outdate: Callable[[], None] = lambda: None

    def prepare(self, stage: Stage) -> None:
        """See `Processes`.

        Raises:
            BeginRefused: a stage without decoder blocks, or one whose frozen grounder would be a
                second set of tensors for the same weights.
        """
        blocks = getattr(stage.module, "blocks", None)
        gather = getattr(stage, "gather", None)
        if blocks is None or gather is None:
            raise BeginRefused(
                f"{stage.name}: has no decoder blocks to shard; set parallel to 'ddp'"
            )
        if getattr(stage.config, "freeze_grounder", False):
            raise BeginRefused(
                f"{stage.name}: freeze_grounder runs the blocks on detached weights, and a sharded "
                f"run gathers its own; set parallel to 'ddp', or freeze_grounder to False"
            )
        super().prepare(stage)
        frozen: list[Any] = getattr(stage, "frozen", [])
        kind = next(stage.module.parameters()).device.type
        mesh = init_device_mesh(kind, (self.count,))
        for model in (stage.module, *frozen):
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
        # Gathered once per part and not freed between forward and backward: the heads are the last
        # of one and the first of the other.
        self._root = fully_shard(
            Root(stage.module, *frozen), mesh=mesh, reshard_after_forward=False
        )
        for part in self._root.modules():
            if isinstance(part, FSDPModule):  # parts of a batch add up, see `shares`
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
        gather()
        self._outdate = stage.engine.outdate  # type: ignore[attr-defined]

    def run(self, work: Callable[[], T]) -> T:
        """See `Processes`."""
        assert self._root is not None, "prepare comes first"
        result: T = self._root(work)
        return result

    def clip(self, parameters: list[nn.Parameter], limit: float) -> float:
        """See `Processes`."""
        self._outdate()
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = whole(nn.utils.get_total_norm(grads))
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return float(norm)

    def assemble(self, stage: Stage) -> None:
        """Fill the engine's buffer, which needs every process."""
        stage.engine.refresh()  # type: ignore[attr-defined]

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """See `Processes`."""
        return {name: whole(tensor) for name, tensor in super().weights(module).items()}
