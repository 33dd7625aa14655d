"""What classifiers and probes need of an encoder: ours, a deepened one, or timm's."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn


class Encoder(Protocol):
    """A vision transformer that encodes patches with their positions: the class token first, if there is one.

    `height` and `width` are the grid in patches, `num_prefix` counts the tokens before those of the patches, and
    `positions` (n, dim) are those of the whole grid, in raster order.
    """

    height: int
    width: int
    patch: int
    channels: int
    dim: int
    depth: int
    heads: int

    @property
    def num_prefix(self) -> int: ...
    @property
    def cls_token(self) -> Tensor | None: ...
    @property
    def pos_embed(self) -> Tensor | None: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def blocks(self) -> nn.ModuleList: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...
    def requires_grad_(self, requires_grad: bool = True) -> Any: ...


class TrainableEncoder(Encoder, Protocol):
    """An encoder of which a classifier also uses the tokens before the last norm."""

    @property
    def norm(self) -> nn.Module: ...
    @property
    def unnormalized(self) -> Callable[..., Tensor]: ...
