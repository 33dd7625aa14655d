"""Degradations of images: what the network sees instead of the image it has to give back."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def area_resize(images: Float[Tensor, "*batch c H0 W0"], *, H: int, W: int) -> Float[Tensor, "*batch c {H} {W}"]:
    """Resize images by plain averages: each new pixel is the mean of the old pixels it touches.

    New pixel i of an axis averages the old ones from floor(i · old / new) to ceil((i + 1) · old / new) − 1. Up-scaling
    therefore mixes nearest neighbour and averages of two.

    Args:
        images: channels first.
        H: new height in pixels.
        W: new width in pixels.

    Raises:
        ValueError: if a side, old or new, is smaller than one pixel.

    Example:
        >>> area_resize(torch.tensor([[[0.0, 4.0]]]), H=1, W=3)
        tensor([[[0., 2., 4.]]])

    Source: Beyond Masking, arXiv 2203.14313 (every resize of the published code is of this kind).
    """
    if min(*images.shape[-2:], H, W) < 1:
        raise ValueError(f"images of {images.shape[-2]} × {images.shape[-1]} pixels cannot be resized to {H} × {W}")
    planes = images.reshape(images.shape[:-2].numel(), *images.shape[-2:])
    return F.adaptive_avg_pool2d(planes, (H, W)).reshape(*images.shape[:-2], H, W)


def central_crop(images: Shaped[Tensor, "*batch c H0 W0"], *, H: int, W: int) -> Shaped[Tensor, "*batch c {H} {W}"]:
    """Cut out the centre of images, pixels untouched: the input of the integrated task, whose target is the whole view.

    Args:
        images: any dtype, channels first.
        H: height of the crop in pixels; the margins above and below must be equal.
        W: width of the crop in pixels; likewise.

    Raises:
        ValueError: if the crop does not fit, or has no centre on the pixel grid.

    Example:
        >>> central_crop(torch.arange(12).view(1, 3, 4), H=1, W=2)
        tensor([[[5, 6]]])

    Source: Beyond Masking, arXiv 2203.14313, section on the integrated task.
    """
    top, left = _margins(images, H, W)
    if (images.shape[-2] - H) % 2 or (images.shape[-1] - W) % 2:
        raise ValueError(
            f"a crop of {H} × {W} has no centre in {images.shape[-2]} × {images.shape[-1]} pixels: margins must be even"
        )
    return images[..., top : top + H, left : left + W]


def zoom_in(images: Float[Tensor, "*batch c H W"], *, window_H: int, window_W: int) -> Float[Tensor, "*batch c H W"]:
    """Enlarge the central window of images to their full size; what lies outside must be invented by the model.

    Args:
        images: channels first.
        window_H: height of the window in pixels (best 160 of 224); the margins above and below must be equal.
        window_W: width of the window in pixels; likewise.

    Raises:
        ValueError: if the window does not fit, is empty, or has no centre on the pixel grid.

    Example:
        >>> zoom_in(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), window_H=1, window_W=2)
        tensor([[[2., 2., 3., 3.]]])

    Source: Beyond Masking, arXiv 2203.14313, task (a).
    """
    return area_resize(central_crop(images, H=window_H, W=window_W), H=images.shape[-2], W=images.shape[-1])


def zoom_in_anywhere(
    images: Float[Tensor, "*batch c H W"], noise: Float[Tensor, "*batch 2"], *, window_H: int, window_W: int
) -> Float[Tensor, "*batch c H W"]:
    """Enlarge a window at a random place of each image to its full size (an ablation; the centre does better).

    Args:
        images: channels first.
        noise: uniform in [0, 1); row and column of the window, every place equally likely.
        window_H: height of the window in pixels.
        window_W: width of the window in pixels.

    Raises:
        ValueError: if the window does not fit or is empty, or the leading axes differ.

    Example:
        >>> zoom_in_anywhere(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([0.0, 0.9]), window_H=1, window_W=2)
        tensor([[[3., 3., 4., 4.]]])

    Source: Beyond Masking, arXiv 2203.14313, appendix A.3.
    """
    if noise.shape != (*images.shape[:-3], 2):
        raise ValueError(f"noise {tuple(noise.shape)} does not give a row and a column to images {tuple(images.shape)}")
    _margins(images, window_H, window_W)
    H, W = images.shape[-2:]
    rows = _window(noise[..., 0], window_H, H)[..., None, :, None].expand(*images.shape[:-2], window_H, W)
    columns = _window(noise[..., 1], window_W, W)[..., None, None, :].expand(*images.shape[:-2], window_H, window_W)
    return area_resize(images.gather(-2, rows).gather(-1, columns), H=H, W=W)


def _window(noise: Float[Tensor, "*batch"], length: int, size: int) -> Int[Tensor, "*batch {length}"]:
    """Indices of `length` neighbours among `size`, at a random offset."""
    choices = size - length + 1
    first = (noise.float() * choices).long().clamp(max=choices - 1)
    return first.unsqueeze(-1) + torch.arange(length, device=noise.device)


def _margins(images: Tensor, H: int, W: int) -> tuple[int, int]:
    """Rows above and columns left of a central window of `H` × `W` pixels."""
    if not (0 < H <= images.shape[-2] and 0 < W <= images.shape[-1]):
        raise ValueError(
            f"a window of {H} × {W} pixels does not fit into images of {images.shape[-2]} × {images.shape[-1]}"
        )
    return (images.shape[-2] - H) // 2, (images.shape[-1] - W) // 2
