"""HPM: hard patches mining. Predict which patches are hard to reconstruct, and mask more of them as training goes on.

    python recipes/hpm.py                                                 MNIST, minutes on a laptop
    python recipes/hpm.py --data DIR                                      images of your own
    torchrun --nproc_per_node=8 recipes/hpm.py --preset imagenet --data DIR

Paper: Hard Patches Mining for Masked Image Modeling, arXiv 2304.05919.
"""

from dataclasses import dataclass
from typing import Any, Literal

from common.config import Optimization, Positive, SettingsError, Shares
from common.networks import build_predictor, count_masked, ema_copy, ema_update, encoder_and_decoder, initialize_mae
from common.pretraining import pretrain
from common.recipe import SMALL_DECODER, BaseConfig, Normalize, Rand, Recipe, changed, embedded, finetuning, folder
from common.report import Pictures, gray_out, heat_maps, reconstruction
from common.training.schedules import epoch_of
from common.weights.published_names import MAE_FAMILY
from mimkit.losses import cosine_distance, normalized_patches, ranking_loss, squared_error
from mimkit.masking import easy_to_hard
from mimkit.tokens import patchify, split, take

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config(BaseConfig):
    """The settings of the paper are the preset "imagenet": 200 epochs, pixels as targets."""

    mask_ratio: float = 0.75
    """share of the patches that is masked"""
    hard: Shares = (0.0, 0.5)
    """initial and final share of masked patches chosen by difficulty; 0 0: all random; 0.5 0: hard to easy"""
    choose: Literal["hardest", "easiest"] = "hardest"
    """whether to choose the hardest or the easiest patches"""
    objective: Literal["relative", "absolute"] = "relative"
    """objective of the predictor: which of two patches is harder, or the difficulty of each patch"""
    target: Literal["pixels", "normalized", "features"] = "pixels"
    """reconstruction target: pixels, as in all published commands; normalized pixels; or the teacher's features"""
    momentum: Shares = (0.999, 0.9999)
    """EMA momentum of the teacher in the first epoch and after --momentum-epochs"""
    momentum_epochs: Positive = 100.0
    """epochs over which the momentum rises, independent of the length of the training"""


class HPM(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder_and_decoder(config.data, config.network)
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        if config.target == "features":
            self.decoder.head = nn.Linear(self.decoder.head.in_features, self.encoder.dim)
        # The published head has one output per value of a patch, and uses their mean
        self.predictor = build_predictor(config.network, outputs=self.patch**2 * config.data.channels)
        self.config, self.normalize, self.view_size = config, normalize, config.data.image_size
        self.num_masked = count_masked(self.height * self.width, config.mask_ratio)
        if config.objective == "absolute" and self.num_masked < 2:
            raise SettingsError(
                f"--mask-ratio {config.mask_ratio} masks 1 patch, whose error is compared with no other"
            )
        initialize_mae(self)
        self.teacher = ema_copy(self.student())

    def student(self) -> nn.ModuleList:
        """Return the networks that predict difficulty, of which the teacher is a moving average."""
        return nn.ModuleList([self.encoder, self.decoder.embed, self.predictor])

    def noise(self, rand: Rand, batch: int) -> dict[str, Tensor]:
        return {"mask": rand(batch, self.height * self.width)}

    def forward(self, images: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        # 1. From the whole image, the teacher predicts how hard each patch is to reconstruct.
        patches = patchify(self.normalize(images), patch=self.patch)
        difficulty, features = self.predict_difficulty(patches)
        # 2. Mask the hardest patches, more of them as training goes on, and others at random.
        visible, masked = split(self.mask(difficulty, noise, progress), num_masked=self.num_masked)
        # 3. Encode the visible ones; one decoder reconstructs the masked patches, another predicts their errors.
        latent = self.encode(patches, visible)
        sequence = self.decoder.sequence(latent, visible, masked)
        reconstructed = self.decoder.predict(sequence, self.num_masked)
        predicted = self.predictor.predict_mean(sequence, self.num_masked)
        # 4. Compare the reconstruction with the target,
        errors = self.errors(reconstructed, take(patches, masked), take(features, masked))
        # 5. and the predicted errors with the actual ones, by the order of each pair or by their values.
        loss, right, pairs = ranking_loss(predicted, errors)
        prediction = loss.sum() / pairs.sum().clamp(min=1)
        if self.config.objective == "absolute":
            prediction = squared_error(predicted, normalized_patches(errors.detach())).mean()
        reconstruction, accuracy = errors.mean(), right.sum() / pairs.sum().clamp(min=1)
        losses = {"loss": reconstruction + prediction, "reconstruction": reconstruction, "prediction": prediction}
        return losses | {"pair_accuracy": accuracy}

    @torch.no_grad()
    def predict_difficulty(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the difficulty and the features of each patch, predicted by the teacher from the whole image."""
        encoder, embed, predictor = self.teacher
        latent = encoder(patches, encoder.positions)
        sequence = embed(latent) + F.pad(self.decoder.pos_embed, (0, 0, 1, 0))  # the class token's position is zero
        return predictor.predict_mean(sequence, patches.shape[1]), latent[:, 1:]  # pyright: ignore

    def mask(self, difficulty: Tensor, noise: dict[str, Tensor], progress: Tensor) -> Tensor:
        """Mask hard patches, as many as the schedule prescribes, and others at random."""
        (start, end), epochs = self.config.hard, self.config.optimization.epochs
        share = start + (end - start) * ((epoch_of(progress, epochs) + 1) / epochs)
        count = {"num_masked": self.num_masked, "num_hard": (self.num_masked * share).long()}
        return easy_to_hard(difficulty if self.config.choose == "hardest" else -difficulty, noise["mask"], **count)

    def encode(self, patches: Tensor, visible: Tensor) -> Tensor:
        """Encode the visible patches, with their positions."""
        return self.encoder(take(patches, visible), self.encoder.positions[visible])

    def target(self, patches: Tensor) -> Tensor:
        """Return the reconstruction target of patches, if it is pixels."""
        return normalized_patches(patches) if self.config.target == "normalized" else patches

    def errors(self, prediction: Tensor, patches: Tensor, features: Tensor) -> Tensor:
        """Return the reconstruction error of each patch."""
        if self.config.target == "features":
            return cosine_distance(prediction, features)
        return squared_error(prediction, self.target(patches))

    def after_step(self, progress: Tensor) -> None:
        """Update the teacher, an exponential moving average."""
        (start, end), epoch = self.config.momentum, epoch_of(progress, self.config.optimization.epochs)
        momentum = start + (end - start) * (epoch / self.config.momentum_epochs).clamp(max=1)
        ema_update(self.teacher, self.student(), momentum)

    def pictures(self, images: Tensor, noise: dict[str, Tensor]) -> Pictures:
        """Draw the predicted difficulty, the masks of the last epoch and the reconstructions."""
        patches = patchify(self.normalize(images), patch=self.patch)
        difficulty, _ = self.predict_difficulty(patches)
        last = torch.tensor(1 - 1 / self.config.optimization.epochs, dtype=torch.float64, device=images.device)
        mask = self.mask(difficulty, noise, last)
        visible, masked = split(mask, num_masked=self.num_masked)
        image = self.normalize.unit(images)
        sizes: Any = {"height": self.height, "width": self.width, "patch": self.patch}
        drawn = Pictures({"input": image, "seen": gray_out(image, mask, **sizes)})
        if self.config.target != "features":
            prediction = self.decoder(self.encode(patches, visible), visible, masked)
            target = self.target(take(patches, masked))
            drawn = reconstruction(self.normalize, image, prediction, target, masked, **sizes)
        columns = {"hard (red) and easy": heat_maps(image, difficulty, **sizes)} | drawn.columns
        return Pictures(columns, "; ".join(filter(None, ("masks are those of the last epoch", drawn.note))))


# Maps the names of the released model to ours
NAMES = {
    r"decoder_(blocks|norm)_losspred\.": r"predictor.\1.",
    r"decoder_pred_losspred\.": "predictor.head.",
    **MAE_FAMILY,
}

IMAGENET = Config(optimization=Optimization(epochs=200, warmup_epochs=10, clip=5.0), finetune=finetuning.HPM)
PRESETS = {
    **embedded(IMAGENET, momentum=(0.99, 0.99), **SMALL_DECODER),  # for hundreds of steps; the paper's, for 100,000
    **folder(IMAGENET, small={"momentum": (0.99, 0.999)}),
    "imagenet": IMAGENET,
    "imagenet_large": changed(IMAGENET, size="large", epochs=800, warmup_epochs=40, finetune=finetuning.HPM_LARGE),
}
RECIPE = Recipe(HPM, PRESETS, NAMES)

if __name__ == "__main__":
    pretrain(RECIPE, name="hpm", description=__doc__)
