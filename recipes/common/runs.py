"""A run: its folder, its settings and its stages."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Run, SettingsError, changed_settings, to_json
from common.data.fingerprint import changes, fingerprint
from common.data.loading import check_readable, unreadable_images
from common.data.sources import Data
from common.files import read_json, write_json
from common.randomness import seed_of
from common.training.distributed import Processes


@dataclass(frozen=True)
class Stage:
    """One stage of a run: the pre-training or an evaluation.

    Args:
        processes: the processes that train together.
        data: the images, opened once for all stages.
        run: settings of the program.
        folder: folder of the stage's files.
        title: title of the stage in messages.
    """

    processes: Processes
    data: Data
    run: Run
    folder: Path
    title: str

    def print(self, text: str) -> None:
        """Print a line prefixed with the title."""
        self.processes.print(f"{self.title}: {text}")

    def report_unreadable(self, unreadable: Mapping[str, str], total: int) -> dict[str, str]:
        """Print which of `total` images could not be read in any process, and return their errors by name.

        Every process must call this.

        Raises:
            SettingsError: if they are more than 1 percent.
        """
        together = self.processes.union(unreadable)
        check_readable(together, total)
        if together:
            self.print(f"{unreadable_images(together, total, most=20)}; the next images replaced them")
        return together


def prepare(
    folder: Path, recipe: str, config: Any, *, data: Data, resume: bool, accept: bool = False, processes: Processes
) -> None:
    """Create the folder of a run, and write `config.json`, its recipe and settings, and `data.json`, see `fingerprint`.

    Args:
        folder: folder of the run.
        recipe: name of the program.
        config: its settings.
        data: the images of the run.
        resume: go on with the run in the folder, if there is one.
        accept: go on even if the images have changed.
        processes: the processes of the run.

    Raises:
        SettingsError: if the folder already holds a run, unless it is resumed with the same recipe, settings and
            images, or if the processes see different images.
    """
    files = [folder / name for name in ("checkpoint", "result.json", "metrics.jsonl")]
    started = any(path.exists() and path.stat().st_size for path in files)
    processes.barrier()  # every process checks before the main one writes
    if started and not resume:
        raise SettingsError(f"{folder} holds a run already: go on with --resume, or give another --name")
    if started:
        before = read_json(folder / "config.json")
        if before["recipe"] != recipe:
            raise SettingsError(
                f"{folder} holds a run of {before['recipe']}, which {recipe} cannot resume: give another --name"
            )
        for option, (now, then) in changed_settings(config, before).items():
            raise SettingsError(f"{folder} was started with {option} {then} and cannot be resumed with {now}")
    elif processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"recipe": recipe, **to_json(config)})
    _check_images(folder / "data.json", data, compare=started and not accept, processes=processes)


def _check_images(path: Path, data: Data, *, compare: bool, processes: Processes) -> None:
    """Check that all processes see the same images, those of the run's fingerprint at `path`; store a new one there.

    Raises:
        SettingsError: if the images differ.
    """
    now = fingerprint(data)
    digest = seed_of(json.dumps(now))
    parts = [float(digest >> shift & 0xFFFF) for shift in range(0, 64, 16)]  # exact in float32
    highest, lowest = (processes.maximum([sign * part for part in parts]) for sign in (1, -1))
    if highest != [-part for part in lowest]:
        raise SettingsError(f"the processes see different images: {data.settings.path} must be the same on all nodes")
    if compare and path.exists() and (changed := changes(data, read_json(path))):
        raise SettingsError(
            f"{path.parent} was started with other images: {changed}; "
            "restore them, give another --name, or go on with --accept-changed-data"
        )
    if processes.is_main:
        write_json(path, now)
