"""A teacher follows its student as a moving average."""

import copy
from typing import Any

from common.networks.ema import ema_copy, ema_update, lerp_all

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn


class Network(nn.Module):
    """Weights, a frozen table, a buffer, and a counter."""

    table: Tensor
    steps: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(5, 7)
        self.frozen = nn.Parameter(torch.linspace(-1, 1, 9) / 3, requires_grad=False)
        self.register_buffer("table", torch.randn(3, 4))
        self.register_buffer("hidden", torch.randn(2), persistent=False)
        self.register_buffer("steps", torch.tensor(seed))


def state(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def test_a_teacher_starts_as_a_copy_that_no_gradient_reaches() -> None:
    student = Network(0)
    teacher = ema_copy(student)
    assert all(torch.equal(tensor, state(student)[name]) for name, tensor in state(teacher).items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert student.layer.weight.requires_grad
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}


@given(st.floats(0, 1), st.booleans())
def test_it_goes_one_minus_momentum_of_the_way_buffers_included(momentum: float, scheduled: bool) -> None:
    teacher, student = Network(0), Network(1)
    before, goal = state(teacher), state(student)
    ema_update(teacher, student, torch.tensor(momentum, dtype=torch.float64) if scheduled else momentum)
    after = state(teacher)
    assert after.pop("steps") == goal.pop("steps") == 1  # a whole number is copied
    for name, tensor in after.items():
        expected = momentum * before[name].double() + (1 - momentum) * goal[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(tensor, goal.get(name, tensor)) for name, tensor in state(student).items())


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.9999, torch.tensor(0.99)])
def test_what_does_not_differ_stays_the_same_to_the_last_bit(momentum: float | Tensor) -> None:
    student = Network(0)
    teacher = ema_copy(student)
    with torch.no_grad():
        student.layer.weight.add_(1.0)
    before = state(teacher)
    for _ in range(100):
        ema_update(teacher, student, momentum)
    changed = [name for name, tensor in state(teacher).items() if not torch.equal(tensor, before[name])]
    assert changed == ["layer.weight"]


def test_a_momentum_of_one_stands_still_and_of_zero_copies() -> None:
    teacher, student = Network(0), Network(1)
    before = state(teacher)
    ema_update(teacher, student, 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(teacher).items() if name != "steps")
    ema_update(teacher, student, 0.0)
    for name, tensor in state(teacher).items():
        torch.testing.assert_close(tensor, state(student)[name], rtol=0.0, atol=3e-7)


def test_a_small_step_is_not_lost_beside_one() -> None:
    """A schedule in double precision: 1 − 0.9999, rounded only then, and not 1 less what 0.9999 is rounded to."""
    teacher, student = nn.Linear(1, 1), nn.Linear(1, 1)
    with torch.no_grad():
        teacher.weight.fill_(0.0)
        student.weight.fill_(1.0)
    ema_update(teacher, student, torch.tensor(0.9999, dtype=torch.float64))
    assert float(teacher.weight.detach()) == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_weights_together_equal_one_after_the_other(dtype: torch.dtype) -> None:
    shapes = [(), (3,), (17, 5), (2, 3, 4)]
    together, alone = ([(torch.sin(torch.ones(s)).to(dtype), torch.ones(s, dtype=dtype)) for s in shapes] for _ in "ab")
    lerp_all(together, 0.3, together=True)
    lerp_all(alone, 0.3, together=False)
    for one, other in zip(together, alone, strict=True):
        assert one[0].equal(other[0])
        assert (one[0] > torch.sin(torch.ones(())).to(dtype)).all()


def test_a_gpu_takes_few_launches_if_the_momentum_is_known_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the parameters, one for the buffers; the meta device stands for the GPU."""
    teacher, student = Network(0).to("meta"), Network(1).to("meta")
    launches: list[tuple[int, Any]] = []
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda old, new, share: launches.append((len(old), share)))
    for momentum in (0.9, torch.tensor(0.9, dtype=torch.float64)):
        ema_update(teacher, student, momentum)
    assert launches == [(3, pytest.approx(0.1)), (2, pytest.approx(0.1))] * 2


def test_nothing_is_read_back() -> None:
    teacher, student = Network(0).to("meta"), Network(1).to("meta")
    ema_update(teacher, student, torch.empty((), dtype=torch.float64, device="meta"))


def test_different_parts_are_refused() -> None:
    student = Network(0)
    teacher = copy.deepcopy(student)
    teacher.register_buffer("more", torch.zeros(1))
    with pytest.raises(ValueError, match="teacher and student have different parameters or buffers"):
        ema_update(teacher, student, 0.9)
