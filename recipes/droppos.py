"""DropPos: dropped positions. Drop most positions of the few visible patches, and predict these positions.

    python recipes/droppos.py                                             MNIST, minutes on a laptop
    python recipes/droppos.py --data DIR                                  images of your own
    torchrun --nproc_per_node=8 recipes/droppos.py --preset imagenet --data DIR

Paper: DropPos: Pre-Training Vision Transformers by Reconstructing Dropped Positions, arXiv 2309.03576.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from common.config import Must, Network, NonNegatives, Optimization, SettingsError
from common.networks import build_predictor, build_vit, decoder_sizes, initialize_mae
from common.pretraining import pretrain
from common.recipe import SMALL_DECODER, BaseConfig, Normalize, Rand, Recipe, changed, embedded, finetuning, folder
from common.report import Pictures, gray_out
from common.training.schedules import epoch_of
from common.weights.published_names import MAE_FAMILY
from mimkit.losses import soft_cross_entropy
from mimkit.masking import random_tokens
from mimkit.positions import attentive_weights, drop_positions, permute_positions, shuffle, smoothed_targets
from mimkit.tokens import patchify, put, split, take, unpatchify

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Config(BaseConfig):
    """The settings of the paper are the preset "imagenet": 200 epochs, a decoder of two blocks."""

    mask_ratio: float = 0.75
    """share of the patches that is masked, 0 or more"""
    drop_ratio: float = 0.75
    """share of the visible patches whose position is dropped, at most 1; the others are anchors"""
    dropped: Literal["learned", "zero", "permuted"] = "learned"
    """replacement of dropped positions: a learned vector, zeros, or a permutation of them"""
    sigma: NonNegatives = (1.0, 0.0)
    """standard deviation of the smoothed targets in patches: in the first epoch, and in the limit at the end"""
    temperature: Annotated[float, Must("above 0", lambda x: x > 0)] = 0.1
    """temperature of attentive weights, which favor patches similar to the class token; inf: equal weights"""
    confident: bool = True
    """whether to include patches whose true position is already as probable as in the target"""
    shuffle: bool = False
    """shuffle the tokens before the encoder, and restore their order after the decoder"""


class DropPos(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        self.encoder = build_vit(config.data, config.network)
        self.height, self.width, self.patch = self.encoder.height, self.encoder.width, self.encoder.patch
        self.config, self.normalize, self.view_size = config, normalize, config.data.image_size
        # The decoder adds no positions: the anchors carry theirs from the encoder
        places = self.height * self.width
        self.embed = nn.Linear(self.encoder.dim, decoder_sizes(config.network)[0])
        self.decoder = build_predictor(config.network, outputs=places)
        if config.dropped == "learned":
            self.position_token = nn.Parameter(torch.zeros(1, 1, self.encoder.dim))
        self.num_masked, self.num_dropped = self.count(config.mask_ratio, config.drop_ratio)
        initialize_mae(self)

    def count(self, mask_ratio: float, drop_ratio: float) -> tuple[int, int]:
        """Return the number of patches to mask and of positions to drop."""
        return count_dropped(self.height * self.width, mask_ratio, drop_ratio)

    def noise(self, rand: Rand, batch: int) -> dict[str, Tensor]:
        tokens = self.height * self.width
        noise = {"mask": rand(batch, tokens), "drop": rand(batch, tokens - self.num_masked)}
        chance = {"permuted": self.config.dropped == "permuted", "shuffle": self.config.shuffle}
        return noise | {name: rand(batch, tokens - self.num_masked) for name, needed in chance.items() if needed}

    def forward(self, images: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        # 1. Mask most patches at random, and drop the positions of most visible patches.
        patches = patchify(self.normalize(images), patch=self.patch)
        mask = random_tokens(noise["mask"], num_masked=self.num_masked)
        visible, masked = split(mask, num_masked=self.num_masked)
        dropped = random_tokens(noise["drop"], num_masked=self.num_dropped)
        # 2. Encode the visible patches, and predict the position of each in the grid.
        logits = self.locate(take(patches, visible), visible, dropped, noise)
        # 3. The target of a position is smoothed over its neighbors, less with every epoch.
        target = self.targets(self.sigma(progress))[visible]
        # 4. Weight patches by their similarity to the class token when the whole image is encoded with positions.
        weights = dropped * self.attention(patches, visible, masked)
        if not self.config.confident:
            weights = weights * (own(logits.softmax(dim=-1), visible) < own(target, visible))
        # 5. The loss is the weighted cross entropy of the dropped positions.
        total = weights.sum().clamp(min=1e-8)
        loss = (weights * soft_cross_entropy(logits, target)).sum() / total
        right = logits.argmax(dim=-1) == visible
        accuracy = (dropped & right).sum() / dropped.sum()
        return {"loss": loss, "accuracy": accuracy, "weighted_accuracy": (weights * right).sum() / total}

    def locate(self, patches: Tensor, places: Tensor, dropped: Tensor, noise: dict[str, Tensor]) -> Tensor:
        """Return the logits of all positions of the grid for each of the given patches."""
        positions = self.encoder.positions[places]
        positions = drop_positions(positions, dropped, self.replacement(positions, dropped, noise))
        if not self.config.shuffle:
            return self.decoder.predict(self.embed(self.encoder(patches, positions)), patches.shape[1])
        order, back = shuffle(noise["shuffle"])
        latent = self.encoder(take(patches, order), take(positions, order))
        return take(self.decoder.predict(self.embed(latent), patches.shape[1]), back)

    def replacement(self, positions: Tensor, dropped: Tensor, noise: dict[str, Tensor]) -> Tensor:
        """Return the replacements of dropped positions."""
        if self.config.dropped == "permuted":
            return permute_positions(positions, dropped, noise["permuted"])
        learned = self.config.dropped == "learned"
        return self.position_token.expand_as(positions) if learned else torch.zeros_like(positions)

    def sigma(self, progress: Tensor) -> Tensor:
        """Return the standard deviation of the smoothed targets, constant within an epoch."""
        (start, end), epochs = self.config.sigma, self.config.optimization.epochs
        return start + (end - start) * epoch_of(progress, epochs) / epochs

    def targets(self, sigma: Tensor) -> Tensor:
        """Return the smoothed target of every position."""
        return smoothed_targets(sigma, height=self.height, width=self.width)

    @torch.no_grad()
    def attention(self, patches: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Return attentive weights of the visible patches, computed with the current encoder."""
        # Called after `locate`: autocast of PyTorch 2.7 caches weights, without a gradient if first used under no_grad
        if math.isinf(self.config.temperature):
            return torch.ones_like(visible, dtype=torch.float32)
        order = torch.cat([visible, masked], dim=1)  # outputs of masked patches are not needed
        tokens = self.encoder(take(patches, order), self.encoder.positions[order], num_outputs=visible.shape[1])
        return attentive_weights(tokens[:, 1:], tokens[:, 0], temperature=self.config.temperature)

    def pictures(self, images: Tensor, noise: dict[str, Tensor]) -> Pictures:
        """Draw the visible patches, those with a position, and all at their predicted positions."""
        sizes = {"height": self.height, "width": self.width, "patch": self.patch}
        patches = patchify(self.normalize(images), patch=self.patch)
        mask = random_tokens(noise["mask"], num_masked=self.num_masked)
        visible, _ = split(mask, num_masked=self.num_masked)
        dropped = random_tokens(noise["drop"], num_masked=self.num_dropped)
        logits = self.locate(take(patches, visible), visible, dropped, noise)
        image = self.normalize.unit(images)
        seen, gray = take(patchify(image, patch=self.patch), visible), torch.full_like(patches, 0.5)
        anchored = put(torch.where(dropped[..., None], 0.5, seen), visible, gray)
        found = torch.where(dropped, logits.argmax(dim=-1), visible)
        columns = {"input": image, "visible": gray_out(image, mask, **sizes)}
        columns |= {"with a position": unpatchify(anchored, **sizes)}
        columns |= {"put back": unpatchify(put(seen, found, gray), **sizes)}
        return Pictures(columns, "put back: every patch at its most probable position; of several there, one is drawn")


def count_dropped(tokens: int, mask_ratio: float, drop_ratio: float) -> tuple[int, int]:
    """Count the patches to mask and the positions to drop; the numbers kept are truncated in double precision."""
    visible = int(tokens * (1 - mask_ratio)) if 0 <= mask_ratio < 1 else 0
    dropped = visible - int(visible * (1 - drop_ratio)) if 0 < drop_ratio <= 1 else 0
    if not visible or not dropped:
        ratios = f"--mask-ratio {mask_ratio} and --drop-ratio {drop_ratio}"
        raise SettingsError(f"{ratios} of {tokens} leave nothing to locate")
    return tokens - visible, dropped


def own(values: Tensor, places: Tensor) -> Tensor:
    """Return the value of each patch at its true position."""
    return values.gather(-1, places[..., None]).squeeze(-1)


# Maps the names of the released model to ours
NAMES = {r"mask_pos_token": "position_token", r"decoder_embed\.": "embed.", **MAE_FAMILY}

IMAGENET = Config(
    network=Network(decoder_depth=2),
    optimization=Optimization(epochs=200, warmup_epochs=10, clip=5.0, clip_each=True),
    finetune=finetuning.DROPPOS,
)
LARGE = changed(IMAGENET, size="large", epochs=800, warmup_epochs=40, finetune=finetuning.DROPPOS_LARGE)
PRESETS = {**embedded(IMAGENET, **SMALL_DECODER), **folder(IMAGENET, decoder_depth=2), "imagenet": IMAGENET}
PRESETS["imagenet_large"] = LARGE
RECIPE = Recipe(DropPos, PRESETS, NAMES)

if __name__ == "__main__":
    pretrain(RECIPE, name="droppos", description=__doc__)
