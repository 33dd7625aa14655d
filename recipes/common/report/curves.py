"""Training curves."""

from pathlib import Path
from typing import Any

from common.report.pictures import _save

import matplotlib.pyplot as plt


def draw_curves(path: Path, metrics: dict[str, list[dict[str, Any]]]) -> None:
    """Plot the losses, the learning rate and any measured accuracy of each training against its epochs."""
    measured = any("accuracy" in record for records in metrics.values() for record in records)
    size = (4 * len(metrics), 7 if measured else 5)
    figure, axes = plt.subplots(3 if measured else 2, len(metrics), figsize=size, squeeze=False, sharex="col")
    apart = {"step", "epoch", "lr", "images_per_second", "waiting", "accuracy"}
    for column, (title, records) in enumerate(metrics.items()):
        epochs = [record["epoch"] for record in records]
        axes[0, column].set_title(title, fontsize=9)
        names = [name for name in (records[0] if records else {}) if name not in apart]
        for name in names:
            axes[0, column].plot(epochs, [record[name] for record in records], label=name)
        axes[0, column].set_ylabel("loss")
        if names:
            axes[0, column].legend(fontsize=7)
        axes[1, column].plot(epochs, [record["lr"] for record in records])
        axes[1, column].set_ylabel("learning rate")
        points = [(record["epoch"], record["accuracy"]) for record in records if "accuracy" in record]
        if points:
            axes[2, column].plot(*zip(*points, strict=True), marker="o", markersize=3)
            axes[2, column].set_ylabel("test accuracy, %")
        elif measured:
            axes[2, column].axis("off")
            axes[1, column].tick_params(labelbottom=True)
        axes[2 if points else 1, column].set_xlabel("epoch")
    figure.tight_layout()
    _save(figure, path)
