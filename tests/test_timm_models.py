"""Vision transformers of timm as encoders."""

from pathlib import Path
from typing import Any, cast

from common.config import SettingsError
from common.evaluation.features import FeatureExtractor
from common.evaluation.nonlinear import DeepenedEncoder
from common.networks.initialization import initialize_mae
from common.networks.vit import ViT
from common.weights.encoders import export, load_encoder, open_encoder
from common.weights.timm_models import TimmViT, load_timm

import pytest
import timm
import torch
from probes import NORMALIZE, recipe


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of ours that is timm's vit_tiny_patch16_224, for images of 32 × 48."""
    torch.manual_seed(0)
    vit = ViT(height=2, width=3, patch=16, channels=1, dim=192, depth=12, heads=3)
    initialize_mae(vit)
    path = tmp_path_factory.mktemp("tiny") / "encoder.safetensors"
    export(path, vit, NORMALIZE)
    return path


@pytest.mark.parametrize("image_size", [None, (48, 32)])
@pytest.mark.parametrize("pool", ["class", "mean"])
def test_a_timm_model_equals_our_export_of_the_same_weights(pool: Any, image_size: Any, tiny: Path) -> None:
    ours = FeatureExtractor(*load_encoder(tiny, image_size=image_size), pool)
    theirs = FeatureExtractor(*load_timm(tiny, "vit_tiny_patch16_224", image_size=image_size), pool)
    images = torch.randint(256, (2, 1, *(image_size or (32, 48))), dtype=torch.uint8)
    torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-5)
    for name in ("height", "width", "patch", "channels", "dim", "depth", "heads", "num_prefix"):
        assert getattr(theirs.encoder, name) == getattr(ours.encoder, name)
    deeper = [DeepenedEncoder(extractor.encoder, blocks=1) for extractor in (ours, theirs)]
    deeper[1].blocks.load_state_dict(deeper[0].blocks.state_dict())
    patches = torch.rand(2, 6, 256)
    torch.testing.assert_close(*(new(patches, new.positions) for new in deeper), rtol=1e-4, atol=1e-5)


def test_a_timm_model_reads_its_own_weights_mean_and_std(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, global_pool="token").eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    extractor = FeatureExtractor(*load_timm(tmp_path / "weights.pth", "vit_tiny_patch16_224"))
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(extractor(images), cast(Any, model).forward_features((images - 0.5) / 0.5)[:, 0])
    printed = capsys.readouterr().out
    assert "images are normalized by mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5]" in printed
    assert "dropped  head.weight" in printed


def test_an_encoder_is_opened_as_timms_or_as_ours_by_its_name(tiny: Path) -> None:
    assert isinstance(open_encoder(tiny)[0], ViT)
    assert isinstance(open_encoder(str(tiny), image_size=(16, 32))[0], ViT)
    theirs, _ = open_encoder(f"timm:vit_tiny_patch16_224:{tiny}", image_size=(16, 32))
    assert isinstance(theirs, TimmViT)
    assert (theirs.height, theirs.width) == (1, 2)


@pytest.mark.parametrize(
    ("encoder", "sentence"),
    [
        ("timm:nix:{file}", "timm knows no model called nix"),
        ("timm:resnet18:{file}", "timm's resnet18 is not a vision transformer"),
        ("timm:vit_base_patch16_224:{file}", r"blocks\.0\.attn\.proj\.bias is \(192,\) in the file but \(768,\) here"),
        ("timm:vit_tiny_patch16_224", "--encoder timm:vit_tiny_patch16_224: give the weights, too, as in --encoder"),
        ("timm:", "--encoder timm:: give the weights, too, as in --encoder timm:NAME:FILE"),
        ("timm:vit_tiny_patch16_224:nowhere.pth", "nowhere.pth is not a file"),
        ("nowhere.pth", "nowhere.pth is not a file"),
    ],
)
def test_what_is_no_encoder_is_one_sentence(encoder: str, sentence: str, tiny: Path) -> None:
    with pytest.raises(SettingsError, match=f"^{sentence}"):
        open_encoder(encoder.format(file=tiny))


def test_weights_that_are_no_vision_transformer_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(SettingsError, match=r"is not a plain ViT, which has patch_embed\.proj\.weight and pos_embed$"):
        open_encoder(f"timm:vit_tiny_patch16_224:{tmp_path / 'weights.pth'}")


def test_probes_evaluate_a_timm_model(tiny: Path, tmp_path: Path) -> None:
    args = ["--image-size", "16", "16", "--labels-per-class", "2", "--runs", tmp_path]
    ours = recipe("knn", "--encoder", tiny, *args)
    theirs = recipe("knn", "--encoder", f"timm:vit_tiny_patch16_224:{tiny}", *args, "--name", "theirs")
    assert theirs["by_k"] == ours["by_k"]
