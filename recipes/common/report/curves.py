"""Training curves."""

from pathlib import Path
from typing import Any

from common.report.pictures import _save

import matplotlib.pyplot as plt


def draw_curves(path: Path, metrics: dict[str, list[dict[str, Any]]]) -> None:
    """Plot the losses and the learning rate of each training against its epochs."""
    figure, axes = plt.subplots(2, len(metrics), figsize=(4 * len(metrics), 5), squeeze=False, sharex="col")
    apart = {"step", "epoch", "lr", "images_per_second", "waiting"}
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
        axes[1, column].set_xlabel("epoch")
    figure.tight_layout()
    _save(figure, path)
