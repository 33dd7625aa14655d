"""Apply trained networks to images, skipping those that cannot be read."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from common.config import Run
from common.data.loading import Loader, ViewDataset, _read
from common.data.sources import Source
from common.data.views import CenterCrop
from common.evaluation.finetuning import Classifier
from common.training.distributed import Processes, in_bf16, num_workers
from common.weights.classifiers import Head, load_classifier
from common.weights.reading import load_weights

import torch
from torch import Tensor
from tqdm import tqdm

T = TypeVar("T")


def open_classifier(path: Path) -> tuple[Classifier, Head]:
    """Open an exported classifier in evaluation mode.

    Raises:
        SettingsError: if the file is not an exported classifier, or its metadata or weights are damaged.
    """
    encoder, normalize, head = load_classifier(path)
    classifier = Classifier(encoder, normalize, len(head.classes), pool=head.pool, head_scale=1.0)
    load_weights(classifier, head.weights, renames={}, optional=(r"encoder\.", r"normalize\."))
    return classifier.eval(), head


class Readable(ViewDataset):
    """Views, each with 1, or black with 0 where an image cannot be read; none is replaced by another."""

    def load(self, epoch: int, index: int) -> tuple[Any, dict[str, str]]:
        """Return the view of an image and whether it could be read, and no errors."""
        image, crop = _read(self.source, index), self.transforms
        if isinstance(image, Tensor) and isinstance(crop, CenterCrop):
            return (crop(image), 1), {}
        assert isinstance(crop, CenterCrop)
        return (torch.zeros(self.source.channels, *crop.size, dtype=torch.uint8), 0), {}


def applied(
    network: Callable[[Tensor], T], source: Source, crop: CenterCrop, *, batch: int, run: Run, processes: Processes
) -> Iterator[tuple[Sequence[int], Tensor, T]]:
    """Yield the indices of images, their views (uint8) and what a network makes of these, in the order of the source.

    Images that cannot be read are named and skipped.

    Args:
        network: maps images, on the device, to any result.
        source: the images.
        crop: their view.
        batch: images per forward pass.
        run: device, precision and workers.
        processes: this process alone.
    """
    device, bf16, total = processes.device, in_bf16(run, processes), len(source)
    batches = [[(0, i) for i in range(start, min(start + batch, total))] for start in range(0, total, batch)]
    loader = Loader(Readable(source, crop), batches, workers=num_workers(run, processes), pin=device.type == "cuda")
    with tqdm(total=total, desc="predicting", unit="image", leave=False, disable=None) as bar:
        for samples, (views, readable) in zip(batches, loader, strict=True):
            bar.update(len(samples))
            for (_, index), good in zip(samples, readable.tolist(), strict=True):
                if not good:
                    processes.print(f"{source.name(index)} is skipped, it cannot be read: {_read(source, index)}")
            kept = [index for (_, index), good in zip(samples, readable.tolist(), strict=True) if good]
            if kept:
                views = views[readable.bool()]
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    yield kept, views, network(views.to(device, non_blocking=True))
