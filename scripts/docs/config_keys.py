"""The page of every configuration key: its default and meaning from conf/, its type and range from the checks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from quasar.config.component import FRAMEWORK_KEYS, class_named
from quasar.config.schema import CONF, RunConfig
from quasar.experiment.catalogue import description
from scripts.docs.hints import allowed
from scripts.docs.markdown import escaped, row, table_head
from scripts.docs.yaml_keys import Key, keys

GROUPS = ("model", "drafter", "verifier", "decode", "data", "logger")
_INTRODUCTION = """# Configuration

Every key of a run, as `conf/` defines it. This page is made from the comments of the YAML files and from the checks
that a run makes, when the site is built. A group is chosen by `GROUP=NAME` and a key is set by `GROUP.KEY=VALUE`; both
may have several values separated by commas with `-m`.
"""


def page() -> str:
    """Return the page in Markdown."""
    parts = [_INTRODUCTION, "## All runs: `conf/config.yaml`\n", _table(CONF / "config.yaml", "", RunConfig)]
    for group in GROUPS:
        parts.append(f"## `{group}=`\n")
        for file in _files(group):
            parts += [
                f"### {group}={file.stem}\n",
                description(file) + "\n",
                _table(file, f"{group}.", _hints(group, file)),
            ]
    parts += ["## `experiment=`\n", _experiments()]
    for group in ("hydra/launcher", "hydra/sweeper"):
        parts.append(f"## `{group}=`\n")
        for file in _files(group):
            prefix = group.replace("/", ".") + "."
            parts += [f"### {group}={file.stem}\n", description(file) + "\n", _table(file, prefix, None)]
    return "\n".join(parts)


def documented(group: str) -> Iterator[tuple[Path, Key]]:
    """Yield every key of a group's files, without those that only Hydra reads."""
    for file in _files(group):
        for key in keys(file):
            if key.path != "_target_":
                yield file, key


def _files(group: str) -> list[Path]:
    return sorted((CONF / group).glob("*.yaml"))


def _hints(group: str, file: Path) -> Any:
    """Return the annotations of a file's keys: a dataclass of the schema, or those of a component's constructor."""
    if group not in FRAMEWORK_KEYS:
        return get_type_hints(RunConfig)[group]
    targets = [key.default for key in keys(file) if key.path == "_target_"]
    if not targets:
        return {}
    constructor = inspect.getattr_static(class_named(targets[0], f"{group}._target_"), "__init__")
    return get_type_hints(constructor, include_extras=True)


def _table(file: Path, prefix: str, hints: Any) -> str:
    lines = [table_head("key", "default", "values", "meaning")]
    for key in keys(file):
        if key.path in ("_target_", "hydra") or key.path.startswith("hydra."):
            continue
        hint = _hint(hints, key.path)
        if key.path == "dtype":
            values = "auto | bfloat16 | float16 | float32"
        elif key.path == "name" and prefix:
            continue
        else:
            values = "" if hint is None or is_dataclass(hint) else allowed(hint)
        default = f"`{escaped(key.default)}`" if key.default else ""
        lines.append(row(f"`{prefix}{key.path}`", default, escaped(values), escaped(key.meaning)))
    return "\n".join(lines) + "\n" if len(lines) > 1 else "It has no keys.\n"


def _hint(hints: Any, path: str) -> Any:
    """Return the annotation at a path of keys; None if there is none, as for keys of launchers."""
    for part in path.split("."):
        for option in (hints, *get_args(hints)):
            if is_dataclass(option) and isinstance(option, type):
                hints = get_type_hints(option, include_extras=True)
        if not isinstance(hints, dict):
            return None
        hints = hints.get(part)
    return hints


def _experiments() -> str:
    lines = [table_head("experiment", "question")]
    lines += [row(f"`{file.stem}`", escaped(description(file))) for file in _files("experiment")]
    return "\n".join(lines) + "\n"
