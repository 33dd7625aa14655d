"""Pictures of classes: a confusion matrix, and classified images."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from common.report.pictures import _save

import matplotlib.pyplot as plt
import torch.nn.functional as F
from matplotlib.colors import PowerNorm
from torch import Tensor

MOST_NUMBERS, MOST_NAMES = 20, 60  # classes up to which cells are labeled with numbers, and axes with names
MOST_CELLS = 150  # per side; smaller ones would be invisible


def draw_confusion(path: Path, confusion: Tensor, classes: Sequence[str], *, most: int = 12) -> None:
    """Draw a confusion matrix, each row as shares of a true class, beside a list of the most frequent confusions.

    Up to 20 classes, the cells show percentages; up to 60, the axes show names; above 150, a cell shows the largest
    share in a block of classes. Rare confusions are brightened by a square root.

    Args:
        path: the PNG file.
        confusion: counts (classes, classes), a row per true class and a column per predicted class.
        classes: names of the classes.
        most: number of confusions to list.
    """
    count, total = len(classes), confusion.sum(dim=1)
    share = 100 * confusion / total.clamp(min=1)[:, None]
    side = min(10.0, max(4.5, 0.42 * count if count <= MOST_NUMBERS else 0.17 * count))
    figure, (axis, beside) = plt.subplots(1, 2, figsize=(side + 4.5, side + 0.6), width_ratios=[side, 3.2])
    block = -(-count // MOST_CELLS)
    cells = F.max_pool2d(share[None], block, ceil_mode=True)[0]
    end = len(cells) * block - 0.5
    how = {"norm": PowerNorm(0.5, 0, 100), "interpolation": "nearest", "extent": (-0.5, end, end, -0.5)}
    shown = axis.imshow(cells.numpy(), cmap="magma", **how)
    figure.colorbar(shown, ax=axis, fraction=0.046, pad=0.03, ticks=[0, 1, 5, 20, 50, 100], label="% of the true class")
    names = [textwrap.shorten(name, 20, placeholder="…") if " " in name else name[:20] for name in classes]
    if count <= MOST_NAMES:
        size = 8 if count <= MOST_NUMBERS else 6
        axis.set_xticks(range(count), names, rotation=90, fontsize=size)
        axis.set_yticks(range(count), names, fontsize=size)
    if count <= MOST_NUMBERS:
        for row, column in ((i, j) for i in range(count) for j in range(count) if confusion[i, j]):
            value = float(share[row, column])
            color = "white" if value < 40 else "black"
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
    right = 100 * float(confusion.trace() / confusion.sum())
    axis.set(xlabel="predicted class", ylabel="true class")
    note = f"\neach cell: the largest share of {block} × {block} classes" if block > 1 else ""
    axis.set_title(f"{right:.1f} % of {int(total.sum())} images are right{note}", fontsize=9)
    wrong = confusion.clone().fill_diagonal_(0).flatten()
    counts, places = wrong.topk(min(most, count**2))
    lines = [
        f"{number:>4} × {names[place // count]} → {names[place % count]}"
        for number, place in zip(counts.tolist(), places.tolist(), strict=True)
        if number
    ]
    title = "most frequent confusions\nimages × true class → predicted class\n"
    beside.text(0, 1, "\n".join([title, *lines]), va="top", fontsize=8, transform=beside.transAxes)
    beside.axis("off")
    figure.tight_layout()
    _save(figure, path)


def draw_classified(path: Path, images: Sequence[Tensor], captions: Sequence[str]) -> None:
    """Draw images (c, H, W) in [0, 1] as a grid, each with its caption, and write it to a PNG file."""
    columns = min(len(images), 6)
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.9 * columns, 2.2 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions, strict=False):
        axis.imshow(image.movedim(0, -1).expand(-1, -1, 3).numpy(), vmin=0, vmax=1)
        axis.set_title(textwrap.fill(caption, 26), fontsize=8)
    figure.tight_layout()
    _save(figure, path)
