"""Every knob of a training run, as frozen dataclasses that `train/recipes.py` fills in."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from echogen.engine.decoding.sampler import Sampling
from echogen.kernels.group_advantage import MODES
from echogen.train.data.shapes import IMAGE_SIZE


def later(default: Any, was: Any = ...) -> Any:
    """A field added after runs had been recorded. `to_json` omits it where it has the value of
    those runs, ``was`` (by default ``default``), so that they stay the same runs."""
    return field(default=default, metadata={"was": default if was is ... else was})


ORDERS = ("epochs", "independent")
WHOLE_PARTS = ("text_embedding", "code_embedding", "code_aligner", "text_head", "image_head")


@dataclass(frozen=True)
class LoopConfig:
    """The step loop.

    Attributes:
        steps: optimizer steps in total.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon for the transformer's matrices; None: AdamW for all.
        warmup: steps of linear warm-up.
        decay: share of the steps, at the end, over which the rate falls to zero.
        betas, weight_decay, clip: AdamW's betas, decoupled decay (matrices only), gradient-norm
            limit.
        bf16: autocast matrix products and convolutions to bfloat16; weights stay float32.
        log_every, eval_every, save_every: steps between log lines, evaluations, checkpoints.
        threads: intra-op threads on a CPU (None: torch's own choice).
        seed: of weights and batches.
        decay_shape: how the rate falls, "linear" or "cosine" (half a period).
        accumulate: number of parts into which a step's batch is split, processed one after another;
            their gradients add up to the whole batch's, and only one part's activations exist at a
            time. Cycle RL draws all parts together and splits the update alone (see
            ``draw_at_once``).
        checkpoint_activations: keep only each decoder block's input, and run the block again in the
            backward pass: less memory, one more forward pass, the same gradients.
        ema: decay of a moving average of the weights, which is then evaluated and exported instead
            of them; None: no average.
        deterministic: refuse operations whose result may differ from run to run (for example, on a
            GPU, a sum over threads in no fixed order), so that a resumed run repeats itself bit by
            bit.
        parallel: how the processes that torchrun has started share the weights: "ddp", each holds
            all of them; "fsdp", each holds a slice of every weight, for models that do not fit on
            one GPU with their gradients and AdamW's two moments (16 bytes a weight); "none", there
            is one process; "auto": "none" for one process, "ddp" for several. A run may resume with
            another choice.
        lora: rank of the adapters that are trained in place of the blocks' projections (see
            `lora`); 0: no adapters.
        lora_also: parts of the transformer that are trained in full beside the adapters: any of
            text_embedding, code_embedding, code_aligner, text_head, image_head.
    """

    steps: int
    lr: float
    muon_lr: float | None = None
    warmup: int = 100
    decay: float = 0.3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    bf16: bool = True
    log_every: int = 20
    eval_every: int = 500
    save_every: int = 250
    threads: int | None = 1
    seed: int = 0
    decay_shape: Literal["linear", "cosine"] = later("linear")
    accumulate: int = later(1)
    checkpoint_activations: bool = later(False)
    ema: float | None = later(None)
    deterministic: bool = later(False)
    parallel: Literal["auto", "none", "ddp", "fsdp"] = later("auto")
    lora: int = later(0)
    lora_also: tuple[str, ...] = later(())

    def __post_init__(self) -> None:
        _at_least(
            self, 1, "steps", "log_every", "eval_every", "save_every", "accumulate", "threads"
        )
        _at_least(self, 0, "warmup", "weight_decay")
        _above_zero(self, "lr", "muon_lr", "clip")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed = {self.seed}; it must be in 0 … 2^32 - 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {self.betas}; each must be in [0, 1)")
        _one_of("decay_shape", self.decay_shape, ("linear", "cosine"))
        self._check_lora()
        _one_of("parallel", self.parallel, ("auto", "none", "ddp", "fsdp"))
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema = {self.ema}; it must lie between 0 and 1 (None: no average)")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay = {self.decay}; it must be in [0, 1]")

    def _check_lora(self) -> None:
        if self.lora < 0:
            raise ValueError(f"lora = {self.lora}; it is a rank, or 0 for none")
        if self.lora_also and not self.lora:
            raise ValueError(f"lora_also = {self.lora_also} without lora; set lora to a rank")
        for part in self.lora_also:
            _one_of("lora_also", part, WHOLE_PARTS)
        if self.lora and self.muon_lr is not None:
            raise ValueError(
                f"lora = {self.lora} with muon_lr = {self.muon_lr}: Muon orthogonalises updates of "
                f"whole matrices; set muon_lr to None"
            )


@dataclass(frozen=True)
class VQConfig:
    """The image tokenizer of a small model, trained from scratch.

    Attributes:
        channels, multipliers, res_blocks, latent: shape of `JanusVQVAE`; the image side shrinks by
            2^(len(multipliers) − 1). Its norms divide the channels into 32 groups.
        codes, code_dim: codebook size and width.
        image_size: pixels along a side, a multiple of ShapesWorld's.
        batch: images per step.
        warmup_steps: steps as a plain autoencoder before the codebook is seeded by k-means.
        commitment: weight of the pull of features towards their codes.
        agreement: weight of the pull of equal patches towards one feature, whatever their
            surroundings.
        ema: decay of the codebook's moving averages.
    """

    loop: LoopConfig
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    res_blocks: int = 1
    latent: int = 64
    codes: int = 1024
    code_dim: int = 8
    image_size: int = 64
    batch: int = 16
    warmup_steps: int = 500
    commitment: float = 0.25
    agreement: float = 1.0
    ema: float = 0.98

    def __post_init__(self) -> None:
        _at_least(self, 1, "channels", "res_blocks", "latent", "codes", "code_dim", "image_size",
                  "batch")  # fmt: skip
        _at_least(self, 0, "warmup_steps", "commitment", "agreement")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema = {self.ema}; it must be in [0, 1)")
        _multiple_of(self, 32, "channels")
        _multiple_of(self, IMAGE_SIZE, "image_size")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers = {self.multipliers}; give one or more, each at least 1")
        if self.image_size % (shrunk := 1 << (len(self.multipliers) - 1)):
            raise ValueError(
                f"multipliers = {self.multipliers}: they shrink an image {shrunk} times, and "
                f"image_size = {self.image_size} is no multiple of that; give fewer"
            )


@dataclass(frozen=True)
class PMTPConfig:
    """Stage 1, parallel multi-task pre-training of a small model.

    Attributes:
        width, layers, heads, mlp_width: the transformer.
        rope_theta: RoPE base; small, since sequences are short.
        bins: location tokens of the box codec.
        data: folder of pictures with their layouts to learn from (see `data.pictures`); "":
            ShapesWorld.
        scenes: layouts of ShapesWorld's training set.
        batch: samples per step that carry both tasks.
        extra_grounding: additional samples per step that carry grounding only.
        branches: grounding branches (expressions) per image.
        prompt_dropout: share of L2I prompts replaced by the unconditional prompt.
        mask: "isolated": each task reads its own copy of the image, and no path leads from the
            layout to the grounding; "shared": both read one image, through which the layout can
            leak.
        temperature, cfg: default sampling written into the exported model; chosen on validation.
        loop: the step loop.
        start: fingerprint of the stage-1 model that the run continues; filled in by the stage. "":
            fresh weights.
        data_hash: fingerprint of the training data, so that a run on changed data does not pass for
            the same run; filled in by the stage. "": ShapesWorld.
        order: how steps take their samples: "epochs", all samples once, then all again in another
            order, and so on; "independent", each by itself from all of them.
    """

    loop: LoopConfig
    width: int = 192
    layers: int = 6
    heads: int = 3
    mlp_width: int = 512
    rope_theta: float = 1000.0
    bins: int = 65
    scenes: int = 40_000
    batch: int = 32
    extra_grounding: int = 0
    branches: int = 6
    prompt_dropout: float = 0.1
    mask: Literal["isolated", "shared"] = "isolated"
    temperature: float = 1.0
    cfg: float = 1.0
    start: str = ""
    data: str = later("")
    data_hash: str = later("")
    order: Literal["epochs", "independent"] = later("epochs", was="independent")

    def __post_init__(self) -> None:
        _one_of("mask", self.mask, ("isolated", "shared"))
        _one_of("order", self.order, ORDERS)
        _at_least(self, 1, "width", "layers", "heads", "mlp_width", "scenes", "batch", "branches")
        _at_least(self, 2, "bins")
        _at_least(self, 0, "extra_grounding")
        _above_zero(self, "rope_theta")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width = {self.width} with heads = {self.heads}: a head's share of the width must "
                f"be whole and even; make width a multiple of {2 * self.heads}"
            )
        if not 0 <= self.prompt_dropout < 1:
            raise ValueError(f"prompt_dropout = {self.prompt_dropout}; it must be in [0, 1)")
        Sampling(temperature=self.temperature, cfg=self.cfg)  # raises ValueError for invalid values


@dataclass(frozen=True)
class DJOConfig:
    """Stage 2, dual joint optimisation: `J = L_L2I + μ·L_I2L + λ·L_loop`.

    Attributes:
        data, scenes, batch, branches, prompt_dropout: as in stage 1.
        loop_weight: λ; 0 leaves the loop out.
        grounding_weight: μ, of grounding in the real images; 0 (the paper) leaves it out.
        tau_start, tau_end: temperature of the soft sample at the first and at the last step,
            exponential in between.
        prefix: what the codes of the loop are predicted from: the real image's codes ("teacher")
            or an image that the model itself has drawn ("sampled").
        freeze_grounder: the loop's gradient reaches only the generator, not the weights in their
            role as grounder.
        loop: the step loop.
        start: fingerprint of the model that the run began with; filled in by the stage.
        data_hash, order: as in stage 1.
    """

    loop: LoopConfig
    scenes: int = 40_000
    batch: int = 32
    branches: int = 6
    prompt_dropout: float = 0.1
    loop_weight: float = 1.0
    grounding_weight: float = 1.0
    tau_start: float = 1.0
    tau_end: float = 0.3
    prefix: Literal["teacher", "sampled"] = "teacher"
    freeze_grounder: bool = False
    start: str = ""
    data: str = later("")
    data_hash: str = later("")
    order: Literal["epochs", "independent"] = later("epochs", was="independent")

    def __post_init__(self) -> None:
        _one_of("prefix", self.prefix, ("teacher", "sampled"))
        _one_of("order", self.order, ORDERS)
        _at_least(self, 1, "scenes", "batch", "branches")
        for name in ("loop_weight", "grounding_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} = {getattr(self, name)}; it must be finite and 0 or more")
        _above_zero(self, "tau_start", "tau_end")
        if not 0 <= self.prompt_dropout < 1:
            raise ValueError(f"prompt_dropout = {self.prompt_dropout}; it must be in [0, 1)")


@dataclass(frozen=True)
class CycleRLConfig:
    """Stage 3, Cycle RL: draw a layout several times, find it in each image, reinforce the best.

    Attributes:
        layouts: "real" (ShapesWorld's training layouts), "random", or the path of a file with one
            layout per line.
        scenes: how many training layouts "real" chooses from.
        batch, group: layouts per rollout, images per layout.
        sampling: the distribution that images are drawn from and scored under. The default has no
            guidance, no truncation and temperature 1.
        policy: the tokens that are reinforced: "image", "boxes" (which are then sampled instead of
            being the most likely) or "both".
        w_iou, w_l1: weights of the reward's terms.
        reward_boxes: boxes sampled for each object, over which its IoU and L1 are averaged; 0 takes
            only the most likely box. Several boxes reflect how certain the grounder is, at the cost
            of as many groundings; training has not been shown to gain from them. It must be 0 if
            boxes are reinforced (``policy``), as each is then sampled once.
        credit: which tokens share an advantage: "image", all tokens of an image, by its mean
            reward; "object", the tokens in an object's box, by that object's reward (see `credit`).
        advantage: "grpo", "dr_grpo", "rloo" or "rank", see `group_advantage`.
        normalise: "sequence", "token" or "constant", see `grpo_loss`, whose sequences are the rows
            of ``credit``; "constant" divides by the number of images in either case.
        clip_low, clip_high, beta: see `grpo_loss`; beta = 0 keeps no reference model, and is
            required if reinforced image tokens are sampled with truncation.
        updates: optimizer steps per rollout.
        draw_at_once: the most images that are drawn at once; None: all of a process's. On a GPU
            many at once take little longer than few, but the keys and values of each image are 2 ·
            layers · kv_heads · head_dim · (image tokens − 1) numbers of ``rollout_dtype``, besides
            its prompt's: for Janus-Pro-1B in bfloat16 113 MB; with guidance twice as much. There
            this memory stays allocated during the update. A layout's images are drawn together, so
            the bound is at least ``group`` and ``gate_group``. The 64 images of an evaluation's
            `quick_scores` are drawn at once all the same. A run may resume with another value.
        rollout_dtype: dtype of the weights that rollouts are drawn and grounded with: "float32",
            the trained weights themselves, or "bfloat16", a copy made before each rollout: on a GPU
            a decode step then reads half as much and uses the tensor cores, for 2 more bytes a
            weight. ``sampler_gap`` logs how far the sampler's log-probabilities are from the
            trainer's; the ratio of `grpo_loss` compares only the trainer's own.
        importance_cap: upper limit of a token's importance weight, its probability under the
            trainer over that under the sampler (`grpo_loss`; ``capped`` logs the share of weights
            at the cap). None: no weights; if either side works in bfloat16, samples of another
            policy then go uncorrected.
        export: the weights that a run exports: "best", those with the judge's highest IoU on 256
            validation layouts of ShapesWorld, or "last", the choice for layouts of another world.
        val_drawings: how often each of these layouts is drawn in an evaluation. With one drawing
            each, sampling noise alone moves the judge's IoU by as much as a few hundred steps do.
        gate_scenes, gate_group: validation layouts, and images of each, on which the self-reward is
            compared with the judge before the first step.
        gate_bound: lowest within-group rank correlation of the two at which training starts,
            measured over at least a quarter of the layouts.
        force: start even if this check fails.
        loop: the step loop; ``save_every`` and ``eval_every`` are multiples of ``updates``.
        start: fingerprint of the model that the run began with; filled in by the stage.
        layouts_hash: hash of the bytes of a file of layouts, so that a run on an edited file does
            not pass for the same run; filled in by the stage.
        order: as in stage 1, of the training layouts or those of a file.
    """

    loop: LoopConfig
    layouts: str = "real"
    scenes: int = 40_000
    batch: int = 8
    group: int = 8
    sampling: Sampling = field(default_factory=Sampling)
    policy: Literal["image", "boxes", "both"] = "image"
    w_iou: float = 0.5
    w_l1: float = 0.5
    credit: Literal["image", "object"] = "image"
    advantage: Literal["grpo", "dr_grpo", "rloo", "rank"] = "grpo"
    normalise: Literal["sequence", "token", "constant"] = "sequence"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.01
    updates: int = 1
    gate_scenes: int = 64
    gate_group: int = 8
    gate_bound: float = 0.3
    force: bool = False
    start: str = ""
    rollout_dtype: Literal["float32", "bfloat16"] = later("float32")
    layouts_hash: str = later("")
    reward_boxes: int = later(0)
    importance_cap: float | None = later(2.0, was=None)
    val_drawings: int = later(8, was=1)
    export: Literal["best", "last"] = later("best")
    order: Literal["epochs", "independent"] = later("epochs", was="independent")
    draw_at_once: int | None = later(None)

    @property
    def truncated(self) -> bool:
        """Whether sampling may cut codes off. (It cuts none if the codebook has at most ``top_k``
        codes, but the configuration does not know its size.)"""
        return self.sampling.top_k > 0 or self.sampling.top_p < 1

    def __post_init__(self) -> None:
        _one_of("policy", self.policy, ("image", "boxes", "both"))
        _one_of("credit", self.credit, ("image", "object"))
        _one_of("rollout_dtype", self.rollout_dtype, ("float32", "bfloat16"))
        _one_of("advantage", self.advantage, MODES)
        _one_of("normalise", self.normalise, ("sequence", "token", "constant"))
        _one_of("export", self.export, ("best", "last"))
        _one_of("order", self.order, ORDERS)
        _at_least(self, 2, "group", "gate_group")
        _at_least(self, 1, "scenes", "batch", "updates", "gate_scenes", "val_drawings")
        _at_least(self, 0, "reward_boxes", "w_iou", "w_l1", "clip_low", "clip_high")
        _at_least(self, 1, "importance_cap")
        if self.importance_cap == float("inf"):  # not a JSON number
            raise ValueError("importance_cap = inf; give a finite cap, or none for no weights")
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta = {self.beta}; it must be finite and 0 or more")
        for name in ("save_every", "eval_every"):
            if (every := getattr(self.loop, name)) % self.updates:
                raise ValueError(
                    f"{name} = {every}; with updates = {self.updates} it must be a multiple of it, "
                    f"since a rollout cannot be repeated from weights that moved on"
                )
        for name in ("group", "gate_group"):
            most = self.draw_at_once
            if most is not None and most < (images := getattr(self, name)):
                raise ValueError(
                    f"draw_at_once = {most} with {name} = {images}: the images of a layout are "
                    f"drawn together; set draw_at_once to {images} or more, or to none for all"
                )
        if self.reward_boxes and self.policy != "image":
            raise ValueError(
                f"reward_boxes = {self.reward_boxes} with policy = {self.policy!r}: a box that is "
                f"reinforced is rewarded for itself; set reward_boxes = 0, or policy = 'image'"
            )
        self._check_scorable()

    def _check_scorable(self) -> None:
        """Refuse sampling that cannot be scored exactly as it was drawn, since the gradient would
        be silently biased."""
        s = self.sampling
        if self.policy == "boxes":
            return  # images are not scored
        if s.temperature < 0.01:
            raise ValueError(
                f"temperature = {s.temperature}; image tokens that are reinforced must be sampled: "
                f"set it to 0.01 or more, or policy = 'boxes'"
            )
        if s.scheduled:
            raise ValueError(
                f"cfg_schedule = {s.cfg_schedule!r}, cfg_span = {s.cfg_span}: the trainer scores "
                f"image tokens at one guidance scale; set one cfg for all positions, or policy = "
                f"'boxes'"
            )
        if s.cfg == 0:
            raise ValueError("cfg = 0 draws without looking at the layout; set it above 0 (1: off)")
        if self.truncated and self.updates > 1:
            raise ValueError(
                f"updates = {self.updates} with top_k = {s.top_k}, top_p = {s.top_p}: after the "
                f"first update a code may lie outside what the new policy keeps, and then it has "
                f"no probability to score; set updates to 1, or top_k to 0 and top_p to 1"
            )
        if self.truncated and self.rollout_dtype != "float32":
            raise ValueError(
                f"rollout_dtype = {self.rollout_dtype!r} with top_k = {s.top_k}, top_p = "
                f"{s.top_p}: by its rounding the trainer may not keep a code that was drawn, and "
                f"then it has no probability to score; set rollout_dtype to 'float32', or top_k to "
                f"0 and top_p to 1"
            )
        if self.truncated and self.beta > 0:
            raise ValueError(
                f"beta = {self.beta} with top_k = {s.top_k}, top_p = {s.top_p}: a code may lie "
                f"outside what the reference keeps, and then their divergence is infinite; set "
                f"beta to 0, or top_k to 0 and top_p to 1"
            )


@dataclass(frozen=True)
class Recipe:
    """A whole model: its image tokenizer and its stages.

    ``pmtp_on`` continues stage 1 from its own model, with the learning rate raised again.
    """

    name: str
    vq: VQConfig
    pmtp: PMTPConfig
    pmtp_on: PMTPConfig
    djo: DJOConfig
    cycle_rl: CycleRLConfig


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} = {value}; it must be at least {least}")


def _above_zero(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} = {value}; it must be finite and above 0")


def _multiple_of(config: Any, unit: int, name: str) -> None:
    if (value := getattr(config, name)) % unit:
        raise ValueError(f"{name} = {value}; it must be a multiple of {unit}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} = {value!r}; choose {' or '.join(map(repr, known))}")


def to_json(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON-ready data."""
    data: dict[str, Any] = json.loads(json.dumps(_told(config)))
    return data


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """Where two configurations differ, as "loop.steps 100 → 200"."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in dict.fromkeys([*old, *new])
            for line in differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
        ]
    return [] if old == new else [f"{at} {old} → {new}"]


def _told(config: Any) -> dict[str, Any]:
    """A dataclass as a dictionary, without `later` fields that have their original value."""
    told = {}
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            told[part.name] = _told(value)
        elif "was" not in part.metadata or value != part.metadata["was"]:
            told[part.name] = value
    return told
