"""The probes as programs, from the command line to the table."""

import json
import shlex
from pathlib import Path

from common.evaluation import probe as module
from common.networks.initialization import initialize_mae
from common.networks.vit import ViT
from common.weights.encoders import export
from common.weights.timm_names import timm_state

import pytest
import torch
from PIL import Image
from probes import NORMALIZE, RECIPES, exported, in_two_processes, recipe, small


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return exported(tmp_path)


@pytest.mark.parametrize("name", RECIPES)
def test_a_probe_evaluates_an_encoder_on_the_digits(
    name: str, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = recipe(name, "--encoder", encoder, "--runs", tmp_path)
    written = json.loads((tmp_path / name / "result.json").read_text())
    assert written == {"recipe": name, "encoder": str(encoder), **result}
    assert {"accuracy", "labeled", "test", "seconds", "epoch"} <= set(result)
    assert (result["labeled"], result["test"]) == (100, 497)
    assert 12 < result["accuracy"] <= 100  # better than chance even with random weights
    out = capsys.readouterr().out
    assert f"{result['accuracy']:.1f} % of 497 test images are right" in out
    assert str(tmp_path / name / "result.json") in out
    if name == "knn":
        assert list(result["by_k"]) == list(result["leave_one_out"]) == ["1", "5", "10", "20", "100"]
        assert result["leave_one_out"][str(result["k"])] == max(result["leave_one_out"].values())
        assert result["accuracy"] == result["by_k"][str(result["k"])]
    else:
        assert (tmp_path / name / "curves.png").stat().st_size
    with pytest.raises(SystemExit) as ended:
        recipe(name, "--encoder", encoder, "--runs", tmp_path)
    assert "holds a run already" in str(ended.value.code)


@pytest.mark.parametrize("published", [False, True])
def test_a_folder_of_images_is_evaluated_on(published: bool, encoder: Path, tmp_path: Path) -> None:
    if published:  # a checkpoint of the MAE family, as its authors store it
        vit = ViT(height=2, width=2, patch=8, channels=3, dim=96, depth=1, heads=3)
        initialize_mae(vit)
        encoder = tmp_path / "mae.pth"
        torch.save({"model": {**timm_state(vit), "mask_token": torch.zeros(1, 1, 8)}}, encoder)
    for split, count in (("train", 12), ("val", 3)):
        for gray, name in ((40, "dark"), (200, "light")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (20 + i, 30), gray + i).save(tmp_path / split / name / f"{i}.png")
    result = recipe("knn", "--encoder", encoder, "--data", tmp_path, "--runs", tmp_path / "runs", "--k", "1", "99")
    assert result["by_k"] == {"1": 100.0}
    assert (result["labeled"], result["test"], result["k"]) == (24, 6, 1)


def test_two_processes_equal_one(encoder: Path, tmp_path: Path) -> None:
    args = ["--augment", "--labels-per-class", "4", "--base-lrs", "1", "10", "--batch-size", "13"]
    args += ["--encoder", str(encoder), "--runs", str(tmp_path), "--epochs", "3", "--warmup-epochs", "1"]
    one = recipe("linear_probe", *args, "--name", "one")
    in_two_processes("linear_probe", *args, "--name", "two")
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["held_out"] == one["held_out"]
    assert two["accuracy"] == pytest.approx(one["accuracy"], abs=0.3)


def test_new_blocks_resume_behind_their_own_encoder_only(encoder: Path, tmp_path: Path) -> None:
    args = ["--encoder", encoder, "--runs", tmp_path]
    first = recipe("nonlinear_probe", *args)
    again = recipe("nonlinear_probe", *args, "--resume")
    assert again["accuracy"] == first["accuracy"]
    with pytest.raises(SystemExit) as ended:
        recipe("nonlinear_probe", *args, "--resume", "--blocks", "4")
    assert "was started with --blocks 2 and cannot be resumed with 4" in str(ended.value.code)
    with pytest.raises(SystemExit) as ended:
        recipe("nonlinear_probe", *args, "--resume", "--encoder", exported(tmp_path / "nonlinear_probe"))
    assert f"was started with --encoder {encoder} and cannot be resumed with" in str(ended.value.code)


@pytest.mark.parametrize(
    ("name", "args", "sentence"),
    [
        ("knn", "--encoder nowhere.pth", "nowhere.pth is not a file"),
        ("knn", "--encoder timm:nix", "--encoder timm:nix: give the weights, too, as in --encoder timm:nix:FILE"),
        ("knn", "--image-size 20 16", "images of 20 × 16 pixels are not made of patches of 8 × 8"),
        ("knn", "--image-size 0 16", "--image-size 0 16: must be two numbers of at least 1"),
        ("knn", "--data nowhere", "nowhere is not a folder"),
        ("knn", "--k 0 1", "--k 0 1: must be one or more positive numbers"),
        ("knn", "--k", "--k : must be one or more positive numbers"),
        ("knn", "--temperature 0", "--temperature 0.0: must be above 0"),
        ("knn", "--crop-fraction 2", "--crop-fraction 2.0: must be above 0 and at most 1"),
        (
            "knn",
            "--labels-per-class 999",
            "--labels-per-class 999: cannot be drawn from the 126 training images of a class",
        ),
        ("linear_probe", "--epochs 0", "--epochs 0: must be at least 1"),
        ("linear_probe", "--batch-size 0", "--batch-size 0: must be at least 1"),
        ("linear_probe", "--crop-scale 1 0.5", "--crop-scale 1.0 0.5: must be two shares, the smaller one first"),
        ("nonlinear_probe", "--blocks 0", "--blocks 0: must be at least 1"),
        ("nonlinear_probe", "--flip -1", "--flip -1.0: must be between 0 and 1"),
        ("nonlinear_probe", "--batch-size 101", "100 labeled images do not fill a batch of 101"),
        ("nonlinear_probe", "--randaugment nonsense", "--randaugment nonsense: timm knows no such policy"),
        ("nonlinear_probe", "--batch-size 25 --mixup 0.8", "--batch-size 25: mixup and cutmix mix pairs, and micro-"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_writes_nothing(
    name: str, args: str, sentence: str, encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        recipe(name, "--encoder", encoder, "--runs", tmp_path, *shlex.split(args))
    assert str(ended.value.code).startswith(f"{name}: {sentence}")
    assert list(tmp_path.iterdir()) == [encoder]


@pytest.mark.parametrize(
    ("name", "args", "sentence"),
    [
        ("knn", "--k 200 300", "100 labeled images are fewer than --k 200 neighbors"),
        ("linear_probe", "--base-lrs", "--base-lrs : give one or more positive numbers"),
        ("linear_probe", "--base-lrs 1 -1", "--base-lrs 1.0 -1.0: give one or more positive numbers"),
        ("linear_probe", "--batch-size 1", "--batch-size 1 has no statistics to normalize by: at least 2 images"),
        ("linear_probe", "--labels-per-class 1", "several learning rates need labeled images to choose by"),
    ],
)
def test_what_an_evaluation_finds_wrong_is_one_sentence_and_does_not_stand_in_the_way(
    name: str, args: str, sentence: str, encoder: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            recipe(name, "--encoder", encoder, "--runs", tmp_path, *shlex.split(args))
        assert str(ended.value.code).startswith(f"{name}: {sentence}")


def test_a_mistake_of_the_program_keeps_its_traceback(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(module, "write_json", mistaken)
    with pytest.raises(ValueError, match=r"^a bug$"):
        recipe("knn", "--encoder", encoder, "--runs", tmp_path)


def test_features_that_are_not_finite_are_refused(encoder: Path, tmp_path: Path) -> None:
    vit = small()
    vit.load_state_dict(timm_state(vit) | {"norm.weight": torch.full((24,), 3e38)})
    export(encoder, vit, NORMALIZE)
    with pytest.raises(SystemExit, match="knn: the encoder's features are not finite"):
        recipe("knn", "--encoder", encoder, "--runs", tmp_path)
