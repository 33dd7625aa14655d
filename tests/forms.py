"""Run by `test_forms.py` in a process without run-time type checks, which would break the graphs.

Every form of every recipe: captured in one graph for a whole training it equals eager, moving averages and running
statistics included; all that trains gets a gradient; nothing is read back to the host; and it can be drawn.
"""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from common.data.mixing import Mixing
from common.data.normalize import Normalize
from common.evaluation.finetuning import Classifier
from common.networks.vit import SIZES, ViT
from common.randomness import Noise
from common.report.reconstruction import pictures_of

import beyond_masking
import beyond_masking_integrated
import droppos
import hpm
import lomar
import lut
import lut_simmim
import mae
import simmim

WINDOWS = {"window_size": 3, "windows": 2}
LOMARS = [  # each two choices meet once
    ("relative", "distinct", "image"),
    ("relative", "independent", "batch"),
    ("absolute", "distinct", "batch"),
    ("absolute", "independent", "image"),
]
FORMS: dict[ModuleType, list[dict[str, Any]]] = {
    mae: [
        {},
        {"positions": "relative"},
        {"positions": "relative", "normalize_target": False, "mask_ratio": 0.4},
    ],
    beyond_masking: [
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
    beyond_masking_integrated: [{"view_size": (22, 30)}],
    hpm: [
        {},
        {"hard": (0.0, 0.0), "objective": "absolute"},
        {"hard": (1.0, 1.0), "choose": "easiest", "target": "normalized"},
        {"hard": (0.5, 0.0), "target": "features", "momentum": (0.0, 1.0), "momentum_epochs": 3.0},
    ],
    droppos: [
        {},
        {"dropped": "zero", "sigma": (0.0, 0.0), "temperature": torch.inf},
        {"dropped": "permuted", "shuffle": True, "confident": False},
        {"mask_ratio": 0.0, "drop_ratio": 1.0, "sigma": (0.0, 2.0)},
    ],
    simmim: [{}, {"target": "window", "window": 5, "drop_path": 0.0}],
    lut: [
        {},
        {"loss": "context"},
        {"head_norm": "layer", "head_depth": (3, 1)},
        {"head_norm": "none", "head_depth": (2, 0)},
        {"normalize_target": False, "mask_ratio": 0.4, "sync_norm": False},
    ],
    lut_simmim: [{}, {"loss": "context", "mask_ratio": 0.3, "drop_path": 0.0, "cell": 4}],
    lomar: [
        *({"positions": a, "anchors": b, "windows_of": c, **WINDOWS} for a, b, c in LOMARS),
        {"normalize_target": False, "window_size": 3, "windows": 1},
    ],
}
# Whether it is one graph is found out by either backend. Lowered, with its backward pass, is the first form of each
# recipe, and one of a mechanism that this form has not
LOWERED = [(mae, 1), (lut, 2), *((recipe, 0) for recipe in FORMS)]


def check(recipe: ModuleType, form: dict[str, Any], backend: str) -> None:
    """Train a form compiled and eager for three steps far apart, draw it, and take a step where nothing can be read."""
    torch.manual_seed(0)
    digits = recipe.PRESETS["digits"]
    data = replace(digits.data, image_size=(16, 24), channels=3)
    network = replace(digits.network, decoder_dim=12, decoder_heads=2)
    eager = recipe.RECIPE.method(replace(digits, data=data, network=network, **form), Normalize([0.5] * 3, [0.5] * 3))
    method = copy.deepcopy(eager.train())
    generator = torch.Generator().manual_seed(0)
    noise = eager.noise(lambda *shape: torch.rand(*shape, generator=generator), 4)
    count = 2 if hasattr(method, "views") else 1
    pictures = (255 * torch.rand(count, 4, 3, *method.view_size, generator=generator)).to(torch.uint8)
    views: Any = tuple(pictures) if count == 2 else pictures[0]

    torch.compiler.reset()
    compiled = torch.compile(method, fullgraph=True, dynamic=False, backend=backend)
    for progress in torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64):
        losses = [call(views, noise, progress) for call in (eager, compiled)]
        torch.testing.assert_close(losses[1], losses[0])
        for one, loss in zip((eager, method), losses, strict=True):
            loss["loss"].backward()
            for name, parameter in one.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None, name
                    parameter.data -= 0.1 * parameter.grad
                    parameter.grad = None
            if hasattr(one, "after_step"):
                one.after_step(progress)
        torch.testing.assert_close(method.state_dict(), eager.state_dict(), rtol=1e-3, atol=1e-5)
    assert (method.encoder.relative == "contextual") == any("rpe_k" in name for name in method.state_dict())

    drawn = pictures_of(method, views, noise).columns
    assert all(column.isfinite().all() and len(column) == 4 for column in drawn.values())
    assert (
        "target" not in drawn or recipe in (beyond_masking_integrated, lomar) or drawn["target"].shape[-2:] == (16, 24)
    )
    predicted = form.get("loss") != "context" and form.get("target") != "features" and recipe is not droppos
    assert ("reconstruction" in drawn or recipe is beyond_masking_integrated) == predicted

    nowhere: Any = tuple(view.to("meta") for view in pictures) if count == 2 else views.to("meta")
    progress = torch.zeros((), dtype=torch.float64, device="meta")
    losses = method.to("meta")(nowhere, {name: chance.to("meta") for name, chance in noise.items()}, progress)
    losses["loss"].backward()
    assert all(loss.shape == () for loss in losses.values())
    if hasattr(method, "after_step"):
        method.after_step(progress)


def check_classifier() -> None:
    """Fine-tune compiled and eager for four steps, with all that mixes, and take a step where nothing can be read."""
    torch.manual_seed(0)
    encoder = ViT(height=2, width=3, patch=8, channels=3, dim=12, depth=2, heads=2)
    form: Any = {"pool": "mean", "head_scale": 1.0, "mixing": Mixing(5)}
    classifier = Classifier(encoder, Normalize([0.5] * 3, [0.5] * 3), 5, **form).train()
    device, progress = torch.device("cpu"), torch.zeros((), dtype=torch.float64)
    rand = Noise(micro_batch=4, rank=0, world_size=1, device=device, seed=0)
    images = (255 * rand.at(9, 0)(4, 3, 16, 24)).to(torch.uint8)
    batch: Any = images, torch.tensor([4, 0, 1, 1])
    torch.compiler.reset()
    compiled = torch.compile(classifier, fullgraph=True, dynamic=False, backend="aot_eager")
    for step in range(4):
        noise = classifier.noise(rand.at(step, 0), 4)
        both = [call(batch, noise, progress)["loss"] for call in (classifier, compiled)]
        torch.testing.assert_close(both[1], both[0])
        gradients = [torch.autograd.grad(loss, classifier.head.weight)[0] for loss in both]
        torch.testing.assert_close(gradients[1], gradients[0])
    nowhere: Any = tuple(part.to("meta") for part in batch)
    noise = {name: chance.to("meta") for name, chance in classifier.noise(rand.at(4, 0), 4).items()}
    classifier.to("meta")(nowhere, noise, progress.to("meta"))["loss"].backward()


if __name__ == "__main__":
    torch._dynamo.config.error_on_recompile = True
    SIZES["nano"] = {"dim": 12, "depth": 1, "heads": 2}  # the graphs around the network are what matters
    for recipe, forms in FORMS.items():
        for i, form in enumerate(forms):
            print(recipe.__name__, *form.values(), flush=True)
            check(recipe, form, "aot_eager" if (recipe, i) in LOWERED else "eager")
    print("classifier", flush=True)
    check_classifier()
