"""Contestants of one case: their results must agree before any is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle

import torch
from torch import Tensor

from echogen.bench.harness import WrongResult
from echogen.bench.registry import Case, Inputs, Mode, Outputs, Run

Results = dict[str, Tensor]


def raised(inputs: Inputs) -> Inputs:
    """Return inputs for the yardstick, with all floats in one type: float32 if any of them has 16
    bits, else float64."""
    floats = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    halves = any(v.dtype in (torch.bfloat16, torch.float16) for v in floats.values())
    dtype = torch.float32 if halves else torch.float64
    return inputs | {k: v.to(dtype) for k, v in floats.items()}


def own(case: Case, inputs: Inputs, forget: bool = False) -> Inputs:
    """Return a copy that a contestant may write to, with gradients enabled. ``forget`` removes what
    is only needed to compare results."""
    copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    for name in case.trains:
        copies[name].requires_grad_()
    return copies | (dict.fromkeys(case.forgotten) if forget else {})


def named(names: Sequence[str], outputs: Outputs) -> Results:
    """Outputs by name."""
    return dict(zip(names, outputs, strict=True))


def upstream(case: Case, outputs: Results) -> list[Tensor]:
    """Return gradients of the graded outputs, with the same numbers in every type."""
    made = []
    for seed, name in enumerate(case.graded, 1):
        output = outputs[name]
        if output.is_meta:
            made.append(torch.empty_like(output))
            continue
        generator = torch.Generator(output.device).manual_seed(seed)
        drawn = torch.randn(output.shape, generator=generator, device=output.device)
        made.append(drawn.bfloat16().to(output.dtype))
    return made


def gradients(
    case: Case, outputs: Results, inputs: Inputs, above: Sequence[Tensor], again: bool = False
) -> tuple[Tensor, ...]:
    """Return the gradients of the trained inputs. ``again`` keeps the graph for another call."""
    graded = [outputs[name] for name in case.graded]
    leaves = [inputs[name] for name in case.trains]
    return torch.autograd.grad(graded, leaves, above, retain_graph=again)


def results(case: Case, run: Run, inputs: Inputs, names: Sequence[str]) -> Results:
    """Return outputs and gradients of one contestant, on its own copy of the inputs."""
    mine = own(case, inputs)
    found = named(names, run(mine))
    if case.trains:
        slopes = gradients(case, found, mine, upstream(case, found))
        found |= {f"d_{name}": d for name, d in zip(case.trains, slopes, strict=True)}
    return {name: tensor.detach() for name, tensor in found.items()}


def check(case: Case, bound: float, name: str, found: Results, wanted: Results) -> None:
    """Check a contestant's results against the wanted ones. Raises WrongResult."""
    for key, tensor in found.items():
        true = wanted[key]
        if tensor.shape != true.shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(true.shape)}"
            raise WrongResult(f"{case.name}: {name} gives {key} of shape {shapes}; not timed")
        if not true.is_floating_point():
            share = float((tensor != true).double().mean())
            if share > case.mismatches:
                raise WrongResult(
                    f"{case.name}: {name} gives another {key} in {share:.2%} of places "
                    f"(let through: {case.mismatches:.2%}); not timed"
                )
            continue
        error = float((tensor.double() - true.double()).norm() / true.double().norm())
        if not error <= bound:  # NaN is wrong too
            raise WrongResult(
                f"{case.name}: {name} is off by {error:.1e} in {key} "
                f"(let through: {bound:.0e}); not timed"
            )


def call(
    case: Case, run: Run, names: Sequence[str], mode: Mode, copies: Sequence[Inputs]
) -> Callable[[], object]:
    """Return the call to time: one pass over the next of the copies, so that none is warm in a
    cache.
    """
    turns = cycle(copies)
    if mode == "forward":
        return lambda: run(next(turns))
    above = upstream(case, named(names, run(copies[0])))
    if mode == "both":

        def both() -> object:
            mine = next(turns)
            return gradients(case, named(names, run(mine)), mine, above)

        return both
    graphs = cycle([(named(names, run(mine)), mine) for mine in copies])

    def backward() -> object:
        outputs, mine = next(graphs)
        return gradients(case, outputs, mine, above, again=True)

    return backward


def once(
    case: Case, run: Run, names: Sequence[str], mode: Mode, mine: Inputs
) -> Callable[[], object]:
    """Return one pass whose memory is counted; whatever exists before it is made here."""
    if mode == "forward":
        return lambda: run(mine)
    outputs = named(names, run(mine))
    above = upstream(case, outputs)
    if mode == "backward":
        return lambda: gradients(case, outputs, mine, above)
    return lambda: gradients(case, named(names, run(mine)), mine, above)
