"""The gradient of a codebook, against a product with the one-hot codes in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from echogen.kernels.codebook_grad import codebook_grad


def test_it_is_summed_in_order(generator, device):
    """Bit-equal when repeated: a resumed run must be identical."""
    d_embed = torch.randn(1000, 8, generator=generator).to(device)
    index = torch.randint(0, 3, (1000,), generator=generator).to(device)
    first = codebook_grad(d_embed, index, 5)
    assert torch.equal(codebook_grad(d_embed, index, 5), first)
    wanted = F.one_hot(index, 5).double().T @ d_embed.double()
    torch.testing.assert_close(first.double(), wanted, rtol=1e-5, atol=1e-4)
    assert (first[3:] == 0).all()


def test_codes_that_are_none_count_for_nothing(device):
    index = torch.tensor([2, 300, -1, 299], device=device)
    grad = codebook_grad(torch.ones(4, 8, device=device), index, 300)
    assert torch.equal(grad.sum(1).nonzero()[:, 0], torch.tensor([2, 299], device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype, generator, device):
    d_embed = torch.randn(18, 8, generator=generator).to(device, dtype)
    index = torch.randint(0, 140, (18,), generator=generator).to(device)
    torch.library.opcheck(torch.ops.echogen.codebook_grad.default, (d_embed, index, 140))
