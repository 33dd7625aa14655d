"""Floating-point operations of training, counted rather than timed: they are the same on every machine."""

from typing import Any

from common.randomness import Noise
from common.training.step import to_device

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def operations_per_image(method: nn.Module, batch: Any) -> float:
    """Count the floating-point operations of matrix products and convolutions in a forward and backward pass.

    The method stays as it is.

    Args:
        method: a method as the engine trains it.
        batch: a batch of it, on any device.

    Returns:
        The number of operations per image; a multiplication and an addition count as two.
    """
    made: Any = method
    count = len(_first(batch))
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    device = trained[0].device
    noise = made.noise(Noise(micro_batch=count, rank=0, world_size=1, device=device, seed=0).at(0, 0), count)
    buffers = {name: buffer.clone() for name, buffer in method.named_buffers()}  # batch statistics are updated
    progress = torch.zeros((), dtype=torch.float64, device=device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = functional_call(method, buffers, (to_device(batch, device), noise, progress))
        torch.autograd.grad(losses["loss"], trained, allow_unused=True)
    return counter.get_total_flops() / count


def _first(batch: Any) -> torch.Tensor:
    """Return the first tensor of a batch."""
    return batch if isinstance(batch, torch.Tensor) else _first(batch[0])
