"""Runs that are killed at random moments, again and again, end as if nothing had happened.

The nightly profile of Hypothesis kills ten times as often, at other moments each time.
"""

import importlib
import json
import os
import random
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from common.pretraining import pretrain
from common.training.checkpoint import Checkpoints

import hypothesis
import pytest
import torch
from forked import ended, fork, ranks
from small_runs import metrics

OPTIONS = shlex.split(
    "--image-size 16 16 --patch 4 --size nano --decoder-dim 12 --decoder-heads 2 --decoder-depth 1 --epochs 3 "
    "--batch-size 260 --warmup-epochs 1 --log-every 2 --checkpoint-minutes 0 --device cpu --compile off "
    "--evaluate finetune --finetune.epochs 3 --finetune.batch-size 40 --finetune.mixup 0.8 --finetune.erasing 0.25"
)


def start(name: str, folder: Path, *options: str, processes: int = 1) -> list[int]:
    """Start a recipe in forked processes, from its last checkpoint if there is one."""
    words = [*OPTIONS, *options, "--runs", str(folder.parent), "--name", folder.name]
    words += ["--resume"] if Checkpoints(folder / "checkpoint").steps() else []
    module, output = importlib.import_module(name), folder.with_suffix(".txt")
    environments = ranks(processes) if processes > 1 else [{}]
    return [fork(lambda: pretrain(module.RECIPE, name=name, args=words), output, **own) for own in environments]


def killed_after(seconds: float, pids: list[int]) -> bool:
    """Kill processes after some time, and return whether they were still at work."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    codes = [ended(pid) for pid in pids]
    return codes[0] == -signal.SIGKILL


def left_by(folder: Path) -> dict[str, Any]:
    """Return what a run leaves, without measured times."""
    times = ("images_per_second", "waiting", "seconds")
    result = json.loads((folder / "result.json").read_text())
    stages = {"": folder, "finetune": folder / "finetune"}
    return {
        "encoder": (folder / "encoder.safetensors").read_bytes(),
        "results": [{k: v for k, v in result[s].items() if k not in times} for s in ("pretraining", "finetune")],
        "losses": [[(r["step"], r["loss"]) for r in metrics(stage)] for stage in stages.values()],
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = [Checkpoints(stage / "checkpoint").load() for stage in (folder, folder / "finetune")]
    return {f"{i}.{name}": tensor for i, one in enumerate(found) if one for name, tensor in one.tensors.items()}


@pytest.mark.parametrize(
    ("name", "options", "processes"),
    [
        ("hpm", ["--workers", "0"], 1),
        ("lut", ["--workers", "2", "--head-width", "16"], 1),
        ("hpm", ["--workers", "0"], 2),
    ],
)
def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(
    name: str, options: list[str], processes: int, tmp_path: Path
) -> None:
    nightly = hypothesis.settings.get_current_profile_name() == "nightly"
    moments, kills = random.Random(None if nightly else f"{name} {processes}"), 70 if nightly else 7
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    began = time.monotonic()
    assert [ended(pid) for pid in start(name, whole, *options, processes=processes)] == [0] * processes
    duration = time.monotonic() - began
    while kills:
        if killed_after(moments.uniform(0, 0.6) * duration, start(name, cut, *options, processes=processes)):
            kills -= 1
        else:  # it came to its end before
            assert left_by(whole) == left_by(cut)
            shutil.rmtree(cut)
    codes = [ended(pid) for pid in start(name, cut, *options, processes=processes)]
    assert codes == [0] * processes, (tmp_path / "cut.txt").read_text()
    assert left_by(whole) == left_by(cut)
    one, other = tensors(whole), tensors(cut)
    assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())
