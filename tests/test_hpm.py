"""HPM: what the paper says of masks and of the teacher, on networks of two small blocks."""

from dataclasses import replace
from pathlib import Path

from mimkit.losses import normalized_patches
from mimkit.masking import random_tokens
from mimkit.tokens import patchify, split, take

import hpm
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
from torch import Tensor


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def test_no_weight_that_learns_is_used_without_gradients_first() -> None:
    check_first_use_of_weights(method_of(hpm.RECIPE))


def test_every_weight_learns_in_bf16_as_in_fp32() -> None:
    check_gradients_in_bf16(method_of(hpm.RECIPE, hard=(0.0, 0.0)))


def test_only_the_tables_are_frozen_and_stay_as_they_are() -> None:
    method = method_of(hpm.RECIPE)
    check_frozen_tables(method)
    teacher, student = dict(method.teacher[0].named_parameters()), dict(method.encoder.named_parameters())
    assert torch.equal(teacher["pos_embed"], student["pos_embed"])
    assert not torch.equal(teacher["blocks.0.attn.qkv.weight"], student["blocks.0.attn.qkv.weight"])


def test_the_loss_of_a_batch_is_the_mean_of_its_micro_batches() -> None:
    """So two devices equal one."""
    for _, value, mean in in_micro_batches(method_of(hpm.RECIPE)):
        torch.testing.assert_close(mean, value, rtol=1e-5, atol=0.0)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """The teacher included."""
    assert any(key.startswith("teacher.2.blocks") for key in check_resumed_training(hpm.RECIPE, tmp_path))


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--mask-ratio", "1"], "--mask-ratio 1.0 of 49 patches does not leave both masked and visible ones"),
        (["--mask-ratio", "0"], "--mask-ratio 0.0 of 49 patches does not leave both masked and visible ones"),
        (["--momentum-epochs", "0"], "--momentum-epochs 0.0: must be above 0"),
        (["--hard", "0", "2"], "--hard 0.0 2.0: must be between 0 and 1"),
        (["--momentum", "-1", "0.9"], "--momentum -1.0 0.9: must be between 0 and 1"),
        (
            ["--mask-ratio", "0.01", "--objective", "absolute"],
            "--mask-ratio 0.01 masks 1 patch, whose error is compared with no other",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence(args: list[str], sentence: str, tmp_path: Path) -> None:
    assert sentence_of(hpm.RECIPE, args, tmp_path) == f"recipe: {sentence}"


def masks(method: hpm.HPM, difficulty: Tensor, noise: Tensor) -> list[Tensor]:
    epochs = range(0, method.config.optimization.epochs, 3)
    return [method.mask(difficulty, {"mask": noise}, at(epoch + 0.5, method)) for epoch in epochs]


def test_with_no_share_for_the_teacher_masks_are_those_of_mae() -> None:
    method = method_of(hpm.RECIPE, hard=(0.0, 0.0))
    difficulty, noise = seeded(5, 64, seed=2), seeded(5, 64, seed=3)
    right = random_tokens(noise, num_masked=method.num_masked)
    assert all(torch.equal(mask, right) for mask in masks(method, difficulty, noise))


@pytest.mark.parametrize("choose", ["hardest", "easiest"])
def test_with_all_of_it_chance_does_not_matter(choose: str) -> None:
    method = method_of(hpm.RECIPE, hard=(1.0, 1.0), choose=choose)
    difficulty = seeded(5, 64, seed=2)
    right = random_tokens(difficulty if choose == "hardest" else -difficulty, num_masked=method.num_masked)
    assert all(torch.equal(mask, right) for mask in masks(method, difficulty, seeded(5, 64, seed=3)))


@pytest.mark.parametrize("hard", [(0.0, 0.5), (0.0, 1.0), (0.5, 0.0), (0.3, 0.3)])
def test_the_teachers_share_goes_from_its_start_to_its_end(hard: tuple[float, float]) -> None:
    """The masks have always the same size, all the patches that are its to choose, and among the others chance."""
    method = method_of(hpm.RECIPE, hard=hard)
    epochs, total = method.config.optimization.epochs, method.num_masked
    difficulty, noise = seeded(200, 64, seed=2), seeded(200, 64, seed=3)
    for epoch in (0, epochs // 2, epochs - 1):
        share = hard[0] + (hard[1] - hard[0]) * (epoch + 1) / epochs
        mask = method.mask(difficulty, {"mask": noise}, at(epoch, method))
        assert (mask.sum(dim=-1) == total).all()
        assert torch.equal(mask, method.mask(difficulty, {"mask": noise}, at(epoch + 0.9, method)))
        count = int(total * share + 1e-9)
        forced = random_tokens(difficulty, num_masked=count)
        assert (mask | ~forced).all()
        others = (mask & ~forced).sum() / (~forced).sum()
        assert float(others) == pytest.approx((total - count) / (64 - count))
        if 0 < count < total:
            next_harder = random_tokens(difficulty, num_masked=count + 1) & ~forced
            assert float(mask[next_harder].float().mean()) == pytest.approx((total - count) / (64 - count), abs=0.15)


def test_no_gradient_reaches_the_teacher() -> None:
    method = method_of(hpm.RECIPE, target="features")
    method(views_of(method), noise_of(method), at(0, method))["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


@pytest.mark.parametrize(
    ("epoch", "momentum"), [(0, 0.9), (0.99, 0.9), (1, 0.91), (5.5, 0.95), (9, 0.99), (10, 1), (15, 1)]
)
def test_the_teacher_moves_by_exactly_one_minus_its_momentum(epoch: float, momentum: float) -> None:
    optimization = replace(hpm.PRESETS["digits"].optimization, epochs=20)
    method = method_of(hpm.RECIPE, momentum=(0.9, 1.0), momentum_epochs=10.0, optimization=optimization)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(seeded(*parameter.shape, seed=5))
    before, goal = method.teacher.state_dict(), method.student().state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    method.after_step(at(epoch, method))
    for name, tensor in method.teacher.state_dict().items():
        expected = before[name].double() * momentum + goal[name].double() * (1 - momentum)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_teacher_starts_with_what_the_student_predicts_of_the_whole_image() -> None:
    method = method_of(hpm.RECIPE)
    patches = patchify(method.normalize(views_of(method)), patch=method.patch)
    difficulty, features = method.predict_difficulty(patches)
    every = torch.arange(64).expand(len(patches), -1)
    latent = method.encoder(patches, method.encoder.positions[every])
    sequence = method.decoder.sequence(latent, every, every[:, :0])
    torch.testing.assert_close(difficulty, method.predictor.predict_mean(sequence, 64))
    assert torch.equal(features, latent[:, 1:])


@pytest.mark.parametrize("target", ["pixels", "normalized", "features"])
def test_the_target_is_that_of_the_masked_patches(target: str) -> None:
    method = method_of(hpm.RECIPE, target=target)
    views, noise, now = views_of(method), noise_of(method), at(20, method)
    patches = patchify(method.normalize(views), patch=method.patch)
    difficulty, features = method.predict_difficulty(patches)
    _, masked = split(method.mask(difficulty, noise, now), num_masked=method.num_masked)
    right = {"pixels": patches, "normalized": normalized_patches(patches), "features": 3 * features}[target]
    method.decoder.predict = lambda *_: take(right, masked)
    assert method(views, noise, now)["reconstruction"] < 1e-6
    method.decoder.predict = lambda *_: take(right, masked).flip(1)
    assert method(views, noise, now)["reconstruction"] > 1e-4


def test_pairs_are_right_where_the_predictor_orders_them_as_the_errors_do() -> None:
    method = method_of(hpm.RECIPE)
    views, noise, now = views_of(method), noise_of(method), at(0, method)
    errors = seeded(6, method.num_masked, seed=7)
    method.errors = lambda *_: errors
    found = []
    for prediction in (10 * errors, -errors, seeded(*errors.shape, seed=8)):
        method.predictor.predict_mean = lambda *_, prediction=prediction: prediction
        found.append(method(views, noise, now))
    assert [float(losses["pair_accuracy"]) for losses in found] == pytest.approx([1.0, 0.0, 0.5], abs=0.05)
    assert found[0]["prediction"] < found[2]["prediction"] < found[1]["prediction"]
    for losses in found:
        assert losses["loss"] == pytest.approx(float(losses["reconstruction"] + losses["prediction"]))


def test_the_predictor_teaches_the_encoder_but_not_the_errors_it_predicts() -> None:
    method = method_of(hpm.RECIPE)
    loss = method(views_of(method), noise_of(method), at(0, method))["prediction"]
    found = gradients_of(method, loss)
    reached = {name for name, gradient in found.items() if gradient is not None and gradient.abs().sum() > 0}
    own = ("decoder.blocks", "decoder.norm", "decoder.head")
    assert not any(name.startswith(own) for name in reached)
    assert {"encoder.patch_embed.proj.weight", "decoder.embed.weight", "decoder.mask_token"} <= reached
    assert "predictor.head.weight" in reached
