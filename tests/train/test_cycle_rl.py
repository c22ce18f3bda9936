"""Stage 3: a better match is reinforced, as GRPO's definition says, and runs repeat."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from echogen.engine.decoding.rollout import ground
from echogen.engine.decoding.sampler import Sampling
from echogen.engine.ground import locations
from echogen.engine.layout import LayoutError
from echogen.engine.prompt import PromptError, TextualCodec
from echogen.kernels.group_advantage import group_advantage
from echogen.train.config import CycleRLConfig, LoopConfig, differences, to_json
from echogen.train.data.rows import cheapest
from echogen.train.data.scenes import load_scenes
from echogen.train.eval import agreement
from echogen.train.eval.agreement import Agreement, within_groups
from echogen.train.eval.judge import box_iou
from echogen.train.eval.tables import layouts_of
from echogen.train.run.loop import BeginRefused, run
from echogen.train.stages import cycle_rl, keys
from echogen.train.stages.credit import by_image
from echogen.train.stages.cycle_rl import CycleRLStage, Held
from echogen.train.stages.rollouts import roll_out
from echogen.train.start import load_start

from .runs import rows, run_in_parts

pytestmark = pytest.mark.usefixtures("small_world")


GUIDED = Sampling(cfg=3.0, top_k=9, top_p=0.8, temperature=0.8)


# --- the loss -------------------------------------------------------------------------------------


def gradients(stage: CycleRLStage, loss: Tensor) -> dict[str, Tensor]:
    trained = [(n, p) for n, p in stage.module.named_parameters() if p.requires_grad]
    names, parameters = zip(*trained, strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def by_hand(stage: CycleRLStage, held: Held, logp: Tensor, old: Tensor, ref: Tensor) -> Tensor:
    """GRPO from its definition, sample by sample: advantage, clipped ratio, k3."""
    c, rewards = stage.config, held.rollout.score.reward.double()
    total = 0.0
    for n in range(len(logp)):
        group = rewards[n // c.group]
        a = float((group[n % c.group] - group.mean()) / (group.std(correction=0) + 1e-6))
        ratio = (logp[n] - old[n]).exp()
        gain = torch.minimum(ratio * a, ratio.clamp(1 - c.clip_low, 1 + c.clip_high) * a)
        k3 = (ref[n] - logp[n]).exp() - (ref[n] - logp[n]) - 1
        total = total + (c.beta * k3 - gain).mean()
    return total / len(logp)


def test_a_step_computed_by_hand(rl_stage, plain_image_logprob) -> None:
    rl = rl_stage(beta=0.5, updates=2)
    with torch.no_grad():  # a reference that differs
        for p in rl._reference.parameters():
            p.mul_(1.02)
    optimizer = torch.optim.SGD(rl.module.parameters(), lr=2.0)
    first: Tensor | None = None
    for step in range(2):
        held = rl._hold(step)
        layouts = [y for y in held.rollout.layouts for _ in range(4)]

        def plain(layouts=layouts, held=held) -> Tensor:
            rows = zip(layouts, held.rollout.drawing.codes, strict=True)
            return torch.stack([plain_image_logprob(rl, y, z, Sampling()) for y, z in rows])

        with torch.no_grad():
            trained, rl.module = rl.module, rl._reference
            reference = plain()
            rl.module = trained
        logp = plain()
        first = logp.detach() if first is None else first
        wanted = by_hand(rl, held, logp, first, reference)
        loss, numbers = rl.loss(step)
        assert float(loss.detach()) == pytest.approx(float(wanted.detach()), abs=1e-5)
        found, plain_grads = gradients(rl, loss), gradients(rl, wanted)
        for name, grad in plain_grads.items():
            assert (found[name] - grad).norm() <= 2e-3 * grad.norm() + 1e-7, name
        assert numbers["kl"] > 1e-4
        optimizer.zero_grad()
        rl.loss(step)[0].backward()
        optimizer.step()
    assert float((logp.detach() - first).abs().max()) > 0.05  # the second ratio was not 1


@pytest.mark.parametrize("credit", ["image", "object"])
def test_a_constant_is_one_whatever_the_objects(rl_stage, credit) -> None:
    rl = rl_stage(beta=0.0, normalise="constant", credit=credit)
    found = gradients(rl, rl.loss(0)[0])
    held = rl._hold(0)
    images, tokens = held.rollout.drawing.codes.shape
    image, mask, advantage, _ = held.credit
    gain = (rl.logprob(rl.module, held)[image] * mask * advantage[:, None]).sum()
    wanted = gradients(rl, -gain / (images * tokens))  # the gradient at a ratio of 1
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-3
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("cap", "apart", "weight", "capped"),
    [(2.0, math.log(2), 0.5, 0), (2.0, -1.0, 2.0, 1), (9.0, -1.0, math.e, 0), (None, 3, 1, 0)],
)
@pytest.mark.parametrize("settings", [{}, {"policy": "both"}, {"updates": 2}])
def test_what_the_sampler_draws_too_often_counts_less(
    rl_stage, cap, apart, weight, capped, settings
) -> None:
    """A sampler whose log-probabilities are ``apart`` from the trainer's, in every update."""
    rl = rl_stage(beta=0.0, importance_cap=cap, **settings)
    held = rl._hold(0)
    loss, numbers = rl.loss(0)
    before = gradients(rl, loss)
    assert numbers["capped"] == 0
    held.sampled = held.sampled + apart
    for step in range(rl.config.updates):
        loss, numbers = rl.loss(step)
        assert float(numbers["capped"]) == pytest.approx(capped)
        for name, grad in gradients(rl, loss).items():
            torch.testing.assert_close(grad, weight * before[name], rtol=1e-4, atol=1e-7)


def test_a_run_of_before_there_were_weights_is_another(rl_stage) -> None:
    """Recorded without the setting it had none, and is not gone on with as if it had."""
    plain, weighted = (to_json(rl_stage(importance_cap=cap).config) for cap in (None, 2.0))
    assert "importance_cap" not in plain
    assert differences(plain, weighted) == ["importance_cap None → 2.0"]
    assert to_json(CycleRLConfig(loop=LoopConfig(steps=1, lr=1e-4)))["importance_cap"] == 2.0


@pytest.mark.parametrize("prompt", [25, 60, 94])
def test_little_of_a_group_at_janus_size_is_padding(rl_stage, prompt) -> None:
    batch = rl_stage()._sequences([list(range(prompt))], np.zeros((8, 576), np.int64))
    lengths = batch.tree[batch.tree >= 0].bincount().tolist()
    assert sum(lengths) - len(lengths) * (prompt - 1) == 8 * 576 == len(batch.code_at)
    rows, length = cheapest(lengths, blocks=True)
    assert sum(lengths) > 0.95 * len(rows) * length


def test_the_reference_is_scored_once_a_rollout(rl_stage, monkeypatch) -> None:
    rl = rl_stage(beta=0.5, updates=2)
    scored: list[bool] = []
    whole = rl.logprob

    def counted(model, held: Held) -> Tensor:
        scored.append(model is rl._reference)
        return whole(model, held)

    monkeypatch.setattr(rl, "logprob", counted)
    for step in range(6):
        rl.loss(step)
    assert (scored.count(True), scored.count(False)) == (3, 6)


def test_a_better_match_is_made_more_likely(rl_stage) -> None:
    """The sign: reward falls with the discrepancy, and a step raises what was rewarded."""
    rl = rl_stage(beta=0.0, group=8)
    held = rl._hold(0)
    score = held.rollout.score
    assert not score.flat.any()
    for b, layout in enumerate(held.rollout.layouts):
        k = len(layout.objects)
        match = score.iou[b, :, :k].mean(1) - score.l1[b, :, :k].mean(1)
        assert torch.equal(match.argsort(), score.reward[b].argsort())
        assert score.advantage[b, match.argmax()] == score.advantage[b].max() > 0
    before = rl.logprob(rl.module, held).mean(1).detach()
    optimizer = torch.optim.SGD(rl.module.parameters(), lr=0.05)
    rl.loss(0)[0].backward()
    optimizer.step()
    change = rl.logprob(rl.module, held).mean(1).detach() - before
    assert float((change * score.advantage.flatten()).sum()) > 0


def test_groups_without_variance_teach_nothing(rl_stage) -> None:
    """Two groups of images that differ, whose rewards are set to be equal; then one is not."""
    rl = rl_stage(beta=0.0)
    held, reward = rl._hold(0), torch.full((2, 4), 0.25)
    assert len(held.rollout.drawing.codes.unique(dim=0)) == 8

    def learnt() -> tuple[list[Tensor], dict[str, float]]:
        told = group_advantage(reward)
        score = held.rollout.score._replace(reward=reward, advantage=told.advantage, flat=told.flat)
        held.rollout = dataclasses.replace(held.rollout, score=score)
        held.credit = by_image(score, held.mask)
        loss, numbers = rl.loss(0)
        return list(gradients(rl, loss).values()), numbers

    grads, numbers = learnt()
    assert numbers["flat"] == 1.0 and numbers["spread"] == 0.0
    assert grads and all(not g.any() for g in grads)
    reward[1, 2] += 0.5
    grads, numbers = learnt()
    assert numbers["flat"] == 0.5 and numbers["spread"] > 0
    assert any(g.any() for g in grads)


@pytest.mark.parametrize(("w_iou", "w_l1"), [(1.0, 0.0), (0.2, 1.5)])
def test_the_reward_validated_is_the_reward_trained(rl_stage, w_iou, w_l1) -> None:
    """Written out from its definition, on the boxes found in the evaluation's own images."""
    rl = rl_stage(w_iou=w_iou, w_l1=w_l1, val_drawings=3)
    found = rl.evaluate()
    assert rl.engine._decoder is None, "what drew so many images at once is not kept for training"
    scenes = load_scenes("val", cycle_rl.VAL_LAYOUTS)
    layouts, draws = 3 * layouts_of(scenes, 0), list(range(3 * len(scenes)))
    key = keys.noise_key(0, keys.RL_JUDGED)
    codes = rl.engine.generate_codes(layouts, key, draws, sampling=rl.config.sampling)
    boxes = rl.engine.ground_codes(codes, [[o.expr for o in y.objects] for y in layouts])
    rewards = []
    for layout, row in zip(layouts, boxes, strict=True):
        pairs = list(zip(row, layout.objects, strict=True))
        short = [1 - box_iou(b, o.box) for b, o in pairs]
        away = [np.abs(np.subtract(b, o.box)).mean() for b, o in pairs]
        rewards.append(1 - np.mean(w_iou * np.array(short) + w_l1 * np.array(away)))
    assert found["reward"] == pytest.approx(np.mean(rewards), abs=1e-5)


def test_a_reward_of_several_boxes_is_their_mean(rl_stage) -> None:
    engine, boxes = rl_stage().engine, 3
    layouts = layouts_of(load_scenes("val", 8), 0)[:4]
    assert len({len(y.objects) for y in layouts}) > 1
    draws = torch.arange(8) + 40
    out = roll_out(engine, layouts, group=2, sampling=Sampling(), key=5, draws=draws, boxes=boxes)
    asked = [[o.expr for o in y.objects for _ in range(boxes)] for y in layouts for _ in range(2)]
    tokens = ground(engine, out.drawing.codes, asked, (5, draws)).tokens
    first, bins = locations(engine.prompts)
    several = 0
    for n, layout in enumerate(y for y in layouts for _ in range(2)):
        found = ((tokens[n] - first) / (bins - 1)).double().view(-1, boxes, 4)
        several += bool((found != found[:, :1]).any())
        rows = []
        for answers, o in zip(found.tolist(), layout.objects, strict=False):
            rows.append((np.mean([box_iou(tuple(b), o.box) for b in answers]),
                         np.abs(np.subtract(answers, o.box)).mean()))  # fmt: skip
        iou, l1 = np.array(rows).T
        at = n // 2, n % 2
        np.testing.assert_allclose(out.score.iou[at][: len(rows)], iou, atol=1e-5)
        np.testing.assert_allclose(out.score.l1[at][: len(rows)], l1, atol=1e-5)
        assert float(out.score.reward[at]) == pytest.approx(1 - np.mean(1 - iou + l1) / 2, abs=1e-5)
        assert torch.equal(out.answers.tokens[n, : len(rows)], tokens[n, ::boxes][: len(rows)])
    assert several, "the boxes of an object are drawn with noise of their own"


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"layouts": "random"},
        {"policy": "both", "updates": 2},
        {"sampling": GUIDED, "beta": 0.0},
        {"rollout_dtype": "bfloat16"},
        {"reward_boxes": 2, "credit": "object"},
    ],
)
def test_a_run_resumes_exactly(tmp_path, rl_stage, settings) -> None:
    def fresh() -> CycleRLStage:
        return rl_stage(wild=False, force=True, **settings)

    run(fresh(), fresh().config.loop, tmp_path / "whole")
    run_in_parts(fresh, fresh().config.loop, tmp_path / "parts", 3)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    steps = [r for r in rows(tmp_path / "whole") if "reward" in r]
    most = 0.05 if "rollout_dtype" in settings else 1e-5
    assert len(steps) == 6 and all(r["sampler_gap"] < most for r in steps)
    *_, last, chosen = rows(tmp_path / "whole")
    seen = {r["step"]: r["val_cycle_iou"] for r in rows(tmp_path / "whole") if "val_l2i" in r}
    best = max(seen, key=lambda step: seen[step])
    assert list(seen) == [0, 6] and last["step"] == 6
    assert (chosen["chosen_step"], chosen["chosen_cycle_iou"]) == (best, seen[best])
    assert {"val_gap", "val_reward", "val_self_iou", "val_cycle_iou"} <= set(last)
    assert last["val_gap"] == pytest.approx(last["val_self_iou"] - last["val_cycle_iou"], abs=1e-4)
    assert load_start(tmp_path / "whole", "cycle-rl").stages == ("pmtp", "cycle-rl")


def test_the_last_weights_are_left_where_asked_for(tmp_path, rl_stage, monkeypatch) -> None:
    falling = iter(range(9, 0, -1))
    usual = CycleRLStage.evaluate
    monkeypatch.setattr(
        CycleRLStage, "evaluate", lambda rl: usual(rl) | {"cycle_iou": next(falling) / 10}
    )
    left = {}
    for export in ("best", "last"):
        rl = rl_stage(force=True, export=export)
        run(rl, dataclasses.replace(rl.config.loop, eval_every=2), tmp_path / export)
        left[export] = load_start(tmp_path / export, "cycle-rl").engine.transformer.state_dict()
    assert rows(tmp_path / "best")[-1]["chosen_step"] == 0
    assert not (tmp_path / "last/best.pt").exists()
    name = "blocks.0.qkv.weight"
    assert not torch.equal(left["best"][name], left["last"][name])
    last = rl.module.state_dict()[name].bfloat16().float()  # as models are written
    assert torch.equal(left["last"][name], last)


def test_a_reward_that_ranks_no_better_than_chance_is_refused(
    tmp_path, rl_stage, loop, monkeypatch
) -> None:
    found = Agreement(0.12, 0.07, 41, 64)
    monkeypatch.setattr(cycle_rl, "self_agreement", lambda *_: found)
    with pytest.raises(
        BeginRefused, match=r"0\.120 ± 0\.070 \(over the 41 of 64 .* below 0\.3: .*--force"
    ) as refused:
        run(rl_stage(), loop, tmp_path)
    assert not list(tmp_path.iterdir())
    assert "noise" not in str(refused.value)
    monkeypatch.setattr(cycle_rl, "self_agreement", lambda *_: Agreement(0.25, 0.05, 64, 64))
    with pytest.raises(BeginRefused, match=r"within its noise: .*--set gate_scenes=8"):
        rl_stage().begin()
    monkeypatch.setattr(cycle_rl, "self_agreement", lambda *_: found)
    with pytest.raises(BeginRefused, match=r"--set reward_boxes=2"):
        rl_stage().begin()
    with pytest.raises(BeginRefused, match=r"Train grounding further, or begin all the same"):
        rl_stage(policy="boxes").begin()  # whose reward is that of one sampled box
    assert rl_stage(force=True).begin()["rank_correlation"] == 0.12
    assert rl_stage(gate_bound=0.1).begin()["groups"] == 41


def test_few_groups_do_not_speak_for_a_reward(rl_stage, monkeypatch) -> None:
    def judged(reward: np.ndarray, judge: np.ndarray) -> None:
        found = within_groups(reward, judge)
        monkeypatch.setattr(cycle_rl, "self_agreement", lambda *_: found)

    rng = np.random.default_rng(0)
    # A reward that is flat in 63 groups of 64, and right in one.
    judge, reward = rng.random((64, 8)), np.ones((64, 8))
    reward[5] = judge[5]
    judged(reward, judge)
    with pytest.raises(BeginRefused, match=r"0\.016 ± 0\.016 \(over the 64 of 64 groups"):
        rl_stage(gate_scenes=64).begin()
    # A judge that sees a difference in 15 groups of 64, where the reward is right: too few to say.
    few = np.where(np.arange(64)[:, None] < 15, judge, 1.0)
    judged(few, few)
    with pytest.raises(BeginRefused, match=r"of 15 of 64 .* 16 are needed .*--force"):
        rl_stage(gate_scenes=64).begin()
    assert rl_stage(gate_scenes=64, force=True).begin()["groups"] == 15
    more = np.where(np.arange(64)[:, None] < 16, judge, 1.0)
    judged(more, more)
    assert rl_stage(gate_scenes=64).begin()["rank_correlation"] == pytest.approx(1)
    # Where no group tells anything apart, nothing speaks for the reward either.
    judged(np.ones((3, 4)), np.ones((3, 4)))
    with pytest.raises(BeginRefused, match="0 of 3 validation layouts"):
        rl_stage(gate_scenes=3).begin()


def test_agreement_is_measured_within_groups() -> None:
    reward = np.array([[0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.7, 0.6], [0.5, 0.5, 0.5, 0.5]])
    judged = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 8.0, 7.0], [1.0, 2.0, 3.0, 4.0]])
    found = within_groups(reward, judged)
    # Spearman of 4321 and 1243: -0.8; a reward that sees no difference where there is one: 0.
    assert (found.groups, found.of) == (3, 3)
    assert found.correlation == pytest.approx((1.0 - 0.8) / 3)
    assert found.stderr == pytest.approx(np.std([1.0, -0.8, 0.0], ddof=1) / 3**0.5)
    blind = within_groups(reward[:2], np.stack((judged[0], np.ones(4))))
    assert (blind.groups, blind.of, blind.correlation) == (1, 2, pytest.approx(1.0))


def test_begin_measures_the_model_it_is_given(rl_stage, monkeypatch) -> None:
    """A model of a few steps draws nothing that the judge can read. (Now and then it did read a
    blot as a shape: what six steps leave of the tokenizer hangs on the last bits of its sums.)"""
    pictures = list[object]()

    def blind(picture: object) -> list[object]:
        pictures.append(picture)
        return []

    monkeypatch.setattr(agreement, "detect", blind)
    with pytest.raises(BeginRefused, match="tells the images of 0 of 2 validation layouts"):
        rl_stage().begin()
    assert len(pictures) == 4


@pytest.mark.parametrize("source", ["real", "random", "file"])
def test_layouts_follow_from_the_step(tmp_path, rl_stage, source) -> None:
    if source == "file":
        source = str(tmp_path / "layouts.jsonl")
        lines = [y.dumps() for y in rl_stage(layouts="random", batch=12).layouts(9)]
        Path(source).write_text("\n".join(lines) + "\n")
    a, b = (rl_stage(layouts=source, batch=6) for _ in range(2))
    assert a.layouts(4) == b.layouts(4) != a.layouts(5)
    if "jsonl" in source:
        assert {y.dumps() for y in a.layouts(4)} <= set(lines)


def test_a_layout_too_long_for_the_model_is_refused(tmp_path, rl_stage) -> None:
    long = {"caption": "star " * 1200, "objects": [{"expr": "a star", "box": [0, 0, 0.5, 0.5]}]}
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps(long) + "\n")
    with pytest.raises(LayoutError, match=r"long\.jsonl: layout 1 takes .* room for 1024"):
        rl_stage(layouts=str(path))


def test_a_model_with_boxes_as_text_is_refused(pmtp_run, loop) -> None:
    start = load_start(pmtp_run, "djo", any_stage=True)
    start.engine.prompts.codec = TextualCodec(start.engine.prompts.tokenizer)
    with pytest.raises(PromptError, match="textual codec; rollouts need the location codec"):
        CycleRLStage(CycleRLConfig(loop=loop), start)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sampling": Sampling(temperature=0)}, "temperature = 0; image tokens .* must be sampled"),
        ({"sampling": Sampling(cfg=0)}, "cfg = 0 draws without looking at the layout"),
        ({"sampling": Sampling(top_p=0.9), "updates": 2, "beta": 0.0}, "no probability to score"),
        ({"sampling": Sampling(top_k=5)}, r"beta = 0\.01 with top_k = 5, .*; set beta to 0, or"),
        ({"sampling": Sampling(top_p=0.9)}, r"beta = 0\.01 with .* top_p = 0\.9: .* infinite"),
        ({"updates": 4}, "save_every = 2; with updates = 4"),
        ({"group": 1}, "group = 1"),
        ({"rollout_dtype": "float16"}, "rollout_dtype = 'float16'; choose 'float32' or 'bfloat16'"),
        (
            {"rollout_dtype": "bfloat16", "beta": 0.0, "sampling": Sampling(top_k=5)},
            "rollout_dtype = 'bfloat16' with top_k = 5",
        ),
        ({"reward_boxes": -1}, "reward_boxes = -1; it must be at least 0"),
        (
            {"reward_boxes": 2, "policy": "both"},
            "reward_boxes = 2 with policy = 'both'.* set reward_boxes = 0, or policy = 'image'",
        ),
        ({"draw_at_once": 7}, "draw_at_once = 7 with group = 8: .* set draw_at_once to 8 or more"),
        ({"draw_at_once": 8, "gate_group": 9}, "draw_at_once = 8 with gate_group = 9"),
        ({"policy": "text"}, "policy = 'text'; choose 'image' or 'boxes' or 'both'"),
        ({"beta": -1.0}, "beta = -1"),
    ],
)
def test_what_could_not_be_scored_exactly_is_refused(loop, wrong, words) -> None:
    with pytest.raises(ValueError, match=words):
        CycleRLConfig(loop=loop, **wrong)
    with pytest.raises(ValueError, match="eval_every = 3; with updates = 2"):
        CycleRLConfig(loop=dataclasses.replace(loop, eval_every=3), updates=2)
    CycleRLConfig(loop=loop, policy="boxes", sampling=Sampling(temperature=0))
    CycleRLConfig(loop=loop, policy="boxes", sampling=Sampling(top_k=5))
    CycleRLConfig(loop=loop, beta=0.0, sampling=Sampling(top_k=5, top_p=0.9))
