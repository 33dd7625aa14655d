"""Run by `test_recipes.py` in a process without run-time type checks, which would break the graphs.

Every form of every task of Beyond Masking: compiled in one graph for a whole training it equals eager, it reads nothing
back to the host, and it can be drawn.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from common.images import Normalise
from common.vit import SIZES

import beyond_masking

FORMS = [
    {"task": "masked"},
    {"task": "masked", "mask": "block"},
    *[{"task": "zoom_in", "zoom": zoom} for zoom in ("centre", "anywhere", "view", "inner")],
    *[{"task": "zoom_out", "fill": fill} for fill in ("mirror", "black", "foreign", "none")],
    {"task": "zoom_out", "shrunken": (3 / 7, 4 / 7, 5 / 7, 6 / 7)},
    *[{"task": "distorted", "distortion": distortion} for distortion in ("fisheye", "lossless", "wave")],
    {"task": "blurred"},
    {"task": "blurred", "kernels": (3, 5, 7), "mix": True},
    {"task": "decolorized"},
]

if __name__ == "__main__":
    torch._dynamo.config.error_on_recompile = True
    SIZES["nano"] = {"dim": 12, "depth": 1, "heads": 2}  # the graphs around the network are what matters
    images = replace(beyond_masking.DIGITS.images, image_size=(32, 48), channels=3)
    for form in FORMS:
        config = replace(beyond_masking.DIGITS, images=images, **form)
        method = beyond_masking.Task(config, Normalise([0.5] * 3, [0.5] * 3))
        generator = torch.Generator().manual_seed(0)
        noise = method.noise(lambda *shape, generator=generator: torch.rand(*shape, generator=generator), 4)
        views = (255 * torch.rand(4, 3, *method.view_size, generator=generator)).to(torch.uint8)
        torch.compiler.reset()
        compiled = torch.compile(method, fullgraph=True, dynamic=False, backend="aot_eager")
        for progress in (torch.tensor(0.0), torch.tensor(0.5)):
            torch.testing.assert_close(compiled(views, noise, progress), method(views, noise, progress))
        drawn = method.pictures(views, noise).columns
        assert all(picture.isfinite().all() for picture in drawn.values())
        assert drawn["target"].shape[-2:] == (32, 48)
        nowhere = {name: tensor.to("meta") for name, tensor in noise.items()}
        loss = method.to("meta")(views.to("meta"), nowhere, torch.zeros((), device="meta"))["loss"]
        loss.backward()
        print(method.variant)
