"""Targets and losses against plain sums, and what their scale must not matter for."""

import re

from mimkit.losses import band_error, channel_normalised_patches, normalised_patches, squared_error
from mimkit.tokens import patchify

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import channels, copied, fast, images, seeded, uniforms
from torch import Tensor

# PyTorch warns about the variance of nothing when the batch is empty
pytestmark = pytest.mark.filterwarnings("ignore:.*degrees of freedom")


@st.composite
def patches(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Patches of two or more pixels, constant ones too, and their number of channels."""
    c = draw(channels)
    return draw(uniforms(draw(st.integers(0, 4)), draw(st.integers(2, 9)) * c)), c


@st.composite
def lively_patches(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Patches in which no channel is near a constant, and their number of channels."""
    drawn, c = draw(patches())
    ramp = torch.arange(drawn.shape[-1] // c).repeat_interleave(c)
    return drawn / 4 + ramp, c


@fast
@given(patches())
def test_normalised_patches_subtract_the_mean_and_divide_by_the_unbiased_deviation(arguments):
    values, _ = arguments
    target = normalised_patches(values)
    d = values.shape[-1]
    x = values.double()
    centred = x - x.sum(dim=-1, keepdim=True) / d
    variance = (centred**2).sum(dim=-1, keepdim=True) / (d - 1)
    torch.testing.assert_close(target.double(), centred / (variance + 1e-6) ** 0.5, rtol=1e-4, atol=1e-4)


@fast
@given(lively_patches())
def test_channel_normalised_patches_do_so_in_each_channel_alone(arguments):
    values, c = arguments
    target = channel_normalised_patches(values, channels=c)
    pixels = values.shape[-1] // c
    for i in range(c):
        x = values[..., i::c].double()
        centred = x - x.sum(dim=-1, keepdim=True) / pixels
        deviation = ((centred**2).sum(dim=-1, keepdim=True) / (pixels - 1)) ** 0.5
        torch.testing.assert_close(target[..., i::c].double(), centred / (deviation + 1e-6), rtol=1e-4, atol=1e-4)


def test_the_two_small_numbers_of_the_normalisations_stand_where_the_papers_code_has_them():
    # a patch with unbiased variance 1e-6: inside the root it is doubled, outside the deviation grows by a thousandth
    faint = torch.tensor([[-1.0, 0.0, 1.0]]) * 1e-3
    torch.testing.assert_close(normalised_patches(faint), torch.tensor([[-1.0, 0.0, 1.0]]) / 2**0.5)
    channel = channel_normalised_patches(faint, channels=1)
    torch.testing.assert_close(channel, torch.tensor([[-1.0, 0.0, 1.0]]) / 1.001)


@fast
@given(lively_patches(), st.floats(0.5, 3), st.floats(-2, 2))
def test_brightness_and_contrast_do_not_matter_for_normalised_targets(arguments, contrast, brightness):
    values, c = arguments
    changed = contrast * values + brightness
    torch.testing.assert_close(normalised_patches(changed), normalised_patches(values), rtol=1e-4, atol=1e-4)
    # each channel may even have its own
    changed = changed * torch.linspace(1, 2, c).repeat(values.shape[-1] // c)
    torch.testing.assert_close(
        channel_normalised_patches(changed, channels=c),
        channel_normalised_patches(values, channels=c),
        rtol=1e-4,
        atol=1e-4,
    )


@fast
@given(lively_patches())
def test_with_one_channel_the_two_normalisations_agree(arguments):
    values, _ = arguments
    alone = channel_normalised_patches(values, channels=1)
    torch.testing.assert_close(alone, normalised_patches(values), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch", [2, 4])
def test_predicting_zero_costs_one_less_a_share_on_normalised_patches(patch):
    target = normalised_patches(patchify(seeded(2, 3, 8, 12), patch=patch))
    d = 3 * patch**2
    error = squared_error(torch.zeros_like(target), target)
    torch.testing.assert_close(error, torch.full_like(error, (d - 1) / d), rtol=1e-4, atol=0)


@pytest.mark.parametrize("brightness", [0.0, 0.1, 1.0])
def test_a_constant_patch_has_a_finite_target_and_a_finite_gradient(brightness):
    constant = torch.full((2, 4, 12), brightness)
    assert normalised_patches(constant).abs().max() < 1e-3
    prediction = constant.clone().requires_grad_()
    for target in (normalised_patches(constant), channel_normalised_patches(constant, channels=3)):
        assert target.isfinite().all()
        (gradient,) = torch.autograd.grad(squared_error(prediction, target).mean(), prediction)
        assert gradient.isfinite().all()
    (gradient,) = torch.autograd.grad(normalised_patches(prediction).square().sum(), prediction)
    assert gradient.isfinite().all()


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A prediction and a target of the same shape, of no token too."""
    prediction = draw(uniforms(draw(st.integers(0, 4)), draw(st.integers(1, 6))))
    return prediction, seeded(*prediction.shape, seed=draw(st.integers(0, 99)))


@fast
@given(pairs())
def test_squared_error_is_the_mean_over_the_values_of_each_token(arguments):
    prediction, target = arguments
    d = prediction.shape[-1]
    expected = sum((prediction[..., i].double() - target[..., i].double()) ** 2 for i in range(d)) / d
    error = squared_error(prediction, target)
    assert error.shape == prediction.shape[:-1]
    torch.testing.assert_close(error.double(), torch.as_tensor(expected), rtol=1e-5, atol=1e-6)


@fast
@given(pairs())
def test_squared_error_is_symmetric_and_zero_only_for_equal_tokens(arguments):
    prediction, target = arguments
    assert squared_error(prediction, target).equal(squared_error(target, prediction))
    assert not squared_error(prediction, prediction).any()
    assert (squared_error(prediction, target) > 0).equal((prediction != target).any(dim=-1))


@fast
@given(pairs())
def test_the_order_of_the_tokens_does_not_matter_for_their_errors(arguments):
    prediction, target = arguments
    assert squared_error(prediction.flip(-2), target.flip(-2)).flip(-1).equal(squared_error(prediction, target))


@st.composite
def views(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """A prediction and a target picture, and a centre that leaves an even band."""
    prediction = draw(images().filter(lambda x: min(x.shape[-2:]) > 2))
    H, W = prediction.shape[-2:]
    target = seeded(*prediction.shape, seed=draw(st.integers(0, 99)))
    return prediction, target, draw(st.sampled_from(range(H - 2, 0, -2))), draw(st.sampled_from(range(W - 2, 0, -2)))


@fast
@given(views())
def test_the_strips_of_the_band_weighted_by_area_are_all_that_lies_outside_the_centre(arguments):
    prediction, target, inner_H, inner_W = arguments
    c, H, W = prediction.shape[-3:]
    strips = band_error(prediction, target, inner_H=inner_H, inner_W=inner_W)
    rows, columns = (H - inner_H) // 2, (W - inner_W) // 2
    areas = torch.tensor([rows * W, rows * W, columns * inner_H, columns * inner_H])
    outside = torch.ones(H, W)
    outside[rows : H - rows, columns : W - columns] = 0
    squares = (prediction - target).square() * outside
    torch.testing.assert_close((strips * areas).sum(dim=-1), squares.sum(dim=(-3, -2, -1)) / c, rtol=1e-4, atol=1e-5)


@fast
@given(views())
def test_the_strips_of_the_band_are_top_bottom_left_right(arguments):
    prediction, target, inner_H, inner_W = arguments
    c, H, W = prediction.shape[-3:]
    rows, columns = (H - inner_H) // 2, (W - inner_W) // 2
    strips = band_error(prediction, target, inner_H=inner_H, inner_W=inner_W)
    places = [
        [(i, j) for i in range(rows) for j in range(W)],
        [(H - 1 - i, j) for i in range(rows) for j in range(W)],
        [(rows + i, j) for i in range(inner_H) for j in range(columns)],
        [(rows + i, W - 1 - j) for i in range(inner_H) for j in range(columns)],
    ]
    squares = (prediction - target).square()
    for strip, there in zip(strips.unbind(-1), places, strict=True):
        total = torch.stack([squares[..., i, j] for i, j in there]).sum(dim=(0, -1))
        torch.testing.assert_close(strip, total / (c * len(there)), rtol=1e-4, atol=1e-6)


@fast
@given(views())
def test_the_centre_does_not_matter_for_the_band(arguments):
    prediction, target, inner_H, inner_W = arguments
    changed = prediction.clone()
    rows, columns = (changed.shape[-2] - inner_H) // 2, (changed.shape[-1] - inner_W) // 2
    changed[..., rows : rows + inner_H, columns : columns + inner_W] = torch.inf
    result = band_error(changed, target, inner_H=inner_H, inner_W=inner_W)
    assert result.equal(band_error(prediction, target, inner_H=inner_H, inner_W=inner_W))


@fast
@given(views())
def test_flipping_the_view_exchanges_the_strips_of_the_band(arguments):
    prediction, target, inner_H, inner_W = arguments
    strips = band_error(prediction, target, inner_H=inner_H, inner_W=inner_W)
    for axis, order in ((-2, [1, 0, 2, 3]), (-1, [0, 1, 3, 2])):
        flipped = band_error(prediction.flip(axis), target.flip(axis), inner_H=inner_H, inner_W=inner_W)
        torch.testing.assert_close(flipped, strips[..., order])


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("name", "tensors", "numbers", "message"),
    [
        ("normalised_patches", [zeros(4, 1)], {}, "patches of 1 value have no variance"),
        *(
            (
                "channel_normalised_patches",
                [zeros(4, d)],
                {"channels": c},
                f"patches of {d} values are not two or more pixels of {c} channels",
            )
            for d, c in [(7, 3), (3, 3), (6, 0), (6, -3), (0, 3)]
        ),
        (
            "squared_error",
            [zeros(4, 3), zeros(4, 1)],
            {},
            "prediction (4, 3) and target (4, 1) differ in shape",
        ),
        (
            "band_error",
            [zeros(1, 6, 8), zeros(3, 6, 8)],
            {"inner_H": 2, "inner_W": 2},
            "prediction (1, 6, 8) and target (3, 6, 8) differ in shape",
        ),
        *(
            (
                "band_error",
                [zeros(1, 6, 8), zeros(1, 6, 8)],
                {"inner_H": inner_H, "inner_W": inner_W},
                f"a centre of {inner_H} × {inner_W} leaves no even band in a view of 6 × 8 pixels",
            )
            for inner_H, inner_W in [(0, 2), (2, 0), (6, 2), (2, 8), (3, 2), (2, 3), (8, 2), (2, 10)]
        ),
    ],
)
def test_bad_input_gets_one_clear_sentence(name, tensors, numbers, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(copied("losses"), name)(*tensors, **numbers)
