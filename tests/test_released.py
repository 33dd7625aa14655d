"""Pairing of images and windows in LoMaR's published code: what the golden files were recorded with."""

import math
from collections import Counter

from common.data.normalize import Normalize
from mimkit.windows import distinct_anchors

import lomar
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from released import ReleasedLoMaR, released_pairs
from strategies import batches, fast, seeded
from torch import Tensor


@st.composite
def windows_of_a_batch(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Windows, each identified by two numbers, and the number of images that share them."""
    count = draw(st.integers(0, 9))
    windows = torch.arange(count * 2).view(count, 2) + 100 * torch.arange(6).view(2, 3, 1, 1)
    batch = draw(st.sampled_from([(), (3,), (2, 3)]))
    return windows[(0,) * (2 - len(batch))], draw(st.integers(0, 9))


@fast
@given(windows_of_a_batch())
def test_row_r_of_the_published_code_is_image_r_mod_n_with_window_r_mod_m(arguments):
    windows, num_images = arguments
    count = windows.shape[-2]
    pairs = released_pairs(windows, num_images=num_images)
    assert pairs.shape == (*windows.shape[:-2], num_images, count, 2)
    met: dict[int, list[Tensor]] = {image: [] for image in range(num_images)}
    for row in range(num_images * count):
        met[row % num_images].append(windows[..., row % count, :])
    for image, expected in met.items():
        for slot, window in enumerate(expected):
            assert pairs[..., image, slot, :].equal(window)


@pytest.mark.parametrize(
    ("num_images", "windows", "distinct"),
    [
        *[(256, count, number) for count, number in {1: 1, 2: 1, 4: 1, 6: 3, 8: 1, 9: 9}.items()],
        *[(253, count, count) for count in (1, 2, 4, 6, 8, 9)],
    ],
)
def test_an_image_gets_the_number_of_windows_divided_by_the_greatest_common_divisor(num_images, windows, distinct):
    pairs = released_pairs(torch.arange(windows).view(-1, 1), num_images=num_images).squeeze(-1)
    common = math.gcd(num_images, windows)
    assert distinct == windows // common
    for image, met in enumerate(pairs.tolist()):
        assert Counter(met) == {window: common for window in range(windows) if window % common == image % common}


@given(st.integers(1, 12), st.integers(1, 9))
def test_every_pair_occurs_once_if_and_only_if_the_counts_have_no_common_divisor(num_images, windows):
    pairs = released_pairs(torch.arange(windows).view(-1, 1), num_images=num_images).squeeze(-1)
    each_once = all(sorted(met) == list(range(windows)) for met in pairs.tolist())
    assert each_once == (math.gcd(num_images, windows) == 1)
    assert len(set(pairs.flatten().tolist())) == windows  # the batch as a whole gets all of them


@given(batches, st.integers(0, 5))
def test_windows_may_be_patches_or_anchors_with_any_leading_axes(batch, num_images):
    windows = (100 * seeded(*batch, 3, 7)).long()
    pairs = released_pairs(windows, num_images=num_images)
    for column in range(7):
        alone = released_pairs(windows[..., column : column + 1], num_images=num_images)
        assert pairs[..., column].equal(alone.squeeze(-1))


@pytest.mark.parametrize("images", [4, 5, 6])
def test_the_recipe_as_released_pairs_one_set_of_windows_with_all_images(images):
    made = ReleasedLoMaR(lomar.PRESETS["digits"], Normalize([0.4], [0.2]))
    noise = made.noise(lambda *shape: seeded(*shape), images)
    of_the_batch = distinct_anchors(noise["rows"][0], noise["columns"][0], num_windows=4)
    assert made.anchors(noise).equal(released_pairs(of_the_batch, num_images=images))
