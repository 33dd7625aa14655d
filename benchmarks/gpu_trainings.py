"""Trainings of every recipe on synthetic images, by the engine, and what must hold on a GPU whatever the speed."""

import gc
import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # recipes are scripts beside this folder, not a package

from common.data.loading import Loader, ViewDataset
from common.data.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from common.data.sources import Data
from common.data.views import CropFlip
from common.networks.vit import SIZES
from common.randomness import Noise
from common.recipe import Recipe, changed
from common.runs import Stage
from common.training.distributed import Processes
from common.training.engine import _Training
from common.training.step import Batches, to_device

import beyond_masking
import beyond_masking_integrated
import droppos
import hpm
import lomar
import lut
import lut_simmim
import mae
import simmim
import step
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

Row = dict[str, Any]
RECIPES: dict[str, Recipe] = {
    "mae": mae.RECIPE,
    "hpm": hpm.RECIPE,
    "droppos": droppos.RECIPE,
    "lomar": lomar.RECIPE,
    "lut": lut.RECIPE,
    "simmim": simmim.RECIPE,
    "beyond_masking_integrated": beyond_masking_integrated.RECIPE,
    "beyond_masking": beyond_masking.RECIPE,
    "lut_simmim": lut_simmim.RECIPE,
}
SIZES["shallow"] = SIZES["base"] | {"depth": 2}  # all kernels of ViT-B, and little to compile
SIZES["toy"] = {"dim": 28, "depth": 1, "heads": 2}
ROOT = Path(__file__).parents[1]
PICTURES = 8  # different synthetic images of a batch
COMPILED = ("mae", "lomar")  # methods whose determinism is examined compiled, too


@dataclass(frozen=True)
class Bench:
    """Where the sections run, how large and how long.

    Args:
        processes: the processes and their devices.
        toy: tiny networks, images and batches.
        methods: names of the recipes.
        batch: images per device and step; 0: as many as fit, up to 512.
        folder: folder of temporary files.
        ends: the time, by `time.monotonic`, after which nothing long is begun.
        warmup, steps: steps before a measurement, and of it.
    """

    processes: Processes
    toy: bool
    methods: tuple[str, ...]
    batch: int
    folder: Path
    ends: float
    warmup: int = 10
    steps: int = 20

    @property
    def device(self) -> torch.device:
        """Return the device of this process."""
        return self.processes.device

    def size(self, name: str) -> str:
        """Return the size of the encoder to train instead of this one."""
        return "toy" if self.toy else name

    def is_late(self) -> bool:
        """Return whether too little time is left to compile and measure one more training."""
        alone = self.processes.world_size == 1  # several processes must decide alike
        return alone and time.monotonic() > self.ends - (0 if self.toy else 60)

    def compiler(self) -> AbstractContextManager[Any]:
        """Return a context in which toys are captured but not lowered: inductor takes a minute on a CPU."""
        return captured_only() if self.toy else nullcontext()


def captured_only() -> AbstractContextManager[Any]:
    """Return a context in which `torch.compile` captures graphs and does not lower them."""
    return patch.object(torch, "compile", partial(torch.compile, backend="eager"))


def described(error: BaseException) -> str:
    """Describe an error in one line, with the innermost line of this project that led to it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(ROOT)]
    where = f" ({Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}{where}"


def each(bench: Bench, names: Iterable[str], measure: Callable[[str], Row]) -> list[Row]:
    """Measure one thing after the other; an error is a row, too, and what there is no time for is named."""
    rows = []
    for name in names:
        if bench.is_late():
            rows.append({"what": name, "left out": "no time left"})
            continue
        try:
            rows.append({"what": name, **measure(name)})
        except Exception as error:
            rows.append({"what": name, "error": described(error)})
        free(bench)
    return rows


def free(bench: Bench) -> None:
    """Free the memory of what is no longer used."""
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


class Pictures:
    """A source of smooth synthetic images; see `common.data.sources.Source`."""

    def __init__(self, channels: int, side: int) -> None:
        self.channels, self.classes = channels, []
        self.images = step.make_pixels(PICTURES, side, torch.Generator().manual_seed(0))[:, :channels]

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        """Return an image, uint8 of shape (channels, side, side)."""
        return self.images[index]

    def label(self, index: int) -> int:
        """Return −1: there are no classes."""
        return -1

    def name(self, index: int) -> str:
        """Return the name of the image in messages."""
        return f"synthetic image {index}"


def config_of(bench: Bench, method: str, *, size: str, batch: int, steps: int, **run: Any) -> Any:
    """Return the settings of the paper with another encoder, or of the digits for a toy, for a number of steps."""
    config = RECIPES[method].presets["digits" if bench.toy else "imagenet"]
    optimization = {"batch_size": batch * bench.processes.world_size, "device_batch": batch, "epochs": steps}
    if size == "shallow":
        optimization |= {"decoder_depth": min(2, config.network.decoder_depth)}
    return changed(config, size=size, **optimization, **run)


def method_of(method: str, config: Any) -> Any:
    """Build the module of a method."""
    torch.manual_seed(0)
    channels = config.data.channels
    return RECIPES[method].method(config, Normalize(IMAGENET_MEAN[:channels], IMAGENET_STD[:channels]))


def pictures_for(module: Any, config: Any) -> Pictures:
    """Return synthetic images somewhat larger than the views of a method."""
    return Pictures(config.data.channels, max(module.view_size) * 8 // 7)


def synthetic_batch(module: Any, config: Any) -> Any:
    """Return views of synthetic images, a batch of a device as the loader makes it."""
    samples = [(0, index % PICTURES) for index in range(config.optimization.device_batch)]
    return next(iter(Loader(views_of(module, config, pictures_for(module, config)), [samples])))


def views_of(module: Any, config: Any, source: Any) -> ViewDataset:
    """Return the views that a method is trained on."""
    default = CropFlip(module.view_size, scale=config.data.crop_scale, flip=config.data.flip)
    return ViewDataset(source, getattr(module, "views", default))


@dataclass
class Training:
    """A training by the engine, an epoch of which is a step unless there are more images."""

    engine: Any
    images: Any  # one batch of synthetic images, on the device
    views: ViewDataset
    config: Any

    @property
    def stream(self) -> Iterator[Any]:
        """Return the same batch again and again."""
        return itertools.repeat(self.images)

    def step(self) -> None:
        """Take one step on synthetic images."""
        self.engine.step(self.stream)

    def take(self, steps: int) -> None:
        """Take several steps on synthetic images."""
        for _ in range(steps):
            self.step()

    def check_loss(self) -> float:
        """Return the mean loss so far.

        Raises:
            ValueError: if a loss was not finite.
        """
        if float(self.engine.bad_step) >= 0:
            raise ValueError(f"the loss of step {int(self.engine.bad_step)} is not finite")
        window = self.engine.window
        return float(window[self.engine.names.index("loss")] / window[-1])


def training_of(
    bench: Bench, method: str, config: Any, *, source: Any = None, num_images: int | None = None
) -> Training:
    """Build a training of a method, on synthetic images unless a source is given."""
    module = method_of(method, config)
    optimization, processes = config.optimization, bench.processes
    images = to_device(synthetic_batch(module, config), bench.device)
    source = pictures_for(module, config) if source is None else source
    stage = Stage(processes, Data(config.data, source, None, None), config.run, bench.folder / method, method)
    batches = Batches(num_images or optimization.batch_size, optimization, processes, seed=0)
    engine = _Training(module, batches, optimization, stage, 0)
    return Training(engine, images, views_of(module, config, source), config)


# What must hold


class HostReads(TorchDispatchMode):
    """Count the operations for whose results the host would have to wait on a GPU."""

    WAIT = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.equal.default,
        torch.ops.aten._unique2.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation; what follows a schedule is computed on the host, in 0-d tensors of double precision."""
        of_host = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64 and args[0].ndim == 0
        self.count += function in self.WAIT and not of_host
        return function(*args, **(kwargs or {}))


@contextmanager
def synchronizations(device: torch.device) -> Iterator[HostReads]:
    """Raise an error where the host waits for a GPU; on a CPU, count the operations that would wait."""
    reads = HostReads()
    if device.type == "cpu":
        with reads:
            yield reads
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield reads
    finally:
        torch.cuda.set_sync_debug_mode("default")


def sync(bench: Bench) -> list[Row]:
    """Take 20 steps of each method, uncompiled, in which the host must not wait for the device."""
    batch, steps = (2, 2) if bench.toy else (32, 20)

    def of(method: str) -> Row:
        config = config_of(bench, method, size=bench.size("shallow"), batch=batch, steps=steps + 3, compile="off")
        training = training_of(bench, method, config)
        training.take(3 if steps > 3 else 1)
        with synchronizations(bench.device) as found:
            training.take(steps)
        training.check_loss()
        return {"steps": steps, "synchronizations": found.count}

    return each(bench, bench.methods, of)


def recompiles(bench: Bench) -> list[Row]:
    """Count the graphs of a compiled training whose schedules move from their beginning to their end.

    Graphs are captured and not lowered, because capturing alone decides how many there are.
    """
    batch, steps = (2, 3) if bench.toy else (32, 20)

    def of(method: str) -> Row:
        config = config_of(bench, method, size=bench.size("shallow"), batch=batch, steps=steps, compile="on")
        with captured_only():
            training = training_of(bench, method, config)
            before = graphs()
            training.step()
            first = graphs()
            training.take(steps - 1)
        training.check_loss()
        return {"graphs": first - before, "graphs after step 1": graphs() - first, "steps": steps}

    return each(bench, bench.methods, of)


def graphs() -> int:
    """Return how many graphs this process has captured."""
    return counters["stats"]["unique_graphs"]


def determinism(bench: Bench) -> list[Row]:
    """Compare two equal runs of a few steps of each method bit by bit, and the noise with that of a CPU."""
    batch, steps = (2, 2) if bench.toy else (64, 5)

    def of(name: str) -> Row:
        method, _, how = name.partition(" ")
        compile_ = "on" if how else "off"
        config = config_of(bench, method, size=bench.size("shallow"), batch=batch, steps=steps, compile=compile_)
        with bench.compiler():
            training = training_of(bench, method, config)
            start = {key: tensor.clone() for key, tensor in training.engine.method.state_dict().items()}
            (losses, weights), (other_losses, other_weights) = (a_run(training, start, steps) for _ in range(2))
        training.check_loss()
        loss = float((losses - other_losses).abs().max())
        weight = max(float((weights[key].double() - other_weights[key].double()).abs().max()) for key in weights)
        same = losses.equal(other_losses) and all(weights[key].equal(other_weights[key]) for key in weights)
        return {"equal": same, "largest difference of losses": loss, "of weights": weight}

    def noise(_: str) -> Row:
        values = [drawn(device) for device in (bench.device, bench.device, torch.device("cpu"))]
        again, cpu = (values[0].equal(other) for other in values[1:])
        return {"equal": again, "equal to the CPU's": cpu}

    compiled = [f"{method} compiled" for method in COMPILED if method in bench.methods]
    return each(bench, [*bench.methods, *compiled], of) + each(bench, ["noise"], noise)


def a_run(training: Training, start: dict[str, Tensor], steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Train from the first step on, and return the sums of the losses after each step, and the final weights."""
    engine: Any = training.engine
    engine.method.load_state_dict(start)
    engine.optimizer.state.clear()
    engine.done, engine.window = 0, None
    sums = []
    for _ in range(steps):
        training.step()
        window: Any = engine.window
        sums.append(window.clone())
    return torch.stack(sums), {key: tensor.clone() for key, tensor in engine.method.state_dict().items()}


def drawn(device: torch.device) -> Tensor:
    """Return noise for 64 images, on the host."""
    noise = Noise(micro_batch=64, rank=0, world_size=1, device=device, seed=0)
    return noise.at(1, 0)(64, 196).cpu()
