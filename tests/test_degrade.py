"""Degradations against loops, and what they must leave as it is."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import copied, fast, images, intervals, seeded, uniforms
from torch import Tensor

from mimkit.degrade import area_resize, central_crop, zoom_in, zoom_in_anywhere

sides = st.integers(1, 9)


def averaged(images: Tensor, H: int, W: int) -> Tensor:
    """Area resize by its definition, one new pixel after the other."""
    old_H, old_W = images.shape[-2:]
    result = torch.empty(*images.shape[:-2], H, W)
    for i in range(H):
        for j in range(W):
            rows = slice(i * old_H // H, math.ceil((i + 1) * old_H / H))
            columns = slice(j * old_W // W, math.ceil((j + 1) * old_W / W))
            result[..., i, j] = images[..., rows, columns].mean(dim=(-2, -1))
    return result


@fast
@given(images(), sides, sides)
def test_each_new_pixel_is_the_mean_of_the_old_pixels_it_touches(pictures, H, W):
    torch.testing.assert_close(area_resize(pictures, H=H, W=W), averaged(pictures, H, W))


@fast
@given(images(), sides, sides)
def test_resizing_by_area_keeps_a_constant_and_stays_between_the_extremes(pictures, H, W):
    resized = area_resize(pictures, H=H, W=W)
    if pictures.numel():
        assert pictures.min() - 1e-6 <= resized.min()
        assert resized.max() <= pictures.max() + 1e-6
    torch.testing.assert_close(area_resize(torch.ones_like(pictures), H=H, W=W), torch.ones_like(resized))


@fast
@given(images(), sides, sides, st.sampled_from([(-1,), (-2,), (-2, -1)]))
def test_resizing_by_area_commutes_with_flips(pictures, H, W, axes):
    flipped = area_resize(pictures.flip(axes), H=H, W=W).flip(axes)
    torch.testing.assert_close(flipped, area_resize(pictures, H=H, W=W))


@fast
@given(images())
def test_resizing_by_area_to_the_same_size_changes_nothing(pictures):
    assert area_resize(pictures, H=pictures.shape[-2], W=pictures.shape[-1]).equal(pictures)


@fast
@given(images(even=True))
def test_halving_is_plain_pooling_and_doubling_repeats_pixels(pictures):
    H, W = pictures.shape[-2:]
    halves = F.avg_pool2d(pictures.reshape(-1, H, W), 2) if pictures.numel() else pictures[..., ::2, ::2]
    halved = area_resize(pictures, H=H // 2, W=W // 2)
    torch.testing.assert_close(halved, halves.reshape(halved.shape))
    doubled = pictures.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
    torch.testing.assert_close(area_resize(pictures, H=2 * H, W=2 * W), doubled)


@st.composite
def windows(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Images, and the height and width of a window with a centre on their pixels."""
    pictures = draw(images())
    H, W = pictures.shape[-2:]
    return pictures, draw(st.sampled_from(range(H, 0, -2))), draw(st.sampled_from(range(W, 0, -2)))


@fast
@given(windows())
def test_a_central_crop_has_equal_margins(arguments):
    pictures, H, W = arguments
    crop = central_crop(pictures, H=H, W=W)
    top, left = (pictures.shape[-2] - H) // 2, (pictures.shape[-1] - W) // 2
    assert F.pad(torch.ones_like(crop), (left, left, top, top)).shape == pictures.shape
    for i in range(H):
        for j in range(W):
            assert crop[..., i, j].equal(pictures[..., i + top, j + left])


@fast
@given(windows())
def test_central_crop_and_zoom_in_commute_with_flips(arguments):
    pictures, H, W = arguments
    both = (-2, -1)
    assert central_crop(pictures.flip(both), H=H, W=W).flip(both).equal(central_crop(pictures, H=H, W=W))
    zoomed = zoom_in(pictures.flip(both), window_H=H, window_W=W).flip(both)
    torch.testing.assert_close(zoomed, zoom_in(pictures, window_H=H, window_W=W))


@fast
@given(windows())
def test_zoom_in_enlarges_the_central_window_and_sees_nothing_else(arguments):
    pictures, H, W = arguments
    zoomed = zoom_in(pictures, window_H=H, window_W=W)
    top, left = (pictures.shape[-2] - H) // 2, (pictures.shape[-1] - W) // 2
    window = pictures[..., top : top + H, left : left + W]
    torch.testing.assert_close(zoomed, averaged(window, *pictures.shape[-2:]))
    outside = F.pad(torch.zeros_like(window), (left, left, top, top), value=1.0)
    assert zoom_in(pictures + outside, window_H=H, window_W=W).equal(zoomed)


@fast
@given(images())
def test_zoom_in_on_the_full_window_changes_nothing(pictures):
    H, W = pictures.shape[-2:]
    assert zoom_in(pictures, window_H=H, window_W=W).equal(pictures)
    noise = torch.zeros(*pictures.shape[:-3], 2)
    assert zoom_in_anywhere(pictures, noise, window_H=H, window_W=W).equal(pictures)


@fast
@given(windows())
def test_zoom_in_anywhere_in_the_middle_of_its_noise_is_zoom_in(arguments):
    pictures, H, W = arguments
    noise = torch.full((*pictures.shape[:-3], 2), 0.5)
    anywhere = zoom_in_anywhere(pictures, noise, window_H=H, window_W=W)
    assert anywhere.equal(zoom_in(pictures, window_H=H, window_W=W))


@fast
@given(uniforms(2), intervals(least=1), intervals(least=1))
def test_zoom_in_anywhere_enlarges_the_window_where_the_noise_says(noise, rows, columns):
    (H, window_H), (W, window_W) = rows, columns
    pictures = seeded(*noise.shape[:-1], 3, H, W)
    zoomed = zoom_in_anywhere(pictures, noise, window_H=window_H, window_W=window_W)
    assert zoomed.shape == pictures.shape
    count = noise[..., 0].numel()
    rows_of_batch = pictures.reshape(count, 3, H, W), zoomed.reshape(count, 3, H, W), noise.reshape(count, 2).tolist()
    for picture, result, (u, v) in zip(*rows_of_batch, strict=True):
        top, left = int(u * (H - window_H + 1)), int(v * (W - window_W + 1))
        window = picture[:, top : top + window_H, left : left + window_W]
        torch.testing.assert_close(result, averaged(window, H, W))


def test_the_largest_noise_zooms_into_the_last_corner():
    picture = seeded(3, 5, 6)
    expected = averaged(picture[:, 3:, 3:], 5, 6)
    for noise in (torch.full((2,), 1 - 2**-24), torch.ones(2, dtype=torch.bfloat16)):
        torch.testing.assert_close(zoom_in_anywhere(picture, noise, window_H=2, window_W=3), expected)


def test_the_place_of_the_window_is_not_rounded_in_bfloat16():
    noise = torch.arange(256).view(-1, 1).expand(-1, 2) / 256
    pictures = torch.arange(200.0).expand(256, 1, 1, 200)
    zoomed = zoom_in_anywhere(pictures, noise.bfloat16(), window_H=1, window_W=1)
    assert zoomed.equal(zoom_in_anywhere(pictures, noise, window_H=1, window_W=1))


def test_zoom_in_anywhere_takes_every_place_equally_often():
    draws, H, W = 20_000, 5, 3
    # a window of one pixel shows where it is: 5 × 3 places
    pictures = torch.arange(H * W).float().view(1, H, W).expand(draws, 1, H, W)
    seen = zoom_in_anywhere(pictures, seeded(draws, 2), window_H=1, window_W=1)[:, 0, 0, 0].long()
    counts = seen.bincount(minlength=H * W).double()
    assert len(counts) == H * W
    # 4.5 standard deviations
    assert (counts - draws / 15).abs().max() < 4.5 * (draws * 1 / 15 * 14 / 15) ** 0.5


def window(H: int, W: int) -> dict[str, int]:
    return {"window_H": H, "window_W": W}


BIG = [
    (size, f"a window of {size[0]} × {size[1]} pixels does not fit into images of 4 × 6") for size in [(5, 2), (2, 8)]
]
EMPTY = [
    (size, f"a window of {size[0]} × {size[1]} pixels does not fit into images of 4 × 6") for size in [(0, 2), (2, 0)]
]


@pytest.mark.parametrize(
    ("name", "shape", "numbers", "message"),
    [
        ("area_resize", (1, 4, 6), {"H": 0, "W": 2}, "images of 4 × 6 pixels cannot be resized to 0 × 2"),
        ("area_resize", (1, 4, 6), {"H": 2, "W": 0}, "images of 4 × 6 pixels cannot be resized to 2 × 0"),
        ("area_resize", (1, 0, 6), {"H": 2, "W": 2}, "images of 0 × 6 pixels cannot be resized to 2 × 2"),
        ("area_resize", (1, 4, 0), {"H": 2, "W": 2}, "images of 4 × 0 pixels cannot be resized to 2 × 2"),
        *(("central_crop", (1, 4, 6), {"H": H, "W": W}, message) for (H, W), message in BIG + EMPTY),
        *(("zoom_in", (1, 4, 6), window(H, W), message) for (H, W), message in BIG + EMPTY),
        *(
            (name, (1, 4, 6), numbers, f"a crop of {size} has no centre in 4 × 6 pixels: margins must be even")
            for name, numbers, size in [
                ("central_crop", {"H": 3, "W": 2}, "3 × 2"),
                ("central_crop", {"H": 2, "W": 3}, "2 × 3"),
                ("zoom_in", window(3, 2), "3 × 2"),
                ("zoom_in", window(2, 3), "2 × 3"),
            ]
        ),
    ],
)
def test_bad_input_gets_one_clear_sentence(name, shape, numbers, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(copied("degrade"), name)(torch.zeros(shape), **numbers)


@pytest.mark.parametrize(
    ("noise", "size", "message"),
    [
        *(((3, 2), size, message) for size, message in BIG + EMPTY),
        ((1, 2), (2, 2), "noise (1, 2) does not give a row and a column to images (3, 1, 4, 6)"),
        ((3, 1), (2, 2), "noise (3, 1) does not give a row and a column to images (3, 1, 4, 6)"),
        ((2,), (2, 2), "noise (2,) does not give a row and a column to images (3, 1, 4, 6)"),
    ],
)
def test_bad_windows_and_noise_get_one_clear_sentence(noise, size, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        copied("degrade").zoom_in_anywhere(torch.zeros(3, 1, 4, 6), torch.zeros(noise), **window(*size))
