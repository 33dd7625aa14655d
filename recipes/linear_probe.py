"""Train a linear classifier on a frozen encoder and measure its accuracy.

    python recipes/linear_probe.py --encoder runs/mae/encoder.safetensors                 MNIST
    python recipes/linear_probe.py --encoder runs/mae/encoder.safetensors --data DIR      images of your own
    python recipes/linear_probe.py --encoder timm:vit_base_patch16_224.dino:dino.pth --data DIR
    torchrun --nproc_per_node=8 recipes/linear_probe.py --preset mae --augment --encoder MAE.pth --data DIR

Every image is encoded once, as its center crop, and the classifiers of all learning rates are trained in a single pass
over these features. With --augment, a new random crop of every image is encoded in every epoch, as in the papers.
"""

from dataclasses import dataclass, field, replace

from common.config import EMBEDDED, Flat, Share
from common.evaluation.linear import DIGITS, FOLDER, Linear, linear
from common.evaluation.probe import ProbeConfig, probe


@dataclass(frozen=True)
class Config(ProbeConfig):
    """The published protocols are the presets "mae" and "hpm"."""

    flip: Share = 0.5
    """with --augment: probability of a horizontal flip"""
    settings: Flat[Linear] = field(default_factory=Linear)


HPM = replace(Linear(), optimizer="sgd", base_lrs=(1e-3,), batch_size=4096, epochs=100, pool="mean")
PRESETS = {
    **dict.fromkeys(EMBEDDED, Config(flip=0.0, settings=DIGITS)),
    "folder": Config(settings=FOLDER),
    "mae": Config(),
    "hpm": Config(settings=HPM),
}

if __name__ == "__main__":
    probe(linear, PRESETS, name="linear_probe", title="linear probe", description=__doc__)
