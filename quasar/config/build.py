"""Builds the object that a config node's ``_target_`` names. Errors name the configuration key and its value."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from pydantic import ValidationError

from quasar.config.checks import shown
from quasar.config.component import FRAMEWORK_KEYS, checked_component, class_named, problem
from quasar.config.schema import CONF
from quasar.errors import RequestError


def build(group: str, node: dict[str, Any], *arguments: Any) -> Any:
    """Construct a drafter or verifier with ``arguments`` by position and the node's keys by name.

    Raises RequestError if the class rejects a key or a value; the message contains ``group.key=value`` and the allowed
    values.
    """
    node = checked_component(group, node)
    options = {key: value for key, value in node.items() if key not in FRAMEWORK_KEYS[group]}
    try:
        return class_named(node["_target_"], f"{group}._target_")(*arguments, **options)
    except ValidationError as error:
        raise problem(error, group, group, node["name"]) from None


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


def chosen_node(group: str, choice: str | dict[str, Any], place: str) -> dict[str, Any]:
    """Return the node that another node chooses: a file of conf/``group``, with the values that the choice replaces.

    choice: the file's name, or a mapping with this ``name`` and values, such as ``{name: ngram, num_tokens: 8}``
    place: the configuration key of the choice

    Raises RequestError if there is no such file, or if a key or a value does not fit its class.
    """
    given = {"name": choice} if isinstance(choice, str) else choice
    if not isinstance(given.get("name"), str):
        raise RequestError(f"{place} has {shown(choice)}, which lacks a name of conf/{group}")
    node = {**node_named(group, given["name"]), **given}
    checked_component(group, node, place)
    return node
