"""The vision transformer against timm's, and what must not matter to it and to the decoder."""

from typing import Any, cast

from common.config import Network
from common.data.normalize import Normalize
from common.networks.attention import Attention, attend
from common.networks.decoder import Decoder, in_raster_order
from common.networks.initialization import initialize_mae, initialize_truncated
from common.networks.vit import SIZES, Block, PatchEmbed, ViT, drop_path
from common.weights.resizing import resize_positions
from common.weights.timm_names import timm_arguments, timm_arguments_of, timm_state
from mimkit.positions import resize_table, sincos, sinusoid
from mimkit.tokens import patchify, put, split, take

import beyond_masking_integrated as beyond_masking
import mae
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import fast, seeded
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

GRID: dict[str, Any] = {"height": 2, "width": 3}
N = 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(module: Any) -> Any:
    """Move all parameters away from where they start, so that each of them matters."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(normal(*parameter.shape, seed=i), alpha=0.1)
    return module.eval()


def network(**changes: Any) -> ViT:
    return shaken(ViT(**{**GRID, "patch": 4, "channels": 3, "dim": 24, "depth": 2, "heads": 3, **changes}))


def decoder(**changes: Any) -> Decoder:
    sizes = {**GRID, "encoder_dim": 8, "dim": 12, "depth": 2, "heads": 3, "outputs": 5}
    return shaken(Decoder(**{**sizes, **changes}))


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def some_patches(batch: int = 2, values: int = 48) -> Tensor:
    return normal(batch, N, values, seed=7)


# What timm says


def test_a_base_encoder_is_timms_base_encoder():
    encoder = shaken(ViT(height=14, width=14, patch=16, channels=3, **SIZES["base"]))
    twin = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    twin.load_state_dict(timm_state(encoder), strict=True)
    images = normal(1, 3, 224, 224)
    with torch.no_grad():
        tokens = encoder(patchify(images, patch=16), encoder.positions)
        close(tokens[:, 0], twin(images), 1e-4)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("key_bias", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_encoder_is_timms_with_the_arguments_that_it_tells(class_token: bool, key_bias: bool, channels: int):
    encoder = network(class_token=class_token, key_bias=key_bias, channels=channels)
    twin = VisionTransformer(**timm_arguments(encoder)).eval()
    twin.load_state_dict(timm_state(encoder), strict=True)
    images = normal(2, channels, 8, 12)
    patches = patchify(images, patch=4)
    close(encoder(patches, encoder.positions), twin.forward_features(images))
    blocks_only = encoder.unnormalized(patches, encoder.positions)
    close(encoder.norm(blocks_only), twin.forward_features(images))
    assert encoder.num_prefix == int(class_token)


def test_a_state_without_key_bias_has_one_of_zero():
    state = timm_state(network(key_bias=False))
    q, k, v = state["blocks.1.attn.qkv.bias"].chunk(3)
    assert (k == 0).all()
    assert (q != 0).all()
    assert (v != 0).all()
    assert not any(name.endswith(("q_bias", "v_bias")) for name in state)


@pytest.mark.parametrize("channels", [1, 3, 10])
def test_embedding_cut_patches_is_a_convolution(channels: int):
    embed, images = PatchEmbed(4, channels, 24), normal(2, channels, 8, 12)
    close(embed(patchify(images, patch=4)), embed.proj(images).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("size", ["nano", "tiny", "small"])
def test_the_arguments_can_be_read_off_the_shapes(size: str, class_token: bool):
    sizes = {"height": 3, "width": 3, "patch": 4, "channels": 2, "class_token": class_token}
    encoder = ViT(**sizes, **SIZES[size])
    expected = timm_arguments(encoder)
    found = timm_arguments_of(timm_state(encoder), "file")
    assert found == {name: expected[name] for name in found}
    assert set(expected) - set(found) == {"global_pool", "num_classes"}


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("num_outputs", [0, 1, 4, N])
def test_fewer_outputs_are_the_first_of_all(num_outputs: int, class_token: bool):
    """Queries in the last block are those of the class token and the first patches; the others still answer."""
    encoder, patches, noise = network(class_token=class_token, drop=0.5), some_patches(), torch.rand(2, 2, 2)
    whole = encoder(patches, encoder.positions, noise)
    few = encoder(patches, encoder.positions, noise, num_outputs=num_outputs)
    close(few, whole[:, : class_token + num_outputs])


# What must not matter to the encoder


def test_the_order_of_the_patches_does_not_matter():
    encoder, patches, order = network(), some_patches(), torch.tensor([4, 0, 5, 2, 1, 3])
    tokens = encoder(patches, encoder.positions)
    shuffled = encoder(patches[:, order], encoder.positions[order])
    close(shuffled[:, 0], tokens[:, 0])
    close(shuffled[:, 1:], tokens[:, 1:][:, order])


def test_the_position_of_a_patch_does_matter():
    encoder, patches = network(), some_patches()
    assert not torch.allclose(encoder(patches, encoder.positions), encoder(patches, encoder.positions.flip(0)))


def test_patches_that_are_not_given_and_other_images_do_not_matter():
    encoder, patches = network(), some_patches()
    visible, masked = split(torch.tensor([[1, 0, 1, 0, 0, 1], [0, 1, 1, 1, 0, 0]]).bool(), num_masked=3)
    broken = put(torch.full((2, 3, 48), torch.nan), masked, patches)
    tokens = encoder(take(broken, visible), encoder.positions[visible])
    for i in range(2):
        alone = encoder(patches[i : i + 1, visible[i]], encoder.positions[visible[i]])
        close(tokens[i : i + 1], alone)


def test_the_class_token_stands_first_at_position_zero():
    encoder = ViT(**GRID, patch=4, channels=3, dim=24, depth=0, heads=3)
    nn.init.ones_(encoder.cls_token)  # pyright: ignore
    assert (encoder.pos_embed[0, 0] == 0).all()
    assert encoder.positions.equal(sincos(**GRID, dim=24))
    assert (encoder.unnormalized(some_patches(), encoder.positions)[:, 0] == 1).all()


def test_the_position_table_is_frozen_and_can_be_another():
    encoder = ViT(**GRID, patch=4, channels=3, dim=24, depth=0, heads=3, class_token=False, table=sinusoid)
    assert encoder.pos_embed[0].equal(sinusoid(**GRID, dim=24))
    assert encoder.positions.equal(encoder.pos_embed[0])
    assert [name for name, p in network().named_parameters() if not p.requires_grad] == ["pos_embed"]


@pytest.mark.parametrize("kept", [0, 1])
def test_an_image_of_which_almost_nothing_is_visible_has_a_class_token(kept: int):
    encoder = network()
    assert encoder(some_patches()[:, :kept], encoder.positions[:kept]).shape == (2, 1 + kept, 24)


def test_mixed_precision_comes_near_to_full_precision():
    encoder, patches = network(), some_patches()
    reads = decoder(encoder_dim=24)
    visible, masked = torch.tensor([[0, 1, 4], [1, 2, 3]]), torch.tensor([[2, 3, 5], [0, 4, 5]])

    def predict() -> Tensor:
        return reads(encoder(take(patches, visible), encoder.positions[visible]), visible, masked)

    with torch.autocast("cpu", torch.bfloat16):
        mixed = predict()
    close(mixed.float(), predict(), 0.05)


# Attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (5, 8)])
def test_attention_is_the_mean_of_values_weighted_by_similarity(dtype: torch.dtype, shape: tuple[int, ...]):
    q, k, v = (normal(*shape, seed=i).to(dtype) for i in range(3))
    q = 3 * q[..., :2, :]
    weights = (q.double() @ k.double().transpose(-2, -1) / 8**0.5).softmax(dim=-1)
    expected = (weights @ v.double()).to(dtype)
    close(attend(q, k, v), expected, 0.02 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(("tokens", "fused"), [(256, False), (257, True)])
def test_both_ways_of_attention_are_one(tokens: int, fused: bool, monkeypatch: pytest.MonkeyPatch):
    calls, kernel = [], cast(Any, F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: calls.append(1) or kernel(*qkv))
    inputs = [normal(1, 2, tokens, 16, seed=i).bfloat16().requires_grad_() for i in range(3)]
    output = attend(*inputs)
    assert len(calls) == fused
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = kernel(*exact)
    close(output.float(), expected, 0.02)
    upstream = normal(*output.shape, seed=4)
    gradients = torch.autograd.grad(output, inputs, upstream.bfloat16())
    for found, right in zip(gradients, torch.autograd.grad(expected, exact, upstream), strict=True):
        close(found.float(), right, 0.05)


@pytest.mark.parametrize("key_bias", [True, False])
@pytest.mark.parametrize("num_queries", [0, 1, 4, 6])
def test_queries_of_the_last_tokens_give_the_last_rows(num_queries: int, key_bias: bool):
    x = normal(2, N, 12)
    for layer in (shaken(Attention(12, 3, key_bias=key_bias)), shaken(Block(12, 3, key_bias=key_bias))):
        close(layer(x, num_queries=num_queries), layer(x)[:, N - num_queries :])


def test_a_key_bias_changes_nothing():
    # it adds the same to all scores of a query, which the softmax takes away
    with_bias, x = shaken(Attention(12, 3)), normal(2, N, 12)
    q, k, v = with_bias.qkv.bias.detach().clone().chunk(3)
    before = with_bias(x)
    with torch.no_grad():
        with_bias.qkv.bias.copy_(torch.cat([q, k + 5, v]))
    close(with_bias(x), before)


# The decoder


@st.composite
def halves(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Visible and masked patches of two images; also none."""
    masked = draw(st.integers(0, N))
    mask = seeded(2, N, seed=draw(st.integers(0, 99))).argsort().argsort() < masked
    return split(mask, num_masked=masked)


@fast
@given(halves(), st.booleans())
def test_the_masked_predictions_are_the_same_with_the_visible_ones_before_them(parts, class_token):
    visible, masked = parts
    reads, latent = decoder(class_token=class_token), normal(2, class_token + visible.shape[1], 8)
    alone, together = reads(latent, visible, masked), reads(latent, visible, masked, visible_too=True)
    assert alone.shape == (2, masked.shape[1], 5)
    assert together.shape == (2, N, 5)
    close(alone, together[:, visible.shape[1] :])


@fast
@given(halves(), st.booleans())
def test_the_decoder_is_that_of_the_paper_which_puts_the_tokens_back_in_order(parts, class_token):
    visible, masked = parts
    reads, latent = decoder(class_token=class_token), normal(2, class_token + visible.shape[1], 8)
    embedded = reads.embed(latent)
    x = put(embedded[:, class_token:], visible, reads.mask_token.expand(2, N, -1)) + reads.pos_embed
    x = torch.cat([embedded[:, :class_token], x], dim=1)
    for block in reads.blocks:
        x = block(x)
    expected = reads.head(reads.norm(x))[:, class_token:]
    order = torch.cat([visible, masked], dim=1)
    close(reads(latent, visible, masked, visible_too=True), take(expected, order))


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("visible_too", [True, False])
def test_with_relative_positions_the_raster_order_of_a_gpu_changes_no_prediction_and_no_gradient(
    class_token: bool, visible_too: bool, monkeypatch: pytest.MonkeyPatch
):
    visible, masked = split(seeded(2, N).argsort().argsort() < 4, num_masked=4)
    reads, latent = decoder(table=None, class_token=class_token), normal(2, class_token + N - 4, 8)
    results = []
    for raster in (False, True):
        monkeypatch.setattr("common.networks.decoder.in_raster_order", lambda _, raster=raster: raster)
        found = reads(latent, visible, masked, visible_too=visible_too)
        results.append([found, *torch.autograd.grad(found.square().sum(), list(reads.parameters()))])
    for one, other in zip(*results, strict=True):
        close(one, other)


def test_only_a_gpu_puts_tokens_with_relative_positions_in_raster_order():
    assert in_raster_order(torch.device("cuda"))
    assert not in_raster_order(torch.device("cpu"))


def test_permuting_the_masked_patches_permutes_their_predictions():
    reads, latent, order = decoder(), normal(2, 3, 8), torch.tensor([2, 0, 3, 1])
    visible, masked = torch.tensor([[0, 4], [1, 5]]), torch.tensor([[1, 2, 3, 5], [0, 2, 3, 4]])
    close(reads(latent, visible, masked[:, order]), reads(latent, visible, masked)[:, order])


def test_the_order_of_the_visible_patches_does_not_matter_to_the_decoder():
    reads, latent = decoder(), normal(2, 4, 8)
    visible, masked = torch.tensor([[0, 4, 2], [1, 5, 3]]), torch.tensor([[1, 3, 5], [0, 2, 4]])
    turned = torch.cat([latent[:, :1], latent[:, 1:].flip(1)], dim=1)
    close(reads(turned, visible.flip(1), masked), reads(latent, visible, masked))


def test_the_decoder_lays_out_class_visible_and_masked_and_gives_the_class_no_position():
    reads, latent = decoder(), normal(1, 3, 8)
    x = reads.sequence(latent, torch.tensor([[5, 1]]), torch.tensor([[2]]))
    embedded, table = reads.embed(latent), sincos(**GRID, dim=12)
    close(x[:, 0], embedded[:, 0])
    close(x[:, 1:3], embedded[:, 1:] + table[[5, 1]])
    close(x[:, 3], reads.mask_token[:, 0] + table[2])


def test_the_table_of_the_decoder_is_neither_trained_nor_stored():
    reads = decoder(table=sinusoid, embed_bias=False)
    assert reads.pos_embed.equal(sinusoid(**GRID, dim=12))
    assert "pos_embed" not in reads.state_dict()
    assert "embed.bias" not in reads.state_dict()


# Drop path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_path_keeps_the_mean_over_its_noise(dtype: torch.dtype):
    branch = normal(1, 2, 3).to(dtype).expand(8, 2, 3)
    every = (torch.arange(8) + 0.5) / 8
    dropped = drop_path(branch, every, torch.tensor(0.25))
    assert dropped.dtype == dtype
    assert (dropped[:2] == 0).all()
    close(dropped.float().mean(dim=0), branch[0].float(), 0.02 if dtype == torch.bfloat16 else 1e-6)


def test_a_rate_of_zero_drops_nothing():
    block, x = shaken(Block(12, 3)), normal(2, N, 12)
    close(block(x, torch.zeros(2, 2)), block(x))
    assert drop_path(x, torch.zeros(2), torch.tensor(0.0)).equal(x)


def test_noise_just_below_one_drops_nothing():
    x = normal(2, N, 12)
    highest = torch.full((2,), 1.0).nextafter(torch.zeros(2))
    close(drop_path(x, highest, torch.tensor(0.5)), 2 * x)
    close(
        drop_path(x, torch.full((2,), 0.5), torch.tensor(0.5)), 2 * x
    )  # the rate itself is kept: noise is below it as often


def test_a_dropped_block_returns_its_input():
    block, x = shaken(Block(12, 3, drop=0.5)), normal(2, N, 12)
    assert block(x, torch.zeros(2, 2)).equal(x)
    assert block(x, torch.zeros(2, 2), num_queries=2).equal(x[:, -2:])


def test_each_branch_of_each_sample_is_dropped_alone():
    block, x = shaken(Block(12, 3, drop=0.5)), normal(4, N, 12)
    noise = torch.tensor([[0.9, 0.9], [0.1, 0.9], [0.9, 0.1], [0.1, 0.1]])
    found = block(x, noise)
    attended = x + 2 * block.attn(block.norm1(x))
    close(found[0], (attended + 2 * block.mlp(block.norm2(attended)))[0])
    close(found[1], (x + 2 * block.mlp(block.norm2(x)))[1])
    close(found[2], attended[2])
    close(found[3], x[3])


def test_drop_path_rises_linearly_from_zero_and_each_block_has_its_noise():
    encoder, patches = network(depth=3, drop=0.4), some_patches()
    assert [float(block.drop) for block in encoder.blocks] == pytest.approx([0, 0.2, 0.4])  # pyright: ignore
    noise = torch.tensor([0.5, 0.1, 0.9]).view(1, 3, 1).expand(2, 3, 2)  # drops the second block alone
    x = torch.cat([encoder.cls_token + encoder.pos_embed[:, :1]] * 2)  # pyright: ignore
    x = torch.cat([x, encoder.patch_embed(patches) + encoder.positions], dim=1)
    x = encoder.blocks[2](encoder.blocks[0](x), noise[:, 2])
    close(encoder(patches, encoder.positions, noise), encoder.norm(x))


# Initialization


def fresh(initialize: Any) -> tuple[ViT, Decoder]:
    torch.manual_seed(0)
    encoder = ViT(**GRID, patch=8, channels=3, dim=192, depth=1, heads=3)
    reads = Decoder(**GRID, encoder_dim=192, dim=96, depth=1, heads=3, outputs=192, key_bias=False)
    initialize(nn.ModuleList([encoder, reads]))
    return encoder, reads


def is_uniform(weight: Tensor, bound: float) -> None:
    assert weight.abs().max() <= bound * (1 + 1e-6)
    assert weight.abs().max() > 0.99 * bound
    torch.testing.assert_close(weight.std().item(), bound / 3**0.5, rtol=0.03, atol=0)


def norms_and_biases_are_at_rest(*modules: nn.Module) -> None:
    for module in modules:
        for name, part in module.named_modules():
            if isinstance(part, nn.LayerNorm):
                assert (part.weight == 1).all(), name
            if isinstance(part, (nn.LayerNorm, nn.Linear)):
                assert part.bias is None or (part.bias == 0).all(), name
            if isinstance(part, Attention):
                assert (part.qkv_bias() == 0).all(), name


def is_pytorchs_default(parameter: Tensor, fan_in: int) -> None:
    assert parameter.abs().max() <= fan_in**-0.5
    assert parameter.abs().max() > 0.95 * fan_in**-0.5


def test_mae_starts_with_xavier_on_the_stored_matrices():
    encoder, reads = fresh(initialize_mae)
    block: Any = encoder.blocks[0]
    is_uniform(block.attn.qkv.weight, (6 / (3 * 192 + 192)) ** 0.5)  # queries, keys and values as one matrix
    is_uniform(block.attn.proj.weight, (6 / (192 + 192)) ** 0.5)
    is_uniform(block.mlp.fc1.weight, (6 / (192 + 4 * 192)) ** 0.5)
    is_uniform(reads.embed.weight, (6 / (192 + 96)) ** 0.5)
    is_uniform(reads.head.weight, (6 / (96 + 192)) ** 0.5)
    is_uniform(encoder.patch_embed.proj.weight, (6 / (192 + 3 * 8 * 8)) ** 0.5)  # as a matrix, not as a kernel
    is_pytorchs_default(encoder.patch_embed.proj.bias, 3 * 8 * 8)  # pyright: ignore
    norms_and_biases_are_at_rest(encoder, reads)
    for token in (encoder.cls_token, reads.mask_token):
        assert token is not None
        torch.testing.assert_close(token.std().item(), 0.02, rtol=0.2, atol=0)
        assert token.abs().max() > 0.03  # not cut
    assert encoder.positions.equal(sincos(**GRID, dim=192))


def test_beyond_masking_starts_with_normals_cut_at_one_standard_deviation():
    encoder, reads = fresh(initialize_truncated)
    for module in (encoder, reads):
        for part in module.modules():
            if isinstance(part, nn.Linear):
                assert part.weight.abs().max() <= 0.02
                torch.testing.assert_close(part.weight.std().item(), 0.0108, rtol=0.03, atol=0)
    for token in (encoder.cls_token, reads.mask_token):
        assert token is not None
        assert token.abs().max() <= 0.02
        torch.testing.assert_close(token.std().item(), 0.0108, rtol=0.2, atol=0)
    is_pytorchs_default(encoder.patch_embed.proj.weight, 3 * 8 * 8)
    is_pytorchs_default(encoder.patch_embed.proj.bias, 3 * 8 * 8)  # pyright: ignore
    norms_and_biases_are_at_rest(encoder, reads)


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("size", "patch", "tokens", "expected"),
    [("base", 16, 196, 111.9), ("large", 16, 196, 329.5), ("huge", 14, 256, 657.1)],
)
def test_mae_is_as_large_as_the_published_one(size: Any, patch: int, tokens: int, expected: float):
    with torch.device("meta"):
        config = mae.Config(network=Network(size=size, patch=patch))
        method = mae.MAE(config, Normalize([0.0] * 3, [1.0] * 3))
    table = (1 + tokens) * 512 / 1e6  # of the decoder: counted there, a buffer here
    assert round(millions(method) + table, 1) == expected


def test_beyond_masking_is_as_large_as_the_published_one():
    with torch.device("meta"):
        method = beyond_masking.Integrated(beyond_masking.IMAGENET, Normalize([0.0] * 3, [1.0] * 3))
    encoder = millions(method.encoder) - method.encoder.pos_embed.numel() / 1e6  # no parameter there
    assert round(encoder, 1) == 85.6
    assert round(encoder + millions(method.decoder), 1) == 93.3


# Positions for another grid


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_resized_table_keeps_the_row_of_the_class(prefix: int):
    table = normal(1, prefix + N, 4)
    resized = resize_positions(table, **GRID, new_height=4, new_width=5)
    assert resized[:, :prefix].equal(table[:, :prefix])
    assert resized[:, prefix:].equal(resize_table(table[:, prefix:], **GRID, new_height=4, new_width=5))
    assert resize_positions(table, **GRID, new_height=2, new_width=3).equal(table)


# Errors


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Attention(10, 3), "width 10 cannot be shared by 3 heads"),
        (lambda: network(heads=5), "width 24 cannot be shared by 5 heads"),
        (lambda: decoder(depth=0), "a decoder of 0 blocks predicts nothing"),
        (lambda: network(drop=1.0), "drop=1.0 is not a probability below 1"),
        (lambda: Block(12, 3, drop=-0.1), "drop=-0.1 is not a probability below 1"),
        (
            lambda: timm_arguments_of({"pos_embed": torch.zeros(1, 5, 96)}, "a.pth"),
            "a.pth is not a plain ViT, which has patch_embed.proj.weight, pos_embed and blocks",
        ),
        (
            lambda: timm_arguments_of(timm_state(network(depth=0)), "a.pth"),
            "a.pth is not a plain ViT, which has patch_embed.proj.weight, pos_embed and blocks",
        ),
        (
            lambda: timm_arguments_of(timm_state(network()), "a.pth"),
            "a.pth: width 24 and 7 positions are not those of a known encoder",
        ),
        (
            lambda: timm_arguments_of(timm_state(network(dim=96)), "a.pth"),
            "a.pth: width 96 and 7 positions are not those of a known encoder",
        ),
        (
            lambda: resize_positions(torch.zeros(1, 8, 4), **GRID, new_height=1, new_width=1),
            "a table of 8 rows is not one of a grid of 2 × 3",
        ),
        (
            lambda: resize_positions(torch.zeros(1, 5, 4), **GRID, new_height=1, new_width=1),
            "a table of 5 rows is not one of a grid of 2 × 3",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call: Any, sentence: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert str(caught.value) == sentence
