"""What a user sees while a training runs: a bar that fits, the time that it takes, and what would be shorter."""

import io
import sys
from dataclasses import replace
from pathlib import Path

from common.data.sources import Folder
from common.pretraining import shorter_settings, warn_if_gray
from common.recipe import changed
from common.training.distributed import ALONE
from common.training.progress import Progress, in_words, limited_by

import mae
import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm


class Watch:
    """A training whose steps take as long as is said, and whose lines are kept."""

    def __init__(self, *, steps: int, per_epoch: int, done: int = 0, title: str = "pre-training") -> None:
        self.now, self.step, self.waits, self.lines = 0.0, done, 0, list[tuple[int, str]]()
        sizes = {"steps": steps, "done": done, "per_epoch": per_epoch}
        said = {"say": lambda line: self.lines.append((self.step, line)), "clock": lambda: self.now}
        self.progress = Progress(title, **sizes, **said, shorter=lambda seconds: f"; {seconds:.0f} s")

    def run(self, *seconds: float) -> "Watch":
        """Take steps of these lengths."""
        for each in seconds:
            self.now, self.step = self.now + each, self.step + 1
            self.progress.advance(self.step, self.wait)
        return self

    def wait(self) -> None:
        self.waits += 1


def test_the_time_left_is_said_once_after_five_seconds_without_the_first_step() -> None:
    watch = Watch(steps=1000, per_epoch=100).run(60, *[1.0] * 50)
    assert watch.lines == [(6, "about 17 minutes on this machine; 994 s")]
    assert watch.waits == 2  # so seldom does the host wait for the device


def test_it_is_said_before_the_first_epoch_ends_however_short_this_is() -> None:
    watch = Watch(steps=4000, per_epoch=4).run(*[0.1] * 4)
    assert watch.lines == [(3, "about 7 minutes on this machine; 400 s")]


def test_it_is_said_again_only_if_it_was_far_off() -> None:
    watch = Watch(steps=1000, per_epoch=100).run(*[1.0] * 20)
    watch.progress.estimate(watch.step)
    assert len(watch.lines) == 1
    watch.run(*[2.0] * 80)
    watch.progress.estimate(watch.step)
    watch.progress.estimate(watch.step)
    assert watch.lines[1:] == [(100, "now about 27 minutes left")]


def test_a_short_training_and_other_processes_say_nothing() -> None:
    assert Watch(steps=100, per_epoch=10).run(*[0.1] * 100).lines == []
    silent = Progress("", steps=2, done=0, per_epoch=1, say=None)
    silent.advance(1, lambda: pytest.fail("it waits for the device"))
    assert silent.hidden


def test_a_resumed_training_says_what_is_left() -> None:
    assert Watch(steps=1000, per_epoch=100, done=900).run(*[1.0] * 9).lines == [(906, "about 2 minutes left; 94 s")]


class Terminal(io.StringIO):
    """Standard error that is shown."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("title", ["pre-training", "from scratch, same wall-clock time", "linear probe of the encoder"])
def test_the_bar_is_legible_at_80_columns(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    watch = Watch(steps=31250, per_epoch=31250, done=12344, title=title).run(1)
    assert not watch.progress.hidden
    watch.progress.show("loss 0.4321, 2376 img/s, data 13%")
    line = tqdm.format_meter(**{**watch.progress.bar.format_dict, "ncols": 80, "elapsed": 50000.0})
    watch.progress.close()
    assert len(line) <= 80
    assert len(line.split("|")[1]) >= 5
    assert "left, loss 0.4321, 2376 img/s, data 13%" in line
    assert title.split(",")[0][:12] in line


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "1 seconds"),
        (89, "89 seconds"),
        (840, "14 minutes"),
        (5400, "1.5 hours"),
        (36000, "10 hours"),
        (172800, "2 days"),
    ],
)
def test_durations_are_said_in_their_unit(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_what_limits_the_speed_is_said() -> None:
    assert limited_by(0.62).startswith("the data limit the speed: 62%")
    assert limited_by(0.02) == "computing limits the speed: 2% of the time is spent waiting for images"


def test_above_three_hours_it_is_said_what_would_be_shorter() -> None:
    config = mae.PRESETS["folder"]
    assert shorter_settings(config, 3 * 3600 - 1) == ""
    said = shorter_settings(config, 30 * 3600)
    assert said == "; shorter: --epochs 10 (about 60 minutes) or --size tiny or --image-size 112 112 or --patch 32"
    least = changed(config, size="nano", image_size=(48, 48), epochs=1)
    assert shorter_settings(least, 30 * 3600) == ""


class Few:
    """Three images, of which those in `colored` are not gray and those in `broken` cannot be read."""

    classes: list[str] = []  # noqa: RUF012

    def __init__(self, *, channels: int = 3, colored: tuple[int, ...] = (), broken: tuple[int, ...] = ()) -> None:
        self.channels, self.colored, self.broken = channels, colored, broken

    def __len__(self) -> int:
        return 3

    def image(self, index: int) -> torch.Tensor:
        if index in self.broken:
            raise OSError("damaged")
        gray = torch.arange(12, dtype=torch.uint8).view(1, 3, 4).repeat(self.channels, 1, 1)
        gray[-1] += index in self.colored
        return gray

    def label(self, index: int) -> int:
        return -1

    def name(self, index: int) -> str:
        return str(index)


@pytest.mark.parametrize(
    ("source", "warned"),
    [
        (Few(), "3"),
        (Few(broken=(1,)), "2"),
        (Few(colored=(2,)), ""),
        (Few(broken=(0, 1, 2)), ""),
        (Few(channels=1), ""),
    ],
)
def test_gray_images_in_three_channels_are_noticed(
    source: Few, warned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_if_gray(source, ALONE)
    warn_if_gray(source, replace(ALONE, rank=1))
    said = f"all of {warned} images looked at are gray: --channels 1 describes them as well as RGB\n"
    assert capsys.readouterr().out == (said if warned else "")


def test_a_gray_file_is_gray_after_decoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8)
    Image.fromarray(noise).convert("RGB").save(tmp_path / "gray.jpg")
    warn_if_gray(Folder(tmp_path, "train"), ALONE)
    assert "--channels 1" in capsys.readouterr().out
