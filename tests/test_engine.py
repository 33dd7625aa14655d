"""The training loop: order of the images, noise, learning rates, clipping, resuming, and what stops it."""

import ctypes
import errno
import functools
import itertools
import json
import math
import os
import re
import resource
import runpy
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
from common.config import DataSettings, Optimization, Run, SettingsError
from common.data.embedded import Digits
from common.data.sources import Data
from common.runs import Stage
from common.training.checkpoint import Checkpoints
from common.training.distributed import Processes, in_bf16, join_processes, num_workers
from common.training.engine import train
from common.training.log import Log
from common.training.optimizer import clip, parameter_groups
from common.training.schedules import by_epoch, by_step, epoch_of, learning_rate
from common.training.signals import SIGNALS, Stopped, StopSignal, stopping_at_once
from common.training.step import Batches, micro_batches

import pytest
import torch
from forked import ended, fork, ranks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ALONE = Processes(0, 1, torch.device("cpu"))
DATA = Data(DataSettings(), Digits("train"), None, None)  # which the loop does not look at
RUN = Run(precision="fp32", compile="off", log_every=2, checkpoint_minutes=0.0)
SMALL = Optimization(epochs=3, batch_size=8, device_batch=8, base_lr=0.5, warmup_epochs=1.0)
IMAGES = 35  # four batches of 8, and three images left over


class Regression(nn.Module):
    """A method that learns the mean of its batch, with noise, and keeps a moving average of itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.average: Tensor
        self.register_buffer("average", torch.zeros(4, 4))

    def noise(self, rand: Any, batch: int) -> dict[str, Tensor]:
        return {"jitter": rand(batch, 4)}

    def forward(self, batch: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        error = (self.layer(batch) - 0.1 * noise["jitter"] * (1 + progress)).square().mean()
        return {"loss": error, "half": error / 2}

    def after_step(self, progress: Tensor) -> None:
        self.average.lerp_(self.layer.weight, 0.1 * (1 + progress))


class Memory:
    """A loader over images that are functions of their index; calls `event` with the number of each batch."""

    def __init__(self, batches: Iterable[list[tuple[int, int]]], event: Any = None) -> None:
        self.batches, self.event, self.unreadable = batches, event, {}

    def __iter__(self) -> Iterator[Tensor]:
        for number, samples in enumerate(self.batches):
            if self.event is not None:
                self.event(number)
            yield torch.stack([torch.sin(torch.arange(4.0) * (index + 1) + epoch) for epoch, index in samples])


def trained(
    folder: Path,
    *,
    event: Any = None,
    run: Run = RUN,
    settings: Optimization = SMALL,
    method: Regression | None = None,
    draw: Callable[[Path], None] | None = None,
) -> Any:
    method = method or Regression()
    stage = Stage(ALONE, DATA, run, folder, "pre-training")
    load = functools.partial(Memory, event=event)
    result = train(method, load, num_images=IMAGES, settings=settings, stage=stage, draw=draw)
    return method.state_dict(), result


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


def lines(folder: Path) -> list[dict[str, Any]]:
    apart = ("images_per_second", "waiting")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in apart} for record in records]


# The order of the images and the noise


@given(st.integers(1, 4), st.integers(1, 24), st.integers(1, 24))
def test_micro_batches_share_a_batch_equally_and_fit_the_device(devices: int, share: int, device_batch: int) -> None:
    size, count = micro_batches(Optimization(batch_size=share * devices, device_batch=device_batch), devices)
    assert size * count == share
    assert size <= device_batch


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3, 8]), st.integers(0, 11))
def test_every_step_has_the_same_images_on_any_number_of_devices(devices: int, device_batch: int, since: int) -> None:
    def steps(size: int, device_batch: int) -> list[list[tuple[int, int]]]:
        settings = Optimization(epochs=3, batch_size=8, device_batch=device_batch)
        ranks = [Batches(IMAGES, settings, Processes(r, size, torch.device("cpu")), seed=1) for r in range(size)]
        streams = [list(batches.since(since)) for batches in ranks]
        count = ranks[0].count
        rows = range(len(streams[0]) // count)
        return [[x for j in range(count) for s in streams for x in s[i * count + j]] for i in rows]

    assert steps(devices, device_batch) == steps(1, 8)
    assert len(steps(1, 8)) == 12 - since


def test_an_epoch_shows_no_image_twice_and_epochs_differ() -> None:
    stream = [sample for batch in Batches(IMAGES, SMALL, ALONE, seed=1).since(0) for sample in batch]
    assert len(set(stream)) == len(stream) == 3 * 32
    orders = [[index for epoch, index in stream if epoch == e] for e in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert Batches(IMAGES, SMALL, ALONE, seed=2).since(0).__next__() != stream[:8]


def test_reading_one_batch_makes_a_list_of_that_batch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    to_list = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: sizes.append(tensor.numel()) or to_list(tensor))
    next(Batches(10**6, SMALL, ALONE, seed=1).since(0))
    assert sizes == [8]


def test_resuming_reads_the_rest_of_the_stream() -> None:
    batches = Batches(IMAGES, SMALL, ALONE, seed=1)
    assert list(batches.since(5)) == list(batches.since(0))[5:]


def test_fewer_images_than_a_batch_is_one_sentence() -> None:
    with pytest.raises(SettingsError, match="7 images do not fill a batch of 8: use a smaller --batch-size"):
        Batches(7, SMALL, ALONE, seed=0)


def test_devices_that_cannot_share_a_batch_are_one_sentence() -> None:
    with pytest.raises(SettingsError, match="a batch of 8 images cannot be shared equally by 3 devices"):
        micro_batches(SMALL, 3)


@pytest.mark.parametrize(("devices", "device_batch"), [(1, 2), (2, 4), (4, 1), (2, 1)])
def test_every_image_has_the_same_noise_on_any_number_of_devices(devices: int, device_batch: int) -> None:
    def of_all(size: int, device_batch: int) -> Tensor:
        settings = Optimization(epochs=1, batch_size=8, device_batch=device_batch)
        parts = []
        ranks = [Batches(8, settings, Processes(r, size, torch.device("cpu")), seed=1) for r in range(size)]
        for micro_step in range(ranks[0].count):
            for batches in ranks:
                noise = batches.noise().at(3, micro_step)
                own, shared = noise(batches.micro_batch, 5), noise.shared(3).expand(batches.micro_batch, 3)
                parts.append(torch.cat([own, shared, noise(batches.micro_batch, 2)], dim=1))
        return torch.cat(parts)

    assert torch.equal(of_all(devices, device_batch), of_all(1, 8))
    assert (of_all(1, 8)[:, 5:8] == of_all(1, 8)[0, 5:8]).all()  # what the images of a step share
    assert of_all(1, 8).min() >= 0
    assert of_all(1, 8).max() < 1


def test_noise_differs_between_steps_and_calls_and_repeats_at_the_same_place() -> None:
    noise = Batches(8, SMALL, ALONE, seed=1).noise()
    first, second = noise.at(0, 0)(8, 3), noise(8, 3)
    assert not torch.equal(first, second)
    assert not torch.equal(first, noise.at(1, 0)(8, 3))
    assert not torch.equal(noise.at(0, 0).shared(3), noise.shared(3))
    assert not torch.equal(noise.at(0, 0).shared(3), noise.at(1, 0).shared(3))
    assert torch.equal(first, noise.at(0, 0)(8, 3))


def test_noise_for_another_number_of_images_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^noise for 3 images was requested in a micro-batch of 8$"):
        Batches(8, SMALL, ALONE, seed=1).noise().at(0, 0)(3, 5)


# The learning rate


@given(st.integers(2, 50), st.integers(0, 20), st.floats(0, 1e-3))
def test_the_learning_rate_rises_then_falls_to_its_end(epochs: int, warmup: int, end: float) -> None:
    settings = {"lr": 1.0, "min_lr": end, "epochs": epochs + warmup, "warmup": warmup}
    rates = [by_epoch(step / 4, **settings) for step in range(4 * (epochs + warmup))]
    top = 4 * warmup
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[top] == pytest.approx(1.0)
    assert by_epoch(epochs + warmup, **settings) == pytest.approx(end)


def test_the_step_schedule_reaches_its_top_in_the_last_step_of_the_warmup() -> None:
    rates = [by_step(step, lr=2.0, min_lr=0.0, warmup=5, steps=20) for step in range(20)]
    assert rates[0] == 0
    assert rates[4] == rates[5] == 2.0
    assert by_step(0, lr=2.0, min_lr=0.0, warmup=1, steps=9) == 0


def test_the_learning_rate_is_linear_in_the_batch() -> None:
    rates = [learning_rate(4, Optimization(epochs=9, warmup_epochs=1, batch_size=b), 4) for b in (256, 1024)]
    assert rates == [1.5e-4, pytest.approx(4 * 1.5e-4)]


def test_biases_and_norms_never_decay() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    module.register_parameter("mask_token", nn.Parameter(torch.zeros(1, 1, 2)))
    module.register_parameter("frozen", nn.Parameter(torch.zeros(2, 2), requires_grad=False))
    groups = {n: g["weight_decay"] for g in parameter_groups(module, Optimization()) for n in g["names"]}
    assert groups == {"mask_token": 0.05, "a.weight": 0.05, "a.bias": 0.0, "norm.weight": 0.0, "norm.bias": 0.0}


# Epochs


@pytest.mark.parametrize(("epochs", "per_epoch"), [(1600, 1250), (800, 312), (300, 7), (7, 49), (3, 1), (1, 1000)])
def test_an_epoch_begins_at_its_first_step_to_the_last_bit(epochs: int, per_epoch: int) -> None:
    """Progress is step / steps: its product with the epochs may be rounded to below the epoch's number."""
    first = torch.arange(epochs) * per_epoch
    steps = torch.cat([first, first + per_epoch - 1])
    progress = torch.tensor([step / (epochs * per_epoch) for step in steps.tolist()], dtype=torch.float64)
    assert torch.equal(epoch_of(progress, epochs).long(), steps // per_epoch)


@given(st.integers(1, 3000), st.integers(1, 100_000), st.data())
def test_every_step_lies_in_its_epoch(epochs: int, per_epoch: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, epochs * per_epoch - 1))
    progress = torch.tensor(step / (epochs * per_epoch), dtype=torch.float64)
    assert epoch_of(progress, epochs) == step // per_epoch


# Clipping


def with_gradients(*gradients: list[float] | None) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(gradient or [0.0]))) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient)
    return parameters


def gradients_of(parameters: list[nn.Parameter]) -> list[list[float] | None]:
    return [None if p.grad is None else pytest.approx(p.grad.tolist(), rel=1e-5) for p in parameters]  # pyright: ignore


def test_the_whole_gradient_is_scaled_to_the_norm() -> None:
    parameters = with_gradients([3.0, 0.0], None, [0.0, 4.0])
    clip(parameters, 1.0)
    assert gradients_of(parameters) == [[0.6, 0.0], None, [0.0, 0.8]]


def test_or_each_gradient_on_its_own() -> None:
    parameters = with_gradients([3.0, 4.0], None, [0.3, 0.4], [0.0])
    clip(parameters, 1.0, each=True)
    assert gradients_of(parameters) == [[0.6, 0.8], None, [0.3, 0.4], [0.0]]


@pytest.mark.parametrize("each", [False, True])
def test_a_gradient_below_the_norm_stays_the_same_to_the_last_bit(each: bool) -> None:
    parameters = with_gradients([0.1, 0.2, 0.3], None, [1 / 3])
    clip(parameters, 5.0, each=each)
    assert [p.grad.tolist() for p in parameters if p.grad is not None] == [
        torch.tensor([0.1, 0.2, 0.3]).tolist(),
        torch.tensor([1 / 3]).tolist(),
    ]


def test_clipping_each_gradient_is_its_definition() -> None:
    gradients = [
        torch.sin(torch.arange(count) + 1.0) * scale for count, scale in ((6, 0.1), (50, 3.0), (1, 9.0), (7, 0.0))
    ]
    parameters = with_gradients(*(gradient.tolist() for gradient in gradients))
    clip(parameters, 0.5, each=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.equal(gradient * (0.5 / (gradient.norm() + 1e-6)).clamp(max=1.0))


@pytest.mark.parametrize("each", [False, True])
def test_clipping_waits_for_nothing(each: bool) -> None:
    parameters = [nn.Parameter(torch.zeros(3, device="meta")), nn.Parameter(torch.zeros(2, 2, device="meta"))]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    clip(parameters, 1.0, each=each)


class Dispatched(TorchDispatchMode):
    """Lists the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_clipping_each_gradient_takes_as_many_operations_for_many_as_for_few() -> None:
    counts = []
    for many in (2, 20):
        parameters = [nn.Parameter(torch.empty(3, device="meta")) for _ in range(many)]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        with Dispatched() as dispatched:
            clip(parameters, 1.0, each=True)
        counts.append(len(dispatched.names))
    assert counts[0] == counts[1] < 10


# The device


def test_processes_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    eight_nodes = Processes(0, 64, torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert num_workers(Run(), eight_nodes) == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert num_workers(Run(), eight_nodes) == 16  # at most
    assert num_workers(Run(workers=3), eight_nodes) == 3
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert num_workers(Run(), Processes(0, 4, torch.device("cpu"))) == 15
    assert num_workers(Run(), eight_nodes) == 1


@pytest.mark.parametrize("native", [False, True])
def test_a_gpu_that_only_emulates_bf16_runs_in_fp32_and_says_so_once(
    native: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu, asked = Processes(0, 1, torch.device("cuda", int(native))), []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert [in_bf16(Run(), gpu), in_bf16(Run(), gpu)] == [native] * 2
    assert asked == [False]
    line = "this GPU has no native bf16: running in fp32\n"
    assert capsys.readouterr().out == ("" if native else line)
    assert in_bf16(Run(precision="bf16"), gpu)
    assert not in_bf16(Run(precision="fp32"), gpu)
    assert not in_bf16(Run(), ALONE)


def test_freed_memory_is_kept() -> None:
    """Three buffers of 20 MB are written again without the 15,000 page faults of the first time."""
    before = 0
    for _ in range(10):  # until the heap has a place for each
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for buffer in [torch.empty(20_000_000, dtype=torch.uint8) for _ in range(3)]:
            buffer.fill_(1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_c_libraries_without_mallopt_are_left_alone(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def library(name: str | None) -> None:
        asked.append(name)
        raise error

    monkeypatch.setattr(ctypes, "CDLL", library)
    runpy.run_path(str(Path(common.__file__)))
    assert asked == [None]


# The loop


def test_the_loss_falls_and_is_written_down(tmp_path: Path) -> None:
    _, result = trained(tmp_path, settings=Optimization(epochs=12, batch_size=8, base_lr=3.0, warmup_epochs=1.0))
    records = lines(tmp_path)
    assert [record["step"] for record in records] == list(range(2, 49, 2))
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(record["half"] == pytest.approx(record["loss"] / 2) for record in records)
    assert result["loss"] == records[-1]["loss"]
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole")
    cut, _ = trained(tmp_path / "cut", settings=replace(SMALL, device_batch=2))
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-5, atol=1e-6)
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "cut"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("killed_before", [1, 4, 7, 11])
def test_a_killed_run_that_is_resumed_is_the_same_run_bit_for_bit(tmp_path: Path, killed_before: int) -> None:
    class Killed(Exception):
        pass

    def kill(number: int) -> None:
        if number == killed_before:
            raise Killed

    whole, _ = trained(tmp_path / "whole")
    with pytest.raises(Killed):
        trained(tmp_path / "cut", event=kill)
    (tmp_path / "cut" / "metrics.jsonl").open("a").write('{"step": 2, "lo')  # died in the middle of a line
    cut, _ = trained(tmp_path / "cut", run=replace(RUN, resume=True))
    assert same(whole, cut)
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("batch", [1, 4, 11])
def test_a_signal_stops_after_the_step_with_a_checkpoint(
    number: signal.Signals, batch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(current: int) -> None:
        if current == batch:
            signal.raise_signal(number)

    before = [signal.getsignal(number) for number in SIGNALS]
    rare = replace(RUN, log_every=100, checkpoint_minutes=60.0)
    whole, _ = trained(tmp_path / "whole", run=rare)
    with pytest.raises(SystemExit) as ended:
        trained(tmp_path / "cut", event=stop, run=rare)
    assert ended.value.code == 75
    assert f"stopped by a signal at step {batch + 1} of 12; go on with --resume" in capsys.readouterr().out
    assert [signal.getsignal(number) for number in SIGNALS] == before
    cut, _ = trained(tmp_path / "cut", run=replace(rare, resume=True))
    assert same(whole, cut)
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")  # also the mean over steps before and after


def test_a_signal_before_the_end_of_the_first_step_stops_at_once(tmp_path: Path, capsys: Any) -> None:
    def stop(number: int) -> None:
        if number == 0:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("it goes on")

    with pytest.raises(Stopped):
        trained(tmp_path, event=stop)
    assert "stopped by a signal at step 0 of 12; go on with --resume" in capsys.readouterr().out
    whole, _ = trained(tmp_path / "whole")
    cut, _ = trained(tmp_path, run=replace(RUN, resume=True))
    assert "resuming at step 0 of 12" in capsys.readouterr().out
    assert same(whole, cut)


def test_so_does_one_before_the_first_step_of_a_resumed_run(tmp_path: Path, capsys: Any) -> None:
    def stop(number: int) -> None:
        if number == at:
            signal.raise_signal(signal.SIGTERM)

    for at, done in ((3, 4), (0, 4)):  # noqa: B007
        with pytest.raises(Stopped):
            trained(tmp_path, event=stop, run=replace(RUN, resume=done == 4))
        assert f"stopped by a signal at step {done} of 12" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "checkpoint").steps()[-1] == 4


def test_a_signal_after_the_last_step_stops_before_what_follows(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Log, "close", lambda log: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped):
        trained(tmp_path, draw=lambda folder: pytest.fail("it goes on"))
    assert Checkpoints(tmp_path / "checkpoint").steps()[-1] == 12


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    def interrupt(number: int) -> None:
        if number == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    process = fork(lambda: trained(tmp_path, event=interrupt), tmp_path / "output.txt")
    assert ended(process) == -signal.SIGINT
    assert "Traceback" not in (tmp_path / "output.txt").read_text()


def test_processes_exchange_signals_after_the_same_steps_about_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 0.1 s that become slower: the clock is ours."""
    now, exchanges, step = [0.0], [], 0
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def maximum(values: list[float]) -> list[float]:
        exchanges.append((step, now[0]))
        return values

    stop = StopSignal(maximum, world_size=2, step=0)
    for step in range(1, 101):
        now[0] += 0.1 if step < 60 else 0.5
        assert not stop.agreed(step, last=step == 100)
    gaps = [later[1] - earlier[1] for earlier, later in itertools.pairwise(exchanges)]
    assert [at for at, _ in exchanges[:5]] == [1, 3, 7, 15, 25] or [at for at, _ in exchanges[:4]] == [1, 3, 7, 15]
    assert max(gaps) <= 5.0
    assert 10 <= len(exchanges) <= 40
    assert exchanges[-1][0] == 100
    stop.requested = True
    assert stop.agreed(101, last=True)


def test_a_process_alone_heeds_a_signal_after_every_step() -> None:
    stop = StopSignal(lambda values: values, world_size=1, step=0)
    assert not stop.agreed(1, last=False)
    for step in range(2, 50):
        stop.requested = step == 49
        assert stop.agreed(step, last=False) == (step == 49)


def trained_by_two(folder: Path, outputs: list[Path], run: Run, event: Any = None) -> list[int]:
    """Train on two processes, and return their pids; `event` gets the rank and the number of each batch."""

    def work(rank: int) -> None:
        with join_processes("cpu") as processes:
            load = functools.partial(Memory, event=event and functools.partial(event, rank))
            stage = Stage(processes, DATA, run, folder, "pre-training")
            train(Regression(), load, num_images=IMAGES, settings=replace(SMALL, epochs=50), stage=stage)

    return [fork(lambda rank=rank: work(rank), outputs[rank], **own) for rank, own in enumerate(ranks(2))]


@pytest.mark.parametrize("chosen", [0, 1])
def test_a_signal_to_one_process_stops_all_after_the_same_step(chosen: int, tmp_path: Path) -> None:
    def slow(rank: int, number: int) -> None:
        time.sleep(0.002)
        if (rank, number) == (chosen, 5):
            signal.raise_signal(signal.SIGTERM)

    outputs = [tmp_path / "0.txt", tmp_path / "1.txt"]
    rare = replace(RUN, log_every=10_000, checkpoint_minutes=60.0)
    assert [ended(pid) for pid in trained_by_two(tmp_path / "cut", outputs, rare, slow)] == [75, 75]
    found = re.fullmatch(
        r"(?s).*stopped by a signal at step (\d+) of 200; go on with --resume\n", outputs[0].read_text()
    )
    assert found, outputs[0].read_text()
    assert 5 < int(found[1]) < 200
    assert outputs[1].read_text() == ""
    assert Checkpoints(tmp_path / "cut" / "checkpoint").steps() == [int(found[1])]
    shutil.copytree(tmp_path / "cut", tmp_path / "alone")
    assert [ended(pid) for pid in trained_by_two(tmp_path / "cut", outputs, replace(rare, resume=True))] == [0, 0]
    assert [ended(pid) for pid in trained_by_two(tmp_path / "whole", outputs, rare)] == [0, 0]
    whole, cut = (Checkpoints(tmp_path / name / "checkpoint").load() for name in ("whole", "cut"))
    assert whole is not None
    assert cut is not None
    assert same(whole.tensors, cut.tensors)
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    trained(tmp_path / "alone", run=replace(rare, resume=True), settings=replace(SMALL, epochs=50))
    assert lines(tmp_path / "alone") == [pytest.approx(record, rel=1e-4) for record in lines(tmp_path / "whole")]


def test_a_signal_outside_of_training_stops_at_once(tmp_path: Path) -> None:
    def work() -> None:
        with join_processes("cpu"):
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("it goes on")

    for rank, printed in (("0", "stopped by a signal; go on with --resume\n"), ("1", "")):
        process = fork(work, tmp_path / rank, RANK=rank)
        assert ended(process) == 75
        assert (tmp_path / rank).read_text() == printed


def test_a_program_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_at_once():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_full_disk_stops_all_processes_with_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def full(handle: int) -> None:
        if "step_000000006" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    sentence = (
        r"checkpoint/.*step_000000006.* cannot be written: No space left on device; the checkpoint of step 4 is kept"
    )
    with pytest.raises(SettingsError, match=sentence):
        trained(tmp_path / "alone")
    outputs = [tmp_path / "0.txt", tmp_path / "1.txt"]
    assert [ended(pid) for pid in trained_by_two(tmp_path / "two", outputs, RUN)] == [1, 1]
    for output in outputs:
        assert re.search(f"SettingsError: .*{sentence}", output.read_text())
    monkeypatch.undo()
    whole, _ = trained(tmp_path / "whole")
    assert same(trained(tmp_path / "alone", run=replace(RUN, resume=True))[0], whole)


def test_a_log_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = Log.__new__(Log)
    log.sentence, log.file = "metrics.jsonl cannot be written", (tmp_path / "metrics.jsonl").open("w")
    with pytest.raises(SettingsError, match=r"^metrics\.jsonl cannot be written: No space left on device$"):
        log.add({"step": 1})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"optimizer.layer.weight.exp_avg": torch.zeros(2)}, r"exp_avg is float32 \(2,\) in .* \(4, 4\)"),
        ({"optimizer.layer.bias.exp_avg_sq": torch.zeros(4).double()}, r"exp_avg_sq is float64 \(4,\) in"),
        ({"optimizer.layer.more.exp_avg": torch.zeros(4)}, r"layer\.more\.exp_avg is float32 \(4,\) in .* absent"),
        ({"optimizer.layer.bias.momentum": torch.zeros(4)}, r"bias\.momentum is float32 \(4,\) in .* absent"),
        ({"method.layer.bias": torch.zeros(3)}, r"method\.layer\.bias is float32 \(3,\) in .* \(4,\)"),
        ({"window": torch.zeros(1, 2)}, r"window is float32 \(1, 2\) in .* \(1, 3\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_loaded(
    change: dict[str, Tensor], sentence: str, tmp_path: Path
) -> None:
    trained(tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoint")
    found = checkpoints.load()
    assert found is not None
    checkpoints.save(12, found.tensors | change, found.state)
    method = Regression()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with pytest.raises(
        SettingsError, match=rf"step_000000012 does not fit: .*{sentence}.*; start over with --restart$"
    ):
        trained(tmp_path, run=replace(RUN, resume=True), method=method)
    assert same(before, method.state_dict())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Breaks(Regression):
        def forward(self, batch: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
            losses = super().forward(batch, noise, progress)
            return losses | {"loss": torch.where(progress >= 7 / 12, math.nan, losses["loss"])}

    with pytest.raises(SettingsError, match="the loss of step 7 is not finite; the checkpoint of step 6 is kept"):
        trained(tmp_path, method=Breaks())
    found = Checkpoints(tmp_path / "checkpoint").load()
    assert found is not None
    assert all(torch.isfinite(tensor).all() for tensor in found.tensors.values())


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first, _ = trained(tmp_path)
    again, result = trained(tmp_path, run=replace(RUN, resume=True), event=lambda _: 1 / 0)
    assert same(first, again)
    assert result["step"] == 12


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    free, _ = trained(tmp_path / "free")
    tight, _ = trained(tmp_path / "tight", settings=replace(SMALL, clip=1e-3))
    assert not same(free, tight)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    trained(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["step_000000010", "step_000000012"]
