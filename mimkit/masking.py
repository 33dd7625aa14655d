"""Mask samplers: a mask holds a boolean per token in raster order, `True` = masked, with a fixed count per row."""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def random_tokens(noise: Float[Tensor, "*batch n"], *, num_masked: int) -> Bool[Tensor, "*batch n"]:
    """Mask `num_masked` tokens of each row, every subset equally likely.

    Args:
        noise: uniform in [0, 1); the tokens with the largest noise are masked. Ties are broken by position, so the
            count is always exact. NaN counts as 0.
        num_masked: number of masked tokens per row, 0 to n. MAE uses `n - int(n * (1 - ratio))`.

    Returns:
        `True` = masked.

    Raises:
        ValueError: if `num_masked` is not an integer from 0 to n, or `noise` is 0-d.

    Example:
        >>> random_tokens(torch.tensor([0.9, 0.1, 0.5, 0.7]), num_masked=2)
        tensor([ True, False, False,  True])

    Source: MAE, arXiv 2111.06377, section 3.
    """
    _check_integers(num_masked=num_masked)
    n = _tokens_of(noise)
    if not 0 <= num_masked <= n:
        raise ValueError(f"num_masked={num_masked} of {n} tokens cannot be masked")
    return _rank(noise) >= n - num_masked


def random_cells(
    noise: Float[Tensor, "*batch cells"],
    *,
    height: int,
    width: int,
    cell_height: int,
    cell_width: int,
    num_masked: int,
) -> Bool[Tensor, "*batch {height}*{width}"]:
    """Mask whole rectangular cells of the grid, every subset of the given size equally likely.

    Large cells make it harder to predict a masked patch from adjacent pixels. With cells of 1 × 1 the mask is that of
    `random_tokens`.

    Args:
        noise: uniform in [0, 1), one value per cell in raster order; the cells with the largest noise are masked.
            NaN counts as 0; the count is always exact.
        height: rows of the grid, in patches, a multiple of `cell_height`.
        width: columns of the grid, in patches, a multiple of `cell_width`.
        cell_height: rows of a cell, in patches.
        cell_width: columns of a cell, in patches.
        num_masked: number of masked tokens per row, a multiple of the area of a cell. SimMIM masks
            `ceil(cells * ratio)` cells.

    Returns:
        `True` = masked.

    Raises:
        ValueError: if a number is not an integer, the cells do not tile the grid, `noise` does not have one value per
            cell, or `num_masked` is outside 0…`height` · `width` or not a multiple of the area of a cell.

    Example:
        >>> random_cells(torch.tensor([0.1, 0.9]), height=1, width=4, cell_height=1, cell_width=2, num_masked=2)
        tensor([False, False,  True,  True])

    Source: SimMIM, arXiv 2111.09886, section 3.2.
    """
    _check_integers(height=height, width=width, cell_height=cell_height, cell_width=cell_width, num_masked=num_masked)
    if min(cell_height, cell_width) < 1 or min(height, width) < 0 or height % cell_height or width % cell_width:
        raise ValueError(f"a grid of {height} × {width} is not made of cells of {cell_height} × {cell_width}")
    rows, columns, area = height // cell_height, width // cell_width, cell_height * cell_width
    if noise.shape[-1:] != (rows * columns,):
        raise ValueError(
            f"noise of shape {tuple(noise.shape)} does not have one value for each of {rows} × {columns} cells"
        )
    if not 0 <= num_masked <= height * width or num_masked % area:
        raise ValueError(f"num_masked={num_masked} of {height * width} tokens are not whole cells of {area}")
    cells = (_rank(noise) >= rows * columns - num_masked // area).unflatten(-1, (rows, columns))
    return cells.repeat_interleave(cell_height, dim=-2).repeat_interleave(cell_width, dim=-1).flatten(-2)


def all_but_block(
    noise: Float[Tensor, "*batch 2"], *, height: int, width: int, block_height: int, block_width: int
) -> Bool[Tensor, "*batch {height}*{width}"]:
    """Mask all tokens except one rectangular block at a random place of the grid.

    An ablation of Beyond Masking: one contiguous block of 7 × 7 out of 14 × 14 patches stays visible instead of a
    random quarter of the patches (82.3 % instead of 82.9 % on ImageNet after fine-tuning ViT-B).

    Args:
        noise: uniform in [0, 1); row and column of the block, every place equally likely. NaN counts as 0, and other
            values as the nearest one, so the count is always exact.
        height: rows of the grid, in patches.
        width: columns of the grid, in patches.
        block_height: rows of the visible block, 0 to `height`.
        block_width: columns of the visible block, 0 to `width`.

    Returns:
        `True` = masked; `height * width - block_height * block_width` per row.

    Raises:
        ValueError: if a number is not an integer, the block does not fit into the grid, or `noise` does not have two
            values per row.

    Example:
        >>> all_but_block(torch.tensor([0.9, 0.0]), height=2, width=2, block_height=1, block_width=1)
        tensor([ True,  True, False,  True])

    Source: Beyond Masking, arXiv 2203.14313, section on masked inputs.
    """
    _check_integers(height=height, width=width, block_height=block_height, block_width=block_width)
    if noise.shape[-1:] != (2,):
        raise ValueError(
            f"noise of shape {tuple(noise.shape)} does not end in 2: a value for the row and one for the column"
        )
    if not (0 <= block_height <= height and 0 <= block_width <= width):
        raise ValueError(f"a block of {block_height} × {block_width} does not fit into a grid of {height} × {width}")
    rows = _inside(noise[..., 0], block_height, height)
    columns = _inside(noise[..., 1], block_width, width)
    return ~(rows.unsqueeze(-1) & columns.unsqueeze(-2)).flatten(-2)


def easy_to_hard(
    difficulty: Float[Tensor, "*batch n"],
    noise: Float[Tensor, "*batch n"],
    *,
    num_masked: int,
    num_hard: int | Int[Tensor, ""],
) -> Bool[Tensor, "*batch n"]:
    """Mask the `num_hard` most difficult tokens of each row, and random others up to a total of `num_masked`.

    To go from easy to hard, increase `num_hard` during training. With 0 the mask is that of `random_tokens`; with
    `num_masked` only the most difficult tokens are masked; with `-difficulty` the easiest ones are chosen instead.

    Args:
        difficulty: larger is harder, for example a predicted loss per token. Only the order matters; of equal values
            the last one in the row counts as the hardest. NaN counts as 0.
        noise: uniform in [0, 1); of the tokens not chosen by difficulty, those with the largest noise are masked.
            NaN counts as 0; both counts are always exact.
        num_masked: number of masked tokens per row, 0 to n.
        num_hard: number of tokens chosen by difficulty, 0 to `num_masked`. A 0-d tensor can follow a schedule without
            recompilation; its value is not checked, and one out of range acts like the nearest bound.

    Returns:
        `True` = masked.

    Raises:
        ValueError: if `num_masked` is not an integer from 0 to n, `num_hard` not one from 0 to `num_masked`, or the
            shapes differ or are those of a single token.

    Example:
        >>> difficulty, noise = torch.tensor([0.1, 0.9, 0.2, 0.3]), torch.tensor([0.8, 0.0, 0.5, 0.6])
        >>> easy_to_hard(difficulty, noise, num_masked=2, num_hard=1)
        tensor([ True,  True, False, False])

    Source: HPM, arXiv 2304.05919, algorithm S1 as intended: the printed version masks nothing.
    """
    _check_integers(num_masked=num_masked)
    n = _tokens_of(noise)
    if difficulty.shape != noise.shape:
        raise ValueError(f"difficulty {tuple(difficulty.shape)} and noise {tuple(noise.shape)} differ in shape")
    if not 0 <= num_masked <= n:
        raise ValueError(f"num_masked={num_masked} of {n} tokens cannot be masked")
    if isinstance(num_hard, Tensor):
        if num_hard.ndim or num_hard.is_floating_point() or num_hard.dtype == torch.bool:
            raise ValueError(f"num_hard, {num_hard.dtype} of shape {tuple(num_hard.shape)}, is not a single integer")
    else:
        _check_integers(num_hard=num_hard)
        if not 0 <= num_hard <= num_masked:
            raise ValueError(f"num_hard={num_hard} is not between 0 and num_masked={num_masked}")
    harder = n - 1 - _rank(difficulty)  # number of harder tokens: 0 for the hardest
    forced = (harder < num_hard) & (harder < num_masked)
    noise = noise.nan_to_num(0.0)  # makes infinity finite, too
    return _rank(torch.where(forced, torch.inf, noise)) >= n - num_masked  # inf: noise may round to 1 in bfloat16


def disjoint_views(
    noise: Float[Tensor, "*batch n"], *, num_visible: int
) -> tuple[Bool[Tensor, "*batch n"], Bool[Tensor, "*batch n"]]:
    """Mask two views of an image so that no token is visible in both.

    The first mask is that of `random_tokens`. If fewer than `num_visible` tokens are left for the second view, all of
    them are visible in it.

    Args:
        noise: uniform in [0, 1), shared by both views: the tokens with the smallest noise are visible in the first
            view, the next ones in the second. NaN counts as 0; the counts are always exact.
        num_visible: number of visible tokens per row of the first view, 0 to n.

    Returns:
        first, second: `True` = masked. The first masks `n - num_visible` tokens of each row, the second
        `n - min(num_visible, n - num_visible)`.

    Raises:
        ValueError: if `num_visible` is not an integer from 0 to n, or `noise` is 0-d.

    Example:
        >>> disjoint_views(torch.tensor([0.9, 0.1, 0.5, 0.7]), num_visible=1)
        (tensor([ True, False,  True,  True]), tensor([ True,  True, False,  True]))

    Source: LUT, ECCV 2024 (published code).
    """
    _check_integers(num_visible=num_visible)
    n = _tokens_of(noise)
    if not 0 <= num_visible <= n:
        raise ValueError(f"num_visible={num_visible} of {n} tokens cannot be visible")
    rank = _rank(noise)
    return rank >= num_visible, (rank < num_visible) | (rank >= 2 * num_visible)


def _rank(values: Shaped[Tensor, "*batch n"]) -> Int[Tensor, "*batch n"]:
    """Return the rank of each value within its row; ties keep their order, and NaN, which no order has, counts as 0."""
    order = values.nan_to_num(0.0, torch.inf, -torch.inf).argsort(dim=-1, stable=True)
    places = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, places)


def _inside(noise: Float[Tensor, "*batch"], length: int, size: int) -> Bool[Tensor, "*batch {size}"]:
    """Return which of `size` places lie in an interval of `length` at a random offset."""
    choices = size - length + 1
    chance = noise.float().nan_to_num(0.0).clamp(0, 1)
    first = (chance * choices).long().clamp(max=choices - 1).unsqueeze(-1)
    places = torch.arange(size, device=noise.device)
    return (places >= first) & (places < first + length)


def _tokens_of(noise: Tensor) -> int:
    if not noise.ndim:
        raise ValueError("noise is 0-d and does not hold one value per token")
    return noise.shape[-1]


def _check_integers(**numbers: int) -> None:
    for name, number in numbers.items():
        # A symbolic integer of a compiler has an index, too; so has a tensor, but reading it would synchronize
        if isinstance(number, (bool, Tensor)) or not hasattr(number, "__index__"):
            raise ValueError(f"{name}={number!r} is not an integer")
