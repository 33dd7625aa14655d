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
