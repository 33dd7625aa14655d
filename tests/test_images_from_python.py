"""Images that are given from Python, of any number of channels."""

import json
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

from common.files import read_tensors
from common.pretraining import pretrain

import lomar
import lut
import mae
import pytest
import torch
from small_runs import metrics, printed, weights
from users_images import Fields

SHORT = shlex.split("--image-size 16 16 --patch 8 --epochs 2 --workers 0 --device cpu --finetune.epochs 1")


def run(*args: object, recipe: Any = mae.RECIPE, **images: Any) -> str:
    return printed(lambda: pretrain(recipe, name="fields", args=[*SHORT, *map(str, args)], **images))


def refusal(*args: object, recipe: Any = mae.RECIPE, **images: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        run(*args, recipe=recipe, **images)
    return str(ended.value.code)


def test_a_users_program_pre_trains_and_evaluates_on_five_channels_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = str(Path(__file__).parent / "users_images.py")
    evaluate = ["--evaluate", "finetune", "knn", "linear"]
    monkeypatch.setattr(sys, "argv", [program, *SHORT, *evaluate, "--epochs", "3", "--runs", str(tmp_path)])
    text = printed(lambda: runpy.run_path(program, run_name="__main__"))
    assert "40 images, 3 epochs of 2 steps" in text
    folder = tmp_path / "fields"
    assert json.loads((folder / "config.json").read_text())["data"]["channels"] == 5
    result = json.loads((folder / "result.json").read_text())
    assert [result[name]["test"] for name in ("finetune", "knn", "linear")] == [10, 10, 10]
    assert result["knn"]["accuracy"] == 100
    assert weights(folder)["patch_embed.proj.weight"].shape[1] == 5
    assert (folder / "reconstruction.png").stat().st_size
    # normalized by the mean and std of these images: 40, 80, … with 30 more in every second one, and noise of ±20
    checkpoint = read_tensors(max((folder / "checkpoint").glob("step_*")) / "tensors.safetensors")[0]
    mean, std = (checkpoint[f"method.normalize.{name}"].flatten() * 255 for name in ("mean", "std"))
    torch.testing.assert_close(mean, torch.tensor([55.0, 95, 135, 175, 215]), rtol=0, atol=0.5)
    torch.testing.assert_close(std, torch.full((5,), (15**2 + 140) ** 0.5), rtol=0, atol=0.5)
    before = metrics(folder)
    monkeypatch.setattr(sys, "argv", [program, "--resume", "--runs", str(tmp_path)])
    assert "resuming at step 6 of 6" in printed(lambda: runpy.run_path(program, run_name="__main__"))
    assert metrics(folder) == before


def test_images_without_test_images_are_pre_trained_on(tmp_path: Path) -> None:
    text = run("--runs", tmp_path, source=Fields(0, 20))
    assert "no evaluation at the end, pre-training only: no test images are given to `pretrain`" in text
    assert (tmp_path / "fields" / "encoder.safetensors").exists()


def test_windows_are_drawn_in_images_of_any_number_of_channels(tmp_path: Path) -> None:
    windows = ["--window-size", 2, "--windows", 1, "--image-size", 24, 24]
    run(*windows, "--runs", tmp_path, recipe=lomar.RECIPE, source=Fields(0, 20))
    assert (tmp_path / "fields" / "reconstruction.png").exists()


class Others(Fields):
    classes = ["water", "field"]  # noqa: RUF012


class Gray(Fields):
    channels = 1

    def image(self, index: int) -> torch.Tensor:
        return super().image(index)[:1]


@pytest.mark.parametrize(
    ("args", "images", "sentence"),
    [
        (
            ["--data", "d"],
            {},
            "fields: --data has no effect, since the images are given from Python: leave it out",
        ),
        (
            [],
            {"test": Others(0, 4)},
            "fields: labeled images have the classes ['field', 'water'], but test images ['water', 'field']",
        ),
        ([], {"test": Gray(0, 4)}, "fields: training images have 5 channels, labeled 5 and test 1"),
        (
            ["--preset", "folder"],
            {"test": Fields(0, 4)},
            'fields: RandAugment works on 1 or 3 channels, not 5: use --finetune.randaugment ""',
        ),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_written(
    args: list[str], images: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    assert refusal("--runs", tmp_path / "runs", *args, source=Fields(0, 20), **images) == sentence
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_changes_colors_refuses_five_channels(tmp_path: Path) -> None:
    said = refusal("--runs", tmp_path / "runs", recipe=lut.RECIPE, source=Fields(0, 20))
    assert said == "fields: this method changes the colors of 1 or 3 channels, not of 5"
    assert not (tmp_path / "runs").exists()
