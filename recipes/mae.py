"""MAE: masked autoencoders. Mask most patches, encode the visible ones, and predict the pixels of the masked ones.

    python recipes/mae.py                                                 MNIST, minutes on a laptop
    python recipes/mae.py --data DIR                                      images of your own
    torchrun --nproc_per_node=8 recipes/mae.py --preset imagenet --data DIR

Paper: Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377.
"""

from dataclasses import dataclass
from typing import Literal

from common.config import Optimization
from common.networks import count_masked, encoder_and_decoder, initialize_mae
from common.pretraining import pretrain
from common.recipe import SMALL_DECODER, BaseConfig, Normalize, Rand, Recipe, changed, embedded, finetuning, folder
from common.weights.published_names import MAE_FAMILY
from mimkit.losses import normalized_patches, squared_error
from mimkit.masking import random_tokens
from mimkit.positions import sincos
from mimkit.tokens import patchify, split, take

from torch import Tensor, nn


@dataclass(frozen=True)
class Config(BaseConfig):
    """The settings of the paper are the preset "imagenet": 1600 epochs, batches of 4096."""

    mask_ratio: float = 0.75
    """share of the patches that is masked"""
    positions: Literal["absolute", "relative"] = "absolute"
    """sine-cosine position embeddings, or contextual relative position encoding (iRPE) as in the paper of LoMaR"""
    normalize_target: bool = True
    """predict pixels normalized per patch, which improves accuracy; without, reconstructions look better"""


class MAE(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        table = sincos if config.positions == "absolute" else None
        self.encoder, self.decoder = encoder_and_decoder(config.data, config.network, table=table)
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        self.config, self.normalize, self.view_size = config, normalize, config.data.image_size
        self.num_masked = count_masked(self.height * self.width, config.mask_ratio)
        initialize_mae(self)

    def noise(self, rand: Rand, batch: int) -> dict[str, Tensor]:
        return {"mask": rand(batch, self.height * self.width)}

    def forward(self, images: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        prediction, target, _ = self.reconstruct(images, noise)
        # 6. The loss is the mean squared error of the masked patches.
        return {"loss": squared_error(prediction, target).mean()}

    def reconstruct(self, images: Tensor, noise: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return prediction, target and indices of the masked patches."""
        # 1. Split the images into patches.
        patches = patchify(self.normalize(images), patch=self.patch)
        # 2. Mask most of them at random.
        mask = random_tokens(noise["mask"], num_masked=self.num_masked)
        visible, masked = split(mask, num_masked=self.num_masked)
        # 3. Encode only the visible patches, with their positions.
        positions, buckets = self.encoder.positions[visible], self.encoder.buckets_of(visible)
        latent = self.encoder(take(patches, visible), positions, buckets=buckets)
        # 4. Predict the pixels of the masked ones.
        prediction = self.decoder(latent, visible, masked)
        # 5. The target is the pixels of the masked patches, normalized per patch.
        target = take(patches, masked)
        return prediction, normalized_patches(target) if self.config.normalize_target else target, masked


IMAGENET = Config(optimization=Optimization(epochs=1600))
PRESETS = {**embedded(IMAGENET, **SMALL_DECODER), **folder(IMAGENET), "imagenet": IMAGENET}
PRESETS["imagenet_large"] = changed(IMAGENET, size="large", finetune=finetuning.MAE_LARGE)
PRESETS["imagenet_huge"] = changed(IMAGENET, size="huge", patch=14, finetune=finetuning.MAE_HUGE)
RECIPE = Recipe(MAE, PRESETS, MAE_FAMILY, optional=(r"decoder\.",))

if __name__ == "__main__":
    pretrain(RECIPE, name="mae", description=__doc__)
