"""LoMaR: local masked reconstruction. Cut small windows out of the image, mask most of each, predict its pixels.

    python recipes/lomar.py                                               the embedded digits, minutes on a laptop
    python recipes/lomar.py --data DIR --image-size 448 448               large images of your own
    torchrun --nproc_per_node=8 recipes/lomar.py --preset imagenet --data DIR

Paper: Local Masked Reconstruction for Efficient Self-Supervised Learning on High-resolution Images, arXiv 2206.00790.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from common import recipe
from common.config import Optimization, SettingsError
from common.data.normalize import Normalize
from common.networks.building import grid
from common.networks.initialization import initialize_mae
from common.networks.vit import SIZES, ViT
from common.pretraining import pretrain
from common.recipe import Recipe, digits, folder
from common.report.pictures import Pictures, framed, gray_out
from mimkit.losses import normalized_patches, squared_error
from mimkit.masking import random_tokens
from mimkit.positions import sincos
from mimkit.relative import relative_buckets
from mimkit.tokens import put, split, take, take_patches, unpatchify
from mimkit.windows import distinct_anchors, random_anchors, window_patches

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Config(recipe.Config):
    """The settings of the paper are the preset "imagenet". --decoder-… has no effect: there is no decoder."""

    windows: int = 4
    """of each image"""
    window_size: int = 7
    """rows and columns of a window, in patches"""
    mask_ratio: float = 0.8
    """share of the patches of a window that is masked, rounded down"""
    positions: Literal["relative", "absolute"] = "relative"
    """said to attention by offsets of each two patches (iRPE), so that a window knows not where it is; or added"""
    anchors: Literal["distinct", "independent"] = "distinct"
    """distinct: no two windows of an image share their first row or their first column; independent: anywhere"""
    windows_of: Literal["image", "batch"] = "image"
    """image: each image has windows of its own; batch: all images at a time share them"""
    normalize_target: bool = True
    """predict pixels normalized per patch, better for accuracy"""


class LoMaR(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        data, network = config.data, config.network
        self.config, self.normalize, self.view_size, self.patch = config, normalize, data.image_size, network.patch
        self.height, self.width = grid(data, network)
        self.count, self.size, self.num_masked = self.check(config)
        relative = config.positions == "relative"
        self.encoder = ViT(
            height=self.height,
            width=self.width,
            patch=network.patch,
            channels=data.channels,
            **SIZES[network.size],
            table=None if relative else sincos,
            relative="contextual" if relative else None,
            mask_token=True,
        )
        self.head = nn.Linear(self.encoder.dim, network.patch**2 * data.channels)
        buckets = relative_buckets(height=self.size, width=self.size) if relative else None  # alike in all windows
        self.register_buffer("buckets", buckets, persistent=False)
        initialize_mae(self)

    def check(self, config: Config) -> tuple[int, int, int]:
        """Return the number of windows, their side, and how many patches of each are masked."""
        count, size, places = config.windows, config.window_size, min(self.height, self.width) - config.window_size + 1
        if size < 1 or places < 1:
            raise SettingsError(
                f"--window-size {size} does not fit into a grid of {self.height} × {self.width} patches"
            )
        if count < 1 or (config.anchors == "distinct" and count > places):
            raise SettingsError(f"--windows {count}: 1 to {places} have a first row and a first column of their own")
        masked = int(size**2 * config.mask_ratio) if 0 < config.mask_ratio < 1 else 0
        if not 0 < masked < size**2:
            raise SettingsError(f"--mask-ratio {config.mask_ratio} of {size**2} patches does not leave both kinds")
        return count, size, masked

    def noise(self, rand: Callable[..., Tensor], batch: int) -> dict[str, Tensor]:
        mask = {"mask": rand(batch, self.count, self.size**2)}
        if self.config.anchors == "independent":
            return {"anchors": rand(batch, self.count, 2)} | mask
        rows, columns = (rand(batch, side - self.size + 1) for side in (self.height, self.width))
        return {"rows": rows, "columns": columns} | mask

    def forward(self, images: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        # 1. Place small windows in each image, as (images, windows, patches); each then is a row of its own.
        windows = self.patches_of(self.anchors(noise))
        # 2. Read the pixels of their patches: nothing else of the image is looked at.
        patches = take_patches(images, windows.flatten(1), patch=self.patch)
        patches = self.normalize.patches(patches).unflatten(1, (self.count, -1)).flatten(0, 1)
        # 3. Mask most patches of each window at random.
        mask = random_tokens(noise["mask"].flatten(0, 1), num_masked=self.num_masked)
        visible, masked = split(mask, num_masked=self.num_masked)
        # 4. Encode each window alone: the visible patches embedded, one learned vector in the place of each masked one.
        tokens = self.encode(take(patches, visible), mask, windows.flatten(0, 1))
        # 5. Predict the pixels of those that are masked by one linear layer.
        prediction = self.head(take(tokens, masked))
        # 6. Compare with the pixels, normalized per patch.
        target = take(patches, masked)
        if self.config.normalize_target:
            target = normalized_patches(target)
        return {"loss": squared_error(prediction, target).mean()}

    def anchors(self, noise: dict[str, Tensor]) -> Tensor:
        """Return row and column of the first patch of each window: (images, windows, 2)."""
        if self.config.anchors == "independent":
            side = {"window_height": self.size, "window_width": self.size}
            anchors = random_anchors(noise["anchors"], height=self.height, width=self.width, **side)
        else:
            anchors = distinct_anchors(noise["rows"], noise["columns"], num_windows=self.count)
        if self.config.windows_of == "batch":
            return anchors[:1].expand_as(anchors)
        return anchors

    def patches_of(self, anchors: Tensor) -> Tensor:
        return window_patches(anchors, width=self.width, window_height=self.size, window_width=self.size)

    def encode(self, patches: Tensor, mask: Tensor, windows: Tensor) -> Tensor:
        """Encode windows of which the visible patches are given; the class token is left out of what is returned."""
        places = None if self.encoder.pos_embed is None else self.encoder.positions[windows]
        return self.encoder(patches, places, mask=mask, buckets=self.buckets)[:, 1:]

    def pictures(self, images: Tensor, noise: dict[str, Tensor]) -> Pictures:
        image, side = self.normalize.unit(images), {"height": self.size, "width": self.size, "patch": self.patch}
        anchors = self.anchors(noise)[:, 0]  # of the first window of each image
        windows, mask = self.patches_of(anchors), random_tokens(noise["mask"][:, 0], num_masked=self.num_masked)
        visible, masked = split(mask, num_masked=self.num_masked)
        pixels = take_patches(image, windows, patch=self.patch)
        patches = self.normalize.patches(pixels)
        prediction = self.head(take(self.encode(take(patches, visible), mask, windows), masked))
        note = "the window is the first of its image, enlarged; reconstruction: its visible patches are the image's"
        if self.config.normalize_target:  # undo what `normalized_patches` did
            hidden = take(patches, masked)
            scale = (hidden.var(dim=-1, keepdim=True) + 1e-6).sqrt()
            prediction = prediction * scale + hidden.mean(dim=-1, keepdim=True)
            note += (
                ", and the others have the brightness and contrast of the true ones, which the network does not predict"
            )
        filled = self.normalize.undo_patches(put(prediction.to(patches.dtype), masked, patches))

        window = unpatchify(pixels, **side)
        place = {"patch": self.patch, "rows": self.size, "columns": self.size}
        columns = {
            "image": torch.stack(
                [framed(one, *anchor, **place) for one, anchor in zip(image, anchors.tolist(), strict=True)]
            ),
            "window": window,
            "seen": gray_out(window, mask, **side),
            "reconstruction": unpatchify(filled, **side),
        }
        return Pictures(columns, note)


# From the names of the published checkpoints to ours; their position table is never read
NAMES = {r"encoder_pred\.": "head.", r"(?=cls_token|mask_token|patch_embed|blocks|norm)": "encoder."}

IMAGENET = Config(optimization=Optimization(epochs=1600, warmup_epochs=80))
PRESETS = {"digits": digits(IMAGENET, window_size=4), "folder": folder(IMAGENET), "imagenet": IMAGENET}
RECIPE = Recipe(LoMaR, PRESETS, NAMES)

if __name__ == "__main__":
    pretrain(RECIPE, name="lomar", description=__doc__)
