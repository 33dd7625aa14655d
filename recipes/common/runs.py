"""A run: its folder, its settings and its stages."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Run, SettingsError, changed_settings, to_json
from common.data.sources import Data
from common.files import read_json, write_json
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


def prepare(folder: Path, recipe: str, config: Any, *, resume: bool, processes: Processes) -> None:
    """Create the folder of a run, and write its recipe and settings to `config.json`.

    Raises:
        SettingsError: if the folder already holds a run, unless it is resumed with the same recipe and settings.
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
