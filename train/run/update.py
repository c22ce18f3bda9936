"""One optimizer step: the gradients of a step's batch, part by part, and the update."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from echogen.engine.ranges import span
from echogen.train.config import LoopConfig
from echogen.train.parallel.processes import Processes
from echogen.train.stages.stage import BeginRefused, NotFinite, Stage, TrainingError


def check(stage: Stage, config: LoopConfig, processes: Processes) -> None:
    """Refuse settings that the stage does not support. Raises BeginRefused."""
    parts = processes.shares(config.accumulate)[0][1]
    if parts > 1:
        splittable(stage)
    for name in ("batch", "extra_grounding"):
        if (value := getattr(stage.config, name, 0)) % parts:
            raise BeginRefused(
                f"{stage.name}: {name} = {value} cannot be shared out evenly over {parts} parts "
                f"({processes.count} processes × accumulate = {config.accumulate}); make it a "
                f"multiple of {parts}"
            )
    module: Any = stage.module
    if config.lora and not hasattr(stage, "gather"):
        raise BeginRefused(f"{stage.name}: has no blocks to put adapters beside; set lora to 0")
    if config.checkpoint_activations:
        if not hasattr(module, "checkpointing"):
            raise BeginRefused(
                f"{stage.name}: checkpoint_activations, but its module has no decoder blocks to "
                f"run again; leave it out"
            )
        module.checkpointing = True


def update(
    stage: Stage,
    config: LoopConfig,
    optimizers: list[torch.optim.Optimizer],
    parameters: list[nn.Parameter],
    rate: float,
    step: int,
    processes: Processes | None = None,
) -> tuple[dict[str, Any], float]:
    """Make one optimizer step at ``rate`` times the peak rate; return the stage's numbers, as in
    `Stage.loss`, and the gradient norm.

    Raises:
        NotFinite: a loss or a gradient that is NaN or infinite; the weights are as before.
        TrainingError: ``deterministic`` is set, and an operation is not deterministic.
    """
    processes = processes or Processes()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak"]
    loss, numbers = gradients(stage, config, parameters, step, processes)
    norm = processes.clip(parameters, config.clip)
    if processes.any(not math.isfinite(loss)) or not math.isfinite(norm):
        raise NotFinite(f"{stage.name}: loss {loss}, gradient norm {norm} at step {step}")
    with span(f"train/{stage.name}/optimizer", step=step):
        for optimizer in optimizers:
            optimizer.step()
    for p in parameters:  # now, and not before the next step: evaluations need the memory
        p.grad = None
    return numbers, norm


def gradients(
    stage: Stage,
    config: LoopConfig,
    parameters: list[nn.Parameter],
    step: int,
    processes: Processes,
) -> tuple[float, dict[str, Any]]:
    """Compute the gradients of a step's batch; return the loss of this process's parts and the
    numbers of all processes."""
    for p in parameters:
        p.grad = None
    losses, numbers, shares = [], dict[str, Any](), processes.shares(config.accumulate)
    for part, parts in shares:
        device = parameters[0].device.type
        loss, told = _backward(stage, config, device, step, part, parts, processes)
        losses.append(loss)
        for name, value in told.items():
            numbers[name] = numbers[name] + value if name in numbers else value
    ahead = getattr(stage, "ahead", None)
    if ahead is not None and step + 1 < config.steps:
        # Backward is queued, and nothing has waited for it yet. If the batch were made between two
        # steps, a GPU would idle for that long (`train/STAGE/data` of `echogen bench train`).
        ahead(step + 1, *shares[0])
    return sum(float(loss) for loss in losses), processes.total(numbers)


def _backward(
    stage: Stage,
    config: LoopConfig,
    device: str,
    step: int,
    part: int,
    parts: int,
    processes: Processes,
) -> tuple[Tensor, dict[str, Any]]:
    """Add the gradients of one part; return its loss and its numbers."""
    torch.manual_seed(torch_seed(config.seed, step, part, parts))
    name = f"train/{stage.name}"
    try:
        with (
            span(f"{name}/forward", step=step),
            torch.autocast(device, torch.bfloat16, enabled=config.bf16),
        ):
            loss, numbers = processes.run(lambda: _loss(stage, step, part, parts))
        with span(f"{name}/backward", step=step):
            loss.backward()
    except RuntimeError as error:
        if config.deterministic and "deterministic" in str(error):
            reason = str(error).split(", but you set")[0]
            raise TrainingError(
                f"{stage.name}: step {step} cannot be made deterministic here ({reason}); leave "
                f"deterministic out, and a resumed run repeats itself up to rounding"
            ) from error
        raise
    return loss.detach(), numbers


def _loss(stage: Stage, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, Any]]:
    return stage.loss(step) if parts == 1 else splittable(stage)(step, part, parts)


def splittable(stage: Stage) -> Any:
    """The stage's ``loss_part``. Raises BeginRefused where it has none."""
    found = getattr(stage, "loss_part", None)
    if found is None:
        raise BeginRefused(
            f"{stage.name}: this stage's batch is not made of parts; set accumulate to 1, and run "
            f"it in one process"
        )
    return found


def torch_seed(seed: int, step: int, part: int = 0, parts: int = 1) -> int:
    """The seed of torch's own random state in a part of a step (dropout uses it). Like every number
    that a run draws it is a function of its place, so no state has to be kept for a resumed run."""
    digest = hashlib.blake2b(f"{seed} {step} {part} {parts}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
