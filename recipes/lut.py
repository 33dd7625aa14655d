"""LUT: learning with unmasked tokens. The tokens that MAE encodes but gives no target learn the context of the image.

    python recipes/lut.py                                                 the embedded digits, minutes on a laptop
    python recipes/lut.py --data DIR                                      images of your own
    torchrun --nproc_per_node=8 recipes/lut.py --preset imagenet --data DIR

Paper: Learning with Unmasked Tokens Drives Stronger Vision Learners, ECCV 2024.
"""

from dataclasses import dataclass
from typing import Any, Literal

from common.config import Count, NonNegative, Optimization, Share
from common.data.views import WeakStrong
from common.networks import (
    HeadNorm,
    Teacher,
    cosine_momentum,
    count_masked,
    ema_update,
    encoder_and_decoder,
    initialize_mae,
    mlp,
    refuse_single_images,
    share_statistics,
)
from common.pretraining import pretrain
from common.recipe import SMALL_DECODER, BaseConfig, Normalize, Rand, Recipe, digits, finetuning, folder
from common.report import Pictures, gray_out, reconstruction
from common.weights.published_names import MAE_FAMILY
from mimkit.losses import cosine_distance, normalized_patches, squared_error
from mimkit.masking import disjoint_views
from mimkit.tokens import patchify, split, take

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ViewPair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ContextConfig(BaseConfig):
    """How the context of an image is learned from two views of it, whatever predicts pixels beside it."""

    loss: Literal["both", "context"] = "both"
    """both: the pixels of masked patches and the context of visible ones; context: the latter alone, without decoder"""
    context_weight: NonNegative = 0.25
    """weight of the context loss beside that of the pixels; 0: pixels alone, on the first views"""
    momentum: Share = 0.996
    """momentum of the teacher's moving average in the first step; it rises to 1 as half a cosine"""
    head_depth: tuple[int, int] = (2, 2)
    """linear layers of the projector and of the predictor; 0: none"""
    head_width: Count = 4096
    """width between the layers of a head"""
    head_norm: HeadNorm = "batch"
    """between the layers of a head; batch norm needs some 64 images per micro-batch"""
    sync_norm: bool = True
    """synchronized batch norm, over all devices; without, each has its own, and running statistics are averaged"""


@dataclass(frozen=True)
class Config(ContextConfig):
    """The settings of the paper are the preset "imagenet". --crop-scale has no effect: views show nearly all of it."""

    mask_ratio: float = 0.75
    """share of the patches that is masked"""
    normalize_target: bool = True
    """predict pixels normalized per patch"""


class LUT(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        self.encoder, decoder = encoder_and_decoder(config.data, config.network)
        self.decoder = decoder if config.loss == "both" else None
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        self.projector, self.predictor = heads(self.encoder.dim, config)
        self.config, self.normalize, self.view_size = config, normalize, config.data.image_size
        self.views = WeakStrong(self.view_size, flip=config.data.flip)
        self.num_masked = count_masked(self.height * self.width, config.mask_ratio)
        self.num_visible = self.height * self.width - self.num_masked
        initialize_mae(self)
        self.teacher = Teacher(self.student())

    def student(self) -> nn.ModuleList:
        """Return the networks of which the teacher is a moving average."""
        return nn.ModuleList([self.encoder, self.projector])

    def noise(self, rand: Rand, batch: int) -> dict[str, Tensor]:
        refuse_single_images(self, batch)
        return {"mask": rand(batch, self.height * self.width)}

    def forward(self, images: ViewPair, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        # 1. Cut two views of each image into patches; the second has other colors, and is shifted.
        views = [patchify(self.normalize(view), patch=self.patch) for view in images]
        # 2. Mask most of both, so that no position of the grid is visible twice.
        (visible, masked), (others, _) = self.split(noise)
        # 3. Encode the visible patches of each.
        latent = self.encoder(take(views[0], visible), self.encoder.positions[visible])
        other_latent = self.encoder(take(views[1], others), self.encoder.positions[others])
        # 4. Project the mean of the visible tokens, and predict the projection of the other view by the teacher, which
        #    encodes all its patches.
        means = latent[:, 1:].mean(dim=1), other_latent[:, 1:].mean(dim=1)
        losses = context_losses(self, means, torch.cat(views))
        # 5. From the first view's tokens predict the pixels of its masked patches, as MAE does.
        if self.decoder is not None:
            target = self.target(take(views[0], masked))
            losses["pixels"] = squared_error(self.decoder(latent, visible, masked), target).mean()
            losses["loss"] = losses["pixels"] + losses["loss"]
        return losses

    def split(self, noise: dict[str, Tensor]) -> tuple[ViewPair, ViewPair]:
        """Return the indices of visible and masked patches of both views."""
        first, second = disjoint_views(noise["mask"], num_visible=self.num_visible)
        left = min(self.num_visible, self.num_masked)  # the second view has no more than what is left
        tokens = self.height * self.width
        return split(first, num_masked=self.num_masked), split(second, num_masked=tokens - left)

    def target(self, patches: Tensor) -> Tensor:
        """Return what is predicted of patches."""
        return normalized_patches(patches) if self.config.normalize_target else patches

    def after_step(self, progress: Tensor) -> None:
        update_teacher(self, progress)

    def pictures(self, images: ViewPair, noise: dict[str, Tensor]) -> Pictures:
        masks, pixels = disjoint_views(noise["mask"], num_visible=self.num_visible), None
        if self.decoder is not None:
            visible, masked = self.split(noise)[0]
            patches = patchify(self.normalize(images[0]), patch=self.patch)
            latent = self.encoder(take(patches, visible), self.encoder.positions[visible])
            pixels = self.decoder(latent, visible, masked), self.target(take(patches, masked)), masked
        return view_pictures(self, images, masks, pixels)


def heads(dim: int, config: ContextConfig) -> tuple[nn.Module, nn.Module]:
    """Build projector and predictor."""
    how = {"width": config.head_width, "norm": config.head_norm, "together": config.sync_norm}
    return mlp(dim, depth=config.head_depth[0], **how), mlp(dim, depth=config.head_depth[1], **how)


def context_losses(method: Any, means: ViewPair, patches: Tensor) -> dict[str, Tensor]:
    """Compare what is predicted from the means of visible tokens with the teacher's projection of the other view.

    The spread of its projections is 0 where all images are alike, 1 where they are spread evenly.
    """
    first, second = (method.predictor(method.projector(mean)) for mean in means)
    with torch.no_grad():
        encoder, projector = method.teacher
        projections = projector(encoder(patches, encoder.positions)[:, 1:].mean(dim=1))
    target, other_target = projections.chunk(2)
    context = (cosine_distance(second, target) + cosine_distance(first, other_target)).mean() / 2
    spread = F.normalize(target.float(), dim=-1).std(dim=0, correction=0).mean() * target.shape[-1] ** 0.5
    return {"loss": method.config.context_weight * context, "context": context, "spread": spread}


def update_teacher(method: Any, progress: Tensor) -> None:
    """Update the moving average, with the running statistics of batch norm."""
    share_statistics(method)
    ema_update(method.teacher, method.student(), cosine_momentum(progress, method.config.momentum))


def view_pictures(
    method: Any, images: ViewPair, masks: ViewPair, pixels: tuple[Tensor, Tensor, Tensor] | None
) -> Pictures:
    """Draw both views, and prediction, target and indices of patches of the first one."""
    sizes = {"height": method.height, "width": method.width, "patch": method.patch}
    first, second = (method.normalize.unit(view) for view in images)
    drawn = Pictures({"input": first, "seen": gray_out(first, masks[0], **sizes)})
    if pixels is not None:
        drawn = reconstruction(method.normalize, first, *pixels, **sizes)
    more = {"second view": second, "seen of it": gray_out(second, masks[1], **sizes)}
    return Pictures(drawn.columns | more, "of both views the teacher encodes all patches; " + drawn.note)


IMAGENET = Config(optimization=Optimization(epochs=1600, sqrt_rule_at=4096), finetune=finetuning.LUT)
# Views show nearly all of an image; momentum of some hundred steps, the paper's is of 500,000
DIGITS = {"crop_scale": (0.2, 1.0), "momentum": 0.99, "head_width": 384}
PRESETS = {
    "digits": digits(IMAGENET, sqrt_rule_at=None, **DIGITS, **SMALL_DECODER),
    "folder": folder(IMAGENET, sqrt_rule_at=None, head_width=2048),
    "imagenet": IMAGENET,
}
NAMES = {r"head\.": "projector.", **MAE_FAMILY}
RECIPE = Recipe(LUT, PRESETS, NAMES)

if __name__ == "__main__":
    pretrain(RECIPE, name="lut", description=__doc__)
