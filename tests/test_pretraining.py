"""A whole pre-training from the command line: what stops it in one sentence, what it resumes, what it reads once."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from common import pretraining as module
from common.analysis import AnalysisConfig
from common.config import Run, program
from common.data.sources import open_data
from common.pretraining import pretrain
from common.runs import Stage
from common.training import engine
from common.training.distributed import Processes

import beyond_masking_integrated
import mae
import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import RECIPES, SMALL, TUNED, finished, kept, metrics, pretrained, weights


def stopped(*args: str, runs: Path) -> str:
    """The sentence with which the pre-training of the integrated tasks ends."""
    with pytest.raises(SystemExit) as ended:
        pretrain(beyond_masking_integrated.RECIPE, name="integrated", args=[*args, "--runs", str(runs)])
    assert str(ended.value.code).startswith("integrated: ")
    return str(ended.value.code).removeprefix("integrated: ")


# Mistakes of the user


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("--epochs 0", "--epochs 0: must be at least 1"),
        ("--crop-scale 1 0.5", "--crop-scale 1.0 0.5: must be two shares, the smaller one first"),
        ("--finetune.batch-size 0", "--finetune.batch-size 0: must be at least 1"),
        ("--finetune.randaugment rand-m9-sdt0.5", "--finetune.randaugment rand-m9-sdt0.5: timm knows no such policy"),
        (
            "--finetune.batch-size 25 --finetune.cutmix 1",
            "--finetune.batch-size 25: mixup and cutmix mix pairs, and micro-batches of 25 images are odd; "
            "use a multiple of 2, or --finetune.mixup 0 --finetune.cutmix 0",
        ),
        (
            "--finetune.batch-size 101",
            "100 labeled images do not fill a batch of 101: use a smaller --finetune.batch-size",
        ),
        ("--batch-size 2000", "1300 images do not fill a batch of 2000: use a smaller --batch-size"),
        (
            "--labels-per-class 999",
            "--labels-per-class 999: cannot be drawn from the 126 training images of a class",
        ),
        ("--data nowhere", "nowhere is not a folder"),
        ("--channels 3", "--channels 3: the images of digits have 1 channels"),
        ("--image-size 30 32", "--image-size 30 32 is not made of patches of 4 × 4"),
        ("--mask-ratio nan", "--mask-ratio nan of 64 patches does not leave both masked and visible ones"),
        ("--mask-ratio 1", "--mask-ratio 1.0 of 64 patches does not leave both masked and visible ones"),
        ("--view-size 47 46", "--view-size 47 is not an even number more than --image-size 32"),
        ("--statistics imagenet", "ImageNet's mean and std have 3 channels, not 1: use --statistics data"),
        ("--weights nowhere.pth", "nowhere.pth is not a file"),
    ],
)
def test_a_wrong_setting_is_one_sentence_before_anything_is_written(args: str, sentence: str, tmp_path: Path) -> None:
    """So it does not stand in the way of the next try either."""
    assert stopped("--data", "digits", *args.split(), runs=tmp_path / "runs") == sentence
    assert list(tmp_path.iterdir()) == []


def test_micro_batches_of_fine_tuning_that_hold_pairs_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 15 images at a time: 50 of them are cut into 5 micro-batches of 10, whose images are paired."""
    monkeypatch.setattr(module, "pretrain_method", lambda *_: 1 / 0)  # here all settings have been checked
    with pytest.raises(ZeroDivisionError):
        pretrained("mae", *TUNED, "--finetune.device-batch", 15, "--finetune.mixup", 0.8, "--runs", tmp_path)


def test_a_gpu_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sentence = "--device cuda: PyTorch finds no GPU here; use --device cpu, or auto"
    assert stopped("--device", "cuda", runs=tmp_path) == sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError])
def test_a_mistake_of_the_program_keeps_its_traceback(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*_: Any) -> None:
        raise error("a bug")

    monkeypatch.setattr(module, "pretrain_method", mistaken)
    with pytest.raises(error, match="a bug") as caught:
        pretrain(mae.RECIPE, name="mae", args=["--runs", str(tmp_path)])
    assert caught.traceback[-1].name == "mistaken"


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError])
def test_so_does_one_of_a_program_that_follows(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(config: AnalysisConfig) -> None:
        raise error("a bug")

    monkeypatch.setattr(sys, "argv", ["program", "--run", "folder"])
    with pytest.raises(error, match="a bug") as caught:
        program(mistaken, AnalysisConfig, name="program", description=None)
    assert caught.traceback[-1].name == "mistaken"


@pytest.mark.parametrize("last", [2, 4])
def test_weights_that_are_not_finite_are_neither_kept_nor_exported(
    last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss is computed before the step that destroys the weights, and that step may be the last one."""
    monkeypatch.setattr(engine, "learning_rate", lambda step, *_: np.inf if step == last else 1e-3)
    args = [*SMALL, "--evaluate", "--runs", tmp_path, "--epochs", 1, "--log-every", 1, "--checkpoint-minutes", 0]
    sentence = f"weights after step {last + 1} are not finite; the checkpoint of step {last}"
    with pytest.raises(SystemExit, match=sentence):
        pretrained("mae", *args)
    assert not (tmp_path / "mae" / "encoder.safetensors").exists()
    for tensor in kept(tmp_path / "mae").values():
        assert not tensor.is_floating_point() or tensor.isfinite().all()


# Resuming


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended but for its evaluation."""
    folder = tmp_path / "mae"
    shutil.copytree(finished("mae", tmp_path_factory)[0], folder)
    (folder / "result.json").unlink()
    return folder


def test_resume_alone_goes_on_with_the_runs_own_settings(run: Path) -> None:
    before = {path: path.read_bytes() for path in (run / "config.json", run / "metrics.jsonl")}
    printed = pretrained("mae", "--runs", run.parent, "--resume")
    assert "pre-training: resuming at step 10 of 10" in printed
    assert "fine-tuning: resuming at step 4 of 4" in printed
    assert all(path.read_bytes() == content for path, content in before.items())
    assert json.loads((run / "result.json").read_text())["pretraining"]["step"] == 10


def test_resume_with_other_settings_is_refused_by_name(run: Path) -> None:
    for args, sentence in {
        ("--epochs", "5"): "--epochs 2 and cannot be resumed with 5",
        ("--finetune.epochs", "5"): "--finetune.epochs 2 and cannot be resumed with 5",
        (
            "--preset",
            "digits",
        ): "--evaluate finetune linear knn nonlinear and cannot be resumed with finetune scratch budget nearest svm",
    }.items():
        with pytest.raises(SystemExit) as ended:
            pretrained("mae", "--runs", run.parent, "--resume", *args)
        assert ended.value.code == f"mae: {run} was started with {sentence}"
    assert not (run / "result.json").exists()


# Folders of images


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of grayscale pictures of several sizes, two classes that differ in their stripes."""
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("across", "down")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = random.integers(40, 90, 2)
                rows, columns = np.mgrid[:height, :width]
                stripes = np.sin((rows if label else columns) / 3 + random.uniform(0, 6)) * 90 + 128
                file = tmp_path / "data" / split / name / f"{i}.jpg"
                Image.fromarray(stripes.astype(np.uint8)).save(file)
    return tmp_path / "data"


SHORT = shlex.split(
    "--size nano --patch 16 --decoder-dim 32 --decoder-depth 1 --decoder-heads 2 --batch-size 8 --epochs 2 "
    "--finetune.epochs 1 --finetune.batch-size 8 --finetune.warmup-epochs 1 --device cpu"
)


def test_a_folder_of_grayscale_pictures_that_are_not_square_is_listed_once_per_split(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked, walk = [], os.walk
    monkeypatch.setattr(os, "walk", lambda top, **how: walked.append(Path(top)) or walk(top, **how))
    size = shlex.split("--image-size 48 80 --channels 1 --workers 2 --evaluate finetune scratch knn")
    pretrained("mae", "--data", pictures, *SHORT, *size, "--runs", tmp_path)
    assert walked == [pictures / "train", pictures / "val"]
    assert weights(tmp_path / "mae")["pos_embed"].shape == (1, 1 + 3 * 5, 96)
    result = json.loads((tmp_path / "mae" / "result.json").read_text())
    assert [result[name]["test"] for name in ("finetune", "scratch", "knn")] == [6, 6, 6]


def test_without_a_test_split_it_says_so_and_pre_trains(pictures: Path, tmp_path: Path) -> None:
    (pictures / "val").rename(tmp_path / "away")
    size = ["--image-size", "32", "32", "--workers", "0"]
    printed = pretrained("mae", "--data", pictures, *SHORT, *size, "--runs", tmp_path)
    assert "no evaluation at the end, pre-training only:" in printed
    assert (tmp_path / "mae" / "encoder.safetensors").exists()
    assert set(json.loads((tmp_path / "mae" / "result.json").read_text())) >= {"recipe", "device", "pretraining"}


@pytest.mark.parametrize(("name", "option"), [("simmim", "--decoder-dim"), ("lut", "--crop-scale"), ("mae", "")])
def test_an_option_without_effect_works_and_says_so(name: str, option: str, tmp_path: Path) -> None:
    value = {"--decoder-dim": ["32"], "--crop-scale": ["0.5", "1"], "": []}[option]
    args = [*SMALL, *RECIPES[name], "--epochs", "1", "--evaluate", "--runs", tmp_path, *filter(None, [option]), *value]
    assert (f"{option} has no effect in {name}" in pretrained(name, *args)) == bool(option)


# Weights of others


def test_a_pre_training_starts_from_published_weights_and_reports_their_keys(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = finished("mae", tmp_path_factory)[0] / "encoder.safetensors"
    args = [*SMALL, "--weights", path, "--base-lr", 1e-12, "--weight-decay", 0, "--evaluate", "--runs", tmp_path]
    printed = pretrained("mae", *args, "--epochs", 1)
    assert f"{path}:\nrenamed  " in printed
    assert "missing  decoder.head.weight" in printed
    for name, tensor in weights(tmp_path / "mae").items():
        torch.testing.assert_close(tensor, weights(path.parent)[name], rtol=1e-5, atol=1e-6)
    assert [record["step"] for record in metrics(tmp_path / "mae")] == [2, 4, 5]


@pytest.mark.parametrize("name", ["finetune", "linear", "knn", "nonlinear"])
def test_every_evaluation_leaves_its_result(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, printed = finished("mae", tmp_path_factory)
    result = json.loads((folder / "result.json").read_text())[name]
    assert (result["labeled"], result["test"]) == (100, 497)
    assert 0 <= result["accuracy"] <= 100
    assert f"{result['accuracy']:.1f} %" in printed
    assert TUNED[1] == "2"
    assert result["epoch"] == {"finetune": 2, "linear": 200, "knn": 0, "nonlinear": 2}[name]


def test_a_stage_prints_its_title_in_the_first_process_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = open_data(mae.PRESETS["digits"].data, seed=0)
    for rank in (0, 1):
        stage = Stage(Processes(rank, 2, torch.device("cpu")), data, Run(), tmp_path, "fine-tuning")
        stage.print(f"rank {rank}")
    assert capsys.readouterr().out == "fine-tuning: rank 0\n"
