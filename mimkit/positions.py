"""Position tables: one row per patch in raster order, no row for a class token."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
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
    flat = grid.reshape(table.shape[:-2].numel(), table.shape[-1], height, width)
    resized = F.interpolate(flat.float(), (new_height, new_width), mode="bicubic", align_corners=False)
    resized = resized.to(table.dtype).reshape(*grid.shape[:-2], new_height, new_width)
    return rearrange(resized, "... d h w -> ... (h w) d")


def _check_grid(height: int, width: int) -> None:
    if height < 0 or width < 0:
        raise ValueError(f"a grid of {height} × {width} patches does not exist")
