"""A run that is resumed notices that its images are others, says how, and goes on only if it is told to."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from common.config import DataSettings, Run, SettingsError
from common.data.fingerprint import BLOCKS, changes, fingerprint
from common.data.sources import Data, open_data
from common.recipe import BaseConfig
from common.runs import prepare, resumable
from common.training.checkpoint import Checkpoints
from common.training.distributed import Processes

import pytest
import torch
from pictures import Memory, quoting, write

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three training images of each of two classes, and a test image of each."""
    for name in (*(f"train/{c}/{i}.png" for c in "bd" for i in range(3)), "val/b/0.png", "val/d/0.png"):
        write(tmp_path / "data" / name)
    return tmp_path / "data"


def opened(root: Path) -> Data:
    return open_data(DataSettings(path=str(root)), seed=0)


def resumed(root: Path, folder: Path, processes: Processes = ALONE, **run: Any) -> None:
    """Start a run with the images of a folder, or resume it if it has a checkpoint."""
    prepare(folder, "mae", BaseConfig(), run=Run(resume=True, **run), data=opened(root), processes=processes)
    if not resumable(folder):
        Checkpoints(folder / "checkpoint").save(1, {"a": torch.ones(1)}, {})


def one_more(root: Path) -> None:
    write(root / "train" / "b" / "10.png")  # sorted as text


def one_less(root: Path) -> None:
    (root / "train" / "d" / "2.png").unlink()


def another_name(root: Path) -> None:
    (root / "train" / "d" / "1.png").rename(root / "train" / "d" / "1.jpg")


def another_class(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "d").rename(root / split / "c")


def a_new_class(root: Path) -> None:
    write(root / "train" / "a" / "0.png")


def another_label(root: Path) -> None:
    (root / "train" / "b" / "0.png").rename(root / "train" / "d" / "00.png")


def half(root: Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(root / split / "d")


def no_test_images(root: Path) -> None:
    shutil.rmtree(root / "val")


CHANGES = [
    (one_more, "train has 7 images, not 6; the first change is at b/10.png"),
    (one_less, "train has 5 images, not 6; the first change is at d/2.png"),
    (another_name, "train has 6 images as before, but others; the first change is at d/1.jpg"),
    (
        another_class,
        "train has 6 images as before, but others; new classes: c; missing classes: d; the first change is at c/0.png; "
        "test has 2 images as before, but others; new classes: c; missing classes: d; the first change is at c/0.png",
    ),
    (
        a_new_class,
        "train has 7 images, not 6; new classes: a; the first change is at a/0.png; "
        "test has 2 images as before, but others; new classes: a",
    ),
    (another_label, "train has 6 images as before, but others; the first change is at b/0.png"),
    (
        half,
        "train has 3 images, not 6; missing classes: d; the first change is at d/0.png; "
        "test has 1 images, not 2; missing classes: d; the first change is at d/0.png",
    ),
    (no_test_images, "test has 0 images, not 2; the first change is at b/0.png"),
]


@pytest.mark.parametrize(("change", "sentence"), CHANGES)
def test_what_has_changed_is_said_and_accepted_only_if_asked(change: Any, sentence: str, root: Path, tmp_path: Path):
    resumed(root, tmp_path / "run")
    resumed(root, tmp_path / "run")  # nothing has changed
    before = (tmp_path / "run" / "data.json").read_bytes()
    change(root)
    whole = f"{tmp_path}/run was started with other images: {sentence}; "
    whole += "restore them, give another --name, or go on with --accept-changed-data"
    for _ in range(2):  # a run that is refused changes nothing
        with pytest.raises(SettingsError, match=f"{quoting(whole)}$"):
            resumed(root, tmp_path / "run")
        assert (tmp_path / "run" / "data.json").read_bytes() == before
    resumed(root, tmp_path / "run", accept_changed_data=True)
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == fingerprint(opened(root))
    resumed(root, tmp_path / "run")


def test_a_folder_that_was_moved_has_the_same_images(root: Path, tmp_path: Path):
    resumed(root, tmp_path / "run")
    resumed(root.rename(tmp_path / "moved"), tmp_path / "run")


def test_the_contents_of_files_are_not_looked_at(root: Path, tmp_path: Path):
    resumed(root, tmp_path / "run")
    (root / "train" / "b" / "0.png").write_text("no image")
    resumed(root, tmp_path / "run")


def test_a_run_that_is_restarted_takes_the_images_of_today(root: Path, tmp_path: Path):
    resumed(root, tmp_path / "run")
    one_more(root)
    config = BaseConfig()
    prepare(tmp_path / "run", "mae", config, run=Run(restart=True), data=opened(root), processes=ALONE)
    assert json.loads((tmp_path / "run" / "data.json").read_text())["train"]["images"] == 7


def test_a_run_without_a_fingerprint_gets_one(root: Path, tmp_path: Path):
    resumed(root, tmp_path / "run")
    (tmp_path / "run" / "data.json").unlink()
    resumed(root, tmp_path / "run")
    assert (tmp_path / "run" / "data.json").exists()


def of_memory(count: int = 12, classes: int = 3, **replaced: Any) -> Data:
    source = Memory(1, classes=classes)
    for name, value in ({"__len__": lambda self: count} | replaced).items():
        source.__class__ = type("Memory", (type(source),), {name: value})
    return Data(DataSettings(), source, None, source)


def test_names_and_labels_of_sources_from_python_count():
    before = fingerprint(of_memory())
    assert changes(of_memory(), before) == ""
    others = of_memory(name=lambda self, index: f"memory {min(index, 10)}")
    found = changes(others, before)
    assert found.startswith("train has 12 images as before, but others; the first change is at memory 10; test has")
    others = of_memory(label=lambda self, index: 0 if index == 4 else index % 3)
    assert changes(others, before).startswith(
        "train has 12 images as before, but others; the first change is at memory 4; test"
    )
    labels = of_memory(classes=0, label=lambda self, index: index)
    assert changes(labels, fingerprint(of_memory(classes=0))).startswith("train has 12 images as before, but others")


def test_the_digits_of_another_draw_are_others():
    one, other = (open_data(DataSettings(path="digits", channels=1), seed=seed) for seed in (0, 1))
    assert list(fingerprint(one)) == ["train", "labeled", "test"]
    assert changes(one, json.loads(json.dumps(fingerprint(one)))) == ""
    assert changes(other, fingerprint(one)).startswith("labeled has 100 images as before, but others; the first change")


def test_of_many_images_a_change_is_narrowed_down_to_a_few():
    before = fingerprint(of_memory(BLOCKS * 3 + 1))
    assert len(before["train"]["blocks"]) <= BLOCKS
    assert before["train"]["block"] == 4
    assert len(json.dumps(before)) < 100_000
    more = changes(of_memory(BLOCKS * 8), before)
    assert more.startswith("train has 8000 images, not 3001; the first change is among 4 from memory 3000; test")
    renamed = of_memory(BLOCKS * 3 + 1, name=lambda self, index: "x" if index == 1002 else f"memory {index}")
    assert "the first change is among 4 from memory 1000; test" in changes(renamed, before)


def test_processes_that_see_different_images_stop(root: Path, tmp_path: Path):
    class Two(Processes):
        """A process beside another that sees one image more."""

        def broadcast(self, text: str, *, source: int = 0) -> str:
            return f"{text}1"

    sentence = f"the processes see different images: {root} must be the same on all nodes"
    with pytest.raises(SettingsError, match=quoting(sentence)):
        resumed(root, tmp_path / "run", processes=Two(**dataclasses.asdict(ALONE)))
