"""Classify images by the nearest neighbors of their features from a frozen encoder, without any training.

    python recipes/knn.py --encoder runs/mae/encoder.safetensors                 MNIST
    python recipes/knn.py --encoder runs/mae/encoder.safetensors --data DIR      images of your own
    python recipes/knn.py --encoder timm:vit_base_patch16_224.dino:dino.pth --data DIR

Votes are weighted by exp(cosine similarity / temperature).
"""

from dataclasses import dataclass, field

from common.config import EMBEDDED, Flat
from common.evaluation.knn import DIGITS, FOLDER, Neighbors, knn
from common.evaluation.probe import ProbeConfig, probe


@dataclass(frozen=True)
class Config(ProbeConfig):
    """Settings of k-NN classification with frozen features."""

    settings: Flat[Neighbors] = field(default_factory=Neighbors)


PRESETS = {**dict.fromkeys(EMBEDDED, Config(settings=DIGITS)), "folder": Config(settings=FOLDER)}

if __name__ == "__main__":
    probe(knn, PRESETS, name="knn", title="k-NN", description=__doc__)
