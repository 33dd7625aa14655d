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
    """Hash the parts, in order, to a 63-bit integer that is the same in every process."""
    text = json.dumps([part if isinstance(part, str) else operator.index(part) for part in parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def epoch_order(count: int, epoch: int, *, seed: int) -> Tensor:
    """Return a permutation of `count` images that depends only on (seed, epoch)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, "order", epoch)))


class Noise:
    """Uniform noise for a micro-batch: `noise(batch, …)` returns float32 values in [0, 1) on the device,
    and `noise.shared(…)` values that all images of a step have in common.

    The first axis is the batch. The noise is drawn for all images of a step and then sliced, so the noise of an image
    does not depend on the number of devices and micro-batches.

    Args:
        batch_size: images per step, over all devices and micro-batches.
        micro_batch: images per device and micro-batch.
        rank: rank of this process.
        world_size: number of processes.
        device: device of the noise.
        seed: seed of the run.
    """

    def __init__(
        self, *, batch_size: int, micro_batch: int, rank: int, world_size: int, device: torch.device, seed: int
    ) -> None:
        self.batch_size, self.micro_batch, self.seed = batch_size, micro_batch, seed
        self.rank, self.world_size = rank, world_size
        self.generator = torch.Generator(device)
        self.rows = slice(0)

    def at(self, step: int, micro_step: int) -> "Noise":
        """Seed the generator for a micro-batch of a step; the same calls then return the same noise."""
        self.generator.manual_seed(seed_of(self.seed, "noise", step))
        first = (micro_step * self.world_size + self.rank) * self.micro_batch
        self.rows = slice(first, first + self.micro_batch)
        return self

    def __call__(self, batch: int, *shape: int) -> Tensor:
        if batch != self.micro_batch:
            raise ValueError(f"noise for {batch} images was requested in a micro-batch of {self.micro_batch}")
        generator = self.generator
        return torch.rand(self.batch_size, *shape, generator=generator, device=generator.device)[self.rows]

    def shared(self, *shape: int) -> Tensor:
        """Return noise that all images of a step have in common, the same in every process and micro-batch."""
        return torch.rand(*shape, generator=self.generator, device=self.generator.device)


@contextmanager
def globally_seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, which timm uses, and restore their states on exit."""
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
