"""Small runs of the recipes on real digits: in this process, in one of their own, or once for all tests."""

import contextlib
import fcntl
import importlib
import io
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.evaluation import finetuning, nonlinear
from common.files import read_tensors
from common.pretraining import pretrain

import pytest
import torch

ROOT = Path(__file__).parent.parent
SMALL = shlex.split(
    "--data digits --image-size 16 16 --patch 4 --epochs 2 --batch-size 260 --warmup-epochs 1 --workers 0 --log-every 2"
)
TUNED = shlex.split(
    "--finetune.epochs 2 --finetune.batch-size 40 --finetune.mixup 0.8 --finetune.cutmix 1 --finetune.erasing 0.25"
)
RECIPES = {
    "mae": [],
    "beyond_masking": ["--task", "zoom_out"],
    "beyond_masking_integrated": ["--view-size", "22", "22"],
    "hpm": [],
    "droppos": [],
    "simmim": [],
    "lut": ["--head-width", "64", "--epochs", "1"],  # whose views take most of the time
    "lut_simmim": ["--head-width", "64", "--epochs", "1"],
    "lomar": ["--window-size", "2", "--windows", "2"],
}
# What follows the pre-training of some recipes; the others are fine-tuned
EVALUATIONS = {
    "mae": ["finetune", "linear", "knn", "nonlinear"],
    "simmim": ["finetune", "scratch", "linear", "knn", "nonlinear"],
    "beyond_masking_integrated": ["finetune", "scratch", "budget"],
}


def environment() -> dict[str, str]:
    """Return the environment of programs: one thread each, and the blocks that stand beside the recipes."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def recipe(name: str, *args: object, check: bool = True) -> subprocess.CompletedProcess:
    """Run a recipe in a process of its own, where nothing is type-checked at run time."""
    command = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def in_one_program(folder: Path, runs: list[dict[str, Any]], *, processes: int = 1) -> list[list[dict[str, Any]]]:
    """Run programs by `compiled.py`, and return what it reports of the trainings of each."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0", "--standalone"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "tests" / "compiled.py")]
    command += [str(folder / "report"), json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (folder / "report").read_text().splitlines()]


def printed(main: Callable[[], object]) -> str:
    """Call a program in this process, and return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        main()
    return text.getvalue()


def pretrained(name: str, *args: object) -> str:
    """Run a recipe of pre-training in this process, and return what it prints."""
    module = importlib.import_module(name)
    return printed(lambda: pretrain(module.RECIPE, name=name, description=module.__doc__, args=[*map(str, args)]))


def called(name: str, *args: object) -> str:
    """Run any program of `recipes/` in this process as if it were started, and return what it prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        return printed(lambda: runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__"))


def refused(name: str, *args: object) -> str:
    """Run a program in this process that ends at once, and return the sentence that it prints."""
    with pytest.raises(SystemExit) as ended:
        called(name, *args)
    return str(ended.value.code)


def once(name: str, factory: pytest.TempPathFactory, make: Callable[[Path], object]) -> Path:
    """Return a folder that `make` has filled, once for all tests and workers of this session."""
    together = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder = together / "once" / name
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.with_suffix(".made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            folder.with_suffix(".made").touch()
    return folder


def finished(name: str, factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of a small run of a recipe with its evaluations, and what it printed."""

    def make(runs: Path) -> None:
        evaluate = ["--evaluate", *EVALUATIONS.get(name, ["finetune"])]
        with pytest.MonkeyPatch.context() as patch:
            tuning = finetuning.of(nonlinear.DIGITS.finetune, epochs=2)
            patch.setattr(nonlinear, "DIGITS", replace(nonlinear.DIGITS, finetune=tuning))
            text = pretrained(name, *SMALL, *RECIPES[name], *TUNED, *evaluate, "--device", "cpu", "--runs", runs)
        (runs / "printed").write_text(text)

    runs = once(name, factory, make)
    return runs / name, (runs / "printed").read_text()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the encoder without the keys' biases: they change nothing, and their gradients are rounding alone."""
    tensors = read_tensors(folder / "encoder.safetensors")[0]
    for name in [name for name in tensors if name.endswith("qkv.bias")]:
        q, _, v = tensors[name].chunk(3)
        tensors[name] = torch.cat([q, v])
    return tensors


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kept(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of the newest checkpoint: the method's, its teacher's, the optimizer's."""
    return read_tensors(max((folder / "checkpoint").glob("step_*")) / "tensors.safetensors")[0]
