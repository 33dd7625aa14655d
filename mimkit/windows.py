"""Windows: small rectangles of the grid as indices of patches (LoMaR). The anchor of a window is its top left patch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def random_anchors(
    noise: Float[Tensor, "*batch w 2"], *, height: int, width: int, window_height: int, window_width: int
) -> Int[Tensor, "*batch w 2"]:
    """Place windows uniformly at random in the grid, independently of each other.

    Args:
        noise: uniform in [0, 1); row and column of each window, every place equally likely. NaN counts as 0, and other
            values as the nearest one, so every window lies in the grid.
        height: rows of the grid, in patches.
        width: columns of the grid, in patches.
        window_height: rows of a window, in patches, 1 to `height`.
        window_width: columns of a window, in patches, 1 to `width`.

    Returns:
        row and column of the top left patch of each window.

    Raises:
        ValueError: if a number is not an integer, a window does not fit into the grid, or `noise` does not end in 2.

    Example:
        >>> random_anchors(torch.tensor([[0.9, 0.0]]), height=4, width=4, window_height=2, window_width=2)
        tensor([[2, 0]])
    """
    _check_integers(height=height, width=width, window_height=window_height, window_width=window_width)
    if noise.shape[-1:] != (2,):
        raise ValueError(
            f"noise of shape {tuple(noise.shape)} does not end in 2: a value for the row and one for the column"
        )
    if not (1 <= window_height <= height and 1 <= window_width <= width):
        raise ValueError(f"a window of {window_height} × {window_width} does not fit into a grid of {height} × {width}")
    row, column = noise.float().nan_to_num(0.0).clamp(0, 1).unbind(dim=-1)
    lowest, rightmost = height - window_height, width - window_width
    row, column = (row * (lowest + 1)).long(), (column * (rightmost + 1)).long()
    return torch.stack([row.clamp(max=lowest), column.clamp(max=rightmost)], dim=-1)


def distinct_anchors(
    row_noise: Float[Tensor, "*batch rows"], column_noise: Float[Tensor, "*batch columns"], *, num_windows: int
) -> Int[Tensor, "*batch {num_windows} 2"]:
    """Place windows in the grid so that no two in a row of the batch share their first row or their first column.

    Each window on its own is placed uniformly at random; windows may still overlap.

    Args:
        row_noise: uniform in [0, 1), one value per possible first row: `height` − `window_height` + 1 values. The
            windows use the rows with the smallest noise, in ascending order of the noise. NaN counts as 0.
        column_noise: the same for the columns.
        num_windows: 0 to the smaller number of possible rows and columns.

    Returns:
        row and column of the top left patch of each window.

    Raises:
        ValueError: if `num_windows` is not an integer, there are more windows than possible rows or columns (the
            published code then returns fewer windows), the leading axes differ, or the noise is 0-d.

    Example:
        >>> distinct_anchors(torch.tensor([0.9, 0.1, 0.5]), torch.tensor([0.2, 0.3]), num_windows=2)
        tensor([[1, 0],
                [2, 1]])

    Source: LoMaR, arXiv 2206.00790 (published code).
    """
    _check_integers(num_windows=num_windows)
    if not (row_noise.ndim and column_noise.ndim):
        raise ValueError("row_noise or column_noise is 0-d and does not hold one value per row or column")
    rows, columns = row_noise.shape[-1], column_noise.shape[-1]
    if row_noise.shape[:-1] != column_noise.shape[:-1]:
        raise ValueError(
            f"row_noise {tuple(row_noise.shape)} and column_noise {tuple(column_noise.shape)} differ in leading axes"
        )
    if not 0 <= num_windows <= min(rows, columns):
        raise ValueError(
            f"num_windows={num_windows} in {rows} × {columns} places is not between 0 and {min(rows, columns)}"
        )
    noises = row_noise.nan_to_num(0.0), column_noise.nan_to_num(0.0)
    orders = [noise.argsort(dim=-1, stable=True)[..., :num_windows] for noise in noises]
    return torch.stack(orders, dim=-1)


def window_patches(
    anchors: Int[Tensor, "*batch 2"], *, width: int, window_height: int, window_width: int
) -> Int[Tensor, "*batch {window_height}*{window_width}"]:
    """Return the indices of the patches of each window within the grid, in raster order.

    Read the patches from images with `mimkit.tokens.take_patches`.

    Args:
        anchors: row and column of the top left patch of each window.
        width: columns of the grid, in patches (the number of rows does not matter).
        window_height: rows of a window, in patches.
        window_width: columns of a window, in patches, 1 to `width`.

    Returns:
        ascending, in 0…`height` · `width` − 1.

    Raises:
        ValueError: if a number is not an integer, a window is wider than the grid or empty, or `anchors` does not end
            in 2.

    Example:
        >>> window_patches(torch.tensor([1, 2]), width=5, window_height=2, window_width=3)
        tensor([ 7,  8,  9, 12, 13, 14])

    Source: LoMaR, arXiv 2206.00790.
    """
    _check_integers(width=width, window_height=window_height, window_width=window_width)
    if anchors.shape[-1:] != (2,):
        raise ValueError(f"anchors of shape {tuple(anchors.shape)} do not end in 2: a row and a column")
    if window_height < 1 or not 1 <= window_width <= width:
        raise ValueError(f"a window of {window_height} × {window_width} does not fit into a grid of width {width}")
    rows = anchors[..., :1] + torch.arange(window_height, device=anchors.device)
    columns = anchors[..., 1:] + torch.arange(window_width, device=anchors.device)
    return (rows.unsqueeze(-1) * width + columns.unsqueeze(-2)).flatten(-2)


def _check_integers(**numbers: int) -> None:
    for name, number in numbers.items():
        # A symbolic integer of a compiler has an index, too; so has a tensor, but reading it would synchronize
        if isinstance(number, (bool, Tensor)) or not hasattr(number, "__index__"):
            raise ValueError(f"{name}={number!r} is not an integer")
