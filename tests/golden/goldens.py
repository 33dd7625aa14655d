"""Read a golden file: inputs, weights, random draws and right outputs, with their tolerances."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Golden:
    """A `.npz` and the `.json` beside it."""

    def __init__(self, path: Path) -> None:
        self.arrays = dict(np.load(path))
        self.about: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        self.params: Any = self.about.get("params") or self.about["produced_with"]
        self.weights = {k.removeprefix("param."): self[k] for k in self.arrays if k.startswith("param.")}

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name]))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def cases(self) -> range:
        return range(len(self.params["cases"]))

    def close(self, name: str, ours: Any) -> None:
        """Assert that a value is the one of the file, at the tolerance that its sidecar gives."""
        right = self[name]
        ours = torch.as_tensor(ours).detach()
        assert ours.shape == right.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(right.shape)}"
        torch.testing.assert_close(ours.to(right.dtype), right, **self.tolerance(name), msg=lambda m: f"{name}: {m}")

    def tolerance(self, name: str) -> dict[str, Any]:
        tolerance: dict[str, Any] = {key: float(self.about["tolerance"][key]) for key in ("rtol", "atol")}
        for key, text in self.about["tolerance"].items():
            if any(re.match(rf"{re.escape(part.strip())}(_|$)", name) for part in key.split(",")):
                tolerance |= {kind: float(value) for kind, value in re.findall(r"(rtol|atol) ([\d.e+-]+)", str(text))}
        return tolerance
