"""SimMIM: large cells, the window around each pixel, absolute errors, an encoder that knows relative positions."""

from typing import Any

from mimkit.losses import absolute_error, squared_error, window_normalised
from mimkit.masking import random_cells, random_tokens

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import copied, fast, rows, seeded, uniforms
from torch import Tensor


@st.composite
def cells(draw: st.DrawFn) -> tuple[Tensor, dict[str, int]]:
    """Noise for 0 to 9 cells of up to 3 × 3 patches, and how many tokens to mask."""
    across, down, cell_height, cell_width = (draw(st.integers(least, 3)) for least in (0, 0, 1, 1))
    masked = draw(st.integers(0, across * down))
    sizes = {"height": down * cell_height, "width": across * cell_width}
    sizes |= {"cell_height": cell_height, "cell_width": cell_width}
    return draw(uniforms(across * down)), sizes | {"num_masked": masked * cell_height * cell_width}


@fast
@given(cells())
def test_random_cells_masks_whole_cells_and_exactly_num_masked(arguments: Any):
    noise, sizes = arguments
    mask = random_cells(noise, **sizes)
    assert (mask.sum(dim=-1) == sizes["num_masked"]).all()
    chosen = random_tokens(noise, num_masked=sizes["num_masked"] // (sizes["cell_height"] * sizes["cell_width"]))
    columns = max(1, sizes["width"] // sizes["cell_width"])
    for row, own in zip(rows(mask), rows(chosen), strict=True):
        for place, masked in enumerate(row.tolist()):
            down, across = divmod(place, sizes["width"])
            assert masked == own[down // sizes["cell_height"] * columns + across // sizes["cell_width"]]


@fast
@given(uniforms(12), st.integers(0, 12))
def test_cells_of_one_patch_are_random_tokens(noise: Tensor, num_masked: int):
    mask = random_cells(noise, height=3, width=4, cell_height=1, cell_width=1, num_masked=num_masked)
    assert mask.equal(random_tokens(noise, num_masked=num_masked))


def test_every_cell_is_masked_equally_often():
    mask = random_cells(seeded(6000, 6), height=4, width=9, cell_height=2, cell_width=3, num_masked=24)
    often = mask.float().mean(dim=0)
    assert (often - 4 / 6).abs().max() < 0.03


def in_window(image: Tensor, window: int) -> Tensor:
    """Each pixel brought to the mean and variance of its window, one by one, in double precision."""
    found, reach = torch.zeros_like(image, dtype=torch.float64), window // 2
    H, W = image.shape[-2:]
    for c in range(len(image)):
        for i in range(H):
            for j in range(W):
                around = image[c, max(0, i - reach) : i + reach + 1, max(0, j - reach) : j + reach + 1].double()
                found[c, i, j] = (image[c, i, j] - around.mean()) / (around.var() + 1e-6).sqrt()
    return found


@pytest.mark.parametrize("window", [3, 5, 47])
@pytest.mark.parametrize("shape", [(1, 6, 9), (3, 5, 4), (2, 1, 7), (1, 2, 1)])
def test_a_pixel_is_normalised_by_those_around_it_that_are_in_the_image(shape: tuple[int, ...], window: int):
    image = 3 * seeded(*shape) - 1
    torch.testing.assert_close(
        window_normalised(image, window=window), in_window(image, window).float(), rtol=1e-4, atol=1e-4
    )


def test_brightness_and_contrast_are_not_in_a_windowed_target():
    images = seeded(2, 3, 8, 9)
    torch.testing.assert_close(
        window_normalised(5 * images + 7, window=5), window_normalised(images, window=5), rtol=1e-3, atol=1e-3
    )


def test_channels_and_images_do_not_see_each_other_in_a_window():
    images = seeded(2, 3, 8, 9)
    alone = window_normalised(images[1:, 2:], window=5)
    torch.testing.assert_close(window_normalised(images, window=5)[1:, 2:], alone)


def test_a_flat_image_is_zero_and_a_flat_area_is_small():
    assert (window_normalised(torch.full((1, 9, 9), 0.3), window=3) == 0).all()
    images = torch.where(torch.arange(40) < 30, 2.1, seeded(1, 40, 40))
    assert window_normalised(images, window=5)[..., :28].abs().max() < 1e-2


def test_a_window_that_holds_the_whole_image_is_plain_normalisation():
    image = seeded(3, 4, 6)
    mean, variance = image.mean(dim=(-2, -1), keepdim=True), image.var(dim=(-2, -1), keepdim=True)
    expected = (image - mean) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(window_normalised(image, window=13), expected, rtol=1e-4, atol=1e-4)


@fast
@given(uniforms(4, 6))
def test_the_absolute_error_is_that_of_each_token(target: Tensor):
    error = absolute_error(target + 0.5 * torch.tensor([1.0, -1, 1, -1, 0, 0]), target)
    torch.testing.assert_close(error, torch.full(target.shape[:-1], 2 / 6))
    squared = squared_error(target, torch.zeros_like(target))
    assert (absolute_error(target, torch.zeros_like(target)).square() <= squared + 1e-6).all()  # the mean of squares


def test_the_gradient_of_the_absolute_error_has_no_size():
    prediction = torch.tensor([[3.0, -0.1, 0.0]], requires_grad=True)
    absolute_error(prediction, torch.zeros(1, 3)).sum().backward()
    assert prediction.grad is not None
    assert (3 * prediction.grad).tolist() == [[1, -1, 0]]


GRID: dict[str, Any] = {"height": 4, "width": 6, "cell_height": 2, "cell_width": 3, "num_masked": 12}


@pytest.mark.parametrize(
    ("block", "tensors", "numbers", "sentence"),
    [
        ("random_cells", [seeded(4)], {**GRID, "height": 5}, "a grid of 5 × 6 is not made of cells of 2 × 3"),
        ("random_cells", [seeded(4)], {**GRID, "cell_width": 4}, "a grid of 4 × 6 is not made of cells of 2 × 4"),
        ("random_cells", [seeded(4)], {**GRID, "cell_width": 0}, "a grid of 4 × 6 is not made of cells of 2 × 0"),
        ("random_cells", [seeded(4)], {**GRID, "width": -6}, "a grid of 4 × -6 is not made of cells of 2 × 3"),
        ("random_cells", [seeded(2, 1)], GRID, "noise of shape (2, 1) has not one value for each of 2 × 2 cells"),
        ("random_cells", [seeded(4)], {**GRID, "num_masked": 7}, "num_masked=7 of 24 tokens are not whole cells of 6"),
        (
            "random_cells",
            [seeded(4)],
            {**GRID, "num_masked": 30},
            "num_masked=30 of 24 tokens are not whole cells of 6",
        ),
        (
            "random_cells",
            [seeded(4)],
            {**GRID, "num_masked": -6},
            "num_masked=-6 of 24 tokens are not whole cells of 6",
        ),
        ("absolute_error", [seeded(3, 4), seeded(4)], {}, "prediction (3, 4) and target (4,) differ in shape"),
        (
            "window_normalised",
            [seeded(1, 4, 4)],
            {"window": 4},
            "window=4 is not an odd number of pixels of at least 3",
        ),
        (
            "window_normalised",
            [seeded(1, 4, 4)],
            {"window": 1},
            "window=1 is not an odd number of pixels of at least 3",
        ),
        (
            "window_normalised",
            [seeded(1, 4, 4)],
            {"window": -3},
            "window=-3 is not an odd number of pixels of at least 3",
        ),
        ("window_normalised", [seeded(1, 1, 1)], {"window": 3}, "images of 1 × 1 pixels have no variance"),
        ("window_normalised", [seeded(1, 0, 4)], {"window": 3}, "images of 0 × 4 pixels have no variance"),
    ],
)
def test_bad_input_gets_one_sentence(block: str, tensors: Any, numbers: Any, sentence: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        getattr(copied("masking" if block == "random_cells" else "losses"), block)(*tensors, **numbers)
    assert str(caught.value) == sentence
