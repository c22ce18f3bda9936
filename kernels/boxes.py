"""Box overlap and the reward of the cycle: how close recovered boxes lie to those asked for."""

from __future__ import annotations

from torch import Tensor

from echogen.kernels.reference import boxes as reference


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes ``xyxy``, elementwise.

    Args:
        a, b: float [..., 4], broadcastable.

    Returns:
        float [...] in [0, 1]; 0 where either box is not finite or has no extent.

    Raises:
        ValueError: a last dimension other than 4.
    """
    _check(a, b)
    return reference.iou(a, b)


def box_reward(
    pred: Tensor, target: Tensor, mask: Tensor, w_iou: float = 0.5, w_l1: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, L1 and reward of recovered boxes; a higher reward is a better match.

    ``d_k = w_iou·(1 − IoU(b̂_k, b_k)) + w_l1·mean|b̂_k − b_k|`` and ``r = 1 − mean_k d_k``
    (EchoGen, arXiv 2603.18001, with the sign that rewards success). A box that is not finite or
    has no extent counts as IoU 0 and L1 1, the largest discrepancy.

    Args:
        pred: float [B, G, K, 4], normalised ``xyxy``; NaN marks a box that was not recovered.
        target: float [B, K, 4].
        mask: bool [B, K]; False is padding and contributes nothing.
        w_iou, w_l1: weights of the two terms.

    Returns:
        iou [B, G, K], l1 [B, G, K] (0 at padding), reward [B, G] (0 for a layout of no boxes).

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(pred, target)
    b, _, k, _ = pred.shape
    if target.shape != (b, k, 4) or mask.shape != (b, k):
        raise ValueError(
            f"pred {tuple(pred.shape)} wants target {(b, k, 4)} and mask {(b, k)}; "
            f"got {tuple(target.shape)} and {tuple(mask.shape)}"
        )
    return reference.box_reward(pred, target, mask, w_iou, w_l1)


def _check(*boxes: Tensor) -> None:
    for box in boxes:
        if box.dim() == 0 or box.shape[-1] != 4:
            raise ValueError(f"boxes of shape {tuple(box.shape)}; the last dimension must be 4")
