"""MAE: masked autoencoders. Mask most patches, encode the few visible ones, predict the pixels of the others.

    python recipes/mae.py                                                 the embedded digits, minutes on a laptop
    python recipes/mae.py --data DIR                                      images of your own
    torchrun --nproc_per_node=8 recipes/mae.py --preset imagenet --data DIR

Paper: Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377.
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
from common.pretraining import Evaluation, count_masked, encoder_and_decoder, pretrain
from common.report import Pictures, gray_out, shown
from common.vit import initialize_mae
from mimkit.losses import normalized_patches, squared_error
from mimkit.masking import random_tokens
from mimkit.positions import sincos
from mimkit.tokens import patchify, put, split, take, unpatchify

from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The settings of the paper are the preset "imagenet"."""

    mask_ratio: float = 0.75
    """share of the patches that is masked"""
    positions: Literal["absolute", "relative"] = "absolute"
    """added to the patches; or said to attention by the offsets of each two (iRPE), as LoMaR's paper compares them"""
    weights: Path | None = None
    """start from a published checkpoint of MAE, with or without its decoder"""
    normalize_target: bool = True
    """predict pixels normalized per patch, better for accuracy; without, pictures are easier on the eye"""
    evaluate: tuple[Evaluation, ...] = ("finetune",)
    """fine-tune the encoder; the same network from scratch for as many epochs, for as much time; judge it frozen"""
    run: Flat[Run] = field(default_factory=Run)
    images: Flat[Images] = field(default_factory=Images)
    network: Flat[Network] = field(default_factory=Network)
    optimization: Flat[Optimization] = field(default_factory=Optimization)
    finetune: Finetuning = field(default_factory=Finetuning)


class MAE(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        table = sincos if config.positions == "absolute" else None
        self.encoder, self.decoder = encoder_and_decoder(config.images, config.network, table=table)
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        self.view_size, self.normalize_target = config.images.image_size, config.normalize_target
        self.num_masked = count_masked(self.height * self.width, config.mask_ratio)
        self.normalize = normalize
        initialize_mae(self)
        if config.weights is not None:
            report = load_weights(
                self, read_foreign(config.weights), renames=NAMES, optional=(r"decoder\.", r"normalize\.")
            )
            print(f"{config.weights}:\n{report}")

    def noise(self, rand: Callable[..., Tensor], batch: int) -> dict[str, Tensor]:
        return {"mask": rand(batch, self.height * self.width)}

    def forward(self, images: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        # 1. Cut the images into patches.
        patches = patchify(self.normalize(images), patch=self.patch)
        # 2. Mask most of them at random.
        mask = random_tokens(noise["mask"], num_masked=self.num_masked)
        visible, masked = split(mask, num_masked=self.num_masked)
        # 3. Encode only those that are visible, with their positions.
        latent = self.encode(take(patches, visible), visible)
        # 4. Predict the pixels of those that are masked.
        prediction = self.decoder(latent, visible, masked)
        # 5. Compare with the pixels, normalized per patch.
        target = take(patches, masked)
        if self.normalize_target:
            target = normalized_patches(target)
        return {"loss": squared_error(prediction, target).mean()}

    def encode(self, patches: Tensor, visible: Tensor) -> Tensor:
        """Encode patches where they are; some of a grid are not a smaller grid, even if their number is a square."""
        encoder = self.encoder
        return encoder(patches, encoder.positions[visible], buckets=encoder.buckets_of(visible))

    def pictures(self, images: Tensor, noise: dict[str, Tensor]) -> Pictures:
        sizes = {"height": self.height, "width": self.width, "patch": self.patch}
        patches = patchify(self.normalize(images), patch=self.patch)
        mask = random_tokens(noise["mask"], num_masked=self.num_masked)
        visible, masked = split(mask, num_masked=self.num_masked)
        latent = self.encode(take(patches, visible), visible)
        target = normalized_patches(patches) if self.normalize_target else patches
        prediction = put(self.decoder(latent, visible, masked), masked, target)
        image, note = self.normalize.unit(images), "prediction: visible patches are the input's"
        if self.normalize_target:
            prediction, target = (shown(unpatchify(x, **sizes)) for x in (prediction, target))
            note += "; prediction and target are normalized per patch: its brightness and contrast are not in them"
        else:
            prediction, target = self.normalize.undo(unpatchify(prediction, **sizes)), image
        seen = gray_out(image, mask, **sizes)
        return Pictures({"input": image, "seen": seen, "prediction": prediction, "target": target}, note)


# Names of the published checkpoints, for `common.checkpoint.load_weights`
NAMES = {
    r"mask_token": "decoder.mask_token",
    r"decoder_(embed|blocks|norm)\.": r"decoder.\1.",
    r"decoder_pred\.": "decoder.head.",
    r"(?=cls_token|pos_embed|patch_embed|blocks|norm)": "encoder.",
}

IMAGENET = Config(optimization=Optimization(epochs=1600))
FOLDER = replace(
    IMAGENET,
    evaluate=("finetune", "scratch"),
    network=Network(size="small"),
    optimization=Optimization(epochs=300, batch_size=256, warmup_epochs=20),
    finetune=finetuning.FOLDER,
)
DIGITS = Config(
    evaluate=("finetune", "scratch"),
    images=Images(image_size=(32, 32), channels=1, crop_scale=(0.6, 1.0), flip=0.0),
    network=Network(size="nano", patch=4, decoder_dim=48, decoder_depth=1, decoder_heads=3),
    optimization=Optimization(epochs=40, batch_size=64, base_lr=4e-3, warmup_epochs=4),
    finetune=finetuning.DIGITS,
)

METHOD, PRESETS = MAE, {"digits": DIGITS, "folder": FOLDER, "imagenet": IMAGENET}

if __name__ == "__main__":
    pretrain(METHOD, PRESETS, name="mae", description=__doc__)
