"""Dumps of failed steps: what the loss was computed from, in a file, to inspect and repeat.

A NaN loss does not show where it came from. The file holds the weights before the step, the batch,
and everything else that the step reads; `repeat_dump` computes the step again and reports which of
its numbers are not finite.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from echogen.train.config import LoopConfig
from echogen.train.parallel.processes import Processes
from echogen.train.run.checkpoint import StateError, load_state, save_state
from echogen.train.run.runtime import only_deterministic
from echogen.train.run.update import check, gradients
from echogen.train.run.weights import given_by_start, put_weights
from echogen.train.stages.stage import Stage, identity, other_run, resumable


def inputs_of(stage: Stage, step: int) -> dict[str, Any]:
    """What the loss of a step reads in this process, if the stage provides it."""
    inputs = getattr(stage, "inputs", None)
    return {} if inputs is None else inputs(step)


def write_dump(
    folder: Path,
    stage: Stage,
    step: int,
    error: str,
    weights: dict[str, Tensor],
    inputs: dict[str, Any],
    parts: int,
) -> Path:
    """Write ``dump-stepN.pt`` into a run's folder and return its path.

    It holds: ``stage`` and ``config`` of the run, ``step``, the ``error``, the module's ``weights``
    before the step, whole, and their ``fingerprint``, the ``inputs`` of the loss in all processes,
    and the number of ``parts`` (processes × accumulate) in which they processed the batch, with the
    settings that say which of them were drawn at once. Like a state it leaves out frozen weights of
    the model that the run starts from, whose fingerprint is in the ``config``.
    """
    path = folder / f"dump-step{step}.pt"
    found = {
        **identity(stage),
        "step": step,
        "error": error,
        "module": weights,
        "fingerprint": fingerprint(weights),
        "inputs": inputs,
        "parts": parts,
        "accumulate": stage.config.loop.accumulate,
        "draw_at_once": getattr(stage.config, "draw_at_once", None),
    }
    save_state(path, found)
    return path


def fingerprint(weights: dict[str, Tensor]) -> str:
    """Hash of names and bytes of weights."""
    digest = hashlib.blake2b(digest_size=6)
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        numbers = tensor.detach().cpu().contiguous().flatten()
        digest.update(numbers.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Repeated:
    """A step computed again.

    Attributes:
        step: its number.
        loss: its loss.
        grad_norm: norm of its gradients, before they are clipped.
        numbers: the stage's numbers.
        broken: parameters whose gradients are not finite.
        weights: parameters that were not finite before the step.
        same_inputs: whether the stage reproduced the batch in the file; if not (other data, another
            version), a different step was computed here.
    """

    step: int
    loss: float
    grad_norm: float
    numbers: dict[str, float]
    broken: list[str]
    weights: list[str]
    same_inputs: bool


def repeat_dump(stage: Stage, config: LoopConfig, path: Path) -> Repeated:
    """Compute the step of a dump again, with its weights, which the stage then keeps; nothing is
    written or updated. The parts are those of the run, one after another in one process: with other
    parts, a stage would draw other inputs in each. Those that a process of the run drew at once are
    drawn at once here, as others would be the same only up to rounding.

    Raises:
        StateError: a file that is torn, not a dump, of another run, or whose weights do not match
            its fingerprint; a step that is not the first on its rollout.
    """
    found = load_state(path, mend="name another dump-step….pt")
    if "fingerprint" not in found:
        raise StateError(f"{path}: no dump of a step; name a dump-step….pt")
    if other := other_run(found, stage):
        raise StateError(
            f"{path}: written by another run ({other}); give the same recipe, options, model and "
            f"data"
        )
    if fingerprint(found["module"]) != found["fingerprint"]:
        raise StateError(f"{path}: its weights are not those of its fingerprint; it is damaged")
    step, named = int(found["step"]), dict(stage.module.named_parameters())
    if not resumable(stage, step):
        updates = stage.config.updates
        raise StateError(
            f"{path}: step {step} is update {step % updates + 1} of {updates} on its rollout, "
            f"which was drawn with weights that are gone; look at the file's inputs instead"
        )
    put_weights(stage.module, found["module"], given_by_start(stage), str(path))
    trained = [p for p in named.values() if p.requires_grad]
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    _draw_as_in(found, stage)
    config = replace(config, accumulate=found.get("parts", config.accumulate))
    check(stage, config, Processes())
    with only_deterministic(config.deterministic):
        loss, numbers = gradients(stage, config, trained, step, Processes())
    grads = {n: p.grad for n, p in named.items() if p.grad is not None}
    return Repeated(
        step=step,
        loss=loss,
        grad_norm=float(nn.utils.get_total_norm(grads.values())),
        numbers={name: float(value) for name, value in numbers.items()},
        broken=[n for n, grad in grads.items() if not _finite(grad)],
        weights=[n for n, p in named.items() if not _finite(p)],
        same_inputs=_same(found["inputs"], inputs_of(stage, step)),
    )


def _draw_as_in(found: dict[str, Any], stage: Any) -> None:
    """Give a stage a dump's settings of what is drawn at once. A bound of its own stays: there may
    be less memory here."""
    if "accumulate" in found:  # older ones do not say
        loop = replace(stage.config.loop, accumulate=found["accumulate"])
        stage.config = replace(stage.config, loop=loop)
    if getattr(stage.config, "draw_at_once", 0) is None:
        stage.config = replace(stage.config, draw_at_once=found.get("draw_at_once"))


def _finite(x: Tensor) -> bool:
    return bool(x.detach().isfinite().all())


def _same(a: Any, b: Any) -> bool:
    """Whether two containers of tensors hold the same numbers, NaN at the same places."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype
        a, b = a.cpu(), b.cpu()
        return same and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
