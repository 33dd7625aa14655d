"""Draw every mask and every degradation on a photograph that comes with scikit-learn.

pip install -e '.[docs]'
python docs/gallery.py          writes docs/gallery.png
"""

import sys
from pathlib import Path

from mimkit import degrade, masking

import matplotlib
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # the recipes are scripts, not a package

from common.data.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from common.data.views import resize
from common.report.pictures import gray_out

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIDE, PATCH, GRID = 224, 16, 14


def gallery(image: Tensor, normalize: Normalize) -> dict[str, Tensor]:
    """Return each picture by its title; all are in [0, 1], of an image (1, 3, SIDE, SIDE) in [0, 1]."""
    generator = torch.Generator().manual_seed(4)

    def noise(*shape: int) -> Tensor:
        return torch.rand(1, *shape, generator=generator)

    def hidden(mask: Tensor) -> Tensor:
        return gray_out(image, mask, height=GRID, width=GRID, patch=PATCH)

    x, grid, small = normalize(image), {"height": GRID, "width": GRID}, {"small_H": 96, "small_W": 96}
    shrunken, black = degrade.area_resize(x, H=160, W=160), normalize(torch.zeros_like(image))
    kernels = degrade.random_kernels(noise(3, 9, 9), mean=1 / 81, std=0.02)
    mixing = degrade.random_kernels(noise(9, 9, 9), mean=1 / 81, std=0.02)
    pictures = {
        "zoom_in": degrade.zoom_in(x, window_H=160, window_W=160),
        "zoom_in_anywhere": degrade.zoom_in_anywhere(x, noise(2), window_H=160, window_W=160),
        "zoom_out, 160": degrade.zoom_out(x, noise(2), small_H=160, small_W=160),
        "zoom_out, 96": degrade.zoom_out(x, noise(2), **small),
        "paste on black": degrade.paste(shrunken, black, noise(2)),
        "fisheye, 0.25": degrade.fisheye(x, noise(3), least_twist=0.25, most_twist=0.25),
        "fisheye_at the center, 0.3": degrade.fisheye_at(x, torch.zeros(1, 2), torch.full((1,), 0.3)),
        "wave": degrade.wave(x, amplitude=0.1, frequency=10.0),
        "convolve_each, per channel": degrade.convolve_each(x, kernels),
        "convolve_each, mixing": degrade.convolve_each(x, mixing),
    }
    return {
        "image": image,
        "random_tokens, 75 %": hidden(masking.random_tokens(noise(GRID**2), num_masked=147)),
        "all_but_block, 7 × 7": hidden(masking.all_but_block(noise(2), **grid, block_height=7, block_width=7)),
        **{title: normalize.undo(picture) for title, picture in pictures.items()},
        "decolorize, 0.3": degrade.decolorize(image, saturation=0.3),
        "decolorize, 0": degrade.decolorize(image, saturation=0.0),
    }


if __name__ == "__main__":
    photograph = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
    square = photograph[:, :, 106 : 106 + photograph.shape[1]]
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
    pictures = gallery(normalize.unit(resize(square, SIDE, SIDE))[None], normalize)
    figure, axes = plt.subplots(3, 5, figsize=(12, 8))
    for axis, (title, picture) in zip(axes.flat, pictures.items(), strict=True):
        axis.imshow(picture[0].clamp(0, 1).permute(1, 2, 0))
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("gallery.png"), dpi=80)
