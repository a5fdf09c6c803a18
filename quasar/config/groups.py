"""Compares a configuration with the YAML files that were chosen for its groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from quasar.config.checks import shown
from quasar.errors import RequestError

GROUPS = ("model", "drafter", "verifier", "decode", "data", "logger")
"""The groups of which a run has exactly one file."""
_EXCHANGEABLE = ("auto", "hub", "package")
"""Sources of the same weights."""


def check_choices(values: Mapping[str, Any], choices: Mapping[str, str | None]) -> None:
    """Raise RequestError if the values contradict the files that their labels in the results refer to.

    This is the case if a group has no file or several, if a key of a file was removed, if a ``name`` was changed, or if
    ``_target_`` or ``model.source`` make it another drafter, verifier or model. The files are read through the search
    path of the Hydra job that is running.

    choices: the name of the chosen file of every group
    """
    for group in GROUPS:
        choice = choices.get(group)
        if choice is None:
            options = ", ".join(_options(group))
            raise RequestError(
                f"{group} must be one file of conf/{group}: {options}; to run several, use -m with {group}=A,B"
            )
        _check_node(group, group, choice, values.get(group))
    for key, choice in choices.items():
        group, at, place = key.partition("@")
        if at and group in GROUPS and choice is not None:
            node: Any = values
            for part in place.split("."):
                node = node.get(part) if isinstance(node, dict) else None
            _check_node(key, place, choice, node)


def _check_node(override: str, place: str, choice: str, node: object) -> None:
    """Compare the node at ``place`` with its file. override: what chooses another file on the command line."""
    group = override.partition("@")[0]
    file = _load(f"{group}/{choice}")
    if file is None or not isinstance(node, dict):
        return
    for key in file:
        if key != "defaults" and key not in node:
            raise RequestError(f"~{place}.{key}: no key can be removed; give {place}.{key} another value")
    if "name" in file and node.get("name") != file["name"]:
        raise RequestError(
            f"{place}.name={shown(node.get('name'))}: must be {file['name']}, because the results of "
            f"{override}={choice} are labelled by it; choose another file by {override}=NAME, one of "
            f"{', '.join(_options(group))}"
        )
    target = node.get("_target_")
    if target != file.get("_target_"):
        for other in _options(group):
            if (_load(f"{group}/{other}") or {}).get("_target_") == target:
                raise RequestError(
                    f"{place}._target_={target}: is the class of {group}={other}; choose it by {override}={other}"
                )
    source = node.get("source")
    if group == "model" and source != file["source"]:
        allowed = _EXCHANGEABLE if file["source"] in _EXCHANGEABLE else (file["source"],)
        if source not in allowed:
            raise RequestError(f"model.source={shown(source)}: must be {' or '.join(allowed)} with model={choice}")


def _load(path: str) -> dict[str, Any] | None:
    """Return the content of a file of the search path without its defaults list; None if there is none."""
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, ConfigLoaderImpl)
    files = _FILES.setdefault(loader.repository, {})
    if path not in files:
        files[path] = _loaded(loader.repository, path)
    return files[path]


# A sweep reads the same files for each of its jobs. They are forgotten with the search path that they come from.
_FILES: WeakKeyDictionary[IConfigRepository, dict[str, dict[str, Any] | None]] = WeakKeyDictionary()


def _loaded(repository: IConfigRepository, path: str) -> dict[str, Any] | None:
    result = repository.load_config(path)
    if result is None or not isinstance(result.config, DictConfig):
        return None
    found = OmegaConf.to_container(result.config, resolve=False)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _options(group: str) -> list[str]:
    found: list[str] = GlobalHydra.instance().config_loader().get_group_options(group)
    return found
