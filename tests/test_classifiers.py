"""Exported classifiers: timm and our reader give the logits of the trained network; files that lie are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import SettingsError
from common.data.views import CenterCrop
from common.evaluation.finetuning import DIGITS, Classifier, finetune, write_classifier
from common.evaluation.prediction import open_classifier
from common.files import read_tensors, write_tensors
from common.networks.initialization import initialize_mae
from common.networks.vit import ViT
from common.weights.classifiers import load_classifier
from common.weights.encoders import export, load_encoder

import pytest
import torch
from pictures import quoting
from probes import NORMALIZE, small, stage
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer

VIEW = CenterCrop((16, 16), crop_fraction=DIGITS.crop_fraction)
CLASSES = ["cat", "dog, brown", "größe"]
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without a key bias": {"key_bias": False},
    "relative, own tables": {"key_bias": False, "table": None, "relative": "each", "layer_scale": 0.1},
    "contextual": {"table": None, "relative": "contextual"},
}


def classifier(network: str, pool: Any) -> Classifier:
    """A classifier of images of 16 × 24 whose weights are all random."""
    torch.manual_seed(0)
    vit = ViT(height=2, width=3, patch=8, channels=1, dim=24, depth=2, heads=3, **NETWORKS[network])
    initialize_mae(vit)
    made = Classifier(vit, NORMALIZE, len(CLASSES), pool=pool, head_scale=1.0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return made.eval()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("pool", ["mean", "class"])
def test_timm_and_our_reader_give_the_logits_of_the_classifier(network: str, pool: Any, tmp_path: Path) -> None:
    made, path = classifier(network, pool), tmp_path / "classifier.safetensors"
    write_classifier(tmp_path, made, DIGITS, CLASSES)
    images = torch.rand(5, 1, 16, 24)
    expected = made.logits(images)
    assert expected.std() > 0.1
    ours, head = open_classifier(path)
    torch.testing.assert_close(ours.logits(images), expected, rtol=0, atol=1e-5)
    assert (head.classes, head.pool, head.crop_fraction) == (tuple(CLASSES), pool, DIGITS.crop_fraction)
    weights, about = read_tensors(path)
    if network == "contextual":  # of which timm has no network
        assert about["mimkit"]["relative"] == "contextual"
        return
    kind: Any = Beit if network.startswith("relative") else VisionTransformer
    theirs = kind(**about["timm"]).eval()
    theirs.load_state_dict(weights)
    mean, std = (torch.tensor(about[name]).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(theirs((images - mean) / std), expected, rtol=0, atol=1e-5)


def test_equal_classifiers_are_equal_bytes_and_say_what_their_images_are(tmp_path: Path) -> None:
    content = []
    for _ in range(8):
        write_classifier(tmp_path, classifier("plain", "mean"), DIGITS, CLASSES)
        content.append((tmp_path / "classifier.safetensors").read_bytes())
    assert len(set(content)) == 1
    about = read_tensors(tmp_path / "classifier.safetensors")[1]
    assert sorted(about) == ["classes", "crop_fraction", "mean", "std", "timm"]
    assert (about["timm"]["img_size"], about["timm"]["in_chans"]) == ([16, 24], 1)


LIES = [
    ({"classes": ["a", "b"]}, "the metadata of {path} says classes ['a', 'b'], which is not 3 different names"),
    ({"classes": ["a", "b", "a"]}, "the metadata of {path} says classes ['a', 'b', 'a'], which is not 3 different"),
    ({"classes": [1, 2, 3]}, "the metadata of {path} says classes [1, 2, 3], which is not 3 different names"),
    ({"crop_fraction": 0}, "the metadata of {path} says crop_fraction 0, which is not above 0 and at most 1"),
    ({"global_pool": "map"}, "the metadata of {path} says global_pool 'map', which is not avg or token"),
    ({"num_classes": "3"}, "the metadata of {path} says num_classes '3', which is not a whole number above 0"),
    ({"num_classes": 2, "classes": ["a", "b"]}, "{path} is damaged: head.weight is (3, 24) instead of (2, 24)"),
    ({"num_classes": 0}, "{path} is not a classifier: fine-tune an encoder with recipes/finetune.py --encoder {path}"),
    ({"classes": None}, "the metadata of {path} lacks classes"),
]


@pytest.mark.parametrize(("lie", "sentence"), LIES)
def test_a_classifier_that_lies_is_one_sentence(lie: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    write_classifier(tmp_path, classifier("plain", "mean"), DIGITS, CLASSES)
    weights, about = read_tensors(path)
    for name, value in lie.items():
        (about if name in about else about["timm"])[name] = value
    write_tensors(path, weights, {name: value for name, value in about.items() if value is not None})
    with pytest.raises(SettingsError, match=quoting(sentence.format(path=path))):
        open_classifier(path)


def test_an_encoder_is_no_classifier_and_a_classifier_without_final_norm_is_no_encoder(tmp_path: Path) -> None:
    export(tmp_path / "encoder.safetensors", small(), NORMALIZE)
    with pytest.raises(SettingsError, match=r"encoder\.safetensors is not a classifier: fine-tune an encoder with"):
        load_classifier(tmp_path / "encoder.safetensors")
    write_classifier(tmp_path, classifier("plain", "mean"), DIGITS, CLASSES)
    with pytest.raises(SettingsError, match="is a classifier without the final norm of its encoder: give encoder"):
        load_encoder(tmp_path / "classifier.safetensors")


def test_the_exported_classifier_is_that_of_the_last_step_and_knows_the_classes(tmp_path: Path) -> None:
    optimization = replace(DIGITS.optimization, epochs=2, batch_size=30, warmup_epochs=0)
    settings = replace(DIGITS, optimization=optimization)
    where = stage(tmp_path / "finetune")
    result = finetune(small(), NORMALIZE, settings=settings, stage=where, into=tmp_path)
    exported, head = open_classifier(tmp_path / "classifier.safetensors")
    _, test = where.data.splits()
    right = sum(int(exported.predict(VIEW(test.image(i))[None])) == test.label(i) for i in range(len(test)))
    assert result["accuracy"] == pytest.approx(100 * right / len(test), abs=0.21)  # one image
    assert list(head.classes) == list(result["per_class"]) == test.classes
    assert (tmp_path / "confusion.png").stat().st_size
