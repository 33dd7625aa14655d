"""What a run tells: pictures that can be opened, colors by a fixed rule, and the numbers of the table."""

import json
import warnings
from pathlib import Path
from typing import Any

from common.evaluation.evaluations import EVALUATIONS
from common.files import read_json
from common.report.curves import draw_curves
from common.report.pictures import Pictures, draw_pictures, gray_out, shown
from common.report.tables import table, tuned_table
from mimkit.tokens import patchify, unpatchify

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import fast, seeded
from torch import Tensor


def drawn(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def share(picture: np.ndarray, color: tuple[int, int, int]) -> float:
    return float((abs(picture - np.array(color)).max(axis=-1) <= 1).mean())


# Pictures


@pytest.mark.parametrize("channels", [1, 3, 10])
@pytest.mark.parametrize("size", [(8, 8), (8, 20), (20, 8)])
def test_pictures_of_any_shape_can_be_opened(channels: int, size: tuple[int, int], tmp_path: Path):
    columns = {title: seeded(2, channels, *size, seed=i) for i, title in enumerate(("input", "seen", "target"))}
    draw_pictures(tmp_path / "a.png", Pictures(columns, "a note"))
    height, width, _ = drawn(tmp_path / "a.png").shape
    assert width > height > 200
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_more_samples_make_more_rows_as_many_as_all_kinds_have(tmp_path: Path):
    for rows in (1, 4):
        columns = {"input": seeded(5, 1, 4, 4), "target": seeded(rows, 1, 4, 4)}
        draw_pictures(tmp_path / f"{rows}.png", Pictures(columns))
    assert len(drawn(tmp_path / "4.png")) > 2 * len(drawn(tmp_path / "1.png"))


def test_wide_images_stand_close_together(tmp_path: Path):
    for side in (4, 12):
        draw_pictures(tmp_path / f"{side}.png", Pictures({"input": seeded(3, 1, side, 12)}))
    assert len(drawn(tmp_path / "4.png")) < 0.6 * len(drawn(tmp_path / "12.png"))


@pytest.mark.parametrize(("captions", "upper"), [(("loss 0.5", ""), True), (("", "loss 0.5"), False)])
def test_a_caption_stands_under_its_row(captions: tuple[str, ...], upper: bool, tmp_path: Path):
    draw_pictures(tmp_path / "a.png", Pictures({"input": torch.ones(2, 1, 6, 6)}, captions=captions))
    dark = np.nonzero(drawn(tmp_path / "a.png").max(axis=-1).min(axis=-1) < 99)[0]  # rows of pixels with letters
    height = len(drawn(tmp_path / "a.png"))
    below_title = dark[dark > 0.1 * height]
    assert len(below_title) > 5
    assert (below_title < 0.6 * height).all() if upper else (below_title > 0.85 * height).all()


def test_colors_are_drawn_as_they_are(tmp_path: Path):
    image = torch.tensor([1.0, 0.25, 0.0]).view(1, 3, 1, 1).repeat(1, 1, 6, 9)
    image[:, :, 3:] = image[:, :, :3].flip(1)  # red above, blue below
    draw_pictures(tmp_path / "a.png", Pictures({"input": image}))
    picture = drawn(tmp_path / "a.png")
    red, blue = (abs(picture - np.array(color)).max(axis=-1) <= 1 for color in ((255, 64, 0), (0, 64, 255)))
    assert min(red.mean(), blue.mean()) > 0.1
    assert np.nonzero(red)[0].max() < np.nonzero(blue)[0].min()


@pytest.mark.parametrize("channels", [1, 2, 10])
def test_grays_are_not_stretched_and_many_channels_are_drawn_as_their_mean(channels: int, tmp_path: Path):
    gray = (torch.arange(channels) / max(channels - 1, 1) * 0.5).view(1, channels, 1, 1).expand(1, channels, 6, 9)
    expected = round(255 * gray.mean().item())
    draw_pictures(tmp_path / "a.png", Pictures({"input": gray}))
    assert share(drawn(tmp_path / "a.png"), (expected, expected, expected)) > 0.2


def test_what_is_out_of_range_or_half_precise_is_drawn_too(tmp_path: Path):
    bright = torch.full((1, 1, 6, 9), 7.0, dtype=torch.bfloat16, requires_grad=True)
    draw_pictures(tmp_path / "a.png", Pictures({"input": -bright}))
    assert share(drawn(tmp_path / "a.png"), (0, 0, 0)) > 0.2


@fast
@given(st.integers(0, 99), st.floats(0.1, 10))
def test_normalized_pixels_are_shown_by_one_fixed_rule(seed: int, scale: float):
    values = ((seeded(20, seed=seed) - 0.5) * scale).sort().values
    grays = shown(values)
    assert (grays.diff() >= 0).all()
    assert ((grays >= 0) & (grays <= 1)).all()
    assert grays[:3].equal(shown(values[:3]))  # the others have no influence
    within = values.abs() < 2.5
    torch.testing.assert_close(grays[within], values[within] / 5 + 0.5)


def test_zero_is_shown_as_middle_gray_and_far_values_as_black_and_white():
    assert shown(torch.tensor([-9.0, -2.5, 0.0, 2.5, 9.0])).tolist() == [0, 0, 0.5, 1, 1]


@st.composite
def covered(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Images, a mask of their patches, and their grid."""
    grid = {name: draw(st.integers(1, 4)) for name in ("height", "width", "patch")}
    seed, channels = draw(st.integers(0, 99)), draw(st.sampled_from([1, 3, 10]))
    H, W = grid["height"] * grid["patch"], grid["width"] * grid["patch"]
    mask = seeded(2, grid["height"] * grid["width"], seed=seed) < draw(st.floats(0, 1))
    return seeded(2, channels, H, W, seed=seed + 1), mask, grid


@fast
@given(covered())
def test_exactly_the_masked_patches_are_covered_with_gray(arguments):
    images, mask, grid = arguments
    before = images.clone()
    patches = patchify(images, patch=grid["patch"])
    expected = unpatchify(torch.where(mask[..., None], 0.5, patches), **grid)
    assert gray_out(images, mask, **grid).equal(expected)
    assert images.equal(before)


# Curves


def records(count: int) -> list[dict[str, Any]]:
    apart = {"images_per_second": 100.0, "waiting": 0.1}
    return [{"step": i, "epoch": i / 2, "loss": 1 / (i + 1), "inner": 0.5, "lr": 0.1 * i} | apart for i in range(count)]


@pytest.mark.parametrize("counts", [(0,), (1,), (5,), (5, 0, 3)])
def test_curves_are_drawn_also_of_trainings_without_a_record(counts: tuple[int, ...], tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(tmp_path / "a.png", {f"training {i}": records(count) for i, count in enumerate(counts)})
    assert drawn(tmp_path / "a.png").shape[1] == 600 * len(counts)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_drawing_shows_the_records(tmp_path: Path):
    draw_curves(tmp_path / "empty.png", {"training": []})
    draw_curves(tmp_path / "full.png", {"training": records(9)})
    blue = (31, 119, 180)
    assert share(drawn(tmp_path / "empty.png"), blue) == 0
    assert share(drawn(tmp_path / "full.png"), blue) > 0.002


# The table

TITLES = {key: evaluation.title for key, evaluation in EVALUATIONS.items()}
TRAINED = {"epoch": 120.0, "seconds": 71.6, "loss": 0.43218, "images_per_second": 2187.4, "waiting": 0.0431}


def row(accuracy: float, epochs: float, seconds: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "epoch": epochs, "seconds": seconds, "test": 397, "labeled": 100}


def test_the_table_holds_the_numbers_of_the_run(tmp_path: Path):
    rows = {"finetune": row(93.25, 101, 12.3), "scratch": row(51.04, 102, 11.8), "budget": row(70.9, 703, 84.6)}
    for file in ("encoder.safetensors", "result.json"):
        (tmp_path / file).touch()
    lines = table("mae", {"pretraining": TRAINED, **rows}, TITLES, tmp_path).splitlines()
    assert (
        "mae: pre-trained for 120 epochs in 72 s, loss 0.4322, 2187 images/s, 4.3% of the time waiting for data"
        in lines
    )
    numbers = {line[:42].strip(): line[42:].split() for line in lines if "─" not in line}
    assert numbers["accuracy on 397 test images"] == ["accuracy", "epochs", "seconds"]
    assert numbers["pre-trained, then fine-tuned"] == ["93.2", "%", "101", "12"]
    assert numbers["from scratch, same epochs"] == ["51.0", "%", "102", "12"]
    assert numbers["from scratch, same compute"] == ["70.9", "%", "703", "85"]
    assert "100 labeled images" in lines
    assert lines[lines.index("files:") + 1 :] == [
        f"  {tmp_path / 'encoder.safetensors'}",
        f"  {tmp_path / 'result.json'}",
    ]


@pytest.mark.parametrize("kept", [(), ("finetune",), ("scratch",)])
def test_the_table_holds_only_the_evaluations_that_were_made(kept: tuple[str, ...], tmp_path: Path):
    text = table("mae", {"pretraining": TRAINED, **{key: row(51.04, 100, 12) for key in kept}}, TITLES, tmp_path)
    assert text.count("51.0 %") == len(kept)
    assert ("accuracy" in text) == bool(kept)


def test_a_classifier_alone_has_a_sentence(tmp_path: Path):
    text = tuned_table("fine-tuning", row(93.25, 100, 12.3) | {"images_per_second": 512.3, "waiting": 0.02}, tmp_path)
    assert text.splitlines()[1] == (
        "fine-tuning: 93.2 % of 397 test images are right, after 100 epochs of 100 labeled images in 12 s, "
        "512 images/s, 2.0% of the time waiting for data"
    )


def test_a_result_is_read_as_it_was_written(tmp_path: Path):
    (tmp_path / "result.json").write_text(json.dumps({"a": [1, 2.5, None]}))
    assert read_json(tmp_path / "result.json") == {"a": [1, 2.5, None]}
