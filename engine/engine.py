"""The facade: load a Janus checkpoint, draw layouts, find objects, close the cycle."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    JanusConfig,
    JanusVisionModel,
    JanusVQVAE,
    PreTrainedTokenizerBase,
)

from echogen.engine.cycle import CycleResult, score
from echogen.engine.decode import Decoder, Progress, decode_image
from echogen.engine.device import DeviceTransformer, misfit
from echogen.engine.ground import ground_images
from echogen.engine.jacobi import Method, decode_windows, wins
from echogen.engine.layout import Box, Layout, LayoutError
from echogen.engine.model import UnifiedTransformer
from echogen.engine.packed import PackedTransformer, packable
from echogen.engine.prompt import QUESTION, BoxCodec, LocationCodec, Prompts, TextualCodec
from echogen.engine.sampler import Sampler, Sampling
from echogen.engine.tokens import add_box_tokens
from echogen.engine.vision import (
    decode_codes,
    encode_image,
    load_image,
    pixel_features,
    to_images,
    to_pixels,
)
from echogen.engine.weights import CheckpointError, load_checkpoint, save_checkpoint

BUNDLED = Path(__file__).parent / "models"
META = "echogen.json"
"""Beside a checkpoint's config.json: box codec, question, default sampling, provenance."""


class Engine:
    """One set of weights for drawing, grounding and (shared with the trainer) training.

    Args:
        config: the `transformers` configuration of the checkpoint.
        transformer, vq, siglip: its modules, on one device.
        prompts: tokenizer and box codec.
        sampling: the default of ``generate`` and ``cycle``.
        pixels_trained: whether the SigLIP path was trained (False for the bundled model).
        fp8: draw with the weights of decoder layers and image head in 8 bits (see ``decoder``).
        fp8_cache: draw with keys and values in 8 bits.

    Raises:
        ValueError: either of them where drawing cannot run on the operators of a GPU; says why.
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
        # Channels last: the tiny model's tokenizer decodes 1.35 times as fast on a CPU
        # (bench/NSIGHT.md tells how that was found).
        self.vq = vq.eval().to(memory_format=torch.channels_last)
        self.sampling = sampling or Sampling()
        self.pixels_trained = pixels_trained
        self._code_table = torch.empty(0)
        self._decoder: Decoder | None = None
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
        bins: int = 1000,
        fp8: bool = False,
        fp8_cache: bool = False,
    ) -> Engine:
        """Load a checkpoint.

        Args:
            model: ``"tiny"`` (bundled), a folder, or a hub id such as
                ``deepseek-community/Janus-Pro-1B``; the transformers Janus format or the original
                deepseek-ai layout.
            device, dtype: where and in what precision the weights live.
            codec: how boxes are written; None reads it from the checkpoint (``echogen.json``), and
                takes PlanGen's textual codec where it says nothing.
            bins: location tokens, when ``codec="location"`` is asked of a checkpoint without them:
                they are added, each starting at the mean embedding of its number's digits.
            fp8: draw on a GPU with weights rounded to float8_e4m3fn, a scale for each output
                channel: half the bytes of weights a step, and other codes than in ``dtype``.
                Prompts and grounding are run on the weights as they are.
            fp8_cache: draw on a GPU (of compute capability 8.9 or later) with keys and values
                rounded to float8_e4m3fn, a scale for each head of a token: half the memory of a
                drawing, half of what many rows read a step, and other codes. Grounding, and the
                slots of a `Scheduler`, keep theirs in ``dtype``.

        Raises:
            CheckpointError: nothing there, or a broken checkpoint; names the file and the key.
            ValueError: fp8 where drawing cannot run on the operators of a GPU; says why.
        """
        folder = resolve(model)
        checkpoint = load_checkpoint(folder, dtype, device)
        tokenizer = _tokenizer(folder)
        meta = read_meta(folder)
        name = codec or meta.get("codec", {}).get("name", "textual")
        bins = meta.get("codec", {}).get("bins", bins)
        add_box_tokens(tokenizer, checkpoint.transformer, bins if name == "location" else 0)
        box_codec: BoxCodec
        box_codec = (
            LocationCodec(tokenizer, bins) if name == "location" else TextualCodec(tokenizer)
        )
        prompts = Prompts(tokenizer, box_codec, meta.get("question", QUESTION))
        return cls(
            checkpoint.config,
            checkpoint.transformer.eval(),
            checkpoint.vq,
            checkpoint.siglip,
            prompts,
            Sampling(**meta.get("sampling", {})),
            meta.get("pixels_trained", True),
            fp8,
            fp8_cache,
        )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder that this engine and ``JanusForConditionalGeneration`` both load."""
        folder, prompts = Path(folder), self.prompts
        generation = {
            "bos_token_id": prompts.bos,
            "eos_token_id": prompts.eos,
            "pad_token_id": prompts.pad,
            "generation_kwargs": {"boi_token_id": prompts.begin_image},
        }
        text: Any = self.config.text_config
        text.vocab_size = self.transformer.config.vocab_size
        save_checkpoint(
            folder,
            self.config,
            self.transformer,
            self.vq,
            self.siglip,
            dtype,
            generation=generation,
        )
        prompts.tokenizer.save_pretrained(folder)
        codec: dict[str, Any] = {"name": prompts.codec.name}
        if isinstance(prompts.codec, LocationCodec):
            codec["bins"] = prompts.codec.scale + 1
        meta = {
            "codec": codec,
            "question": prompts.question,
            "sampling": dataclasses.asdict(self.sampling),
            "pixels_trained": self.pixels_trained,
        }
        (folder / META).write_text(json.dumps(meta, indent=2) + "\n")

    @torch.no_grad()
    def refresh(self) -> None:
        """Rebuild what is derived from the weights; call it after they changed. On a GPU recorded
        steps stay, unless the weights lie elsewhere now."""
        self._code_table = self.transformer.code_table().detach()
        held = self._decoder
        if not (isinstance(held, DeviceTransformer) and held.refresh(self._code_table)):
            self.release()

    def release(self) -> None:
        """Give back what drawing keeps for the next drawing, which then makes it anew: on a CPU the
        packed copy, on a GPU recorded steps and caches. Those are as large as the largest drawing
        so far needs, 2·layers·rows·kv_heads·(T − 1)·head_dim numbers without its prompts: 27 GiB
        for 256 rows of Janus-Pro-1B in bfloat16."""
        held, self._decoder = self._decoder, None
        if isinstance(held, DeviceTransformer):
            held.release()

    @property
    def decoder(self) -> Decoder:
        """The transformer as drawing runs it, made at first use: on a CPU a packed copy, held until
        ``refresh`` (`echogen bench engine` reports what making it takes as ``pack_ms``), on a GPU
        the operators' steps on its own weights. A model that neither takes is run as it is, on a
        GPU with a warning that says why. With ``fp8`` the operators multiply by copies of the
        weights in 8 bits, which ``refresh`` renews; with ``fp8_cache`` drawings keep keys and
        values in 8 bits."""
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
        sampling: Sampling | None = None,
        progress: Progress | None = None,
        decoding: Method = "auto",
        negative: Layout | None = None,
    ) -> Image.Image:
        """Draw one picture of a layout; the same seed draws the same picture. ``negative``: a
        layout of what the picture shall keep away from; see ``generate_codes``."""
        codes = self.generate_codes([layout], seed, None, sampling, progress, decoding, negative)
        return self.decode(codes)[0]

    def prompt_rows(
        self,
        layouts: Sequence[Layout],
        sampling: Sampling,
        negative: Layout | Sequence[Layout] | None = None,
    ) -> list[list[int]]:
        """The prompts that draw N layouts: N conditional ones and, with guidance, N that it leads
        away from (the unconditional prompt, or the prompts of negative layouts).

        Raises:
            ValueError: negative layouts without guidance, or another number of them.
            LayoutError: texts that hold reserved tokens.
        """
        rows = [self.prompts.l2i(layout) for layout in layouts]
        if negative is not None and not sampling.guided:
            raise ValueError(
                f"negative layouts act through guidance, and cfg = {sampling.cfg} is off; "
                f"set cfg above 1"
            )
        if not sampling.guided:
            return rows
        if negative is None:
            return rows + [self.prompts.unconditional(p, sampling.unconditional) for p in rows]
        away = [negative] * len(rows) if isinstance(negative, Layout) else list(negative)
        if len(away) != len(rows):
            raise ValueError(f"{len(away)} negative layouts for {len(rows)} layouts; give as many")
        return rows + [self.prompts.l2i(layout) for layout in away]

    def generate_codes(
        self,
        layouts: list[Layout],
        seed: int = 0,
        draws: list[int] | None = None,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
        decoding: Method = "auto",
        negative: Layout | Sequence[Layout] | None = None,
    ) -> Tensor:
        """Image codes int64 [N, T], one image a layout.

        Args:
            layouts: N layouts (repeat one for several samples).
            seed: noise key.
            draws: the noise's draw id of each image; 0 … N-1 where None. The same (seed, draw)
                gives the same noise whatever else is in the batch.
            sampling: None: the checkpoint's default.
            progress: called after every step.
            decoding: "sequential" draws one code a step, "jacobi" several
                (`echogen.engine.jacobi`), "auto" what is faster. The codes are the same, up to
                ones within rounding of each other.
            negative: a layout, or one for each, whose rows take the place of the unconditional
                ones (PlanGen's object removal: name what shall not be there); needs guidance.

        Raises:
            LayoutError: a layout that leaves no room for the image, or holds a reserved token.
            ValueError: a negative layout without guidance; guidance behind the last position.
        """
        if decoding not in get_args(Method):
            raise ValueError(f"decoding = {decoding!r}; choose one of {get_args(Method)}")
        sampling = sampling or self.sampling
        prompts = self.prompt_rows(layouts, sampling, negative)
        ids = torch.tensor(draws if draws is not None else range(len(layouts)), device=self.device)
        c = self.transformer.config
        longest = max(map(len, prompts), default=0)
        if longest + c.image_tokens > c.max_positions:
            raise LayoutError(
                f"the layout takes {longest} tokens; this model has room for "
                f"{c.max_positions - c.image_tokens}, so shorten its texts or name fewer objects"
            )
        sampler = Sampler(sampling, seed, ids, c.codebook_size, c.image_tokens)
        model, table, pad = self.decoder, self._code_table, self.prompts.pad
        faster = wins(model, table.dtype, layouts)
        if decoding == "jacobi" or (decoding == "auto" and faster):
            return decode_windows(model, table, prompts, sampler, pad, progress=progress).codes
        return decode_image(model, table, prompts, sampler, pad, progress)

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Image codes [N, T] → pictures."""
        return to_images(decode_codes(self.vq, codes))

    # --- image → layout -------------------------------------------------------------------------

    def ground(
        self,
        image: Image.Image | str,
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
            ValueError: ``pixels`` on a checkpoint whose SigLIP path was not trained.
        """
        if not expressions:
            return []
        pixels = to_pixels([load_image(image, self.image_size)])
        if features == "tokens":
            return self.ground_codes(encode_image(self.vq, pixels), [expressions])[0]
        if not self.pixels_trained:
            raise ValueError("this checkpoint's SigLIP path was not trained; use features='tokens'")
        self._check_branches([expressions])
        with torch.no_grad():
            embedded = self.transformer.embed_pixels(pixel_features(self.siglip, pixels))
        return ground_images(self.transformer, self.prompts, embedded, [expressions])[0]

    def ground_codes(self, codes: Tensor, expressions: list[list[str]]) -> list[list[Box]]:
        """Boxes of every expression in images given as codes [B, T]."""
        self._check_branches(expressions)
        return ground_images(
            self.transformer, self.prompts, self._code_table[codes.to(self.device)], expressions
        )

    def _check_branches(self, expressions: list[list[str]]) -> None:
        c, (before, after) = self.transformer.config, self.prompts.i2l()
        steps = self.prompts.codec.steps
        room = c.max_positions - c.image_tokens - len(before) - len(after) - steps
        for expr in {e for row in expressions for e in row}:
            if (length := len(self.prompts.branch(expr))) > room:
                raise LayoutError(
                    f"an expression takes {length} tokens; this model has room for {room}, "
                    f"so shorten it ({expr[:30]!r}...)"
                )

    # --- the cycle ------------------------------------------------------------------------------

    def cycle(
        self,
        layout: Layout,
        samples: int = 1,
        seed: int = 0,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
    ) -> CycleResult:
        """Draw ``samples`` pictures of a layout, find its objects in each, and score them."""
        if samples < 1:
            raise ValueError(f"samples = {samples}; it must be at least 1")
        began = time.perf_counter()
        codes = self.generate_codes([layout] * samples, seed, None, sampling, progress)
        boxes = self.ground_codes(codes, [[o.expr for o in layout.objects]] * samples)
        scores = score(layout, boxes)
        images = self.decode(codes)
        return CycleResult(
            layout, images, codes, boxes, *scores, seconds=time.perf_counter() - began
        )


def check_fp8(model: UnifiedTransformer, code_table: Tensor, weights: bool, cache: bool) -> None:
    """Refuse weights, or keys and values, in 8 bits where nothing multiplies by them.

    Raises:
        ValueError: says why.
    """
    asked = " and ".join(name for name, on in (("fp8", weights), ("fp8_cache", cache)) if on)
    if not asked:
        return
    device = code_table.device
    if device.type != "cuda":
        raise ValueError(
            f"{asked} on {device.type}: the operators multiply by 8 bits on a GPU alone; leave "
            f"{asked} out, or load the model with device='cuda'"
        )
    why = misfit(model)
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
    """The model as drawing runs it where it lies; see `Engine.decoder`."""
    if fp8 or fp8_cache:
        check_fp8(model, code_table, fp8, fp8_cache)
        return DeviceTransformer(model, code_table, fp8, fp8_cache)
    if packable(model):
        return PackedTransformer(model)
    if code_table.device.type != "cuda":
        return model
    why = misfit(model)
    if why is None:
        return DeviceTransformer(model, code_table)
    warnings.warn(f"drawing runs on plain torch, code by code: {why}", stacklevel=2)
    return model


def resolve(model: str | Path) -> Path:
    """Folder of a bundled name, a folder, or a hub id (downloaded once into the hub's cache).

    Raises CheckpointError where there is nothing to load.
    """
    if Path(model).is_dir():
        return Path(model)
    if (BUNDLED / str(model) / "config.json").is_file():
        return BUNDLED / str(model)
    text = str(model)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        names = sorted(p.parent.name for p in BUNDLED.glob("*/config.json"))
        raise CheckpointError(
            f"{text}: no such folder; bundled models: {', '.join(names) or 'none'}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{text}: neither a folder nor a hub id that loads ({reason})"
        ) from None


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: its tokenizer does not load ({reason})") from None
    return tokenizer


def read_meta(folder: Path) -> dict[str, Any]:
    """The checkpoint's ``echogen.json``, or {} where there is none."""
    path = folder / META
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path}: not an object")
    return meta
