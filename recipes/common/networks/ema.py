"""An exponential moving average of a network."""

import copy
import math
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def ema_copy(student: M) -> M:
    """Return a frozen copy of a network, which the optimizer and DDP ignore but the state dict contains."""
    return copy.deepcopy(student).requires_grad_(False)


class Teacher(nn.ModuleList):
    """A frozen copy of networks that stays in evaluation mode, so batch norm uses its running statistics."""

    def __init__(self, student: nn.ModuleList) -> None:
        super().__init__(ema_copy(student))
        self.train(False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, whatever the mode of the parent module."""
        return super().train(False)


def cosine_momentum(progress: Tensor, start: float) -> Tensor:
    """Return the momentum of a half-cosine schedule from `start` to 1, a 0-d tensor."""
    return 1 - (1 - start) * (1 + torch.cos(math.pi * progress)) / 2


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: Tensor | float) -> None:
    """Update the exponential moving average of a network, buffers included: θ ← θ + (1 − momentum) · (student − θ).

    Values that are equal in both networks remain bitwise unchanged; integer buffers (counters) are copied. A scheduled
    momentum may be a tensor. The update does not synchronize with the device; on a GPU, a momentum that is a number or
    on the CPU takes few launches.

    Raises:
        ValueError: if the parameters or buffers of the two differ in name.
    """
    old, new = _state(teacher), _state(student)
    if old.keys() != new.keys():
        raise ValueError("teacher and student have different parameters or buffers")
    share = 1 - momentum
    if isinstance(share, Tensor) and share.device.type == "cpu":
        share = float(share)
    floating: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for name, tensor in old.items():
        if tensor.is_floating_point():
            kind = tensor.dtype, type(tensor)  # parameters may be sharded, unlike buffers
            floating.setdefault(kind, []).append((tensor, new[name]))
        else:
            tensor.copy_(new[name])
    for pairs in floating.values():
        lerp_all(pairs, share, together=pairs[0][0].device.type != "cpu")


def lerp_all(pairs: list[tuple[Tensor, Tensor]], share: Tensor | float, *, together: bool) -> None:
    """Move the first tensor of each pair toward the second, in place.

    Args:
        pairs: tensors of one dtype and type.
        share: fraction of the way.
        together: take few launches, if the share is a number; on a CPU, a loop is faster.
    """
    if together and not isinstance(share, Tensor):
        torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), share)  # pyright: ignore
        return
    for old, new in pairs:
        old.lerp_(new, share.to(old.dtype) if isinstance(share, Tensor) else share)


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name."""
    return dict(chain(module.named_parameters(), module.named_buffers()))
