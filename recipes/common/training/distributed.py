"""The processes that train together, under `torchrun` or one alone."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from common.config import Run, SettingsError

import torch
import torch.distributed as dist
from tqdm import tqdm


@dataclass(frozen=True)
class Processes:
    """This process among those that train together, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    def print(self, text: str) -> None:
        """Print in the main process, above a progress bar."""
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            dist.barrier()

    def maximum(self, flags: list[float]) -> list[float]:
        """Return the greatest of each flag over all processes, so that they decide alike."""
        if self.world_size == 1:
            return flags
        together = torch.tensor(flags, device=self.device)
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return together.tolist()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


@contextlib.contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """Join the processes that `torchrun` started, or run alone.

    Raises:
        SettingsError: if CUDA is requested and not available.
    """
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32 on a GPU
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch finds no GPU here; use --device cpu, or auto")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Processes(0, 1, torch.device(device))
        return
    own = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), world_size, own)
    finally:
        dist.destroy_process_group()


def in_bf16(run: Run, processes: Processes) -> bool:
    """Whether networks run under bf16 autocast: if requested, or on a GPU by default."""
    return run.precision == "bf16" or (run.precision == "auto" and processes.device.type == "cuda")


def num_workers(run: Run, processes: Processes) -> int:
    """Return the number of processes that load images for one device; by default one per core left free."""
    if run.workers >= 0:
        return run.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, max(1, cores // processes.world_size - 1))
