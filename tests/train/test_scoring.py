"""What samples is what is scored: the trainer's log-probabilities are the sampler's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from echogen.engine import ground
from echogen.engine.decoding.rollout import kept_codes
from echogen.engine.decoding.sampler import Sampler, Sampling
from echogen.kernels.sampling import cfg_sample
from echogen.train.stages import scoring
from echogen.train.stages.cycle_rl import CycleRLStage
from echogen.train.stages.scoring import image_logprob

pytestmark = pytest.mark.usefixtures("small_world")


def plain_box_logprob(
    stage: CycleRLStage, hidden, expr: str, codes: Tensor, tokens: list[int]
) -> Tensor:
    """Log-probabilities [4] of a box's tokens among those that the grammar allows."""
    before, after = stage.prompts.i2l()
    image = (codes + stage.module.config.vocab_size).tolist()
    ids = before + image + after + stage.prompts.branch(expr) + tokens[:-1]
    logits = stage.module.text_head(hidden(stage, ids)[-4:])
    allowed = [stage.prompts.codec.allowed(tuple(tokens[:i])) for i in range(4)]
    steps = zip(logits, tokens, allowed, strict=True)
    return torch.stack([x[t] - x[a].logsumexp(-1) for x, t, a in steps])


SAMPLINGS = {
    "plain": Sampling(),
    "cool": Sampling(temperature=0.6),
    "guided": Sampling(cfg=3.0),
    "guided, empty layout": Sampling(cfg=3.0, unconditional="empty", temperature=1.3),
    "top-k": Sampling(top_k=5),
    "top-p": Sampling(top_p=0.7),
    "all": Sampling(cfg=3.0, top_k=9, top_p=0.8, temperature=0.8),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_what_samples_is_what_is_scored(rl_stage, plain_image_logprob, name) -> None:
    sampling = SAMPLINGS[name]
    rl = rl_stage(sampling=sampling, beta=0.0)
    held = rl._hold(0)
    drawing = held.rollout.drawing
    scored = rl.logprob(rl.module, held)
    assert torch.allclose(scored, held.sampled, atol=2e-5, rtol=0), name
    assert rl.loss(0)[1]["sampler_gap"] < 5e-6
    with torch.no_grad():
        for row in (0, 5):
            layout = held.rollout.layouts[row // 4]
            wanted = plain_image_logprob(rl, layout, drawing.codes[row], sampling)
            assert torch.allclose(scored[row].detach(), wanted, atol=2e-5, rtol=0)
    # It matters which distribution: the untruncated, unguided one says something else.
    if name != "plain":
        other = rl_stage()
        bare = dataclasses.replace(
            held, unconditional=None,
            rollout=dataclasses.replace(held.rollout, drawing=drawing._replace(kept=None)),
        )  # fmt: skip
        assert (other.logprob(rl.module, bare) - held.sampled).abs().mean() > 0.01


TIES = torch.tensor([2.0, 1, 1, 1, 0])


@pytest.mark.parametrize("spare", [(), (3,)])  # at one position, and at several at once
@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(0, 0.6, 4), (2, 1.0, 4), (0, 0.4, 1), (2, 0.6, 4), (1, 0.9, 1), (5, 1.0, 5), (9, 0.98, 5)],
)
def test_codes_equal_to_the_last_one_kept_are_kept_by_all(top_k, top_p, kept, spare) -> None:
    """The engine, its recorder and `cfg_sample` cut the same distribution off at the same place."""
    scores = TIES.log_softmax(-1).expand(2, *spare, 5)
    cut = Sampler(Sampling(top_k=top_k, top_p=top_p), 0, torch.arange(2), 5, 4).scores(scores)
    assert torch.equal(cut > float("-inf"), (torch.arange(5) < kept).expand_as(cut))
    assert torch.equal(cut[cut > float("-inf")], scores[cut > float("-inf")])
    rows = TIES.expand(2000, 5).contiguous()
    assert kept_codes(rows, top_k, top_p).eq(kept).all()
    ids, place = torch.arange(2000), torch.zeros(2000, dtype=torch.int64)
    drawn = cfg_sample(rows, 0, ids, place, top_k=top_k, top_p=top_p)
    assert drawn.token.unique().tolist() == list(range(kept))
    wanted = TIES[:kept].log_softmax(-1)[drawn.token]
    assert torch.allclose(drawn.logprob, wanted, atol=1e-6, rtol=0)


def test_rollouts_in_bfloat16_follow_the_weights_in_float32(rl_stage) -> None:
    rl = rl_stage(rollout_dtype="bfloat16")

    def rounded() -> bool:
        pairs = zip(rl.engine.transformer.parameters(), rl.module.parameters(), strict=True)
        return all(torch.equal(copy, trained.bfloat16()) for copy, trained in pairs)

    held = rl._hold(0)
    assert rounded() and all(p.dtype == torch.float32 for p in rl.module.parameters())
    codes = [held.rollout.drawing.codes]
    rl.loss(0)[0].backward()
    with torch.no_grad():
        for p in rl.module.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad.sign()
    assert not rounded(), "what is drawn with is a copy"
    codes.append(rl._hold(1).rollout.drawing.codes)
    assert rounded() and not torch.equal(*codes)
    # It is near: the trainer, in float32, finds what was drawn as likely as the sampler did.
    again = rl_stage(wild=False, rollout_dtype="bfloat16")
    assert again.loss(0)[1]["sampler_gap"] < 0.05


def test_rollouts_draw_what_the_engine_draws(rl_stage) -> None:
    rl = rl_stage(sampling=SAMPLINGS["all"], beta=0.0)
    held = rl._hold(0)
    repeated = [y for y in held.rollout.layouts for _ in range(4)]
    codes = rl.engine.generate_codes(repeated, rl._key, list(range(8)), sampling=SAMPLINGS["all"])
    assert torch.equal(codes, held.rollout.drawing.codes)
    boxes = rl.engine.ground_codes(codes, [[o.expr for o in y.objects] for y in repeated])
    for row, tokens in zip(boxes, held.rollout.answers.tokens.tolist(), strict=True):
        assert [rl.prompts.codec.parse(t) for t in tokens[: len(row)]] == row


def test_sampled_boxes_are_scored_under_the_grammar(rl_stage, plain_hidden, monkeypatch) -> None:
    rl, widths = rl_stage(policy="both", batch=3), set[int]()

    def constrained(logits, *rest):
        widths.add(logits.shape[-1])
        return ground.constrained(logits, *rest)

    monkeypatch.setattr(scoring, "constrained", constrained)
    held = rl._hold(1)
    rollout, scored = held.rollout, rl.logprob(rl.module, held)
    assert widths == {len(rl.prompts.codec.ids)}, "of the text head only location tokens"
    assert len({len(y.objects) for y in rollout.layouts}) > 1  # some are padded
    images = rl.module.config.image_tokens
    there = rollout.mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(held.mask[:, images:], there)
    assert torch.allclose(scored[held.mask], held.sampled[held.mask], atol=2e-5, rtol=0)
    assert len({tuple(t) for t in rollout.answers.tokens[:4, 0].tolist()}) > 1  # drawn, not chosen
    with torch.no_grad():
        for row in range(12):
            for k, o in enumerate(rollout.layouts[row // 4].objects):
                tokens = rollout.answers.tokens[row, k].tolist()
                codes = rollout.drawing.codes[row]
                wanted = plain_box_logprob(rl, plain_hidden, o.expr, codes, tokens)
                found = scored[row, images + 4 * k : images + 4 * k + 4]
                assert torch.allclose(found, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(cfg=3.0, cfg_schedule="linear"), Sampling(cfg=3.0, cfg_span=(0, 32))],
    ids=["linear", "span"],
)
def test_images_drawn_at_a_scale_that_changes_are_not_scored(rl_stage, sampling) -> None:
    """They would be scored at another scale; where boxes alone are reinforced nothing is scored."""
    with pytest.raises(ValueError, match=r"cfg_schedule.*one guidance scale.*policy = 'boxes'"):
        rl_stage(sampling=sampling)
    rl = rl_stage(sampling=sampling, policy="boxes")
    assert rl.loss(0)[1]["sampler_gap"] < 5e-6
    held = rl_stage()._hold(0)
    with pytest.raises(ValueError, match="one guidance scale"):
        image_logprob(rl.module, held.drawn, None, 8, sampling)
