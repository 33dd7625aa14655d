"""Pictures of images, predictions and maps."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pictures:
    """Columns of images to draw, with one row per sample.

    Args:
        columns: title → images (b, c, H, W) in [0, 1].
        note: explanation below the figure.
        rows: label at the left of each row.
        captions: caption below each row.
    """

    columns: dict[str, Tensor]
    note: str = ""
    rows: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()


def shown(normalized: Tensor) -> Tensor:
    """Map normalized pixels from [−2.5, 2.5] to [0, 1] for display; no statistics of the input are used."""
    return (normalized / 5 + 0.5).clamp(0, 1)


def draw_pictures(path: Path, pictures: Pictures) -> None:
    """Draw the columns of images as a figure, and write it to a PNG file."""
    rows, columns = min(len(images) for images in pictures.columns.values()), len(pictures.columns)
    side, gap, between = 1.5, 0.1, 0.22 if pictures.captions else 0.1  # in inches; multiples of a pixel
    tall = side * min(1.0, max(images.shape[-2] / images.shape[-1] for images in pictures.columns.values()))
    left = gap / 2 + (0.2 if pictures.rows else 0)
    width = left + columns * (side + gap) - gap / 2
    note = textwrap.fill(pictures.note, int(17 * width))
    head, foot = 0.3, 0.14 * len(note.splitlines()) + between + 0.04
    height = head + rows * tall + (rows - 1) * between + foot
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    figure.subplots_adjust(
        left=left / width,
        right=1 - gap / 2 / width,
        bottom=foot / height,
        top=1 - head / height,
        wspace=gap / side,
        hspace=between / tall,
    )
    for column, (title, images) in enumerate(pictures.columns.items()):
        axes[0, column].set_title(title, fontsize=8)
        for row in range(rows):
            picture = images[row].detach().float().clamp(0, 1).cpu()
            picture = picture if len(picture) in (1, 3) else picture.mean(dim=0, keepdim=True)
            cmap = "gray" if len(picture) == 1 else None
            axes[row, column].imshow(picture.permute(1, 2, 0).squeeze(-1).numpy(), cmap=cmap, vmin=0, vmax=1)
            axes[row, column].axis("off")
    for row, text in enumerate(pictures.rows[:rows]):
        at = {"x": -0.05, "y": 0.5, "transform": axes[row, 0].transAxes}
        axes[row, 0].text(s=text, rotation=90, ha="right", va="center", fontsize=7, **at)
    for axis, caption in zip(axes[:, 0], pictures.captions, strict=False):
        axis.annotate(caption, (0, 0), (0, -3), "axes fraction", "offset points", va="top", fontsize=7)
    figure.text(0.5, 0.05 / height, note, fontsize=7, ha="center", va="bottom")
    _save(figure, path)


def draw_grid(
    path: Path, grid: Tensor, *, rows: Sequence[float], columns: Sequence[float], x: str, y: str, title: str
) -> None:
    """Draw percentages as a grid of colored cells with their values, and write it to a PNG file."""
    figure, axis = plt.subplots(figsize=(1.1 * len(columns) + 1.5, 0.9 * len(rows) + 1.2))
    axis.imshow(grid.numpy(), cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axis.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
    for i, cells in enumerate(grid.tolist()):
        for j, cell in enumerate(cells):
            axis.text(j, i, f"{cell:.1f}", ha="center", va="center", color="white" if cell < 60 else "black")
    axis.set(xlabel=x, ylabel=y, title=title)
    figure.tight_layout()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
    temporary.replace(path)


def gray_out(images: Tensor, mask: Tensor, *, height: int, width: int, patch: int) -> Tensor:
    """Replace the masked patches of images in [0, 1] by gray."""
    cover = mask.view(len(mask), 1, height, 1, width, 1).expand(-1, 1, -1, patch, -1, patch)
    return torch.where(cover.reshape(len(mask), 1, height * patch, width * patch), 0.5, images)


def maps(values: Tensor, *, height: int, width: int) -> Tensor:
    """Color one value per patch, from the minimum (dark) to the maximum (bright) of each map."""
    least, most = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    shares = ((values - least) / (most - least).clamp(min=1e-12)).float().cpu().numpy()
    colors = torch.from_numpy(matplotlib.colormaps["viridis"](shares)[..., :3]).float()  # (b, n, 3)
    return colors.view(len(values), height, width, 3).movedim(-1, 1)


def framed(image: Tensor, row: int, column: int, *, patch: int, rows: int = 1, columns: int = 1) -> Tensor:
    """Draw a white and red frame inside the border of a patch, or of a block of patches, of an image in [0, 1].

    Small images are enlarged.
    """
    by = max(1, 224 // min(image.shape[-2:]))
    image = image if len(image) in (1, 3) else image.mean(dim=0, keepdim=True)
    image = image.expand(3, -1, -1).repeat_interleave(by, dim=1).repeat_interleave(by, dim=2)
    framed, line = image.clone(), max(1, patch * by // 8)
    for color, depth in (((1.0, 1.0, 1.0), 0), ((1.0, 0.0, 0.0), line), (None, 2 * line)):
        down = slice(row * patch * by + depth, (row + rows) * patch * by - depth)
        across = slice(column * patch * by + depth, (column + columns) * patch * by - depth)
        inside = image[:, down, across]
        framed[:, down, across] = inside if color is None else torch.tensor(color).to(inside).view(3, 1, 1)
    return framed


def heat_maps(images: Tensor, values: Tensor, *, height: int, width: int, patch: int) -> Tensor:
    """Overlay images in [0, 1] with one value per patch, from the minimum (blue) to the maximum (red) of each image."""
    least, most = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    shares = ((values - least) / (most - least).clamp(min=1e-12)).float().cpu().numpy()
    colors = torch.from_numpy(matplotlib.colormaps["jet"](shares)[..., :3]).to(images)  # (b, n, 3)
    maps = colors.view(len(images), height, 1, width, 1, 3).expand(-1, -1, patch, -1, patch, -1)
    gray = images.mean(dim=1, keepdim=True)
    return 0.5 * gray + 0.5 * maps.reshape(len(images), height * patch, width * patch, 3).movedim(-1, 1)
