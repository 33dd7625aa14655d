"""Read third-party checkpoints without executing code, and load them with a report of every key."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.config import SettingsError
from common.files import read_tensors

import torch
from torch import Tensor, nn


@dataclass
class LoadReport:
    """The keys of a third-party checkpoint that were renamed, dropped or missing."""

    renamed: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"renamed  {old} → {new}" for old, new in self.renamed.items()]
        lines += [f"dropped  {name}" for name in self.dropped] + [f"missing  {name}" for name in self.missing]
        return "\n".join(lines) or "every key was found under its own name"


def read_foreign(path: Path) -> dict[str, Tensor]:
    """Read the weights of a published checkpoint, a safetensors or `.pth` file, without executing pickled code.

    Raises:
        SettingsError: if the file contains objects other than weights and plain settings, or no weights, or a tensor of
            which it does not store all values.
    """
    if not path.is_file():
        raise SettingsError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # published checkpoints contain their settings
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's message is long and suggests executing the file
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {found[1]}" if found else "it is damaged or no checkpoint of PyTorch"
        raise SettingsError(f"{path} cannot be read as plain weights: {reason}") from error
    for key in ("model", "state_dict", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = (
        {key: value for key, value in content.items() if isinstance(value, Tensor)} if isinstance(content, dict) else {}
    )
    if not weights:
        raise SettingsError(f"{path} holds no weights")
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.untyped_storage().nbytes() < tensor.nbytes:  # an expanded tensor
            raise SettingsError(f"{name} in {path} is larger than what the file stores of it")
    return weights


def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], *, renames: Mapping[str, str], optional: tuple[str, ...] = ()
) -> LoadReport:
    """Load third-party weights, and report every key that was renamed, dropped or missing.

    Args:
        module: the module to load into.
        weights: tensors by their original names.
        renames: regular expressions → replacements; the first match at the start of a name is applied.
        optional: regular expressions for names that may be missing, such as those of an unpublished decoder.

    Raises:
        SettingsError: if a required key is missing, a shape differs, or a value is not finite.
    """
    report, own, found = LoadReport(), module.state_dict(), {}
    for name, tensor in weights.items():
        rule = next((rule for rule in renames if re.match(rule, name)), None)
        target = name if rule is None else re.sub(rule, renames[rule], name, count=1)
        if target not in own:
            report.dropped.append(name)
            continue
        if own[target].shape != tensor.shape:
            raise SettingsError(f"{name} is {tuple(tensor.shape)} in the file but {tuple(own[target].shape)} here")
        if not bool(tensor.isfinite().all()):
            raise SettingsError(f"{name} in the file holds values that are not finite: the weights are damaged")
        found[target] = tensor
        if target != name:
            report.renamed[name] = target
    report.missing = [name for name in own if name not in found]
    needed = [name for name in report.missing if not any(re.match(rule, name) for rule in optional)]
    if needed:
        names = ", ".join(needed[:5]) + ("…" if len(needed) > 5 else "")
        raise SettingsError(f"{len(needed)} of {len(own)} weights are missing in the file: {names}")
    module.load_state_dict(found, strict=False)
    return report
