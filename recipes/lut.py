"""LUT: learning with unmasked tokens. The tokens that MAE encodes but gives no target learn the context of the image.

    python recipes/lut.py                                                 the embedded digits, minutes on a laptop
    python recipes/lut.py --data DIR                                      images of your own
    torchrun --nproc_per_node=8 recipes/lut.py --preset imagenet --data DIR

Paper: Learning with Unmasked Tokens Drives Stronger Vision Learners, ECCV 2024.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from common import recipe
from common.config import Count, Must, NonNegative, Optimization, Share
from common.data.normalize import Normalize
from common.data.views import WeakStrong
from common.evaluation import finetuning
from common.networks.building import count_masked, encoder_and_decoder
from common.networks.ema import cosine_momentum, ema_copy, ema_update
from common.networks.initialization import initialize_mae
from common.networks.projectors import HeadNorm, mlp, refuse_single_images, share_statistics
from common.pretraining import pretrain
from common.recipe import SMALL_DECODER, Recipe, digits, folder
from common.report.pictures import Pictures, gray_out
from common.report.reconstruction import reconstruction
from mimkit.losses import cosine_distance, normalized_patches, squared_error
from mimkit.masking import disjoint_views
from mimkit.tokens import patchify, split, take

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ViewPair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ContextConfig(recipe.Config):
    """How the context of an image is learned from two views of it, whatever predicts pixels beside it."""

    loss: Literal["both", "context"] = "both"
    """both: the pixels of masked patches and the context of visible ones; context: the latter alone, without decoder"""
    context_weight: NonNegative = 0.25
    """weight of the context loss beside that of the pixels; 0: pixels alone, on the first views"""
    momentum: Share = 0.996
    """momentum of the teacher's moving average in the first step; it rises to 1 as half a cosine"""
    head_depth: Annotated[tuple[int, int], Must("0 or more", lambda x: min(x) >= 0)] = (2, 2)
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
        self.teacher = ema_copy(self.student()).eval()

    def student(self) -> nn.ModuleList:
        """Return the networks of which the teacher is a moving average."""
        return nn.ModuleList([self.encoder, self.projector])

    def train(self, mode: bool = True) -> "LUT":
        """Train the student; the teacher stays in evaluation mode: its batch norm uses the running statistics."""
        super().train(mode)
        self.teacher.eval()
        return self

    def noise(self, rand: Callable[..., Tensor], batch: int) -> dict[str, Tensor]:
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
        """Update the teacher, with the running statistics of batch norm."""
        share_statistics(self)
        ema_update(self.teacher, self.student(), cosine_momentum(progress, self.config.momentum))

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
    projector, predictor = (mlp(dim, depth=depth, **how) for depth in config.head_depth)
    return projector, predictor


def context_losses(method: Any, means: ViewPair, patches: Tensor) -> dict[str, Tensor]:
    """Compare what is predicted from the visible tokens of each view with the teacher's projection of the other view.

    Args:
        method: has `config`, `projector`, `predictor` and `teacher`, encoder and projector.
        means: of the visible tokens of both views; batch norm sees the first view before the second.
        patches: all of both views, one behind the other.

    Returns:
        the weighted loss, the loss itself, and the spread of the teacher's projections over the images: 0 where all are
        alike, so that there is nothing to learn from it, and 1 where they are spread evenly.
    """
    first, second = (method.predictor(method.projector(mean)) for mean in means)
    with torch.no_grad():
        encoder, projector = method.teacher
        projections = projector(encoder(patches, encoder.positions)[:, 1:].mean(dim=1))
    target, other_target = projections.chunk(2)
    context = (cosine_distance(second, target) + cosine_distance(first, other_target)).mean() / 2
    spread = F.normalize(target.float(), dim=-1).std(dim=0, correction=0).mean() * target.shape[-1] ** 0.5
    return {"loss": method.config.context_weight * context, "context": context, "spread": spread}


def view_pictures(
    method: Any, images: ViewPair, masks: ViewPair, pixels: tuple[Tensor, Tensor, Tensor] | None
) -> Pictures:
    """Draw both views, and prediction, target and indices of patches of the first one."""
    sizes = {"height": method.height, "width": method.width, "patch": method.patch}
    first, second = (method.normalize.unit(view) for view in images)
    drawn = Pictures({"input": first, "seen": gray_out(first, masks[0], **sizes)})
    if pixels is not None:
        drawn = reconstruction(method, first, *pixels)
    more = {"second view": second, "seen of it": gray_out(second, masks[1], **sizes)}
    note = "the student encodes the visible patches of the second view, the teacher all of them"
    return Pictures(drawn.columns | more, "; ".join(filter(None, (drawn.note, note))))


# From the names of the published checkpoints to ours; they come without predictor and teacher
NAMES = {
    r"head\.": "projector.",
    r"mask_token": "decoder.mask_token",
    r"decoder_(embed|blocks|norm)\.": r"decoder.\1.",
    r"decoder_pred\.": "decoder.head.",
    r"(?=cls_token|pos_embed|patch_embed|blocks|norm)": "encoder.",
}

IMAGENET = Config(optimization=Optimization(epochs=1600, sqrt_rule_at=4096), finetune=finetuning.LUT)
LINEAR = {"sqrt_rule_at": None}  # small batches follow the linear rule
PRESETS = {
    # momentum of some hundred steps; the paper's is of 500,000
    "digits": digits(IMAGENET, crop_scale=(0.2, 1.0), momentum=0.99, head_width=384, **SMALL_DECODER, **LINEAR),
    "folder": folder(IMAGENET, head_width=2048, **LINEAR),
    "imagenet": IMAGENET,
}
RECIPE = Recipe(LUT, PRESETS, NAMES, optional=(r"decoder\.", r"projector\.", r"predictor\."))

if __name__ == "__main__":
    pretrain(RECIPE, name="lut", description=__doc__)
