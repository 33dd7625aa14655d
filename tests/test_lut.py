"""LUT: disjoint views of the tokens, two views of an image, heads with batch norm, a teacher that follows."""

import re

from mimkit.masking import disjoint_views, random_tokens

import pytest
import torch
from hypothesis import given
from strategies import copied, fast, noise_and_count, rows, seeded


@fast
@given(noise_and_count())
def test_the_first_view_is_random_tokens(arguments):
    noise, num_visible = arguments
    first, _ = disjoint_views(noise, num_visible=num_visible)
    assert first.equal(random_tokens(noise, num_masked=noise.shape[-1] - num_visible))


@fast
@given(noise_and_count())
def test_no_token_is_visible_in_both_views_and_the_counts_are_fixed(arguments):
    noise, num_visible = arguments
    n = noise.shape[-1]
    first, second = disjoint_views(noise, num_visible=num_visible)
    assert first.shape == second.shape == noise.shape
    assert (first | second).all()
    assert ((~first).sum(dim=-1) == num_visible).all()
    assert ((~second).sum(dim=-1) == min(num_visible, n - num_visible)).all()


@fast
@given(noise_and_count())
def test_both_views_keep_the_smallest_noise_the_first_one_before_the_second(arguments):
    noise, num_visible = arguments
    n = noise.shape[-1]
    views = disjoint_views(noise, num_visible=num_visible)
    for values, first, second in zip(rows(noise), *map(rows, views), strict=True):
        order = sorted(range(n), key=values.tolist().__getitem__)  # equal values in the order they stand in
        assert (~first).nonzero().flatten().tolist() == sorted(order[:num_visible])
        assert (~second).nonzero().flatten().tolist() == sorted(order[num_visible : 2 * num_visible])


def test_every_token_is_as_often_visible_in_the_second_view_as_in_the_first():
    first, second = disjoint_views(seeded(20000, 6), num_visible=2)
    for mask in (first, second):
        torch.testing.assert_close((~mask).float().mean(dim=0), torch.full((6,), 1 / 3), rtol=0, atol=0.02)


@pytest.mark.parametrize("num_visible", [-1, 5])
def test_more_tokens_than_there_are_cannot_be_visible(num_visible):
    sentence = f"num_visible={num_visible} of 4 tokens cannot be visible"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        copied("masking").disjoint_views(torch.zeros(2, 4), num_visible=num_visible)
