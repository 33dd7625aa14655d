"""Settings: frozen dataclasses that define the command line, and presets of their values.

A recipe's `Config` holds these groups as fields; on the command line their options have no prefix. The type of a
setting states its valid values, which are checked before any work is done.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from common.help import help_text, leaves

import torch
import tyro

C = TypeVar("C")
T = TypeVar("T")
Flat = Annotated[T, tyro.conf.arg(name="")]  # the options of a group have no prefix
EMBEDDED = ("mnist", "digits", "shapes")  # images that need no file, by the names that --data takes


class SettingsError(ValueError):
    """A user error, in one sentence that says how to correct it. Programs print it without a traceback."""


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn errors of the disk, and of files that are not JSON, into a sentence: `what`, a colon and the reason.

    Raises:
        SettingsError: if the block raises an `OSError`, or reads text that is damaged.
    """
    try:
        yield
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SettingsError(f"{what}: {getattr(error, 'strerror', None) or error}") from error


@dataclass(frozen=True)
class Must:
    """A constraint on the values of a setting, in words and as a predicate; NaN never satisfies it."""

    words: str
    test: Callable[[Any], bool]


class _MayDiffer:
    """Marks a setting that may change when a run is resumed, because it does not affect the result."""


def _is_inside(name: str) -> bool:
    """Return whether a name is empty, or a relative path of a subfolder."""
    return not name or all(part.strip() not in ("", ".", "..") and part.isprintable() for part in name.split("/"))


MayDiffer = Annotated[T, _MayDiffer()]
Count = Annotated[int, Must("at least 1", lambda x: x >= 1)]
Counts = Annotated[tuple[int, int], Must("two numbers of at least 1", lambda x: min(x) >= 1)]
Positive = Annotated[float, Must("above 0", lambda x: 0 < x < math.inf)]
NonNegative = Annotated[float, Must("0 or more", lambda x: 0 <= x < math.inf)]
NonNegatives = Annotated[tuple[float, float], Must("0 or more", lambda x: all(0 <= v < math.inf for v in x))]
Share = Annotated[float, Must("between 0 and 1", lambda x: 0 <= x <= 1)]
Shares = Annotated[tuple[float, float], Must("between 0 and 1", lambda x: all(0 <= v <= 1 for v in x))]
PositiveShare = Annotated[float, Must("above 0 and at most 1", lambda x: 0 < x <= 1)]
PositiveShares = Annotated[tuple[float, ...], Must("above 0 and at most 1", lambda x: x and all(0 < s <= 1 for s in x))]
BelowOne = Annotated[float, Must("at least 0 and below 1", lambda x: 0 <= x < 1)]
Area = Annotated[tuple[float, float], Must("two shares, the smaller one first", lambda x: 0 < x[0] <= x[1] <= 1)]


@dataclass(frozen=True)
class Run:
    """Where and how the program runs."""

    name: MayDiffer[Annotated[str, Must("a name, or several joined by /, without .. or empty parts", _is_inside)]] = ""
    """subfolder of --runs for this run; empty: the name of the recipe"""
    runs: MayDiffer[Path] = Path("runs")
    """folder that contains all runs"""
    resume: MayDiffer[bool] = False
    """resume an interrupted run with its original settings (start a new run if there is none)"""
    accept_changed_data: MayDiffer[bool] = False
    """resume a run although names or labels of its images have changed since it was started"""
    restart: MayDiffer[bool] = False
    """delete the files of the run in the folder, and start over"""
    seed: int = 0
    """every random draw depends only on this number, the step and the sample"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if available"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU with native bf16, else fp32"""
    compile: MayDiffer[Literal["auto", "on", "off"]] = "auto"
    """torch.compile; auto: on a GPU only (on a CPU it takes a minute and gains little)"""
    shard: MayDiffer[bool] = False
    """on several devices: shard parameters, gradients and optimizer states (FSDP2) instead of replicating them (DDP)"""
    activation_checkpointing: MayDiffer[bool] = False
    """recompute the activations of each block in the backward pass, to save memory"""
    threads: MayDiffer[Count | None] = None
    """threads on a CPU; none: OMP_NUM_THREADS, else the fastest number, measured; a resumed run keeps it"""
    workers: MayDiffer[Annotated[int, Must("-1 or more", lambda x: x >= -1)]] = -1
    """data-loading processes per device; -1: one per free core, at most 16"""
    checkpoint_minutes: MayDiffer[NonNegative] = 5.0
    """minutes between checkpoints"""
    keep: MayDiffer[Count] = 2
    """number of checkpoints to keep, the newest ones"""
    log_every: Count = 20
    """number of steps between two log records"""


@dataclass(frozen=True)
class DataSettings:
    """The images and how they are cropped."""

    path: Annotated[MayDiffer[str], tyro.conf.arg(name="data")] = "mnist"
    """folder with train/CLASS/*.jpg and val/CLASS/*.jpg; or mnist, digits or shapes, images that need no file"""
    image_size: Counts = (224, 224)
    """height and width of the network's input in pixels, multiples of --patch"""
    channels: Count = 3
    """1: grayscale, 3: RGB; images given from Python have their own number"""
    crop_scale: Area = (0.2, 1.0)
    """range of the area of a random crop, as a fraction of the image"""
    flip: Share = 0.5
    """probability of a horizontal flip"""
    statistics: Literal["auto", "imagenet", "data"] = "auto"
    """mean and std of the channels: ImageNet's, or those of the training images; auto: ImageNet's for RGB"""
    labels_per_class: Count = 10
    """mnist, digits and shapes only: labeled images per class for fine-tuning"""
    evaluate_on: Literal["test", "validation"] = "test"
    """mnist, digits and shapes only: images that measure the accuracy; validation: images to choose settings by, never
    test images"""

    @property
    def folder(self) -> Path | None:
        """The folder of the images, None if they need none."""
        return None if self.path in EMBEDDED else Path(self.path)


@dataclass(frozen=True)
class Network:
    """The vision transformer and its decoder."""

    size: Literal["nano", "tiny", "small", "base", "large", "huge"] = "base"
    """size of the encoder: width, depth and number of heads"""
    patch: Count = 16
    """side of a patch in pixels"""
    decoder_dim: Annotated[int, Must("a multiple of 4", lambda x: x > 0 and x % 4 == 0)] | None = 512
    """width of the decoder, a multiple of 4; none: half the width of the encoder"""
    decoder_depth: Count | None = 8
    """number of blocks of the decoder; none: a quarter of those of the encoder"""
    decoder_heads: Count | None = 16
    """number of attention heads of the decoder; none: at most as many as the encoder has"""


@dataclass(frozen=True)
class Optimization:
    """AdamW with a learning-rate warm-up and a cosine schedule, updated at every step."""

    epochs: Count = 800
    """passes over the training images"""
    batch_size: Count | None = 4096
    """images per step, over all devices and micro-batches; none: 16 to 256, depending on the number of images"""
    device_batch: MayDiffer[Count] = 256
    """largest micro-batch per device; larger batches use gradient accumulation, with the same result unless a method
    normalizes within a micro-batch (DropPos, HPM, LUT)"""
    base_lr: Positive = 1.5e-4
    """learning rate for a batch of 256 images; it is multiplied by batch size / 256"""
    sqrt_rule_at: Count | None = None
    """N: scale the learning rate with the square root of the batch size; both rules agree at a batch of N"""
    warmup_epochs: NonNegative | None = 40.0
    """length of the learning-rate warm-up in epochs; none: a tenth of --epochs, at most 20"""
    min_lr: NonNegative = 0.0
    """final learning rate (not scaled by the batch size)"""
    schedule: Literal["epoch", "step", "last_step"] = "epoch"
    """epoch: function of the fractional epoch, as in MAE; step: linspace over the warm-up steps, then cosine, as in
    Beyond Masking; last_step: function of the previous step, the cosine starting with the warm-up, as in SimMIM"""
    warmup_lr: NonNegative = 0.0
    """with last_step: initial learning rate (not scaled by the batch size)"""
    milestones: Annotated[tuple[float, ...], Must("0 or more", lambda x: all(0 <= m < math.inf for m in x))] = ()
    """with last_step: epochs at which the learning rate is divided by 10, instead of the cosine"""
    weight_decay: NonNegative = 0.05
    """weight decay of matrices and of tokens not listed in --undecayed; never applied to biases and norms"""
    betas: Annotated[tuple[float, float], Must("at least 0 and below 1", lambda x: all(0 <= b < 1 for b in x))] = (
        0.9,
        0.95,
    )
    """coefficients of AdamW's moving averages"""
    undecayed: tuple[str, ...] = ()
    """parameters without weight decay besides biases and norms, by the last component of their name"""
    layer_decay: PositiveShare = 1.0
    """layer-wise learning-rate decay: factor from one block to the block below it"""
    clip: Positive | None = None
    """maximum norm of the gradient; none: no clipping"""
    clip_each: bool = False
    """clip the gradient of each parameter separately instead of the global norm"""


def parse(
    presets: dict[str, C],
    args: Sequence[str] | None = None,
    *,
    name: str = "",
    description: str | None = None,
    unused: tuple[str, ...] = (),
) -> C:
    """Parse the command line on top of a preset, or with `--resume` on top of the run's original settings.

    Args:
        presets: settings by name; the default is that of `choose`.
        args: command-line arguments; by default those of the process.
        name: name of the recipe, and of its run unless `--name` is given.
        description: text shown at the top of the help.
        unused: names of settings that have no effect, which the help does not show.

    Raises:
        SystemExit: after the help; with a message, if an option is unknown or a value has the wrong type.
        SettingsError: if a value is out of range.
    """
    args = list(sys.argv[1:] if args is None else args)
    chosen, explicit = choose(presets, args)
    if explicit:
        at = next(i for i, arg in enumerate(args) if arg.partition("=")[0] == "--preset")
        del args[at : at + (1 if "=" in args[at] else 2)]
    if chosen not in presets:
        raise SystemExit(f"--preset {chosen}: choose one of {', '.join(presets)}")
    preset: Any = presets[chosen]
    about = (description or "").strip()
    about += f"\n\n--preset {{{','.join(presets)}}} sets all defaults; shown are those of: {chosen}"
    if asked := {"-h", "--help", "--help-all"}.intersection(args):
        print(help_text(about, leaves(preset), everything="--help-all" in asked, unused=unused))
        raise SystemExit(0)
    config: Any = tyro.cli(type(preset), default=preset, args=args, description=about)
    path = config.run.runs / (config.run.name or name) / "config.json"
    before: Any = started_with(type(preset), path) if config.run.resume and not explicit else None
    if before is not None:  # its folder may have been moved since
        given = ("runs", "name", "restart", "accept_changed_data")
        before = replace(before, run=replace(before.run, **{name: getattr(config.run, name) for name in given}))
        config = tyro.cli(type(preset), default=before, args=args, description=about)
    check(config)
    return config


def choose(presets: dict[str, Any], args: Sequence[str] | None = None) -> tuple[str, bool]:
    """Return the name of the preset that the command line asks for, and whether it is given by `--preset`.

    The default is the name of embedded images, "mnist" unless `--data` gives another; for a folder, "folder", or
    without a GPU "small" if there is such a preset.
    """
    given = dict[str, str]()
    for arg, after in pairwise([*(sys.argv[1:] if args is None else args), ""]):
        name, equals, value = arg.partition("=")
        given[name] = value if equals else after  # the last one counts
    if "--preset" in given:
        return given["--preset"], True
    if (images := given.get("--data", EMBEDDED[0])) in EMBEDDED:
        return images, False
    on_gpu = given.get("--device") != "cpu" and torch.cuda.is_available()
    return ("folder" if on_gpu or "small" not in presets else "small"), False


def known(value: T | None) -> T:
    """Return a setting that follows others unless it is given, after it has been resolved.

    Raises:
        TypeError: if it has not been resolved.
    """
    if value is None:
        raise TypeError("a setting that follows others has not been resolved")
    return value


def program(main: Callable[[C], None], kind: type[C], *, name: str, description: str | None) -> None:
    """Run a program with settings from the command line, and exit with a one-sentence message on a user error.

    Args:
        main: the program.
        kind: type of its settings.
        name: name of the program, which prefixes the message.
        description: text shown at the top of the help.
    """
    try:
        config = tyro.cli(kind, description=description)
        check(config)
        main(config)
    except SettingsError as error:
        raise SystemExit(f"{name}: {error}") from error


def started_with(kind: type[C], path: Path) -> C | None:
    """Return the settings in the `config.json` of a run, or None if it does not exist or its fields differ.

    Raises:
        SettingsError: if the file cannot be read.
    """
    if not path.is_file():
        return None
    with explained(f"{path} cannot be read"):
        values = json.loads(path.read_text())
    values.pop("recipe", None)
    try:
        return from_json(kind, values)
    except SettingsError:
        return None


def settings_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield the option, the value and the type annotations of every setting of a configuration."""
    return ((leaf.option, leaf.value, leaf.extras) for leaf in leaves(config, prefix))


def check(config: Any) -> None:
    """Check that every setting is within its range.

    Raises:
        SettingsError: if a value is out of range, naming the first such option.
    """
    for option, value, extras in settings_of(config):
        for must in extras:
            if isinstance(must, Must) and value is not None and not must.test(value):
                raise SettingsError(f"{option} {as_typed(value)}: must be {must.words}")


def changed_settings(config: Any, before: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the options whose values differ from those of an earlier run, as (current value, earlier value).

    Settings of type `MayDiffer` are ignored.
    """
    values = {key: value for key, value in before.items() if key != "recipe"}
    then = {option: value for option, value, _ in settings_of(from_json(type(config), values))}
    return {
        option: (as_typed(value), as_typed(then[option]))
        for option, value, extras in settings_of(config)
        if value != then[option] and not any(isinstance(extra, _MayDiffer) for extra in extras)
    }


def as_typed(value: Any) -> str:
    """Format a value as it is typed on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def to_json(config: Any) -> dict[str, Any]:
    """Convert a configuration to JSON values, paths to strings."""

    def plain(value: Any) -> Any:
        """Convert a value recursively."""
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(asdict(config))


def from_json(kind: type[C], values: dict[str, Any]) -> C:
    """Rebuild a configuration from the values returned by `to_json`.

    Raises:
        SettingsError: if a setting is unknown or missing.
    """
    kinds = get_type_hints(kind)
    for what, names in {"unknown": values.keys() - kinds.keys(), "missing": kinds.keys() - values.keys()}.items():
        if names:
            raise SettingsError(f"settings of {kind.__name__} are {what}: {', '.join(sorted(names))}")

    def typed(kind: Any, value: Any) -> Any:
        """Convert a JSON value to the type of its field."""
        if isinstance(kind, type) and is_dataclass(kind):
            return from_json(kind, value)
        if isinstance(value, list):
            return tuple(typed(None, item) for item in value)
        return Path(value) if isinstance(value, str) and Path in (kind, *get_args(kind)) else value

    return kind(**{name: typed(kinds[name], value) for name, value in values.items()})
