"""Compiled training on several devices, the default on GPUs: how many graphs, and none after the first step."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SMALL = shlex.split(
    "--image-size 16 16 --patch 4 --epochs 1 --batch-size 260 --warmup-epochs 1 --workers 0 --evaluate finetune "
    "--finetune.epochs 1 --finetune.batch-size 50"
)
DECODER = shlex.split("--decoder-dim 12 --decoder-heads 2 --decoder-depth 12")

# What differs between blocks: encoder or decoder, which tokens they read and return, with gradients or without
GRAPHS = {
    "mae": (3, DECODER),  # encoder, decoder, its last block
    "beyond_masking": (1, ["--task", "zoom_out", *DECODER]),  # here both read all tokens, and are equally wide
    "beyond_masking_integrated": (2, ["--view-size", "22", "22", *DECODER]),
    "hpm": (5, DECODER),  # and the teacher's two networks
    "hpm --shard": (5, DECODER),
    "droppos": (4, DECODER),  # and the guide, whose last block returns a part
    "simmim": (1, []),  # twelve blocks, each with its own drop rate
    "lut": (4, ["--head-width", "64", *DECODER]),
    "lut_simmim": (2, ["--head-width", "64"]),
    "lomar": (1, ["--window-size", "2", "--windows", "2"]),
}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Every recipe with its fine-tuning, in two processes and with twelve blocks; see `compiled.py`."""
    folder = tmp_path_factory.mktemp("compiled")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    command += [Path(__file__).parent / "compiled.py", folder / "report", "12"]
    for name, (_, options) in GRAPHS.items():
        command += ["--", *name.split(), *options, *SMALL, "--runs", folder, "--name", name.replace(" ", "")]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (folder / "report").read_text().splitlines()
    return {name: json.loads(line)["trainings"] for name, line in zip(GRAPHS, lines, strict=True)}


@pytest.mark.parametrize("name", GRAPHS)
def test_two_processes_compile_one_graph_per_form_of_a_block_and_none_after_the_first_step(
    name: str, trainings: dict[str, list[dict[str, Any]]]
) -> None:
    pretraining, finetuning = trainings[name]
    assert pretraining["step"] == 5
    assert pretraining["captured"] == [0] * GRAPHS[name][0]
    assert finetuning["step"] == 2
    assert finetuning["captured"] == [0]
