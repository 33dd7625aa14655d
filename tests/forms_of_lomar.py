"""Run by `test_lomar.py` in a process without run-time type checks, which would break the graphs.

Every form of LoMaR, and MAE with relative positions: compiled in one graph for a whole training it equals eager, all
that trains gets a gradient, nothing is read back to the host, and it can be drawn.
"""

import copy
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from common.data.normalize import Normalize
from common.networks.vit import SIZES

import lomar
import mae

CHOICES = itertools.product(("relative", "absolute"), ("distinct", "independent"), ("image", "batch"))
FORMS: list[tuple[Any, dict[str, Any]]] = [
    *((lomar, {"positions": a, "anchors": b, "windows_of": c, "window_size": 3, "windows": 2}) for a, b, c in CHOICES),
    (lomar, {"normalize_target": False, "window_size": 3, "windows": 1}),
    (mae, {"positions": "relative"}),
    (mae, {"positions": "relative", "normalize_target": False, "mask_ratio": 0.4}),
]

if __name__ == "__main__":
    torch._dynamo.config.error_on_recompile = True
    SIZES["nano"] = {"dim": 12, "depth": 1, "heads": 2}  # the graphs around the network are what matters
    for i, (recipe, form) in enumerate(FORMS):
        torch.manual_seed(0)
        images = replace(recipe.DIGITS.images, image_size=(16, 24), channels=3)
        network = replace(recipe.DIGITS.network, decoder_dim=12, decoder_heads=2)
        config = replace(recipe.DIGITS, images=images, network=network, **form)
        eager = recipe.METHOD(config, Normalize([0.5] * 3, [0.5] * 3)).train()
        method = copy.deepcopy(eager)
        generator = torch.Generator().manual_seed(0)
        noise = eager.noise(lambda *shape, generator=generator: torch.rand(*shape, generator=generator), 4)
        views = (255 * torch.rand(4, 3, 16, 24, generator=generator)).to(torch.uint8)
        torch.compiler.reset()
        # whether it is one graph is found out by either
        backend = "aot_eager" if i in (0, 4, 9) else "eager"
        compiled = torch.compile(method, fullgraph=True, dynamic=False, backend=backend)
        for progress in torch.tensor([0.0, 0.4, 0.8], dtype=torch.float64):
            losses = [call(views, noise, progress) for call in (eager, compiled)]
            torch.testing.assert_close(losses[1], losses[0])
            for network, loss in zip((eager, method), losses, strict=True):
                loss["loss"].backward()
                for parameter in network.parameters():
                    if parameter.requires_grad:
                        assert parameter.grad is not None
                        parameter.data -= 0.1 * parameter.grad
                        parameter.grad = None
            torch.testing.assert_close(method.state_dict(), eager.state_dict(), rtol=1e-3, atol=1e-5)
        assert (method.encoder.relative == "contextual") == any("rpe_k" in name for name in method.state_dict())
        drawn = method.pictures(views, noise).columns
        assert all(picture.isfinite().all() and len(picture) == 4 for picture in drawn.values())
        nothing = {name: chance.to("meta") for name, chance in noise.items()}
        progress = torch.zeros((), dtype=torch.float64, device="meta")
        method.to("meta")(views.to("meta"), nothing, progress)["loss"].backward()
        print(recipe.__name__, *form.values())
