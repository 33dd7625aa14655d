"""Settings: frozen dataclasses that become the command line, and presets that fill them.

A recipe's `Config` holds these groups as fields; on the command line their options stand without a prefix.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import tyro

C = TypeVar("C")


@dataclass(frozen=True)
class Run:
    """Where and how the program runs."""

    name: str = ""
    """folder of this run below --runs; the recipe's name if empty"""
    runs: Path = Path("runs")
    """folder of all runs"""
    resume: bool = False
    """go on where a run of this name was interrupted (starts one if there is none)"""
    seed: int = 0
    """all chance is a function of this number, the step and the sample"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU, fp32 on a CPU"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on a GPU only (on a CPU it costs a minute and gains little)"""
    workers: int = -1
    """processes that load images, per device; -1: one per free core, at most 16"""
    checkpoint_minutes: float = 5.0
    """time between checkpoints: what a lost machine can cost"""
    keep: int = 2
    """checkpoints kept, the newest ones"""
    log_every: int = 20
    """steps between two readings of the losses"""


@dataclass(frozen=True)
class Images:
    """The images and how they are cut."""

    data: Path | None = None
    """folder with train/CLASS/*.jpg and val/CLASS/*.jpg; none: the handwritten digits that come with scikit-learn"""
    image_size: tuple[int, int] = (224, 224)
    """height and width of what the network sees, in pixels, multiples of --patch"""
    channels: Literal[1, 3] = 3
    """1: grayscale, 3: RGB"""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """share of the image's area that a random crop keeps, least and most"""
    flip: float = 0.5
    """probability of a horizontal flip"""
    statistics: Literal["auto", "imagenet", "data"] = "auto"
    """mean and std of the channels: computed from the training images or ImageNet's; auto: ImageNet's for RGB"""
    labels_per_class: int = 10
    """of the embedded digits: labeled images per class for fine-tuning"""


@dataclass(frozen=True)
class Network:
    """The vision transformer and its decoder."""

    size: Literal["nano", "tiny", "small", "base", "large", "huge"] = "base"
    """width, depth and heads of the encoder"""
    patch: int = 16
    """side of a patch in pixels"""
    decoder_dim: int = 512
    """width of the decoder"""
    decoder_depth: int = 8
    """blocks of the decoder"""
    decoder_heads: int = 16
    """attention heads of the decoder"""


@dataclass(frozen=True)
class Optimization:
    """AdamW with warm-up and cosine, per step."""

    epochs: int = 800
    """times that every training image is seen"""
    batch_size: int = 4096
    """images per step, over all devices and accumulation; the result depends on this alone"""
    device_batch: int = 256
    """most images on one device at a time; more are accumulated"""
    base_lr: float = 1.5e-4
    """learning rate for 256 images per step; the real one is this times batch size / 256"""
    sqrt_rule_at: int | None = None
    """none: as said; N: it grows with the square root of the batch size instead, and is the same at a batch of N"""
    warmup_epochs: float = 40.0
    """epochs in which the learning rate rises"""
    min_lr: float = 0.0
    """learning rate at the end (not scaled by the batch size)"""
    schedule: Literal["epoch", "step", "last_step"] = "epoch"
    """epoch: of the fractional epoch, as MAE; step: linspace over the warm-up steps, then cosine, as Beyond Masking;
    last_step: of the step before, the cosine counted from the start of the warm-up, as SimMIM"""
    warmup_lr: float = 0.0
    """of last_step: learning rate at the start (not scaled by the batch size)"""
    milestones: tuple[float, ...] = ()
    """of last_step: epochs at which the learning rate falls to a tenth, instead of a cosine"""
    weight_decay: float = 0.05
    """for matrices, and for tokens that are not in --undecayed; never for biases and norms"""
    betas: tuple[float, float] = (0.9, 0.95)
    """of AdamW"""
    undecayed: tuple[str, ...] = ()
    """parameters without weight decay besides biases and norms, by the last part of their name"""
    layer_decay: float = 1.0
    """each block's learning rate is this times that of the block above it"""
    clip: float | None = None
    """greatest norm of the gradient; none: no clipping"""
    clip_each: bool = False
    """clip the gradient of each parameter on its own instead of the whole"""


T = TypeVar("T")
Flat = Annotated[T, tyro.conf.arg(name="")]  # the options of a group stand without a prefix


def parse(presets: dict[str, C], args: Sequence[str] | None = None, *, description: str | None = None) -> C:
    """Read the command line over a preset.

    Args:
        presets: settings by name. Without `--preset` the one called "digits" holds, or "folder" with `--data`.
        args: the command line; that of the process if none.
        description: text on top of the help.

    Raises:
        SystemExit: with a message, if an option is unknown or a value is of the wrong kind.
    """
    args = list(sys.argv[1:] if args is None else args)
    name = "folder" if any(arg == "--data" or arg.startswith("--data=") for arg in args) else "digits"
    for i, arg in enumerate(args):
        if arg == "--preset" or arg.startswith("--preset="):
            name = arg.partition("=")[2] if "=" in arg else args[i + 1] if i + 1 < len(args) else ""
            del args[i : i + (1 if "=" in arg else 2)]
            break
    if name not in presets:
        raise SystemExit(f"--preset {name}: choose one of {', '.join(presets)}")
    preset = presets[name]
    about = (description or "").strip()
    about += f"\n\n--preset {{{','.join(presets)}}} fills all settings at once; shown is: {name}"
    return tyro.cli(type(preset), default=preset, args=args, description=about)


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
        ValueError: if a setting is unknown or missing.
    """
    kinds = get_type_hints(kind)
    for what, names in {"unknown": values.keys() - kinds.keys(), "missing": kinds.keys() - values.keys()}.items():
        if names:
            raise ValueError(f"settings of {kind.__name__} are {what}: {', '.join(sorted(names))}")

    def typed(kind: Any, value: Any) -> Any:
        if isinstance(kind, type) and is_dataclass(kind):
            return from_json(kind, value)
        if isinstance(value, list):
            return tuple(typed(None, item) for item in value)
        return Path(value) if isinstance(value, str) and Path in (kind, *get_args(kind)) else value

    return kind(**{name: typed(kinds[name], value) for name, value in values.items()})
