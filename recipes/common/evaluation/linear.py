"""Linear probing: linear classifiers on frozen features."""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.config import Area, Count, NonNegative, PositiveShare, SettingsError, as_typed
from common.data.loading import ViewDataset
from common.data.normalize import Normalize
from common.data.views import OneShotCrop
from common.evaluation.features import FeatureExtractor, Pool, augmented, extract, orders
from common.files import write
from common.networks.encoder import Encoder
from common.randomness import seed_of
from common.runs import Stage
from common.training.optimizer import LARS
from common.training.schedules import by_epoch

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Linear:
    """Settings of linear probing: MAE's protocol, except for the augmentation."""

    base_lrs: tuple[float, ...] = (0.1,)
    """learning rates for a batch of 256 images; one of several is selected on a held-out tenth of the labeled images"""
    optimizer: Literal["lars", "sgd"] = "lars"
    """both with momentum 0.9 and without weight decay"""
    epochs: Count = 90
    """passes over the labeled images"""
    batch_size: Count = 16384
    """images per step; all labeled images if there are fewer"""
    warmup_epochs: NonNegative = 10.0
    """length of the linear learning-rate warm-up in epochs, before the cosine decay to 0"""
    pool: Pool = "auto"
    """feature, after the final norm: the class token, or the mean of the patch tokens; auto: class token if present"""
    augment: bool = False
    """encode new random crops in every epoch, as the papers do; without, each image is encoded once, as its center
    crop, which is much faster and changes the accuracy by a few tenths to a few points"""
    crop_scale: Area = (0.08, 1.0)
    """with --augment: range of the area of a random crop, as a fraction of the image"""
    crop_fraction: PositiveShare = 0.875
    """side of the center crop of an image, as a fraction of the short side"""


DIGITS = Linear(
    base_lrs=(1.0, 3.0, 10.0, 30.0, 100.0), epochs=200, batch_size=30, crop_scale=(0.6, 1.0), crop_fraction=1.0
)


FOLDER = Linear(base_lrs=(0.03, 0.1, 0.3, 1.0, 3.0), batch_size=1024)


class LinearClassifiers(nn.Module):
    """Linear classifiers on shared, batch-normalized features, one per learning rate.

    All start from the same weights. `weight` and `bias` stack all classifiers, which are trained in a single pass.
    """

    def __init__(self, dim: int, classes: int, count: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6, momentum=0.1)
        weight = nn.init.trunc_normal_(torch.empty(classes, dim), std=0.01)
        self.weight = nn.Parameter(weight.repeat(count, 1, 1))
        self.bias = nn.Parameter(torch.zeros(count, classes))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (heads, images, classes)."""
        logits = F.linear(self.norm(features), self.weight.flatten(0, 1), self.bias.flatten())
        return logits.unflatten(1, self.bias.shape).movedim(1, 0)

    def losses(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of each head."""
        return torch.stack([F.cross_entropy(logits, labels) for logits in self(features)])

    @torch.no_grad()
    def evaluate(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the accuracy of each head in percent, and its cross entropy."""
        self.eval()
        right, losses = torch.zeros(2, len(self.bias), device=features.device)
        for part, truth in zip(features.split(4096), labels.split(4096), strict=True):
            right += (self(part).argmax(dim=-1) == truth).sum(dim=1)
            losses += self.losses(part, truth) * len(truth)
        return 100 * right / len(labels), losses / len(labels)


def fit(
    heads: LinearClassifiers,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    rates: Sequence[float],
    steps: int,
    settings: Linear,
) -> list[dict[str, Any]]:
    """Train each head at its learning rate, and return the loss and learning rate of the last head in every epoch.

    Args:
        heads: the classifiers.
        batches: features and labels of every step.
        rates: peak learning rate of each head.
        steps: number of steps per epoch.
        settings: settings of the optimizer.
    """
    make = LARS if settings.optimizer == "lars" else torch.optim.SGD
    # the optimizer sees each head as a separate parameter, a view of the stacked one
    parts = [[nn.Parameter(part) for part in pair] for pair in zip(heads.weight.data, heads.bias.data, strict=True)]
    optimizer = make([{"params": pair, "lr": 0.0} for pair in parts], lr=0.0, momentum=0.9)
    warmup = min(settings.warmup_epochs, settings.epochs)
    heads.train()
    history, window = [], []
    for step, (features, labels) in enumerate(batches):
        share = by_epoch(step / steps, lr=1.0, min_lr=0.0, warmup=warmup, epochs=settings.epochs)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        losses = heads.losses(features, labels)
        gradients = torch.autograd.grad(losses.sum(), [heads.weight, heads.bias])
        for pair, *own in zip(parts, *gradients, strict=True):
            for part, gradient in zip(pair, own, strict=True):
                part.grad = gradient
        optimizer.step()
        window.append(losses[-1].detach())
        if len(window) == steps:
            lr, loss = optimizer.param_groups[-1]["lr"], float(torch.stack(window).mean())
            history.append({"step": step + 1, "epoch": (step + 1) // steps, "loss": loss, "lr": lr})
            window = []
    return history


def hold_out(labels: Sequence[int], *, seed: int) -> tuple[list[int], list[int]]:
    """Hold out a tenth of the images of every class, at least one, but none of a class with a single image.

    Returns:
        The indices of the remaining images, and of the held-out images.

    Raises:
        SettingsError: if no class has two images.
    """
    order = torch.randperm(len(labels), generator=Generator().manual_seed(seed_of(seed, "hold out")))
    of_class: dict[int, list[int]] = {}
    for index in order.tolist():
        of_class.setdefault(labels[index], []).append(index)
    apart = [i for members in of_class.values() for i in members[: min(len(members) - 1, max(1, len(members) // 10))]]
    if not apart:
        raise SettingsError("several learning rates need labeled images to choose by, but no class has two: give one")
    return sorted(set(range(len(labels))) - set(apart)), sorted(apart)


def linear(encoder: Encoder, normalize: Normalize, *, settings: Linear, stage: Stage) -> dict[str, Any]:
    """Train a linear classifier on frozen features, and measure its accuracy on the test images.

    Of several learning rates, the best on a held-out tenth of the labeled images is selected, and the classifier is
    retrained on all of them. Each process encodes a part of the images; the classifiers are small, so each process
    trains all of them.

    Returns:
        `accuracy` in percent, the numbers of labeled and test images, the selected `base_lr`, `held_out`, the held-out
        accuracy of each learning rate if there are several, and the loss, epochs and seconds.

    Raises:
        SettingsError: if there are no labeled images or no test images, or no learning rate gives a finite loss.
    """
    check_linear(settings)
    start = time.perf_counter()
    labeled, test = stage.data.splits()
    probe = _Probe(FeatureExtractor(encoder, normalize, settings.pool).to(stage.processes.device), settings, stage)
    every = list(range(len(labeled)))
    base_lr, held_out = settings.base_lrs[0], {}
    if len(settings.base_lrs) > 1:
        most, apart = hold_out([labeled.label(index) for index in every], seed=stage.run.seed)
        heads, _ = probe.train(most, settings.base_lrs, f"choosing a learning rate by {len(apart)} held-out images")
        held = extract(probe.extractor, labeled, stage, settings.crop_fraction, only=apart)
        correct, losses = (numbers.tolist() for numbers in heads.evaluate(*held))
        finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
        if not finite:
            raise SettingsError(f"--base-lrs {as_typed(settings.base_lrs)}: no learning rate gives a finite loss")
        best = max(finite, key=lambda i: (correct[i], -losses[i]))
        base_lr, held_out = settings.base_lrs[best], dict(zip(map(str, settings.base_lrs), correct, strict=True))
    heads, history = probe.train(every, [base_lr], f"training at {base_lr:g}")
    if not math.isfinite(history[-1]["loss"]):
        raise SettingsError(f"the loss at --base-lrs {base_lr:g} is not finite")
    correct, _ = heads.evaluate(*extract(probe.extractor, test, stage, settings.crop_fraction))
    if stage.processes.is_main:
        stage.folder.mkdir(parents=True, exist_ok=True)
        write(stage.folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history).encode())
    return {
        "accuracy": float(correct),
        "labeled": len(labeled),
        "test": len(test),
        "feature": probe.extractor.pool,
        "base_lr": base_lr,
        "held_out": held_out,
        "loss": history[-1]["loss"],
        "epoch": settings.epochs,
        "seconds": time.perf_counter() - start,
    }


class _Probe:
    """The features of the labeled images, computed once or, with augmentation, in every epoch."""

    def __init__(self, extractor: FeatureExtractor, settings: Linear, stage: Stage) -> None:
        self.extractor, self.settings, self.stage = extractor, settings, stage
        self.labeled, _ = stage.data.splits()
        data = stage.data.settings
        crop = OneShotCrop(data.image_size, settings.crop_scale, data.flip)
        self.views = ViewDataset(self.labeled, crop, seed=stage.run.seed, labels=True)
        self.features = self.labels = torch.empty(0)
        if not settings.augment:
            self.features, self.labels = extract(extractor, self.labeled, stage, settings.crop_fraction)

    def train(
        self, only: list[int], base_lrs: Sequence[float], what: str
    ) -> tuple[LinearClassifiers, list[dict[str, Any]]]:
        """Train one classifier per learning rate on a subset of the labeled images."""
        settings, stage = self.settings, self.stage
        batch, epochs = min(settings.batch_size, len(only)), settings.epochs
        steps, rates = len(only) // batch, [rate * batch / 256 for rate in base_lrs]
        stage.print(
            f"{what}, {len(only)} images, {epochs} epochs of {steps} steps, batch {batch}; "
            f"learning rate {', '.join(f'{rate:g}' for rate in base_lrs)} × {batch} / 256"
        )
        torch.manual_seed(stage.run.seed)
        device = stage.processes.device
        heads = LinearClassifiers(self.extractor.encoder.dim, len(self.labeled.classes), len(rates)).to(device)
        if settings.augment:
            batches = augmented(self.extractor, self.views, only, batch=batch, epochs=epochs, stage=stage)
        else:
            rows = torch.tensor(only)
            chosen = (rows[part].to(device) for _, part in orders(len(only), batch, epochs, seed=stage.run.seed))
            batches = ((self.features[part], self.labels[part]) for part in chosen)
        hidden = None if stage.processes.is_main else True
        bar = tqdm(batches, desc=stage.title, total=epochs * steps, unit="step", disable=hidden, leave=False)
        return heads, fit(heads, bar, rates=rates, steps=steps, settings=settings)


def check_linear(settings: Linear) -> None:
    """Validate the settings beyond their types.

    Raises:
        SettingsError: if the learning rates are not positive numbers, or the batch size is below 2.
    """
    if not settings.base_lrs or not all(0 < rate < math.inf for rate in settings.base_lrs):
        raise SettingsError(f"--base-lrs {as_typed(settings.base_lrs)}: give one or more positive numbers")
    if settings.batch_size < 2:
        raise SettingsError(f"--batch-size {settings.batch_size} has no statistics to normalize by: at least 2 images")
