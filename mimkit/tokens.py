"""Tokens: cut images into patches and back, turn masks into indices, gather and scatter by index."""

import torch
from einops import rearrange
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

# einops looks up its backend at the first call; without this one, a caller's graph would compile twice
rearrange(torch.empty(0), "n -> n")


def patchify(images: Shaped[Tensor, "*batch c H W"], *, patch: int) -> Shaped[Tensor, "*batch n {patch}*{patch}*c"]:
    """Cut images into square patches, in raster order.

    The values of a patch are ordered by row, then column, then channel (the channel varies fastest), as in MAE. The
    weight of a convolutional patch embedding has its channels first: rearrange it with `"d c p q -> d (p q c)"` to
    apply it to these patches.

    Args:
        images: any dtype, channels first; H and W in pixels.
        patch: side of a patch in pixels; divides H and W.

    Raises:
        ValueError: if `patch` is not an integer, or a side of the images not a multiple of it.

    Example:
        >>> import torch
        >>> patchify(torch.arange(8).view(1, 2, 4), patch=2)
        tensor([[0, 1, 4, 5],
                [2, 3, 6, 7]])

    Source: MAE, arXiv 2111.06377.
    """
    _check_cut(images, patch)
    return rearrange(images, "... c (h p) (w q) -> ... (h w) (p q c)", p=patch, q=patch)


def unpatchify(
    patches: Shaped[Tensor, "*batch n d"], *, height: int, width: int, patch: int
) -> Shaped[Tensor, "*batch c {height}*{patch} {width}*{patch}"]:
    """Reassemble images from their patches; the inverse of `patchify`.

    Args:
        patches: in raster order, channel fastest; d = patch · patch · c.
        height: rows of the grid, in patches.
        width: columns of the grid, in patches.
        patch: side of a patch in pixels.

    Raises:
        ValueError: if a number is not an integer, n is not `height` · `width`, or d is not a multiple of `patch`
            squared.

    Example:
        >>> import torch
        >>> unpatchify(torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7]]), height=1, width=2, patch=2)
        tensor([[[0, 1, 2, 3],
                 [4, 5, 6, 7]]])

    Source: MAE, arXiv 2111.06377.
    """
    _check_integers(height=height, width=width, patch=patch)
    n, d = patches.shape[-2:]
    if min(height, width) < 0 or n != height * width:
        raise ValueError(f"{n} patches do not fill a grid of {height} × {width}")
    if patch < 1 or d % patch**2:
        raise ValueError(f"patches of {d} values do not divide into {patch} × {patch} pixels")
    return rearrange(patches, "... (h w) (p q c) -> ... c (h p) (w q)", h=height, w=width, p=patch, q=patch)


def split(
    mask: Bool[Tensor, "*batch n"], *, num_masked: int
) -> tuple[Int[Tensor, "*batch n-{num_masked}"], Int[Tensor, "*batch {num_masked}"]]:
    """Return the indices of the visible and of the masked tokens, each in ascending order.

    Args:
        mask: `True` = masked, exactly `num_masked` per row. Values are not checked: a row with another count gives
            wrong indices, not an error.
        num_masked: number of masked tokens per row, 0 to n; fixes the shapes.

    Returns:
        visible, masked: indices for `take` and `put`.

    Raises:
        ValueError: if `num_masked` is not an integer from 0 to n, or `mask` is 0-d.

    Example:
        >>> import torch
        >>> split(torch.tensor([True, False, True, False]), num_masked=2)
        (tensor([1, 3]), tensor([0, 2]))
    """
    _check_integers(num_masked=num_masked)
    if not mask.ndim:
        raise ValueError("mask is 0-d and does not hold one value per token")
    n = mask.shape[-1]
    if not 0 <= num_masked <= n:
        raise ValueError(f"num_masked={num_masked} of {n} tokens cannot be masked")
    order = mask.argsort(dim=-1, stable=True)
    return order[..., : n - num_masked], order[..., n - num_masked :]


def take(tokens: Shaped[Tensor, "*batch n d"], indices: Int[Tensor, "*batch k"]) -> Shaped[Tensor, "*batch k d"]:
    """Gather the tokens at the given indices of each row.

    A table shared by all rows needs no batched gather: write `table[indices]`.

    Args:
        tokens: any dtype.
        indices: in 0…n−1, in any order, separate for each row.

    Raises:
        ValueError: if the leading axes differ.

    Example:
        >>> import torch
        >>> take(torch.tensor([[10, 11], [20, 21], [30, 31]]), torch.tensor([2, 0]))
        tensor([[30, 31],
                [10, 11]])
    """
    _check_batches(tokens, indices)
    return tokens.gather(-2, indices.unsqueeze(-1).expand(*indices.shape, tokens.shape[-1]))


def take_patches(
    images: Shaped[Tensor, "*batch c H W"], indices: Int[Tensor, "*batch k"], *, patch: int
) -> Shaped[Tensor, "*batch k {patch}*{patch}*c"]:
    """Cut the patches at the given indices out of each image.

    The result is `take(patchify(images), indices)`, but no other pixel is read. Where only a few patches of large
    images are needed this saves nearly all of the time, even more so for images of bytes (uint8).

    Args:
        images: any dtype, channels first; H and W in pixels.
        indices: of patches in raster order, in any order, separate for each row.
        patch: side of a patch in pixels; divides H and W.

    Raises:
        ValueError: if `patch` is not an integer, a side of the images is not a multiple of it, or the leading axes
            differ.

    Example:
        >>> import torch
        >>> take_patches(torch.arange(8).view(1, 2, 4), torch.tensor([1]), patch=2)
        tensor([[2, 3, 6, 7]])
    """
    _check_cut(images, patch)
    if images.shape[:-3] != indices.shape[:-1]:
        raise ValueError(f"images {tuple(images.shape)} and indices {tuple(indices.shape)} have different leading axes")
    width = images.shape[-1]
    columns = width // patch
    inside = torch.arange(patch, device=indices.device)
    rows = (indices // max(columns, 1) * patch).unsqueeze(-1) + inside
    pixels = rows.unsqueeze(-1) * width + ((indices % max(columns, 1) * patch).unsqueeze(-1) + inside).unsqueeze(-2)
    pixels = pixels.flatten(-3).unsqueeze(-2).expand(*images.shape[:-2], -1)
    return rearrange(images.flatten(-2).gather(-1, pixels), "... c (k pixel) -> ... k (pixel c)", pixel=patch**2)


def put(
    tokens: Shaped[Tensor, "*batch k d"], indices: Int[Tensor, "*batch k"], into: Shaped[Tensor, "*batch n d"]
) -> Shaped[Tensor, "*batch n d"]:
    """Write tokens at the given indices of each row; the inverse of `take`.

    Args:
        tokens: values to write, with the dtype of `into`.
        indices: where to write them, in 0…n−1, distinct within a row.
        into: tokens to start from, not modified; pass zeros to scatter all tokens back to their places.

    Raises:
        ValueError: if the leading axes, the number of tokens and indices, or the features differ.

    Example:
        >>> import torch
        >>> put(torch.tensor([[9, 9]]), torch.tensor([1]), torch.tensor([[1, 2], [3, 4]]))
        tensor([[1, 2],
                [9, 9]])
    """
    _check_batches(tokens, indices)
    _check_batches(into, indices)
    if tokens.shape[-2] != indices.shape[-1] or tokens.shape[-1] != into.shape[-1]:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} cannot be put at indices {tuple(indices.shape)} of {tuple(into.shape)}"
        )
    return into.scatter(-2, indices.unsqueeze(-1).expand(tokens.shape), tokens)


def _check_batches(tokens: Tensor, indices: Tensor) -> None:
    if tokens.shape[:-2] != indices.shape[:-1]:
        raise ValueError(f"tokens {tuple(tokens.shape)} and indices {tuple(indices.shape)} have different leading axes")


def _check_cut(images: Tensor, patch: int) -> None:
    _check_integers(patch=patch)
    height, width = images.shape[-2:]
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"images of {height} × {width} pixels cannot be cut into patches of {patch} × {patch}")


def _check_integers(**numbers: int) -> None:
    for name, number in numbers.items():
        # A symbolic integer of a compiler has an index, too; so has a tensor, but reading it would synchronize
        if isinstance(number, (bool, Tensor)) or not hasattr(number, "__index__"):
            raise ValueError(f"{name}={number!r} is not an integer")
