"""HPM: hard patches mining. A second decoder predicts which patches are hard; a teacher masks more and more of them.

    python recipes/hpm.py                                                 the embedded digits, minutes on a laptop
    python recipes/hpm.py --data DIR                                      images of your own
    torchrun --nproc_per_node=8 recipes/hpm.py --preset imagenet --data DIR

Paper: Hard Patches Mining for Masked Image Modeling, arXiv 2304.05919.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from common import finetuning
from common.config import Flat, Images, Network, Optimization, Run
from common.engine import epoch_of
from common.finetuning import Finetuning
from common.images import Normalize
from common.pretraining import Evaluation, count_masked, encoder_and_decoder, pretrain
from common.report import Pictures, gray_out, heat_maps, shown
from common.teacher import follow, teacher_of
from common.vit import Predictor, initialize_mae
from mimkit.losses import cosine_distance, normalized_patches, ranking_loss, squared_error
from mimkit.masking import easy_to_hard
from mimkit.tokens import patchify, put, split, take, unpatchify

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The settings of the paper are the preset "imagenet"."""

    mask_ratio: float = 0.75
    """share of the patches that is masked"""
    hard: tuple[float, float] = (0.0, 0.5)
    """share of the masked patches that the teacher chooses, at the start and at the end. 0 0: all at random; 1 1: the
    hardest only; 0.5 0: hard to easy"""
    choose: Literal["hardest", "easiest"] = "hardest"
    """which patches the teacher chooses"""
    objective: Literal["relative", "absolute"] = "relative"
    """what the predictor learns: which of two patches is harder, or how hard each is"""
    target: Literal["pixels", "normalized", "features"] = "pixels"
    """what is reconstructed: pixels, as in all published commands; normalized per patch; the teacher's features"""
    momentum: tuple[float, float] = (0.999, 0.9999)
    """of the teacher, in the first epoch and after --momentum-epochs"""
    momentum_epochs: float = 100.0
    """epochs in which the momentum rises, whatever the length of the training"""
    evaluate: tuple[Evaluation, ...] = ("finetune",)
    """fine-tune the encoder; the same network from scratch for as many epochs, for as much time; judge it frozen"""
    run: Flat[Run] = field(default_factory=Run)
    images: Flat[Images] = field(default_factory=Images)
    network: Flat[Network] = field(default_factory=Network)
    optimization: Flat[Optimization] = field(default_factory=Optimization)
    finetune: Finetuning = field(default_factory=Finetuning)


class HPM(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder_and_decoder(config.images, config.network)
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        network, outputs = config.network, self.patch**2 * config.images.channels
        if config.target == "features":
            self.decoder.head = nn.Linear(network.decoder_dim, self.encoder.dim)
        # The published head predicts as many values as a patch has, and what counts is their mean
        self.predictor = Predictor(network.decoder_dim, network.decoder_depth, network.decoder_heads, outputs)
        self.config, self.normalize, self.view_size = config, normalize, config.images.image_size
        self.num_masked = count_masked(self.height * self.width, config.mask_ratio)
        if not config.momentum_epochs > 0:
            raise ValueError(f"--momentum-epochs {config.momentum_epochs} is not above 0")
        initialize_mae(self)
        self.teacher = teacher_of(self.student())

    def student(self) -> nn.ModuleList:
        """What the teacher needs to predict how hard patches are."""
        return nn.ModuleList([self.encoder, self.decoder.embed, self.predictor])

    def noise(self, rand: Callable[..., Tensor], batch: int) -> dict[str, Tensor]:
        return {"mask": rand(batch, self.height * self.width)}

    def forward(self, images: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        # 1. The teacher sees the whole image and predicts how hard each patch is to reconstruct.
        patches = patchify(self.normalize(images), patch=self.patch)
        difficulty, features = self.ask_teacher(patches)
        # 2. Mask the hardest ones, more of them as training goes on, and others at random.
        visible, masked = split(self.mask(difficulty, noise, progress), num_masked=self.num_masked)
        # 3. Encode the visible ones; from the same tokens one decoder reconstructs what is masked, the other predicts
        #    how well that goes.
        latent = self.encoder(take(patches, visible), self.encoder.positions[visible])
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
    def ask_teacher(self, patches: Tensor) -> tuple[Tensor, Tensor]:
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

    def errors(self, prediction: Tensor, patches: Tensor, features: Tensor) -> Tensor:
        """Return how far off each prediction is."""
        match self.config.target:
            case "pixels":
                return squared_error(prediction, patches)
            case "normalized":
                return squared_error(prediction, normalized_patches(patches))
            case "features":
                return cosine_distance(prediction, features)

    def after_step(self, progress: Tensor) -> None:
        """Let the teacher follow."""
        (start, end), epoch = self.config.momentum, epoch_of(progress, self.config.optimization.epochs)
        follow(self.teacher, self.student(), start + (end - start) * (epoch / self.config.momentum_epochs).clamp(max=1))

    def pictures(self, images: Tensor, noise: dict[str, Tensor]) -> Pictures:
        sizes = {"height": self.height, "width": self.width, "patch": self.patch}
        patches = patchify(self.normalize(images), patch=self.patch)
        difficulty, _ = self.ask_teacher(patches)
        last = torch.tensor(1 - 1 / self.config.optimization.epochs, dtype=torch.float64)
        mask = self.mask(difficulty, noise, last.to(images.device))
        image = self.normalize.unit(images)
        columns = {"input": image, "hard (red) and easy": heat_maps(image, difficulty, **sizes)}
        columns["seen"] = gray_out(image, mask, **sizes)
        note = "masks are those of the last epoch"
        if self.config.target == "features":
            return Pictures(columns, note)
        visible, masked = split(mask, num_masked=self.num_masked)
        latent = self.encoder(take(patches, visible), self.encoder.positions[visible])
        target = patches if self.config.target == "pixels" else normalized_patches(patches)
        prediction = put(self.decoder(latent, visible, masked), masked, target)
        show = self.normalize.undo if self.config.target == "pixels" else shown
        columns |= {"prediction": show(unpatchify(prediction, **sizes)), "target": show(unpatchify(target, **sizes))}
        return Pictures(columns, note + "; prediction: visible patches are the input's")


# Names of the released model, for `common.checkpoint.load_weights`
NAMES = {
    r"mask_token": "decoder.mask_token",
    r"decoder_(blocks|norm)_losspred\.": r"predictor.\1.",
    r"decoder_pred_losspred\.": "predictor.head.",
    r"decoder_(embed|blocks|norm)\.": r"decoder.\1.",
    r"decoder_pred\.": "decoder.head.",
    r"(?=cls_token|pos_embed|patch_embed|blocks|norm)": "encoder.",
}

IMAGENET = Config(
    optimization=Optimization(epochs=200, warmup_epochs=10, clip=5.0),
    finetune=finetuning.HPM,
)
FOLDER = replace(
    IMAGENET,
    evaluate=("finetune", "scratch"),
    network=Network(size="small"),
    optimization=replace(IMAGENET.optimization, epochs=300, batch_size=256, warmup_epochs=20),
    finetune=finetuning.FOLDER,
)
DIGITS = Config(
    evaluate=("finetune", "scratch"),
    momentum=(0.99, 0.99),  # of some hundred steps; the paper's are of 100,000
    images=Images(image_size=(32, 32), channels=1, crop_scale=(0.6, 1.0), flip=0.0),
    network=Network(size="nano", patch=4, decoder_dim=48, decoder_depth=1, decoder_heads=3),
    optimization=Optimization(epochs=40, batch_size=64, base_lr=4e-3, warmup_epochs=4, clip=5.0),
    finetune=finetuning.DIGITS,
)

METHOD, PRESETS = HPM, {"digits": DIGITS, "folder": FOLDER, "imagenet": IMAGENET}

if __name__ == "__main__":
    pretrain(METHOD, PRESETS, name="hpm", description=__doc__)
