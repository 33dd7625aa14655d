"""Files that lie about their encoder or are damaged end in one sentence, before anything is built from them."""

import json
import math
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.config import SettingsError
from common.files import read_tensors, write_tensors
from common.networks.initialization import initialize_mae
from common.networks.vit import ViT
from common.weights.encoders import export, load_encoder, open_encoder
from common.weights.metadata import MOST_PATCHES
from common.weights.reading import load_weights

import pytest
import safetensors.torch
import timm.models.vision_transformer  # noqa: F401  so that its memory is not counted below
import torch
from probes import NORMALIZE, small
from torch import nn

KINDS = ("plain", "contextual", "relative")


def network(kind: str) -> ViT:
    """An encoder of two blocks for images of 16 × 16 with one channel."""
    if kind == "plain":
        return small()
    options: dict[str, Any] = {"table": None, "key_bias": False, "layer_scale": 0.1, "relative": "shared"}
    if kind == "contextual":
        options = {"table": None, "relative": "contextual"}
    torch.manual_seed(0)
    vit = ViT(height=2, width=2, patch=8, channels=1, dim=24, depth=2, heads=3, **options)
    initialize_mae(vit)
    return vit


def changed(path: Path, kind: str, change: Callable[[dict[str, Any], Any], Any]) -> Path:
    """Export an encoder, and write it anew with other metadata or tensors; `change` gets metadata and arguments."""
    export(path, network(kind), NORMALIZE)
    tensors, about = read_tensors(path)
    arguments = about["mimkit" if kind == "contextual" else "timm"]
    change(about, arguments)
    write_tensors(path, tensors, about)
    return path


def states(**values: Any) -> Callable[[dict[str, Any], Any], Any]:
    return lambda about, arguments: [
        (about if name in about else arguments).update({name: values[name]}) for name in values
    ]


def lacks(name: str) -> Callable[[dict[str, Any], Any], Any]:
    return lambda about, arguments: (about if name in about else arguments).pop(name)


LIES = [
    ("plain", states(depth=10_000_000), "{path} is no encoder of 10000000 blocks: it lacks blocks.2.attn.qkv.weight"),
    ("plain", states(depth=1), "{path} is damaged: it has more than the 1 blocks of its metadata"),
    ("plain", states(depth=1e7), "the metadata of {path} says depth 10000000.0, which is not a whole number above 0"),
    ("plain", states(depth=0), "the metadata of {path} says depth 0, which is not a whole number above 0"),
    ("plain", states(depth=True), "the metadata of {path} says depth True, which is not a whole number above 0"),
    ("plain", states(embed_dim=-24), "the metadata of {path} says embed_dim -24, which is not a whole number above 0"),
    (
        "plain",
        states(embed_dim="wide"),
        "the metadata of {path} says embed_dim 'wide', which is not a whole number abo",
    ),
    ("plain", states(num_heads=5), "{path} is damaged: width 24 is not a multiple of 5 heads"),
    (
        "plain",
        states(embed_dim=1 << 40),
        "{path} is damaged: patch_embed.proj.weight is (24, 1, 8, 8) instead of (1099511",
    ),
    (
        "plain",
        states(img_size=[64000, 64000]),
        "{path} is damaged: pos_embed is (1, 5, 24) instead of (1, 64000001, 24)",
    ),
    (
        "relative",
        states(img_size=[64000, 64000]),
        "{path} is damaged: rel_pos_bias.relative_position_bias_table is (12, 3)",
    ),
    (
        "contextual",
        states(img_size=[64000, 64000]),
        "{path}: images of 64000 × 64000 pixels have more than 10000 patches",
    ),
    (
        "plain",
        states(img_size=[16]),
        "the metadata of {path} says img_size [16], which is not two whole numbers above 0",
    ),
    (
        "plain",
        states(img_size=[16, 17]),
        "{path} is damaged: images of 16 × 17 pixels are not made of patches of 8 × 8",
    ),
    ("plain", states(class_token=False), "{path} is damaged: pos_embed is (1, 5, 24) instead of (1, 4, 24)"),
    ("plain", states(class_token=1), "the metadata of {path} says class_token 1, which is not true or false"),
    ("relative", states(init_values=math.inf), "the metadata of {path} says init_values inf, which is not a number"),
    ("contextual", states(relative="each"), "the metadata of {path} says relative 'each', which is not contextual"),
    (
        "plain",
        states(mean=[math.nan]),
        "the metadata of {path} says mean [nan], which is not 1 numbers from -1e+06 to 1e+06",
    ),
    ("plain", states(mean=[0.5, 0.5]), "the metadata of {path} says mean [0.5, 0.5], which is not 1 numbers from"),
    ("plain", states(std=[0.0]), "the metadata of {path} says std [0.0], which is not 1 numbers from 1e-06 to 1e+06"),
    ("plain", states(std=[-1.0]), "the metadata of {path} says std [-1.0], which is not 1 numbers from 1e-06 to 1e+06"),
    ("plain", states(std="x" * 99), "the metadata of {path} says std '" + "x" * 39 + "…, which is not 1 numbers"),
    ("plain", states(timm=[1, 2]), "the metadata of {path} says timm [1, 2], which are not named arguments"),
    *[
        ("plain", lacks(name), f"the metadata of {{path}} lacks {name}")
        for name in (
            "img_size",
            "patch_size",
            "in_chans",
            "embed_dim",
            "depth",
            "num_heads",
            "class_token",
            "mean",
            "std",
        )
    ],
]


@pytest.mark.parametrize(("kind", "change", "sentence"), LIES)
def test_metadata_that_cannot_be_is_one_sentence_and_nothing_is_built(
    kind: str, change: Any, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = changed(tmp_path / "encoder.safetensors", kind, change)

    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr("common.weights.encoders.ViT", built)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    encoders = [path, f"timm:vit_tiny_patch16_224:{path}"] if kind == "plain" else [path]
    for encoder in encoders:
        with pytest.raises(SettingsError, match=f"^{re.escape(sentence.format(path=path))}"):
            open_encoder(encoder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024, "in units of KiB"


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_read_as_it_was_written(kind: str, tmp_path: Path):
    path = changed(tmp_path / "encoder.safetensors", kind, lambda about, arguments: None)
    assert (load_encoder(path)[0].height, load_encoder(path)[0].depth) == (2, 2)


def test_the_largest_grid_without_a_table_is_accepted(tmp_path: Path):
    side = 8 * math.isqrt(MOST_PATCHES)
    path = changed(tmp_path / "encoder.safetensors", "contextual", states(img_size=[side, side]))
    assert load_encoder(path, image_size=(16, 16))[0].height == 2


PUBLISHED = [
    (
        {"blocks.9999999.norm1.weight": torch.ones(24)},
        "{path} is no encoder of 10000000 blocks: it lacks blocks.2.attn.q",
    ),
    (
        {"patch_embed.proj.weight": torch.ones(24, 64)},
        "{path} is not a plain ViT, which has patch_embed.proj.weight, pos_",
    ),
    (
        {"blocks.0.attn.qkv.weight": torch.ones(9, 24)},
        "{path} is damaged: blocks.0.attn.qkv.weight is (9, 24) instead of",
    ),
    (
        {"blocks.0.attn.rpe_k.lookup_table_weight": torch.ones(1, 0, 9)},
        "{path}: width 192 and 5 positions are not those of",
    ),
    ({"blocks.0.attn.rpe_k.lookup_table_weight": torch.ones(9)}, "{path}: width 192 and 5 positions are not those of"),
    (
        {"rel_pos_bias.relative_position_bias_table": torch.ones(12)},
        "{path} is damaged: rel_pos_bias.relative_pos",
    ),
    ({"norm.bias": torch.zeros(1).expand(1 << 40)}, "norm.bias in {path} is larger than what the file stores of it"),
    ({"norm.bias": torch.zeros(192).to_sparse()}, "norm.bias in {path} is larger than what the file stores of it"),
    ({"norm.bias": torch.full((192,), math.inf)}, "norm.bias in the file holds values that are not finite"),
    ({"blocks.x": torch.ones(1)}, ""),
]


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(("others", "sentence"), PUBLISHED)
def test_a_published_checkpoint_that_cannot_be_is_one_sentence(others: dict[str, Any], sentence: str, tmp_path: Path):
    torch.manual_seed(0)
    vit = ViT(height=2, width=2, patch=8, channels=1, dim=192, depth=2, heads=3)
    torch.save({"model": {**vit.state_dict(), **others}}, tmp_path / "a.pth")
    if not sentence:  # a weight of another network is reported, and is no error
        assert load_encoder(tmp_path / "a.pth")[0].depth == 2
        return
    with pytest.raises(SettingsError, match=f"^{re.escape(sentence.format(path=tmp_path / 'a.pth'))}"):
        load_encoder(tmp_path / "a.pth")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_weight_that_is_not_finite_is_named_and_nothing_is_loaded(value: float, tmp_path: Path):
    module = nn.ModuleDict({"body": nn.Linear(2, 3), "head": nn.Linear(3, 1)})
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    weights = {f"model.{name}": tensor + 1 for name, tensor in before.items()} | {"unused": torch.tensor(math.nan)}
    weights["model.body.bias"][1] = weights["model.head.bias"][0] = value
    sentence = r"^model.body.bias in the file holds values that are not finite: the weights are damaged$"
    with pytest.raises(SettingsError, match=sentence):
        load_weights(module, weights, renames={r"model\.": ""})
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("damaged", ["norm.bias", "pos_embed", "blocks.1.mlp.fc2.weight"])
def test_an_export_whose_weights_are_not_finite_is_refused(damaged: str, tmp_path: Path):
    path = tmp_path / "encoder.safetensors"
    export(path, network("plain"), NORMALIZE)
    tensors, about = read_tensors(path)
    tensors[damaged].view(-1)[7] = math.nan
    write_tensors(path, tensors, about)
    with pytest.raises(SettingsError, match=f"^{damaged} in the file holds values that are not finite"):
        load_encoder(path)


def test_the_same_encoder_is_exported_to_the_same_bytes(tmp_path: Path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(12)]
    for path in paths:
        export(path, network("plain"), NORMALIZE)
    assert len({path.read_bytes() for path in paths}) == 1
    tensors, about = read_tensors(paths[0])
    assert sorted(about) == ["mean", "std", "timm"]
    assert tensors.keys() == safetensors.torch.load(paths[0].read_bytes()).keys()


def test_metadata_in_any_language_stays_readable(tmp_path: Path):
    path, tensor = tmp_path / "a.safetensors", torch.arange(3.0)
    texts = {name: "é" * length for length, name in enumerate(("größe", "a", "中"))}
    write_tensors(path, {"ä": tensor}, texts)
    assert read_tensors(path)[1] == texts
    assert read_tensors(path)[0]["ä"].equal(tensor)
    header = path.read_bytes()
    assert int.from_bytes(header[:8], "little") % 8 == 0, "tensors are aligned"
    assert list(json.loads(header[8:].split(b"}}")[0] + b"}}")["__metadata__"]) == sorted(texts)
