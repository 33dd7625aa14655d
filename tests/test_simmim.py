"""SimMIM: large cells, the window around each pixel, absolute errors, an encoder that knows relative positions."""

import argparse
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import DataSettings, Network, Optimization, SettingsError, known
from common.data.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from common.evaluation.finetuning import Classifier
from common.networks import attention
from common.networks.attention import Attention, RelativeBias, attend, relative_index, table_bias
from common.networks.building import masking_encoder, whole_cells
from common.networks.decoder import PixelHead
from common.networks.initialization import initialize_simmim
from common.networks.vit import Block, ViT
from common.report.reconstruction import pictures_of
from common.training.optimizer import parameter_groups
from common.training.schedules import by_last_step, learning_rate
from common.weights.encoders import export, load_encoder
from common.weights.reading import read_foreign
from common.weights.resizing import own_tables
from common.weights.timm_names import OWN_TABLE, SHARED_TABLE, timm_arguments, timm_arguments_of, timm_state
from mimkit.losses import window_normalized
from mimkit.masking import random_cells
from mimkit.positions import sincos
from mimkit.tokens import patchify, unpatchify

import pytest
import simmim
import torch
import torch.nn.functional as F
from strategies import seeded
from timm.models.beit import Beit
from torch import Tensor

# Relative positions

SIZES: dict[str, Any] = {"height": 2, "width": 3, "patch": 4, "channels": 3, "dim": 24, "depth": 2, "heads": 3}
N = 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(module: Any) -> Any:
    """Move all parameters away from where they start, so that each of them matters."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(normal(*parameter.shape, seed=i), alpha=0.2)
    return module.eval()


def network(**changes: Any) -> ViT:
    usual = {"key_bias": False, "relative": "shared", "table": None, "layer_scale": 0.1, "mask_token": True}
    return shaken(ViT(**{**SIZES, **usual, **changes}))


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (3, 2), (4, 4)])
def test_a_relative_bias_is_that_of_the_offset_and_the_class_token_has_its_own(height: int, width: int):
    bias = shaken(RelativeBias(height, width, 2))
    table, found = bias.relative_position_bias_table, bias()
    assert found.shape == (2, 1 + height * width, 1 + height * width)
    for query in range(height * width):
        for key in range(height * width):
            (a, b), (c, d) = divmod(query, width), divmod(key, width)
            row = (a - c + height - 1) * (2 * width - 1) + b - d + width - 1
            assert found[:, 1 + query, 1 + key].equal(table[row])
    assert (found[:, 0, 1:] == table[-3, :, None]).all()
    assert (found[:, 1:, 0] == table[-2, :, None]).all()
    assert found[:, 0, 0].equal(table[-1])
    assert len(table) == (2 * height - 1) * (2 * width - 1) + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bfloat16 goes another way on a CPU
@pytest.mark.parametrize("shape", [(3, 5, 5), (5, 5), (2, 3, 5, 5)])
def test_a_bias_is_added_to_the_scores_before_the_softmax(dtype: torch.dtype, shape: tuple[int, ...]):
    q, k, v = (normal(2, 3, 5, 8, seed=i).to(dtype) for i in range(3))
    bias = normal(*shape, seed=3)
    weights = (q.double() @ k.double().mT / 8**0.5 + bias).softmax(dim=-1)
    found = attend(q, k, v, bias)
    assert found.dtype == dtype
    close(found, (weights @ v.double()).to(dtype), 0.03 if dtype == torch.bfloat16 else 1e-5)


def test_the_gradient_of_a_bias_is_the_same_both_ways(monkeypatch: pytest.MonkeyPatch):
    q, k, v = (normal(2, 3, 5, 8, seed=i) for i in range(3))
    gradients = []
    for plain in (True, False):
        monkeypatch.setattr(attention, "explicit", lambda *_, plain=plain, **__: plain)
        bias = normal(3, 5, 5, seed=3).requires_grad_()
        attend(q, k, v, bias).square().sum().backward()
        gradients.append(bias.grad)
    close(*gradients)


@pytest.mark.parametrize("grid", [None, (2, 3)])
@pytest.mark.parametrize("num_queries", [0, 1, 4, 7])
def test_queries_of_the_last_tokens_have_the_last_rows_of_the_bias(num_queries: int, grid: Any):
    x, bias = normal(2, 1 + N, 12), normal(3, 1 + N, 1 + N, seed=1)
    for layer in (shaken(Attention(12, 3, grid=grid)), shaken(Block(12, 3, grid=grid, layer_scale=0.1))):
        last = layer(x, num_queries=num_queries, bias=bias)
        close(last, layer(x, bias=bias)[:, 1 + N - num_queries :])


def test_a_bias_and_a_table_of_its_own_add_up():
    layer, x, bias = shaken(Attention(12, 3, grid=(2, 3))), normal(2, 1 + N, 12), normal(3, 1 + N, 1 + N, seed=1)
    plain = Attention(12, 3)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "relative" not in k})
    close(layer(x, bias=bias), plain(x, bias=bias + table_bias(layer)))
    close(layer(x), plain(x, bias=table_bias(layer)))


def test_what_is_added_to_all_scores_of_a_query_changes_nothing():
    layer, x = shaken(Attention(12, 3)), normal(2, N, 12)
    close(layer(x, bias=normal(3, N, 1).expand(3, N, N)), layer(x))


def test_a_shared_table_is_one_in_every_block():
    shared, patches = network(), normal(2, N, 48)
    each = network(relative="each")
    state = own_tables(shared.state_dict(), depth=2, height=2, width=3, new_height=2, new_width=3)
    each.load_state_dict(state)
    close(each(patches, each.positions), shared(patches, shared.positions))
    with torch.no_grad():
        each.get_parameter(OWN_TABLE.format(1)).add_(normal(18, 3))
    assert not torch.allclose(each(patches, each.positions), shared(patches, shared.positions), atol=1e-3)


@pytest.mark.parametrize("relative", ["shared", "each", None])
@pytest.mark.parametrize("table", [sincos, None])
@pytest.mark.parametrize("layer_scale", [0.1, None])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_such_encoder_is_timms_beit_with_the_arguments_that_it_tells(
    relative: Any, table: Any, layer_scale: float | None, channels: int
):
    if (relative, table, layer_scale) == (None, sincos, None):
        return  # a plain ViT, see test_vit.py
    encoder = network(relative=relative, table=table, layer_scale=layer_scale, channels=channels)
    twin = Beit(**timm_arguments(encoder)).eval()
    twin.load_state_dict(timm_state(encoder), strict=True)
    images = normal(2, channels, 8, 12)
    close(encoder(patchify(images, patch=4), encoder.positions), twin.forward_features(images))


def test_timm_has_no_such_network():
    sentence = "timm has no network with a key bias, or without class token, that has relative or no positions"
    for changes in ({"key_bias": True}, {"relative": None, "class_token": False}):
        with pytest.raises(ValueError, match=sentence):
            timm_state(network(**changes))


# Mask tokens and layer scale


@pytest.mark.parametrize("table", [sincos, None])
def test_masked_patches_are_not_seen_and_the_others_are(table: Any):
    encoder, patches, mask = network(table=table), normal(2, N, 48), seeded(2, N) < 0.5
    tokens = encoder(patches, encoder.positions, mask=mask)
    hidden = torch.where(mask[..., None], torch.nan, patches)
    assert encoder(hidden, encoder.positions, mask=mask).equal(tokens)
    changed = torch.where(mask[..., None], patches, 7.0)
    assert not torch.allclose(encoder(changed, encoder.positions, mask=mask), tokens, atol=1e-3)
    close(encoder(patches, encoder.positions, mask=torch.zeros_like(mask)), encoder(patches, encoder.positions))


def test_the_mask_token_gets_the_position_of_what_it_stands_for():
    encoder = network(depth=0, table=sincos)
    found = encoder.unnormalized(normal(1, N, 48), encoder.positions, mask=torch.ones(1, N, dtype=torch.bool))
    close(found[0, 1:], encoder.mask_token[0] + encoder.positions)  # pyright: ignore


def test_without_a_table_positions_are_zero_and_the_class_token_is_itself():
    encoder = network(depth=0)
    assert encoder.pos_embed is None
    assert encoder.positions.equal(torch.zeros(N, 24))
    assert encoder.unnormalized(normal(1, N, 48), encoder.positions)[:, :1].equal(encoder.cls_token)  # pyright: ignore


def test_in_mixed_precision_the_residual_stream_stays_float32():
    encoder, patches, mask = network(), normal(2, N, 48), seeded(2, N) < 0.5
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder.unnormalized(patches, encoder.positions, mask=mask)
        assert encoder.unnormalized(patches, encoder.positions).dtype == torch.float32
    assert mixed.dtype == torch.float32
    close(mixed, encoder.unnormalized(patches, encoder.positions, mask=mask), 0.05)


def test_layer_scale_is_a_factor_of_each_channel_of_a_branch():
    block, plain, x = shaken(Block(12, 3, layer_scale=0.1)), Block(12, 3).eval(), normal(2, N, 12)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if "gamma" not in k})
    after = x + block.gamma_1 * plain.attn(plain.norm1(x))
    close(block(x), after + block.gamma_2 * plain.mlp(plain.norm2(after)))
    block.gamma_1.data.fill_(1.0)
    block.gamma_2.data.fill_(1.0)
    assert block(x).equal(plain(x))
    assert block(x, torch.zeros(2, 2)).equal(block(x))
    assert (Block(12, 3, layer_scale=0.25).gamma_2 == 0.25).all()


def test_without_the_options_there_is_nothing_of_them():
    names = {name.split(".")[-1] for name in ViT(**SIZES).state_dict()}
    assert names == {"cls_token", "pos_embed", "weight", "bias"}
    assert "mask_token" not in timm_state(network(relative=None, table=sincos, layer_scale=None))


# The head, and how training starts


@pytest.mark.parametrize("channels", [1, 3])
def test_the_head_is_a_convolution_and_depth_to_space(channels: int):
    head, tokens = PixelHead(4, channels, 24), normal(2, N, 24)
    picture = F.pixel_shuffle(head.proj(tokens.mT.unflatten(-1, (2, 3))), 4)
    close(unpatchify(head(tokens), height=2, width=3, patch=4), picture)
    assert 0.9 * 24**-0.5 < head.proj.weight.abs().max() <= 24**-0.5  # PyTorch's default


def is_cut_normal(weight: Tensor) -> None:
    assert 0.0195 < weight.abs().max() <= 0.02 * (1 + 1e-6)
    torch.testing.assert_close(weight.std().item(), 0.0108, rtol=0.05, atol=0)


def test_simmim_starts_with_normals_cut_at_one_standard_deviation_and_calm_branches():
    torch.manual_seed(0)
    sizes = {**SIZES, "dim": 192, "depth": 3}
    encoder = ViT(**sizes, key_bias=False, table=None, relative="each", layer_scale=0.1, mask_token=True)
    initialize_simmim(encoder)
    for k, block in enumerate(encoder.blocks, start=1):
        for layer in ("attn.qkv", "mlp.fc1"):
            is_cut_normal(block.get_parameter(f"{layer}.weight"))
        for layer in ("attn.proj", "mlp.fc2"):
            is_cut_normal(block.get_parameter(f"{layer}.weight") * math.sqrt(2 * k))
        for name, parameter in block.named_parameters():
            if name.endswith("bias") or "table" in name:
                assert (parameter == 0).all(), name
        assert (block.get_parameter("gamma_1") == 0.1).all()
    is_cut_normal(encoder.patch_embed.proj.weight)
    assert (encoder.patch_embed.proj.bias == 0).all()  # pyright: ignore
    for token in (encoder.cls_token, encoder.mask_token):
        assert token is not None
        assert 0.019 < token.abs().max() <= 0.02


def test_only_vectors_and_the_class_token_do_not_decay():
    method = simmim.SimMIM(simmim.PRESETS["digits"], Normalize([0.5], [0.5]))
    groups = parameter_groups(method, simmim.IMAGENET.optimization)
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decay["encoder.mask_token"] == decay[f"encoder.{SHARED_TABLE}"] == decay["head.proj.weight"] == 0.05
    plain = ("gamma_1", "q_bias", "v_bias", "norm1.weight", "cls_token", "proj.bias")
    assert {value for name, value in decay.items() if name.endswith(plain)} == {0.0}


# The learning rate


def test_the_learning_rate_comes_a_step_late_and_jumps_down_where_the_warmup_ends():
    numbers: dict[str, Any] = {"lr": 1.0, "min_lr": 0.1, "start_lr": 0.2, "warmup": 4, "steps": 20}
    rates = [by_last_step(step, **numbers) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.8])
    assert rates[5] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 4 / 20)))  # as if it had begun at step 0
    assert all(a > b for a, b in itertools.pairwise(rates[5:]))
    assert rates[-1] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 18 / 20)))


def test_at_each_milestone_the_learning_rate_falls_to_a_tenth():
    settings = replace(simmim.IMAGENET.optimization, epochs=9, warmup_epochs=1, milestones=(4.0, 6.0))
    rates = [learning_rate(step, settings, 3) for step in range(27)]
    assert rates[0] == rates[1] == pytest.approx(5e-7 * 2048 / 512)
    assert rates[4:13] == pytest.approx([4e-4] * 9)  # the published peak
    assert rates[13:19] == pytest.approx([4e-5] * 6)
    assert rates[19:] == pytest.approx([4e-6] * 8)


def test_the_presets_are_the_published_ones():
    for settings, peak, start, end in (
        (simmim.IMAGENET.optimization, 1e-4, 5e-7, 0.0),
        (simmim.IMAGENET_100.optimization, 2e-4, 1e-6, 1e-5),
        (simmim.IMAGENET.finetune.optimization, 1.25e-3, 2.5e-7, 2.5e-7),
    ):
        scale = known(settings.batch_size) / 512
        assert settings.base_lr * scale * 2 == pytest.approx(peak * scale)
        assert (settings.warmup_lr, settings.min_lr) == (pytest.approx(start * scale), pytest.approx(end * scale))
        assert (settings.schedule, settings.clip, settings.betas) == ("last_step", 5.0, (0.9, 0.999))
    assert (simmim.IMAGENET.optimization.epochs, simmim.IMAGENET.optimization.milestones) == (800, (700.0,))
    assert (simmim.IMAGENET_100.optimization.epochs, simmim.IMAGENET_100.optimization.milestones) == (100, ())


# The recipe


def method(**changes: Any) -> simmim.SimMIM:
    data = DataSettings(image_size=(16, 32), channels=changes.pop("channels", 3))
    config = replace(simmim.PRESETS["digits"], data=data, network=Network(size="nano", patch=4), **changes)
    return shaken(simmim.SimMIM(config, Normalize([0.4] * data.channels, [0.2] * data.channels)))


def views(channels: int = 3) -> Tensor:
    return (256 * seeded(2, channels, 16, 32)).to(torch.uint8)


def chance(made: simmim.SimMIM) -> dict[str, Tensor]:
    return made.noise(lambda *shape: seeded(*shape, seed=len(shape)), 2)


def pixel_mask(made: simmim.SimMIM, noise: dict[str, Tensor]) -> Tensor:
    mask = random_cells(noise["mask"], **made.cells).view(2, 1, 4, 8)
    return mask.repeat_interleave(4, -2).repeat_interleave(4, -1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("target", ["pixels", "window"])
def test_the_loss_is_that_of_the_paper_on_whole_pictures(target: Any, channels: int):
    made = method(channels=channels, target=target, window=5, drop_path=0.0)
    noise, images = chance(made), views(channels)
    picture, pixels = made.normalize(images), pixel_mask(made, noise)
    mask = random_cells(noise["mask"], **made.cells)
    tokens = made.encoder(patchify(picture, patch=4), made.encoder.positions, mask=mask)[:, 1:]
    predicted = unpatchify(made.head(tokens), height=4, width=8, patch=4)
    wanted = window_normalized(picture, window=5) if target == "window" else picture
    loss = ((predicted - wanted).abs() * pixels).sum() / (pixels.sum() + 1e-5) / channels
    close(made(images, noise, torch.tensor(0.0))["loss"], loss)


def test_masked_pixels_are_a_target_and_never_an_input():
    made, images = method(), views()
    noise = chance(made)
    masked = pixel_mask(made, noise)
    hidden_changed, visible_changed = (
        torch.where(masked, 255 - images, images),
        torch.where(masked, images, 255 - images),
    )
    prediction, target, _ = made.reconstruct(images, noise)
    after, after_target, _ = made.reconstruct(hidden_changed, noise)
    assert prediction.equal(after)
    assert not target.equal(after_target)
    assert not torch.allclose(made.reconstruct(visible_changed, noise)[0], prediction, atol=1e-3)
    drawn, other = (pictures_of(made, some, noise).columns for some in (images, hidden_changed))
    assert list(drawn) == ["input", "seen", "reconstruction"]
    assert drawn["seen"].equal(other["seen"])
    close(drawn["reconstruction"], other["reconstruction"])
    difference = (drawn["reconstruction"] - drawn["input"]).abs()
    assert (difference * ~masked).max() < 1e-5
    assert (difference * masked).max() > 0.1


def test_a_windowed_target_is_drawn_beside_its_prediction():
    made, images = method(target="window", window=5), views()
    noise = chance(made)
    columns, masked = pictures_of(made, images, noise).columns, pixel_mask(made, noise)
    assert list(columns) == ["input", "seen", "reconstruction", "prediction", "target"]
    for title in ("prediction", "target"):  # of the masked patches alone
        outside = columns[title].masked_select(~masked)
        assert (outside == outside[0]).all()
        assert columns[title].masked_select(masked).std() > 0.01


def test_cells_are_masked_whole_and_their_count_is_rounded_up():
    cells, sizes = whole_cells(DataSettings(), Network(), 32, 0.6)
    assert (cells, sizes["num_masked"]) == (49, 30 * 4)
    cells, sizes = whole_cells(DataSettings(image_size=(32, 48)), Network(patch=4), 8, 0.5)
    assert (cells, sizes) == (24, {"height": 8, "width": 12, "cell_height": 2, "cell_width": 2, "num_masked": 48})


@pytest.mark.parametrize(
    ("cell", "ratio", "sentence"),
    [
        (6, 0.6, "--cell 6: images of 16 × 32 are not cut into such cells of patches of 4"),
        (12, 0.6, "--cell 12: images of 16 × 32 are not cut into such cells of patches of 4"),
        (0, 0.6, "--cell 0: images of 16 × 32 are not cut into such cells of patches of 4"),
        (-8, 0.6, "--cell -8: images of 16 × 32 are not cut into such cells of patches of 4"),
        (8, 0.9, "--mask-ratio 0.9 of 8 cells does not leave both masked and visible ones"),
        (8, 0.0, "--mask-ratio 0.0 of 8 cells does not leave both masked and visible ones"),
        (8, math.nan, "--mask-ratio nan of 8 cells does not leave both masked and visible ones"),
    ],
)
def test_cells_that_do_not_fit_are_one_sentence(cell: int, ratio: float, sentence: str):
    with pytest.raises(SettingsError) as caught:
        method(cell=cell, mask_ratio=ratio)
    assert str(caught.value) == sentence


def test_paths_are_dropped_in_pre_training_by_the_noise():
    made, images, progress = method(drop_path=0.9), views(), torch.tensor(0.0)
    noise = chance(made)
    assert noise["drop_path"].shape == (2, 6, 2)
    kept = {**noise, "drop_path": torch.ones(2, 6, 2)}
    assert made(images, noise, progress)["loss"] != made(images, kept, progress)["loss"]
    assert set(chance(method(drop_path=0.0))) == {"mask"}


@pytest.mark.parametrize("target", ["pixels", "window"])
def test_a_step_never_waits_for_the_device(target: Any):
    made = method(target=target)
    noise = {name: tensor.to("meta") for name, tensor in chance(made).items()}
    loss = made.to("meta")(views().to("meta"), noise, torch.zeros((), device="meta"))["loss"]
    loss.backward()
    assert loss.shape == ()


def test_the_encoder_is_as_large_as_the_published_one():
    with torch.device("meta"):
        encoder = masking_encoder(DataSettings(), Network())
    every = sum(parameter.numel() for parameter in encoder.parameters())
    tokens, table, per_block, ends = 2 * 768, 732 * 12, 12 * 768**2 + 14 * 768, 768**2 + 3 * 768
    assert every == tokens + table + 12 * per_block + ends
    assert every + 8192 * 769 == 91_965_776  # BEiT's, with its head for 8192 visual tokens


# Files


def square(**changes: Any) -> simmim.SimMIM:
    data, network = DataSettings(image_size=(16, 16)), Network(size="nano", patch=4)
    config = replace(simmim.PRESETS["digits"], data=data, network=network, drop_path=0.0, **changes)
    return simmim.SimMIM(config, Normalize(IMAGENET_MEAN, IMAGENET_STD)).eval()


def published(made: simmim.SimMIM, path: Path) -> Path:
    """Write the weights as the authors name them."""
    weights = {k.replace("head.proj.", "decoder.0."): t for k, t in made.state_dict().items() if "normalize" not in k}
    weights["encoder.rel_pos_bias.relative_position_index"] = relative_index(4, 4)
    torch.save({"model": weights, "config": argparse.Namespace(mask_ratio=0.6), "epoch": 800}, path)
    return path


def test_a_published_checkpoint_goes_on_where_it_was(tmp_path: Path):
    original = shaken(square())
    path = published(original, tmp_path / "simmim.pth")
    loaded = square()
    printed = str(simmim.RECIPE.load(loaded, path)).splitlines()
    assert "renamed  decoder.0.weight → head.proj.weight" in printed
    assert "dropped  encoder.rel_pos_bias.relative_position_index" in printed
    images, noise = views()[..., :16], {"mask": seeded(2, 4)}
    expected = original(images, noise, torch.tensor(0.0))["loss"]
    assert loaded(images, noise, torch.tensor(0.0))["loss"].equal(expected)


def test_the_encoder_of_a_published_checkpoint_is_loaded_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    original = shaken(square())
    path = published(original, tmp_path / "simmim.pth")
    encoder, normalize = load_encoder(path)
    printed = capsys.readouterr().out.splitlines()
    assert f"renamed  encoder.{SHARED_TABLE} → {OWN_TABLE.format('*')}" in printed
    assert "renamed  encoder.blocks.0.gamma_1 → blocks.0.gamma_1" in printed
    assert {"dropped  encoder.mask_token", "dropped  decoder.0.weight"} <= set(printed)
    assert (encoder.relative, encoder.mask_token, encoder.layer_scale) == ("each", None, 0.1)
    patches = patchify(normalize(views()[..., :16]), patch=4)
    close(encoder(patches, encoder.positions), original.encoder(patches, original.encoder.positions))
    torch.save({name: t for name, t in read_foreign(path).items() if ".1.attn.qkv" not in name}, path)
    with pytest.raises(ValueError, match=r"simmim.pth is no encoder of \d blocks: it lacks blocks.1.attn.qkv.weight$"):
        load_encoder(path)


@pytest.mark.parametrize("relative", ["shared", "each"])
@pytest.mark.parametrize("table", [sincos, None])
def test_the_arguments_can_be_read_off_the_shapes(relative: Any, table: Any):
    encoder = network(height=3, relative=relative, table=table)
    found, expected = timm_arguments_of(timm_state(encoder), "file"), timm_arguments(encoder)
    assert found == {name: expected[name] for name in found}
    assert set(expected) - set(found) == {"global_pool", "num_classes"}
    with pytest.raises(ValueError, match=r"^file: 18 relative positions are not those of a square grid$"):
        timm_arguments_of(timm_state(network(relative=relative, table=table)), "file")


@pytest.fixture
def exported(tmp_path: Path) -> tuple[ViT, Path]:
    encoder = network()
    export(tmp_path / "encoder.safetensors", encoder, Normalize([0.4] * 3, [0.2] * 3))
    return encoder, tmp_path / "encoder.safetensors"


def test_an_exported_encoder_comes_back_with_a_table_in_each_block(exported: tuple[ViT, Path], capsys: Any):
    encoder, path = exported
    loaded, normalize = load_encoder(path, drop=0.2)
    assert capsys.readouterr().out == ""
    assert normalize.mean.flatten().tolist() == pytest.approx([0.4] * 3)
    assert [float(block.drop) for block in loaded.blocks] == pytest.approx([0, 0.2])  # pyright: ignore
    patches = normal(2, N, 48)
    close(loaded(patches, loaded.positions), encoder(patches, encoder.positions))
    tables = [loaded.get_parameter(OWN_TABLE.format(i)) for i in range(2)]
    assert tables[0].equal(tables[1])
    assert tables[0].data_ptr() != tables[1].data_ptr()
    again = path.with_name("again.safetensors")
    export(again, loaded, normalize)
    close(load_encoder(again)[0](patches, loaded.positions), encoder(patches, encoder.positions))


def test_an_encoder_from_scratch_has_the_same_parts_and_knows_nothing(exported: tuple[ViT, Path]):
    fresh, _ = load_encoder(exported[1], scratch=True, seed=1)
    loaded, _ = load_encoder(exported[1])
    assert {k: t.shape for k, t in fresh.state_dict().items()} == {k: t.shape for k, t in loaded.state_dict().items()}
    assert (fresh.get_parameter(OWN_TABLE.format(1)) == 0).all()
    assert (fresh.get_parameter("blocks.0.gamma_1") == 0.1).all()
    assert fresh.get_parameter("blocks.0.attn.qkv.weight").abs().max() <= 0.02


def test_tables_are_resampled_for_another_size_and_the_class_token_keeps_its_rows(exported: tuple[ViT, Path]):
    encoder, path = exported
    table = encoder.get_parameter(SHARED_TABLE)
    loaded, _ = load_encoder(path, image_size=(16, 8))
    assert (loaded.height, loaded.width) == (4, 2)
    found = loaded.get_parameter(OWN_TABLE.format(0))
    assert found[-3:].equal(table[-3:])
    assert loaded(normal(2, 8, 48), loaded.positions).shape == (2, 9, 24)


def test_a_resampled_table_keeps_the_offset_of_nothing_and_its_symmetry():
    down, across = torch.meshgrid(torch.arange(-1.0, 2), torch.arange(-2.0, 3), indexing="ij")
    offsets = torch.cat([torch.stack([down.flatten(), across.flatten()], dim=-1), torch.zeros(3, 2)])
    sizes: dict[str, int] = {"depth": 1, "height": 2, "width": 3, "new_height": 4, "new_width": 6}
    grown = own_tables({SHARED_TABLE: offsets}, **sizes)[OWN_TABLE.format(0)][:-3].view(7, 11, 2)
    close(grown[3, 5], torch.zeros(2))
    close(grown, -grown.flip(0, 1))
    close(grown[3, 6], torch.tensor([0.0, 5 / 11]), 0.05)  # a patch of half the size is half as far
    assert own_tables({}, **sizes) == {}
    with pytest.raises(ValueError, match="a table of 15 rows is not one of a grid of 5 × 5"):
        own_tables({SHARED_TABLE: offsets}, **{**sizes, "height": 3})


def test_fine_tuning_reads_the_mean_and_trains_the_tables(exported: tuple[ViT, Path]):
    encoder, normalize = load_encoder(exported[1])
    classifier = Classifier(encoder, normalize, 5, pool="mean", head_scale=1.0)
    images = (256 * seeded(2, 3, 8, 12)).to(torch.uint8)
    noise = classifier.noise(lambda *shape: seeded(*shape), 2)
    classifier((images, torch.arange(2)), noise, torch.tensor(0.0))["loss"].backward()
    untrained = {name for name, parameter in classifier.named_parameters() if parameter.grad is None}
    assert untrained == {"encoder.norm.weight", "encoder.norm.bias"}
    groups = parameter_groups(classifier, Optimization(layer_decay=0.5), depth=2)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert [scales[f"encoder.{OWN_TABLE.format(i)}"] for i in range(2)] == [0.25, 0.5]
    assert (scales["encoder.cls_token"], scales["fc_norm.weight"], scales["head.weight"]) == (0.125, 1.0, 1.0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: network(class_token=False),
            "a table of relative positions needs a class token: three of its rows are for it",
        ),
        (
            lambda: network()(normal(2, 4, 48), torch.zeros(4, 24)),
            "relative positions are those of all 6 patches, not of a part",
        ),
        (
            lambda: network()(normal(1, N, 48), torch.zeros(N, 24), num_outputs=3),
            "relative positions are those of all 6 patches, not of a part",
        ),
        (
            lambda: network(mask_token=False)(normal(1, N, 48), torch.zeros(N, 24), mask=torch.ones(1, N).bool()),
            "an encoder without a mask token cannot mask",
        ),
    ],
)
def test_a_wrong_encoder_gets_one_sentence(call: Any, sentence: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert str(caught.value) == sentence
