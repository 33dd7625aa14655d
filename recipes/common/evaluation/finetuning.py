"""Fine-tune an encoder on labeled images, as in MAE and its successors, and measure its accuracy."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast

from common.config import (
    Area,
    BelowOne,
    Flat,
    Must,
    NonNegative,
    Optimization,
    Positive,
    PositiveShare,
    SettingsError,
    Share,
    known,
)
from common.data.augment import Augment, auto_augment_policy
from common.data.loading import Loader, ViewDataset
from common.data.mixing import Mixing
from common.data.normalize import Normalize
from common.data.sources import Data
from common.data.views import CropFlip, Transform
from common.evaluation.metrics import Confusion, measurements, scores, top1
from common.networks.encoder import TrainableEncoder
from common.networks.vit import ViT
from common.randomness import seed_of, uniform
from common.report.classes import draw_confusion
from common.runs import Stage
from common.training.distributed import num_workers
from common.training.engine import train
from common.training.operations import operations_per_image
from common.training.step import following, micro_batches
from common.weights.classifiers import Head, export_classifier
from mimkit.tokens import patchify, take

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Finetuning:
    """Settings of fine-tuning; the defaults are MAE's."""

    pool: Literal["mean", "class"] = "mean"
    """input of the head: the mean of the patch tokens after a new norm, or the class token"""
    train_positions: bool = True
    """whether the position table is trained"""
    drop_path: BelowOne = 0.1
    """drop path rate of the last block, rising linearly from 0 in the first"""
    smoothing: BelowOne = 0.1
    """label smoothing"""
    mixup: NonNegative = 0.8
    """alpha of mixup; 0: no mixup"""
    cutmix: NonNegative = 1.0
    """alpha of cutmix; 0: no cutmix"""
    randaugment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of the augmentation policy; empty: none"""
    erasing: Share = 0.25
    """probability of random erasing"""
    crop_scale: Area = (0.08, 1.0)
    """range of the area of a random crop, as a fraction of the image"""
    crop_fraction: PositiveShare = 0.875
    """side of the center crop of a test image, as a fraction of the short side"""
    head_scale: Positive = 2e-5
    """std of the initial weights of the head"""
    scratch_lr: Positive | None = None
    """base learning rate of the same network from scratch, for comparison; none: the one of fine-tuning"""
    measurements: Annotated[int, Must("0 or more", lambda x: x >= 0)] | None = None
    """how often the accuracy on the test images is measured during training, at evenly spaced steps, for the curves;
    the result is always that of the last step. 0: never; none: up to 10 times, in at most some 5 % of the time"""
    optimization: Flat[Optimization] = field(
        default_factory=lambda: Optimization(
            epochs=100,
            batch_size=1024,
            base_lr=5e-4,
            warmup_epochs=5,
            min_lr=1e-6,
            betas=(0.9, 0.999),
            undecayed=("cls_token", "pos_embed"),
            layer_decay=0.65,
        )
    )


def of(settings: Finetuning, *, drop_path: float | None = None, **optimization: Any) -> Finetuning:
    """Return settings with other settings of the optimizer and, if given, another drop path rate."""
    drop_path = settings.drop_path if drop_path is None else drop_path
    return replace(settings, drop_path=drop_path, optimization=replace(settings.optimization, **optimization))


MAE = Finetuning()

MAE_LARGE = of(MAE, epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2)

MAE_HUGE = of(MAE_LARGE, drop_path=0.3)

FOLDER = of(MAE, batch_size=None, warmup_epochs=None)

HPM = of(MAE, layer_decay=0.8)

HPM_LARGE = of(HPM, epochs=50)

DROPPOS = replace(of(MAE, base_lr=1e-3, layer_decay=0.8), train_positions=False)

DROPPOS_LARGE = of(DROPPOS, epochs=50)

LUT = of(MAE, base_lr=2.5e-4, sqrt_rule_at=1024)

LUT_LARGE = of(LUT, epochs=50, base_lr=1e-3)

BEYOND_MASKING = replace(
    of(MAE, base_lr=1e-3, layer_decay=0.75, schedule="step"),
    pool="class",
    train_positions=False,
)

# the published learning rates are for 512 images: peak 1.25e-3, initial and final 2.5e-7
SIMMIM = of(
    MAE,
    batch_size=2048,
    base_lr=6.25e-4,
    schedule="last_step",
    warmup_epochs=20,
    warmup_lr=1e-6,
    min_lr=1e-6,
    clip=5.0,
)

# for the embedded digits, a few small images
DIGITS = Finetuning(
    train_positions=False,
    mixup=0.0,
    cutmix=0.0,
    randaugment="",
    erasing=0.0,
    crop_scale=(0.9, 1.0),
    crop_fraction=1.0,
    optimization=Optimization(
        epochs=40,
        batch_size=50,
        base_lr=1e-2,
        warmup_epochs=5,
        min_lr=1e-6,
        betas=(0.9, 0.999),
        undecayed=("cls_token", "pos_embed"),
        layer_decay=0.75,
    ),
)

# for a folder of images on a small machine
SMALL = replace(
    of(DIGITS, batch_size=None, sqrt_rule_at=50, warmup_epochs=None), crop_scale=(0.35, 1.0), crop_fraction=0.875
)


def resolved(settings: Finetuning, data: Data, world_size: int) -> Finetuning:
    """Return the settings with a batch size that fits the labeled images, and a warm-up, unless they have one."""
    return of(settings, **following(settings.optimization, len(data.labeled or ()), world_size))


# Chosen for MAE on validation images; the learning rate from scratch likewise, for the same compute
MNIST = replace(of(DIGITS, epochs=100), crop_scale=(0.6, 1.0), scratch_lr=5e-3)


class Classifier(nn.Module):
    """An encoder with a linear head on its class token or on the mean of its patch tokens.

    Args:
        encoder: the encoder, which is trained as well.
        normalize: normalization of the images.
        classes: number of classes.
        pool: input of the head.
        head_scale: standard deviation of the initial weights of the head.
        select: maps patches and uniform noise (b, n) to indices (b, k), to encode only these patches. Default: all.
        mixing: erasing, mixup, cutmix and label smoothing in training. Default: none.

    Raises:
        SettingsError: if the class token is requested of an encoder that has none.
    """

    def __init__(
        self,
        encoder: TrainableEncoder,
        normalize: Normalize,
        classes: int,
        *,
        pool: Literal["mean", "class"],
        head_scale: float,
        select: nn.Module | None = None,
        mixing: Mixing | None = None,
    ) -> None:
        super().__init__()
        if pool == "class" and encoder.cls_token is None:
            raise SettingsError("--pool class needs an encoder with a class token")
        self.encoder, self.normalize = encoder, normalize
        self.pool: Literal["mean", "class"] = pool
        self.select, self.mixing = select, mixing
        if pool == "mean":  # the pre-trained norm is for single tokens, so their mean gets a new one
            self.fc_norm = nn.LayerNorm(encoder.dim, eps=1e-6)
            encoder.norm.requires_grad_(False)
        self.head = nn.Linear(encoder.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=head_scale)
        nn.init.zeros_(self.head.bias)

    def noise(self, rand: Any, batch: int) -> dict[str, Tensor]:
        """Draw the noise of drop path, of the selection of patches and of mixing, for which `rand` is a `Noise`."""
        encoder, noise = self.encoder, {"drop_path": rand(batch, self.encoder.depth, 2)}
        if self.select is not None:
            noise["select"] = rand(batch, len(encoder.positions))
        if self.mixing is not None:
            H, W = encoder.height * encoder.patch, encoder.width * encoder.patch
            noise |= self.mixing.noise(rand, batch, encoder.channels, H, W)
        return noise

    def features(self, images: Tensor, noise: Mapping[str, Tensor | None] = MappingProxyType({})) -> Tensor:
        """Return one feature vector per image; without noise, no path is dropped."""
        return self.encode(self.normalize(images), noise)

    def encode(self, normalized: Tensor, noise: Mapping[str, Tensor | None]) -> Tensor:
        """Return one feature vector per normalized image."""
        encoder, patches = self.encoder, patchify(normalized, patch=self.encoder.patch)
        positions, drop_path = encoder.positions, noise.get("drop_path")
        relative: dict[str, Any] = {}
        if self.select is not None:
            seen = self.select(patches, noise["select"])
            patches, positions, relative["buckets"] = (
                take(patches, seen),
                positions[seen],
                cast(ViT, encoder).buckets_of(seen),
            )
        if self.pool == "class":
            return encoder(patches, positions, drop_path, **relative)[:, 0]
        tokens = encoder.unnormalized(patches, positions, drop_path, **relative)
        return self.fc_norm(tokens[:, encoder.num_prefix :].mean(dim=1))

    def forward(self, batch: tuple[Tensor, Tensor], noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        """Return the loss of a batch of images and labels, which are mixed first."""
        images, targets = self.normalize(batch[0]), batch[1]
        if self.mixing is not None:
            images, targets = self.mixing(images, targets, noise)
        return {"loss": self.loss(self.head(self.encode(images, noise)), targets)}

    @staticmethod
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy with labels or soft targets."""
        return F.cross_entropy(logits.float(), targets)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return the logits of each image; a random selection of patches uses fixed noise."""
        noise: dict[str, Tensor] = {}
        if self.select is not None:
            shape = len(images), len(self.encoder.positions)
            noise["select"] = uniform(*shape, key=seed_of("select"), device=images.device)
        return self.head(self.features(images, noise))

    def predict(self, images: Tensor) -> Tensor:
        """Return the most likely class of each image."""
        return self.logits(images).argmax(dim=-1)


def finetune(
    encoder: TrainableEncoder,
    normalize: Normalize,
    *,
    settings: Finetuning,
    stage: Stage,
    select: nn.Module | None = None,
    into: Path | None = None,
) -> dict[str, Any]:
    """Train a classifier on the labeled images and measure its accuracy on the test images.

    Args:
        encoder: the encoder; with `into`, a `ViT`.
        normalize: normalization of the images.
        settings: settings of fine-tuning.
        stage: processes, images and folder.
        select: selects a subset of the patches to encode, see `Classifier`.
        into: folder for `classifier.safetensors` and `confusion.png`; None: they are not written.

    Returns:
        The result of `train`, the accuracies of `metrics.scores`, and the numbers of labeled and test images.

    Raises:
        SettingsError: if there are no labeled images or no test images.
    """
    labeled, test = stage.data.splits()
    torch.manual_seed(stage.run.seed)
    classes, names = len(labeled.classes), ("mixup", "cutmix", "smoothing", "erasing")
    mixing = Mixing(classes, **{name: getattr(settings, name) for name in names})
    form: Any = {"pool": settings.pool, "head_scale": settings.head_scale, "select": select, "mixing": mixing}
    classifier = Classifier(encoder, normalize, classes, **form)
    if encoder.pos_embed is not None:
        encoder.pos_embed.requires_grad_(settings.train_positions)
    views = ViewDataset(labeled, training_view(settings, stage, normalize), seed=stage.run.seed, labels=True)
    workers, pin = num_workers(stage.run, stage.processes), stage.processes.device.type == "cuda"

    def load(batches: Iterable[list[tuple[int, int]]]) -> Loader:
        """Load batches of augmented images and labels, given the (epoch, index) of the images."""
        return Loader(views, batches, workers=workers, pin=pin)

    optimization = settings.optimization
    operations = operations_per_image(classifier, views)
    batch, _ = micro_batches(optimization, stage.processes.world_size)
    confusion, matrices = Confusion(test, stage, settings.crop_fraction, batch=batch), []

    def measure() -> dict[str, float]:
        """Measure the accuracy on the test images."""
        matrices[:] = [confusion.count(classifier.eval().predict)]
        return {"accuracy": top1(matrices[0])}

    size = known(optimization.batch_size)
    images = len(labeled) // size * size * optimization.epochs
    times = measurements(settings.measurements, trained=images, tested=len(test))
    options: Any = {"settings": optimization, "depth": encoder.depth, "measure": measure, "measurements": times}
    trained = train(classifier, load, num_images=len(labeled), stage=stage, **options)
    if not matrices:  # nothing was measured, or the run was resumed after its last step
        measure()
    confusion.report_unreadable()
    if into is not None and stage.processes.is_main:
        write_classifier(into, classifier, settings, labeled.classes)
        draw_confusion(into / "confusion.png", matrices[0], labeled.classes)
    sizes = {"labeled": len(labeled), "test": len(test), "operations": operations * images}
    return trained | scores(matrices[0], labeled.classes) | sizes


def training_view(settings: Finetuning, stage: Stage, normalize: Normalize) -> Transform:
    """Return the augmentation of the training images."""
    data = stage.data.settings
    if not settings.randaugment:
        return CropFlip(data.image_size, scale=settings.crop_scale, flip=data.flip)
    return Augment(
        data.image_size,
        mean=normalize.mean.flatten().tolist(),
        scale=settings.crop_scale,
        flip=data.flip,
        auto_augment=settings.randaugment,
    )


def write_classifier(folder: Path, classifier: Classifier, settings: Finetuning, classes: list[str]) -> None:
    """Export a classifier whose encoder is a `ViT` to `classifier.safetensors` in a folder."""
    parts = {name: tensor for name, tensor in classifier.state_dict().items() if name.startswith(("head.", "fc_norm."))}
    head = Head(tuple(classes), classifier.pool, settings.crop_fraction, parts)
    export_classifier(folder / "classifier.safetensors", cast(ViT, classifier.encoder), classifier.normalize, head)


def check_finetuning(settings: Finetuning, data: Data, *, world_size: int, prefix: str = "") -> None:
    """Validate the settings of fine-tuning before training starts.

    Args:
        settings: settings to check.
        data: the images of the run.
        world_size: number of processes.
        prefix: prefix of the options on the command line, for messages.

    Raises:
        SettingsError: if there are fewer labeled images than a batch has, the batch cannot be divided among the
            devices, mixup or cutmix gets an odd micro-batch, or timm has no such augmentation policy.
    """
    labeled, _ = data.splits()
    if len(set(labeled.classes)) < len(labeled.classes):
        raise SettingsError("two classes of the images have the same name: rename one")
    batch, option = known(settings.optimization.batch_size), f"--{prefix}batch-size"
    if len(labeled) < batch:
        raise SettingsError(f"{len(labeled)} labeled images do not fill a batch of {batch}: use a smaller {option}")
    micro_batch, _ = micro_batches(settings.optimization, world_size)
    if (settings.mixup or settings.cutmix) and micro_batch % 2:
        share, most = batch // world_size, settings.optimization.device_batch
        even = [size for size in range(2, max(2, most) + 1, 2) if share % size == 0]
        advice = f"--{prefix}device-batch {even[-1]}" if even else f"a multiple of {2 * world_size}"
        raise SettingsError(
            f"{option} {batch}: mixup and cutmix mix pairs, and micro-batches of {micro_batch} images are odd; "
            f"use {advice}, or --{prefix}mixup 0 --{prefix}cutmix 0"
        )
    if settings.randaugment:
        if labeled.channels not in (1, 3):
            raise SettingsError(
                f'RandAugment works on 1 or 3 channels, not {labeled.channels}: use --{prefix}randaugment ""'
            )
        try:
            auto_augment_policy(settings.randaugment)
        except (AssertionError, ValueError, KeyError) as error:
            raise SettingsError(f"--{prefix}randaugment {settings.randaugment}: timm knows no such policy") from error
