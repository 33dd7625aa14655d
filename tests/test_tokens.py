"""Tokens: inverse operations undo each other, and results equal those of explicit loops."""

import re

from mimkit.tokens import patchify, put, split, take, take_patches, unpatchify

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from strategies import channels, copied, fast, images, noise_and_count, rows, seeded, uniforms
from torch import Tensor


@st.composite
def images_to_cut(draw: st.DrawFn) -> tuple[Tensor, int, int, int]:
    """Draw images, and the height, width and patch of the grid they are cut into."""
    height, width, patch = draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 3))
    return draw(uniforms(draw(channels), height * patch, width * patch)), height, width, patch


@st.composite
def tokens_and_indices(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draw tokens, and distinct indices for each row in any order."""
    n, d = draw(st.integers(0, 6)), draw(st.integers(0, 3))
    tokens = draw(uniforms(n, d))
    order = seeded(*tokens.shape[:-1], seed=draw(st.integers(0, 99))).argsort(dim=-1)
    return tokens, order[..., : draw(st.integers(0, n))]


@st.composite
def patches_to_take(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Draw images of some dtype, indices of up to 5 of their patches, possibly repeated, and the side of a patch."""
    pictures, height, width, patch = draw(images_to_cut())
    dtype = draw(st.sampled_from([torch.uint8, torch.int64, torch.bool, torch.float32, torch.bfloat16, torch.float64]))
    count = draw(st.integers(0, 5 if height * width else 0))
    indices = seeded(*pictures.shape[:-3], count, seed=draw(st.integers(0, 99))) * height * width
    return (255 * pictures).to(dtype), indices.long(), patch


@fast
@given(images_to_cut())
def test_the_values_of_a_patch_are_ordered_by_row_then_column_then_channel(arguments):
    pictures, height, width, patch = arguments
    patches = patchify(pictures, patch=patch)
    c = pictures.shape[-3]
    assert patches.shape == (*pictures.shape[:-3], height * width, patch * patch * c)
    for i in range(height):
        for j in range(width):
            for p in range(patch):
                for q in range(patch):
                    values = patches[..., i * width + j, (p * patch + q) * c : (p * patch + q + 1) * c]
                    assert values.equal(pictures[..., i * patch + p, j * patch + q])


@fast
@given(images_to_cut())
def test_unpatchify_undoes_patchify(arguments):
    pictures, height, width, patch = arguments
    patches = patchify(pictures, patch=patch)
    again = unpatchify(patches, height=height, width=width, patch=patch)
    assert again.equal(pictures)
    assert patchify(again, patch=patch).equal(patches)


@fast
@given(images())
def test_patches_of_one_pixel_are_the_pixels(pictures):
    assert patchify(pictures, patch=1).equal(pictures.flatten(-2).mT)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.bfloat16, torch.float64])
def test_patches_keep_the_dtype_of_the_images(dtype):
    pictures = (seeded(2, 3, 4, 6) * 9).to(dtype)
    patches = patchify(pictures, patch=2)
    assert patches.dtype == dtype
    assert unpatchify(patches, height=2, width=3, patch=2).equal(pictures)


def test_a_convolutional_patch_embedding_is_a_linear_map_of_the_patches():
    pictures, weight = seeded(2, 3, 4, 6), seeded(5, 3, 2, 2, seed=1)
    convolved = F.conv2d(pictures, weight, stride=2).flatten(-2).mT
    linear = F.linear(patchify(pictures, patch=2), rearrange(weight, "d c p q -> d (p q c)"))
    torch.testing.assert_close(linear, convolved)


@fast
@given(noise_and_count())
def test_split_returns_each_token_once_in_ascending_order(arguments):
    noise, num_masked = arguments
    n = noise.shape[-1]
    mask = noise.argsort(dim=-1, stable=True) < num_masked
    visible, masked = split(mask, num_masked=num_masked)
    assert visible.shape[-1] == n - num_masked
    assert masked.shape[-1] == num_masked
    for row, seen, hidden in zip(rows(mask), rows(visible), rows(masked), strict=True):
        assert seen.tolist() == [i for i in range(n) if not row[i]]
        assert hidden.tolist() == [i for i in range(n) if row[i]]


@fast
@given(tokens_and_indices())
def test_take_reads_each_row_at_its_own_indices(arguments):
    tokens, indices = arguments
    taken = take(tokens, indices)
    assert taken.shape == (*indices.shape, tokens.shape[-1])
    for place in torch.cartesian_prod(*map(torch.arange, (*indices.shape, 1))).tolist():
        *batch, k, _ = place
        assert taken[(*batch, k)].equal(tokens[(*batch, int(indices[(*batch, k)]))])


@fast
@given(tokens_and_indices())
def test_put_undoes_take(arguments):
    tokens, indices = arguments
    assert put(take(tokens, indices), indices, tokens).equal(tokens)


@fast
@given(tokens_and_indices())
def test_put_writes_the_tokens_and_leaves_the_others(arguments):
    tokens, indices = arguments
    written = take(tokens, indices) + 2
    result = put(written, indices, tokens)
    assert take(result, indices).equal(written)
    assert (result != tokens).any(dim=-1).sum() == (indices.numel() if tokens.shape[-1] else 0)


@fast
@given(noise_and_count())
def test_putting_back_visible_and_masked_tokens_restores_all_tokens(arguments):
    noise, num_masked = arguments
    tokens = torch.stack([noise, -noise], dim=-1)
    visible, masked = split(noise.argsort(dim=-1, stable=True) < num_masked, num_masked=num_masked)
    half = put(take(tokens, visible), visible, torch.zeros_like(tokens))
    assert put(take(tokens, masked), masked, half).equal(tokens)


def test_take_may_repeat_a_token():
    assert take(torch.tensor([[1], [2]]), torch.tensor([1, 1, 0])).tolist() == [[2], [2], [1]]


@fast
@given(patches_to_take())
def test_take_patches_equals_take_after_patchify(arguments):
    pictures, indices, patch = arguments
    patches = take_patches(pictures, indices, patch=patch)
    assert patches.dtype == pictures.dtype
    assert patches.equal(take(patchify(pictures, patch=patch), indices))


@fast
@given(images_to_cut())
def test_taking_all_patches_in_raster_order_equals_patchify(arguments):
    pictures, height, width, patch = arguments
    everywhere = torch.arange(height * width).expand(*pictures.shape[:-3], -1)
    assert take_patches(pictures, everywhere, patch=patch).equal(patchify(pictures, patch=patch))


@fast
@given(patches_to_take())
def test_pixels_of_other_patches_are_not_read_and_get_no_gradient(arguments):
    pictures, indices, patch = arguments
    pictures = pictures.float()
    (H, W), n = pictures.shape[-2:], pictures.shape[-2:].numel() // patch**2
    taken = (indices.unsqueeze(-1) == torch.arange(n)).sum(dim=-2)  # how many times each patch is taken
    values = taken.unsqueeze(-1).expand(*taken.shape, patch**2 * pictures.shape[-3])
    times = unpatchify(values, height=H // patch, width=W // patch, patch=patch)
    broken = pictures.masked_fill(times == 0, torch.nan).requires_grad_()
    patches = take_patches(broken, indices, patch=patch)
    assert patches.equal(take_patches(pictures, indices, patch=patch))
    patches.sum().backward()
    assert broken.grad is not None
    assert broken.grad.equal(times.float())


def test_gradients_of_take_and_put_reach_only_their_tokens():
    tokens, into = seeded(3, 2).requires_grad_(), seeded(4, 2).requires_grad_()
    put(take(tokens, torch.tensor([2, 0])), torch.tensor([3, 1]), into).sum().backward()
    assert tokens.grad is not None
    assert into.grad is not None
    assert tokens.grad.tolist() == [[1, 1], [0, 0], [1, 1]]
    assert into.grad.tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def places(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


@pytest.mark.parametrize(
    ("name", "tensors", "numbers", "message"),
    [
        ("patchify", [zeros(1, 3, 4)], {"patch": 2}, "images of 3 × 4 pixels cannot be cut into patches of 2 × 2"),
        ("patchify", [zeros(1, 4, 3)], {"patch": 2}, "images of 4 × 3 pixels cannot be cut into patches of 2 × 2"),
        ("patchify", [zeros(1, 4, 4)], {"patch": 0}, "images of 4 × 4 pixels cannot be cut into patches of 0 × 0"),
        (
            "unpatchify",
            [zeros(5, 4)],
            {"height": 2, "width": 3, "patch": 2},
            "5 patches do not fill a grid of 2 × 3",
        ),
        (
            "unpatchify",
            [zeros(6, 4)],
            {"height": -2, "width": -3, "patch": 2},
            "6 patches do not fill a grid of -2 × -3",
        ),
        (
            "unpatchify",
            [zeros(6, 6)],
            {"height": 2, "width": 3, "patch": 2},
            "patches of 6 values do not divide into 2 × 2 pixels",
        ),
        (
            "unpatchify",
            [zeros(6, 5)],
            {"height": 2, "width": 3, "patch": 0},
            "patches of 5 values do not divide into 0 × 0 pixels",
        ),
        ("split", [zeros(4).bool()], {"num_masked": 5}, "num_masked=5 of 4 tokens cannot be masked"),
        ("split", [zeros(4).bool()], {"num_masked": -1}, "num_masked=-1 of 4 tokens cannot be masked"),
        (
            "take",
            [zeros(2, 3, 4), places(3, 1)],
            {},
            "tokens (2, 3, 4) and indices (3, 1) have different leading axes",
        ),
        (
            "take",
            [zeros(2, 3, 4), places(1)],
            {},
            "tokens (2, 3, 4) and indices (1,) have different leading axes",
        ),
        *[
            (
                "take_patches",
                [zeros(1, *size), places(3)],
                {"patch": patch},
                f"images of {size[0]} × {size[1]} pixels cannot be cut into patches of {patch} × {patch}",
            )
            for size, patch in (((3, 4), 2), ((4, 3), 2), ((4, 4), 0), ((4, 4), -2))
        ],
        *[
            (
                "take_patches",
                [zeros(2, 1, 4, 4), places(*shape)],
                {"patch": 2},
                f"images (2, 1, 4, 4) and indices {shape} have different leading axes",
            )
            for shape in ((3, 1), (1,))
        ],
        (
            "put",
            [zeros(2, 1, 4), places(3, 1), zeros(3, 3, 4)],
            {},
            "tokens (2, 1, 4) and indices (3, 1) have different leading axes",
        ),
        (
            "put",
            [zeros(2, 1, 4), places(2, 1), zeros(3, 3, 4)],
            {},
            "tokens (3, 3, 4) and indices (2, 1) have different leading axes",
        ),
        (
            "put",
            [zeros(2, 4), places(1), zeros(3, 4)],
            {},
            "tokens (2, 4) cannot be put at indices (1,) of (3, 4)",
        ),
        (
            "put",
            [zeros(1, 3), places(1), zeros(3, 4)],
            {},
            "tokens (1, 3) cannot be put at indices (1,) of (3, 4)",
        ),
    ],
)
def test_invalid_arguments_raise_one_clear_sentence(name, tensors, numbers, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(copied("tokens"), name)(*tensors, **numbers)


@pytest.mark.parametrize(("height", "width"), [(-1, 0), (0, -1), (-2, 0)])
def test_an_empty_grid_with_a_negative_side_raises_one_clear_sentence(height, width):
    with pytest.raises(ValueError, match=f"^0 patches do not fill a grid of {height} × {width}$"):
        copied("tokens").unpatchify(zeros(0, 4), height=height, width=width, patch=2)
