"""LUT: learning with unmasked tokens. The tokens that MAE sees, and gives no target, learn the context of the image.

    python recipes/lut.py                                                 the embedded digits, minutes on a laptop
    python recipes/lut.py --data DIR                                      images of your own
    torchrun --nproc_per_node=8 recipes/lut.py --preset imagenet --data DIR

Paper: Learning with Unmasked Tokens Drives Stronger Vision Learners, ECCV 2024.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from common import finetuning
from common.config import Flat, Images, Network, Optimization, Run
from common.finetuning import Finetuning
from common.heads import HeadNorm, mlp, refuse_single_images, share_statistics
from common.images import Normalize, WeakStrong
from common.pretraining import Evaluation, count_masked, encoder_and_decoder, pretrain
from common.report import Pictures, gray_out, shown
from common.teacher import cosine_momentum, follow, teacher_of
from common.vit import initialize_mae
from mimkit.losses import cosine_distance, normalized_patches, squared_error
from mimkit.masking import disjoint_views
from mimkit.tokens import patchify, put, split, take, unpatchify

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Views = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Config:
    """The settings of the paper are the preset "imagenet". --crop-scale has no effect: views show nearly all of it."""

    mask_ratio: float = 0.75
    """share of the patches that is masked"""
    loss: Literal["both", "context"] = "both"
    """both: the pixels of masked patches and the context of visible ones; context: the latter alone, without decoder"""
    context_weight: float = 0.25
    """of the context's loss beside that of the pixels; 0: MAE on the first views"""
    normalize_target: bool = True
    """predict pixels normalized per patch"""
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
    evaluate: tuple[Evaluation, ...] = ("finetune",)
    """fine-tune the encoder; the same network from scratch for as many epochs, for as much time; judge it frozen"""
    run: Flat[Run] = field(default_factory=Run)
    images: Flat[Images] = field(default_factory=Images)
    network: Flat[Network] = field(default_factory=Network)
    optimization: Flat[Optimization] = field(default_factory=Optimization)
    finetune: Finetuning = field(default_factory=Finetuning)


class LUT(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        self.encoder, decoder = encoder_and_decoder(config.images, config.network)
        self.decoder = decoder if config.loss == "both" else None
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        head = {"width": config.head_width, "norm": config.head_norm, "together": config.sync_norm}
        self.projector, self.predictor = (mlp(self.encoder.dim, depth=depth, **head) for depth in config.head_depth)
        self.config, self.normalize, self.view_size = config, normalize, config.images.image_size
        self.views = WeakStrong(self.view_size, flip=config.images.flip)
        tokens = self.height * self.width
        self.num_masked = count_masked(tokens, config.mask_ratio)
        self.num_visible = tokens - self.num_masked
        initialize_mae(self)
        self.teacher = teacher_of(self.student()).eval()

    def student(self) -> nn.ModuleList:
        """What the teacher needs to say where an image points."""
        return nn.ModuleList([self.encoder, self.projector])

    def train(self, mode: bool = True) -> "LUT":
        """Train the student; the teacher stays in evaluation mode: its batch norm takes the running statistics."""
        super().train(mode)
        self.teacher.eval()
        return self

    def noise(self, rand: Callable[..., Tensor], batch: int) -> dict[str, Tensor]:
        refuse_single_images(self, batch)
        return {"mask": rand(batch, self.height * self.width)}

    def forward(self, images: Views, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        # 1. Cut two views of each image into patches; the second has other colors, and the picture is shifted.
        views = [patchify(self.normalize(view), patch=self.patch) for view in images]
        # 2. Mask most of both, so that no place of the grid is visible twice.
        (visible, masked), (others, _) = self.split(noise)
        # 3. Encode what is visible of each.
        latent = self.encoder(take(views[0], visible), self.encoder.positions[visible])
        other_latent = self.encoder(take(views[1], others), self.encoder.positions[others])
        # 4. The mean of the visible tokens goes through two heads, the first view before the second (batch norm minds).
        points = self.predictor(self.projector(self.pool(latent)))
        other_points = self.predictor(self.projector(self.pool(other_latent)))
        # 5. Where it points is where the teacher points, who sees all of the other view.
        target, other_target = self.ask_teacher(torch.cat(views)).chunk(2)
        context = (cosine_distance(other_points, target) + cosine_distance(points, other_target)).mean() / 2
        losses = {"loss": self.config.context_weight * context, "context": context}
        # 6. From the first view's tokens predict the pixels of what is masked there, as MAE does.
        if self.decoder is not None:
            pixels = self.pixel_target(take(views[0], masked))
            losses["pixels"] = squared_error(self.decoder(latent, visible, masked), pixels).mean()
            losses["loss"] = losses["pixels"] + losses["loss"]
        # A teacher that points the same way for all images has nothing to teach: 0. One that is spread evenly: 1.
        spread = F.normalize(target.float(), dim=-1).std(dim=0, correction=0).mean() * target.shape[-1] ** 0.5
        return losses | {"spread": spread}

    def split(self, noise: dict[str, Tensor]) -> tuple[Views, Views]:
        """Return the indices of visible and masked patches of both views."""
        first, second = disjoint_views(noise["mask"], num_visible=self.num_visible)
        left = min(self.num_visible, self.num_masked)  # the second view has no more than what is left
        tokens = self.height * self.width
        return split(first, num_masked=self.num_masked), split(second, num_masked=tokens - left)

    def pool(self, latent: Tensor) -> Tensor:
        """Average the tokens of the patches, without the class token."""
        return latent[:, self.encoder.num_prefix :].mean(dim=1)

    @torch.no_grad()
    def ask_teacher(self, patches: Tensor) -> Tensor:
        """Return where whole views point: no mask, no predictor."""
        encoder, projector = self.teacher
        return projector(self.pool(encoder(patches, encoder.positions)))  # pyright: ignore

    def pixel_target(self, patches: Tensor) -> Tensor:
        return normalized_patches(patches) if self.config.normalize_target else patches

    def after_step(self, progress: Tensor) -> None:
        """Let the teacher follow, with the running statistics of batch norm."""
        share_statistics(self)
        follow(self.teacher, self.student(), cosine_momentum(progress, self.config.momentum))

    def pictures(self, images: Views, noise: dict[str, Tensor]) -> Pictures:
        sizes = {"height": self.height, "width": self.width, "patch": self.patch}
        first, second = (self.normalize.unit(view) for view in images)
        masks = disjoint_views(noise["mask"], num_visible=self.num_visible)
        columns = {"first view": first, "seen": gray_out(first, masks[0], **sizes)}
        note = "the second view is seen in part by the student, whole by the teacher"
        if self.decoder is not None:
            patches, (visible, masked) = patchify(self.normalize(first), patch=self.patch), self.split(noise)[0]
            latent = self.encoder(take(patches, visible), self.encoder.positions[visible])
            target = self.pixel_target(patches)
            prediction = put(self.decoder(latent, visible, masked), masked, target)
            show = shown if self.config.normalize_target else self.normalize.undo
            columns["prediction"] = show(unpatchify(prediction, **sizes))
            columns["target"] = show(unpatchify(target, **sizes))
            note = "prediction: visible patches are the input's; " + note
        columns |= {"second view": second, "seen of it": gray_out(second, masks[1], **sizes)}
        return Pictures(columns, note)


# Names of the published checkpoints, for `common.checkpoint.load_weights`
NAMES = {
    r"head\.": "projector.",
    r"mask_token": "decoder.mask_token",
    r"decoder_(embed|blocks|norm)\.": r"decoder.\1.",
    r"decoder_pred\.": "decoder.head.",
    r"(?=cls_token|pos_embed|patch_embed|blocks|norm)": "encoder.",
}

IMAGENET = Config(
    optimization=Optimization(epochs=1600, sqrt_rule_at=4096),
    finetune=finetuning.LUT,
)
FOLDER = replace(
    IMAGENET,
    evaluate=("finetune", "scratch"),
    head_width=2048,
    network=Network(size="small"),
    optimization=Optimization(epochs=300, batch_size=256, warmup_epochs=20),
    finetune=finetuning.FOLDER,
)
DIGITS = Config(
    evaluate=("finetune", "scratch"),
    momentum=0.99,  # of some hundred steps; the paper's is of 500,000
    head_width=384,
    images=Images(image_size=(32, 32), channels=1, flip=0.0),
    network=Network(size="nano", patch=4, decoder_dim=48, decoder_depth=1, decoder_heads=3),
    optimization=Optimization(epochs=40, batch_size=64, base_lr=4e-3, warmup_epochs=4),
    finetune=finetuning.DIGITS,
)

METHOD, PRESETS = LUT, {"digits": DIGITS, "folder": FOLDER, "imagenet": IMAGENET}

if __name__ == "__main__":
    pretrain(METHOD, PRESETS, name="lut", description=__doc__)
