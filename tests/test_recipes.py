"""Each recipe end to end: small, on real digits."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.data.normalize import Normalize

import beyond_masking_integrated
import droppos
import hpm
import lomar
import mae
import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import (
    EVALUATIONS,
    RECIPES,
    ROOT,
    SMALL,
    called,
    environment,
    finished,
    kept,
    metrics,
    pretrained,
    recipe,
    refused,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_leaves_all_that_it_promises(
    name: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder, text = finished(name, tmp_path_factory)
    for file in ("config.json", "metrics.jsonl", "encoder.safetensors", "result.json"):
        assert (folder / file).stat().st_size
    for picture in ("reconstruction.png", "curves.png"):
        with Image.open(folder / picture) as image:
            assert image.size[0] > 200
    assert pictures_in(folder) == {"reconstruction": (folder / "reconstruction.png").read_bytes()[16:24]}
    assert json.loads((folder / "config.json").read_text())["recipe"] == name
    assert list(folder.glob("events.out.tfevents.*"))
    result = json.loads((folder / "result.json").read_text())
    assert {"finetune", *EVALUATIONS.get(name, [])} == set(result) - {"recipe", "device", "devices", "pretraining"}
    assert (result["finetune"]["labeled"], result["finetune"]["test"]) == (100, 497)
    assert 0 <= result["finetune"]["accuracy"] <= 100
    assert f"{result['finetune']['accuracy']:.1f} %" in text
    assert all(np.isfinite(record["loss"]) for record in metrics(folder))

    again = refused(name, *RECIPES[name], *SMALL, "--runs", folder.parent)
    sentence = "holds a run already: go on with --resume, delete it with --restart, or give another --name"
    assert again == f"{name}: {folder} {sentence}"
    encoder = folder / "encoder.safetensors"
    called("finetune", "--encoder", encoder, "--epochs", 1, "--runs", tmp_path, "--workers", 0, "--device", "cpu")
    assert (tmp_path / "finetune" / "result.json").exists()


def pictures_in(folder: Path) -> dict[str, bytes]:
    """The pictures in the TensorBoard events of a folder, by name: width and height as a PNG file has them."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    names = events.Tags()["images"]
    return {name: events.Images(name)[-1].encoded_image_string[16:24] for name in names}


def test_programs_run_as_a_user_starts_them(tmp_path: Path) -> None:
    """What else is tested in this process: a pre-training, a mistake of the user, and a program that follows."""
    recipe("mae", *SMALL, "--epochs", 1, "--evaluate", "--runs", tmp_path)
    again = recipe("mae", *SMALL, "--runs", tmp_path, check=False)
    assert again.returncode == 1
    assert again.stderr.startswith(f"mae: {tmp_path / 'mae'} holds a run already: go on with --resume")
    assert "Traceback" not in again.stderr
    encoder = tmp_path / "mae" / "encoder.safetensors"
    tuned = recipe("finetune", "--encoder", encoder, "--epochs", 1, "--runs", tmp_path, "--workers", 0)
    result = json.loads((tmp_path / "finetune" / "result.json").read_text())
    assert f"{result['accuracy']:.1f} %" in tuned.stdout


def test_a_run_that_was_killed_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    args = [*SMALL, "--epochs", "6", "--evaluate", "--log-every", "2", "--checkpoint-minutes", "0", "--compile", "off"]
    pretrained("hpm", *args, "--runs", tmp_path, "--name", "whole")  # whose teacher goes on, too
    command = [sys.executable, str(ROOT / "recipes" / "hpm.py"), *args, "--runs", str(tmp_path), "--name", "cut"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment())
    while not list((tmp_path / "cut" / "checkpoint").glob("step_00000001*")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "encoder.safetensors").exists()
    pretrained("hpm", *args, "--runs", tmp_path, "--name", "cut", "--resume", "--workers", "1")
    whole, cut = kept(tmp_path / "whole"), kept(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole | cut)
    assert any(name.startswith("method.teacher.") for name in whole)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert [r["loss"] for r in metrics(tmp_path / "whole")] == [r["loss"] for r in metrics(tmp_path / "cut")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", RECIPES)
def test_a_gpu_compiles_the_whole_training(name: str, tmp_path: Path) -> None:
    recipe(name, *RECIPES[name], *SMALL, "--evaluate", "--runs", tmp_path)
    assert json.loads((tmp_path / name / "result.json").read_text())["device"] == "cuda"
    assert all(np.isfinite(record["loss"]) for record in metrics(tmp_path / name))


@pytest.mark.parametrize(
    ("make", "digits"),
    [
        (mae.MAE, mae.PRESETS["digits"]),
        (beyond_masking_integrated.Integrated, beyond_masking_integrated.PRESETS["digits"]),
        (hpm.HPM, hpm.PRESETS["digits"]),
        (droppos.DropPos, droppos.PRESETS["digits"]),
        (lomar.LoMaR, lomar.PRESETS["digits"]),
        (mae.MAE, replace(mae.PRESETS["digits"], positions="relative")),
    ],
)
def test_a_step_never_waits_for_the_device(make: Any, digits: Any) -> None:
    """On the meta device there is nothing to wait for: whatever reads a value raises."""
    method = make(digits, Normalize([0.5], [0.5])).to("meta")
    images = torch.empty(2, 1, *method.view_size, dtype=torch.uint8, device="meta")
    noise = method.noise(lambda *shape: torch.empty(*shape, device="meta"), 2)
    progress = torch.empty((), dtype=torch.float64, device="meta")
    losses = method(images, noise, progress)
    losses["loss"].backward()
    assert all(loss.shape == () for loss in losses.values())
    if hasattr(method, "after_step"):
        method.after_step(progress)
