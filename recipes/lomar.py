"""LoMaR: local masked reconstruction. Crop small windows from the image, mask most of each, and predict its pixels.

    python recipes/lomar.py                                               MNIST, minutes on a laptop
    python recipes/lomar.py --data DIR --image-size 448 448               large images of your own
    torchrun --nproc_per_node=8 recipes/lomar.py --preset imagenet --data DIR

Paper: Local Masked Reconstruction for Efficient Self-Supervised Learning on High-resolution Images, arXiv 2206.00790.
"""

from dataclasses import dataclass
from typing import Any, Literal

from common.config import Optimization, SettingsError
from common.networks import build_vit, initialize_mae
from common.pretraining import pretrain
from common.recipe import DECODER, BaseConfig, Normalize, Rand, Recipe, embedded, folder
from common.report import Pictures, framed, reconstruction
from mimkit.losses import normalized_patches, squared_error
from mimkit.masking import random_tokens
from mimkit.positions import sincos
from mimkit.relative import relative_buckets
from mimkit.tokens import split, take, take_patches, unpatchify
from mimkit.windows import distinct_anchors, random_anchors, window_patches

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Config(BaseConfig):
    """The settings of the paper are the preset "imagenet"."""

    windows: int = 4
    """number of windows per image"""
    window_size: int = 7
    """side of a window in patches"""
    mask_ratio: float = 0.8
    """share of the patches of a window that is masked; their number is rounded down"""
    positions: Literal["relative", "absolute"] = "relative"
    """contextual relative position encoding (iRPE), independent of the window's position; or sine-cosine embeddings"""
    anchors: Literal["distinct", "independent"] = "distinct"
    """distinct: no two windows of an image share their first row or their first column; independent: no constraint"""
    windows_of: Literal["image", "batch"] = "image"
    """image: draw windows for each image; batch: all images of a micro-batch share the windows"""
    normalize_target: bool = True
    """predict pixels normalized per patch, which improves the accuracy"""


class LoMaR(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        relative = config.positions == "relative"
        positions = {"table": None, "relative": "contextual"} if relative else {"table": sincos}
        self.encoder = build_vit(config.data, config.network, mask_token=True, **positions)
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        self.config, self.normalize, self.view_size = config, normalize, config.data.image_size
        self.count, self.size, self.num_masked = self.check(config)
        self.head = nn.Linear(self.encoder.dim, self.patch**2 * config.data.channels)
        buckets = relative_buckets(height=self.size, width=self.size) if relative else None  # the same in all windows
        self.register_buffer("buckets", buckets, persistent=False)
        initialize_mae(self)

    def check(self, config: Config) -> tuple[int, int, int]:
        """Validate the settings, and return the number and side of the windows, and of masked patches in each."""
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

    def noise(self, rand: Rand, batch: int) -> dict[str, Tensor]:
        mask = {"mask": rand(batch, self.count, self.size**2)}
        if self.config.anchors == "independent":
            return {"anchors": rand(batch, self.count, 2)} | mask
        rows, columns = (rand(batch, side - self.size + 1) for side in (self.height, self.width))
        return {"rows": rows, "columns": columns} | mask

    def forward(self, images: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        # 1. Place small windows in each image, (images, windows, patches).
        windows = self.patches_of(self.anchors(noise))
        # 2. Take only the patches of these windows from the image, and flatten images and windows into one axis.
        patches = take_patches(images, windows.flatten(1), patch=self.patch)
        patches = self.normalize.patches(patches).unflatten(1, (self.count, -1)).flatten(0, 1)
        # 7. The loss is the mean squared error of the masked patches.
        prediction, target, _ = self.predict(patches, windows.flatten(0, 1), noise["mask"].flatten(0, 1))
        return {"loss": squared_error(prediction, target).mean()}

    def predict(self, patches: Tensor, windows: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return prediction, target and indices of the masked patches of windows."""
        # 3. Mask most patches of each window at random.
        mask = random_tokens(noise, num_masked=self.num_masked)
        visible, masked = split(mask, num_masked=self.num_masked)
        # 4. Encode each window separately, with masked patches replaced by a learned mask token.
        positions = None if self.encoder.pos_embed is None else self.encoder.positions[windows]
        tokens = self.encoder(take(patches, visible), positions, mask=mask, buckets=self.buckets)[:, 1:]
        # 5. Predict the pixels of masked patches by a linear layer.
        prediction = self.head(take(tokens, masked))
        # 6. The target is these pixels, normalized per patch.
        target = take(patches, masked)
        return prediction, normalized_patches(target) if self.config.normalize_target else target, masked

    def anchors(self, noise: dict[str, Tensor]) -> Tensor:
        """Return row and column of the first patch of each window, (images, windows, 2)."""
        if self.config.anchors == "independent":
            side = {"window_height": self.size, "window_width": self.size}
            anchors = random_anchors(noise["anchors"], height=self.height, width=self.width, **side)
        else:
            anchors = distinct_anchors(noise["rows"], noise["columns"], num_windows=self.count)
        return anchors[:1].expand_as(anchors) if self.config.windows_of == "batch" else anchors

    def patches_of(self, anchors: Tensor) -> Tensor:
        """Return the indices of the patches of each window."""
        return window_patches(anchors, width=self.width, window_height=self.size, window_width=self.size)

    def pictures(self, images: Tensor, noise: dict[str, Tensor]) -> Pictures:
        """Draw the first window of each image and its reconstruction."""
        image, side = self.normalize.unit(images), dict[str, Any](height=self.size, width=self.size, patch=self.patch)
        anchors = self.anchors(noise)[:, 0]  # of the first window of each image
        windows = self.patches_of(anchors)
        pixels = take_patches(image, windows, patch=self.patch)
        predicted = self.predict(self.normalize.patches(pixels), windows, noise["mask"][:, 0])
        drawn = reconstruction(self.normalize, unpatchify(pixels, **side), *predicted, **side)
        place = {"patch": self.patch, "rows": self.size, "columns": self.size}
        frames = [framed(one, *anchor, **place) for one, anchor in zip(image, anchors.tolist(), strict=True)]
        note = "input: the first window of its image, enlarged; " + drawn.note
        return Pictures({"image": torch.stack(frames), **drawn.columns}, note)


# Maps the names of published checkpoints to ours; their position table is not used
NAMES = {r"encoder_pred\.": "head.", r"(?=cls_token|mask_token|patch_embed|blocks|norm)": "encoder."}

IMAGENET = Config(optimization=Optimization(epochs=1600, warmup_epochs=80))
PRESETS = {**embedded(IMAGENET, window_size=4), **folder(IMAGENET, small={"window_size": 6}), "imagenet": IMAGENET}
RECIPE = Recipe(LoMaR, PRESETS, NAMES, unused=DECODER)

if __name__ == "__main__":
    pretrain(RECIPE, name="lomar", description=__doc__)
