"""How fast every recipe trains: beside peers, on real JPEGs, sharded, and its attention in several forms."""

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # recipes are scripts beside this folder, not a package

from common.data.loading import Loader
from common.data.sources import Folder
from common.randomness import Noise
from common.recipe import changed
from common.training.distributed import in_bf16, num_workers
from mimkit.relative import contextual_bias, num_buckets, relative_buckets

import mae
import numpy as np
import resolution
import step
import torch
import torch.nn.functional as F
from blocks import with_gradient
from gpu_trainings import Bench, Row, Training, config_of, each, free, graphs, method_of, synthetic_batch, training_of
from measuring import in_rounds, kept_bytes, matmul_peak, seconds_of, version_of
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

BATCHES = (512, 256, 128, 64, 32, 16, 8)  # tried until one fits
ROUNDS = 3  # of the comparison with peers


# Steps


def speed(bench: Bench) -> list[Row]:
    """Measure a training step of each method, and of peers, in bf16 and compiled, with as many images as fit."""
    peak = matmul_peak(bench.device, 256 if bench.toy else 8192)
    rows: list[Row] = [{"what": "matmul peak", "TFLOP/s": peak / 1e12}]
    sizes = [bench.size("base")] if bench.toy else ["base", "large"]
    base = [f"{method} {sizes[0]}" for method in bench.methods]
    rows += each(bench, base[:1], partial(speed_of, bench, peak))
    if "mae" in bench.methods and not bench.is_late():
        rows += peers(bench)
    others = [f"{method} {size}" for size in sizes[1:] for method in bench.methods]
    return rows + each(bench, [*base[1:], *others], partial(speed_of, bench, peak))


def speed_of(bench: Bench, peak: float, name: str) -> Row:
    """Measure a training step of one method."""
    method, size = name.split()
    batch = fitting(bench, partial(take_one, bench, method, size))
    config = config_of(bench, method, size=size, batch=batch, steps=bench.warmup + bench.steps)
    flops, source = flops_per_image(bench, method, size)
    with bench.compiler():
        before = allocated(bench)
        training = training_of(bench, method, config)
        training.step()
        first = graphs()
        training.take(bench.warmup - 1)
        seconds = seconds_of(training.step, bench.steps, bench.device)
    row = {"batch": batch, "images/s": batch / seconds, "of peak": batch * flops / seconds / peak}
    row |= {"GFLOP/image": flops / 1e9, "FLOPs from": source} | peak_memory(bench, before)
    return row | {"loss": training.check_loss(), "graphs after step 1": graphs() - first}


def fitting(bench: Bench, attempt: Callable[[int], Any]) -> int:
    """Return the requested batch size, or the largest with which an attempt does not run out of memory."""
    if bench.toy or bench.batch:
        return bench.batch or 4
    for batch in BATCHES:
        try:
            attempt(batch)
        except torch.OutOfMemoryError:
            continue
        finally:
            free(bench)
        return batch
    raise MemoryError(f"not even a batch of {BATCHES[-1]} fits")


def take_one(bench: Bench, method: str, size: str, batch: int) -> None:
    """Take two steps, uncompiled, which needs at least as much memory as compiled."""
    config = config_of(bench, method, size=size, batch=batch, steps=2, compile="off")
    training_of(bench, method, config).take(2)


def flops_per_image(bench: Bench, method: str, size: str) -> tuple[float, str]:
    """Return the floating-point operations that a step needs per image, and where the number comes from."""
    if method in step.RECIPES and not bench.toy:
        return step.flops_per_image(method, size), "shapes (step.py)"
    return counted_flops(bench, method, size), "FlopCounterMode"


def counted_flops(bench: Bench, method: str, size: str) -> float:
    """Count the floating-point operations of a step per image, on the meta device."""
    batch = 2
    config = config_of(bench, method, size=size, batch=batch, steps=1)
    module = method_of(method, config)
    images = synthetic_batch(module, config)
    module.to("meta")
    images = images.to("meta") if isinstance(images, Tensor) else tuple(view.to("meta") for view in images)
    rand = Noise(micro_batch=batch, rank=0, world_size=1, device=torch.device("cpu"), seed=0).at(0, 0)
    noise = {name: values.to("meta") for name, values in module.noise(rand, batch).items()}
    with FlopCounterMode(display=False) as counter:
        module(images, noise, torch.zeros((), dtype=torch.float64, device="meta"))["loss"].backward()
    return counter.get_total_flops() / batch


def allocated(bench: Bench) -> int:
    """Return the bytes that are in use on a GPU, and start to follow their peak."""
    if bench.device.type == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory(bench: Bench, before: int) -> Row:
    """Return the most memory used on a GPU since, beyond what was in use before."""
    return {} if bench.device.type == "cpu" else {"peak GB": (torch.cuda.max_memory_allocated() - before) / 1e9}


# Peers


def peers(bench: Bench) -> list[Row]:
    """Measure MAE beside transformers and lightly, eager and compiled; same network, batch, dtype and optimizer."""
    size, device = bench.size("base"), bench.device
    config = changed(
        mae.PRESETS["imagenet"], size=size, **({"decoder_dim": 32, "decoder_depth": 1} if bench.toy else {})
    )
    shapes, bf16 = step.shapes_of(config), in_bf16(config.run, bench.processes)
    packages: dict[str, Callable[..., torch.nn.Module]] = {"transformers": step.Transformers, "lightly": step.Lightly}
    rows: list[Row] = [
        {"what": f"mae, {package}", "left out": f"{package} is not installed"}
        for package in packages
        if version_of(package) == "–"
    ]

    def peer(package: str, compiled: bool) -> Callable[[int], Callable[[], Any]]:
        def build(batch: int) -> Callable[[], Any]:
            variant = step.variant_of(
                package,
                packages[package](*shapes),
                lambda module, data: module(data.images, data.noise),
                config.optimization,
                device,
                bf16=bf16,
                fused=True,
                compiled=compiled,
            )
            return partial(variant.step, step.make_batch("mae", batch, device))

        return build

    def ours(batch: int, **run: Any) -> Callable[[], Any]:
        steps = {"batch_size": batch, "device_batch": batch, "epochs": 1000, "compile": "on", **run}
        return training_of(bench, "mae", changed(config, **steps)).step

    eager = {package: peer(package, False) for package in packages if version_of(package) != "–"}
    batch = fitting(bench, lambda batch: [build(batch)() for build in (partial(ours, compile="off"), *eager.values())])
    builds = {"ours compiled": ours, **eager, **{f"{package} compiled": peer(package, True) for package in eager}}
    clocks: dict[str, Callable[[], float]] = {}

    def prepare(name: str) -> Row:
        before = allocated(bench)
        take = builds[name.removeprefix("mae, ")](batch)
        for _ in range(bench.warmup):
            take()
        clocks[name] = partial(seconds_of, take, bench.steps, device)
        return {"batch": batch, **peak_memory(bench, before)}

    with bench.compiler():
        found = each(bench, [f"mae, {name}" for name in builds], prepare)
        times = in_rounds(clocks, 1 if bench.toy else ROUNDS, random.Random(0))
    own = times.get("mae, ours compiled", [])
    for row in found:
        if (values := times.get(row["what"])) is not None:
            row["images/s"] = batch / statistics.median(values)
            row["time ÷ ours"] = statistics.median(a / b for a, b in zip(values, own, strict=True)) if own else None
    return rows + found


# Attention


def product(queries: Tensor, table: Tensor, buckets: Tensor) -> Tensor:
    """Look up a vector for each pair of query and key, and multiply."""
    vectors = table[0].index_select(1, buckets.flatten()).unflatten(1, buckets.shape)
    return torch.einsum("...id,dij->...ij", queries, vectors)


def attention(bench: Bench) -> list[Row]:
    """Compare forms of the contextual relative bias, and explicit attention with PyTorch's fused one.

    Forward and backward pass; the difference is that of results and gradients in fp32, relative to their norms.
    """
    generator = torch.Generator().manual_seed(0)
    heads, width = (2, 8) if bench.toy else (12, 64)
    images = {50: 2, 197: 1, 785: 1} if bench.toy else {50: 512, 197: 128, 785: 16}

    def random_of(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(bench.device)

    def bias(name: str) -> Row:
        keys = int(name.split()[-2])
        side = int((keys - 1) ** 0.5)
        buckets = relative_buckets(height=side, width=side, device=bench.device)
        leaves = random_of(images[keys], heads, keys, width), 0.1 * random_of(1, width, num_buckets())
        forms: dict[str, Any] = {
            "product": product,
            "gather": lambda q, table, b: resolution.gathered(q, table, b, None),
            "ours": contextual_bias,
        }
        forms = {form: lambda q, table, run=run: run(q, table, buckets) for form, run in forms.items()}
        return compared(bench, forms, leaves, random_of(images[keys], heads, keys, keys))

    def softmax(name: str) -> Row:
        keys, biased = int(name.split()[-2]), "bias" in name
        shape = images[keys], heads, keys, width
        leaves = [random_of(*shape) for _ in range(3)] + ([random_of(*shape[:3], keys)] if biased else [])
        forms: dict[str, Any] = {"sdpa": F.scaled_dot_product_attention, "explicit": resolution.plainly}
        if not biased:
            forms["explicit"] = lambda q, k, v: resolution.plainly(q, k, v, torch.zeros((), device=q.device).to(q))
        return compared(bench, forms, tuple(leaves), random_of(*shape))

    rows = each(bench, [f"relative bias, {keys} keys" for keys in images], bias)
    kinds = ("attention", "attention with a trained bias")
    return rows + each(bench, [f"{kind}, {keys} keys" for kind in kinds for keys in images], softmax)


def compared(bench: Bench, forms: dict[str, Any], leaves: tuple[Tensor, ...], upstream: Tensor) -> Row:
    """Return the milliseconds of each form in bf16, and the largest relative difference from the first in fp32."""
    results: dict[str, Any] = {}
    row: Row = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = tuple(leaf.to(dtype).requires_grad_() for leaf in leaves)
        for name, form in forms.items():

            def run(form: Any = form, inputs: tuple[Tensor, ...] = inputs) -> tuple[Tensor, ...]:
                return with_gradient(form(*inputs), inputs, upstream.to(inputs[0].dtype))

            if dtype == torch.float32:
                before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("highest")
                results[name] = run()
                torch.set_float32_matmul_precision(before)
                continue
            seconds_of(run, 1 if bench.toy else bench.warmup, bench.device)
            row[f"{name} ms"] = seconds_of(run, 1 if bench.toy else bench.steps, bench.device) * 1e3
    first, *others = results.values()
    pairs = [pair for other in others for pair in zip(other, first, strict=True)]
    return row | {"difference": max(float((a - b).norm() / b.norm()) for a, b in pairs)}


# Data


def write_photographs(folder: Path, count: int, size: tuple[int, int]) -> float:
    """Write JPEGs, as large as those of ImageNet, of parts of scikit-learn's two photographs, and return their mean kB.

    Args:
        folder: folder of the files.
        count: number of files.
        size: their width and height in pixels.
    """
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    chance = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        photograph = photographs[number % 2]
        share = chance.uniform(0.7, 1)
        width, height = int(photograph.width * share), int(photograph.height * share)
        left, top = (int(chance.integers(room + 1)) for room in (photograph.width - width, photograph.height - height))
        part = photograph.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        part.save(folder / f"{number:05}.jpg", quality=90)
    return sum(path.stat().st_size for path in folder.iterdir()) / count / 1e3


def data(bench: Bench) -> list[Row]:
    """Measure the loader on real JPEGs, and MAE trained on them relative to synthetic images."""
    batch = 4 if bench.toy else bench.batch or 256
    count, size = (8, (64, 48)) if bench.toy else (1024, (500, 375))
    kilobytes = write_photographs(bench.folder / "photographs", count, size)
    config = config_of(bench, "mae", size=bench.size("base"), batch=batch, steps=1000, workers=0 if bench.toy else -1)
    workers = num_workers(config.run, bench.processes)
    warmup, steps = bench.warmup + 2 * workers, bench.steps + 4 * workers  # workers run two batches ahead
    source = Folder(bench.folder / "photographs", "train", channels=config.data.channels)
    with bench.compiler():
        training = training_of(bench, "mae", config, source=source, num_images=count)
        loading = wall_seconds(bench, partial(next, stream_of(bench, training, workers)), warmup, steps)
        synthetic = wall_seconds(bench, training.step, bench.warmup, bench.steps)
        training.engine.done = 0
        jpegs = stream_of(bench, training, workers)
        real = wall_seconds(bench, partial(training.engine.step, jpegs), warmup, steps)
    training.check_loss()
    files = {"kB per JPEG": kilobytes, "workers": workers, "batch": batch}
    return [
        {"what": "loader", "images/s": batch / loading, **files},
        {"what": "mae, synthetic", "images/s": batch / synthetic},
        {"what": "mae, JPEGs", "images/s": batch / real, "÷ synthetic": synthetic / real},
    ]


def stream_of(bench: Bench, training: Training, workers: int) -> Iterator[Any]:
    """Return the batches of the training images, from the first on."""
    batches = training.engine.batches.since(0)
    return iter(Loader(training.views, batches, workers=workers, pin=bench.device.type == "cuda"))


def wall_seconds(bench: Bench, function: Callable[[], Any], warmup: int, steps: int) -> float:
    """Return the wall-clock seconds of a call, after a warm-up."""
    for _ in range(warmup):
        function()
    wait(bench)
    begin = time.perf_counter()
    for _ in range(steps):
        function()
    wait(bench)
    return (time.perf_counter() - begin) / steps


def wait(bench: Bench) -> None:
    """Wait for a GPU."""
    if bench.device.type == "cuda":
        torch.cuda.synchronize()


# Several devices, and memory


def sharding(bench: Bench) -> list[Row]:
    """Compare replicated with sharded training on several devices, and activation checkpointing with none."""
    batch = 4 if bench.toy else bench.batch or 128
    size, world_size = bench.size("base"), bench.processes.world_size
    variants: dict[str, Row] = {
        "without activation checkpointing": {},
        "activation checkpointing": {"activation_checkpointing": True},
    }
    rows: list[Row] = []
    if world_size == 1:
        reason = "one device; start with torchrun --nproc_per_node=GPUS"
        rows.append({"what": "DDP beside FSDP2", "left out": reason})
    else:
        variants = {"DDP": {}, "FSDP2": {"shard": True}} | {
            "FSDP2, checkpointing": {"shard": True, **variants["activation checkpointing"]}
        }

    def of(name: str) -> Row:
        config = config_of(bench, "mae", size=size, batch=batch, steps=1000, **variants[name])
        with bench.compiler():
            before = allocated(bench)
            training = training_of(bench, "mae", config)
            training.take(bench.warmup)
            own = seconds_of(training.step, bench.steps, bench.device)
        (seconds,) = bench.processes.maximum([own])
        memory = peak_memory(bench, before) or {"kept kB": kept_bytes(training.step) / 1e3}
        training.check_loss()
        return {"devices": world_size, "batch": batch, "images/s": batch * world_size / seconds, **memory}

    return rows + each(bench, variants, of)
