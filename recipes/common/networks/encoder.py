"""The interface of an encoder for classifiers and probes: a `ViT`, a deepened encoder, or a timm model."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn


class Encoder(Protocol):
    """A vision transformer that encodes patches with their positions; its output starts with any class token.

    `height` and `width` are the size of the grid in patches.
    """

    height: int
    width: int
    patch: int
    channels: int
    dim: int
    depth: int
    heads: int

    @property
    def num_prefix(self) -> int:
        """Return the number of tokens before the patch tokens."""
        ...

    @property
    def cls_token(self) -> Tensor | None:
        """Return the class token, or None if there is none."""
        ...

    @property
    def pos_embed(self) -> Tensor | None:
        """Return the position table, or None if there is none."""
        ...

    @property
    def positions(self) -> Tensor:
        """Return the positions of the whole grid in raster order, (n, dim)."""
        ...

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the transformer blocks."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Encode patches with their positions and, if it is given, noise for drop path."""
        ...

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freeze or unfreeze all parameters."""
        ...


class TrainableEncoder(Encoder, Protocol):
    """An encoder that also exposes its tokens before the final norm."""

    @property
    def norm(self) -> nn.Module:
        """Return the final norm."""
        ...

    @property
    def unnormalized(self) -> Callable[..., Tensor]:
        """Return the function that encodes patches without the final norm."""
        ...
