"""Write `shapes`, color scenes rendered from a seed, as files in the layout of a well-known data set.

    python recipes/shapes.py DIR                                            one object per image, ImageFolder
    python recipes/shapes.py DIR --layout coco --images 1500 --size 96 96   objects with boxes and masks
    python recipes/shapes.py DIR --layout ade20k --images 1500 --size 96 96 a label for every pixel

- imagefolder: train/KIND/000000.png and val/KIND/…, ten kinds (five shapes with two textures); these are the images of
  the embedded data set of the same seed.
- coco: train2017/000000000139.jpg, val2017/… and annotations/instances_*.json. What makes real files awkward is in each
  split: gaps between the ids of categories (1, 4, 7, …) and images, images of different height and width, polygons and
  both forms of run-length encoding, an image without objects and a crowd.
- ade20k: images/{training,validation}/ADE_*.jpg and annotations/…/ADE_*.png, whose value 0 means unlabeled; line n of
  classes.txt names the value n.
"""

import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from common.config import Count, Must, SettingsError, explained, program
from common.data.scenes import KINDS, LEVELS, SHAPES, STUFF, TEXTURES, Draws, Scene, Thing, render
from common.data.shapes import Shapes
from common.files import write, write_json

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

CATEGORY_IDS = tuple(range(1, 3 * len(SHAPES), 3))
EMPTY, CROWD = 1, 2  # the indices of the image without objects and of the image with a crowd, in each split of COCO
SMALL = (0.1, 0.2)  # radius of the objects where there are several


@dataclass(frozen=True)
class Config:
    """What is written, and where."""

    out: tyro.conf.Positional[Path]
    """new or empty folder"""
    layout: Literal["imagefolder", "coco", "ade20k"] = "imagefolder"
    """the data set whose folders and annotations are imitated"""
    images: Count = 4000
    """number of training images"""
    val_images: Count = 1000
    """number of validation images"""
    size: Annotated[tuple[int, int], Must("two numbers of at least 16", lambda x: min(x) >= 16)] = (64, 64)
    """height and width of the images in pixels; of coco, two thirds of the images are a quarter less high or wide"""
    seed: int = 0
    """seed of the scenes"""
    level: Literal[0, 1, 2] = 1
    """difficulty; 0: the hue tells the kind, for smoke tests; 2: any rotation, weak contrast, more clutter"""


def main(config: Config) -> None:
    """Write the data set to a temporary folder next to the final one, which then replaces it.

    Raises:
        SettingsError: if the folder is not empty or cannot be written, or there are too few images for the layout.
    """
    if config.layout == "coco" and min(config.images, config.val_images) <= CROWD:
        raise SettingsError(f"coco needs --images and --val-images of at least {CROWD + 1}")
    out = config.out.resolve()
    with explained(f"{config.out} cannot be written"):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise SettingsError(f"{config.out} is not an empty folder: give a new one")
        temporary = out.with_name(f".{out.name}.{os.getpid()}")
        temporary.mkdir(parents=True)
        try:
            {"imagefolder": write_imagefolder, "coco": write_coco, "ade20k": write_ade20k}[config.layout](
                config, temporary
            )
            temporary.replace(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    print(f"{config.images} training and {config.val_images} validation images: {config.out}")


def splits(config: Config) -> list[tuple[Literal["train", "test"], str, int]]:
    """Return each split of the embedded data set, its name as a folder and the number of its images."""
    return [("train", "train", config.images), ("test", "val", config.val_images)]


def numbered(count: int, name: str) -> tqdm:
    """Return the numbers of the images of a split, with a progress bar."""
    return tqdm(range(count), desc=name, unit="image", disable=None, leave=False)


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Write an image, uint8 of shape (3, H, W) or (H, W), in the format that the suffix says."""
    image = Image.fromarray(pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    content = io.BytesIO()
    if path.suffix == ".jpg":
        image.save(content, "jpeg", quality=95, subsampling=0)
    else:
        image.save(content, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, content.getvalue())


def write_imagefolder(config: Config, folder: Path) -> None:
    """Write train/KIND/000000.png and val/KIND/…, the images of the source `Shapes`."""
    for split, name, count in splits(config):
        source = Shapes(
            split, images=count, size=config.size, level=config.level, scene_seed=config.seed, in_memory=False
        )
        for number in numbered(count, name):
            path = folder / name / KINDS[number % len(KINDS)] / f"{number:06d}.png"
            write_image(path, source.image(number).numpy())


def several(config: Config, split: str, number: int, size: tuple[int, int], *, stuff: bool = False) -> Scene:
    """Render a scene of one to four objects."""
    key = config.layout, config.seed, split, number
    draw = Draws("kinds", *key)
    kinds = [draw.whole(len(KINDS)) for _ in range(1 + draw.whole(4))]
    return render(kinds, size, key=key, look=replace(LEVELS[config.level], radius=SMALL), stuff=stuff)


def crowd(config: Config, split: str, size: tuple[int, int]) -> tuple[Scene, int]:
    """Render a scene of two objects and, behind them, a crowd of another shape, and return the index of this shape."""
    key = config.layout, config.seed, split, CROWD
    draw = Draws("kinds", *key)
    many = draw.whole(len(SHAPES))
    others = [(many + 1 + draw.whole(len(SHAPES) - 1)) % len(SHAPES) for _ in range(2)]
    kinds = [len(TEXTURES) * shape + draw.whole(len(TEXTURES)) for shape in (*others, *[many] * 14)]
    return render(kinds, size, key=key, look=replace(LEVELS[config.level], radius=(0.06, 0.1))), many


def write_coco(config: Config, folder: Path) -> None:
    """Write train2017/, val2017/ and annotations/instances_*.json."""
    height, width = config.size
    sizes = [config.size, (height, width * 3 // 4), (height * 3 // 4, width)]
    categories = [
        {"id": number, "name": name, "supercategory": "shape"}
        for number, name in zip(CATEGORY_IDS, SHAPES, strict=True)
    ]
    for split, name, count in splits(config):
        images, annotations = [], []
        for number in numbered(count, name):
            size, image_id, many = sizes[number % 3], 139 + 3 * number, None
            if number == EMPTY:
                scene = render([], size, key=("coco", config.seed, split, number), look=LEVELS[config.level])
            elif number == CROWD:
                scene, many = crowd(config, split, size)
            else:
                scene = several(config, split, number, size)
            file = f"{image_id:012d}.jpg"
            write_image(folder / f"{name}2017" / file, scene.image)
            images.append({"id": image_id, "file_name": file, "height": size[0], "width": size[1]})
            for annotation in annotated(scene, many):
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
        (folder / "annotations").mkdir(exist_ok=True)
        about = {"description": f"shapes, seed {config.seed}, level {config.level}"}
        content = {"info": about, "images": images, "annotations": annotations, "categories": categories}
        write_json(folder / "annotations" / f"instances_{name}2017.json", content)


def annotated(scene: Scene, many: int | None) -> Iterator[dict[str, Any]]:
    """Yield the annotations of the objects: polygons, or compressed run lengths where an outline is round or covered.

    Objects of the shape `many` have a single annotation, a crowd with uncompressed run lengths, as in COCO.
    """
    height, width = scene.image.shape[1:]
    crowded = [thing for thing in scene.things if thing.kind // len(TEXTURES) == many]
    for thing in scene.things:
        if thing.kind // len(TEXTURES) != many:
            counts = compressed(run_lengths(thing.mask))
            polygon = None if thing.outline is None else [thing.outline.round(2).ravel().tolist()]
            yield annotation(thing, polygon or {"size": [height, width], "counts": counts})
    if crowded:
        union = replace(crowded[0], mask=np.any([thing.mask for thing in crowded], axis=0))
        yield annotation(union, {"size": [height, width], "counts": run_lengths(union.mask)}, crowd=1)


def annotation(thing: Thing, segmentation: Any, *, crowd: int = 0) -> dict[str, Any]:
    """Return an annotation in the format of COCO: the box is (x, y, width, height), in pixels, of the visible part."""
    return {
        "category_id": CATEGORY_IDS[thing.kind // len(TEXTURES)],
        "bbox": [float(value) for value in thing.box],
        "area": float(thing.mask.sum()),
        "iscrowd": crowd,
        "segmentation": segmentation,
    }


def run_lengths(mask: np.ndarray) -> list[int]:
    """Return the lengths of the runs of equal pixels, column by column; the first run is of zeros and may be empty."""
    pixels = np.concatenate([[False], mask.T.ravel()])
    edges = np.flatnonzero(pixels[1:] != pixels[:-1])
    return np.diff(edges, prepend=0, append=mask.size).tolist()


def compressed(counts: list[int]) -> str:
    """Return run lengths as COCO's text.

    From the fourth on, a number is written as its difference from the one two places before. Each character holds five
    bits, the lowest first, in two's complement, a sixth that says whether others follow, and is shifted by 48.
    """
    text = []
    for i, count in enumerate(counts):
        rest = count - counts[i - 2] if i > 2 else count
        follows = True
        while follows:
            bits, rest = rest & 31, rest >> 5
            follows = rest != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * follows))
    return "".join(text)


def write_ade20k(config: Config, folder: Path) -> None:
    """Write images/, annotations/ and classes.txt."""
    for split, name, count in splits(config):
        where = {"train": "training", "val": "validation"}[name]
        for number in numbered(count, name):
            scene = several(config, split, number, config.size, stuff=True)
            file = f"ADE_{name}_{number + 1:08d}"
            write_image(folder / "images" / where / f"{file}.jpg", scene.image)
            strip = Draws("strip", config.seed, split, number)(0.05, 0.2) * config.size[0] if number % 2 else 0
            write_image(folder / "annotations" / where / f"{file}.png", labels(scene, unlabeled=int(strip)))
    write(folder / "classes.txt", "".join(f"{name}\n" for name in (*STUFF, *SHAPES)).encode())


def labels(scene: Scene, *, unlabeled: int) -> np.ndarray:
    """Return the label of each pixel, uint8 of shape (H, W): the ground is 1, 2 or 3, a shape 4 and more.

    The first `unlabeled` rows have the label 0.
    """
    assert scene.stuff is not None
    result = scene.stuff + np.uint8(1)
    for thing in scene.things:
        result[thing.mask] = 1 + len(STUFF) + thing.kind // len(TEXTURES)
    result[:unlabeled] = 0
    return result


if __name__ == "__main__":
    program(main, Config, name="shapes", description=__doc__)
