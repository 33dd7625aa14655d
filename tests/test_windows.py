"""Windows of LoMaR: their places in the grid and the patches they contain."""

import re

from mimkit.windows import distinct_anchors, random_anchors, window_patches

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import copied, fast, intervals, rows, seeded, uniforms, uniforms_like
from torch import Tensor


@st.composite
def anchored(draw: st.DrawFn) -> tuple[Tensor, int, dict[str, int]]:
    """Draw windows inside a grid, its height, and the numbers of `window_patches`."""
    (height, window_height), (width, window_width) = draw(intervals(least=1)), draw(intervals(least=1))
    noise = draw(uniforms(2)) * torch.tensor([height - window_height + 1, width - window_width + 1])
    return noise.long(), height, {"width": width, "window_height": window_height, "window_width": window_width}


@st.composite
def random_windows(draw: st.DrawFn) -> tuple[Tensor, dict[str, int]]:
    """Draw noise and sizes for 0 to 3 windows anywhere in a grid."""
    (height, window_height), (width, window_width) = draw(intervals(least=1)), draw(intervals(least=1))
    sizes = {"height": height, "width": width, "window_height": window_height, "window_width": window_width}
    return draw(uniforms(draw(st.integers(0, 3)), 2)), sizes


@st.composite
def distinct_windows(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Draw noise for up to 6 possible first rows and columns, and a valid number of windows."""
    down, across = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    of_rows = draw(uniforms(down))
    of_columns = draw(uniforms_like(torch.empty(*of_rows.shape[:-1], across)))
    return of_rows, of_columns, draw(st.integers(0, min(down, across)))


# The patches of a window


@fast
@given(anchored())
def test_a_window_contains_the_patches_of_its_rectangle(arguments):
    anchors, height, numbers = arguments
    patches = window_patches(anchors, **numbers)
    grid = torch.arange(height * numbers["width"]).view(height, numbers["width"])
    assert patches.shape == (*anchors.shape[:-1], numbers["window_height"] * numbers["window_width"])
    for (top, left), found in zip(rows(anchors).tolist(), rows(patches), strict=True):
        window = grid[top : top + numbers["window_height"], left : left + numbers["window_width"]]
        assert found.tolist() == window.flatten().tolist()


@fast
@given(anchored())
def test_the_patches_of_a_window_are_ascending_and_inside_the_grid(arguments):
    anchors, height, numbers = arguments
    patches = window_patches(anchors, **numbers)
    assert (patches.diff(dim=-1) > 0).all()
    assert ((patches >= 0) & (patches < height * numbers["width"])).all()


@given(st.integers(1, 5), st.integers(1, 5))
def test_a_window_as_large_as_the_grid_contains_all_patches(height, width):
    patches = window_patches(torch.tensor([0, 0]), width=width, window_height=height, window_width=width)
    assert patches.tolist() == list(range(height * width))


# Distinct anchors


def order(noise: Tensor, count: int) -> list[int]:
    """Return the indices of the smallest noise in ascending order; ties keep their order."""
    return sorted(range(len(noise)), key=noise.tolist().__getitem__)[:count]


@fast
@given(distinct_windows())
def test_no_two_windows_share_a_first_row_or_a_first_column(arguments):
    row_noise, column_noise, num_windows = arguments
    anchors = distinct_anchors(row_noise, column_noise, num_windows=num_windows)
    assert anchors.shape == (*row_noise.shape[:-1], num_windows, 2)
    for windows in anchors.reshape(row_noise.shape[:-1].numel(), num_windows, 2):
        for places, noise in zip(windows.T.tolist(), (row_noise, column_noise), strict=True):
            assert len(set(places)) == num_windows
            assert set(places) <= set(range(noise.shape[-1]))


@fast
@given(distinct_windows())
def test_windows_use_rows_and_columns_in_ascending_order_of_their_noise(arguments):
    row_noise, column_noise, num_windows = arguments
    anchors = distinct_anchors(row_noise, column_noise, num_windows=num_windows)
    found = anchors.reshape(row_noise.shape[:-1].numel(), num_windows, 2).tolist()
    pairs = zip(rows(row_noise), rows(column_noise), strict=True)
    expected = [zip(order(down, num_windows), order(across, num_windows), strict=True) for down, across in pairs]
    assert found == [[list(anchor) for anchor in windows] for windows in expected]


@fast
@given(distinct_windows())
def test_fewer_windows_are_a_prefix_of_more_windows(arguments):
    row_noise, column_noise, num_windows = arguments
    all_of_them = min(row_noise.shape[-1], column_noise.shape[-1])
    every = distinct_anchors(row_noise, column_noise, num_windows=all_of_them)
    some = distinct_anchors(row_noise, column_noise, num_windows=num_windows)
    assert some.equal(every[..., :num_windows, :])


def test_each_distinct_window_is_placed_uniformly_at_random():
    anchors = distinct_anchors(seeded(40000, 4), seeded(40000, 3, seed=1), num_windows=3)
    for windows in anchors.unbind(1):
        shares = torch.bincount(windows[:, 0] * 3 + windows[:, 1], minlength=12) / len(anchors)
        torch.testing.assert_close(shares, torch.full((12,), 1 / 12), rtol=0, atol=0.006)


# Independent anchors


@fast
@given(random_windows())
def test_a_random_window_lies_inside_the_grid(arguments):
    noise, sizes = arguments
    anchors = random_anchors(noise, **sizes)
    places = torch.tensor([sizes["height"] - sizes["window_height"], sizes["width"] - sizes["window_width"]])
    assert anchors.shape == noise.shape
    assert ((anchors >= 0) & (anchors <= places)).all()


@fast
@given(random_windows())
def test_every_place_gets_an_equal_share_of_the_noise(arguments):
    noise, sizes = arguments
    down, across = sizes["height"] - sizes["window_height"] + 1, sizes["width"] - sizes["window_width"] + 1
    for (row, column), (top, left) in zip(rows(noise).tolist(), rows(random_anchors(noise, **sizes)), strict=True):
        assert top / down <= row < (top + 1) / down or row == pytest.approx(top / down)
        assert left / across <= column < (left + 1) / across or column == pytest.approx(left / across)


@given(random_windows(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_both_ends_are_reached_and_noise_rounded_to_one_stays_inside(arguments, dtype):
    _, sizes = arguments
    last = [sizes["height"] - sizes["window_height"], sizes["width"] - sizes["window_width"]]
    ends = torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]]).to(
        dtype
    )  # the second row rounds to 1 in half precision
    assert random_anchors(ends, **sizes).tolist() == [[0, 0], last]
    assert random_anchors(torch.ones(1, 2, dtype=dtype), **sizes).tolist() == [last]


def test_noise_of_half_precision_is_multiplied_in_single_precision():
    sizes = {"height": 501, "width": 9, "window_height": 1, "window_width": 1}
    assert random_anchors(torch.tensor([[0.99609375, 0.5]]).bfloat16(), **sizes).tolist() == [[499, 4]]


def test_row_and_column_use_separate_noise():
    sizes = {"height": 9, "width": 6, "window_height": 2, "window_width": 3}
    assert random_anchors(torch.tensor([[0.99, 0.3]]), **sizes).tolist() == [[7, 1]]


def noise(*shape: int) -> Tensor:
    return torch.zeros(shape)


def places(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


GRID = {"height": 4, "width": 6, "window_height": 2, "window_width": 3}
WINDOW = {"width": 6, "window_height": 2, "window_width": 3}


@pytest.mark.parametrize(
    ("name", "tensors", "numbers", "message"),
    [
        (
            "random_anchors",
            [noise(3, 1)],
            GRID,
            "noise of shape (3, 1) does not end in 2: a value for the row and one for the column",
        ),
        *[
            (
                "random_anchors",
                [noise(3, 2)],
                {**GRID, **change},
                "a window of {window_height} × {window_width} does not fit into a grid of {height} × {width}".format(
                    **{**GRID, **change}
                ),
            )
            for change in (
                {"window_height": 5},
                {"window_height": 0},
                {"window_width": 7},
                {"window_width": 0},
                {"height": 1},
                {"width": 2},
            )
        ],
        (
            "distinct_anchors",
            [noise(2, 4), noise(3, 4)],
            {"num_windows": 1},
            "row_noise (2, 4) and column_noise (3, 4) differ in leading axes",
        ),
        (
            "distinct_anchors",
            [noise(8), noise(9)],
            {"num_windows": 9},
            "num_windows=9 in 8 × 9 places is not between 0 and 8",
        ),
        (
            "distinct_anchors",
            [noise(9), noise(8)],
            {"num_windows": 9},
            "num_windows=9 in 9 × 8 places is not between 0 and 8",
        ),
        (
            "distinct_anchors",
            [noise(8), noise(9)],
            {"num_windows": -1},
            "num_windows=-1 in 8 × 9 places is not between 0 and 8",
        ),
        ("window_patches", [places(2, 3)], WINDOW, "anchors of shape (2, 3) do not end in 2: a row and a column"),
        *[
            (
                "window_patches",
                [places(2)],
                {**WINDOW, **change},
                "a window of {window_height} × {window_width} does not fit into a grid of width {width}".format(
                    **{**WINDOW, **change}
                ),
            )
            for change in ({"window_height": 0}, {"window_width": 0}, {"window_width": 7}, {"width": 2})
        ],
    ],
)
def test_invalid_arguments_raise_one_clear_sentence(name, tensors, numbers, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(copied("windows"), name)(*tensors, **numbers)
