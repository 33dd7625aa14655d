"""Random erasing, mixup, cutmix and label smoothing of batches on the device, as pure functions of explicit noise.

The laws are those of timm's `RandomErasing` and `Mixup`, with which MAE fine-tunes. The partner of an image is its
neighbor in the batch, images 2k and 2k + 1, and what a step has in common is drawn once per step. The result thus
depends neither on the number of devices nor on the size of the micro-batches, as long as these are even.
"""

import math

from common.randomness import Noise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

ATTEMPTS = 10  # at a box that fits into the image
AREA = 0.02, 1 / 3  # of a box, as a fraction of the image
ASPECT = math.log(0.3), math.log(1 / 0.3)  # logarithm of height / width


def symmetric_beta(noise: Float[Tensor, "*batch 2"], alpha: float | Tensor) -> Float[Tensor, "*batch"]:
    """Map uniform noise to the distribution Beta(`alpha`, `alpha`), without rejection.

    Args:
        noise: uniform in [0, 1).
        alpha: parameter of the distribution, above 0.

    Source: Student's t with 2 `alpha` degrees of freedom by Bailey's polar method, mapped to Beta as in
        Devroye, Random variate generation in one line of code, 1996.
    """
    log_p, cosine = noise[..., 0].log() / alpha, (2 * math.pi * noise[..., 1]).cos()
    square = -log_p.expm1() * cosine.square()  # t² / (2 alpha), times p
    return 0.5 + 0.5 * cosine.sign() * (square / (log_p.exp() + square)).sqrt()


def cutmix_weights(ratio: Float[Tensor, ""], noise: Float[Tensor, "2"], *, H: int, W: int) -> Float[Tensor, "{H} {W}"]:
    """Return 0 inside a box, whose pixels come from the partner, and 1 outside.

    The box has the aspect ratio of the image and the area 1 − `ratio`, before it is clipped at the border.

    Args:
        ratio: share of the image itself, before the clipping.
        noise: uniform in [0, 1); row and column of the center of the box, every pixel equally likely.
        H, W: size of the image in pixels.
    """
    side = (1 - ratio.double()).sqrt()  # in double precision, as its product with the size is truncated
    inside = []
    for center, size in zip(noise, (H, W), strict=True):
        length, middle = (size * side).long(), (size * center).long().clamp(max=size - 1)
        places = torch.arange(size, device=noise.device)
        inside.append((places >= middle - length // 2) & (places < middle + (length + 1) // 2))
    return 1 - (inside[0][:, None] & inside[1]).float()


def mixing_weights(
    noise: Float[Tensor, "5"], *, mixup: float, cutmix: float, H: int, W: int
) -> Float[Tensor, "{H} {W}"]:
    """Draw the weight of each pixel of an image; its partner's has the rest of 1.

    Mixup gives all pixels the same weight, distributed as Beta(`mixup`, `mixup`); cutmix cuts out a box whose area
    follows Beta(`cutmix`, `cutmix`). If both are enabled, each is chosen with probability ½.

    Args:
        noise: uniform in [0, 1); the choice, two values for the ratio, row and column of the box.
        mixup, cutmix: parameters of the beta distributions; 0: disabled.
        H, W: size of the image in pixels.
    """
    cut = noise[0] < (0.5 if mixup and cutmix else float(cutmix > 0))
    ratio = symmetric_beta(noise[1:3], torch.where(cut, cutmix, mixup))
    return torch.where(cut, cutmix_weights(ratio, noise[3:], H=H, W=W), ratio)


def mix_pairs(
    images: Float[Tensor, "b c H W"], targets: Float[Tensor, "b classes"], weights: Float[Tensor, "H W"]
) -> tuple[Float[Tensor, "b c H W"], Float[Tensor, "b classes"]]:
    """Mix images 2k and 2k + 1 pixel by pixel, and their targets with the mean weight of the pixels.

    Args:
        images, targets: images and soft targets, of an even number.
        weights: weight of each pixel of an image, in [0, 1].

    Raises:
        ValueError: if the number of images is odd.
    """
    if len(images) % 2:
        raise ValueError(f"mixup and cutmix mix pairs: a batch of {len(images)} images is odd")

    def mixed(values: Tensor, weight: Tensor) -> Tensor:
        """Mix each row with its neighbor."""
        return torch.lerp(values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1), values, weight)

    return mixed(images, weights), mixed(targets, weights.mean())


def smoothed(labels: Int[Tensor, " b"], *, num_classes: int, smoothing: float) -> Float[Tensor, "b {num_classes}"]:
    """Return one-hot targets, of which a share of `smoothing` is spread evenly over all classes."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def erase(
    images: Float[Tensor, "*batch c H W"],
    fill: Float[Tensor, "*batch c H W"],
    noise: Float[Tensor, "*batch 23"],
    *,
    probability: float,
) -> Float[Tensor, "*batch c H W"]:
    """Replace a random box of some of the images by `fill`.

    The box is the first of ten draws that is smaller than the image in both directions; if there is none, the image
    stays the same.

    Args:
        images: the images.
        fill: what the box shows, usually noise.
        noise: uniform in [0, 1); whether to erase, row and column of the box, ten areas, ten aspect ratios.
        probability: probability of erasing an image.

    Source: Random Erasing Data Augmentation, arXiv 1708.04896; ranges and attempts as in timm.
    """
    H, W = images.shape[-2:]
    chance, row, column, areas, aspects = noise.split((1, 1, 1, ATTEMPTS, ATTEMPTS), dim=-1)
    area, aspect = (low + (high - low) * u for (low, high), u in ((AREA, areas), (ASPECT, aspects)))
    heights, widths = ((H * W * area * (sign * aspect).exp()).sqrt().round() for sign in (1, -1))
    fits = (heights < H) & (widths < W)
    first = fits & (fits.cumsum(dim=-1) == 1)
    height, width = ((sides * first).sum(dim=-1, keepdim=True) for sides in (heights, widths))
    rows, columns = _interval(row, height, H) & (chance < probability), _interval(column, width, W)
    return torch.where((rows.unsqueeze(-1) & columns.unsqueeze(-2)).unsqueeze(-3), fill, images)


def _interval(noise: Tensor, length: Tensor, size: int) -> Tensor:
    """Return which of `size` places lie in an interval of this length, which begins anywhere with equal probability."""
    first = torch.minimum((noise * (size - length + 1)).floor(), size - length)  # the product may be rounded up
    places = torch.arange(size, device=noise.device)
    return (places >= first) & (places < first + length)


def normal(noise: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Map uniform noise to the standard normal distribution."""
    return math.sqrt(2) * (2 * noise - 1).clamp(min=2**-24 - 1).erfinv()


class Mixing(nn.Module):
    """Random erasing of each image, then mixup or cutmix of pairs; labels become soft targets.

    Args:
        num_classes: number of classes.
        mixup, cutmix: parameter of the beta distribution of the mixing ratio; 0: disabled.
        smoothing: label smoothing, the share of each target that is spread over all classes.
        erasing: probability of replacing a box of an image by standard normal noise.
    """

    compile_alone = True  # tells the engine to compile it separately under DDP

    def __init__(
        self,
        num_classes: int,
        *,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        smoothing: float = 0.1,
        erasing: float = 0.25,
    ) -> None:
        super().__init__()
        self.num_classes, self.mixup, self.cutmix = num_classes, mixup, cutmix
        self.smoothing, self.erasing = smoothing, erasing

    def noise(self, rand: Noise, batch: int, *shape: int) -> dict[str, Tensor]:
        """Draw the noise for `batch` images of a shape (c, H, W); mixing is the same for all images of a step."""
        noise = {"mixing": rand.shared(5)} if self.mixup or self.cutmix else {}
        if self.erasing:
            noise |= {"erasing": rand(batch, 3 + 2 * ATTEMPTS), "fill": rand(batch, *shape)}
        return noise

    def forward(
        self, images: Float[Tensor, "b c H W"], labels: Int[Tensor, " b"], noise: dict[str, Tensor]
    ) -> tuple[Float[Tensor, "b c H W"], Float[Tensor, "b classes"]]:
        """Return the mixed images, which are normalized before and after, and their soft targets."""
        targets = smoothed(labels, num_classes=self.num_classes, smoothing=self.smoothing)
        if self.erasing:
            images = erase(images, normal(noise["fill"]), noise["erasing"], probability=self.erasing)
        if not (self.mixup or self.cutmix):
            return images, targets
        H, W = images.shape[-2:]
        weights = mixing_weights(noise["mixing"], mixup=self.mixup, cutmix=self.cutmix, H=H, W=W)
        return mix_pairs(images, targets, weights)
