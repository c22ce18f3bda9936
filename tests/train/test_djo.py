"""Stage 2: its gradients are those of the plain formula, and its runs repeat themselves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from echogen.engine.checkpoints.weights import CheckpointError
from echogen.engine.config import ModelConfig
from echogen.engine.layout import Layout, LayoutObject
from echogen.engine.model import UnifiedTransformer
from echogen.engine.prompt import LocationCodec, Prompts
from echogen.kernels.philox import gumbel_noise
from echogen.train.config import DJOConfig, LoopConfig
from echogen.train.data import source as sources
from echogen.train.data.packing import i2l_tree, l2i_tree, pack
from echogen.train.run.checkpoint import StateError
from echogen.train.run.loop import run
from echogen.train.stages.djo import DJOStage, Noise, draw_codes, loop_loss, temperature
from echogen.train.stages.passes import hidden_states
from echogen.train.start import load_start
from echogen.train.tokenizer import train_tokenizer

from . import plain
from .runs import rows, run_in_parts

T, V = 9, 20
LAYOUTS = [
    Layout("a red circle, a star", (LayoutObject("a red circle", (0.1, 0.1, 0.5, 0.5)),
                                    LayoutObject("a star", (0.4, 0, 1, 1)))),
    Layout("a star", (LayoutObject("the red star", (0.2, 0.3, 0.4, 0.9)),)),
    Layout("a blue circle", (LayoutObject("a circle", (0, 0, 0.6, 0.6)),)),
]  # fmt: skip


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    tokenizer = train_tokenizer(["a red circle, a star", "the blue star"] * 3, bins=17, merges=20)
    return Prompts(tokenizer, LocationCodec(tokenizer, 17))


@pytest.fixture(scope="module")
def model(prompts: Prompts) -> UnifiedTransformer:
    """Random, no weight zero, in float64."""
    config = ModelConfig(
        vocab_size=len(prompts.tokenizer), codebook_size=V, code_dim=4, width=16, layers=2,
        heads=2, kv_heads=1, head_dim=8, mlp_width=24, head_width=16, aligner_depth=2, pixel_dim=8,
        pixel_aligner_depth=1, rope_theta=1e4, norm_eps=1e-6, image_tokens=T, image_size=24,
        max_positions=256, tied=False,
    )  # fmt: skip
    model = UnifiedTransformer(config)
    model.initialise(0, std=0.3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.double()


CODES = torch.from_numpy(np.random.default_rng(0).integers(V, size=(len(LAYOUTS), T)))
NOISE = Noise(key=7 << 32 | 3, draws=torch.tensor([41, 5, 99]))


def the_loop(model, prompts, tau, frozen=False, given=False) -> Tensor:
    """The loop loss as stage 2 computes it, packed, with the fused operator."""
    vocab = model.config.vocab_size
    trees = [l2i_tree(prompts.l2i(y), z.numpy(), vocab) for y, z in zip(LAYOUTS, CODES)]  # noqa: B905
    batch = pack(trees, prompts.pad)
    hidden = hidden_states(model, batch)
    drawn = draw_codes(model, hidden, batch, tau, NOISE, given, freeze_codes=frozen)
    if given:
        assert torch.equal(drawn.codes, CODES)
        assert torch.equal(drawn.embed, model.code_embedding.weight[CODES])
    unseen = np.zeros(T, dtype=np.int64)
    questions = [[(o.expr, o.box) for o in y.objects] for y in LAYOUTS]
    grounding = pack([i2l_tree(prompts, unseen, q, vocab) for q in questions], prompts.pad)
    return loop_loss(model, grounding, drawn.embed, frozen)


def plain_drawing(w: plain.Weights, c: ModelConfig, prompt: list[int], codes: Tensor) -> Tensor:
    """Logits [T, V] of an image's codes, behind a prompt."""
    image = plain.lifted(w, w["code_embedding.weight"][codes[:-1]])
    x = torch.cat((w["text_embedding.weight"][prompt], image))
    return plain.image_logits(w, plain.hidden(w, c, x)[len(prompt) - 1 :])


def plain_grounding(
    w: plain.Weights, c: ModelConfig, prompts: Prompts, image: Tensor, o: LayoutObject
) -> tuple[Tensor, Tensor]:
    """Logits of the box tokens of an object in an image [T, C], and these tokens."""
    before, after = prompts.i2l()
    answer = prompts.answer(o.box)
    text = w["text_embedding.weight"]
    parts = (
        text[before],
        plain.lifted(w, image),
        text[after + prompts.branch(o.expr) + answer[:-1]],
    )
    x = plain.hidden(w, c, torch.cat(parts))
    return plain.text_logits(w, x[-len(answer) :]), torch.tensor(answer)


def plain_loop(generator, grounder, c, prompts, tau, noise, given=False) -> Tensor:
    """The loop loss in plain autograd: one sequence after another, one-hot vectors, and no code of
    the project but the words of its prompts."""
    losses = []
    for i, layout in enumerate(LAYOUTS):
        noisy = plain_drawing(generator, c, prompts.l2i(layout), CODES[i]) + noise[i]
        soft = (noisy / tau).softmax(-1)
        hard = F.one_hot(CODES[i] if given else noisy.argmax(-1), V).to(soft.dtype)
        y = hard + soft - soft.detach()
        drawn = y @ grounder["code_embedding.weight"]
        for o in layout.objects:
            out, answer = plain_grounding(grounder, c, prompts, drawn, o)
            losses.append(F.cross_entropy(out, answer, reduction="none"))
    return torch.cat(losses).mean()


def test_logits_are_those_of_a_plain_transformer(model, prompts) -> None:
    """Packed, with branches, against one sequence after another."""
    w, c, vocab = dict(model.named_parameters()), model.config, model.config.vocab_size
    drawing = [l2i_tree(prompts.l2i(y), z.numpy(), vocab) for y, z in zip(LAYOUTS, CODES)]  # noqa: B905
    asked = [[(o.expr, o.box) for o in y.objects] for y in LAYOUTS]
    finding = [i2l_tree(prompts, z.numpy(), q, vocab) for q, z in zip(asked, CODES)]  # noqa: B905
    batch = pack(drawing + finding, prompts.pad)
    with torch.no_grad():
        states = hidden_states(model, batch).flatten(0, 1)
        found = model.image_head(states[batch.code_at]), model.text_head(states[batch.text_at])
        images, boxes = [], []
        for layout, codes in zip(LAYOUTS, CODES, strict=True):
            images.append(plain_drawing(w, c, prompts.l2i(layout), codes))
            image = w["code_embedding.weight"][codes]
            boxes += [plain_grounding(w, c, prompts, image, o)[0] for o in layout.objects]
    for ours, theirs in zip(found, (torch.cat(images), torch.cat(boxes)), strict=True):
        assert ours.dtype == torch.float64 and ours.std() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def gradients(model: UnifiedTransformer, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter; zeros where none arrives."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for n, p, g in zip(names, parameters, found, strict=True)
    }


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.375])
def test_gradients_are_those_of_the_plain_formula(model, prompts, tau, frozen, given):
    noise = gumbel_noise(NOISE.key, NOISE.draws[:, None].expand(-1, T), torch.arange(T), V).double()
    loss = the_loop(model, prompts, tau, frozen, given)
    # A frozen grounder is another model with the same weights, which has no gradients.
    generator = dict(model.named_parameters())
    grounder = {k: p.detach() for k, p in generator.items()} if frozen else generator
    wanted = plain_loop(generator, grounder, model.config, prompts, tau, noise, given)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    found, plain = gradients(model, loss), gradients(model, wanted)
    for name, grad in plain.items():
        scale = max(float(grad.norm()), 1e-6)
        assert float((found[name] - grad).norm()) <= 1e-9 * scale, name
    # The generator is reached, and the grounder's own weights only where they are not frozen.
    assert plain["image_head.2.weight"].norm() > 1e-4
    assert bool(found["text_head.weight"].any()) != frozen
    assert bool(found["code_embedding.weight"].any())  # as the generator's input in any case


def test_temperature_falls_exponentially() -> None:
    config = DJOConfig(loop=LoopConfig(steps=11, lr=1e-3), tau_start=1.0, tau_end=0.25)
    taus = [temperature(step, config) for step in range(11)]
    assert taus[0] == 1.0 and taus[-1] == pytest.approx(0.25)
    assert np.allclose(np.diff(np.log(taus)), np.log(0.25) / 10)


@pytest.mark.parametrize(
    "wrong", [{"tau_end": 0.0}, {"loop_weight": -1.0}, {"prefix": "none"}, {"prompt_dropout": 1.0}]
)
def test_settings_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DJOConfig(loop=LoopConfig(steps=1, lr=1e-3), **wrong)


# --- the stage ------------------------------------------------------------------------------------


def stage(pmtp_run: Path, loop: LoopConfig, **settings) -> DJOStage:
    config = DJOConfig(loop=dataclasses.replace(loop, bf16=False), scenes=24, batch=4, **settings)
    return DJOStage(config, load_start(pmtp_run, "pmtp"))


@pytest.mark.usefixtures("small_world")
@pytest.mark.parametrize("prefix", ["teacher", "sampled"])
def test_a_run_resumes_exactly_and_hands_on(tmp_path, pmtp_run, loop, prefix) -> None:
    loop = dataclasses.replace(loop, bf16=False)
    run(stage(pmtp_run, loop, prefix=prefix), loop, tmp_path / "whole")
    run_in_parts(lambda: stage(pmtp_run, loop, prefix=prefix), loop, tmp_path / "parts", 3)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert load_start(tmp_path / "whole", "djo").stages == ("pmtp", "djo")
    assert load_start(tmp_path / "whole" / "model", "djo").stages == ("pmtp", "djo")
    with pytest.raises(StateError, match="comes from stage djo; this stage begins with one from"):
        load_start(tmp_path / "whole", "pmtp")
    assert load_start(tmp_path / "whole", "pmtp", any_stage=True).stages == ("pmtp", "djo")


@pytest.mark.usefixtures("small_world")
def test_a_sampled_prefix_is_taken_as_given_and_none_flips_in_float32(pmtp_run, loop) -> None:
    sampled = stage(pmtp_run, loop, prefix="sampled")
    assert [sampled.loss(step)[1]["flips"] for step in range(3)] == [0.0] * 3


@pytest.mark.usefixtures("small_world")
def test_each_weight_leaves_its_part_out(pmtp_run, loop) -> None:
    _, whole = stage(pmtp_run, loop).loss(0)
    assert whole["loss"] == pytest.approx(whole["l2i"] + whole["i2l"] + whole["loop"], rel=1e-5)
    _, paper = stage(pmtp_run, loop, grounding_weight=0.0, loop_weight=0.5).loss(0)
    assert "i2l" not in paper
    assert paper["loss"] == pytest.approx(paper["l2i"] + 0.5 * paper["loop"], rel=1e-5)
    _, plain = stage(pmtp_run, loop, loop_weight=0.0).loss(0)
    assert "loop" not in plain and plain["l2i"] == pytest.approx(whole["l2i"], rel=1e-5)


@pytest.mark.usefixtures("small_world")
def test_a_run_is_not_resumed_from_another_beginning(tmp_path, pmtp_run, loop) -> None:
    loop = dataclasses.replace(loop, bf16=False, steps=2)
    run(stage(pmtp_run, loop), loop, tmp_path)
    start = load_start(pmtp_run, "pmtp")
    other = DJOStage(stage(pmtp_run, loop).config, dataclasses.replace(start, fingerprint="else"))
    with pytest.raises(StateError, match="another run"):
        run(other, loop, tmp_path, resume=True)


@pytest.mark.usefixtures("small_world")
def test_a_model_of_another_world_is_refused(pmtp_run, loop, monkeypatch) -> None:
    monkeypatch.setattr(sources, "IMAGE_SIZE", 128)
    with pytest.raises(CheckpointError, match="64 pixels a side, those of ShapesWorld 128"):
        stage(pmtp_run, loop)


@pytest.mark.usefixtures("small_world")
def test_an_unfinished_or_unknown_beginning_is_refused(tmp_path, pmtp_run) -> None:
    (tmp_path / "state.pt").write_text("")
    with pytest.raises(StateError, match="no model yet; finish it with --resume"):
        load_start(tmp_path, "pmtp")
    model = tmp_path / "model"
    model.mkdir()
    for file in (pmtp_run / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    assert load_start(tmp_path, "pmtp").stages == ("pmtp",)
    (model / "stage.json").unlink()
    with pytest.raises(StateError, match="names no stage"):
        load_start(tmp_path, "pmtp")
    (model / "stage.json").write_text("[]")
    with pytest.raises(StateError, match="no record of stages"):
        load_start(tmp_path, "pmtp")
