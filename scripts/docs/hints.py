"""Describes the values that an annotation allows, in words."""

from __future__ import annotations

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Interval, Le, Lt, MinLen

from quasar.config.checks import Must, shown

_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", type(None): "null"}
_SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def allowed(hint: Any) -> str:
    """Return the values that an annotation allows.

    Example: ``Annotated[int, Ge(1)] | None`` gives "integer ≥ 1 or null".
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _annotated(arguments[0], hint.__metadata__)
    if origin is Literal:
        return " | ".join(map(shown, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(allowed(option) for option in arguments)
    if origin in (list, Sequence):
        return f"list of: {allowed(arguments[0])}"
    if origin is dict or hint is dict:
        return "mapping"
    return _NAMES.get(hint, "")


def _annotated(base: Any, notes: tuple[Any, ...]) -> str:
    for note in notes:
        if isinstance(note, Must):
            return note.text
    # A pydantic Field holds its bounds in a list of such notes.
    flat = [inner for note in notes for inner in getattr(note, "metadata", [note])]
    bounds = ", ".join(filter(None, map(_bounds, flat)))
    return f"{allowed(base)} {bounds}".rstrip()


def _bounds(note: Any) -> str:
    if isinstance(note, MinLen):
        return "(not empty)" if note.min_length == 1 else f"(at least {note.min_length})"
    if not isinstance(note, Ge | Gt | Le | Lt | Interval):
        return ""
    found = [(sign, getattr(note, name, None)) for name, sign in _SIGNS.items()]
    return ", ".join(f"{sign} {bound}" for sign, bound in found if bound is not None)
