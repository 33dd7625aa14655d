"""Read a golden file: inputs, weights, random draws and right outputs, with their tolerances."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

# Of whole models of LoMaR: one number is the largest norm of the difference, relative to the norm of what is right
LOMAR = {"loss.*|ce_.*": (5e-6, 0.0), "grad_norm": (1e-4, 0.0), "sgd_losses": (1e-5, 0.0), ".*": 5e-6}


# The files of HPM and DropPos say nothing of tolerances, their README does, and those of iRPE and LoMaR do so in words:
# relative and absolute, by the first pattern that a name matches. All others are of pure functions: 1e-6, of the
# largest value where an array crosses zero.
README: dict[str, dict[str, tuple[float, float] | float]] = {
    "hpm_model": {"losses": (2e-5, 0.0), ".*_norms.*": (1e-4, 1e-6), ".*": (5e-5, 5e-5)},
    "hpm_train_loop": {
        "rec_loss|pred_loss": (1e-4, 0.0),
        ".*_teacher_loss_pred": (1e-4, 1e-5),
        "grad_norm": (1e-3, 0.0),
        "final_.*": (2e-4, 0.0),
    },
    "hpm_vit_classifier": {"logits_.*": (5e-5, 5e-5)},
    "droppos_attn": {"sim": (0.0, 1e-6)},
    "droppos_model": {
        "losses|.*_plain_loss_acc": (2e-5, 0.0),
        ".*_norms": (1e-4, 1e-6),
        ".*_(latent|logits.*|attn.*)": (5e-5, 5e-5),
    },
    "droppos_train_loop": {"loss|acc": (2e-4, 0.0), "grad_norms": (1e-3, 1e-6), "final_.*": (2e-4, 0.0)},
    "irpe_encodings": {".*": (1e-5, 1e-5)},
    "irpe_attention_deit": {".*": (1e-4, 1e-5)},
    "lomar_masks": {".*": (1e-5, 1e-6)},
    "lomar_loss": {".*": (1e-5, 0.0)},
    "lomar_model": LOMAR,
    "lomar_classifier": LOMAR,
    "lomar_ape": LOMAR,
    "lomar_mae_rpe": LOMAR,
}


# Intermediate values of the published programs that our way to the outputs does not have: 8-bit colors, the order of
# tokens, where a crop lies, the terms of a sum, a teacher's count of batches
NOT_OURS = {
    "beyond_masking_decolorize": "luma|quant_(H|V|S_.*)",
    "beyond_masking_integrated_loss": "(loss_strips|target_in)_.*",
    "beyond_masking_model_integrated": "ids_keep",
    "lut_ema": r".*/bn\.num_batches_tracked",
    "lut_whole": r".*teacher/.*num_batches_tracked",
    "mae_linprobe_crop": "i|j",
    "mae_masking": "ids_(restore|shuffle)_.*",
}


CHECKS: dict[str, Callable[["Golden", pytest.MonkeyPatch], None]] = {}


def check(kind: str) -> Callable[[Any], Any]:
    """Register the check of all files of a kind."""

    def register(function: Any) -> Any:
        CHECKS[kind] = function
        return function

    return register


def longest(kinds: Iterable[str], path: Path) -> str | None:
    """The longest kind that a file's stem is or goes on from, as `…_model_integrated_224_288` does."""
    fitting = [kind for kind in kinds if path.stem == kind or path.stem.startswith(f"{kind}_")]
    return max(fitting, key=len, default=None)


class Golden:
    """A `.npz` and the `.json` beside it."""

    def __init__(self, path: Path) -> None:
        self.path, self.arrays = path, dict(np.load(path))
        self.about: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        self.params: Any = self.about.get("params") or self.about.get("parameters") or self.about["produced_with"]
        self.readme = README.get(longest(README, path) or "", {})
        self.unread = set(self.arrays)
        prefix = re.compile(r"(param|w)\.")
        self.weights = {prefix.sub("", k, count=1): self[k] for k in self.arrays if prefix.match(k)}

    def __getitem__(self, name: str) -> Tensor:
        self.unread.discard(name)
        return torch.from_numpy(np.array(self.arrays[name]))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def overlooked(self) -> list[str]:
        """Arrays that nothing has looked at and that are not intermediate."""
        apart = NOT_OURS.get(longest(NOT_OURS, self.path) or "", "")
        return [name for name in self.unread if not re.fullmatch(apart, name)]

    def cases(self) -> range:
        return range(len(self.params["cases"]))

    def close(self, name: str, ours: Any, *, apart: tuple[list[bool], float] | None = None) -> None:
        """Assert that a value is the one of the file, at the tolerance that is given for it; whole numbers exactly.

        `apart` are those values that have another, relative one.
        """
        right = self[name]
        ours = torch.as_tensor(ours).detach()
        assert ours.shape == right.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(right.shape)}"
        listed = self.listed(name)
        if isinstance(listed, float) and right.is_floating_point():
            error = float((ours - right).norm() / right.norm())
            assert error <= listed, f"{name}: off by {error:.2e} of its norm"
            return
        tolerance = self.tolerance(name)
        if apart is not None:
            noisy = torch.tensor(apart[0])
            torch.testing.assert_close(ours[noisy], right[noisy], rtol=apart[1], atol=0.0)
            ours = torch.where(noisy, right, ours)
        torch.testing.assert_close(ours.to(right.dtype), right, **tolerance, msg=lambda m: f"{name}: {m}")

    def listed(self, name: str) -> tuple[float, float] | float | None:
        """What the table says of an array."""
        return next((values for pattern, values in self.readme.items() if re.fullmatch(pattern, name)), None)

    def tolerance(self, name: str) -> dict[str, Any]:
        right = torch.from_numpy(np.array(self.arrays[name]))
        if not right.is_floating_point():
            return {"rtol": 0.0, "atol": 0.0}
        if not isinstance(self.about.get("tolerance"), dict):
            scale = float(right.abs().max()) if right.numel() else 0.0
            listed = self.listed(name)
            rtol, atol = listed if isinstance(listed, tuple) else (1e-6, 1e-6 * scale)
            return {"rtol": rtol, "atol": atol}
        tolerance: dict[str, Any] = {key: float(self.about["tolerance"][key]) for key in ("rtol", "atol")}
        for key, text in self.about["tolerance"].items():
            if any(re.match(rf"{re.escape(part.strip())}(_|$)", name) for part in key.split(",")):
                tolerance |= {kind: float(value) for kind, value in re.findall(r"(rtol|atol) ([\d.e+-]+)", str(text))}
        if "step0_rtol" in self.about["tolerance"] and name.startswith(("step0/", "cls/")):
            tolerance = {kind: self.about["tolerance"][f"step0_{kind}"] for kind in ("rtol", "atol")}
        return tolerance
