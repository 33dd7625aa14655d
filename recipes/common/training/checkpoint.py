"""Training checkpoints: folders that are written atomically, and verified when they are read.

A checkpoint is a folder `step_…` with a file `SHA256SUMS`, which lists the digest of every other file in the folder and
is compared as a whole, so that no damaged, missing or foreign file is loaded. `sha256sum -c SHA256SUMS` checks it, too.
"""

import contextlib
import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.config import SettingsError, explained
from common.files import read_json, sync, write, write_json, write_tensors
from common.training.distributed import ALONE, Processes
from common.training.sharded import read_shards, stored, write_shards

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: completed steps, its folder, the digest of its checksums, and the state of the log."""

    step: int
    folder: Path
    digest: str
    state: dict[str, Any]

    @property
    def described(self) -> dict[str, Tensor]:
        """All tensors by name, on the meta device."""
        return stored(self.folder)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, whole, on the CPU."""
        tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in stored(self.folder).items()}
        read_shards(self.folder, tensors)
        return tensors


def method_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the method among the tensors of a checkpoint."""
    return {name.removeprefix("method."): value for name, value in tensors.items() if name.startswith("method.")}


def checksums(folder: Path) -> bytes:
    """Return the digests of all files in a folder but `SHA256SUMS`, in the format of `sha256sum`."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(folder)}\n")
    return "".join(lines).encode()


def verify(folder: Path) -> str:
    """Compare the files of a checkpoint with its checksums, and return the digest of these.

    Raises:
        SettingsError: if a file is damaged, missing, foreign or not readable.
    """
    with explained(f"{folder} cannot be read"):
        found, written = checksums(folder), (folder / CHECKSUMS).read_bytes()
    if found != written:
        differing = set(found.splitlines()) ^ set(written.splitlines())
        names = sorted({line.partition(b"  ")[2].decode(errors="replace") for line in differing})
        raise SettingsError(f"{folder} is damaged: {', '.join(names[:3])} does not agree with {CHECKSUMS}")
    return hashlib.sha256(written).hexdigest()


class Checkpoints:
    """The newest `keep` checkpoints of a training, each a folder `step_…` that is written atomically.

    Folders with other names are not touched.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints would leave nothing to resume from")
        self.folder, self.keep = folder, keep
        self.damaged: set[int] = set()  # steps whose checkpoints were passed over

    def path(self, step: int) -> Path:
        """Return the folder of a checkpoint."""
        return self.folder / f"step_{step:09d}"

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in ascending order."""
        names = (path.name for path in self.folder.glob("step_*"))
        return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_([0-9]{9}|[1-9][0-9]{9,})", name))

    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], processes: Processes = ALONE
    ) -> None:
        """Write a checkpoint, then remove the oldest ones, damaged ones, and any of later steps; collective.

        The main process writes it, but sharded tensors are written by all processes.

        Raises:
            SettingsError: on every process, if it cannot be written; the earlier checkpoints are kept.
        """
        shards = self.folder / ".shards"
        if processes.is_main:
            shutil.rmtree(shards, ignore_errors=True)  # left by processes that were killed while writing
        sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
        if sharded:
            processes.barrier()
            write_shards(shards, tensors)
        with processes.together():
            if processes.is_main:
                with self.writing(step) as folder:
                    for path in shards.glob("*"):
                        path.replace(folder / path.name)
                    if not sharded:
                        write_tensors(folder / "tensors.safetensors", tensors)
                    write_json(folder / "state.json", state)

    @contextlib.contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """Yield an empty folder for the files of a checkpoint, then add the checksums and give it its name."""
        temporary, final = self.folder / f".{self.path(step).name}", self.path(step)
        with explained(f"{final} cannot be written"):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.remove(everything=False)
                temporary.mkdir()
                yield temporary
                write(temporary / CHECKSUMS, checksums(temporary))
                shutil.rmtree(final, ignore_errors=True)  # left by the run before it was resumed
                temporary.replace(final)
                sync(self.folder)
            except (OSError, SettingsError):
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        self.damaged.discard(step)
        kept = [other for other in self.steps() if other <= step and other not in self.damaged][-self.keep :]
        for other in set(self.steps()) - set(kept):
            shutil.rmtree(self.path(other), ignore_errors=True)

    def remove(self, *, everything: bool) -> None:
        """Remove what processes that were killed while writing have left or, with `everything`, all checkpoints."""
        for leftover in self.folder.glob(".step_[0-9]*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if everything:
            for folder in [*map(self.path, self.steps()), self.folder / ".shards"]:
                shutil.rmtree(folder, ignore_errors=folder.name == ".shards")
            with contextlib.suppress(OSError):  # it does not exist, or others have files in it
                self.folder.rmdir()

    def read(self, step: int) -> Checkpoint:
        """Verify and read the checkpoint of a step.

        Raises:
            SettingsError: if it is missing or damaged.
        """
        path = self.path(step)
        digest = verify(path)
        return Checkpoint(step, path, digest, read_json(path / "state.json"))

    def load(self) -> Checkpoint | None:
        """Return the newest checkpoint that is not damaged, or None; damaged ones are reported."""
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except SettingsError as error:
                self.damaged.add(step)
                print(f"checkpoint {self.path(step)} is passed over: {error}", flush=True)
        return None

    def load_together(self, processes: Processes) -> Checkpoint | None:
        """Return the checkpoint that the main process chooses, on every process, or None if there is none.

        Raises:
            SettingsError: if there are only damaged ones, or a process cannot read the same checkpoint.
        """
        found, chosen = None, ""
        with processes.together():
            if processes.is_main and self.steps():
                found = self.load()
                if found is None:
                    raise SettingsError(
                        f"no checkpoint in {self.folder} can be read: start over with --restart, or delete this folder "
                        "to repeat this stage alone"
                    )
                chosen = f"{found.step} {found.digest}"
        chosen = processes.broadcast(chosen)
        with processes.together():
            if chosen and not processes.is_main:
                found = self._read_as_chosen(*chosen.split(), rank=processes.rank)
        return found

    def _read_as_chosen(self, step: str, digest: str, *, rank: int) -> Checkpoint:
        try:
            found = self.read(int(step))
            if found.digest == digest:
                return found
            reason = "another one is there"
        except SettingsError as error:
            reason = str(error)
        raise SettingsError(
            f"process {rank} cannot resume from {self.path(int(step))} as process 0 does ({reason}): "
            "--runs must be on a disk that all nodes share"
        )


def check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, optional: tuple[str, ...]) -> None:
    """Check that tensors have the names, shapes and dtypes that a training expects.

    Args:
        found: tensors of a checkpoint.
        expected: tensors of the training, on any device.
        optional: prefixes of the names that may be missing.

    Raises:
        SettingsError: naming the first tensor that differs; PyTorch's fused optimizers would read beyond its end.
    """
    for name in sorted(found.keys() | expected.keys()):
        here, there = (_described(tensors.get(name)) for tensors in (expected, found))
        if here != there and not (name not in found and name.startswith(optional)):
            raise SettingsError(f"{name} is {there} in the checkpoint, but {here} in this training")


def _described(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
