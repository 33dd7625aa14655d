"""DropPos: drop most positions of the few visible patches, and ask where these patches belong.

    python recipes/droppos.py                                             the embedded digits, minutes on a laptop
    python recipes/droppos.py --data DIR                                  images of your own
    torchrun --nproc_per_node=8 recipes/droppos.py --preset imagenet --data DIR

Paper: DropPos: Pre-Training Vision Transformers by Reconstructing Dropped Positions, arXiv 2309.03576.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from common import recipe
from common.config import Must, Network, NonNegatives, Optimization, SettingsError
from common.data.normalize import Normalize
from common.evaluation import finetuning
from common.networks.building import grid
from common.networks.decoder import Predictor
from common.networks.initialization import initialize_mae
from common.networks.vit import SIZES, ViT
from common.pretraining import pretrain
from common.recipe import SMALL_DECODER, Recipe, digits, folder
from common.report.pictures import Pictures, gray_out
from common.training.schedules import epoch_of
from mimkit.losses import soft_cross_entropy
from mimkit.masking import random_tokens
from mimkit.positions import attentive_weights, drop_positions, permute_positions, shuffle, smoothed_targets
from mimkit.tokens import patchify, put, split, take, unpatchify

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Config(recipe.Config):
    """The settings of the paper are the preset "imagenet"."""

    mask_ratio: float = 0.75
    """share of the patches that is masked, 0 or more"""
    drop_ratio: float = 0.75
    """share of the visible patches that lose their position, up to 1; the others are anchors"""
    dropped: Literal["learned", "zero", "permuted"] = "learned"
    """what stands for a dropped position: a learned vector, zeros, or the position of another one"""
    sigma: NonNegatives = (1.0, 0.0)
    """width of the smoothed targets in patches, at the start and (were there one epoch more) at the end"""
    temperature: Annotated[float, Must("above 0", lambda x: x > 0)] = 0.1
    """patches that resemble the class token weigh more, the more so the lower this is; inf: all weigh alike"""
    confident: bool = True
    """whether patches count whose true position is already as probable as in the target"""
    shuffle: bool = False
    """shuffle the tokens before the encoder, and undo it after the decoder"""


class DropPos(nn.Module):
    def __init__(self, config: Config, normalize: Normalize) -> None:
        super().__init__()
        network, self.config, self.normalize = config.network, config, normalize
        self.view_size, self.patch, channels = config.data.image_size, network.patch, config.data.channels
        self.height, self.width = grid(config.data, network)
        sizes = {"height": self.height, "width": self.width, "patch": self.patch, "channels": channels}
        self.encoder = ViT(**sizes, **SIZES[network.size])
        # The decoder knows no position but those that the anchors bring along
        places = self.height * self.width
        self.embed = nn.Linear(self.encoder.dim, network.decoder_dim)
        self.decoder = Predictor(network.decoder_dim, network.decoder_depth, network.decoder_heads, outputs=places)
        if config.dropped == "learned":
            self.position_token = nn.Parameter(torch.zeros(1, 1, self.encoder.dim))
        self.num_masked, self.num_dropped = self.count(config.mask_ratio, config.drop_ratio)
        initialize_mae(self)

    def count(self, mask_ratio: float, drop_ratio: float) -> tuple[int, int]:
        """Count the patches to mask and the positions to drop of these shares."""
        return count_dropped(self.height * self.width, mask_ratio, drop_ratio)

    def noise(self, rand: Callable[..., Tensor], batch: int) -> dict[str, Tensor]:
        tokens = self.height * self.width
        noise = {"mask": rand(batch, tokens), "drop": rand(batch, tokens - self.num_masked)}
        chance = {"permuted": self.config.dropped == "permuted", "shuffle": self.config.shuffle}
        return noise | {name: rand(batch, tokens - self.num_masked) for name, needed in chance.items() if needed}

    def forward(self, images: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        # 1. Mask most patches at random, and drop the positions of most of those that stay visible.
        patches = patchify(self.normalize(images), patch=self.patch)
        mask = random_tokens(noise["mask"], num_masked=self.num_masked)
        visible, masked = split(mask, num_masked=self.num_masked)
        dropped = random_tokens(noise["drop"], num_masked=self.num_dropped)
        # 2. Encode the visible ones, and say of each at which position of the grid it belongs.
        logits = self.locate(take(patches, visible), visible, dropped, noise)
        # 3. The target of a position spreads over its neighbors, less and less so from epoch to epoch.
        target = self.targets(self.sigma(progress))[visible]
        # 4. Patches weigh more that resemble the class token, when the whole image is seen with all positions.
        weights = dropped * self.attention(patches, visible, masked)
        if not self.config.confident:
            weights = weights * (own(logits.softmax(dim=-1), visible) < own(target, visible))
        # 5. Compare where the position was dropped.
        total = weights.sum().clamp(min=1e-8)
        loss = (weights * soft_cross_entropy(logits, target)).sum() / total
        right = logits.argmax(dim=-1) == visible
        accuracy = (dropped & right).sum() / dropped.sum()
        return {"loss": loss, "accuracy": accuracy, "weighted_accuracy": (weights * right).sum() / total}

    def locate(self, patches: Tensor, places: Tensor, dropped: Tensor, noise: dict[str, Tensor]) -> Tensor:
        """Return a logit per position of the grid for each of some patches."""
        positions = self.encoder.positions[places]
        positions = drop_positions(positions, dropped, self.replacement(positions, dropped, noise))
        if not self.config.shuffle:
            return self.decoder.predict(self.embed(self.encoder(patches, positions)), patches.shape[1])
        order, back = shuffle(noise["shuffle"])
        latent = self.encoder(take(patches, order), take(positions, order))
        return take(self.decoder.predict(self.embed(latent), patches.shape[1]), back)

    def replacement(self, positions: Tensor, dropped: Tensor, noise: dict[str, Tensor]) -> Tensor:
        """Return what stands for dropped positions."""
        match self.config.dropped:
            case "learned":
                return self.position_token.expand_as(positions)
            case "zero":
                return torch.zeros_like(positions)
            case "permuted":
                return permute_positions(positions, dropped, noise["permuted"])

    def sigma(self, progress: Tensor) -> Tensor:
        """Return the width of the targets, constant within an epoch."""
        (start, end), epochs = self.config.sigma, self.config.optimization.epochs
        return start + (end - start) * epoch_of(progress, epochs) / epochs

    def targets(self, sigma: Tensor) -> Tensor:
        """Return the target of every position."""
        return smoothed_targets(sigma, height=self.height, width=self.width)

    @torch.no_grad()
    def attention(self, patches: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Return the weights of visible patches, as the encoder is now.

        It comes after `locate`: in older PyTorch (2.7), what autocast first sees without a gradient has none later on.
        """
        if math.isinf(self.config.temperature):
            return torch.ones_like(visible, dtype=torch.float32)
        order = torch.cat([visible, masked], dim=1)  # what becomes of the masked ones is not needed
        tokens = self.encoder(take(patches, order), self.encoder.positions[order], num_outputs=visible.shape[1])
        return attentive_weights(tokens[:, 1:], tokens[:, 0], temperature=self.config.temperature)

    def pictures(self, images: Tensor, noise: dict[str, Tensor]) -> Pictures:
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
        columns["with a position"] = unpatchify(anchored, **sizes)
        columns["put back"] = unpatchify(put(seen, found, gray), **sizes)
        return Pictures(
            columns, "put back: every patch where it was thought to belong; of several at a place one is seen"
        )


def count_dropped(places: int, mask_ratio: float, drop_ratio: float) -> tuple[int, int]:
    """Count the patches to mask and the positions to drop: what is kept is truncated, in double precision.

    Raises:
        SettingsError: if nothing would be visible or no position dropped.
    """
    visible = int(places * (1 - mask_ratio)) if 0 <= mask_ratio < 1 else 0
    dropped = visible - int(visible * (1 - drop_ratio)) if 0 < drop_ratio <= 1 else 0
    if not visible or not dropped:
        raise SettingsError(
            f"--mask-ratio {mask_ratio} and --drop-ratio {drop_ratio} of {places} leave nothing to locate"
        )
    return places - visible, dropped


def own(values: Tensor, places: Tensor) -> Tensor:
    """Take each patch's value of its own position."""
    return values.gather(-1, places[..., None]).squeeze(-1)


# From the names of the released model to ours
NAMES = {
    r"mask_pos_token": "position_token",
    r"decoder_embed\.": "embed.",
    r"decoder_(blocks|norm)\.": r"decoder.\1.",
    r"decoder_pred\.": "decoder.head.",
    r"(?=cls_token|pos_embed|patch_embed|blocks|norm)": "encoder.",
}

IMAGENET = Config(
    network=Network(decoder_depth=2),
    optimization=Optimization(epochs=200, warmup_epochs=10, clip=5.0, clip_each=True),
    finetune=finetuning.DROPPOS,
)
PRESETS = {"digits": digits(IMAGENET, **SMALL_DECODER), "folder": folder(IMAGENET), "imagenet": IMAGENET}
RECIPE = Recipe(DropPos, PRESETS, NAMES)

if __name__ == "__main__":
    pretrain(RECIPE, name="droppos", description=__doc__)
