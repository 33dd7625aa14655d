"""Settings: frozen dataclasses that become the command line, and presets that fill them.

A recipe's `Config` holds these groups as fields; on the command line their options stand without a prefix. What a value
must satisfy stands in its type, and is checked before any work is done.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import tyro

C = TypeVar("C")
T = TypeVar("T")
Flat = Annotated[T, tyro.conf.arg(name="")]  # the options of a group stand without a prefix


class SettingsError(ValueError):
    """A mistake of the user: one sentence that says what to type instead. Programs print it without a traceback."""


@dataclass(frozen=True)
class Must:
    """What the values of a setting must satisfy, in words and as a test; NaN satisfies nothing."""

    words: str
    test: Callable[[Any], bool]


class _MayDiffer:
    """A setting that may differ when a run is resumed: it does not change the result."""


MayDiffer = Annotated[T, _MayDiffer()]
Count = Annotated[int, Must("at least 1", lambda x: x >= 1)]
Counts = Annotated[tuple[int, int], Must("two numbers of at least 1", lambda x: min(x) >= 1)]
Positive = Annotated[float, Must("above 0", lambda x: 0 < x < math.inf)]
NonNegative = Annotated[float, Must("0 or more", lambda x: 0 <= x < math.inf)]
NonNegatives = Annotated[tuple[float, float], Must("0 or more", lambda x: all(0 <= v < math.inf for v in x))]
Share = Annotated[float, Must("between 0 and 1", lambda x: 0 <= x <= 1)]
Shares = Annotated[tuple[float, float], Must("between 0 and 1", lambda x: all(0 <= v <= 1 for v in x))]
PositiveShare = Annotated[float, Must("above 0 and at most 1", lambda x: 0 < x <= 1)]
BelowOne = Annotated[float, Must("at least 0 and below 1", lambda x: 0 <= x < 1)]
Area = Annotated[tuple[float, float], Must("two shares, the smaller one first", lambda x: 0 < x[0] <= x[1] <= 1)]


@dataclass(frozen=True)
class Run:
    """Where and how the program runs."""

    name: MayDiffer[str] = ""
    """folder of this run below --runs; the recipe's name if empty"""
    runs: MayDiffer[Path] = Path("runs")
    """folder of all runs"""
    resume: MayDiffer[bool] = False
    """continue an interrupted run with the settings it was started with (starts one if there is none)"""
    seed: int = 0
    """every random draw depends only on this number, the step and the sample"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU, fp32 on a CPU"""
    compile: MayDiffer[Literal["auto", "on", "off"]] = "auto"
    """torch.compile; auto: on a GPU only (on a CPU it costs a minute and gains little)"""
    workers: MayDiffer[Annotated[int, Must("-1 or more", lambda x: x >= -1)]] = -1
    """processes that load images, per device; -1: one per free core, at most 16"""
    checkpoint_minutes: MayDiffer[NonNegative] = 5.0
    """time between checkpoints: what a lost machine can cost"""
    keep: MayDiffer[Count] = 2
    """checkpoints kept, the newest ones"""
    log_every: Count = 20
    """steps between two readings of the losses"""


@dataclass(frozen=True)
class DataSettings:
    """The images and how they are cropped."""

    path: Annotated[MayDiffer[Path | None], tyro.conf.arg(name="data")] = None
    """folder with train/CLASS/*.jpg and val/CLASS/*.jpg; none: the handwritten digits that come with scikit-learn"""
    image_size: Counts = (224, 224)
    """height and width of what the network sees, in pixels, multiples of --patch"""
    channels: Literal[1, 3] = 3
    """1: grayscale, 3: RGB"""
    crop_scale: Area = (0.2, 1.0)
    """share of the image's area that a random crop keeps, least and most"""
    flip: Share = 0.5
    """probability of a horizontal flip"""
    statistics: Literal["auto", "imagenet", "data"] = "auto"
    """mean and std of the channels: computed from the training images or ImageNet's; auto: ImageNet's for RGB"""
    labels_per_class: Count = 10
    """of the embedded digits: labeled images per class for fine-tuning"""


@dataclass(frozen=True)
class Network:
    """The vision transformer and its decoder."""

    size: Literal["nano", "tiny", "small", "base", "large", "huge"] = "base"
    """width, depth and heads of the encoder"""
    patch: Count = 16
    """side of a patch in pixels"""
    decoder_dim: Annotated[int, Must("a multiple of 4", lambda x: x > 0 and x % 4 == 0)] = 512
    """width of the decoder; a quarter each holds sine and cosine of row and column"""
    decoder_depth: Count = 8
    """blocks of the decoder"""
    decoder_heads: Count = 16
    """attention heads of the decoder"""


@dataclass(frozen=True)
class Optimization:
    """AdamW with a warm-up and a cosine schedule, per step."""

    epochs: Count = 800
    """times that every training image is seen"""
    batch_size: Count = 4096
    """images per step, over all devices and micro-batches; the result depends on this alone"""
    device_batch: MayDiffer[Count] = 256
    """largest micro-batch: images on one device at a time; gradients of more are accumulated"""
    base_lr: Positive = 1.5e-4
    """learning rate for 256 images per step; the real one is this times batch size / 256"""
    sqrt_rule_at: Annotated[int | None, Must("at least 1", lambda x: x is None or x >= 1)] = None
    """N: the learning rate grows with the square root of the batch size instead, and is the same at a batch of N"""
    warmup_epochs: NonNegative = 40.0
    """epochs in which the learning rate rises"""
    min_lr: NonNegative = 0.0
    """learning rate at the end (not scaled by the batch size)"""
    schedule: Literal["epoch", "step", "last_step"] = "epoch"
    """epoch: of the fractional epoch, as MAE; step: linspace over the warm-up steps, then cosine, as Beyond Masking;
    last_step: of the step before, the cosine counted from the start of the warm-up, as SimMIM"""
    warmup_lr: NonNegative = 0.0
    """of last_step: learning rate at the start (not scaled by the batch size)"""
    milestones: Annotated[tuple[float, ...], Must("0 or more", lambda x: all(0 <= m < math.inf for m in x))] = ()
    """of last_step: epochs at which the learning rate falls to a tenth, instead of a cosine"""
    weight_decay: NonNegative = 0.05
    """for matrices, and for tokens that are not in --undecayed; never for biases and norms"""
    betas: Annotated[tuple[float, float], Must("at least 0 and below 1", lambda x: 0 <= min(x) <= max(x) < 1)] = (
        0.9,
        0.95,
    )
    """of AdamW"""
    undecayed: tuple[str, ...] = ()
    """parameters without weight decay besides biases and norms, by the last part of their name"""
    layer_decay: PositiveShare = 1.0
    """each block's learning rate is this times that of the block above it"""
    clip: Annotated[float | None, Must("above 0", lambda x: x is None or x > 0)] = None
    """largest norm of the gradient; none: no clipping"""
    clip_each: bool = False
    """clip the gradient of each parameter on its own instead of the whole"""


def parse(
    presets: dict[str, C], args: Sequence[str] | None = None, *, name: str = "", description: str | None = None
) -> C:
    """Read the command line over a preset, or with `--resume` over the settings that the run was started with.

    Args:
        presets: settings by name. Without `--preset` the one called "digits" holds, or "folder" with `--data`.
        args: the command line; that of the process if none.
        name: of the recipe, and of its run unless `--name` says otherwise.
        description: text on top of the help.

    Raises:
        SystemExit: with a message, if an option is unknown or a value is of the wrong kind.
        SettingsError: if a value is out of range, or differs from that of the run that is resumed.
    """
    args = list(sys.argv[1:] if args is None else args)
    chosen = "folder" if any(arg == "--data" or arg.startswith("--data=") for arg in args) else "digits"
    explicit = False
    for i, arg in enumerate(args):
        if arg == "--preset" or arg.startswith("--preset="):
            chosen, explicit = arg.partition("=")[2] if "=" in arg else args[i + 1] if i + 1 < len(args) else "", True
            del args[i : i + (1 if "=" in arg else 2)]
            break
    if chosen not in presets:
        raise SystemExit(f"--preset {chosen}: choose one of {', '.join(presets)}")
    preset: Any = presets[chosen]
    about = (description or "").strip()
    about += f"\n\n--preset {{{','.join(presets)}}} fills all settings at once; shown is: {chosen}"
    config: Any = tyro.cli(type(preset), default=preset, args=args, description=about)
    path = config.run.runs / (config.run.name or name) / "config.json"
    before = started_with(type(preset), path) if config.run.resume and not explicit else None
    if before is not None:
        config = tyro.cli(type(preset), default=before, args=args, description=about)
    check(config)
    return config


def started_with(kind: type[C], path: Path) -> C | None:
    """Return the settings in the `config.json` of a run, if there is one and its recipe is the same."""
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    values.pop("recipe", None)
    try:
        return from_json(kind, values)
    except SettingsError:
        return None


def settings_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield every setting of a configuration: its option, its value, and what stands beside its type."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value, extras = getattr(config, field.name), _extras(hints[field.name])
        name = next((extra.name for extra in extras if getattr(extra, "name", None) is not None), field.name)
        if is_dataclass(value):
            yield from settings_of(value, f"{prefix}{name}." if name else prefix)
        else:
            yield f"--{prefix}{name.replace('_', '-')}", value, extras


def check(config: Any) -> None:
    """Check that every setting is within its range.

    Raises:
        SettingsError: naming the first option whose value is not.
    """
    for option, value, extras in settings_of(config):
        for must in extras:
            if isinstance(must, Must) and not must.test(value):
                raise SettingsError(f"{option} {as_typed(value)}: must be {must.words}")


def changed_settings(config: Any, before: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the options whose values differ from those of a run that was started: now, and then.

    Settings whose type is `MayDiffer` are left out.
    """
    values = {key: value for key, value in before.items() if key != "recipe"}
    then = {option: value for option, value, _ in settings_of(from_json(type(config), values))}
    return {
        option: (as_typed(value), as_typed(then[option]))
        for option, value, extras in settings_of(config)
        if value != then[option] and not any(isinstance(extra, _MayDiffer) for extra in extras)
    }


def as_typed(value: Any) -> str:
    """Write a value as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _extras(hint: Any) -> tuple[Any, ...]:
    """Return what stands beside a type, also beside the inner one of nested annotations (Python joins these)."""
    return getattr(hint, "__metadata__", ())


def to_json(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values, paths as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(asdict(config))


def from_json(kind: type[C], values: dict[str, Any]) -> C:
    """Return the configuration of which `to_json` made these values.

    Raises:
        SettingsError: if a setting is unknown or missing.
    """
    kinds = get_type_hints(kind)
    for what, names in {"unknown": values.keys() - kinds.keys(), "missing": kinds.keys() - values.keys()}.items():
        if names:
            raise SettingsError(f"settings of {kind.__name__} are {what}: {', '.join(sorted(names))}")

    def typed(kind: Any, value: Any) -> Any:
        if isinstance(kind, type) and is_dataclass(kind):
            return from_json(kind, value)
        if isinstance(value, list):
            return tuple(typed(None, item) for item in value)
        return Path(value) if isinstance(value, str) and Path in (kind, *get_args(kind)) else value

    return kind(**{name: typed(kinds[name], value) for name, value in values.items()})
