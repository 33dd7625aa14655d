"""Mean and standard deviation of the channels."""

from pathlib import Path

from common.config import DataSettings, SettingsError
from common.data.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize, normalization, statistics

import numpy as np
import pytest
import torch
from pictures import Memory, quoting


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
    with pytest.raises(
        ValueError, match=quoting("mean=(0.5,) and std=(0,) must have the same length, with std above 0")
    ):
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


def test_the_statistics_are_imagenets_for_color_files_and_the_images_own_otherwise(tmp_path: Path):
    color, gray = Memory(), Memory(channels=1)
    imagenet = DataSettings(path=str(tmp_path))
    assert normalization(imagenet, color).mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)
    assert normalization(imagenet, color).std.flatten().tolist() == pytest.approx(IMAGENET_STD)
    for settings, source in (
        (DataSettings(path=str(tmp_path), channels=1), gray),
        (DataSettings(channels=1), gray),
        (DataSettings(path="shapes"), color),
        (DataSettings(path=str(tmp_path), statistics="data"), color),
    ):
        mean, std = statistics(source)
        assert normalization(settings, source).mean.flatten().tolist() == pytest.approx(mean)
        assert normalization(settings, source).std.flatten().tolist() == pytest.approx(std)
    sentence = "ImageNet's mean and std have 3 channels, not 1: use --statistics data"
    with pytest.raises(SettingsError, match=quoting(sentence)):
        normalization(DataSettings(channels=1, statistics="imagenet"), gray)
