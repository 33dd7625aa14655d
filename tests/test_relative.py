"""Relative positions: buckets against loops, and what a table adds to attention against one-hot products."""

import math
import re
from typing import Any

from mimkit import relative
from mimkit.relative import (
    buckets_of,
    contextual_bias,
    contextual_values,
    num_buckets,
    piecewise_index,
    relative_bias,
    relative_buckets,
)
from mimkit.tokens import take

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, copied, fast, seeded
from torch import Tensor

METHODS: Any = ("product", "rows", "columns", "euclidean", "quantized")
RATIOS = (0.4, 0.7, 1.0, 1.3, 1.9, 2.0, 2.5, 3.0, 4.7, 20.0, 33.0)

methods = st.sampled_from(METHODS)
ratios = st.sampled_from(RATIOS)
prefixes = st.integers(0, 2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Piecewise index


@st.composite
def coefficients(draw: st.DrawFn) -> dict[str, float]:
    """Draw alpha, beta and gamma such that alpha rounds to at most beta."""
    alpha = draw(st.floats(0.1, 40))
    return {"alpha": alpha, "beta": alpha + draw(st.floats(0.5, 40)), "gamma": alpha * draw(st.floats(1.1, 20))}


@st.composite
def distances(draw: st.DrawFn) -> Tensor:
    """Draw integers and real numbers of either sign, in ascending order."""
    found = draw(st.lists(st.one_of(st.integers(-300, 300), st.floats(-300, 300)), min_size=1, max_size=20))
    return torch.tensor(sorted(map(float, found)), dtype=torch.float64)


def numbered(distance: float, *, alpha: float, beta: float, gamma: float) -> int:
    """Compute the formula for a single number."""
    far = abs(distance)
    if far <= alpha:
        return round(distance)
    logarithmic = alpha + (beta - alpha) * math.log(far / alpha) / math.log(gamma / alpha)
    return int(math.copysign(min(round(logarithmic), beta), distance))


def of_ratio(ratio: float) -> dict[str, float]:
    return {"alpha": ratio, "beta": 2 * ratio, "gamma": 8 * ratio}


@fast
@given(distances(), ratios)
def test_piecewise_index_follows_its_formula(distance, ratio):
    found = piecewise_index(distance, **of_ratio(ratio))
    assert found.tolist() == [numbered(x, **of_ratio(ratio)) for x in distance.tolist()]


@fast
@given(distances(), coefficients())
def test_piecewise_index_is_odd(distance, numbers):
    assert piecewise_index(-distance, **numbers).equal(-piecewise_index(distance, **numbers))


@fast
@given(distances(), coefficients())
def test_piecewise_index_is_monotonic(distance, numbers):
    assert (piecewise_index(distance, **numbers).diff() >= 0).all()


@fast
@given(distances(), coefficients())
def test_no_index_exceeds_the_integer_part_of_beta(distance, numbers):
    assert piecewise_index(distance, **numbers).abs().max() <= int(numbers["beta"])


@fast
@given(coefficients())
def test_far_distances_reach_the_largest_index(numbers):
    far = torch.tensor([-1.0, 1.0], dtype=torch.float64) * 1e9
    assert piecewise_index(far, **numbers).tolist() == [-int(numbers["beta"]), int(numbers["beta"])]


@fast
@given(distances(), coefficients())
def test_distances_up_to_alpha_are_rounded_with_ties_to_even(distance, numbers):
    halves = torch.arange(-20, 21, dtype=torch.float64) / 2
    near = torch.cat([distance, halves])
    near = near[near.abs() <= numbers["alpha"]]
    assert piecewise_index(near, **numbers).tolist() == [round(x) for x in near.tolist()]


@pytest.mark.parametrize(
    ("ratio", "runs"),
    [
        (1.9, [1, 1, 2, math.inf]),
        (2.0, [1, 1, 2, 6, math.inf]),
        (2.5, [1, 1, 1, 3, 8, math.inf]),
        (3.0, [1, 1, 1, 2, 4, 8, math.inf]),
    ],
)
def test_runs_of_integer_distances_share_an_index(ratio, runs):
    """Starting from 0, `runs` gives how many distances have the index 0, 1, 2, …; the last run is infinite."""
    expected = [number for number, run in enumerate(runs) for _ in range(int(min(run, 100)))][:100]
    found = piecewise_index(torch.arange(100), **of_ratio(ratio))
    assert found.tolist() == expected
    assert len(runs) == int(2 * ratio) + 1


def test_the_limit_is_applied_after_rounding_and_before_truncation_which_a_distance_of_eleven_shows():
    """At 11 the logarithm rounds to 4, is limited to 3.8 and truncated to 3; at 10 it rounds to 3."""
    ten, eleven = (1.9 + 1.9 * math.log(far / 1.9) / math.log(8) for far in (10, 11))
    assert ten < 3.5 < eleven
    assert piecewise_index(torch.tensor([10, 11, -11]), **of_ratio(1.9)).tolist() == [3, 3, -3]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_distances_may_have_any_dtype(dtype):
    distance = torch.tensor([[-13, 0], [2, 5]]).to(dtype)
    found = piecewise_index(distance, **of_ratio(1.9))
    assert found.tolist() == [[-3, 0], [2, 3]]
    assert found.dtype == torch.int64


# Buckets


@st.composite
def grids(draw: st.DrawFn) -> dict[str, int]:
    """Draw small grids of any shape, and long ones."""
    height, width = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    longer = draw(st.sampled_from([0, 0, 18]))
    return draw(
        st.sampled_from([{"height": height + longer, "width": width}, {"height": height, "width": width + longer}])
    )


def bucket(down: int, across: int, *, method: str, ratio: float) -> int:
    """Compute the bucket of one offset, query minus key."""
    half = int(2 * ratio)

    def number(distance: float) -> int:
        return numbered(distance, **of_ratio(ratio)) + half

    if method == "product":
        return number(down) * (2 * half + 1) + number(across)
    if method in ("rows", "columns"):
        return number(down if method == "rows" else across)
    squared = down**2 + across**2
    return number(round(math.sqrt(squared)) if method == "euclidean" else squared)


@fast
@given(grids(), methods, ratios, prefixes)
def test_a_bucket_depends_on_the_offset_of_query_minus_key(grid, method, ratio, prefix):
    found = relative_buckets(**grid, method=method, ratio=ratio, num_prefix=prefix)
    width = grid["width"]
    places = [divmod(i, width) for i in range(grid["height"] * width)]
    expected = [[bucket(a - c, b - d, method=method, ratio=ratio) for c, d in places] for a, b in places]
    assert found[prefix:, prefix:].tolist() == expected


@fast
@given(grids(), methods, ratios, prefixes)
def test_every_pair_with_a_class_token_has_the_last_bucket(grid, method, ratio, prefix):
    found = relative_buckets(**grid, method=method, ratio=ratio, num_prefix=prefix)
    count = num_buckets(method=method, ratio=ratio, num_prefix=prefix)
    assert found.shape == (prefix + grid["height"] * grid["width"],) * 2
    assert (found[:prefix] == count - 1).all()
    assert (found[:, :prefix] == count - 1).all()
    inner = found[prefix:, prefix:]
    assert ((inner >= 0) & (inner < count - (prefix > 0))).all()


@fast
@given(grids(), ratios)
def test_the_buckets_of_a_pair_and_of_the_reversed_pair_sum_to_the_last_bucket(grid, ratio):
    found = relative_buckets(**grid, ratio=ratio, num_prefix=0)
    last = num_buckets(ratio=ratio, num_prefix=0) - 1
    assert (found + found.T == last).all()
    assert (found.diagonal() == last // 2).all()
    assert last % 2 == 0


@fast
@given(grids(), ratios, st.sampled_from(["euclidean", "quantized"]))
def test_undirected_methods_are_symmetric_and_use_only_the_upper_half_of_the_table(grid, ratio, method):
    found = relative_buckets(**grid, method=method, ratio=ratio, num_prefix=0)
    assert found.equal(found.T)
    assert (found >= int(2 * ratio)).all()
    assert (found.diagonal() == int(2 * ratio)).all()


def test_euclidean_distances_are_rounded_before_indexing_and_squared_ones_are_not_ranked():
    """An offset of two rows and three columns has the distance √13 = 3.6, which rounds to 4; squared it is 13."""
    euclidean = relative_buckets(height=3, width=4, method="euclidean")[1, -1]
    quantized = relative_buckets(height=3, width=4, method="quantized", ratio=33.0)[1, -1]
    assert numbered(math.sqrt(13), **of_ratio(1.9)) == 2
    assert (euclidean, quantized) == (3 + 3, 66 + 13)


@fast
@given(grids(), ratios)
def test_the_product_combines_rows_and_columns_with_rows_as_the_high_digit(grid, ratio):
    product, rows, columns = (
        relative_buckets(**grid, method=method, ratio=ratio, num_prefix=0) for method in ("product", "rows", "columns")
    )
    side = num_buckets(method="rows", ratio=ratio, num_prefix=0)
    assert product.equal(rows * side + columns)
    turned = relative_buckets(height=grid["width"], width=grid["height"], method="rows", ratio=ratio, num_prefix=0)
    order = torch.arange(len(rows)).view(grid["height"], grid["width"]).T.flatten()
    assert columns[order][:, order].equal(turned)


@fast
@given(st.data(), methods, ratios, prefixes)
def test_the_buckets_of_a_window_do_not_depend_on_its_place(data, method, ratio, prefix):
    """A window therefore acts as a grid, and translating all positions changes nothing."""
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    rows, columns = data.draw(st.integers(0, height)), data.draw(st.integers(0, width))
    top, left = data.draw(st.integers(0, height - rows)), data.draw(st.integers(0, width - columns))
    numbers = {"method": method, "ratio": ratio, "num_prefix": prefix}
    inside = torch.arange(height * width).view(height, width)[top : top + rows, left : left + columns]
    tokens = torch.cat([torch.arange(prefix), inside.flatten() + prefix])
    found = buckets_of(relative_buckets(height=height, width=width, **numbers), tokens)
    assert found.equal(relative_buckets(height=rows, width=columns, **numbers))


@pytest.mark.parametrize(
    ("ratio", "columns", "reached"),
    [
        (1.9, 50, {7: 50, 14: 50, 24: 50}),
        (2.0, 82, {7: 50, 14: 82, 24: 82}),
        (2.5, 122, {7: 82, 14: 82, 24: 122}),
        (3.0, 170, {7: 82, 14: 122, 24: 170}),
    ],
)
def test_a_window_of_7_by_7_uses_every_bucket_at_ratio_1_9_and_not_at_larger_ratios(ratio, columns, reached):
    assert num_buckets(ratio=ratio) == columns
    for side, count in reached.items():
        assert len(relative_buckets(height=side, width=side, ratio=ratio).unique()) == count


@pytest.mark.parametrize(
    ("method", "ratio", "columns", "reached"),
    [("euclidean", 20.0, 82, 20), ("quantized", 33.0, 134, 51), ("rows", 20.0, 82, 28)],
)
def test_a_grid_of_14_by_14_uses_the_number_of_buckets_in_the_names_of_the_published_models(
    method, ratio, columns, reached
):
    """The method cross, with two tables, uses 28 in each: 56."""
    assert num_buckets(method=method, ratio=ratio) == columns
    assert len(relative_buckets(height=14, width=14, method=method, ratio=ratio).unique()) == reached


@fast
@given(methods, ratios)
def test_tokens_before_the_patches_share_one_bucket(method, ratio):
    counts = [num_buckets(method=method, ratio=ratio, num_prefix=prefix) for prefix in range(4)]
    assert counts == [counts[0]] + 3 * [counts[0] + 1]


def test_49_visible_tokens_of_14_by_14_are_not_a_grid_of_7_by_7():
    whole, small = relative_buckets(height=14, width=14), relative_buckets(height=7, width=7)
    visible = seeded(196).argsort()[:49].sort().values
    found = buckets_of(whole, F.pad(visible + 1, (1, 0)))
    assert found.shape == small.shape
    assert (found != small).double().mean() > 0.5
    for i, j in ((1, 2), (7, 31), (49, 3)):
        (a, b), (c, d) = divmod(int(visible[i - 1]), 14), divmod(int(visible[j - 1]), 14)
        assert found[i, j] == bucket(a - c, b - d, method="product", ratio=1.9)


# What a table adds to attention


@st.composite
def contexts(draw: st.DrawFn, *, square: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries, a table shared by all heads or one per head, and buckets of the whole batch or of each image.

    There are fewer or more keys than buckets, and some buckets are unused.
    """
    batch, heads, k, d = draw(batches), draw(st.integers(1, 3)), draw(st.integers(0, 4)), draw(st.integers(1, 3))
    n, count = k if square else draw(st.integers(0, 6)), draw(st.integers(1, 8))
    seed = draw(st.integers(0, 99))
    shape = draw(st.sampled_from([(), batch]))
    buckets = (seeded(*shape, k, n, seed=seed) * draw(st.integers(1, count))).long()
    table = normal(draw(st.sampled_from([1, heads])), d, count, seed=seed + 1)
    return normal(*batch, heads, k, d, seed=seed + 2), table, buckets


def obvious_bias(queries: Tensor, table: Tensor, buckets: Tensor) -> Tensor:
    """Multiply queries, table and the one-hot encoded bucket of each pair."""
    which = F.one_hot(buckets, table.shape[-1]).to(table.dtype)
    table = table.expand(queries.shape[-3], -1, -1)
    return torch.einsum("...hkd,hdb,...knb->...hkn", queries, table, which)


def obvious_values(weights: Tensor, table: Tensor, buckets: Tensor) -> Tensor:
    """Sum the weighted vectors of all pairs."""
    vectors = table.expand(weights.shape[-3], -1, -1)[:, buckets].movedim(0, -4)
    return (weights.unsqueeze(-1) * vectors).sum(dim=-2)


def with_gradients(call: Any, left: Tensor, table: Tensor, buckets: Tensor) -> tuple[Tensor, ...]:
    """Return the result and its gradients with respect to both inputs."""
    inputs = left.clone().requires_grad_(), table.clone().requires_grad_()
    answer = call(*inputs, buckets)
    weight = normal(*answer.shape, seed=5)
    return answer, *torch.autograd.grad((answer * weight).sum(), inputs)


BOTH_FORMS = relative._bias_by_pair, relative._bias_by_bucket


def close(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@fast
@given(contexts())
def test_a_contextual_bias_is_the_query_times_the_vector_of_the_bucket(arguments):
    close(with_gradients(contextual_bias, *arguments), with_gradients(obvious_bias, *arguments))


@pytest.mark.parametrize("n", [49, 50, 51])
def test_few_and_many_keys_take_two_paths_to_the_same_result(n):
    """With few keys there is one product per query, with many keys a gather."""
    queries, table = normal(2, 3, 5, 4), normal(1, 4, 50, seed=1)
    buckets = (50 * seeded(5, n, seed=2)).long()
    expected = with_gradients(obvious_bias, queries, table, buckets)
    close(with_gradients(contextual_bias, queries, table, buckets), expected)
    close(with_gradients(contextual_bias, queries, table, buckets.expand(2, 5, n)), expected)


@fast
@given(contexts())
def test_vectors_by_pair_and_by_bucket_give_the_same_bias_and_gradients(arguments):
    queries, table, buckets = arguments
    buckets, table = buckets.flatten(0, -3)[0] if buckets.ndim > 2 and buckets.numel() else buckets, table[:1]
    if buckets.ndim == 2:
        forms = [with_gradients(form, queries, table, buckets) for form in BOTH_FORMS]
        close(*forms)


def test_a_gpu_looks_up_vectors_by_pair_for_any_number_of_keys_and_a_cpu_for_few():
    forms = [relative._by_pair(device, (1, 4, 50), (5, n)) for device in ("cuda", "cpu") for n in (50, 51, 197)]
    assert forms == [True, True, True, True, False, False]
    for device in ("cuda", "cpu"):  # neither with a table for each head nor with buckets for each image
        assert not relative._by_pair(device, (3, 4, 50), (5, 7))
        assert not relative._by_pair(device, (1, 4, 50), (2, 5, 7))


def test_the_form_for_a_gpu_is_the_one_for_a_cpu(monkeypatch):
    queries, table, buckets = normal(2, 3, 5, 4), normal(1, 4, 50, seed=1), (50 * seeded(5, 60, seed=2)).long()
    forms, choose = [], relative._by_pair
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(relative, "_by_pair", lambda _, *shapes, device=device: choose(device, *shapes))
        forms.append(with_gradients(contextual_bias, queries, table, buckets))
    close(*forms)


@fast
@given(contexts())
def test_a_shared_table_equals_one_repeated_for_each_head(arguments):
    queries, table, buckets = arguments
    repeated = table[:1].expand(queries.shape[-3], -1, -1)
    close(contextual_bias(queries, table[:1], buckets), contextual_bias(queries, repeated, buckets))
    weights, table = contextual_bias(*arguments), table.mT
    repeated = table[:1].expand(queries.shape[-3], -1, -1)
    close(contextual_values(weights, table[:1], buckets), contextual_values(weights, repeated, buckets))


@st.composite
def tokens_of_grids(draw: st.DrawFn) -> tuple[dict[str, int], Tensor]:
    """Draw a grid with a class token, and a subset of tokens for each image, in any order."""
    grid, batch = {"height": draw(st.integers(1, 4)), "width": draw(st.integers(1, 4))}, draw(batches)
    order = seeded(*batch, 1 + grid["height"] * grid["width"], seed=draw(st.integers(0, 99))).argsort(dim=-1)
    return grid, order[..., : draw(st.integers(0, order.shape[-1]))]


@fast
@given(tokens_of_grids(), st.integers(1, 3))
def test_the_bias_of_a_subset_of_tokens_is_the_submatrix_of_the_bias_of_all(arguments, heads):
    grid, tokens = arguments
    whole, table = relative_buckets(**grid), normal(heads, 3, 50, seed=1)
    queries = normal(*tokens.shape[:-1], heads, len(whole), 3)
    every = contextual_bias(queries, table, whole)
    mine = tokens.unsqueeze(-2).expand(*tokens.shape[:-1], heads, tokens.shape[-1])
    rows_then_columns = take(take(every, mine).mT, mine).mT
    close(contextual_bias(take(queries, mine), table, buckets_of(whole, tokens)), rows_then_columns)


@fast
@given(contexts(square=True))
def test_relative_positions_on_queries_use_the_bucket_of_key_minus_query(arguments):
    keys, table, buckets = arguments
    found = contextual_bias(keys, table, buckets).mT
    which = F.one_hot(buckets.mT, table.shape[-1]).double()  # [query, key] holds the bucket of (key, query)
    table = table.expand(keys.shape[-3], -1, -1)
    close(found, torch.einsum("...hjd,hdb,...ijb->...hij", keys, table, which))


def test_as_attn_mask_the_bias_is_added_before_the_softmax_without_scaling():
    q, k, v = (normal(2, 3, 7, 4, seed=i).requires_grad_() for i in range(3))
    table, buckets = normal(1, 4, 50, seed=3).requires_grad_(), relative_buckets(height=2, width=3)
    added = obvious_bias(q, table, buckets)
    explicit = (q @ k.mT / 2 + added).softmax(dim=-1) @ v
    fused = F.scaled_dot_product_attention(q, k, v, contextual_bias(q, table, buckets))
    close(fused, explicit)
    weight = normal(*fused.shape, seed=4)
    gradients = [torch.autograd.grad((x * weight).sum(), (q, k, v, table)) for x in (fused, explicit)]
    close(*gradients)


def test_scaling_the_queries_is_equivalent_to_scaling_the_table():
    q, table, buckets = normal(2, 3, 7, 4), normal(1, 4, 50, seed=1), relative_buckets(height=2, width=3)
    close(contextual_bias(q / 2, 2 * table, buckets), contextual_bias(q, table, buckets))


@fast
@given(contexts())
def test_contextual_values_are_the_weighted_vectors_of_all_pairs(arguments):
    queries, table, buckets = arguments
    arguments = contextual_bias(queries, table, buckets).softmax(dim=-1), table.mT.contiguous(), buckets
    close(with_gradients(contextual_values, *arguments), with_gradients(obvious_values, *arguments))


@fast
@given(contexts())
def test_unused_buckets_get_zero_gradient(arguments):
    queries, table, buckets = arguments
    unmet = sorted(set(range(table.shape[-1])) - set(buckets.unique().tolist()))
    assert (with_gradients(contextual_bias, *arguments)[2][..., unmet] == 0).all()
    weights = contextual_bias(queries, table, buckets)
    assert (with_gradients(contextual_values, weights, table.mT.contiguous(), buckets)[2][..., unmet, :] == 0).all()


def test_a_table_of_zeros_adds_nothing_and_still_gets_gradients():
    queries, buckets = normal(2, 3, 7, 4), relative_buckets(height=2, width=3)
    bias, of_queries, of_table = with_gradients(contextual_bias, queries, torch.zeros(1, 4, 50).double(), buckets)
    assert (bias == 0).all()
    assert (of_queries == 0).all()
    assert (of_table[..., buckets.unique()] != 0).all()


@fast
@given(contexts())
def test_in_bias_mode_each_pair_gets_the_number_of_its_bucket(arguments):
    _, table, buckets = arguments
    found = relative_bias(table[:, 0], buckets)
    assert found.shape == (*buckets.shape[:-2], len(table), *buckets.shape[-2:])
    for place in torch.cartesian_prod(*map(torch.arange, (*buckets.shape, 1))).tolist():
        *batch, i, j, _ = place
        assert found[(*batch, slice(None), i, j)].equal(table[:, 0, int(buckets[(*batch, i, j)])])


def test_a_small_example_agrees_with_a_calculation_by_hand():
    queries, table = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0, 10.0], [100.0, 1000.0]]])
    buckets = torch.tensor([[0, 1], [1, 1]])
    assert contextual_bias(queries, table, buckets).tolist() == [[[201.0, 2010.0], [4030.0, 4030.0]]]
    assert contextual_values(queries, table, buckets).tolist() == [[[201.0, 2010.0], [700.0, 7000.0]]]
    assert relative_bias(table[:, 0], buckets).tolist() == [[[1.0, 10.0], [10.0, 10.0]]]


def pairs(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("name", "tensors", "numbers", "message"),
    [
        *[
            (
                "piecewise_index",
                [zeros(3)],
                {"alpha": alpha, "beta": beta, "gamma": gamma},
                f"alpha={alpha}, beta={beta} and gamma={gamma} do not satisfy 0 < alpha < beta and alpha < gamma",
            )
            for alpha, beta, gamma in [(0, 1, 8), (-1, 1, 8), (1, 1, 8), (1, 2, 1), (math.nan, 2, 8)]
        ],
        *[
            (name, [], {**grid, **numbers}, message)
            for name, grid in (("num_buckets", {}), ("relative_buckets", {"height": 2, "width": 3}))
            for numbers, message in (
                ({"ratio": 0}, "ratio=0 is not above 0"),
                ({"ratio": -1.9}, "ratio=-1.9 is not above 0"),
                ({"ratio": math.nan}, "ratio=nan is not above 0"),
                ({"num_prefix": -1}, "num_prefix=-1 is negative"),
                (
                    {"method": "cross"},
                    "method=cross is not one of product, rows, columns, euclidean and quantized",
                ),
            )
        ],
        ("relative_buckets", [], {"height": -2, "width": 3}, "a grid of -2 × 3 patches has a negative side"),
        ("relative_buckets", [], {"height": 2, "width": -3}, "a grid of 2 × -3 patches has a negative side"),
        (
            "buckets_of",
            [pairs(2, 3), pairs(2)],
            {},
            "buckets (2, 3) are not square: they need a row and a column per token",
        ),
        (
            "contextual_bias",
            [zeros(3, 4, 5), zeros(2, 5, 9), pairs(4, 4)],
            {},
            "a table (2, 5, 9) is neither for 3 heads nor shared by all",
        ),
        (
            "contextual_bias",
            [zeros(3, 4, 5), zeros(1, 9, 5), pairs(4, 4)],
            {},
            "a table (1, 9, 5) does not hold vectors of 5 features",
        ),
        (
            "contextual_bias",
            [zeros(3, 4, 5), zeros(1, 5, 9), pairs(5, 4)],
            {},
            "buckets (5, 4) and queries (3, 4, 5) do not match",
        ),
        (
            "contextual_bias",
            [zeros(2, 3, 4, 5), zeros(1, 5, 9), pairs(3, 4, 4)],
            {},
            "buckets (3, 4, 4) and queries (2, 3, 4, 5) do not match",
        ),
        (
            "contextual_values",
            [zeros(3, 4, 4), zeros(2, 9, 5), pairs(4, 4)],
            {},
            "a table (2, 9, 5) is neither for 3 heads nor shared by all",
        ),
        (
            "contextual_values",
            [zeros(3, 4, 6), zeros(1, 9, 5), pairs(4, 4)],
            {},
            "buckets (4, 4) and weights (3, 4, 6) do not match",
        ),
        (
            "contextual_values",
            [zeros(2, 3, 4, 4), zeros(1, 9, 5), pairs(1, 4, 4)],
            {},
            "buckets (1, 4, 4) and weights (2, 3, 4, 4) do not match",
        ),
        (
            "relative_bias",
            [zeros(1, 4, 9), pairs(2, 2)],
            {},
            "a table (1, 4, 9) does not hold one number per head and bucket",
        ),
    ],
)
def test_invalid_arguments_raise_one_clear_sentence(name, tensors, numbers, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(copied("relative"), name)(*tensors, **numbers)


@pytest.mark.parametrize("ratio", RATIOS)
def test_numbers_are_computed_in_float64_for_distances_of_float32(ratio):
    alpha, beta, gamma = of_ratio(ratio).values()
    numbers = range(math.ceil(alpha), int(beta))
    steps = [alpha * (gamma / alpha) ** ((number + 0.5 - alpha) / (beta - alpha)) for number in numbers]
    below = above = torch.tensor(steps, dtype=torch.float32)
    for _ in range(3):  # the distances closest to where the number changes
        for distance in (below, above):
            expected = [numbered(x, **of_ratio(ratio)) for x in distance.tolist()]
            assert piecewise_index(distance, **of_ratio(ratio)).tolist() == expected
        below, above = below.nextafter(torch.tensor(0.0)), above.nextafter(torch.tensor(torch.inf))


def test_the_distance_alpha_itself_is_rounded_and_not_limited():
    distance = torch.tensor([-1.7, -1.6, 1.6, 1.7], dtype=torch.float64)
    assert piecewise_index(distance, alpha=1.6, beta=1.7, gamma=9.0).tolist() == [-1, -2, 2, 1]
