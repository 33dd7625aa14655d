"""What resolution costs: LoMaR, which reads a few windows of an image, beside MAE, which reads all of it.

    pip install -e .[recipes]
    python benchmarks/resolution.py
    python benchmarks/resolution.py --only steps --size tiny --decoder-dim 256 --decoder-depth 4 --decoder-heads 8
    python benchmarks/resolution.py --only input bias attention --size base --rounds 15

Four tables:

    steps      a training step (forward, backward, fused AdamW) of LoMaR with 4 windows of 7 × 7 patches, 80 % masked,
               and of MAE, 75 % masked, as the engine runs them, at several sizes of the image; beside the time the
               quotient of the multiply-adds, and memory: on a CPU what is kept for the backward pass, on a GPU the most
               that a step needs
    input      LoMaR's way from bytes to tokens and targets, which touches no pixel outside the windows and embeds no
               masked patch, beside embedding the whole image and gathering; with the backward pass too
    bias       contextual relative positions, forward and backward, beside other forms of the same product: for windows,
               for all patches, and for patches that differ from image to image as in MAE
    attention  attention with a bias that is trained: as `common.vit` does it beside either of its two ways

Multiply-adds are counted as one implements the methods plainly: all patches embedded, all of them decoded. For ViT-B
the count must give what the papers' arithmetic does before anything is measured. The forms of the last three tables
must give the same values and gradients in fp32; a step of LoMaR beside a plain one is in `step.py`.

Each round runs all variants of a table, or both sides of a row, once and in random order; a ratio is that of two times
of one round. On a CPU: one thread and processor time, so that other programs disturb little. On a GPU: CUDA events. The
networks and images are drawn at random; freed memory is kept, as in the recipes.
"""

import os
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # recipes are scripts beside this folder, not a package

import common  # noqa: F401  it says where torch, not loaded yet, gets its memory
from common.config import Network
from common.data.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from common.networks.attention import attend, explicit
from common.networks.building import decoder_sizes
from common.networks.vit import SIZES
from mimkit.masking import random_tokens
from mimkit.relative import buckets_of, contextual_bias, num_buckets, relative_buckets
from mimkit.tokens import patchify, split, take, take_patches

import step
import torch
import torch.nn.functional as F
import tyro
from blocks import Pair, check_pair, measure_pair, print_pair_header, with_gradient
from measuring import chosen_device, in_rounds, print_circumstances
from plain import NUM_WINDOWS, PATCH, PIXELS, WINDOW
from torch import Tensor

Table = Literal["steps", "input", "bias", "attention"]
METHODS = "lomar", "mae"
IN_WINDOW = 1 + WINDOW**2  # tokens of a window, with the class token
PAPER = {  # 10⁹ multiply-adds of ViT-B/16 per image: LoMaR, MAE, their quotient
    224: ("17.5", "9.8", "0.56"),
    384: ("17.7", "30.6", "1.73"),
    448: ("17.8", "43.1", "2.42"),
}
GOALS = {("cuda", 448): "≥ 2.00"}  # of MAE ÷ LoMaR
INPUT_GOAL = "at 448 pixels ≥ 10"


@dataclass(frozen=True)
class Settings:
    only: tuple[Table, ...] = ()
    """tables; none: all"""
    size: Literal["auto", "nano", "tiny", "small", "base", "large"] = "auto"
    """of the encoder; auto: small on a CPU, base on a GPU"""
    sizes: tuple[int, ...] = (224, 384, 448)
    """sides of the images in pixels"""
    batch: int = 0
    """images per step, 2 or more; 0: 2 on a CPU, 64 on a GPU"""
    bf16: bool = False
    """autocast; without it, fp32"""
    rounds: int = 5
    """each runs everything once; take 15 or more for differences below 10 %"""
    decoder_dim: int = 512
    """width of MAE's decoder"""
    decoder_depth: int = 8
    """its blocks"""
    decoder_heads: int = 16
    """its attention heads"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one"""


def config_of(method: str, side: int, network: Network) -> Any:
    preset = step.RECIPES[method].PRESETS["imagenet"]
    return replace(preset, network=network, images=replace(preset.images, image_size=(side, side)))


def module_of(config: Any, method: str, device: torch.device) -> Any:
    return step.RECIPES[method].RECIPE.method(config, Normalize(IMAGENET_MEAN, IMAGENET_STD)).to(device)


def batch_of(module: Any, side: int, images: int, device: torch.device) -> step.Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = step.make_pixels(images, side, generator).to(device)
    noise = {name: values.to(device) for name, values in module.noise(partial(rand, generator), images).items()}
    return step.Batch(pixels, module.normalize(pixels), noise)


def rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator)


# Steps


def multiply_adds(method: str, side: int, network: Network) -> int:
    """Count those of a forward pass per image."""
    encoder = SIZES[network.size]
    dim, depth, patches = encoder["dim"], encoder["depth"], (side // PATCH) ** 2

    def blocks(tokens: int, dim: int, depth: int) -> int:
        return depth * (12 * tokens * dim**2 + 2 * tokens**2 * dim)

    embed = patches * PIXELS * dim
    if method == "lomar":
        relative, head = depth * IN_WINDOW * dim * num_buckets(), WINDOW**2 * PIXELS * dim
        return embed + NUM_WINDOWS * (blocks(IN_WINDOW, dim, depth) + relative + head)
    visible, (narrow, deep, _) = 1 + patches // 4, decoder_sizes(network)
    decode = visible * dim * narrow + blocks(1 + patches, narrow, deep) + patches * narrow * PIXELS
    return embed + blocks(visible, dim, depth) + decode


def check_arithmetic() -> None:
    for side, expected in PAPER.items():
        counts = [multiply_adds(method, side, Network(size="base")) for method in METHODS]
        found = (*(f"{count / 1e9:.1f}" for count in counts), f"{counts[1] / counts[0]:.2f}")
        if found != expected:
            raise SystemExit(f"the multiply-adds of ViT-B at {side} are {found}, not {expected}")
    rows = (f"{side}: {lomar}, {mae}, {ratio}" for side, (lomar, mae, ratio) in PAPER.items())
    print(f"10⁹ multiply-adds of ViT-B as in the papers, LoMaR, MAE and MAE ÷ LoMaR, at {'; '.join(rows)}")


def measure_steps(settings: Settings, network: Network, device: torch.device) -> None:
    on_cpu = device.type == "cpu"
    variants: dict[tuple[str, int], tuple[step.Variant, step.Batch]] = {}
    for side in settings.sizes:
        for method in METHODS:
            config, name = config_of(method, side, network), f"{method} {side}"
            module = module_of(config, method, device)
            variant = step.recipe_variant(
                name, module, config.optimization, device, bf16=settings.bf16, compiled=not on_cpu
            )
            variants[method, side] = variant, batch_of(module, side, settings.batch, device)
    warmup, steps = (1, 1) if on_cpu else (10, 20)
    memory: dict[tuple[str, int], float] = {}  # MB
    for key, (variant, batch) in variants.items():
        step.seconds_per_step(variant, batch, warmup)
        size = step.saved_bytes(variant, batch.first(2)) if on_cpu else step.step_bytes(variant, batch) / settings.batch
        memory[key] = size / 1e6
    clocks = {key: partial(step.seconds_per_step, *pair, steps) for key, pair in variants.items()}
    times = in_rounds(clocks, settings.rounds, random.Random(0))

    what = "kept MB" if on_cpu else "peak MB"
    print(
        f"\n{'':<7}{'ms per image':>16}{'MAE ÷ LoMaR':>27}{'multiply-':>11}{'':>8}"
        f"{f'÷ at {settings.sizes[0]}':>15}{f'{what} per image':>24}"
    )
    print(
        f"{'image':<7}{'LoMaR':>8}{'MAE':>8}{'median':>13}{'min':>7}{'max':>7}{'adds':>11}{'goal':>8}"
        f"{'LoMaR':>8}{'MAE':>7}{'LoMaR':>8}{'MAE':>8}{'ratio':>8}"
    )
    for side in settings.sizes:
        lomar, mae = (times[method, side] for method in METHODS)
        ratios = quotients(mae, lomar)
        milliseconds = (statistics.median(values) * 1e3 / settings.batch for values in (lomar, mae))
        line = f"{side:<7}" + "".join(f"{value:>8.1f}" for value in milliseconds)
        line += f"{statistics.median(ratios):>13.2f}{min(ratios):>7.2f}{max(ratios):>7.2f}"
        counts = [multiply_adds(method, side, network) for method in METHODS]
        line += f"{counts[1] / counts[0]:>11.2f}{GOALS.get((device.type, side), ''):>8}"
        for method, width in zip(METHODS, (8, 7), strict=True):
            growth = quotients(times[method, side], times[method, settings.sizes[0]])
            line += f"{statistics.median(growth):>{width}.2f}"
        lomar, mae = (memory[method, side] for method in METHODS)
        print(line + f"{lomar:>8.1f}{mae:>8.1f}{mae / lomar:>8.2f}", flush=True)


def quotients(above: list[float], below: list[float]) -> list[float]:
    """Divide the times of each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


# Input


def windows_and_mask(method: Any, noise: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    windows = method.patches_of(method.anchors(noise)).flatten(1)
    mask = random_tokens(noise["mask"].flatten(0, 1), num_masked=method.num_masked)
    return windows, mask, *split(mask, num_masked=method.num_masked)


def rows(patches: Tensor) -> Tensor:
    return patches.unflatten(1, (NUM_WINDOWS, -1)).flatten(0, 1)


def read_windows(method: Any, batch: step.Batch) -> tuple[Tensor, Tensor]:
    """Return tokens and targets as LoMaR's recipe makes them."""
    windows, mask, visible, masked = windows_and_mask(method, batch.noise)
    patches = rows(method.normalize.patches(take_patches(batch.pixels, windows, patch=PATCH)))
    return method.encoder.embed(take(patches, visible), mask), take(patches, masked)


def read_all(method: Any, batch: step.Batch) -> tuple[Tensor, Tensor]:
    """Return the same out of the whole image: normalize and embed it, then gather."""
    windows, mask, _, masked = windows_and_mask(method, batch.noise)
    images = method.normalize(batch.pixels)
    tokens = rows(take(method.encoder.patch_embed.proj(images).flatten(2).transpose(1, 2), windows))
    tokens = torch.where(mask.unsqueeze(-1), method.encoder.mask_token, tokens)
    return tokens, take(rows(take(patchify(images, patch=PATCH), windows)), masked)


def input_pairs(settings: Settings, network: Network, device: torch.device, *, bf16: bool) -> Iterator[Pair]:
    for side in settings.sizes:
        method = module_of(config_of("lomar", side, replace(network, size=settings.size)), "lomar", device)
        batch = batch_of(method, side, settings.batch, device)
        leaves = method.encoder.patch_embed.proj.weight, method.encoder.patch_embed.proj.bias, method.encoder.mask_token
        shape = settings.batch * NUM_WINDOWS, WINDOW**2, method.encoder.dim
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)

        def forward(read: Any, method: Any = method, batch: step.Batch = batch) -> tuple[Tensor, Tensor]:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                return read(method, batch)

        def both(
            read: Any,
            method: Any = method,
            batch: step.Batch = batch,
            leaves: tuple[Tensor, ...] = leaves,
            upstream: Tensor = upstream,
        ) -> tuple[Tensor, ...]:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                tokens, targets = read(method, batch)
            return *with_gradient(tokens, leaves, upstream.to(tokens.dtype)), targets

        for name, run in {"forward": forward, "backward": both}.items():
            forms = partial(run, read_windows), partial(run, read_all)
            inputs = batch.pixels, *batch.noise.values(), upstream, *leaves
            yield Pair(f"{side} pixels, {name}", "embed all, gather", *forms, inputs, backward=name == "backward")


# Bias


def gathered(queries: Tensor, table: Tensor, buckets: Tensor, _: Tensor | None) -> Tensor:
    """All products of a query, then those of its pairs."""
    products = queries @ table
    buckets = buckets if buckets.ndim == 2 else buckets[:, None]
    return products.gather(-1, buckets.expand(*products.shape[:-1], -1))


def flat_index(queries: Tensor, table: Tensor, buckets: Tensor, index: Tensor | None) -> Tensor:
    """The same by one index into the products of all queries, as in the published code."""
    assert index is not None
    return (queries @ table).flatten(2)[:, :, index].unflatten(2, buckets.shape)


def one_hot(queries: Tensor, table: Tensor, buckets: Tensor, hot: Tensor | None) -> Tensor:
    """The same as a product with a matrix of zeros and ones."""
    if hot is None:
        hot = one_hot_of(buckets, table)
    letters = "ijn" if hot.ndim == 3 else "bijn"
    return torch.einsum(f"bhin,{letters}->bhij", queries @ table, hot)


def one_hot_of(buckets: Tensor, table: Tensor) -> Tensor:
    return F.one_hot(buckets, table.shape[-1]).to(table.dtype)


def bias_pairs(settings: Settings, device: torch.device, dtype: torch.dtype) -> Iterator[Pair]:
    heads, dim = (SIZES[settings.size][part] for part in ("heads", "dim"))
    generator, images, side = torch.Generator().manual_seed(0), settings.batch, 14
    grid = relative_buckets(height=side, width=side, device=device)
    order = torch.rand(images, side**2, generator=generator).argsort(dim=-1).to(device)
    order = F.pad(order + 1, (1, 0))  # MAE's decoder has class token, visible and masked patches in this order
    cases = {
        "window": (images * NUM_WINDOWS, relative_buckets(height=WINDOW, width=WINDOW, device=device)),
        "grid": (images, grid),
        "MAE's visible": (images, buckets_of(grid, order[:, :IN_WINDOW])),
        "MAE's decoder": (images, buckets_of(grid, order)),
    }
    for name, (count, buckets) in cases.items():
        tokens = buckets.shape[-1]
        shapes = (count, tokens, heads, dim // heads), (1, dim // heads, num_buckets()), (count, heads, tokens, tokens)
        x, table, upstream = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        leaves = x.requires_grad_(), table.requires_grad_()

        def run(
            form: Any,
            *more: Any,
            leaves: tuple[Tensor, Tensor] = leaves,
            buckets: Tensor = buckets,
            upstream: Tensor = upstream,
        ) -> tuple[Tensor, ...]:
            x, table = leaves
            return with_gradient(
                form(x.transpose(1, 2), table, buckets, *more), leaves, upstream
            )  # as attention has it

        forms = {"gather": partial(run, gathered, None)}
        if buckets.ndim == 2:  # what is the same in every step is made before
            index = (buckets + table.shape[-1] * torch.arange(tokens, device=device)[:, None]).flatten()
            forms["flat index"] = partial(run, flat_index, index)
            forms["one-hot product"] = partial(run, one_hot, one_hot_of(buckets, table.detach()))
        else:
            forms["one-hot product"] = partial(run, one_hot, None)
        for peer, form in forms.items():
            ours, inputs = partial(run, contextual_bias), (x, table, buckets, upstream)
            yield Pair(f"{name}, {tokens} tokens", peer, ours, form, inputs, backward=True)


# Attention


def plainly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v


def attention_pairs(settings: Settings, device: torch.device, dtype: torch.dtype) -> Iterator[Pair]:
    heads, dim = (SIZES[settings.size][part] for part in ("heads", "dim"))
    generator = torch.Generator().manual_seed(0)
    for tokens, share in {26: 8, 50: 4, 101: 2, 197: 1}.items():
        count = settings.batch * share
        shapes = (count, tokens, 3, heads, dim // heads), *2 * [(count, heads, tokens, tokens)]
        x, bias = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes[:2])
        upstream = torch.randn(count, heads, tokens, dim // heads, generator=generator).to(device, dtype)

        def run(
            form: Any, x: Tensor = x, bias: Tensor = bias, upstream: Tensor = upstream, tokens: int = tokens
        ) -> tuple[Tensor, ...]:
            qkv = x.permute(2, 0, 3, 1, 4)
            q, k, v = qkv.contiguous() if explicit(x, tokens) else qkv
            return with_gradient(form(q, k, v, bias), (x, bias), upstream)

        for peer, form in {"fused": F.scaled_dot_product_attention, "explicit": plainly}.items():
            inputs = x, bias, upstream
            ours, theirs = partial(run, attend), partial(run, form)
            yield Pair(f"{count} × {tokens} tokens", peer, ours, theirs, inputs, backward=True)


def measure_pairs(table: Table, settings: Settings, network: Network, device: torch.device) -> None:
    def pairs(*, bf16: bool) -> Iterator[Pair]:
        if table == "input":
            return input_pairs(settings, network, device, bf16=bf16)
        make = bias_pairs if table == "bias" else attention_pairs
        return make(settings, device, torch.bfloat16 if bf16 else torch.float32)

    for pair in pairs(bf16=False):
        check_pair(pair)
    order = random.Random(0)
    for pair in pairs(bf16=settings.bf16):
        measure_pair(replace(pair, tolerance=5e-2) if settings.bf16 else pair, settings.rounds, order)


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    device = chosen_device(settings.device)
    on_cpu = device.type == "cpu"
    size: Any = {True: "small", False: "base"}[on_cpu] if settings.size == "auto" else settings.size
    settings = replace(settings, size=size, batch=settings.batch or (2 if on_cpu else 64))
    decoder = {part: getattr(settings, part) for part in ("decoder_dim", "decoder_depth", "decoder_heads")}
    network = Network(size=size, **decoder)
    print_circumstances(device, "torch")
    print(
        f"ViT-{size}/{PATCH}, {'bf16' if settings.bf16 else 'fp32'}, batch {settings.batch}, {settings.rounds} rounds, "
        f"decoder of MAE {network.decoder_depth} × {network.decoder_dim}"
    )
    check_arithmetic()
    titles: dict[Table, str] = {
        "steps": "a step of LoMaR and of MAE",
        "input": f"from bytes to tokens and targets of LoMaR; goal {INPUT_GOAL}",
        "bias": "contextual relative positions, forward and backward",
        "attention": "attention with a trained bias, forward and backward",
    }
    for table, title in titles.items():
        if settings.only and table not in settings.only:
            continue
        print(f"\n{title}; load average {os.getloadavg()[0]:.1f}", end="")
        if table == "steps":
            measure_steps(settings, network, device)
            continue
        print_pair_header()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # a GPU would convolve in TF32
            measure_pairs(table, settings, network, device)


if __name__ == "__main__":
    main()
