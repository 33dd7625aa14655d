"""Files that survive: written to a temporary name, flushed and renamed. Tensors are safetensors, settings are JSON."""

import argparse
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn


def write(path: Path, content: bytes) -> None:
    """Write a file that is either the old one or the new one, whatever happens."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write settings or results likewise."""
    write(path, json.dumps(value, indent=1).encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file likewise; the values of `metadata` are stored as JSON."""
    apart = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    write(path, save(apart, metadata={key: json.dumps(value) for key, value in (metadata or {}).items()}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file: tensors by name, and its metadata.

    Raises:
        ValueError: if the file is damaged or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {key: _json_or_text(value) for key, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:  # a file of others
        return value


class Checkpoints:
    """The newest `keep` states of a training, each a folder `step_…` that exists whole or not at all."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints would leave nothing to resume from")
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, ascending."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step_*") if path.name[5:].isdigit())

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write one, then remove the oldest, and later ones, which `load` has passed over."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".step_{step}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_tensors(temporary / "tensors.safetensors", tensors)
        write_json(temporary / "state.json", state)
        final = self.folder / f"step_{step:09d}"
        shutil.rmtree(final, ignore_errors=True)  # only ever the same step of a resumed run
        temporary.replace(final)
        _sync(self.folder)
        kept = [other for other in self.steps() if other <= step][-self.keep :]
        for other in set(self.steps()) - set(kept):
            shutil.rmtree(self.folder / f"step_{other:09d}", ignore_errors=True)
        for leftover in self.folder.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Read the newest one that is whole: step, tensors, state. A damaged one is named and passed over."""
        for step in reversed(self.steps()):
            path = self.folder / f"step_{step:09d}"
            try:
                tensors, _ = read_tensors(path / "tensors.safetensors")
                return step, tensors, json.loads((path / "state.json").read_text())
            except (OSError, ValueError) as error:
                print(f"checkpoint {path} cannot be read and is passed over: {error}", flush=True)
        return None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Weights of others


@dataclass
class LoadReport:
    """What became of each key of a foreign checkpoint."""

    renamed: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"renamed  {old} → {new}" for old, new in self.renamed.items()]
        lines += [f"dropped  {name}" for name in self.dropped] + [f"missing  {name}" for name in self.missing]
        return "\n".join(lines) or "every key was found under its own name"


def read_foreign(path: Path) -> dict[str, Tensor]:
    """Read the weights of a published checkpoint: safetensors, or a `.pth` file, of which no code is ever run.

    Raises:
        ValueError: if the file holds anything but weights and plain settings, or no weights.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # published checkpoints keep their settings so
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own words fill many lines and advise to run what the file holds
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {found[1]}" if found else "it is damaged or no checkpoint of PyTorch"
        raise ValueError(f"{path} cannot be read as plain weights: {reason}") from error
    for key in ("model", "state_dict", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = (
        {key: value for key, value in content.items() if isinstance(value, Tensor)} if isinstance(content, dict) else {}
    )
    if not weights:
        raise ValueError(f"{path} holds no weights")
    return weights


def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], *, renames: Mapping[str, str], optional: tuple[str, ...] = ()
) -> LoadReport:
    """Load foreign weights and report every key that was renamed, dropped or is missing.

    Args:
        module: what to fill.
        weights: by their foreign names.
        renames: regular expressions → replacements; the first that matches at the start of a name is applied.
        optional: regular expressions of names that may be missing, as a decoder that was not published.

    Raises:
        ValueError: if a key is missing that is not optional, or a shape differs.
    """
    report, own, found = LoadReport(), module.state_dict(), {}
    for name, tensor in weights.items():
        rule = next((rule for rule in renames if re.match(rule, name)), None)
        target = name if rule is None else re.sub(rule, renames[rule], name, count=1)
        if target not in own:
            report.dropped.append(name)
            continue
        if own[target].shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)} in the file but {tuple(own[target].shape)} here")
        found[target] = tensor
        if target != name:
            report.renamed[name] = target
    report.missing = [name for name in own if name not in found]
    needed = [name for name in report.missing if not any(re.match(rule, name) for rule in optional)]
    if needed:
        names = ", ".join(needed[:5]) + ("…" if len(needed) > 5 else "")
        raise ValueError(f"{len(needed)} of {len(own)} weights are missing in the file: {names}")
    module.load_state_dict(found, strict=False)
    return report
