"""The help of a program: the method's own options and those most used, or all of them."""

import ast
import functools
import inspect
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MOST_USED = (  # the names of settings
    *("path", "data", "image_size", "channels", "size", "patch", "epochs", "batch_size"),
    *("evaluate", "name", "resume", "device"),
)
OWN = "Options of this program"
SHARED = ("common.recipe", "common.evaluation.probe")  # modules whose settings are not a method's own


@dataclass(frozen=True)
class Setting:
    """A setting of a configuration.

    Args:
        option: its option on the command line.
        name: its name.
        value: its value.
        kind: its type.
        extras: the annotations of its type.
        owner: the class of settings that it belongs to.
        group: words for this class.
    """

    option: str
    name: str
    value: Any
    kind: Any
    extras: tuple[Any, ...]
    owner: type
    group: str


def leaves(config: Any, prefix: str = "", group: str = "") -> Iterator[Setting]:
    """Yield every setting of a configuration, with the first sentence on its group."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value, extras = getattr(config, field.name), _extras(hints[field.name])
        name = next((extra.name for extra in extras if getattr(extra, "name", None) is not None), field.name)
        if is_dataclass(value):
            words = (type(value).__doc__ or "").splitlines()[0].split(";")[0].rstrip(".")
            yield from leaves(value, f"{prefix}{name}." if name else prefix, group if prefix else words)
        else:
            option = f"--{prefix}{name.replace('_', '-')}"
            yield Setting(option, field.name, value, hints[field.name], extras, type(config), group)


def _extras(hint: Any) -> tuple[Any, ...]:
    """Return the annotations of a type, including those of nested `Annotated` types and of the members of a union."""
    parts = get_args(hint) if get_origin(hint) is Union else (hint,)
    return tuple(extra for part in parts for extra in getattr(part, "__metadata__", ()))


@functools.cache
def sentences(kind: type) -> dict[str, tuple[str, str]]:
    """Return the documentation of each field of a dataclass, and the module of the class that defines it."""
    found = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base):
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            for field, after in pairwise(getattr(tree, "body", ())):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    text = getattr(getattr(after, "value", None), "value", "")
                    found[field.target.id] = (" ".join(str(text).split()), base.__module__)
    return found


def help_text(about: str, settings: Iterable[Setting], *, everything: bool, unused: tuple[str, ...] = ()) -> str:
    """Return the help of a program.

    Args:
        about: text at the top.
        settings: all settings.
        everything: show all of them, not only the method's own and those most used.
        unused: names of settings that are not shown, since they have no effect.
    """
    columns = max(60, min(120, shutil.get_terminal_size().columns))
    groups: dict[str, list[str]] = {OWN: []}
    for setting in settings:
        sentence, module = sentences(setting.owner).get(setting.name, ("", ""))
        nested = "." in setting.option  # a setting of fine-tuning has an effect of its own
        own = not nested and setting.group == "" and module not in SHARED
        used = not nested and setting.name in MOST_USED
        if (nested or setting.name not in unused) and (everything or own or used):
            title = OWN if own else (setting.group or "Stages") if everything else "The options most used"
            sentence = sentence if everything or own else sentence.split(";")[0]
            groups.setdefault(title, []).append(_entry(setting, sentence, columns))
    parts = [f"{title}:\n" + "\n".join(entries) for title, entries in groups.items() if entries]
    more = [] if everything else ["--help-all shows all options."]
    return "\n\n".join([about, *parts, *more])


def _entry(setting: Setting, sentence: str, columns: int) -> str:
    value, option = setting.value, setting.option
    shown = " ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in _several(value))
    if isinstance(value, bool):
        before, _, name = option.rpartition(".") if "." in option else ("--", "", option[2:])
        option = f"{before}{'.' if '.' in option else ''}[no-]{name}"
    choices = ", ".join(map(str, _choices(setting.kind)))
    said = f"{choices}; " if choices and not all(word in sentence for word in choices.split(", ")) else ""
    text = f"{sentence} ({said}default: {shown or 'none'})"
    indent = " " * 20
    lines = textwrap.wrap(text, columns, initial_indent=indent, subsequent_indent=indent)
    if len(option) < 18:
        lines[0] = f"  {option:<18}{lines[0].strip()}"
        return "\n".join(lines)
    return "\n".join([f"  {option}", *lines])


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _choices(kind: Any) -> tuple[Any, ...]:
    """Return the values of a `Literal`, also within other types."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next((found for part in get_args(kind) if (found := _choices(part))), ())
