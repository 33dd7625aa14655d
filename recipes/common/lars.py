"""LARS: momentum SGD with a learning rate per tensor, for linear probes with very large batches."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Scale each matrix's step to a share of the matrix's norm; vectors take plain momentum steps without decay.

    The learning rate is applied after the momentum, so past steps follow the schedule, too.

    Args:
        params: as for every optimizer of PyTorch.
        lr: learning rate.
        weight_decay: added to the gradient of matrices.
        momentum: share of the last step that is kept.
        trust: norm of a step as a share of the norm of its matrix.

    Source: arXiv 1708.03888; MAE, arXiv 2111.06377 (published code). timm's LARS adds the decay to the denominator
    in another way, so its numbers differ as soon as there is a decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # pyright: ignore
        if closure is not None:
            raise ValueError("LARS takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                step = parameter.grad
                if parameter.ndim > 1:
                    step = step + group["weight_decay"] * parameter
                    own, other = parameter.norm(), step.norm()
                    trusted = (own > 0) & (other > 0)
                    step = step * torch.where(trusted, group["trust"] * own / other, 1.0)
                state = self.state[parameter]
                past = state.setdefault("momentum", torch.zeros_like(parameter))
                past.mul_(group["momentum"]).add_(step)
                parameter.add_(past, alpha=-group["lr"])
        return None
