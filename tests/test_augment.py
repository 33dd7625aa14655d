"""Augmentations of fine-tuning: timm's, drawn from a seed, and the generators of the process left alone."""

import pickle
import random

from common.data.augment import Augment, auto_augment_policy
from common.data.views import resize

import numpy as np
import pytest
import torch
from pictures import Memory, chance, quoting
from PIL import Image


@pytest.mark.parametrize("channels", [1, 3])
def test_a_fine_tuning_view_is_uint8_and_leaves_the_global_generators_alone(channels):
    view = Augment((24, 40), mean=[0.5] * channels)
    image = Memory(channels=channels).image(0)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = (random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
    one, same, other = (view(image, chance(seed)) for seed in (3, 3, 4))
    after = (random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
    assert before == after
    assert (one.shape, one.dtype) == ((channels, 24, 40), torch.uint8)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_of_the_fine_tuning_view_works(channels):
    view, image = Augment((16, 16), mean=[0.5] * channels), Memory(channels=channels).image(0)
    views = torch.stack([view(image, chance(seed)) for seed in range(200)])
    assert len(views.unique(dim=0)) == 200


def test_a_fine_tuning_view_with_everything_off_is_a_plain_resize():
    view = Augment((10, 15), mean=[0.5] * 3, scale=(1, 1), ratio=(1, 1), flip=0, auto_augment=None)
    image = Memory().image(0)
    assert (view(image, chance()).int() - resize(image, 10, 15).int()).abs().max() <= 1


def test_a_fine_tuning_view_of_other_channels_is_refused():
    with pytest.raises(ValueError, match=quoting("RandAugment works on 1 or 3 channels, not 10: take CropFlip")):
        Augment((16, 16), mean=[0.5] * 10)
    with pytest.raises(ValueError, match=quoting("an image has 3 channels, but the mean 1")):
        Augment((16, 16), mean=[0.5])(Memory().image(0), chance())


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "rand", "augmix-m5-w4-d2", "3a", "original", "v0"])
def test_a_policy_of_timm_is_found_by_its_name(name):
    image = Image.fromarray(Memory().image(0).permute(1, 2, 0).numpy())
    assert auto_augment_policy(name)(image).size == (30, 20)


@pytest.mark.parametrize("name", ["random-m9", "rand-z9", "v9", "nonsense", "augmix-q1"])
def test_a_policy_that_timm_does_not_know_is_an_error(name):
    with pytest.raises((AssertionError, ValueError, KeyError)):
        auto_augment_policy(name)
