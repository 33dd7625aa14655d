"""LUT: disjoint views of the tokens, two views of an image, heads with batch norm, a teacher by moving average."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.data.embedded import Digits
from common.data.loading import ViewDataset
from common.data.normalize import Normalize
from common.data.views import WeakStrong, padded_crop, recolor
from common.networks.ema import ema_copy
from common.networks.projectors import mlp
from common.networks.vit import SIZES
from common.pretraining import pretrain
from mimkit.masking import disjoint_views

import finetune
import lut
import mae
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import kept
from strategies import seeded
from torch import Generator, Tensor, nn

FEW = ["--head-width", "32", "--size", "nano", "--decoder-dim", "24", "--decoder-depth", "1", "--decoder-heads", "2"]
SMALL = shlex.split(
    "--image-size 16 16 --patch 4 --epochs 1 --batch-size 130 --warmup-epochs 1 --workers 0 --log-every 2"
)


# Masks


def test_every_token_is_as_often_visible_in_the_second_view_as_in_the_first():
    first, second = disjoint_views(seeded(20000, 6), num_visible=2)
    for mask in (first, second):
        torch.testing.assert_close((~mask).float().mean(dim=0), torch.full((6,), 1 / 3), rtol=0, atol=0.02)


# Views of an image


def picture(*shape: int, seed: int = 0) -> Tensor:
    return (256 * seeded(*shape, seed=seed)).to(torch.uint8)


@given(st.sampled_from([1, 3]), st.integers(1, 40), st.integers(1, 40), st.integers(5, 20), st.integers(5, 20))
def test_both_views_have_the_size_asked_for_whatever_the_image(channels, H, W, height, width):
    views = WeakStrong((height, width))(picture(channels, H, W), Generator().manual_seed(H))
    assert [(view.shape, view.dtype) for view in views] == 2 * [((channels, height, width), torch.uint8)]


@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 12), st.integers(0, 12))
def test_a_padded_crop_is_cut_out_of_the_reflected_image(more, pad, top, left):
    image = picture(2, 6, 5 + more)
    padded = nn.functional.pad(image.float(), (pad, pad, pad, pad), mode="reflect")
    top, left = min(top, 2 * pad), min(left, more + 2 * pad)
    crop = padded_crop(image, top, left, size=(6, 5), pad=pad)
    assert crop.float().equal(padded[:, top : top + 6, left : left + 5])


def test_the_first_view_is_the_image_shifted_and_flipped_and_nothing_else():
    image = picture(3, 12, 12)
    views, found = WeakStrong((12, 12), pad=1), set()
    padded = nn.functional.pad(image.float(), (1, 1, 1, 1), mode="reflect")
    places = {(top, left, flip) for top in range(3) for left in range(3) for flip in (False, True)}
    for seed in range(200):
        view = views(image, Generator().manual_seed(seed))[0].float()
        for top, left, flip in places:
            crop = padded[:, top : top + 12, left : left + 12]
            if view.equal(crop.flip(-1) if flip else crop):
                found.add((top, left, flip))
    assert found == places


def test_the_second_view_is_gray_solarized_or_blurred_and_its_place_is_its_own(monkeypatch):
    calls = []
    monkeypatch.setattr("common.data.views.recolor", lambda view, *args, **more: calls.append((*args, more)) or view)
    views, image = WeakStrong((8, 8)), picture(3, 8, 8)
    pairs = [views(image, Generator().manual_seed(seed)) for seed in range(1000)]
    effects = [effect for _, effect, _ in calls]
    assert {effect: 280 < effects.count(effect) < 390 for effect in effects} == dict.fromkeys(
        ("gray", "solarize", "blur"), True
    )
    jitters = [jitter for jitter, _, _ in calls if jitter]
    assert 760 < len(jitters) < 840
    assert len({tuple(name for name, _ in jitter) for jitter in jitters}) == 24
    for name, least, most in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        drawn = [dict(jitter)[name] for jitter in jitters]
        assert least <= min(drawn) < least + 0.01
        assert most - 0.01 < max(drawn) <= most
    radii = [more["radius"] for *_, more in calls]
    assert 0.1 <= min(radii) < 0.12
    assert 1.98 < max(radii) <= 2.0
    assert sum(first.equal(second) for first, second in pairs) < 50


@pytest.mark.parametrize("channels", [1, 3])
def test_what_each_effect_does(channels):
    image = picture(channels, 9, 7)
    gray = recolor(image, [], "gray", radius=0.0)
    assert gray.equal(image) if channels == 1 else (gray == gray[:1]).all()
    assert recolor(image, [], "solarize", radius=0.0).equal(torch.where(image >= 128, 255 - image, image))
    assert recolor(image, [], "blur", radius=2.0).float().std() < image.float().std() / 2
    colored = recolor(image, [("saturation", 0.5), ("hue", 0.3)], "blur", radius=0.0)
    assert colored.equal(image) == (channels == 1)  # grayscale has neither saturation nor hue


def test_views_depend_on_seed_epoch_and_image_and_decode_it_once(monkeypatch):
    source, decoded = Digits("train"), []
    image = source.image
    monkeypatch.setattr(source, "image", lambda index: decoded.append(index) or image(index))
    views = ViewDataset(source, WeakStrong((16, 16), flip=0.0), seed=3)
    first, again, later = views[0, 5], views[0, 5], views[1, 5]
    assert decoded == [5, 5, 5]
    assert all(one.equal(other) for one, other in zip(first, again, strict=True))
    assert not any(one.equal(other) for one, other in zip(first, later, strict=True))


def test_views_that_cannot_be_made_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="pad=4 pixels of a view of 9 × 4 cannot be reflected"):
        WeakStrong((9, 4))
    with pytest.raises(ValueError, match="colors of 1 or 3 channels can be changed, not of 10"):
        WeakStrong((9, 9))(picture(10, 9, 9), Generator())


# Heads


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_head_has_as_many_linear_layers_as_asked_for_and_no_bias(depth, norm):
    head = mlp(6, width=10, depth=depth, norm=norm)
    linear = [part for part in head if isinstance(part, nn.Linear)]
    assert [part.out_features for part in linear] == [10] * (depth - 1) + [6] * (depth > 0)
    assert all(part.bias is None for part in linear)
    assert head(seeded(4, 6)).shape == (4, 6)
    assert not depth or isinstance(head[-1], nn.Linear)  # neither norm nor activation on the output
    assert depth or head(seeded(4, 6)).equal(seeded(4, 6))


def test_a_head_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="2 layers of width 0 make no head"):
        mlp(6, width=0, depth=2, norm="batch")


# The recipe


def small(**more: Any) -> lut.Config:
    digits = lut.PRESETS["digits"]
    data, network = replace(digits.data, image_size=(16, 16)), replace(digits.network, decoder_dim=24, decoder_heads=2)
    return replace(digits, data=data, network=network, head_width=32, **more)


def method_of(config: lut.Config | mae.Config) -> Any:
    torch.manual_seed(0)
    make: Any = lut.LUT if isinstance(config, lut.Config) else mae.MAE
    return make(config, Normalize([0.5], [0.5])).train()


def batch() -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    return (picture(5, 1, 16, 16), picture(5, 1, 16, 16, seed=1)), {"mask": seeded(5, 16, seed=2)}


def test_the_pixels_are_maes_on_the_first_view():
    method, (images, noise) = method_of(small()), batch()
    other = method_of(mae.Config(data=small().data, network=small().network))
    other.load_state_dict({name: tensor for name, tensor in method.state_dict().items() if name in other.state_dict()})
    losses = method(images, noise, torch.tensor(0.0))
    torch.testing.assert_close(losses["pixels"], other(images[0], noise, torch.tensor(0.0))["loss"])
    torch.testing.assert_close(losses["loss"], losses["pixels"] + 0.25 * losses["context"])
    alone = method_of(small(context_weight=0.0))(images, noise, torch.tensor(0.0))
    assert alone["loss"] == alone["pixels"] == losses["pixels"]


def test_with_the_context_alone_there_is_no_decoder_and_every_weight_learns():
    method, (images, noise) = method_of(small(loss="context")), batch()
    losses = method(images, noise, torch.tensor(0.0))
    assert set(losses) == {"loss", "context", "spread"}
    assert not [name for name, _ in method.named_parameters() if name.startswith("decoder")]
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters() if parameter.requires_grad)


def test_the_student_sees_a_quarter_of_each_view_and_the_teacher_all_of_both():
    method, (images, noise) = method_of(small(loss="context")), batch()
    seen: list[tuple[int, ...]] = []
    for encoder in (method.encoder, method.teacher[0]):
        encoder.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))
    method(images, noise, torch.tensor(0.0))
    assert seen == [(5, 4, 16), (5, 4, 16), (10, 16, 16)]


def test_the_teacher_starts_as_the_student_stays_in_evaluation_mode_and_averages_statistics_too():
    method, (images, noise) = method_of(small(momentum=0.75)), batch()
    student = dict(method.student().state_dict())
    assert all(tensor.equal(student[name]) for name, tensor in method.teacher.state_dict().items())
    assert not any(part.training for part in method.teacher.modules())
    assert method.projector[1].training
    before = ema_copy(method.teacher).state_dict()
    method(images, noise, torch.tensor(0.0))
    assert all(tensor.equal(before[name]) for name, tensor in method.teacher.state_dict().items())
    method.after_step(torch.tensor(0.0, dtype=torch.float64))
    after, student = method.teacher.state_dict(), method.student().state_dict()
    for name in ("1.1.running_mean", "1.1.running_var"):
        torch.testing.assert_close(after[name], 0.75 * before[name] + 0.25 * student[name])
        assert not after[name].equal(before[name])
    assert method.projector[1].num_batches_tracked == 2  # one for each view
    kept = ema_copy(method.teacher).state_dict()
    method.after_step(torch.tensor(1.0, dtype=torch.float64))  # momentum has risen to 1
    torch.testing.assert_close(method.teacher.state_dict(), kept)


def test_the_spread_is_one_for_directions_all_over_and_zero_for_one_direction(monkeypatch):
    method, (images, _) = method_of(small()), batch()
    for targets, spread in ((torch.eye(96).repeat(2, 1), 0.99), (torch.ones(10, 96), 0.0)):
        monkeypatch.setattr(method.teacher[1], "forward", lambda _, targets=targets: targets)
        many = tuple(view.repeat(20, 1, 1, 1)[: len(targets) // 2] for view in images)
        losses = method(many, {"mask": seeded(len(targets) // 2, 16)}, torch.tensor(0.0))
        assert float(losses["spread"]) == pytest.approx(spread, abs=0.01)


@pytest.mark.parametrize("args", [["--batch-size", "1"], ["--batch-size", "4", "--device-batch", "1"]])
def test_a_single_image_at_a_time_is_one_sentence(args, tmp_path):
    args = [*FEW, "--image-size", "16", "16", "--evaluate", *args, "--device", "cpu", "--runs", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        pretrain(lut.RECIPE, name="lut", args=[*args, "--workers", "0"])
    assert "batch norm needs at least two images: change --batch-size, --device-batch or --head-norm" in str(
        ended.value
    )


def test_a_resumed_run_has_the_same_teacher_and_statistics_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "nano", {"dim": 24, "depth": 1, "heads": 2})
    args = [*SMALL, *FEW, "--evaluate", "--device", "cpu", "--checkpoint-minutes", "0", "--keep", "99"]
    args += ["--runs", str(tmp_path), "--data", "digits"]
    pretrain(lut.RECIPE, name="lut", args=args)
    whole, folder = kept(tmp_path / "lut"), tmp_path / "lut"
    steps = sorted((folder / "checkpoint").glob("step_*"))
    assert len(steps) == 5
    for step in steps[2:]:
        shutil.rmtree(step)
    pretrain(lut.RECIPE, name="lut", args=[*args, "--resume"])
    resumed = kept(folder)
    assert {"method.teacher.1.1.running_var", "method.predictor.1.running_mean"} < set(whole)
    assert not whole["method.teacher.0.blocks.0.mlp.fc1.weight"].equal(whole["method.encoder.blocks.0.mlp.fc1.weight"])
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not whole[name].equal(resumed[name])] == []


def test_a_published_checkpoint_has_neither_predictor_nor_teacher(tmp_path: Path):
    original, fresh = method_of(small()), method_of(small(momentum=0.5))
    with torch.no_grad():
        for i, parameter in enumerate(original.parameters()):
            parameter.add_(seeded(*parameter.shape, seed=i), alpha=0.1)
    published = {}
    for name, tensor in original.state_dict().items():
        if not name.startswith(("predictor.", "teacher.", "normalize.")):
            name = (
                name.removeprefix("encoder.").replace("projector.", "head.").replace("decoder.head.", "decoder_pred.")
            )
            published[name.replace("decoder.mask_token", "mask_token").replace("decoder.", "decoder_")] = tensor
    torch.save({"model": published}, tmp_path / "lut.pth")
    report = lut.RECIPE.load(fresh, tmp_path / "lut.pth")
    assert report.dropped == []
    assert all(name.startswith(("predictor.", "teacher.", "normalize.")) for name in report.missing)
    own = original.state_dict()
    for name, tensor in fresh.state_dict().items():
        if name.startswith("teacher."):  # starts as a copy of the student that was loaded
            name = name.replace("teacher.0.", "encoder.").replace("teacher.1.", "projector.")
        assert name.startswith("predictor.") or tensor.equal(own[name]), name

    encoder = {name: tensor for name, tensor in published.items() if not name.startswith(("head", "decoder", "mask"))}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    report = lut.RECIPE.load(fresh, tmp_path / "encoder.pth")
    assert not any(name.startswith("encoder.") for name in report.missing)


def test_fine_tuning_presets_are_those_of_table_d():
    for size, epochs, rate, decay in (
        ("small", 300, 5e-4, 0.75),
        ("base", 100, 2.5e-4, 0.65),
        ("large", 50, 1e-3, 0.65),
    ):
        settings = finetune.PRESETS[f"lut_{size}"].finetune
        optimization = settings.optimization
        assert (optimization.epochs, optimization.base_lr, optimization.layer_decay) == (epochs, rate, decay)
        assert (settings.drop_path, optimization.sqrt_rule_at, optimization.batch_size) == (0.1, 1024, 1024)
    assert lut.IMAGENET.optimization.sqrt_rule_at == lut.IMAGENET.optimization.batch_size == 4096
    assert (lut.IMAGENET.momentum, lut.IMAGENET.context_weight, lut.IMAGENET.head_width) == (0.996, 0.25, 4096)
