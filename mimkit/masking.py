"""Mask samplers. A mask is a boolean per token in raster order, `True` = masked, with a fixed count per row."""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def random_tokens(noise: Float[Tensor, "*batch n"], *, num_masked: int) -> Bool[Tensor, "*batch n"]:
    """Mask `num_masked` tokens of each row, every subset equally likely.

    Args:
        noise: uniform in [0, 1); the tokens with the largest noise are masked. Equal values count from the left,
            so that no row ever has another count.
        num_masked: count of masked tokens per row, 0 to n. MAE takes `n - int(n * (1 - ratio))`.

    Returns:
        `True` = masked.

    Raises:
        ValueError: if `num_masked` is outside 0…n.

    Example:
        >>> random_tokens(torch.tensor([0.9, 0.1, 0.5, 0.7]), num_masked=2)
        tensor([ True, False, False,  True])

    Source: MAE, arXiv 2111.06377, section 3.
    """
    n = noise.shape[-1]
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
    """Mask rectangular cells of the grid, each whole or not at all, every subset of the size equally likely.

    Large cells leave less to be guessed from the pixels next door. With cells of 1 × 1 it is `random_tokens`.

    Args:
        noise: uniform in [0, 1), one value per cell in raster order; the cells with the largest noise are masked.
        height: rows of the grid, in patches, a multiple of `cell_height`.
        width: columns of the grid, in patches, a multiple of `cell_width`.
        cell_height: rows of a cell, in patches.
        cell_width: columns of a cell, in patches.
        num_masked: count of masked tokens per row, those of whole cells. SimMIM takes `ceil(cells * ratio)` cells.

    Returns:
        `True` = masked.

    Raises:
        ValueError: if the cells do not fill the grid, `noise` has not one value per cell, or `num_masked` tokens are
            not those of whole cells of the grid.

    Example:
        >>> random_cells(torch.tensor([0.1, 0.9]), height=1, width=4, cell_height=1, cell_width=2, num_masked=2)
        tensor([False, False,  True,  True])

    Source: SimMIM, arXiv 2111.09886, section 3.2.
    """
    if min(cell_height, cell_width) < 1 or min(height, width) < 0 or height % cell_height or width % cell_width:
        raise ValueError(f"a grid of {height} × {width} is not made of cells of {cell_height} × {cell_width}")
    rows, columns, area = height // cell_height, width // cell_width, cell_height * cell_width
    if noise.shape[-1] != rows * columns:
        raise ValueError(f"noise of shape {tuple(noise.shape)} has not one value for each of {rows} × {columns} cells")
    if not 0 <= num_masked <= height * width or num_masked % area:
        raise ValueError(f"num_masked={num_masked} of {height * width} tokens are not whole cells of {area}")
    cells = (_rank(noise) >= rows * columns - num_masked // area).unflatten(-1, (rows, columns))
    return cells.repeat_interleave(cell_height, dim=-2).repeat_interleave(cell_width, dim=-1).flatten(-2)


def all_but_block(
    noise: Float[Tensor, "*batch 2"], *, height: int, width: int, block_height: int, block_width: int
) -> Bool[Tensor, "*batch {height}*{width}"]:
    """Mask all tokens but one rectangular block at a random place of the grid.

    The ablation of Beyond Masking that leaves one contiguous block visible: 7 × 7 of 14 × 14 instead of a random
    quarter of the patches (82.3 against 82.9 %).

    Args:
        noise: uniform in [0, 1); row and column of the block, every place equally likely.
        height: rows of the grid, in patches.
        width: columns of the grid, in patches.
        block_height: rows of the visible block, 0 to `height`.
        block_width: columns of the visible block, 0 to `width`.

    Returns:
        `True` = masked; `height * width - block_height * block_width` per row.

    Raises:
        ValueError: if the block does not fit into the grid, or `noise` has not two values per row.

    Example:
        >>> all_but_block(torch.tensor([0.9, 0.0]), height=2, width=2, block_height=1, block_width=1)
        tensor([ True,  True, False,  True])

    Source: Beyond Masking, arXiv 2203.14313, section on masked inputs.
    """
    if noise.shape[-1] != 2:
        raise ValueError(
            f"noise of shape {tuple(noise.shape)} does not end in 2: one value for the row, one for the column"
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
    """Mask the `num_hard` most difficult tokens of each row, and of the others as many at random as are missing.

    Easy to hard is a `num_hard` that grows over the training. 0 is `random_tokens`; `num_masked` masks the hardest
    only; `-difficulty` masks the easiest.

    Args:
        difficulty: the larger the harder; a loss that is predicted for each token, say. Only the order matters. Of
            equal ones the right one counts as harder.
        noise: uniform in [0, 1); of the tokens that are not forced those with the largest noise are masked.
        num_masked: count of masked tokens per row, 0 to n.
        num_hard: how many of them are the hardest, 0 to `num_masked`. A 0-d tensor follows a schedule without a new
            graph; its value is not looked at, and one outside of the range acts like its nearest end.

    Returns:
        `True` = masked.

    Raises:
        ValueError: if `num_masked` is outside 0…n, `num_hard` outside 0…`num_masked`, or the shapes differ.

    Example:
        >>> difficulty, noise = torch.tensor([0.1, 0.9, 0.2, 0.3]), torch.tensor([0.8, 0.0, 0.5, 0.6])
        >>> easy_to_hard(difficulty, noise, num_masked=2, num_hard=1)
        tensor([ True,  True, False, False])

    Source: HPM, arXiv 2304.05919, algorithm S1; as printed it masks nothing, this is what it means.
    """
    n = noise.shape[-1]
    if difficulty.shape != noise.shape:
        raise ValueError(f"difficulty {tuple(difficulty.shape)} and noise {tuple(noise.shape)} differ in shape")
    if not 0 <= num_masked <= n:
        raise ValueError(f"num_masked={num_masked} of {n} tokens cannot be masked")
    if isinstance(num_hard, int) and not 0 <= num_hard <= num_masked:
        raise ValueError(f"num_hard={num_hard} of num_masked={num_masked} tokens cannot be the hardest ones")
    harder = n - 1 - _rank(difficulty)  # how many are harder: 0 for the hardest
    forced = (harder < num_hard) & (harder < num_masked)
    return _rank(torch.where(forced, torch.inf, noise)) >= n - num_masked  # in bfloat16 noise may be rounded to 1


def disjoint_views(
    noise: Float[Tensor, "*batch n"], *, num_visible: int
) -> tuple[Bool[Tensor, "*batch n"], Bool[Tensor, "*batch n"]]:
    """Mask two views of one image so that no token is visible in both.

    The first is `random_tokens`; where tokens run out, the second keeps those that are left.

    Args:
        noise: uniform in [0, 1), one for both views; the first keeps the tokens with the smallest noise, the second
            those that come next.
        num_visible: count of visible tokens per row of the first view, 0 to n.

    Returns:
        first, second: `True` = masked. The first masks `n - num_visible` of each row, the second
        `n - min(num_visible, n - num_visible)`.

    Raises:
        ValueError: if `num_visible` is outside 0…n.

    Example:
        >>> disjoint_views(torch.tensor([0.9, 0.1, 0.5, 0.7]), num_visible=1)
        (tensor([ True, False,  True,  True]), tensor([ True,  True, False,  True]))

    Source: LUT, ECCV 2024 (published code).
    """
    n = noise.shape[-1]
    if not 0 <= num_visible <= n:
        raise ValueError(f"num_visible={num_visible} of {n} tokens cannot be visible")
    rank = _rank(noise)
    return rank >= num_visible, (rank < num_visible) | (rank >= 2 * num_visible)


def _rank(values: Shaped[Tensor, "*batch n"]) -> Int[Tensor, "*batch n"]:
    """Place of each value in its sorted row; equal values in the order they stand in."""
    order = values.argsort(dim=-1, stable=True)
    places = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, places)


def _inside(noise: Float[Tensor, "*batch"], length: int, size: int) -> Bool[Tensor, "*batch {size}"]:
    """Which of `size` places lie in an interval of `length` at a random offset."""
    choices = size - length + 1
    first = (noise.float() * choices).long().clamp(max=choices - 1).unsqueeze(-1)
    places = torch.arange(size, device=noise.device)
    return (places >= first) & (places < first + length)
