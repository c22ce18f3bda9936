"""Group-relative advantage: how much better a sample did than the others of its layout."""

from __future__ import annotations

from torch import Tensor

from echogen.kernels.reference import grpo as reference


def group_advantage(reward: Tensor, eps: float = 1e-6) -> Tensor:
    """``(r − mean_G) / (std_G + ε)``, population standard deviation (GRPO, arXiv 2402.03300).

    Args:
        reward: float [B, G], one row for the G samples of a layout.
        eps: ε.

    Returns:
        float [B, G]; a row of equal rewards (G = 1 too) has advantage zero.

    Raises:
        ValueError: not two-dimensional.
    """
    if reward.dim() != 2:
        raise ValueError(f"reward of shape {tuple(reward.shape)}; it must be [layouts, samples]")
    return reference.group_advantage(reward, eps)
