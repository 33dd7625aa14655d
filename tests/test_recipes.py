"""Each recipe end to end, as a user runs it: small, on real digits or on a folder of pictures."""

import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.data.normalize import Normalize
from common.files import read_tensors
from common.pretraining import pretrain
from common.training import engine

import beyond_masking_integrated
import droppos
import hpm
import lomar
import mae
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
SMALL = shlex.split(
    "--image-size 16 16 --patch 4 --epochs 2 --batch-size 260 --warmup-epochs 1 --workers 0 --log-every 2"
)
TUNED = shlex.split("--finetune.epochs 2 --finetune.batch-size 50")
PICTURES = shlex.split("--size nano --patch 16 --decoder-dim 32 --decoder-depth 1 --decoder-heads 2 --batch-size 8")
RECIPES = {
    "mae": [],
    "beyond_masking": ["--task", "zoom_out"],
    "beyond_masking_integrated": ["--view-size", "22", "22"],
    "hpm": [],
    "droppos": [],
    "simmim": [],
    "lut": ["--head-width", "64"],
    "lut_simmim": ["--head-width", "64"],
    "lomar": ["--window-size", "2", "--windows", "2"],
}


def recipe(name: str, *args: object, check: bool = True, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run a recipe in a process of its own, where nothing is type-checked at run time."""
    command = [sys.executable, *before, str(ROOT / "recipes" / f"{name}.py"), *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The encoder, without the keys' biases: they change nothing, and their gradients are rounding alone."""
    tensors = read_tensors(folder / "encoder.safetensors")[0]
    for name in [name for name in tensors if name.endswith("qkv.bias")]:
        q, _, v = tensors[name].chunk(3)
        tensors[name] = torch.cat([q, v])
    return tensors


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kept(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint: the method's, its teacher's, the optimizer's."""
    return read_tensors(max((folder / "checkpoint").glob("step_*")) / "tensors.safetensors")[0]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """Run a recipe as a user does, once for all tests; its folder and what it printed."""
    wanted = {"mae": ["finetune", "linear", "knn", "nonlinear"]}
    wanted |= {name: ["finetune"] for name in ("beyond_masking", "lut", "hpm", "droppos", "lomar")}
    wanted |= {"simmim": ["finetune", "scratch", "linear", "knn", "nonlinear"]}

    @functools.cache
    def run(name: str) -> tuple[Path, str]:
        runs = tmp_path_factory.mktemp(name)
        evaluate = ["--evaluate", *wanted.get(name, ["finetune", "scratch", "budget"])]
        done = recipe(name, *RECIPES[name], *SMALL, *TUNED, *evaluate, "--device", "cpu", "--runs", runs)
        return runs / name, done.stdout

    return run


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


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_leaves_all_that_it_promises(name: str, finished: Any, tmp_path: Path) -> None:
    folder, printed = finished(name)
    for file in ("config.json", "metrics.jsonl", "encoder.safetensors", "result.json"):
        assert (folder / file).stat().st_size
    for picture in ("reconstruction.png", "curves.png"):
        assert Image.open(folder / picture).size[0] > 200
    assert json.loads((folder / "config.json").read_text())["recipe"] == name
    assert list(folder.glob("events.out.tfevents.*"))
    result = json.loads((folder / "result.json").read_text())
    assert result["finetune"]["labeled"] == 100
    assert 0 <= result["finetune"]["accuracy"] <= 100
    assert f"{result['finetune']['accuracy']:.1f} %" in printed
    assert all(np.isfinite(record["loss"]) for record in metrics(folder))

    again = recipe(name, *RECIPES[name], *SMALL, "--runs", folder.parent, check=False)
    assert again.returncode == 1
    assert "holds a run already: go on with --resume, delete it with --restart, or give another --name" in again.stderr
    recipe("finetune", "--encoder", folder / "encoder.safetensors", "--epochs", 1, "--runs", tmp_path, "--workers", 0)
    assert (tmp_path / "finetune" / "result.json").exists()


def test_a_folder_of_grayscale_pictures_that_are_not_square(pictures: Path, tmp_path: Path) -> None:
    size = shlex.split("--image-size 48 80 --channels 1 --epochs 2 --workers 2")
    tuned = shlex.split("--finetune.epochs 1 --finetune.batch-size 8")
    recipe("mae", "--data", pictures, *PICTURES, *size, *tuned, "--runs", tmp_path)
    assert weights(tmp_path / "mae")["pos_embed"].shape == (1, 1 + 3 * 5, 96)
    assert json.loads((tmp_path / "mae" / "result.json").read_text())["finetune"]["test"] == 6


def test_without_a_test_split_it_says_so_and_pre_trains(pictures: Path, tmp_path: Path) -> None:
    (pictures / "val").rename(tmp_path / "away")
    size = ["--image-size", "32", "32", "--epochs", "1"]
    done = recipe("mae", "--data", pictures, *PICTURES, *size, "--runs", tmp_path)
    assert "no evaluation at the end, pre-training only:" in done.stdout
    assert (tmp_path / "mae" / "encoder.safetensors").exists()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--image-size", "30", "32"], "--image-size 30 32 is not made of patches of 4 × 4"),
        (["--batch-size", "2000"], "1300 images do not fill a batch of 2000: use a smaller --batch-size"),
        (["--mask-ratio", "nan"], "--mask-ratio nan of 64 patches does not leave both masked and visible ones"),
        (["--mask-ratio", "1"], "--mask-ratio 1.0 of 64 patches does not leave both masked and visible ones"),
        (["--view-size", "47", "46"], "--view-size 47 is not an even number more than --image-size 32"),
        (["--statistics", "imagenet"], "ImageNet's mean and std have 3 channels, not 1: use --statistics data"),
        (
            ["--finetune.batch-size", "101"],
            "do not fill a batch of 101: use a smaller --finetune.batch-size",
        ),
        (["--data", "nowhere"], "nowhere"),
        (["--labels-per-class", "999"], "--labels-per-class 999 of the 126 training images of a digit cannot be drawn"),
    ],
)
def test_a_wrong_setting_is_one_sentence(args: list[str], sentence: str, tmp_path: Path) -> None:
    args = [*args, "--preset", "digits", "--runs", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        pretrain(beyond_masking_integrated.RECIPE, name="integrated", args=args)
    assert sentence in str(ended.value.code)
    assert not list(tmp_path.glob("*/checkpoint"))
    with pytest.raises(SystemExit) as again:  # and does not stand in the way of the next try
        pretrain(beyond_masking_integrated.RECIPE, name="integrated", args=args)
    assert str(again.value.code) == str(ended.value.code)


def test_a_run_that_was_killed_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    args = [*SMALL, "--epochs", "6", "--evaluate", "--log-every", "2", "--checkpoint-minutes", "0"]
    recipe("hpm", *args, "--runs", tmp_path, "--name", "whole")  # whose teacher goes on, too
    command = [sys.executable, str(ROOT / "recipes" / "hpm.py"), *args, "--runs", str(tmp_path), "--name", "cut"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not list((tmp_path / "cut" / "checkpoint").glob("step_00000001*")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "encoder.safetensors").exists()
    recipe("hpm", *args, "--runs", tmp_path, "--name", "cut", "--resume", "--workers", "1")
    whole, cut = kept(tmp_path / "whole"), kept(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole | cut)
    assert any(name.startswith("method.teacher.") for name in whole)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert [r["loss"] for r in metrics(tmp_path / "whole")] == [r["loss"] for r in metrics(tmp_path / "cut")]


@pytest.mark.parametrize("name", ["mae", "hpm", "lomar"])
def test_two_processes_equal_one(name: str, finished: Any, tmp_path: Path) -> None:
    """Also of HPM, though its ranking loss is a quotient: all pieces have as many pairs. Each image of LoMaR has
    windows of its own. DropPos divides by the weights of a piece, and these differ, as in the published code; see
    `test_hard_and_dropped.py`."""
    one, _ = finished(name)
    args = [*RECIPES[name], *SMALL, "--evaluate", "--device", "cpu", "--runs", tmp_path]
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone")
    for run, cut in {"mae": [("two", []), ("pieces", [65])]}.get(name, [("pieces", [65])]):
        recipe(name, *args, "--name", run, *(["--device-batch", *cut] if cut else []), before=torchrun)
        for key, tensor in weights(one).items():
            torch.testing.assert_close(weights(tmp_path / run)[key], tensor, rtol=1e-4, atol=1e-5)
        for record, other in zip(metrics(one), metrics(tmp_path / run), strict=True):
            assert record["loss"] == pytest.approx(other["loss"], rel=1e-5)
        for key, tensor in kept(one).items():
            if key.startswith("method.teacher") and key.endswith("weight"):
                torch.testing.assert_close(kept(tmp_path / run)[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mae", "beyond_masking_integrated", "simmim", "hpm", "droppos", "lomar"])
def test_compiled_equals_eager_in_one_graph_for_the_whole_training(name: str, finished: Any, tmp_path: Path) -> None:
    eager, _ = finished(name)
    strict = "import torch, sys, runpy; torch._dynamo.config.error_on_recompile = True; del sys.argv[0]; "
    if name in ("hpm", "droppos", "lomar"):  # the graphs are large: captured here, lowered in `forms_of_….py`
        strict += "import functools; torch.compile = functools.partial(torch.compile, backend='eager'); "
    strict += "sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    args = [*RECIPES[name], *SMALL, "--evaluate", "--device", "cpu", "--runs", tmp_path]
    recipe(name, *args, "--name", "compiled", "--compile", "on", before=("-c", strict))
    for one, other in zip(metrics(eager), metrics(tmp_path / "compiled"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    for key, tensor in weights(eager).items():
        torch.testing.assert_close(weights(tmp_path / "compiled")[key], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", RECIPES)
def test_a_gpu_compiles_the_whole_training(name: str, tmp_path: Path) -> None:
    done = recipe(name, *RECIPES[name], *SMALL, "--evaluate", "--runs", tmp_path)
    assert done.returncode == 0
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


@pytest.mark.parametrize("last", [2, 4])
def test_weights_that_are_not_finite_are_neither_kept_nor_exported(
    last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss is computed before the step that destroys the weights, and that step may be the last one."""
    monkeypatch.setattr(engine, "learning_rate", lambda step, *_: np.inf if step == last else 1e-3)
    args = [*SMALL, "--evaluate", "--runs", str(tmp_path), "--epochs", "1", "--log-every", "1"]
    with pytest.raises(
        SystemExit, match=f"weights after step {last + 1} are not finite; the checkpoint of step {last}"
    ):
        pretrain(mae.RECIPE, name="mae", args=[*args, "--checkpoint-minutes", "0"])
    assert not (tmp_path / "mae" / "encoder.safetensors").exists()
    for tensor in kept(tmp_path / "mae").values():
        assert not tensor.is_floating_point() or tensor.isfinite().all()
