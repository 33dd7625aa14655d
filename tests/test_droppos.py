"""DropPos: what the paper says of positions and weights, on networks of two small blocks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mimkit.masking import random_tokens
from mimkit.tokens import patchify, split, take

import droppos
import pytest
import torch
from method_checks import (
    at,
    check_first_use_of_weights,
    check_frozen_tables,
    check_gradients_in_bf16,
    check_resumed_training,
    gradients_of,
    in_micro_batches,
    make_small,
    method_of,
    noise_of,
    sentence_of,
    views_of,
)
from strategies import seeded
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def test_no_weight_that_learns_is_used_without_gradients_first() -> None:
    check_first_use_of_weights(method_of(droppos.RECIPE))


def test_every_weight_learns_in_bf16_as_in_fp32() -> None:
    check_gradients_in_bf16(method_of(droppos.RECIPE))


def test_only_the_tables_are_frozen_and_stay_as_they_are() -> None:
    method = method_of(droppos.RECIPE)
    check_frozen_tables(method)


@pytest.mark.parametrize("temperature", [torch.inf, 0.1])
def test_the_loss_of_a_batch_is_the_mean_of_its_micro_batches(temperature: float) -> None:
    """So two devices equal one. Where DropPos weights patches by attention, it divides by the sum of the weights of the
    micro-batch: there a batch in micro-batches is only nearly the same, as in the published code."""
    for key, value, mean in in_micro_batches(method_of(droppos.RECIPE, temperature=temperature)):
        exact = not key.startswith(("loss", "weighted")) or temperature != 0.1
        torch.testing.assert_close(mean, value, rtol=1e-5 if exact else 0.02, atol=0.0 if exact else 0.02)
        assert exact or key != "loss" or mean != value


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    assert not any(key.startswith("teacher") for key in check_resumed_training(droppos.RECIPE, tmp_path))


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--mask-ratio", "1"], "--mask-ratio 1.0 and --drop-ratio 0.75 of 49 leave nothing to locate"),
        (["--mask-ratio", "nan"], "--mask-ratio nan and --drop-ratio 0.75 of 49 leave nothing to locate"),
        (["--drop-ratio", "0"], "--mask-ratio 0.75 and --drop-ratio 0.0 of 49 leave nothing to locate"),
        (["--temperature", "0"], "--temperature 0.0: must be above 0"),
        (["--sigma", "1", "-1"], "--sigma 1.0 -1.0: must be 0 or more"),
        (["--decoder-heads", "5"], "width 48 cannot be shared by 5 heads"),
    ],
)
def test_a_wrong_setting_is_one_sentence(args: list[str], sentence: str, tmp_path: Path) -> None:
    assert sentence_of(droppos.RECIPE, args, tmp_path) == f"recipe: {sentence}"


def test_the_order_of_the_tokens_does_not_matter() -> None:
    method = method_of(droppos.RECIPE)
    patches = seeded(4, 16, 16, seed=1)
    places = seeded(4, 64, seed=2).argsort(dim=-1)[:, :16]
    dropped, (order, _) = seeded(4, 16, seed=3) < 0.7, split(torch.zeros(4, 16, dtype=torch.bool), num_masked=0)
    order = seeded(4, 16, seed=4).argsort(dim=-1)
    logits = method.locate(patches, places, dropped, {})
    other = method.locate(take(patches, order), places.gather(1, order), dropped.gather(1, order), {})
    torch.testing.assert_close(other, take(logits, order))


def test_shuffling_changes_nothing() -> None:
    one, other = method_of(droppos.RECIPE), method_of(droppos.RECIPE, shuffle=True)
    noise = noise_of(other)
    assert noise["shuffle"].shape == (6, 64 - other.num_masked)
    plain = {key: noise[key] for key in ("mask", "drop")}
    for key, value in other(views_of(one), noise, at(1, one)).items():
        torch.testing.assert_close(value, one(views_of(one), plain, at(1, one))[key])


@pytest.mark.parametrize("form", ["learned", "zero", "permuted"])
def test_what_was_dropped_cannot_be_read_off(form: str) -> None:
    """Patches that lost their position tell the network nothing of where they are, however they are placed."""
    method = method_of(droppos.RECIPE, dropped=form, drop_ratio=1.0)
    patches, dropped = seeded(4, 16, 16, seed=1), torch.ones(4, 16, dtype=torch.bool)
    noise = {"permuted": seeded(4, 16, seed=3)}
    places = torch.arange(16).expand(4, -1)
    logits = [method.locate(patches, at, dropped, noise) for at in (places, places + 48)]
    assert torch.equal(*logits) == (form != "permuted")  # others' positions are those of the visible patches


def test_the_weights_get_no_gradient() -> None:
    method = method_of(droppos.RECIPE, temperature=0.5)
    views, noise, now = views_of(method), noise_of(method), at(1, method)
    right = gradients_of(method, method(views, noise, now)["loss"])
    patches = patchify(method.normalize(views), patch=method.patch)
    mask = random_tokens(noise["mask"], num_masked=method.num_masked)
    weights = method.attention(patches, *split(mask, num_masked=method.num_masked))
    assert not weights.requires_grad
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(len(weights)))
    assert weights.std() > 0
    method.attention = lambda *_: weights
    for name, gradient in gradients_of(method, method(views, noise, now)["loss"]).items():
        assert torch.equal(gradient, right[name])  # pyright: ignore


def test_only_dropped_positions_are_scored() -> None:
    """Logits of an anchor do not matter, those of what was dropped do."""
    method = method_of(droppos.RECIPE)
    views, noise, now = views_of(method), noise_of(method), at(1, method)
    right, locate = method(views, noise, now), method.locate

    def spoilt(where: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        method.locate = lambda patches, places, dropped, noise: torch.where(
            where(dropped)[..., None],
            locate(patches, places, dropped, noise).flip(-1),
            locate(patches, places, dropped, noise),
        )
        return method(views, noise, now)

    assert all(torch.equal(value, right[key]) for key, value in spoilt(lambda dropped: ~dropped).items())
    assert not torch.equal(spoilt(lambda dropped: dropped)["loss"], right["loss"])


def test_the_width_of_the_targets_is_constant_in_an_epoch_and_falls_between() -> None:
    method = method_of(droppos.RECIPE, sigma=(2.0, 0.5))
    epochs = method.config.optimization.epochs
    widths = [[float(method.sigma(at(epoch + share, method))) for share in (0, 0.5, 0.99)] for epoch in range(epochs)]
    assert all(len(set(row)) == 1 for row in widths)
    assert [row[0] for row in widths] == pytest.approx([2 - 1.5 * epoch / epochs for epoch in range(epochs)])


def test_a_perfect_answer_is_right_and_a_confident_one_need_not_count() -> None:
    method = method_of(droppos.RECIPE, sigma=(0.0, 0.0))
    views, noise = views_of(method), noise_of(method)
    method.locate = lambda patches, places, *_: 30 * nn.functional.one_hot(places, 64).float()
    losses = method(views, noise, at(0, method))
    assert (losses["accuracy"], losses["weighted_accuracy"]) == (1, pytest.approx(1))
    assert losses["loss"] < 1e-6
    method.config = replace(method.config, confident=False, sigma=(1.0, 1.0))
    assert all(float(method(views, noise, at(0, method))[key]) == 0 for key in ("loss", "weighted_accuracy"))


@pytest.mark.parametrize(
    ("places", "mask_ratio", "drop_ratio", "anchors", "dropped"),
    [
        (196, 0.0, 0.25, 147, 49),
        (196, 0.25, 0.5, 73, 74),
        (196, 0.5, 1.0, 0, 98),
        (196, 0.75, 0.75, 12, 37),
        (196, 0.75, 0.95, 2, 47),
        (100, 0.9, 0.5, 4, 5),  # 100 · (1 − 0.9) is rounded to below 10
        (100, 0.0, 0.9, 9, 91),
    ],
)
def test_counts_are_truncated_in_double_precision(
    places: int, mask_ratio: float, drop_ratio: float, anchors: int, dropped: int
) -> None:
    masked, found = droppos.count_dropped(places, mask_ratio, drop_ratio)
    assert (places - masked - found, found) == (anchors, dropped)
