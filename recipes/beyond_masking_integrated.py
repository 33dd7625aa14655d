"""Beyond Masking, integrated task: encode a quarter of the patches of the center, and predict a larger view.

    python recipes/beyond_masking_integrated.py                           MNIST, minutes on a laptop
    python recipes/beyond_masking_integrated.py --data DIR                images of your own
    torchrun --nproc_per_node=8 recipes/beyond_masking_integrated.py --preset imagenet --data DIR

Paper: Beyond Masking: Demystifying Token-Based Pre-Training for Vision Transformers, arXiv 2203.14313.
"""

from dataclasses import dataclass

from common.config import SettingsError
from common.networks import count_masked, encoder_and_decoder, initialize_truncated
from common.pretraining import pretrain
from common.recipe import SMALL_DECODER, BaseConfig, Normalize, Rand, Recipe, changed, embedded, folder
from common.report import Pictures, as_pixels, gray_out, shown
from mimkit.degrade import area_resize, central_crop
from mimkit.losses import band_error, channel_normalized_patches, squared_error
from mimkit.masking import random_tokens
from mimkit.positions import sinusoid
from mimkit.tokens import patchify, put, split, take, unpatchify

import torch
from beyond_masking import IMAGENET as TASKS
from beyond_masking import NAMES
from torch import Tensor, nn


@dataclass(frozen=True)
class Config(BaseConfig):
    """The settings of the paper are the preset "imagenet"."""

    view_size: tuple[int, int] = (320, 320)
    """height and width in pixels of the larger view to predict; must exceed --image-size by an even number"""
    mask_ratio: float = 0.75
    """share of the patches of the center that is masked"""
    inner_weight: float = 0.8
    """weight of the loss of the masked patches of the center"""
    outer_weight: float = 0.2
    """weight of the loss of the band around the center, the sum over its four strips"""


class Integrated(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder_and_decoder(
            config.data, config.network, class_token=False, key_bias=False, embed_bias=False, table=sinusoid
        )
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        self.config, self.normalize, self.channels = config, normalize, config.data.channels
        self.image_size, self.view_size = config.data.image_size, config.view_size
        for image, view in zip(self.image_size, self.view_size, strict=True):
            if view <= image or (view - image) % 2:
                raise SettingsError(f"--view-size {view} is not an even number more than --image-size {image}")
        self.num_masked = count_masked(self.height * self.width, config.mask_ratio)
        initialize_truncated(self)

    def noise(self, rand: Rand, batch: int) -> dict[str, Tensor]:
        return {"mask": rand(batch, self.height * self.width)}

    def forward(self, images: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        (H, W), (view_H, view_W) = self.image_size, self.view_size
        # 1. The input is the center of a larger view, without resizing.
        view = self.normalize.unit(images)
        center = central_crop(view, H=H, W=W)
        # 2. Mask most of its patches at random, encode the visible ones, and predict all patches.
        prediction, masked = self.predict(center, noise)
        # 3. The predictions form a small image of the larger view; enlarge it to the size of the view.
        image = area_resize(prediction, H=view_H, W=view_W)
        # 4. In the center, compare masked patches with the pixels normalized per patch and channel.
        prediction = take(patchify(central_crop(image, H=H, W=W), patch=self.patch), masked)
        target = channel_normalized_patches(take(patchify(center, patch=self.patch), masked), channels=self.channels)
        inner = squared_error(prediction, target).mean()
        # 5. In the band around it, compare with the view after downsampling, normalization and upsampling.
        outer = band_error(image, self.outer_target(view), inner_H=H, inner_W=W).sum(dim=-1).mean()
        loss = self.config.inner_weight * inner + self.config.outer_weight * outer
        return {"loss": loss, "inner": inner, "outer": outer}

    def predict(self, center: Tensor, noise: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the prediction of all patches as an image, and the indices of the masked ones."""
        patches = patchify(self.normalize(center), patch=self.patch)
        mask = random_tokens(noise["mask"], num_masked=self.num_masked)
        visible, masked = split(mask, num_masked=self.num_masked)
        latent = self.encoder(take(patches, visible), self.encoder.positions[visible])
        prediction = self.decoder(latent, visible, masked, visible_too=True).float()
        order = torch.cat([visible, masked], dim=-1)
        patches = put(prediction, order, into=torch.zeros_like(prediction))
        return unpatchify(patches, height=self.height, width=self.width, patch=self.patch), masked

    def outer_target(self, view: Tensor) -> Tensor:
        """Downsample the view to the size of the input, normalize its patches, and upsample the result."""
        small = patchify(area_resize(view, H=self.image_size[0], W=self.image_size[1]), patch=self.patch)
        normalized = channel_normalized_patches(small, channels=self.channels)
        picture = unpatchify(normalized, height=self.height, width=self.width, patch=self.patch)
        return area_resize(picture, H=self.view_size[0], W=self.view_size[1])

    def pictures(self, images: Tensor, noise: dict[str, Tensor]) -> Pictures:
        """Draw the visible patches of the center, and the reconstruction of the view from the predicted small image."""
        (H, W), (view_H, view_W) = self.image_size, self.view_size
        view = self.normalize.unit(images)
        center, small = central_crop(view, H=H, W=W), patchify(area_resize(view, H=H, W=W), patch=self.patch)
        prediction, target = self.predict(center, noise)[0], channel_normalized_patches(small, channels=self.channels)
        filled = as_pixels(patchify(prediction, patch=self.patch), target, small, channels=self.channels)
        sizes = {"height": self.height, "width": self.width, "patch": self.patch}
        seen = gray_out(center, random_tokens(noise["mask"], num_masked=self.num_masked), **sizes)
        rows, columns = (view_H - H) // 2, (view_W - W) // 2
        seen = nn.functional.pad(seen, (columns, columns, rows, rows), value=1.0)
        columns = {
            "input": view,
            "seen": seen,
            "reconstruction": area_resize(unpatchify(filled, **sizes), H=view_H, W=view_W),
        }
        columns["prediction"] = shown(area_resize(prediction, H=view_H, W=view_W))
        columns["target"] = shown(self.outer_target(view))
        note = "reconstruction: with the brightness and contrast of the true patches; prediction and target: normalized"
        return Pictures(columns, note)


IMAGENET = Config(network=TASKS.network, optimization=TASKS.optimization, finetune=TASKS.finetune)
VIEWS = {name: {"view_size": (side, side)} for name, side in (("mnist", 40), ("digits", 46), ("shapes", 80))}
PRESETS = {
    **embedded(IMAGENET, **SMALL_DECODER, **VIEWS),
    **folder(IMAGENET, small={"view_size": (138, 138)}),
    "imagenet": IMAGENET,
    "imagenet_large": changed(IMAGENET, size="large", decoder_dim=512, decoder_heads=8),
}
RECIPE = Recipe(Integrated, PRESETS, NAMES)

if __name__ == "__main__":
    pretrain(RECIPE, name="beyond_masking_integrated", description=__doc__)
