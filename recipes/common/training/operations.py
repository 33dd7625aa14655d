"""Floating-point operations of training, counted rather than timed: they are the same on every machine."""

from typing import Any

from common.data.loading import Loader, ViewDataset
from common.randomness import Noise
from common.training.step import to_device

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def operations_per_image(method: nn.Module, views: ViewDataset) -> float:
    """Count the floating-point operations of matrix products and convolutions in a forward and backward pass.

    The pass is made with the first image, twice, since some methods pair images. The method stays as it is.

    Args:
        method: a method as the engine trains it.
        views: its training data, of which only the first image is read.

    Returns:
        The number of operations per image; a multiplication and an addition count as two.
    """
    made: Any = method
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    device = trained[0].device
    batch = to_device(next(iter(Loader(views, [[(0, 0), (0, 0)]]))), device)
    noise = made.noise(Noise(micro_batch=2, rank=0, world_size=1, device=device, seed=0).at(0, 0), 2)
    progress = torch.zeros((), dtype=torch.float64, device=device)
    buffers = {name: buffer.clone() for name, buffer in method.named_buffers()}  # batch statistics are updated
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = functional_call(method, buffers, (batch, noise, progress))
        torch.autograd.grad(losses["loss"], trained, allow_unused=True)
    return counter.get_total_flops() / 2
