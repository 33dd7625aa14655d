"""Position tables and targets against their formulas, and which positions are kept, dropped or permuted."""

import math
import re

from mimkit.positions import (
    attentive_weights,
    drop_positions,
    permute_positions,
    resize_table,
    shuffle,
    sincos,
    sinusoid,
    smoothed_targets,
)
from mimkit.tokens import take

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import copied, fast, rows, seeded, uniforms, uniforms_like
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
def test_the_first_half_of_sincos_encodes_the_column_and_the_second_the_row(height, width):
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
def test_sinusoid_depends_only_on_the_raster_index(height, width):
    assert sinusoid(height=height, width=width, dim=6).equal(sinusoid(height=1, width=height * width, dim=6))


def test_tables_are_float32_and_exact_far_from_the_origin():
    # in float32 the angle 49,999 · ω would be wrong in the third digit
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
    """Draw a table, and its old and new grid."""
    grid = {name: draw(positive_sides) for name in ("height", "width", "new_height", "new_width")}
    return draw(uniforms(grid["height"] * grid["width"], draw(st.integers(1, 3)))), grid


def bicubic(old: int, new: int) -> Tensor:
    """Return the weights of `old` samples in each of `new` ones: Keys' kernel with A = −0.75 and replicated edges."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        center = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(center) - 1, math.floor(center) + 3):
            x, a = abs(center - j), -0.75
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
def test_resizing_to_the_same_grid_returns_a_copy(arguments):
    table, grid = arguments
    height, width = grid["height"], grid["width"]
    copy = resize_table(table, height=height, width=width, new_height=height, new_width=width)
    assert copy.equal(table)
    assert not copy.numel() or copy.data_ptr() != table.data_ptr()


@fast
@given(tables())
def test_resizing_commutes_with_transposition(arguments):
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


@st.composite
def dropped_positions(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Draw distinct positions of 0 to 6 tokens, which of them are dropped (none, some, all), and noise."""
    noise = draw(uniforms(draw(st.integers(0, 6))))
    dropped = draw(uniforms_like(noise)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    numbers = torch.arange(noise.numel() * 3, dtype=torch.float32)
    return numbers.reshape(*noise.shape, 3), dropped, noise


@fast
@given(dropped_positions())
def test_only_dropped_positions_are_replaced(arguments):
    positions, dropped, _ = arguments
    result = drop_positions(positions, dropped, -1 - positions)
    assert result.shape == positions.shape
    assert result[dropped].equal(-1 - positions[dropped])
    assert result[~dropped].equal(positions[~dropped])


@fast
@given(dropped_positions())
def test_gradients_reach_the_replacement_of_dropped_positions_and_the_positions_that_are_kept(arguments):
    positions, dropped, _ = arguments
    token = torch.zeros(3, requires_grad=True)
    result = drop_positions(positions.requires_grad_(), dropped, token.expand_as(positions))
    of_token, of_positions = torch.autograd.grad(result.sum(), [token, positions])
    assert (of_token == dropped.sum()).all()
    assert of_positions.equal((~dropped).float().unsqueeze(-1).expand_as(positions))


@fast
@given(dropped_positions())
def test_dropped_positions_are_permuted_in_the_order_of_the_noise_and_the_others_are_kept(arguments):
    positions, dropped, noise = arguments
    result = permute_positions(positions, dropped, noise)
    assert result.shape == positions.shape
    table, sources = positions.reshape(-1, 3), rows(torch.arange(noise.numel()).reshape(noise.shape))
    answers = result.reshape(*sources.shape, 3)
    for own, lost, chance, answer in zip(sources, rows(dropped), rows(noise), answers, strict=True):
        expected, places = own.tolist(), lost.nonzero().flatten().tolist()
        for place, source in zip(places, sorted(places, key=chance.tolist().__getitem__), strict=True):
            expected[place] = int(own[source])
        assert answer.equal(table[expected])


@fast
@given(dropped_positions())
def test_the_noise_of_kept_positions_does_not_matter(arguments):
    positions, dropped, noise = arguments
    result = permute_positions(positions, dropped, noise)
    for level in (0.0, 1 - 2**-24):
        assert permute_positions(positions, dropped, noise.where(dropped, level)).equal(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [0.0, 1 - 2**-24])  # the largest noise rounds to 1 in bfloat16
def test_equal_noise_leaves_all_positions_unchanged(dtype, level):
    positions, dropped = torch.arange(4.0).unsqueeze(-1), torch.tensor([False, True, False, True])
    assert permute_positions(positions, dropped, torch.full((4,), level, dtype=dtype)).equal(positions)


def assert_all_permutations_are_equally_frequent(orders: Tensor) -> None:
    draws, k = orders.shape
    assert orders.sort().values.equal(torch.arange(k).expand(draws, k))
    counts = orders.unique(dim=0, return_counts=True)[1].double()
    share = 1 / math.factorial(k)
    assert len(counts) * share == 1
    # 4.5 standard deviations
    assert (counts - draws * share).abs().max() < 4.5 * (draws * share * (1 - share)) ** 0.5


def test_every_permutation_of_the_dropped_positions_is_equally_likely():
    positions, dropped = torch.tensor([9.0, 0.0, 1.0, 9.0, 2.0, 3.0]), torch.tensor([0, 1, 1, 0, 1, 1]).bool()
    result = permute_positions(
        positions.view(6, 1).expand(30_000, 6, 1), dropped.expand(30_000, 6), seeded(30_000, 6)
    ).squeeze(-1)
    assert (result[:, ~dropped] == 9).all()
    assert_all_permutations_are_equally_frequent(result[:, dropped].long())


def test_every_permutation_of_the_tokens_is_equally_likely():
    assert_all_permutations_are_equally_frequent(shuffle(seeded(30_000, 4))[0])


@fast
@given(uniforms(5), st.integers(0, 5))
def test_back_undoes_the_shuffle(noise, k):
    noise = noise[..., :k]
    tokens = seeded(*noise.shape, 2)
    order, back = shuffle(noise)
    assert take(take(tokens, order), back).equal(tokens)
    assert take(take(tokens, back), order).equal(tokens)


@fast
@given(uniforms(5))
def test_shuffled_tokens_are_sorted_by_their_noise_and_ties_keep_their_order(noise):
    for chance, order in zip(rows(noise), rows(shuffle(noise)[0]), strict=True):
        assert order.tolist() == sorted(range(5), key=chance.tolist().__getitem__)


def neighborhood(sigma: float, height: int, width: int) -> Tensor:
    """Return the unnormalized weight exp(−d² / σ²) of each pair of places, in float64."""
    places = [(y, x) for y in range(height) for x in range(width)]
    squares = [[(a - c) ** 2 + (b - d) ** 2 for c, d in places] for a, b in places]
    weights = [[math.exp(-d2 / sigma**2) if sigma**2 and d2 else float(d2 == 0) for d2 in row] for row in squares]
    return torch.tensor(weights, dtype=torch.float64).reshape(height * width, height * width)


widths = uniforms().map(lambda numbers: 4 * numbers)


@fast
@given(widths, sides, sides)
def test_smoothed_targets_are_a_gaussian_of_the_squared_distance_divided_by_its_row(sigma, height, width):
    targets = smoothed_targets(sigma, height=height, width=width)
    n = height * width
    assert targets.shape == (*sigma.shape, n, n)
    for s, target in zip(sigma.flatten().tolist(), targets.reshape(sigma.numel(), n, n), strict=True):
        weights = neighborhood(s, height, width)
        torch.testing.assert_close(target.double(), weights / weights.sum(dim=1, keepdim=True), rtol=1e-5, atol=1e-7)


@fast
@given(st.floats(0, 4, width=32), positive_sides, positive_sides)
def test_the_published_normalization_is_the_transpose(sigma, height, width):
    # the published code divides column j by the sum of row j
    weights = neighborhood(sigma, height, width)
    published = smoothed_targets(torch.tensor(sigma), height=height, width=width).mT
    torch.testing.assert_close(published.double(), weights / weights.sum(dim=1), rtol=1e-5, atol=1e-7)


@fast
@given(widths, sides, sides)
def test_each_smoothed_target_is_a_distribution(sigma, height, width):
    targets = smoothed_targets(sigma, height=height, width=width)
    assert (targets >= 0).all()
    torch.testing.assert_close(targets.sum(dim=-1), torch.ones(targets.shape[:-1]))


@fast
@given(widths, sides, sides)
def test_smoothed_targets_are_equivariant_to_flips_and_transposition_of_the_grid(sigma, height, width):
    grid = smoothed_targets(sigma, height=height, width=width).unflatten(-1, (height, width))
    grid = grid.unflatten(-3, (height, width))
    torch.testing.assert_close(grid.flip(-4, -2), grid)
    torch.testing.assert_close(grid.flip(-3, -1), grid)
    turned = smoothed_targets(sigma, height=width, width=height).unflatten(-1, (width, height))
    turned = turned.unflatten(-3, (width, height))
    torch.testing.assert_close(turned.transpose(-4, -3).transpose(-2, -1), grid)


@fast
@given(st.floats(0.5, 4, width=32), positive_sides, positive_sides)
def test_a_nearer_position_has_a_larger_probability(sigma, height, width):
    targets = smoothed_targets(torch.tensor(sigma), height=height, width=width)
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
    distances = torch.cdist(places, places).square().round()
    nearer = distances.unsqueeze(-1) < distances.unsqueeze(-2)
    more = targets.unsqueeze(-1) > targets.unsqueeze(-2)
    assert (more | ~nearer | (targets == 0).unsqueeze(-1)).all()


@fast
@given(sides, sides, st.sampled_from([0.0, 0.05, 1e-3, 1e-20, 1e-38, 1e-45]))
def test_with_zero_width_every_target_is_one_hot(height, width, sigma):
    # at a width of 0.05 the weight of a neighbor, exp(−400), is 0 in float32
    identity = torch.eye(height * width)
    assert smoothed_targets(torch.tensor(sigma), height=height, width=width).equal(identity)


@fast
@given(positive_sides, positive_sides, st.sampled_from([1e4, 1e19, 1e30, math.inf]))
def test_with_a_very_large_width_every_target_is_uniform(height, width, sigma):
    targets = smoothed_targets(torch.tensor(sigma), height=height, width=width)
    torch.testing.assert_close(targets, torch.full_like(targets, 1 / (height * width)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_smoothed_targets_are_float32_for_any_dtype_of_sigma(dtype):
    sigma = torch.tensor(0.75, dtype=dtype)
    targets = smoothed_targets(sigma, height=2, width=3)
    assert targets.dtype == torch.float32
    assert targets.equal(smoothed_targets(sigma.float(), height=2, width=3))


@pytest.mark.parametrize(
    ("sigma", "place", "probability"), [(1.0, (7, 7), 0.318), (1.0, (0, 0), 0.520), (2.0, (7, 7), 0.080)]
)
def test_the_true_position_has_the_probability_of_the_paper(sigma, place, probability):
    targets = smoothed_targets(torch.tensor(sigma), height=14, width=14).view(14, 14, 14, 14)
    assert targets[place][place].item() == pytest.approx(probability, abs=5e-4)


def test_rows_of_the_published_targets_sum_to_less_than_one_at_corners_and_more_beside_them():
    rows = smoothed_targets(torch.tensor(1.0), height=14, width=14).mT.sum(dim=-1).view(14, 14)
    corner, edge, inside, interior = rows[0, 0], rows[0, 7], rows[1, 1], rows[7, 7]
    assert corner.item() == pytest.approx(0.886, abs=5e-4)
    assert [round(x.item(), 2) for x in (edge, inside, interior)] == [0.94, 1.11, 1.00]


def test_the_targets_have_the_entropy_that_bounds_the_loss_from_below():
    targets = smoothed_targets(torch.tensor(1.0), height=14, width=14)
    entropy = -targets.xlogy(targets).sum(dim=-1).view(14, 14)
    assert [round(entropy[place].item(), 2) for place in [(7, 7), (0, 0)]] == [2.14, 1.29]


lengths = st.sampled_from([1e-4, 0.1, 1.0, 1e6])  # vectors shorter than 1e-8 are not normalized


@st.composite
def resemblances(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    """Draw features of 0 to 6 tokens and of a guide, including zeros, and a temperature."""
    tokens = 4 * draw(uniforms(draw(st.integers(0, 6)), draw(st.integers(1, 4)))) - 2
    return tokens, 4 * draw(uniforms_like(tokens[..., :1, :].sum(dim=-2))) - 2, draw(st.sampled_from([0.05, 0.1, 1.0]))


def cosines(tokens: Tensor, guide: Tensor) -> Tensor:
    """Return the cosine of each token with the guide, 0 where either is zero, in float64."""
    tokens, guide = tokens.double(), guide.double().unsqueeze(-2)
    lengths = (tokens.square().sum(dim=-1) * guide.square().sum(dim=-1)).sqrt()
    return (tokens * guide).sum(dim=-1) / lengths.where(lengths > 0, 1)


@fast
@given(resemblances())
def test_attentive_weights_are_the_softmax_of_the_cosines_divided_by_the_temperature(arguments):
    tokens, guide, temperature = arguments
    weights = attentive_weights(tokens, guide, temperature=temperature)
    assert weights.shape == tokens.shape[:-1]
    exponentials = (cosines(tokens, guide) / temperature).exp()
    expected = exponentials / exponentials.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-6)


@fast
@given(resemblances())
def test_attentive_weights_sum_to_one_even_if_a_vector_is_zero(arguments):
    tokens, guide, temperature = arguments
    for a, b in [(tokens, guide), (0 * tokens, guide), (tokens, 0 * guide)]:
        weights = attentive_weights(a, b, temperature=temperature)
        torch.testing.assert_close(weights.sum(dim=-1), torch.full(weights.shape[:-1], float(weights.shape[-1] > 0)))


@fast
@given(resemblances())
def test_a_patch_more_similar_to_the_class_token_has_a_larger_weight(arguments):
    tokens, guide, temperature = arguments
    weights, cosine = attentive_weights(tokens, guide, temperature=temperature), cosines(tokens, guide)
    nearer = cosine.unsqueeze(-1) > cosine.unsqueeze(-2) + 1e-5
    assert (~nearer | (weights.unsqueeze(-1) > weights.unsqueeze(-2))).all()


@fast
@given(resemblances(), lengths, lengths)
def test_attentive_weights_do_not_depend_on_the_norms_of_the_features(arguments, by, guide_by):
    tokens, guide, temperature = arguments
    longer = attentive_weights(by * tokens, guide_by * guide, temperature=temperature)
    torch.testing.assert_close(longer, attentive_weights(tokens, guide, temperature=temperature), rtol=1e-4, atol=1e-6)


@fast
@given(resemblances())
def test_an_infinite_temperature_gives_equal_weights(arguments):
    tokens, guide, _ = arguments
    weights = attentive_weights(tokens, guide, temperature=math.inf)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / max(1, weights.shape[-1])))


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30])
def test_near_temperature_zero_the_most_similar_patch_has_all_the_weight(temperature):
    tokens, guide = torch.tensor([[1.0, 1.0], [5.0, 1.0], [-9.0, 0.0], [0.0, 0.0]]), torch.tensor([2.0, 0.0])
    assert attentive_weights(tokens, guide, temperature=temperature).tolist() == [0, 1, 0, 0]


@fast
@given(resemblances(), st.integers(1, 6))
def test_weights_of_visible_patches_are_those_of_all_patches_renormalized(arguments, visible):
    tokens, guide, temperature = arguments
    everywhere = attentive_weights(tokens, guide, temperature=temperature)[..., :visible]
    weights = attentive_weights(tokens[..., :visible, :], guide, temperature=temperature)
    torch.testing.assert_close(weights, everywhere / everywhere.sum(dim=-1, keepdim=True), rtol=1e-4, atol=1e-6)


GRID = {"height": 2, "width": 3, "new_height": 1, "new_width": 1}
DROPPED = torch.zeros(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("name", "tensors", "numbers", "message"),
    [
        *(
            ("sincos", [], {"height": 1, "width": 1, "dim": dim}, f"dim={dim} is not a positive multiple of 4: {why}")
            for dim in (0, -4, 6)
            for why in ["it holds sine and cosine of row and column"]
        ),
        *(
            ("sinusoid", [], {"height": 1, "width": 1, "dim": dim}, f"dim={dim} is not a positive even number: {why}")
            for dim in (0, -2, 3)
            for why in ["it holds sine and cosine of each angle"]
        ),
        *(
            (name, [], {"height": height, "width": width, "dim": 4}, f"a grid of {height} × {width} patches {why}")
            for name in ("sincos", "sinusoid")
            for height, width in [(-1, 2), (2, -1)]
            for why in ["has a negative side"]
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
        *(
            (name, [positions, DROPPED, other], {}, f"positions {shape} and dropped (4,) do not match")
            for positions, shape in [(torch.zeros(3, 2), "(3, 2)"), (torch.zeros(1, 4, 2), "(1, 4, 2)")]
            for name, other in [("drop_positions", positions), ("permute_positions", torch.zeros(4))]
        ),
        *(
            (
                "drop_positions",
                [torch.zeros(4, 2), DROPPED, replacement],
                {},
                f"positions (4, 2) and replacement {shape} differ in shape",
            )
            for replacement, shape in [(torch.zeros(2), "(2,)"), (torch.zeros(4, 1), "(4, 1)")]
        ),
        (
            "permute_positions",
            [torch.zeros(4, 2), DROPPED, torch.zeros(1)],
            {},
            "dropped (4,) and noise (1,) differ in shape",
        ),
        ("shuffle", [torch.tensor(0.5)], {}, "noise is 0-d and has no axis to shuffle"),
        *(
            (
                "smoothed_targets",
                [torch.tensor(1.0)],
                {"height": height, "width": width},
                f"a grid of {height} × {width} patches has a negative side",
            )
            for height, width in [(-1, 2), (2, -1)]
        ),
        *(
            (
                "attentive_weights",
                [torch.zeros(4, 2), torch.zeros(2)],
                {"temperature": temperature},
                f"temperature={temperature} is not above 0",
            )
            for temperature in (0.0, -0.1, math.nan)
        ),
        *(
            (
                "attentive_weights",
                [torch.zeros(3, 4, 2), torch.zeros(shape)],
                {"temperature": 0.1},
                f"tokens (3, 4, 2) and guide {shape} do not match",
            )
            for shape in [(2,), (3, 1), (1, 2), (3, 4, 2)]
        ),
    ],
)
def test_invalid_arguments_raise_one_clear_sentence(name, tensors, numbers, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(copied("positions"), name)(*tensors, **numbers)


@pytest.mark.parametrize("length", [1.0, 1.5e-8, 1e-9])
def test_features_shorter_than_1e_8_count_in_proportion_to_their_length(length):
    tokens, guide = F.normalize(seeded(3, 5, 6) - 0.5, dim=-1), F.normalize(seeded(3, 6, seed=1) - 0.5, dim=-1)
    cosine = (tokens * guide.unsqueeze(-2)).sum(dim=-1)
    expected = (10 * min(1, length / 1e-8) * cosine).softmax(dim=-1)
    torch.testing.assert_close(attentive_weights(length * tokens, guide, temperature=0.1), expected)
    torch.testing.assert_close(attentive_weights(tokens, length * guide, temperature=0.1), expected)
