"""Parse boxes from tokens, and find which tokens may follow, without a host synchronisation.

Reading answers on the host would stall the device once per step. Here one thread runs a row's
tokens through the grammar's finite-state machine. Both codecs of the engine have a grammar: four
location tokens, and the text ``[x1, y1, x2, y2]``, for which a table holds each token's characters.
x1 and y1 are below the scale, x2 > x1 and y2 > y1, and integers have no leading zeros (EchoGen,
arXiv 2603.18001, and PlanGen's box format).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from echogen.kernels import checks
from echogen.kernels.cuda.loader import CudaKernel
from echogen.kernels.dispatch import launch, operator
from echogen.kernels.reference import parse_boxes as reference

KIND = "CUDA C++"
THREADS, MASK_BYTES, STATE_BYTES = 256, 16, 32  # as in parse_boxes.cu
MAX_SCALE = 1_000_000  # ten times it fits 32 bits
LONGEST_PIECE = len("[999999, 999999, 1000000, 1000000]")
MAX_FIRST = 1 << 62  # so that no token overflows 64 bits

_LOCATION_BOXES = CudaKernel("parse_boxes", "parse_location_boxes")
_LOCATION_MASK = CudaKernel("parse_boxes", "allowed_location_mask")
_TEXT_BOXES = CudaKernel("parse_boxes", "parse_text_boxes")
_TEXT_MASK = CudaKernel("parse_boxes", "allowed_text_mask")


def _rows_grid(tokens: Tensor) -> tuple[int]:
    return (triton.cdiv(len(tokens), THREADS),)


def _mask_grid(tokens: Tensor, vocab: int) -> tuple[int]:
    return (len(tokens) * triton.cdiv(vocab, THREADS * MASK_BYTES),)


def _boxes(tokens: Tensor) -> Tensor:
    return torch.empty(len(tokens), 4, dtype=torch.float32, device=tokens.device)


def _mask(tokens: Tensor, vocab: int) -> Tensor:
    return torch.empty(len(tokens), vocab, dtype=torch.bool, device=tokens.device)


def _launch_location_boxes(tokens: Tensor, first: int, bins: int, close: int) -> Tensor:
    out, (rows, length) = _boxes(tokens), tokens.shape
    numbers = (rows, length, first, bins, close)
    launch(_LOCATION_BOXES, _rows_grid(tokens), tokens, out, *numbers, block=THREADS)
    return out


def _launch_location_mask(
    tokens: Tensor, lengths: Tensor, first: int, bins: int, close: int, vocab: int
) -> Tensor:
    out = _mask(tokens, vocab)
    launch(
        _LOCATION_MASK, _mask_grid(tokens, vocab), tokens, lengths, out, tokens.shape[1], vocab,
        first, bins, close, block=THREADS, shared=STATE_BYTES,
    )  # fmt: skip
    return out


def _launch_text_boxes(tokens: Tensor, pieces: Tensor, close: int, scale: int) -> Tensor:
    out = _boxes(tokens)
    launch(
        _TEXT_BOXES, _rows_grid(tokens), tokens, pieces, out, *tokens.shape, *pieces.shape, scale,
        close, block=THREADS,
    )  # fmt: skip
    return out


def _launch_text_mask(
    tokens: Tensor, lengths: Tensor, pieces: Tensor, close: int, scale: int
) -> Tensor:
    width, vocab = pieces.shape
    out = _mask(tokens, vocab)
    launch(
        _TEXT_MASK, _mask_grid(tokens, vocab), tokens, lengths, pieces, out, tokens.shape[1],
        width, vocab, scale, close, block=THREADS, shared=STATE_BYTES,
    )  # fmt: skip
    return out


@operator("parse_location_boxes", _launch_location_boxes, KIND)
def _parse_location_boxes(tokens: Tensor, first: int, bins: int, close: int) -> Tensor:
    return reference.location_boxes(tokens, first, bins, close)


@operator("allowed_location_mask", _launch_location_mask, KIND)
def _allowed_location_mask(
    tokens: Tensor, lengths: Tensor, first: int, bins: int, close: int, vocab: int
) -> Tensor:
    return reference.location_mask(tokens, lengths, first, bins, close, vocab)


@operator("parse_text_boxes", _launch_text_boxes, KIND)
def _parse_text_boxes(tokens: Tensor, pieces: Tensor, close: int, scale: int) -> Tensor:
    return reference.text_boxes(tokens, pieces, close, scale)


@operator("allowed_text_mask", _launch_text_mask, KIND)
def _allowed_text_mask(
    tokens: Tensor, lengths: Tensor, pieces: Tensor, close: int, scale: int
) -> Tensor:
    return reference.text_mask(tokens, lengths, pieces, close, scale)


@_parse_location_boxes.register_fake
def _fake_location_boxes(tokens: Tensor, first: int, bins: int, close: int) -> Tensor:
    return tokens.new_empty(len(tokens), 4, dtype=torch.float32)


@_allowed_location_mask.register_fake
def _fake_location_mask(
    tokens: Tensor, lengths: Tensor, first: int, bins: int, close: int, vocab: int
) -> Tensor:
    return tokens.new_empty(len(tokens), vocab, dtype=torch.bool)


@_parse_text_boxes.register_fake
def _fake_text_boxes(tokens: Tensor, pieces: Tensor, close: int, scale: int) -> Tensor:
    return tokens.new_empty(len(tokens), 4, dtype=torch.float32)


@_allowed_text_mask.register_fake
def _fake_text_mask(
    tokens: Tensor, lengths: Tensor, pieces: Tensor, close: int, scale: int
) -> Tensor:
    return tokens.new_empty(len(tokens), pieces.shape[1], dtype=torch.bool)


def parse_location_boxes(tokens: Tensor, first_location: int, bins: int, close: int) -> Tensor:
    """Parse boxes of four location tokens, as `LocationCodec.parse` does.

    Args:
        tokens: integers [N, S], contiguous: the tokens after ``<box>``. A box ends at the first
            ``close`` or at the end of its row; tokens after that are ignored.
        first_location: token of coordinate 0; those of 0 … bins − 1 are consecutive.
        bins: coordinates per side, at least 2; token i means i/(bins − 1).
        close: the token ``</box>``.

    Returns:
        float32 [N, 4], normalised ``xyxy``; NaN where a row is not a box.

    Raises:
        ValueError: shapes, strides or numbers that do not fit.
        TypeError: tokens that are not integers.
    """
    _check_tokens(tokens)
    _check_location(first_location, bins, close, None)
    made: Tensor = _parse_location_boxes(tokens.long(), first_location, bins, close)
    return made


def allowed_location_mask(
    tokens: Tensor, lengths: Tensor, first_location: int, bins: int, close: int, vocab: int
) -> Tensor:
    """Mark the tokens after which a box can still be completed, as `LocationCodec.allowed` lists.

    After a complete box, and after its ``close``, only ``close`` may follow, so that finished rows
    can stay in a batch. After an error that no token can repair, nothing may follow.

    Args:
        tokens, first_location, bins, close: as in `parse_location_boxes`.
        lengths: integers [N]: the number of tokens in each row so far, clamped to 0 … S.
        vocab: width of the mask.

    Returns:
        bool [N, vocab].

    Raises:
        ValueError: shapes, devices, strides or numbers that do not fit.
        TypeError: tokens or lengths that are not integers.
    """
    _check_tokens(tokens, lengths)
    _check_location(first_location, bins, close, vocab)
    made: Tensor = _allowed_location_mask(
        tokens.long(), lengths.long(), first_location, bins, close, vocab
    )
    return made


def parse_text_boxes(tokens: Tensor, pieces: Tensor, close: int, scale: int = 1000) -> Tensor:
    """Parse boxes spelled ``[x1, y1, x2, y2]``, as `TextualCodec.parse` does.

    Args:
        tokens, close: as in `parse_location_boxes`.
        pieces: uint8 [width, vocab], contiguous: the tokenizer's `text_pieces`.
        scale: the largest coordinate, which means 1; up to 10⁶.

    Returns:
        float32 [N, 4], normalised ``xyxy``; NaN where a row is not a box.

    Raises:
        ValueError: shapes, devices, strides or numbers that do not fit.
        TypeError: types that do not fit.
    """
    _check_tokens(tokens)
    _check_text(tokens, pieces, close, scale)
    made: Tensor = _parse_text_boxes(tokens.long(), pieces, close, scale)
    return made


def allowed_text_mask(
    tokens: Tensor, lengths: Tensor, pieces: Tensor, close: int, scale: int = 1000
) -> Tensor:
    """Mark the tokens after which a box can still be completed, as `TextualCodec.allowed` lists.

    Complete boxes and those beyond repair are treated as in `allowed_location_mask`, which also
    describes ``lengths``. The other arguments are those of `parse_text_boxes`. Returns bool
    [N, vocab].
    """
    _check_tokens(tokens, lengths)
    _check_text(tokens, pieces, close, scale)
    made: Tensor = _allowed_text_mask(tokens.long(), lengths.long(), pieces, close, scale)
    return made


def text_pieces(texts: Sequence[str | None]) -> Tensor:
    """Build a tokenizer's table of characters for the textual codec; needed once per tokenizer.

    Args:
        texts: what each token id decodes to; None for special tokens.

    Returns:
        uint8 [width, vocab]: each column holds a token's characters, then zeros; only zeros where a
        token is empty, longer than a box, or holds anything other than ``[], 0123456789``.
    """
    fits = [
        t.encode("ascii") if t and len(t) <= LONGEST_PIECE and not set(t) - set("[], 0123456789")
        else b""
        for t in texts
    ]  # fmt: skip
    width = max(1, *map(len, fits)) if fits else 1
    flat = bytearray().join(t.ljust(width, b"\0") for t in fits)
    if not flat:
        raise ValueError("texts is empty; pass the text of every token")
    return torch.frombuffer(flat, dtype=torch.uint8).view(-1, width).T.contiguous()


def _check_tokens(tokens: Tensor, lengths: Tensor | None = None) -> None:
    checks.check_integers(tokens=tokens, lengths=lengths)
    checks.check_shape("tokens", tokens, (None, None))
    if lengths is not None:
        checks.check_shape("lengths", lengths, (len(tokens),))
    checks.check_contiguous(tokens=tokens, lengths=lengths)
    checks.check_same_device(tokens=tokens, lengths=lengths)


def _check_location(first: int, bins: int, close: int, vocab: int | None) -> None:
    if not 2 <= bins <= MAX_SCALE:
        raise ValueError(f"bins = {bins}; it must be in 2 … {MAX_SCALE}")
    if not 0 <= first <= MAX_FIRST:
        raise ValueError(f"first_location = {first}; it must be in 0 … {MAX_FIRST}")
    if first <= close < first + bins:
        raise ValueError(f"close = {close} is the location token of {close - first}")
    if vocab is not None and first + bins > vocab:
        raise ValueError(f"vocab = {vocab}; the location tokens end at {first + bins}")
    _check_close(close, vocab)


def _check_text(tokens: Tensor, pieces: Tensor, close: int, scale: int) -> None:
    checks.check_shape("pieces", pieces, (None, None))
    if pieces.dtype != torch.uint8:
        raise TypeError(f"pieces is {pieces.dtype}; it must be uint8 (see text_pieces)")
    checks.check_not_empty(pieces=pieces)
    checks.check_contiguous(pieces=pieces)
    checks.check_same_device(tokens=tokens, pieces=pieces)
    if not 1 <= scale <= MAX_SCALE:
        raise ValueError(f"scale = {scale}; it must be in 1 … {MAX_SCALE}")
    _check_close(close, pieces.shape[1])


def _check_close(close: int, vocab: int | None) -> None:
    if close < 0 or (vocab is not None and close >= vocab):
        among = "" if vocab is None else f" in a vocabulary of {vocab}"
        raise ValueError(f"close = {close}; it must be a token{among}")
