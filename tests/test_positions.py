"""Position tables against their formulas, and what a change of grid must keep."""

import math
import re

from mimkit.positions import resize_table, sincos, sinusoid

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import copied, fast, seeded, uniforms
from torch import Tensor

sides = st.integers(0, 5)
positive_sides = st.integers(1, 5)


@fast
@given(sides, sides, st.integers(1, 4))
def test_sincos_follows_its_formula_with_the_column_first(height, width, quarter):
    table = sincos(height=height, width=width, dim=4 * quarter)
    omega = [10000 ** (-k / quarter) for k in range(quarter)]
    expected = [
        [wave(t * w) for t in (column, row) for wave in (math.sin, math.cos) for w in omega]
        for row in range(height)
        for column in range(width)
    ]
    torch.testing.assert_close(table, torch.tensor(expected).reshape(-1, 4 * quarter))


@fast
@given(positive_sides, positive_sides)
def test_the_first_half_of_sincos_tells_the_column_and_the_second_the_row(height, width):
    table = sincos(height=height, width=width, dim=8).view(height, width, 8)
    assert (table[..., :4] == table[:1, :, :4]).all()
    assert (table[..., 4:] == table[:, :1, 4:]).all()
    assert len(table.view(-1, 8).unique(dim=0)) == height * width


@fast
@given(sides, sides, st.integers(1, 5))
def test_sinusoid_follows_its_formula(height, width, half):
    table = sinusoid(height=height, width=width, dim=2 * half)
    expected = [
        [wave(n / 10000 ** (i / half)) for i in range(half) for wave in (math.sin, math.cos)]
        for n in range(height * width)
    ]
    torch.testing.assert_close(table, torch.tensor(expected).reshape(-1, 2 * half))


@fast
@given(sides, sides)
def test_sinusoid_knows_nothing_of_rows(height, width):
    assert sinusoid(height=height, width=width, dim=6).equal(sinusoid(height=1, width=height * width, dim=6))


def test_tables_are_float32_and_exact_far_from_the_origin():
    # in float32 the angle 49 999 · ω would already be wrong in the third digit
    for make in (sincos, sinusoid):
        table = make(height=1, width=50_000, dim=8)
        assert table.dtype == torch.float32
    angle = 49_999 * 10000**-0.5
    torch.testing.assert_close(sincos(height=1, width=50_000, dim=8)[-1, 1].item(), math.sin(angle), rtol=0, atol=1e-7)
    angle = 49_999 * 10000**-0.25
    torch.testing.assert_close(
        sinusoid(height=1, width=50_000, dim=8)[-1, 2].item(), math.sin(angle), rtol=0, atol=1e-7
    )


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, dict[str, int]]:
    """A table and its old and new grid."""
    grid = {name: draw(positive_sides) for name in ("height", "width", "new_height", "new_width")}
    return draw(uniforms(grid["height"] * grid["width"], draw(st.integers(1, 3)))), grid


def bicubic(old: int, new: int) -> Tensor:
    """Weights of `old` samples in each of `new` ones: Keys' kernel with A = −0.75, edges repeated."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            x, a = abs(centre - j), -0.75
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(j, 0), old - 1)] += near if x <= 1 else far
    return weights


@fast
@given(tables())
def test_resize_table_is_a_bicubic_resampling_of_rows_and_columns(arguments):
    table, grid = arguments
    rows, columns = bicubic(grid["height"], grid["new_height"]), bicubic(grid["width"], grid["new_width"])
    expected = (torch.kron(rows, columns) @ table.double()).float()
    torch.testing.assert_close(resize_table(table, **grid), expected, rtol=1e-4, atol=1e-5)


@fast
@given(tables())
def test_resizing_to_the_same_grid_gives_a_copy(arguments):
    table, grid = arguments
    height, width = grid["height"], grid["width"]
    copy = resize_table(table, height=height, width=width, new_height=height, new_width=width)
    assert copy.equal(table)
    assert not copy.numel() or copy.data_ptr() != table.data_ptr()


@fast
@given(tables())
def test_resizing_commutes_with_exchanging_rows_and_columns(arguments):
    table, grid = arguments
    height, width, new_height, new_width = grid.values()
    turned = table.unflatten(-2, (height, width)).transpose(-3, -2).flatten(-3, -2)
    result = resize_table(turned, height=width, width=height, new_height=new_width, new_width=new_height)
    result = result.unflatten(-2, (new_width, new_height)).transpose(-3, -2).flatten(-3, -2)
    torch.testing.assert_close(result, resize_table(table, **grid))


def test_resize_table_computes_bfloat16_in_float32():
    table = seeded(12, 4).bfloat16()
    grid = {"height": 3, "width": 4, "new_height": 5, "new_width": 2}
    assert resize_table(table, **grid).equal(resize_table(table.float(), **grid).bfloat16())


GRID = {"height": 2, "width": 3, "new_height": 1, "new_width": 1}


@pytest.mark.parametrize(
    ("name", "tensors", "numbers", "message"),
    [
        *(
            ("sincos", [], {"height": 1, "width": 1, "dim": dim}, f"dim={dim} is not a positive multiple of 4: {why}")
            for dim in (0, -4, 6)
            for why in ["sine and cosine, of row and column"]
        ),
        *(
            ("sinusoid", [], {"height": 1, "width": 1, "dim": dim}, f"dim={dim} is not a positive even number: {why}")
            for dim in (0, -2, 3)
            for why in ["sine and cosine of each angle"]
        ),
        *(
            (name, [], {"height": height, "width": width, "dim": 4}, f"a grid of {height} × {width} patches {why}")
            for name in ("sincos", "sinusoid")
            for height, width in [(-1, 2), (2, -1)]
            for why in ["does not exist"]
        ),
        ("resize_table", [torch.zeros(5, 2)], GRID, "a table of 5 rows is not one of a grid of 2 × 3"),
        (
            "resize_table",
            [torch.zeros(6, 2)],
            GRID | {"new_height": 0},
            "a table cannot be resized from 2 × 3 to 0 × 1",
        ),
        (
            "resize_table",
            [torch.zeros(6, 2)],
            GRID | {"new_width": 0},
            "a table cannot be resized from 2 × 3 to 1 × 0",
        ),
        (
            "resize_table",
            [torch.zeros(0, 2)],
            GRID | {"height": 0},
            "a table cannot be resized from 0 × 3 to 1 × 1",
        ),
        (
            "resize_table",
            [torch.zeros(0, 2)],
            GRID | {"width": 0},
            "a table cannot be resized from 2 × 0 to 1 × 1",
        ),
    ],
)
def test_bad_input_gets_one_clear_sentence(name, tensors, numbers, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(copied("positions"), name)(*tensors, **numbers)
