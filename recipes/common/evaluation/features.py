"""Features of a frozen encoder, extracted in parallel by all processes."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from common.config import SettingsError
from common.data.loading import Loader, ViewDataset
from common.data.normalize import Normalize
from common.data.sources import Source
from common.data.views import CenterCrop
from common.networks.encoder import Encoder
from common.randomness import epoch_order
from common.runs import Stage
from common.training.distributed import Processes, in_bf16, num_workers
from mimkit.tokens import patchify

import torch
from torch import Tensor, nn
from tqdm import tqdm

AT_A_TIME = 256  # images per device and forward pass


Pool = Literal["auto", "class", "mean"]


class FeatureExtractor(nn.Module):
    """A frozen encoder that maps each image to a feature vector.

    Raises:
        SettingsError: if the class token is requested of an encoder that has none.
    """

    def __init__(self, encoder: Encoder, normalize: Normalize, pool: Pool = "auto") -> None:
        super().__init__()
        if pool == "class" and encoder.cls_token is None:
            raise SettingsError("--pool class needs an encoder with a class token")
        self.encoder, self.normalize = encoder.requires_grad_(False), normalize
        self.pool = ("mean" if encoder.cls_token is None else "class") if pool == "auto" else pool
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled features of images, (b, dim)."""
        encoder = self.encoder
        tokens = encoder(patchify(self.normalize(images), patch=encoder.patch), encoder.positions)
        return tokens[:, 0] if self.pool == "class" else tokens[:, encoder.num_prefix :].mean(dim=1)


def extract(
    extractor: FeatureExtractor,
    source: Source,
    stage: Stage,
    crop_fraction: float,
    *,
    only: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the features and labels of center-cropped images; each process encodes a part and receives all.

    Args:
        extractor: the frozen encoder.
        source: the images.
        stage: processes and settings of the images.
        crop_fraction: see `CenterCrop`.
        only: indices of the images; by default all.

    Raises:
        SettingsError: if a feature is not finite.
    """
    only, processes = range(len(source)) if only is None else only, stage.processes
    crop = CenterCrop(stage.data.settings.image_size, crop_fraction=crop_fraction)
    mine = only[processes.rank :: processes.world_size]
    batches = [[(0, index) for index in mine[i : i + AT_A_TIME]] for i in range(0, len(mine), AT_A_TIME)]
    loader = _loader(ViewDataset(source, crop, labels=True), batches, stage)
    bar = tqdm(total=len(mine), desc="encoding", unit="image", disable=None if processes.is_main else True, leave=False)
    parts = []
    with bar:
        for features, labels in _extracted(extractor, loader, stage):
            parts.append((features, labels))
            bar.update(len(labels))
    stage.report_unreadable(loader.unreadable, len(source))
    features, labels = _gathered(parts, len(only), extractor.encoder.dim, processes)
    if not bool(features.isfinite().all()):
        raise SettingsError("the encoder's features are not finite: its weights are damaged")
    return features, labels


def augmented(
    extractor: FeatureExtractor, views: ViewDataset, only: Sequence[int], *, batch: int, epochs: int, stage: Stage
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the features and labels of each step, encoding new views in every epoch; processes share every batch."""
    rank, world_size = stage.processes.rank, stage.processes.world_size

    def micro_batches() -> Iterator[list[tuple[int, int]]]:
        """Yield the (epoch, index) of the images that this process encodes in each forward pass."""
        for epoch, chosen in orders(len(only), batch, epochs, seed=stage.run.seed):
            mine = [(epoch, only[i]) for i in chosen[rank::world_size].tolist()]
            yield from (mine[i : i + AT_A_TIME] for i in range(0, len(mine), AT_A_TIME))

    loader = _loader(views, micro_batches(), stage)
    stream = _extracted(extractor, loader, stage)
    count = math.ceil(len(range(rank, batch, world_size)) / AT_A_TIME)
    for _ in range(epochs * (len(only) // batch)):
        parts = [next(stream) for _ in range(count)]
        yield _gathered(parts, batch, extractor.encoder.dim, stage.processes)
    stage.report_unreadable(loader.unreadable, len(views))


def orders(num_images: int, batch: int, epochs: int, *, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the epoch and the image indices of every step, without the incomplete last batch of each epoch."""
    for epoch in range(epochs):
        order = epoch_order(num_images, epoch, seed=seed)
        yield from ((epoch, order[i : i + batch]) for i in range(0, num_images - batch + 1, batch))


def _loader(views: ViewDataset, batches: Iterable[list[tuple[int, int]]], stage: Stage) -> Loader:
    """Load batches with the workers of a stage."""
    pin = stage.processes.device.type == "cuda"
    return Loader(views, batches, workers=num_workers(stage.run, stage.processes), pin=pin)


def _extracted(extractor: FeatureExtractor, loader: Loader, stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the features and labels of each batch."""
    device, bf16 = stage.processes.device, in_bf16(stage.run, stage.processes)
    for images, labels in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            features = extractor(images.to(device, non_blocking=True))
        yield features.float(), labels.to(device)


def _gathered(parts: list[tuple[Tensor, Tensor]], total: int, dim: int, processes: Processes) -> tuple[Tensor, Tensor]:
    """Gather the features and labels of all processes, whose rows are interleaved."""
    features = torch.zeros(total, dim, device=processes.device)
    labels = torch.zeros(total, dtype=torch.long, device=processes.device)
    if parts:
        features[processes.rank :: processes.world_size] = torch.cat([part[0] for part in parts])
        labels[processes.rank :: processes.world_size] = torch.cat([part[1] for part in parts])
    return processes.sum(features), processes.sum(labels)
