"""Layouts to token ids and back: the two sequences (L2I, I2L) and the grammar of boxes.

L2I, byte for byte PlanGen's format with the textual codec::

    BOS<|User|>: {caption}\\n\\n<|Assistant|>: <grounding>
        <ref>e_1</ref><box>…</box>…</grounding>EOS<begin_of_image>          (in one line)

I2L, a trunk that all questions about one image share, and one branch for each expression::

    BOS<|User|>: <begin_of_image> z_1 … z_T <end_of_image> {question}\\n\\n<|Assistant|>:
        <ref>e_k</ref><box> → four coordinates </box>
"""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import groupby
from threading import Lock
from typing import Any, Literal, Protocol

from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from echogen.engine.layout import Box, Layout, LayoutError, LayoutObject, check_text

USER, ASSISTANT, PAD = "<|User|>", "<|Assistant|>", "<｜▁pad▁｜>"
BEGIN_IMAGE, END_IMAGE = "<begin_of_image>", "<end_of_image>"
MARKS = ("<grounding>", "</grounding>", "<ref>", "</ref>", "<box>", "</box>")
QUESTION = "Locate each object."
_LOCATION = "<loc_"
KEPT, SHORT = 8192, 256
"""How many texts' ids are cached, and the most characters of such a text: 75 MB in all if every
character is an id."""
Unconditional = Literal["pad", "empty"]


class PromptError(ValueError):
    """Token ids or a tokenizer that do not match the format; the message names what is wrong."""


def quantise(box: Box, scale: int) -> tuple[int, int, int, int]:
    """Normalised box → integers on 0…scale, at least one step wide and high, x1 and y1 < scale."""
    x1, y1 = (min(round(v * scale), scale - 1) for v in box[:2])
    x2, y2 = (round(v * scale) for v in box[2:])
    return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


class BoxCodec(Protocol):
    """How a box is written between ``<box>`` and ``</box>``.

    Attributes:
        name: "location" or "textual".
        scale: the largest coordinate; a box survives a round trip to within half of 1/scale.
        steps: the most tokens a box can take.
        ids: every token that a box can be written with.
    """

    name: str
    scale: int
    steps: int
    ids: list[int]

    def text(self, box: Box) -> str:
        """The box as prompt text."""
        ...

    def parse(self, ids: list[int]) -> Box | None:
        """Read the ids between the marks as a box; None if they are not one."""
        ...

    def allowed(self, ids: tuple[int, ...]) -> list[int]:
        """Ids that may follow ``ids`` so that a valid box can still be completed; [] when done."""
        ...


def _box(numbers: list[int], scale: int) -> Box | None:
    x1, y1, x2, y2 = numbers
    if x2 <= x1 or y2 <= y1:
        return None
    return (x1 / scale, y1 / scale, x2 / scale, y2 / scale)


class LocationCodec:
    """Four tokens ``<loc_i>`` per box, i = round(t·(bins − 1)), in the order x1 y1 x2 y2."""

    name = "location"
    steps = 4

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bins: int) -> None:
        """Raises PromptError where the tokenizer lacks one of the location tokens."""
        if bins < 2:
            raise PromptError(f"location codec with {bins} bins; it needs at least 2")
        vocab = tokenizer.get_vocab()
        names = [location_token(i) for i in range(bins)]
        for name in names:
            if name not in vocab:
                raise PromptError(
                    f"the tokenizer has no {name}; the location codec of {bins} bins needs "
                    f"<loc_0> to <loc_{bins - 1}> (use the textual codec for this checkpoint)"
                )
        self.scale = bins - 1
        self.ids = [vocab[name] for name in names]
        self._value = {token: i for i, token in enumerate(self.ids)}

    def text(self, box: Box) -> str:
        return "".join(location_token(v) for v in quantise(box, self.scale))

    def parse(self, ids: list[int]) -> Box | None:
        values = [self._value.get(i, -1) for i in ids]
        return None if len(values) != 4 or min(values) < 0 else _box(values, self.scale)

    def allowed(self, ids: tuple[int, ...]) -> list[int]:
        if len(ids) < 2:
            return self.ids[: self.scale]
        return self.ids[self._value[ids[-2]] + 1 :] if len(ids) < 4 else []


def location_token(value: int) -> str:
    """The token of one coordinate."""
    return f"{_LOCATION}{value}>"


class TextualCodec:
    """``[x1, y1, x2, y2]`` as text on 0…1000: the format of PlanGen's published checkpoint."""

    name = "textual"
    scale = 1000
    steps = 26  # "[1000, 1000, 1000, 1000]" one character a token, and two to spare

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        texts = {i: _decode(tokenizer, [i]) for i in sorted(set(tokenizer.get_vocab().values()))}
        special = set(tokenizer.all_special_ids)
        self._pieces = {
            i: t
            for i, t in texts.items()
            if t and i not in special and not set(t) - set("[], 0123456789")
        }
        self.ids = list(self._pieces)
        self._allowed = lru_cache(maxsize=65536)(self._search)

    def text(self, box: Box) -> str:
        return "[" + ", ".join(map(str, quantise(box, self.scale))) + "]"

    def parse(self, ids: list[int]) -> Box | None:
        text = "".join(self._pieces.get(i, "?") for i in ids)
        if not text.startswith("[") or not text.endswith("]") or not feasible(text, self.scale):
            return None
        return _box([int(v) for v in text[1:-1].split(", ")], self.scale)

    def allowed(self, ids: tuple[int, ...]) -> list[int]:
        return self._allowed("".join(self._pieces[i] for i in ids))

    def _search(self, text: str) -> list[int]:
        if text.endswith("]"):
            return []
        return [i for i, piece in self._pieces.items() if feasible(text + piece, self.scale)]


def feasible(text: str, scale: int) -> bool:
    """Whether ``text`` is the beginning of some ``[x1, y1, x2, y2]`` with x1 < x2 ≤ scale and
    y1 < y2 ≤ scale, integers without leading zeros."""
    if not text.startswith("["):
        return not text
    rest = text[1:]
    done: list[int] = []
    for i in range(4):
        low, high = (0, scale - 1) if i < 2 else (done[i - 2] + 1, scale)
        digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
        rest = rest[len(digits) :]
        if not rest:
            return _extendable(digits, low, high)
        if not digits or str(int(digits)) != digits or not low <= int(digits) <= high:
            return False
        done.append(int(digits))
        separator = ", " if i < 3 else "]"
        if len(rest) < len(separator):
            return separator.startswith(rest)
        if not rest.startswith(separator):
            return False
        rest = rest[len(separator) :]
    return not rest


def _extendable(digits: str, low: int, high: int) -> bool:
    """Whether digits, possibly followed by more digits, can be an integer in low…high."""
    if not digits or digits == "0":
        return low <= (high if not digits else 0)
    if digits[0] == "0":
        return False
    number, spread = int(digits), 1
    while number <= high:
        if number + spread > low:
            return True
        number, spread = number * 10, spread * 10
    return False


class Prompts:
    """Builds and reads the token sequences of one tokenizer and one box codec.

    Args:
        tokenizer: has BOS, EOS, the begin- and end-of-image tokens and ``MARKS``.
        codec: how boxes are written.
        question: the constant text of I2L; it contains no expression.
        pad: id of PAD where the tokenizer lacks Janus's ``<｜▁pad▁｜>``; None: its padding token's.

    Raises:
        PromptError: the tokenizer lacks one of the tokens, or no token can serve as PAD.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        codec: BoxCodec,
        question: str = QUESTION,
        pad: int | None = None,
    ) -> None:
        self.tokenizer, self.codec, self.question = tokenizer, codec, question
        vocab = tokenizer.get_vocab()
        # Many tokenizers use EOS as their padding token; Janus itself looks up PAD.
        padding = vocab.get(PAD, tokenizer.pad_token_id if pad is None else pad)
        ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": padding}
        for name, token in ids.items():
            if token is None:
                raise PromptError(
                    f"the tokenizer has no {name.upper()} token; name one in its config"
                )
        self.bos: int = ids["bos"]
        self.eos: int = ids["eos"]
        self.pad: int = ids["pad"]
        for token in (BEGIN_IMAGE, END_IMAGE, *MARKS):
            if token not in vocab:
                raise PromptError(f"the tokenizer has no {token}; add it as a special token")
        self.begin_image, self.end_image = vocab[BEGIN_IMAGE], vocab[END_IMAGE]
        self.ref, self.ref_end = vocab["<ref>"], vocab["</ref>"]
        self.box, self.box_end = vocab["<box>"], vocab["</box>"]
        # Text that spells a control token would be read as one, so such captions are refused. Added
        # letters are not control tokens: DeepSeek's vocabulary, which Janus uses, adds ü, ø, etc.
        added = tokenizer.added_tokens_decoder
        control = {t.content for t in added.values() if t.special} | {*tokenizer.all_special_tokens}
        control |= {USER, ASSISTANT, BEGIN_IMAGE, END_IMAGE, *MARKS}
        self._reserved = sorted(t for t in control if t.strip() and not t.startswith(_LOCATION))
        self._letters = {i: t.content for i, t in added.items() if not t.special}
        self._longest = longest_token(tokenizer)
        self._kept = lru_cache(maxsize=KEPT)(self._tokenized)
        self._turn = Lock()

    def fewest(self, *texts: str) -> int:
        """Return how many tokens texts take at least, all together, by their lengths alone: 4 MiB
        take seconds to tokenise. 0 where the tokenizer sets no bound (`longest_token`)."""
        return 0 if self._longest is None else -(-sum(map(len, texts)) // self._longest)

    def _encode(self, text: str) -> tuple[int, ...]:
        # Only short texts are cached, so that untrusted input cannot fill the memory.
        return (self._kept if len(text) <= SHORT else self._tokenized)(text)

    def _tokenized(self, text: str) -> tuple[int, ...]:
        with self._turn:  # only one thread at a time can use a tokenizer
            return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _text(self, ids: list[int]) -> str:
        # A byte-level decoder would mistake an added letter for a byte.
        runs = groupby(ids, self._letters.get)
        return "".join(
            _decode(self.tokenizer, [*run]) if letter is None else letter * len([*run])
            for letter, run in runs
        )

    def _checked(self, text: str, what: str) -> str:
        for token in self._reserved:
            if token in text:
                raise LayoutError(f"{what} holds the reserved token {token}; reword it")
        if _LOCATION in text:
            raise LayoutError(f"{what} holds a location token; reword it")
        return text

    # --- layout → image -------------------------------------------------------------------------

    def l2i_text(self, layout: Layout) -> str:
        """The text of an L2I prompt between BOS and EOS. Raises LayoutError on reserved tokens."""
        objects = "".join(
            f"<ref>{self._checked(o.expr, f'object {i}: expr')}</ref>"
            f"<box>{self.codec.text(o.box)}</box>"
            for i, o in enumerate(layout.objects, 1)
        )
        caption = self._checked(layout.caption, "caption")
        return f"{USER}: {caption}\n\n{ASSISTANT}: <grounding>{objects}</grounding>"

    def l2i(self, layout: Layout) -> list[int]:
        """The L2I prompt, BOS to begin-of-image; image codes follow it."""
        return [self.bos, *self._encode(self.l2i_text(layout)), self.eos, self.begin_image]

    def unconditional(self, prompt: list[int], kind: Unconditional = "pad") -> list[int]:
        """The prompt of the unconditional branch of classifier-free guidance.

        ``pad`` (Janus): everything but BOS and begin-of-image is replaced by PAD, which is attended
        to; ``empty`` (PlanGen): an empty layout.
        """
        if kind == "pad":
            return [self.bos, *[self.pad] * (len(prompt) - 2), self.begin_image]
        text = f"{USER}: \n\n{ASSISTANT}: <grounding></grounding>"
        return [self.bos, *self._encode(text), self.eos, self.begin_image]

    def layout(self, ids: list[int]) -> Layout:
        """Read the layout back from an L2I prompt; its boxes have the quantised coordinates.

        Raises:
            PromptError: the ids are not an L2I prompt.
        """
        first = _find(ids, self.ref, 0)
        if first == len(ids) or ids[0] != self.bos or ids[-2:] != [self.eos, self.begin_image]:
            raise PromptError(
                "the ids are no L2I prompt: BOS, <ref>, EOS or begin-of-image is missing"
            )
        head = self._text(ids[1:first])
        start, end = f"{USER}: ", f"\n\n{ASSISTANT}: <grounding>"
        if not head.startswith(start) or not head.endswith(end):
            raise PromptError(f"the ids are no L2I prompt: they begin with {head[:40]!r}")
        objects = []
        for expr, box in self.boxes(ids[first:]):
            if box is None:
                raise PromptError(f"the box of {expr!r} does not parse")
            objects.append((expr, box))
        try:
            return Layout(head[len(start) : -len(end)], tuple(LayoutObject(*o) for o in objects))
        except LayoutError as error:
            raise PromptError(f"the ids are no L2I prompt: {error}") from None

    def boxes(self, ids: list[int]) -> list[tuple[str, Box | None]]:
        """Read every ``<ref>expr</ref><box>…</box>`` in ids; None where a box does not parse."""
        found: list[tuple[str, Box | None]] = []
        i = 0
        while i < len(ids):
            if ids[i] != self.ref:
                i += 1
                continue
            close = _find(ids, self.ref_end, i)
            expr = self._text(ids[i + 1 : close])
            i = close + 1
            if i < len(ids) and ids[i] == self.box:
                close = _find(ids, self.box_end, i)
                found.append((expr, self.codec.parse(ids[i + 1 : close])))
                i = close + 1
            else:
                found.append((expr, None))
        return found

    # --- image → layout -------------------------------------------------------------------------

    def i2l(self) -> tuple[list[int], list[int]]:
        """The ids before and after the image codes in the trunk of an I2L sequence."""
        before = [self.bos, *self._encode(f"{USER}: "), self.begin_image]
        return before, [self.end_image, *self._encode(f" {self.question}\n\n{ASSISTANT}:")]

    def branch(self, expr: str) -> list[int]:
        """The question of one branch, ``<ref>expr</ref><box>``; coordinates follow it.

        Raises LayoutError if the expression is not a line of text or contains a reserved token.
        """
        check_text(expr, "an expression")
        return [self.ref, *self._encode(self._checked(expr, "expr")), self.ref_end, self.box]

    def answer(self, box: Box) -> list[int]:
        """The coordinates of a box and ``</box>``."""
        return [*self._encode(self.codec.text(box)), self.box_end]


def longest_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the most characters of a text that one token can stand for. None where there may be no
    such number: the tokenizer is not a byte-level BPE, so that an unknown word of any length can be
    one token, or it leaves out or replaces a part of the text.

    Its vocabulary spells a token with one letter for each byte, so a token's length is that of its
    bytes, of which a character takes one or more.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, BPE):
        return None
    steps = [step for part in (backend.normalizer, backend.pre_tokenizer) for step in _steps(part)]
    kinds, vocab = {step["type"] for step in steps}, tokenizer.get_vocab()
    whole = (
        "ByteLevel" in kinds
        and kinds <= {"ByteLevel", "Split", "Digits", "Punctuation"}
        and all(step.get("behavior") != "Removed" for step in steps)
        and vocab.keys() >= {*ByteLevel.alphabet()}
        and not backend.model.continuing_subword_prefix
        and not backend.model.end_of_word_suffix
        and not any(t.lstrip or t.rstrip for t in tokenizer.added_tokens_decoder.values())
    )
    return max(map(len, vocab)) if whole else None


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, as in tokenizer.json."""
    if part is None:
        return []
    stated = json.loads(part.__getstate__())
    found: list[dict[str, Any]] = stated.get("normalizers", stated.get("pretokenizers", [stated]))
    return found


def _find(ids: list[int], token: int, start: int) -> int:
    return ids.index(token, start) if token in ids[start:] else len(ids)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids)
    assert isinstance(text, str), "one sequence decodes to one text"
    return text
