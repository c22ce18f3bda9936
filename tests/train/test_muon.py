"""Muon: torch's, with matrices of a shape together and products in a type of choice."""

import pytest
import torch
from torch import nn

from echogen.train.config import LoopConfig
from echogen.train.run.muon import Muon, orthogonalised
from echogen.train.run.optim import build_optimizers
from echogen.train.stages.stage import BeginRefused

SHAPES = [(24, 8), (8, 24), (16, 16), (24, 8), (8, 24)]


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in SHAPES]


def steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], count: int = 4) -> None:
    generator = torch.Generator().manual_seed(6)
    for _ in range(count):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def in_float64(parameters: list[nn.Parameter], lr: float, decay: float) -> list[torch.Tensor]:
    """What `steps` comes to, after Jordan's algorithm with the rate of arXiv 2502.16982."""
    generator = torch.Generator().manual_seed(6)
    w = [p.detach().double() for p in parameters]
    mean = [torch.zeros_like(x) for x in w]
    for _ in range(4):
        for i, x in enumerate(w):
            grad = torch.randn(x.shape, generator=generator).double()
            mean[i] = 0.95 * mean[i] + 0.05 * grad
            y = 0.05 * grad + 0.95 * mean[i]
            y = y / y.norm()
            for _ in range(5):
                y = 3.4445 * y - 4.775 * y @ y.T @ y + 2.0315 * y @ y.T @ y @ y.T @ y
            w[i] = x * (1 - lr * decay) - lr * 0.2 * max(x.shape) ** 0.5 * y
    return w


def test_float32_is_the_algorithm() -> None:
    parameters = weights()
    wanted = in_float64(parameters, 0.1, 0.3)
    steps(Muon(parameters, 0.1, 0.3, dtype=torch.float32), parameters)
    for found, exact in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(found.detach().double(), exact, rtol=1e-4, atol=1e-5)


def apart(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> float:
    """Root mean square of the difference; a step at 0.1 moves entries by 0.02."""
    pairs = zip(ours, theirs, strict=True)
    return float(torch.cat([(p - q).detach().flatten() for p, q in pairs]).square().mean().sqrt())


def test_bfloat16_is_torch_s() -> None:
    ours, theirs = weights(), weights()
    steps(Muon(ours, 0.1, 0.3), ours)
    assert apart(ours, theirs) > 0.03
    steps(torch.optim.Muon(theirs, 0.1, 0.3, adjust_lr_fn="match_rms_adamw"), theirs)
    assert apart(ours, theirs) < 0.005  # what bfloat16 leaves


@pytest.mark.parametrize("loaded", [True, False])
def test_a_state_of_torch_s_goes_on(loaded: bool) -> None:
    """So do runs that began before this optimizer did."""
    ours, theirs = weights(), weights()
    before = torch.optim.Muon(theirs, 0.1, 0.3, adjust_lr_fn="match_rms_adamw")
    steps(before, theirs)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    optimizer = Muon(ours, 0.1, 0.3)
    if loaded:
        optimizer.load_state_dict(before.state_dict())
    steps(optimizer, ours, 1)
    steps(before, theirs, 1)
    assert (apart(ours, theirs) < 0.005) == loaded


def test_all_directions_move_alike_and_zeros_stay() -> None:
    generator = torch.Generator().manual_seed(7)
    found = orthogonalised(torch.randn(3, 12, 40, generator=generator))
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.68 and values.max() < 1.14
    assert torch.equal(orthogonalised(torch.zeros(1, 3, 2)), torch.zeros(1, 3, 2))


def test_what_has_no_gradient_stays_and_what_is_no_matrix_is_refused() -> None:
    moved, kept = weights()[:2]
    before = kept.detach().clone()
    moved.grad = torch.ones_like(moved)
    Muon([moved, kept], 0.1).step()
    assert torch.equal(kept, before)
    with pytest.raises(ValueError, match=r"shape \(3,\); Muon is for matrices"):
        Muon([nn.Parameter(torch.ones(3))], 0.1)


@pytest.mark.parametrize("bf16, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_step_multiplies_in_one_type(bf16: bool, dtype: torch.dtype) -> None:
    module = nn.Module()
    module.blocks = nn.Linear(4, 4)
    loop = LoopConfig(steps=1, lr=0.1, muon_lr=0.1, bf16=bf16)
    muon = build_optimizers(module, loop)[1]
    assert isinstance(muon, Muon) and muon.dtype == dtype


def test_muon_is_refused_where_there_are_no_blocks():
    config = LoopConfig(steps=1, lr=1e-3, muon_lr=4e-3)
    with pytest.raises(BeginRefused, match=r"muon_lr = 0\.004.* no decoder blocks"):
        build_optimizers(torch.nn.Linear(4, 4), config)
