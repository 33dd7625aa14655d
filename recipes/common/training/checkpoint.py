"""Training checkpoints."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import _sync, read_tensors, write_json, write_tensors

from torch import Tensor


def method_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the method among the tensors of a checkpoint."""
    return {name.removeprefix("method."): value for name, value in tensors.items() if name.startswith("method.")}


class Checkpoints:
    """The newest `keep` checkpoints of a training, each a folder `step_…` that is written atomically."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints would leave nothing to resume from")
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in ascending order."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step_*") if path.name[5:].isdigit())

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove the oldest ones and any of later steps, which `load` could not read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".step_{step}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_tensors(temporary / "tensors.safetensors", tensors)
        write_json(temporary / "state.json", state)
        final = self.folder / f"step_{step:09d}"
        shutil.rmtree(final, ignore_errors=True)  # left by the run before it was resumed
        temporary.replace(final)
        _sync(self.folder)
        kept = [other for other in self.steps() if other <= step][-self.keep :]
        for other in set(self.steps()) - set(kept):
            shutil.rmtree(self.folder / f"step_{other:09d}", ignore_errors=True)
        for leftover in self.folder.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Return step, tensors and state of the newest readable checkpoint, or None; damaged ones are reported."""
        for step in reversed(self.steps()):
            path = self.folder / f"step_{step:09d}"
            try:
                tensors, _ = read_tensors(path / "tensors.safetensors")
                return step, tensors, json.loads((path / "state.json").read_text())
            except (OSError, ValueError) as error:
                print(f"checkpoint {path} cannot be read and is passed over: {error}", flush=True)
        return None
