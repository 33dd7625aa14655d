"""LUT: learning with unmasked tokens. MAE, and a loss by which the visible tokens learn the context of the image.

    python recipes/lut.py                                                 MNIST, minutes on a laptop
    python recipes/lut.py --data DIR                                      images of your own
    torchrun --nproc_per_node=8 recipes/lut.py --preset imagenet --data DIR

Paper: Learning with Unmasked Tokens Drives Stronger Vision Learners, ECCV 2024.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from common import networks
from common.config import Count, Must, NonNegative, Optimization, Share
from common.data.views import WeakStrong
from common.pretraining import pretrain
from common.recipe import SMALL_DECODER, BaseConfig, Normalize, Rand, Recipe, changed, embedded, finetuning, folder
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
    """Settings of the context loss between two views of an image, for any method that predicts pixels."""

    loss: Literal["both", "context"] = "both"
    """both: pixels of masked patches and context of visible ones; context: the latter only, without a decoder"""
    context_weight: NonNegative = 0.25
    """weight of the context loss, relative to the pixel loss; 0: pixel loss of the first views only"""
    momentum: Share = 0.996
    """initial EMA momentum of the teacher, which rises to 1 by half a cosine"""
    head_depth: Annotated[tuple[int, int], Must("0 or more", lambda x: min(x) >= 0)] = (2, 2)
    """number of linear layers of the projector and of the predictor; 0: identity"""
    head_width: Count = 4096
    """width of the hidden layers of projector and predictor"""
    head_norm: networks.HeadNorm = "batch"
    """norm of the hidden layers; batch norm needs about 64 images per micro-batch"""
    sync_norm: bool = True
    """synchronize batch norm over all devices; without, only running statistics are averaged"""


@dataclass(frozen=True)
class Config(ContextConfig):
    """The settings of the paper are the preset "imagenet"."""

    mask_ratio: float = 0.75
    """share of the patches that is masked"""
    normalize_target: bool = True
    """predict pixels normalized per patch"""


class LUT(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        self.encoder, decoder = networks.encoder_and_decoder(config.data, config.network)
        self.decoder = decoder if config.loss == "both" else None
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        self.projector, self.predictor = heads(self.encoder.dim, config)
        self.config, self.normalize, self.view_size = config, normalize, config.data.image_size
        self.views = WeakStrong(self.view_size, flip=config.data.flip)
        self.num_masked = networks.count_masked(self.height * self.width, config.mask_ratio)
        self.num_visible = self.height * self.width - self.num_masked
        networks.initialize_mae(self)
        self.teacher = networks.Teacher(self.student())

    def student(self) -> nn.ModuleList:
        """Return the networks of which the teacher is an exponential moving average."""
        return nn.ModuleList([self.encoder, self.projector])

    def noise(self, rand: Rand, batch: int) -> dict[str, Tensor]:
        networks.refuse_single_images(self, batch)
        return {"mask": rand(batch, self.height * self.width)}

    def forward(self, images: ViewPair, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        # 1. Split two views of each image into patches; the second is shifted and has color jitter.
        views = [patchify(self.normalize(view), patch=self.patch) for view in images]
        # 2. Mask most patches of both, so that no position of the grid is visible in both.
        (visible, masked), (others, _) = self.split(noise)
        # 3. Encode the visible patches of each view.
        latent = self.encoder(take(views[0], visible), self.encoder.positions[visible])
        other_latent = self.encoder(take(views[1], others), self.encoder.positions[others])
        # 4. From the mean visible token, predict the teacher's projection of all patches of the other view.
        means = latent[:, 1:].mean(dim=1), other_latent[:, 1:].mean(dim=1)
        losses = context_losses(self, means, torch.cat(views))
        # 5. From the tokens of the first view, predict the pixels of its masked patches, as in MAE.
        if self.decoder is not None:
            target = self.target(take(views[0], masked))
            losses["pixels"] = squared_error(self.decoder(latent, visible, masked), target).mean()
            losses["loss"] = losses["pixels"] + losses["loss"]
        return losses

    def split(self, noise: dict[str, Tensor]) -> tuple[ViewPair, ViewPair]:
        """Return the indices of visible and masked patches of both views."""
        first, second = disjoint_views(noise["mask"], num_visible=self.num_visible)
        left = min(self.num_visible, self.num_masked)  # the second view only has patches not visible in the first
        tokens = self.height * self.width
        return split(first, num_masked=self.num_masked), split(second, num_masked=tokens - left)

    def target(self, patches: Tensor) -> Tensor:
        """Return the pixels to predict."""
        return normalized_patches(patches) if self.config.normalize_target else patches

    def after_step(self, progress: Tensor) -> None:
        """Update the teacher after each optimizer step."""
        update_teacher(self, progress)

    def pictures(self, images: ViewPair, noise: dict[str, Tensor]) -> Pictures:
        """Draw both views and the reconstruction of the first."""
        masks, pixels = disjoint_views(noise["mask"], num_visible=self.num_visible), None
        if self.decoder is not None:
            visible, masked = self.split(noise)[0]
            patches = patchify(self.normalize(images[0]), patch=self.patch)
            latent = self.encoder(take(patches, visible), self.encoder.positions[visible])
            pixels = self.decoder(latent, visible, masked), self.target(take(patches, masked)), masked
        return view_pictures(self, images, masks, pixels)


def heads(dim: int, config: ContextConfig) -> tuple[nn.Module, nn.Module]:
    """Build the projector and the predictor."""
    how = {"width": config.head_width, "norm": config.head_norm, "together": config.sync_norm}
    return networks.mlp(dim, depth=config.head_depth[0], **how), networks.mlp(dim, depth=config.head_depth[1], **how)


def context_losses(method: Any, means: ViewPair, patches: Tensor) -> dict[str, Tensor]:
    """Compare predictions from the means of visible tokens with the teacher's projections of the other view.

    The spread of the projections is logged: 0 if they collapse to a point, 1 if they are uniform on the sphere.
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
    """Update the moving average, including the running statistics of batch norm."""
    networks.share_statistics(method)
    networks.ema_update(method.teacher, method.student(), networks.cosine_momentum(progress, method.config.momentum))


def view_pictures(
    method: Any, images: ViewPair, masks: ViewPair, pixels: tuple[Tensor, Tensor, Tensor] | None
) -> Pictures:
    """Draw both views, and the reconstruction of the first from prediction, target and indices of its patches."""
    sizes = {"height": method.height, "width": method.width, "patch": method.patch}
    first, second = (method.normalize.unit(view) for view in images)
    drawn = Pictures({"input": first, "seen": gray_out(first, masks[0], **sizes)})
    if pixels is not None:
        drawn = reconstruction(method.normalize, first, *pixels, **sizes)
    more = {"second view": second, "seen of it": gray_out(second, masks[1], **sizes)}
    return Pictures(drawn.columns | more, "the teacher encodes all patches of both views; " + drawn.note)


IMAGENET = Config(optimization=Optimization(epochs=1600, sqrt_rule_at=4096), finetune=finetuning.LUT)
# Views are nearly uncropped; momentum for a few hundred steps, the paper's is for 500,000
SHORT: dict[str, Any] = {"crop_scale": (0.2, 1.0), "momentum": 0.99, "head_width": 384}
PRESETS = {
    **embedded(IMAGENET, sqrt_rule_at=None, **SHORT, **SMALL_DECODER),
    **folder(IMAGENET, small={"momentum": 0.99, "head_width": 384}, sqrt_rule_at=None, head_width=2048),
    "imagenet": IMAGENET,
    "imagenet_large": changed(IMAGENET, size="large", finetune=finetuning.LUT_LARGE),
}
NAMES = {r"head\.": "projector.", **MAE_FAMILY}
RECIPE = Recipe(LUT, PRESETS, NAMES, optional=(r"decoder\.", r"projector\.", r"predictor\."), unused=("crop_scale",))

if __name__ == "__main__":
    pretrain(RECIPE, name="lut", description=__doc__)
