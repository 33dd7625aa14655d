"""Beyond Masking, integrated task: see a quarter of the patches of the center, predict the whole larger view.

    python recipes/beyond_masking_integrated.py                           the embedded digits, minutes on a laptop
    python recipes/beyond_masking_integrated.py --data DIR                images of your own
    torchrun --nproc_per_node=8 recipes/beyond_masking_integrated.py --preset imagenet --data DIR

Paper: Beyond Masking: Demystifying Token-Based Pre-Training for Vision Transformers, arXiv 2203.14313.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from common import finetuning
from common.config import Flat, Images, Network, Optimization, Run
from common.finetuning import Finetuning
from common.images import Normalize
from common.pretraining import Evaluation, count_masked, encoder_and_decoder, pretrain
from common.report import Pictures, gray_out, shown
from common.vit import initialize_truncated
from mimkit.degrade import area_resize, central_crop
from mimkit.losses import band_error, channel_normalized_patches, squared_error
from mimkit.masking import random_tokens
from mimkit.positions import sinusoid
from mimkit.tokens import patchify, put, split, take, unpatchify

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The settings of the paper are the preset "imagenet"."""

    view_size: tuple[int, int] = (320, 320)
    """height and width of the larger view that is predicted, in pixels; an even number more than --image-size"""
    mask_ratio: float = 0.75
    """share of the patches of the center that is masked"""
    inner_weight: float = 0.8
    """weight of the masked patches of the center"""
    outer_weight: float = 0.2
    """weight of the band around it, the sum of its four strips"""
    evaluate: tuple[Evaluation, ...] = ("finetune",)
    """fine-tune the encoder; the same network from scratch for as many epochs, for as much time; judge it frozen"""
    run: Flat[Run] = field(default_factory=Run)
    images: Flat[Images] = field(default_factory=Images)
    network: Flat[Network] = field(default_factory=Network)
    optimization: Flat[Optimization] = field(default_factory=Optimization)
    finetune: Finetuning = field(default_factory=Finetuning)


class Integrated(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder_and_decoder(
            config.images, config.network, class_token=False, key_bias=False, embed_bias=False, table=sinusoid
        )
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        self.channels = self.encoder.channels
        self.image_size, self.view_size = config.images.image_size, config.view_size
        for image, view in zip(self.image_size, self.view_size, strict=True):
            if view <= image or (view - image) % 2:
                raise ValueError(f"--view-size {view} is not an even number more than --image-size {image}")
        self.inner_weight, self.outer_weight = config.inner_weight, config.outer_weight
        self.num_masked = count_masked(self.height * self.width, config.mask_ratio)
        self.normalize = normalize
        initialize_truncated(self)

    def noise(self, rand: Callable[..., Tensor], batch: int) -> dict[str, Tensor]:
        return {"mask": rand(batch, self.height * self.width)}

    def forward(self, images: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        (H, W), (view_H, view_W) = self.image_size, self.view_size
        # 1. The input is the center of a larger view, its pixels untouched.
        view = self.normalize.unit(images)
        center = central_crop(view, H=H, W=W)
        patches = patchify(self.normalize(center), patch=self.patch)
        # 2. Mask most of its patches at random, and encode only those that are visible.
        mask = random_tokens(noise["mask"], num_masked=self.num_masked)
        visible, masked = split(mask, num_masked=self.num_masked)
        latent = self.encoder(take(patches, visible), self.encoder.positions[visible])
        # 3. Predict all patches: together they are a small picture of the whole view, stretched to its size.
        picture = area_resize(self.predict(latent, visible, masked), H=view_H, W=view_W)
        # 4. In the center, compare where the input was masked, with pixels normalized per patch and channel.
        prediction = take(patchify(central_crop(picture, H=H, W=W), patch=self.patch), masked)
        target = channel_normalized_patches(take(patchify(center, patch=self.patch), masked), channels=self.channels)
        inner = squared_error(prediction, target).mean()
        # 5. In the band around it, compare with the whole view: shrunken, normalized, and stretched again.
        outer = band_error(picture, self.outer_target(view), inner_H=H, inner_W=W).sum(dim=-1).mean()
        return {"loss": self.inner_weight * inner + self.outer_weight * outer, "inner": inner, "outer": outer}

    def predict(self, latent: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Predict all patches, put them back in raster order, and make them a picture."""
        prediction = self.decoder(latent, visible, masked, visible_too=True).float()
        order = torch.cat([visible, masked], dim=-1)
        patches = put(prediction, order, into=torch.zeros_like(prediction))
        return unpatchify(patches, height=self.height, width=self.width, patch=self.patch)

    def outer_target(self, view: Tensor) -> Tensor:
        """Shrink the view to the input's size, normalize its patches there, and stretch the picture back."""
        small = patchify(area_resize(view, H=self.image_size[0], W=self.image_size[1]), patch=self.patch)
        normalized = channel_normalized_patches(small, channels=self.channels)
        picture = unpatchify(normalized, height=self.height, width=self.width, patch=self.patch)
        return area_resize(picture, H=self.view_size[0], W=self.view_size[1])

    def pictures(self, images: Tensor, noise: dict[str, Tensor]) -> Pictures:
        sizes = {"height": self.height, "width": self.width, "patch": self.patch}
        (H, W), (view_H, view_W) = self.image_size, self.view_size
        view = self.normalize.unit(images)
        center = central_crop(view, H=H, W=W)
        mask = random_tokens(noise["mask"], num_masked=self.num_masked)
        visible, masked = split(mask, num_masked=self.num_masked)
        patches = take(patchify(self.normalize(center), patch=self.patch), visible)
        prediction = self.predict(self.encoder(patches, self.encoder.positions[visible]), visible, masked)
        rows, columns = (view_H - H) // 2, (view_W - W) // 2
        seen = nn.functional.pad(gray_out(center, mask, **sizes), (columns, columns, rows, rows), value=1.0)
        return Pictures(
            {
                "input": view,
                "seen": seen,
                "prediction": shown(area_resize(prediction, H=view_H, W=view_W)),
                "target": shown(self.outer_target(view)),
            },
            "prediction and target are normalized per patch and channel: its brightness and contrast are not in them",
        )


# Names of the released model, for `common.checkpoint.load_weights`; its class token is never used
NAMES = {r"mask_token": "decoder.mask_token", r"encoder_to_decoder\.": "decoder.embed."}

IMAGENET = Config(
    network=Network(decoder_dim=384, decoder_depth=4, decoder_heads=6),
    optimization=Optimization(
        epochs=300, batch_size=2048, warmup_epochs=20, min_lr=1e-5, schedule="step", undecayed=("mask_token",)
    ),
    finetune=finetuning.BEYOND_MASKING,
)
FOLDER = replace(
    IMAGENET,
    evaluate=("finetune", "scratch"),
    network=replace(IMAGENET.network, size="small"),
    optimization=replace(IMAGENET.optimization, batch_size=256),
    finetune=finetuning.FOLDER,
)
DIGITS = Config(
    view_size=(46, 46),
    evaluate=("finetune", "scratch", "budget"),
    images=Images(image_size=(32, 32), channels=1, crop_scale=(0.6, 1.0), flip=0.0),
    network=Network(size="nano", patch=4, decoder_dim=48, decoder_depth=1, decoder_heads=3),
    optimization=Optimization(
        epochs=40,
        batch_size=64,
        base_lr=4e-3,
        warmup_epochs=4,
        min_lr=1e-5,
        schedule="step",
        undecayed=("mask_token",),
    ),
    finetune=finetuning.DIGITS,
)

METHOD, PRESETS = Integrated, {"digits": DIGITS, "folder": FOLDER, "imagenet": IMAGENET}

if __name__ == "__main__":
    pretrain(METHOD, PRESETS, name="beyond_masking_integrated", description=__doc__)
