"""The port of Janus in transformers, run at its best, as its users would run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, JanusForConditionalGeneration, StaticCache

from echogen.engine.checkpoints.keymap import to_port
from echogen.engine.model import UnifiedTransformer

CacheKind = Literal["dynamic", "static"]
CACHE = (
    "cache"
    if "cache" in signature(JanusForConditionalGeneration.forward).parameters
    else "past_key_values"
)
"""The name that this release of transformers gives to the cache argument of ``generate``."""


def share_weights(model: UnifiedTransformer, port: JanusForConditionalGeneration) -> None:
    """Make ``port`` use the memory of ``model``; its VQ and SigLIP tower stay its own.

    Raises:
        ValueError: the two do not describe the same transformer.
    """
    state = to_port(model.state_dict(), model.config)
    missing, unknown = port.load_state_dict(state, strict=False, assign=True)
    apart = [k for k in missing if not k.startswith(("model.vqmodel.", "model.vision_model."))]
    if apart or unknown:
        raise ValueError(f"the port's transformer is another one: {(apart + unknown)[:5]}")


class JanusPort:
    """The port's own generate loop.

    Image generation in transformers expects a cache from its caller. Both kinds that it knows are
    offered, so that the caller can time the faster one. Attention is SDPA, in inference mode.

    Args:
        port: the model, in evaluation mode.
        begin_image: id of begin-of-image, which the unconditional rows keep.
    """

    def __init__(self, port: JanusForConditionalGeneration, begin_image: int) -> None:
        self._port = port.eval()
        self._port.set_attn_implementation("sdpa")
        ids: Any = port.config.text_config
        self._generation = GenerationConfig(
            bos_token_id=ids.bos_token_id,
            eos_token_id=ids.eos_token_id,
            pad_token_id=ids.pad_token_id,
            generation_kwargs={"boi_token_id": begin_image},
        )

        self._plain = self._port.model.language_model.forward
        self._compiled: Any = None
        self._kept: tuple[tuple[int, int], StaticCache] | None = None

    def to(self, device: str, dtype: torch.dtype = torch.float32) -> None:
        """Move the model."""
        self._port.to(device, dtype)

    def release(self) -> None:
        """Free what compiled drawings keep: their cache, and the memory of their graphs."""
        if self._compiled is not None:
            self._compiled = self._kept = None
            torch.compiler.reset()

    @torch.inference_mode()
    def generate(
        self,
        prompts: Tensor,
        cfg: float,
        cache: CacheKind,
        sample: bool = False,
        compiled: bool = False,
        codes: int | None = None,
        told: Callable[[], None] | None = None,
    ) -> Tensor:
        """Draw codes int64 [N, T] for prompts int64 [N, L] that end in begin-of-image.

        Codes are the most likely ones or, with ``sample``, drawn at temperature 1 by PyTorch's own
        generator. ``compiled`` runs the transformer's steps through torch.compile. ``codes`` stops
        after that many codes, with the cache of a whole image. ``told`` is called when the logits
        of each code are available.

        Raises:
            ValueError: ``cfg`` is not above 1; the port's loop only runs with guidance.
        """
        if not cfg > 1:
            raise ValueError(f"cfg = {cfg}; the port draws only with guidance, above 1")
        config = self._port.config
        length = prompts.shape[1] + config.vision_config.num_image_tokens
        past = (
            DynamicCache(config=config.text_config)
            if cache == "dynamic"
            else self._static(2 * len(prompts), length, compiled)
        )
        body: Any = self._port.model.language_model
        body.forward = self._steps_compiled if compiled else self._plain
        with self._until(codes, told):
            drawn: Tensor = self._port.generate(
                inputs=prompts,
                attention_mask=torch.ones_like(prompts),
                generation_mode="image",
                generation_config=self._generation,
                guidance_scale=cfg,
                max_length=length,
                do_sample=sample,
                **{CACHE: past},
            )
        return drawn

    def _steps_compiled(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        """Run the body as transformers' own ``generate`` compiles it: only the decode steps, with
        CUDA graphs, because launches take most of a small batch's time. Prefill is not compiled: it
        creates the cache, which compiled code could not place where graphs find it again."""
        if self._compiled is None:
            self._compiled = torch.compile(self._plain, mode="reduce-overhead")
        run = self._compiled if inputs_embeds.shape[1] == 1 else self._plain
        return run(*args, inputs_embeds=inputs_embeds, **kwargs)

    def _static(self, rows: int, length: int, kept: bool) -> StaticCache:
        """Return an empty cache of ``length`` tokens per row. With ``kept``, all drawings use the
        same one, since with a new cache every graph would be recorded again."""
        if kept and self._kept is not None and self._kept[0] == (rows, length):
            self._kept[1].reset()
            return self._kept[1]
        made = StaticCache(config=self._port.config.text_config, max_cache_len=length)
        if kept:
            self._kept = (rows, length), made
        return made

    @contextmanager
    def _until(self, codes: int | None, told: Callable[[], None] | None) -> Iterator[None]:
        """Within the block, an image has ``codes`` codes and ``told`` is called for each. The loop
        reads the number of codes from the vision tower's configuration, and calls the image head
        once per code."""
        vision, head = self._port.model.vision_model.config, self._port.model.generation_head
        whole = vision.num_image_tokens
        hook = head.register_forward_hook(lambda *_: told()) if told is not None else None
        vision.num_image_tokens = whole if codes is None else codes
        try:
            yield
        finally:
            vision.num_image_tokens = whole
            if hook is not None:
                hook.remove()
