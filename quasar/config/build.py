"""Builds the object that a config node's ``_target_`` names. Errors name the configuration key and its value."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class
from omegaconf import OmegaConf
from pydantic import ValidationError

from quasar.config.schema import CONF
from quasar.errors import RequestError

# Keys of a drafter's or verifier's YAML that are not arguments of its class.
_FRAMEWORK_KEYS = ("_target_", "name", "dtype")


def build(group: str, node: dict[str, Any], *arguments: Any) -> Any:
    """Construct a drafter or verifier with ``arguments`` by position and the node's keys by name.

    Raises RequestError if the class rejects a value; the message contains ``group.key=value`` and the allowed values.
    """
    cls = get_class(node["_target_"])
    options = {key: value for key, value in node.items() if key not in _FRAMEWORK_KEYS}
    try:
        return cls(*arguments, **options)
    except ValidationError as error:
        problems = [_problem(group, details) for details in error.errors()]
        raise RequestError(f"{'; '.join(problems)} (documented in conf/{group}/{node['name']}.yaml)") from None


def node_named(group: str, name: str) -> dict[str, Any]:
    """Return the content of conf/``group``/``name``.yaml, composed as on the command line.

    Raises RequestError if conf/ has no such file.
    """
    names = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    if name not in names:
        raise RequestError(f"{group} {name!r} is not in conf/{group}; choose one of {', '.join(names)}")
    # During a run Hydra is already initialized, with the search path of the run.
    running = GlobalHydra.instance().is_initialized()
    with nullcontext() if running else initialize_config_dir(str(CONF), version_base="1.3"):
        node = OmegaConf.to_container(compose(overrides=[f"+{group}={name}"])[group], resolve=True)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def _problem(group: str, details: Any) -> str:
    key = ".".join([group, *map(str, details["loc"])])
    message = details["msg"]
    return f"{key}={details['input']}: {message[0].lower()}{message[1:]}"
