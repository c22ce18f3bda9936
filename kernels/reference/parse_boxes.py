"""Plain-torch grammar of boxes, all rows at once: the oracle of every test and the CPU path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OPEN, NUMBER, SPACE, COMPLETE, CLOSED, DEAD = range(6)
CHUNK = 1 << 20  # pairs of a row and a grammar token at a time


def location_boxes(tokens: Tensor, first: int, bins: int, close: int) -> Tensor:
    """float32 [N, 4]; see `echogen.kernels.parse_boxes`."""
    ends, values = _length(tokens, close), _four(tokens) - first
    x1, y1, x2, y2 = values.unbind(1)
    whole = (ends == 4) & ((values >= 0) & (values < bins)).all(1) & (x2 > x1) & (y2 > y1)
    return torch.where(whole[:, None], values.float() / (bins - 1), torch.nan)


def location_mask(
    tokens: Tensor, lengths: Tensor, first: int, bins: int, close: int, vocab: int
) -> Tensor:
    """bool [N, vocab]."""
    rows, scale = len(tokens), bins - 1
    count = lengths.clamp(0, tokens.shape[1])
    values = _four(tokens) - first
    low = torch.zeros_like(values)
    low[:, 2:] = values[:, :2] + 1
    high = torch.tensor([scale - 1, scale - 1, scale, scale], device=tokens.device)
    fits = (values >= low) & (values <= high)
    slot = torch.arange(4, device=tokens.device)
    valid = (fits | (slot >= count[:, None])).all(1)
    due = valid & (count < 4)
    here = count.clamp(max=3)[:, None]
    bounds = [b.gather(1, here) + first for b in (low, high.expand(rows, 4))]
    fifth = tokens[:, 4] if tokens.shape[1] > 4 else torch.full_like(count, close)
    done = valid & ((count == 4) | ((count > 4) & (fifth == close)))
    word = torch.arange(vocab, device=tokens.device)
    out = due[:, None] & (word >= bounds[0]) & (word <= bounds[1])
    out[:, close] = done
    return out


def _length(tokens: Tensor, close: int) -> Tensor:
    """Tokens before the first ``close``, int64 [N]."""
    return (tokens != close).long().cumprod(1).sum(1)


def _four(tokens: Tensor) -> Tensor:
    """The first four tokens, int64 [N, 4]; −1 where there are fewer."""
    four = tokens[:, :4]
    return torch.cat((four, four.new_full((len(tokens), 4 - four.shape[1]), -1)), 1)


@dataclass
class _State:
    """How far each row's reading of "[x1, y1, x2, y2]" is; every field is int64 of one shape."""

    phase: Tensor
    field: Tensor
    value: Tensor
    digits: Tensor
    corner: Tensor  # [..., 4]

    def feed(self, c: Tensor, scale: int) -> None:
        """Read one character per row; 0 changes nothing."""
        read = c != 0
        number, digit = self.phase == NUMBER, c - ord("0")
        x1, y1 = self.corner[..., 0], self.corner[..., 1]
        low = torch.where(self.field < 2, 0, torch.where(self.field == 2, x1, y1) + 1)
        high = torch.where(self.field < 2, scale - 1, scale)

        is_digit = read & number & (digit >= 0) & (digit <= 9)
        zero_led = (self.digits > 0) & (self.value == 0)
        value = torch.where(is_digit, 10 * self.value + digit, self.value)
        bad = is_digit & (zero_led | ~_completable(value, low, high, scale))
        separator = torch.where(self.field < 3, ord(","), ord("]"))
        ends = read & number & (self.digits > 0) & (c == separator) & (self.value >= low)
        begins = (self.phase == OPEN) & (c == ord("[")) | (self.phase == SPACE) & (c == ord(" "))
        dead = bad | (read & ~is_digit & ~ends & ~begins)

        here = ends[..., None] & (torch.arange(4, device=c.device) == self.field[..., None])
        self.corner = torch.where(here, self.value[..., None], self.corner)
        after = torch.where(self.field == 3, COMPLETE, SPACE)
        self.phase = torch.where(ends, after, torch.where(begins, NUMBER, self.phase))
        self.phase = torch.where(dead, DEAD, self.phase)
        self.field = self.field + ends.long()
        self.digits = torch.where(begins, 0, self.digits + is_digit.long())
        self.value = torch.where(begins, 0, value)

    def read(self, piece: Tensor, scale: int) -> None:
        """Read one token per row: characters uint8 [width, ...]. With none it is no part of a
        box."""
        self.phase = torch.where(piece[0] != 0, self.phase, DEAD)
        for c in piece:
            # A table is as wide as its longest text, and long ones are rare. Not on CUDA: the host
            # would wait, and a graph could not capture it.
            if c.device.type == "cpu" and not c.any():
                break
            self.feed(c.long(), scale)  # int64 for one character at a time only


def _completable(value: Tensor, low: Tensor, high: Tensor, scale: int) -> Tensor:
    """Whether digits that spell ``value``, perhaps with more after them, can be in low … high."""
    can, spread = torch.zeros_like(value, dtype=torch.bool), 1
    for _ in range(len(str(scale))):
        can |= (value * spread <= high) & (value * spread + spread > low)
        spread *= 10
    return torch.where(value == 0, low == 0, can)


def _run(tokens: Tensor, count: Tensor, pieces: Tensor, close: int, scale: int) -> _State:
    """The state after ``count`` tokens; tokens after a closing mark are ignored."""
    zero = torch.zeros_like(count)
    state = _State(zero + OPEN, zero, zero, zero, zero[:, None].repeat(1, 4))
    for s in range(tokens.shape[1]):
        token, before = tokens[:, s], state.phase
        inside = (token >= 0) & (token < pieces.shape[1])
        piece = pieces[:, torch.where(inside, token, 0)]
        reads = (s < count) & (token != close) & (before != CLOSED)
        state.read(torch.where(reads & inside, piece, 0), scale)
        closes = (s < count) & (token == close) & (before != CLOSED)
        closed = torch.where(before == COMPLETE, CLOSED, DEAD)
        state.phase = torch.where(reads, state.phase, torch.where(closes, closed, before))
    return state


def text_boxes(tokens: Tensor, pieces: Tensor, close: int, scale: int) -> Tensor:
    """float32 [N, 4]."""
    count = torch.full_like(tokens[:, 0], tokens.shape[1]) if tokens.shape[1] else tokens.sum(1)
    state = _run(tokens, count, pieces, close, scale)
    return torch.where(_whole(state)[:, None], state.corner.float() / scale, torch.nan)


def text_mask(tokens: Tensor, lengths: Tensor, pieces: Tensor, close: int, scale: int) -> Tensor:
    """bool [N, vocab]."""
    out = torch.zeros(len(tokens), pieces.shape[1], dtype=torch.bool, device=tokens.device)
    words = pieces[0].nonzero().squeeze(1)
    rows = max(1, CHUNK // max(1, len(words)))
    for i in range(0, len(tokens), rows):
        here = slice(i, i + rows)
        count = lengths[here].clamp(0, tokens.shape[1])
        state = _run(tokens[here], count, pieces, close, scale)
        whole, shape = _whole(state), (len(count), len(words))
        open_, field, value, digits = (
            t[:, None].expand(shape) for t in (state.phase, state.field, state.value, state.digits)
        )
        following = _State(open_, field, value, digits, state.corner[:, None])
        following.read(pieces[:, None, words].expand(-1, *shape), scale)
        out[here, words] = (following.phase != DEAD) & ~whole[:, None]
        out[here, close] = whole
    return out


def _whole(state: _State) -> Tensor:
    return (state.phase == COMPLETE) | (state.phase == CLOSED)
