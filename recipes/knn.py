"""Classify images by their nearest neighbors among the features of a frozen encoder; nothing is trained.

    python recipes/knn.py --encoder runs/mae/encoder.safetensors                 the embedded digits
    python recipes/knn.py --encoder runs/mae/encoder.safetensors --data DIR      images of your own
    python recipes/knn.py --encoder timm:vit_base_patch16_224.dino:dino.pth --data DIR

Each neighbor votes with exp(cosine similarity / 0.07).
"""

from dataclasses import dataclass, field

from common.config import Flat
from common.evaluation.knn import Neighbors, knn
from common.evaluation.probe import ProbeConfig, probe


@dataclass(frozen=True)
class Config(ProbeConfig):
    """Neighbors are sought among the features of the frozen encoder."""

    settings: Flat[Neighbors] = field(default_factory=Neighbors)


PRESETS = {"digits": Config(settings=Neighbors(crop_fraction=1.0)), "folder": Config()}

if __name__ == "__main__":
    probe(knn, PRESETS, name="knn", title="k-NN", description=__doc__)
