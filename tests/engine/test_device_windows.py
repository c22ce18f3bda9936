"""Windows of codes on the GPU operators draw the sequential codes, in as many steps as the plain
windows take. A tape replaces the CUDA graph, as in test_device."""

from __future__ import annotations

import pytest
import torch

from echogen.engine.decoding.decode import decode_image
from echogen.engine.decoding.jacobi import decode_windows
from echogen.engine.decoding.sampler import Sampler, Sampling
from echogen.engine.engine import Engine
from echogen.engine.gpu.graphs import recorder
from echogen.engine.gpu.windows import WindowStep
from echogen.train.data.scenes import load_scenes
from echogen.train.eval.tables import layouts_of

from .devices import GPU
from .tape import Tape, written
from .test_device import (
    CONFIG,
    GROUPS,
    PAD,
    RAGGED,
    SAMPLINGS,
    SHAPES,
    build,
    operators,
    plain_codes,
    prompt,
    rows_of,
    sampler,
)

T = CONFIG.image_tokens


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request):
    return build(**SHAPES[request.param])


def windows(made, prompts, drawer, window, draft="above", progress=None):
    rows = rows_of(prompts, drawer.sampling.guided)
    return decode_windows(made, made.table, rows, drawer, PAD, window, draft, progress)


def same(found, wanted) -> bool:
    ours, plain = ([tuple(map(int, row)) for row in d.drafted] for d in (found, wanted))
    return torch.equal(found.codes, wanted.codes) and (ours, found.steps) == (plain, wanted.steps)


@pytest.mark.parametrize("draft", ["above", "left"])
@pytest.mark.parametrize("window", [1, 3, 8, 20])
@pytest.mark.parametrize("kind", list(SAMPLINGS))
def test_codes_and_steps_are_those_of_plain_windows(model, kind, window, draft):
    made, sampling = operators(model), SAMPLINGS[kind]
    for prompts in (RAGGED, RAGGED[:1], GROUPS):
        drawer = sampler(Sampler, sampling, len(prompts))
        rows = rows_of(prompts, sampling.guided)
        wanted = decode_windows(model, made.table, rows, drawer, PAD, window, draft)
        found = windows(made, prompts, drawer, window, draft)
        assert same(found, wanted)
        assert torch.equal(found.codes, plain_codes(model, prompts, drawer))
    assert made.recorder.recorded == 3 and made.recorder.replayed > 3


def test_drawings_of_other_sizes_share_a_step_and_its_memory(model):
    """Three images run in the step of four, with one row idle, then four and three again; each time
    they are also drawn code by code."""
    made, sampling = operators(model), SAMPLINGS["guided"]
    for images in (3, 4, 3):
        prompts = [prompt(5 + n, n) for n in range(images)]
        drawer = sampler(Sampler, sampling, images)
        wanted = plain_codes(model, prompts, drawer)
        assert torch.equal(windows(made, prompts, drawer, 4).codes, wanted)
        rows = rows_of(prompts, True)
        assert torch.equal(decode_image(made, made.table, rows, drawer, PAD), wanted)
    assert made.recorder.recorded == 2


@pytest.mark.parametrize("options", [{"fp8": True}, {"fp8_cache": True}], ids=["weights", "cache"])
def test_8_bits_draw_what_they_draw_code_by_code(options):
    model = build(width=48, mlp_width=96, head_width=48)
    made = operators(model, **options)
    for kind in ("plain", "guided"):
        drawer = sampler(Sampler, SAMPLINGS[kind], len(RAGGED))
        rows = rows_of(RAGGED, drawer.sampling.guided)
        wanted = decode_image(made, made.table, rows, drawer, PAD)
        assert torch.equal(windows(made, RAGGED, drawer, 4).codes, wanted)


def test_progress_counts_the_image_that_has_the_fewest(model):
    made, told, plain = operators(model), [], []
    drawer = sampler(Sampler, SAMPLINGS["plain"], 3)
    drawn = windows(made, RAGGED, drawer, 4, progress=lambda *counts: told.append(counts))
    assert len(told) == max(drawn.steps)
    assert told == sorted(told) and told[0] == (1, T) and told[-1] == (T, T)
    decode_windows(model, made.table, RAGGED, drawer, PAD, 4, progress=lambda *c: plain.append(c))
    assert told == plain


def test_the_host_asks_only_where_an_image_may_be_done(model, monkeypatch):
    """Until then, steps are launched one after another."""
    made, asked = operators(model), []
    fewest = torch.Tensor.min
    monkeypatch.setattr(torch.Tensor, "min", lambda x: asked.append(1) or fewest(x))
    steps = windows(made, RAGGED[:1], sampler(Sampler, SAMPLINGS["plain"], 1), 2).steps[0] - 1
    assert 0 < len(asked) < steps


def test_an_image_of_one_row_of_codes_is_drawn(model):
    """A row has two codes, and no window is longer than one."""
    small = build(image_tokens=4)
    drawer = Sampler(SAMPLINGS["plain"], 5, torch.arange(2), CONFIG.codebook_size, 4)
    prompts = [prompt(4, 1), prompt(6, 2)]
    made = operators(small)
    wanted = decode_image(small, made.table, prompts, drawer, PAD)
    assert torch.equal(windows(made, prompts, drawer, 16).codes, wanted)


def test_a_layer_of_a_window_is_launched_as_one_of_rows(model):
    """Nothing is launched per code."""
    made = operators(model, Tape())
    windows(made, RAGGED[:1], sampler(Sampler, SAMPLINGS["guided"], 1), 4)
    step = next(s for s, _ in made.steps._held.values())
    assert isinstance(step, WindowStep)
    with torch.inference_mode():
        launches = written(step.run).launches
    assert launches.count("echogen::accept_window") == 1
    assert launches.count("echogen::decode_attention") == CONFIG.layers


def test_the_bundled_model_draws_the_same_codes_in_half_the_steps():
    engine = Engine.from_pretrained("tiny")
    made, c, cfg = operators(engine.transformer), engine.transformer.config, Sampling(cfg=5.0)
    layouts = layouts_of(load_scenes("test", 3), 0)
    rows = engine.prompt_rows(layouts, cfg)
    drawer = Sampler(cfg, 7, torch.arange(3), c.codebook_size, c.image_tokens)
    wanted = decode_image(made, made.table, rows, drawer, engine.prompts.pad)
    found = decode_windows(made, made.table, rows, drawer, engine.prompts.pad, 16)
    assert torch.equal(found.codes, wanted) and max(found.steps) <= c.image_tokens // 2


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(SAMPLINGS))
def test_graphs_draw_the_sequential_codes_on_a_gpu(kind, dtype):
    model = build(dtype, "cuda")
    made = operators(model, recorder(torch.device("cuda")))
    for prompts in (RAGGED, GROUPS):
        drawer = sampler(Sampler, SAMPLINGS[kind], len(prompts), where="cuda")
        rows = rows_of(prompts, drawer.sampling.guided)
        wanted = decode_image(made, made.table, rows, drawer, PAD)
        for window in (1, 4, 8):
            drawn = windows(made, prompts, drawer, window)
            differ = (drawn.codes != wanted).any(1).sum()
            # In bfloat16 another number of rows rounds differently, and one flipped code changes
            # all that follow.
            assert differ <= (0 if dtype == torch.float32 else 1)
            assert drawn.steps == (T - drawn.drafted.sum(1)).tolist()
