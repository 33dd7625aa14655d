"""Views of an image: crops, flips, resizing and color changes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.config import SettingsError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Generator, Tensor

Transform = Callable[[Tensor, Generator], Tensor | tuple[Tensor, ...]]


def random_crop_box(
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: Generator,
) -> tuple[int, int, int, int]:
    """Draw a random box (top, left, height, width) inside an image.

    The box is the first of ten draws that fits or, if none does, the largest central box with a valid aspect ratio.

    Args:
        height, width: size of the image.
        scale: range of the area, as a fraction of the image.
        ratio: range of width / height; its logarithm is drawn uniformly.
        generator: source of randomness.

    Raises:
        ValueError: if a range is empty or not positive.
    """
    if not (0 < scale[0] <= scale[1] and 0 < ratio[0] <= ratio[1]):
        raise ValueError(f"scale={scale} and ratio={ratio} must be ranges of positive numbers")
    low, high = math.log(ratio[0]), math.log(ratio[1])
    draws = torch.rand(10, 4, generator=generator, dtype=torch.float64).tolist()
    for u_area, u_ratio, u_top, u_left in draws:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = math.exp(low + (high - low) * u_ratio)
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
    h = min(height, max(1, round(width / ratio[0])))
    w = min(width, max(1, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def one_shot_crop_size(height: int, width: int, area_fraction: float, log_ratio: float) -> tuple[int, int]:
    """Return the size of a random crop that is clipped to the image instead of redrawn, as in linear probing.

    Args:
        height, width: size of the image.
        area_fraction: area as a fraction of the image, usually uniform in [0.08, 1].
        log_ratio: log(width / height), usually uniform in [log 3/4, log 4/3].
    """
    area, aspect = height * width * float(area_fraction), math.exp(log_ratio)
    h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
    return min(max(h, 1), height), min(max(w, 1), width)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize a uint8 image by antialiased bicubic interpolation; return it unchanged if the size is the same."""
    if image.shape[-2:] == (height, width):
        return image
    # The fast kernel requires at most four channels in channels-last memory format.
    parts = [part[None].contiguous(memory_format=torch.channels_last) for part in image.split(4)]
    parts = [F.interpolate(part, (height, width), mode="bicubic", antialias=True)[0] for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class CropFlip:
    """The default view of pre-training: a random resized crop and a horizontal flip.

    Args:
        size: height and width in pixels.
        scale: range of the area of the crop, as a fraction of the image.
        ratio: range of the aspect ratio (width / height) of the crop, relative to that of `size`.
        flip: probability of the flip; 0 for images whose orientation has a meaning, such as digits.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __call__(self, image: Tensor, generator: Generator) -> Tensor:
        ratio = _relative(self.ratio, self.size)
        H, W = image.shape[-2:]
        top, left, h, w = random_crop_box(H, W, scale=self.scale, ratio=ratio, generator=generator)
        view = resize(image[:, top : top + h, left : left + w], *self.size)
        return view.flip(-1) if torch.rand((), generator=generator) < self.flip else view


def _relative(ratio: tuple[float, float], size: tuple[int, int]) -> tuple[float, float]:
    return ratio[0] * size[1] / size[0], ratio[1] * size[1] / size[0]


@dataclass(frozen=True)
class CenterCrop:
    """The test view: resize the image to cover `size` / `crop_fraction`, then crop the center.

    With `crop_fraction=1`, an image of the same aspect ratio is only resized.
    """

    size: tuple[int, int]
    crop_fraction: float = 0.875

    def __post_init__(self) -> None:
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction={self.crop_fraction} must be above 0 and at most 1")

    def __call__(self, image: Tensor, generator: Generator | None = None) -> Tensor:
        height, width = self.size
        image = cover(image, int(height / self.crop_fraction), int(width / self.crop_fraction))
        top, left = round((image.shape[-2] - height) / 2), round((image.shape[-1] - width) / 2)
        return image[:, top : top + height, left : left + width]


def cover(image: Tensor, height: int, width: int) -> Tensor:
    """Resize a uint8 image, keeping its aspect ratio, to the smallest size that covers `height` × `width`."""
    h, w = image.shape[-2:]
    if h * width <= w * height:  # wider than requested: the height determines the scale
        return resize(image, height, height * w // h)
    return resize(image, width * h // w, width)


@dataclass(frozen=True)
class WeakStrong:
    """A weakly and a strongly augmented view of almost the whole image, the second with color jitter.

    The image is resized to cover `size` and padded by reflection; each view is an independent random crop of it,
    flipped at random. The second view gets, with probability `jitter`, random brightness, contrast, saturation and hue
    in random order; it is then converted to grayscale, solarized or blurred, each with equal probability.

    Args:
        size: height and width in pixels.
        pad: width of the reflection padding in pixels.
        flip: probability of a flip; 0 for images whose orientation has a meaning, such as digits.
        jitter: probability of color jitter.

    Raises:
        SettingsError: if `size` is not larger than `pad`.
        ValueError: if an image has neither 1 nor 3 channels.
    """

    size: tuple[int, int]
    pad: int = 4
    flip: float = 0.5
    jitter: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.pad < min(self.size):
            raise SettingsError(
                f"pad={self.pad} pixels of a view of {self.size[0]} × {self.size[1]} cannot be reflected"
            )

    def __call__(self, image: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        whole = cover(image, *self.size)
        return self.crop(whole, generator), self.recolor(self.crop(whole, generator), generator)

    def crop(self, image: Tensor, generator: Generator) -> Tensor:
        """Crop and flip a view at random from an image that covers it."""
        u_top, u_left, u_flip = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        room = [side + 2 * self.pad - own for side, own in zip(image.shape[-2:], self.size, strict=True)]
        view = padded_crop(image, int(u_top * (room[0] + 1)), int(u_left * (room[1] + 1)), size=self.size, pad=self.pad)
        return view.flip(-1) if u_flip < self.flip else view

    def recolor(self, view: Tensor, generator: Generator) -> Tensor:
        """Apply random color jitter, then grayscale, solarization or blur."""
        u = torch.rand(7, generator=generator, dtype=torch.float64).tolist()
        order = torch.randperm(4, generator=generator).tolist()
        spreads = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
        changes = [(name, (name != "hue") + (2 * u[i] - 1) * by) for i, (name, by) in enumerate(spreads.items())]
        jitter = [changes[i] for i in order] if u[4] < self.jitter else []
        return recolor(view, jitter, ("gray", "solarize", "blur")[int(3 * u[5])], radius=0.1 + 1.9 * u[6])


def padded_crop(image: Tensor, top: int, left: int, *, size: tuple[int, int], pad: int) -> Tensor:
    """Crop an image padded by reflection; `top` and `left` refer to the padded image."""
    for axis, first, count in ((1, top, size[0]), (2, left, size[1])):
        last = image.shape[axis] - 1
        places = torch.arange(first - pad, first - pad + count).abs()
        image = image.index_select(axis, last - (last - places).abs())
    return image


def recolor(
    image: Tensor,
    jitter: Sequence[tuple[str, float]],
    effect: Literal["gray", "solarize", "blur"],
    *,
    radius: float,
) -> Tensor:
    """Change the colors of a uint8 image, with torchvision's functions for Pillow images.

    Args:
        image: an image with 1 or 3 channels; saturation, hue and "gray" have no effect on 1 channel.
        jitter: factors of "brightness", "contrast" and "saturation", and shift of "hue" (−0.5 to 0.5), in order.
        effect: applied last; "solarize" inverts values of at least 128.
        radius: radius of the blur in pixels.

    Raises:
        ValueError: if the number of channels is neither 1 nor 3.
    """
    from torchvision.transforms.v2 import functional

    if len(image) not in (1, 3):
        raise ValueError(f"colors of 1 or 3 channels can be changed, not of {len(image)}")
    picture: Any = Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy())
    for name, by in jitter:
        picture = getattr(functional, f"adjust_{name}")(picture, by)
    if effect == "gray":
        picture = functional.rgb_to_grayscale(picture, num_output_channels=len(image))
    elif effect == "solarize":
        picture = functional.solarize(picture, 128)
    else:
        picture = picture.filter(ImageFilter.GaussianBlur(radius))
    return torch.from_numpy(np.array(picture)).view(*image.shape[1:], len(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class OneShotCrop:
    """The training view of a linear probe: a random crop, clipped to the image instead of redrawn, and a flip."""

    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5

    def __call__(self, image: Tensor, generator: Generator) -> Tensor:
        (H, W), (height, width) = image.shape[-2:], self.size
        u_area, u_ratio, u_top, u_left, u_flip = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        area = self.scale[0] + (self.scale[1] - self.scale[0]) * u_area
        log_ratio = math.log(3 / 4) + math.log(16 / 9) * u_ratio + math.log(width / height)
        h, w = one_shot_crop_size(H, W, area, log_ratio)
        top, left = int(u_top * (H - h + 1)), int(u_left * (W - w + 1))
        view = resize(image[:, top : top + h, left : left + w], height, width)
        return view.flip(-1) if u_flip < self.flip else view
