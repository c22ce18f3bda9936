"""Numbers as the float32 that kernels read, and tensors in their place."""

from __future__ import annotations

import re

import pytest
import torch

from echogen.kernels.checks import device_scalar, device_seed

CPU = torch.device("cpu")


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-46, 1e-39, float("nan"), float("inf"), 1e39])
def test_a_divisor_is_refused_where_float32_makes_it_none(value):
    words = re.escape(f"tau = {value}; it must be finite and above 0")
    with pytest.raises(ValueError, match=words):
        device_scalar("tau", value, CPU, 0)


@pytest.mark.parametrize("value", [1, 0.3, 1e-37, 3e38])
def test_a_number_becomes_one_float32(value):
    made = device_scalar("tau", value, CPU, 0)
    assert made.dtype == torch.float32 and made.shape == (1,) and (1 / made).isfinite().all()
    assert made.item() == pytest.approx(value)


def test_a_scale_may_be_zero_or_below_where_that_is_allowed():
    assert device_scalar("scale", -2.5, CPU, -float("inf")).item() == -2.5
    assert device_scalar("scale", 0.0, CPU, -1).item() == 0
    with pytest.raises(ValueError, match="scale = -inf"):
        device_scalar("scale", -float("inf"), CPU, -float("inf"))


def test_a_tensor_is_taken_as_it_is():
    value = torch.tensor(0.25)
    assert device_scalar("tau", value, CPU, 0).data_ptr() == value.data_ptr()
    assert device_scalar("tau", torch.tensor([2.0]).double(), CPU, 0).dtype == torch.float32
    seed = torch.tensor(5)
    assert device_seed(seed, CPU).data_ptr() == seed.data_ptr()


def test_a_tensor_elsewhere_is_refused():
    """Its copy would stop the host, and a graph would not read it again."""
    with pytest.raises(ValueError, match="tau is on meta; it must be on cpu"):
        device_scalar("tau", torch.tensor(1.0, device="meta"), CPU, 0)
    with pytest.raises(ValueError, match="seed is on meta; it must be on cpu"):
        device_seed(torch.tensor(1, device="meta"), CPU)


def test_tensors_of_another_form_are_refused():
    with pytest.raises(ValueError, match=r"tau has shape \(2,\)"):
        device_scalar("tau", torch.ones(2), CPU, 0)
    with pytest.raises(ValueError, match=r"seed is torch\.float32"):
        device_seed(torch.ones(1), CPU)
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=f"seed = {seed}"):
            device_seed(seed, CPU)
