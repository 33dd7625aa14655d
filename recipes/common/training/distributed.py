"""Distributed training under `torchrun`, or a single process."""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from common.config import Run, SettingsError
from common.locks import release
from common.training.signals import stopping_at_once

import torch
import torch.distributed as dist
from tqdm import tqdm


@dataclass(frozen=True)
class Processes:
    """The rank and device of this process, and the collective operations of all processes."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Return whether this process prints and writes files."""
        return self.rank == 0

    def print(self, text: str) -> None:
        """Print in the main process, above any progress bar."""
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    def barrier(self) -> None:
        """Wait until all processes reach this call."""
        if self.world_size > 1:
            dist.barrier()

    def maximum(self, flags: list[float]) -> list[float]:
        """Return the maximum of each flag over all processes, so that all make the same decision.

        The hosts exchange the flags; nothing waits for a device.
        """
        if self.world_size == 1:
            return flags
        highest = torch.tensor(flags, dtype=torch.float64)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return highest.tolist()

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all processes, stacked in the order of their ranks, on every process."""
        tensors = tensor.new_zeros(self.world_size, *tensor.shape)
        tensors[self.rank] = tensor
        return self.sum(tensors)

    def broadcast(self, text: str, *, source: int = 0) -> str:
        """Return the text that the process `source` passes, on every process."""
        if self.world_size == 1:
            return text
        content = text.encode()
        length = torch.tensor(len(content))
        dist.broadcast(length, source)
        letters = torch.zeros(int(length) + 1, dtype=torch.uint8)
        if self.rank == source:
            letters[:-1] = torch.tensor(list(content), dtype=torch.uint8)
        dist.broadcast(letters, source)
        return bytes(letters[:-1].tolist()).decode()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block on every process; if it fails with a `SettingsError` on one, all raise that of the lowest rank.

        Raises:
            SettingsError: if the block raises it on any process.
        """
        own = None
        try:
            yield
        except SettingsError as error:
            own = error
        failed = int(self.maximum([0.0 if own is None else self.world_size - self.rank])[0])
        if failed:
            raise SettingsError(self.broadcast(str(own or ""), source=self.world_size - failed)) from own

    def union(self, mapping: Mapping[str, str]) -> dict[str, str]:
        """Return the entries of the mappings of all processes, in the order of their ranks."""
        together, own = {}, json.dumps(dict(mapping))
        for rank in range(self.world_size):
            together |= json.loads(self.broadcast(own, source=rank))
        return together

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


ALONE = Processes(0, 1, torch.device("cpu"))


@contextlib.contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """Join the process group started by `torchrun`, or run as a single process.

    Raises:
        SettingsError: if CUDA is requested and not available.
    """
    torch.set_float32_matmul_precision("high")  # TF32 for fp32 operations on a GPU
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch finds no GPU here; use --device cpu, or auto")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        try:
            with stopping_at_once():
                yield Processes(0, 1, torch.device(device))
        finally:
            release()
        return
    own = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        with stopping_at_once():
            yield Processes(dist.get_rank(), world_size, own)
    finally:
        release()
        dist.destroy_process_group()


def in_bf16(run: Run, processes: Processes) -> bool:
    """Return whether networks run under bf16 autocast: if requested, or by default on a GPU with native bf16."""
    if run.precision != "auto" or processes.device.type != "cuda":
        return run.precision == "bf16"
    return _native_bf16(processes)


@functools.cache  # the line is printed once
def _native_bf16(processes: Processes) -> bool:
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    if not native:
        processes.print("this GPU has no native bf16: running in fp32")
    return native


def num_workers(run: Run, processes: Processes) -> int:
    """Return the number of data-loading processes per device, by default one per free core, at most 16."""
    if run.workers >= 0:
        return run.workers
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", processes.world_size))  # those of this machine share its cores
    return min(16, max(1, cores() // devices - 1))


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
