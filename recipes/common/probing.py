"""Judge a frozen encoder: by a linear probe, by nearest neighbors, by a few new blocks behind it.

`linear`, `knn` and `nonlinear` are called as `finetuning.finetune` is and return the same kind of result.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from common import report
from common.checkpoint import load_weights, read_foreign, read_tensors, write, write_json
from common.config import Flat, Images, Run, parse, to_json
from common.engine import World, by_epoch, in_bf16, loading_processes, read_metrics, world
from common.finetuning import Finetuning, finetune
from common.images import CenterCrop, Loader, Normalize, Source, Views, one_shot_crop_size, open_images, resize, seed_of
from common.lars import LARS
from common.vit import Block, ViT, initialize_mae
from mimkit.positions import resize_table
from mimkit.tokens import patchify, unpatchify

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

AT_A_TIME = 256  # images that one device encodes together
CELLS = 2**27  # of a matrix of similarities that is held at a time

Pool = Literal["auto", "class", "mean"]


@dataclass(frozen=True)
class Probed:
    """What is judged, and on which images."""

    encoder: Path = Path("encoder.safetensors")
    """encoder.safetensors of a run, a published checkpoint of the MAE family, or the weights of a timm model"""
    timm: str = ""
    """timm's name of the vision transformer whose weights --encoder holds, tag included if its mean and std matter"""
    data: Path | None = None
    """folder with train/CLASS/*.jpg and val/CLASS/*.jpg; none: the handwritten digits that come with scikit-learn"""
    image_size: tuple[int, int] | None = None
    """height and width in pixels; none: those of the encoder. Positions are resampled"""
    labels_per_class: int = 10
    """of the embedded digits: labeled images per class"""


@dataclass(frozen=True)
class Linear:
    """How linear classifiers are trained on frozen features: MAE's protocol, but for the augmentation."""

    base_lrs: tuple[float, ...] = (0.1,)
    """learning rates for 256 images per step. With several, a held-out tenth of the labeled images chooses one"""
    optimizer: Literal["lars", "sgd"] = "lars"
    """both with momentum 0.9 and without weight decay"""
    epochs: int = 90
    """times that every labeled image is seen"""
    batch_size: int = 16384
    """images per step, or all of them if there are fewer"""
    warmup_epochs: float = 10.0
    """epochs in which the learning rate rises from 0; it then falls to 0 as a cosine"""
    pool: Pool = "auto"
    """class: the class token; mean: the mean of the patch tokens; after the last norm. auto: class if there is one"""
    augment: bool = False
    """encode new random crops every epoch, as the papers do. Without, each image is encoded once, as its central crop:
    much faster, and some tenths to a few points apart from the papers' numbers"""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """with --augment: share of the image's area that a random crop keeps, least and most"""
    crop_fraction: float = 0.875
    """share of the short side that the central crop of an image keeps"""


@dataclass(frozen=True)
class Neighbors:
    """How nearest neighbors vote."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    """numbers of neighbors; those above the number of labeled images are left out"""
    temperature: float = 0.07
    """a neighbor's vote weighs exp(cosine similarity / temperature)"""
    pool: Pool = "auto"
    """class: the class token; mean: the mean of the patch tokens; after the last norm. auto: class if there is one"""
    crop_fraction: float = 0.875
    """share of the short side that the central crop of an image keeps"""


@dataclass(frozen=True)
class Nonlinear:
    """How new blocks behind a frozen encoder are trained: as in fine-tuning, all layers at the same learning rate."""

    blocks: int = 2
    """new transformer blocks between the encoder and the head, 2 or 4 in the paper"""
    finetune: Flat[Finetuning] = field(default_factory=Finetuning)


DIGITS = Linear(
    base_lrs=(1.0, 3.0, 10.0, 30.0, 100.0), epochs=200, batch_size=30, crop_scale=(0.6, 1.0), crop_fraction=1.0
)
FOLDER = Linear(base_lrs=(0.03, 0.1, 0.3, 1.0, 3.0), batch_size=1024)


# Encoders


class TimmViT(nn.Module):
    """A vision transformer of timm, unmodified, behind the interface of `common.vit.ViT`; it adds its own positions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.height, self.width = model.patch_embed.grid_size
        self.patch, self.channels = model.patch_embed.patch_size[0], model.patch_embed.proj.in_channels
        self.dim, self.depth, self.heads = model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads
        self.num_prefix, self.cls_token = model.num_prefix_tokens, model.cls_token

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.blocks

    @property
    def pos_embed(self) -> Tensor:
        return self.model.pos_embed

    @property
    def positions(self) -> Tensor:
        return self.model.pos_embed[0, -self.height * self.width :]

    def forward(self, patches: Tensor, positions: Tensor, noise: None = None) -> Tensor:
        """Encode all patches of an image, in raster order. `positions` is not looked at."""
        return self.model.forward_features(unpatchify(patches, height=self.height, width=self.width, patch=self.patch))


def load_timm(path: Path, name: str, *, image_size: tuple[int, int] | None = None) -> tuple[ViT, Normalize]:
    """Build a timm model from a weights file, and the normalization of its images.

    Args:
        path: weights under timm's names, of square images or an export of ours; its head is left out.
        name: timm's. Unless the file tells mean and std, as our exports do, they are those that timm has for this name.
        image_size: height and width in pixels; positions are resampled where they differ.

    Raises:
        ValueError: if timm has no such vision transformer, or the weights are not its own.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(name):
        raise ValueError(f"timm knows no model called {name}")
    weights = read_foreign(path)
    about = read_tensors(path)[1] if path.suffix == ".safetensors" else {}
    kernel, table = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
    if kernel is None or kernel.ndim != 4 or table is None or table.ndim != 3:
        raise ValueError(f"{path} is not a plain ViT, which has patch_embed.proj.weight and pos_embed")
    channels, patch = kernel.shape[1], kernel.shape[-1]
    side = math.isqrt(table.shape[1])
    old = [size // patch for size in about["timm"]["img_size"]] if "timm" in about else [side, side]
    H, W = image_size or (old[0] * patch, old[1] * patch)
    if H % patch or W % patch:
        raise ValueError(f"images of {H} × {W} pixels are not made of patches of {patch} × {patch}")
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels, img_size=(H, W))
    except TypeError:  # a network that takes images of any size
        model = None
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"timm's {name} is not a vision transformer")
    if [H // patch, W // patch] != old:
        sizes = {"height": old[0], "width": old[1], "new_height": H // patch, "new_width": W // patch}
        prefix = table.shape[1] - old[0] * old[1]
        weights["pos_embed"] = torch.cat([table[:, :prefix], resize_table(table[:, prefix:], **sizes)], dim=1)
    loaded = load_weights(model, weights, renames={})
    numbers = cast(dict[str, list[float]], about if "timm" in about else model.pretrained_cfg)
    mean, std = numbers["mean"], numbers["std"]
    if len(mean) != channels:
        mean, std = ([sum(values) / len(values)] * channels for values in (mean, std))
    if "timm" not in about:
        print(f"{path}:\n{loaded}\nimages are normalized by mean {list(mean)} and std {list(std)}, timm's for {name}")
    return cast(ViT, TimmViT(model)), Normalize(mean, std)


class Frozen(nn.Module):
    """An encoder of which nothing ever changes: images in, one vector per image out."""

    def __init__(self, encoder: ViT, normalize: Normalize, pool: Pool = "auto") -> None:
        super().__init__()
        if pool == "class" and encoder.cls_token is None:
            raise ValueError("pool=class needs an encoder with a class token")
        self.encoder, self.normalize = encoder.requires_grad_(False), normalize
        self.pool = ("mean" if encoder.cls_token is None else "class") if pool == "auto" else pool
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        encoder = self.encoder
        tokens = encoder(patchify(self.normalize(images), patch=encoder.patch), encoder.positions)
        return tokens[:, 0] if self.pool == "class" else tokens[:, encoder.num_prefix :].mean(dim=1)


class Deepened(nn.Module):
    """A frozen encoder and new blocks that read its tokens, behind the interface of `common.vit.ViT`."""

    def __init__(self, encoder: ViT, *, blocks: int, drop: float = 0.0) -> None:
        super().__init__()
        if blocks < 1:
            raise ValueError(f"--blocks {blocks}: without a new block it is a linear probe")
        self.encoder = encoder.requires_grad_(False)
        self.patch, self.dim, self.depth, self.num_prefix = encoder.patch, encoder.dim, blocks, encoder.num_prefix
        ratio = cast(Any, encoder.blocks[0]).mlp.fc1.out_features / encoder.dim
        drops = torch.linspace(0, drop, blocks).tolist()
        self.blocks = nn.ModuleList(Block(encoder.dim, encoder.heads, mlp_ratio=ratio, drop=rate) for rate in drops)
        initialize_mae(self.blocks)
        self.norm = nn.LayerNorm(encoder.dim, eps=1e-6)

    @property
    def cls_token(self) -> Tensor | None:
        return self.encoder.cls_token

    @property
    def pos_embed(self) -> Tensor:
        return self.encoder.pos_embed

    @property
    def positions(self) -> Tensor:
        return self.encoder.positions

    def train(self, mode: bool = True) -> "Deepened":
        """Train the new blocks; the encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def unnormalized(self, patches: Tensor, positions: Tensor, noise: Tensor | None = None) -> Tensor:
        x = self.encoder(patches, positions)
        for i, block in enumerate(self.blocks):
            x = block(x, None if noise is None else noise[:, i])
        return x

    def forward(self, patches: Tensor, positions: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.norm(self.unnormalized(patches, positions, noise))


# Features


def encode(
    frozen: Frozen, source: Source, images: Images, fraction: float, *, only: Sequence[int], run: Run, place: World
) -> tuple[Tensor, Tensor]:
    """Return the features and labels of images of a source; every process encodes its share and gets them all.

    Args:
        fraction: of `CenterCrop`.
        only: indices of the images.

    Raises:
        ValueError: if a feature is not finite.
    """
    views = Views(source, CenterCrop(images.image_size, crop_fraction=fraction), labels=True)
    mine = only[place.rank :: place.size]
    batches = [[(0, index) for index in mine[i : i + AT_A_TIME]] for i in range(0, len(mine), AT_A_TIME)]
    bar = tqdm(total=len(mine), desc="encoding", unit="image", disable=None if place.first else True, leave=False)
    parts = []
    with bar:
        for features, labels in _encoded(frozen, views, batches, run, place):
            parts.append((features, labels))
            bar.update(len(labels))
    features, labels = _together(parts, len(only), frozen.encoder.dim, place)
    if not bool(features.isfinite().all()):
        raise ValueError("the encoder's features are not finite")
    return features, labels


def _encoded(
    frozen: Frozen, views: Views, batches: Iterable[list[tuple[int, int]]], run: Run, place: World
) -> Iterator[tuple[Tensor, Tensor]]:
    bf16 = in_bf16(run, place)
    loader = Loader(views, batches, workers=loading_processes(run, place), pin=place.device.type == "cuda")
    for pictures, labels in loader:
        with torch.autocast(place.device.type, torch.bfloat16, enabled=bf16):
            features = frozen(pictures.to(place.device, non_blocking=True))
        yield features.float(), labels.to(place.device)
    if loader.unreadable:
        place.say(f"{len(loader.unreadable)} unreadable images were replaced: {', '.join(loader.unreadable)}")


def _together(parts: list[tuple[Tensor, Tensor]], total: int, dim: int, place: World) -> tuple[Tensor, Tensor]:
    """Put together what the processes have: of n of them, each has every n-th row."""
    features = torch.zeros(total, dim, device=place.device)
    labels = torch.zeros(total, dtype=torch.long, device=place.device)
    if parts:
        features[place.rank :: place.size] = torch.cat([part[0] for part in parts])
        labels[place.rank :: place.size] = torch.cat([part[1] for part in parts])
    if place.size > 1:
        dist.all_reduce(features)
        dist.all_reduce(labels)
    return features, labels


@dataclass(frozen=True)
class OneShotCrop:
    """The view to train a linear probe on: a random crop that is never rejected but cut to the image, then a flip."""

    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5

    def __call__(self, image: Tensor, generator: Generator) -> Tensor:
        (H, W), (height, width) = image.shape[-2:], self.size
        u_area, u_ratio, u_top, u_left, u_flip = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        area = self.scale[0] + (self.scale[1] - self.scale[0]) * u_area
        log_ratio = math.log(3 / 4) + math.log(16 / 9) * u_ratio + math.log(width / height)
        h, w = one_shot_crop_size(H, W, area, log_ratio)
        top, left = int(u_top * (H - h + 1)), int(u_left * (W - w + 1))
        view = resize(image[:, top : top + h, left : left + w], height, width)
        return view.flip(-1) if u_flip < self.flip else view


def orders(images: int, batch: int, epochs: int, *, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Return the epoch and the images of every step; what does not fill a batch is left out of its epoch."""
    for epoch in range(epochs):
        order = torch.randperm(images, generator=Generator().manual_seed(seed_of(seed, "order", epoch)))
        yield from ((epoch, order[i : i + batch]) for i in range(0, images - batch + 1, batch))


def augmented(
    frozen: Frozen,
    views: Views,
    only: Sequence[int],
    *,
    batch: int,
    epochs: int,
    run: Run,
    place: World,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Encode new views every epoch: the features and labels of each step. The processes share every batch."""

    def pieces() -> Iterator[list[tuple[int, int]]]:
        for epoch, chosen in orders(len(only), batch, epochs, seed=run.seed):
            mine = [(epoch, only[i]) for i in chosen[place.rank :: place.size].tolist()]
            yield from (mine[i : i + AT_A_TIME] for i in range(0, len(mine), AT_A_TIME))

    stream = _encoded(frozen, views, pieces(), run, place)
    count = math.ceil(len(range(place.rank, batch, place.size)) / AT_A_TIME)
    for _ in range(epochs * (len(only) // batch)):
        yield _together([next(stream) for _ in range(count)], batch, frozen.encoder.dim, place)


# The linear probe


class Heads(nn.Module):
    """Linear classifiers on the same features, normalized by their batch, one per learning rate.

    They start alike. `weight` and `bias` hold all of them, so that they train in one pass.
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
    def judge(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the accuracy of each head in per cent, and its cross entropy."""
        self.eval()
        right, losses = torch.zeros(2, len(self.bias), device=features.device)
        for part, truth in zip(features.split(4096), labels.split(4096), strict=True):
            right += (self(part).argmax(dim=-1) == truth).sum(dim=1)
            losses += self.losses(part, truth) * len(truth)
        return 100 * right / len(labels), losses / len(labels)


def fit(
    heads: Heads, batches: Iterable[tuple[Tensor, Tensor]], *, rates: Sequence[float], steps: int, settings: Linear
) -> list[dict[str, Any]]:
    """Train each head at its learning rate, and return the loss and learning rate of every epoch, of the last head.

    Args:
        batches: features and labels of every step.
        rates: learning rate of each head after the warm-up.
        steps: per epoch.
    """
    make = LARS if settings.optimizer == "lars" else torch.optim.SGD
    # each head is a parameter of its own to the optimizer, a view of the one that holds them all
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
    """Set a tenth of the images of every class apart, one at least, but none of a class of one image.

    Returns:
        the indices of the others, and of those set apart.

    Raises:
        ValueError: if no class has two images.
    """
    order = torch.randperm(len(labels), generator=Generator().manual_seed(seed_of(seed, "hold out")))
    of_class: dict[int, list[int]] = {}
    for index in order.tolist():
        of_class.setdefault(labels[index], []).append(index)
    apart = [i for members in of_class.values() for i in members[: min(len(members) - 1, max(1, len(members) // 10))]]
    if not apart:
        raise ValueError("several learning rates need labeled images to choose by, but no class has two: give one")
    return sorted(set(range(len(labels))) - set(apart)), sorted(apart)


def linear(
    encoder: ViT,
    normalize: Normalize,
    *,
    settings: Linear,
    images: Images,
    run: Run,
    folder: Path,
    place: World,
    title: str = "linear probe",
) -> dict[str, Any]:
    """Train linear classifiers on frozen features, and measure the accuracy of one on the test images.

    Of several learning rates, the one that does best on a held-out tenth of the labeled images is taken, and trained
    again on all of them. Every process encodes its share of the images; the heads are so small that all train them.

    Returns:
        `accuracy` in per cent, the numbers of labeled and test images, the chosen `base_lr` and, if there was a
        choice, `held_out`, the accuracies by learning rate; loss, epochs and seconds.

    Raises:
        ValueError: if there are no labeled images or no test images, or no learning rate gives a finite loss.
    """
    _check_linear(settings)
    start = time.perf_counter()
    labeled, test = _sources(images, run)
    frozen = Frozen(encoder, normalize, settings.pool).to(place.device)
    shared = {"run": run, "place": place}
    crop = OneShotCrop(images.image_size, settings.crop_scale, images.flip)
    views = Views(labeled, crop, seed=run.seed, labels=True)
    every = list(range(len(labeled)))
    features = labels = torch.empty(0)
    if not settings.augment:
        features, labels = encode(frozen, labeled, images, settings.crop_fraction, only=every, **shared)

    def trained(only: list[int], base_lrs: Sequence[float], what: str) -> tuple[Heads, list[dict[str, Any]]]:
        batch, epochs = min(settings.batch_size, len(only)), settings.epochs
        steps, rates = len(only) // batch, [rate * batch / 256 for rate in base_lrs]
        place.say(
            f"{title}: {what}, {len(only)} images, {epochs} epochs of {steps} steps, batch {batch}; "
            f"learning rate {', '.join(f'{rate:g}' for rate in base_lrs)} × {batch} / 256"
        )
        torch.manual_seed(run.seed)
        heads = Heads(encoder.dim, len(labeled.classes), len(rates)).to(place.device)
        if settings.augment:
            batches = augmented(frozen, views, only, batch=batch, epochs=epochs, **shared)
        else:
            rows = torch.tensor(only)
            chosen = (rows[part].to(place.device) for _, part in orders(len(only), batch, epochs, seed=run.seed))
            batches = ((features[part], labels[part]) for part in chosen)
        hidden = None if place.first else True
        bar = tqdm(batches, desc=title, total=epochs * steps, unit="step", disable=hidden, leave=False)
        return heads, fit(heads, bar, rates=rates, steps=steps, settings=settings)

    base_lr, held_out = settings.base_lrs[0], {}
    if len(settings.base_lrs) > 1:
        most, apart = hold_out([labeled.label(index) for index in every], seed=run.seed)
        heads, _ = trained(most, settings.base_lrs, f"choosing a learning rate by {len(apart)} held-out images")
        judged = encode(frozen, labeled, images, settings.crop_fraction, only=apart, **shared)
        correct, losses = (numbers.tolist() for numbers in heads.judge(*judged))
        finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
        if not finite:
            raise ValueError(f"no learning rate of {settings.base_lrs} gives a finite loss")
        best = max(finite, key=lambda i: (correct[i], -losses[i]))
        base_lr, held_out = settings.base_lrs[best], dict(zip(map(str, settings.base_lrs), correct, strict=True))
    heads, history = trained(every, [base_lr], f"training at {base_lr:g}")
    if not math.isfinite(history[-1]["loss"]):
        raise ValueError(f"the loss at --base-lrs {base_lr:g} is not finite")
    tested = encode(frozen, test, images, settings.crop_fraction, only=range(len(test)), **shared)
    correct, _ = heads.judge(*tested)
    if place.first:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history).encode())
    return {
        "accuracy": float(correct),
        "labeled": len(labeled),
        "test": len(test),
        "feature": frozen.pool,
        "base_lr": base_lr,
        "held_out": held_out,
        "loss": history[-1]["loss"],
        "epoch": settings.epochs,
        "seconds": time.perf_counter() - start,
    }


def _check_linear(settings: Linear) -> None:
    if not settings.base_lrs or not all(0 < rate < math.inf for rate in settings.base_lrs):
        raise ValueError(f"--base-lrs {' '.join(map(str, settings.base_lrs))}: give one or more positive numbers")
    if settings.epochs < 1:
        raise ValueError(f"--epochs {settings.epochs} trains nothing")
    if settings.batch_size < 2:
        raise ValueError(f"--batch-size {settings.batch_size} has no statistics to normalize by: at least 2 images")


# Nearest neighbors


def nearest(
    features: Tensor, labels: Tensor, queries: Tensor, *, classes: int, k: Sequence[int], temperature: float
) -> Tensor:
    """Let the k nearest of labeled features vote on each query, by exp(cosine similarity / temperature).

    Args:
        features: (n, d), of any length.
        labels: (n,), from 0 to `classes` − 1.
        queries: (q, d), of any length.
        k: numbers of neighbors, each at most n.

    Returns:
        votes (len(k), q, classes); only their order along the classes means something.

    Source: HPM, arXiv 2304.05919 (published code).
    """
    features, queries = F.normalize(features, dim=-1), F.normalize(queries, dim=-1)
    votes = torch.zeros(len(k), len(queries), classes, device=features.device)
    with _exact_products():
        for start in range(0, len(queries), rows := max(1, CELLS // len(features))):
            similarity, index = (queries[start : start + rows] @ features.T).topk(max(k), dim=-1)
            # a query's votes are all divided by the largest: e^(1 / temperature) need not be a number
            weight, voted = ((similarity - similarity[:, :1]) / temperature).exp(), labels[index]
            for i, count in enumerate(k):
                votes[i, start : start + rows].scatter_add_(1, voted[:, :count], weight[:, :count])
    return votes


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Multiply in all of float32: who is nearest hangs on the last digits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def knn(
    encoder: ViT,
    normalize: Normalize,
    *,
    settings: Neighbors,
    images: Images,
    run: Run,
    folder: Path,
    place: World,
    title: str = "k-NN",
) -> dict[str, Any]:
    """Classify the test images by their nearest labeled neighbors. Every process encodes its share of the images.

    Returns:
        `accuracy` in per cent of `k` = 20, or of the first usable k if 20 is not among them, so that nothing is chosen
        on the test images; `by_k`, all accuracies; the numbers of labeled and test images, and seconds.

    Raises:
        ValueError: if there are no labeled images or no test images, or fewer of the former than neighbors.
    """
    if not settings.k or min(settings.k) < 1:
        raise ValueError(f"--k {' '.join(map(str, settings.k))}: give one or more positive numbers")
    if not 0 < settings.temperature < math.inf:
        raise ValueError(f"--temperature {settings.temperature} is not a positive number")
    start = time.perf_counter()
    labeled, test = _sources(images, run)
    usable = [k for k in settings.k if k <= len(labeled)]
    if not usable:
        raise ValueError(f"{len(labeled)} labeled images are fewer than --k {min(settings.k)} neighbors")
    frozen = Frozen(encoder, normalize, settings.pool).to(place.device)
    (features, labels), (queries, truth) = (
        encode(frozen, source, images, settings.crop_fraction, only=range(len(source)), run=run, place=place)
        for source in (labeled, test)
    )
    place.say(f"{title}: {len(test)} images among {len(labeled)} labeled ones, k = {', '.join(map(str, usable))}")
    sizes: dict[str, Any] = {"classes": len(labeled.classes), "k": usable, "temperature": settings.temperature}
    right = torch.zeros(len(usable), device=place.device)
    for part, labels_of_part in zip(queries.split(4096), truth.split(4096), strict=True):
        right += (nearest(features, labels, part, **sizes).argmax(dim=-1) == labels_of_part).sum(dim=-1)
    by_k = dict(zip(usable, (100 * right / len(test)).tolist(), strict=True))
    chosen = 20 if 20 in by_k else usable[0]
    return {
        "accuracy": by_k[chosen],
        "labeled": len(labeled),
        "test": len(test),
        "feature": frozen.pool,
        "k": chosen,
        "by_k": {str(k): accuracy for k, accuracy in by_k.items()},
        "epoch": 0,
        "seconds": time.perf_counter() - start,
    }


# New blocks


def nonlinear(
    encoder: ViT,
    normalize: Normalize,
    *,
    settings: Nonlinear,
    images: Images,
    run: Run,
    folder: Path,
    place: World,
    title: str = "non-linear probe",
) -> dict[str, Any]:
    """Train new blocks and a head behind a frozen encoder, and measure the accuracy on the test images.

    The new blocks read all tokens after the encoder's last norm, and are as wide as the encoder.

    Returns:
        what `finetune` returns.

    Raises:
        ValueError: as `finetune`; if no block is asked for.
    """
    torch.manual_seed(run.seed)
    deepened = Deepened(encoder, blocks=settings.blocks, drop=settings.finetune.drop_path)
    optimization = replace(settings.finetune.optimization, layer_decay=1.0)
    tuned = finetune(
        cast(ViT, deepened),
        normalize,
        settings=replace(settings.finetune, train_positions=False, optimization=optimization),
        images=images,
        run=run,
        folder=folder,
        place=place,
        title=title,
    )
    return tuned | {"blocks": settings.blocks}


# What a pre-training calls at its end

JUDGES = ("linear", "knn", "nonlinear")


def judge(
    kind: str, encoder: ViT, normalize: Normalize, *, finetuning: Finetuning, images: Images, **where: Any
) -> dict[str, Any]:
    """Judge an encoder in one of these ways, with settings that fit the images and their fine-tuning."""
    fraction = finetuning.crop_fraction
    if kind == "linear":
        settings = replace(FOLDER if images.data else DIGITS, crop_fraction=fraction)
        return linear(encoder, normalize, settings=settings, images=images, **where)
    if kind == "knn":
        return knn(encoder, normalize, settings=Neighbors(crop_fraction=fraction), images=images, **where)
    pooled = finetuning if encoder.cls_token is not None else replace(finetuning, pool="mean")
    return nonlinear(encoder, normalize, settings=Nonlinear(finetune=pooled), images=images, **where)


def _sources(images: Images, run: Run) -> tuple[Source, Source]:
    labeled = open_images(
        images.data, "labeled", channels=images.channels, seed=run.seed, per_class=images.labels_per_class
    )
    return labeled, open_images(images.data, "test", channels=images.channels, classes=labeled.classes)


# From the command line to the table


class Config(Protocol):
    """What the configuration of every probe has."""

    @property
    def probed(self) -> Probed: ...
    @property
    def run(self) -> Run: ...
    @property
    def settings(self) -> Any: ...


def probe(
    evaluation: Callable[..., dict[str, Any]],
    presets: dict[str, Any],
    *,
    name: str,
    title: str,
    description: str | None,
    args: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Load an encoder, judge it, and print and write the result.

    Args:
        evaluation: `linear`, `knn` or `nonlinear`.
        presets: configurations by name, as `config.parse` wants them.
        name: of the recipe, and of the run unless `--name` says otherwise.
        title: of the evaluation, for people.
        description: on top of the help.
        args: the command line; that of the process if none.
    """
    from common.pretraining import load_encoder, prepare  # which imports this module, to judge what it has trained

    config: Config = parse(presets, args, description=description)
    probed, run = config.probed, config.run
    folder = run.runs / (run.name or name)
    torch.set_float32_matmul_precision("high")
    with world(run.device) as place:
        try:
            if probed.timm:
                encoder, normalize = load_timm(probed.encoder, probed.timm, image_size=probed.image_size)
            else:
                encoder, normalize = load_encoder(probed.encoder, image_size=probed.image_size)
            images = Images(
                data=probed.data,
                image_size=(encoder.height * encoder.patch, encoder.width * encoder.patch),
                channels=encoder.channels,  # pyright: ignore
                flip=getattr(config, "flip", 0.0),  # k-NN has none
                labels_per_class=probed.labels_per_class,
            )
            _sources(images, run)  # before anything is written
            _refuse_other(folder, to_json(config), resume=run.resume)
            prepare(folder, name, config, resume=run.resume, place=place)
            shared: dict[str, Any] = {"images": images, "run": run, "folder": folder, "place": place, "title": title}
            result = evaluation(encoder, normalize, settings=config.settings, **shared)
        except ValueError as error:
            raise SystemExit(f"{name}: {error}") from error
        if place.first:
            write_json(folder / "result.json", {"recipe": name, "encoder": str(probed.encoder), **result})
            if metrics := read_metrics(folder / "metrics.jsonl"):
                report.draw_curves(folder / "curves.png", {title: metrics})
            place.say(table(title, result, folder))
    return result


def _refuse_other(folder: Path, now: dict[str, Any], *, resume: bool) -> None:
    """Refuse to go on behind another encoder; the engine compares all else that it trains."""
    if not resume or not (folder / "config.json").exists():
        return
    now, before = (
        {"blocks": config["settings"].get("blocks"), "encoder": config["probed"]["encoder"]}
        for config in (now, report.read_json(folder / "config.json"))
    )
    for key, value in now.items():
        if value != before[key]:
            raise ValueError(f"{folder} was started with {key}={before[key]} and cannot be resumed with {value}")


def table(title: str, result: dict[str, Any], folder: Path) -> str:
    """Write how well a frozen encoder does, by what it was chosen, and where the files are."""
    if "images_per_second" in result:
        return report.tuned_table(title, result, folder)
    of_class, of_mean = "the class token", "the mean of the patch tokens"
    lines = ["", f"{title} on {of_class if result['feature'] == 'class' else of_mean}"]
    if result.get("held_out"):
        lines += ["", f"{'base learning rate':<42}{'held out':>10}", "─" * 52]
        lines += [
            f"{rate:<42}{value:>8.1f} %{'  ← taken' if float(rate) == result['base_lr'] else ''}"
            for rate, value in result["held_out"].items()
        ]
    if "by_k" in result:
        lines += ["", f"{'neighbors':<42}{'accuracy':>10}", "─" * 52]
        lines += [f"{k:<42}{value:>8.1f} %" for k, value in result["by_k"].items()]
    at = f"k = {result['k']}" if "k" in result else f"{result['epoch']} epochs at {result['base_lr']:g}"
    lines += [
        "",
        f"{result['accuracy']:.1f} % of {result['test']} test images are right ({at}), "
        f"with {result['labeled']} labeled images, in {result['seconds']:.0f} s",
        "",
        "files:",
    ]
    names = "result.json", "metrics.jsonl", "curves.png"
    return "\n".join([*lines, *(f"  {folder / name}" for name in names if (folder / name).exists())])
