"""Decoders, which predict pixels, positions or losses from the tokens of an encoder."""

from collections.abc import Callable
from typing import cast

from common.networks.attention import buckets_behind
from common.networks.vit import Block
from mimkit.positions import sincos
from mimkit.relative import num_buckets, relative_buckets
from mimkit.tokens import put, take

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


def in_raster_order(device: torch.device) -> bool:
    """Tell whether a decoder with contextual relative positions puts its tokens back in raster order: on a GPU.

    All images then share their buckets, and `mimkit.relative.contextual_bias` needs no gather, whose backward pass adds
    a number per image, head and pair of tokens into few places: 160 million for 256 images, 16 heads and 197 tokens.
    """
    return device.type == "cuda"


class Predictor(nn.Module):
    """Transformer blocks, a norm and a linear head, the basis of every decoder."""

    def __init__(
        self, dim: int, depth: int, heads: int, outputs: int, *, key_bias: bool = True, buckets: int = 0
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"a decoder of {depth} blocks predicts nothing")
        self.blocks = nn.ModuleList(Block(dim, heads, key_bias=key_bias, buckets=buckets) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, outputs)

    def predict(
        self, x: Float[Tensor, "b n d"], num_outputs: int, buckets: Int[Tensor, "*b n n"] | None = None
    ) -> Float[Tensor, "b {num_outputs} outputs"]:
        """Predict the outputs of the last `num_outputs` tokens."""
        return self.head(self.decode(x, num_outputs, buckets))

    def predict_mean(self, x: Float[Tensor, "b n d"], num_outputs: int) -> Float[Tensor, "b {num_outputs}"]:
        """Predict the mean of the outputs of each token, in float32 and at the cost of a single output."""
        weight, bias = self.head.weight.float().mean(dim=0), self.head.bias.float().mean()
        return (self.decode(x, num_outputs).float() * weight).sum(dim=-1) + bias

    def decode(
        self, x: Float[Tensor, "b n d"], num_outputs: int, buckets: Int[Tensor, "*b n n"] | None = None
    ) -> Float[Tensor, "b {num_outputs} d"]:
        """Apply the blocks and the norm; only the last `num_outputs` tokens are queries of the last block."""
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, buckets=buckets)
        return self.norm(last(x, num_queries=None if num_outputs == x.shape[1] else num_outputs, buckets=buckets))


class Decoder(Predictor):
    """A small transformer that predicts masked patches from the visible tokens.

    Tokens stay in the order class, visible, masked: attention is permutation-equivariant, and the predictions are a
    contiguous slice. The exception is `in_raster_order`.

    Args:
        height, width: the grid, in patches.
        encoder_dim: width of the encoder's tokens.
        dim, depth, heads: width, number of blocks and number of attention heads of the decoder.
        outputs: values per token; patch · patch · channels for pixels.
        class_token: whether the first token of the encoder is a class token.
        key_bias: False for a bias on queries and values only.
        embed_bias: whether the projection from the encoder has a bias.
        table: function that returns the position table, which is frozen. None: use contextual relative position
            encoding, see `ViT`.
    """

    def __init__(
        self,
        *,
        height: int,
        width: int,
        encoder_dim: int,
        dim: int,
        depth: int,
        heads: int,
        outputs: int,
        class_token: bool = True,
        key_bias: bool = True,
        embed_bias: bool = True,
        table: Callable[..., Float[Tensor, "n d"]] | None = sincos,
    ) -> None:
        prefix = int(class_token)
        count = num_buckets(num_prefix=prefix) if table is None else 0
        super().__init__(dim, depth, heads, outputs, key_bias=key_bias, buckets=count)
        self.num_prefix = prefix
        self.embed = nn.Linear(encoder_dim, dim, bias=embed_bias)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed: Tensor
        self.buckets: Tensor | None
        positions = torch.zeros(height * width, dim) if table is None else table(height=height, width=width, dim=dim)
        self.register_buffer("pos_embed", positions, persistent=False)
        buckets = relative_buckets(height=height, width=width, num_prefix=prefix) if table is None else None
        self.register_buffer("buckets", buckets, persistent=False)

    def sequence(
        self,
        latent: Float[Tensor, "b prefix+k e"],
        visible: Int[Tensor, "b k"],
        masked: Int[Tensor, "b m"],
    ) -> Float[Tensor, "b prefix+k+m d"]:
        """Concatenate class, visible and mask tokens, with their positions added (zero for the class token)."""
        x = self.embed(latent)
        places = F.pad(self.pos_embed[visible], (0, 0, self.num_prefix, 0))
        return torch.cat([x + places, (self.mask_token + self.pos_embed[masked]).to(x.dtype)], dim=1)

    def forward(
        self,
        latent: Float[Tensor, "b prefix+k e"],
        visible: Int[Tensor, "b k"],
        masked: Int[Tensor, "b m"],
        *,
        visible_too: bool = False,
    ) -> Float[Tensor, "b outputs_n outputs"]:
        """Predict the masked patches, in the order of `masked`; with `visible_too`, the visible patches come first."""
        x, num_outputs = self.sequence(latent, visible, masked), masked.shape[1]
        num_outputs += visible.shape[1] if visible_too else 0
        if self.buckets is None:
            return self.predict(x, num_outputs)
        tokens = torch.cat([visible, masked], dim=1)
        if not in_raster_order(x.device):
            return self.predict(x, num_outputs, buckets_behind(self.num_prefix, self.buckets, tokens))
        places = F.pad(tokens + self.num_prefix, (self.num_prefix, 0))
        x = self.decode(put(x, places, torch.zeros_like(x)), x.shape[1], self.buckets)
        return self.head(take(x, places[:, places.shape[1] - num_outputs :]))


class PixelHead(nn.Module):
    """A linear layer that predicts the pixels of each patch in the layout of `mimkit.tokens.patchify`.

    The weights are stored as SimMIM's 1 × 1 convolution, whose outputs are ordered channels first.
    """

    def __init__(self, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.channels = channels
        self.proj = nn.Conv2d(dim, channels * patch**2, 1)

    def forward(self, x: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n values"]:
        """Predict the pixels of the patch of each token."""
        weight, bias = (
            part.unflatten(0, (self.channels, -1)).transpose(0, 1).flatten(0, 1)  # channels last
            for part in (self.proj.weight.flatten(1), cast(Tensor, self.proj.bias))
        )
        return F.linear(x, weight, bias)
