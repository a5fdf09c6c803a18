"""From a config node to the object its ``_target_`` names, with errors that speak the user's language."""

from __future__ import annotations

from typing import Any

from hydra.utils import get_class
from pydantic import ValidationError

from quasar.errors import RequestError

# Keys of a drafter's or verifier's YAML that the framework reads itself.
_FRAMEWORK_KEYS = ("_target_", "name", "dtype")


def build(group: str, node: dict[str, Any], *arguments: Any) -> Any:
    """Construct a drafter or verifier: ``arguments`` first, then the node's own keys by name.

    Raises RequestError for a value that the class refuses, naming ``group.key=value`` and what it must be.
    """
    cls = get_class(node["_target_"])
    options = {key: value for key, value in node.items() if key not in _FRAMEWORK_KEYS}
    try:
        return cls(*arguments, **options)
    except ValidationError as error:
        problems = [_problem(group, details) for details in error.errors()]
        raise RequestError(f"{'; '.join(problems)} (documented in conf/{group}/{node['name']}.yaml)") from None


def _problem(group: str, details: Any) -> str:
    key = ".".join([group, *map(str, details["loc"])])
    message = details["msg"]
    return f"{key}={details['input']}: {message[0].lower()}{message[1:]}"
