"""Reads the JSON files of a model folder, which come from elsewhere. Every error names the file and the key."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quasar.config.inputs import open_regular
from quasar.errors import RequestError

if TYPE_CHECKING:
    from pydantic import BaseModel

MAX_BYTES = 256 << 20
"""The largest JSON file that is read. The tokenizers of the supported models have less than 40 MB."""

Model = TypeVar("Model", bound="BaseModel")


def read_object(file: Path) -> dict[str, Any]:
    """Read a file that contains one JSON object.

    Raises RequestError if it is missing, too large, no valid JSON or no object, or if it gives one key two values.
    """
    try:
        if not file.exists():
            raise RequestError(f"{file.parent}: contains no {file.name}; name a folder with a Hugging Face checkpoint")
        with open_regular(file) as stream:
            text = stream.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise RequestError(f"{file}: has more than {MAX_BYTES} bytes, so it is no file of a model")
        content = json.loads(text.decode(), object_pairs_hook=_without_conflicts, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{file}: not valid JSON ({error}); download the checkpoint again") from None
    except OSError as error:
        raise RequestError(f"{file}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise RequestError(f"{file}: contains {_shown(content)}, but must contain a JSON object")
    return content


def read_checked(kind: type[Model], file: Path) -> Model:
    """Read a file that contains one JSON object, as an object of a pydantic class.

    Raises RequestError like `read_object` and `checked`.
    """
    return checked(kind, read_object(file), str(file))


def checked(kind: type[Model], content: object, place: str) -> Model:
    """Return ``content`` as an object of a pydantic class.

    Raises RequestError for the first value that does not fit; the message names place, key and value.
    """
    from pydantic import ValidationError

    try:
        return kind.model_validate(content)
    except ValidationError as error:
        errors = error.errors()
        missing = [".".join(map(str, one["loc"])) for one in errors if one["type"] == "missing"]
        first = next((one for one in errors if one["type"] != "missing"), errors[0])
        if first["type"] == "missing":
            keys = ", ".join(missing)
            verb = "is" if len(missing) == 1 else "are"
            raise RequestError(f"{place}: {keys} {verb} missing; the file is incomplete") from None
        key = ".".join(str(part) for part in first["loc"] if part in _path(content, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        where = f"{key}={_shown(first['input'])}: " if key else ""
        raise RequestError(f"{place}: {where}{message[0].lower()}{message[1:]}") from None


@functools.cache
def warn_once(message: str) -> None:
    """Warn about a file, and only once in a process however often the file is read."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _path(content: Any, location: tuple[int | str, ...]) -> list[int | str]:
    """Return the parts of pydantic's location that are keys; the others name the alternatives of a union."""
    found: list[int | str] = []
    for part in location:
        keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
        if part in keys:
            content = content[part]
            found.append(part)
    return found


def _without_conflicts(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        for key, value in pairs:
            if content[key] != value:
                raise ValueError(f"key {key!r} has two different values")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"
