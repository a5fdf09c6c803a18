"""From a config node to the object its ``_target_`` names, with errors that speak the user's language."""

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


def node_named(group: str, name: str) -> dict[str, Any]:
    """The content of conf/``group``/``name``.yaml, as the command line would compose it.

    Raises RequestError for a name that conf/ does not have.
    """
    names = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    if name not in names:
        raise RequestError(f"{group} {name!r} is not in conf/{group}; there are {', '.join(names)}")
    # Inside a run Hydra is at work already, with the run's own search path.
    running = GlobalHydra.instance().is_initialized()
    with nullcontext() if running else initialize_config_dir(str(CONF), version_base="1.3"):
        node = OmegaConf.to_container(compose(overrides=[f"+{group}={name}"])[group], resolve=True)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def _problem(group: str, details: Any) -> str:
    key = ".".join([group, *map(str, details["loc"])])
    message = details["msg"]
    return f"{key}={details['input']}: {message[0].lower()}{message[1:]}"
