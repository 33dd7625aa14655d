"""Batches and micro-batches."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from common.config import Optimization, SettingsError, known
from common.randomness import Noise, epoch_order
from common.training.distributed import Processes
from common.training.schedules import following_warmup

import torch
from torch import Tensor


def fitting_batch(num_images: int, world_size: int) -> int:
    """Return a batch size for a number of images: about 32 steps per epoch, but 16 to 256 images.

    Every device gets a power of two. Fewer than 16 images are all in one batch, but for an odd one.
    """
    wanted = min(max(num_images / 32, min(max(16, 2 * world_size), num_images)), 256) / world_size
    return world_size * 2 ** max(0, int(math.log2(max(1, wanted))))


def following(settings: Optimization, num_images: int, world_size: int) -> dict[str, float]:
    """Return batch size and warm-up: those given, or those that follow the number of images and of epochs."""
    size, warmup = settings.batch_size, settings.warmup_epochs
    return {
        "batch_size": fitting_batch(num_images, world_size) if size is None else size,
        "warmup_epochs": following_warmup(settings.epochs) if warmup is None else warmup,
    }


def micro_batches(settings: Optimization, world_size: int) -> tuple[int, int]:
    """Split a batch into equal micro-batches, and return their size and number per device and step.

    Raises:
        SettingsError: if the batch cannot be divided equally among the devices.
    """
    size = known(settings.batch_size)
    share, rest = divmod(size, world_size)
    if rest or share < 1:
        raise SettingsError(f"a batch of {size} images cannot be shared equally by {world_size} devices")
    count = math.ceil(share / settings.device_batch)
    while share % count:
        count += 1
    return share // count, count


class Batches:
    """The (epoch, index) of the images of this process, in the order of training.

    Each epoch is a permutation that depends only on (seed, epoch), without its incomplete last batch. The images of a
    step do not depend on the number of devices and micro-batches.

    Raises:
        SettingsError: if there are fewer images than a batch has, or it cannot be divided equally among the devices.
    """

    def __init__(self, num_images: int, settings: Optimization, processes: Processes, *, seed: int) -> None:
        size = known(settings.batch_size)
        self.steps_per_epoch = num_images // size
        if not self.steps_per_epoch:
            raise SettingsError(f"{num_images} images do not fill a batch of {size}: use a smaller --batch-size")
        self.num_images, self.batch_size, self.seed, self.processes = num_images, size, seed, processes
        self.micro_batch, self.count = micro_batches(settings, processes.world_size)
        self.steps = settings.epochs * self.steps_per_epoch

    def since(self, step: int) -> Iterator[list[tuple[int, int]]]:
        """Yield all micro-batches from a step on, `count` per step."""
        world_size, rank = self.processes.world_size, self.processes.rank
        for epoch in range(step // self.steps_per_epoch, self.steps // self.steps_per_epoch):
            order = epoch_order(self.num_images, epoch, seed=self.seed)
            for i in range(max(0, step - epoch * self.steps_per_epoch), self.steps_per_epoch):
                for j in range(self.count):
                    start = i * self.batch_size + (j * world_size + rank) * self.micro_batch
                    yield [(epoch, index) for index in order[start : start + self.micro_batch].tolist()]

    def noise(self) -> Noise:
        """Return the noise generator for the micro-batches of this process."""
        return Noise(
            micro_batch=self.micro_batch,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            device=self.processes.device,
            seed=self.seed,
        )


def to_device(batch: Any, device: torch.device) -> Any:
    """Move a batch, a tensor or nested tuples of tensors, to a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return type(batch)(to_device(part, device) for part in batch)


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return whether all values are finite, as a 0-d tensor, without synchronizing with the device."""
    return torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
