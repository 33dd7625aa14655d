"""What simple classifiers do on raw pixels of the embedded digits, on the labels and test images of the recipes.

    python benchmarks/raw_pixels.py

Prints the accuracy on the 497 test images with 100 labels, for the seeds 0, 1 and 2, and its mean.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from common.data.sources import Digits

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

CLASSIFIERS = {
    "nearest neighbor": KNeighborsClassifier(1),
    "SVM": SVC(C=10),
    "logistic regression": LogisticRegression(max_iter=2000),
}


def pixels_and_labels(source: Digits) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels in [0, 1] of every image as a row, and its label."""
    images = np.stack([source.image(i).numpy().ravel() / 255 for i in range(len(source))])
    return images, np.array([source.label(i) for i in range(len(source))])


if __name__ == "__main__":
    test = pixels_and_labels(Digits("test"))
    for name, classifier in CLASSIFIERS.items():
        labeled = [pixels_and_labels(Digits("labeled", seed=seed)) for seed in (0, 1, 2)]
        found = [100 * float(classifier.fit(*chosen).score(*test)) for chosen in labeled]
        print(f"{name:<20}{statistics.mean(found):6.1f} %   ({min(found):.1f} – {max(found):.1f})")
