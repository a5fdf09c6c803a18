"""Reads a dataclass from the values of a configuration: every key must be known, present and of the right type."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import MISSING as REQUIRED
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from quasar.errors import RequestError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MISSING = "???"
"""OmegaConf's value of a key that is not set."""

T = TypeVar("T")


@dataclass(frozen=True)
class Must:
    """Says in an annotation which values a key may have, as the end of the sentence "must be …"."""

    text: str


@dataclass(frozen=True)
class ReadIf:
    """Says in an annotation that a key is read only if another key of the same node has one of certain values.

    key: the other key
    among: values with which it is read; empty for all
    not_among: values with which it is not read
    """

    key: str
    among: tuple[object, ...] = ()
    not_among: tuple[object, ...] = ()

    def holds(self, value: object) -> bool:
        return value not in self.not_among and (not self.among or value in self.among)

    def remedy(self, key: str) -> str:
        """Return what to choose instead; key: the other key's place in the configuration."""
        return f"{key}={' or '.join(map(shown, self.among))}" if self.among else f"another {key}"


def require_effect(
    values: Mapping[str, object], hints: Mapping[str, Any], defaults: Mapping[str, object], place: str
) -> None:
    """Raise RequestError if a key is set that is not read with the others' values, see `ReadIf`.

    A key counts as set if it is neither null nor its default.
    """
    for name, value in values.items():
        for note in getattr(hints.get(name), "__metadata__", ()):
            if not isinstance(note, ReadIf) or value in (None, defaults.get(name)) or note.holds(values[note.key]):
                continue
            key, other = join(place, name), join(place, note.key)
            raise RequestError(
                f"{key}={shown(value)}: has no effect with {other}={shown(values[note.key])}; choose "
                f"{note.remedy(other)}, or leave {key} at {shown(defaults.get(name))} ({documented_in(place)})"
            )


def read(cls: type[T], values: object, place: str = "") -> T:
    """Return the dataclass ``cls`` with these values.

    A key that is not read with the values of the others must be left at its default (`ReadIf`).

    Its annotations are checked without conversion, except between numbers and texts where nothing is lost: a number in
    text is a number, an integer is a float or a text. So ``true`` is no number, and 1.5 no integer.

    place: the configuration key of ``values``; empty for the whole configuration

    Raises RequestError for a value that is no mapping, an unknown or a missing key, and a value that is wrong or
    has no effect.
    """
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    if not isinstance(values, dict):
        raise RequestError(f"{place}={shown(values)}: must be a mapping with the keys {', '.join(known)}")
    require_known(values, known, place)
    hints = _hints(cast(Hashable, cls))
    found = {name: _value(hints[name], values.get(name, MISSING), join(place, name)) for name in known}
    require_effect(found, hints, _usual(cast(Hashable, cls)), place)
    return cls(**found)


def require_known(values: Mapping[Any, object], known: Iterable[str], place: str) -> None:
    """Raise RequestError if a key is not in ``known``; the message names the nearest known keys."""
    known = sorted(known)
    for key, value in values.items():
        if key in known:
            continue
        near = difflib.get_close_matches(str(key), known, n=3, cutoff=0.5)
        of = f"{place} has" if place else "the configuration has"
        hint = f"did you mean {' or '.join(join(place, name) for name in near)}? " if near else ""
        choices = f"{hint}the keys are {', '.join(known)}" if known else "it takes none"
        raise RequestError(f"{join(place, str(key))}={shown(value)}: {of} no key {str(key)!r}; {choices}")


def converted(hint: Any, value: object) -> Any:
    """Return a value as the annotation ``hint`` wants it.

    Raises pydantic.ValidationError if the value does not fit, in terms of the value itself.
    """
    from pydantic import ValidationError

    adapter = _adapter(hint)
    try:
        found = adapter.validate_python(value, strict=True)
        # A literal 1 equals true.
        return adapter.validate_python(str(value), strict=True) if _is_bool(value) != _is_bool(found) else found
    except ValidationError as error:
        for other in _equal_values(value):
            try:
                return adapter.validate_python(other, strict=True)
            except ValidationError:
                continue
        raise error


def distinct(layers: list[int]) -> list[int]:
    """Return the list. Raises ValueError if it repeats a number; for annotations of lists of layers."""
    repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
    if repeated:
        raise ValueError(f"must name each layer once; {', '.join(map(str, repeated))} is repeated")
    return layers


def shown(value: object) -> str:
    """Return a value for a message, on one line and as the command line writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if text.isprintable() and text and text == text.strip() else repr(value)


def join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


@lru_cache(maxsize=64)
def _hints(cls: Hashable) -> dict[str, Any]:
    assert isinstance(cls, type)
    return get_type_hints(cls, include_extras=True)


@lru_cache(maxsize=64)
def _usual(cls: Hashable) -> dict[str, object]:
    """Return the default of every field that has one."""
    return {
        field.name: field.default if field.default_factory is REQUIRED else field.default_factory()
        for field in fields(cls)  # type: ignore[arg-type]
    }


def _value(hint: Any, value: object, key: str) -> Any:
    inner, optional = _nested(hint)
    if value == MISSING:
        raise RequestError(
            f"{key} is not set: no key of the configuration can be removed (~{key.split('.')[0]}); "
            + ("it is a mapping" if inner else f"it must be {_description(hint)}")
        )
    if inner is not None:
        return None if optional and value is None else read(inner, value, key)
    from pydantic import ValidationError

    try:
        return converted(hint, value)
    except ValidationError:
        text = shown(float(value) if isinstance(value, int) and _is_integer(value) and _takes_floats(hint) else value)
        kind = "; put a text that looks like a number in quotes" if isinstance(value, float | bool) else ""
        kind = kind if "text" in _description(hint) else ""
        raise RequestError(f"{key}={text}: must be {_description(hint)}{kind} ({documented_in(key)})") from None


def documented_in(key: str) -> str:
    """Return where a key is documented, as the end of a message."""
    group = key.split(".")[0]
    grouped = ("model", "drafter", "verifier", "decode", "data", "logger")
    return f"see conf/{group}/*.yaml" if group in grouped else "see conf/config.yaml"


def _nested(hint: Any) -> tuple[type | None, bool]:
    """Return the dataclass that a hint names, None if it names none, and whether it may be None instead."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    classes = [option for option in options if is_dataclass(option)]
    return (classes[0], type(None) in options) if classes else (None, False)  # type: ignore[return-value]


def _description(hint: Any) -> str:
    for note in getattr(hint, "__metadata__", ()):
        if isinstance(note, Must):
            return note.text
    if hint is bool:
        return "true or false"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return "a mapping"


def _takes_floats(hint: Any) -> bool:
    inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return inner is float or float in get_args(inner)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _equal_values(value: object) -> Iterator[object]:
    """Yield the values of other types that mean the same as ``value``."""
    if _is_integer(value):
        yield str(value)
    elif isinstance(value, str):
        for number in (int, float):
            try:
                found = number(value)
            except ValueError:
                continue
            if math.isfinite(found):
                yield found
        if value:
            yield Path(value)
    elif isinstance(value, list):
        if any(map(_is_integer, value)):
            yield [str(entry) if _is_integer(entry) else entry for entry in value]
        yield tuple(value)


@lru_cache(maxsize=512)
def _adapter_of(hint: Any) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter

    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
    except PydanticUserError:
        # Some types bring their own configuration.
        return TypeAdapter(hint)


def _adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        return _adapter_of(hint)
    except TypeError:
        # An annotation may hold something that cannot be hashed.
        found: TypeAdapter[Any] = _adapter_of.__wrapped__(hint)
        return found
