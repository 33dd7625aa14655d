"""Bugs of the published code of LoMaR and DropPos, reproduced because the golden files were recorded with them.

The recipes follow the papers instead.
"""

from mimkit.positions import smoothed_targets

import droppos
import lomar
import torch
from torch import Tensor


def released_pairs(windows: Tensor, *, num_images: int) -> Tensor:
    """Pair images and windows as the published code of LoMaR does, which is not every image with every window.

    There image n gets window (n + num_images · j) mod w, for j = 0…w − 1. If both counts have a common divisor c, these
    are only w / c distinct windows, c times each.

    Args:
        windows: of the whole batch, (…, w, k): their patches or their anchors.
        num_images: images of one device that share them.

    Returns:
        The windows of each image, (…, num_images, w, k).

    Example:
        >>> released_pairs(torch.tensor([[0], [1]]), num_images=2).squeeze(-1)  # one window each, twice
        tensor([[0, 0],
                [1, 1]])
    """
    count, device = windows.shape[-2], windows.device
    slots = num_images * torch.arange(count, device=device)
    return windows[..., (torch.arange(num_images, device=device)[:, None] + slots) % max(count, 1), :]


class ReleasedLoMaR(lomar.LoMaR):
    """LoMaR with one set of windows per batch, paired with its images as in the published code."""

    def anchors(self, noise: dict[str, Tensor]) -> Tensor:
        anchors = super().anchors(noise)
        return released_pairs(anchors[0], num_images=len(anchors))


class ColumnDropPos(droppos.DropPos):
    """DropPos whose smoothed targets are divided by the sums of their columns, as in the published code."""

    def targets(self, sigma: Tensor) -> Tensor:
        return super().targets(sigma).mT


class ReleasedDropPos(droppos.DropPos):
    """DropPos whose targets are those of a grid of patch × patch, cut, as in the published code at 224 × 224."""

    def targets(self, sigma: Tensor) -> Tensor:
        places = self.height * self.width
        return smoothed_targets(sigma, height=self.patch, width=self.patch).mT[:places, :places]
