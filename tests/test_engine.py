"""The training loop: order of the images, noise, learning rates, clipping, resuming, and what stops it."""

import ctypes
import functools
import json
import math
import os
import resource
import runpy
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
from common.config import DataSettings, Optimization, Run, SettingsError
from common.data.sources import Data, Digits
from common.runs import Stage
from common.training.checkpoint import Checkpoints
from common.training.distributed import Processes, in_bf16, num_workers
from common.training.engine import train
from common.training.optimizer import clip, parameter_groups
from common.training.schedules import by_epoch, by_step, epoch_of, learning_rate
from common.training.step import Batches, micro_batches

import pytest
import torch
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
        error = (self.layer(batch) - noise["jitter"] * (1 + progress)).square().mean()
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
                parts.append(torch.cat([noise(batches.micro_batch, 5), noise(batches.micro_batch, 2)], dim=1))
        return torch.cat(parts)

    assert torch.equal(of_all(devices, device_batch), of_all(1, 8))
    assert of_all(1, 8).min() >= 0
    assert of_all(1, 8).max() < 1


def test_noise_differs_between_steps_and_calls_and_repeats_at_the_same_place() -> None:
    noise = Batches(8, SMALL, ALONE, seed=1).noise()
    first, second = noise.at(0, 0)(8, 3), noise(8, 3)
    assert not torch.equal(first, second)
    assert not torch.equal(first, noise.at(1, 0)(8, 3))
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


def test_sigterm_writes_a_checkpoint_and_ends_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def terminate(number: int) -> None:
        if number == 4:
            signal.raise_signal(signal.SIGTERM)

    rare = replace(RUN, log_every=100, checkpoint_minutes=60.0)
    whole, _ = trained(tmp_path / "whole", run=rare)
    with pytest.raises(SystemExit) as ended:
        trained(tmp_path / "cut", event=terminate, run=rare)
    assert ended.value.code == 0
    assert "stopped by a signal at step 5 of 12; go on with --resume" in capsys.readouterr().out
    cut, _ = trained(tmp_path / "cut", run=replace(rare, resume=True))
    assert same(whole, cut)
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")  # also the mean over steps before and after


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Breaks(Regression):
        def forward(self, batch: Tensor, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
            losses = super().forward(batch, noise, progress)
            return losses | {"loss": torch.where(progress >= 7 / 12, math.nan, losses["loss"])}

    with pytest.raises(SettingsError, match="the loss of step 7 is not finite; the checkpoint of step 6 is kept"):
        trained(tmp_path, method=Breaks())
    found = Checkpoints(tmp_path / "checkpoint").load()
    assert found is not None
    assert all(torch.isfinite(tensor).all() for tensor in found[1].values())


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
