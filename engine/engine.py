"""The facade: load a Janus checkpoint, draw layouts, find objects, close the cycle."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from transformers import JanusConfig, JanusVisionModel, JanusVQVAE

from echogen.engine.attention import plan_no_shapes
from echogen.engine.checkpoints.pretrained import Meta, load_prompts, resolve
from echogen.engine.checkpoints.weights import load_checkpoint, save_checkpoint
from echogen.engine.cycle import CycleResult, score
from echogen.engine.decoding.decode import Decoder, Progress, decode_image, packed
from echogen.engine.decoding.jacobi import Method, decode_windows, wins
from echogen.engine.decoding.sampler import (
    Sampler,
    Sampling,
    check_draws,
    noise_seed,
    whole_number,
)
from echogen.engine.gpu.device import DeviceTransformer, why_not_operators
from echogen.engine.ground import ground_images
from echogen.engine.images.vision import (
    decode_codes,
    decoding_bytes,
    encode_image,
    load_image,
    pixel_features,
    to_images,
    to_pixels,
)
from echogen.engine.layout import Box, Layout
from echogen.engine.model import UnifiedTransformer
from echogen.engine.prompt import LocationCodec, Prompts

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_DECODED = 1 << 32
"""Most bytes of temporary tensors while pictures are decoded; larger batches run in parts."""


class Engine:
    """One set of weights for drawing, grounding and (shared with the trainer) training.

    Any thread may draw and ground; on a GPU drawings run one at a time. While the weights change,
    and until ``refresh`` has run, no thread may do either. On a GPU, making an engine switches
    torch's cuDNN attention off (`attention.plan_no_shapes`).

    Args:
        config: the `transformers` configuration of the checkpoint.
        transformer, vq, siglip: its modules, on one device.
        prompts: tokenizer and box codec.
        sampling: the default of ``generate`` and ``cycle``.
        pixels_trained: whether the SigLIP path was trained (False for the bundled model).
        fp8: draw with the weights of decoder layers and image head in 8 bits (see ``decoder``).
        fp8_cache: draw with keys and values in 8 bits.

    Raises:
        ValueError: fp8 or fp8_cache where drawing cannot run on the GPU operators; says why.
    """

    def __init__(
        self,
        config: JanusConfig,
        transformer: UnifiedTransformer,
        vq: JanusVQVAE,
        siglip: JanusVisionModel,
        prompts: Prompts,
        sampling: Sampling | None = None,
        pixels_trained: bool = True,
        fp8: bool = False,
        fp8_cache: bool = False,
    ) -> None:
        self.config, self.prompts = config, prompts
        self.fp8, self.fp8_cache = fp8, fp8_cache
        self.transformer, self.siglip = transformer, siglip.eval()
        # Channels last: the tiny model's tokenizer decodes 1.6 times as fast on a CPU
        # (bench/NSIGHT.md describes how that was found).
        self.vq = vq.eval().to(memory_format=torch.channels_last)
        self.sampling = sampling or Sampling()
        self.pixels_trained = pixels_trained
        plan_no_shapes(transformer.norm.weight.device)
        self._code_table = torch.empty(0)
        self._decoder: Decoder | None = None
        self._making = Lock()
        self.refresh()
        check_fp8(transformer, self._code_table, fp8, fp8_cache)

    # --- loading and saving ---------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        codec: Literal["location", "textual"] | None = None,
        bins: int | None = None,
        fp8: bool = False,
        fp8_cache: bool = False,
    ) -> Engine:
        """Load a checkpoint.

        Args:
            model: a bundled model (``"tiny"``, or ``"tiny-stage1"``, from which ``"tiny"`` was
                trained), a folder, or a hub id such as ``deepseek-community/Janus-Pro-1B``; in the
                transformers Janus format or the original deepseek-ai layout.
            device, dtype: where and in what precision the weights live.
            codec: how boxes are written; None takes the checkpoint's (``echogen.json``), or
                PlanGen's textual codec where the checkpoint names none.
            bins: number of location tokens to add if ``codec="location"`` is requested for a
                checkpoint without them (None: 1000). Each starts at the mean embedding of its
                number's digits.
            fp8: draw on a GPU with weights rounded to float8_e4m3fn, one scale per output channel.
                A step then reads half the bytes of weights, and the codes differ from those in
                ``dtype``. Prompts and grounding use the weights as they are.
            fp8_cache: draw on a GPU (compute capability 8.9 or later) with keys and values rounded
                to float8_e4m3fn, one scale per head of a token. This halves the memory of a drawing
                and of a `Scheduler`'s slots, and the bytes that many rows read per step; the codes
                differ. Grounding keeps its keys and values in ``dtype``.

        Raises:
            CheckpointError: no checkpoint, or a broken one; names the file and the key.
            ValueError: an unknown codec, or bins that differ from the checkpoint's; a dtype that
                the modules do not run in; fp8 where drawing cannot run on the GPU operators (says
                why).
        """
        if dtype not in DTYPES:
            raise ValueError(
                f"dtype = {dtype!r}; choose one of {', '.join(map(str, DTYPES))} (fp8=True draws "
                f"with weights in 8 bits)"
            )
        folder = resolve(model)
        checkpoint = load_checkpoint(folder, dtype, device)
        meta = Meta.read(folder)
        prompts = load_prompts(folder, meta, checkpoint.transformer, codec, bins)
        return cls(
            checkpoint.config,
            checkpoint.transformer.eval(),
            checkpoint.vq,
            checkpoint.siglip,
            prompts,
            meta.sampling,
            meta.pixels_trained,
            fp8,
            fp8_cache,
        )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder that this engine and ``JanusForConditionalGeneration`` both load. If
        writing is interrupted, the previous contents stay (`save_checkpoint`)."""
        prompts, codec = self.prompts, self.prompts.codec
        bins = codec.scale + 1 if isinstance(codec, LocationCodec) else None
        meta = Meta(codec.name, bins, prompts.question, self.sampling, self.pixels_trained)

        def beside(staging: Path) -> None:
            prompts.tokenizer.save_pretrained(staging)
            meta.write(staging)

        generation = {
            "bos_token_id": prompts.bos,
            "eos_token_id": prompts.eos,
            "pad_token_id": prompts.pad,
            "generation_kwargs": {"boi_token_id": prompts.begin_image},
        }
        config = copy.deepcopy(self.config)
        text: Any = config.text_config
        text.vocab_size = self.transformer.config.vocab_size
        save_checkpoint(
            folder,
            config,
            self.transformer,
            self.vq,
            self.siglip,
            dtype,
            generation=generation,
            beside=beside,
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Rebuild what is derived from the weights; call it after they change. On a GPU, recorded
        steps are kept unless the weights have moved in memory."""
        self._code_table = self.transformer.code_table().detach()
        held = self._decoder
        if not (isinstance(held, DeviceTransformer) and held.refresh(self._code_table)):
            self.release()

    def release(self) -> None:
        """Free what is kept between drawings: on a CPU the packed copy, on a GPU recorded steps and
        caches. The next drawing rebuilds it. The caches are as large as the largest drawing so far
        needed: without its prompts, 2·layers·rows·kv_heads·(T − 1)·head_dim numbers, which is
        27 GiB for 256 rows of Janus-Pro-1B in bfloat16."""
        with self._making:
            held, self._decoder = self._decoder, None
        if isinstance(held, DeviceTransformer):
            held.release()

    @property
    def decoder(self) -> Decoder:
        """The form of the transformer that drawing runs, made at first use. On a CPU it is a packed
        copy, kept until ``refresh`` (`echogen bench engine` reports its cost as ``pack_ms``); on a
        GPU the operators run its steps on the weights themselves. A model that fits neither runs
        unchanged, on a GPU with a warning that says why. With ``fp8`` the operators multiply by
        8-bit copies of the weights, which ``refresh`` renews; with ``fp8_cache`` drawings keep keys
        and values in 8 bits."""
        with self._making:
            if self._decoder is None:
                with torch.inference_mode():
                    self._decoder = on_operators(
                        self.transformer, self._code_table, self.fp8, self.fp8_cache
                    )
            return self._decoder

    @property
    def code_table(self) -> Tensor:
        """[V, D], the embedding of every image code, as of the last ``refresh``."""
        return self._code_table

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self._code_table.device

    @property
    def image_size(self) -> int:
        """Pixels along a side of the images drawn and read."""
        return self.transformer.config.image_size

    # --- layout → image -------------------------------------------------------------------------

    def generate(
        self,
        layout: Layout,
        seed: int = 0,
        *,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
        decoding: Method = "auto",
        negative: Layout | None = None,
    ) -> Image.Image:
        """Draw one picture of a layout; the same seed draws the same picture. ``negative``: a
        layout of what the picture should not show. See ``generate_codes`` for the arguments."""
        codes = self.generate_codes(
            [layout], seed,
            sampling=sampling, progress=progress, decoding=decoding, negative=negative,
        )  # fmt: skip
        return self.decode(codes)[0]

    def prompt_rows(
        self,
        layouts: Sequence[Layout],
        sampling: Sampling,
        negative: Layout | Sequence[Layout] | None = None,
    ) -> list[list[int]]:
        """Return the prompts that draw N layouts: N conditional ones and, with guidance, N more to
        steer away from (the unconditional prompt, or the prompts of negative layouts).

        Raises:
            ValueError: negative layouts without guidance, or not one for each layout.
            LayoutError: texts that contain reserved tokens.
        """
        rows = [self.prompts.l2i(layout) for layout in layouts]
        if negative is not None and not sampling.guided:
            raise ValueError(
                f"negative layouts need guidance, and cfg = {sampling.cfg} is off; set cfg above 1"
            )
        if not sampling.guided:
            return rows
        if negative is None:
            return rows + [self.prompts.unconditional(p, sampling.unconditional) for p in rows]
        away = [negative] * len(rows) if isinstance(negative, Layout) else list(negative)
        if len(away) != len(rows):
            raise ValueError(f"{len(away)} negative layouts for {len(rows)} layouts; give one each")
        return rows + [self.prompts.l2i(layout) for layout in away]

    def generate_codes(
        self,
        layouts: list[Layout],
        seed: int = 0,
        draws: list[int] | None = None,
        *,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
        decoding: Method = "auto",
        negative: Layout | Sequence[Layout] | None = None,
    ) -> Tensor:
        """Draw one image per layout; return image codes int64 [N, T].

        Args:
            layouts: N layouts (repeat one for several samples).
            seed: noise key, 0 … 2^63 − 1.
            draws: the draw id of each image's noise; None: 0 … N-1. The same (seed, draw) gives the
                same noise whatever else is in the batch.
            sampling: None: the checkpoint's default.
            progress: called after every step.
            decoding: "sequential" draws one code per step, "jacobi" several
                (`engine.decoding.jacobi`), "auto" whichever is faster. The codes are the same,
                except where two are equally likely up to rounding.
            negative: one layout for all, or one for each, whose prompts replace the unconditional
                ones (PlanGen's object removal: name what should not be there); needs guidance.

        Raises:
            LayoutError: a layout that leaves no room for the image, or contains a reserved token.
            ValueError: a negative layout without guidance; guidance beyond the last position; an
                invalid seed; draws that are not one 32-bit word for each layout.
        """
        if decoding not in get_args(Method):
            raise ValueError(f"decoding = {decoding!r}; choose one of {get_args(Method)}")
        seed = noise_seed(seed)
        sampling = sampling or self.sampling
        prompts = self.prompt_rows(layouts, sampling, negative)
        ids = torch.tensor(check_draws(draws, len(layouts)), dtype=torch.int64, device=self.device)
        c = self.transformer.config
        if not layouts:
            return ids.new_zeros(0, c.image_tokens)
        sampler = Sampler(sampling, seed, ids, c.codebook_size, c.image_tokens)
        model, table, pad = self.decoder, self._code_table, self.prompts.pad
        faster = wins(model, table.dtype, layouts, sampling.guided)
        if decoding == "jacobi" or (decoding == "auto" and faster):
            return decode_windows(model, table, prompts, sampler, pad, progress=progress).codes
        return decode_image(model, table, prompts, sampler, pad, progress)

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Decode codes int64 [N, T] into pictures, as many at once as ``MOST_DECODED`` allows."""
        together = max(1, MOST_DECODED // decoding_bytes(self.vq, self.image_size))
        parts = codes.to(self.device).split(together) if len(codes) else ()
        return [image for some in parts for image in to_images(decode_codes(self.vq, some))]

    # --- image → layout -------------------------------------------------------------------------

    def ground(
        self,
        image: Image.Image | str | Path,
        expressions: list[str],
        features: Literal["tokens", "pixels"] = "tokens",
    ) -> list[Box]:
        """Find one box for each expression, all in parallel.

        Args:
            image: a square picture or its path.
            expressions: what to find; the answers do not depend on their order.
            features: ``tokens`` reads the picture as VQ codes, ``pixels`` as SigLIP features.

        Raises:
            ImageError, LayoutError: a picture or expression that cannot be used.
            ValueError: ``pixels`` on a checkpoint whose SigLIP path was not trained; one text where
                a list is wanted.
        """
        if isinstance(expressions, str):
            raise ValueError(f"expressions = {expressions!r}; write a list of texts")
        if features not in ("tokens", "pixels"):
            raise ValueError(f"features = {features!r}; choose 'tokens' or 'pixels'")
        if not expressions:
            return []
        pixels = to_pixels([load_image(image, self.image_size)])
        if features == "tokens":
            return self.ground_codes(encode_image(self.vq, pixels), [expressions])[0]
        if not self.pixels_trained:
            raise ValueError("this checkpoint's SigLIP path was not trained; use features='tokens'")
        with torch.no_grad():
            embedded = self.transformer.embed_pixels(pixel_features(self.siglip, pixels))
        return ground_images(self.transformer, self.prompts, embedded, [expressions])[0]

    def ground_codes(self, codes: Tensor, expressions: list[list[str]]) -> list[list[Box]]:
        """Find the box of every expression in images given as codes int64 [B, T].

        Raises:
            LayoutError: an expression that cannot be used.
            ValueError: an image without expressions, or not one list for each image; codes of
                incomplete images.
        """
        if len(codes) != len(expressions) or not all(expressions):
            counts = [len(row) for row in expressions]
            raise ValueError(
                f"{len(codes)} images and expressions of {len(counts)} images ({counts} of each); "
                f"give every image a list of at least one"
            )
        if codes.shape[1:] != (tokens := self.transformer.config.image_tokens,):
            raise ValueError(
                f"codes of shape {list(codes.shape)}; whole images of this model have {tokens} each"
            )
        return ground_images(
            self.transformer, self.prompts, self._code_table[codes.to(self.device)], expressions
        )

    # --- the cycle ------------------------------------------------------------------------------

    def cycle(
        self,
        layout: Layout,
        samples: int = 1,
        seed: int = 0,
        *,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
    ) -> CycleResult:
        """Draw ``samples`` pictures of a layout, find its objects in each, and score them."""
        if whole_number("samples", samples) < 1:
            raise ValueError(f"samples = {samples}; it must be at least 1")
        began = time.perf_counter()
        layouts = [layout] * samples
        codes = self.generate_codes(layouts, seed, sampling=sampling, progress=progress)
        boxes = self.ground_codes(codes, [[o.expr for o in layout.objects]] * samples)
        scores = score(layout, boxes)
        images = self.decode(codes)
        return CycleResult(
            layout, images, codes, boxes, *scores, seconds=time.perf_counter() - began
        )


def check_fp8(model: UnifiedTransformer, code_table: Tensor, weights: bool, cache: bool) -> None:
    """Refuse 8-bit weights, or 8-bit keys and values, where drawing cannot use them.

    Raises:
        ValueError: they cannot be used; says why.
    """
    asked = " and ".join(name for name, on in (("fp8", weights), ("fp8_cache", cache)) if on)
    if not asked:
        return
    device = code_table.device
    if device.type != "cuda":
        raise ValueError(
            f"{asked} on {device.type}: only GPUs run 8-bit products; leave {asked} out, or load "
            f"the model with device='cuda'"
        )
    why = why_not_operators(model)
    if why is not None:
        raise ValueError(f"{asked} needs the operators: {why}; leave {asked} out")
    if cache and (found := torch.cuda.get_device_capability(device)) < (8, 9):
        raise ValueError(
            f"fp8_cache on a GPU of compute capability {'.'.join(map(str, found))}: it takes 8.9 "
            f"or later; leave fp8_cache out"
        )


def on_operators(
    model: UnifiedTransformer, code_table: Tensor, fp8: bool = False, fp8_cache: bool = False
) -> Decoder:
    """Return the form of the model that drawing runs on its device; see `Engine.decoder`."""
    if fp8 or fp8_cache:
        check_fp8(model, code_table, fp8, fp8_cache)
        return DeviceTransformer(model, code_table, fp8, fp8_cache)
    if code_table.device.type != "cuda":
        return packed(model)
    why = why_not_operators(model)
    if why is None:
        return DeviceTransformer(model, code_table)
    warnings.warn(f"drawing runs on plain torch: {why}", stacklevel=2)
    return model
