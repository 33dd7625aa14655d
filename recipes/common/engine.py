"""One training loop for all methods, in plain PyTorch, on one device or, under `torchrun`, on many.

A method is an `nn.Module` with

- `noise(rand, batch)`: all its chance, as a dict of uniform tensors whose first axis is the batch;
- `forward(batch, noise, progress)`: a dict of 0-d losses; the one called "loss" is minimized, all are logged;
- `after_step(progress)`, if something follows the optimizer.

`progress` is the share of the training that is done, a 0-d tensor in double precision.

All chance is a function of (seed, step, sample), so a run that was killed and resumed is the same run bit for bit,
and so (up to the order of sums) is one that is spread over more devices or accumulated in more pieces.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from common.checkpoint import Checkpoints, write
from common.config import Optimization, Run
from common.images import seed_of

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass(frozen=True)
class World:
    """The devices that train together, and which of them this process has."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.first:
            tqdm.write(text)
            sys.stdout.flush()

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join the processes that `torchrun` started, or stand alone. Everything else is the same."""
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32 on a GPU
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, torch.device(device))
        return
    place = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, place)
    finally:
        dist.destroy_process_group()


def in_bf16(run: Run, place: World) -> bool:
    """Whether networks run under bf16 autocast: if asked for, or on a GPU unless told otherwise."""
    return run.precision == "bf16" or (run.precision == "auto" and place.device.type == "cuda")


def loading_processes(run: Run, place: World) -> int:
    """Processes that load images for one device: those asked for, or one per core that training leaves free."""
    if run.workers >= 0:
        return run.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, max(1, cores // place.size - 1))


def pieces(settings: Optimization, devices: int) -> tuple[int, int]:
    """Cut a batch into equal pieces: images per device at a time, and how many of these make a step.

    Raises:
        ValueError: if the devices cannot share the batch equally.
    """
    share, rest = divmod(settings.batch_size, devices)
    if rest or share < 1:
        raise ValueError(f"a batch of {settings.batch_size} images cannot be shared equally by {devices} devices")
    count = math.ceil(share / settings.device_batch)
    while share % count:
        count += 1
    return share // count, count


class Batches:
    """The (epoch, index) of every image, in the order in which this process needs them.

    Each epoch is a permutation that depends on (seed, epoch) alone; what does not fill a batch is left out of it. The
    images of one step are the same whatever the number of devices and pieces.
    """

    def __init__(self, images: int, settings: Optimization, place: World, *, seed: int) -> None:
        self.steps_per_epoch = images // settings.batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"{images} images do not fill a batch of {settings.batch_size}: use a smaller --batch-size"
            )
        self.images, self.batch_size, self.seed, self.place = images, settings.batch_size, seed, place
        self.piece, self.count = pieces(settings, place.size)
        self.steps = settings.epochs * self.steps_per_epoch

    def since(self, step: int) -> Iterator[list[tuple[int, int]]]:
        """All pieces from a step on, `count` per step."""
        for epoch in range(step // self.steps_per_epoch, self.steps // self.steps_per_epoch):
            generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
            order = torch.randperm(self.images, generator=generator).tolist()
            for i in range(max(0, step - epoch * self.steps_per_epoch), self.steps_per_epoch):
                for j in range(self.count):
                    start = i * self.batch_size + (j * self.place.size + self.place.rank) * self.piece
                    yield [(epoch, index) for index in order[start : start + self.piece]]


class Rand:
    """Uniform noise for one piece of a step: `rand(batch, …)` gives float32 in [0, 1) on the device.

    The first axis is the batch. It is drawn for all images of the step and cut, so every image gets the same noise
    whatever the number of devices and pieces.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.generator = torch.Generator(batches.place.device)
        self.rows = slice(0)

    def at(self, step: int, piece: int) -> "Rand":
        """Go to a piece of a step. The same calls then give the same noise."""
        place, size = self.batches.place, self.batches.piece
        self.generator.manual_seed(seed_of(self.batches.seed, "noise", step))
        first = (piece * place.size + place.rank) * size
        self.rows = slice(first, first + size)
        return self

    def __call__(self, batch: int, *shape: int) -> Tensor:
        if batch != self.batches.piece:
            raise ValueError(f"noise for {batch} images was asked for in a piece of {self.batches.piece}")
        generator = self.generator
        return torch.rand(self.batches.batch_size, *shape, generator=generator, device=generator.device)[self.rows]


def epoch_of(progress: Tensor, epochs: int) -> Tensor:
    """The epoch, counted from 0, for what is constant within one; a 0-d tensor."""
    return (progress * epochs + 1e-6).floor()  # the product of a rounded quotient may lie below the epoch's start


def by_epoch(epoch: float, *, lr: float, min_lr: float, warmup: float, epochs: float) -> float:
    """Warm up from 0, then half a cosine, both of the fractional epoch. Source: MAE (published code)."""
    if epoch < warmup:
        return lr * epoch / warmup
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def by_step(step: int, *, lr: float, min_lr: float, warmup: int, steps: int) -> float:
    """Warm up linearly so that the last warm-up step has all of `lr`, then half a cosine. Source: Beyond Masking."""
    if step < warmup:
        return lr * step / max(1, warmup - 1)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def by_last_step(
    step: int, *, lr: float, min_lr: float, start_lr: float, warmup: int, steps: int, milestones: Sequence[int] = ()
) -> float:
    """Warm up from `start_lr`, then half a cosine counted from step 0, or a tenth at each milestone; one step late.

    The cosine has fallen already when the warm-up ends: there the rate jumps down. The first two steps have the same
    rate, because it is set after a step, from that step's number. Source: SimMIM (published code).
    """
    done = max(step - 1, 0)
    if done < warmup:
        return start_lr + (lr - start_lr) * done / warmup
    if milestones:
        return lr * 0.1 ** sum(milestone <= done for milestone in milestones)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * done / steps))


def peak_rate(settings: Optimization) -> float:
    """The learning rate after the warm-up: it grows with the batch size, or with its square root."""
    size, reference = settings.batch_size, settings.sqrt_rule_at
    return settings.base_lr * (size if reference is None else math.sqrt(size * reference)) / 256


def learning_rate(step: int, settings: Optimization, steps_per_epoch: int) -> float:
    """The learning rate of a step, before the scale of a parameter group."""
    lr, end = peak_rate(settings), settings.epochs
    if settings.schedule == "epoch":
        warmup = min(settings.warmup_epochs, end)
        return by_epoch(step / steps_per_epoch, lr=lr, min_lr=settings.min_lr, warmup=warmup, epochs=end)
    steps, warmup = end * steps_per_epoch, int(min(settings.warmup_epochs, end) * steps_per_epoch)
    if settings.schedule == "step":
        return by_step(step, lr=lr, min_lr=settings.min_lr, warmup=warmup, steps=steps)
    return by_last_step(
        step,
        lr=lr,
        min_lr=settings.min_lr,
        start_lr=settings.warmup_lr,
        warmup=warmup,
        steps=steps,
        milestones=[int(epoch * steps_per_epoch) for epoch in settings.milestones],
    )


def layer_of(name: str, depth: int) -> int:
    """Number of a parameter's layer: 0 tokens, positions and patches, k + 1 block k, depth + 1 all that comes after."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.startswith(("cls_token", "mask_token", "pos_embed", "patch_embed.")) else depth + 1


def parameter_groups(module: nn.Module, settings: Optimization, *, depth: int = 0) -> list[dict[str, Any]]:
    """Sort trainable parameters by weight decay and by the layer-wise scale of the learning rate.

    Biases, norms and whatever else is 1-D never decay, nor what `settings.undecayed` names. With a layer decay other
    than 1, `depth` is the number of blocks of the encoder; a module's encoder may stand under the name "encoder".
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.endswith(".bias") or name.split(".")[-1] in settings.undecayed
        decay = 0.0 if plain else settings.weight_decay
        scale = settings.layer_decay ** (depth + 1 - layer_of(name.removeprefix("encoder."), depth))
        scale = 1.0 if settings.layer_decay == 1 else scale
        group = groups.setdefault((decay, scale), {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def clip(parameters: Collection[nn.Parameter], norm: float, *, each: bool = False) -> None:
    """Scale down the whole gradient to a norm, or the gradient of each parameter on its own.

    The device is not waited for.
    """
    if not each:
        nn.utils.clip_grad_norm_(parameters, norm)
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch._foreach_norm(gradients)  # pyright: ignore
    torch._foreach_mul_(gradients, [(norm / (own + 1e-6)).clamp(max=1.0) for own in norms])  # pyright: ignore


class Loader(Protocol):
    """What the loop reads its batches from."""

    @property
    def unreadable(self) -> Collection[str]: ...

    def __iter__(self) -> Iterator[Any]: ...


def train(
    method: nn.Module,
    load: Callable[[Iterable[list[tuple[int, int]]]], Loader],
    *,
    images: int,
    settings: Optimization,
    run: Run,
    folder: Path,
    place: World,
    depth: int = 0,
    title: str = "train",
    config: dict[str, Any] | None = None,
    draw: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Train a method to the end, or on to the end from its newest checkpoint.

    Args:
        method: see the head of this file; moved to the device.
        load: makes the loader of batches from the (epoch, index) of their images.
        images: number of training images.
        settings: of the optimizer.
        run: of the program.
        folder: gets `metrics.jsonl`, TensorBoard's events and `checkpoint/`.
        place: from `world`.
        depth: blocks of the encoder, for a layer-wise learning rate.
        title: in front of the progress bar.
        config: kept with the checkpoint; resuming under another one is refused.
        draw: called with a path at the end of the training, to draw what was learned.

    Returns:
        the last losses, images per second, and the share of time spent waiting for data.

    Raises:
        ValueError: if a loss is not finite (the last good checkpoint stays), or a run cannot be resumed.
    """
    batches = Batches(images, settings, place, seed=run.seed)
    checkpoints, log = Checkpoints(folder / "checkpoint", keep=run.keep), folder / "metrics.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    method.to(place.device).train()
    groups = parameter_groups(method, settings, depth=depth)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=1e-8, fused=True)
    steps, per_epoch = batches.steps, batches.steps_per_epoch

    # Where to start
    start, window, last, before = 0, None, {}, 0.0
    found = checkpoints.load() if run.resume else None
    if found is not None:
        start, tensors, state = found
        _refuse_other(config, state["config"], folder)
        window, last, before = _restore(method, optimizer, tensors, place.device), state["last"], state["seconds"]
        place.say(f"{title}: resuming at step {start} of {steps}")
    grown = f"{settings.batch_size}" if settings.sqrt_rule_at is None else f"√(that · {settings.sqrt_rule_at})"
    place.say(
        f"{title}: {images} images, {settings.epochs} epochs of {per_epoch} steps; batch {settings.batch_size} = "
        f"{place.size} device(s) × {batches.piece} images × {batches.count}; "
        f"learning rate {settings.base_lr:g} × {grown} / 256 = {peak_rate(settings):g}"
    )

    # The step
    bf16 = in_bf16(run, place)
    model = _compiled(method, run, place, static=batches.count == 1)
    progress = torch.zeros((), dtype=torch.float64, device=place.device)
    bad = torch.full((), -1.0, device=place.device)  # the first step whose loss was not finite
    rand = Rand(batches)
    parameters = [parameter for group in groups for parameter in group["params"]]

    writer = _Log(log, folder, start) if place.first else None
    signals = _Signals()
    loader = load(batches.since(start))
    stream = iter(loader) if start < steps else iter(())
    waited = seconds = 0.0
    names: list[str] = last.get("names", [])
    bar = tqdm(total=steps, initial=start, desc=title, unit="step", disable=None if place.first else True, leave=False)
    begin = checked = saved = time.perf_counter()

    stored = start if found is not None else None  # the newest step that is known to be whole on the disk

    def save(step: int) -> None:
        nonlocal stored
        if place.first and stored != step:
            tensors = {f"method.{name}": tensor for name, tensor in method.state_dict().items()}
            for i, parameter in enumerate(parameters):
                tensors |= {f"optimizer.{i}.{name}": value for name, value in optimizer.state[parameter].items()}
            tensors |= {} if window is None else {"window": window}
            state = {"config": config, "last": last | {"names": names}, "seconds": before + time.perf_counter() - begin}
            checkpoints.save(step, tensors, state)
        stored = step

    def refuse_broken(step: int) -> None:
        """What is saved and exported is finite: a loss that was, is from before the step."""
        kept = [*method.state_dict().values(), *(x for state in optimizer.state.values() for x in state.values())]
        if _agree([1.0 - float(all_finite(kept))], place)[0]:
            raise ValueError(f"the weights after step {step} are not finite; {kept_checkpoint()}")

    def kept_checkpoint() -> str:
        saved = checkpoints.steps()
        return f"the checkpoint of step {saved[-1]} is kept" if saved else "no checkpoint was written yet"

    try:
        for step in range(start, steps):
            progress.fill_(step / steps)
            current = learning_rate(step, settings, per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = current * group["lr_scale"]
            for piece in range(batches.count):
                asked = time.perf_counter()
                batch = to_device(next(stream), place.device)
                waited += time.perf_counter() - asked
                noise = method.noise(rand.at(step, piece), batches.piece)  # pyright: ignore
                hold = batches.count > piece + 1 and isinstance(model, DistributedDataParallel)
                with model.no_sync() if hold else contextlib.nullcontext():  # pyright: ignore
                    with torch.autocast(place.device.type, torch.bfloat16, enabled=bf16):
                        losses = model(batch, noise, progress)
                    (losses["loss"] / batches.count).backward()
                names = list(losses)
                values = torch.stack([value.detach().float() for value in losses.values()]) / batches.count
                window = _padded(values) if window is None else window + _padded(values)
                bad = torch.where((bad < 0) & ~torch.isfinite(values).all(), float(step), bad)
            assert window is not None
            window[-1] += 1
            if settings.clip is not None:
                clip(parameters, settings.clip, each=settings.clip_each)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if hasattr(method, "after_step"):
                with torch.no_grad():
                    method.after_step(progress)  # pyright: ignore
            done = step + 1
            bar.update()

            # Read the losses every so often: only here does the host wait for the device
            boundary = done % run.log_every == 0 or done == steps
            if not boundary and not (signals.asked and place.size == 1):
                continue
            now = time.perf_counter()
            due = done == steps or now - saved > run.checkpoint_minutes * 60
            broken, stop, due = _agree([float(bad), float(signals.asked), float(due)], place)
            if broken >= 0:
                raise ValueError(f"the loss of step {int(broken)} is not finite; {kept_checkpoint()}")
            if boundary:
                mean = _mean(window, place)
                window, seconds = None, now - checked
                speed = (done - max(start, (done - 1) // run.log_every * run.log_every)) * settings.batch_size / seconds
                last = {"step": done, "epoch": done / per_epoch, **dict(zip(names, mean, strict=True)), "lr": current}
                timing = {"images_per_second": speed, "waiting": waited / seconds}
                if writer is not None:
                    writer.add(last | timing)
                bar.set_postfix_str(
                    f"loss {last['loss']:.4f}, lr {current:.2e}, {speed:.0f} img/s, data {timing['waiting']:.0%}"
                )
                if bar.disable and (done == steps or done * 10 // steps != (done - run.log_every) * 10 // steps):
                    place.say(f"{title}: {done}/{steps} steps, loss {last['loss']:.4f}, {speed:.0f} img/s")
                checked, waited = now, 0.0
            if due or stop:
                refuse_broken(done)
                save(done)
                saved = time.perf_counter()
            if stop and done < steps:
                place.wait()
                place.say(f"{title}: stopped by a signal at step {done} of {steps}; go on with --resume")
                sys.exit(0)
    finally:
        bar.close()
        signals.restore()
        if writer is not None:
            writer.close()
        del stream  # ends the loader's processes
    elapsed = before + (time.perf_counter() - begin if start < steps else 0.0)
    if loader.unreadable:
        place.say(f"{title}: {len(loader.unreadable)} unreadable images were skipped: {', '.join(loader.unreadable)}")
    if draw is not None and place.first:
        with torch.compiler.set_stance("force_eager"):  # other shapes would fill the cache of compiled blocks
            draw(folder)
    place.wait()
    records = [record for record in read_metrics(log) if "images_per_second" in record]
    speeds = sorted(record["images_per_second"] for record in records)
    waits = [record["waiting"] for record in records]
    return {
        **{name: value for name, value in last.items() if name != "names"},
        "images_per_second": speeds[len(speeds) // 2] if speeds else 0.0,
        "waiting": sum(waits) / max(1, len(waits)),
        "unreadable": sorted(loader.unreadable),
        "seconds": elapsed,
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`; a last line that was cut off in the middle is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


class _Log:
    """`metrics.jsonl` and TensorBoard; what stands there after the step of a resumed checkpoint is taken back."""

    def __init__(self, path: Path, folder: Path, start: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= start]
        write(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self.file = path.open("a")
        self.board = SummaryWriter(str(folder), purge_step=start or None)

    def add(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name, value in record.items():
            self.board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.file.close()
        self.board.close()


class _Signals:
    """Note that the process was asked to end, instead of ending at once."""

    def __init__(self) -> None:
        self.asked = False
        self.before: Any = None
        with contextlib.suppress(ValueError):  # not in the main thread: then nobody asks this way
            self.before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self.asked = True

    def restore(self) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)


def _compiled(method: nn.Module, run: Run, place: World, *, static: bool) -> Callable[..., dict[str, Tensor]]:
    """Wrap a method for its devices: compiled whole on one, block by block before the wrapper on many."""
    wanted = run.compile == "on" or (run.compile == "auto" and place.device.type == "cuda")
    if wanted:
        torch.compiler.reset()  # the graphs of one training leave all of the cache to those of the next
    if place.size == 1:
        return torch.compile(method, fullgraph=True, dynamic=False) if wanted else method
    if wanted:
        for part in method.modules():
            if getattr(part, "compile_alone", False):
                part.compile(fullgraph=True, dynamic=False)
    return DistributedDataParallel(method, gradient_as_bucket_view=True, static_graph=static, broadcast_buffers=False)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move a batch, a tensor or tuples of them."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return type(batch)(to_device(part, device) for part in batch)


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether all numbers are finite, a 0-d tensor; the device is not waited for."""
    return torch.stack([tensor.isfinite().all() for tensor in tensors]).all()


def _padded(values: Tensor) -> Tensor:
    """Sums of losses, with a place for the number of steps behind them."""
    return torch.cat([values, values.new_zeros(1)])


def _mean(window: Tensor, place: World) -> list[float]:
    if place.size > 1:
        dist.all_reduce(window)
    return (window[:-1] / window[-1]).tolist()


def _agree(flags: list[float], place: World) -> list[float]:
    """The greatest of each flag over all processes, so that they decide alike."""
    if place.size == 1:
        return flags
    together = torch.tensor(flags, device=place.device)
    dist.all_reduce(together, dist.ReduceOp.MAX)
    return together.tolist()


def _restore(
    method: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], device: torch.device
) -> Tensor | None:
    prefix = "method."
    method.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            optimizer.state[parameters[int(index)]][name] = value.to(device)
    return tensors["window"].to(device) if "window" in tensors else None


def _refuse_other(now: dict[str, Any] | None, before: dict[str, Any] | None, folder: Path) -> None:
    """Compare two configurations, apart from what does not change the result."""
    harmless = {"resume", "workers", "checkpoint_minutes", "keep", "runs", "name", "device_batch", "compile", "data"}
    now_flat, before_flat = _flat(now or {}), _flat(before or {})
    for key in now_flat.keys() | before_flat.keys():
        if key.split(".")[-1] not in harmless and now_flat.get(key) != before_flat.get(key):
            raise ValueError(
                f"{folder} was trained with {key}={before_flat.get(key)} and cannot be resumed with {now_flat.get(key)}"
            )


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat
