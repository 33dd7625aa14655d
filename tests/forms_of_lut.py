"""Run by `test_lut.py` in a process without run-time type checks, which would break the graphs.

Every form of LUT, on MAE and on SimMIM: compiled in one graph for a whole training it equals eager, teacher and running
statistics included; it reads nothing back to the host, and it can be drawn.
"""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from common.data.normalize import Normalize
from common.networks.vit import SIZES

import lut
import lut_simmim

FORMS = [
    (lut, {}),
    (lut, {"loss": "context"}),
    (lut, {"head_norm": "layer", "head_depth": (3, 1)}),
    (lut, {"head_norm": "none", "head_depth": (2, 0)}),
    (lut, {"normalize_target": False, "mask_ratio": 0.4, "sync_norm": False}),
    (lut_simmim, {}),
    (lut_simmim, {"loss": "context", "mask_ratio": 0.3, "drop_path": 0.0, "cell": 4}),
]

if __name__ == "__main__":
    torch._dynamo.config.error_on_recompile = True
    SIZES["nano"] = {"dim": 12, "depth": 1, "heads": 2}  # the graphs around the network are what matters
    images = replace(lut.DIGITS.images, image_size=(16, 24), channels=3)
    for recipe, form in FORMS:
        torch.manual_seed(0)
        config = replace(recipe.DIGITS, images=images, **form)
        eager = recipe.METHOD(config, Normalize([0.5] * 3, [0.5] * 3)).train()
        method = copy.deepcopy(eager)
        generator = torch.Generator().manual_seed(0)
        views = tuple((255 * torch.rand(2, 4, 3, 16, 24, generator=generator)).to(torch.uint8))
        noise = eager.noise(lambda *shape, generator=generator: torch.rand(*shape, generator=generator), 4)
        torch.compiler.reset()
        compiled = torch.compile(method, fullgraph=True, dynamic=False, backend="aot_eager")
        for progress in torch.tensor([0.0, 0.4, 0.8], dtype=torch.float64):
            losses = [call(views, noise, progress) for call in (eager, compiled)]
            torch.testing.assert_close(losses[1], losses[0])
            for network, loss in zip((eager, method), losses, strict=True):
                loss["loss"].backward()
                for parameter in network.parameters():
                    if parameter.grad is not None:
                        parameter.data -= 0.1 * parameter.grad
                        parameter.grad = None
                network.after_step(progress)
            torch.testing.assert_close(method.state_dict(), eager.state_dict(), rtol=1e-3, atol=1e-5)
        drawn = method.pictures((views[0], views[1]), noise).columns
        assert all(picture.isfinite().all() for picture in drawn.values())
        assert ("prediction" in drawn) == (form.get("loss") != "context")
        nowhere = tuple(view.to("meta") for view in views)
        method.to("meta")
        nothing = {name: chance.to("meta") for name, chance in noise.items()}
        losses = method(nowhere, nothing, torch.zeros((), device="meta"))
        losses["loss"].backward()
        method.after_step(torch.zeros((), device="meta", dtype=torch.float64))
        print("one graph")
