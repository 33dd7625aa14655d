"""Predictions of new images: a line and a row of features for each image that can be read, and none for the others."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.data.files import Files
from common.data.views import CenterCrop
from common.evaluation.features import FeatureExtractor
from common.evaluation.finetuning import DIGITS, write_classifier
from common.evaluation.prediction import open_classifier
from common.weights.encoders import open_encoder

import numpy as np
import pytest
import torch
from PIL import Image
from probes import exported
from small_runs import called, refused
from test_classifiers import CLASSES, classifier

SETTINGS = ("--device", "cpu", "--workers", "0", "--batch", "3")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven images in two folders, and two files that are none: the second and the last of nine."""
    folder, values = tmp_path / "images", np.random.default_rng(0)
    for name in ("a", "c", "d", "e", "f", "sub/a", "sub/b"):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.integers(256, size=(30, 40), dtype=np.uint8)).save(path)
    (folder / "b.jpg").write_bytes(b"no image")
    (folder / "sub" / "c.jpg").write_bytes(b"")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    write_classifier(folder, classifier("plain", "mean"), replace(DIGITS, crop_fraction=0.8), CLASSES)
    return folder


def table(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_each_readable_image_has_its_probabilities_and_its_features(images: Path, run: Path, tmp_path: Path) -> None:
    printed = called("predict", "--run", run, images, "--features", tmp_path / "f.npy", *SETTINGS)
    for name in ("b.jpg", "sub/c.jpg"):
        assert f"{images / name} is skipped, it cannot be read: " in printed
    assert f"7 of 9 images: {run / 'predictions.csv'}" in printed
    header, *rows = table(run / "predictions.csv")
    assert header == ["path", "class", *CLASSES]
    source, features = Files([images], 1), np.load(tmp_path / "f.npy")
    readable = [i for i in range(9) if not source.name(i).endswith("jpg")]
    assert [row[0] for row in rows] == [source.name(i) for i in readable]
    network, _ = open_classifier(run / "classifier.safetensors")
    crop = CenterCrop((16, 24), crop_fraction=0.8)
    assert features.shape == (7, 24)
    for index, row, feature in zip(readable, rows, features, strict=True):
        view = crop(source.image(index))[None]
        expected = network.logits(view).softmax(dim=-1)[0]
        torch.testing.assert_close(torch.tensor(list(map(float, row[2:]))), expected, rtol=1e-4, atol=1e-5)
        assert row[1] == CLASSES[int(expected.argmax())]
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(feature), network.features(view)[0], rtol=1e-4, atol=1e-5)
    assert (run / "predictions.png").stat().st_size
    assert sorted(path.name for path in run.iterdir()) == [
        "classifier.safetensors",
        "predictions.csv",
        "predictions.png",
    ]


def test_a_classifier_alone_and_an_encoder_alone(images: Path, run: Path, tmp_path: Path) -> None:
    called("predict", "--run", run, images, *SETTINGS)
    file = run / "classifier.safetensors"
    called("predict", "--classifier", file, images / "a.png", images / "sub", "--out", tmp_path / "p.csv", *SETTINGS)
    rows = {row[0]: row for row in table(run / "predictions.csv")}
    assert table(tmp_path / "p.csv")[1:] == [rows[str(images / name)] for name in ("a.png", "sub/a.png", "sub/b.png")]
    encoder = exported(tmp_path)
    called("predict", "--encoder", encoder, images / "sub", "--features", tmp_path / "e.npy", *SETTINGS)
    assert table(tmp_path / "e.csv") == [["path"], *([str(images / "sub" / name)] for name in ("a.png", "b.png"))]
    extractor, crop = FeatureExtractor(*open_encoder(encoder)), CenterCrop((16, 16))
    views = torch.stack([crop(Files([images / "sub"], 1).image(i)) for i in range(2)])
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "e.npy")), extractor(views), rtol=1e-4, atol=1e-5)


def test_embedded_images_are_predicted_by_their_name(run: Path) -> None:
    called("predict", "--run", run, "digits", *SETTINGS[:-1], "500")
    assert len(table(run / "predictions.csv")) == 1 + 497


REFUSED: list[tuple[str, str]] = [
    ("", "give one of --run, --classifier and --encoder"),
    ("--run {run} --encoder e.safetensors", "give one of --run, --classifier and --encoder"),
    ("--run {run}/none", "{run}/none has no classifier.safetensors, which fine-tuning writes: python recipes/finetune"),
    ("--classifier {run}/none", "{run}/none cannot be read"),
    ("--encoder e.safetensors", "--encoder alone has no classes: give --features FILE.npy, or a --classifier"),
    ("--run {run} {run}/none", "{run}/none is neither a file nor a folder"),
    ("--run {run} {images}/b.jpg", "none of 1 images can be read"),
    ("--run {run} {images}/a.png --out {run}/none/p.csv", "{run}/none/p.csv cannot be written: No such file"),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSED)
def test_a_mistake_is_one_sentence_and_leaves_no_file(words: str, sentence: str, run: Path, images: Path) -> None:
    paths: Any = {"run": run, "images": images}
    assert refused("predict", *words.format(**paths).split(), *SETTINGS).startswith(
        f"predict: {sentence.format(**paths)}"
    )
    assert [path.name for path in run.iterdir()] == ["classifier.safetensors"]
