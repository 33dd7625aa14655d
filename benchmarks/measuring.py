"""What the benchmarks share: where they run, what a time is, and rounds that run all variants in random order."""

import os
import platform
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

K = TypeVar("K")


def chosen_device(name: str) -> torch.device:
    """Return the device of a name, or with "auto" a GPU if there is one. A CPU computes in one thread from now on."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(best if name == "auto" else name)
    if device.type == "cpu":
        torch.set_num_threads(1)  # two threads that wait for each other in turns measure the waiting
    return device


def print_circumstances(device: torch.device, *packages: str) -> None:
    """Print the command, versions, the device and how busy the machine is."""
    print("python", *sys.argv)
    print(f"Python {platform.python_version()},", ", ".join(f"{name} {version_of(name)}" for name in packages))
    print(torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(), end="")
    print(f", {torch.get_num_threads()} thread(s), load average {' '.join(f'{x:.1f}' for x in os.getloadavg())}")


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "–"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def seconds_of(function: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Return the seconds of one call: processor time on a CPU, by events on a GPU."""
    if device.type == "cpu":
        begin = time.process_time()
        for _ in range(repeats):
            function()
        return (time.process_time() - begin) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def matmul_peak(device: torch.device, side: int = 8192) -> float:
    """Return the FLOP/s of a bf16 product of square matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds_of(partial(torch.mm, a, b), 10, device)
    return 2 * side**3 / seconds_of(partial(torch.mm, a, b), 50, device)


def kept_storages(function: Callable[[], Any]) -> dict[int, torch.UntypedStorage]:
    """Return what a call keeps for its backward pass, by address."""
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor.detach()  # with its history, an output would keep itself and all parameters alive for good

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return storages


def kept_bytes(function: Callable[[], Any]) -> int:
    """Return the bytes that a call keeps for its backward pass."""
    return sum(storage.nbytes() for storage in kept_storages(function).values())


def in_rounds(clocks: dict[K, Callable[[], float]], rounds: int, order: random.Random) -> dict[K, list[float]]:
    """Ask each clock once a round, in random order."""
    times: dict[K, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name in order.sample(list(clocks), len(clocks)):
            times[name].append(clocks[name]())
    return times
