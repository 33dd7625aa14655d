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
LEFT_OUT = 10_000  # largest number of labeled images by which k is chosen


@dataclass(frozen=True)
class Neighbors:
    """Settings of k-NN classification."""

    k: Annotated[tuple[int, ...], Must("one or more positive numbers", lambda k: k and min(k) >= 1)] = (
        *(1, 5, 10, 20, 100, 200),
    )
    """numbers of neighbors; those above the number of labeled images are ignored. The result is that of the number that
    classifies the labeled images best, each by the others (leave-one-out)"""
    temperature: Positive = 0.07
    """votes are weighted by exp(cosine similarity / temperature)"""
    pool: Pool = "auto"
    """feature, after the final norm: the class token, or the mean of the patch tokens; auto: class token if present"""
    crop_fraction: PositiveShare = 0.875
    """side of the center crop of an image, as a fraction of the short side"""


DIGITS, FOLDER = Neighbors(crop_fraction=1.0), Neighbors()


def nearest(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    classes: int,
    k: Sequence[int],
    temperature: float,
    own: Tensor | None = None,
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
        own: for each query, the index (q,) of the labeled feature that does not vote, the query itself.

    Returns:
        Votes (len(k), q, classes), up to a positive factor per query.

    Source: HPM, arXiv 2304.05919 (published code).
    """
    features, queries = F.normalize(features, dim=-1), F.normalize(queries, dim=-1)
    votes = torch.zeros(len(k), len(queries), classes, device=features.device)
    with _exact_products():
        for start in range(0, len(queries), rows := max(1, CELLS // len(features))):
            similarity = queries[start : start + rows] @ features.T
            if own is not None:
                similarity.scatter_(1, own[start : start + rows, None], -torch.inf)
            similarity, index = similarity.topk(max(k), dim=-1)
            # weights are relative to the largest one of each query, because exp(1 / temperature) may overflow
            weight, voted = ((similarity - similarity[:, :1]) / temperature).exp(), labels[index]
            for i, count in enumerate(k):
                votes[i, start : start + rows].scatter_add_(1, voted[:, :count], weight[:, :count])
    return votes


def accuracies(
    features: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, own: Tensor | None = None, **how: Any
) -> list[float]:
    """Return the accuracy at each k in percent, where `truth` are the classes of the queries; see `nearest`."""
    right = torch.zeros(len(how["k"]), device=features.device)
    for start in range(0, len(queries), 4096):
        part = slice(start, start + 4096)
        votes = nearest(features, labels, queries[part], own=None if own is None else own[part], **how)
        right += (votes.argmax(dim=-1) == truth[part]).sum(dim=-1)
    return (100 * right / len(queries)).tolist()


def leave_one_out(features: Tensor, labels: Tensor, **how: Any) -> list[float]:
    """Return the accuracy at each k of labeled images classified by the other ones, at most 10,000 evenly spaced."""
    count = min(len(features), LEFT_OUT)
    own = torch.arange(count, device=features.device) * len(features) // count
    return accuracies(features, labels, features[own], labels[own], own, **how)


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
        `accuracy` in percent at the `k` of the highest leave-one-out accuracy on the labeled images, the smallest of
        equals, so that no test image is used to choose it; `by_k` and `leave_one_out`, the accuracies at each k on the
        test images and on the labeled ones; the numbers of labeled and test images, and seconds.

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
    by_k = dict(zip(usable, accuracies(features, labels, queries, truth, **sizes), strict=True))
    left_out = dict(zip(usable, leave_one_out(features, labels, **sizes), strict=True))
    chosen = min(usable, key=lambda k: (-left_out[k], k))
    return {
        "accuracy": by_k[chosen],
        "labeled": len(labeled),
        "test": len(test),
        "feature": extractor.pool,
        "k": chosen,
        "by_k": {str(k): accuracy for k, accuracy in by_k.items()},
        "leave_one_out": {str(k): accuracy for k, accuracy in left_out.items()},
        "epoch": 0,
        "seconds": time.perf_counter() - start,
    }
