"""Targets and losses against explicit sums, and the transformations they are invariant to."""

import itertools
import math
import re
from functools import partial

from mimkit import losses
from mimkit.losses import (
    absolute_error,
    band_error,
    channel_normalized_patches,
    cosine_distance,
    normalized_patches,
    ranking_loss,
    soft_cross_entropy,
    squared_error,
    window_normalized,
)
from mimkit.tokens import patchify

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import channels, copied, fast, images, rows, seeded, uniforms, uniforms_like
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# PyTorch warns about the variance of an empty batch
pytestmark = pytest.mark.filterwarnings("ignore:.*degrees of freedom")


@st.composite
def patches(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Draw patches of two or more pixels, possibly constant, and their number of channels."""
    c = draw(channels)
    return draw(uniforms(draw(st.integers(0, 4)), draw(st.integers(2, 9)) * c)), c


@st.composite
def varied_patches(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Draw patches without nearly constant channels, and their number of channels."""
    drawn, c = draw(patches())
    ramp = torch.arange(drawn.shape[-1] // c).repeat_interleave(c)
    return drawn / 4 + ramp, c


@fast
@given(patches())
def test_normalized_patches_subtract_the_mean_and_divide_by_the_unbiased_deviation(arguments):
    values, _ = arguments
    target = normalized_patches(values)
    d = values.shape[-1]
    x = values.double()
    centered = x - x.sum(dim=-1, keepdim=True) / d
    variance = (centered**2).sum(dim=-1, keepdim=True) / (d - 1)
    torch.testing.assert_close(target.double(), centered / (variance + 1e-6) ** 0.5, rtol=1e-4, atol=1e-4)


@fast
@given(varied_patches())
def test_channel_normalized_patches_do_so_separately_for_each_channel(arguments):
    values, c = arguments
    target = channel_normalized_patches(values, channels=c)
    pixels = values.shape[-1] // c
    for i in range(c):
        x = values[..., i::c].double()
        centered = x - x.sum(dim=-1, keepdim=True) / pixels
        deviation = ((centered**2).sum(dim=-1, keepdim=True) / (pixels - 1)) ** 0.5
        torch.testing.assert_close(target[..., i::c].double(), centered / (deviation + 1e-6), rtol=1e-4, atol=1e-4)


def test_each_normalization_adds_its_epsilon_where_the_published_code_does():
    # for a variance of 1e-6, epsilon doubles it inside the root, or adds a thousandth to the deviation outside
    faint = torch.tensor([[-1.0, 0.0, 1.0]]) * 1e-3
    torch.testing.assert_close(normalized_patches(faint), torch.tensor([[-1.0, 0.0, 1.0]]) / 2**0.5)
    channel = channel_normalized_patches(faint, channels=1)
    torch.testing.assert_close(channel, torch.tensor([[-1.0, 0.0, 1.0]]) / 1.001)


@fast
@given(varied_patches(), st.floats(0.5, 3), st.floats(-2, 2))
def test_normalized_targets_are_invariant_to_brightness_and_contrast(arguments, contrast, brightness):
    values, c = arguments
    changed = contrast * values + brightness
    torch.testing.assert_close(normalized_patches(changed), normalized_patches(values), rtol=1e-4, atol=1e-4)
    # even to a separate contrast for each channel
    changed = changed * torch.linspace(1, 2, c).repeat(values.shape[-1] // c)
    torch.testing.assert_close(
        channel_normalized_patches(changed, channels=c),
        channel_normalized_patches(values, channels=c),
        rtol=1e-4,
        atol=1e-4,
    )


@fast
@given(varied_patches())
def test_for_one_channel_both_normalizations_agree(arguments):
    values, _ = arguments
    alone = channel_normalized_patches(values, channels=1)
    torch.testing.assert_close(alone, normalized_patches(values), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch", [2, 4])
def test_predicting_zero_for_normalized_patches_has_a_loss_of_one_minus_one_over_d(patch):
    target = normalized_patches(patchify(seeded(2, 3, 8, 12), patch=patch))
    d = 3 * patch**2
    error = squared_error(torch.zeros_like(target), target)
    torch.testing.assert_close(error, torch.full_like(error, (d - 1) / d), rtol=1e-4, atol=0)


@pytest.mark.parametrize("brightness", [0.0, 0.1, 1.0])
def test_a_constant_patch_has_a_finite_target_and_a_finite_gradient(brightness):
    constant = torch.full((2, 4, 12), brightness)
    assert normalized_patches(constant).abs().max() < 1e-3
    prediction = constant.clone().requires_grad_()
    for target in (normalized_patches(constant), channel_normalized_patches(constant, channels=3)):
        assert target.isfinite().all()
        (gradient,) = torch.autograd.grad(squared_error(prediction, target).mean(), prediction)
        assert gradient.isfinite().all()
    (gradient,) = torch.autograd.grad(normalized_patches(prediction).square().sum(), prediction)
    assert gradient.isfinite().all()


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draw a prediction and a target of the same shape, possibly without tokens."""
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
def test_squared_error_is_permutation_equivariant(arguments):
    prediction, target = arguments
    assert squared_error(prediction.flip(-2), target.flip(-2)).flip(-1).equal(squared_error(prediction, target))


@st.composite
def views(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """Draw prediction and target images, and a center with equal margins."""
    prediction = draw(images().filter(lambda x: min(x.shape[-2:]) > 2))
    H, W = prediction.shape[-2:]
    target = seeded(*prediction.shape, seed=draw(st.integers(0, 99)))
    return prediction, target, draw(st.sampled_from(range(H - 2, 0, -2))), draw(st.sampled_from(range(W - 2, 0, -2)))


@fast
@given(views())
def test_the_strips_of_the_band_weighted_by_area_sum_to_the_error_outside_the_center(arguments):
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
def test_band_error_does_not_depend_on_the_center(arguments):
    prediction, target, inner_H, inner_W = arguments
    changed = prediction.clone()
    rows, columns = (changed.shape[-2] - inner_H) // 2, (changed.shape[-1] - inner_W) // 2
    changed[..., rows : rows + inner_H, columns : columns + inner_W] = torch.inf
    result = band_error(changed, target, inner_H=inner_H, inner_W=inner_W)
    assert result.equal(band_error(prediction, target, inner_H=inner_H, inner_W=inner_W))


@fast
@given(views())
def test_flipping_the_view_swaps_opposite_strips_of_the_band(arguments):
    prediction, target, inner_H, inner_W = arguments
    strips = band_error(prediction, target, inner_H=inner_H, inner_W=inner_W)
    for axis, order in ((-2, [1, 0, 2, 3]), (-1, [0, 1, 3, 2])):
        flipped = band_error(prediction.flip(axis), target.flip(axis), inner_H=inner_H, inner_W=inner_W)
        torch.testing.assert_close(flipped, strips[..., order])


lengths = st.sampled_from([1e-6, 0.1, 1.0, 1e6])


@st.composite
def features(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draw features of 0 to 4 tokens and their targets, including zeros and equal vectors."""
    prediction = 4 * draw(uniforms(draw(st.integers(0, 4)), draw(st.integers(1, 6)))) - 2
    return prediction, 4 * draw(uniforms_like(prediction)) - 2


@fast
@given(features())
def test_cosine_distance_is_two_minus_two_cosines_and_lies_between_0_and_4(arguments):
    prediction, target = arguments
    distance = cosine_distance(prediction, target)
    assert distance.shape == prediction.shape[:-1]
    assert ((distance >= -1e-5) & (distance <= 4 + 1e-5)).all()
    p, t = prediction.double(), target.double()
    lengths = (p.square().sum(dim=-1) * t.square().sum(dim=-1)).sqrt()
    expected = 2 - 2 * (p * t).sum(dim=-1) / lengths
    torch.testing.assert_close(distance[lengths > 0].double(), expected[lengths > 0], rtol=1e-5, atol=1e-5)


@fast
@given(features(), lengths, lengths)
def test_cosine_distance_does_not_depend_on_the_norms_of_the_features(arguments, by, target_by):
    prediction, target = arguments
    longer = cosine_distance(by * prediction, target_by * target)
    torch.testing.assert_close(longer, cosine_distance(prediction, target), rtol=1e-4, atol=1e-5)


@fast
@given(features())
def test_cosine_distance_is_symmetric_0_in_the_same_direction_and_4_in_the_opposite_one(arguments):
    prediction, target = arguments
    assert cosine_distance(prediction, target).equal(cosine_distance(target, prediction))
    turned = 2 * prediction.any(dim=-1).float()  # a zero vector has no direction
    torch.testing.assert_close(cosine_distance(prediction, 3 * prediction), 2 - turned, rtol=0, atol=1e-6)
    torch.testing.assert_close(cosine_distance(prediction, -3 * prediction), 2 + turned)


def test_a_zero_vector_has_a_finite_cosine_distance_and_a_finite_gradient():
    prediction, target = torch.zeros(3, 2, requires_grad=True), torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 4.0]])
    distance = cosine_distance(prediction, target)
    torch.testing.assert_close(distance, torch.tensor([2.0, 2.0, 2.0]))
    (gradient,) = torch.autograd.grad(distance.sum(), prediction)
    assert gradient.isfinite().all()


@st.composite
def classified(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draw logits of 0 to 4 tokens, and targets whose rows have any sum, including 0."""
    logits = 20 * draw(uniforms(draw(st.integers(0, 4)), draw(st.integers(1, 6)))) - 10
    return logits, draw(uniforms_like(logits))


@fast
@given(classified())
def test_soft_cross_entropy_is_minus_the_sum_of_target_times_log_softmax(arguments):
    logits, target = arguments
    error = soft_cross_entropy(logits, target)
    assert error.shape == logits.shape[:-1]
    probabilities = logits.double().exp() / logits.double().exp().sum(dim=-1, keepdim=True)
    expected = -(target * probabilities.log()).sum(dim=-1)
    torch.testing.assert_close(error.double(), expected, rtol=1e-5, atol=1e-5)


@fast
@given(classified(), st.data())
def test_for_one_hot_targets_it_is_the_cross_entropy(arguments, data):
    logits, _ = arguments
    c = logits.shape[-1]
    labels = (c * data.draw(uniforms_like(logits[..., 0]))).long()
    expected = F.cross_entropy(logits.reshape(-1, c), labels.reshape(-1), reduction="none").view(labels.shape)
    torch.testing.assert_close(soft_cross_entropy(logits, F.one_hot(labels, c).float()), expected, rtol=1e-5, atol=1e-5)


@fast
@given(classified(), st.data())
def test_soft_cross_entropy_is_linear_in_the_target(arguments, data):
    logits, target = arguments
    other = data.draw(uniforms_like(target))
    expected = 2 * soft_cross_entropy(logits, target) + 3 * soft_cross_entropy(logits, other)
    torch.testing.assert_close(soft_cross_entropy(logits, 2 * target + 3 * other), expected, rtol=1e-5, atol=1e-4)


@fast
@given(classified())
def test_the_minimum_of_soft_cross_entropy_is_the_entropy_of_the_target(arguments):
    logits, target = arguments
    target = (target + 0.01) / (target + 0.01).sum(dim=-1, keepdim=True)
    least = soft_cross_entropy(target.log(), target)
    torch.testing.assert_close(least, -(target * target.log()).sum(dim=-1), rtol=1e-5, atol=1e-5)
    assert (soft_cross_entropy(logits, target) >= least - 1e-5).all()


@fast
@given(classified())
def test_the_gradient_of_soft_cross_entropy_is_the_softmax_minus_the_target(arguments):
    logits, target = arguments
    (gradient,) = torch.autograd.grad(soft_cross_entropy(logits.requires_grad_(), target).sum(), logits)
    expected = logits.softmax(dim=-1) * target.sum(dim=-1, keepdim=True) - target
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_large_logits_have_a_finite_cross_entropy_and_a_finite_gradient(size):
    logits = torch.tensor([[size, -size, 0.0]], requires_grad=True)
    for target, expected in [([1.0, 0.0, 0.0], 0.0), ([0.0, 1.0, 0.0], 2 * size), ([0.0, 0.25, 0.25], 0.75 * size)]:
        error = soft_cross_entropy(logits, torch.tensor([target]))
        torch.testing.assert_close(error, torch.tensor([expected]))
        (gradient,) = torch.autograd.grad(error.sum(), logits)
        assert gradient.isfinite().all()


@st.composite
def ranked(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draw predictions and targets of 0 to 7 tokens, including ties."""
    prediction = 8 * draw(uniforms(draw(st.integers(0, 7)))) - 4
    return prediction, draw(uniforms_like(prediction))


def relative_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the formula as printed in the paper, with all pairs (i, j) in memory."""
    difference = prediction.unsqueeze(-2) - prediction.unsqueeze(-1)
    above = target.unsqueeze(-2) > target.unsqueeze(-1)
    below = target.unsqueeze(-2) < target.unsqueeze(-1)
    share = difference.sigmoid()
    return -(above * (share + 1e-6).log() + below * (1 - share + 1e-6).log()).sum(dim=(-2, -1))


def differentiated(function, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return value and gradient, with different weights for the rows of a batch."""
    prediction = prediction.clone().requires_grad_()
    value = function(prediction, target)
    weights = 0.5 + seeded(*value.shape).to(value.dtype)
    return value.detach(), torch.autograd.grad((weights * value).sum(), prediction)[0]


def relative(prediction: Tensor, target: Tensor) -> Tensor:
    return ranking_loss(prediction, target)[0]


@fast
@given(ranked())
def test_each_pair_costs_minus_the_log_of_the_sigmoid_and_equal_targets_do_not_count(arguments):
    prediction, target = arguments
    answers = ranking_loss(prediction, target)
    assert [(a.shape, a.dtype) for a in answers] == 3 * [(prediction.shape[:-1], torch.float32)]
    for p, t, *sums in zip(rows(prediction).tolist(), rows(target).tolist(), *map(torch.flatten, answers), strict=True):
        loss, right, pairs = 0.0, 0, 0
        for i in range(len(p)):
            for j in range(len(p)):
                difference = p[j] - p[i] if t[j] > t[i] else p[i] - p[j]
                if t[i] != t[j]:
                    loss -= math.log(1 / (1 + math.exp(-difference)) + 1e-6)
                    right += difference > 0
                    pairs += 1
        torch.testing.assert_close(torch.stack(sums), torch.tensor([loss, right, pairs]), rtol=1e-5, atol=1e-5)


@fast
@given(ranked())
def test_the_gradient_computed_in_the_forward_pass_is_that_of_the_formula(arguments):
    prediction, target = arguments
    expected = differentiated(relative_loss, prediction.double(), target)
    loss, gradient = differentiated(relative, prediction, target)
    torch.testing.assert_close((loss.double(), gradient.double()), expected, rtol=1e-5, atol=1e-5)


# up to 181 tokens fit into one chunk of pairs, 182 need a second one for two rows, and 1024 need 32
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0), (2, 3, 1), (2, 3, 147), (181,), (2, 2, 182), (3, 200), (1024,)])
def test_processing_pairs_in_chunks_does_not_change_the_result(shape):
    prediction, target = 6 * seeded(*shape), (50 * seeded(*shape, seed=1)).floor()
    expected = differentiated(relative_loss, prediction.double(), target)
    loss, gradient = differentiated(relative, prediction, target)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-4, atol=1e-4)
    _, right, pairs = ranking_loss(prediction, target)
    order, differences = (x.unsqueeze(-2) - x.unsqueeze(-1) for x in (target, prediction))
    assert pairs.equal((order != 0).sum(dim=(-2, -1)).float())
    assert right.equal((order * differences > 0).sum(dim=(-2, -1)).float())


def test_a_row_of_more_tokens_than_a_chunk_has_pairs_is_processed_token_by_token(monkeypatch):
    """As above 32,768 tokens: here a chunk is made so small that seven tokens exceed it."""
    prediction, target = 6 * seeded(2, 7), seeded(2, 7, seed=1)
    expected = differentiated(relative, prediction, target)
    monkeypatch.setattr(losses, "_PAIRS_AT_ONCE", 6)
    torch.testing.assert_close(differentiated(relative, prediction, target), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1.0, 12.0, 20.0, 100.0, 1e4])
def test_badly_mispredicted_and_equal_pairs_have_a_finite_loss_and_gradient(size, dtype):
    prediction = size * torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]]).to(dtype)
    target = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    loss, gradient = differentiated(relative, prediction, target)
    # the formula in float32, because 1 − sigmoid rounds
    expected = differentiated(relative_loss, prediction.float(), target)
    torch.testing.assert_close(
        (loss, gradient.float()), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert not loss[1]
    assert not gradient[1].any()


def test_the_epsilon_in_the_logarithm_bounds_the_cost_of_a_pair():
    loss, right, pairs = ranking_loss(torch.tensor([1e4, 0.0]), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(loss / pairs, torch.tensor(13.8155))
    assert right == 0


@fast
@given(ranked(), st.integers(-8, 8))
def test_ranking_loss_is_invariant_to_a_constant_added_to_all_predictions(arguments, constant):
    prediction, target = arguments
    prediction = (8 * prediction).round() / 8  # so that the sum is exact
    for a, b in zip(ranking_loss(prediction + constant, target), ranking_loss(prediction, target), strict=True):
        assert a.equal(b)


@fast
@given(ranked())
def test_the_gradients_of_a_row_sum_to_zero(arguments):
    _, gradient = differentiated(relative, *arguments)
    torch.testing.assert_close(gradient.sum(dim=-1), torch.zeros(gradient.shape[:-1]), rtol=0, atol=1e-4)


@fast
@given(ranked(), st.data())
def test_ranking_loss_is_permutation_invariant(arguments, data):
    prediction, target = arguments
    order = data.draw(st.permutations(range(prediction.shape[-1])))
    shuffled = ranking_loss(prediction[..., order], target[..., order])
    torch.testing.assert_close(shuffled, ranking_loss(prediction, target), rtol=1e-5, atol=1e-5)


@fast
@given(ranked())
def test_only_the_order_of_the_targets_matters(arguments):
    prediction, target = arguments
    places = target.unique(return_inverse=True)[1].float()  # ties share a rank
    for a, b in zip(ranking_loss(prediction, places.exp()), ranking_loss(prediction, target), strict=True):
        assert a.equal(b)


@fast
@given(ranked())
def test_ranking_loss_is_invariant_to_negating_predictions_and_targets(arguments):
    prediction, target = arguments
    torch.testing.assert_close(ranking_loss(-prediction, -target), ranking_loss(prediction, target))


@fast
@given(ranked())
def test_equal_predictions_cost_log_two_and_do_not_count_as_right(arguments):
    _, target = arguments
    loss, right, pairs = ranking_loss(torch.full_like(target, 0.3), target)
    torch.testing.assert_close(loss, -math.log(0.5 + 1e-6) * pairs)
    assert not right.any()


@fast
@given(ranked())
def test_predictions_in_the_order_of_the_targets_are_all_right_and_in_reverse_all_wrong(arguments):
    _, target = arguments
    _, right, pairs = ranking_loss(3 * target, target)
    assert right.equal(pairs)
    assert not ranking_loss(-target, target)[1].any()


def test_the_target_of_ranking_loss_gets_no_gradient():
    prediction, target = seeded(2, 5, seed=1), seeded(2, 5).requires_grad_()
    assert not any(answer.requires_grad for answer in ranking_loss(prediction, target))
    loss, right, pairs = ranking_loss(prediction.requires_grad_(), target)
    assert loss.requires_grad
    assert not right.requires_grad
    assert not pairs.requires_grad
    loss.sum().backward()
    assert target.grad is None


def test_the_gradient_of_ranking_loss_is_the_same_under_vmap_and_compiled():
    prediction, target = 6 * seeded(3, 200), seeded(3, 200, seed=1)
    loss, gradient = differentiated(relative, prediction, target)
    weights = 0.5 + seeded(*loss.shape).unsqueeze(-1)
    # the run-time type checker would break the graph, so use an unchecked copy of the file
    alone = copied("losses").ranking_loss
    each = torch.func.vmap(torch.func.grad(lambda p, t: alone(p, t)[0]))(prediction, target)
    torch.testing.assert_close(weights * each, gradient)
    torch.compiler.reset()
    compiled = torch.compile(lambda p, t: alone(p, t)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(differentiated(compiled, prediction, target), (loss, gradient))


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor created."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return result


@pytest.mark.parametrize("n", [147, 182, 1024])
def test_only_one_chunk_of_pairs_is_in_memory_and_none_is_saved_for_the_backward_pass(n):
    prediction, target, kept = seeded(2, n).requires_grad_(), seeded(2, n, seed=1), []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()), lambda x: x):
        ranking_loss(prediction, target)
    assert largest.numel <= 2 * 2**15
    assert sum(kept) <= 2 * 2 * n


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("name", "tensors", "numbers", "message"),
    [
        ("normalized_patches", [zeros(4, 1)], {}, "patches of 1 value have no variance"),
        *(
            (
                "channel_normalized_patches",
                [zeros(4, d)],
                {"channels": c},
                f"patches of {d} values do not divide into two or more pixels of {c} channels",
            )
            for d, c in [(7, 3), (3, 3), (6, 0), (6, -3), (0, 3)]
        ),
        *(
            (name, [zeros(4, 3), zeros(4, 1)], {}, f"{what} (4, 3) and target (4, 1) differ in shape")
            for name, what in [
                ("squared_error", "prediction"),
                ("cosine_distance", "prediction"),
                ("soft_cross_entropy", "logits"),
                ("ranking_loss", "prediction"),
            ]
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
                f"a center of {inner_H} × {inner_W} leaves no equal margins in a view of 6 × 8 pixels",
            )
            for inner_H, inner_W in [(0, 2), (2, 0), (6, 2), (2, 8), (3, 2), (2, 3), (8, 2), (2, 10)]
        ),
    ],
)
def test_invalid_arguments_raise_one_clear_sentence(name, tensors, numbers, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(copied("losses"), name)(*tensors, **numbers)


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "loss",
    [
        absolute_error,
        partial(band_error, inner_H=2, inner_W=4),
        cosine_distance,
        ranking_loss,
        soft_cross_entropy,
        squared_error,
    ],
    ids=["absolute_error", "band_error", "cosine_distance", "ranking_loss", "soft_cross_entropy", "squared_error"],
)
def test_a_loss_is_computed_in_float32_for_any_dtypes_of_prediction_and_target(loss, dtype, target_dtype):
    prediction, target = (seeded(2, 3, 6, 6, seed=seed).bfloat16() for seed in (0, 1))
    errors = loss(prediction.to(dtype), target.to(target_dtype))
    torch.testing.assert_close(errors, loss(prediction.float(), target.float()), rtol=0, atol=0)


@pytest.mark.parametrize("length", [1.0, 1.5e-12, 1e-13])
def test_features_shorter_than_1e_12_count_in_proportion_to_their_length(length):
    prediction, target = F.normalize(seeded(2, 5, 6), dim=-1), F.normalize(seeded(2, 5, 6, seed=1) - 0.5, dim=-1)
    cosine = (2 - cosine_distance(prediction, target)) / 2
    expected = 2 - 2 * min(1, length / 1e-12) * cosine
    torch.testing.assert_close(cosine_distance(length * prediction, target), expected)
    torch.testing.assert_close(cosine_distance(prediction, length * target), expected)


@fast
@given(pairs())
def test_absolute_error_is_the_mean_over_the_values_of_each_token(arguments):
    prediction, target = arguments
    d = prediction.shape[-1]
    expected = sum((prediction[..., i].double() - target[..., i].double()).abs() for i in range(d)) / d
    torch.testing.assert_close(absolute_error(prediction, target).double(), expected, rtol=1e-5, atol=1e-6)


def normalized_in_windows(pictures: Tensor, window: int) -> Tensor:
    """Normalize pixel by pixel, in double precision."""
    result, reach = torch.zeros_like(pictures, dtype=torch.float64), window // 2
    for i, j in itertools.product(*map(range, pictures.shape[-2:])):
        rows, columns = (slice(max(0, place - reach), place + reach + 1) for place in (i, j))
        around = pictures[..., rows, columns].double().flatten(-2)
        deviation = (around.var(dim=-1) + 1e-6).sqrt()
        result[..., i, j] = (pictures[..., i, j].double() - around.mean(dim=-1)) / deviation
    return result


@fast
@given(
    images().filter(lambda pictures: pictures.shape[-2:].numel() > 1),
    st.sampled_from([3, 5, 7, 47]),
    st.sampled_from([(1e-3, 0), (1, 0), (3, 300)]),
)
def test_window_normalized_subtracts_the_mean_and_divides_by_the_deviation_of_each_window(pictures, window, linear):
    contrast, brightness = linear
    pictures = contrast * pictures + brightness
    target = window_normalized(pictures, window=window)
    torch.testing.assert_close(target.double(), normalized_in_windows(pictures, window), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "tensors", "numbers", "message"),
    [
        ("absolute_error", [zeros(4, 3), zeros(4, 1)], {}, "prediction (4, 3) and target (4, 1) differ in shape"),
        *(
            (
                "window_normalized",
                [zeros(1, 4, 4)],
                {"window": window},
                f"window={window} is not an odd number of pixels of at least 3",
            )
            for window in (-3, 1, 2, 4)
        ),
        *(
            ("window_normalized", [zeros(1, H, W)], {"window": 3}, f"images of {H} × {W} pixels have no variance")
            for H, W in [(1, 1), (0, 4), (4, 0)]
        ),
    ],
)
def test_invalid_arguments_of_the_losses_of_simmim_raise_one_clear_sentence(name, tensors, numbers, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(copied("losses"), name)(*tensors, **numbers)


def test_a_flat_image_is_zero_and_a_flat_area_is_small():
    assert (window_normalized(torch.full((1, 9, 9), 0.3), window=3) == 0).all()
    images = torch.where(torch.arange(40) < 30, 2.1, seeded(1, 40, 40))
    assert window_normalized(images, window=5)[..., :28].abs().max() < 1e-2


def test_the_gradient_of_the_absolute_error_has_no_size():
    prediction = torch.tensor([[3.0, -0.1, 0.0]], requires_grad=True)
    absolute_error(prediction, torch.zeros(1, 3)).sum().backward()
    assert prediction.grad is not None
    assert (3 * prediction.grad).tolist() == [[1, -1, 0]]
