"""Projection heads: small networks trained on top of an encoder and discarded afterwards."""

from typing import Any, Literal

from common.config import SettingsError

import torch
import torch.distributed as dist
from torch import Tensor, nn

HeadNorm = Literal["batch", "layer", "none"]


def mlp(dim: int, *, width: int, depth: int, norm: HeadNorm, together: bool = True) -> nn.Sequential:
    """Build an MLP without biases, with a norm and ReLU after every linear layer but the last.

    Args:
        dim: width of the input and the output.
        width: width of the hidden layers.
        depth: number of linear layers; 0: the identity.
        norm: batch norm as in BYOL and LUT, layer norm, or none.
        together: synchronize batch norm over all devices, see `BatchNorm`.

    Raises:
        ValueError: if `width` is not positive or `depth` negative.
    """
    if width < 1 or depth < 0:
        raise ValueError(f"{depth} layers of width {width} make no head")
    layers: list[nn.Module] = []
    for i in range(depth):
        last = i == depth - 1
        layers.append(nn.Linear(width if i else dim, dim if last else width, bias=False))
        if not last:
            layers += [_norm(width, norm, together), nn.ReLU()]
    return nn.Sequential(*layers)


def _norm(width: int, norm: HeadNorm, together: bool) -> nn.Module:
    if norm == "batch":
        return BatchNorm(width, together=together)
    return nn.LayerNorm(width, eps=1e-6) if norm == "layer" else nn.Identity()


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the images of one device or, with `together`, of all devices.

    PyTorch's `SyncBatchNorm` requires CUDA, and a conversion before DDP wraps the module.
    """

    def __init__(self, dim: int, *, together: bool = True) -> None:
        super().__init__(dim)
        self.together = together

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the features by the statistics of the batch, or by running statistics in evaluation mode."""
        if not (self.training and self.together and _devices() > 1):
            return super().forward(input)
        x, count = input.float(), len(input) * _devices()
        mean = _total(x.sum(dim=0)) / count
        centered = x - mean
        variance = _total(centered.square().sum(dim=0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)  # pyright: ignore
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)  # pyright: ignore
            self.num_batches_tracked.add_(1)  # pyright: ignore
        return centered * (variance + self.eps).rsqrt() * self.weight + self.bias


def refuse_single_images(head: nn.Module, batch: int) -> None:
    """Raise an error if a batch norm in training mode would normalize a single image.

    Args:
        head: the module to check.
        batch: images per device and micro-batch.

    Raises:
        SettingsError: if the batch of a batch norm in training mode is a single image.
    """
    for part in head.modules():
        if isinstance(part, BatchNorm) and part.training and batch * (_devices() if part.together else 1) < 2:
            raise SettingsError(
                "batch norm needs at least two images: change --batch-size, --device-batch or --head-norm"
            )


@torch.no_grad()
def share_statistics(head: nn.Module) -> None:
    """Average the running statistics of unsynchronized batch norms over all devices, so that checkpoints are exact."""
    for part in head.modules():
        if isinstance(part, BatchNorm) and not part.together and _devices() > 1:
            for statistic in (part.running_mean, part.running_var):
                assert statistic is not None
                dist.all_reduce(statistic)
                statistic /= _devices()


def _devices() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Total(torch.autograd.Function):
    """Sum over all devices, in the forward and in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Sum the tensor over all devices."""
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore
        """Sum the gradient over all devices."""
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def _total(x: Tensor) -> Tensor:
    return _Total.apply(x)  # pyright: ignore
