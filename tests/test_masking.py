"""Mask samplers: the exact number of masked tokens, the role of the noise, and the frequency of each token."""

import itertools
import re

from mimkit.masking import all_but_block, disjoint_views, easy_to_hard, random_cells, random_tokens

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    copied,
    easy_to_hard_arguments,
    fast,
    intervals,
    noise_and_count,
    rows,
    seeded,
    uniforms,
    uniforms_like,
)
from torch import Tensor


@fast
@given(noise_and_count())
def test_random_tokens_masks_exactly_num_masked(arguments):
    noise, num_masked = arguments
    mask = random_tokens(noise, num_masked=num_masked)
    assert mask.shape == noise.shape
    assert (mask.sum(dim=-1) == num_masked).all()


@fast
@given(noise_and_count())
def test_random_tokens_masks_the_largest_noise_and_breaks_ties_by_position(arguments):
    noise, num_masked = arguments
    n = noise.shape[-1]
    mask = random_tokens(noise, num_masked=num_masked)
    for values, masked in zip(rows(noise), rows(mask), strict=True):
        order = sorted(range(n), key=values.tolist().__getitem__)
        assert masked.nonzero().flatten().tolist() == sorted(order[n - num_masked :])


@fast
@given(noise_and_count())
def test_masked_tokens_stay_masked_when_num_masked_grows(arguments):
    noise, num_masked = arguments
    more = random_tokens(noise, num_masked=noise.shape[-1] - num_masked // 2)
    fewer = random_tokens(noise, num_masked=(noise.shape[-1] - num_masked // 2) // 2)
    assert (more | ~fewer).all()


@fast
@given(st.permutations(range(7)), st.integers(0, 7))
def test_random_tokens_is_permutation_equivariant_if_the_noise_has_no_ties(order, num_masked):
    noise = torch.arange(7) / 7
    shuffled = random_tokens(noise[list(order)], num_masked=num_masked)
    assert shuffled.equal(random_tokens(noise, num_masked=num_masked)[list(order)])


def assert_every_pair_is_masked_equally_often(mask: Tensor, num_masked: int) -> None:
    draws, n = mask.shape
    together = mask.double().T @ mask.double() / draws
    once, twice = num_masked / n, num_masked * (num_masked - 1) / (n * (n - 1))
    expected = torch.full((n, n), twice, dtype=torch.float64).fill_diagonal_(once)
    # 4.5 standard deviations
    assert (together - expected).abs().div((expected * (1 - expected) / draws).sqrt()).max() < 4.5


def test_random_tokens_masks_every_pair_equally_often():
    assert_every_pair_is_masked_equally_often(random_tokens(seeded(30_000, 6), num_masked=2), 2)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Tensor, dict[str, int]]:
    """Draw noise and a block that fits into a grid; either may be empty."""
    (height, block_height), (width, block_width) = draw(intervals(least=0)), draw(intervals(least=0))
    grid = {"height": height, "width": width, "block_height": block_height, "block_width": block_width}
    return draw(uniforms(2)), grid


@fast
@given(blocks())
def test_all_but_block_leaves_one_block_visible_at_the_place_given_by_the_noise(arguments):
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
def test_the_largest_noise_puts_the_block_in_the_last_corner(arguments):
    _, grid = arguments
    last = all_but_block(torch.full((2,), 1 - 2**-24), **grid)
    # the largest noise rounds to 1 in bfloat16
    assert all_but_block(torch.ones(2, dtype=torch.bfloat16), **grid).equal(last)
    assert all_but_block(torch.zeros(2), **grid).equal(last.flip(0))


def test_the_place_of_the_block_is_not_rounded_in_bfloat16():
    noise = torch.arange(256).view(-1, 1).expand(-1, 2) / 256
    grid = {"height": 1, "width": 200, "block_height": 1, "block_width": 1}
    assert all_but_block(noise.bfloat16(), **grid).equal(all_but_block(noise, **grid))


def test_every_place_of_the_visible_block_is_equally_likely():
    draws, height, width = 20_000, 5, 4
    visible = ~all_but_block(seeded(draws, 2), height=height, width=width, block_height=2, block_width=3)
    # the first visible token is the top left corner of the block: 4 × 2 places
    counts = visible.int().argmax(dim=-1).bincount(minlength=height * width).view(height, width)
    places = counts[:4, :2].double()
    assert places.sum() == draws
    # 4.5 standard deviations
    assert (places - draws / 8).abs().max() < 4.5 * (draws * 1 / 8 * 7 / 8) ** 0.5


@fast
@given(easy_to_hard_arguments())
def test_easy_to_hard_masks_exactly_num_masked(arguments):
    difficulty, noise, count = arguments
    mask = easy_to_hard(difficulty, noise, **count)
    assert mask.shape == noise.shape
    assert (mask.sum(dim=-1) == count["num_masked"]).all()


@fast
@given(easy_to_hard_arguments())
def test_easy_to_hard_masks_the_hardest_tokens_and_of_the_others_those_with_the_largest_noise(arguments):
    difficulty, noise, count = arguments
    n, num_masked, num_hard = noise.shape[-1], *count.values()
    mask = easy_to_hard(difficulty, noise, **count)
    for loss, chance, masked in zip(rows(difficulty), rows(noise), rows(mask), strict=True):
        ascending = sorted(range(n), key=loss.tolist().__getitem__)
        forced = ascending[n - num_hard :]
        permutation = sorted(set(range(n)) - set(forced), key=chance.tolist().__getitem__)
        visible = permutation[: n - num_masked]
        assert (~masked).nonzero().flatten().tolist() == sorted(visible)


@fast
@given(easy_to_hard_arguments())
def test_the_num_hard_patches_with_the_largest_predicted_loss_are_masked(arguments):
    difficulty, noise, count = arguments
    masked = difficulty.where(easy_to_hard(difficulty, noise, **count), -torch.inf)
    hardest = difficulty.sort(descending=True).values[..., : count["num_hard"]]
    assert masked.sort(descending=True).values[..., : count["num_hard"]].equal(hardest)


@fast
@given(easy_to_hard_arguments())
def test_negated_difficulty_masks_the_easiest_tokens(arguments):
    difficulty, noise, count = arguments
    masked = difficulty.where(easy_to_hard(-difficulty, noise, **count), torch.inf)
    assert masked.sort().values[..., : count["num_hard"]].equal(difficulty.sort().values[..., : count["num_hard"]])


@fast
@given(easy_to_hard_arguments())
def test_without_hard_patches_the_mask_is_purely_random(arguments):
    difficulty, noise, count = arguments
    mask = easy_to_hard(difficulty, noise, num_masked=count["num_masked"], num_hard=0)
    assert mask.equal(random_tokens(noise, num_masked=count["num_masked"]))


@fast
@given(easy_to_hard_arguments(), st.data())
def test_noise_does_not_matter_if_all_masked_patches_are_chosen_by_difficulty(arguments, data):
    difficulty, noise, count = arguments
    count["num_hard"] = count["num_masked"]
    other = data.draw(uniforms_like(noise))
    assert easy_to_hard(difficulty, noise, **count).equal(easy_to_hard(difficulty, other, **count))


@fast
@given(easy_to_hard_arguments())
def test_only_the_order_of_the_difficulties_matters(arguments):
    difficulty, noise, count = arguments
    places = difficulty.unique(return_inverse=True)[1].float()  # ties share a rank
    assert easy_to_hard(places.exp() - 9, noise, **count).equal(easy_to_hard(difficulty, noise, **count))


@fast
@given(easy_to_hard_arguments())
def test_the_noise_of_the_hardest_tokens_does_not_matter(arguments):
    difficulty, noise, count = arguments
    forced = easy_to_hard(difficulty, noise, num_masked=count["num_hard"], num_hard=count["num_hard"])
    mask = easy_to_hard(difficulty, noise, **count)
    for least in (0.0, 1 - 2**-24):
        assert easy_to_hard(difficulty, noise.where(~forced, least), **count).equal(mask)


@fast
@given(easy_to_hard_arguments(), st.sampled_from([torch.int8, torch.int32, torch.int64]))
def test_num_hard_may_be_a_number_or_a_tensor(arguments, dtype):
    difficulty, noise, count = arguments
    scheduled = count | {"num_hard": torch.tensor(count["num_hard"], dtype=dtype)}
    assert easy_to_hard(difficulty, noise, **scheduled).equal(easy_to_hard(difficulty, noise, **count))


@fast
@given(easy_to_hard_arguments(), st.sampled_from([torch.int8, torch.int64]), st.data())
def test_a_tensor_out_of_range_acts_like_the_nearest_bound(arguments, dtype, data):
    difficulty, noise, count = arguments
    few, many = (data.draw(st.integers(*ends)) for ends in [(-128, -1), (count["num_masked"] + 1, 127)])
    limits = torch.iinfo(dtype)
    for end, values in {0: [few, limits.min], count["num_masked"]: [many, limits.max]}.items():
        mask = easy_to_hard(difficulty, noise, **count | {"num_hard": end})
        for value in values:
            beyond = count | {"num_hard": torch.tensor(value, dtype=dtype)}
            assert easy_to_hard(difficulty, noise, **beyond).equal(mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [0.0, 1 - 2**-24])  # the largest noise rounds to 1 in bfloat16
def test_the_hardest_tokens_are_masked_even_if_all_noise_is_equal(dtype, level):
    difficulty, noise = torch.tensor([3.0, 0.0, 2.0, 1.0, 0.0]), torch.full((5,), level, dtype=dtype)
    mask = easy_to_hard(difficulty, noise, num_masked=3, num_hard=2)
    assert mask.tolist() == [True, False, True, False, True]


def test_following_a_schedule_does_not_recompile():
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(copied("masking").easy_to_hard, fullgraph=True, backend=backend)
    difficulty, noise = seeded(2, 8), seeded(2, 8, seed=1)
    for num_hard in range(6):
        count = {"num_masked": 5, "num_hard": torch.tensor(num_hard)}
        assert compiled(difficulty, noise, **count).equal(easy_to_hard(difficulty, noise, **count))
    assert len(graphs) == 1


def test_the_random_part_of_the_mask_is_uniform_over_the_remaining_patches():
    difficulty, forced = torch.tensor([0.1, 0.8, 0.3, 0.9, 0.4, 0.2, 0.0]), [1, 3]
    mask = easy_to_hard(difficulty.expand(30_000, 7), seeded(30_000, 7), num_masked=4, num_hard=2)
    assert mask[:, forced].all()
    others = [i for i in range(7) if i not in forced]
    assert_every_pair_is_masked_equally_often(mask[:, others], 2)


GRID = {"height": 2, "width": 3, "block_height": 1, "block_width": 1}


@pytest.mark.parametrize(
    ("name", "shapes", "numbers", "message"),
    [
        ("random_tokens", [(4,)], {"num_masked": 5}, "num_masked=5 of 4 tokens cannot be masked"),
        ("random_tokens", [(4,)], {"num_masked": -1}, "num_masked=-1 of 4 tokens cannot be masked"),
        (
            "all_but_block",
            [(4, 3)],
            GRID,
            "noise of shape (4, 3) does not end in 2: a value for the row and one for the column",
        ),
        ("all_but_block", [(2,)], GRID | {"block_height": 3}, "a block of 3 × 1 does not fit into a grid of 2 × 3"),
        ("all_but_block", [(2,)], GRID | {"block_height": -1}, "a block of -1 × 1 does not fit into a grid of 2 × 3"),
        ("all_but_block", [(2,)], GRID | {"block_width": 4}, "a block of 1 × 4 does not fit into a grid of 2 × 3"),
        ("all_but_block", [(2,)], GRID | {"block_width": -1}, "a block of 1 × -1 does not fit into a grid of 2 × 3"),
        *(
            ("easy_to_hard", shapes, {"num_masked": 2, "num_hard": 1}, f"difficulty {a} and noise {b} differ in shape")
            for shapes in [((4,), (3,)), ((3, 4), (4,)), ((4,), (1, 4))]
            for a, b in [shapes]
        ),
        *(
            (
                "easy_to_hard",
                [(4,), (4,)],
                {"num_masked": count, "num_hard": 0},
                f"num_masked={count} of 4 tokens cannot be masked",
            )
            for count in (-1, 5)
        ),
        *(
            (
                "easy_to_hard",
                [(4,), (4,)],
                {"num_masked": 2, "num_hard": count},
                f"num_hard={count} is not between 0 and num_masked=2",
            )
            for count in (-1, 3)
        ),
    ],
)
def test_invalid_arguments_raise_one_clear_sentence(name, shapes, numbers, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(copied("masking"), name)(*map(torch.zeros, shapes), **numbers)


@st.composite
def cells(draw: st.DrawFn) -> tuple[Tensor, dict[str, int]]:
    """Draw noise for up to 3 × 3 cells of up to 3 × 3 patches, the sizes, and how many tokens to mask."""
    (rows, columns), (cell_height, cell_width) = ((draw(st.integers(i, 3)), draw(st.integers(i, 3))) for i in (0, 1))
    grid = {"height": rows * cell_height, "width": columns * cell_width}
    grid |= {"cell_height": cell_height, "cell_width": cell_width}
    num_masked = draw(st.integers(0, rows * columns)) * cell_height * cell_width
    return draw(uniforms(rows * columns)), grid | {"num_masked": num_masked}


@fast
@given(cells())
def test_random_cells_masks_all_tokens_of_the_cells_that_random_tokens_would_mask(arguments):
    noise, grid = arguments
    height, width, cell_height, cell_width, num_masked = grid.values()
    mask = random_cells(noise, **grid)
    assert mask.shape == (*noise.shape[:-1], height * width)
    chosen = random_tokens(noise, num_masked=num_masked // (cell_height * cell_width))
    for place, (i, j) in enumerate(itertools.product(range(height), range(width))):
        cell = i // cell_height * (width // cell_width) + j // cell_width
        assert mask[..., place].equal(chosen[..., cell])


@fast
@given(noise_and_count())
def test_disjoint_views_show_the_smallest_noise_the_first_view_before_the_second(arguments):
    noise, num_visible = arguments
    n = noise.shape[-1]
    first, second = disjoint_views(noise, num_visible=num_visible)
    assert first.equal(random_tokens(noise, num_masked=n - num_visible))
    assert (first & second).equal(random_tokens(noise, num_masked=max(0, n - 2 * num_visible)))
    assert (first | second).all()


CELLS = {"height": 4, "width": 6, "cell_height": 2, "cell_width": 3, "num_masked": 12}
TOKENS = CELLS | {"cell_height": 1, "cell_width": 1}


@pytest.mark.parametrize(
    ("name", "n", "numbers", "message"),
    [
        *(
            (
                "random_cells",
                n,
                CELLS | change,
                "a grid of {height} × {width} is not made of cells of {cell_height} × {cell_width}".format(
                    **CELLS | change
                ),
            )
            for n, change in [
                (4, {"height": 5}),
                (4, {"width": 7}),
                (4, {"cell_height": 0}),
                (4, {"cell_width": 0}),
                (4, {"cell_height": -2}),
                (4, {"cell_width": -3}),
                (4, {"height": -4, "width": -6}),
                (0, {"height": -2, "width": 0, "num_masked": 0}),
                (0, {"height": 0, "width": -3, "num_masked": 0}),
                (0, {"height": -1, "width": 0, "cell_height": 1, "num_masked": 0}),
                (0, {"height": 0, "width": -1, "cell_width": 1, "num_masked": 0}),
            ]
        ),
        *(
            ("random_cells", n, CELLS, f"noise of shape ({n},) does not have one value for each of 2 × 2 cells")
            for n in (1, 3, 5)
        ),
        *(
            ("random_cells", 4, CELLS | {"num_masked": k}, f"num_masked={k} of 24 tokens are not whole cells of 6")
            for k in (-6, 7, 30)
        ),
        *(
            ("random_cells", 24, TOKENS | {"num_masked": k}, f"num_masked={k} of 24 tokens are not whole cells of 1")
            for k in (-1, 25)
        ),
        *(("disjoint_views", 4, {"num_visible": k}, f"num_visible={k} of 4 tokens cannot be visible") for k in (-1, 5)),
    ],
)
def test_invalid_cells_and_views_raise_one_clear_sentence(name, n, numbers, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(copied("masking"), name)(torch.zeros(n), **numbers)
