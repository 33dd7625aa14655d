"""What a recipe consists of: settings, a method, presets, and the names of published weights.

All recipes import from here what all of them use.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from common.config import DataSettings, Flat, Network, Optimization, Run
from common.data.normalize import Normalize
from common.evaluation import finetuning
from common.evaluation.finetuning import Finetuning
from common.networks.vit import ViT
from common.weights.reading import load_weights, read_foreign

from torch import Tensor, nn

Rand = Callable[..., Tensor]  # uniform noise of a shape whose first axis is the batch, see `common.randomness.Noise`

EvaluationName = Literal["finetune", "scratch", "budget", "linear", "knn", "nonlinear"]


@dataclass(frozen=True)
class BaseConfig:
    """What the settings of all recipes have; a recipe adds those of its method."""

    weights: Path | None = None
    """start from a published checkpoint of the method, with or without what is thrown away after pre-training"""
    evaluate: tuple[EvaluationName, ...] = ("finetune",)
    """fine-tune the encoder; train the same network from scratch for as many epochs, or for the same wall-clock time;
    evaluate the frozen encoder"""
    run: Flat[Run] = field(default_factory=Run)
    data: Flat[DataSettings] = field(default_factory=DataSettings)
    network: Flat[Network] = field(default_factory=Network)
    optimization: Flat[Optimization] = field(default_factory=Optimization)
    finetune: Finetuning = field(default_factory=Finetuning)


C = TypeVar("C", bound=BaseConfig)


class Method(Protocol):
    """What every pre-training method has besides what the engine asks for.

    One with an attribute `views`, a transform, gets these views of each image instead of a random crop, perhaps a tuple
    of them. One whose prediction is of patches has `reconstruct(images, noise)`, see `report.reconstruction`; others
    draw `pictures(images, noise)` themselves.
    """

    encoder: ViT
    normalize: Normalize
    view_size: tuple[int, int]

    def noise(self, rand: Rand, batch: int) -> dict[str, Tensor]: ...
    def __call__(self, images: Any, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Recipe:
    """A method and all that a program needs to run it.

    Args:
        method: makes the method from its settings and the normalization of the images.
        presets: settings by name: "digits" and "folder", and those of the paper.
        published_names: from the names of published weights to ours, for `load_weights`; none were published if empty.
        optional: names of weights that a published file may lack, as regular expressions.
    """

    method: Callable[[Any, Normalize], Any]
    presets: dict[str, Any]
    published_names: dict[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()

    def load(self, method: nn.Module, path: Path, *, decoder: bool = False) -> Any:
        """Load published weights, and return the report of their keys.

        Args:
            method: what to fill.
            path: of the file.
            decoder: whether weights that a published file may lack must be in it.

        Raises:
            SettingsError: if a weight is missing or has another shape.
        """
        optional = (
            r"normalize\.",
            *(() if decoder else self.optional),
            *((r"teacher\.",) if hasattr(method, "teacher") else ()),
        )
        report = load_weights(method, read_foreign(path), renames=self.published_names, optional=optional)
        if any(name.startswith("teacher.") for name in report.missing):  # it starts as a copy of its student
            made: Any = method
            made.teacher.load_state_dict(made.student().state_dict())
        return report


SMALL_DECODER = {"decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 3}


def digits(paper: C, **changes: Any) -> C:
    """Return a paper's settings for the embedded digits: a small network on few, small and upright images."""
    small = {"image_size": (32, 32), "channels": 1, "crop_scale": (0.6, 1.0), "flip": 0.0, "size": "nano", "patch": 4}
    short = {"epochs": 40, "batch_size": 64, "base_lr": 4e-3, "warmup_epochs": 4}
    evaluated = {"evaluate": ("finetune", "scratch"), "finetune": finetuning.DIGITS}
    return changed(paper, **(small | short | evaluated | changes))


def folder(paper: C, **changes: Any) -> C:
    """Return a paper's settings for a folder of some ten thousand images, on one GPU."""
    small = {"size": "small", "epochs": 300, "batch_size": 256, "warmup_epochs": 20}
    evaluated = {"evaluate": ("finetune", "scratch"), "finetune": finetuning.FOLDER}
    return changed(paper, **(small | evaluated | changes))


def changed(config: C, **changes: Any) -> C:
    """Return settings of which some have other values, wherever in the groups without a prefix they stand."""
    own = {name: changes.pop(name) for name in [f.name for f in fields(config)] if name in changes}
    for group in ("run", "data", "network", "optimization"):
        settings = getattr(config, group)
        names = [f.name for f in fields(settings) if f.name in changes]
        own |= {group: replace(settings, **{name: changes.pop(name) for name in names})} if names else {}
    if changes:
        raise TypeError(f"{type(config).__name__} has no settings {', '.join(changes)}")
    assert is_dataclass(config)
    return replace(config, **own)
