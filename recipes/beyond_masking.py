"""Beyond Masking, the six single tasks: degrade an image in one of several ways, and predict the original.

    python recipes/beyond_masking.py --task distorted                    MNIST, minutes on a laptop
    python recipes/beyond_masking.py --task zoom_in --data DIR           images of your own
    torchrun --nproc_per_node=8 recipes/beyond_masking.py --task blurred --preset imagenet --data DIR

Paper: Beyond Masking: Demystifying Token-Based Pre-Training for Vision Transformers, arXiv 2203.14313.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from common.config import Must, Network, Optimization, PositiveShare, PositiveShares, SettingsError, Share
from common.networks import count_masked, encoder_and_decoder, initialize_truncated
from common.pretraining import pretrain
from common.recipe import SMALL_DECODER, BaseConfig, Normalize, Rand, Recipe, changed, embedded, finetuning, folder
from common.report import Pictures, gray_out, reconstruction
from mimkit import degrade
from mimkit.losses import channel_normalized_patches, squared_error
from mimkit.masking import all_but_block, random_tokens
from mimkit.positions import sinusoid
from mimkit.tokens import patchify, split, take

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Config(BaseConfig):
    """The settings of the paper are the preset "imagenet". Options of tasks other than --task are ignored."""

    task: Literal["masked", "zoom_in", "zoom_out", "distorted", "blurred", "decolorized"] = "masked"
    """how images are degraded"""
    mask_ratio: float = 0.75
    """masked: share of the patches that is masked"""
    mask: Literal["random", "block"] = "random"
    """masked: random patches, or all patches outside a block at a random position"""
    zoom: Literal["center", "anywhere", "view", "inner"] = "center"
    """zoom_in: enlarge the central or a random window; or predict a larger view or the border from the center"""
    window: PositiveShare = 160 / 224
    """zoom_in: side of the window, as a fraction of the image"""
    shrunken: PositiveShares = (160 / 224,)
    """zoom_out: side of the shrunken image, as a fraction; one of several is drawn at random for each image"""
    fill: Literal["mirror", "black", "foreign", "none"] = "mirror"
    """zoom_out: surroundings of the shrunken image: reflections, black, the next image of the batch, or none"""
    distortion: Literal["fisheye", "lossless", "wave"] = "fisheye"
    """distorted: a fisheye, a fisheye of a larger view that preserves all pixels of the image, or a horizontal wave"""
    twist: tuple[float, float] = (0.20, 0.25)
    """distorted: range of the strength of the fisheye"""
    wave: tuple[float, float] = (0.1, 10.0)
    """distorted: amplitude and frequency of the wave"""
    kernels: Annotated[tuple[int, ...], Must("odd numbers", lambda x: x and all(k > 0 and k % 2 for k in x))] = (9,)
    """blurred: side of the random kernel in pixels; one of several is drawn at random for each image"""
    mix: bool = False
    """blurred: kernels that mix the channels"""
    saturation: Share = 0.3
    """decolorized: factor of the saturation"""


class Task(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder_and_decoder(
            config.data, config.network, class_token=False, key_bias=False, embed_bias=False, table=sinusoid
        )
        self.config, self.normalize, self.channels = config, normalize, config.data.channels
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        self.image_size = config.data.image_size
        part = {"view": 7 / 10, "lossless": 7 / 9}.get(self.variant, 1.0)  # image side as a fraction of the view
        H, W = (side + 2 * round(side * (1 / part - 1) / 2) for side in self.image_size)
        self.view_size = (H, W)
        # Rows and columns of the visible block of the grid, for the variants that have one
        part = {"block": max(0.0, 1 - config.mask_ratio) ** 0.5, "inner": config.window, "none": min(config.shrunken)}
        self.inner = [round(part.get(self.variant, 1) * side) for side in (self.height, self.width)]
        seen = {"zoom_in": config.window, "zoom_out": min(config.shrunken)}.get(config.task, 1)
        if min(*self.inner, *(round(side * seen) for side in self.image_size)) < 1:
            raise SettingsError(f"--task {config.task}: nothing would be left of images of {H} × {W}")
        tokens, random = self.height * self.width, self.variant == "random"
        self.num_masked = count_masked(tokens, config.mask_ratio) if random else tokens - self.inner[0] * self.inner[1]
        initialize_truncated(self)

    @property
    def variant(self) -> str:
        """Return the variant of the task."""
        c = self.config
        forms = {"masked": c.mask, "zoom_in": c.zoom, "zoom_out": c.fill, "distorted": c.distortion}
        return forms.get(c.task, c.task)

    def noise(self, rand: Rand, batch: int) -> dict[str, Tensor]:
        noise = {"mask": rand(batch, self.height * self.width), "place": rand(batch, 3)}
        if self.config.task == "blurred":
            count, side = self.channels ** (2 if self.config.mix else 1), max(self.config.kernels)
            noise["kernels"] = rand(batch, count, side, side)
        return noise

    def forward(self, images: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        prediction, target, _ = self.reconstruct(images, noise)
        # 4. The loss is the mean squared error.
        return {"loss": squared_error(prediction, target).mean()}

    def reconstruct(self, images: Tensor, noise: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return prediction, target and indices of the predicted patches."""
        # 1. Degrade the images; the target is the original, in [0, 1].
        degraded, original = self.degrade(self.normalize.unit(images), noise)
        # 2. Encode the visible patches of the degraded images, which are all patches in most tasks.
        visible, masked = split(self.mask(noise), num_masked=self.num_masked)
        latent = self.encode(degraded, visible)
        # 3. Predict all patches of the original, or only the masked ones, normalized per patch and channel.
        hidden_only = self.config.task == "masked" or self.variant == "inner"
        prediction = self.decoder(latent, visible, masked, visible_too=not hidden_only)
        indices = masked if hidden_only else torch.cat([visible, masked], dim=-1)
        target = take(patchify(original, patch=self.patch), indices)
        return prediction, channel_normalized_patches(target, channels=self.channels), indices

    def degrade(self, view: Tensor, noise: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the degraded images, normalized, and the originals, in [0, 1]."""
        c, (H, W), place = self.config, self.image_size, noise["place"]
        x = self.normalize(view)
        match self.variant:
            case "center" | "anywhere":  # the margins of a central window are equal
                H, W = (side - 2 * round(side * (1 - c.window) / 2) for side in (H, W))
                if self.variant == "center":
                    return degrade.zoom_in(x, window_H=H, window_W=W), view
                return degrade.zoom_in_anywhere(x, place[:, :2], window_H=H, window_W=W), view
            case "view":
                return degrade.central_crop(x, H=H, W=W), degrade.area_resize(view, H=H, W=W)
            case "mirror" if len(c.shrunken) > 1:
                sizes = tuple((round(H * share), round(W * share)) for share in c.shrunken)
                return degrade.zoom_out_any_size(x, place, sizes=sizes), view
            case "mirror":
                small = {"small_H": round(H * min(c.shrunken)), "small_W": round(W * min(c.shrunken))}
                return degrade.zoom_out(x, place[:, :2], **small), view
            case "black" | "foreign":
                small = degrade.area_resize(x, H=round(H * min(c.shrunken)), W=round(W * min(c.shrunken)))
                black = self.normalize(torch.zeros_like(view))
                return degrade.paste(small, black if self.variant == "black" else x.roll(1, dims=0), place[:, :2]), view
            case "none":
                return degrade.area_resize(x, H=self.inner[0] * self.patch, W=self.inner[1] * self.patch), view
            case "fisheye":
                return degrade.fisheye(x, place, least_twist=c.twist[0], most_twist=c.twist[1]), view
            case "lossless":
                bent = degrade.fisheye(x, place, least_twist=c.twist[0], most_twist=c.twist[1])
                return degrade.area_resize(bent, H=H, W=W), degrade.central_crop(view, H=H, W=W)
            case "wave":
                return degrade.wave(x, amplitude=c.wave[0], frequency=c.wave[1]), view
            case "blurred":
                kernels = degrade.random_kernels_any_size(noise["kernels"], place[:, 0], sizes=c.kernels, std=0.02)
                return degrade.convolve_each(x, kernels), view
            case "decolorized":
                return self.normalize(degrade.decolorize(view, saturation=c.saturation)), view
            case _:  # only masking
                return x, view

    def mask(self, noise: dict[str, Tensor]) -> Tensor:
        """Return the mask of patches hidden from the encoder, none in most tasks."""
        if self.variant == "random":
            return random_tokens(noise["mask"], num_masked=self.num_masked)
        place = noise["place"][:, :2] if self.variant == "block" else torch.full_like(noise["place"][:, :2], 0.5)
        inner = {"block_height": self.inner[0], "block_width": self.inner[1]}
        return all_but_block(place, height=self.height, width=self.width, **inner)

    def encode(self, degraded: Tensor, visible: Tensor) -> Tensor:
        """Encode the visible patches of an image, or all patches of a smaller image."""
        patches = patchify(degraded, patch=self.patch)
        patches = patches if self.variant == "none" else take(patches, visible)
        return self.encoder(patches, self.encoder.positions[visible])

    def pictures(self, images: Tensor, noise: dict[str, Tensor]) -> Pictures:
        """Draw the degraded images and their reconstructions."""
        degraded, original = self.degrade(self.normalize.unit(images), noise)
        seen, sizes = self.normalize.undo(degraded), {"height": self.height, "width": self.width, "patch": self.patch}
        seen = gray_out(seen, self.mask(noise), **sizes) if self.num_masked and self.variant != "none" else seen
        return reconstruction(self.normalize, original, *self.reconstruct(images, noise), **sizes, seen=seen)


# Maps the names of the released model to ours
NAMES = {r"mask_token": "decoder.mask_token", r"encoder_to_decoder\.": "decoder.embed."}

IMAGENET = Config(
    network=Network(decoder_dim=384, decoder_depth=4, decoder_heads=6),
    optimization=Optimization(
        epochs=300, batch_size=2048, warmup_epochs=20, min_lr=1e-5, schedule="step", undecayed=("mask_token",)
    ),
    finetune=finetuning.BEYOND_MASKING,
)
PRESETS = {
    **embedded(IMAGENET, kernels=(5,), **SMALL_DECODER),  # for small images; the paper's 9 are for 224 pixels
    **folder(IMAGENET, small={"kernels": (5,)}),
    "imagenet": IMAGENET,
    "imagenet_large": changed(IMAGENET, size="large", decoder_dim=512, decoder_depth=8, decoder_heads=8),
}
RECIPE = Recipe(Task, PRESETS, NAMES)

if __name__ == "__main__":
    pretrain(RECIPE, name="beyond_masking", description=__doc__)
