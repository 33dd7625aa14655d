"""Position embeddings: tables with one row per patch in raster order, none for a class token; dropped positions."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

# einops looks up its backend at the first call; without this one, a caller's graph would compile twice
rearrange(torch.empty(0), "n -> n")


def sincos(
    *, height: int, width: int, dim: int, device: torch.device | str | None = None
) -> Float[Tensor, "{height}*{width} {dim}"]:
    """Return the 2-D sine-cosine table of MAE: the first half of the features encodes the column, the second the row.

    Each half is [sin(t·ω₀) …, cos(t·ω₀) …] with ωₖ = 10000^(−k / (dim / 4)), computed in float64.

    Args:
        height: rows of the grid, in patches.
        width: columns of the grid, in patches.
        dim: number of features, a multiple of 4.

    Raises:
        ValueError: if a number is not an integer, `dim` is not a positive multiple of 4, or a side is negative.

    Example:
        >>> sincos(height=1, width=2, dim=4)
        tensor([[0.0000, 1.0000, 0.0000, 1.0000],
                [0.8415, 0.5403, 0.0000, 1.0000]])

    Source: MAE, arXiv 2111.06377, appendix A.1. The variable names of the published code suggest that the row comes
    first, but in its output, as here, the column does.
    """
    _check_integers(height=height, width=width, dim=dim)
    if dim < 4 or dim % 4:
        raise ValueError(f"dim={dim} is not a positive multiple of 4: it holds sine and cosine of row and column")
    _check_grid(height, width)
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4))

    def _wave(length: int) -> Tensor:
        """Return sine and cosine of the places 0…length − 1 at each frequency."""
        angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    columns = _wave(width).expand(height, width, dim // 2)
    rows = _wave(height)[:, None].expand(height, width, dim // 2)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()


def sinusoid(
    *, height: int, width: int, dim: int, device: torch.device | str | None = None
) -> Float[Tensor, "{height}*{width} {dim}"]:
    """Return the 1-D sinusoidal table over the raster index, sine and cosine interleaved.

    Feature 2i of patch n is sin(n / 10000^(2i / dim)), and feature 2i + 1 the cosine of the same angle, computed in
    float64.

    Args:
        height: rows of the grid, in patches; only `height * width` matters.
        width: columns of the grid, in patches.
        dim: number of features, even.

    Raises:
        ValueError: if a number is not an integer, `dim` is odd or not positive, or a side is negative.

    Example:
        >>> sinusoid(height=1, width=2, dim=2)
        tensor([[0.0000, 1.0000],
                [0.8415, 0.5403]])

    Source: Beyond Masking, arXiv 2203.14313 (published code); Attention Is All You Need, arXiv 1706.03762.
    """
    _check_integers(height=height, width=width, dim=dim)
    if dim < 2 or dim % 2:
        raise ValueError(f"dim={dim} is not a positive even number: it holds sine and cosine of each angle")
    _check_grid(height, width)
    omega = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angles = torch.arange(height * width, dtype=torch.float64, device=device)[:, None] * omega
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


def resize_table(
    table: Float[Tensor, "*batch n d"], *, height: int, width: int, new_height: int, new_width: int
) -> Float[Tensor, "*batch {new_height}*{new_width} d"]:
    """Resample a position table to another grid by bicubic interpolation of each feature.

    The interpolation has A = −0.75, no aligned corners and no antialiasing. Set the row of a class token aside first:
    only rows of patches can be resampled.

    Args:
        table: one row per patch of the old grid.
        height: rows of the old grid, in patches.
        width: columns of the old grid, in patches.
        new_height: rows of the new grid, in patches.
        new_width: columns of the new grid, in patches.

    Raises:
        ValueError: if a side is not an integer or not positive, or the table does not have `height` · `width` rows.

    Example:
        >>> resize_table(torch.ones(4, 8), height=2, width=2, new_height=1, new_width=3).shape
        torch.Size([3, 8])

    Source: MAE, arXiv 2111.06377 (published code).
    """
    _check_integers(height=height, width=width, new_height=new_height, new_width=new_width)
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
    """Replace the positions of the dropped tokens, for a network that learns to predict them.

    Args:
        positions: one per token.
        dropped: `True` = the token loses its position. `mimkit.masking.random_tokens` draws a fixed number of them.
        replacement: what to use instead: a learned vector, `token.expand_as(positions)`, as in DropPos; zeros; or wrong
            positions, `permute_positions(positions, dropped, noise)`.

    Raises:
        ValueError: if the shapes do not match.

    Example:
        >>> positions, token = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([9.0])
        >>> drop_positions(positions, torch.tensor([True, False, True]), token.expand_as(positions)).flatten()
        tensor([9., 2., 9.])

    Source: DropPos, arXiv 2309.03576, section 3.
    """
    _check_dropped(positions, dropped)
    if positions.shape != replacement.shape:
        raise ValueError(
            f"positions {tuple(positions.shape)} and replacement {tuple(replacement.shape)} differ in shape"
        )
    return torch.where(dropped.unsqueeze(-1), replacement, positions)


def permute_positions(
    positions: Float[Tensor, "*batch k d"], dropped: Bool[Tensor, "*batch k"], noise: Float[Tensor, "*batch k"]
) -> Float[Tensor, "*batch k d"]:
    """Permute the positions of the dropped tokens within each row, every permutation equally likely.

    Args:
        positions: one per token.
        dropped: `True` = the token gets the position of another dropped token (or by chance its own).
        noise: uniform in [0, 1). The published code draws one permutation for the whole batch; for this, pass the same
            noise in every row. NaN counts as 0; only dropped tokens ever get another position.

    Raises:
        ValueError: if the shapes do not match.

    Example:
        >>> positions, dropped = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([True, False, True])
        >>> permute_positions(positions, dropped, torch.tensor([0.9, 0.5, 0.1])).flatten()
        tensor([3., 2., 1.])

    Source: DropPos, arXiv 2309.03576 (an ablation of the published code).
    """
    _check_dropped(positions, dropped)
    if dropped.shape != noise.shape:
        raise ValueError(f"dropped {tuple(dropped.shape)} and noise {tuple(noise.shape)} differ in shape")
    places = (~dropped).int().argsort(dim=-1, stable=True)  # dropped tokens first, then the others
    # the same with the dropped tokens shuffled; inf, because noise may round to 1 in bfloat16
    sources = torch.where(dropped, noise.nan_to_num(0.0), torch.inf).argsort(dim=-1, stable=True)
    source = torch.zeros_like(places).scatter(-1, places, sources)
    return positions.gather(-2, source.unsqueeze(-1).expand(positions.shape))


def shuffle(noise: Float[Tensor, "*batch k"]) -> tuple[Int[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """Return a random permutation of the tokens of each row, and its inverse.

    Plain attention is permutation-equivariant. A network that is not (one with a causal mask or convolutions) could
    infer a dropped position from the raster order of the tokens; shuffling prevents this.

    Args:
        noise: uniform in [0, 1); every permutation is equally likely. NaN counts as 0.

    Returns:
        order, back: with `mimkit.tokens.take`, `take(take(tokens, order), back)` equals `tokens`.

    Raises:
        ValueError: if `noise` is 0-d.

    Example:
        >>> shuffle(torch.tensor([0.9, 0.1, 0.5]))
        (tensor([1, 2, 0]), tensor([2, 0, 1]))

    Source: DropPos, arXiv 2309.03576 (an option of the published code).
    """
    if not noise.ndim:
        raise ValueError("noise is 0-d and has no axis to shuffle")
    order = noise.nan_to_num(0.0).argsort(dim=-1, stable=True)
    places = torch.arange(noise.shape[-1], device=noise.device).expand_as(order)
    return order, torch.zeros_like(order).scatter(-1, order, places)


def smoothed_targets(
    sigma: Float[Tensor, "*batch"], *, height: int, width: int
) -> Float[Tensor, "*batch {height}*{width} {height}*{width}"]:
    """Return targets smoothed over neighboring positions: row i is the target of a patch whose position is i.

    The weights are `exp(−distance² / sigma²)`, with the squared Euclidean distance in patches and no factor of 2. Each
    row is divided by its sum and so is a distribution. The published code divides by the sum of the column instead,
    which is the transpose, `.mT`.

    Args:
        sigma: width in patches, usually a 0-d tensor, so that a schedule needs no recompilation. 0 gives the identity.
        height: rows of the grid, in patches.
        width: columns of the grid, in patches.

    Returns:
        float32. Select rows by index: `smoothed_targets(…)[visible]`.

    Raises:
        ValueError: if a side is not an integer, or negative.

    Example:
        >>> smoothed_targets(torch.tensor(1.0), height=1, width=2)
        tensor([[0.7311, 0.2689],
                [0.2689, 0.7311]])

    Source: DropPos, arXiv 2309.03576, section 3. For images of 224 pixels and patches of 16, its published code
    computes the targets for a grid of 16 × 16 instead of 14 × 14.
    """
    _check_integers(height=height, width=width)
    _check_grid(height, width)
    variance = sigma.float().square()[..., None, None]

    def _gaussian(length: int) -> Tensor:
        """Return the normalized weights of all places along one axis, a row per place."""
        places = torch.arange(length, dtype=torch.float32, device=sigma.device)
        squared = (places[:, None] - places).square()
        weights = torch.where(squared == 0, 1.0, (-squared / variance).exp())  # where: 0 / 0 is NaN
        return weights / weights.sum(dim=-1, keepdim=True)

    rows, columns = _gaussian(height)[..., :, None, :, None], _gaussian(width)[..., None, :, None, :]
    return (rows * columns).flatten(-2).flatten(-3, -2)


def attentive_weights(
    tokens: Float[Tensor, "*batch n d"], guide: Float[Tensor, "*batch d"], *, temperature: float
) -> Float[Tensor, "*batch n"]:
    """Weight tokens by the softmax of their cosine similarities to a guide, divided by the temperature.

    Args:
        tokens: features of the patches to weight, of the visible ones or of all.
        guide: features of the class token.
        temperature: above 0; infinity gives equal weights. DropPos uses 0.1.

    Returns:
        float32; each row sums to one.

    Raises:
        ValueError: if the temperature is not above 0, or the shapes do not match.

    Example:
        >>> attentive_weights(torch.eye(2), torch.tensor([1.0, 0.0]), temperature=1.0)
        tensor([0.7311, 0.2689])

    Source: DropPos, arXiv 2309.03576, section 3 (attentive reconstruction).
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not above 0")
    if (*tokens.shape[:-2], tokens.shape[-1]) != guide.shape:
        raise ValueError(f"tokens {tuple(tokens.shape)} and guide {tuple(guide.shape)} do not match")
    a, b = (F.normalize(x.float(), dim=-1, eps=1e-8) for x in (tokens, guide.unsqueeze(-2)))
    return ((a * b).sum(dim=-1) / temperature).softmax(dim=-1)


def _check_dropped(positions: Tensor, dropped: Tensor) -> None:
    if positions.ndim < 2 or positions.shape[:-1] != dropped.shape:
        raise ValueError(f"positions {tuple(positions.shape)} and dropped {tuple(dropped.shape)} do not match")


def _check_grid(height: int, width: int) -> None:
    if height < 0 or width < 0:
        raise ValueError(f"a grid of {height} × {width} patches has a negative side")


def _check_integers(**numbers: int) -> None:
    for name, number in numbers.items():
        # A symbolic integer of a compiler has an index, too; so has a tensor, but reading it would synchronize
        if isinstance(number, (bool, Tensor)) or not hasattr(number, "__index__"):
            raise ValueError(f"{name}={number!r} is not an integer")
