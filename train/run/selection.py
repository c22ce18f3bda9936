"""Which weights of a run are exported: its last, or those of its best validation.

The last are not always the best: a policy can raise its own reward while the images get worse, so
checkpoints are chosen on validation and reported on test.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from echogen.train.parallel.processes import Processes
from echogen.train.run.checkpoint import StateError, load_head, load_state, save_state


class Best:
    """The weights of a run's best validation so far, kept in ``best.pt`` beside its state.

    Of equal values the first is kept, and NaN never is. ``step`` is that of the weights kept: 0 for
    those that the run began with, None if there are none yet. A run that resumes from before its
    best step reaches that step again with the same result, so the file may be ahead of it.

    Args:
        path: of the file.
        by: the validation number; higher is better, or lower with a minus before the name.
        run: what identifies the run, JSON-ready; a file of another run is refused.
        start: the step that the run resumes from; 0 begins anew and removes an old file.
        seen: the numbers of the validations up to ``start``.
        processes: decides which process writes.

    Raises:
        StateError: a file that is torn, of another run, or missing though there were validations.
    """

    def __init__(
        self,
        path: Path,
        by: str,
        run: dict[str, Any],
        start: int,
        seen: list[float],
        processes: Processes,
    ) -> None:
        self.by = by.removeprefix("-")
        self.step: int | None = None
        self._sign = 1.0 if by == self.by else -1.0
        self.value = -math.inf * self._sign
        self._path, self._run, self._processes = path, run, processes
        if not start:
            if processes.writes:
                path.unlink(missing_ok=True)
        elif path.exists():
            state = load_head(path)
            if any(state.get(key) != value for key, value in run.items()):
                raise StateError(f"{path}: written by another run; give another --out")
            self.step, self.value = int(state["step"]), float(state["value"])
        elif any(math.isfinite(value) for value in seen):
            raise StateError(
                f"{path}: missing, though the run has validated {len(seen)} times up to step "
                f"{start}; put it back, or name another --out"
            )

    def offer(self, step: int, value: float, module: nn.Module) -> None:
        """Keep the weights if their validation is the best so far, or repeats that of the best
        step."""
        if self._sign * value > self._sign * self.value or step == self.step:
            weights = self._processes.weights(module)
            found = {**self._run, "step": step, "value": value, "module": weights}
            if self._processes.writes:
                save_state(self._path, found)
            self.step, self.value = step, value

    def restore(self, module: nn.Module) -> dict[str, Any] | None:
        """Put the best weights into the module and return which they are; None if there are
        none."""
        if self.step is None:
            return None
        weights = load_state(self._path)["module"]
        self._processes.put_weights(module, weights, str(self._path))
        return {"step": self.step, "by": self.by, "value": self.value}
