"""A run: its folder, its settings and its stages."""

import contextlib
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Run, SettingsError, changed_settings, explained, to_json
from common.data.fingerprint import changes, fingerprint
from common.data.loading import check_readable, unreadable_images
from common.data.sources import Data
from common.files import read_json, write_json
from common.locks import join, lock
from common.randomness import seed_of
from common.training.checkpoint import Checkpoints
from common.training.distributed import Processes

RESULTS = ("result.json", "budget.json", "encoder.safetensors", "classifier.safetensors")  # of a run or a stage
RECORDS = (  # of no use without results
    *("metrics.jsonl", "events.out.tfevents.*", "reconstruction.png", "curves.png", "confusion.png"),
    *("predictions.csv", "predictions.png"),
)


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
    folder: Path,
    recipe: str,
    config: Any,
    *,
    run: Run,
    data: Data,
    stages: Iterable[str] = (),
    processes: Processes,
) -> None:
    """Lock the folder of a run for this program, and write its settings and a fingerprint of its images.

    Args:
        folder: folder of the run.
        recipe: name of the program.
        config: its settings.
        run: whether to go on with the run in the folder if it holds one (`resume`), even if the images have changed
            (`accept_changed_data`), or to delete it (`restart`).
        data: the images of the run.
        stages: subfolders with the files of later stages, which belong to the run, too.
        processes: the processes of the run; every one must see the folder.

    Raises:
        SettingsError: if the folder cannot be written, another program writes in it, it is not on a shared disk, or it
            holds a run, unless this is restarted, or resumed with the same recipe, settings and images.
    """
    token, folders = secrets.token_hex(8), [folder, *(folder / stage for stage in stages)]
    with processes.together():
        if processes.is_main:
            with explained(f"{folder} cannot be written"):
                folder.mkdir(parents=True, exist_ok=True)
            lock(folder, token)
    images = fingerprint(data)
    token, digest = processes.broadcast(token), str(seed_of(json.dumps(images)))
    others = processes.broadcast(digest)
    with processes.together():
        if digest != others:
            raise SettingsError(
                f"the processes see different images: {data.settings.path} must be the same on all nodes"
            )
        if not processes.is_main:
            join(folder, token)
    with processes.together():
        if processes.is_main:
            _open(folders, recipe, config, run, data, images)


def has_results(folder: Path) -> bool:
    """Return whether the folder of a run or stage has what must not be lost: a checkpoint, weights or a result."""
    return resumable(folder) or any((folder / name).exists() for name in RESULTS)


def resumable(folder: Path) -> bool:
    """Return whether the folder of a run has a checkpoint to resume from."""
    return bool(Checkpoints(folder / "checkpoint").steps())


def _open(folders: list[Path], recipe: str, config: Any, run: Run, data: Data, images: dict[str, Any]) -> None:
    """Check what the folders of a run and its stages hold, clean them, and write the settings and the fingerprint."""
    folder, settings, started_with = folders[0], folders[0] / "config.json", folders[0] / "data.json"
    valuable = any(map(has_results, folders))
    if run.resume and run.restart:
        raise SettingsError("--resume goes on with a run, and --restart deletes it: choose one of them")
    if valuable and not (run.resume or run.restart):
        raise SettingsError(
            f"{folder} holds a run already: go on with --resume, delete it with --restart, or give another --name"
        )
    going_on = run.resume and (valuable or settings.exists())
    before = _settings_before(settings, recipe, needed=going_on, any_recipe=not valuable and not run.resume)
    if going_on:
        for option, (now, then) in changed_settings(config, before).items():
            raise SettingsError(f"{folder} was started with {option} {then} and cannot be resumed with {now}")
        then = images if run.accept_changed_data or not started_with.exists() else read_json(started_with)
        if then != images and (changed := changes(data, then)):
            raise SettingsError(
                f"{folder} was started with other images: {changed}; "
                "restore them, give another --name, or go on with --accept-changed-data"
            )
        if not resumable(folder):
            raise SettingsError(f"{folder} has no checkpoint to resume from: start over with --restart")
    _clean(folders, everything=not going_on)
    write_json(started_with, images)
    if not going_on:
        write_json(settings, {"recipe": recipe, **to_json(config)})


def _settings_before(path: Path, recipe: str, *, needed: bool, any_recipe: bool) -> dict[str, Any]:
    """Return the content of `config.json`; it must be that of a run, and of the same recipe unless any may be."""
    try:
        before = read_json(path)
    except SettingsError as error:
        if needed:
            raise SettingsError(f"{error}; restore this file, or start over with --restart") from error
        return {}
    name = before.get("recipe") if isinstance(before, dict) else None
    if name is None:
        raise SettingsError(f"{path} is not that of a run: give another --name")
    if name != recipe and not any_recipe:
        raise SettingsError(f"{path.parent} holds a run of {name}, which {recipe} cannot resume: give another --name")
    return before


def _clean(folders: list[Path], *, everything: bool) -> None:
    """Delete what processes that were killed while writing have left or, with `everything`, all files of the run."""
    with explained(f"{folders[0]} cannot be cleaned"):
        for folder in folders:
            names = ("config.json", "data.json", *RESULTS, *RECORDS)
            checkpoints = Checkpoints(folder / "checkpoint")
            checkpoints.remove(everything=everything)
            patterns = [f".{name}.[0-9]*" for name in names]
            for pattern in [*patterns, *reversed(names)] if everything else patterns:
                for path in folder.glob(pattern):
                    path.unlink()
            if everything and folder != folders[0]:
                with contextlib.suppress(OSError):  # it does not exist, or others have files in it
                    folder.rmdir()
