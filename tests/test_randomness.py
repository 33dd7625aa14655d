"""Random draws depend only on (seed, epoch or step, sample)."""

import random

from common.randomness import epoch_order, globally_seeded, seed_of

import numpy as np
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
