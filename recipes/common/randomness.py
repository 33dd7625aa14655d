"""All randomness: every draw depends only on (seed, epoch or step, sample), on any device."""

import hashlib
import json
import math
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


def uniform(*shape: int, key: int, first: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Return float32 values in [0, 1) that depend only on a key and their places, bit for bit on every device.

    The generator is counter-based: value i is a hash of the number `first` + i and the key, the upper 24 bits of what
    SplitMix64 makes of (number xor key) · 0x9E3779B97F4A7C15.

    Args:
        shape: of the result, whose values are numbered in raster order.
        key: from 0 to 2⁶³ − 1, see `seed_of`.
        first: number of the first value.
        device: where the values are computed.

    Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014 (java.util's
    SplittableRandom, which adds the key instead; with xor, no compiler folds the arithmetic of indices into it).
    """
    # Products are those of 64-bit integers modulo 2⁶⁴, and the masks turn arithmetic shifts into logical ones
    bits = torch.arange(first, first + math.prod(shape), device=device)
    bits.bitwise_xor_(key).mul_(0x9E3779B97F4A7C15 - 2**64)
    bits.bitwise_xor_((bits >> 30).bitwise_and_(2**34 - 1)).mul_(0xBF58476D1CE4E5B9 - 2**64)
    bits.bitwise_xor_((bits >> 27).bitwise_and_(2**37 - 1)).mul_(0x94D049BB133111EB - 2**64)
    # The last step of SplitMix64, bits ^ (bits >> 31), leaves the upper 24 bits as they are
    return bits.bitwise_right_shift_(40).bitwise_and_(2**24 - 1).float().mul_(2.0**-24).view(shape)


class Noise:
    """Uniform noise for a micro-batch: `noise(batch, …)` returns float32 values in [0, 1) on the device,
    and `noise.shared(…)` values that all images of a step have in common.

    The first axis is the batch. The noise of an image depends only on the seed, the step, the number of the call in
    the step and the place of the image in the batch of all processes; so it is the same on every device and for any
    number of processes and micro-batches.

    Args:
        micro_batch: images per device and micro-batch.
        rank: rank of this process.
        world_size: number of processes.
        device: device of the noise.
        seed: seed of the run.
    """

    def __init__(self, *, micro_batch: int, rank: int, world_size: int, device: torch.device, seed: int) -> None:
        self.micro_batch, self.rank, self.world_size = micro_batch, rank, world_size
        self.device, self.seed = device, seed
        self.step = self.first_image = self.calls = 0

    def at(self, step: int, micro_step: int) -> "Noise":
        """Go to a micro-batch of a step; the same calls then return the same noise."""
        self.step, self.calls = step, 0
        self.first_image = (micro_step * self.world_size + self.rank) * self.micro_batch
        return self

    def __call__(self, batch: int, *shape: int) -> Tensor:
        if batch != self.micro_batch:
            raise ValueError(f"noise for {batch} images was requested in a micro-batch of {self.micro_batch}")
        return uniform(
            batch, *shape, key=self._next_key(), first=self.first_image * math.prod(shape), device=self.device
        )

    def shared(self, *shape: int) -> Tensor:
        """Return noise that all images of a step have in common, the same in every process and micro-batch."""
        return uniform(*shape, key=self._next_key(), device=self.device)

    def _next_key(self) -> int:
        """Return the key of the next call."""
        self.calls += 1
        return seed_of(self.seed, "noise", self.step, self.calls - 1)


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
