"""Mean and standard deviation of the channels."""

from collections.abc import Sequence

from common.config import DataSettings, SettingsError
from common.data.loading import _read
from common.data.sources import Source

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """Standardize each channel of images; mean and standard deviation are stored in the checkpoint.

    Args:
        mean, std: mean and standard deviation of each channel, for images in [0, 1].

    Raises:
        ValueError: if the two have different lengths, or a standard deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean={tuple(mean)} and std={tuple(std)} must have the same length, with std above 0")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def unit(self, images: Tensor) -> Tensor:
        """Convert uint8 images to float32 in [0, 1]; return floats unchanged."""
        return images if images.is_floating_point() else images.float() / 255

    def undo(self, images: Tensor) -> Tensor:
        """Map normalized images back to [0, 1]."""
        return images * self.std + self.mean

    def forward(self, images: Tensor) -> Tensor:
        """Standardize each channel of images, uint8 or in [0, 1]."""
        if images.shape[-3] != len(self.mean):
            raise ValueError(f"images of {images.shape[-3]} channels cannot be normalized by {len(self.mean)} means")
        return (self.unit(images) - self.mean) / self.std

    def patches(self, patches: Tensor) -> Tensor:
        """Standardize each channel of patches from `mimkit.tokens.patchify`, uint8 or in [0, 1], in a single pass."""
        pixels = patches.shape[-1] // len(self.mean)
        scale = 1 / self.std if patches.is_floating_point() else 1 / (255 * self.std)
        shift = -self.mean / self.std
        return torch.addcmul(shift.flatten().repeat(pixels), patches, scale.flatten().repeat(pixels))  # channels last


def statistics(source: Source, *, limit: int = 1000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the mean and standard deviation of each channel, for images in [0, 1], with equal weight per image.

    At most `limit` evenly spaced images are used, and unreadable ones are skipped. The standard deviation is clamped
    to at least one gray level, so that constant channels can be divided by it.

    Raises:
        SettingsError: if none of these images can be read.
    """
    count = min(limit, len(source))
    moments = []  # per image: mean and mean square of each channel
    for image in (_read(source, i * len(source) // count) for i in range(count)):
        if isinstance(image, Tensor):
            unit = image.double().flatten(1) / 255
            moments.append(torch.stack([unit.mean(dim=1), unit.square().mean(dim=1)]))
    if not moments:
        raise SettingsError(f"none of {count} images can be read")
    mean, square = torch.stack(moments).mean(dim=0)
    std = (square - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())


def normalization(settings: DataSettings, source: Source) -> Normalize:
    """Build the normalization of a run, with the statistics of ImageNet or of the training images.

    Raises:
        SettingsError: if ImageNet's statistics are requested for grayscale images.
    """
    if settings.statistics == "imagenet" or (
        settings.statistics == "auto" and settings.folder and settings.channels == 3
    ):
        if settings.channels != 3:
            raise SettingsError(
                f"ImageNet's mean and std have 3 channels, not {settings.channels}: use --statistics data"
            )
        return Normalize(IMAGENET_MEAN, IMAGENET_STD)
    return Normalize(*statistics(source))
