"""Load trained methods and images for the analyses of the papers."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from common.config import DataSettings, MayDiffer, SettingsError, from_json
from common.data.loading import Loader, ViewDataset
from common.data.normalize import Normalize
from common.data.sources import Source, open_images
from common.data.views import CenterCrop
from common.files import read_json
from common.recipe import Method, Recipe
from common.training.checkpoint import Checkpoints, method_weights

from torch import Tensor


@dataclass(frozen=True)
class AnalysisConfig:
    """Settings shared by all analyses of a run."""

    run: MayDiffer[Path]
    """folder of the run; results are written there"""
    data: MayDiffer[str | None] = None
    """folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or mnist, digits or shapes; none: the images of the run"""


def recipe_of(name: str) -> Recipe:
    """Import the recipe with this name.

    Raises:
        SettingsError: if there is no such recipe.
    """
    modules = [path.stem for path in Path(__file__).parents[1].glob("*.py")]
    module = importlib.import_module(name) if name in modules else None
    if not hasattr(module, "RECIPE"):
        raise SettingsError(f"{name} is not a pre-training recipe: there is no recipes/{name}.py with a RECIPE")
    return module.RECIPE  # pyright: ignore


def load_method(folder: Path, *, needs: str = "", of: str = "") -> tuple[Any, Any]:
    """Build the method of a run with the weights of its newest checkpoint, on the CPU, in evaluation mode.

    The run may still be training.

    Args:
        folder: folder of the run.
        needs: an attribute that the method must have.
        of: the recipe whose method has this attribute, for the error message.

    Returns:
        The method and its settings.

    Raises:
        SettingsError: if the folder is not that of a pre-training run, the method lacks the attribute, or there is no
            checkpoint yet.
    """
    path = folder / "config.json"
    settings = read_json(path) if path.is_file() else {}
    if "recipe" not in settings:
        raise SettingsError(f"{folder} is not the folder of a run: it has no config.json that names a recipe")
    name = settings.pop("recipe")
    recipe = recipe_of(name)
    config = from_json(type(next(iter(recipe.presets.values()))), settings)
    found = Checkpoints(folder / "checkpoint").load()
    if found is None or not found.step:
        raise SettingsError(f"{folder} has no checkpoint yet")
    # The initial weights are part of the checkpoint, so their file is no longer needed
    channels = config.data.channels
    method = recipe.method(replace(config, weights=None), Normalize([0.0] * channels, [1.0] * channels))
    if not hasattr(method, needs or "encoder"):
        raise SettingsError(f"{folder} is no run of {of}")
    method.load_state_dict(method_weights(found.tensors))
    print(f"{folder}: {name} after {found.step} steps")
    return method.eval(), config


def images_to_look_at(
    settings: DataSettings, path: str | None = None, *, split: Literal["test", "train"] = "test"
) -> Source:
    """Open images for an analysis, which needs no labels.

    Args:
        settings: image settings of the run.
        path: folder or name of other images. All images are used if it contains neither train nor val.
        split: "test" is the val split of a folder.
    """
    settings = replace(settings, path=path or settings.path)
    if settings.folder and not any((settings.folder / name).is_dir() for name in ("train", "val")):
        split = "train"
    return open_images(settings, split, labels=False)


def central_views(source: Source, method: Method, config: Any, *, batch_size: int) -> Iterator[Tensor]:
    """Yield batches of the images of a source, center-cropped as for testing."""
    views = ViewDataset(source, CenterCrop(method.view_size, crop_fraction=config.finetune.crop_fraction))
    order = [(0, index) for index in range(len(source))]
    return iter(Loader(views, [order[i : i + batch_size] for i in range(0, len(order), batch_size)]))
