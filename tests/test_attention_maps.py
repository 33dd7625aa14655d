"""The attention of the last block: what it is compared with PyTorch's own, how far it looks, and the picture."""

import re
from pathlib import Path

from common.data.normalize import Normalize
from common.networks.initialization import initialize_mae
from common.networks.vit import ViT
from common.weights.encoders import export
from common.weights.timm_models import TimmViT
from mimkit.tokens import patchify

import pytest
import torch
import tyro
from attention_maps import Config, attention_distance, last_attention, main, parse_queries
from einops import rearrange
from PIL import Image
from strategies import seeded
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def small(**more) -> ViT:
    torch.manual_seed(0)
    vit = ViT(height=2, width=3, patch=4, channels=3, dim=24, depth=2, heads=3, **more)
    initialize_mae(vit)
    for name, parameter in vit.named_parameters():
        if "table" in name:
            nn.init.normal_(parameter)
    return vit.eval()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"class_token": False},
        {"key_bias": False, "relative": "each"},
        {"relative": "shared"},
        {"relative": "contextual", "table": None},
    ],
)
def test_the_attention_times_the_values_is_what_the_last_block_computes(more):
    vit, patches, seen = small(**more), patchify(seeded(2, 3, 8, 12), patch=4), []
    attn = vit.blocks[-1].attn
    attn.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))  # pyright: ignore
    attention = last_attention(vit, patches)
    tokens = 6 + vit.num_prefix
    assert attention.shape == (2, 3, tokens, tokens)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 3, tokens))
    ((x, output),) = seen
    values = nn.functional.linear(x, attn.qkv.weight, attn.qkv_bias()).chunk(3, dim=-1)[2]  # pyright: ignore
    mixed = attention @ rearrange(values, "b n (h d) -> b h n d", h=3)
    torch.testing.assert_close(attn.proj(rearrange(mixed, "b h n d -> b n (h d)")), output)  # pyright: ignore


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_attention_of_a_timm_model_is_the_one_that_it_drops_out_of(qk_norm):
    torch.manual_seed(0)
    sizes = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    model = VisionTransformer(**sizes, qk_norm=qk_norm).eval()  # pyright: ignore
    images, seen = seeded(2, 3, 8, 12), []
    attention = last_attention(TimmViT(model), patchify(images, patch=4))  # pyright: ignore
    attn = model.blocks[-1].attn
    attn.fused_attn = False  # pyright: ignore
    attn.attn_drop.register_forward_hook(lambda _, args, __: seen.append(args[0]))  # pyright: ignore
    model(images)
    torch.testing.assert_close(attention, seen[0])


def test_attention_that_is_not_seen_is_refused():
    encoder = nn.Module()
    encoder.positions, encoder.forward = None, lambda patches, positions: patches  # pyright: ignore
    with pytest.raises(ValueError, match="the encoder does not call scaled_dot_product_attention"):
        last_attention(encoder, seeded(1, 2, 3))  # pyright: ignore


def test_the_distance_is_zero_for_oneself_and_half_a_patch_for_two_alike():
    pair = {"height": 1, "width": 2, "patch": 16}
    assert attention_distance(torch.eye(2), **pair) == 0
    assert attention_distance(torch.ones(5, 2, 2), **pair).equal(torch.full((5,), 8.0))
    some = seeded(4, 6, 6)
    grid = {"height": 2, "width": 3, "patch": 8}
    torch.testing.assert_close(attention_distance(7 * some, **grid), attention_distance(some, **grid))
    far = torch.zeros(6, 6)
    far[:, 5] = 1  # the last of two rows of three
    expected = 8 * sum((row**2 + column**2) ** 0.5 for row in (0, 1) for column in (0, 1, 2)) / 6
    assert float(attention_distance(far, **grid)) == pytest.approx(expected)


def test_queries_are_rows_and_columns_of_the_grid():
    assert parse_queries(("0,0", "1,2"), height=2, width=3) == [(0, 0), (1, 2)]
    assert parse_queries((), height=4, width=6) == [(2, 3), (0, 0)]
    for wrong in ("2,0", "0,3", "1", "a,b", "-1,0", ""):
        with pytest.raises(ValueError, match=re.escape(f"--queries {wrong}: no row,column of 2 × 3 patches")):
            parse_queries((wrong,), height=2, width=3)


def test_one_picture_of_all_heads_for_a_file_and_a_folder(tmp_path: Path, capsys):
    export(tmp_path / "encoder.safetensors", small(), Normalize([0.5] * 3, [0.5] * 3))
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (40 + i, 30), (80 * i, 90, 20)).save(tmp_path / "photos" / f"{i}.png")
    for data, extra in (("photos", ["--queries", "1,2", "0,1"]), ("photos/1.png", ["--image-size", "16", "24"])):
        args = ["--encoder", str(tmp_path / "encoder.safetensors"), "--data", str(tmp_path / data), *extra]
        main(tyro.cli(Config, args=args))
        said = capsys.readouterr().out
        assert f"over {3 if data == 'photos' else 1} images" in said
        assert len(re.findall(r"head \d", said)) == 3
        with Image.open(tmp_path / "attention_maps.png") as picture:
            assert picture.size[0] > 600  # the query and three heads
    main(
        Config(
            str(tmp_path / "encoder.safetensors"), data=str(tmp_path / "photos"), out=tmp_path / "other.png", measured=2
        )
    )
    assert (tmp_path / "other.png").stat().st_size
