"""HPM in two processes, on images made from their index; a module of its own, because each process imports it anew."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common.config import DataSettings, Optimization, Run, known
from common.data.embedded import Digits
from common.data.normalize import Normalize
from common.data.sources import Data
from common.runs import Stage
from common.training.distributed import Processes
from common.training.engine import train

import hpm
import torch
import torch.distributed as dist
from torch import Tensor

SETTINGS = Optimization(epochs=3, batch_size=8, device_batch=4, base_lr=0.01, warmup_epochs=1.0, clip=0.5)
STEPS = 12  # three epochs of 4 steps


class Images:
    """A loader of images that depend only on epoch and index; the process ends at batch number `end`."""

    unreadable = MappingProxyType[str, str]({})

    def __init__(self, batches: Iterable[list[tuple[int, int]]], end: int) -> None:
        self.batches, self.end = batches, end

    def __iter__(self) -> Iterator[Tensor]:
        rows = torch.arange(16 * 16).reshape(1, 16, 16)
        for number, samples in enumerate(self.batches):
            if number == self.end:
                raise InterruptedError
            images = [torch.sin(rows * (index + 1) / 50 + epoch) * 127 + 128 for epoch, index in samples]
            yield torch.stack(images).to(torch.uint8)


def trained(
    folder: Path, processes: Processes, *, steps: int = STEPS, clip_each: bool = False, **run: Any
) -> dict[str, Tensor]:
    """Train for a number of steps, and return the weights of the method."""
    torch.manual_seed(0)
    digits = hpm.PRESETS["digits"]
    config = replace(
        digits,
        data=replace(digits.data, image_size=(16, 16)),
        network=replace(digits.network, size="nano", decoder_dim=12, decoder_heads=2, decoder_depth=2),
    )
    method = hpm.HPM(config, Normalize([0.5], [0.2]))
    settings = Run(precision="fp32", compile="off", log_every=2, checkpoint_minutes=0.0, resume=True, **run)
    stage = Stage(processes, Data(DataSettings(), Digits("train"), None, None), settings, folder, "pre-training")
    with contextlib.suppress(InterruptedError):
        per_step = known(SETTINGS.batch_size) // processes.world_size // SETTINGS.device_batch
        first = max((int(path.name[5:]) for path in folder.glob("checkpoint/step_*")), default=0)
        train(
            method,
            lambda batches: Images(batches, (steps - first) * per_step if steps < STEPS else -1),
            num_images=35,
            settings=replace(SETTINGS, clip_each=clip_each),
            stage=stage,
        )
    return method.state_dict()


def train_in_two(rank: int, folder: str, runs: list[tuple[str, int, dict[str, Any]]]) -> None:
    """Train on one device or on two, run after run, and save the weights that the first process has in the end.

    Args:
        rank: rank of this process.
        folder: folder of the runs.
        runs: name, number of devices, and options of each.
    """
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, devices, options in runs:
        if rank < devices:
            weights = trained(Path(folder, name), Processes(rank, devices, torch.device("cpu")), **options)
            if rank == 0:
                torch.save(weights, Path(folder, name, "weights"))
        dist.barrier()
    dist.destroy_process_group()
