"""SimMIM: a simple framework for masked image modeling. Mask large cells, and predict their pixels by a linear layer.

    python recipes/simmim.py                                              MNIST, minutes on a laptop
    python recipes/simmim.py --data DIR                                   images of your own
    torchrun --nproc_per_node=8 recipes/simmim.py --preset imagenet --data DIR

Paper: SimMIM: A Simple Framework for Masked Image Modeling, arXiv 2111.09886.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from common.config import BelowOne, DataSettings, Must, Optimization
from common.networks import PixelHead, masking_encoder, whole_cells
from common.pretraining import pretrain
from common.recipe import DECODER, BaseConfig, Normalize, Rand, Recipe, changed, embedded, finetuning, folder
from mimkit.losses import absolute_error, window_normalized
from mimkit.masking import random_cells
from mimkit.tokens import patchify, split, take

from torch import Tensor, nn


@dataclass(frozen=True)
class CellConfig(BaseConfig):
    """Settings of masking by cells."""

    mask_ratio: float = 0.6
    """share of the cells that is masked; their number is rounded up"""
    cell: int = 32
    """side of a cell in pixels, a multiple of --patch; cells are masked as a whole"""
    drop_path: BelowOne = 0.1
    """drop path rate of the last block in pre-training, rising linearly from 0 in the first"""


@dataclass(frozen=True)
class Config(CellConfig):
    """The settings of the published code are the presets "imagenet" and "imagenet_100"."""

    target: Literal["pixels", "window"] = "pixels"
    """prediction target: the pixels, or each pixel normalized by the mean and variance of a window around it"""
    window: Annotated[int, Must("an odd number of at least 3", lambda x: x >= 3 and x % 2 == 1)] = 47
    """with --target window: side of the window in pixels, odd"""


class SimMIM(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        self.config, self.normalize, self.view_size = config, normalize, config.data.image_size
        self.encoder = masking_encoder(config.data, config.network, drop=config.drop_path)
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        self.head = PixelHead(self.patch, config.data.channels, self.encoder.dim)
        self.num_cells, self.cells = whole_cells(config.data, config.network, config.cell, config.mask_ratio)

    def noise(self, rand: Rand, batch: int) -> dict[str, Tensor]:
        noise = {"mask": rand(batch, self.num_cells)}
        return noise | {"drop_path": rand(batch, self.encoder.depth, 2)} if self.config.drop_path else noise

    def forward(self, images: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        prediction, target, _ = self.reconstruct(images, noise)
        # 4. The loss is the mean absolute error of the masked pixels.
        return {"loss": pixel_loss(prediction, target, patch=self.patch)}

    def reconstruct(self, images: Tensor, noise: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return prediction, target and indices of the patches in masked cells."""
        # 1. Mask large cells of the image at random.
        patches = patchify(self.normalize(images), patch=self.patch)
        mask = random_cells(noise["mask"], **self.cells)
        _, masked = split(mask, num_masked=self.cells["num_masked"])
        # 2. Encode all patches, with masked patches replaced by a learned mask token.
        tokens = self.encoder(patches, self.encoder.positions, noise.get("drop_path"), mask)
        # 3. Predict the pixels of the masked patches by a linear layer.
        return self.head(take(tokens[:, 1:], masked)), take(self.target(images), masked), masked

    def target(self, images: Tensor) -> Tensor:
        """Return the prediction target of every patch."""
        pixels = self.normalize(images)
        if self.config.target == "window":
            pixels = window_normalized(pixels, window=self.config.window)
        return patchify(pixels, patch=self.patch)


def pixel_loss(prediction: Tensor, target: Tensor, *, patch: int) -> Tensor:
    """Return the mean absolute error, with the published code's epsilon of 1e-5 in the denominator."""
    error = absolute_error(prediction, target)
    return error.sum() / (error.numel() + 1e-5 / patch**2)


# Maps the names of published checkpoints to ours
NAMES = {r"decoder\.0\.": "head.proj."}

IMAGENET = Config(
    data=DataSettings(crop_scale=(0.67, 1.0)),
    optimization=Optimization(
        epochs=800,
        batch_size=2048,
        base_lr=5e-5,  # for 256 images; the published 1e-4 is for 512
        schedule="last_step",
        milestones=(700.0,),
        warmup_epochs=10,
        warmup_lr=2e-6,  # for the whole batch; the published 5e-7 is for 512
        betas=(0.9, 0.999),
        undecayed=("cls_token",),
        clip=5.0,
    ),
    finetune=finetuning.SIMMIM,
)
# The published 100-epoch schedule, from Swin: for 512 images, initial 1e-6, peak 2e-4, final 1e-5
IMAGENET_100 = changed(IMAGENET, epochs=100, base_lr=1e-4, milestones=(), warmup_lr=4e-6, min_lr=4e-5)
CELLS: dict[str, Any] = {"mnist": {"cell": 4}, "digits": {"cell": 8}, "shapes": {"cell": 16}}
PRESETS = {
    **embedded(IMAGENET_100, **CELLS, crop_scale=(0.67, 1.0), warmup_lr=0.0, min_lr=0.0),
    **folder(IMAGENET_100, small={"cell": 16, "warmup_lr": 0.0, "min_lr": 0.0}, base_lr=2e-4, min_lr=5e-6),
    "imagenet": IMAGENET,
    "imagenet_100": IMAGENET_100,
}
RECIPE = Recipe(SimMIM, PRESETS, NAMES, unused=DECODER)

if __name__ == "__main__":
    pretrain(RECIPE, name="simmim", description=__doc__)
