"""What an engine needs of a checkpoint beside its weights: folder, tokenizer, `echogen.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from echogen.engine.checkpoints.shards import one_line, read_json, write_json
from echogen.engine.checkpoints.tokens import add_box_tokens
from echogen.engine.checkpoints.weights import CheckpointError
from echogen.engine.decoding.sampler import Sampling
from echogen.engine.model import UnifiedTransformer
from echogen.engine.prompt import QUESTION, BoxCodec, LocationCodec, Prompts, TextualCodec

BUNDLED = Path(__file__).parents[1] / "models"
META = "echogen.json"
"""The file beside a checkpoint's config.json with its box codec, question, default sampling, and
whether its SigLIP path was trained."""
GENERATION = "generation_config.json"
"""transformers' file; read for the sampling where there is no ``META``, and for the id of PAD."""
CODECS = (LocationCodec.name, TextualCodec.name)
BINS = 1000
"""Location tokens for a checkpoint that has none yet, as in the paper."""
PROBE = "3 größere Äpfel, 12 km"
"""A text with spaces, digits and letters beyond ASCII."""


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def resolve(model: str | Path) -> Path:
    """The folder of a model given as a bundled name, a folder, or a hub id (downloaded once into
    the hub's cache).

    A string means the same model in every working directory: a folder with the name of a bundled
    model has to be given as ``"./name"``, or as a `Path`.

    Raises CheckpointError if there is nothing to load.
    """
    text, names = str(model), bundled()
    if text in names and isinstance(model, str):
        return BUNDLED / text
    if Path(model).is_dir():
        return Path(model)
    if text in names:
        return BUNDLED / text
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
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
        raise CheckpointError(
            f"{text}: neither a folder nor a hub id that loads ({one_line(error)})"
        ) from None


@dataclass(frozen=True)
class Meta:
    """The contents of `echogen.json`; what it does not state has its default. A checkpoint without
    that file draws with the ``guidance_scale`` and ``temperature`` of transformers'
    `generation_config.json`.

    Attributes:
        codec: "location" or "textual", how boxes are written; PlanGen's textual one by default.
        bins: location tokens; None: the checkpoint has none.
        question: the constant text of I2L.
        sampling: the default of ``generate`` and ``cycle``.
        pixels_trained: whether the SigLIP path was trained.
    """

    codec: str = TextualCodec.name
    bins: int | None = None
    question: str = QUESTION
    sampling: Sampling = field(default_factory=Sampling)
    pixels_trained: bool = True

    @classmethod
    def read(cls, folder: Path) -> Meta:
        """Read it from a checkpoint's folder. Raises CheckpointError, which names the file, the key
        and the value."""
        path = folder / META
        if not path.exists():
            return cls(sampling=_upstream(folder))
        stated = read_json(path)
        codec = _expect(path, "codec", stated.get("codec", {}), dict)
        name = _expect(path, "codec.name", codec.get("name", TextualCodec.name), str)
        if name not in CODECS:
            raise CheckpointError(f"{path}: codec.name is {name!r}; choose one of {CODECS}")
        bins = codec.get("bins")
        if name == LocationCodec.name:
            bins = _expect(path, "codec.bins", bins, int)
        sampling = _expect(path, "sampling", stated.get("sampling", {}), dict)
        known = {f.name for f in fields(Sampling)}
        for key in sampling.keys() - known:
            raise CheckpointError(f"{path}: sampling.{key} is unknown; there are {sorted(known)}")
        return cls(
            name,
            bins,
            _expect(path, "question", stated.get("question", QUESTION), str),
            _sampling(path, "sampling", sampling),
            _expect(path, "pixels_trained", stated.get("pixels_trained", True), bool),
        )

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint's folder."""
        codec: dict[str, Any] = {"name": self.codec}
        if self.bins is not None:
            codec["bins"] = self.bins
        stated = asdict(self) | {"codec": codec}
        del stated["bins"]
        write_json(folder / META, stated)


def _upstream(folder: Path) -> Sampling:
    stated = _generation(folder)
    scale, heat = stated.get("guidance_scale"), stated.get("temperature")
    # In transformers a scale of 0 is off; here 0 would draw without the layout.
    return _sampling(
        folder / GENERATION,
        "guidance_scale and temperature",
        {"cfg": scale or 1.0, "temperature": 1.0 if heat is None else heat},
    )


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / GENERATION
    return read_json(path) if path.exists() else {}


def _sampling(path: Path, key: str, stated: dict[str, Any]) -> Sampling:
    try:
        return Sampling(**stated)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {key}: {one_line(error)}") from None


def _expect(path: Path, key: str, value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise CheckpointError(f"{path}: {key} is {value!r}; it must be of type {kind.__name__}")
    return value


def load_prompts(
    folder: Path, meta: Meta, transformer: UnifiedTransformer, codec: str | None, bins: int | None
) -> Prompts:
    """Load a checkpoint's tokenizer with the given box codec, or the checkpoint's own if none is
    given. Tokens of the codec that are missing are added, to the transformer too.

    Raises:
        CheckpointError: a tokenizer that does not load, is not read as it is stored, or has more
            tokens than the transformer; a padding id that is not valid.
        PromptError: fewer than two bins.
        ValueError: an unknown codec; bins for another codec, or other than the checkpoint's.
    """
    tokenizer = _tokenizer(folder)
    _check_ids(folder, tokenizer, transformer)
    name = meta.codec if codec is None else codec
    if name not in CODECS:
        raise ValueError(f"codec = {codec!r}; choose one of {CODECS}")
    if bins is not None and name != LocationCodec.name:
        raise ValueError(f"bins = {bins} with the {name} codec, which has none; leave bins out")
    held = meta.bins if meta.codec == LocationCodec.name else None
    if bins is not None and held is not None and bins != held:
        raise ValueError(f"bins = {bins}; {folder} was trained with {held}, so leave bins out")
    count = next(n for n in (held, bins, BINS) if n is not None)
    location = name == LocationCodec.name
    add_box_tokens(tokenizer, transformer, count if location else 0)
    made: BoxCodec = LocationCodec(tokenizer, count) if location else TextualCodec(tokenizer)
    return Prompts(tokenizer, made, meta.question, _padding(folder, transformer))


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    path, stored = folder / "tokenizer.json", None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        if path.exists():
            stored = Tokenizer.from_file(str(path))
    except Exception as error:  # damaged files fail inside tokenizers with any kind of error
        raise CheckpointError(
            f"{folder}: its tokenizer does not load ({one_line(error)})"
        ) from error
    if stored is not None:
        _check_reading(folder, tokenizer, stored)
    return tokenizer


def _check_reading(folder: Path, tokenizer: PreTrainedTokenizerBase, stored: Tokenizer) -> None:
    """Refuse a tokenizer that transformers does not read as it is stored. Before 5.22 it takes
    DeepSeek's byte-level tokenizers, which declare themselves Llama's, for SentencePiece ones and
    drops all spaces (huggingface/transformers#45488)."""
    stored.no_truncation()  # transformers leaves both to each call
    stored.no_padding()
    read = tokenizer.encode(PROBE, add_special_tokens=False)
    if read != stored.encode(PROBE, add_special_tokens=False).ids:
        fix = "upgrade transformers to 5.22 or later"
        if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 22):
            fix = "see which kind of tokenizer its tokenizer_config.json names"
        raise CheckpointError(
            f"{folder}: transformers {transformers.__version__} does not read its tokenizer as "
            f"tokenizer.json has it ({PROBE!r} comes back as {tokenizer.decode(read)!r}); {fix}"
        )


def _check_ids(
    folder: Path, tokenizer: PreTrainedTokenizerBase, transformer: UnifiedTransformer
) -> None:
    """Refuse a token without an embedding: it would end in an index error, which on a GPU ends the
    whole process."""
    name, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= transformer.config.vocab_size:
        raise CheckpointError(
            f"{folder}: its tokenizer has token {name!r} with id {largest}, and the weights have "
            f"{transformer.config.vocab_size} embeddings; they do not belong together"
        )


def _padding(folder: Path, transformer: UnifiedTransformer) -> int | None:
    """The id that transformers pads with; None where it is not stated."""
    pad = _generation(folder).get("pad_token_id")
    if pad is None:
        return None
    path, most = folder / GENERATION, transformer.config.vocab_size - 1
    if not 0 <= _expect(path, "pad_token_id", pad, int) <= most:
        raise CheckpointError(f"{path}: pad_token_id is {pad}; it must be in 0 … {most}")
    return pad
