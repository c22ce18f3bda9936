"""How ``--help`` shows options. tyro keeps the line breaks of a field's docstring, and of an option
that may be left out it says "(default: None)" and "{None}|INT", though nobody types None."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}


def readable() -> ConstructorRegistry:
    """tyro's rules for dataclasses, with flowing texts and without its None."""
    registry, asking = ConstructorRegistry(), list[StructTypeInfo]()

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if asking:  # tyro's own rules are to answer
            return None
        asking.append(info)
        try:
            spec = registry.get_struct_spec(info)
        finally:
            asking.clear()
        if not isinstance(spec, StructConstructorSpec):
            return None
        return replace(spec, fields=tuple(map(_readable, spec.fields)))

    return registry


def _readable(field: StructFieldSpec) -> StructFieldSpec:
    text, kind = field.helptext, cast(Any, field.type)
    if field.default is None:
        kind = Annotated[kind, tyro.conf.arg(help_behavior_hint="", metavar=_metavar(kind))]
    flowing = (lambda: _flowing(text())) if callable(text) else _flowing(text)  # read when shown
    return replace(field, helptext=flowing, type=kind)


def _metavar(kind: Any) -> str | None:
    """Of an optional option, that of the type it has if given; else None, for tyro's own."""
    given = [part for part in get_args(kind) if part is not NoneType]
    if get_origin(kind) not in (Union, UnionType) or len(given) != 1:
        return None
    if get_origin(given[0]) is Literal:
        return f"{{{','.join(get_args(given[0]))}}}"
    if get_origin(given[0]) is tuple:
        return " ".join(METAVARS[part] for part in get_args(given[0]))
    return METAVARS.get(given[0])


def _flowing(text: str | None) -> str | None:
    return None if text is None else " ".join(text.split())
