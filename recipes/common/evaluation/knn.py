"""k-nearest-neighbor classification of frozen features."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from common.config import Must, Positive, PositiveShare, SettingsError
from common.data.normalize import Normalize
from common.evaluation.features import FeatureExtractor, Pool, extract
from common.networks.encoder import Encoder
from common.runs import Stage

import torch
import torch.nn.functional as F
from torch import Tensor

CELLS = 2**27  # largest number of similarities in memory at a time


@dataclass(frozen=True)
class Neighbors:
    """Settings of k-NN classification."""

    k: Annotated[tuple[int, ...], Must("one or more positive numbers", lambda k: k and min(k) >= 1)] = (
        10,
        20,
        100,
        200,
    )
    """numbers of neighbors; those above the number of labeled images are ignored"""
    temperature: Positive = 0.07
    """votes are weighted by exp(cosine similarity / temperature)"""
    pool: Pool = "auto"
    """feature, after the final norm: the class token, or the mean of the patch tokens; auto: class token if present"""
    crop_fraction: PositiveShare = 0.875
    """side of the center crop of an image, as a fraction of the short side"""


def nearest(
    features: Tensor, labels: Tensor, queries: Tensor, *, classes: int, k: Sequence[int], temperature: float
) -> Tensor:
    """Compute the votes of the k nearest labeled features of each query.

    A vote is weighted by exp(cosine similarity / temperature).

    Args:
        features: labeled features (n, d); they need not be normalized.
        labels: classes (n,), from 0 to `classes` − 1.
        queries: features to classify (q, d); they need not be normalized.
        classes: number of classes.
        k: numbers of neighbors, each at most n.
        temperature: temperature of the weights.

    Returns:
        Votes (len(k), q, classes), up to a positive factor per query.

    Source: HPM, arXiv 2304.05919 (published code).
    """
    features, queries = F.normalize(features, dim=-1), F.normalize(queries, dim=-1)
    votes = torch.zeros(len(k), len(queries), classes, device=features.device)
    with _exact_products():
        for start in range(0, len(queries), rows := max(1, CELLS // len(features))):
            similarity, index = (queries[start : start + rows] @ features.T).topk(max(k), dim=-1)
            # weights are relative to the largest one of each query, because exp(1 / temperature) may overflow
            weight, voted = ((similarity - similarity[:, :1]) / temperature).exp(), labels[index]
            for i, count in enumerate(k):
                votes[i, start : start + rows].scatter_add_(1, voted[:, :count], weight[:, :count])
    return votes


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Disable TF32 matrix products: the ranking is sensitive to rounding."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def knn(encoder: Encoder, normalize: Normalize, *, settings: Neighbors, stage: Stage) -> dict[str, Any]:
    """Classify the test images by their nearest labeled neighbors; each process encodes a part of the images.

    Returns:
        `accuracy` in percent at k = 20, or at the first usable k if 20 is not among them, so that no test labels are
        used to choose k; `by_k`, the accuracy at each k; the numbers of labeled and test images, and seconds.

    Raises:
        SettingsError: if there are no labeled images or no test images, or fewer labeled images than neighbors.
    """
    start = time.perf_counter()
    labeled, test = stage.data.splits()
    usable = [k for k in settings.k if k <= len(labeled)]
    if not usable:
        raise SettingsError(f"{len(labeled)} labeled images are fewer than --k {min(settings.k)} neighbors")
    extractor = FeatureExtractor(encoder, normalize, settings.pool).to(stage.processes.device)
    (features, labels), (queries, truth) = (
        extract(extractor, source, stage, settings.crop_fraction) for source in (labeled, test)
    )
    stage.print(f"{len(test)} images among {len(labeled)} labeled ones, k = {', '.join(map(str, usable))}")
    sizes: dict[str, Any] = {"classes": len(labeled.classes), "k": usable, "temperature": settings.temperature}
    right = torch.zeros(len(usable), device=stage.processes.device)
    for part, labels_of_part in zip(queries.split(4096), truth.split(4096), strict=True):
        right += (nearest(features, labels, part, **sizes).argmax(dim=-1) == labels_of_part).sum(dim=-1)
    by_k = dict(zip(usable, (100 * right / len(test)).tolist(), strict=True))
    chosen = 20 if 20 in by_k else usable[0]
    return {
        "accuracy": by_k[chosen],
        "labeled": len(labeled),
        "test": len(test),
        "feature": extractor.pool,
        "k": chosen,
        "by_k": {str(k): accuracy for k, accuracy in by_k.items()},
        "epoch": 0,
        "seconds": time.perf_counter() - start,
    }
