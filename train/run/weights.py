"""Which of a module's weights a run's files hold, and how they are put back.

The frozen weights of the model that a run starts from are in none of them. That model is loaded
before a run goes on, and its fingerprint is part of the run's identity. With adapters this is
nearly everything: the states of a model of 1B weights hold megabytes instead of gigabytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from torch import Tensor, nn

from echogen.train.run.checkpoint import StateError
from echogen.train.stages.stage import Stage


def given_by_start(stage: Stage) -> frozenset[str]:
    """Names, as in ``stage.module.state_dict()``, of the weights that a run's files leave out: the
    parameters without a gradient, if ``stage.config.start`` identifies the model they come from;
    otherwise none. Call it before anything is trained or sharded."""
    if not getattr(stage.config, "start", ""):
        return frozenset()
    named = stage.module.named_parameters(remove_duplicate=False)  # tied weights have two names
    return frozenset(name for name, p in named if not p.requires_grad)


def put_weights(
    module: nn.Module, weights: Mapping[str, Tensor], given: Set[str], what: str
) -> None:
    """Load a module's weights.

    Args:
        weights: those that a file holds. It may hold ``given`` ones too: files used to.
        given: names of those that the module has already (see `given_by_start`).
        what: the file or its content, for the message.

    Raises:
        StateError: weights are missing, unknown or of another shape; the module is unchanged.
    """
    check_fits(what, weights, module.state_dict(), given)
    module.load_state_dict(weights, strict=False)


def check_fits(
    what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], given: Set[str]
) -> None:
    """Refuse weights that are not ``wanted``, by name and shape, or lack some that are, except
    ``given`` ones. Raises StateError; ``what`` names the file or its content."""
    differ = [n for n in found if n in wanted and found[n].shape != wanted[n].shape]
    cases = {
        "lacks": [n for n in wanted if n not in found and n not in given],
        "has the unknown": [n for n in found if n not in wanted],
        "has another shape of": differ,
    }
    told = [f"{how} {_first(names)}" for how, names in cases.items() if names]
    if told:
        raise StateError(
            f"{what} {', '.join(told)}; another version of EchoGen or peft wrote it: use that one"
        )


def _first(names: list[str]) -> str:
    return names[0] + f" and {len(names) - 1} more" * (len(names) > 1)
