"""Data augmentation for fine-tuning, by timm."""

from collections.abc import Callable, Sequence
from typing import Any

from common.data.views import _relative
from common.randomness import globally_seeded

import torch
from PIL import Image
from torch import Generator, Tensor


class Augment:
    """The training view of fine-tuning, by timm: random crop, flip, RandAugment and random erasing, in float32.

    Erased pixels are noise around `mean`, so they may lie outside [0, 1].

    Args:
        size: height and width in pixels.
        mean, std: mean and standard deviation of the 1 or 3 channels, for images in [0, 1].
        scale, ratio, flip: as in `CropFlip`.
        auto_augment: timm's name of the policy; `None` for none.
        erasing: probability of replacing a rectangle by noise with that mean and std.

    Raises:
        ValueError: if the number of channels is neither 1 nor 3.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        erasing: float = 0.25,
    ) -> None:
        from timm.data.transforms_factory import create_transform

        if len(mean) not in (1, 3):
            raise ValueError(f"RandAugment works on 1 or 3 channels, not {len(mean)}: take CropFlip")
        self._mean, self._std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (mean, std))
        self._channels = len(mean)
        self._transform: Callable[[Image.Image], Tensor] = create_transform(  # type: ignore[assignment]
            size,
            is_training=True,
            scale=scale,
            ratio=_relative(ratio, size),
            hflip=flip,
            color_jitter=None,  # type: ignore[arg-type]
            auto_augment=auto_augment,
            interpolation="bicubic",
            mean=tuple(mean),
            std=tuple(std),
            re_prob=erasing,
            re_mode="pixel",
        )

    def __call__(self, image: Tensor, generator: Generator) -> Tensor:
        if len(image) != self._channels:
            raise ValueError(f"an image of {len(image)} channels cannot be normalized by {self._channels} means")
        pixels = image[0] if self._channels == 1 else image.permute(1, 2, 0)
        with globally_seeded(int(torch.randint(2**32, (), generator=generator))):
            return self._transform(Image.fromarray(pixels.numpy())) * self._std + self._mean


class Mix:
    """Mixup or cutmix of a whole batch, with equal probability, by timm; labels become soft targets.

    The images are modified in place. If both are disabled, labels are still smoothed.

    Args:
        num_classes: number of classes.
        mixup, cutmix: parameter of the beta distribution of the mixing ratio; 0: disabled.
        smoothing: label smoothing, the share of each target that is spread over all classes.

    Raises:
        ValueError: if the number of images is odd, or they are not floats.
    """

    def __init__(self, num_classes: int, *, mixup: float = 0.8, cutmix: float = 1.0, smoothing: float = 0.1) -> None:
        from timm.data.mixup import Mixup

        self.enabled = mixup > 0 or cutmix > 0
        self._mixup = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def __call__(self, batch: tuple[Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor]:
        from timm.data.mixup import mixup_target

        images, labels = batch
        if not self.enabled:
            return images, mixup_target(labels, self._mixup.num_classes, 1.0, self._mixup.label_smoothing)
        if len(images) % 2:
            raise ValueError(f"mixup and cutmix mix pairs: a batch of {len(images)} images is odd")
        if not images.is_floating_point():
            raise ValueError(f"mixup and cutmix mix floats, not {images.dtype}")
        with globally_seeded(seed):
            return self._mixup(images, labels)


def auto_augment_policy(name: str) -> Any:
    """Return timm's augmentation policy of a name: RandAugment, AugMix, 3-Augment or AutoAugment.

    Raises:
        ValueError, AssertionError, KeyError: if timm has no policy of this name.
    """
    from timm.data import auto_augment as timm_policies

    hparams: dict[str, Any] = {"translate_const": 1, "img_mean": (0, 0, 0)}
    if name.startswith("rand"):
        policy = timm_policies.rand_augment_transform(name, hparams)
        if name != "rand" and not name.startswith("rand-"):
            raise ValueError(name)
        return policy
    if name.startswith("augmix"):
        return timm_policies.augment_and_mix_transform(name, hparams)
    return timm_policies.auto_augment_transform(name, hparams)
