"""A trained method, loaded again from its run, and what it makes of images."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.analysis import load_method
from common.data.embedded import Digits
from common.data.views import CenterCrop
from common.files import read_tensors
from common.pretraining import pretrain
from common.training.checkpoint import Checkpoints

import pytest
import reconstruct
import torch
from PIL import Image
from reconstruct import Config
from small_runs import SMALL, finished, recipe, refused
from test_config import MODULES

METHODS: dict[str, Any] = {module.__name__: module for module in MODULES if hasattr(module, "RECIPE")}
ALONE = ("mae", "beyond_masking", "beyond_masking_integrated")  # whose loss is the mean of those of the images


@pytest.fixture
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a small run of a recipe."""
    return lambda name: finished(name, tmp_path_factory)[0]


@pytest.fixture
def run(run_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A run of MAE of which nothing is left but its configuration and its checkpoint."""
    for name in ("config.json", "checkpoint"):
        copy = shutil.copytree if name == "checkpoint" else shutil.copy
        copy(run_of("mae") / name, tmp_path / name)
    return tmp_path


def drawn(capsys: pytest.CaptureFixture[str], **settings: Any) -> list[dict[str, float]]:
    """The losses in the table that `reconstruct` prints, one row per image."""
    capsys.readouterr()
    reconstruct.main(Config(**settings))
    return rows(capsys.readouterr().out)


def rows(text: str) -> list[dict[str, float]]:
    head = next(line for line in text.splitlines() if re.match(r" +loss", line)).split()
    found = [line.split()[-len(head) :] for line in text.splitlines() if re.match(r"\d+: ", line)]
    return [dict(zip(head, map(float, row), strict=True)) for row in found]


# Loading


@pytest.mark.parametrize("name", METHODS)
def test_a_trained_method_is_loaded_as_it_was_saved(name: str, run_of: Callable[[str], Path]):
    run = run_of(name)
    method, config = load_method(run)
    assert type(method) is METHODS[name].RECIPE.method
    assert not method.training
    assert config.data.image_size == (16, 16)
    assert config.run.runs == run.parent
    found = Checkpoints(run / "checkpoint").load()
    assert found is not None
    saved = {key.removeprefix("method."): value for key, value in found.tensors.items() if key.startswith("method.")}
    state = method.state_dict()
    assert state.keys() == saved.keys()
    assert all(value.equal(state[key]) for key, value in saved.items())
    exported = read_tensors(run / "encoder.safetensors")[1]
    assert method.normalize.mean.flatten().tolist() == exported["mean"]
    assert method.normalize.std.flatten().tolist() == exported["std"]


def test_a_run_that_is_still_training_gives_its_newest_checkpoint_that_is_whole(run: Path, capsys: Any):
    checkpoints = Checkpoints(run / "checkpoint")
    found = checkpoints.load()
    assert found is not None
    step, tensors, state = found.step, found.tensors, found.state
    checkpoints.save(step + 1, tensors | {"method.decoder.mask_token": torch.full((1, 1, 48), 3.0)}, state)
    assert (load_method(run)[0].decoder.mask_token == 3).all()
    assert capsys.readouterr().out == f"{run}: mae after {step + 1} steps\n"
    (run / "checkpoint" / f"step_{step + 1:09d}" / "tensors.safetensors").write_bytes(b"cut off")
    assert not (load_method(run)[0].decoder.mask_token == 3).any()


def test_what_a_run_started_from_need_not_be_there_any_more(run: Path):
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"weights": "gone.pth"}))
    assert load_method(run)[1].weights == Path("gone.pth")


def spoil(run: Path, how: str) -> None:
    settings = json.loads((run / "config.json").read_text())
    match how:
        case "no configuration":
            (run / "config.json").unlink()
        case "no checkpoint":
            shutil.rmtree(run / "checkpoint")
        case "another recipe" | "an evaluation" | "no recipe":
            recipe = {"another recipe": {"recipe": "../mae"}, "an evaluation": {"recipe": "finetune"}}.get(how)
            del settings["recipe"]
            (run / "config.json").write_text(json.dumps(settings | (recipe or {})))
        case "another setting":
            (run / "config.json").write_text(json.dumps(settings | {"color": "red"}))


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no configuration", "{run} is not the folder of a run: it has no config.json that names a recipe"),
        ("no recipe", "{run} is not the folder of a run: it has no config.json that names a recipe"),
        ("another recipe", "../mae is not a pre-training recipe: there is no recipes/../mae.py with a RECIPE"),
        ("an evaluation", "finetune is not a pre-training recipe: there is no recipes/finetune.py with a RECIPE"),
        ("no checkpoint", "{run} has no checkpoint yet"),
        ("another setting", "settings of Config are unknown: color"),
    ],
)
def test_a_folder_that_is_no_run_is_told_in_one_sentence(how: str, sentence: str, run: Path):
    spoil(run, how)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence.format(run=run))}$"):
        load_method(run)


def test_a_run_is_not_resumed_by_another_recipe(run: Path):
    args = [*SMALL, "--evaluate", "--runs", str(run.parent), "--name", run.name, "--resume"]
    with pytest.raises(SystemExit) as ended:
        pretrain(METHODS["simmim"].RECIPE, name="simmim", args=args)
    assert ended.value.code == f"simmim: {run} holds a run of mae, which simmim cannot resume: give another --name"


# Drawing


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_drawn_and_its_losses_are_in_a_table(name: str, run_of: Callable[[str], Path], capsys: Any):
    run = run_of(name)
    if name == "mae":
        out = recipe("reconstruct", "--run", run, "--count", 3).stdout
    else:
        capsys.readouterr()
        reconstruct.main(Config(run=run, count=3))
        out = capsys.readouterr().out
    found = rows(out)
    assert len(found) == 3
    assert all(0.1 < row["loss"] < 10 for row in found)
    assert ("outer" in found[0]) == (name == "beyond_masking_integrated")
    assert out.endswith(f"files:\n  {run / 'reconstructions.png'}\n")
    with Image.open(run / "reconstructions.png") as picture:
        assert min(picture.size) > 400


def test_a_picture_goes_where_it_is_wanted_and_has_a_row_per_image(run: Path, tmp_path: Path):
    heights = []
    for count in (1, 3):
        reconstruct.main(Config(run=run, count=count, out=tmp_path / "new" / "a.png"))
        with Image.open(tmp_path / "new" / "a.png") as picture:
            heights.append(picture.size[1])
    assert heights[1] > 2 * heights[0]
    assert not (run / "reconstructions.png").exists()


@pytest.mark.parametrize("name", ALONE)
def test_the_losses_are_those_of_the_trained_method_on_these_images(
    name: str, run_of: Callable[[str], Path], capsys: Any
):
    """As computed for all images at once."""
    found = drawn(capsys, run=run_of(name), count=5, seed=3)
    method, _ = load_method(run_of(name))
    test = Digits("test")
    crop = CenterCrop(method.view_size, crop_fraction=1.0)
    images = torch.stack([crop(test.image(index)) for index in (0, 99, 198, 298, 397)])
    generator = torch.Generator().manual_seed(3)
    noise = method.noise(lambda *shape: torch.rand(*shape, generator=generator), 5)
    with torch.no_grad():
        expected = method(images, noise, torch.ones(()))
    assert found[0].keys() == expected.keys()
    for key, value in expected.items():
        assert sum(row[key] for row in found) / 5 == pytest.approx(float(value), abs=1e-4)
    assert len({row["loss"] for row in found}) == 5


def test_other_weights_have_other_losses(run: Path, capsys: Any):
    before = drawn(capsys, run=run, count=2)
    checkpoints = Checkpoints(run / "checkpoint")
    found = checkpoints.load()
    assert found is not None
    found.tensors["method.decoder.head.bias"] += 1
    checkpoints.save(found.step, found.tensors, found.state)
    after = drawn(capsys, run=run, count=2)
    assert all(new["loss"] > old["loss"] + 0.5 for old, new in zip(before, after, strict=True))


def test_the_seed_draws_the_masks_and_nothing_else_is_left_to_chance(run: Path, capsys: Any):
    first, again = (drawn(capsys, run=run, count=4) for _ in range(2))
    assert first == again
    other = drawn(capsys, run=run, count=4, seed=1)
    assert all(one["loss"] != two["loss"] for one, two in zip(first, other, strict=True))
    trained = drawn(capsys, run=run, count=4, split="train")
    assert all(one["loss"] != two["loss"] for one, two in zip(first, trained, strict=True))


def test_images_of_ones_own_need_no_classes(run: Path, tmp_path: Path, capsys: Any):
    for folder, grays in {"plain": (10, 200), "sorted/val": (90,), "sorted/train": (50, 60, 70)}.items():
        (tmp_path / folder).mkdir(parents=True)
        for gray in grays:
            Image.linear_gradient("L").resize((20, 30)).rotate(gray).save(tmp_path / folder / f"{gray}.png")
    for folder, split, count in (("plain", "test", 2), ("sorted", "test", 1), ("sorted", "train", 3)):
        assert len(drawn(capsys, run=run, data=tmp_path / folder, split=split)) == count


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "give either the --run of a recipe here, or a --recipe and its --weights"),
        ({"run": Path("a"), "weights": Path("b")}, "give either the --run of a recipe here"),
        ({"run": Path("nowhere")}, "nowhere is not the folder of a run"),
        ({"weights": Path("nowhere.pth")}, "give either the --run of a recipe here"),
        ({"run": Path("a"), "recipe": "mae"}, "give either the --run of a recipe here"),
        ({"recipe": "mae"}, "give either the --run of a recipe here"),
        ({"recipe": "knn", "weights": Path("nowhere.pth")}, "knn is not a pre-training recipe"),
        ({"recipe": "mae", "preset": "digits", "weights": Path("nowhere.pth")}, "nowhere.pth is not a file"),
    ],
)
def test_what_cannot_be_drawn_is_told_in_one_sentence(settings: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        reconstruct.main(Config(**settings))


def test_wrong_images_are_told_in_one_sentence(run: Path, tmp_path: Path):
    assert refused("reconstruct", "--run", run, "--count", 0) == "reconstruct: --count 0: must be at least 1"
    nowhere = tmp_path / "nowhere"
    assert refused("reconstruct", "--run", run, "--data", nowhere) == f"reconstruct: {nowhere} is not a folder"


# Published weights


def published(name: str, run: Path, folder: Path) -> Path:
    """Write the weights of a run under the names that its paper's authors gave them."""
    theirs = {
        "mae": {
            "encoder.": "",
            "decoder.mask_token": "mask_token",
            "decoder.head.": "decoder_pred.",
            "decoder.": "decoder_",
        },
        "beyond_masking_integrated": {"decoder.mask_token": "mask_token", "decoder.embed.": "encoder_to_decoder."},
    }[name]
    method, _ = load_method(run)
    weights = {}
    for key, value in method.state_dict().items():
        ours = next((ours for ours in theirs if key.startswith(ours)), "")
        weights[theirs.get(ours, "") + key.removeprefix(ours)] = value
    torch.save({"model": {k: v for k, v in weights.items() if "normalize" not in k}}, folder / "published.pth")
    return folder / "published.pth"


@pytest.mark.parametrize("name", ["mae", "beyond_masking_integrated"])
def test_published_weights_are_drawn_as_the_run_is(
    name: str, run_of: Callable[[str], Path], tmp_path: Path, capsys: Any
):
    shared: dict[str, Any] = {"split": "train", "count": 3, "out": tmp_path / "a.png"}
    expected = drawn(capsys, run=run_of(name), **shared)
    options = "--image-size 16 16 --patch 4" + " --view-size 22 22" * (name != "mae")
    weights = published(name, run_of(name), tmp_path)
    found = drawn(capsys, recipe=name, weights=weights, preset="digits", options=options, **shared)
    assert found == expected


def test_published_weights_without_a_decoder_draw_nothing(run: Path, tmp_path: Path):
    path = published("mae", run, tmp_path)
    weights = {key: value for key, value in torch.load(path)["model"].items() if not key.startswith("decoder")}
    torch.save(weights, path)
    settings = Config(recipe="mae", weights=path, preset="digits", options="--image-size 16 16")
    with pytest.raises(ValueError, match=r"weights are missing in the file: decoder\."):
        reconstruct.main(settings)
