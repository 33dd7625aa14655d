"""Targets and losses: one value per token, in float32 also under autocast. The caller averages."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

# einops looks up its backend once; done here, it is no reason to compile a caller's graph a second time
rearrange(torch.empty(0), "n -> n")


def normalised_patches(patches: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n d"]:
    """Bring each patch to mean 0 and variance 1 over all its values together: the target of MAE.

    `(t − mean) / sqrt(var + 1e-6)` with the unbiased variance. A constant patch becomes 0. Raw pixels need no
    function: use the patches as they are.

    Args:
        patches: as from `patchify`, of images normalised by the mean and std of the data set.

    Returns:
        float32.

    Raises:
        ValueError: if a patch has fewer than two values.

    Example:
        >>> normalised_patches(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
        tensor([[-1.0000,  0.0000,  1.0000],
                [ 0.0000,  0.0000,  0.0000]])

    Source: MAE, arXiv 2111.06377, section 3 (normalised pixels).
    """
    if patches.shape[-1] < 2:
        raise ValueError(f"patches of {patches.shape[-1]} value have no variance")
    patches = patches.float()
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def channel_normalised_patches(patches: Float[Tensor, "*batch n d"], *, channels: int) -> Float[Tensor, "*batch n d"]:
    """Bring each channel of each patch to mean 0 and variance 1: the target of Beyond Masking.

    `(v − mean) / (sqrt(var) + 1e-6)` with the unbiased variance over the pixels of one channel of one patch. The
    values of a constant patch are rounding noise that stays finite. It is a target: through a constant patch there is
    no gradient (it is NaN, as that of sqrt at 0).

    Args:
        patches: as from `patchify` (channel fastest), of images in [0, 1]: undo the mean and std of the data set first.
        channels: number of channels of the images; divides d.

    Returns:
        float32.

    Raises:
        ValueError: if d is not a multiple of `channels`, or a patch has fewer than two pixels.

    Example:
        >>> channel_normalised_patches(torch.tensor([[1.0, 10.0, 2.0, 20.0, 3.0, 30.0]]), channels=2)
        tensor([[-1.0000, -1.0000,  0.0000,  0.0000,  1.0000,  1.0000]])

    Source: Beyond Masking, arXiv 2203.14313 (published code).
    """
    if channels < 1 or patches.shape[-1] % channels or patches.shape[-1] < 2 * channels:
        raise ValueError(f"patches of {patches.shape[-1]} values are not two or more pixels of {channels} channels")
    pixels = rearrange(patches.float(), "... (p c) -> ... p c", c=channels)
    variance, mean = torch.var_mean(pixels, dim=-2, keepdim=True)
    return ((pixels - mean) / (variance.sqrt() + 1e-6)).flatten(-2)


def squared_error(
    prediction: Float[Tensor, "*batch n d"], target: Float[Tensor, "*batch n d"]
) -> Float[Tensor, "*batch n"]:
    """Give each token the mean squared error of its values, in float32.

    The loss of MAE is the mean of this over the masked tokens.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> squared_error(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([5.])

    Source: MAE, arXiv 2111.06377, section 3.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    return (prediction.float() - target.float()).square().mean(dim=-1)


def band_error(
    prediction: Float[Tensor, "*batch c H W"], target: Float[Tensor, "*batch c H W"], *, inner_H: int, inner_W: int
) -> Float[Tensor, "*batch 4"]:
    """Give each of the four strips around the centre its mean squared error, in float32.

    The outer term of the integrated task is the *sum* of the four, averaged over the batch. Top and bottom run over
    the full width, left and right over the rows between them.

    Args:
        prediction: a picture of the whole view.
        target: likewise.
        inner_H: height of the centre in pixels, smaller than H by an even number.
        inner_W: width of the centre in pixels, smaller than W by an even number.

    Returns:
        top, bottom, left, right.

    Raises:
        ValueError: if the shapes differ, or the centre leaves no band of equal margins on each side.

    Example:
        >>> view = torch.zeros(1, 4, 4)
        >>> view[:, 0] = 2.0
        >>> band_error(view, torch.zeros(1, 4, 4), inner_H=2, inner_W=2)
        tensor([4., 0., 0., 0.])

    Source: Beyond Masking, arXiv 2203.14313 (published code; the paper gives no formula).
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    H, W = prediction.shape[-2:]
    rows, columns = (H - inner_H) // 2, (W - inner_W) // 2
    if not (0 < inner_H < H and 0 < inner_W < W) or (H - inner_H) % 2 or (W - inner_W) % 2:
        raise ValueError(f"a centre of {inner_H} × {inner_W} leaves no even band in a view of {H} × {W} pixels")
    error = (prediction.float() - target.float()).square()
    between = error[..., rows : H - rows, :]
    strips = error[..., :rows, :], error[..., H - rows :, :], between[..., :columns], between[..., W - columns :]
    return torch.stack([strip.mean(dim=(-3, -2, -1)) for strip in strips], dim=-1)
