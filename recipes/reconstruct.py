"""Draw reconstructions of a trained method: the image, the input of the encoder, the prediction and its target.

    python recipes/reconstruct.py --run runs/mae                                  the test images of the run
    python recipes/reconstruct.py --run runs/mae --data DIR --count 16            images of your own
    python recipes/reconstruct.py --recipe mae --weights FILE.pth --data DIR      a published checkpoint

Each row is an image; its losses, computed for this image alone, are printed below it and in a table. The newest
checkpoint of a run is used, which may still be training. A published checkpoint must contain the decoder; it is loaded
with the settings of a preset, changed by --options, for example --options="--size large --no-normalize-target".
"""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from common.analysis import images_to_look_at, load_method, recipe_of
from common.config import Count, SettingsError, parse, program
from common.data.loading import Loader, ViewDataset
from common.data.normalize import normalization
from common.data.views import CenterCrop
from common.recipe import Method
from common.report import Pictures, draw_pictures, pictures_of

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Settings of the method and the images."""

    run: Path | None = None
    """folder of a pre-training run"""
    recipe: str = ""
    """recipe of --weights, for example mae"""
    weights: Path | None = None
    """published checkpoint, instead of a run"""
    preset: str = "imagenet"
    """preset of the recipe for --weights"""
    options: str = ""
    """options of the recipe that differ from the preset, in one string"""
    data: str | None = None
    """folder of images, or mnist, digits or shapes; none: those of the run"""
    split: Literal["test", "train"] = "test"
    """split of the images; test is val of a folder, and a folder without train and val is used as a whole"""
    count: Count = 8
    """number of images, evenly spaced in the split"""
    seed: int = 0
    """seed of the method's noise, such as masks"""
    out: Path | None = None
    """file of the picture; none: reconstructions.png in the folder of the run, or in this folder for --weights"""


def main(config: Config) -> None:
    if not (config.run is None) == bool(config.recipe) == (config.weights is not None):
        raise SettingsError("give either the --run of a recipe here, or a --recipe and its --weights")
    method, settings = published(config) if config.run is None else load_method(config.run)
    source = images_to_look_at(settings.data, config.data, split=config.split)
    count = min(config.count, len(source))
    center = CenterCrop(method.view_size, crop_fraction=settings.finetune.crop_fraction)
    views = ViewDataset(source, getattr(method, "views", center), seed=config.seed)
    chosen = [index * len(source) // count for index in range(count)]
    images = next(iter(Loader(views, [[(0, index) for index in chosen]])))
    generator = torch.Generator().manual_seed(config.seed)
    noise = method.noise(lambda *shape: torch.rand(*shape, generator=generator), count)

    pictures, losses = reconstruct(method, images, noise, epochs=settings.optimization.epochs)
    captions = tuple(
        f"{number}:  " + ",  ".join(f"{name} {value:.3f}" for name, value in row.items())
        for number, row in enumerate(losses, 1)
    )
    out = config.out or (config.run or Path()) / "reconstructions.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_pictures(out, replace(pictures, captions=captions))
    print(table([source.name(index) for index in chosen], losses), f"\nfiles:\n  {out}", sep="\n")


def published(config: Config) -> tuple[Any, Any]:
    """Build a method with the weights of a published checkpoint, and return it with its settings.

    Raises:
        SettingsError: if no weights are published for the recipe, or the file does not match it.
    """
    assert config.weights is not None
    recipe = recipe_of(config.recipe)
    if not recipe.published_names:
        raise SettingsError(f"--recipe {config.recipe}: no weights of it were published that it could read")
    settings = parse(recipe.presets, ["--preset", config.preset, *shlex.split(config.options)])
    data = replace(settings.data, path=config.data or settings.data.path)
    method = recipe.method(settings, normalization(data, images_to_look_at(data, split=config.split)))
    print(f"{config.weights}:\n{recipe.load(method, config.weights, decoder=True)}")
    return method.eval(), replace(settings, data=data)


@torch.no_grad()
def reconstruct(
    method: Method, images: Tensor | tuple[Tensor, ...], noise: dict[str, Tensor], *, epochs: int
) -> tuple[Pictures, list[dict[str, float]]]:
    """Draw each image and compute its losses, independently of the other images.

    Args:
        method: a trained method.
        images: input of the method, which may be several views of each image.
        noise: noise of the method for all images.
        epochs: number of epochs of the training; schedules are evaluated at the last one.
    """
    progress = torch.tensor(1 - 1 / epochs, dtype=torch.float64)
    drawn, losses = [], []
    for i in range(len(noise[next(iter(noise))])):
        one = images[i : i + 1] if isinstance(images, Tensor) else tuple(view[i : i + 1] for view in images)
        alone: Any = one, {name: values[i : i + 1] for name, values in noise.items()}
        losses.append({name: float(value) for name, value in method(*alone, progress).items()})
        drawn.append(pictures_of(method, *alone))
    columns = {title: torch.cat([one.columns[title] for one in drawn]) for title in drawn[0].columns}
    return Pictures(columns, drawn[0].note), losses


def table(names: list[str], losses: list[dict[str, float]]) -> str:
    """Format a table of the losses of each image, and their means."""
    means = {key: sum(row[key] for row in losses) / len(losses) for key in losses[0]}
    first, widths = max(map(len, names)) + 4, [max(12, len(key) + 2) for key in means]
    rule = "─" * (first + sum(widths))

    def line(name: str, cells: Iterable[str]) -> str:
        """Format a row of the table."""
        return f"{name:<{first}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    lines = ["", line("", means), rule]
    for number, (name, row) in enumerate(zip(names, losses, strict=True), 1):
        lines.append(line(f"{f'{number}:':<4}{name}", (f"{value:.4f}" for value in row.values())))
    return "\n".join([*lines, rule, line("mean", (f"{value:.4f}" for value in means.values()))])


if __name__ == "__main__":
    program(main, Config, name="reconstruct", description=__doc__)
