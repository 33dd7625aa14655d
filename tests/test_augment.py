"""Augmentations of fine-tuning: timm's, drawn from a seed, and the generators of the process left alone."""

import pickle
import random

from common.data.augment import Augment, Mix, auto_augment_policy
from common.data.views import resize

import numpy as np
import pytest
import torch
from pictures import Memory, chance, quoting
from PIL import Image


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


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "rand", "augmix-m5-w4-d2", "3a", "original", "v0"])
def test_a_policy_of_timm_is_found_by_its_name(name):
    image = Image.fromarray(Memory().image(0).permute(1, 2, 0).numpy())
    assert auto_augment_policy(name)(image).size == (30, 20)


@pytest.mark.parametrize("name", ["random-m9", "rand-z9", "v9", "nonsense", "augmix-q1"])
def test_a_policy_that_timm_does_not_know_is_an_error(name):
    with pytest.raises((AssertionError, ValueError, KeyError)):
        auto_augment_policy(name)
