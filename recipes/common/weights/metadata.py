"""Check what a file says about its encoder, before anything is built from it."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from common.config import SettingsError
from common.networks.attention import relative_rows
from common.weights.timm_names import OWN_TABLE, SHARED_TABLE

from torch import Tensor

MOST_PATCHES = 10_000  # with relative positions: the index of all pairs of patches then takes 800 MB


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


COUNT = ("a whole number above 0", _is_count)
SWITCH = ("true or false", lambda value: type(value) is bool)
Rule = tuple[str, Callable[[Any], bool]]  # in words, and as a test
REQUIRED: dict[str, Rule] = {
    "img_size": ("two whole numbers above 0", lambda v: type(v) is list and len(v) == 2 and all(map(_is_count, v))),
    **dict.fromkeys(("patch_size", "in_chans", "embed_dim", "depth", "num_heads"), COUNT),
}
OPTIONAL: dict[str, Rule] = {
    **dict.fromkeys(("class_token", "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias"), SWITCH),
    "init_values": ("a number", lambda value: value is None or _is_number(value)),
    "relative": ("contextual", lambda value: value == "contextual"),
    "num_classes": ("a whole number of 0 or more", lambda value: type(value) is int and value >= 0),
}
HEAD: dict[str, Rule] = {  # of a classifier; the last two stand beside the arguments
    "num_classes": COUNT,
    "global_pool": ("avg or token", lambda value: value in ("avg", "token")),
    "crop_fraction": ("above 0 and at most 1", lambda value: _is_number(value) and 0 < value <= 1),
}


def exported_arguments(about: Mapping[str, Any], path: object) -> dict[str, Any] | None:
    """Return the arguments of `timm_arguments` in the metadata of a file, None if it is not an exported encoder.

    A classifier, which has `num_classes`, must also state `classes` and `crop_fraction`.

    Raises:
        SettingsError: if an argument, mean or std is missing, or has a wrong type or value.
    """
    kind = next((kind for kind in ("timm", "mimkit") if kind in about), None)
    if kind is None:
        return None
    arguments: Any = about[kind]
    if not isinstance(arguments, dict):
        raise SettingsError(f"the metadata of {path} says {kind} {_short(arguments)}, which are not named arguments")
    required = REQUIRED | ({} if "use_abs_pos_emb" in arguments else {"class_token": SWITCH})
    channels = arguments.get("in_chans")
    for name, bounds in {"mean": (-1e6, 1e6), "std": (1e-6, 1e6)}.items():
        required |= {name: (f"{channels} numbers from {bounds[0]:g} to {bounds[1]:g}", _numbers(channels, *bounds))}
    if number := arguments.get("num_classes"):
        required |= HEAD | {"classes": (f"{_short(number)} different names", _names(number))}
    beside = ("mean", "std", "classes", "crop_fraction")
    stated = arguments | {name: about[name] for name in beside if name in about}
    for name, (words, test) in ({name: OPTIONAL[name] for name in OPTIONAL if name in arguments} | required).items():
        if name not in stated:
            raise SettingsError(f"the metadata of {path} lacks {name}")
        if not test(stated[name]):
            raise SettingsError(f"the metadata of {path} says {name} {_short(stated[name])}, which is not {words}")
    return arguments


def check_shapes(arguments: Mapping[str, Any], weights: Mapping[str, Tensor], path: object) -> None:
    """Check that the weights of a file have the shapes of an encoder with these arguments.

    An encoder that passes is not much larger than its file.

    Raises:
        SettingsError: if a shape differs or a weight is missing, or the sizes do not fit each other.
    """
    for name, shape in _shapes(arguments, weights):  # lazily: depth may be any number
        if name not in weights:
            raise SettingsError(f"{path} is no encoder of {arguments['depth']} blocks: it lacks {name}")
        if tuple(weights[name].shape) != shape:
            raise SettingsError(f"{path} is damaged: {name} is {tuple(weights[name].shape)} instead of {shape}")
    dim, heads, patch, (H, W) = (arguments[name] for name in ("embed_dim", "num_heads", "patch_size", "img_size"))
    if dim % heads:
        raise SettingsError(f"{path} is damaged: width {dim} is not a multiple of {heads} heads")
    if H % patch or W % patch:
        raise SettingsError(
            f"{path} is damaged: images of {H} × {W} pixels are not made of patches of {patch} × {patch}"
        )
    if not _is_absolute(arguments) and (H // patch) * (W // patch) > MOST_PATCHES:
        raise SettingsError(f"{path}: images of {H} × {W} pixels have more than {MOST_PATCHES} patches")
    if f"blocks.{arguments['depth']}.attn.qkv.weight" in weights:
        raise SettingsError(f"{path} is damaged: it has more than the {arguments['depth']} blocks of its metadata")


def _shapes(arguments: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of the weights from which the sizes of the network follow."""
    dim, patch = arguments["embed_dim"], arguments["patch_size"]
    height, width = (size // patch for size in arguments["img_size"])
    yield "patch_embed.proj.weight", (dim, arguments["in_chans"], patch, patch)
    for i in range(arguments["depth"]):
        yield f"blocks.{i}.attn.qkv.weight", (3 * dim, dim)
    if _is_absolute(arguments):
        yield "pos_embed", (1, height * width + arguments.get("class_token", True), dim)
    for name, flag in ((SHARED_TABLE, "use_shared_rel_pos_bias"), (OWN_TABLE.format(0), "use_rel_pos_bias")):
        if name in weights or arguments.get(flag):
            yield name, (relative_rows(height, width), arguments["num_heads"])
    if classes := arguments.get("num_classes"):
        yield from (("head.weight", (classes, dim)), ("head.bias", (classes,)))
        if arguments["global_pool"] == "avg":
            yield from (("fc_norm.weight", (dim,)), ("fc_norm.bias", (dim,)))


def _is_absolute(arguments: Mapping[str, Any]) -> bool:
    """Return whether the encoder has a table of absolute positions."""
    return arguments.get("use_abs_pos_emb", "relative" not in arguments)


def _numbers(count: Any, low: float, high: float) -> Callable[[Any], bool]:
    """Return a test for lists of `count` numbers from `low` to `high`."""
    return lambda v: type(v) is list and len(v) == count and all(_is_number(x) and low <= x <= high for x in v)


def _names(count: Any) -> Callable[[Any], bool]:
    """Return a test for lists of `count` different names."""
    return lambda v: type(v) is list and all(type(x) is str and x for x in v) and len(v) == len(set(v)) == count


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
