"""Weights of others: read without running their code, loaded with a report of every key, and trained on from."""

import argparse
import os
import pickle
import re
from pathlib import Path
from typing import Any

from common.config import DataSettings, Network, SettingsError
from common.data.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from common.weights.encoders import load_encoder
from common.weights.reading import LoadReport, load_weights, read_foreign
from mimkit.tokens import patchify, split

import mae
import pytest
import safetensors.torch
import torch
from strategies import seeded
from test_checkpoint import same
from torch import nn


def test_a_published_file_with_its_settings_is_read(tmp_path: Path):
    weights = {"a": seeded(2, 3), "b": seeded(1)}
    settings = argparse.Namespace(lr=1e-3, name="mae", nested={"a": [1, 2]})
    torch.save({"model": weights, "args": settings, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "a.pth")
    assert same(read_foreign(tmp_path / "a.pth"), weights)


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"student": {}, "teacher": w}])
def test_weights_are_found_under_their_usual_keys(wrap: Any, tmp_path: Path):
    torch.save(wrap({"a": torch.ones(2), "steps": 3}), tmp_path / "a.pth")
    assert same(read_foreign(tmp_path / "a.pth"), {"a": torch.ones(2)})


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_and_never_run(tmp_path: Path):
    path, trace = tmp_path / "a.pth", tmp_path / "trace"
    torch.save({"model": {"a": torch.ones(1)}, "args": Trap(trace)}, path)
    with pytest.raises(SettingsError, match=re.escape(str(path))) as caught:
        read_foreign(path)
    assert not trace.exists()
    assert str(caught.value) == f"{path} cannot be read as plain weights: it asks for {os.name}.mkdir"
    torch.load(path, weights_only=False)  # the trap is a real one
    assert trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bare_pickle_with_code_is_refused_and_never_run(tmp_path: Path):
    path, trace = tmp_path / "a.pth", tmp_path / "trace"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"a": Trap(trace)}, protocol))
        with pytest.raises(SettingsError, match=f"^{re.escape(str(path))} cannot be read as plain weights: [^\n]+$"):
            read_foreign(path)
        assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut"])
def test_what_is_no_checkpoint_is_refused_with_one_sentence(content: bytes, tmp_path: Path):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match="is damaged or no checkpoint") as caught:
        read_foreign(path)
    assert str(caught.value) == f"{path} cannot be read as plain weights: it is damaged or no checkpoint of PyTorch"


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3}, [torch.ones(1)], 3])
def test_a_file_without_weights_is_an_error(content: Any, tmp_path: Path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(SettingsError, match=f"^{re.escape(str(tmp_path / 'a.pth'))} holds no weights$"):
        read_foreign(tmp_path / "a.pth")


def test_a_missing_file_is_an_error(tmp_path: Path):
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors", tmp_path):
        with pytest.raises(SettingsError, match=f"^{re.escape(str(path))} is not a file$"):
            read_foreign(path)


def two_layers() -> nn.ModuleDict:
    return nn.ModuleDict({"body": nn.Linear(2, 3), "head": nn.Linear(3, 1)})


def test_every_key_that_is_renamed_dropped_or_missing_is_reported():
    module = two_layers()
    weights = {"trunk.weight": seeded(3, 2), "body.bias": seeded(3), "teacher.center": seeded(1)}
    report = load_weights(module, weights, renames={r"trunk\.": "body."}, optional=(r"head\.",))
    assert report.renamed == {"trunk.weight": "body.weight"}
    assert report.dropped == ["teacher.center"]
    assert report.missing == ["head.weight", "head.bias"]
    assert str(report).splitlines() == [
        "renamed  trunk.weight → body.weight",
        "dropped  teacher.center",
        "missing  head.weight",
        "missing  head.bias",
    ]
    assert module.state_dict()["body.weight"].equal(weights["trunk.weight"])
    assert module.state_dict()["body.bias"].equal(weights["body.bias"])


def test_the_first_rule_that_matches_at_the_start_of_a_name_holds():
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b, self.b = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    module = Names()
    rules = {r"x_": "a_", r"x_b": "b", r"b": "b"}
    assert load_weights(module, {"x_b": torch.ones(1), "b": -torch.ones(1)}, renames=rules).renamed == {"x_b": "a_b"}
    assert module.a_b.item() == 1
    assert module.b.item() == -1
    assert load_weights(module, {"a_x_b": torch.zeros(1)}, renames={r"x_": ""}, optional=(r".",)).dropped == ["a_x_b"]


def test_if_nothing_is_to_be_said_the_report_says_so():
    module = two_layers()
    report = load_weights(module, module.state_dict(), renames={})
    assert report == LoadReport()
    assert str(report) == "every key was found under its own name"


def test_weights_that_are_needed_and_missing_are_named():
    message = "^2 of 4 weights are missing in the file: body.bias, head.weight$"
    with pytest.raises(SettingsError, match=message):
        load_weights(two_layers(), {"body.weight": seeded(3, 2)}, renames={}, optional=(r"head\.bias",))
    many = nn.Sequential(*[nn.Linear(1, 1) for _ in range(3)])
    with pytest.raises(SettingsError, match=r"^6 of 6 weights .*: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight…$"):
        load_weights(many, {}, renames={})


def test_weights_of_another_shape_are_an_error_and_load_nothing():
    module = two_layers()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    weights = {**{name: tensor + 1 for name, tensor in before.items()}, "head.weight": seeded(3, 1)}
    with pytest.raises(SettingsError, match=r"^head.weight is \(3, 1\) in the file but \(1, 3\) here$"):
        load_weights(module, weights, renames={})
    assert same(module.state_dict(), before)


# The published layout of MAE

CONFIG = mae.Config(
    data=DataSettings(image_size=(32, 32)),
    network=Network(size="tiny", patch=8, decoder_dim=32, decoder_depth=2, decoder_heads=2),
)


def method(seed: int) -> mae.MAE:
    torch.manual_seed(seed)
    return mae.MAE(CONFIG, Normalize(IMAGENET_MEAN, IMAGENET_STD)).eval()


def published_name(name: str) -> str:
    name = name.removeprefix("encoder.")
    for ours, theirs in {"decoder.mask_token": "mask_token", "decoder.head.": "decoder_pred."}.items():
        name = name.replace(ours, theirs)
    return re.sub(r"^decoder\.", "decoder_", name)


@pytest.fixture(params=["encoder only", "with decoder"])
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[mae.MAE, Path]:
    """A small MAE, and a file with its weights under the published names."""
    original = method(1)
    with torch.no_grad():
        for parameter in original.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    weights = {published_name(name): t for name, t in original.state_dict().items() if "normalize" not in name}
    weights["decoder_pos_embed"] = torch.nn.functional.pad(original.decoder.pos_embed, (0, 0, 1, 0))[None]
    if request.param == "encoder only":
        weights = {name: tensor for name, tensor in weights.items() if not re.match("decoder|mask_token", name)}
    path = tmp_path / "mae_pretrain_vit_tiny.pth"
    torch.save({"model": weights, "args": argparse.Namespace(mask_ratio=0.75), "epoch": 800}, path)
    return original, path


def test_a_published_checkpoint_goes_on_where_it_was(published: tuple[mae.MAE, Path]):
    original, path = published
    loaded, images = method(2), seeded(2, 3, 32, 32)
    printed = str(mae.RECIPE.load(loaded, path)).splitlines()
    assert "renamed  patch_embed.proj.weight → encoder.patch_embed.proj.weight" in printed
    assert same(loaded.encoder.state_dict(), original.encoder.state_dict())
    whole = "decoder_pos_embed" in read_foreign(path)
    assert ("dropped  decoder_pos_embed" in printed) == whole
    assert ("missing  decoder.head.weight" in printed) == (not whole)
    noise, progress = {"mask": seeded(2, 16)}, torch.zeros(())
    assert loaded(images, noise, progress)["loss"].equal(original(images, noise, progress)["loss"]) == whole


def test_the_decoder_of_a_published_checkpoint_can_be_required(published: tuple[mae.MAE, Path]):
    original, path = published
    loaded = method(2)
    if "decoder_pos_embed" in read_foreign(path):
        mae.RECIPE.load(loaded, path, decoder=True)
        assert same(loaded.state_dict(), original.state_dict())
    else:
        with pytest.raises(SettingsError, match=r"weights are missing in the file: decoder\."):
            mae.RECIPE.load(loaded, path, decoder=True)


def test_the_encoder_of_a_published_checkpoint_is_loaded_alone(published: tuple[mae.MAE, Path], capsys: Any):
    original, path = published
    encoder, normalize = load_encoder(path)
    assert f"{path}:\n" in capsys.readouterr().out
    patches = patchify(normalize(seeded(2, 3, 32, 32)), patch=8)
    expected = original.encoder(patches, original.encoder.positions)
    assert encoder(patches, encoder.positions).equal(expected)
    visible, _ = split(seeded(2, 16).argsort() < 12, num_masked=12)
    assert encoder.positions[visible].equal(original.encoder.positions[visible])


def test_the_same_weights_as_safetensors_are_the_same_encoder(published: tuple[mae.MAE, Path]):
    original, path = published
    other = path.with_suffix(".safetensors")
    safetensors.torch.save_file(read_foreign(path), other, {"format": "pt"})
    assert same(load_encoder(other)[0].state_dict(), original.encoder.state_dict())


def test_a_published_encoder_of_which_a_block_is_missing_is_an_error(published: tuple[mae.MAE, Path]):
    path = published[1]
    weights = {name: tensor for name, tensor in read_foreign(path).items() if "blocks.3.mlp" not in name}
    torch.save(weights, path)
    with pytest.raises(
        SettingsError, match=r"^4 of \d+ weights are missing in the file: encoder.blocks.3.mlp.fc1.weight"
    ):
        mae.RECIPE.load(method(2), path)
    with pytest.raises(SettingsError, match=r"^4 of \d+ weights are missing in the file: blocks.3.mlp.fc1.weight"):
        load_encoder(path)
