"""HPM and DropPos: what their papers say of masks, teacher, positions and weights, on networks of two small blocks."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import Optimization, Run
from common.data.normalize import Normalize
from common.data.sources import open_data
from common.networks.vit import SIZES
from common.pretraining import pretrain
from common.runs import Stage
from common.training.distributed import Processes
from common.training.engine import train
from common.training.optimizer import parameter_groups
from mimkit.losses import normalized_patches
from mimkit.masking import random_tokens
from mimkit.tokens import patchify, split, take

import droppos
import hpm
import pytest
import torch
from strategies import seeded
from torch import Tensor, nn

RECIPES: dict[str, Any] = {
    "hpm": (hpm.HPM, hpm.PRESETS["digits"]),
    "droppos": (droppos.DropPos, droppos.PRESETS["digits"]),
}
BOTH = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "nano", {"dim": 24, "depth": 2, "heads": 2})


def method_of(name: str, **settings: Any) -> Any:
    method, config = RECIPES[name]
    torch.manual_seed(0)
    return method(replace(config, **settings), Normalize([0.5], [0.5]))


def views_of(method: nn.Module, count: int = 6) -> Tensor:
    return seeded(count, 1, *method.view_size, seed=1)  # pyright: ignore


def noise_of(method: Any, count: int = 6) -> dict[str, Tensor]:
    seeds = iter(range(9))
    return method.noise(lambda *shape: seeded(*shape, seed=next(seeds)), count)


def at(epoch: float, method: Any) -> Tensor:
    return torch.tensor(epoch / method.config.optimization.epochs, dtype=torch.float64)


def gradients_of(method: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    method.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in method.named_parameters() if p.requires_grad}


# Both


@BOTH
def test_no_weight_that_learns_is_used_without_gradients_first(name: str) -> None:
    """Under autocast its bf16 copy was kept for the next use, in older PyTorch (2.7) without the way back to it."""
    method, first = method_of(name), {}

    def note(key: str) -> None:
        first.setdefault(key, torch.is_grad_enabled())

    for key, part in method.named_modules():
        if any(parameter.requires_grad for parameter in part.parameters()):
            part.register_forward_pre_hook(lambda *_, key=key: note(key))
    method(views_of(method), noise_of(method), at(0, method))
    assert {"encoder", "encoder.blocks.0.attn"} <= set(first)
    assert all(first.values())


@BOTH
def test_every_weight_learns_in_bf16_as_in_fp32(name: str) -> None:
    method = method_of(name, **({"hard": (0.0, 0.0)} if name == "hpm" else {}))
    views, noise, progress = views_of(method), noise_of(method), at(3, method)
    right = gradients_of(method, method(views, noise, progress)["loss"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(views, noise, progress)["loss"]
    found = gradients_of(method, loss)
    assert loss.dtype == torch.float32
    largest = max(float(gradient.norm()) for gradient in right.values() if gradient is not None)
    for key, gradient in found.items():
        expected = right[key]
        assert gradient is not None, key
        assert expected is not None, key
        assert float((gradient - expected).norm()) < 0.05 * float(expected.norm()) + 0.003 * largest, key


@BOTH
def test_only_the_tables_are_frozen_and_stay_as_they_are(name: str) -> None:
    method = method_of(name)
    frozen = {key: p.clone() for key, p in method.named_parameters() if not p.requires_grad and "teacher" not in key}
    frozen |= {key: b.clone() for key, b in method.named_buffers()}
    assert all(key.endswith(("pos_embed", "normalize.mean", "normalize.std", ".drop")) for key in frozen)
    groups = parameter_groups(method, Optimization())
    names = [key for group in groups for key in group["names"]]
    assert set(names) == set(gradients_of(method, method(views_of(method), noise_of(method), at(0, method))["loss"]))
    assert not any(key.startswith("teacher") for key in names)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for epoch in range(3):
        method(views_of(method), noise_of(method), at(epoch, method))["loss"].backward()
        optimizer.step()
        if hasattr(method, "after_step"):
            method.after_step(at(epoch, method))
    now = {**dict(method.named_parameters()), **dict(method.named_buffers())}
    assert all(torch.equal(now[key], tensor) for key, tensor in frozen.items())
    if name == "hpm":
        teacher, student = dict(method.teacher[0].named_parameters()), dict(method.encoder.named_parameters())
        assert torch.equal(teacher["pos_embed"], student["pos_embed"])
        assert not torch.equal(teacher["blocks.0.attn.qkv.weight"], student["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("name", "settings"), [("hpm", {}), ("droppos", {"temperature": torch.inf}), ("droppos", {"temperature": 0.1})]
)
def test_the_loss_of_a_batch_is_the_mean_of_its_micro_batches(name: str, settings: dict[str, Any]) -> None:
    """So two devices equal one. Where DropPos weighs patches by attention, it divides by the sum of the weights of what
    is on a device at a time: there a batch in micro-batches is only nearly the same, as in the published code."""
    method = method_of(name, **settings)
    views, noise, now = views_of(method), noise_of(method), at(7, method)
    micro_batches = [method(views[i::2], {k: n[i::2] for k, n in noise.items()}, now) for i in range(2)]
    for key, value in method(views, noise, now).items():
        mean = (micro_batches[0][key] + micro_batches[1][key]) / 2
        exact = not key.startswith(("loss", "weighted")) or settings.get("temperature") != 0.1
        torch.testing.assert_close(mean, value, rtol=1e-5 if exact else 0.02, atol=0.0 if exact else 0.02)
        assert exact or key != "loss" or mean != value


@BOTH
def test_a_run_that_was_stopped_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """With all that a method keeps, as the teacher."""
    settings = Optimization(epochs=3, batch_size=4, base_lr=0.5, warmup_epochs=1.0, clip=5.0)

    class Images:
        unreadable = ()

        def __init__(self, batches: Any, last: int) -> None:
            self.batches, self.last = batches, last

        def __iter__(self) -> Iterator[Tensor]:
            for number, samples in enumerate(self.batches):
                if number == self.last:
                    raise InterruptedError
                yield torch.cat([seeded(1, 1, 32, 32, seed=epoch + 10 * index) for epoch, index in samples])

    data = open_data(RECIPES[name][1].data, seed=0)

    def trained(folder: str, *, resume: bool = False, last: int = 99) -> dict[str, Tensor]:
        method = method_of(name, optimization=settings)
        run = Run(precision="fp32", compile="off", log_every=1, checkpoint_minutes=0.0, resume=resume)
        train(
            method,
            lambda batches: Images(batches, last),
            num_images=8,
            settings=settings,
            stage=Stage(Processes(0, 1, torch.device("cpu")), data, run, tmp_path / folder, "pre-training"),
        )
        return method.state_dict()

    whole = trained("whole")
    with pytest.raises(InterruptedError):
        trained("cut", last=4)
    cut = trained("cut", resume=True)
    assert all(torch.equal(cut[key], tensor) for key, tensor in whole.items())
    assert any(key.startswith("teacher.2.blocks") for key in whole) == (name == "hpm")


@pytest.mark.parametrize(
    ("name", "args", "sentence"),
    [
        ("hpm", ["--mask-ratio", "1"], "--mask-ratio 1.0 of 64 patches does not leave both masked and visible ones"),
        ("hpm", ["--mask-ratio", "0"], "--mask-ratio 0.0 of 64 patches does not leave both masked and visible ones"),
        ("hpm", ["--momentum-epochs", "0"], "--momentum-epochs 0.0: must be above 0"),
        ("droppos", ["--mask-ratio", "1"], "--mask-ratio 1.0 and --drop-ratio 0.75 of 64 leave nothing to locate"),
        ("droppos", ["--mask-ratio", "nan"], "--mask-ratio nan and --drop-ratio 0.75 of 64 leave nothing to locate"),
        ("droppos", ["--drop-ratio", "0"], "--mask-ratio 0.75 and --drop-ratio 0.0 of 64 leave nothing to locate"),
    ],
)
def test_a_wrong_setting_is_one_sentence(name: str, args: list[str], sentence: str, tmp_path: Path) -> None:
    recipe = {"hpm": hpm.RECIPE, "droppos": droppos.RECIPE}[name]
    with pytest.raises(SystemExit) as ended:
        pretrain(recipe, name=name, args=[*args, "--runs", str(tmp_path)])
    assert ended.value.code == f"{name}: {sentence}"


# HPM


def masks(method: hpm.HPM, difficulty: Tensor, noise: Tensor) -> list[Tensor]:
    epochs = range(0, method.config.optimization.epochs, 3)
    return [method.mask(difficulty, {"mask": noise}, at(epoch + 0.5, method)) for epoch in epochs]


def test_with_no_share_for_the_teacher_masks_are_those_of_mae() -> None:
    method = method_of("hpm", hard=(0.0, 0.0))
    difficulty, noise = seeded(5, 64, seed=2), seeded(5, 64, seed=3)
    right = random_tokens(noise, num_masked=method.num_masked)
    assert all(torch.equal(mask, right) for mask in masks(method, difficulty, noise))


@pytest.mark.parametrize("choose", ["hardest", "easiest"])
def test_with_all_of_it_chance_does_not_matter(choose: str) -> None:
    method = method_of("hpm", hard=(1.0, 1.0), choose=choose)
    difficulty = seeded(5, 64, seed=2)
    right = random_tokens(difficulty if choose == "hardest" else -difficulty, num_masked=method.num_masked)
    assert all(torch.equal(mask, right) for mask in masks(method, difficulty, seeded(5, 64, seed=3)))


@pytest.mark.parametrize("hard", [(0.0, 0.5), (0.0, 1.0), (0.5, 0.0), (0.3, 0.3)])
def test_the_teachers_share_goes_from_its_start_to_its_end(hard: tuple[float, float]) -> None:
    """The masks have always the same size, all the patches that are its to choose, and among the others chance."""
    method = method_of("hpm", hard=hard)
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
    method = method_of("hpm", target="features")
    method(views_of(method), noise_of(method), at(0, method))["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


@pytest.mark.parametrize(
    ("epoch", "momentum"), [(0, 0.9), (0.99, 0.9), (1, 0.91), (5.5, 0.95), (9, 0.99), (10, 1), (15, 1)]
)
def test_the_teacher_moves_by_exactly_one_minus_its_momentum(epoch: float, momentum: float) -> None:
    optimization = replace(hpm.PRESETS["digits"].optimization, epochs=20)
    method = method_of("hpm", momentum=(0.9, 1.0), momentum_epochs=10.0, optimization=optimization)
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
    method = method_of("hpm")
    patches = patchify(method.normalize(views_of(method)), patch=method.patch)
    difficulty, features = method.predict_difficulty(patches)
    every = torch.arange(64).expand(len(patches), -1)
    latent = method.encoder(patches, method.encoder.positions[every])
    sequence = method.decoder.sequence(latent, every, every[:, :0])
    torch.testing.assert_close(difficulty, method.predictor.predict_mean(sequence, 64))
    assert torch.equal(features, latent[:, 1:])


@pytest.mark.parametrize("target", ["pixels", "normalized", "features"])
def test_the_target_is_that_of_the_masked_patches(target: str) -> None:
    method = method_of("hpm", target=target)
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
    method = method_of("hpm")
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
    method = method_of("hpm")
    loss = method(views_of(method), noise_of(method), at(0, method))["prediction"]
    found = gradients_of(method, loss)
    reached = {name for name, gradient in found.items() if gradient is not None and gradient.abs().sum() > 0}
    own = ("decoder.blocks", "decoder.norm", "decoder.head")
    assert not any(name.startswith(own) for name in reached)
    assert {"encoder.patch_embed.proj.weight", "decoder.embed.weight", "decoder.mask_token"} <= reached
    assert "predictor.head.weight" in reached


# DropPos


def test_the_order_of_the_tokens_does_not_matter() -> None:
    method = method_of("droppos")
    patches = seeded(4, 16, 16, seed=1)
    places = seeded(4, 64, seed=2).argsort(dim=-1)[:, :16]
    dropped, (order, _) = seeded(4, 16, seed=3) < 0.7, split(torch.zeros(4, 16, dtype=torch.bool), num_masked=0)
    order = seeded(4, 16, seed=4).argsort(dim=-1)
    logits = method.locate(patches, places, dropped, {})
    other = method.locate(take(patches, order), places.gather(1, order), dropped.gather(1, order), {})
    torch.testing.assert_close(other, take(logits, order))


def test_shuffling_changes_nothing() -> None:
    one, other = method_of("droppos"), method_of("droppos", shuffle=True)
    noise = noise_of(other)
    assert noise["shuffle"].shape == (6, 64 - other.num_masked)
    plain = {key: noise[key] for key in ("mask", "drop")}
    for key, value in other(views_of(one), noise, at(1, one)).items():
        torch.testing.assert_close(value, one(views_of(one), plain, at(1, one))[key])


@pytest.mark.parametrize("form", ["learned", "zero", "permuted"])
def test_what_was_dropped_cannot_be_read_off(form: str) -> None:
    """Patches that lost their position tell the network nothing of where they are, however they are placed."""
    method = method_of("droppos", dropped=form, drop_ratio=1.0)
    patches, dropped = seeded(4, 16, 16, seed=1), torch.ones(4, 16, dtype=torch.bool)
    noise = {"permuted": seeded(4, 16, seed=3)}
    places = torch.arange(16).expand(4, -1)
    logits = [method.locate(patches, at, dropped, noise) for at in (places, places + 48)]
    assert torch.equal(*logits) == (form != "permuted")  # others' positions are those of the visible patches


def test_the_weights_get_no_gradient() -> None:
    method = method_of("droppos", temperature=0.5)
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
    method = method_of("droppos")
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
    method = method_of("droppos", sigma=(2.0, 0.5))
    epochs = method.config.optimization.epochs
    widths = [[float(method.sigma(at(epoch + share, method))) for share in (0, 0.5, 0.99)] for epoch in range(epochs)]
    assert all(len(set(row)) == 1 for row in widths)
    assert [row[0] for row in widths] == pytest.approx([2 - 1.5 * epoch / epochs for epoch in range(epochs)])


def test_a_perfect_answer_is_right_and_a_confident_one_need_not_count() -> None:
    method = method_of("droppos", sigma=(0.0, 0.0))
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
