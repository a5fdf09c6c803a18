"""Reads the keys of a configuration file with their defaults and the comments that explain them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Key:
    """A key of a file.

    path: such as ``evaluate.passes.rows``
    default: its value as the file writes it; empty for a mapping
    meaning: its comment
    """

    path: str
    default: str
    meaning: str


def keys(file: Path) -> Iterator[Key]:
    """Yield every key of a file, mappings before the keys inside them. The defaults list is left out."""
    text = file.read_text(encoding="utf-8")
    node = yaml.compose(text)
    if isinstance(node, yaml.MappingNode):
        yield from _keys(node, "", text.splitlines())


def _keys(node: yaml.MappingNode, prefix: str, lines: list[str]) -> Iterator[Key]:
    for key, value in node.value:
        if not prefix and key.value == "defaults":
            continue
        path = f"{prefix}{key.value}"
        nested = isinstance(value, yaml.MappingNode) and not value.flow_style
        yield Key(path, "" if nested else _source(value, lines), _comment(key, value, lines))
        if isinstance(value, yaml.MappingNode) and nested:
            yield from _keys(value, f"{path}.", lines)


def _source(value: yaml.Node, lines: list[str]) -> str:
    start, end = value.start_mark, value.end_mark
    if start.line == end.line:
        return lines[start.line][start.column : end.column]
    return " ".join(line.split(" #")[0].strip() for line in lines[start.line : end.line])


def _comment(key: yaml.Node, value: yaml.Node, lines: list[str]) -> str:
    """Return the comment on the key's line and on the lines below it that continue it."""
    # What is written below the key has the comment on the line of the key.
    below_key = isinstance(value, yaml.CollectionNode) and not value.flow_style
    mark_of_end = key.end_mark if below_key else value.end_mark
    line, column = mark_of_end.line, mark_of_end.column
    before, mark, text = lines[line][column:].partition("#")
    if not mark or before.strip(" :"):
        return ""
    found = [text.strip()]
    for below in lines[line + 1 :]:
        # A comment that continues another one is further to the right than any key.
        if below.lstrip().startswith("#") and len(below) - len(below.lstrip()) > key.start_mark.column + 4:
            found.append(below.strip().removeprefix("#").strip())
        else:
            break
    return " ".join(found)
