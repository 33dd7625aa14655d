"""The contract that every block fulfills, checked for each row of one table."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from strategies import SOURCES, copied, seeded
from torch import Tensor, nn

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


def block(name: str, *, checked: bool = True) -> Callable[..., tuple[Tensor, ...]]:
    """Return the block with its numbers filled in: a function from tensors to a tuple of tensors."""
    theme, function = name.split()[0].split(".")
    call = getattr(importlib.import_module(f"mimkit.{theme}") if checked else copied(theme), function)
    numbers = ROWS[name].numbers
    places = [parameter for parameter in inspect.signature(call).parameters if parameter not in numbers]

    def results(*tensors: Tensor, **device: str) -> tuple[Tensor, ...]:
        there = {key: x.to(tensors[0].device) if isinstance(x, Tensor) else x for key, x in numbers.items()}
        result = call(**dict(zip(places, tensors, strict=False)), **there, **device)
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


@pytest.mark.parametrize("name", ["degrade.random_kernels", "degrade.wave", "degrade.zoom_out_any_size"])
def test_numbers_may_be_symbolic_in_a_dynamic_graph(name):
    """Only these blocks compute with their numbers before they reach a tensor."""
    tensors = ROWS[name].tensors
    torch.compiler.reset()
    compiled = torch.compile(block(name, checked=False), fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), block(name)(*tensors))


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
