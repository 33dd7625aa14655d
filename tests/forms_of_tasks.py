"""Run by `test_recipes.py` in a process without run-time type checks, which would break the graphs.

Every form of every task of Beyond Masking, of HPM and of DropPos: compiled in one graph for a whole training it equals
eager, all that trains gets a gradient, nothing is read back to the host, and it can be drawn.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from common.data.normalize import Normalize
from common.networks.vit import SIZES

import beyond_masking
import droppos
import hpm

FORMS: list[tuple[Any, Any, list[dict[str, Any]]]] = [
    (
        beyond_masking.Task,
        beyond_masking.DIGITS,
        [
            {"task": "masked"},
            {"task": "masked", "mask": "block"},
            *[{"task": "zoom_in", "zoom": zoom} for zoom in ("center", "anywhere", "view", "inner")],
            *[{"task": "zoom_out", "fill": fill} for fill in ("mirror", "black", "foreign", "none")],
            {"task": "zoom_out", "shrunken": (3 / 7, 4 / 7, 5 / 7, 6 / 7)},
            *[{"task": "distorted", "distortion": distortion} for distortion in ("fisheye", "lossless", "wave")],
            {"task": "blurred"},
            {"task": "blurred", "kernels": (3, 5, 7), "mix": True},
            {"task": "decolorized"},
        ],
    ),
    (
        hpm.HPM,
        hpm.DIGITS,
        [
            {},
            {"hard": (0.0, 0.0), "objective": "absolute"},
            {"hard": (1.0, 1.0), "choose": "easiest", "target": "normalized"},
            {"hard": (0.5, 0.0), "target": "features", "momentum": (0.0, 1.0), "momentum_epochs": 3.0},
        ],
    ),
    (
        droppos.DropPos,
        droppos.DIGITS,
        [
            {},
            {"dropped": "zero", "sigma": (0.0, 0.0), "temperature": torch.inf},
            {"dropped": "permuted", "shuffle": True, "confident": False},
            {"mask_ratio": 0.0, "drop_ratio": 1.0, "sigma": (0.0, 2.0)},
        ],
    ),
]


def check(method: Any, backend: str, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = method.noise(lambda *shape: torch.rand(*shape, generator=generator), 4)
    views = (255 * torch.rand(4, 3, *method.view_size, generator=generator)).to(torch.uint8)
    follow = getattr(method, "after_step", lambda progress: None)
    torch.compiler.reset()
    compiled = torch.compile(method, fullgraph=True, dynamic=False, backend=backend)
    for step in (0, 1, 50, 99):  # of a hundred
        progress = torch.tensor(step / 100, dtype=torch.float64)
        torch.testing.assert_close(compiled(views, noise, progress), method(views, noise, progress))
        follow(progress)
    compiled(views, noise, progress)["loss"].backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    drawn = method.pictures(views, noise).columns
    assert all(picture.isfinite().all() and len(picture) == 4 for picture in drawn.values())
    assert all(picture.shape[-2:] == (height, width) for name, picture in drawn.items() if name == "target")
    nowhere = {name: tensor.to("meta") for name, tensor in noise.items()}
    progress = torch.zeros((), dtype=torch.float64, device="meta")
    method.to("meta")(views.to("meta"), nowhere, progress)["loss"].backward()
    follow(progress)


if __name__ == "__main__":
    torch._dynamo.config.error_on_recompile = True
    SIZES["nano"] = {"dim": 12, "depth": 1, "heads": 2}  # the graphs around the network are what matters
    for make, digits, forms in FORMS:
        images = replace(digits.images, image_size=(32, 48), channels=3)
        for i, form in enumerate(forms):
            # whether it is one graph is found out by either; those of HPM and DropPos are large
            backend = "aot_eager" if make is beyond_masking.Task or i == 0 else "eager"
            check(make(replace(digits, images=images, **form), Normalize([0.5] * 3, [0.5] * 3)), backend, 32, 48)
            print(make.__name__, *form.values())
