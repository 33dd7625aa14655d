"""The analyzes of trained methods, as a user runs them, and that what they report is true."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from common.analysis import load_method
from common.data.normalize import Normalize
from mimkit.tokens import patchify

import difficulty_maps
import droppos
import half_patches
import hpm
import position_accuracy
import pytest
import torch
from PIL import Image
from small_runs import called, finished, refused


@pytest.fixture
def runs(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of small runs of the two methods that have an analysis."""
    for name in ("hpm", "droppos"):
        shutil.copytree(finished(name, tmp_path_factory)[0], tmp_path / name)
    return tmp_path


def test_the_grid_of_position_accuracies_is_printed_drawn_and_kept(runs: Path) -> None:
    args = shlex.split("--mask-ratios 0 0.5 --drop-ratios 0.25 0.5 1")
    text = called("position_accuracy", "--run", runs / "droppos", *args)
    result = json.loads((runs / "droppos" / "position_accuracy.json").read_text())
    cells = torch.tensor(result["accuracy"])
    assert cells.shape == (2, 3)
    assert ((cells >= 0) & (cells <= 100)).all()
    assert result["mean"] == pytest.approx(float(cells.mean()))
    assert f"{result['mean']:.2f}" in text
    assert result["images"] == 497
    assert Image.open(runs / "droppos" / "position_accuracy.png").size[0] > 200


def test_positions_that_are_certain_are_all_found() -> None:
    method = droppos.DropPos(droppos.PRESETS["digits"], Normalize([0.5], [0.5]))
    generator = torch.Generator().manual_seed(0)
    images = (255 * torch.rand(5, 1, 32, 32, generator=generator)).to(torch.uint8)
    noise = {"mask": torch.rand(5, 64, generator=generator), "drop": torch.rand(5, 64, generator=generator)}
    masked, dropped = method.count(0.5, 0.75)
    assert (masked, dropped) == (32, 24)
    asked: list[torch.Tensor] = []

    def locate(patches: torch.Tensor, places: torch.Tensor, lost: torch.Tensor, noise: object) -> torch.Tensor:
        asked.append(lost.sum())
        return torch.nn.functional.one_hot(places + right, 65).float()

    method.locate = locate  # pyright: ignore
    for right, expected in ((0, 5 * 24), (1, 0)):  # noqa: B007
        found = position_accuracy.right_places(method, images, noise, masked=masked, dropped=dropped)
        assert found == expected
    assert asked == [5 * 24, 5 * 24]


def test_predicted_and_measured_difficulty_are_drawn(runs: Path) -> None:
    text = called("difficulty_maps", "--run", runs / "hpm", "--count", 3, "--masks", 4)
    assert "% of the pairs of patches are in the right order (chance 50), in 3 images" in text
    assert Image.open(runs / "hpm" / "difficulty_maps.png").size[0] > 200


def test_measured_difficulty_is_the_mean_error_over_the_masks_that_hide_a_patch(runs: Path) -> None:
    method, _ = load_method(runs / "hpm")
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 16, 16, generator=generator)
    noise = torch.rand(3, 2, 16, generator=generator)
    measured = difficulty_maps.measured_difficulty(method, patches, noise)
    zeros = torch.zeros(2, 12, 16)
    method.decoder.forward = lambda latent, visible, masked: zeros
    # against a prediction of zero the error of a patch is the mean of its squares, whatever hides it
    hidden = (noise.argsort(dim=-1).argsort(dim=-1) >= 4).any(dim=0)
    expected = torch.where(hidden, patches.square().mean(dim=-1), 0.0)
    torch.testing.assert_close(difficulty_maps.measured_difficulty(method, patches, noise), expected)
    assert not torch.allclose(measured, expected)


@pytest.mark.parametrize(("part", "seen"), [("hardest", [1, 3]), ("easiest", [0, 2])])
def test_half_of_the_patches_are_seen_the_hardest_or_the_easiest(part: half_patches.Part, seen: list[int]) -> None:
    method = hpm.HPM(hpm.PRESETS["digits"], Normalize([0.5], [0.5]))
    method.height, method.width = 1, 4
    method.predict_difficulty = lambda patches: (torch.tensor([[0.1, 0.4, 0.2, 0.3]]), patches)  # pyright: ignore
    chosen = half_patches.Half(method, part, 0.5)(torch.zeros(1, 4, 16), torch.rand(1, 4))
    assert chosen.tolist() == [seen]
    by_chance = half_patches.Half(method, "random", 0.5)
    assert by_chance(torch.zeros(1, 4, 16), torch.tensor([[0.1, 0.9, 0.2, 0.8]])).tolist() == [[0, 2]]


def test_classifiers_that_see_half_of_the_patches_are_compared_and_resumed(runs: Path) -> None:
    args: list[Any] = ["--run", runs / "hpm", *shlex.split("--epochs 1 --seeds 0 1 --workers 0 --parts hardest random")]
    text = called("half_patches", *args)
    result = json.loads((runs / "hpm" / "half_patches" / "result.json").read_text())
    assert len(result["hardest"]) == len(result["random"]) == 2
    assert f"hardest   {sum(result['hardest']) / 2:.1f} %" in text
    assert "resuming at step" in called("half_patches", *args)
    assert json.loads((runs / "hpm" / "half_patches" / "result.json").read_text()) == result
    other = refused("half_patches", *args, "--share", "0.25")
    assert re.search(r"half_patches/\w+-\d was started with --share 0.5 and cannot be resumed with 0.25$", other)


@pytest.mark.parametrize(
    ("name", "of", "sentence"),
    [
        ("half_patches", "droppos", "is no run of hpm.py, whose method predicts how hard patches are"),
        ("difficulty_maps", "droppos", "is no run of hpm.py, whose method predicts how hard patches are"),
        ("position_accuracy", "hpm", "is no run of droppos.py, whose method predicts positions"),
    ],
)
def test_a_run_of_another_method_is_refused_in_one_sentence(name: str, of: str, sentence: str, runs: Path) -> None:
    assert refused(name, "--run", runs / of) == f"{name}: {runs / of} {sentence}"


def test_a_classifier_sees_no_more_than_what_is_selected(runs: Path) -> None:
    method, _ = load_method(runs / "hpm")
    from common.evaluation.finetuning import Classifier

    half = half_patches.Half(method, "random", 0.5)
    classifier = Classifier(method.encoder, Normalize([0.5], [0.5]), 3, pool="mean", head_scale=0.1, select=half)
    images = torch.randint(256, (2, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    noise = {"select": torch.linspace(0, 0.9, 16).repeat(2, 1)}  # the first eight patches: the upper half
    other = torch.cat([images[..., :8, :], 255 - images[..., 8:, :]], dim=-2)
    assert not patchify(other, patch=4).equal(patchify(images, patch=4))
    torch.testing.assert_close(classifier.features(images, noise), classifier.features(other, noise))
    assert classifier.predict(images).equal(classifier.predict(images))
    assert not any(parameter.requires_grad for parameter in half.parameters())
