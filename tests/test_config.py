"""The command line: presets, options without a prefix, and a help text that says something of each."""

import ast
import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

from common import config as settings
from common.config import from_json, parse, to_json

import mae
import pytest
import torch

RECIPES = Path(mae.__file__).parent
MODULES = [importlib.import_module(path.stem) for path in sorted(RECIPES.glob("*.py"))]
PRESETS: dict[str, dict[str, Any]] = {
    module.__name__: module.PRESETS for module in MODULES if hasattr(module, "PRESETS")
}
TUNING = ("finetune", "nonlinear_probe")  # whose settings of fine-tuning stand without a prefix
GROUPS = ("Run", "Images", "Network", "Optimization", "Finetuning", "Probed", "Linear", "Neighbors", "Nonlinear")


def mae_with(*args: str) -> mae.Config:
    return parse(PRESETS["mae"], args)


# Presets


@pytest.mark.parametrize("recipe", PRESETS)
def test_digits_are_the_default_and_a_folder_with_data(recipe: str):
    presets = PRESETS[recipe]
    assert parse(presets, []) == presets["digits"]
    assert to_json(parse(presets, ["--data", "d"])) == _with_data(recipe, presets["folder"])
    assert to_json(parse(presets, ["--data=d"])) == _with_data(recipe, presets["folder"])


def _with_data(recipe: str, preset: Any) -> dict[str, Any]:
    expected = to_json(preset)
    (expected if recipe == "finetune" else expected.get("images") or expected["probed"])["data"] = "d"
    return expected


@pytest.mark.parametrize(("recipe", "preset"), [(recipe, name) for recipe in PRESETS for name in PRESETS[recipe]])
def test_a_preset_fills_all_settings_at_once(recipe: str, preset: str):
    presets = PRESETS[recipe]
    assert parse(presets, ["--preset", preset]) == presets[preset]
    assert parse(presets, ["--seed", "1", f"--preset={preset}"]).run.seed == 1
    assert to_json(parse(presets, ["--preset", preset, "--data", "d"])) == _with_data(recipe, presets[preset])


def test_the_imagenet_presets_are_those_of_the_papers():
    ours = mae_with("--preset", "imagenet")
    assert (ours.optimization.batch_size, ours.optimization.base_lr, ours.optimization.warmup_epochs) == (
        4096,
        1.5e-4,
        40,
    )
    assert (ours.optimization.epochs, ours.optimization.weight_decay, ours.optimization.betas) == (
        1600,
        0.05,
        (0.9, 0.95),
    )
    assert (ours.mask_ratio, ours.images.crop_scale, ours.images.flip) == (0.75, (0.2, 1.0), 0.5)
    assert (ours.network.decoder_dim, ours.network.decoder_depth, ours.network.decoder_heads) == (512, 8, 16)
    other = parse(PRESETS["beyond_masking_integrated"], ["--preset", "imagenet"])
    assert (other.optimization.batch_size, other.optimization.epochs, other.optimization.min_lr) == (2048, 300, 1e-5)
    assert (other.network.decoder_dim, other.network.decoder_depth, other.network.decoder_heads) == (384, 4, 6)
    for name, depth, each, rate in (("hpm", 8, False, 5e-4), ("droppos", 2, True, 1e-3)):
        found = parse(PRESETS[name], ["--preset", "imagenet"])
        settings, tuned = found.optimization, found.finetune
        assert (settings.batch_size, settings.epochs, settings.warmup_epochs) == (4096, 200, 10)
        assert (settings.base_lr, settings.weight_decay, settings.betas) == (1.5e-4, 0.05, (0.9, 0.95))
        assert (settings.clip, settings.clip_each, found.mask_ratio) == (5.0, each, 0.75)
        assert (found.network.decoder_dim, found.network.decoder_depth, found.network.decoder_heads) == (512, depth, 16)
        assert (tuned.optimization.base_lr, tuned.optimization.layer_decay, tuned.pool) == (rate, 0.8, "mean")
        assert tuned.train_positions == (name == "hpm")
    hard, dropped = (PRESETS[name]["imagenet"] for name in ("hpm", "droppos"))
    assert (hard.hard, hard.momentum, hard.momentum_epochs, hard.target) == ((0, 0.5), (0.999, 0.9999), 100, "pixels")
    assert (dropped.drop_ratio, dropped.sigma, dropped.temperature, dropped.dropped) == (0.75, (1, 0), 0.1, "learned")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--preset", "cifar"], "--preset cifar: choose one of digits, folder, imagenet"),
        (["--preset=cifar"], "--preset cifar: choose one of digits, folder, imagenet"),
        (["--seed", "1", "--preset"], "--preset : choose one of digits, folder, imagenet"),
    ],
)
def test_an_unknown_preset_is_one_sentence(args: list[str], sentence: str):
    with pytest.raises(SystemExit) as caught:
        mae_with(*args)
    assert caught.value.code == sentence


# Options


def test_options_stand_without_a_prefix_and_those_of_fine_tuning_with_one():
    found = mae_with(
        *shlex.split("--image-size 96 160 --channels 1 --size tiny --epochs 3 --finetune.epochs 4 --keep 5")
    )
    assert found.images == dataclasses.replace(mae.DIGITS.images, image_size=(96, 160), channels=1)
    assert found.network == dataclasses.replace(mae.DIGITS.network, size="tiny")
    assert (found.optimization.epochs, found.finetune.optimization.epochs, found.run.keep) == (3, 4, 5)
    assert found.finetune == dataclasses.replace(
        mae.DIGITS.finetune, optimization=dataclasses.replace(mae.DIGITS.finetune.optimization, epochs=4)
    )


def test_in_the_recipe_of_fine_tuning_its_options_stand_without_a_prefix_too():
    found = parse(PRESETS["finetune"], shlex.split("--encoder a.pth --epochs 4 --pool class --image-size 32 48"))
    assert (found.encoder, found.image_size) == (Path("a.pth"), (32, 48))
    assert (found.finetune.optimization.epochs, found.finetune.pool) == (4, "class")


def test_lists_switches_and_nothing_can_be_said():
    assert mae_with("--evaluate").evaluate == ()
    assert mae_with("--evaluate", "finetune", "budget").evaluate == ("finetune", "budget")
    assert not mae_with("--no-normalize-target").normalize_target
    assert mae_with("--clip", "1").optimization.clip == 1
    assert mae_with("--clip", "None").optimization.clip is None
    assert mae_with("--undecayed", "mask_token").optimization.undecayed == ("mask_token",)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--epoch", "3"], "--epoch"),
        (["--epochs", "many"], "--epochs"),
        (["--image-size", "96"], "--image-size"),
        (["--channels", "2"], "--channels"),
        (["--size", "giant"], "--size"),
        (["--evaluate", "guess"], "--evaluate"),
    ],
)
def test_a_wrong_option_is_named(args: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        mae_with(*args)
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


# Files


@pytest.mark.parametrize(("recipe", "preset"), [(recipe, name) for recipe in PRESETS for name in PRESETS[recipe]])
def test_settings_are_json(recipe: str, preset: str):
    plain = to_json(PRESETS[recipe][preset])
    assert json.loads(json.dumps(plain)) == plain
    assert set(plain) == {field.name for field in dataclasses.fields(PRESETS[recipe][preset])}


def test_paths_become_text_and_tuples_lists():
    found = to_json(mae_with("--data", "a/b", "--preset", "digits", "--evaluate", "finetune"))
    assert found["images"]["data"] == str(Path("a/b"))
    assert found["images"]["image_size"] == [32, 32]
    assert found["finetune"]["optimization"]["betas"] == [0.9, 0.999]
    assert found["evaluate"] == ["finetune"]
    assert found["weights"] is None


@pytest.mark.parametrize(("recipe", "preset"), [(recipe, name) for recipe in PRESETS for name in PRESETS[recipe]])
def test_settings_come_back_from_a_file_as_they_were(recipe: str, preset: str):
    for config in (PRESETS[recipe][preset], parse(PRESETS[recipe], ["--preset", preset, "--data", "a/b"])):
        assert from_json(type(config), json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("group", "name", "sentence"),
    [
        ("", "color", "settings of Config are unknown: color"),
        ("optimization", "color", "settings of Optimization are unknown: color"),
        ("finetune", "pool", "settings of Finetuning are missing: pool"),
        ("", "mask_ratio", "settings of Config are missing: mask_ratio"),
    ],
)
def test_a_setting_that_is_unknown_or_missing_is_named(group: str, name: str, sentence: str):
    values = to_json(mae.DIGITS)
    settings = values[group] if group else values
    if name in settings:
        del settings[name]
    else:
        settings[name] = 3
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        from_json(mae.Config, values)


# Help


def options(recipe: str) -> set[str]:
    """The option of every setting."""

    def leaves(value: dict[str, Any], prefix: str) -> Any:
        for name, item in value.items():
            flat = name.capitalize() in GROUPS or name == "settings" or (name == "finetune" and recipe in TUNING)
            if isinstance(item, dict):
                yield from leaves(item, prefix if flat else f"{prefix}{name}.")
            else:
                yield f"--{prefix}{name.replace('_', '-')}"

    return set(leaves(to_json(PRESETS[recipe]["digits"]), ""))


@pytest.mark.parametrize("recipe", PRESETS)
def test_the_help_says_what_every_option_is(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    module = importlib.import_module(recipe)
    with pytest.raises(SystemExit) as caught:
        parse(PRESETS[recipe], ["--help"], description=module.__doc__)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert (module.__doc__ or "").splitlines()[0].split(",")[0] in text
    assert f"--preset {{{','.join(PRESETS[recipe])}}}" in text
    assert f"python recipes/{recipe}.py" in text

    said: dict[str, str] = {}
    name = ""
    for indent, words in re.findall(r"^(?:│ |  )( *)(.*?)[ │]*$", text, re.MULTILINE):  # the frame is not always drawn
        if re.match(r"--\w", words) and not indent:
            flags, _, sentence = words.partition("  ")
            name = re.split("[ ,]", flags)[0]
            said[name] = sentence
        elif name and indent:
            said[name] += f" {words}"
        else:
            name = ""
    assert set(said) == options(recipe)
    silent = [name for name, sentence in said.items() if not re.match(r".*[a-z]{2,}.*\(default", sentence)]
    assert silent == []


def fields_without_words(path: Path) -> list[str]:
    """The fields of dataclasses that no docstring follows; a group of settings has its own."""
    silent = []
    for part in ast.parse(path.read_text()).body:
        if isinstance(part, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in part.decorator_list):
            for field, after in zip(part.body, [*part.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    group = re.fullmatch(rf"(Flat\[)?({'|'.join(GROUPS)})\]?", ast.unparse(field.annotation))
                    told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
                    if not group and not told:
                        silent.append(f"{part.name}.{ast.unparse(field.target)}")
    return silent


@pytest.mark.parametrize(
    "path",
    [Path(settings.__file__), RECIPES / "common" / "evaluation" / "finetuning.py", *sorted(RECIPES.glob("*.py"))],
    ids=lambda path: path.stem,
)
def test_every_setting_has_a_sentence(path: Path):
    assert fields_without_words(path) == []
    tree = ast.parse(path.read_text())
    names = (*GROUPS, "Config", "Study")
    configurations = [part for part in tree.body if isinstance(part, ast.ClassDef) and part.name in names]
    assert configurations
    assert all(ast.get_docstring(part) for part in configurations)


def test_every_recipe_is_looked_at():
    assert {module.__name__ for module in MODULES if hasattr(module, "pretrain") or hasattr(module, "probe")} <= {
        *PRESETS
    }
    for module in MODULES:
        if hasattr(module, "pretrain"):
            assert issubclass(module.METHOD, torch.nn.Module)
            assert {type(preset) for preset in module.PRESETS.values()} == {module.Config}
