"""The benchmark for a GPU at toy size on a CPU, where it must run whole."""

import json
import math
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from common.training.distributed import ALONE

import gpu
import gpu_speed
import gpu_trainings
import pytest
import torch
from measuring import kept_bytes

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of the program, run in a process of its own, where nothing is type-checked at run time."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, PROGRAM, "--toy", "--methods", "mae", "lut", "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text()) | {"printed": done.stdout}


def rows(report: dict[str, Any], section: str) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in report["sections"][section]["rows"]}


def bench(folder: Path, **changes: Any) -> gpu_trainings.Bench:
    settings = {"toy": True, "methods": ("mae", "lut"), "batch": 0, "ends": math.inf, "warmup": 1, "steps": 1}
    return gpu_trainings.Bench(ALONE, folder=folder, **settings | changes)


def test_every_section_is_in_the_report_without_an_error_and_its_numbers_are_possible(report: dict[str, Any]) -> None:
    assert list(report["sections"]) == list(gpu.SECTIONS)
    assert report["card"]
    assert report["versions"]["torch"] != "–"
    for name, section in report["sections"].items():
        assert "error" not in section, section
        assert section["rows"]
        for row in section["rows"]:
            assert "error" not in row, (name, row)
            assert all(math.isfinite(value) and value >= 0 for value in row.values() if isinstance(value, float)), row
            assert all(row[key] > 0 for key in row if key == "images/s" or key.endswith((" ms", "TFLOP/s"))), row
            assert row["what"] in report["printed"]


def test_on_a_cpu_the_tests_for_a_gpu_are_skipped_and_the_promises_hold(report: dict[str, Any]) -> None:
    assert rows(report, "tests")["tests"] == {"what": "tests", "passed": 0, "failed": 0, "skipped": 9}
    assert all(row["synchronizations"] == 0 for row in rows(report, "sync").values())
    graphs = [(row["graphs"], row["graphs after step 1"]) for row in rows(report, "recompiles").values()]
    assert graphs == [(1, 0), (1, 0)]
    assert all(row["equal"] for row in rows(report, "determinism").values())
    assert rows(report, "determinism")["noise"]["equal to the CPU's"]
    assert all(row["difference"] < 1e-4 for row in rows(report, "attention").values())


def test_the_speed_of_every_method_and_of_the_peers_is_reported(report: dict[str, Any]) -> None:
    speed = rows(report, "speed")
    assert {"matmul peak", "mae toy", "lut toy"} < set(speed)
    for peer in ("transformers", "lightly"):
        own = speed[f"mae, {peer}"]
        assert "left out" in own or own["time ÷ ours"] > 0
    data = rows(report, "data")
    assert data["mae, JPEGs"]["÷ synthetic"] > 0
    memory = [row["kept kB"] for row in rows(report, "sharding").values() if "kept kB" in row]
    assert memory == sorted(memory, reverse=True)  # less with activation checkpointing
    assert memory[0] > memory[1]


def test_a_section_or_a_method_that_fails_is_reported_and_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("this section is broken")

    def of(name: str) -> dict[str, Any]:
        return {"images/s": 1.0} if name != "hpm" else fail()

    def methods(here: gpu_trainings.Bench) -> list[dict[str, Any]]:
        return gpu_trainings.each(here, ["mae", "hpm", "lut"], of)

    monkeypatch.setattr(gpu, "SECTIONS", {"sync": fail, "speed": methods})
    settings = gpu.Settings(out=tmp_path / "gpu.json")
    gpu.report(settings, bench(tmp_path))
    found = json.loads(settings.out.read_text())["sections"]
    assert found["sync"]["error"].startswith("ZeroDivisionError: this section is broken (tests/test_gpu_benchmark.py:")
    first, second, third = found["speed"]["rows"]
    assert first == {"what": "mae", "images/s": 1.0}
    assert second["error"].startswith("ZeroDivisionError")
    assert third == {"what": "lut", "images/s": 1.0}
    assert "this section is broken" in capsys.readouterr().out


def test_a_step_that_reads_a_value_back_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = gpu_trainings._Training.step

    def waiting(self: Any, stream: Any) -> None:
        step(self, stream)
        self.window.sum().item()

    monkeypatch.setattr(gpu_trainings._Training, "step", waiting)
    (row,) = gpu_trainings.sync(bench(tmp_path, methods=("mae",)))
    assert row == {"what": "mae", "steps": 2, "synchronizations": 2}


def test_two_runs_that_differ_are_reported_with_their_largest_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run, added = gpu_trainings.a_run, iter((0.0, 0.5, 0.0, 0.0))

    def different(*args: Any) -> Any:
        losses, weights = a_run(*args)
        weights["encoder.norm.bias"] = weights["encoder.norm.bias"] + next(added)
        return losses, weights

    monkeypatch.setattr(gpu_trainings, "a_run", different)
    monkeypatch.setattr(gpu_trainings, "COMPILED", ())
    first, second, _ = gpu_trainings.determinism(bench(tmp_path))
    assert first == {
        "what": "mae",
        "equal": False,
        "largest difference of losses": 0.0,
        "of weights": pytest.approx(0.5),
    }
    assert second["equal"]


def test_a_batch_that_does_not_fit_is_halved_and_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    tried = []

    def attempt(batch: int) -> None:
        tried.append(batch)
        if batch > 128:
            raise gpu_speed.torch.OutOfMemoryError("out of memory")

    assert gpu_speed.fitting(bench(tmp_path, toy=False), attempt) == 128
    assert tried == [512, 256, 128]
    with pytest.raises(MemoryError, match="not even a batch of 8 fits"):
        gpu_speed.fitting(bench(tmp_path, toy=False), lambda _: attempt(1024))
    late = gpu_trainings.each(bench(tmp_path, ends=time.monotonic() - 1), ["mae"], lambda _: {})
    assert late == [{"what": "mae", "left out": "no time left"}]


def test_what_is_kept_for_the_backward_pass_is_counted_and_then_freed() -> None:
    leaf = torch.zeros(5, 7, requires_grad=True)
    alive = weakref.ref(leaf)
    assert kept_bytes(lambda: leaf.exp().sum()) == 5 * 7 * 4  # the exponential, an output of its own node
    del leaf
    assert alive() is None


def test_flops_are_counted_as_the_shapes_give_them(tmp_path: Path) -> None:
    here = bench(tmp_path, toy=False)
    formula, _ = gpu_speed.flops_per_image(here, "mae", "base")
    counted = gpu_speed.counted_flops(here, "mae", "base")
    assert counted == pytest.approx(formula, rel=0.03)
