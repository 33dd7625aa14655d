"""Folders that are not what they seem: no image is lost, read twice or waited for without a word."""

import dataclasses
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import DataSettings, Optimization, Run, SettingsError
from common.data.loading import Loader, ViewDataset
from common.data.sources import Data, Folder, decode, open_data
from common.runs import Stage
from common.training.distributed import Processes
from common.training.engine import train

import pytest
import torch
import torch.distributed as dist
from pictures import Memory, quoting, unchanged, write
from torch import Tensor, nn

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three training images of each of two classes."""
    for name in (f"{c}/{i}.png" for c in "ab" for i in range(3)):
        write(tmp_path / "data" / "train" / name)
    return tmp_path / "data"


def counted(root: Path) -> dict[str, int]:
    source = Folder(root, "train")
    labels = [source.label(index) for index in range(len(source))]
    return {name: labels.count(number) for number, name in enumerate(source.classes)}


@pytest.mark.parametrize("which", ["b", ""])
def test_a_folder_that_cannot_be_read_is_named(which: str, root: Path, monkeypatch: pytest.MonkeyPatch):
    scan, refused = os.scandir, str(root / "train" / which).rstrip("/")

    def refusing(path: Any) -> Any:  # file permissions do not bind the root user
        if os.fspath(path) == refused:
            raise PermissionError(13, "Permission denied", refused)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    sentence = f"{refused} cannot be read: Permission denied; make it readable or remove it"
    with pytest.raises(SettingsError, match=f"{quoting(sentence)}$"):
        open_data(DataSettings(path=str(root)), seed=0)


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "../a", "../../train/a"])
def test_a_link_to_a_folder_that_contains_it_adds_nothing(target: str, root: Path):
    write(root / "val" / "a" / "1.png")  # which a link to the folder above does not add to the training images
    for name in ("again", ".hidden", "once_more"):
        (root / "train" / "a" / name).symlink_to(target, target_is_directory=True)
    assert counted(root) == {"a": 3, "b": 3}


def test_links_from_the_training_images_to_themselves_add_nothing(root: Path):
    (root / "train" / "again").symlink_to(root / "train")
    (root / "train" / "b" / "again").symlink_to(root / "train")
    assert counted(root) == {"a": 3, "b": 3}
    (root / "link").symlink_to(root / "train")
    assert len(Folder(root, "link")) == 6


def test_a_link_out_of_the_folder_is_followed_once(root: Path, tmp_path: Path):
    for name in ("1.png", "deep/2.png", ".hidden/3.png"):
        write(tmp_path / "elsewhere" / name)
    for name in ("z", "y"):
        (root / "train" / "b" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root / "train" / "b")
    assert counted(root) == {"a": 3, "b": 5}
    names = [Folder(root, "train").name(index) for index in (6, 7)]
    assert names == [f"{root}/train/b/y/1.png", f"{root}/train/b/y/deep/2.png"]


@pytest.mark.parametrize(
    ("link", "target", "other"),
    [("c", "a", "a"), ("a/more", "b", "b"), ("c", "../elsewhere/deep", "b/more/deep")],
)
def test_a_folder_that_a_link_puts_into_a_second_class_is_named(link: str, target: str, other: str, root: Path):
    write(root / "elsewhere" / "deep" / "1.png")
    (root / "train" / "b" / "more").symlink_to(root / "elsewhere")
    (root / "train" / link).symlink_to(root / "train" / target)
    pair = sorted([f"{root}/train/{link}", f"{root}/train/{other}"])
    sentence = r"^(\S+) and (\S+) are the same folder in two classes: remove the link$"
    with pytest.raises(SettingsError, match=sentence) as caught:
        Folder(root, "train")
    assert sorted(str(caught.value).split()[::2][:2]) == pair


def test_a_class_whose_link_leads_nowhere_is_named(root: Path):
    (root / "train" / "notes").symlink_to(root / "train" / "a" / "0.png")
    (root / "train" / "c").symlink_to("/unmounted/c")
    sentence = f"{root}/train/c is a link to /unmounted/c, which cannot be found: remove it"
    with pytest.raises(SettingsError, match=f"{quoting(sentence)}$"):
        Folder(root, "train")


def test_pipes_sockets_links_to_nothing_and_empty_files_are_counted_and_nobody_waits(root: Path, monkeypatch: Any):
    folder = root / "train" / "a"
    os.mkfifo(folder / "pipe.jpg")
    monkeypatch.chdir(folder)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.jpg")
    (folder / "empty.jpg").touch()
    (folder / "nothing.jpg").symlink_to("/unmounted/nothing.jpg")
    for number in range(400):
        os.link(folder / "0.png", root / "train" / "b" / f"more_{number}.png")
    source = Folder(root, "train")
    loader = Loader(ViewDataset(source, unchanged), [[(0, index) for index in range(len(source))]])
    assert len(next(iter(loader))) == len(source) == 410
    errors = {Path(name).name: error for name, error in loader.unreadable.items()}
    assert errors.pop("nothing.jpg").startswith("FileNotFoundError: ")
    assert errors == {
        "empty.jpg": "ValueError: the file is empty",
        "pipe.jpg": "ValueError: not a regular file",
        "socket.jpg": "ValueError: not a regular file",
    }
    with pytest.raises(ValueError, match=quoting("not a regular file")):
        decode(folder / "pipe.jpg", 3)


# Unreadable images of several processes


class Constant(nn.Module):
    """A method that learns a number."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(()))

    def noise(self, rand: Any, batch: int) -> dict[str, Tensor]:
        return {}

    def forward(self, images: Tensor, noise: Any, progress: Tensor) -> dict[str, Tensor]:
        return {"loss": (images.float().mean() / 255 - self.number).square()}


@dataclasses.dataclass(frozen=True)
class Beside(Processes):
    """A process beside another one that could not read the images `theirs`."""

    theirs: tuple[str, ...] = ()
    gathered: list[int] = dataclasses.field(default_factory=list)

    def union(self, mapping: Mapping[str, str]) -> dict[str, str]:
        self.gathered.append(len(mapping))
        return {**mapping, **dict.fromkeys(self.theirs, "OSError: broken")}


def trained(folder: Path, broken: tuple[int, ...], processes: Processes) -> dict[str, Any]:
    source = Memory(400, broken=broken)
    run = Run(precision="fp32", compile="off", log_every=2)
    stage = Stage(processes, Data(DataSettings(), source, None, None), run, folder, "pre-training")
    settings = Optimization(epochs=2, batch_size=40, base_lr=0.1, warmup_epochs=1)
    views = ViewDataset(source, unchanged)
    return train(
        Constant(), lambda batches: Loader(views, batches), num_images=len(source), settings=settings, stage=stage
    )


def test_unreadable_images_of_all_processes_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    processes = Beside(0, 1, torch.device("cpu"), theirs=("memory 7", "memory 9"))
    result = trained(tmp_path, (7, 8), processes)
    assert result["unreadable"] == ["memory 7", "memory 8", "memory 9"]
    sentence = (
        r"^pre-training: 3 of 400 images \(0.8%\) cannot be read: memory [78], memory [78], memory 9; the first: "
    )
    assert re.search(sentence + "OSError: .*; the next images replaced them$", capsys.readouterr().out, re.MULTILINE)
    assert len(processes.gathered) <= 3, "at most once per unreadable image, and at the end"


def test_the_one_percent_is_that_of_all_processes_together(tmp_path: Path):
    processes = Beside(0, 1, torch.device("cpu"), theirs=("memory 1", "memory 2", "memory 3"))
    with pytest.raises(SettingsError, match=r"^5 of 400 images \(1.2%\) cannot be read: .*; the first: OSError: "):
        trained(tmp_path, (7, 8), processes)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) < 10, "the run stopped before its end"


def test_where_every_image_can_be_read_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert trained(tmp_path, (), ALONE)["unreadable"] == []
    assert "cannot be read" not in capsys.readouterr().out


def one_of_two(rank: int, folder: Path) -> None:
    """Share two mappings; what is asserted here ends the process with an error."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    processes = Processes(rank, 2, torch.device("cpu"))
    assert processes.union({"both": "an error", f"of {rank}": "another"}) == {
        "both": "an error",
        "of 0": "another",
        "of 1": "another",
    }
    dist.destroy_process_group()


def test_two_processes_share_what_they_found(tmp_path: Path):
    context = torch.multiprocessing.get_context("fork")
    both = [context.Process(target=one_of_two, args=(rank, tmp_path)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
