"""An exponential moving average of a network."""

import copy
import math
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def ema_copy(student: M) -> M:
    """Copy a network.

    No gradient reaches the copy, so that the optimizer and DDP leave it alone; the module that holds it saves it.
    """
    return copy.deepcopy(student).requires_grad_(False)


class Teacher(nn.ModuleList):
    """A copy of networks that always stays in evaluation mode: its batch norm uses the running statistics."""

    def __init__(self, student: nn.ModuleList) -> None:
        super().__init__(ema_copy(student))
        self.train(False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, whatever the method that holds this is in."""
        return super().train(False)


def cosine_momentum(progress: Tensor, start: float) -> Tensor:
    """Return a momentum that rises from `start` to 1 over the training as half a cosine, a 0-d tensor."""
    return 1 - (1 - start) * (1 + torch.cos(math.pi * progress)) / 2


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: Tensor | float) -> None:
    """Update the exponential moving average of a network, buffers included: θ ← θ + (1 − momentum) · (student − θ).

    What does not differ stays the same to the last bit; whole numbers (counters) are copied. A momentum that is a
    tensor follows a schedule; nothing waits for the device.

    Raises:
        ValueError: if the two have other parameters or buffers.
    """
    old, new = _state(teacher), _state(student)
    if old.keys() != new.keys():
        raise ValueError("teacher and student have different parameters or buffers")
    share = torch.as_tensor(1 - momentum, dtype=torch.float32, device=next(iter(old.values())).device)
    for name, tensor in old.items():
        if tensor.is_floating_point():
            tensor.lerp_(new[name], share.to(tensor.dtype))
        else:
            tensor.copy_(new[name])


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name."""
    return dict(chain(module.named_parameters(), module.named_buffers()))
