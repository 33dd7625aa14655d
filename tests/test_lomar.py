"""LoMaR: windows that know nothing of the rest nor where they are, relative positions in the shared networks."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import DataSettings, Network, SettingsError
from common.data.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from common.evaluation.finetuning import Classifier
from common.files import read_tensors
from common.networks import attention
from common.networks.attention import Attention
from common.networks.decoder import Decoder
from common.networks.vit import SIZES, Block, ViT
from common.pretraining import pretrain
from common.report.reconstruction import pictures_of
from common.training.optimizer import parameter_groups
from common.weights.encoders import export, load_encoder
from common.weights.timm_names import timm_arguments, timm_arguments_of, timm_state
from mimkit.losses import normalized_patches
from mimkit.masking import random_tokens
from mimkit.positions import sincos
from mimkit.relative import buckets_of, num_buckets, relative_buckets
from mimkit.tokens import patchify, split, take, unpatchify

import lomar
import mae
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeded
from torch import Tensor, nn

PATCH, SIDE = 4, 3  # of a patch in pixels, of a window in patches
NOW = torch.tensor(0.0, dtype=torch.float64)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Two narrow blocks, unless a file must be recognized by its shapes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(SIZES, "narrow", {"dim": 24, "depth": 2, "heads": 3})
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(module: Any) -> Any:
    """Move all that trains away from where it starts, so that each of them matters."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(normal(*parameter.shape, seed=i), alpha=0.1 if parameter.requires_grad else 0.0)
    return module.eval()


def close(left: Any, right: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def fresh(height: int = 6, width: int = 9, channels: Any = 3, **options: Any) -> lomar.LoMaR:
    torch.manual_seed(0)
    data = DataSettings(image_size=(height * PATCH, width * PATCH), channels=channels)
    network = Network(size="narrow", patch=PATCH)  # pyright: ignore[reportArgumentType]
    options = {"windows": 2, "window_size": SIDE, "mask_ratio": 0.5, **options}
    config = lomar.Config(data=data, network=network, **options)
    return lomar.LoMaR(config, Normalize([0.4] * channels, [0.2] * channels)).eval()


@functools.cache
def method(**options: Any) -> lomar.LoMaR:
    return shaken(fresh(**options))


def pictures_for(made: lomar.LoMaR, count: int = 2, seed: int = 0) -> Tensor:
    return seeded(count, made.encoder.channels, *made.view_size, seed=seed)


def noise_of(made: lomar.LoMaR, count: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return made.noise(lambda *shape: torch.rand(*shape, generator=generator), count)


def predictions(made: lomar.LoMaR, images: Tensor, noise: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss, and what is predicted of the masked patches: (images · windows, masked, values)."""
    found: list[Any] = []
    hook = made.head.register_forward_hook(lambda _, __, answer: found.append(answer))
    loss = made(images, noise, NOW)["loss"]
    hook.remove()
    return loss, found[0]


def pixels_of(made: lomar.LoMaR, patches: Tensor) -> Tensor:
    """Where these patches of each image are, as a mask of its pixels."""
    chosen = torch.zeros(len(patches), made.height * made.width).scatter(1, patches, 1.0).bool()
    values = chosen.unsqueeze(-1).expand(-1, -1, PATCH**2)
    return unpatchify(values, height=made.height, width=made.width, patch=PATCH)


# Where a window is does not matter


@st.composite
def shifted(draw: st.DrawFn) -> tuple[dict[str, int], Tensor, tuple[int, int]]:
    """A grid of one of a few shapes, two windows in each of two images, and by how much all of them can be shifted."""
    grid = draw(st.sampled_from([{"height": 4, "width": 6}, {"height": 7, "width": 4}, {"height": 5, "width": 5}]))
    down, across = grid["height"] - SIDE, grid["width"] - SIDE
    row = st.integers(0, down)
    column = st.integers(0, across)
    anchors = torch.tensor([[[draw(row), draw(column)] for _ in range(2)] for _ in range(2)])
    (top, left), (bottom, right) = anchors.flatten(0, 1).amin(0).tolist(), anchors.flatten(0, 1).amax(0).tolist()
    shift = draw(st.integers(-top, down - bottom)), draw(st.integers(-left, across - right))
    return {**grid, "channels": draw(st.sampled_from([1, 3]))}, anchors, shift


def moved(made: lomar.LoMaR, anchors: Tensor, shift: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """Loss and predictions of images with these windows, and of the same content and windows shifted by patches."""
    images, mask = pictures_for(made), noise_of(made)["mask"]
    places = torch.tensor([made.height - SIDE + 1, made.width - SIDE + 1])
    answers = []
    for by in ((0, 0), shift):
        noise = {"anchors": (anchors + torch.tensor(by) + 0.5) / places, "mask": mask}
        assert made.anchors(noise).equal(anchors + torch.tensor(by))
        rolled = images.roll((by[0] * PATCH, by[1] * PATCH), dims=(-2, -1))
        answers.append(predictions(made, rolled, noise))
    return answers


@given(shifted())
def test_image_and_windows_shifted_by_whole_patches_change_nothing(arguments):
    sizes, anchors, shift = arguments
    before, after = moved(method(**sizes, anchors="independent"), anchors, shift)
    close(after, before, 1e-6)


@given(shifted())
def test_with_absolute_positions_a_shift_changes_what_is_predicted(arguments):
    sizes, anchors, shift = arguments
    before, after = moved(method(**sizes, anchors="independent", positions="absolute"), anchors, shift)
    same = torch.allclose(after[1], before[1], rtol=0, atol=1e-3)
    assert same == (shift == (0, 0))


def test_offsets_in_a_window_are_those_of_its_patches_in_the_whole_grid():
    made = method(windows=4)
    windows = made.patches_of(made.anchors(noise_of(made)))
    in_the_grid = made.encoder.buckets_of(windows)
    assert in_the_grid is not None
    assert isinstance(made.buckets, Tensor)
    assert in_the_grid.equal(made.buckets.expand(2, 4, -1, -1))


def test_the_place_of_a_patch_within_its_window_does_matter():
    made = method()
    images, noise = pictures_for(made), noise_of(made)
    shuffled = {**noise, "mask": noise["mask"].roll(1, dims=-1)}
    _, right = predictions(made, images, noise)
    made = shaken(fresh())
    for block in made.encoder.blocks:
        block.get_parameter("attn.rpe_k.lookup_table_weight").data.zero_()
    _, blind = predictions(made, images, noise)
    assert not torch.allclose(blind, right, atol=1e-2)
    assert not torch.allclose(predictions(method(), images, shuffled)[1], right, atol=1e-2)


# What a window sees


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_patches_outside_the_windows_are_never_read(positions: Any):
    made = method(positions=positions)
    images, noise = pictures_for(made), noise_of(made)
    inside = pixels_of(made, made.patches_of(made.anchors(noise)).flatten(1))
    assert 0.1 < inside.float().mean() < 0.5
    spoilt = images.masked_fill(~inside, torch.nan)
    assert made(spoilt, noise, NOW)["loss"].equal(made(images, noise, NOW)["loss"])
    assert made(images.masked_fill(inside, torch.nan), noise, NOW)["loss"].isnan()


def test_only_visible_patches_of_windows_are_embedded_and_all_of_them_encoded():
    made = method(windows=3, window_size=3, mask_ratio=0.8)
    embedded, read = [], []
    hooks = [
        made.encoder.patch_embed.register_forward_hook(lambda _, args, __: embedded.append(tuple(args[0].shape))),
        made.encoder.blocks[0].register_forward_hook(lambda _, args, __: read.append(tuple(args[0].shape))),
    ]
    made(pictures_for(made, 5), noise_of(made, 5), NOW)
    for hook in hooks:
        hook.remove()
    assert made.num_masked == int(9 * 0.8) == 7
    assert embedded == [(5 * 3, 2, 3 * PATCH**2)]
    assert read == [(5 * 3, 1 + 9, 24)]


def test_a_window_knows_nothing_of_the_others():
    made, alone = (method(windows=count, anchors="independent") for count in (3, 1))
    images, noise = pictures_for(made), noise_of(made)
    _, together = predictions(made, images, noise)
    for window in range(3):
        _, one = predictions(alone, images, {name: chance[:, window, None] for name, chance in noise.items()})
        close(one, together[window::3])


@pytest.mark.parametrize("normalize_target", [True, False])
def test_the_loss_is_the_squared_error_of_the_masked_patches_of_all_windows(normalize_target: bool):
    made = method(normalize_target=normalize_target)
    images, noise = pictures_for(made, 3), noise_of(made, 3)
    loss, predicted = predictions(made, images, noise)
    errors = []
    for row, (image, window) in enumerate((i, j) for i in range(3) for j in range(2)):
        top, left = made.anchors(noise)[image, window].tolist()
        mask = random_tokens(noise["mask"][image, window], num_masked=made.num_masked)
        for guess, place in zip(predicted[row], mask.nonzero().flatten().tolist(), strict=True):
            H, W = (top + place // SIDE) * PATCH, (left + place % SIDE) * PATCH
            patch = (images[image, :, H : H + PATCH, W : W + PATCH].movedim(0, -1).flatten() - 0.4) / 0.2
            if normalize_target:
                patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            errors.append((guess - patch).square().mean())
    close(loss, torch.stack(errors).mean())


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_masked_pixels_do_not_leak_into_what_is_predicted(positions: Any):
    made = method(windows=1, positions=positions)
    images, noise = pictures_for(made), noise_of(made)
    windows = made.patches_of(made.anchors(noise))[:, 0]
    visible, masked = split(random_tokens(noise["mask"][:, 0], num_masked=made.num_masked), num_masked=made.num_masked)
    hidden, seen = (pixels_of(made, windows.gather(1, some)) for some in (masked, visible))
    loss, right = predictions(made, images, noise)
    other, same = predictions(made, images.where(~hidden, 1 - images**2), noise)
    assert same.equal(right)
    assert not torch.allclose(other, loss, atol=1e-3)
    _, changed = predictions(made, images.where(~seen, 1 - images**2), noise)
    assert not torch.allclose(changed, right, atol=1e-2)


def test_all_masked_patches_of_a_window_get_one_prediction_until_the_tables_tell_them_apart():
    made = fresh(mask_ratio=0.8)
    images, noise = pictures_for(made), noise_of(made)
    tables = [block.get_parameter("attn.rpe_k.lookup_table_weight") for block in made.encoder.blocks]
    assert all((table == 0).all() for table in tables)
    _, at_the_start = predictions(made, images, noise)
    assert at_the_start.std() > 0.1
    close(at_the_start, at_the_start[:, :1].expand_as(at_the_start), 1e-6)
    made(images, noise, NOW)["loss"].backward()
    assert all(table.grad is not None and table.grad.abs().max() > 0 for table in tables)
    for seed, table in enumerate(tables):
        nn.init.normal_(table, std=0.1, generator=torch.Generator().manual_seed(seed))
    _, later = predictions(made, images, noise)
    gaps = (later.unsqueeze(1) - later.unsqueeze(2)).abs().amax(dim=-1)
    assert (gaps + torch.eye(made.num_masked) > 1e-3).all()


def test_positions_are_added_to_mask_tokens_where_they_are_absolute():
    made = fresh(positions="absolute", mask_ratio=0.8)
    _, at_the_start = predictions(made, pictures_for(made), noise_of(made))
    assert not torch.allclose(at_the_start[:, :1], at_the_start[:, 1:2], atol=1e-3)
    assert made.buckets is None
    assert not any("rpe_k" in name for name, _ in made.named_parameters())


# The windows of an image


def test_each_image_has_windows_of_its_own_or_those_of_the_batch():
    noise = noise_of(method(windows=4), 8)
    own, shared = (method(windows=4, windows_of=of).anchors(noise) for of in ("image", "batch"))
    assert own.shape == shared.shape == (8, 4, 2)
    assert len({str(windows.tolist()) for windows in own}) == 8
    assert all(windows.equal(own[0]) for windows in shared)


def test_the_loss_is_that_of_the_pairs_however_they_are_made():
    made, plain = method(windows=3, windows_of="batch"), method(windows=3, anchors="independent")
    images, noise = pictures_for(made, 6), noise_of(made, 6)
    places = torch.tensor([made.height - SIDE + 1, made.width - SIDE + 1])
    chance = {"anchors": (made.anchors(noise) + 0.5) / places, "mask": noise["mask"]}
    close(predictions(made, images, noise), predictions(plain, images, chance), 1e-6)


def test_independent_windows_may_be_more_than_places():
    made = method(height=4, width=5, windows=7, anchors="independent")
    noise = noise_of(made, 9)
    anchors = made.anchors(noise)
    assert set(noise) == {"anchors", "mask"}
    assert anchors.shape == (9, 7, 2)
    assert (anchors.amin((0, 1)).tolist(), anchors.amax((0, 1)).tolist()) == ([0, 0], [1, 2])
    assert made(pictures_for(made, 9), noise, NOW)["loss"].isfinite()


def test_distinct_windows_share_no_row_and_no_column():
    made = method(windows=4)
    for windows in made.anchors(noise_of(made, 20)):
        assert [len(places.unique()) for places in windows.T] == [4, 4]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"windows": 5}, "--windows 5: 1 to 4 have a first row and a first column of their own"),
        ({"windows": 0}, "--windows 0: 1 to 4 have a first row and a first column of their own"),
        (
            {"windows": 0, "anchors": "independent"},
            "--windows 0: 1 to 4 have a first row and a first column of their own",
        ),
        ({"window_size": 7}, "--window-size 7 does not fit into a grid of 6 × 9 patches"),
        ({"window_size": 0}, "--window-size 0 does not fit into a grid of 6 × 9 patches"),
        *[
            ({"mask_ratio": ratio}, f"--mask-ratio {ratio} of 9 patches does not leave both kinds")
            for ratio in (0.0, 0.1, 1.0, 1.2, -0.5, float("nan"), float("inf"))
        ],
    ],
)
def test_options_that_cannot_be_are_refused_in_one_sentence(options: Any, sentence: str):
    with pytest.raises(SettingsError) as caught:
        fresh(**options)
    assert str(caught.value) == sentence


def test_a_wrong_option_ends_the_program_with_the_sentence(tmp_path: Path):
    args = ["--preset", "digits", "--windows", "6", "--runs", str(tmp_path), "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        pretrain(lomar.RECIPE, name="lomar", args=args)
    assert ended.value.code == "lomar: --windows 6: 1 to 5 have a first row and a first column of their own"


def test_as_many_are_masked_as_in_the_published_code():
    """Cut in double precision: 10 · 10 · 0.29 is less than 29."""
    counts = [(7, 0.8, 39), (7, 0.75, 36), (7, 0.6, 29), (10, 0.29, 28)]
    for side, ratio, masked in counts:
        made = fresh(height=10, width=10, window_size=side, mask_ratio=ratio, windows=1)
        assert made.num_masked == masked


# The preset, and how training starts


def test_the_preset_is_the_published_one():
    config = lomar.IMAGENET
    assert (config.windows, config.window_size, config.mask_ratio, config.normalize_target) == (4, 7, 0.8, True)
    settings, tuned = config.optimization, config.finetune
    assert (settings.epochs, settings.warmup_epochs, settings.batch_size) == (1600, 80, 4096)
    assert (settings.base_lr, settings.weight_decay, settings.betas) == (1.5e-4, 0.05, (0.9, 0.95))
    assert (tuned.optimization.epochs, tuned.optimization.warmup_epochs, tuned.optimization.batch_size) == (
        100,
        5,
        1024,
    )
    assert (tuned.optimization.base_lr, tuned.optimization.layer_decay) == (5e-4, 0.65)
    assert (tuned.pool, tuned.drop_path) == ("mean", 0.1)


def test_it_is_as_large_as_the_published_one():
    with torch.device("meta"):
        made = lomar.LoMaR(lomar.IMAGENET, Normalize(IMAGENET_MEAN, IMAGENET_STD))
    sizes = {name: parameter.numel() for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert sum(size for name, size in sizes.items() if "lookup_table" in name) == 12 * 64 * 50
    assert round(sum(sizes.values()) / 1e6, 1) == 86.3
    assert made.num_masked == 39


def test_tables_and_tokens_decay_and_vectors_do_not():
    made = fresh()
    groups = parameter_groups(made, lomar.IMAGENET.optimization)
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    tokens = ("cls_token", "mask_token", "lookup_table_weight")
    assert {value for name, value in decay.items() if name.endswith(tokens)} == {0.05}
    assert {value for name, value in decay.items() if name.endswith("bias") or "norm" in name} == {0.0}


# Relative positions in the shared networks


def network(**changes: Any) -> ViT:
    sizes = {"height": 3, "width": 4, "patch": 4, "channels": 3, "dim": 24, "depth": 2, "heads": 3}
    return shaken(ViT(**{**sizes, "table": None, "relative": "contextual", "mask_token": True, **changes}))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("plain", [True, False])
def test_attention_adds_the_unscaled_query_times_the_vector_of_the_bucket(
    plain: bool, shared: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "explicit", lambda *_, **__: plain)
    layer, x = shaken(Attention(12, 3, buckets=50)), normal(2, 7, 12)
    whole = relative_buckets(height=2, width=3)
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 4, 6, 2, 1, 5, 3]])
    buckets = whole if shared else buckets_of(whole, tokens)
    q, k, v = F.linear(x, layer.qkv.weight, layer.qkv.bias).view(2, 7, 3, 3, 4).permute(2, 0, 3, 1, 4)
    table = layer.get_parameter("rpe_k.lookup_table_weight")[0]
    scores = q @ k.mT / 2
    for image in range(2):
        for i in range(7):
            for j in range(7):
                bucket = int(buckets[i, j] if shared else buckets[image, i, j])
                scores[image, :, i, j] = scores[image, :, i, j] + q[image, :, i] @ table[:, bucket]
    answer = layer.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
    close(layer(x, buckets=buckets), answer)
    for last in (0, 1, 4, 7):
        close(layer(x, num_queries=last, buckets=buckets), answer[:, 7 - last :])
        block = shaken(Block(12, 3, buckets=50))
        close(block(x, num_queries=last, buckets=buckets), block(x, buckets=buckets)[:, 7 - last :])


@pytest.mark.parametrize("class_token", [True, False])
def test_without_positions_in_the_tokens_buckets_tell_where_patches_are(class_token: bool):
    encoder, patches = network(class_token=class_token), normal(2, 12, 48)
    assert encoder.pos_embed is None
    assert (encoder.positions == 0).all()
    assert encoder.blocks[0].get_parameter("attn.rpe_k.lookup_table_weight").shape == (1, 8, 49 + class_token)
    tokens, order = encoder(patches, None), seeded(12).argsort()
    assert tokens.equal(encoder(patches, encoder.positions))
    shuffled = encoder(patches[:, order], None, buckets=encoder.buckets_of(order))
    close(shuffled[:, :class_token], tokens[:, :class_token])
    close(shuffled[:, class_token:], tokens[:, class_token:][:, order])
    assert not torch.allclose(
        encoder(patches[:, order], None)[:, class_token:], tokens[:, class_token:][:, order], atol=0.01
    )


def test_embedding_the_visible_patches_alone_is_embedding_all_and_masking():
    encoder, patches, mask = network(), normal(2, 12, 48), random_tokens(seeded(2, 12), num_masked=7)
    visible, _ = split(mask, num_masked=7)
    whole = encoder(patches, None, mask=mask)
    close(encoder(take(patches, visible), None, mask=mask), whole)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder.unnormalized(take(patches, visible), None, mask=mask).dtype == torch.float32


def test_49_visible_patches_of_14_by_14_without_their_buckets_are_refused():
    encoder = network(height=14, width=14, depth=1)
    visible = seeded(2, 196).argsort(dim=-1)[:, :49].sort().values
    patches, sentence = normal(2, 49, 48), "relative positions are those of all 196 patches, not of a part"
    for part in (visible, visible[:, :48]):
        with pytest.raises(ValueError, match=sentence):
            encoder(patches[:, : part.shape[1]], None)
    known = encoder(patches, None, buckets=encoder.buckets_of(visible))
    as_a_window = encoder(patches, None, buckets=relative_buckets(height=7, width=7))
    assert not torch.allclose(known, as_a_window, atol=0.01)
    with pytest.raises(ValueError, match=sentence.replace("196", "49")):
        encoder(patches[:, :48], None, buckets=encoder.buckets_of(visible))
    with pytest.raises(ValueError, match=sentence.replace("196", "49")):
        encoder(patches, None, num_outputs=3, buckets=encoder.buckets_of(visible))


def test_an_encoder_without_such_positions_has_no_buckets():
    encoder = network(table=sincos, relative=None)
    assert encoder.buckets is None
    assert encoder.buckets_of(torch.tensor([[0, 3]])) is None


@pytest.mark.parametrize("class_token", [True, False])
def test_a_decoder_without_a_table_has_relative_positions_in_any_order(class_token: bool):
    sizes = {"height": 3, "width": 4, "encoder_dim": 8, "dim": 12, "depth": 2, "heads": 3, "outputs": 5}
    decoder = shaken(Decoder(**sizes, class_token=class_token, table=None))  # pyright: ignore
    latent, order = normal(2, class_token + 5, 8), seeded(2, 12).argsort(dim=-1)
    visible, masked = order[:, :5], order[:, 5:]
    answer = decoder(latent, visible, masked, visible_too=True)
    close(decoder(latent, visible, masked), answer[:, 5:])

    # in raster order, with the buckets of the whole grid
    x = decoder.sequence(latent, visible, masked)
    raster = F.pad(order.argsort(dim=-1) + class_token, (int(class_token), 0))
    x = take(x, raster)
    for block in decoder.blocks:
        x = block(x, buckets=relative_buckets(height=3, width=4, num_prefix=int(class_token)))
    close(take(decoder.head(decoder.norm(x))[:, class_token:], order), answer)
    assert not torch.allclose(decoder(latent, visible.flip(1), masked), answer[:, 5:], atol=0.01)


def relative_mae(height: int = 4, width: int = 6) -> mae.MAE:
    torch.manual_seed(0)
    data, network = DataSettings(image_size=(height * PATCH, width * PATCH)), Network(size="nano", patch=PATCH)
    network = replace(network, decoder_dim=24, decoder_depth=2, decoder_heads=2)
    config = replace(mae.PRESETS["digits"], data=data, network=network, positions="relative")
    return shaken(mae.MAE(config, Normalize([0.4] * 3, [0.2] * 3)))


def test_mae_with_relative_positions_has_no_others():
    made = relative_mae()
    assert made.encoder.pos_embed is None
    assert (made.decoder.pos_embed == 0).all()
    tables = [name for name, _ in made.named_parameters() if "lookup_table_weight" in name]
    assert len(tables) == made.encoder.depth + 2
    absolute = {name for name, _ in mae.MAE(mae.PRESETS["digits"], Normalize([0.5], [0.5])).named_parameters()}
    assert absolute - {name for name, _ in made.named_parameters()} == {"encoder.pos_embed"}


def test_to_mae_with_relative_positions_the_order_of_visible_patches_does_not_matter():
    made = relative_mae()
    patches, order = patchify(made.normalize(seeded(2, 3, 16, 24)), patch=PATCH), seeded(2, 24).argsort(dim=-1)
    visible, masked = order[:, :6], order[:, 6:]
    again = seeded(2, 6, seed=1).argsort(dim=-1)

    def encode(seen: Tensor) -> Tensor:
        return made.encoder(take(patches, seen), None, buckets=made.encoder.buckets_of(seen))

    latent, shuffled = encode(visible), encode(visible.gather(1, again))
    close(shuffled, take(latent, F.pad(again + 1, (1, 0))))
    right = made.decoder(latent, visible, masked)
    close(made.decoder(shuffled, visible.gather(1, again), masked), right)
    elsewhere = made.encoder(take(patches, visible), None, buckets=made.encoder.buckets_of(visible.flip(1)))
    assert not torch.allclose(elsewhere, latent, atol=0.01)


def test_mae_with_relative_positions_learns_all_its_weights_and_can_be_drawn():
    made = relative_mae()
    images, noise = seeded(2, 3, 16, 24), {"mask": seeded(2, 24, seed=1)}
    made(images, noise, NOW)["loss"].backward()
    assert all(parameter.grad is not None for parameter in made.parameters() if parameter.requires_grad)
    assert all(columns.isfinite().all() for columns in pictures_of(made, images, noise).columns.values())


# Pictures


@pytest.mark.parametrize("normalize_target", [True, False])
def test_a_picture_shows_image_window_what_is_seen_and_a_reconstruction(normalize_target: bool):
    made = method(normalize_target=normalize_target)
    images, noise = pictures_for(made, 3), noise_of(made, 3)
    drawn = made.pictures((255 * images).to(torch.uint8), noise)
    normalized = ["prediction", "target"] if normalize_target else []
    assert list(drawn.columns) == ["image", "input", "seen", "reconstruction", *normalized]
    images = (255 * images).to(torch.uint8).float() / 255
    mask = random_tokens(noise["mask"][:, 0], num_masked=made.num_masked)
    for i, (top, left) in enumerate(made.anchors(noise)[:, 0].tolist()):
        rows, columns = (slice(first * PATCH, (first + SIDE) * PATCH) for first in (top, left))
        window = images[i, :, rows, columns]
        hidden = mask[i].view(1, SIDE, SIDE).repeat_interleave(PATCH, -2).repeat_interleave(PATCH, -1)
        close(drawn.columns["input"][i], window)
        close(drawn.columns["seen"][i], window.masked_fill(hidden, 0.5))
        reconstruction = drawn.columns["reconstruction"][i]
        close(reconstruction.masked_fill(hidden, 0.0), window.masked_fill(hidden, 0.0))
        assert not torch.allclose(reconstruction, window, atol=0.05)
    framed = drawn.columns["image"]
    assert framed.shape == (3, 3, 24 * 9, 36 * 9)
    shown = (framed[..., ::9, ::9] == images).all(dim=1)
    inside = pixels_of(made, made.patches_of(made.anchors(noise))[:, 0])[:, 0]
    assert shown[~inside].all()
    assert not shown.all()


@pytest.mark.parametrize("normalize_target", [True, False])
def test_with_a_perfect_prediction_the_reconstruction_is_the_window(
    normalize_target: bool, monkeypatch: pytest.MonkeyPatch
):
    made = method(normalize_target=normalize_target)
    images, noise = pictures_for(made), noise_of(made)
    mask = random_tokens(noise["mask"][:, 0], num_masked=made.num_masked)
    _, masked = split(mask, num_masked=made.num_masked)
    patches = take(patchify(made.normalize(images), patch=PATCH), made.patches_of(made.anchors(noise))[:, 0])
    truth = take(normalized_patches(patches) if normalize_target else patches, masked)
    monkeypatch.setattr(made.head, "forward", lambda _: truth)
    drawn = made.pictures(images, noise).columns
    torch.testing.assert_close(drawn["reconstruction"], drawn["input"], rtol=1e-3, atol=1e-3)


# Files


def published(made: lomar.LoMaR, path: Path) -> Path:
    """Write the weights as the authors name them, with the position table that they store and never read."""
    names = {name: name.removeprefix("encoder.").replace("head.", "encoder_pred.") for name in made.state_dict()}
    content = {names[name]: tensor for name, tensor in made.state_dict().items() if "normalize" not in name}
    content["pos_embed"] = normal(1, 1 + made.height * made.width, 96)
    torch.save({"model": content, "epoch": 1600}, path)
    return path


def square(**options: Any) -> lomar.LoMaR:
    torch.manual_seed(0)
    data, network = DataSettings(image_size=(20, 20)), Network(size="nano", patch=PATCH)
    options = {"windows": 2, "window_size": SIDE, **options}
    return lomar.LoMaR(lomar.Config(data=data, network=network, **options), Normalize(IMAGENET_MEAN, IMAGENET_STD))


def test_a_published_checkpoint_goes_on_where_it_was(tmp_path: Path):
    original = shaken(square())
    path = published(original, tmp_path / "lomar.pth")
    assert "blocks.3.attn.rpe_k.lookup_table_weight" in torch.load(path)["model"]
    loaded = square()
    printed = str(lomar.RECIPE.load(loaded, path)).splitlines()
    table = "blocks.0.attn.rpe_k.lookup_table_weight"
    assert f"renamed  {table} → encoder.{table}" in printed
    assert "renamed  encoder_pred.weight → head.weight" in printed
    assert [line for line in printed if line.startswith("dropped")] == ["dropped  pos_embed"]
    assert {line for line in printed if line.startswith("missing")} == {
        "missing  normalize.mean",
        "missing  normalize.std",
    }
    images, noise = pictures_for(original), noise_of(original)
    assert loaded(images, noise, NOW)["loss"].equal(original(images, noise, NOW)["loss"])


def test_the_encoder_of_a_published_checkpoint_is_loaded_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    original = shaken(square())
    path = published(original, tmp_path / "lomar.pth")
    encoder, normalize = load_encoder(path)
    printed = set(capsys.readouterr().out.splitlines())
    dropped = ("pos_embed", "mask_token", "encoder_pred.weight", "encoder_pred.bias")
    assert printed == {f"{path}:", *(f"dropped  {name}" for name in dropped)}
    assert (encoder.relative, encoder.pos_embed, encoder.mask_token) == ("contextual", None, None)
    assert (encoder.height, encoder.width, encoder.heads) == (5, 5, 3)
    assert normalize.mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)
    patches = patchify(normalize(pictures_for(original)), patch=PATCH)
    assert encoder(patches, None).equal(original.encoder(patches, None))


def test_the_arguments_can_be_read_off_the_shapes():
    encoder = network(height=3, width=3)
    state = {**timm_state(encoder), "pos_embed": torch.zeros(1, 10, 24)}  # a published file has one
    assert timm_arguments_of(state, "file") == timm_arguments(encoder)
    assert timm_arguments(encoder)["relative"] == "contextual"
    assert "mask_token" not in state


@pytest.fixture
def exported(tmp_path: Path) -> tuple[ViT, Path]:
    encoder = network()
    export(tmp_path / "encoder.safetensors", encoder, Normalize([0.4] * 3, [0.2] * 3))
    return encoder, tmp_path / "encoder.safetensors"


def test_an_exported_encoder_gives_the_same_tokens(exported: tuple[ViT, Path], capsys: Any):
    encoder, path = exported
    loaded, normalize = load_encoder(path, drop=0.2)
    assert capsys.readouterr().out == ""
    assert normalize.mean.flatten().tolist() == pytest.approx([0.4] * 3)
    assert set(read_tensors(path)[1]) == {"mimkit", "mean", "std"}  # timm has no such network
    assert [float(block.drop) for block in loaded.blocks] == pytest.approx([0, 0.2])  # pyright: ignore
    patches = normal(2, 12, 48)
    assert loaded(patches, loaded.positions).equal(encoder(patches, None))
    again = path.with_name("again.safetensors")
    export(again, loaded, normalize)
    assert load_encoder(again)[0](patches, None).equal(encoder(patches, None))


@pytest.mark.parametrize("class_token", [True, False])
def test_tables_fit_another_grid_as_they_are(class_token: bool, tmp_path: Path):
    encoder, path = network(class_token=class_token), tmp_path / "encoder.safetensors"
    export(path, encoder, Normalize([0.4] * 3, [0.2] * 3))
    loaded, _ = load_encoder(path, image_size=(24, 8), class_token=class_token)
    assert (loaded.height, loaded.width, loaded.num_prefix) == (6, 2, int(class_token))
    own = encoder.state_dict()
    assert all(tensor.equal(own[name]) for name, tensor in loaded.state_dict().items())
    assert set(own) - set(loaded.state_dict()) == {"mask_token"}
    patches, grid = normal(2, 12, 48), relative_buckets(height=6, width=2, num_prefix=int(class_token))
    close(loaded(patches, None), encoder(patches, None, buckets=grid))
    assert not torch.allclose(loaded(patches, None), encoder(patches, None), atol=0.01)
    assert int(grid.max()) < num_buckets(num_prefix=int(class_token))


def test_an_encoder_from_scratch_has_the_same_parts_and_knows_nothing(exported: tuple[ViT, Path]):
    fresh, _ = load_encoder(exported[1], scratch=True, seed=1)
    loaded, _ = load_encoder(exported[1])
    assert {k: t.shape for k, t in fresh.state_dict().items()} == {k: t.shape for k, t in loaded.state_dict().items()}
    assert (fresh.get_parameter("blocks.1.attn.rpe_k.lookup_table_weight") == 0).all()


def test_an_encoder_with_absolute_positions_is_timms(tmp_path: Path):
    made = shaken(square(positions="absolute"))
    export(tmp_path / "encoder.safetensors", made.encoder, made.normalize)
    assert "timm" in read_tensors(tmp_path / "encoder.safetensors")[1]
    loaded, _ = load_encoder(tmp_path / "encoder.safetensors")
    patches = patchify(made.normalize(pictures_for(made)), patch=PATCH)
    assert loaded(patches, loaded.positions).equal(made.encoder(patches, made.encoder.positions))


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_fine_tuning_works_on_another_image_size_and_trains_the_tables(exported: tuple[ViT, Path], pool: Any):
    encoder, normalize = load_encoder(exported[1], image_size=(20, 28))
    classifier = Classifier(encoder, normalize, 5, pool=pool, head_scale=1.0)
    images = (256 * seeded(2, 3, 20, 28)).to(torch.uint8)
    noise = classifier.noise(lambda *shape: seeded(*shape), 2)
    classifier((images, torch.arange(2)), noise, NOW)["loss"].backward()
    untrained = {name for name, parameter in classifier.named_parameters() if parameter.grad is None}
    assert untrained == ({"encoder.norm.weight", "encoder.norm.bias"} if pool == "mean" else set())
    table = encoder.get_parameter("blocks.0.attn.rpe_k.lookup_table_weight").grad
    assert table is not None
    assert (table[..., relative_buckets(height=5, width=7).unique()] != 0).any(dim=1).all()
    settings = lomar.IMAGENET.finetune.optimization
    groups = parameter_groups(classifier, replace(settings, layer_decay=0.5), depth=2)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    tables = [scales[f"encoder.blocks.{i}.attn.rpe_k.lookup_table_weight"] for i in range(2)]
    assert tables == [scales[f"encoder.blocks.{i}.attn.proj.weight"] for i in range(2)] == [0.25, 0.5]


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_a_classifier_of_some_patches_knows_where_they_are(pool: Any):
    class Choose(nn.Module):
        def forward(self, patches: Tensor, noise: Tensor) -> Tensor:
            return noise.argsort(dim=-1)

    encoder, normalize = network(mask_token=False), Normalize([0.4] * 3, [0.2] * 3)
    whole = Classifier(encoder, normalize, 5, pool=pool, head_scale=1.0)
    shuffled = Classifier(encoder, normalize, 5, pool=pool, head_scale=1.0, select=Choose())
    images = seeded(2, 3, 12, 16)
    close(shuffled.features(images, {"select": seeded(2, 12), "drop_path": None}), whole.features(images))
