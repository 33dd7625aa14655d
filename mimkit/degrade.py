"""Degradations of images: the inputs from which a network reconstructs the original images."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

# einops looks up its backend at the first call; without this one, a caller's graph would compile twice
rearrange(torch.empty(0), "n -> n")


def area_resize(images: Float[Tensor, "*batch c H0 W0"], *, H: int, W: int) -> Float[Tensor, "*batch c {H} {W}"]:
    """Resize images by averaging: each new pixel is the mean of the old pixels it overlaps.

    Along an axis, new pixel i averages the old ones from floor(i · old / new) to ceil((i + 1) · old / new) − 1.
    Upsampling is therefore a mix of nearest-neighbor copies and averages of two.

    Args:
        images: channels first.
        H: new height in pixels.
        W: new width in pixels.

    Raises:
        ValueError: if a new side is not an integer, or any side is smaller than one pixel.

    Example:
        >>> area_resize(torch.tensor([[[0.0, 4.0]]]), H=1, W=3)
        tensor([[[0., 2., 4.]]])

    Source: Beyond Masking, arXiv 2203.14313 (the published code uses it for every resize).
    """
    _check_integers(H=H, W=W)
    if min(*images.shape[-2:], H, W) < 1:
        raise ValueError(f"images of {images.shape[-2]} × {images.shape[-1]} pixels cannot be resized to {H} × {W}")
    return F.adaptive_avg_pool2d(images.flatten(0, -3), (H, W)).reshape(*images.shape[:-2], H, W)


def central_crop(images: Shaped[Tensor, "*batch c H0 W0"], *, H: int, W: int) -> Shaped[Tensor, "*batch c {H} {W}"]:
    """Crop images to their center, without resampling.

    The crop is the input of the integrated task, whose target is the whole view.

    Args:
        images: any dtype, channels first.
        H: height of the crop in pixels; the margins above and below must be equal.
        W: width of the crop in pixels; the margins to the left and right must be equal.

    Raises:
        ValueError: if a side is not an integer, or the crop does not fit or cannot be centered on the pixel grid.

    Example:
        >>> central_crop(torch.arange(12).view(1, 3, 4), H=1, W=2)
        tensor([[[5, 6]]])

    Source: Beyond Masking, arXiv 2203.14313, section on the integrated task.
    """
    _check_integers(H=H, W=W)
    top, left = _margins(images, H, W)
    if (images.shape[-2] - H) % 2 or (images.shape[-1] - W) % 2:
        raise ValueError(
            f"a crop of {H} × {W} cannot be centered in {images.shape[-2]} × {images.shape[-1]} pixels: "
            "margins must be equal"
        )
    return images[..., top : top + H, left : left + W]


def zoom_in(images: Float[Tensor, "*batch c H W"], *, window_H: int, window_W: int) -> Float[Tensor, "*batch c H W"]:
    """Enlarge the central window of images to full size; the model has to reconstruct what lies outside.

    Args:
        images: channels first.
        window_H: height of the window in pixels (best: 160 of 224); the margins above and below must be equal.
        window_W: width of the window in pixels; the margins to the left and right must be equal.

    Raises:
        ValueError: if a side is not an integer, or the window does not fit, is empty, or cannot be centered on the
            pixel grid.

    Example:
        >>> zoom_in(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), window_H=1, window_W=2)
        tensor([[[2., 2., 3., 3.]]])

    Source: Beyond Masking, arXiv 2203.14313, task (a).
    """
    _check_integers(window_H=window_H, window_W=window_W)
    return area_resize(central_crop(images, H=window_H, W=window_W), H=images.shape[-2], W=images.shape[-1])


def zoom_in_anywhere(
    images: Float[Tensor, "*batch c H W"], noise: Float[Tensor, "*batch 2"], *, window_H: int, window_W: int
) -> Float[Tensor, "*batch c H W"]:
    """Enlarge a window at a random place of each image to full size.

    This is an ablation of `zoom_in`, and less accurate.

    Args:
        images: channels first.
        noise: uniform in [0, 1); row and column of the window, every place equally likely.
        window_H: height of the window in pixels.
        window_W: width of the window in pixels.

    Raises:
        ValueError: if a side is not an integer, the window does not fit or is empty, or the leading axes differ.

    Example:
        >>> zoom_in_anywhere(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([0.0, 0.9]), window_H=1, window_W=2)
        tensor([[[3., 3., 4., 4.]]])

    Source: Beyond Masking, arXiv 2203.14313, appendix A.3.
    """
    _check_integers(window_H=window_H, window_W=window_W)
    _check_noise(noise, images, 2, "a row and a column")
    _margins(images, window_H, window_W)
    H, W = images.shape[-2:]
    top, left = _whole(noise[..., 0], H - window_H), _whole(noise[..., 1], W - window_W)
    rows = top.unsqueeze(-1) + torch.arange(window_H, device=noise.device)
    columns = left.unsqueeze(-1) + torch.arange(window_W, device=noise.device)
    return area_resize(_pick(images, rows, columns), H=H, W=W)


def mirror_fill(
    images: Shaped[Tensor, "*batch c h w"], noise: Float[Tensor, "*batch 2"], *, H: int, W: int
) -> Shaped[Tensor, "*batch c {H} {W}"]:
    """Place images at random on larger canvases and fill the rest with mirror images.

    The reflection repeats the edge pixel (… 1 0 | 0 1 … w−1 | w−1 w−2 …) and is repeated as often as needed. With the
    same noise, other images of the same size, such as predictions, are placed at the same positions.

    Args:
        images: any dtype, channels first.
        noise: uniform in [0, 1); row and column of the image, every place equally likely.
        H: height of the canvas in pixels, at least h.
        W: width of the canvas in pixels, at least w.

    Raises:
        ValueError: if a side is not an integer, an image is empty or does not fit onto its canvas, or the leading axes
            differ.

    Example:
        >>> mirror_fill(torch.tensor([[[1, 2]]]), torch.tensor([0.0, 0.6]), H=1, W=7)
        tensor([[[2, 2, 1, 1, 2, 2, 1]]])

    Source: Beyond Masking, arXiv 2203.14313, task (b). The published code uses one place per batch, never the last row
    or column, and fails where the reflection is wider than the image or the margin is zero.
    """
    _check_integers(H=H, W=W)
    _check_noise(noise, images, 2, "a row and a column")
    h, w = images.shape[-2:]
    _check_fits(h, w, H, W)
    rows = _mirrored(_whole(noise[..., 0], H - h), h, H)
    columns = _mirrored(_whole(noise[..., 1], W - w), w, W)
    return _pick(images, rows, columns)


def paste(
    images: Float[Tensor, "*batch c h w"], canvases: Float[Tensor, "*batch c H W"], noise: Float[Tensor, "*batch 2"]
) -> Float[Tensor, "*batch c H W"]:
    """Place images at random on larger ones, for the ablations that replace the mirror images of `mirror_fill`.

    For a black canvas pass `black.expand(...)` with one value per channel (−mean / std for normalized images), for
    another image `images.roll(1, dims=0)`. The same noise gives the same places as in `mirror_fill`.

    Args:
        images: channels first.
        canvases: images to paste onto; not modified.
        noise: uniform in [0, 1); row and column of the image, every place equally likely.

    Returns:
        the dtype of `images`.

    Raises:
        ValueError: if an image is empty or does not fit onto its canvas, or the leading axes or channels differ.

    Example:
        >>> paste(torch.tensor([[[1.0, 2.0]]]), torch.zeros(1, 1, 4), torch.tensor([0.0, 0.6]))
        tensor([[[0., 1., 2., 0.]]])

    Source: Beyond Masking, arXiv 2203.14313, appendix A.3.
    """
    _check_noise(noise, images, 2, "a row and a column")
    if canvases.shape[:-2] != images.shape[:-2]:
        raise ValueError(
            f"images {tuple(images.shape)} and canvases {tuple(canvases.shape)} differ in more than height and width"
        )
    (h, w), (H, W) = images.shape[-2:], canvases.shape[-2:]
    _check_fits(h, w, H, W)
    rows = _whole(noise[..., 0], H - h).unsqueeze(-1) + torch.arange(h, device=noise.device)
    columns = _whole(noise[..., 1], W - w).unsqueeze(-1) + torch.arange(w, device=noise.device)
    places = (rows.unsqueeze(-1) * W + columns.unsqueeze(-2)).flatten(-2)
    places = places.unsqueeze(-2).expand(*images.shape[:-2], h * w)
    return canvases.to(images.dtype).flatten(-2).scatter(-1, places, images.flatten(-2)).unflatten(-1, (H, W))


def zoom_out(
    images: Float[Tensor, "*batch c H W"], noise: Float[Tensor, "*batch 2"], *, small_H: int, small_W: int
) -> Float[Tensor, "*batch c H W"]:
    """Shrink images, place them at random on a canvas of the original size and fill the rest with mirror images.

    This is `area_resize` followed by `mirror_fill`. For other fills use `paste` instead, for none use `area_resize`
    alone. To combine it with masking, compare prediction and target in the frame of the input: apply this function to
    both, with the noise of the input.

    Args:
        images: channels first.
        noise: uniform in [0, 1); row and column of the small image, every place equally likely.
        small_H: height of the small image in pixels (best: 160 of 224).
        small_W: width of the small image in pixels.

    Raises:
        ValueError: if a side is not an integer, the small image is empty or larger than the images, or the leading axes
            differ.

    Example:
        >>> zoom_out(torch.tensor([[[1.0, 1.0, 5.0, 5.0]]]), torch.tensor([0.0, 0.0]), small_H=1, small_W=2)
        tensor([[[1., 5., 5., 1.]]])

    Source: Beyond Masking, arXiv 2203.14313, task (b); the published code computes the loss on the canvas.
    """
    _check_integers(small_H=small_H, small_W=small_W)
    H, W = images.shape[-2:]
    _check_noise(noise, images, 2, "a row and a column")
    _check_fits(small_H, small_W, H, W)
    return mirror_fill(area_resize(images, H=small_H, W=small_W), noise, H=H, W=W)


def zoom_out_any_size(
    images: Float[Tensor, "*batch c H W"], noise: Float[Tensor, "*batch 3"], *, sizes: tuple[tuple[int, int], ...]
) -> Float[Tensor, "*batch c H W"]:
    """Zoom out each image to its own random size.

    The averages are products with small matrices, in float32 even under autocast (in TF32 where PyTorch allows it).
    They are fast if the sizes share a large divisor with those of the images, such as 96, 128, 160, 192 and 224 do.

    Args:
        images: channels first.
        noise: uniform in [0, 1); row and column of the small image, every place equally likely, then its size, all
            sizes equally likely.
        sizes: heights and widths of small images in pixels, such as `((96, 96), (128, 128), (160, 160), (192, 192))`.

    Raises:
        ValueError: if `sizes` is empty, a size is not of integers, empty or larger than the images, or the leading axes
            differ.

    Example:
        >>> images = torch.tensor([[[1.0, 1.0, 5.0, 5.0]]])
        >>> zoom_out_any_size(images, torch.tensor([0.0, 0.0, 0.9]), sizes=((1, 4), (1, 2)))
        tensor([[[1., 5., 5., 1.]]])

    Source: Beyond Masking, arXiv 2203.14313, task (b), "rand." in the table of parameters.
    """
    _check_noise(noise, images, 3, "a row, a column and a size")
    if not sizes:
        raise ValueError("sizes is empty")
    H, W = images.shape[-2:]
    for i, (height, width) in enumerate(sizes):
        _check_integers(**{f"sizes[{i}][0]": height, f"sizes[{i}][1]": width})
        _check_fits(height, width, H, W)
    dtype, images, which = images.dtype, images.float(), _whole(noise[..., 2], len(sizes) - 1)
    rows, down = _shrunken_axis(noise[..., 0], which, [height for height, _ in sizes], H)
    columns, across = _shrunken_axis(noise[..., 1], which, [width for _, width in sizes], W)
    with _full_precision(images):
        images = (down[..., None, None, :, :] @ images.unflatten(-2, (-1, down.shape[-1]))).flatten(-3, -2)
        blocks = images.unflatten(-1, (-1, across.shape[-1]))
        images = (blocks.flatten(-4, -2) @ across.mT).reshape(*images.shape[:-1], blocks.shape[-2] * across.shape[-2])
    return _pick(images, rows, columns).to(dtype)


def fisheye(
    images: Float[Tensor, "*batch c H W"], noise: Float[Tensor, "*batch 3"], *, least_twist: float, most_twist: float
) -> Float[Tensor, "*batch c H W"]:
    """Distort each image toward its own random center; the distortion grows with the distance from it.

    For the variant that loses no pixels of the target, distort a larger view (288 for 224), `area_resize` it, and use
    the `central_crop` of the undistorted view as the target.

    Args:
        images: channels first.
        noise: uniform in [0, 1); row and column of the center, anywhere in the image, then the twist.
        least_twist: smallest twist (best: 0.20; 0.15 in the published code).
        most_twist: largest twist (0.25). Up to 0.30 nothing outside the image is read.

    Raises:
        ValueError: if the twists are not finite, negative or in the wrong order, the images have no pixels, or the
            leading axes differ.

    Example:
        >>> image = torch.tensor([[[0.0, 1.0, 2.0, 3.0, 4.0]]])
        >>> fisheye(image, torch.tensor([0.5, 0.5, 0.0]), least_twist=0.25, most_twist=0.25)
        tensor([[[0.5000, 1.1250, 2.0000, 2.8750, 3.5000]]])

    Source: Beyond Masking, arXiv 2203.14313, task (c).
    """
    _check_noise(noise, images, 3, "a row, a column and a twist")
    if not 0 <= least_twist <= most_twist < math.inf:
        raise ValueError(
            f"least_twist={least_twist} and most_twist={most_twist} do not satisfy 0 <= least_twist <= most_twist < inf"
        )
    noise = noise.float()
    return fisheye_at(images, 2 * noise[..., :2] - 1, least_twist + (most_twist - least_twist) * noise[..., 2])


def fisheye_at(
    images: Float[Tensor, "*batch c H W"], centers: Float[Tensor, "*batch 2"], twists: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch c H W"]:
    """Distort each image toward a given center: a pixel at distance d is sampled `twist` · d² closer to it.

    Rows and columns run from −1 to 1, from the center of the first pixel to that of the last, and d is measured in
    these units. Sampling is bilinear, with zeros outside the image (only reached by twists above 0.35).

    Args:
        images: channels first.
        centers: row and column in [−1, 1] (the published code has them in the opposite order).
        twists: from 0, which leaves the image unchanged. Above 1 / (2 d) the image folds over.

    Raises:
        ValueError: if the images have no pixels or the leading axes differ.

    Example:
        >>> image = torch.tensor([[[0.0, 1.0, 2.0, 3.0, 4.0]]])
        >>> fisheye_at(image, torch.tensor([0.0, -1.0]), torch.tensor(0.25))
        tensor([[[0.0000, 0.8750, 1.5000, 1.8750, 2.0000]]])

    Source: Beyond Masking, arXiv 2203.14313, task (c).
    """
    if centers.shape != (*images.shape[:-3], 2) or twists.shape != images.shape[:-3]:
        raise ValueError(
            f"centers {tuple(centers.shape)} and twists {tuple(twists.shape)} do not hold one of each per image of "
            f"{tuple(images.shape)}"
        )
    rows, columns = _coordinates(images)
    rows, twists = rows.unsqueeze(-1), twists[..., None, None].float()
    down, right = centers[..., 0, None, None].float() - rows, centers[..., 1, None, None].float() - columns
    distance = (down.square() + right.square()).sqrt()
    rows, columns = torch.addcmul(rows, distance, twists * down), torch.addcmul(columns, distance, twists * right)
    return _sample(images, rows, columns, outside="zeros")


def wave(images: Float[Tensor, "*batch c H W"], *, amplitude: float, frequency: float) -> Float[Tensor, "*batch c H W"]:
    """Shift the columns of images vertically along a cosine, with reflection at the edges.

    A pixel at (row, column), both from −1 to 1, samples the image at row + `amplitude` · cos(`frequency` · column),
    bilinearly. The reflection is about the edge pixel, which is not repeated.

    Args:
        images: channels first.
        amplitude: of the wave, for example 0.1; 1 is half the height of the image.
        frequency: for example 10; 2π gives two periods across the width.

    Raises:
        ValueError: if a number is not finite, or the images have no pixels.

    Example:
        >>> wave(torch.tensor([[[1.0], [2.0], [3.0]]]), amplitude=1.0, frequency=10.0)
        tensor([[[2.],
                 [3.],
                 [2.]]])

    Source: Beyond Masking, arXiv 2203.14313, appendix A.3, "horizontal wave". There is neither a formula nor code for
    it; this is the second transform of the tutorial from which the published fisheye is taken.
    """
    if not (abs(amplitude) < math.inf and abs(frequency) < math.inf):  # `math.isfinite` breaks dynamic graphs
        raise ValueError(f"amplitude={amplitude} and frequency={frequency} are not both finite")
    rows, columns = _coordinates(images)
    rows = rows.unsqueeze(-1) + amplitude * torch.cos(frequency * columns)
    return _sample(images, rows, columns.expand_as(rows), outside="reflection")


def random_kernels(noise: Float[Tensor, "*batch k k"], *, mean: float, std: float) -> Float[Tensor, "*batch k k"]:
    """Return normally distributed weights for `convolve_each`; kernels are not normalized to a sum of one.

    Args:
        noise: uniform in [0, 1), one value per weight.
        mean: of the weights: 1 / k², that of a box filter (0 for the initializations that do worse than no
            pre-training).
        std: of the weights: 0.02. The sum of a kernel has a standard deviation of k · `std`.

    Returns:
        float32.

    Raises:
        ValueError: if a number is not finite, `std` is negative, or the kernels are not square.

    Example:
        >>> random_kernels(torch.tensor([[0.5]]), mean=1.0, std=0.02)
        tensor([[1.]])

    Source: Beyond Masking, arXiv 2203.14313, task (d); mean and std are those of the published code for k = 7.
    """
    if noise.ndim < 2 or noise.shape[-1] != noise.shape[-2]:
        raise ValueError(f"noise {tuple(noise.shape)} does not hold square kernels")
    if not (abs(mean) < math.inf and 0 <= std < math.inf):
        raise ValueError(f"mean={mean} and std={std} are not both finite, or std is negative")
    return mean + std * _normal(noise)


def random_kernels_any_size(
    noise: Float[Tensor, "*batch m k k"],
    size_noise: Float[Tensor, "*batch"],
    *,
    sizes: tuple[int, ...],
    std: float,
) -> Float[Tensor, "*batch m k k"]:
    """Return normally distributed weights of mean 1 / size² for `convolve_each`, with a random kernel size per image.

    Smaller kernels are padded with zeros to k × k, which does not change the result of the convolution.

    Args:
        noise: uniform in [0, 1), one value per weight of the largest size.
        size_noise: uniform in [0, 1), one value per image; all sizes equally likely.
        sizes: sides of the kernels, odd, such as (5, 7, 9, 11); the largest is k.
        std: of the weights: 0.02.

    Returns:
        float32.

    Raises:
        ValueError: if a size is not an odd integer or the largest is not k, `std` is not finite or negative, or the
            leading axes differ.

    Example:
        >>> noise = torch.full((1, 3, 3), 0.5)
        >>> random_kernels_any_size(noise, torch.tensor(0.2), sizes=(1, 3), std=0.02)
        tensor([[[0., 0., 0.],
                 [0., 1., 0.],
                 [0., 0., 0.]]])

    Source: Beyond Masking, arXiv 2203.14313, task (d), "rand." in the table of parameters.
    """
    _check_integers(**{f"sizes[{i}]": size for i, size in enumerate(sizes)})
    if noise.ndim < 3 or size_noise.shape != noise.shape[:-3] or noise.shape[-1] != noise.shape[-2]:
        raise ValueError(
            f"noise {tuple(noise.shape)} and size_noise {tuple(size_noise.shape)} do not hold square kernels and one "
            "size per image"
        )
    k = noise.shape[-1]
    if not sizes or max(sizes) != k or any(size < 1 or size % 2 == 0 for size in sizes):
        raise ValueError(f"sizes={sizes} are not odd numbers with {k} as the largest")
    if not 0 <= std < math.inf:
        raise ValueError(f"std={std} is not finite, or negative")
    size = _listed(_whole(size_noise, len(sizes) - 1), list(sizes))[..., None, None, None]
    distance = (torch.arange(k, device=noise.device) - k // 2).abs()
    inside = torch.maximum(distance.unsqueeze(-1), distance) <= size // 2
    return torch.where(inside, 1 / size**2 + std * _normal(noise), 0)


def convolve_each(
    images: Float[Tensor, "*batch c H W"], kernels: Float[Tensor, "*batch m k k"]
) -> Float[Tensor, "*batch c H W"]:
    """Convolve each image with its own kernels and zero padding; with random kernels, this is the blur.

    Like the convolutions of a network it is a cross-correlation: kernels are not flipped. The padding is the mean color
    if the images are normalized by the mean and std of the dataset.

    Args:
        images: channels first.
        kernels: of odd side k; m = c for one per channel, or m = c · c for kernels that mix the channels, where kernel
            o · c + i connects input channel i to output channel o.

    Raises:
        ValueError: if there are not c or c · c square kernels of odd side per image.

    Example:
        >>> convolve_each(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 3, 3))
        tensor([[[3., 6., 5.]]])

    Source: Beyond Masking, arXiv 2203.14313, task (d). The paper has one kernel per channel, but its figures look as if
    channels had been mixed; the published layer cannot run.
    """
    c, H, W = images.shape[-3:]
    m, k = kernels.shape[-3], kernels.shape[-1]
    if kernels.shape != (*images.shape[:-3], m, k, k) or m not in (c, c * c) or k % 2 == 0:
        raise ValueError(
            f"kernels {tuple(kernels.shape)} do not hold {c} or {c * c} squares of odd side for each of images "
            f"{tuple(images.shape)}"
        )
    if not images.numel():
        return images.clone()
    planes, weights = images.reshape(1, -1, H, W).float(), kernels.reshape(-1, m // c, k, k).float()
    # Three output channels would leave most vector lanes of a CPU idle: mixing kernels compute four rows at once.
    rows = 1 if m == c else 4
    if rows > 1:
        weights = torch.stack([F.pad(weights, (0, 0, row, rows - 1 - row)) for row in range(rows)], dim=1).flatten(0, 1)
        planes = F.pad(planes, (0, 0, 0, -H % rows)) if H % rows else planes
    with _full_precision(images):
        result = F.conv2d(planes, weights, stride=(rows, 1), padding=k // 2, groups=planes.shape[1] // (m // c))
    result = rearrange(result, "1 (planes rows) h w -> planes (h rows) w", rows=rows)[:, :H]
    return result.reshape(images.shape).to(images.dtype)


def decolorize(
    images: Float[Tensor, "*batch c H W"], *, saturation: float | Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch c H W"]:
    """Reduce the saturation of images: every channel approaches the largest one of its pixel.

    This is the closed form of converting RGB to HSV, multiplying S by `saturation`, and converting back. At 0 the image
    is gray, with the value of the largest channel and not the luma. Images of one channel do not change.

    Args:
        images: channels first, in [0, 1], not normalized by the mean and std of the dataset.
        saturation: from 0 (gray) to 1 (unchanged), a number or one value per image.

    Raises:
        ValueError: if `saturation` is a number outside 0…1, or a tensor without one value per image.

    Example:
        >>> decolorize(torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1), saturation=0.5).flatten()
        tensor([1.0000, 0.7500, 0.5000])

    Source: Beyond Masking, arXiv 2203.14313, task (e). The published code truncates to 8 bits, uses the result as the
    target too, and does not run.
    """
    brightest = images.amax(dim=-3, keepdim=True)
    if not isinstance(saturation, Tensor):
        if not 0 <= saturation <= 1:
            raise ValueError(f"saturation={saturation} is not between 0 and 1")
        return torch.lerp(brightest, images, saturation)
    if saturation.shape != images.shape[:-3]:
        raise ValueError(
            f"saturation {tuple(saturation.shape)} does not hold one value per image of {tuple(images.shape)}"
        )
    weight = saturation[..., None, None, None].float()
    return torch.lerp(brightest.float(), images.float(), weight).to(images.dtype)


def _whole(noise: Float[Tensor, "*batch"], most: int | Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """Return integers from 0 to `most`, equally likely; NaN counts as 0, and other noise as the nearest in [0, 1]."""
    return (noise.float().nan_to_num(0.0).clamp(0, 1) * (most + 1)).long().clamp(max=most)


def _listed(which: Int[Tensor, "*batch"], numbers: list[int]) -> Int[Tensor, "*batch"]:
    """Look up numbers of a list by index without copying the list to the device."""
    result = torch.full_like(which, numbers[0])
    for place, number in enumerate(numbers):
        result = torch.where(which == place, number, result)
    return result


def _normal(noise: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return standard normal numbers from uniform ones; 0 and, after rounding, 1 become ∓5.3."""
    return torch.special.ndtri(noise.float().clamp(2**-24, 1 - 2**-24))


def _mirrored(
    first: Int[Tensor, "*batch"], length: int | Int[Tensor, "*batch 1"], size: int
) -> Int[Tensor, "*batch {size}"]:
    """Return which of `length` pixels is at each of `size` places: pixel 0 at `first`, reflections on both sides."""
    places = (torch.arange(size, device=first.device) - first.unsqueeze(-1)) % (2 * length)
    return torch.minimum(places, 2 * length - 1 - places)


def _pick(
    images: Shaped[Tensor, "*batch c H W"], rows: Int[Tensor, "*batch h"], columns: Int[Tensor, "*batch w"]
) -> Shaped[Tensor, "*batch c h w"]:
    """Return the pixels of each image at its own rows and columns."""
    places = (rows.unsqueeze(-1) * images.shape[-1] + columns.unsqueeze(-2)).flatten(-2)
    places = places.unsqueeze(-2).expand(*images.shape[:-2], places.shape[-1])
    return images.flatten(-2).gather(-1, places).unflatten(-1, (rows.shape[-1], columns.shape[-1]))


def _shrunken_axis(
    noise: Float[Tensor, "*batch"], which: Int[Tensor, "*batch"], lengths: list[int], size: int
) -> tuple[Int[Tensor, "*batch {size}"], Float[Tensor, "*batch q p"]]:
    """Return, for one axis, which pixel appears at each place of the canvas, and the averages that shrink the image.

    The averages repeat in blocks of p old pixels, and all lengths have the same number of blocks. A block has room for
    the q new pixels of the largest length; places that shorter lengths leave empty are never read.
    """
    # products of very small matrices are slow: use blocks of at least 16 pixels where possible
    most = max(size // 16, 1)
    blocks = max(n for n in range(1, most + 1) if all(length % n == 0 for length in (size, *lengths)))
    p, q = size // blocks, max(lengths) // blocks
    length = _listed(which, lengths)
    new = (length // blocks)[..., None, None]
    i, j = torch.arange(q, device=which.device).unsqueeze(-1), torch.arange(p, device=which.device)
    touched = (j * new < (i + 1) * p) & ((j + 1) * new > i * p) & (i < new)
    averages = touched / touched.sum(dim=-1, keepdim=True).clamp(min=1)
    pixels = _mirrored(_whole(noise, size - length), length.unsqueeze(-1), size)
    new = new.squeeze(-1)
    return pixels // new * q + pixels % new, averages


def _coordinates(images: Tensor) -> tuple[Float[Tensor, " H"], Float[Tensor, " W"]]:
    """Return the rows and columns of the pixels, from −1 to 1; a single one is at 0."""
    H, W = images.shape[-2:]
    if not (H and W):
        raise ValueError(f"images of {H} × {W} pixels are empty")
    rows, columns = (torch.arange(1.0 - n, n, 2, device=images.device) / max(n - 1, 1) for n in (H, W))
    return rows, columns


def _sample(
    images: Float[Tensor, "*batch c H W"],
    rows: Float[Tensor, "*some H W"],
    columns: Float[Tensor, "*some H W"],
    *,
    outside: str,
) -> Float[Tensor, "*batch c H W"]:
    """Sample images bilinearly at rows and columns from −1 to 1."""
    count, (c, H, W) = math.prod(images.shape[:-3]), images.shape[-3:]
    grids = torch.stack([columns, rows], dim=-3).expand(*images.shape[:-3], 2, H, W)
    grids = grids.reshape(count, 2, H, W).movedim(1, -1)
    planes = images.reshape(count, c, H, W).float()
    result = F.grid_sample(planes, grids, mode="bilinear", padding_mode=outside, align_corners=True)
    return result.reshape(images.shape).to(images.dtype)


def _full_precision(images: Tensor) -> torch.autocast:
    """Disable autocast, also on devices without it such as meta."""
    kind = images.device.type
    return torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False)


def _check_noise(noise: Tensor, images: Tensor, count: int, what: str) -> None:
    if noise.shape != (*images.shape[:-3], count):
        raise ValueError(f"noise {tuple(noise.shape)} does not hold {what} for each of images {tuple(images.shape)}")


def _check_fits(h: int, w: int, H: int, W: int) -> None:
    if not (0 < h <= H and 0 < w <= W):
        raise ValueError(f"an image of {h} × {w} pixels does not fit onto a canvas of {H} × {W}")


def _margins(images: Tensor, H: int, W: int) -> tuple[int, int]:
    """Return the rows above and the columns left of a central window of `H` × `W` pixels."""
    if not (0 < H <= images.shape[-2] and 0 < W <= images.shape[-1]):
        raise ValueError(
            f"a window of {H} × {W} pixels does not fit into images of {images.shape[-2]} × {images.shape[-1]}"
        )
    return (images.shape[-2] - H) // 2, (images.shape[-1] - W) // 2


def _check_integers(**numbers: int) -> None:
    for name, number in numbers.items():
        # A symbolic integer of a compiler has an index, too; so has a tensor, but reading it would synchronize
        if isinstance(number, (bool, Tensor)) or not hasattr(number, "__index__"):
            raise ValueError(f"{name}={number!r} is not an integer")
