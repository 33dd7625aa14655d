"""LUT on SimMIM: encode all patches, masked ones as mask tokens; the visible tokens learn the context of the image.

    python recipes/lut_simmim.py                                          MNIST, minutes on a laptop
    python recipes/lut_simmim.py --data DIR                               images of your own
    torchrun --nproc_per_node=8 recipes/lut_simmim.py --preset imagenet --data DIR

Paper: Learning with Unmasked Tokens Drives Stronger Vision Learners, ECCV 2024, table A; SimMIM, arXiv 2111.09886.
The combination is not published in detail: this is our construction, see docs/lut.md.
"""

from dataclasses import dataclass

from common.data.views import WeakStrong
from common.networks import PixelHead, Teacher, initialize_mae, masking_encoder, refuse_single_images, whole_cells
from common.pretraining import pretrain
from common.recipe import DECODER, Normalize, Rand, Recipe, embedded, finetuning, folder
from common.report import Pictures
from mimkit.masking import disjoint_views, random_cells
from mimkit.tokens import patchify, split, take

import torch
from lut import SHORT, ContextConfig, ViewPair, context_losses, heads, update_teacher, view_pictures
from simmim import CELLS, IMAGENET_100, NAMES, CellConfig, pixel_loss
from torch import Tensor, nn


@dataclass(frozen=True)
class Config(ContextConfig, CellConfig):
    """The known settings of the paper are the preset "imagenet"."""


class LUTSimMIM(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        self.config, self.normalize, self.view_size = config, normalize, config.data.image_size
        self.views = WeakStrong(self.view_size, flip=config.data.flip)
        self.encoder = masking_encoder(config.data, config.network, drop=config.drop_path)
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        head = PixelHead(self.patch, config.data.channels, self.encoder.dim)
        self.head = head if config.loss == "both" else None
        self.projector, self.predictor = heads(self.encoder.dim, config)
        initialize_mae(self.projector)
        initialize_mae(self.predictor)
        self.num_cells, self.cells = whole_cells(config.data, config.network, config.cell, config.mask_ratio)
        self.num_visible = self.num_cells - self.cells["num_masked"] // (self.height * self.width // self.num_cells)
        self.teacher = Teacher(self.student())

    def student(self) -> nn.ModuleList:
        """Return encoder and projector, of which the teacher is a moving average."""
        return nn.ModuleList([self.encoder, self.projector])

    def noise(self, rand: Rand, batch: int) -> dict[str, Tensor]:
        refuse_single_images(self, batch)
        noise = {"mask": rand(batch, self.num_cells)}
        paths = {f"drop_path_{view}": rand(batch, self.encoder.depth, 2) for view in (1, 2)}
        return noise | paths if self.config.drop_path else noise

    def forward(self, images: ViewPair, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        # 1. Split two views of each image into patches; the second is shifted and has color jitter.
        views = [patchify(self.normalize(view), patch=self.patch) for view in images]
        # 2. Mask large cells of both, so that no cell is visible in both (as long as there are enough).
        (mask, visible, masked), (other_mask, others, _) = self.masks(noise)
        # 3. Encode all patches of each view, with masked patches replaced by a learned mask token.
        positions = self.encoder.positions
        tokens = self.encoder(views[0], positions, noise.get("drop_path_1"), mask)[:, 1:]
        other_tokens = self.encoder(views[1], positions, noise.get("drop_path_2"), other_mask)[:, 1:]
        # 4. From the mean visible token, predict the teacher's projection of the other view, as in LUT.
        means = take(tokens, visible).mean(dim=1), take(other_tokens, others).mean(dim=1)
        losses = context_losses(self, means, torch.cat(views))
        # 5. From the masked tokens of the first view, predict their pixels by a linear layer, as in SimMIM.
        if self.head is not None:
            losses["pixels"] = pixel_loss(self.head(take(tokens, masked)), take(views[0], masked), patch=self.patch)
            losses["loss"] = losses["pixels"] + losses["loss"]
        return losses

    def masks(self, noise: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the mask and the indices of visible and masked patches, for both views."""
        masks, left = [], min(self.num_visible, self.num_cells - self.num_visible)
        cells_of_views = disjoint_views(noise["mask"], num_visible=self.num_visible)
        for cells, visible in zip(cells_of_views, (self.num_visible, left), strict=True):
            num_masked = self.height * self.width // self.num_cells * (self.num_cells - visible)
            mask = random_cells(cells.float(), **self.cells | {"num_masked": num_masked})  # cells equal to 1 are masked
            masks.append((mask, *split(mask, num_masked=num_masked)))
        return masks

    def after_step(self, progress: Tensor) -> None:
        """Update the moving average after each optimizer step."""
        update_teacher(self, progress)

    def pictures(self, images: ViewPair, noise: dict[str, Tensor]) -> Pictures:
        """Draw both views, their masks, and the reconstruction of the first view."""
        (mask, _, masked), (other_mask, _, _) = self.masks(noise)
        pixels = None
        if self.head is not None:
            patches = patchify(self.normalize(images[0]), patch=self.patch)
            tokens = self.encoder(patches, self.encoder.positions, mask=mask)[:, 1:]
            pixels = self.head(take(tokens, masked)), take(patches, masked), masked
        return view_pictures(self, images, (mask, other_mask), pixels)


IMAGENET = Config(optimization=IMAGENET_100.optimization, finetune=finetuning.SIMMIM)
SMALL = {"cell": 16, "warmup_lr": 0.0, "min_lr": 0.0, "momentum": 0.99, "head_width": 384}
PRESETS = {
    **embedded(IMAGENET, **CELLS, warmup_lr=0.0, min_lr=0.0, **SHORT),
    **folder(IMAGENET, small=SMALL, head_width=2048, base_lr=2e-4, min_lr=5e-6),
    "imagenet": IMAGENET,
}
HEADS = (r"projector\.", r"predictor\.", r"teacher\.")
RECIPE = Recipe(LUTSimMIM, PRESETS, NAMES, optional=HEADS, unused=(*DECODER, "crop_scale"))

if __name__ == "__main__":
    pretrain(RECIPE, name="lut_simmim", description=__doc__)
