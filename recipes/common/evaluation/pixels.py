"""Classification of raw pixels without a network: what a pre-trained encoder has to beat."""

import time
from typing import Any

from common.data.loading import Loader, ViewDataset
from common.data.sources import Source
from common.data.views import CenterCrop
from common.runs import Stage

import numpy as np
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

MOST_VALUES = 100_000_000  # pixels of all labeled images together
MOST_LABELED = 10_000  # an SVM takes time and memory in proportion to the square of this number


def nearest(stage: Stage) -> dict[str, Any] | None:
    """Classify each test image as the labeled image nearest to it, by the Euclidean distance of their pixels."""
    return _classify(KNeighborsClassifier(1), stage)


def svm(stage: Stage) -> dict[str, Any] | None:
    """Classify test images by a support vector machine with Gaussian kernel on pixels, scikit-learn's with C = 10."""
    return _classify(SVC(C=10), stage)


def _classify(classifier: Any, stage: Stage) -> dict[str, Any] | None:
    """Fit a classifier to the labeled images and measure its accuracy on the test images, in the main process.

    Returns:
        Accuracy in percent, numbers of labeled and test images, and seconds; None if there are too many pixels.
    """
    (labeled, test), started = stage.data.splits(), time.perf_counter()
    height, width = stage.data.settings.image_size
    if len(labeled) > MOST_LABELED or len(labeled) * height * width * labeled.channels > MOST_VALUES:
        stage.print(
            f"skipped: {len(labeled)} labeled images of {height} × {width} pixels; at most {MOST_LABELED} images and "
            f"{MOST_VALUES:.0e} values are compared"
        )
        return None
    if not stage.processes.is_main:
        return None
    classifier.fit(*_pixels(labeled, stage))
    correct = 100 * float(classifier.score(*_pixels(test, stage)))
    seconds = time.perf_counter() - started
    return {"accuracy": correct, "labeled": len(labeled), "test": len(test), "seconds": seconds}


def _pixels(source: Source, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels in [0, 1] of every image, center-cropped to the network's input, as a row, and its label."""
    views = ViewDataset(source, CenterCrop(stage.data.settings.image_size, crop_fraction=1.0), labels=True)
    order = [(0, index) for index in range(len(source))]
    loader = Loader(views, [order[i : i + 256] for i in range(0, len(order), 256)])
    images, labels = zip(*loader, strict=True)
    pixels = np.concatenate([batch.numpy().reshape(len(batch), -1) for batch in images]).astype(np.float32) / 255
    return pixels, np.concatenate([batch.numpy() for batch in labels])
