"""Blocks beside the obvious loop: the whole batch at once against one image after the other.

    pip install -e .[recipes]
    python benchmarks/blocks.py
    python benchmarks/blocks.py --only fisheye blur --rounds 15

Each row compares a block with what one would write for a single image, in a loop whose results are stacked. Both get
the same tensors, random numbers too, and must give the same result (within the row's tolerance) before anything is
timed. One thread and processor time, so that other programs disturb little. Each round runs both once, in random order;
a ratio is that of two times of one round, above 1 where the block is faster.

Freed memory is kept, as in the recipes. Returned to the system instead, a batch of 64, 38 MB, and each intermediate
result of its size would cost 9,400 page faults, as long as the quicker blocks take; a loop's small results would not.

A row also says whether the block is one graph (it compiles with `fullgraph=True` and then gives the same result) and
whether it runs without reading anything back to the host (it does on the meta device, where there is nothing to read).

Another block is another `yield` in `comparisons`.

A second table has the blocks of HPM and DropPos beside the obvious form of their formulas, most of which take the batch
at once as well, so that memory counts: `most MB` is the greatest sum of bytes of tensors that live at a time, `kept MB`
what is kept for the backward pass, which is part of the row then. Another one is another `yield` in `pairs`.
"""

import math
import random
import statistics
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # recipes are scripts beside this folder, not a package

import common  # noqa: F401  it says where torch, not loaded yet, gets its memory
from mimkit.degrade import (
    convolve_each,
    decolorize,
    fisheye,
    mirror_fill,
    paste,
    random_kernels,
    random_kernels_any_size,
    wave,
    zoom_in,
    zoom_in_anywhere,
    zoom_out,
    zoom_out_any_size,
)
from mimkit.losses import ranking_loss
from mimkit.masking import easy_to_hard, random_tokens
from mimkit.positions import drop_positions, smoothed_targets

import matplotlib.colors
import numpy as np
import plain
import scipy.ndimage
import torch
import torch.nn.functional as F
import tyro
from measuring import chosen_device, in_rounds, kept_storages, print_circumstances, seconds_of
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Settings:
    only: tuple[str, ...] = ()
    """rows whose name contains one of these words; none: all"""
    images: int = 64
    """images per batch"""
    size: tuple[int, int] = (224, 224)
    """their height and width in pixels"""
    rounds: int = 9
    """each runs both sides of a row once; take 15 or more for differences below 10 %"""


@dataclass(frozen=True)
class Comparison:
    name: str
    peer: str
    ours: Callable[..., Tensor]
    one: Callable[..., Tensor]  # for the tensors of one image, without a batch axis
    tensors: tuple[Tensor, ...]
    tolerance: float = 1e-5

    def theirs(self, *tensors: Tensor) -> Tensor:
        return torch.stack([self.one(*parts) for parts in zip(*tensors, strict=True)])


def comparisons(settings: Settings) -> Iterator[Comparison]:
    """Every row, with its tensors."""
    count, (H, W), c, generator = settings.images, settings.size, 3, torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    images = noise(c, H, W)
    h, w = H * 5 // 14 * 2, W * 5 // 14 * 2  # 160 of 224; even margins
    window = {"window_H": h, "window_W": w}
    sizes = tuple((H * part // 7, W * part // 7) for part in (3, 4, 5, 6))  # 96, 128, 160 and 192 of 224

    yield Comparison(
        "zoom_in", "slice, interpolate", partial(zoom_in, **window), partial(zoom_in_one, **window), (images,)
    )
    yield Comparison(
        "zoom_in_anywhere",
        "slice, interpolate",
        partial(zoom_in_anywhere, **window),
        partial(zoom_in_anywhere_one, **window),
        (images, noise(2)),
    )
    small = F.interpolate(images, (h, w), mode="area")
    yield Comparison(
        "mirror_fill", "numpy.pad", partial(mirror_fill, H=H, W=W), partial(mirror_one, H=H, W=W), (small, noise(2))
    )
    yield Comparison(
        "zoom_out",
        "interpolate, numpy.pad",
        partial(zoom_out, small_H=h, small_W=w),
        partial(zoom_out_one, small_H=h, small_W=w),
        (images, noise(2)),
    )
    yield Comparison(
        "zoom_out_any_size",
        "interpolate, numpy.pad",
        partial(zoom_out_any_size, sizes=sizes),
        partial(zoom_out_any_size_one, sizes=sizes),
        (images, noise(3)),
    )
    yield Comparison("paste", "clone, slice", paste, paste_one, (small, images, noise(2)))
    twists = {"least_twist": 0.2, "most_twist": 0.25}
    for peer, one in {"grid_sample": fisheye_one, "scipy map_coordinates": fisheye_scipy}.items():
        yield Comparison("fisheye", peer, partial(fisheye, **twists), partial(one, **twists), (images, noise(3)), 1e-4)
    shape = {"amplitude": 0.1, "frequency": 10.0}
    yield Comparison("wave", "grid_sample", partial(wave, **shape), partial(wave_one, **shape), (images,), 1e-4)
    for k in (5, 7, 9, 11):
        kernels = random_kernels(noise(c, k, k), mean=k**-2, std=0.02)
        yield Comparison(f"blur {k} × {k}", "conv2d", convolve_each, blur_one, (images, kernels))
    shape = {"sizes": (5, 7, 9, 11), "std": 0.02}
    yield Comparison(
        "blur any size",
        "conv2d",
        partial(blur_any_size, **shape),
        partial(blur_any_size_one, **shape),
        (images, noise(c, 11, 11), noise()),
    )
    for k in (5, 9):
        kernels = random_kernels(noise(c * c, k, k), mean=k**-2, std=0.02)
        yield Comparison(f"blur, mix {k} × {k}", "conv2d", convolve_each, mix_one, (images, kernels), 1e-4)
    for peer, one in {"max, lerp": decolorize_one, "matplotlib HSV": decolorize_hsv}.items():
        yield Comparison(
            "decolorize", peer, partial(decolorize, saturation=0.3), partial(one, saturation=0.3), (images,)
        )


def blur_any_size(images: Tensor, noise: Tensor, size: Tensor, *, sizes: tuple[int, ...], std: float) -> Tensor:
    return convolve_each(images, random_kernels_any_size(noise, size, sizes=sizes, std=std))


# One image at a time, as one would write it


def whole(noise: Tensor, most: int) -> int:
    return min(int(noise * (most + 1)), most)


def resize_one(image: Tensor, H: int, W: int) -> Tensor:
    return F.interpolate(image[None], (H, W), mode="area")[0]


def zoom_in_one(image: Tensor, *, window_H: int, window_W: int) -> Tensor:
    H, W = image.shape[1:]
    top, left = (H - window_H) // 2, (W - window_W) // 2
    return resize_one(image[:, top : top + window_H, left : left + window_W], H, W)


def zoom_in_anywhere_one(image: Tensor, noise: Tensor, *, window_H: int, window_W: int) -> Tensor:
    H, W = image.shape[1:]
    top, left = whole(noise[0], H - window_H), whole(noise[1], W - window_W)
    return resize_one(image[:, top : top + window_H, left : left + window_W], H, W)


def mirror_one(image: Tensor, noise: Tensor, *, H: int, W: int) -> Tensor:
    h, w = image.shape[1:]
    top, left = whole(noise[0], H - h), whole(noise[1], W - w)
    margins = ((0, 0), (top, H - h - top), (left, W - w - left))
    return torch.from_numpy(np.pad(image.numpy(), margins, mode="symmetric"))


def zoom_out_one(image: Tensor, noise: Tensor, *, small_H: int, small_W: int) -> Tensor:
    H, W = image.shape[1:]
    return mirror_one(resize_one(image, small_H, small_W), noise, H=H, W=W)


def zoom_out_any_size_one(image: Tensor, noise: Tensor, *, sizes: tuple[tuple[int, int], ...]) -> Tensor:
    small_H, small_W = sizes[whole(noise[2], len(sizes) - 1)]
    return zoom_out_one(image, noise, small_H=small_H, small_W=small_W)


def paste_one(image: Tensor, canvas: Tensor, noise: Tensor) -> Tensor:
    (h, w), (H, W) = image.shape[1:], canvas.shape[1:]
    top, left = whole(noise[0], H - h), whole(noise[1], W - w)
    canvas = canvas.clone()
    canvas[:, top : top + h, left : left + w] = image
    return canvas


def fisheye_grid(image: Tensor, noise: Tensor, least_twist: float, most_twist: float) -> Tensor:
    H, W = image.shape[1:]
    row, column = (2 * noise[:2] - 1).tolist()
    twist = least_twist + (most_twist - least_twist) * float(noise[2])
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij")
    down, right = row - rows, column - columns
    distance = (down**2 + right**2).sqrt()
    return torch.stack([columns + twist * distance * right, rows + twist * distance * down], dim=-1)


def fisheye_one(image: Tensor, noise: Tensor, *, least_twist: float, most_twist: float) -> Tensor:
    grid = fisheye_grid(image, noise, least_twist, most_twist)
    return F.grid_sample(image[None], grid[None], align_corners=True)[0]


def fisheye_scipy(image: Tensor, noise: Tensor, *, least_twist: float, most_twist: float) -> Tensor:
    H, W = image.shape[1:]
    columns, rows = fisheye_grid(image, noise, least_twist, most_twist).numpy().transpose(2, 0, 1)
    places = (rows + 1) / 2 * (H - 1), (columns + 1) / 2 * (W - 1)
    planes = [scipy.ndimage.map_coordinates(plane, places, order=1, mode="grid-constant") for plane in image.numpy()]
    return torch.from_numpy(np.stack(planes))


def wave_one(image: Tensor, *, amplitude: float, frequency: float) -> Tensor:
    H, W = image.shape[1:]
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij")
    grid = torch.stack([columns, rows + amplitude * torch.cos(frequency * columns)], dim=-1)
    return F.grid_sample(image[None], grid[None], padding_mode="reflection", align_corners=True)[0]


def blur_one(image: Tensor, kernels: Tensor) -> Tensor:
    return F.conv2d(image[None], kernels[:, None], padding=kernels.shape[-1] // 2, groups=len(image))[0]


def mix_one(image: Tensor, kernels: Tensor) -> Tensor:
    kernels = kernels.unflatten(0, (len(image), len(image)))
    return F.conv2d(image[None], kernels, padding=kernels.shape[-1] // 2)[0]


def blur_any_size_one(image: Tensor, noise: Tensor, size: Tensor, *, sizes: tuple[int, ...], std: float) -> Tensor:
    k = sizes[whole(size, len(sizes) - 1)]
    margin = (noise.shape[-1] - k) // 2
    own = noise[:, margin : margin + k, margin : margin + k]
    return blur_one(image, k**-2 + std * torch.special.ndtri(own))


def decolorize_one(image: Tensor, *, saturation: float) -> Tensor:
    return torch.lerp(image.amax(dim=0), image, saturation)


def decolorize_hsv(image: Tensor, *, saturation: float) -> Tensor:
    hsv = matplotlib.colors.rgb_to_hsv(image.permute(1, 2, 0).numpy())
    hsv[..., 1] *= saturation
    return torch.from_numpy(matplotlib.colors.hsv_to_rgb(hsv)).permute(2, 0, 1)


# Blocks of HPM and DropPos


@dataclass(frozen=True)
class Pair:
    name: str
    peer: str
    ours: Callable[[], Tensor | tuple[Tensor, ...]]
    theirs: Callable[[], Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    backward: bool = False
    tolerance: float = 1e-5  # of the greatest value


def pairs() -> Iterator[Pair]:
    """Every row of the second table, with its tensors."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    difficulty, order = noise(256, 196), noise(256, 196)
    count = {"num_masked": 147, "num_hard": 37}
    yield Pair(
        "easy_to_hard 256 × 196",
        "NumPy, one image at a time",
        partial(easy_to_hard, difficulty, order, **count),
        partial(easy_to_hard_loop, difficulty, order, **count),
        (difficulty, order),
    )
    sigma = torch.tensor(0.75)
    for side in (14, 32):
        for peer, form in {"double loop": smoothed_loop, "all pairs at once": plain.smoothed_targets}.items():
            yield Pair(
                f"smoothed_targets {side} × {side}",
                peer,
                partial(smoothed_targets, sigma, height=side, width=side),
                partial(form, float(sigma), side=side),
                (sigma,),
            )
    positions, upstream = noise(256, 49, 768), noise(256, 49, 768)
    drop, token = noise(256, 49).argsort(dim=1) / 49, noise(768).requires_grad_()
    yield Pair(
        "drop_positions 256 × 49",
        "repeat, cat, gather",
        lambda: with_gradient(dropped_by_where(positions, drop, token), token, upstream),
        lambda: with_gradient(dropped_by_gather(positions, drop, token), token, upstream),
        (positions, upstream, drop, token),
        backward=True,
    )
    for images, tokens in ((64, 147), (8, 1024)):
        prediction, target = noise(images, tokens).requires_grad_(), noise(images, tokens)
        yield Pair(
            f"ranking_loss {images} × {tokens}",
            "matrices of all pairs",
            partial(ranked, one_ranking_loss, prediction, target),
            partial(ranked, plain.ranking_loss, prediction, target),
            (prediction, target),
            backward=True,
        )


def one_ranking_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """The loss as HPM's recipe divides it."""
    loss, _, count = ranking_loss(prediction, target)
    return loss.sum() / count.sum().clamp(min=1)


def ranked(loss: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return with_gradient(loss(prediction, target), prediction)


def with_gradient(result: Tensor, leaves: Tensor | tuple[Tensor, ...], upstream: Any = None) -> tuple[Tensor, ...]:
    """Run the backward pass too."""
    return result.detach(), *torch.autograd.grad(result, leaves, upstream)


def easy_to_hard_loop(difficulty: Tensor, noise: Tensor, *, num_masked: int, num_hard: int) -> Tensor:
    masks = []
    for hard, chance in zip(difficulty.numpy(), noise.numpy(), strict=True):
        others = hard.argsort()[: len(hard) - num_hard]
        others = others[chance[others].argsort()]
        mask = np.ones(len(hard), dtype=bool)
        mask[others[: len(hard) - num_masked]] = False
        masks.append(mask)
    return torch.from_numpy(np.stack(masks))


def smoothed_loop(sigma: float, *, side: int) -> Tensor:
    places = [(row, column) for row in range(side) for column in range(side)]
    rows = []
    for row, column in places:
        weights = [math.exp(-((row - y) ** 2 + (column - x) ** 2) / sigma**2) for y, x in places]
        total = sum(weights)
        rows.append([weight / total for weight in weights])
    return torch.tensor(rows)


def dropped_by_where(positions: Tensor, noise: Tensor, token: Tensor) -> Tensor:
    return drop_positions(positions, random_tokens(noise, num_masked=37), token.expand_as(positions))


def dropped_by_gather(positions: Tensor, noise: Tensor, token: Tensor) -> Tensor:
    batch, _, dim = positions.shape
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    anchors = positions.gather(1, shuffle[:, :12, None].expand(-1, -1, dim))
    together = torch.cat([anchors, token.repeat(batch, 37, 1)], dim=1)
    return together.gather(1, restore[..., None].expand(-1, -1, dim))


class Alive(TorchDispatchMode):
    """Follow the bytes of the tensors that are made while this is on, and of those it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, result)):
            if isinstance(tensor, Tensor):
                self.see(tensor.untyped_storage())
        return result

    def see(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            self.known.add(storage)
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())

    def add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


def memory(function: Callable[[], Any], inputs: tuple[Tensor, ...]) -> tuple[int, int]:
    """Most bytes alive, inputs left out, and bytes kept for the backward pass."""
    given = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in inputs}
    with Alive() as alive:
        for tensor in inputs:
            alive.see(tensor.untyped_storage())
        function()
    kept = kept_storages(function)
    return alive.most - sum(given.values()), sum(kept[place].nbytes() for place in kept.keys() - given.keys())


def check_pair(pair: Pair) -> None:
    for ours, theirs in zip(tree_leaves(pair.ours()), tree_leaves(pair.theirs()), strict=True):
        worst = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
        if ours.shape != theirs.shape or not worst <= pair.tolerance:
            raise SystemExit(f"{pair.name} and {pair.peer} differ by {worst:.1e} of the greatest value")


def measure_pair(pair: Pair, rounds: int, order: random.Random) -> None:
    check_pair(pair)
    sides, device = {"ours": pair.ours, "theirs": pair.theirs}, pair.inputs[0].device
    least = 1 if device.type == "cpu" else 20
    repeats = {side: max(least, int(0.02 / seconds_of(function, 1, device))) for side, function in sides.items()}
    clocks = {side: partial(seconds_of, function, repeats[side], device) for side, function in sides.items()}
    times = in_rounds(clocks, rounds, order)
    ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["theirs"], strict=True)]
    ours, theirs = (statistics.median(values) * 1e3 for values in times.values())
    line = f"{pair.name:<26}{pair.peer:<28}{ours:>8.2f}{theirs:>9.2f}"
    line += "".join(f"{ratio:>8.2f}" for ratio in (statistics.median(ratios), min(ratios), max(ratios)))
    most, kept = zip(*(memory(function, pair.inputs) for function in sides.values()), strict=True)
    line += "".join(f"{size / 1e6:>10.2f}" for size in most)
    print(line + ("".join(f"{size / 1e6:>10.2f}" for size in kept) if pair.backward else ""), flush=True)


def print_pair_header() -> None:
    print(
        f"\n{'block':<26}{'obvious form':<28}{'ours ms':>8}{'form ms':>9}{'ratio':>8}{'min':>8}{'max':>8}"
        f"{'most MB':>10}{'form':>10}{'kept MB':>10}{'form':>10}"
    )


# Checks and times


def check_parity(row: Comparison) -> None:
    ours, theirs = row.ours(*row.tensors), row.theirs(*row.tensors)
    if ours.shape != theirs.shape:
        raise SystemExit(f"{row.name} gives {tuple(ours.shape)}, {row.peer} {tuple(theirs.shape)}")
    worst = float((ours - theirs).abs().max())
    if not worst <= row.tolerance:
        raise SystemExit(f"{row.name} and {row.peer} differ by {worst:.1e}, more than {row.tolerance:.0e}")


def is_one_graph(row: Comparison) -> bool:
    torch.compiler.reset()
    few = tuple(tensor[:2] for tensor in row.tensors)
    try:
        compiled = torch.compile(row.ours, fullgraph=True, backend="aot_eager")(*few)
    except TorchDynamoException:
        return False
    return torch.allclose(compiled, row.ours(*few), atol=row.tolerance)


def reads_nothing_back(row: Comparison) -> bool:
    try:
        answer = row.ours(*(tensor.to("meta") for tensor in row.tensors))
    except (RuntimeError, NotImplementedError):
        return False
    return answer.is_meta


def measure(row: Comparison, rounds: int, order: random.Random) -> None:
    check_parity(row)
    sides = {"ours": row.ours, "theirs": row.theirs}
    clocks = {
        side: partial(seconds_of, partial(function, *row.tensors), 1, torch.device("cpu"))
        for side, function in sides.items()
    }
    times = in_rounds(clocks, rounds, order)
    ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["theirs"], strict=True)]
    ours, theirs = (statistics.median(values) * 1e3 for values in times.values())
    line = f"{row.name:<20}{row.peer:<24}{ours:>8.1f}{theirs:>10.1f}"
    line += f"{statistics.median(ratios):>8.2f}{min(ratios):>7.2f}{max(ratios):>7.2f}"
    print(f"{line}{yes(is_one_graph(row)):>11}{yes(reads_nothing_back(row)):>15}", flush=True)


def yes(answer: bool) -> str:
    return "yes" if answer else "NO"


@torch.no_grad()
def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    print_circumstances(chosen_device("cpu"), "torch", "numpy")
    H, W = settings.size
    print(f"{settings.images} images of 3 × {H} × {W}, float32, {settings.rounds} rounds\n")
    print(
        f"{'block':<20}{'one image at a time':<24}{'ours ms':>8}{'loop ms':>10}{'ratio':>8}{'min':>7}{'max':>7}"
        f"{'one graph':>11}{'no host sync':>15}"
    )
    order = random.Random(0)
    for row in comparisons(settings):
        if not settings.only or any(word in row.name for word in settings.only):
            measure(row, settings.rounds, order)
    chosen = [pair for pair in pairs() if not settings.only or any(word in pair.name for word in settings.only)]
    if chosen:
        print_pair_header()
    with torch.enable_grad():
        for pair in chosen:
            measure_pair(pair, settings.rounds, order)


if __name__ == "__main__":
    main()
