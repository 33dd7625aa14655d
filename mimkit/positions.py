"""Position tables: one row per patch in raster order, no row for a class token."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

# einops looks up its backend once; done here, it is no reason to compile a caller's graph a second time
rearrange(torch.empty(0), "n -> n")


def sincos(
    *, height: int, width: int, dim: int, device: torch.device | str | None = None
) -> Float[Tensor, "{height}*{width} {dim}"]:
    """Make the 2-D sine-cosine table of MAE: the first half of the features tells the column, the second the row.

    Each half is [sin(t·ω₀) …, cos(t·ω₀) …] with ωₖ = 10000^(−k / (dim / 4)), computed in float64.

    Args:
        height: rows of the grid, in patches.
        width: columns of the grid, in patches.
        dim: number of features, a multiple of 4.

    Raises:
        ValueError: if `dim` is not a positive multiple of 4, or a side is negative.

    Example:
        >>> sincos(height=1, width=2, dim=4)
        tensor([[0.0000, 1.0000, 0.0000, 1.0000],
                [0.8415, 0.5403, 0.0000, 1.0000]])

    Source: MAE, arXiv 2111.06377, appendix A.1. The names in the published code suggest that the row comes first;
    its numbers, and these, have the column first.
    """
    if dim < 4 or dim % 4:
        raise ValueError(f"dim={dim} is not a positive multiple of 4: sine and cosine, of row and column")
    _check_grid(height, width)
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4))

    def wave(length: int) -> Tensor:
        angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    columns = wave(width).expand(height, width, dim // 2)
    rows = wave(height)[:, None].expand(height, width, dim // 2)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()


def sinusoid(
    *, height: int, width: int, dim: int, device: torch.device | str | None = None
) -> Float[Tensor, "{height}*{width} {dim}"]:
    """Make the 1-D sinusoid table over the raster index, sine and cosine interleaved, computed in float64.

    Feature 2i is sin(n / 10000^(2i / dim)) and feature 2i + 1 the cosine of the same angle, for patch n.

    Args:
        height: rows of the grid, in patches (only `height * width` matters: the table knows nothing of rows).
        width: columns of the grid, in patches.
        dim: number of features, even.

    Raises:
        ValueError: if `dim` is odd or not positive, or a side is negative.

    Example:
        >>> sinusoid(height=1, width=2, dim=2)
        tensor([[0.0000, 1.0000],
                [0.8415, 0.5403]])

    Source: Beyond Masking, arXiv 2203.14313 (published code); Attention Is All You Need, arXiv 1706.03762.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim={dim} is not a positive even number: sine and cosine of each angle")
    _check_grid(height, width)
    omega = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angles = torch.arange(height * width, dtype=torch.float64, device=device)[:, None] * omega
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


def resize_table(
    table: Float[Tensor, "*batch n d"], *, height: int, width: int, new_height: int, new_width: int
) -> Float[Tensor, "*batch {new_height}*{new_width} d"]:
    """Resample a position table for another grid, bicubic per feature (A = −0.75, corners not aligned, no antialias).

    Keep the row of a class token aside: only rows of patches can be resampled.

    Args:
        table: one row per patch of the old grid.
        height: rows of the old grid, in patches.
        width: columns of the old grid, in patches.
        new_height: rows of the new grid.
        new_width: columns of the new grid.

    Raises:
        ValueError: if the table has not `height` · `width` rows, or a side is not positive.

    Example:
        >>> resize_table(torch.ones(4, 8), height=2, width=2, new_height=1, new_width=3).shape
        torch.Size([3, 8])

    Source: MAE, arXiv 2111.06377 (published code).
    """
    if table.shape[-2] != height * width:
        raise ValueError(f"a table of {table.shape[-2]} rows is not one of a grid of {height} × {width}")
    if min(height, width, new_height, new_width) < 1:
        raise ValueError(f"a table cannot be resized from {height} × {width} to {new_height} × {new_width}")
    if (height, width) == (new_height, new_width):
        return table.clone()
    grid = rearrange(table, "... (h w) d -> ... d h w", h=height, w=width)
    flat = grid.reshape(math.prod(table.shape[:-2]), table.shape[-1], height, width)
    resized = F.interpolate(flat.float(), (new_height, new_width), mode="bicubic", align_corners=False)
    resized = resized.to(table.dtype).reshape(*grid.shape[:-2], new_height, new_width)
    return rearrange(resized, "... d h w -> ... (h w) d")


def drop_positions(
    positions: Float[Tensor, "*batch k d"],
    dropped: Bool[Tensor, "*batch k"],
    replacement: Float[Tensor, "*batch k d"],
) -> Float[Tensor, "*batch k d"]:
    """Replace the positions of some tokens, so that the network has to find out where these belong.

    Args:
        positions: one per token.
        dropped: `True` = the token loses its position; `mimkit.masking.random_tokens` draws a fixed count of them.
        replacement: what stands there instead: one learned vector, `token.expand_as(positions)`, as in DropPos; zeros;
            or positions that are wrong, `permute_positions(positions, dropped, noise)`.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> positions, token = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([9.0])
        >>> drop_positions(positions, torch.tensor([True, False, True]), token.expand_as(positions)).flatten()
        tensor([9., 2., 9.])

    Source: DropPos, arXiv 2309.03576, section 3.
    """
    _check_dropped(positions, dropped)
    if positions.shape != replacement.shape:
        raise ValueError(f"positions {tuple(positions.shape)} and replacement {tuple(replacement.shape)} differ")
    return torch.where(dropped.unsqueeze(-1), replacement, positions)


def permute_positions(
    positions: Float[Tensor, "*batch k d"], dropped: Bool[Tensor, "*batch k"], noise: Float[Tensor, "*batch k"]
) -> Float[Tensor, "*batch k d"]:
    """Let the dropped tokens of each row exchange their positions, every permutation equally likely.

    Args:
        positions: one per token.
        dropped: `True` = the token gets the position of another dropped token (or, by chance, its own).
        noise: uniform in [0, 1); the published code draws one permutation for the whole batch, which is the same
            noise in each row.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> positions, dropped = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([True, False, True])
        >>> permute_positions(positions, dropped, torch.tensor([0.9, 0.5, 0.1])).flatten()
        tensor([3., 2., 1.])

    Source: DropPos, arXiv 2309.03576 (an ablation of the published code).
    """
    _check_dropped(positions, dropped)
    if dropped.shape != noise.shape:
        raise ValueError(f"dropped {tuple(dropped.shape)} and noise {tuple(noise.shape)} differ in shape")
    places = (~dropped).int().argsort(dim=-1, stable=True)  # the dropped ones first, then the others
    # likewise, the dropped ones shuffled; not 1, to which noise may be rounded in bfloat16
    sources = torch.where(dropped, noise, torch.inf).argsort(dim=-1, stable=True)
    source = torch.zeros_like(places).scatter(-1, places, sources)
    return positions.gather(-2, source.unsqueeze(-1).expand(positions.shape))


def shuffle(noise: Float[Tensor, "*batch k"]) -> tuple[Int[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """Give a random order of the tokens of each row, and the way back.

    Attention does not care for the order of its tokens, but what comes to lean on it (a causal mask, a convolution)
    would read a dropped position off the raster order.

    Args:
        noise: uniform in [0, 1); every order is equally likely.

    Returns:
        order, back: with `mimkit.tokens`, `take(take(tokens, order), back)` are the tokens again.

    Raises:
        ValueError: if `noise` has no axis.

    Example:
        >>> shuffle(torch.tensor([0.9, 0.1, 0.5]))
        (tensor([1, 2, 0]), tensor([2, 0, 1]))

    Source: DropPos, arXiv 2309.03576 (an option of the published code).
    """
    if not noise.ndim:
        raise ValueError("noise has no axis of tokens to shuffle")
    order = noise.argsort(dim=-1, stable=True)
    places = torch.arange(noise.shape[-1], device=noise.device).expand_as(order)
    return order, torch.zeros_like(order).scatter(-1, order, places)


def smoothed_targets(
    sigma: Float[Tensor, "*batch"], *, height: int, width: int
) -> Float[Tensor, "*batch {height}*{width} {height}*{width}"]:
    """Spread each position of the grid over its neighbors: row i is the target of a patch that belongs at i.

    `exp(−distance² / sigma²)`, the squared Euclidean distance in patches and no factor 2, divided by the sum of its
    row: a distribution. The published code divides by the sum of the column instead: that is the transpose, `.mT`.

    Args:
        sigma: width in patches, a 0-d tensor as a rule, so that a schedule needs no new graph. 0 is the identity.
        height: rows of the grid, in patches.
        width: columns of the grid, in patches.

    Returns:
        float32. Take rows by index: `smoothed_targets(…)[visible]`.

    Raises:
        ValueError: if a side is negative.

    Example:
        >>> smoothed_targets(torch.tensor(1.0), height=1, width=2)
        tensor([[0.7311, 0.2689],
                [0.2689, 0.7311]])

    Source: DropPos, arXiv 2309.03576, section 3. Its published code builds the targets of 224 pixels and patches of
    16 for a grid of 16 × 16 instead of 14 × 14.
    """
    _check_grid(height, width)
    variance = sigma.float().square()[..., None, None]

    def gaussian(length: int) -> Tensor:
        places = torch.arange(length, dtype=torch.float32, device=sigma.device)
        squared = (places[:, None] - places).square()
        weights = torch.where(squared == 0, 1.0, (-squared / variance).exp())  # 0 / 0 would be no number
        return weights / weights.sum(dim=-1, keepdim=True)

    rows, columns = gaussian(height)[..., :, None, :, None], gaussian(width)[..., None, :, None, :]
    return (rows * columns).flatten(-2).flatten(-3, -2)


def attentive_weights(
    tokens: Float[Tensor, "*batch n d"], guide: Float[Tensor, "*batch d"], *, temperature: float
) -> Float[Tensor, "*batch n"]:
    """Weigh tokens by how much they resemble a guide: the softmax of their cosines over the temperature.

    Args:
        tokens: features of the patches that share the weight; only the visible ones, or all.
        guide: feature of the class token.
        temperature: above 0; infinite for equal weights. DropPos takes 0.1.

    Returns:
        float32, each row sums to one.

    Raises:
        ValueError: if the temperature is not above 0, or the shapes do not fit.

    Example:
        >>> attentive_weights(torch.eye(2), torch.tensor([1.0, 0.0]), temperature=1.0)
        tensor([0.7311, 0.2689])

    Source: DropPos, arXiv 2309.03576, section 3 (attentive reconstruction).
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not above 0")
    if (*tokens.shape[:-2], tokens.shape[-1]) != guide.shape:
        raise ValueError(f"tokens {tuple(tokens.shape)} and guide {tuple(guide.shape)} do not fit")
    a, b = (F.normalize(x.float(), dim=-1, eps=1e-8) for x in (tokens, guide.unsqueeze(-2)))
    return ((a * b).sum(dim=-1) / temperature).softmax(dim=-1)


def _check_dropped(positions: Tensor, dropped: Tensor) -> None:
    if positions.shape[:-1] != dropped.shape:
        raise ValueError(f"positions {tuple(positions.shape)} and dropped {tuple(dropped.shape)} do not fit")


def _check_grid(height: int, width: int) -> None:
    if height < 0 or width < 0:
        raise ValueError(f"a grid of {height} × {width} patches does not exist")
