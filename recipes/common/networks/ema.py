"""An exponential moving average of a network."""

import copy
import math
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def ema_copy(student: M) -> M:
    """Copy a network. No gradient reaches the copy, so that the optimizer and DDP leave it alone; it is saved with
    whatever module holds it.
    """
    return copy.deepcopy(student).requires_grad_(False)


def cosine_momentum(progress: Tensor, start: float) -> Tensor:
    """Momentum that rises from `start` to 1 over the training as half a cosine, a 0-d tensor."""
    return 1 - (1 - start) * (1 + torch.cos(math.pi * progress)) / 2


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: Tensor | float) -> None:
    """Move a teacher towards its student, buffers included: θ ← θ + (1 − momentum) · (student − θ).

    What does not differ stays the same to the last bit; whole numbers (counters) are copied. A momentum that is a
    tensor follows a schedule; the device is not waited for.

    Raises:
        ValueError: if the two are not made of the same parts.
    """
    old, new = _state(teacher), _state(student)
    if old.keys() != new.keys():
        raise ValueError("teacher and student are not made of the same parts")
    share = torch.as_tensor(1 - momentum, dtype=torch.float32, device=next(iter(old.values())).device)
    for name, tensor in old.items():
        if tensor.is_floating_point():
            tensor.lerp_(new[name], share.to(tensor.dtype))
        else:
            tensor.copy_(new[name])


def _state(module: nn.Module) -> dict[str, Tensor]:
    return dict(chain(module.named_parameters(), module.named_buffers()))
