"""Linear classifiers on frozen features."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import SettingsError
from common.evaluation.features import orders
from common.evaluation.linear import Linear, LinearClassifiers, fit, hold_out, linear
from common.training.optimizer import LARS

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from probes import NORMALIZE, small, stage
from torch import Tensor, nn


def blobs(count: int = 120, *, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Linearly separable features of very unequal scales and places."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    features = torch.randn(count, 6, generator=generator) + 8 * F.one_hot(labels, 6)
    return features * torch.tensor([1e-2, 1, 10, 1, 1, 1]) + 5, labels


def trained(rates: list[float], settings: Linear, *, batch: int = 30, seed: int = 0) -> LinearClassifiers:
    features, labels = blobs()
    torch.manual_seed(seed)
    heads = LinearClassifiers(6, 4, len(rates))
    steps = orders(len(labels), batch, settings.epochs, seed=seed)
    batches = ((features[rows], labels[rows]) for _, rows in steps)
    fit(heads, batches, rates=rates, steps=len(labels) // batch, settings=settings)
    return heads


@pytest.mark.parametrize(("optimizer", "rate"), [("lars", 5.0), ("sgd", 0.5)])
def test_a_linear_probe_separates_what_a_line_separates(optimizer: Any, rate: float) -> None:
    settings = Linear(optimizer=optimizer, epochs=40, warmup_epochs=2)
    accuracy, _ = trained([rate], settings).evaluate(*blobs())
    assert accuracy.tolist() == [100]


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_all_learning_rates_in_one_pass_equal_each_alone(optimizer: Any) -> None:
    settings, rates = Linear(optimizer=optimizer, epochs=5, warmup_epochs=1), [0.1, 1.0, 7.0]
    together = trained(rates, settings)
    for i, rate in enumerate(rates):
        alone = trained([rate], settings)
        torch.testing.assert_close(together.weight[i], alone.weight[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.bias[i], alone.bias[0], rtol=1e-4, atol=1e-5)


def test_one_head_equals_a_module_trained_by_the_optimizer_as_it_is() -> None:
    settings = Linear(epochs=6, warmup_epochs=2)
    heads, (features, labels) = trained([2.0], settings), blobs()
    torch.manual_seed(0)
    start = LinearClassifiers(6, 4, 1)
    plain = nn.Sequential(nn.BatchNorm1d(6, affine=False, eps=1e-6), nn.Linear(6, 4))
    plain[1].weight.data, plain[1].bias.data = start.weight[0].detach().clone(), start.bias[0].detach().clone()
    optimizer = LARS(plain.parameters(), lr=0.0)
    for step, (_, rows) in enumerate(orders(120, 30, 6, seed=0)):
        epoch = step / 4
        after = torch.tensor(torch.pi * (epoch - 2) / 4)
        optimizer.param_groups[0]["lr"] = epoch if epoch < 2 else float(1 + after.cos())
        optimizer.zero_grad()
        F.cross_entropy(plain(features[rows]), labels[rows]).backward()
        optimizer.step()
    torch.testing.assert_close(heads.weight[0], plain[1].weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heads.norm.state_dict(), plain[0].state_dict())


def test_features_are_normalized_by_their_batch_and_later_by_what_was_seen() -> None:
    features, labels = blobs(40)
    heads = LinearClassifiers(6, 4, 1).train()
    normal = heads.norm(features)
    variance = features.var(dim=0, unbiased=False)
    torch.testing.assert_close(normal, (features - features.mean(dim=0)) / (variance + 1e-6).sqrt())
    torch.testing.assert_close(heads.norm.running_mean, 0.1 * features.mean(dim=0))
    torch.testing.assert_close(heads.norm.running_var, 0.9 + 0.1 * features.var(dim=0))
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    heads.evaluate(features, labels)
    assert all(torch.equal(before[name], tensor) for name, tensor in heads.state_dict().items())
    assert set(before) == {"weight", "bias", *(f"norm.{n}" for n in ("running_mean", "running_var")), *_counter(before)}


def _counter(state: dict[str, Tensor]) -> Iterator[str]:
    return (name for name in state if name.endswith("num_batches_tracked"))


def test_heads_start_alike_small_and_without_bias() -> None:
    torch.manual_seed(0)
    heads = LinearClassifiers(64, 100, 3)
    assert float(heads.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert torch.equal(heads.weight[0], heads.weight[2])
    assert not heads.bias.any()


@given(st.lists(st.integers(0, 4), min_size=2, max_size=80), st.integers(0, 9))
def test_a_tenth_of_every_class_is_held_out(labels: list[int], seed: int) -> None:
    counts = {label: labels.count(label) for label in labels}
    if max(counts.values()) == 1:
        with pytest.raises(
            SettingsError, match="several learning rates need labeled images to choose by, but no class"
        ):
            hold_out(labels, seed=seed)
        return
    rest, apart = hold_out(labels, seed=seed)
    assert sorted(rest + apart) == list(range(len(labels)))
    for label, count in counts.items():
        assert [labels[i] for i in apart].count(label) == (0 if count == 1 else max(1, count // 10))


def test_a_learning_rate_is_chosen_without_the_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the labels of the test images are, the choice and what is trained stay the same."""
    settings = Linear(base_lrs=(1e-4, 10.0), epochs=20, batch_size=27, warmup_epochs=1, crop_fraction=1.0)
    here = stage(tmp_path)

    def run(settings: Linear) -> dict[str, Any]:
        return linear(small(), NORMALIZE, settings=settings, stage=here)

    result = run(settings)
    with monkeypatch.context() as patch:
        patch.setattr(here.data.test, "label", lambda index: 0)
        other = run(settings)
    assert result["base_lr"] == 10.0
    assert result["accuracy"] != other["accuracy"]
    for key in ("base_lr", "held_out", "loss"):
        assert result[key] == other[key]
    # the chosen one is trained again, on all labeled images
    alone = run(replace(settings, base_lrs=(10.0,)))
    assert (alone["loss"], alone["accuracy"]) == (result["loss"], result["accuracy"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (Linear(base_lrs=()), "--base-lrs : give one or more positive numbers"),
        (Linear(base_lrs=(1.0, -1.0)), "--base-lrs 1.0 -1.0: give one or more positive numbers"),
        (Linear(batch_size=1), "--batch-size 1 has no statistics to normalize by: at least 2 images"),
    ],
)
def test_what_trains_no_linear_probe_is_refused(settings: Linear, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(sentence)}$"):
        linear(small(), NORMALIZE, settings=settings, stage=stage(tmp_path))


@pytest.mark.parametrize(
    ("base_lrs", "sentence"),
    [
        ((2e39, 4e39), r"--base-lrs 2e\+39 4e\+39: no learning rate gives a finite loss"),
        ((1e39,), r"the loss at --base-lrs 1e\+39 is not finite"),
    ],
)
def test_learning_rates_that_are_too_large_are_named(base_lrs: Any, sentence: str, tmp_path: Path) -> None:
    settings = Linear(base_lrs=base_lrs, optimizer="sgd", epochs=3, warmup_epochs=0, batch_size=27)
    with pytest.raises(SettingsError, match=f"^{sentence}$"):
        linear(small(), NORMALIZE, settings=settings, stage=stage(tmp_path))
