"""Train a few new transformer blocks and a head on top of a frozen encoder, and measure their accuracy.

    python recipes/nonlinear_probe.py --encoder runs/mae/encoder.safetensors                 MNIST
    python recipes/nonlinear_probe.py --encoder runs/mae/encoder.safetensors --data DIR --blocks 4
    torchrun --nproc_per_node=8 recipes/nonlinear_probe.py --encoder mae_pretrain_vit_base.pth --data DIR

The blocks have the width of the encoder and are trained as in fine-tuning, without layer-wise learning-rate decay.

Paper: Beyond Masking, arXiv 2203.14313, non-linear probing. It does not state the settings of the optimizer.
"""

from dataclasses import dataclass, field

from common.config import EMBEDDED, Flat, Share
from common.evaluation import finetuning
from common.evaluation.nonlinear import DIGITS, FOLDER, Nonlinear, nonlinear
from common.evaluation.probe import ProbeConfig, probe


@dataclass(frozen=True)
class Config(ProbeConfig):
    """The encoder is frozen; new blocks and the head are trained as in fine-tuning."""

    flip: Share = 0.5
    """probability of a horizontal flip"""
    settings: Flat[Nonlinear] = field(default_factory=Nonlinear)


PRESETS = {
    **dict.fromkeys(EMBEDDED, Config(flip=0.0, settings=DIGITS)),
    "folder": Config(settings=FOLDER),
    "imagenet": Config(settings=Nonlinear(finetune=finetuning.of(finetuning.MAE, base_lr=1e-3))),
}

if __name__ == "__main__":
    probe(nonlinear, PRESETS, name="nonlinear_probe", title="non-linear probe", description=__doc__)
