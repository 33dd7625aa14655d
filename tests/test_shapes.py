"""The data set `shapes`: its scenes, the source of images, and the files in three layouts."""

import hashlib
import json
from pathlib import Path
from typing import Any

from common.config import SettingsError
from common.data.scenes import KINDS, LEVELS, SHAPES, STUFF, TEXTURES, Look, Scene, render
from common.data.shapes import Shapes
from common.data.sources import Folder, Source

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import shapes
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from shapes import CATEGORY_IDS, Config, compressed, labels, main, run_lengths
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

PLAIN = Look(noise=0, photographs=0)


def scenes(count: int, *, objects: int = 1, size: tuple[int, int] = (64, 64), look: Look = LEVELS[1]) -> list[Scene]:
    """Render scenes of all kinds."""
    return [
        render([(i + n) % len(KINDS) for n in range(objects)], size, key=("tests", i), look=look) for i in range(count)
    ]


def tight_box(mask: np.ndarray) -> list[int]:
    """Return x, y, width and height of a mask, slowly."""
    points = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    (left, top), (right, bottom) = map(min, zip(*points, strict=True)), map(max, zip(*points, strict=True))
    return [left, top, right + 1 - left, bottom + 1 - top]


def filled(corners: list[tuple[float, float]], shape: tuple[int, ...]) -> np.ndarray:
    """Return the pixels in a polygon, approximately."""
    image = Image.new("L", (shape[1] * 8, shape[0] * 8))
    ImageDraw.Draw(image).polygon([(8 * x, 8 * y) for x, y in corners], fill=255)
    return np.asarray(image.reduce(8)) > 127


# Scenes


def test_a_scene_depends_on_its_key_alone():
    kinds, size = [3, 8], (40, 48)
    first, second = (render(kinds, size, key=(0, "train", 5)) for _ in range(2))
    other = render(kinds, size, key=(0, "train", 6))
    assert (first.image == second.image).all()
    assert (first.image != other.image).mean() > 0.9


def test_the_first_scenes_are_those_of_every_version_and_machine():
    source = Shapes("test", images=20, level=Look(photographs=0), size=(32, 32))
    content = b"".join(source.image(i).numpy().tobytes() for i in range(20))
    assert hashlib.blake2b(content, digest_size=8).hexdigest() == "cae1f0ab63baaaa2"


@pytest.mark.parametrize("photographs", [0, 1])
def test_a_scene_is_the_same_at_every_size(photographs: int):
    look = Look(noise=0, photographs=photographs)
    for small, large in zip(scenes(10, look=look), scenes(10, size=(256, 256), look=look), strict=True):
        reduced = large.image.reshape(3, 64, 4, 64, 4).mean((2, 4))
        assert np.abs(reduced - small.image).mean() < 6  # of 255


@pytest.mark.parametrize("size", [(16, 16), (33, 90), (120, 47)])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_images_have_any_size(level: int, size: tuple[int, int]):
    for scene in scenes(10, size=size, look=LEVELS[level]):
        assert scene.image.shape == (3, *size)
        assert scene.image.dtype == np.uint8
        assert [thing.mask.shape for thing in scene.things] == [size]


def test_single_objects_are_visible_and_all_shapes_have_the_same_area():
    low, high = (np.pi * (64 * radius) ** 2 for radius in LEVELS[1].radius)
    areas = np.array([scene.things[0].mask.sum() for scene in scenes(200)])
    assert areas.min() > 0.85 * low  # corners may lie outside the image
    assert areas.max() < 1.03 * high
    means = areas.reshape(-1, len(SHAPES), len(TEXTURES)).mean((0, 2))
    assert means.max() < 1.15 * means.min()


def test_the_two_tones_of_each_texture_have_equal_shares():
    look = Look(noise=0, photographs=0, clutter=0, radius=(0.28, 0.28))
    for texture in range(len(TEXTURES)):
        light = []
        for i in range(60):
            scene = render([texture], (128, 128), key=(i,), look=look)
            values = scene.image.max(0)[scene.things[0].mask].astype(float)
            light.append((values > (np.quantile(values, 0.05) + np.quantile(values, 0.95)) / 2).mean())
        assert np.mean(light) == pytest.approx(0.5, abs=0.03)
        assert np.abs(np.subtract(light, 0.5)).mean() < 0.08  # in each image, whichever tone is that of the dots


def test_masks_show_what_changes_when_an_object_is_removed():
    for i in range(10):
        kinds, key = [i, (i + 3) % 10], ("removed", i)
        with_both, without = (
            render(kinds, (64, 64), key=key, look=PLAIN),
            render(kinds[:1], (64, 64), key=key, look=PLAIN),
        )
        changed = (with_both.image != without.image).any(0)
        if len(with_both.things) == 2:
            front, back = (thing.mask for thing in with_both.things)
            assert not (front & back).any()
            assert changed[back].mean() > 0.97
            assert changed[front].mean() < 0.25  # only its soft outline


def test_hidden_objects_are_left_out():
    crowded = scenes(10, objects=30)
    assert all(3 < len(scene.things) < 30 for scene in crowded)
    assert min(thing.mask.sum() for scene in crowded for thing in scene.things) > 0.08 * np.pi * (64 * 0.18) ** 2


def test_boxes_are_the_tight_boxes_of_the_masks():
    for scene in scenes(10, objects=4, size=(40, 56)):
        assert [list(thing.box) for thing in scene.things] == [tight_box(thing.mask) for thing in scene.things]


def test_outlines_are_those_of_the_masks():
    things = [thing for scene in scenes(60, objects=2) for thing in scene.things]
    outlined = [thing for thing in things if thing.outline is not None]
    assert {SHAPES[thing.kind // len(TEXTURES)] for thing in outlined} == {"square", "star", "triangle"}
    assert 20 < len(outlined) < len(things)
    for thing in outlined:
        assert thing.outline is not None
        inside = filled([(x, y) for x, y in thing.outline], thing.mask.shape)
        assert (inside & thing.mask).sum() / (inside | thing.mask).sum() > 0.9


# The source


def test_splits_are_balanced_and_do_not_overlap():
    def content(source: Shapes) -> set[bytes]:
        return {source.image(i).numpy().tobytes() for i in range(len(source))}

    train, test = Shapes("train", images=60, size=(16, 16)), Shapes("test", images=60, size=(16, 16))
    labeled = Shapes("labeled", images=60, per_class=2, size=(16, 16))
    assert len(content(train)) == len(content(test)) == 60
    assert not content(train) & content(test)
    assert content(labeled) < content(train)
    assert {train.label(i) for i in range(60)} == {-1}
    assert (train.classes, labeled.classes, test.classes) == ([], list(KINDS), list(KINDS))
    for source, each in ((labeled, 2), (test, 6)):
        assert np.bincount([source.label(i) for i in range(len(source))]).tolist() == [each] * len(KINDS)
    names = [source.name(i) for source in (train, test) for i in range(60)]
    assert len(set(names)) == 120
    assert {labeled.name(i) for i in range(20)} < set(names[:60])


def test_labels_are_drawn_by_the_seed_and_more_of_them_include_the_fewer():
    def names(**settings: Any) -> set[str]:
        source = Shapes("labeled", in_memory=False, **settings)
        return {source.name(i) for i in range(len(source))}

    assert names(per_class=10) < names(per_class=100)
    assert names(per_class=10, seed=0) != names(per_class=10, seed=1)
    assert len(names(per_class=400)) == 4000
    with pytest.raises(SettingsError, match="--labels-per-class 401: cannot be drawn from the 400 training"):
        names(per_class=401)


def test_images_depend_neither_on_memory_nor_on_their_number():
    kept, fresh = Shapes("test", images=12), Shapes("test", images=500, in_memory=False)
    for i in (11, 0, 7):
        assert torch.equal(kept.image(i), fresh.image(i))
    assert kept.name(3) == fresh.name(3)
    assert not torch.equal(kept.image(0), Shapes("test", images=1, scene_seed=1).image(0))
    assert kept.name(0) != Shapes("test", images=1, scene_seed=1).name(0) != Shapes("test", images=1, level=2).name(0)


def arrays_of(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Return all images and their labels."""
    count = range(len(source))
    return np.stack([source.image(i).numpy() for i in count]), np.array([source.label(i) for i in count])


def color_statistics(images: np.ndarray) -> np.ndarray:
    """Return means, deviations and histograms of the channels."""
    histograms = [[np.bincount(channel.ravel() >> 4, minlength=16) for channel in image] for image in images]
    return np.concatenate([images.mean((2, 3)), images.std((2, 3)), np.reshape(histograms, (len(images), -1))], axis=1)


def test_neither_colors_nor_pixels_tell_the_kind_unless_the_hue_is_tied_to_it():
    accuracy: dict[tuple[int, str], float] = {}
    for level in (0, 1):
        images, kinds = arrays_of(Shapes("labeled", per_class=50, level=level, size=(32, 32)))
        unseen, truth = arrays_of(Shapes("test", images=500, level=level, size=(32, 32)))
        linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
        nearest = KNeighborsClassifier(1)
        accuracy[level, "colors"] = linear.fit(color_statistics(images), kinds).score(color_statistics(unseen), truth)
        flat, unseen = images.reshape(len(images), -1), unseen.reshape(len(unseen), -1)
        for name, classifier in (("linear", linear), ("nearest", nearest)):
            accuracy[level, name] = classifier.fit(flat, kinds).score(unseen, truth)
    assert accuracy[0, "colors"] > 0.6
    assert accuracy[0, "linear"] > 0.3
    assert max(accuracy[1, "colors"], accuracy[1, "linear"], accuracy[1, "nearest"]) < 0.18  # chance is 0.1


# Files


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a data set of each layout."""
    folder = tmp_path_factory.mktemp("shapes")
    for layout in ("imagefolder", "coco", "ade20k"):
        main(Config(folder / layout, layout, images=20, val_images=10, size=(40, 48)))  # type: ignore[arg-type]
    return folder


def test_imagefolder_holds_the_images_of_the_source(written: Path):
    sources = {"train": Shapes("train", images=20, size=(40, 48)), "val": Shapes("test", images=10, size=(40, 48))}
    for name, source in sources.items():
        folder = Folder(written / "imagefolder", name)
        assert folder.classes == list(KINDS)
        assert len(folder) == len(source)
        for i in range(len(source)):
            number = int(Path(folder.name(i)).stem)
            assert torch.equal(folder.image(i), source.image(number))
            assert folder.label(i) == number % len(KINDS)


def decoded(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Decode COCO's masks, slowly."""
    if isinstance(segmentation, list):
        [corners] = segmentation
        return filled(list(zip(corners[::2], corners[1::2], strict=True)), (height, width))
    assert segmentation["size"] == [height, width]
    counts = segmentation["counts"]
    counts = decompressed(counts) if isinstance(counts, str) else counts
    pixels = [bool(run % 2) for run, count in enumerate(counts) for _ in range(count)]
    return np.array(pixels).reshape(width, height).T


def decompressed(text: str) -> list[int]:
    """Decode COCO's text of run lengths, slowly."""
    counts, bits = [], ""
    for character in text:
        code = format(ord(character) - 48, "06b")
        bits = code[1:] + bits
        if code[0] == "0":
            value = int(bits, 2) - (2 ** len(bits) if bits[0] == "1" else 0)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            bits = ""
    return counts


@pytest.mark.parametrize(("name", "count"), [("train", 20), ("val", 10)])
def test_coco_has_all_that_makes_it_awkward(written: Path, name: str, count: int):
    content = json.loads((written / "coco" / "annotations" / f"instances_{name}2017.json").read_text())
    assert [(c["id"], c["name"]) for c in content["categories"]] == list(zip([1, 4, 7, 10, 13], SHAPES, strict=True))
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    assert len(sizes) == count
    assert set(sizes.values()) == {(40, 48), (40, 36), (30, 48)}
    for image in content["images"]:
        assert image["file_name"] == f"{image['id']:012d}.jpg"
        with Image.open(written / "coco" / f"{name}2017" / image["file_name"]) as file:
            assert file.size == (image["width"], image["height"])

    annotations = content["annotations"]
    assert [annotation["id"] for annotation in annotations] == list(range(1, len(annotations) + 1))
    assert {annotation["category_id"] for annotation in annotations} == set(CATEGORY_IDS)
    assert sizes.keys() - {annotation["image_id"] for annotation in annotations} == {142}
    forms = []
    for annotation in annotations:
        polygon = isinstance(annotation["segmentation"], list)
        forms.append("polygon" if polygon else type(annotation["segmentation"]["counts"]).__name__)
        mask = decoded(annotation["segmentation"], *sizes[annotation["image_id"]])
        # the mask of a polygon is another one at its edge
        assert np.abs(np.subtract(annotation["bbox"], tight_box(mask))).max() <= 2 * polygon
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.1 * polygon, abs=3 * polygon)
        assert annotation["iscrowd"] == (forms[-1] == "list")
    assert forms.count("list") == 1
    assert forms.count("polygon") > 2
    assert forms.count("str") > 2


def test_the_crowd_consists_of_several_objects_of_one_shape():
    scene, many = shapes.crowd(Config(Path(), "coco", size=(96, 96)), "train", (96, 96))
    *others, crowd = shapes.annotated(scene, many)
    assert crowd["category_id"] == CATEGORY_IDS[many]
    assert crowd["area"] > 4 * max(other["area"] for other in others)
    assert CATEGORY_IDS[many] not in {other["category_id"] for other in others}


def test_compressed_run_lengths_are_those_of_pycocotools():
    mask = np.zeros((6, 4), dtype=bool)
    mask[1:4, 1:3] = mask[0, 0] = mask[5, 3] = True
    assert compressed(run_lengths(mask)) == "0162M04N"


@given(arrays.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_run_lengths_of_a_mask_decode_to_it(mask: np.ndarray):
    height, width = mask.shape
    counts = run_lengths(mask)
    assert min(counts[1:], default=1) > 0
    for form in (counts, compressed(counts)):
        assert (decoded({"size": [height, width], "counts": form}, height, width) == mask).all()


@given(st.lists(st.integers(0, 2**40), min_size=1))
def test_compressed_run_lengths_decode_to_them(counts: list[int]):
    assert decompressed(compressed(counts)) == counts


@pytest.mark.parametrize(("name", "where", "count"), [("train", "training", 20), ("val", "validation", 10)])
def test_ade20k_has_labels_from_1_and_strips_without(written: Path, name: str, where: str, count: int):
    assert (written / "ade20k" / "classes.txt").read_text().split() == [*STUFF, *SHAPES]
    seen, strips = set(), []
    for number in range(1, count + 1):
        with Image.open(written / "ade20k" / "annotations" / where / f"ADE_{name}_{number:08d}.png") as file:
            assert file.mode == "L"
            values = np.asarray(file)
        with Image.open(written / "ade20k" / "images" / where / f"ADE_{name}_{number:08d}.jpg") as file:
            assert file.size == (48, 40)
        strip = int((values == 0).all(1).argmin())
        assert (values[strip:] > 0).all()
        seen |= set(values.flat)
        strips.append(strip)
    assert seen == set(range(1 + len(STUFF) + len(SHAPES)))
    assert [strip > 0 for strip in strips] == [False, True] * (count // 2)
    assert max(strips) <= 8


def test_labels_are_the_ground_and_the_visible_parts_of_objects():
    scene = render([KINDS.index("star-dots"), KINDS.index("disc-stripes")], (64, 64), key=("labels",), stuff=True)
    assert scene.stuff is not None
    found, ground = labels(scene, unlabeled=0), np.ones((64, 64), dtype=bool)
    for thing, label in zip(scene.things, (7, 4), strict=True):
        assert (found[thing.mask] == label).all()
        ground &= ~thing.mask
    assert (found[ground] == scene.stuff[ground] + 1).all()
    assert set(scene.stuff.flat) < {0, 1, 2}
    assert len(set(scene.stuff.flat)) == 2


@pytest.mark.parametrize("size", [(24, 120), (120, 24)])
def test_the_ground_has_two_regions_of_similar_area(size: tuple[int, int]):
    stuffs = [render([], size, key=("ground", i), stuff=True).stuff for i in range(40)]
    shares = np.array([np.bincount(stuff.ravel(), minlength=3) for stuff in stuffs if stuff is not None]) / 24 / 120
    assert (np.sort(shares)[:, 0] == 0).all()
    assert np.sort(shares)[:, 1].mean() > 0.3
    assert shares.mean(0).min() > 0.2


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path):
    (tmp_path / "photo.jpg").touch()
    for path in (tmp_path, tmp_path / "photo.jpg"):
        with pytest.raises(SettingsError, match=r"is not an empty folder: give a new one"):
            main(Config(path, images=1, val_images=1))
    assert [file.name for file in tmp_path.iterdir()] == ["photo.jpg"]


def test_coco_needs_three_images_per_split(tmp_path: Path):
    with pytest.raises(SettingsError, match="coco needs --images and --val-images of at least 3"):
        main(Config(tmp_path / "new", "coco", images=5, val_images=2))


def test_an_interrupted_program_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original, calls = shapes.write_image, []

    def interrupted(path: Path, pixels: np.ndarray) -> None:
        calls.append(path)
        if len(calls) > 3:
            raise KeyboardInterrupt
        original(path, pixels)

    monkeypatch.setattr(shapes, "write_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(Config(tmp_path / "new", images=10, val_images=1))
    assert calls[0].exists() is False
    assert list(tmp_path.iterdir()) == []
