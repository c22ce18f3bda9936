"""Check that a GPU's operators compute what the model computes, where codes cannot show it.

In bfloat16, the first rounding makes two drawings of random weights differ, right or wrong. So
logits are compared instead: those of the operators and those of plain torch, each against float32.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from echogen.bench.harness import WrongResult
from echogen.engine.decoding.decode import Decoding, PlainDecoding, left_padded
from echogen.engine.gpu.decode import DeviceDecoding
from echogen.engine.gpu.device import DeviceTransformer

STEPS = 8
"""Codes fed, each to all rows."""
MOST_ROWS = 128
MORE = 2.0
"""How many times plain torch's error the operators may have, as they round at other places."""


@torch.inference_mode()
def errors(
    model: DeviceTransformer, rows: list[list[int]], guided: bool, pad: int
) -> tuple[float, float]:
    """Return ‖difference‖/‖logits‖ relative to float32, of the operators and of plain torch in the
    type of the weights, after the prompts ``rows`` and a few more codes.

    Raises:
        WrongResult: the operators are further off than their rounding explains.
    """
    if len(rows) > MOST_ROWS:  # whole images, with their unconditional rows
        half = len(rows) // 2
        rows = rows[: MOST_ROWS // 2] + rows[half : half + MOST_ROWS // 2]
    device, steps = model.table.device, min(STEPS, model.config.image_tokens - 1)
    ids, pads = (t.to(device) for t in left_padded(rows, pad))
    exact = copy.deepcopy(model.plain).float()
    plains = [
        PlainDecoding(plain, plain.code_table(), ids, pads, steps + 1)
        for plain in (exact, model.plain)
    ]
    with model.lock:
        decodings: list[Decoding] = [*plains, DeviceDecoding(model, rows, guided)]
        images = len(rows) // (1 + guided)
        wanted, plain, own = (_logits(each, images, steps, device) for each in decodings)
    found = _error(own, wanted), _error(plain, wanted)
    if not found[0] <= MORE * found[1] + 1e-6:
        raise WrongResult(
            f"logits of the operators are {found[0]:.2g} from those in float32, and plain torch's "
            f"{found[1]:.2g}; nothing was timed"
        )
    return found


def _logits(decoding: Decoding, images: int, steps: int, device: torch.device) -> Tensor:
    found = [decoding.prefill().float()]
    for step in range(steps):
        codes = torch.full((images,), step + 1, device=device)
        found.append(decoding.step(codes).float())
    return torch.stack(found)


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
