"""Pictures of predicted patches, for all methods that predict patches."""

from typing import Any

from common.data.normalize import Normalize
from common.report.pictures import Pictures, gray_out, shown
from mimkit.tokens import patchify, put, take, unpatchify

import torch
from torch import Tensor


def pictures_of(method: Any, images: Any, noise: dict[str, Tensor]) -> Pictures:
    """Return the pictures of a method, from its `pictures` or from the predictions of its `reconstruct`."""
    if hasattr(method, "pictures"):
        return method.pictures(images, noise)
    prediction, target, masked = method.reconstruct(images, noise)
    sizes = {"height": method.height, "width": method.width, "patch": method.patch}
    image = method.normalize.unit(images)
    return reconstruction(method.normalize, image, prediction, target, masked, **sizes)


def reconstruction(
    normalize: Normalize,
    image: Tensor,
    prediction: Tensor,
    target: Tensor,
    indices: Tensor,
    *,
    seen: Tensor | None = None,
    **sizes: int,
) -> Pictures:
    """Return pictures of predicted patches, of their targets, and of the reconstructed image.

    Args:
        normalize: normalization of the images.
        image: original images (b, c, H, W) in [0, 1].
        prediction, target: values of patches (b, k, values), as compared by the loss.
        indices: indices of these patches (b, k).
        seen: input of the encoder; by default the image without these patches.
        sizes: `height` and `width` of the grid in patches, and `patch`, the side of a patch in pixels.
    """
    patches = patchify(normalize(image), patch=sizes["patch"]).float()
    pixels, prediction, target = take(patches, indices), prediction.float(), target.float()
    mask = torch.zeros(patches.shape[:2], dtype=torch.bool, device=indices.device).scatter(1, indices, True)
    seen = gray_out(image, mask, **sizes) if seen is None else seen
    filled = as_pixels(prediction, target, pixels, channels=len(normalize.mean))
    rebuilt = normalize.undo(unpatchify(put(filled, indices, into=patches), **sizes))
    columns = {"input": image, "seen": seen, "reconstruction": rebuilt}
    note = "reconstruction: patches that are not predicted are those of the input"
    if not torch.allclose(target, pixels, atol=1e-4):
        blank = torch.zeros_like(patches)
        columns |= {
            "prediction": shown(unpatchify(put(prediction, indices, into=blank), **sizes)),
            "target": shown(unpatchify(put(target, indices, into=blank), **sizes)),
        }
        note += ", predicted ones have the brightness and contrast of the true ones; prediction and target: normalized"
    return Pictures(columns, note)


def as_pixels(prediction: Tensor, target: Tensor, pixels: Tensor, *, channels: int) -> Tensor:
    """Map predictions of normalized patches to pixels with the scale and shift that map their targets to pixels.

    They are fitted per patch and channel by least squares; predictions of pixels are unchanged.
    """
    p, t, x = (patches.unflatten(-1, (-1, channels)) for patches in (prediction, target, pixels))
    centered = t - t.mean(dim=-2, keepdim=True)
    scale = (centered * x).sum(dim=-2, keepdim=True) / centered.square().sum(dim=-2, keepdim=True).clamp(min=1e-6)
    return (x.mean(dim=-2, keepdim=True) + (p - t.mean(dim=-2, keepdim=True)) * scale).flatten(-2)
