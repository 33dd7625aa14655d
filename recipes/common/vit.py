"""The vision transformer and the decoder that all recipes share. They read any patches with their positions.

Parameter names are timm's, so an exported encoder loads into timm without renaming.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, cast

from mimkit.positions import resize_table, sincos
from mimkit.relative import buckets_of, contextual_bias, num_buckets, relative_buckets
from mimkit.tokens import put, split

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

SIZES: dict[str, dict[str, Any]] = {
    "nano": {"dim": 96, "depth": 6, "heads": 3},  # for the embedded digits
    "tiny": {"dim": 192, "depth": 12, "heads": 3},
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "base": {"dim": 768, "depth": 12, "heads": 12},
    "large": {"dim": 1024, "depth": 24, "heads": 16},
    "huge": {"dim": 1280, "depth": 32, "heads": 16},
}


def explicit(x: Tensor, tokens: int, *, trained_bias: bool = False) -> bool:
    """Whether plain operations beat the fused attention here: on a CPU, in bf16 or with a bias that is trained.

    In bf16 its backward pass takes 1.5 to 6 times as long up to 256 tokens, the more so the fewer there are; in fp32 it
    is as fast or faster. With a bias that wants a gradient it is not fused at any length, and takes 1.1 to 2.8 times as
    long.
    """
    return x.device.type == "cpu" and (trained_bias or (x.dtype == torch.bfloat16 and tokens <= 256))


def attend(
    q: Float[Tensor, "*batch k d"],
    k: Float[Tensor, "*batch n d"],
    v: Float[Tensor, "*batch n d"],
    bias: Float[Tensor, "*heads k n"] | None = None,
) -> Float[Tensor, "*batch k d"]:
    """Return softmax(q kᵀ / √d + bias) v, in the faster of two equal ways."""
    bias = None if bias is None else bias.to(q.dtype)
    if explicit(q, k.shape[-2], trained_bias=bias is not None and bias.requires_grad):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        scores = scores if bias is None else scores + bias
        return scores.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, bias)


def drop_path(
    branch: Float[Tensor, "b n d"], noise: Float[Tensor, " b"], rate: Float[Tensor, ""]
) -> Float[Tensor, "b n d"]:
    """Drop a residual branch for the samples whose noise is below `rate`, and scale up what is kept."""
    return branch * ((noise >= rate).float() / (1 - rate)).to(branch.dtype)[:, None, None]


def relative_index(height: int, width: int) -> Int[Tensor, "1+n 1+n"]:
    """Tell for each query and each key, a class token first, which row of a table of relative positions is theirs.

    Two patches have the row of their offset, query minus key, in a raster of (2 height − 1) × (2 width − 1); then come
    three rows for the class token: as the query, as the key, and with itself. Source: BEiT, arXiv 2106.08254 (published
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
    """Count the rows of such a table."""
    return (2 * height - 1) * (2 * width - 1) + 3


def add_relative_table(module: nn.Module, height: int, width: int, heads: int) -> None:
    """Give a module a table of zeros, to be trained, and the index to read it by; the names are timm's."""
    module.relative_position_bias_table = nn.Parameter(torch.zeros(relative_rows(height, width), heads))
    module.register_buffer("relative_position_index", relative_index(height, width), persistent=False)


def relative_bias(module: Any) -> Float[Tensor, "h n n"]:
    """Read the table: what is added to the scores of each pair of tokens, per head."""
    return module.relative_position_bias_table[module.relative_position_index].permute(2, 0, 1).contiguous()


class RelativeBias(nn.Module):
    """A table of relative positions that several layers share."""

    def __init__(self, height: int, width: int, heads: int) -> None:
        super().__init__()
        add_relative_table(self, height, width, heads)

    def forward(self) -> Float[Tensor, "h n n"]:
        return relative_bias(self)


class ContextualTable(nn.Module):
    """A vector per bucket of relative positions, for all heads, whose product with a query is added to its scores.

    The queries are not scaled. The names are the published code's. Source: LoMaR, arXiv 2206.00790.
    """

    def __init__(self, dim: int, buckets: int) -> None:
        super().__init__()
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, dim, buckets))

    def forward(self, queries: Float[Tensor, "b h k d"], buckets: Int[Tensor, "*b k n"]) -> Float[Tensor, "b h k n"]:
        return contextual_bias(queries, self.lookup_table_weight, buckets)


def buckets_behind(prefix: int, buckets: Int[Tensor, "n n"], patches: Int[Tensor, "*b k"]) -> Int[Tensor, "*b m m"]:
    """Return the buckets of the `prefix` first tokens of a grid and, behind them, of some patches."""
    return buckets_of(buckets, F.pad(patches + prefix, (prefix, 0)))


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        key_bias: False for a bias on queries and values only, as in BEiT.
        grid: rows and columns of patches, for a table of relative positions of its own; it then reads all of them in
            raster order behind a class token.
        buckets: how many there are of contextual relative positions; 0: there is no table of them.
    """

    def __init__(
        self, dim: int, heads: int, *, key_bias: bool = True, grid: tuple[int, int] | None = None, buckets: int = 0
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} cannot be shared by {heads} heads")
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
        """Attend; only the last `num_queries` ask if it is given.

        `bias` is added to the scores, query by key; of `buckets` what the table and the queries say of them.
        """
        weight, shift, dim = self.qkv.weight, self.qkv_bias(), x.shape[-1]
        if self.own_table:
            bias = relative_bias(self) if bias is None else bias + relative_bias(self)
        if num_queries is None:
            qkv = rearrange(F.linear(x, weight, shift), "b n (three h d) -> three b h n d", three=3, h=self.heads)
            q, k, v = qkv.contiguous() if explicit(qkv, x.shape[1]) else qkv  # one copy instead of one per product
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


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        key_bias, grid, buckets: see `Attention`.
        drop: probability to drop a residual branch (needs noise).
        layer_scale: what the factors per channel of the residual branches start with; none: there are no factors.
    """

    compile_alone = True  # for the engine, when the whole cannot be compiled
    drop: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        key_bias: bool = True,
        drop: float = 0.0,
        layer_scale: float | None = None,
        grid: tuple[int, int] | None = None,
        buckets: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= drop < 1:
            raise ValueError(f"drop={drop} is not a probability below 1")
        # a tensor, because it differs from block to block: compiled block by block, all share one graph
        self.register_buffer("drop", torch.tensor(drop, dtype=torch.float64), persistent=False)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, key_bias=key_bias, grid=grid, buckets=buckets)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.scaled = layer_scale is not None
        if layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        noise: Float[Tensor, "b 2"] | None = None,
        num_queries: int | None = None,
        bias: Float[Tensor, "*h n n"] | None = None,
        buckets: Int[Tensor, "*b n n"] | None = None,
    ) -> Float[Tensor, "b k d"]:
        """Update all tokens, or only the last `num_queries`, which still attend to all of them.

        `bias` is added to the scores of attention, of each query with each key; `buckets` are of relative positions.
        """
        branch = self.attn(self.norm1(x), num_queries, bias, buckets)
        branch = self.gamma_1 * branch if self.scaled else branch
        x = x if num_queries is None else x[:, x.shape[1] - num_queries :]
        x = x + (branch if noise is None else drop_path(branch, noise[:, 0], self.drop))
        branch = self.mlp(self.norm2(x))
        branch = self.gamma_2 * branch if self.scaled else branch
        return x + (branch if noise is None else drop_path(branch, noise[:, 1], self.drop))


class PatchEmbed(nn.Module):
    """A convolution of kernel = stride = patch, applied as a matrix to patches that are already cut."""

    def __init__(self, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, patches: Float[Tensor, "b k values"]) -> Float[Tensor, "b k d"]:
        return F.linear(patches, self.proj.weight.movedim(1, -1).flatten(1), self.proj.bias)  # channel fastest


class ViT(nn.Module):
    """A vision transformer that reads any patches, each with its position, in any order.

    Args:
        height, width: the full grid, in patches; the size of the position table.
        patch, channels: side of a patch in pixels; channels of the images.
        dim, depth, heads: width, number of blocks, attention heads.
        class_token: whether a learned token is put first. It stays inside: patches and positions do not count it.
        key_bias: False for a bias on queries and values only.
        drop: drop path, rising linearly from 0 in the first block to this in the last.
        table: makes the position table, which is frozen (set `pos_embed.requires_grad` to train it). None: there is no
            such table, `pos_embed` is None and `positions` are zeros.
        relative: trained tables of relative positions. "shared", "each": of numbers per head and offset, one table that
            all blocks share or one in each (BEiT); it needs a class token and then all patches in raster order.
            "contextual": of vectors per bucket of offsets, one table in each block (iRPE, as LoMaR has it); it reads
            any tokens whose `buckets` are given.
        layer_scale: what the factors per channel of the residual branches start with; none: there are no factors.
        mask_token: whether there is a learned vector to put in the place of masked patches.
    """

    def __init__(
        self,
        *,
        height: int,
        width: int,
        patch: int,
        channels: int,
        dim: int,
        depth: int,
        heads: int,
        class_token: bool = True,
        key_bias: bool = True,
        drop: float = 0.0,
        table: Callable[..., Float[Tensor, "n d"]] | None = sincos,
        relative: Literal["shared", "each", "contextual"] | None = None,
        layer_scale: float | None = None,
        mask_token: bool = False,
    ) -> None:
        super().__init__()
        if relative in ("shared", "each") and not class_token:
            raise ValueError("a table of relative positions needs a class token: three of its rows are for it")
        self.height, self.width, self.patch, self.channels = height, width, patch, channels
        self.dim, self.depth, self.heads = dim, depth, heads
        self.relative, self.layer_scale, self.key_bias = relative, layer_scale, key_bias
        self.patch_embed = PatchEmbed(patch, channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim)) if mask_token else None
        if table is None:
            self.register_parameter("pos_embed", None)
        else:
            positions = table(height=height, width=width, dim=dim)
            positions = F.pad(positions, (0, 0, int(class_token), 0))  # the class token's position is zero
            self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.rel_pos_bias = RelativeBias(height, width, heads) if relative == "shared" else None
        self.buckets: Tensor | None
        contextual, prefix = relative == "contextual", self.num_prefix
        buckets = relative_buckets(height=height, width=width, num_prefix=prefix) if contextual else None
        self.register_buffer("buckets", buckets, persistent=False)
        drops = torch.linspace(0, drop, depth, device="cpu").tolist()  # numbers, also of a network on the meta device
        options: dict[str, Any] = {"key_bias": key_bias, "layer_scale": layer_scale}
        options["grid"] = (height, width) if relative == "each" else None
        options["buckets"] = num_buckets(num_prefix=prefix) if contextual else 0
        self.blocks = nn.ModuleList(Block(dim, heads, drop=rate, **options) for rate in drops)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    @property
    def num_prefix(self) -> int:
        """Tokens before those of the patches: 1 with a class token, else 0."""
        return 0 if self.cls_token is None else 1

    @property
    def positions(self) -> Float[Tensor, "n d"]:
        """The position of every patch of the grid, in raster order."""
        if self.pos_embed is None:
            return self.patch_embed.proj.weight.new_zeros(self.height * self.width, self.dim)
        return self.pos_embed[0, self.num_prefix :]

    def buckets_of(self, indices: Int[Tensor, "*b k"]) -> Int[Tensor, "*b prefix+k prefix+k"] | None:
        """The relative positions of some patches, behind the class token; None if there are none in this encoder."""
        return None if self.buckets is None else buckets_behind(self.num_prefix, self.buckets, indices)

    def embed(
        self, patches: Float[Tensor, "b k values"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Embed patches, and put the mask token where `mask` says so; see `forward`."""
        x = self.patch_embed(patches)
        if mask is None:
            return x
        if self.mask_token is None:
            raise ValueError("an encoder without a mask token cannot mask")
        if mask.shape[1] == patches.shape[1]:
            return torch.where(mask.unsqueeze(-1), self.mask_token, x)
        visible, _ = split(mask, num_masked=mask.shape[1] - patches.shape[1])
        return put(x.to(self.mask_token.dtype), visible, self.mask_token.expand(*mask.shape, -1))

    def unnormalized(
        self,
        patches: Float[Tensor, "b k values"],
        positions: Float[Tensor, "*b n d"] | None,
        noise: Float[Tensor, "b depth 2"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        num_outputs: int | None = None,
        buckets: Int[Tensor, "*b prefix+n prefix+n"] | None = None,
    ) -> Float[Tensor, "b prefix+outputs d"]:
        """Return the tokens after the last block, before the final norm."""
        buckets = self.buckets if buckets is None else buckets
        known = self.height * self.width if buckets is None else buckets.shape[-1] - self.num_prefix
        if self.relative and ((patches if mask is None else mask).shape[1] != known or num_outputs is not None):
            raise ValueError(f"relative positions are those of all {known} patches, not of a part")
        x = self.embed(patches, mask)
        x = x if positions is None else x + positions
        if self.cls_token is not None:
            first = self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, :1]
            x = torch.cat([first.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        for i, block in enumerate(self.blocks):
            asking = None
            if num_outputs is not None and i == self.depth - 1:
                asking = self.num_prefix + num_outputs
                x = x.roll(-asking, dims=1)  # those who ask are at the end
            x = block(x, None if noise is None else noise[:, i], asking, bias, buckets)
        return x

    def forward(
        self,
        patches: Float[Tensor, "b k values"],
        positions: Float[Tensor, "*b n d"] | None,
        noise: Float[Tensor, "b depth 2"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        num_outputs: int | None = None,
        buckets: Int[Tensor, "*b prefix+n prefix+n"] | None = None,
    ) -> Float[Tensor, "b prefix+outputs d"]:
        """Encode patches: class token first (if there is one), then the patches in the order given.

        Args:
            patches: as from `mimkit.tokens.patchify`; with a mask all, or only the visible ones, in their order.
            positions: an embedding per patch, `vit.positions[indices]` as a rule; none: there is no such position.
            noise: uniform in [0, 1), for drop path; none means that nothing is dropped.
            mask: `True` = the mask token stands in the place of the patch, at its position.
            num_outputs: return no more than the class token and the first so many patches: in the last block only they
                ask, all others only answer.
            buckets: of contextual relative positions, class token first: those of `mimkit.relative.relative_buckets`
                for a window, or `vit.buckets_of(indices)` for some patches. None: of all patches in raster order.

        Raises:
            ValueError: if relative positions are to be those of all patches, and these are not all.
        """
        return self.norm(self.unnormalized(patches, positions, noise, mask, num_outputs, buckets))


class Predictor(nn.Module):
    """Transformer blocks, a norm and a linear head: what stands behind every decoder."""

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
        """Predict the last `num_outputs` tokens."""
        return self.head(self.decode(x, num_outputs, buckets))

    def predict_mean(self, x: Float[Tensor, "b n d"], num_outputs: int) -> Float[Tensor, "b {num_outputs}"]:
        """Predict the mean of the outputs, in float32 and at the price of one of them."""
        weight, bias = self.head.weight.float().mean(dim=0), self.head.bias.float().mean()
        return (self.decode(x, num_outputs).float() * weight).sum(dim=-1) + bias

    def decode(
        self, x: Float[Tensor, "b n d"], num_outputs: int, buckets: Int[Tensor, "*b n n"] | None = None
    ) -> Float[Tensor, "b {num_outputs} d"]:
        """Run the blocks and the norm: in the last block only the last `num_outputs` ask, all others only answer."""
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, buckets=buckets)
        return self.norm(last(x, num_queries=None if num_outputs == x.shape[1] else num_outputs, buckets=buckets))


class Decoder(Predictor):
    """A small transformer that predicts from the visible tokens what was masked.

    Tokens stay in the order class, visible, masked: attention does not care, and every prediction is one slice.

    Args:
        height, width: the grid, in patches.
        encoder_dim: width of the tokens it reads.
        dim, depth, heads: its own width, number of blocks, attention heads.
        outputs: values per token, patch · patch · channels for pixels.
        class_token: whether the first token of the encoder is a class token.
        key_bias: False for a bias on queries and values only.
        embed_bias: whether the projection from the encoder has a bias.
        table: makes the position table, which is frozen. None: positions are contextual relative ones, see `ViT`.
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
        """Lay out class, visible and mask tokens with their positions (the class token's is zero)."""
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
        """Predict the masked tokens, in the order of `masked`; with `visible_too` the visible ones before them."""
        x, buckets = self.sequence(latent, visible, masked), None
        if self.buckets is not None:
            buckets = buckets_behind(self.num_prefix, self.buckets, torch.cat([visible, masked], dim=1))
        return self.predict(x, masked.shape[1] + (visible.shape[1] if visible_too else 0), buckets)


class PixelHead(nn.Module):
    """A linear layer that predicts the pixels of each token's patch, as `mimkit.tokens.patchify` has them.

    It is stored as SimMIM's convolution of 1 × 1, whose outputs run over channels first.
    """

    def __init__(self, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.channels = channels
        self.proj = nn.Conv2d(dim, channels * patch**2, 1)

    def forward(self, x: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n values"]:
        weight, bias = (
            part.unflatten(0, (self.channels, -1)).transpose(0, 1).flatten(0, 1)  # channel fastest
            for part in (self.proj.weight.flatten(1), cast(Tensor, self.proj.bias))
        )
        return F.linear(x, weight, bias)


def initialize_mae(module: nn.Module) -> None:
    """Initialize as MAE does: Xavier on every stored matrix (qkv as one), tokens normal with std 0.02.

    The bias of the patch embedding keeps PyTorch's default. Source: MAE, arXiv 2111.06377 (published code).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, PatchEmbed):
            nn.init.xavier_uniform_(part.proj.weight.flatten(1))
    for name, parameter in module.named_parameters():
        if name.split(".")[-1] in ("cls_token", "mask_token", "position_token"):
            nn.init.normal_(parameter, std=0.02)


def initialize_truncated(module: nn.Module) -> None:
    """Initialize as Beyond Masking does: matrices and mask token normal with std 0.02, cut at one std.

    The patch embedding keeps PyTorch's default. Source: Beyond Masking, arXiv 2203.14313 (published code).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02, a=-0.02, b=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for name, parameter in module.named_parameters():
        if name.split(".")[-1] in ("cls_token", "mask_token"):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)


def initialize_simmim(vit: ViT) -> None:
    """Initialize as SimMIM does: matrices and tokens normal with std 0.02, cut at one std, biases zero.

    What ends the residual branches of block k, counted from 1, is divided by √(2k). Source: SimMIM, arXiv 2111.09886
    (published code, of BEiT's descent).
    """
    for part in vit.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(part.weight, std=0.02, a=-0.02, b=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for token in (vit.cls_token, vit.mask_token):
        if token is not None:
            nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
    with torch.no_grad():
        for k, block in enumerate(cast(list[Block], vit.blocks), start=1):
            for end in (block.attn.proj, block.mlp.fc2):
                end.weight.div_(math.sqrt(2 * k))


def in_beit(vit: ViT) -> bool:
    """Whether timm has this network under `beit`, not under `vision_transformer`.

    Raises:
        ValueError: if timm has it under neither.
    """
    plain = vit.pos_embed is not None and vit.layer_scale is None and vit.relative is None
    if not plain and (vit.key_bias or vit.cls_token is None):
        raise ValueError(
            "timm has no network with a key bias, or without class token, that has relative or no positions"
        )
    return not plain


SHARED_TABLE, OWN_TABLE = "rel_pos_bias.relative_position_bias_table", "blocks.{}.attn.relative_position_bias_table"


def timm_state(vit: ViT) -> dict[str, Tensor]:
    """Return the weights under timm's names; those of pre-training alone (the mask token) are left out.

    A plain ViT has the biases of queries and values as one with a key bias of zero. An encoder with contextual relative
    positions, which timm does not have, keeps its names.
    """
    state = {name: tensor.detach() for name, tensor in vit.state_dict().items() if name != "mask_token"}
    if vit.relative == "contextual" or in_beit(vit):
        return state
    for i, block in enumerate(vit.blocks):
        state[f"blocks.{i}.attn.qkv.bias"] = cast(Block, block).attn.qkv_bias().detach()
        state.pop(f"blocks.{i}.attn.q_bias", None)
        state.pop(f"blocks.{i}.attn.v_bias", None)
    return state


def timm_arguments(vit: ViT) -> dict[str, Any]:
    """Return the arguments with which timm's `VisionTransformer`, or `Beit` (see `in_beit`), is the same network.

    It has none with contextual relative positions: then one argument more says that they are there.
    """
    arguments = {
        "img_size": [vit.height * vit.patch, vit.width * vit.patch],
        "patch_size": vit.patch,
        "in_chans": vit.channels,
        "embed_dim": vit.dim,
        "depth": vit.depth,
        "num_heads": vit.heads,
    }
    if vit.relative == "contextual":
        return arguments | {"class_token": vit.cls_token is not None, "relative": vit.relative}
    if in_beit(vit):
        return arguments | {
            "use_abs_pos_emb": vit.pos_embed is not None,
            "use_rel_pos_bias": vit.relative == "each",
            "use_shared_rel_pos_bias": vit.relative == "shared",
            "init_values": vit.layer_scale,
            "global_pool": "",
            "num_classes": 0,
        }
    return arguments | {
        "class_token": vit.cls_token is not None,
        "global_pool": "token" if vit.cls_token is not None else "",
        "num_classes": 0,
    }


def timm_arguments_of(weights: dict[str, Tensor], source: object) -> dict[str, Any]:
    """Read the same off the shapes of a published encoder of square images; its heads follow from its width.

    Those of an encoder with relative positions (SimMIM, BEiT; LoMaR) follow from their table.

    Raises:
        ValueError: if the weights are not those of a plain ViT of a named size, nor of one with relative positions.
    """
    kernel, table = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
    blocks = [int(name.split(".")[1]) for name in weights if name.startswith("blocks.")]
    relative = weights.get(SHARED_TABLE, weights.get(OWN_TABLE.format(0)))
    if kernel is not None and relative is not None and blocks:
        dim, channels, patch, _ = kernel.shape
        side = (1 + math.isqrt(max(0, len(relative) - 3))) // 2
        if relative_rows(side, side) != len(relative):
            raise ValueError(f"{source}: {len(relative)} relative positions are not those of a square grid")
        return {
            "img_size": [side * patch, side * patch],
            "patch_size": patch,
            "in_chans": channels,
            "embed_dim": dim,
            "depth": 1 + max(blocks),
            "num_heads": relative.shape[1],
            "use_abs_pos_emb": table is not None,
            "use_rel_pos_bias": OWN_TABLE.format(0) in weights,
            "use_shared_rel_pos_bias": SHARED_TABLE in weights,
            "init_values": 0.1 if "blocks.0.gamma_1" in weights else None,
        }
    if kernel is None or kernel.ndim != 4 or table is None or table.ndim != 3 or not blocks:
        raise ValueError(f"{source} is not a plain ViT, which has patch_embed.proj.weight, pos_embed and blocks")
    dim, channels, patch, _ = kernel.shape
    contextual = weights.get("blocks.0.attn.rpe_k.lookup_table_weight")
    heads = next((size["heads"] for size in SIZES.values() if size["dim"] == dim), None)
    heads = heads if contextual is None else dim // contextual.shape[1]
    side = math.isqrt(table.shape[1])
    if heads is None or side**2 + ("cls_token" in weights) != table.shape[1]:
        raise ValueError(f"{source}: width {dim} and {table.shape[1]} positions are not those of a known encoder")
    return {
        "img_size": [side * patch, side * patch],
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": dim,
        "depth": 1 + max(blocks),
        "num_heads": heads,
        "class_token": "cls_token" in weights,
    } | ({} if contextual is None else {"relative": "contextual"})


def resize_positions(
    pos_embed: Float[Tensor, "1 prefix+n d"], *, height: int, width: int, new_height: int, new_width: int
) -> Float[Tensor, "1 prefix+m d"]:
    """Resample a table with or without the row of a class token for another grid; the class row stays.

    Raises:
        ValueError: if the table has more or fewer rows, or a side is not positive.
    """
    prefix = pos_embed.shape[1] - height * width
    if prefix not in (0, 1):
        raise ValueError(f"a table of {pos_embed.shape[1]} rows is not one of a grid of {height} × {width}")
    table = resize_table(pos_embed[:, prefix:], height=height, width=width, new_height=new_height, new_width=new_width)
    return torch.cat([pos_embed[:, :prefix], table], dim=1)


def own_tables(
    weights: dict[str, Tensor], *, depth: int, height: int, width: int, new_height: int, new_width: int
) -> dict[str, Tensor]:
    """Give every block a table of relative positions of its own, a copy of the shared one if there is one.

    For another grid they are resampled as pictures of all offsets are (bicubic, see `resize_table`; the published code
    has a geometric grid of offsets instead); the three rows of the class token stay.

    Raises:
        ValueError: if a table has more or fewer rows than its grid.
    """
    old = {"height": 2 * height - 1, "width": 2 * width - 1}
    new = {"new_height": 2 * new_height - 1, "new_width": 2 * new_width - 1}
    tables = {}
    for name in map(OWN_TABLE.format, range(depth)):
        table = weights.get(name, weights.get(SHARED_TABLE))
        if table is not None:
            tables[name] = torch.cat([resize_table(table[:-3], **old, **new), table[-3:]])
    return {name: tensor for name, tensor in weights.items() if name != SHARED_TABLE} | tables
