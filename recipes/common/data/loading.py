"""Datasets of views, and loaders of batches."""

import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.config import SettingsError
from common.data.sources import Source
from common.data.views import Transform
from common.randomness import seed_of

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

Sample = tuple[int, int]  # epoch, index of the image
LAST_SECONDS = 20  # of a worker after SIGTERM: longer than its parent needs to stop


class ViewDataset(Dataset[Any]):
    """Views of the images of a source; `views[epoch, index]` depends only on the seed, the epoch and the image.

    An unreadable image is replaced by the next readable one.

    Args:
        source: the images.
        transforms: a transform, or a tuple of transforms for a tuple of views of the same decoded image.
        seed: seed of the transforms.
        labels: return (views, label) instead of views.

    Raises:
        ValueError: if the source has no images, has no labels although labels are requested, or returns images that
            are not uint8 with its number of channels.
        SettingsError: if more than 1 percent of the images cannot be read.
    """

    def __init__(
        self,
        source: Source,
        transforms: Transform | tuple[Transform, ...],
        *,
        seed: int = 0,
        labels: bool = False,
    ) -> None:
        if len(source) == 0:
            raise ValueError("the source has no image")
        if labels and not source.classes:
            raise ValueError("labels are requested, but the source has none")
        self.source, self.transforms, self.seed, self.labels = source, transforms, seed, labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: Sample) -> Any:
        views, unreadable = self.load(*sample)
        if views is None:
            raise SettingsError(unreadable_images(unreadable, len(self)))
        return views

    def load(self, epoch: int, index: int) -> tuple[Any, dict[str, str]]:
        """Return `self[epoch, index]`, or None if too many images cannot be read, and the errors by image name."""
        unreadable: dict[str, str] = {}
        for step in range(len(self)):
            chosen = (index + step) % len(self)
            image = _read(self.source, chosen)
            if isinstance(image, Tensor):
                generator = Generator().manual_seed(seed_of(self.seed, epoch, index))
                views = (
                    tuple(transform(image, generator) for transform in self.transforms)
                    if isinstance(self.transforms, tuple)
                    else self.transforms(image, generator)
                )
                return (views, self.source.label(chosen)) if self.labels else views, unreadable
            unreadable[self.source.name(chosen)] = image
            if _too_many(unreadable, len(self)):
                break
        return None, unreadable


def _read(source: Source, index: int) -> Tensor | str:
    """Return an image, or the error message if it cannot be read."""
    try:
        image = source.image(index)
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, ValueError, struct.error, …
        return f"{type(error).__name__}: {error}"
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != source.channels:
        raise ValueError(
            f"{source.name(index)} is {image.dtype} of shape {tuple(image.shape)}, "
            f"not torch.uint8 of shape ({source.channels}, H, W)"
        )
    return image


def _too_many(unreadable: Mapping[str, str], total: int) -> bool:
    return 100 * len(unreadable) > total


def check_readable(unreadable: Mapping[str, str], total: int) -> None:
    """Check that at most 1 percent of the images cannot be read.

    Args:
        unreadable: errors by image name.
        total: number of images.

    Raises:
        SettingsError: if it is more.
    """
    if _too_many(unreadable, total):
        raise SettingsError(unreadable_images(unreadable, total))


def unreadable_images(unreadable: Mapping[str, str], total: int, *, most: int = 3) -> str:
    """Describe unreadable images: how many there are, the names of at most `most`, and the error of the first."""
    names = list(unreadable)
    return (
        f"{len(names)} of {total} images ({len(names) / total:.1%}) cannot be read: "
        f"{', '.join(names[:most])}{', …' if len(names) > most else ''}; the first: {unreadable[names[0]]}"
    )


class Loader:
    """Batches of views, as tensors or tuples of tensors, stacked in channels-last memory format.

    During iteration, `unreadable` maps the names of unreadable images, which were replaced, to their errors.

    Args:
        views: the dataset.
        batches: lists of (epoch, index). An iterator can be used once, and may cover all epochs, so that workers start
            only once; a list can be used repeatedly.
        workers: number of loading processes; 0: load in this process.
        pin: copy the batches to pinned memory, for a GPU.

    Raises:
        SettingsError: if more than 1 percent of the images of the source cannot be read.
    """

    def __init__(
        self,
        views: ViewDataset,
        batches: Iterable[Sequence[Sample]],
        *,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        self.unreadable: dict[str, str] = {}
        self._total = len(views)
        self._loader = DataLoader(
            _Batches(views),
            sampler=batches,
            batch_size=None,  # the items of the sampler are whole batches
            num_workers=workers,
            pin_memory=pin,
            collate_fn=_as_it_is,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_the_parent,
            generator=Generator(),  # otherwise each iteration draws from the global generator
        )

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self.unreadable |= batch.unreadable
            check_readable(self.unreadable, self._total)
            yield batch.content


@dataclass
class _Batch:
    content: Any
    unreadable: dict[str, str]

    def pin_memory(self) -> "_Batch":
        """Copy the batch to pinned memory; PyTorch looks this method up by name."""
        return _Batch(_pin(self.content), self.unreadable)


class _Batches(Dataset[_Batch]):
    """Whole batches, indexed by lists of samples."""

    def __init__(self, views: ViewDataset) -> None:
        self.views = views

    def __getitem__(self, samples: Sequence[Sample]) -> _Batch:
        items, unreadable = [], {}
        for epoch, index in samples:
            item, failed = self.views.load(epoch, index)
            unreadable |= failed
            if item is None:
                return _Batch(None, unreadable)
            items.append(item)
        return _Batch(_stack(items), unreadable)


def _stack(items: Sequence[Any]) -> Any:
    if isinstance(items[0], tuple):
        return tuple(_stack(part) for part in zip(*items, strict=True))
    if isinstance(items[0], Tensor):
        # Resized views are channels-last in memory: with this layout stacking is a plain copy and patchify is faster.
        return torch.stack([item.movedim(0, -1) for item in items]).movedim(-1, 1)
    return torch.tensor(items)


def _pin(content: Any) -> Any:
    if isinstance(content, tuple):
        return tuple(map(_pin, content))
    return content.pin_memory() if isinstance(content, Tensor) else content


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    """Keep a worker at work while a signal to the whole program lets its parent stop, which then shuts workers down."""
    os.setpgid(0, 0)  # signals to the process group, as of Ctrl-C, do not arrive
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # queues send SIGTERM to every process of a job; a worker that its parent ends in this way dies somewhat later
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LAST_SECONDS))
