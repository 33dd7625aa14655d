"""Classify images with a fine-tuned network, or write the features of an encoder.

    python recipes/predict.py --run runs/mae photo.jpg more/photos                   classes and probabilities as CSV
    python recipes/predict.py --classifier classifier.safetensors DIR                the same, from the file alone
    python recipes/predict.py --run runs/mae DIR --features features.npy             features as well
    python recipes/predict.py --encoder runs/mae/encoder.safetensors DIR --features features.npy    features only

Images that cannot be read are named and skipped. The CSV has a line per image: path, predicted class, and the
probability of each class. Features are one array (images, dim) in
the order of the CSV: the input of the head or, of an encoder, the class token or else the mean of the patch tokens.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from common.analysis import images_to_look_at
from common.config import EMBEDDED, Count, DataSettings, PositiveShare, Run, SettingsError, explained, program
from common.data.files import Files
from common.data.sources import Source
from common.data.views import CenterCrop
from common.evaluation.features import FeatureExtractor
from common.evaluation.prediction import applied, open_classifier
from common.files import writing
from common.report.classes import draw_classified
from common.training.distributed import join_processes
from common.weights.encoders import open_encoder

import numpy as np
from torch import Tensor
from tyro.conf import Positional


@dataclass(frozen=True)
class Config:
    """The network, the images and the files to write."""

    images: Positional[tuple[Path, ...]] = (Path(EMBEDDED[0]),)
    """image files and folders, which are searched recursively; or mnist, digits or shapes: their test images"""
    run: Path | None = None
    """folder of a run with fine-tuning, which holds classifier.safetensors"""
    classifier: Path | None = None
    """classifier.safetensors, instead of --run"""
    encoder: str | None = None
    """an encoder, as for recipes/knn.py, instead of --run: features only"""
    out: Path | None = None
    """CSV file; none: predictions.csv in the folder of the classifier or, with --encoder, beside the features"""
    features: Path | None = None
    """.npy file for the features of all images; none: they are not written"""
    crop_fraction: PositiveShare | None = None
    """side of the center crop of an image, as a fraction of the short side; none: that of the classifier, else 0.875"""
    drawn: Count = 18
    """number of images in predictions.png, the first ones"""
    batch: Count = 64
    """images per forward pass"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if available"""
    workers: int = -1
    """data-loading processes; -1: one per free core, at most 16"""


def open_network(config: Config) -> tuple[Any, tuple[str, ...], float, Path]:
    """Return the network, the names of its classes, its crop fraction, and the CSV file.

    Raises:
        SettingsError: if not exactly one network is given, or it cannot be opened.
    """
    if sum(given is not None for given in (config.run, config.classifier, config.encoder)) != 1:
        raise SettingsError("give one of --run, --classifier and --encoder")
    if config.encoder is not None:
        if config.features is None:
            raise SettingsError("--encoder alone has no classes: give --features FILE.npy, or a --classifier")
        network = FeatureExtractor(*open_encoder(config.encoder))
        return network, (), 0.875, config.out or config.features.with_suffix(".csv")
    if config.run is not None and not (config.run / "classifier.safetensors").is_file():
        tune = f"python recipes/finetune.py --encoder {config.run / 'encoder.safetensors'}"
        raise SettingsError(f"{config.run} has no classifier.safetensors, which fine-tuning writes: {tune}")
    path = config.classifier or Path(config.run or "", "classifier.safetensors")
    network, head = open_classifier(path)
    return network, head.classes, head.crop_fraction, config.out or path.parent / "predictions.csv"


def outputs_of(network: Any, classes: Sequence[str], images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features of images (b, dim) and the probabilities of the classes (b, classes), on the CPU."""
    features = network.features(images) if classes else network(images)
    shares = network.head(features).float().softmax(dim=-1) if classes else features[:, :0]
    return features.float().cpu(), shares.cpu()


def main(config: Config) -> None:
    network, classes, crop_fraction, out = open_network(config)
    encoder, run = network.encoder, Run(device=config.device, workers=config.workers)
    source: Source
    if (name := " ".join(map(str, config.images))) in EMBEDDED:
        source = images_to_look_at(DataSettings(channels=encoder.channels), name)
    else:
        source = Files(config.images, encoder.channels)
    size = encoder.height * encoder.patch, encoder.width * encoder.patch
    crop = CenterCrop(size, crop_fraction=config.crop_fraction or crop_fraction)
    views, captions, features, count = [], [], [], 0
    with join_processes(config.device) as processes, writing(out) as file:
        network.to(processes.device)
        outputs, table = partial(outputs_of, network, classes), csv.writer(file)
        table.writerow(["path", "class", *classes] if classes else ["path"])
        for indices, pixels, (found, shares) in applied(
            outputs, source, crop, batch=config.batch, run=run, processes=processes
        ):
            best = [classes[i] for i in shares.argmax(dim=-1).tolist()] if classes else []
            for i, index in enumerate(indices):
                table.writerow([source.name(index), *best[i : i + 1], *(f"{x:.6g}" for x in shares[i].tolist())])
            room = config.drawn - len(views)
            views += list(pixels[:room].float() / 255)
            captions += [f"{name} {share.max():.0%}" for name, share in zip(best[:room], shares, strict=False)]
            features += [found.numpy()] if config.features else []
            count += len(indices)
        if not count:
            raise SettingsError(f"none of {len(source)} images can be read")
    print(f"{count} of {len(source)} images: {out}")
    if config.features:
        with explained(f"{config.features} cannot be written"), config.features.open("wb") as file:
            np.save(file, np.concatenate(features))
        print(f"features of dimension {encoder.dim}: {config.features}")
    if classes:
        picture = out.with_suffix(".png")
        draw_classified(picture, views, captions)
        print(f"the first {len(views)} images: {picture}")


if __name__ == "__main__":
    program(main, Config, name="predict", description=__doc__)
