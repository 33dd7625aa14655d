"""SimMIM: a simple framework for masked image modeling. Mask large cells, predict their pixels by one linear layer.

    python recipes/simmim.py                                              the embedded digits, minutes on a laptop
    python recipes/simmim.py --data DIR                                   images of your own
    torchrun --nproc_per_node=8 recipes/simmim.py --preset imagenet --data DIR

Paper: SimMIM: A Simple Framework for Masked Image Modeling, arXiv 2111.09886.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from common import finetuning
from common.checkpoint import load_weights, read_foreign
from common.config import Flat, Images, Network, Optimization, Run
from common.finetuning import Finetuning
from common.images import Normalize
from common.pretraining import Evaluation, masking_encoder, pretrain, whole_cells
from common.report import Pictures, gray_out, shown
from common.vit import PixelHead
from mimkit.losses import absolute_error, window_normalized
from mimkit.masking import random_cells
from mimkit.tokens import patchify, put, split, take, unpatchify

from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The settings of the published code are the presets "imagenet" and "imagenet_100"."""

    mask_ratio: float = 0.6
    """share of the cells that is masked, rounded up"""
    cell: int = 32
    """side of a cell in pixels, a multiple of --patch; a cell is masked whole or not at all"""
    target: Literal["pixels", "window"] = "pixels"
    """what is predicted: the pixels; or these normalized by the mean and variance of a window around each"""
    window: int = 47
    """of --target window: its side in pixels, odd"""
    drop_path: float = 0.1
    """drop path of the last block, rising linearly from 0, in pre-training"""
    weights: Path | None = None
    """start from a published checkpoint of SimMIM with a ViT"""
    evaluate: tuple[Evaluation, ...] = ("finetune",)
    """fine-tune the encoder; the same network from scratch for as many epochs, for as much time; judge it frozen"""
    run: Flat[Run] = field(default_factory=Run)
    images: Flat[Images] = field(default_factory=Images)
    network: Flat[Network] = field(default_factory=Network)
    optimization: Flat[Optimization] = field(default_factory=Optimization)
    finetune: Finetuning = field(default_factory=Finetuning)


class SimMIM(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        self.config, self.normalize, self.view_size = config, normalize, config.images.image_size
        self.encoder = masking_encoder(config.images, config.network, drop=config.drop_path)
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        self.head = PixelHead(self.patch, config.images.channels, self.encoder.dim)
        self.num_cells, self.cells = whole_cells(config.images, config.network, config.cell, config.mask_ratio)
        if config.weights is not None:
            report = load_weights(self, read_foreign(config.weights), renames=NAMES, optional=(r"normalize\.",))
            print(f"{config.weights}:\n{report}")

    def noise(self, rand: Callable[..., Tensor], batch: int) -> dict[str, Tensor]:
        noise = {"mask": rand(batch, self.num_cells)}
        return noise | {"drop_path": rand(batch, self.encoder.depth, 2)} if self.config.drop_path else noise

    def forward(self, images: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        # 1. Mask large cells of the image at random.
        patches = patchify(self.normalize(images), patch=self.patch)
        mask = random_cells(noise["mask"], **self.cells)
        _, masked = split(mask, num_masked=self.cells["num_masked"])
        # 2. Encode all patches, with one learned vector in the place of each that is masked.
        tokens = self.encoder(patches, self.encoder.positions, noise.get("drop_path"), mask)
        # 3. Predict their pixels by one linear layer.
        prediction = self.head(take(tokens[:, 1:], masked))
        # 4. The loss is the mean absolute error of the masked pixels; the 1e-5 of a pixel is the published code's.
        error = absolute_error(prediction, take(self.target(images), masked))
        return {"loss": error.sum() / (error.numel() + 1e-5 / self.patch**2)}

    def target(self, images: Tensor) -> Tensor:
        """Return what is predicted of each patch."""
        pixels = self.normalize(images)
        if self.config.target == "window":
            pixels = window_normalized(pixels, window=self.config.window)
        return patchify(pixels, patch=self.patch)

    def pictures(self, images: Tensor, noise: dict[str, Tensor]) -> Pictures:
        sizes = {"height": self.height, "width": self.width, "patch": self.patch}
        mask, target = random_cells(noise["mask"], **self.cells), self.target(images)
        _, masked = split(mask, num_masked=self.cells["num_masked"])
        tokens = self.encoder(patchify(self.normalize(images), patch=self.patch), self.encoder.positions, mask=mask)
        prediction = unpatchify(put(self.head(take(tokens[:, 1:], masked)), masked, target), **sizes)
        show = self.normalize.undo if self.config.target == "pixels" else shown
        image = self.normalize.unit(images)
        columns = {"input": image, "seen": gray_out(image, mask, **sizes)}
        columns |= {"prediction": show(prediction), "target": show(unpatchify(target, **sizes))}
        return Pictures(columns, "prediction: visible patches are the target's")


# Names of the published checkpoints, for `common.checkpoint.load_weights`
NAMES = {r"decoder\.0\.": "head.proj."}

IMAGENET = Config(
    images=Images(crop_scale=(0.67, 1.0)),
    optimization=Optimization(
        epochs=800,
        batch_size=2048,
        base_lr=5e-5,  # for 256 images: half of the published 1e-4, which is for 512
        schedule="last_step",
        milestones=(700.0,),
        warmup_epochs=10,
        warmup_lr=2e-6,  # for the whole batch: 5e-7 for 512
        betas=(0.9, 0.999),
        undecayed=("cls_token",),
        clip=5.0,
    ),
    finetune=finetuning.SIMMIM,
)
# The published schedule of 100 epochs is that of Swin: for 512 images from 1e-6 to 2e-4, then down to 1e-5
IMAGENET_100 = replace(
    IMAGENET,
    optimization=replace(IMAGENET.optimization, epochs=100, base_lr=1e-4, milestones=(), warmup_lr=4e-6, min_lr=4e-5),
)
FOLDER = replace(
    IMAGENET_100,
    evaluate=("finetune", "scratch"),
    network=Network(size="small"),
    optimization=replace(
        IMAGENET_100.optimization, epochs=300, batch_size=256, base_lr=2e-4, warmup_epochs=20, min_lr=5e-6
    ),
    finetune=finetuning.FOLDER,
)
DIGITS = Config(
    cell=8,
    evaluate=("finetune", "scratch"),
    images=Images(image_size=(32, 32), channels=1, crop_scale=(0.67, 1.0), flip=0.0),
    network=Network(size="nano", patch=4),
    optimization=replace(
        IMAGENET_100.optimization, epochs=40, batch_size=64, base_lr=4e-3, warmup_epochs=4, warmup_lr=0.0, min_lr=0.0
    ),
    finetune=finetuning.DIGITS,
)
METHOD = SimMIM
PRESETS = {"digits": DIGITS, "folder": FOLDER, "imagenet": IMAGENET, "imagenet_100": IMAGENET_100}

if __name__ == "__main__":
    pretrain(METHOD, PRESETS, name="simmim", description=__doc__)
