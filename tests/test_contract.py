"""The contract that every block fulfills, checked for each row of one table."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from strategies import SOURCES, copied, seeded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# PyTorch warns about the variance of an empty batch
pytestmark = pytest.mark.filterwarnings("ignore:.*degrees of freedom")


@dataclass
class Row:
    """A call of a block: tensors with six rows, arguments without rows, and the dtype of the result for bfloat16.

    Further calls of the same block add words to its name.
    """

    tensors: list[Tensor]
    numbers: dict[str, Any] = field(default_factory=dict)
    half: torch.dtype = torch.bfloat16


images = seeded(6, 3, 4, 6)
tokens = seeded(6, 8, 12)
some = seeded(6, 8, seed=1).argsort(dim=-1)[:, :5]
mask = seeded(6, 8, seed=2).argsort(dim=-1) < 3
buckets = (50 * seeded(6, 5, 5, seed=3)).long()
vectors = (2 * seeded(1, 4, 50, seed=4) - 1).bfloat16().float()

ROWS = {
    "degrade.area_resize": Row([images], {"H": 5, "W": 3}),
    "degrade.central_crop": Row([images], {"H": 2, "W": 4}),
    "degrade.convolve_each": Row([images, seeded(6, 9, 3, 3, seed=1)]),
    "degrade.decolorize": Row([images], {"saturation": 0.3}),
    "degrade.fisheye": Row([images, seeded(6, 3)], {"least_twist": 0.2, "most_twist": 0.25}),
    "degrade.fisheye_at": Row([images, 2 * seeded(6, 2) - 1, seeded(6, seed=1)]),
    "degrade.mirror_fill": Row([images, seeded(6, 2)], {"H": 11, "W": 7}),
    "degrade.paste": Row([images, seeded(6, 3, 7, 8, seed=1), seeded(6, 2)]),
    "degrade.random_kernels": Row([seeded(6, 3, 3)], {"mean": 1 / 9, "std": 0.02}, torch.float32),
    "degrade.random_kernels_any_size": Row(
        [seeded(6, 3, 5, 5), seeded(6)], {"sizes": (3, 5), "std": 0.02}, torch.float32
    ),
    "degrade.wave": Row([images], {"amplitude": 0.1, "frequency": 10.0}),
    "degrade.zoom_in": Row([images], {"window_H": 2, "window_W": 4}),
    "degrade.zoom_in_anywhere": Row([images, seeded(6, 2)], {"window_H": 3, "window_W": 2}),
    "degrade.zoom_out": Row([images, seeded(6, 2)], {"small_H": 3, "small_W": 2}),
    "degrade.zoom_out_any_size": Row([images, seeded(6, 3)], {"sizes": ((2, 3), (3, 6), (4, 2))}),
    "losses.absolute_error": Row([tokens, seeded(6, 8, 12, seed=1)], {}, torch.float32),
    "losses.band_error": Row([images, seeded(6, 3, 4, 6, seed=1)], {"inner_H": 2, "inner_W": 2}, torch.float32),
    "losses.channel_normalized_patches": Row([tokens], {"channels": 3}, torch.float32),
    "losses.cosine_distance": Row([tokens, seeded(6, 8, 12, seed=1)], {}, torch.float32),
    "losses.normalized_patches": Row([tokens], {}, torch.float32),
    "losses.ranking_loss": Row([seeded(6, 8), seeded(6, 8, seed=1)], {}, torch.float32),
    "losses.soft_cross_entropy": Row([tokens, seeded(6, 8, 12, seed=1)], {}, torch.float32),
    "losses.squared_error": Row([tokens, seeded(6, 8, 12, seed=1)], {}, torch.float32),
    "losses.window_normalized": Row([images], {"window": 3}, torch.float32),
    "masking.all_but_block": Row(
        [seeded(6, 2)], {"height": 3, "width": 4, "block_height": 2, "block_width": 1}, torch.bool
    ),
    "masking.disjoint_views": Row([seeded(6, 8)], {"num_visible": 3}, torch.bool),
    "masking.easy_to_hard": Row([seeded(6, 8), seeded(6, 8, seed=1)], {"num_masked": 5, "num_hard": 2}, torch.bool),
    "masking.easy_to_hard scheduled": Row(
        [seeded(6, 8), seeded(6, 8, seed=1)], {"num_masked": 5, "num_hard": torch.tensor(2)}, torch.bool
    ),
    "masking.random_cells": Row(
        [seeded(6, 6)], {"height": 4, "width": 3, "cell_height": 2, "cell_width": 1, "num_masked": 8}, torch.bool
    ),
    "masking.random_tokens": Row([seeded(6, 8)], {"num_masked": 5}, torch.bool),
    "positions.attentive_weights": Row([tokens, seeded(6, 12, seed=1)], {"temperature": 0.1}, torch.float32),
    "positions.drop_positions": Row([tokens, mask, seeded(6, 8, 12, seed=1)]),
    "positions.permute_positions": Row([tokens, mask, seeded(6, 8, seed=1)]),
    "positions.resize_table": Row([tokens], {"height": 2, "width": 4, "new_height": 3, "new_width": 2}),
    "positions.shuffle": Row([seeded(6, 8)], {}, torch.int64),
    "positions.sincos": Row([], {"height": 2, "width": 3, "dim": 8}, torch.float32),
    "positions.sinusoid": Row([], {"height": 2, "width": 3, "dim": 8}, torch.float32),
    "positions.smoothed_targets": Row([3 * seeded(6)], {"height": 2, "width": 3}, torch.float32),
    "relative.buckets_of": Row([some], {"buckets": buckets[0].repeat(2, 2)}, torch.int64),
    "relative.contextual_bias": Row([seeded(6, 2, 5, 4)], {"table": vectors, "buckets": buckets[0]}),
    "relative.contextual_bias of each head": Row(
        [seeded(6, 3, 5, 4), buckets], {"table": vectors.repeat(3, 1, 1) * torch.tensor([1, 2, 4]).view(3, 1, 1)}
    ),
    "relative.contextual_bias of many tokens": Row(
        [seeded(6, 2, 5, 4)], {"table": vectors[..., :3], "buckets": buckets[0] % 3}
    ),
    "relative.contextual_values": Row([seeded(6, 2, 5, 5)], {"table": vectors.transpose(1, 2), "buckets": buckets[0]}),
    "relative.piecewise_index": Row([20 * seeded(6, 4)], {"alpha": 1.9, "beta": 3.8, "gamma": 15.2}, torch.int64),
    "relative.relative_bias": Row([buckets], {"table": vectors[0, :, :]}, torch.float32),
    "relative.relative_buckets": Row([], {"height": 2, "width": 3}, torch.int64),
    "tokens.patchify": Row([images], {"patch": 2}),
    "tokens.put": Row([seeded(6, 5, 12, seed=1), some, tokens]),
    "tokens.split": Row([mask], {"num_masked": 3}, torch.int64),
    "tokens.take": Row([tokens, some]),
    "tokens.take_patches": Row([images, some % 6], {"patch": 2}),
    "tokens.unpatchify": Row([tokens], {"height": 4, "width": 2, "patch": 2}),
    "windows.distinct_anchors": Row([seeded(6, 4), seeded(6, 3, seed=1)], {"num_windows": 3}, torch.int64),
    "windows.random_anchors": Row(
        [seeded(6, 3, 2)], {"height": 6, "width": 5, "window_height": 2, "window_width": 3}, torch.int64
    ),
    "windows.window_patches": Row([some[:, :2]], {"width": 9, "window_height": 2, "window_width": 3}, torch.int64),
}

every_block = pytest.mark.parametrize("name", ROWS)
every_block_of_tensors = pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.tensors])


def function(name: str, *, checked: bool = True) -> Callable[..., Any]:
    """Return the block of a row, with the type checker of the tests or without it, as users have it."""
    theme, name = name.split()[0].split(".")
    return getattr(importlib.import_module(f"mimkit.{theme}") if checked else copied(theme), name)


def by_name(name: str) -> dict[str, Tensor]:
    """Return the tensors of a row by the names of their arguments."""
    places = [place for place in inspect.signature(function(name)).parameters if place not in ROWS[name].numbers]
    return dict(zip(places, ROWS[name].tensors, strict=False))


def block(name: str, *, checked: bool = True) -> Callable[..., tuple[Tensor, ...]]:
    """Return the block with its numbers filled in: a function from tensors to a tuple of tensors."""
    call, numbers = function(name, checked=checked), ROWS[name].numbers
    places = list(by_name(name))

    def results(*tensors: Tensor, **device: str) -> tuple[Tensor, ...]:
        there = {key: x.to(tensors[0].device) if isinstance(x, Tensor) else x for key, x in numbers.items()}
        result = call(**dict(zip(places, tensors, strict=True)), **there, **device)
        return result if isinstance(result, tuple) else (result,)

    return results


def lowered(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in tensors]


def test_every_public_block_has_a_row():
    blocks = set()
    for path in SOURCES:
        module = importlib.import_module(f"mimkit.{path.stem}")
        functions = inspect.getmembers(module, inspect.isfunction)
        own = [
            name
            for name, function in functions
            if function.__module__ == module.__name__ and inspect.signature(function).return_annotation is not int
        ]
        blocks |= {f"{path.stem}.{name}" for name in own if not name.startswith("_")}
    assert blocks == {name.split()[0] for name in ROWS}


@every_block
def test_a_block_is_a_pure_function(name):
    tensors = ROWS[name].tensors
    before, state = [tensor.clone() for tensor in tensors], torch.get_rng_state()
    first = block(name)(*tensors)
    kept = [result.clone() for result in first]
    assert all(a.equal(b) for a, b in zip(kept, block(name)(*tensors), strict=True))
    assert all(a.equal(b) for a, b in zip(kept, first, strict=True))
    assert all(a.equal(b) for a, b in zip(before, tensors, strict=True))
    assert torch.get_rng_state().equal(state)


@every_block_of_tensors
def test_vmap_equals_batching(name):
    tensors = ROWS[name].tensors
    torch.testing.assert_close(torch.func.vmap(block(name))(*tensors), block(name)(*tensors))


@every_block_of_tensors
def test_rows_of_a_batch_are_independent(name):
    tensors = ROWS[name].tensors
    alone = [block(name)(*(tensor[i] for tensor in tensors)) for i in range(6)]
    together = tuple(torch.stack(results) for results in zip(*alone, strict=True))
    torch.testing.assert_close(block(name)(*tensors), together)


@every_block_of_tensors
def test_several_leading_axes_equal_one_flattened_axis(name):
    tensors = ROWS[name].tensors
    results = block(name)(*(tensor.unflatten(0, (2, 3)) for tensor in tensors))
    torch.testing.assert_close(tuple(result.flatten(0, 1) for result in results), block(name)(*tensors))


@every_block_of_tensors
def test_an_empty_batch_gives_an_empty_result(name):
    tensors = ROWS[name].tensors
    results, full = block(name)(*(tensor[:0] for tensor in tensors)), block(name)(*tensors)
    assert [(a.shape, a.dtype) for a in results] == [((0, *b.shape[1:]), b.dtype) for b in full]


@every_block_of_tensors
def test_strides_do_not_matter(name):
    tensors = ROWS[name].tensors
    axes = [range(tensor.ndim)[::-1] for tensor in tensors]
    strided = [t.permute(*back).contiguous().permute(*back) for t, back in zip(tensors, axes, strict=True)]
    assert not any(tensor.is_contiguous() for tensor in strided if tensor.ndim > 1)
    torch.testing.assert_close(block(name)(*strided), block(name)(*tensors))


@every_block
def test_nothing_is_read_back_to_the_host(name):
    tensors = ROWS[name].tensors
    device = {} if tensors else {"device": "meta"}
    results, real = block(name)(*(tensor.to("meta") for tensor in tensors), **device), block(name)(*tensors)
    assert all(result.is_meta for result in results)
    assert [(a.shape, a.dtype) for a in results] == [(b.shape, b.dtype) for b in real]


@every_block
def test_a_block_compiles_in_one_graph(name):
    tensors = ROWS[name].tensors
    torch.compiler.reset()  # so that no block counts as a recompilation of another
    compiled = torch.compile(block(name, checked=False), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), block(name)(*tensors))


@every_block
def test_sizes_and_numbers_may_be_symbolic_in_a_dynamic_graph(name):
    call, tensors, numbers = function(name, checked=False), by_name(name), ROWS[name].numbers
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for size in (6, 4):
        some = {key: tensor[:size] for key, tensor in tensors.items()}
        torch.testing.assert_close(compiled(**some, **numbers), call(**some, **numbers))


@every_block
def test_numbers_make_no_tensor_that_is_copied_to_the_device(name):
    """Such a copy would synchronize in every step. What is made of numbers with `torch.tensor` is lifted to a graph."""

    class Lifted(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found += func is torch.ops.aten.lift_fresh.default
            return func(*args, **(kwargs or {}))

    with Lifted() as lifted:
        block(name)(*ROWS[name].tensors)
    assert lifted.found == 0


class Exportable(nn.Module):
    """Wrap a block as a module, as `torch.export` requires."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.call = block(name, checked=False)

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return self.call(*tensors)


@every_block_of_tensors
def test_an_exported_block_accepts_other_batch_sizes(name):
    tensors, batch = ROWS[name].tensors, torch.export.Dim("batch")
    shapes = ([{0: batch} for _ in tensors],)
    program = torch.export.export(Exportable(name), (tensors,), dynamic_shapes=shapes, strict=False).module()
    for size in (4, 1):
        part = [tensor[:size] for tensor in tensors]
        torch.testing.assert_close(program(part), block(name)(*part))


@every_block
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_mixed_precision_keeps_the_dtype_of_the_input_and_losses_stay_float32(name, autocast):
    tensors, half = ROWS[name].tensors, ROWS[name].half
    exact = [tensor.float() if tensor.is_floating_point() else tensor for tensor in lowered(tensors)]
    expected = block(name)(*exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results, from_half = block(name)(*exact), block(name)(*lowered(exact))
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(from_half, tuple(result.to(half) for result in expected))


def spoiled(value: Any, bad: Any) -> Iterator[tuple[str, Any]]:
    """Yield a number, or the nested numbers of a tuple one at a time, replaced, and the indices of what is replaced."""
    if not isinstance(value, tuple):
        yield "", bad(value)
        return
    for i, part in enumerate(value):
        yield from ((f"[{i}]{rest}", (*value[:i], other, *value[i + 1 :])) for rest, other in spoiled(part, bad))


def integers(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, tuple) and all(map(integers, value)))


@pytest.mark.parametrize("bad", [float, str, lambda _: True, torch.tensor, lambda _: None])
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if any(map(integers, row.numbers.values()))])
def test_a_number_that_is_not_an_integer_is_refused_where_one_is_needed(name, bad):
    call, numbers = function(name, checked=False), ROWS[name].numbers
    for key in filter(lambda key: integers(numbers[key]), numbers):
        for place, other in spoiled(numbers[key], bad):
            if isinstance(other, Tensor) and key == "num_hard":
                continue  # may follow a schedule
            with pytest.raises(ValueError, match=rf"^{re.escape(key + place)}=.* is not an integer$"):
                call(**by_name(name), **(numbers | {key: other}))


def test_integers_of_numpy_are_integers():
    call, noise = function("masking.random_tokens", checked=False), seeded(3, 8)
    assert call(noise, num_masked=np.int64(5)).equal(call(noise, num_masked=5))


def test_all_files_check_integers_in_the_same_way():
    """Each has a copy of the check, because a file works alone."""
    sources = {inspect.getsource(copied(path.stem)._check_integers) for path in SOURCES}
    assert len(sources) == 1


@pytest.mark.parametrize("name", [name for name in ROWS if any("noise" in place for place in by_name(name))])
def test_noise_without_axes_is_refused_with_one_sentence(name):
    for place in by_name(name):
        if "noise" in place:
            call = function(name, checked=False)
            with pytest.raises(ValueError, match=r"0-d|\(\)"):
                call(**(by_name(name) | {place: torch.tensor(0.5)}), **ROWS[name].numbers)
    if not name.startswith("degrade."):  # nor has anything else an axis
        alone = {place: tensor.flatten()[0] for place, tensor in by_name(name).items()}
        with pytest.raises(ValueError, match=r"0-d|\(\)"):
            function(name, checked=False)(**alone, **ROWS[name].numbers)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, -0.5, -1e30, -torch.inf, torch.inf, 1.0, 1e30])
@pytest.mark.parametrize("name", [name for name in ROWS if any("noise" in place for place in by_name(name))])
def test_noise_out_of_range_never_gives_another_count_or_a_place_outside(name, bad):
    """Counts are the same in every row, permutations are complete, and nothing is read out of place."""
    tensors = by_name(name)
    noises = [place for place in tensors if "noise" in place]
    good = block(name)(*tensors.values())
    for some in (slice(None), slice(0, 1)):  # all noise, or one value of each row
        other = {place: tensor.clone() for place, tensor in tensors.items()}
        for place in noises:
            other[place][..., some] = bad
        for one, expected in zip(block(name)(*other.values()), good, strict=True):
            assert one.shape == expected.shape
            if one.dtype == torch.bool:
                assert one.sum(dim=-1).equal(expected.sum(dim=-1))
            elif name == "positions.shuffle":
                assert one.sort().values.equal(expected.sort().values)
            elif name == "windows.distinct_anchors":
                assert all(len(set(column.tolist())) == one.shape[-2] for row in one for column in row.T)
            if one.dtype == torch.int64:
                assert one.min() >= 0
            if name == "windows.random_anchors":
                assert (one <= torch.tensor([4, 2])).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_the_hardest_tokens_are_masked_whatever_the_noise(bad):
    difficulty = seeded(6, 8, seed=1)
    mask = function("masking.easy_to_hard")(difficulty, torch.full((6, 8), bad), num_masked=5, num_hard=3)
    assert mask.gather(-1, difficulty.topk(3).indices).all()


@pytest.mark.parametrize("num_hard", [torch.tensor(2.0), torch.tensor(True), torch.tensor([2])])
def test_a_scheduled_count_is_a_single_integer(num_hard):
    call = function("masking.easy_to_hard", checked=False)
    with pytest.raises(ValueError, match=r"^num_hard, torch\.\w+ of shape \(1?,?\), is not a single integer$"):
        call(seeded(6, 8), seeded(6, 8), num_masked=5, num_hard=num_hard)
