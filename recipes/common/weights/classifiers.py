"""Export fine-tuned classifiers to files that timm can load, and load them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config import SettingsError
from common.data.normalize import Normalize
from common.files import read_tensors, write_tensors
from common.networks.vit import ViT
from common.weights.encoders import described, load_encoder
from common.weights.metadata import exported_arguments
from common.weights.timm_names import timm_state

from torch import Tensor

POOLS: dict[str, Literal["mean", "class"]] = {"avg": "mean", "token": "class"}  # timm's names and ours


@dataclass(frozen=True)
class Head:
    """What turns the tokens of an encoder into a class.

    Args:
        classes: names of the classes, in the order of the logits.
        pool: mean of the patch tokens, followed by a norm, or the class token.
        crop_fraction: side of the center crop of an image, as a fraction of the short side.
        weights: `head.weight`, `head.bias` and, for the mean, `fc_norm.weight` and `fc_norm.bias`.
    """

    classes: tuple[str, ...]
    pool: Literal["mean", "class"]
    crop_fraction: float
    weights: dict[str, Tensor]


def export_classifier(path: Path, encoder: ViT, normalize: Normalize, head: Head) -> None:
    """Write a classifier under timm's parameter names, with the arguments to rebuild it (in timm, if possible).

    timm has no final norm before a mean of tokens, so that of the encoder, which is unused, is left out.
    """
    about, state = described(encoder, normalize), timm_state(encoder)
    kind = "timm" if "timm" in about else "mimkit"
    pool = next(name for name, ours in POOLS.items() if ours == head.pool)
    about[kind] |= {"global_pool": pool, "num_classes": len(head.classes)}
    about |= {"classes": list(head.classes), "crop_fraction": head.crop_fraction}
    if head.pool == "mean":
        state = {name: tensor for name, tensor in state.items() if name not in ("norm.weight", "norm.bias")}
    write_tensors(path, state | head.weights, about)


def load_classifier(path: Path) -> tuple[ViT, Normalize, Head]:
    """Build the encoder of an exported classifier, and return it with the normalization of its images and its head.

    Raises:
        SettingsError: if the file is not an exported classifier, or its metadata or weights are damaged.
    """
    weights, about = read_tensors(path)
    arguments = exported_arguments(about, path)
    if arguments is None or not arguments.get("num_classes"):
        raise SettingsError(
            f"{path} is not a classifier: fine-tune an encoder with recipes/finetune.py --encoder {path}, "
            "which writes classifier.safetensors"
        )
    pool = POOLS[arguments["global_pool"]]
    encoder, normalize = load_encoder(path, unused=(r"norm\.",) if pool == "mean" else ())
    own = {name: tensor for name, tensor in weights.items() if name.startswith(("head.", "fc_norm."))}
    return encoder, normalize, Head(tuple(about["classes"]), pool, about["crop_fraction"], own)
