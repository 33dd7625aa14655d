"""LUT on SimMIM: all patches are encoded, the masked ones as one learned vector; the others learn the image's context.

    python recipes/lut_simmim.py                                          the embedded digits, minutes on a laptop
    python recipes/lut_simmim.py --data DIR                               images of your own
    torchrun --nproc_per_node=8 recipes/lut_simmim.py --preset imagenet --data DIR

Paper: Learning with Unmasked Tokens Drives Stronger Vision Learners, ECCV 2024, table A; SimMIM, arXiv 2111.09886.
Nothing is published of how the two are put together: this is our construction, see docs/lut.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from common import finetuning
from common.config import Flat, Images, Network, Optimization, Run
from common.finetuning import Finetuning
from common.heads import HeadNorm, mlp, refuse_single_images, share_statistics
from common.images import Normalize, WeakStrong
from common.pretraining import Evaluation, masking_encoder, pretrain, whole_cells
from common.report import Pictures, gray_out
from common.teacher import cosine_momentum, follow, teacher_of
from common.vit import PixelHead, initialize_mae
from mimkit.losses import absolute_error, cosine_distance
from mimkit.masking import disjoint_views, random_cells
from mimkit.tokens import patchify, put, split, take, unpatchify

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Views = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Config:
    """The settings of the paper, as far as they are known, are the preset "imagenet". --crop-scale has no effect."""

    mask_ratio: float = 0.6
    """share of the cells that is masked, rounded up"""
    cell: int = 32
    """side of a cell in pixels, a multiple of --patch; a cell is masked whole or not at all"""
    loss: Literal["both", "context"] = "both"
    """both: the pixels of masked patches and the context of visible ones; context: the latter alone"""
    context_weight: float = 0.25
    """of the context's loss beside that of the pixels; 0: SimMIM on the first views"""
    momentum: float = 0.996
    """of the teacher in the first step; it rises to 1 as half a cosine"""
    head_depth: tuple[int, int] = (2, 2)
    """linear layers of the projector and of the predictor; 0: none"""
    head_width: int = 4096
    """width between the layers of a head"""
    head_norm: HeadNorm = "batch"
    """between the layers of a head; batch norm wants some 64 images at a time, and sees one piece of a batch"""
    sync_norm: bool = True
    """synchronized batch norm, over all devices; without, each has its own, and running statistics are averaged"""
    drop_path: float = 0.1
    """drop path of the last block, rising linearly from 0, in pre-training"""
    evaluate: tuple[Evaluation, ...] = ("finetune",)
    """fine-tune the encoder; the same network from scratch for as many epochs, for as much time; judge it frozen"""
    run: Flat[Run] = field(default_factory=Run)
    images: Flat[Images] = field(default_factory=Images)
    network: Flat[Network] = field(default_factory=Network)
    optimization: Flat[Optimization] = field(default_factory=Optimization)
    finetune: Finetuning = field(default_factory=Finetuning)


class LUTSimMIM(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        self.config, self.normalize, self.view_size = config, normalize, config.images.image_size
        self.views = WeakStrong(self.view_size, flip=config.images.flip)
        self.encoder = masking_encoder(config.images, config.network, drop=config.drop_path)
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        pixels = PixelHead(self.patch, config.images.channels, self.encoder.dim)
        self.head = pixels if config.loss == "both" else None
        head = {"width": config.head_width, "norm": config.head_norm, "together": config.sync_norm}
        self.projector, self.predictor = (mlp(self.encoder.dim, depth=depth, **head) for depth in config.head_depth)
        initialize_mae(self.projector)
        initialize_mae(self.predictor)
        self.num_cells, self.cells = whole_cells(config.images, config.network, config.cell, config.mask_ratio)
        self.num_visible = self.num_cells - self.cells["num_masked"] // (self.height * self.width // self.num_cells)
        self.teacher = teacher_of(self.student()).eval()

    def student(self) -> nn.ModuleList:
        """What the teacher needs to say where an image points."""
        return nn.ModuleList([self.encoder, self.projector])

    def train(self, mode: bool = True) -> "LUTSimMIM":
        """Train the student; the teacher stays in evaluation mode: its batch norm takes the running statistics."""
        super().train(mode)
        self.teacher.eval()
        return self

    def noise(self, rand: Callable[..., Tensor], batch: int) -> dict[str, Tensor]:
        refuse_single_images(self, batch)
        noise = {"mask": rand(batch, self.num_cells)}
        paths = {f"drop_path_{view}": rand(batch, self.encoder.depth, 2) for view in (1, 2)}
        return noise | paths if self.config.drop_path else noise

    def forward(self, images: Views, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        # 1. Cut two views of each image into patches; the second has other colors, and the picture is shifted.
        views = [patchify(self.normalize(view), patch=self.patch) for view in images]
        # 2. Mask large cells of both, so that no cell is visible twice (as long as there are enough).
        (mask, visible, masked), (other_mask, others, _) = self.masks(noise)
        # 3. Encode all patches of each, with one learned vector in the place of each that is masked.
        places = self.encoder.positions
        tokens = self.encoder(views[0], places, noise.get("drop_path_1"), mask)[:, 1:]
        other_tokens = self.encoder(views[1], places, noise.get("drop_path_2"), other_mask)[:, 1:]
        # 4. The mean of the visible tokens goes through two heads, the first view before the second (batch norm minds).
        points = self.predictor(self.projector(take(tokens, visible).mean(dim=1)))
        other_points = self.predictor(self.projector(take(other_tokens, others).mean(dim=1)))
        # 5. Where it points is where the teacher points, who sees all of the other view.
        target, other_target = self.ask_teacher(torch.cat(views)).chunk(2)
        context = (cosine_distance(other_points, target) + cosine_distance(points, other_target)).mean() / 2
        losses = {"loss": self.config.context_weight * context, "context": context}
        # 6. From the first view's masked tokens predict their pixels by one linear layer, as SimMIM does.
        if self.head is not None:
            error = absolute_error(self.head(take(tokens, masked)), take(views[0], masked))
            losses["pixels"] = error.sum() / (error.numel() + 1e-5 / self.patch**2)
            losses["loss"] = losses["pixels"] + losses["loss"]
        # A teacher that points the same way for all images has nothing to teach: 0. One that is spread evenly: 1.
        spread = F.normalize(target.float(), dim=-1).std(dim=0, correction=0).mean() * target.shape[-1] ** 0.5
        return losses | {"spread": spread}

    def masks(self, noise: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return mask, visible and masked patches of both views."""
        masks = []
        for cells, visible in zip(
            disjoint_views(noise["mask"], num_visible=self.num_visible),
            (self.num_visible, min(self.num_visible, self.num_cells - self.num_visible)),
            strict=True,
        ):
            num_masked = self.height * self.width // self.num_cells * (self.num_cells - visible)
            mask = random_cells(cells.float(), **self.cells | {"num_masked": num_masked})  # of 0 and 1, 1 is masked
            masks.append((mask, *split(mask, num_masked=num_masked)))
        return masks

    @torch.no_grad()
    def ask_teacher(self, patches: Tensor) -> Tensor:
        """Return where whole views point: no mask, no predictor."""
        encoder, projector = self.teacher
        return projector(encoder(patches, encoder.positions)[:, 1:].mean(dim=1))  # pyright: ignore

    def after_step(self, progress: Tensor) -> None:
        """Let the teacher follow, with the running statistics of batch norm."""
        share_statistics(self)
        follow(self.teacher, self.student(), cosine_momentum(progress, self.config.momentum))

    def pictures(self, images: Views, noise: dict[str, Tensor]) -> Pictures:
        sizes = {"height": self.height, "width": self.width, "patch": self.patch}
        first, second = (self.normalize.unit(view) for view in images)
        (mask, _, masked), (other_mask, _, _) = self.masks(noise)
        columns = {"first view": first, "seen": gray_out(first, mask, **sizes)}
        note = "the second view is seen in part by the student, whole by the teacher"
        if self.head is not None:
            patches = patchify(self.normalize(images[0]), patch=self.patch)
            tokens = self.encoder(patches, self.encoder.positions, mask=mask)[:, 1:]
            prediction = put(self.head(take(tokens, masked)), masked, patches)
            columns["prediction"] = self.normalize.undo(unpatchify(prediction, **sizes))
            note = "prediction: visible patches are the input's; " + note
        columns |= {"second view": second, "seen of it": gray_out(second, other_mask, **sizes)}
        return Pictures(columns, note)


IMAGENET = Config(
    optimization=Optimization(
        epochs=100,
        batch_size=2048,
        base_lr=1e-4,  # SimMIM's of 100 epochs, see simmim.py
        min_lr=4e-5,
        schedule="last_step",
        warmup_epochs=10,
        warmup_lr=4e-6,
        betas=(0.9, 0.999),
        undecayed=("cls_token",),
        clip=5.0,
    ),
    finetune=finetuning.SIMMIM,
)
FOLDER = replace(
    IMAGENET,
    evaluate=("finetune", "scratch"),
    head_width=2048,
    network=Network(size="small"),
    optimization=replace(
        IMAGENET.optimization, epochs=300, batch_size=256, base_lr=2e-4, warmup_epochs=20, min_lr=5e-6
    ),
    finetune=finetuning.FOLDER,
)
DIGITS = Config(
    cell=8,
    momentum=0.99,  # of some hundred steps; the paper's is of 500,000
    head_width=384,
    evaluate=("finetune", "scratch"),
    images=Images(image_size=(32, 32), channels=1, flip=0.0),
    network=Network(size="nano", patch=4),
    optimization=replace(
        IMAGENET.optimization, epochs=40, batch_size=64, base_lr=4e-3, warmup_epochs=4, warmup_lr=0.0, min_lr=0.0
    ),
    finetune=finetuning.DIGITS,
)

METHOD, PRESETS = LUTSimMIM, {"digits": DIGITS, "folder": FOLDER, "imagenet": IMAGENET}

if __name__ == "__main__":
    pretrain(METHOD, PRESETS, name="lut_simmim", description=__doc__)
