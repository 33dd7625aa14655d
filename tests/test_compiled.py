"""Compiled training, and training in two processes: how many graphs, none after the first step, and the same result.

All programs that need two processes share them, one after another; see `compiled.py`.
"""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import RECIPES, SMALL, TUNED, finished, in_one_program, kept, metrics, once, pretrained, weights

TWELVE = {"dim": 12, "depth": 12, "heads": 2}
BLOCKS = shlex.split(
    "--data digits --image-size 16 16 --patch 4 --epochs 1 --batch-size 260 --warmup-epochs 1 --workers 0 "
    "--evaluate finetune --finetune.epochs 1 --finetune.batch-size 48 --finetune.mixup 0.8 --finetune.cutmix 1 "
    "--finetune.erasing 0.25 --compile on --device cpu"
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
# Runs of two processes that must equal those of one, and their options
PLAIN = ["--compile", "off", "--device", "cpu", "--evaluate"]
ALIKE = {
    "whole": ("mae", []),
    "mae": ("mae", ["--device-batch", "65", "--finetune.device-batch", "10", *TUNED]),
    "hpm": ("hpm", ["--device-batch", "65"]),
    "lomar": ("lomar", ["--device-batch", "65"]),
}
# The steps are small: batch norm amplifies what the order of a sum changes. Its batches are not accumulated.
WITH_BATCH_NORM = shlex.split(
    "--data digits --image-size 16 16 --patch 4 --epochs 1 --batch-size 130 --warmup-epochs 1 --workers 0 "
    "--log-every 2 --head-width 32 --decoder-dim 24 --decoder-depth 1 --decoder-heads 2 --base-lr 1e-4 "
    "--device-batch 130"
)
# The graphs of three of them are large: captured here, and lowered in `forms.py`
BACKENDS = {
    **dict.fromkeys(("mae", "beyond_masking_integrated", "simmim"), "inductor"),
    **dict.fromkeys(("hpm", "droppos", "lomar"), "eager"),
}


def run_of(name: str, options: list[str], *, backend: str = "eager", size: Any = None) -> dict[str, Any]:
    return {"program": f"recipes/{name}.py", "options": options, "backend": backend, "size": size}


def two_processes(factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the runs of two processes, and the trainings of those that were compiled."""

    def make(folder: Path) -> None:
        runs = [
            run_of(
                name, [*more, *options, *BLOCKS, "--runs", str(folder), "--name", "".join([name, *more])], size=TWELVE
            )
            for (name, *more), options in ((title.split(), options) for title, (_, options) in GRAPHS.items())
        ]
        alike = [*PLAIN, "--runs", str(folder / "alike"), "--name"]
        for run, (name, options) in ALIKE.items():
            evaluate = ["--evaluate", "finetune"] if run == "mae" else []
            runs.append(run_of(name, [*SMALL, *RECIPES[name], *options, *alike, run, *evaluate]))
        runs.append(run_of("lut", [*WITH_BATCH_NORM, *alike, "lut"]))
        runs.append({"program": "tests/two_devices.py", "options": [], "backend": "eager", "size": None})
        reports = in_one_program(folder, runs, processes=2)
        assert len(reports) == len(runs)
        (folder / "trainings").write_text(json.dumps(dict(zip(GRAPHS, reports, strict=False))))

    folder = once("two_processes", factory, make)
    return folder, json.loads((folder / "trainings").read_text())


def one_process(factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the folder of eager and compiled runs of one process, and the trainings of the latter."""

    def make(folder: Path) -> None:
        size = {"dim": 48, "depth": 2, "heads": 3}
        common = ["--evaluate", "--device", "cpu", "--runs"]
        runs = [
            run_of(
                name,
                [*SMALL, *RECIPES[name], *common, str(folder / switch), "--compile", switch],
                backend=backend,
                size=size,
            )
            for name, backend in BACKENDS.items()
            for switch in ("off", "on")
        ]
        reports = in_one_program(folder, runs)
        (folder / "trainings").write_text(json.dumps(dict(zip(BACKENDS, reports[1::2], strict=True))))

    folder = once("one_process", factory, make)
    return folder, json.loads((folder / "trainings").read_text())


@pytest.mark.parametrize("name", GRAPHS)
def test_two_processes_compile_one_graph_per_form_of_a_block_and_none_after_the_first_step(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pretraining, finetuning = two_processes(tmp_path_factory)[1][name]
    assert pretraining["step"] == 5
    assert pretraining["captured"] == [0] * GRAPHS[name][0]
    assert finetuning["step"] == 2
    assert finetuning["captured"] == [0, 0]  # mixing, and the blocks


@pytest.mark.parametrize("run", ALIKE)
def test_two_processes_equal_one(run: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Also of HPM, though its ranking loss is a quotient: all micro-batches have as many pairs. Each image of LoMaR has
    windows of its own. DropPos divides by the weights of a micro-batch, and these differ, as in the published code; see
    `test_droppos.py`."""
    one, _ = finished(ALIKE[run][0], tmp_path_factory)
    two = two_processes(tmp_path_factory)[0] / "alike" / run
    for key, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[key], tensor, rtol=1e-4, atol=1e-5)
    for record, other in zip(metrics(one), metrics(two), strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for key, tensor in kept(one).items():
        if key.startswith("method.teacher") and key.endswith("weight"):
            torch.testing.assert_close(kept(two)[key], tensor, rtol=1e-4, atol=1e-5)
    if run == "mae":  # fine-tuned, too, with mixed pairs
        for record, other in zip(metrics(one / "finetune"), metrics(two / "finetune"), strict=True):
            assert record["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_two_processes_equal_one_with_the_statistics_of_batch_norm(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = once("one_lut", tmp_path_factory, lambda runs: pretrained("lut", *WITH_BATCH_NORM, *PLAIN, "--runs", runs))
    runs = [folder / "lut", two_processes(tmp_path_factory)[0] / "alike" / "lut"]
    one, two = map(kept, runs)
    for name in one:
        if "running" in name or "teacher" in name:
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    records = [metrics(run) for run in runs]
    assert len(records[0]) == 5
    for record, other in zip(*records, strict=True):
        assert record["pixels"] == pytest.approx(other["pixels"], rel=1e-4)
        assert record["context"] == pytest.approx(other["context"], rel=1e-3)


def test_batch_norm_over_two_devices_is_that_of_all_images_and_else_statistics_are_averaged(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Checked in `two_devices.py`, the last program: if one fails, those after it do not run, and no folder is left."""
    folder, _ = two_processes(tmp_path_factory)
    assert (folder / "report").read_text().splitlines()[-1] == "[]"  # it has no trainings


@pytest.mark.parametrize("name", BACKENDS)
def test_compiled_equals_eager_in_one_graph_for_the_whole_training(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, trainings = one_process(tmp_path_factory)
    eager, compiled = (folder / switch / name for switch in ("off", "on"))
    [training] = trainings[name]
    assert training["step"] == 10
    assert training["captured"] == [0]
    for one, other in zip(metrics(eager), metrics(compiled), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    for key, tensor in weights(eager).items():
        torch.testing.assert_close(weights(compiled)[key], tensor, rtol=1e-2, atol=1e-3)
