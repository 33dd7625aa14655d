"""The command line: presets, options without a prefix, and a help text that says something of each."""

import ast
import dataclasses
import importlib
import inspect
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import Must, SettingsError, changed_settings, check, from_json, parse, settings_of, to_json
from common.data.normalize import Normalize
from common.networks.vit import SIZES
from common.recipe import Recipe

import mae
import pytest
import torch

RECIPES = Path(mae.__file__).parent
MODULES = [importlib.import_module(path.stem) for path in sorted(RECIPES.glob("*.py"))]
PRESETS: dict[str, dict[str, Any]] = {
    module.__name__: module.PRESETS for module in MODULES if hasattr(module, "PRESETS")
}
TUNING = ("finetune", "nonlinear_probe")  # whose settings of fine-tuning stand without a prefix
GROUPS = ("Run", "DataSettings", "Network", "Optimization", "Finetuning", "Probed", "Linear", "Neighbors", "Nonlinear")
FLAT = ("run", "data", "network", "optimization", "probed", "settings")  # fields whose options stand without a prefix
SETTINGS = (*GROUPS, "Config", "ContextConfig", "Study")  # the names of all classes of settings
EVERY = [(recipe, preset) for recipe in PRESETS for preset in PRESETS[recipe]]


CHOICES = "choose one of mnist, digits, shapes, small, folder, imagenet, imagenet_large, imagenet_huge"
DIGITS = mae.PRESETS["mnist"]


def mae_with(*args: str) -> mae.Config:
    return parse(PRESETS["mae"], args)


# Presets


@pytest.mark.parametrize("recipe", PRESETS)
def test_mnist_is_the_default_and_with_data_what_suits_the_machine(recipe: str, monkeypatch: pytest.MonkeyPatch):
    presets = PRESETS[recipe]
    assert parse(presets, []) == presets["mnist"]
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=gpu: found)
        folder = presets["folder"] if gpu else presets.get("small", presets["folder"])
        assert to_json(parse(presets, ["--data", "d"])) == _with_data(recipe, folder)
        assert to_json(parse(presets, ["--data=d"])) == _with_data(recipe, folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    small = replace_in(_with_data(recipe, presets.get("small", presets["folder"])), device="cpu")
    assert to_json(parse(presets, ["--data", "d", "--device", "cpu"])) == small


def replace_in(values: dict[str, Any], **run: Any) -> dict[str, Any]:
    return values | {"run": values["run"] | run}


def _with_data(recipe: str, preset: Any) -> dict[str, Any]:
    expected = to_json(preset)
    if "optimization" in expected:  # a recipe of pre-training
        expected["data"]["path"] = "d"
    else:
        (expected if recipe == "finetune" else expected["probed"])["data"] = "d"
    return expected


@pytest.mark.parametrize(("recipe", "preset"), EVERY)
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
    assert (ours.mask_ratio, ours.data.crop_scale, ours.data.flip) == (0.75, (0.2, 1.0), 0.5)
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


# Width, blocks, heads and patch of the encoder; width, blocks and heads of the decoder; epochs and warm-up; and epochs,
# learning rate, layer decay and drop path of fine-tuning
LARGE = {
    ("mae", "imagenet_large"): ((1024, 24, 16, 16), (512, 8, 16), (1600, 40), (50, 1e-3, 0.75, 0.2)),
    ("mae", "imagenet_huge"): ((1280, 32, 16, 14), (512, 8, 16), (1600, 40), (50, 1e-3, 0.75, 0.3)),
    ("hpm", "imagenet_large"): ((1024, 24, 16, 16), (512, 8, 16), (800, 40), (50, 5e-4, 0.8, 0.1)),
    ("droppos", "imagenet_large"): ((1024, 24, 16, 16), (512, 2, 16), (800, 40), (50, 1e-3, 0.8, 0.1)),
    ("lut", "imagenet_large"): ((1024, 24, 16, 16), (512, 8, 16), (1600, 40), (50, 1e-3, 0.65, 0.1)),
    ("beyond_masking", "imagenet_large"): ((1024, 24, 16, 16), (512, 8, 8), (300, 20), (100, 1e-3, 0.75, 0.1)),
    ("beyond_masking_integrated", "imagenet_large"): (
        (1024, 24, 16, 16),
        (512, 4, 8),
        (300, 20),
        (100, 1e-3, 0.75, 0.1),
    ),
}


def test_the_presets_of_larger_networks_are_those_of_the_papers_and_else_those_of_vit_b():
    assert LARGE.keys() == {pair for pair in EVERY if pair[1].endswith(("_large", "_huge")) and "imagenet" in pair[1]}
    for (recipe, preset), (encoder, decoder, length, tuning) in LARGE.items():
        found, base = PRESETS[recipe][preset], PRESETS[recipe]["imagenet"]
        network, tuned = found.network, found.finetune.optimization
        assert (*SIZES[network.size].values(), network.patch) == encoder
        assert (network.decoder_dim, network.decoder_depth, network.decoder_heads) == decoder
        assert (found.optimization.epochs, found.optimization.warmup_epochs) == length
        assert (tuned.epochs, tuned.base_lr, tuned.layer_decay, found.finetune.drop_path) == tuning
        same = replace(base.optimization, epochs=length[0], warmup_epochs=length[1])
        assert replace(found, network=base.network, finetune=base.finetune) == replace(base, optimization=same)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            ["--preset", "cifar"],
            f"--preset cifar: {CHOICES}",
        ),
        (
            ["--preset=cifar"],
            f"--preset cifar: {CHOICES}",
        ),
        (
            ["--seed", "1", "--preset"],
            f"--preset : {CHOICES}",
        ),
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
    assert found.data == replace(DIGITS.data, image_size=(96, 160), channels=1)
    assert found.network == replace(DIGITS.network, size="tiny")
    assert (found.optimization.epochs, found.finetune.optimization.epochs, found.run.keep) == (3, 4, 5)
    assert found.finetune == replace(DIGITS.finetune, optimization=replace(DIGITS.finetune.optimization, epochs=4))


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
        (["--size", "giant"], "--size"),
        (["--evaluate", "guess"], "--evaluate"),
    ],
)
def test_a_wrong_option_is_named(args: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        mae_with(*args)
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


# Ranges


@pytest.mark.parametrize(("recipe", "preset"), EVERY)
def test_every_preset_is_within_its_ranges(recipe: str, preset: str):
    check(PRESETS[recipe][preset])


@pytest.mark.parametrize("recipe", PRESETS)
def test_a_value_that_is_not_a_number_is_never_within_a_range(recipe: str):
    looked_at = set()
    for option, value, extras in settings_of(PRESETS[recipe]["digits"]):
        for must in extras:
            if isinstance(must, Must) and isinstance(value, float):
                assert not must.test(math.nan), option
                looked_at.add(option)
            elif isinstance(must, Must) and isinstance(value, tuple) and any(isinstance(x, float) for x in value):
                assert not any(
                    must.test(pair)
                    for pair in (
                        tuple(math.nan if i == j else x for j, x in enumerate(value)) for i in range(len(value))
                    )
                ), option
                looked_at.add(option)
    assert looked_at


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--epochs 0", "at least 1"),
        ("--epochs -3", "at least 1"),
        ("--batch-size 0", "at least 1"),
        ("--device-batch 0", "at least 1"),
        ("--log-every 0", "at least 1"),
        ("--keep 0", "at least 1"),
        ("--patch 0", "at least 1"),
        ("--decoder-depth 0", "at least 1"),
        ("--labels-per-class 0", "at least 1"),
        ("--sqrt-rule-at 0", "at least 1"),
        ("--image-size 0 32", "two numbers of at least 1"),
        ("--crop-scale 1.0 0.5", "two shares, the smaller one first"),
        ("--crop-scale 0.0 0.5", "two shares, the smaller one first"),
        ("--crop-scale 0.5 1.5", "two shares, the smaller one first"),
        ("--flip -0.5", "between 0 and 1"),
        ("--flip 1.5", "between 0 and 1"),
        ("--flip nan", "between 0 and 1"),
        ("--workers -2", "-1 or more"),
        ("--checkpoint-minutes -1.0", "0 or more"),
        ("--warmup-epochs -1.0", "0 or more"),
        ("--warmup-epochs inf", "0 or more"),
        ("--weight-decay -0.1", "0 or more"),
        ("--milestones 3.0 -1.0", "0 or more"),
        ("--base-lr -0.1", "above 0"),
        ("--base-lr 0.0", "above 0"),
        ("--base-lr nan", "above 0"),
        ("--clip 0.0", "above 0"),
        ("--layer-decay 0.0", "above 0 and at most 1"),
        ("--betas 0.9 1.0", "at least 0 and below 1"),
        ("--betas 0.9 nan", "at least 0 and below 1"),
        ("--finetune.batch-size 0", "at least 1"),
        ("--finetune.epochs 0", "at least 1"),
        ("--finetune.base-lr -1.0", "above 0"),
        ("--finetune.crop-scale 1.0 0.5", "two shares, the smaller one first"),
        ("--finetune.crop-fraction 2.0", "above 0 and at most 1"),
        ("--finetune.drop-path 1.0", "at least 0 and below 1"),
        ("--finetune.mixup -0.8", "0 or more"),
        ("--finetune.erasing 2.0", "between 0 and 1"),
    ],
)
def test_a_value_out_of_range_is_one_sentence_that_names_its_option(args: str, words: str):
    with pytest.raises(SettingsError) as caught:
        mae_with(*args.split())
    assert str(caught.value) == f"{args}: must be {words}"


@pytest.mark.parametrize(
    "args", ["--epochs 1", "--flip 0", "--flip 1", "--crop-scale 1 1", "--workers -1", "--min-lr 0"]
)
def test_the_ends_of_a_range_belong_to_it(args: str):
    mae_with(*args.split())


# Resuming


def started(runs: Path, *args: str) -> mae.Config:
    """The settings of a run that was started with these options, as its folder has them."""
    config = parse(PRESETS["mae"], [*args, "--runs", str(runs)], name="mae")
    folder = runs / (config.run.name or "mae")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"recipe": "mae", **to_json(config)}))
    return config


def resumed(runs: Path, *args: str) -> mae.Config:
    return parse(PRESETS["mae"], ["--runs", str(runs), "--resume", *args], name="mae")


@pytest.mark.parametrize(
    "args", [[], ["--epochs", "3", "--no-normalize-target"], ["--preset", "imagenet"], ["--data", "d", "--clip", "1"]]
)
def test_a_run_that_is_resumed_has_the_settings_it_was_started_with(args: list[str], tmp_path: Path):
    config = started(tmp_path, *args)
    assert resumed(tmp_path) == replace(config, run=replace(config.run, resume=True))


def test_so_has_one_with_a_name_of_its_own(tmp_path: Path):
    started(tmp_path, "--epochs", "3")
    config = started(tmp_path, "--epochs", "4", "--name", "other")
    assert resumed(tmp_path, "--name", "other") == replace(config, run=replace(config.run, resume=True))
    assert resumed(tmp_path).optimization.epochs == 3


def test_a_folder_that_was_moved_is_resumed_where_it_is(tmp_path: Path):
    started(tmp_path, "--epochs", "3", "--name", "before")
    (tmp_path / "before").rename(tmp_path / "mae")
    tmp_path.joinpath("moved").mkdir()
    (tmp_path / "mae").rename(tmp_path / "moved" / "mae")
    found = resumed(tmp_path / "moved")
    assert found.optimization.epochs == 3
    assert found.run.runs / (found.run.name or "mae") == tmp_path / "moved" / "mae"


def test_where_there_is_nothing_to_resume_the_preset_holds(tmp_path: Path):
    assert resumed(tmp_path).optimization == DIGITS.optimization
    (tmp_path / "mae").mkdir()
    other = to_json(PRESETS["simmim"]["imagenet"])
    (tmp_path / "mae" / "config.json").write_text(json.dumps({"recipe": "simmim", **other}))
    assert resumed(tmp_path).optimization == DIGITS.optimization


def test_a_preset_that_is_said_holds_against_that_of_the_run(tmp_path: Path):
    started(tmp_path)
    assert resumed(tmp_path, "--preset", "imagenet").optimization == PRESETS["mae"]["imagenet"].optimization


@pytest.mark.parametrize(
    ("args", "changed"),
    [
        ("--epochs 9", {"--epochs": ("9", "30")}),
        ("--image-size 48 32", {"--image-size": ("48 32", "28 28")}),
        ("--seed 1 --mask-ratio 0.5", {"--seed": ("1", "0"), "--mask-ratio": ("0.5", "0.75")}),
        ("--finetune.epochs 9", {"--finetune.epochs": ("9", "100")}),
        ("--finetune.no-train-positions", {}),  # as it was
        ("--precision bf16", {"--precision": ("bf16", "auto")}),
        ("--evaluate", {"--evaluate": ("", "finetune scratch budget nearest svm")}),
        ("--log-every 3", {"--log-every": ("3", "20")}),
        # What does not change the result
        ("--workers 1 --keep 5 --checkpoint-minutes 1", {}),
        ("--compile on --device-batch 3 --finetune.device-batch 3", {}),
        ("--data elsewhere", {}),
    ],
)
def test_only_settings_that_change_the_result_count_as_changed(args: str, changed: dict[str, Any], tmp_path: Path):
    before = to_json(started(tmp_path))
    assert changed_settings(resumed(tmp_path, *args.split()), {"recipe": "mae", **before}) == changed
    again = parse(PRESETS["mae"], [*args.split(), "--preset", "mnist"])  # though not all in one go
    assert changed_settings(again, before) == changed


# Files


@pytest.mark.parametrize(("recipe", "preset"), EVERY)
def test_settings_are_json(recipe: str, preset: str):
    plain = to_json(PRESETS[recipe][preset])
    assert json.loads(json.dumps(plain)) == plain
    assert set(plain) == {field.name for field in dataclasses.fields(PRESETS[recipe][preset])}


def test_paths_become_text_and_tuples_lists():
    found = to_json(mae_with("--data", "a/b", "--preset", "mnist", "--evaluate", "finetune"))
    assert found["data"]["path"] == str(Path("a/b"))
    assert found["data"]["image_size"] == [28, 28]
    assert found["finetune"]["optimization"]["betas"] == [0.9, 0.999]
    assert found["evaluate"] == ["finetune"]
    assert found["weights"] is None


@pytest.mark.parametrize(("recipe", "preset"), EVERY)
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
    values = to_json(DIGITS)
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
            if isinstance(item, dict):
                flat = name in FLAT or (name == "finetune" and recipe in TUNING)
                yield from leaves(item, prefix if flat else f"{prefix}{name}.")
            else:
                yield f"--{prefix}{'data' if name == 'path' else name.replace('_', '-')}"

    return set(leaves(to_json(PRESETS[recipe]["digits"]), ""))


def help_of(recipe: str, flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the help of a program prints on 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    module = importlib.import_module(recipe)
    unused = module.RECIPE.unused if hasattr(module, "RECIPE") else ()
    with pytest.raises(SystemExit) as caught:
        parse(PRESETS[recipe], [flag], description=module.__doc__, unused=unused)
    assert caught.value.code == 0
    return capsys.readouterr().out


def said_in(text: str) -> dict[str, str]:
    """The sentence of every option in a help text."""
    said: dict[str, str] = {}
    for entry in re.findall(r"^  --[^ ].*(?:\n {20}.*)*", text, re.MULTILINE):
        option, _, sentence = " ".join(entry.split()).partition(" ")
        said[option.replace("[no-]", "")] = sentence
    return said


@pytest.mark.parametrize("recipe", PRESETS)
def test_the_whole_help_says_what_every_option_is(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    text = help_of(recipe, "--help-all", capsys, monkeypatch)
    module = importlib.import_module(recipe)
    assert (module.__doc__ or "").splitlines()[0].split(",")[0] in text
    assert f"--preset {{{','.join(PRESETS[recipe])}}}" in text
    assert f"python recipes/{recipe}.py" in text
    said = said_in(text)
    unused = {f"--{name.replace('_', '-')}" for name in getattr(getattr(module, "RECIPE", None), "unused", ())}
    assert set(said) == options(recipe) - unused
    assert {option for option, _, _ in settings_of(PRESETS[recipe]["digits"])} == options(recipe)
    silent = [name for name, sentence in said.items() if not re.match(r".*[a-z]{2,}.*\(.*default: .+\)$", sentence)]
    assert silent == []


@pytest.mark.parametrize("recipe", PRESETS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_fits_a_screen_and_has_the_options_of_the_method_and_those_most_used(
    recipe: str, flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    text = help_of(recipe, flag, capsys, monkeypatch)
    assert len(text.splitlines()) <= 60
    said = said_in(text)
    module = importlib.import_module(recipe)
    own = {field.name for part in module.Config.__mro__ for field in fields_of(part) if part.__module__ == recipe}
    assert {f"--{name.replace('_', '-')}" for name in own} <= set(said)
    assert {"--data", "--image-size", "--resume", "--device", "--name"} - set(said) <= set()
    assert not any("." in option for option in said)
    assert "--betas" not in said
    assert text.endswith("--help-all shows all options.\n")


def fields_of(part: type) -> list[Any]:
    """The fields that a dataclass itself defines, without groups."""
    own = inspect.get_annotations(part)
    found = dataclasses.fields(part) if dataclasses.is_dataclass(part) else ()
    return [field for field in found if field.name in own and field.name not in (*FLAT, "finetune")]


def test_the_help_shows_the_defaults_of_the_preset_that_is_asked_for(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        mae_with("--preset", "imagenet", "--help")
    said = said_in(capsys.readouterr().out)
    assert "default: 1600)" in said["--epochs"]
    assert "nano, tiny, small, base, large, huge; default: base)" in said["--size"]


# Options without effect


def recorded(part: Any, read: set[str]) -> Any:
    """Settings that note which of them are read."""

    def note(self: Any, name: str) -> Any:
        read.add(name)
        return object.__getattribute__(self, name)

    copy = object.__new__(type(type(part).__name__, (type(part),), {"__getattribute__": note}))
    for field in dataclasses.fields(part):
        object.__setattr__(copy, field.name, getattr(part, field.name))
    return copy


@pytest.mark.parametrize("recipe", [name for name in PRESETS if "imagenet" in PRESETS[name] and "probe" not in name])
def test_settings_without_effect_are_those_that_a_method_does_not_read(recipe: str):
    module, read = importlib.import_module(recipe), set[str]()
    config = PRESETS[recipe]["digits"]
    data, network = recorded(config.data, read), recorded(config.network, read)
    read.clear()
    method = module.RECIPE.method(replace(config, data=data, network=network), Normalize([0.5], [0.5]))
    read |= set() if hasattr(method, "views") else {"crop_scale", "flip"}  # of the default view
    names = {field.name for part in (config.data, config.network) for field in dataclasses.fields(part)}
    assert names - read - {"path", "statistics", "labels_per_class", "evaluate_on"} == set(module.RECIPE.unused)


def settings_in(path: Path) -> list[ast.ClassDef]:
    """The classes of settings in a file."""
    return [
        part for part in ast.parse(path.read_text()).body if isinstance(part, ast.ClassDef) and part.name in SETTINGS
    ]


def fields_without_words(part: ast.ClassDef) -> list[str]:
    """The fields of a class that no docstring follows; a group of settings has its own."""
    silent = []
    for field, after in zip(part.body, [*part.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            group = re.fullmatch(rf"(Flat\[)?({'|'.join(GROUPS)})\]?", ast.unparse(field.annotation))
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
            if not group and not told:
                silent.append(f"{part.name}.{ast.unparse(field.target)}")
    return silent


FILES = [path for path in sorted(RECIPES.rglob("*.py")) if settings_in(path)]
FILES_OF_SETTINGS = {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in FILES}


@pytest.mark.parametrize("name", FILES_OF_SETTINGS)
def test_every_setting_has_a_sentence(name: str):
    for part in settings_in(FILES_OF_SETTINGS[name]):
        assert ast.get_docstring(part)
        assert fields_without_words(part) == []


def test_all_classes_of_settings_are_looked_at():
    found = {part.name for path in FILES_OF_SETTINGS.values() for part in settings_in(path)}
    assert found == set(SETTINGS)
    assert {path.stem for path in RECIPES.glob("*.py")} <= set(FILES_OF_SETTINGS)


def test_every_recipe_is_looked_at():
    programs = {module.__name__ for module in MODULES if hasattr(module, "pretrain") or hasattr(module, "probe")}
    assert programs <= set(PRESETS)
    for module in MODULES:
        if hasattr(module, "pretrain"):
            assert isinstance(module.RECIPE, Recipe)
            assert isinstance(module.RECIPE.method, type)
            assert issubclass(module.RECIPE.method, torch.nn.Module)
            assert module.RECIPE.presets is module.PRESETS
            assert {"digits", "small", "folder"} <= set(module.PRESETS)
            assert {type(preset) for preset in module.PRESETS.values()} == {module.Config}
