"""Views of an image: random crops within their ranges, central ones, and resizing as Pillow does it."""

from common.data import views as view_module
from common.data.embedded import Digits
from common.data.views import CenterCrop, CropFlip, OneShotCrop, one_shot_crop_size, random_crop_box, resize

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import Memory, chance, quoting
from PIL import Image
from torch import Generator

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
    sentence = "scale=(0.5, 0.2) and ratio=(0.75, 1.3333333333333333) must be ranges of positive numbers"
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
    with pytest.raises(ValueError, match=quoting("crop_fraction=1.1 must be above 0 and at most 1")):
        CenterCrop((32, 32), crop_fraction=1.1)


# The crop of the linear probe


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_a_crop_of_the_linear_probe_depends_on_its_chance_alone(H: int, W: int, seed: int) -> None:
    image = torch.arange(H * W).view(1, H, W).remainder(256).to(torch.uint8)
    plain, again, flipped = (
        OneShotCrop((4, 6), (0.08, 1.0), flip)(image, torch.Generator().manual_seed(seed)) for flip in (0.0, 0.0, 1.0)
    )
    assert plain.shape == (1, 4, 6)
    assert torch.equal(plain, again)
    assert torch.equal(plain, flipped.flip(-1))


@given(st.integers(0, 999))
def test_a_crop_of_the_linear_probe_has_the_area_and_the_aspect_asked_for(seed: int) -> None:
    image = (torch.arange(200)[:, None] + torch.arange(100)).to(torch.uint8)[None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view_module, "resize", lambda part, height, width: part)
        view = OneShotCrop((8, 4), (0.25, 0.25), 0.0)(image, torch.Generator().manual_seed(seed))
    _, h, w = view.shape
    assert h * w == pytest.approx(200 * 100 / 4, rel=0.03)
    assert 0.74 < w / h * 2 < 1.36
    top_left, bottom_right = int(view[0, 0, 0]), int(view[0, -1, -1])
    assert (bottom_right - top_left) % 256 == h + w - 2  # one piece of the image


def test_a_crop_of_the_linear_probe_lies_anywhere_down_and_across() -> None:
    rows = torch.arange(200, dtype=torch.uint8).view(1, 200, 1).expand(1, 200, 200)
    corners = torch.empty(2, 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view_module, "resize", lambda part, height, width: part)
        crop = OneShotCrop((8, 8), (0.25, 0.25), 0.0)
        for seed in range(300):
            for axis, image in enumerate((rows, rows.mT)):
                corners[axis, seed] = crop(image, torch.Generator().manual_seed(seed))[0, 0, 0]
    assert abs(float(corners.corrcoef()[0, 1])) < 0.2
    assert ((corners.mean(dim=1) - 50).abs() < 6).all()  # of 0 … 100, for a side of about 100
