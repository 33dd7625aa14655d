"""From views of images to batches."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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


class ViewDataset(Dataset[Any]):
    """Views of the images of a source; `views[epoch, index]` is a function of the seed, the epoch and the image.

    It is what the transform makes of the image, or a tuple if a tuple of transforms is given, for which the image is
    decoded once; with `labels` it is (that, label). An image that cannot be read is replaced by the next one that can.

    Raises:
        ValueError: the source has no image, or no labels where they are asked for, or gives something else than uint8
            of its number of channels, or too many of its images cannot be read.
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
            raise SettingsError(_complaint(unreadable, len(self)))
        return views

    def load(self, epoch: int, index: int) -> tuple[Any, dict[str, str]]:
        """Return `self[epoch, index]`, and the reasons by name of the images that could not be read in its place.

        When these are too many, the first is `None`.
        """
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
    """Return an image, or the reason why it cannot be read."""
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


def _too_many(unreadable: dict[str, str], total: int) -> bool:
    return 100 * len(unreadable) > total


def _complaint(unreadable: dict[str, str], total: int) -> str:
    names = list(unreadable)
    return (
        f"{len(names)} of {total} images ({len(names) / total:.1%}) cannot be read: "
        f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}; the first: {unreadable[names[0]]}"
    )


class Loader:
    """Batches of views, as tensors or tuples of tensors, stacked in channels-last memory.

    Args:
        batches: lists of (epoch, index). An iterator serves one iteration, which may go over all epochs and so never
            waits for workers to start; a list serves any number.
        workers: processes that load; 0 loads in this one.
        pin: copy the batches to pinned memory, for a GPU.
        collate: `collate(batch, seed)` is applied to each batch where it was loaded; the seed is a function of those of
            the batch's first sample.

    While iterating, `unreadable` has the reasons by name of the images that could not be read and were replaced.

    Raises:
        SettingsError: more than 1 % of the images of the source cannot be read.
    """

    def __init__(
        self,
        views: ViewDataset,
        batches: Iterable[Sequence[Sample]],
        *,
        workers: int = 0,
        pin: bool = False,
        collate: Callable[[Any, int], Any] | None = None,
    ) -> None:
        self.unreadable: dict[str, str] = {}
        self._total = len(views)
        self._loader = DataLoader(
            _Batches(views, collate),
            sampler=batches,
            batch_size=None,  # the sampler's items are batches already
            num_workers=workers,
            pin_memory=pin,
            collate_fn=_as_it_is,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_the_parent,
            generator=Generator(),  # else each iteration draws from the global one
        )

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self.unreadable |= batch.unreadable
            if _too_many(self.unreadable, self._total):
                raise SettingsError(_complaint(self.unreadable, self._total))
            yield batch.content


@dataclass
class _Batch:
    content: Any
    unreadable: dict[str, str]

    def pin_memory(self) -> "_Batch":  # the name by which PyTorch finds it
        return _Batch(_pin(self.content), self.unreadable)


class _Batches(Dataset[_Batch]):
    """Whole batches, indexed by their lists of samples."""

    def __init__(self, views: ViewDataset, collate: Callable[[Any, int], Any] | None) -> None:
        self.views, self.collate = views, collate

    def __getitem__(self, samples: Sequence[Sample]) -> _Batch:
        items, unreadable = [], {}
        for epoch, index in samples:
            item, failed = self.views.load(epoch, index)
            unreadable |= failed
            if item is None:
                return _Batch(None, unreadable)
            items.append(item)
        content = _stack(items)
        if self.collate is not None:
            content = self.collate(content, seed_of("batch", self.views.seed, *samples[0]))
        return _Batch(content, unreadable)


def _stack(items: Sequence[Any]) -> Any:
    if isinstance(items[0], tuple):
        return tuple(_stack(part) for part in zip(*items, strict=True))
    if isinstance(items[0], Tensor):
        # A resized view has its channels side by side in memory: to keep that is a plain copy, and patches like it too.
        return torch.stack([item.movedim(0, -1) for item in items]).movedim(-1, 1)
    return torch.tensor(items)


def _pin(content: Any) -> Any:
    if isinstance(content, tuple):
        return tuple(map(_pin, content))
    return content.pin_memory() if isinstance(content, Tensor) else content


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    """Keep loading when the whole process group is told to stop: the parent writes its checkpoint, then ends us."""
    os.setpgid(0, 0)
