"""LUT on SimMIM: what is said of our construction."""

from dataclasses import replace
from typing import Any

from common.data.normalize import Normalize
from mimkit.tokens import patchify

import lut_simmim
import pytest
import simmim
import torch
from torch import Tensor


def build(**settings: Any) -> tuple[lut_simmim.LUTSimMIM, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """A small one of 8 × 8 patches in 4 × 4 cells, views and noise for five images."""
    torch.manual_seed(0)
    method = lut_simmim.LUTSimMIM(replace(lut_simmim.PRESETS["digits"], **settings), Normalize([0.5], [0.5])).train()
    generator = torch.Generator().manual_seed(0)
    first, second = (255 * torch.rand(2, 5, 1, 32, 32, generator=generator)).to(torch.uint8)
    return method, (first, second), method.noise(lambda *shape: torch.rand(*shape, generator=generator), 5)


START = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize(("ratio", "first", "second"), [(0.6, 6, 6), (0.3, 11, 5), (0.9, 1, 1)])
def test_no_cell_is_visible_in_both_views_and_the_counts_are_fixed(ratio: float, first: int, second: int) -> None:
    method, _, noise = build(mask_ratio=ratio)
    (mask, visible, masked), (other_mask, others, _) = method.masks(noise)
    assert not (~mask & ~other_mask).any()
    assert visible.shape == (5, 4 * first)
    assert others.shape == (5, 4 * second)
    assert visible.shape[1] + masked.shape[1] == 64
    for view in (mask, other_mask):  # whole cells of 2 × 2 patches
        cells = view.view(5, 4, 2, 4, 2).transpose(2, 3).flatten(-2)
        assert (cells.all(dim=-1) == cells.any(dim=-1)).all()


def test_the_pixels_are_simmims_on_the_first_view() -> None:
    method, views, noise = build(drop_path=0.0)
    alone = simmim.SimMIM(replace(simmim.PRESETS["digits"], drop_path=0.0), Normalize([0.5], [0.5]))
    alone.encoder.load_state_dict(method.encoder.state_dict())
    assert method.head is not None
    alone.head.load_state_dict(method.head.state_dict())
    pixels = alone(views[0], {"mask": noise["mask"]}, START)["loss"]
    losses = method(views, noise, START)
    torch.testing.assert_close(losses["pixels"], pixels)
    torch.testing.assert_close(losses["loss"], pixels + 0.25 * losses["context"])


def test_what_is_masked_tells_the_context_nothing() -> None:
    method, (first, second), noise = build(drop_path=0.0)
    (mask, _, _), _ = method.masks(noise)
    pixels = mask.view(5, 1, 8, 1, 8, 1).expand(-1, -1, -1, 4, -1, 4).reshape(5, 1, 32, 32)
    points: list[Tensor] = []
    method.projector.register_forward_pre_hook(lambda _, given: points.append(given[0]))
    for changed in (first, torch.where(pixels, 255 - first, first)):
        method((changed, second), noise, START)
    torch.testing.assert_close(points[0], points[2])  # two calls a step: the first view, then the second


def test_with_the_context_alone_there_is_no_head_and_every_other_weight_learns() -> None:
    method, views, noise = build(loss="context")
    losses = method(views, noise, START)
    assert "pixels" not in losses
    losses["loss"].backward()
    trained = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    assert not any(name.startswith("head.") for name in trained)
    assert [name for name, gradient in trained.items() if gradient is None] == []
    assert not any(p.requires_grad for p in method.teacher.parameters())


def test_the_teacher_sees_every_patch_of_both_views_and_no_mask_token() -> None:
    method, views, noise = build(drop_path=0.0)
    seen: list[Tensor] = []
    projected: list[Tensor] = []
    method.teacher[0].register_forward_hook(lambda _, given, __: seen.append(given[0]))
    method.teacher[1].register_forward_hook(lambda *args: projected.append(args[-1]))
    assert method(views, noise, START)["context"].isfinite()
    patches = [patchify(method.normalize(view), patch=method.patch) for view in views]
    assert seen[0].equal(torch.cat(patches))
    with torch.no_grad():
        method.teacher.get_parameter("0.mask_token").add_(1.0)
    method(views, noise, START)
    torch.testing.assert_close(projected[1], projected[0])
    assert not method.teacher.training
