"""Images from disk to batches: sources, crops, augmentations, loading, normalization. It knows nothing of masks.

An image is uint8 of shape (channels, H, W) until it is on the device, where `Normalize` makes floats of it. All chance
is a function of (seed, epoch, image), so it depends neither on the number of workers nor on where a run was resumed.
"""

import hashlib
import json
import math
import operator
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

Transform = Callable[[Tensor, Generator], Tensor | tuple[Tensor, ...]]
Sample = tuple[int, int]  # epoch, index of the image


def seed_of(*parts: int | str) -> int:
    """Return a number of 63 bits that depends on all the parts and their order, the same in every process."""
    text = json.dumps([part if isinstance(part, str) else operator.index(part) for part in parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Source(Protocol):
    """Where images come from. Any object with these members will do.

    Whatever `image` raises counts as an unreadable image, not as a mistake of the program.
    """

    channels: int
    classes: list[str]  # empty if there are no labels

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """Return the whole original image, uint8 of shape (channels, H, W)."""
        ...

    def label(self, index: int) -> int:
        """Return the number of the class, −1 where it is not known."""
        ...

    def name(self, index: int) -> str:
        """Return what the image is called in messages."""
        ...


class Digits:
    """scikit-learn's handwritten digits: 1797 real grayscale images of 8 × 8 pixels that come with the package.

    `test` holds 497 of them, the same ones for every seed and each digit in proportion. `train` holds the other 1300
    and tells no labels. `labeled` holds `per_class` of these 1300 for each digit, drawn by `seed`; a larger
    `per_class` keeps the images of a smaller one.

    Raises:
        ValueError: `per_class` is below one or above the training images of the rarest digit.
    """

    channels = 1

    def __init__(self, split: Literal["train", "labeled", "test"], *, seed: int = 0, per_class: int = 10) -> None:
        from sklearn.datasets import load_digits

        values, labels = load_digits(return_X_y=True)
        members = [np.flatnonzero(labels == digit).tolist() for digit in range(10)]
        for of_digit in members:
            of_digit.sort(key=lambda index: seed_of("digits", index))
        cuts = [len(of_digit) * 497 / 1797 for of_digit in members]
        sizes = [int(cut) for cut in cuts]
        for digit in sorted(range(10), key=lambda digit: sizes[digit] - cuts[digit])[: 497 - sum(sizes)]:
            sizes[digit] += 1  # the largest remainders are rounded up

        test = [of_digit[:size] for of_digit, size in zip(members, sizes, strict=True)]
        train = [of_digit[size:] for of_digit, size in zip(members, sizes, strict=True)]
        if split == "labeled":
            fewest = min(map(len, train))
            if not 1 <= per_class <= fewest:
                raise ValueError(f"per_class={per_class} of the {fewest} training images of a digit cannot be drawn")
            chosen = [sorted(d, key=lambda index: seed_of("labeled", seed, index))[:per_class] for d in train]
        else:
            chosen = {"train": train, "test": test}[split]
        self._indices = sorted(index for of_digit in chosen for index in of_digit)
        self._images = torch.from_numpy(values).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
        self._labels = [-1 if split == "train" else int(label) for label in labels]
        self.classes = [] if split == "train" else [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int) -> Tensor:
        return self._images[self._indices[index]]

    def label(self, index: int) -> int:
        return self._labels[self._indices[index]]

    def name(self, index: int) -> str:
        return f"digit {self._indices[index]}"


class Folder:
    """The images of ROOT/SPLIT/CLASS, folders inside a class included; hidden files and folders are left out.

    Images that lie directly in ROOT/SPLIT belong to no class. Where ROOT has neither `train` nor `val`, the split
    `train` is every image anywhere below ROOT, without labels.

    Args:
        channels: 1 decodes to grayscale, 3 to RGB.
        require_labels: refuse images that belong to no class.
        classes: the classes in their order, of the training split usually; by default those found, sorted.

    Raises:
        ValueError: a folder is missing or holds no image, a class is unknown, or `channels` is neither 1 nor 3.
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
            raise ValueError(
                f"files decode to 1 or 3 channels, not {channels}: for others give a map-style source from Python"
            )
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"{root} is not a folder")
        folder, known = root / split, True
        if not folder.is_dir():
            if split != "train" or (root / "val").is_dir():
                raise ValueError(f"{root} has no folder {split}")
            folder, known = root, False
        names = _find_images(folder)
        if not names:
            raise ValueError(f"{folder} holds no image ({', '.join(SUFFIXES)})")

        of_image = [name.split(os.sep)[0] if known and os.sep in name else "" for name in names]
        loose = of_image.count("")
        if require_labels and loose:
            raise ValueError(
                f"{loose} of the {len(names)} images below {folder} lie in no folder train/CLASS or val/CLASS"
            )
        found = sorted(set(of_image) - {""})
        self.classes = found if classes is None else list(classes)
        unknown = sorted(set(found) - set(self.classes))
        if unknown:
            raise ValueError(f"{folder} has classes that are not in the training images: {', '.join(unknown[:5])}")
        numbers = {"": -1} | {name: number for number, name in enumerate(self.classes)}
        self.channels = channels
        self._folder = str(folder)
        # One array each: workers would copy millions of Python strings merely by counting references to them.
        self._names = np.array([os.fsencode(name) for name in names])
        self._labels = np.array([numbers[name] for name in of_image])

    def __len__(self) -> int:
        return len(self._names)

    def image(self, index: int) -> Tensor:
        return decode(self.name(index), self.channels)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def name(self, index: int) -> str:
        return os.path.join(self._folder, os.fsdecode(bytes(self._names[index])))


def _find_images(folder: Path) -> list[str]:
    """Return the images anywhere below a folder, as sorted paths relative to it."""
    found = []
    start = len(os.path.join(folder, ""))
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = [name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        found += [os.path.join(parent, name)[start:] for name in images]
    return sorted(found)


def decode(file: str | Path, channels: int) -> Tensor:
    """Read an image file as grayscale (`channels=1`) or RGB (`channels=3`).

    It is turned as its EXIF orientation says. What is transparent becomes white. Grayscale of 16 bits is divided by
    257 and rounded.
    """
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
    data: Path | None,
    split: str,
    *,
    channels: int,
    seed: int = 0,
    per_class: int = 10,
    classes: list[str] | None = None,
) -> Source:
    """Open the embedded digits, or a folder of images.

    Args:
        data: the folder; `None` for the digits.
        split: `train`: all training images, for methods without labels. `labeled`: those to fine-tune on, with labels;
            of a folder all training images. `test`: those to test on, with labels; of a folder those in `val`.
        seed: draws the labeled digits; a folder does not use it.
        per_class: labeled images of each digit; a folder does not use it.
        classes: the classes in their order, of the training images when the test images are opened.
    """
    if split not in ("train", "labeled", "test"):
        raise ValueError(f"the splits are train, labeled and test, not {split}")
    if data is not None:
        folder = "val" if split == "test" else "train"
        return Folder(data, folder, channels=channels, require_labels=split != "train", classes=classes)
    if channels != 1:
        raise ValueError(f"the embedded digits have 1 channel, not {channels}")
    return Digits(split, seed=seed, per_class=per_class)


def random_crop_box(
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: Generator,
) -> tuple[int, int, int, int]:
    """Draw a box (top, left, height, width) inside an image.

    The first of ten draws that fits is taken, else the largest central box whose aspect is allowed.

    Args:
        scale: range of the area, as a share of the image's.
        ratio: range of width / height; its logarithm is drawn uniformly.
    """
    if not (0 < scale[0] <= scale[1] and 0 < ratio[0] <= ratio[1]):
        raise ValueError(f"scale={scale} and ratio={ratio} are to be ranges of positive numbers")
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
    """Return the height and width of a random crop that is never rejected but cut to the image, as in linear probing.

    Args:
        area_fraction: uniform in the range of the area, usually 0.08 to 1.
        log_ratio: uniform in the range of log(width / height), usually log 3/4 to log 4/3.
    """
    area, aspect = height * width * float(area_fraction), math.exp(log_ratio)
    h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
    return min(max(h, 1), height), min(max(w, 1), width)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize a uint8 image, antialiased and bicubic; at its own size it is returned as it is."""
    if image.shape[-2:] == (height, width):
        return image
    # The fast kernel takes up to four channels whose values lie side by side in memory.
    parts = [part[None].contiguous(memory_format=torch.channels_last) for part in image.split(4)]
    parts = [F.interpolate(part, (height, width), mode="bicubic", antialias=True)[0] for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class CropFlip:
    """The view to pre-train on: a random crop, resized to `size`, flipped left to right with probability `flip`.

    Args:
        size: height and width in pixels.
        scale: range of the crop's area, as a share of the image's.
        ratio: range of the crop's width / height, relative to that of `size`: the distortion is the same for any shape.
        flip: 0 where left and right have a meaning, as in digits.
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
    """The view to test on: the smallest size that covers `size` / `crop_fraction`, of which the center is cut out.

    At `crop_fraction=1` an image of the same shape is merely resized.
    """

    size: tuple[int, int]
    crop_fraction: float = 0.875

    def __post_init__(self) -> None:
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction={self.crop_fraction} is to be above 0 and at most 1")

    def __call__(self, image: Tensor, generator: Generator | None = None) -> Tensor:
        height, width = self.size
        image = cover(image, int(height / self.crop_fraction), int(width / self.crop_fraction))
        top, left = round((image.shape[-2] - height) / 2), round((image.shape[-1] - width) / 2)
        return image[:, top : top + height, left : left + width]


def cover(image: Tensor, height: int, width: int) -> Tensor:
    """Resize a uint8 image to the smallest size of its shape that covers `height` × `width`."""
    h, w = image.shape[-2:]
    if h * width <= w * height:  # wider than asked for: the height decides
        return resize(image, height, height * w // h)
    return resize(image, width * h // w, width)


@dataclass(frozen=True)
class WeakStrong:
    """Two views of nearly all of an image, each shifted and flipped at random, the second in other colors.

    The image is resized to the smallest size that covers `size`, and each view cut out of it at a place of its own, up
    to `pad` pixels beyond the border. With probability `jitter` brightness, contrast, saturation and hue of the second
    view change, in random order; then it is made gray, solarized or blurred, always one of the three.

    Args:
        size: height and width in pixels.
        pad: pixels by which a view may reach beyond the image, which is reflected there.
        flip: 0 where left and right have a meaning, as in digits.
        jitter: 0 to keep the colors before one of the three.

    Raises:
        ValueError: `size` has no `pad` pixels to reflect, or the image neither 1 nor 3 channels.
    """

    size: tuple[int, int]
    pad: int = 4
    flip: float = 0.5
    jitter: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.pad < min(self.size):
            raise ValueError(f"pad={self.pad} pixels of a view of {self.size[0]} × {self.size[1]} cannot be reflected")

    def __call__(self, image: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        whole = cover(image, *self.size)
        return self.crop(whole, generator), self.recolor(self.crop(whole, generator), generator)

    def crop(self, image: Tensor, generator: Generator) -> Tensor:
        """Cut a view out of an image that covers it."""
        u_top, u_left, u_flip = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        room = [side + 2 * self.pad - own for side, own in zip(image.shape[-2:], self.size, strict=True)]
        view = padded_crop(image, int(u_top * (room[0] + 1)), int(u_left * (room[1] + 1)), size=self.size, pad=self.pad)
        return view.flip(-1) if u_flip < self.flip else view

    def recolor(self, view: Tensor, generator: Generator) -> Tensor:
        """Change the colors."""
        u = torch.rand(7, generator=generator, dtype=torch.float64).tolist()
        order = torch.randperm(4, generator=generator).tolist()
        spreads = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
        changes = [(name, (name != "hue") + (2 * u[i] - 1) * by) for i, (name, by) in enumerate(spreads.items())]
        jitter = [changes[i] for i in order] if u[4] < self.jitter else []
        return recolor(view, jitter, ("gray", "solarize", "blur")[int(3 * u[5])], radius=0.1 + 1.9 * u[6])


def padded_crop(image: Tensor, top: int, left: int, *, size: tuple[int, int], pad: int) -> Tensor:
    """Crop an image as if it were reflected beyond its borders; row and column count from `pad` pixels outside."""
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
    """Change the colors of a uint8 image, by torchvision on Pillow's images.

    Args:
        image: of 1 or 3 channels. In grayscale saturation and hue change nothing, nor does making it gray.
        jitter: "brightness", "contrast", "saturation" (factors) and "hue" (−0.5 to 0.5), in the order given.
        effect: afterwards; solarize turns values from 128 on around.
        radius: of the blur, in pixels.

    Raises:
        ValueError: there are neither 1 nor 3 channels.
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


class Augment:
    """The view to fine-tune on, by timm: random crop, flip, RandAugment, random erasing. Gives float32.

    Erased pixels are noise around `mean`, so they may lie outside [0, 1].

    Args:
        size: height and width in pixels.
        mean, std: of the 1 or 3 channels, for images in [0, 1].
        scale, ratio, flip: as in `CropFlip`.
        auto_augment: the policy in timm's words; `None` for none.
        erasing: probability that a rectangle is replaced by noise of that mean and std.

    Raises:
        ValueError: there are neither 1 nor 3 channels.
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
        with _global_chance(int(torch.randint(2**32, (), generator=generator))):
            return self._transform(Image.fromarray(pixels.numpy())) * self._std + self._mean


class Mix:
    """Mixup or cutmix of a whole batch, one or the other with equal probability, by timm; labels become soft targets.

    The images are changed in place. With both at 0 only the labels are smoothed.

    Args:
        mixup, cutmix: parameter of the beta distribution of the share; 0 for never.
        smoothing: share of each target that is spread over all classes.

    Raises:
        ValueError: the number of images is odd, or they are not floats.
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
        with _global_chance(seed):
            return self._mixup(images, labels)


@contextmanager
def _global_chance(seed: int) -> Iterator[None]:
    """Seed what timm draws from, and leave it as it was found."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(pytorch)


class Views(Dataset[Any]):
    """Views of the images of a source; `views[epoch, index]` is a function of the seed, the epoch and the image.

    It is what the transform makes of the image, or a tuple if a tuple of transforms is given, for which the image is
    decoded once; with `labels` it is (that, label). An image that cannot be read is replaced by the next one that can.

    Raises:
        ValueError: the source has no image, or no labels where they are asked for, or gives something else than uint8
            of its number of channels, or too many of its images cannot be read.
    """

    def __init__(
        self,
        source: Source,
        transforms: Transform | tuple[Transform, ...],
        *,
        seed: int = 0,
        labels: bool = False,
    ) -> None:
        if len(source) == 0:
            raise ValueError("the source has no image")
        if labels and not source.classes:
            raise ValueError("labels are asked for, but the source has none")
        self.source, self.transforms, self.seed, self.labels = source, transforms, seed, labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: Sample) -> Any:
        views, unreadable = self.load(*sample)
        if views is None:
            raise ValueError(_complaint(unreadable, len(self)))
        return views

    def load(self, epoch: int, index: int) -> tuple[Any, dict[str, str]]:
        """Return `self[epoch, index]`, and the reasons by name of the images that could not be read in its place.

        When these are too many, the first is `None`.
        """
        unreadable: dict[str, str] = {}
        for step in range(len(self)):
            chosen = (index + step) % len(self)
            image = _read(self.source, chosen)
            if isinstance(image, Tensor):
                generator = Generator().manual_seed(seed_of(self.seed, epoch, index))
                views = (
                    tuple(transform(image, generator) for transform in self.transforms)
                    if isinstance(self.transforms, tuple)
                    else self.transforms(image, generator)
                )
                return (views, self.source.label(chosen)) if self.labels else views, unreadable
            unreadable[self.source.name(chosen)] = image
            if _too_many(unreadable, len(self)):
                break
        return None, unreadable


def _read(source: Source, index: int) -> Tensor | str:
    """Return an image, or the reason why it cannot be read."""
    try:
        image = source.image(index)
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, ValueError, struct.error, …
        return f"{type(error).__name__}: {error}"
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != source.channels:
        raise ValueError(
            f"{source.name(index)} is {image.dtype} of shape {tuple(image.shape)}, "
            f"not torch.uint8 of shape ({source.channels}, H, W)"
        )
    return image


def _too_many(unreadable: dict[str, str], total: int) -> bool:
    return 100 * len(unreadable) > total


def _complaint(unreadable: dict[str, str], total: int) -> str:
    names = list(unreadable)
    return (
        f"{len(names)} of {total} images ({len(names) / total:.1%}) cannot be read: "
        f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}; the first: {unreadable[names[0]]}"
    )


class Loader:
    """Batches of views, as tensors or tuples of tensors, stacked in channels-last memory.

    Args:
        batches: lists of (epoch, index). An iterator serves one iteration, which may go over all epochs and so never
            waits for workers to start; a list serves any number.
        workers: processes that load; 0 loads in this one.
        pin: copy the batches to pinned memory, for a GPU.
        collate: `collate(batch, seed)` is applied to each batch where it was loaded; the seed is a function of those of
            the batch's first sample.

    While iterating, `unreadable` has the reasons by name of the images that could not be read and were replaced.

    Raises:
        ValueError: more than 1 % of the images of the source cannot be read.
    """

    def __init__(
        self,
        views: Views,
        batches: Iterable[Sequence[Sample]],
        *,
        workers: int = 0,
        pin: bool = False,
        collate: Callable[[Any, int], Any] | None = None,
    ) -> None:
        self.unreadable: dict[str, str] = {}
        self._total = len(views)
        self._loader = DataLoader(
            _Batches(views, collate),
            sampler=batches,
            batch_size=None,  # the sampler's items are batches already
            num_workers=workers,
            pin_memory=pin,
            collate_fn=_as_it_is,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_the_parent,
            generator=Generator(),  # else each iteration draws from the global one
        )

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self.unreadable |= batch.unreadable
            if _too_many(self.unreadable, self._total):
                raise ValueError(_complaint(self.unreadable, self._total))
            yield batch.content


@dataclass
class _Batch:
    content: Any
    unreadable: dict[str, str]

    def pin_memory(self) -> "_Batch":  # the name by which PyTorch finds it
        return _Batch(_pin(self.content), self.unreadable)


class _Batches(Dataset[_Batch]):
    """Whole batches, indexed by their lists of samples."""

    def __init__(self, views: Views, collate: Callable[[Any, int], Any] | None) -> None:
        self.views, self.collate = views, collate

    def __getitem__(self, samples: Sequence[Sample]) -> _Batch:
        items, unreadable = [], {}
        for epoch, index in samples:
            item, failed = self.views.load(epoch, index)
            unreadable |= failed
            if item is None:
                return _Batch(None, unreadable)
            items.append(item)
        content = _stack(items)
        if self.collate is not None:
            content = self.collate(content, seed_of("batch", self.views.seed, *samples[0]))
        return _Batch(content, unreadable)


def _stack(items: Sequence[Any]) -> Any:
    if isinstance(items[0], tuple):
        return tuple(_stack(part) for part in zip(*items, strict=True))
    if isinstance(items[0], Tensor):
        # A resized view has its channels side by side in memory: to keep that is a plain copy, and patches like it too.
        return torch.stack([item.movedim(0, -1) for item in items]).movedim(-1, 1)
    return torch.tensor(items)


def _pin(content: Any) -> Any:
    if isinstance(content, tuple):
        return tuple(map(_pin, content))
    return content.pin_memory() if isinstance(content, Tensor) else content


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    """Keep loading when the whole process group is told to stop: the parent writes its checkpoint, then ends us."""
    os.setpgid(0, 0)


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
            raise ValueError(f"mean={tuple(mean)} and std={tuple(std)} are to be as many, and std above 0")
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
        raise ValueError(f"none of {count} images can be read")
    mean, square = torch.stack(moments).mean(dim=0)
    std = (square - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())
