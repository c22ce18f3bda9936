"""The settings of a stage by name, and their values as typed text: ``loop.seed=1``."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")

FOUND_OUT = ("start", "layouts_hash", "data_hash")
"""Settings that a stage fills in itself, from the model and the data it is given."""

_BASIC = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


class SettingError(ValueError):
    """An unknown setting, or a value that it does not accept; the message names it and the fix."""


class Setting(NamedTuple):
    """A setting's value and its type, as the field is annotated."""

    value: Any
    kind: Any


def settings_of(config: Any) -> dict[str, Setting]:
    """The settings of a configuration by name; nested ones after a dot, as in ``loop.seed``."""
    found, kinds = dict[str, Setting](), get_type_hints(type(config))
    for part in fields(config):
        value = getattr(config, part.name)
        if is_dataclass(value):
            found |= {f"{part.name}.{name}": s for name, s in settings_of(value).items()}
        elif part.name not in FOUND_OUT:
            found[part.name] = Setting(value, kinds[part.name])
    return found


def assigned(config: Any, text: str) -> tuple[str, Any]:
    """Parse ``NAME=VALUE`` into the setting's full name and its value. The last part of a name is
    enough if only one setting ends in it.

    Raises:
        SettingError: there is no such setting, or the value has the wrong type.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise SettingError(f"{text}: no value; write NAME=VALUE, as in loop.seed=1")
    known = settings_of(config)
    name = _whole(name, known)
    try:
        return name, read(known[name].kind, value)
    except ValueError:
        raise SettingError(f"{name}={value}: it takes {describe_type(known[name].kind)}") from None


def _whole(name: str, known: dict[str, Setting]) -> str:
    ends = [k for k in known if k.rpartition(".")[2] == name]
    if name in known or len(ends) == 1:
        return name if name in known else ends[0]
    last = {k.rpartition(".")[2]: k for k in known}
    near = [last[k] for k in get_close_matches(name.rpartition(".")[2], last)]
    near = list(dict.fromkeys([*get_close_matches(name, known), *near]))
    mend = f"nearest: {', '.join(near[:3])}" if near else f"known: {', '.join(known)}"
    raise SettingError(f"{name}: no setting of this stage; {mend}")


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """Return the configuration with new values of settings, given by full name and set all at once.
    Raises ValueError if they are incompatible."""
    own, parts = dict[str, Any](), dict[str, dict[str, Any]]()
    for name, value in values.items():
        part, dot, rest = name.partition(".")
        if dot:
            parts.setdefault(part, {})[rest] = value
        else:
            own[part] = value
    own |= {part: with_values(getattr(config, part), inner) for part, inner in parts.items()}
    return replace(config, **own)  # type: ignore[type-var]


# --- values as text ------------------------------------------------------------------------------


def read(kind: Any, text: str) -> Any:
    """Parse a value of a field's type. Raises ValueError if the text is not one."""
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


def format_value(value: Any) -> str:
    """Format a value as `read` accepts it."""
    if isinstance(value, tuple):
        return ",".join(map(format_value, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def describe_type(kind: Any) -> str:
    """Describe in words what `read` accepts for a type."""
    options = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join("none" if k is NoneType else describe_type(k) for k in options)
    if get_origin(kind) is tuple:
        if options[1:] != (...,):
            return ",".join(map(describe_type, options))
        return f"{describe_type(options[0])} or several, with commas between"
    if get_origin(kind) is Literal:
        return " or ".join(options)
    return _BASIC[kind]
