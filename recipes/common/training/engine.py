"""One training loop for all methods, in plain PyTorch, on one device or, under `torchrun`, on several.

A method is an `nn.Module` with

- `noise(rand, batch)`: all its randomness, as a dict of uniform tensors whose first axis is the batch, or which are
  shared by all images of a step (`rand.shared`);
- `forward(batch, noise, progress)`: a dict of 0-d losses; the one named "loss" is minimized, all are logged;
- `after_step(progress)`, optional, called after the optimizer step, for example for an EMA update.

`progress` is the fraction of the training that is done, a 0-d tensor in double precision, in `after_step` on the CPU.

Every random draw depends only on (seed, step, sample) and is the same on every device, so on a CPU an interrupted and
resumed run is bitwise identical to an uninterrupted one. Distributing it over devices or micro-batches changes only the
order of sums, unless a method normalizes within a micro-batch; on a GPU this order also differs from run to run,
because some backward passes add atomically.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from common.config import Optimization, SettingsError
from common.data.loading import check_readable
from common.runs import Stage
from common.training.checkpoint import Checkpoint, Checkpoints, check_fit
from common.training.distributed import in_bf16
from common.training.log import Log, read_metrics, show_picture
from common.training.optimizer import clip, parameter_groups
from common.training.parallel import compiled, own, restore, synchronized, trainable
from common.training.progress import Progress
from common.training.schedules import learning_rate, peak_rate
from common.training.sharded import read_shards
from common.training.signals import Stopped, StopSignal
from common.training.step import Batches, all_finite, to_device

import torch
from torch import Tensor, nn


class Loader(Protocol):
    """An iterable of batches."""

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Return the errors of the images that could not be read, by their names."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


def train(
    method: nn.Module,
    load: Callable[[Iterable[list[tuple[int, int]]]], Loader],
    *,
    num_images: int,
    settings: Optimization,
    stage: Stage,
    depth: int = 0,
    draw: Callable[[Path], None] | None = None,
    shorter: Callable[[float], str] | None = None,
    measure: Callable[[], dict[str, float]] | None = None,
    measurements: int = 0,
) -> dict[str, Any]:
    """Train a method to the end, starting from its newest checkpoint if the run is resumed.

    Args:
        method: the module to train, see the module docstring; it is moved to the device.
        load: builds the loader from the micro-batches, each a list of (epoch, index).
        num_images: number of training images.
        settings: settings of the optimizer.
        stage: processes, folder and title; `metrics.jsonl`, TensorBoard events and `checkpoint/` go to the folder.
        depth: number of blocks of the encoder, for layer-wise learning-rate decay.
        draw: called with the folder after training, to draw predictions.
        shorter: returns what would be shorter than a number of seconds, to be said with the estimated time; or empty.
        measure: called by all processes after evenly spaced steps, to log numbers that it computes with the method; it
            must change neither weights nor random state. Its time does not count as training.
        measurements: number of these calls, the last one after the last step.

    Returns:
        The last losses, the median of images per second, the fraction of time spent waiting for data, the seconds of
        training, and the names of unreadable images.

    Raises:
        SettingsError: if a loss or weight is not finite or the disk is full (the last good checkpoint is kept), if
            checkpoints are damaged or do not fit, if there are fewer images than a batch has, or if more than 1 percent
            of them cannot be read.
        Stopped: if a signal stops the run, after a checkpoint is written.
    """
    training = _Training(
        method, Batches(num_images, settings, stage.processes, seed=stage.run.seed), settings, stage, depth
    )
    training.shorter = shorter
    if measure is not None:
        training.measure, training.measurements = measure, measurements
    training.resume()
    training.announce(num_images)
    loader = load(training.batches.since(training.done))
    processes = stage.processes
    with StopSignal(processes.maximum, world_size=processes.world_size, step=training.done) as stop:
        training.run(loader, stop)
    restore(method, training.method, processes)
    unreadable = stage.report_unreadable(loader.unreadable, num_images)
    if draw is not None and processes.is_main:
        with torch.compiler.set_stance("force_eager"):  # other shapes would trigger recompilation
            draw(stage.folder)
        for picture in stage.folder.glob("reconstruction.png"):
            show_picture(picture, training.done)
    processes.barrier()
    return training.result() | {"unreadable": sorted(unreadable)}


class _Training:
    """The state of a training: method, optimizer and progress."""

    def __init__(self, method: nn.Module, batches: Batches, settings: Optimization, stage: Stage, depth: int) -> None:
        stage.folder.mkdir(parents=True, exist_ok=True)
        self.batches, self.settings, self.stage = batches, settings, stage
        self.checkpoints = Checkpoints(stage.folder / "checkpoint", keep=stage.run.keep)
        device = stage.processes.device
        self.original = method  # of which `method` is a sharded copy, or the same
        self.method = method = trainable(method, stage.run, stage.processes)
        method.train()
        groups = parameter_groups(method, settings, depth=depth)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.parameter_names = [name for group in groups for name in group["names"]]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=1e-8, fused=True)
        self.model = compiled(method, stage.run, stage.processes, static=batches.count == 1)
        self.bf16, self.noise = in_bf16(stage.run, stage.processes), batches.noise()
        self.progress = torch.zeros((), dtype=torch.float64, device=device)
        self.bad_step = torch.full((), -1.0, device=device)  # the first step whose loss was not finite
        self.unreadable = 0  # images that this process could not read, at the last check
        self.done, self.stored = 0, -1  # completed steps, and the step of the newest checkpoint
        self.logged = 0  # the step of the last record, or of the start of this process
        self.measure: Callable[[], dict[str, float]] = dict
        self.measurements = 0
        self.window: Tensor | None = None  # sums of the losses since the last record, and the number of steps
        self.names: list[str] = []  # names of the losses
        self.last: dict[str, Any] = {}  # the last record
        self.shorter: Callable[[float], str] | None = None
        self.seconds = self.waited = 0.0
        self.began = self.read_at = self.saved_at = time.perf_counter()

    def resume(self) -> None:
        """Restore the newest checkpoint, if the run is resumed and there is one."""
        found = self.checkpoints.load_together(self.stage.processes) if self.stage.run.resume else None
        if found is None:
            return
        self.stage.print(f"resuming at step {found.step} of {self.batches.steps}")
        self.done = self.stored = found.step
        if not found.step:  # stopped before the first step: the initial weights follow from the settings
            return
        described = found.described
        self.check(found, described)
        moments = {name: tensor for name, tensor in described.items() if name.startswith("optimizer.")}
        parameters = dict(zip(self.parameter_names, self.parameters, strict=True))
        for key, moment in moments.items():
            parameter, _, name = key.removeprefix("optimizer.").rpartition(".")
            like = parameters[parameter].detach() if moment.ndim else self.progress.float()
            self.optimizer.state[parameters[parameter]][name] = torch.zeros_like(like)
        windows = None
        if "window" in described:
            windows = torch.zeros_like(described["window"], device=self.progress.device)
        read_shards(found.folder, self.tensors(windows))
        self.window = None if windows is None else self.own_window(windows)
        self.names, self.last, self.seconds = (found.state[key] for key in ("names", "last", "seconds"))

    def own_window(self, windows: Tensor) -> Tensor:
        """Return this process's sums of losses; their mean, if there were more or fewer processes."""
        processes = self.stage.processes
        return windows[processes.rank] if len(windows) == processes.world_size else windows.mean(dim=0)

    def check(self, found: Checkpoint, described: Mapping[str, Tensor]) -> None:
        """Check that a checkpoint fits this training, before anything is restored.

        Raises:
            SettingsError: naming the first tensor whose name, shape or dtype differs.
        """
        expected = {f"method.{name}": tensor for name, tensor in self.method.state_dict().items()}
        for name, parameter in zip(self.parameter_names, self.parameters, strict=True):
            moments = {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.zeros(())}
            expected |= {f"optimizer.{name}.{moment}": tensor for moment, tensor in moments.items()}
        processes = len(described["window"]) if "window" in described else 1
        expected["window"] = torch.zeros(processes, len(found.state["names"]) + 1)
        try:  # a parameter without gradient has no moments, and right after a record the window is empty
            check_fit(described, expected, optional=("optimizer.", "window"))
        except SettingsError as error:
            raise SettingsError(f"{found.folder} does not fit: {error}; start over with --restart") from error

    def tensors(self, windows: Tensor | None) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint by name: those of method and optimizer, and the losses to be logged."""
        tensors = {f"method.{name}": tensor for name, tensor in self.method.state_dict().items()}
        for name, parameter in zip(self.parameter_names, self.parameters, strict=True):
            moments = self.optimizer.state[parameter]
            tensors |= {f"optimizer.{name}.{moment}": value for moment, value in moments.items()}
        return tensors if windows is None else tensors | {"window": windows}

    def announce(self, num_images: int) -> None:
        """Print the number of images, epochs and steps, the batch size and the learning rate."""
        batches, settings = self.batches, self.settings
        size, reference = batches.batch_size, settings.sqrt_rule_at
        scale = f"{size}" if reference is None else f"√({size} · {reference})"
        self.stage.print(
            f"{num_images} images, {settings.epochs} epochs of {batches.steps_per_epoch} steps; batch {size} = "
            f"{self.stage.processes.world_size} device(s) × {batches.micro_batch} images × {batches.count} "
            f"micro-batch(es); learning rate {settings.base_lr:g} × {scale} / 256 = {peak_rate(settings):g}"
        )

    def run(self, loader: Loader, stop: StopSignal) -> None:
        """Train to the end, or until a process receives a stop signal."""
        stage, steps = self.stage, self.batches.steps
        shown = stage.processes.is_main
        stream = iter(loader) if self.done < steps else iter(())
        log = Log(stage.folder, self.done) if shown else None
        bar = Progress(
            stage.title,
            steps=steps,
            done=self.done,
            per_epoch=self.batches.steps_per_epoch,
            say=stage.print if shown else None,
            shorter=self.shorter,
        )
        self.began = self.read_at = self.saved_at = time.perf_counter()
        first = self.logged = self.done
        try:
            while self.done < steps:
                self.step(stream)
                stop.deferred = True
                bar.advance(self.done, lambda: float(self.bad_step))
                self.after(log, bar, loader, stopping=stop.agreed(self.done, last=self.done == steps))
            self.seconds += time.perf_counter() - self.began if first < steps else 0.0
        except Stopped as stopped:
            if not stopped.said:  # a signal before the end of the first step: there is nothing new to save
                if shown and self.stored < 0:
                    self.checkpoints.save(0, {"progress": self.progress}, {})
                self.say_stopped()
            raise Stopped(said=True) from None
        finally:
            bar.close()
            if log is not None:
                log.close()
            del stream  # shuts down the loader's processes

    def after(self, log: Log | None, bar: Progress, loader: Loader, *, stopping: bool) -> None:
        """Log, save and stop after a step, if it is time; only here does the host synchronize with the device."""
        run, steps = self.stage.run, self.batches.steps
        last = self.done == steps
        measuring = self.done * self.measurements // steps != (self.done - 1) * self.measurements // steps
        recording = self.done % run.log_every == 0 or last or measuring
        if not recording and not stopping:
            return
        due = self.agree(last or stopping or time.perf_counter() - self.saved_at > run.checkpoint_minutes * 60)
        self.check_readable(loader)
        if recording:
            self.read_losses(log, bar, self.measured() if measuring else {})
        if due:
            self.save()
        if stopping:
            self.say_stopped()
            raise Stopped(said=True)

    def say_stopped(self) -> None:
        """Print the step at which a signal stopped the training."""
        self.stage.print(f"stopped by a signal at step {self.done} of {self.batches.steps}; go on with --resume")

    def step(self, stream: Iterator[Any]) -> None:
        """Take one optimizer step."""
        batches, settings, device = self.batches, self.settings, self.progress.device
        method: Any = self.method
        self.progress.fill_(self.done / batches.steps)
        current = learning_rate(self.done, settings, batches.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = current * group["lr_scale"]
        for i in range(batches.count):
            asked = time.perf_counter()
            batch = to_device(next(stream), device)
            self.waited += time.perf_counter() - asked
            noise = method.noise(self.noise.at(self.done, i), batches.micro_batch)
            with synchronized(self.model, last=i == batches.count - 1):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                    losses = self.model(batch, noise, self.progress)
                (losses["loss"] / batches.count).backward()
            self.names = list(losses)
            values = torch.stack([value.detach().float() for value in losses.values()]) / batches.count
            sums = torch.cat([values, values.new_zeros(1)])
            self.window = sums if self.window is None else self.window + sums
            broken = (self.bad_step < 0) & ~torch.isfinite(values).all()
            self.bad_step = torch.where(broken, float(self.done), self.bad_step)
        assert self.window is not None
        self.window[-1] += 1
        if settings.clip is not None:
            clip(self.parameters, settings.clip, each=settings.clip_each)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if hasattr(method, "after_step"):
            with torch.no_grad():
                method.after_step(torch.tensor(self.done / batches.steps, dtype=torch.float64))
        self.done += 1

    def agree(self, due: bool) -> bool:
        """Agree among all processes on whether to save; check that losses and weights are finite."""
        bad_step, due_somewhere = self.stage.processes.maximum([float(self.bad_step), float(due)])
        if bad_step >= 0:
            raise SettingsError(f"the loss of step {int(bad_step)} is not finite; {self.what_is_kept()}")
        if due_somewhere:  # losses precede the step, so the updated weights are checked, too
            states = (tensor for state in self.optimizer.state.values() for tensor in state.values())
            finite = all_finite(map(own, [*self.method.state_dict().values(), *states]))
            if self.stage.processes.maximum([1.0 - float(finite)])[0]:
                raise SettingsError(f"the weights after step {self.done} are not finite; {self.what_is_kept()}")
        return bool(due_somewhere)

    def check_readable(self, loader: Loader) -> None:
        """Check that at most 1 percent of the images cannot be read, over all processes, if one has found another."""
        processes, found = self.stage.processes, len(loader.unreadable)
        if processes.maximum([float(found > self.unreadable)])[0]:
            check_readable(processes.union(loader.unreadable), self.batches.num_images)
        self.unreadable = found

    def what_is_kept(self) -> str:
        """Describe the checkpoint from which the run can be resumed."""
        saved = self.checkpoints.steps()
        return f"the checkpoint of step {saved[-1]} is kept" if saved else "no checkpoint was written yet"

    def measured(self) -> dict[str, float]:
        """Return the numbers that `measure` computes with the current weights."""
        start = time.perf_counter()
        restore(self.original, self.method, self.stage.processes)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # other shapes would trigger recompilation
            numbers = self.measure()
        if self.original is not self.method:
            self.original.cpu()  # the device has room for one copy of the parameters
        self.method.train()
        spent = time.perf_counter() - start
        self.began, self.read_at = self.began + spent, self.read_at + spent
        return numbers

    def read_losses(self, log: Log | None, bar: Progress, measured: dict[str, float]) -> None:
        """Log the mean losses since the last record and what was measured, and display the losses."""
        assert self.window is not None
        stage, steps, now = self.stage, self.batches.steps, time.perf_counter()
        stage.processes.sum(self.window)
        mean = (self.window[:-1] / self.window[-1]).tolist()
        seconds = now - self.read_at
        timing = {"images_per_second": (self.done - self.logged) * self.batches.batch_size / seconds}
        timing["waiting"] = self.waited / seconds
        rate = learning_rate(self.done - 1, self.settings, self.batches.steps_per_epoch)
        self.last = {"step": self.done, "epoch": self.done / self.batches.steps_per_epoch}
        self.last |= {**dict(zip(self.names, mean, strict=True)), "lr": rate}
        self.window, self.waited, self.read_at = None, 0.0, now
        since, self.logged = self.logged, self.done
        if log is not None:
            log.add(self.last | measured | timing)
        speed = f"{timing['images_per_second']:.0f} img/s"
        bar.show(f"loss {self.last['loss']:.4f}, {speed}, data {timing['waiting']:.0%}")
        bar.estimate(self.done)
        tenth = (self.done * 10 // steps) != (since * 10 // steps)
        if bar.hidden and (self.done == steps or tenth):
            stage.print(f"{self.done}/{steps} steps, loss {self.last['loss']:.4f}, {speed}")

    def save(self) -> None:
        """Write a checkpoint, unless this step already has one; collective.

        Raises:
            SettingsError: on every process, if it cannot be written.
        """
        if self.stored != self.done:
            processes = self.stage.processes
            windows = None if self.window is None else processes.gather(self.window)
            seconds = self.seconds + time.perf_counter() - self.began
            state = {"last": self.last, "names": self.names, "seconds": seconds}
            try:
                self.checkpoints.save(self.done, self.tensors(windows), state, processes)
            except SettingsError as error:
                raise SettingsError(f"{error}; {self.what_is_kept()}") from error
        self.stored, self.saved_at = self.done, time.perf_counter()

    def result(self) -> dict[str, Any]:
        """Return the last record, the median of images per second, the mean waiting fraction, and the seconds."""
        records = read_metrics(self.stage.folder / "metrics.jsonl")
        speeds = sorted(record["images_per_second"] for record in records)
        waits = [record["waiting"] for record in records]
        return {
            **self.last,
            "images_per_second": speeds[len(speeds) // 2] if speeds else 0.0,
            "waiting": sum(waits) / max(1, len(waits)),
            "seconds": self.seconds,
        }
