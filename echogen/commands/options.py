"""Options that several commands share, and the checks that need no model."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from echogen.commands.output import InputError

if TYPE_CHECKING:
    from echogen.engine.decoding.sampler import Sampling
    from echogen.engine.engine import Engine

SEED_MAX = 2**63 - 1
Json = Annotated[bool, tyro.conf.arg(name="json")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: str = "tiny"
    """A bundled model, a folder, or a Hugging Face id, in the Janus format."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights; bfloat16 is fastest on a GPU."""
    fp8: bool = False
    """Draw with weights rounded to 8 bits (GPU only)."""
    fp8_cache: bool = False
    """Draw with keys and values rounded to 8 bits (GPU only)."""

    def check(self) -> None:
        """Refuse a device that does not exist, and 8 bits on a device without 8-bit products."""
        import torch

        kind, _, index = self.device.partition(":")
        if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", self.device):
            raise InputError(f"--device {self.device}: choose cpu, cuda or cuda:N")
        if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise InputError(f"--device {self.device}: PyTorch sees {count} CUDA devices; use cpu")
        for option, on in (("--fp8", self.fp8), ("--fp8-cache", self.fp8_cache)):
            if on and kind == "cpu":
                raise InputError(
                    f"{option} with --device cpu: only GPUs run 8-bit products; leave it out"
                )

    def load(self) -> Engine:
        """Load the engine. Raises CheckpointError if there is no such model, and InputError if its
        drawing cannot run in 8 bits."""
        self.check()
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()
        from echogen.engine.engine import Engine

        dtype = getattr(torch, self.dtype)
        try:
            return Engine.from_pretrained(
                self.model, self.device, dtype, fp8=self.fp8, fp8_cache=self.fp8_cache
            )
        except ValueError as error:
            if self.fp8 or self.fp8_cache:
                raise InputError(str(error)) from None
            raise


@dataclass(frozen=True)
class SamplingOptions:
    """How image codes are sampled; an option left out takes the model's own default."""

    temperature: float | None = None
    """Divides the logits; 0 takes the most likely code."""
    cfg: float | None = None
    """Scale of classifier-free guidance; 1 is off."""
    top_k: int | None = None
    """Keep the k most likely codes; 0 keeps all."""
    top_p: float | None = None
    """Keep the fewest most likely codes that reach this probability; 1 keeps all."""
    cfg_schedule: Literal["constant", "linear", "cosine"] | None = None
    """How guidance changes over the image: not at all, or from --cfg-start to --cfg."""
    cfg_start: float | None = None
    """Scale at which a schedule begins (left out: 1)."""
    cfg_span: tuple[int, int] | None = None
    """Two positions in drawing order: guide from the first up to, not including, the second."""

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def check(self) -> None:
        """Refuse values out of range, before a model is loaded."""
        from echogen.engine.decoding.sampler import Sampling

        own: dict[str, Any] = {"cfg": 2.0}  # instead of the model's, which may also guide
        if self.cfg_schedule != "constant":
            own |= {"cfg_schedule": "linear", "cfg_start": 2.0}
        try:
            Sampling(**own | self._given())
        except ValueError as error:
            raise InputError(flagged(error)) from None

    def over(self, engine: Engine) -> Sampling:
        """Return the model's defaults with the given options in their place. Raises InputError if
        the two conflict, or do not fit the model's images."""
        try:
            sampling = engine.sampling.over(self._given())
            sampling.scales(engine.transformer.config.image_tokens)
        except ValueError as error:
            raise InputError(flagged(error)) from None
        return sampling


def usual_device(asked: str) -> str:
    """Return "cpu" or "cuda": the requested device or, for "auto", the GPU if there is one.

    Raises InputError for a GPU that does not exist.
    """
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise InputError("--device cuda: PyTorch sees no CUDA device; use cpu")
    return "cuda" if asked != "cpu" and there else "cpu"


def make_current(device: str) -> None:
    """Make a numbered GPU the current one, which synchronisation waits for. Plain "cuda" is already
    the current one, and torch accepts no name without a number here."""
    if ":" in device:
        import torch

        torch.cuda.set_device(device)


def check_seed(seed: int) -> None:
    """Refuse a seed that cannot key the noise."""
    if not 0 <= seed <= SEED_MAX:
        raise InputError(f"--seed {seed}: it must be in 0 … 2^63 - 1")


def check_evaluates() -> None:
    """Refuse a command that ends in an evaluation if what average precision needs is missing. This
    happens before pictures are drawn or steps are run."""
    if find_spec("pycocotools") is None:
        raise InputError(
            "pycocotools is not installed, and evaluations need it: pip install pycocotools"
        )


def flagged(error: Exception) -> str:
    """Turn a setting's error, "top_p = 0; …", into that of its option: "--top-p = 0; …"."""
    name, _, rest = str(error).partition(" ")
    return f"--{name.replace('_', '-')} {rest}"


def check_range(name: str, value: int | None, low: int, high: int) -> None:
    """Refuse a number outside low … high; None means that the option was left out."""
    if value is not None and not low <= value <= high:
        raise InputError(f"--{name} {value}: it must be in {low} … {high}")
