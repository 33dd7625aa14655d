"""The first try with a few images on a laptop: settings that follow others, and what is said of them."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import Network, Optimization, known
from common.networks import decoder_sizes
from common.networks.vit import SIZES
from common.recipe import resolved
from common.training.schedules import learning_rate
from common.training.step import fitting_batch, following

import mae
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_runs import pretrained


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A folder of six RGB images in each of two classes, and of two to test on, none of them gray."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


FAST = shlex.split("--image-size 16 16 --patch 8 --epochs 2 --workers 0 --device cpu --finetune.epochs 1")


# Settings that follow others


@given(st.integers(0, 10**7), st.integers(1, 16))
def test_a_fitting_batch_is_filled_and_can_be_shared(num_images: int, world_size: int) -> None:
    batch = fitting_batch(num_images, world_size)
    share, rest = divmod(batch, world_size)
    assert rest == 0
    assert share in [2**i for i in range(9)]
    assert batch <= max(num_images, world_size)
    assert batch <= 256
    if num_images >= 2 * world_size:
        assert share % 2 == 0  # mixup mixes pairs


@pytest.mark.parametrize(
    ("num_images", "batch"), [(1, 1), (3, 2), (12, 8), (16, 16), (1000, 16), (2048, 64), (8192, 256), (10**6, 256)]
)
def test_few_images_make_a_small_batch(num_images: int, batch: int) -> None:
    assert fitting_batch(num_images, 1) == batch


@pytest.mark.parametrize(
    ("size", "blocks"), {"nano": 1, "tiny": 3, "small": 3, "base": 3, "large": 6, "huge": 8}.items()
)
def test_the_decoder_follows_the_encoder(size: Any, blocks: int) -> None:
    follows = Network(size=size, decoder_dim=None, decoder_depth=None, decoder_heads=None)
    dim, depth, heads = decoder_sizes(follows)
    assert (dim, heads) == (SIZES[size]["dim"] // 2, SIZES[size]["heads"])
    assert depth == blocks
    assert decoder_sizes(replace(follows, decoder_depth=2)) == (dim, 2, heads)
    odd, _, fewer = decoder_sizes(replace(follows, decoder_dim=20))
    assert odd == 20
    assert 20 % fewer == 0
    assert decoder_sizes(Network(size=size)) == (512, 8, 16)


def test_the_warm_up_follows_the_epochs_unless_it_is_given() -> None:
    for epochs, warmup in {1: 0.1, 40: 4, 200: 20, 1600: 20}.items():
        found = following(Optimization(epochs=epochs, batch_size=8, warmup_epochs=None), 100, 1)
        assert found == {"batch_size": 8, "warmup_epochs": warmup}
    assert following(Optimization(epochs=1, batch_size=None, warmup_epochs=0.0), 100, 1)["warmup_epochs"] == 0


def test_nothing_is_trained_with_a_setting_that_is_not_resolved() -> None:
    with pytest.raises(TypeError, match="has not been resolved"):
        known(None)
    with pytest.raises(TypeError, match="has not been resolved"):
        learning_rate(0, Optimization(batch_size=8, warmup_epochs=None), 10)


# The whole


@pytest.mark.parametrize("again", [[], ["--resume"]])
def test_a_few_images_are_enough_on_a_laptop(
    again: list[str], few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = ["--data", few, *FAST, "--runs", tmp_path]
    text = pretrained("mae", *args)
    assert "no GPU: --preset small" in text
    settings = json.loads((tmp_path / "mae" / "config.json").read_text())
    network, optimization = settings["network"], settings["optimization"]
    assert (network["size"], network["decoder_dim"], network["decoder_depth"]) == ("nano", 48, 1)
    assert (optimization["batch_size"], optimization["warmup_epochs"]) == (8, 0.2)
    tuned = settings["finetune"]["optimization"]
    assert (tuned["batch_size"], tuned["warmup_epochs"]) == (8, 0.1)
    if again:
        assert "no GPU" not in pretrained("mae", "--runs", tmp_path, *again)
        assert json.loads((tmp_path / "mae" / "config.json").read_text()) == settings


def test_a_preset_that_is_given_is_not_explained(few: Path, tmp_path: Path) -> None:
    text = pretrained("mae", "--preset", "small", "--data", few, *FAST, "--evaluate", "--runs", tmp_path)
    assert "no GPU" not in text


def test_what_is_given_does_not_follow() -> None:
    config = mae.PRESETS["imagenet"]
    data: Any = type("Images", (), {"train": [0] * 100, "labeled": None})()
    assert resolved(config, data, 1) == config
