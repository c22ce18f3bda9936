"""Drawing several codes a step gives what drawing one code a step gives, to the last code."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from echogen.engine.checkpoints.weights import load_checkpoint
from echogen.engine.cpu.native import NativeTransformer
from echogen.engine.cpu.packed import PackedTransformer, packable
from echogen.engine.cpu.packed_decode import LEAST, PackedDecoding, PackedWindows
from echogen.engine.decoding import jacobi
from echogen.engine.decoding.decode import (
    PlainWindows,
    Windows,
    decode_image,
    left_padded,
    open_windows,
)
from echogen.engine.decoding.jacobi import WindowDrawing, decode_windows
from echogen.engine.decoding.sampler import Sampler, Sampling
from echogen.engine.engine import Engine
from echogen.engine.layout import Layout, LayoutObject
from echogen.engine.model import UnifiedTransformer, additive_mask

BOS, PAD, BEGIN, T = 1, 0, 58, 16
WINDOWS = (1, 3, 8, T + 5)
SETTINGS = {
    "greedy": Sampling(temperature=0),
    "sampled": Sampling(),
    "guided": Sampling(cfg=3.0, temperature=0.5),
    "truncated": Sampling(cfg=2.0, top_k=9, top_p=0.8),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory, janus_config, random_janus) -> UnifiedTransformer:
    port = random_janus(janus_config(num_attention_heads=6, num_key_value_heads=2), seed=20)
    folder = tmp_path_factory.mktemp("checkpoint")
    port.save_pretrained(folder)
    return load_checkpoint(folder).transformer


@pytest.fixture(scope="module")
def packed(model) -> PackedTransformer:
    if not packable(model):
        pytest.skip("oneDNN cannot pack this model here")
    with torch.inference_mode():
        return PackedTransformer(model)


@pytest.fixture(scope="module")
def double(model) -> UnifiedTransformer:
    """The model in float64, where rounding never decides a code, whichever way sums are rounded."""
    return copy.deepcopy(model).double()


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return Engine.from_pretrained("tiny")


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randint(3, BEGIN, (length - 2,), generator=generator).tolist()
    return [BOS, *middle, BEGIN]


def rows_of(lengths: tuple[int, ...], sampling: Sampling) -> list[list[int]]:
    """Prompts, followed by shorter unconditional ones where they are guided."""
    prompts = [prompt(n, seed) for seed, n in enumerate(lengths)]
    return prompts if sampling.cfg == 1 else prompts + [[BOS, PAD, BEGIN]] * len(prompts)


def sampler(model, sampling: Sampling, images: int, seed: int = 3) -> Sampler:
    c = model.config
    return Sampler(sampling, seed, torch.arange(images) + 40, c.codebook_size, c.image_tokens)


def windows(model, lengths, sampling, window, draft="above", **others) -> WindowDrawing:
    table = others.pop("table")
    made = sampler(model, sampling, len(lengths))
    rows = rows_of(lengths, sampling)
    return decode_windows(model, table, rows, made, PAD, window, draft, **others)


def table_of(model: UnifiedTransformer) -> Tensor:
    with torch.no_grad():
        return model.code_table()


# --- the algorithm --------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["above", "left"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("lengths", [(7,), (3, 9, 5)], ids=["one", "ragged"])
def test_codes_are_the_sequential_ones(double, lengths, sampling, window, draft):
    table = table_of(double)
    made = sampler(double, sampling, len(lengths))
    wanted = decode_image(double, table, rows_of(lengths, sampling), made, PAD)
    drawn = windows(double, lengths, sampling, window, draft, table=table)
    assert torch.equal(drawn.codes, wanted)
    assert drawn.codes.shape == drawn.drafted.shape == (len(lengths), T)
    assert drawn.steps == (T - drawn.drafted.sum(1)).tolist()
    if window == 1:
        assert drawn.steps == [T] * len(lengths)
    assert len(wanted.unique()) > 3  # a constant image would prove little


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("lengths", [(7,), (3, 9, 5)], ids=["one", "ragged"])
def test_packed_codes_are_those_of_any_other_window_and_of_float64(
    packed, model, double, lengths, sampling, window
):
    wanted = windows(double, lengths, sampling, 4, table=table_of(double))
    drawn = windows(packed, lengths, sampling, window, table=table_of(model))
    assert torch.equal(drawn.codes, wanted.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_longest_prompt_leaves_room_for_windows(model, dtype):
    """The last code's position is the model's last, and padded windows reach beyond it."""
    weights = copy.deepcopy(model).to(dtype)
    table, longest = table_of(weights), weights.config.max_positions - T
    ids = [prompt(longest, 0), prompt(longest - 7, 1)]
    for rows in (ids[:1], ids):
        made = sampler(model, SETTINGS["greedy"], len(rows))
        wanted = decode_image(weights, table, rows, made, PAD)
        for window in (2, 8):
            drawn = decode_windows(weights, table, rows, made, PAD, window)
            assert torch.equal(drawn.codes, wanted)


LAG = 5


def scripted_code(image: int, before: list[int]) -> int:
    """The code after ``before``: it depends on the code ``LAG`` places back, and on none nearer."""
    back = before[-LAG] if len(before) >= LAG else 11
    return (3 * back + image + len(before)) % 23


class Scripted:
    """A `Windows` without a model, which records what it is asked to run."""

    def __init__(self, images: int) -> None:
        self.held = [[0] * T for _ in range(images)]
        self.calls: list[tuple[list[int], int]] = []

    def _logits(self, image: int, length: int) -> Tensor:
        code = scripted_code(image, self.held[image][:length])
        return torch.nn.functional.one_hot(torch.tensor(code), 24).float()

    def prefill(self) -> Tensor:
        return torch.stack([self._logits(n, 0) for n in range(len(self.held))])

    def window(self, codes: Tensor, first: list[int]) -> Tensor:
        width, logits = codes.shape[1], []
        self.calls.append((first, width))
        for image, (row, at) in enumerate(zip(codes.tolist(), first, strict=True)):
            self.held[image][at : at + width] = row
            logits += [self._logits(image, at + i + 1) for i in range(width)]
        return torch.stack(logits).view(len(first), width, -1)


@pytest.mark.parametrize("window", [1, 2, 5, 8, 64])
def test_what_lies_within_reach_is_drawn_at_once(model, monkeypatch, window):
    """Five codes depend only on known ones: one step samples them, and the next takes them over."""
    scripted, told = Scripted(2), list[tuple[int, int]]()
    monkeypatch.setattr(jacobi, "open_windows", lambda *_: scripted)
    made, prompts = sampler(model, SETTINGS["greedy"], 2), [prompt(4, 0)] * 2
    drawn = decode_windows(
        model, torch.empty(0), prompts, made, PAD, window, "left", lambda *s: told.append(s)
    )
    for image, row in enumerate(drawn.codes.tolist()):
        assert row == [scripted_code(image, row[:p]) for p in range(T)]
    assert max(drawn.steps) == len(scripted.calls) + 1 == len(told)
    assert told[0] == (1, T) and told[-1] == (T, T) and told == sorted(told)
    for first, width in scripted.calls:
        assert 1 <= width <= window and min(first) >= 0 and max(first) + width < T
    if window == 1:
        assert drawn.steps == [T, T] and not drawn.drafted.any()
    if window == LAG:  # one step samples a window, and another takes it over
        assert max(drawn.steps) <= 1 + 2 * -(-(T - 1) // LAG)
    if window > LAG:  # the other one samples further codes meanwhile
        assert max(drawn.steps) <= 2 + -(-(T - 1) // LAG)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"draft": "below"}])
def test_bad_windows_are_refused(model, wrong):
    asked = {"window": 4, "draft": "above"} | wrong
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name} = {value!r}"):
        windows(model, (4,), Sampling(), **asked, table=table_of(model))


# --- the forward of a window ----------------------------------------------------------------------


def opened(model, weights, lengths: tuple[int, ...]) -> Windows:
    """The packed or the plain forward, depending on ``weights``."""
    return open_windows(weights, table_of(model), [prompt(n, n) for n in lengths], PAD, False)


@pytest.mark.parametrize("kind", ["packed", "plain"])
@pytest.mark.parametrize("lengths", [(6, 6), (3, 9)], ids=["even", "ragged"])
@torch.inference_mode()
def test_a_window_is_the_uncached_forward(kind, model, packed, relative_error, lengths):
    """Rows are at different places, slots are overwritten, and windows get wider and narrower."""
    table, prompts = table_of(model), [prompt(n, n) for n in lengths]
    if kind == "packed":
        decoding: Windows = opened(model, packed, lengths)
        assert isinstance(decoding, PackedWindows)
    else:
        decoding = PlainWindows(model, table, *left_padded(prompts, PAD), T)
    decoding.prefill()
    codes = torch.randint(24, (2, T), generator=torch.Generator().manual_seed(1))
    wanted = []
    for ids, row in zip(prompts, codes, strict=True):
        embedded = torch.cat((model.embed_text(torch.tensor(ids)), table[row]))[None]
        length = embedded.shape[1]
        mask = additive_mask(torch.ones(1, length, length).tril().bool(), torch.float32)
        hidden = model(embedded, torch.arange(length), mask)
        wanted.append(model.image_head(hidden[0, len(ids) :]))
    for first, width in (([0, 0], 7), ([5, 2], 6), ([5, 5], 1), ([6, 3], 9), ([12, 7], 3)):
        fed = torch.stack([row[at : at + width] for row, at in zip(codes, first, strict=True)])
        decoding.window((fed + 1) % 24, first)  # a wrong draft, which must leave no trace
        logits = decoding.window(fed, first)
        for n, at in enumerate(first):
            assert relative_error(logits[n], wanted[n][at : at + width]) < 1e-5


@pytest.mark.parametrize("kind", ["packed", "plain"])
@torch.inference_mode()
def test_a_position_sees_nothing_behind_it(kind, model, packed):
    """Other codes at later positions change no bit of an earlier position's logits."""
    generator = torch.Generator().manual_seed(2)
    table = table_of(model)
    ids, pads = left_padded([prompt(5, 0), prompt(8, 1)], PAD)
    for change in range(1, 8):
        codes = torch.randint(24, (2, 8), generator=generator)
        other = codes.clone()
        other[:, change:] = (other[:, change:] + 1 + change) % 24
        found = []
        for fed in (codes, other):
            decoding: Windows = (
                opened(model, packed, (5, 8))
                if kind == "packed"
                else PlainWindows(model, table, ids, pads, T)
            )
            decoding.prefill()
            found.append(decoding.window(fed, [0, 0]))
        assert torch.equal(found[0][:, :change], found[1][:, :change])
        assert not torch.equal(found[0][:, change:], found[1][:, change:])


def rounds_by_neighbours(model: UnifiedTransformer) -> bool:
    """Whether this machine's plain products give a row other bits among another number of rows, or
    at another place among them. In float32, those of torch 2.11 do among 16 or more; in bfloat16,
    those of torch 2.13 on a CPU with AMX, seldom."""
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(5)
    least = LEAST if dtype == torch.float32 else 1
    key = torch.randn(3, 192, 96, generator=generator).to(dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def same(product: Callable[[Tensor], Tensor], x: Tensor) -> bool:
        every = product(x)
        return all(
            torch.equal(product(x[at : at + n]), every[at : at + n])
            for n in range(least, len(x))
            for at in (0, (len(x) - n) // 2, len(x) - n)
        )

    for shape in {m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)}:
        blocked = torch.ops.mkldnn._reorder_linear_weight(random(*shape), 2)

        def linear(x: Tensor, blocked: Tensor = blocked) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, blocked, None, "none", [], "none")

        if not same(linear, random(180, shape[1])):  # of three images, whose windows have up to 60
            return True

    def batched(x: Tensor) -> Tensor:
        return torch.bmm(x.expand(3, *x.shape).contiguous(), key).transpose(0, 1)

    return not same(batched, random(60, 192))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images", [1, 3])
@torch.inference_mode()
def test_packed_logits_are_the_same_bits_at_any_width(tiny, images, dtype):
    """With the bundled model's products, in padded windows and others: from 1 code a step to 60."""
    model = copy.deepcopy(tiny.transformer).to(dtype)
    if not packable(model):
        pytest.skip(f"oneDNN cannot pack {dtype} here")
    if rounds_by_neighbours(model):
        pytest.skip("this machine's libraries round a row by its neighbours")
    weights, table = PackedTransformer(model), table_of(model)
    ids = [[1, *range(20, 20 + 17 * n), 30] for n in range(1, images + 1)]
    codes = torch.randint(1024, (images, 60), generator=torch.Generator().manual_seed(4))
    found = []
    for widths in ([60], [1] * 60, [3, 5, 12, 40], [7, 13, 20, 20], [2, 18, 1, 39]):
        decoding = open_windows(weights, table, ids, 0, False)
        decoding.prefill()
        parts, at = [], 0
        for width in widths:
            parts.append(decoding.window(codes[:, at : at + width], [at] * images).clone())
            at += width
        found.append(torch.cat(parts, 1))
    if dtype == torch.bfloat16:  # where single codes use the same products
        single = PackedDecoding(weights, table, *left_padded(ids, 0), 64, guided=False)
        single.prefill()
        found.append(torch.stack([single.step(code) for code in codes.T], 1))
    for other in found[1:]:
        assert torch.equal(other, found[0])


# --- the bundled model ----------------------------------------------------------------------------

LAYOUTS = [
    Layout("a red circle", (LayoutObject("a red circle", (0.1, 0.2, 0.6, 0.7)),)),
    Layout(
        "a red circle in front of a blue square",
        (
            LayoutObject("a blue square", (0.3, 0.35, 0.8, 0.9)),
            LayoutObject("a red circle", (0.1, 0.2, 0.45, 0.6)),
        ),
    ),
]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.3), Sampling(cfg=5.0)])
def test_the_bundled_model_draws_the_same_in_half_the_steps(tiny, sampling):
    p, c = tiny.prompts, tiny.transformer.config
    for i, layout in enumerate(LAYOUTS):
        wanted = tiny.generate_codes([layout], 7, [i], sampling=sampling, decoding="sequential")
        rows = [p.l2i(layout)]
        if sampling.cfg != 1:
            rows += [p.unconditional(rows[0], sampling.unconditional)]
        made = Sampler(sampling, 7, torch.tensor([i]), c.codebook_size, c.image_tokens)
        drawn = decode_windows(tiny.decoder, tiny._code_table, rows, made, p.pad)
        assert torch.equal(drawn.codes, wanted)
        assert drawn.steps[0] <= 32
        jacobi_codes = tiny.generate_codes([layout], 7, [i], sampling=sampling, decoding="jacobi")
        assert torch.equal(jacobi_codes, wanted)


def test_images_of_a_batch_advance_by_themselves(tiny):
    """Each needs as many steps as it needs alone."""
    p, c, sampling = tiny.prompts, tiny.transformer.config, Sampling(temperature=0.3)

    def drawn(layouts: list[Layout], draws: list[int]) -> WindowDrawing:
        made = Sampler(sampling, 7, torch.tensor(draws), c.codebook_size, c.image_tokens)
        rows = [p.l2i(layout) for layout in layouts]
        return decode_windows(tiny.decoder, tiny._code_table, rows, made, p.pad, 16)

    together = drawn(LAYOUTS, [0, 1])
    for i, layout in enumerate(LAYOUTS):
        alone = drawn([layout], [i])
        assert torch.equal(together.codes[i], alone.codes[0])
        assert together.steps[i] == alone.steps[0]


def test_covered_counts_overlaps_once():
    def of(*boxes: tuple[float, float, float, float]) -> float:
        return jacobi.covered(Layout("x", tuple(LayoutObject("y", box) for box in boxes)))

    assert of((0, 0, 1, 1)) == 1
    assert of((0, 0, 0.5, 0.5), (0.25, 0, 0.75, 0.5)) == pytest.approx(0.375)
    assert of((0.1, 0.2, 0.6, 0.9)) == pytest.approx(0.35, abs=0.02)


def test_few_images_with_free_ground_are_drawn_by_windows(tiny, monkeypatch):
    """This holds by PyTorch's operations. Many images, or a nearly full one, are drawn code by code
    unless windows are asked for; in C++ all images are."""
    in_cpp, tiny = tiny, copy.copy(tiny)
    monkeypatch.setenv("ECHOGEN_NATIVE", "0")
    tiny.refresh()
    called = []
    full = Layout("a red circle", (LayoutObject("a red circle", (0.1, 0.1, 0.9, 0.9)),))

    def spy(name: str, right):
        def call(*arguments, **named):
            called.append(name)
            return right(*arguments, **named)

        monkeypatch.setattr(f"echogen.engine.engine.{name}", call)

    spy("decode_windows", decode_windows)
    spy("decode_image", decode_image)
    many, plain, guided = LAYOUTS * 4, Sampling(), Sampling(cfg=2.0)
    tiny.generate_codes(LAYOUTS[:1])
    tiny.generate_codes(many, sampling=plain)
    tiny.generate_codes(many[:4], sampling=guided)
    tiny.generate_codes([*many, LAYOUTS[0]], sampling=plain)
    tiny.generate_codes(many[:5], sampling=guided)
    tiny.generate(LAYOUTS[0], decoding="sequential")
    tiny.generate_codes([full, LAYOUTS[0]])
    assert called == ["decode_windows"] * 3 + ["decode_image"] * 4
    tiny.generate(full, decoding="jacobi")
    tiny.generate_codes(many + many, decoding="jacobi")
    assert called[7:] == ["decode_windows"] * 2
    assert jacobi.wins(tiny.decoder, torch.bfloat16, [full], guided=True)
    assert not jacobi.wins(tiny.decoder, torch.bfloat16, [*many, full], guided=False)
    assert not jacobi.wins(tiny.transformer, torch.float32, LAYOUTS[:1], guided=False)
    if isinstance(in_cpp.decoder, NativeTransformer):
        assert not jacobi.wins(in_cpp.decoder, torch.float32, LAYOUTS[:1], guided=False)
    with pytest.raises(ValueError, match="decoding = 'fast'"):
        tiny.generate(LAYOUTS[0], decoding="fast")
