"""HPM: hard patches mining. A second decoder predicts which patches are hard; a teacher masks more and more of them.

    python recipes/hpm.py                                                 the embedded digits, minutes on a laptop
    python recipes/hpm.py --data DIR                                      images of your own
    torchrun --nproc_per_node=8 recipes/hpm.py --preset imagenet --data DIR

Paper: Hard Patches Mining for Masked Image Modeling, arXiv 2304.05919.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from common import recipe
from common.config import Optimization, Positive, SettingsError, Shares
from common.data.normalize import Normalize
from common.evaluation import finetuning
from common.networks.building import count_masked, encoder_and_decoder
from common.networks.decoder import Predictor
from common.networks.ema import ema_copy, ema_update
from common.networks.initialization import initialize_mae
from common.pretraining import pretrain
from common.recipe import SMALL_DECODER, Recipe, digits, folder
from common.report.pictures import Pictures, gray_out, heat_maps
from common.report.reconstruction import reconstruction
from common.training.schedules import epoch_of
from mimkit.losses import cosine_distance, normalized_patches, ranking_loss, squared_error
from mimkit.masking import easy_to_hard
from mimkit.tokens import patchify, split, take

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config(recipe.Config):
    """The settings of the paper are the preset "imagenet"."""

    mask_ratio: float = 0.75
    """share of the patches that is masked"""
    hard: Shares = (0.0, 0.5)
    """share of the masked patches that the teacher chooses, at the start and at the end. 0 0: all at random; 1 1: the
    hardest only; 0.5 0: hard to easy"""
    choose: Literal["hardest", "easiest"] = "hardest"
    """which patches the teacher chooses"""
    objective: Literal["relative", "absolute"] = "relative"
    """what the predictor learns: which of two patches is harder, or how hard each is"""
    target: Literal["pixels", "normalized", "features"] = "pixels"
    """what is reconstructed: pixels, as in all published commands; normalized per patch; the teacher's features"""
    momentum: Shares = (0.999, 0.9999)
    """of the teacher, in the first epoch and after --momentum-epochs"""
    momentum_epochs: Positive = 100.0
    """epochs in which the momentum rises, whatever the length of the training"""


class HPM(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder_and_decoder(config.data, config.network)
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        network, outputs = config.network, self.patch**2 * config.data.channels
        if config.target == "features":
            self.decoder.head = nn.Linear(network.decoder_dim, self.encoder.dim)
        # The published head predicts as many values as a patch has, and what counts is their mean
        self.predictor = Predictor(network.decoder_dim, network.decoder_depth, network.decoder_heads, outputs)
        self.config, self.normalize, self.view_size = config, normalize, config.data.image_size
        self.num_masked = count_masked(self.height * self.width, config.mask_ratio)
        if config.objective == "absolute" and self.num_masked < 2:
            raise SettingsError(
                f"--mask-ratio {config.mask_ratio} masks 1 patch, whose error is compared with no other"
            )
        initialize_mae(self)
        self.teacher = ema_copy(self.student())

    def student(self) -> nn.ModuleList:
        """Return the networks of which the teacher is a moving average: what predicts how hard patches are."""
        return nn.ModuleList([self.encoder, self.decoder.embed, self.predictor])

    def noise(self, rand: Callable[..., Tensor], batch: int) -> dict[str, Tensor]:
        return {"mask": rand(batch, self.height * self.width)}

    def forward(self, images: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        # 1. The teacher sees the whole image and predicts how hard each patch is to reconstruct.
        patches = patchify(self.normalize(images), patch=self.patch)
        difficulty, features = self.predict_difficulty(patches)
        # 2. Mask the hardest ones, more of them as training goes on, and others at random.
        visible, masked = split(self.mask(difficulty, noise, progress), num_masked=self.num_masked)
        # 3. Encode the visible ones; from the same tokens one decoder reconstructs what is masked, the other predicts
        #    how well that goes.
        latent = self.encode(patches, visible)
        sequence = self.decoder.sequence(latent, visible, masked)
        reconstructed = self.decoder.predict(sequence, self.num_masked)
        predicted = self.predictor.predict_mean(sequence, self.num_masked)
        # 4. Compare the reconstruction with the target,
        errors = self.errors(reconstructed, take(patches, masked), take(features, masked))
        # 5. and the predictions with what these errors are: by the order of each pair, or by their values.
        loss, right, pairs = ranking_loss(predicted, errors)
        prediction = loss.sum() / pairs.sum().clamp(min=1)
        if self.config.objective == "absolute":
            prediction = squared_error(predicted, normalized_patches(errors.detach())).mean()
        reconstruction, accuracy = errors.mean(), right.sum() / pairs.sum().clamp(min=1)
        losses = {"loss": reconstruction + prediction, "reconstruction": reconstruction, "prediction": prediction}
        return losses | {"pair_accuracy": accuracy}

    @torch.no_grad()
    def predict_difficulty(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return how hard each patch is, predicted from the whole image, and its features."""
        encoder, embed, predictor = self.teacher
        latent = encoder(patches, encoder.positions)
        sequence = embed(latent) + F.pad(self.decoder.pos_embed, (0, 0, 1, 0))  # the class token's position is zero
        return predictor.predict_mean(sequence, patches.shape[1]), latent[:, 1:]  # pyright: ignore

    def mask(self, difficulty: Tensor, noise: dict[str, Tensor], progress: Tensor) -> Tensor:
        """Mask hard patches, as many as it is time for, and others at random."""
        (start, end), epochs = self.config.hard, self.config.optimization.epochs
        share = start + (end - start) * ((epoch_of(progress, epochs) + 1) / epochs)
        count = {"num_masked": self.num_masked, "num_hard": (self.num_masked * share).long()}
        return easy_to_hard(difficulty if self.config.choose == "hardest" else -difficulty, noise["mask"], **count)

    def encode(self, patches: Tensor, visible: Tensor) -> Tensor:
        """Encode the visible patches, with their positions."""
        return self.encoder(take(patches, visible), self.encoder.positions[visible])

    def target(self, patches: Tensor) -> Tensor:
        """Return what is reconstructed of patches, unless it is features."""
        return normalized_patches(patches) if self.config.target == "normalized" else patches

    def errors(self, prediction: Tensor, patches: Tensor, features: Tensor) -> Tensor:
        """Return the reconstruction error of each patch."""
        if self.config.target == "features":
            return cosine_distance(prediction, features)
        return squared_error(prediction, self.target(patches))

    def after_step(self, progress: Tensor) -> None:
        """Update the teacher."""
        (start, end), epoch = self.config.momentum, epoch_of(progress, self.config.optimization.epochs)
        ema_update(
            self.teacher, self.student(), start + (end - start) * (epoch / self.config.momentum_epochs).clamp(max=1)
        )

    def pictures(self, images: Tensor, noise: dict[str, Tensor]) -> Pictures:
        patches = patchify(self.normalize(images), patch=self.patch)
        difficulty, _ = self.predict_difficulty(patches)
        last = torch.tensor(1 - 1 / self.config.optimization.epochs, dtype=torch.float64, device=images.device)
        mask = self.mask(difficulty, noise, last)
        visible, masked = split(mask, num_masked=self.num_masked)
        image, sizes = self.normalize.unit(images), {"height": self.height, "width": self.width, "patch": self.patch}
        drawn = Pictures({"input": image, "seen": gray_out(image, mask, **sizes)})
        if self.config.target != "features":
            prediction = self.decoder(self.encode(patches, visible), visible, masked)
            drawn = reconstruction(self, image, prediction, self.target(take(patches, masked)), masked)
        columns = {"hard (red) and easy": heat_maps(image, difficulty, **sizes)} | drawn.columns
        return Pictures(columns, "; ".join(filter(None, ("masks are those of the last epoch", drawn.note))))


# From the names of the released model to ours
NAMES = {
    r"mask_token": "decoder.mask_token",
    r"decoder_(blocks|norm)_losspred\.": r"predictor.\1.",
    r"decoder_pred_losspred\.": "predictor.head.",
    r"decoder_(embed|blocks|norm)\.": r"decoder.\1.",
    r"decoder_pred\.": "decoder.head.",
    r"(?=cls_token|pos_embed|patch_embed|blocks|norm)": "encoder.",
}

IMAGENET = Config(optimization=Optimization(epochs=200, warmup_epochs=10, clip=5.0), finetune=finetuning.HPM)
PRESETS = {
    # momentum of some hundred steps; the paper's is of 100,000
    "digits": digits(IMAGENET, momentum=(0.99, 0.99), **SMALL_DECODER),
    "folder": folder(IMAGENET),
    "imagenet": IMAGENET,
}
RECIPE = Recipe(HPM, PRESETS, NAMES)

if __name__ == "__main__":
    pretrain(RECIPE, name="hpm", description=__doc__)
