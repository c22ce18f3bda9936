"""A recorded step, run again and again, draws what the plain loop draws.

The step's operators run as their references here, and natively where there is a GPU; a tape
replaces the CUDA graph (`tape.py`)."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from echogen.engine.config import ModelConfig
from echogen.engine.decoding import decode
from echogen.engine.decoding.decode import PlainDecoding, decode_image, left_padded
from echogen.engine.decoding.rollout import RecordingSampler
from echogen.engine.decoding.sampler import Sampler, Sampling
from echogen.engine.engine import Engine, on_operators
from echogen.engine.gpu import device
from echogen.engine.gpu.decode import DeviceDecoding
from echogen.engine.gpu.device import DeviceLinear, DeviceTransformer, Piece, why_not_operators
from echogen.engine.gpu.graphs import CaptureError, Eager, recorder
from echogen.engine.gpu.step import DeviceStep
from echogen.engine.model import UnifiedTransformer
from echogen.engine.serving.slots import Slots
from echogen.kernels.dispatch import recorded
from echogen.kernels.rope import rope, rope_cache, scaled_heads
from echogen.kernels.skinny_linear import fp8_weight

from .devices import GPU
from .tape import Tape, written

BOS, PAD, BEGIN = 1, 0, 58
CONFIG = ModelConfig(
    vocab_size=60, codebook_size=24, code_dim=4, width=48, layers=2, heads=3, kv_heads=3,
    head_dim=16, mlp_width=88, head_width=40, aligner_depth=2, pixel_dim=24, pixel_aligner_depth=2,
    rope_theta=1e4, norm_eps=1e-6, image_tokens=9, image_size=12, max_positions=64, tied=False,
)  # fmt: skip
SHAPES = {"plain": {}, "grouped heads": {"heads": 6, "kv_heads": 2, "head_dim": 8}}
SAMPLINGS = {
    "plain": Sampling(),
    "greedy": Sampling(temperature=0, cfg=4.0),
    "guided": Sampling(cfg=5.0, temperature=0.7),
    "schedule": Sampling(cfg=3.0, cfg_schedule="cosine", cfg_span=(2, 7)),
    "truncated": Sampling(cfg=2.0, top_k=9, top_p=0.8),
}


def build(dtype=torch.float32, where="cpu", **shape) -> UnifiedTransformer:
    """A model in which every weight affects the result."""
    model = UnifiedTransformer(replace(CONFIG, **shape)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1:
                p.copy_(noise if "embedding" in name else noise * p.shape[1] ** -0.5)
            else:
                p.copy_(0.3 * noise + float("norm" in name))
    return model.to(where, dtype)


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request):
    return build(**SHAPES[request.param])


def operators(model, record=None, **options) -> DeviceTransformer:
    with torch.no_grad():
        return DeviceTransformer(model, model.code_table(), record=record or Tape(), **options)


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [BOS, *torch.randint(3, BEGIN, (length - 2,), generator=generator).tolist(), BEGIN]


RAGGED = [prompt(n, seed) for seed, n in enumerate((9, 3, 6))]
GROUPS = [prompt(5, 7)] * 4 + [prompt(8, 8)] * 4 + [prompt(2, 9)]


def rows_of(prompts: list[list[int]], guided: bool) -> list[list[int]]:
    away = [[BOS, *[PAD] * (len(p) - 2), BEGIN] for p in prompts]
    return prompts + away if guided else prompts


def sampler(kind, sampling, images, seed=5, where="cpu"):
    draws = 40 + torch.arange(images, device=where)
    return kind(sampling, seed, draws, CONFIG.codebook_size, CONFIG.image_tokens)


@torch.inference_mode()
def plain_codes(model, prompts, drawer) -> Tensor:
    """Draw with the plain transformer, code by code."""
    rows, table = rows_of(prompts, drawer.sampling.guided), model.code_table()
    ids, pads = (t.to(table.device) for t in left_padded(rows, PAD))
    plain = PlainDecoding(model, table, ids, pads, CONFIG.image_tokens)
    return decode._code_by_code(plain, len(rows), 0, model, drawer, None)


def codes(made, prompts, drawer, share=True, progress=None) -> Tensor:
    rows = rows_of(prompts, drawer.sampling.guided)
    return decode_image(made, made.table, rows, drawer, PAD, progress, share)


# --- logits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["torch", "wide_linear", "skinny_linear"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("prompts", [RAGGED, GROUPS[3:]], ids=["ragged", "groups"])
@torch.inference_mode()
def test_logits_are_those_of_the_plain_loop(
    model, relative_error, monkeypatch, who, dtype, bound, prompts
):
    if who != "skinny_linear":
        monkeypatch.setattr(device, "MAX_ROWS", 0)
    if who == "wide_linear":
        monkeypatch.setenv("ECHOGEN_FUSED", "1")
    model = build(dtype, **{n: getattr(model.config, n) for n in ("heads", "kv_heads", "head_dim")})
    rows = rows_of(prompts, True)
    ids, pads = left_padded(rows, PAD)
    made = operators(model)
    whole = Piece((1 << 20,), dtype)
    made.memory.grow(whole)
    made.memory.views(whole)[0].fill_(float("nan"))  # what was not written must not be read
    both = (
        PlainDecoding(model, model.code_table(), ids, pads, CONFIG.image_tokens),
        DeviceDecoding(made, rows, guided=True),
    )
    wanted, found = (d.prefill() for d in both)
    assert relative_error(found, wanted) < bound
    generator = torch.Generator().manual_seed(1)
    for _ in range(CONFIG.image_tokens - 1):
        code = torch.randint(24, (len(prompts),), generator=generator)
        wanted, found = (d.step(code) for d in both)
        assert relative_error(found, wanted) < bound


@pytest.mark.parametrize("who", ["torch", "wide_linear", "skinny_linear"])
@torch.inference_mode()
def test_weights_in_fp8(relative_error, monkeypatch, who):
    """The products are those of the weights as fp8 holds them, whichever kernel multiplies."""
    if who != "skinny_linear":
        monkeypatch.setattr(device, "MAX_ROWS", 0)
    if who == "torch":
        monkeypatch.setattr(DeviceLinear, "_fits_wide", lambda linear: False)
    shape = {"head_width": 48, "mlp_width": 96}  # multiples of 16
    model, rounded = build(**shape), build(**shape)
    for name, p in rounded.named_parameters():
        if p.dim() == 2 and name.startswith(("blocks.", "image_head.")):
            weight, scale = fp8_weight(p.detach())
            p.copy_(weight.float() * scale[:, None])
    codes_fed = torch.tensor([3, 20, 7])
    logits = []
    for made in (operators(model, fp8=True), operators(rounded)):
        decoding = DeviceDecoding(made, RAGGED, guided=False)
        # Prompts are run with the live weights, which differ between the two.
        decoding.prefill()
        decoding._step.prompts.copy_(torch.full_like(decoding._step.prompts, 0.1))
        logits.append([decoding.step(codes_fed) for _ in range(2)])
    for found, wanted in zip(*logits, strict=True):
        assert relative_error(found, wanted) < 1e-5


# --- drawings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("prompts", [RAGGED, GROUPS], ids=["ragged", "groups"])
def test_a_recorded_step_draws_the_plain_loops_codes(model, name, prompts):
    tape = Tape()
    made, told = operators(model, tape), []
    for seed in (0, 11):
        wanted = plain_codes(model, prompts, sampler(Sampler, SAMPLINGS[name], len(prompts), seed))
        own = sampler(Sampler, SAMPLINGS[name], len(prompts), seed)
        found = codes(made, prompts, own, progress=lambda *done: told.append(done))
        assert torch.equal(found, wanted)
    assert tape.recorded == 1 and tape.replayed == 2 * (CONFIG.image_tokens - 1)
    assert told == 2 * [(i, CONFIG.image_tokens) for i in range(1, CONFIG.image_tokens + 1)]


def test_one_recorded_step_serves_other_prompts_scales_and_seeds(model):
    """All drawings that round up to one shape share a step; it reads the numbers on the device."""
    tape = Tape()
    made = operators(model, tape)
    drawings = [
        (RAGGED, Sampling(cfg=2.0), 1),
        ([prompt(4, 30), prompt(12, 31), prompt(7, 32), prompt(4, 30)], Sampling(cfg=6.0), 2),
        (RAGGED[::-1], Sampling(cfg=4.0, temperature=0.5, cfg_schedule="linear"), 3),
    ]
    for prompts, sampling, seed in drawings:
        wanted = plain_codes(model, prompts, sampler(Sampler, sampling, len(prompts), seed))
        found = codes(made, prompts, sampler(Sampler, sampling, len(prompts), seed))
        assert torch.equal(found, wanted)
    assert tape.recorded == len(made.steps) == 1


def test_autocast_changes_no_step(model):
    """A recorded step could not follow autocast, and is run without it later."""
    made, sampling = operators(model), Sampling(cfg=3.0)
    wanted = codes(operators(model), GROUPS, sampler(Sampler, sampling, 9))
    with torch.autocast("cpu", torch.bfloat16):
        found = [codes(made, GROUPS, sampler(Sampler, sampling, 9))]
    found.append(codes(made, GROUPS, sampler(Sampler, sampling, 9)))
    assert all(torch.equal(codes, wanted) for codes in found)


def test_larger_drawings_take_the_memory_over(model):
    tape, sampling = Tape(), Sampling(cfg=3.0)
    made = operators(model, tape)
    for prompts, held in ((RAGGED[:1], 1), (GROUPS, 1), (RAGGED[:1], 2), (GROUPS, 2)):
        found = codes(made, prompts, sampler(Sampler, sampling, len(prompts)))
        wanted = plain_codes(model, prompts, sampler(Sampler, sampling, len(prompts)))
        assert torch.equal(found, wanted) and len(made.steps) == held
    assert tape.recorded == 3, "the first step stood on memory that was too small for the second"


@pytest.mark.parametrize("name", ["guided", "truncated", "schedule"])
def test_rollouts_keep_what_was_drawn_from(model, name):
    wanted, found = (sampler(RecordingSampler, SAMPLINGS[name], len(GROUPS)) for _ in range(2))
    drawn = plain_codes(model, GROUPS, wanted)
    assert torch.equal(codes(operators(model), GROUPS, found), drawn)
    torch.testing.assert_close(found.logprob, wanted.logprob, rtol=1e-4, atol=1e-4)
    assert (found.kept is None) == (wanted.kept is None)
    assert found.kept is None or torch.equal(found.kept, wanted.kept)


def test_a_sampler_of_its_own_is_asked_code_by_code(model):
    class Second(Sampler):
        def __call__(self, logits: Tensor, step: int) -> Tensor:
            return self.scores(logits, step).topk(2).indices[:, 1]

    tape = Tape()
    sampling = Sampling(cfg=3.0)
    found = codes(operators(model, tape), RAGGED, sampler(Second, sampling, 3))
    assert torch.equal(found, plain_codes(model, RAGGED, sampler(Second, sampling, 3)))
    assert (tape.recorded, tape.replayed) == (0, 0)


@pytest.mark.parametrize("shape", ["the same", "another"])
def test_a_drawing_within_a_drawing_is_refused(model, shape):
    """The two would share the same memory."""
    made, inner = operators(model), RAGGED if shape == "the same" else RAGGED[:1]

    def draws(done: int, steps: int) -> None:
        codes(made, inner, sampler(Sampler, Sampling(), len(inner)))

    for callback in (draws, lambda *_: made.release(), lambda *_: made.refresh(made.table)):
        with pytest.raises(RuntimeError, match="a drawing is under way in this thread"):
            codes(made, RAGGED, sampler(Sampler, Sampling(), 3), progress=callback)
    wanted = plain_codes(model, RAGGED, sampler(Sampler, Sampling(), 3))
    assert torch.equal(codes(made, RAGGED, sampler(Sampler, Sampling(), 3)), wanted)


def test_prompts_are_kept_once_unless_copies_are_asked_for(model):
    made, rows = operators(model), rows_of(GROUPS, True)
    with torch.inference_mode():
        once = DeviceDecoding(made, rows, True)
        assert once.held == 5 + 8 + 2 + 5 + 8  # the shortest equals its unconditional prompt
        assert DeviceDecoding(made, rows, True, share=False).held == 2 * (4 * 5 + 4 * 8 + 2)
    found = codes(made, GROUPS, sampler(Sampler, Sampling(cfg=3.0), 9), share=False)
    assert torch.equal(found, codes(made, GROUPS, sampler(Sampler, Sampling(cfg=3.0), 9)))


def test_rows_of_a_scheduler(model, relative_error):
    """A step for each number of rows is recorded beforehand and replayed, in memory separate from
    that of drawings, some of which are made in between."""
    tape = Tape()
    made, table = operators(model, tape), model.code_table().detach()
    with torch.inference_mode():
        both = [Slots(m, table, 5, 32) for m in (model, made)]
        assert tape.recorded == len({1, 2, 4, 5}) and tape.asked_apart == 1
        rows = [slots.take([slots.prompts.run(p) for p in RAGGED]) for slots in both]
        for code in (3, 21, 9):
            for slots, held in zip(both, rows, strict=True):
                slots.feed(held, torch.tensor([[code], [2], [5]]))
            wanted, found = (slots.step() for slots in both)
            assert relative_error(found[:3], wanted[:3]) < 1e-5
            codes(made, GROUPS, sampler(Sampler, Sampling(), len(GROUPS)))
        for slots, held in zip(both, rows, strict=True):
            slots.release(held)
            slots.feed(slots.take([slots.prompts.run(RAGGED[1])]), torch.tensor([[7]]))
        wanted, found = (slots.step() for slots in both)
        assert found.shape == wanted.shape and relative_error(found, wanted) < 1e-5
    assert tape.recorded == 4 + 1 and tape.replayed >= 4


@pytest.mark.parametrize("fp8_cache", [False, True])
def test_rows_move_with_all_they_hold(model, relative_error, fp8_cache):
    made, table = operators(model, fp8_cache=fp8_cache), model.code_table().detach()
    with torch.inference_mode():
        slots, steps = Slots(made, table, 5, 32), []
        prefixes = [slots.prompts.run(prompt) for prompt in RAGGED]
        for move in (False, True):
            before, held = slots.take(prefixes[:2]), slots.take(prefixes[2:])
            slots.feed(before, torch.tensor([[2], [5]]))
            slots.feed(held, torch.tensor([[7]]))
            slots.step()
            if move:
                slots.release(before)
                held = slots.gather([held])[0]
                assert held.numbers == [0] and slots.free == 4
            slots.feed(held, torch.tensor([[9]]))
            steps.append(slots.step()[held.index])
            if not move:
                slots.release(before)
            slots.release(held)
    assert relative_error(steps[1], steps[0]) < (1e-3 if fp8_cache else 1e-6)


def test_caches_in_fp8_are_recorded_and_smaller():
    model, tape, sampling = build(head_dim=64), Tape(), Sampling(cfg=3.0)
    wide, made = operators(model), operators(model, tape, fp8_cache=True)
    drawn = [sampler(RecordingSampler, sampling, 9) for _ in range(3)]
    for which, drawer in zip((wide, made, made), drawn, strict=True):
        codes(which, GROUPS, drawer)
    exact, first, second = (drawer.logprob for drawer in drawn)
    assert torch.equal(first, second) and not torch.equal(first, exact)
    assert tape.replayed == 2 * (CONFIG.image_tokens - 1)
    # One byte instead of four, and a 4-byte scale for every 64 of them.
    assert made.memory.nbytes == wide.memory.nbytes / 4 * (1 + 4 / 64)


@pytest.mark.parametrize("prompts", [RAGGED, GROUPS[3:]], ids=["ragged", "groups"])
@torch.inference_mode()
def test_caches_in_fp8(model, relative_error, monkeypatch, prompts):
    """Keys and values of prompts and of codes are those that fp8 holds, and near the true ones."""
    rows = rows_of(prompts, True)

    def logits(made):
        made.memory.grow(whole := Piece((1 << 20,), torch.float32))
        made.memory.views(whole)[0].fill_(float("nan"))
        decoding = DeviceDecoding(made, rows, guided=True)
        decoding.prefill()
        fed = ([code % 24] * len(prompts) for code in range(5, 5 + CONFIG.image_tokens - 1))
        return [decoding.step(torch.tensor(codes)) for codes in fed]

    found, exact = logits(operators(model, fp8_cache=True)), logits(operators(model))

    def rounded(x):
        held, scale = scaled_heads(x)
        return held.float() * scale[..., None]

    def write(q, k, v, cos, sin, keys, values, slots, scales):
        turned, none = rope(q, k, cos, sin), (torch.ones_like(cos), torch.zeros_like(sin))
        heads = rounded(turned[1]), rounded(v)
        return rope_cache(turned[0], *heads, *none, keys, values, slots)

    monkeypatch.setattr(device, "rope_cache", write)
    monkeypatch.setattr(
        DeviceStep, "keep_prompts",
        lambda self, first, block, keep=DeviceStep.keep_prompts: keep(self, first, rounded(block)),
    )  # fmt: skip
    for a, b, c in zip(found, logits(operators(model)), exact, strict=True):
        assert relative_error(a, b) < 1e-5
        assert 1e-4 < relative_error(a, c) < 0.1


@torch.inference_mode()
def test_prompts_are_rounded_a_layer_at_a_time():
    """The float32 memory that rounding takes does not grow with the layers."""
    largest = []
    for layers in (2, 3):
        made = operators(build(layers=layers), Eager(), fp8_cache=True)
        step = DeviceDecoding(made, RAGGED, guided=False)._step
        block = torch.zeros(2, layers, 3, CONFIG.kv_heads, 9, CONFIG.head_dim)
        calls = written(lambda step=step, block=block: step.keep_prompts(0, block)).calls
        new = [out for func, *_, out in calls if func._schema.returns[0].alias_info is None]
        largest.append(max(tensor.nbytes for tensor in tree_leaves(new)))
    assert largest[0] == largest[1]


# --- weights that change --------------------------------------------------------------------------


@pytest.mark.parametrize("fp8", [False, True])
def test_refresh_keeps_what_was_recorded(fp8):
    model, tape, sampling = build(head_width=48, mlp_width=96), Tape(), Sampling(cfg=3.0)
    made = operators(model, tape, fp8=fp8)
    before = codes(made, RAGGED, sampler(Sampler, sampling, 3))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(9))
        assert made.refresh(model.code_table())
    after = codes(made, RAGGED, sampler(Sampler, sampling, 3))
    assert torch.equal(
        after, codes(operators(model, fp8=fp8), RAGGED, sampler(Sampler, sampling, 3))
    )
    assert tape.recorded == 1 and not torch.equal(after, before)
    model.blocks[0].qkv.weight = nn.Parameter(model.blocks[0].qkv.weight.clone())
    assert not made.refresh(model.code_table().detach()), "its steps read the old place"


def test_release_gives_the_memory_of_drawings_back():
    made, sampling = operators(build()), Sampling(cfg=3.0)
    before = codes(made, RAGGED, sampler(Sampler, sampling, 3))
    assert made.memory.nbytes and len(made.steps) == 1
    made.release()
    assert not made.memory.nbytes and not len(made.steps)
    assert torch.equal(codes(made, RAGGED, sampler(Sampler, sampling, 3)), before)


@pytest.mark.parametrize("moved", [False, True], ids=["release", "weights moved"])
def test_an_engine_leaves_no_memory_behind(moved):
    """Memory is freed at once, not when Python next looks for cycles: what follows may need as
    much again."""
    engine = Engine.from_pretrained("tiny")
    engine._decoder = operators(engine.transformer, Eager())
    with torch.inference_mode():
        DeviceDecoding(engine.decoder, [[1, 2]], guided=False)
    held = StorageWeakRef(engine.decoder.memory._held.untyped_storage())
    norm = engine.transformer.norm
    gc.disable()
    try:
        if moved:
            norm.weight = nn.Parameter(norm.weight.detach().clone())
            engine.refresh()
        else:
            engine.release()
        assert held.expired()
    finally:
        gc.enable()


def test_a_seed_that_is_no_key_is_refused_as_elsewhere():
    made = operators(build(), Eager())
    with pytest.raises(ValueError, match="seed = -1; it must be in 0"):
        codes(made, RAGGED, sampler(Sampler, Sampling(), 3, seed=-1))


# --- what a step is made of -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "fused", "fp8", "most"),
    [(8, "0", False, 7), (9, "0", False, 10), (9, "1", False, 7), (9, "0", True, 7)],
    ids=["16 rows", "more rows", "more rows, fused", "more rows, fp8"],
)
@torch.inference_mode()
def test_launches_a_layer(images, fused, fp8, most, monkeypatch):
    """The numbers are those in the module's docstring, with guidance and shared prefixes: the
    project's kernels as they would be launched, and torch's products."""
    monkeypatch.setenv("ECHOGEN_FUSED", fused)
    counted = []
    for layers in (2, 3):
        model = build(torch.bfloat16, layers=layers, head_width=48, mlp_width=96)
        made = operators(model, Eager(), fp8=fp8, fp8_cache=fp8)
        decoding = DeviceDecoding(made, rows_of([prompt(5, 1)] * images, True), guided=True)
        with recorded() as kernels:
            calls = written(decoding._step.layers).launches
        torch_calls = [name for name in calls if not name.startswith("echogen::")]
        counted.append(len(kernels) + len(torch_calls))
    assert counted[1] - counted[0] == most


class OnCuda(Tensor):
    device = property(lambda self: torch.device("cuda", 0))


def test_what_does_not_fit_runs_on_plain_torch_and_says_why(monkeypatch):
    monkeypatch.setattr("echogen.engine.engine.packed", lambda model: model)
    assert why_not_operators(build()) is None
    there = torch.zeros(1).as_subclass(OnCuda)
    for change, why in [
        (lambda m: m.double(), "its weights are torch.float64"),
        (lambda m: m.blocks[1].out.half(), r"blocks\.1\.out\.weight is torch\.float16"),
        (lambda m: m.blocks[0].__setattr__("down", nn.Sequential(m.blocks[0].down)),
         r"blocks\.0\.down is a Sequential"),
        (lambda m: m.image_head.__setitem__(1, nn.SiLU()), "its image head is not"),
    ]:  # fmt: skip
        model = build()
        change(model)
        with pytest.warns(UserWarning, match=f"plain torch: {why}"):
            assert on_operators(model, there) is model
    with pytest.warns(UserWarning, match="its head_dim is 136; the operators take up to 128"):
        on_operators(build(heads=1, kv_heads=1, head_dim=136), there)
    assert isinstance(on_operators(build(), torch.zeros(1)), UnifiedTransformer)  # no GPU


def test_8_bits_are_refused_where_nothing_multiplies_by_them(monkeypatch):
    with pytest.raises(ValueError, match=r"fp8 on cpu: .* leave fp8 out, or load"):
        Engine.from_pretrained("tiny", fp8=True)
    with pytest.raises(ValueError, match=r"fp8 and fp8_cache on cpu: .* leave fp8 and fp8_cache"):
        Engine.from_pretrained("tiny", fp8=True, fp8_cache=True)
    there = torch.zeros(1).as_subclass(OnCuda)
    with pytest.raises(ValueError, match=r"its weights are torch\.float64.*leave fp8 out"):
        on_operators(build().double(), there, fp8=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"capability 8\.0: it takes 8\.9"):
        on_operators(build(), there, fp8_cache=True)


# --- on a GPU -------------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("prompts", [RAGGED, GROUPS], ids=["ragged", "groups"])
def test_graphs_draw_what_eager_steps_draw(dtype, name, prompts):
    model = build(dtype, "cuda")
    drawn = []
    for record in (recorder(torch.device("cuda", 0)), Eager()):
        made = operators(model, record)
        for seed in (0, 11):
            drawer = sampler(RecordingSampler, SAMPLINGS[name], len(prompts), seed, "cuda")
            drawn.append((codes(made, prompts, drawer), drawer.logprob))
    for graph, eager in zip(drawn[:2], drawn[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(graph, eager, strict=True))


@GPU
@pytest.mark.parametrize("fp8", [False, True])
def test_graphs_draw_from_caches_in_fp8_what_eager_steps_draw(fp8):
    model, drawn = build(torch.bfloat16, "cuda", head_width=48, mlp_width=96), []
    for record in (recorder(torch.device("cuda", 0)), Eager()):
        made = operators(model, record, fp8=fp8, fp8_cache=True)
        drawer = sampler(RecordingSampler, SAMPLINGS["guided"], len(GROUPS), 3, "cuda")
        drawn.append((codes(made, GROUPS, drawer), drawer.logprob))
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


@GPU
@pytest.mark.parametrize("name", SAMPLINGS)
def test_graphs_draw_the_plain_loops_codes(name):
    model = build(torch.float32, "cuda")
    made = operators(model, recorder(torch.device("cuda", 0)))
    wanted = plain_codes(model, GROUPS, sampler(Sampler, SAMPLINGS[name], 9, where="cuda"))
    found = codes(made, GROUPS, sampler(Sampler, SAMPLINGS[name], 9, where="cuda"))
    assert torch.equal(found, wanted)


@GPU
def test_a_step_that_waits_is_refused_on_a_gpu_and_others_are_recorded():
    record = recorder(torch.device("cuda", 0)).record
    held, stream = torch.zeros(1, device="cuda"), torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(CaptureError, match="ECHOGEN_EAGER=1"):
            record(lambda: held.fill_(held.item() + 1))
        assert torch.cuda.current_stream() == stream
        torch.cuda.empty_cache()
        run = record(lambda: held.add_(1))
        held.zero_()
        run()
        assert held.item() == 1


@GPU
@torch.inference_mode()
def test_release_gives_a_gpus_memory_back():
    model = build(torch.bfloat16, "cuda")
    made = operators(model, recorder(torch.device("cuda", 0)))
    found, held = [], []
    for _ in range(3):
        drawer = sampler(Sampler, SAMPLINGS["guided"], len(GROUPS), where="cuda")
        found.append(codes(made, GROUPS, drawer))
        made.release()
        held.append(torch.cuda.memory_reserved())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert held[2] <= held[1] and not made.memory.nbytes
