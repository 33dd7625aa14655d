"""How well a classifier recognizes each class, and which classes it confuses."""

from collections.abc import Callable, Sequence
from typing import Any

from common.data.loading import Loader, ViewDataset
from common.data.sources import Source
from common.data.views import CenterCrop
from common.runs import Stage
from common.training.distributed import in_bf16, num_workers

import torch
from torch import Tensor


class Confusion:
    """Counts how a classifier confuses the classes of the test images, during and after its training.

    Args:
        source: the images.
        stage: processes and settings of the images; each process classifies a part of them.
        crop_fraction: see `CenterCrop`.
        batch: images per device and forward pass.
    """

    def __init__(self, source: Source, stage: Stage, crop_fraction: float, *, batch: int) -> None:
        self.stage, self.total, self.classes = stage, len(source), len(source.classes)
        crop = CenterCrop(stage.data.settings.image_size, crop_fraction=crop_fraction)
        self.views = ViewDataset(source, crop, labels=True)
        mine = [(0, index) for index in range(stage.processes.rank, self.total, stage.processes.world_size)]
        self.batches = [mine[i : i + batch] for i in range(0, len(mine), batch)]
        self.unreadable: dict[str, str] = {}

    def count(self, predict: Callable[[Tensor], Tensor]) -> Tensor:
        """Count the images of each class that are taken for each class; collective.

        Args:
            predict: returns the class of each image.

        Returns:
            Counts (classes, classes) on the CPU, a row per true class and a column per predicted class.
        """
        processes, classes = self.stage.processes, self.classes
        loader = Loader(self.views, self.batches, workers=num_workers(self.stage.run, processes), pin=False)
        counts, device = torch.zeros(classes**2, dtype=torch.long, device=processes.device), processes.device
        bf16 = in_bf16(self.stage.run, processes)
        for images, labels in loader:
            # eager mode: the smaller last batch would trigger recompilation
            with torch.compiler.set_stance("force_eager"), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                predicted = predict(images.to(device))
            cells = labels.to(device) * classes + predicted
            counts.scatter_add_(0, cells, torch.ones_like(cells))
        self.unreadable = loader.unreadable
        return processes.sum(counts).view(classes, classes).cpu()

    def report_unreadable(self) -> None:
        """Print which images could not be read; collective."""
        self.stage.report_unreadable(self.unreadable, self.total)


def top1(confusion: Tensor) -> float:
    """Return the share of images that are classified correctly, in percent."""
    return 100 * float(confusion.trace() / confusion.sum())


def scores(confusion: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Summarize a confusion matrix; all accuracies are in percent.

    Args:
        confusion: counts, a row per true class and a column per predicted class.
        classes: names of the classes.

    Returns:
        `accuracy`; `balanced_accuracy`, the mean of the accuracies of the classes that have images; `per_class`, the
        accuracy of each class by name, None without images; and `confusion`, for each true class how many images were
        taken for each class, without zeros.
    """
    right, total = confusion.diagonal(), confusion.sum(dim=1)
    recall = 100 * right[total > 0].double() / total[total > 0]
    share = (100 * right.double() / total.clamp(min=1)).tolist()
    rows = {name: row for name, row in zip(classes, confusion.tolist(), strict=True)}
    return {
        "accuracy": top1(confusion),
        "balanced_accuracy": float(recall.mean()),
        "per_class": {name: share[i] if total[i] else None for i, name in enumerate(classes)},
        "confusion": {
            name: {other: count for other, count in zip(classes, row, strict=True) if count}
            for name, row in rows.items()
        },
    }


def measurements(wanted: int | None, *, trained: int, tested: int) -> int:
    """Return how often the accuracy is measured during training.

    The measurement after the last step is the result and costs nothing more. By default there are at most 9 others, on
    at most 15 percent as many images as are trained on, which takes some 5 percent of the time because only the forward
    pass is needed.

    Args:
        wanted: number of measurements, or None for the default.
        trained: number of images that are trained on, counted in every epoch.
        tested: number of test images.
    """
    return min(10, 1 + int(0.15 * trained / tested)) if wanted is None else wanted
