"""Stage 3, Cycle RL: layout → image → layout, and images whose layout is recovered are reinforced.

Each layout is drawn G times with the current weights, grounded in every image, and rewarded for how
well the boxes match: a higher reward is a better match (the paper's formula, read literally, is a
discrepancy, and `box_reward` is 1 minus it). GRPO (arXiv 2402.03300) turns rewards into advantages
within the layout's group. No image labels are needed, only texts and boxes.
"""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from echogen.engine.ground import locations
from echogen.engine.images.vision import decode_codes, to_images
from echogen.engine.layout import Layout, LayoutError
from echogen.engine.model import UnifiedTransformer
from echogen.engine.ranges import span
from echogen.kernels.grpo import grpo_loss
from echogen.train.config import CycleRLConfig
from echogen.train.data.layouts import MOST_OBJECTS, check_room, random_layout, read_layouts
from echogen.train.data.packing import Batch
from echogen.train.data.scenes import load_scenes
from echogen.train.data.shapes import Scene
from echogen.train.data.source import ShapesWorld
from echogen.train.eval.agreement import self_agreement
from echogen.train.eval.judge import detect
from echogen.train.eval.tables import cycle_table, layouts_of
from echogen.train.lora import without_adapters
from echogen.train.parallel.distributed import one_goes_first
from echogen.train.parallel.whole import WholeEngine
from echogen.train.run.loop import BeginRefused
from echogen.train.stages import keys
from echogen.train.stages.credit import Credit, by_image, by_object, object_tokens
from echogen.train.stages.held import Held, Portion, Share
from echogen.train.stages.order import picked
from echogen.train.stages.passes import worth_logging
from echogen.train.stages.rollouts import Rollout, roll_out, targets
from echogen.train.stages.scoring import box_logprob, image_logprob
from echogen.train.stages.shares import places, turns
from echogen.train.stages.world import WorldStage
from echogen.train.start import Start

VAL_LAYOUTS = 256  # as many as for the other numbers of an evaluation
GROUP_TOKENS = 2560
"""The most tokens of a prompt and the images that share it in one sequence: with Janus-Pro's 576
codes four images, so that its groups of 8 are two sequences of one length. Three sequences, of 3, 3
and 2 images, would leave a tenth or more of their rows as padding."""
DECODED = 32  # images that the image tokenizer decodes at once: 7 GB at 384×384


class CycleRLStage(WorldStage):
    """Stage 3: its batches and its loss; trained on any layouts, judged on ShapesWorld.

    Raises:
        PromptError: a model whose boxes are not location tokens.
        LayoutError: a file of layouts that cannot be used.
    """

    name = "cycle-rl"
    # The judge's IoU, as the reward itself keeps rising even when the images get worse.
    selects: str | None = "cycle_iou"

    def __init__(self, config: CycleRLConfig, start: Start) -> None:
        locations(start.engine.prompts)
        if config.rollout_dtype != "float32":
            self.engine_dtype = getattr(torch, config.rollout_dtype)
        super().__init__(start.engine, config.loop, ShapesWorld(config.scenes), start.stages)
        if self.engine_dtype is not None and not isinstance(self.engine, WholeEngine):
            self.gather()
        if config.export == "last":
            self.selects = None
        self.config = replace(config, start=start.fingerprint)
        self._key = keys.noise_key(config.loop.seed, keys.RL_NOISE)
        # The weights beside the adapters are the reference, unless some of them are trained too.
        self._base = bool(config.beta and config.loop.lora and not config.loop.lora_also)
        apart = config.beta and not self._base
        self._reference = copy.deepcopy(self.module).requires_grad_(False) if apart else None
        self.frozen = [] if self._reference is None else [self._reference]
        self._shares: dict[tuple[int, int], Share] = {}  # by the first of their parts, and parts
        self._held: dict[tuple[int, int], Held] = {}
        with one_goes_first():
            real = config.layouts == "real"
            self._scenes = load_scenes("train", config.scenes) if real else []
        named = config.layouts in ("real", "random")
        self._read = [] if named else read_layouts(config.layouts)
        if self._read:
            digest = hashlib.blake2b(Path(config.layouts).read_bytes(), digest_size=6)
            self.config = replace(self.config, layouts_hash=digest.hexdigest())
        for number, layout in enumerate(self._read, 1):
            self._check_room(layout, f"{config.layouts}: layout {number}")

    # --- layouts and rollouts -------------------------------------------------------------------

    @property
    def reward_boxes(self) -> int:
        """Number of boxes sampled for each object: one if they are part of the policy."""
        return self.config.reward_boxes if self.config.policy == "image" else 1

    @property
    def idle(self) -> tuple[str, ...]:
        """See `Stage`: the head of the tokens that are not part of the policy."""
        return {"image": ("text_head",), "boxes": ("image_head",), "both": ()}[self.config.policy]

    def _check_room(self, layout: Layout, what: str) -> None:
        try:
            check_room(layout, self.prompts, self.module.config)
        except LayoutError as error:
            raise LayoutError(f"{what} {error}") from None

    def layouts(self, index: int) -> list[Layout]:
        """The layouts of a rollout, a pure function of (seed, index)."""
        c = self.config
        rng = keys.generator(c.loop.seed, keys.RL_BATCH, index)
        if c.layouts == "random":
            return [random_layout(rng) for _ in range(c.batch)]
        if self._read:
            return picked(self._read, c.batch, index, c, keys.RL_ORDER, rng)
        return [scene.layout(rng) for scene in self._chosen(index, rng)]

    def scenes(self, index: int) -> list[Scene]:
        """The scenes whose ``layouts`` a rollout draws, where the layouts are "real"."""
        return self._chosen(index, keys.generator(self.config.loop.seed, keys.RL_BATCH, index))

    def _chosen(self, index: int, rng: np.random.Generator) -> list[Scene]:
        c = self.config
        return picked(self._scenes, c.batch, index, c, keys.RL_ORDER, rng)

    def _hold(self, step: int, part: int = 0, parts: int = 1) -> Held:
        """The rollout of a step's part: a new one every ``updates`` steps. A layout's images are
        all in the same part, and their noise does not depend on the part."""
        index, held = step // self.config.updates, self._held.get((part, parts))
        if held is not None and held.index == index:
            return held
        first = step % self.config.updates == 0
        assert first, "a run resumes where a rollout begins (see CycleRLConfig)"
        share = self._share(index, part, parts)
        with span("train/cycle-rl/data", step=step):
            held = self._packed(share, part)
        self._held[part, parts] = held
        return held

    def _share(self, index: int, part: int, parts: int) -> Share:
        """The rollout of all parts that the process of a ``part`` takes, drawn for the first."""
        c, mine = self.config, turns(part, parts, self.config.loop.accumulate)
        found = self._shares.get((mine.start, parts))
        if found is not None and found.index == index:
            return found
        every = self.layouts(index)
        here = [i for own in mine for i in places("batch", c.batch, own, parts)]
        draws = keys.draw_ids(index, c.batch * c.group).view(c.batch, c.group)
        rollout = roll_out(
            self.engine,
            [every[i] for i in here],
            group=c.group,
            sampling=c.sampling,
            key=self._key,
            draws=draws[here].flatten(),
            boxes=self.reward_boxes,
            w_iou=c.w_iou,
            w_l1=c.w_l1,
            mode=c.advantage,
            at_once=c.draw_at_once,
        )
        codes, tokens = rollout.drawing.codes.cpu().numpy(), rollout.answers.tokens.cpu()
        share = Share(index, mine, rollout, codes, tokens, self._sizes(every))
        self._shares[mine.start, parts] = share
        return share

    def _tokens(self, layouts: list[Layout]) -> Tensor:
        """Which of the policy's tokens belong to which object, see `object_tokens`."""
        policy, config = self.config.policy, self.module.config
        grid = None if policy == "boxes" else (config.grid, config.grid)
        return object_tokens(*targets(layouts), grid, policy != "image")

    def _sizes(self, layouts: list[Layout]) -> np.ndarray:
        """How much of each item of `Portion` there is in one image of each layout."""
        image = self.module.config.image_tokens * (self.config.policy != "boxes")
        boxes = np.array([len(y.objects) for y in layouts])
        tokens = image + 4 * (self.config.policy != "image") * boxes
        rows, row_tokens = (tokens > 0).sum(), tokens.sum()
        if self.config.credit == "object":
            whose = self._tokens(layouts)
            rows, row_tokens = int(whose.any(-1).sum()), int(whose.sum())
        return np.array([len(layouts), boxes.sum(), tokens.sum(), rows, row_tokens])

    def _credit(self, index: int, rollout: Rollout, mask: Tensor) -> Credit:
        c, score = self.config, rollout.score
        if c.credit == "image":
            return by_image(score, mask)
        tokens, there = self._tokens(rollout.layouts), targets(rollout.layouts)[1]
        return by_object(score, tokens, there, c.w_iou, c.w_l1, c.advantage)

    def _packed(self, share: Share, part: int) -> Held:
        policy, (rollout, codes, tokens) = self.config.policy, share.of(part)
        group = rollout.group
        repeated = [y for y in rollout.layouts for _ in range(group)]
        drawn = unconditional = asked = None
        sampled, mask = [], []
        if policy != "boxes":
            prompts = [self.prompts.l2i(y) for y in rollout.layouts]
            drawn = self._sequences(prompts, codes)
            if self.config.sampling.cfg != 1:
                kind = self.config.sampling.unconditional
                unconditional = self._sequences(
                    [self.prompts.unconditional(p, kind) for p in prompts], codes
                )
            sampled.append(rollout.drawing.logprob)
            mask.append(torch.ones_like(rollout.drawing.logprob, dtype=torch.bool))
        if policy != "image":
            asked = self._questions(repeated, codes, tokens)
            sampled.append(rollout.answers.logprob.flatten(1))
            each = rollout.mask.repeat_interleave(group, 0)
            mask.append(each.repeat_interleave(4, 1))
        every = torch.cat(mask, 1)
        credit = self._credit(share.index, rollout, every)
        portion = Portion(*(self._sizes(rollout.layouts) / np.maximum(share.sizes, 1)).tolist())
        return Held(
            share.index, rollout, drawn, unconditional, asked, torch.cat(sampled, 1), every, credit,
            portion,
        )  # fmt: skip

    def _sequences(self, prompts: list[list[int]], codes: np.ndarray) -> Batch:
        """L2I sequences of B prompts and the B·G images drawn from them. As many images as fit into
        GROUP_TOKENS share their prompt in one sequence, and a group is divided evenly. At 64 codes,
        groups of 8 and prompts of 50 tokens, the forward and backward passes take 0.65 of the time
        that one sequence per image takes, and a step 0.78 (`echogen bench train --stage cycle-rl
        --float32`, medians of three alternating runs, one thread of a Zen 3)."""
        trees, tokens = [], codes.shape[1]
        for prompt, images in zip(prompts, np.split(codes, len(prompts)), strict=True):
            together = max(1, (GROUP_TOKENS + 1 - len(prompt)) // tokens)
            for part in np.array_split(images, -(-len(images) // together)):
                trees.append(self.drawings(prompt, part))
        return self.pack(trees)

    def _questions(self, layouts: list[Layout], codes: np.ndarray, tokens: Tensor) -> Batch:
        """I2L sequences whose answers are the rollout's box tokens."""
        trees = []
        for layout, z, row in zip(layouts, codes, tokens.tolist(), strict=True):
            boxes = [self.prompts.codec.parse(answer) for answer in row]
            asked = [(o.expr, b) for o, b in zip(layout.objects, boxes, strict=False) if b]
            assert len(asked) == len(layout.objects), "a constrained decode always parses"
            trees.append(self.grounding(z, asked))
        return self.pack(trees)

    # --- loss -----------------------------------------------------------------------------------

    def logprob(self, model: UnifiedTransformer, held: Held) -> Tensor:
        """A model's log-probabilities of the policy's tokens, [N, S]."""
        drawing, answers, parts = held.rollout.drawing, held.rollout.answers, []
        count, most = answers.tokens.shape[:2]
        if held.drawn is not None:
            parts.append(
                image_logprob(
                    model,
                    held.drawn,
                    held.unconditional,
                    count,
                    self.config.sampling,
                    drawing.kept,
                )
            )
        if held.asked is not None:
            parts.append(box_logprob(model, self.prompts, held.asked, count, most).flatten(1))
        return torch.cat(parts, 1)

    @property
    def images(self) -> int:
        """See `Stage`."""
        return self.config.batch * self.config.group

    def inputs(self, step: int) -> dict[str, Any]:
        """See `Stage`: for every part of the rollout in use, what was drawn and found, and its
        reward."""
        now = {k: h for k, h in self._held.items() if h.index == step // self.config.updates}
        return {
            f"part {part} of {parts}": {
                "codes": held.rollout.drawing.codes,
                "boxes": held.rollout.answers.tokens,
                "reward": held.rollout.score.reward,
                "advantage": held.rollout.score.advantage,
                "sampled": held.sampled,
                "mask": held.mask,
                **{f"drawn {k}": v for k, v in vars(held.drawn or held.asked).items()},
            }
            for (part, parts), held in now.items()
        }

    @torch.no_grad()
    def _by_reference(self, held: Held) -> Tensor | None:
        if self._base:
            with without_adapters(self.module):
                return self.logprob(self.module, held)
        return None if self._reference is None else self.logprob(self._reference, held)

    def loss_part(self, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, Any]]:
        """See `Stage`."""
        c, held = self.config, self._hold(step, part, parts)
        if held.reference is None:
            held.reference = self._by_reference(held)
        logp = self.logprob(self.module, held)
        credit = held.credit
        tokens = self.module.config.image_tokens * (held.drawn is not None)
        tokens += 4 * MOST_OBJECTS * (held.asked is not None)
        # With one update the ratio is 1 by definition. Against the sampler's log-probabilities it
        # would be 1 up to rounding, and in bfloat16 the rounding would pass for a change of the
        # policy and be clipped; it is a separate weight instead.
        out = grpo_loss(
            credit.rows(logp),
            None if held.old is None else credit.rows(held.old),
            credit.advantage,
            credit.mask,
            None if held.reference is None else credit.rows(held.reference),
            c.clip_low,
            c.clip_high,
            c.beta,
            c.normalise,
            tokens,
            sampled_logp=None if c.importance_cap is None else credit.rows(held.sampled),
            importance_cap=c.importance_cap or 1.0,  # unused without sampled_logp
        )
        if held.gap is None:
            off = (logp.detach() - held.sampled).abs()
            held.gap = torch.where(held.mask, off, 0.0).sum() / held.mask.sum()
            held.old = logp.detach() if c.updates > 1 else None
        portion, loss = held.portion, out.loss
        if c.normalise == "constant":  # a mean over images, not over rows
            loss = loss * (len(credit.mask) / len(held.mask))
        if parts > 1:
            by = {"sequence": portion.rows, "token": portion.row_tokens}
            loss = loss * by.get(c.normalise, portion.layouts)
        per_token = {
            "kl": out.mean_kl, "clipped": out.clip_fraction, "capped": out.capped_fraction
        }  # fmt: skip
        numbers = {
            "loss": loss,
            **_of(held.rollout, portion),
            "flat": credit.flat.float().mean()
            * (portion.layouts if c.credit == "image" else portion.boxes),
            **{name: mean * portion.row_tokens for name, mean in per_token.items()},
            "sampler_gap": held.gap * portion.tokens,
        }
        return loss, worth_logging(numbers)

    # --- before and beside training -------------------------------------------------------------

    def begin(self) -> dict[str, float]:
        """Compare the self-reward with the judge.

        Raises:
            BeginRefused: they agree too little within a group, so that training would teach the
                grounder's mistakes, or the judge sees differences in too few groups to say.
        """
        c = self.config
        key = keys.noise_key(c.loop.seed, keys.RL_JUDGED)
        found = self_agreement(
            self.engine, c.gate_scenes, c.gate_group, c.sampling, key, self.reward_boxes, c.w_iou,
            c.w_l1, c.draw_at_once,
        )  # fmt: skip
        least = math.ceil(c.gate_scenes / 4)
        if found.groups < least and not c.force:
            raise BeginRefused(
                f"the judge tells the images of {found.groups} of {found.of} validation layouts "
                f"apart ({c.gate_group} images each), and {least} are needed to hold the "
                f"self-reward against it. Train drawing further, draw more (--set gate_group="
                f"{2 * c.gate_group}), or begin all the same with --force"
            )
        if not found.correlation >= c.gate_bound and not c.force:  # NaN is refused too
            unsure = found.correlation + 2 * found.stderr >= c.gate_bound
            raise BeginRefused(
                f"within groups the self-reward's rank correlation with the judge is "
                f"{found.correlation:.3f} ± {found.stderr:.3f} (over the {found.groups} of "
                f"{found.of} groups of {c.gate_group} validation images that the judge tells "
                f"apart), below {c.gate_bound}: it would "
                f"reinforce the grounder's mistakes. "
                + (
                    "That is within its noise: more scenes measure it better "
                    f"(--set gate_scenes={4 * c.gate_scenes}). "
                )
                * unsure
                + "Train grounding further, "
                + f"let the reward be the mean over several sampled boxes (--set reward_boxes="
                f"{max(2, 2 * c.reward_boxes)}), "
                * (c.policy == "image")
                + "or begin all the same with --force"
            )
        names = ("rank_correlation", "rank_correlation_stderr", "groups")
        told = dict(zip(names, found[:3], strict=True))
        return {name: value for name, value in told.items() if np.isfinite(value)}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Compute every stage's numbers and, on validation layouts drawn as in training,
        ``val_drawings`` times each, the reward (of the most likely boxes, whatever
        ``reward_boxes``) and the judge's IoU. ``gap`` is self-judged minus independently judged IoU
        (``self_iou``, ``cycle_iou``), and so is of other images than ``judge_iou``. A growing gap
        means a private language between the two halves."""
        values = super().evaluate()
        scenes = load_scenes("val", VAL_LAYOUTS)
        c, layouts = self.config, layouts_of(scenes, 0)
        key, rewards, boxes, drawn = keys.noise_key(c.loop.seed, keys.RL_JUDGED), [], [], []
        # One drawing at a time, to need the memory of one only.
        for draws in torch.arange(c.val_drawings * len(layouts)).chunk(c.val_drawings):
            rollout = roll_out(
                self.engine, layouts, group=1, sampling=c.sampling, key=key, draws=draws,
                w_iou=c.w_iou, w_l1=c.w_l1, at_once=c.draw_at_once,
            )  # fmt: skip
            rewards.append(rollout.score.reward)
            boxes += [
                [tuple(box) for box in row[0][: len(y.objects)]]
                for y, row in zip(layouts, rollout.score.boxes.tolist(), strict=True)
            ]
            drawn.append(rollout.drawing.codes)
        # This drew many more rows than a step does, and on a GPU its caches would stay. A step's
        # own caches do stay during its update: recording them again in every step costs time, and
        # the memory is seldom needed.
        self.engine.release()
        detected = [
            detect(image)
            for codes in torch.cat(drawn).split(DECODED)
            for image in to_images(decode_codes(self.vq, codes))
        ]
        table = cycle_table(
            scenes * c.val_drawings, layouts * c.val_drawings, boxes, detected, intervals=False
        )
        # With the run's w_iou and w_l1; the table's reward has equal weights, for comparing models.
        values["reward"] = float(torch.cat(rewards).mean())
        values |= {name: table[name] for name in ("self_iou", "gap")}
        return values | {"cycle_iou": table["judge_iou"]}


def _of(rollout: Rollout, portion: Portion) -> dict[str, Tensor]:
    """A rollout's numbers for a log line; those of a part's rollout are its contributions."""
    score, there = rollout.score, rollout.mask.unsqueeze(1)
    boxes = there.sum() * rollout.group
    return {
        "reward": score.reward.mean() * portion.layouts,
        "spread": score.reward.std(1, correction=0).mean() * portion.layouts,
        "iou": score.iou.sum() / boxes * portion.boxes,
        "l1": score.l1.sum() / boxes * portion.boxes,
    }
