"""Boxes are read and continued as the engine's codecs do it: by the reference, and by the kernels'
own source, natively where there is a GPU and emulated on the CPU everywhere."""

from __future__ import annotations

import random

import pytest
import torch

from echogen.engine.prompt import LocationCodec, TextualCodec, location_token
from echogen.kernels import parse_boxes as module
from echogen.kernels.parse_boxes import LONGEST_PIECE, MAX_SCALE, text_pieces
from echogen.train.tokenizer import train_tokenizer

from .emulated import emulate

KINDS = ("location", "text")
CHARACTERS = "[], 0123456789"
TEXTS = [
    "", "a", " a", "٤", "-", ".", "x1", *CHARACTERS, "10, ", ", ", "]", "10", "00", "05", " 10",
    "1]", "], ", "]]", "[0, ", "0, 0", "0, 1", "[1, 2, 3, 4]", "[999, 999, 1000, 1000]", "1000",
    "  ", ",", " " * LONGEST_PIECE, "1" * (LONGEST_PIECE + 1), "0, 1000]", "1, 1, ", "500, 5",
    "[[", "99", "5",
]  # fmt: skip
VOCAB, SPECIAL = (
    len(TEXTS),
    len(TEXTS) - 1,
)  # what it decodes to could stand in a box, but it is no text
STRANGE = [-1, -(2**62), 2**62, -(2**63), 2**63 - 1, 2**32 + 40]  # tokens of no vocabulary


class Vocabulary:
    """All that a codec asks of a tokenizer: location tokens, or tokens of several characters."""

    all_special_ids = (SPECIAL,)

    def __init__(self, first: int = 0, bins: int = 0) -> None:
        self._locations = {location_token(i): first + i for i in range(bins)}

    def get_vocab(self):
        return self._locations or {f"token {i}": i for i in range(VOCAB)}

    def decode(self, ids):
        return "".join(TEXTS[i] for i in ids)


class Grammar:
    """One of the engine's codecs, and the operators with all but their tokens filled in."""

    def __init__(self, kind, codec, vocab, close, **rest):
        self.kind, self.codec, self.vocab, self.close, self.rest = kind, codec, vocab, close, rest

    def boxes(self, tokens):
        read = getattr(module, f"parse_{self.kind}_boxes")
        return read(tokens, close=self.close, **self._on(tokens.device))

    def mask(self, tokens, lengths):
        allow = getattr(module, f"allowed_{self.kind}_mask")
        width = {"vocab": self.vocab} if self.kind == "location" else {}
        made = allow(tokens, lengths, close=self.close, **width, **self._on(tokens.device))
        assert made.shape == (len(tokens), self.vocab) and made.dtype == torch.bool
        assert (made.view(torch.uint8) <= 1).all(), "a byte was forgotten"
        return made

    def _on(self, device):
        return {k: v.to(device) if k == "pieces" else v for k, v in self.rest.items()}

    def read(self, row):
        """The codec's box up to the closing mark; NaN for none."""
        return self.codec.parse(self._inside(row)) or [float("nan")] * 4

    def may_follow(self, row):
        """What the codec lets follow, the closing mark behind a box, and nothing behind what begins
        no box."""
        ids = self._inside(row)
        if self.codec.parse(ids) is not None:
            return [self.close]
        begins = all(token in self.codec.allowed(tuple(ids[:i])) for i, token in enumerate(ids))
        return self.codec.allowed(tuple(ids)) if begins and len(ids) == len(row) else []

    def _inside(self, row):
        return row[: row.index(self.close)] if self.close in row else row

    def walk(self, draw):
        """The tokens of a box; the long ones, which stand last, come up often."""
        ids = []
        while allowed := self.codec.allowed(tuple(ids)):
            ids.append(draw.choice(allowed[-9:] if draw.random() < 0.3 else allowed))
        return ids


def location(bins=33, first=40, vocab=84, close=7):
    codec = LocationCodec(Vocabulary(first, bins), bins)
    return Grammar("location", codec, vocab, close, first_location=first, bins=bins)


def text(scale=1000, vocab=VOCAB, close=1):
    codec = TextualCodec(Vocabulary())
    codec.scale = scale
    pieces = text_pieces([*TEXTS[:SPECIAL], *[None] * (vocab - SPECIAL)])
    return Grammar("text", codec, vocab, close, pieces=pieces, scale=scale)


GRAMMARS = {
    "33 locations": location,
    "1000 locations, vocabulary 16·n": lambda: location(1000, 10, 1024, 1023),
    "2 locations, close last": lambda: location(2, 0, 3, 2),
    "text": text,
    "text, vocabulary 16·n": lambda: text(vocab=64),
    "text to 10": lambda: text(10),
    "text to 7": lambda: text(7),
    "text to 1": lambda: text(1),
}


@pytest.fixture(params=GRAMMARS)
def grammar(request):
    return GRAMMARS[request.param]()


@pytest.fixture
def draw(generator):
    return random.Random(generator.initial_seed())


@pytest.fixture(params=["as registered", "emulated", "emulated, warps apart"])
def where(request, device, tmp_path_factory, monkeypatch):
    """Where the public functions are to be called: on the device, or emulated on the CPU."""
    new_mask = module._mask
    monkeypatch.setattr(module, "_mask", lambda *shape: _fill(new_mask(*shape)))
    if request.param == "as registered":
        return device
    emulate(module, tmp_path_factory, monkeypatch, early=request.param == "emulated, warps apart")
    for kind in KINDS:
        for name, launcher in ((f"_parse_{kind}_boxes", f"_launch_{kind}_boxes"),
                               (f"_allowed_{kind}_mask", f"_launch_{kind}_mask")):  # fmt: skip
            monkeypatch.setattr(module, name, getattr(module, launcher))
    return "cpu"


def _fill(mask):
    mask.view(torch.uint8).fill_(0xFF)  # no bool at all
    return mask


def rows_of(grammar, draw, count, width):
    """Rows of ``width`` tokens: boxes, boxes gone wrong, and noise, with and without their end."""
    words = [t for t in range(grammar.vocab) if t != grammar.close]
    rows = []
    for _ in range(count):
        row = grammar.walk(draw)
        for _ in range(draw.choice([0, 0, 1, 1, 2])):
            at, some = draw.randrange(len(row) + 1), draw.choice([*words, grammar.close])
            some = draw.choice(STRANGE) if draw.random() < 0.1 else some
            broken = [row[:at] + row[at + 1 :], [*row[:at], some, *row[at:]],
                      [*row[:at], some, *row[at + 1 :]], row[at:] + row[:at],
                      row[:at] + row[at : at + 1] * 2 + row[at + 1 :]]  # fmt: skip
            row = draw.choice(broken)
        ends = [grammar.close] if len(row) < width or draw.random() < 0.5 else []
        rest = [draw.choice([*words, *STRANGE, grammar.close]) for _ in range(width)]
        rows.append((row + ends + rest)[:width])
    return rows


def tensor(rows, width, device):
    return torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), width)


def same(found, wanted):
    """To the bit, but that one NaN is as good as another."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("width", [0, 1, 4, 5, 27])
def test_boxes_are_those_of_the_codec(width, grammar, where, draw):
    rows = rows_of(grammar, draw, 60, width)
    wanted = torch.tensor([grammar.read(row) for row in rows], dtype=torch.float64).float()
    assert width < 27 or wanted.isfinite().any()
    same(grammar.boxes(tensor(rows, width, where)).cpu(), wanted)


@pytest.mark.parametrize("width", [0, 1, 4, 5, 27])
def test_masks_are_what_the_codec_allows(width, grammar, where, draw):
    rows = rows_of(grammar, draw, 40, width)
    lengths = [draw.choice([draw.randint(0, width), draw.randint(0, width), -3, width + 9])
               for _ in rows]  # fmt: skip
    found = grammar.mask(tensor(rows, width, where), torch.tensor(lengths, device=where))
    for row, length, mask in zip(rows, lengths, found.tolist(), strict=True):
        wanted = grammar.may_follow(row[: min(max(length, 0), width)])
        assert [i for i, allowed in enumerate(mask) if allowed] == wanted, (row, length)


def test_constrained_decodes_end_in_boxes(grammar, where, draw):
    """Every mask on the way is the codec's, something may always follow, and every row parses."""
    count, steps = 12, grammar.codec.steps
    rows = [[] for _ in range(count)]
    tokens = torch.full((count, steps + 2), 2**62, device=where)
    for step in range(steps + 2):
        lengths = torch.full((count,), step, dtype=torch.int32, device=where)
        masks = grammar.mask(tokens, lengths).tolist()
        for i, (row, mask) in enumerate(zip(rows, masks, strict=True)):
            allowed = [token for token, may in enumerate(mask) if may]
            assert allowed == grammar.may_follow(row) and allowed
            row.append(draw.choice(allowed[-9:] if i % 2 else allowed))
            tokens[i, step] = row[-1]
    boxes = grammar.boxes(tokens).cpu()
    wanted = torch.tensor([grammar.codec.parse(r[: r.index(grammar.close)]) for r in rows])
    assert torch.equal(boxes, wanted)
    assert (boxes[:, :2] < boxes[:, 2:]).all() and (boxes >= 0).all() and (boxes <= 1).all()


@pytest.mark.parametrize("count", [0, 1, 256, 257, 600])
@pytest.mark.parametrize("kind", ["33 locations", "text"])
def test_any_number_of_rows(count, kind, where, draw):
    grammar = GRAMMARS[kind]()
    rows = rows_of(grammar, draw, 60, 7)
    rows = (rows * 10)[:count]
    wanted = torch.tensor([grammar.read(row) for row in rows], dtype=torch.float64).view(-1, 4)
    same(grammar.boxes(tensor(rows, 7, where)).cpu(), wanted.float())


@pytest.mark.parametrize("vocab", [4095, 4096, 4097, 8197, 12304])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_vocabularies_of_several_blocks(vocab, count, where, draw):
    """The tokens that matter stand at the borders of blocks of 4096, and at the very end."""
    for grammar in (location(300, vocab - 300, vocab, 2), text(vocab=vocab, close=vocab - 1)):
        if grammar.kind == "text":
            moved = torch.randperm(vocab - 1, generator=torch.Generator().manual_seed(vocab))
            moved = torch.cat((moved, torch.tensor([vocab - 1])))
            grammar.rest["pieces"] = grammar.rest["pieces"][:, moved].contiguous()
            new = {int(old): i for i, old in enumerate(moved)}
            grammar.codec._pieces = {new[i]: t for i, t in grammar.codec._pieces.items()}
        rows = rows_of(grammar, draw, count, 6)
        lengths = torch.tensor([draw.randint(0, 6) for _ in rows], dtype=torch.int64, device=where)
        found = grammar.mask(tensor(rows, 6, where), lengths)
        for row, length, mask in zip(rows, lengths.tolist(), found, strict=True):
            wanted = sorted(grammar.may_follow(row[:length]))
            assert mask.nonzero().flatten().tolist() == wanted


def test_the_largest_scale(where):
    """A million steps, every box of which spells more than one of a thousand can."""
    spelt = ["[999999, 999999, 1000000, 1000000]", "[0, 1, 100000, 1000000]", "[9, 9, 9, 1000000]",
             "[1000000, 0, 1000000, 1]", "[0, 0, 1000001, 1]", "[0, 0, 9999999, 1]"]  # fmt: skip
    pieces = text_pieces([*spelt, *CHARACTERS, None]).to(where)
    close = pieces.shape[1] - 1
    whole = torch.arange(len(spelt), device=where)[:, None]
    letters = [[len(spelt) + CHARACTERS.index(c) for c in s] for s in spelt]
    letters = [row + [close] * (LONGEST_PIECE - len(row)) for row in letters]
    good = torch.tensor([[999999, 999999, 1000000, 1000000], [0, 1, 100000, 1000000]]) / MAX_SCALE
    wanted = torch.cat((good, torch.full((4, 4), torch.nan)))
    for tokens in (whole, tensor(letters, LONGEST_PIECE, where)):
        same(module.parse_text_boxes(tokens, pieces, close, MAX_SCALE).cpu(), wanted)
    edges = torch.tensor([[7, 7 + 999_998, 7 + 999_999 - 1, 7 + 999_999]], device=where)
    found = module.parse_location_boxes(edges[:, [0, 1, 2, 3]], 7, MAX_SCALE, 2)
    assert torch.equal(found.cpu(), torch.tensor([[0, 999_998, 999_998, 999_999]]) / 999_999)


def test_locations_of_any_first_token(where):
    """No sum or difference of tokens overflows."""
    first = module.MAX_FIRST
    tokens = first + torch.tensor([[0, 1, 2, 3], [2, 1, 1, 3]], device=where)
    tokens = torch.cat((tokens, torch.full((1, 4), -(2**63), device=where)))
    found = module.parse_location_boxes(tokens, first, 5, 9).cpu()
    same(found, torch.tensor([[0, 0.25, 0.5, 0.75], [torch.nan] * 4, [torch.nan] * 4]))


def test_tokens_of_int32_and_repeats(grammar, where, draw):
    rows = [[t for t in row if abs(t) < 2**31] for row in rows_of(grammar, draw, 30, 9)]
    tokens = tensor([(row + [grammar.close] * 9)[:9] for row in rows], 9, where)
    lengths = torch.tensor([draw.randint(0, 9) for _ in rows], device=where)
    boxes, mask = grammar.boxes(tokens), grammar.mask(tokens, lengths)
    same(grammar.boxes(tokens.int()), boxes)
    assert torch.equal(grammar.mask(tokens.int(), lengths.int()), mask)


def test_text_pieces_spell_what_the_codec_reads():
    pieces, codec = text_pieces([*TEXTS[:SPECIAL], None]), TextualCodec(Vocabulary())
    assert pieces.dtype == torch.uint8 and pieces.shape == (LONGEST_PIECE, VOCAB)
    assert pieces.is_contiguous()
    for token, column in enumerate(pieces.T.tolist()):
        known = codec._pieces.get(token, "")
        assert bytes(column).rstrip(b"\0").decode() == known * (len(known) <= LONGEST_PIECE)


def test_text_pieces_of_a_real_tokenizer(where, draw):
    """Boxes as the tokenizer itself splits them, at any scale, come back."""
    numbers = [f"[{i}, {i + 5}, {i + 100}, {i + 120}]" for i in range(0, 800, 7)]
    tokenizer = train_tokenizer(numbers, bins=3, merges=80)
    codec, vocab = TextualCodec(tokenizer), len(tokenizer)
    special = set(tokenizer.all_special_ids)
    texts = [None if i in special else tokenizer.decode([i]) for i in range(vocab)]
    grammar = Grammar("text", codec, vocab + 3, tokenizer.convert_tokens_to_ids("</box>"),
                      pieces=text_pieces([*texts, *[None] * 3]), scale=1000)  # fmt: skip
    assert max(map(len, codec._pieces.values())) > 2
    corners = [[draw.randrange(500), draw.randrange(500), draw.randint(500, 1000),
                draw.randint(500, 1000)] for _ in range(50)]  # fmt: skip
    rows = [tokenizer.encode(f"[{', '.join(map(str, c))}]</box>", add_special_tokens=False)
            for c in corners]  # fmt: skip
    width = max(map(len, rows))
    tokens = tensor([r + [vocab + 1] * (width - len(r)) for r in rows], width, where)
    assert torch.equal(grammar.boxes(tokens).cpu(), torch.tensor(corners) / 1000)
    lengths = torch.tensor([draw.randrange(len(r)) for r in rows], device=where)
    for row, length, mask in zip(rows, lengths, grammar.mask(tokens, lengths), strict=True):
        assert mask.nonzero().flatten().tolist() == grammar.may_follow(row[:length])


def test_text_pieces_are_refused_without_texts():
    with pytest.raises(ValueError, match="texts is empty"):
        text_pieces([])
    assert torch.equal(text_pieces(["a", None, ""]), torch.zeros(1, 3, dtype=torch.uint8))


def test_the_kernels_are_entered(where, draw, launched):
    for grammar in (location(), text()):
        tokens = tensor(rows_of(grammar, draw, 3, 5), 5, where)
        grammar.boxes(tokens)
        grammar.mask(tokens, torch.zeros(3, dtype=torch.int64, device=where))
    kernels = ("parse_location_boxes", "allowed_location_mask", "parse_text_boxes",
               "allowed_text_mask")  # fmt: skip
    emulated = module._parse_text_boxes is module._launch_text_boxes
    assert launched == (dict.fromkeys(kernels, 1) if emulated or where == "cuda" else {})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2 GiB of mask")
def test_masks_beyond_32_bits():
    tokens = torch.full((22_000, 4), 2, device="cuda")
    lengths = torch.zeros(22_000, dtype=torch.int64, device="cuda")
    mask = module.allowed_location_mask(tokens, lengths, 5, 1000, 2, 100_003)
    assert mask.numel() > 2**31
    assert (mask.sum(1) == 999).all() and mask[:, 5:1004].all()


def test_opcheck(device):
    pieces = text_pieces([*CHARACTERS, "1, 1", None]).to(device)
    letters = [CHARACTERS.index(c) for c in "[0, 1, 22, 3]"]
    spelt = torch.tensor([letters], device=device)
    four = torch.tensor([[5, 6, 7, 8], [5, 5, 6, 6]], device=device)
    for name, arguments in [
        ("parse_location_boxes", (four, 5, 9, 2)),
        ("allowed_location_mask", (four, four[:, 0] - 3, 5, 9, 2, 20)),
        ("parse_text_boxes", (spelt, pieces, 15, 1000)),
        ("allowed_text_mask", (spelt, spelt[:, 0] + 3, pieces, 15, 1000)),
    ]:
        torch.library.opcheck(getattr(torch.ops.echogen, name).default, arguments)


def test_bad_arguments(device):
    tokens = torch.zeros(3, 5, dtype=torch.int64, device=device)
    lengths, pieces = tokens[:, 0].clone(), text_pieces([*CHARACTERS, None]).to(device)
    location = {"tokens": tokens, "first_location": 5, "bins": 10, "close": 2}
    spelt = {"tokens": tokens, "pieces": pieces, "close": 14, "scale": 1000}
    of_tokens = [
        ({"tokens": tokens.float()}, "tokens is torch.float32"),
        ({"tokens": tokens[0]}, r"tokens has shape \(5,\)"),
        ({"tokens": tokens[:, :4]}, r"tokens has strides \(5, 1\)"),
        ({"close": -1}, "close = -1"),
    ]
    of_lengths = [
        ({"lengths": lengths > 0}, "lengths is torch.bool"),
        ({"lengths": lengths[:2]}, r"lengths has shape \(2,\)"),
        ({"lengths": tokens[:, 0]}, r"lengths has strides \(5,\)"),
        ({"lengths": lengths.to("meta")}, "several devices: .* lengths on meta"),
    ]
    of_locations = [
        ({"first_location": -1}, "first_location = -1"),
        ({"first_location": 2**62 + 1}, "first_location = 4611686018427387905"),
        ({"bins": 1}, "bins = 1"),
        ({"bins": 1_000_001}, "bins = 1000001"),
        ({"close": 14}, "close = 14 is the location token of 9"),
    ]
    of_vocab = [
        ({"vocab": 14}, "vocab = 14; the location tokens end at 15"),
        ({"close": 15}, "close = 15; .* vocabulary of 15"),
    ]
    of_texts = [
        ({"pieces": pieces[0]}, r"pieces has shape \(15,\)"),
        ({"pieces": pieces.int()}, "pieces is torch.int32"),
        ({"pieces": pieces[:, :0]}, "pieces has shape .* must not be empty"),
        ({"pieces": text_pieces(["[1", None]).T.to(device)}, "pieces has strides"),
        ({"pieces": pieces.to("meta")}, "several devices: .* pieces on meta"),
        ({"scale": 0}, "scale = 0"),
        ({"scale": 1_000_001}, "scale = 1000001"),
        ({"close": 15}, "close = 15; .* vocabulary of 15"),
    ]
    masked = {"lengths": lengths}
    for function, good, bad in [
        (module.parse_location_boxes, location, of_tokens + of_locations),
        (module.allowed_location_mask, location | masked | {"vocab": 15},
         of_tokens + of_locations + of_lengths + of_vocab),
        (module.parse_text_boxes, spelt, of_tokens + of_texts),
        (module.allowed_text_mask, spelt | masked, of_tokens + of_texts + of_lengths),
    ]:  # fmt: skip
        function(**good)
        for change, match in bad:
            with pytest.raises((ValueError, TypeError), match=match):
                function(**good | change)
