"""Sources of images, which are uint8 tensors of shape (channels, H, W)."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from common.config import DataSettings, SettingsError
from common.data.embedded import Digits, Mnist
from common.data.shapes import Shapes

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

EMBEDDED_SOURCES: dict[str, Any] = {"mnist": Mnist, "digits": Digits, "shapes": Shapes}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Source(Protocol):
    """A map-style collection of images; any object with these members is a source.

    Any exception raised by `image` marks the image as unreadable. Names should identify the images wherever they are
    stored: by names and labels a resumed run notices that its images have changed. A source of millions of images may
    have a method `listing` that returns all of them at once, as `Folder` does.
    """

    channels: int
    classes: list[str]  # empty if there are no labels

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """Return the original image, uint8 of shape (channels, H, W)."""
        ...

    def label(self, index: int) -> int:
        """Return the index of the class, −1 if it is unknown."""
        ...

    def name(self, index: int) -> str:
        """Return the name of the image in messages."""
        ...


class Folder:
    """The images in ROOT/SPLIT/CLASS, searched recursively; hidden files and folders are ignored, links are followed.

    Images directly in ROOT/SPLIT belong to no class. If ROOT has neither `train` nor `val`, the split `train` consists
    of all images below ROOT, without labels.

    Args:
        root: the folder ROOT.
        split: the subfolder SPLIT.
        channels: 1 decodes to grayscale, 3 to RGB.
        require_labels: raise an error if an image belongs to no class.
        classes: ordered class names, usually those of the training split; by default the sorted names found.

    Raises:
        SettingsError: if a folder is missing, cannot be read or has no images, a folder is in two classes by a link, a
            link leads nowhere, a class is unknown, labels are required but missing, or `channels` is neither 1 nor 3.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        channels: int = 3,
        require_labels: bool = False,
        classes: list[str] | None = None,
    ) -> None:
        if channels not in (1, 3):
            raise SettingsError(
                f"files decode to 1 or 3 channels, not {channels}: for others give a map-style source from Python"
            )
        root = Path(root)
        if not os.path.isdir(root):
            raise SettingsError(f"{root} is not a folder")
        folder, known = root / split, True
        if not os.path.isdir(folder):
            if split != "train" or os.path.isdir(root / "val"):
                raise SettingsError(f"{root} has no folder {split}")
            folder, known = root, False
        names = _find_images(folder)
        if not names:
            raise SettingsError(f"{folder} holds no image ({', '.join(SUFFIXES)})")

        of_image = [name.split(os.sep)[0] if known and os.sep in name else "" for name in names]
        self._loose = of_image.count("")
        found = sorted(set(of_image) - {""})
        self.classes = found if classes is None else list(classes)
        unknown = sorted(set(found) - set(self.classes))
        if unknown:
            raise SettingsError(f"{folder} has classes that are not in the training images: {', '.join(unknown[:5])}")
        numbers = {"": -1} | {name: number for number, name in enumerate(self.classes)}
        self.channels = channels
        self._folder = str(folder)
        # Arrays instead of lists: reference counting would make every worker copy millions of Python strings.
        self._names = np.array([os.fsencode(name) for name in names])
        self._labels = np.array([numbers[name] for name in of_image])
        if require_labels:
            self.require_labels()

    def require_labels(self) -> None:
        """Check that every image belongs to a class.

        Raises:
            SettingsError: if an image belongs to no class.
        """
        if self._loose:
            raise SettingsError(
                f"{self._loose} of the {len(self)} images below {self._folder} "
                "lie in no folder train/CLASS or val/CLASS"
            )

    def __len__(self) -> int:
        return len(self._names)

    def image(self, index: int) -> Tensor:
        """Decode an image file."""
        return decode(self.name(index), self.channels)

    def label(self, index: int) -> int:
        """Return the index of the class, −1 for an image without one."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """Return the path of the file."""
        return os.path.join(self._folder, os.fsdecode(bytes(self._names[index])))

    def listing(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the paths of all files relative to the folder, as bytes, and their labels."""
        return self._names, self._labels


def _find_images(folder: Path) -> list[str]:
    """Search a folder recursively for images, and return their sorted relative paths.

    Links are followed after everything else has been searched, and a folder that was searched already, such as one that
    contains its own link, is not searched again, so no image is found twice.

    Raises:
        SettingsError: if a folder cannot be read, a link leads nowhere, or a link puts a folder into a second class.
    """
    found, start = [], len(os.path.join(folder, ""))
    seen = {_identity(parent): str(folder) for parent in folder.resolve().parents}
    tops: list[str | Path] = [folder]
    for top in tops:
        for parent, folders, files in os.walk(top, onerror=_refuse_unreadable):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            before = seen.setdefault(_identity(parent), parent)
            if before != parent:
                folders.clear()
                here, there = (path[start:].split(os.sep)[0] for path in (parent, before))
                if there not in ("", here):
                    raise SettingsError(f"{parent} and {before} are the same folder in two classes: remove the link")
                continue
            tops += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
            images = [name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
            found += [os.path.join(parent, name)[start:] for name in images]
            for path in (os.path.join(parent, name) for name in sorted(set(files) - set(images))):
                if os.path.islink(path) and not os.path.exists(path):
                    raise SettingsError(f"{path} is a link to {os.readlink(path)}, which cannot be found: remove it")
    return sorted(found)


def _identity(folder: str | Path) -> tuple[int, int]:
    """Return what identifies a folder, by whichever path it is reached."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _refuse_unreadable(error: OSError) -> None:
    raise SettingsError(f"{error.filename} cannot be read: {error.strerror}; make it readable or remove it") from error


def decode(file: str | Path, channels: int) -> Tensor:
    """Decode an image file to grayscale (`channels=1`) or RGB (`channels=3`).

    The EXIF orientation is applied, transparent pixels are blended with white, and 16-bit grayscale values are divided
    by 257 and rounded.

    Raises:
        ValueError: if the file is empty or not a regular file, or has no pixels that can be decoded; decoders raise
            other exceptions, too.
    """
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
        raise ValueError("not a regular file")
    if status.st_size == 0:
        raise ValueError("the file is empty")
    with Image.open(file) as image:
        ImageOps.exif_transpose(image, in_place=True)
        pixels: Image.Image = image
        if image.mode.startswith("I"):
            values = np.asarray(image, dtype=np.float64) / 257  # 65535 → 255
            pixels = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
        elif image.has_transparency_data:
            pixels = Image.new("RGBA", image.size, "white")
            pixels.alpha_composite(image.convert("RGBA"))
        if channels == 1:
            gray = pixels if pixels.mode in ("1", "L") else pixels.convert("RGB")
            return torch.from_numpy(np.array(gray.convert("L")))[None]
        return torch.from_numpy(np.array(pixels.convert("RGB"))).permute(2, 0, 1)


def open_images(
    settings: DataSettings, split: str, *, seed: int = 0, classes: list[str] | None = None, labels: bool = True
) -> Source:
    """Open a split of embedded images or of a folder.

    Args:
        settings: the folder or the name of embedded images, and the number of channels.
        split: `train`: all training images, for pre-training. `labeled`: labeled images for fine-tuning; of a folder,
            all training images. `test`: images to measure the accuracy on; of a folder, those in `val`.
        seed: seed of the choice of labeled embedded images; unused for a folder.
        classes: ordered class names; for test images, those of the training images.
        labels: whether labeled and test images of a folder must have labels.

    Raises:
        SettingsError: if the images do not exist, lack required labels, or have another number of channels.
    """
    if split not in ("train", "labeled", "test"):
        raise ValueError(f"the splits are train, labeled and test, not {split}")
    if settings.folder is not None:
        folder = "val" if split == "test" else "train"
        required = labels and split != "train"
        return Folder(settings.folder, folder, channels=settings.channels, require_labels=required, classes=classes)
    part = settings.evaluate_on if split == "test" else split
    source = EMBEDDED_SOURCES[settings.path](part, seed=seed, per_class=settings.labels_per_class)
    if settings.channels != source.channels:
        raise SettingsError(
            f"--channels {settings.channels}: the images of {settings.path} have {source.channels} channels"
        )
    return source


@dataclass(frozen=True)
class Data:
    """The images of a run, opened once for all its stages.

    Args:
        settings: settings of the images, such as crops.
        train: images for pre-training, without labels.
        labeled, test: images to train and to test classifiers, if there are any.
        unlabeled_because: the reason if there are none.
    """

    settings: DataSettings
    train: Source
    labeled: Source | None
    test: Source | None
    unlabeled_because: str = ""

    def splits(self) -> tuple[Source, Source]:
        """Return the labeled images and the test images.

        Raises:
            SettingsError: if there are no labeled images.
        """
        if self.labeled is None or self.test is None:
            raise SettingsError(self.unlabeled_because)
        return self.labeled, self.test


def open_data(settings: DataSettings, *, seed: int) -> Data:
    """Open the images of a run; a folder without classes or without `val` has no labeled images.

    Raises:
        SettingsError: if there are no training images, or fewer embedded images than labels are requested.
    """
    train = open_images(settings, "train", seed=seed)
    if not isinstance(train, Folder):  # these always have labels: too many of them is a mistake of the user
        labeled, test = (open_images(settings, split, seed=seed) for split in ("labeled", "test"))
        return Data(settings, train, labeled, test)
    try:
        train.require_labels()  # the labeled images of a folder are its training images, so it is listed only once
        return Data(settings, train, train, open_images(settings, "test", classes=train.classes))
    except SettingsError as error:
        return Data(settings, train, None, None, str(error))
