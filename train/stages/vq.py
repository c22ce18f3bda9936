"""Trains the image tokenizer: `JanusVQVAE` with a straight-through estimator over l2-normalised
codes.

The `forward` in `transformers` decodes indices, which stops the reconstruction's gradient at the
codes, so the quantiser is written out here. First a plain autoencoder learns features, and k-means
over them seeds the codebook. Then codes follow their features by moving averages (van den Oord et
al. 2017, appendix A.1) on the unit sphere, and codes that fall out of use are replaced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import JanusVQVAE, JanusVQVAEConfig

from echogen.engine.images.vision import decode_codes, encode_image, to_pixels
from echogen.train.config import VQConfig
from echogen.train.data.scenes import load_scenes, render
from echogen.train.data.shapes import GROUND, sample_scene
from echogen.train.stages.ahead import Ahead
from echogen.train.stages.passes import worth_logging
from echogen.train.stages.stage import TrainingError

VAL_SCENES = 256
DEAD_AFTER = 0.05  # a code whose moving count (in vectors per step) falls below this is replaced


def build_vq(config: VQConfig, width: int) -> JanusVQVAE:
    """A fresh `JanusVQVAE`; ``width`` is the transformer's, which Janus stores in this config."""
    side = config.image_size >> (len(config.multipliers) - 1)
    vq = JanusVQVAE(
        JanusVQVAEConfig(
            embed_dim=config.code_dim,
            num_embeddings=config.codes,
            latent_channels=config.latent,
            base_channels=config.channels,
            channel_multiplier=list(config.multipliers),
            num_res_blocks=config.res_blocks,
            num_patches=side,
            projection_dim=width,
            image_token_embed_dim=width,
        )
    )
    # `transformers` initialises every convolution with std 0.02, whatever its fan-in. That is too
    # small for these widths: the reconstruction stays at the mean colour for hundreds of steps.
    for module in vq.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    return vq


def patch_groups(pixels: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Group the B·grid² patches of pixels [B, 3, H, W], in raster order, by equality of all pixels:
    (first patch of each group [G], group of each patch [B·grid²]), int64."""
    side = pixels.shape[-1] // grid
    patches = pixels.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5)
    flat = np.ascontiguousarray(patches.reshape(-1, 3 * side * side).cpu().numpy())
    rows = flat.view(np.dtype((np.void, flat.itemsize * flat.shape[1]))).ravel()
    _, first, group = np.unique(rows, return_index=True, return_inverse=True)
    return torch.from_numpy(first).to(pixels.device), torch.from_numpy(group).to(pixels.device)


def group_means(features: Tensor, group: Tensor) -> Tensor:
    """Mean of features [N, D] over each group of ``group`` [N] → [G, D]."""
    count = torch.bincount(group)[:, None]
    return features.new_zeros(len(count), features.shape[1]).index_add(0, group, features) / count


def nearest(points: Tensor, table: Tensor) -> Tensor:
    """Codes int64 [N] of unit vectors [N, C] in a codebook [V, C], found as in drawing and
    grounding: in float32, whatever dtype training multiplies in. In bfloat16 one distinct patch in
    ten got another code."""
    with torch.autocast(points.device.type, enabled=False):
        return (points @ table.T).argmax(-1)


def disagreement(features: Tensor, mean: Tensor) -> Tensor:
    """Share of the variance of features [N, D] that lies within groups of equal patches, around
    each feature's group ``mean`` [N, D]. 0: a feature depends on its patch alone. As it is a share,
    shrinking all features gains nothing."""
    total = (features - features.mean(0)).square().sum()
    return (features - mean).square().sum() / total.clamp(min=1e-12)


def background_nats(pixels: Tensor, codes: Tensor) -> float:
    """Entropy, in nats, of the codes [B, T] of patches that are plain ground in pixels
    [B, 3, H, W]: noise that the transformer would have to guess (0: one code for all)."""
    grid = round(codes.shape[1] ** 0.5)
    ground = to_pixels(np.array([[[GROUND]]], dtype=np.uint8))
    plain = (pixels == ground).all(1, keepdim=True).float()
    plain = F.avg_pool2d(plain, pixels.shape[-1] // grid).flatten(1) == 1
    count = torch.bincount(codes[plain]).double()
    return float(torch.special.entr(count / count.sum().clamp(min=1)).sum())


class Codebook(nn.Module):
    """The moving averages behind a codebook; buffers, so that checkpoints carry them."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.ones(codes))
        self.register_buffer("total", torch.zeros(codes, dim))
        self.count: Tensor
        self.total: Tensor


class VQModule(nn.Module):
    """The tokenizer and its codebook's averages."""

    def __init__(self, vq: JanusVQVAE) -> None:
        super().__init__()
        self.vq = vq
        self.averages = Codebook(*vq.quantize.embedding.weight.shape)
        # Codes follow moving averages, not gradients.
        vq.quantize.embedding.weight.requires_grad_(False)


class VQStage:
    """Stage 0: reconstruct the world's pictures through the codebook."""

    name = "vq"

    def __init__(self, config: VQConfig, width: int) -> None:
        self.config = config
        torch.manual_seed(config.loop.seed)
        self.module = VQModule(build_vq(config, width)).train()
        self._val = to_pixels(render(load_scenes("val", VAL_SCENES), config.image_size))
        self._pictures = Ahead(lambda step, part, parts: self._batch(step))
        self._votes: tuple[Tensor, Tensor] | None = None  # distinct patches' features and codes

    def _batch(self, step: int) -> Tensor:
        """Fresh pictures of the training split. Whether the judge can read them does not matter
        here, and drawing them unjudged takes 0.2 ms each instead of 6.6 ms."""
        first = step * self.config.batch
        indices = range(first, first + self.config.batch)
        scenes = [sample_scene("train", i, judged=False) for i in indices]
        pixels = to_pixels(render(scenes, self.config.image_size))
        return pixels.to(self.module.averages.count.device)

    def begin(self) -> dict[str, float]:
        """Nothing to measure before the first step."""
        return {}

    @property
    def images(self) -> int:
        """See `Stage`."""
        return self.config.batch

    def inputs(self, step: int) -> dict[str, Any]:
        """See `Stage`."""
        return {"pixels": self._batch(step)}

    def ahead(self, step: int, part: int, parts: int) -> None:
        """See `Stage`."""
        self._pictures.prepare(step, part, parts)

    def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        vq, pixels = self.module.vq, self._pictures.take(step, 0, 1)
        raw = vq.quant_conv(vq.encoder(pixels)).float()
        features = F.normalize(raw, dim=1)
        points = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        group = patch_groups(pixels, features.shape[-1])[1]
        mean = group_means(points, group)
        differ = disagreement(points, mean[group])
        commit = torch.zeros(())
        self._votes, latents = None, features
        if step >= self.config.warmup_steps:
            if step == self.config.warmup_steps:
                self._seed_codebook()
            table = vq.quantize.embedding.weight
            means = F.normalize(mean.detach(), dim=-1)
            codes = nearest(means, table)
            self._votes = means, codes
            b, _, h, w = features.shape
            quantised = table[codes[group]].view(b, h, w, -1).permute(0, 3, 1, 2)
            commit = F.mse_loss(features, quantised)
            latents = features + (quantised - features).detach()
        output = vq.decoder(vq.post_quant_conv(latents)).float()
        pixel = F.l1_loss(output, pixels) + F.mse_loss(output, pixels)
        loss = pixel + self.config.commitment * commit + self.config.agreement * differ
        numbers = {"loss": loss, "pixel": pixel, "commit": commit, "differ": differ}
        return loss, worth_logging(numbers)

    @torch.no_grad()
    def _seed_codebook(self) -> None:
        """Spherical k-means over the features of distinct patches, from 64 batches of pictures.

        Two thirds of all patches are plain background, and k-means, which follows density, would
        give it a third of the codes.
        """
        vq = self.module.vq
        batches = [self._batch(self.config.loop.steps + i) for i in range(64)]
        raw = torch.cat([vq.quant_conv(vq.encoder(pixels)).float() for pixels in batches])
        points = F.normalize(raw, dim=1).permute(0, 2, 3, 1).reshape(-1, raw.shape[1])
        points = points[patch_groups(torch.cat(batches), raw.shape[-1])[0]]
        if len(points) < self.config.codes:
            raise TrainingError(
                f"codes = {self.config.codes}, but {len(batches)} batches of {self.config.batch} "
                f"images have only {len(points)} distinct patches; take fewer codes, or a larger "
                f"batch"
            )
        generator = torch.Generator().manual_seed(self.config.loop.seed)
        picks = torch.randperm(len(points), generator=generator)
        table = points[picks[: self.config.codes]].clone()
        for _ in range(20):
            codes = nearest(points, table)
            total = torch.zeros_like(table).index_add_(0, codes, points)
            count = torch.bincount(codes, minlength=len(table))
            total = torch.where(count[:, None] > 0, total, table)  # an empty cluster stays
            table = F.normalize(total, dim=-1)
        self._set_codebook(table, table.new_ones(len(table)))

    def _set_codebook(self, table: Tensor, count: Tensor) -> None:
        self.module.vq.quantize.embedding.weight.copy_(table)
        self.module.averages.count.copy_(count)
        self.module.averages.total.copy_(table * count[:, None])

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self._votes is None:
            return
        features, codes = self._votes
        averages, decay = self.module.averages, self.config.ema
        table = self.module.vq.quantize.embedding.weight
        count = torch.bincount(codes, minlength=len(table)).float()
        total = torch.zeros_like(table).index_add_(0, codes, features)
        averages.count.lerp_(count, 1 - decay)
        averages.total.lerp_(total, 1 - decay)
        dead = averages.count < DEAD_AFTER
        if step < 0.8 * self.config.loop.steps and dead.any():
            # Replaced by the features that their codes fit worst.
            served = (features * table[codes]).sum(-1)
            worst = features[served.argsort()[: int(dead.sum())]]
            averages.total[dead] = F.pad(worst, (0, 0, 0, int(dead.sum()) - len(worst)), value=1.0)
            averages.count[dead] = 1.0
        table.copy_(F.normalize(averages.total, dim=-1))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Pixel error, entropy of the ground's codes, share of codes in use, and the judge's scores
        on reconstructions."""
        from echogen.train.eval.tables import judge_boxes

        vq = self.module.vq
        codes = torch.cat([encode_image(vq, p) for p in self._val.split(32)])
        output = torch.cat([decode_codes(vq, c) for c in codes.split(32)]).cpu()
        scores = judge_boxes(output, load_scenes("val", len(output)))
        return {
            "l1": float(F.l1_loss(output, self._val)),
            "background_nats": background_nats(self._val, codes.cpu()),
            "codes_used": len(codes.unique()) / self.config.codes,
            **scores,
        }

    def export(self, folder: Path) -> None:
        self.module.vq.save_pretrained(folder)
