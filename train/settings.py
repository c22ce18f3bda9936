"""Every setting of a stage by its name, and its value as text: ``loop.seed=1``, as it is typed."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")

FOUND_OUT = ("start", "layouts_hash", "data_hash")
"""Settings that a stage finds out by itself, from the model and the data it is given."""

_BASIC = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


class SettingError(ValueError):
    """A setting that there is not, or a value that it does not take; names both and the mend."""


class Setting(NamedTuple):
    """A setting's value and its type, as the field is annotated."""

    value: Any
    kind: Any


def settings_of(config: Any) -> dict[str, Setting]:
    """The settings of a configuration by name; those of a part behind a dot, as ``loop.seed``."""
    found, kinds = dict[str, Setting](), get_type_hints(type(config))
    for part in fields(config):
        value = getattr(config, part.name)
        if is_dataclass(value):
            found |= {f"{part.name}.{name}": s for name, s in settings_of(value).items()}
        elif part.name not in FOUND_OUT:
            found[part.name] = Setting(value, kinds[part.name])
    return found


def assigned(config: Any, text: str) -> tuple[str, Any]:
    """``NAME=VALUE`` → the setting's whole name, of which the last part is enough where only one
    setting ends in it, and the value.

    Raises:
        SettingError: no such setting, or a value of another type.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise SettingError(f"{text}: no value; write NAME=VALUE, as in loop.seed=1")
    known = settings_of(config)
    name = _whole(name, known)
    try:
        return name, read(known[name].kind, value)
    except ValueError:
        raise SettingError(f"{name}={value}: it takes {accepted(known[name].kind)}") from None


def _whole(name: str, known: dict[str, Setting]) -> str:
    ends = [k for k in known if k.rpartition(".")[2] == name]
    if name in known or len(ends) == 1:
        return name if name in known else ends[0]
    last = {k.rpartition(".")[2]: k for k in known}
    near = [last[k] for k in get_close_matches(name.rpartition(".")[2], last)]
    near = list(dict.fromkeys([*get_close_matches(name, known), *near]))
    mend = f"nearest: {', '.join(near[:3])}" if near else f"known: {', '.join(known)}"
    raise SettingError(f"{name}: no setting of this stage; {mend}")


def changed(config: Config, values: dict[str, Any]) -> Config:
    """The configuration with other values of settings, by whole name, all of them at once. Raises
    ValueError where they do not go together."""
    own, parts = dict[str, Any](), dict[str, dict[str, Any]]()
    for name, value in values.items():
        part, dot, rest = name.partition(".")
        if dot:
            parts.setdefault(part, {})[rest] = value
        else:
            own[part] = value
    own |= {part: changed(getattr(config, part), inner) for part, inner in parts.items()}
    return replace(config, **own)  # type: ignore[type-var]


# --- values as text ------------------------------------------------------------------------------


def read(kind: Any, text: str) -> Any:
    """A value of a field's type. Raises ValueError where the text is none."""
    options = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        if NoneType in options and text.lower() == "none":
            return None
        (kind,) = (option for option in options if option is not NoneType)
        return read(kind, text)
    if get_origin(kind) is tuple:
        parts = [part.strip() for part in text.strip("() ").split(",") if part.strip()]
        each = options[:1] * len(parts) if options[1:] == (...,) else options
        return tuple(read(k, part) for k, part in zip(each, parts, strict=True))
    if get_origin(kind) is Literal:
        return options[options.index(text)]
    if kind is bool:
        return ("false", "true").index(text.lower()) == 1
    value = kind(text)
    if kind is float and not math.isfinite(value):
        raise ValueError(text)
    return value


def written(value: Any) -> str:
    """A value as `read` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(written, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def accepted(kind: Any) -> str:
    """What `read` takes for a type, in words."""
    options = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join("none" if k is NoneType else accepted(k) for k in options)
    if get_origin(kind) is tuple:
        if options[1:] != (...,):
            return ",".join(map(accepted, options))
        return f"{accepted(options[0])} or several, with commas between"
    if get_origin(kind) is Literal:
        return " or ".join(options)
    return _BASIC[kind]
