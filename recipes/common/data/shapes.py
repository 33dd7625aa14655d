"""The data set `shapes`: scenes of one object each as a source of images."""

from collections.abc import Sequence
from typing import Literal

from common.config import SettingsError
from common.data.embedded import Split
from common.data.scenes import KINDS, LEVELS, Look, render
from common.randomness import seed_of

import torch
from torch import Tensor
from tqdm import tqdm


class Shapes:
    """Scenes of one object each: image i has kind i modulo 10 and depends only on the seed of the scenes, its split, i,
    the size and the level.

    `test` has 1,000 images, `validation` 1,000 others, and `train` 4,000 others, without labels. `labeled` is a random
    subset of `train` with `per_class` images of each kind, which depends on `seed`; a larger `per_class` includes the
    images of a smaller one.

    Args:
        split: which images.
        seed: seed of the choice of labeled images; the images do not depend on it.
        per_class: labeled images of each kind.
        images: number of training images, from which the labeled ones are drawn, or of validation or test images;
            there is no limit.
        size: H and W in pixels.
        level: how difficult the images are: 0 (the hue tells the kind), 1 or 2 (any rotation, weak contrast), or a
            `Look`.
        scene_seed: seed of the scenes.
        in_memory: render all images at once, about 1 ms per image of 64 × 64, instead of each when it is requested.

    Raises:
        SettingsError: if `per_class` is below one or exceeds the number of training images of a kind.
    """

    channels = 3

    def __init__(
        self,
        split: Split,
        *,
        seed: int = 0,
        per_class: int = 10,
        images: int | None = None,
        size: tuple[int, int] = (64, 64),
        level: Literal[0, 1, 2] | Look = 1,
        scene_seed: int = 0,
        in_memory: bool = True,
    ) -> None:
        trained = split in ("train", "labeled")
        count = (4000 if trained else 1000) if images is None else images
        self._indices: Sequence[int] = range(count)
        if split == "labeled":
            fewest = count // len(KINDS)
            if not 1 <= per_class <= fewest:
                raise SettingsError(
                    f"--labels-per-class {per_class}: cannot be drawn from the {fewest} training images of a kind"
                )
            of_kinds = [range(kind, count, len(KINDS)) for kind in range(len(KINDS))]
            chosen = [sorted(k, key=lambda index: seed_of("labeled", seed, index))[:per_class] for k in of_kinds]
            self._indices = sorted(index for of_kind in chosen for index in of_kind)
        self._size, self._look = size, level if isinstance(level, Look) else LEVELS[level]
        self._labels, self.classes = split != "train", [] if split == "train" else list(KINDS)
        self._key = scene_seed, "train" if trained else split
        self._images: Tensor | None = None
        if in_memory:
            self._images = torch.empty(len(self), 3, *size, dtype=torch.uint8)
            bar = tqdm(range(len(self)), desc=f"rendering {split}", unit="image", disable=None, leave=False)
            for index in bar:
                self._images[index] = self._render(index)

    def __len__(self) -> int:
        return len(self._indices)

    def _render(self, index: int) -> Tensor:
        number = self._indices[index]
        scene = render([number % len(KINDS)], self._size, key=(*self._key, number), look=self._look)
        return torch.from_numpy(scene.image)

    def image(self, index: int) -> Tensor:
        """Return an image, uint8 of shape (3, H, W)."""
        return self._render(index) if self._images is None else self._images[index]

    def label(self, index: int) -> int:
        """Return the index of the kind in `KINDS`, −1 in the split `train`."""
        return self._indices[index] % len(KINDS) if self._labels else -1

    def name(self, index: int) -> str:
        """Return what identifies the scene."""
        seed, split = self._key
        return f"scene {self._indices[index]} of {split}, seed {seed}, {self._size[0]} × {self._size[1]}, {self._look}"
