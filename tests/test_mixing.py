"""Erasing, mixup and cutmix follow timm's laws, whatever the partition of the batch."""

from typing import Any

from common.config import Optimization
from common.data.mixing import (
    Mixing,
    cutmix_weights,
    erase,
    mix_pairs,
    mixing_weights,
    normal,
    smoothed,
    symmetric_beta,
)
from common.randomness import globally_seeded
from common.training.distributed import Processes
from common.training.step import Batches

import numpy as np
import pytest
import timm.data.mixup
import torch
import torch.nn.functional as F
from pictures import chance, quoting
from scipy import stats
from timm.data.random_erasing import RandomErasing
from torch import Tensor


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=chance(seed))


def distance(one: Any, other: Any) -> float:
    """The largest difference of two distributions; with 5,000 draws each, 0.1 % of the cases exceed 0.039."""
    left, right = (np.asarray(values, dtype=np.float64).round(5) for values in (one, other))  # equal areas are ties
    found: Any = stats.ks_2samp(left, right)
    return float(found.statistic)


# Mixing


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 0.8, 1.0, 3.0, 50.0])
def test_the_mixing_ratio_has_the_beta_distribution(alpha: float) -> None:
    middles = (torch.arange(800) + 0.5) / 800
    ratios = symmetric_beta(torch.cartesian_prod(middles, middles), alpha).double().sort().values
    places = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    below = torch.searchsorted(ratios, places) / len(ratios)
    assert (below - torch.from_numpy(stats.beta.cdf(places.numpy(), alpha, alpha))).abs().max() < 1e-3


def test_the_mixing_ratio_lies_between_0_and_1_for_all_noise_and_takes_a_tensor_as_parameter() -> None:
    ends = torch.cartesian_prod(*[torch.tensor([0.0, 2**-24, 0.25, 0.5, 1 - 2**-24])] * 2)
    for alpha in (0.01, 0.8, 100.0):
        ratios = symmetric_beta(ends, torch.tensor(alpha))
        assert ratios.min() >= 0
        assert ratios.max() <= 1
        assert ratios.equal(symmetric_beta(ends, alpha))


@pytest.mark.parametrize(("height", "width"), [(5, 8), (12, 12), (7, 3)])
def test_a_box_is_the_one_of_timm_and_so_is_the_corrected_ratio(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ratio in torch.tensor([0.0, 0.19, 0.5, 0.64, 0.75, 0.99, 1.0]):
        for row, column in np.ndindex(height, width):
            center = iter((row, column))
            monkeypatch.setattr(np.random, "randint", lambda *_, center=center, **__: next(center))
            (y1, y2, x1, x2), corrected = timm.data.mixup.cutmix_bbox_and_lam((3, height, width), float(ratio))
            expected = torch.ones(height, width)
            expected[y1:y2, x1:x2] = 0
            noise = torch.tensor([(row + 0.5) / height, (column + 0.5) / width])
            weights = cutmix_weights(ratio, noise, H=height, W=width)
            assert weights.equal(expected)
            assert float(weights.mean()) == pytest.approx(corrected)


def test_every_center_of_a_box_is_equally_likely_and_inside() -> None:
    most = torch.tensor([1 - 2**-24, 1 - 2**-24])
    assert cutmix_weights(torch.tensor(0.75), most, H=4, W=6)[-1, -1] == 0
    rows = [cutmix_weights(torch.tensor(0.75), torch.tensor([u, 0.5]), H=4, W=4)[:, 2] for u in (0.0, 0.24, 0.25, 0.99)]
    assert [row.tolist() for row in rows] == [[0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.4, 0.0), (0.0, 0.6)])
def test_the_share_of_an_image_is_distributed_as_in_timm(mixup: float, cutmix: float) -> None:
    draw = torch.func.vmap(lambda noise: mixing_weights(noise, mixup=mixup, cutmix=cutmix, H=10, W=14))
    weights = draw(uniform(5000, 5)).flatten(1)
    even = weights.min(dim=1).values == weights.max(dim=1).values
    binary = ((weights == 0) | (weights == 1)).all(dim=1)
    assert (even | binary).all()
    assert float((~binary).float().mean()) == pytest.approx((mixup > 0) / (1 + (cutmix > 0)), abs=0.03)
    theirs, peer = [], timm.data.mixup.Mixup(mixup, cutmix, num_classes=2)
    with globally_seeded(0):
        for _ in range(5000):
            ratio, cut = peer._params_per_batch()
            theirs.append(timm.data.mixup.cutmix_bbox_and_lam((10, 14), ratio)[1] if cut else ratio)
    assert distance(weights.mean(dim=1), theirs) < 0.039


@pytest.mark.parametrize("cut", [False, True])
def test_mixed_images_and_targets_are_those_of_timm_with_neighbors_as_partners(
    cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm mixes an image with its mirror image in the batch."""
    images, labels = uniform(6, 3, 8, 10), torch.tensor([3, 0, 1, 1, 4, 2])
    outward = torch.tensor([0, 2, 4, 5, 3, 1])
    monkeypatch.setattr(timm.data.mixup.Mixup, "_params_per_batch", lambda self: (0.64, cut))
    center = iter((6, 3))
    monkeypatch.setattr(np.random, "randint", lambda *_, **__: next(center))
    peer = timm.data.mixup.Mixup(0.8, 1.0, label_smoothing=0.2, num_classes=5)
    expected, expected_targets = peer(images[outward], labels[outward])
    ratio = torch.tensor(0.64)
    weights = cutmix_weights(ratio, torch.tensor([6.5 / 8, 0.35]), H=8, W=10) if cut else ratio.expand(8, 10)
    mixed, targets = mix_pairs(images, smoothed(labels, num_classes=5, smoothing=0.2), weights)
    torch.testing.assert_close(mixed[outward], expected)
    torch.testing.assert_close(targets[outward], expected_targets)


def test_the_targets_of_cutmix_are_the_shares_of_the_pixels() -> None:
    images = torch.eye(2).view(2, 2, 1, 1).expand(2, 2, 16, 16)  # channel k is 1 in image k
    for seed in range(20):
        noise = {"mixing": uniform(5, seed=seed)}
        mixed, targets = Mixing(2, mixup=0, smoothing=0, erasing=0)(images, torch.tensor([0, 1]), noise)
        assert set(mixed.unique().tolist()) <= {0.0, 1.0}
        torch.testing.assert_close(mixed.mean(dim=(2, 3)), targets)


def test_smoothed_targets_give_the_smoothed_cross_entropy() -> None:
    logits, labels = uniform(4, 7), torch.tensor([6, 0, 2, 2])
    targets = smoothed(labels, num_classes=7, smoothing=0.3)
    torch.testing.assert_close(F.cross_entropy(logits, targets), F.cross_entropy(logits, labels, label_smoothing=0.3))
    images = uniform(4, 1, 2, 2)
    same, alone = Mixing(7, mixup=0, cutmix=0, smoothing=0.3, erasing=0)(images, labels, {})
    assert same is images
    assert alone.equal(targets)


def test_an_odd_number_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match=quoting("mixup and cutmix mix pairs: a batch of 3 images is odd")):
        mix_pairs(uniform(3, 1, 2, 2), uniform(3, 2), torch.ones(2, 2))


# Erasing


@pytest.mark.parametrize(("height", "width"), [(24, 24), (10, 40)])
def test_erased_boxes_are_distributed_as_in_timm(height: int, width: int) -> None:
    """In a wide image many draws do not fit, so the box is rarely the first one."""
    count = 5000
    ours = erase(
        torch.zeros(count, 1, height, width), torch.ones(1, height, width), uniform(count, 23), probability=1.0
    )
    peer = RandomErasing(1.0, mode="pixel", device="cpu")
    with globally_seeded(0):
        theirs = torch.cat([peer(torch.zeros(1, 1, height, width)) for _ in range(count)])
    for measure in (
        lambda erased: erased.sum(dim=(1, 2)),
        lambda erased: erased.any(dim=2).sum(dim=1),
        lambda erased: erased.any(dim=2).int().argmax(dim=1),  # first row
        lambda erased: erased.any(dim=1).int().argmax(dim=1),  # first column
    ):
        assert distance(*(measure(images[:, 0] != 0) for images in (ours, theirs))) < 0.039


def test_a_box_is_erased_with_its_probability_and_the_rest_stays() -> None:
    images, fill = uniform(4000, 2, 6, 9), 2 + uniform(4000, 2, 6, 9, seed=1)
    erased = erase(images, fill, uniform(4000, 23, seed=2), probability=0.25)
    changed = erased != images
    assert erased[changed].equal(fill[changed])
    assert changed[:, 0].equal(changed[:, 1])
    assert float(changed.flatten(1).any(dim=1).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert erase(images, fill, uniform(4000, 23), probability=0.0).equal(images)
    one = erase(images[7], fill[7], uniform(4000, 23, seed=2)[7], probability=1.0)  # without a batch axis, too
    assert one.equal(erase(images, fill, uniform(4000, 23, seed=2), probability=1.0)[7])


def test_an_image_in_which_no_box_fits_stays_the_same() -> None:
    flat = uniform(50, 1, 1, 40)
    assert erase(flat, torch.zeros_like(flat), uniform(50, 23), probability=1.0).equal(flat)


def test_a_box_reaches_every_side_of_the_image_and_never_leaves_it() -> None:
    noise = torch.full((2, 23), 0.5)
    noise[:, :3] = torch.tensor([[0.0] * 3, [0.0, 1 - 2**-24, 1 - 2**-24]])
    first, last = erase(torch.zeros(2, 1, 9, 9), torch.ones(2, 1, 9, 9), noise, probability=0.5)[:, 0]
    assert first.sum() == last.sum() == 16  # 17.7 % of 81 pixels, 4 × 4
    assert first[:4, :4].sum() == last[5:, 5:].sum() == 16


def test_noise_that_fills_a_box_is_normal() -> None:
    values = normal(uniform(200_000))
    assert float(stats.kstest(values.numpy(), "norm").statistic) < 0.005
    assert normal(torch.tensor([0.0, 0.5, 1 - 2**-24])).isfinite().all()


# Both together


def images_of(batch: int) -> tuple[Tensor, Tensor]:
    return uniform(batch, 3, 8, 12), torch.arange(batch) % 5


def noise_of(mixing: Mixing, devices: int, rank: int, micro_step: int, micro_batch: int) -> dict[str, Tensor]:
    settings = Optimization(batch_size=12, device_batch=micro_batch)
    noise = Batches(12, settings, Processes(rank, devices, torch.device("cpu")), seed=1).noise()
    return mixing.noise(noise.at(3, micro_step), micro_batch, 3, 8, 12)


@pytest.mark.parametrize(("devices", "micro_batch"), [(1, 12), (1, 4), (2, 6), (3, 2)])
def test_a_batch_is_mixed_alike_in_every_partition_of_it(devices: int, micro_batch: int) -> None:
    mixing, (images, labels) = Mixing(5), images_of(12)
    whole = mixing(images, labels, noise_of(mixing, 1, 0, 0, 12))
    assert not whole[0].equal(images)
    for part in range(12 // micro_batch):
        micro_step, rank = divmod(part, devices)
        rows = slice(part * micro_batch, (part + 1) * micro_batch)
        noise = noise_of(mixing, devices, rank, micro_step, micro_batch)
        for ours, expected in zip(mixing(images[rows], labels[rows], noise), whole, strict=True):
            assert ours.equal(expected[rows])


@pytest.mark.parametrize(
    "options", [{}, {"mixup": 0.0}, {"cutmix": 0.0}, {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0}]
)
@torch._dynamo.config.patch(error_on_recompile=True)
def test_it_is_one_graph_for_all_steps(options: dict[str, float]) -> None:
    torch.compiler.reset()
    mixing, (images, labels) = Mixing(5, **options), images_of(4)
    compiled = torch.compile(mixing, fullgraph=True, dynamic=False, backend="aot_eager")
    for seed in range(4):
        noise = {"mixing": uniform(5, seed=seed), "erasing": uniform(4, 23, seed=seed), "fill": uniform(*images.shape)}
        torch.testing.assert_close(compiled(images, labels, noise), mixing(images, labels, noise))


def test_it_never_waits_for_the_device() -> None:
    """On the meta device there is nothing to wait for: whatever reads a value raises."""
    noise = {"mixing": uniform(5), "erasing": uniform(4, 23), "fill": uniform(4, 3, 8, 12)}
    images, labels = (part.to("meta") for part in images_of(4))
    mixed, targets = Mixing(5)(images, labels, {name: values.to("meta") for name, values in noise.items()})
    assert (mixed.shape, targets.shape) == ((4, 3, 8, 12), (4, 5))


def test_what_is_off_needs_no_noise() -> None:
    def of(**options: float) -> set[str]:
        generator = chance()

        class Rand:
            def __call__(self, *shape: int) -> Tensor:
                return torch.rand(*shape, generator=generator)

            shared = __call__

        rand: Any = Rand()
        return set(Mixing(5, **options).noise(rand, 2, 3, 8, 8))

    assert of() == {"mixing", "erasing", "fill"}
    assert of(erasing=0.0) == of(erasing=0.0, mixup=0.0) == of(erasing=0.0, cutmix=0.0) == {"mixing"}
    assert of(mixup=0.0, cutmix=0.0) == {"erasing", "fill"}
    assert of(mixup=0.0, cutmix=0.0, erasing=0.0) == set()
