"""Parameter groups, gradient clipping, LARS."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from common.config import Optimization

import torch
from torch import Tensor, nn


def layer_of(name: str, depth: int) -> int:
    """Number of a parameter's layer: 0 tokens, positions and patches, k + 1 block k, depth + 1 all that comes after."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.startswith(("cls_token", "mask_token", "pos_embed", "patch_embed.")) else depth + 1


def parameter_groups(module: nn.Module, settings: Optimization, *, depth: int = 0) -> list[dict[str, Any]]:
    """Sort trainable parameters by weight decay and by the layer-wise scale of the learning rate.

    Biases, norms and whatever else is 1-D never decay, nor what `settings.undecayed` names. With a layer decay other
    than 1, `depth` is the number of blocks of the encoder; a module's encoder may stand under the name "encoder".
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
    """Scale down the whole gradient to a norm, or the gradient of each parameter on its own.

    The device is not waited for.
    """
    if not each:
        nn.utils.clip_grad_norm_(parameters, norm)
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch._foreach_norm(gradients)  # pyright: ignore
    torch._foreach_mul_(gradients, [(norm / (own + 1e-6)).clamp(max=1.0) for own in norms])  # pyright: ignore


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
