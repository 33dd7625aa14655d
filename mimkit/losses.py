"""Targets and losses: one value per token, in float32 even under autocast. The caller averages."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

# einops looks up its backend at the first call; without this one, a caller's graph would compile twice
rearrange(torch.empty(0), "n -> n")


def normalized_patches(patches: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n d"]:
    """Standardize each patch over all of its values: the target of MAE.

    `(t − mean) / sqrt(var + 1e-6)` with the unbiased variance; a constant patch becomes 0. For a target of raw pixels,
    use the patches as they are.

    Args:
        patches: as from `patchify`, of images normalized by the mean and std of the dataset.

    Returns:
        float32.

    Raises:
        ValueError: if a patch has fewer than two values.

    Example:
        >>> normalized_patches(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
        tensor([[-1.0000,  0.0000,  1.0000],
                [ 0.0000,  0.0000,  0.0000]])

    Source: MAE, arXiv 2111.06377, section 3 (normalized pixels).
    """
    if patches.shape[-1] < 2:
        raise ValueError(f"patches of {patches.shape[-1]} value have no variance")
    patches = patches.float()
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def channel_normalized_patches(patches: Float[Tensor, "*batch n d"], *, channels: int) -> Float[Tensor, "*batch n d"]:
    """Standardize each channel of each patch: the target of Beyond Masking.

    `(v − mean) / (sqrt(var) + 1e-6)` with the unbiased variance over the pixels of one channel of one patch. A constant
    patch gives rounding errors, which stay finite. Use it for targets only: the gradient with respect to a constant
    patch is NaN, as is that of sqrt at 0.

    Args:
        patches: as from `patchify` (channel fastest), of images in [0, 1], not normalized by the mean and std of the
            dataset.
        channels: number of channels of the images; divides d.

    Returns:
        float32.

    Raises:
        ValueError: if `channels` is not an integer that divides d, or a patch has fewer than two pixels.

    Example:
        >>> channel_normalized_patches(torch.tensor([[1.0, 10.0, 2.0, 20.0, 3.0, 30.0]]), channels=2)
        tensor([[-1.0000, -1.0000,  0.0000,  0.0000,  1.0000,  1.0000]])

    Source: Beyond Masking, arXiv 2203.14313 (published code).
    """
    _check_integers(channels=channels)
    if channels < 1 or patches.shape[-1] % channels or patches.shape[-1] < 2 * channels:
        raise ValueError(
            f"patches of {patches.shape[-1]} values do not divide into two or more pixels of {channels} channels"
        )
    pixels = rearrange(patches.float(), "... (p c) -> ... p c", c=channels)
    variance, mean = torch.var_mean(pixels, dim=-2, keepdim=True)
    return ((pixels - mean) / (variance.sqrt() + 1e-6)).flatten(-2)


def window_normalized(images: Float[Tensor, "*batch c H W"], *, window: int) -> Float[Tensor, "*batch c H W"]:
    """Standardize each pixel by the mean and variance of the window around it, per channel: a target of SimMIM.

    `(t − mean) / sqrt(var + 1e-6)` with the unbiased variance over the pixels of the window that lie inside the image.
    Flat regions become rounding errors, because their variance is a difference of nearly equal numbers.

    Args:
        images: normalized by the mean and std of the dataset; any scale.
        window: side in pixels, odd, at least 3; may exceed the image. The published value is 47.

    Returns:
        float32.

    Raises:
        ValueError: if the window is not an odd integer of at least 3, or an image has fewer than two pixels.

    Example:
        >>> window_normalized(torch.tensor([[[1.0, 2.0, 3.0, 3.0]]]), window=3)
        tensor([[[-0.7071,  0.0000,  0.5773,  0.0000]]])

    Source: SimMIM, arXiv 2111.09886, as its authors train Swin Transformer V2, arXiv 2111.09883 (published code).
    """
    _check_integers(window=window)
    H, W = images.shape[-2:]
    if window < 3 or window % 2 == 0:
        raise ValueError(f"window={window} is not an odd number of pixels of at least 3")
    if H * W < 2:
        raise ValueError(f"images of {H} × {W} pixels have no variance")
    # The variance is computed as a difference of squares, which is accurate for small values: center each channel first
    pixels = images.float()
    pixels = pixels - pixels.mean(dim=(-2, -1), keepdim=True)
    mean, square = _window_mean(pixels, window), _window_mean(pixels.square(), window)
    rows, columns = (_window_count(length, window, images.device) for length in (H, W))
    count = rows[:, None] * columns
    variance = ((square - mean.square()) * (count / (count - 1))).clamp(min=0)
    return (pixels - mean) / (variance + 1e-6).sqrt()


def absolute_error(
    prediction: Float[Tensor, "*batch n d"], target: Float[Tensor, "*batch n d"]
) -> Float[Tensor, "*batch n"]:
    """Return the mean absolute error of each token, in float32.

    The loss of SimMIM is its mean over the masked tokens of all images. The published code divides by the number of
    masked pixels plus 1e-5: `error.sum() / (error.numel() + 1e-5 / patch**2)`, which is 0 if nothing is masked.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> absolute_error(torch.tensor([[1.0, -3.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([2.])

    Source: SimMIM, arXiv 2111.09886, section 3.4.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    return (prediction.float() - target.float()).abs().mean(dim=-1)


def squared_error(
    prediction: Float[Tensor, "*batch n d"], target: Float[Tensor, "*batch n d"]
) -> Float[Tensor, "*batch n"]:
    """Return the mean squared error of each token, in float32.

    The loss of MAE is its mean over the masked tokens.

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
    """Return the mean squared error of each of the four strips around the center, in float32.

    The outer term of the integrated task is the *sum* of the four, averaged over the batch. The top and bottom strips
    span the full width, the left and right ones the rows between them.

    Args:
        prediction: images of the whole view.
        target: images of the same shape.
        inner_H: height of the center in pixels, smaller than H by an even number.
        inner_W: width of the center in pixels, smaller than W by an even number.

    Returns:
        top, bottom, left, right.

    Raises:
        ValueError: if a number is not an integer, the shapes differ, or the center does not leave equal margins on
            opposite sides.

    Example:
        >>> view = torch.zeros(1, 4, 4)
        >>> view[:, 0] = 2.0
        >>> band_error(view, torch.zeros(1, 4, 4), inner_H=2, inner_W=2)
        tensor([4., 0., 0., 0.])

    Source: Beyond Masking, arXiv 2203.14313 (published code; the paper gives no formula).
    """
    _check_integers(inner_H=inner_H, inner_W=inner_W)
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    H, W = prediction.shape[-2:]
    rows, columns = (H - inner_H) // 2, (W - inner_W) // 2
    if not (0 < inner_H < H and 0 < inner_W < W) or (H - inner_H) % 2 or (W - inner_W) % 2:
        raise ValueError(f"a center of {inner_H} × {inner_W} leaves no equal margins in a view of {H} × {W} pixels")
    error = (prediction.float() - target.float()).square()
    between = error[..., rows : H - rows, :]
    strips = error[..., :rows, :], error[..., H - rows :, :], between[..., :columns], between[..., W - columns :]
    return torch.stack([strip.mean(dim=(-3, -2, -1)) for strip in strips], dim=-1)


def cosine_distance(
    prediction: Float[Tensor, "*batch n d"], target: Float[Tensor, "*batch n d"]
) -> Float[Tensor, "*batch n"]:
    """Return the squared distance between the L2-normalized vectors of each token, 2 − 2 cos, in float32.

    It is used with targets that are features of a network: by HPM with those of a teacher, and by LUT.

    Returns:
        from 0 (same direction) to 4 (opposite direction), up to rounding; 2 where a vector is zero.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> cosine_distance(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[5.0, 0.0], [1.0, 0.0]]))
        tensor([0., 2.])

    Source: HPM, arXiv 2304.05919 (feature targets in the published code); LUT, ECCV 2024.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    one, other = (F.normalize(x.float(), dim=-1, eps=1e-12) for x in (prediction, target))
    return 2 - 2 * (one * other).sum(dim=-1)


def soft_cross_entropy(
    logits: Float[Tensor, "*batch n c"], target: Float[Tensor, "*batch n c"]
) -> Float[Tensor, "*batch n"]:
    """Return the cross entropy of each token with a target over all classes, −Σ t · log softmax, in float32.

    Targets need not sum to one; their sum weights the token. DropPos divides the weighted sum over all scored tokens by
    the sum of their weights: `(weights * error).sum() / weights.sum()`.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 4), torch.full((1, 4), 0.25))
        tensor([1.3863])

    Source: DropPos, arXiv 2309.03576, section 3.
    """
    if logits.shape != target.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and target {tuple(target.shape)} differ in shape")
    logits, target = logits.float(), target.float()
    return target.sum(dim=-1) * logits.logsumexp(dim=-1) - (target * logits).sum(dim=-1)


_PAIRS_AT_ONCE = 2**15  # of each row, so that memory is bounded


def ranking_loss(
    prediction: Float[Tensor, "*batch n"], target: Float[Tensor, "*batch n"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Return the loss of predicting the order of each pair of tokens of a row, not their values; in float32.

    A pair (i, j) with target j > target i costs −log(sigmoid(prediction j − prediction i) + 1e-6). Sums run over
    ordered pairs, so every pair counts twice; pairs with equal targets do not count. The loss of HPM is one quotient
    over the whole batch, `loss.sum() / pairs.sum().clamp(min=1)`. The fraction of pairs in the right order,
    `right.sum() / pairs.sum().clamp(min=1)`, shows whether the predictor learns: it is one half by chance.

    Memory is bounded: pairs are processed in chunks of about 32,768 per row, and none is saved for the backward pass,
    because the gradient is computed in the forward pass. Second derivatives are not available.

    Args:
        prediction: for example of the loss of each token. Adding a constant to a row changes nothing.
        target: the values whose order is predicted; gets no gradient.

    Returns:
        loss, right, pairs: sums over the pairs of each row. Pairs with equal predictions do not count as right.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> ranking_loss(torch.tensor([0.0, 0.0, 9.0]), torch.tensor([1.0, 2.0, 3.0]))
        (tensor(1.3868), tensor(4.), tensor(6.))

    Source: HPM, arXiv 2304.05919, section 3.2 (relative loss prediction; the 1e-6 is from the published code).
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    prediction, n = prediction.float(), prediction.shape[-1]
    p, t = prediction.detach(), target.detach().float()
    loss = right = pairs = p.new_zeros(p.shape[:-1])
    slopes, pulled, rows = [], torch.zeros_like(p), max(1, _PAIRS_AT_ONCE // max(1, n))
    for first in range(0, max(1, n), rows):
        some = slice(first, first + rows)
        order = (t.unsqueeze(-2) - t[..., some].unsqueeze(-1)).sign()  # 1: j is above i, 0: equal
        difference = p.unsqueeze(-2) - p[..., some].unsqueeze(-1)
        share = difference.sigmoid()
        share = torch.where(order < 0, 1 - share, share)  # rounds as the published code does
        loss = loss - (order.abs() * (share + 1e-6).log()).sum(dim=(-2, -1))
        right = right + (order * difference > 0).sum(dim=(-2, -1))
        pairs = pairs + order.abs().sum(dim=(-2, -1))
        slope = order * share * (1 - share) / (share + 1e-6)
        slopes.append(slope.sum(dim=-1))
        pulled = pulled + slope.sum(dim=-2)
    gradient = torch.cat(slopes, dim=-1) - pulled
    return loss + (gradient * (prediction - p)).sum(dim=-1), right, pairs


def _window_mean(images: Float[Tensor, "*batch c H W"], window: int) -> Float[Tensor, "*batch c H W"]:
    """Average over the part of a square window around each pixel that lies in the image: rows, then columns."""
    flat = images.flatten(0, -3).unsqueeze(1)
    for kernel, padding in (((1, window), (0, window // 2)), ((window, 1), (window // 2, 0))):
        flat = F.avg_pool2d(flat, kernel, stride=1, padding=padding, count_include_pad=False)
    return flat.reshape(images.shape)


def _window_count(length: int, window: int, device: torch.device) -> Float[Tensor, " {length}"]:
    """Return how many places of a window around each place lie within the length."""
    places, reach = torch.arange(length, device=device), window // 2
    return ((places + reach).clamp(max=length - 1) - (places - reach).clamp(min=0) + 1).float()


def _check_integers(**numbers: int) -> None:
    for name, number in numbers.items():
        # A symbolic integer of a compiler has an index, too; so has a tensor, but reading it would synchronize
        if isinstance(number, (bool, Tensor)) or not hasattr(number, "__index__"):
            raise ValueError(f"{name}={number!r} is not an integer")
