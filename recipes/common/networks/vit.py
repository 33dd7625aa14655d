"""The vision transformer shared by all recipes, which encodes any set of patches given their positions.

Parameter names are timm's, so an exported encoder loads into timm without renaming.
"""

from collections.abc import Callable
from typing import Any, Literal

from common.networks.attention import Attention, RelativeBias, buckets_behind
from mimkit.positions import sincos
from mimkit.relative import num_buckets, relative_buckets
from mimkit.tokens import put, split

import torch
import torch.nn.functional as F
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


def drop_path(
    branch: Float[Tensor, "b n d"], noise: Float[Tensor, " b"], rate: Float[Tensor, ""]
) -> Float[Tensor, "b n d"]:
    """Drop the residual branch of samples whose noise is below `rate`, and rescale the others (stochastic depth)."""
    return branch * ((noise >= rate).float() / (1 - rate)).to(branch.dtype)[:, None, None]


class MLP(nn.Module):
    """The two-layer perceptron of a transformer block, with GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Apply the layers to each token."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        dim, heads: width and number of attention heads.
        mlp_ratio: hidden width of the MLP, as a multiple of `dim`.
        key_bias, grid, buckets: see `Attention`.
        drop: probability of dropping a residual branch (requires noise).
        layer_scale: initial value of the layer scale; None: no layer scale.
    """

    compile_alone = True  # tells the engine to compile each block separately under DDP
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
        # a tensor, because it differs between blocks: separately compiled blocks can then share one graph
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
        """Update all tokens, or only the last `num_queries`, which still attend to all tokens.

        Args:
            x: tokens.
            noise: uniform in [0, 1), for drop path; None: nothing is dropped.
            num_queries, bias, buckets: see `Attention.forward`.
        """
        branch = self.attn(self.norm1(x), num_queries, bias, buckets)
        branch = self.gamma_1 * branch if self.scaled else branch
        x = x if num_queries is None else x[:, x.shape[1] - num_queries :]
        x = x + (branch if noise is None else drop_path(branch, noise[:, 0], self.drop))
        branch = self.mlp(self.norm2(x))
        branch = self.gamma_2 * branch if self.scaled else branch
        return x + (branch if noise is None else drop_path(branch, noise[:, 1], self.drop))


class PatchEmbed(nn.Module):
    """A convolution with kernel size and stride equal to the patch size, applied to flattened patches."""

    def __init__(self, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, patches: Float[Tensor, "b k values"]) -> Float[Tensor, "b k d"]:
        """Embed patches in the layout of `mimkit.tokens.patchify`."""
        return F.linear(patches, self.proj.weight.movedim(1, -1).flatten(1), self.proj.bias)  # channels last


class ViT(nn.Module):
    """A vision transformer that encodes any set of patches, each with its position, in any order.

    Args:
        height, width: size of the full grid and of the position table, in patches.
        patch, channels: side of a patch in pixels; number of image channels.
        dim, depth, heads: width, number of blocks and number of attention heads.
        class_token: whether to prepend a learned token. It is internal: patches and positions do not include it.
        key_bias: False for a bias on queries and values only.
        drop: drop path rate of the last block, rising linearly from 0 in the first.
        table: function that returns the position table, which is frozen (set `pos_embed.requires_grad` to train it).
            None: there is no table, `pos_embed` is None and `positions` are zeros.
        relative: trained relative position encoding. "shared", "each": a bias per head and offset, in one table for
            all blocks or one per block (BEiT); it requires a class token and all patches in raster order.
            "contextual": a vector per bucket of offsets, in one table per block (iRPE, as in LoMaR); it accepts any
            tokens whose `buckets` are given.
        layer_scale: initial value of the layer scale; None: no layer scale.
        mask_token: whether to add a learned token that replaces masked patches.
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
        drops = torch.linspace(0, drop, depth, device="cpu").tolist()  # Python numbers, even on the meta device
        options: dict[str, Any] = {"key_bias": key_bias, "layer_scale": layer_scale}
        options["grid"] = (height, width) if relative == "each" else None
        options["buckets"] = num_buckets(num_prefix=prefix) if contextual else 0
        self.blocks = nn.ModuleList(Block(dim, heads, drop=rate, **options) for rate in drops)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    @property
    def num_prefix(self) -> int:
        """Return the number of tokens before the patch tokens: 1 with a class token, else 0."""
        return 0 if self.cls_token is None else 1

    @property
    def positions(self) -> Float[Tensor, "n d"]:
        """Return the positions of all patches of the grid, in raster order."""
        if self.pos_embed is None:
            return self.patch_embed.proj.weight.new_zeros(self.height * self.width, self.dim)
        return self.pos_embed[0, self.num_prefix :]

    def buckets_of(self, indices: Int[Tensor, "*b k"]) -> Int[Tensor, "*b prefix+k prefix+k"] | None:
        """Return the buckets of the class token and the given patches, or None without contextual encoding."""
        return None if self.buckets is None else buckets_behind(self.num_prefix, self.buckets, indices)

    def embed(
        self, patches: Float[Tensor, "b k values"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Embed patches, and replace masked ones by the mask token; see `forward`."""
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
        """Encode patches without the final norm; for the arguments see `forward`."""
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
                x = x.roll(-asking, dims=1)  # queries must come last
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
        """Encode patches, and return the class token (if there is one) and the patch tokens in the given order.

        Args:
            patches: in the layout of `mimkit.tokens.patchify`; with a mask, either all patches or the visible ones in
                ascending order.
            positions: an embedding per patch, usually `vit.positions[indices]`; None: no positions are added.
            noise: uniform in [0, 1), for drop path; None: nothing is dropped.
            mask: `True` = the mask token replaces the patch and keeps its position.
            num_outputs: return only the class token and the first `num_outputs` patches. In the last block only these
                are queries; all tokens are keys and values.
            buckets: relative position buckets for the contextual encoding, class token first:
                `mimkit.relative.relative_buckets` for a window, or `vit.buckets_of(indices)` for a subset of patches.
                None: those of all patches in raster order.

        Raises:
            ValueError: if the relative position encoding requires all patches, and some are missing.
        """
        return self.norm(self.unnormalized(patches, positions, noise, mask, num_outputs, buckets))
