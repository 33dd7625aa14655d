"""Floating-point operations of training, counted rather than timed: they are the same on every machine."""

from typing import Any

from common.randomness import Noise
from common.training.step import to_device

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

META = torch.device("meta")


def operations_per_image(method: nn.Module, batch: Any) -> float:
    """Count the floating-point operations of matrix products and convolutions in a forward and backward pass.

    Nothing is computed, and the method stays as it is.

    Args:
        method: a method as the engine trains it.
        batch: a batch of it, on any device.

    Returns:
        The number of operations per image; a multiplication and an addition count as two.
    """
    made: Any = method
    count = len(_first(batch))
    noise = made.noise(Noise(micro_batch=count, rank=0, world_size=1, device=META, seed=0).at(0, 0), count)
    state = {
        name: torch.empty_like(tensor, device=META).requires_grad_(tensor.requires_grad)
        for name, tensor in [*method.named_parameters(), *method.named_buffers()]
    }
    progress = torch.zeros((), dtype=torch.float64, device=META)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = functional_call(method, state, (to_device(batch, META), noise, progress))
        losses["loss"].backward()
    return counter.get_total_flops() / count


def _first(batch: Any) -> torch.Tensor:
    """Return the first tensor of a batch."""
    return batch if isinstance(batch, torch.Tensor) else _first(batch[0])
