"""Checks the nodes of drafters and verifiers against the constructors of the classes that they name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

from quasar.config.checks import converted, join, require_effect, require_known, shown
from quasar.errors import RequestError, first_line

FRAMEWORK_KEYS = {"drafter": ("_target_", "name"), "verifier": ("_target_", "name", "dtype")}
"""Keys of a drafter's or verifier's YAML that are not arguments of its class."""
_POSITIONAL = {"drafter": 0, "verifier": 2}
"""Number of arguments that a run passes by position: a verifier gets the model and its `Setup`."""


def checked_component(group: str, node: object, place: str | None = None) -> dict[str, Any]:
    """Return the node of a drafter or verifier, with numbers in the types that its class wants.

    group: drafter or verifier
    place: the configuration key of the node; the group by default

    Raises RequestError if the node names no class, if a key or a value does not fit the class's constructor, or if a
    value has no effect (`quasar.config.checks.ReadIf` in the constructor's annotations).
    """
    place = place or group
    if not isinstance(node, Mapping):
        raise RequestError(f"{place}={shown(node)}: must name one {group} of conf/{group}")
    for key in FRAMEWORK_KEYS[group]:
        if not isinstance(node.get(key), str) or node[key] in ("", "???"):
            raise RequestError(f"{place}.{key} is not set: the YAML file of a {group} has a text at {key}")
    constructor = _constructor(str(node["_target_"]), group, join(place, "_target_"))
    own = {str(key): value for key, value in node.items() if key not in FRAMEWORK_KEYS[group]}
    if not constructor.takes_any:
        require_known(own, constructor.hints, place)
    for key in constructor.required:
        if own.get(key, "???") == "???":
            raise RequestError(f"{place}.{key} is not set, and {node['_target_']} has no default for it")
    for key, value in own.items():
        if value == "???":
            raise RequestError(f"{place}.{key} is not set")
        own[key] = _checked(constructor.hints.get(key), value, join(place, key), group, str(node["name"]))
    require_effect({**constructor.defaults, **own}, constructor.hints, constructor.defaults, place)
    return {**{key: node[key] for key in node if key in FRAMEWORK_KEYS[group]}, **own}


def problem(error: Any, place: str, group: str, name: str) -> RequestError:
    """Return the RequestError for pydantic's ValidationError of the value or of the arguments at ``place``."""
    problems = []
    for details in error.errors():
        # Pydantic names the branches of a union too; only the names of arguments and the places in lists are keys.
        inner = [
            part
            for index, part in enumerate(details["loc"])
            if isinstance(part, int) or (place == group and index == 0)
        ]
        key = ".".join([place, *map(str, inner)])
        message = details["msg"]
        problems.append(f"{key}={shown(details['input'])}: {message[0].lower()}{message[1:]}")
    return RequestError(f"{'; '.join(dict.fromkeys(problems))} (documented in conf/{group}/{name}.yaml)")


def class_named(target: str, key: str) -> type:
    """Import the class ``target``. Raises RequestError if this fails; key: the configuration key that names it."""
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # an import may raise anything
        raise RequestError(f"{key}={shown(target)}: this class cannot be imported ({first_line(error)})") from None
    if not isinstance(found, type):
        raise RequestError(f"{key}={target}: is not a class")
    return found


@dataclass(frozen=True)
class _Constructor:
    """The parameters that a configuration can set.

    hints: annotation of every parameter, None if unknown
    defaults: default of every parameter that has one
    takes_any: whether it takes other keywords too
    """

    hints: dict[str, Any]
    defaults: dict[str, Any]
    required: tuple[str, ...]
    takes_any: bool


@lru_cache(maxsize=64)
def _constructor(target: str, group: str, key: str) -> _Constructor:
    cls = class_named(target, key)
    parameters = list(inspect.signature(cls).parameters.values())[_POSITIONAL[group] :]
    named = [entry for entry in parameters if entry.kind in (entry.POSITIONAL_OR_KEYWORD, entry.KEYWORD_ONLY)]
    try:
        hints = get_type_hints(inspect.getattr_static(cls, "__init__"), include_extras=True)
    except Exception:  # annotations of another package may name what is not imported
        hints = {}
    return _Constructor(
        {entry.name: hints.get(entry.name) for entry in named},
        {entry.name: entry.default for entry in named if entry.default is not entry.empty},
        tuple(entry.name for entry in named if entry.default is entry.empty),
        any(entry.kind == entry.VAR_KEYWORD for entry in parameters),
    )


def _checked(hint: Any, value: object, key: str, group: str, name: str) -> Any:
    if value == "":
        raise RequestError(f"{key}='': must not be empty; use null for none (documented in conf/{group}/{name}.yaml)")
    if hint is None:
        return value
    from pydantic import PydanticSchemaGenerationError, ValidationError

    try:
        found = converted(hint, value)
    except ValidationError as error:
        raise problem(error, key, group, name) from None
    except PydanticSchemaGenerationError:
        return value
    # Everything else stays as YAML can write it.
    return found if isinstance(found, int | float | str) and not isinstance(found, Path) else value
