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
    """Bring images to mean 0 and standard deviation 1 per channel. The numbers are stored with the checkpoint.

    Args:
        mean, std: per channel, of images in [0, 1].
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
        """Return uint8 images as float32 in [0, 1], and floats as they are."""
        return images if images.is_floating_point() else images.float() / 255

    def undo(self, images: Tensor) -> Tensor:
        """Return normalized images in [0, 1] again."""
        return images * self.std + self.mean

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-3] != len(self.mean):
            raise ValueError(f"images of {images.shape[-3]} channels cannot be normalized by {len(self.mean)} means")
        return (self.unit(images) - self.mean) / self.std

    def patches(self, patches: Tensor) -> Tensor:
        """Return the same of patches as `mimkit.tokens` cuts them, uint8 or in [0, 1], in one pass over them."""
        pixels = patches.shape[-1] // len(self.mean)
        scale = 1 / self.std if patches.is_floating_point() else 1 / (255 * self.std)
        shift = -self.mean / self.std
        return torch.addcmul(shift.flatten().repeat(pixels), patches, scale.flatten().repeat(pixels))  # channel fastest

    def undo_patches(self, patches: Tensor) -> Tensor:
        """Return normalized patches in [0, 1] again."""
        return (patches.unflatten(-1, (-1, len(self.mean))) * self.std.flatten() + self.mean.flatten()).flatten(-2)


def statistics(source: Source, *, limit: int = 1000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel, for images in [0, 1]; all images weigh the same.

    At most `limit` evenly spaced images are looked at, and of these the ones that can be read. A standard deviation is
    at least one gray level, so that constant channels can be divided by it.
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
    """Mean and std of the channels: ImageNet's or the training images' own.

    Raises:
        SettingsError: if ImageNet's are asked for grayscale images.
    """
    if settings.statistics == "imagenet" or (
        settings.statistics == "auto" and settings.path and settings.channels == 3
    ):
        if settings.channels != 3:
            raise SettingsError(
                f"ImageNet's mean and std have 3 channels, not {settings.channels}: use --statistics data"
            )
        return Normalize(IMAGENET_MEAN, IMAGENET_STD)
    return Normalize(*statistics(source))
