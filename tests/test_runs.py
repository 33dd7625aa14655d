"""The folder of a run: what is written there, and which runs may go on in it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import SettingsError
from common.files import read_json
from common.recipe import changed
from common.runs import prepare
from common.training.distributed import Processes

import mae
import pytest
import torch

PROCESSES = Processes(0, 1, torch.device("cpu"))
CONFIG = mae.PRESETS["digits"]


def prepared(folder: Path, recipe: str = "mae", **changes: Any) -> dict[str, Any]:
    """The settings that stand in the folder afterwards."""
    config = changed(CONFIG, **changes)
    prepare(folder, recipe, config, resume=config.run.resume, processes=PROCESSES)
    return read_json(folder / "config.json")


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a run that has trained."""
    prepared(tmp_path / "mae", epochs=2)
    (tmp_path / "mae" / "metrics.jsonl").write_text('{"step": 1}\n')
    return tmp_path / "mae"


def test_a_run_begins_with_its_recipe_and_its_settings(tmp_path: Path) -> None:
    found = prepared(tmp_path / "runs" / "mae", epochs=2)
    assert (found["recipe"], found["optimization"]["epochs"]) == ("mae", 2)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_has_not_trained_begins_anew(resume: bool, tmp_path: Path) -> None:
    """Whatever stopped it does not stand in the way of the next try."""
    prepared(tmp_path, epochs=2)
    (tmp_path / "metrics.jsonl").touch()
    found = prepared(tmp_path, "simmim", epochs=3, resume=resume)
    assert (found["recipe"], found["optimization"]["epochs"]) == ("simmim", 3)


@pytest.mark.parametrize("file", ["metrics.jsonl", "result.json", "checkpoint"])
def test_a_run_that_has_trained_is_not_overwritten(file: str, tmp_path: Path) -> None:
    prepared(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    (tmp_path / file).mkdir() if file == "checkpoint" else (tmp_path / file).write_text("{}")
    with pytest.raises(SettingsError) as caught:
        prepared(tmp_path, epochs=3)
    assert str(caught.value) == f"{tmp_path} holds a run already: go on with --resume, or give another --name"
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_run_is_resumed_by_its_own_recipe_only(begun: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        prepared(begun, "simmim", epochs=2, resume=True)
    assert str(caught.value) == f"{begun} holds a run of mae, which simmim cannot resume: give another --name"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 3}, "--epochs 2 and cannot be resumed with 3"),
        ({"epochs": 2, "seed": 1}, "--seed 0 and cannot be resumed with 1"),
        ({"epochs": 2, "image_size": (48, 32)}, "--image-size 32 32 and cannot be resumed with 48 32"),
        ({"epochs": 2, "mask_ratio": 0.5}, "--mask-ratio 0.75 and cannot be resumed with 0.5"),
        ({"epochs": 2, "clip": 1.0}, "--clip None and cannot be resumed with 1.0"),
        ({"epochs": 2, "weights": Path("a.pth")}, "--weights None and cannot be resumed with a.pth"),
        (
            {"epochs": 2, "finetune": replace(CONFIG.finetune, smoothing=0.0)},
            "--finetune.smoothing 0.1 and cannot be resumed with 0.0",
        ),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(changes: dict[str, Any], sentence: str, begun: Path) -> None:
    before = (begun / "config.json").read_bytes()
    with pytest.raises(SettingsError) as caught:
        prepared(begun, resume=True, **changes)
    assert str(caught.value) == f"{begun} was started with {sentence}"
    assert (begun / "config.json").read_bytes() == before


def test_what_does_not_change_the_result_may_differ(begun: Path) -> None:
    before = (begun / "config.json").read_bytes()
    harmless = {"workers": 3, "keep": 7, "compile": "on", "checkpoint_minutes": 1.0, "device_batch": 32}
    prepared(begun, resume=True, epochs=2, path=Path("elsewhere"), name="other", **harmless)
    assert (begun / "config.json").read_bytes() == before


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[bool] = []
    monkeypatch.setattr(Processes, "barrier", lambda _: waited.append((tmp_path / "mae").exists()))
    prepare(tmp_path / "mae", "mae", CONFIG, resume=False, processes=Processes(1, 2, torch.device("cpu")))
    assert not (tmp_path / "mae").exists()
    prepare(tmp_path / "mae", "mae", CONFIG, resume=False, processes=Processes(0, 2, torch.device("cpu")))
    assert (tmp_path / "mae").exists()
    assert waited == [False, False]  # all have looked before the first one writes
