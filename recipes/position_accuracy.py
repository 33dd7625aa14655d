"""Measure how well a trained DropPos predicts positions, for a grid of mask ratios and position drop ratios.

    python recipes/droppos.py && python recipes/position_accuracy.py --run runs/droppos
    python recipes/position_accuracy.py --run runs/droppos --data DIR --mask-ratios 0 0.5 --drop-ratios 0.5 1

The accuracy is the percentage of visible patches with a dropped position whose most probable position is the true one,
without attentive weights and smoothing. Chance level is 1 / the number of positions of the grid.

Paper: DropPos, arXiv 2309.03576, tables S1 to S3.
"""

from dataclasses import dataclass
from typing import Any

from common.analysis import AnalysisConfig, central_views, images_to_look_at, load_method
from common.config import Count, program
from common.files import write_json
from common.report.pictures import draw_grid
from mimkit.masking import random_tokens
from mimkit.tokens import patchify, split, take

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Settings of the measurement."""

    mask_ratios: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    """rows: share of the patches that is masked"""
    drop_ratios: tuple[float, ...] = (0.25, 0.5, 0.75, 0.95)
    """columns: share of the visible patches whose position is dropped"""
    seed: int = 0
    """seed of the masks"""
    batch_size: Count = 256
    """images per forward pass"""


@torch.no_grad()
def right_places(method: Any, images: Tensor, noise: dict[str, Tensor], *, masked: int, dropped: int) -> Tensor:
    """Count the correctly predicted positions among the dropped ones of a batch.

    Args:
        method: a trained DropPos.
        images: images of the batch.
        noise: uniform in [0, 1), each (b, n); "mask" for all patches, the others for the visible ones, cut to length.
        masked: number of masked patches per image.
        dropped: number of dropped positions per image.
    """
    patches = patchify(method.normalize(images), patch=method.patch)
    visible, _ = split(random_tokens(noise["mask"], num_masked=masked), num_masked=masked)
    noise = noise | {name: noise[name][:, : visible.shape[1]] for name in noise if name != "mask"}
    lost = random_tokens(noise["drop"], num_masked=dropped)
    found = method.locate(take(patches, visible), visible, lost, noise).argmax(dim=-1)
    return (lost & (found == visible)).sum()


def main(config: Config) -> None:
    method, trained = load_method(config.run, needs="locate", of="droppos.py, whose method predicts positions")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    method.to(device)
    places = method.height * method.width
    counts = [[method.count(mask, drop) for drop in config.drop_ratios] for mask in config.mask_ratios]
    right = torch.zeros(len(config.mask_ratios), len(config.drop_ratios), device=device)
    generator, seen = torch.Generator().manual_seed(config.seed), 0
    source = images_to_look_at(trained.data, config.data)
    for images in central_views(source, method, trained, batch_size=config.batch_size):
        seen += len(images)
        for row in range(len(counts)):
            for column, (masked, dropped) in enumerate(counts[row]):
                names = "mask", "drop", "permuted", "shuffle"
                noise = {name: torch.rand(len(images), places, generator=generator).to(device) for name in names}
                found = right_places(method, images.to(device), noise, masked=masked, dropped=dropped)
                right[row, column] += found
    asked = torch.tensor([[seen * dropped for _, dropped in row] for row in counts], dtype=torch.float64)
    grid = 100 * right.cpu().double() / asked
    report(config, grid, places, seen)


def report(config: Config, grid: Tensor, places: int, seen: int) -> None:
    """Print the grid with the means of its rows and columns, draw it, and write it as JSON."""
    lines = [f"positions found in {seen} test images, %; chance {100 / places:.2f} %", ""]
    lines += ["masked \\ dropped" + "".join(f"{ratio:>8g}" for ratio in config.drop_ratios) + "    mean"]
    for ratio, cells in zip(config.mask_ratios, grid.tolist(), strict=True):
        lines += [f"{ratio:>16g}" + "".join(f"{cell:>8.2f}" for cell in [*cells, sum(cells) / len(cells)])]
    lines += [f"{'mean':>16}" + "".join(f"{mean:>8.2f}" for mean in [*grid.mean(dim=0).tolist(), grid.mean().item()])]
    print("\n".join(lines))
    result = {"mask_ratios": config.mask_ratios, "drop_ratios": config.drop_ratios, "seed": config.seed}
    result |= {"images": seen, "accuracy": grid.tolist(), "mean": grid.mean().item()}
    write_json(config.run / "position_accuracy.json", result)
    axes = {"rows": config.mask_ratios, "columns": config.drop_ratios, "x": "positions dropped", "y": "patches masked"}
    draw_grid(config.run / "position_accuracy.png", grid, **axes, title="positions found, %")
    print("", f"{config.run / 'position_accuracy.png'}", f"{config.run / 'position_accuracy.json'}", sep="\n")


if __name__ == "__main__":
    program(main, Config, name="position_accuracy", description=__doc__)
