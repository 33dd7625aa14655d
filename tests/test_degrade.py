"""Degradations against explicit loops, and what they must leave unchanged."""

import colorsys
import itertools
import math
import re
from collections.abc import Iterator
from statistics import NormalDist

from mimkit.degrade import (
    area_resize,
    central_crop,
    convolve_each,
    decolorize,
    fisheye,
    fisheye_at,
    mirror_fill,
    paste,
    random_kernels,
    random_kernels_any_size,
    wave,
    zoom_in,
    zoom_in_anywhere,
    zoom_out,
    zoom_out_any_size,
)

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import copied, fast, images, intervals, seeded, uniforms
from torch import Tensor

sides = st.integers(1, 9)


def averaged(images: Tensor, H: int, W: int) -> Tensor:
    """Area resize by definition, one new pixel at a time."""
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
def test_each_new_pixel_is_the_mean_of_the_old_pixels_it_overlaps(pictures, H, W):
    torch.testing.assert_close(area_resize(pictures, H=H, W=W), averaged(pictures, H, W))


@fast
@given(images(), sides, sides)
def test_area_resize_keeps_constants_and_stays_within_the_range_of_the_image(pictures, H, W):
    resized = area_resize(pictures, H=H, W=W)
    if pictures.numel():
        assert pictures.min() - 1e-6 <= resized.min()
        assert resized.max() <= pictures.max() + 1e-6
    torch.testing.assert_close(area_resize(torch.ones_like(pictures), H=H, W=W), torch.ones_like(resized))


@fast
@given(images(), sides, sides, st.sampled_from([(-1,), (-2,), (-2, -1)]))
def test_area_resize_commutes_with_flips(pictures, H, W, axes):
    flipped = area_resize(pictures.flip(axes), H=H, W=W).flip(axes)
    torch.testing.assert_close(flipped, area_resize(pictures, H=H, W=W))


@fast
@given(images())
def test_area_resize_to_the_same_size_changes_nothing(pictures):
    assert area_resize(pictures, H=pictures.shape[-2], W=pictures.shape[-1]).equal(pictures)


@fast
@given(images(even=True))
def test_halving_is_average_pooling_and_doubling_repeats_pixels(pictures):
    H, W = pictures.shape[-2:]
    halves = F.avg_pool2d(pictures.reshape(-1, H, W), 2) if pictures.numel() else pictures[..., ::2, ::2]
    halved = area_resize(pictures, H=H // 2, W=W // 2)
    torch.testing.assert_close(halved, halves.reshape(halved.shape))
    doubled = pictures.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
    torch.testing.assert_close(area_resize(pictures, H=2 * H, W=2 * W), doubled)


@st.composite
def windows(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Draw images, and the height and width of a window that can be centered on their pixels."""
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
def test_zoom_in_enlarges_the_central_window_and_reads_nothing_else(arguments):
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
def test_zoom_in_anywhere_with_noise_of_one_half_is_zoom_in(arguments):
    pictures, H, W = arguments
    noise = torch.full((*pictures.shape[:-3], 2), 0.5)
    anywhere = zoom_in_anywhere(pictures, noise, window_H=H, window_W=W)
    assert anywhere.equal(zoom_in(pictures, window_H=H, window_W=W))


@fast
@given(uniforms(2), intervals(least=1), intervals(least=1))
def test_zoom_in_anywhere_enlarges_the_window_at_the_place_given_by_the_noise(noise, rows, columns):
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


def test_the_largest_noise_zooms_in_on_the_last_corner():
    picture = seeded(3, 5, 6)
    expected = averaged(picture[:, 3:, 3:], 5, 6)
    for noise in (torch.full((2,), 1 - 2**-24), torch.ones(2, dtype=torch.bfloat16)):
        torch.testing.assert_close(zoom_in_anywhere(picture, noise, window_H=2, window_W=3), expected)


def test_the_place_of_the_window_is_not_rounded_in_bfloat16():
    noise = torch.arange(256).view(-1, 1).expand(-1, 2) / 256
    pictures = torch.arange(200.0).expand(256, 1, 1, 200)
    zoomed = zoom_in_anywhere(pictures, noise.bfloat16(), window_H=1, window_W=1)
    assert zoomed.equal(zoom_in_anywhere(pictures, noise, window_H=1, window_W=1))


def test_every_place_of_zoom_in_anywhere_is_equally_likely():
    draws, H, W = 20_000, 5, 3
    # a window of one pixel reveals its place: 5 × 3 places
    pictures = torch.arange(H * W).float().view(1, H, W).expand(draws, 1, H, W)
    seen = zoom_in_anywhere(pictures, seeded(draws, 2), window_H=1, window_W=1)[:, 0, 0, 0].long()
    counts = seen.bincount(minlength=H * W).double()
    assert len(counts) == H * W
    # 4.5 standard deviations
    assert (counts - draws / 15).abs().max() < 4.5 * (draws * 1 / 15 * 14 / 15) ** 0.5


# Zoom-out


def one_by_one(*tensors: Tensor, axes: int = 3) -> Iterator[tuple[Tensor, ...]]:
    """Iterate over single images with their other tensors; `axes` is the number of axes of an image."""
    count = tensors[0].shape[: tensors[0].ndim - axes].numel()
    rest = [tensor.shape[tensors[0].ndim - axes :] for tensor in tensors]
    return zip(*(t.reshape(count, *shape) for t, shape in zip(tensors, rest, strict=True)), strict=True)


def per_image(pictures: Tensor, *shape: int, seed: int = 0) -> Tensor:
    return seeded(*pictures.shape[:-3], *shape, seed=seed)


def reflected(place: int, length: int) -> int:
    """Return which pixel appears at a place of an infinitely repeated reflection, step by step."""
    while not 0 <= place < length:
        place = -1 - place if place < 0 else 2 * length - 1 - place
    return place


@st.composite
def canvases(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Draw small images, noise, and a canvas that is up to 20 pixels larger."""
    small = draw(images())
    noise = per_image(small, 2, seed=draw(st.integers(0, 99)))
    return small, noise, {side: small.shape[axis] + draw(st.integers(0, 20)) for side, axis in (("H", -2), ("W", -1))}


@fast
@given(canvases())
def test_mirror_fill_places_the_image_where_the_noise_says_surrounded_by_mirror_images(arguments):
    small, noise, size = arguments
    h, w = small.shape[-2:]
    canvas = mirror_fill(small, noise, **size)
    assert canvas.shape == (*small.shape[:-2], size["H"], size["W"])
    for picture, result, place in one_by_one(small, canvas, noise):
        top, left = (int(u * (n - m + 1)) for u, n, m in zip(place.tolist(), size.values(), (h, w), strict=True))
        assert result[:, top : top + h, left : left + w].equal(picture)
        rows = [reflected(row - top, h) for row in range(size["H"])]
        columns = [reflected(column - left, w) for column in range(size["W"])]
        assert result.equal(picture[:, rows][:, :, columns])


@fast
@given(canvases())
def test_mirror_fill_has_no_seams(arguments):
    small, noise, size = arguments
    h, w = small.shape[-2:]
    numbered = torch.stack([torch.arange(h)[:, None].expand(h, w), torch.arange(w).expand(h, w)])
    numbered = numbered.expand(*small.shape[:-3], 2, h, w)
    canvas = mirror_fill(numbered, noise, **size)
    for axis in (-2, -1):
        step = canvas.diff(dim=axis).abs()
        assert (step.sum(dim=-3) <= 1).all()  # the same pixel again, or an adjacent one


@fast
@given(images(), st.integers(0, 99))
def test_a_canvas_of_the_same_size_is_the_image(pictures, seed):
    H, W = pictures.shape[-2:]
    noise = per_image(pictures, 2, seed=seed)
    assert mirror_fill(pictures, noise, H=H, W=W).equal(pictures)
    assert zoom_out(pictures, noise, small_H=H, small_W=W).equal(pictures)
    assert paste(pictures, torch.zeros_like(pictures), noise).equal(pictures)
    anywhere = zoom_out_any_size(pictures, per_image(pictures, 3, seed=seed), sizes=((H, W), (H, W)))
    torch.testing.assert_close(anywhere, pictures)


@fast
@given(canvases(), st.sampled_from([(-1,), (-2,), (-2, -1)]))
def test_mirror_fill_commutes_with_flips_of_image_and_place(arguments, axes):
    small, noise, size = arguments
    other = noise.clone()
    for axis in axes:
        places = list(size.values())[axis] - small.shape[axis] + 1
        # from the left edge to the right edge, in the middle of the interval of noise of that place
        other[..., axis] = (places - (noise[..., axis] * places).floor() - 0.5) / places
    flipped = mirror_fill(small.flip(axes), other, **size).flip(axes)
    assert flipped.equal(mirror_fill(small, noise, **size))


@fast
@given(canvases())
def test_paste_uses_the_places_of_mirror_fill_and_keeps_the_rest_of_the_canvas(arguments):
    small, noise, size = arguments
    # pasting an image onto its own mirror-filled canvas changes nothing
    mirrored = mirror_fill(small, noise, **size)
    assert paste(small, mirrored, noise).equal(mirrored)
    canvas = torch.full_like(mirrored, 2.0)
    pasted = paste(small, canvas, noise)
    old = pasted == 2
    assert (~old).sum() == small.numel()
    assert pasted.equal(torch.where(old, canvas, mirrored))


@pytest.mark.parametrize(("own", "other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_paste_returns_the_dtype_of_the_images(own, other):
    pasted = paste(torch.ones(1, 1, 1, dtype=own), torch.zeros(1, 1, 3, dtype=other), torch.tensor([0.0, 0.5]))
    assert pasted.dtype == own
    assert pasted.equal(torch.tensor([[[0.0, 1.0, 0.0]]], dtype=own))


@fast
@given(images(), st.data())
def test_zoom_out_surrounds_the_shrunken_image_with_mirror_images(pictures, data):
    H, W = pictures.shape[-2:]
    h, w = data.draw(st.integers(1, H)), data.draw(st.integers(1, W))
    noise = per_image(pictures, 2, seed=data.draw(st.integers(0, 99)))
    zoomed = zoom_out(pictures, noise, small_H=h, small_W=w)
    torch.testing.assert_close(zoomed, mirror_fill(averaged(pictures, h, w), noise, H=H, W=W))
    if pictures.numel():
        assert pictures.min() - 1e-6 <= zoomed.min()
        assert zoomed.max() <= pictures.max() + 1e-6
    constant = zoom_out(torch.ones_like(pictures), noise, small_H=h, small_W=w)
    torch.testing.assert_close(constant, torch.ones_like(pictures))


@fast
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_zoom_out_any_size_is_zoom_out_with_the_size_of_each_image(H, W, data):
    size = st.tuples(st.integers(1, H), st.integers(1, W))
    sizes = tuple(data.draw(st.lists(size, min_size=1, max_size=4)))
    noise = data.draw(uniforms(3))
    pictures = seeded(*noise.shape[:-1], 2, H, W)
    zoomed = zoom_out_any_size(pictures, noise, sizes=sizes)
    assert zoomed.shape == pictures.shape
    for picture, result, chance in one_by_one(pictures, zoomed, noise):
        h, w = sizes[int(chance[2] * len(sizes))]
        torch.testing.assert_close(result, zoom_out(picture, chance[:2], small_H=h, small_W=w), rtol=1e-5, atol=1e-6)


def test_zoom_out_any_size_supports_the_sizes_of_the_paper():
    pictures, noise = seeded(4, 1, 224, 224), seeded(4, 3)
    noise[:, 2] = torch.tensor([0.0, 0.25, 0.5, 0.75])
    sizes = (96, 128, 160, 192)
    zoomed = zoom_out_any_size(pictures, noise, sizes=tuple((side, side) for side in sizes))
    for i, side in enumerate(sizes):
        expected = zoom_out(pictures[i], noise[i, :2], small_H=side, small_W=side)
        torch.testing.assert_close(zoomed[i], expected, rtol=1e-5, atol=1e-6)


def test_every_place_and_every_size_is_equally_likely():
    draws, H, W = 20_000, 5, 3

    def check_equal(counts: Tensor) -> None:
        share = 1 / len(counts)
        assert (counts - draws * share).abs().max() < 4.5 * (draws * share * (1 - share)) ** 0.5

    # a single pixel on a canvas reveals its place: 5 × 3 places
    pixels, noise = torch.ones(draws, 1, 1, 1), seeded(draws, 2)
    seen = paste(pixels, torch.zeros(draws, 1, H, W), noise).flatten(1).argmax(dim=1)
    check_equal(seen.bincount(minlength=H * W).double())
    # an image of two pixels whose left one is 0 reveals its place in the mirror-filled canvas
    seen = mirror_fill(torch.arange(2.0).expand(draws, 1, 1, 2), noise, H=1, W=4)[:, 0, 0]
    patterns = [[0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]]
    check_equal(torch.tensor([(seen == torch.tensor(pattern)).all(dim=1).sum() for pattern in patterns]).double())
    # a ramp of four pixels shrunken to 1, 2 or 4 has that many values
    ramps = torch.arange(4.0).expand(draws, 1, 1, 4)
    zoomed = zoom_out_any_size(ramps, seeded(draws, 3), sizes=((1, 1), (1, 2), (1, 4)))[:, 0, 0].sort(dim=1).values
    values = 1 + (zoomed.diff(dim=1) > 0.1).sum(dim=1)
    check_equal(values.bincount(minlength=5)[[1, 2, 4]].double())


def test_the_largest_noise_gives_the_last_place_and_the_last_size():
    picture = torch.arange(12.0).view(1, 3, 4)
    for noise in (torch.full((3,), 1 - 2**-24), torch.ones(3, dtype=torch.bfloat16)):
        assert mirror_fill(picture, noise[:2], H=200, W=300)[..., -3:, -4:].equal(picture)
        assert paste(picture, torch.zeros(1, 200, 300), noise[:2])[..., -3:, -4:].equal(picture)
        zoomed = zoom_out_any_size(picture, noise, sizes=((1, 1), (1, 1), (3, 2)))
        assert zoomed[..., -2:].equal(area_resize(picture, H=3, W=2))


# Fisheye and wave


def read(picture: Tensor, row: float, column: float) -> Tensor:
    """Sample the image at a place in pixels, bilinearly, with zeros outside."""
    _, H, W = picture.shape
    result = torch.zeros(len(picture))
    for y, x in itertools.product((math.floor(row), math.floor(row) + 1), (math.floor(column), math.floor(column) + 1)):
        if 0 <= y < H and 0 <= x < W:
            result += picture[:, y, x] * (1 - abs(row - y)) * (1 - abs(column - x))
    return result


def from_pixel(place: int, size: int) -> float:
    return 2 * place / (size - 1) - 1 if size > 1 else 0.0


def to_pixel(place: float, size: int) -> float:
    return (place + 1) / 2 * (size - 1)


@st.composite
def bends(draw: st.DrawFn, *, most: float = 0.30) -> tuple[Tensor, Tensor, Tensor]:
    """Draw images, centers inside or on the edge, and twists."""
    pictures, seed = draw(images()), draw(st.integers(0, 99))
    centers, twists = 2 * per_image(pictures, 2, seed=seed) - 1, most * per_image(pictures, seed=seed + 1)
    if draw(st.booleans()):
        centers, twists = centers.sign(), torch.full_like(twists, most)
    return pictures, centers, twists


@fast
@given(bends(most=0.8))
def test_fisheye_samples_each_pixel_closer_to_the_center_by_twist_times_the_squared_distance(arguments):
    pictures, centers, twists = arguments
    H, W = pictures.shape[-2:]
    bent = fisheye_at(pictures, centers, twists)
    for picture, result, center, twist in one_by_one(pictures, bent, centers, twists):
        for i, j in itertools.product(range(H), range(W)):
            y, x = from_pixel(i, H), from_pixel(j, W)
            down, right = float(center[0]) - y, float(center[1]) - x
            pull = float(twist) * math.hypot(down, right)
            expected = read(picture, to_pixel(y + pull * down, H), to_pixel(x + pull * right, W))
            torch.testing.assert_close(result[:, i, j], expected, rtol=0, atol=1e-5)


@fast
@given(bends())
def test_up_to_a_twist_of_030_nothing_outside_the_image_is_read(arguments):
    pictures, centers, twists = arguments
    ones = torch.ones_like(pictures)
    torch.testing.assert_close(fisheye_at(ones, centers, twists), ones)
    bent = fisheye_at(pictures, centers, twists)
    if pictures.numel():
        assert pictures.min() - 1e-6 <= bent.min()
        assert bent.max() <= pictures.max() + 1e-6


def test_large_twists_read_zeros_outside_the_image():
    bent = fisheye_at(torch.ones(1, 5, 5), torch.tensor([1.0, 1.0]), torch.tensor(0.8))
    assert bent[0, 0, 0] == 0
    assert bent[0, -1, -1] == 1


@fast
@given(bends())
def test_every_point_moves_towards_the_center_and_only_the_center_is_fixed(arguments):
    pictures, centers, twists = arguments
    H, W = pictures.shape[-2] + 1, pictures.shape[-1] + 1  # nothing can move along an axis of one pixel
    places = torch.stack(
        torch.meshgrid(*(torch.tensor([from_pixel(i, n) for i in range(n)]) for n in (H, W)), indexing="ij")
    )
    shown = fisheye_at(places.expand(*pictures.shape[:-3], 2, H, W), centers, twists)
    to_center = (places - centers[..., None, None]).norm(dim=-3)
    left = (shown - centers[..., None, None]).norm(dim=-3)
    torch.testing.assert_close(left, to_center * (1 - twists[..., None, None] * to_center), rtol=0, atol=1e-5)


@fast
@given(bends(), st.sampled_from([(-1,), (-2,), (-2, -1)]))
def test_fisheye_commutes_with_flips_and_transposition_of_image_and_center(arguments, axes):
    pictures, centers, twists = arguments
    bent = fisheye_at(pictures, centers, twists)
    sign = torch.tensor([-1.0 if axis in axes else 1.0 for axis in (-2, -1)])
    flipped = fisheye_at(pictures.flip(axes), centers * sign, twists).flip(axes)
    torch.testing.assert_close(flipped, bent, rtol=0, atol=1e-5)
    turned = fisheye_at(pictures.mT, centers.flip(-1), twists).mT
    torch.testing.assert_close(turned, bent, rtol=0, atol=1e-5)


@fast
@given(images(), st.integers(0, 99))
def test_zero_twist_and_zero_amplitude_change_nothing(pictures, seed):
    noise = per_image(pictures, 3, seed=seed)
    bent = fisheye(pictures, noise, least_twist=0.0, most_twist=0.0)
    torch.testing.assert_close(bent, pictures, rtol=0, atol=1e-5)
    waved = wave(pictures, amplitude=0.0, frequency=10.0)
    torch.testing.assert_close(waved, pictures, rtol=0, atol=1e-5)


@fast
@given(images(), st.integers(0, 99))
def test_the_noise_of_fisheye_gives_row_column_and_twist(pictures, seed):
    noise = per_image(pictures, 3, seed=seed)
    bent = fisheye(pictures, noise, least_twist=0.2, most_twist=0.25)
    expected = fisheye_at(pictures, 2 * noise[..., :2] - 1, 0.2 + 0.05 * noise[..., 2])
    torch.testing.assert_close(bent, expected, rtol=0, atol=1e-5)


def test_centers_of_fisheye_and_twists_are_uniform():
    draws, side = 5000, 9
    places = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij"))
    shown = fisheye(places.expand(draws, 2, side, side), seeded(draws, 3), least_twist=0.2, most_twist=0.3)
    # the pull at (0, 0) is m · |c| · c, at the corner (−1, −1) it is m · |c + 1| · (c + 1): two equations for c and m
    middle, corner = shown[:, :, side // 2, side // 2], shown[:, :, 0, 0] + 1
    root, other = middle.norm(dim=1).sqrt(), corner.norm(dim=1).sqrt()  # √m · |c| and √m · |c + 1|
    along, beyond = middle / root[:, None], corner / other[:, None]  # √m · c and √m · (c + 1)
    twists = (beyond - along).mean(dim=1).square()
    centers = along / twists.sqrt()[:, None]
    assert 0.2 - 1e-4 < twists.min() < 0.201
    assert 0.299 < twists.max() < 0.3 + 1e-4
    for values, low, high in ((twists, 0.2, 0.3), (centers[:, 0], -1.0, 1.0), (centers[:, 1], -1.0, 1.0)):
        counts = ((values - low) / (high - low) * 10).long().clamp(0, 9).bincount(minlength=10)
        # 4.5 standard deviations
        assert (counts - draws / 10).abs().max() < 4.5 * (draws * 0.1 * 0.9) ** 0.5


def bounced(row: float, size: int) -> float:
    """Reflect a place in pixels about the edge pixels until it lies inside."""
    while size > 1 and not 0 <= row <= size - 1:
        row = -row if row < 0 else 2 * (size - 1) - row
    return row if size > 1 else 0.0


amplitudes, frequencies = st.sampled_from([0.1, -0.4, 3.0]), st.sampled_from([0.0, 10.0, 20.0])


@fast
@given(images(), amplitudes, frequencies)
def test_wave_shifts_each_column_by_a_cosine_with_reflection_at_the_edge(pictures, amplitude, frequency):
    H, W = pictures.shape[-2:]
    waved = wave(pictures, amplitude=amplitude, frequency=frequency)
    for picture, result in one_by_one(pictures, waved):
        for i, j in itertools.product(range(H), range(W)):
            row = from_pixel(i, H) + amplitude * math.cos(frequency * from_pixel(j, W))
            expected = read(picture, bounced(to_pixel(row, H), H), j)
            torch.testing.assert_close(result[:, i, j], expected, rtol=0, atol=2e-5)


@fast
@given(images(), amplitudes, frequencies)
def test_wave_does_not_mix_columns_and_stays_within_the_range_of_the_image(pictures, amplitude, frequency):
    columns = pictures[..., :1, :].expand_as(pictures)
    torch.testing.assert_close(wave(columns, amplitude=amplitude, frequency=frequency), columns, rtol=0, atol=1e-5)
    waved = wave(pictures, amplitude=amplitude, frequency=frequency)
    if pictures.numel():
        assert pictures.min() - 1e-6 <= waved.min()
        assert waved.max() <= pictures.max() + 1e-6


@fast
@given(images(), amplitudes, frequencies)
def test_wave_commutes_with_flips_if_a_vertical_flip_negates_the_amplitude(pictures, amplitude, frequency):
    waved = wave(pictures, amplitude=amplitude, frequency=frequency)
    mirrored = wave(pictures.flip(-1), amplitude=amplitude, frequency=frequency).flip(-1)
    torch.testing.assert_close(mirrored, waved, rtol=0, atol=1e-5)
    over = wave(pictures.flip(-2), amplitude=-amplitude, frequency=frequency).flip(-2)
    torch.testing.assert_close(over, waved, rtol=0, atol=2e-5)


# Blur

odd = st.sampled_from([1, 3, 5])


@st.composite
def kernels_of(draw: st.DrawFn, *, mixing: bool | None = None) -> tuple[Tensor, Tensor]:
    """Draw images and their own kernels: one per channel, or one for each pair of channels."""
    pictures, k = draw(images()), draw(odd)
    c = pictures.shape[-3]
    both = draw(st.booleans()) if mixing is None else mixing
    return pictures, per_image(pictures, c * c if both else c, k, k, seed=draw(st.integers(0, 99))) - 0.3


@fast
@given(kernels_of())
def test_each_image_is_convolved_with_its_own_kernels_and_zero_padding(arguments):
    pictures, kernels = arguments
    c, H, W = pictures.shape[-3:]
    m, k = kernels.shape[-3:-1]
    blurred = convolve_each(pictures, kernels)
    margin = k // 2
    for picture, result, own in one_by_one(pictures, blurred, kernels):
        padded = F.pad(picture, (margin,) * 4)
        for o in range(c):
            sources = [(o, own[o])] if m == c else [(i, own[o * c + i]) for i in range(c)]
            expected = torch.zeros(H, W)
            for i, kernel in sources:
                for u, v in itertools.product(range(k), range(k)):
                    expected += kernel[u, v] * padded[i, u : u + H, v : v + W]
            torch.testing.assert_close(result[o], expected, rtol=1e-5, atol=1e-5)


@fast
@given(images(), odd, st.booleans())
def test_an_identity_kernel_changes_nothing(pictures, k, mixing):
    c = pictures.shape[-3]
    kernels = torch.zeros(*pictures.shape[:-3], c, c, k, k)
    kernels[..., range(c), range(c), k // 2, k // 2] = 1
    kernels = kernels.flatten(-4, -3) if mixing else kernels[..., range(c), range(c), :, :]
    assert convolve_each(pictures, kernels).equal(pictures)


@fast
@given(kernels_of(mixing=False))
def test_mixing_kernels_on_the_diagonal_equal_one_kernel_per_channel(arguments):
    pictures, kernels = arguments
    c, k = pictures.shape[-3], kernels.shape[-1]
    mixing = torch.zeros(*pictures.shape[:-3], c, c, k, k)
    mixing[..., range(c), range(c), :, :] = kernels
    mixed = convolve_each(pictures, mixing.reshape(*pictures.shape[:-3], c * c, k, k))
    torch.testing.assert_close(mixed, convolve_each(pictures, kernels), rtol=1e-5, atol=1e-5)


@fast
@given(kernels_of(), st.sampled_from([(-1,), (-2,), (-2, -1)]))
def test_convolution_commutes_with_flips_and_transposition_of_image_and_kernel(arguments, axes):
    pictures, kernels = arguments
    blurred = convolve_each(pictures, kernels)
    flipped = convolve_each(pictures.flip(axes), kernels.flip(axes)).flip(axes)
    torch.testing.assert_close(flipped, blurred, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(convolve_each(pictures.mT, kernels.mT).mT, blurred, rtol=1e-5, atol=1e-5)


@fast
@given(kernels_of())
def test_zero_padding_of_kernels_makes_no_difference(arguments):
    pictures, kernels = arguments
    larger = convolve_each(pictures, F.pad(kernels, (2, 2, 2, 2)))
    torch.testing.assert_close(larger, convolve_each(pictures, kernels), rtol=1e-5, atol=1e-5)


@given(uniforms(2, 3, 3))
def test_weights_are_normal_quantiles_of_the_noise(noise):
    kernels = random_kernels(noise, mean=1 / 9, std=0.02)
    normal = NormalDist(1 / 9, 0.02)
    expected = [normal.inv_cdf(min(max(u, 2**-24), 1 - 2**-24)) for u in noise.flatten().tolist()]
    torch.testing.assert_close(kernels, torch.tensor(expected).reshape(noise.shape), rtol=1e-5, atol=1e-6)


def test_weights_are_finite_at_both_ends_of_the_noise_and_equal_the_mean_if_std_is_zero():
    ends = torch.tensor([[0.0, 1 - 2**-24]])
    for noise in (ends.T @ torch.ones(1, 2), torch.ones(2, 2, dtype=torch.bfloat16), torch.zeros(2, 2)):
        kernels = random_kernels(noise, mean=0.0, std=1.0)
        assert (kernels.abs() < 5.5).all()
        assert random_kernels(noise, mean=0.5, std=0.0).equal(torch.full((2, 2), 0.5))


def test_weights_have_the_given_mean_and_std():
    count = 100_000
    kernels = random_kernels(seeded(count // 100, 10, 10), mean=0.2, std=0.02).double()
    assert abs(float(kernels.mean()) - 0.2) < 4.5 * 0.02 / count**0.5
    assert abs(float(kernels.std()) / 0.02 - 1) < 4.5 / (2 * count) ** 0.5
    beyond = ((kernels - 0.2).abs() > 0.04).double().mean()
    assert abs(float(beyond) - 0.0455) < 4.5 * (0.0455 * 0.9545 / count) ** 0.5


@fast
@given(uniforms(), st.lists(odd, min_size=1, max_size=4), st.sampled_from([1, 3]))
def test_smaller_kernels_are_centered_and_padded_with_zeros(size_noise, sizes, m):
    k = max(sizes)
    noise = seeded(*size_noise.shape, m, k, k)
    kernels = random_kernels_any_size(noise, size_noise, sizes=tuple(sizes), std=0.02)
    for kernel, own, chance in one_by_one(kernels, noise, size_noise):
        size = sizes[int(chance * len(sizes))]
        margin = (k - size) // 2
        middle = slice(margin, k - margin)
        expected = random_kernels(own[:, middle, middle], mean=1 / size**2, std=0.02)
        torch.testing.assert_close(kernel, F.pad(expected, (margin,) * 4), rtol=1e-5, atol=1e-7)


def test_every_kernel_size_is_equally_likely():
    draws, sizes = 20_000, (5, 7, 9, 11)
    noise = torch.full((1, 1, 1, 1), 0.5).expand(draws, 1, 11, 11)
    kernels = random_kernels_any_size(noise, seeded(draws), sizes=sizes, std=0.02)
    sides = (kernels > 0).sum(dim=(1, 2, 3)).double().sqrt().long()
    counts = sides.bincount(minlength=12)[list(sizes)]
    assert counts.sum() == draws
    # 4.5 standard deviations
    assert (counts - draws / 4).abs().max() < 4.5 * (draws * 1 / 4 * 3 / 4) ** 0.5


# Decolorize

saturations = st.sampled_from([0.0, 0.3, 0.6, 1.0])


@fast
@given(uniforms(3, 2, 3), saturations)
def test_decolorize_scales_the_saturation_of_hsv(pictures, saturation):
    ours = decolorize(pictures, saturation=saturation)
    for picture, result in one_by_one(pictures, ours):
        for i, j in itertools.product(range(2), range(3)):
            h, s, v = colorsys.rgb_to_hsv(*picture[:, i, j].tolist())
            expected = torch.tensor(colorsys.hsv_to_rgb(h, s * saturation, v))
            torch.testing.assert_close(result[:, i, j], expected, rtol=1e-5, atol=1e-6)


@fast
@given(images(), saturations, saturations)
def test_saturations_multiply_and_range_from_gray_to_unchanged(pictures, first, second):
    assert decolorize(pictures, saturation=1.0).equal(pictures)
    gray = decolorize(pictures, saturation=0.0)
    torch.testing.assert_close(gray, pictures.amax(dim=-3, keepdim=True).expand_as(pictures))
    twice = decolorize(decolorize(pictures, saturation=first), saturation=second)
    torch.testing.assert_close(twice, decolorize(pictures, saturation=first * second))


@fast
@given(images(), saturations)
def test_decolorize_brightens_up_to_the_largest_channel_and_is_permutation_equivariant(pictures, saturation):
    ours = decolorize(pictures, saturation=saturation)
    assert (ours >= pictures - 1e-6).all()
    assert (ours <= pictures.amax(dim=-3, keepdim=True) + 1e-6).all()
    for axes in ((-3,), (-2,), (-2, -1)):
        assert decolorize(pictures.flip(axes), saturation=saturation).flip(axes).equal(ours)
    gray = pictures[..., :1, :, :]
    assert decolorize(gray, saturation=saturation).equal(gray)


@fast
@given(images(), st.integers(0, 99))
def test_each_image_can_have_its_own_saturation(pictures, seed):
    saturation = per_image(pictures, seed=seed)
    ours = decolorize(pictures, saturation=saturation)
    for picture, result, own in one_by_one(pictures, ours, saturation):
        torch.testing.assert_close(result, decolorize(picture, saturation=float(own)))


# Forms of a block that have no row in the table of contracts

IMAGES = seeded(6, 3, 5, 4)
FORMS = {
    "one kernel per channel": ("convolve_each", lambda block: block, [IMAGES, seeded(6, 3, 3, 3)]),
    "mixing kernels, rows not divisible by four": ("convolve_each", lambda block: block, [IMAGES, seeded(6, 9, 3, 3)]),
    "one saturation per image": (
        "decolorize",
        lambda block: lambda images, saturation: block(images, saturation=saturation),
        [IMAGES, seeded(6)],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_fulfills_the_contract(form):
    name, called, tensors = FORMS[form]
    block = called(getattr(copied("degrade"), name))
    expected = block(*tensors)
    torch.testing.assert_close(torch.func.vmap(block)(*tensors), expected)
    torch.testing.assert_close(torch.stack([block(*parts) for parts in zip(*tensors, strict=True)]), expected)
    assert block(*(tensor[:0] for tensor in tensors)).shape == (0, *expected.shape[1:])
    meta = block(*(tensor.to("meta") for tensor in tensors))
    assert (meta.is_meta, meta.shape, meta.dtype) == (True, expected.shape, expected.dtype)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(*tensors), expected)
    exact = [tensor.bfloat16().float() for tensor in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(block(*exact), block(*exact).float())
        torch.testing.assert_close(block(*(t.bfloat16() for t in exact)), block(*exact).bfloat16())


# Invalid arguments


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
            (name, (1, 4, 6), numbers, f"a crop of {size} cannot be centered in 4 × 6 pixels: margins must be equal")
            for name, numbers, size in [
                ("central_crop", {"H": 3, "W": 2}, "3 × 2"),
                ("central_crop", {"H": 2, "W": 3}, "2 × 3"),
                ("zoom_in", window(3, 2), "3 × 2"),
                ("zoom_in", window(2, 3), "2 × 3"),
            ]
        ),
    ],
)
def test_invalid_arguments_raise_one_clear_sentence(name, shape, numbers, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(copied("degrade"), name)(torch.zeros(shape), **numbers)


@pytest.mark.parametrize(
    ("noise", "size", "message"),
    [
        *(((3, 2), size, message) for size, message in BIG + EMPTY),
        ((1, 2), (2, 2), "noise (1, 2) does not hold a row and a column for each of images (3, 1, 4, 6)"),
        ((3, 1), (2, 2), "noise (3, 1) does not hold a row and a column for each of images (3, 1, 4, 6)"),
        ((2,), (2, 2), "noise (2,) does not hold a row and a column for each of images (3, 1, 4, 6)"),
    ],
)
def test_invalid_windows_and_noise_raise_one_clear_sentence(noise, size, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        copied("degrade").zoom_in_anywhere(torch.zeros(3, 1, 4, 6), torch.zeros(noise), **window(*size))


NEITHER = "noise (3, 1) does not hold a row and a column for each of images (3, 1, 4, 6)"
NOT_THREE = "noise (3, 2) does not hold a row, a column and a {} for each of images (3, 1, 4, 6)"
UNFIT = "an image of {} × {} pixels does not fit onto a canvas of {} × {}"


@pytest.mark.parametrize(
    ("name", "shapes", "numbers", "message"),
    [
        ("mirror_fill", [(3, 1, 4, 6), (3, 1)], {"H": 8, "W": 8}, NEITHER),
        ("mirror_fill", [(3, 1, 4, 6), (3, 2)], {"H": 3, "W": 8}, UNFIT.format(4, 6, 3, 8)),
        ("mirror_fill", [(3, 1, 4, 6), (3, 2)], {"H": 8, "W": 5}, UNFIT.format(4, 6, 8, 5)),
        ("mirror_fill", [(3, 1, 0, 6), (3, 2)], {"H": 8, "W": 8}, UNFIT.format(0, 6, 8, 8)),
        ("mirror_fill", [(3, 1, 4, 0), (3, 2)], {"H": 8, "W": 8}, UNFIT.format(4, 0, 8, 8)),
        ("paste", [(3, 1, 4, 6), (3, 1, 8, 8), (3, 1)], {}, NEITHER),
        ("paste", [(3, 1, 4, 6), (3, 1, 3, 8), (3, 2)], {}, UNFIT.format(4, 6, 3, 8)),
        ("paste", [(3, 1, 0, 6), (3, 1, 3, 8), (3, 2)], {}, UNFIT.format(0, 6, 3, 8)),
        *(
            (
                "paste",
                [(3, 1, 4, 6), shape, (3, 2)],
                {},
                f"images (3, 1, 4, 6) and canvases {shape} differ in more than height and width",
            )
            for shape in [(3, 2, 8, 8), (1, 1, 8, 8), (1, 8, 8)]
        ),
        ("zoom_out", [(3, 1, 4, 6), (3, 1)], {"small_H": 2, "small_W": 2}, NEITHER),
        *(
            ("zoom_out", [(3, 1, 4, 6), (3, 2)], {"small_H": h, "small_W": w}, UNFIT.format(h, w, 4, 6))
            for h, w in [(5, 2), (2, 7), (0, 2), (2, 0)]
        ),
        ("zoom_out_any_size", [(3, 1, 4, 6), (3, 2)], {"sizes": ((2, 2),)}, NOT_THREE.format("size")),
        ("zoom_out_any_size", [(3, 1, 4, 6), (3, 3)], {"sizes": ()}, "sizes is empty"),
        *(
            ("zoom_out_any_size", [(3, 1, 4, 6), (3, 3)], {"sizes": ((2, 2), (h, w))}, UNFIT.format(h, w, 4, 6))
            for h, w in [(5, 2), (2, 7), (0, 2), (2, 0)]
        ),
        ("fisheye", [(3, 1, 4, 6), (3, 2)], {"least_twist": 0.2, "most_twist": 0.2}, NOT_THREE.format("twist")),
        *(
            (
                "fisheye",
                [(3, 1, 4, 6), (3, 3)],
                {"least_twist": least, "most_twist": most},
                f"least_twist={least} and most_twist={most} do not satisfy 0 <= least_twist <= most_twist < inf",
            )
            for least, most in [(0.3, 0.2), (-0.1, 0.2), (math.nan, 0.2), (0.2, math.nan), (0.2, math.inf)]
        ),
        *(
            (
                "fisheye_at",
                [(3, 1, 4, 6), centers, twists],
                {},
                f"centers {centers} and twists {twists} do not hold one of each per image of (3, 1, 4, 6)",
            )
            for centers, twists in [((3, 1), (3,)), ((2,), (3,)), ((3, 2), (1,)), ((3, 2), ())]
        ),
        ("fisheye_at", [(3, 0, 4), (2,), ()], {}, "images of 0 × 4 pixels are empty"),
        ("wave", [(3, 4, 0)], {"amplitude": 0.1, "frequency": 1.0}, "images of 4 × 0 pixels are empty"),
        *(
            (
                "wave",
                [(3, 4, 6)],
                {"amplitude": amplitude, "frequency": frequency},
                f"amplitude={amplitude} and frequency={frequency} are not both finite",
            )
            for amplitude, frequency in [(math.nan, 1.0), (0.1, math.inf)]
        ),
        *(
            (
                "random_kernels",
                [(3, 3)],
                {"mean": mean, "std": std},
                f"mean={mean} and std={std} are not both finite, or std is negative",
            )
            for mean, std in [(math.nan, 0.1), (math.inf, 0.1), (0.0, -0.1), (0.0, math.nan), (0.0, math.inf)]
        ),
        *(
            (
                "random_kernels_any_size",
                [noise, size],
                {"sizes": (3, 5), "std": 0.1},
                f"noise {noise} and size_noise {size} do not hold square kernels and one size per image",
            )
            for noise, size in [((6, 3, 5, 5), ()), ((3, 5, 5), (6,)), ((6, 3, 5, 4), (6,)), ((6, 3, 4, 5), (6,))]
        ),
        *(
            (
                "random_kernels_any_size",
                [(6, 3, 5, 5), (6,)],
                {"sizes": sizes, "std": 0.1},
                f"sizes={sizes} are not odd numbers with 5 as the largest",
            )
            for sizes in [(), (3,), (3, 7), (4, 5), (-1, 5)]
        ),
        (
            "random_kernels_any_size",
            [(6, 3, 0, 0), (6,)],
            {"sizes": (), "std": 0.1},
            "sizes=() are not odd numbers with 0 as the largest",
        ),
        *(
            (
                "random_kernels_any_size",
                [(6, 3, 5, 5), (6,)],
                {"sizes": (3, 5), "std": std},
                f"std={std} is not finite, or negative",
            )
            for std in (-0.1, math.nan, math.inf)
        ),
        *(
            (
                "convolve_each",
                [(2, 3, 4, 6), kernels],
                {},
                f"kernels {kernels} do not hold 3 or 9 squares of odd side for each of images (2, 3, 4, 6)",
            )
            for kernels in [(2, 2, 3, 3), (2, 3, 4, 4), (2, 3, 3, 5), (1, 3, 3, 3), (3, 3, 3), (2, 1, 3, 3)]
        ),
        *(
            ("decolorize", [(3, 4, 6)], {"saturation": value}, f"saturation={value} is not between 0 and 1")
            for value in (-0.1, 1.1, math.nan)
        ),
        *(
            (
                "decolorize",
                [(2, 3, 4, 6)],
                {"saturation": torch.zeros(shape)},
                f"saturation {shape} does not hold one value per image of {(2, 3, 4, 6)}",
            )
            for shape in [(), (1,), (2, 1)]
        ),
    ],
)
def test_invalid_arguments_with_several_tensors_raise_one_clear_sentence(name, shapes, numbers, message):
    block, tensors = getattr(copied("degrade"), name), [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        block(*tensors, **numbers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_of_centers_and_twists_does_not_matter(dtype):
    pictures, centers, twists = seeded(6, 3, 5, 7), (2 * seeded(6, 2) - 1).bfloat16(), (seeded(6) / 4).bfloat16()
    bent = fisheye_at(pictures, centers.to(dtype), twists.to(dtype))
    torch.testing.assert_close(bent, fisheye_at(pictures, centers.float(), twists.float()), rtol=0, atol=0)


def test_noise_of_0_and_of_1_gives_opposite_weights_of_5_3_standard_deviations():
    least = NormalDist().inv_cdf(2**-24)
    assert -5.3 < least < -5.29
    weights = random_kernels(torch.tensor([[0.0, 1 - 2**-24], [0.0, 1.0]]), mean=0.0, std=1.0)
    torch.testing.assert_close(weights, torch.tensor([[least, -least], [least, -least]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 3, 0, 7)])
def test_convolve_each_returns_a_new_tensor_even_for_empty_images(shape):
    pictures = torch.zeros(shape)
    blurred = convolve_each(pictures, torch.zeros(shape[0], 3, 3, 3))
    assert blurred.shape == pictures.shape
    assert blurred is not pictures
