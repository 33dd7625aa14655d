"""Random draws depend only on (seed, epoch or step, sample)."""

import random
from itertools import pairwise

from common.randomness import Noise, epoch_order, globally_seeded, seed_of, uniform

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor


def test_a_seed_is_the_same_in_every_process_and_on_every_machine():
    assert seed_of(0, 1, 2) == 3452018054052297075
    assert seed_of("batch", 7) == 1063502429746967585
    assert seed_of(np.int64(3), 4) == seed_of(3, 4)  # pyright: ignore


@given(st.lists(st.integers() | st.text()), st.lists(st.integers() | st.text()))
def test_seeds_differ_when_their_parts_do(one, other):
    assert 0 <= seed_of(*one) < 2**63
    assert (seed_of(*one) == seed_of(*other)) == (one == other)


def test_the_order_of_an_epoch_is_a_tensor_of_eight_bytes_per_image() -> None:
    """Not a list of Python's integers, which would take some 100 bytes for each of a million images."""
    order = epoch_order(1000, 3, seed=1)
    assert isinstance(order, Tensor)
    assert order.nbytes == 8 * 1000
    assert order.sort().values.equal(torch.arange(1000))
    assert order.equal(epoch_order(1000, 3, seed=1))
    assert not order.equal(epoch_order(1000, 4, seed=1))
    assert not order.equal(epoch_order(1000, 3, seed=2))


# Noise


def by_hand(key: int, number: int) -> float:
    """Compute one value with Python's integers, which have any size and no sign bit."""
    modulus = 2**64
    bits = (number ^ key) * 0x9E3779B97F4A7C15 % modulus
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % modulus
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % modulus
    bits ^= bits >> 31
    return (bits >> 40) / 2**24


keys = st.integers(0, 2**63 - 1)


@given(keys, st.integers(0, 2**45), st.sampled_from([(), (0,), (7,), (2, 0, 3), (2, 3, 4)]))
def test_noise_equals_the_same_formula_in_pythons_integers(key, first, shape):
    values = uniform(*shape, key=key, first=first)
    assert values.shape == shape
    assert values.dtype == torch.float32
    assert values.flatten().tolist() == [by_hand(key, first + i) for i in range(values.numel())]


def test_noise_never_changes_from_one_version_to_the_next() -> None:
    """Seeds of published runs would otherwise mean something else."""
    assert (uniform(4, key=seed_of(0, "noise", 3, 1), first=100) * 2**24).tolist() == [
        14107146,
        1008647,
        12162580,
        5667531,
    ]


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_uniform(seed: int) -> None:
    values = uniform(2**20, key=seed_of(seed)).double()
    assert 0 <= values.min() < 1e-5
    assert 1 - 1e-5 < values.max() < 1
    for power in (1, 2, 3, 4):  # moments, within four standard errors
        spread = (1 / (2 * power + 1) - 1 / (power + 1) ** 2) ** 0.5
        assert abs(values.pow(power).mean() - 1 / (power + 1)) < 4 * spread / 2**10
    empirical = torch.arange(2**20, dtype=torch.float64) / 2**20
    assert (values.sort().values - empirical).abs().max() < 1.95 / 2**10  # Kolmogorov-Smirnov, at a level of 0.001
    for bits in (values * 256, values * 2**24 % 256):  # chi-square of the upper and lower bits; mean 255, std 22.6
        counts = bits.long().bincount(minlength=256).double()
        assert 255 - 4 * 22.6 < ((counts - 4096) ** 2 / 4096).sum() < 255 + 4 * 22.6


def test_neighboring_indices_rows_calls_steps_and_seeds_are_not_correlated() -> None:
    def drawn(seed: int, step: int, call: int) -> Tensor:
        noise = Noise(micro_batch=64, rank=0, world_size=1, device=torch.device("cpu"), seed=seed).at(step, 0)
        return [noise(64, 196) for _ in range(call + 1)][-1].double()

    all_of_it = torch.stack([torch.stack([drawn(s, t, c) for c in range(3)]) for s in (0, 1) for t in range(6)])
    all_of_it = all_of_it.view(2, 6, 3, 64, 196)
    for axis in range(5):
        for lag in (1, 2, 4, 16, 64):
            if lag < all_of_it.shape[axis]:
                one = all_of_it.narrow(axis, 0, all_of_it.shape[axis] - lag)
                other = all_of_it.narrow(axis, lag, all_of_it.shape[axis] - lag)
                correlation = 12 * ((one - 0.5) * (other - 0.5)).mean()
                assert abs(correlation) < 4 / one.numel() ** 0.5, (axis, lag)
                # and pairs fall equally often into the 16 × 16 squares; mean 255, std 22.6
                counts = ((one * 16).long() * 16 + (other * 16).long()).flatten().bincount(minlength=256).double()
                expected = one.numel() / 256
                assert 255 - 4.5 * 22.6 < ((counts - expected) ** 2 / expected).sum() < 255 + 4.5 * 22.6, (axis, lag)


def test_the_order_of_noise_is_equally_often_every_permutation() -> None:
    """Masks are made of ranks."""
    ranks = uniform(24_000, 4, key=seed_of("ranks")).argsort(dim=-1)
    counts = (ranks * torch.tensor([64, 16, 4, 1])).sum(dim=-1).unique(return_counts=True)[1].double()
    assert len(counts) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 49.7  # chi-square with 23 degrees of freedom, at a level of 0.001


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), keys)
def test_parts_of_noise_equal_the_whole_for_any_split(sizes, key):
    whole = uniform(sum(sizes), 3, 2, key=key)
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    parts = [uniform(end - start, 3, 2, key=key, first=6 * start) for start, end in pairwise(ends)]
    assert torch.cat(parts).equal(whole)


def test_noise_can_be_drawn_on_the_meta_device_and_in_a_compiled_graph() -> None:
    nowhere = uniform(3, 5, key=1, device="meta")
    assert (nowhere.is_meta, nowhere.shape, nowhere.dtype) == (True, (3, 5), torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(uniform, fullgraph=True)  # lowered: a compiler may simplify arithmetic of indices
    for key in (2**63 - 1, 2**62 + 5):
        assert compiled(3, 5, key=key, first=2**40).equal(uniform(3, 5, key=key, first=2**40))


# What other libraries draw


def test_what_timm_draws_depends_on_a_seed_and_leaves_the_generators_as_they_were() -> None:
    def draws() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    with globally_seeded(3):
        first = draws()
    before = random.getstate(), torch.get_rng_state()
    with globally_seeded(3):
        assert draws() == first
    assert (random.getstate(), torch.get_rng_state().tolist()) == (before[0], before[1].tolist())
    with globally_seeded(4):
        assert draws() != first
