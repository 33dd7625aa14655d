"""A small encoder, images to evaluate it on, and the probes as programs in this process."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.config import DataSettings, Run
from common.data.normalize import Normalize
from common.data.sources import Data, open_data
from common.evaluation.knn import knn
from common.evaluation.linear import linear
from common.evaluation.nonlinear import nonlinear
from common.evaluation.probe import probe
from common.networks.initialization import initialize_mae
from common.networks.vit import ViT
from common.runs import Stage
from common.training.distributed import Processes
from common.weights.encoders import export

import knn as knn_recipe
import linear_probe
import nonlinear_probe
import torch

ROOT = Path(__file__).parent.parent
RUN = Run(workers=0)
NORMALIZE = Normalize([0.3], [0.35])
IMAGES = DataSettings(path="digits", image_size=(16, 16), channels=1, flip=0.0, labels_per_class=3)
RECIPES = {
    "linear_probe": (linear, linear_probe.PRESETS, "--epochs 20"),
    "knn": (knn, knn_recipe.PRESETS, ""),
    "nonlinear_probe": (nonlinear, nonlinear_probe.PRESETS, "--epochs 2 --warmup-epochs 1"),
}


def small(*, class_token: bool = True) -> ViT:
    torch.manual_seed(0)
    vit = ViT(height=2, width=2, patch=8, channels=1, dim=24, depth=2, heads=3, class_token=class_token)
    initialize_mae(vit)
    return vit


def exported(folder: Path) -> Path:
    export(folder / "encoder.safetensors", small(), NORMALIZE)
    return folder / "encoder.safetensors"


def stage(folder: Path, data: Data | None = None) -> Stage:
    processes = Processes(0, 1, torch.device("cpu"))
    return Stage(processes, data or open_data(IMAGES, seed=RUN.seed), RUN, folder, "probe")


def recipe(name: str, *args: object) -> dict[str, Any]:
    """Run a probe in this process."""
    evaluation, presets, more = RECIPES[name]
    words = ["--data", "digits", *shlex.split(more), "--workers", "0", "--device", "cpu", *map(str, args)]
    return probe(evaluation, presets, name=name, title=name, description=None, args=words)


def in_two_processes(script: str, *args: object) -> None:
    """Run a recipe as `torchrun` runs it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    command += [str(ROOT / "recipes" / f"{script}.py"), "--data", "digits", "--device", "cpu", "--workers", "0"]
    command += map(str, args)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
