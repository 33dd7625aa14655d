"""Parameter groups, gradient clipping and LARS."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from common.config import Optimization
from common.training.parallel import own, whole

import torch
from torch import Tensor, nn


def layer_of(name: str, depth: int) -> int:
    """Return the layer of a parameter: 0 for embeddings, k + 1 for block k, depth + 1 for what follows the blocks."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.startswith(("cls_token", "mask_token", "pos_embed", "patch_embed.")) else depth + 1


def parameter_groups(module: nn.Module, settings: Optimization, *, depth: int = 0) -> list[dict[str, Any]]:
    """Group trainable parameters by weight decay and by layer-wise learning-rate scale.

    Biases, norms and other 1-D parameters have no weight decay, nor do those named in `settings.undecayed`.

    Args:
        module: an encoder, or a module whose encoder is its attribute `encoder`.
        settings: settings of the optimizer.
        depth: number of blocks of the encoder, used if the layer decay is not 1.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.endswith(".bias") or name.split(".")[-1] in settings.undecayed
        decay = 0.0 if plain else settings.weight_decay
        scale = settings.layer_decay ** (depth + 1 - layer_of(name.removeprefix("encoder."), depth))
        scale = 1.0 if settings.layer_decay == 1 else scale
        group = groups.setdefault((decay, scale), {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def clip(parameters: Collection[nn.Parameter], norm: float, *, each: bool = False) -> None:
    """Clip the global norm of the gradient or, with `each`, the norm of each parameter's gradient, without a sync."""
    if not each:
        nn.utils.clip_grad_norm_(parameters, norm)
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = whole(torch.stack(torch._foreach_norm(gradients)))  # pyright: ignore
    gradients = [own(gradient) for gradient in gradients]
    shares = (norm / (norms + 1e-6)).clamp(max=1.0)
    if shares.device.type == "cpu":  # where reading the shares is free, and multiplying by 1 is not
        for gradient, share in zip(gradients, shares.tolist(), strict=True):
            if share != 1:
                gradient.mul_(share)
        return
    torch._foreach_mul_(gradients, shares.unbind())  # pyright: ignore


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose updates of matrices are scaled by the norm of the matrix (LARS).

    Vectors take plain momentum steps without weight decay. The learning rate is applied after the momentum, so changes
    of the schedule also affect past updates.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        weight_decay: weight decay of matrices, added to the gradient.
        momentum: momentum factor.
        trust: trust coefficient, the norm of an update relative to the norm of its matrix.

    Source: arXiv 1708.03888; MAE, arXiv 2111.06377 (published code). timm's LARS adds the weight decay to the
    denominator differently, so results differ if the weight decay is not zero.
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
        """Update all parameters that have a gradient."""
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
