"""The texts of options in ``--help``, which tyro takes from the docstrings of fields: it keeps the
line breaks of the source, and says "(default: None)" of an option that may be left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, cast

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)


def readable() -> ConstructorRegistry:
    """tyro's rules for dataclasses, with texts in which lines run on and no default is None."""
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
        kind = Annotated[kind, tyro.conf.arg(help_behavior_hint="")]
    flowing = (lambda: _flowing(text())) if callable(text) else _flowing(text)  # read when shown
    return replace(field, helptext=flowing, type=kind)


def _flowing(text: str | None) -> str | None:
    return None if text is None else " ".join(text.split())
