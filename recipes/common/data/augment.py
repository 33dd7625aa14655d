"""Data augmentation for fine-tuning, by timm."""

from collections.abc import Callable, Sequence
from typing import Any

from common.data.views import _relative
from common.randomness import globally_seeded

import torch
from PIL import Image
from torch import Generator, Tensor


class Augment:
    """The training view of fine-tuning, by timm: random crop, flip and RandAugment.

    Args:
        size: height and width in pixels.
        mean: mean of the 1 or 3 channels, for images in [0, 1]; rotated and shifted images are filled with it.
        scale, ratio, flip: as in `CropFlip`.
        auto_augment: timm's name of the policy; `None` for none.

    Raises:
        ValueError: if the number of channels is neither 1 nor 3.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        mean: Sequence[float],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    ) -> None:
        from timm.data.transforms_factory import create_transform

        if len(mean) not in (1, 3):
            raise ValueError(f"RandAugment works on 1 or 3 channels, not {len(mean)}: take CropFlip")
        self._channels = len(mean)
        self._transform: Callable[[Image.Image], Any] = create_transform(  # type: ignore[assignment]
            size,
            is_training=True,
            scale=scale,
            ratio=_relative(ratio, size),
            hflip=flip,
            color_jitter=None,  # type: ignore[arg-type]
            auto_augment=auto_augment,
            interpolation="bicubic",
            mean=tuple(mean),
            use_prefetcher=True,  # uint8 instead of normalized floats
        )

    def __call__(self, image: Tensor, generator: Generator) -> Tensor:
        if len(image) != self._channels:
            raise ValueError(f"an image has {len(image)} channels, but the mean {self._channels}")
        pixels = image[0] if self._channels == 1 else image.permute(1, 2, 0)
        with globally_seeded(int(torch.randint(2**32, (), generator=generator))):
            return torch.as_tensor(self._transform(Image.fromarray(pixels.numpy())))  # a NumPy array in older versions


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
