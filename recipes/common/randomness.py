"""All randomness: every draw depends only on (seed, epoch or step, sample)."""

import hashlib
import json
import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """Return a number of 63 bits that depends on all the parts and their order, the same in every process."""
    text = json.dumps([part if isinstance(part, str) else operator.index(part) for part in parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def epoch_order(count: int, epoch: int, *, seed: int) -> Tensor:
    """Return the order of `count` images in an epoch, a permutation that depends only on (seed, epoch)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, "order", epoch)))


class Noise:
    """Uniform noise for a micro-batch: `noise(batch, …)` gives float32 in [0, 1) on the device.

    The first axis is the batch. It is drawn for all images of a step and cut, so every image gets the same noise
    whatever the number of devices and micro-batches.

    Args:
        batch_size: images of a step, over all devices and micro-batches.
        micro_batch: images of one device at a time.
        rank: of this process.
        world_size: number of processes.
        device: of the noise.
        seed: of the run.
    """

    def __init__(
        self, *, batch_size: int, micro_batch: int, rank: int, world_size: int, device: torch.device, seed: int
    ) -> None:
        self.batch_size, self.micro_batch, self.seed = batch_size, micro_batch, seed
        self.rank, self.world_size = rank, world_size
        self.generator = torch.Generator(device)
        self.rows = slice(0)

    def at(self, step: int, micro_step: int) -> "Noise":
        """Go to a micro-batch of a step. The same calls then give the same noise."""
        self.generator.manual_seed(seed_of(self.seed, "noise", step))
        first = (micro_step * self.world_size + self.rank) * self.micro_batch
        self.rows = slice(first, first + self.micro_batch)
        return self

    def __call__(self, batch: int, *shape: int) -> Tensor:
        if batch != self.micro_batch:
            raise ValueError(f"noise for {batch} images was requested in a micro-batch of {self.micro_batch}")
        generator = self.generator
        return torch.rand(self.batch_size, *shape, generator=generator, device=generator.device)[self.rows]


@contextmanager
def globally_seeded(seed: int) -> Iterator[None]:
    """Seed what timm draws from, and leave it as it was found."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(pytorch)
