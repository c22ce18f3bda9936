"""Where tests run the GPU operators: on any machine as their references, recorded on a tape
(`tape.py`); on one with a GPU natively, in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from echogen.engine.engine import Engine
from echogen.engine.gpu.device import DeviceTransformer
from echogen.engine.gpu.graphs import Recorder, recorder

from .tape import Tape

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@dataclass(frozen=True)
class Place:
    """A device, the dtype of what lies there, and how far its logits may differ from the plain
    transformer's, relative to the largest."""

    kind: str
    dtype: torch.dtype = torch.float32
    error: float = 1e-5

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind, 0) if self.kind == "cuda" else torch.device(self.kind)

    @property
    def exact(self) -> bool:
        """Whether sums in another order draw the same codes, unless two are almost equally
        likely."""
        return self.dtype == torch.float32

    def record(self) -> Recorder:
        return Tape() if self.kind == "cpu" else recorder(self.device)

    def engine(self, build: Callable[..., Engine], fp8_cache: bool = False, **shape: Any) -> Engine:
        """One of conftest's ``random_engine`` whose decoder is the operators."""
        if self.kind == "cuda":
            return build(self.device, self.dtype, fp8_cache, **shape)
        engine = build(self.device, self.dtype, **shape)
        with torch.inference_mode():
            engine._decoder = DeviceTransformer(
                engine.transformer, engine.code_table, fp8_cache=fp8_cache, record=self.record()
            )
        return engine


PLACES = [
    pytest.param(Place("cpu"), id="tape"),
    pytest.param(Place("cuda", error=1e-4), id="graphs", marks=GPU),
    pytest.param(Place("cuda", torch.bfloat16, 4e-2), id="graphs, bfloat16", marks=GPU),
]
