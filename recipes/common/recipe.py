"""The parts of a recipe: settings, a method, presets, and the names of published weights.

This module also re-exports the names that every recipe needs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from common.config import DataSettings, Flat, Network, Optimization, Run
from common.data.normalize import Normalize
from common.data.sources import Data
from common.evaluation import finetuning
from common.evaluation.finetuning import Finetuning
from common.networks.building import decoder_sizes
from common.networks.vit import ViT
from common.training.step import following
from common.weights.reading import load_weights, read_foreign

from torch import Tensor, nn

Rand = Callable[..., Tensor]  # uniform noise of a shape whose first axis is the batch, see `common.randomness.Noise`

EvaluationName = Literal["finetune", "scratch", "budget", "nearest", "svm", "linear", "knn", "nonlinear"]


@dataclass(frozen=True)
class BaseConfig:
    """Settings shared by all recipes; a recipe adds those of its method."""

    weights: Path | None = None
    """initialize from a published checkpoint of the method, with or without its decoder or heads"""
    evaluate: tuple[EvaluationName, ...] = ("finetune",)
    """finetune: fine-tune the encoder; scratch, budget: train the same network from scratch for the same number of
    epochs or of floating-point operations; nearest, svm: classify raw pixels; linear, knn, nonlinear: evaluate the
    frozen encoder"""
    run: Flat[Run] = field(default_factory=Run)
    data: Flat[DataSettings] = field(default_factory=DataSettings)
    network: Flat[Network] = field(default_factory=Network)
    optimization: Flat[Optimization] = field(default_factory=Optimization)
    finetune: Finetuning = field(default_factory=Finetuning)


C = TypeVar("C", bound=BaseConfig)


class Method(Protocol):
    """The interface of a pre-training method, beyond what the engine requires.

    A method may define a transform `views`, which replaces the default random crop and may return a tuple of views. A
    method that predicts patches defines `reconstruct(images, noise)`, see `report.reconstruction`; other methods define
    `pictures(images, noise)`.
    """

    encoder: ViT
    normalize: Normalize
    view_size: tuple[int, int]

    def noise(self, rand: Rand, batch: int) -> dict[str, Tensor]:
        """Draw all randomness of the method for a batch."""
        ...

    def __call__(self, images: Any, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Recipe:
    """A method, its presets, and the names of its published weights.

    Args:
        method: builds the method from its settings and the normalization of the images.
        presets: settings by name: "mnist", "digits", "shapes", "small", "folder", and those of the paper.
        published_names: maps the names of published weights to ours, see `load_weights`; empty: none are published.
        optional: regular expressions for weights that a published file may lack.
        unused: names of settings without effect, such as those of a decoder, which the help does not show.
    """

    method: Callable[[Any, Normalize], Any]
    presets: dict[str, Any]
    published_names: dict[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def load(self, method: nn.Module, path: Path, *, decoder: bool = False) -> Any:
        """Load published weights into a method, and return a report of their keys.

        Args:
            method: the module to load into.
            path: path of the checkpoint.
            decoder: require the weights that a published file may lack.

        Raises:
            SettingsError: if a weight is missing or has another shape.
        """
        optional = (
            r"normalize\.",
            *(() if decoder else self.optional),
            *((r"teacher\.",) if hasattr(method, "teacher") else ()),
        )
        report = load_weights(method, read_foreign(path), renames=self.published_names, optional=optional)
        if any(name.startswith("teacher.") for name in report.missing):  # initialize it as a copy of the student
            made: Any = method
            made.teacher.load_state_dict(made.student().state_dict())
        return report


Changes = Mapping[str, Any] | None
BASELINES: tuple[EvaluationName, ...] = ("finetune", "scratch", "budget", "nearest", "svm")
DECODER = ("decoder_dim", "decoder_depth", "decoder_heads")  # names of settings
SMALL_DECODER: dict[str, Any] = {"decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 3}


def embedded(
    paper: C, *, mnist: Changes = None, digits: Changes = None, shapes: Changes = None, **changes: Any
) -> dict[str, C]:
    """Adapt the settings of a paper to the images that need no file: a small network, and minutes of training.

    Args:
        paper: settings of the paper.
        mnist, digits, shapes: settings for these images alone.
        changes: settings for all of them.

    Returns:
        The settings by name of the images.
    """
    small = {"size": "nano", "patch": 4, "channels": 1, "flip": 0.0, "crop_scale": (0.6, 1.0), "evaluate": BASELINES}
    short = {"epochs": 40, "batch_size": 64, "base_lr": 4e-3, "warmup_epochs": 4}
    of_images = {
        "mnist": {"image_size": (28, 28), "epochs": 30, "finetune": finetuning.MNIST, **(mnist or {})},
        "digits": {"image_size": (32, 32), "finetune": finetuning.DIGITS, **(digits or {})},
        "shapes": {"image_size": (64, 64), "patch": 8, "channels": 3, "finetune": finetuning.DIGITS, **(shapes or {})},
    }
    return {name: changed(paper, **(small | short | changes | own | {"path": name})) for name, own in of_images.items()}


def folder(paper: C, *, small: dict[str, Any] | None = None, **changes: Any) -> dict[str, C]:
    """Adapt the settings of a paper to a folder of images: the presets "small", for a laptop, and "folder", for a GPU.

    Args:
        paper: settings of the paper.
        small: further settings of the preset "small".
        changes: further settings of the preset "folder".
    """
    both = dict.fromkeys(("batch_size", "warmup_epochs", *DECODER)) | {"evaluate": ("finetune", "scratch")}
    size = {"size": "nano", "image_size": (96, 96), "patch": 8, "epochs": 100}
    fast = {"base_lr": 4e-3, "sqrt_rule_at": 64, "finetune": finetuning.SMALL}
    large = {"size": "small", "epochs": 300, "finetune": finetuning.FOLDER}
    return {
        "small": changed(paper, **(both | size | fast | (small or {}))),
        "folder": changed(paper, **(both | large | changes)),
    }


def resolved(config: C, data: Data, world_size: int) -> C:
    """Return the settings with values for those that follow others: decoder, batch size and warm-up."""
    return changed(
        config,
        **dict(zip(DECODER, decoder_sizes(config.network), strict=True)),
        **following(config.optimization, len(data.train), world_size),
        finetune=finetuning.resolved(config.finetune, data, world_size),
    )


def changed(config: C, **changes: Any) -> C:
    """Replace settings by name, whichever unprefixed group they belong to.

    Raises:
        TypeError: if there is no setting of this name.
    """
    own = {name: changes.pop(name) for name in [f.name for f in fields(config)] if name in changes}
    for group in ("run", "data", "network", "optimization"):
        settings = getattr(config, group)
        names = [f.name for f in fields(settings) if f.name in changes]
        own |= {group: replace(settings, **{name: changes.pop(name) for name in names})} if names else {}
    if changes:
        raise TypeError(f"{type(config).__name__} has no settings {', '.join(changes)}")
    assert is_dataclass(config)
    return replace(config, **own)
