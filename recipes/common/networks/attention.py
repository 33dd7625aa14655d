"""Multi-head self-attention, with or without relative position encoding."""

from typing import Any

from common.config import SettingsError
from mimkit.relative import buckets_of, contextual_bias

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn


def explicit(x: Tensor, tokens: int, *, trained_bias: bool = False) -> bool:
    """Tell whether unfused attention is faster: on a CPU, in bf16 or with a trained bias.

    In bf16 and up to 256 tokens, the backward pass of the fused kernel takes 1.5 to 6 times as long, most with few
    tokens; in fp32 it is at least as fast. With a bias that requires a gradient, PyTorch does not use the fused kernel
    at any length, and takes 1.1 to 2.8 times as long.
    """
    return x.device.type == "cpu" and (trained_bias or (x.dtype == torch.bfloat16 and tokens <= 256))


def attend(
    q: Float[Tensor, "*batch k d"],
    k: Float[Tensor, "*batch n d"],
    v: Float[Tensor, "*batch n d"],
    bias: Float[Tensor, "*heads k n"] | None = None,
) -> Float[Tensor, "*batch k d"]:
    """Return softmax(q kᵀ / √d + bias) v, with the faster of two equivalent implementations."""
    bias = None if bias is None else bias.to(q.dtype)
    if explicit(q, k.shape[-2], trained_bias=bias is not None and bias.requires_grad):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        scores = scores if bias is None else scores + bias
        return scores.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, bias)


def relative_index(height: int, width: int) -> Int[Tensor, "1+n 1+n"]:
    """Return the row of the relative position table for each pair of query and key, the class token first.

    The row of two patches is their offset, query minus key, in a raster of (2 height − 1) × (2 width − 1). Three more
    rows are for the class token: as the query, as the key, and as both. Source: BEiT, arXiv 2106.08254 (published
    code).
    """
    rows, columns = torch.arange(height), torch.arange(width)
    down = (rows[:, None] - rows + height - 1)[:, None, :, None]
    across = (columns[:, None] - columns + width - 1)[None, :, None, :]
    offsets = (down * (2 * width - 1) + across).flatten(2).flatten(0, 1)
    first = relative_rows(height, width) - 3
    index = F.pad(offsets, (1, 0, 1, 0), value=first)
    index[1:, 0], index[0, 0] = first + 1, first + 2
    return index


def relative_rows(height: int, width: int) -> int:
    """Return the number of rows of a relative position table."""
    return (2 * height - 1) * (2 * width - 1) + 3


def add_relative_table(module: nn.Module, height: int, width: int, heads: int) -> None:
    """Register a trainable relative position table, initialized to zero, and its index, under timm's names."""
    module.relative_position_bias_table = nn.Parameter(torch.zeros(relative_rows(height, width), heads))
    module.register_buffer("relative_position_index", relative_index(height, width), persistent=False)


def table_bias(module: Any) -> Float[Tensor, "h n n"]:
    """Look up the relative position bias, which is added to the attention scores of each head."""
    return module.relative_position_bias_table[module.relative_position_index].permute(2, 0, 1).contiguous()


class RelativeBias(nn.Module):
    """A relative position table shared by several layers."""

    def __init__(self, height: int, width: int, heads: int) -> None:
        super().__init__()
        add_relative_table(self, height, width, heads)

    def forward(self) -> Float[Tensor, "h n n"]:
        """Return the bias of each head, query and key."""
        return table_bias(self)


class ContextualTable(nn.Module):
    """Contextual relative position encoding: a vector per bucket whose product with a query is added to its scores.

    All heads share the vectors, and the queries are not scaled. Parameter names are those of the published code.
    Source: LoMaR, arXiv 2206.00790.
    """

    def __init__(self, dim: int, buckets: int) -> None:
        super().__init__()
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, dim, buckets))

    def forward(self, queries: Float[Tensor, "b h k d"], buckets: Int[Tensor, "*b k n"]) -> Float[Tensor, "b h k n"]:
        """Return the bias of each head, query and key."""
        return contextual_bias(queries, self.lookup_table_weight, buckets)


def buckets_behind(prefix: int, buckets: Int[Tensor, "n n"], patches: Int[Tensor, "*b k"]) -> Int[Tensor, "*b m m"]:
    """Return the buckets of pairs of tokens: the first `prefix` tokens of the grid, followed by the given patches."""
    return buckets_of(buckets, F.pad(patches + prefix, (prefix, 0)))


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        key_bias: False for a bias on queries and values only, as in BEiT.
        grid: rows and columns of patches, to add a relative position table; the input must then be a class token and
            all patches in raster order.
        buckets: number of buckets of the contextual relative position encoding; 0: no such encoding.
    """

    def __init__(
        self, dim: int, heads: int, *, key_bias: bool = True, grid: tuple[int, int] | None = None, buckets: int = 0
    ) -> None:
        super().__init__()
        if dim % heads:
            raise SettingsError(f"width {dim} cannot be shared by {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=key_bias)
        if not key_bias:
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        self.own_table = grid is not None
        if grid is not None:
            add_relative_table(self, *grid, heads)
        self.rpe_k = ContextualTable(dim // heads, buckets) if buckets else None

    def qkv_bias(self) -> Float[Tensor, " 3*d"]:
        """Return the bias of the joint projection to queries, keys and values."""
        if self.qkv.bias is not None:
            return self.qkv.bias
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        num_queries: int | None = None,
        bias: Float[Tensor, "*h n n"] | None = None,
        buckets: Int[Tensor, "*b n n"] | None = None,
    ) -> Float[Tensor, "b k d"]:
        """Apply self-attention.

        Args:
            x: tokens.
            num_queries: number of tokens, at the end, that are queries; all tokens are keys and values. Default: all.
            bias: added to the scores of each query and key.
            buckets: relative position buckets of each query and key, for the contextual encoding.
        """
        weight, shift, dim = self.qkv.weight, self.qkv_bias(), x.shape[-1]
        if self.own_table:
            bias = table_bias(self) if bias is None else bias + table_bias(self)
        if num_queries is None:
            qkv = rearrange(F.linear(x, weight, shift), "b n (three h d) -> three b h n d", three=3, h=self.heads)
            q, k, v = (
                qkv.contiguous() if explicit(qkv, x.shape[1]) else qkv
            )  # one copy instead of one per matrix product
        else:
            first = x.shape[1] - num_queries
            q = rearrange(F.linear(x[:, first:], weight[:dim], shift[:dim]), "b k (h d) -> b h k d", h=self.heads)
            keys_values = F.linear(x, weight[dim:], shift[dim:])
            k, v = rearrange(keys_values, "b n (two h d) -> two b h n d", two=2, h=self.heads)
            bias = None if bias is None else bias[..., first:, :]
            buckets = None if buckets is None else buckets[..., first:, :]
        if self.rpe_k is not None:
            relative = self.rpe_k(q, buckets)
            bias = relative if bias is None else bias + relative
        return self.proj(rearrange(attend(q, k, v, bias), "b h k d -> b k (h d)"))
