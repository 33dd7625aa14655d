"""Mask samplers: the count that always holds, the order of the noise, and how often each token is masked."""

import re

from mimkit.masking import all_but_block, random_tokens

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import copied, fast, intervals, noise_and_count, rows, seeded, uniforms


@fast
@given(noise_and_count())
def test_random_tokens_masks_exactly_num_masked(arguments):
    noise, num_masked = arguments
    mask = random_tokens(noise, num_masked=num_masked)
    assert mask.shape == noise.shape
    assert (mask.sum(dim=-1) == num_masked).all()


@fast
@given(noise_and_count())
def test_random_tokens_masks_the_largest_noise_and_equal_values_count_from_the_left(arguments):
    noise, num_masked = arguments
    n = noise.shape[-1]
    mask = random_tokens(noise, num_masked=num_masked)
    for values, masked in zip(rows(noise), rows(mask), strict=True):
        order = sorted(range(n), key=values.tolist().__getitem__)
        assert masked.nonzero().flatten().tolist() == sorted(order[n - num_masked :])


@fast
@given(noise_and_count())
def test_masking_more_tokens_keeps_the_masked_ones_masked(arguments):
    noise, num_masked = arguments
    more = random_tokens(noise, num_masked=noise.shape[-1] - num_masked // 2)
    fewer = random_tokens(noise, num_masked=(noise.shape[-1] - num_masked // 2) // 2)
    assert (more | ~fewer).all()


@fast
@given(st.permutations(range(7)), st.integers(0, 7))
def test_shuffling_different_noise_shuffles_the_mask(order, num_masked):
    noise = torch.arange(7) / 7
    shuffled = random_tokens(noise[list(order)], num_masked=num_masked)
    assert shuffled.equal(random_tokens(noise, num_masked=num_masked)[list(order)])


def test_random_tokens_masks_every_pair_equally_often():
    draws, n, num_masked = 30_000, 6, 2
    mask = random_tokens(seeded(draws, n), num_masked=num_masked).double()
    together = mask.T @ mask / draws
    once, twice = num_masked / n, num_masked * (num_masked - 1) / (n * (n - 1))
    expected = torch.full((n, n), twice, dtype=torch.float64).fill_diagonal_(once)
    # 4.5 standard deviations
    assert (together - expected).abs().div((expected * (1 - expected) / draws).sqrt()).max() < 4.5


@st.composite
def blocks(draw: st.DrawFn) -> tuple[torch.Tensor, dict[str, int]]:
    """Noise, and a block that fits into a grid; either may be empty."""
    (height, block_height), (width, block_width) = draw(intervals(least=0)), draw(intervals(least=0))
    grid = {"height": height, "width": width, "block_height": block_height, "block_width": block_width}
    return draw(uniforms(2)), grid


@fast
@given(blocks())
def test_all_but_block_leaves_one_block_visible_where_the_noise_says(arguments):
    noise, grid = arguments
    height, width, block_height, block_width = grid.values()
    mask = all_but_block(noise, **grid)
    assert mask.shape == (*noise.shape[:-1], height * width)
    assert (mask.sum(dim=-1) == height * width - block_height * block_width).all()
    for (u, v), row in zip(rows(noise).tolist(), rows(mask), strict=True):
        top, left = int(u * (height - block_height + 1)), int(v * (width - block_width + 1))
        expected = torch.ones(height, width, dtype=torch.bool)
        expected[top : top + block_height, left : left + block_width] = False
        assert row.equal(expected.flatten())


@fast
@given(blocks())
def test_the_largest_noise_puts_the_block_into_the_last_corner(arguments):
    _, grid = arguments
    last = all_but_block(torch.full((2,), 1 - 2**-24), **grid)
    # 1 is what the largest noise becomes in bfloat16
    assert all_but_block(torch.ones(2, dtype=torch.bfloat16), **grid).equal(last)
    assert all_but_block(torch.zeros(2), **grid).equal(last.flip(0))


def test_the_place_of_the_block_is_not_rounded_in_bfloat16():
    noise = torch.arange(256).view(-1, 1).expand(-1, 2) / 256
    grid = {"height": 1, "width": 200, "block_height": 1, "block_width": 1}
    assert all_but_block(noise.bfloat16(), **grid).equal(all_but_block(noise, **grid))


def test_all_but_block_leaves_every_place_equally_often():
    draws, height, width = 20_000, 5, 4
    visible = ~all_but_block(seeded(draws, 2), height=height, width=width, block_height=2, block_width=3)
    # the first visible token is the top left corner of the block: 4 × 2 places
    counts = visible.int().argmax(dim=-1).bincount(minlength=height * width).view(height, width)
    places = counts[:4, :2].double()
    assert places.sum() == draws
    # 4.5 standard deviations
    assert (places - draws / 8).abs().max() < 4.5 * (draws * 1 / 8 * 7 / 8) ** 0.5


GRID = {"height": 2, "width": 3, "block_height": 1, "block_width": 1}


@pytest.mark.parametrize(
    ("name", "shape", "numbers", "message"),
    [
        ("random_tokens", (4,), {"num_masked": 5}, "num_masked=5 of 4 tokens cannot be masked"),
        ("random_tokens", (4,), {"num_masked": -1}, "num_masked=-1 of 4 tokens cannot be masked"),
        (
            "all_but_block",
            (4, 3),
            GRID,
            "noise of shape (4, 3) does not end in 2: one value for the row, one for the column",
        ),
        ("all_but_block", (2,), GRID | {"block_height": 3}, "a block of 3 × 1 does not fit into a grid of 2 × 3"),
        ("all_but_block", (2,), GRID | {"block_height": -1}, "a block of -1 × 1 does not fit into a grid of 2 × 3"),
        ("all_but_block", (2,), GRID | {"block_width": 4}, "a block of 1 × 4 does not fit into a grid of 2 × 3"),
        ("all_but_block", (2,), GRID | {"block_width": -1}, "a block of 1 × -1 does not fit into a grid of 2 × 3"),
    ],
)
def test_bad_input_gets_one_clear_sentence(name, shape, numbers, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(copied("masking"), name)(torch.zeros(shape), **numbers)
