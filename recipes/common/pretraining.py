"""Pre-training from the command line to the printed results: the entry point of every recipe."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from common.config import DataSettings, SettingsError, choose, explained, known, parse
from common.data.loading import Loader, ViewDataset, _read
from common.data.normalize import normalization
from common.data.sources import Data, Source, open_data
from common.data.views import CropFlip, WeakStrong
from common.evaluation.evaluations import EVALUATIONS, in_order
from common.evaluation.finetuning import check_finetuning
from common.files import write_json
from common.networks.vit import SIZES
from common.recipe import BaseConfig, Method, Recipe, resolved
from common.report.curves import draw_curves
from common.report.pictures import draw_pictures
from common.report.reconstruction import pictures_of
from common.report.tables import table
from common.runs import Stage, prepare
from common.training.distributed import Processes, join_processes, num_workers
from common.training.engine import train
from common.training.log import read_metrics
from common.training.operations import operations_per_image
from common.training.progress import in_words, limited_by
from common.training.step import Batches, to_device
from common.training.threads import with_threads
from common.weights.encoders import export

import torch
from torch import nn

FROM_PYTHON = "given from Python"  # the folder of such images, in settings and messages


def pretrain(
    recipe: Recipe,
    *,
    name: str,
    description: str | None = None,
    args: Sequence[str] | None = None,
    source: Source | None = None,
    labeled: Source | None = None,
    test: Source | None = None,
) -> dict[str, Any]:
    """Pre-train a method, draw its predictions, export and evaluate the encoder, and print the results.

    Args:
        recipe: method, presets and names of published weights.
        name: name of the recipe, and of the run unless `--name` is given.
        description: text shown at the top of the help.
        args: command-line arguments; by default those of the process.
        source: images for pre-training, any object of the protocol `Source`; by default those of `--data`.
        labeled: labeled images to train classifiers; by default those of `source`, if it has classes.
        test: labeled images to test classifiers; without them the encoder is not evaluated.

    Returns:
        The results, as written to `result.json`.

    Raises:
        SystemExit: with a message, if a setting is invalid or training fails.
    """
    args = list(sys.argv[1:] if args is None else args)
    given = {arg.partition("=")[0] for arg in args}
    try:
        if source is not None:
            if "--data" in given:
                raise SettingsError("--data has no effect, since the images are given from Python: leave it out")
            args += ["--data", FROM_PYTHON]
        config: BaseConfig = parse(recipe.presets, args, name=name, description=description, unused=recipe.unused)
        with join_processes(config.run.device) as processes:
            if choose(recipe.presets, args) == ("small", False) and not config.run.resume:
                processes.print("no GPU: --preset small, with a small network and small images; else --preset folder")
            for option in sorted(given & {f"--{unused.replace('_', '-')}" for unused in recipe.unused}):
                processes.print(f"{option} has no effect in {name}")
            if source is None:
                data = open_data(config.data, seed=config.run.seed)
            else:
                data = data_from_python(config.data, source, labeled, test)
            return _pretrain(recipe, replace(config, data=data.settings), name, data, processes)
    except SettingsError as error:
        raise SystemExit(f"{name}: {error}") from error


def data_from_python(settings: DataSettings, source: Source, labeled: Source | None, test: Source | None) -> Data:
    """Return the images that are given from Python, with their number of channels as setting.

    Raises:
        SettingsError: if labeled and test images differ in their classes, or images in their number of channels.
    """
    settings = replace(settings, channels=source.channels)
    if labeled is None and source.classes:
        labeled = source
    if labeled is None or test is None:
        missing = "labeled" if labeled is None else "test"
        return Data(settings, source, None, None, f"no {missing} images are given to `pretrain`")
    if list(labeled.classes) != list(test.classes):
        raise SettingsError(f"labeled images have the classes {labeled.classes}, but test images {test.classes}")
    if not source.channels == labeled.channels == test.channels:
        raise SettingsError(
            f"training images have {source.channels} channels, labeled {labeled.channels} and test {test.channels}"
        )
    return Data(settings, source, labeled, test)


def _pretrain(recipe: Recipe, config: BaseConfig, name: str, data: Data, processes: Processes) -> dict[str, Any]:
    folder = config.run.runs / (config.run.name or name)
    run = with_threads(config.run, folder, processes)

    # 1. Check that every stage can run on the images, which are opened once
    warn_if_gray(data.train, processes)
    config = resolved(replace(config, run=run), data, processes.world_size)
    evaluations = check_stages(config, data, processes)
    stage = Stage(processes, data, run, folder, "pre-training")

    # 2. Build the method
    normalize = normalization(config.data, data.train)
    torch.manual_seed(run.seed)
    method = recipe.method(config, normalize)
    if isinstance(getattr(method, "views", None), WeakStrong) and data.train.channels not in (1, 3):
        raise SettingsError(f"this method changes the colors of 1 or 3 channels, not of {data.train.channels}")
    if config.weights is not None:
        processes.print(f"{config.weights}:\n{recipe.load(method, config.weights)}")
    prepare(folder, name, config, run=run, data=data, stages=EVALUATIONS, processes=processes)
    encoder, all_of_it = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (method.encoder, method))
    processes.print(f"encoder {encoder:.1f} M parameters, the whole method {all_of_it:.1f} M")

    # 3. Pre-train it, and export the encoder
    results = {"pretraining": pretrain_method(method, config, stage)}
    path = folder / "encoder.safetensors"
    if processes.is_main:
        export(path, method.encoder, normalize)
    processes.barrier()

    # 4. Evaluate the encoder, fine-tuned or frozen, and train the same network from scratch for comparison
    for evaluation in evaluations:
        kind = EVALUATIONS[evaluation]
        part = replace(stage, folder=folder / evaluation, title=kind.title)
        if found := kind.run(path, config.finetune, part, results):
            results[evaluation] = found

    # 5. Report the results
    result = {"recipe": name, "device": str(processes.device), "devices": processes.world_size, **results}
    if processes.is_main:
        write_json(folder / "result.json", result)
        titles = {key: kind.title for key, kind in EVALUATIONS.items()}
        curves = {"pre-training": folder} | {titles[key]: folder / key for key in evaluations}
        metrics = {title: read_metrics(where / "metrics.jsonl") for title, where in curves.items()}
        with explained(f"{folder / 'curves.png'} cannot be written"):
            draw_curves(folder / "curves.png", {title: records for title, records in metrics.items() if records})
        processes.print(table(name, result, titles, folder))
    return result


def pretrain_method(method: nn.Module, config: BaseConfig, stage: Stage) -> dict[str, Any]:
    """Train a method on the training images, and draw its predictions.

    Returns:
        The result of `train`.
    """
    source, run, processes = stage.data.train, stage.run, stage.processes
    made: Any = method
    default = CropFlip(made.view_size, scale=config.data.crop_scale, flip=config.data.flip)
    views = ViewDataset(source, getattr(method, "views", default), seed=run.seed)

    def load(batches: Iterable[list[tuple[int, int]]]) -> Loader:
        """Load batches of views, given the (epoch, index) of their images."""
        return Loader(views, batches, workers=num_workers(run, processes), pin=processes.device.type == "cuda")

    def draw(into: Path) -> None:
        """Draw the predictions for up to eight evenly spaced images."""
        few = min(8, len(source))
        chosen = [(0, index * len(source) // few) for index in range(few)]
        images = to_device(next(iter(Loader(views, [chosen]))), processes.device)
        pictures = draw_some(made, images, few, seed=run.seed)
        with explained(f"{into / 'reconstruction.png'} cannot be written"):
            draw_pictures(into / "reconstruction.png", pictures)

    settings, operations = config.optimization, operations_per_image(method, views)
    shorter = partial(shorter_settings, config)
    result = train(method, load, num_images=len(source), settings=settings, stage=stage, draw=draw, shorter=shorter)
    stage.print(limited_by(result["waiting"]))
    return result | {"operations": operations * result["step"] * known(settings.batch_size)}


def shorter_settings(config: BaseConfig, seconds: float) -> str:
    """Return which settings would make a pre-training of more than three hours shorter; empty below."""
    if seconds < 3 * 3600:
        return ""
    epochs, (height, width), patch = config.optimization.epochs, config.data.image_size, config.network.patch
    less = max(1, int(epochs * 3600 / seconds))
    ways = [f"--epochs {less} (about {in_words(seconds * less / epochs)})"] if less < epochs else []
    if config.network.size in (sizes := list(SIZES))[1:]:
        ways.append(f"--size {sizes[sizes.index(config.network.size) - 1]}")
    half = [side // (2 * patch) * patch for side in (height, width)]
    if min(half) >= 4 * patch:
        ways.append(f"--image-size {half[0]} {half[1]}")
    if height % (2 * patch) == width % (2 * patch) == 0 and min(height, width) >= 8 * patch:
        ways.append(f"--patch {2 * patch}")
    return f"; shorter: {' or '.join(ways)}" if ways else ""


def warn_if_gray(source: Source, processes: Processes, *, looked_at: int = 16) -> None:
    """Print a warning if the images are RGB, but all of a few evenly spaced ones are gray."""
    if source.channels != 3 or not processes.is_main:
        return
    count = min(looked_at, len(source))
    images = [_read(source, i * len(source) // count) for i in range(count)]
    found = [image for image in images if isinstance(image, torch.Tensor)]
    if found and all(torch.equal(image, image[:1].expand_as(image)) for image in found):
        processes.print(f"all of {len(found)} images looked at are gray: --channels 1 describes them as well as RGB")


@torch.no_grad()
def draw_some(method: Method, images: Any, count: int, *, seed: int) -> Any:
    """Draw the predictions of a method on `count` images, with noise that depends only on the seed."""
    generator = torch.Generator().manual_seed(seed)
    noise = method.noise(lambda *shape: torch.rand(*shape, generator=generator), count)
    device = images.device if isinstance(images, torch.Tensor) else images[0].device
    return pictures_of(method, images, {name: values.to(device) for name, values in noise.items()})


def check_stages(config: BaseConfig, data: Data, processes: Processes) -> tuple[str, ...]:
    """Validate the settings of pre-training and evaluations, and return the evaluations that the images allow.

    Raises:
        SettingsError: if there are fewer images than a batch has, or the batch cannot be divided among the devices.
    """
    Batches(
        len(data.train), config.optimization, processes, seed=config.run.seed
    )  # raises if it cannot be filled or shared
    evaluations = in_order(config.evaluate)
    if not evaluations:
        return ()
    if data.unlabeled_because:
        processes.print(f"no evaluation at the end, pre-training only: {data.unlabeled_because}")
        return ()
    if any(EVALUATIONS[evaluation].trains for evaluation in evaluations):
        check_finetuning(config.finetune, data, world_size=processes.world_size, prefix="finetune.")
    return evaluations
