"""All evaluations of a pre-trained encoder: what each trains, in which order, and that frozen means frozen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import SettingsError
from common.data.embedded import Digits
from common.data.sources import open_data
from common.evaluation import evaluations as module
from common.evaluation import finetuning, pixels
from common.evaluation import linear as linear_module
from common.evaluation import nonlinear as nonlinear_module
from common.evaluation.evaluations import EVALUATIONS, in_order
from common.evaluation.finetuning import DIGITS, FOLDER
from common.weights.encoders import export

import numpy as np
import pytest
import torch
from PIL import Image
from probes import IMAGES, NORMALIZE, RECIPES, exported, recipe, small, stage
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from torch import Tensor, nn

RESULTS = {"pretraining": {"operations": 30.0}, "finetune": {"operations": 10.0}}
SHORT = replace(DIGITS, pool="class", optimization=replace(DIGITS.optimization, epochs=1, batch_size=30))


@pytest.mark.parametrize("name", EVALUATIONS)
@pytest.mark.parametrize("class_token", [False, True])
def test_an_exported_encoder_is_evaluated(name: str, class_token: bool, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    export(path, small(class_token=class_token), NORMALIZE)
    result = EVALUATIONS[name].run(path, SHORT, stage(tmp_path / name), RESULTS)
    assert result is not None
    assert {"accuracy", "labeled", "test", "seconds"} <= set(result)
    assert ("epoch" in result) == (name not in ("nearest", "svm"))
    assert (result["labeled"], result["test"]) == (30, 497)


@pytest.mark.parametrize(
    ("name", "epochs", "layer_decay"), [("finetune", 5, 0.65), ("scratch", 5, 1), ("budget", 20, 1)]
)
def test_from_scratch_all_layers_learn_alike_and_a_budget_is_of_operations(
    name: str, epochs: int, layer_decay: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine-tuning took 10 operations for 5 epochs, so the budget of all 40 operations is 20 epochs."""
    seen: list[Any] = []

    def finetune(encoder: Any, normalize: Any, *, settings: Any, stage: Any, into: Any) -> dict[str, Any]:
        seen.extend((encoder, settings))
        assert into == (tmp_path if name == "finetune" else None)  # the classifier of the run is the fine-tuned one
        return {}

    monkeypatch.setattr(module, "finetune", finetune)
    path, encoder = tmp_path / "encoder.safetensors", small()
    encoder.norm.bias.data += 0.5
    export(path, encoder, NORMALIZE)
    settings = replace(FOLDER, optimization=replace(FOLDER.optimization, epochs=5))
    EVALUATIONS[name].run(path, settings, stage(tmp_path / name), RESULTS)
    expected = replace(settings.optimization, epochs=epochs, layer_decay=layer_decay)
    assert seen[1] == replace(settings, optimization=expected)
    assert bool(seen[0].norm.bias.any()) == (name == "finetune")  # else the weights are new


def test_from_scratch_has_a_learning_rate_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    monkeypatch.setattr(module, "finetune", lambda *_, settings, **__: rates.append(settings.optimization.base_lr))
    for name in ("finetune", "scratch", "budget"):
        EVALUATIONS[name].run(exported(tmp_path), replace(SHORT, scratch_lr=0.5), stage(tmp_path), RESULTS)
    assert rates == [SHORT.optimization.base_lr, 0.5, 0.5]


@pytest.mark.parametrize(("name", "classifier"), [("nearest", KNeighborsClassifier(1)), ("svm", SVC(C=10))])
def test_raw_pixels_are_classified_as_by_scikit_learn(name: str, classifier: Any, tmp_path: Path) -> None:
    images = replace(IMAGES, image_size=(8, 8))
    labeled, test = Digits("labeled", per_class=images.labels_per_class), Digits("test")
    (x, y), (x_test, y_test) = (
        (
            np.stack([source.image(i).numpy().ravel() / np.float32(255) for i in range(len(source))]),
            [source.label(i) for i in range(len(source))],
        )
        for source in (labeled, test)
    )
    found = EVALUATIONS[name].run(tmp_path, SHORT, stage(tmp_path, open_data(images, seed=0)), {})
    assert found is not None
    assert found["accuracy"] == pytest.approx(100 * classifier.fit(x, y).score(x_test, y_test))
    assert (found["labeled"], found["test"]) == (len(labeled), len(test))


def test_too_many_pixels_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pixels, "MOST_LABELED", 29)
    assert EVALUATIONS["svm"].run(tmp_path, SHORT, stage(tmp_path), {}) is None
    assert "skipped: 30 labeled images of 16 × 16 pixels; at most 29 images" in capsys.readouterr().out


@pytest.mark.parametrize("of_a_folder", [False, True])
@pytest.mark.parametrize("evaluation", ["linear", "knn", "nonlinear"])
def test_a_probe_in_a_recipe_and_its_program_give_the_same_number(
    evaluation: str, of_a_folder: bool, tmp_path: Path
) -> None:
    """Whatever the settings of fine-tuning, here pooling, crop and epochs."""
    program = {"linear": "linear_probe", "nonlinear": "nonlinear_probe"}.get(evaluation, evaluation)
    encoder, where, images = exported(tmp_path), stage(tmp_path / "recipe"), ["--data", "digits"]
    if of_a_folder:
        images = ["--data", str(images_as_files(tmp_path / "images"))]
        settings = replace(where.data.settings, path=str(tmp_path / "images"), flip=0.5)
        where = replace(where, data=open_data(settings, seed=0))
    settings = replace(SHORT, crop_fraction=0.5, measurements=0)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DIGITS", "FOLDER"):  # few epochs, of a batch that the images fill
            short = finetuning.of(getattr(nonlinear_module, name).finetune, epochs=2, batch_size=30, warmup_epochs=1)
            patch.setattr(nonlinear_module, name, replace(getattr(nonlinear_module, name), finetune=short))
            patch.setattr(linear_module, name, replace(getattr(linear_module, name), epochs=20))
        inside = EVALUATIONS[evaluation].run(encoder, settings, where, {}) or {}
        words = ["--epochs", "2", "--batch-size", "30", "--warmup-epochs", "1"] if evaluation == "nonlinear" else []
        args = ["--encoder", encoder, "--labels-per-class", "3", "--runs", tmp_path, *words, *images]
        alone = recipe(program, *args)
    compared = ("accuracy", "labeled", "test", "loss", "by_k", "held_out")
    assert {name: inside.get(name) for name in compared} == {name: alone.get(name) for name in compared}


def images_as_files(root: Path) -> Path:
    """Write 60 images of 20 × 30 pixels in two classes, so that a crop matters."""
    generator = torch.Generator().manual_seed(0)
    for i in range(60):
        path = root / ("train" if i < 40 else "val") / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (20, 30), generator=generator) // (1 + i % 2)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return root


def test_a_budget_comes_after_the_fine_tuning_that_it_is_measured_against() -> None:
    assert in_order(()) == ()
    assert in_order(("scratch", "knn")) == ("scratch", "knn")
    assert in_order(("budget", "knn")) == ("finetune", "budget", "knn")
    assert in_order(("budget", "finetune", "budget")) == ("finetune", "budget")
    with pytest.raises(SettingsError, match=r"^--evaluate guess: choose among finetune, scratch, budget, nearest, svm"):
        in_order(("finetune", "guess"))


class Wandering(nn.Module):
    """An encoder that would change if it were left in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = small(), nn.BatchNorm1d(24)
        self.drop = nn.Dropout(0.5)
        for name in ("height", "width", "patch", "channels", "dim", "depth", "heads", "num_prefix", "cls_token"):
            setattr(self, name, getattr(self.inner, name))
        self.blocks, self.pos_embed, self.positions = self.inner.blocks, self.inner.pos_embed, self.inner.positions

    def forward(self, patches: Tensor, positions: Tensor, noise: None = None) -> Tensor:
        return self.drop(self.norm(self.inner(patches, positions).movedim(1, 2)).movedim(1, 2))


@pytest.mark.parametrize("make", [small, Wandering])
@pytest.mark.parametrize("evaluation", [name for name in RECIPES if name != "knn"])
@pytest.mark.parametrize("augment", [False, True])
def test_frozen_means_bit_for_bit(make: Any, evaluation: str, augment: bool, tmp_path: Path) -> None:
    function, presets, _ = RECIPES[evaluation]
    settings = presets["digits"].settings
    if evaluation == "linear_probe":
        settings = replace(settings, epochs=2, base_lrs=(0.1,), augment=augment)
    else:
        optimization = replace(settings.finetune.optimization, epochs=2, batch_size=30, warmup_epochs=0)
        finetuning = replace(settings.finetune, train_positions=augment, optimization=optimization)
        settings = replace(settings, finetune=finetuning)
    encoder = make()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    function(encoder, NORMALIZE, settings=settings, stage=stage(tmp_path))
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
