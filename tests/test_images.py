"""Images from disk to batches: what is read, which views are drawn, and that chance depends on (seed, epoch, image)."""

import os
import pickle
import random
import re
from pathlib import Path

from common.data.augment import Augment, Mix
from common.data.loading import Loader, Views
from common.data.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize, statistics
from common.data.sources import Digits, Folder, decode, open_images
from common.data.views import CenterCrop, CropFlip, one_shot_crop_size, random_crop_box, resize
from common.randomness import seed_of

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import get_worker_info


class Memory:
    """Images in memory; some of them may be unreadable."""

    def __init__(self, count: int = 12, *, channels: int = 3, broken: tuple[int, ...] = (), classes: int = 0) -> None:
        self.channels, self.classes, self.broken = channels, [str(number) for number in range(classes)], broken
        self.images = torch.randint(256, (count, channels, 20, 30), dtype=torch.uint8, generator=Generator())
        self.decoded = 0

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        self.decoded += 1
        if index in self.broken:
            raise OSError("the file is truncated")
        return self.images[index]

    def label(self, index: int) -> int:
        return index % len(self.classes) if self.classes else -1

    def name(self, index: int) -> str:
        return f"memory {index}"


def unchanged(image: Tensor, generator: Generator) -> Tensor:
    return image


def chance(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def quoting(sentence: str) -> str:
    return f"^{re.escape(sentence)}"


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(path)


def test_a_seed_is_the_same_in_every_process_and_on_every_machine():
    assert seed_of(0, 1, 2) == 3452018054052297075
    assert seed_of("batch", 7) == 1063502429746967585
    assert seed_of(np.int64(3), 4) == seed_of(3, 4)  # type: ignore[arg-type]


@given(st.lists(st.integers() | st.text()), st.lists(st.integers() | st.text()))
def test_seeds_differ_when_their_parts_do(one, other):
    assert 0 <= seed_of(*one) < 2**63
    assert (seed_of(*one) == seed_of(*other)) == (one == other)


def test_digits_are_split_in_proportion_and_never_overlap():
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test)) == (1300, 497)
    assert not set(map(train.name, range(1300))) & set(map(test.name, range(497)))
    counts = np.bincount([test.label(index) for index in range(497)])
    assert counts.min() >= 48
    assert counts.max() <= 51


def test_the_test_digits_are_the_same_for_every_seed():
    one, other = Digits("test", seed=1), Digits("test", seed=2)
    assert [one.name(index) for index in range(497)] == [other.name(index) for index in range(497)]


def test_labeled_digits_are_as_many_of_each_class_and_come_from_the_training_images():
    train = Digits("train")
    names = [{source.name(index) for index in range(len(source))} for source in (Digits("labeled", seed=1), train)]
    assert names[0] < names[1]
    source = Digits("labeled", seed=1, per_class=7)
    assert np.bincount([source.label(index) for index in range(len(source))]).tolist() == [7] * 10
    assert {source.name(index) for index in range(70)} < names[0]
    other = Digits("labeled", seed=2)
    assert names[0] != {other.name(index) for index in range(100)}


def test_digits_are_the_scikit_learn_images_from_black_to_white():
    from sklearn.datasets import load_digits

    source, (values, labels) = Digits("test"), load_digits(return_X_y=True)
    index = int(source.name(100).split()[1])
    assert torch.equal(source.image(100).flatten().double(), torch.from_numpy(values[index] * 255 / 16).round())
    assert source.label(100) == labels[index]
    assert max(int(source.image(index).max()) for index in range(20)) == 255


def test_training_digits_tell_no_labels():
    assert Digits("train").classes == []
    assert Digits("train").label(0) == -1


@pytest.mark.parametrize("per_class", [0, 500])
def test_more_labeled_digits_than_there_are_is_refused(per_class):
    with pytest.raises(
        ValueError, match=rf"^per_class={per_class} of the 12\d training images of a digit cannot be drawn"
    ):
        Digits("labeled", per_class=per_class)


def test_a_folder_is_read_with_its_classes_sorted_and_hidden_files_left_out(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a/deep/3.WebP", "b/.hidden.png", ".cache/x.png", "b/._1.png"):
        write(tmp_path / "train" / name)
    (tmp_path / "train" / "b" / "notes.txt").write_text("no image")
    source = Folder(tmp_path, "train", require_labels=True)
    assert source.classes == ["a", "b"]
    assert [source.name(i) for i in range(3)] == [
        f"{tmp_path}/train/{n}" for n in ("a/deep/3.WebP", "b/1.png", "b/2.JPG")
    ]
    assert [source.label(i) for i in range(3)] == [0, 1, 1]
    assert source.image(0).shape == (3, 6, 8)


def test_images_outside_classes_have_no_label(tmp_path):
    write(tmp_path / "train" / "1.png")
    source = Folder(tmp_path, "train")
    assert (len(source), source.classes, source.label(0)) == (1, [], -1)


def test_without_splits_every_image_is_for_training(tmp_path):
    write(tmp_path / "x" / "1.png")
    write(tmp_path / "2.png")
    source = open_images(tmp_path, "train", channels=3)
    assert (len(source), source.classes, source.label(1)) == (2, [], -1)


def test_test_images_get_the_numbers_of_the_training_classes(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "val/b/1.png"):
        write(tmp_path / name)
    classes = open_images(tmp_path, "labeled", channels=3).classes
    source = open_images(tmp_path, "test", channels=3, classes=classes)
    assert source.classes == ["a", "b"]
    assert source.label(0) == 1


def test_a_class_may_be_a_link(tmp_path):
    write(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a").symlink_to(tmp_path / "elsewhere")
    assert Folder(tmp_path, "train").classes == ["a"]


def test_a_name_that_is_not_unicode_can_be_read(tmp_path):
    write(tmp_path / "train" / "1.png")
    os.rename(os.fsencode(tmp_path / "train" / "1.png"), os.fsencode(tmp_path / "train") + b"/\xff.png")
    assert Folder(tmp_path, "train").image(0).shape == (3, 6, 8)


def test_bad_folders_are_refused_in_one_sentence(tmp_path):
    write(tmp_path / "train" / "a" / "1.png")
    write(tmp_path / "train" / "2.png")
    with pytest.raises(ValueError, match=quoting(f"{tmp_path}/nowhere is not a folder")):
        open_images(tmp_path / "nowhere", "train", channels=3)
    with pytest.raises(ValueError, match=quoting(f"{tmp_path} has no folder val")):
        open_images(tmp_path, "test", channels=3)
    sentence = f"1 of the 2 images below {tmp_path}/train lie in no folder train/CLASS or val/CLASS"
    with pytest.raises(ValueError, match=quoting(sentence)):
        open_images(tmp_path, "labeled", channels=3)
    write(tmp_path / "val" / "c" / "1.png")
    sentence = f"{tmp_path}/val has classes that are not in the training images: c"
    with pytest.raises(ValueError, match=quoting(sentence)):
        open_images(tmp_path, "test", channels=3, classes=["a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=quoting(f"{tmp_path}/empty holds no image (.jpg, .jpeg, .png, .webp)")):
        open_images(tmp_path / "empty", "train", channels=3)
    sentence = "files decode to 1 or 3 channels, not 10: for others give a map-style source from Python"
    with pytest.raises(ValueError, match=quoting(sentence)):
        open_images(tmp_path, "train", channels=10)
    with pytest.raises(ValueError, match=quoting("the splits are train, labeled and test, not val")):
        open_images(tmp_path, "val", channels=3)
    with pytest.raises(ValueError, match=quoting("the embedded digits have 1 channel, not 3")):
        open_images(None, "train", channels=3)


def test_no_data_means_digits():
    assert len(open_images(None, "labeled", channels=1, per_class=3)) == 30


@pytest.mark.parametrize(
    ("name", "mode", "color", "expected"),
    [
        ("rgb.jpg", "RGB", (200, 100, 50), (200, 100, 50)),
        ("rgb.png", "RGB", (200, 100, 50), (200, 100, 50)),
        ("rgb.webp", "RGB", (200, 100, 50), (200, 100, 50)),
        ("gray.jpg", "L", 90, (90, 90, 90)),
        ("gray.png", "L", 90, (90, 90, 90)),
        ("binary.png", "1", 1, (255, 255, 255)),
        ("16bit.png", "I;16", 257 * 90 + 128, (90, 90, 90)),
        ("16bit_up.png", "I;16", 257 * 90 + 129, (91, 91, 91)),
        ("16bit_max.png", "I;16", 65535, (255, 255, 255)),
        ("transparent.png", "RGBA", (200, 100, 50, 0), (255, 255, 255)),
        ("half.png", "RGBA", (200, 100, 50, 127), (228, 178, 153)),
        ("opaque.webp", "RGBA", (200, 100, 50, 255), (200, 100, 50)),
        ("gray_alpha.png", "LA", (90, 255), (90, 90, 90)),
        ("cmyk.jpg", "CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_files_of_every_kind_decode_to_color_and_gray(tmp_path, name, mode, color, expected):
    lossy = not name.endswith("png")
    image = Image.new(mode, (8, 6), color)
    image.save(tmp_path / name, quality=100) if lossy else image.save(tmp_path / name)
    color, gray = decode(tmp_path / name, 3), decode(tmp_path / name, 1)
    assert (color.dtype, color.shape, gray.dtype, gray.shape) == (torch.uint8, (3, 6, 8), torch.uint8, (1, 6, 8))
    assert (color.int() - torch.tensor(expected).view(3, 1, 1)).abs().max() <= (3 if lossy else name == "half.png")
    luma = (torch.tensor(expected) * torch.tensor([0.299, 0.587, 0.114])).sum()
    assert (gray - luma).abs().max() <= 4


def test_a_palette_decodes_to_its_colors(tmp_path):
    image = Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "palette.png")
    assert decode(tmp_path / "palette.png", 3)[:, 0, 0].tolist() == [200, 100, 50]
    image.save(tmp_path / "transparent.png", transparency=1)
    assert decode(tmp_path / "transparent.png", 3)[:, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_an_image_is_turned_as_its_exif_orientation_says(tmp_path, mode):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    pixels = np.zeros((6, 8), np.uint16)
    pixels[0, 0] = 65535
    image = Image.fromarray(pixels) if mode == "I;16" else Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    image.save(tmp_path / "turned.png", exif=exif)
    decoded = decode(tmp_path / "turned.png", 1)
    assert decoded.shape == (1, 8, 6)
    assert decoded.nonzero().tolist() == [[0, 0, 5]]


sides = st.integers(1, 600)


@given(sides, sides, st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), st.integers(0, 2**40))
def test_a_random_crop_lies_inside_and_keeps_to_its_ranges(height, width, scale, seed):
    scale = (min(scale), max(scale))
    top, left, h, w = random_crop_box(height, width, scale=scale, generator=chance(seed))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h > 0 < w
    central = (top, left) == ((height - h) // 2, (width - w) // 2) and (h == height or w == width)
    area = height * width
    in_scale = (h - 0.5) * (w - 0.5) <= scale[1] * area * 1.0001 and (h + 0.5) * (w + 0.5) >= scale[0] * area * 0.9999
    in_ratio = (w + 0.5) / (h - 0.5) >= 3 / 4 and (w - 0.5) / (h + 0.5) <= 4 / 3
    assert in_ratio or min(h, w) == 1
    assert in_scale or central


@given(sides, sides, st.floats(0.1, 10), st.integers(0, 99))
def test_a_random_crop_of_one_size_and_shape_has_them(height, width, aspect, seed):
    area = 0.05 * height * width
    h, w = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
    box = random_crop_box(height, width, scale=(0.05, 0.05), ratio=(aspect, aspect), generator=chance(seed))
    if 0 < h < height and 0 < w < width:
        assert abs(box[2] - h) <= 1 >= abs(box[3] - w)  # one where the two ways of rounding part


def test_a_random_crop_that_never_fits_is_the_largest_central_one():
    assert random_crop_box(10, 100, scale=(0.9, 1), generator=chance()) == (0, 43, 10, 13)
    assert random_crop_box(100, 10, scale=(0.9, 1), generator=chance()) == (43, 0, 13, 10)
    assert random_crop_box(30, 40, scale=(2, 2), generator=chance()) == (0, 0, 30, 40)


def test_random_crops_reach_every_border_and_both_ends_of_their_ranges():
    generator = chance()
    boxes = torch.tensor([random_crop_box(60, 60, scale=(0.1, 0.4), generator=generator) for _ in range(3000)])
    top, left, h, w = boxes.unbind(dim=1)
    for border in (top == 0, left == 0, top + h == 60, left + w == 60):
        assert border.any()
    area, ratio = h * w / 3600, w / h
    assert 0.09 < area.min() < 0.11 < 0.39 < area.max() < 0.41
    assert 0.70 < ratio.min() < 0.80 < 1.25 < ratio.max() < 1.42
    assert (
        torch.corrcoef(torch.stack([area, ratio.log(), top / (61 - h), left / (61 - w)])).sub(torch.eye(4)).abs().max()
        < 0.1
    )


def test_bad_ranges_of_a_crop_are_refused():
    sentence = "scale=(0.5, 0.2) and ratio=(0.75, 1.3333333333333333) are to be ranges of positive numbers"
    with pytest.raises(ValueError, match=quoting(sentence)):
        CropFlip((4, 4), scale=(0.5, 0.2))(Memory().image(0), chance())


def test_a_one_shot_crop_is_cut_to_the_image():
    assert one_shot_crop_size(375, 500, 0.25, 0.0) == (217, 217)
    assert one_shot_crop_size(375, 500, 1.0, np.log(3 / 4)) == (375, 375)
    assert one_shot_crop_size(1, 1, 0.08, 0.0) == (1, 1)


@pytest.mark.parametrize("channels", [1, 3, 10])
@pytest.mark.parametrize("size", [(20, 31), (90, 97), (46, 46)])
def test_resizing_is_pillows_bicubic(channels, size):
    y, x, c = np.mgrid[:40, :50, :channels]
    image = (127 + 120 * np.sin(x / 7 + y / 9 + c)).astype(np.uint8)
    expected = [
        np.asarray(Image.fromarray(image[..., i]).resize(size[::-1], Image.Resampling.BICUBIC)) for i in range(channels)
    ]
    resized = resize(torch.from_numpy(image).permute(2, 0, 1), *size)
    assert resized.shape == (channels, *size)
    assert (resized.int() - torch.from_numpy(np.stack(expected)).int()).abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 3, 10])
def test_resizing_neither_wraps_round_nor_mixes_channels(channels):
    image = torch.randint(2, (channels, 9, 11), dtype=torch.uint8, generator=Generator()) * 255  # bicubic overshoots
    together, alone = resize(image, 30, 25), torch.cat([resize(plane[None], 30, 25) for plane in image])
    assert torch.equal(together, alone)
    assert together[:, 1, 1].int().sub(image[:, 0, 0]).abs().max() < 60


def test_resizing_to_the_same_size_changes_nothing():
    image = Memory().image(0)
    assert torch.equal(resize(image, 20, 30), image)


def test_a_pre_training_view_has_the_size_asked_for_whatever_its_shape_and_channels():
    for channels in (1, 3, 10):
        view = CropFlip((24, 40))(Memory(channels=channels).image(0), chance())
        assert (view.shape, view.dtype) == ((channels, 24, 40), torch.uint8)


def test_a_view_of_all_of_an_image_of_the_same_shape_is_the_image_flipped_or_not():
    image = Memory().image(0)
    views = [CropFlip((20, 30), scale=(1, 1), ratio=(1, 1))(image, chance(seed)) for seed in range(50)]
    flipped = [torch.equal(view, image.flip(-1)) for view in views]
    assert all(flip or torch.equal(view, image) for flip, view in zip(flipped, views, strict=True))
    assert 10 < sum(flipped) < 40
    assert torch.equal(CropFlip((20, 30), scale=(1, 1), ratio=(1, 1), flip=0)(image, chance()), image)
    assert torch.equal(CropFlip((20, 30), scale=(1, 1), ratio=(1, 1), flip=1)(image, chance()), image.flip(-1))


@pytest.mark.parametrize(
    ("size", "covered"), [((224, 224), (256, 341)), ((96, 160), (136, 182)), ((160, 96), (182, 242))]
)
def test_a_test_view_is_the_center_of_the_smallest_size_that_covers(size, covered):
    image = torch.randint(256, (3, 375, 500), dtype=torch.uint8, generator=Generator())
    top, left = round((covered[0] - size[0]) / 2), round((covered[1] - size[1]) / 2)
    expected = resize(image, *covered)[:, top : top + size[0], left : left + size[1]]
    assert torch.equal(CenterCrop(size)(image), expected)


def test_a_test_view_without_margin_is_a_plain_resize():
    image = Digits("test").image(0)
    assert torch.equal(CenterCrop((32, 32), crop_fraction=1.0)(image), resize(image, 32, 32))
    with pytest.raises(ValueError, match=quoting("crop_fraction=1.1 is to be above 0 and at most 1")):
        CenterCrop((32, 32), crop_fraction=1.1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_fine_tuning_view_is_a_float_and_leaves_the_global_generators_alone(channels):
    view = Augment((24, 40), mean=[0.5] * channels, std=[0.25] * channels)
    image = Memory(channels=channels).image(0)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = (random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
    one, same, other = (view(image, chance(seed)) for seed in (3, 3, 4))
    after = (random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
    assert before == after
    assert (one.shape, one.dtype) == ((channels, 24, 40), torch.float32)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_of_the_fine_tuning_view_works(channels):
    view = Augment((16, 16), mean=[0.5] * channels, std=[0.25] * channels)
    views = torch.stack([view(Memory(channels=channels).image(0), chance(seed)) for seed in range(200)])
    assert views.isfinite().all()
    erased = ((views - 0.5).abs() > 0.51).flatten(1).any(dim=1).float().mean()  # pixels lie in [0, 1], noise does not
    assert 0.1 < erased < 0.4


def test_a_fine_tuning_view_with_everything_off_is_a_plain_resize():
    view = Augment(
        (10, 15), mean=[0.5] * 3, std=[0.25] * 3, scale=(1, 1), ratio=(1, 1), flip=0, auto_augment=None, erasing=0
    )
    image = Memory().image(0)
    assert (view(image, chance()) - resize(image, 10, 15) / 255).abs().max() <= 1.01 / 255


def test_a_fine_tuning_view_of_other_channels_is_refused():
    with pytest.raises(ValueError, match=quoting("RandAugment works on 1 or 3 channels, not 10: take CropFlip")):
        Augment((16, 16), mean=[0.5] * 10, std=[0.5] * 10)
    with pytest.raises(ValueError, match=quoting("an image of 3 channels cannot be normalized by 1 means")):
        Augment((16, 16), mean=[0.5], std=[0.5])(Memory().image(0), chance())


def test_a_view_depends_on_seed_epoch_and_image_and_on_nothing_else():
    views, again, other = (Views(Memory(), CropFlip((16, 16)), seed=seed) for seed in (0, 0, 1))
    first = views[0, 3]
    assert not torch.equal(first, views[1, 3])
    views.source.images[4] = views.source.images[3]  # type: ignore[attr-defined]
    assert not torch.equal(first, views[0, 4])
    assert not torch.equal(first, other[0, 3])
    assert torch.equal(first, again[0, 3])


def test_several_views_decode_once():
    source = Memory(classes=4)
    (small, large), label = Views(source, (CropFlip((8, 8)), CropFlip((16, 12))), labels=True)[0, 5]
    assert (small.shape, large.shape, label) == ((3, 8, 8), (3, 16, 12), 1)
    assert source.decoded == 1


def test_sources_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match=quoting("the source has no image")):
        Views(Memory(0), unchanged)
    with pytest.raises(ValueError, match=quoting("labels are asked for, but the source has none")):
        Views(Memory(), unchanged, labels=True)
    source = Memory()
    source.channels = 1
    sentence = "memory 2 is torch.uint8 of shape (3, 20, 30), not torch.uint8 of shape (1, H, W)"
    with pytest.raises(ValueError, match=quoting(sentence)):
        Views(source, unchanged)[0, 2]
    source = Memory()
    source.images = source.images.float()
    sentence = "memory 2 is torch.float32 of shape (3, 20, 30), not torch.uint8 of shape (3, H, W)"
    with pytest.raises(ValueError, match=quoting(sentence)):
        Views(source, unchanged)[0, 2]


def batches(count: int, size: int = 4, total: int = 12) -> list[list[tuple[int, int]]]:
    flat = [divmod(number, total) for number in range(count * size)]
    return [flat[start : start + size] for start in range(0, len(flat), size)]


@pytest.mark.parametrize("transform", [CropFlip((16, 12)), Augment((16, 12), mean=[0.5] * 3, std=[0.5] * 3)])
def test_the_number_of_workers_changes_nothing(transform):
    views = Views(Memory(classes=3), transform, labels=True)
    alone, shared = (list(Loader(views, iter(batches(7)), workers=workers)) for workers in (0, 2))
    assert len(alone) == len(shared) == 7
    for (images_alone, labels_alone), (images_shared, labels_shared) in zip(alone, shared, strict=True):
        assert torch.equal(images_alone, images_shared)
        assert torch.equal(labels_alone, labels_shared)


def test_a_batch_is_what_the_views_are_stacked_and_channels_last():
    views = Views(Memory(classes=3), (unchanged, CropFlip((16, 12))), labels=True)
    (whole, crops), labels = next(iter(Loader(views, batches(1))))
    assert torch.equal(whole, views.source.images[:4])  # type: ignore[attr-defined]
    assert all(torch.equal(crop, views[0, index][0][1]) for index, crop in enumerate(crops))
    assert labels.tolist() == [0, 1, 2, 0]
    assert labels.dtype == torch.int64
    assert whole.is_contiguous(memory_format=torch.channels_last)
    assert crops.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_list_of_batches_serves_any_number_of_iterations(workers):
    loader = Loader(Views(Memory(), unchanged), batches(3), workers=workers)
    one, two = list(loader), list(loader)
    assert len(one) == 3
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_workers_live_as_long_as_their_loader():
    loader = Loader(Views(Memory(), process), batches(2), workers=1)
    assert torch.equal(next(iter(loader)), next(iter(loader)))


def test_loading_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    list(Loader(Views(Memory(), CropFlip((8, 8))), batches(2)))
    assert torch.equal(before, torch.get_rng_state())


class Told:
    """A batch becomes its seed, and whether a worker made it."""

    def __call__(self, batch: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        assert batch.shape == (4, 3, 20, 30)
        return torch.tensor(seed), torch.tensor(get_worker_info() is not None)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_collated_where_it_was_loaded_with_the_seed_of_its_first_sample(workers):
    told = list(Loader(Views(Memory(), unchanged, seed=5), batches(4), workers=workers, collate=Told()))
    assert [int(seed) for seed, _ in told] == [seed_of("batch", 5, *batch[0]) for batch in batches(4)]
    assert all(bool(inside) == (workers > 0) for _, inside in told)


def process(image: Tensor, generator: Generator) -> Tensor:
    return torch.tensor([os.getpid(), torch.get_num_threads()]).view(2, 1, 1)


def test_workers_use_one_thread_and_leave_signals_to_the_parent():
    loader = iter(Loader(Views(Memory(), process), iter(batches(20)), workers=2))
    worker, threads = next(loader)[0].flatten().tolist()
    assert worker != os.getpid()
    assert threads == 1
    assert os.getpgid(worker) != os.getpgid(0)  # so what is sent to the group, by ctrl-c say, does not reach it
    assert len(list(loader)) == 19


def test_views_can_be_sent_to_workers_that_are_not_forked(tmp_path):
    write(tmp_path / "1.png")
    for transform in (CropFlip((8, 8)), CenterCrop((8, 8)), Augment((8, 8), mean=[0.5] * 3, std=[0.5] * 3)):
        views = Views(Folder(tmp_path, "train"), transform)
        assert torch.equal(pickle.loads(pickle.dumps(views))[0, 0], views[0, 0])
    assert pickle.loads(pickle.dumps(Mix(3)))._mixup.num_classes == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_replaced_by_the_next_counted_once_and_named(workers):
    views = Views(Memory(200, broken=(3, 4), classes=7), unchanged, labels=True)
    loader = Loader(views, iter(batches(150, total=200)), workers=workers)
    loaded = list(loader)
    assert len(loaded) == 150
    assert torch.equal(loaded[0][0][3], views.source.images[5])  # type: ignore[attr-defined]
    assert torch.equal(loaded[1][0][0], views.source.images[5])  # type: ignore[attr-defined]
    assert loaded[0][1].tolist() == [0, 1, 2, 5]
    assert loader.unreadable == dict.fromkeys(("memory 3", "memory 4"), "OSError: the file is truncated")


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_one_percent_unreadable_stops(workers):
    views = Views(Memory(200, broken=(3, 70, 90, 110)), unchanged)
    loader = Loader(views, iter(batches(150, total=200)), workers=workers)
    sentence = (
        "3 of 200 images (1.5%) cannot be read: memory 3, memory 70, memory 90; the first: OSError: the file is trunc"
    )
    with pytest.raises(ValueError, match=quoting(sentence)):
        list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_all_unreadable_stop_at_once(workers):
    source = Memory(500, broken=tuple(range(500)))
    sentence = "6 of 500 images (1.2%) cannot be read: memory 0, memory 1, memory 2, …; the first: OSError"
    with pytest.raises(ValueError, match=quoting(sentence)):
        list(Loader(Views(source, unchanged), batches(2), workers=workers))
    with pytest.raises(ValueError, match=quoting(sentence)):
        Views(source, unchanged)[0, 0]
    assert source.decoded <= 12


def test_broken_files_are_unreadable(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for suffix in ("jpg", "png", "webp"):
        Image.fromarray(pixels).save(tmp_path / f"truncated.{suffix}")
        data = (tmp_path / f"truncated.{suffix}").read_bytes()
        (tmp_path / f"truncated.{suffix}").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for number in range(500):
        os.link(tmp_path / "good.png", tmp_path / f"{number}.png") if number else write(tmp_path / "good.png")
    source = Folder(tmp_path, "train")
    loader = Loader(Views(source, CropFlip((8, 8))), [[(0, index) for index in range(len(source))]])
    assert next(iter(loader)).shape == (505, 3, 8, 8)
    assert sorted(Path(name).name for name in loader.unreadable) == [
        "empty.png",
        "text.jpg",
        "truncated.jpg",
        "truncated.png",
        "truncated.webp",
    ]


def test_mixed_targets_are_soft_and_sum_to_one():
    pictures, labels = torch.rand(8, 3, 16, 16, generator=chance()), torch.arange(8) % 5
    before = (pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
    for seed in range(20):
        mixed, targets = Mix(5)((pictures.clone(), labels), seed)
        assert mixed.shape == pictures.shape
        assert targets.shape == (8, 5)
        assert (targets.sum(dim=1) - 1).abs().max() < 1e-6
        assert targets.min() >= 0.1 / 5 - 1e-6
        assert torch.equal(mixed, Mix(5)((pictures.clone(), labels), seed)[0])
    assert before == (pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002


def test_cutmix_targets_are_the_shares_of_the_pixels():
    pictures = torch.eye(2).view(2, 2, 1, 1).expand(2, 2, 16, 16).clone()  # channel k is 1 in image k
    mixed, targets = Mix(2, mixup=0, smoothing=0)((pictures, torch.tensor([0, 1])), 3)
    assert set(mixed.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(mixed.mean(dim=(2, 3)), targets)
    assert 0 < targets[0, 0] < 1


def test_without_mixing_labels_are_only_smoothed():
    pictures = torch.rand(3, 3, 4, 4)
    same, targets = Mix(4, mixup=0, cutmix=0, smoothing=0.2)((pictures, torch.tensor([0, 3, 3])), 0)
    assert same is pictures
    assert torch.allclose(targets, torch.eye(4)[[0, 3, 3]] * 0.8 + 0.05)


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ValueError, match=quoting("mixup and cutmix mix pairs: a batch of 3 images is odd")):
        Mix(4)((torch.rand(3, 3, 4, 4), torch.zeros(3, dtype=torch.long)), 0)
    with pytest.raises(ValueError, match=quoting("mixup and cutmix mix floats, not torch.uint8")):
        Mix(4)((torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)), 0)


def test_normalized_images_have_mean_zero_and_deviation_one():
    source = Memory()
    normalize = Normalize(*statistics(source))
    normalized = normalize(source.images)
    assert normalized.dtype == torch.float32
    assert normalized.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (normalized.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    assert torch.allclose(normalize(normalize.unit(source.images)), normalized)
    assert torch.allclose(normalize.undo(normalized), normalize.unit(source.images), atol=1e-6)
    assert normalize.unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, 1]


def test_the_numbers_of_a_normalization_are_stored_with_the_checkpoint():
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
    assert {name: tuple(value.shape) for name, value in normalize.state_dict().items()} == {
        "mean": (3, 1, 1),
        "std": (3, 1, 1),
    }


def test_normalizations_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=quoting("images of 3 channels cannot be normalized by 1 means")):
        Normalize([0.5], [0.5])(torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match=quoting("mean=(0.5,) and std=(0,) are to be as many, and std above 0")):
        Normalize([0.5], [0])


def test_statistics_are_those_of_the_images_that_can_be_read():
    source = Memory(40, channels=2, broken=(0, 20))
    readable = source.images[[index for index in range(40) if index not in source.broken]].double() / 255
    mean, std = statistics(source)
    assert np.allclose(mean, readable.mean(dim=(0, 2, 3)))
    assert np.allclose(std, readable.std(dim=(0, 2, 3), correction=0))


def test_statistics_look_at_no_more_images_than_allowed_and_never_give_zero():
    source = Memory(40)
    source.images[:] = 51
    mean, std = statistics(source, limit=7)
    assert source.decoded == 7
    assert np.allclose(mean, 0.2)
    assert np.allclose(std, 1 / 255)
    with pytest.raises(ValueError, match=quoting("none of 3 images can be read")):
        statistics(Memory(3, broken=(0, 1, 2)))
